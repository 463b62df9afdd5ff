"""The user row: what is kept of one user, byte for byte (format version 1, little endian).

    header      32 B   version u1 | flags u1 | history_count u2 | comment_count u2 | text_dim u2 | seen_count u4
                       | events u4 | positives u4 | last_ts f8 | tail_weight f4
    history     16 B each, newest first: item key i8 | ts u4 (s) | weight f2 | action u1 | flags u1 (1 = low rating)
    positions    8 B each, as the history: topic u1 in the highest byte, offset in the other seven
    seen         8 B each, oldest first: keys of the items that fell out of the history
    comments    newest first: position u8 | ts f8 | item key i8 (0 = none) | scale f4 | vector i1[text_dim]
    tail        f4[text_dim], only when text_dim > 0: the decayed sum of the comments that fell out of the row

The history slots are the example's slots (streams.examples): they are copied as they are.
Another layout is another version: a reader refuses what is newer than itself (`RowVersionError`).
"""

import struct
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

ROW_VERSION: Final = 1

HISTORY_MAX: Final = 100  # behaviours kept with their weights; model.learner reads as many
SEEN_MAX: Final = 4096  # items kept as "consumed" beyond the history: 32 KiB a row at the most
COMMENTS_MAX: Final = 8  # comments kept one by one, for exact explanations; older ones live on in the tail

HEADER: Final = struct.Struct("<BBHHHIIIdf")
SLOT: Final = struct.Struct("<qIeBB")
POSITION: Final = struct.Struct("<Q")
COMMENT: Final = struct.Struct("<Qdqf")

SLOT_LOW: Final = 1  # flag of a slot: a low rating, evidence and never a target
OFFSET_BITS: Final = 56
OFFSET_MASK: Final = (1 << OFFSET_BITS) - 1
TS_MAX: Final = (1 << 32) - 1

# Append only: the index is stored. An action that is not listed is stored as "other".
ACTIONS: Final = (
    "other", "view", "click", "like", "purchase", "rating", "skip", "dislike", "comment", "answer", "ask", "edit",
    "create", "share", "save", "cart", "play", "complete", "follow", "reply", "bookmark", "download", "search",
)  # fmt: skip
ACTION_CODES: Final = {name: code for code, name in enumerate(ACTIONS)}

SLOT_DTYPE: Final = np.dtype([("key", "<i8"), ("ts", "<u4"), ("weight", "<f2"), ("action", "u1"), ("flags", "u1")])

assert HEADER.size == 32 and SLOT.size == SLOT_DTYPE.itemsize == 16
assert len(ACTIONS) <= 256 and HISTORY_MAX <= 255, "both are stored in one byte"


def row_bytes_max(text_dim: int) -> int:
    """What a user's row may take at most, whatever the user does.

    >>> row_bytes_max(384)
    40032
    """
    kept = HISTORY_MAX * (SLOT.size + POSITION.size) + 8 * SEEN_MAX
    return HEADER.size + kept + COMMENTS_MAX * (COMMENT.size + text_dim) + 4 * text_dim


class RowVersionError(ValueError):
    """A stored row is of a version that this build does not read."""


@dataclass(slots=True)
class UserRow:
    """A user row, taken apart. The byte sections are as stored (module docstring)."""

    events: int = 0
    positives: int = 0
    last_ts: float = 0.0
    history: bytes = b""
    positions: bytes = b""
    seen: bytes = b""
    comments: bytes = b""
    tail: bytes = b""
    tail_weight: float = 0.0
    text_dim: int = 0

    @property
    def history_count(self) -> int:
        return len(self.history) // SLOT.size

    @property
    def comment_count(self) -> int:
        return len(self.comments) // (COMMENT.size + self.text_dim) if self.text_dim else 0

    def knows(self, key: bytes) -> bool:
        """Whether the item (its 8 key bytes) was consumed: in the history or among the seen."""
        return _aligned_find(self.history, key, SLOT.size) or _aligned_find(self.seen, key, 8)

    def slots(self) -> npt.NDArray[np.void]:
        """(history_count,) records of SLOT_DTYPE, newest first; a read-only view."""
        return np.frombuffer(self.history, SLOT_DTYPE)

    def history_positions(self) -> list[tuple[int, int]]:
        """(topic code, offset) of each history entry, newest first."""
        return [split_position(p) for p in np.frombuffer(self.positions, "<u8").tolist()]

    def seen_keys(self) -> npt.NDArray[np.int64]:
        """(n,) int64 keys of the consumed items beyond the history, oldest first; a read-only view."""
        return np.frombuffer(self.seen, "<i8")

    def comment_entries(self) -> list["CommentEntry"]:
        """The comments kept one by one, newest first."""
        size = COMMENT.size + self.text_dim
        entries = []
        for start in range(0, len(self.comments), size):
            position, ts, item, scale = COMMENT.unpack_from(self.comments, start)
            topic, offset = split_position(position)
            vector = np.frombuffer(self.comments, np.int8, self.text_dim, start + COMMENT.size)
            entries.append(CommentEntry(topic, offset, ts, item, scale, vector))
        return entries

    def tail_vector(self) -> npt.NDArray[np.float32]:
        """(text_dim,) float32 decayed sum of the comments that left the row, of total weight `tail_weight`."""
        return np.frombuffer(self.tail, "<f4")


@dataclass(frozen=True, slots=True)
class CommentEntry:
    """One kept comment; its unit vector is `scale * vector` (int8)."""

    topic: int
    offset: int
    ts: float
    item: int
    scale: float
    vector: npt.NDArray[np.int8]


def without(row: UserRow, positions: Collection[int]) -> tuple[UserRow, bool]:
    """The row without the events at these positions, and whether it is, to the byte of what is listed from it, the row
    of a stream that never held them. It may differ where the row does not hold all of the user's events: what was a
    repeat of a removed event would have taken its place, and what fell out of the history would still be in it.

    Raises KeyError, with the position, for one that the row does not keep.
    """
    kept = np.frombuffer(row.positions, "<u8")
    comments = row.comment_entries()
    written = {position(c.topic, c.offset): c for c in comments}
    accounted = written.keys() | set(kept.tolist())
    for missing in set(positions) - accounted:
        raise KeyError(missing)
    stays = ~np.isin(kept, np.fromiter(positions, np.uint64, len(positions)))
    size = COMMENT.size + row.text_dim
    parts = [row.comments[at : at + size] for at in range(0, len(row.comments), size)]
    left = [part for at, part in zip(written, parts, strict=True) if at not in positions]
    removed_items = set(row.slots()["key"][~stays].tolist())
    named = {c.item for at, c in written.items() if at not in positions}
    is_exact = not positions or (row.events == len(accounted) and not removed_items & named)
    changed = replace(
        row, events=row.events - len(set(positions)), history=row.slots()[stays].tobytes(),
        positions=kept[stays].tobytes(), comments=b"".join(left),
    )  # fmt: skip
    return changed, is_exact


def position(topic: int, offset: int) -> int:
    """One number for a source position within a partition: the topic's code above the offset."""
    assert 0 <= offset <= OFFSET_MASK, offset
    return topic << OFFSET_BITS | offset


def split_position(value: int) -> tuple[int, int]:
    """(topic code, offset) of a `position`."""
    return value >> OFFSET_BITS, value & OFFSET_MASK


def pack(row: UserRow) -> bytes:
    """The row's bytes. `unpack(pack(row)) == row`."""
    assert len(row.positions) * 2 == len(row.history), "one position a slot"
    header = HEADER.pack(
        ROW_VERSION, 0, len(row.history) // 16, row.comment_count, row.text_dim, len(row.seen) // 8,
        row.events, row.positives, row.last_ts, row.tail_weight,
    )  # fmt: skip
    return b"".join((header, row.history, row.positions, row.seen, row.comments, row.tail))


def unpack(value: bytes) -> UserRow:
    """The row of these bytes. Raises RowVersionError for a version that this build does not read,
    ValueError when the length does not fit the header."""
    if not value or value[0] != ROW_VERSION:
        version = value[0] if value else None
        raise RowVersionError(
            f"user row is of version {version}, this build reads {ROW_VERSION}; deploy the build that wrote it, "
            "or one that is newer, then start again"
        )
    if len(value) < HEADER.size:
        raise ValueError(f"user row of {len(value)} bytes is shorter than its header of {HEADER.size}")
    _, _, slots, comments, dim, seen, events, positives, last_ts, tail_weight = HEADER.unpack_from(value)
    a = HEADER.size + 16 * slots
    b = a + 8 * slots
    c = b + 8 * seen
    d = c + comments * (COMMENT.size + dim)
    if len(value) != d + 4 * dim:
        raise ValueError(f"user row of {len(value)} bytes: its header tells of {d + 4 * dim}")
    return UserRow(
        events, positives, last_ts, value[HEADER.size : a], value[a:b], value[b:c], value[c:d], value[d:],
        tail_weight, dim,
    )  # fmt: skip


def _aligned_find(section: bytes, key: bytes, size: int) -> bool:
    at = section.find(key)
    while at >= 0:
        if at % size == 0:
            return True
        at = section.find(key, at + 1)
    return False


class CatalogueRow(msgspec.Struct, array_like=True, frozen=True):
    """What is kept of one item of the catalogue (MessagePack array, format version first)."""

    version: int
    offset: int  # of the record in `items`
    text: str
    attributes: dict[str, float | str | bool | list[str]]
    ts: float | None
    vector: bytes  # <f2[text_dim], unit length


CATALOGUE_VERSION: Final = 1
pack_catalogue = msgspec.msgpack.Encoder().encode
_decode_catalogue = msgspec.msgpack.Decoder(CatalogueRow).decode


def unpack_catalogue(value: bytes) -> CatalogueRow:
    """The row of these bytes. Raises RowVersionError for a version that this build does not read."""
    row = _decode_catalogue(value)
    if row.version != CATALOGUE_VERSION:
        raise RowVersionError(
            f"catalogue row is of version {row.version}, this build reads {CATALOGUE_VERSION}; deploy the build that "
            "wrote it, or one that is newer, then start again"
        )
    return row
