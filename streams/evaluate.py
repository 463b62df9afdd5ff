"""Prequential evaluation of a recorded stream, without a broker: every event is a test first, then learnt.

The fold of events into user rows, the messages of the examples log and the learner are the workers' own
(`streams.pipeline`); this module only feeds them from files and asks for every target to be ranked. Which events are
tests is decided by `model.evaluate.trace`, from the events alone.

One message holds MESSAGE_EXAMPLES_MAX examples and is learnt before the next event is folded; a user's own state is
never behind. A run is a function of the two files, the encoder and the configuration: it ends in the same digest
every time, also when it was stopped at a message's end and went on from the saved state.
"""

import gzip
import hashlib
import json
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple, Self, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from model import baselines
from model.adapter import Adapter
from model.evaluate import (
    ARMS,
    CREATED,
    LOW,
    SCORED,
    DriftMonitor,
    Metrics,
    Report,
    Trace,
    ab,
    calibration,
    mcnemar,
    trace,
)  # fmt: skip
from model.examples import new_examples
from model.kernels import LISTED
from model.learner import HALF_LIVES_POSITIVES, LearnerConfig, Outcome, warm_up
from streams import codec, examples, pipeline
from streams import report as html_report
from streams.encoding import Encoder, item_vector
from streams.events import Click, Comment, Item
from streams.pipeline import EvidenceConfig, ItemLearner, SourceEvent
from streams.vectors import VectorCache, encode_in_blocks

Array: TypeAlias = npt.NDArray[Any]
F4: TypeAlias = npt.NDArray[np.float32]
Progress: TypeAlias = Callable[[str, int, int], None]  # (stage, done, in all)

PARTITION: Final = 0  # a file is one partition
LINE_BYTES_MAX: Final = 4_000_000
GZIP_MAGIC: Final = b"\x1f\x8b"
TIMED_MESSAGES: Final = 100  # learnt once more without ranking, to tell the two costs apart
CHECKPOINT_VERSION: Final = 2
NO_RECORD_S: Final = -1.0  # to the codec: no record's timestamp stands for a `ts` that is missing


class StreamError(ValueError):
    """A recorded stream, or a saved run, that cannot be used: what, where, what to do."""


@dataclass(frozen=True)
class EvaluateOptions:
    """What `headwater evaluate` is asked for."""

    items: Path
    events: Path
    report: Path | None = None
    ranks: Path | None = None
    html: Path | None = None
    baselines: tuple[str, ...] = tuple(baselines.BASELINES)
    until: int | None = None  # events: stop at the last message that ends at or before it
    checkpoint: Path | None = None  # folder: save the state at the end
    resume: Path | None = None  # folder: go on from a saved state
    cache: Path | None = None  # folder of the vector cache
    adapter: Adapter | None = None  # texts are compared through it from the first event on
    has_rival: bool = False  # a second run, with `rival`, is held against the first one
    rival: Adapter | None = None  # None: the encoder as it is


class Stream(NamedTuple):
    """A recorded stream, read and checked; n events, in the file's order."""

    name: str
    items: list[Item]  # in the order in which they enter
    events: list[Click | Comment]
    lines: Array  # (n,) int64: line in the events file, from 0
    trace: Trace
    rejects: int  # lines that the stream would have sent to a dead-letter topic
    digest: str  # of both files


def parse_baselines(names: str) -> tuple[str, ...]:
    """The names of `--baselines all|none|a,b`. Raises ValueError for an unknown one."""
    if names in ("all", "none"):
        return tuple(baselines.BASELINES) if names == "all" else ()
    chosen = tuple(name.strip() for name in names.split(",") if name.strip())
    for name in chosen:
        if name not in baselines.BASELINES:
            raise ValueError(f"no baseline {name!r}; there are all, none or {', '.join(baselines.BASELINES)}")
    return chosen


def evaluate(
    options: EvaluateOptions,
    encoder: Encoder,
    evidence: EvidenceConfig,
    config: LearnerConfig,
    progress: Progress = lambda stage, done, total: None,
) -> Report:
    """Runs the stream and gives the report; writes the files that the options name.

    The report is the public contract's, with `tests`, the state's `digest`, the costs and what drifted beside it.
    Raises StreamError.
    """
    stream = read_stream(options.items, options.events, evidence)
    run = Run(stream, encoder, evidence, config, options.adapter)
    if options.resume is not None:
        run.load(options.resume)
    run.encode(options.until, options.cache, progress)
    warm_up(config)
    run.advance(options.until, progress)
    if options.checkpoint is not None:
        run.save(options.checkpoint)
    report = run.report(options.baselines, progress)
    arms: ArmRanks | None = None
    if options.has_rival:
        rival = Run(stream, encoder, evidence, config, options.rival)
        rival.encode(options.until, options.cache, progress)
        rival.advance(options.until, progress)
        arms = ArmRanks.of(run, rival)
        report["ab"] = {"encoders": {"a": run.encoder_name, "b": rival.encoder_name}, **arms.report()}
    if options.report is not None:
        options.report.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if options.html is not None:
        options.html.write_text(html_report.render(report, run.records()), encoding="utf-8")
    if options.ranks is not None:
        run.write_ranks(options.ranks, arms)
    return report


def arm_of(user_id: str) -> int:
    """0 or 1: a user's arm, whoever else there is; half of the users each."""
    return hashlib.blake2b(user_id.encode(), digest_size=1).digest()[0] & 1


class ArmRanks(NamedTuple):
    """An A/B test on a stream: users split by hash, the tests of both runs beside each other."""

    first: Array  # (n,) ranks of the run of arm a, NaN where there is no test
    second: Array  # (n,) of arm b
    user: Array  # (n,) numbers
    arm: Array  # (n,) 0 or 1

    @classmethod
    def of(cls, first: "Run", second: "Run") -> Self:
        """Of two runs of one stream."""
        events = first.stream.events[: first.done]
        arm = np.array([arm_of(event.user_id) for event in events], np.int8)
        is_test = first.stream.trace.kind[: first.done] == SCORED
        one, other = (np.where(is_test, run.rank[: first.done], np.nan) for run in (first, second))
        return cls(one, other, first.stream.trace.user[: first.done], arm)

    def report(self) -> Report:
        """`model.evaluate.ab` of the tests."""
        tests = np.flatnonzero(~np.isnan(self.first))
        return ab(self.first[tests], self.second[tests], self.user[tests], self.arm[tests])


def read_stream(items_path: Path, events_path: Path, evidence: EvidenceConfig) -> Stream:
    """Reads and checks both files, and lays the protocol over the events. Raises StreamError."""
    hasher = hashlib.blake2b(digest_size=16)
    items: list[Item] = []
    rejects = 0
    for _, line in _lines(items_path, hasher):
        item = codec.validate("items", line, NO_RECORD_S)
        if isinstance(item, Item):
            items.append(item)
        else:
            rejects += 1
    events: list[Click | Comment] = []
    lines: list[int] = []
    first_fault = ""
    for number, line in _lines(events_path, hasher):
        event = codec.validate_event(line, NO_RECORD_S)
        if isinstance(event, codec.Reject):
            first_fault = first_fault or f"; line {number + 1}: {event.message}"
            rejects += 1
            continue
        events.append(event)
        lines.append(number)
    if not events:
        raise StreamError(f"{events_path}: no line of it is an event (type, user_id, item_id, action, ts){first_fault}")
    name = events_path.resolve().parent.name
    return stream_of(name, items, events, evidence, np.array(lines, np.int64), rejects, hasher.hexdigest())


def stream_of(
    name: str, items: list[Item], events: list[Click | Comment], evidence: EvidenceConfig, lines: Array | None = None,
    rejects: int = 0, digest: str = "",
) -> Stream:  # fmt: skip
    """The stream of these events, in order of time, and items, which are put into the order in which they enter."""
    items.sort(key=_entry_ts)
    lines = np.arange(len(events)) if lines is None else lines
    return Stream(name, items, events, lines, _lay(items, events, evidence), rejects, digest)


def _lines(path: Path, hasher: Any) -> Iterator[tuple[int, bytes]]:
    """The lines of a plain or gzipped file with their numbers, from 0; blank ones are passed over."""
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == GZIP_MAGIC
        with gzip.open(path) if zipped else path.open("rb") as file:
            number = 0
            while line := file.readline(LINE_BYTES_MAX):
                hasher.update(line)
                if not line.isspace():
                    yield number, line
                number += 1
    except (OSError, EOFError) as problem:
        raise StreamError(f"{path}: {problem}") from problem


def _entry_ts(item: Item) -> float:
    return -np.inf if item.ts is None else item.ts


def _lay(items: Sequence[Item], events: Sequence[Click | Comment], evidence: EvidenceConfig) -> Trace:
    numbers: dict[str, int] = {}
    entered: list[float] = []
    for item in items:
        if numbers.setdefault(item.item_id, len(numbers)) == len(entered):
            entered.append(_entry_ts(item))
    users: dict[str, int] = {}
    n = len(events)
    user, item_number = np.zeros(n, np.int32), np.zeros(n, np.int32)
    low, text = np.zeros(n, np.bool_), np.zeros(n, np.bool_)
    for k, event in enumerate(events):
        user[k] = users.setdefault(event.user_id, len(users))
        if event.item_id is None:
            item_number[k] = -1
        else:
            item_number[k] = numbers.setdefault(event.item_id, len(numbers))
        text[k] = isinstance(event, Comment)
        low[k] = isinstance(event, Click) and pipeline.is_low(event, evidence)
    item_ts = np.full(len(numbers), np.inf)
    item_ts[: len(entered)] = entered
    return trace(user, item_number, np.array([event.ts for event in events]), low, text, item_ts)


class Costs(NamedTuple):
    """CPU seconds of this process."""

    fold_s: float = 0.0  # events into rows and messages
    learn_s: float = 0.0  # learning and ranking


class Run:
    """One evaluation under way."""

    def __init__(
        self, stream: Stream, encoder: Encoder, evidence: EvidenceConfig, config: LearnerConfig,
        adapter: Adapter | None = None, rank_sample: float = 1.0,
    ) -> None:  # fmt: skip
        """Every target is ranked, or `rank_sample` of them, whatever `evidence` and `config` say of sampling and cost.
        Raises StreamError for a foreign adapter."""
        if adapter is not None and adapter.base != encoder.name:
            raise StreamError(f"the checkpoint is of the encoder {adapter.base}, texts are encoded by {encoder.name}")
        n = len(stream.events)
        self.stream = stream
        self.config = config = replace(config, rank_items=0)
        self.users: dict[bytes, bytes] = {}
        self.learner = ItemLearner(config, encoder.dim)
        if adapter is not None:
            self.learner.learner.adapt(adapter)
        self.encoder_name = encoder.name if adapter is None else f"{encoder.name}+{adapter.name}"
        self.done = 0  # events
        self.costs = Costs()
        self.rank = np.full(n, np.nan)
        self.candidates = np.zeros(n, np.int32)
        self.log_loss = np.full(n, np.nan)
        self.other_log_loss = np.full(
            (n, 1 + len(HALF_LIVES_POSITIVES)), np.nan, np.float32
        )  # sigmoid(s), popularities
        self.listed = np.full((n, LISTED), np.nan, np.float32)  # p of the ten best
        self.place = np.full(n, -1, np.int32)  # of the target among them
        self._encoder = encoder
        self._evidence = replace(evidence, rank_sample=rank_sample)
        self._entered = 0  # items
        self._position = 0  # in the examples log
        self._started = 0
        self._baselines: dict[str, Metrics] = {}
        self._learner_rows: dict[bytes, bytes] = {}
        self._item_vectors: dict[int, F4 | None] = {}
        self._text_vectors: dict[int, F4] = {}
        self._timed: list[bytes] = []
        self._clock = np.maximum.accumulate([event.ts for event in stream.events])  # (n,) highest ts so far
        self._probe = new_examples(config, 0)
        is_example = np.isin(stream.trace.kind, (SCORED, CREATED, LOW))
        ends = np.flatnonzero(np.cumsum(is_example) % examples.MESSAGE_EXAMPLES_MAX == 0)
        self._stops = np.append(ends[is_example[ends]] + 1, n)

    def encode(self, until: int | None, cache_folder: Path | None, progress: Progress) -> None:
        """Encodes what `advance` will need: the texts of items and events still to come, each text once.

        cache_folder: where vectors are kept for the next run; None: nothing is written.
        """
        events = self.stream.events
        stop = self._stop(until)
        items = self.stream.items[self._entered : self._items_by(self._clock[stop - 1])]
        comments = [k for k in range(self.done, stop) if isinstance(events[k], Comment)]
        texts = [item.text for item in items if item.text]
        texts += [events[k].text for k in comments]  # type: ignore[union-attr]

        def encode(missing: list[str]) -> F4:
            return self._encoder.encode(missing)

        def show(done: int, total: int) -> None:
            progress("encode", done, total)

        if cache_folder is None:
            vectors = encode_in_blocks(texts, encode, self._encoder.dim, show)
        else:
            vectors = VectorCache(cache_folder, self._encoder.name, self._encoder.dim).encode(texts, encode, show)
        rows = iter(vectors)
        self._item_vectors = {
            at: item_vector(self._encoder, item, next(rows) if item.text else None)
            for at, item in enumerate(items, self._entered)
        }
        self._text_vectors = dict(zip(comments, rows, strict=True))

    def advance(self, until: int | None, progress: Progress) -> None:
        """Tests and learns, message by message, up to the last one that ends at or before `until` events."""
        last = self._stop(until)
        self._started = self.done
        stops = self._stops[(self._stops > self.done) & (self._stops <= last)].tolist()
        every = max(1, len(stops) // TIMED_MESSAGES)
        for number, stop in enumerate(stops):
            messages = self._step(stop)
            if number % every == 0:
                self._timed += messages
            progress("learn", stop, last)

    def _step(self, stop: int) -> list[bytes]:
        """Events done..stop: items that entered, then the fold, then the learner."""
        start = time.process_time()
        entries = self._entries(self._clock[stop - 1])
        catalogue = pipeline.learn_catalogue(PARTITION, entries, self._encoder.dim)
        sources = []
        for k in range(self.done, stop):
            event = self.stream.events[k]
            topic = examples.CLICKS if isinstance(event, Click) else examples.COMMENTS
            sources.append(SourceEvent(topic, k, event, self._text_vectors.get(k)))
        batch = pipeline.learn_users(PARTITION, sources, self._get_users, self._evidence)
        self.users.update((key, row) for key, row in batch.rows.items() if row is not None)
        self.done = stop
        folded = time.process_time()
        for message in (*catalogue.messages, *batch.messages):
            learnt = self.learner.learn(self._position, message)
            self._position += 1
            if learnt.outcome is not None:
                self._take(message, learnt.outcome)
        learnt_at = time.process_time()
        self.costs = Costs(self.costs.fold_s + folded - start, self.costs.learn_s + learnt_at - folded)
        return batch.messages

    def _stop(self, until: int | None) -> int:
        n = len(self.stream.events)
        return n if until is None else max(self.done, min(until, n))

    def _items_by(self, ts: float) -> int:
        """How many item records are there by `ts`, of those in the order of entry."""
        return bisect_right(self.stream.items, ts, key=_entry_ts)

    def _entries(self, ts: float) -> list[tuple[int, Any, F4 | None]]:
        """The next items whose records are there by `ts`; their offsets are their places in the order of entry."""
        first = self._entered
        self._entered = max(first, self._items_by(ts))
        return [(at, self.stream.items[at], self._item_vectors[at]) for at in range(first, self._entered)]

    def _get_users(self, keys: list[bytes]) -> list[bytes | None]:
        return [self.users.get(key) for key in keys]

    def _take(self, message: bytes, outcome: Outcome) -> None:
        nothing_applied = np.full(len(examples.TOPICS), -1, np.int64)
        probe = examples.unpack_examples(message, self._probe, nothing_applied)
        events = probe.source[: probe.count] & ((1 << 48) - 1)
        self.rank[events] = outcome.rank
        self.candidates[events] = outcome.candidates
        self.log_loss[events] = outcome.log_loss
        self.other_log_loss[events] = np.column_stack((outcome.raw_log_loss, outcome.pop_log_loss))
        self.listed[events], self.place[events] = outcome.listed, outcome.place

    # --- figures ---

    def metrics(self) -> Metrics:
        """Of the tests so far. Raises StreamError where the learner left a test without a rank."""
        laid = self.stream.trace
        tests = np.flatnonzero(laid.kind[: self.done] == SCORED)
        lost = tests[np.isnan(self.rank[tests])]
        if len(lost):
            raise StreamError(
                f"line {self.stream.lines[lost[0]]} of the events is a test, but the learner did not rank it "
                f"({len(lost)} such): the pipeline's fold and the protocol disagree"
            )
        metrics = Metrics()
        metrics.update(
            self.rank[tests], self.candidates[tests], user_positives=laid.user_positives[tests],
            item_positives=laid.item_positives[tests], log_loss=self.log_loss[tests],
        )  # fmt: skip
        return metrics

    def report(self, names: Sequence[str], progress: Progress) -> Report:
        """The report of the public contract. The learner is used up by it: it learns some messages once more."""
        laid = self.stream.trace
        kind = laid.kind[: self.done]
        tests = kind == SCORED
        out: Report = {
            "stream": self.stream.name,
            "encoder": self.encoder_name,
            "events": self.done,
            "positives": int((tests | (kind == CREATED)).sum()),
            "tests": int(tests.sum()),
            "rejects": self.stream.rejects,
            "candidates_differ": int((self.candidates[: self.done] != laid.candidates[: self.done])[tests].sum()),
            "model": self.metrics().report(),
            "calibration": self._calibration(np.flatnonzero(tests)),
            "digest": self.digest(),
            "drift": self._drift(),
        }
        out.update(self._costs())
        reached = laid.head(self.done)
        out["baselines"], out["baseline_variants"], out["significance"] = {}, {}, {}
        for done, name in enumerate(names):
            progress("baselines", done, len(names))
            best = baselines.run(name, reached)
            out["baselines"][name] = best.metrics.report()
            out["baseline_variants"][name] = best.variant
            out["significance"][name] = mcnemar(self.rank[: self.done][tests], best.ranks[tests])._asdict()
            self._baselines[name] = best.metrics
        if names:
            progress("baselines", len(names), len(names))
        return out

    def records(self) -> dict[str, Array]:
        """(tests,) TEST of the model and of each baseline of the report, in order of time."""
        return {"model": self.metrics().records} | {name: m.records for name, m in self._baselines.items()}

    def digest(self) -> dict[str, str]:
        """Of the user rows, of the learner's state, and of both."""
        hasher = hashlib.blake2b(digest_size=16)
        for key in sorted(self.users):
            for part in (key, self.users[key]):
                hasher.update(len(part).to_bytes(4, "little") + part)
        users, items = hasher.hexdigest(), self.learner.learner.digest()
        both = hashlib.blake2b(f"{users} {items} {self._position}".encode(), digest_size=16).hexdigest()
        return {"users": users, "items": items, "state": both}

    def _drift(self) -> dict[str, int]:
        monitor = DriftMonitor()
        first = 0
        for stop in self._stops[self._stops <= self.done].tolist():
            monitor.update(self.log_loss[first:stop])
            first = stop
        return {monitor.signal: monitor.detections}

    def _calibration(self, tests: Array) -> Report:
        """Of the lists' p; log losses, popularity's of its best half-life."""
        losses = self.other_log_loss[tests].mean(axis=0, dtype=np.float64) if len(tests) else np.full(2, np.nan)
        mean = (self.log_loss[tests].mean() if len(tests) else np.nan, losses[1:].min(), losses[0])
        names = ("model", "popularity", "uncalibrated")
        told = {name: None if np.isnan(loss) else float(loss) for name, loss in zip(names, mean, strict=True)}
        return {**calibration(self.listed[tests], self.place[tests]), "log_loss": told}

    def _costs(self) -> Report:
        """CPU of this run: in all, and of fold, learning and ranking apart."""
        kind = self.stream.trace.kind[self._started : self.done]
        learnt = int(np.isin(kind, (SCORED, CREATED, LOW)).sum())
        ranked = int((kind == SCORED).sum())
        events = max(1, self.done - self._started)
        learning_s = self._learning_s_per_example() * learnt
        return {
            "cpu_s_per_1k_events": 1e3 * (self.costs.fold_s + self.costs.learn_s) / events,
            "fold_us_per_event": 1e6 * self.costs.fold_s / events,
            "learning_us_per_example": 1e6 * learning_s / max(1, learnt),
            "ranking_us_per_test": 1e6 * max(0.0, self.costs.learn_s - learning_s) / max(1, ranked),
        }

    def _learning_s_per_example(self) -> float:
        """By learning messages from all over the run once more, unranked."""
        learnt, total = 0, 0.0
        for message in self._timed:
            nothing_applied = np.full(len(examples.TOPICS), -1, np.int64)
            batch = examples.unpack_examples(message, self._probe, nothing_applied)
            batch.ranked[:] = False
            start = time.process_time()
            self.learner.learner.learn(batch, self._position)
            total += time.process_time() - start
            learnt += batch.count
        return total / max(1, learnt)

    def write_ranks(self, path: Path, arms: ArmRanks | None = None) -> None:
        """One JSON object a test, so that any figure can be computed again; of an A/B test the user's arm, and the rank
        by arm b's encoder, too."""
        with path.open("w", encoding="utf-8") as file:
            for k in np.flatnonzero(self.stream.trace.kind[: self.done] == SCORED).tolist():
                event = self.stream.events[k]
                line = {
                    "offset": int(self.stream.lines[k]), "user_id": event.user_id, "item_id": event.item_id,
                    "rank": float(self.rank[k]), "candidates": int(self.candidates[k]),
                }  # fmt: skip
                if arms is not None:
                    line |= {"arm": ARMS[arms.arm[k]], "rank_b": float(arms.second[k])}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    # --- stop and go on ---

    def save(self, folder: Path) -> None:
        """Saves the run in a folder; one that is there already is replaced only by a complete new one."""
        for key, row in self.learner.take_dirty().items():
            if row is None:
                self._learner_rows.pop(key, None)
            else:
                self._learner_rows[key] = row
        saved = _Saved(
            CHECKPOINT_VERSION, self._identity(), self.done, self._entered, self._position,
            list(self.users.items()), list(self._learner_rows.items()),
            self.rank[: self.done].tobytes(), self.candidates[: self.done].tobytes(),
            self.log_loss[: self.done].tobytes(), self.other_log_loss[: self.done].tobytes(),
            self.listed[: self.done].tobytes(), self.place[: self.done].tobytes(),
        )  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        fresh = folder / "run.new"
        fresh.write_bytes(msgspec.msgpack.encode(saved))
        fresh.replace(folder / "run.msgpack")

    def load(self, folder: Path) -> None:
        """Goes on from a saved run of the same stream, encoder and configuration. Raises StreamError."""
        path = folder / "run.msgpack"
        try:
            saved = msgspec.msgpack.decode(path.read_bytes(), type=_Saved)
        except (OSError, msgspec.DecodeError) as problem:
            raise StreamError(f"{path}: {problem}; save one with --checkpoint") from problem
        if saved.version != CHECKPOINT_VERSION or saved.identity != self._identity():
            raise StreamError(f"{path} is of another stream, encoder, configuration or version: start from the files")
        self.users = dict(saved.users)
        self._learner_rows = dict(saved.learner)
        self.learner.load(self._learner_rows.items())
        self.done, self._entered, self._position = saved.done, saved.entered, saved.position
        self.rank[: saved.done] = np.frombuffer(saved.rank, np.float64)
        self.candidates[: saved.done] = np.frombuffer(saved.candidates, np.int32)
        self.log_loss[: saved.done] = np.frombuffer(saved.log_loss, np.float64)
        self.other_log_loss.reshape(-1)[: saved.done * self.other_log_loss.shape[1]] = np.frombuffer(
            saved.other_log_loss, np.float32
        )
        self.listed.reshape(-1)[: saved.done * LISTED] = np.frombuffer(saved.listed, np.float32)
        self.place[: saved.done] = np.frombuffer(saved.place, np.int32)

    def _identity(self) -> str:
        evidence = {**asdict(self._evidence), "low_actions": sorted(self._evidence.low_actions)}
        return json.dumps([self.stream.digest, self.encoder_name, evidence, asdict(self.config)])


class _Saved(msgspec.Struct, array_like=True):
    version: int
    identity: str
    done: int
    entered: int
    position: int
    users: list[tuple[bytes, bytes]]
    learner: list[tuple[bytes, bytes]]
    rank: bytes
    candidates: bytes
    log_loss: bytes
    other_log_loss: bytes
    listed: bytes
    place: bytes


def render(report: Report) -> str:
    """The report for people: a table of the figures, then what it cost."""
    columns = ("HR@10", "NDCG@10", "MRR", "R@20", "2nd half", "new user", "new item", "AUC")
    head = " " * 14 + "".join(f"{column:>10}" for column in columns)
    lines = [
        f"{report['stream']}: {report['events']} events, {report['positives']} positives, {report['tests']} tests",
        head,
    ]
    for name, m in (("model", report["model"]), *report["baselines"].items()):
        figures = (
            m["hr@10"], m["ndcg@10"], m["mrr"], m["recall@20"], m["second_half"]["hr@10"], m["new_user"]["hr@10"],
            m["new_item"]["hr@10"], m["auc"],
        )  # fmt: skip
        cells = (f"{'-':>10}" if figure is None else f"{figure:10.4f}" for figure in figures)
        lines.append(f"{name:14}" + "".join(cells))
    for name, told in report["significance"].items():
        line = f"against {name}: p {told['p']:.1e} of no difference"
        if told["better"] is not None:
            line += f"; better in {told['better']:.0%} of the windows, worse in {told['worse']:.0%}"
        lines.append(line)
    if "ab" in report:
        told, paired = report["ab"]["b_minus_a"], report["ab"]["paired"]
        for figure, one in told.items():
            arms = ", ".join(f"{name} {report['ab'][name][figure]:.4f}" for name in ARMS)
            lines.append(
                f"A/B by user, {figure}: {arms}; b - a {one['mean']:+.4f} [{one['low']:+.4f}, {one['high']:+.4f}] "
                f"(95 %), p {one['p']:.1e}"
            )
        lines.append(
            f"the same tests by both: {paired['only_first']} hits of b alone, {paired['only_second']} of a alone, "
            f"p {paired['p']:.1e}"
        )
    lines += [f"best {name}: {variant}" for name, variant in report["baseline_variants"].items()]
    told = report["calibration"]
    losses = ", ".join(f"{name} {'-' if loss is None else f'{loss:.3f}'}" for name, loss in told["log_loss"].items())
    error = "-" if told["ece@10"] is None else f"{told['ece@10']:.4f}"
    lines += [
        f"log loss, nats a test: {losses}; expected calibration error of the ten best {error}",
        f"CPU {report['cpu_s_per_1k_events']:.3f} s per 1,000 events: fold {report['fold_us_per_event']:.0f} us an "
        f"event, learning {report['learning_us_per_example']:.0f} us an example, ranking "
        f"{report['ranking_us_per_test']:.0f} us a test",
    ]
    lines.append(f"state digest {report['digest']['state']}")
    return "\n".join(lines)
