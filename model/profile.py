"""A user as the model sees them: vectors made of the history and the user's own words, and what each event gives.

Nothing is learnt a user: z is a function of what the user did and of the items' current vectors, so every score is
explained exactly, event by event. Formulas: model.kernels.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from model import kernels
from model.items import ItemMatrix

Array = npt.NDArray[Any]

COOCCURRENCE_HISTORY = 24  # entries in the co-occurrence block; LearnerConfig.cooccurrence_history has the same default


def _none(dtype: type) -> Array:
    return np.zeros(0, dtype)


@dataclass(frozen=True)
class User:
    """What is known of one user at one moment; arrays run from the newest entry to the oldest.

    text is the decayed mean of *all* visible texts, comment the vectors of the kept ones and comment_weight their
    decays (.9^k): what older texts add is the explanation's rest.
    """

    history_item: Array = field(default_factory=lambda: _none(np.int64))  # (m,) int64 keys
    history_ts: Array = field(default_factory=lambda: _none(np.float64))  # (m,) float64, Unix s
    history_weight: Array = field(default_factory=lambda: _none(np.float32))  # (m,) float32, w_b
    text: Array | None = None  # (T,) float32; None: no text is visible
    text_weight: float = 0.0  # sum of the decays
    comment: Array | None = None  # (c, T) float32 unit vectors
    comment_weight: Array = field(default_factory=lambda: _none(np.float32))  # (c,) float32
    bucket: int = 0  # in trials: `model.trial.bucket_of`


@dataclass(frozen=True)
class Profile:
    """The user-side vectors, and the coefficients that tie them to single events; m' entries whose item has a row."""

    entry: Array  # (m',) int64: which entries of the user's history these are
    row: Array  # (m',) int32 rows of their items
    z: Array  # (D,) float32: zC = sum_k wt_k y_k + x
    context: Array  # (D,) float32 x
    wt: Array  # (m',) float32
    ck: Array  # (m',) float32: of the co-occurrence block, without aK
    text: Array  # (3, T) float32: zT of the history for g = .7 and .97, zX of the user's words
    text_coefficient: Array  # (2, m') float32: zT_h = sum_k text_coefficient[h, k] (e_k - mu)
    coefficient: Array  # (COEFFICIENTS,) float32: w, aT, aX, aK of a user like this
    metric: Array  # (T, T) float32, of the user's arm; (0, 0): none
    v: Array  # (T,) float32: the metric times sum_h aT_h zT_h + aX zX, plus u M, to be multiplied with e_j


def profile_of(matrix: ItemMatrix, user: User, now: float, cooccurrence_history: int = COOCCURRENCE_HISTORY) -> Profile:
    """The user's vectors as of `now` (Unix s). Entries whose item the matrix does not know are left out."""
    m = matrix.arrays
    rows = matrix.indices(np.ascontiguousarray(user.history_item, np.int64))
    entry = np.flatnonzero(rows >= 0)
    rows = rows[entry]
    used = len(entry)
    ts = np.ascontiguousarray(user.history_ts[entry], np.float64)
    weight = np.ascontiguousarray(user.history_weight[entry], np.float32)
    wt, ck = np.zeros(used, np.float32), np.zeros(used, np.float32)
    bucket = np.zeros((2, used), np.int32)
    z, text = np.zeros(matrix.dim, np.float32), np.zeros((kernels.TEXT_HEADS, matrix.text_dim), np.float32)
    coefficient = np.zeros((2, used), np.float32)
    kernels.behaviour_vector(m, float(now), rows, ts, weight, cooccurrence_history, wt, ck, bucket[0], bucket[1], z)
    kernels.history_texts(m, rows, weight, text, coefficient)
    if user.text is not None and user.text_weight > 0:
        words = np.ascontiguousarray(user.text, np.float32)
        kernels.own_text(m.mu, words, np.float32(user.text_weight), text[2])
    own = np.zeros(kernels.COEFFICIENTS, np.float32)
    since = 1 + int(bucket[1, 0]) if used else 0
    length = kernels.coefficients(m.theta, since, used, own)
    context = np.zeros_like(z)
    kernels.add_context(m.context, since, length, context)
    z += context
    metric = matrix.metric_of(user.bucket)
    v = _adapted(metric, own[kernels.T_TEXT : kernels.T_NEIGHBOUR] @ text)[None, :]
    kernels.map_user(m, z[None, :], text[None, :], np.zeros((1, len(m.map)), np.float32), v)
    return Profile(entry, rows, z, context, wt, ck, text, coefficient, own, metric, v[0])


def _adapted(metric: Array, vectors: Array) -> Array:
    """(n, T) or (T,): what inner products with other texts' vectors make the score."""
    return vectors @ metric if len(metric) else vectors


def text_terms(matrix: ItemMatrix, profile: Profile, head: int, vectors: Array) -> Array:
    """(n, T): what vectors (n, T), each a part of this text head's vector (zT_h, or zX: 2), add to v."""
    m = matrix.arrays
    first = matrix.dim * (1 + head)
    scale = np.float32(np.sqrt(matrix.text_dim / matrix.dim))
    lifted = (vectors @ m.project.T) * scale @ m.map[first : first + matrix.dim]
    terms: Array = profile.coefficient[kernels.T_TEXT + head] * _adapted(profile.metric, vectors) + lifted
    return terms
