"""Dashboard, alerts and the deployment speak of metrics, settings, files and services that exist."""

import json
import math
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from model.gate import level
from streams.__main__ import app
from streams.settings import Settings
from tests.promtool import promtool
from tests.test_metrics import METRICS, TRAINER, exercised, trained

ROOT: Final = Path(__file__).parent.parent
DASHBOARD: Final = ROOT / "monitoring" / "grafana" / "dashboards" / "headwater.json"
PROVISIONING: Final = ROOT / "monitoring" / "grafana" / "provisioning"
ALERTS: Final = ROOT / "monitoring" / "alerts.yml"
COMPOSE: Final = ROOT / "docker-compose.yml"
SCRAPED: Final = {"instance", "job"}  # labels that Prometheus adds
SELECTOR: Final = re.compile(r"\b((?:headwater|process)_\w+)(\{[^}]*\})?")
MATCHER: Final = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"")
GROUPING: Final = re.compile(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)")


def _series() -> dict[str, set[str]]:
    """{name of a series: its labels} of all that a worker or a trainer exposes."""
    found: dict[str, set[str]] = {}
    for exposed in (exercised().render()[0], trained()):
        for sample in (s for family in text_string_to_metric_families(exposed.decode()) for s in family.samples):
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def _dashboard() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return read


def _panels() -> list[dict[str, Any]]:
    return [panel for panel in _dashboard()["panels"] if panel["type"] != "row"]


def _rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def _expressions() -> Iterator[tuple[str, str]]:
    """(where, PromQL) of the dashboard, its variables filled in, and of the alerts."""
    for panel in _panels():
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", "1m").replace("$instance", ".*")
            yield f"panel {panel['title']}", expression
    for rule in _rules():
        yield f"alert {rule['alert']}", rule["expr"]


def _compose() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    return read


@pytest.mark.parametrize(("where", "expression"), list(_expressions()), ids=lambda value: value[:40])
def test_expression_uses_metrics_and_labels_that_exist(where: str, expression: str) -> None:
    series = _series()
    used = SELECTOR.findall(expression)
    assert used or expression.startswith("up{"), where
    labels = set(SCRAPED)
    for name, matchers in used:
        assert name in series, f"{where}: nothing exposes {name}"
        labels |= series[name]
        unknown = set(MATCHER.findall(matchers)) - series[name] - SCRAPED
        assert not unknown, f"{where}: {name} has no {unknown}"
    for grouping in GROUPING.findall(expression):
        assert set(re.findall(r"\w+", grouping)) <= labels, f"{where}: {grouping}"


def test_legends_and_annotations_use_labels_that_their_expressions_keep() -> None:
    for panel in _panels():
        for target in panel["targets"]:
            kept = SCRAPED | set(re.findall(r"\w+", " ".join(GROUPING.findall(target["expr"]))))
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= kept, panel["title"]


def test_every_metric_is_on_the_dashboard() -> None:
    shown = " ".join(expression for where, expression in _expressions() if where.startswith("panel"))
    every = METRICS | TRAINER
    assert not {name for name in every if not re.search(rf"\bheadwater_{name}(_bucket|_count|_sum)?\b", shown)}


def test_the_evidence_is_drawn_with_the_line_that_decides_the_first_duel() -> None:
    (panel,) = [panel for panel in _panels() if "headwater_trainer_evidence" in panel["targets"][0]["expr"]]
    line = panel["fieldConfig"]["defaults"]["thresholds"]["steps"][1]["value"]
    assert line == pytest.approx(-math.log10(level(Settings().tuning_alpha, 1)), abs=0.01)
    assert f"{line}" in panel["description"]


def test_what_is_told_of_workers_leaves_the_trainers_series_of_the_same_name_out() -> None:
    both = {f"headwater_{name}" for name in METRICS.keys() & TRAINER.keys()}
    for where, expression in _expressions():
        for name, matchers in SELECTOR.findall(expression):
            assert name not in both or 'job="headwater"' in matchers, where


def test_promtool_reads_every_expression(tmp_path: Path) -> None:
    rules = [{"record": f"check:expression{n}", "expr": text} for n, (_, text) in enumerate(_expressions())]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    _promtool("check", "rules", str(tmp_path / "rules.yml"))


def test_promtool_accepts_configuration_and_alerts() -> None:
    _promtool("check", "config", "--syntax-only", str(ROOT / "monitoring" / "prometheus.yml"))


def test_alerts_fire_when_they_should_and_only_then() -> None:
    _promtool("test", "rules", str(ROOT / "tests" / "alerts_test.yml"))
    tried = (ROOT / "tests" / "alerts_test.yml").read_text(encoding="utf-8")
    for rule in _rules():
        assert rule["alert"] in tried, f"{rule['alert']} is never tried"
        assert {"summary", "action"} <= set(rule["annotations"]), rule["alert"]
        assert rule["labels"]["severity"] in {"page", "warn", "info"}


def _promtool(*arguments: str) -> None:
    done = subprocess.run([promtool(), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_dashboard_reads_the_provisioned_source_and_its_panels_do_not_overlap() -> None:
    sources = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yml").read_text(encoding="utf-8"))
    (source,) = sources["datasources"]
    taken: set[tuple[int, int]] = set()
    for panel in _dashboard()["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        cells = {(place["x"] + dx, place["y"] + dy) for dx in range(place["w"]) for dy in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    for panel in _panels():
        assert panel["datasource"]["uid"] == source["uid"]
        assert all(target["datasource"]["uid"] == source["uid"] for target in panel["targets"])
    ids = [panel["id"] for panel in _dashboard()["panels"]]
    assert len(ids) == len(set(ids))


def test_compose_sets_only_settings_that_exist_to_values_that_hold() -> None:
    commands = []
    for name, service in _compose()["services"].items():
        environment = service.get("environment", {})
        ours = {key: value for key, value in environment.items() if key.startswith("HEADWATER_")}
        if service.get("image", "").startswith("headwater"):
            commands += [service["command"][0]] if "entrypoint" not in service else []
            fields = {key.removeprefix("HEADWATER_").lower(): value for key, value in ours.items()}
            assert set(fields) <= set(Settings.model_fields), name
            Settings(**fields)
        else:
            assert not ours, name
    assert sorted(commands) == ["topics", "trainer", "worker", "worker"]


def test_compose_commands_exist() -> None:
    commands = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    for name, service in _compose()["services"].items():
        if service.get("image", "").startswith("headwater") and "entrypoint" not in service:
            assert service["command"][0] in commands, name
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert 'ENTRYPOINT ["headwater"]' in dockerfile


def test_compose_publishes_to_this_machine_alone_and_holds_no_secret() -> None:
    for name, service in _compose()["services"].items():
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", ())), name
        for key, value in service.get("environment", {}).items():
            assert not re.search(r"PASSWORD|SECRET|TOKEN", key) or not value, f"{name}: {key}"


def test_compose_services_are_checked_and_wait_for_what_they_need() -> None:
    services = _compose()["services"]
    for name, service in services.items():
        assert "healthcheck" in service or service.get("restart") == "no", name
        assert set(service.get("depends_on", ())) <= set(services), name
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            if source.startswith("./"):
                assert (ROOT / source).exists(), f"{name}: {source}"
            else:
                assert source in _compose()["volumes"], f"{name}: {source}"
    for name in ("worker-1", "worker-2"):
        assert services[name]["depends_on"]["topics"]["condition"] == "service_completed_successfully"
    assert services["topics"]["depends_on"]["kafka"]["condition"] == "service_healthy"


def test_prometheus_scrapes_each_worker_and_the_trainer_of_the_compose_file() -> None:
    scraped = yaml.safe_load((ROOT / "monitoring" / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    targets = {job["job_name"]: {t for s in job["static_configs"] for t in s["targets"]} for job in scraped}
    services = _compose()["services"]

    def running(command: str, port: int) -> set[str]:
        return {f"{name}:{port}" for name, s in services.items() if s.get("command") == [command]}

    port = Settings().trainer_port
    assert targets == {"headwater": running("worker", 8080), "headwater-trainer": running("trainer", port)}
    for target in targets["headwater"]:
        environment = services[target.partition(":")[0]]["environment"]
        assert environment["HEADWATER_ADVERTISED_URL"] == f"http://{target}"
    assert f":{port}/metrics" in services["trainer"]["healthcheck"]["test"][-1]


def test_the_trainer_runs_where_it_is_asked_for_and_keeps_what_it_made() -> None:
    trainer = _compose()["services"]["trainer"]
    assert trainer["profiles"] == ["trainer"] and "ports" not in trainer
    kept = tuple(volume.partition(":")[2] for volume in trainer["volumes"])
    for name in ("CHECKPOINTS", "TRAINER_DIR"):
        assert trainer["environment"][f"HEADWATER_{name}"].startswith(kept), name
    others = [name for name, service in _compose()["services"].items() if "trainer" in service.get("depends_on", ())]
    assert not others


def test_image_has_what_it_copies() -> None:
    allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for line in (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines():
        if line.startswith("COPY "):
            for source in shlex.split(line)[1:-1]:
                assert (ROOT / source).exists(), line
                assert f"!{source}" in allowed, f"{source} never reaches the build"
