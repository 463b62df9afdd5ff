"""The adapter is the metric of the texts: in the learner, in replicas, in rankings and in their explanations."""

from dataclasses import replace

import numpy as np
import pytest

from model import kernels
from model.adapter import RANK_MAX, Adapter, AdapterError
from model.items import ItemMatrix
from model.learner import Learner
from model.profile import User
from model.ranker import Ranker
from tests.model_stream import ITEMS, SMALL, START_TS, enter_all, stream, vector_of

DIM = SMALL.text_dim


def adapter_of(seed: int, size: float = 1.0, scale: float = 1.3) -> Adapter:
    left, right = np.random.default_rng(seed).standard_normal((2, DIM, 3)).astype(np.float32) * size / DIM**0.5
    return Adapter("encoder:1", left, right, scale)


def test_metric_is_the_inner_product_of_mapped_vectors() -> None:
    adapter = adapter_of(1)
    x, e = np.random.default_rng(2).standard_normal((2, 5, DIM)).astype(np.float32)
    mapped = adapter.apply(x) @ adapter.apply(e).T
    assert np.allclose(x @ adapter.metric() @ e.T, mapped, atol=1e-4)
    decays = np.array([1, 0.9, 0.81, 0.7, 0.6], np.float32)
    assert np.allclose(adapter.apply((decays @ x)[None])[0], decays @ adapter.apply(x), atol=1e-4)


def test_pack_round_trip_and_refusals() -> None:
    adapter = adapter_of(3)
    again = Adapter.unpack(adapter.pack())
    assert again.pack() == adapter.pack() and again.name == adapter.name != adapter_of(4).name
    with pytest.raises(AdapterError, match="does not fit"):
        Adapter.unpack(adapter.pack()[:-1])
    with pytest.raises(AdapterError, match="version 9"):
        Adapter.unpack(b"\x09" + adapter.pack()[1:])
    with pytest.raises(AdapterError, match="finite"):
        replace(adapter, left=adapter.left * np.float32(np.nan))
    with pytest.raises(AdapterError, match=str(RANK_MAX)):
        Adapter("e", np.zeros((DIM, RANK_MAX + 1), np.float32), np.zeros((DIM, RANK_MAX + 1), np.float32))
    with pytest.raises(AdapterError, match="dimensions"):
        ItemMatrix(8, DIM + 1, 6).adapt(adapter)


def test_learning_through_an_adapter_is_learning_from_mapped_vectors() -> None:
    """With phi and y started at zero, and no map to the texts as they are, the two differ by rounding alone."""
    config, adapter = replace(SMALL, start=0.0, lr_map=0.0), adapter_of(5)
    through, mapped = Learner(config), Learner(config)
    through.adapt(adapter)
    enter_all(through)
    for item in range(1, ITEMS + 1):
        ts = None if item <= ITEMS - 10 else START_TS + 40.0 * (item - (ITEMS - 10))
        mapped.enter(item, f"item-{item}", "", adapter.apply(vector_of(item, DIM)[None])[0], ts)
    for position, x in enumerate(stream(config, 30)):
        one = through.learn(x, position)
        y = x._replace(text=adapter.apply(x.text))
        other = mapped.learn(y, position)
        both = (one.candidates > 0) & (other.candidates > 0)
        assert (one.candidates == other.candidates).all()
        assert np.allclose(one.probability[both], other.probability[both], rtol=0.1, atol=2e-3)
    assert np.allclose(through.matrix.arrays.theta, mapped.matrix.arrays.theta, atol=0.02)


def test_rows_carry_the_adapter_and_its_end() -> None:
    learner = Learner(SMALL)
    enter_all(learner)
    for position, x in enumerate(stream(SMALL, 6)):
        learner.learn(x, position)
    replica = ItemMatrix(SMALL.dim, SMALL.text_dim, SMALL.neighbours_max)
    replica.apply(learner.take_dirty().items())
    plain = learner.digest()
    learner.adapt(adapter_of(6))
    assert learner.digest() != plain
    replica.apply(learner.take_dirty().items())
    assert replica.digest() == learner.digest()
    again = Learner(SMALL)
    again.load(learner.matrix.rows())
    for position, x in enumerate(stream(SMALL, 3, seed=1), 6):
        learner.learn(x, position)
        again.learn(x, position)
    assert again.digest() == learner.digest()
    learner.adapt(None)
    changed = learner.take_dirty()
    assert changed[b"a"] is None
    replica.apply(changed.items())
    assert replica.digest() == learner.digest() and replica.adapter is None
    assert b"a" not in learner.take_dirty()


def test_explanations_add_up_through_an_adapter() -> None:
    learner = Learner(SMALL)
    enter_all(learner)
    for position, x in enumerate(stream(SMALL, 20)):
        learner.learn(x, position)
    comments = np.stack([vector_of(101, DIM), vector_of(102, DIM)])
    weights = np.array([1, 0.9], np.float32)
    user = User(
        np.array([3, 7, 11]), np.array([START_TS + 90, START_TS + 80, START_TS]), np.ones(3, np.float32),
        (weights @ comments) / weights.sum(), float(weights.sum()), comments, weights,
    )  # fmt: skip
    ranker = Ranker(learner.matrix)
    before = ranker.rank(user, START_TS + 100).top(5)
    learner.adapt(adapter_of(7, size=2.0))
    ranking = ranker.rank(user, START_TS + 100)
    after = ranking.top(5)
    assert [x.logit for x in before] != [x.logit for x in after]
    for item, told in zip(after, ranking.explain(after), strict=True):
        assert abs(told.rest) < 1e-4
        parts = told.bias.total + sum(t.total for t in told.terms) + sum(told.comments) + told.rest
        assert parts == pytest.approx(item.logit, abs=1e-4)


def test_the_problem_of_a_message_is_its_scores_without_texts() -> None:
    """offset + <words, M e> is the score that the learner gave, whatever the adapter."""
    for adapter in (None, adapter_of(8)):
        learner = Learner(SMALL)
        enter_all(learner)
        learner.adapt(adapter)
        told = 0
        for position, x in enumerate(stream(SMALL, 12)):
            learner.learn(x, position)
            problem = learner.problem()
            if problem is None:
                continue
            told += len(problem.words)
            n, k = len(problem.words), len(problem.candidate)
            assert problem.offset.shape == (n, k) and k <= SMALL.negatives
            m = learner.matrix.arrays
            scores = problem.offset + kernels.adapted(m.metric, problem.words) @ m.e[problem.candidate].T
            logits = learner._work.logit[
                np.flatnonzero(learner._work.go[: x.count] & learner._work.words[: x.count].any(1))
            ]
            open_ = logits[:, :k] > -1e29
            assert np.allclose(scores[open_], logits[:, :k][open_], atol=1e-3)
            assert not open_[np.arange(n)[:, None], np.arange(k)][problem.candidate == problem.target[:, None]].any()
        assert told > 20
