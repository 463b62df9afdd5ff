"""Settings: each has a unit and a reason, bad ones are refused in words, secrets stay secret."""

import dataclasses
from pathlib import Path

import pytest

from model.learner import LearnerConfig
from streams import settings as module
from streams.examples import MESSAGE_EXAMPLES_MAX
from streams.pipeline import EvidenceConfig
from streams.settings import LEARNER, Settings, SettingsError, load, show


def _set(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name, value in values.items():
        monkeypatch.setenv(f"HEADWATER_{name}", value)


@pytest.fixture(autouse=True)
def _no_settings(clean_environment: None) -> None:
    """Whatever the machine has set."""


def test_every_setting_has_a_unit_and_a_reason() -> None:
    for line in show(load()):
        assert line.unit, line.variable
        assert len(line.why) > 8, line.variable
        assert line.source == "default"


def test_environment_is_read_and_shown_as_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, PARTITIONS="8", ACTION_WEIGHTS='{"view": 0.3}', LOW_ACTIONS='["skip"]', STATE_DIR="/x")
    settings = load()
    assert (settings.partitions, settings.action_weights, settings.state_dir) == (8, {"view": 0.3}, Path("/x"))
    assert settings.low_actions == frozenset({"skip"})
    lines = {line.variable: line for line in show(settings, overrides=["http_port"])}
    assert lines["HEADWATER_PARTITIONS"].source == "environment"
    assert lines["HEADWATER_HTTP_PORT"].source == "command line"
    assert lines["HEADWATER_APP_ID"].source == "default"


def test_empty_variable_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, BROKER="", PARTITIONS="")
    assert load().bootstrap() == ["127.0.0.1:9092"]


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().partitions = 3


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("BROKER", "kafka", "host:port"),
        ("BROKER", "kafka:9092,other", "'other' is not host:port"),
        ("PARTITIONS", "0", "greater than or equal to 1"),
        ("PARTITIONS", "many", "valid integer"),
        ("APP_ID", "a b", "letters, digits"),
        ("RANK_SAMPLE", "1.5", "less than or equal to 1"),
        ("ACTION_WEIGHTS", "{view: 1}", "not JSON"),
        ("ACTION_WEIGHTS", '{"view": -1}', "greater than or equal to 0"),
        ("SASL_MECHANISM", "GSSAPI", "must be one of PLAIN"),
        ("SASL_MECHANISM", "PLAIN", "security_protocol is PLAINTEXT"),
        ("SECURITY_PROTOCOL", "SASL_SSL", "needs sasl_mechanism"),
        ("SSL_CAFILE", "/nowhere/ca.pem", "no such file"),
    ],
)
def test_bad_value_is_refused_in_words(monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str) -> None:
    _set(monkeypatch, **{name: value})
    with pytest.raises(SettingsError) as refused:
        load()
    assert said in str(refused.value)


def test_misspelt_variable_is_refused_with_the_right_one(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, BROKR="kafka:9092")
    with pytest.raises(SettingsError, match="did you mean HEADWATER_BROKER"):
        load()


def test_password_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, SECURITY_PROTOCOL="SASL_PLAINTEXT", SASL_MECHANISM="PLAIN", SASL_PLAIN_USERNAME="u",
         SASL_PLAIN_PASSWORD="hunter2")  # fmt: skip
    settings = load()
    assert "hunter2" not in repr(settings) + str(show(settings)) + settings.model_dump_json()
    assert settings.kafka_options()["sasl_plain_password"] == "hunter2"


def test_every_error_names_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, SECURITY_PROTOCOL="SASL_PLAINTEXT", SASL_PLAIN_PASSWORD="hunter2")
    with pytest.raises(SettingsError) as refused:
        load()
    assert "hunter2" not in str(refused.value)


def test_topics_carry_prefix_and_app_id() -> None:
    settings = Settings(topic_prefix="shop.", app_id="a1")
    assert settings.topic("clicks") == "shop.clicks"
    assert settings.internal_topic("examples") == "shop.a1-examples"


def test_kafka_options_are_only_what_the_protocol_needs() -> None:
    assert set(Settings().kafka_options()) == {"bootstrap_servers", "security_protocol"}
    assert "ssl_context" in Settings(security_protocol="SSL").kafka_options()


def test_url_of_a_worker() -> None:
    assert Settings(http_host="::1", http_port=81).http_url() == "http://[::1]:81"
    assert Settings(advertised_url="https://w1.example/").http_url() == "https://w1.example"


def test_learner_settings_mirror_the_learners_own_defaults() -> None:
    fixed = {"text_dim", "message_examples_max", "history_max", "start"}  # of the formats and the formulation
    own = {field.name: field.default for field in dataclasses.fields(LearnerConfig)}
    mirrored = {
        name.removeprefix(LEARNER): field.default
        for name, field in Settings.model_fields.items()
        if name.startswith(LEARNER)
    }
    assert mirrored == {name: default for name, default in own.items() if name not in fixed}
    config = Settings(learner_dim=32).learner_config(96)
    assert (config.dim, config.text_dim) == (32, 96)
    assert config.message_examples_max == MESSAGE_EXAMPLES_MAX


def test_evidence_settings_mirror_the_pipelines_own_defaults() -> None:
    given, own = Settings(rank_sample=0.0).evidence_config(), EvidenceConfig()
    assert given == own


def test_child_process_gets_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, APP_ID="x")
    child = module.environment({"http_port": "81"})
    assert (child["HEADWATER_APP_ID"], child["HEADWATER_HTTP_PORT"]) == ("x", "81")


def test_a_step_to_end_at_is_one_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, CRASH_AT="marker:3")
    assert load().crash_at == "marker:3"
    for wrong in ("marker", "marker:0", "lunch:1", "marker:3x"):
        _set(monkeypatch, CRASH_AT=wrong)
        with pytest.raises(SettingsError, match="CRASH_AT"):
            load()
