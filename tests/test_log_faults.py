"""What a worker does when its logs are not what they were: it says what is lost and how to go on, and stops.

The workers are real, the logs simulated (bench/simulation.py); where the logs begin and end is asked of real brokers.
"""

import asyncio
import itertools

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import KafkaConnectionError
from kafka import KafkaAdminClient, KafkaProducer
from kafka import TopicPartition as KafkaPartition

from bench.kafka_node import KafkaNode
from bench.simulation import CHANGELOGS, OBSERVE_S, Life, Log, Published, SimKafka, World, caught_up, check, run_seed
from streams import kafka, topics
from streams.agents import LogResetError, LogTruncatedError
from streams.inbox import UNHEARD_WAIT_MAX_S
from streams.settings import Settings
from streams.topics import TopicsError
from streams.worker import HEARD_MAX_S, OBSERVE_INTERVAL_S, TP

SEED = 3
LONG_SEED = 9  # its changelogs have more than ten records that others hide
CLICKS = TP("clicks", 0)
_numbers = itertools.count()


async def stopped(world: World) -> None:
    """All events applied by a worker that has stopped since."""
    await world.publish()
    life = await world.start("w1", None, 0.0)
    await caught_up(world, life)
    await life.do(life.worker.stop())
    life.end()
    await asyncio.sleep(0.1)


def more_clicks(world: World, count: int) -> None:
    for _ in range(count):
        log = world.logs[CLICKS]
        value = b'{"user_id": "u1", "item_id": "i1", "action": "click"}'
        log.put(Published("clicks", 0, log.end, int(1e3 * world.now()), b"u1", value))


async def ended(life: Life, world: World) -> None:
    """Raises what the worker ends with."""
    while not life.killed:
        await asyncio.sleep(1)
    raise world.wrong[0]


WAY_ON = r"delete the state folders and the changelogs of this app id, or set another HEADWATER_APP_ID"


@pytest.mark.parametrize("name", ["clicks", "items", "examples"])
def test_retention_that_has_passed_our_offset_stops_the_worker(name: str) -> None:
    async def story(world: World) -> None:
        await stopped(world)
        log = world.logs[TP(world.topic(name), 0)]
        again = log.records[-1]
        for _ in range(5):
            log.put(again._replace(offset=log.end))
        log.delete_before(log.end - 2)
        await ended(await world.start("w1", None, 0.0), world)

    with pytest.raises(LogTruncatedError, match=name + r":0 begins at offset .* [34] offsets are gone.*" + WAY_ON):
        run_seed(SEED, story=story)


def test_a_log_of_which_nothing_is_left_stops_the_worker_at_once() -> None:
    async def story(world: World) -> None:
        await stopped(world)
        more_clicks(world, 5)
        world.logs[CLICKS].delete_before(world.logs[CLICKS].end)
        await ended(await world.start("w1", None, 0.0), world)

    with pytest.raises(LogTruncatedError, match="5 offsets are gone"):
        run_seed(SEED, story=story)


def test_a_new_application_starts_from_what_is_left() -> None:
    async def story(world: World) -> None:
        await world.publish()
        log = world.logs[CLICKS]
        log.delete_before(log.records[len(log.records) // 2].offset)
        world.poison = [record for record in world.poison if record.topic != "clicks" or record.offset >= log.begins]
        life = await world.start("w1", None, 0.0)
        await caught_up(world, life)
        assert life.worker.keepers["users", 0].applied()["clicks"] == log.records[-1].offset

    run_seed(SEED, story=story)


def test_a_topic_made_anew_stops_the_worker() -> None:
    """It would else read from the start and take every event below the old offset for a repeat."""

    async def story(world: World) -> None:
        await stopped(world)
        world.logs[CLICKS] = Log()
        more_clicks(world, 1)
        await ended(await world.start("w1", None, 0.0), world)

    with pytest.raises(
        LogResetError, match="clicks:0 ends at offset 1, but the state has applied it up to .*" + WAY_ON
    ):
        run_seed(SEED, story=story)


def test_a_topic_made_anew_under_a_running_worker_stops_it() -> None:
    async def story(world: World) -> None:
        await world.publish()
        life = await world.start("w1", None, 0.0)
        await caught_up(world, life)
        world.logs[CLICKS] = Log()
        await ended(life, world)

    with pytest.raises(LogResetError, match="made anew"):
        run_seed(SEED, story=story)


@pytest.mark.parametrize("is_away", [False, True])
def test_an_end_that_a_new_leader_tells_too_low_stops_nobody(is_away: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fetches do so until its followers have asked it. Nor is anybody stopped where the log cannot be asked."""

    async def story(world: World) -> None:
        await world.publish()
        life = await world.start("w1", None, 0.0)
        await caught_up(world, life)
        end_of = life.source.end_of
        monkeypatch.setattr(life.source, "end_of", lambda *log: max(0, (end_of(*log) or 0) - 3))
        if is_away:
            monkeypatch.setattr(SimKafka, "log_bounds", unreachable)
        await asyncio.sleep(2 * OBSERVE_INTERVAL_S)
        monkeypatch.undo()
        await caught_up(world, life)
        await check(world, life)

    run_seed(SEED, story=story)


def test_comments_that_are_out_of_reach_for_a_while_are_merged_at_their_time() -> None:
    """A broker is cut off or its successor not elected, while the clicks come by another."""

    async def story(world: World) -> None:
        life = await world.start("w1", None, 0.0)
        await asyncio.sleep(1)
        for tp in [TP("comments", p) for p in range(world.partitions)]:
            life.source.cut[tp] = world.now() - 2 * HEARD_MAX_S, world.logs[tp].end
        await world.publish()
        await asyncio.sleep(UNHEARD_WAIT_MAX_S / 2)
        life.source.cut.clear()
        life.source.wake()
        await caught_up(world, life)
        await check(world, life)

    run_seed(SEED, story=story)


async def unreachable(*_: object) -> None:
    raise KafkaConnectionError("nobody answers")


def test_partitions_that_were_added_are_refused() -> None:
    async def story(world: World) -> None:
        await stopped(world)
        world.partitions += 1
        world.settings = world.settings.model_copy(update={"partitions": world.partitions})
        life = Life(world, "w1", None, 0.0)
        grown, life.worker.settings = life.worker.settings, life.worker.settings.model_copy(update={"partitions": 1})
        assert grown.partitions == 2
        await life.do(life.worker.start())
        raise world.wrong[0]

    with pytest.raises(
        TopicsError, match=r"topic clicks: it has 2 partitions, planned 1: .* another HEADWATER_TOPIC_PRE"
    ):
        run_seed(SEED, story=story)


def test_partitions_that_are_added_while_a_worker_runs_end_it() -> None:
    """Keys go to other partitions from then on: what is unread stays in the log."""

    async def story(world: World) -> None:
        life = await world.start("w1", None, 0.0)
        await asyncio.sleep(3 * OBSERVE_S)
        assert not life.killed
        world.partitions += 1
        await ended(life, world)

    with pytest.raises(TopicsError, match=r"topic clicks: it has 2 partitions, planned 1: .* another HEADWATER_TOPIC"):
        run_seed(SEED, story=story)


async def test_a_producer_notices_partitions_that_are_added(
    kafka_node: KafkaNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka, "METADATA_AGE_MS", 100)
    settings = Settings(broker=kafka_node.address, topic_prefix="grown-", partitions=1)
    topics.ensure(settings)
    options, clicks = settings.kafka_options(), settings.topic("clicks")
    producer = kafka.Producer(options)
    await producer.start()
    assert await producer.partitions(clicks) == 1
    admin = KafkaAdminClient(**options)
    admin.create_partitions({clicks: 2})
    admin.close()
    async with asyncio.timeout(30):
        while await producer.partitions(clicks) != 2:
            await asyncio.sleep(0.05)
    await producer.stop()


def test_a_changelog_with_only_the_last_record_of_each_key_restores_everything() -> None:
    async def story(world: World) -> None:
        await stopped(world)
        gone = 0
        for kind, name in CHANGELOGS.items():
            for p in range(world.partitions if kind != "learner" else 1):
                log = world.logs[TP(world.settings.internal_topic(name), p)]
                gone += len(log.records)
                log.compact(log.end)
                gone -= len(log.records)
                assert len(log.records) == len({record.key for record in log.records})
        assert gone > 10
        life = await world.start("w2", None, 0.0)  # an empty disk
        assert {keeper.report.kind for keeper in life.worker.keepers.values() if keeper.report} == {"fresh"}
        await caught_up(world, life)
        await check(world, life)

    run_seed(LONG_SEED, story=story)


async def test_where_a_log_begins_and_ends_is_asked_of_the_broker(broker: str) -> None:
    settings = Settings(broker=broker, topic_prefix=f"bounds{next(_numbers)}-", partitions=1)
    topics.ensure(settings)
    options, clicks, items = settings.kafka_options(), settings.topic("clicks"), settings.topic("items")
    producer = KafkaProducer(**options)
    for _ in range(3):
        producer.send(clicks, b"{}").get(timeout=10)
    producer.close()
    assert await kafka.log_bounds(options, (clicks, items), 0) == {clicks: (0, 3), items: (0, 0)}
    assert await kafka.log_start(options, clicks, 0) == 0
    assert await kafka.log_end(options, clicks, 0) == 3


async def test_a_broker_that_dies_while_it_is_asked_for_an_end_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The partition that is being opened is claimed again then, as where no broker is found; the worker goes on."""

    class Silent:
        def __init__(self, *_: object, **__: object) -> None: ...

        async def __aenter__(self) -> "Silent":
            return self

        async def __aexit__(self, *_: object) -> None: ...

        async def end_offsets(self, tps: list[TopicPartition]) -> dict[TopicPartition, int]:
            return dict.fromkeys(tps, 5)

        beginning_offsets = end_offsets

        async def getmany(self, *_: object, **__: object) -> dict[TopicPartition, list[object]]:
            return {}

        def assign(self, *_: object) -> None: ...

        seek = highwater = assign

    monkeypatch.setattr(kafka, "consumer", Silent)
    with pytest.raises(KafkaConnectionError, match="no answer for the end of clicks:0") as raised:
        await kafka.log_end({}, "clicks", 0)
    assert raised.value.retriable


async def test_deleted_records_move_the_beginning(kafka_node: KafkaNode) -> None:
    settings = Settings(broker=kafka_node.address, topic_prefix="deleted-", partitions=1)
    topics.ensure(settings)
    options, clicks = settings.kafka_options(), settings.topic("clicks")
    producer = KafkaProducer(**options)
    for _ in range(4):
        producer.send(clicks, b"{}").get(timeout=10)
    producer.close()
    admin = KafkaAdminClient(**options)
    admin.delete_records({KafkaPartition(clicks, 0): 3})
    admin.close()
    assert await kafka.log_bounds(options, (clicks,), 0) == {clicks: (3, 4)}
    assert await kafka.first_at_or_after(options, clicks, 0, 1) == (3, 3)
