"""`headwater trainer`: the loop of streams.tuning in a process of its own, beside the workers.

It follows the examples log as replicas follow the item changelog, without a group: nothing that it does, or that its
end undoes, touches the workers, but the message by which it switches the adapter. Its state is saved after every
decision and every SAVE_MESSAGES; it goes on from there, and takes every decision again as it was.
"""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog
from aiokafka.errors import KafkaError
from prometheus_client import CollectorRegistry, Counter, Gauge, Info, start_http_server

from model.adapter import AdapterError
from model.learner import warm_up
from state.changelog import Reader
from state.sealing import SealError, is_sealed
from streams import checkpoints, examples, kafka, space
from streams.checkpoints import CheckpointError, Checkpoints, Manifest
from streams.datakeys import sealer_of
from streams.settings import Fault, Settings
from streams.space import Space
from streams.tracking import Tracking
from streams.tuning import Decision, Tuning
from streams.worker import LEARNER_PARTITION, crash_at

log = structlog.get_logger(__name__)

SAVE_MESSAGES: Final = 256
CLAIM_POLL_S: Final = 1.0
NICE: Final = 10  # the workers of this machine go first
ADAPTER_KEY: Final = b"adapter"  # of the message of a switch; others have their source partition
STATE_FILE: Final = "tuning.msgpack"
SCALARS: Final = (
    "loss", "loss_frozen", "loss_champion", "scale", "log10_e_better", "log10_e_worse", "mean_difference", "tests",
)  # fmt: skip


class _Stopped(Exception):
    """The process ends in the middle of a training: what is saved is before it."""


class TrainerMetrics:
    """The trainer's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.examples = Counter("headwater_trainer_examples_total", "Examples that the trainer took in", registry=own)
        self.steps = Counter("headwater_trainer_steps_total", "Training steps", registry=own)
        self.loss = Gauge("headwater_trainer_loss", "Loss of the newest candidate, nats", ["of"], registry=own)
        self.evidence = Gauge(
            "headwater_trainer_evidence", "log10 of the e-value of the duel under way", ["that"], registry=own
        )
        self.decisions = Counter("headwater_trainer_decisions_total", "Decisions of the gate", ["kind"], registry=own)
        self.lag = Gauge("headwater_trainer_lag_records", "Records of the examples log still to come", registry=own)
        self.checkpoint = Info("headwater_checkpoint", "The encoder in use", registry=own)


class Trainer:
    """The loop bound to a broker, a folder of checkpoints and event files."""

    def __init__(
        self, settings: Settings, base: str, text_dim: int, now: Callable[[], float],
        crash: Callable[[str], None] | None = None, stopping: threading.Event | None = None,
    ) -> None:  # fmt: skip
        """stopping: set by others to `stop` it.

        crash: called with the name of each step, for tests that end the process there; else as `crash_at` says.
        """
        self.settings, self.now = settings, now
        self._crash = crash or crash_at(settings.crash_at)
        self.options = settings.kafka_options()
        self.topic = settings.internal_topic("examples")
        self._sealer = sealer_of(settings)
        self._first_base = base
        self.tuning = self._new_tuning(base, text_dim)
        self.folder = Checkpoints(settings.checkpoints, self._crash)
        self.metrics = TrainerMetrics()
        self._producer = kafka.Producer(self.options)
        facts = {"encoder": base, "app_id": settings.app_id, "topic_prefix": settings.topic_prefix}
        self._tracking = Tracking(settings.trainer_dir / "events", settings.mlflow, facts, now)
        self._training_since = 0.0
        self._step_began = 0.0  # CPU seconds of the training thread
        self._stopping = stopping or threading.Event()
        self._unsaved = 0
        self._asked = -1  # offset of the switch that was asked for last

    def _new_tuning(self, base: str, text_dim: int) -> Tuning:
        """Its learners rank more than the workers', which changes how their p are calibrated, and no rank."""
        learner = replace(self.settings.learner_config(text_dim), rank_items=self.settings.tuning_rank_items)
        return Tuning(base, text_dim, learner, self.settings.tuning_config())

    @property
    def _state_path(self) -> Path:
        return self.settings.trainer_dir / STATE_FILE

    def stop(self) -> None:
        """Ends `run` soon, also out of a training."""
        self._stopping.set()

    async def run(self) -> None:
        """Follows the log until `stop`. Raises KafkaError when no broker answers."""
        await self._producer.start()
        try:
            await self._restore()
            self._tell_adapter()
            while not self._stopping.is_set():
                await self._follow()
        except _Stopped:
            return
        finally:
            await asyncio.to_thread(self._tracking.close)
            await self._producer.stop()
        self._save()

    async def _follow(self) -> None:
        """The log from where the loop stands, until `stop`, or until a removal makes it begin again."""
        follow = kafka.read_records(
            self.options, self.topic, LEARNER_PARTITION, self.tuning.offset + 1, isolation_level="read_committed"
        )
        at_end = False
        async with aclosing(follow) as batches:
            async for batch in batches:
                at_end = at_end and not batch
                for record in batch:
                    if self._stopping.is_set():
                        return
                    await self._take(record.offset, record.value)
                    if self.tuning.owes_replay:
                        log.info("begins again without what was removed", offset=record.offset)
                        await self._abandon("examples were unlearnt")
                        self.tuning = self.tuning.again()
                        await self._reach_back()
                        await asyncio.to_thread(self._save)
                        return
                if self._stopping.is_set():
                    return
                if not batch and not at_end:  # or the broker is slow
                    at_end = await self._observe_lag() == 0
                if at_end:  # so that what was asked for is not in the log
                    await self._ask()

    async def _take(self, offset: int, message: bytes) -> None:
        before = self.tuning.examples
        decisions = await asyncio.to_thread(self.tuning.advance, offset, self._opened(message), self._trained)
        self.metrics.examples.inc(self.tuning.examples - before)
        for decision in decisions:
            await self._decided(decision)
        self._unsaved += 1
        if decisions or self._unsaved >= SAVE_MESSAGES:
            self._observe()
            await asyncio.to_thread(self._save)
            await self._observe_lag()

    async def _observe_lag(self) -> int | None:
        """Records of the log that are still to come; None where the broker does not say."""
        try:
            lag = await kafka.log_end(self.options, self.topic, LEARNER_PARTITION) - 1 - self.tuning.offset
        except KafkaError:
            return None
        self.metrics.lag.set(max(0, lag))
        return max(0, lag)

    async def _abandon(self, why: str) -> None:
        for decision in self.tuning.abandoned({"reason": why}):
            await self._decided(decision)

    def _opened(self, value: bytes) -> bytes:
        """A message, or the saved state, as it is under the data keys. Raises SealError."""
        if self._sealer is not None:
            return self._sealer.open_message(value)
        if is_sealed(value):
            raise SealError("examples are sealed, and no data keys are set: give the trainer the workers' keys")
        return value

    def _trained(self, step: int, loss: float) -> None:
        if self._stopping.is_set():
            raise _Stopped
        self._crash("train")
        if not step:
            self._training_since = self.now()
        else:
            time.sleep((time.thread_time() - self._step_began) * (1 / self.settings.trainer_share - 1))
        self._step_began = time.thread_time()
        self.metrics.steps.inc()
        self._tracking.figure(f"training/{self.tuning.rounds + 1}", loss, step)

    def _observe(self) -> None:
        duel = self.tuning.duel
        for that, bets in (("better", duel.better), ("worse", duel.worse)) if duel is not None else ():
            self.metrics.evidence.labels(that).set(bets.log_wealth_most / 2.302585)
            self._tracking.figure(f"gate/log_wealth_{that}", bets.log_wealth, self.tuning.examples)
        self._tracking.flush()

    async def _decided(self, decision: Decision) -> None:
        log.info("decided", kind=decision.kind, position=decision.position, **decision.facts)
        if decision.kind == "switched":
            self._crash("switch")
        self.metrics.decisions.labels(decision.kind).inc()
        for name in SCALARS:
            if name in decision.facts:
                self._tracking.figure(f"{decision.kind}/{name}", decision.facts[name], self.tuning.examples)
        for manifest in await asyncio.to_thread(record, self.folder, decision, self.now()):
            await self._announce(manifest)
        if decision.kind == "switched":
            self._tell_adapter()
        if decision.kind == "candidate":
            texts = decision.facts["examples"] * self.tuning.config.finetune.epochs
            texts_per_s = texts / max(1e-3, self.now() - self._training_since)
            self._tracking.figure("candidate/texts_per_s", texts_per_s, self.tuning.examples)
            for of in ("loss", "loss_frozen", "loss_champion"):
                self.metrics.loss.labels(of.removeprefix("loss_").replace("loss", "candidate")).set(decision.facts[of])
            self.folder.prune(self.settings.checkpoints_keep)

    def _tell_adapter(self) -> None:
        name = "" if self.tuning.current is None else self.tuning.current.name
        self.metrics.checkpoint.info({"encoder": self.tuning.base, "adapter": name})

    async def _announce(self, manifest: Manifest) -> None:
        await announce(self._producer, self.settings, manifest)
        self._crash("announce")

    async def _ask(self) -> None:
        request = self.tuning.request()
        if request is not None and self._asked <= self.tuning.offset:
            self._crash("ask")
            self._asked = await self._producer.send(self.topic, LEARNER_PARTITION, [(ADAPTER_KEY, request)])
            self._crash("asked")
            log.info("asked for a switch", offset=self._asked, taken_back=self.tuning.taking_back)

    # -- stop and go on

    def _save(self) -> None:
        self.settings.trainer_dir.mkdir(parents=True, exist_ok=True)
        fresh = self._state_path.with_suffix(".new")
        with fresh.open("wb") as file:
            saved = self.tuning.save()
            file.write(saved if self._sealer is None else self._sealer.seal_message(saved))
            file.flush()
            os.fsync(file.fileno())
        self._crash("state")
        fresh.replace(self._state_path)
        self._unsaved = 0

    async def _restore(self) -> None:
        """From the saved state, else from the log's beginning, else (where that is gone) from the item changelog."""
        if self._state_path.exists():
            try:
                self.tuning.load(self._opened(await asyncio.to_thread(self._state_path.read_bytes)))
            except ValueError as problem:
                log.warning("the saved state is left aside", path=str(self._state_path), problem=str(problem))
                await self._drop_strays()
            else:
                log.info("goes on", offset=self.tuning.offset, phase=self.tuning.phase)
        await self._reach_back()

    async def _drop_strays(self) -> None:
        """Candidates in shadow of a loop whose state is not used: this one makes its own."""
        for manifest in await asyncio.to_thread(self.folder.manifests):
            if manifest.state == checkpoints.SHADOW:
                told = {"kind": "drop", "position": -1, "reason": "the trainer's state was set aside"}
                await self._announce(await asyncio.to_thread(_decide, self.folder, manifest.name, told))

    async def _reach_back(self) -> None:
        """The item changelog's state, where the log no longer has what comes next."""
        first = await kafka.ChangelogTopic(self.topic, LEARNER_PARTITION, self._producer, self.options).first()
        if first > self.tuning.offset + 1:
            await self._abandon("the log's records were gone before they were learnt")
            self.tuning = self._new_tuning(self._first_base, self.tuning.text_dim).counting_on(self.tuning)
            await self._adopt()

    async def _adopt(self) -> None:
        topic = self.settings.internal_topic("items-changelog")
        changelog = kafka.ChangelogTopic(topic, LEARNER_PARTITION, self._producer, self.options)
        reader = Reader()
        rows: dict[bytes, bytes] = {}
        offset = -1
        async for batch in changelog.read(0, None):
            for one in batch:
                accepted = reader.feed(one)
                if accepted is None:
                    continue
                offset = accepted.applied["examples"]
                for key, value in accepted.rows.items():
                    if value is None:
                        rows.pop(key, None)
                    else:
                        rows[key] = value
        await asyncio.to_thread(self.tuning.adopt, rows, offset)
        log.info("begins with the item rows: the examples log begins later", offset=offset, items=len(rows))


def record(folder: Checkpoints, decision: Decision, now: float) -> list[Manifest]:
    """Writes a decision into the checkpoints that it is about; these. Doing it again changes nothing."""
    known = {manifest.adapter: manifest for manifest in folder.manifests()}
    name = "" if decision.adapter is None else decision.adapter.name
    if decision.kind == "candidate":
        assert decision.adapter is not None
        parent = known.get(decision.parent)
        manifest = Manifest(
            name=checkpoints.name_of(decision.position, decision.adapter), adapter=name, base=decision.adapter.base,
            parent="" if parent is None else parent.name, offset=decision.position,
            rank=decision.adapter.left.shape[1], digest="", created=now, training=decision.facts,
        )  # fmt: skip
        folder.add(decision.adapter, manifest)
        manifest = folder.get(manifest.name)
        if manifest.state == checkpoints.DROPPED:  # by a loop that began again, and has made the same
            manifest.state = checkpoints.SHADOW
            folder.put(manifest)
        return [manifest]
    changed = {}
    if decision.kind == "switched":
        changed = _switched(folder, name, decision.facts["taken_back"], decision.position)
    found = known.get(decision.parent if decision.kind == "rollback" else name)
    if found is not None:
        told = {"kind": decision.kind, "position": decision.position, **decision.facts}
        changed[found.name] = _decide(folder, found.name, told)
    return list(changed.values())


def _decide(folder: Checkpoints, name: str, told: dict[str, Any]) -> Manifest:
    """The checkpoint's manifest with this decision, once."""
    manifest = folder.get(name)
    if told not in manifest.decisions:
        manifest.decisions.append(told)
    if told["kind"] == "drop":
        manifest.state = checkpoints.DROPPED
    folder.put(manifest)
    return manifest


def _switched(folder: Checkpoints, adapter: str, taken_back: bool, position: int) -> dict[str, Manifest]:
    """The manifests that changed, by name, where the log has switched at this position: it ends a trial, too."""
    changed = {m.name: m for m in folder.trial_ended(position)}
    return changed | {m.name: m for m in folder.switched(adapter, taken_back)}


async def announce(producer: kafka.Producer, settings: Settings, manifest: Manifest) -> None:
    """The manifest on the topic `encoder-checkpoints`, under the name of its encoder."""
    topic = settings.topic("encoder-checkpoints")
    await producer.send_one(topic, manifest.base.encode(), msgspec.json.encode(manifest))


def run(settings: Settings, now: Callable[[], float]) -> None:
    """Runs the trainer until SIGTERM or SIGINT. Raises Fault, and KafkaError where no broker answers."""
    os.nice(NICE)
    asyncio.run(_until_signal(settings, now))


async def _until_signal(settings: Settings, now: Callable[[], float]) -> None:
    loop, stopping = asyncio.get_running_loop(), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    tuned = await _claimed(settings, stopping)
    if tuned is None:
        return
    trainer = Trainer(settings, tuned.encoder, tuned.dim, now, stopping=stopping)
    warm_up(trainer.tuning.champion.learner.config)
    start_http_server(settings.trainer_port, settings.http_host, trainer.metrics.registry)
    if hasattr(os, "SCHED_IDLE"):  # from here on it gives way at once: a worker that wakes waits for no slice of it
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    log.info("trainer follows", topic=trainer.topic, checkpoints=trainer.folder.url, encoder=tuned.encoder)
    try:
        await trainer.run()
    except (SealError, AdapterError) as problem:
        raise Fault(str(problem)) from problem


async def _claimed(settings: Settings, stopping: threading.Event) -> Space | None:
    """The first encoder of the workers, whose space it is, once there is a worker; None where this process is to end
    before."""
    claims = space.log_of(settings, kafka.Producer(settings.kafka_options()))
    told = False
    while not stopping.is_set():
        waits = "the workers' encoder is not known yet; asking again"
        spaces = await kafka.in_reach(lambda: space.read(claims), CLAIM_POLL_S, waits, stopping.is_set)
        if spaces is not None and spaces.known:
            return spaces.known[0]
        if not told:
            told = True
            log.info("waits for the first worker: it says whose vectors the logs have")
        await asyncio.sleep(CLAIM_POLL_S)
    return None


async def switch(settings: Settings, manifest: Manifest | None, folder: Checkpoints, taken_back: bool) -> int:
    """Puts the switch to a checkpoint (None: the encoder as it is) into the examples log; its offset.

    Raises CheckpointError for a checkpoint of another encoder than the workers': no learner would go on after it.
    """
    adapter = None if manifest is None else folder.adapter(manifest)
    producer = kafka.Producer(settings.kafka_options())
    await producer.start()
    try:
        await _require_base(settings, producer, manifest)
        topic = settings.internal_topic("examples")
        message = examples.pack_adapter(adapter, taken_back)
        offset = await producer.send(topic, LEARNER_PARTITION, [(ADAPTER_KEY, message)])
        name = "" if adapter is None else adapter.name
        for manifest in _switched(folder, name, taken_back, offset).values():
            await announce(producer, settings, manifest)
    finally:
        await producer.stop()
    return offset


async def _require_base(settings: Settings, producer: kafka.Producer, manifest: Manifest | None) -> None:
    workers = (await space.read(space.log_of(settings, producer))).current
    if manifest is not None and workers is not None and workers.encoder != manifest.base:
        raise CheckpointError(
            f"checkpoint {manifest.name} is of the encoder {manifest.base}, the workers' is {workers.encoder}: "
            "take a checkpoint that was trained behind that one"
        )


async def try_out(settings: Settings, manifest: Manifest | None, folder: Checkpoints, share: float) -> int:
    """Puts the beginning of a trial into the examples log: a share of the users has the checkpoint (None: the encoder
    as it is); its offset, by which the trial is known. Told of by the challenger's manifest, or by that of the one in
    use. Raises CheckpointError, as `switch` does."""
    message = examples.pack_trial(None if manifest is None else folder.adapter(manifest), share)
    told_by = manifest or folder.current()

    def tell(offset: int) -> list[Manifest]:
        ended = {m.name: m for m in folder.trial_ended(offset)}
        if told_by is not None:
            challenger = "" if manifest is None else manifest.adapter
            ended[told_by.name] = folder.tried(told_by.name, offset, challenger, share)
        return list(ended.values())

    return await _tell(settings, message, tell, manifest)


async def end_trial(settings: Settings, folder: Checkpoints) -> int:
    """Puts the end of the trial into the examples log; its offset."""
    return await _tell(settings, examples.pack_trial_end(), folder.trial_ended)


async def _tell(
    settings: Settings, message: bytes, tell: Callable[[int], list[Manifest]], manifest: Manifest | None = None
) -> int:  # fmt: skip
    """tell: changes, and gives, the manifests that tell of the message at its offset."""
    producer = kafka.Producer(settings.kafka_options())
    await producer.start()
    try:
        await _require_base(settings, producer, manifest)
        topic = settings.internal_topic("examples")
        offset = await producer.send(topic, LEARNER_PARTITION, [(ADAPTER_KEY, message)])
        for changed in tell(offset):
            await announce(producer, settings, changed)
        return offset
    finally:
        await producer.stop()
