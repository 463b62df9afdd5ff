"""The learner: a deterministic state machine over the examples log.

The same entries and messages in the same order give the same bytes, also when the state was packed into rows and
loaded again at any message boundary in between, and whenever `take_dirty` was called. Formulas: model.kernels.
"""

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from model import kernels
from model.adapter import Adapter
from model.examples import Examples, new_examples
from model.items import PENDING, TEXT_CHARS_MAX, ItemMatrix, PendingItem, half, row_key
from model.trial import Trial

Array = npt.NDArray[Any]
T = TypeVar("T")

HALF_LIVES_POSITIVES: Final = (10, 100, 1000, None)  # of the running popularities; None: all-time
DENSE_FLOATS_MAX: Final = 4_000_000  # scores of ranked examples held at once
MESSAGES_MAX: Final = 8  # learnt by one call of the kernel
NO_ENTRIES: Final = (np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float64))


@dataclass(frozen=True)
class LearnerConfig:
    """Sizes and step sizes; one default serves every stream. Reasons and figures: docs/decisions.md."""

    dim: int = 64  # D of the learnt block
    text_dim: int = 384  # T, the encoder's
    negatives: int = 512  # K candidates drawn a message, shared by its examples
    neighbours_max: int = 512  # M co-occurring items kept an item, 8 B each
    history_max: int = 100  # L history entries an example
    cooccurrence_history: int = 24  # of these in the co-occurrence block
    y_history: int = 32  # of these whose y gets a gradient
    message_examples_max: int = 64  # B
    rank_items: int = 30  # item scores an example that ranking in full may cost on average; 0: no limit
    refresh_examples: int = 2  # after which the candidates' features are taken anew; the target's never lag
    seed: int = 7
    lr_phi: float = 0.05
    lr_y: float = 0.1
    lr_beta: float = 0.02
    lr_scale: float = 0.2  # w, aT, aX, aK, to begin with: each step's gain is learnt
    lr_decay: float = 0.05  # om, ta, oK, tK
    lr_setting: float = 0.05  # what w, aT, aX, aK differ by, by gap and by length of the history
    lr_map: float = 0.02  # M
    lr_context: float = 0.025  # x
    lr_sharp: float = 0.1  # the calibration a
    backward: float = 0.85  # what an item counts as the neighbour of one that came after it; of one before it: 1
    start: float = 0.1  # length of phi and y at entry, a dimension

    def __post_init__(self) -> None:
        if self.negatives + self.message_examples_max >= 32_767:
            raise ValueError(f"negatives {self.negatives}: with a message they must stay under 32,767")
        if max(self.cooccurrence_history, self.y_history) > self.history_max:
            raise ValueError(
                f"cooccurrence_history {self.cooccurrence_history} and y_history {self.y_history} "
                f"must not exceed history_max {self.history_max}"
            )


@dataclass(frozen=True)
class Outcome:
    """What ranking in full gave, one row an example of the message, n in all.

    rank is NaN where the example was not ranked: not asked for, more than `rank_items` allows, no positive, or its
    target no candidate.
    """

    rank: Array  # (n,) float32: 1 + #greater + ties / 2 among the candidates
    candidates: Array  # (n,) int32: active items minus the user's own; 0 where not ranked
    probability: Array  # (n,) float32: p of the target
    log_loss: Array  # (n,) float32, nats: -ln p_i - sum over the other candidates of ln(1 - p_j)
    auc: Array  # (n,) float32: share of the other candidates below the target
    pop_rank: Array  # (n, 4) float32: by running popularity, HALF_LIVES_POSITIVES, among the same candidates
    knn_rank: Array  # (n,) float32: by item-kNN over the learner's counts, among the same candidates
    raw_log_loss: Array  # (n,) float32: the log loss of sigmoid(s), not calibrated
    pop_log_loss: Array  # (n, 4) float32: of popularity's own p_j = (1 + count_j) / sum (1 + count)
    listed: Array  # (n, kernels.LISTED) float32: p of the best candidates, best first; nan where there are fewer
    place: Array  # (n,) int32: of the target in that list, from 0; -1 where it is not in it


class Problem(NamedTuple):
    """The softmax of one message, text apart: n examples against the K candidates that they share.

    s_bj = offset_bj + <words_b, M e_j> with the adapter's metric M; each candidate weighs exp(log_weight), and the
    message's targets, which weigh 1, have that much less in their offset.
    """

    words: Array  # (n, T) float32: sum_h a_h zT_h
    target: Array  # (n,) int32 rows
    candidate: Array  # (K,) int32 rows
    offset: Array  # (n, K) float32; kernels.CLOSED where one is no negative of the example
    offset_target: Array  # (n,) float32
    log_weight: float


class Sources(NamedTuple):
    """What the words of a `Problem` are made of: words_b = sum_h history_scale_bh (e_h - mu) + own_scale_b (own_b - mu)
    with own_b the mean of the user's own texts."""

    example: Array  # (n,) places of the problem's examples in the message
    history: Array  # (n, TEXT_HISTORY) int32 rows of the history's items, newest first; -1: none
    history_scale: Array  # (n, TEXT_HISTORY) float32; 0 where there is no text
    own_scale: Array  # (n,) float32; 0 where the user wrote nothing


class Learner:
    """Owns the item matrix. Not safe for concurrent use."""

    def __init__(self, config: LearnerConfig | None = None) -> None:
        self.config = config = config or LearnerConfig()
        self.matrix = ItemMatrix(config.dim, config.text_dim, config.neighbours_max)
        self._steps = kernels.Steps(
            config.negatives, config.cooccurrence_history, config.y_history, config.seed, config.refresh_examples,
            config.rank_items,
            config.lr_phi, config.lr_y, config.lr_beta, config.lr_scale, config.lr_decay,
            config.lr_setting, config.lr_map, config.lr_context, config.lr_sharp, config.start,
            config.backward,
        )  # fmt: skip
        self._heap: list[tuple[float, int, int]] = []  # (ts, order, key) of pending items; stale ones are skipped
        self._dirty_pending: set[int] = set()
        self._dirty_adapter = self._dirty_trial = False
        self._drawn = (0, 0, 0.0)  # of the last message: examples (0: no gradient), candidates, what each weighs
        self._bucket = np.zeros(0, np.uint8)  # its examples'
        self._outcomes = [_new_outcomes(config.message_examples_max)]  # of as many messages as came at once

    @cached_property
    def _work(self) -> kernels.Work:
        return _new_work(self.config, self._capacity)  # megabytes that one which only holds items does without

    @property
    def _capacity(self) -> int:
        return len(self.matrix.arrays.key)

    # --- catalogue ---

    def enter(self, key: int, item_id: str, text: str, vector: Array, ts: float | None) -> None:
        """An item enters the catalogue, or its text changed.

        It is a candidate for events strictly later than ts (Unix s): at once when None or 0, else when the log's
        clock (the highest event time learnt) has passed it. A candidate that is entered again takes the new text and
        keeps what it learnt. vector: (T,) float32, unit length, or all zeros for none.
        """
        if vector.shape != (self.config.text_dim,):
            raise ValueError(f"item {item_id!r}: vector of shape {vector.shape}, not ({self.config.text_dim},)")
        m = self.matrix.arrays
        vector, text = half(vector), text[:TEXT_CHARS_MAX]
        order = int(m.scalar[kernels.ENTRIES])
        m.scalar[kernels.ENTRIES] += 1
        if self.pending.pop(key, None) is not None:
            self._dirty_pending.add(key)
        row = self.matrix.index(key)
        if row >= 0 and self.matrix.is_active(row):
            self._replace(row, item_id, text, vector)
        elif not ts or ts < self.matrix.clock:
            item = PendingItem(key, item_id, text, vector, ts or 0.0, order)
            self._activate(self._describe(item), ts or max(0.0, self.matrix.clock))
        else:
            self.pending[key] = PendingItem(key, item_id, text, vector, ts, order)
            self._dirty_pending.add(key)
            heapq.heappush(self._heap, (ts, order, key))

    def _activate(self, row: int, ts: float) -> None:
        """The item is a candidate, since ts."""
        kernels.start_row(self.matrix.arrays, row, self.config.start)
        kernels.activate(self.matrix.arrays, row, ts)
        self.matrix.mark(row, kernels.DIRTY_STATIC | kernels.DIRTY_DENSE)

    def pass_time(self, now: float) -> None:
        """The log's clock is at `now` (Unix s) at least, without an event: pending items whose ts it passes enter."""
        m = self.matrix.arrays
        m.scalar[kernels.CLOCK] = max(float(m.scalar[kernels.CLOCK]), now)
        while (ts := self.pending_ts) < self.matrix.clock:
            item = self.pending[heapq.heappop(self._heap)[2]]
            self._activate(self._take_pending(item), ts)
        self.matrix.version += 1

    @property
    def pending_ts(self) -> float:
        """The least ts (Unix s) of the pending items; inf where there is none."""
        while self._heap and not self._waits(*self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else math.inf

    def _waits(self, ts: float, order: int, key: int) -> bool:
        """Whether an entry of the heap is still its item's."""
        item = self.pending.get(key)
        return item is not None and item.order == order

    @property
    def pending(self) -> dict[int, PendingItem]:
        """Items that wait until the clock passes their ts, by key."""
        return self.matrix.pending

    def withdraw(self, key: int) -> None:
        """The item leaves the catalogue: no candidate and no negative any more; what it learnt is kept."""
        if self.pending.pop(key, None) is not None:
            self._dirty_pending.add(key)
        row = self.matrix.index(key)
        if row >= 0 and self.matrix.is_active(row):
            m = self.matrix.arrays
            m.flags[row] = (int(m.flags[row]) & ~kernels.ACTIVE) | kernels.WITHDRAWN
            m.scalar[kernels.ACTIVES] -= 1
            self.matrix.mark(row, kernels.DIRTY_STATIC)

    def _was_active(self, row: int) -> bool:
        return bool(self.matrix.arrays.flags[row] & kernels.WITHDRAWN)

    def _replace(self, row: int, item_id: str, text: str, vector: Array) -> None:
        """New text of a candidate: e and, with it, mu."""
        m = self.matrix.arrays
        old, had = m.e[row].copy(), bool(m.flags[row] & kernels.VECTOR)
        self.matrix.describe(row, item_id, text, vector)
        has = bool(m.flags[row] & kernels.VECTOR)
        vectors = m.scalar[kernels.VECTORS] + has - had
        if vectors > 0:
            m.mu[:] += ((vector - old) - m.mu * np.float32(has - had)) / np.float32(vectors)
        else:
            m.mu[:] = 0
        m.scalar[kernels.VECTORS] = vectors

    def _describe(self, item: PendingItem) -> int:
        """The item's row, made if need be, with id, text and vector set."""
        row = self.matrix.index(item.key)
        if row < 0:
            row = self.matrix.add_row(item.key)
        elif self._was_active(row):  # its old vector leaves mu; the new one enters with the start
            self._replace(row, item.item_id, item.text, np.zeros_like(item.vector))
        self.matrix.describe(row, item.item_id, item.text, item.vector)
        return row

    def revector(self, vectors: Sequence[tuple[int, bytes]]) -> None:
        """Items' texts as another encoder of the same space reads them: (key, vector as <f2[T]). Unknown keys pass.

        An item's phi and y move by the difference of the two starts, start sqrt(D) P(e - mu) / |P(e - mu)|, the new one
        with the new mu: what it learnt since is kept. All else that was learnt stays as it is.
        """
        m, found = self.matrix.arrays, {}
        for key, packed in vectors:
            vector = np.frombuffer(packed, "<f2").astype(np.float32)
            if vector.shape != (self.config.text_dim,):
                raise ValueError(f"a vector of {len(vector)} numbers, texts have {self.config.text_dim}")
            if (item := self.pending.get(key)) is not None:
                self.pending[key] = replace(item, vector=vector)
                self._dirty_pending.add(key)
            row = self.matrix.index(key)
            if row >= 0 and m.flags[row] & kernels.VECTOR and vector.any():
                found[row] = vector
        if not found:
            return
        rows, new = np.array(list(found), np.int64), np.stack(list(found.values()))
        before, change = self._starts(rows), new.astype(np.float64) - m.e[rows]
        m.e[rows] = new
        m.mu[:] += (change.sum(axis=0) / m.scalar[kernels.VECTORS]).astype(np.float32)
        moved = self._starts(rows) - before
        m.phi[rows] += moved
        m.y[rows] += moved
        for row in found:
            self.matrix.mark(row, kernels.DIRTY_STATIC | kernels.DIRTY_DENSE)

    def _starts(self, rows: Array) -> Array:
        """(n, D) float32: what `kernels.start_row` gives phi and y of these items, with mu as it is now."""
        m = self.matrix.arrays
        direction = (m.e[rows] - m.mu) @ m.project.T
        norm = np.sqrt((direction * direction).sum(axis=1, keepdims=True) + 1e-9)
        starts: Array = np.float32(self.config.start * np.sqrt(self.config.dim)) * direction / norm
        return starts.astype(np.float32)

    def adapt(self, adapter: Adapter | None) -> None:
        """Compares texts through this adapter from the next message on; None: as the encoder gives them.

        What was learnt stays as it is. Raises AdapterError for another dimension.
        """
        self.matrix.adapt(adapter)
        self._dirty_adapter = True

    def try_out(self, trial: Trial | None) -> None:
        """Compares the texts of the trial's challengers through its adapter from the next message on; None: no trial.

        Both arms' examples are learnt, each through its own. Raises AdapterError for another dimension.
        """
        self.matrix.try_out(trial)
        self._dirty_trial = True

    # --- learning ---

    def learn(self, examples: Examples, position: int) -> Outcome:
        """Learns one message. position: its offset in the examples log, which keys the negatives' generator.

        An example of a pending or unknown target is its creating event: counters and co-occurrence, no gradient,
        and the item has a row afterwards (a pending one is a candidate from the next example on).
        """
        return self.learn_many([examples], [position])[0]

    def learn_many(self, messages: Sequence[Examples], positions: Sequence[int]) -> list[Outcome]:
        """`learn` of each message in turn. Up to MESSAGES_MAX of them, whose items are all known, are one call of the
        kernel: to have the interpreter back after a call costs the thread a millisecond or more beside a busy loop.
        """
        for examples in messages:
            if examples.count > self.config.message_examples_max:
                most = self.config.message_examples_max
                raise ValueError(f"message of {examples.count} examples, at most {most} are learnt at once")
        outcomes: list[Outcome] = []
        while len(outcomes) < len(messages):
            at = len(outcomes)
            outcomes += self._learn_next(messages[at : at + MESSAGES_MAX], positions[at : at + MESSAGES_MAX])
        return outcomes

    def _learn_next(self, messages: Sequence[Examples], positions: Sequence[int]) -> list[Outcome]:
        """Learns the first messages, at least one. Returns an outcome for each of them."""
        if not messages[0].count:
            return [_unranked(0)]
        count = 0
        while not self.pending and count < len(messages) and not self._find(count, messages[count]):
            count += 1
        entries = NO_ENTRIES
        if not count:
            count, entries = 1, self._schedule(messages[0])
        if len(self._work.slot) != self._capacity:
            targets, histories = self._work.targets, self._work.histories
            self._work = _new_work(self.config, self._capacity)._replace(targets=targets, histories=histories)
        for n, examples in enumerate(messages[:count]):
            if n == len(self._outcomes):
                self._outcomes.append(_new_outcomes(self.config.message_examples_max))
            self._outcomes[n].candidates[: examples.count] = 0
        learnt, drawn, weight = kernels.learn_messages(
            self.matrix.arrays, self._work, _filled(messages[:count]), _filled(self._outcomes[:count]), self._steps,
            count, np.array(positions[:count]), *entries, self.matrix.record_bytes,
        )  # fmt: skip
        self._drawn = (messages[count - 1].count if learnt else 0, drawn, float(weight))
        self._bucket = messages[count - 1].bucket
        self.matrix.version += 1
        return [self._outcome(n, examples.count) for n, examples in enumerate(messages[:count])]

    def _find(self, number: int, examples: Examples) -> int:
        """Rows of targets and histories into the scratch, of message `number` of a call. Returns how many keys have
        none; they are in w.unknown."""
        m, w = self.matrix.arrays, self._work
        missing: int = kernels.find_examples(
            m.table_key, m.table_row, examples, w.targets[number], w.histories[number], w.unknown
        )
        return missing

    def problem(self) -> Problem | None:
        """What the loss of the last message was made of; None where it had none, or no text."""
        n, count, weight = self._drawn
        if not (n and count):
            return None
        w, m, dim = self._work, self.matrix.arrays, self.config.dim
        told = self._told(n)
        if not len(told):
            return None
        words, arms = w.words[told], m.arm[self._bucket[told]]
        texts = kernels.adapted(m.metric, words)
        if arms.any():
            texts = np.where(arms[:, None], kernels.adapted(m.rival, words), texts)
        target = w.target[told]
        offset = w.logit[told, :count]
        offset = np.where(offset > kernels.CLOSED, offset - texts @ w.item[:count, dim:].T, offset)
        offset_target = w.score_i[told] - (m.e[target] * texts).sum(axis=1)
        return Problem(words, target, w.cand[:count].copy(), offset, offset_target, float(np.log(weight)))

    def sources(self, examples: Examples) -> Sources:
        """What the words of `problem` are made of; examples: the message that was learnt last."""
        w, m, near = self._work, self.matrix.arrays, kernels.TEXT_HISTORY
        told = self._told(self._drawn[0])
        history, scale = np.full((len(told), near), -1, np.int32), np.zeros((len(told), near), np.float32)
        heads = np.zeros((2, self.config.text_dim), np.float32)
        coefficient = np.zeros((2, self.config.history_max), np.float32)
        for at, b in enumerate(told.tolist()):
            used = int(examples.history_count[b])
            rows = w.history[b, :used]
            kernels.history_texts(m, rows, examples.history_weight[b, :used], heads, coefficient)
            count = min(used, near)
            history[at, :count] = rows[:count]
            scale[at, :count] = w.coefficient[b, kernels.T_TEXT : kernels.T_TEXT + 2] @ coefficient[:, :count]
        own = np.where(examples.text_on[told], np.minimum(examples.text_weight[told], kernels.TEXT_WEIGHT_MAX), 0)
        return Sources(told, history, scale, w.coefficient[told, kernels.T_TEXT + 2] * np.sqrt(own))

    def _told(self, n: int) -> Array:
        """Which of the n examples of the last message have a gradient, and words."""
        return np.flatnonzero(self._work.go[:n] & self._work.words[:n].any(axis=1))

    def _schedule(self, examples: Examples) -> tuple[Array, Array, Array]:
        """Gives every key of the message a row, and says which items become candidates inside it.

        Returns rows (int32), moments (int32: 2 b before, 2 b + 1 right after example b), entry times (f8, s), in order.
        """
        n = examples.count
        entries: list[tuple[int, int, float]] = []  # (moment, row, ts)
        if self._heap:
            clock = np.maximum(np.maximum.accumulate(examples.ts[:n]), self.matrix.clock)
            while (ts := self.pending_ts) < clock[-1]:
                item = self.pending[heapq.heappop(self._heap)[2]]
                moment = 2 * int(np.searchsorted(clock, ts, side="right"))
                entries.append((moment, self._take_pending(item), ts))
        created = self._find_rows(examples)
        if entries or created:
            targets = self._work.targets[0, :n]
            entries += [(2 * n, row, 0.0) for row in created]
            for at, (moment, row, _) in enumerate(entries):
                named = np.flatnonzero(targets == row)
                if len(named) and 2 * named[0] < moment:
                    entries[at] = (2 * int(named[0]) + 1, row, float(examples.ts[named[0]]))
            entries.sort(key=lambda entry: entry[0])
        return (
            np.array([row for _, row, _ in entries], np.int32),
            np.array([moment for moment, _, _ in entries], np.int32),
            np.array([ts for _, _, ts in entries], np.float64),
        )

    def _take_pending(self, item: PendingItem) -> int:
        del self.pending[item.key]
        self._dirty_pending.add(item.key)
        return self._describe(item)

    def _find_rows(self, examples: Examples) -> list[int]:
        """Rows of targets and histories into the scratch; stubs for unknown keys. Returns rows of pending targets."""
        w, created = self._work, []
        missing = self._find(0, examples)
        if missing:
            targets = set(examples.item[: examples.count].tolist())
            for key in dict.fromkeys(w.unknown[:missing].tolist()):
                item = self.pending.get(key) if key in targets else None
                if item is not None:
                    created.append(self._take_pending(item))
                else:
                    self.matrix.add_row(key)
            self._find(0, examples)
        m = self.matrix.arrays
        if self.pending:  # a stub or withdrawn item that is entered again by its event
            for row in np.unique(w.targets[0, : examples.count]).tolist():
                item = self.pending.get(int(m.key[row]))
                if item is not None:
                    created.append(self._take_pending(item))
        return created

    def _outcome(self, number: int, n: int) -> Outcome:
        o = self._outcomes[number]
        ranked = o.candidates[:n] > 0
        if not ranked.any():
            return _unranked(n)
        others = o.candidates[:n] - 1

        def column(values: Array) -> Array:
            keep = ranked if values.ndim == 1 else ranked[:, None]
            return np.where(keep, values, np.nan).astype(np.float32)

        with np.errstate(divide="ignore", invalid="ignore"):
            auc = (o.candidates[:n] - o.rank[:n]) / others
        return Outcome(
            rank=column(o.rank[:n]),
            candidates=o.candidates[:n].copy(),
            probability=column(o.probability[:n]),
            log_loss=column(o.log_loss[:n]),
            auc=column(auc),
            pop_rank=column(o.popularity_rank[:n]),
            knn_rank=column(o.knn_rank[:n]),
            raw_log_loss=column(o.raw_log_loss[:n]),
            pop_log_loss=column(o.popularity_log_loss[:n]),
            listed=column(np.where(o.listed[:n] < 0, np.nan, o.listed[:n])),
            place=np.where(ranked, o.place[:n], -1).astype(np.int32),
        )

    # --- rows ---

    @property
    def dirty_bytes(self) -> int:
        """Bytes of the dense and neighbour rows that changed since the last take."""
        return int(self.matrix.arrays.dirty_total[1])

    def take_dirty(self) -> dict[bytes, bytes | None]:
        """The rows that changed since the last take, and the globals row; None: the row is gone."""
        m = self.matrix.arrays
        rows = np.sort(m.dirty_row[: m.dirty_total[0]])
        bits = m.dirty[rows]
        taken: dict[bytes, bytes | None] = {}
        taken.update(self.matrix.pack_static(rows[bits & kernels.DIRTY_STATIC != 0].tolist()))
        taken.update(self.matrix.pack_dense(rows[bits & kernels.DIRTY_DENSE != 0]))
        taken.update(self.matrix.pack_neighbours(rows[bits & kernels.DIRTY_NEIGHBOURS != 0].tolist()))
        for key in sorted(self._dirty_pending):
            item = self.pending.get(key)
            taken.update([self.matrix.pack_pending(item) if item else (row_key(PENDING, key), None)])
        taken.update(self.matrix.pack_maps(np.flatnonzero(m.map_dirty).tolist()))
        taken.update([self.matrix.pack_globals()])
        if self._dirty_adapter:
            taken.update([self.matrix.pack_adapter()])
        if self._dirty_trial:
            taken.update([self.matrix.pack_trial()])
        self._clean()
        return taken

    def _clean(self) -> None:
        m = self.matrix.arrays
        m.dirty[:] = 0
        m.dirty_total[:] = 0
        m.map_dirty[:] = 0
        self._dirty_pending.clear()
        self._dirty_adapter = self._dirty_trial = False

    def load(self, rows: Iterable[tuple[bytes, bytes | None]]) -> None:
        """Takes a whole state from its rows; what was learnt here before is gone."""
        self.matrix = ItemMatrix(self.config.dim, self.config.text_dim, self.config.neighbours_max)
        self.matrix.apply(rows)
        self._heap = [(item.ts, item.order, item.key) for item in self.pending.values()]
        heapq.heapify(self._heap)
        self._clean()

    def digest(self) -> str:
        """Of the whole state: `ItemMatrix.digest`."""
        return self.matrix.digest()


def _new_work(config: LearnerConfig, capacity: int) -> kernels.Work:
    b, k, length = config.message_examples_max, config.negatives, config.history_max
    d, t = config.dim, config.text_dim
    near = min(length, config.cooccurrence_history)
    blocks = -(-b // config.refresh_examples)
    coefficients = kernels.COEFFICIENTS
    links = b * near * config.neighbours_max + 1
    changes = 4 * b * kernels.COUNTED

    def f(*shape: int) -> Array:
        return np.zeros(shape, np.float32)

    def i(*shape: int) -> Array:
        return np.zeros(shape, np.int32)

    return kernels.Work(
        targets=i(MESSAGES_MAX, b), histories=i(MESSAGES_MAX, b, length), unknown=np.zeros(b * (1 + length), np.int64),
        target=i(b), history=i(b, length), go=np.zeros(b, np.bool_), wt=f(b, length), ck=f(b, length),
        age=i(b, length), gap=i(b, length), norm=f(b), norm_k=f(b), z=f(b, d), user=f(b, d + t),
        text=f(b, kernels.TEXT_HEADS, t), words=f(b, t), logit=f(b, k), unit=f(b, 4 * d + 1),
        since=i(b), length=i(b),
        coefficient=f(b, coefficients), slope=f(b, coefficients),
        slot=np.zeros(capacity, np.int16), cand=i(k), item=f(k, d + t),
        column=f(kernels.COLUMNS, k), feature=f(blocks, kernels.FEATURES, k), beta=f(k), bias=f(k),
        feature_i=f(b, kernels.FEATURES, 1), score_i=f(b),
        cooc=f(b, k), cooc_i=f(b), damping=f(k), damping_i=f(b), near_i=f(b, near), place=i(length),
        linked=i(capacity), link_row=i(b * near), link_start=i(b * near + 1),
        link_slot=np.zeros(links, np.uint16), link_value=f(links), change_first=i(b * near),
        change_next=i(changes), change_slot=np.zeros(changes, np.uint16), change_value=f(changes),
        changes=np.zeros(1, np.int64),
        grad_i=f(b), step_phi=f(k + b, d), step_beta=f(k + b), row_phi=i(k + b), slot_y=i(capacity),
        step_y=f(b * config.y_history, d), row_y=i(b * config.y_history), step_context=f(kernels.CONTEXTS, d),
        theta=f(kernels.THETA),
        weight_c=f(k), score=f(capacity), dense=f(max(DENSE_FLOATS_MAX, capacity)),
        rival=f(capacity), rival_history=f(length), ranked=np.zeros(b, np.bool_),
        skip=np.zeros(capacity, np.uint8), bias_j=f(capacity), popularity=f(kernels.POPULARITIES, capacity),
    )  # fmt: skip


def _filled(some: Sequence[T]) -> tuple[T, ...]:
    """MESSAGES_MAX of them, for the kernel is compiled for that many."""
    return (*some, *(some[0] for _ in range(MESSAGES_MAX - len(some))))


def _new_outcomes(examples_max: int) -> kernels.Outcomes:
    def f(*shape: int) -> Array:
        return np.zeros(shape, np.float64)

    b, h = examples_max, kernels.POPULARITIES
    return kernels.Outcomes(
        candidates=np.zeros(b, np.int32), rank=f(b), popularity_rank=f(b, h), knn_rank=f(b), probability=f(b),
        log_loss=f(b), raw_log_loss=f(b), popularity_log_loss=f(b, h), listed=f(b, kernels.LISTED),
        place=np.zeros(b, np.int32),
    )  # fmt: skip


@cache
def _unranked(n: int) -> Outcome:
    """That of every message of n examples of which none was ranked."""

    def nan(*shape: int) -> Array:
        return np.broadcast_to(np.float32(np.nan), shape)

    return Outcome(
        rank=nan(n), candidates=np.broadcast_to(np.int32(0), n), probability=nan(n), log_loss=nan(n), auc=nan(n),
        pop_rank=nan(n, kernels.POPULARITIES), knn_rank=nan(n), raw_log_loss=nan(n),
        pop_log_loss=nan(n, kernels.POPULARITIES), listed=nan(n, kernels.LISTED),
        place=np.broadcast_to(np.int32(-1), n),
    )  # fmt: skip


def warm_up(config: LearnerConfig | None = None) -> None:
    """Compiles (or takes from the cache) every kernel of the learner, so that no partition waits for it."""
    learner = Learner(config)
    size = learner.config.text_dim
    for key in (1, 2, 3):
        vector = np.zeros(size, np.float32)
        vector[key % size] = 1
        learner.enter(key, str(key), "", vector, None if key < 3 else 1.0)
    examples = new_examples(learner.config, 1)
    examples.item[:2], examples.label[:2], examples.ts[:2] = (1, 2), 1, (1.0, 2.0)
    examples.history_count[1], examples.history_item[1, 0], examples.ranked[:2] = 1, 1, True
    learner.learn(examples._replace(count=2), 0)
    replica = ItemMatrix(learner.config.dim, size, learner.config.neighbours_max)
    replica.apply(learner.take_dirty().items())
    replica.indices(np.array([1, 2]))
