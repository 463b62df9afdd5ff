"""The demo's visitor: acts over HTTP as any client would, and measures when its own acts are seen."""

import gzip
import json
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

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
        self._http = httpx.Client(
            base_url=settings.http_url(), headers=settings.http_headers(), timeout=HTTP_TIMEOUT_S, trust_env=False
        )
        self._now = now
        with gzip.open(items, "rt", encoding="utf-8") as lines:
            self._texts: dict[str, str] = {item["item_id"]: item["text"] for item in map(json.loads, lines)}

    def act(self, freshness: Freshness, stop: threading.Event) -> None:
        """Clicks and comments as the probe until told to stop; each act is read back at once."""
        chosen = list(self._texts)
        random.Random(7).shuffle(chosen)
        for number, item_id in enumerate(chosen):
            if stop.wait(ACT_PAUSE_S):
                return
            if number % COMMENT_EVERY == COMMENT_EVERY - 1:
                text = PROBE_COMMENTS[number // COMMENT_EVERY % len(PROBE_COMMENTS)]
                act = {"type": "comment", "user_id": PROBE, "text": f"{text} ({number})", "ts": self._now()}
                times = freshness.comments
            else:
                act = {"type": "click", "user_id": PROBE, "item_id": item_id, "action": "click", "ts": self._now()}
                times = freshness.clicks
            started = time.perf_counter()
            positions = self._post([act])
            self._list(PROBE, positions)
            times.append((time.perf_counter() - started) * 1e3)

    def visit(self, console: Console) -> None:
        """Somebody new: the list before, a few acts, the list after with its reasons."""
        before = self._list(VISITOR, [])
        liked = [next(item_id for item_id, text in self._texts.items() if text.startswith(title)) for title in LIKED]
        acts: list[dict[str, Any]] = [
            {"type": "click", "user_id": VISITOR, "item_id": item_id, "action": "like", "ts": self._now()}
            for item_id in liked
        ]
        acts.append({"type": "comment", "user_id": VISITOR, "text": COMMENT, "ts": self._now()})
        positions = self._post(acts)
        after = self._list(VISITOR, positions)
        titles = ", ".join(self._title(item_id) for item_id in liked)
        console.print(f'\na visitor likes {titles}, and writes: "{COMMENT}"')
        table = Table("before", "after", "because of (share of the logit)")
        for old, new in zip(before, after, strict=False):
            table.add_row(self._title(old["item_id"]), self._title(new["item_id"]), self._because(new))
        console.print(table)

    def _because(self, item: dict[str, Any]) -> str:
        parts = sorted(item["explanation"]["contributions"], key=lambda part: -part["value"])[:2]
        return ", ".join(
            f"{self._title(part['item_id']) if part.get('item_id') else 'the comment'} {part['value']:+.2f}"
            for part in parts
        )

    def _title(self, item_id: str) -> str:
        return self._texts[item_id].split(").")[0] + ")"

    def _post(self, acts: list[dict[str, Any]]) -> list[str]:
        answer = self._http.post("/v1/events", json=acts)
        answer.raise_for_status()
        positions: list[str] = answer.json()["positions"]
        return positions

    def _list(self, user_id: str, at_least: list[str]) -> list[dict[str, Any]]:
        answer = self._http.get(
            f"/v1/users/{user_id}/recommendations",
            params={"limit": LIST_ITEMS, "explain": "true", "at_least": at_least},
        )
        answer.raise_for_status()
        items: list[dict[str, Any]] = answer.json()["items"]
        return items
