"""Vectors of texts kept on disk between runs, so that the second evaluation of a stream encodes nothing.

One file an encoder, append-only, records of one size: digest of the text 16 B | vector f4[dim]. A torn last record is
cut off by the next writer. Over its limit, the file is rewritten with its newer half.
"""

import fcntl
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

F4: TypeAlias = npt.NDArray[np.float32]

CACHE_BYTES_MAX: Final = 1 << 30  # 690,000 vectors of 384 dimensions
ENCODE_TEXTS_MAX: Final = 4096  # encoded between two appends: what an interrupted run loses at the most


class VectorCache:
    """Vectors by (encoder, text). Several processes may share a folder."""

    def __init__(self, folder: Path, encoder_name: str, dim: int, bytes_max: int = CACHE_BYTES_MAX) -> None:
        """encoder_name: of the model and its revision; vectors of another name are never given."""
        folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.blake2b(encoder_name.encode(), digest_size=8).hexdigest()
        self._path = folder / f"{name}-{dim}.vectors"
        self._record = np.dtype([("low", "<u8"), ("high", "<u8"), ("vector", "<f4", (dim,))])
        self._records_max = max(2, bytes_max // self._record.itemsize)
        self._path.touch()

    def encode(
        self,
        texts: Sequence[str],
        encode: Callable[[list[str]], F4],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> F4:
        """(len(texts), dim) float32: from the cache, or by `encode`, which sees each missing text once.

        progress: called with (texts done, texts in all).
        """
        keys = [_key(text) for text in texts]
        out = np.zeros((len(texts), self._record["vector"].shape[0]), np.float32)
        stored = self._read()
        index = {key: row for row, key in enumerate(zip(stored["low"].tolist(), stored["high"].tolist(), strict=True))}
        places: dict[tuple[int, int], list[int]] = {}
        for at, key in enumerate(keys):
            row = index.get(key)
            if row is None:
                places.setdefault(key, []).append(at)
            else:
                out[at] = stored["vector"][row]
        missing = list(places)
        done = len(texts) - sum(len(places[key]) for key in missing)
        progress(done, len(texts))
        for start in range(0, len(missing), ENCODE_TEXTS_MAX):
            block = missing[start : start + ENCODE_TEXTS_MAX]
            vectors = encode([texts[places[key][0]] for key in block])
            self._append(block, vectors)
            for key, vector in zip(block, vectors, strict=True):
                out[places[key]] = vector
                done += len(places[key])
            progress(done, len(texts))
        return out

    def __len__(self) -> int:
        return self._path.stat().st_size // self._record.itemsize

    def _read(self) -> npt.NDArray[Any]:
        count = len(self)
        if not count:
            return np.zeros(0, self._record)
        return np.memmap(self._path, self._record, "r", shape=(count,))

    def _append(self, keys: Sequence[tuple[int, int]], vectors: F4) -> None:
        records = np.zeros(len(keys), self._record)
        records["low"] = [low for low, _ in keys]
        records["high"] = [high for _, high in keys]
        records["vector"] = vectors
        with self._locked():
            with self._path.open("r+b") as file:
                file.truncate(len(self) * self._record.itemsize)
                file.seek(0, 2)
                file.write(records.tobytes())
            if len(self) > self._records_max:
                kept = np.array(self._read()[-(self._records_max // 2) :])
                fresh = self._path.with_suffix(".new")
                fresh.write_bytes(kept.tobytes())
                fresh.replace(self._path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def encode_in_blocks(
    texts: Sequence[str], encode: Callable[[list[str]], F4], dim: int, progress: Callable[[int, int], None]
) -> F4:
    """As `VectorCache.encode`, with nothing written anywhere; `encode` sees each text as often as it is there."""
    out = np.zeros((len(texts), dim), np.float32)
    for start in range(0, len(texts), ENCODE_TEXTS_MAX):
        block = list(texts[start : start + ENCODE_TEXTS_MAX])
        out[start : start + len(block)] = encode(block)
        progress(start + len(block), len(texts))
    return out


def _key(text: str) -> tuple[int, int]:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
