"""What the keepers tell the metrics, a batch at a time: names and labels of monitoring.metrics stand here alone."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import numpy as np

from model.evaluate import LiveMetrics
from monitoring.metrics import Metrics
from streams import examples
from streams.pipeline import Learnt, SourceEvent, UserBatch

SAMPLE_EVERY: Final = 16  # freshness is observed for every so many events of a batch, and for its first
PREQUENTIAL_K: Final = 10
REPORT_INTERVAL_S: Final = 1.0  # live figures are computed no more often


class Telemetry:
    """Counters by batch; also the totals and rates that the page shows."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.events = 0
        self.event_lag_s = 0.0
        self.report: dict[str, object] = {}
        self.stage_s: dict[str, float] = {}
        self._reported_s = float("-inf")
        self._drifts = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage of the way of a batch."""
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            self.stage_s[name] = self.stage_s.get(name, 0.0) + seconds
            self.metrics.stage_seconds.labels(name).observe(seconds)

    def rebalanced(self) -> None:
        """Partitions were shared out anew."""
        self.metrics.rebalances_total.inc()

    def restored(self, kind: str, seconds: float) -> None:
        """A partition is open."""
        self.metrics.restore_seconds.labels(kind).observe(seconds)

    def consumed(self, topic: str, events: int, rejects: int) -> None:
        """Records of a source topic were decoded."""
        if events:
            self.metrics.events_total.labels(topic, "accepted").inc(events)
        if rejects:
            self.metrics.events_total.labels(topic, "rejected").inc(rejects)

    def misplaced(self, topic: str) -> None:
        """The record of a batch that was looked at lies in another partition than its key's."""
        self.metrics.events_total.labels(topic, "misplaced").inc()

    def dead_letter(self, topic: str, reason: str) -> None:
        """A dead letter is in its log."""
        self.metrics.dead_letters_total.labels(topic, reason).inc()

    def encoded(self, texts: int, seconds: float) -> None:
        """A batch of texts was encoded."""
        self.metrics.encoder_batch_size.observe(texts)
        self.metrics.encoder_texts_total.inc(texts)
        self.metrics.stage_seconds.labels("encode").observe(seconds)

    def users_learnt(
        self, events: Sequence[SourceEvent], stamps_s: Sequence[float], batch: UserBatch, now: float
    ) -> None:
        """A batch is in its users' rows, visible to reads. stamps_s: when each event was published."""
        self.events += len(events)
        if batch.unknown_actions:
            self.metrics.events_total.labels("clicks", "unknown_action").inc(batch.unknown_actions)
        if batch.erased:
            self.metrics.erasures_total.inc(len(batch.erased))
        for at in range(0, len(events), SAMPLE_EVERY):
            kind = examples.USER_SOURCES[events[at].topic]
            self.metrics.freshness_seconds.labels(kind).observe(max(0.0, now - stamps_s[at]))
        if events:
            self.event_lag_s = max(0.0, now - events[-1].event.ts)
            self.metrics.event_time_lag_seconds.set(self.event_lag_s)

    def learnt(self, learnt: Sequence[Learnt], live: LiveMetrics, now: float) -> None:
        """Messages are in the item matrix."""
        for one in learnt:
            if one.examples:
                self.metrics.learnt_seconds.observe(max(0.0, now - one.newest_ts))
        losses = [one.outcome.log_loss for one in learnt if one.outcome is not None]
        for values in losses:
            for value in values[~np.isnan(values)].tolist():
                self.metrics.log_loss.observe(value)
        if now - self._reported_s >= REPORT_INTERVAL_S:
            self._reported_s = now
            self.publish(live)

    def publish(self, live: LiveMetrics) -> None:
        """The live figures, as of now."""
        drifts = self.metrics.drift_detections_total.labels(live.drift.signal)  # told from 0 on: an alert sees it rise
        drifts.inc(max(0, live.drift.detections - self._drifts))  # a learner that comes back begins to look anew
        self._drifts = live.drift.detections
        self.report = live.report()
        for name, figures in self.report.items():
            if not isinstance(figures, dict) or figures.get("hr@10") is None:
                continue
            self.metrics.prequential_hit_ratio.labels(name, str(PREQUENTIAL_K)).set(figures["hr@10"])
            self.metrics.prequential_ndcg.labels(name, str(PREQUENTIAL_K)).set(figures["ndcg@10"])

    def state(self, kind: str, rows: int, size_bytes: int, lag_records: int) -> None:
        """How much a kind of state holds, and how far it is behind."""
        self.metrics.state_rows.labels(kind).set(rows)
        self.metrics.state_bytes.labels(kind).set(size_bytes)
        self.metrics.consumer_lag_records.labels(kind).set(lag_records)
