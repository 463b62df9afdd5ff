"""A live A/B test of an adapter: which users' texts are compared through it, while all learn one model.

Users are split by a bucket, one byte of a hash of their id, which their examples carry. Each trial orders the 256
buckets anew, by a hash with a salt of its own: so one trial's challengers are spread over both arms of the next, but
users of one bucket stay together.
"""

import hashlib
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Literal, Self

import numpy as np
import numpy.typing as npt

from model.adapter import Adapter, AdapterError

TRIAL_VERSION: Final = 1
BUCKETS: Final = 256
Arm = Literal["champion", "challenger"]
ARMS: Final[tuple[Arm, Arm]] = ("champion", "challenger")

_HEAD = struct.Struct("<BBHfq")  # version, zeros, share, salt


@lru_cache(maxsize=1 << 16)
def bucket_of(user_id: str) -> int:
    """A user's bucket, of BUCKETS: a function of the id alone.

    >>> bucket_of("u1") == bucket_of("u1")
    True
    """
    return hashlib.blake2b(user_id.encode(), digest_size=1, person=b"headwater-split").digest()[0]


@dataclass(frozen=True)
class Trial:
    """The challenger (None: the encoder as it is), the share of the buckets that have it, and their salt."""

    adapter: Adapter | None
    share: float  # in (0, 1); whole buckets: at least one has it, and at least one has not
    salt: int  # offset of its message in the examples log, by which it is known, too

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", float(np.float32(self.share)))  # as it is stored
        if not 0 < self.share < 1:
            raise AdapterError(f"a trial's share of the users is above 0 and below 1, not {self.share}")

    @property
    def name(self) -> str:
        """Of the challenger's adapter; "" where it is the encoder as it is."""
        return "" if self.adapter is None else self.adapter.name

    @property
    def challengers(self) -> int:
        """Buckets that have the challenger, 1 to BUCKETS - 1."""
        return min(max(round(self.share * BUCKETS), 1), BUCKETS - 1)

    def arms(self) -> npt.NDArray[np.uint8]:
        """(BUCKETS,): 1 where a bucket's users have the challenger."""
        key = self.salt.to_bytes(8, "little", signed=True)
        drawn = [hashlib.blake2b(bytes([b]), key=key, digest_size=8).digest() for b in range(BUCKETS)]
        arms = np.zeros(BUCKETS, np.uint8)
        arms[sorted(range(BUCKETS), key=drawn.__getitem__)[: self.challengers]] = 1
        return arms

    def metric(self) -> npt.NDArray[Any]:
        """The challenger's (T, T); (0, 0) for the encoder as it is."""
        return np.zeros((0, 0), np.float32) if self.adapter is None else self.adapter.metric()

    def pack(self) -> bytes:
        """version u1 | zeros u1, u2 | share f4 | salt i8 | `Adapter.pack`, or nothing."""
        head = _HEAD.pack(TRIAL_VERSION, 0, 0, self.share, self.salt)
        return head + (b"" if self.adapter is None else self.adapter.pack())

    @classmethod
    def unpack(cls, packed: bytes) -> Self:
        """The trial of `pack`. Raises AdapterError."""
        if len(packed) < _HEAD.size or packed[0] != TRIAL_VERSION:
            version = packed[0] if packed else None
            raise AdapterError(f"a trial of version {version}: this build reads version {TRIAL_VERSION}")
        _, _, _, share, salt = _HEAD.unpack_from(packed)
        rest = packed[_HEAD.size :]
        return cls(Adapter.unpack(rest) if rest else None, share, salt)
