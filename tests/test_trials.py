"""An A/B test on live users: what is shown is noted, whatever the broker does; the report finds what was planted."""

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
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
from state.sealing import Sealer
from streams import checkpoints, examples, kafka, tokens, trials
from streams.__main__ import app
from streams.answers import RankedItem, Recommendations
from streams.audit import pseudonym
from streams.checkpoints import Checkpoints, Manifest
from streams.explain import rebuild_list
from streams.pipeline import ItemLearner
from streams.settings import environment
from streams.trials import Choice, Exposure, Exposures, report
from streams.web import create_app
from tests.serving_world import TEXT_DIM, World, small_world
from tests.test_web import client_of
from tests.test_worker import FILMS

WINDOW_S = 1800.0
START_S = 1_700_000_000.0
TRIAL = 41  # its offset
SPLIT = Trial(None, 0.5, TRIAL).arms()


# -- the arithmetic


def arms_of(users: int, seed: int, share: float = 0.5) -> np.ndarray:
    return np.random.default_rng((seed, 1)).random(users) < share


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_intervals_cover_no_difference_whenever_one_looks(share: float) -> None:
    """Of 300 trials without a difference, few are ever found to have one; a look that was not planned finds many."""
    sequence = single = looked = 0
    for seed in range(300):
        values = (np.random.default_rng(seed).random(2000) < 0.3).astype(float)
        arms = arms_of(2000, seed, share)
        low, high = gate.difference_sequence(values, arms, share, 0.05)
        sequence += bool((low > 0).any() or (high < 0).any())
        ps = [gate.difference(values[:n][arms[:n]], values[:n][~arms[:n]], 0.05)[3] for n in range(1000, 2001, 50)]
        single += ps[-1] < 0.05
        looked += min(ps) < 0.05
    assert sequence <= 15 and 3 <= single <= 30 and looked > 30


def test_intervals_find_a_difference_and_hold_it() -> None:
    held = found = single = 0
    for seed in range(100):
        arms = arms_of(4000, seed)
        values = (np.random.default_rng(seed).random(4000) < np.where(arms, 0.4, 0.3)).astype(float)
        low, high = gate.difference_sequence(values, arms, 0.5, 0.05)
        found += bool(low[-1] > 0)
        held += bool((low <= 0.1).all() and (high >= 0.1).all())
        mean, bottom, top, p = gate.difference(values[arms], values[~arms], 0.05)
        single += bottom <= 0.1 <= top
        assert mean == pytest.approx(0.1, abs=0.07) and p < 0.01
    assert found >= 95 and held >= 95 and single >= 88


def test_too_few_users_have_no_sequence_and_a_lopsided_split_is_told() -> None:
    low, high = gate.difference_sequence(np.ones(150), arms_of(150, 1), 0.5, 0.05)
    assert len(low) == len(high) == 0
    assert gate.split_p(500, 1000, 0.5) == 1 and gate.split_p(560, 1000, 0.5) < 0.001 < gate.split_p(520, 1000, 0.5)
    assert gate.difference(np.ones(3), np.ones(3), 0.05)[2:] == (0.0, 1.0)


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


def test_a_planted_difference_is_found_and_none_where_there_is_none() -> None:
    shown, chosen = stream({"champion": 0.2, "challenger": 0.35})
    told = report(shown, chosen, WINDOW_S, START_S + 1e6)
    assert told.difference is not None and told.anytime is not None and told.notes == []
    assert told.difference.low <= 0.15 <= told.difference.high and told.difference.p < 1e-6
    assert told.anytime.verdict == "better" and told.anytime.users == 1500
    assert [(arm, one.adapter) for arm, one in told.arms.items()] == [("champion", ""), ("challenger", "abc")]
    assert sum(one.users for one in told.arms.values()) == 1500
    assert sum(one.exposures for one in told.arms.values()) == len(shown)
    assert sum(one.outcomes for one in told.arms.values()) == len(chosen)
    worse = report(*stream({"champion": 0.35, "challenger": 0.2}), WINDOW_S, START_S + 1e6)
    assert worse.anytime is not None and worse.anytime.verdict == "worse"
    covered = 0
    for seed in range(20):
        same = report(*stream({"champion": 0.3, "challenger": 0.3}, 600, seed), WINDOW_S, START_S + 1e6)
        assert same.difference is not None and same.anytime is not None
        covered += same.difference.low <= 0 <= same.difference.high
        assert same.anytime.verdict is None
    assert covered >= 17


def test_users_count_alike_however_many_lists_they_had() -> None:
    """One user with a thousand lists is one user."""
    shown, chosen = stream({"champion": 0.3, "challenger": 0.3})
    heavy = [exposure(shown[0].user, START_S - 1e6 + 3600 * n, ["x"]) for n in range(1000)]
    picked = [Choice(one.user, "x", one.ts + 1) for one in heavy]
    told = report(heavy + shown, picked + chosen, WINDOW_S, START_S + 1e6)
    plain = report(shown, chosen, WINDOW_S, START_S + 1e6)
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


def test_too_little_a_bad_split_and_open_windows_are_said() -> None:
    shown, chosen = stream({"champion": 0.3, "challenger": 0.3}, users=60)
    told = report(shown, chosen, WINDOW_S, START_S + 1e6)
    assert told.difference is None and "too little to tell" in told.notes[0]
    shown, chosen = stream({"champion": 0.3, "challenger": 0.3}, users=1000)
    lost = [one for one in shown if one.arm == "champion" or bucket_of(one.user) % 2]
    assert "do not trust" in report(lost, chosen, WINDOW_S, START_S + 1e6).notes[0]
    open_ = report(shown, chosen, WINDOW_S, START_S + WINDOW_S + 500).anytime
    assert open_ is not None and open_.users == 501
    alone = report([exposure("u", START_S, ["a"], "champion")], [], WINDOW_S, START_S)
    assert alone.arms["challenger"].users == 0 and alone.difference is None


@pytest.mark.parametrize("arguments", [[], ["frozen", "--end"], ["frozen", "--share=1"], ["frozen", "--share=nan"]])
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
            "checkpoints": settings.checkpoints}  # fmt: skip
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
    _check_report(worker, told_arms, offset, adapter.name)

    learnt = 2 * len(told_arms)
    worker.wait_until("the choices learnt", lambda: visitors.model()["learner"]["examples"] == learnt)
    [learner] = [part for part in worker.digests() if part["kind"] == "learner"]
    again = asyncio.run(replayed(deployment, learner["applied"]["examples"]))
    assert again.learner.digest() == learner["digest"] and again.learner.matrix.trial is not None
    command("trial", "--end")
    worker.wait_until("its end", lambda: visitors.model()["encoder"]["trial"] is None)
    assert all("arm" not in one for one in visitors.lists().values())
    _check_erasure(worker, "u0")
    assert worker.stop()[0] == 0


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
    assert (found["trial"], found["share"], found["difference"]) == (offset, 0.5, None)
    assert "too little to tell" in found["notes"][-1]
    counts = {arm: (o["adapter"], o["users"], o["exposures"], o["outcomes"]) for arm, o in found["arms"].items()}
    challengers = list(arms.values()).count("challenger")
    champions = len(arms) - challengers
    assert counts == {
        "champion": ("", champions, champions, 0),
        "challenger": (adapter, challengers, challengers, challengers),
    }
    assert "challenger" in command("report", "--trial", str(offset))
    assert 'outcome="noted"' in worker.http.get("/metrics").text
    foreign, _ = add_checkpoint(worker.settings.checkpoints, "others")
    refused = CliRunner().invoke(app, ["checkpoints", "trial", foreign])
    assert refused.exit_code == 1 and "encoder others, the workers' is words" in refused.output
    none = CliRunner().invoke(app, ["checkpoints", "report", "--trial", "999"])
    assert none.exit_code == 1 and f"those of {offset}" in none.output
