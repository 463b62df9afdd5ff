"""The training examples of one message, as arrays.

One example is one event of one user together with what the user had done *before* it, so that nothing about the
user is looked up when it is learnt. One message is one micro-batch of the learner.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

EVIDENCE = 0  # label: a low rating; counted in the co-occurrence, never a target
POSITIVE = 1  # label: a target of the loss
SEEN_MAX = 65_536  # consumed keys a message of ranked examples may carry, in all


class Examples(NamedTuple):
    """B examples at most, L history entries each, texts of T dimensions, S consumed keys in all.

    Arrays are C-contiguous; rows at and above `count`, and history entries at and above `history_count`, are never
    read. Histories run from the newest entry to the oldest.
    """

    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody calls
    item: Array  # (B,) int64, key of the target
    label: Array  # (B,) int8, POSITIVE or EVIDENCE
    ts: Array  # (B,) float64, event time, Unix s
    bucket: Array  # (B,) uint8, the user's in trials: `model.trial.bucket_of`
    source: Array  # (B,) int64, where the event came from: topic << 60 | partition << 48 | offset
    history_count: Array  # (B,) int32
    history_item: Array  # (B, L) int64, keys
    history_ts: Array  # (B, L) float64, Unix s
    history_weight: Array  # (B, L) float32, w_b of the action
    text_on: Array  # (B,) bool
    text: Array  # (B, T) float32, decayed mean of the unit vectors of the user's visible texts
    text_weight: Array  # (B,) float32, sum of the decays
    ranked: Array  # (B,) bool, rank the target in full before it is learnt
    seen_start: Array  # (B + 1,) int32, seen[seen_start[b]:seen_start[b + 1]] belongs to example b
    seen: Array  # (S,) int64, keys consumed beyond the history, for ranked examples only


class Sizes(Protocol):
    """What a buffer of examples is sized by; `LearnerConfig` is one."""

    @property
    def message_examples_max(self) -> int: ...

    @property
    def history_max(self) -> int: ...

    @property
    def text_dim(self) -> int: ...


def new_examples(sizes: Sizes, seen_max: int = SEEN_MAX) -> Examples:
    """A zeroed buffer for one message; `count` is 0."""
    b, length = sizes.message_examples_max, sizes.history_max
    return Examples(
        count=0,
        item=np.zeros(b, np.int64),
        label=np.zeros(b, np.int8),
        ts=np.zeros(b, np.float64),
        bucket=np.zeros(b, np.uint8),
        source=np.zeros(b, np.int64),
        history_count=np.zeros(b, np.int32),
        history_item=np.zeros((b, length), np.int64),
        history_ts=np.zeros((b, length), np.float64),
        history_weight=np.zeros((b, length), np.float32),
        text_on=np.zeros(b, np.bool_),
        text=np.zeros((b, sizes.text_dim), np.float32),
        text_weight=np.zeros(b, np.float32),
        ranked=np.zeros(b, np.bool_),
        seen_start=np.zeros(b + 1, np.int32),
        seen=np.zeros(seen_max, np.int64),
    )
