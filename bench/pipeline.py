"""The whole chain of one worker under Faust against the same chain under a plain consumer loop, draining a backlog."""

import argparse
import asyncio
import json
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import load
from bench.chaos import broker_for
from streams import topics
from streams.broker import end_with_parent
from streams.settings import Settings, environment


def run(arguments: list[str]) -> dict[str, Any]:
    """`python -m bench pipeline [--events N] [--items N] [--users N] [--rounds N] [--broker embedded|HOST:PORT]
    [--rank-sample SHARE]`"""
    parser = argparse.ArgumentParser(prog="python -m bench pipeline")
    parser.add_argument("--events", type=int, default=200_000)
    parser.add_argument("--items", type=int, default=2_000)
    parser.add_argument("--items-many", type=int, default=0, help="also with so many items, under Faust")
    parser.add_argument("--users", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=1, help="of each way, in turn; the median counts")
    parser.add_argument("--broker", default="embedded", help="embedded, or a running Kafka's HOST:PORT")
    parser.add_argument("--rank-sample", type=float, default=0.0, help="share of the targets in the live race")
    asked = parser.parse_args(arguments)
    told = {"rank_sample": str(asked.rank_sample)}
    rounds: dict[str, list[dict[str, Any]]] = {"faust": [], "plain": []}
    for n in range(asked.rounds):
        for via in ("faust", "plain"):
            rounds[via].append(drain(via, asked.broker, asked.events, asked.items, asked.users, f"{via}{n}-", told))
            print(json.dumps({"via": via, **rounds[via][-1]}), flush=True)
    faust, plain = (statistics.median(r["events_per_s"] for r in rounds[via]) for via in ("faust", "plain"))
    result: dict[str, Any] = {
        "faust_events_per_s": faust, "plain_events_per_s": plain, "ratio": faust / plain,
        "events": asked.events, "items": asked.items, "users": asked.users,
        "examples": rounds["faust"][0]["examples"],
        "stage_us_per_event": rounds["faust"][-1]["stage_us_per_event"],
        "cpu_us_per_event": rounds["faust"][-1]["cpu_us_per_event"],
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
    with tempfile.TemporaryDirectory() as folder, broker_for(broker) as address:
        told = {"broker": address, "topic_prefix": prefix, "app_id": "bench", "session_timeout_s": "60",
                "state_dir": str(Path(folder) / "state"), **more}  # fmt: skip
        settings = Settings.model_validate(told)
        topics.ensure(settings)
        asyncio.run(load.publish_items(settings, items))
        with subprocess.Popen(
            [sys.executable, "-m", "bench.drain", via, str(events), str(items)], env=environment(told),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, preexec_fn=end_with_parent(),
        ) as worker:  # fmt: skip
            assert worker.stdout is not None
            if worker.stdout.readline() != "ready\n":
                worker.kill()
                raise RuntimeError("the worker did not become ready")
            worker.send_signal(signal.SIGSTOP)  # it sleeps while the backlog is laid
            asyncio.run(load.publish_events(settings, load.Stream(items, users), events))
            worker.send_signal(signal.SIGCONT)
            told_line = worker.stdout.readline()
            if worker.wait() or not told_line:
                raise RuntimeError(f"the drain ended with {worker.returncode}")
        result: dict[str, Any] = json.loads(told_line)
        return result
