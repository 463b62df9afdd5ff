"""Another encoder's vectors, turned into the space of those that a deployment has: one orthonormal map.

Vectors of two encoders cannot be compared. Where both have read the same texts, the map A with orthonormal rows or
columns that brings the new vectors nearest to the old ones,

    min_A sum_i |x_i A - e_i|^2,  A = U V',  U S V' = svd(X' E)     (orthogonal Procrustes; Schoenemann 1966)

leaves angles between new vectors as they are where it does not shorten them (T' <= T): after a move the new encoder's
own geometry counts, in a space in which all that was learnt behind the old one (phi, y, the map of users to texts, the
words of users) still means what it meant. Used so between languages by Xing et al. 2015 and Smith et al. 2017.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import safetensors.numpy

Array = npt.NDArray[Any]

ALIGNMENT_VERSION: Final = 1
MANIFEST: Final = "alignment.json"
WEIGHTS: Final = "alignment.safetensors"
HELD_OUT: Final = 10  # one text in so many is not fitted, and tells the error
PAIRS_MIN: Final = 200  # different texts that both have read, whatever the dimensions: 20 of them are held out
NEIGHBOURS: Final = 10
PROBES_MAX: Final = 1000  # texts whose neighbours are compared, among all that are held out


class AlignmentError(ValueError):
    """Vectors that no map can be fitted to, or a folder that holds none."""


@dataclass(frozen=True)
class Fidelity:
    """How well a map does on texts that it was not fitted to."""

    texts: int  # fitted, all different
    held_out: int
    cosine: float  # mean, of a text's old vector and its new one behind the map
    cosine_others: float  # mean, of a text's old vector and another text's new one: what chance gives
    neighbours: float  # share of an old vector's 10 nearest held-out texts that are the same where those have new ones
    neighbours_new: float  # the same where its own vector is new, too: how far the two encoders agree at all

    @property
    def neighbours_chance(self) -> float:
        """What `neighbours` would be of two encoders that have nothing in common."""
        return NEIGHBOURS / (self.held_out - 1)


@dataclass(frozen=True)
class Alignment:
    """A model behind which a map stands: together an encoder of another one's space."""

    model: str  # what HEADWATER_ENCODER would say; a relative path is one below the alignment's folder
    of: str  # name of the encoder that is aligned
    to: str  # name of the encoder whose space it is
    matrix: Array  # (T', T) float32, orthonormal along the shorter side
    fidelity: Fidelity | None = None

    @property
    def digest(self) -> bytes:
        """16 bytes of the map and of the space that it leads to."""
        told = f"{self.to} {self.matrix.shape}".encode()
        return hashlib.blake2b(told + self.matrix.astype("<f4").tobytes(), digest_size=16).digest()

    def write(self, folder: Path) -> None:
        """Writes it into the folder, the manifest last: a folder without one is no alignment."""
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.numpy.save_file({"matrix": np.ascontiguousarray(self.matrix, np.float32)}, folder / WEIGHTS)
        fidelity = None if self.fidelity is None else asdict(self.fidelity)
        told = {"version": ALIGNMENT_VERSION, "model": self.model, "of": self.of, "to": self.to, "fidelity": fidelity}
        half_written = folder / (MANIFEST + ".new")
        half_written.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        half_written.replace(folder / MANIFEST)

    @classmethod
    def read(cls, folder: Path) -> "Alignment":
        """The one of a folder. Raises AlignmentError."""
        try:
            told = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            if told["version"] != ALIGNMENT_VERSION:
                raise AlignmentError(f"{folder}: an alignment of version {told['version']}; this build reads 1")
            matrix = safetensors.numpy.load_file(folder / WEIGHTS)["matrix"]
            fidelity = Fidelity(**told["fidelity"]) if told["fidelity"] else None
            return cls(told["model"], told["of"], told["to"], matrix, fidelity)
        except (OSError, KeyError, TypeError, json.JSONDecodeError, safetensors.SafetensorError) as problem:
            raise AlignmentError(f"{folder} holds no alignment that can be read: {problem!r}") from problem


def is_aligned(folder: Path) -> bool:
    """Whether the folder is an alignment's."""
    return (folder / MANIFEST).is_file()


def fit(old: Array, new: Array, texts: Sequence[str]) -> tuple[Array, Fidelity]:
    """The map (T', T) float32 from the unit vectors `new` (n, T') to `old` (n, T) of the n texts, and its fidelity.

    A tenth of the texts, by their hashes, is held out for the latter; of equal texts the first counts. Raises
    AlignmentError for fewer different ones than PAIRS_MIN, or than the shorter vectors have numbers: with less the map
    is not determined.
    """
    assert len(old) == len(new) == len(texts)
    first: dict[bytes, int] = {}
    for at, text in enumerate(texts):
        first.setdefault(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest(), at)
    wanted = max(PAIRS_MIN, min(old.shape[1], new.shape[1]))
    if len(first) < wanted:
        raise AlignmentError(
            f"{len(first)} different texts with vectors of both encoders: a map takes {wanted} at least"
        )
    order = [first[digest] for digest in sorted(first)]
    old, new, told = old[order], new[order], np.arange(len(order)) >= len(order) // HELD_OUT
    left, _, right = np.linalg.svd(new[told].astype(np.float64).T @ old[told].astype(np.float64), full_matrices=False)
    matrix = np.ascontiguousarray(left @ right, np.float32)
    return matrix, _fidelity(old, new, matrix, told)


def apply(matrix: Array, vector: Array) -> Array:
    """(T,) float64, not normalised: one vector (T',) behind the map. One at a time: in a batch the last bits would
    depend on what else is there."""
    moved: Array = vector.astype(np.float64) @ matrix.astype(np.float64)
    return moved


def _fidelity(old: Array, new: Array, matrix: Array, told: Array) -> Fidelity:
    old, moved = old[~told], _units(new[~told].astype(np.float32) @ matrix)
    cosine = (old * moved).sum(axis=1).mean()
    others = (old * np.roll(moved, 1, axis=0)).sum(axis=1).mean()
    plain, crossed, both = _nearest(old, old), _nearest(old, moved), _nearest(moved, moved)
    return Fidelity(
        int(told.sum()), len(old), float(cosine), float(others), _overlap(plain, crossed), _overlap(plain, both)
    )


def _units(vectors: Array) -> Array:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    units: Array = vectors / np.maximum(norms, 1e-12)
    return units


def _nearest(probes: Array, among: Array) -> Array:
    """(n, NEIGHBOURS) places of the nearest in `among` to each of the first n <= PROBES_MAX `probes`, but its own."""
    score = probes[:PROBES_MAX] @ among.T
    np.fill_diagonal(score, -np.inf)
    nearest: Array = np.argpartition(-score, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]
    return nearest


def _overlap(a: Array, b: Array) -> float:
    return float(np.mean([len(set(x) & set(y)) / NEIGHBOURS for x, y in zip(a.tolist(), b.tolist(), strict=True)]))
