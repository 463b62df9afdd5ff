"""Disks that are torn, rotten or full, and processes that end at named steps: found out, said, and made good."""

import asyncio
import contextlib
import copy
import itertools
import json
import random
import resource
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaProducer

from bench import chaos, verdict
from bench.deployment import READY_S_MAX, Deployment, WorkerProcess
from state.partition import Partition, PartitionFailedError, digest
from state.store import RocksDisk, StoreError
from streams.settings import Settings
from tests.test_partition import Surroundings, add, add_all, digest_after, log_rows, rows_after

LOG_HEADER_BYTES = 7  # of a record of RocksDB's log: checksum, length (2 bytes at 4, little endian), type
TABLE_BUFFERS_BYTES = 1 << 18  # small, so that some flushes make a table
MANY_BLOCKS_BYTES = 1 << 14
BULK_FLUSHES = 30
BULK_ROWS = 12  # of a flush
WRITES_MAX = 2000  # until a compaction has come to the damage
FULL_DISK_BYTES = 1 << 18
USERS = 12
ITEMS = 20
ROUND_S = 0.25  # between two rounds of events: the embedded broker slows down with the batches in a log
# Steps of a worker's work, and at which of them it ends: behind those of the open and of the sweep after it, which has
# three stores.
STEPS = {"encode": 3, "fold": 3, "write": 3, "publish": 8, "rows": 11, "marker": 8, "commit": 8}
_numbers = itertools.count()


# -- RocksDB's log


def log_records(log_file: Path) -> list[tuple[int, int]]:
    """Where each record of RocksDB's log begins and ends; the log is shorter than one of its blocks."""
    data, found, at = log_file.read_bytes(), list[tuple[int, int]](), 0
    while at < len(data):
        end = at + LOG_HEADER_BYTES + int.from_bytes(data[at + 4 : at + 6], "little")
        found.append((at, end))
        at = end
    assert at == len(data) < 1 << 15
    return found


def flip(file: Path, *places: int) -> None:
    data = bytearray(file.read_bytes())
    for place in places:
        data[place] ^= 0xFF
    file.write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "flip"])
@pytest.mark.parametrize("has_tables", [False, True])
async def test_a_log_torn_in_any_record_loses_a_tail_that_changelog_and_sources_give_back(
    tmp_path: Path, has_tables: bool, how: str
) -> None:
    """Two flushes were on disk alone when the process ended; the tear goes through each record of the log in turn."""
    disk, may = RocksDisk(), asyncio.Event()
    may.set()
    around = Surroundings(disk=disk, path=tmp_path)

    async def publish(records: list[tuple[bytes, bytes]]) -> None:
        await may.wait()
        around.out.extend(records)

    partition = await around.opened(publish=publish)
    if has_tables:
        await add_all(partition, range(3))
        await partition.close()
        await partition.open()
    await add_all(partition, range(partition.applied["clicks"] + 1, 6))
    may.clear()
    await partition.flush(*add(6))
    await partition.flush(*add(7))
    shutil.copytree(tmp_path / "p", tmp_path / "left")
    changelog, out = copy.deepcopy(around.log), list(around.out)
    may.set()
    await partition.close()

    (log_file,) = (tmp_path / "left").glob("*.log")
    assert bool(list((tmp_path / "left").glob("*.sst"))) == has_tables
    kinds, ats = [], []
    for number, (begin, end) in enumerate(log_records(log_file)):
        folder = f"torn-{number}"
        shutil.copytree(tmp_path / "left", tmp_path / folder)
        torn, middle = tmp_path / folder / log_file.name, (begin + end) // 2
        if how == "cut":
            torn.write_bytes(torn.read_bytes()[:middle])
        else:
            flip(torn, middle)
        after = Surroundings(log=copy.deepcopy(changelog), disk=disk, out=list(out), path=tmp_path)
        partition = after.partition(folder)
        report = await partition.open()
        at = report.applied["clicks"]
        kinds.append(report.kind)
        ats.append(at)
        assert (report.kind == "discard") == ("the disk is at" in report.reason) == bool(report.reason)
        assert partition.digest() == digest_after(at)
        assert log_rows(after.log.records) == rows_after(at)
        await add_all(partition, range(at + 1, 12))  # the sources still have them
        assert partition.digest() == digest_after(11)
        assert dict(partition.items()) == log_rows(after.log.records) == rows_after(11)
        assert list(dict.fromkeys(after.out)) == [(b"out", b"%d" % n) for n in range(12)]
        await partition.close()
        assert (await partition.open()).kind == "same"
        assert partition.digest() == digest_after(11)
        await partition.close()
    # The later the tear, the more the disk still tells: of nothing, of a restore, of flushes that the changelog is
    # beyond, of all that the changelog has and more.
    ahead = ["discard", "same"]
    assert list(dict.fromkeys(kinds)) == (ahead if has_tables else ["fresh", "catchup", *ahead])
    assert ats == sorted(ats) and set(ats) == {5, 6}, "a record of the tail is all of its flush"


# -- RocksDB's tables


def bulk(number: int) -> tuple[dict[bytes, bytes | None], list[tuple[bytes, bytes]], dict[str, int]]:
    """`add`, and rows that no compression makes smaller."""
    rows, downstream, applied = add(number)
    more: dict[bytes, bytes | None] = {
        b"bulk%02d-%04d" % (n, number): random.Random(100 * number + n).randbytes(1000) for n in range(BULK_ROWS)
    }
    return {**rows, **more}, downstream, applied


def bulk_rows_after(number: int) -> dict[bytes, bytes]:
    rows = rows_after(number)
    for n in range(number + 1):
        rows |= {key: row for key, row in bulk(n)[0].items() if key.startswith(b"bulk") and row is not None}
    return rows


def into_tables(path: Path) -> list[Path]:
    """The tables of a store that nobody has open, with what was in its log: RocksDB writes one as it opens it."""
    RocksDisk().open(path).close()
    (log_file,) = path.glob("*.log")
    assert log_file.stat().st_size == 0
    return sorted(path.glob("*.sst"))


def flip_block(table: Path) -> None:
    """Some bytes in the middle: one block of many, and none where these are few."""
    size = table.stat().st_size
    print(table, size)
    if size >= MANY_BLOCKS_BYTES:
        flip(table, *range(size // 2, size // 2 + 64))


def flip_blocks(table: Path) -> None:
    """A byte in every block of rows; what follows them stays."""
    flip(table, *range(100, table.stat().st_size * 3 // 4, 500))


def cut_short(table: Path) -> None:
    table.write_bytes(table.read_bytes()[: table.stat().st_size // 2])


async def read_all(partition: Partition, start: int) -> None:
    partition.get_many([key for key, _ in sorted(bulk_rows_after(start - 1).items())])


async def sweep_all(partition: Partition, start: int) -> None:
    while await partition.sweep():
        pass


async def write_on(partition: Partition, start: int) -> None:
    for number in range(start, start + WRITES_MAX):
        await partition.flush(*bulk(number))


async def filled(around: Surroundings, damage: Callable[[Path], None]) -> Partition:
    """A closed partition after BULK_FLUSHES, with each of its tables damaged."""
    partition = await around.opened()
    for number in range(BULK_FLUSHES):
        await partition.flush(*bulk(number))
    await partition.close()
    tables = into_tables(partition.path)
    assert len(tables) > 1
    for table in tables:
        damage(table)
    return partition


async def assert_restored(around: Surroundings, partition: Partition, at: int) -> None:
    """Rows, digest and changelog are those of all flushes up to `at`, and it goes on from there."""
    for number in (at, at + 1):
        if number > at:
            await partition.flush(*bulk(number))
            await partition.drain()
        rows = bulk_rows_after(number)
        assert dict(partition.items()) == log_rows(around.log.records) == rows
        assert partition.digest() == digest(sorted(rows.items()), {"clicks": number})
        assert list(dict.fromkeys(around.out)) == [(b"out", b"%d" % n) for n in range(number + 1)]
    await partition.close()
    assert (await partition.open()).kind == "same"
    await partition.close()


@pytest.mark.parametrize("damage", [flip_blocks, cut_short])
async def test_tables_that_the_open_cannot_read_are_restored_by_it(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    around = Surroundings(disk=RocksDisk(write_buffers_bytes=TABLE_BUFFERS_BYTES), path=tmp_path)
    partition = await filled(around, damage)
    report = await partition.open()
    assert report.kind == "corrupt" and "Corruption" in report.reason
    assert report.applied["clicks"] == BULK_FLUSHES - 1
    await assert_restored(around, partition, BULK_FLUSHES - 1)


@pytest.mark.parametrize("notice", [read_all, sweep_all, write_on])
async def test_a_bad_block_stops_who_comes_upon_it_and_the_next_open_restores(
    tmp_path: Path, notice: Callable[[Partition, int], Any]
) -> None:
    """A reader, the sweep after an open, or a compaction behind what is written."""
    around = Surroundings(disk=RocksDisk(write_buffers_bytes=TABLE_BUFFERS_BYTES), path=tmp_path)
    partition = await filled(around, flip_block)
    assert (await partition.open()).kind == "same", "the open has no need of these blocks"
    with pytest.raises((StoreError, PartitionFailedError), match="checksum"):
        await notice(partition, BULK_FLUSHES)
    await partition.close()
    report = await partition.open()
    assert report.kind == "corrupt" and "checksum" in report.reason
    at = report.applied["clicks"]
    assert at >= BULK_FLUSHES - 1
    await assert_restored(around, partition, at)


# -- real processes


class Feed:
    """Items, and rounds of events: a round's comments come before its clicks, by their time and in the logs."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.events = Counter[str]()  # of each user
        self._producer = KafkaProducer(**settings.kafka_options())
        self._rounds = 0

    def items(self) -> None:
        self._lay("items", [(f"i{n}", {"item_id": f"i{n}", "text": f"a film about subject {n}"}) for n in range(ITEMS)])

    def round(self) -> None:
        n, at = self._rounds, 1e9 + 100 * self._rounds
        self._rounds += 1
        comments = [
            {"user_id": f"u{u}", "item_id": f"i{(n + u) % ITEMS}", "text": f"subject {n} is mine", "ts": at + u}
            for u in range(n % 3, USERS, 3)
        ]
        clicks = [
            {"user_id": f"u{u}", "item_id": f"i{n * u % ITEMS}", "action": "click", "ts": at + 50 + u}
            for u in range(USERS)
        ]
        for topic, events in (("comments", comments), ("clicks", clicks)):
            self._lay(topic, [(event["user_id"], event) for event in events])
            self.events.update(event["user_id"] for event in events)

    def until_it_ends(self, worker: WorkerProcess) -> int:
        """Rounds until the process has ended by itself: its exit code."""
        deadline = time.monotonic() + READY_S_MAX
        while time.monotonic() < deadline:
            self.round()
            with contextlib.suppress(subprocess.TimeoutExpired):
                return worker.process.wait(ROUND_S)
        raise TimeoutError(f"it does not end: {worker.tail()}")

    def _lay(self, topic: str, records: list[tuple[Any, dict[str, Any]]]) -> None:
        """Until all are acknowledged."""
        for key, value in records:
            self._producer.send(self.settings.topic(topic), json.dumps(value).encode(), key=key.encode())
        self._producer.flush()

    def close(self) -> None:
        self._producer.close()


def new_deployment(broker: str, folder: Path, prefix: str, app_id: str) -> Deployment:
    made = Deployment(
        broker, folder, topic_prefix=prefix, app_id=app_id, partitions=1, rank_sample=0.1, module="bench.words",
        log_format="json", merge_hold_ms=chaos.HOLD_MS,
    )  # fmt: skip
    made.create_topics()
    return made


@pytest.fixture
def deployment(embedded_broker: str, tmp_path: Path) -> Iterator[Deployment]:
    made = new_deployment(embedded_broker, tmp_path, f"damage{next(_numbers)}-", "hurt")
    yield made
    made.close()


@pytest.fixture
def feed(deployment: Deployment) -> Iterator[Feed]:
    with contextlib.closing(Feed(deployment.settings)) as made:
        made.items()
        yield made


class Life:
    """One process on the worker's state folder, and the lines of the log that are its own."""

    def __init__(self, deployment: Deployment, **settings: Any) -> None:
        log_file = deployment.folder / "worker-w.log"
        self._before = log_file.stat().st_size if log_file.exists() else 0
        self.worker = deployment.start_worker(**settings)

    def told(self, event: str) -> list[dict[str, Any]]:
        """The log's lines of that event."""
        text = self.worker.log_file.read_bytes()[self._before :].decode()
        lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event]

    def opened(self) -> dict[str, str]:
        """How each kind of state was opened."""
        return {line["kind"]: line["opened"] for line in self.told("partition open")}

    def failure(self) -> dict[str, Any]:
        """Which partition ended the worker, and why."""
        (line,) = self.told("worker ends: a partition's task failed")
        return line


def settled(worker: WorkerProcess, settings: Settings) -> list[verdict.Digest]:
    """What the worker holds, once it has applied and learnt all that there is."""
    return verdict.settled([worker], settings, asyncio.run(verdict.source_ends(settings)))


def test_a_worker_that_comes_upon_a_bad_block_ends_and_the_next_one_restores(
    deployment: Deployment, feed: Feed
) -> None:
    for _ in range(20):
        feed.round()
    worker = deployment.start_worker()
    worker.wait_ready()
    settled(worker, deployment.settings)
    worker.wait_quiet()
    before = worker.digests()
    worker.kill()
    tables = into_tables(deployment.state_dir() / "users-0")
    assert tables
    for table in tables:
        flip_block(table)

    hurt = Life(deployment)
    assert hurt.worker.process.wait(READY_S_MAX) == 1
    assert hurt.failure()["kind"] == "users" and "checksum" in hurt.failure()["reason"]
    again = Life(deployment)
    again.worker.wait_ready()
    (warning,) = again.told("what the disk had was discarded; restored from the changelog")
    assert (warning["level"], warning["kind"], warning["partition"]) == ("warning", "users", 0)
    assert "checksum" in warning["reason"]
    assert again.opened() == {"users": "corrupt", "catalogue": "same", "learner": "same"}
    again.worker.wait_until("the same state", lambda: again.worker.digests() == before)
    assert again.worker.stop()[0] == 0


def test_a_worker_on_a_full_disk_ends_with_a_word_and_with_room_nothing_is_lost(
    deployment: Deployment, feed: Feed
) -> None:
    """No file of its process may grow any more; RocksDB's log of the users is the first that would."""
    full = Life(deployment, item_flush_min_s=60.0)
    full.worker.wait_ready()
    _, hard = resource.prlimit(full.worker.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(full.worker.process.pid, resource.RLIMIT_FSIZE, (FULL_DISK_BYTES, hard))
    assert feed.until_it_ends(full.worker) == 1
    assert full.failure()["kind"] == "users"
    assert "File too large" in full.failure()["reason"] and "mend the disk" in full.failure()["reason"]

    again = Life(deployment)
    again.worker.wait_ready()
    assert again.opened() == {"users": "same", "catalogue": "same", "learner": "same"}
    settled(again.worker, deployment.settings)
    states = {user: again.worker.get(f"/v1/users/{user}/state") for user in feed.events}
    assert {user: state["events"] for user, state in states.items()} == feed.events
    assert again.worker.stop()[0] == 0


def test_a_worker_killed_at_each_named_step_ends_where_an_undisturbed_one_does(
    deployment: Deployment, feed: Feed, embedded_broker: str, tmp_path: Path
) -> None:
    """Each time it is its own process that ends by SIGKILL, in the midst of a stream that goes on."""
    assert STEPS.keys() <= chaos.STEPS.keys()
    for step, count in STEPS.items():
        armed = deployment.start_worker(crash_at=f"{step}:{count}")
        assert feed.until_it_ends(armed) == -signal.SIGKILL, f"{step}: {armed.tail()}"

    calm = new_deployment(embedded_broker, tmp_path / "calm", deployment.settings.topic_prefix, "calm")
    try:
        ended, straight = deployment.start_worker(), calm.start_worker()
        ours, theirs = settled(ended, deployment.settings), settled(straight, calm.settings)
        found = verdict.compare(deployment.settings, calm.settings, ours, theirs)
        assert found["partitions_different"] == []
        assert found["examples"] > 100
        assert found["examples_missing"] == found["examples_wrong"] == found["examples_doubled"] == 0
        assert found["item_state_equal"]
        assert (ended.stop()[0], straight.stop()[0]) == (0, 0)
    finally:
        calm.close()
