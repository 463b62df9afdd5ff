"""Events to Kafka from a producer's own program, as the topics want them (`from headwater import Producer`)."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Self

from streams.client import TOPICS, encode
from streams.events import Click, Comment, Erasure, Item
from streams.failures import HeadwaterError, unanswered

if TYPE_CHECKING:
    pass

SEND_TIMEOUT_S: Final = 30.0  # until the brokers have acknowledged what was sent


class Producer:
    """Sends events to the source topics by kafka-python: each with its id as the key, placed by murmur2.

    A record is acknowledged by all in-sync replicas, and written once and in order where the brokers have the
    idempotent producer. Threads may share one.

    bootstrap: "host:port" with commas between. topic_prefix: the deployment's HEADWATER_TOPIC_PREFIX. options: of
    kafka-python's KafkaProducer (security_protocol, sasl_mechanism, compression_type, ...).
    """

    def __init__(
        self, bootstrap: str, *, topic_prefix: str = "", timeout_s: float = SEND_TIMEOUT_S, **options: Any
    ) -> None:  # fmt: skip
        """Raises NoAnswer."""
        from kafka import KafkaProducer
        from kafka.errors import KafkaError

        self._fault: type[Exception] = KafkaError
        self._bootstrap, self._prefix, self._timeout_s = bootstrap, topic_prefix, timeout_s
        told = {
            "acks": "all",
            "max_block_ms": round(timeout_s * 1e3),
            **options,
            "bootstrap_servers": bootstrap.split(","),
        }
        self._producer: KafkaProducer = self._answered(KafkaProducer, **told)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes its connections."""
        self._producer.close(timeout=self._timeout_s)

    def send(self, *events: Click | Comment | Item | Erasure) -> list[str]:
        """Sends events, and returns where each is in its topic ("clicks:3:1041") once all are acknowledged.

        All are checked as the stream will, before the first is sent. Raises Invalid, and NoAnswer, whose `positions`
        tell what was acknowledged.
        """
        values = [encode(event) for event in events]
        keys = [event.item_id if isinstance(event, Item) else event.user_id for event in events]
        return self._send([(TOPICS[type(e)], k.encode(), v) for e, k, v in zip(events, keys, values, strict=True)])

    def withdraw(self, *item_ids: str) -> list[str]:
        """Takes items out of the catalogue; where these records are. Raises NoAnswer."""
        return self._send([("items", item_id.encode(), None) for item_id in item_ids])

    def _send(self, records: list[tuple[str, bytes, bytes | None]]) -> list[str]:
        positions: list[str | None] = [None] * len(records)
        try:
            sent = [self._answered(self._producer.send, self._prefix + topic, v, key=k) for topic, k, v in records]
            for number, future in enumerate(sent):
                told = self._answered(future.get, timeout=self._timeout_s)
                positions[number] = f"{records[number][0]}:{told.partition}:{told.offset}"
        except HeadwaterError as failure:
            failure.positions = positions
            raise
        return [position for position in positions if position is not None]

    def _answered(self, work: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        try:
            return work(*arguments, **named)
        except self._fault as failure:
            raise unanswered("broker", self._bootstrap, failure, "Timeout" in type(failure).__name__) from failure
