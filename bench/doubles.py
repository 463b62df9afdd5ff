"""Doubles of a partition's surroundings, for tests and the simulation: a log and a disk in memory."""

import asyncio
from bisect import bisect_left
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from state.changelog import LogRecord
from state.store import Meta, OutboxEntry, Store, pack_meta, pack_outbox, unpack_meta, unpack_outbox

READ_BATCH = 7  # records a read yields at once
HISTORY_MAX = 8  # batches that a power cut may take back


class MemoryLog:
    """A changelog partition (`state.changelog.Log`). `everything` has what compaction and deletion took, too."""

    def __init__(self) -> None:
        self.records: list[LogRecord] = []
        self.everything: list[LogRecord] = []
        self.begins = 0

    async def append(self, records: Sequence[tuple[bytes, bytes | None]]) -> int:
        await asyncio.sleep(0)
        return self.land(records)

    def land(self, records: Sequence[tuple[bytes, bytes | None]]) -> int:
        for key, value in records:
            record = LogRecord(len(self.everything), key, value)
            self.records.append(record)
            self.everything.append(record)
        return len(self.everything) - 1

    async def read(self, start: int, stop: int | None) -> AsyncIterator[list[LogRecord]]:
        last = len(self.everything) - 1 if stop is None else stop
        at = start
        while at <= last:
            place = bisect_left(self.records, at, key=lambda r: r.offset)
            batch = [r for r in self.records[place : place + READ_BATCH] if r.offset <= last]
            if not batch:
                return
            at = batch[-1].offset + 1
            yield batch
            await asyncio.sleep(0)

    async def first(self) -> int:
        return self.begins

    def delete_before(self, offset: int) -> None:
        self.begins = max(self.begins, offset)
        self.records = [r for r in self.records if r.offset >= self.begins]

    def compact_before(self, bound: int) -> None:
        self.records = compacted(self.records, bound)


def compacted(records: Sequence[LogRecord], bound: int) -> list[LogRecord]:
    """What Kafka's cleaner leaves: below `bound` the last record of each key; what is above neither goes nor hides."""
    last = {r.key: r.offset for r in records if r.offset < bound}
    return [r for r in records if r.offset >= bound or last[r.key] == r.offset]


@dataclass
class Content:
    """What is on one disk."""

    rows: dict[bytes, bytes] = field(default_factory=dict)
    meta: bytes | None = None
    outbox: dict[bytes, bytes] = field(default_factory=dict)
    deleted: set[bytes] = field(default_factory=set)  # keys that the disk still names
    owed: set[bytes] = field(default_factory=set)

    def copy(self) -> "Content":
        return Content(dict(self.rows), self.meta, dict(self.outbox), set(self.deleted), set(self.owed))


class MemoryDisk:
    """`state.store.Disk`: stores that outlive their process, and may lose their last batches."""

    def __init__(self) -> None:
        self.contents: dict[Path, list[Content]] = {}  # oldest first, the last one is current

    def open(self, path: Path) -> Store:
        return MemoryStore(self.contents.setdefault(path, [Content()]))

    def wipe(self, path: Path) -> None:
        self.contents.pop(path, None)

    def stores(self, folder: Path) -> list[Path]:
        return sorted(path for path in self.contents if path.parent == folder)

    def lose_tail(self, path: Path, batches: int) -> None:
        """A power cut takes the last batches back, as far as they are remembered."""
        history = self.contents.get(path)
        if history is not None:
            del history[max(1, len(history) - batches) :]


class MemoryStore:
    """`state.store.Store` on dicts; its META and outbox entries are the real bytes."""

    def __init__(self, history: list[Content]) -> None:
        self._history = history
        self._closed = False

    @property
    def _content(self) -> Content:
        assert not self._closed
        return self._history[-1]

    def meta(self) -> Meta | None:
        return None if self._content.meta is None else unpack_meta(self._content.meta)

    def outbox(self) -> list[tuple[bytes, OutboxEntry]]:
        return [(key, unpack_outbox(value)) for key, value in sorted(self._content.outbox.items())]

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return [self._content.rows.get(key) for key in keys]

    def items(self, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        return iter(sorted(item for item in self._content.rows.items() if item[0] >= start))

    def snapshot(self) -> tuple[Meta | None, Iterator[tuple[bytes, bytes]]]:
        return self.meta(), self.items()

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
        new = self._content.copy()
        for key, row in rows.items():
            if row is None:
                new.rows.pop(key, None)
                new.deleted.add(key)
            else:
                new.rows[key] = row
        if meta is not None:
            new.meta = pack_meta(meta)
        if entry is not None:
            new.outbox[entry[0]] = pack_outbox(entry[1])
        for settled_id in settled:
            new.outbox.pop(settled_id, None)
        new.owed.update(owed)
        self._history.append(new)
        del self._history[:-HISTORY_MAX]

    def owes_purge(self) -> bool:
        return bool(self._content.owed)

    def purge(self) -> None:
        new = self._content.copy()
        new.deleted -= new.owed
        new.owed.clear()
        self._history[:] = [new]  # it syncs what it writes

    def memory_bytes(self) -> int:
        return sum(len(key) + len(row) for key, row in self._content.rows.items())

    def disk_bytes(self) -> int:
        return 0

    def row_count_estimate(self) -> int:
        return len(self._content.rows)

    def close(self) -> None:
        self._closed = True
