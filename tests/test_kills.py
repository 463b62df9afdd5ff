"""The trainer killed between any two of its steps, over a log in memory: what is on disk is all that is left of it."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from streams import checkpoints, examples
from streams.checkpoints import DROPPED, SHADOW, Checkpoints, Manifest
from streams.settings import TRAINER_CRASH_STEPS, Settings
from streams.tuning import TuningConfig
from tests.tuning_world import BASE, DIM, TUNING, SmallTrainer, harmful, history, messages

LOG = [*messages(70)]
SWITCH_AT = 40  # the log itself switches to a harmful adapter, which is taken back
KILLS_MAX = 2  # of one moment


class Killed(BaseException):
    """Nothing that the program has catches it."""


class Record(NamedTuple):
    offset: int
    value: bytes


class MemoryBroker:
    """`streams.kafka` as far as a trainer uses it: one examples log, and a list of what was announced."""

    def __init__(self, log: Sequence[bytes]) -> None:
        self.log = list(log)
        self.announced: list[bytes] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        broker = self

        class Producer:
            def __init__(self, options: Any) -> None: ...

            async def start(self) -> None: ...

            async def stop(self) -> None: ...

            async def send(self, topic: str, partition: int, records: Sequence[tuple[bytes, bytes]]) -> int:
                broker.log += [value for _, value in records]
                return len(broker.log) - 1

            async def send_one(self, topic: str, key: bytes, value: bytes) -> tuple[int, int]:
                broker.announced.append(value)
                return 0, len(broker.announced) - 1

        class Changelog:
            def __init__(self, *_: Any) -> None: ...

            async def first(self) -> int:
                return 0

        async def read_records(options: Any, topic: str, partition: int, start: int, **_: Any) -> AsyncGenerator[Any]:
            while True:
                batch = [Record(at, broker.log[at]) for at in range(start, min(start + 8, len(broker.log)))]
                start += len(batch)
                yield batch
                await asyncio.sleep(0)

        async def log_end(*_: Any) -> int:
            return len(broker.log)

        monkeypatch.setattr("streams.kafka.Producer", Producer)
        monkeypatch.setattr("streams.kafka.log_end", log_end)
        monkeypatch.setattr("streams.kafka.ChangelogTopic", Changelog)
        monkeypatch.setattr("streams.kafka.read_records", read_records)


class ShortTrainer(SmallTrainer):
    config = TuningConfig(**{**TUNING.__dict__, "round_examples": 900, "shadow_tests": 800, "watch_tests": 700})


def new_trainer(settings: Settings, crash: Callable[[str], None] = lambda step: None) -> ShortTrainer:
    return ShortTrainer(settings, BASE, DIM, lambda: 1.0, crash)


async def to_the_end(trainer: ShortTrainer, broker: MemoryBroker) -> None:
    """Until it waits at the log's end with nothing to ask for."""
    running = asyncio.create_task(trainer.run())
    while not running.done():
        if trainer.tuning.offset >= len(broker.log) - 1 and trainer.tuning.request() is None:
            trainer.stop()
        await asyncio.sleep(0.001)
    await running


def settings_in(folder: Path) -> Settings:
    """A folder with the harmful checkpoint, and older ones that the first candidate makes one too many."""
    settings = Settings(
        checkpoints=str(folder / "checkpoints"), trainer_dir=folder / "trainer", checkpoints_keep=1, trainer_share=1.0
    )  # fmt: skip
    for number in range(3):
        adapter = replace(harmful(), scale=harmful().scale + number)
        Checkpoints(settings.checkpoints).add(adapter, Manifest(
            name=checkpoints.name_of(number, adapter), adapter=adapter.name, base=BASE, parent="", offset=number,
            rank=4, digest="", created=0.0, state=DROPPED if number else SHADOW,
        ))  # fmt: skip
    return settings


def files(url: str) -> list[str]:
    return sorted(path.name for path in Path(url).iterdir())


def test_a_trainer_killed_at_any_moment_ends_as_one_that_never_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the named moments in turn; the log has each switch once, and no file is left over."""
    source = [*LOG[:SWITCH_AT], examples.pack_adapter(harmful()), *LOG[SWITCH_AT:]]
    undisturbed, clean = MemoryBroker(source), settings_in(tmp_path / "clean")
    undisturbed.install(monkeypatch)
    passed: Counter[str] = Counter()
    whole = new_trainer(clean, lambda step: passed.update([step]))
    asyncio.run(to_the_end(whole, undisturbed))
    assert passed.keys() == set(TRAINER_CRASH_STEPS), "the log leads through every moment"
    assert len(undisturbed.log) > len(source), "the trainer asked for a switch of its own"
    expected = whole.tuning.save()
    for moment in TRAINER_CRASH_STEPS:
        broker, settings = MemoryBroker(source), settings_in(tmp_path / moment)
        broker.install(monkeypatch)
        wanted = min(KILLS_MAX, passed[moment])
        killed = 0

        def crash(step: str, moment: str = moment) -> None:
            if step == moment:
                raise Killed(step)

        for _ in range(wanted):
            try:
                asyncio.run(to_the_end(new_trainer(settings, crash), broker))
            except Killed:
                killed += 1
            folder = Checkpoints(settings.checkpoints)
            usable = [folder.adapter(m).name == m.adapter for m in folder.manifests()]
            assert all(usable), "what has a manifest is whole"
        assert killed >= 1, moment
        last = new_trainer(settings)
        asyncio.run(to_the_end(last, broker))
        assert last.tuning.save() == expected, moment
        assert broker.log == undisturbed.log, moment
        assert history(settings.checkpoints) == history(clean.checkpoints), moment
        assert files(settings.checkpoints) == files(clean.checkpoints), moment
