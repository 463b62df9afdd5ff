"""The program's worker with word vectors for its encoder, for runs that start many: it starts in a third of the time.

python -m bench.words       with the worker's settings in the environment
"""

import time
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from streams import log
from streams.settings import Settings, one_thread_each

F4 = npt.NDArray[np.float32]
DIM: Final = 384


class WordVectors:
    """A text's vector is the direction of its words' sum; a word's is drawn by its checksum. A function of the text."""

    dim = DIM
    name = "words"

    def __init__(self, delay_s: float = 0.0) -> None:
        """delay_s: for each text, as of a slow encoder."""
        self._delay_s = delay_s

    def encode(self, texts: Sequence[str]) -> F4:
        """(n, DIM) unit vectors."""
        if self._delay_s:
            time.sleep(self._delay_s * len(texts))
        return np.stack([_unit(np.sum([_word(w) for w in text.split()] or [_word("")], axis=0)) for text in texts])

    def project(self, vector: Any) -> F4:
        """The vector's direction, repeated or cut to DIM numbers."""
        return _unit(np.resize(np.asarray(vector, np.float32), DIM))

    def combine(self, text_vector: F4, plain_vector: F4) -> F4:
        """The direction between both."""
        return _unit(text_vector + plain_vector)


@lru_cache(maxsize=10_000)
def _word(word: str) -> F4:
    return np.random.default_rng(zlib.crc32(word.encode())).standard_normal(DIM).astype(np.float32)


def _unit(vector: F4) -> F4:
    unit: F4 = vector / np.linalg.norm(vector)
    return unit


def run(encoder: WordVectors) -> None:
    """A worker with this encoder and the settings of the environment."""
    one_thread_each()
    log.set_up()
    from streams import app
    from streams.keys import Gate

    settings = Settings()
    app.run(settings, Gate.of(settings), time.time, encoder)


if __name__ == "__main__":
    run(WordVectors())
