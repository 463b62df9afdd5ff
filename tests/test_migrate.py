"""A deployment moves to another encoder while it answers, as its operator does it: align, migrate, and what is proven
of it afterwards."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import torch
from kafka import KafkaProducer
from transformers import AutoModel, AutoTokenizer

from bench.deployment import Deployment, WorkerProcess
from model.encoder import DEFAULT_MODEL, Encoder, locate
from streams import migrate, tokens, verify
from streams.explain import rebuild_list
from streams.migrate import Migration, MigrationError, give_up
from streams.settings import Settings, environment
from streams.space import Space

ITEMS = 400  # more than vectors have numbers
USERS = 10
LAYERS = 4  # of six that the new encoder has
PLACES = ("harbour", "desert", "mine", "school", "forest", "station", "palace", "village")
DEEDS = ("a murder", "a wedding", "a war", "a long winter", "a robbery", "two sisters", "an old debt", "a lost letter")
KINDS = ("quiet drama", "loud comedy", "thriller", "musical", "western", "documentary")


def text_of(n: int) -> str:
    return f"{KINDS[n % 6]} about {DEEDS[n // 6 % 8]} in a {PLACES[n // 48 % 8]}, part {n}"


class Feed:
    """Events of users who like one kind each, in rounds."""

    def __init__(self, deployment: Deployment) -> None:
        self.settings = deployment.settings
        self.producer = KafkaProducer(**self.settings.kafka_options())
        self.now = 1e9

    def items(self, start: int, count: int) -> None:
        for n in range(start, start + count):
            self._send("items", f"i{n}", {"item_id": f"i{n}", "text": text_of(n)})
        self.producer.flush()

    def round(self, number: int) -> None:
        self.now += 10
        for u in range(USERS):
            n = (6 * (7 * number + u) + u) % ITEMS
            click = {"user_id": f"u{u}", "item_id": f"i{n}", "action": "click", "ts": self.now + 1}
            self._send("clicks", f"u{u}", click)
            if number % 2:
                comment = {"user_id": f"u{u}", "text": f"more of {text_of(n + 6)}, round {number}", "ts": self.now}
                self._send("comments", f"u{u}", comment)
        self.producer.flush()

    def _send(self, topic: str, key: str, value: Any) -> None:
        self.producer.send(self.settings.topic(topic), json.dumps(value).encode(), key=key.encode())


@pytest.fixture
def deployment(broker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Deployment]:
    made = Deployment(broker, tmp_path, topic_prefix="migrate-", partitions=2, item_flush_min_s=0.2)
    made.create_topics()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def shorter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that reads another space: the default one's lower layers."""
    folder = tmp_path_factory.mktemp("models") / "shorter"
    source, options = locate(DEFAULT_MODEL)
    model = AutoModel.from_pretrained(source, **options)
    model.encoder.layer = torch.nn.ModuleList(list(model.encoder.layer)[:LAYERS])
    model.config.num_hidden_layers = LAYERS
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, **options).save_pretrained(folder)
    return folder


class Reader(threading.Thread):
    """Asks for lists until it is stopped; keeps the answers, and what failed. While another worker is `away`, its users
    may have to come again."""

    def __init__(self, worker: WorkerProcess) -> None:
        super().__init__()
        self.worker = worker
        self.answers: list[Any] = []
        self.failures: list[str] = []
        self.away = False
        self._over = threading.Event()

    def run(self) -> None:
        n = 0
        while not self._over.is_set():
            n += 1
            away = self.away
            answer = self.worker.http.get(f"/v1/users/u{n % USERS}/recommendations", params={"limit": 10})
            if answer.status_code == 200 and len(answer.json()["items"]) == 10:
                self.answers.append(answer.json())
            elif not (away or self.away) or answer.status_code != 503 or "retry-after" not in answer.headers:
                self.failures.append(f"{answer.status_code}: {answer.text}")

    def __enter__(self) -> "Reader":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()


def command(worker: WorkerProcess, *words: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `headwater`."""
    told = worker.settings.model_dump(exclude_defaults=True)
    variables = os.environ | environment({name: str(value) for name, value in told.items()})
    done = subprocess.run([sys.executable, "-m", "streams", *words], env=variables, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


class Moving(NamedTuple):
    """A deployment of two workers that has learnt some rounds, and where the other encoder is."""

    deployment: Deployment
    feed: Feed
    workers: list[WorkerProcess]
    aligned: Path
    new: Encoder

    def run_to(self, last: str) -> None:
        """Moves, and is ended after that step."""

        def crash(step: str) -> None:
            if step == last:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self.run(crash)

    def run(self, crash: Callable[[str], None] = lambda step: None) -> Any:
        """Moves, in this process."""

        def ask() -> list[Any]:
            return [worker.get("/v1/model") for worker in self.workers]

        settings = self.workers[0].settings
        return asyncio.run(Migration(settings, str(self.aligned), self.new, ask, lambda *_: None, crash).run())


@pytest.fixture
def moving(deployment: Deployment, shorter: Path, tmp_path: Path) -> Moving:
    """Another encoder as it is has no place there; aligned it has."""
    feed = Feed(deployment)
    feed.items(0, ITEMS)
    for number in range(6):
        feed.round(number)
    workers = [deployment.start_worker("a"), deployment.start_worker("b")]
    for worker in workers:
        worker.wait_ready()
    workers[0].wait_quiet()
    old = workers[0].get("/v1/model")["encoder"]
    assert (old["number"], old["next"]) == (0, None)
    settings = workers[0].settings
    with pytest.raises(MigrationError, match="headwater encoder align"):
        asyncio.run(Migration(settings, str(shorter), Encoder(str(shorter)), list, lambda *_: None).run())
    aligned = tmp_path / "aligned"
    code, _, said = command(workers[0], "encoder", "align", str(shorter), "--out", str(aligned))
    assert code == 0 and f"in the space of {old['name']}" in said
    new, quietly = Encoder(str(aligned)), lambda *_: None
    with pytest.raises(MigrationError, match="may be in use: name another folder"):
        asyncio.run(migrate.fit(settings, str(shorter), new, aligned, quietly))
    with pytest.raises(MigrationError, match="align the model that stands before its map"):
        asyncio.run(migrate.fit(settings, str(aligned), new, tmp_path / "twice", quietly))
    nothing = asyncio.run(Migration(settings, DEFAULT_MODEL, Encoder(), list, quietly).run())
    assert (nothing["encoder"], nothing["number"], nothing["items"]) == (old["name"], 0, 0)
    return Moving(deployment, feed, workers, aligned, new)


def told(number: int, items: dict[str, int], examples: int = 9) -> Any:
    """What /v1/model of a worker says, as far as a move looks at it."""
    encoder = {"name": f"e:{number}", "number": number, "next": None, "texts": {"items": items}}
    return {"version": "1", "encoder": encoder, "replica": {"applied": {"examples": examples}}, "workers": []}


def until(monkeypatch: pytest.MonkeyPatch, holds: migrate.Holds, *answers: list[Any], wait_s: float = 60.0) -> None:
    """A step of a move: each ask takes the next answers."""
    monkeypatch.setattr(migrate, "POLL_S", 0.0)
    monkeypatch.setattr(migrate, "WAIT_S_MAX", wait_s)
    left = list(answers)
    ask = lambda: left.pop(0) if len(left) > 1 else left[0]  # noqa: E731
    move = Migration(Settings(), "m", cast(Any, None), ask, lambda *_: None)
    asyncio.run(move._until(Space("e:1", 8, 1), holds, "workers do it"))
    assert len(left) == 1


def test_a_step_waits_for_all_workers_that_there_are_by_then(monkeypatch: pytest.MonkeyPatch) -> None:
    at_end = migrate._have_offset(9)
    until(monkeypatch, at_end, [None], [told(1, {}), None], [told(1, {}), told(1, {}, examples=8)], [told(1, {})] * 3)
    with pytest.raises(MigrationError, match=r"after 0 s 1 of 2 workers do it: run it again"):
        until(monkeypatch, at_end, [told(1, {}), None], wait_s=0.0)
    with pytest.raises(MigrationError, match=r"a worker is of build 0\.9, which knows of no move"):
        until(monkeypatch, at_end, [{"version": "0.9", "encoder": {"name": "e:0"}}])


def test_items_count_as_read_once_every_partition_has_passed_its_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    passed = partial(migrate._have_passed, "items", 1, 3)
    lost = [told(1, {"0": 1, "1": 1})]  # a partition that nobody has for now
    until(monkeypatch, passed, [told(1, {"0": 1, "1": 0}), told(1, {"2": 1})], lost, [*lost, told(1, {"2": 2})])


@pytest.mark.embedded
def test_a_deployment_moves_to_another_encoder_while_it_answers(moving: Moving) -> None:
    first, new, feed = moving.workers[0], moving.new, moving.feed
    lists = {f"u{u}": first.get(f"/v1/users/u{u}/recommendations", limit=10) for u in range(USERS)}
    old = first.get("/v1/model")["encoder"]["name"]

    # Given up while it goes on. Then ended after each of its steps, and a worker with it, and gone on with, beside a
    # stream and its readers.
    def give_up_at_load(step: str) -> None:
        if step == "load":
            assert command(first, "encoder", "give-up")[0] == 0

    with pytest.raises(MigrationError, match="was given up meanwhile"):
        moving.run(give_up_at_load)
    for step in ("announce", "load", "items", "encode"):
        moving.run_to(step)
    coming = first.get("/v1/model")["encoder"]
    assert (coming["name"], coming["next"]["name"], coming["next"]["state"]) == (old, new.name, "loaded")
    with Reader(first) as reader:
        feed.round(6)
        feed.items(ITEMS, 5)
        for step in ("in use", "switch", "one mark", "mark"):
            moving.run_to(step)
            if step == "one mark":  # some partitions have passed theirs
                reader.away = True
                moving.workers.pop().kill()
                moving.workers.append(moving.deployment.start_worker("b"))
                for worker in reversed(moving.workers):
                    worker.wait_ready()
                reader.away = False
        code, out, _ = command(first, "encoder", "migrate", str(moving.aligned), "--json")
        feed.round(7)
        first.wait_quiet()
    moved = json.loads(out)
    assert (code, moved["encoder"], moved["number"]) == (0, new.name, 2)
    assert not reader.failures and len({a["model_version"].split("@")[0] for a in reader.answers}) == 2
    for worker in moving.workers:
        model = worker.get("/v1/model")["encoder"]
        assert (model["name"], model["number"], model["next"]) == (new.name, 2, None)
    after = {user: first.get(f"/v1/users/{user}/recommendations", limit=10) for user in lists}
    assert after["u1"]["model_version"].startswith(new.name)
    _check_afterwards(moving, [*lists.values(), *after.values(), reader.answers[len(reader.answers) // 2]])


def _check_afterwards(moving: Moving, lists: list[Any]) -> None:
    """A worker that is killed, one that starts with the new encoder, and everything is what the logs say."""
    first, base = moving.workers[0], Encoder()
    moving.workers[-1].kill()
    moving.feed.round(8)
    third = moving.deployment.start_worker("c", encoder=str(moving.aligned))
    third.wait_ready()
    first.wait_quiet()
    assert third.get("/v1/model")["encoder"]["number"] == 2

    def digests() -> list[Any]:
        return [worker.get("/v1/digest") for worker in (first, third)]

    verdicts = verify.verify(first.settings, digests, moving.new, lambda *step: None)  # which finds the other encoder
    assert all(one.is_equal for one in verdicts), verdicts
    for answer in lists:
        assert rebuild_list(first.settings, tokens.read(answer["token"]), base, [], lambda *step: None).is_equal
    moving.workers[1:] = [third]
    assert moving.run()["items"] == 0  # again is nothing
    with pytest.raises(MigrationError, match="no move to another encoder is under way"):
        asyncio.run(give_up(first.settings))
    code, out, _ = command(first, "encoder", "list", "--json")
    listed = [(one["state"], one["reads"]) for one in json.loads(out)]
    everything = ["items' vectors", "2 partitions of comments", "2 partitions of items"]
    assert (code, listed) == (0, [("in use", []), ("given up", []), ("in use", everything)])
    moving._replace(aligned=Path(DEFAULT_MODEL), new=base).run_to("announce")  # the way back needs no map
    ended = asyncio.run(give_up(first.settings))
    assert (ended.encoder, ended.number) == (base.name, 3)
