"""Progress with an honest remaining time: from the cost of what is left and the pace of what was really run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text


class Pace:
    """Seconds per unit of cost, for each method, from the trials run so far in this process."""

    def __init__(self):
        self._cost: dict[str, float] = {}
        self._seconds: dict[str, float] = {}

    def add(self, method: str, cost: float, seconds: float) -> None:
        """Count a finished group."""
        self._cost[method] = self._cost.get(method, 0.0) + cost
        self._seconds[method] = self._seconds.get(method, 0.0) + seconds

    def remaining(self, left: dict[str, float]) -> float | None:
        """Seconds for the costs that are left, by method; a method not run yet goes at the others' pace.

        None as long as nothing was timed.
        """
        total = sum(self._cost.values())
        if not total:
            return None
        overall = sum(self._seconds.values()) / total
        return sum(
            cost * (self._seconds[method] / self._cost[method] if self._cost.get(method) else overall)
            for method, cost in left.items()
        )


def describe_seconds(seconds: float) -> str:
    """``40 s``, ``7 min`` or ``3 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


class Meter:
    """What is shown while an audit runs."""

    def __init__(self, progress: Progress | None, console: Console):
        self._progress = progress
        self._console = console
        self._task = None
        self._pace = Pace()
        self._left: dict[str, float] = {}
        self._started = 0.0
        self._done = self._total = 0

    def say(self, text: str) -> None:
        """A line about the stage."""
        self._console.print(text, highlight=False, markup=False)

    def start(self, left: dict[str, float], done: int, total: int) -> None:
        """Begin: costs left by method, trials done before and planned."""
        self._left, self._done, self._total = dict(left), done, total
        if self._progress:
            self._task = self._progress.add_task("", total=total, completed=done, meter=self)

    def begin(self, what: str) -> None:
        """A group of trials begins."""
        self._started = time.monotonic()
        if self._progress and self._task is not None:
            self._progress.update(self._task, description=what)

    def end(self, method: str, cost: float, n_trials: int) -> None:
        """The group has ended and is stored."""
        seconds = time.monotonic() - self._started
        if method != "none":  # the base trial costs next to nothing and says nothing about the pace
            self._pace.add(method, cost, seconds)
        self._left[method] -= cost
        self._done += n_trials
        self._started = time.monotonic()
        if self._progress and self._task is not None:
            self._progress.update(self._task, completed=self._done)
        elif self._done == self._total or self._done // 5 > (self._done - n_trials) // 5:
            self.say(f"{self._done} of {self._total} trials, {self.remaining_text()}")

    def skip(self, method: str, cost: float, n_trials: int) -> None:
        """A group will not run: it is not needed."""
        self._left[method] -= cost
        self._total -= n_trials
        if self._progress and self._task is not None:
            self._progress.update(self._task, total=self._total)

    def remaining_text(self) -> str:
        """``about 7 min left``."""
        seconds = self._pace.remaining(self._left)
        if seconds is None:
            return "measuring the pace"
        seconds = max(seconds - (time.monotonic() - self._started), 0.0)
        return f"about {describe_seconds(seconds)} left"


class _Remaining(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields["meter"].remaining_text(), style="cyan")


@contextmanager
def show_progress(enabled: bool = True) -> Iterator[Meter]:
    """A live bar on a terminal, plain lines elsewhere, nothing when not enabled."""
    console = Console(stderr=True, quiet=not enabled)
    if not (enabled and console.is_terminal):
        yield Meter(None, console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("trials"), _Remaining())
    with Progress(*columns, console=console) as progress:
        yield Meter(progress, progress.console)
