"""A record whose header name is not UTF-8 is read like any other."""

import itertools
from typing import Any

from aiokafka import TopicPartition
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.util import calc_crc32c
from kafka import KafkaProducer

from streams import headers, kafka, topics
from streams.settings import Settings

NAME = b"name-of-a-header"
BROKEN = b"\xff\xfe" + NAME[2:]
_numbers = itertools.count()


class BrokenName(str):
    """A header name as a client of another language may write it."""

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return BROKEN


def batch(first_offset: int, *names: bytes, producer_id: int = -1) -> bytes:
    """One record a header name, as a broker hands them over."""
    builder = DefaultRecordBatchBuilder(
        magic=2, compression_type=0, is_transactional=producer_id >= 0, producer_id=producer_id, producer_epoch=0,
        base_sequence=0, batch_size=1 << 16,
    )  # fmt: skip
    for at in range(len(names)):
        builder.append(at, 1_000, b"k", b"v%d" % (first_offset + at), [(NAME.decode(), b"x")])
    data = bytearray(builder.build())
    for name in names:
        at = data.index(NAME)
        data[at : at + len(NAME)] = name.ljust(len(NAME), b".") if name != NAME else b"n" * len(NAME)
    data[:8] = first_offset.to_bytes(8, "big")
    data[17:21] = calc_crc32c(bytes(data[21:])).to_bytes(4, "big")
    return bytes(data)


def read(data: bytes, start: int = 0, aborted: list[tuple[int, int]] | None = None) -> list[tuple[int, bytes, Any]]:
    """(offset, value, headers) of what a fetch gives."""
    made = headers.TolerantRecords(TopicPartition("t", 0), headers._Kept(data), aborted, start, None, None, True, 1)
    return [(record.offset, record.value, record.headers) for record in made]


def test_a_broken_name_is_replaced_and_nothing_around_it_is_lost() -> None:
    fine, broken = "n" * len(NAME), BROKEN.decode(errors="replace")
    data = batch(0, NAME, BROKEN, NAME) + batch(3, NAME)
    names = [fine, broken, fine, fine]
    assert read(data) == [(n, b"v%d" % n, ((name, b"x"),)) for n, name in enumerate(names)]
    assert read(data, start=2) == [(n, b"v%d" % n, ((fine, b"x"),)) for n in (2, 3)]


def test_aborted_batches_before_it_stay_aborted() -> None:
    data = batch(0, NAME, producer_id=7) + batch(1, BROKEN) + batch(2, NAME, producer_id=7)
    assert [offset for offset, _, _ in read(data, aborted=[(7, 0)])] == [1]


async def test_a_consumer_reads_on_over_it(broker: str) -> None:
    settings = Settings(broker=broker, topic_prefix=f"headers{next(_numbers)}-", partitions=1)
    topics.ensure(settings)
    producer = KafkaProducer(**settings.kafka_options(), linger_ms=50)
    for n in range(4):
        producer.send(
            settings.topic("clicks"), b"v%d" % n, key=b"k", headers=[(BrokenName("x") if n == 2 else "x", b"")]
        )
    producer.close()
    found = []
    async for records in kafka.read_records(settings.kafka_options(), settings.topic("clicks"), 0, 0, 3):
        found += [(record.value, record.headers[0][0]) for record in records]
    broken = BROKEN.decode(errors="replace")
    assert found == [(b"v0", "x"), (b"v1", "x"), (b"v2", broken), (b"v3", "x")]
