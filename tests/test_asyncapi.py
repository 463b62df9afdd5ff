"""docs/asyncapi.yaml is a valid AsyncAPI 3.0 document and tells what the program does."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from streams import codec, events
from streams.codec import Reason, Reject
from tests.records import NOW_MS, outcome_of, record

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
DOCUMENT: dict[str, Any] = yaml.safe_load((DOCS / "asyncapi.yaml").read_text(encoding="utf-8"))
MESSAGES: dict[str, Any] = DOCUMENT["components"]["messages"]
TOPIC_OF_MESSAGE: dict[str, codec.Topic] = {
    "click": "clicks",
    "comment": "comments",
    "item": "items",
    "erasure": "erasures",
}


@pytest.fixture(scope="module")
def asyncapi() -> Any:
    schema = json.loads((Path(__file__).parent / "vendor" / "asyncapi-3.0.0.json").read_text(encoding="utf-8"))
    return jsonschema.Draft7Validator(schema)


def test_document_is_valid_asyncapi_3(asyncapi: Any) -> None:
    assert DOCUMENT["asyncapi"] == "3.0.0"
    assert [f"{e.json_path}: {e.message}" for e in asyncapi.iter_errors(DOCUMENT)] == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("operations", "receiveClicks", "action"), "publish"),
        (("channels", "clicks", "adress"), "clicks"),
        (("components", "schemas", "click", "type"), "structure"),
        (("info", "version"), None),
    ],
)
def test_validation_would_notice_a_fault(asyncapi: Any, path: tuple[str, ...], value: object) -> None:
    document = copy.deepcopy(DOCUMENT)
    at = document
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    assert not asyncapi.is_valid(document)


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for child in node.values():
            yield from references(child)
    elif isinstance(node, list):
        for child in node:
            yield from references(child)


def resolve(reference: str) -> Any:
    at: Any = DOCUMENT
    for step in reference.removeprefix("#/").split("/"):
        at = at[step]
    return at


def test_every_reference_leads_somewhere_within_the_document() -> None:
    found = list(references(DOCUMENT))
    assert len(found) > 20
    for reference in found:
        assert reference.startswith("#/"), reference
        assert resolve(reference), reference


def test_every_component_is_used() -> None:
    used = set(references(DOCUMENT))
    for kind in ("messages", "schemas"):
        for name in DOCUMENT["components"][kind]:
            assert f"#/components/{kind}/{name}" in used


def test_exported_files_are_current() -> None:
    stale = [
        str(path.relative_to(ROOT))
        for path, text in events.exported(DOCS).items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    assert stale == [], "write them again: .venv/bin/python -m streams.events"


def test_export_is_a_fixed_point(tmp_path: Path) -> None:
    (tmp_path / "asyncapi.yaml").write_text((DOCS / "asyncapi.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    written = events.export(tmp_path)
    assert sorted(p.name for p in written) == [
        "asyncapi.yaml",
        "click.json",
        "comment.json",
        "erasure.json",
        "item.json",
    ]
    for path in written:
        assert path.read_bytes() == (DOCS / path.relative_to(tmp_path)).read_bytes()


def test_export_says_which_markers_are_lost(tmp_path: Path) -> None:
    (tmp_path / "asyncapi.yaml").write_text("asyncapi: 3.0.0\n", encoding="utf-8")
    with pytest.raises(ValueError, match="lost its lines"):
        events.export(tmp_path)


@pytest.mark.parametrize("name", events.SCHEMA_TYPES)
def test_payload_schemas_are_the_types_the_codec_decodes(name: str) -> None:
    assert resolve(MESSAGES[name]["payload"]["$ref"]) == events.json_schema(name)
    assert json.loads((DOCS / "schemas" / f"{name}.json").read_text(encoding="utf-8")) == events.json_schema(name)


def examples(key: str) -> list[Any]:
    return [
        pytest.param(name, example, id=f"{name}-{example.get('name', example.get('reason'))}-{number}")
        for name, message in MESSAGES.items()
        for number, example in enumerate(message.get(key, []))
    ]


def decode(name: str, example: dict[str, Any]) -> events.Event | Reject:
    payload = example.get("payload")
    value = example["raw"] if "raw" in example else json.dumps(payload, ensure_ascii=False)
    own = payload.get("item_id" if name == "item" else "user_id") if isinstance(payload, dict) else None
    key = str(example.get("key", own or "u-17"))
    return outcome_of(TOPIC_OF_MESSAGE[name], value.encode(), key.encode())


@pytest.mark.parametrize(("name", "example"), examples("examples"))
def test_every_example_is_accepted(name: str, example: dict[str, Any]) -> None:
    message = MESSAGES[name]
    for part in ("payload", "headers"):
        if part in example:
            schema = message[part]
            schema = resolve(schema["$ref"]) if "$ref" in schema else schema
            jsonschema.validate(example[part], schema, format_checker=jsonschema.FormatChecker())
    if name in TOPIC_OF_MESSAGE:
        assert not isinstance(decode(name, example), Reject)


@pytest.mark.parametrize(("name", "example"), examples("x-rejected-examples"))
def test_every_rejected_example_is_rejected_for_its_reason(name: str, example: dict[str, Any]) -> None:
    outcome = decode(name, example)
    assert isinstance(outcome, Reject)
    assert outcome.reason == example["reason"]


def test_a_null_value_withdraws_as_described() -> None:
    assert MESSAGES["withdrawn"]["payload"] == {"type": "null"}
    decoded = codec.decode_batch("items", [record("items", None, b"i-4")])
    assert decoded.events == [events.Withdrawn("i-4", NOW_MS / 1e3)]


def test_dead_letter_headers_are_the_described_ones() -> None:
    described = MESSAGES["deadLetter"]["headers"]
    assert described["properties"]["__streams.errors.exception"]["enum"] == [
        reason.value for reason in Reason if reason is not Reason.UNKNOWN_TYPE
    ]
    for size in (3, events.DEAD_LETTER_BYTES_MAX + 1):
        (reject,) = codec.decode_batch("clicks", [record("clicks", b"x" * size, b"u", offset=7)]).rejects
        headers = {name: (value or b"").decode() for name, value in codec.dead_letter(reject).headers}
        jsonschema.validate(headers, described)
        assert set(headers) <= set(described["properties"])
    assert set(headers) == set(described["properties"])


def test_channels_are_the_public_topics() -> None:
    sources = ["clicks", "comments", "items", "erasures"]
    letters = ["clicks.dlq", "comments.dlq", "items.dlq", "erasures.dlq"]
    assert list(DOCUMENT["channels"]) == [*sources, *letters, "encoder-checkpoints"]
    for name, channel in DOCUMENT["channels"].items():
        assert channel["address"] == name


def test_limits_in_the_prose_are_the_programs() -> None:
    prose = DOCUMENT["info"]["description"]
    for limit in (
        f"{events.MESSAGE_BYTES_MAX:,} bytes",
        f"{events.NESTING_MAX} objects and arrays",
        f"{events.TS_AHEAD_S_MAX:,.0f} s",
        f"{events.ATTRIBUTES_BYTES_MAX:,} bytes",
        "1e-6",
    ):
        assert limit in " ".join(prose.split())
    assert events.VECTOR_NORM_MIN == 1e-6
    assert f"{events.DEAD_LETTER_BYTES_MAX:,} bytes" in MESSAGES["deadLetter"]["description"]
