"""A run's figures reach the event files and MLflow, and a server that is away holds nobody up."""

import itertools
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from streams.settings import Fault
from streams.tracking import Tracking

FACTS = {"encoder": "encoder:1"}


def test_figures_are_in_the_event_files_and_in_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri, clock = f"file:{tmp_path}/mlruns", itertools.count(1_700_000_000)
    tracking = Tracking(tmp_path / "events", uri, FACTS, lambda: float(next(clock)))
    for step in range(1500):
        tracking.figure("training/1", 1 / (1 + step), step)
        if step == 700:
            tracking.flush()
    tracking.close()
    told = EventAccumulator(str(tmp_path / "events"), size_guidance={"tensors": 0})
    told.Reload()
    assert [event.step for event in told.Tensors("training/1")] == list(range(1500))
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("headwater")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    assert run.data.tags["encoder"] == "encoder:1"
    kept = client.get_metric_history(run.info.run_id, "training/1")
    assert [(one.step, one.value) for one in kept] == [(step, 1 / (1 + step)) for step in range(1500)]


def test_a_server_that_is_away_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracking = Tracking(tmp_path, "http://127.0.0.1:9", FACTS, lambda: 1.0)
    tracking.figure("training/1", 1.0, 0)
    tracking.flush()
    tracking.close()
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_without_the_package_the_setting_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow.tracking", None)
    with pytest.raises(Fault, match=r"headwater\[mlflow\]"):
        Tracking(tmp_path, "http://127.0.0.1:9", FACTS, lambda: 1.0)
