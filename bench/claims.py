"""What answers promise, held against the logs after a real stream: reasons, what-ifs, lists of the past, unlearning.

reasons    |bias + contributions + rest - logit| of random items for random users
what-if    the answer against a replay of the same logs without and with these events, to the last bit
tokens     lists that were given while the stream went on and workers were stopped, made again, to the last bit
unlearn    the item state after `forget --unlearn` against a learner of the log's bytes without the user's, and the
           time of it beside that of one replay
"""

import argparse
import asyncio
import gzip
import json
import math
import random
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast

import msgspec

from bench.chaos import broker_for
from bench.deployment import Deployment, WorkerProcess
from model.encoder import Encoder
from model.items import ItemMatrix
from model.ranker import Ranker
from state import rows
from state.rows import UserRow
from state.store import RocksDisk
from streams import examples, explain, kafka, movielens, rebuild, replay, serving, tokens
from streams.pipeline import ItemLearner
from streams.serving import ListOptions, WorkerView
from streams.settings import Settings, cache_dir
from streams.tokens import Token

PARTS: Final = ("reasons", "what-if", "tokens", "unlearn")
STAGES: Final = 4  # pieces of the stream; the worker is stopped and started between the second and the third
WRITERS: Final = 40  # users who write something after each piece
PAIRS_A_USER: Final = 10
LIST: Final = 20
WITHOUT_MAX: Final = 4
NOBODY: Final = "nobody"
USERS: Final = ("clicks", "comments", "erasures")


def run(arguments: list[str]) -> dict[str, Any]:
    """`python -m bench claims [--events 100000] [--pairs 1000] [--cases 50] [--tokens 20] [--only PART,PART]`"""
    parser = argparse.ArgumentParser(prog="python -m bench claims", description=__doc__)
    parser.add_argument("--events", type=int, default=movielens.RATINGS, help="of MovieLens 100k, as the demo has it")
    parser.add_argument("--pairs", type=int, default=1000, help="of a user and an item, explained")
    parser.add_argument("--cases", type=int, default=50, help="exact what-ifs")
    parser.add_argument("--tokens", type=int, default=20, help="lists of the past")
    parser.add_argument("--only", default=",".join(PARTS), help="of " + ", ".join(PARTS))
    asked = parser.parse_args(arguments)
    stream = movielens.fetch(cache_dir() / "ml-100k")
    with tempfile.TemporaryDirectory() as folder, broker_for("embedded") as address:
        deployment = Deployment(
            address, Path(folder), topic_prefix="claims-", app_id="bench", rank_sample=1.0, session_timeout_s=10.0
        )
        try:
            deployment.create_topics()
            trial = _Trial(deployment, stream, asked)
            trial.learn()
            told: dict[str, Any] = {"events": asked.events}
            for part in asked.only.split(","):
                told[part] = getattr(trial, part.replace("-", "_"))()
            return told
        finally:
            deployment.close()


class _Trial:
    def __init__(self, deployment: Deployment, stream: movielens.Stream, asked: argparse.Namespace) -> None:
        self.deployment, self.stream, self.asked = deployment, stream, asked
        self.settings: Settings = deployment.settings
        self.worker: WorkerProcess = deployment.start_worker()
        self.encoder = Encoder(self.settings.encoder)
        self.draw = random.Random(1)
        with gzip.open(stream.events) as lines:
            events = [json.loads(line) for _, line in zip(range(asked.events), lines, strict=False)]
        with gzip.open(stream.items) as lines:
            self.films = [json.loads(line) for line in lines]
        self.times = [event["ts"] for event in events]
        self.counts: dict[str, int] = {}
        for event in events:
            self.counts[event["user_id"]] = self.counts.get(event["user_id"], 0) + 1
        self.users = list(self.counts)
        self.tokens_given: list[str] = []
        self.after_s = 0.0

    # -- the stream

    def learn(self) -> None:
        """The stream in pieces, with words of some users after each, and lists all the while."""
        self.worker.wait_ready()
        replay.replay(self.settings, self.stream.items, None)
        self.worker.wait_until(
            "the catalogue", lambda: self.worker.get("/v1/model")["replica"]["active"] == len(self.films)
        )
        piece = self.asked.events // STAGES
        for stage in range(STAGES):
            if stage == STAGES // 2:
                self.worker.stop()
                self.worker = self.deployment.start_worker()
                self.worker.wait_ready()
            replay.replay(self.settings, None, self.stream.events, skip=stage * piece, limit=piece)
            for _ in range(self.asked.tokens // STAGES):
                user = self.draw.choice(self.users)
                query = {"limit": self.draw.randrange(1, LIST), "exclude_seen": self.draw.random() < 0.7}
                self.tokens_given.append(self.worker.get(f"/v1/users/{user}/recommendations", **query)["token"])
            self._write(self.times[(stage + 1) * piece - 1], (stage + 1) * piece)

    def _write(self, ts: float, events: int) -> None:
        """Comments at this time, which is that of the last event."""
        self.worker.wait_quiet()
        words = [self._comment(self.draw.choice(self.users), ts) for _ in range(WRITERS)]
        answer = self.worker.http.post("/v1/events", json=words)
        answer.raise_for_status()
        self.worker.wait_quiet()

    def _comment(self, user: str, ts: float) -> dict[str, Any]:
        film = self.draw.choice(self.films)
        about = {"item_id": film["item_id"]} if self.draw.random() < 0.5 else {}
        return {"type": "comment", "user_id": user, "text": f"more like {film['text']}", "ts": ts, **about}

    # -- reasons

    def reasons(self) -> dict[str, Any]:
        """The largest difference of a logit from the sum of its explanation."""
        worst, pairs, terms = 0.0, 0, 0
        while pairs < self.asked.pairs:
            films = [film["item_id"] for film in self.draw.sample(self.films, PAIRS_A_USER)]
            body = {"user_id": self.draw.choice(self.users), "item_ids": films, "explain": True, "parts": True}
            answer = self.worker.http.post("/v1/rank", json=body)
            answer.raise_for_status()
            for item in answer.json()["items"]:
                given = item["explanation"]
                values = [c["value"] for c in given["contributions"]]
                worst = max(worst, abs(given["bias"] + math.fsum(values) + given["rest"] - item["logit"]))
                pairs, terms = pairs + 1, terms + len(values)
        return {"pairs": pairs, "contributions": terms, "worst": worst}

    # -- what-ifs

    def what_if(self) -> dict[str, Any]:
        """Exact what-ifs, each against the logs, cut and continued."""
        self.worker.wait_quiet()
        cases: list[_Case] = []
        inexact = 0
        for user in self.draw.sample(self.users, len(self.users)):
            if len(cases) == self.asked.cases:
                break
            case = self._ask(user)
            if case is None:
                inexact += 1
            else:
                cases.append(case)
        equal, changed = asyncio.run(self._replayed(cases))
        return {"cases": len(cases), "inexact": inexact, "equal": equal, "other_lists_than_the_real_ones": changed}

    def _ask(self, user: str) -> "_Case | None":
        state = self.worker.get(f"/v1/users/{user}/state")
        held = sorted({f"{e['topic']}:{e['partition']}:{e['offset']}" for e in state["last_events"]})
        without = self.draw.sample(held, min(len(held), self.draw.randrange(1, WITHOUT_MAX + 1)))
        more: list[dict[str, Any]] = []
        for _ in range(self.draw.randrange(3)):
            self.after_s += 60.0  # of all cases in order, as their events come in the logs
            ts = self.times[-1] + self.after_s
            film = self.draw.choice(self.films)["item_id"]
            click = {"type": "click", "user_id": user, "item_id": film, "action": "rating", "value": 5.0, "ts": ts}
            more.append(click if self.draw.random() < 0.5 else self._comment(user, ts))
        answer = self.worker.http.post(
            f"/v1/users/{user}/what-if", params={"limit": LIST}, json={"without": without, "with": more}
        )
        answer.raise_for_status()
        told = answer.json()
        real = self.worker.get(f"/v1/users/{user}/recommendations", limit=LIST)
        if not told["exact"]:
            return None
        changed = [i["item_id"] for i in told["items"]] != [i["item_id"] for i in real["items"]]
        return _Case(user, without, more, tokens.read(told["token"]), changed)

    async def _replayed(self, cases: list["_Case"]) -> tuple[int, int]:
        """(equal to the last bit, other than the real list)."""
        ends = {case.token.examples for case in cases}
        assert len(ends) == 1, "the model was quiet"
        config = self.settings.learner_config(self.encoder.dim)
        learner = ItemLearner(config, self.encoder.dim, self.encoder.name)
        learner = await rebuild.learn_examples(self._read, learner, ends.pop())
        matrix = ItemMatrix(config.dim, config.text_dim, config.neighbours_max)
        matrix.apply(learner.learner.matrix.rows())
        equal = 0
        with tempfile.TemporaryDirectory() as folder:
            disk = RocksDisk()
            for partition in {case.token.partition for case in cases}:
                own = [case for case in cases if case.token.partition == partition]
                store = disk.open(Path(folder) / str(partition))
                logs = _Logs(self._read, own)
                await rebuild.user_rows(
                    logs.read, partition, logs.upto, store, lambda _: self.encoder, self.settings.evidence_config()
                )
                for case in own:
                    (value,) = store.get_many([case.user.encode()])
                    row = rows.unpack(value) if value is not None else UserRow()
                    ranker = Ranker(matrix, cooccurrence_history=config.cooccurrence_history)
                    ranker.take_bias(case.token.bias_at)
                    view = cast(WorkerView, explain.Past(ranker, case.token))
                    options = ListOptions(case.token.limit, exclude_seen=case.token.exclude_seen)
                    found = serving.best(serving.Reader(view, case.user, row), options)
                    equal += tokens.list_digest((item.item_id, item.logit) for item in found) == case.token.list
        return equal, sum(case.changed for case in cases)

    def _read(self, name: str, partition: int, start: int, stop: int) -> AsyncIterator[Sequence[Any]]:
        topic = self.settings.internal_topic(name) if name == explain.EXAMPLES else self.settings.topic(name)
        return kafka.read_records(
            self.settings.kafka_options(), topic, partition, start, stop, isolation_level="read_committed"
        )

    # -- lists of the past

    def tokens(self) -> dict[str, Any]:
        """Those that are equal to the last bit, as `headwater explain` makes them."""
        started = time.monotonic()
        read = [tokens.read(text) for text in self.tokens_given]
        equal = sum(explain.rebuild_list(self.settings, t, self.encoder, [], _unseen).is_equal for t in read)
        places = len({(t.examples, t.epoch) for t in read})
        epochs = len({t.epoch for t in read})
        return {
            "tokens": len(read), "equal": equal, "moments": places, "epochs": epochs,
            "seconds": time.monotonic() - started,
        }  # fmt: skip

    # -- unlearning

    def unlearn(self) -> dict[str, Any]:
        """The busiest user is forgotten, by the model too."""
        user = max(self.users, key=self.counts.__getitem__)
        self.worker.wait_quiet()
        started = time.monotonic()
        answer = self.worker.http.delete(f"/v1/users/{user}", params={"unlearn": True})
        answer.raise_for_status()
        path = answer.headers["location"]
        self.worker.wait_until("the erasure", lambda: self.worker.get(path)["status"] == "complete")
        seconds = time.monotonic() - started
        told = self.worker.get(path)["model"]
        partition = kafka.partition_of(user.encode(), self.settings.partitions)
        own, log = asyncio.run(self._own(user, partition)), asyncio.run(self._log(told["applied"] - 1))
        config = self.settings.learner_config(self.encoder.dim)
        without = ItemLearner(config, self.encoder.dim)
        removed = learn_without(without, log, partition, own)
        whole, began = ItemLearner(config, self.encoder.dim), time.monotonic()
        learn_without(whole, log, partition, set())
        return {
            "user_events": self.counts[user], "removed": told["removed"], "removed_by_bytes": removed,
            "exact": told["exact"], "digest_equal": without.learner.digest() == told["digest"],
            "digest_changed": whole.learner.digest() != told["digest"], "seconds": seconds,
            "relearning_s": told["seconds"], "one_replay_s": time.monotonic() - began,
        }  # fmt: skip

    async def _own(self, user: str, partition: int) -> set[int]:
        found = set()
        for code, name in enumerate(USERS[:2]):
            topic = self.settings.topic(name)
            async for offset, key, _ in kafka.keys(self.settings.kafka_options(), topic, partition):
                if key == user.encode():
                    found.add(rows.position(code, offset))
        return found

    async def _log(self, stop: int) -> list[tuple[int, bytes]]:
        return [(r.offset, r.value) async for batch in self._read(explain.EXAMPLES, 0, 0, stop) for r in batch]


class _Case(msgspec.Struct):
    """A what-if that was answered. changed: another list than the real one."""

    user: str
    without: list[str]
    more: list[dict[str, Any]]
    token: Token
    changed: bool


class _Logs:
    """The logs of one partition without what the cases leave out, and with what they add at its end."""

    def __init__(self, read: rebuild.Read, cases: list[_Case]) -> None:
        self._read = read
        self._gone = {position for case in cases for position in case.without}
        self._more: dict[str, list[Any]] = {name: [] for name in USERS}
        applied = cases[0].token.applied
        assert all(case.token.applied == applied for case in cases), "the stream was quiet"
        self._ends = {name: applied[name] for name in USERS}
        for case in cases:
            for event in case.more:
                self._add("comments" if event["type"] == "comment" else "clicks", case, event)

    @property
    def upto(self) -> Mapping[str, int]:
        """The last offset of each log."""
        return {
            name: end + len(self._more[name]) for name, end in self._ends.items() if end + len(self._more[name]) >= 0
        }

    def _add(self, name: str, case: _Case, event: dict[str, Any]) -> None:
        offset = self._ends[name] + 1 + len(self._more[name])
        self._more[name].append(SimpleNamespace(
            topic=name, partition=case.token.partition, offset=offset, timestamp=round(1e3 * event["ts"]) + 1,
            key=case.user.encode(), value=json.dumps(event).encode(), headers=(),
        ))  # fmt: skip

    async def read(self, name: str, partition: int, start: int, stop: int) -> AsyncIterator[Sequence[Any]]:
        """As `rebuild.Read`; a record that is left out is nobody's, at the same time."""
        if self._ends[name] >= start:
            async for batch in self._read(name, partition, start, min(stop, self._ends[name])):
                yield [
                    _of_nobody(name, record) if f"{name}:{partition}:{record.offset}" in self._gone else record
                    for record in batch
                ]
        yield self._more[name]


def _of_nobody(name: str, record: Any) -> Any:
    event = {**json.loads(record.value), "user_id": NOBODY}
    return SimpleNamespace(
        topic=name, partition=record.partition, offset=record.offset, timestamp=record.timestamp,
        key=NOBODY.encode(), value=json.dumps(event).encode(), headers=(),
    )  # fmt: skip


def learn_without(
    learner: ItemLearner, log: list[tuple[int, bytes]], partition: int, positions: set[int]
) -> int:  # fmt: skip
    """Learns the examples log without the partition's examples of these positions: how many they were.

    Only what the log's bytes say decides; removals have no effect.
    """
    removed = 0
    for offset, message in log:
        kind, of, count = examples.read_header(message)
        if kind == examples.KIND_REMOVALS:
            continue
        if kind == examples.KIND_EXAMPLES and of == partition and positions:
            kept = [e for e in split(message) if int.from_bytes(e[16:24], "little") not in positions]
            removed += count - len(kept)
            if not kept:
                continue
            message = examples.pack_examples(partition, kept)
        learner.learn(offset, message)
    return removed


def split(message: bytes, text_dim: int = 384) -> list[bytes]:
    """The packed examples of a message, by the layout of docs/data.md."""
    at, parts = examples.HEADER.size, []
    for _ in range(examples.read_header(message)[2]):
        end = at + 32 + 16 * message[at + 25]
        end += 8 + text_dim if message[at + 26] & 1 else 0
        end += 4 + 8 * int.from_bytes(message[end : end + 4], "little") if message[at + 26] & 2 else 0
        parts.append(message[at:end])
        at = end
    assert at == len(message)
    return parts


def _unseen(stage: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""
