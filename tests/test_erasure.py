"""The owner's part of an erasure, killed at every step: what it owes is done in the end, by whoever is the owner."""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec
import pytest

from bench.doubles import MemoryDisk, MemoryLog
from bench.drain import PlainSource, PlainVectors
from state.changelog import LogRecord, row_records
from state.partition import Fenced, Partition, PartitionFailedError
from state.sealing import SealedPartition, Sealer
from state.store import Meta
from streams import examples
from streams.answers import Certificate, ModelUnlearnt
from streams.erasure import Book, Eraser, Place, place_of
from streams.events import Erasure
from streams.pipeline import Erased
from streams.settings import Settings
from streams.worker import Worker

SOURCES = ("clicks", "comments", "erasures")
USER = "u"
NAME = "erasures:0:0"
STEPS_MAX = 200


class KilledError(BaseException):
    """The process ends here."""


@dataclass
class World:
    """What outlives a process. `steps_left`: of the process, until it is killed."""

    log: MemoryLog = field(default_factory=MemoryLog)
    disk: MemoryDisk = field(default_factory=MemoryDisk)
    topic: list[tuple[bytes, bytes]] = field(default_factory=list)  # the certificates
    out: list[bytes] = field(default_factory=list)  # the examples log
    deletes: bool = True  # whether the broker deletes records
    steps_left: int = STEPS_MAX
    clock_s: float = 1000.0
    last_step: str = ""
    clicks_begin: int = 0
    is_sealed: bool = False

    def step(self, name: str) -> None:
        self.steps_left -= 1
        if self.steps_left == 0:
            self.last_step = name
        if self.steps_left <= 0:
            raise KilledError(name)

    def now(self) -> float:
        self.clock_s += 1
        return self.clock_s

    async def certify(self, key: bytes, value: bytes) -> None:
        self.step("before the certificate")
        self.topic.append((key, value))
        self.step("after the certificate")

    async def erasure_at(self, partition: int, offset: int) -> Erasure | None:
        self.step("erasure_at")
        return Erasure(USER, 1.0, True) if (partition, offset) == (0, 0) else None

    async def places(self, topic: str, partition: int, users: Collection[str]) -> dict[str, list[Place]]:
        self.step("places")
        return {user: [Place(0, 1.0), Place(2, 5.0)] if topic == "clicks" else [] for user in users}

    async def delete_head(self, partition: int, before: int) -> str | None:
        self.step("delete_head")
        if not self.deletes:
            return "the broker deletes no records"
        self.log.delete_before(before)
        return None

    async def publish_examples(self, records: list[tuple[bytes, bytes]]) -> int:
        self.step("publish_examples")
        self.out += [message for _, message in records]
        return len(self.out) - 1

    async def begin(self, topic: str, partition: int) -> int:
        return self.clicks_begin if topic == "clicks" else 0

    async def examples_begin(self) -> int:
        return 0

    async def examples(self, stop: int) -> AsyncIterator[list[LogRecord]]:
        yield []

    def gone_at(self, topic: str, newest: float) -> float:
        return newest + 100

    def partition(self, folder: str) -> Partition:
        async def publish(records: list[tuple[bytes, bytes]]) -> None:
            self.step("publish")

        make: Callable[..., Partition] = partial(SealedPartition, Sealer([b"k" * 32])) if self.is_sealed else Partition
        return make(
            path=Path("/memory") / folder, changelog=self.log, publish=publish, sources=SOURCES, disk=self.disk,
            crash=self.step, purges=True,
        )  # fmt: skip


async def live(world: World, folder: str) -> Certificate | None:
    """One process: open, fold what is not applied yet, erase, until nothing is owed."""
    book = Book(world.certify)
    for key, value in world.topic:
        book.take(key, value)
    book.caught_up.set()
    working = asyncio.Lock()
    partition = world.partition(folder)
    await partition.open()
    eraser = Eraser(0, partition, book, world, working, lambda: False)
    try:
        async with working:
            if partition.applied["clicks"] < 3:
                await partition.flush({USER.encode(): b"row", b"other": b"row"}, [], {"clicks": 3})
                await partition.drain()
            if partition.applied["erasures"] < 0:
                place = {"clicks": 3, "comments": -1, "erasures": 0}
                await eraser.announce(Erased(0, USER, True, 2, 2, 0, 0), 999.0, place)
                await partition.flush({USER.encode(): None}, [], {"erasures": 0})
        await pursued(eraser)
        if world.out:  # the learner's answer
            await book.write_model(NAME, ModelUnlearnt(True, len(world.out) - 1, 2, digest="d"))
        await pursued(eraser)
    finally:
        await eraser.close()
        await asyncio.gather(*partition._tasks, return_exceptions=True)
        await partition.close()
    return book.get(NAME)


async def pursued(eraser: Eraser) -> None:
    eraser.pursue()
    if eraser._task is not None:
        await eraser._task


@pytest.mark.parametrize(
    ("moves", "is_sealed"), [(False, False), (True, False), (True, True)], ids=["same disk", "another worker", "sealed"]
)
async def test_an_erasure_killed_at_any_step_is_completed(moves: bool, is_sealed: bool) -> None:
    killed_at = set()
    for steps in range(1, STEPS_MAX):
        world = World(steps_left=steps, is_sealed=is_sealed)
        with suppress(KilledError, PartitionFailedError):  # the latter where the kill hit a task of the partition
            await live(world, "first")
        if world.steps_left > 0:
            break
        killed_at.add(world.last_step)
        world.steps_left = STEPS_MAX
        told = await live(world, "second" if moves else "first")
        assert told is not None and told.is_complete, steps
        assert told.changelog is not None and told.state is not None
        assert told.changelog.naming == 0 and told.changelog.kept is None
        restored = world.partition("elsewhere")
        name = restored.stored_key(USER.encode())
        assert any(name == record.key[9:] for record in world.log.everything)
        assert not any(name == record.key[9:] for record in world.log.records)
        assert (told.state.events, told.state.place["clicks"]) == (2, 3)
        assert told.remains is not None and [(r.topic, r.records) for r in told.remains] == [("clicks", 2)]
        removal = examples.unpack_removal(world.out[-1])
        assert (removal.positions.tolist(), removal.more) == ([0, 2], False)
        await restored.open()
        assert dict(restored.items()) == {restored.stored_key(b"other"): b"row"}
        assert restored.digest() == told.state.digest
        await restored.close()
    else:
        pytest.fail("never came to the end")
    assert {"erasure_at", "delete_head", "places", "publish_examples", "announce", "adopt", "commit"} <= killed_at


async def test_a_broker_that_deletes_no_records_is_told_of_in_the_certificate() -> None:
    world = World(deletes=False)
    told = await live(world, "first")
    assert told is not None and told.is_complete and told.changelog is not None
    assert (told.changelog.kept, told.changelog.deleted_before) == ("the broker deletes no records", 0)
    assert told.changelog.naming == 2  # the row and its deletion


async def test_unlearning_is_not_called_exact_where_the_users_first_events_are_gone() -> None:
    told = await live(World(), "first")
    assert told is not None and told.model is not None and told.model.exact
    told = await live(World(clicks_begin=1), "first")
    assert told is not None and told.is_complete and told.model is not None
    assert not told.model.exact and "clicks" in (told.model.reason or "")


async def test_a_certificate_tells_every_reason_why_unlearning_is_not_exact() -> None:
    world = World(clicks_begin=1)
    await live(world, "first")
    book = Book(world.certify)
    for key, value in world.topic:
        book.take(key, value)
    await book.write_model(NAME, ModelUnlearnt(False, 3, 2, reason="the adapter is not trained again"))
    told = book.get(NAME)
    assert told is not None and told.model is not None and told.model.reason is not None
    assert told.model.reason.startswith("the adapter is not trained again; and the logs begin at {'clicks': 1}")
    await book.write_model(NAME, ModelUnlearnt(False, 3, done=False, progress=0.5))
    told = book.get(NAME)
    assert told is not None and told.model is not None and told.model.reason is None, "nothing is decided yet"


async def test_a_fenced_owner_leaves_the_rest_to_the_next() -> None:
    world = World()
    book = Book(world.certify)
    book.caught_up.set()
    partition = world.partition("first")
    await partition.open()
    await partition.flush({USER.encode(): b"row"}, [], {"clicks": 3})
    eraser = Eraser(0, partition, book, world, asyncio.Lock(), lambda: False)
    await eraser.announce(Erased(0, USER, False, 2, 2, 0, 0), 999.0, {"clicks": 3, "comments": -1, "erasures": 0})
    await partition.flush({USER.encode(): None}, [], {"erasures": 0})
    await partition.drain()
    owner = world.partition("second")
    await owner.open()
    await pursued(eraser)
    with pytest.raises(Fenced):
        await partition.drain()
    await eraser.close()
    await partition.close()
    await owner.close()
    told = await live(world, "second")
    assert told is not None and told.changelog is not None and told.changelog.naming == 0


async def test_what_a_disk_owes_is_taken_off_it_whoever_has_completed_the_erasure() -> None:
    world = World(deletes=False)  # else the disk is discarded for what it has not read of the changelog
    killed = world.partition("first")
    await killed.open()
    await killed.flush({USER.encode(): b"row"}, [], {"clicks": 3})
    book = Book(world.certify)
    book.caught_up.set()
    eraser = Eraser(0, killed, book, world, asyncio.Lock(), lambda: False)
    await eraser.announce(Erased(0, USER, True, 2, 2, 0, 0), 999.0, {"clicks": 3, "comments": -1, "erasures": 0})
    await killed.flush({USER.encode(): None}, [], {"erasures": 0})
    await killed.close()
    told = await live(world, "second")
    assert told is not None and told.is_complete
    back = world.partition("first")
    await back.open()
    assert back.owes_purge()
    eraser = Eraser(0, back, book, world, asyncio.Lock(), lambda: False)
    for key, value in world.topic:
        book.take(key, value)
    await pursued(eraser)
    assert not back.owes_purge() and not back.names_deleted
    content = world.disk.contents[back.path][-1]
    assert USER.encode() not in content.deleted | content.rows.keys()
    await eraser.close()
    await back.close()


@pytest.mark.parametrize("is_killed", [False, True])
async def test_late_rows_of_a_former_owner_leave_the_changelog_too(is_killed: bool) -> None:
    """What it had on its way lands after the certificate: the owner overrides it, and the head goes once more."""
    world = World()
    told = await live(world, "first")
    assert told is not None and told.changelog is not None and told.changelog.naming == 0
    rows: list[tuple[bytes, bytes | None]] = [*row_records(1, 1, [(USER.encode(), b"row")])]
    world.log.land(rows)
    owner = world.partition("second")
    await owner.open()
    assert owner.names_deleted
    if is_killed:
        await owner.close()
        owner = world.partition("second")
        await owner.open()
    book = Book(world.certify)
    book.caught_up.set()
    eraser = Eraser(0, owner, book, world, asyncio.Lock(), lambda: False)
    await pursued(eraser)
    assert not owner.names_deleted
    assert await owner.named([USER.encode()]) == {USER.encode(): 0}
    await eraser.close()
    await owner.close()
    owner = world.partition("second")
    await owner.open()
    assert not owner.names_deleted
    assert dict(owner.items()) == {b"other": b"row"}
    await owner.close()


def test_a_late_record_of_a_former_owner_does_not_undo_a_certificate() -> None:
    book = Book(World().certify)
    book.take(NAME.encode(), msgspec.json.encode(Certificate(NAME, "complete", completed_at=2.0)))
    book.take(NAME.encode(), msgspec.json.encode(Certificate(NAME, "running")))
    found = book.get(NAME)
    assert found is not None and found.completed_at == 2.0
    assert book.running(0) == []
    assert (book.newest(0), book.newest(1)) == (0, -1)


@pytest.mark.parametrize("name", ["", "erasures:1", "clicks:1:2", "erasures:1:2:3", "erasures:-1:2", "erasures:1:x"])
def test_what_is_not_the_place_of_an_erasure_names_none(name: str) -> None:
    assert place_of(name) is None


async def test_the_folder_of_a_partition_that_others_have_goes_where_users_were_erased_since(
    make_settings: Callable[..., Settings],
) -> None:
    settings = make_settings(broker="127.0.0.1:1")
    worker = Worker(settings, lambda: 0.0, PlainVectors(), PlainSource(settings), lambda topic, partition: None)
    for number, applied, owed in ((0, 4, []), (1, 2, []), (2, 2, []), (3, 4, [b"v"])):
        store = worker.disk.open(settings.state_dir / f"users-{number}")
        store.write({b"u": b"row"}, Meta({"erasures": applied}, 1, b"i" * 16, 0, {}, 0), owed=owed)
        store.close()
    (settings.state_dir / "users-of-yesterday").mkdir()
    for number in (0, 1, 3):
        name = f"erasures:{number}:3"
        worker.book.take(name.encode(), msgspec.json.encode(Certificate(name, "complete")))
    worker.book.caught_up.set()
    await worker.wipe_left_folders()  # nobody has said yet what is whose
    assert len(list(settings.state_dir.glob("users-*"))) == 5
    worker.assigned(set())
    await worker.wipe_left_folders()
    assert sorted(path.name for path in settings.state_dir.glob("users-*")) == [
        "users-0",
        "users-2",
        "users-of-yesterday",
    ]
    worker.encoding.close()
