"""Fine-tuning of the encoder's adapter on what the learner could not predict.

The loss is the recommender's own: the softmax cross-entropy of the positive against the message's shared candidates,
with everything the learner knows apart from texts (bias, phi, co-occurrence) as a fixed offset, so that the adapter
learns what only the texts can tell:

    s_bj = offset_bj + scale <W0 words_b, W0 e_j>,   W0 = I + left right'
    L = mean_b -ln p_b(target) + decay |left right'|^2

left starts at 0, so W starts at the identity; the penalty is on the map, not on its factors. AdamW's rule without its
decay (Kingma & Ba 2015). All in numpy, one thread: the same problems, seed and shapes give the same adapter.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from model import kernels
from model.adapter import SCALE_MAX, Adapter
from model.learner import Problem

Array = npt.NDArray[Any]

LOG_SCALE_MAX: Final = float(np.log(SCALE_MAX))
BETAS: Final = (0.9, 0.999)
EPSILON: Final = 1e-8


@dataclass(frozen=True)
class FinetuneConfig:
    """Sizes and steps; one default serves every stream. Figures: docs/decisions.md."""

    rank: int = 64  # R
    epochs: int = 10
    lr: float = 1e-3
    lr_scale: float = 5e-3
    decay: float = 0.1  # of |left right'|^2, in nats
    replay_messages: int = 256  # kept, 60 KB each: bounds memory and the time of a round
    candidates_max: int = 256  # of a message's
    seed: int = 1


class Replay:
    """At most `size` problems out of all that were offered: those with the lowest hash of their position.

    So it is a uniform sample of the whole past, and a function of the log alone.
    """

    def __init__(self, size: int, candidates_max: int) -> None:
        self.size, self.candidates_max = size, candidates_max
        self.kept: dict[int, Problem] = {}  # by position in the examples log

    def offer(self, position: int, problem: Problem) -> None:
        """Takes the problem in, shortened and in half precision, if its turn has come."""
        if len(self.kept) >= self.size:
            last = max(self.kept, key=_priority)
            if _priority(position) >= _priority(last):
                return
            del self.kept[last]
        self.kept[position] = _shortened(problem, self.candidates_max)

    def problems(self) -> list[Problem]:
        """In order of the log."""
        return [self.kept[position] for position in sorted(self.kept)]

    @property
    def examples(self) -> int:
        """Of all kept problems."""
        return sum(len(problem.words) for problem in self.kept.values())

    def __len__(self) -> int:
        return len(self.kept)


def _priority(position: int) -> bytes:
    return hashlib.blake2b(position.to_bytes(8, "little"), digest_size=8).digest()


def _shortened(problem: Problem, candidates_max: int) -> Problem:
    """Every k-th candidate, which then weighs for those that were left out."""
    step = -(-len(problem.candidate) // candidates_max)
    candidate = problem.candidate[::step].copy()
    weight = problem.log_weight + float(np.log(len(problem.candidate) / len(candidate)))
    offset = problem.offset[:, ::step].astype(np.float32)
    offset = np.where(offset <= kernels.CLOSED, np.float32(-np.inf), offset).astype(np.float16)
    words = problem.words.astype(np.float16)
    return Problem(words, problem.target, candidate, offset, problem.offset_target, weight)


class Step(NamedTuple):
    """One training step: a message's mean loss, nats, before it."""

    epoch: int
    loss: float


class Finetuning:
    """One round of training: `steps` yields after each message (some ms), `adapter` is what there is so far."""

    def __init__(self, base: str, problems: Sequence[Problem], e: Array, config: FinetuneConfig) -> None:
        """base: the encoder's name; e: (N, T) float32 vectors by the problems' rows."""
        self.base, self.config = base, config
        self._problems, self._e = problems, e
        dim = e.shape[1]
        rng = np.random.Generator(np.random.Philox(key=config.seed))
        right = rng.standard_normal((dim, config.rank)).astype(np.float32) / np.float32(np.sqrt(dim))
        self._values = {"left": np.zeros((dim, config.rank), np.float32), "right": right, "scale": np.zeros(1)}
        self._moments = {name: (np.zeros_like(v), np.zeros_like(v)) for name, v in self._values.items()}
        self._order = rng
        self._taken = 0

    @property
    def adapter(self) -> Adapter:
        """W = sqrt(scale) W0, so that <W x, W e> carries the scale once."""
        v = self._values
        return Adapter(self.base, v["left"].copy(), v["right"].copy(), float(np.exp(v["scale"][0] / 2)))

    def steps(self) -> Iterator[Step]:
        """Trains for the configured epochs, a message a step."""
        for epoch in range(self.config.epochs):
            for at in self._order.permutation(len(self._problems)).tolist():
                loss, gradients = self._gradients(self._problems[at])
                self._step(gradients)
                yield Step(epoch, loss)

    def _gradients(self, problem: Problem) -> tuple[float, dict[str, Array]]:
        left, right = self._values["left"], self._values["right"]
        gain = np.float32(np.exp(self._values["scale"][0]))
        words = problem.words.astype(np.float32)
        e = np.concatenate((self._e[problem.candidate], self._e[problem.target]))
        count, n = len(problem.candidate), len(words)
        words_low, e_low = words @ right, e @ right
        words_w, e_w = words + words_low @ left.T, e + e_low @ left.T
        product = words_w @ e_w[:count].T
        product_target = (words_w * e_w[count:]).sum(axis=1)
        own = problem.offset_target + gain * product_target
        others = problem.offset.astype(np.float32) + gain * product + np.float32(problem.log_weight)
        top = np.maximum(own, others.max(axis=1))
        p_others, p_own = np.exp(others - top[:, None]), np.exp(own - top)
        mass = p_own + p_others.sum(axis=1)
        loss = float(np.log(mass).mean() - (own - top).mean())
        g = p_others / (mass[:, None] * np.float32(n))
        g_own = (p_own / mass - 1) / np.float32(n)
        d_words = gain * (g @ e_w[:count] + g_own[:, None] * e_w[count:])
        d_e = gain * np.concatenate((g.T @ words_w, g_own[:, None] * words_w))
        decay = np.float32(2 * self.config.decay)
        return loss, {
            "left": d_words.T @ words_low + d_e.T @ e_low + decay * left @ (right.T @ right),
            "right": words.T @ (d_words @ left) + e.T @ (d_e @ left) + decay * right @ (left.T @ left),
            "scale": np.array([gain * ((g * product).sum() + (g_own * product_target).sum())]),
        }  # fmt: skip

    def _step(self, gradients: dict[str, Array]) -> None:
        self._taken += 1
        unbias = [1 - beta**self._taken for beta in BETAS]
        for name, gradient in gradients.items():
            mean, square = self._moments[name]
            mean += (1 - BETAS[0]) * (gradient - mean)
            square += (1 - BETAS[1]) * (gradient * gradient - square)
            lr = self.config.lr_scale if name == "scale" else self.config.lr
            self._values[name] -= lr * (mean / unbias[0]) / (np.sqrt(square / unbias[1]) + EPSILON)
        np.clip(self._values["scale"], -LOG_SCALE_MAX, LOG_SCALE_MAX, out=self._values["scale"])


def loss_of(adapter: Adapter | None, problems: Sequence[Problem], e: Array) -> float:
    """Mean loss of the problems' examples, nats, with texts compared through the adapter. NaN without problems."""
    total, examples = 0.0, 0
    for problem in problems:
        words = problem.words.astype(np.float32)
        moved = words if adapter is None else words @ adapter.metric()
        own = problem.offset_target + (moved * e[problem.target]).sum(axis=1)
        others = problem.offset.astype(np.float32) + moved @ e[problem.candidate].T + np.float32(problem.log_weight)
        top = np.maximum(own, others.max(axis=1))
        mass = np.exp(own - top) + np.exp(others - top[:, None]).sum(axis=1)
        total += float((np.log(mass) + top - own).sum())
        examples += len(words)
    return total / examples if examples else float("nan")
