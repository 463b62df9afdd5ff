"""One worker process that drains what the topics hold, under Faust or under a plain consumer loop: the same keepers,
stores, learner and replica. Prints "ready" when the items are learnt, or at once where events are known to its disk,
and one JSON line when the events behind those are learnt.

    python -m bench.drain VIA ITEMS KNOWN EVENTS...     with the worker's settings in the environment
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import uvloop
from aiokafka import AIOKafkaConsumer, TopicPartition

from bench import load
from model.learner import warm_up
from streams import app as faust_app
from streams import kafka, log
from streams.agents import CatalogueKeeper, LearnerKeeper, UserKeeper
from streams.assignor import CopartitionedAssignor
from streams.settings import Settings
from streams.worker import LEARNER_PARTITION, TP, Worker

F4 = npt.NDArray[np.float32]
POLL_S: Final = 0.01
TEXT_DIM: Final = 384


class PlainVectors:
    """Stands for the encoder where every item brings its vector: nothing is encoded."""

    dim = TEXT_DIM
    name = "plain-vectors"

    def encode(self, texts: Sequence[str]) -> F4:
        """No text is expected."""
        raise AssertionError("this benchmark publishes vectors only")

    def __init__(self) -> None:
        square = np.random.default_rng(11).standard_normal((TEXT_DIM, load.VECTOR_DIM))
        self._widen = np.linalg.qr(square)[0].T.astype(np.float32)

    def project(self, vector: Any) -> F4:
        """The vector in TEXT_DIM dimensions, at unit length."""
        wide: F4 = np.asarray(vector, np.float32) @ self._widen
        return wide / np.linalg.norm(wide)

    def combine(self, text_vector: F4, plain_vector: F4) -> F4:
        """Not reached."""
        raise AssertionError("this benchmark publishes vectors only")


class PlainSource:
    """A consumer loop as plain as can be: all partitions, no group, no Faust."""

    def __init__(self, settings: Settings) -> None:
        self._options = settings.kafka_options()
        self.consumer: Any = None
        self.tps: set[TP] = set()
        self.paused: set[TP] = set()

    def assignment(self) -> Iterable[TP]:
        """All partitions."""
        return self.tps

    def generation(self) -> int:
        """There is one."""
        return 1

    async def seek(self, targets: Mapping[TP, int]) -> None:
        """Reads on from these offsets."""
        for tp, offset in targets.items():
            self.consumer.seek(TopicPartition(*tp), offset)

    def pause(self, tps: Iterable[TP]) -> None:
        """No more of these for now."""
        self.paused.update(tps)

    def resume(self, tps: Iterable[TP]) -> None:
        """More of these again."""
        self.paused.difference_update(tps)

    async def commit(self, offsets: Mapping[TP, int]) -> bool:
        """Without a group there is nothing to commit to."""
        return True

    def end_of(self, topic: str, partition: int) -> int | None:
        """As the last fetch told."""
        try:
            high = self.consumer.highwater(TopicPartition(topic, partition))
            stable = self.consumer.last_stable_offset(TopicPartition(topic, partition))
        except AssertionError:
            return None
        if high is None:
            return None
        return int(high if stable is None or stable < 0 else min(high, stable))

    def heard_at(self, topic: str, partition: int) -> float | None:
        """When that was."""
        try:
            told_ms = self.consumer.last_poll_timestamp(TopicPartition(topic, partition))
        except AssertionError:
            return None
        return None if told_ms is None else told_ms / 1e3

    async def run(self, worker: Worker) -> None:
        """Starts everything and hands records over for ever."""
        self.consumer = AIOKafkaConsumer(
            **self._options, group_id=None, enable_auto_commit=False, fetch_max_wait_ms=faust_app.FETCH_WAIT_MS,
            max_partition_fetch_bytes=kafka.FETCH_BYTES_MAX, isolation_level="read_committed",
        )  # fmt: skip
        await worker.start()
        await self.consumer.start()
        self.tps = {
            TP(topic, partition)
            for topic in worker.topic_kinds
            for partition in range(await worker.producer.partitions(topic))
        }
        self.consumer.assign([TopicPartition(*tp) for tp in self.tps])
        worker.assigned(self.tps)
        await asyncio.wait(worker.opening.values())
        await worker.seek(self.tps)
        size = faust_app.SLICE_RECORDS_MAX
        while True:
            active = [TopicPartition(*tp) for tp in self.tps - self.paused]
            fetched = await self.consumer.getmany(*active, timeout_ms=faust_app.FETCH_WAIT_MS)
            for tp, records in fetched.items():
                for at in range(0, len(records), size):
                    await worker.offer(tp.topic, tp.partition, records[at : at + size])


async def watch(worker: Worker, events: int, items: int, known: int) -> dict[str, Any]:
    """Waits until all events are applied and learnt; the time counts from the first that is folded."""
    started, cpu, stages = time.perf_counter(), time.process_time(), dict(worker.telemetry.stage_s)
    while worker.telemetry.stage_s.get("fold") == stages.get("fold"):
        started, cpu = time.perf_counter(), time.process_time()
        await asyncio.sleep(POLL_S)
    while count(worker, UserKeeper) < known + events:
        await asyncio.sleep(POLL_S)
    users_s = time.perf_counter() - started
    topic = worker.settings.internal_topic("examples")
    end = await kafka.log_end(worker.options, topic, LEARNER_PARTITION)
    while learner(worker).offset + 1 < end:
        await asyncio.sleep(POLL_S)
    seconds = time.perf_counter() - started
    cpu = time.process_time() - cpu
    spent = {name: total - stages.get(name, 0.0) for name, total in worker.telemetry.stage_s.items()}
    return {
        "events": events, "items": items, "seconds": seconds, "events_per_s": events / seconds,
        "user_events_per_s": events / users_s, "cpu_us_per_event": cpu / events * 1e6,
        "examples": learner(worker).counts["examples"], "messages": learner(worker).counts["messages"],
        "stage_us_per_event": {name: s / events * 1e6 for name, s in spent.items()},
    }  # fmt: skip


def count(worker: Worker, kind: type[Any]) -> int:
    """Records applied by the keepers of a kind."""
    return sum(
        sum(offset + 1 for offset in keeper.applied().values())
        for keeper in worker.keepers.values()
        if isinstance(keeper, kind)
    )


def learner(worker: Worker) -> LearnerKeeper:
    """The learner's keeper, once it is there."""
    keeper = worker.keepers.get(("learner", LEARNER_PARTITION))
    assert isinstance(keeper, LearnerKeeper)
    return keeper


def has_learnt(worker: Worker, items: int) -> bool:
    """Whether its learner is there and knows so many."""
    is_open = worker.open_keeper("learner", LEARNER_PARTITION) is not None
    return is_open and count(worker, CatalogueKeeper) >= items and learner(worker).counts["items"] >= items


async def measure(worker: Worker, items: int, known: int, *events: int) -> None:
    """Prints the result of each backlog in turn and ends the process: what comes then is not the benchmark's."""
    while not known and not has_learnt(worker, items):
        await asyncio.sleep(POLL_S)
    print("ready", flush=True)
    for count_of_next in events:
        print(json.dumps(await watch(worker, count_of_next, items, known)), flush=True)
        known += count_of_next
    os._exit(0)


def main(via: str, items: int, known: int, *events: int) -> None:
    """Runs the worker `via` "faust" or "plain"; events: of each backlog."""
    log.set_up("warning")
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    settings = Settings()
    vectors = PlainVectors()
    warm_up(settings.learner_config(vectors.dim))
    if via == "plain":
        plain = PlainSource(settings)
        worker = Worker(settings, time.time, vectors, plain, lambda topic, partition: None)
        faust_app.tune_interpreter()

        async def both() -> None:
            await asyncio.gather(plain.run(worker), measure(worker, items, known, *events))

        asyncio.run(both())
        return
    source = faust_app.FaustSource()
    assignor = CopartitionedAssignor("")
    worker = Worker(settings, time.time, vectors, source, assignor.owner_of)
    app = faust_app.build(settings, worker, source, assignor)

    @app.task
    async def measuring() -> None:
        await measure(worker, items, known, *events)

    faust_app.tune_interpreter()
    faust_app.FaustWorker(app).execute_from_commandline()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
