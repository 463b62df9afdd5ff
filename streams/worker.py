"""The worker without its driver: keepers by partition, offsets, the replica. A `Source` moves the records.

streams.app drives it by Faust; a benchmark drives the same by a plain consumer, to tell what Faust costs.
"""

import asyncio
import math
import os
import signal
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import structlog
from aiokafka.errors import KafkaError

from monitoring.metrics import Metrics
from state.changelog import Accepted, Reader
from state.partition import INLINE_ROWS_MAX, Fenced, Partition
from state.sealing import SealedPartition
from state.store import RocksDisk, StoreError, StoreLockedError
from streams import audit, heap, kafka, space, trials
from streams.agents import (
    CatalogueKeeper,
    Keeper,
    LearnerKeeper,
    LogResetError,
    LogTruncatedError,
    Surroundings,
    UserKeeper,
)
from streams.announced import Announced
from streams.answers import NextEncoderView
from streams.codec import DeadLetter
from streams.datakeys import sealer_of
from streams.encoding import Encoder, Encoding
from streams.erasure import Book, KafkaReach
from streams.events import Click, Comment, Erasure
from streams.kafka import in_reach
from streams.pipeline import ItemLearner, Replica
from streams.settings import Settings
from streams.space import Encoders, Space
from streams.telemetry import Telemetry
from streams.topics import TopicsError, other_partitions, planned
from streams.trials import Exposures

log = structlog.get_logger(__name__)

LEARNER_PARTITION: Final = 0  # of the examples log and the item changelog: one learner
COMMIT_INTERVAL_S: Final = 1.0
RESUME_INTERVAL_S: Final = 0.05
OBSERVE_INTERVAL_S: Final = 5.0
HEARD_MAX_S: Final = 0.5  # since the last fetch of a topic; one that is in reach answers some ten times meanwhile
SEEK_WAIT_MAX_S: Final = 5.0  # a seek must not outlast the request timeout: slower opens seek on their own
REOPEN_WAIT_S: Final = 1.0
LOAD_AGAIN_S: Final = 10.0  # between two tries at an encoder that cannot be loaded
READ_AGAIN_WAIT_S: Final = 0.25  # then what was sought is sought once more
TAIL_RECORDS_MAX: Final = 1000  # of item rows read at once: some 5 ms of the loop
TRIM_ROWS: Final = 20_000  # a flush of more leaves holes in the heap


class TP(NamedTuple):
    """A topic's partition."""

    topic: str
    partition: int


@dataclass(slots=True)
class _Sought:
    """A partition sought back: what comes from beyond the first record there was on its way before, and is dropped."""

    at_s: float
    first: int | None = None  # offset of that record; None: not asked for yet
    is_passed: bool = False  # something from beyond has come


class Source(Protocol):
    """What moves records to the worker: Faust's consumer, or a plain one."""

    def assignment(self) -> Iterable[TP]: ...
    def generation(self) -> int: ...  # changes with every rebalance
    async def seek(self, targets: Mapping[TP, int]) -> None: ...
    def pause(self, tps: Iterable[TP]) -> None: ...
    def resume(self, tps: Iterable[TP]) -> None: ...
    async def commit(self, offsets: Mapping[TP, int]) -> bool: ...  # False: not taken
    def end_of(self, topic: str, partition: int) -> int | None: ...  # last stable offset, as far as known
    def heard_at(self, topic: str, partition: int) -> float | None: ...  # when a fetch told that, Unix s


class Worker:
    """One worker: keepers by (kind, partition), and everything they share."""

    def __init__(
        self, settings: Settings, now: Callable[[], float], encoder: Encoder, source: Source,
        owner_of: Callable[[str, int], str | None], load: Callable[[str], Encoder] | None = None,
    ) -> None:  # fmt: skip
        """load: makes another encoder of what HEADWATER_ENCODER would say for it, should the deployment have one."""
        self.settings = settings
        self.now = now
        self.owner_of = owner_of
        self.metrics = Metrics()
        self.telemetry = Telemetry(self.metrics)
        self.metrics.checkpoint.info({"encoder": encoder.name, "adapter": ""})
        self._adapter_told = ""
        self.options = settings.kafka_options()
        self.producer = kafka.Producer(self.options)
        self.item_producer = kafka.Producer(self.options)  # item rows come by megabytes: nobody's acks wait for them
        self.sealer = sealer_of(settings)
        self.crash = crash_at(settings.crash_at)
        self.encoding = Encoding(encoder, self.telemetry.encoded, now, self.crash)
        self.encoders = Encoders(encoder, load or space.loader(settings.device))
        self.coming: NextEncoderView | None = None  # the one that is announced
        self._in_use = 0  # number of the one that is used
        self._awaited: set[int] = set()  # numbers of those whose marks have come
        self.learner_config = settings.learner_config(encoder.dim)
        for parameter in ("phi", "y", "beta", "scale", "decay", "sharp"):
            step = float(getattr(self.learner_config, f"lr_{parameter}"))
            self.metrics.learning_rate.labels(parameter).set(step)
        self._replica = Replica(self.learner_config)
        self.replica = self._replica.matrix
        self.replica_applied = -1
        self.disk = RocksDisk(
            cache_bytes=settings.rocksdb_cache_bytes, write_buffers_bytes=settings.rocksdb_write_buffers_bytes
        )
        self.keepers: dict[tuple[str, int], Keeper[Any]] = {}
        self.opening: dict[tuple[str, int], asyncio.Task[None]] = {}
        self.watchers: list[Callable[[Click | Comment | Erasure], None]] = []
        self.before_producer_stops: list[Callable[[], Awaitable[None]]] = []
        self.replica_caught_up = False
        self.stopping = False
        self.topic_kinds = {
            settings.topic("clicks"): ("users", "clicks"),
            settings.topic("comments"): ("users", "comments"),
            settings.topic("erasures"): ("users", "erasures"),
            settings.topic("items"): ("catalogue", "items"),
            settings.internal_topic("examples"): ("learner", "examples"),
        }
        self._was_assigned = False
        self._looked_at: dict[int, int] = {}  # partition of a left folder -> newest erasure when it was looked at
        self._commits: dict[TP, int] = {}
        self._paused: set[TP] = set()
        self._reading_again: dict[TP, _Sought] = {}
        self._unsought: set[TP] = set()  # not read from the right place yet; another set with each assignment
        self._tasks: set[asyncio.Task[Any]] = set()
        self.source: Source = source
        self.book = Book(self._publish_certificate)
        self.announced = Announced(encoder.name)
        self.exposures = Exposures(self._send_exposures, now, self.sealer, self.metrics.exposures_total)
        self._noting: asyncio.Task[None] | None = None
        self.around = Surroundings(
            now=now, metrics=self.telemetry, evidence=settings.evidence_config(), encoding=self.encoding,
            encoders=self.encoders, marked=self._marked,
            number_of=partial(self.encoders.number_of, app_id=settings.app_id),
            end_of=self._end_heard, partition_of=partial(kafka.partition_of, partitions=settings.partitions),
            first_at=self._first_at, dead_letter=self._dead_letter, durable=self._durable, changed=self._changed,
            failed=self._failed, user_cache_bytes=self._user_cache_bytes, merge_hold_s=settings.merge_hold_ms / 1e3,
            flush_linger_s=settings.flush_linger_ms / 1e3,
            sealer=self.sealer, book=self.book, reach=KafkaReach(settings, self.producer, self.sealer, now),
        )  # fmt: skip

    def _user_cache_bytes(self) -> int:
        """An even share of what this worker keeps of its users in memory."""
        return self.settings.user_cache_bytes // max(1, sum(kind == "users" for kind, _ in self.keepers))

    def _end_heard(self, topic: str, partition: int) -> int | None:
        """Where a source log ends; None where no broker has told lately, or where it is not read from the right place
        yet: what there is comes unseen."""
        heard_at = self.source.heard_at(topic, partition)
        if heard_at is None or self.now() - heard_at > HEARD_MAX_S or TP(topic, partition) in self._unsought:
            return None
        return self.source.end_of(topic, partition)

    # -- partitions come and go

    def kind_of(self, tp: TP) -> tuple[str, int]:
        """Which keeper a topic partition belongs to."""
        return self.topic_kinds[tp.topic][0], tp.partition

    def assigned(self, tps: set[TP]) -> None:
        """Opens what is new, resumes what stays, closes what has gone to another worker. While it stops: nothing."""
        if self.stopping:
            return
        wanted = {self.kind_of(tp) for tp in tps if tp.topic in self.topic_kinds}
        self.telemetry.rebalanced()
        self._was_assigned = True
        self._reading_again.clear()
        self._unsought = {tp for tp in tps if tp.topic in self.topic_kinds}
        for key in [k for k in self.keepers if k not in wanted]:
            closing = self._close(self.keepers.pop(key), self.opening.pop(key, None))
            self._spawn(closing, f"close-{key[0]}-{key[1]}")
        for key in sorted(wanted):
            if key not in self.keepers:
                self._open(key)
            elif self.open_keeper(*key) is not None:  # else it opens still, and resumes by itself
                self.keepers[key].resume()

    def _open(self, key: tuple[str, int]) -> None:
        keeper = self.keepers[key] = self._new_keeper(*key)
        self.opening[key] = self._spawn(self._opened(key, keeper), f"open-{key[0]}-{key[1]}")

    async def _opened(self, key: tuple[str, int], keeper: Keeper[Any]) -> None:
        """Opens the keeper, or another one in its place: until that goes well, or the partition is another worker's."""
        while True:
            try:
                await keeper.open()
                return await self._check_logs(keeper)
            except Exception as failure:
                away = isinstance(failure, KafkaError) and failure.retriable
                if not away and not isinstance(failure, Fenced):
                    self._failed(keeper, failure)
                    raise
                log.warning("partition not opened; claiming it again", kind=key[0], partition=key[1],
                            reason=repr(failure))  # fmt: skip
            keeper = await self._replace(key, keeper)

    async def _replace(self, key: tuple[str, int], keeper: Keeper[Any]) -> Keeper[Any]:
        await keeper.close()
        await asyncio.sleep(REOPEN_WAIT_S)
        new = self.keepers[key] = self._new_keeper(*key)
        return new

    async def _check_logs(self, keeper: Keeper[Any]) -> None:
        """Raises LogTruncatedError or LogResetError unless the source logs hold what comes next.

        A source that nothing was applied of is read from wherever it begins.
        """
        told = await kafka.log_bounds(self.options, keeper.topics, keeper.number)
        for topic, (begins, ends) in told.items():
            expected = keeper.next_offset(topic)
            if 0 < expected < begins:
                raise LogTruncatedError(topic, keeper.number, begins, expected)
            if expected > ends:
                ends = await kafka.log_end(self.options, topic, keeper.number)
            if expected > ends:
                raise LogResetError(topic, keeper.number, ends, expected)

    async def _close(self, keeper: Keeper[Any], opening: asyncio.Task[None] | None) -> None:
        if opening is not None and not opening.done():
            opening.cancel()
            await asyncio.wait({opening})
        await keeper.close()

    async def revoked(self) -> None:
        """Everything durable and committed; what stays ours is resumed by `assigned`."""
        for key, keeper in list(self.keepers.items()):
            if self.open_keeper(*key) is keeper:
                try:
                    await keeper.settle()
                except Fenced as fenced:  # we have slept, and others have taken over: nothing here counts any more
                    self._failed(keeper, fenced)
        await self.commit()

    async def _reopen(self, key: tuple[str, int], keeper: Keeper[Any]) -> None:
        """Claims a partition again that another owner has taken, if it is still ours to have."""
        self._unsought |= {TP(topic, keeper.number) for topic in keeper.topics}
        await self._opened(key, await self._replace(key, keeper))
        held = {tp for tp in self.source.assignment() if self.kind_of(tp) == key}
        if held:
            await self._seek({tp: self.keepers[key].next_offset(tp.topic) for tp in held})

    def _failed(self, keeper: Keeper[Any], failure: BaseException) -> None:
        key = keeper.kind, keeper.number
        if isinstance(failure, Fenced):
            log.warning("partition fenced; claiming it again", kind=keeper.kind, partition=keeper.number)
            if self.open_keeper(*key) is keeper:  # while it is replaced, it is restoring: reads are told to come back
                self.opening[key] = self._spawn(self._reopen(key, keeper), f"reopen-{key[0]}-{key[1]}")
            return
        log.error("worker ends: a partition's task failed", kind=keeper.kind, partition=keeper.number,
                  reason=str(failure), exc_info=failure)  # fmt: skip
        os._exit(1)  # as by kill -9: nothing half done is written, and the next owner reads again

    def _new_keeper(self, kind: str, number: int) -> Keeper[Any]:
        topics = {topic: name for topic, (k, name) in self.topic_kinds.items() if k == kind}
        changelog = {"users": "users-changelog", "catalogue": "catalogue-changelog", "learner": "items-changelog"}
        make: Callable[..., Partition] = Partition
        if kind == "users" and self.sealer is not None:
            make = partial(SealedPartition, self.sealer)
        partition = make(
            disk=self.disk,
            path=self.settings.state_dir / f"{kind}-{number}",
            changelog=kafka.ChangelogTopic(
                self.settings.internal_topic(changelog[kind]),
                number,
                self.item_producer if kind == "learner" else self.producer,
                self.options,
            ),
            publish=self._publish_examples,
            purges=kind == "users",
            piecewise=kind == "learner",  # megabytes at a time, and soon restored
            sources=tuple(topics.values()),
            on_durable=lambda applied: self._applied(topics, number, applied),
            crash=self.crash,
        )
        if kind == "users":
            return UserKeeper(number, partition, topics, self.around)
        if kind == "catalogue":
            return CatalogueKeeper(number, partition, topics, self.around)
        return LearnerKeeper(
            number, partition, topics, self.around,
            lambda: ItemLearner(self.learner_config, self.encoding.dim, self.encoders.first_name),
            self.settings.item_flush_bytes_per_s, self.settings.item_flush_min_s, self.settings.live_tests_max,
        )  # fmt: skip

    async def _publish_examples(self, records: list[tuple[bytes, bytes]]) -> None:
        await self.producer.send(self.settings.internal_topic("examples"), LEARNER_PARTITION, records)

    async def send_audit(self, records: list[tuple[bytes | None, bytes | None]]) -> None:
        """Appends records to the audit topic, acknowledged."""
        await self.producer.send(self.settings.internal_topic("audit"), audit.PARTITION, records)

    async def _send_exposures(self, records: list[tuple[bytes | None, bytes | None]]) -> None:
        await self.producer.send(self.settings.internal_topic(trials.TOPIC), trials.PARTITION, records)

    def open_keeper(self, kind: str, number: int) -> Keeper[Any] | None:
        """The keeper of a partition of this worker, once its state is restored."""
        opening = self.opening.get((kind, number))
        keeper = self.keepers.get((kind, number))
        if keeper is None or opening is None or not opening.done() or keeper.report is None:
            return None
        return keeper

    # -- records and offsets

    async def offer(self, topic: str, partition: int, records: list[Any]) -> None:
        """A slice of records from an agent to its keeper. Dropped while the keeper opens: it seeks back afterwards."""
        tp = TP(topic, partition)
        key = self.kind_of(tp)
        keeper = self.keepers.get(key)
        opening = self.opening.get(key)
        if keeper is None or opening is None or not opening.done():
            return
        opening.result()
        if tp in self._reading_again and await self._is_from_beyond(tp, records[0].offset, keeper):
            return
        back = await keeper.offer(topic, records)
        if back is not None:
            log.warning("hole in a source log; reading again", topic=topic, partition=partition, offset=back)
            await self._read_again(tp, back)
        elif keeper.is_full(topic):
            self.source.pause({tp})
            self._paused.add(tp)

    async def _is_from_beyond(self, tp: TP, offset: int, keeper: Keeper[Any]) -> bool:
        """Whether a slice was on its way when its partition was sought back. What was sought may be a legal gap."""
        expected = keeper.inbox.sources[tp.topic].expected
        sought = self._reading_again[tp]
        if offset > expected:
            if sought.first is None:
                sought.first, _ = await self._first_at(*tp, expected)
            if offset > sought.first:
                sought.is_passed = True
                return True
        self._reading_again.pop(tp, None)
        return False

    async def _read_again(self, tp: TP, offset: int) -> None:
        self._reading_again[tp] = _Sought(self.now())
        await self._seek({tp: offset})

    async def _seek_once_more(self) -> None:
        """Where what was sought should have come by now, and has been lost again."""
        for tp, sought in list(self._reading_again.items()):
            keeper = self.open_keeper(*self.kind_of(tp))
            is_late = sought.is_passed and self.now() - sought.at_s >= READ_AGAIN_WAIT_S
            if keeper is not None and is_late and tp in self.source.assignment():
                await self._read_again(tp, keeper.inbox.sources[tp.topic].expected)

    async def seek(self, tps: set[TP]) -> None:
        """Reads each from just after what its keeper has applied, and at once where that is open: a topic that waited
        for another partition to open would be overtaken by those that the keeper reads beside it. What opens for
        longer than SEEK_WAIT_MAX_S follows by itself."""
        generation = self.source.generation()
        left = tps - await self._seek_open(tps, generation)
        opening = {self.opening[self.kind_of(tp)] for tp in left if self.kind_of(tp) in self.opening}
        if opening:
            await asyncio.wait(opening, timeout=SEEK_WAIT_MAX_S)
            left -= await self._seek_open(left, generation)
        for tp in sorted(left):
            if (task := self.opening.get(self.kind_of(tp))) is not None:
                self._spawn(self._seek_when_open(tp, task, generation), f"seek-{tp.topic}-{tp.partition}")

    async def _seek_open(self, tps: set[TP], generation: int) -> set[TP]:
        """Seeks those whose keepers are open; which these are."""
        targets: dict[TP, int] = {}
        for tp in sorted(tps):
            opening = self.opening.get(self.kind_of(tp))
            if opening is not None and opening.done():
                opening.result()
                targets[tp] = self.keepers[self.kind_of(tp)].next_offset(tp.topic)
        if targets and generation == self.source.generation():
            await self._seek(targets)
        return set(targets)

    async def _seek_when_open(self, tp: TP, opening: asyncio.Task[None], generation: int) -> None:
        await opening
        if generation == self.source.generation() and self.kind_of(tp) in self.keepers:
            await self._seek({tp: self.keepers[self.kind_of(tp)].next_offset(tp.topic)})

    async def _seek(self, targets: Mapping[TP, int]) -> None:
        unsought = self._unsought
        await self.source.seek(targets)
        unsought.difference_update(targets)

    def _applied(self, topics: Mapping[str, str], number: int, applied: Mapping[str, int]) -> None:
        for topic, name in topics.items():
            if applied.get(name, -1) >= 0:
                self._durable(topic, number, applied[name] + 1)

    def _durable(self, topic: str, partition: int, next_offset: int) -> None:
        self._commits[TP(topic, partition)] = next_offset

    async def commit(self) -> None:
        """Commits what has become durable. Only a convenience for lag tools: a restart seeks by its own state."""
        held = self.source.assignment()
        offsets = {tp: offset for tp, offset in self._commits.items() if tp in held}
        self._commits.clear()
        if offsets and not await self.source.commit(offsets):
            self._commits = offsets | self._commits  # what has come meanwhile is newer

    def lag_records(self, kind: str = "users") -> int:
        """Records in the source logs of a kind of state that are not applied yet, as far as known."""
        behind = 0
        for (of_kind, number), keeper in self.keepers.items():
            if of_kind == kind and self.open_keeper(of_kind, number) is keeper:
                for topic in keeper.topics:
                    end = self.source.end_of(topic, number)
                    behind += max(0, end - keeper.next_offset(topic)) if end is not None else 0
        return behind

    async def observe(self) -> None:
        """State sizes and lags, for the metrics. Raises LogResetError where a source log was made anew meanwhile, and
        TopicsError where a topic was given other partitions."""
        await self._check_ends()
        with suppress(KafkaError):
            await self._check_partitions()
        for kind in ("users", "catalogue", "learner"):
            own = [k for (of, n), k in self.keepers.items() if of == kind and self.open_keeper(of, n) is k]
            rows = sum(k.partition.row_count_estimate() for k in own)
            size = sum(k.partition.disk_bytes() for k in own)
            self.telemetry.state(kind, rows, size, self.lag_records(kind))

    async def _check_ends(self) -> None:
        """Raises LogResetError where the log itself says that it ends before what was applied of it.

        The fetches alone prove nothing: of a leader that has just become one they tell an older end, until its
        followers have asked it (KIP-207). Where nobody answers, the next observation asks again.
        """
        for key, keeper in list(self.keepers.items()):
            ends = [(self.source.end_of(topic, keeper.number), keeper.next_offset(topic)) for topic in keeper.topics]
            if self.open_keeper(*key) is keeper and any(end is not None and end < after for end, after in ends):
                with suppress(KafkaError):
                    await self._check_logs(keeper)

    async def wipe_left_folders(self) -> None:
        """A folder of a partition that others have now may hold users who were erased since: it goes.

        It is not missed: the changelog restores the partition, should it come back.
        """
        if not (self._was_assigned and self.book.caught_up.is_set()):
            return
        for path in self.disk.stores(self.settings.state_dir):
            kind, _, partition = path.name.rpartition("-")
            if kind != "users" or not partition.isdecimal():
                continue
            number = int(partition)
            newest = self.book.newest(number)
            if newest <= self._looked_at.get(number, -1) or ("users", number) in self.keepers:
                continue
            try:
                applied, owes_purge = await asyncio.to_thread(_left_on, self.disk, path)
            except StoreLockedError:  # it is being closed
                continue
            except StoreError:
                applied, owes_purge = {}, True
            if ("users", number) in self.keepers:
                continue
            if owes_purge or applied.get("erasures", -1) < newest:
                self.disk.wipe(path)
                log.info("state of another worker's partition wiped: users were erased since", partition=number)
            self._looked_at[number] = newest

    async def _first_at(self, topic: str, partition: int, offset: int) -> tuple[int, int]:
        return await kafka.first_at_or_after(self.options, topic, partition, offset)

    async def _dead_letter(self, letter: DeadLetter) -> None:
        await self.producer.send_one(letter.topic, letter.key, letter.value, letter.headers)

    # -- the replica

    async def tail(self) -> None:
        """Follows the item changelog into this worker's item matrix: only complete flushes, as their markers come."""

        reader = Reader()
        topic = self.settings.internal_topic("items-changelog")
        end = await kafka.log_end(self.options, topic, LEARNER_PARTITION)
        read = 0
        tail = kafka.read_log(self.options, topic, LEARNER_PARTITION, 0, max_poll_records=TAIL_RECORDS_MAX)
        async for batch in tail:
            await asyncio.sleep(0)  # what is fetched already comes without a pause
            self.replica_caught_up = self.replica_caught_up or read >= end or not batch
            for record in batch:
                read = record.offset + 1
                accepted = reader.feed(record)
                if accepted is not None:
                    await self._take(accepted)
                    del accepted  # its rows: until the next flush comes

    async def _take(self, accepted: Accepted) -> None:
        count = len(accepted.rows)
        if count > INLINE_ROWS_MAX:
            take = await asyncio.to_thread(self._replica.prepare, accepted.rows)
        else:
            take = self._replica.prepare(accepted.rows)
        take()  # between two reads
        self.replica_applied = accepted.applied["examples"]
        self._tell_adapter()
        self.metrics.trial_share.set(0.0 if self.replica.trial is None else self.replica.trial.share)
        del take
        if count > TRIM_ROWS:
            await asyncio.to_thread(heap.trim)

    def _tell_adapter(self) -> None:
        adapter = self.replica.adapter
        name = "" if adapter is None else adapter.name
        if name != self._adapter_told:
            self._adapter_told = name
            self.metrics.checkpoint.info({"encoder": self.encoding.encoder.name, "adapter": name})

    async def follow_certificates(self) -> None:
        """Follows what is told of erasures."""
        topic = self.settings.internal_topic("certificates")
        end = await kafka.log_end(self.options, topic, 0)
        read = 0
        async for batch in kafka.read_log(self.options, topic, 0, 0):
            for record in batch:
                read = record.offset + 1
                self.book.take(record.key, record.value)
            if read >= end or not batch:
                self.book.caught_up.set()

    async def _publish_certificate(self, key: bytes, value: bytes) -> None:
        await self.producer.send(self.settings.internal_topic("certificates"), 0, [(key, value)])

    def _changed(self, event: Click | Comment | Erasure) -> None:
        for watcher in self.watchers:
            watcher(event)

    # -- life

    async def start(self) -> None:
        """Before the agents: the producer, the topics' partitions and the encoder checked, the tail."""
        await self.producer.start()
        await self.item_producer.start()
        await self._check_partitions()
        await self._claim_space()
        self._spawn(self._guarded(self.tail()), "tail")
        self._spawn(self._guarded(self.follow_encoders()), "encoders")
        self._spawn(self._guarded(self.follow_certificates()), "certificates")
        checkpoints = self.settings.topic("encoder-checkpoints")
        follow = self.announced.follow(self.options, self.producer, checkpoints)
        self._spawn(self._guarded(follow), "checkpoints")
        self._noting = asyncio.get_running_loop().create_task(self._guarded(self.exposures.run()), name="exposures")
        self._spawn(self._guarded(self._every(COMMIT_INTERVAL_S, self.commit)), "commit")
        self._spawn(self._guarded(self._every(OBSERVE_INTERVAL_S, self.observe)), "observe")
        self._spawn(self._guarded(self._every(OBSERVE_INTERVAL_S, self.wipe_left_folders)), "wipe")
        self._spawn(self._guarded(self._every(RESUME_INTERVAL_S, self._resume_paused)), "resume")

    async def _check_partitions(self) -> None:
        """Raises TopicsError unless every topic has as many partitions as the state was laid out for."""
        claims = self.settings.internal_topic(space.TOPIC)
        for topic in planned(self.settings):
            if topic.name in {*self.topic_kinds, claims} or topic.name.endswith("-changelog"):
                found = await self.producer.partitions(topic.name)
                if found != topic.partitions:
                    raise TopicsError(f"topic {topic.name}: {other_partitions(found, topic.partitions)}")

    async def _claim_space(self) -> None:
        """Takes the encoder in use. Raises OtherSpaceError unless this one's vectors are, or were, those of the
        deployment's logs and rows."""
        claims = space.log_of(self.settings, self.producer)
        own = self.encoders.own
        mine = Space(own.name, own.dim, model=space.place(self.settings.encoder))
        waits = "the encoder is not claimed yet; trying again"
        spaces = await in_reach(lambda: space.claim(claims, mine, self.settings.app_id), REOPEN_WAIT_S, waits)
        assert spaces is not None
        self.encoders.spaces = spaces
        waits = "the log of encoders is out of reach; trying again"
        self.encoders.read = lambda: in_reach(lambda: space.read(claims), REOPEN_WAIT_S, waits)
        self._use(await self.encoders.load(self.encoders.number))

    async def follow_encoders(self) -> None:
        """Loads an encoder that is announced, and goes on with it once it is in use: whoever announces one waits until
        all workers have it. While it cannot be loaded, texts before its marks are read by the one before, and
        partitions wait at the marks."""
        tried_s = -math.inf
        async for batch in kafka.read_log(self.options, self.settings.internal_topic(space.TOPIC), 0, 0):
            for record in batch:
                self.encoders.spaces.take(space.decode(record.value))
            spaces = self.encoders.spaces
            newest = spaces.next or spaces.current
            if newest is None:
                continue
            missing = [n for n in sorted({newest.number, *self._awaited}) if not self.encoders.is_loaded(n)]
            if missing and (batch or self.now() - tried_s >= LOAD_AGAIN_S):
                tried_s = self.now()
                for number in missing:
                    await self._load_encoder(spaces.known[number])
            self._tell_coming()
            self.encoders.forget_given_up()
            if self.encoders.is_loaded(self.encoders.number):
                self._use(self.encoders.at(self.encoders.number))

    async def _load_encoder(self, newest: Space) -> None:
        self.coming = NextEncoderView(newest.encoder, newest.number, "loading")
        try:
            await self.encoders.load(newest.number)
        except Exception as problem:  # whatever is wrong with a model that somebody has put there
            log.warning("the next encoder cannot be loaded; trying again", encoder=newest.encoder, reason=str(problem))
            self.coming = NextEncoderView(newest.encoder, newest.number, "failed", str(problem))

    def _tell_coming(self) -> None:
        """Which encoder is to come, or is waited for: one that cannot be loaded is told of until it is, or given up."""
        spaces, coming = self.encoders.spaces, self.coming
        if spaces.next is not None and self.encoders.is_loaded(spaces.next.number):
            self.coming = NextEncoderView(spaces.next.encoder, spaces.next.number, "loaded")
        elif coming is not None:
            is_over = spaces.known[coming.number].state == space.GIVEN_UP or self.encoders.is_loaded(coming.number)
            self.coming = None if is_over else coming

    async def _marked(self, value: bytes | None) -> int | None:
        """Number of a mark's encoder, loaded before anything behind it is read; where it cannot be, `follow_encoders`
        tries again."""
        number_of = partial(self.encoders.number_of, value, self.settings.app_id)
        if number_of() is None and space.is_marked(value, self.settings.app_id):
            await self.encoders.catch_up(None)
        number = number_of()
        if number is not None:
            self._awaited.add(number)
            if not self.encoders.is_loaded(number):
                await self._load_encoder(self.encoders.spaces.known[number])
        return number

    def _use(self, encoder: Encoder) -> None:
        """The encoder in use, for what comes from now on."""
        if encoder is self.encoding.encoder and self._in_use == self.encoders.number:
            return
        self._in_use = self.encoders.number
        self.encoding.encoder = encoder
        self.announced.of(encoder.name)
        self.metrics.checkpoint.info({"encoder": encoder.name, "adapter": self._adapter_told})
        if self._in_use:
            log.info("texts are read by the encoder in use", encoder=encoder.name, number=self._in_use)

    async def _every(self, interval_s: float, work: Any) -> None:
        while not self.stopping:
            await asyncio.sleep(interval_s)
            await work()

    async def _resume_paused(self) -> None:
        await self._seek_once_more()
        for tp in sorted(self._paused):
            keeper = self.keepers.get(self.kind_of(tp))
            if keeper is None or tp.topic not in keeper.inbox.sources or keeper.is_low(tp.topic):
                self._paused.discard(tp)
                if tp not in self.source.assignment():
                    continue
                if keeper is not None and tp.topic in keeper.inbox.sources:
                    # Faust drops what it has fetched of a paused partition.
                    await self._read_again(tp, keeper.inbox.sources[tp.topic].expected)
                self.source.resume({tp})

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except asyncio.CancelledError:
            raise
        except BaseException as failure:
            log.error("worker ends: a background task failed", exc_info=failure)
            os._exit(1)

    async def stop(self) -> None:
        """Drained, flushed, committed, closed."""
        self.stopping = True
        if self.keepers:
            await self.revoked()
        for key, keeper in list(self.keepers.items()):
            await self._close(keeper, self.opening.get(key))
        self.keepers.clear()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.encoding.close()

    async def disconnect(self) -> None:
        """After `stop`: what was shown is noted, and the producers leave."""
        if self._noting is not None:
            await self.exposures.close(self._noting)
        await self.producer.stop()
        await self.item_producer.stop()

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def crash_at(told: str) -> Callable[[str], None]:
    """For `Settings.crash_at`: ends the process, as by kill -9, when it is called with the step for the N-th time."""
    wanted, _, count = told.partition(":")
    left = int(count or 0)

    def crash(step: str) -> None:
        nonlocal left
        if step == wanted:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return crash


def _left_on(disk: RocksDisk, path: Path) -> tuple[dict[str, int], bool]:
    """(applied offsets, whether a purge is owed) of a store that nobody has open."""
    store = disk.open(path)
    try:
        meta, owes_purge = store.meta(), store.owes_purge()
    finally:
        store.close()
    return (meta.applied if meta is not None else {}), owes_purge
