"""Disks that are torn, rotten or full, and processes that end at named steps: found out, said, and made good."""

import asyncio
import contextlib
import copy
import itertools
import json
import random
import re
import resource
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaProducer

from bench import chaos, verdict
from bench.deployment import READY_S_MAX, Deployment, WorkerProcess
from bench.words import WordVectors
from state.partition import Partition, PartitionFailedError, digest
from state.store import RocksDisk, StoreError
from streams import verify
from streams.settings import Settings
from tests.test_partition import Surroundings, add, add_all, digest_after, log_rows, rows_after

LOG_HEADER_BYTES = 7  # of a record of RocksDB's log: checksum, length (2 bytes at 4, little endian), type
TABLE_BUFFERS_BYTES = 1 << 18  # small, so that some flushes make a table
MANY_BLOCKS_BYTES = 1 << 13
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
TURNS = 3  # workers that are killed at the steps by turns
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


def into_a_table(path: Path) -> Path:
    """The one table of a store that nobody has open, with all that it holds; so nothing is left to be compacted."""
    store = RocksDisk().open(path)
    store._database.compact_range(None, None)
    store.close()
    (table,) = path.glob("*.sst")
    (log_file,) = path.glob("*.log")
    assert log_file.stat().st_size == 0
    return table


def flip_block(table: Path) -> None:
    """Some bytes in the middle: one block of many."""
    middle = table.stat().st_size // 2
    assert middle >= MANY_BLOCKS_BYTES
    flip(table, *range(middle, middle + 64))


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
    """A closed partition after BULK_FLUSHES, all of them in a table that is damaged."""
    partition = await around.opened()
    for number in range(BULK_FLUSHES):
        await partition.flush(*bulk(number))
    await partition.close()
    damage(into_a_table(partition.path))
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
        # What a disk that is gone had published, and not told its changelog, comes again with the same content.
        assert list(dict.fromkeys(around.out))[: number + 1] == [(b"out", b"%d" % n) for n in range(number + 1)]
    await partition.close()
    assert (await partition.open()).kind == "same"
    await partition.close()


@pytest.mark.parametrize("damage", [flip_blocks, cut_short])
async def test_a_table_that_the_open_cannot_read_is_restored_by_it(
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
        comments: list[dict[str, Any]] = [
            {"user_id": f"u{u}", "item_id": f"i{(n + u) % ITEMS}", "text": f"subject {n} is mine", "ts": at + u}
            for u in range(n % 3, USERS, 3)
        ]
        clicks: list[dict[str, Any]] = [
            {"user_id": f"u{u}", "item_id": f"i{n * u % ITEMS}", "action": "click", "ts": at + 50 + u}
            for u in range(USERS)
        ]
        for topic, events in (("comments", comments), ("clicks", clicks)):
            self._lay(topic, [(event["user_id"], event) for event in events])
            self.events.update(event["user_id"] for event in events)

    @contextlib.contextmanager
    def flowing(self) -> Iterator[None]:
        """Rounds all the time, to the end of the block."""
        enough = threading.Event()

        def rounds() -> None:
            while not enough.wait(ROUND_S):
                self.round()

        with ThreadPoolExecutor(1) as thread:
            flow = thread.submit(rounds)
            try:
                yield
            finally:
                enough.set()
            flow.result()

    def _lay(self, topic: str, records: list[tuple[Any, dict[str, Any]]]) -> None:
        """Until all are acknowledged."""
        for key, value in records:
            self._producer.send(self.settings.topic(topic), json.dumps(value).encode(), key=key.encode())
        self._producer.flush()

    def close(self) -> None:
        self._producer.close()


def new_deployment(broker: str, folder: Path, prefix: str = "") -> Deployment:
    """On topics of its own, or on the sources of that prefix."""
    number = next(_numbers)
    made = Deployment(
        broker, folder, topic_prefix=prefix or f"damage{number}-", app_id=f"damage{number}", partitions=1,
        rank_sample=0.1, module="bench.words", merge_hold_ms=chaos.HOLD_MS,
    )  # fmt: skip
    made.create_topics()
    return made


@contextlib.contextmanager
def fed(deployment: Deployment) -> Iterator[Feed]:
    """A feed of the deployment, which has its items already; both end with the block."""
    try:
        with contextlib.closing(Feed(deployment.settings)) as feed:
            feed.items()
            yield feed
    finally:
        deployment.close()


class Life:
    """One process on the worker's state folder, and the part of the log that is its own."""

    def __init__(self, deployment: Deployment, **settings: Any) -> None:
        log_file = deployment.folder / "worker-w.log"
        self._before = log_file.stat().st_size if log_file.exists() else 0
        self.worker = deployment.start_worker(**settings)

    def told(self, event: str) -> list[str]:
        """The log's lines of that event."""
        text = self.worker.log_file.read_bytes()[self._before :].decode()
        return [line for line in text.splitlines() if event in line]

    def opened(self) -> dict[str, str]:
        """How each kind of state was opened."""
        lines = "\n".join(self.told("partition open "))
        return dict(re.findall(r"kind=(\w+) opened=(\w+)", lines))

    def failure(self) -> str:
        """Which partition ended the worker, and why."""
        (line,) = self.told("worker ends: a partition's task failed")
        return line


def settled(worker: WorkerProcess, settings: Settings) -> list[verdict.Digest]:
    """What the worker holds, once it has applied and learnt all that there is."""
    return verdict.settled([worker], settings, asyncio.run(verdict.source_ends(settings)))


def verified(worker: WorkerProcess) -> list[verify.Verdict]:
    """As `headwater verify` finds it."""
    return verify.verify(worker.settings, lambda: [worker.get("/v1/digest")], WordVectors(), lambda *step: None)


def comes_upon_a_bad_block(broker: str, folder: Path) -> None:
    """The worker ends, and says why; the next one restores the users, and says that, too."""
    deployment = new_deployment(broker, folder)
    with fed(deployment) as feed:
        for _ in range(20):
            feed.round()
        worker = deployment.start_worker()
        worker.wait_ready()
        settled(worker, deployment.settings)
        worker.wait_quiet()  # all of it durable, too
        before = worker.digests()
        worker.kill()
        flip_block(into_a_table(deployment.state_dir() / "users-0"))

        hurt = Life(deployment)
        assert hurt.worker.process.wait(READY_S_MAX) == 1
        assert "kind=users" in hurt.failure() and "checksum" in hurt.failure()
        again = Life(deployment)
        again.worker.wait_ready()
        (warning,) = again.told("what the disk had was discarded; restored from the changelog")
        assert "[warning" in warning and "kind=users partition=0" in warning and "checksum" in warning
        assert again.opened() == {"users": "corrupt", "catalogue": "same", "learner": "same"}
        assert settled(again.worker, deployment.settings) == before
        assert again.worker.stop()[0] == 0


def runs_out_of_disk(broker: str, folder: Path) -> None:
    """No file of the process may grow any more, of which RocksDB's log of the users is the first: it ends, and says
    why; with room again every event is there once."""
    deployment = new_deployment(broker, folder)
    with fed(deployment) as feed:
        full = Life(deployment, item_flush_min_s=60.0)
        full.worker.wait_ready()
        _, hard = resource.prlimit(full.worker.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(full.worker.process.pid, resource.RLIMIT_FSIZE, (FULL_DISK_BYTES, hard))
        with feed.flowing():
            assert full.worker.process.wait(READY_S_MAX) == 1
        assert all(word in full.failure() for word in ("kind=users", "File too large", "mend the disk"))

        again = Life(deployment)
        again.worker.wait_ready()
        assert again.opened() == {"users": "same", "catalogue": "same", "learner": "same"}
        settled(again.worker, deployment.settings)
        states = {user: again.worker.get(f"/v1/users/{user}/state") for user in feed.events}
        assert {user: state["events"] for user, state in states.items()} == feed.events
        assert again.worker.stop()[0] == 0


def killed_at(deployment: Deployment, steps: Sequence[str]) -> WorkerProcess:
    """A worker that goes on where those before it have ended, each by its own SIGKILL at a step."""
    for step in steps:
        armed = Life(deployment, crash_at=f"{step}:{STEPS[step]}")
        assert armed.worker.process.wait(READY_S_MAX) == -signal.SIGKILL, f"{step}: {armed.worker.tail()}"
        assert armed.opened().keys() == {"users", "catalogue", "learner"}, f"{step} came in the open"
    return deployment.start_worker()


def is_killed_at_each_step(broker: str, folder: Path) -> None:
    """In the midst of a stream that goes on. Some workers by turns, each with state of its own, are killed at some of
    the steps: rows and examples end as those of one that is not, and the changelogs tell of the same."""
    calm = new_deployment(broker, folder / "calm")
    hurt = [new_deployment(broker, folder / f"hurt-{n}", calm.settings.topic_prefix) for n in range(TURNS)]
    with contextlib.ExitStack() as stack:
        feed = stack.enter_context(fed(calm))
        for deployment in hurt:
            stack.callback(deployment.close)
        turns = stack.enter_context(ThreadPoolExecutor(TURNS))  # their processes end with these threads
        straight = calm.start_worker()
        with feed.flowing():
            steps = [list(STEPS)[n::TURNS] for n in range(TURNS)]
            ended = list(turns.map(killed_at, hurt, steps))
        theirs = settled(straight, calm.settings)
        for deployment, worker in zip(hurt, ended, strict=True):
            found = verdict.compare(deployment.settings, calm.settings, settled(worker, deployment.settings), theirs)
            assert found["partitions_different"] == []
            assert found["examples"] > 100
            assert found["examples_missing"] == found["examples_wrong"] == found["examples_doubled"] == 0
            assert found["item_state_equal"]
            assert [v for v in verified(worker) if not v.is_equal] == []
            assert worker.stop()[0] == 0
        assert straight.stop()[0] == 0


STORIES = (comes_upon_a_bad_block, runs_out_of_disk, is_killed_at_each_step)


@pytest.fixture(scope="module")
def stories(embedded_broker: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[None]]]:
    """All of them at once: what takes most of the time is that the broker lets each new member wait."""
    with ThreadPoolExecutor(len(STORIES)) as threads:
        yield {
            story.__name__: threads.submit(story, embedded_broker, tmp_path_factory.mktemp(story.__name__))
            for story in STORIES
        }


@pytest.mark.parametrize("story", [story.__name__ for story in STORIES])
def test_a_worker_that(story: str, stories: dict[str, Future[None]]) -> None:
    stories[story].result()
