"""Ranking: exact top-k over every candidate, and why each item is where it is.

    logit_j = a s_j + c_j,  c_j = -ln sum_{k != j} exp(a s_k),  so that sigmoid(logit_j) = exp(a s_j) / sum_k exp(a s_k)

over the user's candidates. Every s_j is a sum of a bias and of one term an event of the user, so
bias + terms + rest = logit holds exactly, up to float32.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from model import kernels
from model.items import ItemMatrix
from model.profile import COOCCURRENCE_HISTORY, Profile, User, profile_of, text_terms

Array = npt.NDArray[Any]

POPULARITY_FEATURES: Final = (0, 1, 2, 3, 6)
AGE_FEATURES: Final = (4, 7)
RECENCY_FEATURES: Final = (5, 8, 9, 10)


@dataclass(frozen=True)
class Scored:
    """One item of a list."""

    key: int
    row: int
    item_id: str
    score: float  # p_ij: probability that this is the user's next positive
    logit: float


@dataclass(frozen=True)
class Bias:
    """What the item's score owes to no event of the user, in logits; `total` is their sum."""

    constant: float  # a (beta_j + M's constant row . e_j)
    popularity: float
    age: float
    recency: float
    calibration: float  # c_j
    total: float


@dataclass(frozen=True)
class Term:
    """What one entry of the history adds, in logits; `total` is the sum of the three heads."""

    entry: int  # index in the user's history, 0 the newest
    learnt: float  # <wt_k y_k, phi_j + M e_j>
    cooccurrence: float
    text: float  # the text of the entry's item against this item's
    total: float


@dataclass(frozen=True)
class Explanation:
    """bias.total + sum of terms + sum of comments + rest = logit, within 1e-4."""

    key: int
    row: int
    logit: float
    score: float
    bias: Bias
    terms: tuple[Term, ...]
    comments: tuple[float, ...]  # one a kept comment of the user
    rest: float  # the texts older than the kept ones, together


class Ranker:
    """Ranks users over one item matrix (the learner's own, or a replica). Not safe for concurrent use.

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

    # --- lists ---

    def top_k(self, user: User, now: float, k: int, exclude: Iterable[int] = ()) -> list[Scored]:
        """The k best candidates, best first; ties go to the older row. exclude: item keys, with those consumed.

        Probabilities are over all candidates that are not excluded. now: Unix s.
        """
        excluded = np.fromiter(exclude, np.int64)
        _, scores, mass, top = self._score_all(user, now, excluded)
        rows = np.empty(k, np.int32)
        count = kernels.best(scores, k, rows)
        return [self._scored(int(row), float(scores[row]), mass, top) for row in rows[:count]]

    def rank_items(self, user: User, now: float, keys: Sequence[int], exclude: Iterable[int] = ()) -> list[Scored]:
        """The given items that are candidates, best first, with the probabilities that `top_k` would give them."""
        _, scores, mass, top = self._score_all(user, now, np.fromiter(exclude, np.int64))
        rows = self.matrix.indices(np.array(keys, np.int64))
        known = [int(row) for row in dict.fromkeys(rows.tolist()) if row >= 0 and scores[row] > kernels.CLOSED]
        scored = [self._scored(row, float(scores[row]), mass, top) for row in known]
        return sorted(scored, key=lambda item: (-item.logit, item.row))

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

    # --- reasons ---

    def explain(self, user: User, now: float, keys: Sequence[int], exclude: Iterable[int] = ()) -> list[Explanation]:
        """Why each of these items has its logit, in the order given; items without a row, or that are no candidates
        of this user, are left out."""
        profile, scores, mass, top = self._score_all(user, now, np.fromiter(exclude, np.int64))
        rows = [int(row) for row in self.matrix.indices(np.array(keys, np.int64))]
        rows = [row for row in rows if row >= 0 and scores[row] > kernels.CLOSED]
        heads = self._term_heads(profile, rows)
        return [
            self._explain(user, profile, self._scored(row, float(scores[row]), mass, top), heads[:, at])
            for at, row in enumerate(rows)
        ]

    def _term_heads(self, profile: Profile, rows: list[int]) -> Array:
        """(3, n, m') float32: what each entry adds to each row through the learnt, co-occurrence and text heads."""
        m = self.matrix.arrays
        sharp = np.float32(m.scalar[kernels.SHARP])
        near = profile.row[: self.cooccurrence_history]
        heads = np.zeros((3, len(rows), len(profile.row)), np.float32)
        learnt = m.phi[rows] + m.e[rows] @ m.map[: self.matrix.dim].T
        heads[0] = (learnt @ m.y[profile.row].T) * profile.wt
        for at, row in enumerate(rows):
            kernels.neighbour_terms(m, near, np.int32(row), heads[1, at])
        damping = m.rec["damping"][rows][:, None]
        heads[1] *= profile.ck * (profile.coefficient[kernels.T_NEIGHBOUR] * damping)
        for h, weight in enumerate(profile.text_coefficient):
            texts = text_terms(self.matrix, profile, h, m.e[profile.row] - m.mu)
            heads[2] += (m.e[rows] @ texts.T) * weight
        heads *= sharp
        return heads

    def _explain(self, user: User, profile: Profile, scored: Scored, heads: Array) -> Explanation:
        """heads: (3, m') of this item."""
        m = self.matrix.arrays
        bias = self._bias_parts(profile, scored.row, scored)
        total = heads.sum(axis=0)
        terms = tuple(
            Term(*values) for values in zip(profile.entry.tolist(), *heads.tolist(), total.tolist(), strict=True)
        )
        comments, rest = self._own_terms(user, profile, m.e[scored.row])
        return Explanation(scored.key, scored.row, scored.logit, scored.score, bias, terms, comments, rest)

    def _bias_parts(self, profile: Profile, row: int, scored: Scored) -> Bias:
        m = self.matrix.arrays
        sharp = float(m.scalar[kernels.SHARP])
        assert self._tick is not None
        feature = np.zeros((kernels.FEATURES, 1), np.float32)
        kernels.bias_of(m, np.int32(row), self._tick[1], profile.coefficient, feature)
        parts = sharp * (profile.coefficient[: kernels.FEATURES] * feature[:, 0])
        constant = sharp * float(m.rec[row]["beta"] + m.map[-1] @ m.e[row])
        popularity, age, recency = (
            float(parts[list(group)].sum()) for group in (POPULARITY_FEATURES, AGE_FEATURES, RECENCY_FEATURES)
        )
        calibration = scored.logit - sharp * float(self._score[row])
        total = constant + popularity + age + recency + calibration
        return Bias(constant, popularity, age, recency, calibration, total)

    def _own_terms(self, user: User, profile: Profile, e: Array) -> tuple[tuple[float, ...], float]:
        """(w_c / W) <aX (x_c - mu) + M's part, e_j> sqrt(min(W, 4)) of each kept comment x_c, and of all older texts
        together."""
        if user.text is None or user.text_weight <= 0:
            return (), 0.0
        mu = self.matrix.arrays.mu
        gain = float(self.matrix.arrays.scalar[kernels.SHARP])
        root = float(np.sqrt(min(user.text_weight, kernels.TEXT_WEIGHT_MAX)))
        whole = gain * root * float((text_terms(self.matrix, profile, 2, (user.text - mu)[None, :]) @ e)[0])
        if user.comment is None:
            return (), whole
        share = user.comment_weight.astype(np.float64) * (gain * root / user.text_weight)
        comments = tuple((share * (text_terms(self.matrix, profile, 2, user.comment - mu) @ e)).tolist())
        return comments, whole - sum(comments)

    # --- scores ---

    def _score_all(self, user: User, now: float, excluded: Array) -> tuple[Profile, Array, float, float]:
        """Scores of every row (kernels.CLOSED where it is no candidate), the mass sum exp(a (s - top)), and top."""
        self._refresh(now)
        profile = profile_of(self.matrix, user, now, self.cooccurrence_history)
        rows = len(self.matrix)
        scores = self._score[:rows]
        near = self.cooccurrence_history
        mass, top = kernels.score_rows(
            self.matrix.arrays, rows, profile.row[:near], profile.ck[:near], profile.z, profile.v,
            profile.coefficient, self._feature, excluded, scores,
        )  # fmt: skip
        return profile, scores, float(mass), float(top)

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

    def _scored(self, row: int, s: float, mass: float, top: float) -> Scored:
        sharp = float(self.matrix.arrays.scalar[kernels.SHARP])
        own = np.exp(sharp * (s - top))
        others = max(mass - own, 1e-12 * mass)
        logit = sharp * (s - top) - float(np.log(others))
        key = int(self.matrix.arrays.key[row])
        return Scored(key, row, self.matrix.names[row], float(1 / (1 + np.exp(-logit))), logit)


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
    for item in ranker.top_k(user, 1.0, 2):
        ranker.explain(user, 1.0, [item.key])
