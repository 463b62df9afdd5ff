"""Erasing a user from a running worker: the row, the changelog, the disk, the model; the certificate; kill -9."""

import asyncio
import itertools
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import verdict
from bench.claims import learn_without
from bench.deployment import Deployment, WorkerProcess
from model.adapter import Adapter
from model.learner import LearnerConfig
from streams import examples, kafka
from streams.pipeline import ItemLearner
from streams.trainer import ADAPTER_KEY
from tests.test_verify import verified
from tests.test_worker import FILMS, Outside, catalogue_known

TEXT_DIM = 384
USER = "somebody-to-forget"
_numbers = itertools.count()


@pytest.fixture
def deployment(broker: str, tmp_path: Path) -> Iterator[Deployment]:
    made = Deployment(broker, tmp_path, topic_prefix=f"forget{next(_numbers)}-", partitions=1, rank_sample=1.0)
    made.create_topics()
    yield made
    made.close()


@pytest.fixture
def outside(deployment: Deployment) -> Iterator[Outside]:
    client = Outside(deployment)
    yield client
    client.close()


def stream(outside: Outside, user: str, films: list[str]) -> list[str]:
    """Clicks on the films and a comment; their positions."""
    clicks = [{"user_id": user, "item_id": film, "action": "click", "ts": time.time()} for film in films]
    sent = [outside.position("clicks", user, click) for click in clicks]
    words = {"user_id": user, "text": f"{films[0]} again, please", "ts": time.time()}
    return [*sent, outside.position("comments", user, words)]


def complete(worker: WorkerProcess, name: str, seconds_max: float = 60.0) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def is_complete() -> bool:
        nonlocal found
        answer = worker.http.get(f"/v1/erasures/{name}")
        if answer.status_code != 200:
            return False
        found = answer.json()
        return bool(found["status"] == "complete")

    worker.wait_until(f"{name} complete", is_complete, seconds_max)
    return found


def changelog(deployment: Deployment) -> list[Any]:
    settings = deployment.settings

    async def read() -> list[Any]:
        topic = settings.internal_topic("users-changelog")
        log = kafka.ChangelogTopic(topic, 0, kafka.Producer(settings.kafka_options()), settings.kafka_options())
        return [record async for batch in log.read(await log.first(), None) for record in batch]

    return asyncio.run(read())


def messages(deployment: Deployment) -> list[tuple[int, bytes]]:
    settings = deployment.settings
    topic = settings.internal_topic("examples")

    async def read() -> list[tuple[int, bytes]]:
        end = await kafka.log_end(settings.kafka_options(), topic, 0)
        log = kafka.read_log(settings.kafka_options(), topic, 0, 0, end - 1)
        return [(record.offset, record.value or b"") async for batch in log for record in batch]

    return asyncio.run(read())


def gone(worker: WorkerProcess, folder: Path, name: str) -> None:
    """No file names the user. RocksDB unlinks the files that a flush has replaced a moment after it."""
    told = f"{name} is in no file of {folder}"
    worker.wait_until(told, lambda: verdict.files_that_name([name.encode()], [folder]) == [], 60)


def cut(log: list[tuple[int, bytes]], user_positions: set[int]) -> ItemLearner:
    """A learner of that log without these examples."""
    deployed = ItemLearner(LEARNER, TEXT_DIM)
    learn_without(deployed, log, 0, user_positions)
    return deployed


LEARNER = LearnerConfig(text_dim=TEXT_DIM)


@pytest.mark.long
def test_a_user_is_forgotten_everywhere_and_by_the_model(
    deployment: Deployment, outside: Outside, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Row, cache, changelog, disk and model; the certificate tells what was where; who comes back begins anew."""
    worker = deployment.start_worker()
    outside.films()
    worker.wait_ready()
    catalogue_known(worker, len(FILMS))
    sent = stream(outside, USER, ["alien", "amelie"])
    others = stream(outside, "other", ["alien", "blade"])
    sent.append(outside.position("clicks", USER, {"user_id": USER, "item_id": "notebook", "action": "click"}))
    assert worker.get(f"/v1/users/{USER}/state", at_least=sent)["events"] == 4
    assert worker.get("/v1/users/other/state", at_least=others)["events"] == 3
    poison = outside.position("clicks", USER, b"poison")
    worker.get(f"/v1/users/{USER}/state", at_least=poison)  # its dead letter is in the log

    asked = worker.http.delete(f"/v1/users/{USER}", params={"unlearn": "true"})
    assert asked.status_code == 202
    name = asked.json()["erasure_id"]
    assert asked.headers["location"] == f"/v1/erasures/{name}"
    assert worker.get(f"/v1/users/{USER}/state", at_least=name)["events"] == 0
    told = complete(worker, name)

    assert (told["state"]["events"], told["state"]["behaviours"], told["state"]["comments"]) == (4, 3, 1)
    users = next(d for d in worker.digests() if d["kind"] == "users")
    assert (told["state"]["digest"], told["state"]["applied"]) == (users["digest"], users["applied"])
    assert {(r["topic"], r["records"]) for r in told["remains"]} == {
        ("clicks", 4), ("comments", 1), ("erasures", 1), ("clicks.dlq", 1),
    }  # fmt: skip
    naming = [record for record in changelog(deployment) if USER.encode() in record.key]
    assert told["changelog"]["naming"] == len(naming)
    if told["changelog"]["kept"] is None:  # Apache Kafka deletes records, the embedded broker does not
        assert naming == []
    gone(worker, deployment.state_dir() / "users-0", USER)
    assert worker.get("/v1/users/other/state")["events"] == 3

    model = told["model"]
    assert model["exact"] and model["removed"] == 3
    learner = next(d for d in worker.digests() if d["kind"] == "learner")
    assert learner["digest"] == model["digest"]
    log = messages(deployment)
    assert cut(log, own_positions(deployment)).learner.digest() == model["digest"]
    assert USER.encode() not in b"".join(message for _, message in log)
    text = worker.http.get("/metrics").text
    assert "headwater_erasures_total 1.0" in text

    code, verdicts = verified(worker, monkeypatch, capsys)
    assert code == 0, verdicts

    back = outside.position("clicks", USER, {"user_id": USER, "item_id": "alien", "action": "click"})
    assert worker.get(f"/v1/users/{USER}/state", at_least=back)["events"] == 1
    worker.wait_until("not found", lambda: worker.http.get("/v1/erasures/erasures:0:77").status_code == 404)
    assert worker.stop()[0] == 0


@pytest.mark.embedded
def test_an_adapter_in_use_that_may_have_learnt_from_the_user_is_in_the_certificate(
    deployment: Deployment, outside: Outside
) -> None:
    """All but the adapter is unlearnt, so it is not called exact; from who had no example, it cannot have learnt."""
    worker = deployment.start_worker()
    outside.films()
    worker.wait_ready()
    catalogue_known(worker, len(FILMS))
    for user in (USER, "other"):
        sent = stream(outside, user, ["alien", "amelie"])
        assert worker.get(f"/v1/users/{user}/state", at_least=sent)["events"] == 3
    left, right = np.random.default_rng(1).standard_normal((2, TEXT_DIM, 4)).astype(np.float32) / 6
    adapter = Adapter(worker.get("/v1/model")["encoder"]["name"], left, right, 1.2)
    asyncio.run(switch_to(deployment, adapter))
    worker.wait_until("the switch", lambda: worker.get("/v1/model")["encoder"]["adapter"] == adapter.name)

    def forgotten(user: str) -> dict[str, Any]:
        asked = worker.http.delete(f"/v1/users/{user}", params={"unlearn": "true"})
        told: dict[str, Any] = complete(worker, asked.json()["erasure_id"])["model"]
        return told

    nobody, model, later = forgotten("nobody"), forgotten(USER), forgotten("nobody else")
    assert [(one["exact"], one["removed"]) for one in (nobody, later)] == [(True, 0)] * 2
    assert (model["exact"], model["removed"]) == (False, 2) and adapter.name in model["reason"]
    assert cut(messages(deployment), own_positions(deployment)).learner.digest() == model["digest"]
    assert worker.get("/v1/model")["encoder"]["adapter"] == adapter.name
    assert worker.stop()[0] == 0


async def switch_to(deployment: Deployment, adapter: Adapter) -> None:
    """As the trainer does."""
    producer = kafka.Producer(deployment.settings.kafka_options())
    await producer.start()
    topic = deployment.settings.internal_topic("examples")
    await producer.send(topic, 0, [(ADAPTER_KEY, examples.pack_adapter(adapter))])
    await producer.stop()


def own_positions(deployment: Deployment) -> set[int]:
    """Of the user's records on `clicks` and `comments`."""
    settings = deployment.settings

    async def read() -> set[int]:
        found = set()
        for code, topic in ((0, "clicks"), (1, "comments")):
            async for offset, key, _ in kafka.keys(settings.kafka_options(), settings.topic(topic), 0):
                if key == USER.encode():
                    found.add(code << 56 | offset)
        return found

    return asyncio.run(read())


@pytest.mark.long
def test_an_erasure_outlives_kill_9_and_the_loss_of_the_disk(deployment: Deployment, outside: Outside) -> None:
    worker = deployment.start_worker()
    outside.films()
    worker.wait_ready()
    catalogue_known(worker, len(FILMS))
    for user, films in ((USER, ["alien", "amelie", "notebook"]), ("other", ["alien", "blade"])):
        sent = stream(outside, user, films)
        assert worker.get(f"/v1/users/{user}/state", at_least=sent)["events"] == len(films) + 1
    name = worker.http.delete(f"/v1/users/{USER}", params={"unlearn": "true"}).json()["erasure_id"]
    worker.kill()
    worker = deployment.start_worker()
    worker.wait_until("under way", lambda: worker.get(f"/v1/erasures/{name}")["status"] != "pending")
    worker.kill()
    shutil.rmtree(deployment.state_dir())
    worker = deployment.start_worker()
    worker.wait_ready()
    told = complete(worker, name)
    assert told["state"]["events"] == 4
    assert told["changelog"]["naming"] == sum(USER.encode() in record.key for record in changelog(deployment))
    gone(worker, deployment.state_dir() / "users-0", USER)
    assert worker.get(f"/v1/users/{USER}/state")["events"] == 0
    assert worker.get("/v1/users/other/state")["events"] == 3
    learner = next(d for d in worker.digests() if d["kind"] == "learner")
    assert told["model"]["exact"] and told["model"]["removed"] == 3
    assert learner["digest"] == told["model"]["digest"]
    assert cut(messages(deployment), own_positions(deployment)).learner.digest() == learner["digest"]
    assert worker.stop()[0] == 0
