"""Lists against brute force, and explanations that add up."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import kernels
from model.examples import new_examples
from model.learner import Learner
from model.profile import User, profile_of
from model.ranker import Ranker, warm_up
from tests.model_stream import ITEMS, SMALL, START_TS, enter_all, stream, vector_of

NOW = START_TS + 5e4
NEAR = SMALL.cooccurrence_history


@pytest.fixture(scope="module")
def learner() -> Learner:
    learner = Learner(SMALL)
    enter_all(learner)
    for position, x in enumerate(stream(SMALL, 60)):
        learner.learn(x, position)
    learner.withdraw(5)
    learner.enter(300, "bare", "", np.zeros(SMALL.text_dim, np.float32), None)
    return learner


def user_of(keys: list[int], comments: int = 2, older: bool = True) -> User:
    decays = np.float32(0.9) ** np.arange(comments, dtype=np.float32)
    vectors = np.stack([vector_of(70 + c, SMALL.text_dim) for c in range(comments)])
    total, mean = decays.sum(), decays @ vectors
    if older:
        total, mean = total + np.float32(2), mean + 2 * vector_of(90, SMALL.text_dim)
    return User(
        np.array(keys, np.int64),
        NOW - 40.0 * np.arange(len(keys)) ** 4,
        np.full(len(keys), 1, np.float32),
        mean / total,
        float(total),
        vectors,
        decays,
    )


def test_the_score_is_what_the_formulation_says(learner: Learner) -> None:
    m, user = learner.matrix.arrays, user_of([3, 8, 12, 20, 7, 9, 31])
    ranker = Ranker(learner.matrix, cooccurrence_history=NEAR)
    profile = profile_of(learner.matrix, user, NOW, NEAR)
    rows = [row for row in range(len(learner.matrix)) if learner.matrix.is_active(row)]
    sharp = m.scalar[kernels.SHARP]
    s = np.zeros(len(rows))
    for at, j in enumerate(rows):
        s[at] = kernels.bias_of(m, np.int32(j), NOW, profile.coefficient, np.zeros((kernels.FEATURES, 1), np.float32))
        s[at] += m.phi[j] @ profile.z + m.e[j] @ profile.v
        for k, c in zip(profile.row[:NEAR], profile.ck, strict=False):
            for r in range(m.length[k]):
                if m.neighbour[k, r] == j:
                    s[at] += (
                        profile.coefficient[kernels.T_NEIGHBOUR] * c * np.sqrt(m.weight[k, r]) * m.rec[j]["damping"]
                    )
    order = np.argsort(-s, kind="stable")
    p = np.exp(sharp * (s - s.max()))
    p /= p.sum()
    best = ranker.rank(user, NOW).top(10)
    assert [item.row for item in best] == [rows[at] for at in order[:10]]
    np.testing.assert_allclose([item.score for item in best], p[order[:10]], rtol=1e-3)
    np.testing.assert_allclose([item.logit for item in best], np.log(p / (1 - p))[order[:10]], atol=1e-3)


@settings(max_examples=40)
@given(
    keys=st.lists(st.integers(1, ITEMS), max_size=12),
    exclude=st.sets(st.integers(1, ITEMS + 5)),
    k=st.integers(1, 60),
)
def test_top_k_is_the_head_of_the_whole_ranking(learner: Learner, keys: list[int], exclude: set[int], k: int) -> None:
    ranker, user = Ranker(learner.matrix, cooccurrence_history=NEAR), user_of(keys)
    best = ranker.rank(user, NOW, sorted(exclude)).top(k)
    everything = ranker.rank(user, NOW, sorted(exclude)).of([*range(1, ITEMS + 1), 300, 999])
    assert best == everything[:k]
    open_ = {key for key in [*range(1, ITEMS + 1), 300] if key != 5} - exclude
    assert {item.key for item in everything} == open_
    assert sum(item.score for item in everything) == pytest.approx(1, abs=1e-3)


@settings(max_examples=40)
@given(keys=st.lists(st.integers(1, ITEMS + 3), max_size=10), older=st.booleans())
def test_bias_terms_and_rest_add_up_to_the_logit(learner: Learner, keys: list[int], older: bool) -> None:
    ranker, user = Ranker(learner.matrix, cooccurrence_history=NEAR), user_of(keys, older=older)
    items = [1, 2, 8, 300]
    ranking = ranker.rank(user, NOW)
    scored = ranking.of([*items, 5, 12345])
    assert sorted(item.key for item in scored) == items
    for item, reason in zip(scored, ranking.explain(scored), strict=True):
        total = reason.bias.total + sum(term.total for term in reason.terms) + sum(reason.comments) + reason.rest
        assert total == pytest.approx(item.logit, abs=1e-4)
        for term in reason.terms:
            assert term.learnt + term.cooccurrence + term.text == pytest.approx(term.total, abs=1e-5)
        if not older:
            assert abs(reason.rest) < 1e-4, "nothing but the events and comments made this score"


def test_a_term_is_what_the_score_loses_without_its_event_up_to_the_norms(learner: Learner) -> None:
    ranker, user = Ranker(learner.matrix, cooccurrence_history=NEAR), user_of([3, 8, 12])
    ranking = ranker.rank(user, NOW)
    (reason,) = ranking.explain(ranking.of([16]))
    m, profile = learner.matrix.arrays, profile_of(learner.matrix, user, NOW, NEAR)
    row, sharp = learner.matrix.index(16), m.scalar[kernels.SHARP]
    phi = m.phi[row] + m.map[: SMALL.dim] @ m.e[row]
    assert profile.context.any()
    assert reason.bias.context == pytest.approx(sharp * (profile.context @ phi), abs=1e-5)
    for q, term in enumerate(reason.terms):
        assert term.entry == q
        assert term.learnt == pytest.approx(sharp * profile.wt[q] * (m.y[profile.row[q]] @ phi), abs=1e-5)


def test_the_bias_is_taken_anew_when_the_state_or_the_clock_moves(learner: Learner) -> None:
    ranker, user = Ranker(learner.matrix, tick_s=10, cooccurrence_history=NEAR), User()
    first = ranker.rank(user, NOW).top(40)
    assert ranker.rank(user, NOW + 9).top(40) == first
    assert ranker.rank(user, NOW + 1e6).top(40) != first
    learner.enter(301, "another", "", vector_of(4, SMALL.text_dim), None)
    assert 301 in {item.key for item in ranker.rank(user, NOW + 1e6).top(60)}
    learner.withdraw(301)
    assert 301 not in {item.key for item in ranker.rank(user, NOW + 1e6).top(60)}


def test_the_ranker_ranks_as_the_learner_does() -> None:
    learner = Learner(SMALL)
    enter_all(learner, 40, late=0)
    for position, x in enumerate(stream(SMALL, 40)):
        learner.learn(x, position)
    now = START_TS + 1e4
    x = new_examples(SMALL, 64)
    x.item[0], x.label[0], x.ts[0], x.ranked[0] = 9, 1, now, True
    x.history_count[0] = 3
    x.history_item[0, :3], x.history_ts[0, :3], x.history_weight[0, :3] = (4, 8, 2), now - 100, 1
    user = User(x.history_item[0, :3].copy(), x.history_ts[0, :3].copy(), x.history_weight[0, :3].copy())
    ranked = Ranker(learner.matrix, cooccurrence_history=NEAR).rank(user, now, (4, 8, 2)).top(40)
    place = [item.key for item in ranked].index(9)
    outcome = learner.learn(x._replace(count=1), 100)
    assert outcome.candidates[0] == len(ranked)
    assert outcome.rank[0] == place + 1
    assert outcome.probability[0] == pytest.approx(ranked[place].score, rel=1e-3)


def test_the_most_similar_item_is_the_one_of_the_same_text() -> None:
    learner = Learner(SMALL)
    enter_all(learner)
    learner.enter(500, "twin", "", vector_of(8, SMALL.text_dim), None)
    learner.withdraw(7)
    similar = Ranker(learner.matrix).similar(learner.matrix.index(8), 5)
    keys = [int(learner.matrix.arrays.key[row]) for row, _ in similar]
    assert keys[0] == 500
    assert len(set(keys) - {7, 8}) == 5
    likeness = [like for _, like in similar]
    assert likeness[0] == pytest.approx(2, abs=0.05)
    assert likeness == sorted(likeness, reverse=True)


def test_an_empty_catalogue_gives_an_empty_list() -> None:
    matrix = Learner(SMALL).matrix
    assert Ranker(matrix).rank(User(), NOW).top(5) == []
    warm_up(matrix)


def test_a_longer_history_than_the_blocks_take_is_fine(learner: Learner) -> None:
    user = replace(user_of(list(range(1, ITEMS))), history_ts=np.full(ITEMS - 1, NOW))
    ranking = Ranker(learner.matrix, cooccurrence_history=NEAR).rank(user, NOW)
    (reason,) = ranking.explain(ranking.of([ITEMS]))
    assert len(reason.terms) == ITEMS - 1
