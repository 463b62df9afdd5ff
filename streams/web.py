"""The worker's HTTP: FastAPI over `streams.serving`, under uvicorn as a service of the worker's own loop.

Any worker answers for any user: what belongs to another worker's partition is forwarded once. One id is one path
segment, percent-encoded: paths are matched before decoding, so that ids may hold slashes. Answers are encoded by
msgspec from the shapes of `streams.serving`, which also are the schemas of the OpenAPI document. Every failure is a
problem of `streams.problems`.
"""

import asyncio
import contextlib
import hashlib
import inspect
import re
import socket
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl, quote_from_bytes, unquote_to_bytes

import httpx
import mode
import msgspec
import structlog
import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from streams import answers, codec, serving
from streams.audit import EVERYBODY, Audit, Note
from streams.erasure import place_of
from streams.events import ID_CHARS_MAX, MESSAGE_BYTES_MAX, Click, Comment, Erasure
from streams.keys import ANYBODY, Gate, credential_of, require
from streams.openapi import OPERATIONS, describe, documentation_page, wanted
from streams.problems import KINDS, MEDIA_TYPE, Problem
from streams.serving import AT_LEAST_WAIT_S, NotReady, WorkerView
from streams.settings import LOOPBACK_HOSTS, Settings
from streams.wire import CONNECTIONS_MAX, Wire

log = structlog.get_logger(__name__)

EVENTS_MAX: Final = 500  # a request: all of it is validated before the first is sent
EVENTS_BYTES_MAX: Final = 4_000_000  # a request's body
RANK_BYTES_MAX: Final = 1_000_000  # RANK_ITEMS_MAX ids of full length, as JSON
WHAT_IF_BYTES_MAX: Final = 200_000  # a what-if's body: its comments keep the stream's encoder for a second at most
BODY_S_MAX: Final = 30.0  # from a request's head to the end of its body
DRAIN_BYTES_MAX: Final = 16_000_000  # of a body that is too large: a client that still sends may not see the answer
ENCODE_WAIT_S: Final = 5.0  # a what-if's comments wait this long for the encoder
AT_LEAST_CHECK_S: Final = 0.5  # after so long it asks the log whether there is such a record
LEARNER_TIMEOUT_S: Final = 2.0  # then what it would have told is left out
FORWARD_TIMEOUT_S: Final = AT_LEAST_WAIT_S + 10.0
FORWARD_CONNECT_TIMEOUT_S: Final = 2.0
FORWARD_CONNECTIONS_MAX: Final = 64
FORWARD_KEEPALIVE_S: Final = 5.0  # a silent connection to another worker; httpx's default, so the client's too
KEEP_ALIVE_S: Final = 20  # a silent connection of a client
STREAMS_MAX: Final = 64  # open /v1/stream connections
STREAM_HEARTBEAT_S: Final = 15.0  # a comment line in silence, so that proxies keep the connection
STREAM_RETRY_MS: Final = 2000
RETRY_AFTER_S: Final = 1.0
TAG_PERIOD_S: Final = 60.0  # a list's features of age and recency move slowly: its validator holds this long at most
GRACEFUL_SHUTDOWN_S: Final = 1
ENDLESS_PATH: Final = "/v1/stream"
FORWARDED_HEADER: Final = "x-headwater-forwarded"  # a forwarded request is never forwarded again
WORDS_SCOPE: Final = "admin"  # what users wrote is not for every reader of their lists
KEY_HEADERS: Final = ("authorization", "x-api-key")
FORWARDED_BACK: Final = ("retry-after", "etag", "cache-control")
REPEATED: Final = ("at_least",)  # parameters that may be given more than once
PARAMETER_AT: Final = re.compile(r"`\$\.(\w+)")  # in msgspec's words
REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
PAGE_DIR: Final = Path(__file__).parent / "page"
PAGE_MODULES: Final = ("app", "api", "chart", "elements", "encoder", "whatif", "uplot")
PAGE_FILES: Final = {
    "/": ("index.html", "text/html; charset=utf-8"),
    **{f"/page/{name}.js": (f"{name}.js", "text/javascript; charset=utf-8") for name in PAGE_MODULES},
    "/page/style.css": ("style.css", "text/css; charset=utf-8"),
    "/page/uplot.css": ("uplot.css", "text/css; charset=utf-8"),
    "/page/uplot.LICENSE.txt": ("uplot.LICENSE.txt", "text/plain; charset=utf-8"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}
SECURITY_HEADERS: Final = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        b"require-trusted-types-for 'script'; trusted-types 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
)

assert MESSAGE_BYTES_MAX < EVENTS_BYTES_MAX, "one event of the greatest size fits a request"
assert FORWARD_KEEPALIVE_S < KEEP_ALIVE_S, "who asks lets go first: a request never meets a connection just closed"
assert AT_LEAST_WAIT_S + ENCODE_WAIT_S < FORWARD_TIMEOUT_S, "the owner's waits end before the forwarder's"

Answer = Callable[[], Response | Awaitable[Response]]
S = TypeVar("S")


# -- the edge: what every request and response passes


class Edge:
    """Request ids, raw paths, security headers, audit; refuses other hosts' names and other sites' pages.

    Without keys the loopback address is the only guard, and a browser reaches it from any site: a name that does not
    belong to this machine (DNS rebinding) and a request that another site's page makes are refused.
    """

    def __init__(self, app: FastAPI, hosts: Iterable[str] | None, audit: Audit | None = None) -> None:
        self.app = app
        self.audit = audit
        self.hosts = None if hosts is None else frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        raw = scope.get("raw_path") or quote_from_bytes(scope["path"].encode()).encode()
        scope["path"] = raw.partition(b"?")[0].decode("latin-1")
        scope["state"] = {**scope.get("state", {}), "request_id": request_id}
        if scope["method"] == "HEAD" and scope["path"] != ENDLESS_PATH:
            scope = {**scope, "method": "GET"}  # the server keeps its own, and sends no body

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                if self.audit is not None and "note" in scope["state"]:
                    self.audit.note(scope["state"]["note"], message["status"], request_id)
                sent = message["headers"] = [*message["headers"], *SECURITY_HEADERS]
                sent.append((b"x-request-id", request_id.encode()))
                if all(name != b"cache-control" for name, _ in sent):
                    sent.append((b"cache-control", b"no-store"))
            await send(message)

        problem = self._refusal(headers)
        if problem is not None:
            response = problem_response(Request(scope), problem)
            await response(scope, receive, send_with_headers)
            return
        await self.app(scope, receive, send_with_headers)

    def _refusal(self, headers: Headers) -> Problem | None:
        host = headers.get("host", "").lower()
        name = host.rpartition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
        if self.hosts is not None and name not in self.hosts:
            return Problem("misdirected", f"This worker is not known as {name!r}; it is bound to a loopback address.")
        if headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate":
            return Problem("cross-site", "Another site's page may not use this API from a browser.")
        return None


def problem_response(request: Request, problem: Problem) -> Response:
    """The response that a problem is."""
    request_id = getattr(request.state, "request_id", "")
    body = msgspec.json.encode(problem.details(request.scope["path"], request_id))
    return Response(body, KINDS[problem.kind].status, problem.headers, MEDIA_TYPE)


def _json(shape: Any, etag: str = "") -> Response:
    headers = {"ETag": etag, "Cache-Control": "private, no-cache"} if etag else None
    return Response(msgspec.json.encode(shape), headers=headers, media_type="application/json")


def _tag(view: WorkerView, *parts: Any) -> str:
    """A weak validator of an answer that depends on these parts, on the model, and slowly on the time."""
    told = (view.model_version, view.now() // TAG_PERIOD_S, *parts)
    return f'W/"{hashlib.blake2b(msgspec.msgpack.encode(told), digest_size=12).hexdigest()}"'


def _unchanged(request: Request, etag: str) -> Response | None:
    """304, where the client has what the validator stands for."""
    given = request.headers.get("if-none-match", "")
    held = {tag.strip().removeprefix("W/") for tag in given.split(",")}
    if etag and etag.removeprefix("W/") in held:
        return Response(status_code=304, headers={"ETag": etag, "Cache-Control": "private, no-cache"})
    return None


def _handlers(app: FastAPI) -> None:
    async def problem(request: Request, failure: Exception) -> Response:
        assert isinstance(failure, Problem)
        return problem_response(request, failure)

    async def not_ready(request: Request, failure: Exception) -> Response:
        assert isinstance(failure, NotReady)
        return problem_response(request, Problem("not-ready", str(failure), retry_after_s=failure.retry_after_s))

    async def http(request: Request, failure: Exception) -> Response:
        assert isinstance(failure, HTTPException)
        kinds = {kind.status: name for name, kind in reversed(KINDS.items())}
        name = kinds.get(failure.status_code, "not-understood")
        detail = f"{request.method} {request.scope['path']}: {KINDS[name].title.lower()}."
        return problem_response(request, Problem(name, detail, headers=dict(failure.headers or {})))

    async def internal(request: Request, failure: Exception) -> Response:
        request_id = getattr(request.state, "request_id", "")
        if not isinstance(failure, ClientDisconnect):
            log.error("request failed", request_id=request_id, method=request.method, exc_info=failure)
        return problem_response(request, Problem("internal", "The worker failed at this request; its log says why."))

    app.add_exception_handler(Problem, problem)
    app.add_exception_handler(NotReady, not_ready)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, internal)


# -- keys


def _authoriser(gate: Gate, audit: Audit | None) -> Callable[[Request], Awaitable[None]]:
    """What runs before every operation: whose key, is it enough, and what the audit log will say of it."""

    async def authorise(request: Request) -> None:
        request.state.caller = ANYBODY
        if gate.is_open or request.scope["path"] in PAGE_FILES:
            return
        operation = request.scope["route"].operation_id
        scope = OPERATIONS[operation].scope_for(request.method)
        if scope is None:
            return
        address = request.client.host if request.client is not None else ""
        note = request.state.note = Note(operation, address, FORWARDED_HEADER in request.headers)
        note.is_change = scope != "read"
        if operation == "getStream":
            note.users = [EVERYBODY]
        elif "user_id" in request.path_params:
            note.users = [unquote_to_bytes(request.path_params["user_id"]).decode(errors="replace")]
        request.state.caller = caller = await gate.identify(
            credential_of(*map(request.headers.get, KEY_HEADERS)), address
        )
        note.key_id, note.key = caller.key_id, caller.name
        gate.permit(caller, scope)
        if audit is not None:
            audit.check()

    return authorise


def _about(request: Request, users: Iterable[str]) -> None:
    """Whom a request is about, where its path does not tell."""
    if hasattr(request.state, "note"):
        request.state.note.users = list(dict.fromkeys(users))


# -- reading a request


def _id(request: Request, parameter: str) -> str:
    """The id of a path segment. Raises Problem."""
    try:
        value = unquote_to_bytes(request.path_params[parameter]).decode()
    except UnicodeDecodeError:
        raise _invalid(parameter, "is not UTF-8, percent-encoded") from None
    if not 1 <= len(value) <= ID_CHARS_MAX:
        raise _invalid(parameter, f"has to have 1 to {ID_CHARS_MAX} characters")
    return value


def _invalid(parameter: str, detail: str) -> Problem:
    return Problem("invalid-parameter", f"{parameter}: {detail}", errors=[{"parameter": parameter, "detail": detail}])


def _query(request: Request, shape: type[S]) -> S:
    """The parameters of the query. Raises Problem, which names all that are wrong."""
    given: dict[str, Any] = {}
    for name, value in parse_qsl(request.scope["query_string"].decode("latin-1"), keep_blank_values=True):
        if name in REPEATED:
            given.setdefault(name, []).append(value)
        else:
            given[name] = value
    errors: list[dict[str, str]] = []
    while True:
        try:
            found = msgspec.convert(given, shape, strict=False)
            break
        except msgspec.ValidationError as fault:
            (name,) = PARAMETER_AT.findall(str(fault))
            errors.append({"parameter": name, "detail": wanted(shape, name)})
            del given[name]
    if errors:
        detail = "; ".join(f"{e['parameter']}: {e['detail']}" for e in errors)
        raise Problem("invalid-parameter", detail, errors=errors)
    return found


async def _body(request: Request, bytes_max: int) -> bytes:
    """The body, JSON by its header. Raises Problem."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise Problem("unsupported-media-type", f"Content-Type is {media!r}; it has to be application/json.")
    body = bytearray()
    size = 0
    try:
        async with asyncio.timeout(BODY_S_MAX):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= bytes_max:
                    body += chunk
                elif size > DRAIN_BYTES_MAX:
                    break
    except TimeoutError:
        detail = f"The body was not whole after {BODY_S_MAX:g} s."
        raise Problem("too-slow", detail, headers={"Connection": "close"}) from None
    if size > bytes_max:
        raise Problem("too-large", f"The body is over {bytes_max} bytes.", headers={"Connection": "close"})
    return bytes(body)


def _positions(given: list[str], user_partition: int) -> list[tuple[str, int]]:
    """(topic, offset) of each position that a read is to wait for. Raises Problem."""
    out = []
    for text in given:
        topic, partition, offset = text.split(":")
        if int(partition) != user_partition:
            raise _invalid("at_least", f"{text!r}: this user's events are in partition {user_partition}")
        out.append((topic, int(offset)))
    return out


def _events(body: bytes, now_s: float) -> list[tuple[Click | Comment, bytes]]:
    """Each event of a request's body, all valid, and its bytes. Raises Problem."""
    is_list = body.lstrip(b" \t\r\n")[:1] == b"["
    try:
        raws = msgspec.json.decode(body, type=list[msgspec.Raw]) if is_list else [msgspec.Raw(body)]
    except (msgspec.DecodeError, ValueError) as fault:
        raise Problem("not-understood", f"The body is not a list of events: {fault}.") from None
    if not 1 <= len(raws) <= EVENTS_MAX:
        kind = "too-large" if raws else "not-understood"
        raise Problem(kind, f"{len(raws)} events; a request takes 1 to {EVENTS_MAX}.")
    return [(_event(raw, index if is_list else None, now_s), bytes(raw)) for index, raw in enumerate(raws)]


def _event(raw: msgspec.Raw, index: int | None, now_s: float) -> Click | Comment:
    """One event, validated as the stream does. index: in a list. Raises Problem."""
    event = codec.validate_event(bytes(raw), now_s)
    if isinstance(event, codec.Reject):
        where = "" if index is None else f"event {index}: "
        raise Problem("invalid-event", f"{where}{event.message}", index=index or 0, reason=str(event.reason))
    return event


def _supposed_events(raws: list[msgspec.Raw], user_id: str, now_s: float) -> list[Click | Comment]:
    """The events of a what-if's `with`, all of the user asked for. Raises Problem."""
    events = [_event(raw, index, now_s) for index, raw in enumerate(raws)]
    for index, event in enumerate(events):
        if event.user_id != user_id:
            detail = f"event {index}: its user_id has to be that of the path"
            raise Problem("invalid-event", detail, index=index, reason="key_mismatch")
    return events


def _request(body: bytes, shape: type[S], name: str) -> S:
    """A body of this shape. Raises Problem."""
    try:
        return msgspec.json.decode(body, type=shape)
    except (msgspec.DecodeError, ValueError) as fault:
        raise Problem("not-understood", f"The body is not a {name} request: {fault}.") from None


# -- work behind the routes


def _headers_on(request: Request) -> dict[str, str]:
    """What another worker is asked with for this request: its id and its key, and that it goes no further."""
    headers = {FORWARDED_HEADER: "1", "x-request-id": request.state.request_id, "accept": "application/json"}
    return headers | {name: request.headers[name] for name in KEY_HEADERS if name in request.headers}


class Http:
    """What the routes share: the worker, the client that forwards, the open streams."""

    def __init__(self, view: WorkerView, client: httpx.AsyncClient) -> None:
        self.view = view
        self.client = client
        self.streams = 0
        self.closing = asyncio.Event()

    async def for_user(
        self, request: Request, user_id: str, answer: Answer, at_least: list[str], body: bytes = b""
    ) -> Response:
        """The answer from the user's own worker: here, when its offsets are applied, or forwarded."""
        _about(request, [user_id])
        partition = self.view.partition_of(user_id)
        wanted = _positions(at_least, partition)
        owner = self.view.owner_url(partition)
        if owner is not None:
            return await self.forward(request, owner, body)
        deadline = asyncio.get_running_loop().time() + AT_LEAST_WAIT_S
        for topic, offset in wanted:
            await self._until_applied(topic, partition, offset, deadline)
        given = answer()
        return await given if inspect.isawaitable(given) else given

    async def _until_applied(self, topic: str, partition: int, offset: int, deadline: float) -> None:
        """Raises Problem: at the deadline, or as soon as it is clear that the log has no such record."""
        for wait_s in (AT_LEAST_CHECK_S, AT_LEAST_WAIT_S):
            left_s = deadline - asyncio.get_running_loop().time()
            if await self.view.wait_applied(topic, partition, offset, max(0.0, min(wait_s, left_s))):
                return
            if wait_s < left_s and not await self.waits(topic, partition, offset):
                if self.view.applied(partition)[topic] >= offset:
                    return
                raise _invalid("at_least", f"{topic}:{partition}:{offset} is beyond the end of the log")
        applied = self.view.applied(partition)[topic]
        detail = f"{topic}:{partition}:{offset} is not applied yet; this worker is at {applied}."
        raise Problem("not-applied", detail, retry_after_s=RETRY_AFTER_S)

    async def waits(self, topic: str, partition: int, offset: int) -> bool:
        """Whether the log has a record there that is not applied yet. Raises NotReady, Problem."""
        try:
            return await self.view.waits(topic, partition, offset)
        except NotReady:
            raise
        except Exception as failure:
            log.warning("the end of a log is not known", topic=topic, partition=partition, failure=repr(failure))
            detail = f"Whether {topic}:{partition}:{offset} is there is not known: the broker does not answer."
            raise Problem("log-unreachable", detail, retry_after_s=RETRY_AFTER_S) from failure

    async def forward(self, request: Request, owner: str, body: bytes = b"") -> Response:
        """The answer of the worker at that address. Raises Problem."""
        if FORWARDED_HEADER in request.headers:
            raise Problem("not-ready", "The user's partition is moving to another worker.", retry_after_s=RETRY_AFTER_S)
        query = request.scope["query_string"]
        target = request.scope["path"].encode("latin-1") + (b"?" + query if query else b"")
        headers = _headers_on(request)
        if body:
            headers["content-type"] = "application/json"
        if "if-none-match" in request.headers:
            headers["if-none-match"] = request.headers["if-none-match"]
        try:
            url = httpx.URL(owner).copy_with(raw_path=target)
            given = await self.client.request(request.method, url, content=body or None, headers=headers)
        except (httpx.HTTPError, httpx.InvalidURL) as failure:
            detail = f"The worker of this user's partition does not answer ({type(failure).__name__})."
            raise Problem("owner-unreachable", detail, retry_after_s=RETRY_AFTER_S) from failure
        kept = {name: given.headers[name] for name in FORWARDED_BACK if name in given.headers}
        return Response(given.content, given.status_code, kept, given.headers.get("content-type"))

    async def with_learner(self, request: Request, mine: answers.ModelView) -> answers.ModelView:
        """What is told of the model, with the learner's part from the worker that learns; without, if none answers."""
        owner = self.view.learner_url()
        if mine.learner is not None or owner is None or FORWARDED_HEADER in request.headers:
            return mine
        try:
            url = httpx.URL(owner).copy_with(path=request.url.path)
            given = await self.client.get(url, headers=_headers_on(request), timeout=LEARNER_TIMEOUT_S)
            theirs = msgspec.json.decode(given.raise_for_status().content, type=answers.ModelView)
        except (httpx.HTTPError, httpx.InvalidURL, msgspec.DecodeError):  # DecodeError: of another build
            return mine
        learnt = {name: getattr(theirs, name) for name in ("learner", "examples_applied", "prequential")}
        return msgspec.structs.replace(mine, **learnt)

    async def publish(self, events: list[tuple[str, bytes, bytes]]) -> list[str]:
        """Appends the events: one user's in their order, users side by side; their positions. Raises Problem."""
        positions: list[str | None] = [None] * len(events)

        async def user_events(numbers: list[int]) -> None:
            for number in numbers:
                topic, key, value = events[number]
                partition, offset = await self.view.publish(topic, key, value)
                positions[number] = f"{topic}:{partition}:{offset}"

        by_user: dict[bytes, list[int]] = {}
        for number, (_, key, _) in enumerate(events):
            by_user.setdefault(key, []).append(number)
        done = await asyncio.gather(*map(user_events, by_user.values()), return_exceptions=True)
        failure = next((d for d in done if isinstance(d, BaseException)), None)
        if failure is not None:
            log.warning("events not accepted", failure=repr(failure))
            detail = f"{sum(p is not None for p in positions)} of {len(events)} events were accepted."
            raise Problem("log-unreachable", detail, retry_after_s=RETRY_AFTER_S, positions=positions) from failure
        return [p for p in positions if p is not None]

    async def stream(self, is_allowed: Callable[[], bool] = lambda: True) -> AsyncIterator[bytes]:
        """The server-sent events of one client, until it leaves, may not listen any more, or the worker stops."""
        source = aiter(self.view.subscribe())
        closing = asyncio.ensure_future(self.closing.wait())
        pending: asyncio.Future[dict[str, Any]] | None = None
        self.streams += 1
        try:
            yield b"retry: %d\n\n" % STREAM_RETRY_MS
            while True:
                pending = pending or asyncio.ensure_future(anext(source))
                waiting: set[asyncio.Future[Any]] = {pending, closing}
                await asyncio.wait(waiting, timeout=STREAM_HEARTBEAT_S, return_when=asyncio.FIRST_COMPLETED)
                if closing.done() or not is_allowed():
                    return
                if not pending.done():
                    yield b": still here\n\n"
                    continue
                try:
                    message = serving.titled(self.view, pending.result())
                except StopAsyncIteration:
                    return
                pending = None
                kind = str(message.get("type", "message")).encode()
                yield b"event: " + kind + b"\ndata: " + msgspec.json.encode(message) + b"\n\n"
        finally:
            self.streams -= 1
            for task in (closing, pending):
                if task is not None:
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
                        await task
            close = getattr(source, "aclose", None)
            if close is not None:
                await close()


# -- routes


def create_app(
    view: WorkerView, client: httpx.AsyncClient, hosts: Iterable[str] | None = None, gate: Gate | None = None,
    audit: Audit | None = None,
) -> Edge:  # fmt: skip
    """The application. hosts: names by which it may be called; None: any. gate: None: no keys are needed.

    `.app.state.http.closing` ends the open streams when set.
    """
    gate = gate or Gate(None, 1.0)
    app = FastAPI(
        title="Headwater", version=version("headwater"), openapi_url=None, docs_url=None, redoc_url=None,
        redirect_slashes=False,
        description="Recommendations that have learnt from every click and comment a moment ago, with exact reasons.",
        dependencies=[Depends(_authoriser(gate, audit))],
    )  # fmt: skip
    _handlers(app)
    http = app.state.http = Http(view, client)
    _user_routes(app, http)
    _erasure_routes(app, http)
    _item_routes(app, http)
    _worker_routes(app, http, gate)
    _page_routes(app)
    describe(app)
    return Edge(app, hosts, audit)


def _user_routes(app: FastAPI, http: Http) -> None:
    view = http.view

    @app.get("/v1/users/{user_id:path}/state", operation_id="getState", response_model=None)
    async def state(request: Request) -> Response:
        user, asked = _id(request, "user_id"), _query(request, serving.ReadQuery)
        return await http.for_user(request, user, lambda: _json(serving.state(view, user)), asked.at_least)

    @app.get("/v1/users/{user_id:path}/recommendations", operation_id="getRecommendations", response_model=None)
    async def recommendations(request: Request) -> Response:
        user, asked = _id(request, "user_id"), _query(request, serving.ListQuery)

        async def answer() -> Response:
            read = view.read(user)
            # Words are of the log, as far as it gave them in time: no validator stands for that.
            # In a trial every list is told whole: an answer without it would be one more that was shown, and not noted.
            trial, champion = view.ranker.matrix.trial, view.ranker.matrix.adapter
            etag = "" if asked.words or trial is not None else _tag(view, user, read.row, asked)
            unchanged = _unchanged(request, etag)
            if unchanged is not None:
                return unchanged
            with view.metrics.recommendation_seconds.time():
                told = serving.recommend(view, user, asked, read)
            answered = await _told(request, view, told, asked.words, etag)
            if trial is not None:
                view.shown(told, trial, champion)
            return answered

        return await http.for_user(request, user, answer, asked.at_least)

    @app.post("/v1/users/{user_id:path}/what-if", operation_id="whatIf", response_model=None)
    async def what_if(request: Request) -> Response:
        user, options = _id(request, "user_id"), _query(request, serving.ListQuery)
        body = await _body(request, WHAT_IF_BYTES_MAX)
        asked = _request(body, serving.WhatIfRequest, "what-if")
        events = _supposed_events(asked.with_events, user, view.now())

        async def answer() -> Response:
            try:
                encoded = await asyncio.wait_for(serving.vectors(view, events), ENCODE_WAIT_S)
                told = serving.what_if(view, user, asked.without, events, encoded, options)
                return await _told(request, view, told, options.words)
            except TimeoutError:
                detail = "The encoder has too much to do for these comments."
                raise Problem("not-ready", detail, retry_after_s=RETRY_AFTER_S) from None
            except serving.UnknownPosition as fault:
                raise Problem("unknown-position", str(fault)) from None

        return await http.for_user(request, user, answer, options.at_least, body)

    @app.post("/v1/rank", operation_id="rank", response_model=None)
    async def rank(request: Request) -> Response:
        at_least = _query(request, serving.ReadQuery).at_least
        body = await _body(request, RANK_BYTES_MAX)
        asked = _request(body, serving.RankRequest, "rank")

        async def answer() -> Response:
            return await _told(request, view, serving.rank(view, asked), asked.words)

        return await http.for_user(request, asked.user_id, answer, at_least, body)

    @app.post("/v1/events", operation_id="postEvents", response_model=None, status_code=202)
    async def post_events(request: Request) -> Response:
        body = await _body(request, EVENTS_BYTES_MAX)
        events = _events(body, view.now())
        _about(request, (event.user_id for event, _ in events))
        told = [("comments" if isinstance(e, Comment) else "clicks", e.user_id.encode(), raw) for e, raw in events]
        positions = await http.publish(told)
        return Response(msgspec.json.encode(answers.Accepted(len(positions), positions)), 202, None, "application/json")


async def _told(
    request: Request, view: WorkerView, told: answers.Recommendations, with_words: bool, etag: str = ""
) -> Response:  # fmt: skip
    if with_words:
        require(request.state.caller, WORDS_SCOPE)
        await serving.add_words(view, told)
    return _json(told, etag)


def _erasure_routes(app: FastAPI, http: Http) -> None:
    view = http.view

    # One segment, unlike elsewhere: DELETE /v1/users/a/state is no user's address.
    @app.delete("/v1/users/{user_id}", operation_id="deleteUser", response_model=None, status_code=202)
    async def delete(request: Request) -> Response:
        user, unlearn = _id(request, "user_id"), _query(request, serving.ErasureQuery).unlearn
        value = msgspec.json.encode(Erasure(user, view.now(), unlearn))
        (name,) = await http.publish([("erasures", user.encode(), value)])
        body = msgspec.json.encode(answers.Certificate(name, "pending", unlearn))
        return Response(body, 202, {"Location": f"/v1/erasures/{name}"}, "application/json")

    @app.get("/v1/erasures/{erasure_id}", operation_id="getErasure", response_model=None)
    async def erasure(request: Request) -> Response:
        erasure_id = request.path_params["erasure_id"]
        place = place_of(erasure_id)
        if place is None:
            raise _invalid("erasure_id", "has to be erasures:PARTITION:OFFSET, as DELETE answers it")
        found = view.certificate(erasure_id)
        if found is not None:
            return _json(found)
        partition, offset = place
        if partition < view.partitions:
            owner = view.owner_url(partition)
            if owner is not None:
                return await http.forward(request, owner)
            if await http.waits("erasures", partition, offset):
                return _json(answers.Certificate(erasure_id, "pending"))
        raise Problem("not-found", f"{erasure_id} is no erasure that was applied; erasures.dlq has what was rejected.")


def _item_routes(app: FastAPI, http: Http) -> None:
    view = http.view

    @app.get("/v1/items/{item_id:path}/similar", operation_id="getSimilar", response_model=None)
    async def similar(request: Request) -> Response:
        item_id, limit = _id(request, "item_id"), _query(request, serving.SimilarQuery).limit
        etag = _tag(view, item_id, limit)
        return _unchanged(request, etag) or _json(_known(serving.similar(view, item_id, limit), item_id), etag)

    @app.get("/v1/items/{item_id:path}", operation_id="getItem", response_model=None)
    async def item(request: Request) -> Response:
        item_id = _id(request, "item_id")
        etag = _tag(view, item_id)
        return _unchanged(request, etag) or _json(_known(serving.item(view, item_id), item_id), etag)


def _known(found: Any, item_id: str) -> Any:
    if found is None:
        raise Problem("not-found", f"No item {item_id[:80]} is in the catalogue.")
    return found


def _worker_routes(app: FastAPI, http: Http, gate: Gate) -> None:
    view = http.view

    @app.get("/v1/digest", operation_id="getDigest", response_model=None)
    async def digest() -> Response:
        return _json(await asyncio.get_running_loop().run_in_executor(None, view.digest))

    @app.get("/v1/model", operation_id="getModel", response_model=None)
    async def model(request: Request) -> Response:
        told = await http.with_learner(request, view.model_info())
        etag = _tag(view, msgspec.msgpack.encode(told))
        return _unchanged(request, etag) or _json(told, etag)

    @app.get(ENDLESS_PATH, operation_id="getStream", response_model=None)
    async def stream(request: Request) -> Response:
        if http.streams >= STREAMS_MAX:
            raise Problem("too-many-streams", f"{STREAMS_MAX} streams are open.", retry_after_s=RETRY_AFTER_S)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        shown = http.stream(partial(gate.knows, request.state.caller))
        return StreamingResponse(shown, headers=headers, media_type="text/event-stream")

    @app.get("/healthz", operation_id="getHealth", response_model=None)
    async def health() -> Response:
        return _json(answers.Alive("ok"))

    @app.get("/readyz", operation_id="getReadiness", response_model=None)
    async def ready() -> Response:
        reasons = view.ready()
        if reasons:
            raise Problem("not-ready", "; ".join(reasons), retry_after_s=RETRY_AFTER_S, reasons=reasons)
        return _json(answers.Ready("ready"))

    @app.get("/metrics", operation_id="getMetrics", response_model=None)
    async def metrics() -> Response:
        return Response(generate_latest(view.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _page_routes(app: FastAPI) -> None:
    @app.get("/openapi.json", operation_id="getOpenapi", response_model=None)
    async def openapi() -> Response:
        return _json(app.openapi())

    @app.get("/docs", operation_id="getDocs", response_model=None)
    async def docs() -> Response:
        return Response(documentation_page(app.openapi()), media_type="text/html; charset=utf-8")

    for path, (name, media_type) in PAGE_FILES.items():
        content = (PAGE_DIR / name).read_bytes()
        etag = f'"{hashlib.blake2b(content, digest_size=12).hexdigest()}"'
        app.add_api_route(
            path, _file(content, etag, media_type), methods=["GET"], include_in_schema=False, response_model=None
        )


def _file(content: bytes, etag: str, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    async def file(request: Request) -> Response:
        headers = {"ETag": etag, "Cache-Control": "no-cache"}
        return _unchanged(request, etag) or Response(content, headers=headers, media_type=media_type)

    return file


# -- the service


class HttpService(mode.Service):
    """uvicorn in the worker's loop. It answers before the partitions are ready: /readyz says when they are."""

    def __init__(
        self, view: WorkerView, settings: Settings, gate: Gate | None = None, audit: Audit | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(**options)
        self.view = view
        self.gate, self.audit = gate, audit
        self.host, self.port = settings.http_host, settings.http_port
        self._hosts = _hosts(settings)

    async def on_start(self) -> None:
        """Binds and serves. Raises OSError when the port is taken."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            listener = socket.create_server((self.host, self.port), family=family, backlog=CONNECTIONS_MAX)
        except OSError as failure:
            raise OSError(
                failure.errno,
                f"HTTP cannot listen on {self.host}:{self.port} ({failure.strerror}); "
                "set HEADWATER_HTTP_PORT to a free port, or stop what holds it",
            ) from failure
        if self.audit is not None:
            self._auditing = asyncio.create_task(self.audit.run(), name="audit")
        limits = httpx.Limits(max_connections=FORWARD_CONNECTIONS_MAX, keepalive_expiry=FORWARD_KEEPALIVE_S)
        timeout = httpx.Timeout(FORWARD_TIMEOUT_S, connect=FORWARD_CONNECT_TIMEOUT_S)
        self._client = httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False)
        self._edge = create_app(self.view, self._client, self._hosts, self.gate, self.audit)
        config = uvicorn.Config(
            self._edge, lifespan="off", log_config=None, log_level="warning", access_log=False, server_header=False,
            http=Wire, ws="none", proxy_headers=False, timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_S,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        # SIGTERM stays Faust's.
        self._server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]), name="http")

    async def on_stop(self) -> None:
        """Ends the open streams, lets requests finish, closes."""
        if not hasattr(self, "_serving"):
            return
        self._edge.app.state.http.closing.set()
        self._server.should_exit = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._serving, GRACEFUL_SHUTDOWN_S + 1)
        await self._client.aclose()
        if self.gate is not None:
            self.gate.close()
        if self.audit is not None:
            await self.audit.close(self._auditing)


def _hosts(settings: Settings) -> frozenset[str] | None:
    """The names by which a worker on a loopback address may be called; None: it is on the network, any."""
    if settings.http_host not in LOOPBACK_HOSTS:
        return None
    return frozenset((*LOOPBACK_HOSTS, httpx.URL(settings.http_url()).host))
