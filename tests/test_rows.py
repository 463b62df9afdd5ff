"""The user row's bytes: what goes in comes out, and the layout of each version stays as it was."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from state import rows
from state.rows import RowVersionError, UserRow

OFFSETS = st.integers(0, rows.OFFSET_MASK)
KEYS = st.integers(-(2**63), 2**63 - 1)


@st.composite
def user_rows(draw: st.DrawFn) -> UserRow:
    slots = draw(st.lists(st.tuples(KEYS, st.integers(0, rows.TS_MAX), st.integers(0, 22)), max_size=rows.HISTORY_MAX))
    positions = draw(st.lists(OFFSETS, min_size=len(slots), max_size=len(slots)))
    dim = draw(st.sampled_from([0, 1, 3, 384]))
    row = UserRow(
        events=draw(st.integers(0, 2**32 - 1)),
        positives=draw(st.integers(0, 2**32 - 1)),
        last_ts=draw(st.floats(allow_nan=False)),
        history=b"".join(rows.SLOT.pack(k, ts, 0.7, action, 0) for k, ts, action in slots),
        positions=b"".join(rows.POSITION.pack(rows.position(1, p)) for p in positions),
        seen=b"".join(k.to_bytes(8, "little", signed=True) for k in draw(st.lists(KEYS, max_size=20))),
    )
    if dim:
        row.text_dim = dim
        row.tail = np.arange(dim, dtype="<f4").tobytes()
        row.tail_weight = 2.5
        for n in range(draw(st.integers(0, rows.COMMENTS_MAX))):
            row.comments = rows.COMMENT.pack(rows.position(1, n), float(n), n, 0.5) + bytes(dim) + row.comments
    return row


@given(user_rows())
def test_a_row_comes_back_as_it_was_packed(row: UserRow) -> None:
    assert rows.unpack(rows.pack(row)) == row


@given(user_rows(), st.data())
def test_a_torn_row_is_refused(row: UserRow, data: st.DataObject) -> None:
    whole = rows.pack(row)
    cut = data.draw(st.integers(1, len(whole) - 1))
    with pytest.raises(ValueError):
        rows.unpack(whole[:cut])


def test_golden_bytes_of_version_1() -> None:
    row = UserRow(
        events=3, positives=2, last_ts=5.5, history=rows.SLOT.pack(7, 9, 1.0, 2, 0), text_dim=2, tail_weight=1.5,
        positions=rows.POSITION.pack(rows.position(1, 300)), seen=(-2).to_bytes(8, "little", signed=True),
        comments=rows.COMMENT.pack(rows.position(1, 4), 2.0, 7, 0.25) + bytes([1, 255]), tail=bytes(8),
    )  # fmt: skip
    assert rows.pack(row).hex() == (
        "0100010001000200010000000300000002000000" "0000000000001640" "0000c03f"
        "0700000000000000" "09000000" "003c" "02" "00"
        "2c01000000000001"
        "feffffffffffffff"
        "0400000000000001" "0000000000000040" "0700000000000000" "0000803e" "01ff"
        "0000000000000000"
    )  # fmt: skip


def test_another_version_is_refused_with_what_to_do() -> None:
    newer = bytes([rows.ROW_VERSION + 1]) + rows.pack(UserRow())[1:]
    with pytest.raises(RowVersionError, match="version 2, this build reads 1; deploy"):
        rows.unpack(newer)
    with pytest.raises(RowVersionError):
        rows.unpack(b"")


def test_catalogue_rows_come_back_and_other_versions_are_refused() -> None:
    row = rows.CatalogueRow(rows.CATALOGUE_VERSION, 5, "text", {"a": 1.5, "b": ["x"]}, None, b"\0\0")
    assert rows.unpack_catalogue(rows.pack_catalogue(row)) == row
    with pytest.raises(RowVersionError):
        rows.unpack_catalogue(rows.pack_catalogue(rows.CatalogueRow(9, 5, "", {}, None, b"")))


@given(st.lists(KEYS, max_size=30), KEYS)
def test_knows_exactly_the_keys_of_history_and_seen(keys: list[int], other: int) -> None:
    half = len(keys) // 2
    row = UserRow(
        history=b"".join(rows.SLOT.pack(k, 0, 1, 0, 0) for k in keys[:half]),
        seen=b"".join(k.to_bytes(8, "little", signed=True) for k in keys[half:]),
    )
    for key in [*keys, other]:
        assert row.knows(key.to_bytes(8, "little", signed=True)) == (key in keys)


def test_a_key_that_only_appears_across_slots_is_not_known() -> None:
    row = UserRow(history=rows.SLOT.pack(0x1122334455667788, 0x99AABBCC, 1, 0, 0))
    assert not row.knows(row.history[4:12])
    assert row.knows(row.history[:8])


@given(st.integers(0, 127), OFFSETS)
def test_positions_split_into_what_they_were_made_of(topic: int, offset: int) -> None:
    assert rows.split_position(rows.position(topic, offset)) == (topic, offset)
