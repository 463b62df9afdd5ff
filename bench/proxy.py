"""A TCP proxy on loopback whose network can be cut: by resetting connections, by letting nothing through, or nothing
back."""

import asyncio
import threading
from contextlib import suppress
from typing import Final, Self

from streams.broker import HOST, free_port

CHUNK_BYTES: Final = 1 << 16


class Proxy:
    """`with Proxy() as proxy:` listens on `proxy.port`; `target` says which port its connections go on to."""

    def __init__(self) -> None:
        self.port = free_port()
        self.target = 0
        self._loop = asyncio.new_event_loop()
        self._ending = asyncio.Event()
        self._passes = asyncio.Event()
        self._passes.set()
        self._refuses = False
        self._loses_answers = False
        self.answers_lost = 0
        self._pairs: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._ready = threading.Event()

    def cut(self, *, silently: bool) -> None:
        """Until `mend`. silently: connections stay and nothing passes, as in a network that drops; else they are
        closed, and new ones too, as by a dead host's router."""
        self._loop.call_soon_threadsafe(self._cut, silently)

    def lose_answers(self) -> None:
        """From here to `cut` or `mend`, what comes back is lost: requests arrive, and who sent them does not know."""
        begun = threading.Event()
        self._loop.call_soon_threadsafe(self._lose_answers, begun)
        begun.wait()

    def mend(self) -> None:
        """Everything passes again."""
        self._loop.call_soon_threadsafe(self._mend)

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._ending.set)
        self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:  # ends what is still under way
            runner.run(self._serve())

    async def _serve(self) -> None:
        async with await asyncio.start_server(self._accept, HOST, self.port):
            self._ready.set()
            await self._ending.wait()

    def _lose_answers(self, begun: threading.Event) -> None:
        self._loses_answers = True
        begun.set()

    def _cut(self, silently: bool) -> None:
        self._loses_answers = False
        if silently:
            self._passes.clear()
            return
        self._refuses = True
        for writer in self._pairs:
            writer.transport.abort()

    def _mend(self) -> None:
        self._refuses = self._loses_answers = False
        self._passes.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._passes.wait()
            if self._refuses:
                raise ConnectionError
            far_reader, far_writer = await asyncio.open_connection(HOST, self.target)
        except OSError:
            writer.transport.abort()
            return
        self._pairs |= {writer, far_writer}
        await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer, answers=True))
        self._pairs -= {writer, far_writer}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool = False) -> None:
        with suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                await self._passes.wait()
                if answers and self._loses_answers:
                    self.answers_lost += 1
                    continue
                writer.write(data)
                await writer.drain()
        writer.close()
