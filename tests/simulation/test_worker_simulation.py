"""Whatever ends a worker, and wherever: rows, examples, item matrix, replica, changelogs and dead letters are those of
an undisturbed run (bench/simulation.py says what a seed draws).
"""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from bench import simulate
from bench.simulation import run_seed

SEEDS = 2000


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with simulate.pool() as made:
        yield made


def test_every_end_is_that_of_an_undisturbed_run(pool: ProcessPoolExecutor) -> None:
    chunks = list(simulate.worlds(pool, range(SEEDS)))
    failures = [failure for chunk in chunks for failure in chunk.failures]
    assert not failures, "\n".join(f"{f.seed}: {f.problem}\nrepeat with: {f.command}" for f in failures[:5])
    assert sum(chunk.kills for chunk in chunks) > SEEDS


def test_planted_faults_are_found(pool: ProcessPoolExecutor) -> None:
    found = dict(pool.map(simulate.found_at, simulate.canary_names()))
    assert [name for name, seed in found.items() if seed is None] == []


def test_a_seed_is_the_same_world_in_every_process(pool: ProcessPoolExecutor) -> None:
    prints = [run_seed(seed).fingerprint() for seed in range(3)]
    assert prints == [world.fingerprint() for world in map(run_seed, range(3))]
    one, other = (pool.submit(simulate.run_chunk, range(3)) for _ in range(2))
    assert one.result() == other.result()
