"""Keepers as a worker opens them, and what they tell its operators."""

import asyncio
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from aiokafka.errors import KafkaConnectionError, TopicAuthorizationFailedError
from structlog.testing import capture_logs

from bench.doubles import MemoryLog
from bench.words import WordVectors
from state.partition import Partition
from state.store import RocksDisk, StoreCorruptError
from streams import agents, examples, space
from streams.agents import NEW_ITEM_S_MAX, ROW_OVERHEAD_BYTES, CatalogueKeeper, LearnerKeeper, RowCache, UserKeeper
from streams.settings import Settings
from streams.space import Encoders, Space, Starts, starts_of
from streams.worker import TP, Worker
from tests.records import record


class RowsKeeper(LearnerKeeper):
    """Holds nothing in memory."""

    async def load(self) -> None:
        """There is no learner."""

    def applied(self) -> dict[str, int]:
        return dict(self.partition.applied)


def rows_keeper(path: Path, log: MemoryLog) -> RowsKeeper:
    async def publish(records: list[tuple[bytes, bytes]]) -> None:
        raise AssertionError("nothing goes downstream")

    partition = Partition(path=path, changelog=log, publish=publish, sources=("examples",), disk=RocksDisk())
    around: Any = SimpleNamespace(
        now=lambda: 0.0, merge_hold_s=0.0, metrics=SimpleNamespace(restored=lambda kind, seconds: None), sealer=None,
        end_of=lambda topic, partition: None, failed=None, flush_linger_s=0.0,
    )  # fmt: skip
    learner: Any = lambda: SimpleNamespace(dirty_bytes=0, learner=SimpleNamespace(pending_ts=math.inf))  # noqa: E731
    return RowsKeeper(3, partition, {"examples": "examples"}, around, learner, 1.0, 0.0, 100)


async def test_a_damaged_disk_is_told_with_its_reason(tmp_path: Path) -> None:
    log = MemoryLog()
    keeper = rows_keeper(tmp_path / "p", log)
    await keeper.open()
    await keeper.partition.flush({b"row": b"value"}, [], {"examples": 4})
    await keeper.close()
    for table in (tmp_path / "p").glob("*.log"):
        table.write_bytes(b"\0" * 100)
    for manifest in (tmp_path / "p").glob("MANIFEST-*"):
        manifest.write_bytes(b"\0" * 100)
    keeper = rows_keeper(tmp_path / "p", log)
    with capture_logs() as lines:
        await keeper.open()
    told = [line for line in lines if line["log_level"] == "warning"]
    assert [line["partition"] for line in told] == [3]
    assert "Corruption" in told[0]["reason"]
    assert dict(keeper.partition.items()) == {b"row": b"value"}
    assert keeper.applied() == {"examples": 4}
    await keeper.close()


class SlowLog(MemoryLog):
    """Acknowledges once it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may = asyncio.Event()
        self.may.set()

    async def append(self, records: Sequence[tuple[bytes, bytes | None]]) -> int:
        last = await super().append(records)
        await self.may.wait()
        return last


async def test_items_have_one_flush_on_its_way(tmp_path: Path) -> None:
    """It may be the whole catalogue: a broker that is slow has one of them to hold, not a queue."""
    log = SlowLog()
    keeper = rows_keeper(tmp_path / "p", log)
    await keeper.open()
    keeper.offset = 4
    assert keeper.is_flush_due()
    log.may.clear()
    await keeper.partition.flush({b"row": b"value"}, [], {"examples": 4})
    keeper.offset = 5
    assert not keeper.is_flush_due()
    log.may.set()
    await keeper.partition.drain()
    assert keeper.is_flush_due()
    await keeper.close()


async def test_items_that_are_being_written_are_not_flushed_again(tmp_path: Path) -> None:
    """A disk that is slow, or a process that stands still, in the midst of a large flush."""
    keeper = rows_keeper(tmp_path / "p", MemoryLog())
    await keeper.open()
    keeper.offset = 4
    assert keeper.is_flush_due()
    written = asyncio.Event()

    async def write() -> None:
        await written.wait()
        await keeper.partition.flush({b"row": b"value"}, [], {"examples": 4})

    keeper._flushing = asyncio.create_task(write())
    await asyncio.sleep(0)
    assert not keeper.partition.flushes_under_way and not keeper.is_flush_due()
    keeper.offset = 5
    written.set()
    await keeper._flushed()
    await keeper.partition.drain()
    assert keeper.is_flush_due()
    await keeper.close()


async def test_an_unlearning_waits_for_a_log_that_is_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(agents, "REACH_WAIT_S", 0.0)
    keeper = rows_keeper(tmp_path / "p", MemoryLog())
    answers: list[int | Exception] = [KafkaConnectionError(), KafkaConnectionError(), 7]

    async def ask() -> int:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with capture_logs() as lines:
        assert await keeper._reached(ask) == 7
    assert [line["log_level"] for line in lines] == ["warning"] * 2
    answers[:] = [TopicAuthorizationFailedError("examples")]
    with pytest.raises(TopicAuthorizationFailedError):
        await keeper._reached(ask)
    keeper._settling = True
    assert await keeper._reached(ask) is None


class Told:
    """The examples log, of which only what it is told is of interest."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.is_away = False

    async def publish_examples(self, records: list[tuple[bytes, bytes]]) -> int:
        if self.is_away:
            raise KafkaConnectionError
        self.times += [examples.unpack_time(message) for _, message in records]
        return 10 * len(self.times)


async def test_a_quiet_log_is_told_the_time_that_a_new_item_waits_for(tmp_path: Path) -> None:
    keeper = rows_keeper(tmp_path / "p", MemoryLog())
    waits = keeper.learner.learner
    around: Any = keeper.around
    around.reach = log = Told()

    async def idle(now: float, pending_ts: float) -> list[float]:
        around.now, waits.pending_ts = lambda: now, pending_ts  # type: ignore[misc]
        keeper._tell_time()
        if keeper._telling is not None:
            await keeper._telling
        return log.times

    now = 1e9
    assert await idle(now, math.inf) == []
    assert await idle(now, now) == []  # strictly later
    assert await idle(now, now + 5) == []
    assert await idle(now, now - NEW_ITEM_S_MAX) == []  # a recorded stream, which has its own time
    log.is_away = True
    with capture_logs() as lines:
        assert await idle(now, now - 1) == []
    assert [line["log_level"] for line in lines] == ["warning"]
    log.is_away = False
    assert await idle(now + 1, now - 1) == [now + 1]
    assert await idle(now + 2, now - 1) == [now + 1]  # it is on its way
    keeper.offset = 10
    assert await idle(now + 3, now + 2) == [now + 1, now + 3]
    await keeper.close()


async def test_a_partition_that_opens_after_the_others_were_settled_goes_on_with_what_it_has(tmp_path: Path) -> None:
    """The assignment that follows does not take its batch, which is under way, from the log again."""
    keeper = rows_keeper(tmp_path / "p", MemoryLog())
    await keeper.open()
    before, started = keeper.inbox, keeper._task
    keeper.resume()
    assert keeper.inbox is before and keeper._task is started
    await keeper.settle()
    keeper.resume()
    assert keeper.inbox is not before and keeper._task is started
    await keeper.close()


async def test_a_read_that_comes_upon_a_bad_block_ends_the_worker() -> None:
    def get_many(keys: list[bytes]) -> list[bytes | None]:
        raise StoreCorruptError("checksum mismatch")

    failures: list[BaseException] = []
    around: Any = SimpleNamespace(
        merge_hold_s=0.0, flush_linger_s=0.0, book=None, reach=None, user_cache_bytes=lambda: 1000,
        failed=lambda keeper, failure: failures.append(failure),
    )  # fmt: skip
    partition: Any = SimpleNamespace(get_many=get_many)
    with pytest.raises(StoreCorruptError):
        UserKeeper(0, partition, {"clicks": "clicks"}, around).row("u1")
    assert [str(failure) for failure in failures] == ["checksum mismatch"]


async def test_what_waits_is_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents, "INBOX_BYTES_MAX", 4_000)
    monkeypatch.setattr(agents, "INBOX_BYTES_LOW", 1_000)
    keeper = rows_keeper(tmp_path / "p", MemoryLog())
    await keeper.open()
    async with keeper._working:  # nothing is worked off meanwhile
        for offset in range(4):
            assert not keeper.is_full("examples")
            waiting = record("examples", b"x" * 1_000, b"", offset=offset)
            assert await keeper.offer("examples", [waiting]) is None
        assert keeper.is_full("examples") and not keeper.is_low("examples")
        keeper.inbox.take(0.0, lambda topic: 4, 3)
        assert not keeper.is_full("examples") and keeper.is_low("examples")
        keeper.inbox.take(0.0, lambda topic: 4, 1)
    await keeper.close()


class Rows:
    """A store that counts what is asked of it."""

    def __init__(self) -> None:
        self.rows: dict[bytes, bytes] = {}
        self.asked: list[bytes] = []

    def get_many(self, keys: list[bytes]) -> list[bytes | None]:
        self.asked += keys
        return [self.rows.get(key) for key in keys]


def put(cache: RowCache, store: Rows, changed: dict[bytes, bytes | None]) -> None:
    cache.put_many(changed)
    for key, row in changed.items():
        if row is None:
            store.rows.pop(key, None)
        else:
            store.rows[key] = row
    cache.flushed()


def test_rows_of_late_need_no_read_and_older_ones_are_read() -> None:
    store, row = Rows(), bytes(10)
    cache = RowCache(store.get_many, lambda: 8 * (1 + 10 + ROW_OVERHEAD_BYTES))
    for at in range(20):
        put(cache, store, {b"%c" % (65 + at): row})
        assert cache.get_many([b"%c" % (65 + n) for n in range(max(0, at - 3), at + 1)]) == [row] * min(4, at + 1)
    assert store.asked == [], "half of the bytes is what is always there"
    assert cache.get_many([b"A", b"T", b"?"]) == [row, row, None]
    assert store.asked == [b"A", b"?"]
    assert len(cache._young) + len(cache._old) <= 9


def test_the_rows_of_a_flush_are_there_until_it_is_written() -> None:
    store = Rows()
    store.rows = {b"a": b"old", b"b": b"old"}
    cache = RowCache(store.get_many, lambda: 1)
    cache.put_many({b"a": b"new", b"b": None, b"c": b"new"})
    assert cache.get_many([b"a", b"b", b"c"]) == [b"new", None, b"new"]
    assert store.asked == []


def test_a_row_that_was_written_again_and_deleted_is_gone() -> None:
    store = Rows()
    cache = RowCache(store.get_many, lambda: 2 * (2 + ROW_OVERHEAD_BYTES))
    put(cache, store, {b"a": b"1", b"b": b"1"})  # old from here on
    put(cache, store, {b"a": b"2"})
    assert cache.get_many([b"a", b"b"]) == [b"2", b"1"]
    put(cache, store, {b"a": None})
    assert cache.get_many([b"a"]) == [None]


ANNOUNCED = Space("bge:1", 8, 1, "/m/bge", "nonce", "announced")


def moved(make: Any = None) -> Encoders:
    """Of a process that has not loaded the encoder in use."""
    own: Any = SimpleNamespace(name="words:0", dim=8)
    encoders = Encoders(own, make or (lambda model: SimpleNamespace(name="bge:1", dim=8)))
    for told in (Space("words:0", 8), ANNOUNCED, msgspec.structs.replace(ANNOUNCED, state="in use")):
        encoders.spaces.take(told)
    return encoders


def catalogue(path: Path, encoders: Encoders, begins: int = 0) -> CatalogueKeeper:
    async def publish(records: list[tuple[bytes, bytes]]) -> None:
        raise AssertionError("nothing goes downstream")

    async def marked(value: bytes | None) -> int | None:
        return encoders.number_of(value, "app")

    async def first_at(topic: str, partition: int, offset: int) -> tuple[int, int]:
        return max(offset, begins), begins

    partition = Partition(path=path, changelog=MemoryLog(), publish=publish, sources=("items",), disk=RocksDisk())
    metrics = SimpleNamespace(restored=lambda *_: None, consumed=lambda *_: None)
    around: Any = SimpleNamespace(
        now=lambda: 0.0, merge_hold_s=0.0, metrics=metrics, end_of=lambda topic, partition: None, failed=None,
        flush_linger_s=0.0, encoders=encoders, marked=marked, number_of=partial(encoders.number_of, app_id="app"),
        first_at=first_at, encoding=SimpleNamespace(dim=8),
    )  # fmt: skip
    return CatalogueKeeper(3, partition, {"items": "items"}, around)


async def test_at_a_mark_a_partition_is_full_until_its_encoder_is_loaded(tmp_path: Path) -> None:
    encoders = moved()
    keeper = catalogue(tmp_path / "p", encoders)
    await keeper.open()
    key, value = space.mark("app", ANNOUNCED, "a")
    records = [
        record("items", space.mark("other", ANNOUNCED, "a")[1], key, offset=0),
        record("items", value, key, offset=1),
    ]
    async with keeper._working:
        for _ in range(2):
            assert await keeper.offer("items", records) is None
            assert keeper.is_full("items") and not keeper.is_low("items") and not len(keeper.inbox)
        await encoders.load(1)
        assert not keeper.is_full("items") and keeper.is_low("items")
        assert await keeper.offer("items", records) is None
        assert [entry.offset for entry in keeper.inbox.sources["items"].entries] == [0, 1]
        assert keeper.starts == Starts(((1, 2),)) and keeper.texts_read_by == 0  # nothing is durable
    await keeper.close()


async def test_where_the_beginning_of_a_log_is_gone_an_empty_state_reads_by_the_encoder_in_use(tmp_path: Path) -> None:
    for begins, number in ((0, 0), (5, 1)):
        keeper = catalogue(tmp_path / str(begins), moved(), begins)
        await keeper.open()
        assert keeper.starts.number_at(begins) == number
        await keeper.partition.flush(keeper._starts_row([]), [], {"items": 7})
        assert starts_of(keeper.partition.get_many) == keeper.starts and keeper._starts_row([]) == {}
        await keeper.close()


async def test_an_encoder_that_cannot_be_loaded_is_told_of_until_it_is(make_settings: Callable[..., Settings]) -> None:
    settings, source = make_settings(), cast(Any, SimpleNamespace(end_of=lambda topic, partition: None))
    worker = Worker(settings, lambda: 0.0, WordVectors(), source, lambda topic, partition: None)
    there: list[Any] = []

    def make(model: str) -> Any:
        if not there:
            raise ValueError("no such folder")
        return there[0]

    worker.encoders = moved(make)
    await worker._load_encoder(worker.encoders.spaces.known[1])
    worker._tell_coming()
    assert worker.coming is not None and (worker.coming.number, worker.coming.state) == (1, "failed")
    assert worker.coming.reason == "the deployment's encoder bge:1 is to be loaded from /m/bge: no such folder"
    there.append(SimpleNamespace(name="bge:1", dim=8))
    await worker._load_encoder(worker.encoders.spaces.known[1])
    worker._tell_coming()
    assert worker.coming is None
    await worker.stop()


async def test_a_rebalance_while_a_worker_stops_claims_nothing(make_settings: Callable[..., Settings]) -> None:
    settings = make_settings()
    source: Any = SimpleNamespace(end_of=lambda topic, partition: None, assignment=set)
    worker = Worker(settings, lambda: 0.0, WordVectors(), source, lambda topic, partition: None)
    await worker.stop()
    worker.assigned({TP(settings.topic("clicks"), 0), TP(settings.topic("items"), 0)})
    assert worker.keepers == {} == worker.opening


async def test_what_is_open_is_sought_at_once_and_reads_nothing_as_at_its_end_before(
    make_settings: Callable[..., Settings],
) -> None:
    """A comment that waited for the learner to open was overtaken by the clicks beside it."""
    settings = make_settings()
    sought: list[dict[TP, int]] = []

    async def seek(targets: Mapping[TP, int]) -> None:
        sought.append(dict(targets))

    source: Any = SimpleNamespace(
        seek=seek, generation=lambda: 1, end_of=lambda topic, partition: 5, heard_at=lambda topic, partition: 0.0
    )
    worker = Worker(settings, lambda: 0.0, WordVectors(), source, lambda topic, partition: None)
    clicks, comments = (TP(settings.topic(name), 0) for name in ("clicks", "comments"))
    log = TP(settings.internal_topic("examples"), 0)
    worker._unsought = {clicks, comments, log}
    loop = asyncio.get_running_loop()
    users, learner = loop.create_future(), loop.create_future()
    for key, opening, offset in ((("users", 0), users, 4), (("learner", 0), learner, 7)):
        keepers: Any = worker.keepers
        keepers[key] = SimpleNamespace(next_offset=lambda topic, offset=offset: offset)
        openings: Any = worker.opening
        openings[key] = opening
    users.set_result(None)
    assert worker._end_heard(*comments) is None
    seeking = asyncio.create_task(worker.seek({clicks, comments, log}))
    while not sought:
        await asyncio.sleep(0)
    assert sought == [{clicks: 4, comments: 4}] and not seeking.done()
    assert worker._end_heard(*comments) == 5 and worker._end_heard(*log) is None
    learner.set_result(None)
    await seeking
    assert sought[1:] == [{log: 7}] and worker._end_heard(*log) == 5
    worker.encoding.close()


HEAP = """
import ctypes, sys
from streams import heap

class Info(ctypes.Structure):
    _fields_ = [(n, ctypes.c_size_t) for n in
                ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keep")]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Info
heap.tune()
large = bytearray(30 << 20)
del large  # from here on glibc would take blocks of up to this size from its heap
before = mallinfo().hblkhd
large = bytearray(20 << 20)
print((mallinfo().hblkhd - before) >> 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize(("told", "mapped_mib"), [({}, 20), ({"MALLOC_ARENA_MAX": "8"}, 0)], ids=["", "by-hand"])
def test_large_blocks_go_back_to_the_system(told: dict[str, str], mapped_mib: int) -> None:
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", HEAP], env=variables | told, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == mapped_mib
