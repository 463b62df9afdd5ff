"""The changelog of a partition: the layout of its records, and the rule that says which of them count.

One changelog partition holds three kinds of records (format version 1, big endian; the version is the first byte
of every value). `epoch` numbers the owners of the partition, `flush` their flushes:

    ANNOUNCE  key    "A" | epoch u8 | store id [16] | nonce [16]
              value  version u1 | store id [16] | nonce [16]
              A claim of the epoch. The first one in log order wins; no compactor hides it, for the key is its own.
    MARKER    key    "M" | epoch u8 | kind u1 | slot u4
              value  version u1 | base epoch u8 | base flush u8 | flush u8 | rows u4 | applied
              The rows of `epoch` up to `flush` are complete. The slot changes every some megabytes of rows, so
              that a compactor leaves markers in between: a reader buffers the rows up to the next one.
    ROW       key    "R" | epoch u8 | row key
              value  version u1 | flush u8 | alive u1 | row
              `alive` 0 is a deletion. (Kafka's own tombstone, a null, has no place for the flush.)

    applied   count u1, then for each source topic: length u1 | name (UTF-8) | offset i8

The marker rule is `Reader`. A restored partition, a replica that tails the log and a verification share it.
"""

import struct
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

CHANGELOG_VERSION: Final = 1

ANNOUNCE: Final = b"A"
MARKER: Final = b"M"
ROW: Final = b"R"

KIND_ADOPT: Final = 0  # the first marker of an epoch: confirms the predecessor's last complete flush
KIND_RUNNING: Final = 1
KIND_SWEPT: Final = 2  # every row that lives has been written under this epoch

STORE_ID_BYTES: Final = 16
CLAIM_BYTES: Final = 2 * STORE_ID_BYTES  # store id and nonce

_VERSION: Final = bytes([CHANGELOG_VERSION])
_KEY: Final = struct.Struct(">cQ")
_MARKER_KEY: Final = struct.Struct(">cQBI")
_MARKER_VALUE: Final = struct.Struct(">BQQQI")
_ROW_VALUE: Final = struct.Struct(">BQB")
_CLAIM: Final = struct.Struct(f"{CLAIM_BYTES}s")
_OFFSET: Final = struct.Struct(">q")

# The layout above, as a reader of another language would count it.
assert (_KEY.size, _MARKER_KEY.size, _MARKER_VALUE.size, _ROW_VALUE.size) == (9, 14, 29, 10)


class ChangelogVersionError(ValueError):
    """A changelog record is of a version or a kind that this build does not read."""


class LogRecord(NamedTuple):
    """One record of a log."""

    offset: int
    key: bytes
    value: bytes | None


class Log(Protocol):
    """One partition of a changelog topic.

    Other writers may append at any time; compaction may drop a record that a later one of its key replaces.
    """

    async def append(self, records: Sequence[tuple[bytes, bytes | None]]) -> int:
        """Append in order, wait for the acknowledgements, return the offset of the last record.

        Whatever happens, what a call leaves in the log is a prefix of `records` (so: nothing is sent before what
        is ahead of it is acknowledged), parts of it perhaps more than once where a retry doubled them.
        """
        ...

    def read(self, start: int, stop: int | None) -> AsyncIterator[list[LogRecord]]:
        """The records with `start` <= offset <= `stop`, in order; ends when all of them have been yielded.
        `stop` None: up to the end that the log has now."""
        ...

    async def first(self) -> int:
        """The offset at which the log starts: deleting its head moves it, compaction does not."""
        ...


@dataclass(frozen=True, slots=True)
class Announce:
    """A claim of an epoch."""

    epoch: int
    claim: bytes  # store id and nonce

    @property
    def store_id(self) -> bytes:
        return self.claim[:STORE_ID_BYTES]


@dataclass(frozen=True, slots=True)
class Marker:
    """The rows of `epoch` up to `flush` are complete, and are the state at `applied`."""

    epoch: int
    kind: int
    base_epoch: int
    base_flush: int
    flush: int
    rows: int
    applied: dict[str, int]
    slot: int = 0


class Row(NamedTuple):
    """A row as of a flush; `value` None is a deletion. (A tuple: a restore makes millions.)"""

    epoch: int
    flush: int
    key: bytes
    value: bytes | None


def pack_applied(applied: Mapping[str, int]) -> bytes:
    """The bytes of an applied vector {source topic: last applied offset, -1 for none}."""
    parts = [bytes([len(applied)])]
    for name, offset in applied.items():
        raw = name.encode()
        parts += (bytes([len(raw)]), raw, _OFFSET.pack(offset))
    return b"".join(parts)


def unpack_applied(data: bytes, at: int) -> tuple[dict[str, int], int]:
    """The applied vector at position `at` of `data`, and the position behind it."""
    applied = {}
    count = data[at]
    at += 1
    for _ in range(count):
        end = at + 1 + data[at]
        name = data[at + 1 : end].decode()
        (applied[name],) = _OFFSET.unpack_from(data, end)
        at = end + _OFFSET.size
    return applied, at


def announce_record(epoch: int, claim: bytes) -> tuple[bytes, bytes]:
    """The record of a claim; `claim` is store id and nonce, 32 bytes."""
    assert len(claim) == CLAIM_BYTES
    return _KEY.pack(ANNOUNCE, epoch) + claim, _VERSION + claim


def marker_record(marker: Marker) -> tuple[bytes, bytes]:
    """The record of a marker."""
    key = _MARKER_KEY.pack(MARKER, marker.epoch, marker.kind, marker.slot)
    head = (CHANGELOG_VERSION, marker.base_epoch, marker.base_flush, marker.flush, marker.rows)
    return key, _MARKER_VALUE.pack(*head) + pack_applied(marker.applied)


def row_records(epoch: int, flush: int, rows: Iterable[tuple[bytes, bytes | None]]) -> Iterator[tuple[bytes, bytes]]:
    """The records of some rows (key, row; None deletes), one at a time."""
    key_head = _KEY.pack(ROW, epoch)
    alive = _ROW_VALUE.pack(CHANGELOG_VERSION, flush, 1)
    dead = _ROW_VALUE.pack(CHANGELOG_VERSION, flush, 0)
    return ((key_head + key, dead if row is None else alive + row) for key, row in rows)


def row_key_of(record: LogRecord) -> bytes | None:
    """The row key that a record names, also where its value is null; None: it is no row's."""
    return record.key[_KEY.size :] if record.key[:1] == ROW else None


def parse(record: LogRecord) -> Announce | Marker | Row | None:
    """What a record says; None for a null value (nothing: somebody purged an old record by its key).

    Raises ChangelogVersionError for a newer version or an unknown kind, ValueError for bytes cut short.
    """
    offset, key, value = record
    if value is None:
        return None
    kind = key[:1]
    if not value or value[0] != CHANGELOG_VERSION or kind not in (ROW, MARKER, ANNOUNCE):
        version = value[0] if value else None
        raise ChangelogVersionError(
            f"changelog record at offset {offset} is of kind {kind!r}, version {version}; this build reads "
            f"version {CHANGELOG_VERSION}; deploy the build that wrote it, or a newer one, then start again"
        )
    try:
        _, epoch = _KEY.unpack_from(key)
        if kind == ROW:
            _, flush, alive = _ROW_VALUE.unpack_from(value)
            return Row(epoch, flush, key[_KEY.size :], value[_ROW_VALUE.size :] if alive else None)
        if kind == ANNOUNCE:
            (claim,) = _CLAIM.unpack_from(value, 1)
            return Announce(epoch, claim)
        _, _, kind, slot = _MARKER_KEY.unpack_from(key)
        _, base_epoch, base_flush, flush, rows = _MARKER_VALUE.unpack_from(value)
        applied, _ = unpack_applied(value, _MARKER_VALUE.size)
        return Marker(epoch, kind, base_epoch, base_flush, flush, rows, applied, slot)
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"changelog record at offset {offset} is cut short: {key!r}") from error


def leaving(rows: dict[bytes, bytes | None]) -> Iterator[tuple[bytes, bytes | None]]:
    """The rows in their order; each goes from `rows` as it is taken. A flush may be all rows of a catalogue."""
    for key in list(rows):
        yield key, rows.pop(key)


@dataclass(frozen=True, slots=True)
class Accepted:
    """A flush that counts: the rows since the last one (None deletes), the state's `applied` after them,
    and the changelog position behind its marker."""

    rows: dict[bytes, bytes | None]
    applied: dict[str, int]
    position: int
    epoch: int
    flush: int


class Reader:
    """The marker rule: which rows of a changelog count.

    - A marker of epoch e counts iff e is the highest epoch announced before it. It applies the rows of e with
      its flush or an earlier one.
    - The first marker of an epoch is ADOPT: it re-confirms the predecessor's rows up to (base epoch, base
      flush), because a fenced predecessor may have hidden its own last marker from a compactor. What lies
      between that and the ADOPT never counts.

    Feed records in log order, from the log's start or from behind the marker of a known state. Memory: the rows
    that no marker covers yet (with `keys_only`, their keys).
    """

    def __init__(
        self,
        *,
        epoch: int = 0,
        flush: int = 0,
        applied: Mapping[str, int] | None = None,
        keys_only: bool = False,
    ) -> None:
        """epoch, flush, applied: those of the last marker behind which the reading starts."""
        self.epoch = epoch  # the highest announced
        self.claim = b""  # the winner of that epoch
        self.marker_epoch = epoch  # of the last marker that counted, as the two below
        self.flush = flush
        self.applied = dict(applied or {})
        self.epoch_seen_max = epoch
        self.announced: dict[int, int] = {}  # epoch -> offset of its winner
        self.winners: list[bytes] = []  # store ids, in order
        self.swept_epoch: int | None = None
        self.stale_records = 0
        self._keys_only = keys_only
        self._open_rows: dict[int, dict[int, dict[bytes, bytes | None]]] = {}
        self._stale_keys: set[bytes] = set()

    def feed(self, record: LogRecord) -> Accepted | None:
        """Take the next record in; the flush that it completes, if it does. Raises as `parse`."""
        parsed = parse(record)
        if isinstance(parsed, Row):
            self._row(parsed)
        elif isinstance(parsed, Announce):
            self._announce(record.offset, parsed)
        elif isinstance(parsed, Marker):
            return self._marker(record.offset, parsed)
        return None

    def uncovered_keys(self) -> set[bytes]:
        """Keys of rows that no counting marker covers: of a flush cut off, or written by a fenced owner.

        A compactor may drop the good rows that they hide, so the next owner writes these keys again.
        """
        open_keys = (rows for flushes in self._open_rows.values() for rows in flushes.values())
        return self._stale_keys.union(*open_keys)

    @property
    def truncatable_to(self) -> int | None:
        """Everything before this offset may be deleted; None: unknown."""
        return None if self.swept_epoch is None else self.announced.get(self.swept_epoch)

    def _row(self, row: Row) -> None:
        if row.epoch < self.epoch:
            self._stale_keys.add(row.key)
            self.stale_records += 1
        if row.epoch < self.marker_epoch:
            return
        if row.epoch == self.marker_epoch and row.flush <= self.flush:
            self._stale_keys.add(row.key)  # a retry doubled it, after its flush was complete
            return
        value = b"" if self._keys_only and row.value is not None else row.value
        self._open_rows.setdefault(row.epoch, {}).setdefault(row.flush, {})[row.key] = value

    def _announce(self, offset: int, announce: Announce) -> None:
        self.epoch_seen_max = max(self.epoch_seen_max, announce.epoch)
        if announce.epoch > self.epoch:
            self.epoch, self.claim = announce.epoch, announce.claim
            self.announced[announce.epoch] = offset
            self.winners.append(announce.store_id)

    def _marker(self, offset: int, marker: Marker) -> Accepted | None:
        repeated = marker.epoch == self.marker_epoch and marker.flush <= self.flush
        if marker.epoch != self.epoch or repeated:
            self.stale_records += 1
            return None
        rows: dict[bytes, bytes | None] = {}
        if marker.kind == KIND_ADOPT:
            rows = self._take(marker.base_epoch, marker.base_flush, rows)
            for epoch in [e for e in self._open_rows if e < marker.epoch]:
                del self._open_rows[epoch]
        rows = self._take(marker.epoch, marker.flush, rows)
        self.marker_epoch, self.flush, self.applied = marker.epoch, marker.flush, marker.applied
        if marker.kind == KIND_SWEPT:
            self.swept_epoch = marker.epoch
        return Accepted(rows, marker.applied, offset + 1, marker.epoch, marker.flush)

    def _take(self, epoch: int, flush: int, rows: dict[bytes, bytes | None]) -> dict[bytes, bytes | None]:
        """Move the open rows of `epoch` up to `flush` onto `rows`."""
        flushes = self._open_rows.get(epoch, {})
        for number in sorted(n for n in flushes if n <= flush):
            taken = flushes.pop(number)
            if rows:
                rows.update(taken)
            else:
                rows = taken  # the common case: one large flush is not copied
        return rows
