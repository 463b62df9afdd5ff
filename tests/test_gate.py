"""The gate errs no more often than it promises, however often it is looked at, and finds what is there."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.gate import Bets, Duel, level, score_of_rank


def duel_of(differences: np.ndarray, alpha: float = 0.05, tests_max: int = 10_000) -> Duel:
    duel = Duel.new(alpha, tests_max)
    duel.observe(np.maximum(differences, 0), np.maximum(-differences, 0))
    return duel


@pytest.mark.parametrize("kind", ["coin", "skewed", "rare"])
def test_no_difference_is_seldom_taken_for_one(kind: str) -> None:
    """300 duels of equals, looked at after each of 400 tests: false verdicts within alpha and its noise."""
    rng = np.random.default_rng(1)
    draws = {
        "coin": lambda: rng.choice([-1.0, 1.0], 400),
        "skewed": lambda: rng.choice([0.05, -0.95], 400, p=[0.95, 0.05]),
        "rare": lambda: rng.choice([0.0, 0.6, -0.6], 400, p=[0.96, 0.02, 0.02]),
    }
    better = sum(duel_of(draws[kind]()).verdict == "better" for _ in range(300))
    assert better <= 300 * 0.05 + 3 * math.sqrt(300 * 0.05 * 0.95)


def test_a_difference_is_found_and_its_sign() -> None:
    rng = np.random.default_rng(2)
    found = [duel_of(rng.normal(0.02, 0.1, 2000).clip(-1, 1), alpha=0.001) for _ in range(20)]
    assert all(duel.verdict == "better" for duel in found)
    assert max(duel.better.tests for duel in found) < 1500
    assert duel_of(rng.normal(-0.02, 0.1, 2000).clip(-1, 1), alpha=0.001).verdict == "worse"
    assert duel_of(np.zeros(50), tests_max=50).verdict == "none"
    assert duel_of(np.zeros(49), tests_max=50).verdict is None


@given(st.lists(st.floats(-1, 1), max_size=80))
def test_wealth_is_never_lost_whole_and_the_verdict_is_final(differences: list[float]) -> None:
    bets = Bets()
    for d in differences:
        bets.observe(d)
        assert math.isfinite(bets.log_wealth) and bets.log_wealth <= bets.log_wealth_most
    duel = duel_of(np.array(differences))
    verdict, tests = duel.verdict, duel.better.tests
    if verdict is not None:
        duel.observe(np.zeros(100), np.ones(100))
        assert (duel.verdict, duel.better.tests) == (verdict, tests)


def test_all_duels_together_keep_the_level() -> None:
    assert sum(level(0.01, number) for number in range(1, 10_000)) < 0.01


def test_scores_are_bounded() -> None:
    assert score_of_rank(np.array([1.0]))[0] == 1
    assert (np.diff(score_of_rank(np.arange(1, 100))) < 0).all()
    with pytest.raises(ValueError, match="within"):
        Bets().observe(1.5)
