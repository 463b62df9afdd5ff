"""Rows and messages sealed at rest: AES-256-GCM for what they hold, pseudonyms for whose they are.

    sealed    version u1 (0x81) | root id [4] | key id [4] | nonce [12] | ciphertext, with its tag [16]

A data key is 32 random bytes; its id is a digest of it. Of a ring of them the first, the root, makes the pseudonyms and
never changes, one seals, and all open: so a new key is taken into use without writing old rows anew. Keys of each
purpose are derived by HKDF (RFC 5869).

State is a function of the logs, so sealing has to be one too: the nonce is not drawn but made of what is sealed, a
keyed blake2b of it (as SIV does, RFC 5297). The same bytes then give the same ciphertext, which tells no more than that
nothing has changed. Different bytes must not meet in a nonce: each row key has an AES and a nonce key of its own,
derived from the data key, so that only versions of one row can meet, with 2^32 of them one chance in 2^33.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any, Final, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from state.partition import Partition

SEALED_VERSION: Final = 0x81  # a plain row or message begins with a version below 0x80
DATA_KEY_BYTES: Final = 32
KEY_ID_BYTES: Final = 4
NONCE_BYTES: Final = 12
PSEUDONYM_BYTES: Final = 16
AES_KEY_BYTES: Final = 32
HEAD_BYTES: Final = 1 + 2 * KEY_ID_BYTES + NONCE_BYTES

GetMany = Callable[[list[bytes]], list[bytes | None]]


class SealError(Exception):
    """What is sealed cannot be opened with these keys, or what is plain was met where all has to be sealed."""


def key_id(data_key: bytes) -> bytes:
    """The name of a data key; it tells nothing of it."""
    return blake2b(data_key, digest_size=KEY_ID_BYTES, person=b"headwater-key-id").digest()


def derive(data_key: bytes, purpose: str) -> bytes:
    """The key of one purpose, 32 bytes."""
    return HKDF(SHA256(), AES_KEY_BYTES, salt=None, info=f"headwater {purpose}".encode()).derive(data_key)


class Sealer:
    """Seals with one key of the ring and opens with any. From any thread."""

    def __init__(self, ring: Sequence[bytes], sealing: int = -1) -> None:
        """ring: data keys, the root first; sealing: index of the one that seals."""
        assert ring and all(len(key) == DATA_KEY_BYTES for key in ring)
        self.audit_key = derive(ring[0], "audit")
        self._pseudonym_key = derive(ring[0], "pseudonyms")
        self._root_id = key_id(ring[0])
        self._keys = {key_id(key): derive(key, "rows") for key in ring}
        self._sealing_id = key_id(ring[sealing])
        self._head = bytes([SEALED_VERSION]) + self._root_id + self._sealing_id

    def pseudonym(self, key: bytes) -> bytes:
        """The row key under which a key's row is kept."""
        return blake2b(key, key=self._pseudonym_key, digest_size=PSEUDONYM_BYTES).digest()

    def seal(self, key: bytes, plain: bytes) -> bytes:
        """The bytes sealed for the row key `key`; the same ones each time."""
        aes, nonce_key = self._keys_of(self._sealing_id, key)
        nonce = blake2b(plain, key=nonce_key, digest_size=NONCE_BYTES).digest()
        return self._head + nonce + AESGCM(aes).encrypt(nonce, plain, self._head + key)

    def open(self, key: bytes, sealed: bytes) -> bytes:
        """What was sealed for the row key `key`. Raises SealError."""
        if sealed[:1] != bytes([SEALED_VERSION]) or len(sealed) < HEAD_BYTES:
            raise SealError(
                "a plain row lies where rows are sealed: this state was learnt without data keys; unset them, or use "
                "an app id and a state folder of its own, which learns the logs anew"
            )
        root, used = sealed[1 : 1 + KEY_ID_BYTES], sealed[1 + KEY_ID_BYTES : 1 + 2 * KEY_ID_BYTES]
        if root != self._root_id:
            raise SealError(f"a row's key was made by the root key {root.hex()}: it has to be the first of the ring")
        if used not in self._keys:
            raise SealError(f"a row is sealed by the data key {used.hex()}, which is not in the ring: put it back")
        aes, _ = self._keys_of(used, key)
        head, nonce = sealed[: HEAD_BYTES - NONCE_BYTES], sealed[HEAD_BYTES - NONCE_BYTES : HEAD_BYTES]
        try:
            return AESGCM(aes).decrypt(nonce, sealed[HEAD_BYTES:], head + key)
        except InvalidTag:
            raise SealError("a sealed row was changed, or belongs to another key") from None

    def _keys_of(self, used: bytes, key: bytes) -> tuple[bytes, bytes]:
        both = blake2b(key, key=self._keys[used], digest_size=2 * AES_KEY_BYTES).digest()
        return both[:AES_KEY_BYTES], both[AES_KEY_BYTES:]

    # -- as a store keeps them

    def seal_rows(self, rows: Mapping[bytes, bytes | None]) -> dict[bytes, bytes | None]:
        """{pseudonym: sealed row} of {key: row}; None stays None."""
        named = ((self.pseudonym(key), row) for key, row in rows.items())
        return {key: None if row is None else self.seal(key, row) for key, row in named}

    def open_rows(self, rows: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
        """(pseudonym, row) of (pseudonym, sealed row)."""
        return ((key, self.open(key, row)) for key, row in rows)

    def get_many(self, read: GetMany, keys: Sequence[bytes]) -> list[bytes | None]:
        """The rows of `keys` out of what `read` has under their pseudonyms."""
        named = [self.pseudonym(key) for key in keys]
        rows = zip(named, read(named), strict=True)
        return [None if row is None else self.open(key, row) for key, row in rows]

    def seal_message(self, message: bytes) -> bytes:
        """A message of a log, which has no key of its own."""
        return self.seal(b"", message)

    def open_message(self, message: bytes) -> bytes:
        """What a message says, sealed or plain. Raises SealError."""
        return self.open(b"", message) if is_sealed(message) else message


class Rows(Protocol):
    """What rows are read from and written to."""

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The rows of `keys`, in their order; None where there is none."""

    def write(self, rows: Mapping[bytes, bytes | None]) -> None:
        """Keeps them; None deletes."""

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """(key, row) in key order."""


class SealedRows:
    """Rows over others that keep them as `SealedPartition` does."""

    def __init__(self, rows: Rows, sealer: Sealer) -> None:
        self._rows = rows
        self._sealer = sealer

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """`Rows.get_many`. Raises SealError."""
        return self._sealer.get_many(self._rows.get_many, keys)

    def write(self, rows: Mapping[bytes, bytes | None]) -> None:
        """`Rows.write`."""
        self._rows.write(self._sealer.seal_rows(rows))

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """`Rows.items`, by pseudonym. Raises SealError."""
        return self._sealer.open_rows(self._rows.items())


def is_sealed(value: bytes) -> bool:
    """Whether a row or message is sealed."""
    return value[:1] == bytes([SEALED_VERSION])


class SealedPartition(Partition):
    """A partition whose disk, changelog and outbox see pseudonyms and sealed bytes; its callers see what it means.

    The keys of `items` and `snapshot`, and so their order and the digest's, are the pseudonyms.
    """

    def __init__(self, sealer: Sealer, **given: Any) -> None:
        """given: what `Partition` takes."""
        super().__init__(**given)
        self.sealer = sealer

    def stored_key(self, key: bytes) -> bytes:
        """`Partition.stored_key`: the pseudonym."""
        return self.sealer.pseudonym(key)

    async def flush(
        self,
        rows: Mapping[bytes, bytes | None],
        downstream: Sequence[tuple[bytes, bytes]],
        applied: Mapping[str, int],
    ) -> None:
        """`Partition.flush`, sealed."""
        sealed = [(key, self.sealer.seal_message(message)) for key, message in downstream]
        await super().flush(self.sealer.seal_rows(rows), sealed, applied)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """`Partition.get_many`. Raises SealError."""
        return self.sealer.get_many(super().get_many, keys)

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """`Partition.items`, by pseudonym. Raises SealError."""
        return self.sealer.open_rows(super().items())

    def snapshot(self) -> tuple[dict[str, int], Iterator[tuple[bytes, bytes]]]:
        """`Partition.snapshot`, by pseudonym. Raises SealError."""
        applied, rows = super().snapshot()
        return applied, self.sealer.open_rows(rows)
