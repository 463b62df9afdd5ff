"""HTTP/1.1 on a socket: uvicorn's httptools protocol, with bounds on what comes before a request can be answered.

A head that is too long, that takes too long or that is no HTTP, and a connection too many, are refused here with the
same problem details as everything else. What follows the head (bodies) is bounded by `streams.web`.
"""

import asyncio
from typing import Any, Final

import httptools
import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from streams.problems import KINDS, MEDIA_TYPE, Problem

CONNECTIONS_MAX: Final = 1024
HEAD_BYTES_MAX: Final = 65_536  # request line and headers; what one read brings may stand above it
HEAD_S_MAX: Final = 10.0  # from the connection, or the last request, to the end of the next head
LINGER_S: Final = 1.0  # what a refused client still sends is read: closed at once, it might not see the answer


class Wire(HttpToolsProtocol):
    """One connection."""

    _head_bytes = 0
    _requests = 0
    _is_head = True
    _is_refused = False
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refused where there are too many."""
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS_MAX:
            detail = f"{CONNECTIONS_MAX} connections are open."
            self._refuse(Problem("too-many-connections", detail, retry_after_s=1.0))
        else:
            self._timer = self.loop.call_later(HEAD_S_MAX, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Whoever ended it."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parsed; then a head has to be whole or within its bound."""
        if self._is_refused:
            return
        is_of_body, requests = not self._is_head, self._requests
        super().data_received(data)
        if is_of_body:
            # A request that was answered before its body came: the rest took uvicorn's timer away.
            if not self._is_answering and self.timeout_keep_alive_task is None:
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )
        elif self._is_head and self._requests == requests:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES_MAX:
                self._refuse(Problem("too-large", f"The request line and headers are over {HEAD_BYTES_MAX} bytes."))

    def on_headers_complete(self) -> None:
        """A request begins. It names one host (RFC 9112, 3.2; HTTP/1.0 may leave it out), or is none."""
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (not hosts and self.parser.get_http_version() != "1.0"):
            raise httptools.HttpParserError(f"{hosts} Host headers")
        self._is_head, self._head_bytes = False, 0
        self._requests += 1
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The next one may come."""
        super().on_message_complete()
        self._is_head = True

    def send_400_response(self, msg: str) -> None:
        """In the place of uvicorn's plain text."""
        self._refuse(Problem("not-understood", "This is no HTTP/1.1 request that names one host."))

    def _late(self) -> None:
        """Looks once a while: a request in progress has its own bounds, an idle connection uvicorn's."""
        self._timer = self.loop.call_later(HEAD_S_MAX, self._late)
        if self._is_head and not self._is_answering and self.timeout_keep_alive_task is None:
            self.transport.close()

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, problem: Problem) -> None:
        """The answer, once; then nothing is read any more."""
        if self._is_refused:
            return
        self._is_refused = True
        if self._is_answering:
            self.transport.close()  # there is no place for another answer
            return
        body = msgspec.json.encode(problem.details("", ""))
        headers: dict[str, Any] = {
            "Content-Type": MEDIA_TYPE, "Content-Length": len(body), "Connection": "close", **problem.headers,
        }  # fmt: skip
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.transport.write(STATUS_LINE[KINDS[problem.kind].status] + head.encode() + b"\r\n" + body)
        self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)
