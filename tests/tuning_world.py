"""A stream of examples messages in which tastes lie in a few directions of the texts, and the rest of them is noise.

Items keep entering, so that texts alone can tell who wants them; the encoder as it is drowns the taste in the noise.
"""

from collections.abc import Iterator

import numpy as np

from model.adapter import Adapter
from model.finetune import FinetuneConfig
from model.learner import LearnerConfig
from streams import examples, pipeline
from streams.checkpoints import Checkpoints
from streams.events import Click, Item
from streams.pipeline import EvidenceConfig, SourceEvent
from streams.trainer import Trainer
from streams.tuning import Tuning, TuningConfig

DIM = 24
TASTES = 4  # the first directions
LEARNER = LearnerConfig(rank_items=0, dim=8, text_dim=DIM, negatives=32, neighbours_max=4, cooccurrence_history=4,
                        y_history=4)  # fmt: skip
TUNING = TuningConfig(
    round_examples=1500, examples_min=300, shadow_tests=3000, watch_tests=2500, lengths=(1.0, 2.0),
    finetune=FinetuneConfig(rank=8, epochs=6, replay_messages=64, candidates_max=32, lr=5e-3, decay=0.01),
)  # fmt: skip
BASE = "encoder:1"


def vector_of(item: int) -> np.ndarray:
    """(DIM,) float32, unit: its taste, weakly, and noise."""
    rng = np.random.default_rng(item)
    vector = 0.9 * rng.standard_normal(DIM)
    vector[:TASTES] = 0
    vector[item % TASTES] = 0.9
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def messages(count: int, seed: int = 0) -> Iterator[bytes]:
    """`count` messages of 64 examples each, and the items between; ten new items a message, all tests ranked."""
    rng = np.random.default_rng(seed)
    users: dict[bytes, bytes] = {}
    evidence = EvidenceConfig(rank_sample=1.0)
    offset, items = 0, 0
    for number in range(count):
        ts = 1e9 + 1e3 * number
        entries = []
        for _ in range(10 if number else 40):
            items += 1
            item = Item(item_id=f"i{items}", text=f"text {items}", ts=ts - 500)
            entries.append((items, item, vector_of(items)))
        yield from pipeline.learn_catalogue(0, entries, DIM).messages
        events: list[SourceEvent] = []
        while len(events) < examples.MESSAGE_EXAMPLES_MAX:
            user = int(rng.integers(40))
            young = int(rng.integers(max(1, items - 80), items + 1))
            item_id = young - young % TASTES + user % TASTES if rng.random() < 0.9 else young
            if not 0 < item_id <= items:
                continue
            offset += 1
            click = Click(user_id=f"u{user}", item_id=f"i{item_id}", action="click", ts=ts + len(events))
            events.append(SourceEvent(examples.CLICKS, offset, click))
        batch = pipeline.learn_users(0, events, lambda keys: [users.get(k) for k in keys], evidence)
        users.update((key, row) for key, row in batch.rows.items() if row is not None)
        yield from batch.messages


def planted() -> Adapter:
    """What a perfect training would find: the tastes, twice as long."""
    left = np.zeros((DIM, TASTES), np.float32)
    left[:TASTES] = np.eye(TASTES)
    return Adapter(BASE, left, left.copy(), 1.0)


def harmful(seed: int = 0) -> Adapter:
    """Tastes nearly gone, noise louder."""
    left = np.zeros((DIM, TASTES), np.float32)
    left[:TASTES] = -0.95 * np.eye(TASTES)
    right = np.zeros((DIM, TASTES), np.float32)
    right[:TASTES] = np.eye(TASTES)
    return Adapter(BASE, left, right, 1.5)


class SmallTrainer(Trainer):
    """Of the small world's encoder and sizes."""

    config: TuningConfig = TUNING

    def _new_tuning(self, base: str, text_dim: int) -> Tuning:
        return Tuning(base, text_dim, LEARNER, self.config)


def history(url: str) -> list[tuple[str, str, list[tuple[str, int]]]]:
    """(name, state, decisions) of every checkpoint in a folder."""
    return [(m.name, m.state, [(d["kind"], d["position"]) for d in m.decisions]) for m in Checkpoints(url).manifests()]
