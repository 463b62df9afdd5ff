"""The loop that tunes the encoder's adapter, on against frozen, prequentially on a recorded stream.

Both sides run the same learner over the same messages; on the tuned side a candidate is trained on the past, judged
in shadow by the gate and switched to when it wins. Then the gate itself is tried, from the middle of the stream on:
candidates trained on shuffled targets, a candidate that is better, and a promotion that makes things worse.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from scipy.stats import binomtest

from model.adapter import Adapter
from model.finetune import Finetuning
from model.learner import warm_up
from streams import evaluate, examples, settings
from streams.pipeline import Learnt
from streams.tuning import Tuning, TuningConfig

POISONED: Final = 20
NOISE: Final = 6.0  # length of a planted damage against the identity's
TOP: Final = 10


def run(args: list[str]) -> dict[str, Any]:
    """Measures on --items and --events."""
    parser = argparse.ArgumentParser(prog="python -m bench finetune", description=__doc__)
    parser.add_argument("--items", type=Path, required=True)
    parser.add_argument("--events", type=Path, required=True)
    parser.add_argument("--until", type=int, help="only about so many events")
    parser.add_argument("--round-examples", type=int, default=TuningConfig.round_examples)
    parser.add_argument("--poisoned", type=int, default=POISONED)
    options = parser.parse_args(args)
    from model.encoder import Encoder

    chosen = settings.load()
    encoder = Encoder(chosen.encoder, device=chosen.device)
    stream = evaluate.read_stream(options.items, options.events, chosen.evidence_config())
    config = TuningConfig(round_examples=options.round_examples)
    learner = replace(chosen.learner_config(encoder.dim), rank_items=0)
    warm_up(learner)

    def new_run() -> evaluate.Run:
        fresh = evaluate.Run(stream, encoder, chosen.evidence_config(), learner)
        fresh.encode(options.until, settings.cache_dir() / "vectors", lambda *_: None)
        return fresh

    frozen = new_run()
    frozen_s = _timed(lambda: frozen.advance(options.until, lambda *_: None))
    tuned = new_run()
    loop = _Looped(Tuning(encoder.name, encoder.dim, learner, config))
    tuned.learner = loop  # type: ignore[assignment]
    tuned_s = _timed(lambda: tuned.advance(options.until, lambda *_: None))
    result = {
        "stream": stream.name, "events": tuned.done, "encoder": encoder.name,
        "frozen": frozen.metrics().report(), "tuned": tuned.metrics().report(), **_compared(frozen, tuned),
        "decisions": loop.decisions,
        "training_cpu_s_per_1k_examples": round(1e3 * (tuned_s - frozen_s) / max(1, loop.tuning.examples), 3),
    }  # fmt: skip
    return {**result, **_tried(loop, Tuning(encoder.name, encoder.dim, learner, config), options.poisoned)}


def _timed(work: Any) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


class _Looped:
    """A learner for `evaluate.Run` that is the loop's champion, and does at once what the loop asks for."""

    def __init__(self, tuning: Tuning) -> None:
        self.tuning = tuning
        self.messages: list[bytes] = []
        self.decisions: list[dict[str, Any]] = []

    @property
    def learner(self) -> Any:
        return self.tuning.champion.learner

    def learn(self, offset: int, message: bytes) -> Learnt:
        self.messages.append(message)
        decided = self.tuning.advance(offset, message)
        learnt = self.tuning.learnt
        assert learnt is not None
        request = self.tuning.request()
        if request is not None:
            decided += self.tuning.advance(offset, request)
        for one in decided:
            facts = {name: round(fact, 4) if isinstance(fact, float) else fact for name, fact in one.facts.items()}
            self.decisions.append(
                {"kind": one.kind, "position": one.position, "at_examples": self.tuning.examples, **facts}
            )
        return learnt


def _compared(frozen: evaluate.Run, tuned: evaluate.Run) -> dict[str, Any]:
    """McNemar's exact test on the hits, and the mean difference of the gains over its standard error."""
    tests = np.flatnonzero(~np.isnan(frozen.rank) & ~np.isnan(tuned.rank))
    hit, hit_tuned = frozen.rank[tests] <= TOP, tuned.rank[tests] <= TOP
    up, down = int((hit_tuned & ~hit).sum()), int((hit & ~hit_tuned).sum())
    gain = _ndcg(tuned.rank[tests]) - _ndcg(frozen.rank[tests])
    z = float(gain.mean() / (gain.std() / np.sqrt(len(gain)))) if gain.any() else 0.0
    p = float(binomtest(up, up + down).pvalue) if up + down else 1.0
    return {"p_value": p, "hits_won": up, "hits_lost": down, "ndcg_z": round(z, 2)}


def _ndcg(rank: Any) -> Any:
    return np.where(rank <= TOP, 1 / np.log2(1 + rank), 0.0)


def _tried(loop: _Looped, tuning: Tuning, poisoned: int) -> dict[str, Any]:
    """Poisoned, better and worse adapters, each from the same middle of the stream."""
    middle = len(loop.messages) // 2
    gathering = replace(tuning.config, round_examples=1 << 60)
    tuning.config = gathering
    for offset, message in enumerate(loop.messages[:middle]):
        tuning.advance(offset, message)
    saved = tuning.save()
    rest = loop.messages[middle:]
    promoted = 0
    for seed in range(poisoned):
        tuning.load(saved)
        tuning.challenge(_poisoned(tuning, seed))
        promoted += _until_decided(tuning, middle, rest)[0] == "promote"
    tuning.load(saved)
    damage = _damage(tuning)
    tuning.advance(middle, examples.pack_adapter(damage, taken_back=True))
    tuning.challenge(Adapter(tuning.base, np.zeros_like(damage.left), damage.right))
    better = _until_decided(tuning, middle, rest)
    tuning.load(saved)
    tuning.advance(middle, examples.pack_adapter(damage))
    worse = _until_decided(tuning, middle, rest)
    return {
        "poisoned_candidates": poisoned, "poisoned_promoted": promoted,
        "planted_promoted": better[0] == "promote", "planted_promoted_after": better[1],
        "regression_rolled_back_after": worse[1] if worse[0] == "rollback" else None,
    }  # fmt: skip


def _until_decided(tuning: Tuning, first: int, messages: list[bytes]) -> tuple[str, int]:
    """(kind of the first verdict, or none; examples learnt until then)."""
    start = tuning.examples
    for offset, message in enumerate(messages, first):
        for decision in tuning.advance(offset, message):
            return decision.kind, tuning.examples - start
    return "none", tuning.examples - start


def _poisoned(tuning: Tuning, seed: int) -> Adapter:
    """Trained on shuffled labels: the positive is any of the candidates."""
    rng = np.random.default_rng(seed)
    problems = [
        problem._replace(target=rng.choice(problem.candidate, len(problem.target)))
        for problem in tuning.replay.problems()
    ]
    config = replace(tuning.config.finetune, seed=seed)
    poisoned = Finetuning(tuning.base, problems, tuning.champion.learner.matrix.arrays.e, config)
    for _ in poisoned.steps():
        pass
    return poisoned.adapter


def _damage(tuning: Tuning) -> Adapter:
    """A random map of the texts: half of what they tell is lost."""
    rank, dim = tuning.config.finetune.rank, tuning.text_dim
    draw = np.random.default_rng(0).standard_normal((2, dim, rank)) / np.sqrt(dim)
    return Adapter(tuning.base, (NOISE * draw[0]).astype(np.float32), (NOISE * draw[1]).astype(np.float32), 2.0)
