"""The work on a batch, without a broker: events -> user rows and examples; items -> catalogue rows and entries;
examples -> the learner. The agents bind it to topics, `headwater evaluate` to files: one implementation for both.

Everything here is a function of its arguments: no clock, no randomness, no I/O.
"""

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, NamedTuple, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from model import texts
from model.adapter import Adapter, AdapterError
from model.examples import Examples, new_examples
from model.items import ItemMatrix
from model.learner import MESSAGES_MAX, Learner, LearnerConfig, Outcome
from model.trial import bucket_of
from state import rows
from state.changelog import leaving
from state.rows import UserRow
from streams import examples
from streams.events import Click, Comment, Erasure, Item, Withdrawn

F4: TypeAlias = npt.NDArray[np.float32]
GetMany: TypeAlias = Callable[[list[bytes]], list[bytes | None]]

SNIPPET_CHARS_MAX: Final = 512  # of an item's text that every worker's replica carries
SOURCES_KEY: Final = b"~sources"  # the learner's row of highest applied source offsets
REMOVED_KEY: Final = b"~removed"  # the learner's row of what it leaves out
ENCODER_KEY: Final = b"~encoder"  # the learner's row of the encoder in use, where that is not the first
STAGED_ROW_BYTES: Final = 13  # of such a row, but its vector
STAGED_HEAD: Final = b"v"  # of the learner's rows of vectors that the next encoder has made: then the item key i8
OWN_HEADS: Final = (b"~", STAGED_HEAD)  # first bytes of rows that replicas pass over
GENERATION: Final = struct.Struct(">cI")  # in front of the keys of a state that was learnt again: "#", its number


@dataclass(frozen=True)
class EvidenceConfig:
    """What a behaviour weighs in the user's history (w_b), and which behaviours are targets."""

    weights: Mapping[str, float] = field(default_factory=dict)  # per action; the default for all others
    weight_default: float = 1.0
    weight_low: float = 0.7  # of a low rating, skip or dislike
    positive_threshold: float = 4.0  # a rating below is a low rating: evidence, never a target
    low_actions: frozenset[str] = frozenset({"skip", "dislike"})
    rank_sample: float = 0.0  # share of the targets that the learner ranks in full before it learns them


class SourceEvent(NamedTuple):
    """An event with its place in the source log; `vector` is the unit vector of a comment's text."""

    topic: int
    offset: int
    event: Click | Comment | Erasure
    vector: F4 | None = None


class Erased(NamedTuple):
    """An erasure that was applied, and what its user's row had held."""

    offset: int  # of its record in `erasures`
    user_id: str
    unlearn: bool
    events: int  # counted in the row; 0: there was no row
    behaviours: int  # of these kept one by one
    seen: int  # items kept as consumed beyond the behaviours
    comments: int  # kept one by one; older ones lived on in the tail


class UserBatch(NamedTuple):
    """What a batch of events makes of its users; a row of None is a user erased."""

    rows: dict[bytes, bytes | None]
    messages: list[bytes]
    examples: int
    positives: int
    unknown_actions: int
    erased: list[Erased]


def learn_users(partition: int, events: Sequence[SourceEvent], get_many: GetMany, config: EvidenceConfig) -> UserBatch:
    """Folds events, in order, into their users' rows: one example a behaviour that is new, its history as of before.

    A repeat of a (user, item) pair is counted, not learnt; a low rating is an example of label 0. A comment that
    names an item is the pair's positive when nothing came before; its text is seen by the user's later examples,
    once the user's time has strictly advanced. An erasure ends the user's row; events after it begin another.
    """
    users = list(dict.fromkeys(e.event.user_id for e in events))
    keys = [u.encode() for u in users]
    before = get_many(keys)
    folds = {
        user: _UserFold(user, rows.unpack(value) if value is not None else UserRow())
        for user, value in zip(users, before, strict=True)
    }
    packed: list[bytes] = []
    erased: list[Erased] = []
    positives = unknown = 0
    for topic, offset, event, vector in events:
        fold = folds[event.user_id]
        if isinstance(event, Erasure):
            erased.append(_erased(offset, event, fold.row))
            folds[event.user_id] = _UserFold(event.user_id, UserRow())
            continue
        position = rows.position(topic, offset)
        if isinstance(event, Click):
            low = is_low(event, config)
            weight = config.weights.get(event.action)
            if weight is None:
                unknown += event.action not in rows.ACTION_CODES
                weight = config.weight_low if low else config.weight_default
            example = fold.behave(partition, position, event.item_id, event.ts, event.action, weight, low, config)
        else:
            example = b""
            if event.item_id:
                example = fold.behave(
                    partition, position, event.item_id, event.ts, "comment", config.weights.get("comment", 1.0),
                    False, config,
                )  # fmt: skip
            if vector is not None:
                fold.write(position, event.ts, event.item_id, vector)
        row = fold.row
        row.events += 1
        row.last_ts = max(row.last_ts, event.ts)
        if example:
            packed.append(example)
            positives += example[24]
    messages = examples.pack_messages(partition, packed)
    changed: dict[bytes, bytes | None] = {}
    for user, key, value in zip(users, keys, before, strict=True):
        row = folds[user].row
        if row.events:
            changed[key] = rows.pack(row)
        elif value is not None:  # where there was no row, not even its deletion is written: it would name the user
            changed[key] = None
    return UserBatch(changed, messages, len(packed), positives, unknown, erased)


def _erased(offset: int, erasure: Erasure, row: UserRow) -> Erased:
    return Erased(
        offset, erasure.user_id, erasure.unlearn, row.events, row.history_count, len(row.seen) // 8, row.comment_count
    )


def is_low(event: Click, config: EvidenceConfig) -> bool:
    """Whether the behaviour is evidence against, never a target: a rating under the threshold, a skip, a dislike."""
    if event.action == "rating":
        return event.value < config.positive_threshold
    return event.action in config.low_actions


class _UserFold:
    """A user's row while a batch is folded into it."""

    __slots__ = ("bucket", "row", "text_section", "text_visible_from")

    def __init__(self, user_id: str, row: UserRow) -> None:
        self.bucket = bucket_of(user_id)
        self.row = row
        self.text_section = b""  # of an example after `text_visible_from`, when all kept comments are visible
        self.text_visible_from = float("nan")

    def behave(
        self, partition: int, position: int, item_id: str, ts: float, action: str, weight: float, low: bool,
        config: EvidenceConfig,
    ) -> bytes:  # fmt: skip
        """Takes a behaviour into the history; the packed example of it, or nothing for a repeat."""
        row = self.row
        key = examples.key_bytes(item_id)
        if not low and row.knows(key):
            return b""
        text = self._text_at(ts) if row.text_dim else b""
        flags = examples.FLAG_TEXT if text else 0
        seen = b""
        if not low and _is_sampled(partition, position, config.rank_sample):
            flags |= examples.FLAG_RANKED
            seen = examples.COUNT.pack(len(row.seen) >> 3) + row.seen
        history = row.history
        head = examples.EXAMPLE.pack(
            int.from_bytes(key, "little", signed=True), ts, position, 0 if low else 1, len(history) >> 4, flags,
            self.bucket, weight,
        )  # fmt: skip
        second = min(max(int(ts), 0), rows.TS_MAX)
        slot = rows.SLOT.pack(
            int.from_bytes(key, "little", signed=True), second, weight, rows.ACTION_CODES.get(action, 0),
            rows.SLOT_LOW if low else 0,
        )  # fmt: skip
        row.history = slot + history
        row.positions = rows.POSITION.pack(position) + row.positions
        if len(row.history) > rows.HISTORY_MAX * 16:
            self._evict()
        row.positives += not low
        return b"".join((head, history, text, seen))

    def _evict(self) -> None:
        row = self.row
        end = rows.HISTORY_MAX * 16
        key = row.history[end : end + 8]
        row.history = row.history[:end]
        row.positions = row.positions[: rows.HISTORY_MAX * 8]
        if not row.knows(key):
            row.seen = (row.seen + key)[-8 * rows.SEEN_MAX :]

    def write(self, position: int, ts: float, item_id: str | None, vector: F4) -> None:
        """Takes a text into the row: the newest kept comment; the oldest one moves into the tail."""
        row = self.row
        if not row.text_dim:
            row.text_dim = len(vector)
            row.tail = bytes(4 * row.text_dim)
        assert row.text_dim == len(vector), "an encoder of another dimension needs a migration"
        scale, quantized = texts.quantize(vector)
        item = examples.item_key(item_id) if item_id else 0
        size = rows.COMMENT.size + row.text_dim
        row.comments = rows.COMMENT.pack(position, ts, item, scale) + quantized.tobytes() + row.comments
        if len(row.comments) > size * rows.COMMENTS_MAX:
            oldest = row.comment_entries()[-1]
            if oldest.ts < ts:  # else it is not visible yet, as the tail always is: more texts at once than are kept
                tail, row.tail_weight = texts.push_tail(row.tail_vector(), row.tail_weight, oldest.scale, oldest.vector)
                row.tail = tail.tobytes()
            row.comments = row.comments[: size * rows.COMMENTS_MAX]
        self.text_visible_from = float("nan")

    def _text_at(self, ts: float) -> bytes:
        if ts > self.text_visible_from:
            return self.text_section
        weight, mean, newest_ts = visible_text(self.row, ts)
        section = b""
        if weight > 0:
            scale, quantized = texts.quantize(mean)
            section = examples.TEXT.pack(weight, scale) + quantized.tobytes()
        if ts > newest_ts:
            self.text_section, self.text_visible_from = section, newest_ts
        return section


def visible_text(row: UserRow, ts: float) -> tuple[float, F4, float]:
    """(weight, mean (T,), time of the newest kept comment) of what the user wrote strictly before `ts`."""
    kept = row.comment_entries()
    visible = [c for c in kept if c.ts < ts]
    scales = np.array([c.scale for c in visible], np.float32)
    vectors = np.stack([c.vector for c in visible]) if visible else np.zeros((0, row.text_dim), np.int8)
    weight, mean = texts.visible_mean(scales, vectors, row.tail_vector(), row.tail_weight)
    return weight, mean, max((c.ts for c in kept), default=-np.inf)


def _is_sampled(partition: int, position: int, share: float) -> bool:
    """A deterministic sample by source position: the same events on every replay."""
    if share <= 0 or share >= 1:
        return share >= 1
    return zlib.crc32(position.to_bytes(8, "little"), partition) < share * 2**32


class CatalogueBatch(NamedTuple):
    """What a batch of item records makes of the catalogue; a row of None is an item withdrawn."""

    rows: dict[bytes, bytes | None]
    messages: list[bytes]


def learn_catalogue(
    partition: int, entries: Sequence[tuple[int, Item | Withdrawn, F4 | None]], text_dim: int
) -> CatalogueBatch:
    """Turns item records (offset, item, unit vector or None) into catalogue rows and entries for the learner."""
    changed: dict[bytes, bytes | None] = {}
    packed: list[examples.ItemEntry] = []
    for offset, item, vector in entries:
        key = item.item_id.encode()
        number = examples.item_key(item.item_id)
        if isinstance(item, Withdrawn):
            changed[key] = None
            packed.append(examples.ItemEntry(number, item.item_id, offset, withdrawn=True))
            continue
        unit = np.zeros(text_dim, np.float32) if vector is None else vector
        half = unit.astype("<f2").tobytes()
        attributes = {name: value for name, value in (item.attributes or {}).items() if value is not None}
        changed[key] = rows.pack_catalogue(
            rows.CatalogueRow(rows.CATALOGUE_VERSION, offset, item.text, attributes, item.ts, half)
        )
        packed.append(examples.ItemEntry(number, item.item_id, offset, item.text[:SNIPPET_CHARS_MAX], item.ts, half))
    step = examples.MESSAGE_EXAMPLES_MAX
    return CatalogueBatch(
        changed, [examples.pack_items(partition, packed[a : a + step]) for a in range(0, len(packed), step)]
    )


class Learnt(NamedTuple):
    """What one message of the examples log did."""

    partition: int
    examples: int
    entries: int
    newest_ts: float
    outcome: Outcome | None
    challengers: npt.NDArray[np.bool_] | None = None  # of the examples, in a trial: those of its challenger's users
    urgent: bool = False  # replicas do not wait for it: another adapter, or items that are candidates now
    ends_removal: bool = False  # see `ItemLearner.owes_replay` and `ItemLearner.asked`


class _Removed(msgspec.Struct, array_like=True):
    """The row of REMOVED_KEY (MessagePack array)."""

    positions: dict[int, bytes]  # partition -> <i8 each, ascending
    asked: list[tuple[int, int]]
    owes_replay: bool


class ItemLearner:
    """The learner behind the examples log: drops repeats, enters items, learns examples message by message.

    State = the learner's rows and the highest source offset applied a (partition, topic): a function of the log, and of
    what later messages of it remove. A removal cannot be undone from the state: after the message that ends it, when
    `owes_replay`, go on with the learner that `again` gives and `learn` has taken through the log from its beginning.
    """

    def __init__(self, config: LearnerConfig, text_dim: int, encoder: str = "") -> None:
        """encoder: name of the one whose vectors the log carries; an adapter of another is refused. Empty: any."""
        self.learner = Learner(config)
        self.encoder = encoder
        self.text_dim = text_dim
        self.sources: dict[int, npt.NDArray[np.int64]] = {}
        self.offset = -1  # of the last message that was applied
        self.generation = 0  # how often the state was learnt again
        self.removed: dict[int, npt.NDArray[np.int64]] = {}  # partition -> positions left out, ascending
        self.left_out = np.zeros(1, np.int64)  # examples that were left out since this learner began
        self.asked: list[tuple[int, int]] = []  # (partition, offset) of erasures that wait for the replay
        self.owes_replay = False
        self.named = False  # whether the erasures that wait name any event
        self.number = 0  # of the encoder in use
        self.staged_number = 0  # of the one that `staged` is of
        self.staged: dict[int, bytes] = {}  # item key -> <f2[T]
        self._first_encoder = encoder
        self._dirty_staged: set[int] = set()
        self._buffers: list[Examples] = []  # up to MESSAGES_MAX, as they are needed

    def again(self) -> "ItemLearner":
        """An empty learner that leaves out what this one was told to, for the log from its beginning."""
        fresh = ItemLearner(self.learner.config, self.text_dim, self._first_encoder)
        fresh.generation = self.generation + 1
        fresh.removed = dict(self.removed)
        return fresh

    def remove(self, message: bytes) -> examples.Removal:
        """Takes a message of removals in: what it names is left out from here on."""
        removal = examples.unpack_removal(message)
        before = self.removed.get(removal.partition, examples.NOTHING)
        after = np.union1d(before, removal.positions)
        if len(after) > len(before):
            self.removed[removal.partition] = after
            self.owes_replay = True
        return removal

    def learn(self, offset: int, message: bytes) -> Learnt:
        """Applies the message at this offset of the examples log."""
        return self.learn_many([(offset, message)])[0]

    def learn_many(self, messages: Sequence[tuple[int, bytes]]) -> list[Learnt]:
        """Applies messages (offset, bytes) in turn, up to the first that ends a removal."""
        learnt: list[Learnt] = []
        waiting: list[tuple[int, int, Examples]] = []  # (offset, partition, examples): unpacked, not learnt yet
        for offset, message in messages:
            kind, partition, _ = examples.read_header(message)
            if kind == examples.KIND_EXAMPLES:
                if len(waiting) == MESSAGES_MAX:
                    learnt += self._learn(waiting)
                waiting.append((offset, partition, self._unpack(partition, message, self._buffer(len(waiting)))))
                continue
            learnt += self._learn(waiting)
            learnt.append(self._apply(offset, kind, partition, message))
            if learnt[-1].ends_removal:
                break
        return learnt + self._learn(waiting)

    def learn_all(self, messages: Sequence[tuple[int, bytes]]) -> None:
        """Applies them all, past removals that end among them."""
        while messages:
            messages = messages[len(self.learn_many(messages)) :]

    def _buffer(self, number: int) -> Examples:
        if number == len(self._buffers):
            seen_max = examples.MESSAGE_EXAMPLES_MAX * rows.SEEN_MAX
            self._buffers.append(new_examples(self.learner.config, seen_max))
        return self._buffers[number]

    def _unpack(self, partition: int, message: bytes, buffer: Examples) -> Examples:
        return examples.unpack_examples(
            message, buffer, self._applied(partition), self.removed.get(partition, examples.NOTHING), self.left_out
        )

    def _applied(self, partition: int) -> npt.NDArray[np.int64]:
        if partition not in self.sources:
            self.sources[partition] = np.full(len(examples.TOPICS), -1, np.int64)
        return self.sources[partition]

    def _learn(self, waiting: list[tuple[int, int, Examples]]) -> list[Learnt]:
        """Learns what waits, which is none afterwards."""
        outcomes = self.learner.learn_many([batch for _, _, batch in waiting], [offset for offset, _, _ in waiting])
        learnt = []
        for (offset, partition, batch), outcome in zip(waiting, outcomes, strict=True):
            self.offset = offset
            newest = float(batch.ts[: batch.count].max()) if batch.count else 0.0
            arms = None if self.learner.matrix.trial is None else self.learner.matrix.arrays.arm
            challengers = None if arms is None else arms[batch.bucket[: batch.count]] > 0
            learnt.append(Learnt(partition, batch.count, 0, newest, outcome if batch.count else None, challengers))
        waiting.clear()
        return learnt

    def _apply(self, offset: int, kind: int, partition: int, message: bytes) -> Learnt:
        """A message that holds no examples."""
        if kind == examples.KIND_REMOVALS:
            return self._remove(offset, message)
        self.offset = offset
        if kind == examples.KIND_ADAPTER:
            self._adapt(offset, message)
            return Learnt(partition, 0, 0, 0.0, None, urgent=True)
        if kind == examples.KIND_TIME:
            self.learner.pass_time(examples.unpack_time(message))
            return Learnt(partition, 0, 0, 0.0, None, urgent=True)
        if kind == examples.KIND_VECTORS:
            told, in_use = examples.unpack_vectors(message)
            if examples.drops(message):
                self._drop_staged(told.number)
                return Learnt(partition, 0, 0, 0.0, None)
            return Learnt(partition, 0, 0, 0.0, None, urgent=self._take_vectors(told, in_use))
        entered = self._enter(examples.unpack_items(message), self._applied(partition))
        return Learnt(partition, 0, entered, 0.0, None)

    def _adapt(self, offset: int, message: bytes) -> None:
        """A switch for all ends a trial, of whatever adapter, unless it yields to one."""
        if examples.is_trial(message):
            trial = examples.unpack_trial(message, offset)
            if trial is None or not self._is_left_behind(trial.adapter):
                self.learner.try_out(trial)
            return
        adapter, _ = examples.unpack_adapter(message)
        yields = examples.yields(message) and self.learner.matrix.trial is not None
        if not yields and not self._is_left_behind(adapter):
            self.learner.adapt(adapter)
            self.end_trial()

    def end_trial(self) -> None:
        """No trial is on any more."""
        if self.learner.matrix.trial is not None:
            self.learner.try_out(None)

    def _is_left_behind(self, adapter: Adapter | None) -> bool:
        """Whether it was asked for when the deployment was about to move on from its encoder, or is of the one that it
        is moving to. Raises AdapterError for one that stands behind another encoder where there was no move."""
        if adapter is not None and self.encoder not in ("", adapter.base):
            if self.number or self.staged_number:
                return True
            raise AdapterError(
                f"the examples log switches to an adapter of the encoder {adapter.base}, but texts are encoded by "
                f"{self.encoder} here: set HEADWATER_ENCODER to the log's, or use an app id of its own"
            )
        return False

    def _take_vectors(self, told: examples.Vectors, in_use: bool) -> bool:
        """Keeps vectors of the next encoder apart, or takes them in; whether anything that is served has changed."""
        if told.number < self.number:
            return False  # of one that the deployment has moved on from
        if told.number == self.number:
            self.learner.revector(told.vectors)
            return bool(told.vectors)
        if told.number != self.staged_number:
            self._drop_staged(self.staged_number)
            self.staged_number = told.number
        self.staged.update(told.vectors)
        self._dirty_staged.update(key for key, _ in told.vectors)
        if not in_use:
            return False
        self.learner.adapt(None)  # an adapter is of one encoder
        self.end_trial()
        self.learner.revector(sorted(self.staged.items()))
        self.number, self.encoder = told.number, told.encoder
        self._drop_staged(told.number)
        return True

    def _drop_staged(self, number: int) -> None:
        if number != self.staged_number:
            return
        self._dirty_staged.update(self.staged)
        self.staged, self.staged_number = {}, 0

    def _enter(self, entries: Iterable[examples.ItemEntry], applied: npt.NDArray[np.int64]) -> int:
        entered = 0
        for entry in entries:
            if entry.offset <= applied[examples.ITEMS]:
                continue
            applied[examples.ITEMS] = entry.offset
            entered += 1
            if entry.withdrawn:
                self.learner.withdraw(entry.key)
                continue
            vector = np.frombuffer(entry.vector, "<f2").astype(np.float32)
            self.learner.enter(entry.key, entry.item_id, entry.text, vector, entry.ts)
        return entered

    def _remove(self, offset: int, message: bytes) -> Learnt:
        removal = self.remove(message)
        self.named |= len(removal.positions) > 0
        place = removal.partition, removal.erasure
        if place not in self.asked:
            self.asked.append(place)
        if not self.owes_replay:
            self.offset = offset
        return Learnt(removal.partition, 0, 0, 0.0, None, ends_removal=not removal.more)

    def settled(self, offset: int) -> None:
        """The removals that were asked for up to here have their effect, or cannot have it."""
        self.offset = offset
        self.asked, self.owes_replay, self.named = [], False, False

    @property
    def dirty_bytes(self) -> int:
        """About what `take_dirty` would give."""
        return self.learner.dirty_bytes + len(self._dirty_staged) * (STAGED_ROW_BYTES + 2 * self.text_dim)

    def take_dirty(self) -> dict[bytes, bytes | None]:
        """The rows that changed since the last call, those of OWN_HEADS among them."""
        head = self._head()
        dirty, self._dirty_staged = sorted(self._dirty_staged), set()
        own = (*self._own_rows(), *((_staged_key(key), self._staged_row(key)) for key in dirty))
        return {head + key: value for key, value in (*self.learner.take_dirty().items(), *own)}

    def all_rows(self) -> Iterator[tuple[bytes, bytes]]:
        """Every row of the state, for `load` of another."""
        head = self._head()
        own = (*self._own_rows(), *((_staged_key(key), self._staged_row(key)) for key in sorted(self.staged)))
        return ((head + key, value) for key, value in (*self.learner.matrix.rows(), *own) if value is not None)

    def _head(self) -> bytes:
        return GENERATION.pack(b"#", self.generation) if self.generation else b""

    def _own_rows(self) -> Iterator[tuple[bytes, bytes]]:
        yield SOURCES_KEY, self._pack_sources()
        if self.removed or self.asked:
            positions = {p: at.astype("<i8").tobytes() for p, at in sorted(self.removed.items())}
            yield REMOVED_KEY, msgspec.msgpack.encode(_Removed(positions, self.asked, self.owes_replay))
        if self.number:
            yield ENCODER_KEY, msgspec.msgpack.encode((self.number, self.encoder))

    def _staged_row(self, key: int) -> bytes | None:
        vector = self.staged.get(key)
        return None if vector is None else self.staged_number.to_bytes(4, "little") + vector

    def load(self, stored: Iterable[tuple[bytes, bytes]]) -> None:
        """Takes the state from rows, as `take_dirty` gave them, of an empty learner."""

        def others() -> Iterable[tuple[bytes, bytes]]:
            for full_key, value in stored:
                self.generation, key = split_key(full_key)
                if key == SOURCES_KEY:
                    self._unpack_sources(value)
                elif key == REMOVED_KEY:
                    self._unpack_removed(value)
                elif key == ENCODER_KEY:
                    self.number, self.encoder = msgspec.msgpack.decode(value, type=tuple[int, str])
                elif key[:1] == STAGED_HEAD:
                    self.staged_number = int.from_bytes(value[:4], "little")
                    self.staged[int.from_bytes(key[1:], "little", signed=True)] = value[4:]
                else:
                    yield key, value

        self.learner.load(others())

    def _unpack_removed(self, value: bytes) -> None:
        row = msgspec.msgpack.decode(value, type=_Removed)
        self.removed = {p: np.frombuffer(at, "<i8") for p, at in row.positions.items()}
        self.asked, self.owes_replay, self.named = row.asked, row.owes_replay, bool(row.asked)

    def _pack_sources(self) -> bytes:
        return b"".join(np.int64(p).tobytes() + self.sources[p].tobytes() for p in sorted(self.sources))

    def _unpack_sources(self, value: bytes) -> None:
        table = np.frombuffer(value, "<i8").reshape(-1, 1 + len(examples.TOPICS))
        self.sources = {int(line[0]): line[1:].copy() for line in table}


def _staged_key(key: int) -> bytes:
    return STAGED_HEAD + key.to_bytes(8, "little", signed=True)


def split_key(key: bytes) -> tuple[int, bytes]:
    """(generation, key without it) of a row of the item state.

    >>> split_key(GENERATION.pack(b"#", 2) + b"g"), split_key(b"g")
    ((2, b'g'), (0, b'g'))
    """
    if key[:1] != b"#":
        return 0, key
    return GENERATION.unpack_from(key)[1], key[GENERATION.size :]


class Replica:
    """The item matrix of a worker, kept by the complete flushes of the item changelog.

    A state that was learnt again comes as one flush, all of it under another generation, with the deletion of all that
    was: the matrix is then made apart, and changed at once.
    """

    def __init__(self, config: LearnerConfig) -> None:
        self.matrix = ItemMatrix(config.dim, config.text_dim, config.neighbours_max)
        self.generation = 0

    def prepare(self, changed: dict[bytes, bytes | None]) -> Callable[[], None]:
        """What takes a flush in, at a moment when nobody reads. Others may read meanwhile, and no other flush come.

        Takes the rows out of `changed`, so that they are in memory once.
        """
        newest = max((split_key(key)[0] for key, value in changed.items() if value is not None), default=0)
        newest = max(self.generation, newest)
        keys = ((*split_key(key), value) for key, value in leaving(changed))
        rows = ((key, value) for generation, key, value in keys if generation == newest and key[:1] not in OWN_HEADS)
        if newest == self.generation:
            return partial(self.matrix.take, self.matrix.arrange(rows))
        fresh = ItemMatrix(self.matrix.dim, self.matrix.text_dim, self.matrix.neighbours_max)
        fresh.apply(rows)
        return partial(self._take_over, fresh, newest)

    def _take_over(self, fresh: ItemMatrix, generation: int) -> None:
        self.matrix.take_over(fresh)
        self.generation = generation
