"""The topics: what each must look like, made where it is missing, compared where it is there.

A topic that exists is never changed: partitions place the keys, and retention may be somebody's decision.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient, NewTopic
from kafka.errors import KafkaError, TopicAlreadyExistsError

from streams import space
from streams.settings import Fault, Settings

UNKNOWN_TOPIC: Final = 3  # Kafka's error codes
NO_ERROR: Final = 0
BOOTSTRAP_WAIT_MS: Final = 5000
KNOWN_WAIT_MS: Final = 20_000
HOUR_MS: Final = 3_600_000
REPLICATION_SAFE: Final = 3  # from this many copies on, an acknowledged record is on at least two brokers


class BrokerUnreachable(Fault):
    """No broker answers."""


class TopicsError(Fault):
    """A topic cannot be used as it is, or not be made."""


class State(StrEnum):
    """How a topic was found."""

    CREATED = "created"
    GOOD = "as planned"
    DIFFERS = "differs"  # in what is a matter of taste or cost: it works
    WRONG = "wrong"  # the program would misplace keys


@dataclass(frozen=True)
class Topic:
    """What a topic must look like."""

    name: str
    partitions: int
    replication: int
    what: str
    configs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """A topic as it is, after `ensure`. `differences` are sentences."""

    topic: Topic
    state: State
    differences: tuple[str, ...] = ()


def planned(settings: Settings) -> list[Topic]:
    """All topics of the program, under these settings."""
    kept = {"cleanup.policy": "delete", "retention.ms": _ms(settings.retention_hours)}
    examples = {"cleanup.policy": "delete", "retention.ms": _ms(settings.examples_retention_hours)}
    audit = {"cleanup.policy": "delete", "retention.ms": _ms(settings.audit_retention_hours)}
    forever = {"cleanup.policy": "delete", "retention.ms": "-1", "retention.bytes": "-1"}
    lag = {"cleanup.policy": "compact", "min.compaction.lag.ms": _ms(settings.compaction_lag_hours)}
    rolled = lag | {"segment.ms": _ms(settings.compaction_lag_hours)}  # only closed segments are compacted
    # Records of a user who was erased are deleted, which Kafka refuses for a topic that is compacted alone.
    cut = rolled | {"cleanup.policy": "compact,delete", "retention.ms": "-1", "retention.bytes": "-1"}
    many = settings.partitions
    wanted: list[tuple[str, int, Mapping[str, str], str]] = [
        (settings.topic("clicks"), many, kept, "behaviour events, by user"),
        (settings.topic("comments"), many, kept, "text events, by user"),
        (settings.topic("items"), many, lag, "the catalogue, by item"),
        (settings.topic("erasures"), many, kept, "users to forget"),
        *(
            (settings.topic(f"{name}.dlq"), 1, kept, f"rejected messages of {name}")
            for name in ("clicks", "comments", "items", "erasures")
        ),
        (settings.topic("encoder-checkpoints"), 1, lag, "published encoders"),
        (settings.internal_topic(space.TOPIC), 1, forever, "whose vectors there are"),
        (settings.internal_topic("examples"), 1, examples, "training examples and catalogue entries"),
        (settings.internal_topic("exposures"), 1, kept, "lists shown in trials of an adapter"),
        (settings.internal_topic("audit"), 1, audit, "who read or changed which user"),
        (settings.internal_topic("users-changelog"), many, cut, "user rows"),
        (settings.internal_topic("catalogue-changelog"), many, rolled, "catalogue rows"),
        (settings.internal_topic("items-changelog"), 1, rolled, "the learner's rows"),
        (settings.internal_topic("certificates"), 1, lag, "what was erased where"),
    ]
    safe = {"min.insync.replicas": "2"} if settings.replication >= REPLICATION_SAFE else {}
    return [
        Topic(name, partitions, settings.replication, what, {**configs, **safe})
        for name, partitions, configs, what in wanted
    ]


def ensure(settings: Settings) -> list[Report]:
    """Makes the topics that are missing and compares those that are there, in the order of `planned`.

    Raises BrokerUnreachable, and TopicsError where the broker refuses to make one. Differences are reported, not
    raised: see `Report.state`.
    """
    topics = planned(settings)
    client = _connect(settings)
    try:
        found = _describe(client, topics)
        missing = [topic for topic in topics if topic.name not in found]
        created = _create(client, missing)
        _wait_until_known(client, missing)
        found |= _describe(client, [topic for topic in missing if topic.name not in created])
        configs = _configs(client, [topic for topic in topics if topic.name not in created])
    finally:
        client.close()
    return [
        Report(topic, State.CREATED)
        if topic.name in created
        else _compare(topic, found[topic.name], configs.get(topic.name, {}))
        for topic in topics
    ]


def require(settings: Settings, names: Sequence[str]) -> None:
    """Raises TopicsError unless these public topics are there with the planned partitions, BrokerUnreachable."""
    wanted = {settings.topic(name) for name in names}
    topics = [topic for topic in planned(settings) if topic.name in wanted]
    client = _connect(settings)
    try:
        found = _describe(client, topics)
    finally:
        client.close()
    for topic in topics:
        if topic.name not in found:
            raise TopicsError(f"topic {topic.name} is not there: make the topics with `headwater topics`")
        report = _compare(topic, found[topic.name], {})
        if report.state is State.WRONG:
            raise TopicsError(f"topic {topic.name}: {report.differences[0]}")


def _connect(settings: Settings) -> KafkaAdminClient:
    """By whichever broker answers: kafka-python gives all its time to one of them, drawn by lot."""
    problems: list[OSError | KafkaError] = []
    for server in settings.bootstrap():
        options = {**settings.kafka_options(), "bootstrap_servers": [server]}
        try:
            return KafkaAdminClient(**options, bootstrap_timeout_ms=BOOTSTRAP_WAIT_MS)
        except (OSError, KafkaError) as problem:
            problems.append(problem)
    raise unreachable(settings, problems[-1]) from problems[-1]


def unreachable(settings: Settings, problem: BaseException) -> BrokerUnreachable:
    """The error for a broker that does not answer, with what to do."""
    return BrokerUnreachable(
        f"no Kafka broker answers at {','.join(settings.bootstrap())} ({type(problem).__name__}): start one with "
        "`headwater broker`, or set HEADWATER_BROKER to yours (and its SECURITY_PROTOCOL, SASL and SSL settings)"
    )


def _describe(client: KafkaAdminClient, topics: Sequence[Topic]) -> dict[str, Any]:
    """{name: Kafka's description} of those that exist."""
    if not topics:
        return {}
    described = client.describe_topics([topic.name for topic in topics])
    found = {entry["name"]: entry for entry in described if entry["error_code"] != UNKNOWN_TOPIC}
    for name, entry in found.items():
        if entry["error_code"] != NO_ERROR:
            raise TopicsError(
                f"topic {name}: the broker answers with error {entry['error_code']}; see the broker's log"
            )
    return found


def _create(client: KafkaAdminClient, topics: Sequence[Topic]) -> set[str]:
    """Makes them; the names of those that were made here, not by somebody else in between."""
    created = set()
    for topic in topics:
        new = NewTopic(topic.name, topic.partitions, topic.replication, topic_configs=dict(topic.configs))
        try:
            client.create_topics([new])
        except TopicAlreadyExistsError:
            continue
        except KafkaError as problem:
            raise TopicsError(
                f"topic {topic.name} ({topic.partitions} partitions, replication {topic.replication}) cannot be made: "
                f"{type(problem).__name__}; check HEADWATER_REPLICATION against the number of brokers, and this "
                "client's rights"
            ) from problem
        created.add(topic.name)
    return created


def _wait_until_known(client: KafkaAdminClient, topics: Sequence[Topic]) -> None:
    """A broker takes a topic before it knows it: until then clients, and the next `ensure`, do not find it."""
    try:
        client.wait_for_topics([topic.name for topic in topics], timeout_ms=KNOWN_WAIT_MS)
    except KafkaError as problem:
        raise TopicsError(
            f"topics were made, but the broker does not show them: {problem}; run this again"
        ) from problem


def _configs(client: KafkaAdminClient, topics: Sequence[Topic]) -> dict[str, dict[str, str]]:
    """{name: {setting: value}}; the embedded broker tells none."""
    if not topics:
        return {}
    resources = [ConfigResource(ConfigResourceType.TOPIC, topic.name) for topic in topics]
    described = client.describe_configs(resources, config_filter="all")["topic"]
    return {name: {key: str(entry["value"]) for key, entry in told.items()} for name, told in described.items()}


def _compare(topic: Topic, described: Mapping[str, Any], configs: Mapping[str, str]) -> Report:
    partitions = described["partitions"]
    differences = []
    state = State.GOOD
    copies = min((len(part["replica_nodes"]) for part in partitions), default=0)
    if copies < topic.replication:
        differences.append(f"replication is {copies}, planned {topic.replication}")
    for key, wanted in topic.configs.items():
        if key in configs and configs[key] != wanted:
            differences.append(f"{key} is {configs[key]}, planned {wanted}")
    if differences:
        state = State.DIFFERS
    if len(partitions) != topic.partitions:
        differences.insert(
            0,
            other_partitions(len(partitions), topic.partitions),
        )
        state = State.WRONG
    return Report(topic, state, tuple(differences))


def other_partitions(found: int, planned: int) -> str:
    """What to say of a topic with another number of partitions: keys are placed by it, so it is refused."""
    return (
        f"it has {found} partitions, planned {planned}: keys would be looked for where they are not. Set "
        "HEADWATER_PARTITIONS to what clicks has before the first event; later, replay the events into topics of "
        "another HEADWATER_TOPIC_PREFIX"
    )


def _ms(hours: float) -> str:
    return str(round(hours * HOUR_MS))
