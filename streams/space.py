"""The space of a deployment's text vectors: one encoder's, claimed by the first worker in a log of its own.

Vectors of two encoders mean nothing to each other, and look alike. Neither rows nor examples say whose theirs are: all
of an app id's are of the encoder whose name is the first record of `{app}-encoder`, and whoever would add others to
them, or an adapter of another, is refused before it begins. Records are never deleted there.
"""

from typing import Final

import msgspec

from state.changelog import Log
from streams.settings import Fault

TOPIC: Final = "encoder"
KEY: Final = b"encoder"


class Space(msgspec.Struct, frozen=True):
    """encoder: name of the one that the vectors are of, with the digest of its weights. dim: their length."""

    encoder: str
    dim: int


class OtherSpaceError(Fault):
    """What is to be added belongs to another encoder's space."""


async def claimed(log: Log) -> Space | None:
    """The deployment's space; None where no worker has started yet. Raises what the log raises."""
    found = [record async for batch in log.read(0, None) for record in batch]  # one, or a few that came too late
    return msgspec.json.decode(found[0].value or b"", type=Space) if found else None


async def claim(log: Log, mine: Space, app_id: str) -> None:
    """Makes the space the deployment's, unless it has one. Raises OtherSpaceError where that is another one.

    Of several that claim at once the first in the log has it.
    """
    theirs = await claimed(log)
    if theirs is None:
        await log.append([(KEY, msgspec.json.encode(mine))])
        theirs = await claimed(log)
    assert theirs is not None
    if theirs.encoder != mine.encoder:
        raise OtherSpaceError(
            f"the vectors of app id {app_id} are of the encoder {theirs.encoder}, and this one is {mine.encoder}: the "
            "two cannot be compared. Set HEADWATER_ENCODER to theirs; or, to change the encoder, set HEADWATER_APP_ID "
            "to a new name: that learns everything anew, from what the source topics still hold"
        )
