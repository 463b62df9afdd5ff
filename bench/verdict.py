"""What a disturbed deployment must equal: its rows another worker's, its examples another log's, its item matrix a
replay of its own log.
"""

import asyncio
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench import words
from bench.deployment import WorkerProcess
from model.examples import new_examples
from state.store import RocksDisk
from streams import examples, kafka
from streams.datakeys import sealer_of
from streams.pipeline import ItemLearner
from streams.settings import Settings

SETTLED_S_MAX: Final = 180.0

Digest = dict[str, Any]


async def source_ends(settings: Settings) -> dict[tuple[str, int], int]:
    """{(topic, partition): where the log ends} of the sources."""
    options = settings.kafka_options()
    return {
        (name, p): await kafka.log_end(options, settings.topic(name), p)
        for name in ("clicks", "comments", "items")
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
    learner = ItemLearner(settings.learner_config(words.DIM), words.DIM)
    repeats = 0
    async for record in _messages(settings):
        if record.offset > last:
            break
        learnt = learner.learn(record.offset, record.value)
        repeats += not learnt.examples and not learnt.entries
    return learner.learner.digest(), repeats
