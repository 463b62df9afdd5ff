"""`headwater verify`: the state that a worker tells of, rebuilt from the logs."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaProducer

from bench import words
from bench.deployment import Deployment, WorkerProcess
from bench.doubles import MemoryDisk, MemoryLog
from state.changelog import LogRecord
from state.partition import Partition
from streams import kafka, space, verify
from streams.__main__ import app
from streams.settings import PREFIX, Settings
from streams.space import Spaces

USERS = 12
ROUNDS = 8
_numbers = itertools.count()


@pytest.fixture
def deployment(broker: str, tmp_path: Path) -> Iterator[Deployment]:
    made = Deployment(broker, tmp_path, topic_prefix=f"verify{next(_numbers)}-", partitions=2, rank_sample=1.0)
    made.create_topics()
    yield made
    made.close()


class Feed:
    """Items, clicks, comments with and without an item, poison; each topic may lag behind the others."""

    def __init__(self, deployment: Deployment) -> None:
        self.settings = deployment.settings
        self.producer = KafkaProducer(**self.settings.kafka_options())
        self.sent: list[tuple[str, Any]] = []

    def send(self, topic: str, key: str, value: Any) -> None:
        raw = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.sent.append((topic, self.producer.send(self.settings.topic(topic), raw, key=key.encode())))

    def items(self) -> None:
        for n in range(20):
            self.send("items", f"i{n}", {"item_id": f"i{n}", "text": f"a film about subject {n}"})
        self.send("items", "i3", {"item_id": "i3", "text": "told anew", "vector": [0.5, 1.0, -2.0]})

    def clicks(self, start: int) -> None:
        for n in range(start, start + ROUNDS):
            for u in range(USERS):
                event = {"user_id": f"u{u}", "item_id": f"i{(n * u) % 20}", "action": "click", "ts": 1e9 + 10 * n}
                self.send("clicks", f"u{u}", event)
        self.send("clicks", "u1", b"{poison")

    def comments(self, start: int) -> None:
        """Dated before the clicks of their round."""
        for n in range(start, start + ROUNDS, 2):
            for u in range(0, USERS, 3):
                event = {"user_id": f"u{u}", "text": f"round {n}, I like {u}", "ts": 1e9 + 10 * n - 5}
                self.send("comments", f"u{u}", event | ({"item_id": f"i{(n * u) % 20}"} if n % 4 else {}))

    def wait_applied(self, worker: WorkerProcess) -> None:
        self.producer.flush()
        last: dict[tuple[str, int], int] = {}
        for topic, future in self.sent:
            done = future.get(timeout=10)
            last[topic, done.partition] = max(done.offset, last.get((topic, done.partition), -1))

        def applied() -> bool:
            told: dict[tuple[str, int], int] = {}
            for kind in ("users", "catalogue"):
                for partition, offsets in worker.applied(kind).items():
                    told |= {(topic, partition): offset for topic, offset in offsets.items()}
            return all(told.get(place, -1) >= offset for place, offset in last.items())

        worker.wait_until("all applied", applied)


def verified(
    worker: WorkerProcess, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], **settings: Any
) -> tuple[int, Any]:
    """(exit code, {(kind, partition): verdict}) of the command."""
    told = {**worker.settings.model_dump(exclude_defaults=True), **settings}
    for name, value in told.items():
        monkeypatch.setenv(PREFIX + name.upper(), str(value))
    with pytest.raises(SystemExit) as end:
        app(["verify", "--json"])
    out, err = capsys.readouterr()
    answer = json.loads(out)
    code = int(end.value.code or 0)
    assert answer["equal"] == (code == 0), err
    return code, {(v["kind"], v["partition"]): v for v in answer["partitions"]}


@pytest.mark.long
def test_what_a_worker_has_is_what_the_logs_say(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """Comments far behind the clicks that they come before, an erasure, poison: equal. Another weight: found."""
    feed = Feed(deployment)
    worker = deployment.start_worker()
    worker.wait_ready()
    feed.items()
    feed.clicks(0)
    feed.wait_applied(worker)
    feed.comments(0)  # merged long after their time
    feed.send("erasures", "u3", {"user_id": "u3", "ts": 1e9})  # of before all clicks, and applied after them
    feed.wait_applied(worker)
    feed.clicks(ROUNDS)
    feed.comments(ROUNDS)
    feed.wait_applied(worker)
    code, verdicts = verified(worker, monkeypatch, capsys)
    erased = ("users", kafka.partition_of(b"u3", 2))
    assert {v["changelog"] for v in verdicts.values()} == {"equal"}
    assert {v["sources"] for place, v in verdicts.items() if place != erased} == {"equal"}
    # Kafka deletes the changelog before the erasure, and with it the order of what came late: see the note.
    assert verdicts[erased]["sources"] in ("equal", "gone"), verdicts[erased]["note"]
    assert code == 0 and len(verdicts) == 5
    assert sum(v["rows"] for (kind, _), v in verdicts.items() if kind == "users") == USERS
    with pytest.raises(SystemExit) as end:
        app(["digest", "--json"])
    printed = json.loads(capsys.readouterr().out)["partitions"]
    told = {(d["kind"], d["partition"]): d for d in worker.digests()}
    assert not end.value.code and printed == list(told.values()) and len(printed) == 5
    still = {place for place, v in verdicts.items() if v["applied"] == told[place]["applied"]}
    assert still >= verdicts.keys() - {("learner", 0)}, "all but the learner had come to the end before"
    assert all(verdicts[place]["digest"] == told[place]["digest"] for place in still)

    code, found = verified(worker, monkeypatch, capsys, action_weight_default=0.5)  # another fold of the sources
    assert code == 1
    assert {kind for (kind, _), v in found.items() if v["sources"] == "different"} == {"users"}
    assert {v["changelog"] for v in found.values()} == {"equal"}


class Logs:
    """`streams.kafka` for a verification: the users' changelog, and nothing else is left."""

    def __init__(self, changelog: MemoryLog) -> None:
        self.changelog = changelog

    async def log_start(self, options: Any, topic: str, partition: int) -> int:
        return self.changelog.begins if topic.endswith("users-changelog") else 1

    async def log_end(self, options: Any, topic: str, partition: int) -> int:
        return len(self.changelog.everything)

    async def read_log(
        self, options: Any, topic: str, partition: int, start: int, stop: int | None = None
    ) -> AsyncIterator[list[LogRecord]]:
        async for batch in self.changelog.read(start, stop):
            yield batch
        yield []


async def one_encoder(settings: Settings) -> Spaces:
    """The deployment has never moved."""
    return Spaces()


async def test_a_changelog_that_has_just_lost_its_head_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A flush of before the sweep's end has not all rows: no worker is accused by it."""
    log = MemoryLog()

    async def publish(records: list[tuple[bytes, bytes]]) -> None: ...

    partition = Partition(
        path=tmp_path, changelog=log, publish=publish, sources=("clicks",), disk=MemoryDisk(), sweep_rows=3
    )
    await partition.open()
    await partition.flush({b"u%d" % n: b"row" for n in range(9)}, [], {"clicks": 0})

    def told() -> list[Any]:
        part = {"kind": "users", "partition": 0, "applied": dict(partition.applied), "digest": partition.digest()}
        return [{"encoder": "words", "url": "", "partitions": [part]}]

    await partition.renew()
    await partition.flush({b"u1": b"more"}, [], {"clicks": 1})
    early = told()
    await partition.flush({b"u2": b"more"}, [], {"clicks": 2})
    while not partition.is_swept:
        await partition.sweep()
    await partition.drain()
    log.delete_before(partition.truncatable_to or 0)
    assert log.begins > 0
    monkeypatch.setattr(verify, "kafka", Logs(log))
    monkeypatch.setattr(space, "of_deployment", one_encoder)
    monkeypatch.setattr(verify, "MARKER_WAIT_S_MAX", 0.0)
    monkeypatch.setattr(verify, "SETTLE_POLL_S", 0.0)
    asked = iter([early])
    settings = Settings(broker="127.0.0.1:1", partitions=1)
    found = await asyncio.to_thread(
        verify.verify, settings, lambda: next(asked, told()), words.WordVectors(), lambda stage, done, total: None
    )
    verdict = next(v for v in found if v.kind == "users")
    assert (verdict.changelog, verdict.sources) == (verify.Finding.EQUAL, verify.Finding.GONE)
    assert verdict.applied == {"clicks": 2}


async def test_a_row_that_the_changelog_does_not_have_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As where a disk was written by another hand; progress is told up to the log's end."""
    log, disk = MemoryLog(), MemoryDisk()

    async def publish(records: list[tuple[bytes, bytes]]) -> None: ...

    partition = Partition(path=tmp_path, changelog=log, publish=publish, sources=("clicks",), disk=disk)
    await partition.open()
    await partition.flush({b"u%d" % n: b"row" for n in range(9)}, [], {"clicks": 0})
    await partition.drain()

    def told() -> list[Any]:
        part = {"kind": "users", "partition": 0, "applied": dict(partition.applied), "digest": partition.digest()}
        return [{"encoder": "words", "url": "", "partitions": [part]}]

    steps: list[tuple[str, int, int]] = []

    async def found() -> verify.Finding:
        verdicts = await asyncio.to_thread(
            verify.verify, settings, told, words.WordVectors(), lambda *step: steps.append(step)
        )
        return next(v for v in verdicts if v.kind == "users").changelog

    monkeypatch.setattr(verify, "kafka", Logs(log))
    monkeypatch.setattr(space, "of_deployment", one_encoder)
    monkeypatch.setattr(verify, "MARKER_WAIT_S_MAX", 0.0)
    settings = Settings(broker="127.0.0.1:1", partitions=1)
    assert await found() == verify.Finding.EQUAL
    assert any(0 < done == total for _, done, total in steps), steps
    disk.contents[tmp_path][-1].rows[b"u3"] = b"another"
    assert await found() == verify.Finding.DIFFERENT
