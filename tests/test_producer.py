"""The producer's group commit, over a producer of aiokafka's shape whose acknowledgements the test gives."""

import asyncio
from typing import Any, NamedTuple

import pytest
from aiokafka.errors import KafkaError

from streams import kafka
from streams.kafka import Producer

BATCH_RECORDS = 4


class _Batch:
    def __init__(self) -> None:
        self.records: list[tuple[bytes | None, bytes | None]] = []

    def append(self, *, key: bytes | None, value: bytes | None, timestamp: int | None) -> object | None:
        if len(self.records) == BATCH_RECORDS or len(value or b"") > kafka.BATCH_BYTES_MAX:
            return None
        self.records.append((key, value))
        return object()

    def close(self) -> None:
        assert self.records


class _Sent(NamedTuple):
    offset: int


class _Broker:
    """One log a partition; `acks` holds the futures of batches that are not acknowledged yet."""

    def __init__(self) -> None:
        self.logs: dict[tuple[str, int], list[bytes | None]] = {}
        self.batches: list[int] = []
        self.acks: asyncio.Queue[tuple[asyncio.Future[_Sent], tuple[str, int], _Batch]] = asyncio.Queue()

    def create_batch(self) -> _Batch:
        return _Batch()

    async def send_batch(self, batch: _Batch, topic: str, *, partition: int) -> asyncio.Future[_Sent]:
        ack: asyncio.Future[_Sent] = asyncio.get_running_loop().create_future()
        self.acks.put_nowait((ack, (topic, partition), batch))
        return ack

    async def acknowledge(self) -> int:
        """The next batch that waits; how many records it has."""
        ack, place, batch = await asyncio.wait_for(self.acks.get(), 5)
        log = self.logs.setdefault(place, [])
        ack.set_result(_Sent(len(log)))
        log += [value for _, value in batch.records]
        return len(batch.records)

    async def fail(self) -> None:
        ack, _, _ = await asyncio.wait_for(self.acks.get(), 5)
        ack.set_exception(KafkaError("no"))


def _producer() -> tuple[Producer, _Broker]:
    producer, broker = Producer({}), _Broker()
    producer._producer = broker
    return producer, broker


def _records(name: str, count: int) -> list[tuple[Any, Any]]:
    return [(b"k", f"{name}{n}".encode()) for n in range(count)]


def _send(producer: Producer, name: str, count: int, partition: int = 0) -> asyncio.Task[int]:
    return asyncio.create_task(producer.send("t", partition, _records(name, count)))


async def test_what_waits_goes_out_together_and_each_learns_its_last_offset() -> None:
    producer, broker = _producer()
    first = _send(producer, "a", 1)
    await asyncio.sleep(0)
    others = [_send(producer, name, 1) for name in "bcd"]
    assert await broker.acknowledge() == 1
    assert await broker.acknowledge() == 3
    assert [await first, *[await other for other in others]] == [0, 1, 2, 3]
    assert broker.logs["t", 0] == [b"a0", b"b0", b"c0", b"d0"]


async def test_a_call_larger_than_a_batch_stays_in_order_and_the_next_one_shares_its_last_batch() -> None:
    producer, broker = _producer()
    large, small = _send(producer, "a", 6), _send(producer, "b", 1)
    assert await broker.acknowledge() == BATCH_RECORDS
    assert not large.done()
    assert await broker.acknowledge() == 3
    assert (await large, await small) == (5, 6)
    assert broker.logs["t", 0] == [*[b"a%d" % n for n in range(6)], b"b0"]


async def test_a_failed_batch_fails_its_calls_whole_and_no_other() -> None:
    producer, broker = _producer()
    large, shared = _send(producer, "a", 6), _send(producer, "b", 1)
    assert await broker.acknowledge() == BATCH_RECORDS
    await broker.fail()
    for call in (large, shared):
        with pytest.raises(KafkaError):
            await call
    after = _send(producer, "c", 1)
    assert await broker.acknowledge() == 1
    assert await after == BATCH_RECORDS
    assert broker.logs["t", 0] == [b"a0", b"a1", b"a2", b"a3", b"c0"], "a prefix of the failed call, nothing behind it"


async def test_partitions_do_not_wait_for_each_other() -> None:
    producer, broker = _producer()
    calls = [_send(producer, "a", 1, partition) for partition in (0, 1)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert broker.acks.qsize() == 2
    await broker.acknowledge()
    await broker.acknowledge()
    assert [await call for call in calls] == [0, 0]


async def test_a_record_larger_than_a_batch_is_refused_and_the_rest_goes_on() -> None:
    producer, broker = _producer()
    large = asyncio.create_task(producer.send("t", 0, [(b"k", b"x" * (kafka.BATCH_BYTES_MAX + 1))]))
    small = _send(producer, "b", 1)
    with pytest.raises(ValueError, match="exceeds a batch"):
        await large
    assert await broker.acknowledge() == 1
    assert await small == 0


async def test_a_call_that_is_given_up_leaves_the_others_alone() -> None:
    producer, broker = _producer()
    given_up, other = _send(producer, "a", 1), _send(producer, "b", 1)
    await asyncio.sleep(0)
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)
    await broker.acknowledge()
    assert await asyncio.wait_for(other, 5) == broker.logs["t", 0].index(b"b0")
