"""A worker for the tests of HTTP and the page: the real rows, pipeline, learner and ranker, over a log in memory."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from itertools import pairwise
from typing import Any, Final

import msgspec
import numpy as np
from prometheus_client import CollectorRegistry, Histogram

from model.adapter import Adapter
from model.evaluate import LiveMetrics
from model.items import ItemMatrix
from model.learner import LearnerConfig
from model.ranker import Ranker
from model.trial import Trial
from state.partition import digest
from streams import answers, codec, examples, pipeline, serving
from streams.agents import POPULARITIES
from streams.answers import Certificate, StateErased
from streams.erasure import erasure_id
from streams.events import Click, Comment, Erasure, Item
from streams.pipeline import EvidenceConfig, ItemLearner, SourceEvent
from streams.tokens import settings_digest
from tests.records import record

TEXT_DIM: Final = 32
PARTITIONS: Final = 4
START_S: Final = 1_700_000_000.0
URL: Final = "http://127.0.0.1:8080"
EVIDENCE: Final = EvidenceConfig(rank_sample=1.0)
TOPIC_CODES: Final = {name: code for code, name in examples.USER_SOURCES.items()}
LIST: Final = 10  # first places that count as a hit
GENRES: Final = {"space": "Orbit", "western": "Canyon", "romance": "Letter", "horror": "Cellar"}
MOODS: Final = (
    "Quiet", "Last", "Golden", "Hidden", "Long", "Second", "Silver", "Burning", "Lost", "Distant", "Broken", "Blue",
)  # fmt: skip


def encode(text: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A unit vector of the words: texts that share words are alike."""
    total = np.zeros(TEXT_DIM, np.float32)
    for word in text.lower().replace(",", " ").split():
        seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=4).digest(), "little")
        total += np.random.default_rng(seed).standard_normal(TEXT_DIM).astype(np.float32)
    return total / np.float32(np.linalg.norm(total) or 1)


class Metrics:
    """The part of the worker's metrics that HTTP touches."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.recommendation_seconds = Histogram(
            "headwater_recommendation_seconds", "Making one list.", registry=self.registry
        )


class World:
    """A `serving.WorkerView`. `delay_s`: between an append and its being applied; `owners`: of foreign partitions."""

    def __init__(self) -> None:
        self.partitions = PARTITIONS
        self.metrics: serving.ServingMetrics = Metrics()
        self.owners: dict[int, str] = {}
        self.learns_at: str | None = None  # None: here
        self.closed: set[int] = set()
        self.waits_for: list[str] = []
        self.delay_s = 0.0
        self.written: dict[tuple[int, int], str] = {}  # comments, by partition and offset
        self.failing_after: int | None = None
        self.clock_s = START_S
        self.rate = 12.0
        self.lag_s = 0.0
        self.hits: list[tuple[bool, ...]] = []  # of each ranked click: the model, popularity, item-kNN
        self.adapter: str | None = None
        self.checkpoints: list[answers.CheckpointView] = []
        self.listeners: list[asyncio.Queue[dict[str, Any]]] = []
        self.exposed: list[tuple[answers.Recommendations, Trial]] = []
        config = LearnerConfig(dim=16, text_dim=TEXT_DIM, negatives=32, neighbours_max=32, rank_items=0)
        self.settings_digest = settings_digest(self.encoder, config, EVIDENCE)
        self._config = config
        self._live = LiveMetrics(POPULARITIES)
        self._learner = ItemLearner(config, TEXT_DIM)
        self._replica = ItemMatrix(config.dim, config.text_dim, config.neighbours_max)
        self._ranker = Ranker(self._replica, cooccurrence_history=config.cooccurrence_history)
        self._rows: dict[bytes, bytes] = {}
        self._ends: dict[tuple[str, int], int] = {}
        self._applied: dict[tuple[str, int], int] = {}
        self._examples_end = 0
        self.certificates: dict[str, Certificate] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    # -- serving.WorkerView

    @property
    def ranker(self) -> Ranker:
        return self._ranker

    @property
    def model_version(self) -> str:
        return f"test-encoder/{self._examples_end}"

    @property
    def encoder(self) -> str:
        return "test-encoder"

    @property
    def evidence(self) -> EvidenceConfig:
        return EVIDENCE

    def now(self) -> float:
        self.clock_s += 0.001
        return self.clock_s

    def partition_of(self, user_id: str) -> int:
        return sum(user_id.encode()) % self.partitions

    def owner_url(self, partition: int) -> str | None:
        if partition in self.closed:
            raise serving.NotReady(f"partition {partition} opens", 2.0)
        return self.owners.get(partition)

    def learner_url(self) -> str | None:
        return self.learns_at

    def read(self, user_id: str) -> serving.Read:
        origin = serving.Origin(1, self._examples_end - 1, self.settings_digest)
        return serving.Read(self._rows.get(user_id.encode()), self.applied(self.partition_of(user_id)), origin)

    def applied(self, partition: int) -> dict[str, int]:
        return {topic: self._applied.get((topic, partition), -1) for topic in TOPIC_CODES}

    async def wait_applied(self, topic: str, partition: int, offset: int, timeout_s: float) -> bool:
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self._applied.get((topic, partition), -1) < offset:
            if asyncio.get_running_loop().time() >= deadline:
                return False
            await asyncio.sleep(0.002)
        return True

    async def encode(self, text: str, user_id: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        return encode(text)

    async def words(self, user_id: str, offsets: Sequence[int]) -> dict[int, str]:
        partition = self.partition_of(user_id)
        return {o: self.written[partition, o] for o in offsets if (partition, o) in self.written}

    async def publish(self, topic: str, key: bytes, value: bytes) -> tuple[int, int]:
        if self.failing_after is not None:
            self.failing_after -= 1
            if self.failing_after < 0:
                raise ConnectionError("the broker is gone")
        partition = self.partition_of(key.decode())
        offset = self._ends[topic, partition] = self._ends.get((topic, partition), -1) + 1
        task = asyncio.create_task(self._later(topic, partition, offset, key, value))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return partition, offset

    def certificate(self, name: str) -> Certificate | None:
        return self.certificates.get(name)

    async def waits(self, topic: str, partition: int, offset: int) -> bool:
        if self.failing_after == 0:
            raise ConnectionError("the broker is gone")
        return self.applied(partition)[topic] < offset <= self._ends.get((topic, partition), -1)

    def digest(self) -> answers.Digests:
        found = []
        for partition in range(self.partitions):
            own = sorted((u, row) for u, row in self._rows.items() if self.partition_of(u.decode()) == partition)
            applied = self.applied(partition)
            found.append(answers.PartitionDigest("users", partition, applied, digest(own, applied)))
        return answers.Digests(URL, [URL], self.encoder, found)

    def model_info(self) -> answers.ModelView:
        replica, applied = self._replica, {"examples": self._examples_end - 1}
        learner = answers.LearnerView(applied, replica.positives, len(replica), self._examples_end)
        return answers.ModelView(
            "0.1.0", self.model_version, answers.EncoderView(self.encoder, TEXT_DIM, self.adapter, self.checkpoints),
            None if self.learns_at else learner, self._config.__dict__,
            answers.ReplicaView(len(replica), replica.active_count, replica.positives, applied),
            sum(end + 1 for end in self._ends.values()), len(replica), replica.positives,
            msgspec.convert({} if self.learns_at else self._live.report(), answers.Prequential),
        )  # fmt: skip

    def shown(self, told: answers.Recommendations, trial: Trial, champion: Adapter | None) -> None:
        self.exposed.append((told, trial))

    def ready(self) -> list[str]:
        return self.waits_for

    async def subscribe(self) -> AsyncIterator[dict[str, Any]]:
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue(100)
        self.listeners.append(queue)
        try:
            yield self.status()
            while True:
                yield await queue.get()
        finally:
            self.listeners.remove(queue)

    # -- the stream behind it

    def tell_learner(self, message: bytes) -> None:
        """A message of the examples log that is of no event."""
        self._learn([message])

    def status(self) -> dict[str, Any]:
        ratios = np.mean(self.hits or [(False, False, False)], axis=0).tolist()
        return {
            "type": "status", "events_per_s": self.rate, "lag_records": 0, "lag_s": self.lag_s,
            "positives": self._replica.positives, "items": self._replica.active_count,
            "hit_ratio": dict(zip(("model", "popularity", "item_knn"), ratios, strict=True)),
        }  # fmt: skip

    def add_items(self, items: list[Item]) -> None:
        """Items enter the catalogue."""
        batch = pipeline.learn_catalogue(0, [(n, i, encode(i.text)) for n, i in enumerate(items)], TEXT_DIM)
        self._learn(batch.messages)

    def apply(self, topic: str, partition: int, offset: int, key: bytes, value: bytes) -> None:
        """One record of clicks or comments is consumed."""
        stamp_ms = round(1e3 * self.clock_s)
        decoded: Any = codec.decode_batch(
            topic,  # type: ignore[call-overload]
            [record(topic, value, key, offset=offset, partition=partition, timestamp_ms=stamp_ms)],
        )
        for event in decoded.events:
            if isinstance(event, Comment):
                self.written[partition, offset] = event.text
            vector = encode(event.text) if isinstance(event, Comment) else None
            done = pipeline.learn_users(
                partition, [SourceEvent(TOPIC_CODES[topic], offset, event, vector)],
                lambda keys: [self._rows.get(key) for key in keys], EVIDENCE,
            )  # fmt: skip
            for user, row in done.rows.items():
                if row is None:
                    del self._rows[user]
                else:
                    self._rows[user] = row
            self._learn(done.messages)
            if not isinstance(event, Erasure):
                self.tell(serving.stream_event(event, event.ts))
            for erased in done.erased:
                name = erasure_id(partition, erased.offset)
                held = StateErased(erased.events, erased.behaviours, erased.seen, erased.comments, {})
                self.certificates[name] = Certificate(name, "complete", erased.unlearn, stamp_ms / 1e3, state=held)
        self._applied[topic, partition] = offset
        self.tell(self.status())

    def click(self, user_id: str, item_id: str, action: str = "click") -> None:
        """One click is published and applied."""
        self.take(Click(user_id, item_id, action))

    def take(self, event: Click | Comment) -> None:
        """One event is published and applied."""
        topic = "clicks" if isinstance(event, Click) else "comments"
        partition = self.partition_of(event.user_id)
        offset = self._ends[topic, partition] = self._ends.get((topic, partition), -1) + 1
        self.apply(topic, partition, offset, event.user_id.encode(), msgspec.json.encode(event))

    def tell(self, message: dict[str, Any]) -> None:
        """A message to every listener."""
        for queue in self.listeners:
            if not queue.full():
                queue.put_nowait(message)

    async def _later(self, topic: str, partition: int, offset: int, key: bytes, value: bytes) -> None:
        await asyncio.sleep(self.delay_s)
        self.apply(topic, partition, offset, key, value)

    def _learn(self, messages: list[bytes]) -> None:
        for message in messages:
            outcome = self._learner.learn(self._examples_end, message).outcome
            if outcome is not None:
                self._live.observe(outcome)
                ranked = ~np.isnan(outcome.rank)
                ranks = (outcome.rank[ranked], outcome.pop_rank[ranked, -1], outcome.knn_rank[ranked])
                self.hits.extend(zip(*((rank <= LIST).tolist() for rank in ranks), strict=True))
            self._examples_end += 1
        changed = self._learner.take_dirty()
        self._replica.apply((k, v) for k, v in changed.items() if k[:1] not in pipeline.OWN_HEADS)


def title(genre: str, number: int) -> str:
    """Of an invented film.

    >>> title("space", 0)
    'The Quiet Orbit'
    """
    return f"The {MOODS[number]} {GENRES[genre]}"


def small_world(users: int = 12) -> World:
    """Twelve films of each of four genres, and users who each like one genre."""
    world = World()
    films = [(genre, n) for genre in GENRES for n in range(len(MOODS))]
    world.add_items([Item(f"{genre}-{n}", f"{title(genre, n)}. {genre.title()}") for genre, n in films])
    for number in range(users):
        genre = list(GENRES)[number % len(GENRES)]
        user = f"{genre}-fan-{number}"
        for step in range(5):
            world.clock_s += 60
            world.click(user, f"{genre}-{(number + 2 * step) % len(MOODS)}")
    world.clock_s += 60
    return world


def is_sorted(values: list[float]) -> bool:
    """Whether the values never rise."""
    return all(a >= b for a, b in pairwise(values))
