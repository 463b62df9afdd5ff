"""Every metric of a worker: name, meaning, unit and labels. Base units, classic histograms, no ids in labels."""

import platform
from importlib import metadata
from typing import Final

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

FAST_BUCKETS_S: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
FRESHNESS_BUCKETS_S: Final = (
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    1.0,
    2.0,
    5.0,
    10.0,
    60.0,
    600.0,
)
RESTORE_BUCKETS_S: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
BATCH_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LOSS_BUCKETS: Final = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0, 12.0, 15.0)


class Metrics:
    """A worker's metrics in one registry; observe a batch at a time."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = own = CollectorRegistry() if registry is None else registry
        ProcessCollector(registry=own)
        PlatformCollector(registry=own)
        GCCollector(registry=own)
        self._add_stream(own)
        self._add_model(own)
        self._add_state(own)
        self.build = Info("headwater_build", "Versions of the running program", registry=own)
        self.build.info({"version": metadata.version("headwater"), "python": platform.python_version()})

    def _add_stream(self, own: CollectorRegistry) -> None:
        self.events_total = Counter(
            "headwater_events_total", "Records of the source topics, by what became of them (misplaced: one a batch)",
            ["topic", "outcome"], registry=own,
        )  # fmt: skip
        self.stage_seconds = Histogram(
            "headwater_stage_seconds", "Time of a batch in a stage of its way", ["stage"], buckets=FAST_BUCKETS_S,
            registry=own,
        )  # fmt: skip
        self.consumer_lag_records = Gauge(
            "headwater_consumer_lag_records", "Records in the source logs of a kind of state, not yet applied",
            ["kind"], registry=own,
        )  # fmt: skip
        self.event_time_lag_seconds = Gauge(
            "headwater_event_time_lag_seconds", "Age of the newest event that was applied", registry=own
        )
        self.freshness_seconds = Histogram(
            "headwater_freshness_seconds", "From an event's publication to its visibility to a read", ["topic"],
            buckets=FRESHNESS_BUCKETS_S, registry=own,
        )  # fmt: skip
        self.learnt_seconds = Histogram(
            "headwater_learnt_seconds", "From an event's own time to its effect on the item matrix",
            buckets=FRESHNESS_BUCKETS_S, registry=own,
        )  # fmt: skip
        self.encoder_batch_size = Histogram(
            "headwater_encoder_batch_size", "Texts encoded together", buckets=BATCH_BUCKETS, registry=own
        )
        self.encoder_texts_total = Counter("headwater_encoder_texts_total", "Texts encoded", registry=own)
        self.dead_letters_total = Counter(
            "headwater_dead_letters_total", "Messages set aside, by reason", ["topic", "reason"], registry=own
        )

    def _add_model(self, own: CollectorRegistry) -> None:
        self.prequential_hit_ratio = Gauge(
            "headwater_prequential_hit_ratio", "Share of the newest targets that were in the model's first k",
            ["model", "k"], registry=own,
        )  # fmt: skip
        self.prequential_ndcg = Gauge(
            "headwater_prequential_ndcg", "Mean discounted gain of the newest targets in the model's first k",
            ["model", "k"], registry=own,
        )  # fmt: skip
        self.log_loss = Histogram(
            "headwater_log_loss", "Log loss of a ranked target over its candidates, nats", buckets=LOSS_BUCKETS,
            registry=own,
        )  # fmt: skip
        self.drift_detections_total = Counter(
            "headwater_drift_detections_total", "Times that a live signal was found to have changed", ["signal"],
            registry=own,
        )  # fmt: skip
        self.learning_rate = Gauge("headwater_learning_rate", "Step sizes of the learner", ["parameter"], registry=own)
        self.checkpoint = Info("headwater_checkpoint", "The encoder in use", registry=own)
        self.trial_share = Gauge(
            "headwater_trial_share", "Share of the users that are a trial's challengers; 0: no trial is on",
            registry=own,
        )  # fmt: skip
        self.exposures_total = Counter(
            "headwater_exposures_total", "Lists that were answered in a trial, by arm and by whether they were noted",
            ["arm", "outcome"], registry=own,
        )  # fmt: skip

    def _add_state(self, own: CollectorRegistry) -> None:
        self.state_rows = Gauge("headwater_state_rows", "Rows of a kind of state, estimated", ["kind"], registry=own)
        self.state_bytes = Gauge("headwater_state_bytes", "Bytes on disk of a kind of state", ["kind"], registry=own)
        self.recommendation_seconds = Histogram(
            "headwater_recommendation_seconds", "Time to make a list", buckets=FAST_BUCKETS_S, registry=own
        )
        self.rebalances_total = Counter(
            "headwater_rebalances_total", "Times that partitions were shared out", registry=own
        )
        self.restore_seconds = Histogram(
            "headwater_restore_seconds", "Time to claim and restore a partition", ["kind"], buckets=RESTORE_BUCKETS_S,
            registry=own,
        )  # fmt: skip
        self.erasures_total = Counter("headwater_erasures_total", "Users erased", registry=own)

    def render(self) -> tuple[bytes, str]:
        """All metrics as Prometheus reads them, and their content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
