"""The encoder's adapter: a low-rank linear map W = scale (I + left right') behind the frozen encoder.

A text's vector is W e. Every score reads texts through inner products alone, so <W x, W e> = <x, M e> with the
metric M = W'W: item and user vectors are stored as the frozen encoder made them, in one space for ever, and a change
of the adapter is a change of M, which is one row of the item matrix. Nothing is encoded anew and nothing can be mixed.
"""

import hashlib
import struct
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

ADAPTER_VERSION: Final = 1
RANK_MAX: Final = 64  # 2 x 384 x 64 floats are 200 KB: one message of the examples log
DIM_MAX: Final = 4096
NAME_BYTES_MAX: Final = 256
SCALE_MAX: Final = 100.0

_HEAD = struct.Struct("<BBHIIf")  # version, zero, bytes of base, T, R, scale


class AdapterError(ValueError):
    """Bytes or matrices that are no adapter, or one of another encoder."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """W = scale (I + left right'), of the encoder `base`; `name` is a digest of all of it."""

    base: str  # model.encoder.Encoder.name
    left: Array = field(repr=False)  # (T, R) float32
    right: Array = field(repr=False)  # (T, R) float32
    scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", float(np.float32(self.scale)))  # as it is stored
        if self.left.ndim != 2 or self.left.shape != self.right.shape or not 0 < self.left.shape[1] <= RANK_MAX:
            raise AdapterError(f"an adapter is two matrices (T, R), R from 1 to {RANK_MAX}, not {self.left.shape}")
        if self.left.shape[0] > DIM_MAX or len(self.base.encode()) > NAME_BYTES_MAX:
            raise AdapterError(f"an adapter has at most {DIM_MAX} dimensions and a base of {NAME_BYTES_MAX} bytes")
        if not (np.isfinite(self.left).all() and np.isfinite(self.right).all() and 0 < self.scale <= SCALE_MAX):
            raise AdapterError(f"an adapter's numbers are finite, and its scale is above 0 and at most {SCALE_MAX}")

    @property
    def dim(self) -> int:
        """T, the encoder's."""
        return int(self.left.shape[0])

    @cached_property
    def name(self) -> str:
        """12 hex digits: the version of the text space."""
        return hashlib.blake2b(self.pack(), digest_size=6).hexdigest()

    def apply(self, vectors: Array) -> Array:
        """(n, T) float32: W e of (n, T) vectors of the base. Linear: means and decayed sums map exactly."""
        moved: Array = (self.scale * (vectors + (vectors @ self.right) @ self.left.T)).astype(np.float32)
        return moved

    def metric(self) -> Array:
        """(T, T) float32, symmetric: W'W."""
        w = self.scale * (np.eye(self.dim) + self.left.astype(np.float64) @ self.right.astype(np.float64).T)
        return np.ascontiguousarray(w.T @ w, np.float32)

    def pack(self) -> bytes:
        """header 16 B (version u1, zero u1, bytes of base u2, T u4, R u4, scale f4) | base | left f4 | right f4."""
        base = self.base.encode()
        head = _HEAD.pack(ADAPTER_VERSION, 0, len(base), self.dim, self.left.shape[1], self.scale)
        return head + base + self.left.astype("<f4").tobytes() + self.right.astype("<f4").tobytes()

    @classmethod
    def unpack(cls, packed: bytes) -> Self:
        """The adapter of `pack`. Raises AdapterError."""
        if len(packed) < _HEAD.size or packed[0] != ADAPTER_VERSION:
            version = packed[0] if packed else None
            raise AdapterError(f"an adapter of version {version}: this build reads version {ADAPTER_VERSION}")
        _, _, named, dim, rank, scale = _HEAD.unpack_from(packed)
        size = 4 * dim * rank
        at = _HEAD.size + named
        if len(packed) != at + 2 * size or dim > DIM_MAX or rank > RANK_MAX:
            raise AdapterError(f"an adapter of {len(packed)} bytes does not fit its header: {dim} x {rank}")
        left, right = (
            np.frombuffer(packed, "<f4", dim * rank, start).reshape(dim, rank).copy() for start in (at, at + size)
        )
        return cls(packed[_HEAD.size : at].decode(), left, right, scale)
