"""`headwater encoder train`: what model.lora trains on, from recorded files or the logs, and what it leaves behind.

The stream is learnt once as it was, by the workers' own fold and learner: each message leaves the problem that its loss
was made of, and each event its pairs of texts. Of both a bounded sample is kept, those with the lowest hash of their
position: a function of the stream. The last tenth of the events is held out.

    OUT/                  the trained encoder, as `HEADWATER_ENCODER` takes it
    OUT/adapter/          its adapters apart, as peft has them (safetensors)
    OUT/manifest.json     what it was trained on and what came of it
    OUT/events/           TensorBoard's event files
    .OUT.training/        beside it, while the training goes on: its state. It holds weights and offsets, no text, and
                          is one process's at a time

OUT is written under another name and moved into place, so that a folder of this name is whole.
"""

import asyncio
import fcntl
import hashlib
import heapq
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Generic, NamedTuple, TypeVar

import msgspec
import numpy as np
from aiokafka.errors import KafkaError

from model import kernels, texts
from model.encoder import TRAINED, Encoder, own_model
from model.evaluate import CREATED, SCORED
from model.examples import new_examples
from model.learner import Learner, warm_up
from model.lora import (
    PAIRS,
    LoraTraining,
    LoraTrainingConfig,
    TextProblem,
    TrainingData,
    TrainingError,
    TrainingSet,
    require_peft,
    require_targets,
)
from state.rows import COMMENTS_MAX
from streams import codec, evaluate, examples, kafka, space, topics
from streams.codec import Record
from streams.evaluate import Run, Stream
from streams.events import Click, Comment, Erasure, Item
from streams.pipeline import Learnt
from streams.settings import Fault, Settings, cache_dir
from streams.tracking import Tracking
from streams.worker import crash_at

MANIFEST_VERSION: Final = 1
SESSION_S: Final = 1800.0  # items of one user closer than this are neighbours
HELD_SHARE: Final = 0.1  # of the events, the last ones
SAVE_STEPS: Final = 16
STATE_FILE: Final = "state.pt"
FACTS_FILE: Final = "facts.json"
SOURCES: Final = ("items", "clicks", "comments", "erasures")  # in the order of reading: erasures as late as can be
PROBES: Final = 16  # texts that a trained encoder has to read before it is left
V = TypeVar("V")
Progress = evaluate.Progress


@dataclass(frozen=True)
class TrainOptions:
    """What `headwater encoder train` is asked for."""

    out: Path
    items: Path | None = None  # with `events`: recorded files; None: the logs of the deployment
    events: Path | None = None
    until: int | None = None  # events
    share: float = 0.25  # of a core, on a CPU
    config: LoraTrainingConfig = field(default_factory=LoraTrainingConfig)

    @property
    def of_logs(self) -> bool:
        """Whether the stream is read from the deployment."""
        return self.items is None or self.events is None


@dataclass(frozen=True)
class BufferConfig:
    """What is kept of a stream to be trained on; of what is held out, HELD_SHARE of it."""

    problems: int = 256  # messages
    examples: int = 16  # of a message
    candidates: int = 64  # of a message: each is a text to encode
    told: int = 12  # texts of an example's words, the heaviest
    pairs: int = 4096  # of each kind
    views: int = 4096  # texts


class Source(NamedTuple):
    """Where a training's data come from: the stream with its digest, and what of the logs or files it covers."""

    stream: Stream
    covered: dict[str, Any]
    told: str  # where from, in words


class Sample(Generic[V]):
    """At most `size` values out of all that were offered: those with the lowest hash of their position."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._heap: list[tuple[int, int]] = []  # (-priority, position): the worst one first
        self._kept: dict[int, V] = {}

    def wants(self, position: int) -> bool:
        """Whether an offer for this position would be taken."""
        if position in self._kept or not self._size:
            return False
        return len(self._heap) < self._size or -_priority(position) > self._heap[0][0]

    def offer(self, position: int, value: V) -> None:
        """Takes the value in if its turn has come."""
        if not self.wants(position):
            return
        entry = (-_priority(position), position)
        if len(self._heap) < self._size:
            heapq.heappush(self._heap, entry)
        else:
            del self._kept[heapq.heapreplace(self._heap, entry)[1]]
        self._kept[position] = value

    def values(self) -> list[V]:
        """In order of their positions."""
        return [self._kept[position] for position in sorted(self._kept)]


def _priority(position: int) -> int:
    return int.from_bytes(hashlib.blake2b(position.to_bytes(8, "little"), digest_size=8).digest(), "little")


# -- what there is to train on


class _Side:
    """The samples of the training, or of what is held out."""

    def __init__(self, buffer: BufferConfig, share: float) -> None:
        self.problems: Sample[TextProblem] = Sample(max(1, round(share * buffer.problems)))
        self.pairs: dict[str, Sample[tuple[int, int, int]]] = {
            kind: Sample(max(2, round(share * buffer.pairs))) for kind in PAIRS
        }
        self.views: Sample[int] = Sample(max(2, round(share * buffer.views)))

    def ids(self) -> Iterator[int]:
        for problem in self.problems.values():
            for ids in (problem.told, problem.target, problem.candidate):
                yield from ids.ravel().tolist()
        for sample in self.pairs.values():
            for left, right, _ in sample.values():
                yield left
                yield right
        yield from self.views.values()

    def numbered(self, place: dict[int, int]) -> TrainingSet:
        """With the texts' places in the data."""

        def placed(ids: Any) -> Any:
            return np.array([place[i] for i in ids.ravel().tolist()], np.int32).reshape(ids.shape)

        problems = [
            problem._replace(
                told=placed(problem.told), target=placed(problem.target), candidate=placed(problem.candidate)
            )
            for problem in self.problems.values()
        ]
        pairs = {
            kind: np.array(
                [(place[left], place[right], group) for left, right, group in sample.values()], np.int64
            ).reshape(-1, 3)
            for kind, sample in self.pairs.items()
        }
        return TrainingSet(problems, pairs, np.array(sorted(place[i] for i in self.views.values()), np.int64))


class _Gathering:
    """A learner for `evaluate.Run` that keeps what it learns from by texts."""

    def __init__(self, run: Run, last: int, buffer: BufferConfig) -> None:
        self._inner = run.learner
        self._stream, self._buffer = run.stream, buffer
        self._held_from = int(last * (1 - HELD_SHARE))
        self._sides = (_Side(buffer, 1.0), _Side(buffer, HELD_SHARE))
        self._probe = new_examples(run.config, 0)
        self._ids: dict[str, int] = {}  # of the texts
        self._item: dict[str, int] = {}  # text of an item that has one, and no vector of its own
        for item in run.stream.items:
            self._item.pop(item.item_id, None)
            if item.text.strip() and item.vector is None:
                self._item[item.item_id] = self._id(item.text)
        self._told: dict[str, list[tuple[int, float, int]]] = {}  # user's comments: (event, ts, text)
        self._last: dict[str, tuple[float, int]] = {}  # user's last item: (ts, text)
        self._users: dict[str, int] = {}
        self._seen: set[int] = set()  # texts
        self._passed = 0  # events

    @property
    def learner(self) -> Learner:
        return self._inner.learner

    def learn(self, offset: int, message: bytes) -> Learnt:
        learnt = self._inner.learn(offset, message)
        if learnt.examples:
            self._take(message)
        return learnt

    def data(self) -> TrainingData:
        """What was kept."""
        used = sorted({i for side in self._sides for i in side.ids()})
        place = {i: at for at, i in enumerate(used)}
        words = list(self._ids)
        return TrainingData([words[i] for i in used], *(side.numbered(place) for side in self._sides))

    def _id(self, text: str) -> int:
        return self._ids.setdefault(text, len(self._ids))

    def _take(self, message: bytes) -> None:
        batch = examples.unpack_examples(message, self._probe, np.full(len(examples.TOPICS), -1, np.int64))
        events = batch.source[: batch.count] & ((1 << 48) - 1)
        last = int(events.max())
        while self._passed <= last:
            self._pass(self._passed)
            self._passed += 1
        side = self._sides[last >= self._held_from]
        if side.problems.wants(last):
            problem = self._problem(batch, events)
            if problem is not None:
                side.problems.offer(last, problem)

    def _pass(self, k: int) -> None:
        """The pairs that an event makes with what its user did before."""
        event, side = self._stream.events[k], self._sides[k >= self._held_from]
        item = self._item.get(event.item_id) if event.item_id else None
        if item is not None:
            self._look(item, k)
        if isinstance(event, Comment) and event.text.strip():
            text = self._id(event.text)
            self._look(text, k)
            user = self._users.setdefault(event.user_id, len(self._users))
            before = self._told.setdefault(event.user_id, [])
            if item is not None and item != text:
                side.pairs["comment_item"].offer(k, (text, item, item))
            if before and before[-1][2] != text:
                side.pairs["comment_comment"].offer(k, (before[-1][2], text, user))
            before.append((k, event.ts, text))
        if item is not None and self._stream.trace.kind[k] in (SCORED, CREATED):
            ts, other = self._last.get(event.user_id, (-np.inf, item))
            if other != item and event.ts - ts <= SESSION_S:
                side.pairs["item_item"].offer(k, (other, item, -1))
            self._last[event.user_id] = (event.ts, item)

    def _look(self, text: int, k: int) -> None:
        if text not in self._seen:
            self._seen.add(text)
            self._sides[k >= self._held_from].views.offer(text, text)

    def _problem(self, batch: Any, events: Any) -> TextProblem | None:
        """The last message's, by texts. None where no target or no candidate has a text."""
        found = self.learner.problem()
        if found is None:
            return None
        sources, names = self.learner.sources(batch), self.learner.matrix.names

        def texts_of(rows: Any) -> Any:
            return np.array([self._item.get(names[row], -1) for row in rows.tolist()], np.int32)

        candidate, target = texts_of(found.candidate), texts_of(found.target)
        chosen, shown = np.flatnonzero(target >= 0), np.flatnonzero(candidate >= 0)
        if not len(chosen) or not len(shown):
            return None
        chosen = chosen[:: -(-len(chosen) // self._buffer.examples)]
        shown = shown[:: -(-len(shown) // self._buffer.candidates)]
        told = np.repeat(target[chosen, None], self._buffer.told, axis=1)
        weight = np.zeros(told.shape, np.float32)
        for at, n in enumerate(chosen.tolist()):
            b = int(sources.example[n])
            parts = self._own(int(events[b]), float(batch.text_weight[b]), float(sources.own_scale[n]))
            for row, scale in zip(sources.history[n].tolist(), sources.history_scale[n].tolist(), strict=True):
                text = self._item.get(names[row], -1) if row >= 0 else -1
                if text >= 0 and scale:
                    parts.append((text, scale))
            parts.sort(key=lambda part: (-abs(part[1]), part[0]))
            for slot, (text, scale) in enumerate(parts[: self._buffer.told]):
                told[at, slot], weight[at, slot] = text, scale
        offset = found.offset[np.ix_(chosen, shown)]
        return TextProblem(
            found.words[chosen], told, weight, target[chosen], candidate[shown],
            np.where(offset <= kernels.CLOSED, -np.inf, offset).astype(np.float32),
            found.offset_target[chosen].astype(np.float32),
            found.log_weight + float(np.log(len(candidate) / len(shown))),
        )  # fmt: skip

    def _own(self, k: int, weight: float, scale: float) -> list[tuple[int, float]]:
        """(text, what it weighs) of the user's newest comments before event k."""
        if not scale or not weight > 0:
            return []
        event = self._stream.events[k]
        visible = [text for at, ts, text in self._told.get(event.user_id, []) if at < k and ts < event.ts]
        newest = visible[: -COMMENTS_MAX - 1 : -1]
        return [(text, scale * float(texts.DECAY) ** age / weight) for age, text in enumerate(newest)]


def gather(
    stream: Stream, encoder: Encoder, settings: Settings, until: int | None = None, buffer: BufferConfig | None = None,
    cache: Path | None = None, progress: Progress = lambda stage, done, total: None,
) -> TrainingData:  # fmt: skip
    """Learns the stream, up to about `until` events, and keeps what the encoder can be trained on.

    cache: where the vectors of all texts are kept for the next run; None: they are written nowhere.
    """
    config = settings.learner_config(encoder.dim)
    run = Run(stream, encoder, settings.evidence_config(), config, rank_sample=0.0)
    run.encode(until, cache, progress)
    warm_up(config)
    last = len(stream.events) if until is None else min(until, len(stream.events))
    gathering = _Gathering(run, last, buffer or BufferConfig())
    run.learner = gathering  # type: ignore[assignment]
    run.advance(until, progress)
    return gathering.data()


# -- where it comes from


def read_files(items: Path, events: Path, settings: Settings) -> Source:
    """Of recorded files, as `headwater evaluate` reads them. Raises StreamError."""
    stream = evaluate.read_stream(items, events, settings.evidence_config())
    files = {"items": items.name, "events": events.name}
    covered = {"files": files, "digest": stream.digest, "events": len(stream.events)}
    return Source(stream, covered, f"the recorded files {items.name} and {events.name}")


async def read_logs(settings: Settings, upto: dict[str, dict[str, int]] | None = None) -> Source:
    """Of a deployment's topics from their beginning to their end, or to `upto`, {topic: {partition: next offset}}.

    Events are in the workers' order of time; those of users who were erased since are left out, whatever `upto` says
    of erasures, and items that were withdrawn. Raises Fault where there is no event, and KafkaError.
    """
    options = settings.kafka_options()
    ends: dict[str, dict[str, int]] = {}
    catalogue: dict[str, Item] = {}
    timed: list[tuple[float, Click | Comment]] = []
    erased: dict[str, float] = {}
    for name in SOURCES:
        ends[name] = {}
        for partition in range(settings.partitions):
            if upto is None or name == "erasures":
                end = await kafka.log_end(options, settings.topic(name), partition)
            else:
                end = upto[name][str(partition)]
            ends[name][str(partition)] = end
            if not end:
                continue
            reading = kafka.read_records(
                options, settings.topic(name), partition, 0, end - 1, isolation_level="read_committed"
            )
            async for records in reading:
                _sort_in(name, records, catalogue, timed, erased)
    events = [event for at, event in sorted(timed, key=lambda one: one[0]) if at > erased.get(event.user_id, -np.inf)]
    if not events:
        raise Fault("the logs hold no click and no comment: there is nothing to train the encoder on yet")
    items = list(catalogue.values())
    hasher = hashlib.blake2b(digest_size=16)
    for one in (*items, *events):
        hasher.update(msgspec.json.encode(one) + b"\n")
    stream = evaluate.stream_of(settings.app_id, items, events, settings.evidence_config(), digest=hasher.hexdigest())
    covered = {"app_id": settings.app_id, "offsets": ends, "digest": stream.digest, "events": len(events)}
    return Source(stream, covered, f"the logs of app id {settings.app_id}")


def _sort_in(
    name: str, records: list[Record], catalogue: dict[str, Item], timed: list[tuple[float, Click | Comment]],
    erased: dict[str, float],
) -> None:  # fmt: skip
    decoded: codec.Decoded[Any] = codec.decode_batch(name, records)  # type: ignore[call-overload]
    for event, record in zip(decoded.events, decoded.records, strict=True):
        if isinstance(event, Item):
            catalogue.pop(event.item_id, None)  # by its last record: compaction may take the others
            catalogue[event.item_id] = event
        elif isinstance(event, Click | Comment | Erasure):
            at = min(event.ts, record.timestamp / 1e3) if record.timestamp >= 0 else event.ts
            if isinstance(event, Erasure):
                erased[event.user_id] = max(at, erased.get(event.user_id, -np.inf))
            else:
                timed.append((at, event))
        else:
            catalogue.pop(event.item_id, None)


# -- the training


class _Cost(NamedTuple):
    """Of the steps of one process."""

    steps: int
    texts: int
    seconds: float
    cpu_s: float


def train(
    options: TrainOptions, settings: Settings, now: Callable[[], float], progress: Progress,
    crash: Callable[[str], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Trains, or goes on with the training that was interrupted, and writes OUT; its manifest.

    What can be checked is checked before the stream is read. crash: called with the name of each step, for tests that
    end the process there. Raises Fault, EncoderError, StreamError.
    """
    crash = crash or crash_at(settings.crash_at)
    require_peft()
    out = options.out.resolve()
    if not out.parent.is_dir():
        raise Fault(f"there is no folder {out.parent}: make it first, or give another --out")
    work = out.parent / f".{out.name}.training"
    with _alone(work, out):
        if out.exists():
            raise Fault(f"{out} is there already: give another --out, or remove it")
        return _train(options, settings, out, work, now, progress, crash)


@contextmanager
def _alone(work: Path, out: Path) -> Iterator[None]:
    """The work folder is this process's until it ends. A folder in which nothing was left is taken away."""
    work.mkdir(exist_ok=True)
    folder = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Fault(f"another process trains {out} already: wait for it, or give another --out") from None
        try:
            yield
        finally:
            with suppress(OSError):
                work.rmdir()
    finally:
        os.close(folder)


def _train(
    options: TrainOptions, settings: Settings, out: Path, work: Path, now: Callable[[], float], progress: Progress,
    crash: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    base, encoder = _base(options, settings)
    require_targets(base, options.config)
    facts, asked = _facts(work), _asked(options, settings, encoder)
    _require_same(work, facts, "asked", asked, "of another encoder, another stream, or with other options")
    source = _read(options, settings, facts.get("offsets"))
    changed = "since then a user was erased, an item was changed or withdrawn, or retention took records"
    of = f"on logs that are others now ({changed})" if options.of_logs else "on other files"
    _require_same(work, facts, "stream", source.stream.digest, of)
    cache = None if options.of_logs else cache_dir() / "vectors"  # what users wrote stays out of a cache
    data = gather(source.stream, encoder, settings, options.until, cache=cache, progress=progress)
    breathe = _breathing(options.share) if encoder.device.type == "cpu" else _no_breath
    training = LoraTraining(base, data, options.config, settings.device, breathe)
    identity = _identity(encoder.name, data, training.facts())
    _require_same(work, facts, "identity", identity, "by another build or on another kind of processor")
    if (work / STATE_FILE).exists():
        training.load((work / STATE_FILE).read_bytes())
    else:
        facts = {
            "asked": asked, "stream": source.stream.digest, "offsets": source.covered.get("offsets"),
            "identity": identity, "held_out": training.held_out(),
        }  # fmt: skip
        _write(work / FACTS_FILE, json.dumps(facts).encode())
    try:
        cost, after = _run(training, work, settings.mlflow, encoder.name, now, progress, crash)
        manifest = {
            **_manifest(training, cost, base, encoder, source), "until": options.until, "identity": identity,
            "counts": _counts(data), "held_out": {"before": facts["held_out"], "after": after}, "created": now(),
        }  # fmt: skip
        manifest = _publish(training, encoder, data.texts[:PROBES], out, work, manifest, crash)
    except TrainingError:  # it has diverged: it would do so again from its state
        shutil.rmtree(work)
        raise
    shutil.rmtree(work)
    return manifest


def _manifest(training: LoraTraining, cost: _Cost, base: str, encoder: Encoder, source: Source) -> dict[str, Any]:
    """What the training tells of itself, its base and its stream."""
    return {
        "version": MANIFEST_VERSION, "base": encoder.name, "base_model": base,
        "parent": encoder.name if encoder.trained_on else "",
        "trained_on": "; before that on ".join(filter(None, (source.told, encoder.trained_on))),
        "covered": source.covered, "seed": training.config.seed, "config": training.facts(),
        "losses": {"before": training.first, "after": training.last}, "weights": training.weights,
        "training": {
            "steps": training.done, "steps_of_this_run": cost.steps, "texts": cost.texts, "seconds": cost.seconds,
            "cpu_s": cost.cpu_s, "texts_per_s": cost.texts / max(1e-3, cost.seconds),
        },
    }  # fmt: skip


def _base(options: TrainOptions, settings: Settings) -> tuple[str, Encoder]:
    """The model that is trained, as HEADWATER_ENCODER names it, and as an encoder: an alignment's without its map.

    Raises Fault where the stream is a deployment's, whose encoder is another one.
    """
    if options.of_logs:
        topics.require(settings, (*SOURCES, settings.internal_topic(space.TOPIC).removeprefix(settings.topic_prefix)))
    encoder = Encoder(settings.encoder, device=settings.device)
    if options.of_logs:
        try:
            current = asyncio.run(space.of_deployment(settings)).current
        except KafkaError as problem:
            raise topics.unreachable(settings, problem) from problem
        if current is not None and current.encoder != encoder.name:
            raise Fault(
                f"the encoder of app id {settings.app_id} is {current.encoder}, and HEADWATER_ENCODER gives "
                f"{encoder.name}: set it to {current.model or 'the one in use'}"
            )
    base = own_model(settings.encoder)
    return base, encoder if base == settings.encoder else Encoder(base, device=settings.device)


def _require_same(work: Path, facts: dict[str, Any], what: str, value: str, of: str) -> None:
    """Raises Fault where the state in the folder is of another one."""
    if facts and facts.get(what) != value:
        raise Fault(
            f"{work} holds the state of a training {of}. Ask for the same again; or remove that folder, and it begins "
            "anew; or give another --out"
        )


def _asked(options: TrainOptions, settings: Settings, encoder: Encoder) -> str:
    """A digest of all that a training is a function of, save the stream."""
    learner, evidence = settings.learner_config(encoder.dim), settings.evidence_config()
    where = settings.app_id if options.of_logs else ""
    told = [encoder.name, encoder.device.type, where, options.until, options.config, learner, evidence]
    return hashlib.blake2b(msgspec.json.encode(told, order="deterministic"), digest_size=16).hexdigest()


def _read(options: TrainOptions, settings: Settings, upto: dict[str, dict[str, int]] | None) -> Source:
    if options.items is not None and options.events is not None:
        return read_files(options.items, options.events, settings)
    try:
        return asyncio.run(read_logs(settings, upto))
    except KafkaError as problem:
        raise topics.unreachable(settings, problem) from problem


def _run(
    training: LoraTraining, work: Path, mlflow: str, base: str, now: Callable[[], float], progress: Progress,
    crash: Callable[[str], None],
) -> tuple[_Cost, dict[str, float]]:  # fmt: skip
    """Trains to the end; what it cost, and the losses on what is held out."""
    tracking = Tracking(work / "events", mlflow, {"encoder": base}, now)
    try:
        cost = _steps(training, work, tracking, now, progress, crash)
        after = training.held_out()
        for part, loss in after.items():
            tracking.figure(f"encoder/held_out_{part}", loss, training.done)
    finally:
        tracking.close()
    return cost, after


def _steps(
    training: LoraTraining, work: Path, tracking: Tracking, now: Callable[[], float], progress: Progress,
    crash: Callable[[str], None],
) -> _Cost:  # fmt: skip
    """The steps that are left, with the state saved every SAVE_STEPS of them."""
    first, began, cpu, texts = training.done, now(), time.process_time(), 0
    for step in training.steps():
        texts += step.texts
        for part, loss in step.losses.items():
            tracking.figure(f"encoder/loss_{part}", loss, step.number)
        for part, weight in step.weights.items():
            tracking.figure(f"encoder/weight_{part}", weight, step.number)
        tracking.figure("encoder/texts_per_s", texts / max(1e-3, now() - began), step.number)
        progress("train", training.done, training.config.steps)
        crash("train")
        if training.done % SAVE_STEPS == 0 or training.done == training.config.steps:
            _write(work / STATE_FILE, training.save(), crash)
            tracking.flush()
    return _Cost(training.done - first, texts, now() - began, time.process_time() - cpu)


def _counts(data: TrainingData) -> dict[str, int]:
    return {
        "texts": len(data.texts), "problems": len(data.train.problems),
        "examples": sum(len(problem.words) for problem in data.train.problems),
        **{kind: len(pairs) for kind, pairs in data.train.pairs.items()},
        "views": len(data.train.views), "held_out_problems": len(data.held.problems),
    }  # fmt: skip


def _publish(
    training: LoraTraining, base: Encoder, probes: list[str], out: Path, work: Path, manifest: dict[str, Any],
    crash: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Raises TrainingError where the encoder makes nothing of one of the `probes` that its base makes a vector of."""
    fresh = out.parent / f".{out.name}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    digest = training.write(fresh)
    crash("weights")
    made = Encoder(str(fresh), device="cpu")
    if (base.encode(probes).any(axis=1) & ~made.encode(probes).any(axis=1)).any():
        shutil.rmtree(fresh)
        raise TrainingError("the training has diverged: the encoder's vectors are nothing. Begin anew with a smaller "
                            "step size (--lr)")  # fmt: skip
    manifest = {"name": f"{out.name}:{made.name.rsplit(':', 1)[-1]}", "digest": digest, **manifest}
    (fresh / TRAINED).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    shutil.copytree(work / "events", fresh / "events")
    crash("manifest")
    for path in (*fresh.rglob("*"), fresh):
        _sync(path)
    fresh.rename(out)
    _sync(out.parent)
    return manifest


def _facts(work: Path) -> dict[str, Any]:
    try:
        told: dict[str, Any] = json.loads((work / FACTS_FILE).read_bytes())
    except FileNotFoundError:
        return {}
    return told


def _identity(base: str, data: TrainingData, facts: dict[str, Any]) -> str:
    """Of all that the trained weights are a function of."""
    hasher = hashlib.blake2b(json.dumps([base, facts, data.texts]).encode(), digest_size=16)
    for side in (data.train, data.held):
        for arrays in (*side.problems, tuple(side.pairs[kind] for kind in PAIRS), (side.views,)):
            for array in arrays:
                hasher.update(np.ascontiguousarray(array).tobytes())
    return hasher.hexdigest()


def _write(path: Path, content: bytes, crash: Callable[[str], None] = lambda step: None) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_bytes(content)
    _sync(fresh)
    crash("state")
    fresh.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """A file, or a folder's entries."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _no_breath() -> None:
    """On a GPU nobody's core is taken."""


def _breathing(share: float) -> Callable[[], None]:
    """Sleeps so long that the thread takes `share` of a core."""
    began = time.thread_time()

    def breathe() -> None:
        nonlocal began
        time.sleep((time.thread_time() - began) * (1 / share - 1))
        began = time.thread_time()

    return breathe
