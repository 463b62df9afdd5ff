"""What a client raises: one class for each thing that its caller can do about a failure.

All are `HeadwaterError` and carry the worker's problem details (RFC 9457, `streams.problems`). Their words name ids and
limits; of what users wrote and of keys they hold nothing.
"""

from typing import Final

from streams.problems import ProblemDetails

TYPE_PREFIX: Final = "/docs#problem-"


class HeadwaterError(Exception):
    """A request that did not succeed. kind: the problem's stable name ("not-ready"); status: 0 without an answer.

    retry_after_s: when the worker expects to answer, where it said so. positions: of a `send`, where each event went
    that was accepted; None for the others.
    """

    def __init__(self, problem: ProblemDetails, retry_after_s: float | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.kind = problem.type.removeprefix(TYPE_PREFIX)
        self.status, self.title, self.detail = problem.status, problem.title, problem.detail
        self.request_id = problem.request_id
        self.retry_after_s = retry_after_s
        self.positions: list[str | None] = []

    def __str__(self) -> str:
        told = ", ".join(filter(None, (str(self.status or ""), self.request_id and f"request {self.request_id}")))
        return f"{self.title}: {self.detail}" + (f" ({told})" if told else "")


class NoAnswer(HeadwaterError):
    """Nobody answers there, or the connection broke: whether anything was done is not known."""


class TimedOut(NoAnswer):
    """No answer within the time that was given."""


class NotHeadwater(HeadwaterError):
    """An answer that no worker gives: another program, a proxy's own page, or a version that differs too much."""


class Invalid(HeadwaterError):
    """400, 413, 415, 421, 422: asking again does not help; `problem` has `errors`, `index` and `reason`."""


class NotAllowed(HeadwaterError):
    """401, 403: no valid key, or one whose scope is not enough."""


class NotFound(HeadwaterError):
    """404: no such item, erasure or operation."""


class TooManyRequests(HeadwaterError):
    """429: the key asks too often, for longer than the client waits."""


class NotReady(HeadwaterError):
    """503: the user's partition opens or moves, or the log is away, for longer than the client waits."""


class WorkerFailed(HeadwaterError):
    """500 and what else is the server's fault."""


BY_STATUS: Final[dict[int, type[HeadwaterError]]] = {
    **dict.fromkeys((400, 405, 413, 415, 421, 422), Invalid),
    **dict.fromkeys((401, 403), NotAllowed),
    404: NotFound,
    429: TooManyRequests,
    503: NotReady,
}


def unanswered(who: str, url: str, failure: Exception, timed_out: bool) -> NoAnswer:
    """The failure of a request that got no answer. who: a worker or a broker."""
    title = "Timed out" if timed_out else "No answer"
    kind = TimedOut if timed_out else NoAnswer
    return kind(ProblemDetails("no-answer", title, 0, f"no {who} answers at {url} ({type(failure).__name__})"))
