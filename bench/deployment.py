"""A deployment on this machine for benchmarks and tests: topics and worker processes against a broker."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import httpx

from streams import topics
from streams.broker import end_with_parent, free_port
from streams.settings import Settings, environment

READY_S_MAX: Final = 180.0  # compiling kernels on a first start, and waiting out a killed member's session
ANSWER_S_MAX: Final = 30.0
LATER_S_MAX: Final = 60.0  # for an answer that is "later": what is waited for is still on its way
STOP_S_MAX: Final = 15.0
POLL_S: Final = 0.05
QUIET_LOOKS: Final = 6  # of POLL_S each


class WorkerProcess:
    """One `headwater worker` of a deployment, as its operators and readers see it."""

    def __init__(self, settings: Settings, log_file: Path, variables: dict[str, str], command: list[str]) -> None:
        self.settings = settings
        self.log_file = log_file
        self.http = httpx.Client(
            base_url=settings.http_url(), headers=settings.http_headers(), timeout=ANSWER_S_MAX, trust_env=False
        )
        with log_file.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=end_with_parent()
            )

    def get(self, path: str, **params: Any) -> Any:
        """The JSON answer of a path, asked for again while it is "later" (503). Raises httpx.HTTPError."""
        deadline = time.monotonic() + LATER_S_MAX
        answer = self.http.get(path, params=params)
        while answer.status_code == httpx.codes.SERVICE_UNAVAILABLE and time.monotonic() < deadline:
            time.sleep(POLL_S)
            answer = self.http.get(path, params=params)
        answer.raise_for_status()
        return answer.json()

    def wait_until(self, what: str, holds: Callable[[], bool], seconds_max: float = READY_S_MAX) -> None:
        """Until the condition holds. Raises RuntimeError when the process ends, TimeoutError when time does."""
        deadline = time.monotonic() + seconds_max
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"the worker ended with {self.process.returncode}: {self.tail()}")
            try:
                if holds():
                    return
            except httpx.HTTPError:
                pass
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {seconds_max:.0f} s: {what}: {self.tail()}")
            time.sleep(POLL_S)

    def wait_ready(self) -> None:
        """Until it answers for its partitions."""
        self.wait_until("ready", lambda: self.http.get("/readyz").status_code == 200)

    def wait_quiet(self) -> None:
        """Until what was read has been learnt, and is in the replica: nothing has moved for a while."""
        seen: list[Any] = []

        def is_quiet() -> bool:
            told = self.get("/v1/model")
            replica = told["replica"]["applied"]
            seen.append((told["events_applied"], told["learner"]["applied"], replica))
            return len(seen) > QUIET_LOOKS and len(set(map(str, seen[-QUIET_LOOKS:]))) == 1 and seen[-1][1] == replica

        self.wait_until("a quiet model", is_quiet)

    def applied(self, kind: str) -> dict[int, dict[str, int]]:
        """{partition: applied offsets} of a kind of state."""
        return {p["partition"]: p["applied"] for p in self.digests() if p["kind"] == kind}

    def digests(self) -> list[dict[str, Any]]:
        """As /v1/digest lists them."""
        found: list[dict[str, Any]] = self.get("/v1/digest")["partitions"]
        return found

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics, by its name and labels as they are written there."""
        lines = self.http.get("/metrics").raise_for_status().text.splitlines()
        parts = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in parts}

    def rebalances(self) -> float:
        """How often it has been given partitions."""
        return self.metrics()["headwater_rebalances_total"]

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()
        self.http.close()

    def stop(self) -> tuple[int, float]:
        """SIGTERM: (exit code, seconds)."""
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(STOP_S_MAX)
        self.http.close()
        return code, time.monotonic() - started

    def tail(self, bytes_max: int = 2000) -> str:
        """The end of its log."""
        return self.log_file.read_bytes()[-bytes_max:].decode(errors="replace")


class Deployment:
    """Topics of one prefix and app id on a broker, and its workers. `close` ends what still runs."""

    def __init__(self, broker: str, folder: Path, *, module: str = "streams", **settings: Any) -> None:
        """module: whose command `worker` is run."""
        self.folder = folder
        self._module = module
        folder.mkdir(parents=True, exist_ok=True)
        self._told = {"broker": broker, "session_timeout_s": 6.0, **settings}
        self.settings = Settings(**self._told)
        self.workers: list[WorkerProcess] = []

    def create_topics(self) -> None:
        """As `headwater topics` does."""
        topics.ensure(self.settings)

    def state_dir(self, name: str = "w") -> Path:
        """The state folder of the worker of that name."""
        return self.folder / f"state-{name}"

    def start_worker(self, name: str = "w", command: list[str] | None = None, **more: Any) -> WorkerProcess:
        """Starts one on its own state folder and a free port, with `more` settings; it may not be ready yet."""
        told = {**self._told, "http_port": free_port(), "state_dir": self.state_dir(name), **more}
        settings = Settings(**told)
        plain = {key: value if isinstance(value, str) else str(value) for key, value in told.items()}
        variables = {**os.environ, **environment(plain)}
        run = command or [sys.executable, "-m", self._module, "worker"]
        worker = WorkerProcess(settings, self.folder / f"worker-{name}.log", variables, run)
        self.workers.append(worker)
        return worker

    def close(self) -> None:
        """Ends the workers that still run."""
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.kill()
