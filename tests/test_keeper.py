"""Keepers as a worker opens them, and what they tell its operators."""

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from structlog.testing import capture_logs

from bench.doubles import MemoryDisk, MemoryLog
from bench.words import WordVectors
from monitoring.metrics import Metrics
from state import rows
from state.partition import Partition
from state.store import RocksDisk
from streams.agents import LearnerKeeper, UserKeeper
from streams.inbox import Entry
from streams.pipeline import EvidenceConfig
from streams.settings import Settings
from streams.telemetry import Telemetry
from streams.worker import TP, Worker
from tests.records import record


class RowsKeeper(LearnerKeeper):
    """Holds nothing in memory."""

    async def load(self) -> None:
        """There is no learner."""

    def applied(self) -> dict[str, int]:
        return dict(self.partition.applied)


async def test_a_damaged_disk_is_told_with_its_reason(tmp_path: Path) -> None:
    log = MemoryLog()

    async def publish(records: list[tuple[bytes, bytes]]) -> None:
        raise AssertionError("nothing goes downstream")

    async def opened() -> RowsKeeper:
        partition = Partition(
            path=tmp_path / "p", changelog=log, publish=publish, sources=("examples",), disk=RocksDisk()
        )
        around: Any = SimpleNamespace(
            now=lambda: 0.0, merge_hold_s=0.0, metrics=SimpleNamespace(restored=lambda kind, seconds: None),
            end_of=lambda topic, partition: None, failed=None, flush_linger_s=0.0,
        )  # fmt: skip
        learner: Any = SimpleNamespace
        keeper = RowsKeeper(3, partition, {"examples": "examples"}, around, learner, 1.0, 1.0, 100)
        await keeper.open()
        return keeper

    keeper = await opened()
    await keeper.partition.flush({b"row": b"value"}, [], {"examples": 4})
    await keeper.close()
    for table in (tmp_path / "p").glob("*.log"):
        table.write_bytes(b"\0" * 100)
    for manifest in (tmp_path / "p").glob("MANIFEST-*"):
        manifest.write_bytes(b"\0" * 100)
    with capture_logs() as lines:
        keeper = await opened()
    told = [line for line in lines if line["log_level"] == "warning"]
    assert [line["partition"] for line in told] == [3]
    assert "Corruption" in told[0]["reason"]
    assert dict(keeper.partition.items()) == {b"row": b"value"}
    assert keeper.applied() == {"examples": 4}
    await keeper.close()


async def test_a_read_in_another_thread_is_of_one_moment() -> None:
    async def publish(records: list[tuple[bytes, bytes]]) -> None:
        pass

    topics = {"clicks": "clicks", "comments": "comments", "erasures": "erasures"}
    partition = Partition(
        path=Path("/memory"), changelog=MemoryLog(), publish=publish, sources=tuple(topics), disk=MemoryDisk()
    )
    around: Any = SimpleNamespace(
        now=lambda: 0.0, merge_hold_s=0.0, metrics=Telemetry(Metrics()), end_of=lambda topic, partition: None,
        flush_linger_s=0.0, sealer=None, evidence=EvidenceConfig(rank_sample=0.0), book=None, reach=None,
        changed=lambda event: None,
    )  # fmt: skip
    keeper = UserKeeper(0, partition, topics, around)
    await keeper.open()
    torn: list[tuple[int, int]] = []
    seen: set[int] = set()
    is_over = threading.Event()

    def read() -> None:
        while not is_over.is_set():
            held = keeper.read("u")
            assert held is not None
            events = rows.unpack(held.row).events if held.row is not None else 0
            seen.add(events)
            if events != held.applied["clicks"] + 1:
                torn.append((events, held.applied["clicks"]))

    reader = threading.Thread(target=read)
    reader.start()
    for offset in range(300):
        click = record("clicks", b'{"user_id": "u", "item_id": "i%d", "action": "click"}' % offset, b"u", offset=offset)
        ((at, _, work),) = keeper.prepare("clicks", [click])
        await keeper.work([("clicks", Entry(at, offset, 0.0, work))])
    is_over.set()
    reader.join()
    assert not torn
    assert len(seen) > 1, "it has read while the rows changed"
    await keeper.close()
    assert keeper.read("u") is None


async def test_a_rebalance_while_a_worker_stops_claims_nothing(make_settings: Callable[..., Settings]) -> None:
    settings = make_settings()
    source: Any = SimpleNamespace(end_of=lambda topic, partition: None, assignment=set)
    worker = Worker(settings, lambda: 0.0, WordVectors(), source, lambda topic, partition: None)
    await worker.stop()
    worker.assigned({TP(settings.topic("clicks"), 0), TP(settings.topic("items"), 0)})
    assert worker.keepers == {} == worker.opening
