"""Records as a consumer hands them over, for the tests of the codec."""

from typing import Any

from aiokafka.structs import ConsumerRecord

from streams import codec
from streams.codec import Record, Reject, Topic
from streams.events import Event

NOW_MS = 1_767_225_600_000  # 2026-01-01T00:00:00Z, the timestamp of every record unless said otherwise
NOW_S = NOW_MS / 1e3


def record(
    topic: str,
    value: bytes | None,
    key: bytes | None,
    *,
    offset: int = 0,
    partition: int = 3,
    timestamp_ms: int = NOW_MS,
    headers: tuple[tuple[str, bytes | None], ...] = (),
) -> Record:
    """A consumed record, of the class that aiokafka makes."""
    consumed: Any = ConsumerRecord(
        topic, partition, offset, timestamp_ms, 0, key, value, None, len(key or b""), len(value or b""), headers
    )
    return consumed  # type: ignore[no-any-return]


def outcome_of(
    topic: Topic, value: bytes | None, key: bytes | None = b"u", *, timestamp_ms: int = NOW_MS
) -> Event | Reject:
    """What the codec makes of one record."""
    records = [record(topic, value, key, timestamp_ms=timestamp_ms)]
    decoded: codec.Decoded[Any] = codec.decode_batch(topic, records)
    assert len(decoded.events) + len(decoded.rejects) == 1
    assert len(decoded.records) == len(decoded.events)
    outcome: Event | Reject = (decoded.events or decoded.rejects)[0]
    return outcome
