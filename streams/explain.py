"""A list of the past, made again from the logs: what its token names, folded, learnt and ranked as it was then.

The user's row comes from the changelog's flush of the offsets that were applied, or, where compaction has taken that,
from the source topics up to these offsets; the items from the examples log. The token's digest of the list tells
whether the list is the same to the last bit.
"""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

from model.items import ItemMatrix
from model.ranker import Ranker
from state import rows
from state.rows import UserRow
from state.sealing import Rows, SealedRows
from state.store import RocksDisk, Store
from streams import kafka, rebuild, serving, space, tokens
from streams.answers import RankedItem
from streams.datakeys import sealer_of
from streams.encoding import Encoder
from streams.pipeline import ItemLearner
from streams.rebuild import Cut
from streams.serving import ListOptions, Origin, Read, WorkerView
from streams.settings import Fault, Settings
from streams.space import Encoders, Load
from streams.tokens import Token
from streams.worker import LEARNER_PARTITION

Steps = Callable[[str, int, int], None]  # (stage, done, in all)

EXAMPLES: Final = "examples"


class CannotRebuildError(Fault):
    """The list cannot be made again: what is gone, or was never told."""


class Rebuilt(NamedTuple):
    """user_id: None where the log names nobody of the token. is_equal: the items and logits are those of the answer,
    to the last bit."""

    user_id: str | None
    items: list[RankedItem]
    is_equal: bool


def rebuild_list(
    settings: Settings, token: Token, encoder: Encoder, item_ids: Sequence[str], steps: Steps,
    load: Load | None = None,
) -> Rebuilt:  # fmt: skip
    """The list of a token. item_ids: those that were to be ranked, which the token does not name. load: makes the other
    encoders that the deployment has had. Raises Fault."""
    if token.kind == tokens.WHAT_IF:
        raise CannotRebuildError("a what-if's token does not hold what was supposed: ask the what-if again")
    if token.kind == tokens.RANK and len(item_ids) != token.limit:
        raise CannotRebuildError(f"{token.limit} items were ranked: name each of them by --item")
    encoders = Encoders(encoder, load or space.loader(settings.device))
    with tempfile.TemporaryDirectory(prefix="headwater-explain-") as folder:
        return asyncio.run(_Rebuild(settings, token, encoders, Path(folder), steps).run(item_ids))


class Past:
    """As much of a `WorkerView` as making a list needs."""

    def __init__(self, ranker: Ranker, token: Token) -> None:
        self.ranker = ranker
        self._token = token

    def now(self) -> float:
        return self._token.at

    def partition_of(self, user_id: str) -> int:
        return self._token.partition

    def read(self, user_id: str) -> Read:
        told = self._token
        return Read(None, told.applied, Origin(told.epoch, told.examples, told.settings))


class _Rebuild:
    def __init__(self, settings: Settings, token: Token, encoders: Encoders, folder: Path, steps: Steps) -> None:
        self.settings = settings
        self.token = token
        self.encoders = encoders
        self.folder = folder
        self.steps = steps
        self.options = settings.kafka_options()
        self.disk = RocksDisk()
        self.sealer = sealer_of(settings)
        self.applied = {name: offset for name, offset in token.applied.items() if offset >= 0}
        self._changelog: tuple[Store, list[Cut]] | None = None

    async def run(self, item_ids: Sequence[str]) -> Rebuilt:
        self.encoders.spaces = await space.of_deployment(self.settings)
        self._check_settings()
        start = await self._start(EXAMPLES, LEARNER_PARTITION)
        if start > 0 and self.token.examples >= 0:
            raise CannotRebuildError(f"the examples log begins at offset {start}: what the items had learnt is gone")
        user_id = await self._user()
        row = UserRow() if user_id is None else await self._row(user_id)
        ranker = Ranker(await self._matrix(), cooccurrence_history=self._config.cooccurrence_history)
        ranker.take_bias(self.token.bias_at)
        reader = serving.Reader(cast(WorkerView, Past(ranker, self.token)), user_id or "", row)
        options = ListOptions(self.token.limit, True, self.token.exclude_seen, True, True)
        ranked = self.token.kind == tokens.RANK
        items = serving.ordered(reader, item_ids, options) if ranked else serving.best(reader, options)
        is_equal = tokens.list_digest((item.item_id, item.logit) for item in items) == self.token.list
        if user_id is None and not is_equal and (lost := await self._lost()):
            raise CannotRebuildError(f"{lost}, and neither what is left nor the changelog names the list's user")
        return Rebuilt(user_id, items, is_equal)

    def _check_settings(self) -> None:
        """Raises CannotRebuildError unless the list's settings are these, with any encoder of the deployment."""
        evidence = self.settings.evidence_config()
        names = {self.encoders.own.name}
        if self.encoders.spaces.named(self.encoders.own.name) is not None:
            names.update(known.encoder for known in self.encoders.spaces.known)
        if self.token.settings not in {tokens.settings_digest(name, self._config, evidence) for name in names}:
            raise CannotRebuildError(
                "the list was made by another encoder or with other settings of the learner or the actions' weights: "
                "give this command the HEADWATER_ variables that the worker had then"
            )

    async def _user(self) -> str | None:
        """Whose id has the token's digest: by the keys of the user's own records, or, where retention may have taken
        those, of the changelog's rows, which data keys make pseudonyms."""
        for name, last in self.applied.items():
            bar = self._bar(f"finding in {name}", last + 1)
            async for records in self._read(name, self.token.partition, 0, last):
                for record in records:
                    if record.key is not None and tokens.digest_of(record.key) == self.token.user:
                        return str(record.key.decode())
                bar(len(records))
        if not await self._lost():
            return None
        restored, _ = await self._restored()
        return next((key.decode() for key, _ in restored.items() if tokens.digest_of(key) == self.token.user), None)

    async def _row(self, user_id: str) -> UserRow:
        partition = self.token.partition
        restored, cuts = await self._restored()
        if cuts and cuts[-1].is_complete and rebuild.is_at(cuts[-1].applied, self.token.applied):
            return _unpacked(restored if self.sealer is None else SealedRows(restored, self.sealer), user_id)
        if lost := await self._lost():
            raise CannotRebuildError(f"{lost}, and the changelog has no flush of the list's offsets any more")
        comments = self.applied.get("comments", -1)
        starts = await rebuild.starts(
            self._read, "comments", partition, comments, self.encoders, self.settings.app_id
        )  # fmt: skip
        encoder_at = await self.encoders.reading(starts)
        folded = self.disk.open(self.folder / "rows")
        await rebuild.user_rows(
            self._read, partition, self.token.applied, folded, encoder_at,
            self.settings.evidence_config(), cuts=[cut.applied for cut in cuts], only=user_id,
            progress=self._bar("folding", sum(o + 1 for o in self.applied.values())),
        )  # fmt: skip
        return _unpacked(folded, user_id)

    async def _restored(self) -> tuple[Store, list[Cut]]:
        """The changelog's rows up to the list's offsets, and the flushes that made them; read once."""
        if self._changelog is None:
            topic, partition = self.settings.internal_topic("users-changelog"), self.token.partition
            end = await kafka.log_end(self.options, topic, partition)
            log = kafka.read_log(self.options, topic, partition, 0, end - 1)
            store = self.disk.open(self.folder / "changelog")
            self._changelog = store, await rebuild.changelog_rows(log, self.token.applied, store)
        return self._changelog

    async def _lost(self) -> str:
        """Which source logs have lost their beginning, for people; empty: they are whole."""
        partition = self.token.partition
        lost = [name for name in self.applied if await self._start(name, partition) > 0]
        return f"the beginning of {' and '.join(lost)}, partition {partition}, is gone (retention)" if lost else ""

    @property
    def _config(self) -> Any:
        return self.settings.learner_config(self.encoders.own.dim)

    async def _matrix(self) -> ItemMatrix:
        """The items as a replica had them."""
        config = self._config
        learner = ItemLearner(config, config.text_dim, self.encoders.first_name)
        bar = self._bar("learning", self.token.examples + 1)
        learner = await rebuild.learn_examples(self._read, learner, self.token.examples, bar, self.sealer)
        matrix = ItemMatrix(config.dim, config.text_dim, config.neighbours_max)
        matrix.apply(learner.learner.matrix.rows())
        return matrix

    async def _start(self, name: str, partition: int) -> int:
        return await kafka.log_start(self.options, self._topic(name), partition)

    def _read(self, name: str, partition: int, start: int, stop: int) -> AsyncIterator[Sequence[Any]]:
        topic = self._topic(name)
        return kafka.read_records(self.options, topic, partition, start, stop, isolation_level="read_committed")

    def _topic(self, name: str) -> str:
        return self.settings.internal_topic(name) if name == EXAMPLES else self.settings.topic(name)

    def _bar(self, stage: str, total: int) -> Callable[[int], None]:
        return partial(_advance, self.steps, stage, [0], total)


def _advance(steps: Steps, stage: str, done: list[int], total: int, records: int) -> None:
    done[0] += records
    steps(stage, done[0], total)


def _unpacked(store: Rows, user_id: str) -> UserRow:
    (value,) = store.get_many([user_id.encode()])
    return rows.unpack(value) if value is not None else UserRow()
