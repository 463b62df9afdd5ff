"""What waits for one partition of the user state: the merge of its source topics into one order.

A user's state depends on the order of their clicks, comments and erasures, and these come by three topics. The order
is a function of the logs: of the topics' next records, the one with the earliest event time (never later than the
record's own time) goes first, then the topic named first. Nothing is remembered, so a merge that begins anywhere in the
middle goes on as the one before it. While a topic is behind, the others wait for it; once it is at its end, an event is
held for `hold_s` after it came, since a record with an earlier time may still be on its way. A topic of which no broker
tells anything may have grown unseen: it is waited for as well, but not for ever, and the hold counts from its return.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, NamedTuple, TypeVar

T = TypeVar("T")

LAG_WAIT_MAX_S: Final = 1.0  # for a topic that is behind but sends nothing (an open or aborted transaction)
UNHEARD_WAIT_MAX_S: Final = 60.0  # for one out of reach: by then a leader is elected, a dead connection given up
LOOK_AGAIN_S: Final = 0.1  # whether it is heard of
LATE_MAX_S: Final = 0.5  # that a look may come after it was due; else the process stood still, and waited for nothing
AWAKE_S: Final = 0.5  # until what is heard of after that was told after that


class Entry(NamedTuple, Generic[T]):
    """One source record: `work` is what is to be done for it (nothing for a reject)."""

    at: float  # merge time
    offset: int
    arrived: float
    work: T | None


@dataclass
class Source(Generic[T]):
    """One topic's queue. `expected` is the offset that comes next."""

    expected: int
    since: float = float("-inf")  # when something came, or the last of it went
    unheard_at: float = float("-inf")  # when it was out of reach, last
    caught_up_to: int = -1
    entries: deque[Entry[T]] = field(default_factory=deque)
    put_bytes: deque[tuple[int, int]] = field(default_factory=deque)  # of each put: offset behind it, size

    def bytes_waiting(self) -> int:
        """Size of the puts that entries are left of."""
        first = self.entries[0].offset if self.entries else self.expected
        while self.put_bytes and self.put_bytes[0][0] <= first:
            self.put_bytes.popleft()
        return sum(size for _, size in self.put_bytes)


class Inbox(Generic[T]):
    """Queues of one partition's source topics, and the merge. Times are given in, never read."""

    def __init__(self, expected: dict[str, int], hold_s: float) -> None:
        self.sources: dict[str, Source[T]] = {topic: Source(offset) for topic, offset in expected.items()}
        self.hold_s = hold_s
        self._due = float("inf")  # when `take` is called again, at the latest
        self._resumed = float("-inf")  # when it was called later than that, last

    def __len__(self) -> int:
        return sum(len(s.entries) for s in self.sources.values())

    def put(
        self, topic: str, records: Sequence[tuple[float, int, T | None]], next_offset: int, now: float, size: int = 0
    ) -> None:  # fmt: skip
        """Takes (time, offset, work) of a topic in offset order; `next_offset` is what will come after them.

        size: bytes of the records, for `Source.bytes_waiting`.
        """
        source = self.sources[topic]
        if size:
            source.put_bytes.append((next_offset, size))
        source.entries.extend(Entry(at, offset, now, work) for at, offset, work in records)
        source.since = now
        source.expected = next_offset

    def take(
        self, now: float, end_of: Callable[[str], int | None], count_max: int
    ) -> tuple[list[tuple[str, Entry[T]]], float | None]:
        """The next entries in merge order, at most `count_max`, and how long to wait for more (None: until a put).

        `end_of(topic)` is the offset at which the topic ends; None: that is not known, or not lately.
        """
        if now > self._due + LATE_MAX_S:
            self._resumed = now
        taken, wait = self._take(now, end_of, count_max)
        self._due = now + wait if wait else float("inf")
        return taken, wait

    def _take(
        self, now: float, end_of: Callable[[str], int | None], count_max: int
    ) -> tuple[list[tuple[str, Entry[T]]], float | None]:
        taken: list[tuple[str, Entry[T]]] = []
        wait: float | None = None
        while len(taken) < count_max:
            ranked = enumerate(self.sources.items())
            heads = sorted((s.entries[0].at, rank, topic) for rank, (topic, s) in ranked if s.entries)
            if not heads:
                return taken, None
            _, rank, topic = heads[0]
            source = self.sources[topic]
            entries, came = source.entries, source.entries[0].arrived
            wait = self._wait_s(entries[0], now, end_of)
            if wait > 0:
                return taken, wait
            # What came with it waits for no more than it did, as long as it goes before what the others have.
            before = heads[1][:2] if len(heads) > 1 else (float("inf"), 0)
            count = count_max - len(taken)
            while count and entries and entries[0].arrived == came and (entries[0].at, rank) < before:
                taken.append((topic, entries.popleft()))
                count -= 1
            if not entries:  # it may have been paused until now: what comes next has its time from here on
                source.since = now
        return taken, 0.0

    def _wait_s(self, head: Entry[T], now: float, end_of: Callable[[str], int | None]) -> float:
        """How long the head must wait for topics that have nothing here: 0 when it may go."""
        wait = 0.0
        for topic, source in self.sources.items():
            if source.entries:
                continue
            end = end_of(topic)
            wait = max(wait, self._resumed + AWAKE_S - now)
            if end is None:
                source.unheard_at = now
                wait = max(wait, min(head.arrived + UNHEARD_WAIT_MAX_S - now, LOOK_AGAIN_S))
            elif end > max(source.expected, source.caught_up_to):
                left = max(head.arrived, source.since, source.unheard_at, self._resumed) + LAG_WAIT_MAX_S - now
                if left <= 0:
                    source.caught_up_to = end
                wait = max(wait, left)
            else:
                wait = max(wait, max(head.arrived, source.unheard_at) + self.hold_s - now)
        return wait
