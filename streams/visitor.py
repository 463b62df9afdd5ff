"""The demo's visitor: acts over HTTP by the client that others use, and measures when its own acts are seen."""

import gzip
import json
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from streams.answers import RankedItem
from streams.client import Client
from streams.events import Click, Comment
from streams.settings import Settings

PROBE: Final = "freshness-probe"
VISITOR: Final = "visitor"
COMMENT_EVERY: Final = 4  # acts: clicks between, comments are encoded and so slower
ACT_PAUSE_S: Final = 0.02
HTTP_TIMEOUT_S: Final = 30.0
LIKED: Final = ("Alien (", "Blade Runner", "2001: A Space Odyssey")
COMMENT: Final = (
    "I love slow, thoughtful science fiction: space travel, robots, and questions about what it means to be human."
)
PROBE_COMMENTS: Final = (
    "A thriller with a clever ending, please.",
    "Something light for a Sunday with the children.",
    "The photography was wonderful, the story less so.",
    "More films from the seventies.",
    "I laughed all the way through.",
)
LIST_ITEMS: Final = 10


@dataclass
class Freshness:
    """Milliseconds from publishing an act to a read that shows it."""

    clicks: list[float] = field(default_factory=list)
    comments: list[float] = field(default_factory=list)

    @property
    def published(self) -> int:
        """Acts."""
        return len(self.clicks) + len(self.comments)

    def clicks_ms(self) -> dict[str, float | None]:
        """{p50, p99} of the clicks."""
        return _percentiles(self.clicks)

    def comments_ms(self) -> dict[str, float | None]:
        """{p50, p99} of the comments."""
        return _percentiles(self.comments)


def _percentiles(values: list[float]) -> dict[str, float | None]:
    if not values:
        return {"p50": None, "p99": None}
    p50, p99 = np.percentile(values, [50, 99])
    return {"p50": round(float(p50), 1), "p99": round(float(p99), 1)}


class Visitor:
    """A client of one worker."""

    def __init__(self, settings: Settings, items: Path, now: Callable[[], float]) -> None:
        self._client = Client(settings.http_url(), settings.api_key.get_secret_value(), timeout_s=HTTP_TIMEOUT_S)
        self._now = now
        with gzip.open(items, "rt", encoding="utf-8") as lines:
            self._texts: dict[str, str] = {item["item_id"]: item["text"] for item in map(json.loads, lines)}

    def act(self, freshness: Freshness, stop: threading.Event) -> None:
        """Clicks and comments as the probe until told to stop; each act is read back at once."""
        chosen = list(self._texts)
        random.Random(7).shuffle(chosen)
        for number, item_id in enumerate(chosen):
            act: Click | Comment
            if number % COMMENT_EVERY == COMMENT_EVERY - 1:
                text = PROBE_COMMENTS[number // COMMENT_EVERY % len(PROBE_COMMENTS)]
                act, times = Comment(PROBE, f"{text} ({number})", ts=self._now()), freshness.comments
            else:
                act, times = Click(PROBE, item_id, "click", ts=self._now()), freshness.clicks
            started = time.perf_counter()
            self._list(PROBE, self._client.send(act))
            times.append((time.perf_counter() - started) * 1e3)
            if stop.wait(ACT_PAUSE_S):
                return

    def visit(self, console: Console) -> None:
        """Somebody new: the list before, a few acts, the list after with its reasons."""
        before = self._list(VISITOR, [])
        liked = [next(item_id for item_id, text in self._texts.items() if text.startswith(title)) for title in LIKED]
        likes = [Click(VISITOR, item_id, "like", ts=self._now()) for item_id in liked]
        positions = self._client.send(*likes, Comment(VISITOR, COMMENT, ts=self._now()))
        after = self._list(VISITOR, positions)
        titles = ", ".join(self._title(item_id) for item_id in liked)
        console.print(f'\na visitor likes {titles}, and writes: "{COMMENT}"')
        ruled = box.HEAVY_HEAD if console.is_terminal else None
        table = Table("before", "after", "because of (share of the logit)", box=ruled)
        for old, new in zip(before, after, strict=False):
            table.add_row(self._title(old.item_id), self._title(new.item_id), self._because(new))
        console.print(table)

    def _because(self, item: RankedItem) -> str:
        parts = item.explanation.contributions if item.explanation else []
        return ", ".join(
            f"{self._title(part.item_id) if part.item_id else 'the comment'} {part.value:+.2f}"
            for part in sorted(parts, key=lambda part: -part.value)[:2]
        )

    def _title(self, item_id: str) -> str:
        return self._texts[item_id].split(").")[0] + ")"

    def _list(self, user_id: str, at_least: list[str]) -> list[RankedItem]:
        return self._client.recommendations(user_id, limit=LIST_ITEMS, explain=True, at_least=at_least).items
