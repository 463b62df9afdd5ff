"""Is the workers' state what the logs say? Every partition rebuilt in a scratch folder and held against its digest.

    changelog  what another worker would restore: the complete flushes up to the offsets that the worker told
    sources    what the source logs make, by the pipeline, at the same offsets: as far as the logs still begin at 0

The learner's changelog is behind its matrix by design: its rows at the last marker, and the examples log from there.
"""

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Final, NamedTuple

from state.changelog import LogRecord
from state.partition import digest
from state.sealing import Rows, SealedRows
from state.store import RocksDisk, Store
from streams import kafka, rebuild, space
from streams.datakeys import sealer_of
from streams.encoding import Encoder
from streams.pipeline import ItemLearner
from streams.rebuild import Cut
from streams.settings import Fault, Settings
from streams.space import Encoders, Load, Starts

CHANGELOGS: Final = {"users": "users-changelog", "catalogue": "catalogue-changelog", "learner": "items-changelog"}
MARKER_WAIT_S_MAX: Final = 10.0  # a flush is on disk, and in the digest, a moment before its marker is in the log
ASK_TRIES_MAX: Final = 3  # a worker that was killed publishes several flushes under one marker: ask for a later state
SETTLE_S_MAX: Final = 60.0  # for changelogs whose rows are being written again, so that their heads can go
SETTLE_POLL_S: Final = 1.0

Steps = Callable[[str, int, int], None]  # (stage, done, in all)


class Finding(StrEnum):
    """What a rebuilt state is against the worker's."""

    EQUAL = "equal"
    DIFFERENT = "different"
    GONE = "gone"  # the log no longer has its beginning (retention): not checked
    UNTOLD = "untold"  # no worker told of the partition, or no flush of these offsets is in the changelog


class Verdict(NamedTuple):
    """One partition. rows: of its state; note: what to know about a finding."""

    kind: str
    partition: int
    applied: dict[str, int]
    digest: str
    rows: int
    changelog: Finding
    sources: Finding
    note: str = ""

    @property
    def is_equal(self) -> bool:
        """Nothing differs, and the changelog at least was checked."""
        return self.changelog is Finding.EQUAL and self.sources in (Finding.EQUAL, Finding.GONE)


class EncoderDiffersError(Fault):
    """The worker encodes texts by another encoder than this command would."""


def verify(
    settings: Settings, ask: Callable[[], list[Any]], encoder: Encoder, steps: Steps, load: Load | None = None
) -> list[Verdict]:  # fmt: skip
    """Checks every partition. ask: gives what each worker's /v1/digest answers, anew at each call. load: makes the
    other encoders that the deployment has had.

    Takes the disk space of the state twice over, for a while, where temporary files are. Raises Fault.
    """
    encoders = Encoders(encoder, load or space.loader(settings.device))
    with tempfile.TemporaryDirectory(prefix="headwater-verify-") as folder:
        return asyncio.run(_Verification(settings, ask, encoders, Path(folder), steps).run())


class _Told(NamedTuple):
    applied: dict[str, int]
    digest: str


class _Restored(NamedTuple):
    told: _Told
    finding: Finding
    rows: int
    cuts: list[Cut]
    first: int  # where the changelog began


class _Verification:
    def __init__(
        self, settings: Settings, ask: Callable[[], list[Any]], encoders: Encoders, folder: Path, steps: Steps
    ) -> None:
        self.settings = settings
        self.options = settings.kafka_options()
        self.ask = ask
        self.encoders = encoders
        self.folder = folder
        self.steps = steps
        self.disk = RocksDisk()
        self.sealer = sealer_of(settings)
        self._scratch = count()
        self._unsettled: set[tuple[str, int]] = set()  # whose changelog lost its head, and is not swept as of there

    async def run(self) -> list[Verdict]:
        """First all changelogs, close to the moment of the digests; then the sources."""
        self.encoders.spaces = await space.of_deployment(self.settings)
        self.encoders.read = partial(space.of_deployment, self.settings)  # a move may go on meanwhile
        wanted = [(kind, p) for kind in ("users", "catalogue") for p in range(self.settings.partitions)]
        wanted.append(("learner", 0))
        restored: dict[tuple[str, int], _Restored] = {}
        deadline = time.monotonic() + SETTLE_S_MAX
        for tries in count(1):
            told = self._told()
            self._unsettled.clear()
            for done, key in enumerate(k for k in wanted if k not in restored):
                self.steps("changelogs", done, len(wanted))
                if key in told and (found := await self._restore(*key, told[key])) is not None:
                    restored[key] = found
            may_settle = self._unsettled and time.monotonic() < deadline
            if len(restored) == len(wanted) or (tries >= ASK_TRIES_MAX and not may_settle):
                break
            await asyncio.sleep(SETTLE_POLL_S if self._unsettled else 0)
        self.steps("changelogs", len(wanted), len(wanted))
        return [await self._verdict(*key, restored.get(key)) for key in wanted]

    def _told(self) -> dict[tuple[str, int], _Told]:
        told = {}
        for answer in self.ask():
            spaces, own = self.encoders.spaces, self.encoders.own.name
            told_by_log = spaces.named(answer["encoder"]) is not None and spaces.named(own) is not None
            if answer["encoder"] != own and not told_by_log:
                raise EncoderDiffersError(
                    f"the worker at {answer['url']} encodes by {answer['encoder']}, this command by "
                    f"{own}: give it the worker's HEADWATER_ENCODER"
                )
            for part in answer["partitions"]:
                told[part["kind"], part["partition"]] = _Told(part["applied"], part["digest"])
        return told

    # -- the changelog

    async def _restore(self, kind: str, partition: int, told: _Told) -> _Restored | None:
        """None: the changelog has no flush of exactly these offsets, or not all rows as of there: its head was deleted
        a moment ago.
        """
        first = await self._changelog_begin(kind, partition)
        log = self._changelog(kind, partition, is_followed=kind != "learner")
        with self._store() as rows:
            cuts = await rebuild.changelog_rows(log, told.applied, rows)
            applied = cuts[-1].applied if cuts else dict.fromkeys(told.applied, -1)
            if kind == "learner":
                learner = self._learner()
                learner.load(rows.items())
                learner.offset = applied["examples"]
                return await self._learnt(learner, told)
            is_whole = not cuts or cuts[-1].is_complete
            if not is_whole or await self._changelog_begin(kind, partition) != first:
                self._unsettled.add((kind, partition))
                return None
            if not rebuild.is_at(applied, told.applied):
                return None
            kept = self._as_kept(kind, rows)
            found = digest(kept.items(), applied)
            return _Restored(told, _finding(found, told), sum(1 for _ in rows.items()), cuts, first)

    async def _learnt(self, learner: ItemLearner, told: _Told) -> _Restored | None:
        start = await kafka.log_start(self.options, self.settings.internal_topic("examples"), 0)
        if start > learner.offset + 1:
            return None
        bar, upto = self._bar("learner", told), told.applied["examples"]
        learner = await rebuild.learn_examples(self._read, learner, upto, bar, self.sealer, is_whole=start == 0)
        found = _finding(learner.learner.digest(), told)
        return _Restored(told, found, len(learner.learner.matrix), [], 0)

    def _changelog_topic(self, kind: str) -> str:
        return self.settings.internal_topic(CHANGELOGS[kind])

    async def _changelog(self, kind: str, partition: int, *, is_followed: bool) -> AsyncIterator[Sequence[LogRecord]]:
        """The changelog to its end; followed: until nothing has come for MARKER_WAIT_S_MAX."""
        topic = self._changelog_topic(kind)
        end = await kafka.log_end(self.options, topic, partition)
        if not is_followed:
            async for batch in kafka.read_log(self.options, topic, partition, 0, end - 1):
                yield batch
            return
        deadline = time.monotonic() + MARKER_WAIT_S_MAX
        async for batch in kafka.read_log(self.options, topic, partition, 0):
            if batch:
                yield batch
                deadline = time.monotonic() + MARKER_WAIT_S_MAX
            elif time.monotonic() > deadline:
                return

    # -- the sources

    async def _verdict(self, kind: str, partition: int, restored: _Restored | None) -> Verdict:
        if restored is None:
            note = "no worker tells of it, or its changelog has no flush of these offsets: run it again"
            return Verdict(kind, partition, {}, "", 0, Finding.UNTOLD, Finding.UNTOLD, note)
        sources, note = await self._from_sources(kind, partition, restored)
        if restored.finding is Finding.DIFFERENT:
            note = "the changelog gives another state than the worker has: restart the worker on an empty state folder"
        told = restored.told
        return Verdict(kind, partition, told.applied, told.digest, restored.rows, restored.finding, sources, note)

    async def _from_sources(self, kind: str, partition: int, restored: _Restored) -> tuple[Finding, str]:
        told = restored.told
        if kind != "catalogue":  # items are compacted: their newest records are enough
            for name in told.applied:
                start = await kafka.log_start(self.options, self._topic(name), partition)
                if start > 0:
                    return Finding.GONE, f"{name} begins at offset {start}: only the changelog could be checked"
        bar = self._bar(f"{kind} {partition}", told)
        if kind == "learner":
            upto = told.applied["examples"]
            learner = await rebuild.learn_examples(self._read, self._learner(), upto, bar, self.sealer)
            return self._judged(learner.learner.digest(), told)
        if kind == "users":
            found = await self._fold(partition, restored, None, bar)
            complete = [cut.applied for cut in restored.cuts if cut.is_complete]
            begins = await self._changelog_begin(kind, partition)
            if found != told.digest and begins != restored.first:
                return Finding.GONE, "an erasure took the changelog's beginning meanwhile: run it again"
            if found != told.digest and begins > 0 and complete:
                # The order in which late events were merged went with the changelog's beginning.
                if rebuild.is_at(complete[0], told.applied):
                    return Finding.GONE, "an erasure took the changelog's beginning, and no event has come since"
                found = await self._fold(partition, restored, complete[0], self._bar(f"{kind} {partition}", told))
                if found == told.digest:
                    return Finding.EQUAL, f"checked from {complete[0]} on: an erasure took the changelog before that"
        else:
            with self._store() as store:
                starts = await self._starts("items", partition, told)
                encoder_at = await self.encoders.reading(starts)
                await rebuild.catalogue_rows(self._read, partition, told.applied["items"], store, encoder_at, bar)
                store.write(starts.row())
                found = digest(store.items(), told.applied)
        return self._judged(found, told)

    async def _changelog_begin(self, kind: str, partition: int) -> int:
        """Where it begins: above 0 where its head was deleted."""
        return await kafka.log_start(self.options, self._changelog_topic(kind), partition)

    async def _fold(
        self, partition: int, restored: _Restored, start: dict[str, int] | None, bar: Callable[[int], None]
    ) -> str:
        """Digest of the users' rows by the sources; start: from the changelog's state at these offsets on."""
        told, cuts = restored.told, [cut.applied for cut in restored.cuts]
        with self._store() as store:
            if start is not None:
                log = self._changelog("users", partition, is_followed=False)
                await rebuild.changelog_rows(log, start, store)
                cuts = cuts[cuts.index(start) :]
            rows = self._as_kept("users", store)
            starts = await self._starts("comments", partition, told)
            await rebuild.user_rows(
                self._read, partition, told.applied, rows, await self.encoders.reading(starts),
                self.settings.evidence_config(), after=start, cuts=cuts, progress=bar,
            )  # fmt: skip
            rows.write(starts.row())
            return digest(rows.items(), told.applied)

    async def _starts(self, topic: str, partition: int, told: _Told) -> Starts:
        return await rebuild.starts(
            self._read, topic, partition, told.applied[topic], self.encoders, self.settings.app_id
        )  # fmt: skip

    def _judged(self, found: str, told: _Told) -> tuple[Finding, str]:
        finding = _finding(found, told)
        note = "other settings, another kind of processor than the worker's, or events merged long after their time"
        return finding, note if finding is Finding.DIFFERENT else ""

    def _read(self, name: str, partition: int, start: int, stop: int) -> AsyncIterator[Sequence[Any]]:
        topic = self._topic(name)
        return kafka.read_records(self.options, topic, partition, start, stop, isolation_level="read_committed")

    def _topic(self, name: str) -> str:
        return self.settings.internal_topic(name) if name == "examples" else self.settings.topic(name)

    # -- scratch

    def _learner(self) -> ItemLearner:
        dim = self.encoders.own.dim
        return ItemLearner(self.settings.learner_config(dim), dim, self.encoders.first_name)

    @contextmanager
    def _store(self) -> Iterator[Store]:
        path = self.folder / str(next(self._scratch))
        store = self.disk.open(path)
        try:
            yield store
        finally:
            store.close()
            self.disk.wipe(path)

    def _as_kept(self, kind: str, store: Store) -> Rows:
        """The rows of a scratch store, by the keys that a worker keeps them under."""
        return SealedRows(store, self.sealer) if kind == "users" and self.sealer is not None else store

    def _bar(self, stage: str, told: _Told) -> Callable[[int], None]:
        return partial(_advance, self.steps, stage, [0], sum(told.applied.values()) + len(told.applied))


def _advance(steps: Steps, stage: str, done: list[int], total: int, records: int) -> None:
    done[0] += records
    steps(stage, done[0], total)


def _finding(found: str, told: _Told) -> Finding:
    return Finding.EQUAL if found == told.digest else Finding.DIFFERENT
