"""The demo: broker, topics and a worker of its own; a real stream learnt live; a visitor; a report; then the page.

The first part of the stream is published as fast as it goes: that gives the events/s. The last part comes at a steady
rate while the visitor acts, and every act is followed by a read that waits until it is seen: that is the freshness.
"""

import asyncio
import contextlib
import fcntl
import gzip
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from rich import box
from rich.console import Console
from rich.table import Table

from streams import kafka, movielens, replay, topics
from streams.broker import EmbeddedBroker, end_with_parent, free_port, is_open
from streams.client import Client
from streams.failures import HeadwaterError
from streams.progress import Bars
from streams.settings import Fault, Settings, cache_dir, environment, is_default
from streams.visitor import Freshness, Visitor

PACED_EVENTS_MAX: Final = 5000
PACED_EVENTS_PER_S: Final = 1000.0
READY_S_MAX: Final = 120.0  # model and kernels are loaded, and compiled at the very first start
LEARNT_S_MAX: Final = 600.0  # without any progress
STOP_S_MAX: Final = 15.0
POLL_S: Final = 0.1
LEARNT_POLL_S: Final = 0.3  # each look makes the worker compute its live figures
LOG_LINES_SHOWN: Final = 15
HTTP_TIMEOUT_S: Final = 15.0
BROKER_LOG: Final = "broker.log"  # in the state folder: of a broker that the demo has started
STORE_NAME: Final = re.compile(r"(users|catalogue|learner)-\d+")  # of a partition's folder in a worker's state folder
STORE_LOCK: Final = "LOCK"  # RocksDB's, in each; held while the store is open

Report: TypeAlias = dict[str, Any]


class DemoError(Fault):
    """The demo cannot go on."""


@dataclass(frozen=True)
class Options:
    """What `headwater demo` is asked for."""

    once: bool = False
    events: int | None = None
    report: Path | None = None
    state_dir: Path | None = None


def run(settings: Settings, options: Options, now: Callable[[], float]) -> None:
    """The whole demo. Raises Fault, with what to do."""
    console, results = Console(stderr=True, highlight=False), Console(highlight=False)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave the blocks in order
    console.print(f"data: {movielens.LICENCE}", style="dim")
    stream = movielens.fetch(cache_dir() / "ml-100k")
    with contextlib.ExitStack() as stack:
        if options.state_dir is None:
            state_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="headwater-demo-")))
        else:
            state_dir = options.state_dir
            _make_folder(state_dir)
            if not settings.broker:
                _remove_left_state(state_dir, console)
        address = settings.broker or stack.enter_context(EmbeddedBroker(log_file=state_dir / BROKER_LOG)).address
        console.print(f"broker: {address}{'' if settings.broker else ' (embedded, in memory)'}")
        ours = _settings(settings, address, state_dir)
        _make_topics(ours)
        worker = stack.enter_context(_Worker(ours, console))
        report = _learn(ours, stream, options, worker, results, now)
        if options.report is not None:
            options.report.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        _print(report, results)
        if not options.once:
            console.print(f"\nthe page: [bold]{ours.http_url()}/[/]   (Ctrl-C ends the demo)")
            worker.wait()


def _make_folder(state_dir: Path) -> None:
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise DemoError(f"{state_dir}: {problem.strerror}: give a folder that can be made with --state") from None


def _remove_left_state(state_dir: Path, console: Console) -> None:
    """Removes what the worker of an earlier demo has left: it is of logs that were in the memory of that demo's broker.

    Only folders that hold a store of the program, and only where a demo with a broker of its own was before. Raises
    DemoError, with nothing removed, where they may be of other logs or a worker has them open.
    """
    locks = {path: path / STORE_LOCK for path in sorted(state_dir.iterdir()) if STORE_NAME.fullmatch(path.name)}
    stores = [path for path, lock in locks.items() if lock.is_file() and not path.is_symlink()]
    if not stores:
        return
    if not (state_dir / BROKER_LOG).exists():
        raise DemoError(
            f"{state_dir} has the state of a worker beside another broker: give another folder with --state, or set "
            "HEADWATER_BROKER to that broker"
        )
    with contextlib.ExitStack() as stack:
        for path in stores:
            lock = stack.enter_context(locks[path].open("r+b"))
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise DemoError(
                    f"a worker is running on {state_dir}: end it, or give another folder with --state"
                ) from None
        for path in stores:
            shutil.rmtree(path)
    console.print(f"state: {len(stores)} partitions in {state_dir} were of an earlier demo's broker, and are removed")


def _settings(settings: Settings, address: str, state_dir: Path) -> Settings:
    port = settings.http_port
    if is_default("http_port") and port == Settings.model_fields["http_port"].default and is_open(port):
        port = free_port()
    elif is_open(port):
        raise DemoError(f"port {port} is in use: give another with --port, or stop what listens there")
    return settings.model_copy(update={
        "broker": address, "state_dir": state_dir, "http_port": port, "rank_sample": 1.0, "learner_rank_items": 0,
        "live_tests_max": 2 * movielens.RATINGS,
    })  # fmt: skip


def _make_topics(settings: Settings) -> None:
    for report in topics.ensure(settings):
        if report.state is topics.State.WRONG:
            raise topics.TopicsError(f"topic {report.topic.name}: {report.differences[0]}")


class _Worker:
    """`headwater worker` as a process of its own; stopped by SIGTERM at the end of the block."""

    def __init__(self, settings: Settings, console: Console) -> None:
        self.settings = settings
        self.log_file = settings.state_dir / "worker.log"
        self._console = console
        self._client = Client(settings.http_url(), settings.api_key.get_secret_value(), timeout_s=HTTP_TIMEOUT_S)

    def __enter__(self) -> "_Worker":
        names = (
            "broker", "state_dir", "http_host", "http_port", "rank_sample", "learner_rank_items", "live_tests_max",
        )  # fmt: skip
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "streams", "worker"], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=environment({name: str(getattr(self.settings, name)) for name in names}),
                preexec_fn=end_with_parent(), start_new_session=True,
            )  # fmt: skip
        self._console.print(f"worker: process {self._process.pid}, log in {self.log_file}")
        try:
            self._wait_until_ready()
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        return self

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_S_MAX
        with self._console.status("loading the encoder, compiling the kernels (the first start takes longest)"):
            while not self._is_ready():
                self.check()
                if time.monotonic() > deadline:
                    raise DemoError(f"the worker is not ready after {READY_S_MAX:.0f} s\n{self._log_end()}")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(POLL_S)

    def _is_ready(self) -> bool:
        try:
            return not self._client.readyz()
        except HeadwaterError:
            return False

    def check(self) -> None:
        """Raises DemoError when the worker has ended."""
        code = self._process.poll()
        if code is not None:
            raise DemoError(f"the worker has ended with {code}\n{self._log_end()}")

    def model(self) -> dict[str, Any]:
        """What it tells of the model. Raises DemoError when it has ended."""
        self.check()
        return self._client.model()

    def digest(self) -> dict[str, Any]:
        """What it tells of its state. Raises DemoError when it has ended."""
        self.check()
        return self._client.digest()

    def wait(self) -> None:
        """Until it ends."""
        self._process.wait()
        self.check()

    def _log_end(self) -> str:
        lines = self.log_file.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
        return "\n".join([f"the end of {self.log_file}:", *lines])

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._client.close()
        if self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            code = self._process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise DemoError(f"the worker did not stop within {STOP_S_MAX:.0f} s of SIGTERM") from None
        if code != 0 and kind is None:
            raise DemoError(f"the worker stopped with {code} instead of 0\n{self._log_end()}")


def _learn(
    settings: Settings, stream: movielens.Stream, options: Options, worker: _Worker, results: Console,
    now: Callable[[], float],
) -> Report:  # fmt: skip
    """Replays, lets the visitor act, waits until all is learnt: the report. Prints what the visitor is shown."""
    items, ratings = _count(stream.items), _count(stream.events)
    total = min(options.events or ratings, ratings)
    paced = min(PACED_EVENTS_MAX, total // 10)
    progress = _Progress(settings, worker)
    started = time.monotonic()
    with Bars() as bars:
        replay.replay(settings, stream.items, None, progress=bars.bytes_of)
        progress.wait_until_learnt(0, items)
        full_started = time.monotonic()
        done = replay.replay(settings, None, stream.events, limit=total - paced, progress=bars.bytes_of)
        progress.wait_until_learnt(done.events, items, bars)
        full_seconds = time.monotonic() - full_started
    visitor = Visitor(settings, stream.items, now)
    with _acting(visitor) as freshness:
        paced_done = replay.replay(
            settings, None, stream.events, skip=total - paced, limit=paced, events_per_s=PACED_EVENTS_PER_S
        )
    progress.wait_until_learnt(total + freshness.published, items)
    seconds = time.monotonic() - started
    info = worker.model()  # before the visit below: the figures are the stream's
    visitor.visit(results)
    return {
        "events": done.events + paced_done.events, "seconds": round(seconds, 2),
        "events_per_s": round(done.events / full_seconds, 1),
        "full_speed": {"events": done.events, "seconds": round(full_seconds, 2)},
        "paced": {"events": paced_done.events, "events_per_s": PACED_EVENTS_PER_S},
        "positives": info["replica"]["positives"],
        "model": info["prequential"]["model"],
        "baselines": {name: m for name, m in info["prequential"].items() if name not in ("model", "drift")},
        "freshness_ms": freshness.clicks_ms(), "comments_freshness_ms": freshness.comments_ms(),
        "state": _state(settings, worker),
    }  # fmt: skip


def _count(path: Path) -> int:
    with gzip.open(path) as lines:
        return sum(1 for _ in lines)


@contextlib.contextmanager
def _acting(visitor: Visitor) -> Iterator[Freshness]:
    """The visitor acts in a thread of its own while the block runs; its failure is the block's."""
    stop = threading.Event()
    freshness = Freshness()
    failures: list[BaseException] = []

    def act() -> None:
        try:
            visitor.act(freshness, stop)
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=act, name="visitor")
    thread.start()
    try:
        yield freshness
    finally:
        stop.set()
        thread.join()
    if failures:
        raise DemoError(f"the visitor's requests failed: {failures[0]!r}") from failures[0]


class _Progress:
    """What the topics held before the demo, and how far the worker is."""

    def __init__(self, settings: Settings, worker: _Worker) -> None:
        self._settings = settings
        self._worker = worker
        self._before = {name: self._published(name) for name in ("clicks", "comments", "items")}

    def _published(self, name: str) -> int:
        topic = self._settings.topic(name)
        return sum(self._end(topic, partition) for partition in range(self._settings.partitions))

    def _end(self, topic: str, partition: int) -> int:
        return asyncio.run(kafka.log_end(self._settings.kafka_options(), topic, partition))

    def wait_until_learnt(self, events: int, items: int, bars: Bars | None = None) -> None:
        """Until so many events and items of the demo are applied, and all that they made is learnt and to be read."""
        events += self._before["clicks"] + self._before["comments"]
        items += self._before["items"]
        best, deadline = (-1, -1, -1), time.monotonic() + LEARNT_S_MAX
        while True:
            info = self._worker.model()
            reached = (info["events_applied"], info["items_applied"], info["replica"]["applied"]["examples"] + 1)
            if bars is not None:
                bars.steps_of("learnt", min(reached[0], events), events)
            is_applied = reached[0] >= events and reached[1] >= items  # then the examples log has all that they made
            if is_applied and reached[2] >= self._end(self._settings.internal_topic("examples"), 0):
                return
            if reached > best:
                best, deadline = reached, time.monotonic() + LEARNT_S_MAX
            elif time.monotonic() > deadline:
                raise DemoError(
                    f"nothing was learnt for {LEARNT_S_MAX:.0f} s: {reached[0]} of {events} events and {reached[1]} of "
                    f"{items} items are applied; see {self._worker.log_file}"
                )
            time.sleep(LEARNT_POLL_S)


def _state(settings: Settings, worker: _Worker) -> Report:
    digest = worker.digest()
    on_disk = sum(path.stat().st_size for path in settings.state_dir.rglob("*") if path.is_file())
    return {"bytes_on_disk": on_disk, **digest}


def _print(report: Report, console: Console) -> None:
    rivals = dict(report["baselines"])
    knn = rivals.pop("item_knn")
    popularity = max(rivals.items(), key=lambda entry: entry[1]["ndcg@10"] or 0.0)
    ruled = box.HEAVY_HEAD if console.is_terminal else None
    table = Table(
        title=f"{report['events']:,} events, each ranked before it was learnt", title_justify="left", box=ruled
    )
    for name in ("", "HR@10", "NDCG@10", "MRR", "Recall@20", "HR@10 second half"):
        table.add_column(name, justify="left" if not name else "right")
    told = (("the live model", report["model"]), (f"running popularity ({popularity[0]})", popularity[1]))
    for name, m in (*told, ("item-kNN", knn)):
        figures = (m["hr@10"], m["ndcg@10"], m["mrr"], m["recall@20"], m["second_half"]["hr@10"])
        table.add_row(name, *("-" if figure is None else f"{figure:.4f}" for figure in figures))
    console.print(table)
    full, paced = report["full_speed"], report["paced"]
    console.print(
        f"speed: {report['events_per_s']:,.0f} events/s from the topic to learnt ({full['events']:,} events in "
        f"{full['seconds']:.1f} s)"
    )
    for what, ms in (("click", report["freshness_ms"]), ("comment", report["comments_freshness_ms"])):
        if ms["p50"] is not None:
            console.print(
                f"freshness: a {what} shows in the visitor's list after {ms['p50']:.0f} ms (p50), {ms['p99']:.0f} ms "
                f"(p99), at {paced['events_per_s']:.0f} other events/s"
            )
    console.print(f"state: {report['state']['bytes_on_disk'] / 1e6:,.1f} MB on disk")
