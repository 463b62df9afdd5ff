"""The commands of the text encoder itself: what is done to it, apart from the stream."""

import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from streams.cli import Json, fail, faults, load, print_json, say, table

encoder_app = typer.Typer(
    help="The text encoder itself.\n\nExample: `headwater encoder train --help`", no_args_is_help=True
)


@encoder_app.callback()
def _group() -> None:
    """The text encoder itself: training inside it."""


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
        str | None, typer.Option(help="Ends of the names of linear layers, commas between; or all-linear.")
    ] = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Step size.")] = None,
    anchor: Annotated[float | None, typer.Option(min=0, help="Weight of the distance to the frozen vectors.")] = None,
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
    where it was. `headwater evaluate` with HEADWATER_ENCODER set to the folder tells whether it is better.

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
