"""What a user wrote, as a decayed sum of unit vectors (z's text part: .9-per-text decayed mean).

With v_0 the newest visible text, S = sum_k g^k v_k and its weight q = sum_k g^k: the example carries S / q and q.
Vectors are kept as int8 with one scale each; cosine to the float vector is above .9999.
"""

from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

DECAY: Final = np.float32(0.9)  # per text of the same user
LEVELS: Final = np.float32(127.0)

F4: TypeAlias = npt.NDArray[np.float32]
I1: TypeAlias = npt.NDArray[np.int8]


def quantize(vector: F4) -> tuple[float, I1]:
    """(scale, (T,) int8) with vector ~ scale * int8, symmetric; a zero vector has scale 0."""
    top = np.max(np.abs(vector)) if vector.size else np.float32(0)
    if not top > 0:
        return 0.0, np.zeros(vector.shape, np.int8)
    return float(np.float32(top / LEVELS)), np.rint(vector * (LEVELS / top)).astype(np.int8)


def dequantize(scale: float, vector: I1) -> F4:
    """(T,) float32: scale * vector."""
    return vector.astype(np.float32) * np.float32(scale)


def visible_mean(scales: F4, vectors: I1, tail: F4, tail_weight: float) -> tuple[float, F4]:
    """(q, S / q) of the visible texts: scales (C,), vectors (C, T) newest first, then the tail (T,) of older ones.

    q is 0 and the mean zero where nothing is visible.
    """
    decays = DECAY ** np.arange(len(scales) + 1, dtype=np.float32)
    total = tail * decays[-1]
    if len(scales):
        total = total + (decays[:-1] * scales) @ vectors.astype(np.float32)
    weight = np.float32(decays[:-1].sum() + decays[-1] * np.float32(tail_weight))
    if weight <= 0:
        return 0.0, np.zeros_like(tail)
    return float(weight), total / weight


def push_tail(tail: F4, tail_weight: float, scale: float, vector: I1) -> tuple[F4, float]:
    """The tail after a text has left the kept ones: it becomes the newest of the tail."""
    return tail * DECAY + dequantize(scale, vector), float(np.float32(tail_weight) * DECAY + np.float32(1))
