"""The benchmarks run, small: none rots. Their speed is not judged here."""

from bench import freshness, pipeline, rank, serve, store


def test_pipeline_compares_faust_with_a_plain_loop() -> None:
    result = pipeline.run(["--events", "3000", "--items", "60", "--users", "300"])
    assert result["ratio"] == result["faust_events_per_s"] / result["plain_events_per_s"] > 0
    assert 2000 < result["examples"] <= 3000
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
