"""The learner against slow float64 equations, and as a state machine: same log, same bytes."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import kernels
from model.examples import Examples, new_examples
from model.items import ItemMatrix, row_key
from model.kernels import (
    COEFFICIENTS,
    FEATURES,
    T_AGE,
    T_AGE_K,
    T_FEATURE,
    T_GAP,
    T_GAP_K,
    T_LENGTH,
    T_NEIGHBOUR,
    T_SINCE,
    T_TEXT,
)
from model.learner import Learner, LearnerConfig, Outcome, warm_up
from tests.model_stream import ITEMS, SMALL, START_TS, enter_all, stream, vector_of

Array = npt.NDArray[Any]


def trained(messages: int, config: LearnerConfig = SMALL, seed: int = 0) -> Learner:
    learner = Learner(config)
    enter_all(learner)
    for position, x in enumerate(stream(config, messages, seed)):
        learner.learn(x, position)
    return learner


def one(item: int, ts: float, history: tuple[int, ...] = (), *, label: int = 1, ranked: bool = False) -> Examples:
    """A message of one example."""
    x = new_examples(SMALL, 64)
    x.item[0], x.ts[0], x.label[0], x.ranked[0] = item, ts, label, ranked
    x.history_count[0] = len(history)
    x.history_item[0, : len(history)] = history
    x.history_ts[0, : len(history)] = ts - 10
    x.history_weight[0, : len(history)] = 1
    return x._replace(count=1)


def ask_all(messages: int, config: LearnerConfig) -> Iterator[Examples]:
    for x in stream(config, messages):
        x.ranked[:] = True
        yield x


# --- the equations, slowly ---


class Reference:
    """One message in float64, as the formulation says it, over dictionaries and plain loops."""

    def __init__(self, learner: Learner) -> None:
        m = learner.matrix.arrays
        self.config, self.rows = learner.config, len(learner.matrix)
        self.theta = m.theta.astype(np.float64)
        self.phi, self.y, self.e = (part[: self.rows].astype(np.float64) for part in (m.phi, m.y, m.e))
        self.mu, self.map, self.project = (part.astype(np.float64) for part in (m.mu, m.map, m.project))
        self.context = m.context.astype(np.float64)
        self.rec = {name: m.rec[name][: self.rows].astype(np.float64) for name in kernels.RECORD.names or ()}
        self.counts = [
            dict(zip(m.neighbour[k, : m.length[k]].tolist(), m.weight[k, : m.length[k]].tolist(), strict=True))
            for k in range(self.rows)
        ]
        self.step, self.first_ts = m.scalar[kernels.STEP], m.scalar[kernels.FIRST_TS]

    def features(self, j: int, ts: float) -> Array:
        r = {name: values[j] for name, values in self.rec.items()}
        new = r["last_step"] < 0
        since = self.step - (r["entered_step"] if new else r["last_step"])
        entered = max(r["entered_ts"], math.floor(self.first_ts))
        quiet = max(0.0, math.floor(ts) - (entered if new else r["last_ts"]))
        recent, silence = 0.3 * math.log1p(since), 0.15 * math.log1p(quiet)
        return np.array(
            [
                *(math.log1p(r[f"count_{h}"] * 2 ** (-since / h)) for h in (10, 100, 1000)),
                math.log1p(r["count"]),
                0.3 * math.log1p(self.step - r["entered_step"]),
                recent,
                float(new),
                0.15 * math.log1p(max(0.0, math.floor(ts) - entered)),
                silence,
                0.4 * recent**2,
                0.4 * silence**2,
            ]
        )

    def coefficients(self, x: Examples, b: int, theta: Array) -> tuple[Array, Array]:
        """wt and ck with theta free, but the norms n and nK at self.theta (they are constants of the gradient)."""
        q = x.history_count[b]
        age = [int(kernels.age_bucket(a)) for a in range(q)]
        gap = [int(kernels.gap_bucket(x.ts[b] - at)) for at in x.history_ts[b, :q]]
        tw = x.history_weight[b, :q].astype(np.float64)

        def weights(t: Array, first: int, second: int) -> Array:
            return np.array([t[first + a] * t[second + g] for a, g in zip(age, gap, strict=True)]) * tw

        near = min(q, self.config.cooccurrence_history)
        n = (np.abs(weights(self.theta, T_AGE, T_GAP)).sum() + 1e-6) ** -0.5
        n_k = (weights(self.theta, T_AGE_K, T_GAP_K)[:near].sum() + 1e-6) ** -0.25
        return weights(theta, T_AGE, T_GAP) * n, weights(theta, T_AGE_K, T_GAP_K)[:near] * n_k

    def texts(self, x: Examples, b: int, rows: list[int]) -> list[Array]:
        out = []
        for g in kernels.TEXT_DECAYS:
            w = np.array([g**q * x.history_weight[b, q] for q in range(len(rows))][: kernels.TEXT_HISTORY])
            mean = (w[:, None] * self.e[rows[: len(w)]]).sum(0) / w.sum() if len(w) else self.mu
            out.append((mean - self.mu) * math.sqrt(min(w.sum(), 4.0)) if len(w) else np.zeros_like(self.mu))
        own = (x.text[b] - self.mu) * math.sqrt(min(x.text_weight[b], 4.0)) if x.text_on[b] else 0 * self.mu
        return [*out, own]

    def loss(
        self, x: Examples, rows_of: Any, candidates: list[int], active: int, theta: Array, phi: Array, y: Array,
        text_map: Array, context: Array,
    ) -> float:  # fmt: skip
        """Softmax cross-entropy of one message of one example."""
        newest = 1 + int(kernels.gap_bucket(x.ts[0] - x.history_ts[0, 0]))
        length = int(x.history_count[0]).bit_length()
        firsts = (0, T_SINCE + newest * COEFFICIENTS, T_LENGTH + length * COEFFICIENTS)
        own = np.sum([theta[at : at + COEFFICIENTS] for at in firsts], axis=0)
        target, history = rows_of(x.item[0]), [rows_of(key) for key in x.history_item[0, : x.history_count[0]]]
        wt, ck = self.coefficients(x, 0, theta)
        x_u = context[newest] + context[kernels.SINCES + length]
        z = sum((w * y[k] for w, k in zip(wt, history, strict=True)), x_u)
        texts = self.texts(x, 0, history)
        scale = math.sqrt(self.config.text_dim / self.config.dim)
        unit = np.concatenate([z, *(scale * self.project @ vector for vector in texts), [1.0]])
        text = sum(own[T_TEXT + h] * vector for h, vector in enumerate(texts)) + unit @ text_map

        def score(j: int) -> float:
            s = self.rec["beta"][j] + own[T_FEATURE : T_FEATURE + FEATURES] @ self.features(j, x.ts[0])
            s += z @ phi[j] + text @ self.e[j]
            for c, k in zip(ck, history, strict=False):
                pair = math.sqrt(self.counts[k].get(j, 0.0))
                pair /= ((self.rec["evidence"][k] + 1) * (self.rec["evidence"][j] + 1)) ** 0.2
                s += own[T_NEIGHBOUR] * c * pair
            return float(s)

        target_score = score(target)
        others = [score(j) for j in candidates if j != target and j not in history]
        mass = math.exp(target_score) + active / len(candidates) * sum(math.exp(s) for s in others)
        return -target_score + math.log(mass)


def test_one_message_makes_the_steps_of_the_equations() -> None:
    config = replace(SMALL, negatives=1000, y_history=SMALL.history_max)
    learner = trained(30, config, seed=3)
    before = Reference(learner)
    x = one(7, START_TS + 1e5, (3, 12, 8, 25, 1, 9, 30))
    x.text_on[0], x.text[0], x.text_weight[0] = True, vector_of(99, 12), 2.5
    m = learner.matrix.arrays
    candidates = [row for row in range(before.rows) if learner.matrix.is_active(row)]
    names = ("phi", "y", "theta", "square", "map", "map_square", "gain", "course", "context", "context_square")
    old = {name: getattr(m, name).copy() for name in names}
    old_rec = m.rec.copy()

    def slope(variable: str, at: tuple[int, ...], h: float = 1e-5) -> float:
        values = []
        for sign in (1, -1):
            parts = {name: getattr(before, name).copy() for name in ("theta", "phi", "y", "map", "context")}
            parts[variable][at] += sign * h
            values.append(before.loss(x, learner.matrix.index, candidates, len(candidates), *parts.values()))
        return -(values[0] - values[1]) / (2 * h)

    loss = before.loss(
        x, learner.matrix.index, candidates, len(candidates),
        before.theta, before.phi, before.y, before.map, before.context,
    )  # fmt: skip
    sum_before = m.scalar[kernels.LOSS]
    learner.learn(x, 30)
    assert m.scalar[kernels.LOSS] - sum_before == pytest.approx(loss, abs=2e-4)
    for q in range(kernels.THETA):
        d = slope("theta", (q,))
        rate = config.lr_decay if T_AGE <= q < T_SINCE else config.lr_setting
        if q < T_AGE:
            agrees = d * old["course"][q]
            gain = old["gain"][q] + 0.1 if agrees > 0 else 0.8 * old["gain"][q] if agrees < 0 else old["gain"][q]
            assert m.gain[q] == pytest.approx(min(16, max(0.25, gain)))
            rate = config.lr_scale * m.gain[q]
        expected = old["theta"][q] + (rate * d / math.sqrt(old["square"][q] + d * d) if abs(d) > 1e-9 else 0)
        assert m.theta[q] == pytest.approx(max(0.0, expected) if T_AGE <= q < T_SINCE else expected, abs=2e-4), q
    for name, square, rate in (("phi", "square_phi", config.lr_phi), ("y", "square_y", config.lr_y)):
        for item in (7, 3, 12, 8, 30, 20, 33):
            row = learner.matrix.index(item)
            d_row = np.array([slope(name, (row, a)) for a in range(config.dim)])
            size = math.sqrt(old_rec[square][row] + float((d_row**2).mean()))
            np.testing.assert_allclose(getattr(m, name)[row], old[name][row] + rate * d_row / size, atol=2e-4)
    for u in (0, 5, 9, 17, 31, 32):
        d_row = np.array([slope("map", (u, a)) for a in range(config.text_dim)])
        size = math.sqrt(old["map_square"][u] + float((d_row**2).mean()))
        np.testing.assert_allclose(m.map[u], old["map"][u] + config.lr_map * d_row / size, atol=2e-4)
    for c in range(kernels.CONTEXTS):
        d_row = np.array([slope("context", (c, a)) for a in range(config.dim)])
        size = math.sqrt(old["context_square"][c] + float((d_row**2).mean()))
        np.testing.assert_allclose(m.context[c], old["context"][c] + config.lr_context * d_row / size, atol=2e-4)


def test_counters_and_cooccurrence_follow_every_event() -> None:
    learner = Learner(SMALL)
    enter_all(learner, 6, late=0)
    learner.learn(one(1, START_TS, (2, 3)), 0)
    learner.learn(one(1, START_TS + 5, (2,), label=0), 1)
    m = learner.matrix.arrays
    a, b, c = (learner.matrix.index(key) for key in (1, 2, 3))
    assert dict(zip(m.neighbour[a, :2].tolist(), m.weight[a, :2].tolist(), strict=True)) == pytest.approx(
        {b: 2 * SMALL.backward, c: 0.9 * SMALL.backward}
    )
    assert m.weight[b, 0] == pytest.approx(2)
    assert m.rec[a]["evidence"] == 1.5
    assert m.rec[a]["count"] == 1
    assert m.rec[a]["last_ts"] == START_TS
    assert m.scalar[kernels.STEP] == 1


def test_what_came_in_one_act_counts_double_as_neighbours() -> None:
    learner = Learner(SMALL)
    enter_all(learner, 6, late=0)
    x = one(1, START_TS, (2, 3))
    x.history_ts[0, 0] = START_TS  # of the same second; item 3 ten seconds before
    learner.learn(x, 0)
    m = learner.matrix.arrays
    a, b, c = (learner.matrix.index(key) for key in (1, 2, 3))
    assert (m.weight[b, 0], m.weight[c, 0]) == pytest.approx((2, 0.9))
    assert dict(zip(m.neighbour[a, :2].tolist(), m.weight[a, :2].tolist(), strict=True)) == pytest.approx(
        {b: 2 * SMALL.backward, c: 0.9 * SMALL.backward}
    )


def test_a_full_neighbour_row_evicts_its_lowest_count() -> None:
    learner = Learner(SMALL)
    enter_all(learner, 12, late=0)
    for key in range(2, 2 + SMALL.neighbours_max):
        for _ in range(key):
            learner.learn(one(key, START_TS, (1,)), key)
    learner.learn(one(11, START_TS, (1,)), 99)
    m, row = learner.matrix.arrays, learner.matrix.index(1)
    kept = dict(zip((m.neighbour[row] + 1).tolist(), m.weight[row].tolist(), strict=True))
    assert kept == {3: 3.0, 4: 4.0, 5: 5.0, 6: 6.0, 7: 7.0, 11: 1.0}


def test_a_low_rating_moves_no_vector() -> None:
    learner = trained(5)
    learner.learn(one(3, START_TS + 1e5), 5)  # every late item has entered
    m = learner.matrix.arrays
    before = m.phi.tobytes(), m.y.tobytes(), m.theta.tobytes(), m.map.tobytes()
    learner.learn(one(3, START_TS + 1e5, (4, 5), label=0), 6)
    assert (m.phi.tobytes(), m.y.tobytes(), m.theta.tobytes(), m.map.tobytes()) == before


# --- the state machine ---


def test_the_same_log_gives_the_same_bytes() -> None:
    assert trained(40).digest() == trained(40).digest()
    assert trained(40).digest() != trained(40, replace(SMALL, seed=8)).digest()


@settings(max_examples=12)
@given(cut=st.integers(0, 30), takes=st.sets(st.integers(0, 30)), seed=st.integers(0, 3))
def test_saved_and_loaded_anywhere_it_goes_on_with_the_same_bytes(cut: int, takes: set[int], seed: int) -> None:
    messages = list(stream(SMALL, 31, seed))
    straight = Learner(SMALL)
    enter_all(straight)
    learner = Learner(SMALL)
    enter_all(learner)
    store: dict[bytes, bytes] = {}
    outcomes: list[tuple[Outcome, Outcome]] = []

    def flush() -> None:
        for key, value in learner.take_dirty().items():
            if value is None:
                store.pop(key, None)
            else:
                store[key] = value

    for position, x in enumerate(messages):
        if position in takes:
            flush()
        if position == cut:
            flush()
            assert store == dict(learner.matrix.rows())
            learner = Learner(SMALL)
            learner.load(iter(store.items()))
        outcomes.append((straight.learn(x, position), learner.learn(x, position)))
    assert learner.digest() == straight.digest()
    for a, b in outcomes:
        np.testing.assert_array_equal(a.rank, b.rank)
    flush()
    replica = ItemMatrix(SMALL.dim, SMALL.text_dim, SMALL.neighbours_max)
    replica.apply(store.items())
    assert replica.digest() == straight.digest()


@pytest.mark.parametrize("sizes", [(1, 2, 3), (8, 40), (5, 13, 9)])
def test_many_messages_at_once_are_learnt_as_one_after_another(sizes: tuple[int, ...]) -> None:
    messages = [x._replace(**{n: v.copy() for n, v in x._asdict().items() if n != "count"}) for x in ask_all(48, SMALL)]
    one_by_one, at_once = Learner(SMALL), Learner(SMALL)
    enter_all(one_by_one)
    enter_all(at_once)
    outcomes = [one_by_one.learn(x, position) for position, x in enumerate(messages)]
    told: list[Outcome] = []
    while len(told) < len(messages):
        part = range(len(told), min(len(messages), len(told) + sizes[len(told) % len(sizes)]))
        told += at_once.learn_many([messages[n] for n in part], list(part))
    assert at_once.digest() == one_by_one.digest()
    assert any(outcome.candidates.any() for outcome in outcomes)
    for mine, theirs in zip(told, outcomes, strict=True):
        np.testing.assert_array_equal(mine.rank, theirs.rank)
        np.testing.assert_array_equal(mine.log_loss, theirs.log_loss)


def test_growth_keeps_every_byte() -> None:
    small, large = Learner(SMALL), Learner(SMALL)
    large.matrix.reserve(5000)
    for learner in (small, large):
        enter_all(learner, 1500, late=0)
        for position, x in enumerate(stream(SMALL, 20, items=1500)):
            learner.learn(x, position)
    assert small.digest() == large.digest()


def test_dirty_bytes_are_those_of_the_rows_taken() -> None:
    learner = trained(20)
    expected = learner.dirty_bytes
    taken = learner.take_dirty()
    assert expected == sum(len(value or b"") for key, value in taken.items() if key[:1] in b"dn")
    assert learner.dirty_bytes == 0
    assert {key[:1] for key in taken} == {b"s", b"d", b"n", b"p", b"m", b"g"}
    assert list(learner.take_dirty()) == [b"g"]


# --- entering and leaving ---


def test_an_item_is_a_candidate_only_for_events_strictly_later_than_its_ts() -> None:
    learner = Learner(SMALL)
    enter_all(learner, 5, late=0)
    learner.enter(9, "late", "", vector_of(9, 12), START_TS + 100)
    counts = [learner.learn(one(1, START_TS + at, ranked=True), int(at)).candidates[0] for at in (0.0, 100.0, 100.5)]
    assert counts == [5, 5, 6]
    assert learner.matrix.names[learner.matrix.index(9)] == "late"
    assert not learner.pending


def test_an_item_is_a_candidate_once_time_has_passed_its_ts_without_an_event() -> None:
    learner = Learner(SMALL)
    enter_all(learner, 5, late=0)
    learner.learn(one(1, START_TS), 0)
    for key, ts in ((9, START_TS + 100), (8, START_TS + 50), (7, START_TS + 200)):
        learner.enter(key, str(key), "", vector_of(key, 12), ts)
    learner.enter(8, "8 anew", "", vector_of(8, 12), START_TS + 60)
    assert learner.pending_ts == START_TS + 60
    learner.take_dirty()
    learner.pass_time(START_TS + 100)  # not strictly later than 9's
    assert learner.matrix.names[5:] == ["8 anew"]
    learner.pass_time(START_TS + 101)
    learner.pass_time(START_TS + 30)  # time does not go back
    assert learner.matrix.names[5:] == ["8 anew", "9"] and learner.matrix.clock == START_TS + 101
    assert learner.pending_ts == START_TS + 200
    copy = Learner(SMALL)
    copy.load(learner.matrix.rows())
    assert copy.digest() == learner.digest()
    assert learner.learn(one(1, START_TS + 102, ranked=True), 1).candidates[0] == 7
    learner.pass_time(START_TS + 300)
    assert learner.matrix.names[5:] == ["8 anew", "9", "7"] and learner.pending_ts == math.inf


def test_passed_time_starts_an_item_as_an_event_does() -> None:
    by_time, by_event = Learner(SMALL), Learner(SMALL)
    for learner in (by_time, by_event):
        enter_all(learner, 5, late=0)
        learner.enter(9, "late", "its text", vector_of(9, 12), START_TS + 100)
    by_event.learn(one(1, START_TS + 101, label=0), 0)  # a low rating: nothing is a negative of it
    by_time.pass_time(START_TS + 101)
    rows = [dict(learner.matrix.rows()) for learner in (by_time, by_event)]
    for kind in (b"s", b"d"):
        assert rows[0][row_key(kind, 9)] == rows[1][row_key(kind, 9)]


def test_rows_are_numbered_in_the_order_of_activation() -> None:
    learner = Learner(SMALL)
    for key, ts in ((5, 300.0), (6, 100.0), (7, None), (8, 200.0), (9, 100.0)):
        learner.enter(key, str(key), "", vector_of(key, 12), ts)
    learner.learn(one(7, 250.0), 0)
    learner.learn(one(7, 400.0), 1)
    assert learner.matrix.names == ["7", "6", "9", "8", "5"]


def test_the_event_that_creates_its_item_is_learnt_and_not_scored() -> None:
    learner = Learner(SMALL)
    enter_all(learner, 5, late=0)
    learner.enter(9, "new", "", vector_of(9, 12), START_TS + 10)
    outcome = learner.learn(one(9, START_TS + 10, (1,), ranked=True), 0)
    row = learner.matrix.index(9)
    m = learner.matrix.arrays
    assert np.isnan(outcome.rank[0])
    assert m.rec[row]["count"] == 1
    assert m.length[row] == 1
    assert learner.matrix.is_active(row)
    assert np.linalg.norm(m.phi[row]) == pytest.approx(SMALL.start * math.sqrt(SMALL.dim), rel=1e-3)
    assert learner.learn(one(9, START_TS + 10, ranked=True), 1).candidates[0] == 6


def test_an_unknown_item_gets_a_stub_that_a_later_entry_completes() -> None:
    learner = Learner(SMALL)
    enter_all(learner, 5, late=0)
    learner.learn(one(77, START_TS, (78, 1)), 0)
    stub = learner.matrix.index(77)
    assert learner.matrix.names[stub] == ""
    assert not learner.matrix.is_active(stub)
    assert learner.learn(one(1, START_TS + 1, ranked=True), 1).candidates[0] == 5
    learner.enter(77, "found", "its text", vector_of(77, 12), START_TS - 5)
    assert learner.matrix.index(77) == stub
    assert learner.matrix.is_active(stub)
    assert learner.matrix.arrays.rec[stub]["count"] == 1
    assert learner.learn(one(1, START_TS + 2, ranked=True), 2).candidates[0] == 6


def test_a_withdrawn_item_is_neither_candidate_nor_negative() -> None:
    learner = trained(10)
    row = learner.matrix.index(5)
    active = learner.matrix.active_count
    learner.withdraw(5)
    phi = learner.matrix.arrays.phi[row].tobytes()
    for position, x in enumerate(stream(SMALL, 10, seed=5)):
        x.item[x.item == 5] = 6
        learner.learn(x, 100 + position)
    assert learner.matrix.arrays.phi[row].tobytes() == phi
    outcome = learner.learn(one(5, START_TS + 1e6, ranked=True), 200)
    assert np.isnan(outcome.rank[0])
    assert learner.learn(one(6, START_TS + 1e6, ranked=True), 201).candidates[0] == ITEMS - 1
    learner.enter(5, "item-5", "", vector_of(5, 12), None)
    assert learner.matrix.is_active(row)
    assert learner.matrix.arrays.phi[row].tobytes() == phi
    assert learner.matrix.active_count >= active


def test_a_pending_item_may_be_withdrawn_or_entered_again() -> None:
    learner = Learner(SMALL)
    enter_all(learner, 3, late=0)
    learner.enter(8, "a", "", vector_of(8, 12), 100.0)
    learner.enter(9, "b", "", vector_of(9, 12), 100.0)
    learner.take_dirty()
    learner.enter(8, "a2", "", vector_of(8, 12), 500.0)
    learner.withdraw(9)
    taken = learner.take_dirty()
    assert sorted(value is None for key, value in taken.items() if key[:1] == b"p") == [False, True]
    learner.learn(one(1, 300.0), 0)
    assert learner.matrix.index(8) == learner.matrix.index(9) == -1
    learner.learn(one(1, 600.0), 1)
    assert learner.matrix.names[learner.matrix.index(8)] == "a2"


def test_new_text_replaces_the_vector_and_keeps_what_was_learnt() -> None:
    learner = trained(10)
    m, row = learner.matrix.arrays, learner.matrix.index(3)
    phi = m.phi[row].tobytes()
    learner.enter(3, "item-3", "rewritten", vector_of(1003, 12), None)
    assert learner.matrix.texts[row] == "rewritten"
    assert m.phi[row].tobytes() == phi
    active = np.flatnonzero(m.flags[: len(learner.matrix)] & kernels.VECTOR)
    np.testing.assert_allclose(m.mu, m.e[active].mean(0), atol=1e-5)


def test_mu_is_the_mean_of_the_items_that_have_a_vector() -> None:
    learner = trained(20)
    learner.enter(500, "bare", "", np.zeros(12, np.float32), None)
    learner.withdraw(2)
    learner.enter(2, "item-2", "", vector_of(2002, 12), None)
    m = learner.matrix.arrays
    with_vector = np.flatnonzero(m.flags[: len(learner.matrix)] & kernels.VECTOR)
    np.testing.assert_allclose(m.mu, m.e[with_vector].mean(0), atol=1e-5)
    assert not m.phi[learner.matrix.index(500)].any()


# --- ranking in full ---


def test_ranks_are_mid_ranks_among_the_candidates_the_user_has_not_had() -> None:
    learner = Learner(SMALL)
    for key in range(1, 7):
        learner.enter(key, str(key), "", np.zeros(12, np.float32), None)
    x = one(1, START_TS, (2,), ranked=True)
    x.seen[0], x.seen_start[1] = 3, 1
    outcome = learner.learn(x, 0)
    assert outcome.candidates[0] == 4
    assert outcome.rank[0] == 2.5  # nothing tells the four apart
    assert outcome.auc[0] == pytest.approx(0.5)
    assert outcome.probability[0] == pytest.approx(0.25, rel=1e-5)
    assert outcome.log_loss[0] == pytest.approx(-math.log(0.25) - 3 * math.log(0.75), rel=1e-3)
    assert outcome.pop_rank[0].tolist() == [2.5] * 4
    again = learner.learn(one(1, START_TS + 5, ranked=True), 1)
    assert again.pop_rank[0].tolist() == [1.0] * 4


def test_it_learns_what_the_users_like() -> None:
    learner = Learner(SMALL)
    enter_all(learner, 400, late=0)
    ranks = [learner.learn(x, position) for position, x in enumerate(stream(SMALL, 200, items=400))]
    late = np.concatenate([outcome.auc for outcome in ranks[100:]])
    assert np.nanmean(late) > 0.6


def test_the_message_must_fit() -> None:
    learner = Learner(SMALL)
    with pytest.raises(ValueError, match="at most 8"):
        learner.learn(new_examples(replace(SMALL, message_examples_max=9))._replace(count=9), 0)
    with pytest.raises(ValueError, match="vector of shape"):
        learner.enter(1, "a", "", np.zeros(3, np.float32), None)
    with pytest.raises(ValueError, match="must not exceed"):
        LearnerConfig(history_max=3)
    with pytest.raises(ValueError, match="stay under"):
        LearnerConfig(negatives=40_000)


def test_an_empty_message_changes_nothing() -> None:
    learner = trained(3)
    before = learner.digest()
    assert len(learner.learn(new_examples(SMALL), 3).rank) == 0
    assert learner.digest() == before


def test_warm_up_leaves_nothing_to_compile() -> None:
    warm_up(SMALL)
    compiled = [len(kernel.signatures) for kernel in (kernels.learn_messages, kernels.find_examples, kernels.mark)]
    trained(5)
    assert [
        len(kernel.signatures) for kernel in (kernels.learn_messages, kernels.find_examples, kernels.mark)
    ] == compiled


# --- the live race ---


def test_item_knn_ranks_by_the_learners_own_counts() -> None:
    learner = trained(40)
    m, rows = learner.matrix.arrays, len(learner.matrix)
    history = (3, 8, 21)
    near: dict[int, float] = {}
    index = {int(m.key[row]): row for row in range(rows)}
    for q, k in enumerate(index[key] for key in history):
        counts = dict(zip(m.neighbour[k, : m.length[k]].tolist(), m.weight[k, : m.length[k]].tolist(), strict=True))
        for j, count in counts.items():
            damping = ((m.rec["evidence"][k] + 1) * (m.rec["evidence"][j] + 1)) ** -0.2
            near[j] = near.get(j, 0.0) + kernels.KNN_DECAY**q * math.sqrt(count) * damping
    since = m.scalar[kernels.STEP] - m.rec["last_step"][:rows]
    prior = kernels.KNN_PRIOR * m.rec["count_1000"][:rows] * np.exp2(-since / 1000)
    score = {j: near.get(j, 0.0) + prior[j] for j in range(rows) if learner.matrix.is_active(j)}
    best = sorted((j for j in score if m.key[j] not in history), key=score.__getitem__, reverse=True)
    outcome = learner.learn(one(int(m.key[best[4]]), START_TS + 1e5, history, ranked=True), 40)
    assert outcome.knn_rank[0] == 5
    assert outcome.candidates[0] == len(best)


def test_ranking_in_full_costs_what_it_may_and_no_more() -> None:
    config = replace(SMALL, rank_items=10)
    learner, again = Learner(config), Learner(config)
    enter_all(learner, late=0)
    enter_all(again, late=0)
    examples = scores = 0
    for position, x in enumerate(ask_all(150, config)):
        outcome = learner.learn(x, position)
        examples += x.count
        scores += ITEMS * int((outcome.candidates > 0).sum())
        other = again.learn(x, position)
        assert np.array_equal(outcome.candidates, other.candidates), "by the state alone, also by a restored one"
        if position == 70:
            saved, again = again.take_dirty(), Learner(config)
            again.load(saved.items())
    assert 0.3 * 10 * examples < scores <= 10 * examples + ITEMS, "scored in vain, for a user's own item, counts too"
    free = Learner(replace(SMALL, rank_items=0))
    enter_all(free, late=0)
    asked = [free.learn(x, position).candidates for position, x in enumerate(ask_all(20, config))]
    assert sum(int((candidates > 0).sum()) for candidates in asked) * ITEMS > 10 * 20 * 8


def test_ranking_more_changes_the_calibration_and_nothing_else_that_is_learnt() -> None:
    """So that a trainer may test more than the workers do."""
    config = replace(SMALL, rank_items=10)
    thrifty, lavish = Learner(config), Learner(replace(config, rank_items=0))
    tests = [0, 0]
    enter_all(thrifty, late=0)
    enter_all(lavish, late=0)
    for position, x in enumerate(ask_all(60, config)):
        for n, learner in enumerate((thrifty, lavish)):
            tests[n] += int((learner.learn(x, position).candidates > 0).sum())
    assert tests[1] > 2 * tests[0]
    for learner in (thrifty, lavish):
        learner.matrix.arrays.scalar[[kernels.RANK_CREDIT, kernels.SHARP, kernels.SHARP_SQUARE]] = 0
    assert thrifty.digest() == lavish.digest()
