"""The demo ends with a report of what it has learnt, and leaves nothing running."""

import gzip
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from streams import movielens
from streams.movielens import DataError
from streams.visitor import LIKED

FILMS = 60
USERS = 40
EVENTS = 1500


def _films() -> Iterator[dict[str, Any]]:
    for number in range(FILMS):
        title = f"{LIKED[number].removesuffix(' (')} (1980)" if number < len(LIKED) else f"Film {number} (1990)"
        yield {"item_id": str(number), "text": f"{title}. {'Drama' if number % 2 else 'Comedy'}"}


def _ratings() -> Iterator[dict[str, Any]]:
    """Half of the users rate the odd films high and the even ones low, the others the other way round."""
    for number in range(EVENTS):
        user, film = number % USERS, (number // USERS * 7 + number * 13) % FILMS
        value = 5.0 if user % 2 == film % 2 else 2.0
        yield {"type": "click", "user_id": f"u{user}", "item_id": str(film), "action": "rating", "value": value,
               "ts": 1000.0 + number}  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache folder that has the demo's data, so that nothing is fetched."""
    folder = tmp_path / "cache" / "headwater" / "ml-100k"
    folder.mkdir(parents=True)
    for name, lines in (("items", _films()), ("events", _ratings())):
        with gzip.open(folder / f"{name}-{movielens.VERSION}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    return tmp_path / "cache"


def test_demo_learns_everything_reports_and_ends_with_0(
    cache: Path, tmp_path: Path, free_port: int, clean_environment: None
) -> None:
    report_file, state_dir = tmp_path / "r.json", tmp_path / "state"
    options = ("--once", "--report", str(report_file), "--port", str(free_port), "--state", str(state_dir))
    command = [sys.executable, "-m", "streams", "demo", *options]
    done = subprocess.run(
        command, env={**os.environ, "XDG_CACHE_HOME": str(cache)}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(report_file.read_text())
    assert report["events"] == EVENTS
    assert report["positives"] >= sum(rating["value"] >= 4 for rating in _distinct(_ratings()))
    assert report["events_per_s"] > 0
    assert 0 < report["model"]["hr@10"] <= 1
    assert any(name.startswith("popularity") for name in report["baselines"])
    assert report["freshness_ms"]["p50"] > 0
    assert {part["kind"] for part in report["state"]["partitions"]} == {"users", "catalogue", "learner"}
    assert "a visitor likes" in " ".join(done.stderr.split())
    assert (state_dir / "worker.log").exists()


def _distinct(ratings: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for rating in ratings:
        first.setdefault((rating["user_id"], rating["item_id"]), rating)
    return list(first.values())


def test_movielens_is_read_from_the_package_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "recbole.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            f"{movielens.FOLDER}.item",
            "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
            "1\tToy Story\t1995\tComedy Fun\n",
        )
        archive.writestr(
            f"{movielens.FOLDER}.inter",
            "user_id:token\titem_id:token\trating:float\ttimestamp:float\n7\t1\t3\t20\n8\t1\t5\t10\n",
        )
    asked: list[Path] = []

    def download(folder: Path) -> Path:
        asked.append(folder)
        return wheel

    monkeypatch.setattr(movielens, "_download", download)
    with pytest.raises(DataError, match="not MovieLens 100k"):
        movielens.fetch(tmp_path / "data")
    monkeypatch.setattr(movielens, "FILMS", 1)
    monkeypatch.setattr(movielens, "RATINGS", 2)
    stream = movielens.fetch(tmp_path / "data")
    assert movielens.fetch(tmp_path / "data") == stream
    assert len(asked) == 2
    with gzip.open(stream.items, "rt") as items, gzip.open(stream.events, "rt") as events:
        assert json.loads(items.read())["text"] == "Toy Story (1995). Comedy, Fun"
        assert [json.loads(line)["user_id"] for line in events] == ["8", "7"]


def test_no_network_is_an_error_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movielens, "PACKAGE", "no-such-package-at-all==0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataError, match="headwater replay"):
        movielens.fetch(tmp_path)
