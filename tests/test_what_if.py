"""What-if: the list without some of a user's events, or with others, is the list of a stream that held just those."""

import asyncio
import random
from typing import Any

import httpx
import numpy as np
import pytest

from state import rows
from streams import pipeline, serving
from streams.events import Click, Comment
from streams.pipeline import SourceEvent
from streams.serving import ListOptions, UnknownPosition
from streams.web import create_app
from tests.serving_world import EVIDENCE, GENRES, MOODS, START_S, TOPIC_CODES, World, encode, small_world
from tests.test_web import assert_problem, client_of

USER = "asking"
ACTIONS = ("click", "like", "skip", "rating", "view")


@pytest.fixture(scope="module")
def world() -> World:
    return small_world(users=40)


def item(draw: random.Random) -> str:
    return f"{draw.choice(list(GENRES))}-{draw.randrange(len(MOODS))}"


def random_event(draw: random.Random, ts: float, user: str = USER) -> Click | Comment:
    if draw.random() < 0.3:
        words = " ".join(draw.choices([*GENRES, *MOODS], k=3))
        return Comment(user, words, draw.choice([None, item(draw)]), ts)
    return Click(user, item(draw), draw.choice(ACTIONS), draw.choice([1.0, 2.0, 5.0]), ts)


def source_events(events: list[Click | Comment]) -> list[SourceEvent]:
    ends = dict.fromkeys(TOPIC_CODES, -1)
    found = []
    for event in events:
        topic = "comments" if isinstance(event, Comment) else "clicks"
        ends[topic] += 1
        vector = encode(event.text) if isinstance(event, Comment) else None
        found.append(SourceEvent(TOPIC_CODES[topic], ends[topic], event, vector))
    return found


def folded(events: list[SourceEvent]) -> bytes:
    """The row that the stream's own fold makes of the events, one batch an event."""
    row: bytes | None = None
    for event in events:
        before = row
        row = pipeline.learn_users(0, [event], lambda _: [before], EVIDENCE).rows[USER.encode()]  # noqa: B023
    return row if row is not None else rows.pack(rows.UserRow())


def listed(told: Any) -> list[tuple[str, float, float]]:
    return [(i.item_id, i.score, i.logit) for i in told.items]


class Held(World):
    """The world's item state at one moment, with one row of the test's own."""

    def __init__(self, world: World, row: bytes) -> None:
        self.__dict__.update(world.__dict__)
        self.row = row

    def now(self) -> float:
        return START_S + 1e6

    def read(self, user_id: str) -> serving.Read:
        return super().read(user_id)._replace(row=self.row)


@pytest.mark.parametrize("seed", range(60))
async def test_a_what_if_is_the_list_of_a_stream_with_just_those_events(world: World, seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randrange(1, 24)
    events = source_events([random_event(draw, START_S + 7 * n + draw.random()) for n in range(count)])
    held = Held(world, folded(events))
    kept = serving.Reader(held, USER)
    positions = {(topic, offset) for topic, offset in kept.row.history_positions()}
    positions |= {(c.topic, c.offset) for c in kept.comments}
    gone = set(draw.sample(sorted(positions), draw.randrange(min(5, len(positions) + 1))))
    more = [random_event(draw, START_S + 500 + n) for n in range(draw.randrange(4))]
    partition = world.partition_of(USER)
    told = serving.what_if(
        held, USER, [f"{serving.USER_TOPICS[t]}:{partition}:{o}" for t, o in gone], more,
        await serving.vectors(held, more), ListOptions(limit=48),
    )  # fmt: skip
    replayed = [e for e in events if (e.topic, e.offset) not in gone]
    replayed += [e._replace(offset=e.offset + 1000) for e in source_events(more)]
    real = serving.recommend(Held(world, folded(replayed)), USER, ListOptions(limit=48))
    if told.exact:
        assert listed(told) == listed(real)
    else:  # only where the row cannot know
        assert gone and (len(positions) < len(events) or named_again(kept.row, gone))


def named_again(row: rows.UserRow, gone: set[tuple[int, int]]) -> bool:
    """Whether a comment that stays names the item of an event that goes."""
    keys = row.slots()["key"].tolist()
    items = {key for key, place in zip(keys, row.history_positions(), strict=True) if place in gone}
    return any(c.item in items for c in row.comment_entries() if (c.topic, c.offset) not in gone)


def test_where_the_row_holds_every_event_any_what_if_is_exact(world: World) -> None:
    films = [f"{genre}-{n}" for genre in GENRES for n in range(len(MOODS))]
    for seed in range(50):
        draw = random.Random(seed)
        some = draw.sample(films, 12)
        events: list[Click | Comment] = [Click(USER, film, "click", 1.0, START_S + n) for n, film in enumerate(some)]
        events += [Comment(USER, f"{draw.choice(MOODS)} {n}", None, START_S + 50 + n) for n in range(draw.randrange(9))]
        source = source_events(events)
        gone = draw.sample(source, draw.randrange(1, len(source) + 1))
        names = [f"{serving.USER_TOPICS[e.topic]}:{world.partition_of(USER)}:{e.offset}" for e in gone]
        told = serving.what_if(Held(world, folded(source)), USER, names, [], [], ListOptions(limit=48))
        rest = [e for e in source if e not in gone]
        real = serving.recommend(Held(world, folded(rest)), USER, ListOptions(limit=48))
        assert told.exact and listed(told) == listed(real)


def test_what_has_left_the_row_makes_it_inexact(world: World) -> None:
    events = source_events([Comment(USER, f"words {n}", None, START_S + n) for n in range(rows.COMMENTS_MAX + 2)])
    held = Held(world, folded(events))
    newest = f"comments:{world.partition_of(USER)}:{len(events) - 1}"
    told = serving.what_if(held, USER, [newest], [], [], ListOptions())
    real = serving.recommend(Held(world, folded(events[:-1])), USER, ListOptions())
    assert not told.exact
    assert np.allclose([i.logit for i in told.items], [i.logit for i in real.items], atol=1e-3)  # the tail goes on
    with pytest.raises(UnknownPosition, match="none of the user's kept"):
        serving.what_if(held, USER, [f"comments:{world.partition_of(USER)}:0"], [], [], ListOptions())


# -- over HTTP


FAN = "space-fan-0"


async def test_a_what_if_over_http() -> None:
    world = small_world()
    async with httpx.AsyncClient() as forwarder, client_of(create_app(world, forwarder, ["127.0.0.1"])) as api:
        path = f"/v1/users/{FAN}/what-if"
        same = (await api.post(f"{path}?limit=48", json={})).json()
        real = (await api.get(f"/v1/users/{FAN}/recommendations?limit=48")).json()
        assert [i["item_id"] for i in same["items"]] == [i["item_id"] for i in real["items"]] and same["exact"]
        state = (await api.get(f"/v1/users/{FAN}/state")).json()
        every = [f"{e['topic']}:{e['partition']}:{e['offset']}" for e in state["last_events"]]
        nobody = (await api.post(path, json={"without": every})).json()
        assert len(every) == 5
        stranger = (await api.get("/v1/users/nobody/recommendations")).json()
        assert [i["item_id"] for i in nobody["items"]] == [i["item_id"] for i in stranger["items"]]
        horror = [{"type": "click", "user_id": FAN, "item_id": f"horror-{n}", "action": "like"} for n in range(3)]
        words = {"type": "comment", "user_id": FAN, "text": "horror in the cellar"}
        told = (
            await api.post(f"{path}?explain=true&limit=5", json={"without": every, "with": [*horror, words]})
        ).json()
        assert told["exact"] and told["items"][0]["item_id"].startswith("horror")
        terms = told["items"][0]["explanation"]["contributions"]
        applied = world.applied(world.partition_of(FAN))
        assert [t["offset"] for t in terms if t["topic"] == "clicks"] == [applied["clicks"] + n for n in (3, 2, 1)]
        assert [t["offset"] for t in terms if t["topic"] == "comments"] == [applied["comments"] + 1]
        assert (await api.get(f"/v1/users/{FAN}/state")).json()["events"] == 5


BAD: list[tuple[Any, str]] = [
    ({"without": ["clicks:0:99999"]}, "unknown-position"),
    ({"without": ["clicks:77:0"]}, "unknown-position"),
    ({"without": ["items:0:1"]}, "not-understood"),
    ({"without": "all"}, "not-understood"),
    ([], "not-understood"),
    ({"with": [{"type": "click", "user_id": "another", "item_id": "space-1", "action": "click"}]}, "invalid-event"),
    ({"with": [{"type": "click", "user_id": FAN}]}, "invalid-event"),
    ({"with": [{}] * 21}, "not-understood"),
]


@pytest.mark.parametrize(("body", "problem"), BAD)
async def test_a_bad_what_if_is_told_what_is_wrong(world: World, body: Any, problem: str) -> None:
    async with httpx.AsyncClient() as forwarder, client_of(create_app(world, forwarder, ["127.0.0.1"])) as api:
        assert_problem(await api.post(f"/v1/users/{FAN}/what-if", json=body), problem)


async def test_a_busy_encoder_means_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    world = small_world(users=1)
    busy = asyncio.Event()
    monkeypatch.setattr(world, "encode", lambda text, user_id: busy.wait())
    monkeypatch.setattr("streams.web.ENCODE_WAIT_S", 0.02)
    async with httpx.AsyncClient() as forwarder, client_of(create_app(world, forwarder, ["127.0.0.1"])) as api:
        comment = {"type": "comment", "user_id": FAN, "text": "hello"}
        assert_problem(await api.post(f"/v1/users/{FAN}/what-if", json={"with": [comment]}), "not-ready")
