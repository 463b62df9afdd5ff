"""The worker: a Faust app whose agents feed keepers, the replica's tail, and the HTTP service in one loop.

Faust gives agents, partitions, rebalancing and the consumer; state, offsets and producing are ours (state/, kafka).
What differs from Faust's defaults, and why, stands at each class; docs/decisions.md has the figures.
"""

import asyncio
import gc
import os
import threading
from collections.abc import Coroutine, Iterator, Mapping
from typing import Any, Final

import faust
import mode
import structlog
from aiokafka import TopicPartition
from faust.transport.drivers.aiokafka import AIOKafkaConsumerThread, Consumer
from faust.transport.utils import DefaultSchedulingStrategy
from faust.types import TP

from model.items import ItemMatrix
from model.learner import warm_up
from monitoring.metrics import Metrics
from state.changelog import Reader
from state.partition import Fenced, Partition
from streams import kafka
from streams.agents import CatalogueKeeper, Keeper, LearnerKeeper, Surroundings, UserKeeper
from streams.assignor import CopartitionedAssignor
from streams.codec import DeadLetter
from streams.encoding import Encoding
from streams.pipeline import SOURCES_KEY, ItemLearner
from streams.settings import Settings

log = structlog.get_logger(__name__)

LEARNER_PARTITION: Final = 0  # of the examples log and the item changelog: one learner
SLICE_RECORDS_MAX: Final = 1000  # records handed to an agent at once
FETCH_WAIT_MS: Final = 20  # Faust fixes 1,500; the embedded broker waits it out
COMMIT_INTERVAL_S: Final = 1.0
RESUME_INTERVAL_S: Final = 0.05
SEEK_WAIT_MAX_S: Final = 5.0  # a seek must not outlast broker_request_timeout: slower opens seek on their own
STOP_MAX_S: Final = 4.5  # then the process ends as by kill -9, which loses nothing
REOPEN_WAIT_S: Final = 1.0
REQUEST_TIMEOUT_S: Final = 30.0
assert SEEK_WAIT_MAX_S < REQUEST_TIMEOUT_S


class _Batch:
    """A slice of a partition's records as one record, whose offset is the last one's."""

    __slots__ = (
        "checksum", "headers", "key", "offset", "partition", "serialized_key_size", "serialized_value_size",
        "timestamp", "timestamp_type", "topic", "value",
    )  # fmt: skip


class BatchScheduler(DefaultSchedulingStrategy):  # type: ignore[misc]
    """Hands whole record batches to the agents: Faust's per-message path costs 65 us an event, this 1 us."""

    def iterate(self, records: Mapping[TP, list[Any]]) -> Iterator[tuple[TP, Any]]:
        """{partition: records} -> (partition, slice) in round robin over the partitions."""
        size = SLICE_RECORDS_MAX
        slices = {tp: [recs[a : a + size] for a in range(0, len(recs), size)][::-1] for tp, recs in records.items()}
        while slices:
            for tp in list(slices):
                part = slices[tp].pop()
                last = part[-1]
                batch = _Batch()
                batch.topic, batch.partition, batch.offset = last.topic, last.partition, last.offset
                batch.timestamp, batch.timestamp_type = last.timestamp, last.timestamp_type
                batch.headers, batch.key, batch.value, batch.checksum = (), None, part, None
                batch.serialized_key_size = batch.serialized_value_size = 0
                yield tp, batch
                if not slices[tp]:
                    del slices[tp]


class RawSchema(faust.Schema):  # type: ignore[misc]
    """Leaves keys and values untouched (`value_type=bytes` alone still decodes JSON)."""

    def loads_key(self, app: Any, message: Any, **_: Any) -> Any:
        """The key as it came."""
        return message.key

    def loads_value(self, app: Any, message: Any, **_: Any) -> Any:
        """The value as it came."""
        return message.value


class Worker:
    """One worker: keepers by (kind, partition), and everything they share."""

    def __init__(self, settings: Settings, now: Any, encoder: Any) -> None:
        self.settings = settings
        self.now = now
        self.metrics = Metrics()
        self.options = settings.kafka_options()
        self.producer = kafka.Producer(self.options)
        self.encoding = Encoding(encoder, self.metrics.encoded, now)
        self.learner_config = settings.learner_config(encoder.dim)
        self.replica = ItemMatrix(self.learner_config)
        self.replica_applied = -1
        self.keepers: dict[tuple[str, int], Keeper[Any]] = {}
        self.opening: dict[tuple[str, int], asyncio.Task[None]] = {}
        self.listeners: set[asyncio.Queue[dict[str, Any]]] = set()
        self.assignor = CopartitionedAssignor(settings.http_url())
        self.stopping = False
        self.topic_kinds = {
            settings.topic("clicks"): ("users", "clicks"),
            settings.topic("comments"): ("users", "comments"),
            settings.topic("items"): ("catalogue", "items"),
            settings.internal_topic("examples"): ("learner", "examples"),
        }
        self._commits: dict[TP, int] = {}
        self._paused: set[TP] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.app = _faust_app(self)
        self.around = Surroundings(
            now=now, metrics=self.metrics, evidence=settings.evidence_config(), encoding=self.encoding,
            end_of=self.end_of, first_at=self._first_at, dead_letter=self._dead_letter, durable=self._durable,
            changed=self._changed, failed=self._failed, merge_hold_s=settings.merge_hold_ms / 1e3,
            flush_linger_s=settings.flush_linger_ms / 1e3,
        )  # fmt: skip

    # -- partitions come and go

    def kind_of(self, tp: TP) -> tuple[str, int]:
        """Which keeper a topic partition belongs to."""
        return self.topic_kinds[tp.topic][0], tp.partition

    def assigned(self, tps: set[TP]) -> None:
        """Opens what is new, resumes what stays, closes what has gone to another worker."""
        wanted = {self.kind_of(tp) for tp in tps if tp.topic in self.topic_kinds}
        self.metrics.rebalances_total.inc()
        for key in [k for k in self.keepers if k not in wanted]:
            self.opening.pop(key, None)
            self._spawn(self.keepers.pop(key).close(), f"close-{key[0]}-{key[1]}")
        for key in sorted(wanted):
            if key in self.keepers:
                self.keepers[key].resume()
            else:
                self._open(key)

    def _open(self, key: tuple[str, int]) -> None:
        keeper = self.keepers[key] = self._new_keeper(*key)
        self.opening[key] = self._spawn(self._opened(key, keeper), f"open-{key[0]}-{key[1]}")

    async def _opened(self, key: tuple[str, int], keeper: Keeper[Any]) -> None:
        try:
            await keeper.open()
        except Fenced:  # another claimant came in between: claim again, if it is still ours
            await self._reopen(keeper)

    async def revoked(self) -> None:
        """Everything durable and committed; what stays ours is resumed by `assigned`."""
        for key, keeper in list(self.keepers.items()):
            opening = self.opening.get(key)
            if opening is not None and opening.done() and not opening.exception():
                await keeper.settle()
        await self.commit()

    async def _reopen(self, keeper: Keeper[Any]) -> None:
        key = (keeper.kind, keeper.number)
        await keeper.close()
        await asyncio.sleep(REOPEN_WAIT_S)
        if self.keepers.get(key) is keeper:
            self._open(key)
            await self.seek({tp for tp in self.app.consumer.assignment() if self.kind_of(tp) == key})

    def _failed(self, keeper: Keeper[Any], failure: BaseException) -> None:
        if isinstance(failure, Fenced):
            log.warning("partition fenced; claiming it again", kind=keeper.kind, partition=keeper.number)
            self._spawn(self._reopen(keeper), f"reopen-{keeper.kind}-{keeper.number}")
            return
        log.error("worker ends: a partition's task failed", kind=keeper.kind, partition=keeper.number,
                  exc_info=failure)  # fmt: skip
        os._exit(1)  # as by kill -9: nothing half done is written, and the next owner reads again

    def _new_keeper(self, kind: str, number: int) -> Keeper[Any]:
        topics = {topic: name for topic, (k, name) in self.topic_kinds.items() if k == kind}
        changelog = {"users": "users-changelog", "catalogue": "catalogue-changelog", "learner": "items-changelog"}
        partition = Partition(
            path=self.settings.state_dir / f"{kind}-{number}",
            changelog=kafka.ChangelogTopic(
                self.settings.internal_topic(changelog[kind]), number, self.producer, self.options
            ),
            publish=self._publish_examples,
            sources=tuple(topics.values()),
            on_durable=lambda applied: self._applied(topics, number, applied),
        )
        if kind == "users":
            return UserKeeper(number, partition, topics, self.around)
        if kind == "catalogue":
            return CatalogueKeeper(number, partition, topics, self.around)
        return LearnerKeeper(
            number, partition, topics, self.around,
            lambda: ItemLearner(self.learner_config, self.encoding.dim),
            self.settings.item_flush_bytes_per_s, self.settings.item_flush_min_s,
        )  # fmt: skip

    async def _publish_examples(self, records: list[tuple[bytes, bytes]]) -> None:
        await self.producer.send(self.settings.internal_topic("examples"), LEARNER_PARTITION, records)

    # -- records and offsets

    async def offer(self, topic: str, partition: int, records: list[Any]) -> None:
        """A slice of records from an agent to its keeper. Dropped while the keeper opens: it seeks back afterwards."""
        tp = TP(topic, partition)
        key = self.kind_of(tp)
        keeper = self.keepers.get(key)
        opening = self.opening.get(key)
        if keeper is None or opening is None or not opening.done():
            return
        opening.result()
        back = await keeper.offer(topic, records)
        if back is not None:
            log.warning("hole in a source log; reading again", topic=topic, partition=partition, offset=back)
            await self.app.consumer.seek_wait({tp: back})
        elif keeper.is_full(topic):
            self.app.consumer.pause_partitions({tp})
            self._paused.add(tp)

    async def seek(self, tps: set[TP]) -> None:
        """Reads each from just after what its keeper has applied; those that still open follow by themselves."""
        generation = self.app.consumer_generation_id
        tasks = {self.opening[self.kind_of(tp)] for tp in tps if self.kind_of(tp) in self.opening}
        if tasks:
            await asyncio.wait(tasks, timeout=SEEK_WAIT_MAX_S)
        targets: dict[TP, int] = {}
        for tp in tps:
            opening = self.opening.get(self.kind_of(tp))
            if opening is None:
                continue
            if opening.done():
                opening.result()
                targets[tp] = self.keepers[self.kind_of(tp)].next_offset(tp.topic)
            else:
                self._spawn(self._seek_when_open(tp, opening, generation), f"seek-{tp.topic}-{tp.partition}")
        if targets and generation == self.app.consumer_generation_id:
            await self.app.consumer.seek_wait(targets)

    async def _seek_when_open(self, tp: TP, opening: asyncio.Task[None], generation: int) -> None:
        await opening
        if generation == self.app.consumer_generation_id and self.kind_of(tp) in self.keepers:
            await self.app.consumer.seek_wait({tp: self.keepers[self.kind_of(tp)].next_offset(tp.topic)})

    def _applied(self, topics: Mapping[str, str], number: int, applied: Mapping[str, int]) -> None:
        for topic, name in topics.items():
            if applied.get(name, -1) >= 0:
                self._durable(topic, number, applied[name] + 1)

    def _durable(self, topic: str, partition: int, next_offset: int) -> None:
        self._commits[TP(topic, partition)] = next_offset

    async def commit(self) -> None:
        """Commits what has become durable. Only a convenience for lag tools: a restart seeks by its own state."""
        held = self.app.consumer.assignment()
        offsets = {tp: offset for tp, offset in self._commits.items() if tp in held}
        self._commits.clear()
        if offsets:  # an empty commit crashes Faust
            await self.app.consumer._commit(offsets)

    def end_of(self, topic: str, partition: int) -> int | None:
        """Where the log ends for us (its last stable offset), as the consumer's last fetch told; None: not known."""
        tp = TopicPartition(topic, partition)
        try:
            reader = self.app.consumer._thread._consumer
            high = reader.highwater(tp)
            stable = reader.last_stable_offset(tp)
        except (AssertionError, AttributeError):
            return None
        if high is None:
            return None
        return min(high, stable) if stable is not None and stable >= 0 else high

    async def _first_at(self, topic: str, partition: int, offset: int) -> tuple[int, int]:
        return await kafka.first_at_or_after(self.options, topic, partition, offset)

    async def _dead_letter(self, letter: DeadLetter) -> None:
        headers = [(name, value or b"") for name, value in letter.headers]
        await self.producer.send_one(letter.topic, letter.key, letter.value, headers)

    # -- the replica

    async def tail(self) -> None:
        """Follows the item changelog into this worker's item matrix: only complete flushes, as their markers come."""

        def apply(rows: Mapping[bytes, bytes | None], applied: Mapping[str, int], position: int) -> None:
            self.replica.apply((k, v) for k, v in rows.items() if k != SOURCES_KEY)
            self.replica_applied = applied["examples"]

        reader = Reader(apply, ("examples",))
        topic = self.settings.internal_topic("items-changelog")
        async for batch in kafka.read_log(self.options, topic, LEARNER_PARTITION, 0):
            for record in batch:
                reader.feed(record.offset, record.key, record.value)

    def _changed(self, what: dict[str, Any]) -> None:
        for queue in self.listeners:
            if not queue.full():
                queue.put_nowait(what)

    # -- life

    async def start(self) -> None:
        """Before the agents: the producer, the topics' partitions checked, the tail."""
        await self.producer.start()
        await self._check_partitions()
        self._spawn(self._guarded(self.tail()), "tail")
        self._spawn(self._guarded(self._every(COMMIT_INTERVAL_S, self.commit)), "commit")
        self._spawn(self._guarded(self._every(RESUME_INTERVAL_S, self._resume_paused)), "resume")

    async def _check_partitions(self) -> None:
        counts = {t: await self.producer.partitions(t) for t, (kind, _) in self.topic_kinds.items() if kind == "users"}
        if len(set(counts.values())) != 1:
            raise RuntimeError(f"clicks and comments must have as many partitions as each other: {counts}")

    async def _every(self, interval_s: float, work: Any) -> None:
        while not self.stopping:
            await asyncio.sleep(interval_s)
            await work()

    async def _resume_paused(self) -> None:
        for tp in list(self._paused):
            keeper = self.keepers.get(self.kind_of(tp))
            if keeper is None or tp.topic not in keeper.inbox.sources or keeper.is_low(tp.topic):
                self._paused.discard(tp)
                if tp in self.app.consumer.assignment():
                    self.app.consumer.resume_partitions({tp})

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except asyncio.CancelledError:
            raise
        except BaseException as failure:
            log.error("worker ends: a background task failed", exc_info=failure)
            os._exit(1)

    async def stop(self) -> None:
        """Drained, flushed, committed, closed."""
        self.stopping = True
        await self.revoked()
        for keeper in list(self.keepers.values()):
            await keeper.close()
        self.keepers.clear()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.encoding.close()

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _faust_app(worker: Worker) -> Any:
    settings = worker.settings

    class ConsumerThread(AIOKafkaConsumerThread):  # type: ignore[misc]
        """Reads committed records only, waits FETCH_WAIT_MS for a fetch, and shares partitions by our assignor."""

        def _create_worker_consumer(self, transport: Any) -> Any:
            consumer = super()._create_worker_consumer(transport)
            consumer._fetch_max_wait_ms = FETCH_WAIT_MS
            consumer._isolation_level = "read_committed"
            consumer._partition_assignment_strategy = [worker.assignor]
            return consumer

    class SeekConsumer(Consumer):  # type: ignore[misc]
        """Opens start before Faust's own callback; `perform_seek` ends with our seek, so that nothing overwrites it."""

        def _new_consumer_thread(self) -> Any:
            return ConsumerThread(self, loop=self.loop, beacon=self.beacon)

        async def on_partitions_assigned(self, assigned: set[TP], generation_id: int = 0) -> None:
            worker.assigned(assigned)
            await super().on_partitions_assigned(assigned, generation_id)

        async def perform_seek(self) -> None:
            await super().perform_seek()
            await worker.seek({tp for tp in self.assignment() if tp.topic in worker.topic_kinds})

    class App(faust.App):  # type: ignore[misc]
        """Stops in the order: take no more, finish, flush, commit; with a watchdog."""

        async def on_start(self) -> None:
            await worker.start()
            await super().on_start()

        async def on_stop(self) -> None:
            watchdog = threading.Timer(STOP_MAX_S, lambda: os._exit(3))
            watchdog.daemon = True
            watchdog.start()
            await worker.stop()
            await super().on_stop()
            await worker.producer.stop()
            watchdog.cancel()

    app = App(
        settings.app_id, broker=[f"kafka://{b}" for b in settings.bootstrap()], datadir=str(settings.state_dir / "faust"),
        broker_credentials=settings.faust_credentials(), topic_partitions=settings.partitions,
        topic_replication_factor=settings.replication, broker_session_timeout=settings.session_timeout_s,
        broker_heartbeat_interval=settings.session_timeout_s / 3, broker_request_timeout=REQUEST_TIMEOUT_S,
        consumer_auto_offset_reset="earliest", consumer_max_fetch_size=kafka.FETCH_BYTES_MAX, web_enabled=False,
        topic_disable_leader=True, topic_allow_declare=False, stream_wait_empty=False, stream_buffer_maxsize=64,
        ConsumerScheduler=BatchScheduler,
    )  # fmt: skip
    app.transport.Consumer = SeekConsumer
    schema = RawSchema(key_type=bytes, value_type=bytes)

    def agent(name: str, *topics: str) -> None:
        source = app.topic(*topics, schema=schema, acks=False)

        async def feed(stream: Any) -> None:
            async for event in stream.noack().events():
                message = event.message
                if message.generation_id == app.consumer_generation_id:  # else the new owner reads it again
                    await worker.offer(message.topic, message.partition, event.value)

        app.agent(source, name=name, supervisor_strategy=mode.CrashingSupervisor)(feed)

    agent("learn_users", settings.topic("clicks"), settings.topic("comments"))
    agent("catalogue", settings.topic("items"))
    agent("learn_items", settings.internal_topic("examples"))

    @app.on_partitions_revoked.connect  # type: ignore[untyped-decorator]
    async def revoked(sender: Any, tps: set[TP], **_: Any) -> None:
        await worker.revoked()

    return app


def run(settings: Settings, now: Any) -> None:
    """Runs a worker until SIGTERM or SIGINT; then the process ends with 0, or 1 when it failed.

    Kernels are compiled and the encoder is loaded before partitions are taken: neither delays a heartbeat.
    """
    from model.encoder import Encoder  # torch is loaded by the worker alone, not by the command line's help
    from streams.web import HttpService

    encoder = Encoder(settings.encoder, device=settings.device)
    warm_up(settings.learner_config(encoder.dim))
    worker = Worker(settings, now, encoder)
    gc.collect()
    gc.freeze()  # aiokafka makes an object an event; collections over all of Faust's heap took a quarter of the CPU
    gc.set_threshold(100_000, 50, 1000)
    http = HttpService(worker, settings)
    faust.Worker(worker.app, http, loglevel="WARN", logging_config=None, redirect_stdouts=False).execute_from_commandline()


