"""The user-side vectors against their definitions."""

import numpy as np
import pytest

from model import kernels
from model.learner import Learner
from model.profile import User, profile_of, text_terms
from tests.model_stream import SMALL, START_TS, enter_all, stream, vector_of


@pytest.fixture(scope="module")
def learner() -> Learner:
    learner = Learner(SMALL)
    enter_all(learner)
    for position, x in enumerate(stream(SMALL, 30)):
        learner.learn(x, position)
    return learner


def user_of(*keys: int) -> User:
    return User(
        history_item=np.array(keys, np.int64),
        history_ts=START_TS - 30.0 * np.arange(len(keys)) ** 3,
        history_weight=np.where(np.arange(len(keys)) % 3 == 2, np.float32(0.7), np.float32(1)),
        text=vector_of(50, SMALL.text_dim),
        text_weight=1.9,
    )


def test_z_is_the_weighted_sum_of_the_history_and_its_setting(learner: Learner) -> None:
    m = learner.matrix.arrays
    user = user_of(3, 8, 12, 20, 5)
    profile = profile_of(learner.matrix, user, START_TS, 5)
    om, ta = m.theta[kernels.T_AGE : kernels.T_GAP], m.theta[kernels.T_GAP : kernels.T_AGE_K]
    gaps = [0, 2, 3, 4, 4]  # 0, 30, 240, 810, 1920 s
    weights = om[[0, 1, 2, 3, 4]] * ta[gaps] * user.history_weight
    expected = (weights / np.sqrt(weights.sum())) @ m.y[profile.row]
    context = m.context[1] + m.context[kernels.SINCES + 3]  # an entry of now; 4 to 7 entries
    assert np.abs(context).max() > 0.01
    np.testing.assert_allclose(profile.context, context, rtol=1e-6)
    np.testing.assert_allclose(profile.z, expected + context, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(profile.wt @ m.y[profile.row], expected, rtol=1e-4, atol=1e-5)


def test_text_vectors_are_decayed_means_less_mu(learner: Learner) -> None:
    m = learner.matrix.arrays
    user = user_of(3, 8, 12)
    profile = profile_of(learner.matrix, user, START_TS)
    for h, g in enumerate(kernels.TEXT_DECAYS):
        w = g ** np.arange(3) * user.history_weight
        expected = ((w @ m.e[profile.row]) / w.sum() - m.mu) * np.sqrt(min(w.sum(), 4))
        np.testing.assert_allclose(profile.text[h], expected, rtol=1e-4, atol=1e-5)
        terms = profile.text_coefficient[h] @ (m.e[profile.row] - m.mu)
        np.testing.assert_allclose(terms, profile.text[h], rtol=1e-4, atol=1e-5)
    assert user.text is not None
    np.testing.assert_allclose(profile.text[2], (user.text - m.mu) * np.sqrt(1.9), rtol=1e-5, atol=1e-6)


def test_entries_of_unknown_items_are_left_out(learner: Learner) -> None:
    profile = profile_of(learner.matrix, user_of(3, 987_654, 12), START_TS)
    assert profile.entry.tolist() == [0, 2]
    assert profile.row.tolist() == [learner.matrix.index(3), learner.matrix.index(12)]


def test_a_user_of_whom_nothing_is_known_is_the_setting_alone(learner: Learner) -> None:
    m, profile = learner.matrix.arrays, profile_of(learner.matrix, User(), START_TS)
    np.testing.assert_array_equal(profile.z, m.context[0] + m.context[kernels.SINCES])
    np.testing.assert_allclose(profile.v, m.map[-1] + profile.z @ m.map[: SMALL.dim], rtol=1e-5, atol=1e-6)


def test_coefficients_are_the_shared_ones_plus_those_of_the_gap_and_of_the_length(learner: Learner) -> None:
    theta, size = learner.matrix.arrays.theta, kernels.COEFFICIENTS
    for keys, since, length in (((), 0, 0), ((3,), 1, 1), ((3, 8, 12), 1, 2), (range(1, 9), 1, 4)):
        own = profile_of(learner.matrix, user_of(*keys), START_TS).coefficient
        by_gap = theta[kernels.T_SINCE :][since * size : (since + 1) * size]
        by_length = theta[kernels.T_LENGTH :][length * size : (length + 1) * size]
        np.testing.assert_allclose(own, theta[:size] + by_gap + by_length, atol=1e-6)


def test_v_maps_what_is_known_of_the_user_to_texts(learner: Learner) -> None:
    m = learner.matrix.arrays
    profile = profile_of(learner.matrix, user_of(3, 8, 12), START_TS)
    scale = np.sqrt(SMALL.text_dim / SMALL.dim)
    unit = np.concatenate([profile.z, *(scale * m.project @ text for text in profile.text), [1]])
    direct = profile.coefficient[kernels.T_TEXT : kernels.T_NEIGHBOUR] @ profile.text
    np.testing.assert_allclose(profile.v, direct + unit @ m.map, rtol=1e-4, atol=1e-5)
    heads = [text_terms(learner.matrix, profile, h, profile.text[h : h + 1])[0] for h in range(3)]
    rest = profile.z @ m.map[: SMALL.dim] + m.map[-1]
    np.testing.assert_allclose(sum(heads) + rest, profile.v, rtol=1e-4, atol=1e-5)
    assert np.abs(m.map).max() > 0.01


@pytest.mark.parametrize(
    ("back", "bucket"),
    [(0, 0), (3, 3), (4, 4), (5, 4), (8, 5), (12, 6), (20, 7), (35, 8), (60, 9), (61, 10), (500, 10)],
)
def test_age_buckets(back: int, bucket: int) -> None:
    assert kernels.age_bucket(back) == bucket


@pytest.mark.parametrize(
    ("gap_s", "bucket"),
    [
        (-5.0, 0),
        (0.9, 0),
        (1.0, 1),
        (10.0, 1),
        (60.0, 2),
        (61.0, 3),
        (3600.0, 4),
        (4e4, 5),
        (172_800.0, 6),
        (2e5, 7),
        (2e6, 8),
    ],
)
def test_gap_buckets(gap_s: float, bucket: int) -> None:
    assert kernels.gap_bucket(gap_s) == bucket
