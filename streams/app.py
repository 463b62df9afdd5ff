"""The worker under Faust: agents fed whole record batches, our seeks, our assignor, our stop.

Faust gives agents, partitions, rebalancing and the consumer; state, offsets and producing are ours (streams.worker).
What differs from Faust's defaults, and why, stands at each class; docs/decisions.md has the figures.
"""

import asyncio
import gc
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import faust
import mode
import structlog
import uvloop
from aiokafka import TopicPartition
from aiokafka.errors import IllegalStateError, KafkaError
from aiokafka.structs import OffsetAndMetadata
from faust.transport.drivers.aiokafka import AIOKafkaConsumerThread, Consumer
from faust.transport.utils import DefaultSchedulingStrategy
from faust.types import tuples as faust_tuples

from model import learner, ranker
from streams import heap, kafka
from streams.assignor import CopartitionedAssignor
from streams.audit import Audit, audit_key
from streams.encoding import Encoder
from streams.keys import Gate
from streams.settings import Fault, Settings
from streams.worker import SEEK_WAIT_MAX_S, TP, Worker

log = structlog.get_logger(__name__)

SLICE_RECORDS_MAX: Final = 1000  # records handed to an agent at once
POLL_RECORDS_MAX: Final = 2000  # taken of a partition before the next one has its turn
STREAM_SLICES_MAX: Final = 64  # slices that wait between the consumer and an agent
FETCH_WAIT_MS: Final = 20  # Faust fixes 1,500; the embedded broker waits it out
STOP_MAX_S: Final = 4.5  # then the process ends as by kill -9, which loses nothing
LEAVE_MAX_S: Final = 2.0  # for what is left when all is durable: connections
REQUEST_TIMEOUT_S: Final = 30.0
SWITCH_INTERVAL_S: Final = 0.001  # what the loop and the consumer wait for a thread that holds the interpreter
assert SEEK_WAIT_MAX_S < REQUEST_TIMEOUT_S, "a seek that outlasts a request reads as a stop"


@dataclass(slots=True)
class _Batch:
    """A slice of a partition's records as one record, whose offset is the last one's."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    timestamp_type: int
    value: list[Any]
    key: None = None
    headers: tuple[()] = ()
    checksum: None = None
    serialized_key_size: int = 0
    serialized_value_size: int = 0


class BatchScheduler(DefaultSchedulingStrategy):
    """Hands whole record batches to the agents: Faust's per-message path costs 65 us an event, this 1 us."""

    def iterate(self, records: Mapping[TP, list[Any]]) -> Iterator[tuple[TP, Any]]:
        """{partition: records} -> (partition, slice) in round robin over the partitions."""
        size = SLICE_RECORDS_MAX
        slices = {tp: [recs[a : a + size] for a in range(0, len(recs), size)][::-1] for tp, recs in records.items()}
        while slices:
            for tp in list(slices):
                part = slices[tp].pop()
                last = part[-1]
                batch = _Batch(last.topic, last.partition, last.offset, last.timestamp, last.timestamp_type, part)
                yield tp, batch
                if not slices[tp]:
                    del slices[tp]


class RawSchema(faust.Schema):
    """Leaves keys and values untouched (`value_type=bytes` alone still decodes JSON)."""

    def loads_key(self, app: Any, message: Any, **_: Any) -> Any:
        """The key as it came."""
        return message.key

    def loads_value(self, app: Any, message: Any, **_: Any) -> Any:
        """The value as it came."""
        return message.value


class FaustSource:
    """Faust's consumer, as the worker sees it. Faust's private parts are used here and nowhere else.

    Its TP is equal to ours, but Faust asserts its own class.
    """

    def __init__(self) -> None:
        self.app: Any = None

    def assignment(self) -> Iterable[TP]:
        """The partitions that this worker has."""
        held: Iterable[TP] = self.app.consumer.assignment()
        return held

    def generation(self) -> int:
        """The group's generation."""
        return int(self.app.consumer_generation_id)

    async def seek(self, targets: Mapping[TP, int]) -> None:
        """Reads on from these offsets."""
        await self.app.consumer.seek_wait({faust_tuples.TP(*tp): offset for tp, offset in targets.items()})

    def pause(self, tps: Iterable[TP]) -> None:
        """No more of these for now."""
        self.app.consumer.pause_partitions({faust_tuples.TP(*tp) for tp in tps})

    def resume(self, tps: Iterable[TP]) -> None:
        """More of these again."""
        self.app.consumer.resume_partitions({faust_tuples.TP(*tp) for tp in tps})

    async def commit(self, offsets: Mapping[TP, int]) -> bool:
        """Exact offsets, of partitions that are ours; False: the broker did not take them."""
        done = await self.app.consumer._commit({faust_tuples.TP(*tp): offset for tp, offset in offsets.items()})
        return bool(done)

    def end_of(self, topic: str, partition: int) -> int | None:
        """Where the log ends for us (its last stable offset), as the last fetch told; None: not known yet."""
        tp = TopicPartition(topic, partition)
        try:
            reader = self.app.consumer._thread._consumer
            high = reader.highwater(tp)
            stable = reader.last_stable_offset(tp)
        except (AssertionError, AttributeError):  # not assigned now, or not started
            return None
        if high is None:
            return None
        return int(high if stable is None or stable < 0 else min(high, stable))

    def heard_at(self, topic: str, partition: int) -> float | None:
        """When a fetch told where the log ends, last; None: not yet."""
        try:
            told_ms = self.app.consumer._thread._consumer.last_poll_timestamp(TopicPartition(topic, partition))
        except (AssertionError, AttributeError):
            return None
        return None if told_ms is None else told_ms / 1e3


def _credentials(settings: Settings) -> Any:
    """The connection's security as Faust takes it; None for plain text."""
    options = settings.kafka_options()
    context = options.get("ssl_context")
    if settings.uses_sasl:
        return faust.SASLCredentials(
            username=options["sasl_plain_username"], password=options["sasl_plain_password"],
            mechanism=options["sasl_mechanism"], ssl_context=context,
        )  # fmt: skip
    return None if context is None else faust.SSLCredentials(context=context)


def _exit_after(seconds: float, code: int) -> threading.Timer:
    """Ends the process then, unless it is cancelled or has ended by itself."""
    timer = threading.Timer(seconds, os._exit, (code,))
    timer.daemon = True
    timer.start()
    return timer


def _consumer_thread(assignor: CopartitionedAssignor) -> type[AIOKafkaConsumerThread]:
    class ConsumerThread(AIOKafkaConsumerThread):
        """Reads committed records only, waits FETCH_WAIT_MS for a fetch, shares partitions by our assignor, and takes
        from all of them by turns: else a backlog of clicks, 150,000 of which fit a fetch, keeps the examples waiting.
        """

        def _create_worker_consumer(self, transport: Any) -> Any:
            consumer = super()._create_worker_consumer(transport)
            consumer._fetch_max_wait_ms = FETCH_WAIT_MS
            consumer._isolation_level = "read_committed"
            consumer._partition_assignment_strategy = [assignor]
            return consumer

        async def _fetch_records(
            self, consumer: Any, active_partitions: set[TP], **options: Any
        ) -> dict[TP, list[Any]]:  # fmt: skip
            options["max_records"] = POLL_RECORDS_MAX
            fetch, records = super()._fetch_records, {}
            for tp in [tp for tp in consumer._fetcher._records if tp in active_partitions]:
                records.update(await fetch(consumer, {tp}, **{**options, "timeout": 0}))
            return records or await fetch(consumer, active_partitions, **options)

        async def _commit(self, offsets: Mapping[TP, int]) -> bool:
            """Faust's ends the worker where one fails; ours are for lag tools alone, so that the next will do."""
            held = self.assignment()
            told = {TopicPartition(*tp): OffsetAndMetadata(at, "") for tp, at in offsets.items() if tp in held}
            try:
                if told:
                    await self._ensure_consumer().commit(told)
            except (KafkaError, IllegalStateError) as failure:
                log.warning("offsets not committed, which only lag tools look at", why=repr(failure))
                return False
            return True

    return ConsumerThread


def build(settings: Settings, worker: Worker, source: FaustSource, assignor: CopartitionedAssignor) -> Any:
    """The Faust app whose three agents feed the worker."""
    consumer_thread = _consumer_thread(assignor)

    class SeekConsumer(Consumer):
        """Opens start before Faust's own callback; `perform_seek` ends with our seek, so that nothing overwrites it."""

        def _new_consumer_thread(self) -> Any:
            return consumer_thread(self, loop=self.loop, beacon=self.beacon)

        async def on_partitions_assigned(self, assigned: set[TP], generation_id: int = 0) -> None:
            worker.assigned(assigned)
            await super().on_partitions_assigned(assigned, generation_id)

        async def perform_seek(self) -> None:
            await super().perform_seek()
            await worker.seek({tp for tp in self.assignment() if tp.topic in worker.topic_kinds})

    class App(faust.App):
        """Stops in the order: take no more, finish, flush, commit; with a watchdog."""

        async def on_start(self) -> None:
            try:
                await worker.start()
            except Fault as fault:
                log.error("worker does not start", reason=str(fault))
                os._exit(1)
            await super().on_start()

        async def on_stop(self) -> None:
            watchdog = _exit_after(STOP_MAX_S, 3)
            await worker.stop()
            await super().on_stop()
            for stop in worker.before_producer_stops:
                await stop()
            await worker.disconnect()
            watchdog.cancel()
            _exit_after(LEAVE_MAX_S, int(self.crashed))  # a consumer whose broker is gone may never come back

    faust_dir = settings.state_dir / "faust"  # Faust keeps nothing there for an app without tables, but wants it
    faust_dir.mkdir(parents=True, exist_ok=True)
    app = App(
        settings.app_id, broker=[f"kafka://{b}" for b in settings.bootstrap()], datadir=str(faust_dir),
        broker_credentials=_credentials(settings), topic_partitions=settings.partitions,
        topic_replication_factor=settings.replication, broker_session_timeout=settings.session_timeout_s,
        broker_heartbeat_interval=settings.session_timeout_s / 3,
        broker_request_timeout=max(REQUEST_TIMEOUT_S, 2 * settings.session_timeout_s),
        consumer_auto_offset_reset="earliest", consumer_max_fetch_size=kafka.FETCH_BYTES_MAX, web_enabled=False,
        topic_disable_leader=True, topic_allow_declare=False, stream_wait_empty=False,
        stream_buffer_maxsize=STREAM_SLICES_MAX, ConsumerScheduler=BatchScheduler,
    )  # fmt: skip
    app.transport.Consumer = SeekConsumer
    source.app = app
    _add_agents(app, settings, worker)

    @app.on_partitions_revoked.connect
    async def revoked(sender: Any, tps: set[TP], **_: Any) -> None:
        await worker.revoked()

    return app


def _add_agents(app: Any, settings: Settings, worker: Worker) -> None:
    schema = RawSchema(key_type=bytes, value_type=bytes)

    def agent(name: str, *topics: str) -> None:
        async def feed(stream: Any) -> None:
            try:
                async for event in stream.noack().events():
                    message = event.message
                    if message.generation_id == app.consumer_generation_id:  # else the new owner reads it again
                        await worker.offer(message.topic, message.partition, event.value)
            except asyncio.CancelledError:
                if not worker.stopping:  # Faust cancels its agents first, and takes that for a crash till they stop
                    raise

        channel = app.topic(*topics, schema=schema, acks=False)  # with Faust's acks a commit moves by one batch only
        app.agent(channel, name=name, supervisor_strategy=mode.CrashingSupervisor)(feed)

    agent("learn_users", *map(settings.topic, ("clicks", "comments", "erasures")))
    agent("catalogue", settings.topic("items"))
    agent("learn_items", settings.internal_topic("examples"))


class FaustWorker(faust.Worker):
    """Faust's process runner, which leaves our logging as it is and draws nothing on the terminal."""

    def __init__(self, app: Any, *services: Any) -> None:
        super().__init__(app, *services, quiet=True, redirect_stdouts=False)

    def _setup_logging(self) -> None:
        self.spinner = None


def run(settings: Settings, gate: Gate, now: Callable[[], float], encoder: Encoder | None = None) -> None:
    """Runs a worker until SIGTERM or SIGINT; then the process ends: with 0, or 1 when the worker failed.

    Kernels are compiled and the encoder (that of the settings, unless one is given) is loaded before partitions are
    taken: neither delays a heartbeat.
    """
    from streams.view import View
    from streams.web import HttpService

    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())  # of the consumer's thread too
    heap.tune()
    if encoder is None:
        from model.encoder import Encoder as TextEncoder  # torch is for the worker alone

        encoder = TextEncoder(settings.encoder, device=settings.device)
    learner.warm_up(settings.learner_config(encoder.dim))
    source = FaustSource()
    assignor = CopartitionedAssignor(settings.http_url())
    worker = Worker(settings, now, encoder, source, assignor.owner_of)
    ranker.warm_up(worker.replica)
    app = build(settings, worker, source, assignor)
    audit = None if gate.is_open else Audit(worker.send_audit, now, audit_key(worker.sealer))
    http = HttpService(View(worker), settings, gate, audit)
    worker.before_producer_stops.append(http.stop)  # requests and the audit log end while there is a producer
    tune_interpreter()
    FaustWorker(app, http).execute_from_commandline()


def tune_interpreter() -> None:
    """For a process that has loaded what it needs and now works for long."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.collect()
    gc.freeze()  # aiokafka makes an object an event; collections over all of Faust's heap took a quarter of the CPU
    gc.set_threshold(100_000, 50, 1000)
