"""What workers tell of the encoder's checkpoints: of the announced manifests, whatever else is on their topic."""

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from kafka.admin import KafkaAdminClient, NewTopic
from structlog.testing import capture_logs

from streams import announced, kafka
from streams.announced import CHECKPOINTS_TOLD_MAX, DECISIONS_TOLD_MAX, MANIFEST_BYTES_MAX, Announced
from streams.checkpoints import Manifest
from streams.settings import Settings
from streams.trainer import announce

WAIT_S_MAX = 60.0
PROMOTE = {"kind": "promote", "position": 90, "tests": 655, "mean_difference": 0.01, "log10_e_better": 2.5,
           "log10_e_worse": 0.0, "alpha": 0.005, "verdict": "better"}  # fmt: skip
SWITCHED = {"kind": "switched", "position": 92, "taken_back": False}


def manifest(offset: int, base: str = "mine:1", **more: Any) -> Manifest:
    return Manifest(
        name=f"{offset:012d}-a{offset}", adapter=f"a{offset}", base=base, parent="", offset=offset, rank=8, digest="d",
        created=1e9 + offset, **more,
    )  # fmt: skip


def encoded(told: Manifest) -> bytes:
    return msgspec.json.encode(told)


def test_a_manifest_is_told_as_it_is_with_the_time_since_when_it_is_in_use() -> None:
    training = {"messages": 256, "examples": 12000, "loss": 5.9, "loss_frozen": 6.0, "loss_champion": 6.0, "seed": 3}
    mine = Announced("mine:1")
    mine.take(encoded(manifest(80, training=training)), 1000.0)
    [told] = mine.newest()
    assert (told.name, told.state, told.created, told.decisions) == ("000000000080-a80", "shadow", 1e9 + 80, [])
    assert msgspec.to_builtins(told.training) == {k: v for k, v in training.items() if k != "seed"}
    decisions = [PROMOTE]
    mine.take(encoded(manifest(80, training=training, decisions=decisions)), 1001.0)
    assert msgspec.to_builtins(mine.newest())[0]["decisions"] == [PROMOTE]
    assert "current_since" not in msgspec.to_builtins(mine.newest())[0]
    for kind, at in ((SWITCHED, 1002.0), (PROMOTE | {"kind": "kept"}, 1003.0)):
        decisions.append(kind)
        mine.take(encoded(manifest(80, state="current", decisions=decisions)), at)
        assert mine.newest()[0].current_since == 1002.0, "since it was first told so"
    assert msgspec.to_builtins(mine.newest())[0]["decisions"] == decisions
    mine.take(encoded(manifest(80, state="retired")), 1004.0)
    assert mine.newest()[0].current_since is msgspec.UNSET
    mine.take(encoded(manifest(80, state="current")), 1005.0)
    assert mine.newest()[0].current_since == 1005.0


def test_the_newest_are_kept_and_what_is_in_use_with_them() -> None:
    mine = Announced("mine:1")
    mine.take(encoded(manifest(1, state="current", decisions=[SWITCHED] * 100)), 1.0)
    for offset in range(2, 100):
        mine.take(encoded(manifest(offset, state="dropped")), float(offset))
    kept = [told.offset for told in mine.newest()]
    assert kept == [*range(99, 100 - CHECKPOINTS_TOLD_MAX, -1), 1]
    assert len(mine.newest()[-1].decisions) == DECISIONS_TOLD_MAX
    for offset in range(100, 200):
        mine.take(encoded(manifest(offset)), float(offset))
    kept = [told.offset for told in mine.newest()]
    assert kept == list(range(199, 199 - CHECKPOINTS_TOLD_MAX, -1)), "all in use or in shadow: the newest of those"


def test_what_is_none_of_ours_is_passed_over_and_what_cannot_be_read_is_said_once() -> None:
    whole = json.loads(encoded(manifest(80)))
    others: list[dict[str, Any]] = [
        {"name": 7}, {"offset": -1}, {"offset": 1 << 64}, {"offset": 1.5}, {"decisions": {}}, {"created": None},
        {"training": {"loss": "x"}}, {"decisions": [{"position": 3}]}, {"decisions": [PROMOTE | {"tests": 1 << 63}]},
        {"state": "s" * MANIFEST_BYTES_MAX},
    ]  # fmt: skip
    bad = [
        b"",
        b"\xff",
        b"{",
        b"[]",
        b"null",
        b"[" * 60_000,
        b'{"base": "mine:1"}',
        b'{"base": "mine:1", "name": "\xff"}',
    ]
    bad += [json.dumps(whole | other).encode() for other in others]
    mine = Announced("mine:1")
    with capture_logs() as lines:
        for value in [*bad, None, encoded(manifest(81, base="other:1"))]:
            mine.take(value, 1.0)
            assert mine.newest() == []
    [line] = lines
    assert line["log_level"] == "warning" and "cannot be read" in line["event"]
    mine.take(json.dumps(whole | {"current_since": 9, "since": "a later version's"}).encode(), 1.0)
    [told] = msgspec.to_builtins(mine.newest())
    assert told["offset"] == 80 and "current_since" not in told and "base" not in told


async def test_a_topic_that_is_not_there_is_not_made_but_waited_for(
    broker: str, make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have other partitions than planned: the encoder's is the one that its announcements go to."""
    monkeypatch.setattr(announced, "RETRY_S", 0.05)
    settings = make_settings(broker=broker)
    topic = settings.topic("encoder-checkpoints")
    producer = kafka.Producer(settings.kafka_options())
    await producer.start()
    mine = Announced("mine:1")
    with capture_logs() as lines:
        follows = asyncio.create_task(mine.follow(settings.kafka_options(), producer, topic))
        try:
            await until(lambda: any(line["log_level"] == "warning" for line in lines))
            admin = KafkaAdminClient(**settings.kafka_options())
            assert topic not in admin.list_topics()
            admin.create_topics([NewTopic(topic, 3, 1)])
            admin.close()
            for base in ("mine:1", "other:1"):
                await announce(producer, settings, manifest(80, base=base))
            await until(lambda: bool(mine.newest()))
            await announce(producer, settings, manifest(80, state="current"))
            await until(lambda: mine.newest()[0].state == "current")
        finally:
            follows.cancel()
            with suppress(asyncio.CancelledError):
                await follows
            await producer.stop()
    assert [line["event"] for line in lines] == ["the topic encoder-checkpoints cannot be read; trying again"]
    since = mine.newest()[0].current_since
    assert isinstance(since, float) and abs(time.time() - since) < WAIT_S_MAX


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S_MAX):
        while not holds():
            await asyncio.sleep(0.02)
