"""Planted faults: partitions and workers with one mistake each, which the simulation must tell from the real ones."""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

import msgspec

from state.changelog import Accepted, Marker, marker_record, row_records
from state.partition import Partition, _Restore
from streams.agents import Keeper, UserKeeper, _Mark
from streams.answers import Certificate
from streams.codec import DeadLetter
from streams.erasure import Eraser
from streams.pipeline import Erased
from streams.worker import Worker


class MarkerBeforeRows(Partition):
    """A marker tells of rows that are still to come."""

    async def _append_rows(self, rows: Iterable[tuple[bytes, bytes | None]], marker: Marker) -> int:
        last = await self._append([marker_record(marker)])
        for record in row_records(marker.epoch, marker.flush, rows):
            await self._append([record])
        return last


class SettledBeforeMarker(Partition):
    """The outbox forgets a flush before it is in the changelog."""

    async def _settle_rows(self, flush: Any) -> None:
        self._store.write({}, settled=[flush.outbox_id] if flush.outbox_id else [])
        await super()._settle_rows(flush)


class OutboxNotPublished(Partition):
    """What a killed worker owed downstream stays unsaid."""

    async def _adopt(self, opened: Any, kind: str, reason: str) -> Any:
        opened.outbox = [(key, replace(entry, downstream=[])) for key, entry in opened.outbox]
        return await super()._adopt(opened, kind, reason)


class OutboxRowsForgotten(Partition):
    """What a killed worker owed the changelog stays unsaid."""

    async def _adopt(self, opened: Any, kind: str, reason: str) -> Any:
        opened.outbox = [(key, replace(entry, keys=[])) for key, entry in opened.outbox]
        return await super()._adopt(opened, kind, reason)


class FlushesOvertake(Partition):
    """A flush does not wait for the one before it."""

    async def _settle(self, flush: Any, before: Any) -> None:
        await super()._settle(flush, None)


class ZombieNotFenced(Partition):
    """What others have written in between is not looked at."""

    async def _inspect(self, start: int, begins: int | None = None, last: int | None = None) -> None:
        pass


class SweptTooEarly(Partition):
    """SWEPT is said before every row is written again."""

    def _add_sweep(self, rows: dict[bytes, bytes | None], count: int) -> bool:
        was_sweeping = self._sweep_from is not None
        super()._add_sweep(rows, count)
        self._sweep_from = None
        return was_sweeping


PARTITIONS: Final = (
    MarkerBeforeRows, SettledBeforeMarker, OutboxNotPublished, OutboxRowsForgotten, FlushesOvertake, ZombieNotFenced,
    SweptTooEarly,
)  # fmt: skip


_announce, _take, _removal = UserKeeper._announce, _Restore.take, Eraser._removal  # the real ones
_pass_mark = Keeper._pass_mark


async def _letter_not_awaited(self: Worker, letter: DeadLetter) -> None:
    self._tasks.add(asyncio.create_task(self.producer.send_one(letter.topic, letter.key, letter.value, letter.headers)))


async def _every_gap_is_legal(self: Worker, topic: str, partition: int, offset: int) -> tuple[int, int]:
    return 1 << 62, 0


def _not_held(self: Any, head: Any, now: float, end_of: Any) -> float:
    return 0.0


async def _announced_later(self: UserKeeper, erased: Erased, entries: Any) -> None:
    self._task_of_announcing = asyncio.create_task(_announce(self, erased, entries))  # type: ignore[attr-defined]


def _taken_without_deletions(self: Any, accepted: Accepted) -> None:
    alive: dict[bytes, bytes | None] = {key: row for key, row in accepted.rows.items() if row is not None}
    _take(self, replace(accepted, rows=alive))


def _nothing_owed(self: Partition, rows: Any) -> list[bytes]:
    return []


async def _folders_left(self: Worker) -> None:
    pass


def _started_nowhere(self: Keeper[Any], entries: Any) -> dict[bytes, bytes | None]:
    return {}


def _removal_of_all(self: Eraser, certificate: Certificate, places: Any) -> list[bytes]:
    assert certificate.state is not None
    state = msgspec.structs.replace(certificate.state, place=dict.fromkeys(places, 1 << 40))
    return _removal(self, msgspec.structs.replace(certificate, state=state), places)


def _passed_late(self: Keeper[Any], record: Any) -> _Mark:
    return _pass_mark(self, record._replace(offset=self.inbox.sources[record.topic].expected + 2))


# Name -> what is replaced in the product.
WORKERS: Final[Mapping[str, tuple[str, Any]]] = {
    "LetterNotAwaited": ("streams.worker.Worker._dead_letter", _letter_not_awaited),
    "EveryGapIsLegal": ("streams.worker.Worker._first_at", _every_gap_is_legal),
    "NotHeld": ("streams.inbox.Inbox._wait_s", _not_held),
    "ErasureAnnouncedLater": ("streams.agents.UserKeeper._announce", _announced_later),
    "DeletionsNotRestored": ("state.partition._Restore.take", _taken_without_deletions),
    "PurgeNotOwed": ("state.partition.Partition._owed", _nothing_owed),
    "DeletedUnderTheSameEpoch": ("state.partition.Partition.renew", Partition.drain),
    "FoldersLeft": ("streams.worker.Worker.wipe_left_folders", _folders_left),
    "EncoderBeginsLate": ("streams.agents.Keeper._pass_mark", _passed_late),
    "EncoderStartForgotten": ("streams.agents.Keeper._starts_row", _started_nowhere),
    "UnlearnsWhatCameAfter": ("streams.erasure.Eraser._removal", _removal_of_all),
}
