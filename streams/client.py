"""A typed client of the workers' HTTP, in a sync and an async form (`from headwater import Client, AsyncClient`).

Each operation is written once, as a generator of steps: a request to be sent, or seconds to be waited; it is resumed
with the response and returns the answer. The two clients differ in who carries the steps out.
"""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, Self, TypedDict, TypeVar, Unpack, cast
from urllib.parse import quote

import httpx
import msgspec

from streams import codec
from streams.answers import Accepted, Certificate, ItemView, Recommendations, Similar, UserState, WhatIf
from streams.events import TS_S_MAX, Click, Comment, Erasure, Item
from streams.failures import (
    BY_STATUS,
    HeadwaterError,
    Invalid,
    NotHeadwater,
    NotReady,
    TimedOut,
    WorkerFailed,
    unanswered,
)
from streams.problems import ProblemDetails

TIMEOUT_S: Final = 20.0  # of one request; a worker waits 10 s at most before it answers
CONNECT_TIMEOUT_S: Final = 3.0
STREAM_SILENCE_S_MAX: Final = 45.0  # three of the stream's heartbeats
RETRY_S: Final = 15.0  # in all, of one call: answers that say "later" are asked again for as long
RETRY_AFTER_S: Final = 1.0  # where an answer does not say how much later
EVENTS_MAX: Final = 500  # a request; more are sent in several
EVENTS_BYTES_MAX: Final = 2_000_000  # a request's body, but for a single larger event
ERASURE_POLL_S: Final = 0.2
ERASURE_WAIT_S: Final = 600.0
KEPT_ANSWERS_MAX: Final = 256  # with their ETag
KEPT_ANSWER_BYTES_MAX: Final = 65_536
LATER: Final = (429, 503)

T = TypeVar("T")
Query = Mapping[str, Any]


class ListOptions(TypedDict, total=False):
    """How a list is wanted. Each may be left out."""

    limit: int  # items, 1 to 200; 10
    explain: bool  # each item with the events that speak for and against it
    exclude_seen: bool  # leave out what the user has consumed; True
    texts: bool  # each item with its text
    parts: bool  # with explain: what the bias and each value are made of
    words: bool  # with explain: what the user wrote; needs a key of the scope admin
    at_least: str | Sequence[str]  # positions of this user's events, as `send` returns them: waited for, 5 s at most


class RankOptions(TypedDict, total=False):
    """How given items are ordered. Each may be left out; as in ListOptions."""

    explain: bool
    texts: bool
    parts: bool
    words: bool
    at_least: str | Sequence[str]


class Ask(NamedTuple):
    """A step: a request to be sent."""

    method: str
    path: str
    query: Query | None = None
    body: bytes | None = None
    etag: str = ""  # of the answer that the client holds


Steps = Generator[Ask | float, httpx.Response | None, T]  # float: seconds to be waited


# -- events on the wire

TOPICS: Final[dict[type, codec.Topic]] = {Click: "clicks", Comment: "comments", Item: "items", Erasure: "erasures"}


def encode(event: Click | Comment | Item | Erasure) -> bytes:
    """The event's JSON, checked as the stream will check it. Raises Invalid.

    >>> encode(Click("u42", "50", "like"))
    b'{"user_id":"u42","item_id":"50","action":"like"}'
    """
    topic = TOPICS.get(type(event))
    if topic is None:
        raise TypeError(f"{type(event).__name__} is no event: send Click, Comment, Item or Erasure")
    try:
        value = json.dumps(msgspec.to_builtins(event), ensure_ascii=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError):
        raise _bad_event(codec.Reason.WRONG_TYPE, "the event holds something that JSON cannot") from None
    found = codec.validate(topic, value, TS_S_MAX)
    if isinstance(found, codec.Reject):
        raise _bad_event(found.reason, found.message)
    return value


def _bad_event(reason: str, detail: str) -> Invalid:
    return Invalid(ProblemDetails("invalid-event", "Invalid event", 422, detail, reason=str(reason)))


def _typed(event: Click | Comment) -> bytes:
    """As POST /v1/events takes it."""
    if not isinstance(event, Click | Comment):
        raise TypeError(f"HTTP takes Click and Comment; a Producer sends {type(event).__name__} to Kafka")
    word = b"click" if isinstance(event, Click) else b"comment"
    return b'{"type":"' + word + b'",' + encode(event)[1:]


def _batches(raws: list[bytes]) -> Iterator[list[int]]:
    """Numbers of the events that go into each request."""
    batch: list[int] = []
    size = 0
    for number, raw in enumerate(raws):
        if batch and (len(batch) == EVENTS_MAX or size + len(raw) > EVENTS_BYTES_MAX):
            yield batch
            batch, size = [], 0
        batch.append(number)
        size += len(raw) + 1
    if batch:
        yield batch


def newest(positions: str | Sequence[str]) -> list[str]:
    """The last position of each topic and partition: who waits for it has waited for those before it.

    >>> newest(["clicks:3:9", "comments:3:7", "clicks:3:10"])
    ['clicks:3:10', 'comments:3:7']
    """
    last: dict[str, str] = {}
    for position in [positions] if isinstance(positions, str) else positions:
        place, _, offset = position.rpartition(":")
        before = last.get(place, "").rpartition(":")[2]
        if not (before.isdigit() and offset.isdigit() and int(before) >= int(offset)):
            last[place] = position
    return list(last.values())


# -- answers


def failure_of(response: httpx.Response) -> HeadwaterError:
    """What an answer that is no success says."""
    kind = BY_STATUS.get(response.status_code, WorkerFailed)
    retry_after_s = _retry_after_s(response) if response.status_code in LATER else None
    try:
        return kind(msgspec.json.decode(response.content, type=ProblemDetails), retry_after_s)
    except (msgspec.DecodeError, ValueError):
        return _not_headwater(response)


def _not_headwater(response: httpx.Response) -> NotHeadwater:
    url = response.request.url.copy_with(query=None)
    detail = f"{response.request.method} {url} does not answer as Headwater does"
    return NotHeadwater(ProblemDetails("not-headwater", "Not Headwater's answer", response.status_code, detail))


def _retry_after_s(response: httpx.Response) -> float:
    given = response.headers.get("retry-after", "")
    return float(given) if given.isdigit() else RETRY_AFTER_S


def _decoded(response: httpx.Response, shape: type[T]) -> T:
    try:
        return msgspec.json.decode(response.content, type=shape)
    except (msgspec.DecodeError, ValueError):
        raise _not_headwater(response) from None


def _query(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a query: booleans in lower case, positions thinned out."""
    told = {name: str(v).lower() if isinstance(v, bool) else v for name, v in options.items()}
    if "at_least" in told:
        told["at_least"] = newest(told["at_least"])
    return told


def _segment(an_id: str) -> str:
    """An id as one path segment; dots too, where they alone would be a relative path. Raises Invalid.

    >>> _segment("a/b c"), _segment("..")
    ('a%2Fb%20c', '%2E%2E')
    """
    try:
        quoted = quote(an_id, safe="")
    except UnicodeEncodeError:
        raise Invalid(ProblemDetails("invalid-parameter", "Invalid parameter", 422, "the id is not text")) from None
    return quoted if quoted.strip(".") else quoted.replace(".", "%2E")


def _user(user_id: str, what: str = "") -> str:
    return f"/v1/users/{_segment(user_id)}{what}"


def _item(item_id: str, what: str = "") -> str:
    return f"/v1/items/{_segment(item_id)}{what}"


# -- the operations, once


class Operations:
    """Every operation as steps. `retry_s`: how long, in all, a call asks again where the answer is "later"."""

    def __init__(self, retry_s: float) -> None:
        self.retry_s = retry_s
        self._kept: dict[str, tuple[str, httpx.Response]] = {}  # request -> ETag, response; the oldest first
        self._lock = threading.Lock()

    def ask(self, ask: Ask, shape: type[T]) -> Steps[T]:
        """One request's answer. Raises HeadwaterError."""
        deadline = time.monotonic() + self.retry_s
        name = "" if ask.method != "GET" else str(httpx.URL(ask.path, params=ask.query))
        etag, kept = self._kept.get(name, ("", None))
        if kept is not None:
            ask = ask._replace(etag=etag)
        while True:
            response = yield ask
            assert response is not None
            if response.status_code == 304 and kept is not None:
                return _decoded(kept, shape)
            if response.is_success:
                if name and "etag" in response.headers:
                    self._keep(name, response)
                return _decoded(response, shape)
            yield self._patience(failure_of(response), deadline)

    def _patience(self, failure: HeadwaterError, deadline: float) -> float:
        """Seconds until the next try. Raises the failure where there is none."""
        wait_s = failure.retry_after_s
        if wait_s is None or time.monotonic() + wait_s > deadline:
            raise failure
        return wait_s

    def _keep(self, name: str, response: httpx.Response) -> None:
        with self._lock:
            self._kept.pop(name, None)
            if len(response.content) <= KEPT_ANSWER_BYTES_MAX:
                self._kept[name] = response.headers["etag"], response
            if len(self._kept) > KEPT_ANSWERS_MAX:
                del self._kept[next(iter(self._kept))]

    def send(self, events: Sequence[Click | Comment]) -> Steps[list[str]]:
        """What the log has not accepted is sent again, as long as the answers say "later"."""
        raws = [_typed(event) for event in events]
        positions: list[str | None] = [None] * len(raws)
        try:
            for batch in _batches(raws):
                yield from self._send(batch, raws, positions)
        except HeadwaterError as failure:
            failure.positions = positions
            raise
        return [position for position in positions if position is not None]

    def _send(self, batch: list[int], raws: list[bytes], positions: list[str | None]) -> Steps[None]:
        deadline = time.monotonic() + self.retry_s
        while batch:
            body = b"[" + b",".join(raws[number] for number in batch) + b"]"
            response = yield Ask("POST", "/v1/events", body=body)
            assert response is not None
            if response.is_success:
                told: Sequence[str | None] = _decoded(response, Accepted).positions
            else:
                failure = failure_of(response)
                told = failure.problem.positions or [None] * len(batch)
            if len(told) != len(batch):
                raise _not_headwater(response)
            for number, position in zip(batch, told, strict=True):
                positions[number] = position
            batch = [number for number in batch if positions[number] is None]
            if not response.is_success:
                yield self._patience(failure, deadline)

    def get(self, path: str, shape: type[T], query: Query | None = None) -> Steps[T]:
        """A GET's answer."""
        return self.ask(Ask("GET", path, _query(query or {})), shape)

    def recommendations(self, user_id: str, options: ListOptions) -> Steps[Recommendations]:
        """The list that the user would be shown now."""
        return self.get(_user(user_id, "/recommendations"), Recommendations, cast(Query, options))

    def what_if(
        self, user_id: str, without: Sequence[str], events: Sequence[Click | Comment], options: ListOptions
    ) -> Steps[WhatIf]:  # fmt: skip
        """The list as it would be."""
        asked = {"without": list(without), "with": [msgspec.Raw(_typed(event)) for event in events]}
        query = _query(cast(Query, options))
        return self.ask(Ask("POST", _user(user_id, "/what-if"), query, msgspec.json.encode(asked)), WhatIf)

    def rank(self, user_id: str, item_ids: Sequence[str], options: RankOptions) -> Steps[Recommendations]:
        """The given items in order."""
        shown = {name: value for name, value in options.items() if name != "at_least"}
        body = msgspec.json.encode({"user_id": user_id, "item_ids": list(item_ids), **shown})
        query = _query({"at_least": options.get("at_least", ())})
        return self.ask(Ask("POST", "/v1/rank", query, body), Recommendations)

    def state(self, user_id: str, at_least: str | Sequence[str]) -> Steps[UserState]:
        """What is known of the user."""
        return self.get(_user(user_id, "/state"), UserState, {"at_least": at_least})

    def item(self, item_id: str) -> Steps[ItemView]:
        """An item."""
        return self.get(_item(item_id), ItemView)

    def similar(self, item_id: str, limit: int) -> Steps[Similar]:
        """The items most like it."""
        return self.get(_item(item_id, "/similar"), Similar, {"limit": limit})

    def worker(self, path: str) -> Steps[dict[str, Any]]:
        """What a worker tells of itself."""
        return self.get(path, dict[str, Any])

    def forget(self, user_id: str, unlearn: bool) -> Steps[Certificate]:
        """An erasure is asked for."""
        return self.ask(Ask("DELETE", _user(user_id), _query({"unlearn": unlearn})), Certificate)

    def erasure(self, erasure_id: str) -> Steps[Certificate]:
        """How far it is."""
        return self.get(f"/v1/erasures/{quote(erasure_id, safe=':')}", Certificate)

    def readyz(self) -> Steps[list[str]]:
        """Not asked again: 503 is an answer here."""
        response = yield Ask("GET", "/readyz")
        assert response is not None
        if response.is_success:
            return []
        failure = failure_of(response)
        if not isinstance(failure, NotReady):
            raise failure
        return failure.problem.reasons or [failure.detail]

    def erased(
        self, erasure_id: str, timeout_s: float, on_change: Callable[[Certificate], None] | None
    ) -> Steps[Certificate]:  # fmt: skip
        """Asks until it is complete."""
        deadline = time.monotonic() + timeout_s
        before = None
        while True:
            told = yield from self.erasure(erasure_id)
            if on_change is not None and told != before:
                on_change(told)
            before = told
            if told.is_complete:
                return told
            if time.monotonic() > deadline:
                detail = f"{erasure_id} is {told.status} after {timeout_s:g} s; it goes on without being watched"
                raise TimedOut(ProblemDetails("not-erased", "Timed out", 0, detail))
            yield ERASURE_POLL_S


class Messages:
    """Lines of a server-sent stream to messages."""

    def __init__(self) -> None:
        self._data: list[str] = []

    def line(self, line: str) -> dict[str, Any] | None:
        """The message that ends with this line, if one does."""
        if line.startswith("data:"):
            self._data.append(line[5:].removeprefix(" "))
        if line or not self._data:
            return None
        data, self._data = "\n".join(self._data), []
        message: dict[str, Any] = json.loads(data)
        return message


def _connection(url: str, key: str | None, timeout_s: float) -> dict[str, Any]:
    """What both of httpx's clients are made with."""
    if key is None:
        from streams.settings import api_key

        key = api_key()
    return {
        "base_url": url.rstrip("/"),
        "headers": {"Authorization": f"Bearer {key.strip()}"} if key.strip() else {},
        "timeout": httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S)),
        "trust_env": False,
    }


def _unanswered(url: httpx.URL, failure: httpx.HTTPError) -> HeadwaterError:
    return unanswered("worker", str(url).rstrip("/"), failure, isinstance(failure, httpx.TimeoutException))


def _stream_timeout() -> httpx.Timeout:
    return httpx.Timeout(STREAM_SILENCE_S_MAX, connect=CONNECT_TIMEOUT_S)


def _request(ask: Ask) -> dict[str, Any]:
    headers = {"If-None-Match": ask.etag} if ask.etag else {}
    if ask.body is not None:
        headers["Content-Type"] = "application/json"
    return {"method": ask.method, "url": ask.path, "params": ask.query, "content": ask.body, "headers": headers}


# -- the clients


class Client:
    """A client of a Headwater deployment, by the address of any of its workers. Threads may share one.

    key: None takes HEADWATER_API_KEY. timeout_s: of one request. retry_s: how long, in all, a call asks again where the
    answer is 429 or 503, by its Retry-After. http: a client of one's own (its transport, proxies, certificates) instead
    of a new one; url and key do not count then, and it is not closed.

    Every method raises HeadwaterError: NoAnswer, TimedOut, NotHeadwater, Invalid, NotAllowed, NotFound,
    TooManyRequests, NotReady, WorkerFailed. Nothing is logged here.
    """

    def __init__(
        self, url: str = "http://127.0.0.1:8080", key: str | None = None, *, timeout_s: float = TIMEOUT_S,
        retry_s: float = RETRY_S, http: httpx.Client | None = None,
    ) -> None:  # fmt: skip
        self._is_own = http is None
        self._http = http or httpx.Client(**_connection(url, key, timeout_s))
        self._operations = Operations(retry_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes its connections."""
        if self._is_own:
            self._http.close()

    def _run(self, steps: Steps[T]) -> T:
        given: httpx.Response | None = None
        try:
            while True:
                step = steps.send(given)
                given = None
                if isinstance(step, float):
                    time.sleep(step)
                    continue
                try:
                    given = self._http.request(**_request(step))
                except httpx.HTTPError as failure:
                    steps.throw(_unanswered(self._http.base_url, failure))
        except StopIteration as done:
            answer: T = done.value
            return answer

    def send(self, *events: Click | Comment) -> list[str]:
        """Sends events and returns where each is in the log: for `at_least`. All are checked before the first is sent.

        More than 500 go in several requests. Where it raises, the error's `positions` tell what was accepted; after
        NoAnswer more may have been.
        """
        return self._run(self._operations.send(events))

    def recommendations(self, user_id: str, **options: Unpack[ListOptions]) -> Recommendations:
        """The list that the user would be shown now, best first."""
        return self._run(self._operations.recommendations(user_id, options))

    def what_if(
        self, user_id: str, without: Sequence[str] = (), events: Sequence[Click | Comment] = (),
        **options: Unpack[ListOptions],
    ) -> WhatIf:  # fmt: skip
        """The list without the events at these positions, and with those events after them. Nothing is stored."""
        return self._run(self._operations.what_if(user_id, without, events, options))

    def rank(
        self, user_id: str, item_ids: Sequence[str], **options: Unpack[RankOptions]
    ) -> Recommendations:  # fmt: skip
        """The given items, 1,000 at most, best first; those that are no candidates are left out."""
        return self._run(self._operations.rank(user_id, item_ids, options))

    def state(self, user_id: str, *, at_least: str | Sequence[str] = ()) -> UserState:
        """What is known of the user; of one of whom nothing is known, `events` is 0."""
        return self._run(self._operations.state(user_id, at_least))

    def item(self, item_id: str) -> ItemView:
        """An item: its text, its bias, its counts."""
        return self._run(self._operations.item(item_id))

    def similar(self, item_id: str, *, limit: int = 10) -> Similar:
        """The items most like an item."""
        return self._run(self._operations.similar(item_id, limit))

    def model(self) -> dict[str, Any]:
        """Versions, settings and live metrics of encoder and learner."""
        return self._run(self._operations.worker("/v1/model"))

    def digest(self) -> dict[str, Any]:
        """Applied offsets and state digests of the partitions of the worker that is asked."""
        return self._run(self._operations.worker("/v1/digest"))

    def forget(self, user_id: str, *, unlearn: bool = False) -> Certificate:
        """Asks that the user be erased; `erased` waits for it. unlearn: the item model learns again without them."""
        return self._run(self._operations.forget(user_id, unlearn))

    def erasure(self, erasure_id: str) -> Certificate:
        """How far an erasure is."""
        return self._run(self._operations.erasure(erasure_id))

    def erased(
        self, erasure_id: str, *, timeout_s: float = ERASURE_WAIT_S,
        on_change: Callable[[Certificate], None] | None = None,
    ) -> Certificate:  # fmt: skip
        """The certificate, once the erasure is complete. on_change: told of each step. Raises TimedOut."""
        return self._run(self._operations.erased(erasure_id, timeout_s, on_change))

    def healthz(self) -> None:
        """Returns where the worker answers."""
        self._run(self._operations.worker("/healthz"))

    def readyz(self) -> list[str]:
        """What the worker still waits for; empty: ready."""
        return self._run(self._operations.readyz())

    def stream(self) -> Iterator[dict[str, Any]]:
        """What happens, as it does: messages with `type` "event" or "status", until the worker stops."""
        messages = Messages()
        try:
            with self._http.stream("GET", "/v1/stream", timeout=_stream_timeout()) as response:
                if not response.is_success:
                    response.read()
                    raise failure_of(response)
                for line in response.iter_lines():
                    message = messages.line(line)
                    if message is not None:
                        yield message
        except httpx.HTTPError as failure:
            raise _unanswered(self._http.base_url, failure) from failure


class AsyncClient:
    """As `Client`, for asyncio: the same methods, to be awaited; `stream` is an asynchronous iterator."""

    def __init__(
        self, url: str = "http://127.0.0.1:8080", key: str | None = None, *, timeout_s: float = TIMEOUT_S,
        retry_s: float = RETRY_S, http: httpx.AsyncClient | None = None,
    ) -> None:  # fmt: skip
        self._is_own = http is None
        self._http = http or httpx.AsyncClient(**_connection(url, key, timeout_s))
        self._operations = Operations(retry_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes its connections."""
        if self._is_own:
            await self._http.aclose()

    async def _run(self, steps: Steps[T]) -> T:
        given: httpx.Response | None = None
        try:
            while True:
                step = steps.send(given)
                given = None
                if isinstance(step, float):
                    await asyncio.sleep(step)
                    continue
                try:
                    given = await self._http.request(**_request(step))
                except httpx.HTTPError as failure:
                    steps.throw(_unanswered(self._http.base_url, failure))
        except StopIteration as done:
            answer: T = done.value
            return answer

    async def send(self, *events: Click | Comment) -> list[str]:
        """As `Client.send`."""
        return await self._run(self._operations.send(events))

    async def recommendations(self, user_id: str, **options: Unpack[ListOptions]) -> Recommendations:
        """As `Client.recommendations`."""
        return await self._run(self._operations.recommendations(user_id, options))

    async def what_if(
        self, user_id: str, without: Sequence[str] = (), events: Sequence[Click | Comment] = (),
        **options: Unpack[ListOptions],
    ) -> WhatIf:  # fmt: skip
        """As `Client.what_if`."""
        return await self._run(self._operations.what_if(user_id, without, events, options))

    async def rank(
        self, user_id: str, item_ids: Sequence[str], **options: Unpack[RankOptions]
    ) -> Recommendations:  # fmt: skip
        """As `Client.rank`."""
        return await self._run(self._operations.rank(user_id, item_ids, options))

    async def state(self, user_id: str, *, at_least: str | Sequence[str] = ()) -> UserState:
        """As `Client.state`."""
        return await self._run(self._operations.state(user_id, at_least))

    async def item(self, item_id: str) -> ItemView:
        """As `Client.item`."""
        return await self._run(self._operations.item(item_id))

    async def similar(self, item_id: str, *, limit: int = 10) -> Similar:
        """As `Client.similar`."""
        return await self._run(self._operations.similar(item_id, limit))

    async def model(self) -> dict[str, Any]:
        """As `Client.model`."""
        return await self._run(self._operations.worker("/v1/model"))

    async def digest(self) -> dict[str, Any]:
        """As `Client.digest`."""
        return await self._run(self._operations.worker("/v1/digest"))

    async def forget(self, user_id: str, *, unlearn: bool = False) -> Certificate:
        """As `Client.forget`."""
        return await self._run(self._operations.forget(user_id, unlearn))

    async def erasure(self, erasure_id: str) -> Certificate:
        """As `Client.erasure`."""
        return await self._run(self._operations.erasure(erasure_id))

    async def erased(
        self, erasure_id: str, *, timeout_s: float = ERASURE_WAIT_S,
        on_change: Callable[[Certificate], None] | None = None,
    ) -> Certificate:  # fmt: skip
        """As `Client.erased`."""
        return await self._run(self._operations.erased(erasure_id, timeout_s, on_change))

    async def healthz(self) -> None:
        """As `Client.healthz`."""
        await self._run(self._operations.worker("/healthz"))

    async def readyz(self) -> list[str]:
        """As `Client.readyz`."""
        return await self._run(self._operations.readyz())

    async def stream(self) -> AsyncIterator[dict[str, Any]]:
        """As `Client.stream`."""
        messages = Messages()
        try:
            async with self._http.stream("GET", "/v1/stream", timeout=_stream_timeout()) as response:
                if not response.is_success:
                    await response.aread()
                    raise failure_of(response)
                async for line in response.aiter_lines():
                    message = messages.line(line)
                    if message is not None:
                        yield message
        except httpx.HTTPError as failure:
            raise _unanswered(self._http.base_url, failure) from failure
