"""The baselines against plain re-implementations, and on streams where each of them has to shine."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from river import optim, reco

from model import baselines
from model.evaluate import CREATED, LOW, SCORED, Trace, trace

Array = npt.NDArray[Any]
ITEMS = 30
USERS = 12


@pytest.fixture(scope="module")
def laid() -> Trace:
    """A random stream with repeats, low ratings and items that enter late."""
    random = np.random.default_rng(4)
    n = 600
    item_ts = np.where(np.arange(ITEMS) % 3 == 0, np.arange(ITEMS) * 10.0, -np.inf)
    user, item = random.integers(0, USERS, n), random.integers(0, ITEMS, n)
    low, text = random.random(n) < 0.15, random.random(n) < 0.1
    item[random.random(n) < 0.05] = -1
    return trace(user, item, np.arange(n) / 1.5, low & ~text & (item >= 0), text, item_ts)


def mid_rank(score: Array, candidates: list[int], target: int) -> float:
    own = float(score[target])
    others = [j for j in candidates if j != target]
    return float(1 + sum(score[j] > own for j in others) + sum(score[j] == own for j in others) / 2)


def replay(laid: Trace, score: Callable[[int, list[int]], Array], learn: Callable[[int, list[int]], None]) -> Array:
    """Ranks by `score(event, history)`; `learn(event, history)` follows each event. Histories: newest first."""
    ranks = np.full(len(laid.kind), np.nan)
    histories: dict[int, list[int]] = {}
    for k in range(len(laid.kind)):
        history = histories.setdefault(int(laid.user[k]), [])
        target = int(laid.item[k])
        if laid.kind[k] == SCORED:
            candidates = [j for j in range(laid.available[k]) if j not in history]
            assert len(candidates) == laid.candidates[k]
            ranks[k] = mid_rank(score(k, history), candidates, target)
        learn(k, history)
        if laid.kind[k] in (SCORED, CREATED, LOW):
            history.insert(0, target)
    return ranks


def is_positive(laid: Trace, k: int) -> bool:
    return bool(laid.kind[k] in (SCORED, CREATED))


def test_popularity_counts_with_half_lives(laid: Trace) -> None:
    ranks = baselines.popularity(laid)
    assert len(ranks) == len(baselines.HALF_LIVES_POSITIVES)
    for half_life in (4.0, 70.0, np.inf):
        count = np.zeros(ITEMS)
        decay = 0.5 ** (1 / half_life)

        def learn(k: int, history: list[int], count: Array = count, decay: float = decay) -> None:
            if is_positive(laid, k):
                count *= decay
                count[laid.item[k]] += 1

        expected = replay(laid, lambda k, history, count=count: count, learn)  # type: ignore[misc]
        np.testing.assert_array_equal(ranks[f"half-life {half_life:g} positives"], expected)


def test_last_touched_puts_the_newest_event_first(laid: Trace) -> None:
    for name, any_event in (("any event", True), ("positives", False)):
        touched = np.full(ITEMS, -1)

        def learn(k: int, history: list[int], touched: Array = touched, any_event: bool = any_event) -> None:
            if laid.item[k] >= 0 and (any_event or is_positive(laid, k)):
                touched[laid.item[k]] = k

        expected = replay(laid, lambda k, history, touched=touched: touched, learn)  # type: ignore[misc]
        np.testing.assert_array_equal(baselines.last_touched(laid)[name], expected)


@pytest.mark.parametrize(("decay", "count_decay"), baselines.KNN_DECAYS)
@pytest.mark.parametrize(("a", "p"), baselines.KNN_DAMPINGS)
def test_item_knn_equals_a_dense_one(laid: Trace, decay: float, count_decay: float, a: float, p: float) -> None:
    together, seen, popular = np.zeros((ITEMS, ITEMS)), np.zeros(ITEMS), np.zeros(ITEMS)
    weight, half_life = baselines.KNN_PRIORS[0]

    def weights(history: list[int], first: float, rate: float) -> list[tuple[int, float]]:
        pairs = []
        for h in history:
            if first < baselines.KNN_WEIGHT_MIN:
                break
            pairs.append((h, first))
            first *= rate
        return pairs

    def score(k: int, history: list[int]) -> Array:
        total = np.zeros(ITEMS)
        for h, w in weights(history, 1.0, decay):
            total += w * together[h] ** p / (seen[h] + 1) ** a
        return np.asarray(total / (seen + 1) ** a + weight * popular)

    def learn(k: int, history: list[int]) -> None:
        i = int(laid.item[k])
        if not is_positive(laid, k) and laid.kind[k] != LOW:
            return
        for h, w in weights(history, 1.0 if is_positive(laid, k) else baselines.KNN_LOW_WEIGHT, count_decay):
            together[h, i] += w
            if h != i:
                together[i, h] += w
        seen[i] += 1
        if is_positive(laid, k):
            popular[:] *= 0.5 ** (1 / half_life)
            popular[i] += 1

    expected = replay(laid, score, learn)
    prior = f"popularity {weight:g} of half-life {half_life:g}"
    got = baselines.item_knn(laid)[f"decays {decay:g} and {count_decay:g}, a {a:g}, p {p:g}, {prior}"]
    scored = laid.kind == SCORED
    assert (np.isnan(got) == ~scored).all()
    assert np.mean(np.abs(got[scored] - expected[scored]) <= 0.5) > 0.98, "float32 may break a tie"


def test_isgd_equals_its_formulas(laid: Trace) -> None:
    rate = baselines.ISGD_RATES[0]
    random = np.random.default_rng(baselines.ISGD_SEED)
    p = 0.1 * random.standard_normal((laid.users, baselines.ISGD_DIM))
    q = 0.1 * random.standard_normal((ITEMS, baselines.ISGD_DIM))

    def learn(k: int, history: list[int]) -> None:
        if is_positive(laid, k):
            u, i = int(laid.user[k]), int(laid.item[k])
            error = 1 - p[u] @ q[i]
            before = p[u].copy()
            p[u] += rate * (error * q[i] - baselines.ISGD_REGULARISATION * p[u])
            q[i] += rate * (error * before - baselines.ISGD_REGULARISATION * q[i])

    expected = replay(laid, lambda k, history: -np.abs(1 - q @ p[int(laid.user[k])]), learn)
    got = baselines.isgd(laid)[f"step {rate:g}, {baselines.ISGD_DIM} factors"]
    scored = laid.kind == SCORED
    assert np.mean(got[scored] == expected[scored]) > 0.98


def test_bpr_equals_its_formulas(laid: Trace) -> None:
    rate, negatives = baselines.BPR_RATES[1], baselines.BPR_NEGATIVES[0]
    random = np.random.default_rng(baselines.BPR_SEED)
    p = 0.1 * random.standard_normal((laid.users, baselines.BPR_DIM))
    q = 0.1 * random.standard_normal((ITEMS, baselines.BPR_DIM))
    draws, bias, r = random.random(len(laid.kind)), np.zeros(ITEMS), baselines.BPR_REGULARISATION

    def learn(k: int, history: list[int]) -> None:
        u, i, j = int(laid.user[k]), int(laid.item[k]), int(draws[k] * laid.available[k])
        if not is_positive(laid, k) or laid.available[k] == 0 or j == i or j in history:
            return
        before, apart = p[u].copy(), q[i] - q[j]
        g = 1 / (1 + np.exp(bias[i] - bias[j] + before @ apart))
        p[u] += rate * (g * apart - r * before)
        q[i] += rate * (g * before - r * q[i])
        q[j] -= rate * (g * before + r * q[j])
        bias[i] += rate * (g - r * bias[i])
        bias[j] -= rate * (g + r * bias[j])

    expected = replay(laid, lambda k, history: q @ p[int(laid.user[k])] + bias, learn)
    got = baselines.bpr(laid)[f"step {rate:g}, {negatives} negatives, {baselines.BPR_DIM} factors"]
    scored = laid.kind == SCORED
    assert np.mean(got[scored] == expected[scored]) > 0.97


def test_river_ranks_by_its_own_predictions(laid: Trace) -> None:
    grid = baselines.river(laid)
    assert len(grid) == 3 * len(baselines.RIVER_RATES)
    rate = baselines.RIVER_RATES[0]
    step, more = optim.SGD(rate), {"clip_gradient": baselines.RIVER_GRADIENT_MAX, "seed": baselines.RIVER_SEED}
    model = reco.BiasedMF(baselines.RIVER_DIM, step, step, **more)
    for j in range(ITEMS):
        model.i_latents[j]  # an item's factors are drawn when it is first met
    draws = np.random.default_rng(baselines.RIVER_SEED).random((len(laid.kind), baselines.RIVER_NEGATIVES))

    def score(k: int, history: list[int]) -> Array:
        return np.array([model.predict_one(int(laid.user[k]), j) for j in range(ITEMS)])

    def learn(k: int, history: list[int]) -> None:
        user, item = int(laid.user[k]), int(laid.item[k])
        if laid.kind[k] == LOW:
            model.learn_one(user, item, 0.0)
        if is_positive(laid, k):
            model.learn_one(user, item, 1.0)
            for rival in (draws[k] * laid.available[k]).astype(int).tolist():
                if rival != item and rival not in history:
                    model.learn_one(user, rival, 0.0)

    expected = replay(laid, score, learn)
    name = f"reco.BiasedMF, step {rate:g}, {baselines.RIVER_NEGATIVES} negatives"
    np.testing.assert_array_equal(grid[name], expected)


def test_ease_is_the_closed_form_of_all_that_came_before_its_last_fit(
    laid: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "EASE_REFIT", 50)
    strength = baselines.EASE_REGULARISATION[0]
    x, b, taken = np.zeros((laid.users, ITEMS)), np.zeros((ITEMS, ITEMS)), [0]
    known = np.zeros(ITEMS, np.bool_)
    liked: dict[int, list[int]] = {}

    def score(k: int, history: list[int]) -> Array:
        total = b[liked.get(int(laid.user[k]), [])].sum(axis=0)
        return np.where(known, total, -1e30)

    def learn(k: int, history: list[int]) -> None:
        if not is_positive(laid, k):
            return
        u, i = int(laid.user[k]), int(laid.item[k])
        x[u, i] = 1
        liked.setdefault(u, []).append(i)
        taken[0] += 1
        if taken[0] % 50 == 0:
            inverse = np.linalg.inv(x.T @ x + strength * np.eye(ITEMS))
            b[:] = -inverse / np.diag(inverse)
            b[np.arange(ITEMS), np.arange(ITEMS)] = 0
            known[:] = x.any(axis=0)

    expected = replay(laid, score, learn)
    got = baselines.ease(laid)[f"lambda {strength:g}"]
    scored = laid.kind == SCORED
    assert taken[0] > 150
    assert np.mean(np.abs(got[scored] - expected[scored]) <= 0.5) > 0.98


def plain(user: list[int], item: list[int], items: int) -> Trace:
    n = len(user)
    nothing = np.zeros(n, np.bool_)
    return trace(np.array(user), np.array(item), np.arange(n, dtype=float), nothing, nothing, np.full(items, -np.inf))


@pytest.mark.parametrize("name", ["implicit_als", "implicit_bpr"])
def test_implicit_is_fitted_on_what_came_before_alone(
    laid: Trace, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(baselines, "EASE_REFIT", 100)
    whole = baselines.BASELINES[name](laid)
    again = baselines.BASELINES[name](laid)
    start = baselines.BASELINES[name](laid.head(450))
    scored = laid.kind == SCORED
    for variant, ranks in whole.items():
        assert np.array_equal(ranks, again[variant], equal_nan=True)
        assert np.array_equal(ranks[:450], start[variant], equal_nan=True), "what comes later changes no rank"
        assert (ranks[scored] >= 1).all() and (ranks[scored] <= laid.candidates[scored]).all()
        first = np.flatnonzero(scored)[0]
        assert ranks[first] == (1 + laid.candidates[first]) / 2, "before the first fit: what chance does"
    random = np.random.default_rng(1)
    user = random.integers(0, 60, 3000)
    item = random.integers(0, 20, 3000) + user % 2 * 20
    report = baselines.run(name, plain(user.tolist(), item.tolist(), 40)).metrics.report()
    assert report["auc"] > 0.7, "two tastes that share no item"


def test_scores_that_know_nothing_earn_what_chance_does() -> None:
    ranks = baselines.popularity(plain([0], [3], 9))["half-life inf positives"]
    assert ranks.tolist() == [5.0]


def test_popularity_follows_a_trend_with_a_short_half_life() -> None:
    """Waves: all users click the item of the hour."""
    user = list(range(40)) * 30
    item = [wave for wave in range(30) for _ in range(40)]
    best = baselines.run("popularity", plain(user, item, 400))
    assert best.variant in {f"half-life {h:g} positives" for h in baselines.HALF_LIVES_POSITIVES[:5]}
    assert best.metrics.report()["hr@10"] > 0.9


def test_item_knn_finds_what_goes_together_and_popularity_does_not() -> None:
    """Each user walks through one of 40 groups of 6 items, in any order."""
    random = np.random.default_rng(0)
    user, item = [], []
    for u in range(400):
        for j in random.permutation(6):
            user.append(u)
            item.append(int(u % 40 * 6 + j))
    laid = plain(user, item, 240)
    reports = {name: baselines.run(name, laid).metrics.report() for name in ("item_knn", "popularity", "isgd")}
    assert reports["item_knn"]["hr@10"] > 0.7
    assert reports["item_knn"]["hr@10"] > reports["popularity"]["hr@10"] + 0.3
    assert reports["item_knn"]["auc"] > reports["isgd"]["auc"]


def test_isgd_learns_tastes_better_than_chance() -> None:
    random = np.random.default_rng(1)
    user = random.integers(0, 60, 6000)
    item = random.integers(0, 50, 6000) + user % 2 * 50
    report = baselines.run("isgd", plain(user.tolist(), item.tolist(), 100)).metrics.report()
    assert report["second_half"]["mrr"] > report["mrr"]
    assert report["auc"] > 0.55


def test_unknown_baseline_is_an_error_that_names_the_known() -> None:
    with pytest.raises(ValueError, match="popularity, last_touched, item_knn, isgd, bpr, river, ease"):
        baselines.run("oracle", plain([0], [0], 1))
