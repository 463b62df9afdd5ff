"""What other programs import: a typed client of Headwater, for those who send events and those who ask.

    from headwater import Client, Click

    with Client("http://127.0.0.1:8080") as client:
        positions = client.send(Click("u42", "50", "like"))
        client.recommendations("u42", at_least=positions)

`Client` and `AsyncClient` speak HTTP to any worker, `Producer` writes to Kafka. Importing this loads httpx and msgspec,
and nothing of what a worker is made of.
"""

from streams.answers import (
    BiasParts,
    Certificate,
    Contribution,
    Explanation,
    Heads,
    ItemView,
    Part,
    PastEvent,
    RankedItem,
    Recommendations,
    Similar,
    SimilarItem,
    UserState,
    WhatIf,
)
from streams.client import AsyncClient, Client, ListOptions, RankOptions
from streams.events import Click, Comment, Erasure, Item
from streams.failures import (
    HeadwaterError,
    Invalid,
    NoAnswer,
    NotAllowed,
    NotFound,
    NotHeadwater,
    NotReady,
    TimedOut,
    TooManyRequests,
    WorkerFailed,
)
from streams.producer import Producer

__all__ = [
    "AsyncClient",
    "BiasParts",
    "Certificate",
    "Click",
    "Client",
    "Comment",
    "Contribution",
    "Erasure",
    "Explanation",
    "Heads",
    "HeadwaterError",
    "Invalid",
    "Item",
    "ItemView",
    "ListOptions",
    "NoAnswer",
    "NotAllowed",
    "NotFound",
    "NotHeadwater",
    "NotReady",
    "Part",
    "PastEvent",
    "Producer",
    "RankOptions",
    "RankedItem",
    "Recommendations",
    "Similar",
    "SimilarItem",
    "TimedOut",
    "TooManyRequests",
    "UserState",
    "WhatIf",
    "WorkerFailed",
]
