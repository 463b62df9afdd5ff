"""All that a fuzzer thinks of, asked of a real worker at every operation: no server error, no broken contract.

Schemathesis makes the requests, of the OpenAPI document that the worker serves, in rounds with a seed each; some name
users, items and positions that are there. The endless stream is opened and left here. Every answer is checked: status,
headers, media type and body have to be told of in the document, and what the document forbids has to be refused.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import httpx
from kafka import KafkaProducer

from bench.chaos import broker_for
from bench.deployment import Deployment, WorkerProcess
from streams import keys

CONFIG: Final = Path(__file__).parent / "schemathesis.toml"
ENDLESS: Final = "getStream"
LOADED: Final = "getOpenapi"  # the document itself: schemathesis asks for it, and leaves it out
ROUND_EXAMPLES: Final = 120  # an operation and phase
ROUND_S_MAX: Final = 600.0
STREAM_REQUESTS: Final = 25  # a round
PHASES: Final = "examples,coverage,fuzzing,stateful"
OPENED: Final = (200, "text/event-stream", "retry: 2000")
REFUSED: Final = (405, "application/problem+json", "")
METHODS: Final = ("GET", "GET", "GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS")
USERS: Final = 8
FILMS: Final = {
    "alien": "Alien. A crew in deep space meets a creature that hunts them. horror, science fiction",
    "blade": "Blade Runner. A detective hunts artificial humans in a dark future city. science fiction",
    "amelie": "Amelie. A shy waitress in Paris mends the lives of others. romance, comedy",
    "notebook": "The Notebook. A poor man and a rich woman fall in love one summer. romance, drama",
    "unforgiven": "Unforgiven. An old gunman takes one last job in the west. western, drama",
    "heat": "Heat. A detective and a thief hunt each other through Los Angeles. crime, drama",
    "up": "Up. An old man flies his house to South America with balloons. animation, comedy",
}


def run(arguments: list[str]) -> dict[str, Any]:
    """`python -m bench fuzz [--requests 10000] [--seed 1] [--keys]`; failures and their requests go to stderr."""
    parser = argparse.ArgumentParser(prog="python -m bench fuzz")
    parser.add_argument("--requests", type=int, default=10_000, help="at least so many, in whole rounds")
    parser.add_argument("--seed", type=int, default=1, help="of the first round")
    parser.add_argument(
        "--keys", action="store_true", help="the worker has a file of keys, and is asked with one of the scope admin"
    )
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name, broker_for("embedded") as address:
        folder = Path(name)
        more: dict[str, Any] = {}
        if asked.keys:
            more["api_keys_file"] = folder / "keys.jsonl"
            more["api_key"] = keys.add(more["api_keys_file"], "fuzzer", "admin", 0.0)
        deployment = Deployment(address, folder, topic_prefix="fuzz-", app_id="bench", partitions=2, **more)
        try:
            deployment.create_topics()
            _publish_films(deployment)
            worker = deployment.start_worker()
            worker.wait_ready()
            worker.wait_until("the catalogue", lambda: worker.get("/v1/model")["replica"]["active"] == len(FILMS))
            return fuzz(worker, folder, asked.seed, asked.requests)
        finally:
            deployment.close()


def _publish_films(deployment: Deployment) -> None:
    producer = KafkaProducer(**deployment.settings.kafka_options())
    for item_id, text in FILMS.items():
        value = json.dumps({"item_id": item_id, "text": text}).encode()
        producer.send(deployment.settings.topic("items"), value, key=item_id.encode())
    producer.flush(timeout=10)
    producer.close()


def fuzz(
    worker: WorkerProcess, folder: Path, seed: int, requests: int, examples: int = ROUND_EXAMPLES, phases: str = PHASES
) -> dict[str, Any]:
    """Rounds of requests to a worker whose state may be thrown away, until there were so many or one has failed.

    examples: of an operation and phase, a round. phases: schemathesis's. A round that could not be run has failed.
    """
    total, rounds, operations = 0, 0, 0
    failures: list[Any] = []
    while total < requests and not failures:
        known = _act(worker, seed + rounds)
        told = _round(worker, folder, seed + rounds, examples, phases, known)
        failures += told["failures"] + told["errors"] + _streams(worker, random.Random(seed + rounds))
        operations = told["operations"]["tested"] + len((ENDLESS, LOADED))
        total += told["test_cases"]["generated"] + STREAM_REQUESTS
        rounds += 1
        print(f"round {rounds}, seed {seed + rounds - 1}: {total} requests", file=sys.stderr)
    server_errors = sum("not_a_server_error" in json.dumps(failure) for failure in failures)
    return {
        "requests": total, "rounds": rounds, "operations": operations, "server_errors": server_errors,
        "violations": len(failures) - server_errors, "failures": failures,
    }  # fmt: skip


def _act(worker: WorkerProcess, seed: int) -> dict[str, list[str]]:
    """Some users do something: parameters that name what is there, for the fuzzer to draw from."""
    films = list(FILMS)
    users = [f"user {n}/{seed}" for n in range(USERS)]
    events: list[dict[str, str]] = []
    for n, user in enumerate(users):
        events += [
            {"type": "click", "user_id": user, "item_id": films[(n + k) % len(films)], "action": "like"}
            for k in range(n)
        ]
        events.append({"type": "comment", "user_id": user, "text": f"a film of {FILMS[films[n % len(films)]][:30]}"})
    answer = worker.http.post("/v1/events", json=events)
    answer.raise_for_status()
    return {
        "path.user_id": users,
        "path.item_id": films,
    }


def _round(
    worker: WorkerProcess, folder: Path, seed: int, examples: int, phases: str, known: dict[str, list[str]]
) -> dict[str, Any]:
    """Schemathesis's report of one run."""
    report, config = folder / f"report-{seed}.json", folder / f"config-{seed}.toml"
    key = worker.settings.api_key.get_secret_value()
    parts = [CONFIG.read_text(encoding="utf-8")]
    for number, (parameter, values) in enumerate(known.items()):
        parts += [f"[dictionaries.known{number}]\nvalues = {json.dumps(values)}\n"]
        parts += [f"[parameters.{json.dumps(parameter)}]\ndictionary = 'known{number}'\nprobability = 0.5\n"]
    config.write_text("\n".join(parts), encoding="utf-8")
    command = [
        str(Path(sys.executable).parent / "schemathesis"), "--no-color", "--config-file", str(config), "run",
        f"{worker.settings.http_url()}/openapi.json", "--exclude-operation-id", ENDLESS, "--seed", str(seed),
        "--max-examples", str(examples), "--phases", phases, "--no-shrink", "--continue-on-failure",
        "--generation-database", "none", "--report-json-path", str(report), "--warnings", "off",
    ]  # fmt: skip
    command += ["--header", f"Authorization: Bearer {key}"] if key else []
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=ROUND_S_MAX)
    if done.returncode != 0:
        print(done.stdout, done.stderr, file=sys.stderr)
    if not report.exists():
        raise RuntimeError(f"schemathesis ended with {done.returncode} and no report:\n{done.stdout[-4000:]}")
    told: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return told


def _streams(worker: WorkerProcess, draw: random.Random) -> list[str]:
    """Opens and leaves the endless stream, by any method and with any query; what was not as the contract has it."""
    faults = []
    for _ in range(STREAM_REQUESTS):
        method, query = draw.choice(METHODS), "".join(draw.choices("a1=&%+/?;", k=draw.randrange(12)))
        with worker.http.stream(method, httpx.URL("/v1/stream").copy_with(query=query.encode())) as answer:
            begins = next(answer.iter_lines()) if answer.status_code == 200 else ""
            told = (answer.status_code, answer.headers["content-type"].partition(";")[0], begins)
        if told != (OPENED if method == "GET" else REFUSED):
            faults.append(f"{method} /v1/stream?{query}: {told}")
    return faults
