"""Progress with an honest remaining time: from the pace of the trials that were really run."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from locaudit.records import NO_METHOD


class Pace:
    """Seconds a trial of each method, from the trials run so far."""

    def __init__(self):
        self._trials: Counter[str] = Counter()
        self._seconds: Counter[str] = Counter()  # type: ignore[type-var]

    def add(self, method: str, n_trials: int, seconds: float) -> None:
        """Count trials that ended; the unedited model's costs next to nothing and says nothing about the others."""
        if method != NO_METHOD:
            self._trials[method] += n_trials
            self._seconds[method] += seconds  # type: ignore[assignment]

    def remaining(self, left: Mapping[str, int]) -> float | None:
        """Seconds for the trials that are left, by method; a method not run yet goes at the others' pace.

        None as long as nothing was timed.
        """
        if not self._trials:
            return None
        overall = sum(self._seconds.values()) / sum(self._trials.values())
        pace = {method: self._seconds[method] / n for method, n in self._trials.items()}
        return sum(n * pace.get(method, overall) for method, n in left.items() if method != NO_METHOD)


def describe_seconds(seconds: float) -> str:
    """``40 s``, ``7 min`` or ``3 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


class Meter:
    """What is shown while an audit runs."""

    def __init__(self, progress: Progress | None, console: Console):
        self._progress, self._console = progress, console
        self._task = None
        self.pace = Pace()
        self._left: Counter[str] = Counter()
        self._started = 0.0
        self._done = self._total = 0

    def say(self, text: str) -> None:
        """A line about the stage."""
        self._console.print(text, highlight=False, markup=False)

    def start(self, left: Mapping[str, int], done: int) -> None:
        """Begin: trials left by method, and done before."""
        self._left, self._done, self._total = Counter(left), done, done + sum(left.values())
        self._started = time.monotonic()
        if self._progress:
            self._task = self._progress.add_task("", total=self._total, completed=done, meter=self)

    def begin(self, what: str) -> None:
        """A group of trials begins."""
        self._started = time.monotonic()
        if self._progress and self._task is not None:
            self._progress.update(self._task, description=what)

    @property
    def seconds(self) -> float:
        """Since the group began, or its last part ended."""
        return time.monotonic() - self._started

    def end(self, method: str, n_trials: int) -> None:
        """Trials have ended, and are stored and judged."""
        self.pace.add(method, n_trials, self.seconds)
        self._started = time.monotonic()
        self._left[method] -= n_trials
        self._done += n_trials
        if self._progress and self._task is not None:
            self._progress.update(self._task, completed=self._done)
        elif self._done == self._total or self._done // 5 > (self._done - n_trials) // 5:
            self.say(f"{self._done} of {self._total} trials, {self.remaining_text()}")

    def skip(self, method: str, n_trials: int) -> None:
        """A group will not run: it is not needed."""
        self._left[method] -= n_trials
        self._total -= n_trials
        if self._progress and self._task is not None:
            self._progress.update(self._task, total=self._total)

    def remaining_text(self) -> str:
        """``about 7 min left``."""
        seconds = self.pace.remaining(self._left)
        if seconds is None:
            return "measuring the pace"
        return f"about {describe_seconds(max(seconds - self.seconds, 0.0))} left"


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
