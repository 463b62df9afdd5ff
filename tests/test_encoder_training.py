"""`headwater encoder train`: what is kept of a stream, and an encoder's folder that is whole or not there."""

import asyncio
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from model import lora
from model.align import Alignment
from model.encoder import Encoder
from model.items import half
from model.lora import PAIRS, LoraTrainingConfig, TrainingData
from streams import encoder_training as tool
from streams import kafka, replay, topics
from streams.__main__ import app
from streams.encoder_training import BufferConfig, Sample, TrainOptions
from streams.evaluate import stream_of
from streams.settings import Fault, Settings
from streams.space import Space
from tests import tiny_model

ITEMS, USERS, CLICKS = 40, 40, 18
SECRET = "nobody but me knows this"
CONFIG = LoraTrainingConfig(layers=0, steps=20, lr=5e-3, pairs=8, max_tokens=16)


class Killed(BaseException):
    """Nothing that the program has catches it."""


def _lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small stream and a small encoder: users click items in turn, and write about what they click."""
    folder = tmp_path_factory.mktemp("world")
    tiny_model.make(folder / "tiny")
    draw = random.Random(3)
    items = [{"item_id": f"i{n}", "text": f"number {n} of shelf {n % 5}", "ts": 1.0} for n in range(ITEMS)]
    items[3]["vector"] = [1.0] * 8
    items[4]["text"] = ""
    events: list[dict[str, Any]] = []
    order = {user: draw.sample(range(ITEMS), CLICKS) for user in range(USERS)}
    for turn in range(CLICKS):
        for user in range(USERS):
            ts, item = 1000.0 + 3000 * turn + user, f"i{order[user][turn]}"
            event = {"type": "click", "user_id": f"u{user}", "item_id": item, "action": "click", "ts": ts}
            if turn % 3 == 1:
                words = f"user {user} says {SECRET} about shelf {order[user][turn] % 5} for the time {turn}"
                event = {"type": "comment", "user_id": f"u{user}", "item_id": item, "text": words, "ts": ts}
            if turn % 3 == 2:
                event["ts"] = ts - 2500  # in the session of the one before
            events.append(event)
    events.sort(key=lambda event: event["ts"])
    _lines(folder / "items.jsonl.gz", items)
    _lines(folder / "events.jsonl.gz", events)
    return folder


@pytest.fixture
def settings(world: Path, make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("XDG_CACHE_HOME", str(world / "cache"))
    return make_settings(encoder=str(world / "tiny"), device="cpu")


def _options(world: Path, out: Path, **more: Any) -> TrainOptions:
    given = {"items": world / "items.jsonl.gz", "events": world / "events.jsonl.gz", "share": 1.0, "config": CONFIG}
    return TrainOptions(out, **{**given, **more})


def _train(options: TrainOptions, settings: Settings, crash: Callable[[str], None] | None = None) -> dict[str, Any]:
    return tool.train(options, settings, lambda: 1e9, lambda *_: None, crash)


@pytest.fixture(scope="module")
def undisturbed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training that nothing interrupts leaves."""
    out = tmp_path_factory.mktemp("whole") / "trained"
    _train(_options(world, out), Settings(encoder=str(world / "tiny"), device="cpu"))
    return out


def _gathered(world: Path, settings: Settings, buffer: BufferConfig | None = None) -> TrainingData:
    source = tool.read_files(world / "items.jsonl.gz", world / "events.jsonl.gz", settings)
    return tool.gather(source.stream, Encoder(settings.encoder, "cpu"), settings, buffer=buffer)


def test_sample_is_bounded_and_a_function_of_what_was_offered() -> None:
    positions = list(range(500))
    samples = []
    for seed in (0, 1):
        random.Random(seed).shuffle(positions)
        sample: Sample[str] = Sample(20)
        for position in (*positions, *positions[:9]):
            sample.offer(position, f"v{position}")
        samples.append(sample.values())
    assert samples[0] == samples[1] and len(set(samples[0])) == 20
    assert samples[0] == sorted(samples[0], key=lambda value: int(value[1:]))
    assert len({value for value in samples[0] if int(value[1:]) < 250}) in range(4, 17), "of the whole past"


def test_pairs_are_what_the_events_say(world: Path, settings: Settings) -> None:
    data = _gathered(world, settings)
    assert len(data.texts) == len(set(data.texts))
    for side in (data.train, data.held):
        for kind, rows in side.pairs.items():
            assert len(rows), kind
            for left, right, group in rows.tolist():
                one, other = data.texts[left], data.texts[right]
                if kind == "comment_item":
                    assert one.split(" about ")[1].split(" for ")[0].split()[-1] == other.split()[-1], (
                        "its item's shelf"
                    )
                elif kind == "comment_comment":
                    assert one.split(" says ")[0] == other.split(" says ")[0], "one user"
                    assert int(other.split()[-1]) - int(one.split()[-1]) == 3, "one after the other"
                else:
                    assert one.startswith("number") and other.startswith("number") and group == -1
    assert not any("number 3 " in text for text in data.texts), "its vector is not of its text alone"
    newest = [int(data.texts[right].split()[-1]) for _, right, _ in data.train.pairs["comment_comment"].tolist()]
    oldest = [int(data.texts[right].split()[-1]) for _, right, _ in data.held.pairs["comment_comment"].tolist()]
    assert max(newest) <= min(oldest), "what is held out comes later"
    assert not set(data.train.views.tolist()) & set(data.held.views.tolist())


def test_buffer_bounds_what_is_kept(world: Path, settings: Settings) -> None:
    buffer = BufferConfig(problems=3, examples=4, candidates=8, told=5, pairs=20, views=10)
    data = _gathered(world, settings, buffer)
    again = _gathered(world, settings, buffer)
    assert len(data.train.problems) == 3
    for problem in data.train.problems:
        assert problem.words.shape[0] <= 4 and problem.offset.shape[1] <= 8 and problem.told.shape[1] == 5
    assert {kind: len(rows) for kind, rows in data.train.pairs.items()} == dict.fromkeys(PAIRS, 20)
    assert len(data.train.views) == 10
    assert tool._identity("e", data, {}) == tool._identity("e", again, {})


def test_problems_name_the_texts_that_their_words_are_made_of(
    world: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """words = sum of weights times (vector - mean) over the texts told, up to int8's rounding."""
    checked: list[float] = []
    encoder = Encoder(settings.encoder, "cpu")
    plain = tool._Gathering._problem

    def checking(self: Any, batch: Any, events: Any) -> Any:
        problem = plain(self, batch, events)
        if problem is not None and self._item:
            mu, words = self.learner.matrix.arrays.mu, list(self._ids)
            for at in range(len(problem.words)):
                texts = [words[i] for i in problem.told[at].tolist()]
                made = problem.weight[at] @ (half(encoder.encode(texts)) - mu)
                checked.append(float(np.abs(made - problem.words[at]).max() / np.abs(problem.words[at]).max()))
        return problem

    monkeypatch.setattr(tool._Gathering, "_problem", checking)
    source = tool.read_files(world / "items.jsonl.gz", world / "events.jsonl.gz", settings)
    described = [item for item in source.stream.items if item.text and item.vector is None]
    stream = stream_of("plain", described, source.stream.events, settings.evidence_config())
    tool.gather(stream, encoder, settings, buffer=BufferConfig(told=60))
    assert len(checked) > 50
    assert np.quantile(checked, 0.9) < 0.02 and max(checked) < 0.1


def test_manifest_tells_what_the_encoder_was_made_of(world: Path, undisturbed: Path, settings: Settings) -> None:
    told = json.loads((undisturbed / "manifest.json").read_text())
    encoder, base = Encoder(str(undisturbed), "cpu"), Encoder(settings.encoder, "cpu")
    assert told["name"] == encoder.name and told["base"] == base.name
    assert encoder.name != base.name and told["parent"] == ""
    assert encoder.trained_on == "the recorded files items.jsonl.gz and events.jsonl.gz" and base.trained_on == ""
    parts = {"rec", *PAIRS, "views", "anchor"}
    for losses in (told["losses"]["before"], told["losses"]["after"], *told["held_out"].values()):
        assert set(losses) == parts
    assert set(told["weights"]) == parts - {"anchor"} and all(told["weights"].values())
    assert told["covered"]["files"] == {"items": "items.jsonl.gz", "events": "events.jsonl.gz"}
    assert told["covered"]["events"] == USERS * CLICKS and told["covered"]["digest"]
    assert told["seed"] == 1 and told["config"]["rank"] == 8 and told["digest"]
    assert told["counts"]["problems"] and told["counts"]["texts"] and told["training"]["steps"] == CONFIG.steps
    assert told["training"]["texts"] > 0 and told["training"]["cpu_s"] > 0
    figures = EventAccumulator(str(undisturbed / "events"), size_guidance={"tensors": 0}).Reload()
    assert len(figures.Tensors("encoder/loss_rec")) == CONFIG.steps
    assert {"encoder/texts_per_s", "encoder/weight_views", "encoder/held_out_rec"} <= set(figures.Tags()["tensors"])


def test_no_file_holds_what_users_wrote(undisturbed: Path) -> None:
    for path in undisturbed.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("moment", ["train:9", "state:1", "state:2", "weights:1", "manifest:1"])
def test_training_that_is_killed_goes_on_as_if_it_had_not_been(
    world: Path, undisturbed: Path, settings: Settings, tmp_path: Path, moment: str
) -> None:
    out, (step, count) = tmp_path / "trained", moment.split(":")
    left = int(count)

    def crash(at: str) -> None:
        nonlocal left
        left -= at == step
        if not left:
            left = -1
            raise Killed

    with pytest.raises(Killed):
        _train(_options(world, out), settings, crash)
    assert not out.exists(), "no half of a folder that loads"
    for path in (tmp_path / ".trained.training").rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
    _train(_options(world, out), settings)
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (out / file).read_bytes() == (undisturbed / file).read_bytes()
    one, other = (json.loads((folder / "manifest.json").read_text()) for folder in (out, undisturbed))
    for name in ("name", "digest", "losses", "held_out", "weights", "counts", "identity"):
        assert one[name] == other[name], name
    assert sorted(path.name for path in tmp_path.iterdir() if "trained" in path.name) == ["trained"]


# The command, but for its low priority: beside a suite it would get no core for minutes.
AT_ONCE: Final = "import os; del os.SCHED_IDLE; from streams.__main__ import main; main()"


def test_process_that_is_killed_goes_on_where_it_was(world: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "trained"
    command = [
        sys.executable, "-c", AT_ONCE, "encoder", "train", "--out", str(out), "--json", "--share", "1",
        "--items", str(world / "items.jsonl.gz"), "--events", str(world / "events.jsonl.gz"), "--layers", "0",
        "--steps", "20", "--lr", "5e-3", "--pairs", "8", "--max-tokens", "16",
    ]  # fmt: skip
    own = {"HEADWATER_ENCODER": str(world / "tiny"), "HEADWATER_DEVICE": "cpu", "XDG_CACHE_HOME": str(world / "cache")}
    killed = subprocess.run(
        command, env={**os.environ, **own, "HEADWATER_CRASH_AT": "train:18"}, capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert (tmp_path / ".trained.training" / "state.pt").exists() and not out.exists()
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    told = json.loads(done.stdout)
    assert told["training"]["steps_of_this_run"] == 20 - tool.SAVE_STEPS
    assert told["digest"] == json.loads((undisturbed / "manifest.json").read_text())["digest"]


def test_trained_encoder_is_trained_further_and_names_its_parent(
    world: Path, undisturbed: Path, settings: Settings, tmp_path: Path
) -> None:
    """Behind the map into another one's space, too: the model is trained, the map is not."""
    config = LoraTrainingConfig(layers=0, steps=2, pairs=8, max_tokens=16)
    name = json.loads((undisturbed / "manifest.json").read_text())["name"]
    matrix = np.eye(tiny_model.DIM, 8, dtype=np.float32)
    Alignment(str(undisturbed), name, "theirs", matrix).write(tmp_path / "aligned")
    aligned = Encoder(str(tmp_path / "aligned"), "cpu")
    assert aligned.name != name and aligned.trained_on == Encoder(str(undisturbed), "cpu").trained_on != ""
    own = settings.model_copy(update={"encoder": str(tmp_path / "aligned")})
    told = _train(_options(world, tmp_path / "more", config=config), own)
    assert told["parent"] == told["base"] == name and told["base_model"] == str(undisturbed)
    assert told["trained_on"] == f"{aligned.trained_on}; before that on {aligned.trained_on}"
    assert Encoder(str(tmp_path / "more"), "cpu").trained_on == told["trained_on"]


def test_what_cannot_go_on_is_told(
    world: Path, undisturbed: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Fault, match="is there already"):
        _train(_options(world, undisturbed), settings)
    with pytest.raises(Fault, match="there is no folder"):
        _train(_options(world, tmp_path / "no" / "where"), settings)

    out = tmp_path / "trained"
    _interrupt(_options(world, out), settings)
    work = tmp_path / ".trained.training"
    few = _lines(
        tmp_path / "few.jsonl.gz", [{"type": "click", "user_id": "u", "item_id": "i1", "action": "c", "ts": 5}]
    )
    with monkeypatch.context() as patched:
        patched.setattr(tool, "gather", None)  # nothing is encoded before it is told
        with pytest.raises(Fault, match="on other files"):
            _train(_options(world, out, events=few), settings)
        patched.setattr(tool, "_read", None)  # nor read
        with pytest.raises(Fault, match="other options"):
            _train(_options(world, out, config=replace(CONFIG, seed=2)), settings)
        with pytest.raises(lora.TrainingError, match="w_qkv"):
            _train(_options(world, out, config=replace(CONFIG, targets=("w_qkv",))), settings)
        with tool._alone(work, out), pytest.raises(Fault, match="another process"):
            _train(_options(world, out), settings)
    shutil.rmtree(work)
    with pytest.raises(lora.TrainingError, match="nothing to train"):
        _train(_options(world, out, events=few), settings)
    with pytest.raises(lora.TrainingError, match="diverged"):
        _train(_options(world, out, config=replace(CONFIG, lr=1e30, steps=2)), settings)
    with monkeypatch.context() as patched:
        patched.setattr(lora, "_require_finite", lambda *_: None)
        with pytest.raises(lora.TrainingError, match="vectors are nothing"):
            _train(_options(world, out, config=replace(CONFIG, lr=1e30, steps=2)), settings)
    assert not [path.name for path in tmp_path.iterdir() if "trained" in path.name], "nothing is left of it"
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(lora.TrainingError, match=r"headwater\[lora\]"):
        _train(_options(world, out), settings)


def test_command_says_what_is_missing(
    world: Path, tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_setscheduler", lambda *_: None)  # the process is the tests'
    asked = ["encoder", "train", "--out", str(tmp_path / "x"), "--items", str(world / "items.jsonl.gz")]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 2 and "go together" in result.output
    for option, value in (("--lr", "nan"), ("--lr", "inf"), ("--anchor", "inf"), ("--share", "nan")):
        result = CliRunner().invoke(app, [*asked, option, value])
        assert result.exit_code == 2 and option in result.output
    more = [*asked, "--events", str(tmp_path / "none.jsonl")]
    result = CliRunner().invoke(app, more, env={"HEADWATER_ENCODER": str(world / "tiny")})
    assert result.exit_code == 1 and "none.jsonl" in result.output
    own = {"HEADWATER_ENCODER": str(world / "tiny"), "HEADWATER_BROKER": f"127.0.0.1:{free_port}"}
    result = CliRunner().invoke(app, asked[:4], env=own)
    assert result.exit_code == 1 and "headwater broker" in result.output


def test_logs_give_what_the_files_give(
    world: Path, make_settings: Callable[..., Settings], broker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not what was withdrawn, nor of users who were erased since, though a training began before that."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = make_settings(broker=broker, encoder=str(world / "tiny"), device="cpu", partitions=2)
    topics.ensure(settings)
    with pytest.raises(Fault, match="no click and no comment"):
        _train(_options(world, tmp_path / "x", items=None, events=None), settings)
    replay.replay(settings, world / "items.jsonl.gz", world / "events.jsonl.gz")
    recorded = tool.read_files(world / "items.jsonl.gz", world / "events.jsonl.gz", settings).stream
    source = _read(settings)
    assert source.stream.events == recorded.events
    assert sorted(source.stream.items, key=lambda item: item.item_id) == sorted(
        recorded.items, key=lambda item: item.item_id
    )
    upto = source.covered["offsets"]
    assert sum(upto["clicks"].values()) + sum(upto["comments"].values()) == len(recorded.events)
    options = _options(world, tmp_path / "x", items=None, events=None)
    _interrupt(options, settings)
    _interrupt(options, settings)  # it goes on
    assert not (tmp_path / "cache").exists(), "what users wrote is in no cache"
    _append(settings, "erasures", b"u7", json.dumps({"user_id": "u7"}).encode())
    _append(settings, "items", b"i9", None)
    later = _read(settings).stream
    assert later.events == [event for event in recorded.events if event.user_id != "u7"]
    assert {item.item_id for item in recorded.items} - {item.item_id for item in later.items} == {"i9"}
    again = _read(settings, upto).stream
    assert again.events == later.events and "i9" in {item.item_id for item in again.items}, "as far as it was asked for"
    with pytest.raises(Fault, match=r"x\.training holds .* a user was erased"):
        _interrupt(options, settings)
    shutil.rmtree(tmp_path / ".x.training")
    told = _train(replace(options, config=replace(CONFIG, steps=2)), settings)
    assert told["trained_on"] == f"the logs of app id {settings.app_id}"
    assert told["covered"]["offsets"]["erasures"] != upto["erasures"]
    _append(settings, "encoder", b"", msgspec.json.encode(Space("theirs:1", 8)), internal=True)
    with pytest.raises(Fault, match="is theirs:1, and HEADWATER_ENCODER gives tiny:"):
        _train(replace(options, out=tmp_path / "y"), settings)


def _read(settings: Settings, upto: Any = None) -> tool.Source:
    return asyncio.run(tool.read_logs(settings, upto))


def _interrupt(options: TrainOptions, settings: Settings) -> None:
    def crash(step: str) -> None:
        if step == "train":
            raise Killed

    with pytest.raises(Killed):
        _train(options, settings, crash)


def _append(settings: Settings, topic: str, key: bytes, value: bytes | None, *, internal: bool = False) -> None:
    async def send() -> None:
        producer = kafka.Producer(settings.kafka_options())
        await producer.start()
        name = settings.internal_topic(topic) if internal else settings.topic(topic)
        await producer.send_one(name, key, value)
        await producer.stop()

    asyncio.run(send())
