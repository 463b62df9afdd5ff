"""Whose vectors a deployment has: its encoders, one after another, told in a log of its own.

Vectors of two encoders mean nothing to each other, and look alike. All of an app id's are of one space, that of the
encoder whose name is the first record of `{app}-encoder`; whoever would add others to them, or an adapter of another,
is refused before it begins. A deployment moves to another encoder (`headwater encoder migrate`) within that space: the
other one stands behind a map into it (model.align), is announced under the next number, and is in use once the items'
vectors are its own. Records are never deleted there.

Where a partition of texts goes over to it is said in that partition itself, by a mark between its records: so whoever
reads the log, now or later, reads each text by the same encoder. The row STARTS_KEY of the state tells it on.
"""

import asyncio
import struct
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeAlias

import msgspec

from state.changelog import Log
from streams import kafka
from streams.codec import MARK
from streams.encoding import Encoder
from streams.settings import Fault, Settings

TOPIC: Final = "encoder"
KEY: Final = b"encoder"
STARTS_KEY: Final = MARK + b" encoders"  # no id begins so
STARTS_VERSION: Final = 1
ANNOUNCED: Final = "announced"
IN_USE: Final = "in use"
GIVEN_UP: Final = "given up"

_START = struct.Struct("<IQ")


Load: TypeAlias = Callable[[str], Encoder]  # of what HEADWATER_ENCODER would say


class Space(msgspec.Struct, frozen=True, omit_defaults=True):
    """An encoder of the deployment. encoder: its name, with the digest of its weights. dim: length of its vectors."""

    encoder: str
    dim: int
    number: int = 0  # in the order of their use
    model: str = ""  # what HEADWATER_ENCODER says for it
    nonce: str = ""  # of its marks: none that was not written for it counts
    state: Literal["announced", "in use", "given up"] = "in use"


class Mark(msgspec.Struct, frozen=True):
    """Between the records of a partition: from here on the app id's workers read its texts by this encoder."""

    app_id: str
    number: int
    nonce: str


class OtherSpaceError(Fault):
    """What is to be added belongs to another encoder's space."""


class NotLoadedError(Fault):
    """An encoder of the deployment that cannot be loaded here."""


class Spaces:
    """The encoders of a deployment, as its log tells of them. The first word on a number stands."""

    def __init__(self) -> None:
        self.known: list[Space] = []  # by number

    def take(self, told: Space) -> bool:
        """Takes the next record of the log; whether it said anything new."""
        if told.number == len(self.known) and (told.number == 0 or (self.next is None and told.state == ANNOUNCED)):
            self.known.append(told)
            return True
        known = self.known[told.number] if told.number < len(self.known) else None
        if known is None or known.state != ANNOUNCED or known.encoder != told.encoder or told.state == ANNOUNCED:
            return False
        self.known[told.number] = told
        return True

    @property
    def current(self) -> Space | None:
        """The one in use: the newest that was; None before a worker has started."""
        return next((space for space in reversed(self.known) if space.state == IN_USE), None)

    @property
    def next(self) -> Space | None:
        """The one that is announced, and neither in use nor given up."""
        return self.known[-1] if self.known and self.known[-1].state == ANNOUNCED else None

    def named(self, encoder: str) -> Space | None:
        """The newest of this name that was not given up."""
        found = (space for space in reversed(self.known) if space.encoder == encoder and space.state != GIVEN_UP)
        return next(found, None)


async def read(log: Log) -> Spaces:
    """What the log tells now. Raises what the log raises."""
    spaces = Spaces()
    async for batch in log.read(0, None):
        for record in batch:
            spaces.take(decode(record.value))
    return spaces


async def of_deployment(settings: Settings) -> Spaces:
    """What the deployment's log tells now, for whoever adds nothing. Raises KafkaError."""
    spaces, options, topic = Spaces(), settings.kafka_options(), settings.internal_topic(TOPIC)
    end = await kafka.log_end(options, topic, 0)
    async for batch in kafka.read_log(options, topic, 0, 0, end - 1):
        for record in batch:
            spaces.take(decode(record.value))
    return spaces


def decode(value: bytes | None) -> Space:
    """A record of the log. Raises msgspec.ValidationError."""
    return msgspec.json.decode(value or b"", type=Space)


def mark(app_id: str, coming: Space, unique: str) -> tuple[bytes, bytes]:
    """(key, value) of the record that goes into every partition of texts. unique: so that compaction takes none for
    another one, which would move the place."""
    return MARK + f" encoder {app_id} {coming.number} {unique}".encode(), msgspec.json.encode(
        Mark(app_id, coming.number, coming.nonce)
    )


def is_marked(value: bytes | None, app_id: str) -> bool:
    """Whether it is a mark of the app id's, whatever encoder it names."""
    try:
        return msgspec.json.decode(value or b"", type=Mark).app_id == app_id
    except msgspec.DecodeError:
        return False


async def tell(log: Log, space: Space) -> None:
    """Appends a record. Raises what the log raises."""
    await log.append([(KEY, msgspec.json.encode(space))])


async def claim(log: Log, mine: Space, app_id: str) -> Spaces:
    """Makes the space the deployment's, unless it has one. Raises OtherSpaceError where that is another one.

    Of several that claim at once the first in the log has it. An encoder that the deployment has moved on from is none
    to refuse: whoever starts with it takes the one in use from the log.
    """
    spaces = await read(log)
    if spaces.current is None:
        await tell(log, mine)
        spaces = await read(log)
    theirs = spaces.current
    assert theirs is not None
    if spaces.named(mine.encoder) is None:
        raise OtherSpaceError(
            f"the vectors of app id {app_id} are of the encoder {theirs.encoder}, and this one is {mine.encoder}: the "
            "two cannot be compared. Set HEADWATER_ENCODER to theirs; or, to change the encoder, move the deployment "
            "(`headwater encoder align`, then `headwater encoder migrate`), or set HEADWATER_APP_ID to a new name: "
            "that learns everything anew, from what the source topics still hold"
        )
    return spaces


class Encoders:
    """The encoders of a deployment that this process has loaded. `spaces` may grow at any time, and may lag behind."""

    def __init__(self, own: Encoder, make: Load, spaces: Spaces | None = None) -> None:
        """own: the one that the process was started with. make: loads the one that HEADWATER_ENCODER would name so."""
        self.own = own
        self.spaces = Spaces() if spaces is None else spaces
        self.read: Callable[[], Awaitable[Spaces | None]] | None = None  # the log, for whoever may be behind
        self._make = make
        self._loaded = {own.name: own}
        self._loading = asyncio.Lock()

    @property
    def first_name(self) -> str:
        """Of the encoder whose space it is."""
        return self.spaces.known[0].encoder if self.spaces.known else self.own.name

    @property
    def number(self) -> int:
        """Of the encoder in use."""
        return self.spaces.current.number if self.spaces.current is not None else 0

    def at(self, number: int) -> Encoder:
        """The encoder of this number, which is loaded."""
        return self._loaded[self.name_of(number)]

    async def trained_on(self, number: int) -> str:
        """What `headwater encoder train` trained the encoder of this number on, in words; "" where it did not."""
        try:
            encoder = await self.load(number)
        except (NotLoadedError, OtherSpaceError):
            return "something unknown (it cannot be loaded here)"
        return str(getattr(encoder, "trained_on", ""))

    def is_loaded(self, number: int) -> bool:
        """Whether `at` has it."""
        return self.name_of(number) in self._loaded

    def forget_given_up(self) -> None:
        """Lets those go from memory that the deployment will not have."""
        for known in self.spaces.known:
            if known.state == GIVEN_UP and known.encoder != self.own.name and not self.spaces.named(known.encoder):
                self._loaded.pop(known.encoder, None)

    def number_of(self, value: bytes | None, app_id: str) -> int | None:
        """Of a mark's encoder, as far as the log is known here; None: it is none that the app id has, or has had, in
        use. A mark is written after the log says so: whoever has caught up with the log since knows the encoder."""
        try:
            found = msgspec.json.decode(value or b"", type=Mark)
        except msgspec.DecodeError:
            return None
        known = self.spaces.known[found.number] if 0 <= found.number < len(self.spaces.known) else None
        is_its = known is not None and known.nonce == found.nonce and known.state == IN_USE
        return found.number if found.app_id == app_id and is_its and found.nonce else None

    def reader(self, starts: "Starts") -> Callable[[int], Encoder]:
        """Which encoder reads the record at an offset. `load` of each number comes first."""
        return lambda offset: self.at(starts.number_at(offset))

    async def catch_up(self, number: int | None) -> None:
        """Reads the log again, unless the number is known here; None: it is not."""
        if self.read is not None and (number is None or number >= len(self.spaces.known) > 0):
            spaces = await self.read()
            if spaces is not None:
                self.spaces = spaces

    async def load(self, number: int) -> Encoder:
        """Loads it beside the loop, if it is not loaded. Raises OtherSpaceError for a model of another name, and for a
        number that the log does not know; NotLoadedError for a model that cannot be loaded, for whatever reason."""
        await self.catch_up(number)
        if number >= max(1, len(self.spaces.known)):
            raise OtherSpaceError(
                f"the state here is of the encoder number {number}, and the log of encoders tells of "
                f"{len(self.spaces.known)}: its records were deleted. Restore them; or delete the state folders and "
                "the changelogs of this app id, or set another HEADWATER_APP_ID"
            )
        async with self._loading:
            if not self.is_loaded(number):
                space = self.spaces.known[number]
                if number == 0 and not space.model:
                    raise OtherSpaceError(
                        f"texts that were read by the encoder {space.encoder} are still to be read here: set "
                        "HEADWATER_ENCODER to it; the one that is in use now is taken from the log"
                    )
                try:
                    made = await asyncio.to_thread(self._make, space.model)
                except Exception as problem:
                    raise NotLoadedError(
                        f"the deployment's encoder {space.encoder} is to be loaded from {space.model}: {problem}"
                    ) from problem
                if made.name != space.encoder or made.dim != space.dim:
                    raise OtherSpaceError(
                        f"the deployment's encoder is {space.encoder} ({space.dim} numbers), and what is at "
                        f"{space.model} is {made.name} ({made.dim}): put the one that was announced there"
                    )
                self._loaded[made.name] = made
        return self.at(number)

    async def load_from(self, starts: "Starts", offset: int) -> None:
        """Loads all that a partition's records from this offset on are known to be read by."""
        for number in sorted({starts.number_at(offset), *(number for number, first in starts.pairs if first > offset)}):
            await self.load(number)

    async def reading(self, starts: "Starts") -> Callable[[int], Encoder]:
        """`reader`, with all loaded that a partition's records were ever read by."""
        for number in sorted({starts.number_at(0), *(number for number, _ in starts.pairs)}):
            await self.load(number)
        return self.reader(starts)

    def name_of(self, number: int) -> str:
        """Of the encoder of this number."""
        return self.spaces.known[number].encoder if self.spaces.known or number else self.own.name


class Starts(NamedTuple):
    """From which offset on a partition's texts are read by which encoder: (number, first offset), ascending."""

    pairs: tuple[tuple[int, int], ...] = ()

    def number_at(self, offset: int) -> int:
        """Number of the encoder that reads the record at the offset.

        >>> starts = Starts(((1, 10), (2, 30)))
        >>> [starts.number_at(offset) for offset in (9, 10, 29, 30)]
        [0, 1, 1, 2]
        """
        for number, first in reversed(self.pairs):
            if offset >= first:
                return number
        return 0

    def then(self, number: int, offset: int) -> "Starts":
        """With this encoder from the offset on: after a later one nothing changes."""
        newest = self.pairs[-1][0] if self.pairs else 0
        return Starts((*self.pairs, (number, offset))) if number > newest else self

    def until(self, offset: int) -> "Starts":
        """Those that begin at this offset at the latest."""
        return Starts(tuple(pair for pair in self.pairs if pair[1] <= offset))

    def pack(self) -> bytes:
        """version u1, then (number u4, first offset u8) each."""
        return bytes([STARTS_VERSION]) + b"".join(_START.pack(*pair) for pair in self.pairs)

    def row(self) -> dict[bytes, bytes | None]:
        """To be written to a store; nothing where there are none."""
        return {STARTS_KEY: self.pack()} if self.pairs else {}

    @classmethod
    def unpack(cls, row: bytes | None) -> "Starts":
        """Of the row; none where there is no row. Raises ValueError for another version."""
        if row is None:
            return cls()
        if row[:1] != bytes([STARTS_VERSION]) or (len(row) - 1) % _START.size:
            raise ValueError("the row of a partition's encoders is of another version: deploy the build that wrote it")
        return cls(tuple(_START.iter_unpack(row[1:])))


def place(model: str) -> str:
    """What HEADWATER_ENCODER says, as it may be told to other processes: a folder by its whole path."""
    return str(Path(model).resolve()) if model and Path(model).is_dir() else model


def loader(device: str) -> Load:
    """Loads models for this device."""

    def load(model: str) -> Encoder:
        from model.encoder import (
            Encoder as TextEncoder,  # torch takes seconds, and no deployment need have a second one
        )

        return TextEncoder(model, device=device)

    return load


def log_of(settings: Settings, producer: kafka.Producer) -> kafka.ChangelogTopic:
    """The deployment's log of encoders; the producer need be started for `tell` and `claim` alone."""
    return kafka.ChangelogTopic(settings.internal_topic(TOPIC), 0, producer, settings.kafka_options())


def starts_of(get_many: Callable[[list[bytes]], Sequence[bytes | None]]) -> Starts:
    """Of a store of rows."""
    return Starts.unpack(get_many([STARTS_KEY])[0])
