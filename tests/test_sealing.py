"""Sealing: what is written cannot be read or changed without the keys, and is a function of what is sealed."""

import base64
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from bench.doubles import MemoryDisk, MemoryLog
from state.partition import digest
from state.sealing import HEAD_BYTES, SealedPartition, SealedRows, Sealer, SealError, is_sealed, key_id
from state.store import RocksDisk
from streams.datakeys import DataKeysError, sealer_of
from streams.settings import Settings

ROOT, SECOND, THIRD = (bytes([n]) * 32 for n in (1, 2, 3))
ROW = b"\x01" + b"what the row holds" * 10


def changed(value: bytes, at: int) -> bytes:
    return value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :]


# -- bytes


@given(st.binary(min_size=1, max_size=32), st.binary(max_size=300))
def test_what_is_sealed_opens_to_the_same_and_is_sealed_to_the_same(key: bytes, plain: bytes) -> None:
    one, two = Sealer([ROOT]), Sealer([ROOT])
    sealed = one.seal(key, plain)
    assert two.seal(key, plain) == sealed and two.open(key, sealed) == plain
    assert is_sealed(sealed) and len(sealed) == len(plain) + HEAD_BYTES + 16
    assert len(plain) < 8 or plain not in sealed


def test_every_bit_counts() -> None:
    sealer = Sealer([ROOT])
    sealed = sealer.seal(b"key", ROW)
    for at in range(len(sealed)):
        with pytest.raises(SealError):
            sealer.open(b"key", changed(sealed, at))
    for cut in range(len(sealed)):
        with pytest.raises(SealError):
            sealer.open(b"key", sealed[:cut])
    with pytest.raises(SealError, match="changed"):
        sealer.open(b"another key", sealed)  # a row cannot be put in another's place


def test_no_two_contents_share_key_and_nonce() -> None:
    """The nonce is of the content, the AES key of the row key."""
    sealer = Sealer([ROOT])
    nonces = {sealer.seal(b"key", ROW + bytes([n]))[HEAD_BYTES - 12 : HEAD_BYTES] for n in range(200)}
    assert len(nonces) == 200
    of_keys = {sealer._keys_of(key_id(ROOT), b"%d" % n) for n in range(200)}
    assert len({k for pair in of_keys for k in pair}) == 400
    derived = [sealer.audit_key, sealer._pseudonym_key, *sealer._keys.values()]
    assert len({*derived, ROOT}) == 4


def test_a_new_key_seals_and_the_old_ones_still_open() -> None:
    before = Sealer([ROOT])
    old = before.seal(b"key", ROW)
    ready = Sealer([ROOT, SECOND], sealing=0)  # every worker first learns the key, then one after the other uses it
    after = Sealer([ROOT, SECOND])
    new = after.seal(b"key", ROW)
    assert ready.seal(b"key", ROW) == old != new
    assert {s.open(b"key", v) for s in (ready, after) for v in (old, new)} == {ROW}
    assert before.pseudonym(b"u") == after.pseudonym(b"u") and before.audit_key == after.audit_key
    with pytest.raises(SealError, match=key_id(SECOND).hex()):
        before.open(b"key", new)
    with pytest.raises(SealError, match="first of the ring"):
        Sealer([SECOND, ROOT]).open(b"key", old)
    with pytest.raises(SealError, match="app id"):
        after.open(b"key", ROW)


def test_messages_open_whether_sealed_or_plain() -> None:
    sealer = Sealer([ROOT])
    assert sealer.open_message(ROW) == ROW == sealer.open_message(sealer.seal_message(ROW))


# -- a partition


async def opened(log: MemoryLog, disk: Any, sealer: Sealer, out: list[Any]) -> SealedPartition:
    async def publish(records: list[tuple[bytes, bytes]]) -> None:
        out.extend(records)

    partition = SealedPartition(
        sealer, path=Path("/memory"), changelog=log, publish=publish, sources=("clicks",), disk=disk
    )
    await partition.open()
    return partition


async def test_disk_changelog_and_outbox_see_pseudonyms_and_sealed_bytes_alone() -> None:
    log, disk, out = MemoryLog(), MemoryDisk(), []  # type: ignore[var-annotated]
    sealer = Sealer([ROOT])
    partition = await opened(log, disk, sealer, out)
    rows = {b"user-%d" % n: ROW + b"%d" % n for n in range(20)}
    await partition.flush(dict(rows), [(b"0", b"\x01an example of vectors")], {"clicks": 3})
    kept = [content for history in disk.contents.values() for content in history]
    assert any(content.outbox for content in kept)
    await partition.drain()
    everything = b"".join(
        [b"".join(k + v for table in (c.rows, c.outbox) for k, v in table.items()) for c in kept]
        + [r.key + (r.value or b"") for r in log.everything] + [v for _, v in out]
    )  # fmt: skip
    assert b"user-" not in everything and b"row holds" not in everything and b"an example" not in everything
    assert partition.get_many([b"user-3", b"nobody"]) == [rows[b"user-3"], None]
    assert dict(partition.items()) == {sealer.pseudonym(key): row for key, row in rows.items()}
    await partition.flush({b"user-3": None}, [], {"clicks": 4})
    assert partition.get_many([b"user-3"]) == [None]
    told = partition.digest()
    await partition.drain()
    await partition.close()

    restored = await opened(log, MemoryDisk(), Sealer([ROOT, SECOND]), out)  # another disk, another key that seals
    assert restored.digest() == told
    await restored.flush({b"user-4": ROW}, [], {"clicks": 5})
    scratch = SealedRows(MemoryDisk().open(Path("/scratch")), Sealer([ROOT]))
    scratch.write({key: row for key, row in {**rows, b"user-4": ROW}.items() if key != b"user-3"})
    assert digest(scratch.items(), {"clicks": 5}) == restored.digest()
    await restored.close()


def test_a_store_on_disk_holds_no_name_and_no_content(tmp_path: Path) -> None:
    store = RocksDisk().open(tmp_path / "rows")
    SealedRows(store, Sealer([ROOT])).write({b"user-anna": ROW})
    assert SealedRows(store, Sealer([ROOT])).get_many([b"user-anna"]) == [ROW]
    store.close()
    everything = b"".join(path.read_bytes() for path in (tmp_path / "rows").iterdir())
    assert b"user-anna" not in everything and b"row holds" not in everything
    assert Sealer([ROOT]).pseudonym(b"user-anna") in everything  # the search finds what is there


# -- where keys come from


def encoded(*keys: bytes) -> list[str]:
    return [base64.b64encode(key).decode() for key in keys]


def test_keys_come_from_the_environment_a_file_or_a_command(tmp_path: Path) -> None:
    lines = encoded(ROOT, SECOND)
    file = tmp_path / "ring"
    file.write_text("\n".join(lines) + "\n")
    command = tmp_path / "kms"
    command.write_text(f"#!/bin/sh\ncat {file}\n")
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    sources = (
        Settings(data_keys=SecretStr(",".join(lines))), Settings(data_keys_file=file),
        Settings(data_keys_command=str(command)),
    )  # fmt: skip
    wanted = Sealer([ROOT, SECOND])
    for settings in sources:
        sealer = sealer_of(settings)
        assert sealer is not None and sealer.seal(b"k", ROW) == wanted.seal(b"k", ROW)
    assert sealer_of(Settings()) is None
    marked = sealer_of(Settings(data_keys=SecretStr(f"* {lines[0]},{lines[1]}")))
    assert marked is not None and marked.seal(b"k", ROW) == Sealer([ROOT]).seal(b"k", ROW)
    with pytest.raises(ValueError, match="give one of"):
        Settings(data_keys=SecretStr(lines[0]), data_keys_file=file)


@pytest.mark.parametrize(
    ("given", "said"),
    [({"data_keys": "c2hvcnQ="}, "line 1"), ({"data_keys": encoded(ROOT)[0] + ",???"}, "line 2"),
     ({"data_keys": ",".join(encoded(ROOT, ROOT))}, "different"),
     ({"data_keys": ",".join("*" + line for line in encoded(ROOT, SECOND))}, "marked"),
     ({"data_keys_file": Path("/nowhere/ring")}, "DATA_KEYS_FILE"),
     ({"data_keys_command": "/nowhere/kms"}, "cannot be run"),
     ({"data_keys_command": "sh -c 'echo x; exit 3'"}, "with 3"),
     ({"data_keys_command": "true"}, "1 to 64")],
)  # fmt: skip
def test_a_bad_source_is_refused_in_words_that_hold_no_key(given: dict[str, Any], said: str) -> None:
    settings = Settings(**given)
    with pytest.raises(DataKeysError, match=said) as refused:
        sealer_of(settings)
    assert not any(line in str(refused.value) for line in (*encoded(ROOT, SECOND), "c2hvcnQ="))
    assert not any(line in repr(settings) for line in encoded(ROOT, SECOND))


async def test_a_worker_without_the_keys_says_so_and_one_with_new_keys_too() -> None:
    log, disk = MemoryLog(), MemoryDisk()
    partition = await opened(log, disk, Sealer([ROOT]), [])
    await partition.flush({b"u": ROW}, [], {"clicks": 0})
    await partition.drain()
    await partition.close()
    other = await opened(log, disk, Sealer([THIRD]), [])
    with pytest.raises(SealError, match="root key"):
        next(other.items())
    await other.close()
