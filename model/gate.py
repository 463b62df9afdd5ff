"""Whether one model is better than another on the same live tests, at any moment: testing by betting.

Of each test both models get a score in [0, 1]; d is the challenger's minus the champion's. Under "the challenger is
no better" (E[d | past] <= 0) the wealth K_t = prod (1 + l_s d_s), with bets l_s in [0, .9] fixed before d_s is seen,
is a nonnegative supermartingale, so that P(K_t >= 1 / alpha for any t) <= alpha (Ville 1939): the decision may be taken
at any moment, and after looking every time (Howard, Ramdas, McAuliffe & Sekhon 2021). The bets are the approximate
growth-optimal ones of the past tests' mean and variance (aGRAPA; Waudby-Smith & Ramdas 2023).

Where users are split into two arms there is no such pair: the end of this file compares means over users, at any moment
by betting too.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

BET_MAX: Final = 0.9
BETS: Final = tuple(BET_MAX * 0.5**n for n in range(8))  # of two arms: from a lift of all to one of 1 %
DELTA_STEPS: Final = 20
PERMUTATIONS: Final = 9_999
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
    """(mean, low, high) of one or more values in [0, 1], each of another user: the score interval of level 1 - alpha.

    Wilson 1927, of as many users with values of 0 and 1 alone as have this variance (Korn & Graubard 1998); two users
    with 1 and two with 0 are imagined beside the others for that, so that few outcomes do not make many users of few.
    It holds for rare outcomes too, of which there may be none yet.
    """
    values, imagined = np.asarray(values, np.float64), np.append(values, (0.0, 0.0, 1.0, 1.0))
    mean, middle = float(np.mean(values)), float(np.mean(imagined))
    n = len(values) * middle * (1 - middle) / float(np.var(imagined))
    z = _quantile(alpha)
    middle = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return mean, max(middle - half, 0.0), min(middle + half, 1.0)


def difference(challenger: Array, champion: Array, alpha: float) -> tuple[float, float, float, float]:
    """(challenger's mean minus the champion's, low, high, two-sided p) of one value in [0, 1] a user.

    Of one look, at a moment that was fixed before: `difference_anytime` may be looked at as often as one likes. The
    interval is made of those of both means (Newcombe 1998, method 10).
    """
    mean0, low0, high0 = mean_interval(champion, alpha)
    mean1, low1, high1 = mean_interval(challenger, alpha)
    d = mean1 - mean0
    low, high = d - math.hypot(mean1 - low1, high0 - mean0), d + math.hypot(high1 - mean1, mean0 - low0)
    return d, low, high, permutation_p(challenger, champion)


def permutation_p(challenger: Array, champion: Array) -> float:
    """Two-sided p of "the arm makes no difference to anybody", 1 / (PERMUTATIONS + 1) at the least: how often arms of
    these sizes, drawn anew, have means as far apart.

    Exact, whatever the values (Fisher 1935; of drawn permutations: Phipson & Smyth 2010). How many challengers have
    each of the values is drawn, not who. A function of the values.
    """
    values, counts = np.unique(np.concatenate((challenger, champion)), return_counts=True)
    n1, n0 = len(challenger), len(champion)
    drawn = np.random.default_rng(0).multivariate_hypergeometric(counts, n1, PERMUTATIONS, method="marginals") @ values
    expected = n1 * float(counts @ values) / (n1 + n0)  # of the challengers' sum: as far from it is as far apart
    far = np.abs(drawn - expected) >= abs(float(np.sum(challenger)) - expected) * (1 - 1e-9)
    return (1 + int(np.count_nonzero(far))) / (PERMUTATIONS + 1)


def difference_anytime(values: Array, challengers: Array, share: float, alpha: float) -> tuple[float, float]:
    """(low, high) of what the challenger adds to a user's value: with chance 1 - alpha all the intervals that are told
    as users come hold the difference of the means. No interval is wider than one before.

    values: (n,) in [0, 1], one a user, in the order of the users; challengers: (n,) bool, each drawn with chance
    `share`, whatever came before. A value v counts as (v - m) / share of a challenger, as (m - v) / (1 - share) of a
    champion, m the mean of the values before: so x has the difference as its expectation, for any n and however rare
    an outcome is. That it is delta or less is bet against, each time with fixed parts of the most that can be lost
    (BETS); the mean of these wealths is one, and it falls as delta grows: the low end is the greatest delta at which it
    has ever reached 2 / alpha (Ville 1939; confidence sequences by betting: Waudby-Smith & Ramdas 2023). At delta = 0
    each bet has the form of the growth-optimal one of two Bernoulli streams (Turner, Ly & Gruenwald 2024).
    """
    values, challengers = np.asarray(values, np.float64), np.asarray(challengers, bool)
    m = (np.cumsum(values) - values + 0.5) / np.arange(1, len(values) + 1)
    x = (values - m) * np.where(challengers, 1 / share, -1 / (1 - share))
    lowest, highest = -np.maximum(m / share, (1 - m) / (1 - share)), np.maximum((1 - m) / share, m / (1 - share))
    return _bound(x, lowest, alpha / 2), -_bound(-x, -highest, alpha / 2)


def _bound(x: Array, lowest: Array, alpha: float) -> float:
    """Above which the expectation of each x is, with chance 1 - alpha: within [-1, 1], to 2**-DELTA_STEPS.

    lowest: (n,), x can be no less; known before x.
    """
    wanted, low, high = -math.log(alpha), -1.0, 1.0
    for _ in range(DELTA_STEPS):
        delta = (low + high) / 2
        low, high = (delta, high) if _log_wealth_most(x, lowest, delta) >= wanted else (low, delta)
    return low


def _log_wealth_most(x: Array, lowest: Array, delta: float) -> float:
    """The most that the mean of the bettors' wealths has ever been; their bets are the same for every delta <= 1."""
    total = np.zeros(len(x) + 1)
    total[1:] = -np.inf
    for part in BETS:
        total[1:] = np.logaddexp(total[1:], np.cumsum(np.log1p(part / (1 - lowest) * (x - delta))))
    total[1:] -= math.log(len(BETS))
    return float(total.max())


def split_p(challengers: int, users: int, share: float) -> float:
    """How likely a split as uneven as this is by chance (normal): a small one says that users were lost in one arm."""
    error = math.sqrt(users * share * (1 - share))
    return math.erfc(abs(challengers - users * share) / error / math.sqrt(2)) if users else 1.0


def _quantile(alpha: float) -> float:
    return NormalDist().inv_cdf(1 - alpha / 2)
