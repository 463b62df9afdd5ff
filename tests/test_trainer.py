"""The trainer against a broker and a folder: its decisions, its files, and that kill -9 changes none of them."""

import asyncio
import base64
import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import msgspec
import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from bench.deployment import Deployment
from state.sealing import SealError, is_sealed
from streams import checkpoints, examples, kafka, space
from streams.__main__ import app
from streams.announced import Announced
from streams.checkpoints import CheckpointError, Checkpoints, Manifest
from streams.datakeys import sealer_of
from streams.pipeline import ItemLearner
from streams.settings import Settings, environment
from streams.space import Space
from streams.trainer import Trainer, _claimed, record, switch
from streams.tuning import Decision, TuningConfig
from tests.tuning_world import BASE, DIM, LEARNER, TUNING, SmallTrainer, harmful, history, messages, planted

WAIT_S_MAX: Final = 120.0
MESSAGES: Final = 75


def settings_of(broker: str, folder: Path, name: str) -> Settings:
    return Settings(
        broker=broker, topic_prefix=f"{name}-", checkpoints=str(folder / "checkpoints"), trainer_dir=folder / "trainer",
        partitions=1, trainer_share=1.0,
    )  # fmt: skip


async def publish(settings: Settings, log: list[bytes]) -> None:
    producer = kafka.Producer(settings.kafka_options())
    await producer.start()
    for message in log:
        await producer.send(settings.internal_topic("examples"), 0, [(b"0", message)])
    await producer.stop()


async def run_until(trainer: Trainer, holds: Callable[[], bool]) -> None:
    task = asyncio.create_task(trainer.run())
    deadline = time.monotonic() + WAIT_S_MAX
    while not holds() and not task.done():
        assert time.monotonic() < deadline, trainer.tuning.phase
        await asyncio.sleep(0.02)
    trainer.stop()
    await task


async def test_trainer_promotes_announces_and_a_killed_one_goes_on(broker: str, tmp_path: Path) -> None:
    settings = settings_of(broker, tmp_path / "a", "trainer-a")
    Deployment(broker, tmp_path / "d", topic_prefix=settings.topic_prefix, partitions=1).create_topics()
    log = list(messages(MESSAGES))
    await publish(settings, log)
    trainer = SmallTrainer(settings, BASE, DIM, time.time)
    await run_until(trainer, lambda: trainer.tuning.phase == "watch" and trainer.tuning.offset >= len(log))
    [manifest] = [m for m in Checkpoints(settings.checkpoints).manifests() if m.state == "current"]
    assert [d["kind"] for d in manifest.decisions] == ["promote", "switched"]
    assert manifest.decisions[0]["log10_e_better"] > 2 and manifest.base == BASE and manifest.parent == ""
    adapter = Checkpoints(settings.checkpoints).adapter(manifest)
    assert trainer.tuning.current is not None and trainer.tuning.current.name == adapter.name == manifest.adapter
    told = [
        json.loads(record.value or b"{}")
        async for batch in kafka.read_log(settings.kafka_options(), settings.topic("encoder-checkpoints"), 0, 0, 2)
        for record in batch
    ]
    assert [one["state"] for one in told] == ["shadow", "shadow", "current"] and {t["name"] for t in told} == {
        manifest.name
    }
    followed = Announced(BASE)
    for one in told:
        followed.take(json.dumps(one).encode(), 1e9)
    [shown] = msgspec.to_builtins(followed.newest())
    assert (shown["state"], shown["current_since"], shown["decisions"]) == ("current", 1e9, manifest.decisions)
    assert shown["training"].items() <= manifest.training.items() and "loss" in shown["training"]
    assert list((settings.trainer_dir / "events").glob("events.out.tfevents.*"))
    # Another one that is killed over and over ends in the same files, and asks for nothing twice.
    other = settings.model_copy(
        update={"checkpoints": str(tmp_path / "b/checkpoints"), "trainer_dir": tmp_path / "b/trainer"}
    )
    end = await kafka.log_end(settings.kafka_options(), settings.internal_topic("examples"), 0)
    for cut in (3, 11, 40, 70, 90, end - 1):
        fresh = SmallTrainer(other, BASE, DIM, time.time)
        task = asyncio.create_task(fresh.run())
        deadline = time.monotonic() + WAIT_S_MAX
        while fresh.tuning.offset < cut:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.002)
        if cut < end - 1:
            task.cancel()  # nothing is saved on the way out, as by kill -9
            await asyncio.gather(task, return_exceptions=True)
        else:
            fresh.stop()
            await task
    assert history(other.checkpoints) == history(settings.checkpoints)
    assert fresh.tuning.champion.learner.digest() == trainer.tuning.champion.learner.digest()
    assert await kafka.log_end(settings.kafka_options(), settings.internal_topic("examples"), 0) == end


def test_a_trainer_ranks_more_than_the_workers_do(tmp_path: Path) -> None:
    settings = settings_of("127.0.0.1:1", tmp_path, "ranks")
    config = Trainer(settings, BASE, DIM, time.time).tuning.champion.learner.config
    assert config == replace(settings.learner_config(DIM), rank_items=settings.tuning_rank_items)
    assert config.rank_items > 10 * settings.learner_rank_items


async def test_a_trainer_waits_for_the_workers_encoder_and_switches_to_none_of_another(
    broker: str, tmp_path: Path
) -> None:  # fmt: skip
    settings = settings_of(broker, tmp_path, "trainer-e")
    Deployment(broker, tmp_path / "d", topic_prefix=settings.topic_prefix, partitions=1).create_topics()
    waits = asyncio.create_task(_claimed(settings, threading.Event()))
    producer = kafka.Producer(settings.kafka_options())
    await producer.start()
    claims = kafka.ChangelogTopic(settings.internal_topic(space.TOPIC), 0, producer, settings.kafka_options())
    await space.claim(claims, Space("newer:1", DIM), settings.app_id)
    assert await asyncio.wait_for(waits, WAIT_S_MAX) == Space("newer:1", DIM)
    folder, adapter = Checkpoints(settings.checkpoints), harmful()
    name = checkpoints.name_of(5, adapter)
    folder.add(adapter, Manifest(
        name=name, adapter=adapter.name, base=BASE, parent="", offset=5, rank=4, digest="", created=0
    ))  # fmt: skip
    with pytest.raises(CheckpointError, match=f"of the encoder {BASE}, the workers' is newer:1"):
        await switch(settings, folder.get(name), folder, taken_back=False)
    assert folder.current() is None
    assert await kafka.log_end(settings.kafka_options(), settings.internal_topic("examples"), 0) == 0
    assert await switch(settings, None, folder, taken_back=True) == 0  # the encoder as it is goes with every space
    await producer.stop()


async def test_a_switch_by_hand_is_watched_and_taken_back(
    broker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`headwater checkpoints promote` of a harmful one: the trainer takes it back, and every learner follows."""
    settings = settings_of(broker, tmp_path, "trainer-c")
    Deployment(broker, tmp_path / "d", topic_prefix=settings.topic_prefix, partitions=1).create_topics()
    log = list(messages(MESSAGES))
    half = len(log) // 2
    await publish(settings, log[:half])
    folder = Checkpoints(settings.checkpoints)
    bad = harmful()
    manifest = Manifest(
        name=checkpoints.name_of(5, bad), adapter=bad.name, base=BASE, parent="", offset=5, rank=4, digest="", created=0
    )
    folder.add(bad, manifest)
    for name, value in environment({"broker": broker, "topic_prefix": settings.topic_prefix, "partitions": "1",
                                    "checkpoints": settings.checkpoints}).items():  # fmt: skip
        monkeypatch.setenv(name, value)
    runner = CliRunner()
    done = await asyncio.to_thread(runner.invoke, app, ["checkpoints", "promote", bad.name])
    assert done.exit_code == 0, done.output
    current = folder.current()
    assert current is not None and current.name == manifest.name
    await publish(settings, log[half:])
    trainer = SmallTrainer(settings, BASE, DIM, time.time)
    trainer.tuning.config = trainer.config = TuningConfig(**{**TUNING.__dict__, "round_examples": 1 << 40})
    await run_until(trainer, lambda: folder.get(bad.name).state == "taken back" and trainer.tuning.phase == "gather")
    assert [d["kind"] for d in folder.get(bad.name).decisions] == ["switched", "rollback"]
    assert trainer.tuning.current is None and folder.current() is None
    replayed = ItemLearner(LEARNER, DIM, BASE)
    adapters = []
    async for batch in kafka.read_log(
        settings.kafka_options(), settings.internal_topic("examples"), 0, 0, trainer.tuning.offset
    ):
        for one in batch:
            if replayed.learn(one.offset, one.value or b"").urgent:
                adapters += [replayed.learner.matrix.adapter]
    assert [a and a.name for a in adapters] == [bad.name, None]
    assert replayed.learner.digest() == trainer.tuning.champion.learner.digest()
    shown = await asyncio.to_thread(runner.invoke, app, ["checkpoints", "show", bad.name])
    assert shown.exit_code == 0 and "taken back" in shown.output and "rollback" in shown.output
    listed = await asyncio.to_thread(runner.invoke, app, ["checkpoints", "list", "--json"])
    assert [m["state"] for m in json.loads(listed.output)] == ["taken back"]


async def test_a_sealed_log_needs_the_keys_and_the_state_is_sealed_too(broker: str, tmp_path: Path) -> None:
    settings = settings_of(broker, tmp_path, "trainer-s")
    Deployment(broker, tmp_path / "d", topic_prefix=settings.topic_prefix, partitions=1).create_topics()
    keyed = settings.model_copy(update={"data_keys": SecretStr(base64.b64encode(bytes(range(32))).decode())})
    sealer = sealer_of(keyed)
    assert sealer is not None
    log = list(messages(12))
    await publish(settings, [sealer.seal_message(m) if examples.read_header(m)[0] == 1 else m for m in log])
    blind = SmallTrainer(settings, BASE, DIM, time.time)
    with pytest.raises(SealError, match="data keys"):
        await blind.run()
    trainer = SmallTrainer(keyed, BASE, DIM, time.time)
    await run_until(trainer, lambda: trainer.tuning.offset == len(log) - 1)
    assert trainer.tuning.examples > 100
    assert is_sealed((settings.trainer_dir / "tuning.msgpack").read_bytes())
    again = SmallTrainer(keyed, BASE, DIM, time.time)
    await run_until(again, lambda: again.tuning.offset == len(log) - 1)
    assert again.tuning.save() == trainer.tuning.save()


@pytest.mark.embedded
async def test_a_candidate_of_a_state_that_is_left_aside_is_dropped(broker: str, tmp_path: Path) -> None:
    settings = settings_of(broker, tmp_path, "trainer-l")
    Deployment(broker, tmp_path / "d", topic_prefix=settings.topic_prefix, partitions=1).create_topics()
    folder, adapter = Checkpoints(settings.checkpoints), planted()
    made = Decision("candidate", adapter, "", 5, {"loss": 1.0})
    record(folder, made, 1e9)
    settings.trainer_dir.mkdir(parents=True)
    (settings.trainer_dir / "tuning.msgpack").write_bytes(b"of another configuration")
    trainer = SmallTrainer(settings, BASE, DIM, time.time)
    await run_until(trainer, lambda: folder.get(adapter.name).state == "dropped")
    [manifest] = folder.manifests()
    assert manifest.decisions == [{"kind": "drop", "position": -1, "reason": "the trainer's state was set aside"}]
    told = kafka.read_log(settings.kafka_options(), settings.topic("encoder-checkpoints"), 0, 0, 0)
    assert [json.loads(one.value or b"{}")["state"] async for batch in told for one in batch] == ["dropped"]
    [again] = record(folder, made, 1e9)
    assert again.state == "shadow", "a loop that makes it anew decides on it anew"
    assert folder.prune(0) == []


def test_files_are_whole_or_refused(tmp_path: Path) -> None:
    folder = Checkpoints(str(tmp_path / "x"))
    assert folder.manifests() == [] and folder.current() is None
    for number, adapter in enumerate((planted(), harmful())):
        folder.add(adapter, Manifest(
            name=checkpoints.name_of(number, adapter), adapter=adapter.name, base=BASE, parent="", offset=number,
            rank=4, digest="", created=float(number),
        ))  # fmt: skip
    good, bad = folder.manifests()
    assert folder.adapter(good).pack() == planted().pack()
    assert checkpoints.find(folder.url, good.adapter).name == good.adapter
    assert checkpoints.find("", f"{folder.url}/{good.name}.safetensors").name == good.adapter
    folder.switched(good.adapter, taken_back=False)
    folder.switched(bad.adapter, taken_back=False)
    assert [m.state for m in folder.manifests()] == ["retired", "current"]
    folder.switched(good.adapter, taken_back=True)
    assert [m.state for m in folder.manifests()] == ["current", "taken back"]
    weights = tmp_path / "x" / f"{bad.name}.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(CheckpointError, match="not what its manifest says"):
        folder.adapter(folder.get(bad.name))
    with pytest.raises(CheckpointError, match="no adapter"):
        checkpoints.read_weights(b"\x05" * 20)
    with pytest.raises(CheckpointError, match="headwater checkpoints list"):
        folder.get("nothing")
    assert folder.prune(0) == [bad.name] and [m.name for m in folder.manifests()] == [good.name]
    assert not list((tmp_path / "x").glob(".*"))
    shutil.rmtree(tmp_path / "x")
    with pytest.raises(CheckpointError, match="HEADWATER_CHECKPOINTS"):
        Checkpoints("nosuch://x")


def test_a_challenger_is_kept_while_its_trial_is_on(tmp_path: Path) -> None:
    folder = Checkpoints(str(tmp_path))
    for number, adapter in enumerate((planted(), harmful())):
        folder.add(adapter, Manifest(
            name=checkpoints.name_of(number, adapter), adapter=adapter.name, base=BASE, parent="", offset=number,
            rank=4, digest="", created=float(number), state=checkpoints.DROPPED,
        ))  # fmt: skip
    tried, other = folder.manifests()
    folder.tried(tried.name, 7, tried.adapter, 0.1)
    assert folder.trial_ended(7) == [], "a switch that is learnt again, of before the trial, does not end it"
    assert folder.prune(0) == [other.name] and folder.get(tried.name).trial == 7
    [ended] = folder.trial_ended(9)
    assert [one["kind"] for one in ended.decisions] == ["trial", "trial ended"] and folder.trial_ended(9) == []
    assert folder.prune(0) == [tried.name]


def test_adapter_message_survives_the_log() -> None:
    adapter, taken_back = examples.unpack_adapter(examples.pack_adapter(None, taken_back=True))
    assert adapter is None and taken_back
