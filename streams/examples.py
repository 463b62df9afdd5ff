"""Messages of the examples log, byte for byte (format version 1, little endian). One message is one micro-batch.

    header      8 B   version u1 | kind u1 (1 = examples, 2 = items, 3 = adapter, 4 = removals,
                      5 = time, 6 = vectors) | source partition u2
                      | count u2 | flags u2 (kind 3: 1 = taken back, 2 = a trial; kind 4: 1 = more of the same removal
                      follows; kind 6: 1 = the encoder is in use from here on, 2 = it
                      never will be)
    kind 1, `count` times:
      example  32 B   item key i8 | ts f8 | position u8 (state.rows.position) | label u1 (1 positive, 0 low rating)
                      | history_count u1 | flags u1 (1 = text, 2 = ranked) | bucket u1 | weight f4
                      bucket: model.trial.bucket_of the user
      history  16 B each, newest first, as in the user's row (state.rows) *before* this event
      text     weight f4 | scale f4 | vector i1[text_dim]        only with flag 1
      seen     count u4 | keys i8 each                           only with flag 2: consumed beyond the history
    kind 2: a MessagePack array of `count` ItemEntry
    kind 3: model.adapter.Adapter.pack, or nothing (count 0): texts are compared through it from the next message on,
            and no trial is on any more
            with flag 2: share f4, then a challenger's Adapter.pack or nothing (the encoder as it is): from the next
            message on a trial is on, whose salt is this message's offset; with count 0 instead: none is
    kind 4: offset u8 of the erasure in `erasures`, then `count` times: position u8 of an event that is to be left out
    kind 5: now f8, Unix s: the time has come to there (count 0), and no event has said so
    kind 6: a MessagePack array of the encoder's number, its name, and `count` times [item key, vector <f2[text_dim]]:
            what it makes of items' texts. Kept apart until it is in use, then in the place of what there was; with
            flag 2 what was kept apart is dropped

The learner drops what is at or below the highest offset that it has applied of the example's (topic, partition):
repeats vanish, those of a fenced worker too.
"""

import hashlib
import struct
from collections.abc import Sequence
from functools import lru_cache
from threading import Lock
from typing import Any, Final, NamedTuple

import msgspec
import numba as nb
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from model.adapter import Adapter, AdapterError
from model.examples import Examples
from model.trial import Trial

MESSAGE_VERSION: Final = 1
KIND_EXAMPLES: Final = 1
KIND_ITEMS: Final = 2
KIND_ADAPTER: Final = 3
KIND_REMOVALS: Final = 4
KIND_TIME: Final = 5
KIND_VECTORS: Final = 6
KINDS: Final = (KIND_EXAMPLES, KIND_ITEMS, KIND_ADAPTER, KIND_REMOVALS, KIND_TIME, KIND_VECTORS)
MESSAGE_EXAMPLES_MAX: Final = 64  # examples a message: the micro-batch; 64 costs 1 % of the hits against 1
REMOVALS_MAX: Final = 32_768  # positions a message
MESSAGE_BYTES_MAX: Final = 400_000  # of examples in a message: ranked ones of heavy users are large; a batch is 512 KiB
VECTOR_HEAD_BYTES_MAX: Final = 15  # of one in a message of kind 6, in MessagePack: array, key i8, length of the bytes

KEYS_KEPT: Final = 1 << 18  # of items, with their ids

FLAG_TEXT: Final = 1
FLAG_RANKED: Final = 2
FLAG_TAKEN_BACK: Final = 1  # of a message of kind 3
FLAG_TRIAL: Final = 2
FLAG_YIELDS: Final = 4
FLAG_IN_USE: Final = 1  # of a message of kind 6
FLAG_DROPS: Final = 2

HEADER: Final = struct.Struct("<BBHHH")
EXAMPLE: Final = struct.Struct("<qdQBBBBf")
TEXT: Final = struct.Struct("<ff")
TIME: Final = struct.Struct("<d")
SHARE: Final = struct.Struct("<f")
COUNT: Final = struct.Struct("<I")

TOPICS: Final = ("clicks", "comments", "items")  # topic codes: the index is stored, so append only
CLICKS, COMMENTS, ITEMS = range(3)
ERASURES: Final = 3  # a source of the user state that no example comes from
USER_SOURCES: Final = {CLICKS: "clicks", COMMENTS: "comments", ERASURES: "erasures"}  # the user state's sources

NOTHING: Final = np.zeros(0, np.int64)

assert EXAMPLE.size == 32 and HEADER.size == 8
assert 8 * REMOVALS_MAX < MESSAGE_BYTES_MAX and REMOVALS_MAX < 1 << 16


class MessageVersionError(ValueError):
    """A message of the examples log is of a version or kind that this build does not read."""


class ItemEntry(msgspec.Struct, array_like=True, frozen=True):
    """An item that enters (or, without vector and text, leaves) the catalogue, as the learner needs it."""

    key: int
    item_id: str
    offset: int  # of the source record in `items`
    text: str = ""
    ts: float | None = None  # candidate for events strictly later; None: from the start
    vector: bytes = b""  # <f2[text_dim], unit length
    withdrawn: bool = False


class Vectors(msgspec.Struct, array_like=True, frozen=True):
    """What another encoder makes of items' texts."""

    number: int  # of the encoder, in the order of their use
    encoder: str  # its name
    vectors: list[tuple[int, bytes]]  # (item key, <f2[text_dim], unit length)


_encode_items = msgspec.msgpack.Encoder().encode
_decode_items = msgspec.msgpack.Decoder(list[ItemEntry]).decode
_decode_vectors = msgspec.msgpack.Decoder(Vectors).decode


_ids: dict[bytes, str] = {}  # of the keys that were made last, KEYS_KEPT of them
_ids_lock = Lock()


@lru_cache(maxsize=KEYS_KEPT)
def key_bytes(item_id: str) -> bytes:
    """The 8 bytes by which an item is known in rows and messages: blake2b of its id (never all zero)."""
    digest = hashlib.blake2b(item_id.encode(), digest_size=8).digest()
    key = digest if any(digest) else b"\x01" + digest[1:]
    with _ids_lock:
        _ids[key] = item_id
        if len(_ids) > KEYS_KEPT:
            del _ids[next(iter(_ids))]
    return key


def item_key(item_id: str) -> int:
    """The item's key as a signed 64-bit integer.

    >>> item_key("242") == item_key("242") != item_key("243")
    True
    """
    return int.from_bytes(key_bytes(item_id), "little", signed=True)


def id_of(key: int) -> str | None:
    """The item_id of a key that this process has made lately: for items that no catalogue has named.

    >>> id_of(item_key("242"))
    '242'
    """
    return _ids.get(key.to_bytes(8, "little", signed=True))


def pack_examples(partition: int, examples: list[bytes]) -> bytes:
    """One message of up to MESSAGE_EXAMPLES_MAX packed examples."""
    assert 0 < len(examples) <= MESSAGE_EXAMPLES_MAX
    return HEADER.pack(MESSAGE_VERSION, KIND_EXAMPLES, partition, len(examples), 0) + b"".join(examples)


def pack_messages(partition: int, packed: list[bytes]) -> list[bytes]:
    """Messages of packed examples, in order: MESSAGE_EXAMPLES_MAX each at most, and MESSAGE_BYTES_MAX."""
    messages: list[bytes] = []
    start = size = 0
    for at, example in enumerate(packed):
        if at - start == MESSAGE_EXAMPLES_MAX or (at > start and size + len(example) > MESSAGE_BYTES_MAX):
            messages.append(pack_examples(partition, packed[start:at]))
            start, size = at, 0
        size += len(example)
    if packed:
        messages.append(pack_examples(partition, packed[start:]))
    return messages


def pack_items(partition: int, entries: list[ItemEntry]) -> bytes:
    """One message of item entries."""
    assert 0 < len(entries) <= MESSAGE_EXAMPLES_MAX
    return HEADER.pack(MESSAGE_VERSION, KIND_ITEMS, partition, len(entries), 0) + _encode_items(entries)


def pack_adapter(adapter: Adapter | None, taken_back: bool = False, yields: bool = False) -> bytes:
    """The message that makes the learner, and with it every replica, compare texts through this adapter.

    taken_back: it was in use before, and is no promotion that has to be watched; yields: where a trial is on, the
    message changes nothing.
    """
    body = b"" if adapter is None else adapter.pack()
    flags = FLAG_TAKEN_BACK * taken_back | FLAG_YIELDS * yields
    return HEADER.pack(MESSAGE_VERSION, KIND_ADAPTER, 0, adapter is not None, flags) + body


def pack_trial(adapter: Adapter | None, share: float) -> bytes:
    """The message that begins a trial of this adapter (None: the encoder as it is) by this share of the users.

    Raises AdapterError for a share that is none.
    """
    trial = Trial(adapter, share, 0)
    body = SHARE.pack(trial.share) + (b"" if adapter is None else adapter.pack())
    return HEADER.pack(MESSAGE_VERSION, KIND_ADAPTER, 0, 1, FLAG_TRIAL) + body


def pack_trial_end() -> bytes:
    """The message that ends the trial: all users compare texts as the champion's did."""
    return HEADER.pack(MESSAGE_VERSION, KIND_ADAPTER, 0, 0, FLAG_TRIAL)


def is_trial(message: bytes) -> bool:
    """Whether a message of kind 3 begins or ends a trial, and switches nobody else."""
    return bool(HEADER.unpack_from(message)[4] & FLAG_TRIAL)


def yields(message: bytes) -> bool:
    """Whether a message of kind 3 changes nothing where a trial is on."""
    return bool(HEADER.unpack_from(message)[4] & FLAG_YIELDS)


def unpack_trial(message: bytes, offset: int) -> Trial | None:
    """The trial of the message at this offset; None: it ends one. Raises AdapterError."""
    if not HEADER.unpack_from(message)[3]:
        return None
    body = message[HEADER.size + SHARE.size :]
    if len(message) < HEADER.size + SHARE.size:
        raise AdapterError(f"message of a trial has {len(message)} bytes")
    return Trial(Adapter.unpack(body) if body else None, SHARE.unpack_from(message, HEADER.size)[0], offset)


def pack_time(now: float) -> bytes:
    """The message that moves the learner's clock on to `now` (Unix s), for items that wait for it."""
    return HEADER.pack(MESSAGE_VERSION, KIND_TIME, 0, 0, 0) + TIME.pack(now)


def pack_vectors(told: Vectors, in_use: bool = False) -> bytes:
    """The message of an encoder's vectors. in_use: with it, all that were told of this encoder become their items'."""
    head = HEADER.pack(MESSAGE_VERSION, KIND_VECTORS, 0, len(told.vectors), FLAG_IN_USE * in_use)
    return head + msgspec.msgpack.encode(told)


def pack_drop(number: int, encoder: str) -> bytes:
    """The message after which no vectors of this encoder are kept apart: it was given up."""
    return HEADER.pack(MESSAGE_VERSION, KIND_VECTORS, 0, 0, FLAG_DROPS) + msgspec.msgpack.encode(
        Vectors(number, encoder, [])
    )


def drops(message: bytes) -> bool:
    """Whether a message of kind 6 is `pack_drop`'s."""
    return bool(HEADER.unpack_from(message)[4] & FLAG_DROPS)


def pack_all_vectors(told: Vectors, in_use: bool = False) -> list[bytes]:
    """The messages of any number of vectors, of one length, MESSAGE_BYTES_MAX each and some; in_use: of each."""
    vectors = told.vectors
    count = max(1, MESSAGE_BYTES_MAX // (VECTOR_HEAD_BYTES_MAX + len(vectors[0][1]))) if vectors else 1
    return [
        pack_vectors(Vectors(told.number, told.encoder, vectors[at : at + count]), in_use)
        for at in range(0, len(vectors), count)
    ]


def unpack_vectors(message: bytes) -> tuple[Vectors, bool]:
    """(vectors, whether the encoder is in use from here on) of a message of kind 6. Raises msgspec.ValidationError."""
    return _decode_vectors(message[HEADER.size :]), bool(HEADER.unpack_from(message)[4] & FLAG_IN_USE)


def unpack_time(message: bytes) -> float:
    """The time, Unix s, of a message of kind 5. Raises ValueError when the bytes do not fit the header."""
    if len(message) != HEADER.size + TIME.size:
        raise ValueError(f"message of a time has {len(message)} bytes")
    return float(TIME.unpack_from(message, HEADER.size)[0])


def unpack_adapter(message: bytes) -> tuple[Adapter | None, bool]:
    """(the adapter, whether it was taken back) of a message of kind 3. Raises AdapterError."""
    count, flags = HEADER.unpack_from(message)[3:]
    return Adapter.unpack(message[HEADER.size :]) if count else None, bool(flags & FLAG_TAKEN_BACK)


def read_header(message: bytes) -> tuple[int, int, int]:
    """(kind, source partition, count). Raises MessageVersionError."""
    version, kind, partition, count, _ = HEADER.unpack_from(message)
    if version != MESSAGE_VERSION or kind not in KINDS:
        raise MessageVersionError(
            f"message of version {version}, kind {kind} in the examples log; this build reads version "
            f"{MESSAGE_VERSION}: deploy the build that wrote it, or one that is newer"
        )
    return kind, partition, count


class Removal(NamedTuple):
    """Events whose examples the learner leaves out from here on, as if they had never been in the log."""

    partition: int
    erasure: int  # offset of the erasure that asked for it
    positions: npt.NDArray[np.int64]  # (n,) `state.rows.position` each
    more: bool  # other messages of the same removal follow: it takes effect with the last


def pack_removals(partition: int, erasure: int, positions: npt.NDArray[np.int64]) -> list[bytes]:
    """Messages of an erasure's positions, all to be followed by more: see `chained`."""
    parts = [positions[a : a + REMOVALS_MAX] for a in range(0, max(1, len(positions)), REMOVALS_MAX)]
    return [
        HEADER.pack(MESSAGE_VERSION, KIND_REMOVALS, partition, len(part), 1)
        + erasure.to_bytes(8, "little")
        + part.astype("<i8").tobytes()
        for part in parts
    ]


def chained(messages: Sequence[bytes]) -> list[bytes]:
    """The messages of some removals as one: the last one is the end of it."""
    version, kind, partition, count, _ = HEADER.unpack_from(messages[-1])
    last = HEADER.pack(version, kind, partition, count, 0) + messages[-1][HEADER.size :]
    return [*messages[:-1], last]


def unpack_removal(message: bytes) -> Removal:
    """A message of kind 3. Raises ValueError when the bytes do not fit the header."""
    _, partition, count = read_header(message)
    if len(message) != HEADER.size + 8 + 8 * count:
        raise ValueError(f"removal of {count} positions has {len(message)} bytes")
    more = HEADER.unpack_from(message)[4]
    erasure = int.from_bytes(message[HEADER.size : HEADER.size + 8], "little")
    return Removal(partition, erasure, np.frombuffer(message, "<i8", count, HEADER.size + 8), bool(more))


def unpack_items(message: bytes) -> list[ItemEntry]:
    """The entries of a message of kind 2."""
    return _decode_items(message[HEADER.size :])


def unpack_examples(
    message: bytes, out: Examples, applied: npt.NDArray[np.int64], removed: npt.NDArray[np.int64] = NOTHING,
    left_out: npt.NDArray[np.int64] | None = None,
) -> Examples:  # fmt: skip
    """Fills `out` from a message of kind 1, dropping examples at or below `applied` (one offset a topic code, of
    this message's partition), which is moved on, and those of the positions `removed` (ascending, of this partition),
    which are counted in `left_out` (1,). Returns `out` with its count set.

    Raises ValueError when the bytes do not fit the header, or a vector not `out`.
    """
    _, partition, count = read_header(message)
    if count > len(out.item):
        raise ValueError(f"message of {count} examples: {len(out.item)} is the most that this worker takes")
    buffer = np.frombuffer(message, np.uint8)
    if left_out is None:
        left_out = np.zeros(1, np.int64)
    kept, used = _unpack(
        buffer, buffer.ctypes.data, HEADER.size, count, partition, applied, removed, left_out,
        out.item, out.label, out.ts, out.bucket, out.source, out.history_count, out.history_item, out.history_ts,
        out.history_weight, out.text_on, out.text, out.text_weight, out.ranked, out.seen_start, out.seen,
    )  # fmt: skip
    if used != len(message):
        raise ValueError(
            f"examples message of {len(message)} bytes from partition {partition} ends at byte {used}: another "
            f"text dimension than {out.text.shape[1]}, a longer history than {out.history_item.shape[1]}, "
            "or a torn message"
        )
    return out._replace(count=kept)


@intrinsic
def _load_i64(typing: Any, address: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(builder.inttoptr(args[0], ir.IntType(64).as_pointer()))
        value.align = 1
        return value

    return types.int64(types.int64), emit


@intrinsic
def _load_f64(typing: Any, address: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(builder.inttoptr(args[0], ir.DoubleType().as_pointer()))
        value.align = 1
        return value

    return types.float64(types.int64), emit


@intrinsic
def _load_f32(typing: Any, address: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(builder.inttoptr(args[0], ir.FloatType().as_pointer()))
        value.align = 1
        return value

    return types.float32(types.int64), emit


@intrinsic
def _load_u32(typing: Any, address: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(builder.inttoptr(args[0], ir.IntType(32).as_pointer()))
        value.align = 1
        return builder.zext(value, ir.IntType(64))

    return types.int64(types.int64), emit


@nb.njit(nogil=True, cache=True)
def _half(bits: int) -> np.float32:
    """The float of IEEE half-precision bits (no infinities or NaN: weights are finite)."""
    exponent = (bits >> 10) & 0x1F
    fraction = bits & 0x3FF
    value = np.float32(fraction) / np.float32(1024)
    if exponent == 0:
        value = value * np.float32(2.0**-14)
    else:
        value = (np.float32(1) + value) * np.float32(2.0) ** np.float32(exponent - 15)
    return -value if bits >> 15 else value


@nb.njit(cache=True)
def _unpack(  # type: ignore[no-untyped-def]
    buffer, address, at, count, partition, applied, removed, left_out, item, label, ts, bucket, source,
    history_count, history_item, history_ts, history_weight, text_on, text, text_weight, ranked, seen_start, seen,
):  # fmt: skip
    """Bounds are checked before each section: returns (kept, bytes used), used = -1 when a section does not fit."""
    size = len(buffer)
    text_dim = text.shape[1]
    kept = 0
    seen_start[0] = 0
    for _ in range(count):
        if at + 32 > size:
            return 0, -1
        position = _load_i64(address + at + 16)
        topic = position >> 56
        offset = position & 0x00FFFFFFFFFFFFFF
        entries = np.int64(buffer[at + 25])
        flags = buffer[at + 26]
        history = at + 32
        extra = history + 16 * entries
        end = extra
        if flags & 1:
            end += 8 + text_dim
        if entries > history_item.shape[1] or end + (4 if flags & 2 else 0) > size or topic >= len(applied):
            return 0, -1
        seen_at = end + 4
        seen_count = np.int64(0)
        if flags & 2:
            seen_count = _load_u32(address + end)
            end = seen_at + 8 * seen_count
            if end > size:
                return 0, -1
        start, at = at, end
        if offset <= applied[topic]:
            continue
        applied[topic] = offset
        if len(removed):
            place = np.searchsorted(removed, position)
            if place < len(removed) and removed[place] == position:
                left_out[0] += 1
                continue
        item[kept] = _load_i64(address + start)
        ts[kept] = _load_f64(address + start + 8)
        bucket[kept] = buffer[start + 27]
        source[kept] = topic << 60 | np.int64(partition) << 48 | offset
        label[kept] = buffer[start + 24]
        history_count[kept] = entries
        for q in range(entries):
            slot = history + 16 * q
            history_item[kept, q] = _load_i64(address + slot)
            history_ts[kept, q] = _load_u32(address + slot + 8)
            history_weight[kept, q] = _half(np.int64(buffer[slot + 12]) | np.int64(buffer[slot + 13]) << 8)
        text_on[kept] = flags & 1 != 0
        text_weight[kept] = 0
        if flags & 1:
            text_weight[kept] = _load_f32(address + extra)
            scale = _load_f32(address + extra + 4)
            for d in range(text_dim):
                text[kept, d] = scale * np.float32(np.int8(buffer[extra + 8 + d]))
        ranked[kept] = flags & 2 != 0
        room = min(seen_count, len(seen) - seen_start[kept])
        for q in range(room):
            seen[seen_start[kept] + q] = _load_i64(address + seen_at + 8 * q)
        seen_start[kept + 1] = seen_start[kept] + room
        kept += 1
    return kept, at
