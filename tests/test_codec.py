"""Records to events and rejects: every limit at, below and above; every reason; golden dead letters."""

import json
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest

from streams import codec, events
from streams.codec import DeadLetter, Reason, Reject, Topic, dead_letter, decode_batch, validate, validate_event
from streams.events import Click, Comment, Erasure, Item, Withdrawn
from tests.records import NOW_MS, NOW_S, outcome_of, record

CLICK: dict[str, Any] = {"user_id": "u", "item_id": "i", "action": "click", "ts": NOW_S}
COMMENT: dict[str, Any] = {"user_id": "u", "text": "good", "ts": NOW_S}
ITEM: dict[str, Any] = {"item_id": "u", "text": "thing"}
ERASURE: dict[str, Any] = {"user_id": "u", "ts": NOW_S}
GOOD: dict[Topic, dict[str, Any]] = {"clicks": CLICK, "comments": COMMENT, "items": ITEM, "erasures": ERASURE}
ABSENT = object()


def jsonb(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def outcome(topic: Topic, /, timestamp_ms: Any = NOW_MS, **changes: object) -> Any:
    """What becomes of a good message of `topic` with these fields changed."""
    message = {k: v for k, v in (GOOD[topic] | changes).items() if v is not ABSENT}
    key = message.get("item_id" if topic == "items" else "user_id")
    return outcome_of(topic, jsonb(message), key.encode() if isinstance(key, str) else b"u", timestamp_ms=timestamp_ms)


def reason(result: object) -> Reason | None:
    return result.reason if isinstance(result, Reject) else None


# --- good messages --------------------------------------------------------------------------------


def test_full_click() -> None:
    message = CLICK | {"event_id": "e", "value": 3, "attributes": {"a": [{"b": None}]}, "other": [1]}
    assert outcome_of("clicks", jsonb(message)) == Click("u", "i", "click", 3.0, NOW_S, "e", {"a": [{"b": None}]})


def test_full_comment() -> None:
    message = COMMENT | {"event_id": "e", "item_id": "i", "type": "comment"}
    assert outcome_of("comments", jsonb(message)) == Comment("u", "good", "i", NOW_S, "e")


def test_full_item() -> None:
    message = ITEM | {"attributes": {"y": 1972, "g": ["a", "b"], "c": True, "r": 7.5}, "vector": [1, 0.5], "ts": 5}
    assert outcome_of("items", jsonb(message)) == Item(
        "u", "thing", {"y": 1972, "g": ["a", "b"], "c": True, "r": 7.5}, [1.0, 0.5], 5.0
    )


def test_erasure() -> None:
    assert outcome_of("erasures", jsonb(ERASURE)) == Erasure("u", NOW_S)


def test_null_is_absence_in_every_optional_field() -> None:
    click = outcome("clicks", value=None, ts=None, event_id=None, attributes=None)
    assert click == Click("u", "i", "click", 1.0, NOW_S)
    assert outcome("comments", item_id=None, ts=None, event_id=None) == Comment("u", "good", None, NOW_S)
    item = outcome("items", attributes=None, vector=None, ts=None)
    assert item == Item("u", "thing")
    assert outcome("items", attributes={"a": None, "b": 1}).attributes == {"b": 1}


def test_value_is_one_when_absent() -> None:
    assert outcome("clicks").value == 1.0


@pytest.mark.parametrize("text", ["слово", "もっと", "🎬" * 50, "a\u0000b", " x ", "עברית", "\u202etxet"])
def test_text_of_any_language_arrives_as_written(text: str) -> None:
    assert outcome("comments", text=text).text == text
    escaped = json.dumps(COMMENT | {"text": text}, ensure_ascii=True).encode()
    assert outcome_of("comments", escaped) == Comment("u", text, None, NOW_S)


def test_ids_are_compared_with_the_key_as_utf8() -> None:
    assert outcome("clicks", user_id="користувач").user_id == "користувач"


def test_item_text_may_be_empty_for_its_vector_speaks() -> None:
    assert outcome("items", text="", vector=[1.0]) == Item("u", "", None, [1.0])


def test_last_of_a_repeated_field_counts() -> None:
    assert outcome_of("clicks", b'{"user_id":"x","user_id":"u","item_id":"i","action":"a","ts":1}') == Click(
        "u", "i", "a", ts=1.0
    )


# --- time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ts", "seconds"),
    [
        (1, 1.0),
        (0, 0.0),
        (-1.5, -1.5),
        (NOW_S, NOW_S),
        ("2026-01-01T00:00:00Z", NOW_S),
        ("2026-01-01t00:00:00z", NOW_S),
        ("2026-01-01T01:00:00+01:00", NOW_S),
        ("2025-12-31T18:30:00.250-05:30", NOW_S + 0.25),
        ("1969-12-31T23:59:59Z", -1.0),
        ("0001-01-01T00:00:00Z", events.TS_S_MIN),
        (events.TS_S_MIN, events.TS_S_MIN),
    ],
)
def test_ts_becomes_unix_seconds(ts: object, seconds: float) -> None:
    for topic in GOOD:
        event = outcome(topic, ts=ts)
        assert type(event.ts) is float
        assert event.ts == seconds


def test_absent_ts_is_the_records_own() -> None:
    for topic in ("clicks", "comments", "erasures"):
        assert outcome(topic, ts=ABSENT, timestamp_ms=1_500).ts == 1.5


def test_absent_ts_of_an_item_means_from_the_start() -> None:
    assert outcome("items", ts=ABSENT).ts is None


@pytest.mark.parametrize(
    "ts",
    [
        "",
        "yesterday",
        "2026-01-01",
        "2026-01-01T00:00:00",  # no offset: nobody's time
        "2026-13-01T00:00:00Z",
        "20260101T000000Z",
        "1767225600",
        "0000-01-01T00:00:00Z",
        "10000-01-01T00:00:00Z",
        "9999-12-31T23:59:59.9999999Z",
        "0001-01-01T00:00:00+00:01",  # before year 1 in UTC
        events.TS_S_MIN - 1,
        -1e300,
    ],
)
def test_bad_ts(ts: object) -> None:
    for topic in GOOD:
        assert reason(outcome(topic, ts=ts)) is Reason.BAD_TS


def test_ts_in_future_is_measured_from_the_records_timestamp() -> None:
    edge = NOW_S + events.TS_AHEAD_S_MAX
    for topic in GOOD:
        assert outcome(topic, ts=edge).ts == edge
        assert outcome(topic, ts=edge - 0.01).ts == edge - 0.01
        assert reason(outcome(topic, ts=edge + 0.01)) is Reason.TS_IN_FUTURE
        assert reason(outcome(topic, ts=NOW_S * 1000)) is Reason.TS_IN_FUTURE  # milliseconds
        assert reason(outcome(topic, ts="9999-12-31T23:59:59-23:59")) is Reason.TS_IN_FUTURE
        assert reason(outcome(topic, ts=NOW_S, timestamp_ms=0)) is Reason.TS_IN_FUTURE


def test_ts_has_a_ceiling_that_no_record_timestamp_lifts() -> None:
    ahead_ms = int(events.TS_S_MAX * 1000)
    for topic in GOOD:
        assert outcome(topic, ts=events.TS_S_MAX, timestamp_ms=ahead_ms).ts == events.TS_S_MAX
        assert reason(outcome(topic, ts=events.TS_S_MAX + 1, timestamp_ms=ahead_ms)) is Reason.TS_IN_FUTURE
    assert reason(outcome("clicks", ts=ABSENT, timestamp_ms=ahead_ms + 1)) is Reason.TS_IN_FUTURE
    assert reason(outcome("clicks", ts=ABSENT, timestamp_ms=2**63 - 1)) is Reason.TS_IN_FUTURE


def test_record_without_timestamp() -> None:
    assert outcome("clicks", ts=NOW_S, timestamp_ms=-1).ts == NOW_S
    assert reason(outcome("clicks", ts=ABSENT, timestamp_ms=-1)) is Reason.MISSING_FIELD


# --- limits: below, at, above ---------------------------------------------------------------------

IDS: list[tuple[Topic, str]] = [
    ("clicks", "user_id"),
    ("clicks", "item_id"),
    ("clicks", "event_id"),
    ("comments", "user_id"),
    ("comments", "item_id"),
    ("comments", "event_id"),
    ("items", "item_id"),
    ("erasures", "user_id"),
]


@pytest.mark.parametrize(("topic", "field"), IDS)
@pytest.mark.parametrize("letter", ["a", "я", "🎬", '"'])
def test_id_length(topic: Topic, field: str, letter: str) -> None:
    for chars in (1, events.ID_CHARS_MAX - 1, events.ID_CHARS_MAX):
        assert getattr(outcome(topic, **{field: letter * chars}), field) == letter * chars
    assert reason(outcome(topic, **{field: letter * (events.ID_CHARS_MAX + 1)})) is Reason.ID_TOO_LONG


@pytest.mark.parametrize(("topic", "field"), IDS)
def test_empty_id(topic: Topic, field: str) -> None:
    assert reason(outcome(topic, **{field: ""})) is Reason.EMPTY_ID


@pytest.mark.parametrize("chars", [1, events.ACTION_CHARS_MAX - 1, events.ACTION_CHARS_MAX])
def test_action_within_its_length(chars: int) -> None:
    assert outcome("clicks", action="a" * chars).action == "a" * chars


@pytest.mark.parametrize("chars", [0, events.ACTION_CHARS_MAX + 1])
def test_action_empty_or_too_long(chars: int) -> None:
    assert reason(outcome("clicks", action="a" * chars)) is Reason.BAD_ACTION


@pytest.mark.parametrize("topic", ["comments", "items"])
@pytest.mark.parametrize("letter", ["a", "я", "🎬", "["])
def test_text_length(topic: Topic, letter: str) -> None:
    for chars in (1, events.TEXT_CHARS_MAX - 1, events.TEXT_CHARS_MAX):
        assert len(outcome(topic, text=letter * chars).text) == chars
    assert reason(outcome(topic, text=letter * (events.TEXT_CHARS_MAX + 1))) is Reason.TEXT_TOO_LONG


@pytest.mark.parametrize("text", ["", " ", "\n\t ", "\u3000"])
def test_comment_without_words(text: str) -> None:
    assert reason(outcome("comments", text=text)) is Reason.TEXT_EMPTY


@pytest.mark.parametrize("sign", [1, -1])
def test_value_range(sign: int) -> None:
    edge = sign * events.VALUE_ABS_MAX
    for value in (0, sign, edge, math.nextafter(edge, 0)):
        assert outcome("clicks", value=value).value == value
    for value in (math.nextafter(edge, sign * math.inf), sign * 1e300, sign * 10**30):
        assert reason(outcome("clicks", value=value)) is Reason.VALUE_OUT_OF_RANGE


def test_vector_length() -> None:
    for numbers in (1, events.VECTOR_NUMBERS_MAX - 1, events.VECTOR_NUMBERS_MAX):
        assert len(outcome("items", vector=[0.5] * numbers).vector) == numbers
    for numbers in (0, events.VECTOR_NUMBERS_MAX + 1):
        assert reason(outcome("items", vector=[0.5] * numbers)) is Reason.BAD_VECTOR


def test_vector_norm() -> None:
    assert outcome("items", vector=[0.0, events.VECTOR_NORM_MIN]).vector == [0.0, events.VECTOR_NORM_MIN]
    for vector in ([0.0], [0, -0.0, 0], [events.VECTOR_NORM_MIN * 0.99], [1e-300] * 8):
        assert reason(outcome("items", vector=vector)) is Reason.BAD_VECTOR


@pytest.mark.parametrize("number", [1e15, -1e15])
def test_vector_number_at_its_limit(number: float) -> None:
    assert outcome("items", vector=[number]).vector == [number]


@pytest.mark.parametrize(
    "vector", ["abc", 5, True, {}, [[1.0]], [None], ["1"], [True], [1e15 * 1.01], [-1e300], [10**30]]
)
def test_bad_vector(vector: object) -> None:
    assert reason(outcome("items", vector=vector)) is Reason.BAD_VECTOR


@pytest.mark.parametrize("topic", ["clicks", "items"])
def test_attribute_count(topic: Topic) -> None:
    for entries in (0, events.ATTRIBUTES_MAX - 1, events.ATTRIBUTES_MAX):
        attributes = {f"a{i}": i for i in range(entries)}
        assert outcome(topic, attributes=attributes).attributes == attributes
    attributes = {f"a{i}": i for i in range(events.ATTRIBUTES_MAX + 1)}
    assert reason(outcome(topic, attributes=attributes)) is Reason.ATTRIBUTES_TOO_LARGE


@pytest.mark.parametrize("topic", ["clicks", "items"])
def test_attribute_bytes(topic: Topic) -> None:
    frame = len(jsonb({"a": ""}))
    for size in (events.ATTRIBUTES_BYTES_MAX - 1, events.ATTRIBUTES_BYTES_MAX):
        attributes = {"a": "x" * (size - frame)}
        assert len(jsonb(attributes)) == size
        assert outcome(topic, attributes=attributes).attributes == attributes
    attributes = {"a": "x" * (events.ATTRIBUTES_BYTES_MAX + 1 - frame)}
    assert reason(outcome(topic, attributes=attributes)) is Reason.ATTRIBUTES_TOO_LARGE


def test_long_item_text_leaves_room_for_attributes() -> None:
    item = outcome("items", text="x" * events.TEXT_CHARS_MAX, attributes={"a": "b"})
    assert item.attributes == {"a": "b"}


@pytest.mark.parametrize("number", [2**63 - 1, -(2**63), 2**53 + 1, 0])
def test_item_attribute_keeps_a_64_bit_integer(number: int) -> None:
    assert outcome("items", attributes={"n": number}).attributes == {"n": number}


def test_item_attribute_beyond_64_bits() -> None:
    assert reason(outcome("items", attributes={"n": 2**63})) is Reason.VALUE_OUT_OF_RANGE
    assert reason(outcome("items", attributes={"n": -(2**63) - 1})) is Reason.VALUE_OUT_OF_RANGE


def padded(message: dict[str, Any], size: int) -> bytes:
    encoded = jsonb(message)
    return encoded + b" " * (size - len(encoded))


@pytest.mark.parametrize("topic", GOOD)
def test_message_bytes(topic: Topic) -> None:
    for size in (events.MESSAGE_BYTES_MAX - 1, events.MESSAGE_BYTES_MAX):
        assert reason(outcome_of(topic, padded(GOOD[topic], size))) is None
    for size in (events.MESSAGE_BYTES_MAX + 1, 3 * events.MESSAGE_BYTES_MAX):
        assert reason(outcome_of(topic, padded(GOOD[topic], size))) is Reason.MESSAGE_TOO_LARGE


def nested(depth: int, start: str, end: str) -> bytes:
    """A click whose deepest place is `depth` objects and arrays down, the click's own object included."""
    inner = depth - 1
    return jsonb(CLICK)[:-1] + b', "other": ' + (start * inner + '"x"' + end * inner).encode() + b"}"


@pytest.mark.parametrize(("start", "end"), [("[", "]"), ('{"a":', "}"), ("[1, ", ", 2]")])
def test_nesting(start: str, end: str) -> None:
    for depth in (2, events.NESTING_MAX - 1, events.NESTING_MAX):
        assert reason(outcome_of("clicks", nested(depth, start, end))) is None
    for depth in (events.NESTING_MAX + 1, 5_000, 100_000):
        assert reason(outcome_of("clicks", nested(depth, start, end))) is Reason.NESTED_TOO_DEEP


def test_nesting_is_judged_alike_at_any_stack_depth() -> None:
    def at_depth(frames: int, message: bytes) -> object:
        return at_depth(frames - 1, message) if frames else outcome_of("clicks", message)

    deep = sys.getrecursionlimit() // 2
    assert reason(at_depth(deep, nested(events.NESTING_MAX, "[", "]"))) is None
    assert reason(at_depth(deep, nested(events.NESTING_MAX + 1, "[", "]"))) is Reason.NESTED_TOO_DEEP


def test_brackets_within_strings_are_text() -> None:
    text = '[{"\\' * 1000 + '"]'
    assert outcome("comments", text=text).text == text
    assert reason(outcome("comments", text=text, other=[[]] * 200)) is None


def test_shortest_message_that_is_nested_too_deep_is_noticed() -> None:
    message = b"[" * (events.NESTING_MAX + 1) + b"]" * (events.NESTING_MAX + 1)
    assert len(message) == codec.UNCHECKED_BYTES_MAX + 2
    assert reason(outcome_of("clicks", message)) is Reason.NESTED_TOO_DEEP


# --- reasons --------------------------------------------------------------------------------------


@pytest.mark.parametrize("topic", GOOD)
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"", Reason.NOT_JSON),
        (b" ", Reason.NOT_JSON),
        (b"hello", Reason.NOT_JSON),
        (b"{", Reason.NOT_JSON),
        (b'{"user_id": "u"', Reason.NOT_JSON),
        (b"{'user_id': 'u'}", Reason.NOT_JSON),
        (b"{} {}", Reason.NOT_JSON),
        (b'{"a": 01}', Reason.NOT_JSON),
        (b'{"a": "\x01"}', Reason.NOT_JSON),
        (b'{"a": 1,}', Reason.NOT_JSON),
        (b"\x00\x00\x00\x00\x07schema", Reason.NOT_JSON),  # another serialisation, with its registry's magic byte
        (b"\xef\xbb\xbf{}", Reason.NOT_JSON),  # a byte order mark
        (b"\xff", Reason.NOT_UTF8),
        (b'{"user_id": "\xff"}', Reason.NOT_UTF8),
        (b'{"user_id": "\xed\xa0\x80"}', Reason.NOT_UTF8),  # a surrogate in bytes
        (b'{"user_id": "\xc0\x80"}', Reason.NOT_UTF8),  # overlong
        ('{"user_id": "é"}'.encode("latin-1"), Reason.NOT_UTF8),
        ('{"user_id": "u"}'.encode("utf-16"), Reason.NOT_UTF8),
        (b'{"user_id": "\\ud800", "item_id": "\\ud800"}', Reason.NOT_UTF8),
        (b'{"user_id": "\\udc00x", "item_id": "x"}', Reason.NOT_UTF8),
        (b'{"other": "\\ud800"}', Reason.NOT_UTF8),
        (b'{"ts": NaN}', Reason.NOT_FINITE),
        (b'{"ts": -Infinity}', Reason.NOT_FINITE),
        (b'{"other": Infinity}', Reason.NOT_FINITE),
        (b"NaN", Reason.NOT_FINITE),
        (b"null", Reason.WRONG_TYPE),
        (b"[]", Reason.WRONG_TYPE),
        (b' "text" ', Reason.WRONG_TYPE),
        (b"5", Reason.WRONG_TYPE),
        (b"9" * 5000, Reason.WRONG_TYPE),
        (b"true", Reason.WRONG_TYPE),
        (b"{}", Reason.MISSING_FIELD),
    ],
)
def test_value_that_is_no_event(topic: Topic, value: bytes, expected: Reason) -> None:
    assert reason(outcome_of(topic, value)) is expected


REQUIRED: list[tuple[Topic, str]] = [
    ("clicks", "user_id"),
    ("clicks", "item_id"),
    ("clicks", "action"),
    ("comments", "user_id"),
    ("comments", "text"),
    ("items", "item_id"),
    ("items", "text"),
    ("erasures", "user_id"),
]


@pytest.mark.parametrize(("topic", "field"), REQUIRED)
@pytest.mark.parametrize("value", [ABSENT, None])
def test_missing_field(topic: Topic, field: str, value: object) -> None:
    result = outcome(topic, **{field: value})
    assert reason(result) is Reason.MISSING_FIELD
    assert result.message == f"{field}: missing"


@pytest.mark.parametrize(
    ("topic", "field"),
    [
        *REQUIRED,
        ("clicks", "event_id"),
        ("clicks", "value"),
        ("clicks", "ts"),
        ("clicks", "attributes"),
        ("comments", "item_id"),
        ("items", "attributes"),
        ("items", "ts"),
        ("erasures", "ts"),
    ],
)
@pytest.mark.parametrize("value", [True, [], {"a": 1}, 5, "5"], ids=repr)
def test_wrong_type(topic: Topic, field: str, value: object) -> None:
    numeric, textual = field in ("value", "ts"), field not in ("value", "attributes")
    fits = (
        (numeric and type(value) is int)
        or (textual and isinstance(value, str))
        or (field == "attributes" and isinstance(value, dict))
    )
    result = outcome(topic, **{field: value})
    if fits:
        assert reason(result) in (None, Reason.BAD_TS)
    else:
        assert reason(result) is Reason.WRONG_TYPE


def test_wrong_type_says_which_field_and_types() -> None:
    assert outcome("clicks", item_id=4).message == "item_id: expected string, got number"
    assert outcome("clicks", ts=[]).message == "ts: expected number or string, got array"
    assert outcome_of("clicks", b" [1]") == Reject(
        Reason.WRONG_TYPE, "the value: expected object, got array", record("clicks", b" [1]", b"u")
    )


@pytest.mark.parametrize("value", [{"a": {}}, {"a": [1]}, {"a": [["x"]]}, {"ok": 1, "a": [None]}], ids=repr)
def test_item_attributes_are_plain(value: object) -> None:
    assert reason(outcome("items", attributes=value)) is Reason.WRONG_TYPE


@pytest.mark.parametrize("number", ["1e400", "-1e999", "1" + "0" * 400, "1" + "0" * 5000])
@pytest.mark.parametrize("field", ["value", "ts"])
def test_number_that_no_float_holds(field: str, number: str) -> None:
    message = jsonb({k: v for k, v in CLICK.items() if k != "ts"})[:-1] + f', "{field}": {number}}}'.encode()
    assert reason(outcome_of("clicks", message)) is Reason.NOT_FINITE


@pytest.mark.parametrize("topic", ["clicks", "items"])
def test_attribute_that_no_float_holds(topic: Topic) -> None:
    message = jsonb(GOOD[topic])[:-1] + b', "attributes": {"a": 1e400}}'
    assert reason(outcome_of(topic, message)) is Reason.NOT_FINITE


@pytest.mark.parametrize("other", [b"1e400", b'"\xff"', b"9" * 5000, b'"\\u0000"', b"[[[]]]"])
def test_unknown_fields_are_ignored_whatever_they_hold(other: bytes) -> None:
    for topic, good in GOOD.items():
        assert reason(outcome_of(topic, jsonb(good)[:-1] + b', "other": ' + other + b"}")) is None


def test_first_fault_in_field_order_is_the_reason() -> None:
    message = b'{"ts": "x", "action": "", "item_id": "", "user_id": 5}'
    assert reason(outcome_of("clicks", message)) is Reason.WRONG_TYPE
    assert reason(outcome("clicks", action="", item_id="", ts="x")) is Reason.EMPTY_ID


def test_fault_in_the_first_of_a_repeated_field() -> None:
    message = b'{"user_id": 5, "user_id": "u", "item_id": "i", "action": "a"}'
    assert reason(outcome_of("clicks", message)) is Reason.WRONG_TYPE


@pytest.mark.parametrize("topic", GOOD)
@pytest.mark.parametrize("key", [None, b"", b"v", b"uu", b"U", b"u ", b'"u"', b"\xff", b"\x00\x00\x00\x01"])
def test_key_that_is_not_the_id(topic: Topic, key: bytes | None) -> None:
    assert reason(outcome_of(topic, jsonb(GOOD[topic]), key)) is Reason.KEY_MISMATCH


@pytest.mark.parametrize("topic", ["clicks", "comments", "erasures"])
def test_null_value_where_it_means_nothing(topic: Topic) -> None:
    assert reason(outcome_of(topic, None)) is Reason.NO_VALUE


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (b"i", None),
        ("й".encode() * events.ID_CHARS_MAX, None),
        ("й".encode() * (events.ID_CHARS_MAX + 1), Reason.ID_TOO_LONG),
        (b"", Reason.EMPTY_ID),
        (None, Reason.KEY_MISMATCH),
        (b"\xff", Reason.NOT_UTF8),
    ],
)
def test_withdrawal_names_its_item_by_the_key(key: bytes | None, expected: Reason | None) -> None:
    result = outcome_of("items", None, key)
    assert reason(result) is expected
    if expected is None:
        assert key is not None
        assert result == Withdrawn(key.decode(), NOW_S)


def test_every_reason_is_reached() -> None:
    """One message for each; `unknown_type` is of HTTP alone."""
    cases: dict[Reason, object] = {
        Reason.NO_VALUE: outcome_of("clicks", None),
        Reason.MESSAGE_TOO_LARGE: outcome_of("clicks", b" " * (events.MESSAGE_BYTES_MAX + 1)),
        Reason.NESTED_TOO_DEEP: outcome_of("clicks", b"[" * 1000),
        Reason.NOT_UTF8: outcome_of("clicks", b"\xff"),
        Reason.NOT_JSON: outcome_of("clicks", b"x"),
        Reason.WRONG_TYPE: outcome("clicks", user_id=1),
        Reason.MISSING_FIELD: outcome("clicks", action=ABSENT),
        Reason.EMPTY_ID: outcome("clicks", item_id=""),
        Reason.ID_TOO_LONG: outcome("clicks", item_id="x" * 999),
        Reason.BAD_ACTION: outcome("clicks", action=""),
        Reason.TEXT_EMPTY: outcome("comments", text=""),
        Reason.TEXT_TOO_LONG: outcome("comments", text="x" * 200_000),
        Reason.NOT_FINITE: outcome("clicks", value=math.nan),
        Reason.VALUE_OUT_OF_RANGE: outcome("clicks", value=1e16),
        Reason.BAD_TS: outcome("clicks", ts="x"),
        Reason.TS_IN_FUTURE: outcome("clicks", ts=1e12),
        Reason.BAD_VECTOR: outcome("items", vector=[]),
        Reason.ATTRIBUTES_TOO_LARGE: outcome("items", attributes={"a": "x" * 20_000}),
        Reason.KEY_MISMATCH: outcome_of("clicks", jsonb(CLICK), b"v"),
        Reason.UNKNOWN_TYPE: validate_event({"type": "item"}, NOW_S),
    }
    assert {expected: reason(result) for expected, result in cases.items()} == {r: r for r in Reason}


# --- batches --------------------------------------------------------------------------------------


def test_batch_is_parted_in_order() -> None:
    values = [jsonb(CLICK), b"poison", jsonb(CLICK | {"item_id": "j"}), None, jsonb(CLICK | {"item_id": "k"})]
    records = [record("clicks", value, b"u", offset=offset) for offset, value in enumerate(values)]
    decoded = decode_batch("clicks", records)
    assert [e.item_id for e in decoded.events] == ["i", "j", "k"]
    assert [r.offset for r in decoded.records] == [0, 2, 4]
    assert [(r.record.offset, r.reason) for r in decoded.rejects if r.record] == [
        (1, Reason.NOT_JSON),
        (3, Reason.NO_VALUE),
    ]
    assert decoded.rejects[0].record is records[1]


def test_empty_batch() -> None:
    assert decode_batch("items", []) == ([], [], [], [])


def test_decoding_twice_gives_the_same() -> None:
    records = [record("clicks", v, b"u", offset=o) for o, v in enumerate([jsonb(CLICK), b"x", b"\xff", b"{}"])]
    assert decode_batch("clicks", records) == decode_batch("clicks", records)


# --- without a record -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", [jsonb, dict], ids=["bytes", "object"])
def test_validated_event_is_the_streams(form: Callable[[dict[str, Any]], Any]) -> None:
    assert validate_event(form(CLICK | {"type": "click"}), NOW_S) == outcome("clicks")
    assert validate_event(form(COMMENT | {"type": "comment"}), NOW_S) == outcome("comments")


@pytest.mark.parametrize(
    "changes",
    [
        {"user_id": ""},
        {"user_id": 5},
        {"item_id": None},
        {"action": "x" * 65},
        {"value": 1e300},
        {"value": math.nan},
        {"value": math.inf},
        {"value": 10**400},
        {"ts": "x"},
        {"ts": 1e15},
        {"attributes": {"a": "x" * 20_000}},
        {"user_id": "\ud800"},
        {"attributes": [[[]]]},
    ],
    ids=str,
)
def test_validated_event_is_rejected_as_by_the_stream(changes: dict[str, Any]) -> None:
    message = CLICK | {"type": "click"} | changes
    encoded = json.dumps(message).encode()
    by_stream = outcome_of("clicks", encoded)
    assert isinstance(by_stream, Reject)
    for form in (message, encoded):
        result = validate_event(form, NOW_S)
        assert isinstance(result, Reject)
        assert (result.reason, result.message, result.record) == (by_stream.reason, by_stream.message, None)


@pytest.mark.parametrize("kind", [ABSENT, None, "", "item", "clicks", 5, ["click"]])
def test_type_that_names_no_topic(kind: object) -> None:
    message = CLICK if kind is ABSENT else CLICK | {"type": kind}
    assert reason(validate_event(message, NOW_S)) is Reason.UNKNOWN_TYPE
    assert reason(validate_event(jsonb(message), NOW_S)) is Reason.UNKNOWN_TYPE


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (b"", Reason.NOT_JSON),
        (b"\xff", Reason.NOT_UTF8),
        (b"[]", Reason.WRONG_TYPE),
        (b'{"type": "click", "value": NaN}', Reason.NOT_FINITE),
        (b"[" * 5000, Reason.NESTED_TOO_DEEP),
        (b" " * (events.MESSAGE_BYTES_MAX + 1), Reason.MESSAGE_TOO_LARGE),
        ({"type": "click", "x": {1, 2}}, Reason.WRONG_TYPE),
        ({"type": "click", "x": b"bytes"}, Reason.WRONG_TYPE),
    ],
    ids=lambda m: str(m)[:20],
)
def test_what_is_no_event_at_all(message: Any, expected: Reason) -> None:
    assert reason(validate_event(message, NOW_S)) is expected


def test_object_that_is_nested_too_deep_or_in_itself() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert reason(validate_event({"type": "click", "x": deep}, NOW_S)) is Reason.NESTED_TOO_DEEP
    while deep:  # unwound by hand: freeing so long a chain at once is as deep as building it
        deep = deep[0]
    circle: dict[str, Any] = {"type": "click"}
    circle["x"] = circle
    assert reason(validate_event(circle, NOW_S)) is Reason.WRONG_TYPE


def test_absent_ts_is_now() -> None:
    message = {"type": "click", "user_id": "u", "item_id": "i", "action": "a"}
    assert validate_event(message, 12.5) == Click("u", "i", "a", ts=12.5)


def test_recorded_streams_have_no_future_but_the_ceiling() -> None:
    message = CLICK | {"type": "click", "ts": events.TS_S_MAX}
    for now_s in (-1.0, events.TS_S_MAX):
        assert isinstance(validate_event(message, now_s), Click)
        assert reason(validate_event(message | {"ts": events.TS_S_MAX + 1}, now_s)) is Reason.TS_IN_FUTURE


def test_an_absent_ts_is_a_fault_only_where_nothing_stands_for_it() -> None:
    message = CLICK | {"type": "click", "ts": None}
    assert validate_event(message, -1.0) == Reject(
        Reason.MISSING_FIELD, "ts: missing, and no record's timestamp stands for it"
    )
    assert isinstance(validate_event(message, events.TS_S_MAX), Click)


@pytest.mark.parametrize("topic", GOOD)
def test_validate_checks_all_but_the_key(topic: Topic) -> None:
    assert validate(topic, jsonb(GOOD[topic]), NOW_S) == outcome(topic)
    assert reason(validate(topic, b"{}", NOW_S)) is Reason.MISSING_FIELD


# --- dead letters ---------------------------------------------------------------------------------


def rejected(value: bytes | None, key: bytes | None = b"u", **place: Any) -> Reject:
    (reject,) = decode_batch("clicks", [record("pre.clicks", value, key, **place)]).rejects
    return reject


def test_golden_dead_letter() -> None:
    letter = dead_letter(rejected(b'{"user_id":"u"}', offset=1041, headers=(("trace", b"\x00\xff"), ("none", None))))
    assert letter == DeadLetter(
        "pre.clicks.dlq",
        b"u",
        b'{"user_id":"u"}',
        [
            ("trace", b"\x00\xff"),
            ("none", None),
            ("__streams.errors.exception", b"missing_field"),
            ("__streams.errors.message", b"item_id: missing"),
            ("__streams.errors.topic", b"pre.clicks"),
            ("__streams.errors.partition", b"3"),
            ("__streams.errors.offset", b"1041"),
            ("headwater.timestamp_ms", b"1767225600000"),
        ],
    )


@pytest.mark.parametrize("value", [None, b"", b"\xff\x00", b"{" * 300, b"x" * (events.MESSAGE_BYTES_MAX + 20_000)])
@pytest.mark.parametrize("key", [None, b"", b"\xff"])
def test_dead_letter_is_the_message_byte_for_byte(value: bytes | None, key: bytes | None) -> None:
    letter = dead_letter(rejected(value, key))
    assert (letter.key, letter.value) == (key, value)


def test_headers_of_an_earlier_death_stay_and_ours_come_last() -> None:
    first = dead_letter(rejected(b"x", offset=1))
    again = dead_letter(rejected(b"x", offset=2, headers=tuple(first.headers)))
    assert again.headers[: len(first.headers)] == first.headers
    assert dict(again.headers)["__streams.errors.offset"] == b"2"


def bytes_of(letter: DeadLetter) -> int:
    headers = sum(len(name.encode()) + len(value or b"") + 10 for name, value in letter.headers)
    return len(letter.key or b"") + len(letter.value or b"") + headers


def test_dead_letter_at_its_limit() -> None:
    overhead = bytes_of(dead_letter(rejected(b"x" * (events.MESSAGE_BYTES_MAX + 1)))) - events.MESSAGE_BYTES_MAX - 1
    fits = b"x" * (events.DEAD_LETTER_BYTES_MAX - overhead)
    letter = dead_letter(rejected(fits))
    assert letter.value == fits
    assert bytes_of(letter) == events.DEAD_LETTER_BYTES_MAX
    assert dead_letter(rejected(fits + b"x")).value == b""


def test_message_too_large_for_its_dead_letter_is_recorded_by_its_coordinates() -> None:
    letter = dead_letter(rejected(b"x" * 2_000_000, offset=5, headers=(("trace", b"1"),)))
    assert letter.topic == "pre.clicks.dlq"
    assert letter.key == b"u"
    assert letter.value == b""
    assert letter.headers == [
        ("trace", b"1"),
        ("__streams.errors.exception", b"message_too_large"),
        ("__streams.errors.message", b"the value is over 1000000 bytes"),
        ("__streams.errors.topic", b"pre.clicks"),
        ("__streams.errors.partition", b"3"),
        ("__streams.errors.offset", b"5"),
        ("headwater.timestamp_ms", b"1767225600000"),
        ("headwater.value_bytes", b"2000000"),
        ("headwater.omitted", b"value"),
    ]


@pytest.mark.parametrize(
    ("key", "header", "omitted"),
    [
        (b"u", b"", b"value"),
        (b"u", b"h" * events.DEAD_LETTER_BYTES_MAX, b"value,headers"),
        (b"k" * events.DEAD_LETTER_BYTES_MAX, b"", b"value,headers,key"),
        (b"k" * events.DEAD_LETTER_BYTES_MAX, b"h" * events.DEAD_LETTER_BYTES_MAX, b"value,headers,key"),
    ],
)
def test_what_does_not_fit_is_left_out_and_named(key: bytes, header: bytes, omitted: bytes) -> None:
    letter = dead_letter(rejected(b"x" * events.DEAD_LETTER_BYTES_MAX, key, headers=(("h", header),)))
    assert bytes_of(letter) <= events.DEAD_LETTER_BYTES_MAX
    assert dict(letter.headers)["headwater.omitted"] == omitted
    assert letter.key == (None if b"key" in omitted else key)
    assert (("h", header) in letter.headers) == (b"headers" not in omitted)


def test_no_word_of_a_user_in_reasons() -> None:
    secret = "hunter2"
    messages: list[bytes] = [
        f'"{secret}"'.encode(),
        f"{secret}".encode(),
        *(jsonb(CLICK | {field: f"{secret}" * 99}) for field in ("user_id", "item_id", "action", "ts", "value")),
        *(jsonb(CLICK | {field: [secret]}) for field in CLICK),
        jsonb(CLICK | {"attributes": {secret: secret * 9999}}),
        jsonb(CLICK | {"attributes": secret}),
        jsonb(CLICK | {"user_id": secret}),
    ]
    for message in messages:
        reject = rejected(message, secret.encode()[:-1])
        assert secret not in reject.message
        for name, value in dead_letter(reject).headers:
            assert secret not in name
            assert secret.encode() not in (value or b"")
