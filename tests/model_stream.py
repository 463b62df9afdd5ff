"""A small synthetic stream of examples for the tests of the model: users of a few tastes, items of a few topics."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from model.examples import Examples, new_examples
from model.learner import Learner, LearnerConfig

Array = npt.NDArray[Any]

SMALL = LearnerConfig(
    dim=8,
    text_dim=12,
    negatives=16,
    neighbours_max=6,
    history_max=10,
    cooccurrence_history=5,
    y_history=4,
    message_examples_max=8,
    rank_items=0,
)
ITEMS = 40
START_TS = 1_600_000_000.0


def vector_of(item: int, dim: int) -> Array:
    """(dim,) float32 unit vector of an item: its topic and something of its own."""
    rng = np.random.default_rng(item)
    vector = np.eye(dim)[item % 4] + 0.5 * rng.standard_normal(dim)
    unit: Array = (vector / np.linalg.norm(vector)).astype(np.float32)
    return unit


def enter_all(learner: Learner, items: int = ITEMS, late: int = 10) -> None:
    """Items 1..items; the last `late` of them enter while the stream runs."""
    for item in range(1, items + 1):
        ts = None if item <= items - late else START_TS + 40.0 * (item - (items - late))
        learner.enter(item, f"item-{item}", f"text of {item}", vector_of(item, learner.config.text_dim), ts)


def stream(config: LearnerConfig, messages: int, seed: int = 0, items: int = ITEMS) -> Iterator[Examples]:
    """Messages of examples in time order. Ten users; every second one prefers a topic; some targets are new."""
    rng = np.random.default_rng(seed)
    history: dict[int, list[tuple[int, float, float]]] = {user: [] for user in range(10)}
    ts = START_TS
    for _ in range(messages):
        x = new_examples(config, 4096)
        seen = 0
        count = int(rng.integers(1, config.message_examples_max + 1))
        for b in range(count):
            ts += float(rng.exponential(8.0))
            user = int(rng.integers(10))
            item = int(rng.integers(1, items + 1))
            if user % 2 and rng.random() < 0.8:
                item = item - item % 4 + user % 4 if item > 4 else item
            past = history[user][-config.history_max :][::-1]
            x.item[b], x.ts[b], x.label[b] = item, ts, int(rng.random() > 0.2)
            x.history_count[b] = len(past)
            for q, (key, at, weight) in enumerate(past):
                x.history_item[b, q], x.history_ts[b, q], x.history_weight[b, q] = key, at, weight
            x.text_on[b] = user < 3
            x.text[b] = vector_of(100 + user, config.text_dim)
            x.text_weight[b] = 1 + user
            x.ranked[b] = rng.random() < 0.5
            older = [key for key, _, _ in history[user][: -config.history_max]]
            x.seen[seen : seen + len(older)] = older
            seen += len(older)
            x.seen_start[b + 1] = seen
            history[user].append((item, ts, 1.0 if x.label[b] else 0.7))
        yield x._replace(count=count)
