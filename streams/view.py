"""The running worker as HTTP sees it (streams.serving.WorkerView)."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Sequence
from importlib.metadata import version
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from model.adapter import Adapter
from model.evaluate import ITEM_KNN
from model.ranker import Ranker
from model.trial import ARMS, Trial
from state import partition as state_partition
from streams import codec, kafka
from streams.agents import CatalogueKeeper, Keeper, LearnerKeeper, UserKeeper
from streams.answers import (
    Certificate,
    Digests,
    EncoderView,
    LearnerView,
    ModelView,
    PartitionDigest,
    Prequential,
    Recommendations,
    ReplicaView,
    TrialView,
)
from streams.events import TS_S_MAX, Click, Comment, Erasure
from streams.pipeline import EvidenceConfig
from streams.serving import NotReady, Origin, Read, ServingMetrics, stream_event
from streams.tokens import settings_digest
from streams.worker import LEARNER_PARTITION, Worker

WAIT_POLL_S: Final = 0.005
STATUS_INTERVAL_S: Final = 1.0
LISTENER_MESSAGES_MAX: Final = 100  # a slow listener misses what does not fit
RETRY_AFTER_S: Final = 1.0
LOG_WAIT_S: Final = 2.0  # a request waits this long for what a log has: its end, the user's own words
LOG_READERS_MAX: Final = 4  # consumers at a time


class View:
    """Reads of one worker; everything but `digest` in the worker's loop."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.partitions = worker.settings.partitions
        self.metrics: ServingMetrics = worker.metrics
        self.ranker = Ranker(worker.replica, cooccurrence_history=worker.learner_config.cooccurrence_history)
        self._settings_digests: dict[str, bytes] = {}  # by encoder
        self._log_readers = asyncio.Semaphore(LOG_READERS_MAX)
        self._listeners: set[asyncio.Queue[dict[str, Any]]] = set()
        self._status_task: asyncio.Task[None] | None = None
        worker.watchers.append(self._watch)

    @property
    def encoder(self) -> str:
        """The encoder's name and digest."""
        return self.worker.encoding.encoder.name

    @property
    def model_version(self) -> str:
        """What a list depends on beyond the user: the encoder, and the examples log up to where the replica is."""
        return f"{self.encoder}@examples:{LEARNER_PARTITION}:{self.worker.replica_applied}"

    def now(self) -> float:
        """Unix s."""
        return self.worker.now()

    def partition_of(self, user_id: str) -> int:
        """As any Kafka client's default partitioner."""
        return kafka.partition_of(user_id.encode(), self.partitions)

    def owner_url(self, partition: int) -> str | None:
        """None: this worker's. Raises NotReady while nobody is known to have it."""
        if ("users", partition) in self.worker.keepers:
            return None
        url = self.worker.owner_of(self.worker.settings.topic("clicks"), partition)
        if not url or url == self.worker.settings.http_url():
            raise NotReady("the user's partition is being restored", RETRY_AFTER_S)
        return url

    def learner_url(self) -> str | None:
        """Address of the worker that learns; None: this one, or nobody is known to."""
        settings = self.worker.settings
        url = self.worker.owner_of(settings.internal_topic("examples"), LEARNER_PARTITION)
        return None if url == settings.http_url() else url

    def _keeper(self, kind: str, partition: int) -> Keeper[Any]:
        keeper = self.worker.open_keeper(kind, partition)
        if keeper is None:
            raise NotReady("the user's partition is being restored", RETRY_AFTER_S)
        return keeper

    def read(self, user_id: str) -> Read:
        """As of the last fold. Raises NotReady."""
        keeper = self._users(self.partition_of(user_id))
        origin = Origin(keeper.partition.epoch, self.worker.replica_applied, self._settings_digest())
        return Read(keeper.row(user_id), dict(keeper.shown), origin)

    def _settings_digest(self) -> bytes:
        encoder = self.encoder
        if encoder not in self._settings_digests:
            told = settings_digest(encoder, self.worker.learner_config, self.evidence)
            self._settings_digests[encoder] = told
        return self._settings_digests[encoder]

    def _users(self, partition: int) -> UserKeeper:
        keeper = self._keeper("users", partition)
        assert isinstance(keeper, UserKeeper)
        return keeper

    def applied(self, partition: int) -> dict[str, int]:
        """Last offset in the rows that `read` gives, a topic. Raises NotReady."""
        return dict(self._users(partition).shown)

    async def wait_applied(self, topic: str, partition: int, offset: int, timeout_s: float) -> bool:
        """Whether the offset is in the rows before the timeout. Raises NotReady."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while self.applied(partition)[topic] < offset:
            if loop.time() >= deadline:
                return False
            await asyncio.sleep(WAIT_POLL_S)
        return True

    def certificate(self, name: str) -> Certificate | None:
        """What is told of an erasure; None: nothing yet. Raises NotReady until all that was told has been read."""
        found = self.worker.book.get(name)
        if found is None and not self.worker.book.caught_up.is_set():
            raise NotReady("the certificates are still being read", RETRY_AFTER_S)
        return found

    async def waits(self, topic: str, partition: int, offset: int) -> bool:
        """Whether the topic has a record there that is not applied yet. Raises NotReady, KafkaError, TimeoutError."""
        if offset <= self.applied(partition)[topic]:
            return False
        name = self.worker.settings.topic(topic)
        end = self.worker.source.end_of(name, partition)
        if end is None or offset >= end:  # the end is as old as the last fetch: ask the log itself
            async with asyncio.timeout(LOG_WAIT_S), self._log_readers:
                end = await kafka.log_end(self.worker.options, name, partition)
        return offset < end

    async def publish(self, topic: str, key: bytes, value: bytes) -> tuple[int, int]:
        """Appends to a source topic: (partition, offset)."""
        return await self.worker.producer.send_one(self.worker.settings.topic(topic), key, value)

    def encode(self, text: str, user_id: str) -> Awaitable[npt.NDArray[np.float32]]:
        """The text's unit vector as of the user's next comment, after what already waits. Raises NotReady."""
        return self.worker.encoding.submit(text, self._users(self.partition_of(user_id)).next_encoder)

    async def words(self, user_id: str, offsets: Sequence[int]) -> dict[int, str]:
        """Read from the log, which alone has them: what its retention has passed is absent, what is late too."""
        found: dict[int, str] = {}
        topic, partition = self.worker.settings.topic("comments"), self.partition_of(user_id)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOG_WAIT_S), self._log_readers:
                async for offset, value in kafka.records_at(self.worker.options, topic, partition, offsets):
                    # It is an event, whatever its record's timestamp, which may be its time: the fold took it.
                    comment = codec.validate("comments", value or b"", TS_S_MAX)
                    if isinstance(comment, Comment) and comment.user_id == user_id:
                        found[offset] = comment.text
        return found

    @property
    def evidence(self) -> EvidenceConfig:
        """As the worker's own pipeline has it."""
        return self.worker.around.evidence

    def digest(self) -> Digests:
        """Of the partitions that are open here."""
        found = []
        for (kind, number), keeper in sorted(self.worker.keepers.items()):
            if self.worker.open_keeper(kind, number) is None:
                continue
            if isinstance(keeper, LearnerKeeper):
                offset, told = keeper.digest()
                applied = {"examples": offset}
            else:
                applied, rows = keeper.partition.snapshot()
                told = state_partition.digest(rows, applied)
            found.append(PartitionDigest(kind, number, applied, told))
        return Digests(self.worker.settings.http_url(), self._workers(), self.encoder, found)

    def _workers(self) -> list[str]:
        """Addresses of this one and of all that have partitions."""
        clicks = self.worker.settings.topic("clicks")
        owners = {self.worker.owner_of(clicks, p) for p in range(self.partitions)}
        return sorted({self.worker.settings.http_url(), *filter(None, owners)})

    def model_info(self) -> ModelView:
        """Versions, configuration, progress and live figures."""
        worker = self.worker
        learner = worker.open_keeper("learner", LEARNER_PARTITION)
        learning = None
        if isinstance(learner, LearnerKeeper):
            worker.telemetry.publish(learner.live)
            learning = LearnerView({"examples": learner.offset}, **learner.counts, encoder=learner.learner.number)
        replica = worker.replica
        return ModelView(
            version("headwater"),
            self.model_version,
            self._encoder_view(),
            learning,
            worker.learner_config.__dict__,
            ReplicaView(len(replica), replica.active_count, replica.positives, {"examples": worker.replica_applied}),
            self._durable_count(UserKeeper),
            self._durable_count(CatalogueKeeper),
            None if learning is None else learning.examples,
            msgspec.convert(worker.telemetry.report, Prequential),
            self._workers(),
        )

    def _encoder_view(self) -> EncoderView:
        worker = self.worker
        checkpoints, number = worker.announced.newest(), worker.encoders.number
        return EncoderView(
            self.encoder, worker.encoding.dim, self._adapter(), checkpoints, number, worker.coming, self._trial(),
            self._texts(),
        )  # fmt: skip

    def _texts(self) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = {}
        for (kind, number), keeper in sorted(self.worker.keepers.items()):
            if keeper.texts_of and self.worker.open_keeper(kind, number) is keeper:
                found.setdefault(keeper.texts_of, {})[str(number)] = keeper.texts_read_by
        return found

    def _trial(self) -> TrialView | None:
        trial = self.worker.replica.trial
        return None if trial is None else TrialView(trial.name or None, trial.share, trial.salt)

    def shown(self, told: Recommendations, trial: Trial, champion: Adapter | None) -> None:
        """Noted for the trial's report."""
        adapter = trial.adapter if told.arm == ARMS[1] else champion
        self.worker.exposures.note(told, trial, "" if adapter is None else adapter.name)

    def _adapter(self) -> str | None:
        """The version that the replica compares texts through."""
        adapter = self.worker.replica.adapter
        return None if adapter is None else adapter.name

    def _durable_count(self, kind: type[Any]) -> int:
        """Records that are applied, and whose examples are in their log."""
        return sum(
            offset + 1
            for keeper in self.worker.keepers.values()
            if isinstance(keeper, kind) and self.worker.open_keeper(keeper.kind, keeper.number) is keeper
            for offset in keeper.partition.durable.values()
        )

    def ready(self) -> list[str]:
        """What is still missing before any user can be answered for."""
        worker = self.worker
        missing = []
        if not worker.keepers:
            missing.append("no partitions have been assigned yet")
        for kind, number in sorted(worker.keepers):
            if worker.open_keeper(kind, number) is None:
                missing.append(f"{kind} partition {number} is being restored")
        if not worker.replica_caught_up:
            missing.append("the item changelog is still being read")
        return missing

    # -- the live page

    async def subscribe(self) -> AsyncIterator[dict[str, Any]]:
        """Events as they are learnt, and a status each second."""
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue(LISTENER_MESSAGES_MAX)
        self._listeners.add(queue)
        if self._status_task is None or self._status_task.done():
            self._status_task = asyncio.get_running_loop().create_task(self._tell_status(), name="status")
        try:
            while True:
                yield await queue.get()
        finally:
            self._listeners.discard(queue)

    def _watch(self, event: Click | Comment | Erasure) -> None:
        if isinstance(event, Erasure):
            self._forget(event.user_id)
        elif self._listeners:
            self._tell(stream_event(event, event.ts))

    def _forget(self, user_id: str) -> None:
        """What waits for listeners names the user no more."""
        for queue in self._listeners:
            waiting = [queue.get_nowait() for _ in range(queue.qsize())]
            for message in waiting:
                if message.get("user_id") != user_id:
                    queue.put_nowait(message)

    def _tell(self, message: dict[str, Any]) -> None:
        for queue in self._listeners:
            if not queue.full():
                queue.put_nowait(message)

    async def _tell_status(self) -> None:
        before, at = self.worker.telemetry.events, self.now()
        while self._listeners:
            await asyncio.sleep(STATUS_INTERVAL_S)
            events, now = self.worker.telemetry.events, self.now()
            report: Any = self.worker.telemetry.report
            self._tell({
                "type": "status", "events_per_s": (events - before) / max(now - at, 1e-9),
                "lag_records": self.worker.lag_records(), "lag_s": self.worker.telemetry.event_lag_s,
                "positives": self.worker.replica.positives, "items": self.worker.replica.active_count,
                "hit_ratio": {name: report.get(name, {}).get("hr@10") for name in ("model", "popularity", ITEM_KNN)},
            })  # fmt: skip
            before, at = events, now
