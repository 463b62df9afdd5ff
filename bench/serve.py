"""Lists over HTTP from one worker at a steady rate of requests, with and without reasons, beside a stream."""

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec
import numpy as np
import uvloop

from bench import load
from bench.chaos import broker_for
from bench.deployment import Deployment, WorkerProcess
from streams.settings import Settings

LIST: Final = 10
WARM_S: Final = 5.0
REQUEST_S_MAX: Final = 10.0
CLIENT_NICE: Final = 5  # before the others


class _List(msgspec.Struct):
    items: list[msgspec.Raw]


def run(arguments: list[str]) -> dict[str, Any]:
    """`python -m bench serve [--rate REQUESTS_PER_S] [--stream EVENTS_PER_S] [--seconds N] [--items N] [--users N]`"""
    parser = argparse.ArgumentParser(prog="python -m bench serve")
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second")
    parser.add_argument("--stream", type=float, default=7_500.0, help="events a second beside them; 0: none")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each kind of list")
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--users", type=int, default=5_000)
    parser.add_argument("--broker", default="embedded", help="embedded, or a running Kafka's HOST:PORT")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder, broker_for(asked.broker) as address:
        deployment = Deployment(
            address, Path(folder), topic_prefix="serve-", app_id="bench", rank_sample=0.0, session_timeout_s=10.0
        )
        try:
            worker = load.start_with_catalogue(deployment, asked.items)
            with_stream = asked.stream > 0
            count = int(asked.stream * (2 * asked.seconds + 2 * WARM_S))
            feed = multiprocessing.get_context("spawn").Process(
                target=_feed, args=(deployment.settings, asked.items, asked.users, count, asked.stream), daemon=True
            )
            if with_stream:
                feed.start()
                worker.wait_until("the stream", lambda: worker.get("/v1/model")["events_applied"] > 0)
            try:
                return uvloop.run(_measure(worker, asked))
            finally:
                if with_stream:
                    feed.terminate()
                    feed.join()
        finally:
            deployment.close()


def _feed(settings: Settings, items: int, users: int, count: int, rate: float) -> None:
    stream = load.Stream(items, users)
    stream.prepare(count)
    asyncio.run(load.publish_events(settings, stream, count, rate))


async def _measure(worker: WorkerProcess, asked: argparse.Namespace) -> dict[str, Any]:
    with contextlib.suppress(PermissionError):  # who asks stands for other machines, which do not wait for this one's
        os.nice(-CLIENT_NICE)
    timeout = aiohttp.ClientTimeout(total=REQUEST_S_MAX)
    async with aiohttp.ClientSession(worker.settings.http_url(), timeout=timeout) as http:
        pid = worker.process.pid
        await _lists(http, asked, pid, WARM_S, explain=False)
        before, started = await _events(http), time.monotonic()
        plain = await _lists(http, asked, pid, asked.seconds, explain=False)
        explained = await _lists(http, asked, pid, asked.seconds, explain=True)
        streamed = (await _events(http) - before) / (time.monotonic() - started)
    return {
        **plain, "explained": explained, "rate": asked.rate, "items": asked.items, "list": LIST,
        "stream_events_per_s": streamed, "requests": int(asked.rate * asked.seconds),
    }  # fmt: skip


async def _events(http: aiohttp.ClientSession) -> int:
    async with http.get("/v1/model") as answer:
        return int((await answer.json())["events_applied"])


async def _lists(
    http: aiohttp.ClientSession, asked: argparse.Namespace, worker_pid: int, seconds: float, explain: bool
) -> dict[str, float]:
    """Asks at the rate, whether or not the answers come: each is timed from the moment when it was due.

    cpu_ms: all CPU time of the worker, the stream's too, a request.
    """
    draw = np.random.default_rng(11)
    took: list[float] = []
    started, cpu_s = time.monotonic(), _cpu_s(worker_pid)

    async def one(user: int, due: float) -> None:
        query = {"limit": str(LIST), "explain": str(explain).lower()}
        async with http.get(f"/v1/users/u{user}/recommendations", params=query) as answer:
            body = await answer.read()
            assert answer.status == 200, body
            assert len(msgspec.json.decode(body, type=_List).items) == LIST
        took.append(time.monotonic() - due)

    tasks = []
    for n, user in enumerate(draw.integers(0, asked.users, int(asked.rate * seconds)).tolist()):
        due = started + n / asked.rate
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(asyncio.create_task(one(user, due)))
    await asyncio.gather(*tasks)
    p50, p99 = np.quantile(took, [0.5, 0.99]) * 1e3
    cpu_ms = (_cpu_s(worker_pid) - cpu_s) * 1e3 / len(took)
    rps = len(took) / (time.monotonic() - started)
    return {"rps": rps, "p50_ms": float(p50), "p99_ms": float(p99), "cpu_ms": cpu_ms}


def _cpu_s(pid: int) -> float:
    """User and system time of a process, as /proc has it."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
