"""The Kafka edge below Faust: whole batches out, whole changelogs in, exact gaps."""

import asyncio
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from aiokafka.errors import (
    IncompatibleBrokerVersion,
    KafkaConnectionError,
    KafkaError,
    OffsetOutOfRangeError,
    UnknownError,
)
from aiokafka.partitioner import murmur2

from state.changelog import LogRecord
from streams import headers

headers.install()
log = structlog.get_logger(__name__)

BATCH_BYTES_MAX: Final = 1 << 19
REQUEST_BYTES_MAX: Final = 1 << 20
METADATA_AGE_MS: Final = 60_000  # partitions that somebody adds are noticed so much later, at most
READ_RECORDS_MAX: Final = 20_000
DELETE_TRIES_MAX: Final = 3
DELETE_RETRY_S: Final = 0.5  # a leader that moves has moved by then, mostly
SCAN_RECORDS_MAX: Final = 2_000  # of a log that is searched beside everything else: some 10 ms of the loop
FETCH_BYTES_MAX: Final = 1 << 22
FETCH_WAIT_MS: Final = 50
ONE_FETCH_BYTES_MAX: Final = 1 << 16  # where one record is wanted: its batch, which comes whole however large
T = TypeVar("T")

assert BATCH_BYTES_MAX <= REQUEST_BYTES_MAX, "a batch must fit into a request"


def partition_of(key: bytes, partitions: int) -> int:
    """The partition that Kafka's default partitioner (murmur2) puts a key in."""
    return int((murmur2(key) & 0x7FFFFFFF) % partitions)


@dataclass(eq=False, slots=True)
class _Sending:
    """A call of `Producer.send` on its way: `at` records of it are acknowledged."""

    records: Sequence[tuple[bytes | None, bytes | None]]
    done: asyncio.Future[int]
    at: int = 0


class Producer:
    """Sends whole record batches to given partitions, acknowledged and in order.

    What waits for one partition goes out together (group commit): four partitions' examples cost one acknowledgement.
    aiokafka has one request a broker on its way, so large and urgent appends belong in producers of their own.
    Idempotent where the broker has it, so that a retry doubles no batch.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = dict(options)
        self._producer: AIOKafkaProducer | None = None
        self._waiting: defaultdict[tuple[str, int], deque[_Sending]] = defaultdict(deque)
        self._tasks: dict[tuple[str, int], asyncio.Task[None]] = {}
        self.idempotent = False

    async def start(self) -> None:
        """Connects. Raises KafkaError when no broker answers."""
        try:
            self._producer = await self._started(enable_idempotence=True)
            self.idempotent = True
        except UnknownError:  # the embedded broker's answer to InitProducerId
            log.info("the broker has no idempotent producer: a retry may repeat a batch; readers drop repeats")
            self._producer = await self._started(enable_idempotence=False)

    async def _started(self, *, enable_idempotence: bool) -> AIOKafkaProducer:
        producer = AIOKafkaProducer(
            **self._options, acks="all", linger_ms=0, max_batch_size=BATCH_BYTES_MAX,
            max_request_size=REQUEST_BYTES_MAX, enable_idempotence=enable_idempotence,
            metadata_max_age_ms=METADATA_AGE_MS,
        )  # fmt: skip
        try:
            await producer.start()
        except BaseException:
            await producer.stop()
            raise
        return producer

    async def stop(self) -> None:
        """Waits for what is under way, then disconnects."""
        if self._producer is not None:
            await self._producer.stop()

    async def partitions(self, topic: str) -> int:
        """How many partitions the topic has, or had METADATA_AGE_MS ago. Raises KafkaError when it is not there."""
        assert self._producer is not None
        return len(await self._producer.partitions_for(topic))

    async def send(self, topic: str, partition: int, records: Sequence[tuple[bytes | None, bytes | None]]) -> int:
        """Appends the records, all acknowledged on return; the offset of the last one.

        One batch a partition is unacknowledged at most, and a failed one fails every call that has records in it: so
        what a call leaves in the log is a prefix of its records. Raises ValueError for a record larger than a batch,
        and KafkaError.
        """
        assert self._producer is not None and records
        place = (topic, partition)
        sending = _Sending(records, asyncio.get_running_loop().create_future())
        self._waiting[place].append(sending)
        if place not in self._tasks:
            self._tasks[place] = asyncio.create_task(self._send_waiting(place), name=f"send-{topic}-{partition}")
        return await sending.done

    async def _send_waiting(self, place: tuple[str, int]) -> None:
        """Batch by batch, until nothing waits for the partition."""
        waiting = self._waiting[place]
        try:
            while waiting:
                await self._send_batch(place, waiting)
        finally:
            del self._tasks[place]

    async def _send_batch(self, place: tuple[str, int], waiting: deque[_Sending]) -> None:
        """One batch of what waits, from the front; tells the calls that are whole or have failed."""
        assert self._producer is not None
        batch = self._producer.create_batch()
        counts: list[tuple[_Sending, int]] = []
        for sending in waiting:
            records, at = sending.records, sending.at
            while at < len(records) and batch.append(key=records[at][0], value=records[at][1], timestamp=None):
                at += 1
            if at > sending.at:
                counts.append((sending, at - sending.at))
            if at < len(records):
                break
        try:
            if not counts:
                key, value = waiting[0].records[waiting[0].at]
                counts.append((waiting[0], 0))
                size = len(key or b"") + len(value or b"")
                raise ValueError(f"a record of {size} bytes for {place[0]} exceeds a batch of {BATCH_BYTES_MAX}")
            batch.close()
            sent = await self._producer.send_batch(batch, place[0], partition=place[1])
            offset = int((await sent).offset)
        except BaseException as failure:
            for sending, _ in counts:
                waiting.remove(sending)
                if not sending.done.done():
                    sending.done.set_exception(failure)
            if not isinstance(failure, Exception):
                raise
            return
        for sending, count in counts:
            offset += count
            sending.at += count
            if sending.at == len(sending.records):
                waiting.popleft()
                if not sending.done.done():
                    sending.done.set_result(offset - 1)

    async def send_one(
        self, topic: str, key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, bytes | None]] = (),
        partition: int | None = None,
    ) -> tuple[int, int]:  # fmt: skip
        """Appends one record, to the partition of its key's murmur2 unless one is given: (partition, offset)."""
        assert self._producer is not None
        done = await self._producer.send_and_wait(
            topic, value=value, key=key, partition=partition, headers=list(headers) or None
        )
        return done.partition, done.offset


class ChangelogTopic:
    """One partition of a changelog, as state.changelog.Log asks for it."""

    def __init__(self, topic: str, partition: int, producer: Producer, options: Mapping[str, Any]) -> None:
        self.topic, self.partition = topic, partition
        self._producer = producer
        self._options = options

    async def append(self, records: Sequence[tuple[bytes, bytes | None]]) -> int:
        """Acknowledged, in order; the offset of the last one."""
        return await self._producer.send(self.topic, self.partition, records)

    async def read(self, start: int, stop: int | None) -> AsyncIterator[list[LogRecord]]:
        """The records from `start` to `stop` inclusive; without stop, to the end that the log has now."""
        if stop is None:
            stop = await log_end(self._options, self.topic, self.partition) - 1
        async for batch in read_log(self._options, self.topic, self.partition, start, stop):
            yield batch

    async def first(self) -> int:
        """Where the log begins."""
        return await log_start(self._options, self.topic, self.partition)


async def read_log(
    options: Mapping[str, Any], topic: str, partition: int, start: int, stop: int | None = None, **more: Any
) -> AsyncIterator[list[LogRecord]]:
    """`read_records` of a log that is ours."""
    async for batch in read_records(options, topic, partition, start, stop, **more):
        yield [LogRecord(m.offset, m.key, m.value) for m in batch]


async def read_records(
    options: Mapping[str, Any], topic: str, partition: int, start: int, stop: int | None = None, **more: Any
) -> AsyncGenerator[list[Any], None]:
    """Batches of a partition's records from `start` (or the log's beginning) to `stop` inclusive.

    Without `stop` it follows the log for ever, with empty batches while nothing comes. Holes in the offsets
    (compaction) are passed over. `more`: of the consumer (`isolation_level="read_committed"` for source logs;
    `max_poll_records`, of a batch).
    """
    tp = TopicPartition(topic, partition)
    async with consumer(options, **{"max_poll_records": READ_RECORDS_MAX, **more}) as reader:
        reader.assign([tp])
        beginning = (await reader.beginning_offsets([tp]))[tp]
        at = max(start, beginning)
        reader.seek(tp, at)
        while stop is None or at <= stop:
            fetched = await reader.getmany(tp, timeout_ms=300)
            batch = [m for m in fetched.get(tp, ()) if m.offset >= at and (stop is None or m.offset <= stop)]
            at = max(at, await reader.position(tp))
            if batch or stop is None:
                yield batch


class consumer:  # noqa: N801  (a context manager, used as one)
    """A consumer without a group, started and stopped: `async with consumer(options) as c`."""

    def __init__(self, options: Mapping[str, Any], **more: Any) -> None:
        self._consumer = AIOKafkaConsumer(
            **options, group_id=None, enable_auto_commit=False, fetch_max_wait_ms=FETCH_WAIT_MS,
            auto_offset_reset="earliest", **{"max_partition_fetch_bytes": FETCH_BYTES_MAX, **more},
        )  # fmt: skip

    async def __aenter__(self) -> AIOKafkaConsumer:
        await self._consumer.start()
        return self._consumer

    async def __aexit__(self, *_: object) -> None:
        await self._consumer.stop()


async def records_at(
    options: Mapping[str, Any], topic: str, partition: int, offsets: Sequence[int]
) -> AsyncIterator[tuple[int, bytes | None]]:
    """(offset, value) of the records at these offsets, in order; those that the log has no more are passed over."""
    tp = TopicPartition(topic, partition)
    async with consumer(options, max_partition_fetch_bytes=ONE_FETCH_BYTES_MAX) as reader:
        reader.assign([tp])
        beginning = (await reader.beginning_offsets([tp]))[tp]
        for offset in sorted(offsets):
            if offset < beginning:
                continue
            reader.seek(tp, offset)
            fetched = await reader.getmany(tp, timeout_ms=1000, max_records=1)
            for message in fetched.get(tp, ()):
                if message.offset == offset:
                    yield offset, message.value


async def first_at_or_after(options: Mapping[str, Any], topic: str, partition: int, offset: int) -> tuple[int, int]:
    """(offset of the first committed record at or after `offset`, where the log begins).

    Tells a legal gap (control records, aborted transactions, compaction) from a hole: see ARCHITECTURE.md.
    Waits until there is such a record.
    """
    tp = TopicPartition(topic, partition)
    async with consumer(options, isolation_level="read_committed") as probe:
        probe.assign([tp])
        beginning = (await probe.beginning_offsets([tp]))[tp]
        probe.seek(tp, max(offset, beginning))
        while True:
            try:
                fetched = await probe.getmany(tp, timeout_ms=1000, max_records=1)
            except OffsetOutOfRangeError:
                beginning = (await probe.beginning_offsets([tp]))[tp]
                probe.seek(tp, beginning)
                continue
            for message in fetched.get(tp, ()):
                return message.offset, beginning


async def keys(options: Mapping[str, Any], topic: str, partition: int) -> AsyncIterator[tuple[int, bytes, int]]:
    """(offset, key, timestamp in Unix ms) of the records with a key, up to the end that the log has now.

    Records of aborted transactions too: they lie on the brokers' disks like the others.
    """
    tp = TopicPartition(topic, partition)
    end = await log_end(options, topic, partition)
    async with consumer(options) as reader:
        reader.assign([tp])
        reader.seek(tp, (await reader.beginning_offsets([tp]))[tp])
        while await reader.position(tp) < end:
            fetched = await reader.getmany(tp, timeout_ms=300, max_records=SCAN_RECORDS_MAX)
            for message in fetched.get(tp, ()):
                if message.key is not None:
                    yield message.offset, message.key, message.timestamp


async def record_at(options: Mapping[str, Any], topic: str, partition: int, offset: int) -> Any:
    """aiokafka's record with this offset; None: the log does not have it."""
    tp = TopicPartition(topic, partition)
    end = await log_end(options, topic, partition)
    async with consumer(options) as reader:
        reader.assign([tp])
        if not (await reader.beginning_offsets([tp]))[tp] <= offset < end:
            return None
        reader.seek(tp, offset)
        while await reader.position(tp) <= offset:
            fetched = await reader.getmany(tp, timeout_ms=300, max_records=1)
            for message in fetched.get(tp, ()):
                return message if message.offset == offset else None
    return None


async def delete_before(options: Mapping[str, Any], topic: str, partition: int, offset: int) -> str | None:
    """Deletes a log's records before the offset (DeleteRecords); why not, where the broker refuses.

    The embedded broker ends the connection at this request, and at no other. Raises KafkaError when none is answered.
    """
    refusal: Exception | None = None
    for _ in range(DELETE_TRIES_MAX):
        admin = AIOKafkaAdminClient(**options)
        try:
            await admin.start()
            await admin.delete_records({TopicPartition(topic, partition): RecordsToDelete(offset)})
            return None
        except (KafkaError, IncompatibleBrokerVersion) as failure:
            refusal = failure
            if not (isinstance(failure, KafkaError) and failure.retriable):
                break
        finally:
            await admin.close()
        await asyncio.sleep(DELETE_RETRY_S)
    await log_start(options, topic, partition)
    return f"the broker deletes no records of {topic} ({type(refusal).__name__})"


async def in_reach(
    ask: Callable[[], Awaitable[T]], wait_s: float, what: str, is_over: Callable[[], bool] = lambda: False
) -> T | None:  # fmt: skip
    """The answer, asked for again (after `wait_s`, with a warning that says `what` waits) while it fails by what may
    pass; None: `is_over` before that. Raises KafkaError for all else that a broker or client says."""
    while not is_over():
        try:
            return await ask()
        except KafkaError as failure:
            if not failure.retriable:
                raise
            log.warning(what, reason=repr(failure))
        await asyncio.sleep(wait_s)
    return None


async def log_start(options: Mapping[str, Any], topic: str, partition: int) -> int:
    """The offset of the oldest record that the log may still have: retention moves it, compaction does not."""
    tp = TopicPartition(topic, partition)
    async with consumer(options) as reader:
        return int((await reader.beginning_offsets([tp]))[tp])


async def offset_since(options: Mapping[str, Any], topic: str, partition: int, since: float) -> int:
    """The offset of the first record whose timestamp is `since` (Unix s) or later, where the log tells; else where it
    begins, or, where it has no such record, its end."""
    tp = TopicPartition(topic, partition)
    async with consumer(options) as reader:
        beginning = int((await reader.beginning_offsets([tp]))[tp])
        try:
            found = (await reader.offsets_for_times({tp: round(1e3 * since)}))[tp]
        except KafkaError:
            return beginning
    return await log_end(options, topic, partition) if found is None else max(beginning, int(found.offset))


async def log_bounds(options: Mapping[str, Any], topics: Iterable[str], partition: int) -> dict[str, tuple[int, int]]:
    """{topic: (`log_start`, end)} of the same partition of some topics, by one connection.

    The end may be too low, on the embedded broker alone: where that matters, ask `log_end`.
    """
    tps = [TopicPartition(topic, partition) for topic in topics]
    async with consumer(options) as reader:
        starts = await reader.beginning_offsets(tps)
        ends = await reader.end_offsets(tps)
    return {tp.topic: (int(starts[tp]), int(ends[tp])) for tp in tps}


async def log_end(options: Mapping[str, Any], topic: str, partition: int) -> int:
    """The offset that the next record will get, by the fetch's high watermark.

    The embedded broker's ListOffsets answers the base offset of the last batch + 1, so the fetch decides.
    """
    tp = TopicPartition(topic, partition)
    async with consumer(options) as reader:
        reader.assign([tp])
        end = int((await reader.end_offsets([tp]))[tp])
        if end <= 0:
            return 0
        reader.seek(tp, max(end - 1, (await reader.beginning_offsets([tp]))[tp]))
        for _ in range(20):
            await reader.getmany(tp, timeout_ms=300, max_records=1)
            high = reader.highwater(tp)
            if high is not None:
                return max(int(high), end)
        raise KafkaConnectionError(f"no answer for the end of {topic}:{partition}")  # to be asked again
