"""A partition's promises, one by one. (All of them at once, by chance: tests/simulation.)"""

import asyncio
import random
import resource
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rocksdict import WriteBatch

import state.partition
from bench.doubles import MemoryDisk, MemoryLog, compacted
from state.changelog import (
    KIND_ADOPT,
    KIND_RUNNING,
    KIND_SWEPT,
    LogRecord,
    Marker,
    Reader,
    Row,
    announce_record,
    parse,
    row_records,
)
from state.partition import ChangelogLostError, Fenced, Partition, PartitionFailedError, SourcesError, digest
from state.store import Disk, RocksDisk, RocksStore, Store, StoreError, StoreLockedError, StoreVersionError

SOURCES = ("clicks", "comments")
STEPS = ("fold", "write", "publish", "rows", "marker", "commit")
FULL_DISK_BYTES = 1 << 20
LARGE_ROW = bytes(range(256)) * 200
OPEN_STEPS = ("open", "announce", "restore", "outbox", "rows", "adopt")


class KilledError(BaseException):
    """The process ends here."""


@dataclass
class Surroundings:
    """What outlives a partition object."""

    log: MemoryLog = field(default_factory=MemoryLog)
    disk: Disk = field(default_factory=MemoryDisk)
    out: list[tuple[bytes, bytes]] = field(default_factory=list)
    durable: list[dict[str, int]] = field(default_factory=list)
    fenced: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    path: Path = Path("/memory")

    def partition(self, folder: str = "p", **more: Any) -> Partition:
        async def publish(records: list[tuple[bytes, bytes]]) -> None:
            await asyncio.sleep(0)
            self.out.extend(records)

        options: dict[str, Any] = {
            "path": self.path / folder,
            "changelog": self.log,
            "publish": publish,
            "sources": SOURCES,
            "pipeline_depth": 3,
            "disk": self.disk,
            "on_durable": self.durable.append,
            "on_fenced": lambda: self.fenced.append(folder),
            "crash": self.steps.append,
        }
        return Partition(**{**options, **more})

    async def opened(self, folder: str = "p", **more: Any) -> Partition:
        partition = self.partition(folder, **more)
        await partition.open()
        return partition

    def parsed(self) -> list[Any]:
        return [parse(record) for record in self.log.everything]


def add(number: int) -> tuple[dict[bytes, bytes | None], list[tuple[bytes, bytes]], dict[str, int]]:
    """The flush of the event at this offset of clicks: it changes two rows, one of them for good."""
    rows: dict[bytes, bytes | None] = {b"hot": b"%d" % number, b"user%d" % number: b"x"}
    if number >= 2:
        rows[b"user%d" % (number - 2)] = None
    return rows, [(b"out", b"%d" % number)], {"clicks": number}


def rows_after(number: int) -> dict[bytes, bytes]:
    rows: dict[bytes, bytes] = {}
    for n in range(number + 1):
        for key, row in add(n)[0].items():
            if row is None:
                del rows[key]
            else:
                rows[key] = row
    return rows


def digest_after(number: int) -> str:
    return digest(sorted(rows_after(number).items()), {"clicks": number})


async def add_all(partition: Partition, numbers: Iterable[int]) -> None:
    for number in numbers:
        await partition.flush(*add(number))
    await partition.drain()


def log_rows(records: Sequence[LogRecord]) -> dict[bytes, bytes]:
    reader, rows = Reader(), dict[bytes, bytes]()
    for record in records:
        accepted = reader.feed(record)
        for key, row in accepted.rows.items() if accepted else ():
            if row is None:
                rows.pop(key, None)
            else:
                rows[key] = row
    return rows


# -- a quiet life


async def test_a_source_that_is_new_to_a_state_begins_before_its_first_record() -> None:
    around = Surroundings()
    partition = await around.opened()
    await add_all(partition, range(3))
    await partition.close()
    wider = around.partition(sources=(*SOURCES, "erasures"))
    report = await wider.open()
    assert report.kind == "same"
    assert report.applied == {"clicks": 2, "comments": -1, "erasures": -1}
    await wider.flush({b"hot": None}, [], {"erasures": 0})
    await wider.close()
    restored = around.partition("elsewhere", sources=(*SOURCES, "erasures"))
    assert (await restored.open()).applied == {"clicks": 2, "comments": -1, "erasures": 0}
    assert restored.get_many([b"hot"]) == [None]
    await restored.close()
    with pytest.raises(SourcesError, match="erasures"):
        await around.partition("elsewhere").open()


async def test_flushed_rows_are_read_back_and_survive_a_close() -> None:
    around = Surroundings()
    partition = around.partition()
    report = await partition.open()
    assert (report.kind, report.epoch, report.base, report.outbox, report.read) == ("fresh", 1, (0, 0), 0, 0)
    assert report.applied == {"clicks": -1, "comments": -1}
    await add_all(partition, range(5))
    await partition.flush({}, [], {"comments": 3})
    assert partition.applied == {"clicks": 4, "comments": 3}
    assert partition.get_many([b"user4", b"user0", b"hot"]) == [b"x", None, b"4"]
    before = partition.digest()
    assert before == digest(sorted(rows_after(4).items()), {"comments": 3, "clicks": 4})
    await partition.close()
    report = await partition.open()
    assert (report.kind, report.epoch, report.base) == ("same", 2, (1, 7))
    assert report.applied == {"clicks": 4, "comments": 3}
    assert dict(partition.items()) == rows_after(4)
    assert partition.digest() == before
    assert partition.epoch == 2
    assert partition.row_count_estimate() == 3
    assert partition.disk_bytes() == 0
    await partition.close()


async def test_steps_follow_each_other_as_numbered() -> None:
    around = Surroundings()
    partition = await around.opened()
    around.steps.clear()
    await add_all(partition, [0])
    assert tuple(around.steps) == STEPS
    assert around.durable == [{"clicks": 0, "comments": -1}]
    assert around.out == [(b"out", b"0")]
    await partition.close()


async def test_another_disk_is_restored_and_an_old_one_catches_up() -> None:
    around = Surroundings()
    first = await around.opened("first")
    await add_all(first, range(3))
    await first.close()
    second = around.partition("second")
    report = await second.open()
    assert (report.kind, report.read, report.repaired) == ("fresh", 7, 0)
    assert second.digest() == digest_after(2)
    await add_all(second, range(3, 6))
    await second.close()
    report = await first.open()
    assert (report.kind, report.applied["clicks"]) == ("catchup", 5)
    assert first.digest() == digest_after(5)
    await first.close()


def test_digest_is_of_the_state_and_of_nothing_else() -> None:
    rows = [(b"a", b"1"), (b"b", b"")]
    same = digest(rows, {"x": 1, "y": 2})
    assert same == digest(iter(rows), {"y": 2, "x": 1, "new": -1})
    others = [
        digest(rows, {"x": 1, "y": 3}),
        digest([(b"a", b"1b"), (b"", b"")], {"x": 1, "y": 2}),
        digest(rows[:1], {"x": 1, "y": 2}),
    ]
    assert len({same, *others}) == 4


async def test_pipeline_is_as_deep_as_asked() -> None:
    gate = asyncio.Event()

    async def publish(records: list[tuple[bytes, bytes]]) -> None:
        await gate.wait()

    around = Surroundings()
    partition = await around.opened(publish=publish, pipeline_depth=3)
    empty = partition.memory_bytes()
    await partition.flush(*add(0))
    await partition.flush(*add(1))
    assert partition.applied["clicks"] == 1
    assert partition.memory_bytes() > 2 * empty
    assert partition.flushes_under_way == 2
    third = asyncio.ensure_future(partition.flush(*add(2)))
    for _ in range(50):
        await asyncio.sleep(0)
    assert not third.done()
    assert partition.applied["clicks"] == 2, "on disk before there is room"
    assert around.durable == [] and partition.durable["clicks"] == -1
    gate.set()
    await third
    await partition.drain()
    assert [applied["clicks"] for applied in around.durable] == [0, 1, 2] and partition.durable["clicks"] == 2
    await partition.close()


async def test_depth_1_returns_when_durable() -> None:
    around = Surroundings()
    partition = await around.opened(pipeline_depth=1)
    await partition.flush(*add(0))
    assert [applied["clicks"] for applied in around.durable] == [0]
    await partition.close()


async def test_flushes_do_not_overtake_each_other() -> None:
    around = Surroundings()
    order: list[str] = []

    async def publish(records: list[tuple[bytes, bytes]]) -> None:
        number = int(records[0][1])
        order.append(f"out {number}")
        for _ in range(10 - 3 * number):  # later ones are faster
            await asyncio.sleep(0)
        order.append(f"out {number} acknowledged")

    partition = await around.opened(publish=publish, sweep_rows=1)
    await add_all(partition, range(4))
    assert order == [f"out {n}{more}" for n in range(4) for more in ("", " acknowledged")]
    flushes = [r.flush for r in around.parsed() if isinstance(r, Row | Marker)]
    assert flushes == sorted(flushes)
    await partition.close()


async def test_large_flush_goes_in_acknowledged_chunks_with_the_marker_last(tmp_path: Path) -> None:
    around = Surroundings(disk=RocksDisk(), path=tmp_path)
    appends: list[int] = []
    land = around.log.land

    def counted(records: Sequence[tuple[bytes, bytes | None]]) -> int:
        appends.append(sum(len(key) + len(value or b"") for key, value in records))
        return land(records)

    around.log.land = counted  # type: ignore[method-assign]
    partition = await around.opened(append_bytes_max=100_000)
    rows: dict[bytes, bytes | None] = {b"%06d" % n: random.Random(n).randbytes(1000) for n in range(3000)}
    appends.clear()
    await partition.flush(rows, [], {"clicks": 0})
    await partition.drain()
    assert len(appends) == 31
    assert max(appends) < 102_000
    assert isinstance(around.parsed()[-1], Marker)
    assert around.steps.count("chunk") == 30
    before = partition.digest()
    await partition.close()
    other = await around.opened("other")
    assert other.digest() == before
    await other.close()


class SlowStore:
    """Holds the large writes of a thread until told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = asyncio.Event()
        self.failure: Exception | None = None
        monkeypatch.setattr(state.partition, "INLINE_ROWS_MAX", 1)
        monkeypatch.setattr("state.partition.asyncio.to_thread", self.to_thread)

    async def to_thread(self, write: Callable[..., None], *arguments: Any, **more: Any) -> None:
        await self.go.wait()
        if self.failure is not None:
            raise self.failure
        write(*arguments, **more)


async def test_large_flush_is_written_beside_the_loop_and_flushes_on_their_way_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow = SlowStore(monkeypatch)
    around = Surroundings()
    partition = await around.opened()
    append = around.log.append

    async def slow_append(records: Sequence[tuple[bytes, bytes | None]]) -> int:
        for _ in range(10):
            await asyncio.sleep(0)
        return await append(records)

    around.log.append = slow_append  # type: ignore[method-assign]
    await partition.flush({b"hot": b"0"}, [], {"clicks": 0})
    large = asyncio.ensure_future(partition.flush({b"hot": b"1", b"cold": b"1"}, [], {"clicks": 1}))
    for _ in range(50):
        await asyncio.sleep(0)
    assert around.steps.count("marker") == 1, "the small one is in the log"
    assert around.durable == [], "and waits for the batch that is on its way to disk"
    assert partition.applied["clicks"] == 0
    slow.go.set()
    await large
    assert partition.applied["clicks"] == 1
    await partition.drain()
    assert [applied["clicks"] for applied in around.durable] == [0, 1]
    await partition.close()
    report = await partition.open()
    assert (report.kind, report.outbox, report.applied["clicks"]) == ("same", 0, 1)
    await partition.close()


@pytest.mark.parametrize("after", ["flush", "sweep", "drain", "close"])
async def test_cancelled_large_flush_is_whole_before_anything_else(after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowStore(monkeypatch)
    around = Surroundings()
    partition = await around.opened()
    large = asyncio.ensure_future(partition.flush(*add(0)))
    await asyncio.sleep(0)
    large.cancel()
    await asyncio.gather(large, return_exceptions=True)
    uses: dict[str, Callable[[], Any]] = {
        "flush": lambda: partition.flush({}, [], {"clicks": 1}),
        "sweep": partition.sweep,
        "drain": partition.drain,
        "close": partition.close,
    }
    use = asyncio.ensure_future(uses[after]())
    for _ in range(10):
        await asyncio.sleep(0)
    assert not use.done()
    slow.go.set()
    await use
    await partition.close()
    assert around.out == [(b"out", b"0")]
    assert log_rows(around.log.records) == rows_after(0)


async def test_large_flush_that_the_disk_refuses_has_not_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowStore(monkeypatch)
    slow.failure = OSError("disk full")
    slow.go.set()
    around = Surroundings()
    partition = await around.opened()
    with pytest.raises(OSError, match="disk full"):
        await partition.flush(*add(0))
    assert partition.applied["clicks"] == -1
    slow.failure = None
    await add_all(partition, [0])
    assert partition.digest() == digest_after(0)
    await partition.close()


@pytest.mark.parametrize(
    ("rows", "downstream", "applied", "complaint"),
    [
        ({}, [], {"likes": 1}, "the sources are"),
        ({}, [], {"clicks": -1}, "go back"),
        ({b"a": b"1"}, [], {}, "without progress"),
        ({}, [(b"k", b"v")], {"clicks": 0}, "without progress"),
    ],
)
async def test_flush_that_breaks_the_promise_is_refused(
    rows: Mapping[bytes, bytes | None],
    downstream: Sequence[tuple[bytes, bytes]],
    applied: Mapping[str, int],
    complaint: str,
) -> None:
    partition = await Surroundings().opened()
    await add_all(partition, [0])
    with pytest.raises(ValueError, match=complaint):
        await partition.flush(rows, downstream, applied)
    assert partition.digest() == digest_after(0)
    await partition.close()


# -- kills


async def killed_at(around: Surroundings, step: str, count: int, folder: str = "p") -> str:
    """A life that flushes from where it stands, and is killed at the `count`-th `step`. The kind of its open."""
    dead = asyncio.Event()
    left = [count]
    opened = ""

    def crash(name: str) -> None:
        if dead.is_set():
            raise KilledError
        if name == step:
            left[0] -= 1
            if left[0] == 0:
                dead.set()
                raise KilledError

    async def live(partition: Partition) -> None:
        nonlocal opened
        opened = (await partition.open()).kind
        await add_all(partition, range(partition.applied["clicks"] + 1, partition.applied["clicks"] + 12))

    partition = around.partition(folder, crash=crash)
    tasks = {asyncio.ensure_future(live(partition)), asyncio.ensure_future(dead.wait())}
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    rest = tasks | partition._tasks
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)
    partition._release()
    return opened


@pytest.mark.parametrize("wiped", [False, True])
@pytest.mark.parametrize("step", STEPS)
async def test_kill_between_any_two_steps_loses_and_doubles_nothing(step: str, wiped: bool) -> None:
    around = Surroundings()
    await killed_at(around, step, 4)
    if wiped:
        around.disk.wipe(Path("/memory/p"))
    partition = around.partition()
    report = await partition.open()
    assert report.kind == ("fresh" if wiped else "same")
    at = partition.applied["clicks"]
    assert at >= 1
    assert partition.digest() == digest_after(at)
    assert log_rows(around.log.records) == rows_after(at)
    await add_all(partition, range(at + 1, 12))
    assert partition.digest() == digest_after(11)
    assert log_rows(around.log.records) == rows_after(11)
    assert list(dict.fromkeys(around.out)) == [(b"out", b"%d" % n) for n in range(12)]
    await partition.close()


@pytest.mark.parametrize("step", OPEN_STEPS)
async def test_kill_within_an_open_is_made_good_by_the_next(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state.partition, "RESTORE_BYTES_MAX", 20)
    around = Surroundings()
    await killed_at(around, "publish", 4)  # an outbox is left
    await killed_at(around, step, 1)
    await killed_at(around, "fold", 3, "other")
    await killed_at(around, step, 1, "other")
    await killed_at(around, step, 2, "third")
    for folder in ("third", "p", "other"):
        partition = await around.opened(folder)
        at = partition.applied["clicks"]
        assert partition.digest() == digest_after(at)
        assert log_rows(around.log.records) == rows_after(at)
        await add_all(partition, range(at + 1, at + 3))
        await partition.close()


async def test_restore_that_was_cut_off_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state.partition, "RESTORE_BYTES_MAX", 1)
    monkeypatch.setattr(state.partition, "RESTORE_META_BYTES", 1)
    around = Surroundings()
    partition = await around.opened()
    await add_all(partition, range(20))
    await partition.close()
    await killed_at(around, "restore", 40, "other")
    other = around.partition("other")
    report = await other.open()
    assert report.kind == "catchup"
    assert 0 < report.read < 60
    assert other.digest() == digest_after(19)
    await other.close()


# -- other owners


async def test_fenced_owner_stops_and_may_claim_again() -> None:
    around = Surroundings()
    first = await around.opened("first")
    await add_all(first, range(3))
    second = await around.opened("second")
    assert second.digest() == digest_after(2)
    with pytest.raises(Fenced, match="epoch 1 was overtaken by 2"):
        await add_all(first, range(3, 9))
    for use in (first.drain, first.sweep, lambda: first.flush(*add(9))):
        with pytest.raises(Fenced):
            await use()
    assert around.fenced == ["first"]
    await add_all(second, range(3, 6))
    await first.close()
    await second.close()
    report = await first.open()
    assert (report.kind, report.epoch) == ("discard", 4)
    assert "overtaken with 3 outstanding flushes" in report.reason
    assert first.digest() == digest_after(5)
    await first.close()


async def test_claimant_that_loses_the_race_takes_the_next_epoch() -> None:
    around = Surroundings()
    reports = await asyncio.gather(around.partition("first").open(), around.partition("second").open())
    assert sorted(report.epoch for report in reports) == [1, 2]


async def test_open_overtaken_before_its_adopt_is_fenced() -> None:
    around = Surroundings()

    def overtake(step: str) -> None:
        if step == "outbox":
            around.log.land([announce_record(7, bytes(32))])

    with pytest.raises(Fenced):
        await around.partition(crash=overtake).open()
    report = await around.partition().open()
    assert report.epoch == 8


async def test_late_claim_of_a_lower_epoch_is_ignored() -> None:
    around = Surroundings()
    for _ in range(3):
        partition = await around.opened()
        await partition.close()
    partition = await around.opened()
    around.log.land([announce_record(2, bytes(32)), announce_record(4, bytes(32))])
    await add_all(partition, range(3))
    assert log_rows(around.log.records) == rows_after(2)
    await partition.close()


async def test_late_rows_are_written_over_and_so_is_their_deletion() -> None:
    around = Surroundings()
    first = await around.opened("first")
    await add_all(first, range(3))  # user0 is deleted by flush 4
    await first.close()
    second = await around.opened("second", sweep_rows=1)
    around.log.land(list(row_records(1, 9, [(b"user0", b"late"), (b"user1", b"late")])))
    await add_all(second, [3])
    await second.sweep()
    await second.drain()
    assert Row(2, 3, b"user0", None) in around.parsed()
    for keep in range(1, len(around.log.records)):
        assert log_rows(compacted(around.log.records, keep)) == rows_after(3)
    await second.close()


async def test_repair_that_was_owed_at_a_kill_is_made_by_the_next_owner() -> None:
    around = Surroundings()
    first = await around.opened("first")
    await add_all(first, range(3))
    await first.close()
    await first.open()
    around.log.land(list(row_records(1, 9, [(b"user0", b"late")])))
    await add_all(first, [3])  # found, not yet repaired: the process ends
    await first.close()
    report = await first.open()
    assert report.repaired == 1
    assert Row(3, 1, b"user0", None) in around.parsed()
    await first.close()
    report = await first.open()
    assert report.repaired == 0
    await first.close()


async def test_doubled_append_is_written_over() -> None:
    around = Surroundings()
    land = around.log.land

    def doubling(records: Sequence[tuple[bytes, bytes | None]]) -> int:
        land(records)
        return land(records)

    partition = await around.opened()
    around.log.land = doubling  # type: ignore[method-assign]
    await add_all(partition, [0])
    around.log.land = land  # type: ignore[method-assign]
    await add_all(partition, [1])
    assert Row(1, 3, b"user0", b"x") in around.parsed()
    assert log_rows(around.log.records) == rows_after(1)
    await partition.close()


# -- failures


@pytest.mark.parametrize("cancelled", [False, True])
async def test_close_during_an_open_leaves_a_released_disk(cancelled: bool) -> None:
    around = Surroundings()
    partition = await around.opened()
    await add_all(partition, range(9))
    await partition.close()
    opening = asyncio.ensure_future(partition.open())
    for _ in range(3):
        await asyncio.sleep(0)
    if cancelled:
        opening.cancel()
    await partition.close()
    assert opening.done()
    assert opening.cancelled() == cancelled
    report = await partition.open()
    assert report.kind == "same"
    assert partition.digest() == digest_after(8)
    await partition.close()


async def test_failed_append_stops_the_partition_and_the_next_open_makes_it_good() -> None:
    around = Surroundings()
    partition = await around.opened()
    await add_all(partition, range(2))
    append = around.log.append

    async def failing(records: Sequence[tuple[bytes, bytes | None]]) -> int:
        raise TimeoutError("no acknowledgement")

    around.log.append = failing  # type: ignore[method-assign]
    with pytest.raises(PartitionFailedError, match="no acknowledgement"):
        await add_all(partition, range(2, 9))
    with pytest.raises(PartitionFailedError):
        await partition.sweep()
    assert around.fenced == []
    await partition.close()
    around.log.append = append  # type: ignore[method-assign]
    report = await partition.open()
    assert report.kind == "same"
    assert report.outbox >= 1
    at = report.applied["clicks"]
    assert partition.digest() == digest_after(at)
    assert log_rows(around.log.records) == rows_after(at)
    assert list(dict.fromkeys(around.out)) == [(b"out", b"%d" % n) for n in range(at + 1)]
    await partition.close()


async def test_power_cut_that_took_acknowledged_flushes_back_discards_the_disk() -> None:
    around = Surroundings()
    disk = around.disk
    assert isinstance(disk, MemoryDisk)
    partition = await around.opened()
    await add_all(partition, range(6))
    await partition.close()
    disk.lose_tail(Path("/memory/p"), 5)
    report = await partition.open()
    assert report.kind == "discard"
    assert "the disk is at" in report.reason
    assert partition.digest() == digest_after(5)
    await partition.close()


@pytest.mark.parametrize("damaged", ["MANIFEST*", "CURRENT"])
async def test_corrupt_disk_is_restored_from_the_changelog_and_said(tmp_path: Path, damaged: str) -> None:
    around = Surroundings(disk=RocksDisk(), path=tmp_path)
    partition = await around.opened()
    await add_all(partition, range(6))
    await partition.close()
    for file in (tmp_path / "p").glob(damaged):
        file.write_bytes(b"\0" * 100)
    report = await partition.open()
    assert report.kind == "corrupt"
    assert "Corruption" in report.reason
    assert report.read > 0
    assert partition.digest() == digest_after(5)
    await partition.close()


async def test_process_that_ends_within_a_large_write_in_pieces_restores_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    around = Surroundings(disk=RocksDisk(), path=tmp_path)
    partition = await around.opened(piecewise=True)
    await add_all(partition, range(6))
    await partition.drain()
    monkeypatch.setattr("state.partition.INLINE_ROWS_MAX", 0)
    monkeypatch.setattr("state.store.PIECE_BYTES", 1)
    real, written = RocksStore._write, 0

    def write(store: RocksStore, batch: WriteBatch) -> None:
        nonlocal written
        written += 1
        if written == 2:
            raise KilledError
        real(store, batch)

    with monkeypatch.context() as patch:
        patch.setattr(RocksStore, "_write", write)
        rows, downstream, applied = add(6)
        with pytest.raises(KilledError):
            await partition.flush({**rows, b"x": b"1", b"y": b"2"}, downstream, applied)
    await partition.close()
    report = await partition.open()
    assert (report.kind, report.applied["clicks"]) == ("corrupt", 5)
    assert "in the middle of a large write" in report.reason
    assert partition.digest() == digest_after(5)
    await add_all(partition, range(6, 8))
    assert partition.digest() == digest_after(7)
    await partition.close()


async def add_large(partition: Partition, count: int) -> None:
    for number in range(count):
        rows, downstream, applied = add(number)
        await partition.flush({**rows, b"large%d" % number: LARGE_ROW}, downstream, applied)


async def test_full_disk_stops_the_partition_and_nothing_is_lost(tmp_path: Path) -> None:
    """No file may grow any more, as on a full disk: the flush fails as a whole, and with room the next open goes on."""
    around = Surroundings(disk=RocksDisk(), path=tmp_path)
    partition = await around.opened()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_DISK_BYTES, hard))
    try:
        with pytest.raises(StoreError, match="mend the disk"):
            await add_large(partition, FULL_DISK_BYTES // len(LARGE_ROW) + 2)
        reached = partition.applied["clicks"]
        await partition.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert 0 < reached < FULL_DISK_BYTES // len(LARGE_ROW) + 1
    report = await partition.open()
    assert report.applied["clicks"] == reached
    large = {b"large%d" % number: LARGE_ROW for number in range(reached + 1)}
    assert dict(partition.items()) == {**rows_after(reached), **large}
    await add_all(partition, [reached + 1])
    assert dict(partition.items()) == {**rows_after(reached + 1), **large} == log_rows(around.log.records)
    await partition.close()


async def test_store_of_a_newer_build_is_refused_and_left_alone() -> None:
    around = Surroundings()
    partition = await around.opened()
    await add_all(partition, [0])
    await partition.close()
    assert isinstance(around.disk, MemoryDisk)
    content = around.disk.contents[Path("/memory/p")][-1]
    assert content.meta is not None
    content.meta = b"\x09" + content.meta[1:]
    with pytest.raises(StoreVersionError, match="version 9"):
        await partition.open()
    assert content.rows == rows_after(0)


class LockedDisk(MemoryDisk):
    """Held by somebody else for some tries."""

    def __init__(self, tries: int) -> None:
        super().__init__()
        self.tries = tries

    def open(self, path: Path) -> Store:
        self.tries -= 1
        if self.tries >= 0:
            raise StoreLockedError(f"{path} is open elsewhere")
        return super().open(path)


async def test_locked_store_is_waited_for_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state.partition, "LOCK_WAIT_S", 0)
    limit = state.partition.LOCK_TRIES_MAX
    partition = await Surroundings(disk=LockedDisk(limit - 1)).opened()
    await partition.close()
    with pytest.raises(StoreLockedError):
        await Surroundings(disk=LockedDisk(limit)).opened()


async def test_changelog_that_forgot_what_we_know_stops_the_open() -> None:
    around = Surroundings()
    partition = await around.opened()
    await add_all(partition, range(3))
    await partition.close()
    longer = around.log
    around.log = MemoryLog()
    with pytest.raises(ChangelogLostError, match="the log ends at 0"):
        await around.partition().open()
    around.log.land([(record.key, record.value) for record in reversed(longer.everything)])
    with pytest.raises(ChangelogLostError, match="another record"):
        await around.partition().open()


async def test_changelog_that_shrinks_under_the_owner_stops_it() -> None:
    around = Surroundings()
    partition = await around.opened()
    await add_all(partition, range(3))
    around.log.everything.clear()
    with pytest.raises(PartitionFailedError, match="went back from offset"):
        await add_all(partition, [3])
    await partition.close()


async def test_new_source_starts_at_its_beginning_and_a_missing_one_is_refused() -> None:
    around = Surroundings()
    partition = await around.opened(sources=("clicks",))
    await add_all(partition, range(3))
    await partition.close()
    for folder in ("p", "other"):
        partition = await around.opened(folder)
        assert partition.applied == {"clicks": 2, "comments": -1}
        assert partition.digest() == digest_after(2)
        await partition.close()
    for folder in ("p", "third"):
        with pytest.raises(SourcesError, match=r"has applied \['clicks'"):
            await around.partition(folder, sources=("comments",)).open()


# -- sweep, deletion of the head, compaction


async def test_swept_head_may_be_deleted() -> None:
    around = Surroundings()
    first = await around.opened("first")
    await add_all(first, range(6))
    await first.close()
    second = await around.opened("second", sweep_rows=1)
    assert second.truncatable_to == 0, "the first epoch, swept while there was nothing"
    while await second.sweep():
        pass
    await second.drain()
    assert not await second.sweep()
    claim = second.truncatable_to
    assert claim is not None
    assert parse(around.log.everything[claim]) is not None
    assert claim > 10
    around.log.delete_before(claim)
    assert log_rows(around.log.records) == rows_after(5)
    kinds = [r.kind for r in around.parsed() if isinstance(r, Marker) and r.epoch == 2]
    assert kinds == [KIND_ADOPT, *[KIND_RUNNING] * (len(kinds) - 2), KIND_SWEPT]
    await second.close()
    for folder in ("third", "first", "second"):
        partition = await around.opened(folder)
        assert partition.digest() == digest_after(5)
        await partition.close()


async def test_disk_that_missed_deletions_in_a_deleted_head_is_discarded() -> None:
    around = Surroundings()
    first = await around.opened("first")
    await add_all(first, range(2))
    await first.close()
    second = await around.opened("second")
    await add_all(second, range(2, 6))
    await second.close()
    await second.open()
    await second.sweep()
    await second.drain()
    assert second.truncatable_to is not None
    around.log.delete_before(second.truncatable_to)
    await second.close()
    report = await first.open()
    assert report.kind == "discard"
    assert "the changelog begins at" in report.reason
    assert first.digest() == digest_after(5)
    await first.close()


async def test_head_deleted_while_it_is_read_is_read_again() -> None:
    around = Surroundings()
    first = await around.opened("first")
    await add_all(first, range(6))
    await first.close()
    await first.open()
    await first.sweep()
    await first.drain()
    await first.close()

    def delete(step: str) -> None:
        if step == "announce":
            assert first.truncatable_to is not None
            around.log.delete_before(first.truncatable_to)

    report = await around.partition("other", crash=delete).open()
    assert report.kind == "discard"


async def test_head_deleted_between_the_two_reads_of_a_catch_up_is_noticed() -> None:
    around = Surroundings()
    first = await around.opened("first")
    await add_all(first, range(2))
    await first.close()
    second = await around.opened("second")
    await add_all(second, range(2, 6))
    await second.close()
    await second.open()
    await second.sweep()
    await second.drain()
    await second.close()
    read, reads = around.log.read, list[int]()

    def deleting(start: int, stop: int | None) -> Any:
        reads.append(start)
        if len(reads) == 2:
            assert second.truncatable_to is not None
            around.log.delete_before(second.truncatable_to)
        return read(start, stop)

    around.log.read = deleting  # type: ignore[method-assign]
    report = await first.open()
    assert report.kind == "discard"
    assert first.digest() == digest_after(5)
    await first.close()


@pytest.mark.parametrize("restored", [1, 4, 9])
async def test_rows_of_a_restore_cut_off_do_not_outlive_their_deletion_in_a_deleted_head(
    restored: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state.partition, "RESTORE_BYTES_MAX", 1)
    monkeypatch.setattr(state.partition, "RESTORE_META_BYTES", 1)
    around = Surroundings()
    first = await around.opened("first")
    await add_all(first, range(4))
    await first.close()
    await killed_at(around, "restore", restored, "other")
    await first.open()
    await add_all(first, range(4, 9))
    await first.close()
    for step, count in (("restore", 2), ("adopt", 1)):  # it goes on, and is cut off again
        await first.open()
        await first.sweep()
        await first.drain()
        assert first.truncatable_to is not None
        around.log.delete_before(first.truncatable_to)
        await first.close()
        await killed_at(around, step, count, "other")
    other = await around.opened("other")
    assert other.digest() == digest_after(8)
    await other.close()


async def test_flush_of_nothing_sweeps() -> None:
    around = Surroundings()
    partition = await around.opened()
    await add_all(partition, [0])
    await partition.close()
    await partition.open()
    await partition.flush({}, [], {})
    await partition.drain()
    assert [r.key for r in around.parsed() if isinstance(r, Row) and r.epoch == 2] == [b"hot", b"user0"]
    await partition.close()


async def test_flush_after_an_open_carries_some_untouched_rows() -> None:
    around = Surroundings()
    partition = await around.opened()
    rows: dict[bytes, bytes | None] = {b"%02d" % n: b"x" for n in range(10)}
    await partition.flush(rows, [], {"clicks": 0})
    await partition.drain()
    await partition.close()
    partition = await around.opened(sweep_rows=4)
    await partition.flush({b"02": b"new"}, [], {"clicks": 1})
    await partition.drain()
    written = {r.key: r.value for r in around.parsed() if isinstance(r, Row) and r.epoch == 2}
    assert written == {b"00": b"x", b"01": b"x", b"02": b"new", b"03": b"x"}
    await partition.close()


async def test_compactor_leaves_a_marker_every_some_bytes_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state.partition, "MARKER_SLOT_BYTES", 1000)
    around = Surroundings()
    partition = await around.opened()
    for number in range(100):
        await partition.flush({b"%02d" % number: bytes(80)}, [], {"clicks": number})
    await partition.drain()
    reader, waiting = Reader(), []
    for record in compacted(around.log.records, len(around.log.records)):
        reader.feed(record)
        waiting.append(len(reader.uncovered_keys()))
    assert 5 <= max(waiting) <= 13
    await partition.close()


# -- what was deleted leaves the changelog and the disk


async def test_after_a_renewed_epoch_is_swept_the_head_may_go_and_nothing_names_a_deleted_row() -> None:
    around = Surroundings()
    partition = await around.opened()
    await add_all(partition, range(5))  # user0 to user2 are deleted
    assert (await partition.named([b"user0", b"user4", b"nobody"])) == {b"user0": 2, b"user4": 1, b"nobody": 0}
    before = partition.digest()
    await partition.renew()
    assert partition.epoch == 2
    while not partition.is_swept:
        await partition.sweep(1)
    await partition.drain()
    assert partition.truncatable_to is not None
    around.log.delete_before(partition.truncatable_to)
    assert (await partition.named([b"user0", b"user4"])) == {b"user0": 0, b"user4": 1}
    assert partition.digest() == before
    await add_all(partition, range(5, 7))
    await partition.close()
    restored = await around.opened("elsewhere")
    assert restored.digest() == digest_after(6)
    await restored.close()


async def test_a_renewal_that_is_not_acknowledged_is_the_end_of_its_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    around = Surroundings()
    partition = await around.opened()
    await add_all(partition, range(5))
    await partition.sweep(1)  # the sweep of the epoch before is under way
    real = around.log.append

    async def refuse(records: Sequence[tuple[bytes, bytes | None]]) -> int:
        if isinstance(parse(LogRecord(0, *records[-1])), Marker):
            raise TimeoutError("no acknowledgement")
        return await real(records)

    monkeypatch.setattr(around.log, "append", refuse)
    with pytest.raises(TimeoutError):
        await partition.renew()
    monkeypatch.undo()
    with pytest.raises(PartitionFailedError, match="no acknowledgement"):
        await partition.sweep(100)
    with pytest.raises(PartitionFailedError, match="no acknowledgement"):
        await partition.flush(*add(5))
    await partition.close()
    again = await around.opened()
    while not again.is_swept:
        await again.sweep(1)
    await again.drain()
    assert again.truncatable_to is not None
    around.log.delete_before(again.truncatable_to)
    await again.close()
    restored = await around.opened("elsewhere")
    assert restored.digest() == digest_after(4)
    await restored.close()


async def test_a_claimant_that_was_overtaken_does_not_renew() -> None:
    around = Surroundings()
    zombie = await around.opened()
    await add_all(zombie, range(3))
    owner = await around.opened("elsewhere")
    with pytest.raises(Fenced):
        await zombie.renew()
    with pytest.raises(Fenced):
        await zombie.flush(*add(3))
    await zombie.close()
    await add_all(owner, [3])
    assert owner.digest() == digest_after(3), "the owner is not disturbed"
    await owner.close()


async def test_a_disk_that_has_deleted_rows_owes_a_purge_whoever_deleted_them() -> None:
    around = Surroundings()
    old = await around.opened("old", purges=True)
    await add_all(old, range(2))
    assert not old.owes_purge()
    await old.close()
    other = await around.opened("other", purges=True)
    await add_all(other, range(2, 4))
    assert other.owes_purge()
    await other.close()
    other = await around.opened("other", purges=True)
    assert other.owes_purge(), "it was closed before it had done it"
    other.purge()
    assert not other.owes_purge()
    await other.close()
    old = around.partition("old", purges=True)
    report = await old.open()
    assert report.kind == "catchup"
    assert old.owes_purge(), "the changelog has told it of the deletions"
    fresh = await around.opened("fresh", purges=True)
    assert fresh.owes_purge(), "its log has the rows that were deleted"
    await fresh.flush({b"user0": None}, [], {"clicks": 9})
    await (unasked := await around.opened("unasked")).flush({b"user1": None}, [], {"clicks": 10})
    assert not unasked.owes_purge()
