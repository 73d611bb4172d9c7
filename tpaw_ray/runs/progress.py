"""What a person sees while a run goes on: bars on a terminal, a line a stage elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
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
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A stage of `total` items; yields the function that advances its bar. Prints a line at the end."""
        task = self._bars.add_task(visible(name), total=total)
        started, done = time.perf_counter(), 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self._bars.advance(task, count)

        try:
            yield advance
        finally:
            self._bars.remove_task(task)
        seconds = time.perf_counter() - started
        self.say(f"  {name:<28} {done:>7} in {seconds:6.1f} s ({done / max(seconds, 1e-9):.1f}/s)")

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        table = Table(title=Text(visible(title)))
        for column in columns:
            table.add_column(Text(visible(column)), justify="right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(visible(cell)) for cell in row))
        self.console.print(table)


def say(console: Console, text: str) -> None:
    """A line as it stands: neither the terminal nor rich obeys what is in it."""
    console.print(visible(text), markup=False, emoji=False, soft_wrap=True)
