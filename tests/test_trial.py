"""A trial: users split by a hash, both arms in one model, each by its own metric wherever texts are compared."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from model.adapter import Adapter, AdapterError
from model.examples import Examples
from model.items import ItemMatrix
from model.learner import Learner
from model.profile import User
from model.ranker import Ranker
from model.trial import BUCKETS, Trial, bucket_of
from streams import examples, pipeline
from streams.events import Click
from streams.pipeline import ItemLearner, Replica
from tests.model_stream import SMALL, START_TS, enter_all, stream, vector_of
from tests.test_adapter import DIM, adapter_of
from tests.test_tuning import new_tuning
from tests.tuning_world import BASE, LEARNER, messages, planted
from tests.tuning_world import DIM as TUNED_DIM

SALT = 17


def bucketed(messages: int, seed: int = 0) -> Iterator[Examples]:
    """The stream, its examples in buckets."""
    for number, x in enumerate(stream(SMALL, messages, seed)):
        x.bucket[:] = np.random.default_rng((seed, number)).integers(BUCKETS, size=len(x.bucket))
        yield x


def learnt(*steps: Callable[[Learner], object]) -> Learner:
    """A learner of ten messages before and ten after the steps."""
    learner = Learner(SMALL)
    enter_all(learner)
    for position, x in enumerate(bucketed(20)):
        if position == 10:
            for step in steps:
                step(learner)
        learner.learn(x, position)
    return learner


def numbers_of(learner: Learner) -> dict[bytes, bytes]:
    """The state without the rows that say what texts are compared through."""
    return {key: value for key, value in learner.matrix.rows() if key not in (b"a", b"b")}


def test_split_is_a_function_of_the_id_and_drawn_anew_by_each_trial() -> None:
    first, again, second = (Trial(None, 0.3, salt).arms() for salt in (SALT, SALT, SALT + 1))
    assert (first == again).all() and first.sum() == second.sum() == 77
    assert 10 < (first & second).sum() < 40, "some 23 of the first's challengers are the second's"
    users = np.array([bucket_of(f"user-{n}") for n in range(20_000)])
    assert abs(first[users].mean() - 77 / 256) < 0.015
    assert np.bincount(users, minlength=BUCKETS).min() > 30
    assert Trial(None, 1e-4, 0).arms().sum() == 1 and Trial(None, 0.9999, 0).arms().sum() == BUCKETS - 1


def test_pack_round_trip_and_refusals() -> None:
    for adapter in (None, adapter_of(1)):
        trial = Trial(adapter, 0.4, SALT)
        again = Trial.unpack(trial.pack())
        assert (again.pack(), again.name, again.share, again.salt) == (trial.pack(), trial.name, trial.share, SALT)
        told = examples.unpack_trial(examples.pack_trial(adapter, 0.4), SALT)
        assert told is not None and told.pack() == trial.pack()
    for share in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(AdapterError, match="share"):
            Trial(None, share, 0)
    with pytest.raises(AdapterError, match="version 9"):
        Trial.unpack(b"\x09" + Trial(None, 0.5, 1).pack()[1:])
    with pytest.raises(AdapterError, match="dimensions"):
        ItemMatrix(8, DIM + 1, 6).try_out(Trial(adapter_of(1), 0.5, 0))
    with pytest.raises(AdapterError, match="has 8 bytes"):
        examples.unpack_trial(examples.pack_trial(None, 0.5)[:8], 0)


@pytest.mark.parametrize("adapter", [None, adapter_of(2)])
def test_a_trial_of_the_champions_own_adapter_changes_nothing_but_its_row(adapter: Adapter | None) -> None:
    without = learnt(lambda learner: learner.adapt(adapter))
    within = learnt(
        lambda learner: learner.adapt(adapter), lambda learner: learner.try_out(Trial(adapter, 0.5, SALT))
    )  # fmt: skip
    assert numbers_of(within) == numbers_of(without)
    assert within.digest() != without.digest()


def test_challengers_are_learnt_through_the_challengers_metric_and_champions_through_their_own() -> None:
    """One message whose examples are all of one arm is learnt as by a learner of that arm's adapter alone."""
    champion, challenger = adapter_of(3), adapter_of(4, size=2.0)
    trial = Trial(challenger, 0.5, SALT)
    x = list(bucketed(11))[-1]
    for bucket in (int(np.flatnonzero(trial.arms())[0]), int(np.flatnonzero(trial.arms() == 0)[0])):
        of_arm = x._replace(bucket=np.full_like(x.bucket, bucket))
        states = []
        for own, on in ((champion, trial), (challenger if trial.arms()[bucket] else champion, None)):
            learner = Learner(SMALL)
            enter_all(learner)
            for position, before in enumerate(bucketed(10)):
                learner.learn(before, position)
            learner.adapt(own)
            learner.try_out(on)
            learner.learn(of_arm, 10)
            states.append(numbers_of(learner))
        assert states[0] == states[1]
    assert numbers_of(learnt(lambda learner: learner.try_out(trial))) != numbers_of(learnt())


def test_the_problem_of_a_message_takes_each_text_out_by_its_own_arm() -> None:
    learner = Learner(SMALL)
    enter_all(learner)
    trial = Trial(adapter_of(5, size=2.0), 0.5, SALT)
    learner.try_out(trial)
    arms = set()
    for position, x in enumerate(bucketed(12)):
        learner.learn(x, position)
        problem = learner.problem()
        if problem is None:
            continue
        m, w = learner.matrix.arrays, learner._work
        told = np.flatnonzero(w.go[: x.count] & w.words[: x.count].any(1))
        mine = trial.arms()[x.bucket[told]]
        arms |= set(mine.tolist())
        texts = np.where(mine[:, None] > 0, problem.words @ m.rival, problem.words)
        logits = w.logit[told, : len(problem.candidate)]
        open_ = logits > -1e29
        assert np.allclose((problem.offset + texts @ m.e[problem.candidate].T)[open_], logits[open_], atol=1e-3)
    assert arms == {0, 1}


def test_rows_carry_the_trial_and_its_end() -> None:
    learner = Learner(SMALL)
    enter_all(learner)
    replica = ItemMatrix(SMALL.dim, SMALL.text_dim, SMALL.neighbours_max)
    trial = Trial(adapter_of(6), 0.25, SALT)
    learner.try_out(trial)
    for position, x in enumerate(bucketed(6)):
        learner.learn(x, position)
    replica.apply(learner.take_dirty().items())
    assert replica.digest() == learner.digest() and replica.trial is not None
    assert (replica.arrays.arm == trial.arms()).all() and (replica.arrays.rival == learner.matrix.arrays.rival).all()
    again = Learner(SMALL)
    again.load(learner.matrix.rows())
    replica.reserve(5_000)
    assert replica.digest() == learner.digest()
    for position, x in enumerate(bucketed(3, seed=1), 6):
        learner.learn(x, position)
        again.learn(x, position)
    assert again.digest() == learner.digest()
    learner.try_out(None)
    changed = learner.take_dirty()
    assert changed[b"b"] is None
    replica.apply(changed.items())
    assert replica.digest() == learner.digest() and replica.trial is None and not replica.arrays.arm.any()
    assert b"b" not in learner.take_dirty()


def test_rankings_and_their_reasons_are_the_arms_own() -> None:
    champion, challenger = adapter_of(7), adapter_of(8, size=2.0)
    learner, trial = learnt(lambda learner: learner.adapt(champion)), Trial(challenger, 0.5, SALT)
    comments = np.stack([vector_of(101, DIM), vector_of(102, DIM)])
    weights = np.array([1, 0.9], np.float32)
    user = User(
        np.array([3, 7, 11]), np.array([START_TS + 90, START_TS + 80, START_TS]), np.ones(3, np.float32),
        (weights @ comments) / weights.sum(), float(weights.sum()), comments, weights,
    )  # fmt: skip
    ranker = Ranker(learner.matrix)

    def listed(bucket: int) -> list[tuple[int, float]]:
        ranking = ranker.rank(replace(user, bucket=bucket), START_TS + 100)
        found = ranking.top(5)
        for item, told in zip(found, ranking.explain(found), strict=True):
            parts = told.bias.total + sum(told.totals) + sum(told.comments) + told.rest
            assert parts == pytest.approx(item.logit, abs=1e-4)
        return [(item.key, item.logit) for item in found]

    theirs, ours = int(np.flatnonzero(trial.arms())[0]), int(np.flatnonzero(trial.arms() == 0)[0])
    as_it_was = listed(theirs)
    assert as_it_was == listed(ours)
    learner.try_out(trial)
    in_trial = listed(theirs)
    assert listed(ours) == as_it_was != in_trial
    assert (learner.matrix.arm_of(theirs), learner.matrix.arm_of(ours)) == ("challenger", "champion")
    learner.try_out(None)
    learner.adapt(challenger)
    assert listed(theirs) == in_trial
    assert learner.matrix.arm_of(theirs) is None


def test_examples_carry_their_users_bucket() -> None:
    """In the byte that was zero before there were trials: old messages are of bucket 0."""
    [entry, of_users] = list(messages(1))[:2]
    learner = ItemLearner(LEARNER, TUNED_DIM, BASE)
    learner.learn(0, entry)
    learner.learn(1, of_users)
    buffer = learner._buffers[0]
    count = examples.read_header(of_users)[2]
    expected = {bucket_of(f"u{n}") for n in range(40)}
    assert set(buffer.bucket[:count].tolist()) <= expected and len(set(buffer.bucket[:count].tolist())) > 15
    click = pipeline.SourceEvent(examples.CLICKS, 1, Click("u7", "i1", "click", ts=1e9))
    [message] = pipeline.learn_users(0, [click], lambda keys: [None], pipeline.EvidenceConfig()).messages
    assert message[examples.HEADER.size + 27] == bucket_of("u7") > 0


def test_a_trial_is_of_the_log_and_ends_by_its_own_message_or_a_switch() -> None:
    """The learner, one that learns the log again, one that loads the rows and a replica are one state all the time."""
    log = list(messages(6))
    log[4:4] = [examples.pack_trial(planted(), 0.5)]
    log[7:7] = [examples.pack_trial_end()]
    log[9:9] = [examples.pack_trial(None, 0.25)]
    log[11:11] = [examples.pack_adapter(planted())]
    learner, replica = ItemLearner(LEARNER, TUNED_DIM, BASE), Replica(LEARNER)
    told = []
    for offset, message in enumerate(log):
        done = learner.learn(offset, message)
        trial = learner.learner.matrix.trial
        told.append(None if trial is None else (trial.salt, trial.name))
        assert done.urgent == (message[1] == examples.KIND_ADAPTER)
        assert (done.challengers is not None) == (trial is not None and done.examples > 0)
        replica.prepare(learner.take_dirty())()
        assert replica.matrix.digest() == learner.learner.digest()
    assert told[4:12] == [(4, planted().name)] * 3 + [None] * 2 + [(9, "")] * 2 + [None]
    again = ItemLearner(LEARNER, TUNED_DIM, BASE)
    again.learn_many(list(enumerate(log[:6])))
    loaded = ItemLearner(LEARNER, TUNED_DIM, BASE)
    loaded.load(again.all_rows())
    for learner_of_rest in (again, loaded):
        learner_of_rest.learn_many(list(enumerate(log))[6:])
        assert learner_of_rest.learner.digest() == learner.learner.digest()
    with pytest.raises(AdapterError, match="texts are encoded by"):
        learner.learn(len(log), examples.pack_trial(replace(planted(), base="other:1"), 0.5))


def test_a_promotion_that_was_under_way_when_a_trial_began_waits_for_its_end() -> None:
    """The trainer had asked for it before the trial was in the log: every learner passes it over, and it is asked for
    again; a rollback does not yield."""
    tuning, learner, offset = new_tuning(), ItemLearner(LEARNER, TUNED_DIM, BASE), 0

    def take(message: bytes) -> list[str]:
        nonlocal offset
        learner.learn(offset, message)
        decisions = tuning.advance(offset, message)
        offset += 1
        return [decision.kind for decision in decisions]

    for message in messages(3):
        take(message)
    tuning.phase, tuning.wanted = "asked", planted()
    request = tuning.request()
    assert request is not None
    take(examples.pack_trial(None, 0.5))
    assert take(request) == [] and tuning.request() is None and tuning.phase == "asked"
    for matrix in (learner.learner.matrix, tuning.champion.learner.matrix):
        assert matrix.adapter is None and matrix.trial is not None
    take(examples.pack_trial_end())
    assert tuning.request() == request and take(request) == ["switched"]
    assert learner.learner.matrix.adapter is not None
    take(examples.pack_trial(None, 0.5))
    tuning.phase, tuning.wanted, tuning.taking_back = "asked", None, True
    back = tuning.request()
    assert back is not None and take(back) == ["switched"] and learner.learner.matrix.trial is None


def test_a_duel_learns_the_trial_and_leaves_its_challengers_tests_out() -> None:
    log = list(messages(30))
    on, off = new_tuning(), new_tuning()
    for tuning in (on, off):
        for offset, message in enumerate(log[:20]):
            tuning.advance(offset, message)
        tuning.challenge(replace(planted(), left=1e-3 * planted().left))  # nearly nothing: the duel goes on
    assert on.advance(20, examples.pack_trial(planted(), 0.5)) == []
    for offset, message in enumerate(log[20:], 21):
        on.advance(offset, message)
        off.advance(offset - 1, message)
    assert on.rival is not None and on.duel is not None and off.duel is not None
    assert on.rival.learner.matrix.trial is not None and on.champion.learner.matrix.trial is not None
    assert 0 < on.duel.better.tests < 0.8 * off.duel.better.tests
    plain = ItemLearner(on.champion.learner.config, TUNED_DIM, BASE)
    for offset, message in enumerate([*log[:20], examples.pack_trial(planted(), 0.5), *log[20:]]):
        plain.learn(offset, message)
    assert plain.learner.digest() == on.champion.learner.digest(), "the champion is the workers' learner"
    on.phase, on.wanted, on.taking_back = "asked", planted(), False
    assert on.request() is None, "a promotion would end the trial"
    on.taking_back = True
    assert on.request() == examples.pack_adapter(planted(), taken_back=True)
    on.advance(on.offset + 1, examples.pack_adapter(planted()))
    assert on.rival is not None and on.rival.learner.matrix.trial is None and on.current is not None
