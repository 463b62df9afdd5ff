"""Whole workers over simulated logs, disks and clock, faults by a seed: every end is that of an undisturbed run."""

import argparse
import gc
import logging
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from hashlib import blake2b
from typing import Any, Final, NamedTuple
from unittest.mock import patch

from bench import canaries
from bench.simulation import MakePartition, run_seed
from state.partition import Partition
from streams.progress import Bars

CHUNK_SEEDS: Final = 20  # a task of a process
CANARY_SEEDS_MAX: Final = 200  # within which every planted fault must be found
FAILURES_TOLD_MAX: Final = 20
PROCESSES: Final = 2


class Failure(NamedTuple):
    """A world in which a promise was broken."""

    seed: int
    problem: str

    @property
    def command(self) -> str:
        """Repeats it."""
        return f"python -m bench simulate --seeds 1 --first {self.seed} --canaries 0"


class Chunk(NamedTuple):
    """What some seeds gave. fingerprint: of all their logs."""

    failures: list[Failure]
    kills: int
    fingerprint: str


def run(arguments: list[str]) -> dict[str, Any]:
    """`python -m bench simulate --seeds 100000 [--first N] [--processes 2] [--canaries 0]`"""
    parser = argparse.ArgumentParser(prog="python -m bench simulate")
    parser.add_argument("--seeds", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="The first seed.")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--canaries", type=int, default=1, choices=(0, 1), help="0: no planted faults.")
    asked = parser.parse_args(arguments)
    with Bars() as bars, pool(asked.processes) as made:
        seeds = range(asked.first, asked.first + asked.seeds)
        chunks = list(_shown(bars, "seeds", len(seeds), worlds(made, seeds)))
        found = dict(made.map(found_at, canary_names())) if asked.canaries else {}
    failures = [failure for chunk in chunks for failure in chunk.failures]
    for failure in failures[:FAILURES_TOLD_MAX]:
        print(f"seed {failure.seed}: {failure.problem}\n  repeat with: {failure.command}", flush=True)
    missed = [name for name, seed in found.items() if seed is None]
    return {
        "seeds": len(seeds), "failures": len(failures), "failed_seeds": [f.seed for f in failures[:FAILURES_TOLD_MAX]],
        "kills": sum(chunk.kills for chunk in chunks), "canary_found_at": found, "canaries_missed": missed,
        "broken": [f"seed {f.seed}: {f.problem}" for f in failures[:FAILURES_TOLD_MAX]] + missed,
        "result_hash": blake2b("".join(c.fingerprint for c in chunks).encode(), digest_size=8).hexdigest(),
    }  # fmt: skip


def pool(processes: int = PROCESSES) -> ProcessPoolExecutor:
    """Of processes that are ready for worlds."""
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_begin)


def _begin() -> None:
    logging.disable(logging.ERROR)  # asyncio tells of the tasks that a kill has ended
    run_seed(0)
    gc.collect()
    gc.freeze()  # what all worlds share is no garbage: to look through it took a quarter of the time
    gc.disable()


def _shown(bars: Bars, stage: str, total: int, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    for number, chunk in enumerate(chunks, 1):
        bars.steps_of(stage, min(total, number * CHUNK_SEEDS), total)
        yield chunk


def worlds(pool: ProcessPoolExecutor, seeds: range) -> Iterator[Chunk]:
    """The worlds of these seeds, a chunk at a time, in order."""
    parts = [seeds[at : at + CHUNK_SEEDS] for at in range(0, len(seeds), CHUNK_SEEDS)]
    return pool.map(run_chunk, parts)


def run_chunk(seeds: range) -> Chunk:
    """One process's share."""
    hasher = blake2b(digest_size=8)
    failures = []
    kills = 0
    for seed in seeds:
        gc.collect()  # a world is a heap of cycles: they go all at once
        try:
            world = run_seed(seed)
        except Exception as problem:
            failures.append(Failure(seed, f"{type(problem).__name__}: {problem}"))
            continue
        kills += len(world.kills)
        hasher.update(world.fingerprint().encode())
    return Chunk(failures, kills, hasher.hexdigest())


def canary_names() -> list[str]:
    """The planted faults."""
    return [*(canary.__name__ for canary in canaries.PARTITIONS), *canaries.WORKERS]


def found_at(name: str) -> tuple[str, int | None]:
    """(the canary, the first seed that tells it from the real one, None: none within CANARY_SEEDS_MAX)."""
    makes: dict[str, MakePartition] = {canary.__name__: canary for canary in canaries.PARTITIONS}
    with ExitStack() as stack:
        if name in canaries.WORKERS:
            stack.enter_context(patch(*canaries.WORKERS[name]))
        run_one = partial(run_seed, make=makes.get(name, Partition))
        for seed in range(CANARY_SEEDS_MAX):
            try:
                run_one(seed)
            except Exception:
                return name, seed
    return name, None
