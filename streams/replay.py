"""Publishes a recorded stream: the catalogue first, then the events in the file's order, as fast as asked.

Lines are checked as the stream would check them, and published byte for byte: the time of an event without `ts` is that
of its record. A line that would be rejected is reported by its number and skipped.
"""

import gzip
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Final

from kafka import KafkaProducer
from kafka.errors import KafkaError
from kafka.partitioner.default import murmur2

from streams import codec
from streams.events import TS_S_MAX, Click, Item
from streams.settings import Fault, Settings
from streams.topics import BOOTSTRAP_WAIT_MS, require, unreachable

BATCH_BYTES: Final = 1 << 17
LINGER_MS: Final = 5  # of the producer: a slow replay's events are not held back for company
FLUSH_RECORDS: Final = 20_000  # sent but not acknowledged at most: bounds memory
PROGRESS_RECORDS: Final = 500
BAD_LINES_KEPT_MAX: Final = 20
PACE_S: Final = 0.002  # a sleep shorter than this is not worth its cost
ACK_S_MAX: Final = 60.0
POSITIVE_31_BITS: Final = 0x7FFFFFFF  # Kafka's toPositive


class ReplayError(Fault):
    """The stream cannot be published."""


@dataclass(frozen=True)
class BadLine:
    """A line that was skipped; `number` counts from 1."""

    file: Path
    number: int
    reason: str


@dataclass
class Replayed:
    """What was published."""

    items: int = 0
    events: int = 0
    seconds: float = 0.0  # for the events, until the last was acknowledged
    bad: int = 0
    bad_lines: list[BadLine] = field(default_factory=list)  # the first BAD_LINES_KEPT_MAX

    @property
    def events_per_s(self) -> float:
        """Published and acknowledged."""
        return self.events / self.seconds if self.seconds else 0.0


Progress = Callable[[str, int, int, int], None]
"""(what, records, bytes read, bytes in all); the bytes are those of the file as it lies on disk."""


def replay(
    settings: Settings,
    items: Path | None,
    events: Path | None,
    *,
    events_per_s: float | None = None,
    limit: int | None = None,
    skip: int = 0,
    progress: Progress = lambda what, records, done, total: None,
) -> Replayed:
    """Publishes the catalogue, waits for its acknowledgements, then the events after the first `skip`, `limit` at most.

    events_per_s: None for as fast as it goes. Raises BrokerUnreachable, TopicsError (a topic is not there, or has
    another number of partitions than planned), ReplayError (a file that cannot be read, records that were not
    acknowledged).
    """
    require(settings, ("clicks", "comments", "items"))
    done = Replayed()
    publisher = _Publisher(settings)
    try:
        if items is not None:
            _publish_items(publisher, settings, items, done, progress)
        if events is not None:
            started = time.monotonic()
            _publish_events(publisher, settings, events, done, progress, events_per_s, limit, skip)
            done.seconds = time.monotonic() - started
    finally:
        publisher.close()
    return done


def _publish_items(publisher: "_Publisher", settings: Settings, path: Path, done: Replayed, progress: Progress) -> None:
    topic = settings.topic("items")
    with _Lines(path) as lines:
        for number, line in lines:
            item = codec.validate("items", line, TS_S_MAX)
            if not isinstance(item, Item):
                _skip(done, path, number, item)
                continue
            publisher.send(topic, item.item_id, line)
            done.items += 1
            if done.items % PROGRESS_RECORDS == 0:
                progress("items", done.items, lines.bytes_read(), lines.bytes_total)
        publisher.flush()
        progress("items", done.items, lines.bytes_total, lines.bytes_total)


def _publish_events(
    publisher: "_Publisher", settings: Settings, path: Path, done: Replayed, progress: Progress,
    events_per_s: float | None, limit: int | None, skip: int,
) -> None:  # fmt: skip
    clicks, comments = settings.topic("clicks"), settings.topic("comments")
    started = time.monotonic()
    with _Lines(path) as lines:
        for number, line in lines:
            if done.events == limit:
                break
            event = codec.validate_event(line, TS_S_MAX)
            if isinstance(event, codec.Reject):
                _skip(done, path, number, event)
                continue
            if skip:
                skip -= 1
                continue
            if events_per_s is not None:
                ahead_s = done.events / events_per_s - (time.monotonic() - started)
                if ahead_s > PACE_S:
                    time.sleep(ahead_s)
            publisher.send(clicks if isinstance(event, Click) else comments, event.user_id, line)
            done.events += 1
            if done.events % PROGRESS_RECORDS == 0:
                progress("events", done.events, lines.bytes_read(), lines.bytes_total)
        publisher.flush()
        progress("events", done.events, lines.bytes_total, lines.bytes_total)


def _skip(done: Replayed, path: Path, number: int, reject: Any) -> None:
    done.bad += 1
    if len(done.bad_lines) < BAD_LINES_KEPT_MAX:
        done.bad_lines.append(BadLine(path, number, f"{reject.reason}: {reject.message}"))


class _Publisher:
    """kafka-python's producer, idempotent; a record that is not acknowledged is an error at the next flush."""

    def __init__(self, settings: Settings) -> None:
        try:
            self._producer = KafkaProducer(
                **settings.kafka_options(), acks="all", enable_idempotence=True, batch_size=BATCH_BYTES,
                linger_ms=LINGER_MS, metrics_enabled=False, allow_auto_create_topics=False,
                bootstrap_timeout_ms=BOOTSTRAP_WAIT_MS, max_block_ms=BOOTSTRAP_WAIT_MS,
            )  # fmt: skip
        except (OSError, KafkaError) as problem:
            raise unreachable(settings, problem) from problem
        self._partitions = settings.partitions
        self._waiting = 0
        self._failure: BaseException | None = None

    def send(self, topic: str, key: str, value: bytes) -> None:
        """Appends one record to the partition of its key."""
        partition = _hash(key) % self._partitions
        future = self._producer.send(topic, value, key=key.encode(), partition=partition)
        future.add_errback(self._failed)
        self._waiting += 1
        if self._waiting >= FLUSH_RECORDS:
            self.flush()

    def _failed(self, problem: BaseException) -> None:
        self._failure = self._failure or problem

    def flush(self) -> None:
        """Returns when all are acknowledged."""
        try:
            self._producer.flush(timeout=ACK_S_MAX)
        except KafkaError as problem:
            self._failed(problem)
        self._waiting = 0
        if self._failure is not None:
            raise ReplayError(
                f"the broker did not take everything ({type(self._failure).__name__}: {self._failure}); look at its "
                "log, then replay again: what is already there is not learnt twice"
            ) from self._failure

    def close(self) -> None:
        self._producer.close(timeout=ACK_S_MAX)


@lru_cache(maxsize=1 << 17)
def _hash(key: str) -> int:
    """Kafka's default partitioner, as every client's: the same user lands in the same partition, whoever writes."""
    return int(murmur2(key.encode())) & POSITIVE_31_BITS


class _Lines:
    """The lines of a plain or gzipped file, numbered from 1, without their ends; blank ones are passed over."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> "_Lines":
        try:
            self._raw = self._path.open("rb")
        except OSError as problem:
            raise ReplayError(f"{self._path}: {problem.strerror}") from problem
        self.bytes_total = self._path.stat().st_size
        zipped = self._raw.read(2) == b"\x1f\x8b"
        self._raw.seek(0)
        self._lines: IO[bytes] = gzip.open(self._raw) if zipped else self._raw  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._raw.close()

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        try:
            for number, line in enumerate(self._lines, 1):
                stripped = line.strip()
                if stripped:
                    yield number, stripped
        except (OSError, EOFError, zlib.error) as problem:
            raise ReplayError(f"{self._path}: cannot be read to its end: {problem}") from problem

    def bytes_read(self) -> int:
        """Of the file as it lies on disk."""
        return self._raw.tell()
