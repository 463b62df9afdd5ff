"""API keys: made, kept as hashes, taken, limited and revoked; every operation asks for the right scope."""

import asyncio
import os
import stat
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from streams import keys
from streams.answers import Certificate
from streams.audit import Audit, Record, Verifier, pseudonym
from streams.keys import FAILURES_BURST, Buckets, Gate, KeysError
from streams.openapi import OPERATIONS
from streams.problems import Problem
from streams.settings import Settings
from streams.web import FORWARDED_HEADER, Http, create_app
from tests.serving_world import World, small_world
from tests.test_web import BASE, ERASURE, FAN, assert_problem, client_of, operation, requests

NOW_S = 1_790_000_000.0
KEY_SECRET_AT = len("hw_123456789abc_")
HERE = "127.0.0.1"


class Clock:
    """Moves when told."""

    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s


@pytest.fixture(autouse=True)
def _cheap_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost is a parameter of the line; tests need not pay it."""
    monkeypatch.setattr(keys, "SCRYPT_N", 2)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.jsonl"


@pytest.fixture
def made(path: Path) -> dict[str, str]:
    """A key of each scope."""
    return {scope: keys.add(path, f"the-{scope}", scope, NOW_S) for scope in keys.SCOPES}


# -- the file


def test_a_key_is_shown_once_and_only_its_hash_is_kept(path: Path, made: dict[str, str]) -> None:
    kept = path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(set(made.values())) == 3
    for key in made.values():
        assert keys.KEY.fullmatch(key)
        assert key not in kept and key[KEY_SECRET_AT:] not in kept
    lines = keys.read(path)
    assert {(line.name, line.scope) for line in lines.values()} == {(f"the-{s}", s) for s in keys.SCOPES}
    assert {line.created for line in lines.values()} == {"2026-09-21T14:13:20Z"}
    assert os.listdir(path.parent) == [path.name]  # noqa: PTH208


def test_a_name_is_given_once_and_revoked_by_it(path: Path, made: dict[str, str]) -> None:
    with pytest.raises(KeysError, match="choose another"):
        keys.add(path, "the-read", "admin", NOW_S)
    keys.revoke(path, "the-read")
    assert {line.name for line in keys.read(path).values()} == {"the-write", "the-admin"}
    with pytest.raises(KeysError, match="keys list"):
        keys.revoke(path, "the-read")
    assert keys.add(path, "the-read", "read", NOW_S) != made["read"]


@pytest.mark.parametrize(
    ("name", "scope", "said"), [("a b", "read", "no name"), ("a", "root", "not one of"), ("", "read", "no name")]
)
def test_a_bad_name_or_scope_is_refused(path: Path, name: str, scope: str, said: str) -> None:
    with pytest.raises(KeysError, match=said):
        keys.add(path, name, scope, NOW_S)
    assert not path.exists()


@pytest.mark.parametrize(
    "line",
    ["nonsense", '{"id":"a"}', '{"id":"a","name":"n","scope":"read","salt":"zz","hash":"00","n":2,"created":""}',
     '{"id":"a","name":"n","scope":"root","salt":"00","hash":"00","n":2,"created":""}',
     '{"id":"a","name":"n","scope":"read","salt":"00","hash":"00","n":1099511627776,"created":""}'],
)  # fmt: skip
def test_a_bad_line_is_named_by_its_place(path: Path, made: dict[str, str], line: str) -> None:
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(KeysError, match=r"keys\.jsonl:4"):
        keys.read(path)


# -- the gate


async def test_a_right_key_is_hashed_once_and_remembered(
    path: Path, made: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = []
    real = keys._scrypt
    monkeypatch.setattr(keys, "_scrypt", lambda *a: hashed.append(a) or real(*a))  # type: ignore[func-returns-value]
    gate = Gate(path, 100.0)
    callers = await asyncio.gather(*(gate.identify(made["write"], HERE) for _ in range(20)))
    assert {(c.name, c.scope) for c in callers} == {("the-write", "write")}
    assert (await gate.identify(made["write"], HERE)).name == "the-write"
    assert len(hashed) == 1
    for wrong in (made["write"][:-1] + ("A" if made["write"][-1] != "A" else "B"), "hw_" + 12 * "0" + "_" + 43 * "x"):
        hashed.clear()
        with pytest.raises(Problem, match="not known"):
            await gate.identify(wrong, HERE)
        assert len(hashed) == 1  # a known id and an unknown one cost the same


async def test_a_revoked_key_is_refused_from_the_next_request_on(path: Path, made: dict[str, str]) -> None:
    gate = Gate(path, 100.0)
    await gate.identify(made["read"], HERE)
    keys.revoke(path, "the-read")
    with pytest.raises(Problem, match="revoked"):
        await gate.identify(made["read"], HERE)
    again = keys.add(path, "the-read", "read", NOW_S)
    assert (await gate.identify(again, HERE)).scope == "read"


async def test_a_stream_ends_when_its_key_is_revoked(path: Path, made: dict[str, str]) -> None:
    gate, world = Gate(path, 100.0), small_world()
    caller = await gate.identify(made["read"], HERE)
    async with httpx.AsyncClient() as forwarder:
        http = Http(world, forwarder)
        stream = http.stream(partial(gate.knows, caller))
        assert [(await anext(stream))[:6] for _ in range(2)] == [b"retry:", b"event:"]
        keys.revoke(path, "the-read")
        world.click("somebody", "space-1")
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert (http.streams, world.listeners) == (0, [])


def _replace(path: Path, text: str) -> str:
    before = path.read_text()
    path.write_text(text)
    return before


async def test_a_file_that_cannot_be_read_lets_nobody_in(path: Path, made: dict[str, str]) -> None:
    gate = Gate(path, 100.0)
    caller = await gate.identify(made["read"], HERE)
    kept = _replace(path, "broken")
    with pytest.raises(Problem) as refused:
        await gate.identify(made["read"], HERE)
    assert refused.value.kind == "not-ready" and not gate.knows(caller)
    _replace(path, kept)
    assert (await gate.identify(made["read"], HERE)).name == "the-read"


async def test_wrong_keys_of_an_address_are_limited_and_right_ones_that_are_known_are_not(
    path: Path, made: dict[str, str], clock: Clock
) -> None:
    gate = Gate(path, 100.0, clock)
    await gate.identify(made["read"], HERE)
    kinds = []
    for number in range(100):
        with pytest.raises(Problem) as refused:
            await gate.identify(f"hw_{number:012x}_{43 * 'a'}", HERE)
        kinds.append(refused.value.kind)
    assert kinds == ["unauthenticated"] * FAILURES_BURST + ["too-many-failures"] * (100 - FAILURES_BURST)
    assert (await gate.identify(made["read"], HERE)).name == "the-read"
    with pytest.raises(Problem, match="wrong keys"):
        await gate.identify(made["write"], HERE)  # right, but a hash would be needed to tell
    assert (await gate.identify(made["write"], "10.0.0.9")).name == "the-write"
    clock.s += 3600
    assert (await gate.identify(made["admin"], HERE)).name == "the-admin"


async def test_ipv6_failures_count_by_network(path: Path, made: dict[str, str], clock: Clock) -> None:
    gate = Gate(path, 100.0, clock)
    kinds = set()
    for number in range(FAILURES_BURST + 1):
        with pytest.raises(Problem) as refused:
            await gate.identify("wrong", f"2001:db8::{number:x}")
        kinds.add(refused.value.kind)
    assert kinds == {"unauthenticated", "too-many-failures"}


async def test_a_key_has_its_rate_and_its_scope(path: Path, made: dict[str, str], clock: Clock) -> None:
    gate = Gate(path, 5.0, clock)
    reader = await gate.identify(made["read"], HERE)
    for scope in ("write", "admin"):
        with pytest.raises(Problem, match=f"this needs {scope}"):
            gate.permit(reader, scope)
    for _ in range(8):  # two were taken by the refusals
        gate.permit(reader, "read")
    with pytest.raises(Problem) as refused:
        gate.permit(reader, "read")
    assert refused.value.kind == "too-many-requests" and int(refused.value.headers["Retry-After"]) >= 1
    admin = await gate.identify(made["admin"], HERE)
    for scope in keys.SCOPES:
        gate.permit(admin, scope)
    clock.s += 1
    gate.permit(reader, "read")


def test_buckets_keep_a_bounded_number_of_owners(clock: Clock) -> None:
    buckets = Buckets(1.0, 2.0, owners_max=10, clock=clock)
    assert [buckets.take(f"owner{n}") for n in range(1000)] == [0.0] * 1000
    assert len(buckets) == 10
    assert [buckets.take("one") for _ in range(3)] == [0.0, 0.0, 1.0]
    buckets.give_back("one")
    assert buckets.take("one") == 0.0


def test_a_worker_off_the_loopback_address_needs_a_keys_file(path: Path) -> None:
    with pytest.raises(KeysError, match="HEADWATER_API_KEYS_FILE"):
        Gate.of(Settings(http_host="0.0.0.0"))
    with pytest.raises(KeysError, match="headwater keys add"):
        Gate.of(Settings(http_host="0.0.0.0", api_keys_file=path))
    assert Gate.of(Settings()).is_open
    keys.add(path, "one", "read", NOW_S)
    assert not Gate.of(Settings(api_keys_file=path)).is_open  # a file closes the loopback address too
    keys.revoke(path, "one")
    assert not Gate.of(Settings(api_keys_file=path)).is_open  # and revoking the last key opens nothing


# -- over HTTP


class Sent:
    """An audit topic in memory."""

    def __init__(self) -> None:
        self.values: list[bytes] = []

    async def __call__(self, records: list[tuple[bytes | None, bytes | None]]) -> None:
        self.values += [value for _, value in records if value is not None]

    def records(self) -> list[Record]:
        verifier = Verifier()
        found = [verifier.feed(offset, value) for offset, value in enumerate(self.values)]
        assert verifier.all_faults == []
        return [record for record in found if record is not None]


@pytest.fixture
def world() -> World:
    made = small_world()
    made.certificates[ERASURE] = Certificate(ERASURE, "complete")
    return made


@pytest.fixture
def sent() -> Sent:
    return Sent()


class Client(httpx.AsyncClient):
    """A client without a key."""

    audit: Audit
    auditing: "asyncio.Task[None]"

    async def close_audit(self) -> None:
        """All of the audit log is in `sent` then."""
        await self.audit.close(self.auditing)


@pytest.fixture
async def api(
    world: World, path: Path, made: dict[str, str], sent: Sent, clock: Clock
) -> AsyncIterator[Client]:  # fmt: skip
    audit = Audit(sent, lambda: NOW_S)
    async with httpx.AsyncClient() as forwarder:
        app = create_app(world, forwarder, None, Gate(path, 1000.0, clock), audit)
        app.app.state.http.closing.set()  # /v1/stream ends as soon as it has begun
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with Client(transport=transport, base_url=BASE) as client:
            client.audit, client.auditing = audit, asyncio.create_task(audit.run())
            yield client
            await client.close_audit()


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


NEEDED: dict[str, str | None] = {  # the scope of each operation
    **dict.fromkeys(("getHealth", "getReadiness", "getOpenapi", "getDocs")),
    **dict.fromkeys(
        ("getState", "getRecommendations", "rank", "whatIf", "getItem", "getSimilar", "getErasure"), "read"
    ),
    **dict.fromkeys(("getDigest", "getModel", "getStream", "getMetrics"), "read"),
    "postEvents": "write",
    "deleteUser": "admin",
}


@pytest.mark.parametrize("held", ["none", "wrong", "revoked", *keys.SCOPES])
async def test_every_operation_lets_in_the_keys_of_its_scope_and_no_others(
    api: Client, made: dict[str, str], path: Path, clock: Clock, held: str
) -> None:
    made |= {"wrong": f"hw_{12 * 'd'}_{43 * 'x'}", "revoked": keys.add(path, "the-revoked", "admin", NOW_S)}
    keys.revoke(path, "the-revoked")
    document = (await api.get("/openapi.json")).json()
    asked = requests(document)
    assert asked.keys() == NEEDED.keys() == OPERATIONS.keys()
    for name, (method, url, body) in asked.items():
        response = await api.request(method, url, json=body, headers=bearer(made[held]) if held != "none" else {})
        needed, told = NEEDED[name], operation(document, name)
        assert told["x-scope"] == needed
        assert told["security"] == ([] if needed is None else [{"bearer": []}, {"apiKey": []}])
        if needed is None or (held in keys.SCOPES and keys.SCOPES.index(held) >= keys.SCOPES.index(needed)):
            assert response.is_success, (name, response.text)
            continue
        assert {"401", "403", "429"} <= set(told["responses"])
        if held in keys.SCOPES:
            assert_problem(response, "forbidden")
        else:
            assert_problem(response, "unauthenticated")
            assert response.headers["www-authenticate"].startswith("Bearer")
        clock.s += 60  # wrong keys are told of at once again


async def test_the_page_needs_no_key_and_either_header_takes_one(api: Client, made: dict[str, str]) -> None:
    assert (await api.get("/")).status_code == (await api.get("/page/app.js")).status_code == 200
    for name in ("x-api-key", "X-API-Key"):
        assert (await api.get(f"/v1/users/{FAN}/state", headers={name: made["read"]})).status_code == 200


async def test_what_users_wrote_is_for_admins(api: Client, sent: Sent, made: dict[str, str]) -> None:
    for scope, key in made.items():
        response = await api.get(f"/v1/users/{FAN}/recommendations?explain=true&words=true", headers=bearer(key))
        if scope == "admin":
            assert response.status_code == 200
        else:
            assert_problem(response, "forbidden")


async def test_a_hundred_wrong_keys_are_limited_and_every_one_is_audited(
    api: Client, sent: Sent, made: dict[str, str]
) -> None:
    statuses = []
    for number in range(100):
        response = await api.get(f"/v1/users/{FAN}/state", headers=bearer(f"hw_{number:012x}_{43 * 'z'}"))
        statuses.append(response.status_code)
        if response.status_code == 429:
            assert_problem(response, "too-many-failures")
    assert statuses == [401] * FAILURES_BURST + [429] * (100 - FAILURES_BURST)
    await api.close_audit()
    refused = [r for r in sent.records() if r.operation == "getState"]
    counts = {status: sum(r.count for r in refused if r.status == status) for status in (401, 429)}
    assert counts == {401: FAILURES_BURST, 429: 100 - FAILURES_BURST}
    assert all((r.key, r.users, r.address) == ("", [], "127.0.0.1") for r in refused)
    assert len(refused) < 10


async def test_the_audit_log_tells_who_did_what_to_whom(
    api: Client, sent: Sent, made: dict[str, str], world: World
) -> None:
    document = (await api.get("/openapi.json")).json()
    for method, url, body in requests(document).values():
        await api.request(method, url, json=body, headers={**bearer(made["write"]), "x-request-id": f"{method}-1"})
    await api.post("/v1/events", json=[], headers=bearer(made["read"]))
    await api.get(f"/v1/users/{FAN}/state", headers={**bearer(made["read"]), FORWARDED_HEADER: "1"})
    await api.close_audit()
    told = [(r.operation, r.key, r.status, r.users, r.forwarded) for r in sent.records()]
    fan = [pseudonym(FAN)]
    assert told == [
        ("opened", "", 0, [], False),
        ("getState", "the-write", 200, fan, False),
        ("getRecommendations", "the-write", 200, fan, False),
        ("whatIf", "the-write", 200, fan, False),
        ("rank", "the-write", 200, fan, False),
        ("postEvents", "the-write", 202, fan, False),
        ("getStream", "the-write", 200, ["*"], False),
        ("deleteUser", "the-write", 403, fan, False),
        ("postEvents", "the-read", 403, [], False),
        ("getState", "the-read", 200, fan, True),
        ("closed", "", 0, [], False),
    ]
    assert sent.records()[1].request_id == "GET-1"
    assert FAN not in b"".join(sent.values).decode()


async def test_a_forwarded_request_carries_its_key(world: World, path: Path, made: dict[str, str]) -> None:
    """The user's own worker asks for the key as well: a header alone opens nothing."""
    async with httpx.AsyncClient() as nobody:
        owner = httpx.ASGITransport(create_app(world, nobody, gate=Gate(path, 1000.0)))
        other = small_world(users=0)
        other.owners[world.partition_of(FAN)] = "http://10.0.0.2:8080"
        async with (
            httpx.AsyncClient(transport=owner) as forwarder,
            client_of(create_app(other, forwarder, gate=Gate(path, 1000.0))) as first,
            httpx.AsyncClient(transport=owner, base_url=BASE) as direct,
        ):
            answer = await first.get(f"/v1/users/{FAN}/state", headers=bearer(made["read"]))
            assert answer.json()["events"] == 5
            asked = {"user_id": FAN, "item_ids": ["space-1"]}
            assert (await first.post("/v1/rank", json=asked, headers={"x-api-key": made["read"]})).status_code == 200
            assert_problem(
                await direct.get(f"/v1/users/{FAN}/state", headers={FORWARDED_HEADER: "1"}), "unauthenticated"
            )


async def test_users_are_not_read_when_the_audit_log_is_full(
    world: World, path: Path, made: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.audit.QUEUE_MAX", 3)

    async def away(records: Any) -> None:
        raise ConnectionError

    audit = Audit(away, lambda: NOW_S)
    async with (
        httpx.AsyncClient() as forwarder,
        client_of(create_app(world, forwarder, None, Gate(path, 1000.0), audit)) as api,
    ):
        answers = [await api.get(f"/v1/users/{FAN}/state", headers=bearer(made["read"])) for _ in range(4)]
        assert [a.status_code for a in answers] == [200, 200, 503, 503]
        assert_problem(answers[-1], "not-audited")
        assert (await api.get("/healthz")).status_code == 200


async def test_a_key_that_asks_too_often_is_told_when_to_come_again(
    world: World, path: Path, made: dict[str, str], clock: Callable[[], float]
) -> None:
    async with (
        httpx.AsyncClient() as forwarder,
        client_of(create_app(world, forwarder, gate=Gate(path, 2.0, clock))) as api,
    ):
        answers = [await api.get("/v1/model", headers=bearer(made["read"])) for _ in range(5)]
        assert [a.status_code for a in answers] == [200] * 4 + [429]
        assert_problem(answers[-1], "too-many-requests")
