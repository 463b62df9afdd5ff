"""State once more, from the logs alone: user rows, catalogue rows and item matrix as they must be at given offsets.

The workers' own decoding, merge, fold and learner, without their clocks. A worker's flush is a merge of what it takes,
so `cuts`, the applied offsets of flushes as the changelog's markers have them, give back the order that was: also where
an event reached its log later than the hold. Without cuts the order is that of events within the hold. Where the
changelog has lost its beginning (an erasure deletes it), the state at its first complete cut is the place to begin.
"""

import itertools
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

from state.changelog import LogRecord, Reader
from state.sealing import Rows, Sealer
from state.store import Store
from streams import codec, pipeline
from streams.agents import BATCH_EVENTS_MAX, USER_CODES, UserEvent, decode_timed
from streams.codec import Record, Reject
from streams.encoding import F4, Encoder, item_vector
from streams.events import Comment, Item
from streams.inbox import Inbox
from streams.pipeline import EvidenceConfig, ItemLearner, SourceEvent
from streams.settings import Fault
from streams.space import Encoders, Starts

# (topic's code name, partition, first and last offset) -> the records in between, in batches
Read: TypeAlias = Callable[[str, int, int, int], AsyncIterator[Sequence[Any]]]
Progress: TypeAlias = Callable[[int], None]  # records taken since the last call

ENCODE_TEXTS_MAX: Final = 64  # at once: what a bar moves by


class LogEndsError(Fault):
    """A log does not reach the offset that was asked for."""


class Cut(NamedTuple):
    """A flush in a changelog. is_complete: the changelog's rows up to it are the whole state at `applied`."""

    applied: dict[str, int]
    is_complete: bool


def _unseen(records: int) -> None:
    """Progress that nobody looks at."""


async def starts(
    read: Read, topic: str, partition: int, upto: int, encoders: Encoders, app_id: str
) -> Starts:  # fmt: skip
    """Which encoders read a partition's texts up to an offset: by the marks in its log, which still has them. Reads it
    where the deployment has had several."""
    await encoders.catch_up(None)
    found = Starts()
    if len(encoders.spaces.known) < 2 or upto < 0:
        return found
    async for records in read(topic, partition, 0, upto):
        for record in records:
            if record.key is not None and record.key.startswith(codec.MARK):
                number = encoders.number_of(record.value, app_id)
                found = found if number is None else found.then(number, record.offset + 1)
    return found


async def user_rows(
    read: Read,
    partition: int,
    upto: Mapping[str, int],
    rows: Rows,
    encoder_at: Callable[[int], Encoder],
    evidence: EvidenceConfig,
    *,
    after: Mapping[str, int] | None = None,
    cuts: Iterable[Mapping[str, int]] = (),
    only: str | None = None,
    messages: list[bytes] | None = None,
    progress: Progress = _unseen,
) -> None:
    """Writes the user rows of a partition at the applied offsets `upto` into the store `rows`.

    encoder_at: which encoder reads the comment at an offset.
    after: the applied offsets that the store's rows are of; None: the store is empty. cuts: applied offsets of flushes
    between, oldest first. only: this user's row alone, which costs the decoding of
    all events and the encoding of one user's. messages: takes the examples messages, whose boundaries are not
    those of the worker's. Raises LogEndsError. The logs must still have all that comes after `after`.
    """
    names = sorted(upto, key=lambda name: USER_CODES[name])
    first = {name: (after or {}).get(name, -1) + 1 for name in names}
    feeds = {name: _Feed(read(name, partition, first[name], upto[name])) for name in names}
    inbox: Inbox[SourceEvent] = Inbox(first, 0.0)
    for cut in (*cuts, upto):
        ends = {name: cut.get(name, -1) + 1 for name in names}
        while any(source.entries or source.expected < ends[name] for name, source in inbox.sources.items()):
            for name, source in inbox.sources.items():
                if not source.entries and source.expected < ends[name]:
                    records = await feeds[name].take(ends[name])
                    if not records:
                        raise LogEndsError(f"{name}:{partition} ends before offset {ends[name] - 1}: another log?")
                    inbox.put(name, _timed(name, records, encoder_at, only), records[-1].offset + 1, 0.0)
            taken, _ = inbox.take(0.0, ends.get, BATCH_EVENTS_MAX)
            events = [entry.work for _, entry in taken if entry.work is not None]
            if events:
                batch = pipeline.learn_users(partition, events, rows.get_many, evidence)
                rows.write(batch.rows)
                if messages is not None:
                    messages.extend(batch.messages)
            progress(len(taken))


class _Feed:
    """A log's records by offset."""

    def __init__(self, batches: AsyncIterator[Sequence[Record]]) -> None:
        self._batches = batches
        self._rest: Sequence[Record] = ()

    async def take(self, end: int) -> Sequence[Record]:
        """The next records below the offset `end`, ENCODE_TEXTS_MAX at most; none where the log has none."""
        while not self._rest:
            batch = await anext(self._batches, None)
            if batch is None:
                return ()
            self._rest = batch
        count = 0
        while count < min(len(self._rest), ENCODE_TEXTS_MAX) and self._rest[count].offset < end:
            count += 1
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken


def _timed(
    name: str, records: Sequence[Record], encoder_at: Callable[[int], Encoder], only: str | None
) -> list[tuple[float, int, SourceEvent | None]]:
    code = USER_CODES[name]
    timed = decode_timed(name, records)
    wanted: dict[int, UserEvent] = {
        record.offset: event
        for _, record, event in timed
        if event is not None and not isinstance(event, Reject) and only in (None, event.user_id)
    }
    texts = {offset: event.text for offset, event in wanted.items() if isinstance(event, Comment)}
    vectors = _encoded(texts, encoder_at)
    events = {offset: SourceEvent(code, offset, event, vectors.get(offset)) for offset, event in wanted.items()}
    return [(at, record.offset, events.get(record.offset)) for at, record, _ in timed]


def _encoded(texts: Mapping[int, str], encoder_at: Callable[[int], Encoder]) -> dict[int, F4]:
    """Vectors of texts by their offsets, each by its own encoder."""
    vectors: dict[int, F4] = {}
    for encoder, offsets in itertools.groupby(texts, encoder_at):
        own = list(offsets)
        vectors.update(zip(own, encoder.encode([texts[offset] for offset in own]), strict=True))
    return vectors


async def catalogue_rows(
    read: Read, partition: int, upto: int, rows: Store, encoder_at: Callable[[int], Encoder],
    progress: Progress = _unseen,
) -> None:  # fmt: skip
    """Writes the catalogue rows of a partition at the offset `upto` of items into the empty store `rows`.

    A compacted log is as good as a whole one: an item's newest record is all that counts.
    """
    feed = _Feed(read("items", partition, 0, upto))
    while records := await feed.take(upto + 1):
        decoded = codec.decode_batch("items", records)
        items = {record.offset: item for item, record in zip(decoded.events, decoded.records, strict=True)}
        texts = {offset: item.text for offset, item in items.items() if isinstance(item, Item) and item.text}
        vectors = _encoded(texts, encoder_at)
        entries = [
            (offset, item, item_vector(encoder_at(offset), item, vectors.get(offset)))
            if isinstance(item, Item)
            else (offset, item, None)
            for offset, item in items.items()
        ]
        rows.write(pipeline.learn_catalogue(partition, entries, encoder_at(upto).dim).rows)
        progress(len(records))


async def learn_examples(
    read: Read, learner: ItemLearner, upto: int, progress: Progress = _unseen, sealer: Sealer | None = None,
    *, is_whole: bool = True,
) -> ItemLearner:  # fmt: skip
    """Brings a learner along the examples log, from where it is to the offset `upto`; go on with the one returned.

    It is another where removals lie on the way: the log is then learnt again without what they name, from its
    beginning, as the worker did. is_whole: whether the log has its beginning; without it removals have no effect.
    sealer: opens the messages.
    """
    await _learn(read, learner, upto, progress, sealer)
    if learner.owes_replay and is_whole:
        learner = learner.again()
        await _learn(read, learner, upto, progress, sealer)
    learner.settled(upto)
    return learner


async def _learn(read: Read, learner: ItemLearner, upto: int, progress: Progress, sealer: Sealer | None) -> None:
    async for records in read("examples", 0, learner.offset + 1, upto):
        learner.learn_all([(r.offset, sealer.open_message(r.value) if sealer else r.value) for r in records if r.value])
        progress(len(records))


async def changelog_rows(
    batches: AsyncIterable[Sequence[LogRecord]], upto: Mapping[str, int], rows: Store
) -> list[Cut]:
    """Takes a changelog's complete flushes up to `upto` into the empty store `rows`, and tells of each.

    The last of them is `upto`'s where the changelog has such a flush; reading ends there, or at the first beyond.
    Of a changelog whose head was deleted, rows are complete only where its first epoch has been swept.
    """
    reader = Reader()
    cuts: list[Cut] = []
    is_whole: bool | None = None
    async for batch in batches:
        for record in batch:
            is_whole = record.offset == 0 if is_whole is None else is_whole
            accepted = reader.feed(record)
            if accepted is None:
                continue
            if any(offset > upto.get(name, -1) for name, offset in accepted.applied.items()):
                return cuts
            rows.write(accepted.rows)
            cuts.append(Cut(accepted.applied, bool(is_whole or reader.swept_epoch is not None)))
            if cuts[-1].is_complete and is_at(accepted.applied, upto):
                return cuts
    return cuts


def is_at(applied: Mapping[str, int], upto: Mapping[str, int]) -> bool:
    """Whether the offsets are the same; a source that nothing was applied of counts as absent."""
    return {n: o for n, o in applied.items() if o >= 0} == {n: o for n, o in upto.items() if o >= 0}
