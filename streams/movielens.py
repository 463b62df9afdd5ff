"""The demo's stream: MovieLens 100k, taken from the PyPI package recbole (downloaded, not installed), and kept.

The data is not part of this program and is never redistributed by it.
"""

import gzip
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from streams.settings import Fault

PACKAGE: Final = "recbole==1.2.1"
FOLDER: Final = "recbole/dataset_example/ml-100k/ml-100k"
RATINGS: Final = 100_000
FILMS: Final = 1_682
VERSION: Final = 1  # of the files made here
LICENCE: Final = (
    "MovieLens 100k, GroupLens Research, University of Minnesota (Harper and Konstan 2015, doi:10.1145/2827872): for "
    "research, not for redistribution or commercial use without their permission"
)


class DataError(Fault):
    """The demo's data cannot be had."""


class Stream(NamedTuple):
    """A recorded stream's two files."""

    items: Path
    events: Path


def fetch(folder: Path) -> Stream:
    """The stream's files in `folder`: at once when they are there, else from PyPI. Raises DataError."""
    stream = Stream(folder / f"items-{VERSION}.jsonl.gz", folder / f"events-{VERSION}.jsonl.gz")
    if all(path.is_file() for path in stream):
        return stream
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        wheel = _download(Path(scratch))
        films, ratings = _read(wheel, "item"), _read(wheel, "inter")
        items = [_item(film) for film in films]
        events = sorted((_event(rating) for rating in ratings), key=lambda event: float(event["ts"]))
        if (len(items), len(events)) != (FILMS, RATINGS):
            raise DataError(f"{wheel.name} holds {len(items)} films and {len(events)} ratings: not MovieLens 100k")
        for path, lines in zip(stream, (items, events), strict=True):
            half_written = Path(scratch) / path.name
            with gzip.open(half_written, "wt", encoding="utf-8", compresslevel=5) as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            half_written.rename(path)
    return stream


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--only-binary", ":all:", "--dest", str(folder), PACKAGE]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise DataError(
            f"the demo's data, in {PACKAGE}, cannot be downloaded from PyPI ({reason}); connect once, later runs work "
            "offline. Or replay a stream of your own with `headwater replay`"
        )
    return wheels[0]


def _read(wheel: Path, part: str) -> Iterator[dict[str, str]]:
    """The lines of one of RecBole's tables, whose head names columns as `name:type`."""
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read(f"{FOLDER}.{part}").decode().splitlines()
    names = [column.split(":")[0] for column in lines[0].split("\t")]
    for line in lines[1:]:
        if line.strip():
            yield dict(zip(names, line.split("\t"), strict=True))


def _item(film: Mapping[str, str]) -> dict[str, Any]:
    genres = film["class"].split()
    text = f"{film['movie_title']} ({film['release_year']}). {', '.join(genres)}"
    return {"item_id": film["item_id"], "text": text, "attributes": {"genres": genres}}


def _event(rating: Mapping[str, str]) -> dict[str, Any]:
    return {
        "type": "click", "user_id": rating["user_id"], "item_id": rating["item_id"], "action": "rating",
        "value": float(rating["rating"]), "ts": float(rating["timestamp"]),
    }  # fmt: skip
