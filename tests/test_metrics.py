"""Every metric of the public contract is there, in base units, without ids, and as promtool likes it."""

import re
import subprocess
from typing import Any, Final, TypeVar

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from model.evaluate import LiveMetrics
from monitoring.metrics import Metrics
from streams.telemetry import Telemetry
from streams.trainer import TrainerMetrics
from tests.promtool import promtool

CONTRACT: Final = {  # name as exposed: its labels
    "events_total": {"topic", "outcome"},
    "stage_seconds": {"stage"},
    "consumer_lag_records": {"kind"},
    "event_time_lag_seconds": set(),
    "freshness_seconds": {"topic"},
    "encoder_batch_size": set(),
    "encoder_texts_total": set(),
    "dead_letters_total": {"topic", "reason"},
    "state_rows": {"kind"},
    "state_bytes": {"kind"},
    "recommendation_seconds": set(),
    "prequential_hit_ratio": {"model", "k"},
    "prequential_ndcg": {"model", "k"},
    "log_loss": set(),
    "drift_detections_total": {"signal"},
    "learning_rate": {"parameter"},
    "checkpoint_info": {"encoder", "adapter"},
    "rebalances_total": set(),
    "restore_seconds": {"kind"},
    "erasures_total": set(),
    "build_info": {"version", "python"},
}
MORE: Final[dict[str, set[str]]] = {  # beyond the contract
    "learnt_seconds": set(),
    "trial_share": set(),
    "exposures_total": {"arm", "outcome"},
}
METRICS: Final = CONTRACT | MORE
TRAINER: Final[dict[str, set[str]]] = {  # what `headwater trainer` exposes, on a port of its own
    "trainer_examples_total": set(),
    "trainer_steps_total": set(),
    "trainer_loss": {"of"},
    "trainer_evidence": {"that"},
    "trainer_decisions_total": {"kind"},
    "trainer_lag_records": set(),
    "checkpoint_info": {"encoder", "adapter"},
}
AnyMetrics = TypeVar("AnyMetrics", Metrics, TrainerMetrics)
UNITS_NOT_BASE: Final = re.compile(r"_(ms|milliseconds|minutes|hours|kb|mb|mib|percent|kilobytes|micros\w*)(_|$)")


def test_drifts_of_a_learner_that_comes_back_are_counted_on() -> None:
    """Its monitor begins anew; the counter, which an alert watches from 0 on, does not go back."""
    metrics = Metrics()
    told = Telemetry(metrics)
    counts = []
    for detections in (0, 2, 0, 1):
        live = LiveMetrics()
        live.drift.detections = detections
        told.publish(live)
        counts.append(metrics.registry.get_sample_value("headwater_drift_detections_total", {"signal": "log_loss"}))
    assert counts == [0, 2, 2, 3]


def exercised() -> Metrics:
    """Every metric of a worker with a value, under some label."""
    return touched(Metrics())


def touched(metrics: AnyMetrics) -> AnyMetrics:
    """Every metric of these with a value, under some label."""
    metrics.checkpoint.info({"encoder": "some-model:0123456789abcdef", "adapter": "0123456789ab"})
    for metric in list(vars(metrics).values()):
        labels = getattr(metric, "_labelnames", ())
        child: Any = metric.labels(*["some"] * len(labels)) if labels else metric
        if hasattr(child, "observe"):
            child.observe(0.1)
        elif hasattr(child, "inc"):
            child.inc()
    return metrics


def trained() -> bytes:
    """What a trainer exposes, every metric with a value."""
    return generate_latest(touched(TrainerMetrics()).registry)


def families(exposed: bytes) -> dict[str, Any]:
    """The exposed metrics of ours, by name."""
    found = text_string_to_metric_families(exposed.decode())
    return {family.name: family for family in found if family.name.startswith("headwater_")}


@pytest.mark.parametrize(
    ("listed", "exposed"), [(METRICS, exercised().render()[0]), (TRAINER, trained())], ids=["worker", "trainer"]
)
def test_metrics_are_exposed_with_their_labels_and_no_other_is(listed: dict[str, set[str]], exposed: bytes) -> None:
    found = {name: family for name, family in families(exposed).items() if not name.endswith("_created")}
    labels = {
        name: set().union(*(sample.labels for sample in family.samples)) - {"le"} for name, family in found.items()
    }
    assert labels == {"headwater_" + name.removesuffix("_total"): own for name, own in listed.items()}
    assert all(family.documentation for family in found.values())


@pytest.mark.parametrize("exposed", [exercised().render()[0], trained()], ids=["worker", "trainer"])
def test_units_are_base_units_and_no_label_is_an_id(exposed: bytes) -> None:
    for name, family in families(exposed).items():
        assert not UNITS_NOT_BASE.search(name), name
        for sample in family.samples:
            assert not {label for label in sample.labels if label.endswith("id")}, name


def test_histograms_are_classic_and_their_buckets_rise() -> None:
    for name, family in families(exercised().render()[0]).items():
        if family.type == "histogram":
            edges = [float(s.labels["le"]) for s in family.samples if s.name.endswith("_bucket")]
            assert edges == sorted(set(edges)), name
            assert edges[-1] == float("inf")
            assert len(edges) <= 20, f"{name}: each bucket is a series"


@pytest.mark.parametrize("exposed", [exercised().render()[0], trained()], ids=["worker", "trainer"])
def test_promtool_finds_nothing(exposed: bytes) -> None:
    found = subprocess.run([promtool(), "check", "metrics"], input=exposed, capture_output=True, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (0, b"", b"")


def test_two_workers_in_a_process_keep_their_figures_apart() -> None:
    one, other = Metrics(), Metrics(CollectorRegistry())
    one.rebalances_total.inc()
    assert one.registry.get_sample_value("headwater_rebalances_total") == 1
    assert other.registry.get_sample_value("headwater_rebalances_total") == 0


def test_process_and_version_are_told() -> None:
    body, content_type = Metrics().render()
    assert content_type.startswith("text/plain")
    assert b"process_resident_memory_bytes" in body
    assert re.search(rb'headwater_build_info\{.*version="\d', body)
