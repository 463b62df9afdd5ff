"""Texts to vectors beside the event loop: whatever waits is encoded together, in one thread, in order of arrival."""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from streams.events import Item

F4: TypeAlias = npt.NDArray[np.float32]

BATCH_TEXTS_MAX: Final = 64  # bounds how long the next text waits for the batch under way: some .3 s on one core


class Encoder(Protocol):
    """What is needed of model.encoder.Encoder."""

    dim: int
    name: str

    def encode(self, texts: Sequence[str]) -> F4: ...
    def project(self, vector: Any) -> F4: ...
    def combine(self, text_vector: F4, plain_vector: F4) -> F4: ...


def item_vector(encoder: Encoder, item: Item, text_vector: F4 | None) -> F4 | None:
    """Of the item's text (`text_vector`), of the vector that came with it, or of both; None when it has neither."""
    if item.vector is None:
        return text_vector
    plain = encoder.project(np.asarray(item.vector, np.float32))
    return plain if text_vector is None else encoder.combine(text_vector, plain)


class Encoding:
    """The encoder's queue: `submit` at once gives a future of the text's unit vector."""

    def __init__(
        self, encoder: Encoder, observe: Callable[[int, float], None], now: Callable[[], float],
        crash: Callable[[str], None] = lambda step: None,
    ) -> None:  # fmt: skip
        """encoder: the one that reads what nobody names another for; it may be set anew at any time. observe: told
        (texts, seconds) of each batch. crash: called before each, for tests that end the process."""
        self.encoder = encoder
        self._observe = observe
        self._now = now
        self._crash = crash
        self._waiting: list[tuple[str, asyncio.Future[F4], Encoder]] = []
        self._task: asyncio.Task[None] | None = None
        self._executor = ThreadPoolExecutor(1, "encoder")

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        return self.encoder.dim

    def submit(self, text: str, encoder: Encoder | None = None) -> asyncio.Future[F4]:
        """The text's vector, (dim,) float32, soon, by this encoder. Fails with what the encoder raised."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[F4] = loop.create_future()
        self._waiting.append((text, future, encoder or self.encoder))
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._run(), name="encoding")
        return future

    def submit_item(self, item: Item, encoder: Encoder | None = None) -> asyncio.Future[F4] | None:
        """`item_vector`, soon; None when the item has neither a text nor a vector."""
        encoder = encoder or self.encoder
        text = self.submit(item.text, encoder) if item.text else None
        return text if item.vector is None else asyncio.ensure_future(self._combined(item, text, encoder))

    async def _combined(self, item: Item, text: asyncio.Future[F4] | None, encoder: Encoder) -> F4:
        vector = item_vector(encoder, item, None if text is None else await text)
        assert vector is not None
        return vector

    def _next_batch(self) -> tuple[Encoder, list[tuple[str, asyncio.Future[F4]]]]:
        """What waits and is read by one encoder."""
        encoder = self._waiting[0][2]
        same = itertools.takewhile(lambda waiting: waiting[2] is encoder, self._waiting[:BATCH_TEXTS_MAX])
        batch = [(text, future) for text, future, _ in same]
        del self._waiting[: len(batch)]
        return encoder, batch

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            encoder, batch = self._next_batch()
            started = self._now()
            self._crash("encode")
            try:
                vectors = await loop.run_in_executor(self._executor, encoder.encode, [text for text, _ in batch])
            except Exception as failure:  # every waiter is told
                for _, future in batch:
                    if not future.done():
                        future.set_exception(failure)
                continue
            self._observe(len(batch), self._now() - started)
            for (_, future), vector in zip(batch, vectors, strict=True):
                if not future.done():
                    future.set_result(vector)

    def close(self) -> None:
        """Ends the thread; what still waits is dropped."""
        self._executor.shutdown(cancel_futures=True)
