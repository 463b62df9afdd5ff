"""The client: every operation against the real routes, retries and failures against answers that the test gives."""

import inspect
import logging
import math
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from kafka import KafkaConsumer
from kafka.structs import TopicPartition

import headwater
from headwater import (
    AsyncClient,
    Certificate,
    Click,
    Client,
    Comment,
    Erasure,
    HeadwaterError,
    Invalid,
    Item,
    NoAnswer,
    NotAllowed,
    NotFound,
    NotHeadwater,
    NotReady,
    Producer,
    TimedOut,
    TooManyRequests,
    WorkerFailed,
)
from streams import keys, topics
from streams.client import EVENTS_MAX, KEPT_ANSWERS_MAX, encode, newest
from streams.kafka import partition_of
from streams.keys import Gate
from streams.settings import Settings
from streams.web import create_app
from tests.serving_world import World, small_world

ROOT = Path(__file__).parent.parent
URL = "http://127.0.0.1:8080"
FAN = "space-fan-0"
KEY = "hw_123456789abc_hush"
READ_S_MAX = 60.0
HEAVY = {"torch", "transformers", "faust", "numba", "numpy", "fastapi", "kafka", "aiokafka", "model", "state"}


@pytest.fixture
def world() -> World:
    return small_world()


@pytest.fixture
async def ask(world: World) -> AsyncIterator[AsyncClient]:
    async with httpx.AsyncClient() as forwarder, over(world, forwarder) as http:
        yield AsyncClient(http=http, retry_s=0)


def over(world: World, forwarder: httpx.AsyncClient, gate: Gate | None = None) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(create_app(world, forwarder, None, gate)), base_url=URL)


def answering(*responses: httpx.Response | Exception, **options: Any) -> tuple[Client, list[httpx.Request]]:
    """A client of somebody who gives these answers, the last one for ever; and what it has asked."""
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        given = responses[min(len(asked), len(responses)) - 1]
        if isinstance(given, Exception):
            raise given
        return httpx.Response(given.status_code, headers=given.headers, content=given.content, request=request)

    return Client(http=httpx.Client(transport=httpx.MockTransport(answer), base_url=URL), **options), asked


def problem(status: int, kind: str = "x", retry_after: str | None = None, **more: Any) -> httpx.Response:
    told = {"type": f"/docs#problem-{kind}", "title": "T", "status": status, "detail": "D", "request_id": "r1", **more}
    return httpx.Response(status, json=told, headers={} if retry_after is None else {"Retry-After": retry_after})


ACCEPTED = httpx.Response(202, json={"accepted": 1, "positions": ["clicks:0:1"]})
CLICK = Click("u", "i", "click")

# -- the operations, over the real routes


async def test_what_was_sent_is_in_the_list_that_is_asked_for_at_its_position(ask: AsyncClient, world: World) -> None:
    world.delay_s = 0.05
    positions = await ask.send(
        Click(FAN, "space-1", "like"), Comment(FAN, "western romance"), Click(FAN, "space-3", "rating", 5.0)
    )
    assert [p.partition(":")[0] for p in positions] == ["clicks", "comments", "clicks"]
    told = await ask.recommendations(
        FAN, limit=48, explain=True, texts=True, parts=True, words=True, at_least=positions
    )
    assert not {"space-1", "space-3"} & {item.item_id for item in told.items}
    for item in told.items:
        assert item.text and item.explanation and item.explanation.bias_parts
        values = [c.value for c in item.explanation.contributions]
        total = item.explanation.bias + sum(values) + item.explanation.rest
        assert total == pytest.approx(item.logit, abs=1e-4)
        assert [c.words for c in item.explanation.contributions if c.words] == ["western romance"]
    assert (await ask.state(FAN, at_least=positions[-1])).events == 8
    again = await ask.recommendations(FAN, exclude_seen=False, limit=48)
    assert {"space-1", "space-3"} <= {item.item_id for item in again.items}


async def test_every_other_read_is_typed(ask: AsyncClient, world: World) -> None:
    positions = await ask.send(Click(FAN, "space-1", "like"))
    without = await ask.what_if(FAN, positions, [Comment(FAN, "no more westerns")], limit=3, at_least=positions)
    assert without.exact and len(without.items) == 3
    ranked = await ask.rank(FAN, ["western-1", "space-3", "nothing"], explain=True, at_least=positions)
    assert [item.item_id for item in ranked.items] == ["space-3", "western-1"] and ranked.items[0].explanation
    assert (await ask.item("space-1")).positives > 0
    assert len((await ask.similar("space-1", limit=4)).items) == 4
    assert (await ask.model())["replica"]["active"] == 48
    assert len((await ask.digest())["partitions"]) == world.partitions
    await ask.healthz()
    assert await ask.readyz() == []
    world.waits_for = ["partition 1 opens"]
    assert await ask.readyz() == ["partition 1 opens"]
    for odd in ("a/b c?#é", ".", "..", "%2E", "a."):
        assert (await ask.state(odd)).user_id == odd
    with pytest.raises(Invalid, match="not text"):
        await ask.state("\ud800")
    with pytest.raises(Invalid):
        await ask.erasure("no/erasure")


async def test_an_erasure_is_asked_for_and_waited_for(ask: AsyncClient, world: World) -> None:
    world.delay_s = 0.05
    seen: list[Certificate] = []
    asked = await ask.forget(FAN, unlearn=True)
    assert asked.status == "pending" and asked.unlearn
    told = await ask.erased(asked.erasure_id, on_change=seen.append)
    assert told.is_complete and told.state and told.state.events == 5
    assert seen[-1] == told == await ask.erasure(asked.erasure_id)
    assert (await ask.state(FAN)).events == 0


async def test_an_erasure_that_takes_too_long_goes_on_unwatched(ask: AsyncClient, world: World) -> None:
    world.delay_s = 60.0
    asked = await ask.forget(FAN)
    with pytest.raises(TimedOut, match="is pending after 0 s"):
        await ask.erased(asked.erasure_id, timeout_s=0)


async def test_the_problems_of_the_real_routes_become_their_classes(
    ask: AsyncClient, world: World, tmp_path: Path
) -> None:  # fmt: skip
    with pytest.raises(NotFound) as missing:
        await ask.item("nothing")
    assert (missing.value.kind, missing.value.status) == ("not-found", 404) and missing.value.request_id
    with pytest.raises(Invalid) as invalid:
        await ask.recommendations(FAN, limit=0)
    assert invalid.value.problem.errors and invalid.value.problem.errors[0]["parameter"] == "limit"
    world.closed.add(world.partition_of(FAN))
    with pytest.raises(NotReady) as moving:
        await ask.state(FAN)
    assert moving.value.retry_after_s == 2.0
    key = keys.add(tmp_path / "keys", "shop", "read", 1.0)
    async with httpx.AsyncClient() as forwarder, over(world, forwarder, Gate(tmp_path / "keys", 1e3)) as http:
        with pytest.raises(NotAllowed, match="No valid key"):
            await AsyncClient(http=http).model()
        http.headers["Authorization"] = f"Bearer {key}"
        assert (await AsyncClient(http=http).model())["replica"]["active"] == 48
        with pytest.raises(NotAllowed) as forbidden:
            await AsyncClient(http=http).send(CLICK)
        assert forbidden.value.status == 403


async def test_the_stream_tells_what_happens(world: World) -> None:
    class Source(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield b"retry: 2000\n\n: still here\n\nevent: status\nda"
            yield b'ta: {"type": "status",\ndata: "items": 48}\n\n'
            raise httpx.ReadError("gone")

    transport = httpx.MockTransport(lambda request: httpx.Response(200, stream=Source()))
    told = []

    async def listen() -> None:
        async for message in AsyncClient(http=httpx.AsyncClient(transport=transport, base_url=URL)).stream():
            told.append(message)  # noqa: PERF401 - what came before the failure counts

    with pytest.raises(NoAnswer, match="ReadError"):
        await listen()
    assert told == [{"type": "status", "items": 48}]
    refused, _ = answering(problem(503, "too-many-streams", "1"))
    with pytest.raises(NotReady):
        next(refused.stream())
    lines = httpx.Response(200, content=b'data: {"type": "event"}\n\n')
    assert list(answering(lines)[0].stream()) == [{"type": "event"}]


def test_both_clients_have_the_same_methods_with_the_same_arguments() -> None:
    def methods(of: type) -> dict[str, Any]:
        return {name: m for name, m in inspect.getmembers(of, inspect.isfunction) if not name.startswith("_")}

    sync, asynchronous = methods(Client), methods(AsyncClient)
    assert sync.keys() == asynchronous.keys() and len(sync) == 16
    for name, method in sync.items():
        assert inspect.signature(method).parameters == inspect.signature(asynchronous[name]).parameters


# -- asking again


def test_later_is_asked_again_as_told_and_no_longer_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("streams.client.time.sleep", waited.append)
    ready = httpx.Response(200, json={"items": 1})
    client, asked = answering(problem(503, "not-ready", "3"), problem(429, retry_after="2"), problem(503), ready)
    assert client.model() == {"items": 1}
    assert (len(asked), waited) == (4, [3.0, 2.0, 1.0])
    waited.clear()
    client, asked = answering(problem(503, "not-ready", "30"))
    with pytest.raises(NotReady, match=r"T: D \(503, request r1\)") as failure:
        client.state("u")
    assert (len(asked), waited, failure.value.retry_after_s) == (1, [], 30.0)
    with pytest.raises(TooManyRequests):
        answering(problem(429, retry_after="1"), retry_s=0)[0].state("u")


def test_a_failure_that_asking_again_does_not_mend_is_raised_at_once() -> None:
    for status, kind in ((500, WorkerFailed), (502, WorkerFailed), (422, Invalid), (403, NotAllowed), (404, NotFound)):
        client, asked = answering(problem(status))
        with pytest.raises(kind):
            client.model()
        assert len(asked) == 1
    for odd in (httpx.Response(502, html="<h1>nginx</h1>"), httpx.Response(200, html="<h1>hello</h1>"),
                httpx.Response(200, json=[1])):  # fmt: skip
        with pytest.raises(NotHeadwater, match=r"GET http://127\.0\.0\.1:8080/v1/model does not answer as Headwater"):
            answering(odd)[0].model()
    with pytest.raises(TimedOut, match=r"no worker answers at http://127\.0\.0\.1:8080 \(ReadTimeout\)"):
        answering(httpx.ReadTimeout("slow"))[0].model()
    with pytest.raises(NoAnswer, match="ConnectError"):
        answering(httpx.ConnectError("refused"))[0].model()


def test_only_what_the_log_has_not_accepted_is_sent_again() -> None:
    some = problem(503, "log-unreachable", "0", positions=["clicks:0:1", None, None])
    rest = httpx.Response(202, json={"accepted": 2, "positions": ["clicks:0:2", "clicks:0:3"]})
    events = [Click("u", f"i{n}", "click") for n in range(3)]
    client, asked = answering(some, rest)
    assert client.send(*events) == ["clicks:0:1", "clicks:0:2", "clicks:0:3"]
    assert [e["item_id"] for e in msgspec.json.decode(asked[1].content)] == ["i1", "i2"]
    client, asked = answering(some, httpx.ReadTimeout("slow"))
    with pytest.raises(TimedOut) as failure:
        client.send(*events)
    assert failure.value.positions == ["clicks:0:1", None, None] and len(asked) == 2, "an unknown end is not repeated"
    with pytest.raises(NotHeadwater):
        answering(ACCEPTED)[0].send(*events)


def test_many_events_go_in_requests_that_a_worker_takes() -> None:
    sizes: list[int] = []

    def answer(request: httpx.Request) -> httpx.Response:
        events = msgspec.json.decode(request.content)
        sizes.append(len(events))
        return httpx.Response(202, json={"accepted": len(events), "positions": [e["item_id"] for e in events]})

    client = Client(http=httpx.Client(transport=httpx.MockTransport(answer), base_url=URL))
    told = client.send(*(Click("u", str(n), "click") for n in range(EVENTS_MAX + 3)))
    assert told == [str(n) for n in range(EVENTS_MAX + 3)] and sizes == [EVENTS_MAX, 3]
    assert client.send() == []
    sizes.clear()
    client.send(*(Comment("u", "é" * 90_000, str(n)) for n in range(15)))
    assert sum(sizes) == 15 and max(sizes) < 15


def test_what_has_not_changed_is_not_sent_again() -> None:
    client, asked = answering(
        httpx.Response(200, json={"items": 1}, headers={"ETag": 'W/"1"'}), httpx.Response(304),
        httpx.Response(200, json={"items": 2}, headers={"ETag": 'W/"2"'}),
    )  # fmt: skip
    assert [client.model() for _ in range(3)] == [{"items": 1}, {"items": 1}, {"items": 2}]
    assert [request.headers.get("If-None-Match") for request in asked] == [None, 'W/"1"', 'W/"1"']
    for n in range(KEPT_ANSWERS_MAX + 5):
        with pytest.raises(NotHeadwater):
            client.item(str(n))
    assert len(client._operations._kept) == KEPT_ANSWERS_MAX


def test_fields_that_a_later_version_adds_are_ignored() -> None:
    later = {"item_id": "i", "items": [{"item_id": "j", "similarity": 1.0, "text": "T", "new": 1}], "more": {}}
    assert answering(httpx.Response(200, json=later))[0].similar("i").items[0].similarity == 1.0


# -- events


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (Click("", "i", "click"), "empty_id"), (Click("u", "i", "rating", math.nan), "not_finite"),
        (Click("u", "i", "click", ts=1e12), "ts_in_future"), (Comment("u", " "), "text_empty"),
        (Comment("u" * 300, "t"), "id_too_long"), (Item("i", "t", vector=[0.0]), "bad_vector"),
        (Comment("u", "\ud800"), "wrong_type"), (Click("u", "i", "click", attributes={"a": object()}), "wrong_type"),
    ],
)  # fmt: skip
def test_an_event_that_the_stream_would_refuse_is_not_sent(event: Any, reason: str) -> None:
    client, asked = answering(ACCEPTED)
    with pytest.raises(Invalid) as fault:
        client.send(CLICK, event) if not isinstance(event, Item) else encode(event)
    assert fault.value.problem.reason == reason and asked == []


def test_events_are_encoded_as_the_schemas_say() -> None:
    moment: Any = datetime(2026, 11, 24, 9, 30, tzinfo=UTC)
    assert encode(Click("u", "i", "rating", 5.0, moment)) == (
        b'{"user_id":"u","item_id":"i","action":"rating","value":5.0,"ts":"2026-11-24T09:30:00Z"}'
    )
    assert encode(Comment("u", "é", "i")) == '{"user_id":"u","text":"é","item_id":"i"}'.encode()
    client, asked = answering(ACCEPTED)
    assert client.send(CLICK) == ["clicks:0:1"]
    assert asked[0].content == b'[{"type":"click","user_id":"u","item_id":"i","action":"click"}]'
    for stranger in (Item("i", "t"), {"user_id": "u"}):
        with pytest.raises(TypeError):
            client.send(stranger)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        encode("click")  # type: ignore[arg-type]


def test_a_read_waits_for_the_newest_position_of_each_topic_and_partition_alone() -> None:
    many = [f"clicks:{n % 2}:{n}" for n in range(30)]
    assert newest(many) == ["clicks:0:28", "clicks:1:29"] == newest(many[::-1])[::-1]
    assert newest("comments:3:7") == ["comments:3:7"] and newest(["what", "what"]) == ["what"]


def test_a_producer_sends_what_the_stream_reads_by_the_keys_it_wants(
    embedded_broker: str, make_settings: Callable[..., Settings]
) -> None:  # fmt: skip
    settings = make_settings(broker=embedded_broker)
    topics.ensure(settings)
    with Producer(embedded_broker, topic_prefix=settings.topic_prefix) as producer:
        sent = producer.send(
            Click("u42", "50", "like"), Comment("u42", "slow"), Item("50", "Star Wars"), Erasure("u42", unlearn=True)
        )
        sent += producer.withdraw("50")
        with pytest.raises(Invalid):
            producer.send(CLICK, Click("", "i", "click"))
    consumer = KafkaConsumer(**settings.kafka_options(), enable_auto_commit=False)
    try:
        names = ("clicks", "comments", "items", "erasures")
        at = [TopicPartition(settings.topic(topic), p) for topic in names for p in range(2)]
        consumer.assign(at)
        consumer.seek_to_beginning()
        found: dict[str, tuple[bytes, bytes | None]] = {}
        deadline = time.monotonic() + READ_S_MAX
        while len(found) < len(sent) and time.monotonic() < deadline:
            for place, records in consumer.poll(timeout_ms=200).items():
                topic = place.topic.removeprefix(settings.topic_prefix)
                found |= {f"{topic}:{place.partition}:{r.offset}": (r.key, r.value) for r in records}
    finally:
        consumer.close()
    assert [found[position] for position in sent] == [
        (b"u42", b'{"user_id":"u42","item_id":"50","action":"like"}'), (b"u42", b'{"user_id":"u42","text":"slow"}'),
        (b"50", b'{"item_id":"50","text":"Star Wars"}'), (b"u42", b'{"user_id":"u42","unlearn":true}'), (b"50", None),
    ]  # fmt: skip
    assert sent[0].split(":")[1] == str(partition_of(b"u42", 2))


def test_no_broker_is_no_answer(free_port: int) -> None:
    with pytest.raises(NoAnswer, match=f"no broker answers at 127.0.0.1:{free_port}"):
        Producer(f"127.0.0.1:{free_port}", bootstrap_timeout_ms=200)


# -- what it loads and tells


def test_importing_the_client_loads_nothing_of_what_a_worker_is_made_of() -> None:
    code = "import sys, headwater; headwater.Client(); print(*{m.split('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(done.stdout.split())


def test_the_client_is_typed_for_who_imports_it() -> None:
    assert (ROOT / "headwater" / "py.typed").exists() and (ROOT / "streams" / "py.typed").exists()
    assert all(getattr(headwater, name).__doc__ for name in headwater.__all__)


def test_neither_key_nor_words_are_logged_or_shown(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, free_port: int
) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("HEADWATER_API_KEY", KEY)
    shown = []
    with Client(f"http://127.0.0.1:{free_port}") as client:
        assert client._http.headers["Authorization"] == f"Bearer {KEY}"
        for words in ("my secret thought", "\ud800 my secret thought"):
            with pytest.raises(HeadwaterError) as failure:
                client.send(Comment("u", words))
            shown += [str(failure.value), repr(failure.value), repr(client), repr(client._http.headers)]
    told = caplog.text + "".join(shown)
    assert "hush" not in told and "secret" not in told
    assert "Authorization" not in Client(key="")._http.headers
