"""What a recommender has to beat, under the very protocol of the model: six that learn event by event, one refitted.

    popularity    positives counted with a half-life, in positives of the whole stream
    last_touched  the item that anybody touched last comes first
    item_knn      streaming item-to-item co-occurrence (Sarwar et al. 2001; Linden et al. 2003; streaming as TencentRec,
                  Huang et al. 2015) with damped popularity, a user history that fades, and popularity as a prior
    isgd          incremental matrix factorisation of positive-only feedback (Vinagre, Jorge, Gama 2014)
    bpr           matrix factorisation by pairwise ranking (Rendle et al. 2009), stepped at every positive against
                  sampled items that the user has not had
    river         reco.Baseline, reco.FunkMF and reco.BiasedMF of the library river (Montiel et al. 2021): y = 1 for a
                  positive, 0 for a low rating and for sampled items that the user has not had
    ease          the linear autoencoder in closed form (Steck 2019), fitted anew every EASE_REFIT events

With the extra `rivals` installed (the library implicit, Frederickson 2017), two more that are fitted anew every
EASE_REFIT positives:

    implicit_als  weighted matrix factorisation (Hu, Koren, Volinsky 2008); a user's factors are solved for at each test
    implicit_bpr  matrix factorisation by pairwise ranking; who was not there at the fit has the items' biases

Each is a small family, and the member that does best *on the very stream* stands for it: a choice in hindsight that
the model is not given. All take a `model.evaluate.Trace` and give a rank for each SCORED event, nan elsewhere.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Final, NamedTuple, TypeAlias

import numba as nb
import numpy as np
import numpy.typing as npt
from river import optim, reco
from scipy.sparse import csr_matrix

from model.evaluate import ASIDE, CREATED, HITS_MAX, LOW, SCORED, Metrics, Trace

try:  # the extra `rivals`
    from implicit.als import AlternatingLeastSquares
    from implicit.bpr import BayesianPersonalizedRanking
except ImportError:
    HAS_IMPLICIT = False
else:
    HAS_IMPLICIT = True

Array = npt.NDArray[Any]

HALF_LIVES_POSITIVES: Final = (1.0, 2.0, 4.0, 7.0, 12.0, 25.0, 70.0, 230.0, 700.0, 2300.0, np.inf)
GROWTH_MAX: Final = 1e100  # counts are kept scaled up by the decay that they have not had yet

KNN_DECAYS: Final = ((0.8, 0.9), (0.65, 0.8))  # per item further back in the history: in scoring, in counting
KNN_WEIGHT_MIN: Final = 0.01  # history items that weigh less are left out
KNN_DAMPINGS: Final = ((0.1, 0.5), (0.25, 0.5), (0.5, 1.0))  # (a, p): C_kj^p / ((c_k + 1)(c_j + 1))^a; last: cosine
KNN_PRIORS: Final = ((0.001, 350.0), (0.1, 23.0), (3.0, 7.0))  # (weight, half-life) of the popularity that is added
KNN_LOW_WEIGHT: Final = 0.5  # of a low rating in the counts

ISGD_DIM: Final = 32
ISGD_RATES: Final = (0.05, 0.1, 0.2)
ISGD_REGULARISATION: Final = 0.01
ISGD_SEED: Final = 0

BPR_DIM: Final = 32
BPR_RATES: Final = (0.05, 0.1)
BPR_NEGATIVES: Final = (1, 10)  # steps a positive, each against one sampled item
BPR_REGULARISATION: Final = 0.01
BPR_SEED: Final = 0

RIVER_DIM: Final = 32
RIVER_RATES: Final = (0.05, 0.1)
RIVER_NEGATIVES: Final = 3  # sampled items a positive
RIVER_GRADIENT_MAX: Final = 1.0  # of the squared loss, 2 (prediction - y): larger steps diverge
RIVER_SEED: Final = 0

EASE_REFIT: Final = 1000  # positives
EASE_ITEMS_MAX: Final = 2000  # with the most positives; a fit costs their number cubed
EASE_REGULARISATION: Final = (50.0, 250.0)

IMPLICIT_DIM: Final = 64
IMPLICIT_ALPHAS: Final = (1.0, 10.0)  # ALS: what a positive weighs more than its absence
IMPLICIT_REGULARISATION: Final = 0.1
IMPLICIT_BPR_RATE: Final = 0.05
IMPLICIT_BPR_PASSES: Final = 30
IMPLICIT_SEED: Final = 0

OPTIONS: Final = {"nogil": True, "cache": True, "error_model": "numpy"}


class Baseline(NamedTuple):
    """The best of a family on a stream."""

    variant: str  # its parameters, in words
    ranks: Array  # (n,) float64, nan where the event is no test
    metrics: Metrics


def popularity(t: Trace) -> dict[str, Array]:
    """Ranks by decayed counts, one array (n,) a half-life."""
    rates = np.exp2(1 / np.array(HALF_LIVES_POSITIVES))
    ranks = _popularity(t.kind, t.item, t.available, _chain(t), len(t.order), rates)
    return {f"half-life {h:g} positives": ranks[:, q] for q, h in enumerate(HALF_LIVES_POSITIVES)}


def last_touched(t: Trace) -> dict[str, Array]:
    """Ranks by the time of the last event about an item: any event, or positives alone."""
    chain = _chain(t)
    return {
        name: _last_touched(t.kind, t.item, t.available, chain, len(t.order), any_event)
        for name, any_event in (("any event", True), ("positives", False))
    }


def item_knn(t: Trace) -> dict[str, Array]:
    """Ranks by co-occurrence with the user's history; the grid is KNN_DECAYS x KNN_DAMPINGS x KNN_PRIORS."""
    chain, items = _chain(t), len(t.order)
    start, other = _pairs(t.kind, t.item, chain, items)
    weights = np.array([weight for weight, _ in KNN_PRIORS])
    rates = np.exp2(1 / np.array([half_life for _, half_life in KNN_PRIORS]))
    out = {}
    for decay, count_decay in KNN_DECAYS:
        for a, p in KNN_DAMPINGS:
            ranks = _item_knn(
                t.kind, t.item, t.available, chain, start, other, items, decay, count_decay, a, p, weights, rates
            )
            for q, (weight, half_life) in enumerate(KNN_PRIORS):
                prior = f"popularity {weight:g} of half-life {half_life:g}"
                name = f"decays {decay:g} and {count_decay:g}, a {a:g}, p {p:g}, {prior}"
                out[name] = ranks[:, q]
    return out


def isgd(t: Trace) -> dict[str, Array]:
    """Ranks by |1 - <p_u, q_j>|, least first; one array a step size."""
    chain, out = _chain(t), {}
    for rate in ISGD_RATES:
        random = np.random.default_rng(ISGD_SEED)
        p = (0.1 * random.standard_normal((t.users, ISGD_DIM))).astype(np.float32)
        q = (0.1 * random.standard_normal((len(t.order), ISGD_DIM))).astype(np.float32)
        out[f"step {rate:g}, {ISGD_DIM} factors"] = _isgd(
            t.kind, t.user, t.item, t.available, chain, p, q, rate, ISGD_REGULARISATION
        )
    return out


def bpr(t: Trace) -> dict[str, Array]:
    """Ranks by <p_u, q_j> + b_j; the grid is BPR_RATES x BPR_NEGATIVES."""
    chain, out = _chain(t), {}
    for rate in BPR_RATES:
        for negatives in BPR_NEGATIVES:
            random = np.random.default_rng(BPR_SEED)
            p = (0.1 * random.standard_normal((t.users, BPR_DIM))).astype(np.float32)
            q = (0.1 * random.standard_normal((len(t.order), BPR_DIM))).astype(np.float32)
            draws = random.random((len(t.kind), negatives))
            out[f"step {rate:g}, {negatives} negatives, {BPR_DIM} factors"] = _bpr(
                t.kind, t.user, t.item, t.available, chain, p, q, draws, rate, BPR_REGULARISATION
            )
    return out


def ease(t: Trace) -> dict[str, Array]:
    """Ranks by x_u B of the last fit: B_ij = -P_ij / P_jj, B_jj = 0, P = (X'X + lambda I)^-1, over the items with the
    most positives so far; the others, and all before the first fit, come last. One array a lambda."""
    positive = (t.kind == SCORED) | (t.kind == CREATED)
    fits = np.flatnonzero(positive)[EASE_REFIT - 1 :: EASE_REFIT] + 1
    bounds = [0, *fits.tolist(), len(t.kind)]
    chain = _chain(t)
    out = {f"lambda {strength:g}": np.full(len(t.kind), np.nan) for strength in EASE_REGULARISATION}
    for first, last in pairwise(bounds):
        taken = np.flatnonzero(positive[:first])
        counts = np.bincount(t.item[taken], minlength=len(t.order))
        kept = np.argsort(-counts, kind="stable")[: min(EASE_ITEMS_MAX, int((counts > 0).sum()))]
        place = np.full(len(t.order), -1, np.int32)
        place[kept] = np.arange(len(kept), dtype=np.int32)
        taken = taken[place[t.item[taken]] >= 0]
        users, rows = np.unique(t.user[taken], return_inverse=True)
        x = csr_matrix((np.ones(len(taken)), (rows, place[t.item[taken]])), (len(users), len(kept)))
        gram = (x.T @ x).toarray()
        for strength, ranks in zip(EASE_REGULARISATION, out.values(), strict=True):
            inverse = np.linalg.inv(gram + strength * np.eye(len(kept)))
            b = (inverse / -np.diag(inverse)).astype(np.float32)
            np.fill_diagonal(b, 0)
            _ease(t.kind, t.item, t.available, chain, first, last, place, b, ranks)
    return out


class _River:
    """One of river's recommenders with its predictions for all items at once: the sum that its predict_one makes."""

    def __init__(self, model: reco.Baseline | reco.FunkMF | reco.BiasedMF, items: int) -> None:
        self.model = model
        self.bias = np.zeros(items)  # stays 0 where the model has none
        self.latent = np.zeros((items, 0))
        if not isinstance(model, reco.Baseline):
            self.latent = np.array([model.i_latents[j] for j in range(items)]).reshape(items, RIVER_DIM)

    def learn(self, user: int, item: int, y: float) -> None:
        self.model.learn_one(user, item, y)
        if not isinstance(self.model, reco.FunkMF):
            self.bias[item] = self.model.i_biases[item]
        if not isinstance(self.model, reco.Baseline):
            self.latent[item] = self.model.i_latents[item]

    def scores(self, user: int, items: int) -> Array:
        """(items,) predictions for the first items, up to what all items of the user share."""
        score = self.bias[:items].copy()
        if not isinstance(self.model, reco.Baseline):
            score += self.latent[:items] @ self.model.u_latents[user]
        return score


def river(t: Trace) -> dict[str, Array]:
    """Ranks by river's own models, each learning by its own learn_one; one array a model and step size."""
    out = {}
    for rate in RIVER_RATES:
        step, more = optim.SGD(rate), {"clip_gradient": RIVER_GRADIENT_MAX, "seed": RIVER_SEED}
        models = (
            reco.Baseline(step, **more), reco.FunkMF(RIVER_DIM, step, **more),
            reco.BiasedMF(RIVER_DIM, step, step, **more),
        )  # fmt: skip
        for model in models:
            name = f"reco.{type(model).__name__}, step {rate:g}, {RIVER_NEGATIVES} negatives"
            out[name] = _river(t, _River(model, len(t.order)))
    return out


def _river(t: Trace, model: _River) -> Array:
    ranks = np.full(len(t.kind), np.nan)
    consumed: list[set[int]] = [set() for _ in range(t.users)]
    draws = np.random.default_rng(RIVER_SEED).random((len(t.kind), RIVER_NEGATIVES))
    events = zip(t.kind.tolist(), t.user.tolist(), t.item.tolist(), t.available.tolist(), strict=True)
    for k, (kind, user, item, available) in enumerate(events):
        if kind not in (SCORED, CREATED, LOW):
            continue
        had = consumed[user]
        if kind == SCORED:
            score = model.scores(user, available)
            own = score[item]
            mine = score[[j for j in had if j < available]]
            greater = int((score > own).sum()) - int((mine > own).sum())
            ties = int((score == own).sum()) - int((mine == own).sum()) - 1
            ranks[k] = 1 + greater + 0.5 * ties
        had.add(item)
        model.learn(user, item, 0.0 if kind == LOW else 1.0)
        if kind != LOW and available:
            for rival in (draws[k] * available).astype(int).tolist():
                if rival not in had:
                    model.learn(user, rival, 0.0)
    return ranks


def implicit_als(t: Trace) -> dict[str, Array]:
    """Ranks by <p_u, q_j>, p_u solved for the user's positives so far; one array an alpha."""
    return {
        f"alpha {alpha:g}, {IMPLICIT_DIM} factors": _refitted(t, _als(alpha)) for alpha in IMPLICIT_ALPHAS
    }  # fmt: skip


def implicit_bpr(t: Trace) -> dict[str, Array]:
    """Ranks by <p_u, q_j> + b_j of the last fit."""
    return {f"step {IMPLICIT_BPR_RATE:g}, {IMPLICIT_BPR_PASSES} passes": _refitted(t, _fit_bpr)}


# (what users had: users x items, row of each test's user in it or -1, what the tests' users have: tests x items)
# -> what is ranked by, (tests, items)
Fit: TypeAlias = Callable[[csr_matrix, Array, csr_matrix], Array]


def _als(alpha: float) -> Fit:
    def fit(had: csr_matrix, rows: Array, has: csr_matrix) -> Array:
        model = AlternatingLeastSquares(
            IMPLICIT_DIM, IMPLICIT_REGULARISATION, alpha, num_threads=1, random_state=IMPLICIT_SEED
        )
        model.fit(had, show_progress=False)
        return np.asarray(model.recalculate_user(np.arange(len(rows)), has) @ model.item_factors.T)

    return fit


def _fit_bpr(had: csr_matrix, rows: Array, has: csr_matrix) -> Array:
    model = BayesianPersonalizedRanking(
        IMPLICIT_DIM, IMPLICIT_BPR_RATE, iterations=IMPLICIT_BPR_PASSES, num_threads=1, random_state=IMPLICIT_SEED
    )
    model.fit(had, show_progress=False)
    stranger = np.zeros(IMPLICIT_DIM + 1, np.float32)
    stranger[-1] = 1  # the last factor of an item is its bias
    users = np.where((rows >= 0)[:, None], model.user_factors[rows], stranger)
    return np.asarray(users @ model.item_factors.T)


def _refitted(t: Trace, fit: Fit) -> Array:
    """Ranks by the scores of a fit on all that was positive before every EASE_REFIT-th positive; items that had none
    come last."""
    positive = (t.kind == SCORED) | (t.kind == CREATED)
    fits = np.flatnonzero(positive)[EASE_REFIT - 1 :: EASE_REFIT] + 1
    chain, ranks = _chain(t), np.full(len(t.kind), np.nan)
    nothing = np.zeros((0, len(t.order)), np.float32)
    for first, last in pairwise([0, *fits.tolist(), len(t.kind)]):
        tests = first + np.flatnonzero(t.kind[first:last] == SCORED)
        taken = np.flatnonzero(positive[:first])
        scores = nothing
        if len(taken) and len(tests):
            users, at = np.unique(t.user[taken], return_inverse=True)
            had = csr_matrix((np.ones(len(taken), np.float32), (at, t.item[taken])), (len(users), len(t.order)))
            row = np.minimum(np.searchsorted(users, t.user[tests]), len(users) - 1)
            rows = np.where(users[row] == t.user[tests], row, -1)
            entries = [(n, k) for n, test in enumerate(tests.tolist()) for k in _positives(t.kind, chain, test)]
            which, events = np.array(entries, np.int64).reshape(-1, 2).T
            has = csr_matrix((np.ones(len(which), np.float32), (which, t.item[events])), (len(tests), len(t.order)))
            scores = fit(had, rows, has).astype(np.float32)
            scores[:, np.asarray(had.sum(axis=0)).ravel() == 0] = -1e30
        _rank_scores(t.item, t.available, chain, tests, scores, ranks)
    return ranks


def _positives(kind: Array, chain: Array, test: int) -> list[int]:
    """The events before a test by which its user had a positive."""
    found, k = [], int(chain[test])
    while k >= 0:
        if kind[k] != LOW:
            found.append(k)
        k = int(chain[k])
    return found


BASELINES: Final[dict[str, Callable[[Trace], dict[str, Array]]]] = {
    "popularity": popularity,
    "last_touched": last_touched,
    "item_knn": item_knn,
    "isgd": isgd,
    "bpr": bpr,
    "river": river,
    "ease": ease,
    **({"implicit_als": implicit_als, "implicit_bpr": implicit_bpr} if HAS_IMPLICIT else {}),
}


def run(name: str, t: Trace) -> Baseline:
    """Runs a family over the stream and gives its member of the highest HR@10.

    Raises ValueError for a name that is not in BASELINES.
    """
    if name not in BASELINES:
        raise ValueError(f"no baseline {name!r}; there are {', '.join(BASELINES)}")
    grid = BASELINES[name](t)
    scored = t.kind == SCORED
    variant = max(grid, key=lambda v: int((grid[v][scored] <= HITS_MAX).sum()))
    metrics = Metrics()
    metrics.update(grid[variant], t.candidates, user_positives=t.user_positives, item_positives=t.item_positives)
    return Baseline(variant, grid[variant], metrics)


@nb.njit(**OPTIONS)
def _chain_of(kind, user, users):  # type: ignore[no-untyped-def]
    """(n,): the event before by which the same user consumed something, -1 none."""
    newest = np.full(users, -1, np.int64)
    before = np.empty(len(kind), np.int64)
    for k in range(len(kind)):
        before[k] = newest[user[k]]
        if kind[k] == SCORED or kind[k] == CREATED or kind[k] == LOW:
            newest[user[k]] = k
    return before


def _chain(t: Trace) -> Array:
    before: Array = _chain_of(t.kind, t.user, t.users)
    return before


@nb.njit(**OPTIONS)
def _mark(skip, item, chain, k, value):  # type: ignore[no-untyped-def]
    """Marks what the user of event k had consumed before it."""
    e = chain[k]
    while e >= 0:
        skip[item[e]] = value
        e = chain[e]


@nb.njit(**OPTIONS)
def _rank_of(score, open_, target, skip):  # type: ignore[no-untyped-def]
    """1 + #greater + ties / 2 among the items below `open_` that are not skipped."""
    greater = 0
    ties = 0
    own = score[target]
    for j in range(open_):
        if skip[j] == 0 and j != target:
            greater += score[j] > own
            ties += score[j] == own
    return 1 + greater + 0.5 * ties


@nb.njit(**OPTIONS)
def _popularity(kind, item, available, chain, items, rates):  # type: ignore[no-untyped-def]
    n = len(kind)
    ranks = np.full((n, len(rates)), np.nan)
    skip = np.zeros(items, np.uint8)
    count = np.zeros((len(rates), items))
    growth = np.ones(len(rates))
    for k in range(n):
        if kind[k] == SCORED:
            _mark(skip, item, chain, k, 1)
            for h in range(len(rates)):
                ranks[k, h] = _rank_of(count[h], available[k], item[k], skip)
            _mark(skip, item, chain, k, 0)
        if kind[k] == SCORED or kind[k] == CREATED:
            for h in range(len(rates)):
                growth[h] *= rates[h]
                count[h, item[k]] += growth[h]
                if growth[h] > GROWTH_MAX:
                    count[h] /= growth[h]
                    growth[h] = 1.0
    return ranks


@nb.njit(**OPTIONS)
def _last_touched(kind, item, available, chain, items, any_event):  # type: ignore[no-untyped-def]
    n = len(kind)
    ranks = np.full(n, np.nan)
    skip = np.zeros(items, np.uint8)
    touched = np.full(items, -1, np.int64)
    for k in range(n):
        if item[k] < 0:
            continue
        if kind[k] == SCORED:
            _mark(skip, item, chain, k, 1)
            ranks[k] = _rank_of(touched, available[k], item[k], skip)
            _mark(skip, item, chain, k, 0)
        if any_event or kind[k] == SCORED or kind[k] == CREATED:
            touched[item[k]] = k
    return ranks


@nb.njit(**OPTIONS)
def _pair_keys(kind, item, chain, first, last, items, reach, out):  # type: ignore[no-untyped-def]
    """Both directions of every pair that the events first..last count, as row * items + column."""
    used = 0
    for k in range(first, last):
        if kind[k] != SCORED and kind[k] != CREATED and kind[k] != LOW:
            continue
        e = chain[k]
        q = 0
        while e >= 0 and q < reach:
            out[used] = np.int64(item[e]) * items + item[k]
            out[used + 1] = np.int64(item[k]) * items + item[e]
            used += 2
            q += 1
            e = chain[e]
    return used


def _reach() -> int:
    """History items that weigh at least KNN_WEIGHT_MIN, at the slowest decay of the grid."""
    return int(np.log(KNN_WEIGHT_MIN) / np.log(max(decay for _, decay in KNN_DECAYS))) + 1


def _pairs(kind: Array, item: Array, chain: Array, items: int, block_events: int = 50_000) -> tuple[Array, Array]:
    """Room for the pairs that the stream will count: row starts (items + 1,), and columns, sorted in each row.

    A layout in memory alone: a pair that has not happened yet weighs 0.
    """
    out = np.empty(block_events * _reach() * 2, np.int64)
    keys = np.zeros(0, np.int64)
    for first in range(0, len(kind), block_events):
        last = min(len(kind), first + block_events)
        used = _pair_keys(kind, item, chain, first, last, items, _reach(), out)
        keys = np.union1d(keys, out[:used])
    start = np.searchsorted(keys, np.arange(items + 1) * items).astype(np.int64)
    return start, (keys % max(items, 1)).astype(np.int32)


@nb.njit(**OPTIONS)
def _add_pair(start, other, weight, power, a, b, more, p):  # type: ignore[no-untyped-def]
    low = start[a]
    high = start[a + 1]
    while low < high:
        middle = (low + high) >> 1
        if other[middle] < b:
            low = middle + 1
        else:
            high = middle
    weight[low] += more
    power[low] = weight[low] ** np.float32(p)


@nb.njit(**OPTIONS)
def _knn_scores(k, item, chain, start, other, power, damping, decay, score):  # type: ignore[no-untyped-def]
    """score_j += sum over the history of decay^q C_hj^p / (c_h + 1)^a."""
    e = chain[k]
    w = 1.0
    while e >= 0 and w >= KNN_WEIGHT_MIN:
        h = item[e]
        x = np.float32(w * damping[h])
        for r in range(start[h], start[h + 1]):
            score[other[r]] += x * power[r]
        w *= decay
        e = chain[e]


@nb.njit(**OPTIONS)
def _item_knn(  # type: ignore[no-untyped-def]
    kind, item, available, chain, start, other, items, decay, count_decay, a, p, prior_weights, prior_rates
):
    n = len(kind)
    priors = len(prior_rates)
    ranks = np.full((n, priors), np.nan)
    skip = np.zeros(items, np.uint8)
    weight = np.zeros(len(other), np.float32)  # C_kj
    power = np.zeros(len(other), np.float32)  # C_kj^p
    count = np.zeros(items, np.float32)  # c_j
    damping = np.ones(items, np.float32)  # (c_j + 1)^-a
    score = np.zeros(items, np.float32)
    mixed = np.zeros(items, np.float32)
    prior = np.zeros((priors, items))
    growth = np.ones(priors)
    for k in range(n):
        if kind[k] == SCORED:
            open_ = available[k]
            score[:] = 0
            _knn_scores(k, item, chain, start, other, power, damping, decay, score)
            _mark(skip, item, chain, k, 1)
            for h in range(priors):
                scale = prior_weights[h] / growth[h]
                for j in range(open_):
                    mixed[j] = score[j] * damping[j] + np.float32(scale * prior[h, j])
                ranks[k, h] = _rank_of(mixed, open_, item[k], skip)
            _mark(skip, item, chain, k, 0)
        positive = kind[k] == SCORED or kind[k] == CREATED
        if positive or kind[k] == LOW:
            w = 1.0 if positive else KNN_LOW_WEIGHT
            e = chain[k]
            while e >= 0 and w >= KNN_WEIGHT_MIN:
                _add_pair(start, other, weight, power, item[e], item[k], np.float32(w), p)
                if item[e] != item[k]:
                    _add_pair(start, other, weight, power, item[k], item[e], np.float32(w), p)
                w *= count_decay
                e = chain[e]
            count[item[k]] += 1
            damping[item[k]] = np.float32(1) / (count[item[k]] + np.float32(1)) ** np.float32(a)
        if positive:
            for h in range(priors):
                growth[h] *= prior_rates[h]
                prior[h, item[k]] += growth[h]
                if growth[h] > GROWTH_MAX:
                    prior[h] /= growth[h]
                    growth[h] = 1.0
    return ranks


@nb.njit(fastmath=True, **OPTIONS)
def _isgd(kind, user, item, available, chain, p, q, rate, regularisation):  # type: ignore[no-untyped-def]
    """e = 1 - <p_u, q_i>; p_u += rate (e q_i - lambda p_u), then q_i += rate (e p_u - lambda q_i)."""
    n = len(kind)
    ranks = np.full(n, np.nan)
    skip = np.zeros(len(q), np.uint8)
    score = np.zeros(len(q), np.float32)
    rate = np.float32(rate)
    regularisation = np.float32(regularisation)
    for k in range(n):
        i = item[k]
        if kind[k] == SCORED:
            p_u = p[user[k]]
            for j in range(available[k]):
                x = np.float32(0)
                for d in range(p.shape[1]):
                    x += q[j, d] * p_u[d]
                score[j] = -abs(np.float32(1) - x)
            _mark(skip, item, chain, k, 1)
            ranks[k] = _rank_of(score, available[k], i, skip)
            _mark(skip, item, chain, k, 0)
        if kind[k] == SCORED or kind[k] == CREATED:
            p_u = p[user[k]]
            x = np.float32(0)
            for d in range(p.shape[1]):
                x += q[i, d] * p_u[d]
            error = np.float32(1) - x
            for d in range(p.shape[1]):
                before = p_u[d]
                p_u[d] += rate * (error * q[i, d] - regularisation * before)
                q[i, d] += rate * (error * before - regularisation * q[i, d])
    return ranks


@nb.njit(fastmath=True, **OPTIONS)
def _bpr(kind, user, item, available, chain, p, q, draws, rate, regularisation):  # type: ignore[no-untyped-def]
    """Steps on ln sigmoid(x_ui - x_uj), x_ui = <p_u, q_i> + b_i, j uniform among the items that u has not had."""
    n = len(kind)
    ranks = np.full(n, np.nan)
    skip = np.zeros(len(q), np.uint8)
    score = np.zeros(len(q), np.float32)
    bias = np.zeros(len(q), np.float32)
    rate = np.float32(rate)
    regularisation = np.float32(regularisation)
    for k in range(n):
        if kind[k] != SCORED and kind[k] != CREATED:
            continue
        i = item[k]
        p_u = p[user[k]]
        _mark(skip, item, chain, k, 1)
        if kind[k] == SCORED:
            for j in range(available[k]):
                x = bias[j]
                for d in range(p.shape[1]):
                    x += q[j, d] * p_u[d]
                score[j] = x
            ranks[k] = _rank_of(score, available[k], i, skip)
        for draw in draws[k]:
            rival = np.int64(draw * available[k])
            if available[k] == 0 or rival == i or skip[rival]:
                continue
            x = bias[i] - bias[rival]
            for d in range(p.shape[1]):
                x += p_u[d] * (q[i, d] - q[rival, d])
            g = np.float32(1) / (np.float32(1) + np.exp(x))
            bias[i] += rate * (g - regularisation * bias[i])
            bias[rival] -= rate * (g + regularisation * bias[rival])
            for d in range(p.shape[1]):
                before = p_u[d]
                p_u[d] += rate * (g * (q[i, d] - q[rival, d]) - regularisation * before)
                q[i, d] += rate * (g * before - regularisation * q[i, d])
                q[rival, d] -= rate * (g * before + regularisation * q[rival, d])
        _mark(skip, item, chain, k, 0)
    return ranks


@nb.njit(**OPTIONS)
def _ease(kind, item, available, chain, first, last, place, b, ranks):  # type: ignore[no-untyped-def]
    """Ranks of the tests first..last; place: item -> row of b, -1: not in it."""
    skip = np.zeros(len(place), np.uint8)
    score = np.zeros(len(place), np.float32)
    total = np.zeros(len(b), np.float32)
    for k in range(first, last):
        if kind[k] != SCORED:
            continue
        total[:] = 0
        e = chain[k]
        while e >= 0:
            if place[item[e]] >= 0 and kind[e] != LOW:
                total += b[place[item[e]]]
            e = chain[e]
        for j in range(available[k]):
            score[j] = total[place[j]] if place[j] >= 0 else np.float32(-1e30)
        _mark(skip, item, chain, k, 1)
        ranks[k] = _rank_of(score, available[k], item[k], skip)
        _mark(skip, item, chain, k, 0)


@nb.njit(**OPTIONS)
def _rank_scores(item, available, chain, tests, scores, ranks):  # type: ignore[no-untyped-def]
    """Ranks of the tests by their rows of scores (tests, items); all alike where there are none."""
    skip = np.zeros(scores.shape[1], np.uint8)
    alike = np.zeros(scores.shape[1], np.float32)
    for n in range(len(tests)):
        k = tests[n]
        _mark(skip, item, chain, k, 1)
        ranks[k] = _rank_of(scores[n] if len(scores) else alike, available[k], item[k], skip)
        _mark(skip, item, chain, k, 0)


assert ASIDE > LOW, "events aside are no baseline's business"
