"""The prequential protocol, its metrics, and evaluation of a recorded stream by the workers' own code."""

import gzip
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from river import metrics as river_metrics
from scipy.stats import chi2

from model.adapter import Adapter
from model.evaluate import (
    ASIDE,
    CREATED,
    LOW,
    MCNEMAR_ALPHA,
    MCNEMAR_CHI2,
    RELIABILITY_GROUPS,
    REPEAT,
    SCORED,
    UNKNOWN,
    DriftMonitor,
    LiveMetrics,
    Metrics,
    Trace,
    ab,
    calibration,
    mcnemar,
    trace,
)
from model.learner import LearnerConfig
from streams import evaluate as tool
from streams.evaluate import EvaluateOptions, StreamError, evaluate, parse_baselines
from streams.pipeline import EvidenceConfig
from streams.vectors import VectorCache

TEXT_DIM = 16
CONFIG = LearnerConfig(dim=8, text_dim=TEXT_DIM, negatives=16, neighbours_max=16)
EVIDENCE = EvidenceConfig()
NOBODY = -np.inf  # an item that is there from the start


class FakeEncoder:
    """A unit vector by the digest of the text; counts what it is asked for."""

    dim = TEXT_DIM
    name = "fake"

    def __init__(self) -> None:
        self.texts = 0

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        self.texts += len(texts)
        seeds = [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") for text in texts]
        vectors = np.array([np.random.default_rng(seed).standard_normal(self.dim) for seed in seeds], np.float32)
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)

    def project(self, vector: Any) -> npt.NDArray[np.float32]:
        unit: npt.NDArray[np.float32] = np.resize(np.asarray(vector, np.float32), self.dim)
        return unit / np.float32(np.linalg.norm(unit))

    def combine(
        self, text_vector: npt.NDArray[np.float32], plain_vector: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        both = text_vector + plain_vector
        return both / np.float32(np.linalg.norm(both))


def click(user: str, item: str, ts: float, **more: Any) -> dict[str, Any]:
    return {"type": "click", "user_id": user, "item_id": item, "action": "click", "ts": ts, **more}


def rating(user: str, item: str, ts: float, value: float) -> dict[str, Any]:
    return click(user, item, ts, action="rating", value=value)


def comment(user: str, text: str, ts: float, item: str | None = None) -> dict[str, Any]:
    event: dict[str, Any] = {"type": "comment", "user_id": user, "text": text, "ts": ts}
    return event if item is None else {**event, "item_id": item}


def synthetic(events: int = 700, seed: int = 1) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Items of which a third appear later, and events of every kind; several share a second."""
    random = np.random.default_rng(seed)
    items: list[dict[str, Any]] = [{"item_id": f"i{j}", "text": f"text {j % 17}"} for j in range(40)]
    items += [{"item_id": f"i{j}", "text": f"text {j % 17}", "ts": float(5 * (j - 39))} for j in range(40, 60)]
    rows: list[dict[str, Any]] = []
    for k in range(events):
        ts = float(k // 3)
        user, item = f"u{random.integers(0, 25)}", f"i{random.integers(0, 62)}"
        kind = random.integers(0, 8)
        if kind == 0:
            rows.append(comment(user, f"words {random.integers(0, 30)}", ts))
        elif kind == 1:
            rows.append(comment(user, f"words {random.integers(0, 30)}", ts, item))
        elif kind == 2:
            rows.append(rating(user, item, ts, float(random.integers(1, 6))))
        else:
            rows.append(click(user, item, ts))
    return items, rows


@dataclass(frozen=True)
class Files:
    items: Path
    events: Path

    def options(self, **more: Any) -> EvaluateOptions:
        return replace(EvaluateOptions(self.items, self.events, baselines=()), **more)

    def run(self, **more: Any) -> dict[str, Any]:
        return evaluate(self.options(**more), FakeEncoder(), EVIDENCE, CONFIG)


def write(folder: Path, items: list[dict[str, Any]], events: list[dict[str, Any]]) -> Files:
    folder.mkdir(parents=True, exist_ok=True)
    files = Files(folder / "items.jsonl", folder / "events.jsonl.gz")
    files.items.write_text("".join(json.dumps(item) + "\n" for item in items))
    files.events.write_bytes(gzip.compress("".join(json.dumps(event) + "\n" for event in events).encode()))
    return files


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write(tmp_path_factory.mktemp("stream"), *synthetic())


def learnt(files: Files, encoder: FakeEncoder | None = None, config: LearnerConfig = CONFIG) -> tool.Run:
    """A run over the whole stream, before its report."""
    run = tool.Run(tool.read_stream(files.items, files.events, EVIDENCE), encoder or FakeEncoder(), EVIDENCE, config)
    run.encode(None, None, lambda stage, done, total: None)
    run.advance(None, lambda stage, done, total: None)
    return run


# --- the protocol ---------------------------------------------------------------------------------------------


def lay(events: list[tuple[Any, ...]], item_ts: list[float]) -> Trace:
    """events: (user, item, ts, kind), kind "+" positive, "-" low rating, "t" text event."""
    user, item, ts, kind = (np.array(column) for column in zip(*events, strict=True))
    return trace(user, item, ts.astype(float), kind == "-", kind == "t", np.array(item_ts))


def test_first_positive_of_a_pair_is_the_test_and_repeats_are_not() -> None:
    laid = lay([(0, 0, 1, "+"), (0, 0, 2, "+"), (1, 0, 3, "+")], [NOBODY, NOBODY])
    assert laid.kind.tolist() == [SCORED, REPEAT, SCORED]
    assert laid.candidates.tolist() == [2, 1, 2]


def test_low_rating_consumes_the_item_and_is_no_target() -> None:
    laid = lay([(0, 0, 1, "-"), (0, 0, 2, "+"), (0, 1, 3, "+"), (0, 1, 4, "-")], [NOBODY] * 3)
    assert laid.kind.tolist() == [LOW, REPEAT, SCORED, LOW]
    assert laid.candidates[2] == 2
    assert laid.user_positives[2] == 0


def test_item_is_a_candidate_strictly_after_its_time_only() -> None:
    laid = lay([(0, 0, 5, "+"), (1, 0, 5, "+"), (2, 0, 5.5, "+")], [5.0, NOBODY])
    assert laid.kind.tolist() == [CREATED, CREATED, SCORED]
    assert laid.available.tolist() == [1, 1, 2]
    assert laid.item_positives.tolist() == [0, 1, 2], "creating events are positives too"


def test_item_that_no_record_names_is_never_a_candidate() -> None:
    assert lay([(0, 0, 5, "+"), (1, 0, 6, "+")], [np.inf]).kind.tolist() == [CREATED, CREATED]


def test_text_event_is_the_pairs_positive_when_nothing_came_before() -> None:
    laid = lay([(0, 0, 1, "t"), (0, 0, 2, "t"), (0, 0, 3, "+"), (0, -1, 4, "t")], [NOBODY] * 2)
    assert laid.kind.tolist() == [SCORED, ASIDE, REPEAT, ASIDE]


def test_late_event_counts_as_of_the_newest_one() -> None:
    assert lay([(0, 1, 9, "+"), (1, 0, 1, "+")], [5.0, NOBODY]).kind.tolist() == [SCORED, SCORED]


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 4), st.sampled_from("+-t")), min_size=1),
    st.lists(st.sampled_from([NOBODY, 0.0, 2.0, 5.0, np.inf]), min_size=6, max_size=6),
)
def test_trace_equals_the_protocol_word_by_word(events: list[tuple[Any, ...]], item_ts: list[float]) -> None:
    events = [(u, i, ts, k) for ts, (u, i, _, k) in zip(np.cumsum([e[2] for e in events]), events, strict=True)]
    laid = lay(events, item_ts)
    consumed: dict[int, set[int]] = {}
    positives: list[tuple[int, int]] = []
    for k, (u, i, ts, kind) in enumerate(events):
        mine = consumed.setdefault(u, set())
        open_ = {j for j in range(6) if item_ts[j] < ts}
        assert laid.candidates[k] == len(open_ - mine)
        assert laid.user_positives[k] == sum(user == u for user, _ in positives)
        assert laid.item_positives[k] == sum(item == i for _, item in positives)
        if kind == "-":
            assert laid.kind[k] == LOW
        elif i in mine:
            assert laid.kind[k] in (REPEAT, ASIDE)
        else:
            assert laid.kind[k] == (SCORED if i in open_ else CREATED)
            positives.append((u, i))
        mine.add(i)


# --- metrics --------------------------------------------------------------------------------------------------


def brute_force(tests: list[tuple[float, int, int, int, float]]) -> dict[str, Any]:
    """METRICS by their definitions, one test at a time; tests: (rank, candidates, user's, item's, log loss)."""

    def figures(chosen: list[tuple[float, int, int, int, float]]) -> dict[str, Any]:
        if not chosen:
            return dict.fromkeys(("hr@10", "ndcg@10", "mrr", "recall@20"))
        n = len(chosen)
        return {
            "hr@10": sum(t[0] <= 10 for t in chosen) / n,
            "ndcg@10": sum(1 / math.log2(1 + t[0]) for t in chosen if t[0] <= 10) / n,
            "mrr": sum(1 / t[0] for t in chosen) / n,
            "recall@20": sum(t[0] <= 20 for t in chosen) / n,
        }

    out = figures(tests)
    out["second_half"] = figures(tests[len(tests) // 2 :])
    out["new_user"] = figures([t for t in tests if 0 <= t[2] < 5])
    out["new_item"] = figures([t for t in tests if 0 <= t[3] < 5])
    contested = [t for t in tests if t[1] > 1]
    out["auc"] = sum((t[1] - t[0]) / (t[1] - 1) for t in contested) / len(contested) if contested else None
    out["log_loss"] = sum(t[4] for t in tests) / len(tests) if tests else None
    return out


def random_tests(n: int, seed: int = 3) -> list[tuple[float, int, int, int, float]]:
    random = np.random.default_rng(seed)
    tests = []
    for _ in range(n):
        candidates = int(random.integers(1, 60))
        rank = 1 + int(random.integers(0, 2 * candidates - 1)) / 2
        tests.append((rank, candidates, int(random.integers(0, 9)), int(random.integers(0, 9)), float(random.random())))
    return tests


def feed(metrics: Metrics, tests: list[tuple[float, int, int, int, float]]) -> None:
    rank, candidates, users, items, loss = (np.array(column) for column in zip(*tests, strict=True))
    metrics.update(rank, candidates, user_positives=users, item_positives=items, log_loss=loss)


def assert_same(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        if isinstance(value, dict):
            assert_same(value, right[name])
        elif value is None:
            assert right[name] is None, name
        else:
            assert value == pytest.approx(right[name], rel=1e-12), name


def test_metrics_equal_their_definitions() -> None:
    tests = random_tests(501)
    metrics = Metrics()
    for start in range(0, len(tests), 37):
        feed(metrics, tests[start : start + 37])
    assert_same(metrics.report(), brute_force(tests))


def test_metrics_of_no_test_are_none() -> None:
    assert_same(Metrics().report(), brute_force([]))


def test_merged_halves_equal_the_whole() -> None:
    tests = random_tests(300)
    whole, left, right = Metrics(), Metrics(), Metrics()
    feed(whole, tests)
    feed(left, tests[:120])
    feed(right, tests[120:])
    left.merge(right)
    assert left.report() == whole.report()
    assert left.tests == 300


def test_window_keeps_the_newest_tests_alone() -> None:
    tests = random_tests(1000)
    window, newest = Metrics(tests_max=50), Metrics()
    for test in tests:
        feed(window, [test])
    feed(newest, tests[-50:])
    assert window.report() == newest.report()
    assert window.tests == 1000


def test_rank_that_is_nan_is_no_test() -> None:
    metrics = Metrics()
    metrics.update(np.array([np.nan, 2.0]), np.array([0, 5]))
    assert len(metrics.records) == 1
    assert metrics.records["user_positives"][0] == UNKNOWN
    assert metrics.report()["new_user"]["hr@10"] is None
    assert metrics.report()["log_loss"] is None


def test_auc_equals_rivers_on_the_scores_of_one_test() -> None:
    random = np.random.default_rng(5)
    scores = random.integers(0, 100, 80) / 100  # on the grid of river's thresholds, with ties
    target = 17
    rank = 1 + (scores > scores[target]).sum() + ((scores == scores[target]).sum() - 1) / 2
    reference = river_metrics.ROCAUC(n_thresholds=201)
    for j, score in enumerate(scores):
        reference.update(j == target, float(score))
    metrics = Metrics()
    metrics.update(np.array([rank]), np.array([len(scores)]))
    assert metrics.report()["auc"] == pytest.approx(reference.get(), abs=1e-6)


def test_log_loss_equals_rivers_over_the_candidates(tmp_path: Path) -> None:
    """With two candidates, p of the target tells the whole distribution."""
    items = [{"item_id": item, "text": item} for item in ("a", "b")]
    files = write(tmp_path, items, [click(f"u{k}", "ab"[k % 2], float(k)) for k in range(64)])
    run = learnt(files)
    batch = [k for k in range(64) if run.candidates[k] == 2]
    assert len(batch) == 64
    for k in batch:
        p = math.exp(-run.log_loss[k] / 2)  # -ln p - ln(1 - (1 - p))
        reference = river_metrics.LogLoss()
        reference.update(True, p)
        reference.update(False, 1 - p)
        assert run.log_loss[k] == pytest.approx(2 * reference.get(), rel=1e-5)
        assert 0 < p < 1
        assert run.listed[k, :2].sum() == pytest.approx(1) and np.isnan(run.listed[k, 2:]).all()
        assert run.listed[k, run.place[k]] == pytest.approx(p, rel=1e-4)
        counts = [k // 2 + 1, (k + 1) // 2 + 1]  # with one more each: of the target, of the other
        assert run.other_log_loss[k, -1] == pytest.approx(-2 * math.log(counts[0] / sum(counts)), rel=1e-5)
    assert run.log_loss[0] == pytest.approx(2 * math.log(2), rel=0.2), "no knowledge: about 1/2 each"


def test_calibration_error_tells_a_sharp_model_from_a_calibrated_one() -> None:
    random = np.random.default_rng(5)
    listed = random.uniform(0, 0.1, (20_000, 10))
    drawn = random.random(20_000)[:, None] < np.cumsum(listed, axis=1)
    place = np.where(drawn.any(axis=1), drawn.argmax(axis=1), -1)
    told = calibration(listed, place)
    assert told["ece@10"] < 0.003
    assert len(told["reliability"]) == RELIABILITY_GROUPS
    assert sum(group["listed"] for group in told["reliability"]) == listed.size
    sharp = calibration(np.minimum(listed * 2, 1), place)
    assert sharp["ece@10"] == pytest.approx(0.05, abs=0.003), "twice as sure as it may be: off by the mean p"
    short = calibration(np.array([[0.5, np.nan], [0.5, 0.25]]), np.array([0, -1]))
    assert [(group["p"], group["observed"]) for group in short["reliability"]] == [(0.25, 0), (0.5, 1), (0.5, 0)]
    assert calibration(np.zeros((0, 10)), np.zeros(0, np.int32)) == {"ece@10": None, "reliability": []}


# --- drift and the live figures -------------------------------------------------------------------------------


def test_drift_monitor_tells_a_change_and_not_noise() -> None:
    random = np.random.default_rng(0)
    monitor = DriftMonitor()
    assert not any(monitor.update(random.normal(5, 1, 64)) for _ in range(600))
    assert sum(monitor.update(random.normal(7, 1, 64)) for _ in range(400)) >= 1
    assert monitor.detections >= 1
    assert monitor.mean == pytest.approx(7, abs=0.5)
    assert not monitor.update(np.array([np.nan]))


@dataclass(frozen=True)
class FakeOutcome:
    rank: npt.NDArray[Any]
    candidates: npt.NDArray[Any]
    log_loss: npt.NDArray[Any]
    pop_rank: npt.NDArray[Any]
    knn_rank: npt.NDArray[Any]


def test_live_metrics_compare_the_model_with_popularity_on_the_same_tests() -> None:
    live = LiveMetrics(("popularity 10", "popularity"))
    nan = np.nan
    live.observe(
        FakeOutcome(
            np.array([1.0, nan, 30.0]), np.array([50, 0, 50]), np.array([0.5, nan, 4.0]),
            np.array([[2.0, 40.0], [nan, nan], [3.0, 4.0]]), np.array([11.0, nan, 10.0]),
        )
    )  # fmt: skip
    live.observe(FakeOutcome(np.array([nan]), np.array([0]), np.array([nan]), np.full((1, 2), nan), np.array([nan])))
    report = live.report()
    names = ("model", "popularity 10", "popularity", "item_knn")
    assert [report[name]["hr@10"] for name in names] == [0.5, 1.0, 0.5, 0.5]
    assert report["model"]["log_loss"] == pytest.approx(2.25)
    assert report["drift"] == {"log_loss": 0}


# --- recorded streams -----------------------------------------------------------------------------------------


def test_learner_ranks_every_test_among_the_protocols_candidates(tmp_path: Path) -> None:
    items, events = synthetic()
    entered = {item["item_id"]: item.get("ts", 0.0) for item in items}
    for k, event in enumerate(events):
        event["ts"] = float(k)  # one event a second, none about an item before its time
    events = [event for event in events if entered.get(event.get("item_id", "i0"), np.inf) <= event["ts"]]
    report = write(tmp_path, items, events).run()
    assert report["tests"] > 200
    assert report["candidates_differ"] == 0


def test_late_events_see_the_catalogue_of_the_newest_one(tmp_path: Path) -> None:
    items, events = synthetic()
    entered = {item["item_id"]: item.get("ts", 0.0) for item in items}
    events = [event for event in events if entered.get(event.get("item_id", "i0"), np.inf) < event["ts"]]
    for k, event in enumerate(events):
        event["ts"] += 0.25
        if k % 20 == 19:
            event["ts"] -= 60.0
    files = write(tmp_path, items, events)
    assert files.run()["candidates_differ"] == 0
    assert files.run(until=300)["events"] > 200


def test_the_page_has_every_curve_and_needs_no_network(stream: Files, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    report = stream.run(html=page, baselines=("popularity", "last_touched"))
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") == 5
    assert "http" not in text and "<script" not in text
    curves = {name: text.count(f">{name}</text>") for name in ("model", "popularity", "last_touched", "exact")}
    assert curves == {"model": 5, "popularity": 4, "last_touched": 4, "exact": 1}
    assert f"{report['model']['ndcg@10']:.4f}" in text
    assert set(report["significance"]) == {"popularity", "last_touched"}
    assert 0 <= report["significance"]["popularity"]["p"] <= 1


def test_report_and_ranks_tell_the_same_figures(stream: Files, tmp_path: Path) -> None:
    report = stream.run(report=tmp_path / "r.json", ranks=tmp_path / "ranks.jsonl", baselines=("popularity",))
    assert json.loads((tmp_path / "r.json").read_text()) == report
    ranks = [json.loads(line) for line in (tmp_path / "ranks.jsonl").read_text().splitlines()]
    assert len(ranks) == report["tests"]
    metrics = Metrics()
    metrics.update(np.array([r["rank"] for r in ranks]), np.array([r["candidates"] for r in ranks]))
    for name in ("hr@10", "ndcg@10", "mrr", "recall@20", "second_half", "auc"):
        assert metrics.report()[name] == report["model"][name]
    lines = gzip.decompress(stream.events.read_bytes()).decode().splitlines()
    for rank in ranks:
        event = json.loads(lines[rank["offset"]])
        assert (event["user_id"], event["item_id"]) == (rank["user_id"], rank["item_id"])
    assert report["cpu_s_per_1k_events"] > 0
    assert report["baselines"]["popularity"]["log_loss"] is None
    assert "popularity" in tool.render(report)


def test_two_runs_and_a_resumed_run_end_in_the_same_digest(stream: Files, tmp_path: Path) -> None:
    straight = stream.run()
    stopped = stream.run(until=400, checkpoint=tmp_path / "saved")
    assert 300 < stopped["events"] <= 400
    resumed = stream.run(resume=tmp_path / "saved", until=600, checkpoint=tmp_path / "saved")
    assert resumed["events"] > stopped["events"]
    finished = stream.run(resume=tmp_path / "saved")
    assert stream.run()["digest"] == straight["digest"] == finished["digest"] != stopped["digest"]
    assert finished["model"] == straight["model"]
    assert finished["drift"] == straight["drift"]
    assert finished["calibration"] == straight["calibration"]


def test_saved_run_of_another_stream_is_refused(stream: Files, tmp_path: Path) -> None:
    stream.run(until=200, checkpoint=tmp_path / "saved")
    items, events = synthetic(seed=2)
    other = write(tmp_path / "other", items, events)
    with pytest.raises(StreamError, match="another stream"):
        other.run(resume=tmp_path / "saved")
    with pytest.raises(StreamError, match="--checkpoint"):
        other.run(resume=tmp_path / "nothing")


def test_what_comes_later_changes_no_rank_before(stream: Files, tmp_path: Path) -> None:
    items, events = synthetic()
    cut = write(tmp_path, [item for item in items if item.get("ts", 0) <= 150], events[:450])
    whole, part = learnt(stream), learnt(cut)
    stop = int(whole._stops[whole._stops <= 450][-1])
    assert stop > 300
    np.testing.assert_array_equal(whole.rank[:stop], part.rank[:stop])
    np.testing.assert_array_equal(whole.log_loss[:stop], part.log_loss[:stop])


def test_text_is_seen_only_when_the_users_time_has_strictly_advanced(tmp_path: Path) -> None:
    items = [{"item_id": f"i{j}", "text": f"text {j}"} for j in range(30)]
    before = [click(f"u{k % 5}", f"i{k % 29}", float(k)) for k in range(64)]

    def losses(text: str) -> npt.NDArray[Any]:
        words = [comment("u0", text, 100.0), click("u0", "i29", 100.0), click("u0", "i28", 101.0)]
        return learnt(write(tmp_path / text, items, before + words)).log_loss[-2:]

    same_second, later = losses("one") - losses("other")
    assert same_second == 0
    assert later != 0


def test_bad_lines_are_counted_and_left_out(tmp_path: Path) -> None:
    items, events = synthetic(events=100)
    files = write(tmp_path, items, events)
    good = files.run()
    text = gzip.decompress(files.events.read_bytes()).decode()
    files.events.write_bytes(gzip.compress(('{"type": "click"}\n\nnot json\n' + text).encode()))
    bad = files.run(ranks=tmp_path / "ranks")
    assert bad["rejects"] == 2
    assert bad["digest"] == good["digest"]
    assert json.loads((tmp_path / "ranks").read_text().splitlines()[0])["offset"] >= 3


def test_stream_without_events_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    files = write(tmp_path, [], [])
    with pytest.raises(StreamError, match=r"events\.jsonl"):
        files.run()
    with pytest.raises(StreamError, match="nowhere"):
        replace(files, items=tmp_path / "nowhere").run()


def test_a_stream_without_times_is_an_error_that_says_so(tmp_path: Path) -> None:
    items, events = synthetic(events=3)
    files = write(tmp_path, items, [{**event, "ts": None} for event in events])
    with pytest.raises(StreamError, match="line 1: ts: missing"):
        files.run()


def test_item_vectors_of_producers_take_part(tmp_path: Path) -> None:
    items, events = synthetic(events=200)
    plain = write(tmp_path / "plain", items, events).run()
    items[0] = {**items[0], "vector": [1.0, 2.0]}
    items[1] = {"item_id": "i1", "text": "", "vector": [3.0, 2.0]}
    assert write(tmp_path / "more", items, events).run()["digest"]["items"] != plain["digest"]["items"]


def test_baseline_names_are_checked() -> None:
    own = ("popularity", "last_touched", "item_knn", "isgd", "bpr", "river", "ease")
    assert parse_baselines("all")[: len(own)] == own, "and those of `implicit`, where it is installed"
    assert parse_baselines("none") == ()
    assert parse_baselines("isgd, popularity") == ("isgd", "popularity")
    with pytest.raises(ValueError, match="no baseline 'best'"):
        parse_baselines("best")


# --- the vector cache -----------------------------------------------------------------------------------------


def test_second_evaluation_encodes_nothing(stream: Files, tmp_path: Path) -> None:
    first, second = FakeEncoder(), FakeEncoder()
    reports = [evaluate(stream.options(cache=tmp_path), encoder, EVIDENCE, CONFIG) for encoder in (first, second)]
    assert first.texts > 0
    assert second.texts == 0
    assert reports[0]["digest"] == reports[1]["digest"] == stream.run()["digest"]


def test_stopped_run_encodes_only_what_it_reaches(stream: Files, tmp_path: Path) -> None:
    whole, first, rest = FakeEncoder(), FakeEncoder(), FakeEncoder()
    folder = tmp_path / "saved"
    evaluate(stream.options(), whole, EVIDENCE, CONFIG)
    evaluate(stream.options(until=200, checkpoint=folder), first, EVIDENCE, CONFIG)
    evaluate(stream.options(resume=folder), rest, EVIDENCE, CONFIG)
    assert 0 < first.texts < whole.texts
    assert 0 < rest.texts < whole.texts


def test_cache_keeps_encoders_apart_and_encodes_each_text_once(tmp_path: Path) -> None:
    encoder = FakeEncoder()
    one, other = VectorCache(tmp_path, "one", TEXT_DIM), VectorCache(tmp_path, "other", TEXT_DIM)
    vectors = one.encode(["a", "b", "a"], encoder.encode)
    assert encoder.texts == 2
    np.testing.assert_array_equal(vectors[0], vectors[2])
    other.encode(["a"], encoder.encode)
    assert encoder.texts == 3
    assert len(one) == 2


def test_torn_record_of_the_cache_is_cut_off(tmp_path: Path) -> None:
    encoder = FakeEncoder()
    cache = VectorCache(tmp_path, "e", TEXT_DIM)
    expected = cache.encode(["a", "b"], encoder.encode)
    (path,) = tmp_path.glob("*.vectors")
    path.write_bytes(path.read_bytes()[:-5])
    np.testing.assert_array_equal(cache.encode(["a", "b", "c"], encoder.encode)[:2], expected)
    assert len(cache) == 3
    before = encoder.texts
    cache.encode(["a", "b", "c"], encoder.encode)
    assert encoder.texts == before


def test_cache_is_bounded_and_forgets_the_oldest(tmp_path: Path) -> None:
    encoder = FakeEncoder()
    cache = VectorCache(tmp_path, "e", TEXT_DIM, bytes_max=10 * (16 + 4 * TEXT_DIM))
    for k in range(25):
        cache.encode([f"text {k}"], encoder.encode)
        assert len(cache) <= 10
    before = encoder.texts
    cache.encode(["text 24"], encoder.encode)
    assert encoder.texts == before


def test_mcnemar_tells_a_difference_from_chance() -> None:
    chance = np.random.default_rng(4)
    even = chance.random((2, 4000)) < 0.3
    ranks = np.where(even, 1.0, 50.0)
    told = mcnemar(ranks[0], ranks[1])
    assert told.only_first == int((even[0] & ~even[1]).sum())
    alone = told.only_first + told.only_second
    assert told.p == pytest.approx(chi2.sf((told.only_first - told.only_second) ** 2 / alone, 1))
    assert told.p > 0.01
    better = np.where(chance.random(4000) < 0.1, 1.0, ranks[0])
    told = mcnemar(better, ranks[0])
    assert told.only_second == 0 and told.p < 1e-9
    assert (told.windows, told.better, told.worse) == (3001, 1.0, 0.0)
    assert mcnemar(ranks[0], better).worse == 1.0
    assert mcnemar(ranks[0][:999], ranks[0][:999]) == (0, 0, 1.0, 0, None, None)
    assert chi2.isf(MCNEMAR_ALPHA, 1) == pytest.approx(MCNEMAR_CHI2, abs=1e-4)


def test_ab_by_user_keeps_its_confidence_when_a_users_tests_hang_together() -> None:
    """200 tests of nothing: users whose hits come in clumps, so that tests as draws would promise far too much."""
    rng = np.random.default_rng(5)
    user = np.repeat(np.arange(400), rng.integers(1, 12, 400))
    arm = rng.integers(0, 2, 400)[user]
    covered = significant = 0
    for _ in range(200):
        lucky = (rng.random(400) < 0.3)[user]
        ranks = np.where(lucky, 1.0, 50.0)
        told = ab(ranks, ranks, user, arm)["b_minus_a"]["hr@10"]
        covered += told["low"] <= 0 <= told["high"]
        significant += told["p"] < 0.05
    assert 180 <= covered <= 198 and significant == 200 - covered
    better = np.where(rng.random(len(user)) < 0.2, 1.0, ranks)
    told = ab(ranks, better, user, arm)
    assert told["b_minus_a"]["hr@10"]["low"] > 0 and told["b_minus_a"]["ndcg@10"]["p"] < 0.05
    assert told["a"]["tests"] + told["b"]["tests"] == len(user)
    assert told["paired"]["only_second"] == 0 and told["paired"]["p"] < 1e-9


def test_two_encoders_are_held_against_each_other_by_users_arms(stream: Files, tmp_path: Path) -> None:
    left, right = np.random.default_rng(1).standard_normal((2, TEXT_DIM, 2)).astype(np.float32)
    rival = Adapter(FakeEncoder().name, left, right, 2.0)
    report = stream.run(has_rival=True, rival=rival, ranks=tmp_path / "ranks", baselines=())
    assert report["model"] == stream.run(baselines=())["model"]
    assert report["ab"]["encoders"] == {"a": FakeEncoder().name, "b": f"{FakeEncoder().name}+{rival.name}"}
    lines = [json.loads(line) for line in (tmp_path / "ranks").read_text().splitlines()]
    arms = {line["user_id"]: line["arm"] for line in lines}
    assert all(line["arm"] == arms[line["user_id"]] for line in lines) and set(arms.values()) == {"a", "b"}
    shown = {"a": [x["rank"] for x in lines if x["arm"] == "a"], "b": [x["rank_b"] for x in lines if x["arm"] == "b"]}
    for name, ranks in shown.items():
        assert report["ab"][name]["hr@10"] == pytest.approx(np.mean(np.array(ranks) <= 10))
        assert report["ab"][name]["users"] == sum(arm == name for arm in arms.values())
    assert [x["rank"] for x in lines] != [x["rank_b"] for x in lines]
    same = stream.run(has_rival=True, baselines=())["ab"]
    assert same["paired"]["only_first"] == same["paired"]["only_second"] == 0
    assert "A/B by user" in tool.render(report)
