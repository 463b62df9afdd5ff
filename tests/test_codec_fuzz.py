"""Whatever the bytes, decoding returns an event or a reject for every record, and the same one each time."""

import json
import math
import string
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streams import codec, events
from streams.codec import Reason, Reject, Topic, dead_letter, decode_batch, validate_event
from streams.events import Click, Comment, Erasure, Item, Withdrawn
from tests.records import NOW_MS, NOW_S, record

TOPICS: tuple[Topic, ...] = ("clicks", "comments", "items", "erasures")
SETTINGS = settings(max_examples=80)

ids = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)
times = st.one_of(
    st.none(),
    st.integers(-10, int(NOW_S)),
    st.floats(-1e9, NOW_S),
    st.datetimes(timezones=st.timezones()).map(lambda t: t.isoformat()),
    st.sampled_from(["2026-01-01T00:00:00Z", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59.9999999Z"]),
)
plain = st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(-1e9, 1e9), ids, st.lists(ids, max_size=3))
good_messages: dict[Topic, st.SearchStrategy[dict[str, Any]]] = {
    "clicks": st.fixed_dictionaries(
        {"user_id": ids, "item_id": ids, "action": ids},
        optional={
            "value": st.floats(-1e9, 1e9),
            "event_id": ids,
            "attributes": st.dictionaries(ids, plain, max_size=4),
        },
    ),
    "comments": st.fixed_dictionaries(
        {"user_id": ids, "text": ids.map(lambda t: "a" + t)}, optional={"item_id": ids, "event_id": ids}
    ),
    "items": st.fixed_dictionaries(
        {"item_id": ids, "text": st.text(st.characters(codec="utf-8"))},
        optional={
            "attributes": st.dictionaries(ids, plain, max_size=4),
            "vector": st.lists(st.floats(0.5, 9), min_size=1, max_size=9),
        },
    ),
    "erasures": st.fixed_dictionaries({"user_id": ids}),
}
# What JSON writers and their bugs put where a value should be.
odd_values = st.one_of(
    st.sampled_from(
        [
            *(
                "NaN",
                "Infinity",
                "-Infinity",
                "1e999",
                "-1e400",
                "9" * 400,
                "9" * 5000,
                "-0",
                "1e-999",
                "01",
                "+1",
                ".5",
            ),
            *(
                '"\\ud800"',
                '"\\udfff\\ud800"',
                '"\\u0000"',
                '""',
                '" "',
                "null",
                "true",
                "[]",
                "{}",
                "[[[[]]]]",
                "",
                "'x'",
            ),
            *(
                '"' + "x" * 300 + '"',
                "[" * 1000 + "]" * 1000,
                "[" * 200,
                '{"a":' * 500,
                '"2026-01-01T00:00:60Z"',
                "nul",
            ),
            *("[1e999]", '["1"]', "[0,0]", '{"a":1e999}', '{"a":{"b":1e999}}', "{" + '"a":1,' * 99 + '"b":2}'),
            *('{"a":' + str(2**63) + "}", '{"a":' + str(-(2**63) - 1) + "}", '{"a":' + "9" * 5000 + "}", "1.1e15"),
            *("1e15", "62135596800e3", "-62135596801", '"+10000-01-01T00:00:00Z"', '"0001-01-01T00:00:00+23:59"'),
        ]
    ),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
        max_leaves=6,
    ).map(json.dumps),
)
fields = st.sampled_from(
    ["user_id", "item_id", "action", "value", "ts", "event_id", "attributes", "text", "vector", "type", "other"]
)
timestamps = st.one_of(st.just(NOW_MS), st.sampled_from([-1, 0, 2**63 - 1, -(2**63)]), st.integers(0, 2 * NOW_MS))


@st.composite
def mutated(draw: st.DrawFn, topic: Topic) -> bytes:
    """A good message with fields overwritten, repeated or added, then bytes cut, changed or put in."""
    message = draw(good_messages[topic])
    parts = [f"{json.dumps(name)}:{json.dumps(value)}" for name, value in message.items()]
    for name, value in draw(st.lists(st.tuples(fields, odd_values), max_size=3)):
        parts.insert(draw(st.integers(0, len(parts))), f"{json.dumps(name)}:{value}")
    encoded = bytearray("{" + ",".join(parts) + "}", "utf-8", "surrogatepass")
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(encoded)))
        end = at + draw(st.integers(0, 4))
        encoded[at:end] = draw(
            st.one_of(st.binary(max_size=4), st.sampled_from([b'"', b"\\", b"{", b"]", b"\xed\xa0"]))
        )
    return bytes(encoded)


@st.composite
def records(draw: st.DrawFn, topic: Topic) -> codec.Record:
    value = draw(st.one_of(mutated(topic), mutated(topic), st.binary(max_size=64), st.none()))
    key = draw(st.one_of(st.none(), st.binary(max_size=8), st.just(b"u")))
    if draw(st.booleans()) and value is not None:
        key = own_key(topic, value) or key
    headers = draw(st.lists(st.tuples(st.text(st.characters(codec="utf-8")), st.none() | st.binary()), max_size=2))
    return record(
        topic, value, key, offset=draw(st.integers(0, 2**50)), timestamp_ms=draw(timestamps), headers=tuple(headers)
    )


def own_key(topic: Topic, value: bytes) -> bytes | None:
    """The key that a right producer gives the message, when there is one."""
    try:
        message = json.loads(value)
        return str(message["item_id" if topic == "items" else "user_id"]).encode()
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def assert_sound(event: events.Event, carrier: codec.Record) -> None:
    """What the program relies on in every event."""
    own = event.item_id if isinstance(event, Item | Withdrawn) else event.user_id
    assert own.encode() == carrier.key
    for name in ("user_id", "item_id", "event_id"):
        value = getattr(event, name, None)
        if value is not None:
            assert 1 <= len(value) <= events.ID_CHARS_MAX
            value.encode()
    if isinstance(event, Withdrawn):
        return
    if event.ts is not None:
        assert type(event.ts) is float
        assert events.TS_S_MIN <= event.ts <= events.TS_S_MAX
        if carrier.timestamp >= 0:
            assert event.ts <= carrier.timestamp / 1e3 + events.TS_AHEAD_S_MAX
    else:
        assert isinstance(event, Item)
    if isinstance(event, Click):
        assert type(event.value) is float
        assert abs(event.value) <= events.VALUE_ABS_MAX
        assert 1 <= len(event.action) <= events.ACTION_CHARS_MAX
    if isinstance(event, Comment):
        assert event.text.strip()
    if isinstance(event, Comment | Item):
        assert len(event.text) <= events.TEXT_CHARS_MAX
        event.text.encode()
    if isinstance(event, Item) and event.vector is not None:
        assert all(type(x) is float and math.isfinite(x) for x in event.vector)
        assert math.hypot(*event.vector) >= events.VECTOR_NORM_MIN
    if isinstance(event, Click | Item):
        assert len(event.attributes or {}) <= events.ATTRIBUTES_MAX
    msgspec.json.encode(event.ts)


def assert_parted(topic: Topic, batch: list[codec.Record]) -> None:
    decoded: codec.Decoded[Any] = decode_batch(topic, batch)
    assert len(decoded.events) == len(decoded.records)
    kept = {id(r) for r in decoded.records}
    left = {id(r.record) for r in decoded.rejects}
    assert len(kept) + len(left) == len(batch)
    assert kept | left == {id(r) for r in batch}
    for event, carrier in zip(decoded.events, decoded.records, strict=True):
        assert_sound(event, carrier)
    for reject in decoded.rejects:
        assert reject.reason in Reason
        assert reject.reason is not Reason.UNKNOWN_TYPE
        assert reject.message.isascii()
        assert reject.record is not None
        letter = dead_letter(reject)
        assert (letter.key, letter.value) == (reject.record.key, reject.record.value)
        assert letter.headers[: len(reject.record.headers)] == list(reject.record.headers)
    assert decode_batch(topic, batch) == decoded


@pytest.mark.parametrize("topic", TOPICS)
def test_arbitrary_bytes_are_parted(topic: Topic) -> None:
    @SETTINGS
    @given(st.lists(st.tuples(st.binary(max_size=600), st.none() | st.binary(max_size=8)), max_size=3))
    @example([(b"\xff" * 300, b"u"), (b"[" * 300, None), (b'"' * 300, b"")])
    def check(pairs: list[tuple[bytes, bytes | None]]) -> None:
        assert_parted(topic, [record(topic, value, key) for value, key in pairs])

    check()


@pytest.mark.parametrize("topic", TOPICS)
def test_mutated_messages_are_parted(topic: Topic) -> None:
    @SETTINGS
    @given(st.lists(records(topic), max_size=3))
    def check(batch: list[codec.Record]) -> None:
        assert_parted(topic, batch)

    check()


@pytest.mark.parametrize("topic", TOPICS)
def test_json_like_soup_is_parted(topic: Topic) -> None:
    tokens = st.sampled_from(['{"', '":', '",', '"', "[", "]", "{", "}", "\\", "\\u", "d800", "e9", "-", ".", "null"])
    soup = st.lists(st.one_of(tokens, fields, st.sampled_from(string.printable)), max_size=300).map("".join)

    @SETTINGS
    @given(soup)
    def check(text: str) -> None:
        assert_parted(topic, [record(topic, text.encode(), b"u")])

    check()


@pytest.mark.parametrize("topic", TOPICS)
def test_good_messages_are_never_rejected(topic: Topic) -> None:
    @SETTINGS
    @given(good_messages[topic], times)
    def check(message: dict[str, Any], ts: object) -> None:
        value = json.dumps(message | {"ts": ts, "more": [message]}, ensure_ascii=False).encode()
        key = message["item_id" if topic == "items" else "user_id"].encode()
        decoded: codec.Decoded[Any] = decode_batch(topic, [record(topic, value, key)])
        if decoded.rejects:  # a date of any year may be in the future; "a" * 41 is a good action
            (reject,) = decoded.rejects
            assert reject.reason in (Reason.TS_IN_FUTURE, Reason.BAD_TS)
            assert isinstance(ts, str)
            return
        (event,) = decoded.events
        for name, expected in message.items():
            assert getattr(event, name) == expected
        kind = {"clicks": Click, "comments": Comment, "items": Item, "erasures": Erasure}[topic]
        assert msgspec.json.decode(msgspec.json.encode(event), type=kind) == event

    check()


@pytest.mark.parametrize(("topic", "kind"), [("clicks", "click"), ("comments", "comment")])
def test_http_validates_exactly_as_the_stream(topic: Topic, kind: str) -> None:
    @SETTINGS
    @given(mutated(topic))
    def check(value: bytes) -> None:
        try:
            message = json.loads(value)
        except (ValueError, RecursionError):
            assert isinstance(validate_event(value, NOW_S), Reject)
            return
        if not isinstance(message, dict):
            assert isinstance(validate_event(value, NOW_S), Reject)
            return
        message["type"] = kind
        encoded = json.dumps(message).encode()
        decoded: codec.Decoded[Any] = decode_batch(topic, [record(topic, encoded, own_key(topic, encoded) or b"u")])
        (by_stream,) = decoded.events or decoded.rejects
        for form in (message, encoded):
            by_http = validate_event(form, NOW_S)
            if isinstance(by_stream, Reject):
                assert isinstance(by_http, Reject)
                assert (by_http.reason, by_http.message) == (by_stream.reason, by_stream.message)
            else:
                assert by_http == by_stream

    check()


@SETTINGS
@given(st.one_of(st.binary(max_size=300), st.dictionaries(st.text(), st.integers() | st.text(), max_size=3)))
def test_validate_event_never_raises(message: Any) -> None:
    assert isinstance(validate_event(message, NOW_S), Click | Comment | Reject)
