"""SIGTERM ends a worker with 0 in under 5 s, whatever its broker does."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.deployment import READY_S_MAX
from streams import topics
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
