"""The benchmarks run, small: none rots. Their speed is not judged here."""

from bench import freshness, pipeline


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
