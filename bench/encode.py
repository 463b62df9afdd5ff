"""Texts encoded a second, against sentence-transformers (float32, its own batching) on the same texts, one thread.

Also against the same fed text by text as they arrive, and the time that one new comment takes. Texts are of mixed
length and fit one window, so that both sides read the same tokens; the vectors must agree.
"""

import argparse
import hashlib
import random
import statistics
import time
from typing import Any, Final

import numpy as np

WORDS: Final = (
    "film", "story", "actor", "ending", "slow", "fine", "bright", "dark", "plot", "scene", "light", "voice",
    "music", "camera", "old", "new", "first", "last", "long", "short", "funny", "sad", "brave", "quiet", "war",
    "love", "city", "night", "road", "river", "house", "child", "king", "train", "winter",
)  # fmt: skip
WORDS_MAX: Final = 110  # a token each: within a window of 128
SINGLES_MAX: Final = 40  # comments timed by themselves
ARRIVALS_MAX: Final = 64  # texts given to the reference one at a time
COSINE_MIN: Final = 0.99  # below it, the two did not do the same work


def texts_of(count: int, seed: int) -> list[str]:
    """Texts of mixed length (median 15 words), a function of the seed, all different."""
    draw = random.Random(seed)
    lengths = [min(WORDS_MAX, 2 + int(draw.lognormvariate(2.7, 0.8))) for _ in range(count)]
    return [f"{' '.join(draw.choices(WORDS, k=length))} {number}" for number, length in enumerate(lengths)]


def run(args: list[str]) -> dict[str, Any]:
    """Measures with the installed weights, or with --model; --tiny for the tests."""
    parser = argparse.ArgumentParser(prog="python -m bench encode", description=__doc__)
    parser.add_argument("--texts", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="a few texts: shows that it runs, measures nothing")
    options = parser.parse_args(args)
    count, rounds = (12, 1) if options.tiny else (options.texts, options.rounds)
    return measure(count, rounds, options.model, options.seed)


def measure(count: int, rounds: int, model: str, seed: int) -> dict[str, Any]:
    """The figures of `count` texts, the best of some rounds. Raises AssertionError where the two sides disagree."""
    from sentence_transformers import SentenceTransformer

    from model.encoder import Encoder, EncoderConfig, locate

    encoder = Encoder(model, "cpu", EncoderConfig(cache_texts_max=0))
    source, loading = locate(model)
    reference = SentenceTransformer(source, device="cpu", **loading)
    texts = texts_of(count, seed)

    def refer(some: list[str]) -> Any:
        return reference.encode(some, normalize_embeddings=True, show_progress_bar=False)

    encoder.encode(texts[:4])
    refer(texts[:4])
    ours_s = reference_s = float("inf")
    for _ in range(rounds):  # in turns, the best of each: a neighbour's burst of work hits either
        vectors, seconds = _timed(lambda: encoder.encode(texts))
        ours_s = min(ours_s, seconds)
        expected, seconds = _timed(lambda: refer(texts))
        reference_s = min(reference_s, seconds)
    rows_mean = encoder.stats.rows_mean
    arrivals = texts[:ARRIVALS_MAX]
    _, arrivals_s = _timed(lambda: [refer([text]) for text in arrivals])
    singles_ms = [1e3 * _timed(lambda text=text: encoder.encode([text]))[1] for text in texts[:SINGLES_MAX]]
    cosine = float((vectors * expected).sum(1).min())
    assert cosine > COSINE_MIN, f"the vectors differ from the reference's: cosine {cosine:.4f}"
    return {
        "texts": count,
        "encoder": encoder.name,
        "precision": encoder.precision,
        "reference": "sentence-transformers, float32, its own batches of 32 sorted by length, one thread",
        "texts_per_s": round(count / ours_s, 1),
        "reference_texts_per_s": round(count / reference_s, 1),
        "ratio": round(reference_s / ours_s, 2),
        "reference_one_by_one_texts_per_s": round(len(arrivals) / arrivals_s, 1),
        "single_text_ms": {
            "p50": round(statistics.median(singles_ms), 2),
            "p99": round(float(np.percentile(singles_ms, 99)), 2),
        },
        "rows_mean": round(rows_mean, 1),
        "cosine_min": round(cosine, 5),
        "result_hash": hashlib.blake2b(vectors.tobytes(), digest_size=8).hexdigest(),
    }


def _timed(work: Any) -> tuple[Any, float]:
    """(what it returns, seconds)."""
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started
