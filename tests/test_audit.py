"""The audit log's chain: what is edited, taken out or put in is found; what is sent twice is no fault."""

import asyncio
import json
from typing import Any

import msgspec
import pytest

from streams import audit
from streams.audit import Audit, Entry, Note, Verifier

NOW_S = 1_790_000_000.25


def note(operation: str, user: str) -> Note:
    made = Note(operation, "10.0.0.1", forwarded=False)
    made.key, made.key_id, made.users = "alice", "00aa", [user]
    return made


async def chain(count: int, key: bytes = b"") -> list[bytes]:
    """The values of a clean chain with `count` records between its first and its last."""
    values: list[bytes] = []

    async def send(records: list[Any]) -> None:
        values.extend(value for _, value in records)

    log = Audit(send, lambda: NOW_S, key)
    for number in range(count):
        log.note(note("getState", f"user{number}"), 200, f"r{number}")
    await log.close(asyncio.create_task(log.run()))
    return values


def verified(values: list[bytes], key: bytes = b"", first_offset: int = 0) -> Verifier:
    verifier = Verifier(key)
    for offset, value in enumerate(values, first_offset):
        verifier.feed(offset, value)
    return verifier


@pytest.mark.parametrize("key", [b"", b"k" * 32])
async def test_a_whole_chain_has_no_fault_and_names_no_user(key: bytes) -> None:
    values = await chain(5, key)
    verifier = verified(values, key)
    assert verifier.all_faults == []
    (found,) = verifier.chains.values()
    assert (found.first, found.last_n, found.is_closed) == (0, 6, True)
    assert b"user3" not in b"".join(values)
    names = json.loads(values[4])["record"]["users"]
    assert names == [audit.pseudonym("user3", key)]
    if key:
        assert names != [audit.pseudonym("user3")]
        assert verified(values).all_faults  # without the key no chain can be made, so none is believed


async def test_every_edit_removal_and_insertion_is_found() -> None:
    values = await chain(6)
    for at in range(1, len(values) - 1):
        entry = msgspec.json.decode(values[at], type=Entry)
        edited = bytes(entry.record).replace(b'"key":"alice"', b'"key":"mally"')
        assert edited != bytes(entry.record)
        assert verified([*values[:at], msgspec.json.encode(Entry(entry.hash, msgspec.Raw(edited))), *values[at + 1 :]])
        forged = audit._link(bytes.fromhex(json.loads(values[at - 1])["hash"]), edited, b"").hex()
        for replaced in (Entry(entry.hash, msgspec.Raw(edited)), Entry(forged, msgspec.Raw(edited))):
            changed = [*values[:at], msgspec.json.encode(replaced), *values[at + 1 :]]
            assert any("was changed" in fault for fault in verified(changed).all_faults)
        assert any("missing" in fault for fault in verified(values[:at] + values[at + 1 :]).all_faults)
    assert any("those before are missing" in f for f in verified(values[1:]).all_faults)
    assert any("not an audit record" in f for f in verified([*values[:3], b"{}", *values[3:]]).all_faults)
    assert verified([*values[:2], values[4], *values[2:]]).all_faults  # out of order


async def test_a_batch_that_was_sent_again_is_no_fault() -> None:
    values = await chain(6)
    assert verified(values[:5] + values[2:]).all_faults == []
    verifier = verified(values + values)
    assert verifier.all_faults == []
    assert next(iter(verifier.chains.values())).last_n == len(values) - 1


async def test_a_beginning_that_retention_took_is_no_fault_and_an_open_end_shows() -> None:
    values = await chain(6)
    assert verified(values[3:], first_offset=3).all_faults == []
    verifier = verified(values[:-1])
    assert verifier.all_faults == []
    (found,) = verifier.chains.values()
    assert not found.is_closed and found.last == json.loads(values[-2])["hash"]


async def test_records_wait_for_a_broker_that_is_away_and_come_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "RETRY_S", 0.0)
    monkeypatch.setattr(audit, "LINGER_S", 0.0)
    monkeypatch.setattr(audit, "BATCH_RECORDS_MAX", 4)
    values: list[bytes] = []
    tries = 0

    async def send(records: list[Any]) -> None:
        nonlocal tries
        tries += 1
        if tries % 3:
            if tries % 3 == 2:
                values.extend(value for _, value in records)  # arrived, but its acknowledgement was lost
            raise ConnectionError("away")
        values.extend(value for _, value in records)

    log = Audit(send, lambda: NOW_S)
    for number in range(20):
        log.note(note("getState", f"user{number}"), 200, "r")
    await log.close(asyncio.create_task(log.run()))
    verifier = verified(values)
    assert verifier.all_faults == []
    assert next(iter(verifier.chains.values())).last_n == 21
    assert len(values) == 44


async def test_a_flood_of_refusals_is_counted_and_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "REFUSALS_MAX", 4)
    values: list[bytes] = []

    async def send(records: list[Any]) -> None:
        values.extend(value for _, value in records)

    log = Audit(send, lambda: NOW_S)
    for number in range(50):
        log.note(Note("getState", f"10.0.0.{number % 10}", forwarded=False), 401, "r")
    log.note(note("getState", "u"), 200, "r")
    assert len(log._waiting) == 5
    await log.close(asyncio.create_task(log.run()))
    records = [json.loads(value)["record"] for value in values]
    assert sum(r.get("count", 1) for r in records if r.get("status") == 401 or r["operation"] == "omitted") == 50
    assert [r["operation"] for r in records if r.get("status") == 200] == ["getState"]
