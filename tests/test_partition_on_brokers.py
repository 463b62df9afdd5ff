"""The partition's promises through streams.kafka, on every broker that is here."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.structs import TopicPartition

from bench import chaos
from bench.kafka_node import KafkaNode
from state.changelog import LogRecord, Reader
from state.partition import Fenced, Partition, PartitionFailedError, digest
from state.store import RocksDisk
from streams import kafka, topics
from streams.kafka import ChangelogTopic, Producer
from streams.settings import Settings

MakeSettings = Callable[..., Settings]


class KilledError(BaseException):
    """The process ends here."""


class Workers:
    """Partitions over one changelog topic; each folder is a worker's disk."""

    def __init__(self, settings: Settings, producer: Producer, folder: Path) -> None:
        self.settings, self.producer, self.folder = settings, producer, folder
        self.disk = RocksDisk()
        self.out: list[bytes] = []
        self.log = ChangelogTopic(settings.internal_topic("users-changelog"), 1, producer, settings.kafka_options())

    def partition(self, worker: str, **more: Any) -> Partition:
        async def publish(records: list[tuple[bytes, bytes]]) -> None:
            await self.producer.send(self.settings.internal_topic("examples"), 0, records)
            self.out.extend(value for _, value in records)

        return Partition(
            path=self.folder / worker, changelog=self.log, publish=publish, sources=("clicks",), disk=self.disk, **more
        )

    async def rows(self, stop: int) -> dict[bytes, bytes]:
        """Rows that the changelog tells up to offset `stop`."""
        reader, rows = Reader(), dict[bytes, bytes]()
        async for batch in self.log.read(0, stop):
            for record in batch:
                accepted = reader.feed(record)
                for key, row in accepted.rows.items() if accepted else ():
                    if row is None:
                        rows.pop(key, None)
                    else:
                        rows[key] = row
        return rows


@asynccontextmanager
async def running(settings: Settings, folder: Path) -> AsyncIterator[Workers]:
    """Topics and a producer for workers."""
    topics.ensure(settings)
    producer = Producer(settings.kafka_options())
    await producer.start()
    try:
        yield Workers(settings, producer, folder)
    finally:
        await producer.stop()


@pytest.fixture
async def workers(broker: str, make_settings: MakeSettings, tmp_path: Path) -> AsyncIterator[Workers]:
    async with running(make_settings(broker=broker), tmp_path) as started:
        yield started


def digest_after(last: int) -> str:
    """Of the state after `add` of 0 to `last`."""
    rows = {b"u%d" % (number % 7): b"%d" % number for number in range(last + 1)}
    rows.update({b"n%d" % number: b"x" for number in range(last + 1)})
    return digest(sorted(rows.items()), {"clicks": last})


async def add(partition: Partition, first: int, count: int) -> None:
    for number in range(first, first + count):
        rows: dict[bytes, bytes | None] = {b"u%d" % (number % 7): b"%d" % number, b"gone": None, b"n%d" % number: b"x"}
        await partition.flush(rows, [(b"k", b"%d" % number)], {"clicks": number})
    await partition.drain()


async def test_state_moves_between_workers_and_large_flushes_arrive(workers: Workers) -> None:
    first = workers.partition("first")
    assert (await first.open()).kind == "fresh"
    await add(first, 0, 20)
    large: dict[bytes, bytes | None] = {b"large%d" % n: bytes(3000) for n in range(1500)}
    await first.flush(large, [], {"clicks": 20})
    await first.drain()
    expected = first.digest()
    await first.close()
    second = workers.partition("second")
    report = await second.open()
    assert (report.kind, report.base, report.applied) == ("fresh", (1, 22), {"clicks": 20})
    assert second.digest() == expected
    await add(second, 21, 5)
    expected = second.digest()
    while await second.sweep():
        pass
    await second.drain()
    await second.close()
    report = await first.open()
    assert report.kind == "catchup"
    assert first.digest() == expected
    assert await workers.rows(await workers.log.append([(b"R" + bytes(9), None)])) == dict(first.items())
    assert workers.out == [b"%d" % n for n in (*range(20), *range(21, 26))]
    await first.close()


async def test_zombie_is_fenced_and_changes_nothing(workers: Workers) -> None:
    zombie, owner = workers.partition("zombie"), workers.partition("owner")
    await zombie.open()
    await add(zombie, 0, 5)
    await owner.open()
    with pytest.raises(Fenced):
        await add(zombie, 5, 5)
    await zombie.close()
    await add(owner, 5, 10)
    expected = owner.digest()
    await owner.close()
    assert (await zombie.open()).kind == "discard"
    assert zombie.digest() == expected
    await zombie.close()


@pytest.mark.parametrize("step", ["write", "publish", "rows", "marker", "commit"])
async def test_killed_worker_leaves_nothing_half_done(workers: Workers, step: str) -> None:
    left = [4]

    def crash(name: str) -> None:
        left[0] -= name == step
        if left[0] <= 0:
            raise KilledError

    killed = workers.partition("worker", crash=crash)
    await killed.open()
    with pytest.raises((KilledError, PartitionFailedError)):
        await add(killed, 0, 20)
    await killed.close()
    again, other = workers.partition("worker"), workers.partition("other")
    assert (await again.open()).kind == "same"
    at = again.applied["clicks"]
    assert at >= 2
    await add(again, at + 1, 3)
    await again.close()
    await other.open()
    assert other.applied == {"clicks": at + 3}
    assert other.digest() == digest_after(at + 3)
    assert [int(n) for n in dict.fromkeys(workers.out)] == list(range(at + 4))
    await other.close()


async def test_a_batch_that_a_retry_doubles_counts_once(make_settings: MakeSettings, tmp_path: Path) -> None:
    """Its answer is lost, the connection ends, and a producer that is not idempotent sends it once more."""
    with chaos.site_of("embedded", tmp_path) as site:
        (proxy,) = site.proxies
        async with running(make_settings(broker=site.workers_address), tmp_path) as workers:
            armed: list[str] = []

            def crash(step: str) -> None:
                if armed == [step]:  # before rows and marker go to the changelog
                    proxy.lose_answers()
                    armed.clear()

            partition, other = workers.partition("one", crash=crash), workers.partition("other")
            await partition.open()
            await add(partition, 0, 3)
            assert not workers.producer.idempotent
            armed.append("publish")
            more = asyncio.create_task(add(partition, 3, 2))
            async with asyncio.timeout(30):
                while not proxy.answers_lost:
                    await asyncio.sleep(0.01)
            proxy.cut(silently=False)
            proxy.mend()
            await more
            end = await workers.log.append([(b"R" + bytes(9), None)])
            records = [r async for batch in workers.log.read(0, end) for r in batch]
            assert len({(r.key, r.value) for r in records}) < len(records), "nothing came twice"
            await other.open()
            assert other.digest() == partition.digest() == digest_after(4)
            assert [int(n) for n in dict.fromkeys(workers.out)] == list(range(5))
            await other.close()
            await partition.close()


async def test_swept_head_is_deleted_from_a_real_log(
    kafka_node: KafkaNode, make_settings: MakeSettings, tmp_path: Path
) -> None:
    async with running(make_settings(broker=kafka_node.address), tmp_path) as workers:
        old, owner = workers.partition("old"), workers.partition("owner")
        await old.open()
        await add(old, 0, 5)
        await old.close()
        for first in (5, 10):
            await owner.open()
            await add(owner, first, 5)
            while await owner.sweep():
                pass
            await owner.drain()
            head = owner.truncatable_to
            await owner.close()
        assert head is not None
        client = KafkaAdminClient(**workers.settings.kafka_options())
        both = {"cleanup.policy": "compact,delete", "retention.ms": "-1"}  # a topic of "compact" alone refuses it
        client.alter_configs([ConfigResource(ConfigResourceType.TOPIC, workers.log.topic, both)])
        client.delete_records({TopicPartition(workers.log.topic, workers.log.partition): head})
        client.close()
        assert await workers.log.first() == head
        for worker, kind in (("old", "discard"), ("new", "fresh"), ("owner", "catchup")):
            partition = workers.partition(worker)
            assert (await partition.open()).kind == kind
            assert partition.digest() == digest_after(14)
            await partition.close()


class Interrupted(ChangelogTopic):
    """A changelog with which something happens once, between two fetches of whoever reads it from its beginning."""

    meanwhile: Callable[[], Awaitable[None]] | None = None

    async def read(self, start: int, stop: int | None) -> AsyncIterator[list[LogRecord]]:
        async for batch in super().read(start, stop):
            yield batch
            meanwhile, self.meanwhile = self.meanwhile, None
            if meanwhile is not None:
                assert stop is not None and batch[-1].offset < stop - 300, "it is at the end"
                await meanwhile()


def configure(settings: Settings, kind: ConfigResourceType, name: str, **configs: str) -> None:
    client = KafkaAdminClient(**settings.kafka_options())
    client.alter_configs([ConfigResource(kind, name, {key.replace("_", "."): value for key, value in configs.items()})])
    client.close()


async def test_a_broker_compacts_and_deletes_in_the_middle_of_a_restore(
    kafka_node: KafkaNode, make_settings: MakeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own cleaner at work: what was read of a row may be older than what is left, and the head may be gone."""
    monkeypatch.setattr(kafka, "READ_RECORDS_MAX", 100)
    monkeypatch.setattr(kafka, "FETCH_BYTES_MAX", 1 << 16)
    async with running(make_settings(broker=kafka_node.address), tmp_path) as workers:
        settings, options = workers.settings, workers.settings.kafka_options()
        log = workers.log = Interrupted(workers.log.topic, workers.log.partition, workers.producer, options)
        kept = {"cleanup_policy": "compact,delete", "retention_ms": "-1", "segment_bytes": str(1 << 20)}
        configure(settings, ConfigResourceType.TOPIC, log.topic, **kept, min_compaction_lag_ms=str(1 << 40))
        owner = workers.partition("owner")
        await owner.open()
        for number in range(8):
            await owner.flush({b"row%d" % n: b"%d" % number * 2000 for n in range(400)}, [], {"clicks": number})
        await add(owner, 8, 3)
        expected = owner.digest()
        await owner.close()

        async def count() -> int:
            return sum([len(batch) async for batch in ChangelogTopic.read(log, 0, None)])

        async def compact() -> None:
            configure(settings, ConfigResourceType.BROKER, str(kafka_node.number), log_cleaner_backoff_ms="50")
            lazy = {"min_compaction_lag_ms": "0", "min_cleanable_dirty_ratio": "0.01"}
            configure(settings, ConfigResourceType.TOPIC, log.topic, **kept, **lazy)
            deadline = time.monotonic() + 30
            while await count() > 3 * 400:  # the newest segment is never compacted
                assert time.monotonic() < deadline, "the broker does not compact"
                await asyncio.sleep(0.2)

        before = await count()
        assert before > 8 * 400
        log.meanwhile = compact
        restored = workers.partition("while it compacts")
        assert (await restored.open()).kind == "fresh"
        assert log.meanwhile is None and restored.digest() == expected
        while await restored.sweep(400):
            pass
        await restored.drain()
        head = restored.truncatable_to
        assert head is not None
        await restored.close()

        async def delete() -> None:
            assert await kafka.delete_before(options, log.topic, log.partition, head) is None

        log.meanwhile = delete
        restored = workers.partition("while the head goes")
        report = await restored.open()
        assert report.kind == "discard" and f"the changelog begins at {head}" in report.reason
        assert restored.digest() == expected
        await restored.close()
