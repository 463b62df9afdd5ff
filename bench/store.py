"""User rows written in flushes and read back by one store, against plain puts and gets of rocksdict with its defaults.

A flush is what a partition writes: its rows, the applied offsets and an outbox entry in one atomic batch.
"""

import argparse
import hashlib
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
from rocksdict import Options, Rdict

from state.partition import digest
from state.store import Meta, OutboxEntry, RocksDisk, flush_id, new_store_id

ROW_BYTES: Final = 1500  # of a user with some 40 events and a few comments
FLUSH_ROWS: Final = 500
READ_KEYS: Final = 500


def run(arguments: list[str]) -> dict[str, Any]:
    """`python -m bench store [--rows N]`"""
    parser = argparse.ArgumentParser(prog="python -m bench store", description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    asked = parser.parse_args(arguments)
    draw = np.random.default_rng(1)
    keys = [b"u%d" % n for n in draw.permutation(asked.rows).tolist()]
    pool = draw.bytes(1 << 20)
    values = [pool[at : at + ROW_BYTES] for at in draw.integers(0, len(pool) - ROW_BYTES, asked.rows).tolist()]
    with tempfile.TemporaryDirectory() as folder:
        ours = _ours(Path(folder) / "store", keys, values)
        plain = _plain(Path(folder) / "plain", keys, values)
    return {
        "rows": asked.rows, "row_bytes": ROW_BYTES, "flush_rows": FLUSH_ROWS, **ours, **plain,
        "write_ratio": ours["writes_per_s"] / plain["plain_writes_per_s"],
        "read_ratio": ours["reads_per_s"] / plain["plain_reads_per_s"],
        "result_hash": hashlib.blake2b(ours["digest"].encode(), digest_size=8).hexdigest(),
    }  # fmt: skip


def _ours(path: Path, keys: list[bytes], values: list[bytes]) -> dict[str, Any]:
    disk = RocksDisk()
    store = disk.open(path)
    store_id = new_store_id()
    started = time.perf_counter()
    for number, at in enumerate(range(0, len(keys), FLUSH_ROWS), 1):
        rows = dict(zip(keys[at : at + FLUSH_ROWS], values[at : at + FLUSH_ROWS], strict=True))
        applied = {"clicks": at + len(rows) - 1}
        meta = Meta(applied, 1, store_id, number, applied, number)
        settled = [flush_id(1, number - 1)] if number > 1 else []
        store.write(rows, meta, entry=(flush_id(1, number), OutboxEntry(applied, [], list(rows))), settled=settled)
    wrote = time.perf_counter() - started
    started = time.perf_counter()
    for at in range(0, len(keys), READ_KEYS):
        assert store.get_many(keys[at : at + READ_KEYS]) == values[at : at + READ_KEYS]
    read = time.perf_counter() - started
    started = time.perf_counter()
    whole = digest(store.items(), {"clicks": len(keys) - 1})
    scanned = time.perf_counter() - started
    size, memory = store.disk_bytes(), store.memory_bytes() + disk.memory_bytes()
    store.close()
    started = time.perf_counter()
    again = disk.open(path)
    reopened = time.perf_counter() - started
    assert again.get_many(keys[:1]) == values[:1]
    again.close()
    return {
        "writes_per_s": len(keys) / wrote, "reads_per_s": len(keys) / read, "digest_rows_per_s": len(keys) / scanned,
        "reopen_s": reopened, "disk_bytes": size, "memory_bytes": memory, "digest": whole,
    }  # fmt: skip


def _plain(path: Path, keys: list[bytes], values: list[bytes]) -> dict[str, float]:
    database = Rdict(str(path), options=Options(raw_mode=True))
    started = time.perf_counter()
    for key, value in zip(keys, values, strict=True):
        database[key] = value
    wrote = time.perf_counter() - started
    started = time.perf_counter()
    for key, value in zip(keys, values, strict=True):
        assert database[key] == value
    read = time.perf_counter() - started
    database.close()
    return {"plain_writes_per_s": len(keys) / wrote, "plain_reads_per_s": len(keys) / read}
