"""What a disturbed deployment must equal: its rows another worker's, its examples another log's, its item matrix a
replay of its own log.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench import words
from bench.deployment import WorkerProcess
from model.examples import new_examples
from state.changelog import row_key_of
from state.store import RocksDisk
from streams import examples, kafka, rebuild
from streams.datakeys import sealer_of
from streams.erasure import erasure_id
from streams.pipeline import ItemLearner
from streams.settings import Settings

SETTLED_S_MAX: Final = 180.0
COMPLETED_S_MAX: Final = 2.0  # more for each erasure: some have the whole log learnt again
PURGED_S_MAX: Final = 60.0  # a worker looks every 5 s at the folders that it has left
POLL_S: Final = 0.5
BROKEN_UNLESS_NONE: Final = (
    "rows_different", "partitions_different", "examples_missing", "examples_wrong", "examples_doubled",
    "erasures_different", "unlearnt_not_exactly", "gone_but_named",
)  # fmt: skip

Digest = dict[str, Any]


async def source_ends(settings: Settings) -> dict[tuple[str, int], int]:
    """{(topic, partition): where the log ends} of the sources."""
    options = settings.kafka_options()
    return {
        (name, p): await kafka.log_end(options, settings.topic(name), p)
        for name in ("clicks", "comments", "erasures", "items")
        for p in range(settings.partitions)
    }


def settled(workers: Sequence[WorkerProcess], direct: Settings, ends: dict[tuple[str, int], int]) -> list[Digest]:
    """What the workers together hold, once everything is applied and learnt. direct: settings that reach the broker."""
    told: list[Digest] = []

    def done() -> bool:
        nonlocal told
        told = held(workers)
        at = {(d["kind"], d["partition"]): d["applied"] for d in told}
        for (name, p), end in ends.items():
            kind = "catalogue" if name == "items" else "users"
            if at.get((kind, p), {}).get(name, -1) + 1 < end:
                return False
        end = asyncio.run(kafka.log_end(direct.kafka_options(), direct.internal_topic("examples"), 0))
        return bool(at.get(("learner", 0), {}).get("examples", -1) + 1 >= end)

    try:
        workers[0].wait_until("all applied and learnt", done, SETTLED_S_MAX)
    except TimeoutError as late:
        reached = {(d["kind"], d["partition"]): d["applied"] for d in told}
        raise TimeoutError(f"the workers stand at {reached}, the logs end at {ends}: {late}") from late
    return held(workers)


def held(workers: Iterable[WorkerProcess]) -> list[Digest]:
    """The digests of all workers' partitions."""
    return [digest for worker in workers for digest in worker.digests()]


def compare(direct: Settings, calm: Settings, told: list[Digest], other: list[Digest]) -> dict[str, Any]:
    """How the disturbed state differs: partitions by digest, examples one by one, the item matrix by a replay."""
    return asyncio.run(_compare(direct, calm, told, other))


def differing_rows(one: Path, other: Path) -> list[bytes]:
    """Keys whose rows differ between two stores that nobody has open."""
    disk = RocksDisk()
    found = []
    for path in (one, other):
        store = disk.open(path)
        found.append(dict(store.items()))
        store.close()
    ours, theirs = found
    return sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))


async def erasures(settings: Settings) -> dict[str, str]:
    """{name: user} of all erasures in the log."""
    return {
        erasure_id(p, offset): key.decode()
        for p in range(settings.partitions)
        async for offset, key, _ in kafka.keys(settings.kafka_options(), settings.topic("erasures"), p)
    }


def completed(workers: Sequence[WorkerProcess], names: Collection[str]) -> dict[str, Digest]:
    """The certificates of these erasures, once all are complete. Raises TimeoutError."""
    found: dict[str, Digest] = {}

    def done() -> bool:
        for name in [name for name in names if name not in found]:
            certificate = workers[0].get(f"/v1/erasures/{name}")
            if certificate["status"] != "complete":
                return False
            found[name] = certificate
        return True

    workers[0].wait_until("all erasures complete", done, SETTLED_S_MAX + COMPLETED_S_MAX * len(names))
    return found


def compare_erasures(names: Collection[str], ours: dict[str, Digest], theirs: dict[str, Digest]) -> dict[str, Any]:
    """Where the certificates do not tell of the same rows; unlearnt: how many, and how many not exactly."""
    held = ("events", "behaviours", "seen", "comments")
    unlearnt = [c["model"] for c in ours.values() if c["unlearn"]]
    return {
        "erasures": len(names),
        "erasures_different": [n for n in names if any(ours[n]["state"][k] != theirs[n]["state"][k] for k in held)],
        "unlearnt": len(unlearnt),
        "unlearnt_not_exactly": sum(not (model and model["done"] and model["exact"]) for model in unlearnt),
    }


def broken(found: Mapping[str, Any]) -> list[str]:
    """Which of BROKEN_UNLESS_NONE are not nothing, and whether the item state is another."""
    return [name for name in BROKEN_UNLESS_NONE if found[name]] + ["item_state"] * (not found["item_state_equal"])


def gone(erased: Mapping[str, str], stores: Iterable[Path]) -> set[str]:
    """The users who were erased and have no row in these stores, which nobody has open."""
    kept: set[str] = set()
    for path in stores:
        store = RocksDisk().open(path)
        kept.update(key.decode() for key, _ in store.items())
        store.close()
    return set(erased.values()) - kept


def names_left(
    settings: Settings, users: Collection[str], folders: Sequence[Path], certificates: Mapping[str, Digest]
) -> list[str]:
    """Where these users are named all the same: files of workers, after PURGED_S_MAX; changelogs, where the broker
    deletes.
    """
    names = [user.encode() for user in users]
    deadline = time.monotonic() + PURGED_S_MAX
    while (left := files_that_name(names, folders)) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    kept = any(c["changelog"] is None or c["changelog"].get("kept") for c in certificates.values())
    return left if kept else left + asyncio.run(_named(settings, set(names)))


def files_that_name(names: Collection[bytes], folders: Iterable[Path]) -> list[str]:
    """The files under the folders in which one of the names stands."""
    found = []
    for path in [path for folder in folders for path in folder.rglob("*")]:
        try:
            if path.is_file() and any(name in path.read_bytes() for name in names):
                found.append(str(path))
        except FileNotFoundError:  # RocksDB has just replaced it
            continue
    return found


async def _named(settings: Settings, names: set[bytes]) -> list[str]:
    options, topic = settings.kafka_options(), settings.internal_topic("users-changelog")
    return [
        f"{topic}:{p}:{record.offset}"
        for p in range(settings.partitions)
        async for batch in kafka.read_log(options, topic, p, 0, await kafka.log_end(options, topic, p) - 1)
        for record in batch
        if row_key_of(record) in names
    ]


async def _compare(direct: Settings, calm: Settings, told: list[Digest], other: list[Digest]) -> dict[str, Any]:
    twins = {(d["kind"], d["partition"]): d for d in other}
    different = [
        (d["kind"], d["partition"])
        for d in told
        if d["kind"] != "learner" and any(d[k] != twins[d["kind"], d["partition"]][k] for k in ("digest", "applied"))
    ]
    ours, doubled = await _examples(direct)
    theirs, _ = await _examples(calm)
    learner = next(d for d in told if d["kind"] == "learner")
    replayed, repeats = await _replay(direct, learner["applied"]["examples"])
    return {
        "partitions_different": different,
        "examples": len(theirs),
        "examples_missing": len(theirs.keys() - ours.keys()),
        "examples_wrong": sum(ours[k] != theirs[k] for k in theirs.keys() & ours.keys()),
        "examples_doubled": doubled,
        "repeats_dropped": repeats,
        "item_state_equal": replayed == learner["digest"],
    }


async def _messages(settings: Settings) -> Any:
    sealer = sealer_of(settings)
    topic = settings.internal_topic("examples")
    end = await kafka.log_end(settings.kafka_options(), topic, 0)
    async for batch in kafka.read_log(settings.kafka_options(), topic, 0, 0, end - 1):
        for record in batch:
            yield record if sealer is None else record._replace(value=sealer.open_message(record.value or b""))


async def _examples(settings: Settings) -> tuple[dict[int, bytes], int]:
    """{source position: the example's arrays} after the learner's own dedupe, and how many came twice even so."""
    config = settings.learner_config(words.DIM)
    buffer = new_examples(config, seen_max=1 << 18)
    applied: dict[int, Any] = {}
    found: dict[int, bytes] = {}
    doubled = 0
    async for record in _messages(settings):
        kind, partition, _ = examples.read_header(record.value)
        if kind != examples.KIND_EXAMPLES:
            continue
        offsets = applied.setdefault(partition, np.full(len(examples.TOPICS), -1, np.int64))
        batch = examples.unpack_examples(record.value, buffer, offsets)
        for b in range(batch.count):
            n = int(batch.history_count[b])
            arrays = (
                batch.item[b], batch.label[b], batch.ts[b], batch.history_item[b, :n], batch.history_weight[b, :n],
                batch.history_ts[b, :n], batch.text_on[b], batch.text[b] if batch.text_on[b] else b"", batch.ranked[b],
            )  # fmt: skip
            doubled += int(batch.source[b]) in found
            found[int(batch.source[b])] = b"|".join(bytes(a) if isinstance(a, bytes) else a.tobytes() for a in arrays)
    return found, doubled


async def _replay(settings: Settings, last: int) -> tuple[str, int]:
    """The digest of an undisturbed learner over the disturbed log up to the offset `last`, and the messages that it
    found to be repeats. A flush is applied before its examples are published: the log may go on behind `last`.
    """
    repeats = 0

    async def read(name: str, partition: int, start: int, stop: int) -> AsyncIterator[Sequence[Any]]:
        async for record in _messages(settings):
            if start <= record.offset <= stop:
                yield [record]

    learner = ItemLearner(settings.learner_config(words.DIM), words.DIM)
    async for (record,) in read("examples", 0, 0, last):
        learnt = learner.learn(record.offset, record.value)
        repeats += not learnt.examples and not learnt.entries
    learner = await rebuild.learn_examples(read, learner, last)  # again from the beginning, where users were unlearnt
    return learner.learner.digest(), repeats
