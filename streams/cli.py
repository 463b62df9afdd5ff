"""What the commands share: settings, faults in words, tables for people, JSON for scripts."""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn

import typer

if TYPE_CHECKING:
    from streams.settings import Settings

CONTROL: Final = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
ANY_PARTITIONS: Final = (".dlq", "encoder-checkpoints")  # the ends of topics that may have more than planned
Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")]


def load(**overrides: Any) -> "Settings":
    """The settings, or the end of the command."""
    from streams import settings

    with faults():
        return settings.load(**overrides)


@contextmanager
def faults() -> Iterator[None]:
    """The world's faults become a sentence on stderr and exit code 1; a fault of ours keeps its traceback.

    An encoder that cannot be loaded is the world's, too.
    """
    from streams.settings import Fault

    try:
        yield
    except Fault as problem:
        fail(str(problem))
    except KeyboardInterrupt:
        say("interrupted")
        raise typer.Exit(130) from None
    except Exception as problem:
        encoder = sys.modules.get("model.encoder")  # where the command has come so far: torch takes seconds to load
        if encoder is None or not isinstance(problem, encoder.EncoderError):
            raise
        fail(str(problem))


@contextmanager
def broker_faults(settings: "Settings", internal: Sequence[str] | None = None) -> Iterator[None]:
    """As `faults`, where a broker is asked, whose topics have to be there, too: all, or these internal ones."""
    from aiokafka.errors import KafkaError

    with faults():
        _require_topics(settings, internal)
        try:
            yield
        except KafkaError as problem:
            from streams.topics import unreachable

            raise unreachable(settings, problem) from problem


def _require_topics(settings: "Settings", internal: Sequence[str] | None = None) -> None:
    """Raises Fault unless a broker answers and the topics are there, or of these the internal ones named.

    Asked before anything else asks for one: many brokers make a topic that a client asks for, as none of ours may be.
    """
    from kafka.errors import KafkaError

    from streams import topics as ours

    if internal is None:
        names = [topic.name for topic in ours.planned(settings) if not topic.name.endswith(ANY_PARTITIONS)]
    else:
        names = [settings.internal_topic(name) for name in internal]
    with suppress(KafkaError):  # a broker of several is away, and was asked: whoever needs it next waits for it
        ours.require(settings, [name.removeprefix(settings.topic_prefix) for name in names])


def say(line: str) -> None:
    """A line for people, beside the result."""
    print(printable(line), file=sys.stderr, flush=True)


def fail(line: str) -> NoReturn:
    """Ends the command with exit code 1: the line says what to do."""
    say(f"headwater: {line}")
    raise typer.Exit(1)


def print_json(value: Any) -> None:
    """The result for scripts."""
    print(json.dumps(value, ensure_ascii=False))


def table(head: list[str], rows: list[list[Any]]) -> None:
    """The result for people: ruled on a terminal, plain columns elsewhere, without colour and never cut."""
    cells = [[" ".join(printable(str(cell)).split()) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        for line in (head, *cells):
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    ruled = Table(box=box.SIMPLE_HEAD)
    for number, name in enumerate(head):
        ruled.add_column(name, no_wrap=number == 0, overflow="fold")
    for row in cells:
        ruled.add_row(*map(Text, row))
    Console().print(ruled)


def tables(*given: tuple[list[str], list[list[Any]]]) -> None:
    """Several tables (head, rows) as one result; those without rows are left out."""
    for number, (head, rows) in enumerate(filter(lambda one: one[1], given)):
        if number and not sys.stdout.isatty():
            print()
        table(head, rows)


def printable(text: str) -> str:
    """Without control characters: what others wrote moves no cursor of a terminal.

    >>> printable("a\\x1b[2Jb")
    'a [2Jb'
    """
    return CONTROL.sub(" ", text)


def offsets(applied: Any) -> str:
    """Applied offsets in one cell."""
    if isinstance(applied, dict):
        return ", ".join(f"{name} {json.dumps(value)}" for name, value in applied.items())
    return json.dumps(applied)
