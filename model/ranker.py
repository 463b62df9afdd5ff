"""Ranking: exact top-k over every candidate, and why each item is where it is.

    logit_j = a s_j + c_j,  c_j = -ln sum_{k != j} exp(a s_k),  so that sigmoid(logit_j) = exp(a s_j) / sum_k exp(a s_k)

over the user's candidates. Every s_j is a sum of a bias and of one term an event of the user, so
bias + terms + rest = logit holds exactly, up to float32.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from model import kernels
from model.items import ItemMatrix
from model.profile import COOCCURRENCE_HISTORY, Profile, User, profile_of

Array = npt.NDArray[Any]

POPULARITY_FEATURES: Final = (0, 1, 2, 3, 6)
AGE_FEATURES: Final = (4, 7)
RECENCY_FEATURES: Final = (5, 8, 9, 10)


class Scored(NamedTuple):
    """One item of a list."""

    key: int
    row: int
    item_id: str
    score: float  # p_ij: probability that this is the user's next positive
    logit: float


class Bias(NamedTuple):
    """What the item's score owes to no event of the user, in logits; `total` is their sum."""

    constant: float  # a (beta_j + M's constant row . e_j)
    popularity: float
    age: float
    recency: float
    context: float  # a <x, phi_j + M e_j>: what users choose after so long a pause and so many events
    calibration: float  # c_j

    @property
    def total(self) -> float:
        """The whole."""
        return sum(self)


class Term(NamedTuple):
    """What one entry of the history adds, in logits; `total` is the sum of the three heads."""

    entry: int  # index in the user's history, 0 the newest
    learnt: float  # <wt_k y_k, phi_j + M e_j>
    cooccurrence: float
    text: float  # the text of the entry's item against this item's
    total: float


class Explanation(NamedTuple):
    """bias.total + sum of terms + sum of comments + rest = the item's logit, within 1e-4."""

    bias: Bias
    entries: list[int]  # of the user's history, 0 the newest: those that have a term
    heads: Array  # (4, m') float32, what each of them adds, as `Term` has it
    comments: list[float]  # one a kept comment of the user
    rest: float  # the texts older than the kept ones, together

    @property
    def terms(self) -> list[Term]:
        """One an entry."""
        return list(map(Term, self.entries, *self.heads.tolist()))

    @property
    def totals(self) -> list[float]:
        """Of the terms."""
        totals: list[float] = self.heads[3].tolist()
        return totals


class Ranker:
    """Ranks users over one item matrix (the learner's own, or a replica). Not safe for concurrent use.

    `rank` scores every item for a user, once; the list, given items and the reasons are then read from it.

    The items' features do not depend on the user: they are taken once a tick, that is when the matrix has changed or
    `now` has moved by `tick_s` since.
    """

    def __init__(
        self, matrix: ItemMatrix, tick_s: float = 1.0, cooccurrence_history: int = COOCCURRENCE_HISTORY
    ) -> None:
        self.matrix = matrix
        self.tick_s = tick_s
        self.cooccurrence_history = cooccurrence_history
        self._tick: tuple[int, float] | None = None  # (matrix version, now)
        self._feature = np.zeros((kernels.FEATURES, 0), np.float32)
        self._score = np.zeros(0, np.float32)

    @property
    def bias_at(self) -> float:
        """The moment of the biases in the last list, Unix s."""
        return self._tick[1] if self._tick else 0.0

    def take_bias(self, now: float) -> None:
        """Takes the bias at this moment, unless that of the tick still holds. Every list does so by itself."""
        self._refresh(now)

    def rank(self, user: User, now: float, exclude: npt.ArrayLike = ()) -> "Ranking":
        """The scores of every candidate for the user. exclude: item keys, with those consumed. now: Unix s."""
        self._refresh(now)
        profile = profile_of(self.matrix, user, now, self.cooccurrence_history)
        rows = len(self.matrix)
        scores = self._score[:rows]
        near = self.cooccurrence_history
        mass, top = kernels.score_rows(
            self.matrix.arrays, rows, profile.row[:near], profile.ck[:near], profile.z, profile.v,
            profile.coefficient, self._feature, np.asarray(exclude, np.int64), scores,
        )  # fmt: skip
        return Ranking(self.matrix, user, profile, self._feature, scores, float(mass), float(top), near)

    def similar(self, row: int, k: int) -> list[tuple[int, float]]:
        """The k candidates most like this row and how like they are: cosine of (phi, y) plus cosine of e - mu."""
        m, rows = self.matrix.arrays, len(self.matrix)
        learnt = np.concatenate((m.phi[:rows], m.y[:rows]), axis=1)
        likeness = _cosine(learnt, row) + _cosine(m.e[:rows] - m.mu, row)
        likeness[(m.flags[:rows] & kernels.ACTIVE) == 0] = kernels.CLOSED
        likeness[row] = kernels.CLOSED
        best = np.empty(k, np.int32)
        count = kernels.best(likeness.astype(np.float32), k, best)
        return [(int(other), float(likeness[other])) for other in best[:count]]

    def _refresh(self, now: float) -> None:
        rows = len(self.matrix)
        if self._tick and self._tick[0] == self.matrix.version and 0 <= now - self._tick[1] < self.tick_s:
            return
        if len(self._score) < rows:
            capacity = len(self.matrix.arrays.key)
            self._feature = np.zeros((kernels.FEATURES, capacity), np.float32)
            self._score = np.zeros(capacity, np.float32)
        kernels.features_all(self.matrix.arrays, rows, float(now), self._feature)
        self._tick = (self.matrix.version, float(now))


@dataclass(frozen=True)
class Ranking:
    """One user's score of every row. It holds until the ranker's next, and while the matrix is as it was."""

    matrix: ItemMatrix
    user: User
    profile: Profile
    feature: Array  # (FEATURES, >= rows) float32
    scores: Array  # (rows,) float32, s_j; kernels.CLOSED where the row is no candidate of the user
    mass: float  # sum exp(a (s - best))
    best: float
    near: int  # entries of the history in the co-occurrence block

    def top(self, k: int) -> list[Scored]:
        """The k best candidates, best first; ties go to the older row.

        Probabilities are over all candidates that are not excluded.
        """
        rows = np.empty(k, np.int32)
        count = kernels.best(self.scores, k, rows)
        return self._scored(rows[:count])

    def of(self, keys: Sequence[int]) -> list[Scored]:
        """The given items that are candidates, best first, with the probabilities that `top` would give them."""
        rows = np.unique(self.matrix.indices(np.array(keys, np.int64)))
        rows = rows[rows >= 0]
        scored = self._scored(rows[self.scores[rows] > kernels.CLOSED])
        return sorted(scored, key=lambda item: (-item.logit, item.row))

    def explain(self, scored: Sequence[Scored]) -> list[Explanation]:
        """Why each of these items of this ranking has its logit."""
        rows = np.array([item.row for item in scored], np.int32)
        profile = self.profile
        heads = np.zeros((4, len(rows), len(profile.row)), np.float32)
        kernels.term_heads(
            self.matrix.arrays, profile.metric, rows, profile.row, self.near, profile.wt, profile.ck,
            profile.text_coefficient, profile.coefficient, heads[:3],
        )  # fmt: skip
        heads[:3].sum(axis=0, out=heads[3])
        entries = profile.entry.tolist()
        return [
            Explanation(bias, entries, heads[:, at], comments, rest)
            for at, (bias, (comments, rest)) in enumerate(
                zip(self._biases(scored, rows), self._own_terms(rows), strict=True)
            )
        ]

    def _biases(self, scored: Sequence[Scored], rows: Array) -> list[Bias]:
        m = self.matrix.arrays
        sharp = float(m.scalar[kernels.SHARP])
        parts = sharp * self.profile.coefficient[: kernels.FEATURES, None] * self.feature[:, rows]
        constant = sharp * (m.rec["beta"][rows] + m.e[rows] @ m.map[-1])
        x = self.profile.context
        context = sharp * (m.phi[rows] @ x + m.e[rows] @ (x @ m.map[: self.matrix.dim]))
        groups = [parts[list(group)].sum(axis=0) for group in (POPULARITY_FEATURES, AGE_FEATURES, RECENCY_FEATURES)]
        calibration = [item.logit - sharp * float(self.scores[item.row]) for item in scored]
        return list(map(Bias, constant.tolist(), *(group.tolist() for group in groups), context.tolist(), calibration))

    def _own_terms(self, rows: Array) -> list[tuple[list[float], float]]:
        """Of each row, (w_c / W) <aX (x_c - mu) + M's part, e_j> sqrt(min(W, 4)) of each kept comment x_c, and of all
        older texts together."""
        user, profile, m = self.user, self.profile, self.matrix.arrays
        if user.text is None or user.text_weight <= 0:
            return [([], 0.0)] * len(rows)
        gain = float(m.scalar[kernels.SHARP]) * math.sqrt(min(user.text_weight, kernels.TEXT_WEIGHT_MAX))
        sides = kernels.text_sides(m, profile.metric, rows, 2, profile.coefficient[kernels.T_TEXT + 2])
        whole = gain * (sides @ (user.text - m.mu)).astype(np.float64)
        if user.comment is None:
            return [([], rest) for rest in whole.tolist()]
        share = user.comment_weight.astype(np.float64) * (gain / user.text_weight)
        comments = (sides @ (user.comment - m.mu).T) * share
        rests = whole - comments.sum(axis=1)
        return list(zip(comments.tolist(), rests.tolist(), strict=True))

    def _scored(self, rows: Array) -> list[Scored]:
        """These rows (n,), which are candidates, in their order."""
        m, names = self.matrix.arrays, self.matrix.names
        margin = float(m.scalar[kernels.SHARP]) * (self.scores[rows].astype(np.float64) - self.best)
        logit = margin - np.log(np.maximum(self.mass - np.exp(margin), 1e-12 * self.mass))
        score = 1 / (1 + np.exp(-logit))
        told = zip(m.key[rows].tolist(), rows.tolist(), score.tolist(), logit.tolist(), strict=True)
        return [Scored(key, row, names[row], p, x) for key, row, p, x in told]


def _cosine(vectors: Array, row: int) -> Array:
    """(rows,) cosine of every vector to that of `row`; 0 where one of them is zero."""
    norms = np.linalg.norm(vectors, axis=1)
    product: Array = vectors @ vectors[row]
    result: Array = np.divide(product, norms * norms[row], out=np.zeros_like(product), where=norms * norms[row] > 0)
    return result


def warm_up(matrix: ItemMatrix) -> None:
    """Compiles (or takes from the cache) the ranker's kernels."""
    ranker = Ranker(matrix)
    user = User(np.array([1]), np.array([0.0]), np.ones(1, np.float32), np.zeros(matrix.text_dim, np.float32), 1.0)
    ranking = ranker.rank(user, 1.0)
    ranking.explain(ranking.top(2))
