"""A move to another encoder in the middle of a recorded stream: what it is worth, and whether the lists jump.

The same stream four times: with the encoder as it is all along; with the other one all along; moved to the other one
where half of the events are learnt, behind a map that is fitted to the items that there are by then; and moved to it
without a map. Users' words of before the move stay as the old encoder read them. The other encoder is the lower layers
of the one there is, or --model, turned by a random rotation, as an encoder of another origin is: the lower layers alone
are of nearly the same space.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from model import align
from model.encoder import Encoder, locate
from model.items import ItemMatrix
from model.learner import warm_up
from model.ranker import Ranker
from state import rows
from streams import evaluate, examples, serving, settings
from streams.examples import Vectors
from streams.serving import Origin, Read

LISTS: Final = 200  # of users, before and after the move
TOP: Final = 10
SOON: Final = 500  # tests right after the move


def run(args: list[str]) -> dict[str, Any]:
    """Measures on --items and --events."""
    parser = argparse.ArgumentParser(prog="python -m bench move", description=__doc__)
    parser.add_argument("--items", type=Path, required=True)
    parser.add_argument("--events", type=Path, required=True)
    parser.add_argument("--until", type=int, help="only about so many events")
    parser.add_argument("--layers", type=int, default=4, help="of the other encoder")
    parser.add_argument("--model", help="the other encoder, as HEADWATER_ENCODER takes it")
    parser.add_argument("--back", action="store_true", help="from the other encoder to the one there is")
    options = parser.parse_args(args)
    chosen = settings.load()
    encoder = Encoder(chosen.encoder, device=chosen.device)
    stream = evaluate.read_stream(options.items, options.events, chosen.evidence_config())
    learner = chosen.learner_config(encoder.dim)
    warm_up(learner)
    with tempfile.TemporaryDirectory(prefix="headwater-move-") as folder:
        other = options.model or str(_lower_layers(chosen.encoder, options.layers, Path(folder) / "lower"))
        first, second = (Encoder(other), encoder) if options.back else (encoder, Encoder(other))
        trial = _Trial(stream, first, second, chosen, options.until)
        return {"stream": stream.name, "encoder": first.name, **trial.told()}


def _lower_layers(model: str, layers: int, folder: Path) -> Path:
    source, told = locate(model)
    whole = AutoModel.from_pretrained(source, **told)
    whole.encoder.layer = torch.nn.ModuleList(list(whole.encoder.layer)[:layers])
    whole.config.num_hidden_layers = layers
    whole.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, **told).save_pretrained(folder)
    return folder


class _Turned:
    """An encoder whose vectors are turned: the same geometry, in a space of its own."""

    def __init__(self, plain: Encoder) -> None:
        self.dim, self.name, self._plain = plain.dim, f"{plain.name}-turned", plain
        draw = np.random.default_rng(5).standard_normal((plain.dim, plain.dim))
        self._rotation = np.linalg.qr(draw)[0].astype(np.float32)

    def encode(self, texts: Sequence[str]) -> Any:
        return self._plain.encode(texts) @ self._rotation

    def project(self, vector: Any) -> Any:
        return self._plain.project(vector) @ self._rotation

    def combine(self, text_vector: Any, plain_vector: Any) -> Any:
        return self._plain.combine(text_vector, plain_vector)


class _Aligned:
    """A turned encoder behind a map."""

    def __init__(self, turned: _Turned, matrix: Any, dim: int) -> None:
        self.dim, self.name, self._turned, self._matrix = dim, f"{turned.name}-aligned", turned, matrix

    def encode(self, texts: Sequence[str]) -> Any:
        moved = np.stack([align.apply(self._matrix, vector) for vector in self._turned.encode(texts)])
        norms = np.linalg.norm(moved, axis=1, keepdims=True)
        return (moved / np.where(norms > 0, norms, 1)).astype(np.float32)

    project = combine = None  # no recorded stream brings vectors of its own


class _Trial:
    def __init__(
        self, stream: evaluate.Stream, encoder: Encoder, other: Encoder, chosen: settings.Settings, until: int | None
    ) -> None:
        self.stream, self.encoder, self.chosen = stream, encoder, chosen
        self.other = _Turned(other)
        self.until = until or len(stream.events)
        self.config = chosen.learner_config(encoder.dim)

    def told(self) -> dict[str, Any]:
        """Figures of the four runs from the move on, and of the move."""
        middle = self.until // 2
        stays, begins = self._run(self.encoder), self._run(self.other)
        stays.advance(self.until, _unseen)
        begins.advance(self.until, _unseen)
        moved, raw = self._run(self.encoder), self._run(self.encoder)
        moved.advance(middle, _unseen)
        raw.advance(middle, _unseen)
        aligned, fidelity = self._aligned(moved)
        at = moved.done
        told: dict[str, Any] = {
            "other": self.other.name, "events": self.until, "moved_at": at, "fidelity": fidelity.__dict__,
            "same_lists": self._move(moved, aligned),
        }  # fmt: skip
        if self.other.dim == self.encoder.dim:
            told["same_lists_without_map"] = self._move(raw, self.other)
        moved.advance(self.until, _unseen)
        raw.advance(self.until, _unseen)
        for name, one in (("stays", stays), ("other_all_along", begins), ("moved", moved), ("moved_without_map", raw)):
            told[name] = {"after": _figures(one, at, None), "soon_after": _figures(one, at, SOON)}
        return told

    def _run(self, encoder: Any) -> evaluate.Run:
        fresh = evaluate.Run(self.stream, encoder, self.chosen.evidence_config(), self.config)
        fresh.encode(self.until, settings.cache_dir() / "vectors" if encoder is self.encoder else None, _unseen)
        return fresh

    def _aligned(self, moved: evaluate.Run) -> tuple[_Aligned, align.Fidelity]:
        """The other encoder behind a map that is fitted to the items that have entered."""
        m = moved.learner.learner.matrix
        plain = {examples.item_key(i.item_id): i.text for i in self.stream.items if i.text and i.vector is None}
        known = [(row, plain[int(m.arrays.key[row])]) for row in range(len(m)) if int(m.arrays.key[row]) in plain]
        old, texts = m.arrays.e[[row for row, _ in known]], [text for _, text in known]
        matrix, fidelity = align.fit(old, self.other.encode(texts), texts)
        return _Aligned(self.other, matrix, self.encoder.dim), fidelity

    def _move(self, moved: evaluate.Run, other: Any) -> float:
        """Moves the run's items to the other encoder's vectors, as the log would; what comes is read by it, too. The
        share of the users' lists that is the same."""
        before = self._lists(moved)
        ahead = self._run(other)
        items = [(examples.item_key(item.item_id), ahead._item_vectors[at])
                 for at, item in enumerate(self.stream.items[: moved._entered])]  # fmt: skip
        vectors = [(key, vector.astype("<f2").tobytes()) for key, vector in items if vector is not None]
        moved.learner.learn(moved._position, examples.pack_vectors(Vectors(1, other.name, vectors), in_use=True))
        moved._position += 1
        moved._item_vectors, moved._text_vectors = ahead._item_vectors, ahead._text_vectors
        after = self._lists(moved)
        return float(np.mean([len(before[user] & after[user]) / TOP for user in before]))

    def _lists(self, at: evaluate.Run) -> dict[bytes, set[str]]:
        """The ten best of the users who came last."""
        matrix = ItemMatrix(self.config.dim, self.config.text_dim, self.config.neighbours_max)
        matrix.apply(at.learner.learner.matrix.rows())
        ranker = Ranker(matrix, cooccurrence_history=self.config.cooccurrence_history)
        now = float(at._clock[at.done - 1])
        users = list(dict.fromkeys(event.user_id.encode() for event in self.stream.events[at.done - 1 :: -1]))[:LISTS]
        view: Any = SimpleNamespace(ranker=ranker, now=lambda: now, partition_of=lambda user: 0)
        found = {}
        for user in users:
            row, read = rows.unpack(at.users[user]), Read(None, {}, Origin(0, 0, b""))
            reader = serving.Reader(view, user.decode(), row, read)
            ranking = ranker.rank(reader.user, now, reader.consumed())
            found[user] = {matrix.names[one.row] for one in ranking.top(TOP)}
        return found


def _figures(one: evaluate.Run, start: int, count: int | None) -> dict[str, float]:
    tests = np.flatnonzero(~np.isnan(one.rank))
    rank = one.rank[tests[tests >= start][:count]]
    gain = np.where(rank <= TOP, 1 / np.log2(1 + rank), 0.0)
    return {"tests": len(rank), "hr@10": round(float((rank <= TOP).mean()), 4), "ndcg@10": round(float(gain.mean()), 4)}


def _unseen(*_: Any) -> None:
    """Progress that nobody looks at."""
