"""The encoder of a deployment: which it is, training inside it, another one's alignment with it, the move to that."""

import math
import os
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from streams.cli import Json, broker_faults, fail, faults, load, print_json, say, table
from streams.cli_asking import running_worker

if TYPE_CHECKING:
    from streams.settings import Settings

encoder_app = typer.Typer()

Model = Annotated[str, typer.Argument(help="A folder or a Hugging Face id, as HEADWATER_ENCODER takes it.")]


def _finite(value: float | None) -> float | None:
    """For an option: a lower bound lets infinity through."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number")
    return value


@encoder_app.callback(invoke_without_command=True)
def encoder(asked: typer.Context) -> None:
    """The text encoder of a deployment, and the move to another one. Alone it lists those that the app id has had.

    Example: `headwater encoder`
    """
    if asked.invoked_subcommand is None:
        list_encoders()


@encoder_app.command("list")
def list_encoders(as_json: Json = False) -> None:
    """Each encoder of the app id, in the order of their use; where workers answer, what they read by which.

    Example: `headwater encoder list`
    """
    import asyncio

    import msgspec

    from streams import space

    settings = load()
    with broker_faults(settings):
        known = asyncio.run(space.of_deployment(settings)).known
        uses = _uses([one for one in _models(settings, [settings.http_url()]) if one is not None])
    if as_json:
        print_json([{**msgspec.structs.asdict(one), "reads": uses.get(one.number, [])} for one in known])
        return
    rows = [
        [one.number, one.encoder, one.dim, one.state, one.model or "(the default)", ", ".join(uses.get(one.number, []))]
        for one in known
    ]
    table(["number", "encoder", "dim", "state", "model", "reads"], rows)


def _models(settings: "Settings", urls: list[str]) -> list[Any]:
    """What /v1/model of each worker answers, None of one that does not: of all that the first to answer tells of, which
    are then in `urls`."""
    from streams.client import Client
    from streams.failures import HeadwaterError

    def model(url: str) -> Any:
        try:
            with Client(url, settings.api_key.get_secret_value(), retry_s=0) as client:
                return client.model()
        except HeadwaterError:
            return None

    for url in urls:
        first = model(url)
        if first is not None:
            workers = first.get("workers", [])  # none: of a build that does not tell
            urls[:] = dict.fromkeys([*workers, *urls])
            return [model(other) for other in workers] or [first]
    return [None]


def _uses(models: list[Any]) -> dict[int, list[str]]:
    """What the encoders of these numbers read, in words: the items' vectors, and what comes next in the partitions."""
    counts: Counter[tuple[int, str]] = Counter()
    for one in models:
        for topic, partitions in one["encoder"].get("texts", {}).items():
            counts.update((number, topic) for number in partitions.values())
    uses: dict[int, list[str]] = {}
    learner = next((one["learner"] for one in models if one["learner"] is not None), None)
    if learner is not None:
        uses[learner.get("encoder", 0)] = ["items' vectors"]
    for (number, topic), count in sorted(counts.items()):
        uses.setdefault(number, []).append(f"{count} partitions of {topic}")
    return uses


@encoder_app.command()
def align(
    model: Model, out: Annotated[Path, typer.Option(help="Folder to make: an encoder that the workers can use.")]
) -> None:
    """Fits a map from another encoder's vectors into this deployment's space, from the texts of its items.

    The folder is an encoder: `HEADWATER_ENCODER=FOLDER headwater evaluate ...` measures it on a recorded stream, and
    `headwater encoder migrate FOLDER` moves the deployment to it. It names the model, and needs it where it was.

    Example: `headwater encoder align intfloat/e5-small-v2 --out encoders/e5`
    """
    import asyncio

    from streams.settings import one_thread_each

    one_thread_each()
    settings = load()
    with broker_faults(settings):
        from model.encoder import Encoder
        from streams import migrate as tool
        from streams import space
        from streams.progress import Bars

        new = Encoder(model, device=settings.device)
        with Bars() as bars:
            made = asyncio.run(tool.fit(settings, space.place(model), new, out, bars.steps_of))
    fidelity = made.fidelity
    assert fidelity is not None
    say(f"{out}: {made.of} in the space of {made.to}, fitted to {fidelity.texts} texts. On {fidelity.held_out} others "
        f"the cosine of a text's two vectors is {fidelity.cosine:.3f} (of two texts' {fidelity.cosine_others:.3f}); of "
        f"an old vector's 10 nearest among them {fidelity.neighbours:.0%} are the same where those have new vectors, "
        f"{fidelity.neighbours_new:.0%} where its own is new, too, "
        f"{fidelity.neighbours_chance:.0%} by chance")  # fmt: skip


@encoder_app.command()
def migrate(model: Model, as_json: Json = False) -> None:
    """Moves the running deployment to an encoder that `align` has made. Lists are answered all the while.

    The folder must be there, under this path, on every worker's machine. Ended anywhere, run it again: it goes on.

    Example: `headwater encoder migrate /srv/encoders/e5`
    """
    import asyncio

    from streams import log
    from streams.settings import one_thread_each

    one_thread_each()
    settings = load()
    log.set_up("warning", settings.log_format)  # what it does is told by bars
    with running_worker() as client:
        client.model()  # or it says why not
    ask = partial(_models, settings, [settings.http_url()])
    with broker_faults(settings):
        from model.encoder import Encoder
        from streams import migrate as tool
        from streams import space
        from streams.progress import Bars

        new = Encoder(model, device=settings.device)
        with Bars() as bars:
            done = asyncio.run(tool.Migration(settings, space.place(model), new, ask, bars.steps_of).run())
    if as_json:
        print_json(done)
    elif not done["number"]:
        say(f"{done['encoder']} is in use, and always was: there is nothing to do")
    else:
        say(f"{done['encoder']} is in use, number {done['number']}: {done['items']} items read again, "
            f"{done['items_late']} that came meanwhile, in {done['seconds']} s")  # fmt: skip


@encoder_app.command("give-up")
def give_up() -> None:
    """Ends a move that is announced and not in use yet: workers forget the encoder.

    Example: `headwater encoder give-up`
    """
    import asyncio

    from streams import migrate as tool

    settings = load()
    with broker_faults(settings):
        ended = asyncio.run(tool.give_up(settings))
    say(f"the move to {ended.encoder} is given up")


@encoder_app.command()
def train(
    out: Annotated[Path, typer.Option(help="The folder of the trained encoder: for HEADWATER_ENCODER. Made here.")],
    items: Annotated[
        Path | None, typer.Option(help="Recorded files instead of the logs: items.jsonl or .jsonl.gz.")
    ] = None,
    events: Annotated[Path | None, typer.Option(help="With --items: events.jsonl or .jsonl.gz.")] = None,
    until: Annotated[int | None, typer.Option(min=1, help="Train on about the first N events.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of the optimizer.")] = None,
    accumulate: Annotated[int | None, typer.Option(min=1, help="Batches a step.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Of the adapters.")] = None,
    layers: Annotated[int | None, typer.Option(min=0, help="Upper layers with adapters; 0: all.")] = None,
    targets: Annotated[
        str | None, typer.Option(help="Ends of the names of linear modules, commas between; or all-linear.")
    ] = None,
    lr: Annotated[float | None, typer.Option(min=0, callback=_finite, help="Step size.")] = None,
    anchor: Annotated[float | None, typer.Option(min=0, callback=_finite, help="Pull of the frozen vectors.")] = None,
    pairs: Annotated[int | None, typer.Option(min=2, help="Of texts of each kind in a batch.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=4, help="Of a text, in training.")] = None,
    precision: Annotated[str | None, typer.Option(help="bfloat16, float32 or auto: bfloat16 on CUDA.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of all that is drawn.")] = None,
    share: Annotated[
        float | None, typer.Option(min=0.01, max=1, help="Of a core, on a CPU (HEADWATER_TRAINER_SHARE).")
    ] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Trains low-rank adapters inside the encoder on what users did and wrote; nothing is switched on by it.

    Reads the logs of the deployment, or recorded files. Killed, and started again with the same options, it goes on
    where it was; from the logs as long as these still hold what they held. `headwater evaluate` with HEADWATER_ENCODER
    set to the folder tells whether it is better.

    Example: `headwater encoder train --out encoders/monday --items items.jsonl.gz --events events.jsonl.gz`
    """
    from streams.settings import one_thread_each

    if (items is None) != (events is None):
        raise typer.BadParameter("--items and --events go together")
    if precision not in (None, "auto", "bfloat16", "float32"):
        raise typer.BadParameter("auto, bfloat16 or float32", param_hint="--precision")
    one_thread_each()
    settings = load()
    with faults():
        from dataclasses import replace

        from model.lora import LoraTrainingConfig
        from streams import encoder_training as tool
        from streams.evaluate import StreamError
        from streams.progress import Bars

        names = None if targets is None else tuple(name.strip() for name in targets.split(",") if name.strip())
        given: dict[str, Any] = {
            "steps": steps, "accumulate": accumulate, "rank": rank, "layers": layers, "targets": names, "lr": lr,
            "anchor": anchor, "pairs": pairs, "max_tokens": max_tokens, "precision": precision, "seed": seed,
        }  # fmt: skip
        config = replace(LoraTrainingConfig(), **{name: value for name, value in given.items() if value is not None})
        options = tool.TrainOptions(out, items, events, until, share or settings.trainer_share, config)
        if hasattr(os, "SCHED_IDLE"):  # a worker that wakes waits for no slice of it
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        with Bars() as bars:
            try:
                manifest = tool.train(options, settings, time.time, bars.steps_of)
            except StreamError as problem:
                fail(str(problem))
    if as_json:
        print_json(manifest)
        return
    before, after = manifest["held_out"]["before"], manifest["held_out"]["after"]
    rows = [[part, f"{before[part]:.4f}", f"{after[part]:.4f}"] for part in before]
    table(["held-out loss", "before", "after"], rows)
    say(f"{manifest['name']} is in {out}. Is it better? HEADWATER_ENCODER={out} headwater evaluate ...")
