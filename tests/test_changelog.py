"""Record layout (golden bytes of version 1) and the marker rule."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from state.changelog import (
    KIND_ADOPT,
    KIND_RUNNING,
    KIND_SWEPT,
    Accepted,
    Announce,
    ChangelogVersionError,
    LogRecord,
    Marker,
    Reader,
    Row,
    announce_record,
    marker_record,
    parse,
    row_records,
)

CLAIM_1, CLAIM_2, CLAIM_3 = (bytes([n]) * 32 for n in (1, 2, 3))
U8 = st.integers(0, 2**64 - 1)


def marker(epoch: int, flush: int, at: int, kind: int = KIND_RUNNING, base: tuple[int, int] = (0, 0)) -> Marker:
    return Marker(epoch, kind, *base, flush, 1, {"clicks": at})


def row(epoch: int, flush: int, key: bytes, value: bytes | None) -> tuple[bytes, bytes]:
    return next(row_records(epoch, flush, [(key, value)]))


def feed(reader: Reader, records: Sequence[tuple[bytes, bytes | None]], first: int = 0) -> list[Accepted]:
    fed = (reader.feed(LogRecord(first + at, key, value)) for at, (key, value) in enumerate(records))
    return [accepted for accepted in fed if accepted is not None]


def rows_of(accepted: Sequence[Accepted]) -> list[dict[bytes, bytes | None]]:
    return [a.rows for a in accepted]


# -- layout


def test_announce_version_1_bytes() -> None:
    claim = bytes(range(32))
    key, value = announce_record(3, claim)
    assert (key, value) == (bytes.fromhex("410000000000000003") + claim, b"\x01" + claim)
    assert parse(LogRecord(0, key, value)) == Announce(3, claim)
    assert Announce(3, claim).store_id == claim[:16]


def test_marker_version_1_bytes() -> None:
    one = Marker(3, KIND_SWEPT, 2, 9, 4, 5, {"clicks": 258, "é": -1}, slot=6)
    key, value = marker_record(one)
    assert key.hex() == "4d00000000000000030200000006"
    assert value.hex() == (
        "01000000000000000200000000000000090000000000000004"
        "0000000502"
        "06636c69636b730000000000000102"
        "02c3a9ffffffffffffffff"
    )
    assert parse(LogRecord(0, key, value)) == one


def test_row_version_1_bytes() -> None:
    alive, dead = row_records(3, 4, [(b"\x00u", b"row"), (b"", None)])
    assert (alive[0].hex(), alive[1].hex()) == ("5200000000000000030075", "01000000000000000401726f77")
    assert (dead[0].hex(), dead[1].hex()) == ("520000000000000003", "01000000000000000400")
    assert parse(LogRecord(0, *alive)) == Row(3, 4, b"\x00u", b"row")
    assert parse(LogRecord(0, *dead)) == Row(3, 4, b"", None)


@given(U8, U8, st.binary(), st.none() | st.binary())
def test_row_survives_the_log(epoch: int, flush: int, key: bytes, value: bytes | None) -> None:
    assert parse(LogRecord(0, *row(epoch, flush, key, value))) == Row(epoch, flush, key, value)


@given(U8, st.integers(0, 2), U8, U8, U8, st.dictionaries(st.text(max_size=60), st.integers(-1, 2**62), max_size=5))
def test_marker_survives_the_log(
    epoch: int, kind: int, base_epoch: int, base_flush: int, flush: int, applied: dict[str, int]
) -> None:
    one = Marker(epoch, kind, base_epoch, base_flush, flush, 2**32 - 1, applied)
    assert parse(LogRecord(0, *marker_record(one))) == one


@pytest.mark.parametrize(
    "record",
    [
        (b"R" + bytes(8) + b"u", b"\x02" + bytes(9)),
        (b"Z" + bytes(8), b"\x01"),
        (b"", b"\x01"),
        (b"R" + bytes(8) + b"u", b""),
    ],
)
def test_newer_version_or_unknown_kind_is_refused_with_what_to_do(record: tuple[bytes, bytes]) -> None:
    with pytest.raises(ChangelogVersionError, match=r"offset 17 .* reads version 1; deploy the build that wrote it"):
        parse(LogRecord(17, *record))


@pytest.mark.parametrize("record", [announce_record(1, CLAIM_1), marker_record(marker(1, 1, 5)), row(1, 1, b"u", b"")])
def test_record_cut_short_is_refused(record: tuple[bytes, bytes]) -> None:
    key, value = record
    for length in range(1, len(value)):
        with pytest.raises(ValueError, match="offset 17 is cut short"):
            parse(LogRecord(17, key, value[:length]))
    with pytest.raises(ValueError, match="offset 17 is cut short"):
        parse(LogRecord(17, key[:8], value))


def test_null_value_says_nothing() -> None:
    assert parse(LogRecord(0, b"R" + bytes(8) + b"u", None)) is None
    assert Reader().feed(LogRecord(0, b"R" + bytes(8) + b"u", None)) is None


# -- the marker rule


def test_rows_count_with_their_marker_and_not_before() -> None:
    reader = Reader()
    before = feed(reader, [announce_record(1, CLAIM_1), row(1, 1, b"a", b"1"), row(1, 1, b"b", None)])
    assert before == []
    assert reader.uncovered_keys() == {b"a", b"b"}
    after = feed(reader, [marker_record(marker(1, 1, 5))], first=3)
    assert after == [Accepted({b"a": b"1", b"b": None}, {"clicks": 5}, 4, 1, 1)]
    assert reader.uncovered_keys() == set()
    assert (reader.marker_epoch, reader.flush, reader.applied) == (1, 1, {"clicks": 5})


def test_marker_covers_earlier_flushes_in_order_and_no_later_one() -> None:
    accepted = feed(
        Reader(),
        [
            announce_record(1, CLAIM_1),
            row(1, 3, b"a", b"3"),
            row(1, 1, b"a", b"1"),
            row(1, 2, b"a", b"2"),
            row(1, 1, b"b", b"1"),
            marker_record(marker(1, 2, 5)),
            marker_record(marker(1, 3, 6)),
        ],
    )
    assert rows_of(accepted) == [{b"a": b"2", b"b": b"1"}, {b"a": b"3"}]


def test_first_claim_of_an_epoch_wins_and_lower_ones_are_late() -> None:
    reader = Reader()
    feed(
        reader,
        [
            announce_record(2, CLAIM_2),
            announce_record(2, CLAIM_1),
            announce_record(1, CLAIM_3),
            announce_record(2, CLAIM_2),
        ],
    )
    assert (reader.epoch, reader.claim, reader.epoch_seen_max) == (2, CLAIM_2, 2)
    assert reader.winners == [CLAIM_2[:16]]
    assert reader.announced == {2: 0}


def test_marker_of_a_fenced_owner_does_not_count() -> None:
    reader = Reader()
    accepted = feed(
        reader,
        [
            announce_record(1, CLAIM_1),
            row(1, 1, b"a", b"1"),
            announce_record(2, CLAIM_2),
            row(1, 1, b"late", b"1"),
            marker_record(marker(1, 1, 5)),
        ],
    )
    assert accepted == []
    assert reader.stale_records == 2
    assert reader.uncovered_keys() == {b"a", b"late"}


def test_adopt_confirms_the_base_and_drops_what_lies_behind_it() -> None:
    # The compactor has dropped marker 1 of epoch 1: the fenced owner's late marker 3 has the same key.
    accepted = feed(
        Reader(),
        [
            announce_record(1, CLAIM_1),
            row(1, 1, b"a", b"1"),
            row(1, 2, b"b", b"2"),
            row(1, 3, b"c", b"3"),
            announce_record(2, CLAIM_2),
            marker_record(marker(1, 3, 9)),
            row(2, 1, b"b", b"adopted"),
            marker_record(marker(2, 1, 7, KIND_ADOPT, (1, 2))),
            row(1, 2, b"d", b"late"),
            marker_record(marker(2, 2, 8)),
        ],
    )
    assert rows_of(accepted) == [{b"a": b"1", b"b": b"adopted"}, {}]
    assert [a.applied for a in accepted] == [{"clicks": 7}, {"clicks": 8}]


def test_doubled_append_changes_nothing() -> None:
    one = [row(1, 1, b"a", b"1"), marker_record(marker(1, 1, 5))]
    two = [row(1, 2, b"a", b"2"), marker_record(marker(1, 2, 6))]
    reader = Reader()
    accepted = feed(reader, [announce_record(1, CLAIM_1), *one, *two, *one, marker_record(marker(1, 3, 7))])
    assert rows_of(accepted) == [{b"a": b"1"}, {b"a": b"2"}, {}]
    assert reader.uncovered_keys() == {b"a"}, "a compactor keeps the late double, so the key is to be written again"


def test_reader_goes_on_from_a_known_marker() -> None:
    reader = Reader(epoch=1, flush=2, applied={"clicks": 6})
    assert (reader.epoch, reader.marker_epoch, reader.flush, reader.applied) == (1, 1, 2, {"clicks": 6})
    accepted = feed(reader, [row(1, 3, b"a", b"3"), marker_record(marker(1, 3, 7))], first=90)
    assert accepted == [Accepted({b"a": b"3"}, {"clicks": 7}, 92, 1, 3)]
    assert reader.winners == []


def test_keys_only_reader_keeps_no_rows() -> None:
    accepted = feed(
        Reader(keys_only=True),
        [announce_record(1, CLAIM_1), row(1, 1, b"a", b"1"), row(1, 1, b"b", None), marker_record(marker(1, 1, 5))],
    )
    assert rows_of(accepted) == [{b"a": b"", b"b": None}]


def test_head_may_be_deleted_up_to_the_claim_of_a_swept_epoch() -> None:
    reader = Reader()
    feed(reader, [announce_record(1, CLAIM_1), marker_record(marker(1, 1, 5)), announce_record(2, CLAIM_2)])
    assert reader.truncatable_to is None
    swept = [marker_record(marker(2, 1, 5, KIND_ADOPT, (1, 1))), marker_record(marker(2, 2, 5, KIND_SWEPT))]
    feed(reader, [*swept, announce_record(3, CLAIM_3)], first=3)
    assert reader.truncatable_to == 2
