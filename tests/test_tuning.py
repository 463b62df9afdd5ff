"""The loop of candidates, shadow, switch and watch, on a stream whose tastes a candidate can find."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from model.adapter import AdapterError
from model.examples import new_examples
from model.finetune import Finetuning, Replay, loss_of
from streams import examples
from streams.pipeline import ItemLearner
from streams.tuning import Decision, Tuning
from tests.tuning_world import BASE, DIM, LEARNER, TUNING, harmful, messages, planted

MESSAGES = 90
ROLLBACK_EXAMPLES_MAX = 1500  # the promise of the test: a planted regression lasts no longer
POISONED = 20


def new_tuning(**changes: Any) -> Tuning:
    return Tuning(BASE, DIM, LEARNER, replace(TUNING, **changes))


def run(tuning: Tuning, log: list[bytes], start: int = 0, obey: bool = True) -> list[Decision]:
    """Feeds the log; where `obey`, what the loop asks for is put into the log at once."""
    decided = []
    for offset, message in enumerate(log[start:], start):
        decided += tuning.advance(2 * offset, message)
        request = tuning.request()
        if obey and request is not None:
            decided += tuning.advance(2 * offset + 1, request)
    return decided


@pytest.fixture(scope="module")
def log() -> list[bytes]:
    return list(messages(MESSAGES))


@pytest.fixture(scope="module")
def middle(log: list[bytes]) -> bytes:
    """The loop after half of the log, without candidates so far."""
    tuning = new_tuning(round_examples=1 << 40)
    run(tuning, log[: len(log) // 2])
    assert tuning.replay.examples > TUNING.examples_min
    return tuning.save()


def resumed(middle: bytes) -> Tuning:
    tuning = new_tuning(round_examples=1 << 40)
    tuning.load(middle)
    return tuning


def test_loop_finds_the_tastes_promotes_and_keeps(log: list[bytes]) -> None:
    decided = run(new_tuning(), log)
    kinds = [one.kind for one in decided]
    assert kinds[:4] == ["candidate", "promote", "switched", "kept"]
    candidate, promote = decided[0], decided[1]
    assert candidate.facts["loss"] < candidate.facts["loss_frozen"] - 0.3
    assert promote.adapter == candidate.adapter and promote.facts["verdict"] == "better"
    assert promote.facts["log10_e_better"] >= -np.log10(promote.facts["alpha"])
    again = run(new_tuning(), log)
    assert [(d.kind, d.position, d.facts) for d in again] == [(d.kind, d.position, d.facts) for d in decided]


def test_a_stopped_loop_goes_on_as_if_nothing_had_been(log: list[bytes]) -> None:
    """Stopped in every phase: while it gathers, in shadow, asked and under watch."""
    whole, stopped = new_tuning(), new_tuning()
    phases = set()
    for offset, message in enumerate(log):
        expected = whole.advance(2 * offset, message)
        if offset % 7 == 0 or stopped.phase != "gather":
            phases.add(stopped.phase)
            saved, stopped = stopped.save(), new_tuning()
            stopped.load(saved)
        got = stopped.advance(2 * offset, message)
        assert [d.facts for d in got] == [d.facts for d in expected]
        request = whole.request()
        assert stopped.request() == request
        if request is not None:
            phases.add(stopped.phase)
            saved, stopped = stopped.save(), new_tuning()
            stopped.load(saved)
            whole.advance(2 * offset + 1, request)
            stopped.advance(2 * offset + 1, request)
    assert phases == {"gather", "shadow", "asked", "watch"}
    assert whole.save() == stopped.save()
    with pytest.raises(ValueError, match="another version, encoder or configuration"):
        new_tuning(shadow_tests=7).load(whole.save())


def test_candidates_of_shuffled_labels_are_never_promoted(log: list[bytes], middle: bytes) -> None:
    promoted = 0
    for seed in range(POISONED):
        tuning = resumed(middle)
        rng = np.random.default_rng(seed)
        problems = [
            p._replace(target=rng.choice(p.candidate, len(p.target)))  # the positive label on any of the candidates
            for p in tuning.replay.problems()
        ]
        e = tuning.champion.learner.matrix.arrays.e
        poisoned = Finetuning(BASE, problems, e, replace(TUNING.finetune, seed=seed))
        for _ in poisoned.steps():
            pass
        tuning.challenge(poisoned.adapter)
        promoted += any(d.kind == "promote" for d in run(tuning, log, len(log) // 2))
    assert promoted == 0


def test_a_better_candidate_is_promoted(log: list[bytes], middle: bytes) -> None:
    tuning = resumed(middle)
    tuning.challenge(planted())
    decided = run(tuning, log, len(log) // 2)
    assert [d.kind for d in decided][:2] == ["promote", "switched"]
    assert tuning.current is not None and tuning.current.name == planted().name


def test_a_regression_is_taken_back(log: list[bytes], middle: bytes) -> None:
    """The log switches to a worse adapter, whoever wanted it: the loop asks for the predecessor within its promise."""
    tuning = resumed(middle)
    start = len(log) // 2
    better = examples.pack_adapter(planted(), taken_back=True)
    tuning.advance(2 * start - 2, better)
    assert tuning.phase == "gather"  # what was taken back is not watched
    tuning.advance(2 * start - 1, examples.pack_adapter(harmful()))
    learnt = tuning.examples
    for offset, message in enumerate(log[start:], start):
        decided = tuning.advance(2 * offset, message)
        if decided:
            break
    assert [d.kind for d in decided] == ["rollback"]
    assert tuning.examples - learnt <= ROLLBACK_EXAMPLES_MAX
    request = tuning.request()
    assert request is not None
    adapter, taken_back = examples.unpack_adapter(request)
    assert taken_back and adapter is not None and adapter.name == planted().name
    [switched] = tuning.advance(2 * offset + 1, request)
    assert switched.facts == {"taken_back": True} and tuning.phase == "gather" and tuning.request() is None
    assert tuning.advance(2 * offset + 2, request) == []  # a repeat changes nothing


def test_a_candidate_that_nobody_decides_on_is_dropped(log: list[bytes], middle: bytes) -> None:
    """By a switch to another one: while it is in shadow, and while it waits for its own switch."""
    for phase in ("shadow", "asked"):
        tuning = resumed(middle)
        tuning.challenge(planted())
        offset = len(log) // 2
        while tuning.phase != phase:
            tuning.advance(2 * offset, log[offset])
            offset += 1
        decided = tuning.advance(2 * offset, examples.pack_adapter(harmful()))
        assert [(d.kind, d.adapter and d.adapter.name) for d in decided] == [
            ("drop", planted().name), ("switched", harmful().name)
        ]  # fmt: skip
        assert decided[0].facts == {"switched_to": harmful().name} and tuning.request() is None


def test_an_adapter_of_another_encoder_is_refused() -> None:
    learner = ItemLearner(LEARNER, DIM, "encoder:2")
    with pytest.raises(AdapterError, match="encoder:1"):
        learner.learn(0, examples.pack_adapter(planted()))
    learner.learn(0, examples.pack_adapter(replace(planted(), base="encoder:2")))
    assert learner.learner.matrix.adapter is not None


def test_gradients_are_those_of_the_loss(middle: bytes) -> None:
    tuning = resumed(middle)
    problem = tuning.replay.problems()[-1]
    e = tuning.champion.learner.matrix.arrays.e.astype(np.float64)
    problem = problem._replace(words=problem.words.astype(np.float64), offset=problem.offset.astype(np.float64))
    rounds = Finetuning(BASE, [problem], e, replace(TUNING.finetune, decay=0.05))
    rng = np.random.default_rng(1)
    values: dict[str, Any] = {name: rng.standard_normal(v.shape) * 0.3 for name, v in rounds._values.items()}
    rounds._values = values

    def objective() -> float:
        return rounds._gradients(problem)[0] + 0.05 * float(((values["left"] @ values["right"].T) ** 2).sum())

    _, gradients = rounds._gradients(problem)
    for name, gradient in gradients.items():
        direction = rng.standard_normal(gradient.shape)
        step = 1e-3
        values[name] += step * direction
        above = objective()
        values[name] -= 2 * step * direction
        below = objective()
        values[name] += step * direction
        slope = (above - below) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=0.02, abs=1e-3)


def test_training_is_a_function_of_problems_and_seed(middle: bytes) -> None:
    tuning = resumed(middle)
    one, facts = tuning.train()
    other, _ = tuning.train()
    assert one.pack() == other.pack()
    problems, e = tuning.replay.problems(), tuning.champion.learner.matrix.arrays.e
    assert facts["loss"] == pytest.approx(loss_of(one, problems, e)) and facts["loss"] < facts["loss_frozen"]


def test_candidates_are_of_each_length_in_turn(middle: bytes) -> None:
    tuning = resumed(middle)
    tuning.config = replace(tuning.config, lengths=(1.0, 3.0))
    trained, _ = tuning.train()
    tuning.config = replace(tuning.config, lengths=(3.0, 1.0))
    longer, facts = tuning.train()
    assert longer.scale == pytest.approx(3 * trained.scale) == facts["scale"]
    assert np.array_equal(longer.left, trained.left) and np.array_equal(longer.right, trained.right)
    tuning.rounds += 1
    assert tuning.train()[0].scale < longer.scale / 2


def test_replay_is_a_bounded_sample_whatever_came_first(middle: bytes) -> None:
    problem = resumed(middle).replay.problems()[0]
    forward, backward = Replay(16, 8), Replay(16, 8)
    for position in range(200):
        forward.offer(position, problem)
        backward.offer(199 - position, problem)
    assert sorted(forward.kept) == sorted(backward.kept) and len(forward) == 16
    assert 60 < np.mean(sorted(forward.kept)) < 140
    assert len(forward.problems()[0].candidate) <= 8


def test_a_removal_begins_again_without_what_it_names(log: list[bytes]) -> None:
    """Neither the champion nor the replay keeps anything of the removed examples."""
    tuning = new_tuning(round_examples=1 << 40)
    run(tuning, log)
    first = next(m for m in log if examples.read_header(m)[0] == examples.KIND_EXAMPLES)
    _, partition, count = examples.read_header(first)
    sources = new_examples(LEARNER)
    examples.unpack_examples(first, sources, np.full(len(examples.TOPICS), -1, np.int64))
    removed = sources.source[:count].copy()
    (removal,) = examples.chained(examples.pack_removals(partition, 1, removed))
    assert not tuning.owes_replay
    tuning.advance(2 * len(log), removal)
    assert tuning.owes_replay
    tuning.challenge(planted())
    assert [(d.kind, d.facts) for d in tuning.abandoned({"reason": "removal"})] == [("drop", {"reason": "removal"})]
    rounds, seen, tuning = tuning.rounds, tuning.examples, tuning.again()
    assert tuning.rounds == rounds > 0, "its candidates count on: they share one alpha"
    assert tuning.offset == -1
    run(tuning, [*log, removal])
    assert not tuning.owes_replay
    assert tuning.examples == seen - count
    assert tuning.champion.offset == 2 * len(log)
    saved = new_tuning(round_examples=1 << 40)
    saved.load(tuning.save())
    saved.advance(2 * len(log) + 1, removal)
    assert not saved.owes_replay, "what was removed is known after a stop too"
