"""Whose vectors a deployment has: the first claim in its log, and the moves from there on."""

from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import msgspec
import pytest

from bench.doubles import MemoryLog
from streams import codec, rebuild, space
from streams.codec import MARK
from streams.space import Encoders, OtherSpaceError, Space, Spaces, Starts
from tests.records import record

OURS = Space("minilm:0123", 384)
THEIRS = Space("bge:4567", 384)


async def test_the_first_claim_holds_for_all_that_come_later() -> None:
    log = MemoryLog()
    assert (await space.read(log)).current is None
    await space.claim(log, OURS, "app")
    await space.claim(log, OURS, "app")
    with pytest.raises(OtherSpaceError, match="of app id app are of the encoder minilm:0123, and this one is bge:4567"):
        await space.claim(log, THEIRS, "app")
    assert (await space.read(log)).current == OURS
    assert len([record async for batch in log.read(0, None) for record in batch]) == 1


class RacingLog(MemoryLog):
    """Another worker's claim lands just before ours."""

    def __init__(self, theirs: Space) -> None:
        super().__init__()
        self.theirs: Space | None = theirs

    async def append(self, records: Sequence[tuple[bytes, bytes | None]]) -> int:
        theirs, self.theirs = self.theirs, None
        if theirs is not None:
            await space.claim(self, theirs, "app")
        return await super().append(records)


async def test_of_two_that_claim_at_once_the_first_in_the_log_has_it() -> None:
    log = RacingLog(THEIRS)
    with pytest.raises(OtherSpaceError):
        await space.claim(log, OURS, "app")
    assert (await space.read(log)).current == THEIRS
    log = RacingLog(OURS)
    await space.claim(log, OURS, "app")
    assert (await space.read(log)).current == OURS


async def test_an_encoder_is_announced_then_in_use_or_given_up() -> None:
    log = MemoryLog()
    await space.claim(log, OURS, "app")
    second, third = (
        Space("bge:1", 384, 1, "/m/bge", state="announced"),
        Space("e5:2", 384, 1, "/m/e5", state="announced"),
    )
    for told in (second, third):  # of two for one number the first stands
        await space.tell(log, told)
    spaces = await space.read(log)
    assert (spaces.current, spaces.next, spaces.named("e5:2")) == (OURS, second, None)
    await space.tell(log, Space("bge:1", 384, 1, "/m/bge", state="given up"))
    await space.tell(log, Space("bge:1", 384, 1, "/m/bge", state="in use"))  # too late
    await space.tell(log, Space("e5:2", 384, 2, "/m/e5", state="announced"))
    await space.tell(log, Space("e5:2", 384, 2, "/m/e5", state="in use"))
    spaces = await space.read(log)
    assert spaces.current == Space("e5:2", 384, 2, "/m/e5", state="in use") and spaces.next is None
    assert spaces.named("bge:1") is None
    for mine in (OURS, spaces.current):  # a worker may start with either
        assert (await space.claim(log, mine, "app")).current == spaces.current


async def test_what_an_encoder_was_trained_on_is_told_by_itself_or_not_known() -> None:
    spaces = Spaces()
    spaces.take(OURS)
    for told in (Space("bge:1", 384, 1, "/m/bge"), Space("e5:2", 384, 2, "/m/gone")):
        spaces.take(msgspec.structs.replace(told, state=space.ANNOUNCED))
        spaces.take(told)
    own: Any = Named(OURS.encoder)

    def load(model: str) -> Any:
        if model != "/m/bge":
            raise FileNotFoundError(model)
        trained: Any = Named("bge:1")
        trained.trained_on = "the logs of app id app"
        return trained

    encoders = Encoders(own, load, spaces)
    assert await encoders.trained_on(0) == ""
    assert await encoders.trained_on(1) == "the logs of app id app"
    assert "cannot be loaded here" in await encoders.trained_on(2)


class Named:
    """An encoder that does nothing."""

    def __init__(self, name: str, dim: int = 384) -> None:
        self.name, self.dim = name, dim


async def test_a_process_loads_what_it_needs_of_the_encoders_and_no_other() -> None:
    spaces = Spaces()
    for told in (OURS, Space("bge:1", 384, 1, "/m/bge", state="announced"), Space("bge:1", 384, 1, "/m/bge")):
        spaces.take(told)
    asked: list[str] = []

    def make(model: str) -> Any:
        asked.append(model)
        return Named("bge:1")

    encoders = Encoders(cast(Any, Named(OURS.encoder)), make, spaces)
    starts = Starts(((1, 40),))
    await encoders.load_from(starts, 50)
    await encoders.load_from(starts, 10)
    read_by = encoders.reader(starts)
    assert (read_by(39).name, read_by(40).name, asked) == (OURS.encoder, "bge:1", ["/m/bge"])
    assert Starts.unpack(starts.pack()) == starts and Starts.unpack(None) == Starts()
    moved = Encoders(cast(Any, Named("bge:1")), make, spaces)
    await moved.load_from(starts, 40)  # past the old one's texts
    with pytest.raises(OtherSpaceError, match="set HEADWATER_ENCODER to it"):
        await moved.load_from(starts, 39)
    spaces.take(Space("e5:2", 384, 2, "/m/bge", state="announced"))
    with pytest.raises(OtherSpaceError, match="what is at /m/bge is bge:1"):
        await encoders.load(2)


async def test_a_process_that_is_behind_the_log_reads_it_before_it_takes_another_encoder() -> None:
    """Found by the simulation, seed 16534: a restored row may name an encoder that the process has not heard of."""
    behind, log = Spaces(), Spaces()
    for told in (OURS, Space("bge:1", 384, 1, "/m/bge", state="announced"), Space("bge:1", 384, 1, "/m/bge")):
        log.take(told)
    behind.take(OURS)
    encoders = Encoders(cast(Any, Named(OURS.encoder)), lambda model: cast(Any, Named("bge:1")), behind)

    async def read() -> Spaces:
        return log

    encoders.read = read
    starts = Starts(((1, 2),))
    await encoders.load_from(starts, 2)
    assert encoders.reader(starts)(2).name == "bge:1"


def test_a_mark_counts_for_its_own_app_id_and_announcement_alone() -> None:
    spaces = Spaces()
    announced = Space("bge:1", 384, 1, "/m/bge", "nonce", "announced")
    for told in (OURS, announced):
        spaces.take(told)
    ended, given_up = Spaces(), msgspec.structs.replace(announced, state="given up")
    for told in (OURS, announced, given_up):
        ended.take(told)
    encoders = Encoders(cast(Any, Named(OURS.encoder)), cast(Any, None), spaces)
    key, value = space.mark("app", announced, "a")
    assert key.startswith(MARK) and key != space.mark("app", announced, "b")[0]
    assert encoders.number_of(value, "app") is None and space.is_marked(value, "app")  # it may yet be given up
    assert Encoders(encoders.own, cast(Any, None), ended).number_of(value, "app") is None
    spaces.take(msgspec.structs.replace(announced, state="in use"))
    assert encoders.number_of(value, "app") == 1
    for other in (
        space.mark("other", announced, "a")[1],
        space.mark("app", Space("bge:1", 384, 1, "/m/bge", "forged"), "a")[1],
        space.mark("app", OURS, "a")[1],  # without a nonce nobody has announced it
        space.mark("app", Space("bge:1", 384, 7, "/m/bge", "nonce"), "a")[1],
        b"{", b"[1]", None,
    ):  # fmt: skip
        assert encoders.number_of(other, "app") is None


async def test_encoders_of_a_log_are_those_of_its_marks_whatever_a_state_says() -> None:
    spaces = Spaces()
    mine = Space("bge:1", 384, 1, "/m/bge", "nonce")
    encoders = Encoders(cast(Any, Named(OURS.encoder)), cast(Any, None), spaces)
    key, value = space.mark("app", mine, "a")
    forged = space.mark("app", msgspec.structs.replace(mine, nonce="forged"), "b")[1]
    reads: list[int] = []

    async def read(topic: str, partition: int, start: int, stop: int) -> AsyncIterator[list[Any]]:
        reads.append(stop)
        log = [record(topic, forged, key), record(topic, b"{}", b"u"), record(topic, value, key, offset=2)]
        yield [one for one in log if start <= one.offset <= stop]

    async def starts(upto: int) -> Starts:
        return await rebuild.starts(read, "comments", 0, upto, encoders, "app")

    spaces.take(OURS)
    assert await starts(2) == Starts() and not reads  # no move: the log need not be read
    for told in (msgspec.structs.replace(mine, state="announced"), mine):
        spaces.take(told)
    assert (await starts(2), await starts(1), await starts(-1)) == (Starts(((1, 3),)), Starts(), Starts())
    assert reads == [2, 1]


async def test_a_number_that_the_log_does_not_know_is_told_with_what_to_do() -> None:
    encoders = Encoders(cast(Any, Named(OURS.encoder)), cast(Any, None))
    encoders.spaces.take(OURS)
    with pytest.raises(OtherSpaceError, match="encoder number 1, and the log of encoders tells of 1: its records were"):
        await encoders.load_from(Starts(((1, 5),)), 9)


def test_what_was_given_up_leaves_memory() -> None:
    encoders = Encoders(cast(Any, Named(OURS.encoder)), cast(Any, None))
    second = Space("bge:1", 384, 1, "/m/bge", state="announced")
    for told in (OURS, second):
        encoders.spaces.take(told)
    encoders._loaded[second.encoder] = cast(Any, Named(second.encoder))
    encoders.forget_given_up()
    assert encoders.is_loaded(1)
    encoders.spaces.take(msgspec.structs.replace(second, state="given up"))
    encoders.forget_given_up()
    assert not encoders.is_loaded(1) and encoders.is_loaded(0)


def test_a_mark_outside_the_topics_of_texts_is_a_reject() -> None:
    key, value = space.mark("app", Space("bge:1", 384, 1, "/m/bge", "nonce"), "a")
    topics: tuple[Any, ...] = ("clicks", "comments", "erasures", "items")
    decoded = {topic: codec.decode_batch(topic, [record(topic, value, key)]) for topic in topics}
    assert {topic for topic, one in decoded.items() if one.marks} == set(codec.MARKED)
    assert {topic for topic, one in decoded.items() if one.rejects} == {"clicks", "erasures"}


def test_the_first_mark_of_a_number_holds() -> None:
    starts = Starts().then(1, 10).then(1, 20).then(2, 30).then(1, 40)
    assert starts.pairs == ((1, 10), (2, 30))
    assert starts.until(29).pairs == ((1, 10),) and starts.until(9).row() == {}
    with pytest.raises(ValueError, match="another version"):
        Starts.unpack(b"\x02")
