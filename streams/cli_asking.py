"""The commands that ask a running worker, by the same client that other programs use."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
import typer

from streams.cli import Json, fail, faults, load, offsets, print_json, say, table, tables

if TYPE_CHECKING:
    from streams.answers import Certificate, Contribution, Explanation, ModelUnlearnt, PastEvent, RankedItem
    from streams.client import Client
    from streams.failures import HeadwaterError

REASONS_MAX: Final = 3  # of an item, the strongest; --json has all
SHARES_MAX: Final = 3  # of a part of z, the largest
TITLE_CHARS_MAX: Final = 60
WORDS_CHARS_MAX: Final = 28  # of an item's text, in a reason

app = typer.Typer()

UserId = Annotated[str, typer.Argument(help="The user's id, as producers write it.")]


@contextmanager
def running_worker(url: str | None = None) -> Iterator["Client"]:
    """A client of the worker at that address, or of the settings'; its failures end the command and say what to do."""
    settings = load()
    from streams.client import Client
    from streams.failures import HeadwaterError

    with faults(), Client(url or settings.http_url(), settings.api_key.get_secret_value()) as client:
        try:
            yield client
        except HeadwaterError as failure:
            fail(_with_advice(failure))


def _with_advice(failure: "HeadwaterError") -> str:
    from streams import failures

    advice = {
        failures.TimedOut: "it may have much to do; ask again, and see its log",
        failures.NoAnswer: "start one with `headwater worker` or `headwater demo`, or set HEADWATER_HTTP_HOST and "
        "HEADWATER_HTTP_PORT to a running one's",
        failures.NotHeadwater: "HEADWATER_HTTP_HOST and HEADWATER_HTTP_PORT have to be a worker's",
        failures.NotReady: "a worker that starts or takes partitions over answers soon; ask again, or see its log",
        failures.TooManyRequests: "wait, and ask less often",
        failures.WorkerFailed: "the worker's log has the cause, under the request's id",
    }.get(type(failure))
    if isinstance(failure, failures.NotAllowed):
        advice = "set HEADWATER_API_KEY to such a key; `headwater keys add NAME --scope SCOPE` makes one"
        if failure.status == 401:
            advice = "set HEADWATER_API_KEY to a key that the worker knows; `headwater keys add NAME --scope read`"
    return f"{failure}" + (f": {advice}" if advice else "")


@app.command()
def digest(as_json: Json = False) -> None:
    """What each partition of the worker at HTTP_HOST:HTTP_PORT has applied, with the digests of its state.

    Example: `headwater digest --json`
    """
    with running_worker() as client:
        told = client.digest()
    if as_json:
        print_json(told)
        return
    rows = [
        [part["kind"], part["partition"], offsets(part["applied"]), part.get("rows", ""), part["digest"]]
        for part in told["partitions"]
    ]
    table(["state", "partition", "applied", "rows", "digest"], rows)


@app.command()
def state(user_id: UserId, as_json: Json = False) -> None:
    """What is known of a user: counts, last events, the parts of z and the events that made them.

    Example: `headwater state u42`
    """
    with running_worker() as client:
        told = client.state(user_id)
    if as_json:
        print_json(msgspec.to_builtins(told))
    if not told.events:
        fail(f"{_unknown(user_id)}; ids are those that producers send, to the letter")
    if as_json:
        return
    plain = [[name, getattr(told, name)] for name in ("events", "positives", "consumed", "encoder", "model_version")]
    places = {(event.topic, event.offset): event for event in told.last_events}
    last = "" if told.last_ts is None else _moment(told.last_ts)
    made = [
        [part.name, f"{part.norm:.3f}", ", ".join(
            f"{_event(places.get((s.topic, s.offset)), f'{s.topic}:{s.partition}:{s.offset}')} {s.share:.0%}"
            for s in part.events[:SHARES_MAX]
        )]
        for part in told.parts
    ]  # fmt: skip
    events = [
        [_moment(e.ts), e.action or e.type, e.item_id or "", (e.text or "")[:TITLE_CHARS_MAX], f"{e.weight:g}",
         f"{e.topic}:{e.partition}:{e.offset}"]
        for e in told.last_events
    ]  # fmt: skip
    tables(
        (["user", user_id], [*plain, ["last event", last], ["applied", offsets(told.applied)]]),
        (["part of z", "norm", "made by"], made),
        (["last events", "", "item", "text", "weight", "position"], events),
    )


def _unknown(user_id: str) -> str:
    return f"nothing is known of user {user_id!r}: no event of theirs was applied, or they were forgotten"


def _event(event: "PastEvent | Contribution | None", otherwise: str) -> str:
    """An event in few words: what was done, with what."""
    if event is None:
        return otherwise
    return " ".join(filter(None, (event.action or event.type, (event.text or event.item_id or "")[:WORDS_CHARS_MAX])))


@app.command()
def recommend(
    user_id: UserId,
    limit: Annotated[int, typer.Option(min=1, max=200, help="How many items.")] = 10,
    explain: Annotated[bool, typer.Option("--explain", help="Each item with the events that speak for it.")] = False,
    as_json: Json = False,
) -> None:
    """The list that the user would be shown now.

    Example: `headwater recommend u42 --explain`
    """
    with running_worker() as client:
        told = client.recommendations(user_id, limit=limit, explain=explain or not as_json, texts=True)
    if as_json:
        print_json(msgspec.to_builtins(told))
        return
    print_list(told.items, explain)
    if not told.items:
        say("no item is a candidate: send the catalogue to the topic items, or the user has consumed all of it")
    elif not any(item.explanation and item.explanation.contributions for item in told.items):
        say(f"{_unknown(user_id)}; this is what newcomers see")


def print_list(items: "list[RankedItem]", explain: bool) -> None:
    """A list as a table."""
    rows = []
    for rank, item in enumerate(items, 1):
        line: list[Any] = [rank, item.item_id, f"{item.score:.4f}", (item.text or "")[:TITLE_CHARS_MAX]]
        if explain:
            line.append(_reasons(item.explanation) if item.explanation else "")
        rows.append(line)
    table(["", "item", "p", "text", *(["because"] if explain else [])], rows)


def _reasons(explanation: "Explanation") -> str:
    parts = sorted(explanation.contributions, key=lambda part: -abs(part.value))
    named = [f"{_event(part, '')} {part.value:+.3f}" for part in parts[:REASONS_MAX]]
    if len(parts) > REASONS_MAX:
        named.append(f"{len(parts) - REASONS_MAX} more {sum(part.value for part in parts[REASONS_MAX:]):+.3f}")
    return ", ".join([f"bias {explanation.bias:+.3f}", *named, f"rest {explanation.rest:+.3f}"])


@app.command()
def forget(
    user_id: UserId,
    unlearn: Annotated[
        bool, typer.Option("--unlearn", help="Also learn the item model again without this user's events.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Erases a user everywhere and waits until that is complete; then shows the certificate, which names nobody.

    Example: `headwater forget u42 --unlearn`
    """
    steps: list[str] = []

    def on_change(told: "Certificate") -> None:
        step = _erasure_step(told)
        if steps[-1:] != [step]:
            say(f"{told.erasure_id}: {step}")
            steps.append(step)

    with running_worker() as client:
        asked = client.forget(user_id, unlearn=unlearn)
        say(f"{asked.erasure_id}: asked for")
        told = client.erased(asked.erasure_id, on_change=on_change)
    if as_json:
        print_json(msgspec.to_builtins(told))
        return
    remains = [[r.topic, r.partition, r.records, _moment(r.until)] for r in told.remains or ()]
    tables((["erased", told.erasure_id], _certified(told)), (["remains in", "partition", "records", "until"], remains))


def _certified(told: "Certificate") -> list[list[Any]]:
    """The lines of a complete certificate."""
    lines: list[list[Any]] = []
    if told.state is not None:
        state = told.state
        lines += [["events of the row", state.events], ["offsets applied before it", offsets(state.place)]]
        lines += [["partition's digest after it", f"{state.digest} at {offsets(state.applied)}"]]
    if told.changelog is not None:
        cut = told.changelog.kept or f"deleted before offset {told.changelog.deleted_before}"
        lines += [["changelog", f"{cut}; {told.changelog.naming} records name the user"]]
    if told.model is not None:
        lines += [["item model", _model(told.model)]]
    return lines


def _erasure_step(told: "Certificate") -> str:
    if told.status != "running":
        return told.status
    if told.unlearn_at is not None:
        return "the item model is learnt again" + (f", {told.model.progress:.0%}" if told.model else "")
    if told.store is None:
        return "the row is gone; the disk is purged"
    if told.changelog is None:
        return "the changelog is rewritten"
    return "the logs are searched" if told.remains is None else "almost complete"


def _model(model: "ModelUnlearnt") -> str:
    if not model.exact and not model.removed:
        return f"not unlearnt: {model.reason}"
    done = f"{model.removed} examples taken back in {model.seconds:.1f} s; digest {model.digest}"
    return done if model.exact else f"{done}; not exact: {model.reason}"


def _moment(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(unix_s))
