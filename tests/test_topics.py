"""Topics are made as planned, found again, and never changed."""

from collections.abc import Callable

import pytest

from streams import topics
from streams.settings import Settings
from streams.topics import BrokerUnreachable, State, TopicsError

MakeSettings = Callable[..., Settings]


def test_missing_topics_are_made_and_a_second_run_finds_them_as_planned(
    broker: str, make_settings: MakeSettings
) -> None:
    settings = make_settings(broker=broker)
    first, second = topics.ensure(settings), topics.ensure(settings)
    assert {report.state for report in first} == {State.CREATED}
    assert {(report.state, report.differences) for report in second} == {(State.GOOD, ())}
    assert [report.topic for report in first] == topics.planned(settings)


def test_other_partitions_are_an_error_that_says_what_to_set(broker: str, make_settings: MakeSettings) -> None:
    settings = make_settings(broker=broker)
    topics.ensure(settings)
    wider = settings.model_copy(update={"partitions": 3})
    reports = {report.topic.name: report for report in topics.ensure(wider)}
    clicks = reports[settings.topic("clicks")]
    assert clicks.state is State.WRONG
    assert "it has 2 partitions, planned 3" in clicks.differences[0]
    assert reports[settings.internal_topic("examples")].state is State.GOOD  # always one partition
    with pytest.raises(TopicsError, match="HEADWATER_PARTITIONS"):
        topics.require(wider, ["clicks"])


def test_one_missing_topic_is_made_beside_the_others(broker: str, make_settings: MakeSettings) -> None:
    settings = make_settings(broker=broker)
    topics.ensure(settings)
    other = settings.model_copy(update={"app_id": "another"})
    made = {report.topic.name for report in topics.ensure(other) if report.state is State.CREATED}
    assert made == {other.internal_topic(name) for name in (
        "encoder", "examples", "audit", "users-changelog", "catalogue-changelog", "items-changelog", "certificates",
        "exposures",
    )}  # fmt: skip


def test_required_topic_that_is_not_there_names_the_command(broker: str, make_settings: MakeSettings) -> None:
    with pytest.raises(TopicsError, match="headwater topics"):
        topics.require(make_settings(broker=broker), ["clicks"])


def test_kafka_keeps_the_planned_configuration(kafka_node: object, make_settings: MakeSettings) -> None:
    settings = make_settings(broker=kafka_node.address)  # type: ignore[attr-defined]
    topics.ensure(settings)
    changed = settings.model_copy(update={"compaction_lag_hours": 7.0})
    reports = {report.topic.name: report for report in topics.ensure(changed)}
    changelog = reports[settings.internal_topic("users-changelog")]
    assert changelog.state is State.DIFFERS
    assert "min.compaction.lag.ms is 21600000, planned 25200000" in changelog.differences
    assert reports[settings.topic("clicks")].state is State.GOOD


def test_replication_that_the_brokers_cannot_give_is_an_error(kafka_node: object, make_settings: MakeSettings) -> None:
    settings = make_settings(broker=kafka_node.address, replication=3)  # type: ignore[attr-defined]
    with pytest.raises(TopicsError, match="HEADWATER_REPLICATION"):
        topics.ensure(settings)


def test_broker_that_does_not_answer_is_an_error_that_says_what_to_do(
    free_port: int, make_settings: MakeSettings
) -> None:
    with pytest.raises(BrokerUnreachable, match="headwater broker"):
        topics.ensure(make_settings(broker=f"127.0.0.1:{free_port}"))


def test_changelogs_are_compacted_behind_a_lag_and_sources_are_not(make_settings: MakeSettings) -> None:
    settings = make_settings(compaction_lag_hours=2.0, replication=3)
    planned = {topic.name: topic for topic in topics.planned(settings)}
    for name in ("users-changelog", "catalogue-changelog", "items-changelog"):
        configs = planned[settings.internal_topic(name)].configs
        assert configs["cleanup.policy"] == ("compact,delete" if name == "users-changelog" else "compact")
        assert configs.get("retention.ms", "-1") == "-1"
        assert configs["min.compaction.lag.ms"] == configs["segment.ms"] == "7200000"
        assert configs["min.insync.replicas"] == "2"
    for name in ("clicks", "comments", "clicks.dlq"):
        assert planned[settings.topic(name)].configs["cleanup.policy"] == "delete"
    assert planned[settings.topic("items")].configs["cleanup.policy"] == "compact"
