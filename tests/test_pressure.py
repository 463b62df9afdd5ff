"""A worker under pressure: an encoder that stands still and is slow, a user of 200 MB, a burst that came while it was
stopped.
"""

import asyncio
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
from kafka import KafkaProducer
from kafka.admin import ConfigResourceType

from bench import load
from bench.deployment import QUIET_LOOKS, Deployment, WorkerProcess
from bench.kafka_node import KafkaNode
from bench.words import DIM
from state import rows
from state.store import RocksDisk
from streams import kafka
from streams.agents import INBOX_BYTES_MAX
from streams.codec import HEADER_EXCEPTION, HEADER_OMITTED, HEADER_VALUE_BYTES
from streams.events import MESSAGE_BYTES_MAX, TEXT_CHARS_MAX
from streams.kafka import FETCH_BYTES_MAX
from streams.settings import Settings
from tests.test_partition_on_brokers import configure
from tests.test_worker import catalogue_known

PARTITIONS: Final = 2
ITEMS: Final = 50
DELAY_S: Final = 0.02  # of the encoder, a text
COMMENTS: Final = 500  # of the longest text, at four bytes a character
CLICKS: Final = rows.SEEN_MAX + rows.HISTORY_MAX + 400  # each on another item
ROUNDS: Final = 20
CALM: Final = 100
BURST: Final = 20_000
BURST_USERS: Final = 500
HUGE_BYTES: Final = 6 << 20  # more than a fetch of a partition asks for
ROW_BYTES: Final = 32 + 100 * (16 + 8) + 4096 * 8 + 8 * (28 + DIM) + 4 * DIM  # docs/data.md: all at their most
WAITING_BYTES_MAX: Final = 2 * INBOX_BYTES_MAX + 4 * FETCH_BYTES_MAX  # queue, batch under way, fetches: 72 MB measured
RSS_BYTES_MAX: Final = 160 << 20  # of growth: what waits, as text, and the buffers on its way; 119 MiB measured
USERS_LAG: Final = 'headwater_consumer_lag_records{kind="users"}'

# A worker that looks at its lag often. Its encoder stands still while a file is there, and is slow then.
SLOW: Final = """
import sys, time
from pathlib import Path
from bench import words
from streams import worker

class Slow(words.WordVectors):
    def encode(self, texts):
        while held.exists():
            time.sleep(0.01)
        return super().encode(texts)

worker.OBSERVE_INTERVAL_S = 0.1
held = Path(sys.argv[1])
words.run(Slow(float(sys.argv[2])))
"""


def somebody(partition: int, name: str) -> str:
    """A user of that partition."""
    users = (f"{name}{n}" for n in itertools.count())
    return next(user for user in users if kafka.partition_of(user.encode(), PARTITIONS) == partition)


WHALE: Final = somebody(0, "whale")
SHRIMP: Final = somebody(0, "shrimp")
NEIGHBOUR: Final = somebody(1, "neighbour")
WORD: Final = "\N{SPOUTING WHALE}" * 999 + " "


def comment(number: int, chars: int = TEXT_CHARS_MAX) -> bytes:
    """A message of the whale with so long a text."""
    text = f"{number:05d} {WORD * (chars // len(WORD) + 1)}"[:chars]
    return json.dumps({"user_id": WHALE, "text": text}, ensure_ascii=False).encode()


COMMENT_BYTES: Final = len(comment(0))


def click(user: str, item: str) -> bytes:
    return json.dumps({"user_id": user, "item_id": item, "action": "click"}).encode()


def start(deployment: Deployment, held: Path) -> WorkerProcess:
    return deployment.start_worker(command=[sys.executable, "-c", SLOW, str(held), str(DELAY_S)])


def accepted(told: dict[str, float], topic: str) -> int:
    """Records that the worker has taken in."""
    return int(told.get(f'headwater_events_total{{outcome="accepted",topic="{topic}"}}', 0))


class Look(NamedTuple):
    """One moment of the worker: comments taken in, those that the whale's row shows, the neighbour's reads, metrics."""

    at: float
    taken: int
    applied: int
    answers: int
    rebalances: float
    rss: float
    lag: float
    encoded: float


class Pressed:
    """A worker, what its users do, and what was seen of it."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.settings = deployment.settings
        self.held = deployment.folder / "held"
        self.held.touch()
        self.worker = start(deployment, self.held)
        self.looks: list[Look] = []
        self.marks: dict[str, int] = {}  # looks, by what had just happened
        self.answers: list[int] = []  # the neighbour's events, as each read told them
        self.dead_letters: dict[str, float] = {}
        self.exit_code = -1

    def look(self) -> Look:
        told = self.worker.metrics()
        applied = self.worker.get(f"/v1/users/{WHALE}/state")["applied"]["comments"][1] + 1
        seen = Look(
            time.monotonic(), accepted(told, "comments"), applied, len(self.answers),
            told["headwater_rebalances_total"], told["process_resident_memory_bytes"], told.get(USERS_LAG, 0.0),
            told["headwater_encoder_texts_total"],
        )  # fmt: skip
        self.looks.append(seen)
        return seen

    def mark(self, name: str) -> None:
        self.look()
        self.marks[name] = len(self.looks) - 1

    def marked(self, name: str) -> Look:
        return self.looks[self.marks[name]]

    def neighbour_reads(self) -> None:
        """A click of the neighbour, and the state that must know it."""
        event = {"type": "click", "user_id": NEIGHBOUR, "item_id": f"i{len(self.answers) % ITEMS}", "action": "click"}
        positions = self.worker.http.post("/v1/events", json=[event]).raise_for_status().json()["positions"]
        told = self.worker.get(f"/v1/users/{NEIGHBOUR}/state", at_least=positions)
        self.answers.append(told["events"])

    def comments_come(self) -> None:
        """While the encoder stands still, until no more is read; then it is slow."""
        asyncio.run(send_all(self.settings, "comments", WHALE, [comment(n) for n in range(COMMENTS)]))
        self.worker.wait_until("a full inbox, and no more read", self._is_still)
        self.mark("full")
        for _ in range(ROUNDS):
            self.neighbour_reads()
        self.mark("rounds")
        self.held.unlink()
        self.worker.wait_until("the comments", self._is_done)
        self.mark("done")

    def clicks_come(self) -> None:
        asyncio.run(send_all(self.settings, "clicks", WHALE, [click(WHALE, f"w{n}") for n in range(CLICKS)]))
        self.worker.wait_until(
            "the clicks", lambda: self.worker.get(f"/v1/users/{WHALE}/state")["events"] == COMMENTS + CLICKS
        )
        self.mark("clicked")

    def what_is_too_large_comes(self) -> None:
        """And then an event of another user of the partition."""
        topic = self.settings.topic("comments")
        configure(self.settings, ConfigResourceType.TOPIC, topic, max_message_bytes=str(2 * HUGE_BYTES))
        producer = KafkaProducer(**self.settings.kafka_options(), max_request_size=2 * HUGE_BYTES)
        for value in (comment(0, TEXT_CHARS_MAX + 1), b" " * (MESSAGE_BYTES_MAX + 1), b" " * HUGE_BYTES):
            producer.send(topic, value, WHALE.encode()).get(timeout=10)
        small = json.dumps({"user_id": SHRIMP, "text": "who was that?"}).encode()
        sent = producer.send(topic, small, SHRIMP.encode()).get(timeout=10)
        producer.close()
        told = self.worker.get(f"/v1/users/{SHRIMP}/state", at_least=f"comments:{sent.partition}:{sent.offset}")
        assert told["events"] == 1
        self.mark("too large")

    def stops(self) -> None:
        told = self.worker.metrics()
        self.dead_letters = {name: n for name, n in told.items() if name.startswith("headwater_dead_letters_total{")}
        self.exit_code, _ = self.worker.stop()

    def _is_still(self) -> bool:
        taken = [look.taken for look in (*self.looks, self.look())[-QUIET_LOOKS:]]
        return taken[-1] * COMMENT_BYTES >= INBOX_BYTES_MAX and len(set(taken)) == 1

    def _is_done(self) -> bool:
        self.neighbour_reads()
        seen = self.look()
        return seen.applied == COMMENTS and seen.lag == 0


async def send_all(settings: Settings, topic: str, user: str, values: list[bytes]) -> None:
    producer = kafka.Producer(settings.kafka_options())
    await producer.start()
    key, partition = user.encode(), kafka.partition_of(user.encode(), PARTITIONS)
    await producer.send(settings.topic(topic), partition, [(key, value) for value in values])
    await producer.stop()


async def letters(settings: Settings, topic: str) -> list[Any]:
    name = settings.topic(f"{topic}.dlq")
    end = await kafka.log_end(settings.kafka_options(), name, 0)
    found = kafka.read_records(settings.kafka_options(), name, 0, 0, end - 1)
    return [record async for batch in found for record in batch] if end else []


def rows_of(deployment: Deployment, partition: int) -> dict[bytes, bytes]:
    """What the disk of a worker that has ended holds of its users."""
    store = RocksDisk().open(deployment.state_dir() / f"users-{partition}")
    found = dict(store.items())
    store.close()
    return found


@pytest.fixture(scope="module")
def pressed(kafka_node: KafkaNode, tmp_path_factory: pytest.TempPathFactory) -> Pressed:
    """What came of it all."""
    folder = tmp_path_factory.mktemp("pressed")
    made = Deployment(kafka_node.address, folder, topic_prefix="pressed-", app_id="pressed", partitions=PARTITIONS)
    made.create_topics()
    asyncio.run(load.publish_items(made.settings, ITEMS))
    found = Pressed(made)
    try:
        found.worker.wait_ready()
        catalogue_known(found.worker, ITEMS)
        found.mark("ready")
        found.comments_come()
        found.clicks_come()
        found.what_is_too_large_comes()
        found.stops()
    finally:
        made.close()
    return found


def test_an_encoder_that_stands_still_and_is_slow_costs_no_heartbeat(pressed: Pressed) -> None:
    ready, done = pressed.marked("ready"), pressed.marked("done")
    assert done.at - ready.at > 1.5 * pressed.settings.session_timeout_s
    assert {look.rebalances for look in pressed.looks} == {1.0}
    assert done.applied == done.encoded == COMMENTS and done.lag == 0
    assert pressed.exit_code == 0


def test_who_waits_for_no_text_is_answered_meanwhile(pressed: Pressed) -> None:
    full, rounds = pressed.marked("full"), pressed.marked("rounds")
    assert rounds.answers - full.answers == ROUNDS
    assert rounds.encoded == rounds.applied == 0
    assert pressed.answers == list(range(1, len(pressed.answers) + 1))


def test_what_waits_is_bounded_and_the_rest_stays_in_the_log(pressed: Pressed) -> None:
    full, rounds, done = (pressed.marked(name) for name in ("full", "rounds", "done"))
    assert full.taken == rounds.taken < COMMENTS == done.taken
    comments = pressed.looks[: pressed.marks["done"] + 1]
    assert max(look.taken - look.applied for look in comments) * COMMENT_BYTES <= WAITING_BYTES_MAX
    assert max(look.rss for look in comments) - pressed.marked("ready").rss < RSS_BYTES_MAX


def test_a_user_of_200_mb_has_a_row_of_40_kb(pressed: Pressed) -> None:
    """What all sections of docs/data.md take at their most, to the byte."""
    assert COMMENTS * COMMENT_BYTES > 199e6
    found = rows_of(pressed.deployment, 0)
    assert found.keys() == {WHALE.encode(), SHRIMP.encode()}
    row = rows.unpack(found[WHALE.encode()])
    assert len(found[WHALE.encode()]) == ROW_BYTES
    assert (row.events, row.positives) == (COMMENTS + CLICKS, CLICKS)


def test_what_is_over_a_limit_costs_one_dead_letter(pressed: Pressed) -> None:
    found = asyncio.run(letters(pressed.settings, "comments"))
    told = [dict(letter.headers) for letter in found]
    reasons = ["text_too_long", "message_too_large", "message_too_large"]
    assert [headers[HEADER_EXCEPTION].decode() for headers in told] == reasons
    assert [len(letter.value) for letter in found] == [len(comment(0, TEXT_CHARS_MAX + 1)), MESSAGE_BYTES_MAX + 1, 0]
    assert (told[2][HEADER_OMITTED], told[2][HEADER_VALUE_BYTES]) == (b"value", b"%d" % HUGE_BYTES)
    counted = {"text_too_long": 1.0, "message_too_large": 2.0}
    assert pressed.dead_letters == {
        f'headwater_dead_letters_total{{reason="{reason}",topic="comments"}}': n for reason, n in counted.items()
    }
    for topic in ("clicks", "items", "erasures"):
        assert asyncio.run(letters(pressed.settings, topic)) == []


def test_a_burst_that_came_while_the_worker_was_stopped_is_worked_off(kafka_node: KafkaNode, tmp_path: Path) -> None:
    """Its lag is told, and goes; each event is read once, and counted."""
    made = Deployment(kafka_node.address, tmp_path, topic_prefix="burst-", app_id="burst", partitions=PARTITIONS)
    made.create_topics()
    held = tmp_path / "held"
    stream = load.Stream(ITEMS, BURST_USERS)
    asyncio.run(load.publish_items(made.settings, ITEMS))
    asyncio.run(load.publish_events(made.settings, stream, CALM))
    worker = start(made, held)
    try:
        worker.wait_ready()
        worker.wait_until("the first events", lambda: worker.get("/v1/model")["events_applied"] == CALM)
        assert worker.stop()[0] == 0
        held.touch()
        for user in (SHRIMP, NEIGHBOUR):  # whose texts come before all clicks of their partitions
            text = json.dumps({"user_id": user, "text": "here it comes"}).encode()
            asyncio.run(send_all(made.settings, "comments", user, [text]))
        asyncio.run(load.publish_events(made.settings, stream, BURST))
        worker = start(made, held)
        worker.wait_until("a lag", lambda: worker.metrics().get(USERS_LAG, 0.0) > 0)
        held.unlink()
        worker.wait_until("no lag", lambda: worker.metrics()[USERS_LAG] == 0)
        assert worker.rebalances() == 1
        told = worker.metrics()
        assert (accepted(told, "clicks"), accepted(told, "comments")) == (BURST, 2)
        assert worker.stop()[0] == 0
        found = [row for partition in range(PARTITIONS) for row in rows_of(made, partition).values()]
        assert sum(rows.unpack(row).events for row in found) == CALM + BURST + 2
    finally:
        made.close()
