"""Unlearning: the item state after a removal is that of an examples log which never held the user's examples."""

import random
from collections.abc import AsyncIterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from model.learner import LearnerConfig
from state import rows
from state.changelog import LogRecord
from streams import examples, pipeline
from streams.agents import LearnerKeeper
from streams.answers import ModelUnlearnt
from streams.events import Click, Comment, Item
from streams.examples import CLICKS, COMMENTS
from streams.pipeline import EvidenceConfig, ItemLearner, Replica, SourceEvent, split_key
from streams.space import Encoders

DIM = 24
CONFIG = LearnerConfig(text_dim=DIM, dim=8, negatives=16, neighbours_max=16)
EVIDENCE = EvidenceConfig(rank_sample=0.3)
FORGOTTEN = "forgotten"
PARTITIONS = 2
BATCHES = 12


def unit(seed: int) -> Any:
    vector = np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)
    return vector / np.linalg.norm(vector)


class Stream:
    """Batches of events of two partitions. Every batch makes one message a partition, with or without one user."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self.items = pipeline.learn_catalogue(
            0, [(n, Item(f"i{n}", f"item {n}", ts=float(n % 40)), unit(n)) for n in range(30)], DIM
        ).messages  # fmt: skip
        self.batches: list[tuple[int, list[SourceEvent]]] = []
        self.positions: dict[int, list[int]] = {0: [], 1: []}
        ends = {(p, t): 0 for p in range(PARTITIONS) for t in (CLICKS, COMMENTS)}
        for batch in range(BATCHES):
            for partition in range(PARTITIONS):
                users = [f"{partition}-{n}" for n in range(5)]
                events = [self._event(f"{partition}-new{batch}", batch, partition, CLICKS, ends, rng)]
                for _ in range(20):
                    user = FORGOTTEN if partition == 1 and rng.random() < 0.2 else rng.choice(users)
                    topic = COMMENTS if rng.random() < 0.2 else CLICKS
                    events.append(self._event(user, batch, partition, topic, ends, rng))
                self.batches.append((partition, events))

    def _event(
        self, user: str, batch: int, partition: int, topic: int, ends: dict[tuple[int, int], int], rng: random.Random
    ) -> SourceEvent:  # fmt: skip
        offset = ends[partition, topic]
        ends[partition, topic] += 1
        item, ts = f"i{rng.randrange(35)}", 5.0 * batch + rng.random()
        if user == FORGOTTEN:
            self.positions[partition].append(rows.position(topic, offset))
        if topic == COMMENTS:
            return SourceEvent(topic, offset, Comment(user, "words", item, ts), unit(offset))
        return SourceEvent(topic, offset, Click(user, item, "click", 1.0, ts))

    def log(self, *, without: str | None = None) -> list[bytes]:
        """The examples log; `without`: of a stream that never held this user."""
        state: dict[bytes, Any] = {}
        messages = list(self.items)
        for partition, events in self.batches:
            kept = [e for e in events if e.event.user_id != without]
            batch = pipeline.learn_users(partition, kept, lambda keys: [state.get(k) for k in keys], EVIDENCE)
            state.update(batch.rows)
            assert len(batch.messages) == 1, "the boundaries of the messages are the same with and without the user"
            messages += batch.messages
        return messages

    def removal(self) -> list[bytes]:
        return examples.chained(examples.pack_removals(1, 7, np.array(self.positions[1], np.int64)))


def learnt(log: list[bytes], learner: ItemLearner | None = None, start: int = 0) -> ItemLearner:
    learner = learner or ItemLearner(CONFIG, DIM)
    for offset, message in enumerate(log[start:], start):
        learner.learn(offset, message)
    return learner


@pytest.mark.parametrize("seed", range(4))
def test_a_state_learnt_again_equals_that_of_a_stream_that_never_held_the_user(seed: int) -> None:
    stream = Stream(seed)
    whole, never = stream.log(), stream.log(without=FORGOTTEN)
    (removal,) = stream.removal()
    learner = learnt(whole)
    before = learner.learner.digest()
    assert learner.learn(len(whole), removal).ends_removal
    assert learner.owes_replay and learner.asked == [(1, 7)]
    assert learner.learner.digest() == before, "until it has been learnt again, the state stays as it is"
    again = learnt(whole, learner.again())
    assert not again.owes_replay
    assert again.left_out[0] > 0
    expected = learnt(never)
    assert again.learner.digest() == expected.learner.digest() != before
    again.settled(len(whole))
    more = stream.batches[0][0], [SourceEvent(CLICKS, 10_000, Click("late", "i3", "click", 1.0, 100.0))]
    (message,) = pipeline.learn_users(*more, lambda keys: [None for _ in keys], EVIDENCE).messages
    again.learn(len(whole) + 1, message)
    expected.learn(len(whole) + 1, message)
    assert again.learner.digest() == expected.learner.digest(), "and it goes on as that stream would"


def test_the_examples_that_are_left_out_are_the_users_and_no_others() -> None:
    stream = Stream(5)
    cut = {int(p) for p in stream.positions[1]}
    learner = ItemLearner(CONFIG, DIM)
    learner.remove(stream.removal()[0])
    learnt(stream.log(), learner)
    users = {(e.topic, e.offset) for p, events in stream.batches if p for e in events if e.event.user_id == FORGOTTEN}
    assert {rows.position(*place) for place in users} == cut
    without, whole = stream.log(without=FORGOTTEN), stream.log()
    count = [sum(examples.read_header(m)[2] for m in log) for log in (whole, without)]
    assert learner.left_out[0] == count[0] - count[1]


def test_a_removal_is_part_of_the_learners_rows_and_survives_a_restart_before_it_has_its_effect() -> None:
    stream = Stream(2)
    whole = stream.log()
    removals = examples.pack_removals(1, 7, np.array(stream.positions[1], np.int64))
    learner = learnt(whole)
    assert not learner.learn(len(whole), removals[0]).ends_removal
    stored = {key: value for key, value in learner.take_dirty().items() if value is not None}
    restarted = ItemLearner(CONFIG, DIM)
    restarted.load(stored.items())
    assert restarted.owes_replay and restarted.asked == [(1, 7)]
    last = examples.chained(examples.pack_removals(1, 8, examples.NOTHING))[0]
    assert restarted.learn(len(whole) + 1, last).ends_removal
    assert restarted.asked == [(1, 7), (1, 8)]
    again = learnt(whole, restarted.again())
    assert again.learner.digest() == learnt(stream.log(without=FORGOTTEN)).learner.digest()


@pytest.mark.parametrize("trained_on", ["", "the logs of app id app"])
async def test_a_certificate_names_an_encoder_that_may_have_learnt_from_the_user(trained_on: str) -> None:
    """From whom no event is known, it cannot have learnt."""
    stream = Stream(6)
    whole = stream.log()
    log = [LogRecord(offset, b"", message) for offset, message in enumerate(whole)]
    told: dict[str, ModelUnlearnt] = {}

    async def read(stop: int) -> AsyncIterator[list[LogRecord]]:
        yield log[: stop + 1]

    async def begin() -> int:
        return 0

    async def write_model(name: str, model: ModelUnlearnt) -> None:
        told[name] = model

    async def flush(*_: Any) -> None:
        pass

    encoder: Any = SimpleNamespace(name="monday:1", trained_on=trained_on)
    around: Any = SimpleNamespace(
        now=lambda: 0.0, merge_hold_s=0.0, flush_linger_s=0.0, encoders=Encoders(encoder, lambda _: encoder),
        metrics=SimpleNamespace(stage=lambda _: nullcontext()),
        reach=SimpleNamespace(examples_begin=begin, examples=read), book=SimpleNamespace(write_model=write_model),
    )  # fmt: skip
    partition: Any = SimpleNamespace(applied={"examples": -1}, items=list, flush=flush)
    keeper = LearnerKeeper(0, partition, {}, around, lambda: ItemLearner(CONFIG, DIM), 1.0, 0.0, 100)
    learnt(whole, keeper.learner)
    nobody = examples.chained(examples.pack_removals(1, 8, examples.NOTHING))
    for offset, message in enumerate((*stream.removal(), *nobody), len(whole)):
        keeper.learner.learn(offset, message)
        assert await keeper._unlearn(offset)
        log.append(LogRecord(offset, b"", message))
    await keeper._flushed()
    user, other = (told[f"erasures:1:{offset}"] for offset in (7, 8))
    assert user.removed and other.exact
    assert (user.exact, user.reason) == (True, None) if not trained_on else not user.exact
    assert not trained_on or all(words in str(user.reason) for words in ("monday:1", trained_on))
    assert user.digest == learnt(stream.log(without=FORGOTTEN)).learner.digest()


def test_a_repeated_removal_owes_nothing() -> None:
    stream = Stream(3)
    whole = stream.log()
    (removal,) = stream.removal()
    learner = learnt(whole)
    learner.learn(len(whole), removal)
    again = learnt(whole, learner.again())
    again.settled(len(whole))
    assert again.learn(len(whole) + 1, removal).ends_removal
    assert not again.owes_replay


def test_a_replica_changes_to_the_state_learnt_again_at_once_whatever_compaction_has_left() -> None:
    stream = Stream(4)
    whole = stream.log()
    learner = learnt(whole)
    replica = Replica(CONFIG)
    held = replica.matrix
    first = learner.take_dirty()
    replica.prepare(dict(first))()
    assert replica.matrix.digest() == learner.learner.digest()
    learner.learn(len(whole), stream.removal()[0])
    again = learnt(whole, learner.again())
    again.settled(len(whole))
    swap: dict[bytes, bytes | None] = dict.fromkeys(first) | again.take_dirty()
    assert {split_key(key)[0] for key, value in swap.items() if value is not None} == {1}
    replica.prepare(dict(swap))()
    assert replica.matrix is held, "whoever holds the matrix sees the new state"
    assert held.digest() == again.learner.digest()
    late = Replica(CONFIG)
    late.prepare({key: value for key, value in first.items() if key[:1] in b"sg"})()  # the rest is compacted away
    late.prepare(dict(swap))()
    assert late.matrix.digest() == again.learner.digest()
    loaded = ItemLearner(CONFIG, DIM)
    loaded.load((key, value) for key, value in sorted(swap.items()) if value is not None)
    assert loaded.generation == 1
    assert loaded.learner.digest() == again.learner.digest()
    assert loaded.removed[1].tolist() == again.removed[1].tolist()


def test_removals_are_cut_into_messages_and_read_back() -> None:
    positions = np.arange(examples.REMOVALS_MAX + 5)
    messages = examples.chained(examples.pack_removals(3, 9, positions))
    removals = [examples.unpack_removal(m) for m in messages]
    assert [r.more for r in removals] == [True, False]
    assert {(r.partition, r.erasure) for r in removals} == {(3, 9)}
    assert np.concatenate([r.positions for r in removals]).tolist() == positions.tolist()
    with pytest.raises(ValueError, match="removal"):
        examples.unpack_removal(messages[1][:-1])


def test_golden_bytes_of_a_removal() -> None:
    (message,) = examples.chained(examples.pack_removals(3, 9, np.array([5, 1 << 56], np.int64)))
    assert message.hex() == "0104030002000000" + "09" + 7 * "00" + "05" + 7 * "00" + 7 * "00" + "01"


def test_the_whole_rank_sample_stays_the_same_where_others_are_left_out() -> None:
    stream = Stream(6)
    learner = ItemLearner(replace(CONFIG, seed=3), DIM)
    learner.remove(stream.removal()[0])
    ranked = [one.outcome for one in (learner.learn(n, m) for n, m in enumerate(stream.log())) if one.outcome]
    straight = ItemLearner(replace(CONFIG, seed=3), DIM)
    log = stream.log(without=FORGOTTEN)
    expected = [one.outcome for one in (straight.learn(n, m) for n, m in enumerate(log)) if one.outcome]
    for one, other in zip(ranked, expected, strict=True):
        np.testing.assert_array_equal(one.rank, other.rank)
