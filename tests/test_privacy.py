"""A worker with keys, used rightly and wrongly: nothing that it writes holds a key or a user's words."""

import asyncio
import base64
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from bench.deployment import Deployment, WorkerProcess
from state.store import RocksDisk
from streams import audit, examples, kafka, keys
from streams.__main__ import app
from streams.audit import Verifier, pseudonym
from streams.datakeys import sealer_of
from streams.settings import Settings

NOW_S = 1_790_000_000.0
DATA_KEY = bytes(range(32))
KEY_SECRET_AT = len("hw_123456789abc_")
WORDS = "my grandmother adored zanzibar lighthouses"
BAD_WORDS = "quixotic marmalade telegrams"
SUPPOSED = "velvet accordion midnight"  # in what-ifs
LEFT_WORDS = "tangerine waltz overture"  # of who is forgotten
USER = "user-sesquipedalian"
LEAVER = "user-antidisestablished"
STRANGER = "user-nobody-asked-for"
WRONG = f"hw_{12 * 'd'}_{43 * 'Q'}"
ITEM_TEXT = "Casablanca: love and war in Morocco"
_numbers = itertools.count()


@pytest.fixture(params=[False, True], ids=["plain", "sealed"])
def deployment(request: pytest.FixtureRequest, broker: str, tmp_path: Path) -> Iterator[Deployment]:
    sealed = {"data_keys": base64.b64encode(DATA_KEY).decode()} if request.param else {}
    path = tmp_path / "keys.jsonl"
    made = {scope: keys.add(path, f"the-{scope}", scope, NOW_S) for scope in keys.SCOPES}
    deployed = Deployment(
        broker, tmp_path, topic_prefix=f"privacy{next(_numbers)}-", partitions=2, api_keys_file=path,
        api_key=made["admin"], log_level="debug", **sealed,
    )  # fmt: skip
    deployed.keys = made  # type: ignore[attr-defined]
    deployed.create_topics()
    yield deployed
    deployed.close()


def use(worker: WorkerProcess, made: dict[str, str]) -> None:
    """Events, reads, what-ifs, an erasure, and every kind of wrong request."""

    def ask(method: str, path: str, key: str | None, **more: Any) -> int:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        with httpx.Client(base_url=worker.settings.http_url(), trust_env=False, timeout=30) as http:
            return http.request(method, path, headers=headers, **more).status_code

    state = f"/v1/users/{USER}/state"
    events = [
        {"type": "click", "user_id": USER, "item_id": "casablanca", "action": "like"},
        {"type": "comment", "user_id": USER, "text": WORDS},
    ]
    assert ask("POST", "/v1/events", made["read"], json=events) == 403
    sent = worker.http.post("/v1/events", json=events, headers={"authorization": f"Bearer {made['write']}"})
    assert sent.status_code == 202, sent.text
    seen = worker.get(state, at_least=sent.json()["positions"])
    assert seen["events"] == 2
    bad = {"type": "comment", "user_id": USER, "text": BAD_WORDS, "ts": "never"}
    assert ask("POST", "/v1/events", made["write"], json=[bad]) == 422
    assert ask("POST", "/v1/events", made["write"], content=BAD_WORDS.encode()) == 415
    assert ask("GET", f"/v1/users/{STRANGER}/state", None) == 401
    assert ask("GET", f"/v1/users/{STRANGER}/state", WRONG) == 401
    assert ask("GET", state, made["read"], params={"at_least": BAD_WORDS}) == 422
    assert ask("GET", "/metrics", None) == ask("GET", "/v1/digest", None) == 401
    assert ask("GET", "/metrics", made["read"]) == 200
    with worker.http.stream("GET", "/v1/stream") as stream:
        assert stream.status_code == 200
    told = {"explain": True, "words": True, "exclude_seen": False}
    what_if = f"/v1/users/{USER}/what-if"
    for user, status in ((USER, 200), (STRANGER, 422)):
        supposed = {"with": [{"type": "comment", "user_id": user, "text": SUPPOSED}]}
        assert ask("POST", what_if, made["admin"], json=supposed, params=told) == status
        assert ask("POST", what_if, made["read"], json=supposed, params=told) == (403 if status == 200 else status)
    assert ask("POST", what_if, made["read"], json={"with": SUPPOSED}) == 400
    lists = f"/v1/users/{USER}/recommendations"
    assert ask("GET", lists, made["write"], params=told) == 403
    worker.wait_until("the words", lambda: WORDS in worker.http.get(lists, params=told).text, 30)


def forget(worker: WorkerProcess, made: dict[str, str]) -> None:
    """A user writes, and is erased; not by a key that may not."""
    path, comment = f"/v1/users/{LEAVER}", {"type": "comment", "user_id": LEAVER, "text": LEFT_WORDS}
    sent = worker.http.post("/v1/events", json=comment).json()["positions"]
    assert worker.get(f"{path}/state", at_least=sent)["events"] == 1
    refused = worker.http.delete(path, headers={"authorization": f"Bearer {made['write']}"})
    assert refused.status_code == 403
    asked = worker.http.delete(path)
    assert asked.status_code == 202
    worker.wait_until("the erasure", lambda: worker.get(asked.headers["location"])["status"] == "complete")


def everything_written(settings: Settings, folder: Path) -> dict[str, bytes]:
    """{what: bytes}: each file under the folder, each store as it reads, each internal topic."""
    found = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for path in settings.state_dir.iterdir():
        if (path / "CURRENT").exists():  # compressed blocks would hide what they hold from the search above
            store = RocksDisk().open(path)
            found[f"{path} as read"] = b"\n".join(key + b"=" + row for key, row in store.items())
            store.close()
    for name, partitions in (
        ("audit", 1), ("examples", 1), ("items-changelog", 1), ("users-changelog", 2), ("catalogue-changelog", 2),
    ):  # fmt: skip
        for partition in range(partitions):
            records = asyncio.run(_log(settings, settings.internal_topic(name), partition))
            found[f"{name}:{partition}"] = b"\n".join(records)
    return found


async def _log(settings: Settings, topic: str, partition: int) -> list[bytes]:
    options = settings.kafka_options()
    end = await kafka.log_end(options, topic, partition)
    if end == 0:
        return []
    batches = kafka.read_log(options, topic, partition, 0, end - 1)
    return [(r.key or b"") + b"=" + (r.value or b"") async for batch in batches for r in batch]


@pytest.mark.embedded
def test_no_key_and_no_word_of_a_user_is_in_what_a_worker_writes(deployment: Deployment) -> None:
    made: dict[str, str] = deployment.keys  # type: ignore[attr-defined]
    worker = deployment.start_worker()
    asyncio.run(_publish_item(deployment.settings))
    worker.wait_ready()
    worker.wait_until("the item", lambda: worker.get("/v1/model")["replica"]["active"] == 1)
    use(worker, made)
    forget(worker, made)
    worker.wait_until("the example", lambda: worker.get("/v1/model")["replica"]["positives"] == 1)
    keys.revoke(deployment.settings.api_keys_file or Path(), "the-read")
    revoked = {"authorization": f"Bearer {made['read']}"}
    assert worker.http.get("/v1/model", headers=revoked).status_code == 401
    code, _ = worker.stop()
    assert code == 0, worker.tail()

    written = everything_written(worker.settings, deployment.folder)
    where = {name for name, content in written.items() if ITEM_TEXT.encode() in content}
    assert any("as read" in name for name in where) and "examples:0" in where  # the search finds what is there
    for secret in [*(key[KEY_SECRET_AT:] for key in made.values()), 43 * "Q", STRANGER]:
        assert [name for name, content in written.items() if secret.encode() in content] == []
    for word in {*" ".join((WORDS, BAD_WORDS, SUPPOSED, LEFT_WORDS)).split()} - {"my"}:
        assert [name for name, content in written.items() if word.encode() in content] == []
    is_sealed = bool(worker.settings.data_keys.get_secret_value())
    users = {n: c for n, c in written.items() if "users-" in n or n == "examples:0"}
    item = examples.item_key("casablanca").to_bytes(8, "little", signed=True)
    assert any(item in c for n, c in users.items() if n != "examples:0") is not is_sealed
    assert any(USER.encode() in content for content in users.values()) is not is_sealed
    assert (b"=\x81" in written["examples:0"]) is is_sealed
    assert not any(key in c for c in written.values() for key in (DATA_KEY, base64.b64encode(DATA_KEY)))
    logs = [content for name, content in written.items() if name.endswith(".log") and "worker" in name]
    assert logs and b"[debug" in b"".join(logs)
    for user in (USER, LEAVER):
        assert not any(user.encode() in content for content in (*logs, written["audit:0"], written["examples:0"]))

    audit_key = audit.audit_key(sealer_of(worker.settings))
    verifier = Verifier(audit_key)
    records = asyncio.run(audit.read(worker.settings, verifier))
    assert verifier.all_faults == [] and records[-1].operation == "closed"
    told = {(r.operation, r.key, r.status, *r.users) for r in records}
    assert told >= {
        ("postEvents", "the-read", 403),
        ("postEvents", "the-write", 202, pseudonym(USER, audit_key)),
        ("getState", "the-admin", 200, pseudonym(USER, audit_key)),
        ("getState", "", 401),
        ("getStream", "the-admin", 200, "*"),
        ("whatIf", "the-admin", 200, pseudonym(USER, audit_key)),
        ("getRecommendations", "the-admin", 200, pseudonym(USER, audit_key)),
        ("deleteUser", "the-write", 403, pseudonym(LEAVER, audit_key)),
        ("deleteUser", "the-admin", 202, pseudonym(LEAVER, audit_key)),
        ("getModel", "", 401),
    }
    _ask_the_audit_log(worker.settings, len(records))


def _ask_the_audit_log(settings: Settings, records: int) -> None:
    """The commands: a clean log, who asked about the user, and a forged record."""
    env = {
        "HEADWATER_BROKER": settings.broker, "HEADWATER_TOPIC_PREFIX": settings.topic_prefix,
        "HEADWATER_DATA_KEYS": settings.data_keys.get_secret_value(),
    }  # fmt: skip

    def run(*command: str) -> Any:
        done = CliRunner().invoke(app, ["audit", *command, "--json"], env=env)
        return done.exit_code, json.loads(done.stdout)

    code, verdict = run("verify")
    assert (code, verdict["records"], verdict["faults"]) == (0, records, [])
    _, shown = run("show", USER)
    assert {r["operation"] for r in shown} == {"postEvents", "getState", "getStream", "whatIf", "getRecommendations"}
    assert run("show", "somebody-else")[1] == [r for r in shown if r["operation"] == "getStream"]
    asyncio.run(_forge(settings))
    code, verdict = run("verify")
    assert code == 1 and len(verdict["faults"]) == 1


async def _forge(settings: Settings) -> None:
    producer = kafka.Producer(settings.kafka_options())
    await producer.start()
    try:
        await producer.send(settings.internal_topic("audit"), audit.PARTITION, [(b"forged", b"{}")])
    finally:
        await producer.stop()


async def _publish_item(settings: Settings) -> None:
    producer = kafka.Producer(settings.kafka_options())
    await producer.start()
    try:
        item = {"item_id": "casablanca", "text": ITEM_TEXT}
        await producer.send_one(settings.topic("items"), b"casablanca", json.dumps(item).encode())
    finally:
        await producer.stop()
