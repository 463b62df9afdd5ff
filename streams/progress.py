"""Progress bars on stderr: shown to people, silent where stderr is no terminal but for one line a stage."""

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Bars:
    """`with Bars() as bars:` and then `bars.bytes_of` or `bars.steps_of` as a progress callback; one bar a stage."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._is_shown = console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description:>10}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[count]}"), TimeElapsedColumn(), console=console, disable=not self._is_shown,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}

    def bytes_of(self, stage: str, records: int, done: int, total: int) -> None:
        """Records so far, of a file that is read to `done` of `total` bytes."""
        self._update(stage, done, total, f"{records:,}")

    def steps_of(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` steps."""
        self._update(stage, done, total, f"{done:,} of {total:,}")

    def _update(self, stage: str, done: int, total: int, count: str) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total, count=count)
            if not self._is_shown:
                sys.stderr.write(f"{stage} ...\n")
                sys.stderr.flush()
        self._progress.update(self._tasks[stage], completed=done, total=total, count=count)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
