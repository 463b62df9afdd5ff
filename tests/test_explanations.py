"""Explanations of a stream's users: every part is computed by itself, and together they are the score."""

import math
import random

import msgspec
import pytest
from msgspec import UNSET

from streams import answers, serving
from streams.events import Click, Comment
from streams.serving import ListOptions
from tests.serving_world import GENRES, MOODS, World, small_world

PAIRS = 1000
USERS = 40
OPTIONS = ListOptions(limit=200, explain=True, exclude_seen=False, parts=True)


@pytest.fixture(scope="module")
def world() -> World:
    """Users with few and many events, with none, some and more comments than a row keeps one by one."""
    made = small_world(users=30)
    draw = random.Random(5)
    for _ in range(1500):
        made.clock_s += draw.expovariate(1 / 300)
        user = f"u{draw.randrange(USERS) ** 2 // USERS}"
        item = f"{draw.choice(list(GENRES))}-{draw.randrange(len(MOODS))}"
        if draw.random() < 0.25:
            words = " ".join(draw.choices([*GENRES, *MOODS], k=4))
            made.take(Comment(user, words, draw.choice([None, item]), made.clock_s))
        else:
            made.take(Click(user, item, draw.choice(["click", "like", "skip", "view"]), 1.0, made.clock_s))
    return made


def test_a_thousand_explanations_add_up_part_by_part(world: World) -> None:
    draw = random.Random(1)
    lists = {user: serving.recommend(world, user, OPTIONS).items for user in [f"u{n}" for n in range(USERS)]}
    worst = 0.0
    older = 0
    for _ in range(PAIRS):
        user = draw.choice(list(lists))
        told = draw.choice(lists[user])
        reason = told.explanation
        assert isinstance(reason, answers.Explanation) and isinstance(reason.bias_parts, answers.BiasParts)
        b = reason.bias_parts
        assert math.fsum((b.constant, b.popularity, b.age, b.recency, b.context, b.calibration)) == pytest.approx(
            reason.bias
        )
        for term in reason.contributions:
            assert isinstance(term.parts, answers.Heads)
            heads = (term.parts.learnt, term.parts.cooccurrence, term.parts.text)
            assert math.fsum(heads) == pytest.approx(term.value, abs=1e-6)
        total = math.fsum((reason.bias, reason.rest, *(term.value for term in reason.contributions)))
        worst = max(worst, abs(total - told.logit))
        older += abs(reason.rest) > 1e-3
    assert worst < 1e-4
    assert older > PAIRS // 20, "texts older than the kept ones take part"


def test_parts_and_words_come_only_when_asked_for(world: World) -> None:
    plain = serving.recommend(world, "u0", msgspec.structs.replace(OPTIONS, parts=False)).items[0].explanation
    assert isinstance(plain, answers.Explanation) and plain.bias_parts is UNSET
    assert all(c.parts is UNSET and c.words is UNSET for c in plain.contributions)


async def test_a_comments_contribution_has_the_users_own_words(world: World) -> None:
    told = serving.recommend(world, "u0", OPTIONS)
    told_words = 0
    await serving.add_words(world, told)
    for item in told.items:
        assert isinstance(item.explanation, answers.Explanation)
        for c in item.explanation.contributions:
            if c.type == "comment" and c.action is UNSET:
                assert c.words == world.written[c.partition, c.offset]
                told_words += 1
            else:
                assert c.words is UNSET
    assert told_words
