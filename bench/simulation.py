"""Whole workers in one process: the real keepers, pipeline, store protocol and learner over simulated logs, disks,
group and clock. A seed draws events, batches and faults; the end must be that of an undisturbed run.

Drawn: kills between any two steps and at any moment, torn, doubled, failed and late appends, disks that are wiped or
lose their tail, workers that join, leave and stop, a worker that is told late what it has lost, records that come
twice or leave a hole, offsets that are missing by right, poison, repeats, events out of order, compaction with a lag,
deletion of a swept head. Time jumps to the next timer, so that hours cost nothing.

Within one topic events may be as late as they like; across topics within the hold (a user of both would else have no
order to be compared with).
"""

import asyncio
import contextvars
import heapq
import json
import marshal
import random
import sys
import weakref
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, NamedTuple
from unittest.mock import patch

import msgspec
import numpy as np
import numpy.typing as npt

from bench.doubles import MemoryDisk
from model.adapter import Adapter
from monitoring.metrics import Metrics
from state import rows as user_rows
from state.changelog import STORE_ID_BYTES, Announce, LogRecord, Reader, parse, row_key_of
from state.partition import Fenced, Partition, PartitionFailedError, digest
from state.store import Store
from streams import examples, rebuild, space
from streams.assignor import share
from streams.codec import MARK, MARKED
from streams.erasure import erasure_id, place_of
from streams.examples import Vectors
from streams.pipeline import ItemLearner
from streams.settings import Settings
from streams.space import Space, Spaces, Starts
from streams.worker import TP, Worker

HOLD_S: Final = 0.05
SKEW_S: Final = 0.02  # an event of one topic reaches its log this much later than a younger one of another, at most
START_S: Final = 1.7e9
TEXT_DIM: Final = 8
EVENTS: Final = (10, 50)
OBSERVE_S: Final = 1.0
SWEEP_S: Final = 0.5
LEFT_S: Final = 2.5 * OBSERVE_S  # two looks of a worker at the folders that it has left
CAUGHT_UP_S_MAX: Final = 60.0  # of simulated time
CLOCK_RESOLUTION_S: Final = 1e-6
TURNS_MAX: Final = 50_000  # of the loop, a world; some 700 are usual
APPEND_S: Final = 0.0, 0.0, 0.001, 0.005, 0.03  # until the broker has it
LETTER_S: Final = 0.0, 0.005, 0.3
READ_RECORDS: Final = 7  # a batch of those who read a log to its end
TAIL_RECORDS: Final = 100  # of those who follow it
ENCODER_POLL_S: Final = 1.5  # of those who follow the log of encoders
MOVES: Final = 0.1  # chance of a move to another encoder, after each disaster
LAG_MARKERS: Final = 4  # that compaction leaves alone, and one for each flush under way: repairs may take so many
WORKERS: Final = ("w1", "w2")
SOURCES: Final = {"users": ("clicks", "comments", "erasures"), "catalogue": ("items",), "learner": ("examples",)}
CHANGELOGS: Final = {"users": "users-changelog", "catalogue": "catalogue-changelog", "learner": "items-changelog"}

MakePartition = Callable[..., Partition]
Story = Callable[["World"], Coroutine[Any, Any, None]]
LIFE: contextvars.ContextVar["Life"] = contextvars.ContextVar("life")


class KilledError(BaseException):
    """The process ends here."""


class LogFailedError(Exception):
    """The broker did not acknowledge in time."""


class StuckError(AssertionError):
    """Everybody waits for ever."""


# -- time


class Due:
    """A call that is to come (`asyncio.Handle`). callback: None once it is cancelled."""

    __slots__ = ("args", "callback", "context")

    def __init__(
        self, callback: Callable[..., object], args: tuple[Any, ...], context: contextvars.Context | None
    ) -> None:
        self.callback: Callable[..., object] | None = callback
        self.args = args
        self.context = context if context is not None else contextvars.copy_context()

    def cancel(self) -> None:
        self.callback, self.args = None, ()

    def cancelled(self) -> bool:
        return self.callback is None


class VirtualLoop(asyncio.AbstractEventLoop):
    """An event loop whose time is simulated, and whose threads are moments of it: it waits for nothing but the clock,
    and moves that. Timers of one moment run in the order in which they were set.
    """

    def __init__(self, chance: random.Random) -> None:
        self.now_s = 0.0
        self.turns = 0
        self._chance = chance
        self._ready: deque[Due] = deque()
        self._timers: list[tuple[float, int, Due]] = []  # a heap
        self._set = 0  # timers, so far
        self._generators: weakref.WeakSet[AsyncGenerator[Any, Any]] = weakref.WeakSet()
        self._is_running = self._is_stopping = self._is_closed = False

    def time(self) -> float:
        return self.now_s

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> Any:
        due = Due(callback, args, context)
        self._ready.append(due)
        return due

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> Any:
        return self.call_at(self.now_s + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> Any:
        due = Due(callback, args, context)
        self._set += 1
        heapq.heappush(self._timers, (when, self._set, due))
        return due

    def create_future(self) -> "asyncio.Future[Any]":
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, **more: Any) -> "asyncio.Task[Any]":
        """A task of the process that asks, or of the one whose context it gets."""
        task = asyncio.Task(coro, loop=self, **more)
        context = more.get("context")
        life = context.get(LIFE) if context is not None else LIFE.get(None)
        if life is not None:
            life.tasks.append(task)
        return task

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> "asyncio.Future[Any]":
        """The work is done at one moment, a little later."""
        future = self.create_future()

        def work() -> None:
            try:
                result = func(*args)
            except BaseException as failure:
                if not future.done():
                    future.set_exception(failure)
            else:
                if not future.done():
                    future.set_result(result)

        self.call_later(self._chance.choice((0.0, 0.0, 0.003)), work)
        return future

    def call_exception_handler(self, context: Any) -> None:
        """Nothing: of tasks that a kill has ended."""

    def get_debug(self) -> bool:
        return False

    # -- its life

    def is_running(self) -> bool:
        return self._is_running

    def is_closed(self) -> bool:
        return self._is_closed

    def stop(self) -> None:
        self._is_stopping = True

    def close(self) -> None:
        self._is_closed = True
        self._ready.clear()
        self._timers.clear()

    def run_until_complete(self, future: Any) -> Any:
        """Raises StuckError where nothing is left that could complete it."""
        task = asyncio.ensure_future(future, loop=self)
        task.add_done_callback(lambda _: self.stop())
        self.run_forever()
        return task.result()

    def run_forever(self) -> None:
        hooks = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(firstiter=self._generators.add, finalizer=self._finish)
        asyncio._set_running_loop(self)  # what the makers of loops are given for it
        self._is_running = True
        try:
            while not self._is_stopping:
                self._turn()
        finally:
            self._is_running = self._is_stopping = False
            asyncio._set_running_loop(None)
            sys.set_asyncgen_hooks(*hooks)

    def _turn(self) -> None:
        ready, timers = self._ready, self._timers
        while timers and timers[0][2].callback is None:
            heapq.heappop(timers)
        if not ready:
            if not timers:
                raise StuckError("nobody has anything left to wait for")
            self.now_s = max(self.now_s, timers[0][0])
        self.turns += 1
        if self.turns > TURNS_MAX:
            raise StuckError(f"no end after {TURNS_MAX} turns of the loop")
        until = self.now_s + CLOCK_RESOLUTION_S
        while timers and timers[0][0] < until:
            ready.append(heapq.heappop(timers)[2])
        for _ in range(len(ready)):
            due = ready.popleft()
            if due.callback is not None:
                due.context.run(due.callback, *due.args)

    def _finish(self, generator: AsyncGenerator[Any, Any]) -> None:
        """Somebody let go of it before its end."""
        self._generators.discard(generator)
        if not self._is_closed:
            self.call_soon(self.create_task, generator.aclose())

    async def shutdown_asyncgens(self) -> None:
        left = list(self._generators)
        self._generators.clear()
        await asyncio.gather(*(generator.aclose() for generator in left), return_exceptions=True)

    async def shutdown_default_executor(self) -> None: ...


# -- logs


class Log:
    """A topic's partition. Offsets may be missing (`skip`, compaction); watchers are told of every record."""

    def __init__(self) -> None:
        self.records: list[Any] = []
        self.end = 0
        self.begins = 0
        self.watchers: list[asyncio.Event] = []

    def land(self, records: Iterable[tuple[bytes, bytes | None]]) -> int:
        """Appends; the last offset."""
        for key, value in records:
            self.put(LogRecord(self.end, key, value))
        return self.end - 1

    def put(self, record: Any) -> None:
        """Appends a record that has its offset."""
        assert record.offset == self.end
        self.records.append(record)
        self.end += 1
        for watcher in self.watchers:
            watcher.set()

    def skip(self, offsets: int) -> None:
        """As control records and aborted transactions do."""
        self.end += offsets

    def at(self, start: int, count: int, last: int | None = None) -> list[Any]:
        """The next records from an offset on, up to `last`."""
        place = bisect_left(self.records, start, key=_offset)
        found = self.records[place : place + count]
        return found if last is None else [r for r in found if r.offset <= last]

    def holds_after(self, offset: int) -> bool:
        """Whether a record lies there or later."""
        return bool(self.records) and self.records[-1].offset >= offset

    def compact(self, bound: int) -> None:
        """Below the offset `bound`, the last record of each key stays."""
        last = {r.key: r.offset for r in self.records if r.offset < bound}
        self.records = [r for r in self.records if r.offset >= bound or last[r.key] == r.offset]

    def delete_before(self, offset: int) -> None:
        """DeleteRecords."""
        self.begins = max(self.begins, offset)
        self.records = [r for r in self.records if r.offset >= self.begins]


def _offset(record: Any) -> int:
    offset: int = record.offset
    return offset


class Published(NamedTuple):
    """A record of a source topic, as a consumer hands it over."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...] = ()


# -- a process


class Life:
    """One process, from its start to its end. Nothing of it has an effect after the kill."""

    def __init__(self, world: "World", name: str, steps_left: int | None, fault_rate: float) -> None:
        self.world, self.name = world, name
        self.steps_left, self.fault_rate = steps_left, fault_rate
        self.killed = False
        self.tasks: list[asyncio.Task[Any]] = []
        self.stores: list[Store] = []
        self.last_step = "start"
        self.is_deaf = False  # not told of rebalances for now
        self.context = contextvars.copy_context()
        self.context.run(LIFE.set, self)
        self.source = SimSource(self)
        settings = _settings(name, world.partitions)
        self.worker: Worker = self.context.run(
            Worker, settings, world.now, world.encoder_at(0), self.source, lambda topic, partition: None, world.load
        )

    def alive(self) -> None:
        """Raises KilledError after the end."""
        if self.killed:
            raise KilledError(self.last_step)

    def step(self, name: str) -> None:
        """A named step of a flush, an open or a restore: perhaps the last one."""
        self.alive()
        self.last_step = name
        if self.steps_left is not None:
            self.steps_left -= 1
            if self.steps_left <= 0:
                self.kill()

    def kill(self) -> None:
        """kill -9, from inside."""
        self.end()
        raise KilledError(self.last_step)

    def end(self) -> None:
        """kill -9, from outside."""
        if not self.killed:
            self.killed = True
            self.world.kills.append(self.last_step)
            asyncio.get_running_loop().call_soon(self._reap)

    def _reap(self) -> None:
        for task in self.tasks:
            if not task.done():
                task.cancel()
        self.source.unwatch()
        for store in self.stores:
            store.close()
        if self in self.world.members:
            self.world.members.remove(self)

    def fail(self, failure: BaseException | None) -> None:
        """The process ends itself: rightly so only for what the world has done to it."""
        if self.killed:
            return
        if not isinstance(failure, LogFailedError | PartitionFailedError | KilledError | Fenced):
            self.world.wrong.append(failure or AssertionError("ended without a reason"))
        self.end()

    async def do(self, work: Coroutine[Any, Any, Any]) -> None:
        """Something that the driver asks of the process; what fails there ends it."""
        task = asyncio.get_running_loop().create_task(work, context=self.context)
        await asyncio.wait({task})
        if not task.cancelled() and (failure := task.exception()) is not None:
            self.fail(failure)


class SimSource:
    """The consumer of one process (`streams.worker.Source`)."""

    def __init__(self, life: Life) -> None:
        self.life, self.world = life, life.world
        self.assigned: set[TP] = set()
        self.number = 0
        self.positions: dict[TP, int] = {}
        self.paused: set[TP] = set()
        self.cut: dict[TP, tuple[float, int]] = {}  # what is out of reach: since when, and where it ended then
        self.wakes = [asyncio.Event() for _ in SOURCES]

    def assignment(self) -> Iterable[TP]:
        return self.assigned

    def generation(self) -> int:
        return self.number

    async def seek(self, targets: Mapping[TP, int]) -> None:
        await asyncio.sleep(0)
        self.life.alive()
        self.positions.update({tp: offset for tp, offset in targets.items() if tp in self.assigned})
        self.wake()

    def pause(self, tps: Iterable[TP]) -> None:
        self.paused.update(tps)

    def resume(self, tps: Iterable[TP]) -> None:
        self.paused.difference_update(tps)
        self.wake()

    async def commit(self, offsets: Mapping[TP, int]) -> bool:
        await asyncio.sleep(0)
        self.life.alive()
        assert offsets
        if self.world.random.random() < self.life.fault_rate:
            return False
        self.world.committed.update(offsets)
        return True

    def end_of(self, topic: str, partition: int) -> int | None:
        tp = TP(topic, partition)
        if tp in self.cut:
            return self.cut[tp][1]
        return self.world.logs[tp].end if tp in self.assigned else None

    def heard_at(self, topic: str, partition: int) -> float | None:
        return self.cut.get(TP(topic, partition), (self.world.now(), 0))[0]

    def give(self, tps: set[TP]) -> None:
        """The group's answer: read on from what was committed, until somebody seeks."""
        self.unwatch()
        self.number += 1
        self.assigned = tps
        self.paused &= tps
        self.positions = {tp: self.positions.get(tp, self.world.committed.get(tp, 0)) for tp in tps}
        for wake, topics in zip(self.wakes, self.topics(), strict=True):
            for tp in sorted(tps):
                if tp.topic in topics:
                    self.world.logs[tp].watchers.append(wake)
        self.wake()

    def topics(self) -> Iterator[tuple[str, ...]]:
        """Of each agent."""
        return ((*map(self.world.topic, names),) for names in SOURCES.values())

    def wake(self) -> None:
        for wake in self.wakes:
            wake.set()

    def unwatch(self) -> None:
        for log in self.world.logs.values():
            log.watchers = [wake for wake in log.watchers if wake not in self.wakes]

    async def feed(self, topics: tuple[str, ...], wake: asyncio.Event) -> None:
        """One agent: what has come is offered, in slices."""
        chance = self.world.random
        try:
            while True:
                ready = [
                    tp
                    for tp in sorted(self.assigned - self.paused - self.cut.keys())
                    if tp.topic in topics and self.world.logs[tp].holds_after(self.positions[tp])
                ]
                if not ready:
                    wake.clear()
                    await wake.wait()
                    continue
                await asyncio.sleep(chance.choice((0.0, 0.001, 0.004, 0.02)))
                self.life.alive()
                tp = chance.choice(ready)
                if tp in self.assigned and tp not in self.paused and tp not in self.cut:
                    await self._deliver(tp)
        except Exception as failure:  # Faust's agent crashes, and the worker with it
            self.life.fail(failure)

    async def _deliver(self, tp: TP) -> None:
        chance = self.world.random
        at = self.positions[tp]
        fault = chance.random()
        if fault < self.life.fault_rate:
            at = max(0, at + chance.choice((-6, -2, -1, 1, 2)))  # again, or with a hole
        batch = self.world.logs[tp].at(at, chance.choice((1, 3, 10, 40)))
        if batch:
            self.positions[tp] = batch[-1].offset + 1
            await self.life.worker.offer(tp.topic, tp.partition, batch)


class SimKafka:
    """What streams.worker takes from streams.kafka, for whichever process asks."""

    def __init__(self, world: "World") -> None:
        self.world = world

    def Producer(self, options: Any) -> "SimProducer":
        return SimProducer(LIFE.get())

    def ChangelogTopic(self, topic: str, partition: int, producer: "SimProducer", options: Any) -> "SimChangelog":
        return SimChangelog(producer, TP(topic, partition))

    async def read_log(
        self, options: Any, topic: str, partition: int, start: int, stop: int | None = None, **more: Any
    ) -> AsyncIterator[list[Any]]:
        log, life = self.world.logs[TP(topic, partition)], LIFE.get()
        at = max(start, log.begins)
        while stop is None or at <= stop:
            life.alive()
            batch = log.at(at, TAIL_RECORDS if stop is None else READ_RECORDS, stop)
            if batch or stop is None:
                yield batch
            elif stop is not None:
                return
            at = batch[-1].offset + 1 if batch else at
            await asyncio.sleep(0 if batch else ENCODER_POLL_S if topic.endswith("-encoder") else 0.5)

    def partition_of(self, key: bytes, partitions: int) -> int:
        return int(key[1:]) % partitions

    async def log_end(self, options: Any, topic: str, partition: int) -> int:
        return self.world.logs[TP(topic, partition)].end

    async def log_bounds(self, options: Any, topics: Iterable[str], partition: int) -> dict[str, tuple[int, int]]:
        logs = {topic: self.world.logs[TP(topic, partition)] for topic in topics}
        return {topic: (log.begins, log.end) for topic, log in logs.items()}

    async def log_start(self, options: Any, topic: str, partition: int) -> int:
        await self._asked()
        return self.world.logs[TP(topic, partition)].begins

    async def record_at(self, options: Any, topic: str, partition: int, offset: int) -> Any:
        await self._asked()
        return next(iter(self.world.logs[TP(topic, partition)].at(offset, 1, offset)), None)

    async def keys(self, options: Any, topic: str, partition: int) -> AsyncIterator[tuple[int, bytes, int]]:
        for record in self.world.logs[TP(topic, partition)].at(0, 1 << 30):
            if record.key is not None:
                yield record.offset, record.key, record.timestamp
        await self._asked()

    async def delete_before(self, options: Any, topic: str, partition: int, offset: int) -> str | None:
        await self._asked()
        if not self.world.deletes:
            return "it deletes no records"
        self.world.logs[TP(topic, partition)].delete_before(offset)
        await self._asked()
        return None

    async def _asked(self) -> None:
        """A request and its answer, either of which may be lost."""
        life, chance = LIFE.get(), self.world.random
        await asyncio.sleep(chance.choice((0.0, 0.001, 0.02)))
        life.alive()
        if chance.random() < life.fault_rate:
            raise LogFailedError

    async def first_at_or_after(self, options: Any, topic: str, partition: int, offset: int) -> tuple[int, int]:
        log = self.world.logs[TP(topic, partition)]
        while not (found := log.at(offset, 1)):
            await asyncio.sleep(0.05)
        return found[0].offset, log.begins


class SimProducer:
    """A producer whose batches may be torn, doubled, late or lost."""

    idempotent = False

    def __init__(self, life: Life) -> None:
        self.life, self.world = life, life.world
        self._locks: defaultdict[TP, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def partitions(self, topic: str) -> int:
        return 1 if topic.endswith(("examples", "items-changelog", "-encoder")) else self.world.partitions

    async def send(self, topic: str, partition: int, records: Sequence[tuple[bytes, bytes | None]]) -> int:
        tp = TP(topic, partition)
        async with self._locks[tp]:
            return await self._deliver(list(records), self.world.logs[tp].land)

    async def send_one(
        self, topic: str, key: bytes | None, value: bytes | None, headers: Any = (), partition: int | None = None
    ) -> tuple[int, int]:
        log = self.world.logs[TP(topic, 0)]

        def land(records: list[Any]) -> int:
            for _ in records:
                log.put(Published(topic, 0, log.end, 0, key, value, tuple(headers)))
            return log.end - 1

        return 0, await self._deliver([None], land, LETTER_S)

    async def _deliver(
        self, records: list[Any], land: Callable[[list[Any]], int], delays_s: Sequence[float] = APPEND_S
    ) -> int:
        life, chance = self.life, self.world.random
        life.alive()
        try:
            await asyncio.sleep(chance.choice(delays_s))
        except asyncio.CancelledError:
            self._lose(records, land)
            raise
        life.alive()
        self.world.land_late()
        if chance.random() >= life.fault_rate:
            return land(records)
        fault = chance.choice(("torn", "doubled", "failed", "killed"))
        if fault == "doubled":
            land(records[: chance.randint(1, len(records))])
            return land(records)
        if fault == "torn":
            land(records[: chance.randrange(len(records))])
            raise LogFailedError
        self._lose(records, land)
        if fault == "failed":
            raise LogFailedError
        life.kill()
        raise AssertionError

    def _lose(self, records: list[Any], land: Callable[[list[Any]], int]) -> None:
        """Nobody waits for this batch any more: it lands never, now, or later, and a prefix of it at that."""
        chance = self.world.random
        prefix = records[: chance.randint(0, len(records))]
        if prefix and chance.random() < 0.5:
            land(prefix)
        elif prefix:
            self.world.late.append(lambda: land(prefix))


class SimChangelog:
    """One partition of a changelog as one process sees it (`state.changelog.Log`)."""

    def __init__(self, producer: SimProducer, tp: TP) -> None:
        self.producer, self.tp = producer, tp

    async def append(self, records: Sequence[tuple[bytes, bytes | None]]) -> int:
        return await self.producer.send(*self.tp, records)

    async def read(self, start: int, stop: int | None) -> AsyncIterator[list[LogRecord]]:
        life, log = self.producer.life, self.producer.world.logs[self.tp]
        last = log.end - 1 if stop is None else stop
        while batch := log.at(start, READ_RECORDS, last):
            life.alive()
            start = batch[-1].offset + 1
            yield batch
            await asyncio.sleep(0)

    async def first(self) -> int:
        self.producer.life.alive()
        return self.producer.world.logs[self.tp].begins


class LifeDisk:
    """The disk as one process sees it: nothing is written after its end."""

    def __init__(self, life: Life) -> None:
        self.life = life

    def open(self, path: Path) -> Store:
        self.life.alive()
        store = self.life.world.disk.open(path)
        self.life.stores.append(store)
        wrapped: Any = LifeStore(store, self.life)
        return wrapped  # type: ignore[no-any-return]

    def wipe(self, path: Path) -> None:
        self.life.alive()
        self.life.world.disk.wipe(path)

    def stores(self, folder: Path) -> list[Path]:
        return self.life.world.disk.stores(folder)


class LifeStore:
    """A store of one process."""

    def __init__(self, store: Store, life: Life) -> None:
        self._store, self._life = store, life

    def __getattr__(self, name: str) -> Any:
        if name != "close":
            self._life.alive()
        return getattr(self._store, name)

    def write(self, *arguments: Any, **more: Any) -> None:
        self._life.alive()
        self._store.write(*arguments, **more)


class _System:
    """`os` for streams.worker."""

    @staticmethod
    def _exit(code: int) -> None:
        life, failure = LIFE.get(None), sys.exception()
        if life is not None and not life.killed and not isinstance(failure, GeneratorExit):
            life.fail(failure)
            raise KilledError(life.last_step)


class _Silent:
    """A logger."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **more: None


async def _follow_nothing(*_: Any) -> None: ...


class WordEncoder:
    """Vectors that follow from the text, and the encoder's number, alone."""

    dim = TEXT_DIM

    def __init__(self, number: int) -> None:
        self.name = f"words-{number}"
        self._person = b"%d" % number

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        raw = b"".join(blake2b(t.encode(), digest_size=TEXT_DIM, person=self._person).digest() for t in texts)
        vectors = np.frombuffer(raw, np.int8).reshape(-1, TEXT_DIM).astype(np.float32) + np.float32(0.5)
        unit: npt.NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return unit

    def project(self, vector: Any) -> npt.NDArray[np.float32]:
        raise AssertionError("no item of the simulation brings a vector")

    combine = project


@cache
def _settings(name: str, partitions: int) -> Settings:
    return Settings(
        state_dir=Path("/simulated") / name, partitions=partitions, merge_hold_ms=1e3 * HOLD_S, rank_sample=0.3,
        item_flush_bytes_per_s=2e5, learner_dim=8, learner_negatives=4, learner_neighbours_max=4,
        learner_cooccurrence_history=4, learner_y_history=4,
    )  # fmt: skip


@cache
def _metrics() -> Metrics:
    return Metrics()  # its making costs more than a small world


# -- the world


class World:
    """Everything that outlives a process."""

    def __init__(self, seed: int, make: MakePartition) -> None:
        self.random = chance = random.Random(seed)
        self.loop = VirtualLoop(chance)  # type: ignore[abstract]  # no sockets, signals or processes
        self.make = make
        self.partitions = chance.choice((1, 1, 2))
        self.settings = _settings("world", self.partitions)
        self.encoders: list[WordEncoder] = []
        self.disk = MemoryDisk()
        self.logs: defaultdict[TP, Log] = defaultdict(Log)
        self.late: list[Callable[[], object]] = []  # batches of dead or fenced processes on their way to the broker
        self.committed: dict[TP, int] = {}
        self.members: list[Life] = []
        self.kills: list[str] = []
        self.wrong: list[BaseException] = []
        self.schedule = _events(chance, self.partitions)
        self.poison: list[Published] = []
        self.depth = chance.choice((1, 2, 3, 5))
        self.lateness = chance.choice((0.5, 0.03))
        self.deletes = chance.random() < 0.9  # whether the broker knows DeleteRecords
        self.restored: dict[TP, tuple[tuple[int, int], Any]] = {}  # by the log's end and length
        self._followers: dict[TP, tuple[Reader, list[int]]] = {}
        self._followed: dict[TP, int] = {}

    def now(self) -> float:
        """Unix s."""
        return START_S + self.loop.now_s

    def encoder_at(self, number: int) -> Any:
        """The encoder of this number."""
        while number >= len(self.encoders):
            self.encoders.append(WordEncoder(len(self.encoders)))
        return self.encoders[number]

    def load(self, model: str) -> Any:
        """The encoder of this name."""
        return self.encoder_at(int(model.removeprefix("words-")))

    @property
    def spaces(self) -> Spaces:
        """The encoders that the log tells of."""
        spaces = Spaces()
        for record in self.logs[TP(self.settings.internal_topic(space.TOPIC), 0)].records:
            spaces.take(space.decode(record.value))
        return spaces

    async def move(self) -> None:
        """Somebody moves the deployment to another encoder, in the order of `streams.migrate`, and may give up, or be
        ended, or be a while about it."""
        chance, spaces = self.random, self.spaces
        if spaces.current is None:
            return
        known = spaces.next
        number = len(spaces.known) if known is None else known.number
        name = self.encoder_at(number).name
        encoders = self.logs[TP(self.settings.internal_topic(space.TOPIC), 0)]
        log = self.logs[TP(self.topic("examples"), 0)]

        def tell(state: Any) -> None:
            told = Space(name, TEXT_DIM, number, name, name, state)
            encoders.land([(space.KEY, msgspec.json.encode(told))])

        if known is None:
            tell(space.ANNOUNCED)
        items = [r.key.decode() for p in range(self.partitions) for r in self.logs[TP("items", p)].records
                 if r.key and not r.key.startswith(MARK)]  # fmt: skip
        for item_id in items:
            if chance.random() < 0.3:
                await asyncio.sleep(chance.choice((0.0, 0.1)))
            vector = self.encoder_at(number).encode([item_id])[0].astype("<f2").tobytes()
            told = Vectors(number, name, [(examples.item_key(item_id), vector)])
            log.land([(b"vectors", examples.pack_vectors(told))])
        await asyncio.sleep(chance.choice((0.0, 0.5, 2.0)))
        end = chance.random()
        if end < 0.2:
            tell(space.GIVEN_UP)
            log.land([(b"vectors", examples.pack_drop(number, name))])
        if end < 0.3:
            return
        tell(space.IN_USE)
        log.land([(b"vectors", examples.pack_vectors(Vectors(number, name, []), in_use=True))])
        mine = Space(name, TEXT_DIM, number, name, name)
        for tp in [TP(topic, p) for topic in MARKED for p in range(self.partitions)]:
            for _ in range(chance.choice((1, 1, 2))):  # a repeat says nothing
                await asyncio.sleep(chance.choice((0.0, 0.0, 0.2)))
                end = self.logs[tp].end
                key, value = space.mark(self.settings.app_id, mine, str(end))
                self.logs[tp].put(Published(*tp, end, int(self.now() * 1e3), key, value))

    def topic(self, name: str) -> str:
        """Full name."""
        return self.settings.internal_topic(name) if name == "examples" else self.settings.topic(name)

    def erasures(self) -> Iterator[tuple[str, str, bool]]:
        """(name, user, whether it is to be unlearnt) of every erasure that was published."""
        rejected = {(r.topic, r.partition, r.offset) for r in self.poison}
        for p in range(self.partitions):
            for record in self.logs[TP("erasures", p)].records:
                if (record.topic, p, record.offset) not in rejected:
                    event = json.loads(record.value)
                    yield erasure_id(p, record.offset), event["user_id"], event.get("unlearn", False)

    def new_store_id(self) -> bytes:
        """`state.store.new_store_id`, by the seed."""
        return self.random.randbytes(STORE_ID_BYTES)

    def fingerprint(self) -> str:
        """Of every log as it is: equal for equal seeds, in whichever process."""
        hasher = blake2b(digest_size=8)
        for tp, log in sorted(self.logs.items()):
            records = [(r.offset, r.key, r.value) for r in log.records]
            hasher.update(marshal.dumps((*tp, log.begins, log.end, records), 2))  # version 2: by the values alone
        return hasher.hexdigest()

    def make_partition(self, **told: Any) -> Partition:
        """A partition whose steps may be the process's last."""
        chance = self.random
        told |= {
            "crash": LIFE.get().step, "pipeline_depth": self.depth, "sweep_rows": chance.choice((1, 5, 50)),
            "append_bytes_max": chance.choice((1, 600, 1 << 20)),
        }  # fmt: skip
        return self.make(**told)

    def switch(self) -> None:
        """A checkpoint of the encoder is promoted or taken back, or a trial of one begins or ends."""
        adapter = None
        if self.random.random() < 0.7:
            drawn = np.frombuffer(self.random.randbytes(2 * TEXT_DIM), np.int8).astype(np.float32) / np.float32(256)
            left, right = drawn.reshape(2, TEXT_DIM, 1)
            adapter = Adapter(self.encoder_at(0).name, left, right, self.random.choice((0.5, 1.0, 2.0)))
        message = examples.pack_adapter(adapter, taken_back=adapter is None)
        if self.random.random() < 0.5:
            message = examples.pack_trial(adapter, self.random.choice((0.1, 0.5)))
            message = self.random.choice((message, message, examples.pack_trial_end()))
        self.logs[TP(self.topic("examples"), 0)].land([(b"adapter", message)])

    def land_late(self) -> None:
        """Some batches of the dead arrive."""
        while self.late and self.random.random() < self.lateness:
            self.late.pop(self.random.randrange(len(self.late)))()

    async def publish(self) -> None:
        """The producers: each event at its time, between gaps that are legal."""
        for at, tp, key, value, is_poison in self.schedule:
            await asyncio.sleep(max(0.0, at - self.now()))
            log = self.logs[tp]
            if self.random.random() < 0.1:
                log.skip(self.random.randint(1, 3))
            record = Published(tp.topic, tp.partition, log.end, int(self.now() * 1e3), key, value)
            log.put(record)
            if is_poison:
                self.poison.append(record)
            if self.random.random() < 0.03:
                log.skip(1)

    def maintain(self) -> None:
        """What brokers and operators do at any time: compact with a lag, delete the head after SWEPT."""
        chance = self.random
        for kind, name in CHANGELOGS.items():
            for p in range(self.partitions if kind != "learner" else 1):
                tp = TP(self.settings.internal_topic(name), p)
                if chance.random() < 0.3:
                    self._compact(tp)
                elif chance.random() < 0.3:
                    self._echo(self.logs[tp])
                for life in self.members:
                    keeper = life.worker.open_keeper(kind, p)
                    if keeper is not None and kind != "learner" and chance.random() < 0.7:
                        self.logs[tp].delete_before(keeper.partition.truncatable_to or 0)
        for p in range(self.partitions):
            items = self.logs[TP("items", p)]
            if chance.random() < 0.3:
                items.compact(items.end - 3)

    def _echo(self, log: Log) -> None:
        """A retry of a dead owner arrives late: rows that it once wrote lie behind all else."""
        chance = self.random
        claims = [(told.epoch, at) for at, told in enumerate(map(parse, log.records)) if type(told) is Announce]
        begun = max(claims, default=(0, 0))[1]  # the newest owner's own
        if begun:
            start = chance.randrange(begun)
            again = log.records[start : min(begun, start + chance.randint(1, 6))]
            log.land([(record.key, record.value) for record in again if row_key_of(record) is not None])

    def _compact(self, tp: TP) -> None:
        log = self.logs[tp]
        reader, markers = self._followers.setdefault(tp, (Reader(keys_only=True), []))
        for record in log.at(self._followed.get(tp, 0), 1 << 30):
            if (accepted := reader.feed(record)) is not None:
                markers.append(accepted.position)
        self._followed[tp] = log.end
        lag = LAG_MARKERS + self.depth
        if len(markers) > lag:
            log.compact(markers[-lag - 1])

    # -- the group

    async def start(self, name: str, steps_left: int | None, fault_rate: float) -> Life:
        """A process starts and joins."""
        life = Life(self, name, steps_left, fault_rate)
        await life.do(life.worker.start())
        for topics, wake in zip(life.source.topics(), life.source.wakes, strict=True):
            asyncio.get_running_loop().create_task(life.source.feed(topics, wake), context=life.context)
        if not life.killed:
            self.members.append(life)
            await self.rebalance()
        return life

    async def rebalance(self) -> None:
        """Everybody settles, then everybody is told; a deaf member keeps what it had until it hears again."""
        members = [life for life in self.members if not life.is_deaf]
        for life in members:
            await life.do(life.worker.revoked())
        members = [life for life in members if not life.killed]
        if not members:
            return
        held = {life.name: sorted({tp.partition for tp in life.source.assigned}) for life in members}
        owners = share(self.partitions, held)
        for life in members:
            mine = {p for p, name in owners.items() if name == life.name}
            topics = [t for names in SOURCES.values() for t in names if t != "examples"]
            tps = {TP(self.topic(t), p) for t in topics for p in mine}
            if 0 in mine:
                tps.add(TP(self.topic("examples"), 0))
            await life.do(self._told(life, tps))

    async def _told(self, life: Life, tps: set[TP]) -> None:
        life.source.give(tps)
        life.worker.assigned(tps)
        await asyncio.sleep(self.random.choice((0.0, 0.01)))
        await life.worker.seek(set(tps))

    def alive(self, name: str) -> Life | None:
        """The process of that name, if it runs."""
        return next((life for life in self.members if life.name == name and not life.killed), None)


def _events(chance: random.Random, partitions: int) -> list[tuple[float, TP, bytes | None, bytes | None, bool]]:
    """(when published, where, key, value, whether it is poison), in order of publication."""
    users, items = chance.randint(2, 9), chance.randint(3, 12)
    at = START_S + 0.5
    found = [_item(chance, at - 0.4 + 0.01 * n, f"i{n}", partitions, is_new=True) for n in range(items)]
    for _ in range(chance.randint(*EVENTS)):
        at += chance.choice((0.0, 0.001, 0.01, 0.05, 0.3))
        user, item = chance.randrange(users), chance.randrange(items + 1)
        kind = chance.random()
        if kind < 0.05:
            found.append(_item(chance, at, f"i{item}", partitions, is_new=False))
            continue
        event: dict[str, Any] = {"user_id": f"u{user}", "item_id": f"i{item}", "ts": round(at, 3)}
        topic = "clicks"
        if user % 3 == 0:
            event["ts"] -= chance.choice((0, 0, 1, 100))  # of one topic only: as late as it likes
        elif kind < 0.35:
            topic = "comments"
            event |= {"text": f"words {chance.randrange(40)}"}
            if chance.random() < 0.5:
                del event["item_id"]
            if chance.random() < 0.3:
                topic, event = "erasures", {"user_id": event["user_id"], "ts": event["ts"]}
                if chance.random() < 0.3:
                    event["unlearn"] = True
        if topic == "clicks":
            event |= {"action": chance.choice(("click", "like", "rating", "skip", "hum")), "value": 3.5}
        late = chance.uniform(0, SKEW_S) if chance.random() < 0.3 else 0.0
        key = event["user_id"].encode()
        value = json.dumps(event).encode()
        is_poison = chance.random() < 0.12
        if is_poison:
            value = chance.choice((b"{", b"", b"[]", value.replace(b"user_id", b"nobody")))
        found.append((at + late, TP(topic, user % partitions), key, value, is_poison))
    return sorted(found, key=lambda one: one[0])


def _item(
    chance: random.Random, at: float, item: str, partitions: int, *, is_new: bool
) -> tuple[float, TP, bytes, bytes | None, bool]:
    told: dict[str, Any] = {"item_id": item, "text": f"about {chance.randrange(99)}"}
    if chance.random() < 0.3:
        told["ts"] = round(at + chance.choice((-100.0, 0.0, 0.3, 3600.0)), 3)
    value = json.dumps(told).encode()
    if not is_new and chance.random() < 0.3:
        return at, TP("items", int(item[1:]) % partitions), item.encode(), None, False
    return at, TP("items", int(item[1:]) % partitions), item.encode(), value, False


# -- the story


async def _story(world: World) -> None:
    """Lives and disasters while events come, then an undisturbed worker to the end, then all that must hold."""
    chance = world.random
    loop = asyncio.get_running_loop()
    publishing = loop.create_task(world.publish())
    moving: list[asyncio.Task[None]] = []
    for _ in range(chance.randint(1, 5)):
        await _disaster(world)
        await asyncio.sleep(chance.choice((0.0, 0.02, 0.1, 0.5, 1.5)))
        world.maintain()
        if chance.random() < 0.25:
            world.switch()
        if chance.random() < MOVES and all(one.done() for one in moving):
            moving.append(loop.create_task(world.move()))
    await asyncio.gather(publishing, *moving)
    for life in list(world.members):
        if chance.random() < 0.5:
            await life.do(life.worker.stop())
        life.end()
    await asyncio.sleep(0.1)
    while world.late and chance.random() < 0.7:
        world.land_late()
    last = await world.start(chance.choice((*WORKERS, "w3")), None, 0.0)
    await caught_up(world, last)
    for _ in range(chance.choice((1, 3))):
        world.maintain()
        await asyncio.sleep(SWEEP_S)
    await caught_up(world, last)
    await check(world, last)
    if next(world.erasures(), None) is not None and chance.random() < 0.8:
        await _afterwards(world, last)
    for life in list(world.members):
        await life.do(life.worker.stop())
        life.end()
    if world.wrong:
        raise world.wrong[0]


async def _afterwards(world: World, last: Life) -> None:
    """Those that were down come back with disks of before an erasure, what was late arrives; then they take over."""
    while world.late:
        world.land_late()
    for name in WORKERS:
        if world.alive(name) is None:
            await world.start(name, None, 0.0)
    await asyncio.sleep(LEFT_S)
    _check_disks(world)
    await last.do(last.worker.stop())
    last.end()
    await asyncio.sleep(0)
    await world.rebalance()
    await asyncio.sleep(LEFT_S)
    _check_disks(world)
    _check_changelogs(world)


async def caught_up(world: World, life: Life) -> None:
    """Until a worker has all that its logs hold. Raises what went wrong, StuckError."""
    deadline = asyncio.get_running_loop().time() + CAUGHT_UP_S_MAX
    while not _has_all(world, life):
        if world.wrong:
            raise world.wrong[0]
        if asyncio.get_running_loop().time() > deadline or life.killed:
            raise StuckError(f"the last worker does not reach the end: {_standing(world, life)}")
        await asyncio.sleep(0.25)


async def _disaster(world: World) -> None:
    chance = world.random
    name = chance.choice(WORKERS)
    life = world.alive(name)
    if life is None:
        if chance.random() < 0.3:
            for kind in SOURCES:
                for p in range(world.partitions):
                    _harm_disk(world, world.settings.state_dir.parent / name / f"{kind}-{p}")
        await _start(world, name)
        return
    deed = chance.random()
    if deed < 0.4:
        life.end()
        await asyncio.sleep(chance.choice((0.0, 0.2)))
        await world.rebalance()
    elif deed < 0.55:
        await life.do(life.worker.stop())
        life.end()
        await asyncio.sleep(0)
        await world.rebalance()
    else:  # it hears nothing for a while: another takes what it still believes to have
        life.is_deaf = not life.is_deaf
        other = next(other for other in WORKERS if other != name)
        if life.is_deaf and world.alive(other) is None:
            await _start(world, other)
        else:
            await world.rebalance()
        if life.is_deaf and chance.random() < 0.5:  # and comes back to what it had
            await asyncio.sleep(chance.choice((0.1, 0.5, 1.5)))
            life.is_deaf = False
            await world.rebalance()


async def _start(world: World, name: str) -> None:
    chance = world.random
    steps = chance.choice((None, *(chance.randint(1, most) for most in (15, 60, 200))))
    await world.start(name, steps, chance.choice((0.0, 0.0, 0.02, 0.1)))


def _harm_disk(world: World, path: Path) -> None:
    if world.random.random() < 0.5:
        world.disk.wipe(path)
    else:
        world.disk.lose_tail(path, world.random.randint(1, 6))


def _keepers(world: World, life: Life) -> Iterator[tuple[str, int, Any]]:
    for kind in SOURCES:
        for p in range(1 if kind == "learner" else world.partitions):
            yield kind, p, life.worker.open_keeper(kind, p)


def _last(world: World, kind: str, p: int) -> dict[str, int]:
    """Offset of the last record of each source."""
    logs = {name: world.logs[TP(world.topic(name), p)] for name in SOURCES[kind]}
    return {name: log.records[-1].offset if log.records else -1 for name, log in logs.items()}


def _has_all(world: World, life: Life) -> bool:
    """Applied and flushed, all of it."""
    for kind, p, keeper in _keepers(world, life):
        if keeper is None or keeper.partition._under_way or dict(keeper.partition.applied) != _last(world, kind, p):
            return False
        if keeper.partition._repair:
            return False
        if kind == "learner" and keeper.learner.learner.pending_ts < life.worker.now():
            return False  # an item waits for a time that has come
        if kind == "users" and (keeper.partition.owes_purge() or keeper.partition.names_deleted):
            return False
    for name, _, _ in world.erasures():
        told = life.worker.book.get(name)
        if told is None or not told.is_complete:
            return False
    return life.worker.replica_applied == _last(world, "learner", 0)["examples"]


def _standing(world: World, life: Life) -> str:
    """How far the last worker has come, and what it waits for."""
    told = [f"killed at {life.last_step}" if life.killed else f"alive, replica at {life.worker.replica_applied}"]
    for kind, p, keeper in _keepers(world, life):
        if keeper is None:
            told.append(f"{kind} {p} not open")
        else:
            partition = keeper.partition
            told.append(
                f"{kind} {p} at {dict(partition._meta.applied)} of {_last(world, kind, p)}, "
                f"{len(partition._under_way)} flushes under way, sweep {partition._sweep_from!r}, "
                f"{len(keeper.inbox)} wait"
            )
    told += [f"{name} {life.worker.book.get(name)}" for name, _, _ in world.erasures()]
    return "; ".join(told)


# -- what must hold


async def check(world: World, last: Life) -> None:
    """Raises AssertionError unless everything that the last worker has is that of an undisturbed run."""
    found = _examples(world)
    for kind, p, keeper in _keepers(world, last):
        applied, rows = keeper.partition.snapshot()
        rows = dict(rows)
        where = f"{kind} {p}"
        assert applied == _last(world, kind, p), where
        assert _restored(world, kind, p) == (rows, applied), f"{where}: the changelog as compacted and truncated"
        if kind == "users":
            truth, told = await _undisturbed_users(world, p, applied)
            _same(truth, rows, where)
            _same(told, found.get(p, {}), f"{where}: examples")
        elif kind == "catalogue":
            store = MemoryDisk().open(Path("truth"))
            await rebuild.catalogue_rows(world_read(world), p, applied["items"], store, _reader(world, "items", p))
            store.write(_starts(world, "items", p).row())
            _same(dict(store.items()), rows, where)
        else:
            learner = ItemLearner(world.settings.learner_config(TEXT_DIM), TEXT_DIM, world.encoder_at(0).name)
            learner = await rebuild.learn_examples(world_read(world), learner, applied["examples"])
            assert learner.learner.digest() == keeper.learner.learner.digest(), "item state"
            assert last.worker.replica.digest() == learner.learner.digest(), "replica"
    _check_letters(world)
    await _check_erasures(world, last)


async def _check_erasures(world: World, last: Life) -> None:
    """Every erasure has its certificate, what that tells is so, and the learner leaves out just what it should."""
    unlearnt: defaultdict[int, set[int]] = defaultdict(set)
    for name, user, is_unlearnt in world.erasures():
        told, place, key = last.worker.book.get(name), place_of(name), user.encode()
        assert told is not None and told.state is not None and told.changelog is not None and place is not None, name
        p, offset = place
        earlier = [r.offset for r in world.logs[TP("erasures", p)].records if r.offset < offset]
        before = {**told.state.place, "erasures": max(earlier, default=-1)}
        rows = await _rows_at(world, p, before, user)
        row = user_rows.unpack(rows[key]) if key in rows else user_rows.UserRow()
        held = told.state.events, told.state.behaviours, told.state.comments
        assert held == (row.events, row.history_count, row.comment_count), f"{name}: {held}"
        if told.state.applied is not None:
            rows = await _rows_at(world, p, told.state.applied)
            assert digest(sorted(rows.items()), told.state.applied) == told.state.digest, f"{name}: digest"
        if is_unlearnt:
            assert told.model is not None, name
            assert told.model.exact or "adapter" in (told.model.reason or ""), f"{name}: {told.model}"
            for topic in ("clicks", "comments"):
                for record in world.logs[TP(topic, p)].records:
                    if record.key == key and record.offset <= told.state.place[topic]:
                        unlearnt[p].add(user_rows.position(examples.TOPICS.index(topic), record.offset))
    keeper: Any = last.worker.keepers["learner", 0]
    removed = keeper.learner.removed
    assert {p: set(at.tolist()) for p, at in removed.items()} == {p: at for p, at in unlearnt.items() if at}
    _check_disks(world)
    _check_changelogs(world)


def _erased(world: World) -> Iterator[tuple[str, bytes, int]]:
    """(erasure, key, partition) of users who were erased and have not come back."""
    restored = {p: _restored(world, "users", p)[0] for p in range(world.partitions)}
    for name, user, _ in world.erasures():
        p, _ = place_of(name) or (0, 0)
        if user.encode() not in restored[p]:
            yield name, user.encode(), p


def _check_changelogs(world: World) -> None:
    """None names an erased user, but by records behind the newest owner's last: those nobody has seen yet."""
    for name, key, p in _erased(world):
        records = world.logs[TP(world.settings.internal_topic(CHANGELOGS["users"]), p)].records
        epochs = [-1 if found is None else found.epoch for found in map(parse, records)]
        seen = len(epochs) - epochs[::-1].index(max(epochs)) if epochs else 0
        naming = sum(row_key_of(record) == key for record in records[:seen])
        assert not (naming and world.deletes), f"{name}: {naming} records of the changelog name the user"


def _check_disks(world: World) -> None:
    """No store of a living worker names an erased user."""
    for name, key, p in _erased(world):
        for path, contents in world.disk.contents.items():
            if path.name == f"users-{p}" and world.alive(path.parent.name) is not None:
                assert key not in contents[-1].rows.keys() | contents[-1].deleted, f"{name}: {path} names the user"


def world_read(world: World) -> rebuild.Read:
    """The world's logs, for streams.rebuild."""

    async def read(name: str, partition: int, start: int, stop: int) -> AsyncIterator[Sequence[Any]]:
        yield world.logs[TP(world.topic(name), partition)].at(start, 1 << 30, stop)

    return read


async def _rows_at(world: World, p: int, applied: Mapping[str, int], user: str | None = None) -> dict[bytes, bytes]:
    """Of one run over the logs up to `applied`."""
    store = MemoryDisk().open(Path("truth"))
    evidence = world.settings.evidence_config()
    reader = _reader(world, "comments", p)
    await rebuild.user_rows(world_read(world), p, applied, store, reader, evidence, only=user)
    store.write(_starts(world, "comments", p).until(applied["comments"] + 1).row())
    return dict(store.items())


def _starts(world: World, topic: str, p: int) -> Starts:
    """From which offset on an encoder reads a partition's texts: behind the first mark of its number."""
    starts = Starts()
    for record in world.logs[TP(topic, p)].records:
        if record.key is not None and record.key.startswith(MARK):
            starts = starts.then(json.loads(record.value)["number"], record.offset + 1)
    return starts


def _reader(world: World, topic: str, p: int) -> Callable[[int], Any]:
    """Which encoder reads a partition's text at an offset."""
    starts = _starts(world, topic, p)
    return lambda offset: world.encoder_at(starts.number_at(offset))


async def _undisturbed_users(
    world: World, p: int, applied: Mapping[str, int]
) -> tuple[dict[bytes, bytes], dict[int, bytes]]:
    """(rows, examples by position) of one run over the whole logs."""
    store = MemoryDisk().open(Path("truth"))
    messages: list[bytes] = []
    await rebuild.user_rows(
        world_read(world),
        p,
        applied,
        store,
        _reader(world, "comments", p),
        world.settings.evidence_config(),
        messages=messages,
    )
    store.write(_starts(world, "comments", p).row())
    return dict(store.items()), {at: example for m in messages for at, example in _parted(m)}


def _examples(world: World) -> dict[int, dict[int, bytes]]:
    """{partition: {position: example}} of the examples log as its reader takes them: repeats dropped by offset."""
    found: dict[int, dict[int, bytes]] = defaultdict(dict)
    highest: dict[tuple[int, int], int] = {}
    for record in world.logs[TP(world.topic("examples"), 0)].records:
        kind, p, _ = examples.read_header(record.value)
        if kind != examples.KIND_EXAMPLES:
            continue
        for position, example in _parted(record.value):
            topic, offset = position >> 56, position & (1 << 56) - 1
            if offset > highest.get((p, topic), -1):
                highest[p, topic] = offset
                found[p][position] = example
    return found


def _parted(message: bytes) -> Iterator[tuple[int, bytes]]:
    """(source position, bytes) of each example of a message (docs/data.md)."""
    _, _, count = examples.read_header(message)
    at = examples.HEADER.size
    for _ in range(count):
        _, _, position, _, history, flags, _, _ = examples.EXAMPLE.unpack_from(message, at)
        end = at + examples.EXAMPLE.size + 16 * history
        if flags & examples.FLAG_TEXT:
            end += examples.TEXT.size + TEXT_DIM
        if flags & examples.FLAG_RANKED:
            end += examples.COUNT.size + 8 * examples.COUNT.unpack_from(message, end)[0]
        yield position, message[at:end]
        at = end


def _restored(world: World, kind: str, p: int) -> tuple[dict[bytes, bytes], dict[str, int]]:
    tp = TP(world.settings.internal_topic(CHANGELOGS[kind]), p)
    log = world.logs[tp]
    told = world.restored.get(tp)
    if told is None or told[0] != (log.end, len(log.records)):
        told = world.restored[tp] = (log.end, len(log.records)), _read(log)
    return told[1]


def _read(log: Log) -> tuple[dict[bytes, bytes], dict[str, int]]:
    reader = Reader()
    rows: dict[bytes, bytes] = {}
    for record in log.records:
        accepted = reader.feed(record)
        for key, row in accepted.rows.items() if accepted is not None else ():
            if row is None:
                rows.pop(key, None)
            else:
                rows[key] = row
    return rows, reader.applied


def _same(truth: Mapping[Any, bytes], found: Mapping[Any, bytes], where: str) -> None:
    wrong = sorted(key for key in truth.keys() | found.keys() if truth.get(key) != found.get(key))
    assert not wrong, f"{where}: {len(wrong)} of {len(truth)} differ from the undisturbed run's: {wrong[:5]}"


def _check_letters(world: World) -> None:
    """Every poison message lies in its dead-letter log byte for byte, and nothing else does."""
    letters = {
        (topic, dict(r.headers)["__streams.errors.partition"], dict(r.headers)["__streams.errors.offset"], r.value)
        for topic in ("clicks", "comments", "erasures", "items")
        for r in world.logs[TP(f"{topic}.dlq", 0)].records
    }
    sent = {(r.topic, b"%d" % r.partition, b"%d" % r.offset, r.value) for r in world.poison}
    assert letters == sent, f"dead letters: {len(letters)} of {len(sent)}"


def run_seed(seed: int, make: MakePartition = Partition, story: Story | None = None) -> World:
    """One world, with the story of a seed or another. Raises AssertionError where a promise is broken."""
    world = World(seed, make)
    chance = world.random
    with ExitStack() as stack:
        for target, told in (
            ("streams.worker", {
                "kafka": SimKafka(world), "Metrics": _metrics, "RocksDisk": lambda **_: LifeDisk(LIFE.get()),
                "Partition": world.make_partition, "os": _System, "log": _Silent(), "RESUME_INTERVAL_S": 0.5,
                "OBSERVE_INTERVAL_S": OBSERVE_S,
            }),
            ("streams.agents", {"INBOX_RECORDS_MAX": chance.choice((6, 20_000)), "INBOX_RECORDS_LOW": 3,
                                "BATCH_EVENTS_MAX": chance.choice((3, 1000)), "SWEEP_IDLE_S": SWEEP_S,
                                "log": _Silent()}),
            ("streams.erasure", {"kafka": SimKafka(world), "SWEEP_ROWS": chance.choice((2, 500)), "log": _Silent()}),
            ("streams.kafka", {"log": _Silent()}),
            ("streams.space", {"kafka": SimKafka(world)}),
            ("streams.telemetry.Telemetry", {"publish": lambda *_: None}),  # figures for nobody
            ("streams.announced.Announced", {"follow": _follow_nothing}),  # of checkpoints, which no state knows
            ("state.rows", {"HISTORY_MAX": 5, "SEEN_MAX": 8, "COMMENTS_MAX": 2}),
            ("model.learner", {"DENSE_FLOATS_MAX": 10_000}),
            ("model.items", {"CAPACITY_START": 16}),
            ("state.partition", {
                "new_store_id": world.new_store_id,
                "INLINE_ROWS_MAX": chance.choice((0, 3, 1000)),
                "RESTORE_BYTES_MAX": chance.choice((1, 2000, 4 << 20)),
                "RESTORE_META_BYTES": chance.choice((1, 10_000, 64 << 20)),
                "MARKER_SLOT_BYTES": chance.choice((1, 20_000, 16 << 20)),
            }),
        ):  # fmt: skip
            stack.enter_context(patch.multiple(target, **told))
        with asyncio.Runner(loop_factory=lambda: world.loop) as runner:
            runner.run((story or _story)(world))
    return world
