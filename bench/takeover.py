"""Workers join, leave and are killed under load, while readers ask any of them and wait for their clicks."""

import argparse
import asyncio
import itertools
import json
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx

from bench import load, verdict
from bench.chaos import site_of
from bench.deployment import Deployment, WorkerProcess

READS_PER_S: Final = 50.0
EVENTS_PER_S: Final = 500.0
PROBE_USERS: Final = 200
SESSION_S: Final = 6.0
AFTER_SESSION_S_MAX: Final = 5.0  # until what a killed worker had is answered for again
CALM_S: Final = 8.0  # under load between two disturbances
TAKEOVER_S_MAX: Final = 90.0
ANSWER_S_MAX: Final = 30.0
RESTORED = re.compile(r"partition open\b")


def run(arguments: list[str]) -> dict[str, Any]:
    """`python -m bench takeover [--workers 3] [--partitions 6] [--events N] [--broker embedded|kafka|HOST:PORT]`"""
    parser = argparse.ArgumentParser(prog="python -m bench takeover")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--partitions", type=int, default=6)
    parser.add_argument("--events", type=int, default=200_000, help="learnt before: what a takeover has to restore")
    parser.add_argument("--users", type=int, default=50_000)
    parser.add_argument("--items", type=int, default=2_000)
    parser.add_argument(
        "--broker", default="kafka", help="embedded, kafka (started here), or a running one's HOST:PORT"
    )
    parser.add_argument("--kafka", type=Path, help="folder with Kafka's libs/; else HEADWATER_TEST_KAFKA")
    parser.add_argument("--folder", type=Path, help="kept, with the workers' logs; else a temporary one")
    asked = parser.parse_args(arguments)
    with ExitStack() as stack:
        folder = asked.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        site = stack.enter_context(site_of(asked.broker, folder, asked.kafka))
        deployment = Deployment(
            site.address, folder, topic_prefix="takeover-", app_id="bench", rank_sample=0.0,
            session_timeout_s=SESSION_S, log_format="json", partitions=asked.partitions,
        )  # fmt: skip
        try:
            deployment.create_topics()
            asyncio.run(load.publish_items(deployment.settings, asked.items))
            asyncio.run(load.publish_events(deployment.settings, load.Stream(asked.items, asked.users), asked.events))
            told = asyncio.run(_Trial(deployment, asked).run())
        finally:
            deployment.close()
    return {"workers": asked.workers, "partitions": asked.partitions, "events": asked.events, **told}


@dataclass
class _Phase:
    """What readers saw from one disturbance to the next. ready_s: until every partition was held again."""

    name: str
    answers: Counter[str] = field(default_factory=Counter)
    ready_s: float = 0.0
    last_503_s: float = 0.0
    waits_ms: list[float] = field(default_factory=list)


class _Trial:
    def __init__(self, deployment: Deployment, asked: argparse.Namespace) -> None:
        self.deployment, self.asked = deployment, asked
        self.workers: dict[str, WorkerProcess] = {}
        self.open: list[WorkerProcess] = []  # to readers: they have been ready once
        self.phases: list[_Phase] = []
        self.began = 0.0
        self.problems: list[str] = []
        self.random = random.Random(1)

    async def run(self) -> dict[str, Any]:
        """One worker drains what was laid; the others join; each is then killed, stopped or wiped and comes back."""
        started = time.monotonic()
        self._start("w0")
        await self._held()
        await self._drained()
        drained_s = time.monotonic() - started
        self.phases.append(_Phase("one worker"))
        async with self._load():
            await asyncio.sleep(CALM_S)
            for n in range(1, self.asked.workers):
                await self._disturbed(f"w{n} joins", lambda n=n: self._start(f"w{n}"))
            await self._disturbed("w1 is killed", lambda: self._kill("w1"))
            if self.phases[-1].ready_s > SESSION_S + AFTER_SESSION_S_MAX:
                self.problems.append(f"taken over after {self.phases[-1].ready_s:.1f} s, session {SESSION_S:.0f} s")
            await self._disturbed("w1 is back", lambda: self._start("w1"))
            await self._disturbed("w2 is stopped", lambda: self._stop("w2"))
            await self._disturbed("w2 is back on no disk", lambda: self._start("w2-new"))
        return {
            "drained_s": drained_s, "broken": self.problems[:10], "problem_count": len(self.problems),
            "phases": [self._phase(phase) for phase in self.phases], "restores": self._restores(),
        }  # fmt: skip

    # -- disturbances

    def _start(self, name: str) -> None:
        self.workers[name] = self.deployment.start_worker(name)

    def _kill(self, name: str) -> None:
        worker = self.workers.pop(name)
        worker.kill()
        self.open.remove(worker)

    def _stop(self, name: str) -> None:
        worker = self.workers.pop(name)
        self.open.remove(worker)  # as a load balancer drains what is to stop
        code, seconds = worker.stop()
        if code or seconds > 5:
            self.problems.append(f"{name} ended with {code} after {seconds:.1f} s")

    async def _disturbed(self, name: str, disturb: Any) -> None:
        self.phases.append(_Phase(name))
        self.began = time.monotonic()
        await asyncio.to_thread(disturb)
        await self._held()
        self.phases[-1].ready_s = time.monotonic() - self.began
        await asyncio.sleep(CALM_S)

    async def _held(self) -> None:
        """Until every worker is ready and every partition is held once."""
        deadline = time.monotonic() + TAKEOVER_S_MAX
        while not await asyncio.to_thread(self._all_held):
            if time.monotonic() > deadline:
                raise TimeoutError("the partitions are not all held")
            await asyncio.sleep(0.1)

    def _all_held(self) -> bool:
        workers = list(self.workers.values())
        try:
            if any(worker.http.get("/readyz").status_code != 200 for worker in workers):
                return False
            parts = [(d["kind"], d["partition"]) for d in verdict.held(workers)]
        except httpx.HTTPError:
            return False
        if len(parts) != len(set(parts)) or len(parts) != 2 * self.asked.partitions + 1:
            return False
        self.open = workers
        return True

    async def _drained(self) -> None:
        (worker,) = self.workers.values()
        await asyncio.to_thread(
            worker.wait_until, "drained", lambda: worker.get("/v1/model")["events_applied"] >= self.asked.events, 600.0
        )

    # -- load

    @asynccontextmanager
    async def _load(self) -> AsyncIterator[None]:
        stream = load.Stream(self.asked.items, self.asked.users, seed=2)
        feed = asyncio.create_task(load.publish_events(self.deployment.settings, stream, 1 << 40, EVENTS_PER_S))
        probes: set[asyncio.Task[None]] = set()
        async with httpx.AsyncClient(timeout=ANSWER_S_MAX, trust_env=False) as http:

            async def ask() -> None:
                for n in itertools.count():
                    probe = asyncio.create_task(self._probe(http, n))
                    probes.add(probe)
                    probe.add_done_callback(probes.discard)
                    await asyncio.sleep(1 / READS_PER_S)

            asking = asyncio.create_task(ask())
            try:
                yield
            finally:
                asking.cancel()
                feed.cancel()
                await asyncio.gather(asking, feed, *probes, return_exceptions=True)

    async def _probe(self, http: httpx.AsyncClient, n: int) -> None:
        """A click by way of one worker, and the list that must know it by way of another."""
        user, phase = f"reader{n % PROBE_USERS}", self.phases[-1]
        writer, reader = self.random.choices(self.open, k=2)
        event = [{"type": "click", "user_id": user, "item_id": f"i{n % self.asked.items}", "action": "click"}]
        try:
            posted = await http.post(f"{writer.settings.http_url()}/v1/events", json=event)
            if not self._counted(phase, "post", posted):
                return
            positions = posted.json()["positions"]
            began = time.monotonic()
            url = f"{reader.settings.http_url()}/v1/users/{user}/recommendations"
            answer = await http.get(url, params={"limit": 10, "at_least": positions})
            if not self._counted(phase, "read", answer):
                return
            phase.waits_ms.append(1e3 * (time.monotonic() - began))
            topic, partition, offset = positions[0].split(":")
            applied = answer.json()["applied"]
            if applied[topic][0] != int(partition) or applied[topic][1] < int(offset):
                self.problems.append(f"{phase.name}: the list at {applied} does not know {positions[0]}")
        except httpx.TransportError as error:  # of a worker that is not there any more, or not yet
            phase.answers[f"no connection: {type(error).__name__}"] += 1

    def _counted(self, phase: _Phase, kind: str, answer: httpx.Response) -> bool:
        phase.answers[f"{kind} {answer.status_code}"] += 1
        if answer.status_code == 503:
            phase.last_503_s = time.monotonic() - self.began
            if "retry-after" not in answer.headers:
                self.problems.append(f"{phase.name}: 503 without Retry-After: {answer.text[:200]}")
        elif not answer.is_success:
            self.problems.append(f"{phase.name}: {kind} answered {answer.status_code}: {answer.text[:200]}")
        return answer.is_success

    # -- the report

    def _phase(self, phase: _Phase) -> dict[str, Any]:
        waits = sorted(phase.waits_ms)
        return {
            "phase": phase.name, "ready_s": phase.ready_s, "last_503_s": phase.last_503_s,
            "answers": dict(sorted(phase.answers.items())),
            "read_p50_ms": waits[len(waits) // 2] if waits else None,
            "read_p99_ms": waits[int(len(waits) * 0.99)] if waits else None,
        }  # fmt: skip

    def _restores(self) -> list[dict[str, Any]]:
        """What the workers told of partitions that they restored rows of, the slowest ones first."""
        found = []
        for log in sorted(self.deployment.folder.glob("worker-*.log")):
            for line in log.read_text(errors="replace").splitlines():
                if RESTORED.search(line) and line.startswith("{"):
                    told = json.loads(line)
                    if told.get("rows_read"):
                        rate = told["rows_read"] / max(told["seconds"], 1e-3)
                        found.append({k: told[k] for k in ("kind", "partition", "opened", "rows_read", "seconds")}
                                     | {"rows_per_s": rate})  # fmt: skip
        return sorted(found, key=lambda one: -one["seconds"])[:12]
