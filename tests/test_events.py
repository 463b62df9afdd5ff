"""The public event types, their limits and schemas."""

import gc
import json
from typing import Any

import jsonschema
import msgspec
import pytest

from streams import events
from streams.events import Click, Comment, Erasure, Item, Withdrawn


@pytest.mark.parametrize(
    "event",
    [
        Click("u", "i", "click", ts=1.5),
        Click("u", "i", "rating", 4.0, 1.5, "e", {"a": {"b": [1]}}),
        Comment("u", "text", ts=1.5),
        Comment("u", "text", "i", 1.5, "e"),
        Item("i", ""),
        Item("i", "text", {"n": 1, "f": 1.5, "s": "s", "b": True, "l": ["a", "b"]}, [0.5, -0.5], 1.5),
        Erasure("u", 1.5),
    ],
    ids=lambda e: type(e).__name__,
)
def test_encoded_event_is_valid_by_its_schema_and_decodes_to_itself(event: Any) -> None:
    encoded = msgspec.json.encode(event)
    assert msgspec.json.decode(encoded, type=type(event)) == event
    jsonschema.validate(json.loads(encoded), events.json_schema(type(event).__name__.lower()))


def test_absent_fields_are_not_written() -> None:
    assert msgspec.json.encode(Click("u", "i", "click")) == b'{"user_id":"u","item_id":"i","action":"click"}'


@pytest.mark.parametrize("event", [Click("u", "i", "click"), Comment("u", "t"), Erasure("u"), Withdrawn("i", 0.0)])
def test_events_are_nothing_to_the_garbage_collector(event: Any) -> None:
    assert not gc.is_tracked(event)


@pytest.mark.parametrize(
    ("name", "required"),
    [
        ("click", ["user_id", "item_id", "action"]),
        ("comment", ["user_id", "text"]),
        ("item", ["item_id", "text"]),
        ("erasure", ["user_id"]),
    ],
)
def test_schema_requires_what_the_contract_requires(name: str, required: list[str]) -> None:
    schema = events.json_schema(name)
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["required"] == required
    assert "additionalProperties" not in schema


def test_schema_states_the_limits() -> None:
    click = events.json_schema("click")["properties"]
    comment = events.json_schema("comment")["properties"]
    item = events.json_schema("item")["properties"]
    assert click["user_id"] == {"type": "string", "minLength": 1, "maxLength": events.ID_CHARS_MAX}
    assert click["action"]["maxLength"] == events.ACTION_CHARS_MAX
    assert click["value"]["anyOf"][0]["maximum"] == events.VALUE_ABS_MAX
    assert click["value"]["default"] == 1.0
    assert click["attributes"]["anyOf"][0]["maxProperties"] == events.ATTRIBUTES_MAX
    assert comment["text"]["maxLength"] == events.TEXT_CHARS_MAX
    assert comment["text"]["minLength"] == 1
    assert "minLength" not in item["text"]
    assert item["vector"]["anyOf"][0]["maxItems"] == events.VECTOR_NUMBERS_MAX


@pytest.mark.parametrize("name", events.SCHEMA_TYPES)
def test_schema_allows_both_kinds_of_time_and_none(name: str) -> None:
    kinds = events.json_schema(name)["properties"]["ts"]["anyOf"]
    assert kinds == [{"type": "number"}, {"type": "string", "format": "date-time"}, {"type": "null"}]
