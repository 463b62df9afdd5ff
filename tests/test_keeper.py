"""Keepers as a worker opens them, and what they tell its operators."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from structlog.testing import capture_logs

from bench.doubles import MemoryLog
from bench.words import WordVectors
from state.partition import Partition
from state.store import RocksDisk
from streams.agents import LearnerKeeper
from streams.settings import Settings
from streams.worker import TP, Worker


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


async def test_a_rebalance_while_a_worker_stops_claims_nothing(make_settings: Callable[..., Settings]) -> None:
    settings = make_settings()
    source: Any = SimpleNamespace(end_of=lambda topic, partition: None, assignment=set)
    worker = Worker(settings, lambda: 0.0, WordVectors(), source, lambda topic, partition: None)
    await worker.stop()
    worker.assigned({TP(settings.topic("clicks"), 0), TP(settings.topic("items"), 0)})
    assert worker.keepers == {} == worker.opening
