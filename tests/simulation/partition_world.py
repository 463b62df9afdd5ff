"""A small world around one partition: two workers, faults by a seed, and what must hold whatever happens.

Toy fold: a row is (count, hash over the offsets of all its events in order), some events delete the row, some do
nothing, some send a record downstream. The two sources have one fixed order, so that the state is a function of how
many events of it are applied.
"""

import asyncio
import random
import struct
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from bench.doubles import MemoryDisk, MemoryLog, compacted
from state.changelog import LogRecord, Reader
from state.partition import Fenced, Partition, PartitionFailedError, digest
from state.store import Disk, Meta, OutboxEntry, Store

SOURCES = ("clicks", "comments")
KEYS = (5, 25, 100)
DELETES_PERCENT = (2, 8, 30)
EVENTS = (60, 220)  # least and most of a world
LIVES = (3, 9)
LAG_MARKERS = 8  # compaction leaves the last ones alone; more than repairs may take: depth + 2
ROW = struct.Struct("<QQ")
OUT = struct.Struct("<BqQ")
MASK = (1 << 64) - 1

MakePartition = Callable[..., Partition]


class Event(NamedTuple):
    """One event of a source."""

    source: str
    offset: int
    key: bytes
    deed: str  # "add", "delete", "nothing"
    is_reported: bool  # downstream


class KilledError(BaseException):
    """The process ends here."""


class LogFailedError(Exception):
    """The broker did not acknowledge in time."""


def fold(
    events: Sequence[Event], rows: dict[bytes, bytes | None]
) -> tuple[dict[bytes, bytes | None], list[tuple[bytes, bytes]]]:
    """Changed rows and downstream records; `rows` has the rows before, None for none."""
    changed: dict[bytes, bytes | None] = {}
    out: list[tuple[bytes, bytes]] = []
    for event in events:
        if event.deed == "nothing":
            continue
        before = changed[event.key] if event.key in changed else rows.get(event.key)
        count, mixed = ROW.unpack(before) if before is not None else (0, 0)
        source = SOURCES.index(event.source)
        mixed = (mixed * 1000003 + event.offset * 2 + source + 1) & MASK
        changed[event.key] = None if event.deed == "delete" else ROW.pack(count + 1, mixed)
        if event.is_reported:
            out.append((event.key, OUT.pack(source, event.offset, mixed)))
    return changed, out


def deduplicated(records: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """As the downstream reader does it: what is at or below the highest offset of its source is dropped."""
    highest = dict.fromkeys(range(len(SOURCES)), -1)
    kept = []
    for key, value in records:
        source, offset, _ = OUT.unpack(value)
        if offset > highest[source]:
            highest[source] = offset
            kept.append((key, value))
    return kept


class Truth:
    """The undisturbed run."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.events = events
        self.states: list[dict[bytes, bytes]] = [{}]  # after n events
        self.applied: list[dict[str, int]] = [dict.fromkeys(SOURCES, -1)]
        self.out: list[tuple[bytes, bytes]] = []
        for event in events:
            rows = dict(self.states[-1])
            changed, out = fold([event], dict(rows))
            for key, row in changed.items():
                if row is None:
                    rows.pop(key, None)
                else:
                    rows[key] = row
            self.states.append(rows)
            self.applied.append({**self.applied[-1], event.source: event.offset})
            self.out += out

    def position(self, applied: Mapping[str, int]) -> int:
        """How many events are applied."""
        position = sum(offset + 1 for offset in applied.values())
        assert dict(applied) == self.applied[position], "applied is no prefix of the sources"
        return position

    def check(self, rows: Mapping[bytes, bytes], applied: Mapping[str, int], where: str) -> None:
        expected = self.states[self.position(applied)]
        wrong = [key for key in expected.keys() | rows.keys() if expected.get(key) != rows.get(key)]
        assert not wrong, f"{where}: {len(wrong)} rows are not those at {dict(applied)}: {sorted(wrong)[:5]}"


@dataclass
class Life:
    """One process, from its start to its end or to the kill after `steps_left` named steps."""

    worker: str
    steps_left: int | None
    fault_rate: float
    killed: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    stores: list[Store] = field(default_factory=list)
    partition: Partition | None = None
    last_step: str = ""

    def step(self, name: str) -> None:
        self.alive()
        self.last_step = name
        if self.steps_left is not None:
            self.steps_left -= 1
            if self.steps_left <= 0:
                self.kill()

    def kill(self) -> None:
        self.killed = True
        self.ended.set()
        raise KilledError(self.last_step)

    def partition_tasks(self) -> "set[asyncio.Task[None]]":
        return set() if self.partition is None else set(self.partition._tasks)

    def alive(self) -> None:
        if self.killed:
            raise KilledError(self.last_step)


class World:
    """Everything that outlives a process."""

    def __init__(self, seed: int, disk: Disk, folder: Path, make: MakePartition = Partition) -> None:
        self.random = random.Random(seed)
        self.disk = disk
        self.folder = folder
        self.make = make
        self.log = MemoryLog()
        self.out: list[tuple[bytes, bytes]] = []
        self.late: list[Callable[[], object]] = []  # batches of dead or fenced processes on their way to the broker
        self.truth = Truth(self._events())
        self.kinds: list[str] = []
        self.kills: list[str] = []
        self._follower = Reader(keys_only=True)
        self._followed = 0
        self._markers: list[int] = []

    def _events(self) -> list[Event]:
        ends = dict.fromkeys(SOURCES, 0)
        events = []
        keys = self.random.choice(KEYS)
        weights = (90, self.random.choice(DELETES_PERCENT), 7)
        for _ in range(self.random.randint(*EVENTS)):
            source = self.random.choice(SOURCES)
            deed = self.random.choices(("add", "delete", "nothing"), weights)[0]
            key = b"%d" % self.random.randrange(keys)
            events.append(Event(source, ends[source], key, deed, self.random.random() < 0.4))
            ends[source] += 1
        return events

    def path(self, worker: str) -> Path:
        return self.folder / worker

    def maintain(self, truncatable_to: int | None) -> None:
        """What brokers and operators do at any time: compact with a lag, delete the head after SWEPT."""
        if self.random.random() < 0.3:
            for record in self.log.everything[self._followed :]:
                if (accepted := self._follower.feed(record)) is not None:
                    self._markers.append(accepted.position)
            self._followed = len(self.log.everything)
            if len(self._markers) > LAG_MARKERS:
                self.log.compact_before(self._markers[-LAG_MARKERS - 1])
        if truncatable_to is not None and self.random.random() < 0.3:
            self.log.delete_before(truncatable_to)

    def land_late(self) -> None:
        while self.late and self.random.random() < 0.5:
            self.late.pop(self.random.randrange(len(self.late)))()


class LifeLog:
    """The log as one process sees it, with the faults of its connection."""

    def __init__(self, world: World, life: Life) -> None:
        self.world, self.life = world, life

    async def append(self, records: Sequence[tuple[bytes, bytes | None]]) -> int:
        return await deliver(self.world, self.life, list(records), self.world.log.land)

    async def read(self, start: int, stop: int | None) -> AsyncIterator[list[LogRecord]]:
        async for batch in self.world.log.read(start, stop):
            self.life.alive()
            yield batch

    async def first(self) -> int:
        self.life.alive()
        return await self.world.log.first()


async def deliver(world: World, life: Life, records: list[tuple[bytes, Any]], land: Callable[[list[Any]], int]) -> int:
    """A batch to the broker: late, torn, doubled, unacknowledged, or as it should be."""
    life.alive()
    chance = world.random
    try:
        for _ in range(chance.choice((1, 1, 2, 5, 20))):
            await asyncio.sleep(0)
    except asyncio.CancelledError:
        lose(world, records, land)
        raise
    life.alive()
    world.land_late()
    if chance.random() >= life.fault_rate:
        return land(records)
    fault = chance.choice(("torn", "doubled", "failed", "killed"))
    if fault == "doubled":
        land(records[: chance.randint(1, len(records))])
        return land(records)
    if fault == "torn":
        land(records[: chance.randrange(len(records))])
        raise LogFailedError
    if fault == "failed":
        lose(world, records, land)
        raise LogFailedError
    lose(world, records, land)
    life.kill()
    raise AssertionError


def lose(world: World, records: list[Any], land: Callable[[list[Any]], int]) -> None:
    """Nobody waits for this batch any more: it lands never, now, or later, and a prefix of it at that."""
    prefix = records[: world.random.randint(0, len(records))]
    if not prefix:
        return
    if world.random.random() < 0.5:
        land(prefix)
    else:
        world.late.append(lambda: land(prefix))


class LifeDisk:
    """The disk as one process sees it: nothing is written after its end."""

    def __init__(self, world: World, life: Life) -> None:
        self.world, self.life = world, life

    def open(self, path: Path) -> Store:
        self.life.alive()
        store = self.world.disk.open(path)
        self.life.stores.append(store)
        return LifeStore(store, self.life)

    def wipe(self, path: Path) -> None:
        self.life.alive()
        self.world.disk.wipe(path)

    def stores(self, folder: Path) -> list[Path]:
        return self.world.disk.stores(folder)


class LifeStore:
    """A store of one process."""

    def __init__(self, store: Store, life: Life) -> None:
        self.store, self.life = store, life

    def meta(self) -> Meta | None:
        return self.store.meta()

    def outbox(self) -> list[tuple[bytes, OutboxEntry]]:
        return self.store.outbox()

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return self.store.get_many(keys)

    def items(self, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        return self.store.items(start)

    def snapshot(self) -> tuple[Meta | None, Iterator[tuple[bytes, bytes]]]:
        return self.store.snapshot()

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
        self.life.alive()
        self.store.write(rows, meta, entry=entry, settled=settled, owed=owed, piecewise=piecewise)

    def owes_purge(self) -> bool:
        return self.store.owes_purge()

    def purge(self) -> None:
        self.store.purge()

    def memory_bytes(self) -> int:
        return self.store.memory_bytes()

    def disk_bytes(self) -> int:
        return self.store.disk_bytes()

    def row_count_estimate(self) -> int:
        return self.store.row_count_estimate()

    def close(self) -> None:
        if self.store in self.life.stores:
            self.life.stores.remove(self.store)
            self.store.close()


def restored(records: Iterable[LogRecord]) -> tuple[dict[bytes, bytes], dict[str, int]]:
    """Rows and applied offsets that these records tell."""
    reader = Reader(applied=dict.fromkeys(SOURCES, -1))
    rows: dict[bytes, bytes] = {}
    for record in records:
        accepted = reader.feed(record)
        if accepted is not None:
            put(rows, accepted.rows)
    return rows, reader.applied


def put(rows: dict[bytes, bytes], changed: Mapping[bytes, bytes | None]) -> None:
    for key, row in changed.items():
        if row is None:
            rows.pop(key, None)
        else:
            rows[key] = row


async def work(world: World, life: Life, *, to_the_end: bool = False) -> None:
    """What a process does: open, fold, flush, sweep; for a while, or until nothing is left."""
    chance = world.random

    async def publish(records: list[tuple[bytes, bytes]]) -> None:
        def land(landed: list[tuple[bytes, bytes]]) -> int:
            world.out.extend(landed)
            return 0

        await deliver(world, life, records, land)

    life.partition = world.make(
        path=world.path(life.worker),
        changelog=LifeLog(world, life),
        publish=publish,
        sources=SOURCES,
        pipeline_depth=chance.choice((1, 2, 3)),
        sweep_rows=chance.choice((1, 5, 50)),
        append_bytes_max=chance.choice((1, 60, 1 << 20)),
        crash=life.step,
        disk=LifeDisk(world, life),
    )
    try:
        await work_on(world, life.partition, to_the_end=to_the_end)
    except (Fenced, PartitionFailedError):
        if chance.random() < 0.5:  # else the process ends
            await life.partition.close()
        raise


async def work_on(world: World, partition: Partition, *, to_the_end: bool) -> None:
    """Open, fold, flush, sweep."""
    chance = world.random
    report = await partition.open()
    world.kinds.append(report.kind)
    world.truth.check(dict(partition.items()), partition.applied, f"open as {report.kind}")
    flushes = chance.randint(1, 40)
    while to_the_end or flushes:
        flushes -= 1
        at = world.truth.position(partition.applied)
        batch = world.truth.events[at : at + chance.randint(1, 12)]
        if to_the_end and not batch:
            break
        keys = list({event.key: None for event in batch})
        rows, out = fold(batch, dict(zip(keys, partition.get_many(keys), strict=True)))
        if batch:
            await partition.flush(rows, out, world.truth.applied[at + len(batch)])
        if not batch or chance.random() < 0.2:
            await partition.sweep()
        if chance.random() < 0.1:
            await partition.drain()
        if chance.random() < 0.05:
            await partition.renew()
        world.maintain(partition.truncatable_to)
    if to_the_end:
        while await partition.sweep():
            pass
        world.maintain(partition.truncatable_to)
    await partition.drain()
    at = world.truth.position(partition.applied)
    assert partition.digest() == digest(sorted(world.truth.states[at].items()), world.truth.applied[at])
    await partition.close()


async def live(world: World, life: Life) -> None:
    """A life, whatever ends it."""
    task = asyncio.ensure_future(work(world, life))
    end = asyncio.ensure_future(life.ended.wait())
    try:
        await asyncio.wait({task, end}, return_when=asyncio.FIRST_COMPLETED)
        if not life.killed:
            task.result()
    except (Fenced, PartitionFailedError, LogFailedError):
        pass
    finally:
        if life.killed:
            world.kills.append(life.last_step)
        life.killed = True
        rest = {task, end, *life.partition_tasks()}
        for other in rest:
            other.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        for store in life.stores:
            store.close()


async def finish(world: World, worker: str) -> None:
    """An undisturbed life up to the end of the sources; claims again when a late claim fences it."""
    for _ in range(20):
        life = Life(worker, None, 0.0)
        try:
            await work(world, life, to_the_end=True)
        except Fenced:
            continue
        finally:
            for store in life.stores:
                store.close()
        return
    raise AssertionError("fenced for ever")


async def run(world: World) -> None:
    """Lives with disasters between them, then an undisturbed end, then everything that must hold."""
    chance = world.random
    for _ in range(chance.randint(*LIVES)):
        for worker in ("w1", "w2"):
            if chance.random() < 0.15:
                world.disk.wipe(world.path(worker))
            elif chance.random() < 0.15 and isinstance(world.disk, MemoryDisk):
                world.disk.lose_tail(world.path(worker), chance.randint(1, 6))
        workers = chance.sample(("w1", "w2"), chance.choice((1, 1, 2)))
        lives = [
            Life(
                worker,
                chance.choice((None, chance.randint(1, 15), chance.randint(1, 150))),
                chance.choice((0.0, 0.03, 0.1)),
            )
            for worker in workers
        ]
        await asyncio.gather(*(live(world, life) for life in lives))
    for worker in (*chance.sample(("w1", "w2"), 2), "w3"):
        await finish(world, worker)
    check(world)


def check(world: World) -> None:
    """The promises, on all that was ever written."""
    end = len(world.truth.events)
    reader = Reader(applied=dict.fromkeys(SOURCES, -1))
    rows: dict[bytes, bytes] = {}
    markers = []
    for record in world.log.everything:
        accepted = reader.feed(record)
        if accepted is not None:
            put(rows, accepted.rows)
            world.truth.check(rows, accepted.applied, f"marker at {accepted.position - 1}")
            markers.append(accepted.position)
    assert world.truth.position(reader.applied) == end
    rows, applied = restored(world.log.records)
    world.truth.check(rows, applied, "the log as compacted and truncated")
    assert world.truth.position(applied) == end
    assert deduplicated(world.out) == world.truth.out, "downstream"
    for _ in range(4):
        before = world.log.everything[: world.random.randrange(len(world.log.everything)) + 1]
        seen = [p for p in markers if p <= len(before)]
        bound = seen[-LAG_MARKERS - 1] if len(seen) > LAG_MARKERS else 0
        assert restored(compacted(before, bound)) == restored(before), f"compacted at {len(before)}"


def run_seed(seed: int, disk: Disk, folder: Path, make: MakePartition = Partition) -> World:
    """One world. Raises AssertionError where a promise is broken."""
    world = World(seed, disk, folder, make)
    limits: dict[str, Any] = {
        "RESTORE_BYTES_MAX": world.random.choice((1, 200, 4 << 20)),
        "RESTORE_META_BYTES": world.random.choice((1, 1000, 64 << 20)),
        "MARKER_SLOT_BYTES": world.random.choice((1, 2000, 16 << 20)),
    }
    with patch.multiple("state.partition", **limits):
        asyncio.run(run(world))
    return world
