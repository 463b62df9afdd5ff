"""An A/B test of an adapter on live users: what was shown to whom, what came of it, and how sure that is.

While a trial is on (model.trial), every list that is answered is noted on the topic `{app}-exposures`, one JSON record:
whose it was, by a pseudonym, which arm, what it showed. Notes wait in a bounded queue and are sent beside the answers;
what finds the queue full is dropped, and counted. The report reads them with the events of the source topics: a list
has an outcome where its user chose one of its items within a window.
"""

import asyncio
import contextlib
from bisect import bisect_right
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import structlog
from prometheus_client import Counter

from model import gate
from model.trial import ARMS, BUCKETS, Trial
from state.sealing import Sealer
from streams import codec, kafka
from streams.answers import Recommendations
from streams.audit import audit_key, pseudonym
from streams.datakeys import sealer_of
from streams.events import Click, Comment
from streams.pipeline import EvidenceConfig, is_low
from streams.settings import Fault, Settings

log = structlog.get_logger(__name__)

EXPOSURE_VERSION: Final = 1
TOPIC: Final = "exposures"  # internal
PARTITION: Final = 0  # the topic has one; the examples log too
QUEUE_MAX: Final = 20_000  # lists that wait for the broker
BATCH_RECORDS_MAX: Final = 500
LINGER_S: Final = 0.25
RETRY_S: Final = 1.0
CLOSE_MAX_S: Final = 1.0  # at the end, for what still waits
ALPHA: Final = 0.05
SPLIT_P_MIN: Final = 0.001  # a split that is less likely than that by chance is a fault
SOURCES: Final[tuple[codec.Topic, ...]] = ("clicks", "comments")

Send = Callable[[list[tuple[bytes | None, bytes | None]]], Awaitable[Any]]


class TrialError(Fault):
    """There is no such trial to be told of."""


class Exposure(msgspec.Struct, omit_defaults=True):
    """One list that was answered in a trial."""

    v: int
    ts: float  # Unix s
    trial: int  # offset of its message in the examples log
    share: float  # of the users that are challengers
    arm: str
    adapter: str  # that the list was made through; "": the encoder as it is
    user: str  # `audit.pseudonym`
    items: list[str]  # ids, best first
    token: str = ""  # of the list; not where data keys are set: it has a digest of the user's id that they do not key


class Exposures:
    """The notes of one worker on their way to the topic. `note` is called in the loop; `run` sends."""

    def __init__(self, send: Send, now: Callable[[], float], sealer: Sealer | None, counted: Counter) -> None:
        """counted: by arm and outcome, noted or dropped."""
        self._send = send
        self._now = now
        self._key = audit_key(sealer)
        self._counted = counted
        self._waiting: deque[tuple[str, Exposure]] = deque()
        self._arrived = asyncio.Event()
        self._is_closing = False

    def note(self, told: Recommendations, trial: Trial, adapter: str) -> None:
        """A list that is answered; at once, whatever the broker does."""
        arm = str(told.arm)
        if len(self._waiting) >= QUEUE_MAX:
            self._counted.labels(arm, "dropped").inc()
            return
        items = [item.item_id for item in told.items]
        user, token = pseudonym(told.user_id, self._key), "" if self._key else told.token
        self._waiting.append((user, Exposure(
            EXPOSURE_VERSION, round(self._now(), 3), trial.salt, trial.share, arm, adapter, user, items, token
        )))  # fmt: skip
        self._arrived.set()

    async def run(self) -> None:
        """Sends what waits, until cancelled or closed. A failed batch is sent again: records may repeat."""
        while not (self._is_closing and not self._waiting):
            await self._arrived.wait()
            self._arrived.clear()
            while self._waiting:
                if len(self._waiting) < BATCH_RECORDS_MAX and not self._is_closing:
                    await asyncio.sleep(LINGER_S)
                await self._send_batch()

    async def _send_batch(self) -> None:
        batch = [self._waiting[at] for at in range(min(len(self._waiting), BATCH_RECORDS_MAX))]
        records: list[tuple[bytes | None, bytes | None]] = [
            (user.encode(), msgspec.json.encode(exposure)) for user, exposure in batch
        ]
        is_failing = False
        while True:
            try:
                await self._send(records)
                break
            except Exception as failure:
                if not is_failing:
                    log.error("lists shown in a trial wait: the exposures topic cannot be written",
                              failure=type(failure).__name__)  # fmt: skip
                is_failing = True
                await asyncio.sleep(RETRY_S)
        for _, exposure in batch:
            self._waiting.popleft()
            self._counted.labels(exposure.arm, "noted").inc()

    async def close(self, running: "asyncio.Task[None]") -> None:
        """What waits, sent within CLOSE_MAX_S; then `running` ends."""
        self._is_closing = True
        self._arrived.set()
        with contextlib.suppress(TimeoutError, asyncio.CancelledError):
            await asyncio.wait_for(running, CLOSE_MAX_S)
        for _, exposure in self._waiting:
            self._counted.labels(exposure.arm, "dropped").inc()
        if self._waiting:
            log.error("lists shown in a trial are not noted: the broker did not take them", lists=len(self._waiting))


# -- what came of it


class Choice(NamedTuple):
    """A positive event: a user, by pseudonym, chose an item."""

    user: str
    item_id: str
    ts: float


@dataclass
class Shown:
    """The lists of one user, in order of time."""

    arm: str
    ts: list[float] = field(default_factory=list)
    items: list[frozenset[str]] = field(default_factory=list)
    chosen: list[bool] = field(default_factory=list)  # whether a list has an outcome


class Outcomes:
    """Who was shown what in one trial, and which lists have an outcome: within `window_s` the user chose an item of
    theirs. A choice counts for the last list that showed the item; a list has one outcome at most."""

    def __init__(self, exposures: Sequence[Exposure], window_s: float) -> None:
        """exposures: at least one."""
        self.window_s = window_s
        self.trial, self.share = exposures[-1].trial, exposures[-1].share
        self.adapters = {exposure.arm: exposure.adapter for exposure in exposures}
        self.users: dict[str, Shown] = {}
        for one in sorted(exposures, key=lambda exposure: exposure.ts):
            shown = self.users.setdefault(one.user, Shown(one.arm))
            items = frozenset(one.items)
            if not shown.ts or (shown.ts[-1], shown.items[-1]) != (one.ts, items):  # else the record was repeated
                shown.ts.append(one.ts)
                shown.items.append(items)
                shown.chosen.append(False)
        self.first_ts = min(shown.ts[0] for shown in self.users.values())
        self.last_ts = max(shown.ts[-1] for shown in self.users.values())

    def choose(self, choice: Choice) -> None:
        """Takes one in; in any order."""
        shown = self.users.get(choice.user)
        if shown is None:
            return
        at = bisect_right(shown.ts, choice.ts) - 1
        while at >= 0 and shown.ts[at] >= choice.ts - self.window_s:
            if choice.item_id in shown.items[at]:
                shown.chosen[at] = True
                return
            at -= 1


class ArmReport(msgspec.Struct):
    """One arm, of lists whose window is over: users that were shown one, lists, lists with an outcome, and the share of
    these, a mean over users with its 95 % interval. adapter: "" for the encoder as it is."""

    adapter: str
    users: int
    exposures: int
    outcomes: int
    rate: float | None = None
    low: float | None = None
    high: float | None = None


class DifferenceReport(msgspec.Struct):
    """Challenger minus champion, of the rates; the 95 % interval and p of one planned look (`gate.difference`)."""

    mean: float
    low: float
    high: float
    p: float


class AnytimeReport(msgspec.Struct):
    """The same of each user's first list, at any moment: verdict is better, worse, or null while neither is shown.

    users: whose first list's window is over. low, high: of the difference, with 95 % over all looks together, each of
    which has the same window."""

    users: int
    low: float
    high: float
    verdict: str | None = None


class Report(msgspec.Struct):
    """A trial's result. open: lists that count nowhere yet, since their window is not over; split_p: how likely so
    uneven a split of the users is by chance; notes: what to beware of."""

    trial: int
    share: float
    window_s: float
    first_ts: float
    last_ts: float
    open: int
    arms: dict[str, ArmReport]
    split_p: float
    difference: DifferenceReport | None = None
    anytime: AnytimeReport | None = None
    notes: list[str] = []


def report(outcomes: Outcomes, now: float, is_whole: bool = True) -> Report:
    """The result as of now (Unix s), until when the choices reach. is_whole: whether all its lists are there."""
    settled = now - outcomes.window_s
    rates: dict[str, list[float]] = {arm: [] for arm in ARMS}
    counts: dict[str, list[int]] = {arm: [0, 0] for arm in ARMS}  # lists, with an outcome
    firsts: list[tuple[float, bool, bool]] = []
    for shown in outcomes.users.values():
        over = shown.chosen[: bisect_right(shown.ts, settled)]
        if over:
            rates[shown.arm].append(sum(over) / len(over))
            counts[shown.arm][0] += len(over)
            counts[shown.arm][1] += sum(over)
            firsts.append((shown.ts[0], shown.arm == ARMS[1], over[0]))
    arms: dict[str, ArmReport] = {}
    for arm in ARMS:
        interval = gate.mean_interval(np.array(rates[arm]), ALPHA) if rates[arm] else (None, None, None)
        arms[arm] = ArmReport(outcomes.adapters.get(arm, ""), len(rates[arm]), *counts[arm], *interval)
    champions, challengers = (len(rates[arm]) for arm in ARMS)
    share = Trial(None, outcomes.share, outcomes.trial).challengers / BUCKETS
    told = Report(
        outcomes.trial, outcomes.share, outcomes.window_s, outcomes.first_ts, outcomes.last_ts,
        sum(len(shown.ts) for shown in outcomes.users.values()) - sum(lists for lists, _ in counts.values()), arms,
        gate.split_p(challengers, champions + challengers, share),
    )  # fmt: skip
    if told.split_p < SPLIT_P_MIN:
        told.notes.append(
            f"{challengers} of {champions + challengers} users are challengers, which is not a share of {share:.3f}: "
            "the split is at fault, or exposures are missing; do not trust the difference"
        )
    if not champions or not challengers:
        told.notes.append("nothing to tell yet: no user of one arm has a list whose window is over")
        return told
    found = gate.difference(np.array(rates[ARMS[1]]), np.array(rates[ARMS[0]]), ALPHA)
    told.difference = DifferenceReport(*found)
    if is_whole:
        told.anytime = _anytime(firsts, share)
    else:
        told.notes.append(
            "the trial's first lists may be gone (HEADWATER_RETENTION_HOURS), and with them which list was a user's "
            "first: there is no verdict for any look"
        )
    return told


def _anytime(firsts: list[tuple[float, bool, bool]], share: float) -> AnytimeReport:
    """Users in the order of their first lists (Unix s, whether a challenger's, whether chosen from), each with that
    list's outcome alone: it does not change any more once its window is over, so that what has been looked at stays as
    it was."""
    _, sides, values = zip(*sorted(firsts), strict=True)
    low, high = gate.difference_anytime(np.array(values), np.array(sides), share, ALPHA)
    return AnytimeReport(len(firsts), low, high, "better" if low > 0 else "worse" if high < 0 else None)


# -- from the logs


class Kept(NamedTuple):
    """What the topic has of a trial. is_whole: all of it, from its first list on; else that cannot be told."""

    exposures: list[Exposure]
    is_whole: bool


async def read(settings: Settings, trial: int | None, now: float) -> Kept:
    """The exposures of a trial (None: the newest), as the topic has them now. Raises TrialError, KafkaError."""
    topic, options = settings.internal_topic(TOPIC), settings.kafka_options()
    end = await kafka.log_end(options, topic, PARTITION)
    found: list[Exposure] = []
    trials: set[int] = set()
    oldest: Exposure | None = None
    begins = 0
    if end:
        async for batch in kafka.read_log(options, topic, PARTITION, 0, end - 1):
            for record in batch:
                with contextlib.suppress(msgspec.DecodeError):
                    one = msgspec.json.decode(record.value or b"", type=Exposure)
                    if oldest is None:
                        oldest, begins = one, record.offset
                    if trial is None and one.trial > max(trials, default=-1):
                        found.clear()
                    trials.add(one.trial)
                    if one.trial == (max(trials) if trial is None else trial):
                        found.append(one)
    if oldest is None or not found:
        known = f"the topic has those of {', '.join(map(str, sorted(trials)))}" if trials else "the topic is empty"
        raise TrialError(
            f"no list was shown in {'a trial' if trial is None else f'the trial {trial}'} that is still kept: {known}"
        )
    wanted = found[0].trial
    return Kept(found, begins == 0 or oldest.trial < wanted or await _is_young(settings, wanted, now))


async def _is_young(settings: Settings, trial: int, now: float) -> bool:
    """Whether a trial began so lately that nothing of its time is deleted yet."""
    topic = settings.internal_topic("examples")
    began = await kafka.record_at(settings.kafka_options(), topic, PARTITION, trial)
    return began is not None and now - began.timestamp / 1e3 < 3600 * settings.retention_hours


async def choices(settings: Settings, users: Container[str], since: float) -> AsyncIterator[Choice]:
    """Positive events of these users (pseudonyms) in the source topics from `since` (Unix s) on. Raises KafkaError."""
    key, evidence, options = audit_key(sealer_of(settings)), settings.evidence_config(), settings.kafka_options()
    for name in SOURCES:
        for partition in range(settings.partitions):
            topic = settings.topic(name)
            end = await kafka.log_end(options, topic, partition)
            start = await kafka.offset_since(options, topic, partition, since)
            if start >= end:
                continue
            batches = kafka.read_records(options, topic, partition, start, end - 1, isolation_level="read_committed")
            async for batch in batches:
                for event in codec.decode_batch(name, batch).events:
                    item_id = _chosen(event, evidence)
                    if item_id is not None and event.ts >= since:
                        user = pseudonym(event.user_id, key)
                        if user in users:
                            yield Choice(user, item_id, event.ts)


def _chosen(event: Any, evidence: EvidenceConfig) -> str | None:
    """The item of a positive event."""
    if isinstance(event, Click):
        return None if is_low(event, evidence) else event.item_id
    return event.item_id if isinstance(event, Comment) else None


async def tell(settings: Settings, trial: int | None, window_s: float, now: float) -> Report:
    """The report of a trial (None: the newest), from the logs. Raises TrialError, KafkaError."""
    kept = await read(settings, trial, now)
    outcomes = Outcomes(kept.exposures, window_s)
    kept.exposures.clear()
    async for choice in choices(settings, outcomes.users, outcomes.first_ts):
        outcomes.choose(choice)
    return report(outcomes, now, kept.is_whole)
