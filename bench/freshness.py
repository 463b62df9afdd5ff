"""How long after its publication an event is visible to a read, and learnt, at a steady rate."""

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import aiohttp
import numpy as np
import uvloop

from bench import load
from bench.chaos import broker_for
from bench.deployment import Deployment, WorkerProcess
from streams import kafka

PROBES_PER_S: Final = 20.0
COMMENTS_PER_S: Final = 2.0
WARM_S: Final = 5.0
PROBE_S_MAX: Final = 10.0


def run(arguments: list[str]) -> dict[str, Any]:
    """`python -m bench freshness [--rate EVENTS_PER_S] [--seconds N] [--items N] [--broker embedded|HOST:PORT]`"""
    parser = argparse.ArgumentParser(prog="python -m bench freshness")
    parser.add_argument("--rate", type=float, default=7_500.0, help="clicks a second beside the probes")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--items", type=int, default=2_000)
    parser.add_argument("--users", type=int, default=50_000)
    parser.add_argument("--broker", default="embedded", help="embedded, or a running Kafka's HOST:PORT")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder, broker_for(asked.broker) as address:
        deployment = Deployment(
            address, Path(folder), topic_prefix="fresh-", app_id="bench", rank_sample=0.0, session_timeout_s=10.0
        )
        try:
            worker = load.start_with_catalogue(deployment, asked.items)
            return uvloop.run(_measure(worker, asked.rate, asked.seconds, asked.items, asked.users))
        finally:
            deployment.close()


async def _measure(worker: WorkerProcess, rate: float, seconds: float, items: int, users: int) -> dict[str, Any]:
    settings = worker.settings
    count = int(rate * (WARM_S + seconds))
    stream = load.Stream(items, users)
    stream.prepare(count)
    feed = asyncio.create_task(load.publish_events(settings, stream, count, rate))
    producer = kafka.Producer(settings.kafka_options())
    await producer.start()
    clicks: list[float] = []
    comments: list[float] = []
    probes: set[asyncio.Task[None]] = set()
    timeout = aiohttp.ClientTimeout(total=PROBE_S_MAX)
    async with aiohttp.ClientSession(settings.http_url(), timeout=timeout) as http:
        await asyncio.sleep(WARM_S)
        started = time.monotonic()
        for n in range(int(seconds * PROBES_PER_S)):
            text = n % int(PROBES_PER_S / COMMENTS_PER_S) == 0
            probe = _probe(producer, http, worker, n, text, comments if text else clicks)
            probes.add(asyncio.create_task(probe))
            await asyncio.sleep(max(0.0, started + (n + 1) / PROBES_PER_S - time.monotonic()))
        await asyncio.gather(*probes)
        await feed
    await producer.stop()
    told = worker.get("/v1/model")
    learnt = worker.http.get("/metrics").text
    return {
        "rate": rate, "seconds": seconds, "items": items, "events": told["events_applied"],
        "clicks_ms": _quantiles(clicks), "comments_ms": _quantiles(comments),
        "learnt_ms": _histogram(learnt, "headwater_learnt_seconds"),
        "worker_clicks_ms": _histogram(learnt, "headwater_freshness_seconds", 'topic="clicks"'),
    }  # fmt: skip


async def _probe(
    producer: kafka.Producer, http: aiohttp.ClientSession, worker: WorkerProcess, n: int, text: bool, took: list[float]
) -> None:
    """Publishes one event of a new user, and reads that user until the event is there."""
    user = f"probe-{n}"
    event = {"user_id": user, "item_id": f"i{n % 100}", "ts": time.time()}
    event |= {"text": f"what a river, number {n}"} if text else {"action": "click"}
    topic = worker.settings.topic("comments" if text else "clicks")
    started = time.monotonic()
    partition = kafka.partition_of(user.encode(), worker.settings.partitions)
    offset = await producer.send(topic, partition, [(user.encode(), json.dumps(event).encode())])
    wait = f"{'comments' if text else 'clicks'}:{partition}:{offset}"
    async with http.get(f"/v1/users/{user}/state", params={"at_least": wait}, raise_for_status=True) as answer:
        told = await answer.json()
    assert told["events"] == 1, told
    took.append(time.monotonic() - started)


def _quantiles(seconds: list[float]) -> dict[str, float]:
    return {f"p{q}": float(np.quantile(seconds, q / 100)) * 1e3 for q in (50, 99)} | {"count": len(seconds)}


def _histogram(text: str, name: str, label: str = "") -> dict[str, float]:
    """Upper bounds of p50 and p99, in ms, of a histogram of the worker's metrics page."""
    buckets = []
    for line in text.splitlines():
        if line.startswith(f"{name}_bucket{{") and label in line:
            bound = line.split('le="')[1].split('"')[0]
            buckets.append((float("inf") if bound == "+Inf" else float(bound), float(line.rsplit(" ", 1)[1])))
    total = buckets[-1][1] if buckets else 0.0
    found = {}
    for q in (50, 99):
        found[f"p{q}_at_most"] = next((b * 1e3 for b, n in buckets if n >= total * q / 100), float("nan"))
    return found | {"count": total}
