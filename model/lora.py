"""Training inside the text encoder: low-rank adapters (LoRA, Hu et al. 2021) in its upper layers, by peft.

Every step takes one message's problem and a few pairs of texts, and lowers

    sum_i exp(-s_i) L_i + s_i / 2  +  anchor mean |v - v0|^2

    L_rec              the recommender's own softmax, as in model.finetune: offset_bj + <words_b, e_j> with
                       words_b = rest_b + sum_k w_bk v_k over the texts that the user's words are made of, and
                       e_j = v_j. What else is in them (the mean, older texts) stays in rest_b as it was
    L_comment_item     InfoNCE of a comment and the item that it is about, of two comments of one user in turn, of two
    L_comment_comment  items in turn in a session: in-batch negatives, both directions; what shares a text or a group
    L_item_item        (user, item) with the pair is no negative of it
    L_views            the same of a text and itself under two draws of dropout (SimCSE, Gao, Yao & Chen 2021)
    s_i                learnt (homoscedastic uncertainty, Kendall, Gal & Cipolla 2018), from where each part weighs as
                       much as any other: exp(-s_i) L_i = 1/2
    v0                 the frozen encoder's vector

over unit vectors v. The gradient is exact, and a chunk of texts is all that is ever held for it: vectors first, the
loss and its gradient to each vector, then each chunk once more (cached gradients, Gao et al. 2021). Whatever is drawn
is a function of the seed and the step, so that a training that goes on from its saved state is, bit for bit on a CPU,
the one that was never interrupted.

Importing this module imports torch (seconds); peft is the extra `lora`.
"""

import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from model.encoder import EncoderConfig, EncoderError, loading, locate, padded, pick_device, read_pooling
from model.encoder import read_json as read_model_json

Array: TypeAlias = npt.NDArray[Any]

REC: Final = "rec"
PAIRS: Final = ("comment_item", "comment_comment", "item_item")
VIEWS: Final = "views"
PARTS: Final = (REC, *PAIRS, VIEWS)
ANCHOR: Final = "anchor"
PARTS_MIN_PAIRS: Final = 2  # fewer have no negative
SPREAD_BOUNDS: Final = (0.0, 4.0)  # of s: a part that is as good as learnt weighs no more than its nats
GRADIENT_MAX: Final = 1.0  # norm, clipped
WARM_UP: Final = 0.1  # share of the steps in which the step size grows; then it falls to 0
HELD_BATCHES_MAX: Final = 16
ALL_LINEAR: Final = "all-linear"
ADAPTER_FOLDER: Final = "adapter"  # within a written encoder: peft's files
MODULES_FILE: Final = "modules.json"
BESIDE: Final = (MODULES_FILE, "sentence_bert_config.json", "config_sentence_transformers.json")
_PLAN, _ORDER, _VIEW, _START = range(4)  # what a draw is for


class TrainingError(EncoderError):
    """A training that cannot be done as asked: why, and what to do."""


@dataclass(frozen=True)
class LoraTrainingConfig:
    """Sizes and steps; figures: docs/decisions.md."""

    rank: int = 8
    alpha: float = 16.0  # the adapters' product is scaled by alpha / rank
    targets: tuple[str, ...] = ("query", "key", "value")  # ends of the names of linear modules; all-linear: every one
    layers: int = 2  # the upper ones; 0: all. Those below them need no graph
    steps: int = 256  # of the optimizer
    accumulate: int = 1  # batches a step
    lr: float = 2e-4
    lr_weights: float = 0.02  # of s
    temperature: float = 0.05
    anchor: float = 5.0
    pairs: int = 32  # of each kind in a batch
    chunk_texts: int = 32  # that the graph holds at once: bounds memory
    max_tokens: int = 64  # of a text, in training; whole texts are read in use
    precision: Literal["auto", "bfloat16", "float32"] = "auto"  # of the passes; auto: bfloat16 on CUDA
    seed: int = 1


class TextProblem(NamedTuple):
    """`model.learner.Problem` by texts: n examples, K candidates; ids are places in `TrainingData.texts`."""

    words: Array  # (n, T) float32, as they were learnt
    told: Array  # (n, H) int32: texts that they are made of
    weight: Array  # (n, H) float32: what each weighs; 0 where there is none
    target: Array  # (n,) int32
    candidate: Array  # (K,) int32
    offset: Array  # (n, K) float32; -inf where one is no negative
    offset_target: Array  # (n,) float32
    log_weight: float


class TrainingSet(NamedTuple):
    """One side of the data: what is trained on, or what is held out."""

    problems: list[TextProblem]
    pairs: dict[str, Array]  # of PAIRS: (n, 3) int64: text, text, group (-1: none)
    views: Array  # (n,) int64 texts, each once


class TrainingData(NamedTuple):
    """What a training is of."""

    texts: list[str]
    train: TrainingSet
    held: TrainingSet


class LoraStep(NamedTuple):
    """One step of the optimizer."""

    number: int  # from 0
    losses: dict[str, float]  # by part, before the step: nats; the anchor's is its squared distance
    weights: dict[str, float]  # exp(-s) by part, with it
    texts: int  # trained on by it


class _Batch(NamedTuple):
    problem: TextProblem | None
    pairs: dict[str, Array]  # (n, 3)
    views: Array
    ids: Array  # (m,) int64, ascending: all texts but the second looks at `views`


class _Chunk(NamedTuple):
    at: Array  # places in the batch's vectors
    ids: Array  # texts
    dropout: int | None  # seed; None: as in use


class LoraTraining:
    """A training under way: `steps` yields after each step, `save` and `load` stop it and go on."""

    def __init__(
        self, base: str, data: TrainingData, config: LoraTrainingConfig | None = None, device: str = "auto",
        breathe: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """base: a folder, a Hugging Face id or the default model, as `Encoder` takes it; device: auto, cpu or cuda.

        breathe: called after each chunk of texts, some 50 ms of a core. Raises EncoderError, and TrainingError where
        peft is not installed, no module has a name of `targets`, or there is nothing to train on.
        """
        self.config = config = LoraTrainingConfig() if config is None else config
        self.base, self.data = base, data
        self.done = 0  # steps
        self.first: dict[str, float] = {}  # losses by part of the first step, and of the last one
        self.last: dict[str, float] = {}
        self._breathe = breathe
        self._device = torch.device(pick_device(device))
        wanted = config.precision
        self.precision = wanted if wanted != "auto" else "bfloat16" if self._device.type == "cuda" else "float32"
        if not data.train.problems and not any(len(pairs) >= PARTS_MIN_PAIRS for pairs in data.train.pairs.values()):
            raise TrainingError(
                "there is nothing to train the encoder on: no example of a user with texts, and not two comments or "
                "items in turn. Give it a longer stream"
            )
        torch.set_num_threads(EncoderConfig.threads)
        transformers_logging.disable_progress_bar()
        self._source, self._options = locate(base)
        with loading(base), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed(_START))  # a layer that the files lack (a pooler) is drawn, and written later
            self._tokenizer = AutoTokenizer.from_pretrained(self._source, **self._options)
            model = AutoModel.from_pretrained(self._source, dtype="auto", **self._options)
            self._pooling = read_pooling(self._source, self._options)
        self._model = self._adapted(model).to(self._device).eval()
        self._tokens = self._tokenized(data.texts)
        self._named = [(name, p) for name, p in self._model.named_parameters() if p.requires_grad]
        self._spread = torch.nn.Parameter(torch.zeros(len(PARTS), device=self._device))
        groups = [
            {"params": [p for _, p in self._named], "lr": config.lr},
            {"params": [self._spread], "lr": config.lr_weights},
        ]
        self._optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        self._held = list(self._held_batches())
        self._frozen = self._frozen_vectors()

    # --- the model ---

    def _adapted(self, model: Any) -> Any:
        require_peft()
        from peft import LoraConfig, get_peft_model

        chosen = LoraConfig(
            r=self.config.rank, lora_alpha=self.config.alpha, lora_dropout=0.0, bias="none",
            target_modules=_targets(model, self.base, self.config),
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed(_START))
            return get_peft_model(model, chosen)

    def _tokenized(self, texts: Sequence[str]) -> list[list[int]]:
        cut = self._tokenizer.backend_tokenizer
        cut.no_padding()
        longest = min(self.config.max_tokens, getattr(self._model.config, "max_position_embeddings", 1 << 30))
        cut.enable_truncation(longest)
        return [cut.encode(text.encode("utf-8", "replace").decode()).ids for text in texts]

    def _chunks(self, ids: Array, first: int = 0, view: int | None = None) -> Iterator[_Chunk]:
        """Texts of like length together; places count from `first`."""
        order = np.argsort([len(self._tokens[i]) for i in ids.tolist()], kind="stable")
        for number, start in enumerate(range(0, len(order), self.config.chunk_texts)):
            at = order[start : start + self.config.chunk_texts]
            seed = None if view is None else self._seed(_VIEW, view, number)
            yield _Chunk(at + first, ids[at], seed)

    def _encode(self, chunk: _Chunk) -> torch.Tensor:
        """(m, T) float32 unit vectors of the chunk's texts."""
        rows = [self._tokens[i] for i in chunk.ids.tolist()]
        length = padded(max(map(len, rows)))
        ids = np.full((len(rows), length), self._tokenizer.pad_token_id or 0, np.int64)
        mask = np.zeros((len(rows), length), np.int64)
        for at, row in enumerate(rows):
            ids[at, : len(row)], mask[at, : len(row)] = row, 1
        on = torch.from_numpy(mask).to(self._device)
        cast = torch.autocast(self._device.type, torch.bfloat16) if self.precision == "bfloat16" else nullcontext()
        drawn = torch.random.fork_rng([self._device] if self._device.type == "cuda" else [])
        with drawn if chunk.dropout is not None else nullcontext(), cast:
            if chunk.dropout is not None:
                torch.manual_seed(chunk.dropout)
            self._model.train(chunk.dropout is not None)
            hidden = self._model(input_ids=torch.from_numpy(ids).to(self._device), attention_mask=on).last_hidden_state
        if self._pooling == "cls":
            pooled = hidden[:, 0].float()
        else:
            pooled = (hidden.float() * on[..., None]).sum(1) / on.sum(1, keepdim=True)
        self._breathe()
        return functional.normalize(pooled, dim=1)

    def _vectors(self, chunks: Sequence[_Chunk], count: int) -> torch.Tensor:
        """(count, T) of a batch, without a graph."""
        out = torch.zeros((count, int(self._model.config.hidden_size)), device=self._device)
        with torch.no_grad():
            for chunk in chunks:
                out[torch.from_numpy(chunk.at).to(self._device)] = self._encode(chunk)
        return out

    def _frozen_vectors(self) -> torch.Tensor:
        """(texts, T): of the encoder without adapters, of every text that any batch has; zeros for the others."""
        plan = [self._batch(number) for number in range(self.config.steps * self.config.accumulate)]
        ids = np.unique(np.concatenate([batch.ids for batch in (*plan, *self._held)]))
        out = torch.zeros((len(self.data.texts), int(self._model.config.hidden_size)), device=self._device)
        with self._model.disable_adapter():
            out[torch.from_numpy(ids).to(self._device)] = self._vectors(list(self._chunks(ids)), len(ids))
        return out

    def encode(self, ids: Sequence[int]) -> Array:
        """(n, T) float32: vectors of these texts as the adapters make them now."""
        places = np.array(ids, np.int64)
        vectors: Array = self._vectors(list(self._chunks(places)), len(places)).cpu().numpy()
        return vectors

    # --- batches ---

    def _seed(self, *what: int) -> int:
        told = json.dumps([self.config.seed, *what]).encode()
        return int.from_bytes(hashlib.blake2b(told, digest_size=7).digest(), "little")

    def _draw(self, *what: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=self._seed(*what)))

    def _batch(self, number: int) -> _Batch:
        """The training's batch of this number: the next problem of this round's order, and pairs of each kind."""
        side, draw, problem = self.data.train, self._draw(_PLAN, number), None
        if side.problems:
            epoch, at = divmod(number, len(side.problems))
            problem = side.problems[int(self._draw(_ORDER, epoch).permutation(len(side.problems))[at])]
        pairs = {
            kind: rows[np.sort(draw.permutation(len(rows))[: self.config.pairs])] for kind, rows in side.pairs.items()
        }
        return _batch_of(problem, pairs, np.sort(draw.permutation(side.views)[: self.config.pairs]))

    def _held_batches(self) -> Iterator[_Batch]:
        """What is held out, in order, in batches like the training's."""
        side, size = self.data.held, self.config.pairs
        batches = max([len(side.problems), *(-(-len(rows) // size) for rows in (*side.pairs.values(), side.views))])
        for number in range(min(batches, HELD_BATCHES_MAX)):
            problem = side.problems[number] if number < len(side.problems) else None
            part = slice(number * size, (number + 1) * size)
            yield _batch_of(problem, {kind: rows[part] for kind, rows in side.pairs.items()}, side.views[part])

    def _laid(self, batch: _Batch, number: int) -> tuple[list[_Chunk], int]:
        """The chunks of a batch and its number of vectors: its texts as in use, then its views by two dropouts."""
        texts, views = len(batch.ids), len(batch.views)
        chunks = list(self._chunks(batch.ids))
        for look in (0, 1):
            chunks += self._chunks(batch.views, texts + look * views, 2 * number + look)
        return chunks, texts + 2 * views

    # --- the loss ---

    def _losses(self, batch: _Batch, v: torch.Tensor) -> dict[str, torch.Tensor]:
        """By part, of the vectors that `_laid` lays out."""
        texts, views = len(batch.ids), len(batch.views)
        losses: dict[str, torch.Tensor] = {}
        if batch.problem is not None:
            losses[REC] = self._softmax(batch.problem, batch.ids, v)
        for kind, rows in batch.pairs.items():
            if len(rows) >= PARTS_MIN_PAIRS:
                left, right = (v[self._places(batch.ids, rows[:, side])] for side in (0, 1))
                losses[kind] = self._contrast(left, right, _alike(rows))
        if views >= PARTS_MIN_PAIRS:
            first, second = v[texts : texts + views], v[texts + views :]
            losses[VIEWS] = self._contrast(first, second, np.zeros((views, views), np.bool_))
        away = v[:texts] - self._frozen[torch.from_numpy(batch.ids).to(self._device)]
        losses[ANCHOR] = (away * away).sum(1).mean()
        return losses

    def _places(self, ids: Array, texts: Array) -> torch.Tensor:
        return torch.from_numpy(np.searchsorted(ids, texts)).to(self._device)

    def _softmax(self, problem: TextProblem, ids: Array, v: torch.Tensor) -> torch.Tensor:
        def given(values: Array) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(self._device)

        weight = given(problem.weight)[..., None]
        told = self._places(ids, problem.told)
        before = self._frozen[torch.from_numpy(problem.told.astype(np.int64)).to(self._device)]
        words = given(problem.words) + (weight * (v[told] - before)).sum(1)
        own = given(problem.offset_target) + (words * v[self._places(ids, problem.target)]).sum(1)
        others = given(problem.offset) + words @ v[self._places(ids, problem.candidate)].T + problem.log_weight
        return (torch.logsumexp(torch.cat((own[:, None], others), 1), 1) - own).mean()

    def _contrast(self, left: torch.Tensor, right: torch.Tensor, alike: Array) -> torch.Tensor:
        """InfoNCE both ways. alike: (n, n) bool, pairs that are no negatives of each other."""
        logits = (left @ right.T / self.config.temperature).masked_fill(
            torch.from_numpy(alike).to(self._device), -torch.inf
        )
        own = torch.arange(len(left), device=self._device)
        return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2

    def _total(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        total = self.config.anchor * losses[ANCHOR]
        for at, part in enumerate(PARTS):
            if part in losses:
                total = total + torch.exp(-self._spread[at]) * losses[part] + self._spread[at] / 2
        return total

    # --- training ---

    def steps(self) -> Iterator[LoraStep]:
        """Trains from where it is to the configured number of steps. Raises TrainingError where it diverges."""
        while self.done < self.config.steps:
            yield self._step()

    def _step(self) -> LoraStep:
        number, count = self.done, self.config.accumulate
        share = (number + 1) / self.config.steps
        pace = min(share / WARM_UP, (1 - number / self.config.steps) / (1 - WARM_UP))
        for group, lr in zip(self._optimizer.param_groups, (self.config.lr, self.config.lr_weights), strict=True):
            group["lr"] = lr * min(1.0, pace)
        self._optimizer.zero_grad()
        sums: dict[str, list[float]] = {}
        texts = 0
        for at in range(count):
            losses, trained = self._accumulate(number * count + at, 1 / count)
            texts += trained
            for part, loss in losses.items():
                sums.setdefault(part, []).append(loss)
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in self._named], GRADIENT_MAX)
        means = {part: sum(some) / len(some) for part, some in sums.items()}
        _require_finite({**means, "gradient": float(norm)}, f"before step {number + 1}")
        weights = torch.exp(-self._spread.detach()).tolist()
        self._optimizer.step()
        with torch.no_grad():
            self._spread.clamp_(*SPREAD_BOUNDS)
        self.done += 1
        self.first, self.last = self.first or means, means
        told = {part: weight for part, weight in zip(PARTS, weights, strict=True) if part in means}
        return LoraStep(number, means, told, texts)

    def _accumulate(self, number: int, share: float, *, cached: bool = True) -> tuple[dict[str, float], int]:
        """Adds a batch's gradient, times `share`; its losses by part, and its texts. Not cached: by one whole graph."""
        batch = self._batch(number)
        chunks, count = self._laid(batch, number)
        if cached:
            v = self._vectors(chunks, count).requires_grad_()
        else:
            order = torch.from_numpy(np.argsort(np.concatenate([chunk.at for chunk in chunks]))).to(self._device)
            v = torch.cat([self._encode(chunk) for chunk in chunks])[order]
        losses = self._losses(batch, v)
        if not number:
            self._begin(losses)
        (share * self._total(losses)).backward()  # type: ignore[no-untyped-call]
        if cached:
            assert v.grad is not None
            for chunk in chunks:
                wanted = v.grad[torch.from_numpy(chunk.at).to(self._device)]
                self._encode(chunk).backward(wanted)  # type: ignore[no-untyped-call]
        return {part: float(loss.detach()) for part, loss in losses.items()}, count

    def _begin(self, losses: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for at, part in enumerate(PARTS):
                if part in losses:
                    self._spread[at] = torch.log(2 * losses[part].detach().clamp_min(1e-3))
            self._spread.clamp_(*SPREAD_BOUNDS)

    def held_out(self) -> dict[str, float]:
        """Mean losses by part of what is held out, as the adapters are now. Raises TrainingError where one is none."""
        sums: dict[str, list[float]] = {}
        for number, batch in enumerate(self._held):
            chunks, count = self._laid(batch, -1 - number)
            with torch.no_grad():
                for part, loss in self._losses(batch, self._vectors(chunks, count)).items():
                    sums.setdefault(part, []).append(float(loss))
        means = {part: sum(some) / len(some) for part, some in sums.items()}
        _require_finite(means, f"on what is held out, after {self.done} steps,")
        return means

    @property
    def weights(self) -> dict[str, float]:
        """exp(-s) by part, as learnt so far."""
        return dict(zip(PARTS, torch.exp(-self._spread.detach()).tolist(), strict=True))

    # --- stop and go on ---

    def save(self) -> bytes:
        """The state: adapters, s, the optimizer's moments, how many steps were done."""
        out = io.BytesIO()
        told = {"done": self.done, "first": self.first, "last": self.last}
        weights = {name: p.detach().cpu() for name, p in self._named}
        optimizer = self._optimizer.state_dict()
        torch.save({**told, "spread": self._spread.detach().cpu(), "weights": weights, "optimizer": optimizer}, out)
        return out.getvalue()

    def load(self, saved: bytes) -> None:
        """Goes on from a saved state of the same data, base and configuration. Raises TrainingError."""
        try:
            state = torch.load(io.BytesIO(saved), map_location=self._device, weights_only=True)
            with torch.no_grad():
                for name, p in self._named:
                    p.copy_(state["weights"][name])
                self._spread.copy_(state["spread"])
            self._optimizer.load_state_dict(state["optimizer"])
            self.done, self.first, self.last = int(state["done"]), state["first"], state["last"]
        except Exception as problem:  # torch tells damage in many ways
            raise TrainingError(f"the saved state of the training cannot be read: {problem}") from problem

    # --- what comes of it ---

    def write(self, folder: Path) -> str:
        """The trained encoder into the empty folder, for `Encoder`: the model with the adapters in it, its tokenizer
        and pooling; and the adapters apart (`adapter`, as peft has them). The digest of the adapters' file.

        The training is over afterwards.
        """
        adapter = folder / ADAPTER_FOLDER
        self._model.save_pretrained(adapter)
        digest = hashlib.blake2b((adapter / "adapter_model.safetensors").read_bytes(), digest_size=16).hexdigest()
        (adapter / "README.md").unlink(missing_ok=True)  # peft's empty form of a model card
        self._model.merge_and_unload().cpu().save_pretrained(folder)
        AutoTokenizer.from_pretrained(self._source, **self._options).save_pretrained(folder)
        for name in (*BESIDE, *self._pooling_files()):
            told = read_model_json(self._source, name, self._options)
            if told is not None:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        return digest

    def _pooling_files(self) -> list[str]:
        modules = read_model_json(self._source, MODULES_FILE, self._options) or []
        return [f"{m['path']}/config.json" for m in modules if str(m["type"]).endswith("Pooling")]

    def facts(self) -> dict[str, Any]:
        """Configuration, precision and device, for a manifest."""
        return {**asdict(self.config), "precision": self.precision, "device": self._device.type}


def require_peft() -> None:
    """Raises TrainingError where peft is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise TrainingError("training inside the encoder needs its package: pip install 'headwater[lora]'") from None


def require_targets(base: str, config: LoraTrainingConfig) -> None:
    """Raises TrainingError where no module of the model has a name of `targets`, and EncoderError; reads no weights."""
    source, options = locate(base)
    with loading(base), torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(source, **options))
    _targets(model, base, config)


def _targets(model: Any, base: str, config: LoraTrainingConfig) -> list[str]:
    """Full names of the linear modules of the chosen layers that get adapters."""
    layer_of = {name: _layer(name) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    first = int(model.config.num_hidden_layers) - config.layers if config.layers else 0
    within = [name for name, layer in layer_of.items() if layer is not None and layer >= first]
    ends = tuple(f".{target}" for target in config.targets)
    chosen = within if config.targets == (ALL_LINEAR,) else [name for name in within if name.endswith(ends)]
    if not chosen:
        linear = sorted({name.rsplit(".", 1)[-1] for name in within})
        among = f"its upper {config.layers} layers" if config.layers else "its layers"
        raise TrainingError(
            f"encoder {base!r} has no linear modules that are called {', '.join(config.targets)} in {among}: choose of "
            f"{', '.join(linear)}, or {ALL_LINEAR}" if linear else
            f"encoder {base!r} has no linear modules in {among}: give --layers 0, or choose another encoder"
        )  # fmt: skip
    return chosen


def _layer(name: str) -> int | None:
    """Number of the layer that a module is in, as its name tells; None for one outside of them.

    >>> _layer("encoder.layer.11.output.dense"), _layer("pooler.dense")
    (11, None)
    """
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _require_finite(figures: dict[str, float], when: str) -> None:
    broken = [name for name, figure in figures.items() if not math.isfinite(figure)]
    if broken:
        raise TrainingError(
            f"the training has diverged: {when} {', '.join(broken)} is no finite number. Begin anew with a smaller "
            "step size (--lr)"
        )


def _batch_of(problem: TextProblem | None, pairs: dict[str, Array], views: Array) -> _Batch:
    ids = [rows[:, :2].ravel() for rows in pairs.values()]
    if problem is not None:
        ids += [problem.told.ravel(), problem.target, problem.candidate]
    return _Batch(problem, pairs, views, np.unique(np.concatenate([*ids, views]).astype(np.int64)))


def _alike(rows: Array) -> Array:
    """(n, n) bool: which two pairs share a text or a group; a pair is its own positive."""
    left, right, group = rows.T
    same: Array = (left[:, None] == left) | (right[:, None] == right) | ((group[:, None] == group) & (group >= 0))
    np.fill_diagonal(same, val=False)
    return same
