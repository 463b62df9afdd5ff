"""The public events, their limits and their JSON Schemas.

One msgspec type per topic of the outside: a behaviour event (`Click`), a text event (`Comment`), a
catalogue entry (`Item`, or `Withdrawn`) and the wish to be forgotten (`Erasure`). The types are the wire
shapes; `codec` checks what a shape cannot say and leaves `ts` and `value` as plain floats.

`python -m streams.events` writes docs/schemas/*.json and the generated part of docs/asyncapi.yaml.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
from msgspec import Meta

# --- limits, each with its reason -----------------------------------------------------------------

# A URL, or a UUID with a name before it, fits; ids are row keys and travel in every record.
ID_CHARS_MAX: Final = 256
ACTION_CHARS_MAX: Final = 64  # a word, not a sentence
TEXT_CHARS_MAX: Final = 100_000  # a long article; it is encoded in windows, so this bounds one message's work
VALUE_ABS_MAX: Final = 1e15  # seconds, money or a rating; its square is still finite in float32
VECTOR_NUMBERS_MAX: Final = 4_096  # the widest embeddings in use
VECTOR_NORM_MIN: Final = 1e-6  # below this a vector has no direction to normalise to
ATTRIBUTES_MAX: Final = 64  # entries
ATTRIBUTES_BYTES_MAX: Final = 16_384  # as written in the message
NESTING_MAX: Final = 128  # objects and arrays within one another; far below every Python stack limit
TS_S_MIN: Final = -62_135_596_800.0  # 0001-01-01T00:00:00Z, the first second that RFC 3339 can write here
TS_S_MAX: Final = 4_102_444_800.0  # 2100-01-01T00:00:00Z; milliseconds taken for seconds land far beyond it
TS_AHEAD_S_MAX: Final = 86_400.0  # ahead of the record's own timestamp: wrong zones pass, wrong units do not
MESSAGE_BYTES_MAX: Final = 1_000_000  # a value; Kafka's default for a whole batch is 1,048,588
DEAD_LETTER_BYTES_MAX: Final = 1_040_000  # key, value, headers; a producer's default request is 1,048,576

_UTF8_BYTES_MAX = 4  # per character
_NUMBER_BYTES_MAX = 26  # "-1.2345678901234567e-308, "
_FLOAT32_MAX = 3.4e38

# Fields that are within their limits make a message within its own (written as plain UTF-8).
assert (
    TEXT_CHARS_MAX * _UTF8_BYTES_MAX
    + 4 * ID_CHARS_MAX * _UTF8_BYTES_MAX
    + ATTRIBUTES_BYTES_MAX
    + VECTOR_NUMBERS_MAX * _NUMBER_BYTES_MAX
    < MESSAGE_BYTES_MAX
)
# Every message that is not over its limit fits into its dead letter, with 16 KiB of headers and the key.
assert MESSAGE_BYTES_MAX + 16_384 + ID_CHARS_MAX * _UTF8_BYTES_MAX < DEAD_LETTER_BYTES_MAX < 1_048_576
assert VECTOR_NUMBERS_MAX * VALUE_ABS_MAX**2 < _FLOAT32_MAX
assert sys.getrecursionlimit() > 4 * NESTING_MAX
assert TS_S_MIN < 0 < TS_AHEAD_S_MAX < TS_S_MAX < 1e12  # 1e12: today in milliseconds

# --- field types ----------------------------------------------------------------------------------

Id = Annotated[str, Meta(min_length=1, max_length=ID_CHARS_MAX)]
_Number = Annotated[float, Meta(ge=-VALUE_ABS_MAX, le=VALUE_ABS_MAX)]
_Integer = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]

AttributeValue = bool | _Integer | float | str | list[str] | None
Attributes = Annotated[dict[str, AttributeValue], Meta(max_length=ATTRIBUTES_MAX)]
FreeAttributes = Annotated[dict[str, Any], Meta(max_length=ATTRIBUTES_MAX)]
Vector = Annotated[list[_Number], Meta(min_length=1, max_length=VECTOR_NUMBERS_MAX)]

_TS = "Event time: Unix seconds, or an RFC 3339 date-time with its offset. "
_Rfc3339 = Annotated[datetime, Meta(tz=True)]

if TYPE_CHECKING:
    # What the program sees: the codec has put plain floats here.
    EventTs = float
    ItemTs = float | None
    Value = float
    _ABSENT: Any
else:
    # What the wire may carry.
    EventTs = Annotated[
        float | _Rfc3339 | None,
        Meta(description=_TS + "Absent or null: the record's own timestamp.", examples=[881250949.0]),
    ]
    ItemTs = Annotated[
        float | _Rfc3339 | None,
        Meta(description=_TS + "The item is a candidate for events strictly later; absent or null: from the start."),
    ]
    Value = Annotated[
        _Number | None,
        Meta(description="Strength: a rating on its scale, seconds watched, ...; absent or null: 1.0."),
    ]
    _ABSENT = None


class Click(msgspec.Struct, gc=False, omit_defaults=True):
    """Behaviour event: a user did something with an item. Record key: user_id."""

    user_id: Id
    item_id: Id
    action: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=ACTION_CHARS_MAX,
            description="Open set: view, click, like, purchase, rating, skip, ...; others get a default weight.",
            examples=["click", "rating"],
        ),
    ]
    value: Value = 1.0
    ts: EventTs = _ABSENT
    event_id: Id | None = None
    attributes: FreeAttributes | None = None


class Comment(msgspec.Struct, gc=False, omit_defaults=True):
    """Text event: a user wrote something, about an item or in general. Record key: user_id."""

    user_id: Id
    text: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=TEXT_CHARS_MAX,
            description="Any language; long text is encoded in windows.",
        ),
    ]
    item_id: Id | None = None
    ts: EventTs = _ABSENT
    event_id: Id | None = None


class Item(msgspec.Struct, gc=False, omit_defaults=True):
    """Catalogue entry; the last one of an item_id counts, a null value withdraws it. Record key: item_id."""

    item_id: Id
    text: Annotated[
        str,
        Meta(max_length=TEXT_CHARS_MAX, description="Title, description, ...; may be empty."),
    ]
    attributes: Attributes | None = None
    vector: (
        Annotated[Vector, Meta(description="Embedding of another modality (image, audio), not all zeros.")] | None
    ) = None
    ts: ItemTs = _ABSENT


class Erasure(msgspec.Struct, gc=False, omit_defaults=True):
    """Forget this user: what came before, in the order of the partition's events. Record key: user_id."""

    user_id: Id
    ts: EventTs = _ABSENT
    unlearn: Annotated[
        bool, Meta(description="Also take back what the item model has learnt from this user's events.")
    ] = False


class Withdrawn(msgspec.Struct, gc=False):
    """An item left the catalogue: a record on `items` with this key and a null value."""

    item_id: str
    ts: float


Event = Click | Comment | Item | Withdrawn | Erasure

# --- JSON Schema ----------------------------------------------------------------------------------

SCHEMA_TYPES: Final = {"click": Click, "comment": Comment, "item": Item, "erasure": Erasure}
_GENERATED_BEGIN = "    # Generated by `python -m streams.events`: begin\n"
_GENERATED_END = "    # Generated: end\n"


def json_schema(name: str) -> dict[str, Any]:
    """The JSON Schema of "click", "comment", "item" or "erasure": one object, in draft 7 and later."""
    schema: dict[str, Any]
    (schema,) = msgspec.json.schema_components([SCHEMA_TYPES[name]])[1].values()
    return schema


def export(docs: Path) -> list[Path]:
    """Write docs/schemas/*.json and the generated part of docs/asyncapi.yaml; return the files written."""
    written = []
    for path, text in exported(docs).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def exported(docs: Path) -> dict[Path, str]:
    """What `export` would write: path -> text. Raises ValueError when asyncapi.yaml lost its markers."""
    schemas = {name: json_schema(name) for name in SCHEMA_TYPES}
    files = {docs / "schemas" / f"{name}.json": _indented(schema) + "\n" for name, schema in schemas.items()}
    asyncapi = docs / "asyncapi.yaml"
    head, begin, rest = asyncapi.read_text(encoding="utf-8").partition(_GENERATED_BEGIN)
    _, end, tail = rest.partition(_GENERATED_END)
    if not (begin and end):
        raise ValueError(f"{asyncapi}: lost its lines {_GENERATED_BEGIN.strip()!r} and {_GENERATED_END.strip()!r}")
    # JSON is YAML: no YAML library is needed to write it.
    inlined = "".join(
        f"    {name}: " + _indented(schema).replace("\n", "\n    ") + "\n" for name, schema in schemas.items()
    )
    files[asyncapi] = head + begin + inlined + end + tail
    return files


def _indented(schema: dict[str, Any]) -> str:
    return json.dumps(schema, indent=2, ensure_ascii=False)


if __name__ == "__main__":
    for file in export(Path(__file__).parent.parent / "docs"):
        sys.stdout.write(f"{file}\n")
