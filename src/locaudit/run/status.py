"""Show progress and the remaining time, which is estimated from the trials that were run since the start.

The same is in the run folder's ``status.json``, for `locaudit status` (`locaudit.store.news`).
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from locaudit.errors import LocauditError
from locaudit.records import NO_METHOD, json_text
from locaudit.store.files import write_atomically
from locaudit.store.folder import has_trials
from locaudit.store.news import STATUS
from locaudit.store.run import load_run
from locaudit.text import readable

SAMPLES = ", samples"
"""Ending of the kinds of work that give a trial more samples; they are timed, but are no trials of their own."""
EVERY = 30.0
"""Seconds between two progress lines when the output is not a terminal."""


class Pace:
    """Average seconds per trial, for each kind of trial (`locaudit.run.audit.pace_of`)."""

    def __init__(self):
        self._trials: Counter[str] = Counter()
        self._seconds: Counter[str] = Counter()  # type: ignore[type-var]

    @property
    def means(self) -> dict[str, float]:
        """Kind of trial -> average seconds."""
        return {method: self._seconds[method] / n for method, n in self._trials.items()}

    def add(self, method: str, n_trials: int, seconds: float) -> None:
        """Count trials that ended. The unedited model is left out, because it takes almost no time."""
        if method != NO_METHOD:
            self._trials[method] += n_trials
            self._seconds[method] += seconds  # type: ignore[assignment]

    def remaining(self, left: Mapping[str, int]) -> float | None:
        """Estimated seconds for the remaining trials. `left` has their number by kind.

        A kind that has not been timed yet is assumed to take as long as the average of the others. Returns None before
        any trial has ended.
        """
        if not self._trials:
            return None
        overall, pace = sum(self._seconds.values()) / sum(self._trials.values()), self.means
        return sum(n * pace.get(method, overall) for method, n in left.items() if method != NO_METHOD)


def describe_seconds(seconds: float) -> str:
    """``40 s``, ``7 min`` or ``3 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


class Meter:
    """Shows messages and progress while an audit runs."""

    def __init__(self, progress: Progress | None, console: Console):
        self._progress, self._console = progress, console
        self._task = None
        self.pace = Pace()
        self.failed: dict[str, str] = {}
        """Group of trials that failed -> why."""
        self._folder: Path | None = None
        self._news: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.time()}
        self._running: dict[str, dict[str, Any]] = {}
        """Group of trials that runs -> where, and since when."""
        self._ended: list[str] = []
        """What early stopping has decided."""
        self._n_workers = 1
        self._left: Counter[str] = Counter()
        self._maybe: Counter[str] = Counter()
        """Work that results may ask for, at most; it is not in `_left` and `_total`."""
        self._started = 0.0
        self._done = self._total = 0
        self._stage = self._counts = ""
        self._is_over = False
        self._lock = threading.RLock()
        """Protects the numbers, because another thread reads them to show them."""

    def say(self, text: str) -> None:
        """Print a line about what is being done."""
        self._stage = text
        self._print(text)
        self._write()

    def _print(self, text: str) -> None:
        self._console.print(readable(text), highlight=False, markup=False, emoji=False)

    def tell(self) -> None:
        """Print one line: trials done of those known, how many may follow, time left, current counts.

        Before the first trial, repeat the last message.
        """
        if not self._total:
            text = f"still at work ({self._stage})" if self._stage else ""
        else:
            parts = [f"{self._done} of {self._total} trials", self.maybe_text(), self.remaining_text(), self._counts]
            text = ", ".join(filter(None, parts))
        if text:
            self._print(text)

    def start(
        self, left: Mapping[str, int], done: int, counts: str = "", maybe: Mapping[str, int] | None = None
    ) -> None:
        """Start counting. `left` has the number of remaining trials by kind; `done` trials were done before.

        `maybe` has the work that may follow from results, at most. More samples are not trials; they take time only.
        """
        with self._lock:
            self._left, self._done, self._total = Counter(left), done, done + _n_trials(left)
            self._maybe = Counter(maybe or {})
            self._counts = counts
            self._started = time.monotonic()
        self._note("running")
        if self._progress:
            self._task = self._progress.add_task("", total=self._total, completed=done, meter=self)

    def add(self, group: Counter[str]) -> None:
        """Note that work which might follow does follow."""
        with self._lock:
            self._maybe -= group
            self._left += group
            self._total += _n_trials(group)
        self._show()

    def rule_out(self, group: Counter[str]) -> None:
        """Note that work which might follow does not."""
        with self._lock:
            self._maybe -= group
        self._show()

    def begin(self, what: str, where: str = "") -> None:
        """Note that a group of trials begins, in this process or at `where`."""
        with self._lock:
            self._started = time.monotonic()
            self._running[what] = {"what": what, "where": where, "since": time.time()}
            self._n_workers = len(self._running)
        if self._progress and self._task is not None:
            self._progress.update(self._task, description=what)
        self._write()

    @property
    def seconds(self) -> float:
        """Seconds since the group began, or since its last part ended."""
        return time.monotonic() - self._started

    def end(self, ended: Counter[str], counts: str = "", what: str = "", seconds: float | None = None) -> None:
        """Note that trials have been stored and judged; `ended` has their number by kind. Time is divided evenly.

        `what` is the group if all of it has ended. `seconds` is what the trials took; None: since the last end.
        """
        with self._lock:
            seconds, n_trials = self.seconds if seconds is None else seconds, ended.total()
            self._running.pop(what, None)
            for kind, n in ended.items():
                self.pace.add(kind, n, seconds * n / n_trials)
            self._started = time.monotonic()
            self._left -= ended
            self._done += _n_trials(ended)
            self._counts = counts
        self._show()

    def fail(self, what: str, group: Counter[str], why: str) -> None:
        """Note that trials have no result after all tries."""
        with self._lock:
            self._left -= group
            self._running.pop(what, None)
            self.failed[what] = why
        self.say(f"{what} failed: {why}")
        self._show()

    def stop(self, text: str) -> None:
        """Note what early stopping has decided."""
        self._ended.append(text)
        self.say(text)

    @contextmanager
    def writing(self, folder: Path) -> Iterator[None]:
        """Inside this context, write the news to the run folder's ``status.json``."""
        self._folder = folder
        self._note("preparing")
        try:
            yield
        except BaseException:
            with suppress(LocauditError, OSError):  # the disk may be full
                self._note("stopped")
            raise
        self._note("finished")

    def _note(self, state: str) -> None:
        self._news["state"] = state
        self._write()

    def skip(self, group: Counter[str]) -> None:
        """Note that trials will not be run, because controls stopped early."""
        with self._lock:
            self._left -= group
            self._total -= _n_trials(group)
        self._show()

    def share(self, group: Counter[str]) -> None:
        """Note that trials are done without being run, because another null has the same place."""
        with self._lock:
            self._left -= group
            self._done += _n_trials(group)
        self._show()

    def _write(self) -> None:
        if self._folder is None:
            return
        with self._lock:
            left = [self.pace.remaining(work) for work in (self._left, self._left + self._maybe)]
            news = self._news | {
                "updated": time.time(),
                "said": self._stage,
                "done": self._done,
                "total": self._total,
                "maybe": _n_trials(self._maybe),
                "running": [*self._running.values()],
                "failed": self.failed,
                "seconds_per_trial": self.pace.means,
                "seconds_left": [None if seconds is None else seconds / self._n_workers for seconds in left],
                "counts": self._counts,
                "ended": self._ended,
            }
        write_atomically(self._folder / STATUS, json_text(news).encode())

    def _show(self) -> None:
        self._write()
        if self._progress and self._task is not None:
            self._progress.update(self._task, completed=self._done, total=self._total)
        elif self._done == self._total and not self._left and not self._maybe and not self._is_over:
            self._is_over = True
            self.tell()

    def maybe_text(self) -> str:
        """``up to 6 more``: trials that may follow from results; empty if there are none."""
        n = _n_trials(self._maybe)
        return f"up to {n} more" if n else ""

    def remaining_text(self) -> str:
        """``about 7 min left``, and ``at most 9 min`` if work may follow; at first ``measuring the pace``."""
        with self._lock:
            least, most = (self.pace.remaining(work) for work in (self._left, self._left + self._maybe))
            if least is None or most is None:
                return "measuring the pace"
            few, many = (
                describe_seconds(max(seconds / self._n_workers - self.seconds, 0.0)) for seconds in (least, most)
            )
            return f"about {few} left" + (f", at most {many}" if many != few else "")


def _n_trials(work: Mapping[str, int]) -> int:
    return sum(n for kind, n in work.items() if not kind.endswith(SAMPLES))


class _Remaining(ProgressColumn):
    def render(self, task: Task) -> Text:
        meter = task.fields["meter"]
        return Text(", ".join(filter(None, [meter.maybe_text(), meter.remaining_text()])), style="cyan")


@contextmanager
def show_progress(enabled: bool = True, every: float | None = None) -> Iterator[Meter]:
    """Show a live bar on a terminal. Elsewhere print a line at least every `every` seconds (None: `EVERY`)."""
    console = Console(stderr=True, quiet=not enabled, soft_wrap=True)
    if not enabled:
        yield Meter(None, console)
        return
    if not console.is_terminal:
        with _telling(Meter(None, console), EVERY if every is None else every) as meter:
            yield meter
        return
    what = TextColumn("{task.description}", markup=False)
    columns = (what, BarColumn(), MofNCompleteColumn(), TextColumn("trials"), _Remaining())
    with Progress(*columns, console=console) as progress:
        yield Meter(progress, progress.console)


@contextmanager
def _telling(meter: Meter, every: float) -> Iterator[Meter]:
    """Print a progress line regularly from a thread, so that lines appear even while a long group of trials runs."""
    ended = threading.Event()

    def tell() -> None:
        while not ended.wait(every):
            meter.tell()

    thread = threading.Thread(target=tell, name="locaudit-progress", daemon=True)
    thread.start()
    try:
        yield meter
    finally:
        ended.set()
        thread.join()


def say_resumed(folders: Sequence[Path], what: str, meter: Meter) -> None:
    """Say how many of several audits were finished before, if it is some but not all of them."""
    begun = [folder for folder in folders if has_trials(folder)]
    n_done = sum(load_run(folder).is_finished for folder in begun)
    if begun and n_done < len(folders):
        meter.say(f"{n_done} of {len(folders)} {what} done, going on")
