"""One suite for every store, and what RocksDB adds: files that break, one memory budget."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest
from rocksdict import WriteBatch

from bench.doubles import MemoryDisk
from state.store import (
    CORRUPT_MARK,
    Disk,
    Meta,
    OutboxEntry,
    RocksDisk,
    RocksStore,
    StoreCorruptError,
    StoreError,
    StoreLockedError,
    StoreVersionError,
    flush_id,
    pack_meta,
    pack_outbox,
    shared_disk,
    unpack_meta,
    unpack_outbox,
)

META = Meta(
    applied={"clicks": 7, "comments": -1},
    epoch=3,
    store_id=bytes(range(16)),
    position=260,
    log_applied={"clicks": 5, "comments": -1},
    log_flush=2,
    restoring=True,
)
META_V1 = bytes.fromhex(
    "0101000000000000000300010203"
    "0405060708090a0b0c0d0e0f0000000000000104000000000000000202"
    "06636c69636b73000000000000000708636f6d6d656e7473ffffffffffffffff"
    "0206636c69636b73000000000000000508636f6d6d656e7473ffffffffffffffff"
)
ENTRY = OutboxEntry({"clicks": 1}, [(b"k", b"value"), (b"", b"")], [b"a", b"\x00"])
ENTRY_V1 = bytes.fromhex(
    "01" + "0106636c69636b730000000000000001" + "00000002" + "0000000100000005" + "6b76616c7565" + "0000000000000000"
    "00000002" + "0000000161" + "0000000100"
)


@pytest.fixture(params=["memory", "rocks"])
def disk(request: pytest.FixtureRequest) -> Disk:
    return MemoryDisk() if request.param == "memory" else RocksDisk()


def test_meta_version_1_bytes() -> None:
    assert pack_meta(META) == META_V1
    assert unpack_meta(META_V1) == META


def test_outbox_version_1_bytes() -> None:
    assert pack_outbox(ENTRY) == ENTRY_V1
    assert unpack_outbox(ENTRY_V1) == ENTRY


@pytest.mark.parametrize("unpack", [unpack_meta, unpack_outbox])
def test_newer_version_is_refused_with_what_to_do(unpack: Callable[[bytes], object]) -> None:
    with pytest.raises(StoreVersionError, match=r"version 2, this build reads 1; deploy .* newer one"):
        unpack(b"\x02" + META_V1[1:])
    with pytest.raises(StoreVersionError, match="version None"):
        unpack(b"")


@pytest.mark.parametrize("length", range(1, len(META_V1)))
def test_meta_cut_short_is_corrupt(length: int) -> None:
    with pytest.raises(StoreCorruptError):
        unpack_meta(META_V1[:length])


@pytest.mark.parametrize("length", range(1, len(ENTRY_V1)))
def test_outbox_cut_short_is_corrupt(length: int) -> None:
    with pytest.raises(StoreCorruptError):
        unpack_outbox(ENTRY_V1[:length])


def test_new_store_is_empty(disk: Disk, tmp_path: Path) -> None:
    store = disk.open(tmp_path / "p")
    assert store.meta() is None
    assert store.outbox() == []
    assert list(store.items()) == []
    assert store.get_many([]) == []
    assert store.get_many([b"a"]) == [None]
    store.close()


def test_batch_is_there_after_a_reopen(disk: Disk, tmp_path: Path) -> None:
    store = disk.open(tmp_path / "p")
    store.write({b"a": b"1", b"b": b"2"}, META, entry=(flush_id(1, 2), ENTRY))
    store.write({b"a": None, b"c": b""}, entry=(flush_id(1, 10), ENTRY))
    store.close()
    store = disk.open(tmp_path / "p")
    assert store.meta() == META
    assert store.outbox() == [(flush_id(1, 2), ENTRY), (flush_id(1, 10), ENTRY)]
    assert store.get_many([b"c", b"a", b"b", b"b"]) == [b"", None, b"2", b"2"]
    store.write({}, settled=[flush_id(1, 2)])
    assert store.outbox() == [(flush_id(1, 10), ENTRY)]
    store.close()


def test_any_bytes_are_a_row_key(disk: Disk, tmp_path: Path) -> None:
    store = disk.open(tmp_path / "p")
    rows: dict[bytes, bytes | None] = {
        key: b"r" + key for key in (b"", b"\0", b"\0meta", b"\0outboxx", b"\x01", b"\xff" * 9)
    }
    store.write(rows, META)
    assert dict(store.items()) == rows
    assert store.meta() == META
    assert store.outbox() == []
    store.close()


def test_items_come_in_key_order_from_start_as_of_the_call(disk: Disk, tmp_path: Path) -> None:
    store = disk.open(tmp_path / "p")
    store.write({b"c": b"3", b"a": b"1", b"b": b"2"}, META)
    items, (meta, rows) = store.items(b"b"), store.snapshot()
    store.write({b"b": b"new", b"d": b"4"}, pack_again(META, 9))
    assert list(items) == [(b"b", b"2"), (b"c", b"3")]
    assert meta == META
    assert list(rows) == [(b"a", b"1"), (b"b", b"2"), (b"c", b"3")]
    assert store.row_count_estimate() >= 4
    assert store.memory_bytes() > 0
    assert store.disk_bytes() == 0
    store.close()


def pack_again(meta: Meta, position: int) -> Meta:
    return Meta(meta.applied, meta.epoch, meta.store_id, position, meta.log_applied, meta.log_flush)


def test_snapshot_of_a_new_store(disk: Disk, tmp_path: Path) -> None:
    store = disk.open(tmp_path / "p")
    meta, rows = store.snapshot()
    assert (meta, list(rows)) == (None, [])
    store.close()


def test_wiped_store_is_empty(disk: Disk, tmp_path: Path) -> None:
    disk.wipe(tmp_path / "p")
    store = disk.open(tmp_path / "p")
    store.write({b"a": b"1"}, META)
    store.close()
    disk.wipe(tmp_path / "p")
    store = disk.open(tmp_path / "p")
    assert store.meta() is None
    assert list(store.items()) == []
    store.close()


def fill(path: Path) -> None:
    store = RocksDisk().open(path)
    for at in range(40):
        store.write({b"%04d" % (at * 300 + i): bytes(range(256)) * 4 for i in range(300)}, META)
    store.close()


def damage(path: Path, pattern: str, how: str) -> None:
    files = sorted(path.glob(pattern))
    assert files, pattern
    for file in files:
        if how == "remove":
            file.unlink()
        else:
            data = bytearray(file.read_bytes())
            middle = len(data) // 2
            data[middle : middle + 64] = bytes(b ^ 0xFF for b in data[middle : middle + 64])
            file.write_bytes(data)


@pytest.mark.parametrize(
    ("pattern", "how"),
    [("CURRENT", "remove"), ("CURRENT", "flip"), ("MANIFEST*", "remove"), ("MANIFEST*", "flip"), ("*.sst", "remove")],
)
def test_damaged_files_are_found_at_the_open(tmp_path: Path, pattern: str, how: str) -> None:
    path = tmp_path / "p"
    fill(path)
    damage(path, pattern, how)
    with pytest.raises(StoreCorruptError, match=r"p: "):
        RocksDisk().open(path)
    RocksDisk().wipe(path)
    store = RocksDisk().open(path)
    assert store.meta() is None
    store.close()


def test_damaged_block_is_found_by_its_reader_and_by_every_later_open(tmp_path: Path) -> None:
    path = tmp_path / "p"
    fill(path)
    damage(path, "*.sst", "flip")
    store = RocksDisk().open(path)
    with pytest.raises(StoreCorruptError, match="checksum"):
        list(store.items())
    with pytest.raises(StoreCorruptError, match="checksum"):
        store.get_many([b"%04d" % i for i in range(12_000)])
    store.close()
    assert (path / CORRUPT_MARK).exists()
    with pytest.raises(StoreCorruptError, match="checksum"):
        RocksDisk().open(path)


def pieces(monkeypatch: pytest.MonkeyPatch, ends_after: int | None = None) -> list[bool]:
    """Batches of a few rows a piece; a list of whether each was written. The process may end after some of them."""
    written: list[bool] = []
    real = RocksStore._write

    def write(store: RocksStore, batch: WriteBatch) -> None:
        if ends_after is not None and len(written) == ends_after:
            raise KeyboardInterrupt
        real(store, batch)
        written.append(store.is_torn())

    monkeypatch.setattr(RocksStore, "_write", write)
    monkeypatch.setattr("state.store.PIECE_BYTES", 10)
    return written


def test_a_batch_in_pieces_is_whole_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RocksDisk().open(tmp_path / "p")
    store.write({b"gone": b"1"}, META)
    written = pieces(monkeypatch)
    rows: dict[bytes, bytes | None] = {b"%04d" % n: b"row" for n in range(7)}
    store.write({**rows, b"gone": None}, META, entry=(b"id", ENTRY), piecewise=True)
    assert written == [True, True, True, False]
    assert dict(store.items()) == rows and store.outbox() == [(b"id", ENTRY)] and store.meta() == META
    store.write(rows, META)
    assert len(written) == 5, "in one piece, unless it is asked for"
    store.close()
    again = RocksDisk().open(tmp_path / "p")
    assert dict(again.items()) == rows
    again.close()


@pytest.mark.parametrize("ends_after", [0, 1, 3])
def test_a_process_that_ends_among_the_pieces_leaves_a_corrupt_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends_after: int
) -> None:
    store = RocksDisk().open(tmp_path / "p")
    store.write({b"a": b"1"}, META)
    with monkeypatch.context() as patch:
        pieces(patch, ends_after)
        with pytest.raises(KeyboardInterrupt):
            store.write({b"%04d" % n: b"row" for n in range(10)}, META, piecewise=True)
    store.close()
    if ends_after == 0:
        again = RocksDisk().open(tmp_path / "p")
        assert dict(again.items()) == {b"a": b"1"}, "nothing was written"
        again.close()
    else:
        with pytest.raises(StoreCorruptError, match="in the middle of a large write"):
            RocksDisk().open(tmp_path / "p")


def test_a_snapshot_is_of_before_or_after_the_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RocksDisk().open(tmp_path / "p")
    store.write({}, replace(META, log_flush=1))
    pieces(monkeypatch)
    real, seen = RocksStore._write, []

    def write(held: RocksStore, batch: WriteBatch) -> None:
        real(held, batch)
        reader = Thread(target=lambda: seen.append(store.snapshot()))
        reader.start()
        readers.append(reader)

    readers: list[Thread] = []
    monkeypatch.setattr(RocksStore, "_write", write)
    store.write({b"%04d" % n: b"row" for n in range(10)}, META, piecewise=True)
    for reader in readers:
        reader.join()
    assert len(seen) == 5
    assert all(meta == META and len(list(rows)) == 10 for meta, rows in seen)
    store.close()


def test_rows_without_meta_are_corrupt(tmp_path: Path) -> None:
    store = RocksDisk().open(tmp_path / "p")
    store.write({b"a": b"1"})
    with pytest.raises(StoreCorruptError, match="rows without META"):
        store.meta()
    store.close()


def test_second_owner_is_told_that_the_store_is_locked(tmp_path: Path) -> None:
    store = RocksDisk().open(tmp_path / "p")
    with pytest.raises(StoreLockedError, match="open elsewhere"):
        RocksDisk().open(tmp_path / "p")
    store.close()


def test_closed_store_says_so(tmp_path: Path) -> None:
    store = RocksDisk().open(tmp_path / "p")
    store.close()
    store.close()
    for use in (
        lambda: store.get_many([b"a"]),
        lambda: store.write({b"a": b"1"}),
        store.meta,
        lambda: list(store.items()),
    ):
        with pytest.raises(StoreError, match="closed"):
            use()


def test_path_that_is_no_folder_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "p" / "CURRENT").mkdir(parents=True)
    with pytest.raises(StoreError):
        RocksDisk().open(tmp_path / "p")


def test_memory_of_all_stores_is_bounded_together(tmp_path: Path) -> None:
    disk = RocksDisk(cache_bytes=2 << 20, write_buffers_bytes=4 << 20)
    stores = [disk.open(tmp_path / str(number)) for number in range(4)]
    for at in range(60):
        for store in stores:
            store.write({b"%d" % (at * 100 + i): bytes(2000) for i in range(100)}, META)
    for store in stores:
        assert sum(1 for _ in store.items()) == 6000
    assert sum(store.disk_bytes() for store in stores) > 0
    assert 0 < disk.memory_bytes() <= 14 << 20, "48 MB were written; 4 * 2 memtables of 1 MB, 2 MB of blocks, arenas"
    for store in stores:
        store.close()


def test_process_has_one_shared_disk() -> None:
    assert shared_disk() is shared_disk()


def test_a_purge_leaves_no_trace_of_a_deleted_key_in_any_file(tmp_path: Path) -> None:
    disk = RocksDisk()
    store = disk.open(tmp_path / "p")
    name = b"somebody-with-a-name"

    def files_that_name_it() -> list[str]:
        return [path.name for path in (tmp_path / "p").iterdir() if name in path.read_bytes()]

    store.write({name: bytes(range(256)), b"a": b"1", b"z": b"2"}, META, entry=(b"1", OutboxEntry({}, [], [name])))
    assert files_that_name_it()
    store.write({name: None}, META, settled=[b"1"], owed=[name])
    assert files_that_name_it()
    store.close()
    store = disk.open(tmp_path / "p")
    assert store.owes_purge(), "whoever has it next knows"
    store.purge()
    assert not store.owes_purge()
    assert files_that_name_it() == []
    assert dict(store.items()) == {b"a": b"1", b"z": b"2"}
    assert store.meta() == META
    assert store.outbox() == []
    _, rows = store.snapshot()
    assert dict(rows) == {b"a": b"1", b"z": b"2"}
    store.write({}, owed=[b"%d" % n for n in range(40)])
    store.purge()
    assert not store.owes_purge()
    store.close()
