"""The disk of a partition: one RocksDB database of rows, META and the outbox, changed by whole batches only.

Keys: 0x00 "meta" | 0x00 "outbox" + flush id | 0x01 + row key. META and the outbox entries (format version 1,
big endian) are owned by this module:

    META     version u1 | flags u1 (1 = restoring) | epoch u8 | store id [16] | log position u8 | log flush u8
             | applied | log applied                                  (vectors as in the changelog)
    outbox   version u1 | applied
             | count u4, (key length u4, value length u4, key, value)*      the downstream records
             | count u4, (length u4, key)*                                  keys of the rows touched

A batch survives the end of the process (RocksDB's log), not a power cut (nothing is synced); what is lost then
is a tail of batches, which the changelog gives back.

rocksdict holds the interpreter's lock as long as a batch is written, some 2 ms a megabyte, and nobody is answered
meanwhile. So a store that is told to writes large batches in pieces. The first has the key 0x00 "torn", the last takes
it away: where a process ends in between, the next open finds it, and the store is restored from the changelog.
"""

import os
import shutil
import struct
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, Protocol

from rocksdict import (
    BlockBasedOptions,
    BottommostLevelCompaction,
    Cache,
    CompactOptions,
    DbClosedError,
    Options,
    Rdict,
    WriteBatch,
    WriteBufferManager,
)

from state.changelog import STORE_ID_BYTES, pack_applied, unpack_applied

STORE_VERSION: Final = 1

CACHE_BYTES: Final = 64 << 20  # block cache, of all stores of the process together
WRITE_BUFFERS_BYTES: Final = 64 << 20  # memtables, of all stores of the process together
WRITE_BUFFER_BYTES_MAX: Final = 8 << 20  # one memtable
WRITE_BUFFER_COUNT_MAX: Final = 2  # memtables a store
BLOOM_BITS_PER_KEY: Final = 10  # 1 % false positives: new users are asked for all the time
PURGE_RANGES_MAX: Final = 16  # keys compacted one by one; more of them as one range
MANIFEST_BYTES_MAX: Final = 1  # each change of the tables begins another one: an older one names deleted keys
PIECE_BYTES: Final = 1 << 20  # of rows written at once, where a batch may come in pieces
INFO_LOG_FILES_MAX: Final = 2
INFO_LOG_BYTES_MAX: Final = 1 << 20

FLAG_RESTORING: Final = 1
FLAG_NAMES_DELETED: Final = 2

META_KEY: Final = b"\x00meta"
OUTBOX_PREFIX: Final = b"\x00outbox"
OWED_PREFIX: Final = b"\x00owed"  # of keys whose traces a purge is to take off
OWED_NONCE_BYTES: Final = 8  # tells a deletion from a later one of the same key, which comes while a purge works
PURGE_KEY: Final = b"\x00purge"  # of no meaning: written so that there is something to write
TORN_KEY: Final = b"\x00torn"  # while the pieces of a batch are written
ROW_PREFIX: Final = b"\x01"
CORRUPT_MARK: Final = "HEADWATER_CORRUPT"

_META: Final = struct.Struct(f">BBQ{STORE_ID_BYTES}sQQ")
_COUNT: Final = struct.Struct(">I")
_PAIR: Final = struct.Struct(">II")
_FLUSH_ID: Final = struct.Struct(">QQ")

assert META_KEY < OUTBOX_PREFIX < OWED_PREFIX < PURGE_KEY < TORN_KEY < ROW_PREFIX


class StoreError(Exception):
    """The disk of a partition cannot be used."""


class StoreLockedError(StoreError):
    """Another user, perhaps an earlier owner that is closing, has the database open."""


class StoreCorruptError(StoreError):
    """The database contradicts its own checksums or lacks files. The next open discards and restores it."""


class StoreVersionError(StoreError):
    """The database was written by a newer build."""


@dataclass(frozen=True, slots=True)
class Meta:
    """Where a store stands.

    epoch, log_flush, log_applied: those of the last marker that this store is known to contain, at the changelog
    position `position` - 1. `applied` may be ahead of `log_applied`: the outbox has the difference.
    `restoring`: rows may be ahead of `position`, all of them from the changelog.
    `names_deleted`: the changelog has records of rows that were deleted, and is to lose them.
    """

    applied: dict[str, int]
    epoch: int
    store_id: bytes
    position: int
    log_applied: dict[str, int]
    log_flush: int
    restoring: bool = False
    names_deleted: bool = False


@dataclass(frozen=True, slots=True)
class OutboxEntry:
    """What a flush owes: records to downstream, and the keys whose rows belong into the changelog."""

    applied: dict[str, int]
    downstream: Sequence[tuple[bytes, bytes]]
    keys: Sequence[bytes]


def new_store_id() -> bytes:
    """A fresh identity of a store."""
    return uuid.uuid4().bytes


def flush_id(epoch: int, flush: int) -> bytes:
    """The outbox key of a flush; ids sort as the flushes went."""
    return _FLUSH_ID.pack(epoch, flush)


def pack_meta(meta: Meta) -> bytes:
    """META's bytes."""
    flags = (FLAG_RESTORING if meta.restoring else 0) | (FLAG_NAMES_DELETED if meta.names_deleted else 0)
    head = _META.pack(STORE_VERSION, flags, meta.epoch, meta.store_id, meta.position, meta.log_flush)
    return head + pack_applied(meta.applied) + pack_applied(meta.log_applied)


def unpack_meta(value: bytes) -> Meta:
    """META of these bytes. Raises StoreVersionError, StoreCorruptError."""
    _check_version(value, "META")
    try:
        _, flags, epoch, store_id, position, log_flush = _META.unpack_from(value)
        applied, at = unpack_applied(value, _META.size)
        log_applied, _ = unpack_applied(value, at)
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise StoreCorruptError(f"META of {len(value)} bytes is cut short") from error
    told = bool(flags & FLAG_RESTORING), bool(flags & FLAG_NAMES_DELETED)
    return Meta(applied, epoch, store_id, position, log_applied, log_flush, *told)


def pack_outbox(entry: OutboxEntry) -> bytes:
    """An outbox entry's bytes."""
    parts = [bytes([STORE_VERSION]), pack_applied(entry.applied), _COUNT.pack(len(entry.downstream))]
    for key, value in entry.downstream:
        parts += (_PAIR.pack(len(key), len(value)), key, value)
    parts.append(_COUNT.pack(len(entry.keys)))
    for key in entry.keys:
        parts += (_COUNT.pack(len(key)), key)
    return b"".join(parts)


def unpack_outbox(value: bytes) -> OutboxEntry:
    """The outbox entry of these bytes. Raises StoreVersionError, StoreCorruptError."""
    _check_version(value, "outbox entry")
    try:
        applied, at = unpack_applied(value, 1)
        downstream: list[tuple[bytes, bytes]] = []
        (count,) = _COUNT.unpack_from(value, at)
        at += _COUNT.size
        for _ in range(count):
            key_bytes, value_bytes = _PAIR.unpack_from(value, at)
            middle = at + _PAIR.size + key_bytes
            downstream.append((value[at + _PAIR.size : middle], value[middle : middle + value_bytes]))
            at = middle + value_bytes
        keys: list[bytes] = []
        (count,) = _COUNT.unpack_from(value, at)
        at += _COUNT.size
        for _ in range(count):
            (key_bytes,) = _COUNT.unpack_from(value, at)
            keys.append(value[at + _COUNT.size : at + _COUNT.size + key_bytes])
            at += _COUNT.size + key_bytes
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise StoreCorruptError(f"outbox entry of {len(value)} bytes is cut short") from error
    if at != len(value):
        raise StoreCorruptError(f"outbox entry of {len(value)} bytes: its counts tell of {at}")
    return OutboxEntry(applied, downstream, keys)


def _check_version(value: bytes, what: str) -> None:
    version = value[0] if value else None
    if version != STORE_VERSION:
        raise StoreVersionError(
            f"{what} is of version {version}, this build reads {STORE_VERSION}; deploy the build that wrote it, "
            "or a newer one, then start again (or delete the folder: the changelog restores it)"
        )


class Store(Protocol):
    """The disk of one partition, as `Partition` uses it."""

    def meta(self) -> Meta | None:
        """META; None in a new store."""
        ...

    def outbox(self) -> list[tuple[bytes, OutboxEntry]]:
        """The outstanding entries with their ids, oldest first."""
        ...

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The rows of `keys`, in their order; None where there is none."""
        ...

    def items(self, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """(key, row) in key order from `start`, as of this call."""
        ...

    def snapshot(self) -> tuple[Meta | None, Iterator[tuple[bytes, bytes]]]:
        """META and all rows in key order, both as of this call."""
        ...

    def write(
        self,
        rows: Mapping[bytes, bytes | None],
        meta: Meta | None = None,
        *,
        entry: tuple[bytes, OutboxEntry] | None = None,
        settled: Iterable[bytes] = (),
        owed: Iterable[bytes] = (),
        piecewise: bool = False,
    ) -> None:
        """In one atomic batch: rows (None deletes), META, a new outbox entry, ids of entries to drop, and deleted keys
        whose traces are owed a purge.

        piecewise: other threads run in the midst of a large batch; of a process that ends in there the store is found
        corrupt.
        """
        ...

    def owes_purge(self) -> bool:
        """Whether keys are owed a purge; an owner that was killed before it, or lost the partition, leaves that."""
        ...

    def purge(self) -> None:
        """Takes deleted rows of the keys that are owed it, and settled outbox entries, off the disk: nothing names
        them any more.

        Takes some tenths of a second a key: not in the loop.
        """
        ...

    def memory_bytes(self) -> int:
        """Memory held by this store alone (the shared block cache not counted)."""
        ...

    def disk_bytes(self) -> int:
        """Size of the table files."""
        ...

    def row_count_estimate(self) -> int:
        """About how many rows there are."""
        ...

    def close(self) -> None:
        """Release the disk. Harmless when closed."""
        ...


class Disk(Protocol):
    """Opens and wipes stores."""

    def open(self, path: Path) -> Store:
        """Open or create. Raises StoreLockedError, StoreCorruptError, StoreVersionError, StoreError."""
        ...

    def wipe(self, path: Path) -> None:
        """Remove a closed store."""
        ...

    def stores(self, folder: Path) -> list[Path]:
        """The stores that lie in a folder."""
        ...


class RocksDisk:
    """RocksDB stores that share one block cache and one memtable budget.

    `cache_bytes` and `write_buffers_bytes` bound all of them together; memtables that are being written to disk
    may stand above the latter for a moment (two a store at most). One object a process: `shared_disk()`.
    """

    def __init__(self, *, cache_bytes: int = CACHE_BYTES, write_buffers_bytes: int = WRITE_BUFFERS_BYTES) -> None:
        self._cache = Cache(cache_bytes)
        # No stalls: those would wait for stores that nobody writes to. A store's own memtables are bounded anyway.
        self._buffers = WriteBufferManager(write_buffers_bytes, False)
        self._memtable_bytes = min(WRITE_BUFFER_BYTES_MAX, write_buffers_bytes // 4)

    def open(self, path: Path) -> "RocksStore":
        """Open or create the database in the folder `path`. Raises as `Disk.open`."""
        path.mkdir(parents=True, exist_ok=True)
        if (path / CORRUPT_MARK).exists():
            raise StoreCorruptError(f"{path}: {(path / CORRUPT_MARK).read_text()}")
        try:
            database = Rdict(str(path), options=self._options())
        except Exception as error:
            raise _translate(error, path) from error
        store = RocksStore(database, path)
        if store.is_torn():
            store.close()
            raise StoreCorruptError(f"{path}: the process ended in the middle of a large write")
        return store

    def wipe(self, path: Path) -> None:
        """Remove the folder of a closed store, if there is one."""
        if path.exists():
            shutil.rmtree(path)

    def stores(self, folder: Path) -> list[Path]:
        """The folders of all stores in `folder`."""
        return sorted(path for path in folder.glob("*") if path.is_dir())

    def memory_bytes(self) -> int:
        """Block cache and memtables of all the stores."""
        used: int = self._cache.get_usage() + self._buffers.get_usage()
        return used

    def _options(self) -> Options:
        table = BlockBasedOptions()
        table.set_block_cache(self._cache)
        table.set_bloom_filter(BLOOM_BITS_PER_KEY, False)
        table.set_cache_index_and_filter_blocks(True)
        table.set_pin_l0_filter_and_index_blocks_in_cache(True)
        options = Options(raw_mode=True)
        options.create_if_missing(True)
        options.set_block_based_table_factory(table)
        options.set_write_buffer_manager(self._buffers)
        options.set_write_buffer_size(self._memtable_bytes)
        options.set_max_write_buffer_number(WRITE_BUFFER_COUNT_MAX)
        options.set_max_manifest_file_size(MANIFEST_BYTES_MAX)
        options.set_keep_log_file_num(INFO_LOG_FILES_MAX)
        options.set_max_log_file_size(INFO_LOG_BYTES_MAX)
        return options


@cache
def shared_disk() -> RocksDisk:
    """The process's disk, with the default budgets."""
    return RocksDisk()


class RocksStore:
    """One open database (`Store`). The methods may be called from any thread."""

    def __init__(self, database: Rdict, path: Path) -> None:
        self._database = database
        self._path = path
        self._writing = threading.Lock()  # a snapshot is of before or after a batch, its pieces too

    def is_torn(self) -> bool:
        """Whether a batch was begun and not ended."""
        return self._get(TORN_KEY) is not None

    def meta(self) -> Meta | None:
        """`Store.meta`."""
        value = self._get(META_KEY)
        if value is None and next(self.items(), None) is not None:
            raise self._failed(Exception("Corruption: rows without META"))
        return None if value is None else unpack_meta(value)

    def outbox(self) -> list[tuple[bytes, OutboxEntry]]:
        """`Store.outbox`."""
        entries = self._scan(OUTBOX_PREFIX, OUTBOX_PREFIX)
        return [(key[len(OUTBOX_PREFIX) :], unpack_outbox(value)) for key, value in entries]

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """`Store.get_many`: one multi-get."""
        if not keys:
            return []
        try:
            rows: list[bytes | None] = self._database[[ROW_PREFIX + key for key in keys]]
        except Exception as error:
            raise self._failed(error) from error
        return rows

    def items(self, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """`Store.items`."""
        return ((key[1:], row) for key, row in self._scan(ROW_PREFIX + start, ROW_PREFIX))

    def snapshot(self) -> tuple[Meta | None, Iterator[tuple[bytes, bytes]]]:
        """`Store.snapshot`: one iterator, so one moment."""
        with self._writing:
            entries = self._scan(META_KEY, b"")
        key, value = next(entries, (b"", b""))
        rows = ((key[1:], row) for key, row in entries if key[:1] == ROW_PREFIX)
        return (unpack_meta(value) if key == META_KEY else None), rows

    def write(
        self,
        rows: Mapping[bytes, bytes | None],
        meta: Meta | None = None,
        *,
        entry: tuple[bytes, OutboxEntry] | None = None,
        settled: Iterable[bytes] = (),
        owed: Iterable[bytes] = (),
        piecewise: bool = False,
    ) -> None:
        """`Store.write`."""
        batch, size, in_pieces = WriteBatch(raw_mode=True), 0, False
        with self._writing:
            for key, row in rows.items():
                if piecewise and size >= PIECE_BYTES:
                    if not in_pieces:
                        batch.put(TORN_KEY, b"")
                    self._write(batch)
                    batch, size, in_pieces = WriteBatch(raw_mode=True), 0, True
                if row is None:
                    batch.delete(ROW_PREFIX + key)
                else:
                    batch.put(ROW_PREFIX + key, row)
                size += len(key) + len(row or b"")
            if in_pieces:
                batch.delete(TORN_KEY)
            if meta is not None:
                batch.put(META_KEY, pack_meta(meta))
            if entry is not None:
                batch.put(OUTBOX_PREFIX + entry[0], pack_outbox(entry[1]))
            for settled_id in settled:
                batch.delete(OUTBOX_PREFIX + settled_id)
            for key in owed:
                batch.put(OWED_PREFIX + os.urandom(OWED_NONCE_BYTES) + key, b"")
            self._write(batch)

    def _write(self, batch: WriteBatch) -> None:
        try:
            self._database.write(batch)
        except Exception as error:
            raise self._failed(error) from error

    def owes_purge(self) -> bool:
        """`Store.owes_purge`."""
        return next(self._scan(OWED_PREFIX, OWED_PREFIX), None) is not None

    def purge(self) -> None:
        """`Store.purge`: out of the log and the memtables, out of the tables, out of the list of tables."""
        owed = [entry for entry, _ in self._scan(OWED_PREFIX, OWED_PREFIX)]
        keys = [entry[len(OWED_PREFIX) + OWED_NONCE_BYTES :] for entry in owed]
        try:
            self._database.flush(True)
            ranges = [(key, key) for key in keys]
            if len(keys) > PURGE_RANGES_MAX:
                ranges = [(min(keys), max(keys))]
            for first, last in ranges:
                self._compact(ROW_PREFIX + first, ROW_PREFIX + last + b"\0")
            done = WriteBatch(raw_mode=True)
            for entry in owed:
                done.delete(entry)
            self._database.write(done)
            self._database.flush(True)
            self._compact(OUTBOX_PREFIX, PURGE_KEY)
            # The list of tables still has the bounds of those that went; it is begun anew with the next one.
            self._database.put(PURGE_KEY, b"")
            self._database.flush(True)
        except Exception as error:
            raise self._failed(error) from error

    def _compact(self, start: bytes, stop: bytes) -> None:
        options = CompactOptions()
        options.set_bottommost_level_compaction(BottommostLevelCompaction.force_optimized())
        self._database.compact_range(start, stop, options)

    def memory_bytes(self) -> int:
        """`Store.memory_bytes`: memtables and open tables."""
        return self._property("rocksdb.size-all-mem-tables") + self._property("rocksdb.estimate-table-readers-mem")

    def disk_bytes(self) -> int:
        """`Store.disk_bytes`."""
        return self._property("rocksdb.total-sst-files-size")

    def row_count_estimate(self) -> int:
        """`Store.row_count_estimate`."""
        return self._property("rocksdb.estimate-num-keys")

    def close(self) -> None:
        """`Store.close`. It loses nothing where the disk is full: what memtables hold is in RocksDB's log, too."""
        try:
            self._database.close()
        except DbClosedError:
            return
        except Exception as error:
            self._failed(error)  # a bad block is remembered for the next open; each batch was written or refused

    def _property(self, name: str) -> int:
        value: int | None = self._database.property_int_value(name)
        return value or 0

    def _get(self, key: bytes) -> bytes | None:
        try:
            value: bytes | None = self._database.get(key)
        except Exception as error:
            raise self._failed(error) from error
        return value

    def _scan(self, start: bytes, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        try:
            entries = self._database.items(from_key=start)
        except Exception as error:
            raise self._failed(error) from error
        return self._walk(entries, start, prefix)

    def _walk(
        self, entries: Iterator[tuple[object, bytes]], start: bytes, prefix: bytes
    ) -> Iterator[tuple[bytes, bytes]]:
        last = start
        for key, value in entries:
            assert isinstance(key, bytes)
            last = key
            if not key.startswith(prefix):
                return
            yield key, value
        # rocksdict's iterator ends at a corrupt block as it ends at the last key; a cursor tells them apart.
        try:
            cursor = self._database.iter()
            cursor.seek(last)
            while cursor.valid() and cursor.key() <= last:
                cursor.next()
            cursor.status()
        except Exception as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> StoreError:
        translated = _translate(error, self._path)
        if isinstance(translated, StoreCorruptError):
            # RocksDB finds a bad block only where it reads: leave word for the next open.
            with suppress(OSError):  # the caller is told in any case
                (self._path / CORRUPT_MARK).write_text(str(error))
        return translated


def _translate(error: Exception, path: Path) -> StoreError:
    text = str(error)
    if "LOCK" in text and "lock" in text:
        return StoreLockedError(
            f"{path} is open elsewhere: {text}; stop the other worker, or give this one its own folder"
        )
    if "Corruption" in text or "No such file or directory" in text:
        return StoreCorruptError(f"{path}: {text}")
    return StoreError(f"{path}: {text}; mend the disk, or delete the folder to restore it from the changelog")
