"""The page in a real Chromium: what a visitor does, and that no script, style or request breaks its policy.

`HEADWATER_TEST_PICTURE=docs/page.png pytest tests/test_page.py` also takes the README's picture.
"""

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import msgspec
import pytest
import pytest_asyncio
from axe_playwright_python.base import AXE_SCRIPT
from playwright.async_api import Browser, ConsoleMessage, Page, ViewportSize, async_playwright, expect

from streams import keys
from streams.answers import CheckpointView, DecisionView, TrainingView
from streams.broker import free_port
from streams.events import Erasure
from streams.keys import Gate
from streams.settings import Settings
from streams.web import HttpService
from tests.serving_world import GENRES, MOODS, START_S, World, small_world

CHROMIUM: Final = Path("/usr/bin/chromium")  # Debian's; `make test` installs it
PICTURE: Final = os.environ.get("HEADWATER_TEST_PICTURE")
FLAGS: Final = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip
PICTURE_CLICKS: Final = 1_500
PHONE: Final[ViewportSize] = {"width": 360, "height": 740}
DESKTOP: Final[ViewportSize] = {"width": 1280, "height": 900}
PICTURE_SIZE: Final[ViewportSize] = {"width": 1280, "height": 1780}
FAN: Final = "space-fan-0"
WAIT_MS_MAX: Final = 60_000  # for what the page is expected to show

expect.set_options(timeout=WAIT_MS_MAX)
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture
def world() -> World:
    return small_world()


@pytest_asyncio.fixture(loop_scope="module")
async def address(world: World) -> AsyncIterator[str]:
    settings = Settings(http_port=free_port())
    service = HttpService(world, settings)
    await service.start()
    yield f"{settings.http_url()}/"
    await service.stop()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def browser() -> AsyncIterator[Browser]:
    """One for all tests, with an empty profile of its own; each test has a fresh context."""
    if not CHROMIUM.exists():
        pytest.fail(f"{CHROMIUM} is not there: run the tests by `make test`, or `apt-get install chromium`")
    async with async_playwright() as playwright:
        running = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        await running.close()


@pytest_asyncio.fixture(loop_scope="module")
async def page(browser: Browser, address: str) -> AsyncIterator[Page]:
    """The page, opened; at the end nothing stands in the console and no address but ours was asked."""
    opened = await browser.new_page(viewport=DESKTOP)
    faults: list[str] = []

    def console(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            faults.append(message.text)

    opened.on("console", console)
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("request", lambda r: None if r.url.startswith(address) else faults.append(f"asked {r.url}"))
    await opened.goto(address)
    yield opened
    await opened.close()
    assert faults == []


async def shown(page: Page) -> list[str | None]:
    """Item ids of the list on the page."""
    return [await line.get_attribute("data-item") for line in await page.locator("#list > li").all()]


async def choose(page: Page, user: str) -> None:
    await page.get_by_label("User id").fill(user)
    await page.get_by_role("button", name="Show").click()
    await expect(page.get_by_role("heading", name=f"The list of {user}")).to_be_visible()
    await expect(page.locator("#list > li")).to_have_count(10)


async def take_picture(page: Page, world: World, path: Path) -> None:
    """The page while a stream of invented users goes by, each true to one genre in four of five clicks."""
    draw = random.Random(1)
    genres = list(GENRES)
    started = time.perf_counter()
    for number in range(1, PICTURE_CLICKS + 1):
        user = draw.randrange(200)
        genre = genres[user % len(genres)] if draw.random() < 0.8 else draw.choice(genres)
        world.rate = number / (time.perf_counter() - started)
        world.click(f"{genres[user % len(genres)]}-fan-{user}", f"{genre}-{draw.randrange(len(MOODS))}")
        if number % 10 == 0:
            await asyncio.sleep(0.02)  # the listeners' turn
    await expect(page.locator("#race-model")).not_to_have_text("–")
    await page.set_viewport_size(PICTURE_SIZE)
    await page.screenshot(path=path)
    await page.set_viewport_size(DESKTOP)


async def test_a_visitor_clicks_and_comments_and_the_list_changes(page: Page, world: World) -> None:
    await expect(page.get_by_role("status").filter(has_text="live")).to_be_visible()
    await choose(page, FAN)
    first = await shown(page)
    await expect(page.locator("#list > li").first).to_contain_text("because you clicked")

    world.delay_s = 0.05  # the read has to wait for the click
    await page.locator(f"#list > li[data-item='{first[0]}'] .pick").click()
    await expect(page.locator("#news")).to_contain_text("after your click")
    second = await shown(page)
    assert first[0] not in second and second != first
    await expect(page.locator("#events li").first).to_contain_text("click The")

    await page.get_by_label("What the user looks for").fill("western western western")
    await page.get_by_role("button", name="Send").click()
    await expect(page.locator("#news")).to_contain_text("after your comment")
    assert await shown(page) != second
    await expect(page.locator("[data-part='own_words']")).to_contain_text("what the user wrote")
    await expect(page.locator("#list")).to_contain_text("because of what you wrote")
    assert await page.get_by_label("What the user looks for").input_value() == ""
    if PICTURE:
        await take_picture(page, world, Path(PICTURE))
    await page.locator("#list summary").first.click()
    await expect(page.locator("#list details[open]").first).to_contain_text("constants")


async def test_users_of_the_stream_can_be_picked_and_the_race_is_drawn(page: Page, world: World) -> None:
    await expect(page.locator("#live-rate")).to_have_text("12")
    await expect(page.locator("#live-lag")).to_have_text("0 records, 0.0 s")
    world.lag_s = 10_220 * 86_400.0  # a recorded stream's
    await expect(page.locator("#model")).to_contain_text("none: the encoder as it came")
    world.hits = [(n < 24, n < 10, n < 17) for n in range(100)]
    world.click("western-fan-1", "western-1", "like")  # a repeat: shown, not ranked
    await expect(page.locator("#feed")).to_contain_text("like The Last Canyon")
    await expect(page.locator("#live-lag")).to_have_text("0 records, 10,220 days")
    await page.locator("#recent").get_by_role("button", name="western-fan-1").click()
    await expect(page.get_by_role("heading", name="The list of western-fan-1")).to_be_focused()
    await expect(page.locator("#race-model")).to_have_text("24.0 %")
    race = page.get_by_role("img", name="Hit ratio now: model 24.0 %, popularity 10.0 %, item-kNN 17.0 %")
    await expect(race.locator("canvas")).to_be_visible()
    drawn = "canvas => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.some(Boolean)"
    assert await race.locator("canvas").evaluate(drawn)


def checkpoint(name: str, state: str, *decisions: DecisionView, **more: float) -> CheckpointView:
    trained = TrainingView(256, 12_288, 5.871, 5.93, 5.889)
    offset = int(name.partition("-")[0])
    adapter = name.partition("-")[2]
    return CheckpointView(name, adapter, "", offset, START_S, state, trained, list(decisions), **more)


def decision(kind: str, position: int, better: float, worse: float, verdict: str) -> DecisionView:
    return DecisionView(
        kind, position, 655, 0.01, log10_e_better=better, log10_e_worse=worse, alpha=0.005, verdict=verdict
    )


PROMOTED: Final = decision("promote", 1630, 2.314, 0.02, "better")
SWITCHED: Final = DecisionView("switched", 1632, taken_back=False)


async def facts(page: Page) -> dict[str, str]:
    """The panel of encoder and model, of the answer that has just come."""
    await page.reload()
    await expect(page.locator("#model")).to_contain_text("Last decision")
    names = await page.locator("#model dt").all_inner_texts()
    values = await page.locator("#model dd").all_inner_texts()
    return dict(zip(names, values, strict=True))


async def test_the_encoder_tells_what_is_in_use_what_stands_in_shadow_and_what_was_decided(
    page: Page, world: World
) -> None:
    shown = await facts(page)
    assert shown["Adapter in use"] == "none: the encoder as it came"
    assert (shown["Candidate in shadow"], shown["Last decision"]) == ("no candidate", "none yet")

    world.checkpoints = [checkpoint("001417-7d0c", "shadow")]
    shown = await facts(page)
    trained = "7d0c, trained on 12,288 examples (loss 5.930 → 5.871), "
    assert shown["Candidate in shadow"] == trained + "in shadow, not decided yet"
    assert shown["Last decision"] == "none yet", "no figures are made up"

    better = "(log10 e 2.31 that it is better, 0.02 that it is worse, 655 tests)"
    promoted = f"promoted: it was better than what was in use {better}"
    world.checkpoints = [checkpoint("001417-7d0c", "shadow", PROMOTED)]
    shown = await facts(page)
    assert shown["Candidate in shadow"] == trained + promoted
    assert shown["Last decision"] == f"7d0c {promoted}"

    world.adapter = "7d0c"
    used = checkpoint("001417-7d0c", "current", PROMOTED, SWITCHED, current_since=START_S)
    world.checkpoints = [used]
    shown = await facts(page)
    assert shown["Adapter in use"].startswith("7d0c since Nov 14, 2023")
    assert (shown["Candidate in shadow"], shown["Last decision"]) == ("no candidate", f"7d0c {promoted}")
    at = await page.locator("#model time").get_attribute("datetime")
    assert at is not None and at.startswith("2023-11-14T22:13:20")

    for verdict, words in (("worse", "it was worse than what is in use"), ("none", "nothing was shown")):
        dropped = checkpoint("002180-c1e5", "dropped", decision("drop", 2400, 0.1, 2.5, verdict))
        world.checkpoints = [dropped, used]
        told = f"c1e5 dropped: {words} (log10 e 0.10 that it is better, 2.50 that it is worse, 655 tests)"
        assert (await facts(page))["Last decision"] == told

    predecessor = "(log10 e 2.50 that the predecessor is better, 0.10 that the predecessor is worse, 655 tests)"
    for kind, state, words in (
        ("kept", "current", "kept: its predecessor was not better"),
        ("rollback", "taken back", "taken back: its predecessor was better"),
    ):
        watched = checkpoint("001417-7d0c", state, PROMOTED, SWITCHED, decision(kind, 1900, 2.5, 0.1, "better"))
        world.checkpoints = [watched]
        assert (await facts(page))["Last decision"] == f"7d0c {words} {predecessor}"
    world.adapter = None
    world.checkpoints = [checkpoint("001417-7d0c", "taken back", PROMOTED, SWITCHED)]
    shown = await facts(page)
    assert shown["Last decision"] == f"7d0c {promoted}; then taken back by hand"
    assert shown["Adapter in use"] == "none: the encoder as it came"


async def test_a_new_user_starts_from_what_everybody_gets(page: Page) -> None:
    await page.get_by_role("button", name="A new user").click()
    await expect(page.locator("#counts")).to_contain_text("Nothing is known")
    await page.locator(".pick").first.click()
    await expect(page.locator("#counts")).to_contain_text("1 events, 1 items consumed")


async def test_the_keyboard_alone_is_enough(page: Page) -> None:
    await page.keyboard.press("Tab")
    await expect(page.get_by_role("link", name="Skip to the list")).to_be_focused()
    await page.keyboard.press("Tab")
    await expect(page.get_by_label("User id")).to_be_focused()
    await page.keyboard.type(FAN)
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("heading", name=f"The list of {FAN}")).to_be_focused()
    await expect(page.locator("#list > li")).to_have_count(10)
    await page.keyboard.press("Tab")
    await expect(page.locator(".pick").first).to_be_focused()
    await page.keyboard.press("Enter")
    await expect(page.locator("#news")).to_contain_text("after your click")


async def test_a_phone_needs_no_sideways_scrolling_in_dark_and_light(page: Page) -> None:
    await page.set_viewport_size(PHONE)
    grounds = set()
    for scheme in ("light", "dark"):
        await page.emulate_media(color_scheme=scheme)
        await choose(page, FAN)
        assert await page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        grounds.add(await page.evaluate("getComputedStyle(document.body).backgroundColor"))
        small = await page.evaluate(
            "[...document.querySelectorAll('button, input:not([role=switch]), .switch')].filter(e => e.offsetParent"
            " && e.offsetHeight < 35).map(e => e.outerHTML)"
        )
        assert small == []
    assert len(grounds) == 2


async def test_no_rule_of_axe_is_broken_anywhere_on_the_page(page: Page, world: World, tmp_path: Path) -> None:
    world.hits = [(n < 24, n < 10, n < 17) for n in range(100)]
    world.click("western-fan-1", "western-1", "like")
    world.adapter = "7d0c41f2a9b3"
    world.checkpoints = [
        checkpoint("000000002180-c1e5f0a2d7b4", "shadow"),
        checkpoint("000000001417-7d0c41f2a9b3", "current", PROMOTED, SWITCHED, current_since=START_S),
    ]
    await page.reload()
    await choose(page, FAN)
    await expect(page.locator("#model")).to_contain_text("7d0c41f2a9b3 promoted")
    await page.evaluate(AXE_SCRIPT)
    pictures = set()
    for supposes in (False, True):
        if supposes:
            await page.get_by_role("switch").first.check()
            await expect(page.locator("#supposed")).to_be_visible()
        for scheme in ("light", "dark"):
            for size in (PHONE, DESKTOP):
                await page.set_viewport_size(size)
                await page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
                found = await page.evaluate("async () => (await axe.run()).violations")
                assert [(v["id"], [n["html"] for n in v["nodes"]]) for v in found] == []
                assert await page.evaluate("document.documentElement.scrollWidth") <= size["width"]
                name = f"{'what-if' if supposes else 'list'}-{scheme}-{size['width']}.png"
                pictures.add(await page.screenshot(path=tmp_path / name, full_page=True))
    assert len(pictures) == 8


async def test_what_is_supposed_shows_another_list_stores_nothing_and_goes_back(page: Page, world: World) -> None:
    await choose(page, FAN)
    real, before = await shown(page), dict(world.applied(world.partition_of(FAN)))
    heading = page.locator("#list-heading")

    switches = page.get_by_role("switch")
    for number in range(3):
        await switches.nth(number).press("Space")
        await expect(page.locator("#supposed")).to_contain_text(f"without {number + 1} event")
    await expect(heading).to_have_text(f"What if: the list of {FAN}")
    supposed = await shown(page)
    assert supposed != real
    await expect(page.locator("#news")).to_contain_text("places differ from the real list")
    for place, item in enumerate(supposed):
        was = real.index(item) if item in real else None
        steps = (
            "new" if was is None else f"↑ {was - place}" if was > place else f"↓ {place - was}" if was < place else ""
        )
        await expect(page.locator("#list .moved").nth(place)).to_have_text(steps)

    await page.get_by_label("the user wrote this").fill("western western western")
    await page.get_by_role("button", name="Suppose").click()
    await expect(page.locator("#supposed")).to_contain_text("with the words “western western western”")
    await expect(page.locator("#list")).to_contain_text("if you wrote that")
    await page.locator(".pick").first.click()
    await expect(page.locator("#supposed")).to_contain_text("with a click on The")

    assert world.applied(world.partition_of(FAN)) == before
    await page.get_by_role("button", name="Back to the real list").click()
    await expect(heading).to_be_focused()
    await expect(heading).to_have_text(f"The list of {FAN}")
    assert await shown(page) == real
    await expect(page.locator("#supposed")).to_be_hidden()
    assert not any([await switches.nth(n).is_checked() for n in range(await switches.count())])


async def test_a_supposition_that_is_refused_is_said_and_the_real_list_is_read_again(
    browser: Browser, address: str, world: World
) -> None:
    page = await browser.new_page()
    answers: list[tuple[int, str]] = []
    page.on("response", lambda r: answers.append((r.status, r.url)) if r.status >= 400 else None)
    try:
        await page.goto(address)
        await choose(page, FAN)
        partition = world.partition_of(FAN)
        world.apply("erasures", partition, 0, FAN.encode(), msgspec.json.encode(Erasure(FAN, world.now())))
        await page.get_by_role("switch").first.press("Space")
        await expect(page.get_by_role("alert")).to_contain_text("none of the user's kept events")
        await expect(page.locator("#counts")).to_contain_text("Nothing is known")
        await expect(page.locator("#list-heading")).to_have_text(f"The list of {FAN}")
        await expect(page.get_by_role("switch")).to_have_count(0)
        assert answers == [(422, f"{address}v1/users/{FAN}/what-if?limit=10&explain=true&texts=true")]
    finally:
        await page.close()


async def test_a_failure_is_said_in_words_and_the_next_try_clears_it(page: Page, world: World) -> None:
    await choose(page, FAN)
    alert = page.get_by_role("alert")
    await page.get_by_label("What the user looks for").fill("   ")
    await page.get_by_role("button", name="Send").click()
    await expect(alert).to_contain_text("Write something first")
    await page.get_by_label("What the user looks for").fill("romance")
    await page.get_by_role("button", name="Send").click()
    await expect(page.locator("#news")).to_contain_text("after your comment")
    await expect(alert).to_be_empty()


async def test_a_worker_with_keys_is_used_with_a_key_typed_in_and_shows_nothing_without(
    browser: Browser, world: World, tmp_path: Path
) -> None:
    keys_file = tmp_path / "keys.jsonl"
    right = keys.add(keys_file, "visitor", "write", 0.0)
    settings = Settings(http_port=free_port(), api_keys_file=keys_file)
    service = HttpService(world, settings, Gate.of(settings))
    await service.start()
    page = await browser.new_page()
    try:
        await page.goto(settings.http_url())
        status = page.locator("#connection")
        await expect(status).to_have_text("a key is needed")
        for given, said in (("hw_wrong", "the key is not valid here"), (right, "live")):
            await page.get_by_label("API key").fill(given)
            await page.get_by_role("button", name="Use it").click()
            await expect(status).to_have_text(said)
        await expect(page.get_by_label("API key")).to_be_hidden()
        await choose(page, FAN)
        await page.reload()
        await expect(status).to_have_text("live")  # of this tab
        assert right not in await page.content() and right not in page.url
    finally:
        await page.close()
        await service.stop()


async def test_the_page_says_that_the_worker_is_gone_and_goes_on_when_it_is_back(
    browser: Browser, world: World
) -> None:
    settings = Settings(http_port=free_port())
    service = HttpService(world, settings)
    await service.start()
    page = await browser.new_page()
    try:
        await page.goto(settings.http_url())
        status = page.locator("#connection")
        await expect(status).to_have_text("live")
        await choose(page, FAN)
        await service.stop()
        await expect(status).to_contain_text("trying again")
        await page.locator(".pick").first.click()
        await expect(page.get_by_role("alert")).to_contain_text("The worker does not answer")
        service = HttpService(world, settings)
        await service.start()
        await expect(status).to_have_text("live")
        await page.locator(".pick").first.click()
        await expect(page.locator("#news")).to_contain_text("after your click")
        await expect(page.get_by_role("alert")).to_be_empty()
    finally:
        await page.close()
        await service.stop()


async def test_the_docs_page_keeps_the_policy(page: Page) -> None:
    await page.get_by_role("link", name="API").click()
    await expect(page.get_by_role("heading", name="Headwater API")).to_be_visible()
    await page.goto(page.url + "#problem-not-ready")
    await expect(page.locator("#problem-not-ready")).to_be_in_viewport()
