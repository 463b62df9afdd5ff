"""HTTP: every operation, every way to fail, over the real rows and the real model."""

import asyncio
import contextlib
import json
import re
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import jsonschema
import msgspec
import pytest

from model.evaluate import LiveMetrics
from streams import serving, tokens
from streams.agents import POPULARITIES
from streams.answers import Certificate, Prequential
from streams.broker import free_port
from streams.events import ID_CHARS_MAX, Comment, Item
from streams.openapi import OPERATIONS
from streams.problems import KINDS
from streams.settings import Settings
from streams.web import (
    EVENTS_BYTES_MAX,
    EVENTS_MAX,
    FORWARDED_HEADER,
    PAGE_FILES,
    STREAMS_MAX,
    Edge,
    Http,
    HttpService,
    create_app,
)
from tests.serving_world import URL, World, is_sorted, small_world

BASE = URL
FAN = "space-fan-0"
JSON = {"content-type": "application/json"}


@pytest.fixture
def world() -> World:
    made = small_world()
    made.certificates[ERASURE] = Certificate(ERASURE, "complete")
    return made


def client_of(app: Edge) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url=BASE)


@pytest.fixture
async def api(world: World) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient() as forwarder, client_of(create_app(world, forwarder, ["127.0.0.1"])) as client:
        yield client


def assert_problem(response: httpx.Response, slug: str) -> dict[str, Any]:
    kind = KINDS[slug]
    assert response.headers["content-type"] == "application/problem+json", response.text
    body: dict[str, Any] = response.json()
    assert body["type"] == f"/docs#problem-{slug}", body
    assert (response.status_code, body["status"], body["title"]) == (kind.status, kind.status, kind.title)
    assert body["detail"] and body["request_id"] == response.headers["x-request-id"]
    assert (kind.status in (429, 503)) == ("retry-after" in response.headers)
    return body


ERASURE = "erasures:0:0"
BODIES: dict[str, Any] = {
    "rank": {"user_id": FAN, "item_ids": ["space-1"], "explain": True},
    "postEvents": [{"type": "click", "user_id": FAN, "item_id": "space-1", "action": "like"}],
    "whatIf": {"with": [{"type": "comment", "user_id": FAN, "text": "no more westerns"}]},
}


def operation(document: dict[str, Any], name: str) -> dict[str, Any]:
    """What the document says of it."""
    return next(o for methods in document["paths"].values() for o in methods.values() if o["operationId"] == name)


def requests(document: dict[str, Any]) -> dict[str, tuple[str, str, Any]]:
    """Operation -> a request of it that small_world answers: method, path, body. All that the document has; the user
    is deleted last."""
    found = {}
    for template, methods in document["paths"].items():
        path = template.format(user_id=FAN, item_id="space-1", erasure_id=ERASURE)
        for method, told in methods.items():
            name = told["operationId"]
            found[name] = (method.upper(), path, BODIES[name] if "requestBody" in told else None)
    found["deleteUser"] = found.pop("deleteUser")
    return found


# -- users


async def test_a_list_is_best_first_and_leaves_out_what_was_consumed(api: httpx.AsyncClient, world: World) -> None:
    response = await api.get(f"/v1/users/{FAN}/recommendations", params={"limit": 20})
    body = response.json()
    assert response.status_code == 200
    assert set(body) == {"user_id", "token", "model_version", "applied", "items"}
    partition = world.partition_of(FAN)
    assert body["applied"] == {t: [partition, o] for t, o in world.applied(partition).items()}
    assert len(body["items"]) == 20 and all(set(i) == {"item_id", "score", "logit"} for i in body["items"])
    assert is_sorted([i["logit"] for i in body["items"]])
    consumed = {f"space-{n}" for n in (0, 2, 4, 6, 8)}
    assert not consumed & {i["item_id"] for i in body["items"]}
    everything = (await api.get(f"/v1/users/{FAN}/recommendations?limit=200&exclude_seen=false")).json()
    assert consumed <= {i["item_id"] for i in everything["items"]} and len(everything["items"]) == 48


async def test_the_token_names_the_state_that_answered(api: httpx.AsyncClient) -> None:
    body = (await api.get(f"/v1/users/{FAN}/recommendations")).json()
    token = tokens.read(body["token"])
    assert {topic: [token.partition, offset] for topic, offset in token.applied.items()} == body["applied"]
    assert (token.kind, token.limit, token.exclude_seen) == (tokens.LIST, 10, True)
    assert token.user == tokens.digest_of(FAN.encode()) and FAN.encode() not in msgspec.msgpack.encode(token)
    assert token.list == tokens.list_digest((item["item_id"], item["logit"]) for item in body["items"])
    assert tokens.write(token) == body["token"]


@pytest.mark.parametrize("spoil", [lambda t: "v1." + t, lambda t: t[:-1], lambda t: t[:9] + "A" + t[10:], lambda t: ""])
def test_a_token_that_is_not_whole_is_refused(spoil: Callable[[str], str]) -> None:
    whole = tokens.write(
        tokens.Token(0, b"12345678", 3, {"clicks": 7}, 1, 9, b"settings", 1.5, 1.25, 10, True, b"list")
    )
    assert tokens.read(whole).applied == {"clicks": 7}
    with pytest.raises(tokens.TokenError):
        tokens.read(spoil(whole))


async def test_bias_and_contributions_and_rest_make_the_logit(api: httpx.AsyncClient) -> None:
    for number in range(12):  # more than the row keeps one by one
        event = {
            "type": "comment",
            "user_id": FAN,
            "text": f"horror and {number} nights",
            "item_id": f"horror-{number}",
        }
        positions = (await api.post("/v1/events", json=event)).json()["positions"]
    query = {"explain": "true", "texts": "true", "limit": 30, "at_least": positions}
    items = (await api.get(f"/v1/users/{FAN}/recommendations", params=query)).json()["items"]
    for item in items:
        explanation = item["explanation"]
        values = [c["value"] for c in explanation["contributions"]]
        assert explanation["bias"] + sum(values) + explanation["rest"] == pytest.approx(item["logit"], abs=1e-4)
        assert item["text"]
    kinds = [(c["type"], "action" in c) for c in items[0]["explanation"]["contributions"]]
    assert kinds == [("comment", True)] * 12 + [("click", True)] * 5 + [("comment", False)] * 8
    assert all(c["topic"] in serving.USER_TOPICS and c["item_id"] for c in items[0]["explanation"]["contributions"])


async def test_an_unknown_user_gets_what_everybody_gets(api: httpx.AsyncClient) -> None:
    body = (await api.get("/v1/users/nobody/recommendations?explain=true")).json()
    assert len(body["items"]) == 10
    assert all(i["explanation"]["contributions"] == [] for i in body["items"])
    state = (await api.get("/v1/users/nobody/state")).json()
    assert (state["events"], state["last_ts"], state["last_events"]) == (0, None, [])


async def test_a_state_tells_events_vectors_and_what_made_them(api: httpx.AsyncClient, world: World) -> None:
    event = {"type": "comment", "user_id": FAN, "text": "western romance", "item_id": "western-1"}
    positions = (await api.post("/v1/events", json=event)).json()["positions"]
    state = (await api.get(f"/v1/users/{FAN}/state", params={"at_least": positions})).json()
    assert (state["events"], state["positives"], state["consumed"]) == (6, 6, 6)
    assert [e["type"] for e in state["last_events"]].count("comment") == 2  # as behaviour, and by its words
    assert state["last_events"][0]["item_id"] == "western-1" and state["last_events"][0]["text"].startswith(
        "The Last Canyon"
    )
    assert len(state["z"]["behaviour"]) == 16 and len(state["z"]["text"]) == 32
    assert [p["name"] for p in state["parts"]] == ["behaviour", "context", "item_texts", "own_words", "cooccurrence"]
    for part in state["parts"]:
        assert part["norm"] > 0
        assert part["events"] or part["name"] == "context"
        assert not part["events"] or sum(e["share"] for e in part["events"]) == pytest.approx(1, abs=1e-3)
    assert state["encoder"] == world.encoder and state["applied"]["comments"][1] == 0


@pytest.mark.parametrize("user", ["a/b", "a/state", "ü/recommendations ", "100%", "%2F", "?", "#x", "日本"])
async def test_an_id_may_hold_anything_percent_encoded(api: httpx.AsyncClient, user: str) -> None:
    event = {"type": "click", "user_id": user, "item_id": "space-1", "action": "like"}
    positions = (await api.post("/v1/events", json=event)).json()["positions"]
    raw = httpx.URL(BASE).copy_with(raw_path=f"/v1/users/{quote(user, safe='')}/state?at_least={positions[0]}".encode())
    state = (await api.get(raw)).json()
    assert (state["user_id"], state["events"]) == (user, 1)


async def test_ids_out_of_their_limits_are_refused(api: httpx.AsyncClient) -> None:
    for segment in ("", "x" * (ID_CHARS_MAX + 1), "%FF%FE"):
        for path in (f"/v1/users/{segment}/state", f"/v1/items/{segment}"):
            body = assert_problem(await api.get(path), "invalid-parameter")
            assert body["errors"][0]["parameter"] in ("user_id", "item_id")


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=201", "limit=x", "explain=maybe", "at_least=clicks", "at_least=items:0:1",
              "at_least=clicks:-1:1", "&".join(["at_least=clicks:0:0"] * 9)],
)  # fmt: skip
async def test_bad_parameters_are_named(api: httpx.AsyncClient, query: str) -> None:
    body = assert_problem(await api.get(f"/v1/users/{FAN}/recommendations?{query}"), "invalid-parameter")
    assert body["errors"][0]["parameter"] in query and "has to be" in body["errors"][0]["detail"]


async def test_every_bad_parameter_is_named_at_once(api: httpx.AsyncClient) -> None:
    path = f"/v1/users/{FAN}/recommendations?limit=0&explain=maybe&texts=true&at_least=clicks:0:1&at_least=x"
    body = assert_problem(await api.get(path), "invalid-parameter")
    assert body["errors"] == [
        {"parameter": "limit", "detail": "has to be a whole number, 1 to 200"},
        {"parameter": "explain", "detail": "has to be true or false"},
        {"parameter": "at_least", "detail": "each has to be TOPIC:PARTITION:OFFSET, the topic clicks, comments or "
         "erasures, 8 at most"},
    ]  # fmt: skip
    body = assert_problem(await api.get(f"/v1/users/{FAN}/state?at_least=clicks:99:1"), "invalid-parameter")
    assert "partition" in body["detail"]


async def test_ranking_given_items_agrees_with_the_list(api: httpx.AsyncClient) -> None:
    listed = (await api.get(f"/v1/users/{FAN}/recommendations?limit=200&exclude_seen=false")).json()["items"]
    asked = {"user_id": FAN, "item_ids": [i["item_id"] for i in reversed(listed)] + ["no such item"], "explain": True}
    ranked = (await api.post("/v1/rank", json=asked)).json()["items"]
    assert {i["item_id"]: i["logit"] for i in ranked} == pytest.approx(
        {i["item_id"]: i["logit"] for i in listed}, abs=1e-4
    )
    assert is_sorted([i["logit"] for i in ranked]) and all("explanation" in i for i in ranked)


async def test_rank_refuses_what_is_no_request(api: httpx.AsyncClient) -> None:
    for body in (b"", b"{", b"[]", b'{"user_id": "", "item_ids": ["a"]}', b'{"user_id": "a", "item_ids": []}'):
        assert_problem(await api.post("/v1/rank", content=body, headers=JSON), "not-understood")


# -- reading one's own events


async def test_at_least_waits_until_the_click_is_applied(api: httpx.AsyncClient, world: World) -> None:
    world.delay_s = 60  # it is applied below
    event = {"type": "click", "user_id": FAN, "item_id": "space-1", "action": "click"}
    position = (await api.post("/v1/events", json=event)).json()["positions"][0]
    before = (await api.get(f"/v1/users/{FAN}/state")).json()
    asked = asyncio.create_task(api.get(f"/v1/users/{FAN}/state?at_least={position}"))
    await asyncio.wait({asked}, timeout=0.05)
    assert not asked.done()
    topic, partition, offset = position.split(":")
    world.apply(topic, int(partition), int(offset), FAN.encode(), msgspec.json.encode(event))
    assert (before["events"], (await asked).json()["events"]) == (5, 6)


async def test_at_least_gives_up_in_time(api: httpx.AsyncClient, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streams.web.AT_LEAST_WAIT_S", 0.02)
    world.delay_s = 60
    sent = await api.post("/v1/events", json={"type": "click", "user_id": FAN, "item_id": "space-1", "action": "click"})
    position = sent.json()["positions"][0]
    body = assert_problem(await api.get(f"/v1/users/{FAN}/state?at_least={position}"), "not-applied")
    assert position in body["detail"]


async def test_at_least_is_not_waited_for_beyond_the_end_of_the_log(
    api: httpx.AsyncClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.web.AT_LEAST_CHECK_S", 0.01)
    path = f"/v1/users/{FAN}/state?at_least=clicks:{world.partition_of(FAN)}:99999"
    body = assert_problem(await api.get(path), "invalid-parameter")
    assert body["errors"][0]["parameter"] == "at_least" and "end of the log" in body["detail"]
    world.failing_after = 0
    assert_problem(await api.get(path), "log-unreachable")
    assert_problem(await api.get("/v1/erasures/erasures:0:7"), "log-unreachable")


# -- events


async def test_a_list_of_events_is_accepted_with_positions_in_order(api: httpx.AsyncClient, world: World) -> None:
    events: list[dict[str, Any]] = [
        {"type": "click", "user_id": f"u{n % 3}", "item_id": f"space-{n}", "action": "click"} for n in range(9)
    ]
    events.append({"type": "comment", "user_id": "u1", "text": "ünï"})
    response = await api.post("/v1/events", json=events)
    body = response.json()
    assert response.status_code == 202 and body["accepted"] == 10
    for n in range(3):
        partition = world.partition_of(f"u{n}")
        offsets = [int(p.split(":")[2]) for p in body["positions"][n:9:3]]
        assert offsets == sorted(offsets) and body["positions"][n].startswith(f"clicks:{partition}:")
    assert body["positions"][9] == f"comments:{world.partition_of('u1')}:0"


BAD_EVENTS: list[tuple[Any, str]] = [
    ({"type": "click", "user_id": "u", "item_id": "", "action": "click"}, ""),
    ({"type": "visit", "user_id": "u"}, "unknown_type"),
    ({"user_id": "u", "item_id": "i", "action": "click"}, "unknown_type"),
    ({"type": "comment", "user_id": "u", "text": "  "}, "text_empty"),
    ({"type": "click", "user_id": "u", "item_id": "i", "action": "click", "ts": 9e9}, ""),
    (7, ""),
]


@pytest.mark.parametrize(("event", "reason"), BAD_EVENTS)
async def test_one_bad_event_and_none_is_accepted(
    api: httpx.AsyncClient, world: World, event: Any, reason: str
) -> None:
    good = {"type": "click", "user_id": "u", "item_id": "space-1", "action": "click"}
    body = assert_problem(await api.post("/v1/events", json=[good, event]), "invalid-event")
    assert body["index"] == 1 and body["reason"] and (not reason or body["reason"] == reason)
    assert world.applied(world.partition_of("u"))["clicks"] == small_world().applied(world.partition_of("u"))["clicks"]
    body = assert_problem(await api.post("/v1/events", json=event), "invalid-event")
    assert body["index"] == 0


async def test_bodies_that_are_no_events_are_refused(api: httpx.AsyncClient) -> None:
    for content in (b"[", b"[]", b"[1,]"):
        assert_problem(await api.post("/v1/events", content=content, headers=JSON), "not-understood")
    for content in (b"", b"\xff", b"{"):
        assert_problem(await api.post("/v1/events", content=content, headers=JSON), "invalid-event")
    too_many = b"[" + b",".join([b"{}"] * (EVENTS_MAX + 1)) + b"]"
    assert_problem(await api.post("/v1/events", content=too_many, headers=JSON), "too-large")
    too_long = b" " * (EVENTS_BYTES_MAX + 1)
    assert_problem(await api.post("/v1/events", content=too_long, headers=JSON), "too-large")
    assert_problem(
        await api.post("/v1/events", content=b"{}", headers={"content-type": "text/plain"}), "unsupported-media-type"
    )


async def test_a_lost_log_tells_which_events_were_accepted(api: httpx.AsyncClient, world: World) -> None:
    world.failing_after = 1
    events = [{"type": "click", "user_id": "u", "item_id": f"space-{n}", "action": "click"} for n in range(3)]
    body = assert_problem(await api.post("/v1/events", json=events), "log-unreachable")
    assert [p is not None for p in body["positions"]] == [True, False, False]


# -- another worker's users


@pytest.mark.parametrize("theirs", [httpx.Response(200, json={"version": "of another build"}), httpx.ReadTimeout("")])
async def test_the_learners_figures_come_from_whoever_learns(world: World, theirs: httpx.Response | Exception) -> None:
    """Also for one who has this worker's answer already; without them where that worker does not answer."""
    asked: list[httpx.Request] = []
    own = world.model_info()
    world.learns_at = "http://10.0.0.2:8080"

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        if len(asked) <= 2:
            return httpx.Response(200, content=msgspec.json.encode(own))
        if isinstance(theirs, Exception):
            raise theirs
        return theirs

    async with (
        httpx.AsyncClient(transport=httpx.MockTransport(answer)) as asking,
        client_of(create_app(world, asking)) as api,
    ):
        first = await api.get("/v1/model")
        assert first.json()["learner"] == msgspec.to_builtins(own.learner)
        assert first.json()["prequential"] == msgspec.to_builtins(own.prequential)
        assert (await api.get("/v1/model", headers={"If-None-Match": first.headers["etag"]})).status_code == 304
        left = await api.get("/v1/model")
        assert (left.status_code, left.json()["learner"]) == (200, None)
        assert (await api.get("/v1/model", headers={"X-Headwater-Forwarded": "1"})).json()["learner"] is None
    assert [request.url.path for request in asked] == ["/v1/model"] * 3, "not for one who asks for another"
    assert not any("if-none-match" in request.headers for request in asked)


async def test_a_request_for_another_workers_user_is_forwarded_once(world: World) -> None:
    partition = world.partition_of(FAN)
    asked: list[httpx.Request] = []

    async with httpx.AsyncClient() as nobody:
        owner = httpx.ASGITransport(create_app(world, nobody))

        class Recorder(httpx.AsyncBaseTransport):
            async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
                asked.append(request)
                return await owner.handle_async_request(request)

        other = small_world(users=0)
        other.owners[partition] = "http://10.0.0.2:8080"
        async with httpx.AsyncClient(transport=Recorder()) as forwarder, client_of(create_app(other, forwarder)) as api:
            state = await api.get(f"/v1/users/{FAN}/state", headers={"x-request-id": "r-1"})
            assert (state.status_code, state.json()["events"]) == (200, 5)
            ranked = await api.post("/v1/rank", json={"user_id": FAN, "item_ids": ["space-1"]})
            assert ranked.json()["items"][0]["item_id"] == "space-1"
            lost = await api.get(f"/v1/users/{FAN}/state?limit=1&at_least=clicks:{partition}:x")
            assert_problem(lost, "invalid-parameter")
            looped = await api.get(f"/v1/users/{FAN}/state", headers={FORWARDED_HEADER: "1"})
            assert_problem(looped, "not-ready")
    assert [str(r.url) for r in asked] == [f"http://10.0.0.2:8080/v1/users/{FAN}/state", "http://10.0.0.2:8080/v1/rank"]
    assert asked[0].headers["x-request-id"] == "r-1" and FORWARDED_HEADER in asked[0].headers


async def test_an_owner_that_is_gone_or_unknown_means_come_again(world: World) -> None:
    async def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    world.owners[world.partition_of(FAN)] = "http://10.0.0.2:8080"
    forwarder = httpx.AsyncClient(transport=httpx.MockTransport(refuse))
    async with forwarder, client_of(create_app(world, forwarder)) as api:
        assert_problem(await api.get(f"/v1/users/{FAN}/state"), "owner-unreachable")
        world.closed.add(world.partition_of(FAN))
        response = await api.get(f"/v1/users/{FAN}/state")
        assert_problem(response, "not-ready")
        assert response.headers["retry-after"] == "2"


# -- items and the worker


async def test_an_item_and_those_like_it(api: httpx.AsyncClient, world: World) -> None:
    world.add_items([])
    item = (await api.get("/v1/items/space-2")).json()
    assert item["text"] == "The Golden Orbit. Space" and item["candidate"] and item["positives"] > 0
    assert item["norm"] > 0 and item["last_ts"] > 0
    similar = (await api.get("/v1/items/space-2/similar?limit=5")).json()
    assert similar["item_id"] == "space-2" and len(similar["items"]) == 5
    assert "space-2" not in {i["item_id"] for i in similar["items"]}
    assert is_sorted([i["similarity"] for i in similar["items"]])
    assert similar["items"][0]["item_id"].startswith("space-")
    for path in ("/v1/items/nothing", "/v1/items/nothing/similar"):
        assert_problem(await api.get(path), "not-found")


async def test_what_has_not_changed_is_not_sent_again(api: httpx.AsyncClient, world: World) -> None:
    list_path = f"/v1/users/{FAN}/recommendations"
    for path in (list_path, f"{list_path}?limit=3", "/v1/items/space-2", "/v1/items/space-2/similar", "/v1/model"):
        first = await api.get(path)
        tag = first.headers["etag"]
        assert first.status_code == 200 and first.headers["cache-control"] == "private, no-cache"
        again = await api.get(path, headers={"if-none-match": f'"another", {tag}'})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        assert (await api.get(path, headers={"if-none-match": '"another"'})).status_code == 200
    held = {"if-none-match": (await api.get(list_path)).headers["etag"]}
    assert (await api.get(f"{list_path}?limit=9", headers=held)).status_code == 200, "another question"
    assert "etag" not in (await api.get(f"{list_path}?explain=true&words=true")).headers, "words may come late"
    world.clock_s += 60
    assert (await api.get(list_path, headers=held)).status_code == 200, "time has passed"
    held = {"if-none-match": (await api.get(list_path)).headers["etag"]}
    world.click(FAN, "space-1")
    assert (await api.get(list_path, headers=held)).status_code == 200, "the user has done something"


async def test_an_item_named_like_an_operation_is_an_item(api: httpx.AsyncClient) -> None:
    world = World()
    world.add_items([Item("x/similar", "odd"), Item("x", "plain"), Item("later", "to come", ts=2e9)])
    async with httpx.AsyncClient() as forwarder, client_of(create_app(world, forwarder)) as client:
        assert (await client.get("/v1/items/x%2Fsimilar")).json()["text"] == "odd"
        assert (await client.get("/v1/items/x/similar")).json()["items"][0]["item_id"] == "x/similar"
        later = (await client.get("/v1/items/later")).json()
        assert (later["candidate"], later["text"], later["entered_ts"]) == (False, "to come", 2e9)


async def test_health_readiness_digest_model_metrics(api: httpx.AsyncClient, world: World) -> None:
    assert (await api.get("/healthz")).json() == {"status": "ok"}
    assert (await api.get("/readyz")).json() == {"status": "ready"}
    world.waits_for = ["users-3 opens"]
    assert assert_problem(await api.get("/readyz"), "not-ready")["reasons"] == ["users-3 opens"]
    assert (await api.get("/v1/digest")).json() == msgspec.to_builtins(world.digest())
    assert (await api.get("/v1/model")).json() == msgspec.to_builtins(world.model_info())
    await api.get(f"/v1/users/{FAN}/recommendations")
    metrics = await api.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert "headwater_recommendation_seconds_count 1.0" in metrics.text


async def test_unknown_addresses_methods_and_failures_are_problems(
    api: httpx.AsyncClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_problem(await api.get("/nowhere"), "not-found")
    response = await api.delete("/v1/digest")
    assert_problem(response, "method-not-allowed")
    assert response.headers["allow"] == "GET"

    def broken() -> dict[str, Any]:
        raise RuntimeError("secret of the house")

    monkeypatch.setattr(world, "model_info", broken)
    body = assert_problem(await api.get("/v1/model"), "internal")
    assert "secret" not in str(body)


# -- the edge


async def test_a_head_is_a_get_without_its_body(api: httpx.AsyncClient) -> None:
    for path in ("/", "/healthz", "/v1/items/space-2", f"/v1/users/{FAN}/recommendations"):
        head, get = await api.head(path), await api.get(path)
        assert head.status_code == get.status_code == 200
        assert head.headers.get("etag") == get.headers.get("etag")
    assert (await api.head("/v1/stream")).status_code == 405, "it has no end"


async def test_request_ids_come_back_and_bad_ones_are_replaced(api: httpx.AsyncClient) -> None:
    assert (await api.get("/healthz", headers={"x-request-id": "abc-1"})).headers["x-request-id"] == "abc-1"
    replaced = (await api.get("/healthz", headers={"x-request-id": "a b<script>"})).headers["x-request-id"]
    assert len(replaced) == 32


async def test_other_hosts_and_other_sites_are_refused(api: httpx.AsyncClient) -> None:
    assert_problem(await api.get("/v1/model", headers={"host": "evil.example"}), "misdirected")
    assert_problem(await api.get("/v1/model", headers={"host": "[::1]:8080"}), "misdirected")
    cross = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
    assert_problem(await api.get("/v1/model", headers=cross), "cross-site")
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert (await api.get("/", headers=link)).status_code == 200
    assert "access-control-allow-origin" not in (await api.get("/healthz", headers={"origin": "http://a.b"})).headers


async def test_the_page_is_served_with_a_strict_policy(api: httpx.AsyncClient) -> None:
    for path in PAGE_FILES:
        response = await api.get(path)
        policy = response.headers["content-security-policy"]
        assert response.status_code == 200 and "default-src 'none'" in policy and "unsafe" not in policy
        again = await api.get(path, headers={"if-none-match": response.headers["etag"]})
        assert again.status_code == 304
    page = (await api.get("/")).text
    assert "http://" not in page and "https://" not in page and " style=" not in page and "<script>" not in page


# -- documents


def resolved(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    return {**schema, "components": document["components"]}


async def test_openapi_is_valid_and_says_what_is_answered(api: httpx.AsyncClient) -> None:
    document = (await api.get("/openapi.json")).json()
    meta = json.loads((Path(__file__).parent / "vendor" / "openapi-3.1.json").read_text())
    jsonschema.Draft202012Validator(meta).validate(document)
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    operations = [(p, m, o) for p, methods in document["paths"].items() for m, o in methods.items()]
    assert {o["operationId"] for _, _, o in operations} >= {"getState", "postEvents", "getStream"}
    for path, _, operation in operations:
        for status, answer in operation["responses"].items():
            for media_type, content in answer.get("content", {}).items():
                assert (int(status) >= 400) == (media_type == "application/problem+json"), path
                examples = [e["value"] for e in content.get("examples", {}).values()]
                examples += [content["example"]] if "example" in content else []
                for example in examples:
                    jsonschema.validate(example, resolved(document, content["schema"]))
        if "requestBody" in operation:
            content = operation["requestBody"]["content"]["application/json"]
            jsonschema.validate(content["example"], resolved(document, content["schema"]))


def closed(schema: Any) -> Any:
    """The schema, that of an object as one of no other properties than it names."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    told = {name: closed(part) for name, part in schema.items()}
    return {"additionalProperties": False, **told} if isinstance(schema.get("properties"), dict) else told


async def test_every_answer_is_what_the_document_says_and_nothing_else(api: httpx.AsyncClient) -> None:
    document = (await api.get("/openapi.json")).json()
    shapes = closed(document)
    query = {"explain": True, "parts": True, "texts": True, "words": True}  # of lists; others pass it over
    names = []
    for name, (method, path, body) in requests(document).items():
        if name == "getStream":  # it has no end
            continue
        response = await api.request(method, path, json=body, params=query)
        told = operation(document, name)["responses"][str(response.status_code)]["content"]
        content = told[response.headers["content-type"].partition(";")[0]]
        assert response.is_success, (name, response.text)
        if "json" in response.headers["content-type"] and name != "getOpenapi":
            assert "$ref" in content["schema"], f"{name}: any object would do"
            jsonschema.validate(response.json(), resolved(shapes, content["schema"]))
            names.append(name)
    assert len(names) == 13 and {"getDigest", "getModel", "getHealth", "getReadiness", "getErasure"} <= set(names)
    for path in ("/v1/items/nothing", "/v1/users/u/state?at_least=x"):
        problem = await api.get(path)
        jsonschema.validate(problem.json(), resolved(shapes, {"$ref": "#/components/schemas/ProblemDetails"}))


async def test_examples_are_what_a_worker_could_answer(api: httpx.AsyncClient, world: World) -> None:
    """No name is missing and none is invented; what can be checked of the values is."""
    for name, told in OPERATIONS.items():
        if isinstance(told.shape, type):
            whole = msgspec.json.encode(msgspec.convert(told.example, told.shape))
            assert json.loads(whole) == json.loads(json.dumps(told.example)), name
    world.take(Comment(FAN, "western romance", ts=world.clock_s))
    shown, state = OPERATIONS["getState"].example, (await api.get(f"/v1/users/{FAN}/state")).json()
    assert [part["name"] for part in shown["parts"]] == [part["name"] for part in state["parts"]]
    figures = LiveMetrics(POPULARITIES).report()
    assert set(OPERATIONS["getModel"].example["prequential"]) == set(Prequential.__struct_fields__) == set(figures)
    assert msgspec.to_builtins(msgspec.convert(figures, Prequential)) == figures
    for name in ("getRecommendations", "rank", "whatIf"):
        shown = OPERATIONS[name].example
        token = tokens.read(shown["token"])
        assert token.list == tokens.list_digest((item["item_id"], item["logit"]) for item in shown["items"])
        assert {topic: [token.partition, offset] for topic, offset in token.applied.items()} == shown["applied"]
        for item in shown["items"]:
            given = item["explanation"]
            assert given["bias"] == pytest.approx(sum(given["bias_parts"].values()))
            assert all(c["value"] == pytest.approx(sum(c["parts"].values())) for c in given["contributions"])
            values = sum(c["value"] for c in given["contributions"])
            assert given["bias"] + values + given["rest"] == pytest.approx(item["logit"])


async def test_docs_tell_every_operation_and_problem_without_scripts(api: httpx.AsyncClient) -> None:
    page = (await api.get("/docs")).text
    document = (await api.get("/openapi.json")).json()
    assert all(path in page for path in document["paths"])
    assert all(f'id="problem-{name}"' in page for name in KINDS)
    assert "<script" not in page and not re.search(r"(src|href)=.https?:", page)  # nothing of other hosts


# -- the stream


async def test_the_stream_tells_events_and_ends_with_the_worker(world: World) -> None:
    async with httpx.AsyncClient() as forwarder:
        http = Http(world, forwarder)
        stream = http.stream()
        assert await anext(stream) == b"retry: 2000\n\n"
        assert (await anext(stream)).startswith(b"event: status\ndata: {")
        world.apply("clicks", 0, 999, b"u", b'{"user_id": "u", "item_id": "space-1", "action": "like"}')
        kind, data, *_ = (await anext(stream)).decode().split("\n")
        assert kind == "event: event"
        shown = json.loads(data.removeprefix("data: "))
        assert {k: shown[k] for k in ("user_id", "item_id", "action")} == {
            "user_id": "u",
            "item_id": "space-1",
            "action": "like",
        }
        assert (await anext(stream)).startswith(b"event: status")
        http.closing.set()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert (http.streams, world.listeners) == (0, [])


async def test_a_silent_stream_beats_and_a_left_one_is_let_go(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streams.web.STREAM_HEARTBEAT_S", 0.01)
    async with httpx.AsyncClient() as forwarder:
        http = Http(world, forwarder)
        stream = http.stream()
        given = [await anext(stream) for _ in range(4)]
        assert given[2] == given[3] == b": still here\n\n"
        await stream.aclose()  # type: ignore[attr-defined]
        assert (http.streams, world.listeners) == (0, [])


async def test_too_many_streams_are_refused(world: World) -> None:
    async with httpx.AsyncClient() as forwarder:
        app = create_app(world, forwarder)
        app.app.state.http.streams = STREAMS_MAX
        async with client_of(app) as api:
            assert_problem(await api.get("/v1/stream"), "too-many-streams")


# -- the service


async def test_the_service_answers_over_a_socket_and_stops_at_once_with_streams_open(world: World) -> None:
    port = free_port()
    service = HttpService(world, Settings(http_port=port))
    await service.start()
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            assert (await client.get("/healthz")).status_code == 200
            assert (await client.get(f"/v1/users/{quote('a/b', safe='')}/state")).json()["user_id"] == "a/b"
            async with client.stream("GET", "/v1/stream") as stream:
                lines = stream.aiter_lines()
                assert await anext(lines) == "retry: 2000"
                started = asyncio.get_running_loop().time()
                await service.stop()
                assert asyncio.get_running_loop().time() - started < 2.5
                with contextlib.suppress(httpx.HTTPError):
                    async for _ in lines:
                        pass
    finally:
        await service.stop()


async def test_what_is_no_request_is_refused_before_it_costs_anything(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No HTTP, a head too long or never whole, a connection too many, a body that does not come."""
    port = free_port()
    service = HttpService(world, Settings(http_port=port))
    await service.start()

    async def told(sent: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        answer = await asyncio.wait_for(reader.read(), 60)
        writer.close()
        return answer

    head = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    json_head = b"POST /v1/events HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    try:
        for sent in (
            b"garbage\r\n\r\n" + b"x" * 200_000,
            b"GET /\xff HTTP/1.1\r\n\r\n",
            json_head + b"Content-Length: -1\r\n\r\n",
            head + b"Host: elsewhere\r\n\r\n",
            b"GET /healthz HTTP/1.1\r\n\r\n",
        ):
            assert_refused(await told(sent), "not-understood")
        assert_refused(await told(head + b"X-Long: " + b"x" * 700_000), "too-large")
        large = await told(json_head + b"Connection: close\r\nContent-Length: 100002\r\n\r\n[" + b" " * 100_000 + b"]")
        assert b"0 events" in large, "a body is no head"
        monkeypatch.setattr("streams.web.BODY_S_MAX", 0.05)
        assert_refused(await told(json_head + b"Content-Length: 9\r\n\r\n["), "too-slow")
        whole = await told(head.replace(b"GET", b"HEAD") + b"Connection: close\r\n\r\n")
        assert whole.startswith(b"HTTP/1.1 200") and b"content-length: 15" in whole and whole.endswith(b"\r\n\r\n")
        monkeypatch.setattr("streams.wire.HEAD_S_MAX", 0.05)
        assert await told(head) == b"", "closed without a word"
        monkeypatch.setattr("streams.wire.CONNECTIONS_MAX", 0)
        assert_refused(await told(b""), "too-many-connections")
    finally:
        await service.stop()


@contextlib.asynccontextmanager
async def connected(world: World) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to the service."""
    port = free_port()
    service = HttpService(world, Settings(http_port=port))
    await service.start()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        yield reader, writer
        writer.close()
    finally:
        await service.stop()


async def test_a_body_that_comes_after_its_head_is_no_head(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streams.wire.HEAD_BYTES_MAX", 1000)
    body = b"[" + b" " * 2000 + b"]"
    async with connected(world) as (reader, writer):
        writer.write(
            b"POST /v1/events HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body)
        )
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        assert (await reader.readline()).startswith(b"HTTP/1.1 400")
        assert b"0 events" in await reader.readuntil(b"}")


async def test_a_request_that_was_answered_before_its_body_came_leaves_its_connection_open(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.wire.HEAD_S_MAX", 0.02)
    async with connected(world) as (reader, writer):
        writer.write(b"POST /v1/users/%FF/what-if HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 2\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 422")
        await reader.readuntil(b"}]}")
        writer.write(b"{}")
        with pytest.raises(TimeoutError):  # which is several looks of the worker at its connections
            await asyncio.wait_for(reader.read(1), 0.2)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")


def assert_refused(answer: bytes, slug: str) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % KINDS[slug].status) and b"application/problem+json" in head, answer
    assert json.loads(body)["type"] == f"/docs#problem-{slug}" and b"onnection: close" in head
    assert (b"Retry-After: 1" in head) == (KINDS[slug].status == 503)


async def test_a_taken_port_says_what_to_do(world: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        service = HttpService(world, Settings(http_port=listener.getsockname()[1]))
        with pytest.raises(OSError, match="HEADWATER_HTTP_PORT"):
            await service.on_start()


# -- erasures


async def test_a_deleted_user_is_forgotten_and_the_erasure_can_be_asked_for(api: httpx.AsyncClient) -> None:
    asked = await api.delete(f"/v1/users/{FAN}", params={"unlearn": "true"})
    assert asked.status_code == 202
    name = asked.json()["erasure_id"]
    assert asked.json() == {**asked.json(), "status": "pending", "unlearn": True}
    assert asked.headers["location"] == f"/v1/erasures/{name}"
    state = await api.get(f"/v1/users/{FAN}/state", params={"at_least": name})
    assert state.json()["events"] == 0
    told = (await api.get(f"/v1/erasures/{name}")).json()
    assert (told["status"], told["state"]["events"]) == ("complete", 5)
    assert FAN not in json.dumps(told)


async def test_an_erasure_that_waits_is_pending_and_one_that_never_was_is_not_found(
    api: httpx.AsyncClient, world: World
) -> None:
    world.delay_s = 60
    name = (await api.delete(f"/v1/users/{FAN}")).json()["erasure_id"]
    assert (await api.get(f"/v1/erasures/{name}")).json()["status"] == "pending"
    _, partition, offset = name.split(":")
    for unknown in (f"erasures:{partition}:{int(offset) + 1}", f"erasures:{world.partitions}:0"):
        assert_problem(await api.get(f"/v1/erasures/{unknown}"), "not-found")
    assert_problem(await api.get("/v1/erasures/clicks:0:1"), "invalid-parameter")
    assert_problem(await api.delete("/v1/users/u", params={"unlearn": "maybe"}), "invalid-parameter")
    assert_problem(await api.delete(f"/v1/users/{FAN}/state"), "method-not-allowed")


async def test_an_erasure_of_another_workers_partition_is_asked_there(world: World) -> None:
    there = small_world()
    owner = client_of(create_app(there, httpx.AsyncClient(), ["127.0.0.1"]))
    async with owner, client_of(create_app(world, owner, ["127.0.0.1"])) as client:
        world.owners[world.partition_of(FAN)] = BASE
        there.delay_s = 60
        name = (await owner.delete(f"/v1/users/{FAN}")).json()["erasure_id"]
        assert (await client.get(f"/v1/erasures/{name}")).json()["status"] == "pending"


async def test_an_erasure_that_the_log_does_not_take_is_told(api: httpx.AsyncClient, world: World) -> None:
    world.failing_after = 0
    assert_problem(await api.delete(f"/v1/users/{FAN}"), "log-unreachable")
