"""The item matrix: everything that is known about every item, in arrays that grow by doubling.

The learner owns one; every worker keeps a replica by applying the rows that the learner gives out. Row formats
(little endian, version 3); a key is the kind's letter and the item key, i8:

    every item row   header 16 B   version u1 | kind u1 | flags u1 (s alone) | zero u1 | row i4 | item key i8
    s  static        header | id bytes u2 | text bytes u2 | dims u4 | id | text | vector f2[dims]
    d  dense         header | record 64 B (kernels.RECORD) | phi f4[D] | y f4[D]
    n  neighbours    header | rows i4[n] | C_kj f4[n]
    p  pending       header (row: -1) | ts f8 | order i8 | id bytes u2 | text bytes u2 | dims u4 | id | text | vector
                     deleted when the item becomes a candidate
    m  text map      header (row, item key: the head, 0-4) | accumulators f4[n] | M's rows f4[n, T]; n = D, of head 4: 1
    g  globals       version u1 | kind u1 | zero u2 | D u4 | T u4 | M u4 | scalars f8[16] | theta f4[325]
                     | its accumulators f4[325] | gains f4[15] | courses f4[15] | mu f4[T] | context f4[18, D]
                     | its accumulators f4[18]                  (one row, key "g")
    a  adapter       as `Adapter.pack` has it       (one row, key "a"; deleted when texts are compared as they are)
    b  trial         as `Trial.pack` has it         (one row, key "b"; deleted when the trial ends)

Text vectors are rounded to half precision on entry, so that memory equals what is stored.
"""

import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from model import kernels
from model.adapter import Adapter, AdapterError
from model.kernels import Matrix
from model.trial import ARMS, BUCKETS, Arm, Trial

Array = npt.NDArray[Any]

ROW_VERSION: Final = 3
TEXT_CHARS_MAX: Final = 512  # of the text that is kept to be shown
ID_BYTES_MAX: Final = 65_535
CAPACITY_START: Final = 1024

STATIC, DENSE, NEIGHBOURS, PENDING, MAP, GLOBALS, ADAPTER, TRIAL = (
    b"s", b"d", b"n", b"p", b"m", b"g", b"a", b"b"
)  # fmt: skip
KINDS: Final = frozenset((STATIC, DENSE, NEIGHBOURS, PENDING, MAP, GLOBALS, ADAPTER, TRIAL))

_KEY = struct.Struct("<cq")
_HEADER = struct.Struct("<BcBxiq")
_TEXTS = struct.Struct("<HHI")
_WAIT = struct.Struct("<dq")
_GLOBALS = struct.Struct("<BcxxIII")
GLOBAL_ARRAYS: Final = ("scalar", "theta", "square", "gain", "course", "mu", "context", "context_square")  # in the row
HEADER_BYTES: Final = _HEADER.size
NEIGHBOUR_BYTES: Final = 8

assert HEADER_BYTES == 16 and _GLOBALS.size == 16


class RowVersionError(ValueError):
    """A stored item row is of a version that this build does not read."""


@dataclass(frozen=True, slots=True)
class PendingItem:
    """An item that waits until the log's clock passes its ts."""

    key: int
    item_id: str
    text: str
    vector: Array  # (T,) float32, half-precision values
    ts: float  # Unix s
    order: int  # of entry; breaks ties of ts


def row_key(kind: bytes, key: int) -> bytes:
    """The storage key of an item's row of this kind.

    >>> row_key(DENSE, 1)
    b'd\\x01\\x00\\x00\\x00\\x00\\x00\\x00\\x00'
    """
    return _KEY.pack(kind, key)


def half(vector: Array) -> Array:
    """(T,) float32 rounded to half precision."""
    return vector.astype(np.float16).astype(np.float32)


def _check_version(version: int, name: str) -> None:
    if version != ROW_VERSION:
        raise RowVersionError(
            f"item {name}: row is v{version}, this build reads v{ROW_VERSION}; deploy the build that wrote it, "
            "or rebuild the item state from the examples log"
        )


class ItemMatrix:
    """N items: id, text, text vector e (T,), learnt phi and y (D,), record, up to M neighbours; mu and the scalars.

    A row's index is the order in which items became candidates or were first named by an example; it never changes.
    Not safe for concurrent use: apply rows and rank from one thread, or under one lock.
    """

    def __init__(self, dim: int = 64, text_dim: int = 384, neighbours_max: int = 256) -> None:
        self.dim, self.text_dim, self.neighbours_max = dim, text_dim, neighbours_max
        self.names: list[str] = []  # item id a row; "" for a stub
        self.texts: list[str] = []
        self.pending: dict[int, PendingItem] = {}
        self.adapter: Adapter | None = None
        self.trial: Trial | None = None
        self.version = 0  # grows with every change through this class
        self.dense = np.dtype(
            [("header", "V16"), ("rec", kernels.RECORD), ("phi", "<f4", (dim,)), ("y", "<f4", (dim,))]
        )
        self._project = _orthonormal(dim, text_dim)
        self.record_bytes = (HEADER_BYTES, self.dense.itemsize, NEIGHBOUR_BYTES)
        self.arrays = self._allocate(CAPACITY_START)

    def _allocate(self, capacity: int) -> Matrix:
        theta = np.zeros(kernels.THETA, np.float32)
        theta[: kernels.T_TEXT] = (0.3, 0.1, 0, 0.3, -0.3, -0.3, 0, 0, 0, 0, 0)
        theta[kernels.T_TEXT : kernels.T_NEIGHBOUR] = 1
        theta[kernels.T_NEIGHBOUR] = 2
        decay = (1 + np.array(kernels.AGE_MIDS)) ** -0.5
        theta[kernels.T_AGE : kernels.T_GAP] = theta[kernels.T_AGE_K : kernels.T_GAP_K] = decay
        theta[kernels.T_GAP : kernels.T_AGE_K] = theta[kernels.T_GAP_K : kernels.T_SINCE] = 1
        scalar = np.zeros(kernels.SCALARS, np.float64)
        scalar[kernels.CLOCK] = -1
        scalar[kernels.SHARP] = 1
        scalar[kernels.SHARP_SQUARE] = kernels.SQUARE_START
        return Matrix(
            key=np.zeros(capacity, np.int64),
            flags=np.zeros(capacity, np.uint8),
            rec=np.zeros(capacity, kernels.RECORD),
            phi=np.zeros((capacity, self.dim), np.float32),
            y=np.zeros((capacity, self.dim), np.float32),
            e=np.zeros((capacity, self.text_dim), np.float32),
            neighbour=np.zeros((capacity, self.neighbours_max), np.int32),
            weight=np.zeros((capacity, self.neighbours_max), np.float32),
            length=np.zeros(capacity, np.int32),
            mu=np.zeros(self.text_dim, np.float32),
            metric=np.zeros((0, 0), np.float32),
            rival=np.zeros((0, 0), np.float32),
            arm=np.zeros(BUCKETS, np.uint8),
            theta=theta,
            square=np.full(kernels.THETA, kernels.SQUARE_START, np.float32),
            gain=np.ones(kernels.COEFFICIENTS, np.float32),
            course=np.zeros(kernels.COEFFICIENTS, np.float32),
            context=np.zeros((kernels.CONTEXTS, self.dim), np.float32),
            context_square=np.full(kernels.CONTEXTS, kernels.CONTEXT_SQUARE_START, np.float32),
            map=np.zeros((4 * self.dim + 1, self.text_dim), np.float32),
            map_square=np.full(4 * self.dim + 1, kernels.SQUARE_START, np.float32),
            map_dirty=np.zeros(kernels.HEADS, np.uint8),
            project=self._project,
            scalar=scalar,
            table_key=np.zeros(4 * capacity, np.int64),
            table_row=np.full(4 * capacity, -1, np.int32),
            dirty=np.zeros(capacity, np.uint8),
            dirty_row=np.zeros(capacity, np.int32),
            dirty_total=np.zeros(2, np.int64),
        )

    def __len__(self) -> int:
        """Rows, stubs and withdrawn ones among them."""
        return int(self.arrays.scalar[kernels.ROWS])

    @property
    def active_count(self) -> int:
        """Candidates."""
        return int(self.arrays.scalar[kernels.ACTIVES])

    @property
    def clock(self) -> float:
        """Highest event time learnt, Unix s; -1 before the first."""
        return float(self.arrays.scalar[kernels.CLOCK])

    @property
    def positives(self) -> int:
        """Positives learnt."""
        return int(self.arrays.scalar[kernels.STEP])

    def index(self, key: int) -> int:
        """Row of an item key, or -1."""
        return int(kernels.find(self.arrays.table_key, self.arrays.table_row, np.int64(key)))

    def indices(self, keys: Array) -> Array:
        """(n,) int32 rows of (n,) int64 keys, -1 where unknown."""
        out = np.empty(len(keys), np.int32)
        kernels.find_many(self.arrays.table_key, self.arrays.table_row, keys, out)
        return out

    def is_active(self, row: int) -> bool:
        """Whether the row is a candidate."""
        return bool(self.arrays.flags[row] & kernels.ACTIVE)

    def reserve(self, rows: int) -> None:
        """Makes room for this many rows."""
        capacity = len(self.arrays.key)
        if rows <= capacity:
            return
        while capacity < rows:
            capacity *= 2
        old, used = self.arrays, len(self.names)
        new = self._allocate(capacity)
        for name in ("key", "flags", "rec", "phi", "y", "e", "neighbour", "weight", "length", "dirty", "dirty_row"):
            getattr(new, name)[:used] = getattr(old, name)[:used]
        kernels.fill_table(new.table_key, new.table_row, new.key, 0, used)
        shared = ("metric", "rival", "arm", "map", "map_square", "map_dirty", "dirty_total", *GLOBAL_ARRAYS)
        self.arrays = new._replace(**{name: getattr(old, name) for name in shared})

    def add_row(self, key: int) -> int:
        """A new stub: no id, no text, phi = y = 0, no candidate. The key must be unknown."""
        row = len(self)
        self.reserve(row + 1)
        self._init_row(row, key)
        self.arrays.scalar[kernels.ROWS] = row + 1
        return row

    def _init_row(self, row: int, key: int) -> None:
        m = self.arrays
        m.key[row] = key
        m.neighbour[row], m.weight[row] = 0, 0  # an item's memory is taken at once, not as its neighbours come
        r = m.rec[row]
        r["square_beta"] = r["square_phi"] = r["square_y"] = kernels.SQUARE_START
        r["damping"] = 1
        r["last_step"] = -1
        kernels.fill_table(m.table_key, m.table_row, m.key, row, row + 1)
        self.names.append("")
        self.texts.append("")
        self.mark(row, kernels.DIRTY_STATIC | kernels.DIRTY_DENSE)

    def describe(self, row: int, item_id: str, text: str, vector: Array) -> None:
        """Sets id, text and vector (half-precision values; all zeros: none) of a row."""
        m = self.arrays
        self.names[row] = item_id
        self.texts[row] = text
        m.e[row] = vector
        m.flags[row] = (int(m.flags[row]) & ~kernels.VECTOR) | kernels.KNOWN
        if vector.any():
            m.flags[row] |= kernels.VECTOR
        self.mark(row, kernels.DIRTY_STATIC)

    def adapt(self, adapter: Adapter | None) -> None:
        """Compares texts through this adapter from now on; None: as the encoder gives them. Raises AdapterError."""
        self._require_dim(adapter)
        self.adapter = adapter
        metric = np.zeros((0, 0), np.float32) if adapter is None else adapter.metric()
        self.arrays = self.arrays._replace(metric=metric)
        self.version += 1

    def try_out(self, trial: Trial | None) -> None:
        """Compares the texts of the trial's challengers through its adapter from now on; None: no trial is on. Raises
        AdapterError."""
        if trial is not None:
            self._require_dim(trial.adapter)
        self.trial = trial
        rival, arm = (
            (np.zeros((0, 0), np.float32), np.zeros(BUCKETS, np.uint8))
            if trial is None
            else (trial.metric(), trial.arms())
        )
        self.arrays = self.arrays._replace(rival=rival, arm=arm)
        self.version += 1

    def _require_dim(self, adapter: Adapter | None) -> None:
        if adapter is not None and adapter.dim != self.text_dim:
            raise AdapterError(f"an adapter of {adapter.dim} dimensions, texts have {self.text_dim}")

    def metric_of(self, bucket: int) -> Array:
        """What the texts of a user of this bucket are compared through; (0, 0): as they are."""
        return self.arrays.rival if self.arrays.arm[bucket] else self.arrays.metric

    def arm_of(self, bucket: int) -> Arm | None:
        """champion or challenger, of a user of this bucket; None: no trial is on."""
        return None if self.trial is None else ARMS[self.arrays.arm[bucket]]

    def mark(self, row: int, bits: int) -> None:
        """Marks records of a row as changed."""
        kernels.mark(self.arrays, row, bits, self.record_bytes)
        self.version += 1

    def take_over(self, other: "ItemMatrix") -> None:
        """Becomes the other, which is not to be used any more: whoever reads this one sees it whole, from now on."""
        version = self.version + other.version + 1
        self.__dict__.update(other.__dict__)
        self.version = version

    # --- rows out ---

    def _header(self, kind: bytes, row: int) -> bytes:
        m = self.arrays
        flags = int(m.flags[row]) if kind == STATIC else 0
        return _HEADER.pack(ROW_VERSION, kind, flags, row, int(m.key[row]))

    def pack_static(self, rows: Sequence[int]) -> Iterator[tuple[bytes, bytes]]:
        """Static rows of these items."""
        m = self.arrays
        for row in rows:
            vector = m.e[row] if m.flags[row] & kernels.VECTOR else m.e[row][:0]
            body = _pack_texts(self.names[row], self.texts[row], vector)
            yield row_key(STATIC, int(m.key[row])), self._header(STATIC, row) + body

    def pack_dense(self, rows: Array) -> Iterator[tuple[bytes, bytes]]:
        """Dense rows of these items, packed together."""
        m = self.arrays
        block = np.zeros(len(rows), self.dense)
        block["rec"], block["phi"], block["y"] = m.rec[rows], m.phi[rows], m.y[rows]
        packed, size = block.tobytes(), self.dense.itemsize
        for at, row in enumerate(rows.tolist()):
            body = packed[at * size + HEADER_BYTES : (at + 1) * size]
            yield row_key(DENSE, int(m.key[row])), self._header(DENSE, row) + body

    def pack_neighbours(self, rows: Sequence[int]) -> Iterator[tuple[bytes, bytes]]:
        """Neighbour rows of these items."""
        m = self.arrays
        for row in rows:
            n = m.length[row]
            body = m.neighbour[row, :n].tobytes() + m.weight[row, :n].tobytes()
            yield row_key(NEIGHBOURS, int(m.key[row])), self._header(NEIGHBOURS, row) + body

    def pack_pending(self, item: PendingItem) -> tuple[bytes, bytes]:
        """The row of an item that waits."""
        header = _HEADER.pack(ROW_VERSION, PENDING, 0, -1, item.key)
        vector = item.vector if item.vector.any() else item.vector[:0]
        body = _pack_texts(item.item_id, item.text, vector)
        return row_key(PENDING, item.key), header + _WAIT.pack(item.ts, item.order) + body

    def pack_maps(self, heads: Sequence[int]) -> Iterator[tuple[bytes, bytes]]:
        """The rows of these heads of M."""
        m = self.arrays
        for head in heads:
            part = slice(head * self.dim, (head + 1) * self.dim)
            header = _HEADER.pack(ROW_VERSION, MAP, 0, head, head)
            yield row_key(MAP, head), header + m.map_square[part].tobytes() + m.map[part].tobytes()

    def pack_globals(self) -> tuple[bytes, bytes]:
        """The one row of mu and the scalars."""
        m = self.arrays
        head = _GLOBALS.pack(ROW_VERSION, GLOBALS, self.dim, self.text_dim, self.neighbours_max)
        return GLOBALS, head + b"".join(getattr(m, name).tobytes() for name in GLOBAL_ARRAYS)

    def pack_adapter(self) -> tuple[bytes, bytes | None]:
        """The one row of the adapter; None where there is none."""
        return ADAPTER, None if self.adapter is None else self.adapter.pack()

    def pack_trial(self) -> tuple[bytes, bytes | None]:
        """The one row of the trial; None where none is on."""
        return TRIAL, None if self.trial is None else self.trial.pack()

    def rows(self) -> Iterator[tuple[bytes, bytes]]:
        """Every row of the whole state; `apply` of them all makes an equal matrix."""
        everything = np.arange(len(self))
        for start in range(0, len(self), 4096):
            part = everything[start : start + 4096]
            yield from self.pack_static(part.tolist())
            yield from self.pack_dense(part)
            yield from self.pack_neighbours(part[self.arrays.length[part] > 0].tolist())
        for key in sorted(self.pending):
            yield self.pack_pending(self.pending[key])
        changed = np.flatnonzero(self.arrays.map.any(axis=1))
        yield from self.pack_maps(np.unique(changed // self.dim).tolist())
        yield self.pack_globals()
        if self.adapter is not None:
            yield ADAPTER, self.adapter.pack()
        if self.trial is not None:
            yield TRIAL, self.trial.pack()

    def digest(self) -> str:
        """blake2b (16 bytes, hex) over all rows in key order: a function of the state alone, not of how it was
        flushed or restored."""
        digest = hashlib.blake2b(digest_size=16)
        for key, value in sorted(self.rows()):
            digest.update(struct.pack("<II", len(key), len(value)) + key + value)
        return digest.hexdigest()

    # --- rows in ---

    def apply(self, rows: Iterable[tuple[bytes, bytes | None]]) -> int:
        """`arrange`, then `take`. Returns how many rows there were."""
        arranged = self.arrange(rows)
        self.take(arranged)
        return arranged.total

    def arrange(self, rows: Iterable[tuple[bytes, bytes | None]]) -> "Arranged":
        """Rows as `rows` and the learner give them out, in their order, ready for `take`: what can be done with them
        while the matrix is read. Rows of different kinds may come in any order.

        Raises RowVersionError for another version, ValueError for rows of a matrix of other dimensions.
        """
        dense, words = bytearray(), bytearray()
        sizes: list[int] = []
        others: list[tuple[bytes, bytes | None]] = []
        count = 0
        for key, value in rows:
            count += 1
            kind = key[:1]
            if kind not in KINDS:
                raise ValueError(f"item row {key!r}: no such kind")
            if value is not None and kind not in (ADAPTER, TRIAL):
                _check_version(value[0], repr(key))
            if kind == DENSE and value is not None:
                if len(value) != self.dense.itemsize:
                    raise ValueError(f"a dense item row is not {self.dense.itemsize} bytes long: of another dimension")
                dense += value
            elif kind == NEIGHBOURS and value is not None:
                words += value
                sizes.append(len(value) // 4)
            else:
                others.append((key, value))
        return Arranged(
            count, others, np.frombuffer(dense, self.dense), np.frombuffer(words, np.int32), np.array(sizes, np.int64)
        )

    def take(self, arranged: "Arranged") -> None:
        """Takes rows in. None deletes a pending item. Rows of other kinds are never deleted: where a changelog does
        so, it takes back a row of a flush that was never complete, which nobody has."""
        for key, value in arranged.others:
            self._apply_other(key, value)
        self._apply_dense(arranged.dense)
        self._apply_neighbours(arranged.words, arranged.sizes)
        self.version += 1

    def _apply_other(self, key: bytes, value: bytes | None) -> None:
        kind = key[:1]
        if kind == ADAPTER:
            self.adapt(None if value is None else Adapter.unpack(value))
        elif kind == TRIAL:
            self.try_out(None if value is None else Trial.unpack(value))
        elif value is None:
            if kind == PENDING:
                self.pending.pop(_KEY.unpack(key)[1], None)
        elif kind == STATIC:
            self._apply_static(value)
        elif kind == PENDING:
            self._apply_pending(value)
        elif kind == MAP:
            self._apply_map(value)
        else:
            assert kind == GLOBALS, kind
            self._apply_globals(value)

    def _apply_static(self, value: bytes) -> None:
        _, _, flags, row, key = _HEADER.unpack_from(value)
        item_id, text, vector = _unpack_texts(value, HEADER_BYTES, self.text_dim)
        self._open_rows(row + 1)
        m = self.arrays
        if m.key[row] != key:
            if m.key[row] != 0:
                raise ValueError(f"item {item_id!r}: row {row} belongs to another item; rebuild the replica")
            m.key[row] = key
            kernels.fill_table(m.table_key, m.table_row, m.key, row, row + 1)
        m.flags[row] = flags
        m.e[row] = vector
        self.names[row], self.texts[row] = item_id, text

    def _open_rows(self, rows: int) -> None:
        """Makes rows exist; those that were skipped are filled by rows that are still to come."""
        if rows <= len(self.names):
            return
        self.reserve(rows)
        missing = rows - len(self.names)
        self.names.extend([""] * missing)
        self.texts.extend([""] * missing)

    def _apply_pending(self, value: bytes) -> None:
        key = _HEADER.unpack_from(value)[4]
        ts, order = _WAIT.unpack_from(value, HEADER_BYTES)
        item_id, text, vector = _unpack_texts(value, HEADER_BYTES + _WAIT.size, self.text_dim)
        self.pending[key] = PendingItem(key, item_id, text, vector, ts, order)

    def _apply_globals(self, value: bytes) -> None:
        dims = _GLOBALS.unpack_from(value)[2:]
        if dims != (self.dim, self.text_dim, self.neighbours_max):
            raise ValueError(
                f"item state of dimensions (phi, text, neighbours) {dims}, this worker is set to "
                f"{(self.dim, self.text_dim, self.neighbours_max)}: set them alike, or rebuild the state from the log"
            )
        m, at = self.arrays, _GLOBALS.size
        for name in GLOBAL_ARRAYS:
            part = getattr(m, name)
            part[:] = np.frombuffer(value, part.dtype, part.size, at).reshape(part.shape)
            at += part.nbytes
        self._open_rows(len(self))

    def _apply_map(self, value: bytes) -> None:
        head = _HEADER.unpack_from(value)[3]
        m, part = self.arrays, slice(head * self.dim, (head + 1) * self.dim)
        n = len(m.map_square[part])
        numbers = np.frombuffer(value, np.float32, offset=HEADER_BYTES)
        if len(numbers) != n * (1 + self.text_dim):
            raise ValueError(f"text map row {head} is of {len(value)} bytes: of another dimension")
        m.map_square[part] = numbers[:n]
        m.map[part] = numbers[n:].reshape(n, self.text_dim)

    def _apply_dense(self, block: Array) -> None:
        if not len(block):
            return
        rows = np.ndarray((len(block),), np.int32, block, 4, (self.dense.itemsize,))
        self._open_rows(int(rows.max()) + 1)
        m = self.arrays
        m.rec[rows], m.phi[rows], m.y[rows] = block["rec"], block["phi"], block["y"]

    def _apply_neighbours(self, words: Array, sizes: Array) -> None:
        if not len(sizes):
            return
        starts = np.cumsum(sizes) - sizes
        self._open_rows(int(words[starts + 1].max()) + 1)
        kernels.apply_neighbours(self.arrays, words, words.view(np.float32), starts, sizes)


class Arranged(NamedTuple):
    """Item rows on their way into a matrix."""

    total: int
    others: list[tuple[bytes, bytes | None]]  # neither dense nor neighbours, in their order
    dense: Array  # (n,) the matrix's `dense`
    words: Array  # int32: the neighbour rows, one behind the other
    sizes: Array  # (m,) int64, of each, in words


@cache
def _orthonormal(dim: int, text_dim: int) -> Array:
    """P: (D, T) float32, fixed, random, orthonormal rows (columns, where D > T)."""
    shape = (max(dim, text_dim), min(dim, text_dim))
    q = np.linalg.qr(np.random.default_rng(1).standard_normal(shape))[0]
    return np.ascontiguousarray(q.T if dim <= text_dim else q, np.float32)


def _pack_texts(item_id: str, text: str, vector: Array) -> bytes:
    name, body = item_id.encode(), text.encode()
    if len(name) > ID_BYTES_MAX:
        raise ValueError(f"item id of {len(name)} bytes: at most {ID_BYTES_MAX} fit a row")
    return _TEXTS.pack(len(name), len(body), len(vector)) + name + body + vector.astype("<f2").tobytes()


def _unpack_texts(value: bytes, at: int, text_dim: int) -> tuple[str, str, Array]:
    names, texts, dims = _TEXTS.unpack_from(value, at)
    at += _TEXTS.size
    item_id = value[at : at + names].decode()
    text = value[at + names : at + names + texts].decode()
    vector = np.zeros(text_dim, np.float32)
    if dims:
        if dims != text_dim:
            raise ValueError(f"item {item_id!r} has a text vector of {dims} dimensions, this worker of {text_dim}")
        vector[:] = np.frombuffer(value, "<f2", dims, at + names + texts)
    return item_id, text, vector
