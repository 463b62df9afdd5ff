"""Moving a deployment to another encoder while it serves: `headwater encoder align`, then `headwater encoder migrate`.

    align     a map from the new encoder's vectors into the deployment's space, from the texts of its own items
    announce  the next number in `{app}-encoder`; every worker loads the model beside what it does, and says so
    encode    every item's text, those with the most positives first, into the examples log: the learner keeps it apart
    in use    `{app}-encoder` says so, and there is no way back
    switch    one message: all items have the new vectors, in one flush, and phi and y move along; lists go on
    mark      in every partition of comments and items: what lies behind it is read by the new encoder
    the rest  items that came meanwhile are read once more

What users wrote before stays as the old encoder read it, in the same space: the alignment's fidelity tells how near the
two are, and newer words count more. A run that was ended anywhere is started again and goes on: vectors are kept on
disk, and what is published may be published twice.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from model import align
from model.align import Alignment, AlignmentError
from model.items import ItemMatrix
from state.changelog import Reader
from streams import codec, examples, kafka, settings, space
from streams.encoding import F4, Encoder, item_vector
from streams.events import Item
from streams.examples import Vectors
from streams.pipeline import Replica
from streams.settings import Fault, Settings
from streams.space import ANNOUNCED, GIVEN_UP, IN_USE, Space, Spaces
from streams.vectors import VectorCache
from streams.worker import LEARNER_PARTITION

Steps = Callable[[str, int, int], None]  # (stage, done, in all)
Ask = Callable[[], list[Any]]  # what each worker's /v1/model answers, or None of it; anew at each call
Holds = Callable[[list[Any]], tuple[int, int]]  # of such answers: (of how many something holds, of how many it should)

VECTORS_KEY: Final = b"vectors"  # of their messages in the examples log
MESSAGES_AT_ONCE: Final = 16
ENCODE_ITEMS_MAX: Final = 1024  # between two steps of the bar, and two appends to the log
POLL_S: Final = 0.5
PASSES_MAX: Final = 5  # over items that came meanwhile
WAIT_S_MAX: Final = 600.0  # for all workers to load a model, and to begin with it
ALIGN_TEXTS_MAX: Final = 20_000  # read by the new encoder for the map: half an hour of one core


class MigrationError(Fault):
    """The deployment cannot move, or not so."""


async def fit(chosen: Settings, model: str, encoder: Encoder, out: Path, steps: Steps) -> Alignment:
    """The alignment of an encoder with the deployment's space, written to the folder `out`. Raises MigrationError.

    From items that have a text and no vector of their own: as many as there are, ALIGN_TEXTS_MAX at most, those with
    the most positives first. Raises MigrationError for a folder that holds an alignment, too, which may be in use, and
    for an encoder that is aligned.
    """
    if align.is_aligned(out):
        raise MigrationError(f"{out} holds an alignment, which may be in use: name another folder")
    alignment = getattr(encoder, "alignment", None)
    if alignment is not None:
        raise MigrationError(f"{model} is aligned: align the model that stands before its map, {alignment.model}")
    spaces = await _spaces(chosen)
    if encoder.name == spaces.known[0].encoder:
        raise MigrationError(
            f"{encoder.name} is the space's own encoder: `headwater encoder migrate` takes it as it is"
        )
    assert spaces.current is not None
    matrix = await _matrix(chosen, spaces.current.dim)
    items = [(key, item) for key, item in await _items(chosen, matrix, steps) if item.text and item.vector is None]
    rows = {key: matrix.index(key) for key, _ in items}
    known = [(key, item) for key, item in items if rows[key] >= 0 and matrix.arrays.e[rows[key]].any()]
    known = known[:ALIGN_TEXTS_MAX]
    texts = [item.text for _, item in known]
    new = _texts(encoder, texts, steps)
    old = np.stack([matrix.arrays.e[rows[key]] for key, _ in known]) if known else np.zeros((0, matrix.text_dim))
    try:
        fitted, fidelity = align.fit(old, new, texts)
    except AlignmentError as problem:
        raise MigrationError(f"{problem} (the catalogue of app id {chosen.app_id})") from problem
    alignment = Alignment(model, encoder.name, spaces.known[0].encoder, fitted, fidelity)
    await asyncio.to_thread(alignment.write, out)
    return alignment


class Migration:
    """The move of a deployment to an encoder of its space. `run` may be started again after anything."""

    def __init__(
        self, chosen: Settings, model: str, encoder: Encoder, ask: Ask, steps: Steps,
        crash: Callable[[str], None] = lambda step: None,
    ) -> None:  # fmt: skip
        """model: what HEADWATER_ENCODER says for the encoder, on every worker's machine. crash: called with the name of
        each step that is done, for tests that end it there."""
        self.settings, self.model, self.encoder = chosen, model, encoder
        self.ask, self.steps, self._crash = ask, steps, crash
        self.producer = kafka.Producer(chosen.kafka_options())
        self.log = space.log_of(chosen, self.producer)

    async def run(self) -> dict[str, Any]:
        """What was done, for people. Raises MigrationError, and KafkaError when no broker answers."""
        started = time.monotonic()
        async with _started(self.producer):
            spaces = await _spaces(self.settings)
            mine, done, late = await self._announced(spaces), 0, 0
            if mine.number == 0:
                return self._told(mine, done, late, started)  # no move has ever begun
            self._crash("announce")
            if mine.state == ANNOUNCED:
                await self._until(mine, _each(partial(_has_loaded, mine=mine)), "workers load the encoder")
                self._crash("load")
                done = await self._publish(mine, await self._items(mine))
                self._crash("encode")
                mine = msgspec.structs.replace(mine, state=IN_USE)
                await space.tell(self.log, mine)
                await self._check_log(mine)
                self._crash("in use")
            switch = examples.pack_vectors(Vectors(mine.number, mine.encoder, []), in_use=True)
            await self._until(mine, _have_offset(await self._send([switch])), "workers show the items' new vectors")
            self._crash("switch")
            await self._mark(mine)
            self._crash("mark")
            await self._until(mine, _each(partial(_has_begun, mine=mine)), "workers begin with the encoder")
            late = await self._read_rest(mine)
        return self._told(mine, done, late, started)

    def _told(self, mine: Space, items: int, late: int, started: float) -> dict[str, Any]:
        seconds = round(time.monotonic() - started, 1)
        return {"encoder": mine.encoder, "number": mine.number, "items": items, "items_late": late, "seconds": seconds}

    async def _announced(self, spaces: Spaces) -> Space:
        """The encoder's record, appended if there is none. Raises MigrationError where it cannot be the next one."""
        assert spaces.current is not None
        if spaces.current.encoder == self.encoder.name:
            return spaces.current
        coming = spaces.next
        if coming is not None and coming.encoder != self.encoder.name:
            raise MigrationError(
                f"the move to {coming.encoder} is under way: finish it by `headwater encoder migrate {coming.model}`, "
                "or end it by `headwater encoder give-up`"
            )
        if coming is not None:
            return coming
        alignment, first = getattr(self.encoder, "alignment", None), spaces.known[0].encoder
        to = self.encoder.name if alignment is None else alignment.to  # the first one needs no map
        if to != first or self.encoder.dim != spaces.current.dim:
            raise MigrationError(
                f"{self.encoder.name} is not aligned with the space of app id {self.settings.app_id}, which is that of "
                f"{first}: make such a folder by `headwater encoder align {self.model} --out FOLDER`"
            )
        nonce = secrets.token_hex(8)
        told = Space(self.encoder.name, self.encoder.dim, len(spaces.known), self.model, nonce, ANNOUNCED)
        await space.tell(self.log, told)
        found = (await space.read(self.log)).known[told.number]
        if found.encoder != told.encoder:
            raise MigrationError("another encoder was announced at the same moment: look at `headwater encoder`")
        return found

    async def _check_log(self, mine: Space) -> None:
        """Raises MigrationError where the log of encoders does not say what was told last: the move was given up."""
        if (await space.read(self.log)).known[mine.number] != mine:
            await self._send([examples.pack_drop(mine.number, mine.encoder)])
            raise MigrationError(f"the move to {mine.encoder} was given up meanwhile, and has changed nothing")

    async def _mark(self, mine: Space) -> None:
        """Repeats of a mark say nothing."""
        for name in codec.MARKED:
            for partition in range(self.settings.partitions):
                key, value = space.mark(self.settings.app_id, mine, secrets.token_hex(8))
                await self.producer.send(self.settings.topic(name), partition, [(key, value)])
                self._crash("one mark")

    async def _until(self, mine: Space, holds: Holds, what: str) -> None:
        """Until it holds for all, those that do not answer among them. Raises MigrationError after WAIT_S_MAX, or where
        a worker says that it cannot load the encoder, or is of a build that knows of no move."""
        deadline = time.monotonic() + WAIT_S_MAX
        while True:
            told = await asyncio.to_thread(self.ask)
            answers = [one for one in told if one is not None]
            older = {one["version"] for one in answers if "workers" not in one}
            if older:
                raise MigrationError(
                    f"a worker is of build {min(older)}, which knows of no move: deploy this one first"
                )
            ready, wanted = holds(told)
            self.steps(what, ready, wanted)
            if answers and ready == wanted:
                return
            reasons = {one["encoder"]["next"]["reason"] for one in answers if _failed(one, mine)}
            if reasons:
                raise MigrationError(
                    f"a worker cannot load the encoder: {'; '.join(sorted(reasons))}. Workers try again; then run "
                    "this again, or `headwater encoder give-up`"
                )
            if time.monotonic() > deadline:
                raise MigrationError(f"after {WAIT_S_MAX:g} s {ready} of {wanted} {what}: run it again")
            await asyncio.sleep(POLL_S)

    async def _items(self, mine: Space) -> list[tuple[int, Item]]:
        return await _items(self.settings, await _matrix(self.settings, mine.dim), self.steps)

    async def _publish(self, mine: Space, items: list[tuple[int, Item]], in_use: bool = False) -> int:
        """The items' vectors, into the examples log; how many."""
        published, offset = 0, -1
        for start in range(0, len(items), ENCODE_ITEMS_MAX):
            await self._check_log(mine)
            part = items[start : start + ENCODE_ITEMS_MAX]
            vectors = await asyncio.to_thread(self._vectors, [item for _, item in part])
            told = [(key, vector) for (key, _), vector in zip(part, vectors, strict=True) if vector]
            messages = examples.pack_all_vectors(Vectors(mine.number, mine.encoder, told), in_use)
            offset = max(offset, await self._send(messages))
            self._crash("items")
            published += len(told)
            self.steps("items that came meanwhile" if in_use else "items", start + len(part), len(items))
        if in_use and published:
            await self._until(mine, _have_offset(offset), "workers show the items' new vectors")
        return published

    async def _read_rest(self, mine: Space) -> int:
        """Items that the catalogue read by the encoder before, while this went on: once more, until there is none.

        Behind its mark a partition reads no item by the old encoder; what lies before it is in the examples log once
        the mark is passed, and in the items' rows once they are as of that log's end.
        """
        passed = partial(_have_passed, "items", mine.number, self.settings.partitions)
        await self._until(mine, passed, "partitions of items pass the mark")
        read = 0
        for _ in range(PASSES_MAX):
            end = await kafka.log_end(self.settings.kafka_options(), self.settings.internal_topic("examples"), 0)
            await self._until(mine, _have_offset(end - 1), "workers show what came meanwhile")
            late = await self._late(mine)
            if not late:
                return read
            read += await self._publish(mine, late, in_use=True)
        raise MigrationError(f"{PASSES_MAX} times items had changed meanwhile ({read} were read again): run it again")

    async def _late(self, mine: Space) -> list[tuple[int, Item]]:
        """Items whose vector in use is another one than this encoder's."""
        matrix = await _matrix(self.settings, mine.dim)
        items, late = await _items(self.settings, matrix, self.steps), []
        for start in range(0, len(items), ENCODE_ITEMS_MAX):
            part = items[start : start + ENCODE_ITEMS_MAX]
            vectors = await asyncio.to_thread(self._vectors, [item for _, item in part])
            for (key, item), vector in zip(part, vectors, strict=True):
                found = _vector_in_use(matrix, key)
                if vector and found is not None and found != vector:
                    late.append((key, item))
        return late

    def _vectors(self, items: Sequence[Item]) -> list[bytes]:
        """<f2[T] of each, as the catalogue would have it; empty for an item without text and vector."""
        texts = iter(_texts(self.encoder, [item.text for item in items if item.text]))
        found = (item_vector(self.encoder, item, next(texts) if item.text else None) for item in items)
        return [b"" if vector is None else vector.astype("<f2").tobytes() for vector in found]

    async def _send(self, messages: list[bytes]) -> int:
        """Offset of the last one; -1 without any."""
        topic, offset = self.settings.internal_topic("examples"), -1
        for start in range(0, len(messages), MESSAGES_AT_ONCE):
            part = [(VECTORS_KEY, message) for message in messages[start : start + MESSAGES_AT_ONCE]]
            offset = await self.producer.send(topic, LEARNER_PARTITION, part)
        return offset


async def give_up(chosen: Settings) -> Space:
    """Ends a move that is announced and not in use. Raises MigrationError where there is none."""
    producer = kafka.Producer(chosen.kafka_options())
    async with _started(producer):
        spaces = await _spaces(chosen)
        if spaces.next is None:
            raise MigrationError("no move to another encoder is under way")
        coming = spaces.next
        ended = msgspec.structs.replace(coming, state=GIVEN_UP)
        log = space.log_of(chosen, producer)
        await space.tell(log, ended)
        if (await space.read(log)).known[ended.number] != ended:
            raise MigrationError(f"{ended.encoder} is in use since a moment ago: there is no way back but another move")
        drop = (VECTORS_KEY, examples.pack_drop(ended.number, ended.encoder))
        await producer.send(chosen.internal_topic("examples"), LEARNER_PARTITION, [drop])
    return ended


@asynccontextmanager
async def _started(producer: kafka.Producer) -> AsyncIterator[None]:
    await producer.start()
    try:
        yield
    finally:
        await producer.stop()


async def _spaces(chosen: Settings) -> Spaces:
    """Raises MigrationError before a worker has started."""
    spaces = await space.of_deployment(chosen)
    if spaces.current is None:
        raise MigrationError(f"app id {chosen.app_id} has no encoder yet: the first worker that starts takes its own")
    return spaces


def _each(holds: Callable[[Any], bool]) -> Holds:
    return lambda told: (sum(one is not None and holds(one) for one in told), len(told))


def _have_passed(topic: str, number: int, partitions: int, told: list[Any]) -> tuple[int, int]:
    """Partitions of the topic whose next text is read by this encoder."""
    texts = [one["encoder"]["texts"].get(topic, {}) for one in told if one is not None]
    return len({p for of in texts for p, reads_by in of.items() if reads_by >= number}), partitions


def _has_loaded(told: Any, mine: Space) -> bool:
    coming = told["encoder"]["next"]
    is_coming = coming is not None and coming["number"] == mine.number and coming["state"] == "loaded"
    return is_coming or _has_begun(told, mine)


def _has_begun(told: Any, mine: Space) -> bool:
    return bool(told["encoder"]["name"] == mine.encoder)


def _have_offset(offset: int) -> Holds:
    """Whose lists are made of what the examples log had up to there."""
    return _each(lambda told: bool(told["replica"]["applied"]["examples"] >= offset))


def _vector_in_use(matrix: ItemMatrix, key: int) -> bytes | None:
    """<f2[T] of the item; None where it has no row, or none in a score."""
    row, waits = matrix.index(key), matrix.pending.get(key)
    if waits is not None:
        return waits.vector.astype("<f2").tobytes()
    return matrix.arrays.e[row].astype("<f2").tobytes() if row >= 0 and matrix.arrays.e[row].any() else None


def _failed(told: Any, mine: Space) -> bool:
    coming = told["encoder"]["next"]
    return coming is not None and coming["number"] == mine.number and coming["state"] == "failed"


async def _matrix(chosen: Settings, dim: int) -> ItemMatrix:
    """The items as the item changelog has them now."""
    replica, reader = Replica(chosen.learner_config(dim)), Reader()
    topic = chosen.internal_topic("items-changelog")
    changelog = kafka.ChangelogTopic(topic, LEARNER_PARTITION, kafka.Producer(chosen.kafka_options()),
                                     chosen.kafka_options())  # fmt: skip
    async for batch in changelog.read(0, None):
        for record in batch:
            accepted = reader.feed(record)
            if accepted is not None:
                replica.prepare(accepted.rows)()
    return replica.matrix


async def _items(chosen: Settings, matrix: ItemMatrix, steps: Steps) -> list[tuple[int, Item]]:
    """(key, item) of the catalogue as `items` has it, those with the most positives first."""
    options, topic = chosen.kafka_options(), chosen.topic("items")
    found: dict[int, Item] = {}
    for partition in range(chosen.partitions):
        end = await kafka.log_end(options, topic, partition)
        if not end:
            continue
        async for batch in kafka.read_records(options, topic, partition, 0, end - 1, isolation_level="read_committed"):
            for event in codec.decode_batch("items", batch).events:
                if isinstance(event, Item):
                    found[examples.item_key(event.item_id)] = event
                else:
                    found.pop(examples.item_key(event.item_id), None)
        steps("reading the catalogue", partition + 1, chosen.partitions)
    rows = {key: matrix.index(key) for key in found}
    positives = {key: float(matrix.arrays.rec["count"][row]) if row >= 0 else 0.0 for key, row in rows.items()}
    return sorted(found.items(), key=lambda entry: (-positives[entry[0]], entry[0]))


def _texts(encoder: Encoder, texts: Sequence[str], steps: Steps | None = None) -> F4:
    """(n, T) vectors, each text read once on this machine."""
    cache = VectorCache(settings.cache_dir() / "vectors", encoder.name, encoder.dim)
    told = (lambda done, total: steps("reading texts", done, total)) if steps else (lambda done, total: None)
    return cache.encode(texts, encoder.encode, told)
