"""Whatever ends a process, and wherever: state, changelog and downstream are those of an undisturbed run.

A world's seed picks kills between any two steps, wiped and cut disks, torn, doubled, failed and late appends, two
claimants at once, compaction with a lag and deletion of the swept head (tests/simulation/partition_world.py).
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.canaries import PARTITIONS
from bench.doubles import MemoryDisk
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


@pytest.mark.parametrize("canary", PARTITIONS)
def test_planted_fault_is_found(canary: type[Partition]) -> None:
    for seed in range(CANARY_SEEDS_MAX):
        try:
            run_seed(seed, MemoryDisk(), Path("/memory"), canary)
        except Exception:
            return
    pytest.fail(f"{CANARY_SEEDS_MAX} worlds did not tell {canary.__name__} from the real one")
