"""A live switch of the encoder's adapter: a real worker that answers all the time, and a real trainer beside it."""

import asyncio
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from kafka import KafkaProducer
from typer.testing import CliRunner

from bench.deployment import Deployment
from model.adapter import Adapter
from streams import checkpoints, kafka
from streams.__main__ import app
from streams.broker import free_port
from streams.checkpoints import Checkpoints, Manifest
from streams.pipeline import ItemLearner
from streams.settings import environment
from tests.test_worker import FILMS

USERS = 12
BEHAVIOURS = 2 * USERS + 1  # each user's clicks, and a comment about an item


@pytest.fixture
def deployment(broker: str, tmp_path: Path) -> Iterator[Deployment]:
    made = Deployment(
        broker, tmp_path, topic_prefix=f"switch-{tmp_path.name}-", partitions=1, rank_sample=1.0, learner_rank_items=0,
        checkpoints=str(tmp_path / "checkpoints"), trainer_dir=str(tmp_path / "trainer"), trainer_port=free_port(),
    )  # fmt: skip
    made.create_topics()
    yield made
    made.close()


def publish(deployment: Deployment) -> None:
    producer = KafkaProducer(**deployment.settings.kafka_options())

    def send(topic: str, key: str, value: dict[str, Any]) -> None:
        producer.send(deployment.settings.topic(topic), json.dumps(value).encode(), key=key.encode())

    for item_id, text in FILMS.items():
        send("items", item_id, {"item_id": item_id, "text": text})
    producer.flush()
    for user in range(USERS):
        for at, item_id in enumerate(list(FILMS)[user % 2 :: 2]):
            ts = 1_700_000_000 + 60 * user + at
            send("clicks", f"u{user}", {"user_id": f"u{user}", "item_id": item_id, "action": "click", "ts": ts})
    words = "a creature in deep space"
    send("comments", "u1", {"user_id": "u1", "item_id": "alien", "text": words, "ts": 1_700_000_900})
    producer.flush()
    producer.close()


class Reader(threading.Thread):
    """Asks for a user's list without a pause; keeps every answer's status and scores."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url = url
        self.answers: list[tuple[int, dict[str, float]]] = []
        self.done = threading.Event()

    def run(self) -> None:
        with httpx.Client(base_url=self.url, timeout=10, trust_env=False) as client:
            while not self.done.is_set():
                answer = client.get("/v1/users/u1/recommendations", params={"exclude_seen": False})
                items = answer.json().get("items", [])
                self.answers.append((answer.status_code, {item["item_id"]: item["logit"] for item in items}))


async def replayed(deployment: Deployment, offset: int, base: str) -> ItemLearner:
    """The learner, from the examples log alone."""
    settings = deployment.settings
    learner = ItemLearner(settings.learner_config(384), 384, base)
    async for batch in kafka.read_log(settings.kafka_options(), settings.internal_topic("examples"), 0, 0, offset):
        for record in batch:
            learner.learn(record.offset, record.value or b"")
    return learner


@pytest.mark.embedded
def test_switch_under_load_loses_no_answer_and_is_in_the_log(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = deployment.start_worker()
    worker.wait_ready()
    publish(deployment)

    def model() -> Any:
        return worker.get("/v1/model")

    def learnt() -> bool:
        replica = model()["replica"]
        return (replica["positives"], replica["active"]) == (BEHAVIOURS, len(FILMS))

    worker.wait_until("all learnt, and in the replica", learnt)
    base = model()["encoder"]["name"]
    left, right = np.random.default_rng(1).standard_normal((2, 384, 4)).astype(np.float32) / 6
    adapter = Adapter(base, left, right, 1.2)
    name = checkpoints.name_of(1, adapter)
    Checkpoints(deployment.settings.checkpoints).add(adapter, Manifest(
        name=name, adapter=adapter.name, base=base, parent="", offset=1, rank=4, digest="", created=0.0,
    ))  # fmt: skip
    told = {"broker": deployment.settings.broker, "topic_prefix": deployment.settings.topic_prefix, "partitions": "1",
            "checkpoints": deployment.settings.checkpoints}  # fmt: skip
    for variable, value in environment(told).items():
        monkeypatch.setenv(variable, value)
    reader = Reader(worker.settings.http_url())
    reader.start()
    worker.wait_until("some answers", lambda: len(reader.answers) > 5)
    done = CliRunner().invoke(app, ["checkpoints", "promote", name])
    assert done.exit_code == 0, done.output
    worker.wait_until("the switch", lambda: model()["encoder"]["adapter"] == adapter.name)
    answered = len(reader.answers)
    worker.wait_until("answers after it", lambda: len(reader.answers) > answered + 5)
    reader.done.set()
    reader.join(10)
    assert {status for status, _ in reader.answers} == {200}
    before, after = reader.answers[0][1], reader.answers[-1][1]
    assert before.keys() == after.keys() == FILMS.keys() and before != after
    between = [
        scores for _, scores in reader.answers if set(scores.items()) not in map(set, (before.items(), after.items()))
    ]
    assert all(
        abs(scores[i] - before[i]) < 0.05 or abs(scores[i] - after[i]) < 0.05 for scores in between for i in scores
    )

    [learner] = [part for part in worker.digests() if part["kind"] == "learner"]
    again = asyncio.run(replayed(deployment, learner["applied"]["examples"], base))
    assert again.learner.digest() == learner["digest"]
    worker.kill()
    worker = deployment.start_worker()
    worker.wait_ready()
    worker.wait_until("the adapter again", lambda: model()["encoder"]["adapter"] == adapter.name)
    assert [part["digest"] for part in worker.digests() if part["kind"] == "learner"] == [learner["digest"]]
    assert [(told["name"], told["state"]) for told in model()["encoder"]["checkpoints"]] == [(name, "current")]
    _check_trainer(deployment, adapter.name)
    decided = Checkpoints(deployment.settings.checkpoints).get(name).decisions
    assert decided[0]["kind"] == "switched"
    worker.wait_until("its decision", lambda: model()["encoder"]["checkpoints"][0]["decisions"] == decided)
    assert worker.stop()[0] == 0


@pytest.mark.embedded
def test_what_is_announced_of_checkpoints_is_told(broker: str, tmp_path: Path) -> None:
    """A candidate's way, as a trainer tells it, beside another encoder's and what is no manifest."""
    made = Deployment(broker, tmp_path, topic_prefix=f"told-{tmp_path.name}-", partitions=1, module="bench.words")
    made.create_topics()
    producer = KafkaProducer(**made.settings.kafka_options())
    duel = {"tests": 655, "mean_difference": 0.01, "log10_e_better": 2.5, "log10_e_worse": 0.1, "verdict": "better"}
    shadow = {
        "name": "000000000009-abc", "adapter": "abc", "parent": "", "offset": 9, "created": 1.7e9, "state": "shadow",
        "training": {"messages": 4, "examples": 99, "loss": 5.5, "loss_frozen": 5.75, "loss_champion": 5.75},
        "decisions": [],
    }  # fmt: skip
    promoted = {**shadow, "decisions": [{"kind": "promote", "position": 20, "alpha": 0.005, **duel}]}

    def announce(told: dict[str, Any], base: str = "words") -> None:
        value = json.dumps({**told, "base": base, "rank": 8, "digest": "d", "version": 1}).encode()
        producer.send(made.settings.topic("encoder-checkpoints"), value, key=base.encode()).get(timeout=10)

    def checkpoints_told() -> Any:
        encoder = worker.get("/v1/model")["encoder"]
        assert (encoder["name"], encoder["adapter"]) == ("words", None)
        return encoder["checkpoints"]

    try:
        announce(shadow)
        worker = made.start_worker()
        worker.wait_ready()
        worker.wait_until("the candidate", lambda: checkpoints_told() == [shadow])
        tag = worker.http.get("/v1/model").headers["etag"]
        producer.send(made.settings.topic("encoder-checkpoints"), b"{", key=b"words").get(timeout=10)
        announce({**shadow, "name": "000000000010-def"}, base="others")
        announce(promoted)
        worker.wait_until("the evidence", lambda: checkpoints_told() == [promoted])
        assert worker.http.get("/v1/model", headers={"If-None-Match": tag}).status_code == 200, "it is news"
        assert worker.log_file.read_text().count("encoder-checkpoints cannot be read") == 1
        assert worker.stop()[0] == 0
    finally:
        producer.close()
        made.close()


def _check_trainer(deployment: Deployment, adapter: str) -> None:
    """A trainer takes in the log, tells what is in use, and stops in order with its state saved."""
    command = [sys.executable, "-m", "streams", "trainer"]
    url = f"http://127.0.0.1:{deployment.settings.trainer_port}/metrics"

    def told() -> bool:
        return f'adapter="{adapter}"' in httpx.get(url, timeout=5, trust_env=False).text

    trainer = deployment.start_worker("trainer", command)
    trainer.wait_until("the trainer knows the adapter", told)
    assert trainer.stop()[0] == 0
    assert (deployment.settings.trainer_dir / "tuning.msgpack").stat().st_size > 0
