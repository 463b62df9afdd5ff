"""Whose vectors a deployment has: the first claim in its log."""

from collections.abc import Sequence

import pytest

from bench.doubles import MemoryLog
from streams import space
from streams.space import OtherSpaceError, Space

OURS = Space("minilm:0123", 384)
THEIRS = Space("bge:4567", 384)


async def test_the_first_claim_holds_for_all_that_come_later() -> None:
    log = MemoryLog()
    assert await space.claimed(log) is None
    await space.claim(log, OURS, "app")
    await space.claim(log, OURS, "app")
    with pytest.raises(OtherSpaceError, match="of app id app are of the encoder minilm:0123, and this one is bge:4567"):
        await space.claim(log, THEIRS, "app")
    assert await space.claimed(log) == OURS
    assert len([record async for batch in log.read(0, None) for record in batch]) == 1


class RacingLog(MemoryLog):
    """Another worker's claim lands just before ours."""

    def __init__(self, theirs: Space) -> None:
        super().__init__()
        self.theirs: Space | None = theirs

    async def append(self, records: Sequence[tuple[bytes, bytes | None]]) -> int:
        theirs, self.theirs = self.theirs, None
        if theirs is not None:
            await space.claim(self, theirs, "app")
        return await super().append(records)


async def test_of_two_that_claim_at_once_the_first_in_the_log_has_it() -> None:
    log = RacingLog(THEIRS)
    with pytest.raises(OtherSpaceError):
        await space.claim(log, OURS, "app")
    assert await space.claimed(log) == THEIRS
    log = RacingLog(OURS)
    await space.claim(log, OURS, "app")
    assert await space.claimed(log) == OURS
