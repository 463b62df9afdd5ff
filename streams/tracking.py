"""What a trainer's run measures, for those who compare runs: TensorBoard event files, and MLflow where it is asked for.

MLflow is the extra `mlflow`. Its server may be slow or away: a thread of its own sends, what waits is bounded, and the
trainer goes on.
"""

import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog
from tensorboard.summary import Writer

from streams.settings import Fault

log = structlog.get_logger(__name__)

EXPERIMENT: Final = "headwater"
WAITING_MAX: Final = 100_000  # figures; the oldest go first
BATCH_MAX: Final = 1000  # what MLflow takes at once
CLOSE_S_MAX: Final = 5.0  # for the last of them


class Tracking:
    """Figures by name and step."""

    def __init__(self, folder: Path, mlflow: str, facts: dict[str, str], now: Callable[[], float]) -> None:
        """folder: of the event files. mlflow: tracking URI, or "". facts: what the run is of. Raises Fault."""
        self._writer = Writer(str(folder))
        self._mlflow = _Mlflow(mlflow, facts, now) if mlflow else None

    def figure(self, name: str, value: float, step: int) -> None:
        """Takes a figure in."""
        self._writer.add_scalar(name, value, step)
        if self._mlflow is not None:
            self._mlflow.take(name, value, step)

    def flush(self) -> None:
        """Gives out what has come in."""
        self._writer.flush()
        if self._mlflow is not None:
            self._mlflow.wake.set()

    def close(self) -> None:
        """The last flush. Waits for MLflow, CLOSE_S_MAX at the most."""
        self._writer.close()
        if self._mlflow is not None:
            self._mlflow.close()


class _Mlflow:
    def __init__(self, uri: str, facts: dict[str, str], now: Callable[[], float]) -> None:
        try:
            from mlflow.entities import Metric
            from mlflow.exceptions import MlflowException
            from mlflow.tracking import MlflowClient
        except ImportError:
            raise Fault("HEADWATER_MLFLOW needs its package: pip install 'headwater[mlflow]'") from None
        self._metric, self._failures = Metric, (MlflowException, OSError)
        self._client, self._facts, self._now = MlflowClient(uri), facts, now
        self._waiting: deque[tuple[str, float, int, int]] = deque(maxlen=WAITING_MAX)
        self._run, self._closing = "", False
        self.wake = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def take(self, name: str, value: float, step: int) -> None:
        self._waiting.append((name, float(value), round(self._now() * 1e3), step))

    def close(self) -> None:
        self._closing = True
        self.wake.set()
        self._thread.join(CLOSE_S_MAX)

    def _work(self) -> None:
        while not self._closing:
            self.wake.wait()
            self.wake.clear()
            batch: list[tuple[str, float, int, int]] = []
            try:
                self._run = self._run or self._started()
                while self._waiting:
                    batch = [self._waiting.popleft() for _ in range(min(BATCH_MAX, len(self._waiting)))]
                    self._client.log_batch(self._run, metrics=[self._metric(*one) for one in batch])
            except self._failures as problem:
                self._waiting.extendleft(reversed(batch))  # MLflow keeps a figure that it gets again once
                log.warning("MLflow takes nothing", waiting=len(self._waiting), problem=type(problem).__name__)

    def _started(self) -> str:
        experiment = self._client.get_experiment_by_name(EXPERIMENT)
        known = self._client.create_experiment(EXPERIMENT) if experiment is None else experiment.experiment_id
        return str(self._client.create_run(known, run_name="trainer", tags=self._facts).info.run_id)
