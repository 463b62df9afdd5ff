"""Whether one model is better than another on the same live tests, at any moment: testing by betting.

Of each test both models get a score in [0, 1]; d is the challenger's minus the champion's. Under "the challenger is
no better" (E[d | past] <= 0) the wealth K_t = prod (1 + l_s d_s), with bets l_s in [0, .9] fixed before d_s is seen,
is a nonnegative supermartingale, so that P(K_t >= 1 / alpha for any t) <= alpha (Ville 1939): the decision may be taken
at any moment, and after looking every time (Howard, Ramdas, McAuliffe & Sekhon 2021). The bets are the approximate
growth-optimal ones of the past tests' mean and variance (aGRAPA; Waudby-Smith & Ramdas 2023).

Where users are split into two arms there is no such pair: the end of this file compares means over users.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

BET_MAX: Final = 0.9
USERS_MIN: Final = 100  # in each of two arms: what follows is asymptotic
USERS_TIGHT: Final = 1000  # after about so many users a sequence of intervals is as tight as it can be made
VARIANCE_START: Final = 0.25  # of one imagined test: the first bets are small


def score_of_rank(rank: Array) -> Array:
    """The test's score, in (0, 1]: the gain of NDCG without a cut, 1 / log2(1 + rank)."""
    return 1.0 / np.log2(1.0 + np.asarray(rank, np.float64))


@dataclass
class Bets:
    """The wealth of one who bets that d is positive on average. Plain numbers: it can be stored at any test."""

    tests: int = 0
    log_wealth: float = 0.0
    log_wealth_most: float = 0.0  # the e-value that counts: the wealth may be taken at its best moment
    total: float = 0.0
    squares: float = 0.0

    def observe(self, d: float) -> None:
        """Takes one difference in [-1, 1]. Raises ValueError outside."""
        if not -1 <= d <= 1:
            raise ValueError(f"a difference of scores is within [-1, 1], not {d}")
        mean = self.total / (self.tests + 1)
        variance = (VARIANCE_START + self.squares) / (self.tests + 1) - mean * mean
        bet = min(max(mean / max(variance + mean * mean, 1e-12), 0.0), BET_MAX)
        self.log_wealth += float(np.log1p(bet * d))
        self.log_wealth_most = max(self.log_wealth_most, self.log_wealth)
        self.tests += 1
        self.total += d
        self.squares += d * d

    @property
    def mean(self) -> float:
        """Of the differences so far."""
        return self.total / self.tests if self.tests else 0.0


@dataclass
class Duel:
    """Two bettors on the same tests: one that the challenger is better, one that it is worse."""

    alpha: float  # chance of each false verdict, over the whole duel
    tests_max: int  # then nothing was shown
    better: Bets
    worse: Bets

    @classmethod
    def new(cls, alpha: float, tests_max: int) -> "Duel":
        """A duel without tests."""
        return cls(alpha, tests_max, Bets(), Bets())

    def observe(self, challenger: Array, champion: Array) -> None:
        """Scores of tests that both had, in the log's order. Nothing is taken in after the verdict."""
        for d in (np.asarray(challenger) - np.asarray(champion)).tolist():
            if self.verdict is not None:
                return
            self.better.observe(d)
            self.worse.observe(-d)

    @property
    def verdict(self) -> str | None:
        """better, worse, none (tests_max reached), or None: it goes on."""
        most = -float(np.log(self.alpha))
        if self.better.log_wealth_most >= most:
            return "better"
        if self.worse.log_wealth_most >= most:
            return "worse"
        return "none" if self.better.tests >= self.tests_max else None

    def evidence(self) -> dict[str, Any]:
        """For people and manifests: tests, mean difference, e-values (log10) and the level they are held against."""
        return {
            "tests": self.better.tests,
            "mean_difference": self.better.mean,
            "log10_e_better": self.better.log_wealth_most / float(np.log(10)),
            "log10_e_worse": self.worse.log_wealth_most / float(np.log(10)),
            "alpha": self.alpha,
            "verdict": self.verdict,
        }


def level(alpha: float, number: int) -> float:
    """The level of the number-th (from 1) duel: all of them together err with chance alpha at the most."""
    return alpha / (number * (number + 1))


# -- two arms of users: no test that both had


def mean_interval(values: Array, alpha: float) -> tuple[float, float, float]:
    """(mean, low, high) of two values or more, each of another user: the normal interval of level 1 - alpha."""
    mean, half = float(np.mean(values)), _quantile(alpha) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def difference(challenger: Array, champion: Array, alpha: float) -> tuple[float, float, float, float]:
    """(challenger's mean minus the champion's, low, high, two-sided p) of one value a user: Welch's, normal.

    Of one look, at a moment that was fixed before: `difference_sequence` may be looked at as often as one likes.
    """
    mean = float(np.mean(challenger) - np.mean(champion))
    error = math.sqrt(np.var(challenger, ddof=1) / len(challenger) + np.var(champion, ddof=1) / len(champion))
    half = _quantile(alpha) * error
    return mean, mean - half, mean + half, math.erfc(abs(mean) / error / math.sqrt(2)) if error else float(mean == 0)


def difference_sequence(values: Array, challengers: Array, share: float, alpha: float) -> tuple[Array, Array]:
    """(low, high), after each user from the moment on at which both arms have USERS_MIN, of what the challenger adds to
    a user's value: with chance 1 - alpha all these intervals hold the difference of the means.

    values: (n,), one a user, in the order of the users; challengers: (n,) bool, drawn with chance `share`. A value v of
    mean-so-far m counts as (v - m) / share of a challenger, as (m - v) / (1 - share) of a champion; the difference is
    their expectation. Around their mean lies the asymptotic confidence sequence of Robbins' normal mixture
    (Waudby-Smith, Arbour, Sinha, Kennedy & Ramdas 2021, Time-uniform central limit theory). Each interval is the
    intersection of those so far.
    """
    values, challengers = np.asarray(values, np.float64), np.asarray(challengers, bool)
    n = np.arange(1, len(values) + 1)
    before = np.concatenate(([0.0], np.cumsum(values)[:-1])) / np.maximum(n - 1, 1)
    each = (values - before) * np.where(challengers, 1 / share, -1 / (1 - share))
    mean = np.cumsum(each) / n
    deviation = np.sqrt(np.maximum(np.cumsum(each * each) / n - mean * mean, 0.0))
    rho = (-2 * math.log(alpha) + math.log(-2 * math.log(alpha) + 1)) / USERS_TIGHT
    half = deviation * np.sqrt(2 * (n * rho + 1) / (n * n * rho) * np.log(np.sqrt(n * rho + 1) / alpha))
    enough = (np.cumsum(challengers) >= USERS_MIN) & (np.cumsum(~challengers) >= USERS_MIN)
    return np.maximum.accumulate((mean - half)[enough]), np.minimum.accumulate((mean + half)[enough])


def split_p(challengers: int, users: int, share: float) -> float:
    """How likely a split as uneven as this is by chance (normal): a small one says that users were lost in one arm."""
    error = math.sqrt(users * share * (1 - share))
    return math.erfc(abs(challengers - users * share) / error / math.sqrt(2)) if users else 1.0


def _quantile(alpha: float) -> float:
    return NormalDist().inv_cdf(1 - alpha / 2)
