"""Memory and disk of one worker over a long stream that is faster than it: the curve, and bytes a user and an item.

What is held against each other is the memory after the first million events and after all of them: each time all is
learnt, flushed and in the replica. The curve has what it takes under load, with a flush of all items on its way.
"""

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

from bench import load, words
from bench.chaos import site_of
from bench.deployment import Deployment, WorkerProcess
from model.learner import LearnerConfig
from state import rows
from streams import kafka
from streams.worker import LEARNER_PARTITION

SAMPLE_S: Final = 2.0
CHUNK_EVENTS: Final = 20_000
WARM_EVENTS: Final = 1_000_000  # what the end is held against
CURVE_POINTS: Final = 20
RSS_RATIO_MAX: Final = 1.1
DISK_RATIO_MAX: Final = 2.0  # of the rows' own bytes: what RocksDB has not compacted yet
STATE_METRICS: Final = "headwater_state_"  # rows and bytes, as RocksDB estimates them
USER_BYTES: Final = 'headwater_state_bytes{kind="users"}'
ITEM_BYTES: Final = 'headwater_state_bytes{kind="learner"}'
LEARNER_LAG: Final = 'headwater_consumer_lag_records{kind="learner"}'
RETENTION_HOURS: Final = 0.1  # of what is read once; the feed never lies further ahead than a minute or two


class Sample(NamedTuple):
    """One moment of the worker. Times in s, sizes in MiB. `behind`: messages of the examples log not learnt yet."""

    seconds: float
    applied: int
    lag: int
    behind: int
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
            before = worker.rebalances()
            samples, settled = asyncio.run(_measure(worker, deployment.state_dir(), asked))
            metrics = worker.metrics()
            state = {name: n for name, n in metrics.items() if name.startswith(STATE_METRICS)}
            told = _told(samples, settled, asked)
            rebalances = worker.rebalances() != before
            user, item = state[USER_BYTES] / asked.users, state[ITEM_BYTES] / asked.items
            code, stop_s = worker.stop()
            if code:
                raise SystemExit(f"the worker ended with {code}:\n{worker.tail()}")
        finally:
            deployment.close()
    broken = {
        "RSS at rest": told["rss_ratio"] > RSS_RATIO_MAX, "a heartbeat was missed": rebalances,
        "bytes a user": user > DISK_RATIO_MAX * rows.row_bytes_max(words.DIM),
        "bytes an item": item > DISK_RATIO_MAX * _item_bytes_max(deployment.settings.learner_config(words.DIM)),
    }  # fmt: skip
    return {
        **told, "user_bytes": user, "item_bytes": item, "state": state, "stop_s": stop_s,
        "broken": [name for name, is_so in broken.items() if is_so],
    }  # fmt: skip


def _item_bytes_max(config: LearnerConfig) -> int:
    """Of rows s, d and n (docs/data.md), with an id of 8 bytes and no text."""
    return 128 + 8 * config.dim + 8 * config.neighbours_max + 2 * config.text_dim


class _Feed:
    """Publishes the stream, no further ahead of the worker than asked, and samples the worker meanwhile."""

    def __init__(
        self, worker: WorkerProcess, state_dir: Path, asked: argparse.Namespace, producer: kafka.Producer,
        http: httpx.AsyncClient,
    ) -> None:  # fmt: skip
        self.samples: list[Sample] = []
        self._worker, self._state_dir, self._lag_max = worker, state_dir, asked.lag
        self._producer, self._http = producer, http
        self._stream = load.Stream(asked.items, asked.users)
        self._published = 0
        self._started = time.monotonic()

    async def until(self, events: int) -> Sample:
        """Publishes up to this many events; the sample once all is learnt, flushed and in the replica."""
        newest, is_settled = await self._sample()
        while not is_settled or self._published < events:
            while self._published < events and self._published - newest.applied < self._lag_max:
                count = min(CHUNK_EVENTS, events - self._published)
                records = self._stream.take(count, time.time())
                await load.publish(self._producer, self._worker.settings, "clicks", records)
                self._published += count
                if self._seconds() - newest.seconds > SAMPLE_S:
                    break
            await asyncio.sleep(max(0.0, SAMPLE_S - (self._seconds() - newest.seconds)))
            newest, is_settled = await self._sample()
        return newest

    def _seconds(self) -> float:
        return time.monotonic() - self._started

    async def _sample(self) -> tuple[Sample, bool]:
        settings = self._worker.settings
        told = (await self._http.get("/v1/model")).json()
        end = await kafka.log_end(settings.kafka_options(), settings.internal_topic("examples"), LEARNER_PARTITION)
        applied = int(told["events_applied"])
        taken = Sample(
            self._seconds(), applied, self._published - applied,
            int(self._worker.metrics().get(LEARNER_LAG, 0.0)),
            _rss_mib(self._worker.process.pid), _disk_mib(self._state_dir),
        )  # fmt: skip
        self.samples.append(taken)
        print(json.dumps(taken._asdict()), flush=True)
        return taken, taken.lag == 0 and told["replica"]["applied"]["examples"] == end - 1


async def _measure(
    worker: WorkerProcess, state_dir: Path, asked: argparse.Namespace
) -> tuple[list[Sample], list[Sample]]:  # fmt: skip
    """(all samples, those after the first WARM_EVENTS and after all events)."""
    settings = worker.settings
    producer = kafka.Producer(settings.kafka_options())
    await producer.start()
    async with httpx.AsyncClient(base_url=settings.http_url(), timeout=30, trust_env=False) as http:
        feed = _Feed(worker, state_dir, asked, producer, http)
        settled = [await feed.until(events) for events in (min(WARM_EVENTS, asked.events // 2), asked.events)]
    await producer.stop()
    return feed.samples, settled


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


def _told(samples: list[Sample], settled: list[Sample], asked: argparse.Namespace) -> dict[str, Any]:
    warm, end = settled
    taken = next(s for s in samples if s.applied == asked.events)
    fed_s = taken.seconds - warm.seconds
    step = max(1, len(samples) // CURVE_POINTS)
    return {
        "events": asked.events, "users": asked.users, "items": asked.items,
        "events_per_s": (taken.applied - warm.applied) / fed_s,
        "learnt_events_per_s": (end.applied - warm.applied) / (end.seconds - warm.seconds),
        "warm_events": warm.applied, "warm_rss_mib": warm.rss_mib, "end_rss_mib": end.rss_mib,
        "rss_ratio": end.rss_mib / warm.rss_mib, "max_rss_mib": max(s.rss_mib for s in samples),
        "warm_max_rss_mib": max(s.rss_mib for s in samples if s.seconds <= warm.seconds),
        "lag_max": max(s.lag for s in samples), "behind_max": max(s.behind for s in samples), "disk_mib": end.disk_mib,
        "curve": [list(s) for s in samples[::step]],
    }  # fmt: skip
