"""Progress of long work on stderr: a bar on a terminal, a line an item elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        unit = task.fields.get("unit", "")
        return Text(f"{task.speed:,.0f} {unit}/s" if task.speed and unit else "", style="cyan")


class Stage:
    """One stage of work; `advance` by units done, and say which item is worked on."""

    def __init__(
        self, bar: RichProgress | None, description: str, total: float | None, unit: str, quiet: bool
    ) -> None:
        self._bar = bar
        self._quiet = quiet
        self._description = description
        self._unit = unit
        self._done = 0.0
        self._start = time.monotonic()
        self._task = bar.add_task(description, total=total, unit=unit) if bar is not None else None
        self._total = total

    def advance(self, amount: float = 1) -> None:
        self._done += amount
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, amount)

    def update(self, done: float, total: float) -> None:
        """Set the absolute state, as callbacks of (done, total) want it."""
        self._done, self._total = done, total
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total)

    def describe(self, text: str) -> None:
        """Say on a bar how it stands; elsewhere nothing."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=f"{self._description}: {text}")

    def item(self, text: str) -> None:
        """Name the item in work, such as `gsm8k (3 of 12)`."""
        self.describe(text)
        if self._bar is None and not self._quiet:
            seconds = time.monotonic() - self._start
            rate = f", {self._done / seconds:,.0f} {self._unit}/s" if self._unit and self._done and seconds > 0 else ""
            left = ""
            if self._total and self._done:
                left = f", {seconds * (self._total - self._done) / self._done:,.0f} s left"
            sys.stderr.write(f"{self._description}: {text}{rate}{left}\n")
            sys.stderr.flush()


class Progress:
    """Where stages are shown. `Progress(quiet=True)` shows nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self._quiet = quiet

    @contextlib.contextmanager
    def stage(self, description: str, total: float | None = None, unit: str = "") -> Iterator[Stage]:
        if self._quiet or not self.console.is_terminal:
            yield Stage(None, description, total, unit, self._quiet)
            return
        columns = (
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), _Rate(),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        with RichProgress(*columns, console=self.console, speed_estimate_period=120) as bar:
            yield Stage(bar, description, total, unit, False)

    def note(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
