"""The benchmarks run, small: none rots. Their speed is not judged here."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import chaos, finetune, freshness, pipeline, published, rank, serve, simulate, store, verdict
from bench.__main__ import main
from state.store import RocksDisk
from tests.test_evaluate import FakeEncoder
from tests.test_store import META


def test_what_a_benchmark_finds_broken_is_its_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "simulate", "--seeds", "3", "--processes", "1", "--canaries", "0"])
    assert main() == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["broken"] == []
    chunk = simulate.Chunk([simulate.Failure(7, "a row differs")], 1, "")
    monkeypatch.setattr(simulate, "worlds", lambda *_: iter([chunk]))
    assert main() == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["broken"] == ["seed 7: a row differs"]


def test_a_verdict_names_every_promise_that_is_broken() -> None:
    clean: dict[str, Any] = dict.fromkeys(verdict.BROKEN_UNLESS_NONE, 0) | {"item_state_equal": True}
    assert verdict.broken(clean) == []
    for name in verdict.BROKEN_UNLESS_NONE:
        assert verdict.broken(clean | {name: ["one"]}) == [name]
    assert verdict.broken(clean | {"item_state_equal": False}) == ["item_state"]


def test_pipeline_compares_faust_with_a_plain_loop_and_with_itself_after_a_stop() -> None:
    result = pipeline.run(["--events", "3000", "--items", "60", "--users", "300", "--lag", "2000"])
    assert result["ratio"] == result["faust_events_per_s"] / result["plain_events_per_s"] > 0
    assert 2000 < result["examples"] <= 3000
    assert result["lag_ratio"] == result["lag_events_per_s"] / result["faust_events_per_s"] > 0
    assert {"fold", "user_flush", "learn"} <= result["stage_us_per_event"].keys()


def test_freshness_sees_every_probe() -> None:
    result = freshness.run(["--rate", "50", "--seconds", "2", "--items", "60", "--users", "50"])
    assert result["clicks_ms"]["count"] >= 20
    assert result["comments_ms"]["count"] >= 2
    assert 0 < result["clicks_ms"]["p50"] <= result["clicks_ms"]["p99"]


def test_rank_finds_ten_items_of_every_catalogue() -> None:
    result = rank.run(["--items", "300,900", "--lists", "5"])
    assert result["items"].keys() == {"300", "900"}
    for figures in result["items"].values():
        assert 0 < figures["p50_ms"] <= figures["p99_ms"]
        assert len(set(figures["first"].split(","))) == 10


def test_store_reads_what_it_wrote() -> None:
    result, again = store.run(["--rows", "1200"]), store.run(["--rows", "1200"])
    assert result["digest"] == again["digest"] != store.run(["--rows", "1100"])["digest"]
    assert min(result["write_ratio"], result["read_ratio"]) > 0


def test_serve_answers_every_request() -> None:
    result = serve.run(["--rate", "20", "--stream", "100", "--seconds", "2", "--items", "60", "--users", "20"])
    assert result["requests"] == 40 and result["rps"] > 0 and result["stream_events_per_s"] > 0
    assert 0 < result["p50_ms"] <= result["p99_ms"] and result["explained"]["p50_ms"] > 0


def test_finetune_holds_the_loop_against_the_frozen_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = ("river", "film", "train", "winter", "music", "city", "bread", "star")
    items = [{"item_id": f"i{n}", "text": f"{words[n % 8]} {words[n // 8]}"} for n in range(64)]
    events = [
        {"type": "click", "user_id": f"u{n % 60}", "item_id": f"i{(n // 60 + n % 60) % 64}", "action": "click", "ts": n}
        for n in range(1, 1600)
    ]
    for name, lines in (("items", items), ("events", events)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    files = ["--items", str(tmp_path / "items.jsonl"), "--events", str(tmp_path / "events.jsonl")]
    result = finetune.run([*files, "--round-examples", "640", "--poisoned", "1"])
    assert result["decisions"][0]["kind"] == "candidate"
    assert 0 <= result["p_value"] <= 1 and result["frozen"].keys() == result["tuned"].keys()
    assert result["poisoned_promoted"] == 0 and {"planted_promoted", "regression_rolled_back_after"} <= result.keys()


def test_published_protocol_scores_the_last_70_percent_of_the_five_stars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("model.encoder.Encoder", lambda *_, **__: FakeEncoder())
    items = [{"item_id": f"i{n}", "text": f"film {n}"} for n in range(40)]
    events = [
        {
            "type": "click", "user_id": f"u{n % 20}", "item_id": f"i{(n // 20 + n % 20) % 40}", "action": "rating",
            "value": 4.0 if n % 3 == 0 else 5.0, "ts": n,
        }
        for n in range(1, 301)
    ]  # fmt: skip
    for name, lines in (("items", items), ("events", events)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    result = published.run(["--items", str(tmp_path / "items.jsonl"), "--events", str(tmp_path / "events.jsonl")])
    assert (result["events"], result["learnt_first"], result["tests"]) == (200, 60, 140)
    assert {"model", "popularity"} <= result["recall@10"].keys()
    assert all(0 <= value <= 1 for value in result["recall@10"].values())


def test_rocksdb_makes_up_no_name_of_a_user_of_chaos(tmp_path: Path) -> None:
    """Its indexes have shortened keys between two rows'."""
    names = [[chaos.user_name(slot, turn).encode() for slot in range(20)] for turn in range(3)]
    disk = RocksDisk().open(tmp_path)
    disk.write({name: bytes(5000) for name in [*names[0], *names[2]]}, META)
    disk.purge()
    disk.close()
    assert verdict.files_that_name(names[0], [tmp_path])
    assert verdict.files_that_name(names[1], [tmp_path]) == []
