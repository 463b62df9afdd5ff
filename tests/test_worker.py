"""A real worker against a real broker: what outside clients publish ends in rows, lists and dead letters."""

import asyncio
import itertools
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiokafka import AIOKafkaProducer
from kafka import KafkaConsumer, KafkaProducer
from kafka.structs import TopicPartition

from bench import chaos, load
from bench.deployment import Deployment, WorkerProcess
from bench.drain import PlainSource, PlainVectors
from bench.kafka_node import KafkaNode
from streams import topics
from streams.agents import INBOX_RECORDS_MAX
from streams.kafka import partition_of
from streams.settings import Settings
from streams.worker import TP, Worker
from tests.readme import example, run_shell

FILMS = {
    "alien": "Alien. A crew in deep space meets a creature that hunts them. horror, science fiction",
    "blade": "Blade Runner. A detective hunts artificial humans in a dark future city. science fiction",
    "amelie": "Amelie. A shy waitress in Paris mends the lives of others. romance, comedy",
    "notebook": "The Notebook. A poor man and a rich woman fall in love one summer. romance, drama",
}
TRANSACTIONS = 12
LEARNERS = ("learner", "examples_applied", "prequential")
_numbers = itertools.count()


@pytest.fixture
def deployment(broker: str, tmp_path: Path) -> Iterator[Deployment]:
    made = Deployment(broker, tmp_path, topic_prefix=f"worker{next(_numbers)}-", partitions=2, rank_sample=1.0)
    made.create_topics()
    yield made
    made.close()


class Outside:
    """kafka-python as somebody else's program: its own partitioner, its own consumer."""

    def __init__(self, deployment: Deployment) -> None:
        self.settings = deployment.settings
        self.producer = KafkaProducer(**self.settings.kafka_options())

    def send(self, topic: str, key: str | None, value: Any) -> tuple[int, int]:
        raw = value if isinstance(value, bytes) or value is None else json.dumps(value).encode()
        sent = self.producer.send(self.settings.topic(topic), raw, key=key.encode() if key else None).get(timeout=10)
        return sent.partition, sent.offset

    def position(self, topic: str, key: str, value: Any) -> str:
        """Sends, and tells where it is as a read's `at_least` names it."""
        return "{}:{}:{}".format(topic, *self.send(topic, key, value))

    def films(self) -> None:
        for item_id, text in FILMS.items():
            self.send("items", item_id, {"item_id": item_id, "text": text})

    def read(self, topic: str, count: int) -> list[Any]:
        """The first `count` records of a topic with one partition."""
        options = {"enable_auto_commit": False, "auto_offset_reset": "earliest"}
        consumer = KafkaConsumer(**self.settings.kafka_options(), **options)
        try:
            consumer.assign([TopicPartition(self.settings.topic(topic), 0)])
            consumer.seek_to_beginning()
            found: list[Any] = []
            deadline = time.monotonic() + 60
            while len(found) < count and time.monotonic() < deadline:
                for records in consumer.poll(timeout_ms=500).values():
                    found += records
            return found
        finally:
            consumer.close()

    def close(self) -> None:
        self.producer.close()


@pytest.fixture
def outside(deployment: Deployment) -> Iterator[Outside]:
    client = Outside(deployment)
    yield client
    client.close()


@contextmanager
def of_words(address: str, folder: Path, prefix: str) -> Iterator[tuple[Deployment, Outside]]:
    """A deployment of workers whose encoder is bench.words', and its clients."""
    made = Deployment(address, folder, topic_prefix=prefix, partitions=1, module="bench.words")
    made.create_topics()
    outside = Outside(made)
    try:
        yield made, outside
    finally:
        outside.close()
        made.close()


def catalogue_known(worker: WorkerProcess, count: int) -> None:
    worker.wait_until("the catalogue", lambda: worker.get("/v1/model")["replica"]["active"] >= count)


def recommended(worker: WorkerProcess, user: str, **params: Any) -> list[str]:
    answer = worker.get(f"/v1/users/{user}/recommendations", **params)
    return [item["item_id"] for item in answer["items"]]


@pytest.mark.embedded
def test_the_way_of_events_of_an_outside_producer(deployment: Deployment, outside: Outside) -> None:
    """Clicks, a comment, items and poison: state, list, explanation and dead letters; then SIGTERM."""
    worker = deployment.start_worker()
    outside.films()
    poison = {
        "not_json": ("u", b"{broken"),
        "key_mismatch": ("somebody", b'{"user_id": "u", "item_id": "alien", "action": "click"}'),
        "missing_field": ("u", b'{"user_id": "u", "action": "click"}'),
    }
    at = {reason: outside.send("clicks", key, value) for reason, (key, value) in poison.items()}
    click = {"user_id": "u", "item_id": "alien", "action": "click", "ts": time.time()}
    clicked = outside.position("clicks", "u", click)
    wrote = outside.position("comments", "u", {"user_id": "u", "text": "more dark science fiction please"})
    worker.wait_ready()
    catalogue_known(worker, len(FILMS))

    state = worker.get("/v1/users/u/state", at_least=[clicked, wrote])
    assert {e["type"] for e in state["last_events"]} == {"click", "comment"}
    answer = worker.get("/v1/users/u/recommendations", explain=True)
    assert answer["items"][0]["item_id"] == "blade"
    assert "alien" not in [item["item_id"] for item in answer["items"]]
    for item in answer["items"]:
        told = item["explanation"]
        total = told["bias"] + sum(c["value"] for c in told["contributions"]) + told["rest"]
        assert total == pytest.approx(item["logit"], abs=1e-4)
        assert wrote in {"{topic}:{partition}:{offset}".format(**c) for c in told["contributions"]}

    letters = outside.read("clicks.dlq", len(poison))
    found = {}
    for letter in letters:
        headers = dict(letter.headers)
        assert headers["__streams.errors.topic"].decode() == outside.settings.topic("clicks")
        place = (int(headers["__streams.errors.partition"]), int(headers["__streams.errors.offset"]))
        reason = headers["__streams.errors.exception"].decode()
        found[reason] = (place, letter.key.decode(), letter.value)
    assert found == {reason: (at[reason], *poison[reason]) for reason in poison}

    code, seconds = worker.stop()
    assert code == 0, worker.tail()
    assert seconds < 5


@pytest.mark.embedded
def test_a_click_moves_the_list_and_a_withdrawn_item_leaves_it(deployment: Deployment, outside: Outside) -> None:
    worker = deployment.start_worker()
    outside.films()
    worker.wait_ready()
    catalogue_known(worker, len(FILMS))
    before = recommended(worker, "v")
    sent = worker.http.post(
        "/v1/events", json=[{"type": "click", "user_id": "v", "item_id": "amelie", "action": "like"}]
    )
    assert sent.status_code == 202
    (position,) = sent.json()["positions"]
    after = recommended(worker, "v", at_least=position)
    assert set(before) - set(after) == {"amelie"}
    assert after[0] == "notebook"
    outside.send("items", "notebook", None)
    worker.wait_until("withdrawn", lambda: "notebook" not in recommended(worker, "v"))


def nothing_differs(found: dict[str, Any]) -> bool:
    """Rows, examples and item matrix as if nothing had been, and no worker ended but by what was done to it."""
    assert found["broken"] == []
    assert found["examples"] > 100
    assert found["erasures"] > 0 and found["users_gone"] > 0
    assert set(found["exit_codes"]) == {0}
    return bool(found["ended"] == [])


@pytest.mark.embedded
def test_an_item_of_now_is_listed_though_nothing_else_happens(deployment: Deployment, outside: Outside) -> None:
    """It is a candidate for what comes strictly later than its ts, as any question that is asked now."""
    worker = deployment.start_worker()
    outside.films()
    outside.send("items", "solaris", {"item_id": "solaris", "text": FILMS["alien"], "ts": time.time()})
    outside.send("items", "sequel", {"item_id": "sequel", "text": FILMS["alien"], "ts": time.time() + 3600})
    position = outside.position("comments", "v", {"user_id": "v", "text": "a creature in deep space, horror"})
    worker.wait_ready()
    worker.wait_until("the new film", lambda: "solaris" in recommended(worker, "v", at_least=position))
    worker.wait_until("the sequel", lambda: worker.http.get("/v1/items/sequel").status_code == 200)
    assert worker.get("/v1/items/sequel")["candidate"] is False
    assert "sequel" not in recommended(worker, "v")


@pytest.mark.long
def test_a_killed_worker_goes_on_where_it_was(broker: str, tmp_path: Path) -> None:
    """kill -9 in mid-stream, once with the disk deleted."""
    site = chaos.Site(broker, broker)
    prefix = f"kills{next(_numbers)}-"
    found = chaos.disturb(site, tmp_path, kills=3, seed=0, prefix=prefix, surely=["all_ready"])
    assert nothing_differs(found)
    assert (found["kills"], found["wiped"]) == (3, 1)


def test_a_zombie_is_fenced_and_a_cut_network_heals(tmp_path: Path) -> None:
    """One of two workers sleeps through a takeover of its partitions and wakes; then both are cut off for a while."""
    with chaos.site_of("embedded", tmp_path) as site:
        found = chaos.disturb(site, tmp_path, kills=0, workers=2, seed=1, prefix="zombie-", surely=["fence", "cut"])
    assert nothing_differs(found)
    assert found["fenced"] >= 1 and found["faults"]["frozen beyond the session"] >= 1
    assert found["faults"]["network cut"] == 1


@pytest.mark.embedded
def test_an_item_that_no_catalogue_has_named_is_told_by_its_id(deployment: Deployment, outside: Outside) -> None:
    worker = deployment.start_worker()
    worker.wait_ready()
    position = outside.position("clicks", "u", {"user_id": "u", "item_id": "unheard-of", "action": "click"})
    state = worker.get("/v1/users/u/state", at_least=position)
    assert [event["item_id"] for event in state["last_events"]] == ["unheard-of"]


@pytest.mark.embedded
def test_records_in_another_partition_than_their_keys_are_told_of(deployment: Deployment, outside: Outside) -> None:
    """As librdkafka places them unless it is told otherwise: learnt, and not found by a read."""
    told = 'headwater_events_total{{outcome="misplaced",topic="{}"}}'.format
    worker = deployment.start_worker()
    outside.films()
    right = partition_of(b"u", 2)
    click = json.dumps({"user_id": "u", "item_id": "alien", "action": "click"}).encode()
    outside.producer.send(deployment.settings.topic("clicks"), click, b"u", partition=right).get(timeout=10)
    worker.wait_ready()
    worker.wait_until("the click", lambda: worker.get("/v1/users/u/state")["events"] == 1)
    assert told("clicks") not in worker.metrics()
    outside.producer.send(deployment.settings.topic("clicks"), click, b"u", partition=1 - right).get(timeout=10)
    worker.wait_until("the metric", lambda: worker.metrics().get(told("clicks")) == 1)
    assert "another partition than its key's" in worker.tail()
    assert told("items") not in worker.metrics()


# A worker whose texts are encoded by another encoder, to vectors that look alike.
OTHER_ENCODER = """
from bench import words
encoder = words.WordVectors()
encoder.name = "others"
words.run(encoder)
"""


@pytest.mark.embedded
def test_a_worker_with_another_encoder_starts_under_an_app_id_of_its_own_alone(broker: str, tmp_path: Path) -> None:
    with of_words(broker, tmp_path, f"space{next(_numbers)}-") as (made, outside):
        worker = made.start_worker()
        worker.wait_ready()
        outside.films()
        foreign = made.start_worker("foreign", [sys.executable, "-c", OTHER_ENCODER])
        assert foreign.process.wait(60) == 1
        assert "are of the encoder words, and this one is others" in foreign.tail()
        assert "Traceback" not in foreign.tail(), foreign.tail(9000)
        position = outside.position("comments", "v", {"user_id": "v", "text": "a creature in deep space"})
        assert recommended(worker, "v", at_least=position)
        topics.ensure(foreign.settings.model_copy(update={"app_id": "next"}))
        moved = made.start_worker("next", [sys.executable, "-c", OTHER_ENCODER], app_id="next")
        moved.wait_ready()  # beside the one that answers, until it has learnt what there is
        moved.wait_until("its own list", lambda: bool(recommended(moved, "v", at_least=position)))
        names = [one.get("/v1/model")["encoder"]["name"] for one in (worker, moved)]
        assert names == ["words", "others"]
        assert [one.stop()[0] for one in (worker, moved)] == [0, 0]
        again = made.start_worker()
        again.wait_ready()  # and its own comes back
        assert again.stop()[0] == 0


@pytest.mark.embedded
def test_two_workers_share_users_and_answer_for_each_other(deployment: Deployment, outside: Outside) -> None:
    """Any worker answers for any user; when one is killed, the other takes all its users over."""
    outside.films()
    one = deployment.start_worker("one")
    one.wait_ready()
    two = deployment.start_worker("two")
    users = [f"user{n}" for n in range(12)]
    places = {}
    for user in users:
        partition, offset = outside.send("clicks", user, {"user_id": user, "item_id": "alien", "action": "click"})
        places[user] = f"clicks:{partition}:{offset}"
    assert {partition_of(u.encode(), 2) for u in users} == {0, 1}

    def shared() -> bool:
        held = [set(w.applied("users")) for w in (one, two)]
        return sorted(map(len, held)) == [1, 1] and held[0] | held[1] == {0, 1}

    one.wait_until("two workers with one partition each", shared)

    def answers(worker: WorkerProcess) -> bool:
        return all(worker.get(f"/v1/users/{user}/state", at_least=places[user])["events"] == 1 for user in users)

    for worker in (one, two):
        worker.wait_until("all users from one worker", lambda w=worker: answers(w))  # type: ignore[misc]
    learns = [worker for worker in (one, two) if "learner" in {part["kind"] for part in worker.digests()}]
    assert len(learns) == 1
    told = [worker.get("/v1/model") for worker in (one, two)]
    assert told[0]["learner"] is not None and told[0]["prequential"]["model"]
    assert [told[0][name] for name in LEARNERS] == [told[1][name] for name in LEARNERS], "whichever is asked"
    two.kill()
    one.wait_until("takeover", lambda: len(one.applied("users")) == 2 and answers(one))


@pytest.mark.embedded
def test_a_request_is_answered_or_told_to_come_back_while_nothing_is_assigned(deployment: Deployment) -> None:
    worker = deployment.start_worker()
    seen: set[int] = set()

    def ready() -> bool:
        answer = worker.http.get("/v1/users/u/recommendations")
        seen.add(answer.status_code)
        if answer.status_code == 503:
            assert int(answer.headers["retry-after"]) >= 1
        return answer.status_code == 200

    worker.wait_until("an answer", ready)
    assert seen <= {200, 503}


def test_what_kafkas_console_types_ends_in_state_list_and_dead_letters(kafka_node: KafkaNode, tmp_path: Path) -> None:
    made = Deployment(kafka_node.address, tmp_path, topic_prefix="console-", partitions=2, rank_sample=1.0)
    made.create_topics()
    worker = made.start_worker()
    try:
        films = [f"{i}\t" + json.dumps({"item_id": i, "text": text}) for i, text in FILMS.items()]
        kafka_node.type_records("console-items", films)
        clicks = ['u\t{"user_id": "u", "item_id": "alien", "action": "click"}', "u\tthis is not an event"]
        kafka_node.type_records("console-clicks", clicks)
        kafka_node.type_records("console-comments", ['u\t{"user_id": "u", "text": "dark science fiction"}'])
        worker.wait_ready()
        catalogue_known(worker, len(FILMS))

        def both() -> bool:
            return bool(worker.get("/v1/users/u/state")["events"] == 2)

        worker.wait_until("the click and the comment", both)
        assert recommended(worker, "u")[0] == "blade"
        (letter,) = kafka_node.read_records("console-clicks.dlq", 1)
        assert "this is not an event" in letter
        assert "__streams.errors.exception:not_json" in letter
        here = {"localhost:9092": kafka_node.address, "--topic ": "--topic console-"}
        as_told = example("bash", "kafka-console-producer.sh", here)
        run_shell(as_told, str(kafka_node.console_producer(tmp_path / "bin")))
        here = {"localhost:9092": kafka_node.address, "-t clicks": "-t console-clicks"}
        run_shell(example("bash", "kcat", here))
        worker.wait_until("the README's events", lambda: worker.get("/v1/users/u42/state")["events"] == 3)
        worker.wait_until("the README's item", lambda: worker.get("/v1/items/50")["text"].startswith("Star Wars"))
        assert worker.stop()[0] == 0
    finally:
        made.close()


def test_transactions_leave_legal_gaps_and_aborted_events_are_never_seen(kafka_node: KafkaNode, tmp_path: Path) -> None:
    """One transaction in four is aborted, each is followed by a control record: offsets have gaps, no event is lost."""
    made = Deployment(kafka_node.address, tmp_path, topic_prefix="transactions-", partitions=1, rank_sample=0.0)
    made.create_topics()
    worker = made.start_worker()
    try:
        asyncio.run(_transactions(made.settings))
        worker.wait_ready()
        committed = [n for n in range(TRANSACTIONS) if n % 4]
        worker.wait_until("the last event", lambda: worker.get("/v1/users/last/state")["events"] == 1)
        for n in range(TRANSACTIONS):
            assert worker.get(f"/v1/users/user{n}/state")["events"] == (2 if n in committed else 0)
        worker.kill()
        again = made.start_worker()  # seeks into the middle of gaps
        again.wait_ready()
        asyncio.run(_transactions(made.settings, first=TRANSACTIONS))
        again.wait_until("the last event again", lambda: again.get("/v1/users/last/state")["events"] == 2)
        for n in range(2 * TRANSACTIONS):
            assert again.get(f"/v1/users/user{n}/state")["events"] == (2 if n % 4 else 0)
    finally:
        made.close()


async def _transactions(settings: Settings, first: int = 0) -> None:
    producer = AIOKafkaProducer(**settings.kafka_options(), transactional_id=f"outside-{first}")
    await producer.start()
    try:
        for n in range(first, first + TRANSACTIONS):
            await producer.begin_transaction()
            for item in ("alien", "blade"):
                event = {"user_id": f"user{n}", "item_id": item, "action": "click"}
                await producer.send_and_wait(settings.topic("clicks"), json.dumps(event).encode(), b"user%d" % n)
            await (producer.commit_transaction() if n % 4 else producer.abort_transaction())
        await producer.begin_transaction()
        event = {"user_id": "last", "item_id": f"item{first}", "action": "click"}
        await producer.send_and_wait(settings.topic("clicks"), json.dumps(event).encode(), b"last")
        await producer.commit_transaction()
    finally:
        await producer.stop()


# A worker whose restore outlasts its requests to the broker, its session and the wait before it seeks.
SLOW_RESTORE = """
import asyncio, runpy
from streams import app, kafka
app.REQUEST_TIMEOUT_S = 6.0
read, begun = kafka.ChangelogTopic.read, set()

async def slow_read(self, start, stop):
    if (self.topic, self.partition) not in begun:
        begun.add((self.topic, self.partition))
        await asyncio.sleep(13)
    async for batch in read(self, start, stop):
        yield batch

kafka.ChangelogTopic.read = slow_read
runpy.run_module("bench.words", run_name="__main__")
"""


def test_a_restore_that_outlasts_request_timeout_and_session_ends_well(kafka_node: KafkaNode, tmp_path: Path) -> None:
    with of_words(kafka_node.address, tmp_path, "slow-") as (made, outside):
        worker = made.start_worker()
        worker.wait_ready()
        outside.films()
        for film in FILMS:
            _, last = outside.send("clicks", "u", {"user_id": "u", "item_id": film, "action": "click"})
        worker.wait_until("all applied", lambda: worker.applied("users")[0]["clicks"] == last)
        worker.kill()
        shutil.rmtree(made.state_dir())
        slow = made.start_worker(command=[sys.executable, "-c", SLOW_RESTORE])
        started = time.monotonic()
        outside.send("clicks", "v", {"user_id": "v", "item_id": "alien", "action": "click"})
        slow.wait_ready()
        assert time.monotonic() - started > 2 * made.settings.session_timeout_s
        slow.wait_until("what came meanwhile", lambda: slow.get("/v1/users/v/state")["events"] == 1)
        assert slow.get("/v1/users/u/state")["events"] == len(FILMS)
        assert slow.stop()[0] == 0


# A worker whose group takes no commit. It says so on its output, and goes on.
NO_COMMITS = """
import runpy
from aiokafka import AIOKafkaConsumer
from aiokafka.errors import CommitFailedError

async def refuse(self, offsets=None):
    print("COMMIT REFUSED", flush=True)
    raise CommitFailedError("not now")

AIOKafkaConsumer.commit = refuse
runpy.run_module("bench.words", run_name="__main__")
"""


@pytest.mark.embedded
def test_a_worker_whose_commits_fail_goes_on_and_ends_with_0(broker: str, tmp_path: Path) -> None:
    def learnt_and_refused(count: int) -> bool:
        events = worker.get("/v1/users/u/state")["events"]
        return events == count and worker.tail(1 << 20).count("REFUSED") >= count

    with of_words(broker, tmp_path, f"commit{next(_numbers)}-") as (made, outside):
        worker = made.start_worker(command=[sys.executable, "-c", NO_COMMITS])
        worker.wait_ready()
        outside.films()
        for wanted in (1, 2):  # the second is learnt by a worker that has been refused
            outside.send("clicks", "u", {"user_id": "u", "item_id": "alien", "action": "click"})
            worker.wait_until("it and a refusal", partial(learnt_and_refused, wanted))
        assert worker.stop()[0] == 0


async def test_offsets_that_were_not_taken_are_committed_with_the_next(make_settings: Callable[..., Settings]) -> None:
    class Group(PlainSource):
        def __init__(self, settings: Settings) -> None:
            super().__init__(settings)
            self.told: list[dict[TP, int]] = []
            self.takes = False

        def assignment(self) -> set[TP]:
            return {TP("clicks", 0), TP("clicks", 1)}

        async def commit(self, offsets: Mapping[TP, int]) -> bool:
            self.told.append(dict(offsets))
            if not self.takes:
                worker._durable("clicks", 1, 8)  # becomes durable while the broker is asked
            return self.takes

    settings = make_settings(broker="127.0.0.1:1")
    source = Group(settings)
    worker = Worker(settings, lambda: 0.0, PlainVectors(), source, lambda topic, partition: None)
    for partition, offset in ((0, 5), (1, 7), (2, 9)):
        worker._durable("clicks", partition, offset)
    await worker.commit()
    source.takes = True
    await worker.commit()
    await worker.commit()
    assert source.told == [{TP("clicks", 0): 5, TP("clicks", 1): 7}, {TP("clicks", 0): 5, TP("clicks", 1): 8}]
    worker.encoding.close()


@pytest.mark.embedded
def test_a_backlog_above_the_inbox_pauses_the_partition_and_is_worked_off(broker: str, tmp_path: Path) -> None:
    made = Deployment(broker, tmp_path, topic_prefix=f"backlog{next(_numbers)}-", partitions=1, rank_sample=0.0)
    made.create_topics()
    count = INBOX_RECORDS_MAX + 5_000
    asyncio.run(load.publish_items(made.settings, 50))
    asyncio.run(load.publish_events(made.settings, load.Stream(50, 500), count))
    worker = made.start_worker()
    try:
        worker.wait_ready()
        worker.wait_until("the backlog", lambda: worker.applied("users")[0].get("clicks", -1) == count - 1)
        assert worker.stop()[0] == 0
    finally:
        made.close()


@pytest.mark.embedded
def test_metrics_and_health_of_a_running_worker(deployment: Deployment, outside: Outside) -> None:
    worker = deployment.start_worker()
    outside.films()
    outside.send("clicks", "u", {"user_id": "u", "item_id": "alien", "action": "click", "ts": time.time()})
    outside.send("clicks", "u", b"poison")
    worker.wait_ready()
    for told in (
        'headwater_dead_letters_total{reason="not_json",topic="clicks"} 1.0',
        'headwater_events_total{outcome="accepted",topic="clicks"} 1.0',
        'headwater_events_total{outcome="accepted",topic="items"} 4.0',
    ):
        worker.wait_until(told, lambda told=told: told in worker.http.get("/metrics").text)  # type: ignore[misc]
    assert httpx.get(f"{worker.settings.http_url()}/healthz", trust_env=False).json() == {"status": "ok"}
