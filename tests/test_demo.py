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
from rich.console import Console

from streams import movielens
from streams.demo import BROKER_LOG, DemoError, _remove_left_state
from streams.movielens import DataError
from streams.settings import PREFIX
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


def demo(cache: Path, *options: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """`headwater demo --once`, with settings in its environment."""
    env = {PREFIX + name.upper(): value for name, value in settings.items()} | {"XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "-m", "streams", "demo", "--once", *options]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=600)


def test_demo_learns_everything_reports_and_ends_with_0(
    cache: Path, tmp_path: Path, free_port: int, clean_environment: None
) -> None:
    report_file, state_dir = tmp_path / "r.json", tmp_path / "state"
    options = ("--report", str(report_file), "--port", str(free_port), "--state", str(state_dir))
    done = demo(cache, *options)
    assert done.returncode == 0, done.stderr
    report = json.loads(report_file.read_text())
    assert report["events"] == EVENTS
    assert report["positives"] >= sum(rating["value"] >= 4 for rating in _distinct(_ratings()))
    assert report["events_per_s"] > 0
    assert 0 < report["model"]["hr@10"] <= 1
    assert any(name.startswith("popularity") for name in report["baselines"])
    assert report["freshness_ms"]["p50"] > 0
    assert {part["kind"] for part in report["state"]["partitions"]} == {"users", "catalogue", "learner"}
    told, said = (" ".join(printed.split()) for printed in (done.stdout, done.stderr))
    for words in ("a visitor likes", "HR@10", "freshness:"):
        assert words in told and words not in said, "the report alone is on stdout"
    assert (state_dir / "worker.log").exists()
    (state_dir / "users-9").mkdir()
    (state_dir / "users-9" / "notes").write_text("mine")
    again = demo(cache, *options)
    assert again.returncode == 0, again.stderr
    assert "of an earlier demo's broker" in " ".join(again.stderr.split())
    assert json.loads(report_file.read_text())["events"] == EVENTS
    assert (state_dir / "users-9" / "notes").read_text() == "mine"


def test_demo_beside_a_broker_keeps_its_state_from_a_demo_with_a_broker_of_its_own(
    cache: Path, tmp_path: Path, embedded_broker: str, clean_environment: None
) -> None:
    state_dir = tmp_path / "not" / "there"
    done = demo(cache, "--state", str(state_dir), broker=embedded_broker, topic_prefix="demo.")
    assert done.returncode == 0, done.stderr
    before = sorted(state_dir.rglob("*"))
    refused = demo(cache, "--state", str(state_dir))
    assert refused.returncode == 1 and "HEADWATER_BROKER" in refused.stderr
    assert sorted(state_dir.rglob("*")) == before


def test_state_that_a_worker_has_open_is_left_alone(tmp_path: Path) -> None:
    stores = [tmp_path / name for name in ("learner-0", "users-0")]
    code = (
        "import sys\nfrom pathlib import Path\nfrom state.store import RocksDisk\n"
        "closed, held = (RocksDisk().open(Path(path)) for path in sys.argv[1:])\nclosed.close()\n"
        "print(flush=True)\nsys.stdin.read()\n"
    )
    (tmp_path / BROKER_LOG).touch()
    with subprocess.Popen(
        [sys.executable, "-c", code, *map(str, stores)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as worker:
        assert worker.stdout is not None and worker.stdout.readline()
        with pytest.raises(DemoError, match="end it"):
            _remove_left_state(tmp_path, Console())
        assert all(path.is_dir() for path in stores)
        worker.kill()
    _remove_left_state(tmp_path, Console())
    assert [path.name for path in tmp_path.iterdir()] == [BROKER_LOG]


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
