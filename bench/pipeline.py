"""The whole chain of one worker under Faust against the same chain under a plain consumer loop, draining a backlog;
and against itself, started again on what came while it was stopped: those events by a worker that was not, too, for
users with longer histories take longer to learn.
"""

import argparse
import asyncio
import json
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from bench import load
from bench.chaos import broker_for
from streams import topics
from streams.broker import end_with_parent
from streams.settings import Settings, environment

STOPPED_S: Final = 60.0  # a session's length that outlasts the laying of a backlog before a sleeping worker
LAG_S: Final = 3600.0  # that what came meanwhile is spread over, by the events' own time


def run(arguments: list[str]) -> dict[str, Any]:
    """`python -m bench pipeline [--events N] [--items N] [--users N] [--rounds N] [--broker embedded|HOST:PORT]
    [--lag N] [--rank-sample SHARE]`"""
    parser = argparse.ArgumentParser(prog="python -m bench pipeline")
    parser.add_argument("--events", type=int, default=200_000)
    parser.add_argument("--items", type=int, default=2_000)
    parser.add_argument("--items-many", type=int, default=0, help="also with so many items, under Faust")
    parser.add_argument("--lag", type=int, default=0, help="also so many events more, laid while it was stopped")
    parser.add_argument("--users", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=1, help="of each way, in turn; the median counts")
    parser.add_argument("--broker", default="embedded", help="embedded, or a running Kafka's HOST:PORT")
    parser.add_argument("--rank-sample", type=float, default=0.0, help="share of the targets in the live race")
    asked = parser.parse_args(arguments)
    told = {"rank_sample": str(asked.rank_sample)}
    stream = {"broker": asked.broker, "events": asked.events, "items": asked.items, "users": asked.users, "more": told}
    ways: dict[str, Callable[..., dict[str, Any]]] = {via: partial(drain, via, **stream) for via in ("faust", "plain")}
    if asked.lag:
        ways["awake"] = partial(keep_up, lag=asked.lag, **stream)
        ways["lag"] = partial(catch_up, lag=asked.lag, **stream)
    rounds: dict[str, list[dict[str, Any]]] = {via: [] for via in ways}
    for n in range(asked.rounds):
        for via, way in ways.items():
            rounds[via].append(way(prefix=f"{via}{n}-"))
            print(json.dumps({"via": via, **rounds[via][-1]}), flush=True)
    faust, plain = (statistics.median(r["events_per_s"] for r in rounds[via]) for via in ("faust", "plain"))
    result: dict[str, Any] = {
        "faust_events_per_s": faust, "plain_events_per_s": plain, "ratio": faust / plain,
        "events": asked.events, "items": asked.items, "users": asked.users,
        "examples": rounds["faust"][0]["examples"],
        "stage_us_per_event": rounds["faust"][-1]["stage_us_per_event"],
        "cpu_us_per_event": rounds["faust"][-1]["cpu_us_per_event"],
    }  # fmt: skip
    if asked.lag:
        lag, awake = (statistics.median(r["events_per_s"] for r in rounds[via]) for via in ("lag", "awake"))
        result |= {
            "lag": asked.lag, "lag_events_per_s": lag, "lag_ratio": lag / faust,
            "awake_events_per_s": awake, "lag_ratio_same_events": lag / awake,
        }  # fmt: skip
    if asked.items_many:
        many = drain("faust", asked.broker, asked.events, asked.items_many, asked.users, "many-", told)
        print(json.dumps({"via": "faust", **many}), flush=True)
        result |= {
            "items_many": asked.items_many, "items_many_events_per_s": many["events_per_s"],
            "items_many_ratio": many["events_per_s"] / faust,
        }  # fmt: skip
    return result


def drain(
    via: str, broker: str, events: int, items: int, users: int, prefix: str, more: dict[str, str]
) -> dict[str, Any]:
    """One worker process that knows the items and no users, let loose on a backlog of events. more: its settings."""
    with _catalogue(broker, items, {**more, "topic_prefix": prefix, "session_timeout_s": str(STOPPED_S)}) as told:
        settings = Settings.model_validate(told)
        with _worker(via, told, items, 0, events) as worker:
            _lay(worker, settings, load.Stream(items, users), events)
            return _end(worker)


def keep_up(
    broker: str, events: int, items: int, users: int, prefix: str, more: dict[str, str], lag: int
) -> dict[str, Any]:
    """One worker that learns events, and then without a stop the `lag` of `catch_up`: the same users and histories."""
    with _catalogue(broker, items, {**more, "topic_prefix": prefix, "session_timeout_s": str(STOPPED_S)}) as told:
        settings, stream = Settings.model_validate(told), load.Stream(items, users)
        with _worker("faust", told, items, 0, events, lag) as worker:
            _lay(worker, settings, stream, events)
            _result(worker)
            _lay(worker, settings, stream, lag, lag_s=LAG_S)
            return _end(worker)


def _lay(worker: subprocess.Popen[str], settings: Settings, stream: load.Stream, events: int, lag_s: float = 0) -> None:
    """A backlog, while the worker sleeps."""
    worker.send_signal(signal.SIGSTOP)
    asyncio.run(load.publish_events(settings, stream, events, lag_s=lag_s))
    worker.send_signal(signal.SIGCONT)


def catch_up(
    broker: str, events: int, items: int, users: int, prefix: str, more: dict[str, str], lag: int
) -> dict[str, Any]:
    """One worker that has learnt events and is gone while `lag` more come, of an hour; it is measured from the first
    that it takes after its start."""
    with _catalogue(broker, items, {**more, "topic_prefix": prefix}) as told:
        settings, stream = Settings.model_validate(told), load.Stream(items, users)
        with _worker("faust", told, items, 0, events) as worker:
            asyncio.run(load.publish_events(settings, stream, events))
            _end(worker)
        asyncio.run(load.publish_events(settings, stream, lag, lag_s=LAG_S))
        with _worker("faust", told, items, events, lag) as worker:
            return _end(worker)


@contextmanager
def _catalogue(broker: str, items: int, more: dict[str, str]) -> Iterator[dict[str, str]]:
    """The settings of a worker on new topics that hold the items."""
    with tempfile.TemporaryDirectory() as folder, broker_for(broker) as address:
        told = {"broker": address, "app_id": "bench", "state_dir": str(Path(folder) / "state"), **more}
        settings = Settings.model_validate(told)
        topics.ensure(settings)
        asyncio.run(load.publish_items(settings, items))
        yield told


@contextmanager
def _worker(via: str, told: dict[str, str], items: int, known: int, *events: int) -> Iterator[subprocess.Popen[str]]:
    """The process that drains these backlogs, ready for the events behind those that are known to its disk."""
    with subprocess.Popen(
        [sys.executable, "-m", "bench.drain", via, *map(str, (items, known, *events))], env=environment(told),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, preexec_fn=end_with_parent(),
    ) as worker:  # fmt: skip
        assert worker.stdout is not None
        if worker.stdout.readline() != "ready\n":
            worker.kill()
            raise RuntimeError("the worker did not become ready")
        yield worker


def _result(worker: subprocess.Popen[str]) -> dict[str, Any]:
    """What it tells when a backlog is drained."""
    assert worker.stdout is not None
    told_line = worker.stdout.readline()
    if not told_line:
        raise RuntimeError(f"the drain ended with {worker.wait()}")
    result: dict[str, Any] = json.loads(told_line)
    return result


def _end(worker: subprocess.Popen[str]) -> dict[str, Any]:
    """What it tells of its last backlog, and its end."""
    result = _result(worker)
    if worker.wait():
        raise RuntimeError(f"the drain ended with {worker.returncode}")
    return result
