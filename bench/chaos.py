"""Kills a worker again and again while a stream is published, then holds its state against an undisturbed worker's."""

import argparse
import asyncio
import json
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench.deployment import Deployment, WorkerProcess
from bench.load import publish
from model.examples import new_examples
from streams import examples, kafka
from streams.broker import EmbeddedBroker
from streams.datakeys import sealer_of
from streams.pipeline import ItemLearner
from streams.settings import Settings

TEXT_DIM: Final = 384
PARTITIONS: Final = 2
USERS: Final = 60
ITEMS: Final = 120
EVENTS_PER_S: Final = 200.0
TICK_S: Final = 0.25  # the embedded broker slows down with the number of batches in a log, so few are laid
SETTLED_S_MAX: Final = 180.0
FIRST_TS: Final = 1.7e9

WORDS: Final = ("river", "stone", "old", "song", "night", "blue", "engine", "paper", "garden", "salt", "wolf", "glass")


def run(arguments: list[str]) -> dict[str, Any]:
    """`python -m bench chaos --kills 20 [--broker embedded|HOST:PORT] [--seed N]`"""
    parser = argparse.ArgumentParser(prog="python -m bench chaos")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=1, choices=[1])
    parser.add_argument("--broker", default="embedded", help="embedded, or a running Kafka's HOST:PORT")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder, broker_for(asked.broker) as address:
        return disturb(address, Path(folder), asked.kills, asked.seed, prefix=f"chaos-{asked.seed}-")


@contextmanager
def broker_for(kind: str) -> Iterator[str]:
    """host:port: of an embedded broker for this block, or of the one that is named."""
    if kind != "embedded":
        yield kind
        return
    with EmbeddedBroker() as running:
        yield running.address


class Feed(threading.Thread):
    """Publishes items, then clicks and comments at a steady rate until it is told to stop; a function of the seed."""

    def __init__(self, settings: Settings, seed: int) -> None:
        super().__init__(daemon=True)
        self.settings = settings
        self.rng = random.Random(seed)
        self.published = 0
        self.enough = threading.Event()
        self.failure: BaseException | None = None

    def run(self) -> None:
        """The thread's work."""
        try:
            asyncio.run(self._publish())
        except BaseException as failure:
            self.failure = failure

    async def _publish(self) -> None:
        producer = kafka.Producer(self.settings.kafka_options())
        await producer.start()
        try:
            items = [{"item_id": f"i{n}", "text": " ".join(self.rng.sample(WORDS, 4))} for n in range(ITEMS)]
            laid = [(item["item_id"].encode(), json.dumps(item).encode()) for item in items]
            await publish(producer, self.settings, "items", laid)
            started = time.monotonic()
            while not self.enough.is_set():
                due = int((time.monotonic() - started) * EVENTS_PER_S)
                batch = [self._event(n) for n in range(self.published, due)]
                for topic in ("clicks", "comments"):
                    of_topic = [(key, json.dumps(value).encode()) for t, key, value in batch if t == topic]
                    await publish(producer, self.settings, topic, of_topic)
                self.published = due
                await asyncio.sleep(TICK_S)
        finally:
            await producer.stop()

    def _event(self, n: int) -> tuple[str, bytes, dict[str, Any]]:
        user, item, ts = f"u{self.rng.randrange(USERS)}", f"i{int(ITEMS * self.rng.random() ** 2)}", FIRST_TS + n
        if self.rng.random() < 0.03:
            text = " ".join(self.rng.choices(WORDS, k=5))
            return "comments", user.encode(), {"user_id": user, "item_id": item, "text": text, "ts": ts}
        action = "rating" if self.rng.random() < 0.2 else "click"
        return "clicks", user.encode(), {"user_id": user, "item_id": item, "action": action, "value": 2, "ts": ts}


def disturb(broker: str, folder: Path, kills: int, seed: int, prefix: str) -> dict[str, Any]:
    """Kills the worker `kills` times at random moments, every third time with its state folder deleted."""
    rng = random.Random(seed)
    # The feed lays a batch a topic: a comment may come a quarter of a second after later clicks. The hold covers it.
    settings = {"topic_prefix": prefix, "partitions": PARTITIONS, "rank_sample": 0.1, "merge_hold_ms": 1000.0}
    chaos = Deployment(broker, folder / "chaos", app_id="chaos", **settings)
    calm = Deployment(broker, folder / "calm", app_id="calm", **settings)
    started = time.monotonic()
    try:
        for deployment in (chaos, calm):
            deployment.create_topics()
        feed = Feed(chaos.settings, seed)
        feed.start()
        worker = chaos.start_worker()
        wiped = 0
        for n in range(kills):
            worker.wait_ready()
            _spend(rng.random() * 1.5)
            worker.kill()
            if n % 3 == 2:
                shutil.rmtree(chaos.state_dir())
                wiped += 1
            worker = chaos.start_worker()
        worker.wait_ready()
        feed.enough.set()
        feed.join()
        if feed.failure is not None:
            raise feed.failure
        ends = asyncio.run(_source_ends(chaos.settings))
        told = _settled(worker, ends)
        straight = calm.start_worker()
        other = _settled(straight, ends)
        found = asyncio.run(_compare(chaos.settings, calm.settings, told, other))
        exits = [worker.stop(), straight.stop()]
    finally:
        chaos.close()
        calm.close()
    return {
        "kills": kills, "broker_kills": 0, "wiped": wiped, "events": feed.published, **found,
        "exit_codes": [code for code, _ in exits], "seconds": time.monotonic() - started,
    }  # fmt: skip


def _spend(seconds: float) -> None:
    threading.Event().wait(seconds)  # a kill's moment is the experiment's input


async def _source_ends(settings: Settings) -> dict[tuple[str, int], int]:
    options = settings.kafka_options()
    return {
        (name, p): await kafka.log_end(options, settings.topic(name), p)
        for name in ("clicks", "comments", "items")
        for p in range(settings.partitions)
    }


def _settled(worker: WorkerProcess, ends: dict[tuple[str, int], int]) -> list[dict[str, Any]]:
    """The digests once everything is applied and learnt."""
    worker.wait_ready()
    told: list[dict[str, Any]] = []

    def settled() -> bool:
        nonlocal told
        told = worker.digests()
        for (name, p), end in ends.items():
            kind = "catalogue" if name == "items" else "users"
            applied = next(d["applied"] for d in told if d["kind"] == kind and d["partition"] == p)
            if applied.get(name, -1) + 1 < end:
                return False
        learner = next(d for d in told if d["kind"] == "learner")
        topic = worker.settings.internal_topic("examples")
        end = asyncio.run(kafka.log_end(worker.settings.kafka_options(), topic, 0))
        return bool(learner["applied"]["examples"] + 1 >= end)

    try:
        worker.wait_until("all applied and learnt", settled, SETTLED_S_MAX)
    except TimeoutError as late:
        reached = {(d["kind"], d["partition"]): d["applied"] for d in told}
        raise TimeoutError(f"the worker stands at {reached}, the logs end at {ends}: {late}") from late
    return worker.digests()


async def _compare(
    chaos: Settings, calm: Settings, told: list[dict[str, Any]], other: list[dict[str, Any]]
) -> dict[str, Any]:
    """How the disturbed state differs: rows by digest, examples one by one, the item matrix by replaying its log."""
    different = 0
    for one in told:
        if one["kind"] == "learner":
            continue
        twin = next(d for d in other if (d["kind"], d["partition"]) == (one["kind"], one["partition"]))
        different += (one["digest"], one["applied"]) != (twin["digest"], twin["applied"])
    ours, doubled = await _examples(chaos)
    theirs, _ = await _examples(calm)
    replayed, repeats = await _replay(chaos)
    learner = next(d for d in told if d["kind"] == "learner")
    return {
        "rows_different": different,  # partitions whose rows differ, by digest
        "examples": len(theirs),
        "examples_missing": len(theirs.keys() - ours.keys()),
        "examples_wrong": sum(ours[k] != theirs[k] for k in theirs.keys() & ours.keys()),
        "examples_doubled": doubled,
        "repeats_dropped": repeats,
        "item_state_equal": replayed == learner["digest"],
    }


async def _messages(settings: Settings) -> Any:
    sealer = sealer_of(settings)
    topic = settings.internal_topic("examples")
    end = await kafka.log_end(settings.kafka_options(), topic, 0)
    async for batch in kafka.read_log(settings.kafka_options(), topic, 0, 0, end - 1):
        for record in batch:
            yield record if sealer is None else record._replace(value=sealer.open_message(record.value or b""))


async def _examples(settings: Settings) -> tuple[dict[int, bytes], int]:
    """{source position: the example's arrays} after the learner's own dedupe, and how many came twice even so."""
    config = settings.learner_config(TEXT_DIM)
    buffer = new_examples(config, seen_max=1 << 18)
    applied: dict[int, Any] = {}
    found: dict[int, bytes] = {}
    doubled = 0
    async for record in _messages(settings):
        kind, partition, _ = examples.read_header(record.value)
        if kind != examples.KIND_EXAMPLES:
            continue
        offsets = applied.setdefault(partition, np.full(len(examples.TOPICS), -1, np.int64))
        batch = examples.unpack_examples(record.value, buffer, offsets)
        for b in range(batch.count):
            n = int(batch.history_count[b])
            arrays = (
                batch.item[b], batch.label[b], batch.ts[b], batch.history_item[b, :n], batch.history_weight[b, :n],
                batch.history_ts[b, :n], batch.text_on[b], batch.text[b] if batch.text_on[b] else b"", batch.ranked[b],
            )  # fmt: skip
            doubled += int(batch.source[b]) in found
            found[int(batch.source[b])] = b"|".join(bytes(a) if isinstance(a, bytes) else a.tobytes() for a in arrays)
    return found, doubled


async def _replay(settings: Settings) -> tuple[str, int]:
    """The digest of an undisturbed learner over the disturbed log, and the messages that it found to be repeats."""
    learner = ItemLearner(settings.learner_config(TEXT_DIM), TEXT_DIM)
    repeats = 0
    async for record in _messages(settings):
        learnt = learner.learn(record.offset, record.value)
        repeats += not learnt.examples and not learnt.entries
    return learner.learner.digest(), repeats
