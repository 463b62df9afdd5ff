"""One partition's state: rows on disk that are a function of the source logs up to `applied`, and of nothing else.

A flush has five steps (the first is the caller's):

    1. Fold events into rows, in memory.
    2. One batch to disk: rows, applied offsets, and an outbox entry (downstream records, keys touched).
    3. Publish the downstream records; await the acknowledgements of those of the flush before first.
    4. Append the rows to the changelog, then the marker; only after the marker of the flush before.
    5. Drop the outbox entry; tell the caller (`on_durable`), who may then commit the source offsets.

Steps 3-5 overlap the steps 1-2 of later flushes. A process that ends anywhere in between is repeated from the outbox
or, on another disk, from the last marker and the source. Downstream sees records again then, with the same content.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Final

from state.changelog import (
    KIND_ADOPT,
    KIND_RUNNING,
    KIND_SWEPT,
    Accepted,
    Announce,
    Log,
    LogRecord,
    Marker,
    Reader,
    Row,
    announce_record,
    leaving,
    marker_record,
    parse,
    row_key_of,
    row_records,
)
from state.store import (
    Disk,
    Meta,
    OutboxEntry,
    Store,
    StoreCorruptError,
    StoreLockedError,
    flush_id,
    new_store_id,
    shared_disk,
)

PIPELINE_DEPTH: Final = 5  # flushes on their way at most; 1: each is durable when `flush` returns
SWEEP_ROWS: Final = 50  # untouched rows re-published with a flush after an open
APPEND_BYTES_MAX: Final = 1 << 20  # one append; a row above that goes alone
APPEND_RECORDS_MAX: Final = 4000
RESTORE_BYTES_MAX: Final = 4 << 20  # one batch to disk while restoring
RESTORE_META_BYTES: Final = 64 << 20  # restored between two METAs: what a restore that is cut off does again
READ_KEYS_MAX: Final = 512  # rows read at once for the ADOPT
INLINE_ROWS_MAX: Final = 1000  # a larger flush is written to disk by a thread: 25,000 rows of 2 KB take 0.4 s
MARKER_SLOT_BYTES: Final = 16 << 20  # rows between markers that a compactor must leave
LOCK_WAIT_S: Final = 0.25
LOCK_TRIES_MAX: Final = 60  # 15 s: an earlier owner in this process or on this machine may still be closing

assert RESTORE_BYTES_MAX <= RESTORE_META_BYTES

Publish = Callable[[list[tuple[bytes, bytes]]], Awaitable[None]]


class Fenced(Exception):
    """Another claimant owns the partition. Close it; open it again only if it is still ours to have."""


class PartitionFailedError(Exception):
    """A flush could not be published. What is on disk stays there; close the partition and open it again."""


class ChangelogLostError(Exception):
    """The changelog does not hold what this store has seen in it."""


class _WorthlessError(Exception):
    """The disk contradicts the changelog, which is the truth: wipe it."""


class SourcesError(ValueError):
    """The state has applied offsets of a source topic that this partition is not configured to read."""


@dataclass(frozen=True, slots=True)
class OpenReport:
    """How a partition was opened.

    kind: "fresh" (an empty disk, restored from the changelog, however much there was), "same" (this disk was the last
    owner's), "catchup" (others have owned it since, the changelog gave what was missing; also a restore that was cut
    off), "discard" (the disk contradicted the changelog: restored in full) or "corrupt" (the same, for a damaged one).
    """

    kind: str
    epoch: int
    base: tuple[int, int]  # epoch and flush of the last marker before this open
    outbox: int  # outstanding flushes found on disk
    read: int  # rows taken from the changelog
    repaired: int  # rows written again
    applied: dict[str, int]
    reason: str = ""  # why a disk was discarded


def digest(rows: Iterable[tuple[bytes, bytes]], applied: Mapping[str, int]) -> str:
    """Hex blake2b (32 bytes) over the applied offsets and the (key, row) pairs, which come sorted by key.

    Equal state has an equal digest, whatever its history. A source that nothing was applied of counts as absent.
    """
    hasher = blake2b(digest_size=32)
    for name in sorted(name for name, offset in applied.items() if offset >= 0):
        hasher.update(f"{name}={applied[name]}\n".encode())
    for key, row in rows:
        hasher.update(len(key).to_bytes(4, "big") + len(row).to_bytes(4, "big") + key)
        hasher.update(row)
    return hasher.hexdigest()


@dataclass(eq=False, slots=True)
class _Flush:
    """A flush between its batch on disk and its marker's acknowledgement."""

    number: int
    kind: int
    rows: dict[bytes, bytes | None]
    downstream: list[tuple[bytes, bytes]]
    applied: dict[str, int]
    outbox_id: bytes | None
    published: asyncio.Event = field(default_factory=asyncio.Event)
    finished: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class _Opened:
    """What an open has found out before the ADOPT."""

    kind: str
    meta: Meta
    outbox: list[tuple[bytes, OutboxEntry]]
    epoch: int
    position: int  # behind our own claim
    reader: Reader
    read: int


class Partition:
    """Store, outbox and changelog of one partition. One task at a time may call `flush`, `sweep` and `drain`.

    path: folder of this partition's store, its own.
    publish: appends downstream records in order and returns when all are acknowledged.
    sources: names of the source topics; `applied` has one offset for each.
    on_durable: called with the applied offsets that may be committed now, after each flush.
    on_fenced: called once when a flush on its way finds a newer owner.
    purges: whether deleted rows are to leave no trace, on disk (`purge`) or in the changelog (`renew`, `head_deleted`);
        what is owed is noted on the disk.
    piecewise: whether large batches let other threads run in their midst, at the price of a restore in full where the
        process ends there.
    crash: called with the name of each step, for tests that end the process there.
    """

    def __init__(
        self,
        *,
        path: Path,
        changelog: Log,
        publish: Publish,
        sources: Sequence[str],
        pipeline_depth: int = PIPELINE_DEPTH,
        sweep_rows: int = SWEEP_ROWS,
        append_bytes_max: int = APPEND_BYTES_MAX,
        on_durable: Callable[[dict[str, int]], None] | None = None,
        on_fenced: Callable[[], None] | None = None,
        purges: bool = False,
        piecewise: bool = False,
        crash: Callable[[str], None] | None = None,
        disk: Disk | None = None,
    ) -> None:
        assert pipeline_depth >= 1
        assert sweep_rows >= 1
        assert sources
        self.path = path
        self.sources = tuple(sources)
        self.truncatable_to: int | None = None  # changelog records before this offset may be deleted
        self._log = changelog
        self._publish = publish
        self._depth = pipeline_depth
        self._sweep_rows = sweep_rows
        self._append_bytes_max = append_bytes_max
        self._on_durable = on_durable or (lambda applied: None)
        self._on_fenced = on_fenced or (lambda: None)
        self._purges = purges
        self._piecewise = piecewise
        self._crash = crash or (lambda step: None)
        self._disk = disk or shared_disk()
        self._store_or_none: Store | None = None
        self._meta = self._blank(b"\0" * 16)
        self._epoch = 0
        self._flushes = 0  # number of the last flush of this epoch
        self._next_offset = 0  # of the changelog, when nobody else writes
        self._announced_at = 0
        self._sweep_from: bytes | None = None
        self._repair: set[bytes] = set()  # keys to write again with the next flush
        self._repaired_by = 0  # the flush that carries the last repairs
        self._deleted_since = False  # whether the changelog has a deletion of after the last claim
        self._slot = 0  # of the next marker
        self._slot_bytes = 0  # appended since the slot began
        self._opening = asyncio.Lock()
        self._writing: asyncio.Task[None] | None = None
        self._meta_lock = asyncio.Lock()  # held while a batch with META is on its way to disk
        self._under_way: deque[_Flush] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None

    # -- reading

    @property
    def applied(self) -> Mapping[str, int]:
        """Source topic -> offset of the last record whose effect is in the rows, -1 for none."""
        return self._meta.applied

    @property
    def durable(self) -> Mapping[str, int]:
        """`applied` of the newest flush that the logs have, its downstream records included."""
        return self._meta.log_applied

    @property
    def epoch(self) -> int:
        """The epoch that this owner has claimed."""
        return self._epoch

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The rows of `keys` in their order, None where there is none; one multi-get. From any thread."""
        return self._store.get_many(keys)

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """All (key, row) in key order, as of this call. From any thread."""
        return self._store.items()

    def snapshot(self) -> tuple[dict[str, int], Iterator[tuple[bytes, bytes]]]:
        """What is on disk now, of one moment: applied, and all (key, row) in key order. From any thread."""
        meta, rows = self._store.snapshot()
        return dict(meta.applied if meta is not None else {}), rows

    @property
    def flushes_under_way(self) -> int:
        """Flushes that are on disk, and not durable yet."""
        return len(self._under_way)

    def digest(self) -> str:
        """`digest` of what is on disk now; reads all rows. From any thread."""
        applied, rows = self.snapshot()
        return digest(rows, applied)

    def memory_bytes(self) -> int:
        """Memory of the store (the shared block cache not counted) and of the flushes on their way."""
        waiting = sum(_size(flush.rows.items()) for flush in self._under_way)
        return self._store.memory_bytes() + waiting

    def disk_bytes(self) -> int:
        """Size of the store's table files."""
        return self._store.disk_bytes()

    def row_count_estimate(self) -> int:
        """About how many rows there are."""
        return self._store.row_count_estimate()

    # -- life

    async def open(self) -> OpenReport:
        """Claim the partition, bring the disk to the state that the changelog and the outbox tell, and adopt it.

        Then read the sources from `applied` + 1. A corrupt disk is restored from the changelog (kind "corrupt").
        Raises Fenced (somebody else claimed it meanwhile: try again if it is still ours), ChangelogLostError,
        SourcesError, ChangelogVersionError, StoreVersionError, StoreLockedError, StoreError, and what the log raises.
        """
        async with self._opening:
            assert self._store_or_none is None, f"{self.path} is open"
            kind = reason = ""
            while True:
                try:
                    return await self._adopt(await self._find(), kind, reason)
                except StoreCorruptError as error:
                    self._release()
                    if kind == "corrupt":
                        raise
                    kind, reason = "corrupt", str(error)
                except _WorthlessError as error:
                    self._release()
                    kind, reason = kind or "discard", reason or str(error)
                except BaseException:
                    self._release()
                    raise
                self._disk.wipe(self.path)

    async def flush(
        self,
        rows: Mapping[bytes, bytes | None],
        downstream: Sequence[tuple[bytes, bytes]],
        applied: Mapping[str, int],
    ) -> None:
        """Take over a fold's result: changed rows (None deletes), downstream records, and the sources' new offsets.

        Returns when it is on disk and fewer than `pipeline_depth` flushes are on their way. Sources that `applied`
        does not name stay where they are. Raises ValueError for an unknown source, for offsets that go back, and for
        rows or records without progress (state is a function of the sources); Fenced; PartitionFailedError.
        """
        await self._written()
        self._check_usable()
        target = {**self._meta.applied, **applied}
        if target.keys() != self._meta.applied.keys():
            raise ValueError(f"applied names {sorted(applied)}, the sources are {self.sources}")
        if any(target[name] < offset for name, offset in self._meta.applied.items()):
            raise ValueError(f"applied would go back from {self._meta.applied} to {target}")
        progress = target != self._meta.applied
        if not progress and (rows or downstream):
            raise ValueError(f"rows or records without progress of a source at {target}")
        self._crash("fold")
        if not progress:
            self._send({}, [], None)
        elif len(rows) <= INLINE_ROWS_MAX:
            owed = self._owed(rows)
            meta = replace(self._meta, applied=target, names_deleted=self._meta.names_deleted or bool(owed))
            outbox_id = flush_id(self._epoch, self._flushes + 1)
            entry = outbox_id, OutboxEntry(target, downstream, list(rows))
            self._store.write(rows, meta, entry=entry, owed=owed)
            self._taken(meta, dict(rows), list(downstream), outbox_id)
        else:
            aside = self._write_aside(dict(rows), list(downstream), target)
            self._writing = asyncio.get_running_loop().create_task(aside)
            await asyncio.shield(self._writing)  # a flush that is cancelled here is whole nevertheless
        await self._room()

    async def sweep(self, rows_max: int | None = None) -> bool:
        """When idle: re-publish some untouched rows, as each flush does. False: nothing is left to do.

        rows_max: how many, where there is a hurry. Raises Fenced, PartitionFailedError.
        """
        await self._written()
        self._check_usable()
        if self._sweep_from is None and not self._repair:
            return False
        self._send({}, [], None, rows_max)
        await self._room()
        return True

    async def renew(self) -> None:
        """Claim another epoch, as an open on this disk would: once it is swept, the changelog may lose its head.

        That is how old versions of rows, and the records of their deletion, leave the changelog: `truncatable_to`.
        Raises as `open` does but for the disk's errors; Fenced where somebody else has claimed the partition.
        """
        await self.drain()
        try:
            await self._inspect(self._next_offset)  # who was overtaken does not claim: that would fence the owner
            reader = _reader(self._meta, keys_only=True)
            epoch, offset = await self._claim(self._meta, reader, None)
            if any(store_id != self._meta.store_id for store_id in reader.winners):
                raise Fenced(f"{self.path}: epoch {self._epoch} was overtaken before it was renewed")
        except Fenced as failure:
            self._failure = failure
            raise
        await self._check_head(self._meta.position)
        opened = _Opened("same", self._meta, [], epoch, offset + 1, reader, 0)
        try:
            await self._adopt(opened, "", "")
        except BaseException as failure:  # a sweep or a flush under an epoch that was not adopted would lose rows
            self._failure = failure
            raise

    @property
    def is_swept(self) -> bool:
        """Whether every row has been written under this epoch; its last records may still be on their way."""
        return self._sweep_from is None

    def stored_key(self, key: bytes) -> bytes:
        """The row key under which disk and changelog have a key's row."""
        return key

    @property
    def names_deleted(self) -> bool:
        """Whether the changelog is to lose records that name deleted rows: `renew`, sweep, delete its head."""
        return self._meta.names_deleted

    async def head_deleted(self) -> None:
        """The changelog's head before `truncatable_to` was deleted, or cannot be. Raises as `drain`."""
        await self.drain()
        self._meta = replace(self._meta, names_deleted=self._deleted_since)
        self._store.write({}, self._meta)

    def _owed(self, rows: Mapping[bytes, bytes | None]) -> list[bytes]:
        """The keys of deleted rows, which are about to be written and to be told to the changelog."""
        owed = [key for key, row in rows.items() if row is None] if self._purges else []
        self._deleted_since |= bool(owed)
        return owed

    def owes_purge(self) -> bool:
        """Whether the disk has traces of deleted rows that nobody has taken off it, an earlier owner's too."""
        return self._store.owes_purge()

    def purge(self) -> None:
        """Take what was deleted before off the disk itself; all flushes of before the last `drain`. In a thread: it
        takes tenths of a second a key."""
        self._store.purge()

    async def named(self, keys: Collection[bytes]) -> dict[bytes, int]:
        """How many records of the changelog name each `stored_key`, whatever they say; reads all of it."""
        found = dict.fromkeys(keys, 0)
        async for batch in self._log.read(await self._log.first(), None):
            for record in batch:
                key = row_key_of(record)
                if key in found:
                    found[key] += 1
        return found

    async def drain(self) -> None:
        """Until all flushes are durable. Raises Fenced, PartitionFailedError."""
        await self._settled()
        self._check_usable()

    async def close(self) -> None:
        """Wait for the flushes on their way (or their failure, which is not raised), then release the disk.

        During an `open` it waits for that to end; cancel the open to be quick.
        """
        async with self._opening:
            await self._settled()
            self._release()

    # -- opening

    @property
    def _store(self) -> Store:
        assert self._store_or_none is not None, f"{self.path} is not open"
        return self._store_or_none

    def _release(self) -> None:
        if self._store_or_none is not None:
            self._store_or_none.close()
            self._store_or_none = None

    def _blank(self, store_id: bytes) -> Meta:
        nothing = dict.fromkeys(self.sources, -1)
        return Meta(nothing, 0, store_id, 0, nothing, 0)

    async def _blank_now(self) -> Meta:
        """META of a new store: it is to be restored from where the log begins now."""
        return replace(self._blank(new_store_id()), position=await self._log.first())

    async def _open_store(self) -> Store:
        tries = 0
        while True:
            try:
                return self._disk.open(self.path)
            except StoreLockedError:
                tries += 1
                if tries == LOCK_TRIES_MAX:
                    raise
            await asyncio.sleep(LOCK_WAIT_S)

    async def _find(self) -> _Opened:
        """Claim an epoch and make the disk equal to some prefix of the sources. Raises _WorthlessError."""
        store = self._store_or_none = await self._open_store()
        found, outbox = store.meta(), store.outbox()
        meta = await self._blank_now() if found is None else self._configured(found)
        self._crash("open")
        # Rows that only ever came from the changelog go on coming from it. Else first see who has owned it since.
        direct = found is None or meta.restoring
        reader = _reader(meta, keys_only=not direct)
        restore = _Restore(self, store, meta) if direct else None
        epoch, offset = await self._claim(meta, reader, restore)
        kind = "fresh" if found is None else "catchup"
        if not direct:
            mine = all(store_id == meta.store_id for store_id in reader.winners)
            applied = self._complete(reader.applied)
            if mine and all(meta.applied[name] >= at for name, at in applied.items()):
                kind = "same"
            elif mine:
                raise _WorthlessError(f"the disk is at {meta.applied}, the changelog at {applied}")
            elif outbox:
                raise _WorthlessError(
                    f"overtaken with {len(outbox)} outstanding flushes; the sources still have their events"
                )
            else:
                restore, reader = _Restore(self, store, meta), _reader(meta)
                await self._read(reader, meta, meta.position, offset, restore)
        await self._check_head(meta.position)
        if restore is not None:
            restore.advance()
            meta = restore.meta
        return _Opened(kind, meta, outbox, epoch, offset + 1, reader, restore.rows if restore else 0)

    async def _claim(self, meta: Meta, reader: Reader, restore: "_Restore | None") -> tuple[int, int]:
        """Compare-and-swap through the log: (epoch, offset of our claim), everything up to there read."""
        claim = meta.store_id + new_store_id()
        epoch, at = reader.epoch + 1, meta.position
        while True:
            offset = await self._log.append([announce_record(epoch, claim)])
            if offset < meta.position:
                raise ChangelogLostError(_lost_text(self.path, meta, f"the log ends at {offset}"))
            self._crash("announce")
            await self._read(reader, meta, at, offset, restore)
            at = offset + 1
            if reader.epoch == epoch and reader.claim == claim:
                return epoch, offset
            epoch = reader.epoch_seen_max + 1

    async def _read(self, reader: Reader, meta: Meta, start: int, stop: int, restore: "_Restore | None") -> None:
        known = meta.position if start == meta.position and meta.log_flush else 0
        async for batch in self._log.read(start - 1 if known else start, stop):
            for record in batch:
                if record.offset < known:
                    self._check_known(record, meta)
                    continue
                accepted = reader.feed(record)
                if accepted is not None and restore is not None:
                    restore.take(accepted)
            if restore is not None and restore.behind_bytes >= RESTORE_META_BYTES:
                await self._check_head(meta.position)
                restore.advance()

    def _check_known(self, record: LogRecord, meta: Meta) -> None:
        """The record before our position is the marker that we know, or this is another log."""
        marker = parse(record)
        if not isinstance(marker, Marker) or (marker.epoch, marker.flush) != (meta.epoch, meta.log_flush):
            raise ChangelogLostError(_lost_text(self.path, meta, "the log has another record there"))

    async def _check_head(self, start: int) -> None:
        """What was read from `start` on is all that there was: an owner may delete the log's head at any time."""
        first = await self._log.first()
        if first > start:
            raise _WorthlessError(f"the changelog begins at {first}, the disk needs it from {start}")

    async def _adopt(self, opened: _Opened, kind: str, reason: str) -> OpenReport:
        """Settle the outbox and write again what the log's readers must not miss, all as the epoch's first flush."""
        for _, entry in opened.outbox:
            if entry.downstream:
                await self._publish(list(entry.downstream))
        self._crash("outbox")
        touched = opened.reader.uncovered_keys()
        touched.update(key for _, entry in opened.outbox for key in entry.keys)
        base = opened.reader.marker_epoch, opened.reader.flush
        applied = opened.meta.applied
        self._epoch, self._flushes, self._next_offset = opened.epoch, 1, opened.position
        self._announced_at = opened.position - 1
        self._slot = self._slot_bytes = 0
        self._repair, self._repaired_by, self._failure = set(), 0, None
        self._deleted_since = False
        marker = Marker(opened.epoch, KIND_ADOPT, *base, 1, len(touched), applied)
        last = await self._append_rows(self._stored(sorted(touched)), marker)
        self._crash("adopt")
        names_deleted = opened.meta.names_deleted or self._deleted_since
        self._meta = self._beyond(replace(opened.meta, restoring=False, names_deleted=names_deleted), last, marker)
        self._store.write({}, self._meta, settled=[outbox_id for outbox_id, _ in opened.outbox])
        self.truncatable_to = opened.reader.truncatable_to
        self._sweep_from = b""
        return OpenReport(
            kind or opened.kind,
            opened.epoch,
            base,
            len(opened.outbox),
            opened.read,
            len(touched),
            dict(applied),
            reason,
        )

    def _stored(self, keys: Sequence[bytes]) -> Iterator[tuple[bytes, bytes | None]]:
        for at in range(0, len(keys), READ_KEYS_MAX):
            some = keys[at : at + READ_KEYS_MAX]
            rows = dict(zip(some, self._store.get_many(some), strict=True))
            self._owed(rows)
            yield from rows.items()

    def _configured(self, meta: Meta) -> Meta:
        return replace(meta, applied=self._complete(meta.applied), log_applied=self._complete(meta.log_applied))

    def _complete(self, applied: Mapping[str, int]) -> dict[str, int]:
        """`applied` in the order of our sources, -1 for those that are new."""
        unknown = applied.keys() - set(self.sources)
        if unknown:
            raise SourcesError(
                f"{self.path}: the state has applied {sorted(unknown)}, this partition reads {self.sources}; "
                "configure the topics that it was built from, or delete the folder and the changelog"
            )
        return {name: applied.get(name, -1) for name in self.sources}

    # -- publishing

    def _check_usable(self) -> None:
        if isinstance(self._failure, Fenced):
            raise Fenced(*self._failure.args) from self._failure
        if self._failure is not None:
            raise PartitionFailedError(
                f"{self.path}: a flush could not be published ({self._failure!r}); it is on disk: close, open again"
            ) from self._failure
        assert self._store_or_none is not None, f"{self.path} is not open"

    async def _written(self) -> None:
        """Until a large flush whose caller has gone is on disk, or has failed as a whole."""
        while (writing := self._writing) is not None:
            await asyncio.wait({writing})
            if self._writing is writing:
                self._writing = None

    async def _settled(self) -> None:
        await self._written()
        while self._under_way:
            await self._under_way[0].finished.wait()

    async def _room(self) -> None:
        while len(self._under_way) >= self._depth:
            await self._under_way[0].finished.wait()
        if self._failure is not None:
            self._check_usable()

    async def _write_aside(
        self, rows: dict[bytes, bytes | None], downstream: list[tuple[bytes, bytes]], applied: dict[str, int]
    ) -> None:
        """The batch of a large flush, written by a thread."""
        outbox_id = flush_id(self._epoch, self._flushes + 1)
        entry, owed = OutboxEntry(applied, downstream, list(rows)), self._owed(rows)
        async with self._meta_lock:
            meta = replace(self._meta, applied=applied, names_deleted=self._meta.names_deleted or bool(owed))
            await asyncio.to_thread(
                self._store.write, rows, meta, entry=(outbox_id, entry), owed=owed, piecewise=self._piecewise
            )
            self._taken(meta, rows, downstream, outbox_id)

    def _taken(
        self,
        meta: Meta,
        rows: dict[bytes, bytes | None],
        downstream: list[tuple[bytes, bytes]],
        outbox_id: bytes,
    ) -> None:
        self._meta = meta
        self._crash("write")
        self._send(rows, downstream, outbox_id)

    def _send(
        self,
        rows: dict[bytes, bytes | None],
        downstream: list[tuple[bytes, bytes]],
        outbox_id: bytes | None,
        sweep_rows: int | None = None,
    ) -> None:
        """Put a flush on its way, with repairs and some of the sweep."""
        self._flushes += 1
        if self._repair:
            rows.update(self._stored(sorted(self._repair - rows.keys())))
            self._meta = replace(self._meta, names_deleted=self._meta.names_deleted or self._deleted_since)
            self._repair.clear()
            self._repaired_by = self._flushes
        kind = KIND_SWEPT if self._add_sweep(rows, sweep_rows or self._sweep_rows) else KIND_RUNNING
        flush = _Flush(self._flushes, kind, rows, downstream, self._meta.applied, outbox_id)
        before = self._under_way[-1] if self._under_way else None
        self._under_way.append(flush)
        task = asyncio.get_running_loop().create_task(self._settle(flush, before))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _add_sweep(self, rows: dict[bytes, bytes | None], count: int) -> bool:
        """Add the next untouched rows; whether the sweep ends with them."""
        if self._sweep_from is None:
            return False
        some = list(islice(self._store.items(self._sweep_from), count))
        for key, row in some:
            rows.setdefault(key, row)
        if len(some) < count:
            self._sweep_from = None
            return True
        self._sweep_from = some[-1][0] + b"\0"
        return False

    async def _settle(self, flush: _Flush, before: _Flush | None) -> None:
        """Steps 3 to 5."""
        try:
            if before is not None:
                await before.published.wait()
            if flush.downstream and self._failure is None:
                await self._publish(flush.downstream)  # 3
            self._crash("publish")
            flush.published.set()
            if before is not None:
                await before.finished.wait()
            if self._failure is None:
                await self._settle_rows(flush)
        except BaseException as failure:  # whatever it is, no later flush may pass this one
            self._failure = self._failure or failure
            if not isinstance(failure, Exception):
                raise
            if isinstance(failure, Fenced):
                self._on_fenced()
        finally:
            self._under_way.remove(flush)
            flush.published.set()
            flush.finished.set()

    async def _settle_rows(self, flush: _Flush) -> None:
        marker = Marker(self._epoch, flush.kind, 0, 0, flush.number, len(flush.rows), flush.applied, self._slot)
        last = await self._append_rows(leaving(flush.rows), marker)  # 4
        self._crash("marker")
        async with self._meta_lock:
            self._meta = self._beyond(self._meta, last, marker)
            settled = [] if flush.outbox_id is None else [flush.outbox_id]
            self._store.write({}, self._meta, settled=settled)  # 5
        self._crash("commit")
        if flush.kind == KIND_SWEPT:
            self.truncatable_to = self._announced_at
        self._on_durable(dict(flush.applied))

    def _beyond(self, meta: Meta, offset: int, marker: Marker) -> Meta:
        """`meta` with its place in the changelog behind the marker at `offset`.

        It stays where it is while repairs are owed: the next open must find their reason again.
        """
        if self._repair or marker.flush < self._repaired_by:
            return meta
        return replace(
            meta,
            epoch=marker.epoch,
            position=offset + 1,
            log_applied=marker.applied,
            log_flush=marker.flush,
        )

    async def _append_rows(self, rows: Iterable[tuple[bytes, bytes | None]], marker: Marker) -> int:
        """Rows, in appends of bounded size, each acknowledged before the next; the marker in the last one."""
        chunk: list[tuple[bytes, bytes | None]] = []
        size = 0
        for key, value in row_records(marker.epoch, marker.flush, rows):
            if chunk and (size >= self._append_bytes_max or len(chunk) >= APPEND_RECORDS_MAX):
                await self._append(chunk)
                self._crash("chunk")
                chunk, size = [], 0
            chunk.append((key, value))
            size += len(key) + len(value)
            self._slot_bytes += len(key) + len(value)
        self._crash("rows")
        chunk.append(marker_record(marker))
        last = await self._append(chunk)
        if self._slot_bytes >= MARKER_SLOT_BYTES:
            self._slot, self._slot_bytes = self._slot + 1, 0
        return last

    async def _append(self, records: Sequence[tuple[bytes, bytes | None]]) -> int:
        """Append, and notice who else has written: ours alone would follow on our last record."""
        last = await self._log.append(records)
        begins = last - len(records) + 1
        if begins < self._next_offset:
            raise ChangelogLostError(
                f"{self.path}: the changelog went back from offset {self._next_offset} to {begins}; records that were "
                "acknowledged are gone (topic made anew, unclean leader election?); restore the topic, or delete the "
                "folder to go on with what it has"
            )
        if begins > self._next_offset:
            await self._inspect(self._next_offset, begins, last)
        self._next_offset = last + 1
        return last

    async def _inspect(self, start: int, begins: int | None = None, last: int | None = None) -> None:
        """Read what stands between our records, or behind our last one: a newer owner, late rows of an older one, or
        a doubled append."""
        newer = 0
        async for batch in self._log.read(start, last):
            for record in batch:
                match parse(record):
                    case Announce() as announce:
                        newer = max(newer, announce.epoch)
                    case Row() as row if row.epoch != self._epoch or begins is None or record.offset < begins:
                        self._repair.add(row.key)  # it may hide a good row from a compactor
        if newer > self._epoch:
            raise Fenced(f"{self.path}: epoch {self._epoch} was overtaken by {newer}")


class _Restore:
    """Brings a store along the changelog: accepted flushes, some together, in batches of bounded size.

    Rows run ahead of META, which says so (`Meta.restoring`): a restore that is cut off goes on at META's position.
    """

    def __init__(self, partition: Partition, store: Store, meta: Meta) -> None:
        self.meta = replace(meta, restoring=True)
        self.rows = 0
        self.behind_bytes = 0  # rows taken since META was written
        self._partition = partition
        self._store = store
        self._waiting: dict[bytes, bytes | None] = {}
        self._waiting_bytes = 0
        self._store.write({}, self.meta)

    def take(self, accepted: Accepted) -> None:
        """The next flush of the changelog."""
        size = _size(accepted.rows.items())
        self.rows += len(accepted.rows)
        self.behind_bytes += size
        self._waiting_bytes += size
        if self._waiting:
            self._waiting.update(accepted.rows)
        else:
            self._waiting = accepted.rows
        applied = self._partition._complete(accepted.applied)
        self.meta = replace(
            self.meta,
            applied=applied,
            epoch=accepted.epoch,
            position=accepted.position,
            log_applied=applied,
            log_flush=accepted.flush,
            names_deleted=self.meta.names_deleted or bool(self._partition._owed(accepted.rows)),
        )
        if self._waiting_bytes >= RESTORE_BYTES_MAX:
            self._write_rows()

    def advance(self) -> None:
        """All rows taken to disk, and META with them: the log up to here was there when it was read."""
        self._write_rows()
        self._store.write({}, self.meta)
        self.behind_bytes = 0
        self._partition._crash("restore")

    def _write_rows(self) -> None:
        while self._waiting:  # rows leave memory as they are written
            batch: dict[bytes, bytes | None] = {}
            size = 0
            while self._waiting and size < RESTORE_BYTES_MAX:
                key, row = self._waiting.popitem()
                batch[key] = row
                size += len(key) + len(row or b"")
            self._store.write(batch, owed=self._partition._owed(batch))  # a fresh disk's log names them, too
            self._partition._crash("restore")
        self._waiting_bytes = 0


def _reader(meta: Meta, *, keys_only: bool = False) -> Reader:
    return Reader(epoch=meta.epoch, flush=meta.log_flush, applied=meta.log_applied, keys_only=keys_only)


def _size(rows: Collection[tuple[bytes, bytes | None]]) -> int:
    return sum(len(key) + len(row or b"") for key, row in rows)


def _lost_text(path: Path, meta: Meta, what: str) -> str:
    return (
        f"{path}: this store has read its changelog up to offset {meta.position - 1}, but {what}. Records that were "
        "acknowledged are gone, or the topic was made anew. If that was meant, delete the folder: the state is then "
        "what the changelog and the sources still have. If not, restore the topic before any worker starts"
    )
