"""The exact ten best of a whole catalogue for one user, against a plain numpy product of the learnt vectors alone.

Items enter and events are learnt by the stream's own code, in this process; then users are ranked one by one, on one
thread, as a request would be. The reference has one block of the score (<z, phi_j>, argpartition), the ranker all.
"""

import argparse
import gc
import time
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from bench import load
from bench.drain import TEXT_DIM, PlainVectors
from model.learner import LearnerConfig
from model.profile import User, profile_of
from model.ranker import Ranker
from state import rows
from streams import examples, pipeline
from streams.events import Click

F4 = npt.NDArray[np.float32]
K: Final = 10
EVENTS: Final = 20_000
USERS: Final = 500
BATCH: Final = 1000
STARTED_S: Final = 1_750_000_000.0  # the clock of the benchmark's events, Unix s


def run(arguments: list[str]) -> dict[str, Any]:
    """`python -m bench rank [--items N,N,...] [--lists N]`"""
    parser = argparse.ArgumentParser(prog="python -m bench rank", description=__doc__)
    parser.add_argument("--items", default="10000,100000,1000000", help="catalogue sizes")
    parser.add_argument("--lists", type=int, default=200, help="lists a catalogue")
    asked = parser.parse_args(arguments)
    sizes = {str(count): _measure(count, asked.lists) for count in map(int, asked.items.split(","))}
    return {"k": K, "lists": asked.lists, "events": EVENTS, "items": sizes}


def _measure(count: int, lists: int) -> dict[str, Any]:
    learner = pipeline.ItemLearner(LearnerConfig(), TEXT_DIM)
    plain = PlainVectors()
    vectors = np.random.default_rng(3).standard_normal((count, load.VECTOR_DIM)).astype(np.float32)
    for n, vector in enumerate(vectors):
        learner.learner.enter(examples.item_key(f"i{n}"), f"i{n}", "", plain.project(vector), None)
    users = _learn(learner, count)
    ranker, matrix = Ranker(learner.learner.matrix), learner.learner.matrix
    now = STARTED_S + EVENTS
    chosen = [users[n % len(users)] for n in range(lists)]
    ranker.rank(chosen[0], now).top(K)  # compiled, and the tick's bias taken
    phi = np.ascontiguousarray(matrix.arrays.phi[: len(matrix)])
    took, reference, found = [], [], []
    gc.disable()
    for user in chosen:
        started = time.perf_counter()
        best = ranker.rank(user, now, user.history_item).top(K)
        between = time.perf_counter()
        scores = phi @ profile_of(matrix, user, now).z
        top = np.argpartition(scores, -K)[-K:]
        reference.append(time.perf_counter() - between)
        took.append(between - started)
        found.append(",".join(item.item_id for item in best))
        assert len(best) == len(top) == K
    gc.enable()
    p50, p99 = (float(np.quantile(took, q)) * 1e3 for q in (0.5, 0.99))
    plain_p50 = float(np.quantile(reference, 0.5)) * 1e3
    first = found[0]
    return {"p50_ms": p50, "p99_ms": p99, "reference_p50_ms": plain_p50, "ratio": p50 / plain_p50, "first": first}


def _learn(learner: pipeline.ItemLearner, count: int) -> list[User]:
    """Learns events of USERS users on the catalogue; the users afterwards."""
    stream, kept = load.Stream(count, USERS), dict[bytes, bytes]()
    message = 0
    for start in range(0, EVENTS, BATCH):
        raw = stream.take(BATCH, STARTED_S + start)
        clicks = [msgspec.json.decode(value, type=Click) for _, value in raw]
        events = [pipeline.SourceEvent(0, start + n, click) for n, click in enumerate(clicks)]
        batch = pipeline.learn_users(0, events, lambda keys: [kept.get(key) for key in keys], pipeline.EvidenceConfig())
        kept.update({key: row for key, row in batch.rows.items() if row is not None})
        for packed in batch.messages:
            learner.learn(message, packed)
            message += 1
    users = []
    for row in map(rows.unpack, kept.values()):
        slots = row.slots()
        users.append(User(slots["key"], slots["ts"].astype(np.float64), slots["weight"].astype(np.float32)))
    return users
