"""An A/B test on live users: what is shown is noted, whatever the broker does; the report finds what was planted."""

import asyncio
import contextlib
import itertools
import json
import math
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from kafka import KafkaProducer
from typer.testing import CliRunner

from bench.deployment import Deployment, WorkerProcess
from bench.words import DIM, WordVectors
from model import gate
from model.adapter import Adapter
from model.trial import Trial, bucket_of
from monitoring.metrics import Metrics
from state.changelog import LogRecord
from state.sealing import Sealer
from streams import __main__ as main
from streams import checkpoints, examples, kafka, tokens, trials
from streams.__main__ import app
from streams.answers import RankedItem, Recommendations
from streams.audit import pseudonym
from streams.checkpoints import Checkpoints, Manifest
from streams.explain import rebuild_list
from streams.pipeline import ItemLearner
from streams.settings import Settings, environment
from streams.trials import Choice, Exposure, Exposures, Report, report
from streams.web import create_app
from tests.serving_world import TEXT_DIM, World, small_world
from tests.test_web import client_of
from tests.test_worker import FILMS

WINDOW_S = 1800.0
START_S = 1_700_000_000.0
TRIAL = 41  # its offset
SPLIT = Trial(None, 0.5, TRIAL).arms()


# -- the arithmetic


NULLS = [  # share, rate, users
    (0.1, 0.01, 1500), (0.1, 0.01, 5000), (0.1, 0.003, 3000), (0.1, 0.003, 10_000), (3 / 256, 0.01, 10_000),
    (0.5, 0.01, 400), (0.5, 0.05, 2000), (0.9, 0.01, 3000), (0.2, 0.3, 2000),
]  # fmt: skip


@pytest.fixture
def by_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of the search for an interval's end: whether it is above 0, and no more. It takes a twentieth."""
    monkeypatch.setattr(gate, "DELTA_STEPS", 1)


def trial_of(seed: int, users: int, share: float, champion: float, challenger: float) -> tuple[np.ndarray, np.ndarray]:
    """(values, whether a challenger's) of users with one outcome each."""
    rng = np.random.default_rng(seed)
    arms = rng.random(users) < share
    return (rng.random(users) < np.where(arms, challenger, champion)).astype(float), arms


@pytest.mark.parametrize(("share", "rate", "users"), NULLS)
def test_no_difference_is_seldom_taken_for_one_however_rare_outcomes_are(
    share: float, rate: float, users: int, by_sign: None
) -> None:
    """200 trials of equals. The interval of any look is of all looks: it never grows again."""
    anytime = single = covered = 0
    for seed in range(200):
        values, arms = trial_of(seed, users, share, rate, rate)
        low, high = gate.difference_anytime(values, arms, share, 0.05)
        anytime += low >= 0 or high <= 0
        _, low, high, p = gate.difference(values[arms], values[~arms], 0.05)
        single += p < 0.05
        covered += low <= 0 <= high
    noise = 3 * math.sqrt(200 * 0.05 * 0.95)
    assert anytime <= 10 and single <= 10 + noise and covered >= 190 - noise


def test_a_rate_of_outcomes_that_nobody_had_is_not_known_to_be_zero() -> None:
    mean, low, high = gate.mean_interval(np.zeros(100), 0.05)
    assert mean == low == 0 and high == pytest.approx(0.037, abs=0.001)
    mean, low, high = gate.mean_interval((np.arange(200) < 60).astype(float), 0.05)  # Wilson's, as tables have it
    assert (mean, low, high) == pytest.approx((0.3, 0.2407, 0.3668), abs=0.001)
    halves = gate.mean_interval(np.tile([0.2, 0.4], 200), 0.05)
    assert halves[2] - halves[1] < 0.05 and gate.mean_interval(np.ones(1), 0.05)[2] == 1
    assert gate.mean_interval(np.tile([0.2, 0.0, 0.0, 0.0], 2), 0.05)[2] > 0.3, "two outcomes are no many users"


def test_a_p_is_that_of_every_split_into_these_arms() -> None:
    """Of three who chose all are challengers, or all champions, in 10 of 70 splits (Fisher's two-sided p)."""
    challenger, champion = np.array([1.0, 1, 1, 0]), np.zeros(4)
    assert gate.permutation_p(challenger, champion) == pytest.approx(10 / 70, abs=0.02)
    assert gate.permutation_p(champion, challenger) == gate.permutation_p(challenger, champion)
    assert gate.permutation_p(np.ones(3), np.ones(3)) == 1.0
    assert gate.permutation_p(np.ones(99), np.zeros(99)) == pytest.approx(1e-4)


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_intervals_find_a_difference_and_hold_it(share: float) -> None:
    held = found = single = 0
    for seed in range(30):
        values, arms = trial_of(seed, 10_000 if share < 0.5 else 4000, share, 0.3, 0.4)
        low, high = gate.difference_anytime(values, arms, share, 0.05)
        found += low > 0
        held += low <= 0.1 <= high
        mean, bottom, top, p = gate.difference(values[arms], values[~arms], 0.05)
        single += bottom <= 0.1 <= top
        assert mean == pytest.approx(0.1, abs=0.07) and p < 0.01
    assert found >= 28 and held >= 28 and single >= 25


@pytest.mark.parametrize(("share", "rate", "users"), [(0.5, 0.3, 2000), (0.1, 0.3, 6000), (0.5, 0.05, 18_000)])
def test_a_lift_of_a_fifth_is_found_in_half_of_the_trials_by_then(
    share: float, rate: float, users: int, by_sign: None
) -> None:
    """As many users as the asymptotic sequence took that this one is in place of, within a fifth."""
    found = 0
    for seed in range(40):
        low, _ = gate.difference_anytime(*trial_of(seed, users, share, rate, 1.2 * rate), share, 0.05)
        found += low >= 0
    assert found >= 16


def test_what_one_more_user_can_tell_never_widens_the_interval() -> None:
    values, arms = trial_of(1, 900, 0.3, 0.3, 0.5)
    looks = [gate.difference_anytime(values[:n], arms[:n], 0.3, 0.05) for n in range(0, 901, 100)]
    assert looks[0] == (-1.0, 1.0)
    assert all(a[0] <= b[0] and a[1] >= b[1] for a, b in itertools.pairwise(looks))
    mirrored = gate.difference_anytime(values, ~arms, 0.7, 0.05)
    assert mirrored == pytest.approx((-looks[-1][1], -looks[-1][0]), abs=1e-5)


def test_a_lopsided_split_is_told() -> None:
    assert gate.split_p(500, 1000, 0.5) == 1 and gate.split_p(560, 1000, 0.5) < 0.001 < gate.split_p(520, 1000, 0.5)


# -- the report


def exposure(user: str, ts: float, items: list[str], arm: str | None = None) -> Exposure:
    told = arm or ("champion", "challenger")[SPLIT[bucket_of(user)]]
    return Exposure(1, ts, TRIAL, 0.5, told, "abc" if told == "challenger" else "", user, items)


def stream(rates: dict[str, float], users: int = 1500, seed: int = 3) -> tuple[list[Exposure], list[Choice]]:
    """Users who are shown one to five lists each, and choose from one by their arm's rate."""
    rng = np.random.default_rng(seed)
    shown, chosen = [], []
    for number in range(users):
        for step in range(int(rng.integers(1, 6))):
            one = exposure(f"u{number}", START_S + number + 4000 * step, [f"i{n}" for n in range(step, step + 10)])
            shown.append(one)
            if rng.random() < rates[one.arm]:
                chosen.append(Choice(one.user, one.items[int(rng.integers(10))], one.ts + float(rng.random()) * 1700))
    return shown, chosen


def reported(shown: list[Exposure], chosen: list[Choice], window_s: float, now: float) -> Report:
    outcomes = trials.Outcomes(shown, window_s)
    for choice in chosen:
        outcomes.choose(choice)
    return report(outcomes, now)


def test_a_planted_difference_is_found_and_none_where_there_is_none() -> None:
    shown, chosen = stream({"champion": 0.2, "challenger": 0.35})
    told = reported(shown, chosen, WINDOW_S, START_S + 1e6)
    assert told.difference is not None and told.anytime is not None and told.notes == []
    assert told.difference.low <= 0.15 <= told.difference.high and told.difference.p < 1e-3
    assert told.anytime.verdict == "better" and told.anytime.users == 1500
    assert [(arm, one.adapter) for arm, one in told.arms.items()] == [("champion", ""), ("challenger", "abc")]
    assert sum(one.users for one in told.arms.values()) == 1500
    assert sum(one.exposures for one in told.arms.values()) == len(shown)
    assert sum(one.outcomes for one in told.arms.values()) == len(chosen)
    worse = reported(*stream({"champion": 0.35, "challenger": 0.2}), WINDOW_S, START_S + 1e6)
    assert worse.anytime is not None and worse.anytime.verdict == "worse"
    covered = 0
    for seed in range(20):
        same = reported(*stream({"champion": 0.3, "challenger": 0.3}, 600, seed), WINDOW_S, START_S + 1e6)
        assert same.difference is not None and same.anytime is not None
        covered += same.difference.low <= 0 <= same.difference.high
        assert same.anytime.verdict is None
    assert covered >= 17


def test_users_count_alike_however_many_lists_they_had() -> None:
    """One user with a thousand lists is one user."""
    shown, chosen = stream({"champion": 0.3, "challenger": 0.3})
    heavy = [exposure(shown[0].user, START_S - 1e6 + 3600 * n, ["x"]) for n in range(1000)]
    picked = [Choice(one.user, "x", one.ts + 1) for one in heavy]
    told = reported(heavy + shown, picked + chosen, WINDOW_S, START_S + 4e6)
    plain = reported(shown, chosen, WINDOW_S, START_S + 4e6)
    arm = shown[0].arm
    assert told.arms[arm].users == plain.arms[arm].users and told.arms[arm].outcomes == plain.arms[arm].outcomes + 1000
    assert told.arms[arm].rate == pytest.approx(plain.arms[arm].rate, abs=0.002)


def test_what_counts_as_an_outcome() -> None:
    """The last list that showed the item, within the window, once; a repeated record is one list."""
    lists = [exposure("u", START_S, ["a", "b"]), exposure("u", START_S + 100, ["b", "c"])]
    outcomes = trials.Outcomes([*lists, lists[0]], WINDOW_S)
    shown = outcomes.users["u"]
    assert len(shown.ts) == 2
    for item_id, after_s in (("a", -1.0), ("c", 50.0), ("a", WINDOW_S + 1), ("d", 10.0)):
        outcomes.choose(Choice("u", item_id, START_S + after_s))
    outcomes.choose(Choice("nobody", "a", START_S + 1))
    assert shown.chosen == [False, False]
    outcomes.choose(Choice("u", "b", START_S + 200))
    outcomes.choose(Choice("u", "b", START_S + 300))
    assert shown.chosen == [False, True]
    outcomes.choose(Choice("u", "a", START_S + WINDOW_S))
    assert shown.chosen == [True, True]


def test_a_bad_split_and_lost_beginnings_are_said() -> None:
    shown, chosen = stream({"champion": 0.3, "challenger": 0.3}, users=1000)
    lost = [one for one in shown if one.arm == "champion" or bucket_of(one.user) % 2]
    assert "do not trust" in reported(lost, chosen, WINDOW_S, START_S + 1e6).notes[0]
    cut = report(trials.Outcomes(shown, WINDOW_S), START_S + 1e6, is_whole=False)
    assert cut.anytime is None and cut.difference is not None and "HEADWATER_RETENTION_HOURS" in cut.notes[0]
    alone = reported([exposure("u", START_S, ["a"], "champion")], [], WINDOW_S, START_S + 1e6)
    assert (alone.arms["champion"].users, alone.arms["challenger"].users, alone.difference) == (1, 0, None)
    assert "nothing to tell yet" in alone.notes[-1]


def test_a_list_counts_once_its_window_is_over() -> None:
    shown, chosen = stream({"champion": 0.3, "challenger": 0.3}, users=1000)
    now = START_S + WINDOW_S + 500
    told = reported(shown, chosen, WINDOW_S, now)
    counted = [one for one in shown if one.ts <= START_S + 500]
    assert told.open == len(shown) - len(counted)
    assert told.anytime is not None and told.anytime.users == 501 == sum(one.users for one in told.arms.values())
    assert sum(one.exposures for one in told.arms.values()) == len(counted)
    later = reported(shown, chosen, WINDOW_S, START_S + 1e6)
    assert later.open == 0 and later.anytime is not None and later.anytime.users == 1000
    # An item that is shown again, in a list whose window is open, is that list's choice: the first one's outcome stays.
    twice = [exposure("u", START_S, ["a"]), exposure("u", START_S + 1700, ["a"])]
    again = reported(twice, [Choice("u", "a", START_S + 1750)], WINDOW_S, START_S + WINDOW_S)
    assert again.open == 1 and sum(one.outcomes for one in again.arms.values()) == 0


@pytest.mark.parametrize(
    ("records", "trial", "began_before_s", "found", "is_whole"),
    [
        ([(0, 41), (1, 41)], None, None, 2, True),  # the topic's beginning is there
        ([(7, 30), (8, 41), (9, 30)], None, None, 1, True),  # so are lists of a trial before
        ([(7, 30), (8, 41), (9, 30)], 30, None, 2, False),
        ([(7, 41), (8, 41)], 41, None, 2, False),  # the trial's message is gone, too
        ([(7, 41), (8, 41)], 41, 721 * 3600, 2, False),
        ([(7, 41), (8, 41)], 41, 719 * 3600, 2, True),  # what was deleted was before it
    ],
)
async def test_what_is_kept_of_a_trial_and_whether_it_is_all(
    monkeypatch: pytest.MonkeyPatch, records: list[tuple[int, int]], trial: int | None, began_before_s: float | None,
    found: int, is_whole: bool,
) -> None:  # fmt: skip
    async def log_end(*_: object) -> int:
        return records[-1][0] + 1

    async def read_log(*_: object) -> AsyncIterator[list[LogRecord]]:
        one = exposure("u", START_S, ["a"])
        for offset, number in records:
            one.trial = number
            yield [LogRecord(offset, b"u", b"no note"), LogRecord(offset, b"u", msgspec.json.encode(one))]

    async def record_at(*_: object) -> Any:
        return None if began_before_s is None else SimpleNamespace(timestamp=1e3 * (START_S - began_before_s))

    for name, fake in (("log_end", log_end), ("read_log", read_log), ("record_at", record_at)):
        monkeypatch.setattr(kafka, name, fake)
    kept = await trials.read(Settings(), trial, START_S)
    assert (len(kept.exposures), kept.is_whole) == (found, is_whole)
    assert len({one.trial for one in kept.exposures}) == 1
    with pytest.raises(trials.TrialError, match="the trial 99"):
        await trials.read(Settings(), 99, START_S)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frozen", "--end"],
        ["frozen", "--share=1"],
        ["frozen", "--share=nan"],
        ["frozen", "--share=.99999999"],
        ["frozen", "--share=1e-60"],
    ],
)
def test_a_trial_that_is_none_is_refused_before_anybody_is_asked(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, ["checkpoints", "trial", *arguments])
    assert done.exit_code == 2 and ("--end" in done.output or "share" in done.output)


# -- the notes


def told_to(user: str, items: int = 2) -> Recommendations:
    return Recommendations(user, "v2.t", "m", {}, [RankedItem(f"i{n}", 0.5, 0.0) for n in range(items)], "challenger")


class Topic:
    """Takes what is sent, or fails `failures` times before."""

    def __init__(self, failures: int = 0) -> None:
        self.records: list[tuple[bytes | None, bytes | None]] = []
        self.failures = failures
        self.is_away = False

    async def send(self, records: list[tuple[bytes | None, bytes | None]]) -> int:
        if self.is_away:
            await asyncio.Event().wait()
        if self.failures:
            self.failures -= 1
            raise ConnectionError("away")
        self.records += records
        return len(self.records)


def counted(metrics: Metrics, outcome: str) -> float:
    labels = {"arm": "challenger", "outcome": outcome}
    return metrics.registry.get_sample_value("headwater_exposures_total", labels) or 0.0


async def test_notes_outlive_a_broker_that_is_away_and_name_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "RETRY_S", 0.0)
    monkeypatch.setattr(trials, "LINGER_S", 0.0)
    topic, metrics = Topic(failures=3), Metrics()
    notes = Exposures(topic.send, lambda: START_S, None, metrics.exposures_total)
    for number in range(600):
        notes.note(told_to(f"person-{number}"), Trial(None, 0.25, TRIAL), "abc")
    running = asyncio.create_task(notes.run())
    await notes.close(running)
    assert running.done() and len(topic.records) == 600 and counted(metrics, "noted") == 600
    assert counted(metrics, "dropped") == 0
    key, value = topic.records[7]
    assert key == pseudonym("person-7").encode() and b"person-7" not in (value or b"")
    assert msgspec.json.decode(value or b"", type=Exposure) == Exposure(
        1, START_S, TRIAL, 0.25, "challenger", "abc", pseudonym("person-7"), ["i0", "i1"], "v2.t"
    )


async def test_full_batches_of_notes_do_not_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "LINGER_S", 3600.0)
    topic, metrics = Topic(), Metrics()
    notes = Exposures(topic.send, lambda: START_S, None, metrics.exposures_total)
    for number in range(4 * trials.BATCH_RECORDS_MAX):
        notes.note(told_to(f"u{number}"), Trial(None, 0.5, TRIAL), "")
    running = asyncio.create_task(notes.run())
    async with asyncio.timeout(60):
        while len(topic.records) < 4 * trials.BATCH_RECORDS_MAX:
            await asyncio.sleep(0)
    running.cancel()


async def test_notes_under_data_keys_have_nothing_that_anybody_could_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "LINGER_S", 0.0)
    topic, metrics, sealer = Topic(), Metrics(), Sealer([bytes(range(32))])
    notes = Exposures(topic.send, lambda: START_S, sealer, metrics.exposures_total)
    notes.note(told_to("person"), Trial(None, 0.5, TRIAL), "")
    await notes.close(asyncio.create_task(notes.run()))
    [(key, value)] = topic.records
    told = msgspec.json.decode(value or b"", type=Exposure)
    assert key == pseudonym("person", sealer.audit_key).encode() == told.user.encode() != pseudonym("person").encode()
    assert told.token == ""


async def test_what_finds_no_room_is_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "QUEUE_MAX", 5)
    monkeypatch.setattr(trials, "CLOSE_MAX_S", 0.05)
    topic, metrics = Topic(), Metrics()
    topic.is_away = True
    notes = Exposures(topic.send, lambda: START_S, None, metrics.exposures_total)
    running = asyncio.create_task(notes.run())
    for number in range(8):
        notes.note(told_to(f"u{number}"), Trial(None, 0.5, TRIAL), "")
    assert counted(metrics, "dropped") == 3
    await notes.close(running)
    assert (counted(metrics, "noted"), counted(metrics, "dropped"), topic.records) == (0, 8, [])


# -- over HTTP


@pytest.fixture
def world() -> World:
    return small_world()


async def test_lists_of_a_trial_tell_the_arm_and_are_noted_whole(world: World) -> None:
    left, right = np.random.default_rng(1).standard_normal((2, TEXT_DIM, 4)).astype(np.float32) / 2
    users = [user.decode() for user in world._rows]
    async with httpx.AsyncClient() as forwarder, client_of(create_app(world, forwarder, ["127.0.0.1"])) as api:

        async def listed(user: str) -> Any:
            return (await api.get(f"/v1/users/{user}/recommendations?explain=true")).json()

        before = {user: await listed(user) for user in users}
        tag = (await api.get(f"/v1/users/{users[0]}/recommendations")).headers["etag"]
        assert all("arm" not in told for told in before.values()) and not world.exposed
        world.tell_learner(examples.pack_trial(Adapter("test-encoder", left, right, 1.5), 0.5))
        trial = world.ranker.matrix.trial
        assert trial is not None
        after = {user: await listed(user) for user in users}
        assert {told["arm"] for told in after.values()} == {"champion", "challenger"}
        for user, told in after.items():
            assert told["arm"] == ("champion", "challenger")[trial.arms()[bucket_of(user)]]
            same = [i["logit"] for i in told["items"]] == [i["logit"] for i in before[user]["items"]]
            assert same == (told["arm"] == "champion")
            for item in told["items"]:
                why = item["explanation"]
                whole = why["bias"] + sum(part["value"] for part in why["contributions"]) + why["rest"]
                assert whole == pytest.approx(item["logit"], abs=1e-4)
        assert [told.user_id for told, _ in world.exposed] == users and {t for _, t in world.exposed} == {trial}
        assert [i.item_id for i in world.exposed[0][0].items] == [i["item_id"] for i in after[users[0]]["items"]]
        again = await api.get(f"/v1/users/{users[0]}/recommendations", headers={"If-None-Match": tag})
        assert again.status_code == 200 and "etag" not in again.headers, "every list that is shown is noted"
        challenger = next(user for user, told in after.items() if told["arm"] == "challenger")
        ranked = (await api.post("/v1/rank", json={"user_id": challenger, "item_ids": ["space-1", "horror-1"]})).json()
        supposed = (await api.post(f"/v1/users/{challenger}/what-if?explain=true", json={})).json()
        assert ranked["arm"] == supposed["arm"] == "challenger"
        assert [i["logit"] for i in supposed["items"]] == [i["logit"] for i in after[challenger]["items"]]
        assert len(world.exposed) == len(users) + 1, "a ranking and a supposition are shown to nobody"
        state = (await api.get(f"/v1/users/{challenger}/state")).json()
        world.tell_learner(examples.pack_trial_end())
        assert (await api.get(f"/v1/users/{challenger}/state")).json()["z"]["text"] != state["z"]["text"]
        assert "arm" not in await listed(challenger) and len(world.exposed) == len(users) + 1


# -- all of it


@pytest.fixture
def deployment(broker: str, tmp_path: Path) -> Iterator[Deployment]:
    made = Deployment(
        broker, tmp_path, topic_prefix=f"trial-{tmp_path.name}-", partitions=2, module="bench.words",
        checkpoints=str(tmp_path / "checkpoints"),
    )  # fmt: skip
    made.create_topics()
    yield made
    made.close()


async def replayed(deployment: Deployment, offset: int) -> ItemLearner:
    """The learner, from the examples log alone."""
    settings = deployment.settings
    learner = ItemLearner(settings.learner_config(DIM), DIM, "words")
    async for batch in kafka.read_log(settings.kafka_options(), settings.internal_topic("examples"), 0, 0, offset):
        for record in batch:
            learner.learn(record.offset, record.value or b"")
    return learner


def add_checkpoint(url: str, base: str = "words") -> tuple[str, Adapter]:
    """One in the folder, that moves texts far."""
    left, right = np.random.default_rng(1).standard_normal((2, DIM, 4)).astype(np.float32) / 6
    adapter = Adapter(base, left, right, 1.4)
    name = checkpoints.name_of(1, adapter)
    Checkpoints(url).add(adapter, Manifest(
        name=name, adapter=adapter.name, base=base, parent="", offset=1, rank=4, digest="", created=0.0,
    ))  # fmt: skip
    return name, adapter


def command(*arguments: str) -> str:
    """What `headwater checkpoints` prints."""
    done = CliRunner().invoke(app, ["checkpoints", *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


class Visitors:
    """Users of a worker: each likes one film, and then reads lists."""

    def __init__(self, deployment: Deployment, worker: WorkerProcess) -> None:
        self.worker = worker
        self.users = [f"u{n}" for n in range(12)]
        self.positions: dict[str, str] = {}
        settings = deployment.settings
        with contextlib.closing(KafkaProducer(**settings.kafka_options())) as producer:
            for item_id, text in FILMS.items():
                value = json.dumps({"item_id": item_id, "text": text}).encode()
                producer.send(settings.topic("items"), value, item_id.encode())
            producer.flush()
        for user in self.users:
            self.act(user, next(iter(FILMS)), "like")
        worker.wait_until("all learnt", lambda: self.model()["replica"]["positives"] == len(self.users))

    def act(self, user: str, item_id: str, action: str) -> None:
        event = {"type": "click", "user_id": user, "item_id": item_id, "action": action}
        self.positions[user] = self.worker.http.post("/v1/events", json=event).json()["positions"][0]

    def lists(self) -> dict[str, Any]:
        return {
            user: self.worker.get(f"/v1/users/{user}/recommendations", at_least=at)
            for user, at in self.positions.items()
        }

    def model(self) -> Any:
        return self.worker.get("/v1/model")


@pytest.mark.embedded
def test_a_trial_from_its_beginning_to_its_report(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command line, on a real worker: lists by arm, made again to the last bit; choices; the result; its end."""
    settings = deployment.settings
    worker = deployment.start_worker()
    worker.wait_ready()
    visitors = Visitors(deployment, worker)
    name, adapter = add_checkpoint(settings.checkpoints)
    told = {"broker": settings.broker, "topic_prefix": settings.topic_prefix, "partitions": "2",
            "checkpoints": settings.checkpoints, "http_port": str(worker.settings.http_port)}  # fmt: skip
    for variable, value in environment(told).items():
        monkeypatch.setenv(variable, value)
    assert all("arm" not in one for one in visitors.lists().values())
    offset = int(command("trial", name, "--share", "0.5").split()[-1])
    on = {"adapter": adapter.name, "share": 0.5, "offset": offset}
    worker.wait_until("the trial", lambda: visitors.model()["encoder"]["trial"] == on)
    assert "headwater_trial_share 0.5" in worker.http.get("/metrics").text
    shown = visitors.lists()
    arms = Trial(adapter, 0.5, offset).arms()
    told_arms = {user: ("champion", "challenger")[arms[bucket_of(user)]] for user in visitors.users}
    assert {user: one["arm"] for user, one in shown.items()} == told_arms
    assert set(told_arms.values()) == {"champion", "challenger"}
    encoder: Any = WordVectors()
    for user in (next(u for u, arm in told_arms.items() if arm == wanted) for wanted in ("champion", "challenger")):
        made = rebuild_list(settings, tokens.read(shown[user]["token"]), encoder, [], lambda *_: None)
        assert made.is_equal and made.user_id == user
    for user, arm in told_arms.items():  # the champions dislike what they are shown: no outcome
        action = "click" if arm == "challenger" else "dislike"
        visitors.act(user, shown[user]["items"][0]["item_id"], action)
    monkeypatch.setattr(main, "time", SimpleNamespace(time=lambda: time.time() + 2000))
    _check_report(worker, told_arms, offset, adapter.name)

    learnt = 2 * len(told_arms)
    worker.wait_until("the choices learnt", lambda: visitors.model()["learner"]["examples"] == learnt)
    [learner] = [part for part in worker.digests() if part["kind"] == "learner"]
    again = asyncio.run(replayed(deployment, learner["applied"]["examples"]))
    assert again.learner.digest() == learner["digest"] and again.learner.matrix.trial is not None
    command("trial", "--end")
    worker.wait_until("its end", lambda: visitors.model()["encoder"]["trial"] is None)
    assert all("arm" not in one for one in visitors.lists().values())
    foreign, _ = add_checkpoint(settings.checkpoints, "others")
    refused = CliRunner().invoke(app, ["checkpoints", "trial", foreign])
    assert refused.exit_code == 1 and "encoder others, the workers' is words" in refused.output
    decisions = Checkpoints(settings.checkpoints).get(name).decisions
    assert [one["kind"] for one in decisions] == ["trial", "trial ended"] and decisions[0]["position"] == offset
    worker.wait_until("both announced", lambda: decisions_of(visitors, name) == decisions)
    _check_erasure(worker, "u0")
    assert worker.stop()[0] == 0


def decisions_of(visitors: Visitors, name: str) -> Any:
    """As /v1/model tells them."""
    return next((c["decisions"] for c in visitors.model()["encoder"]["checkpoints"] if c["name"] == name), None)


def _check_erasure(worker: WorkerProcess, user: str) -> None:
    """The certificate tells of the one list that is still noted, and how long it is."""
    place = worker.http.delete(f"/v1/users/{user}").headers["location"]
    worker.wait_until("the certificate", lambda: worker.get(place)["status"] == "complete")
    [noted] = [one for one in worker.get(place)["remains"] if one["topic"] == "exposures"]
    assert (noted["partition"], noted["records"]) == (0, 1) and noted["until"] > time.time() + 3600


def _check_report(worker: WorkerProcess, arms: dict[str, str], offset: int, adapter: str) -> None:
    """Each user was shown one list; each challenger chose from it, and no champion."""

    def result() -> Any:
        return json.loads(command("report", "--json"))

    def has_all() -> bool:
        done = CliRunner().invoke(app, ["checkpoints", "report", "--json"])  # refused while there is none
        return done.exit_code == 0 and sum(o["users"] for o in json.loads(done.stdout)["arms"].values()) == len(arms)

    worker.wait_until("all notes", has_all)
    found = result()
    assert (found["trial"], found["share"], found["open"]) == (offset, 0.5, 0)
    assert (
        found["difference"]["mean"] == 1 and found["difference"]["p"] < 0.05 and found["anytime"]["users"] == len(arms)
    )
    counts = {arm: (o["adapter"], o["users"], o["exposures"], o["outcomes"]) for arm, o in found["arms"].items()}
    challengers = list(arms.values()).count("challenger")
    champions = len(arms) - challengers
    assert counts == {
        "champion": ("", champions, champions, 0),
        "challenger": (adapter, challengers, challengers, challengers),
    }
    assert "challenger" in command("report", "--trial", str(offset))
    assert 'outcome="noted"' in worker.http.get("/metrics").text
    refused = CliRunner().invoke(app, ["checkpoints", "trial", "frozen"])
    assert refused.exit_code == 1 and f"trial {offset} is on" in refused.output
    none = CliRunner().invoke(app, ["checkpoints", "report", "--trial", "999"])
    assert none.exit_code == 1 and f"those of {offset}" in none.output
