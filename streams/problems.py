"""Every way in which an HTTP request can fail, as RFC 9457 problem details.

One table: the slug is the problem's name (`type` is `/docs#problem-<slug>`), with its status, its title and what the
client can do. The OpenAPI document and /docs are written from it.
"""

from typing import Any, Final, NamedTuple

import msgspec

MEDIA_TYPE: Final = "application/problem+json"
DETAIL_CHARS_MAX: Final = 600  # a detail quotes input: never all of it


class Kind(NamedTuple):
    """A kind of problem."""

    status: int
    title: str
    advice: str


KINDS: Final[dict[str, Kind]] = {
    "not-understood": Kind(400, "Not understood", "Send what the operation's description says, as JSON in UTF-8."),
    "unauthenticated": Kind(401, "No valid key", "Send Authorization: Bearer KEY, or X-API-Key: KEY."),
    "forbidden": Kind(403, "Not with this key", "Use a key of the scope that the detail names."),
    "cross-site": Kind(403, "Asked by another site's page", "Ask from this page, or from a program."),
    "not-found": Kind(404, "Not found", "Check the address; one id is one path segment, its slashes written %2F."),
    "method-not-allowed": Kind(405, "Method not allowed", "Use a method of the Allow header."),
    "too-slow": Kind(408, "Too slow", "Send the body at once, after all of it is there."),
    "too-large": Kind(413, "Too large", "Send less at once; long streams of events go to Kafka directly."),
    "unsupported-media-type": Kind(415, "Unsupported media type", "Send Content-Type: application/json."),
    "misdirected": Kind(421, "Not for this host", "Ask by the address that the worker is bound to."),
    "invalid-parameter": Kind(422, "Invalid parameter", "`errors` names each parameter and what it has to be."),
    "invalid-event": Kind(422, "Invalid event", "`index`, `reason`: the fault. Nothing was accepted: send all again."),
    "unknown-position": Kind(422, "Not a kept event", "Take positions from the user's state or an explanation."),
    "too-many-requests": Kind(429, "Too many requests", "Ask again after Retry-After seconds, and less often."),
    "too-many-failures": Kind(429, "Too many wrong keys", "Ask again after Retry-After seconds, with a right key."),
    "internal": Kind(500, "Internal error", "Report it with its request id; the worker's log has the cause."),
    "not-ready": Kind(503, "Not ready", "The user's partition opens or moves: ask again after Retry-After seconds."),
    "not-applied": Kind(503, "Not applied yet", "The offset of `at_least` was not reached in time: ask again."),
    "owner-unreachable": Kind(503, "The user's worker cannot be reached", "It restarts or moves: ask again."),
    "log-unreachable": Kind(503, "The event log cannot be reached", "Ask again. `positions`: what was accepted."),
    "not-audited": Kind(503, "The audit log cannot be written", "Users are not read unaudited: ask again later."),
    "too-many-connections": Kind(503, "Too many connections", "Close some, or ask another worker."),
    "too-many-streams": Kind(503, "Too many open streams", "Close one, or ask another worker."),
}  # fmt: skip


class ProblemDetails(msgspec.Struct, omit_defaults=True):
    """RFC 9457 problem details. `type` is stable: decide by it; `detail` is for people."""

    type: str
    title: str
    status: int
    detail: str
    instance: str = ""
    request_id: str = ""
    errors: list[dict[str, str]] | None = None  # invalid-parameter: parameter, detail
    index: int | None = None  # invalid-event: which event of the list, from 0
    reason: str | None = None  # invalid-event: the dead letter's reason word
    positions: list[str | None] | None = None  # log-unreachable: of the events accepted; null: not accepted
    reasons: list[str] | None = None  # not-ready: what the worker waits for


class Problem(Exception):
    """Raised by handlers; becomes the response."""

    def __init__(
        self, kind: str, detail: str, *, retry_after_s: float | None = None, headers: dict[str, str] | None = None,
        **extensions: Any,
    ) -> None:  # fmt: skip
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(max(1, round(retry_after_s)))
        self.extensions = extensions

    def details(self, instance: str, request_id: str) -> ProblemDetails:
        """The body of the response."""
        kind = KINDS[self.kind]
        return ProblemDetails(
            f"/docs#problem-{self.kind}", kind.title, kind.status, self.detail[:DETAIL_CHARS_MAX], instance, request_id,
            **self.extensions,
        )  # fmt: skip
