"""What is announced of the encoder's checkpoints (topic `encoder-checkpoints`), as readers of /v1/model are told it.

Lists need none of it: a topic that is not there or cannot be read, and a manifest that cannot, end no worker.
"""

import asyncio
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any, Final

import msgspec
import structlog
from aiokafka.errors import KafkaError, UnknownTopicOrPartitionError
from msgspec import UNSET

from streams import kafka
from streams.answers import CheckpointView
from streams.checkpoints import CURRENT, SHADOW
from streams.events import TS_S_MAX

log = structlog.get_logger(__name__)

CHECKPOINTS_TOLD_MAX: Final = 20
DECISIONS_TOLD_MAX: Final = 8  # of a checkpoint, its newest
MANIFEST_BYTES_MAX: Final = 1 << 16  # one of the trainer's takes some 2,000
RETRY_S: Final = 30.0


class _Of(msgspec.Struct):
    base: str


class Announced:
    """The newest checkpoints of one encoder. Those of others are passed over: app ids of one prefix share the topic."""

    def __init__(self, encoder: str) -> None:
        self._encoder = encoder
        self._kept: dict[str, CheckpointView] = {}
        self._complaints: set[str] = set()

    def of(self, encoder: str) -> None:
        """Those of this one from now on: what was told of others is forgotten, and `follow` begins anew."""
        if encoder != self._encoder:
            self._encoder = encoder
            self._kept.clear()

    def newest(self) -> list[CheckpointView]:
        """By the offset that they were trained up to, newest first."""
        return [self._kept[name] for name in sorted(self._kept, reverse=True)]

    def take(self, value: bytes | None, told_at: float) -> None:
        """A record of the topic, and when it was published (Unix s)."""
        if value is None:
            return
        try:
            found = self._read(value)
        except (msgspec.DecodeError, ValueError, RecursionError) as problem:
            self._complain("a manifest on the topic encoder-checkpoints cannot be read; such are passed over", problem)
            return
        if found is None:
            return
        before = self._kept.get(found.name)
        found.decisions = found.decisions[-DECISIONS_TOLD_MAX:]
        found.current_since = UNSET
        if found.state == CURRENT:
            if before is not None and before.state == CURRENT:
                found.current_since = before.current_since
            elif 0 <= told_at <= TS_S_MAX:
                found.current_since = told_at
        self._kept[found.name] = found
        while len(self._kept) > CHECKPOINTS_TOLD_MAX:
            others = [name for name, kept in self._kept.items() if kept.state not in (CURRENT, SHADOW)]
            del self._kept[min(others or self._kept)]

    def _read(self, value: bytes) -> CheckpointView | None:
        """None: of another encoder. Raises ValueError, RecursionError."""
        if len(value) > MANIFEST_BYTES_MAX:
            raise ValueError(f"{len(value)} bytes, {MANIFEST_BYTES_MAX} at most")
        if msgspec.json.decode(value, type=_Of).base != self._encoder:
            return None
        return msgspec.json.decode(value, type=CheckpointView)

    async def follow(self, options: Mapping[str, Any], producer: kafka.Producer, topic: str) -> None:
        """Takes all that the topic has and gets, for ever; after a failure from its beginning."""
        while True:
            try:
                await _require(options, topic)
                encoder = self._encoder
                partition = kafka.partition_of(encoder.encode(), await producer.partitions(topic))
                async with aclosing(kafka.read_records(options, topic, partition, 0)) as batches:
                    async for batch in batches:
                        if self._encoder != encoder:
                            break
                        for record in batch:
                            self.take(record.value, record.timestamp / 1e3)
                continue  # with the encoder that is in use now
            except KafkaError as failure:
                self._complain("the topic encoder-checkpoints cannot be read; trying again", failure)
            await asyncio.sleep(RETRY_S)

    def _complain(self, what: str, reason: Exception) -> None:
        """In the log, once."""
        if what not in self._complaints:
            self._complaints.add(what)
            log.warning(what, reason=f"{type(reason).__name__}: {reason}")


async def _require(options: Mapping[str, Any], topic: str) -> None:
    """Raises KafkaError unless it is there. Asked for all topics: many brokers make one that is asked for by name."""
    async with kafka.consumer(options) as reader:
        if topic not in await reader.topics():
            raise UnknownTopicOrPartitionError(f"there is no topic {topic}: `headwater topics` makes it")
