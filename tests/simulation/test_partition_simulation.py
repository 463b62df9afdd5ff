"""Whatever ends a process, and wherever: state, changelog and downstream are those of an undisturbed run.

A world's seed picks kills between any two steps, wiped and cut disks, torn, doubled, failed and late appends, two
claimants at once, compaction with a lag and deletion of the swept head (tests/simulation/partition_world.py).
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.doubles import MemoryDisk
from state.changelog import Marker, marker_record, row_records
from state.partition import Partition
from state.store import RocksDisk
from tests.simulation.partition_world import MakePartition, run_seed

SEEDS = 300
ROCKS_SEEDS = 12  # the same worlds on real databases
CANARY_SEEDS_MAX = 120

HERE = "tests/simulation/test_partition_simulation.py"


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.ERROR)  # asyncio tells of the tasks that a kill has ended
    yield
    logging.disable(logging.NOTSET)


def run(seed: int, disk: Any, folder: Path, test: str, make: MakePartition = Partition) -> None:
    try:
        run_seed(seed, disk, folder, make)
    except Exception as error:
        raise AssertionError(f"{error!r}\nrepeat with: python -m pytest '{HERE}::{test}[{seed}]'") from error


@pytest.mark.parametrize("seed", range(SEEDS))
def test_end_state_equals_the_undisturbed_run(seed: int) -> None:
    run(seed, MemoryDisk(), Path("/memory"), "test_end_state_equals_the_undisturbed_run")


@pytest.mark.parametrize("seed", range(ROCKS_SEEDS))
def test_end_state_equals_the_undisturbed_run_on_rocksdb(seed: int, tmp_path: Path) -> None:
    run(seed, RocksDisk(), tmp_path, "test_end_state_equals_the_undisturbed_run_on_rocksdb")


class MarkerBeforeRows(Partition):
    """Canary."""

    async def _append_rows(self, rows: Iterable[tuple[bytes, bytes | None]], marker: Marker) -> int:
        last = await self._append([marker_record(marker)])
        for record in row_records(marker.epoch, marker.flush, rows):
            await self._append([record])
        return last


class SettledBeforeMarker(Partition):
    """Canary."""

    async def _settle_rows(self, flush: Any) -> None:
        self._store.write({}, settled=[flush.outbox_id] if flush.outbox_id else [])
        await super()._settle_rows(flush)


class OutboxNotPublished(Partition):
    """Canary."""

    async def _adopt(self, opened: Any, kind: str, reason: str) -> Any:
        opened.outbox = [(key, replace(entry, downstream=[])) for key, entry in opened.outbox]
        return await super()._adopt(opened, kind, reason)


class OutboxRowsForgotten(Partition):
    """Canary."""

    async def _adopt(self, opened: Any, kind: str, reason: str) -> Any:
        opened.outbox = [(key, replace(entry, keys=[])) for key, entry in opened.outbox]
        return await super()._adopt(opened, kind, reason)


class FlushesOvertake(Partition):
    """Canary."""

    async def _settle(self, flush: Any, before: Any) -> None:
        await super()._settle(flush, None)


class ZombieNotFenced(Partition):
    """Canary."""

    async def _inspect(self, start: int, begins: int, last: int) -> None:
        pass


class SweptTooEarly(Partition):
    """Canary."""

    def _add_sweep(self, rows: dict[bytes, bytes | None]) -> bool:
        was_sweeping = self._sweep_from is not None
        super()._add_sweep(rows)
        self._sweep_from = None
        return was_sweeping


@pytest.mark.parametrize(
    "canary",
    [
        MarkerBeforeRows,
        SettledBeforeMarker,
        OutboxNotPublished,
        OutboxRowsForgotten,
        FlushesOvertake,
        ZombieNotFenced,
        SweptTooEarly,
    ],
)
def test_planted_fault_is_found(canary: type[Partition]) -> None:
    for seed in range(CANARY_SEEDS_MAX):
        try:
            run_seed(seed, MemoryDisk(), Path("/memory"), canary)
        except Exception:
            return
    pytest.fail(f"{CANARY_SEEDS_MAX} worlds did not tell {canary.__name__} from the real one")
