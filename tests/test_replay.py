"""A recorded stream is published byte for byte, in order, to the partitions where every client would put it."""

import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiokafka.partitioner import DefaultPartitioner
from kafka import KafkaConsumer, TopicPartition

from streams import codec, topics
from streams.replay import ReplayError, replay
from streams.settings import Settings
from streams.topics import TopicsError

MakeSettings = Callable[..., Settings]
EVENTS = 400


def _event(number: int) -> dict[str, Any]:
    user_id = f"użytkownik-{number % 7}"
    if number % 5 == 4:
        return {"type": "comment", "user_id": user_id, "text": f"très bien {number}", "ts": 1000.0 + number}
    return {"type": "click", "user_id": user_id, "item_id": f"i{number % 9}", "action": "click", "ts": 1000.0 + number}


@pytest.fixture
def stream(tmp_path: Path) -> tuple[Path, Path]:
    items, events = tmp_path / "items.jsonl", tmp_path / "events.jsonl.gz"
    items.write_text("".join(json.dumps({"item_id": f"i{n}", "text": f"Film {n}"}) + "\n" for n in range(9)))
    with gzip.open(events, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(_event(n), ensure_ascii=False) + "\n" for n in range(EVENTS))
    return items, events


def _read(settings: Settings, name: str, count: int) -> list[Any]:
    """The first `count` records of a topic, by partition and offset."""
    tps = [TopicPartition(settings.topic(name), number) for number in range(settings.partitions)]
    consumer = KafkaConsumer(**settings.kafka_options(), auto_offset_reset="earliest", enable_auto_commit=False)
    try:
        consumer.assign(tps)
        found: list[Any] = []
        while len(found) < count:
            polled = consumer.poll(timeout_ms=60_000)
            assert polled, f"{len(found)} of {count} records of {name}"
            found += [record for records in polled.values() for record in records]
        return sorted(found, key=lambda record: (record.partition, record.offset))
    finally:
        consumer.close()


def test_stream_is_published_byte_for_byte_in_order(
    broker: str, make_settings: MakeSettings, stream: tuple[Path, Path]
) -> None:
    settings = make_settings(broker=broker)
    topics.ensure(settings)
    done = replay(settings, *stream)
    assert (done.items, done.events, done.bad) == (9, EVENTS, 0)
    assert done.events_per_s > 0
    events = [_event(number) for number in range(EVENTS)]
    for name, kind in (("clicks", "click"), ("comments", "comment")):
        mine = [event for event in events if event["type"] == kind]
        records = _read(settings, name, len(mine))
        assert len(records) == len(mine)
        partitioner, numbers = DefaultPartitioner(), list(range(settings.partitions))
        for record in records:
            event = json.loads(record.value)
            assert record.key == event["user_id"].encode()
            assert record.value == json.dumps(event, ensure_ascii=False).encode()
            assert record.partition == partitioner(record.key, numbers, numbers)
        for number in numbers:
            ts = [json.loads(record.value)["ts"] for record in records if record.partition == number]
            assert ts == sorted(ts)
    assert {record.key for record in _read(settings, "items", 9)} == {b"i%d" % n for n in range(9)}


def test_bad_lines_are_told_by_number_and_skipped(
    embedded_broker: str, make_settings: MakeSettings, stream: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = make_settings(broker=embedded_broker)
    topics.ensure(settings)
    bad = tmp_path / "bad.jsonl"
    lines = [json.dumps(_event(0)), "{not json", "", json.dumps(_event(1)), '{"type": "view", "user_id": "u"}',
             json.dumps({**_event(2), "item_id": ""})]  # fmt: skip
    bad.write_text("\n".join(lines) + "\n")
    done = replay(settings, None, bad)
    assert done.events == 2
    assert [(line.file, line.number) for line in done.bad_lines] == [(bad, 2), (bad, 5), (bad, 6)]
    assert "not_json" in done.bad_lines[0].reason
    assert len(_read(settings, "clicks", 2)) == 2


def test_an_event_without_a_time_has_that_of_its_record(
    embedded_broker: str, make_settings: MakeSettings, tmp_path: Path
) -> None:
    settings = make_settings(broker=embedded_broker)
    topics.ensure(settings)
    lines = tmp_path / "events.jsonl"
    lines.write_text(json.dumps({name: value for name, value in _event(0).items() if name != "ts"}))
    before = time.time()
    done = replay(settings, None, lines)
    assert (done.events, done.bad) == (1, 0)
    (sent,) = codec.decode_batch("clicks", _read(settings, "clicks", 1)).events
    assert before - 1 <= sent.ts <= time.time() + 1


def test_limit_and_skip_choose_a_part(
    embedded_broker: str, make_settings: MakeSettings, stream: tuple[Path, Path]
) -> None:
    settings = make_settings(broker=embedded_broker)
    topics.ensure(settings)
    assert replay(settings, None, stream[1], skip=10, limit=4).events == 4
    clicks = _read(settings, "clicks", 4)  # numbers 10 to 13: number 14 is the next comment
    assert sorted(json.loads(record.value)["ts"] for record in clicks) == [1010.0, 1011.0, 1012.0, 1013.0]


def test_speed_is_kept(embedded_broker: str, make_settings: MakeSettings, stream: tuple[Path, Path]) -> None:
    settings = make_settings(broker=embedded_broker)
    topics.ensure(settings)
    done = replay(settings, None, stream[1], events_per_s=400, limit=200)
    assert done.seconds >= 199 / 400 - 0.01


def test_progress_reaches_its_end(embedded_broker: str, make_settings: MakeSettings, stream: tuple[Path, Path]) -> None:
    settings = make_settings(broker=embedded_broker)
    topics.ensure(settings)
    told: list[tuple[str, int, int, int]] = []
    replay(settings, *stream, progress=lambda *what: told.append(what))
    last = {what: (records, read == total) for what, records, read, total in told}
    assert last == {"items": (9, True), "events": (EVENTS, True)}


def test_missing_topics_are_an_error_that_names_the_command(
    embedded_broker: str, make_settings: MakeSettings, stream: tuple[Path, Path]
) -> None:
    with pytest.raises(TopicsError, match="headwater topics"):
        replay(make_settings(broker=embedded_broker), *stream)


@pytest.mark.parametrize("content", [None, b"\x1f\x8b\x08\x00broken"])
def test_file_that_cannot_be_read_is_an_error(
    embedded_broker: str, make_settings: MakeSettings, tmp_path: Path, content: bytes | None
) -> None:
    settings = make_settings(broker=embedded_broker)
    topics.ensure(settings)
    path = tmp_path / "events.jsonl.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ReplayError, match=r"events\.jsonl\.gz"):
        replay(settings, None, path)
