"""aiokafka made to read records whose header names are not UTF-8: without this, one of them stops its partition.

Kafka does not look at header names, and clients of other languages may write any bytes. aiokafka's reader raises in the
middle of a batch, at every fetch again. Here such a batch is read once more by aiokafka's own Python reader, with the
bytes that are no text replaced (U+FFFD); all other batches go the usual way. `install` puts that into aiokafka's
fetcher, for every consumer of the process.
"""

from collections.abc import Iterator
from typing import Any

from aiokafka.consumer import fetcher
from aiokafka.record.default_records import _DefaultRecordBatchPy
from aiokafka.record.memory_records import MemoryRecords, _MemoryRecordsPy
from aiokafka.record.util import decode_varint_py


class _Kept:
    """aiokafka's records of a fetch, with their bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        records = MemoryRecords(data)
        self.has_next = records.has_next
        self.next_batch = records.next_batch
        self.size_in_bytes = records.size_in_bytes


class _Text(bytearray):
    """Bytes that are read as text whatever they are."""

    def decode(self, encoding: str = "utf-8", errors: str = "replace") -> str:
        return super().decode(encoding, "replace")


class _Buffer(bytearray):
    """A batch whose slices are `_Text`."""

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        return _Text(found) if isinstance(found, bytearray) else found


class _Batch(_DefaultRecordBatchPy):
    """aiokafka's own batch over a `_Buffer`."""

    _buffer: Any

    def _maybe_uncompress(self) -> None:
        super()._maybe_uncompress()
        self._buffer = _Buffer(self._buffer)

    def _read_msg(self, decode_varint: Any = decode_varint_py) -> Any:
        return super()._read_msg(decode_varint)


class _Records(_MemoryRecordsPy):
    """The records of a fetch, read by `_Batch`."""

    def next_batch(self, *limits: Any) -> Any:
        following = self._next_slice
        batch = super().next_batch(*limits)
        is_current = following is not None and following[self.MAGIC_OFFSET] >= 2
        return _Batch(following) if is_current else batch


class TolerantRecords(fetcher.PartitionRecords):
    """A partition's part of a fetch: from a batch that cannot be read on, once more and tolerantly."""

    def __init__(self, tp: Any, records: _Kept, aborted_transactions: Any, *more: Any) -> None:
        self._data = records.data
        self._aborted = list(aborted_transactions or [])
        super().__init__(tp, records, aborted_transactions, *more)

    def __next__(self) -> Any:
        try:
            return super().__next__()
        except UnicodeDecodeError:
            self._records_iterator = self._once_more()
            return super().__next__()

    def _once_more(self) -> Iterator[Any]:
        """From `next_fetch_offset`, which is that of the record that could not be read."""
        self._records = _Records(self._data)
        self._aborted_transactions = sorted(self._aborted, key=lambda aborted: aborted[1])
        self._aborted_producers: set[int] = set()
        records: Iterator[Any] = self._unpack_records()
        return records


def install() -> None:
    """Every consumer that starts from now on reads tolerantly. Harmless when called again."""
    fetcher.MemoryRecords = _Kept
    fetcher.PartitionRecords = TolerantRecords
