"""SIGTERM ends a worker with 0 in under 5 s, whatever its broker does."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faust
import httpx
import pytest

from bench.deployment import READY_S_MAX
from streams import topics
from streams.app import _add_agents
from streams.broker import EmbeddedBroker, end_with_parent
from streams.settings import Settings, environment

STOP_S_MAX = 5.0


@pytest.fixture
def broker_here() -> Iterator[EmbeddedBroker]:
    """A broker that a test may stop."""
    with EmbeddedBroker() as running:
        yield running


def _start(settings: Settings, log_file: Path) -> subprocess.Popen[bytes]:
    names = ("broker", "topic_prefix", "app_id", "state_dir", "http_port", "partitions")
    told: dict[str, Any] = {name: str(getattr(settings, name)) for name in names}
    with log_file.open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "streams", "worker"], env=environment(told), stdout=log, stderr=log,
            stdin=subprocess.DEVNULL, preexec_fn=end_with_parent(),
        )  # fmt: skip


def _wait_until_ready(settings: Settings, worker: subprocess.Popen[bytes]) -> None:
    deadline, pause = time.monotonic() + READY_S_MAX, threading.Event()
    while time.monotonic() < deadline:
        assert worker.poll() is None, f"the worker has ended with {worker.returncode}"
        try:
            if httpx.get(f"{settings.http_url()}/readyz", trust_env=False).is_success:
                return
        except httpx.HTTPError:
            pass
        pause.wait(0.05)
    raise AssertionError(f"the worker is not ready after {READY_S_MAX} s")


@pytest.mark.parametrize("is_gone", [False, True], ids=["broker-there", "broker-gone"])
def test_worker_stops_with_0(
    broker_here: EmbeddedBroker, make_settings: Callable[..., Settings], tmp_path: Path, is_gone: bool,
    clean_environment: None,
) -> None:  # fmt: skip
    settings = make_settings(broker=broker_here.address)
    topics.ensure(settings)
    worker = _start(settings, tmp_path / "worker.log")
    try:
        _wait_until_ready(settings, worker)
        if is_gone:
            broker_here.stop()
        worker.terminate()
        assert worker.wait(STOP_S_MAX) == 0, (tmp_path / "worker.log").read_text()
    finally:
        worker.kill()
        worker.wait()


@pytest.mark.parametrize("is_stopping", [True, False])
async def test_an_agent_that_is_cancelled_before_it_is_stopped_has_not_crashed(
    is_stopping: bool, make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    """Faust cancels all agents, then stops one after the other: a slow one gave the others time to end the process."""
    app = faust.App("stops", broker="kafka://127.0.0.1:1", datadir=str(tmp_path), web_enabled=False)
    worker: Any = SimpleNamespace(stopping=is_stopping)
    _add_agents(app, make_settings(), worker)
    agent: Any = app.agents["learn_items"]

    async def nothing_comes() -> AsyncIterator[None]:
        await asyncio.Event().wait()
        yield

    stream = SimpleNamespace(noack=lambda: SimpleNamespace(events=nothing_comes))
    crashes: list[BaseException] = []

    async def crash(failure: BaseException) -> None:
        crashes.append(failure)

    agent.supervisor = SimpleNamespace(wakeup=lambda: None)
    running = asyncio.create_task(agent._execute_actor(agent.fun(stream), SimpleNamespace(crash=crash)))
    await asyncio.sleep(0)
    assert not agent.should_stop and running.cancel()
    await running
    assert len(crashes) == (0 if is_stopping else 1)
