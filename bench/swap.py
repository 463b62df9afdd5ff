"""Switches of the encoder's adapter under load, training beside the live path, and a trainer killed at every moment.

One worker, one stream, one reader at a steady rate: as it is, while the adapter is switched every SWITCH_EVERY_S, and
while `headwater trainer` trains all the time. Then the trainer is ended by kill -9 at each of its named moments, and in
the end held against one that followed the same log undisturbed.
"""

import argparse
import asyncio
import itertools
import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import aiohttp
import httpx
import msgspec
import numpy as np
import uvloop

from bench import load
from bench.chaos import broker_for
from bench.deployment import Deployment, WorkerProcess
from model.adapter import Adapter
from streams import examples, kafka
from streams.broker import free_port
from streams.pipeline import ItemLearner
from streams.settings import TRAINER_CRASH_STEPS
from streams.trainer import ADAPTER_KEY, STATE_FILE
from streams.worker import LEARNER_PARTITION

WARM_S: Final = 5.0
SWITCH_EVERY_S: Final = 1.0
PROBES_PER_S: Final = 10.0
KILL_S_MAX: Final = 60.0
TRAINING_S_MAX: Final = 120.0  # until the first step: a trainer takes what the machine has left
REQUEST_S_MAX: Final = 10.0
PHASES: Final = 5  # with what is between them
RANK: Final = 16  # of the planted adapters
ROUND_EXAMPLES: Final = 64  # the trainer makes its next candidate as soon as the last is judged
SHADOW_TESTS: Final = 100
HARM: Final = 3.0  # scale of the harmful adapter
CATCH_UP_S: Final = 10.0  # of a trainer, before it is looked at again
TRAINER: Final = [sys.executable, "-m", "streams", "trainer"]
SWITCH_MOMENTS: Final = ("ask", "asked", "switch", "retire")
STATE_OFFSET: Final = 2  # of a trainer's saved state


def run(arguments: list[str]) -> dict[str, Any]:
    """`python -m bench swap [--rate REQUESTS_PER_S] [--stream EVENTS_PER_S] [--seconds N] [--kills all|none|a,b]`"""
    parser = argparse.ArgumentParser(prog="python -m bench swap", description=__doc__)
    parser.add_argument("--rate", type=float, default=50.0, help="lists a second")
    parser.add_argument("--stream", type=float, default=1_000.0, help="events a second beside them")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each phase")
    parser.add_argument("--items", type=int, default=2_000)
    parser.add_argument("--users", type=int, default=5_000)
    parser.add_argument("--kills", default="all", help=f"of the trainer, at: {', '.join(TRAINER_CRASH_STEPS)}")
    parser.add_argument("--broker", default="embedded", help="embedded, or a running Kafka's HOST:PORT")
    asked = parser.parse_args(arguments)
    named = {"all": TRAINER_CRASH_STEPS, "none": ()}
    moments = named[asked.kills] if asked.kills in named else tuple(asked.kills.split(","))
    with tempfile.TemporaryDirectory() as folder, broker_for(asked.broker) as address:
        deployment = Deployment(
            address, Path(folder), topic_prefix="swap-", app_id="bench", rank_sample=0.5, session_timeout_s=10.0,
            trainer_dir=f"{folder}/trainer", checkpoints=f"{folder}/checkpoints", trainer_port=free_port(),
            checkpoints_keep=1, tuning_round_examples=ROUND_EXAMPLES, tuning_shadow_tests=SHADOW_TESTS,
        )  # fmt: skip
        try:
            worker = load.start_with_catalogue(deployment, asked.items)
            return uvloop.run(_measure(deployment, worker, asked, moments))
        finally:
            deployment.close()


async def _measure(
    deployment: Deployment, worker: WorkerProcess, asked: argparse.Namespace, moments: Sequence[str]
) -> dict[str, Any]:
    producer = kafka.Producer(deployment.settings.kafka_options())
    await producer.start()
    stream = load.Stream(asked.items, asked.users)
    stream.prepare(int(PHASES * asked.seconds * asked.stream))
    feed = asyncio.create_task(load.publish_events(deployment.settings, stream, 1 << 40, asked.stream))
    timeout = aiohttp.ClientTimeout(total=REQUEST_S_MAX)
    live = _Live(worker, producer, asked)
    try:
        async with aiohttp.ClientSession(worker.settings.http_url(), timeout=timeout) as live.http:
            await live.phase(WARM_S)
            normal = await live.phase(asked.seconds)
            swapping = asyncio.create_task(live.swap())
            swap = await live.phase(asked.seconds)
            swapping.cancel()
            trainer = deployment.start_worker("trainer", TRAINER)
            await asyncio.to_thread(trainer.wait_until, "a step", lambda: _steps(trainer) > 0, TRAINING_S_MAX)
            steps = _steps(trainer)
            training = await live.phase(asked.seconds)
            steps = _steps(trainer) - steps
            await asyncio.to_thread(trainer.stop)
            again = await live.phase(asked.seconds)
            killed = await _kills(deployment, live, moments)
    finally:
        feed.cancel()
        await asyncio.gather(feed, return_exceptions=True)
    replayed = await _replays(deployment, worker)
    result = {
        "normal": normal, "normal_again": again,
        "swap": {**swap, "switches": len(live.switch_s), "seen_after_s": max(live.switch_s)},
        "training": {**training, "steps": steps},
        "swap_p99_ratio": swap["p99_ms"] / normal["p99_ms"], "failed": live.failed,
        "training_freshness_p99_ratio": 2 * training["clicks_ms"]["p99"]
        / (normal["clicks_ms"]["p99"] + again["clicks_ms"]["p99"]),
        "replay_has_the_digest": replayed, "kills": killed, "rate": asked.rate, "stream": asked.stream,
        "items": asked.items,
    }  # fmt: skip
    if moments:
        result["as_undisturbed"] = await _as_undisturbed(deployment)
    await producer.stop()
    return result


class _Live:
    """The reader, the probes and whoever switches, beside one worker."""

    http: aiohttp.ClientSession

    def __init__(self, worker: WorkerProcess, producer: kafka.Producer, asked: argparse.Namespace) -> None:
        self.worker, self.producer, self.asked = worker, producer, asked
        self.failed = 0
        self.switch_s: list[float] = []  # from the message to the replica that compares through it
        self._probes = itertools.count()
        self._draw = np.random.default_rng(11)
        base = worker.get("/v1/model")["encoder"]["name"]
        left, right = self._draw.standard_normal((2, 384, RANK)).astype(np.float32) / 6
        self.adapter = Adapter(base, left, right, 1.2)
        self.harmful = Adapter(base, 8 * left, right, HARM)

    async def phase(self, seconds: float) -> dict[str, Any]:
        """Lists at the rate, each timed from when it was due, and probes of freshness, for so long."""
        took: list[float] = []
        clicks: list[float] = []
        tasks, started, failed = [], time.monotonic(), self.failed
        every = max(1, round(self.asked.rate / PROBES_PER_S))
        for n in range(int(seconds * self.asked.rate)):
            due = started + n / self.asked.rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            tasks.append(asyncio.create_task(self._list(due, took)))
            if n % every == 0:
                tasks.append(asyncio.create_task(self._probe(next(self._probes), clicks)))
        await asyncio.gather(*tasks)
        (p50, p99), (fresh_p50, fresh_p99) = (np.quantile(seconds, [0.5, 0.99]) * 1e3 for seconds in (took, clicks))
        return {
            "requests": len(took), "failed": self.failed - failed, "p50_ms": float(p50), "p99_ms": float(p99),
            "clicks_ms": {"p50": float(fresh_p50), "p99": float(fresh_p99), "count": len(clicks)},
        }  # fmt: skip

    async def _probe(self, number: int, took: list[float]) -> None:
        """Publishes a click of a new user, and reads that user until the click is there."""
        user, settings = f"probe-{number}", self.worker.settings
        event = {"user_id": user, "item_id": f"i{number % 100}", "action": "click", "ts": time.time()}
        started = time.monotonic()
        partition = kafka.partition_of(user.encode(), settings.partitions)
        record = (user.encode(), json.dumps(event).encode())
        offset = await self.producer.send(settings.topic("clicks"), partition, [record])
        wait = {"at_least": f"clicks:{partition}:{offset}"}
        async with self.http.get(f"/v1/users/{user}/state", params=wait) as answer:
            self.failed += answer.status != 200
        took.append(time.monotonic() - started)

    async def _list(self, due: float, took: list[float]) -> None:
        try:
            path = f"/v1/users/u{self._draw.integers(self.asked.users)}/recommendations"
            async with self.http.get(path) as answer:
                whole = answer.status == 200 and len((await answer.json())["items"]) == 10
        except (aiohttp.ClientError, TimeoutError):
            whole = False
        self.failed += not whole
        took.append(time.monotonic() - due)

    async def send(self, adapter: Adapter | None, taken_back: bool = True) -> None:
        """The switch into the log."""
        message = examples.pack_adapter(adapter, taken_back)
        topic = self.worker.settings.internal_topic("examples")
        await self.producer.send(topic, LEARNER_PARTITION, [(ADAPTER_KEY, message)])

    async def swap(self) -> None:
        """To the adapter, and back, over and over."""
        for adapter in itertools.cycle((self.adapter, None)):
            started = time.monotonic()
            await self.send(adapter)
            name = None if adapter is None else adapter.name
            while (await self._model())["encoder"]["adapter"] != name:
                await asyncio.sleep(0.02)
            self.switch_s.append(time.monotonic() - started)
            await asyncio.sleep(SWITCH_EVERY_S)

    async def _model(self) -> Any:
        async with self.http.get("/v1/model") as answer:
            return await answer.json()


def _steps(trainer: WorkerProcess) -> int:
    """Training steps that a trainer tells of."""
    url = f"http://127.0.0.1:{trainer.settings.trainer_port}/metrics"
    told = httpx.get(url, timeout=5, trust_env=False).text
    found = re.search(r"^headwater_trainer_steps_total (\S+)$", told, re.MULTILINE)
    return int(float(found[1])) if found else 0


async def _kills(deployment: Deployment, live: _Live, moments: Sequence[str]) -> dict[str, float]:
    """{moment: seconds until the trainer died there}; each trainer goes on from what the one before left."""
    died: dict[str, float] = {}
    for moment in moments:
        trainer = deployment.start_worker("trainer", TRAINER, crash_at=f"{moment}:1")
        started = time.monotonic()
        while trainer.process.poll() is None and time.monotonic() - started < KILL_S_MAX:
            if moment in SWITCH_MOMENTS:
                await live.send(live.harmful, taken_back=False)
            await asyncio.sleep(1.0)
        if trainer.process.poll() is None:
            await asyncio.to_thread(trainer.stop)
            continue
        died[moment] = time.monotonic() - started
    return died


async def _as_undisturbed(deployment: Deployment) -> bool:
    """Whether the trainer that was killed ends as one that follows the whole log in one go."""
    saved = []
    for name in ("trainer", "undisturbed"):
        folder = deployment.folder / name
        told = {"trainer_dir": str(folder), "checkpoints": f"{folder}-checkpoints" if name != "trainer" else None}
        settings = deployment.settings
        end = await kafka.log_end(settings.kafka_options(), settings.internal_topic("examples"), LEARNER_PARTITION)
        while _offset(folder) < end - 1:
            trainer = deployment.start_worker(name, TRAINER, **{k: v for k, v in told.items() if v})
            await asyncio.sleep(CATCH_UP_S)
            await asyncio.to_thread(trainer.stop)
        saved.append((folder / STATE_FILE).read_bytes())
    return saved[0] == saved[1]


def _offset(folder: Path) -> int:
    path = folder / STATE_FILE
    return int(msgspec.msgpack.decode(path.read_bytes())[STATE_OFFSET]) if path.exists() else -1


async def _replays(deployment: Deployment, worker: WorkerProcess) -> bool:
    """Whether the examples log alone, without encoder and checkpoints, gives the worker's digest."""
    settings = deployment.settings
    [told] = [part for part in worker.digests() if part["kind"] == "learner"]
    offset, dim = told["applied"]["examples"], worker.get("/v1/model")["encoder"]["dim"]
    learner = ItemLearner(settings.learner_config(dim), dim)
    async for batch in kafka.read_log(settings.kafka_options(), settings.internal_topic("examples"), 0, 0, offset):
        for record in batch:
            await asyncio.to_thread(learner.learn, record.offset, record.value or b"")
    return learner.learner.digest() == str(told["digest"])
