"""Items' vectors of another encoder: kept apart, taken in at once, a function of the log."""

from typing import Any

import msgspec
import numpy as np
import pytest

from model.adapter import Adapter, AdapterError
from model.items import ItemMatrix
from model.learner import Learner
from streams import examples
from streams.examples import ItemEntry, Vectors
from streams.kafka import BATCH_BYTES_MAX
from streams.pipeline import ItemLearner, Replica
from streams.tuning import Tuning
from tests.tuning_world import BASE, DIM, LEARNER, TUNING, messages

MESSAGES = 24
OTHER = "other:1"


@pytest.fixture(scope="module")
def log() -> list[bytes]:
    return list(messages(MESSAGES))


def learnt(log: list[bytes]) -> ItemLearner:
    learner = ItemLearner(LEARNER, DIM, BASE)
    learner.learn_all(list(enumerate(log)))
    return learner


def moved_vectors(learner: ItemLearner, noise: float, seed: int = 3) -> list[tuple[int, bytes]]:
    """The items' vectors, as another encoder might have them after an alignment."""
    m = learner.learner.matrix.arrays
    rows = np.arange(len(learner.learner.matrix))
    new = m.e[rows] + noise * np.random.default_rng(seed).standard_normal((len(rows), DIM))
    new = (new / np.linalg.norm(new, axis=1, keepdims=True)).astype("<f2")
    return [(int(m.key[row]), new[row].tobytes()) for row in rows.tolist()]


def vectors_message(vectors: Any, number: int = 1, in_use: bool = False, encoder: str = OTHER) -> bytes:
    return examples.pack_vectors(Vectors(number, encoder, vectors), in_use)


def staged(learner: ItemLearner, noise: float) -> list[bytes]:
    vectors = moved_vectors(learner, noise)
    return [vectors_message(vectors[at : at + 16]) for at in range(0, len(vectors), 16)]


def copy_of(learner: ItemLearner) -> ItemLearner:
    fresh = ItemLearner(LEARNER, DIM, BASE)
    fresh.load(learner.all_rows())
    fresh.offset = learner.offset
    return fresh


def test_staged_vectors_change_nothing_until_they_are_in_use(log: list[bytes]) -> None:
    learner = learnt(log)
    before = learner.learner.digest()
    stage = staged(learner, 0.05)
    for n, message in enumerate(stage):
        assert not learner.learn(100 + n, message).urgent
    assert learner.learner.digest() == before and learner.encoder == BASE
    assert learner.learn(200, vectors_message([], in_use=True)).urgent
    assert learner.learner.digest() != before and (learner.number, learner.encoder) == (1, OTHER)
    expected = dict(moved_vectors(learnt(log), 0.05))
    m = learner.learner.matrix.arrays
    for row in range(len(learner.learner.matrix)):
        assert m.e[row].astype("<f2").tobytes() == expected[int(m.key[row])]
    assert np.allclose(m.mu, m.e[: len(learner.learner.matrix)].mean(axis=0), atol=1e-5)
    assert not learner.staged


def test_a_restart_anywhere_ends_in_the_same_state(log: list[bytes]) -> None:
    """Rows at any message, those of the vectors that are kept apart among them; and repeats of messages."""
    whole = learnt(log[:12])
    stage = staged(whole, 0.1)
    tail = [*stage, log[12], stage[0], vectors_message([], in_use=True), *log[13:]]
    stopped = copy_of(whole)
    kept = dict(stopped.all_rows())
    stopped.take_dirty()
    for offset, message in enumerate(tail, 12):
        whole.learn(offset, message)
        stopped.learn(offset, message)
        for key, value in stopped.take_dirty().items():
            if value is None:
                kept.pop(key, None)
            else:
                kept[key] = value
        fresh = ItemLearner(LEARNER, DIM, BASE)
        fresh.load(kept.items())
        fresh.offset = stopped.offset
        stopped = fresh
    assert dict(stopped.all_rows()) == dict(whole.all_rows()) == kept
    assert stopped.encoder == OTHER
    replica = Replica(LEARNER)
    replica.prepare(dict(kept))()
    assert replica.matrix.digest() == whole.learner.digest()


def test_an_aligned_encoder_keeps_the_order_and_another_space_does_not(log: list[bytes]) -> None:
    learner = learnt(log)

    def order(vectors: list[tuple[int, bytes]], with_start: bool = True) -> Any:
        """Scores by phi and text of a reader of the first items, after the move."""
        other = copy_of(learner)
        other.learner.revector(vectors)
        m = other.learner.matrix.arrays
        reader = learner.learner.matrix.arrays.e[:5].mean(axis=0)  # words as the old encoder read them
        phi = m.phi[:40] @ learner.learner.matrix.arrays.y[:5].mean(axis=0)
        return np.argsort(np.argsort(-(m.e[:40] @ reader + phi)))

    before = order(moved_vectors(learner, 0.0))
    near, far = order(moved_vectors(learner, 0.03)), order(moved_vectors(learner, 50.0))
    assert np.corrcoef(before, near)[0, 1] > 0.95 > np.corrcoef(before, far)[0, 1]


def test_what_an_item_learnt_is_kept_and_its_start_moves(log: list[bytes]) -> None:
    learner = learnt(log).learner
    m = learner.matrix.arrays
    rows = np.flatnonzero(m.flags[: len(learner.matrix)] & 8)
    phi, start = m.phi[rows].copy(), learner._starts(rows)
    learner.revector(moved_vectors(learnt(log), 0.3))
    m = learner.matrix.arrays
    assert np.allclose(m.phi[rows] - learner._starts(rows), phi - start, atol=1e-4)
    assert np.abs(learner._starts(rows) - start).max() > 0.01


def test_a_start_is_what_the_kernel_gives() -> None:
    learner = Learner(LEARNER)
    vector = np.random.default_rng(1).standard_normal(DIM).astype(np.float32)
    learner.enter(1, "a", "", vector / np.linalg.norm(vector), None)
    learner.enter(2, "b", "", np.roll(vector, 3) / np.linalg.norm(vector), None)
    started = learner.matrix.arrays.phi[1]
    assert np.allclose(learner._starts(np.array([1]))[0], started, atol=1e-4) and started.any()


def test_items_that_wait_and_items_that_nobody_knows(log: list[bytes]) -> None:
    learner = learnt(log)
    key = examples.item_key("later")
    unit = np.eye(1, DIM, dtype="<f2")[0]
    entry = ItemEntry(key, "later", 10_000, "soon", 4e9, unit.tobytes())
    learner.learn(50, examples.pack_items(0, [entry]))
    new = np.roll(unit, 2).tobytes()
    learner.learn(51, vectors_message([(key, new), (12345, new)], in_use=True))
    assert learner.learner.pending[key].vector.astype("<f2").tobytes() == new
    assert learner.learner.matrix.index(12345) < 0
    assert copy_of(learner).learner.pending[key].vector.astype("<f2").tobytes() == new


def test_what_was_given_up_is_dropped_and_counts_towards_a_flush_until_then(log: list[bytes]) -> None:
    learner = learnt(log)
    learner.take_dirty()
    before = dict(learner.all_rows())
    for offset, message in enumerate(staged(learner, 0.1), 50):
        learner.learn(offset, message)
    kept = {key for key in learner.take_dirty() if key.startswith(b"v")}
    learner.learn(70, examples.pack_drop(2, "another:2"))
    assert len(learner.staged) == len(kept) > 0
    assert not learner.learn(71, examples.pack_drop(1, OTHER)).urgent
    assert learner.dirty_bytes > learner.learner.dirty_bytes + len(kept) * 2 * DIM
    assert {key for key, value in learner.take_dirty().items() if value is None} == kept
    assert dict(learner.all_rows()) == before and learner.dirty_bytes == learner.learner.dirty_bytes


def test_the_newest_encoder_counts(log: list[bytes]) -> None:
    learner = learnt(log)
    first, second = moved_vectors(learner, 0.1, 1), moved_vectors(learner, 0.1, 2)
    learner.learn(50, vectors_message(first))  # given up
    learner.learn(51, vectors_message(second[:4], 2))
    assert learner.staged == dict(second[:4])
    learner.learn(52, vectors_message(second[4:], 2, in_use=True))
    digest = learner.learner.digest()
    learner.learn(53, vectors_message(first, in_use=True))  # too late
    assert learner.learner.digest() == digest and learner.number == 2
    learner.learn(54, vectors_message(first[:2], 2, in_use=True))  # read once more: at once
    m = learner.learner.matrix.arrays
    assert m.e[learner.learner.matrix.index(first[0][0])].astype("<f2").tobytes() == first[0][1]
    with pytest.raises(ValueError, match="a vector of 3 numbers"):
        learner.learn(55, vectors_message([(first[0][0], b"\0" * 6)], 2))


def test_the_adapter_ends_with_its_encoder(log: list[bytes]) -> None:
    learner = learnt(log)
    left, right = np.random.default_rng(1).standard_normal((2, DIM, 2)).astype(np.float32)
    old, new = Adapter(BASE, left, right), Adapter(OTHER, left, right)
    learner.learn(50, examples.pack_adapter(old))
    with pytest.raises(AdapterError, match="switches to an adapter of the encoder other:1"):
        copy_of(learner).learn(51, examples.pack_adapter(new))
    early = copy_of(learner)
    early.learn(51, vectors_message(moved_vectors(learner, 0.1)))
    early.learn(52, examples.pack_adapter(new))  # asked for a moment before the switch
    adapter = early.learner.matrix.adapter
    assert adapter is not None and adapter.base == BASE
    learner.learn(51, vectors_message(moved_vectors(learner, 0.1), in_use=True))
    assert learner.learner.matrix.adapter is None
    learner.learn(52, examples.pack_adapter(old))  # asked for a moment before the move
    assert learner.learner.matrix.adapter is None
    learner.learn(53, examples.pack_adapter(new))
    assert learner.learner.matrix.adapter is not None
    again = learner.again()
    again.learn_all([(50, examples.pack_adapter(old))])
    assert again.learner.matrix.adapter is not None and again.encoder == BASE


def test_a_replica_passes_over_what_is_kept_apart(log: list[bytes]) -> None:
    learner = learnt(log)
    learner.take_dirty()
    learner.learn(50, staged(learner, 0.1)[0])
    dirty = learner.take_dirty()
    assert sum(key[:1] == b"v" for key in dirty) == 16
    replica = Replica(LEARNER)
    replica.prepare(dict(learner.all_rows()))()
    replica.prepare(dirty)()
    assert isinstance(replica.matrix, ItemMatrix) and replica.matrix.digest() == learner.learner.digest()


@pytest.mark.parametrize("phase", ["gather", "shadow", "watch"])
def test_the_loop_that_tunes_begins_anew(phase: str, log: list[bytes]) -> None:
    long = list(messages(60))
    tuning = Tuning(BASE, DIM, LEARNER, TUNING)
    decided: list[Any] = []
    offset = 0
    for offset, message in enumerate(long):
        decided += tuning.advance(2 * offset, message)
        request = tuning.request()
        if request is not None:
            decided += tuning.advance(2 * offset + 1, request)
        if tuning.phase == phase and offset > 5:
            break
    assert tuning.phase == phase
    current = tuning.current
    vectors = moved_vectors(tuning.champion, 0.05)
    told = tuning.advance(2 * offset + 2, vectors_message(vectors, in_use=True))
    kinds = [one.kind for one in told]
    assert kinds == (["drop"] if phase == "shadow" else []) + (["switched"] if current is not None else [])
    assert (tuning.base, tuning.phase, len(tuning.replay), tuning.current) == (OTHER, "gather", 0, None)
    if told:
        assert told[-1].facts["moved_to"] == OTHER and msgspec.json.encode(told[-1].facts)
    resumed = Tuning(BASE, DIM, LEARNER, TUNING)
    resumed.load(tuning.save())
    assert resumed.base == OTHER
    for more, message in enumerate(long[offset + 1 :], offset + 2):
        decided += resumed.advance(2 * more, message)
    assert resumed.champion.learner.digest() != tuning.champion.learner.digest()


@pytest.mark.parametrize("dim", [1, 384, 1024, 4096])
def test_messages_of_vectors_fit_a_batch_of_the_log(dim: int) -> None:
    count = 2 * examples.MESSAGE_BYTES_MAX // (2 * dim) + 3
    vectors = [((-1) ** n * 2**62 + n, bytes(2 * dim)) for n in range(count)]
    packed = examples.pack_all_vectors(Vectors(1, "an encoder's name:0123456789abcdef" * 8, vectors))
    assert max(map(len, packed)) < examples.MESSAGE_BYTES_MAX + 1000 < BATCH_BYTES_MAX and len(packed) > 2
    assert [pair for message in packed for pair in examples.unpack_vectors(message)[0].vectors] == vectors
    assert examples.pack_all_vectors(Vectors(1, OTHER, [])) == []
