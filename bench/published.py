"""Beside a published table: takuti/stream-recommender's prequential recall on MovieLens 100k, with the model's row.

That protocol: 5 stars alone are events, in order of time; the first 20 % are fitted and the next 10 % only learnt; of
the last 70 % each is ranked before it is learnt, among the items that its user has not had. Recall@10 is the share
with a rank of 10 or better. Their candidates are the films rated so far and the target; here they are all films from
the start, which is never easier. Where they fit by passes over the 20 %, everything here learns each event once.
"""

import argparse
import gzip
import json
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np

from model import baselines
from model.evaluate import HITS_MAX, SCORED
from model.learner import warm_up
from streams import evaluate, movielens, settings

STARS: Final = 5.0
LEARNT_PERCENT: Final = 30  # 20 fitted, 10 that their batch training is checked on
EVERY_POSITIVE: Final = f"half-life {np.inf:g} positives"
PUBLISHED: Final = {  # Recall@10 on ML-100k, "Prequential evaluation" of that repository
    "popularity": (0.105, 0.105),
    "incremental MF": (0.023, 0.026),
}


def run(args: list[str]) -> dict[str, Any]:
    """Measures on MovieLens 100k, or on another stream of ratings given by --items and --events."""
    parser = argparse.ArgumentParser(prog="python -m bench published", description=__doc__)
    parser.add_argument("--items", type=Path, help="default: MovieLens 100k, as `headwater demo` fetches it")
    parser.add_argument("--events", type=Path)
    options = parser.parse_args(args)
    if (options.items is None) != (options.events is None):
        parser.error("give --items and --events, or neither")
    if options.items is None:
        options.items, options.events = movielens.fetch(settings.cache_dir() / "ml-100k")
    from model.encoder import Encoder

    chosen = settings.load()
    encoder = Encoder(chosen.encoder, device=chosen.device)
    config = chosen.learner_config(encoder.dim)
    with tempfile.TemporaryDirectory() as scratch:
        kept = Path(scratch) / "events.jsonl"
        kept.write_bytes(b"".join(_five_stars(options.events)))
        stream = evaluate.read_stream(options.items, kept, chosen.evidence_config())
    model = evaluate.Run(stream, encoder, chosen.evidence_config(), config)
    model.encode(None, settings.cache_dir() / "vectors", lambda *_: None)
    warm_up(config)
    model.advance(None, lambda *_: None)
    ranks = {"model": model.rank, "popularity": baselines.popularity(stream.trace)[EVERY_POSITIVE]}
    for family in baselines.BASELINES:
        best = baselines.run(family, stream.trace)
        ranks[f"{family}, best: {best.variant}"] = best.ranks
    return _table(stream, ranks)


def _five_stars(path: Path) -> list[bytes]:
    """The lines that hold a rating of STARS."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        return [line for line in file if json.loads(line).get("value") == STARS]


def _table(stream: evaluate.Stream, ranks: dict[str, Any]) -> dict[str, Any]:
    """Recall@10 of each over the last tests; prints the table."""
    events = len(stream.events)
    learnt = events * LEARNT_PERCENT // 100
    tests = np.flatnonzero(stream.trace.kind == SCORED)
    tests = tests[tests >= learnt]
    recall = {name: float((rank[tests] <= HITS_MAX).mean()) for name, rank in ranks.items()}
    for name, (low, high) in PUBLISHED.items():
        print(f"  {'-'.join(f'{bound:.3f}' for bound in dict.fromkeys((low, high))):>11}  published: {name}")
    for name, value in recall.items():
        print(f"  {value:11.4f}  here: {name}")
    return {
        "events": events, "learnt_first": learnt, "tests": len(tests), "published_recall@10": PUBLISHED,
        "recall@10": recall,
    }  # fmt: skip
