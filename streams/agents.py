"""The three agents' work, one keeper a partition: take what has come, work on it, flush it, tell what is durable.

A keeper owns one partition's state (state.partition) and its inbox. Faust's agents only put record batches into the
inbox; the keeper's own task takes all that is there, so that a backlog is worked off in large batches.

    UserKeeper       clicks, comments, erasures -> user rows -> examples
    CatalogueKeeper  items            -> catalogue rows      -> item entries in the examples log
    LearnerKeeper    examples         -> item matrix, rows by a byte budget
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeAlias, TypeVar, cast

import numpy as np
import structlog
from aiokafka.errors import KafkaError

from model.evaluate import LiveMetrics
from model.learner import HALF_LIVES_POSITIVES
from state.changelog import LogRecord
from state.partition import OpenReport, Partition
from state.sealing import Sealer, SealError, is_sealed
from state.store import StoreCorruptError
from streams import codec, examples, pipeline
from streams.answers import ModelUnlearnt
from streams.codec import Record, Reject
from streams.encoding import Encoder, Encoding
from streams.erasure import Book, Eraser, Reach, erasure_id
from streams.events import Click, Comment, Erasure, Item, Withdrawn
from streams.inbox import Entry, Inbox
from streams.kafka import in_reach
from streams.pipeline import EvidenceConfig, ItemLearner, Learnt, SourceEvent
from streams.space import Encoders, Starts, starts_of
from streams.telemetry import Telemetry

log = structlog.get_logger(__name__)

BATCH_EVENTS_MAX: Final = 1000  # a flush of the user side: some 10 ms of Python, so the loop stays responsive
BATCH_MESSAGES_MAX: Final = 64  # examples messages a call of the learner: bounds how long a flush waits for it
INBOX_RECORDS_MAX: Final = 20_000  # a topic's queue; above it the consumer pauses the partition
INBOX_RECORDS_LOW: Final = 5_000
INBOX_BYTES_MAX: Final = 32 << 20  # as well: 20,000 of the longest comments would be gigabytes
INBOX_BYTES_LOW: Final = 8 << 20
ROW_OVERHEAD_BYTES: Final = 150  # two headers of bytes, and a place in a dict that doubles as it grows
SWEEP_IDLE_S: Final = 1.0
REACH_WAIT_S: Final = 1.0
PROGRESS_S: Final = 1.0  # between two words on how far a state that is learnt again has come
SHOWN_EVENTS_MAX: Final = 5  # of a batch, told to those who watch
NEW_ITEM_S_MAX: Final = 86_400.0  # an item that waits for an older time is of a recorded stream: its events tell that
TIME_KEY: Final = b"time"  # of the message of a time; others have their source partition
MISPLACED_TOLD_S: Final = 60.0  # between two warnings
FINISH_BYTES_MAX: Final = 32 << 20  # of item rows flushed on a stop: it has 5 s; the examples log holds the rest
assert INBOX_RECORDS_LOW >= BATCH_EVENTS_MAX, "a resumed partition must not run dry while it fetches"

# Names of an outcome's popularity ranks, by the half-life of the counts in positives.
POPULARITIES: Final = tuple(
    "popularity" if half_life is None else f"popularity_{half_life}" for half_life in HALF_LIVES_POSITIVES
)

USER_CODES: Final = {name: code for code, name in examples.USER_SOURCES.items()}

T = TypeVar("T")
UserEvent: TypeAlias = Click | Comment | Erasure


class LogTruncatedError(RuntimeError):
    """A source log no longer holds what the state still needs."""

    def __init__(self, topic: str, partition: int, begins: int, expected: int) -> None:
        super().__init__(
            f"{topic}:{partition} begins at offset {begins}, but the state needs {expected}: {begins - expected} "
            "offsets are gone (retention). Restore them; or, to start from what is left, delete the state folders and "
            "the changelogs of this app id, or set another HEADWATER_APP_ID"
        )


class LogResetError(RuntimeError):
    """A source log ends before what the state has applied of it."""

    def __init__(self, topic: str, partition: int, ends: int, expected: int) -> None:
        super().__init__(
            f"{topic}:{partition} ends at offset {ends}, but the state has applied it up to {expected - 1}: the topic "
            "was made anew, or its broker has lost acknowledged records. Restore the topic; or, to start with the new "
            "one, delete the state folders and the changelogs of this app id, or set another HEADWATER_APP_ID"
        )


@dataclass(frozen=True)
class Surroundings:
    """What all keepers of a worker share."""

    now: Callable[[], float]
    metrics: Telemetry
    evidence: EvidenceConfig
    encoding: Encoding
    encoders: Encoders
    number_of: Callable[[bytes | None], int | None]  # of the encoder of a mark; None: it says nothing to this app id
    marked: Callable[[bytes | None], Awaitable[int | None]]  # the same as the log of encoders has it; it is loaded then
    end_of: Callable[[str, int], int | None]  # (topic, partition) -> where the log ends; None: not known, or not lately
    partition_of: Callable[[bytes], int]  # where Kafka's default partitioner puts a key
    first_at: Callable[[str, int, int], Awaitable[tuple[int, int]]]  # streams.kafka.first_at_or_after
    dead_letter: Callable[[codec.DeadLetter], Awaitable[None]]
    durable: Callable[[str, int, int], None]  # (topic, partition, next offset): may be committed
    changed: Callable[[Click | Comment | Erasure], None]  # for whoever watches the stream go by
    failed: Callable[["Keeper[Any]", BaseException], None]  # a keeper's task has ended with this
    user_cache_bytes: Callable[[], int]  # what one partition's rows may take in memory
    merge_hold_s: float
    flush_linger_s: float
    book: Book
    reach: Reach
    sealer: Sealer | None = None  # of users' rows and examples


class Keeper(ABC, Generic[T]):
    """One partition: `open`, then `offer` from the agent while `run` works; `settle` before it is given away."""

    kind: str
    batch_max: int
    texts_of: str = ""  # code name of the source that has texts to encode

    def __init__(self, number: int, partition: Partition, topics: dict[str, str], around: Surroundings) -> None:
        self.number = number
        self.partition = partition
        self.topics = topics  # name with prefix -> name in the code ("clicks")
        self.around = around
        self.linger_s = around.flush_linger_s  # gathers events for the next flush
        self.inbox: Inbox[T] = Inbox({}, around.merge_hold_s)
        self.report: OpenReport | None = None  # while it is open
        self.starts = Starts()  # of the encoders that read its texts
        self._awaited: int | None = None  # number of the encoder of a mark that was not loaded when it came
        self._arrived = asyncio.Event()
        self._misplaced_told_s = float("-inf")
        self._settling = False
        self._closing = False
        self._working = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    # -- life

    async def open(self) -> None:
        """Claims the partition and restores its state; then takes records."""
        started = self.around.now()
        self.report = await self.partition.open()
        await self.load()
        if self.texts_of:
            self.starts = await self._first_starts()
            await self.around.encoders.load_from(self.starts, self.partition.applied[self.texts_of] + 1)
        self.resume()
        seconds = self.around.now() - started
        self.around.metrics.restored(self.kind, seconds)
        if self.report.reason:
            log.warning("what the disk had was discarded; restored from the changelog", kind=self.kind,
                        partition=self.number, reason=self.report.reason)  # fmt: skip
        log.info("partition open", kind=self.kind, partition=self.number, opened=self.report.kind,
                 epoch=self.report.epoch, rows_read=self.report.read, applied=self.report.applied,
                 seconds=round(seconds, 3))  # fmt: skip

    async def load(self) -> None:
        """Reads what the keeper holds in memory from the store."""

    async def _first_starts(self) -> Starts:
        """As the state has them. Of a log that has lost its beginning, maybe a mark with it, a state that holds nothing
        of it reads all by the encoder in use."""
        starts, number = starts_of(self.partition.get_many), self.around.encoders.number
        if number and not starts.pairs and self.partition.applied[self.texts_of] < 0:
            topic = next(topic for topic, name in self.topics.items() if name == self.texts_of)
            _, begins = await self.around.first_at(topic, self.number, 0)
            if begins > 0:
                return starts.then(number, 0)
        return starts

    def resume(self) -> None:
        """Takes records from just after what is applied; one that takes them already goes on, with what it has."""
        if self._task is not None and not self._task.done() and not self._settling:
            return  # it was opened after the others were settled: a batch may be under way
        applied = self.applied()
        self.inbox = Inbox({t: applied[name] + 1 for t, name in self.topics.items()}, self.around.merge_hold_s)
        self._settling = False
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run(), name=f"{self.kind}-{self.number}")

    async def _read_marks(self, topic: str, records: Sequence[Record]) -> bool:
        """Whether the encoders that texts of a batch go over to are loaded: the partition waits for them."""
        if self.topics[topic] != self.texts_of:
            return True
        for record in records:
            if record.key is not None and record.key.startswith(codec.MARK):
                self._awaited = await self.around.marked(record.value)
                if self._is_waiting():
                    return False
        return True

    def _is_waiting(self) -> bool:
        """Whether nothing is taken until an encoder is loaded."""
        return self._awaited is not None and not self.around.encoders.is_loaded(self._awaited)

    def _pass_mark(self, record: Record) -> "_Mark":
        """What comes behind it is read by its encoder, if it is one of ours."""
        number = self.around.number_of(record.value)
        if number is not None:
            self.starts = self.starts.then(number, record.offset + 1)
        return _Mark()

    def _encoder_at(self, offset: int) -> Encoder:
        return self.around.encoders.at(self.starts.number_at(offset))

    @property
    def texts_read_by(self) -> int:
        """Number of the encoder that reads what comes behind all whose examples are in their log."""
        return self.starts.number_at(self.partition.durable[self.texts_of] + 1)

    def _starts_row(self, entries: Sequence[tuple[str, Entry[Any]]]) -> dict[bytes, bytes | None]:
        """The row of the encoders' starts, where a mark is among what is flushed, or no text was before."""
        marks = [entry.offset for _, entry in entries if isinstance(entry.work, _Mark)]
        if marks:
            return self.starts.until(marks[-1] + 1).row()
        return self.starts.until(0).row() if self.partition.applied[self.texts_of] < 0 else {}

    def applied(self) -> dict[str, int]:
        """Last offset whose effect this keeper holds, a source topic (code name)."""
        return dict(self.partition.applied)

    def next_offset(self, topic: str) -> int:
        """Where to read the topic (name with prefix) from."""
        return self.applied()[self.topics[topic]] + 1

    async def settle(self) -> None:
        """Stops taking, finishes the batch under way and makes everything durable. `resume` or `close` follows."""
        self._settling = True
        self._arrived.set()
        async with self._working:
            await self.finish()
            await self.partition.drain()

    async def finish(self) -> None:
        """What must still be flushed before the partition is given away."""

    async def close(self) -> None:
        """Gives the partition's store back. Call `settle` first, unless it is fenced."""
        self._settling = self._closing = True
        self.report = None
        self._arrived.set()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
        await self.partition.close()

    # -- records in

    async def offer(self, topic: str, records: Sequence[Record]) -> int | None:
        """Takes a batch in offset order. Returns the offset to seek back to when the batch begins beyond a hole.

        Raises LogTruncatedError when the log no longer holds what comes next. While the keeper waits for an encoder
        nothing is taken: `is_full`.
        """
        if self._is_waiting() or not await self._read_marks(topic, records):
            return None
        source = self.inbox.sources[topic]
        while records and records[0].offset < source.expected:
            records = [r for r in records if r.offset >= source.expected]
        if not records or self._settling:
            return None
        if records[0].offset > source.expected:
            first, beginning = await self.around.first_at(topic, self.number, source.expected)
            if beginning > source.expected > 0 and first == records[0].offset:
                raise LogTruncatedError(topic, self.number, beginning, source.expected)
            if first < records[0].offset:
                return source.expected
        size = sum(len(record.value or b"") for record in records)
        self.inbox.put(topic, self.prepare(topic, records), records[-1].offset + 1, self.around.now(), size)
        self._arrived.set()
        return None

    def _check_place(self, topic: str, records: Sequence[Record]) -> None:
        """Tells of a producer whose partitioner is not Kafka's own: its events are learnt, and reads look elsewhere.

        One record a batch is looked at: such a producer misplaces most of them, and murmur2 is slow here.
        """
        key = records[-1].key
        if key is None or key.startswith(codec.MARK) or self.around.partition_of(key) == self.number:
            return
        self.around.metrics.misplaced(self.topics[topic])
        now = self.around.now()
        if now - self._misplaced_told_s >= MISPLACED_TOLD_S:
            self._misplaced_told_s = now
            log.warning("a record lies in another partition than its key's: set its producer's partitioner to murmur2 "
                        "(librdkafka: murmur2_random)", topic=topic, partition=self.number,
                        offset=records[-1].offset)  # fmt: skip

    def is_full(self, topic: str) -> bool:
        """Whether the consumer should pause this topic's partition for now."""
        source = self.inbox.sources[topic]
        return (
            self._is_waiting() or len(source.entries) >= INBOX_RECORDS_MAX or source.bytes_waiting() >= INBOX_BYTES_MAX
        )

    def is_low(self, topic: str) -> bool:
        """Whether a paused partition should be fetched again."""
        source = self.inbox.sources[topic]
        is_short = len(source.entries) <= INBOX_RECORDS_LOW and source.bytes_waiting() <= INBOX_BYTES_LOW
        return is_short and not self._is_waiting()

    @abstractmethod
    def prepare(self, topic: str, records: Sequence[Record]) -> list[tuple[float, int, T | None]]:
        """(merge time, offset, work) of each record."""

    # -- work

    async def _run(self) -> None:
        try:
            while not self._closing:
                await self._await_work()
                async with self._working:
                    if not self._settling:
                        await self._step()
        except asyncio.CancelledError:
            raise
        except BaseException as failure:
            self.around.failed(self, failure)

    async def _await_work(self) -> None:
        """Until something has come, for at most SWEEP_IDLE_S."""
        timer = asyncio.get_running_loop().call_later(SWEEP_IDLE_S, self._arrived.set)
        await self._arrived.wait()
        timer.cancel()
        self._arrived.clear()

    async def _step(self) -> None:
        entries, wait = self._take()
        while entries:
            await self.work(entries)
            if self._settling:
                return
            if self.linger_s and len(entries) < self.batch_max:
                await asyncio.sleep(self.linger_s)
            entries, wait = self._take()
        await self.idle()
        if wait is not None:
            asyncio.get_running_loop().call_later(max(wait, 0.001), self._arrived.set)

    def _take(self) -> tuple[list[tuple[str, Entry[T]]], float | None]:
        if self._is_waiting():
            return [], None
        ends = {topic: self.around.end_of(topic, self.number) for topic in self.topics}
        return self.inbox.take(self.around.now(), ends.get, self.batch_max)

    @abstractmethod
    async def work(self, entries: list[tuple[str, Entry[T]]]) -> None:
        """Applies entries, in order, up to and with their flush."""

    async def idle(self) -> None:
        """When nothing waits: the store's housekeeping."""
        await self.partition.sweep()

    def _advanced(self, entries: list[tuple[str, Entry[T]]]) -> dict[str, int]:
        applied = dict(self.partition.applied)
        for topic, entry in entries:
            applied[self.topics[topic]] = entry.offset
        return applied

    async def _bury(self, topic_rejects: Sequence[Reject]) -> None:
        """Dead letters go out before the offsets that they are at are applied: none is lost, some may repeat."""
        for reject in topic_rejects:
            assert reject.record is not None
            await self.around.dead_letter(codec.dead_letter(reject))
            self.around.metrics.dead_letter(self.topics[reject.record.topic], reject.reason.value)


def _record_s(record: Record) -> float:
    return record.timestamp / 1e3


class RowCache:
    """The rows of recent flushes as bytes, written through, in two generations.

    What is written goes to the young ones; once these have half of `bytes_max`, they are the old ones, and the old
    ones leave. So a row leaves that was not written for as long as it takes to write half of the bytes, and those of
    the flush under way are there whatever they take. bytes_max: asked at each flush.
    """

    def __init__(self, read: pipeline.GetMany, bytes_max: Callable[[], int]) -> None:
        self._read = read
        self._young: dict[bytes, bytes] = {}
        self._old: dict[bytes, bytes] = {}
        self._deleted: set[bytes] = set()  # by the flush under way
        self._young_bytes = 0
        self._bytes_max = bytes_max

    def get_many(self, keys: list[bytes]) -> list[bytes | None]:
        """As the store's: a row or None for each key."""
        young, old = self._young, self._old
        found: list[bytes | None] = [young.get(key) or old.get(key) for key in keys]
        missing = [at for at, value in enumerate(found) if value is None and keys[at] not in self._deleted]
        if missing:
            for at, value in zip(missing, self._read([keys[at] for at in missing]), strict=True):
                found[at] = value
        return found

    def put_many(self, changed: Mapping[bytes, bytes | None]) -> None:
        """Takes what a flush is to write; of a row that it deletes the key alone is kept, until it is `flushed`."""
        for key, value in changed.items():
            before = self._young.pop(key, None)
            if before is not None:
                self._young_bytes -= len(key) + len(before) + ROW_OVERHEAD_BYTES
            if value is None:
                self._old.pop(key, None)
                self._deleted.add(key)
                continue
            self._young[key] = value
            self._young_bytes += len(key) + len(value) + ROW_OVERHEAD_BYTES
        if self._young_bytes > self._bytes_max() // 2:
            self._old, self._young, self._young_bytes = self._young, {}, 0

    def flushed(self) -> None:
        """What was put is in the store."""
        self._deleted.clear()


class _Mark:
    """A record that is no event: it is passed."""


@dataclass(slots=True)
class _UserWork:
    event: UserEvent
    record_s: float
    vector: asyncio.Future[np.ndarray[Any, np.dtype[np.float32]]] | None


def decode_timed(name: str, records: Sequence[Record]) -> list[tuple[float, Record, UserEvent | Reject | None]]:
    """(merge time, record, what it holds) of records of a source of the user state, in their order; None of a mark,
    which no event waits for."""
    decoded: codec.Decoded[Any] = codec.decode_batch(cast(codec.Topic, name), records)
    timed: list[tuple[float, Record, UserEvent | Reject | None]] = [
        (min(event.ts, _record_s(record)), record, event)
        for event, record in zip(decoded.events, decoded.records, strict=True)
    ]
    if decoded.rejects or decoded.marks:
        timed += [(_record_s(r.record), r.record, r) for r in decoded.rejects if r.record is not None]
        timed += [(0.0, record, None) for record in decoded.marks]
        timed.sort(key=lambda entry: entry[1].offset)
    return timed


class UserKeeper(Keeper["_UserWork | Reject"]):
    """clicks, comments and erasures of one partition -> user rows and examples."""

    kind = "users"
    batch_max = BATCH_EVENTS_MAX
    texts_of = "comments"

    def __init__(self, number: int, partition: Partition, topics: dict[str, str], around: Surroundings) -> None:
        super().__init__(number, partition, topics, around)
        self.cache = RowCache(partition.get_many, around.user_cache_bytes)
        self.shown: dict[str, int] = {}  # last offset in the rows that a read sees, which may be in mid-flush
        self.eraser = Eraser(
            number, partition, around.book, around.reach, self._working, lambda: self._settling or self._closing
        )

    async def load(self) -> None:
        """The cache starts empty: another store may lie behind it now."""
        first = next(self.partition.items(), None)
        if first is not None and self.around.sealer is None and is_sealed(first[1]):
            raise SealError("users' rows are sealed here, and no data keys are set: set HEADWATER_DATA_KEYS_FILE")
        self.cache = RowCache(self.partition.get_many, self.around.user_cache_bytes)
        self.shown = dict(self.partition.applied)

    async def idle(self) -> None:
        """As every keeper's; and erasures go on."""
        await super().idle()
        self.eraser.pursue()

    async def close(self) -> None:
        """As every keeper's, after the erasures' own work."""
        self._settling = self._closing = True
        await self.eraser.close()
        await super().close()

    def prepare(self, topic: str, records: Sequence[Record]) -> list[tuple[float, int, Any]]:
        """Decodes, and starts the encoding of texts at once, ahead of their turn."""
        self._check_place(topic, records)
        name = self.topics[topic]
        work: list[tuple[float, int, Any]] = []
        passed = rejects = 0
        for at, record, event in decode_timed(name, records):
            if event is None:
                passed += 1
                work.append((at, record.offset, self._pass_mark(record)))
                continue
            if isinstance(event, Reject):
                rejects += 1
                work.append((at, record.offset, event))
                continue
            vector = None
            if isinstance(event, Comment):
                vector = self.around.encoding.submit(event.text, self._encoder_at(record.offset))
            work.append((at, record.offset, _UserWork(event, _record_s(record), vector)))
        self.around.metrics.consumed(name, len(records) - rejects - passed, rejects)
        return work

    async def work(self, entries: list[tuple[str, Entry[Any]]]) -> None:
        """Folds a batch of events into their users' rows and flushes."""
        events: list[SourceEvent] = []
        rejects: list[Reject] = []
        stamps: list[float] = []
        for topic, entry in entries:
            item = entry.work
            if isinstance(item, Reject):
                rejects.append(item)
                continue
            if isinstance(item, _Mark):
                continue
            assert item is not None
            code = USER_CODES[self.topics[topic]]
            vector = await item.vector if item.vector is not None else None
            events.append(SourceEvent(code, entry.offset, item.event, vector))
            stamps.append(item.record_s)
        await self._bury(rejects)
        metrics = self.around.metrics
        with metrics.stage("fold"):
            batch = pipeline.learn_users(self.number, events, self.cache.get_many, self.around.evidence)
        for erased in batch.erased:
            await self._announce(erased, entries)
        with metrics.stage("user_flush"):
            downstream = [(b"%d" % self.number, message) for message in batch.messages]
            advanced = self._advanced(entries)
            self.cache.put_many(batch.rows)  # with `shown`, at once: a read's rows and offsets are of one moment
            self.shown = advanced
            await self.partition.flush(batch.rows | self._starts_row(entries), downstream, advanced)
            self.cache.flushed()
        now = self.around.now()
        metrics.users_learnt(events, stamps, batch, now)
        for source in events[-SHOWN_EVENTS_MAX:]:
            self.around.changed(source.event)
        if batch.erased:
            self.eraser.pursue()

    async def _announce(self, erased: pipeline.Erased, entries: list[tuple[str, Entry[Any]]]) -> None:
        """Tells of an erasure of this batch, with the offsets that come before it in the order."""
        place = dict(self.partition.applied)
        for topic, entry in entries:
            place[self.topics[topic]] = entry.offset
            if self.topics[topic] == "erasures" and entry.offset == erased.offset:
                assert isinstance(entry.work, _UserWork)
                await self.eraser.announce(erased, entry.work.record_s, place)
                return

    @property
    def next_encoder(self) -> Encoder:
        """The one of a comment that would come next to what is shown."""
        return self._encoder_at(self.shown["comments"] + 1)

    def row(self, user_id: str) -> bytes | None:
        """The user's row as of now. A disk that a read finds corrupt ends the worker, as one that the stream finds: the
        next start restores it, and till then reads of the user would fail, one after the other."""
        try:
            return self.cache.get_many([user_id.encode()])[0]
        except StoreCorruptError as failure:
            self.around.failed(self, failure)
            raise


def _learn_all(learner: ItemLearner, records: Sequence[LogRecord]) -> None:
    learner.learn_all([(record.offset, record.value) for record in records if record.value])


@dataclass(slots=True)
class _ItemWork:
    item: Item | Withdrawn
    vector: asyncio.Future[np.ndarray[Any, np.dtype[np.float32]]] | None


class CatalogueKeeper(Keeper["_ItemWork | Reject"]):
    """items of one partition -> catalogue rows and item entries in the examples log."""

    kind = "catalogue"
    batch_max = BATCH_EVENTS_MAX
    texts_of = "items"

    def prepare(self, topic: str, records: Sequence[Record]) -> list[tuple[float, int, Any]]:
        """Decodes, and starts the encoding of texts at once."""
        self._check_place(topic, records)
        decoded = codec.decode_batch("items", records)
        self.around.metrics.consumed("items", len(decoded.events), len(decoded.rejects))
        work: list[tuple[float, int, Any]] = [(0.0, r.offset, self._pass_mark(r)) for r in decoded.marks]
        for item, record in zip(decoded.events, decoded.records, strict=True):
            vector = None
            if isinstance(item, Item):
                vector = self.around.encoding.submit_item(item, self._encoder_at(record.offset))
            work.append((0.0, record.offset, _ItemWork(item, vector)))
        if decoded.rejects or decoded.marks:
            work += [(0.0, r.record.offset, r) for r in decoded.rejects if r.record is not None]
            work.sort(key=lambda w: w[1])
        return work

    async def work(self, entries: list[tuple[str, Entry[Any]]]) -> None:
        """Turns a batch of item records into rows and entries and flushes."""
        items = []
        rejects: list[Reject] = []
        for _, entry in entries:
            if isinstance(entry.work, Reject):
                rejects.append(entry.work)
                continue
            if isinstance(entry.work, _Mark):
                continue
            assert entry.work is not None
            vector = await entry.work.vector if entry.work.vector is not None else None
            items.append((entry.offset, entry.work.item, vector))
        await self._bury(rejects)
        batch = pipeline.learn_catalogue(self.number, items, self.around.encoding.dim)
        downstream = [(b"%d" % self.number, message) for message in batch.messages]
        await self.partition.flush(batch.rows | self._starts_row(entries), downstream, self._advanced(entries))


class LearnerKeeper(Keeper[bytes]):
    """The examples log -> the item matrix in memory; its rows by a byte budget, so that a flush costs what it may."""

    kind = "learner"
    batch_max = BATCH_MESSAGES_MAX

    def __init__(
        self, number: int, partition: Partition, topics: dict[str, str], around: Surroundings,
        new_learner: Callable[[], ItemLearner], flush_bytes_per_s: float, flush_min_s: float, live_tests_max: int,
    ) -> None:  # fmt: skip
        super().__init__(number, partition, topics, around)
        self.linger_s = 0.0  # its flushes follow the byte budget
        self._new_learner = new_learner
        self.learner = new_learner()
        self.live = LiveMetrics(POPULARITIES, live_tests_max)
        self.offset = -1  # of the last message that the matrix in memory holds
        self.counts = {"examples": 0, "items": 0, "messages": 0}
        self._flush_bytes_per_s = flush_bytes_per_s
        self._flush_min_s = flush_min_s
        self._flushed_s = 0.0
        self._entered = False
        self._flushing: asyncio.Task[None] | None = None
        self._telling: asyncio.Task[None] | None = None
        self._told = -1  # offset of the last message of a time that this keeper has sent
        self._executor = ThreadPoolExecutor(1, "learner")

    def applied(self) -> dict[str, int]:
        """What the matrix in memory holds: ahead of what is flushed."""
        return {"examples": self.offset}

    async def load(self) -> None:
        """Rows at the marker; the log from there on is read again."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._executor, self.learner.load, self.partition.items())
        self.offset = self.learner.offset = self.partition.applied["examples"]
        self._flushed_s = self.around.now()

    def prepare(self, topic: str, records: Sequence[Record]) -> list[tuple[float, int, bytes | None]]:
        """A message is one record's value."""
        sealer = self.around.sealer
        return [(0.0, r.offset, sealer.open_message(r.value) if sealer and r.value else r.value) for r in records]

    async def work(self, entries: list[tuple[str, Entry[bytes]]]) -> None:
        """Learns a batch of messages off the loop, then flushes if a flush is due."""
        loop = asyncio.get_running_loop()
        messages = [(entry.offset, entry.work) for _, entry in entries if entry.work]
        while messages:
            with self.around.metrics.stage("learn"):
                learnt = await loop.run_in_executor(self._executor, self.learner.learn_many, messages)
            self._observe(learnt)
            last, messages = messages[len(learnt) - 1][0], messages[len(learnt) :]
            if learnt[-1].ends_removal and not await self._unlearn(last):
                return  # the partition is given away in the middle: whoever has it next learns again
            self.offset = last
        self.offset = entries[-1][1].offset
        if self.is_flush_due():
            await self.flush()

    async def _unlearn(self, offset: int) -> bool:
        """The removals up to the message at `offset` take effect: all at once, in the flush of that offset.

        False: the partition was to be given away before that.
        """
        asked, started = list(self.learner.asked), self.around.now()
        model, fresh = ModelUnlearnt(True, offset), None
        if self.learner.owes_replay:
            begins = await self._reached(self.around.reach.examples_begin)
            if begins is None:
                return False
            if begins > 0:
                model.exact = False
                model.reason = (
                    f"the examples log begins at {begins}: what it held before is part of the state and cannot be "
                    "told apart. Nothing was changed; a state that is learnt anew leaves the user out"
                )
            else:
                fresh = await self._reached(lambda: self._learn_again(offset, asked, started))
                if fresh is None:
                    return False
                model.removed, model.messages = int(fresh.left_out[0]), offset
        learner = self.learner if fresh is None else fresh
        named = self.learner.named
        learner.settled(offset)
        kept = await self._not_taken_back(learner, bool(named if fresh is None else model.removed), named)
        if model.exact and kept:
            model.exact, model.reason = False, "; and ".join(kept)
        loop = asyncio.get_running_loop()
        model.digest = await loop.run_in_executor(self._executor, learner.learner.digest)
        model.seconds = self.around.now() - started
        for partition, erasure in asked:
            await self.around.book.write_model(erasure_id(partition, erasure), model)
        gone: list[bytes] = []
        if fresh is not None:
            gone = await loop.run_in_executor(self._executor, lambda: [key for key, _ in self.partition.items()])
        self.learner, self.offset = learner, offset
        await self.flush(gone)
        return True

    async def _not_taken_back(self, learner: ItemLearner, has_examples: bool, has_events: bool) -> list[str]:
        """What stands before the item state, and may have learnt from the user: in words."""
        kept, matrix = [], learner.learner.matrix
        adapter = matrix.adapter or (None if matrix.trial is None else matrix.trial.adapter)
        if adapter is not None and has_examples:
            kept.append(
                f"the encoder's adapter in use, {adapter.name}, may have been trained on the user's examples and is "
                "not trained again; all else is the state of a log without them, under this adapter"
            )
        encoders = self.around.encoders
        trained_on, name = await encoders.trained_on(learner.number), encoders.name_of(learner.number)
        if trained_on and has_events:
            kept.append(
                f"the encoder in use, {name}, was trained on {trained_on}, maybe on the user's words too, "
                "and is not trained again; all else is the state of a log without the user, under it"
            )
        return kept

    async def _reached(self, ask: Callable[[], Awaitable[T | None]]) -> T | None:
        """What the examples log answers, once it is in reach; None: the partition is to be given away before that."""
        waits = "an unlearning waits: the examples log is out of reach"
        return await in_reach(ask, REACH_WAIT_S, waits, lambda: self._settling)

    async def _learn_again(
        self, offset: int, asked: list[tuple[int, int]], started: float
    ) -> ItemLearner | None:  # fmt: skip
        """A learner of the log before `offset` without what was removed; the old one goes on being served."""
        loop = asyncio.get_running_loop()
        fresh, told = self.learner.again(), started
        async for batch in self.around.reach.examples(offset - 1):
            for at in range(0, len(batch), BATCH_MESSAGES_MAX):
                if self._settling:
                    return None
                part = batch[at : at + BATCH_MESSAGES_MAX]
                await loop.run_in_executor(self._executor, _learn_all, fresh, part)
            if self.around.now() - told >= PROGRESS_S and batch:
                told = self.around.now()
                model = ModelUnlearnt(False, offset, done=False, progress=batch[-1].offset / max(offset, 1))
                for partition, erasure in asked:
                    await self.around.book.write_model(erasure_id(partition, erasure), model)
        return fresh

    def _observe(self, learnt: list[Learnt]) -> None:
        for one in learnt:
            self.counts["messages"] += 1
            self.counts["examples"] += one.examples
            self.counts["items"] += one.entries
            self._entered |= one.entries > 0 or one.urgent
            if one.outcome is not None:
                self.live.observe(one.outcome)
        self.around.metrics.learnt(learnt, self.live, self.around.now())

    def digest(self) -> tuple[int, str]:
        """(offset of the last message, digest of the item matrix) of one moment, from any thread."""
        return self._executor.submit(lambda: (self.learner.offset, self.learner.learner.digest())).result()

    def is_flush_due(self) -> bool:
        """Whether there is something that is not flushed, and it may be: items that enter or leave do not wait for the
        budget; else the dirty bytes must have used up their time. And the flush before is durable: a broker or a loop
        that is slow has one flush to hold, which may be the whole catalogue, and not a queue of them."""
        if self.offset <= self.partition.applied["examples"] or self.partition.flushes_under_way:
            return False
        if self._flushing is not None and not self._flushing.done():  # not on disk yet, so not in `applied` either
            return False
        budget_s = 0.0 if self._entered else self.learner.dirty_bytes / self._flush_bytes_per_s
        return self.around.now() - self._flushed_s >= max(self._flush_min_s, budget_s)

    async def idle(self) -> None:
        """A quiet log is flushed too, so that replicas and a restart have it all; and it is told the time."""
        self._tell_time()
        if self.is_flush_due():
            await self.flush()
        await super().idle()

    def _tell_time(self) -> None:
        """Where an item waits for a time that has come, and no event says so: the log is told, for all who read it."""
        now = self.around.now()
        under_way = self.offset < self._told or (self._telling is not None and not self._telling.done())
        if not under_way and now - NEW_ITEM_S_MAX < self.learner.learner.pending_ts < now:
            self._telling = asyncio.get_running_loop().create_task(self._tell(now))

    async def _tell(self, now: float) -> None:
        try:
            self._told = await self.around.reach.publish_examples([(TIME_KEY, examples.pack_time(now))])
        except KafkaError as failure:
            log.warning("the examples log was not told the time; it will be", reason=repr(failure))

    async def finish(self) -> None:
        """The matrix as it is, so that the next owner starts from here; a large one is left to the log."""
        await self._flushed()
        behind = self.offset > self.partition.applied["examples"]
        if behind and self.learner.dirty_bytes <= FINISH_BYTES_MAX:
            await self.flush()
            await self._flushed()

    async def flush(self, gone: Sequence[bytes] = ()) -> None:
        """Takes the dirty rows for a flush, with the deletion of those that are gone; it goes on beside the learning.

        Raises what the flush before it raised, once that has ended.
        """
        await self._flushed()
        loop = asyncio.get_running_loop()
        changed = dict.fromkeys(gone) | await loop.run_in_executor(self._executor, self.learner.take_dirty)
        self._entered = False
        self._flushed_s = self.around.now()
        self._flushing = loop.create_task(self._write(changed, self.offset))

    async def _write(self, changed: dict[bytes, bytes | None], offset: int) -> None:
        with self.around.metrics.stage("item_flush"):
            await self.partition.flush(changed, [], {"examples": offset})

    async def _flushed(self) -> None:
        if self._flushing is not None:
            await self._flushing
            self._flushing = None

    async def close(self) -> None:
        """As every keeper's, and the learner's thread ends."""
        await super().close()
        under_way = [task for task in (self._flushing, self._telling) if task is not None]
        await asyncio.gather(*under_way, return_exceptions=True)
        self._executor.shutdown()
