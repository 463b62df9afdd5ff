"""Test, then learn: what is scored, by which figures, and when the figures say that something has changed.

Prequential evaluation (Dawid 1984; Gama, Sebastiao, Rodrigues 2013): every event is first a test of the model as it
is then, and only after that something to learn from. `trace` decides from the events alone which are tests and among
how many candidates; the model has no say in it. `Metrics` keeps one record a test and reports from those, so its
figures are exact and two halves of a stream merge into the whole.

    HR@k      share of the tests with rank <= k                  (recall@k: one relevant item, so the same at k)
    NDCG@k    mean of 1 / log2(1 + rank) where rank <= k         (Jarvelin, Kekalainen 2002; one relevant item)
    MRR       mean of 1 / rank
    AUC       mean over the tests of the share of the other candidates that are ranked below, ties half
    log loss  mean over the tests of -ln p_i - sum_{j != i} ln(1 - p_j), over all candidates

Rank = 1 + #greater + ties / 2, so a constant score earns what chance does.
"""

import math
from bisect import bisect_left, insort
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from river.drift import ADWIN

Array: TypeAlias = npt.NDArray[Any]
Report: TypeAlias = dict[str, Any]

SCORED: Final = 0  # the first event of a (user, item) pair, positive, and the item is a candidate: test and learn
CREATED: Final = 1  # the same, but the item is not a candidate yet (the event that creates it): learn
REPEAT: Final = 2  # the pair was there before: neither
LOW: Final = 3  # a low rating: consumed, evidence, never a target
ASIDE: Final = 4  # about no item, or a text about an item that the user had before: text alone

NEW_POSITIVES_MAX: Final = 5  # a user is new for the first 5 positives, an item before its 5th
HITS_MAX: Final = 10
RECALL_MAX: Final = 20
UNKNOWN: Final = -1  # positives of a user or item that nobody counted: in no slice
MCNEMAR_WINDOW: Final = 1000  # tests
MCNEMAR_ALPHA: Final = 0.01
MCNEMAR_CHI2: Final = 6.6349  # the chi-square that it takes, of one degree of freedom
RELIABILITY_GROUPS: Final = 20
WINDOW_TESTS: Final = 5000  # of the live figures: HR@10 of .25 is known to +-.006

ITEM_KNN: Final = "item_knn"  # the rival that the learner ranks by its own counts

NAMES: Final = ("hr@10", "ndcg@10", "mrr", "recall@20")


class Trace(NamedTuple):
    """What the protocol says of n events, before any model has seen them.

    Items are numbered in the order in which they enter the catalogue, so that the candidates at event k are the
    items below available[k], but for those that its user has consumed.
    """

    kind: Array  # (n,) int8: SCORED, CREATED, REPEAT, LOW or ASIDE
    user: Array  # (n,) int32
    item: Array  # (n,) int32 in the order of entry; -1: about no item
    available: Array  # (n,) int32 items that entered strictly before the event's time
    candidates: Array  # (n,) int32 of them not yet consumed by the user; the target counts
    user_positives: Array  # (n,) int32 positives of the user before
    item_positives: Array  # (n,) int32 positives of the item before
    order: Array  # (items,) int32: item in order of entry -> item as numbered by the caller
    users: int

    def head(self, events: int) -> "Trace":
        """The trace of the first events alone."""
        return Trace(
            self.kind[:events], self.user[:events], self.item[:events], self.available[:events],
            self.candidates[:events], self.user_positives[:events], self.item_positives[:events], self.order,
            self.users,
        )  # fmt: skip


def trace(user: Array, item: Array, ts: Array, low: Array, text: Array, item_ts: Array) -> Trace:
    """Applies the protocol to events in their order.

    user (n,), item (n,; -1: none), ts (n,) Unix s, low (n,) bool, text (n,) bool (a text event); item_ts (items,) Unix
    s: when the item entered, -inf: from the start, +inf: never. Time is the highest ts so far: a late event counts
    as of the newest one.
    """
    n = len(user)
    assert len(item) == len(ts) == len(low) == len(text) == n
    order = np.argsort(item_ts, kind="stable").astype(np.int32)
    place = np.empty(len(order), np.int32)
    place[order] = np.arange(len(order), dtype=np.int32)
    clock = np.maximum.accumulate(ts) if n else ts
    available = np.searchsorted(item_ts[order], clock, side="left").astype(np.int32)
    placed = np.where(item >= 0, place[item] if len(place) else -1, -1).astype(np.int32)
    users = int(user.max()) + 1 if n else 0
    out = Trace(
        np.zeros(n, np.int8), user.astype(np.int32), placed, available, np.zeros(n, np.int32),
        np.zeros(n, np.int32), np.zeros(n, np.int32), order, users,
    )  # fmt: skip
    consumed: list[list[int]] = [[] for _ in range(users)]
    pairs: set[tuple[int, int]] = set()
    of_user = [0] * users
    of_item = [0] * len(order)
    rows = zip(out.user.tolist(), placed.tolist(), low.tolist(), text.tolist(), available.tolist(), strict=True)
    for k, (u, i, is_low, is_text, open_) in enumerate(rows):
        if i < 0:
            out.kind[k] = ASIDE
            continue
        out.user_positives[k] = of_user[u]
        out.item_positives[k] = of_item[i]
        out.candidates[k] = open_ - bisect_left(consumed[u], open_)
        known = (u, i) in pairs
        if not known:
            pairs.add((u, i))
            insort(consumed[u], i)
        if is_low:
            out.kind[k] = LOW
        elif known:
            out.kind[k] = ASIDE if is_text else REPEAT
        else:
            out.kind[k] = SCORED if i < open_ else CREATED
            of_user[u] += 1
            of_item[i] += 1
    return out


TEST: Final = np.dtype(
    [
        ("rank", "<f8"),  # from 1, ties count half
        ("candidates", "<i4"),  # the target among them
        ("user_positives", "<i4"),  # before; UNKNOWN
        ("item_positives", "<i4"),  # before; UNKNOWN
        ("log_loss", "<f8"),  # nan: a rank without probabilities
    ]
)
PARTS_MAX: Final = 256  # updates held before they are joined: the cost of an update stays its own length


class Metrics:
    """One record a test, in order of time; figures are computed from the records when they are asked for."""

    def __init__(self, tests_max: int | None = None) -> None:
        """tests_max: the newest tests that are kept; None: all."""
        self.tests_max = tests_max
        self.tests = 0  # seen, kept or not
        self._parts: list[Array] = []

    @property
    def records(self) -> Array:
        """(n,) TEST, the tests kept, oldest first."""
        joined = np.concatenate(self._parts) if self._parts else np.zeros(0, TEST)
        if self.tests_max is not None and len(joined) > self.tests_max:
            joined = joined[-self.tests_max :].copy()
        self._parts = [joined]
        return joined

    def update(
        self, rank: Array, candidates: Array, *, user_positives: Array | None = None,
        item_positives: Array | None = None, log_loss: Array | None = None,
    ) -> None:  # fmt: skip
        """Takes tests (n,) that come after those taken before. A nan rank is no test and is left out."""
        rows = np.zeros(len(rank), TEST)
        rows["rank"] = rank
        rows["candidates"] = candidates
        rows["user_positives"] = UNKNOWN if user_positives is None else user_positives
        rows["item_positives"] = UNKNOWN if item_positives is None else item_positives
        rows["log_loss"] = np.nan if log_loss is None else log_loss
        self.extend(rows[~np.isnan(rows["rank"])])

    def extend(self, records: Array) -> None:
        """Takes tests (n,) TEST that come after those taken before."""
        assert records.dtype == TEST
        assert (records["rank"] >= 1).all(), "ranks start at 1"
        assert (records["rank"] <= records["candidates"]).all(), "a rank is within its candidates"
        self.tests += len(records)
        self._parts.append(records)
        if len(self._parts) > PARTS_MAX:
            self._parts = [self.records]

    def merge(self, later: "Metrics") -> None:
        """Appends the tests of another accumulator, which come later in time."""
        unkept = later.tests - len(later.records)
        self.extend(later.records)
        self.tests += unkept

    def report(self) -> Report:
        """The METRICS of the public contract; None where a slice has no tests or no probabilities."""
        records = self.records
        out = _figures(records["rank"])
        out["second_half"] = _figures(records["rank"][len(records) // 2 :])
        out["new_user"] = _figures(records["rank"][_is_new(records["user_positives"])])
        out["new_item"] = _figures(records["rank"][_is_new(records["item_positives"])])
        others = records["candidates"] - 1
        below = (records["candidates"] - records["rank"])[others > 0] / others[others > 0]
        out["auc"] = _mean(below)
        out["log_loss"] = _mean(records["log_loss"][~np.isnan(records["log_loss"])])
        return out


def _figures(rank: Array) -> Report:
    hit = rank <= HITS_MAX
    values = (hit, np.where(hit, 1 / np.log2(1 + rank), 0.0), 1 / rank, rank <= RECALL_MAX)
    return {name: _mean(value) for name, value in zip(NAMES, values, strict=True)}


def _is_new(positives: Array) -> Array:
    return (positives >= 0) & (positives < NEW_POSITIVES_MAX)


def _mean(values: Array) -> float | None:
    return float(np.mean(values)) if len(values) else None


def calibration(listed: Array, place: Array) -> Report:
    """Whether the probabilities of the lists are the shares of targets among them.

    listed: (n, k) p of each test's list, nan where it is shorter; place: (n,) the target's in it, -1 where it is not.
    All of them, in order of p, are cut into RELIABILITY_GROUPS groups of one size: the reliability curve. The expected
    calibration error is the mean over the groups of |mean p - share of targets| (Naeini, Cooper, Hauskrecht 2015, with
    groups of equal size). Both are empty where nothing was listed.
    """
    target = np.zeros(listed.shape, np.bool_)
    found = np.flatnonzero(place >= 0)
    target[found, place[found]] = True
    kept = ~np.isnan(listed)
    p, hit = listed[kept].astype(np.float64), target[kept]
    groups = [group for group in np.array_split(np.argsort(p, kind="stable"), RELIABILITY_GROUPS) if len(group)]
    curve = [(float(p[group].mean()), float(hit[group].mean()), len(group)) for group in groups]
    error = sum(n * abs(mean - share) for mean, share, n in curve)
    return {
        "ece@10": error / len(p) if len(p) else None,
        "reliability": [{"p": mean, "observed": share, "listed": n} for mean, share, n in curve],
    }


class McNemar(NamedTuple):
    """Whether two recommenders hit alike: McNemar's test on HR@10 over the same tests, over all of them and over
    sliding windows (Vinagre, Jorge, Gama 2014, "Evaluation of recommender systems in streaming environments")."""

    only_first: int  # tests that the first alone hit
    only_second: int
    p: float  # chi-square with one degree of freedom, of no difference; 1 where neither hit alone
    windows: int  # of MCNEMAR_WINDOW tests, one a test from the window's length on; 0: fewer tests
    better: float | None  # share of the windows where the first is better at MCNEMAR_ALPHA
    worse: float | None


def mcnemar(first: Array, second: Array) -> McNemar:
    """Of ranks (n,) and (n,) of the same tests, in order of time."""
    hit, other = first <= HITS_MAX, second <= HITS_MAX
    only_first, only_second = hit & ~other, other & ~hit
    a, b = np.cumsum(np.append(0, only_first)), np.cumsum(np.append(0, only_second))
    size = MCNEMAR_WINDOW
    in_window = a[size:] - a[:-size], b[size:] - b[:-size]
    total, gain = in_window[0] + in_window[1], in_window[0] - in_window[1]
    significant = gain.astype(np.float64) ** 2 > MCNEMAR_CHI2 * np.maximum(total, 1)
    n, m = int(a[-1]), int(b[-1])
    p = math.erfc(math.sqrt((n - m) ** 2 / (2 * (n + m)))) if n + m else 1.0
    return McNemar(n, m, p, len(gain), _mean(significant & (gain > 0)), _mean(significant & (gain < 0)))


ARMS: Final = ("a", "b")
Z_95: Final = 1.959964  # of a normal, two-sided


def ab(first: Array, second: Array, user: Array, arm: Array) -> Report:
    """Users split into two arms, each shown its own recommender's lists; both recommenders learn from everybody.

    first, second: ranks (n,) of the same tests by the recommenders of arm a and of arm b; user: (n,) numbers; arm: (n,)
    0 or 1, one a user. An arm's figure is the share of its own tests that were hit (HR@10) and their mean gain
    (NDCG@10); its error is that of a ratio over users, who are what was drawn. `paired` has every test by both, which
    an A/B test of people cannot have: no confidence is lost to the split.
    """
    told: Report = {}
    figures: list[dict[str, tuple[float, float]]] = []
    for number, (name, ranks) in enumerate(zip(ARMS, (first, second), strict=True)):
        own = arm == number
        hit = ranks[own] <= HITS_MAX
        values = {"hr@10": hit.astype(np.float64), "ndcg@10": np.where(hit, 1 / np.log2(1 + ranks[own]), 0.0)}
        figures.append({figure: _ratio(value, user[own]) for figure, value in values.items()})
        told[name] = {"users": len(np.unique(user[own])), "tests": int(own.sum())}
        told[name] |= {figure: mean for figure, (mean, _) in figures[-1].items()}
    told["b_minus_a"] = {}
    for figure, (mean, variance) in figures[0].items():
        other, other_variance = figures[1][figure]
        error = math.sqrt(variance + other_variance)
        p = math.erfc(abs(other - mean) / error / math.sqrt(2)) if error > 0 else 1.0
        told["b_minus_a"][figure] = {
            "mean": other - mean, "low": other - mean - Z_95 * error, "high": other - mean + Z_95 * error, "p": p,
        }  # fmt: skip
    told["paired"] = mcnemar(second, first)._asdict()
    return told


def _ratio(values: Array, user: Array) -> tuple[float, float]:
    """Mean of the values and its variance, users drawn whole (linearised ratio; Cochran 1977, 2.11)."""
    if not len(values):
        return float("nan"), float("nan")
    _, number = np.unique(user, return_inverse=True)
    count = np.bincount(number)
    mean = float(values.mean())
    rest = np.bincount(number, values) - mean * count
    return mean, float((rest**2).sum()) / len(values) ** 2


class LiveOutcome(Protocol):
    """What is needed of a message's model.learner.Outcome; n examples, H half-lives."""

    @property
    def rank(self) -> Array: ...  # (n,) nan: not ranked
    @property
    def candidates(self) -> Array: ...  # (n,)
    @property
    def log_loss(self) -> Array: ...  # (n,) nan: not ranked
    @property
    def pop_rank(self) -> Array: ...  # (n, H)
    @property
    def knn_rank(self) -> Array: ...  # (n,) nan: not ranked


class DriftMonitor:
    """Tells when a signal's mean has changed: ADWIN (Bifet, Gavalda 2007), river's.

    One value a message, its mean. Detections are counted and reported; nothing else reacts to them.
    """

    def __init__(self, signal: str = "log_loss", delta: float = 0.002) -> None:
        """signal: its name in the metrics. delta: the chance of a false alarm at a check."""
        self.signal = signal
        self.detections = 0
        self._adwin = ADWIN(delta=delta)

    def update(self, values: Array) -> bool:
        """Takes a message's values (n,; nan: none). Whether the mean has changed just now."""
        values = np.asarray(values, np.float64)
        values = values[~np.isnan(values)]
        if not len(values):
            return False
        self._adwin.update(float(values.mean()))
        detected = bool(self._adwin.drift_detected)
        self.detections += detected
        return detected

    @property
    def mean(self) -> float:
        """Of the signal since it last changed; 0 before the first value."""
        return float(self._adwin.estimation)


class LiveMetrics:
    """The live prequential figures of a worker: the newest tests, the model beside running popularity and item-kNN."""

    def __init__(self, popularities: tuple[str, ...] = (), tests_max: int = WINDOW_TESTS) -> None:
        """popularities: a name for each column of an outcome's `pop_rank`."""
        self.models = {name: Metrics(tests_max=tests_max) for name in ("model", *popularities, ITEM_KNN)}
        self.drift = DriftMonitor()
        self._popularities = popularities

    def observe(self, outcome: LiveOutcome) -> bool:
        """Takes a message's outcome. Whether the log loss has drifted just now."""
        rank = np.asarray(outcome.rank)
        if np.isnan(rank).all():
            return False
        self.models["model"].update(rank, outcome.candidates, log_loss=outcome.log_loss)
        for h, name in enumerate(self._popularities):
            ranks = np.where(np.isnan(rank), np.nan, outcome.pop_rank[:, h])
            self.models[name].update(ranks, outcome.candidates)
        self.models[ITEM_KNN].update(outcome.knn_rank, outcome.candidates)
        return self.drift.update(np.where(np.isnan(rank), np.nan, outcome.log_loss))

    def report(self) -> Report:
        """{name: METRICS} of the window, and what drifted: {"drift": {signal: detections}}."""
        out: Report = {name: metrics.report() for name, metrics in self.models.items()}
        out["drift"] = {self.drift.signal: self.drift.detections}
        return out
