"""The command line: examples in every help, exit code 0 on success only, errors that say what to do."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from kafka.errors import NodeNotReadyError
from typer.testing import CliRunner

from streams import cli_asking, tokens, topics
from streams.__main__ import app
from streams.answers import ModelUnlearnt
from streams.cli import _require_topics
from streams.settings import Settings

COMMANDS = (
    "demo", "broker", "worker", "topics", "replay", "evaluate", "digest", "verify", "state", "recommend", "forget",
    "settings", "keys", "audit", "trainer", "checkpoints", "explain", "encoder",
)  # fmt: skip
GROUPED = (
    "keys add", "keys list", "keys revoke", "audit verify", "audit show", "checkpoints list", "checkpoints show",
    "checkpoints promote", "checkpoints rollback", "checkpoints prune", "encoder list", "encoder align",
    "encoder migrate", "encoder give-up", "encoder train",
)  # fmt: skip
APPLIED = {"clicks": [1, 41], "comments": [1, -1]}
TOKEN = tokens.write(tokens.Token(0, b"12345678", 3, {"clicks": 7}, 1, 9, b"settings", 1.5, 1.25, 10, True, b"list"))
EXPLANATION = {
    "bias": -2.0, "rest": 0.25,
    "contributions": [
        {"type": "click", "action": "like", "item_id": "i1", "ts": 1.0, "topic": "clicks", "partition": 1, "offset": 3,
         "value": 1.5},
    ],
}  # fmt: skip
STATE = {
    "user_id": "a/b c", "events": 3, "positives": 2, "consumed": 2, "last_ts": 1.0, "at": 2.0,
    "z": {"behaviour": [], "text": [], "cooccurrence": {}}, "encoder": "e", "model_version": "e/1", "applied": APPLIED,
    "parts": [
        {"name": "behaviour", "norm": 1.25,
         "events": [{"topic": "clicks", "partition": 1, "offset": 3, "share": 0.75}]},
    ],
    "last_events": [
        {"type": "click", "action": "like", "item_id": "i1", "ts": 1.0, "topic": "clicks", "partition": 1, "offset": 3,
         "weight": 1.0, "text": "Alien"},
    ],
}  # fmt: skip
LIST = {"user_id": "a/b c", "token": "v2.x", "model_version": "e/1", "applied": APPLIED}
NEWCOMER = {"item_id": "i7", "score": 0.1, "logit": -0.2, "explanation": {**EXPLANATION, "contributions": []}}
ANSWERS: dict[str, Any] = {
    "/v1/digest": {"partitions": [{"kind": "users", "partition": 1, "applied": {"clicks": 41}, "digest": "ab12"}]},
    "/v1/users/a%2Fb%20c/state": STATE,
    "/v1/users/unknown/state": {**STATE, "user_id": "unknown", "events": 0, "parts": [], "last_events": []},
    "/v1/users/a%2Fb%20c/recommendations": {
        **LIST,
        "items": [
            {"item_id": "i7", "score": 0.125, "logit": -0.25, "text": "Seven\x1b[2J", "explanation": EXPLANATION},
        ],
    },
    "/v1/users/unknown/recommendations": {**LIST, "user_id": "unknown", "items": [NEWCOMER]},
}  # fmt: skip


AUTHORIZATIONS: list[str | None] = []  # of the requests so far
ERASURE = {"erasure_id": "erasures:1:7", "status": "pending", "unlearn": True, "state": None, "changelog": None,
           "remains": None, "model": None, "unlearn_at": None, "store": None, "requested_at": None,
           "completed_at": None, "unlearn_from": None}  # fmt: skip
COMPLETE = {
    **ERASURE, "status": "complete",
    "state": {"events": 4, "behaviours": 3, "seen": 0, "comments": 1, "place": {"clicks": 9},
              "applied": {"clicks": 12}, "digest": "ab12"},
    "changelog": {"topic": "c", "partition": 1, "deleted_before": 50, "naming": 0, "kept": None},
    "model": {"exact": True, "applied": 70, "removed": 3, "messages": 9, "seconds": 1.5, "digest": "cd34",
              "reason": None, "done": True, "progress": 1.0},
    "remains": [{"topic": "clicks", "partition": 1, "records": 4, "first": 1, "last": 9, "until": 86400.0}],
}  # fmt: skip
ANSWERS["/v1/erasures/erasures:1:7"] = COMPLETE
ANSWERS["DELETE /v1/users/a%2Fb%20c"] = ERASURE


FAULTS = {"/anybody/": 401, "/reader/": 403, "/proxy/": 302, "/busy/": 429, "/broken/": 500}


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        """The prepared answer of the path, or a problem."""
        AUTHORIZATIONS.append(self.headers.get("Authorization"))
        self._answer(self.path.partition("?")[0])

    def do_DELETE(self) -> None:
        """As GET."""
        self._answer("DELETE " + self.path.partition("?")[0])

    def _answer(self, asked: str) -> None:
        answer = ANSWERS.get(asked)
        status = 200 if answer else next((s for path, s in FAULTS.items() if path in asked), 503)
        problem = {"type": "/docs#problem-x", "title": "Not so", "detail": "partition 1 is being restored"}
        body = b"<html>" if status == 302 else json.dumps(answer or {**problem, "status": status}).encode()
        self.send_response(status)
        self.send_header("Retry-After", "600")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Silent."""


@pytest.fixture
def http_port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _no_settings(clean_environment: None) -> None:
    """Whatever the machine has set."""


def run(*arguments: str, **settings: object) -> Any:
    """The command's result, with settings in its environment."""
    env = {f"HEADWATER_{name.upper()}": str(value) for name, value in settings.items()}
    return CliRunner().invoke(app, list(arguments), env=env)


def start(*arguments: str, **settings: object) -> subprocess.CompletedProcess[str]:
    """As `run`, in a process of its own: for commands that change theirs."""
    env = {f"HEADWATER_{name.upper()}": str(value) for name, value in settings.items()}
    command = [sys.executable, "-m", "streams", *arguments]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=120)


def test_help_lists_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert f" {command} " in result.stdout


@pytest.mark.parametrize("command", [*COMMANDS, *GROUPED])
def test_help_of_a_command_has_an_example(command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert "Example" in result.stdout
    assert f"headwater {command}" in result.stdout


@pytest.mark.parametrize("command", ["topics", "digest", "worker"])
def test_bad_settings_are_told_on_stderr(command: str) -> None:
    result = run(command, partitions="none")
    assert result.exit_code == 1
    assert "HEADWATER_PARTITIONS='none'" in result.stderr
    assert result.stdout == ""


def test_topics_are_made_then_found_then_refused_with_other_partitions(broker: str) -> None:
    own = {"broker": broker, "topic_prefix": f"cli-{len(broker)}-{broker[-2:]}.", "app_id": "cli"}
    made = run("topics", "--json", **own)
    assert made.exit_code == 0, made.output
    assert {topic["state"] for topic in json.loads(made.stdout)} == {"created"}
    table = run("topics", **own)
    assert table.exit_code == 0
    assert "as planned" in table.stdout
    assert "720 h" in table.stdout
    refused = run("topics", partitions=5, **own)
    assert refused.exit_code == 1
    assert "HEADWATER_PARTITIONS" in refused.stderr


def test_replay_tells_bad_lines_and_exits_with_1(embedded_broker: str, tmp_path: Path) -> None:
    items, events = tmp_path / "items.jsonl", tmp_path / "events.jsonl"
    items.write_text('{"item_id": "a", "text": "A"}\n')
    good = '{"type": "click", "user_id": "u", "item_id": "a", "action": "click", "ts": 1}\n'
    events.write_text(good)
    own = {"broker": embedded_broker, "topic_prefix": "cli-replay."}
    assert run("topics", **own).exit_code == 0
    files = ("--items", str(items), "--events", str(events))
    clean = run("replay", *files, **own)
    assert clean.exit_code == 0, clean.output
    assert "1 items, 1 events" in clean.stdout
    events.write_text(good + "{\n")
    bad = run("replay", *files, "--speed", "1000", **own)
    assert bad.exit_code == 1
    assert f"{events}:2: not_json" in bad.stderr


@pytest.mark.parametrize("speed", ["0", "-3", "fast"])
def test_replay_refuses_a_speed_that_is_none(speed: str) -> None:
    result = run("replay", "--items", "i", "--events", "e", "--speed", speed)
    assert result.exit_code == 2
    assert "number of events per second" in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize("command", ["topics", "worker", "explain"])
def test_no_broker_is_an_error_that_says_what_to_do(command: str, free_port: int) -> None:
    result = start(command, *([TOKEN] if command == "explain" else []), broker=f"127.0.0.1:{free_port}")
    assert result.returncode == 1
    assert "headwater broker" in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["worker", "trainer", "explain"])
def test_topics_that_are_not_there_are_told_and_not_made(command: str, broker: str) -> None:
    """Brokers make a topic that a worker's clients ask for, with partitions and a retention of their own."""
    own = {"broker": broker, "topic_prefix": f"none-{command}.", "app_id": "none"}
    result = start(command, *([TOKEN] if command == "explain" else []), **own)
    assert result.returncode == 1
    assert "headwater topics" in result.stderr and len(result.stderr.splitlines()) == 1
    assert run("topics", **own).exit_code == 0, "all of them are made as planned"


@pytest.mark.long
def test_a_broker_of_several_that_is_away_keeps_no_worker_from_its_start(
    broker: str, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes as far as its encoder: where its first address answers nobody, and where one asked has just gone."""
    own = {"broker": f"127.0.0.1:{free_port},{broker}", "topic_prefix": f"away-{broker[-2:]}.", "app_id": "away"}
    assert run("topics", **own).exit_code == 0
    assert "no such folder" in start("worker", encoder="/no/such", **own).stderr

    def go(*_: object) -> None:
        raise NodeNotReadyError

    monkeypatch.setattr(topics, "require", go)
    _require_topics(Settings())


@pytest.mark.parametrize("arguments", [("evaluate", "--items", "i", "--events", "e"), ("verify",)])
def test_an_encoder_that_is_not_there_is_an_error_that_says_what_to_do(
    arguments: tuple[str, ...], embedded_broker: str, http_port: int
) -> None:
    own = {"broker": embedded_broker, "topic_prefix": "encoder.", "http_port": http_port}
    assert run("topics", **own).exit_code == 0
    result = run(*arguments, encoder="/no/such", **own)
    assert result.exit_code == 1
    assert "HEADWATER_ENCODER" in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments", [("digest",), ("state", "u"), ("recommend", "u")])
def test_no_worker_is_an_error_that_says_what_to_do(arguments: tuple[str, ...], free_port: int) -> None:
    result = run(*arguments, http_port=free_port)
    assert result.exit_code == 1
    assert "headwater worker" in result.stderr


@pytest.mark.parametrize(
    ("user", "advice"),
    [
        ("someone", "takes partitions over answers soon"), ("anybody", "HEADWATER_API_KEY to a key that the worker"),
        ("reader", "headwater keys add NAME --scope SCOPE"), ("proxy", "have to be a worker's"),
        ("busy", "ask less often"), ("broken", "log has the cause"),
    ],
)  # fmt: skip
def test_problem_of_the_worker_is_told_with_what_to_do(user: str, advice: str, http_port: int) -> None:
    result = run("state", user, http_port=http_port)
    assert result.exit_code == 1 and result.stdout == ""
    assert advice in result.stderr and len(result.stderr.splitlines()) == 1
    assert ("partition 1 is being restored" in result.stderr) == (user != "proxy")


def test_of_an_unknown_user_it_is_said_that_nothing_is_known(http_port: int) -> None:
    state = run("state", "unknown", http_port=http_port)
    assert state.exit_code == 1 and "nothing is known of user 'unknown'" in state.stderr
    for_scripts = run("state", "unknown", "--json", http_port=http_port)
    assert for_scripts.exit_code == 1 and for_scripts.stderr == state.stderr
    assert json.loads(for_scripts.stdout)["events"] == 0
    shown = run("recommend", "unknown", http_port=http_port)
    assert shown.exit_code == 0 and "i7" in shown.stdout
    assert "this is what newcomers see" in shown.stderr


def test_nothing_is_drawn_or_coloured_where_nobody_looks(http_port: int) -> None:
    env = {**os.environ, "HEADWATER_HTTP_PORT": str(http_port), "FORCE_COLOR": ""}
    for arguments in (["recommend", "a/b c", "--explain"], ["recommend"]):
        done = subprocess.run(
            [sys.executable, "-m", "streams", *arguments], capture_output=True, text=True, encoding="utf-8", env=env
        )
        told = done.stdout + done.stderr
        assert done.returncode == (2 if arguments == ["recommend"] else 0), told
        assert told.isascii() and "\x1b" not in told, told
    assert "Usage: headwater" in told


def test_digest_state_and_list_are_shown(http_port: int) -> None:
    digest = run("digest", http_port=http_port)
    assert digest.exit_code == 0, digest.output
    assert "ab12" in digest.stdout
    state = run("state", "a/b c", http_port=http_port)
    assert state.exit_code == 0, state.output
    assert "positives" in state.stdout
    assert "like Alien 75%" in state.stdout and "1970-01-01 00:00 UTC" in state.stdout
    shown = run("recommend", "a/b c", "--explain", http_port=http_port)
    assert shown.exit_code == 0, shown.output
    assert "Seven [2J" in shown.stdout
    assert "bias -2.000, like i1 +1.500, rest +0.250" in shown.stdout
    for command in (("digest",), ("state", "a/b c"), ("recommend", "a/b c")):
        printed = run(*command, "--json", http_port=http_port)
        assert json.loads(printed.stdout) in ANSWERS.values()


def test_settings_are_listed_with_their_source(free_port: int) -> None:
    lines = json.loads(run("settings", "--json", partitions=7).stdout)
    assert lines["HEADWATER_PARTITIONS"]["value"] == "7"
    assert lines["HEADWATER_PARTITIONS"]["source"] == "environment"
    assert "HEADWATER_HTTP_PORT" in run("settings").stdout


def test_broker_listens_until_sigterm_and_exits_with_0(free_port: int) -> None:
    command = [sys.executable, "-m", "streams", "broker", "--port", str(free_port)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert f"127.0.0.1:{free_port}" in process.stderr.readline()
        second = subprocess.run(command, capture_output=True, text=True)
        assert second.returncode == 1
        assert "--port" in second.stderr
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_broker_dies_with_a_killed_parent(free_port: int) -> None:
    code = (
        "import sys\nfrom streams.broker import EmbeddedBroker\n"
        f"with EmbeddedBroker({free_port}) as broker:\n print(broker.pid, flush=True)\n sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.kill()
        process.wait()
    ended = threading.Event()
    for _ in range(200):
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or ") Z " in status.read_text():
            return
        ended.wait(0.05)
    raise AssertionError(f"the broker, process {pid}, has outlived its parent")


def test_evaluate_prints_the_figures_and_writes_the_report(tmp_path: Path) -> None:
    items, events, report = tmp_path / "items.jsonl", tmp_path / "events.jsonl", tmp_path / "r.json"
    items.write_text("".join(json.dumps({"item_id": f"i{n}", "text": f"Film {n}"}) + "\n" for n in range(30)))
    clicks = (
        {"type": "click", "user_id": f"u{n % 5}", "item_id": f"i{n % 30}", "action": "click", "ts": n}
        for n in range(150)
    )
    events.write_text("".join(json.dumps(click) + "\n" for click in clicks))
    files = ("--items", str(items), "--events", str(events))
    result = run("evaluate", *files, "--report", str(report), "--baselines", "none", "--against", "frozen")
    assert result.exit_code == 0, result.output
    assert "HR@10" in result.stdout and "A/B by user" in result.stdout
    assert json.loads(report.read_text())["events"] == 150
    absent = run("evaluate", *files, "--against", "nothing")
    assert absent.exit_code == 1 and "no checkpoint 'nothing'" in absent.stderr
    unknown = run("evaluate", *files, "--baselines", "magic")
    assert unknown.exit_code == 2
    missing = run("evaluate", "--items", str(items), "--events", str(tmp_path / "none.jsonl"))
    assert missing.exit_code == 1
    assert "none.jsonl" in missing.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("demo", "--report"),
        *(("evaluate", "--items", "i", "--events", "e", x) for x in ("--report", "--ranks", "--html")),
    ],
)
def test_files_that_cannot_be_written_are_told_before_the_work(arguments: tuple[str, ...], tmp_path: Path) -> None:
    for path, told in ((tmp_path / "none" / "r.json", "no folder"), (tmp_path, "cannot be written")):
        result = run(*arguments, str(path))
        assert result.exit_code == 2
        assert told in " ".join(result.stderr.replace("│", " ").split())


def test_checkpoints_alone_lists_them(tmp_path: Path) -> None:
    alone, listed = (run(*command, checkpoints=tmp_path) for command in (("checkpoints",), ("checkpoints", "list")))
    assert alone.exit_code == listed.exit_code == 0
    assert alone.stdout == listed.stdout and alone.stdout.startswith("checkpoint ")


def test_keys_are_made_listed_and_revoked(tmp_path: Path) -> None:
    path = tmp_path / "keys.jsonl"
    missing = run("keys", "list", api_keys_file=path)
    assert missing.exit_code == 1 and "headwater keys add" in missing.stderr
    made = run("keys", "add", "shop", "--scope", "write", api_keys_file=path)
    assert made.exit_code == 0, made.output
    assert re.fullmatch(r"hw_[0-9a-f]{12}_[\w-]{43}\n", made.stdout)
    secret = made.stdout.strip().partition("_")[2].partition("_")[2]
    listed = run("keys", "list", "--json", api_keys_file=path)
    assert [(k["name"], k["scope"]) for k in json.loads(listed.stdout)] == [("shop", "write")]
    assert secret not in listed.stdout + run("keys", "list", api_keys_file=path).stdout + path.read_text()
    assert run("keys", "add", "shop", "--scope", "read", api_keys_file=path).exit_code == 1
    assert run("keys", "add", "other", "--scope", "root", api_keys_file=path).exit_code == 1
    assert run("keys", "revoke", "shop", api_keys_file=path).exit_code == 0
    assert json.loads(run("keys", "list", "--json", api_keys_file=path).stdout) == []
    unset = run("keys", "add", "shop", "--scope", "read")
    assert unset.exit_code == 1 and "HEADWATER_API_KEYS_FILE" in unset.stderr


def test_the_key_is_sent_and_never_shown(http_port: int) -> None:
    told = run("digest", "--json", http_port=http_port, api_key="hw_123456789abc_hush")
    assert told.exit_code == 0, told.output
    assert AUTHORIZATIONS[-1] == "Bearer hw_123456789abc_hush"
    shown = run("settings", "--json", api_key="hw_123456789abc_hush")
    assert json.loads(shown.stdout)["HEADWATER_API_KEY"]["value"] == "********" and "hush" not in shown.stdout


def test_a_worker_off_the_loopback_address_does_not_start_without_keys() -> None:
    refused = run("worker", http_host="0.0.0.0")
    assert refused.exit_code == 1
    assert "HEADWATER_API_KEYS_FILE" in refused.stderr and "127.0.0.1" in refused.stderr


def test_a_certificate_says_what_was_unlearnt_and_what_is_not_exact() -> None:
    told = [
        ModelUnlearnt(True, 9, 2, 9, 1.5, "d1"), ModelUnlearnt(False, 9, 2, 9, 1.5, "d1", "the adapter has seen them"),
        ModelUnlearnt(False, 9, digest="d1", reason="the log begins at 5"),
    ]  # fmt: skip
    done = "2 examples taken back in 1.5 s; digest d1"
    shown = [done, f"{done}; not exact: the adapter has seen them", "not unlearnt: the log begins at 5"]
    assert [cli_asking._model(model) for model in told] == shown


def test_forget_waits_for_the_certificate_and_shows_what_was_removed_and_what_remains(http_port: int) -> None:
    shown = run("forget", "a/b c", "--unlearn", http_port=http_port)
    assert shown.exit_code == 0, shown.output
    for words in ("erasures:1:7", "3 examples taken back", "cd34", "deleted before offset 50", "1970-01-02 00:00 UTC"):
        assert words in shown.stdout
    assert "asked for" in shown.stderr
    assert json.loads(run("forget", "a/b c", "--json", http_port=http_port).stdout) == COMPLETE
    refused = run("forget", "nobody", http_port=http_port)
    assert refused.exit_code == 1
    assert "Not so" in refused.stderr
