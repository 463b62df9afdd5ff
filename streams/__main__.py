"""The command line. Each command loads what it needs when it runs, so that `--help` answers at once."""

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from streams import cli_asking
from streams.cli import Json, broker_faults, fail, faults, load, offsets, print_json, say, table
from streams.cli_asking import print_list, running_worker
from streams.cli_encoder import encoder_app

if TYPE_CHECKING:
    from streams.audit import Record, Verifier
    from streams.checkpoints import Checkpoints

app = typer.Typer(
    name="headwater",
    help="Learns from clicks and comments as they stream by, and recommends from what it has learnt a moment ago.\n\n"
    "Settings come from the environment (HEADWATER_...): `headwater settings` lists them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

app.add_typer(cli_asking.app)
keys_app = typer.Typer(
    help="The API keys that workers take, in HEADWATER_API_KEYS_FILE.\n\nExample: `headwater keys list`",
    no_args_is_help=True,
)
app.add_typer(keys_app, name="keys")
audit_app = typer.Typer(
    help="Who read or changed which user: the audit topic.\n\nExample: `headwater audit show u42`", no_args_is_help=True
)
app.add_typer(audit_app, name="audit")
checkpoints_app = typer.Typer()
app.add_typer(checkpoints_app, name="checkpoints")
app.add_typer(encoder_app, name="encoder")


def _output(path: Path | None) -> Path | None:
    """A file that can be written when the work is done, however long that takes. Raises BadParameter."""
    if path is None:
        return None
    if not path.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.parent}: make it first, or give another file")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise typer.BadParameter(f"{path} cannot be written: give another file")
    return path


ItemsFile = Annotated[Path, typer.Option("--items", help="The catalogue: items.jsonl or .jsonl.gz.")]
EventsFile = Annotated[Path, typer.Option("--events", help="The events: events.jsonl or .jsonl.gz, in order of time.")]
ReportFile = Annotated[Path | None, typer.Option(callback=_output, help="Write the report to this file, as JSON.")]
FROZEN: Final = "frozen"  # the encoder as it is
TRIAL: Final = ("encoder", "examples", "exposures")  # internal topics of an A/B test
TUNING: Final = ("encoder", "examples", "items-changelog")  # internal topics of the trainer, and of switches by hand
CheckpointName = Annotated[str, typer.Argument(help="The checkpoint's name, or its adapter's.")]


# -- running it


@app.command()
def demo(
    once: Annotated[bool, typer.Option("--once", help="End after the report instead of serving the page.")] = False,
    events: Annotated[int | None, typer.Option(min=1, help="Replay only the first N events.")] = None,
    report: ReportFile = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Of the page (HEADWATER_HTTP_PORT).")] = None,
    state: Annotated[
        Path | None, typer.Option(file_okay=False, help="Keep the worker's state and the log files in this folder.")
    ] = None,
) -> None:  # fmt: skip
    """The whole of it: broker, worker, and the MovieLens 100k stream learnt live; then the page, until Ctrl-C.

    Example: `headwater demo --once --report r.json`
    """
    from streams import demo as show

    overrides = {} if port is None else {"http_port": port}
    settings = load(**overrides)
    with faults():
        show.run(settings, show.Options(once=once, events=events, report=report, state_dir=state), time.time)


@app.command()
def broker(
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Where it listens. Default: 9092.")] = None,
    log_file: Annotated[Path | None, typer.Option(help="Where its own log lines go.")] = None,
) -> None:
    """The embedded broker alone, for development: in memory, on 127.0.0.1, until Ctrl-C.

    Example: `headwater broker --port 9092`
    """
    from streams.broker import EmbeddedBroker
    from streams.settings import EMBEDDED_BROKER_PORT

    _end_on_sigterm()
    with faults(), EmbeddedBroker(port or EMBEDDED_BROKER_PORT, log_file) as running:
        say(f"broker on {running.address}, in memory; end it with Ctrl-C. Topics: headwater topics")
        try:
            code = running.wait()
        except KeyboardInterrupt:
            return
    fail(f"the broker ended by itself, with {code}")


@app.command()
def worker() -> None:
    """One worker against HEADWATER_BROKER, until SIGTERM. Start one a core, each with its own port and state folder.

    Example: `HEADWATER_BROKER=kafka:9092 HEADWATER_STATE_DIR=/var/lib/headwater headwater worker`
    """
    from streams import log
    from streams.keys import Gate
    from streams.settings import one_thread_each

    one_thread_each()
    settings = load()
    with faults():
        gate = Gate.of(settings)
    with broker_faults(settings):
        log.set_up(settings.log_level, settings.log_format)
        from streams import app as worker_app

        worker_app.run(settings, gate, time.time)


@app.command()
def topics(as_json: Json = False) -> None:
    """Makes the topics that are missing and compares the others with what is planned.

    Exit code 1 where a topic has another number of partitions.

    Example: `HEADWATER_PARTITIONS=8 headwater topics`
    """
    from streams import topics as ours

    settings = load()
    with faults():
        reports = ours.ensure(settings)
    if as_json:
        print_json([
            {"topic": r.topic.name, "partitions": r.topic.partitions, "replication": r.topic.replication,
             "configs": dict(r.topic.configs), "state": r.state, "differences": list(r.differences)}
            for r in reports
        ])  # fmt: skip
    else:
        table(
            ["topic", "partitions", "copies", "cleanup", "kept", "holds", "state"],
            [
                [r.topic.name, r.topic.partitions, r.topic.replication, r.topic.configs["cleanup.policy"],
                 _retention(r.topic.configs), r.topic.what, r.state]
                for r in reports
            ],
        )  # fmt: skip
    for report in reports:
        for difference in report.differences:
            say(f"{report.topic.name}: {difference}")
    if any(report.state is ours.State.WRONG for report in reports):
        raise typer.Exit(1)


def _retention(configs: Any) -> str:
    hour_ms = 3_600_000
    if "min.compaction.lag.ms" not in configs:
        return f"{int(configs['retention.ms']) / hour_ms:g} h"
    return f"newest of a key; all of {int(configs['min.compaction.lag.ms']) / hour_ms:g} h"


@app.command()
def replay(
    items: ItemsFile,
    events: EventsFile,
    speed: Annotated[str, typer.Option(help="Events per second, or max.")] = "max",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N events.")] = None,
) -> None:
    """Publishes a recorded stream: the catalogue, then the events in order. Bad lines are reported and skipped.

    Exit code 1 when there were bad lines.

    Example: `headwater replay --items items.jsonl.gz --events events.jsonl.gz --speed 500`
    """
    from streams import replay as tool
    from streams.progress import Bars

    settings = load()
    with faults(), Bars() as bars:
        done = tool.replay(settings, items, events, events_per_s=_speed(speed), limit=limit, progress=bars.bytes_of)
    for line in done.bad_lines:
        say(f"{line.file}:{line.number}: {line.reason}")
    if done.bad > len(done.bad_lines):
        say(f"and {done.bad - len(done.bad_lines)} more")
    print(f"{done.items} items, {done.events} events in {done.seconds:.1f} s ({done.events_per_s:,.0f} events/s)")
    if done.bad:
        fail(f"{done.bad} lines were not published: mend or remove them")


def _speed(speed: str) -> float | None:
    if speed == "max":
        return None
    try:
        events_per_s = float(speed)
    except ValueError:
        events_per_s = 0.0
    if not events_per_s > 0:
        raise typer.BadParameter(f"{speed!r} is neither max nor a number of events per second", param_hint="--speed")
    return events_per_s


@app.command()
def evaluate(
    items: ItemsFile,
    events: EventsFile,
    report: ReportFile = None,
    ranks: Annotated[
        Path | None, typer.Option(callback=_output, help="Write every test's rank to this file, one JSON a line.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(callback=_output, help="Write the report with plots to this file, as one page.")
    ] = None,
    baselines: Annotated[str, typer.Option(help="all, none, or names with commas between.")] = "all",
    until: Annotated[int | None, typer.Option(min=1, help="Stop after about N events.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(file_okay=False, help="Save the state into this folder at the end.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on from a saved state.")] = None,
    encoder: Annotated[
        str, typer.Option(help="A checkpoint: its name in HEADWATER_CHECKPOINTS, or a .safetensors file.")
    ] = "",
    against: Annotated[
        str,
        typer.Option(help="Another checkpoint, or frozen: an A/B test, users split by hash, both learn from all."),
    ] = "",
    as_json: Json = False,
) -> None:
    """Tests, then learns each event of a recorded stream, without a broker: the same code as the workers'.

    Example: `headwater evaluate --items items.jsonl.gz --events events.jsonl.gz --report r.json`
    """
    from streams.settings import one_thread_each

    one_thread_each()
    settings = load()
    with faults():
        from model.encoder import Encoder
        from streams import checkpoints as store
        from streams import evaluate as tool
        from streams.progress import Bars
        from streams.settings import cache_dir

        try:
            chosen = tool.parse_baselines(baselines)
        except ValueError as problem:
            raise typer.BadParameter(str(problem), param_hint="--baselines") from None
        options = tool.EvaluateOptions(
            items=items, events=events, report=report, ranks=ranks, html=html, baselines=chosen, until=until,
            checkpoint=checkpoint, resume=resume, cache=cache_dir() / "vectors",
            adapter=store.find(settings.checkpoints, encoder) if encoder else None, has_rival=bool(against),
            rival=store.find(settings.checkpoints, against) if against not in ("", FROZEN) else None,
        )  # fmt: skip
        base = Encoder(settings.encoder, device=settings.device)
        with Bars() as bars:
            try:
                result = tool.evaluate(
                    options, base, settings.evidence_config(), settings.learner_config(base.dim), bars.steps_of
                )
            except tool.StreamError as problem:
                fail(str(problem))
    if as_json:
        print_json(result)
    else:
        print(tool.render(result))


@app.command()
def trainer() -> None:
    """Tunes the encoder's adapter on the stream, beside the workers, until SIGTERM: candidates, shadow, promotion.

    Example: `HEADWATER_BROKER=kafka:9092 HEADWATER_CHECKPOINTS=s3://models/headwater headwater trainer`
    """
    from streams import log
    from streams.settings import one_thread_each

    one_thread_each()
    settings = load()
    with broker_faults(settings, TUNING):
        log.set_up(settings.log_level, settings.log_format)
        from streams import trainer as tool

        tool.run(settings, time.time)


# -- the encoder's checkpoints


@checkpoints_app.callback(invoke_without_command=True)
def checkpoints(asked: typer.Context) -> None:
    """Checkpoints of the encoder: what the trainer made of the stream. Alone it lists them.

    Example: `headwater checkpoints`
    """
    if asked.invoked_subcommand is None:
        list_checkpoints()


@checkpoints_app.command("list")
def list_checkpoints(as_json: Json = False) -> None:
    """Every checkpoint: state, parent, what it was trained on, its losses and the gate's evidence.

    Example: `headwater checkpoints list`
    """
    import msgspec

    folder = _checkpoints()
    with faults():
        manifests = folder.manifests()
    if as_json:
        print_json([msgspec.to_builtins(manifest) for manifest in manifests])
        return
    rows = []
    for m in manifests:
        loss = f"{m.training['loss_frozen']:.4f} -> {m.training['loss']:.4f}" if "loss" in m.training else ""
        last = m.decisions[-1] if m.decisions else {}
        rows.append([m.name, m.state, m.parent, m.offset, loss, last.get("kind", ""), _e_values(last)])
    table(["checkpoint", "state", "parent", "examples offset", "loss", "last decision", "log10 e"], rows)


def _e_values(decision: dict[str, Any]) -> str:
    if "log10_e_better" not in decision:
        return ""
    better, worse = decision["log10_e_better"], decision["log10_e_worse"]
    return f"better {better:.2f}, worse {worse:.2f} after {decision['tests']} tests"


@checkpoints_app.command("show")
def show_checkpoint(name: CheckpointName, as_json: Json = False) -> None:
    """A checkpoint's manifest, with every decision and its evidence.

    Example: `headwater checkpoints show 000000000209-1f2e3d4c5b6a`
    """
    import msgspec

    folder = _checkpoints()
    with faults():
        told = msgspec.to_builtins(folder.get(name))
    if as_json:
        print_json(told)
        return
    plain = {field: value for field, value in told.items() if not isinstance(value, list | dict)}
    table(["", "manifest"], [[*line] for line in (plain | told["training"]).items()])
    if told["decisions"]:
        names = list(dict.fromkeys(name for decision in told["decisions"] for name in decision))
        table(names, [[decision.get(name, "") for name in names] for decision in told["decisions"]])


@checkpoints_app.command("promote")
def promote_checkpoint(name: CheckpointName) -> None:
    """Switches workers to a checkpoint by a message of the examples log. A running trainer watches it.

    Example: `headwater checkpoints promote 000000000209-1f2e3d4c5b6a`
    """
    settings, folder = load(), _checkpoints()
    with broker_faults(settings, TUNING):
        import asyncio

        from streams import trainer as tool

        manifest = folder.get(name)
        offset = asyncio.run(tool.switch(settings, manifest, folder, taken_back=False))
    say(f"{manifest.name} is in use from offset {offset} of {settings.internal_topic('examples')} on")


@checkpoints_app.command("rollback")
def rollback_checkpoint() -> None:
    """Takes the checkpoint in use back: its parent is in use again, or the encoder as it is.

    Example: `headwater checkpoints rollback`
    """
    settings, folder = load(), _checkpoints()
    with broker_faults(settings, TUNING):
        import asyncio

        from streams import trainer as tool

        current = folder.current()
        if current is None:
            fail(f"no checkpoint of {folder.url} is in use")
        parent = folder.get(current.parent) if current.parent else None
        offset = asyncio.run(tool.switch(settings, parent, folder, taken_back=True))
    told = parent.name if parent is not None else "the encoder as it is"
    say(f"{told} is in use from offset {offset} of {settings.internal_topic('examples')} on")


@checkpoints_app.command("trial")
def try_checkpoint(
    name: Annotated[
        str | None, typer.Argument(help="The challenger: a checkpoint, or frozen for the encoder as it is.")
    ] = None,
    share: Annotated[float, typer.Option(help="Of the users that have the challenger, above 0 and below 1.")] = 0.5,
    end: Annotated[bool, typer.Option("--end", help="End the trial that is on: all have the champion.")] = False,
) -> None:
    """An A/B test on live users: a share of them, by a hash of the id, has texts compared through a checkpoint.

    All events teach one model; what is shown is noted until the trial ends, by --end, promote or rollback. A running
    worker is asked: refused while a trial is on. A challenger that is in use already makes an A/A test of the set-up.

    Example: `headwater checkpoints trial 000000000209-1f2e3d4c5b6a --share .5`
    """
    if end == (name is not None):
        raise typer.BadParameter("name a checkpoint, or give --end")
    from model.adapter import AdapterError
    from model.trial import Trial

    try:
        Trial(None, share, 0)  # as it is stored: a float32
    except AdapterError as problem:
        raise typer.BadParameter(str(problem), param_hint="--share") from None
    settings, folder = load(), _checkpoints()
    with broker_faults(settings, TRIAL):
        import asyncio

        from streams import trainer as tool

        log = settings.internal_topic("examples")
        if end:
            say(f"no trial is on from offset {asyncio.run(tool.end_trial(settings, folder))} of {log} on")
            return
        manifest = None if name in (None, FROZEN) else folder.get(str(name))
        with running_worker() as worker:
            encoder = worker.model()["encoder"]
        if encoder["trial"] is not None:
            fail(f"trial {encoder['trial']['offset']} is on: end it with `headwater checkpoints trial --end` first")
        if encoder["adapter"] == (None if manifest is None else manifest.adapter):
            say("the challenger is what is in use: both arms have the same lists, and a difference is chance (A/A)")
        offset = asyncio.run(tool.try_out(settings, manifest, folder, share))
    told = manifest.name if manifest is not None else "the encoder as it is"
    say(f"trial {offset}: {told} for {share:g} of the users from offset {offset} of {log} on")
    print(offset)


@checkpoints_app.command("report")
def report_trial(
    trial: Annotated[int | None, typer.Option(min=0, help="Its offset. Default: the newest trial.")] = None,
    window: Annotated[
        float, typer.Option(min=1, help="Seconds after a list in which a choice of it counts. The same at every look.")
    ] = 1800,
    as_json: Json = False,
) -> None:
    """A trial's result: how often each arm's lists were chosen from, a mean over users, and how sure that is.

    Reads what was shown, and the events since then; lists whose window is open count nowhere yet. Fix the window
    before the first look: what holds at any look holds for one window. Run it with the workers' settings.

    Example: `headwater checkpoints report --window 1800`
    """
    settings = load()
    with broker_faults(settings, TRIAL):
        import asyncio

        import msgspec

        from streams import trials as tool

        told = asyncio.run(tool.tell(settings, trial, window, time.time()))
    if as_json:
        print_json(msgspec.to_builtins(told))
        return
    say(f"trial {told.trial}: lists since {_moment(told.first_ts)}, the last of {_moment(told.last_ts)}; "
        f"{told.open} whose window is open count nowhere yet")  # fmt: skip
    table(
        ["arm", "adapter", "users", "lists", "chosen from", "of a user's lists", "95 %"],
        [[arm, one.adapter or "the encoder as it is", one.users, one.exposures, one.outcomes, _number(one.rate),
          _between(one.low, one.high)] for arm, one in told.arms.items()],
    )  # fmt: skip
    if told.difference is not None:
        d = told.difference
        print(f"challenger - champion: {d.mean:+.4f}, 95 % {_between(d.low, d.high)}, p {d.p:.3g} (for one look)")
    if told.anytime is not None:
        a = told.anytime
        verdict = f"the challenger is {a.verdict}" if a.verdict else "not decided"
        print(f"first lists of {a.users} users, at any look: 95 % {_between(a.low, a.high)}: {verdict}")
    for note in told.notes:
        say(note)


def _moment(ts: float) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(ts, UTC).isoformat(timespec="seconds")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _between(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"[{low:+.4f}, {high:+.4f}]"


@checkpoints_app.command("prune")
def prune_checkpoints(
    keep: Annotated[int | None, typer.Option(min=0, help="Default: HEADWATER_CHECKPOINTS_KEEP.")] = None,
) -> None:
    """Deletes the oldest checkpoints that are neither in use, nor in shadow, nor in a trial, nor the parent of such.

    Example: `headwater checkpoints prune --keep 5`
    """
    folder = _checkpoints()
    with faults():
        for name in folder.prune(load().checkpoints_keep if keep is None else keep):
            print(name)


def _checkpoints() -> "Checkpoints":
    settings = load()
    with faults():
        from streams.checkpoints import Checkpoints

        return Checkpoints(settings.checkpoints)


# -- holding state against the logs


@app.command()
def verify(as_json: Json = False) -> None:
    """Rebuilds the state of every partition from the logs, in a scratch folder, and compares it with the workers'.

    Twice: from the changelog (what another worker would restore), and from the source topics, as far back as they
    go. Run it with the workers' settings. Exit code 0 only when everything is equal.

    Example: `headwater verify`
    """
    from streams.settings import one_thread_each

    one_thread_each()
    settings = load()
    with running_worker() as client:
        told = client.digest()
    with broker_faults(settings):
        from model.encoder import Encoder
        from streams import verify as tool
        from streams.progress import Bars

        def ask() -> Any:
            return [_digest_of(url) for url in told["workers"]]

        encoder = Encoder(settings.encoder, device=settings.device)
        with Bars() as bars:
            verdicts = tool.verify(settings, ask, encoder, bars.steps_of)
    if as_json:
        print_json({"equal": all(v.is_equal for v in verdicts), "partitions": [v._asdict() for v in verdicts]})
    else:
        table(
            ["state", "partition", "applied", "rows", "changelog", "sources", ""],
            [[v.kind, v.partition, offsets(v.applied), v.rows, v.changelog, v.sources, v.note] for v in verdicts],
        )
    unequal = sum(not v.is_equal for v in verdicts)
    if unequal:
        fail(f"{unequal} of {len(verdicts)} partitions are not proven equal")


def _digest_of(url: str) -> Any:
    with running_worker(url) as client:
        return client.digest()


@app.command()
def explain(
    token: Annotated[str, typer.Argument(help="Of an answer with recommendations or a ranking.")],
    item: Annotated[list[str] | None, typer.Option(help="An item that was ranked; each of them.")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Makes a list of the past again, from the logs: what was shown, and why. Reads whole logs: it may take a while.

    Run it with the workers' settings. Exit code 0 only when the list is the same to the last bit.

    Example: `headwater explain v2.nADECDEy...`
    """
    from streams.settings import one_thread_each

    one_thread_each()
    settings = load()
    from streams import tokens

    try:
        told = tokens.read(token)
    except tokens.TokenError as problem:
        fail(str(problem))
    with broker_faults(settings):
        from model.encoder import Encoder
        from streams import explain as tool
        from streams.progress import Bars

        encoder = Encoder(settings.encoder, device=settings.device)
        with Bars() as bars:
            found = tool.rebuild_list(settings, told, encoder, item or [], bars.steps_of)
    if as_json:
        import msgspec

        print_json({
            "equal": found.is_equal, "user_id": found.user_id, "at": told.at, "kind": tokens.KINDS[told.kind],
            "applied": told.applied, "examples": told.examples, "epoch": told.epoch,
            "items": msgspec.to_builtins(found.items),
        })  # fmt: skip
    else:
        whose = "a user without events" if found.user_id is None else f"user {found.user_id}"
        say(f"{whose}, partition {told.partition} at {offsets(told.applied)}, items at examples {told.examples}")
        print_list(found.items, explain=True)
    if not found.is_equal:
        fail("this is another list than the token's: events were merged long after their time, the model has unlearnt "
              "a user since, or this is another kind of processor than the worker's")  # fmt: skip


# -- keys and the audit log


@keys_app.command("add")
def keys_add(
    name: Annotated[str, typer.Argument(help="Whose key it is: shown in the audit log.")],
    scope: Annotated[str, typer.Option(help="read, write (sends events too) or admin (erases too).")],
) -> None:
    """Makes a key, prints it this once, and keeps its hash. Running workers take it at once.

    Example: `HEADWATER_API_KEYS_FILE=keys.jsonl headwater keys add shop --scope write`
    """
    from streams import keys

    with faults():
        made = keys.add(_keys_file(), name, scope, time.time())
    say("This is the only time that the key is shown; its hash is kept.")
    print(made)


@keys_app.command("list")
def keys_list(as_json: Json = False) -> None:
    """Name, scope, id and age of every key; never the key.

    Example: `headwater keys list --json`
    """
    from streams import keys

    with faults():
        found = list(keys.read(_keys_file()).values())
    if as_json:
        print_json([{"name": k.name, "scope": k.scope, "id": k.id, "created": k.created} for k in found])
    else:
        table(["name", "scope", "id", "created"], [[k.name, k.scope, k.id, k.created] for k in found])


@keys_app.command("revoke")
def keys_revoke(name: Annotated[str, typer.Argument(help="Of the key, as `keys list` shows it.")]) -> None:
    """Takes a key out. Running workers refuse it from the next request on.

    Example: `headwater keys revoke shop`
    """
    from streams import keys

    with faults():
        keys.revoke(_keys_file(), name)
    say(f"revoked: {name}")


def _keys_file() -> Path:
    from streams.settings import Fault

    path = load().api_keys_file
    if path is None:
        raise Fault("set HEADWATER_API_KEYS_FILE to the file of the keys; it is made when it is not there")
    return path


@audit_app.command("verify")
def audit_verify(as_json: Json = False) -> None:
    """Reads the audit topic and finds records that were edited, taken out or put in. Exit code 1 when there are any.

    Keep the last digest of each chain elsewhere: it shows later that the end was not cut off.

    Example: `headwater audit verify`
    """
    from streams import audit

    key = _audit_key()
    verifier = audit.Verifier(key)
    count = len(_audit_records(verifier))
    chains = [
        {"chain": c.name, "first": c.first, "last": c.last_n, "digest": c.last, "closed": c.is_closed}
        for c in verifier.chains.values()
    ]
    found = verifier.all_faults
    if as_json:
        print_json({"records": count, "chains": chains, "faults": found})
    else:
        table(["chain", "first", "last", "digest", "closed"], [list(chain.values()) for chain in chains])
        print(f"{count} records, {len(found)} faults")
    for fault in found:
        say(fault)
    if found:
        raise typer.Exit(1)


@audit_app.command("show")
def audit_show(
    user_id: Annotated[str | None, typer.Argument(help="Only what is about this user.")] = None, as_json: Json = False
) -> None:
    """The records, oldest first; of one user, or of all.

    Example: `headwater audit show u42`
    """
    from datetime import UTC, datetime

    import msgspec

    from streams import audit

    key = _audit_key()
    wanted = None if user_id is None else {audit.pseudonym(user_id, key), audit.EVERYBODY}
    found = [r for r in _audit_records(audit.Verifier(key)) if wanted is None or wanted.intersection(r.users)]
    if as_json:
        print_json([msgspec.to_builtins(r) for r in found])
        return
    rows = [
        [datetime.fromtimestamp(r.ts, UTC).isoformat(timespec="milliseconds"), r.operation, r.status or "",
         r.key, r.address, ", ".join(r.users), r.count, r.request_id]
        for r in found
    ]  # fmt: skip
    table(["time", "operation", "status", "key", "from", "users", "times", "request"], rows)


def _audit_key() -> bytes:
    from streams.audit import audit_key
    from streams.datakeys import sealer_of

    settings = load()
    with faults():
        return audit_key(sealer_of(settings))


def _audit_records(verifier: "Verifier") -> "list[Record]":
    """The records of the audit topic, each checked by the verifier."""
    import asyncio

    from streams import audit, topics

    settings = load()
    with faults():
        topics.require(settings, [f"{settings.app_id}-audit"])
        return asyncio.run(audit.read(settings, verifier))


# -- the settings


@app.command("settings")
def show_settings(as_json: Json = False) -> None:
    """Every setting: its variable, value, unit, where the value came from, and why it is there.

    Example: `HEADWATER_PARTITIONS=8 headwater settings`
    """
    from streams.settings import show

    lines = show(load())
    if as_json:
        print_json({line.variable: line._asdict() for line in lines})
    else:
        table(
            ["variable", "value", "unit", "from", "why"],
            [[x.variable, x.value, x.unit, x.source, x.why] for x in lines],
        )


def _end_on_sigterm() -> None:
    """SIGTERM ends the command as Ctrl-C does, so that blocks are left in order."""
    import signal

    signal.signal(signal.SIGTERM, signal.default_int_handler)


def main() -> None:
    """The command `headwater`."""
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        app.rich_markup_mode = None  # help and usage errors without boxes
    app(prog_name="headwater")


if __name__ == "__main__":
    main()
