"""Memory and disk of one worker over a long stream that is faster than it: the curve, and bytes a user and an item."""

import argparse
import asyncio
import json
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx

from bench import load
from bench.chaos import site_of
from bench.deployment import Deployment, WorkerProcess
from streams import kafka

SAMPLE_S: Final = 2.0
CHUNK_EVENTS: Final = 20_000
WARM_EVENTS: Final = 1_000_000  # what the end is held against
CURVE_POINTS: Final = 20
RETENTION_HOURS: Final = 0.1  # of what is read once; the feed never lies further ahead than a minute or two


class Sample(NamedTuple):
    """One moment of the worker. Times in s, sizes in MiB."""

    seconds: float
    applied: int
    lag: int
    rss_mib: float
    disk_mib: float


def run(arguments: list[str]) -> dict[str, Any]:
    """`python -m bench memory [--events N] [--users N] [--items N] [--lag N] [--broker embedded|kafka|HOST:PORT]`"""
    parser = argparse.ArgumentParser(prog="python -m bench memory")
    parser.add_argument("--events", type=int, default=2_000_000)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--lag", type=int, default=300_000, help="events that the feed is ahead of the worker, at most")
    parser.add_argument(
        "--broker", default="kafka", help="embedded, kafka (started here), or a running one's HOST:PORT"
    )
    parser.add_argument("--kafka", type=Path, help="folder with Kafka's libs/; else HEADWATER_TEST_KAFKA")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder, site_of(asked.broker, Path(folder), asked.kafka) as site:
        deployment = Deployment(
            site.address, Path(folder), topic_prefix="memory-", app_id="bench", rank_sample=0.001,
            session_timeout_s=30.0, retention_hours=RETENTION_HOURS, examples_retention_hours=RETENTION_HOURS,
            compaction_lag_hours=RETENTION_HOURS,
        )  # fmt: skip
        try:
            worker = load.start_with_catalogue(deployment, asked.items, 600)
            samples = asyncio.run(_measure(worker, deployment.state_dir(), asked))
            state = _state(worker)
            code, stop_s = worker.stop()
        finally:
            deployment.close()
    return {**_told(samples, asked), "state": state, "exit": code, "stop_s": stop_s}


async def _measure(worker: WorkerProcess, state_dir: Path, asked: argparse.Namespace) -> list[Sample]:
    samples: list[Sample] = []
    settings = worker.settings
    producer = kafka.Producer(settings.kafka_options())
    await producer.start()
    stream, published, started = load.Stream(asked.items, asked.users), 0, time.monotonic()
    async with httpx.AsyncClient(base_url=settings.http_url(), timeout=30, trust_env=False) as http:

        async def sample() -> Sample:
            applied = int((await http.get("/v1/model")).json()["events_applied"])
            taken = Sample(
                time.monotonic() - started, applied, published - applied, _rss_mib(worker.process.pid),
                _disk_mib(state_dir),
            )  # fmt: skip
            samples.append(taken)
            print(json.dumps(taken._asdict()), flush=True)
            return taken

        newest = await sample()
        while newest.applied < asked.events:
            while published < asked.events and published - newest.applied < asked.lag:
                count = min(CHUNK_EVENTS, asked.events - published)
                await load.publish(producer, settings, "clicks", stream.take(count, time.time()))
                published += count
                if time.monotonic() - started - newest.seconds > SAMPLE_S:
                    break
            await asyncio.sleep(max(0.0, SAMPLE_S - (time.monotonic() - started - newest.seconds)))
            newest = await sample()
    await producer.stop()
    return samples


def _state(worker: WorkerProcess) -> dict[str, float]:
    """What the worker's metrics tell of its state: rows (as RocksDB estimates them) and bytes of each kind."""
    found = re.findall(r"^(headwater_state_\w+\{[^}]*\}) (\S+)$", worker.http.get("/metrics").text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def _rss_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


def _disk_mib(folder: Path) -> float:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(root) / name).stat().st_size
            except FileNotFoundError:  # a compaction took it
                continue
    return total / (1 << 20)


def _told(samples: list[Sample], asked: argparse.Namespace) -> dict[str, Any]:
    warm = next((s for s in samples if s.applied >= min(WARM_EVENTS, asked.events // 2)), samples[-1])
    after = [s for s in samples if s.applied >= warm.applied]
    end = samples[-1]
    step = max(1, len(samples) // CURVE_POINTS)
    return {
        "events": asked.events, "users": asked.users, "items": asked.items, "events_per_s": end.applied / end.seconds,
        "warm_events": warm.applied, "warm_rss_mib": warm.rss_mib, "end_rss_mib": end.rss_mib,
        "max_rss_mib": max(s.rss_mib for s in samples), "rss_ratio": end.rss_mib / warm.rss_mib,
        "rss_ratio_max": max(s.rss_mib for s in after) / warm.rss_mib,
        "lag_max": max(s.lag for s in samples), "disk_mib": end.disk_mib,
        "curve": [list(s) for s in samples[::step]],
    }  # fmt: skip
