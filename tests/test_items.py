"""The item matrix: rows out, rows in, replicas, digest."""

import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model import kernels
from model.items import DENSE, NEIGHBOURS, ROW_VERSION, STATIC, ItemMatrix, RowVersionError, half, row_key
from model.learner import Learner
from tests.model_stream import SMALL, enter_all, stream, vector_of


def replica() -> ItemMatrix:
    return ItemMatrix(SMALL.dim, SMALL.text_dim, SMALL.neighbours_max)


def learnt(messages: int = 20) -> Learner:
    learner = Learner(SMALL)
    enter_all(learner)
    for position, x in enumerate(stream(SMALL, messages)):
        learner.learn(x, position)
    return learner


def test_a_replica_that_tails_the_changes_equals_the_learners_matrix() -> None:
    learner, tail = Learner(SMALL), replica()
    enter_all(learner)
    for position, x in enumerate(stream(SMALL, 30)):
        learner.learn(x, position)
        if position % 7 == 0:
            tail.apply(learner.take_dirty().items())
    learner.withdraw(4)
    before = tail.digest()
    arranged = tail.arrange(learner.take_dirty().items())
    assert tail.digest() == before, "it may be read until the rows are taken"
    tail.take(arranged)
    assert tail.digest() == learner.digest()
    assert tail.names == learner.matrix.names
    assert tail.active_count == learner.matrix.active_count
    assert tail.index(7) == learner.matrix.index(7)
    assert tail.indices(np.array([7, 999_999])).tolist() == [tail.index(7), -1]


def test_rows_may_come_in_any_order() -> None:
    rows = list(learnt().matrix.rows())
    tail = replica()
    tail.apply(reversed(rows))
    assert dict(tail.rows()) == dict(rows)


def test_a_replica_grows_past_its_capacity_from_rows_alone() -> None:
    learner = Learner(SMALL)
    enter_all(learner, 2600, late=0)
    rows = list(learner.matrix.rows())
    for ordered in (rows, rows[::-1]):
        tail = replica()
        tail.apply(ordered)
        assert tail.digest() == learner.digest()
        assert all(tail.index(key) >= 0 for key in range(1, 2601))


def test_a_row_of_another_version_is_refused_with_what_to_do() -> None:
    key, value = next(iter(learnt(1).matrix.rows()))
    with pytest.raises(RowVersionError, match="row is v9, this build reads v3; deploy"):
        replica().apply([(key, b"\x09" + value[1:])])


def test_state_of_other_dimensions_is_refused() -> None:
    rows = learnt(3).matrix.rows()
    with pytest.raises(ValueError, match="dimensions"):
        ItemMatrix(SMALL.dim, SMALL.text_dim + 1, SMALL.neighbours_max).apply(rows)
    dense = [row for row in learnt(3).matrix.rows() if row[0][:1] == DENSE]
    with pytest.raises(ValueError, match="another dimension"):
        ItemMatrix(SMALL.dim + 1, SMALL.text_dim, SMALL.neighbours_max).apply(dense)


def test_a_row_that_never_was_complete_is_taken_back() -> None:
    """A flush cut off, its disk lost: the next owner writes what its store has of those keys, nothing."""
    taken, plain = replica(), replica()
    rows = list(learnt(2).matrix.rows())
    plain.apply(rows)
    taken.apply([*rows, *((row_key(kind, 5), None) for kind in (DENSE, STATIC, NEIGHBOURS))])
    assert taken.digest() == plain.digest()


def test_broken_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="no such kind"):
        replica().apply([(b"zzz", bytes([ROW_VERSION]) + b"zzz")])
    tail = replica()
    rows = list(learnt(1).matrix.rows())
    tail.apply(rows)
    key, value = rows[0]
    foreign = value[:8] + struct.pack("<q", 12345) + value[16:]
    with pytest.raises(ValueError, match="belongs to another item"):
        tail.apply([(key, foreign)])


def test_an_id_too_long_for_a_row_is_refused() -> None:
    learner = Learner(SMALL)
    learner.enter(1, "x" * 70_000, "", vector_of(1, SMALL.text_dim), None)
    with pytest.raises(ValueError, match="at most 65535"):
        learner.take_dirty()


def test_ids_and_texts_survive_in_any_script() -> None:
    learner, tail = Learner(SMALL), replica()
    learner.enter(-5, "ключ/キー", "Übergröße 水源 🌊" * 100, vector_of(1, SMALL.text_dim), None)
    learner.enter(6, "waiting", "später", vector_of(2, SMALL.text_dim), 5e9)
    tail.apply(learner.take_dirty().items())
    row = tail.index(-5)
    assert tail.names[row] == "ключ/キー"
    assert tail.texts[row] == ("Übergröße 水源 🌊" * 100)[:512]
    assert tail.pending[6].text == "später"
    assert tail.digest() == learner.digest()


def test_vectors_in_memory_are_those_that_are_stored() -> None:
    learner = Learner(SMALL)
    vector = vector_of(3, SMALL.text_dim)
    learner.enter(3, "3", "", vector, None)
    np.testing.assert_array_equal(learner.matrix.arrays.e[0], half(vector))
    assert np.abs(half(vector) - vector).max() > 0


@given(st.lists(st.integers(-(2**63), 2**63 - 1).filter(bool), unique=True, max_size=80))
def test_the_table_finds_every_key_and_no_other(keys: list[int]) -> None:
    matrix = replica()
    for key in keys[::2]:
        matrix.add_row(key)
    assert [matrix.index(key) for key in keys[::2]] == list(range(len(keys[::2])))
    assert all(matrix.index(key) == -1 for key in keys[1::2])


def test_the_digest_sees_every_part_of_the_state() -> None:
    matrix = learnt().matrix
    seen = {matrix.digest()}
    for part in (matrix.arrays.phi, matrix.arrays.y, matrix.arrays.mu, matrix.arrays.theta, matrix.arrays.square):
        part.flat[0] += 1
        seen.add(matrix.digest())
    matrix.arrays.weight[matrix.arrays.length > 0, 0] += 1
    seen.add(matrix.digest())
    matrix.arrays.scalar[kernels.SHARP] += 1
    seen.add(matrix.digest())
    waiting = next(iter(matrix.pending), None)
    if waiting is not None:
        matrix.pending[waiting] = replace(matrix.pending[waiting], ts=1.0)
        seen.add(matrix.digest())
    matrix.names[0] += "!"
    seen.add(matrix.digest())
    assert len(seen) >= 9
