"""Disturbs workers and brokers again and again under load, then holds the state against an undisturbed worker's."""

import argparse
import asyncio
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Final

import httpx
from aiokafka.errors import KafkaError

from bench import kafka_node, verdict
from bench.deployment import Deployment, WorkerProcess
from bench.kafka_node import KafkaNode
from bench.load import publish
from bench.proxy import Proxy
from streams import kafka
from streams.broker import HOST, EmbeddedBroker
from streams.settings import Settings, kafka_test_dir
from streams.worker import HEARD_MAX_S

ROUND_KILLS: Final = 50  # at most: an undisturbed worker, and each unlearning, learns a round's whole log
PARTITIONS: Final = 3
USERS: Final = 60
ITEMS: Final = 120
EVENTS_PER_S: Final = 200.0
TICK_S: Final = 0.25  # the embedded broker slows down with the number of batches in a log, so few are laid
AGE_S: Final = 1.0  # of an event when it is published: its own time counts, and an erasure's is later
FORGET_S: Final = 4.0  # from one erasure to the next
UNLEARN_SHARE: Final = 0.1  # of them; each learns the whole log again
RETURN_S: Final = AGE_S + 1.0  # until a user who was erased has events of a later time
FORGET_S_MAX: Final = 3.0  # for a worker's answer
SESSION_S: Final = 6.0
HOLD_MS: Final = 1e3 * (HEARD_MAX_S + 0.5)  # a topic's end is as old as its last fetch, and that took a while, too
STEP_S_MAX: Final = 20.0  # for a step to come at which a worker is to end; then it is killed as it is
TAKEOVER_S_MAX: Final = 120.0
BROKER_DOWN_S_MAX: Final = 12.0
CUT_S_MAX: Final = 9.0
FREEZES_MAX: Final = 8
ENDED_TAIL_BYTES: Final = 3000

# Steps at which a worker is told to end, and up to which of them: as often as they surely come within STEP_S_MAX.
STEPS: Final = {
    "open": 2, "announce": 2, "restore": 1, "outbox": 2, "adopt": 2, "encode": 4, "fold": 30, "write": 30,
    "publish": 30, "rows": 30, "marker": 30, "commit": 30,
}  # fmt: skip
WORDS: Final = ("river", "stone", "old", "song", "night", "blue", "engine", "paper", "garden", "salt", "wolf", "glass")


def run(arguments: list[str]) -> dict[str, Any]:
    """`python -m bench chaos --kills 20 [--workers W ...] [--broker embedded|kafka|HOST:PORT] [--nodes 1|3]
    [--broker-kills M] [--seed N]`. More than ROUND_KILLS come in several rounds, each on new brokers and by a seed of
    its own."""
    parser = argparse.ArgumentParser(prog="python -m bench chaos")
    parser.add_argument("--kills", type=int, default=20, help="of workers and brokers together")
    parser.add_argument("--broker-kills", type=int, default=0, help="of the kills, those of brokers (kafka alone)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1], help="of the rounds, in turn")
    parser.add_argument(
        "--broker", default="embedded", help="embedded, kafka (started here), or a running one's HOST:PORT"
    )
    parser.add_argument("--kafka", type=Path, help="folder with Kafka's libs/; else HEADWATER_TEST_KAFKA")
    parser.add_argument("--nodes", type=int, default=1, choices=[1, 3], help="of kafka")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, help="disturb a round no longer than this, whatever kills it makes")
    parser.add_argument("--folder", type=Path, help="kept, with the workers' logs and stores; else a temporary one")
    asked = parser.parse_args(arguments)
    if asked.broker_kills and asked.broker != "kafka":
        parser.error("--broker-kills needs --broker kafka")
    with ExitStack() as stack:
        folder = asked.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rounds = []
        for n in range(count := max(1, -(-asked.kills // ROUND_KILLS))):
            with site_of(asked.broker, folder / f"round-{n}", asked.kafka, asked.nodes) as site:
                report = disturb(
                    site, folder / f"round-{n}", kills=_share(asked.kills, n, count),
                    broker_kills=_share(asked.broker_kills, n, count), workers=asked.workers[n % len(asked.workers)],
                    seed=asked.seed + n, prefix=f"chaos-{asked.seed + n}-", seconds_max=asked.seconds,
                )  # fmt: skip
            print(json.dumps(report), file=sys.stderr, flush=True)
            rounds.append(report)
    return rounds[0] if count == 1 else _together(rounds)


def _share(total: int, n: int, of: int) -> int:
    """What the n-th of so many rounds has of it."""
    return total * (n + 1) // of - total * n // of


def _together(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Numbers and counts added up, lists one after another, and the rounds' digests."""
    told: dict[str, Any] = {}
    for name, first in rounds[0].items():
        values = [report[name] for report in rounds]
        if isinstance(first, bool):
            told[name] = all(values)
        elif isinstance(first, (int, float)):
            told[name] = sum(values)
        elif isinstance(first, list):
            told[name] = list(chain.from_iterable(values))
        elif name in ("faults", "exit_codes"):
            told[name] = dict(sum(map(Counter, values), Counter[Any]()))
        else:
            told[name] = values
    return told | {"rounds": len(rounds), "workers": [report["workers"] for report in rounds]}


@contextmanager
def broker_for(kind: str) -> Iterator[str]:
    """host:port: of an embedded broker for this block, or of the one that is named."""
    if kind != "embedded":
        yield kind
        return
    with EmbeddedBroker() as running:
        yield running.address


@dataclass(frozen=True)
class Site:
    """Brokers, and what stands before them.

    address: for those who are never cut off, where there is such a way. workers_address: through the proxies.
    """

    address: str
    workers_address: str
    proxies: list[Proxy] = field(default_factory=list)
    nodes: list[KafkaNode] = field(default_factory=list)


@contextmanager
def site_of(broker: str, folder: Path, kafka_dir: Path | None = None, nodes: int = 1) -> Iterator[Site]:
    """Starts an embedded broker or so many nodes of Kafka behind proxies; a running one is taken as it is."""
    if broker not in ("embedded", "kafka"):
        yield Site(broker, broker)
        return
    with ExitStack() as stack:
        proxies = [stack.enter_context(Proxy()) for _ in range(nodes if broker == "kafka" else 1)]
        proxied = ",".join(f"{HOST}:{proxy.port}" for proxy in proxies)
        if broker == "embedded":
            embedded = EmbeddedBroker(advertised_port=proxies[0].port)
            proxies[0].target = embedded.port
            stack.enter_context(embedded)
            yield Site(proxied, proxied, proxies)
            return
        libraries = kafka_dir or kafka_test_dir()
        if libraries is None:
            raise SystemExit("--broker kafka needs --kafka DIR or HEADWATER_TEST_KAFKA: a folder with Kafka's libs/")
        running = kafka_node.nodes(libraries, folder / "kafka", [proxy.port for proxy in proxies])
        for proxy, node in zip(proxies, running, strict=True):
            proxy.target = node.proxied_port
            stack.callback(node.stop)
        yield Site(",".join(node.address for node in running), proxied, proxies, running)


def user_name(slot: int, turn: int) -> str:
    """The letter at its end is for RocksDB, whose indexes have shortened keys between two rows': of u01-000 and u01-002
    that is u01-001, which may be the name of somebody who is gone."""
    return f"u{slot:02}-{turn:03}x"


class Feed(threading.Thread):
    """Publishes items, then clicks and comments at a steady rate until it is told to stop, and has users forgotten.

    A tick's comments come before its clicks in time, and are acknowledged first: whatever holds a batch up, no event
    reaches its log after one of a later time in the other topic. Nor does an erasure: its user is quiet until it is
    acknowledged, and for good where it is not; of the others every second comes back.

    forget: asks a worker to forget a user, and the model too or not; whether that was acknowledged.
    """

    def __init__(self, settings: Settings, seed: int, forget: Callable[[str, bool], bool]) -> None:
        super().__init__(daemon=True)
        self.settings = settings
        self.forget = forget
        self.users = [user_name(n, 0) for n in range(USERS)]
        self.turns = [0] * USERS
        self.accepted = 0  # erasures
        self.quiet_until = dict.fromkeys(range(USERS), 0.0)
        self.rng = random.Random(seed)
        self.published = 0
        self.enough = threading.Event()
        self.failure: BaseException | None = None
        self._producer = kafka.Producer(settings.kafka_options())

    def run(self) -> None:
        """The thread's work."""
        try:
            asyncio.run(self._publish())
        except BaseException as failure:
            self.failure = failure

    async def _publish(self) -> None:
        await self._producer.start()
        try:
            items = [{"item_id": f"i{n}", "text": " ".join(self.rng.sample(WORDS, 4))} for n in range(ITEMS)]
            await self._lay("items", [(item["item_id"].encode(), json.dumps(item).encode()) for item in items])
            started = time.monotonic()
            forgotten = started - FORGET_S / 2
            while not self.enough.is_set():
                count = int((time.monotonic() - started) * EVENTS_PER_S) - self.published
                drawn = sorted((self._event() for _ in range(count)), key=lambda event: "text" not in event)
                now = time.time() - AGE_S
                for at, event in enumerate(drawn):
                    event["ts"] = now + 1e-6 * at
                laid = [(event["user_id"].encode(), json.dumps(event).encode()) for event in drawn]
                comments = sum("text" in event for event in drawn)
                await self._lay("comments", laid[:comments])
                await self._lay("clicks", laid[comments:])
                self.published += count
                if time.monotonic() > forgotten + FORGET_S:
                    await self._forget()
                    forgotten = time.monotonic()
                await asyncio.sleep(TICK_S)
        finally:
            await self._producer.stop()

    async def _lay(self, topic: str, records: list[tuple[bytes, bytes]]) -> None:
        """Until all are acknowledged; a broker that is away may have some of them twice."""
        while True:
            try:
                return await publish(self._producer, self.settings, topic, records)
            except KafkaError:
                await self._producer.stop()
                self._producer = kafka.Producer(self.settings.kafka_options())
                await asyncio.sleep(TICK_S)
                await self._producer.start()

    async def _forget(self) -> None:
        slot = self.rng.randrange(USERS)
        is_sure = await asyncio.to_thread(self.forget, self.users[slot], self.rng.random() < UNLEARN_SHARE)
        self.accepted += is_sure
        if is_sure and self.accepted % 2 == 0:
            self.quiet_until[slot] = time.time() + RETURN_S
        else:
            self.turns[slot] += 1
            self.users[slot] = user_name(slot, self.turns[slot])

    def _event(self) -> dict[str, Any]:
        now = time.time()
        user = self.rng.choice([user for slot, user in enumerate(self.users) if self.quiet_until[slot] < now])
        item = f"i{int(ITEMS * self.rng.random() ** 2)}"
        if self.rng.random() < 0.03:
            return {"user_id": user, "item_id": item, "text": " ".join(self.rng.choices(WORDS, k=5))}
        action = "rating" if self.rng.random() < 0.2 else "click"
        return {"user_id": user, "item_id": item, "action": action, "value": 2}


class Chaos:
    """The disturbed workers by name, and what can be done to them and to their brokers."""

    def __init__(self, site: Site, deployment: Deployment, names: list[str], rng: random.Random) -> None:
        self.site, self.deployment, self.names, self.rng = site, deployment, names, rng
        self.workers: dict[str, WorkerProcess] = {}
        self.armed: dict[str, str] = {}  # worker -> the step that it has been told to end at
        self.faults: Counter[str] = Counter()
        self.ended: list[str] = []  # by themselves, untold
        self.exits: list[int] = []  # after SIGTERM
        self.kills = 0  # of workers and brokers
        self.broker_kills = 0
        self.wiped = 0

    def start(self, name: str, *, armed: bool = False) -> None:
        """Starts the worker, perhaps told to end at a step."""
        is_new = not self.deployment.state_dir(name).exists()
        step = self.rng.choice([step for step in STEPS if step != "restore" or is_new])
        if armed:
            self.armed[name] = step
            told = f"{step}:{self.rng.randint(1, STEPS[step])}"
            self.workers[name] = self.deployment.start_worker(name, crash_at=told)
        else:
            self.workers[name] = self.deployment.start_worker(name)

    def forget(self, user: str, unlearn: bool) -> bool:
        """Asks any worker over HTTP, whatever becomes of it meanwhile; whether it was accepted."""
        try:
            settings = random.choice(list(self.workers.values())).settings
            answer = httpx.delete(
                f"{settings.http_url()}/v1/users/{user}", params={"unlearn": unlearn}, headers=settings.http_headers(),
                timeout=FORGET_S_MAX, trust_env=False,
            )  # fmt: skip
        except (httpx.HTTPError, IndexError):  # nobody is there
            return False
        return answer.status_code == httpx.codes.ACCEPTED

    def all_ready(self) -> None:
        """Until every worker answers for its partitions; those that have ended by themselves are started again."""
        for name in self.names:
            while name not in self.armed:
                try:
                    self.workers[name].wait_ready()
                    break
                except RuntimeError as ended:
                    self.note_end(name, str(ended))
                    self.start(name)

    def note_end(self, name: str, how: str) -> None:
        """A worker has ended by itself."""
        self.ended.append(f"{name}: {how}"[-ENDED_TAIL_BYTES:])

    def kill_worker(self, number: int) -> None:
        """kill -9 of one: at the step that it was told, else at any moment. Every third loses its disk."""
        name = self.names[number % len(self.names)]
        step = self.armed.pop(name, None)
        if step is not None:
            worker = self.workers[name]
            try:
                worker.process.wait(STEP_S_MAX)
                if worker.process.returncode == -signal.SIGKILL:
                    self.faults[f"killed at {step}"] += 1
            except subprocess.TimeoutExpired:
                self.faults[f"killed before {step}"] += 1
        elif self.rng.random() < 0.3:
            _spend(self.rng.random() * 6)
            self.faults["killed at any moment"] += 1
        else:
            self.all_ready()
            _spend(self.rng.random() * 3)
            self.faults["killed at any moment"] += 1
        worker = self.workers[name]
        if worker.process.poll() not in (None, -signal.SIGKILL):
            self.note_end(name, worker.tail())
        worker.kill()
        self.kills += 1
        if number % 3 == 2:
            shutil.rmtree(self.deployment.state_dir(name), ignore_errors=True)
            self.wiped += 1
        others = [self.workers[n] for n in self.names if n != name and n not in self.armed]
        if others and self.rng.random() < 0.3:
            self.takeover(others)
        self.start(name, armed=self.rng.random() < 0.5)

    def takeover(self, workers: list[WorkerProcess]) -> None:
        """Until these together hold every partition, each of them once."""
        workers[0].wait_until("takeover", lambda: len(verdict.held(workers)) == 2 * PARTITIONS + 1, TAKEOVER_S_MAX)

    def kill_broker(self) -> None:
        """kill -9 of a node, which comes back on its logs, perhaps after others have taken over what it led."""
        node = self.rng.choice(self.site.nodes)
        node.kill()
        self.kills += 1
        self.broker_kills += 1
        _spend(self.rng.uniform(0.5, BROKER_DOWN_S_MAX if len(self.site.nodes) > 1 else 3.0))
        node.start()
        self.faults["broker killed"] += 1
        if len(self.site.nodes) > 1 and self.rng.random() < 0.5:
            self.move_leaders(node)
            self.faults["leaders moved"] += 1

    def move_leaders(self, node: KafkaNode) -> None:
        """Each partition's leader is the first of its replicas again, once that has caught up."""
        deadline = time.monotonic() + TAKEOVER_S_MAX
        while True:
            try:
                node.client(
                    "org.apache.kafka.tools.LeaderElectionCommand", "--bootstrap-server", node.address,
                    "--election-type", "preferred", "--all-topic-partitions",
                )  # fmt: skip
                return
            except AssertionError as failure:
                if "PreferredLeaderNotAvailable" not in str(failure) or time.monotonic() > deadline:
                    raise
            _spend(1.0)

    def freeze(self) -> None:
        """SIGSTOP for longer than the session; another takes over; the zombie that wakes is fenced if it writes."""
        name = self.rng.choice([n for n in self.names if n not in self.armed] or self.names)
        if name in self.armed:
            return
        self.all_ready()
        zombie = self.workers[name]
        joined = zombie.rebalances()
        zombie.process.send_signal(signal.SIGSTOP)
        others = [self.workers[n] for n in self.names if n != name and n not in self.armed]
        alone = not others
        if alone:
            others = [self.deployment.start_worker("spare")]
        try:
            self.takeover(others)
        finally:
            zombie.process.send_signal(signal.SIGCONT)
        zombie.wait_until("the zombie in the group again", lambda: zombie.rebalances() > joined, TAKEOVER_S_MAX)
        self.takeover([zombie, *others])
        self.faults["frozen beyond the session"] += 1
        if alone:
            self.exits.append(others[0].stop()[0])
            self.takeover([zombie])

    def fence(self) -> None:
        """Freezes until a worker is fenced: one with nothing under way may hear of its loss first and write nothing."""
        for _ in range(FREEZES_MAX):
            if _fenced(self.deployment) == 0:
                self.freeze()

    def restart_all(self) -> None:
        """A rolling restart."""
        for name in self.names:
            if name not in self.armed:
                self.all_ready()
                self.exits.append(self.workers[name].stop()[0])
                self.start(name)
                self.all_ready()
        self.faults["rolling restart"] += 1

    def join(self) -> None:
        """Another worker joins under load, and leaves again, one way or the other."""
        self.all_ready()
        extra = self.deployment.start_worker("extra")
        extra.wait_ready()
        _spend(self.rng.random() * 2)
        if self.rng.random() < 0.5:
            self.exits.append(extra.stop()[0])
        else:
            extra.kill()
        self.faults["joined and left"] += 1

    def cut(self) -> None:
        """The network between the workers and a broker is cut for some seconds."""
        if not self.site.proxies:
            return
        proxy = self.rng.choice(self.site.proxies)
        proxy.cut(silently=self.rng.random() < 0.5)
        _spend(self.rng.uniform(0.3, CUT_S_MAX))
        proxy.mend()
        self.faults["network cut"] += 1

    def more(self) -> None:
        """Perhaps one of the slower faults."""
        faults: list[Callable[[], None]] = [self.freeze, self.restart_all, self.join, self.cut]
        if self.rng.random() < 0.15:
            self.rng.choice(faults)()

    def finish(self) -> list[WorkerProcess]:
        """Every worker as it should be: not told to end, and ready."""
        for name in list(self.armed):
            del self.armed[name]
            self.workers[name].kill()
            self.start(name)
        self.all_ready()
        return [self.workers[name] for name in self.names]


def disturb(
    site: Site, folder: Path, *, kills: int, seed: int, prefix: str, workers: int = 1, broker_kills: int = 0,
    seconds_max: float | None = None, surely: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Disturbs `workers` workers `kills` times, `broker_kills` of them by killing a broker; the report.

    surely: methods of Chaos that come after the kills; without, some come by chance among them.
    """
    rng = random.Random(seed)
    settings: dict[str, Any] = {
        "topic_prefix": prefix, "partitions": PARTITIONS, "rank_sample": 0.1, "session_timeout_s": SESSION_S,
        "replication": max(1, len(site.nodes)), "module": "bench.words", "merge_hold_ms": HOLD_MS,
    }  # fmt: skip
    deployment = Deployment(site.workers_address, folder / "chaos", app_id="chaos", **settings)
    calm = Deployment(site.address, folder / "calm", app_id="calm", **settings)
    direct = deployment.settings.model_copy(update={"broker": site.address})
    chaos = Chaos(site, deployment, [f"w{n}" for n in range(workers)], rng)
    of_brokers = set(rng.sample(range(kills), broker_kills))
    started = time.monotonic()
    try:
        for each in (deployment, calm):
            each.create_topics()
        feed = Feed(direct, seed, chaos.forget)
        feed.start()
        for name in chaos.names:
            chaos.start(name)
        for n in range(kills):
            if seconds_max is not None and time.monotonic() > started + seconds_max:
                break
            if n in of_brokers:
                _kill_broker(chaos)
            else:
                chaos.kill_worker(n)
            if not surely:
                chaos.more()
            print(f"{n + 1} of {kills}, {time.monotonic() - started:.0f} s: {dict(chaos.faults)}", file=sys.stderr)
        chaos.finish()
        for fault in surely:
            getattr(chaos, fault)()
        running = chaos.finish()
        running[0].wait_until("an erasure", lambda: feed.accepted > 0 or feed.failure is not None)
        feed.enough.set()
        feed.join()
        if feed.failure is not None:
            raise feed.failure
        ends = asyncio.run(verdict.source_ends(direct))
        erased = asyncio.run(verdict.erasures(direct))
        certificates = verdict.completed(running, erased)
        told = verdict.settled(running, direct, ends)
        straight = calm.start_worker()
        true_certificates = verdict.completed([straight], erased)
        other = verdict.settled([straight], calm.settings, ends)
        found = verdict.compare(direct, calm.settings, told, other)
        found |= verdict.compare_erasures(erased, certificates, true_certificates)
        chaos.exits.append(straight.stop()[0])
        gone = verdict.gone(erased, [calm.state_dir() / f"users-{p}" for p in range(PARTITIONS)])
        left = verdict.names_left(direct, gone, [deployment.state_dir(name) for name in chaos.names], certificates)
        chaos.exits += [worker.stop()[0] for worker in running]
        rows = _rows_different(deployment, calm, chaos.names, found["partitions_different"])
    finally:
        deployment.close()
        calm.close()
    found |= {"rows_different": len(rows), "users_gone": len(gone), "gone_but_named": left}
    return {
        "kills": chaos.kills, "broker_kills": chaos.broker_kills, "workers": workers, **found,
        "broken": verdict.broken(found), "wiped": chaos.wiped, "events": feed.published, "faults": dict(chaos.faults),
        "fenced": _fenced(deployment), "ended": chaos.ended, "exit_codes": dict(Counter(chaos.exits)),
        "digests": told, "rows": [repr(key) for key in rows[:20]], "seconds": time.monotonic() - started,
    }  # fmt: skip


def _kill_broker(chaos: Chaos) -> None:
    """The workers' processes outlive it."""
    chaos.all_ready()
    before = {name: worker.process.pid for name, worker in chaos.workers.items() if name not in chaos.armed}
    chaos.kill_broker()
    chaos.all_ready()
    after = {name: chaos.workers[name].process.pid for name in before}
    if after != before:
        chaos.faults["workers that a broker took along"] += sum(after[name] != before[name] for name in before)


def _rows_different(
    chaos: Deployment, calm: Deployment, names: list[str], partitions: list[tuple[str, int]]
) -> list[bytes]:
    """The keys that differ, of the partitions whose digests do; a partition's last owner is the one that knows most."""
    keys = []
    for kind, number in partitions:
        folders = [chaos.state_dir(name) / f"{kind}-{number}" for name in names]
        paths = sorted((p for p in folders if p.exists()), key=lambda p: max(f.stat().st_mtime for f in p.iterdir()))
        keys += verdict.differing_rows(paths[-1], calm.state_dir() / f"{kind}-{number}")
    return keys


def _fenced(deployment: Deployment) -> int:
    """How often a worker's log tells of a fence."""
    logs = {worker.log_file for worker in deployment.workers}
    return sum(log_file.read_bytes().count(b"partition fenced") for log_file in logs)


def _spend(seconds: float) -> None:
    threading.Event().wait(seconds)  # a fault's moment is the experiment's input
