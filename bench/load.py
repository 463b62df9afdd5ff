"""A synthetic stream for load: Zipf items in clusters, users uniform, one event in four a rating."""

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from bench.deployment import READY_S_MAX, Deployment, WorkerProcess
from streams import kafka
from streams.settings import Settings

CLUSTER_ITEMS: Final = 500
VECTOR_DIM: Final = 16  # widened by the worker; keeps the messages of 100,000 items small
PUBLISH_RECORDS: Final = 8000
LINGER_S: Final = 0.01  # between two sends of a producer that keeps a rate


class Stream:
    """Endless events of `users` users on `items` items, a function of the seed."""

    def __init__(self, items: int, users: int, seed: int = 1) -> None:
        self._random = np.random.default_rng(seed)
        self.items, self.users = items, users
        popularity = 1 / np.arange(1, items + 1) ** 0.9
        self._cumulated = np.cumsum(popularity) / popularity.sum()
        self._order = np.random.default_rng(5).permutation(items)
        self._clusters = max(1, items // CLUSTER_ITEMS)
        self._number = 0
        self._drawn: deque[tuple[bytes, bytes]] = deque()

    def prepare(self, count: int) -> None:
        """Draws the next events now, so that `take` costs next to nothing while somebody measures."""
        draw = self._random
        users = draw.integers(0, self.users, count)
        world = self._order[np.minimum(self.items - 1, np.searchsorted(self._cumulated, draw.random(count)))]
        cluster = (users * 7 + draw.integers(0, 3, count)) % self._clusters
        near = (cluster + self._clusters * (CLUSTER_ITEMS * draw.random(count) ** 3).astype(np.int64)) % self.items
        items = np.where(draw.random(count) < 0.5, world, near)
        kinds = draw.random(count)
        start, self._number = self._number, self._number + count
        self._drawn.extend(
            (b"u%d" % user, _event(start + n, user, item, kind))
            for n, (user, item, kind) in enumerate(zip(users.tolist(), items.tolist(), kinds.tolist(), strict=True))
        )

    def take(self, count: int, ts: float) -> list[tuple[bytes, bytes]]:
        """(key, value) of the next events, all at `ts`."""
        if len(self._drawn) < count:
            self.prepare(count - len(self._drawn))
        end = b',"ts":%.4f}' % ts
        return [(key, head + end) for key, head in (self._drawn.popleft() for _ in range(count))]


def _event(number: int, user: int, item: int, kind: float) -> bytes:
    """An event but for its time."""
    action = b'"click"' if kind < 0.75 else b'"rating","value":2' if kind < 0.88 else b'"rating","value":5'
    return b'{"event_id":"e%d","user_id":"u%d","item_id":"i%d","action":%s' % (number, user, item, action)


def item_records(count: int) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) of the catalogue: items that bring a plain vector, so that nothing is encoded."""
    vectors: npt.NDArray[Any] = np.random.default_rng(3).standard_normal((count, VECTOR_DIM)).round(3)
    for n, vector in enumerate(vectors.tolist()):
        yield b"i%d" % n, json.dumps({"item_id": f"i{n}", "text": "", "vector": vector}).encode()


_partition_of = lru_cache(1 << 17)(kafka.partition_of)


async def publish(producer: kafka.Producer, settings: Settings, topic: str, records: list[tuple[bytes, bytes]]) -> None:
    """Appends records to their keys' partitions, all acknowledged."""
    parts: dict[int, list[tuple[bytes | None, bytes | None]]] = {}
    for record in records:
        parts.setdefault(_partition_of(record[0], settings.partitions), []).append(record)
    await asyncio.gather(*(producer.send(settings.topic(topic), p, part) for p, part in parts.items()))


async def publish_items(settings: Settings, count: int) -> None:
    """The whole catalogue."""
    producer = kafka.Producer(settings.kafka_options())
    await producer.start()
    try:
        batch: list[tuple[bytes, bytes]] = []
        for record in item_records(count):
            batch.append(record)
            if len(batch) == PUBLISH_RECORDS:
                await publish(producer, settings, "items", batch)
                batch = []
        if batch:
            await publish(producer, settings, "items", batch)
    finally:
        await producer.stop()


def start_with_catalogue(deployment: Deployment, items: int, seconds_max: float = READY_S_MAX) -> WorkerProcess:
    """A worker on new topics, ready, with the whole catalogue learnt and in its replica."""
    deployment.create_topics()
    asyncio.run(publish_items(deployment.settings, items))
    worker = deployment.start_worker()
    worker.wait_ready()
    worker.wait_until("the catalogue", lambda: worker.get("/v1/model")["replica"]["active"] >= items, seconds_max)
    return worker


async def publish_events(
    settings: Settings, stream: Stream, count: int, rate: float = 0.0, published: Callable[[int], None] | None = None,
    lag_s: float = 0.0,
) -> None:  # fmt: skip
    """`count` events, as fast as it goes or at `rate` a second, every LINGER_S; their `ts` is when they were sent, or
    spread over the `lag_s` before."""
    producer = kafka.Producer(settings.kafka_options())
    await producer.start()
    try:
        done, ticks, started = 0, 0, time.monotonic()
        while done < count:
            if rate:
                ticks = max(ticks + 1, int((time.monotonic() - started) / LINGER_S))  # late: what is due, at once
                await asyncio.sleep(started + ticks * LINGER_S - time.monotonic())
            due = count if not rate else min(count, int((time.monotonic() - started) * rate))
            size = min(PUBLISH_RECORDS, due - done)
            if size > 0:
                await publish(producer, settings, "clicks", stream.take(size, time.time() - lag_s * (1 - done / count)))
                done += size
                if published is not None:
                    published(done)
    finally:
        await producer.stop()
