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
from collections.abc import Awaitable, Callable, Container, Iterable, Sequence
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
PARTITION: Final = 0  # the topic has one
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
                if not self._is_closing:
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

    def __init__(self, exposures: Iterable[Exposure], window_s: float) -> None:
        self.window_s = window_s
        self.users: dict[str, Shown] = {}
        for one in sorted(exposures, key=lambda exposure: exposure.ts):
            shown = self.users.setdefault(one.user, Shown(one.arm))
            items = frozenset(one.items)
            if not shown.ts or (shown.ts[-1], shown.items[-1]) != (one.ts, items):  # else the record was repeated
                shown.ts.append(one.ts)
                shown.items.append(items)
                shown.chosen.append(False)

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
    """One arm: users that were shown a list, lists, lists with an outcome, and the share of these, a mean over users
    with its 95 % interval. adapter: "" for the encoder as it is."""

    adapter: str
    users: int
    exposures: int
    outcomes: int
    rate: float | None = None
    low: float | None = None
    high: float | None = None


class DifferenceReport(msgspec.Struct):
    """Challenger minus champion, of the rates; the 95 % interval and p of a look that was planned."""

    mean: float
    low: float
    high: float
    p: float


class AnytimeReport(msgspec.Struct):
    """The same of each user's first list, at any moment: verdict is better, worse, or null while neither is shown.

    users: whose first list's window is over. low, high: of the difference, with 95 % over all looks together."""

    users: int
    low: float | None = None
    high: float | None = None
    verdict: str | None = None


class Report(msgspec.Struct):
    """A trial's result. split_p: how likely so uneven a split of the users is by chance; notes: what to beware of."""

    trial: int
    share: float
    window_s: float
    first_ts: float
    last_ts: float
    arms: dict[str, ArmReport]
    split_p: float
    difference: DifferenceReport | None = None
    anytime: AnytimeReport | None = None
    notes: list[str] = []


def report(exposures: Sequence[Exposure], choices: Iterable[Choice], window_s: float, now: float) -> Report:
    """Of the exposures of one trial, at least one. now: Unix s, until when the choices reach."""
    outcomes = Outcomes(exposures, window_s)
    for choice in choices:
        outcomes.choose(choice)
    newest = exposures[-1]
    of = {arm: [shown for shown in outcomes.users.values() if shown.arm == arm] for arm in ARMS}
    adapters = {exposure.arm: exposure.adapter for exposure in exposures}
    rates = {arm: np.array([sum(s.chosen) / len(s.chosen) for s in of[arm]]) for arm in ARMS}
    arms: dict[str, ArmReport] = {}
    for arm in ARMS:
        known = arm in adapters and len(of[arm]) > 1
        mean, low, high = gate.mean_interval(rates[arm], ALPHA) if known else (None, None, None)
        lists, chosen = sum(len(s.ts) for s in of[arm]), sum(sum(s.chosen) for s in of[arm])
        arms[arm] = ArmReport(adapters.get(arm, ""), len(of[arm]), lists, chosen, mean, low, high)
    champion, challenger = (len(of[arm]) for arm in ARMS)
    share = Trial(None, newest.share, newest.trial).challengers / BUCKETS
    told = Report(
        newest.trial, newest.share, window_s, min(e.ts for e in exposures), max(e.ts for e in exposures), arms,
        gate.split_p(challenger, champion + challenger, share),
    )  # fmt: skip
    if told.split_p < SPLIT_P_MIN:
        told.notes.append(
            f"{challenger} of {champion + challenger} users are challengers, which is not a share of {share:.3f}: the "
            "split is at fault, or exposures are missing; do not trust the difference"
        )
    if min(champion, challenger) < gate.USERS_MIN:
        told.notes.append(f"too little to tell: {gate.USERS_MIN} users in each arm are the least that says anything")
        return told
    found = gate.difference(rates[ARMS[1]], rates[ARMS[0]], ALPHA)
    told.difference = DifferenceReport(*found)
    told.anytime = _anytime(outcomes, share, now)
    return told


def _anytime(outcomes: Outcomes, share: float, now: float) -> AnytimeReport:
    """Users in the order of their first lists, each with that list's outcome alone: it does not change any more once
    its window is over, so that what has been looked at stays as it was."""
    firsts = sorted((s.ts[0], s.arm == ARMS[1], s.chosen[0]) for s in outcomes.users.values())
    over = [(is_challenger, chosen) for ts, is_challenger, chosen in firsts if ts + outcomes.window_s <= now]
    sides = np.array([side for side, _ in over], bool)
    values = np.array([chosen for _, chosen in over], np.float64)
    low, high = gate.difference_sequence(values, sides, share, ALPHA)
    if not len(low):
        return AnytimeReport(len(over))
    verdict = "better" if low[-1] > 0 else "worse" if high[-1] < 0 else None
    return AnytimeReport(len(over), float(low[-1]), float(high[-1]), verdict)


# -- from the logs


async def read(settings: Settings, trial: int | None) -> list[Exposure]:
    """The exposures of a trial (None: the newest), as the topic has them now. Raises TrialError, KafkaError."""
    topic, options = settings.internal_topic(TOPIC), settings.kafka_options()
    end = await kafka.log_end(options, topic, PARTITION)
    found: list[Exposure] = []
    if end:
        async for batch in kafka.read_log(options, topic, PARTITION, 0, end - 1):
            for record in batch:
                with contextlib.suppress(msgspec.DecodeError):
                    found.append(msgspec.json.decode(record.value or b"", type=Exposure))
    trials = sorted({exposure.trial for exposure in found})
    if not trials or (trial is not None and trial not in trials):
        known = f"the topic has those of {', '.join(map(str, trials))}" if trials else "the topic is empty"
        raise TrialError(
            f"no list was shown in {'a trial' if trial is None else f'the trial {trial}'} that is still kept: {known}"
        )
    wanted = trials[-1] if trial is None else trial
    return [exposure for exposure in found if exposure.trial == wanted]


async def choices(settings: Settings, users: Container[str], since: float) -> list[Choice]:
    """Positive events of these users (pseudonyms) in the source topics from `since` (Unix s) on. Raises KafkaError."""
    key, evidence, options = audit_key(sealer_of(settings)), settings.evidence_config(), settings.kafka_options()
    names: dict[str, str] = {}
    found: list[Choice] = []
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
                        user = names.get(event.user_id)
                        if user is None:
                            user = names[event.user_id] = pseudonym(event.user_id, key)
                        if user in users:
                            found.append(Choice(user, item_id, event.ts))
    return found


def _chosen(event: Any, evidence: EvidenceConfig) -> str | None:
    """The item of a positive event."""
    if isinstance(event, Click):
        return None if is_low(event, evidence) else event.item_id
    return event.item_id if isinstance(event, Comment) else None


async def tell(settings: Settings, trial: int | None, window_s: float, now: float) -> Report:
    """The report of a trial (None: the newest), from the logs. Raises TrialError, KafkaError."""
    exposures = await read(settings, trial)
    since = min(exposure.ts for exposure in exposures)
    users = {exposure.user for exposure in exposures}
    return report(exposures, await choices(settings, users, since), window_s, now)
