"""What is told while a run goes on: to a person bars on a terminal and a line a stage, to a collector of logs JSON lines."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from tpaw_ray.wording import visible


class RateColumn(ProgressColumn):
    """Items a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "", style="cyan")


class Reporter:
    """Speaks to the person on standard output; errors go to standard error elsewhere."""

    structured = False
    """Whether it speaks JSON."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.observers: list[Callable[[str, int, int], None]] = []
        """Told of a stage's name, its items done and their total, as they come."""
        self._bars = Progress(
            TextColumn("{task.description:<28}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            RateColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> "Reporter":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        say(self.console, text)

    @contextmanager
    def stage(self, name: str, total: int, iteration: int | None = None) -> Iterator[Callable[[int], None]]:
        """A stage of `total` items; yields the function that advances its bar. Tells of its end."""
        shown = name if iteration is None else f"[{iteration}] {name}"
        task = self._bars.add_task(visible(shown), total=total)
        started, done = time.perf_counter(), 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self._bars.advance(task, count)
            for observer in self.observers:
                observer(name, done, total)

        try:
            yield advance
        finally:
            self._bars.remove_task(task)
        self._tell_end(name, iteration, shown, done, time.perf_counter() - started)

    def _tell_end(self, name: str, iteration: int | None, shown: str, done: int, seconds: float) -> None:
        self.say(f"  {shown:<28} {done:>7} in {seconds:6.1f} s ({done / max(seconds, 1e-9):.1f}/s)")

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        table = Table(title=Text(visible(title)))
        for column in columns:
            table.add_column(Text(visible(column)), justify="right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(visible(cell)) for cell in row))
        self.console.print(table)


class JsonReporter(Reporter):
    """One JSON object a line: `time` (UTC), `run`, `actor`, and `message`, or of a stage at its end `stage`, `iteration`, `done`,
    `seconds`; of a checkpoint in the table at the end its row."""

    structured = True

    def __init__(self, run: str, stream: TextIO | None = None) -> None:
        super().__init__(Console(file=stream, force_terminal=False))
        self._run, self._stream = run, stream

    def say(self, text: str) -> None:
        self._write(message=text)

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        for row in rows:
            self._write(**dict(zip((column.replace(" ", "_") for column in columns), row, strict=True)))

    def _tell_end(self, name: str, iteration: int | None, shown: str, done: int, seconds: float) -> None:
        self._write(stage=name, iteration=iteration, done=done, seconds=round(seconds, 3))

    def _write(self, **values: object) -> None:
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "run": self._run, "actor": "driver", **values}
        stream = self._stream or sys.stdout
        stream.write(json.dumps(line) + "\n")  # at once: stages that work side by side speak from threads of their own
        stream.flush()


def say(console: Console, text: str) -> None:
    """A line as it stands: neither the terminal nor rich obeys what is in it."""
    console.print(visible(text), markup=False, emoji=False, soft_wrap=True)
