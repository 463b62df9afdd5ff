"""What is asked of a real worker beside a real broker: what-if, the user's own words, lists of the past, and all
that a fuzzer thinks of.

    python -m bench fuzz --requests 10000

asks that much of a worker of its own.
"""

import contextlib
import io
import json
import re
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from kafka import KafkaProducer

from bench import fuzz
from bench.deployment import Deployment, WorkerProcess
from bench.fuzz import FILMS
from headwater import Click, Client, Comment
from model.encoder import Encoder
from streams import kafka, rebuild, tokens
from streams.explain import CannotRebuildError, rebuild_list
from streams.openapi import OPERATIONS
from tests.readme import example, run_shell

READERS = 6
START_S = time.time() - 1000


class Asked(NamedTuple):
    """A worker with a quiet model, and where each reader's events are in the log."""

    worker: WorkerProcess
    positions: dict[str, list[str]]


@pytest.fixture(scope="module")
def asked(embedded_broker: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    deployment = Deployment(
        embedded_broker, tmp_path_factory.mktemp("asking"), topic_prefix="asking-", partitions=2, rank_sample=1.0
    )
    try:
        deployment.create_topics()
        producer = KafkaProducer(**deployment.settings.kafka_options())
        for item_id, text in FILMS.items():
            value = json.dumps({"item_id": item_id, "text": text}).encode()
            producer.send(deployment.settings.topic("items"), value, key=item_id.encode()).get(timeout=10)
        producer.close()
        worker = deployment.start_worker()
        worker.wait_ready()
        worker.wait_until("the catalogue", lambda: worker.get("/v1/model")["replica"]["active"] == len(FILMS))
        positions = {}
        for n in range(READERS):
            positions[f"reader-{n}"] = send(worker, story(f"reader-{n}", n))
            positions[f"double-{n}"] = send(worker, story(f"double-{n}", n, without=n, with_more=True))
        states = [worker.get(f"/v1/users/{user}/state", at_least=own) for user, own in positions.items()]
        made = sum(state["positives"] for state in states)
        worker.wait_until("all learnt", lambda: worker.get("/v1/model")["replica"]["positives"] == made)
        yield Asked(worker, positions)
    finally:
        deployment.close()


def story(user: str, n: int, without: int | None = None, with_more: bool = False) -> list[dict[str, Any]]:
    """Four clicks and two comments of a user; with one of them left out, and with one more."""
    films = list(FILMS)
    events: list[dict[str, Any]] = [
        {"type": "click", "user_id": user, "item_id": films[(n + 2 * k) % len(films)], "action": "like",
         "ts": START_S + k} for k in range(4)
    ]  # fmt: skip
    events.insert(2, {"type": "comment", "user_id": user, "text": f"deep space, number {n}", "ts": START_S + 1.5})
    events.append({"type": "comment", "user_id": user, "text": "no romance, please", "ts": START_S + 9})
    left = [event for at, event in enumerate(events) if at != without]
    return [*left, *more(user)] if with_more else left


def more(user: str) -> list[dict[str, Any]]:
    return [
        {"type": "comment", "user_id": user, "text": "a detective in a dark city", "ts": START_S + 50},
        {"type": "click", "user_id": user, "item_id": "up", "action": "view", "ts": START_S + 60},
    ]


def send(worker: WorkerProcess, events: list[dict[str, Any]]) -> list[str]:
    answer = worker.http.post("/v1/events", json=events)
    assert answer.status_code == 202, answer.text
    positions: list[str] = answer.json()["positions"]
    return positions


def test_a_what_if_is_what_really_publishing_those_events_gives(asked: Asked) -> None:
    worker = asked.worker
    for n in range(READERS):
        body = {"without": [asked.positions[f"reader-{n}"][n]], "with": more(f"reader-{n}")}
        answer = worker.http.post(f"/v1/users/reader-{n}/what-if", params={"exclude_seen": False}, json=body)
        told = answer.json()
        real = worker.get(f"/v1/users/double-{n}/recommendations", exclude_seen=False)
        as_it_is = worker.get(f"/v1/users/reader-{n}/recommendations", exclude_seen=False)
        assert told["exact"] and told["model_version"] == real["model_version"]
        assert [i["item_id"] for i in told["items"]] == [i["item_id"] for i in real["items"]]
        logits, theirs, before = ([i["logit"] for i in a["items"]] for a in (told, real, as_it_is))
        assert logits == pytest.approx(theirs, abs=1e-5)
        assert logits != pytest.approx(before, abs=1e-3), "another list than the user's own"


def test_a_users_own_words_come_from_the_log(asked: Asked) -> None:
    query = {"explain": True, "words": True, "parts": True}
    told: list[list[dict[str, Any]]] = []  # the contributions of each item

    def is_told() -> bool:
        """Words that the log does not give in time are left out: they are asked for again."""
        items = asked.worker.get("/v1/users/reader-3/recommendations", **query)["items"]
        told[:] = [item["explanation"]["contributions"] for item in items]
        return all("words" in c for contributions in told for c in contributions if c["type"] == "comment")

    asked.worker.wait_until("the words", is_told)
    for contributions in told:
        words = [c["words"] for c in contributions if c["type"] == "comment"]
        assert words == ["no romance, please", "deep space, number 3"]
        assert not any("words" in c for c in contributions if c["type"] == "click")


def test_words_that_were_sent_without_a_time_come_from_the_log_too(asked: Asked) -> None:
    sent = send(asked.worker, [{"type": "comment", "user_id": "timeless", "text": "whenever it rains"}])

    def is_told() -> bool:
        query = {"explain": True, "words": True, "limit": 1, "at_least": sent}
        (item,) = asked.worker.get("/v1/users/timeless/recommendations", **query)["items"]
        return [c.get("words") for c in item["explanation"]["contributions"]] == ["whenever it rains"]

    asked.worker.wait_until("the words", is_told, 30)


def test_tokens_of_a_run_are_made_again_bit_for_bit(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 lists, each of another moment of a stream that goes on, and of a user of whom nothing is known."""
    worker, settings = asked.worker, asked.worker.settings
    told = [worker.get("/v1/users/nobody/recommendations", limit=4)["token"]]
    for n in range(19):
        user = f"reader-{n % READERS}"
        comment = {"type": "comment", "user_id": user, "text": f"thought {n} of a city", "item_id": "heat"}
        click = {"type": "click", "user_id": user, "item_id": list(FILMS)[n % len(FILMS)], "action": "view"}
        sent = send(worker, [comment, click] if n % 3 else [click])
        query = {"limit": 1 + n % 7, "exclude_seen": n % 2 == 0, "explain": n % 4 == 0, "at_least": sent}
        told.append(worker.get(f"/v1/users/{user}/recommendations", **query)["token"])
    items = ["up", "alien", "heat"]
    ranked = worker.http.post("/v1/rank", json={"user_id": "reader-1", "item_ids": items}).json()["token"]
    encoder = Encoder(settings.encoder)
    stages: dict[str, tuple[int, int]] = {}

    def steps(stage: str, done: int, total: int) -> None:
        stages[stage] = (done, total)

    for number, text in enumerate(told):
        found = rebuild_list(settings, tokens.read(text), encoder, [], steps)
        assert found.is_equal, number
        assert found.user_id == (None if number == 0 else f"reader-{(number - 1) % READERS}")
    with monkeypatch.context() as compacted:
        compacted.setattr("streams.rebuild.changelog_rows", no_flush)
        assert rebuild_list(settings, tokens.read(told[-1]), encoder, [], steps).is_equal
    assert all(0 < done <= total for done, total in stages.values()) and {"folding", "learning"} <= stages.keys()
    assert rebuild_list(settings, tokens.read(ranked), encoder, items, steps).is_equal
    with pytest.raises(CannotRebuildError, match="--item"):
        rebuild_list(settings, tokens.read(ranked), encoder, [], steps)
    another = tokens.read(told[-1])
    older = msgspec.structs.replace(another, examples=another.examples // 2)
    assert not rebuild_list(settings, older, encoder, [], steps).is_equal
    other = settings.model_copy(update={"learner_dim": 32})
    with pytest.raises(CannotRebuildError, match="HEADWATER_"):
        rebuild_list(other, another, encoder, [], steps)
    monkeypatch.setattr("streams.kafka.log_start", starts_at_five)
    with pytest.raises(CannotRebuildError, match="examples log begins at offset 5"):
        rebuild_list(settings, another, encoder, [], steps)


def test_a_list_whose_user_left_the_source_logs_is_made_again_or_the_log_is_named(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retention has taken all of clicks and comments: the changelog names the user as long as it has the flush."""
    worker, settings = asked.worker, asked.worker.settings
    lists = [worker.get(f"/v1/users/{user}/recommendations", limit=4) for user in ("reader-2", "nobody")]
    told, nobody = (tokens.read(one["token"]) for one in lists)
    encoder = Encoder(settings.encoder)
    whole_start, whole_read = kafka.log_start, kafka.read_records
    emptied = {settings.topic("clicks"), settings.topic("comments")}

    async def start(options: Any, topic: str, partition: int) -> int:
        return 1000 if topic in emptied else await whole_start(options, topic, partition)

    async def read(options: Any, topic: str, *more: Any, **options_too: Any) -> AsyncIterator[list[Any]]:
        if topic not in emptied:
            async for batch in whole_read(options, topic, *more, **options_too):
                yield batch

    monkeypatch.setattr("streams.kafka.log_start", start)
    monkeypatch.setattr("streams.kafka.read_records", read)
    found = rebuild_list(settings, told, encoder, [], unseen)
    assert (found.user_id, found.is_equal) == ("reader-2", True)
    assert rebuild_list(settings, nobody, encoder, [], unseen).is_equal, "nothing was ever known of this one"
    monkeypatch.setattr("streams.rebuild.changelog_rows", no_flush)
    with pytest.raises(CannotRebuildError, match=r"of clicks and comments, partition \d, is gone .* the list's user"):
        rebuild_list(settings, told, encoder, [], unseen)


def unseen(stage: str, done: int, total: int) -> None:
    """Steps that nobody looks at."""


async def no_flush(batches: Any, upto: Any, rows: Any) -> list[rebuild.Cut]:
    """What compaction leaves of a changelog's flushes, in the worst case."""
    return []


async def starts_at_five(options: Any, topic: str, partition: int) -> int:
    return 5


def test_the_readmes_examples_do_what_it_says(asked: Asked) -> None:
    """Ten lines to the first list; a Kafka producer; curl."""
    url, settings = asked.worker.settings.http_url(), asked.worker.settings
    here = {'"localhost:9092"': f'"{settings.broker}", topic_prefix="{settings.topic_prefix}"'}
    exec(example("python", "Producer", here), {})
    asked.worker.wait_until("the item", lambda: asked.worker.http.get("/v1/items/50").status_code == 200)
    lines = example("python", "Client(", {"http://127.0.0.1:8080": url})
    assert len(lines.splitlines()) <= 10
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(lines, {})
    assert re.fullmatch(r"(0\.\d{3}  \w.*\n){7}", printed.getvalue()), "all films but the one just liked"
    assert "Star Wars" not in printed.getvalue()

    sent = json.loads(run_shell(example("bash", "/v1/events", {"http://127.0.0.1:8080": url})))
    assert sent["accepted"] == 2
    asked.worker.get("/v1/users/u42/state", at_least=sent["positions"])
    block = example("bash", "what-if", {"http://127.0.0.1:8080": url, "clicks:3:1041": sent["positions"][0]})
    answers = list(objects(run_shell(block)))
    explained, waited, state, what_if, ranked = answers
    assert explained["items"][0]["explanation"]["contributions"] and len(explained["items"]) == 5
    assert waited["applied"]["clicks"][1] >= int(sent["positions"][0].split(":")[2])
    assert state["events"] == 5 and "exact" in what_if
    assert [item["item_id"] for item in ranked["items"]] == ["50"]


def objects(text: str) -> Iterator[Any]:
    """The JSON objects that stand one after another."""
    while text.strip():
        found, end = json.JSONDecoder().raw_decode(text.strip())
        text = text.strip()[end:]
        yield found


def test_the_client_reads_what_it_wrote_and_is_told_of_it(asked: Asked) -> None:
    with Client(asked.worker.settings.http_url()) as client:
        stream = client.stream()
        assert next(m for m in stream if m["type"] == "status")["items"] >= len(FILMS)
        positions = client.send(*(Click("client", item, "view") for item in ("up", "heat")), Comment("client", "crime"))
        assert client.state("client", at_least=positions).events == 3
        assert {"up", "heat"}.isdisjoint(i.item_id for i in client.recommendations("client").items)
        assert next(m for m in stream if m["type"] == "event" and m["user_id"] == "client")["item_id"] == "up"
        assert client.recommendations("client").token
        told = client.erased(client.forget("client").erasure_id)
        assert told.state is not None and told.state.events == 3 and client.state("client").events == 0


def test_the_contract_holds_for_whatever_a_fuzzer_asks(asked: Asked, tmp_path: Path) -> None:
    """Every operation: no server error, no answer that the OpenAPI document does not tell of."""
    told = fuzz.fuzz(asked.worker, tmp_path, seed=7, requests=1, examples=15, phases="examples,fuzzing")
    assert (told["server_errors"], told["violations"]) == (0, 0), told["failures"]
    assert told["operations"] == len(OPERATIONS) and told["requests"] > 200
