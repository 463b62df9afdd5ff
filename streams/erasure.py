"""Erasures on their way: what was removed where, step by step, and the certificate at the end.

An erasure is known by the place of its record, "erasures:PARTITION:OFFSET", and so is all that is told of it: no
certificate names its user. They are kept in the compacted topic `{app}-certificates` (one JSON object a record), which
every worker follows: any worker answers for any erasure, and the next owner of a partition goes on where the last one
was.

    ID         by the owner of the user's partition, written before the row is deleted and after each step
    ID/model   by the learner, where the erasure asks for it
"""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import Final, Protocol

import msgspec
import numpy as np
import structlog

from state import rows
from state.changelog import LogRecord
from state.partition import Partition, digest
from state.sealing import Sealer
from streams import codec, examples, kafka
from streams.answers import Certificate, ChangelogErased, LogRemains, ModelUnlearnt, StateErased, StoreErased
from streams.audit import audit_key, pseudonym
from streams.events import Erasure
from streams.pipeline import Erased
from streams.settings import Settings

log = structlog.get_logger(__name__)

SWEEP_ROWS: Final = 500  # re-published at once, so that the changelog's head can go
TRIES_MAX: Final = 3  # of a changelog that still names a user who has no row
RETRY_S: Final = 5.0
CERTIFICATES_MAX: Final = 100_000  # kept in memory, newest; older ones stay in the topic
MODEL: Final = "/model"
CHANGELOG: Final = "users-changelog"
EXPOSURES: Final = "exposures"  # lists shown in trials, by pseudonym
ID: Final = re.compile(r"erasures:([0-9]{1,9}):([0-9]{1,16})")


def erasure_id(partition: int, offset: int) -> str:
    """The name of the erasure whose record is there.

    >>> place_of(erasure_id(3, 17))
    (3, 17)
    """
    return f"erasures:{partition}:{offset}"


def place_of(name: str) -> tuple[int, int] | None:
    """(partition, offset) of an erasure's record; None: it is not the name of one."""
    found = ID.fullmatch(name)
    return (int(found[1]), int(found[2])) if found else None


class Book:
    """All certificates, as of the topic's newest record and of what this worker has written itself."""

    def __init__(self, publish: Callable[[bytes, bytes], Awaitable[object]]) -> None:
        self.caught_up = asyncio.Event()
        self._publish = publish
        self._certificates: dict[str, Certificate] = {}
        self._models: dict[str, ModelUnlearnt] = {}
        self._running: dict[int, dict[int, str]] = {}  # partition -> {offset: name} of those that are not complete
        self._newest: dict[int, int] = {}

    def take(self, key: bytes, value: bytes | None) -> None:
        """A record of the topic."""
        name = key.decode()
        if value is None:
            return
        if name.endswith(MODEL):
            self._models[name.removesuffix(MODEL)] = msgspec.json.decode(value, type=ModelUnlearnt)
        else:
            self._put(msgspec.json.decode(value, type=Certificate))

    def _put(self, certificate: Certificate) -> None:
        name = certificate.erasure_id
        place = place_of(name)
        assert place is not None, name
        known = self._certificates.pop(name, None)
        if known is not None and known.is_complete and not certificate.is_complete:
            certificate = known  # a late record of a former owner
        self._certificates[name] = certificate
        self._newest[place[0]] = max(place[1], self.newest(place[0]))
        running = self._running.setdefault(place[0], {})
        if certificate.is_complete:
            running.pop(place[1], None)
        else:
            running[place[1]] = name
        while len(self._certificates) > CERTIFICATES_MAX:
            oldest = next(iter(self._certificates))
            del self._certificates[oldest]
            self._models.pop(oldest, None)

    async def write(self, certificate: Certificate) -> None:
        """Publishes what is known now; returns when it is acknowledged."""
        await self._publish(certificate.erasure_id.encode(), msgspec.json.encode(certificate))
        self._put(certificate)

    async def write_model(self, name: str, model: ModelUnlearnt) -> None:
        """The learner's part of an erasure."""
        await self._publish((name + MODEL).encode(), msgspec.json.encode(model))
        self._models[name] = model

    def get(self, name: str) -> Certificate | None:
        """The erasure as it stands, with the learner's part; None: nothing is known of it."""
        found = self._certificates.get(name)
        if found is None:
            return None
        model = self._models.get(name)
        gone = {topic: begin for topic, begin in (found.unlearn_from or {}).items() if begin > 0}
        if model is not None and model.done and gone:
            reason = f"the logs begin at {gone}: which examples came from events before that is not known any more"
            reason = reason if model.reason is None else f"{model.reason}; and {reason}"
            model = msgspec.structs.replace(model, exact=False, reason=reason)
        return msgspec.structs.replace(found, model=model)

    def running(self, partition: int) -> list[Certificate]:
        """Erasures of a partition that are not complete, oldest first."""
        names = [name for _, name in sorted(self._running.get(partition, {}).items())]
        return [found for name in names if (found := self.get(name)) is not None]

    def newest(self, partition: int) -> int:
        """The highest offset of `erasures` that somebody has told of, -1 for none."""
        return self._newest.get(partition, -1)


class Place(msgspec.Struct, frozen=True):
    """A record that names a user; `at`: its timestamp, Unix s."""

    offset: int
    at: float


class Reach(Protocol):
    """The logs, as an erasure needs them; topics by their names in the code."""

    def now(self) -> float: ...

    async def erasure_at(self, partition: int, offset: int) -> Erasure | None:
        """The erasure whose record is there; None: retention has taken it."""

    async def places(self, topic: str, partition: int, users: Collection[str]) -> dict[str, list[Place]]:
        """Where each of the users is named by a record's key, of exposures by their pseudonym; reads the whole log."""

    async def begin(self, topic: str, partition: int) -> int:
        """Where the log begins."""

    async def delete_head(self, partition: int, before: int) -> str | None:
        """Deletes the records of the users' changelog before this offset; why not, where the broker refuses."""

    async def publish_examples(self, records: list[tuple[bytes, bytes]]) -> int:
        """Appends to the examples log; the offset of the last one."""

    async def examples_begin(self) -> int:
        """Where the examples log begins."""

    def examples(self, stop: int) -> AsyncIterator[list[LogRecord]]:
        """The examples log from its beginning to the offset `stop`."""

    def gone_at(self, topic: str, newest: float) -> float:
        """When retention takes a record of this time, Unix s."""


class Eraser:
    """Takes the erasures of one partition to their certificates, those that run at the same time together.

    `working`: held by whoever uses the partition; `stopped`: whether it is about to be given away.
    """

    def __init__(
        self, number: int, partition: Partition, book: Book, reach: Reach, working: asyncio.Lock,
        stopped: Callable[[], bool],
    ) -> None:  # fmt: skip
        self.number = number
        self.partition = partition
        self.book = book
        self.reach = reach
        self._working = working
        self._stopped = stopped
        self._task: asyncio.Task[None] | None = None
        self._purging: asyncio.Future[None] | None = None
        self._again_at = float("-inf")

    async def announce(self, erased: Erased, requested_at: float, place: dict[str, int]) -> None:
        """An erasure is about to be applied: it is known before the row is gone, and what is owed is never lost."""
        held = StateErased(erased.events, erased.behaviours, erased.seen, erased.comments, place)
        name = erasure_id(self.number, erased.offset)
        await self.book.write(Certificate(name, "running", erased.unlearn, requested_at, state=held))

    def pursue(self) -> None:
        """Goes on with what is owed, if anything is, in a task of its own."""
        if self._task is not None and not self._task.done():
            return
        if self.reach.now() >= self._again_at and (self._owed() or self._is_named()):
            self._task = asyncio.get_running_loop().create_task(self._run(), name=f"erasures-{self.number}")

    def _is_named(self) -> bool:
        """Whether disk or changelog name users without a row: after restores, owners that ended, late records."""
        return self.partition.owes_purge() or self.partition.names_deleted

    async def close(self) -> None:
        """Ends the task, between two uses of the partition; what it owes is the next owner's."""
        async with self._working:
            if self._task is not None:
                self._task.cancel()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
        if self._purging is not None:
            await asyncio.gather(self._purging, return_exceptions=True)  # a thread is never cut off

    def _owed(self) -> list[Certificate]:
        """Erasures that are applied and have a step to make now; those that wait for the learner have none."""
        applied = self.partition.applied.get("erasures", -1)
        return [
            c
            for c in self.book.running(self.number)
            if (place_of(c.erasure_id) or (0, applied))[1] <= applied and not self._waits(c)
        ]

    @staticmethod
    def _waits(c: Certificate) -> bool:
        return c.unlearn_at is not None and not (c.model is not None and c.model.done)

    async def _run(self) -> None:
        await self.book.caught_up.wait()
        try:
            while not self._stopped():
                if owed := self._owed():
                    await self._advance(owed)
                elif self.partition.owes_purge():
                    await self._purge()
                elif self.partition.names_deleted:
                    await self._renew_changelog()
                else:
                    return
        except _StoppedError:
            return
        except Exception as failure:  # of a broker or the disk: nothing is lost by another try
            self._again_at = self.reach.now() + RETRY_S
            log.warning("erasures are not finished; they are tried again", partition=self.number, failure=repr(failure))

    async def _advance(self, owed: list[Certificate]) -> None:
        users: dict[str, str] = {}
        for certificate in owed:
            place = place_of(certificate.erasure_id)
            assert place is not None
            erasure = await self.reach.erasure_at(*place)
            if erasure is None:  # after weeks: retention has taken what the logs held, too
                await self._complete(certificate)
            else:
                users[certificate.erasure_id] = erasure.user_id
        owed = [c for c in owed if c.erasure_id in users]
        await self._purge_store([c for c in owed if c.store is None])
        await self._purge_changelog([c for c in owed if c.changelog is None], users)
        await self._look_for_remains([c for c in owed if c.remains is None], users)
        for certificate in owed:
            if not self._waits(certificate):
                await self._complete(certificate)

    async def _complete(self, certificate: Certificate) -> None:
        certificate.status, certificate.completed_at = "complete", self.reach.now()
        await self.book.write(certificate)
        log.info("erasure complete", erasure=certificate.erasure_id)

    async def _using(self, use: Callable[[], Awaitable[object]]) -> None:
        async with self._working:
            if self._stopped():
                raise _StoppedError
            await use()

    async def _purge_store(self, certificates: list[Certificate]) -> None:
        if not certificates:
            return
        await self._purge()
        applied, kept = self.partition.snapshot()
        told = await asyncio.to_thread(digest, kept, applied)
        for certificate in certificates:
            assert certificate.state is not None
            certificate.state.applied, certificate.state.digest = applied, told
            certificate.store = StoreErased(self.reach.now())
            await self.book.write(certificate)

    async def _purge(self) -> None:
        await self._using(self.partition.drain)
        self._purging = asyncio.ensure_future(asyncio.to_thread(self.partition.purge))
        await asyncio.shield(self._purging)

    async def _purge_changelog(self, certificates: list[Certificate], users: dict[str, str]) -> None:
        keys = [users[c.erasure_id].encode() for c in certificates]
        stored = {key: self.partition.stored_key(key) for key in keys}
        left: dict[bytes, int] = {}
        before, kept = 0, None
        for _ in range(TRIES_MAX if certificates else 0):
            before, kept = await self._renew_changelog()
            left = await self.partition.named(stored.values())
            present = zip(keys, self.partition.get_many(keys), strict=True)
            if kept or all(row is not None or not left[stored[key]] for key, row in present):
                break
        for certificate in certificates:
            naming = left[stored[users[certificate.erasure_id].encode()]]
            certificate.changelog = ChangelogErased(CHANGELOG, self.number, 0 if kept else before, naming, kept)
            await self.book.write(certificate)

    async def _renew_changelog(self) -> tuple[int, str | None]:
        """Every row is written again under another epoch; then all before goes, the deletions' own records too: (up to
        where, or why not).
        """
        await self._using(self.partition.renew)
        while not self.partition.is_swept:
            await self._using(lambda: self.partition.sweep(SWEEP_ROWS))
        await self._using(self.partition.drain)
        before = self.partition.truncatable_to or 0
        kept = await self.reach.delete_head(self.number, before)
        await self._using(self.partition.head_deleted)
        return before, kept

    async def _look_for_remains(self, certificates: list[Certificate], users: dict[str, str]) -> None:
        """What the source logs and dead letters still hold; and, where it is asked for, the learner is told."""
        if not certificates:
            return
        wanted = {users[c.erasure_id] for c in certificates}
        found: dict[tuple[str, int], dict[str, list[Place]]] = {}
        for topic in examples.USER_SOURCES.values():
            found[topic, self.number] = await self.reach.places(topic, self.number, wanted)
            found[f"{topic}.dlq", 0] = await self.reach.places(f"{topic}.dlq", 0, wanted)
        found[EXPOSURES, 0] = await self.reach.places(EXPOSURES, 0, wanted)
        asked: list[bytes] = []
        for certificate in certificates:
            user = users[certificate.erasure_id]
            certificate.remains = [
                LogRemains(topic, p, len(at), at[0].offset, at[-1].offset,
                           self.reach.gone_at(topic, max(place.at for place in at)))
                for (topic, p), places in found.items()
                if (at := places[user])
            ]  # fmt: skip
            if certificate.unlearn:
                asked += self._removal(certificate, {t: found[t, self.number][user] for t in ("clicks", "comments")})
        if asked:
            records = [(b"%d" % self.number, message) for message in examples.chained(asked)]
            unlearn_at = await self.reach.publish_examples(records)
            begin = {topic: await self.reach.begin(topic, self.number) for topic in ("clicks", "comments")}
            for certificate in certificates:
                if certificate.unlearn:
                    certificate.unlearn_at, certificate.unlearn_from = unlearn_at, begin
        for certificate in certificates:
            await self.book.write(certificate)

    def _removal(self, certificate: Certificate, places: dict[str, list[Place]]) -> list[bytes]:
        """The messages that name the user's events up to the erasure."""
        place, state = place_of(certificate.erasure_id), certificate.state
        assert place is not None and state is not None
        positions = [
            rows.position(examples.TOPICS.index(topic), p.offset)
            for topic, of_topic in places.items()
            for p in of_topic
            if p.offset <= state.place.get(topic, -1)
        ]
        return examples.pack_removals(self.number, place[1], np.array(positions, np.int64))


class _StoppedError(Exception):
    """The partition is about to be given away."""


class KafkaReach:
    """`Reach` on the topics of these settings."""

    def __init__(
        self, settings: Settings, producer: kafka.Producer, sealer: Sealer | None, now: Callable[[], float]
    ) -> None:  # fmt: skip
        self.now = now
        self._sealer = sealer
        self._settings = settings
        self._options = settings.kafka_options()
        self._producer = producer
        self._examples = settings.internal_topic("examples")

    async def erasure_at(self, partition: int, offset: int) -> Erasure | None:
        """`Reach.erasure_at`."""
        record = await kafka.record_at(self._options, self._settings.topic("erasures"), partition, offset)
        decoded = codec.decode_batch("erasures", [record] if record is not None else [])
        return decoded.events[0] if decoded.events else None

    async def places(self, topic: str, partition: int, users: Collection[str]) -> dict[str, list[Place]]:
        """`Reach.places`."""
        found: dict[str, list[Place]] = {user: [] for user in users}
        of_key = {self._key_of(topic, user): found[user] for user in users}
        internal = topic == EXPOSURES
        name = self._settings.internal_topic(topic) if internal else self._settings.topic(topic)
        async for offset, key, timestamp in kafka.keys(self._options, name, partition):
            places = of_key.get(key)
            if places is not None:
                places.append(Place(offset, timestamp / 1e3))
        return found

    def _key_of(self, topic: str, user: str) -> bytes:
        return pseudonym(user, audit_key(self._sealer)).encode() if topic == EXPOSURES else user.encode()

    async def begin(self, topic: str, partition: int) -> int:
        """`Reach.begin`."""
        return await kafka.log_start(self._options, self._settings.topic(topic), partition)

    async def delete_head(self, partition: int, before: int) -> str | None:
        """`Reach.delete_head`."""
        return await kafka.delete_before(self._options, self._settings.internal_topic(CHANGELOG), partition, before)

    async def publish_examples(self, records: list[tuple[bytes, bytes]]) -> int:
        """`Reach.publish_examples`."""
        if self._sealer is not None:
            records = [(key, self._sealer.seal_message(message)) for key, message in records]
        return await self._producer.send(self._examples, 0, records)

    async def examples_begin(self) -> int:
        """`Reach.examples_begin`."""
        return await kafka.log_start(self._options, self._examples, 0)

    async def examples(self, stop: int) -> AsyncIterator[list[LogRecord]]:
        """`Reach.examples`."""
        async for batch in kafka.read_log(self._options, self._examples, 0, 0, stop):
            sealer = self._sealer
            if sealer is not None:
                batch = [r._replace(value=sealer.open_message(r.value)) if r.value else r for r in batch]
            yield batch

    def gone_at(self, topic: str, newest: float) -> float:
        """`Reach.gone_at`."""
        return newest + 3600 * self._settings.retention_hours
