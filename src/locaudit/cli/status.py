"""``locaudit status RUN``: what a run is doing now, from any terminal or node that sees its folder."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.live import Live
from rich.text import Text

from locaudit.cli.commands import read_flags, say
from locaudit.errors import RunFolderError
from locaudit.run.status import describe_seconds
from locaudit.store.news import DATABASE, read_news
from locaudit.text import readable

EVERY = 2.0
"""Seconds between two readings of ``--watch``."""
BETWEEN = 60.0
"""Seconds after the end of one of several runs in which ``--watch`` waits for the next one to begin."""


@dataclass(frozen=True)
class _Status:
    folder: tyro.conf.Positional[Path]
    """Folder of a run, or of several: a study, repeats, or any folder with runs in it."""
    watch: bool = False
    """Show it until the run ends (of several runs: until none has run for a minute), or until Ctrl-C."""
    json: bool = False
    """Print it as JSON; of several runs, as an object with the path of each."""


def status(arguments: Sequence[str]) -> None:
    """Parse ``locaudit status RUN [--watch] [--json]`` and print what the run is doing."""
    words = "Say what a run is doing now: trials done, running and failed, pace, time left, and early stopping."
    command = read_flags(_Status, "locaudit status", words, arguments)
    if not command.watch:
        say(_text(command))
        return
    with Live(console=Console(highlight=False), auto_refresh=False) as live:
        while True:
            live.update(Text(readable(_text(command))), refresh=True)
            if not _goes_on(command.folder):
                return
            time.sleep(EVERY)


def _runs(folder: Path) -> list[Path]:
    """The run's folder itself or, if it is no run, those of the runs and of the studies in it, in order of names."""
    if (folder / DATABASE).is_file():
        return [folder]
    return sorted(path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{DATABASE}")) or [folder]


def _read(folder: Path, run: Path) -> dict[str, Any]:
    """The news of a run. Of one among several, an error stands in its place."""
    try:
        return read_news(run)
    except RunFolderError as error:
        if run == folder:
            raise
        return {"state": "unknown", "stored": None, "error": error.line}


def _goes_on(folder: Path) -> bool:
    """Whether something runs. Between two runs of one process, nothing does for a moment."""
    found = [(run, _read(folder, run)) for run in _runs(folder)]
    return any(
        news["state"] in ("preparing", "running")
        or (run != folder and news["state"] == "finished" and news["age"] < BETWEEN)
        for run, news in found
    )


def _text(command: _Status) -> str:
    runs = _runs(command.folder)
    found = {run: _read(command.folder, run) for run in runs}
    if command.json:
        several = {str(run.relative_to(command.folder)): news for run, news in found.items()}
        news = found[runs[0]] if runs == [command.folder] else several
        return json.dumps(news, indent=2)
    return "\n\n".join("\n".join(_lines(run, news)) for run, news in found.items())


def _lines(folder: Path, news: Mapping[str, Any]) -> Iterator[str]:
    stored = news["stored"]
    counted = "" if stored is None else f"{sum(stored.values())} trials stored, {stored.get('diverged', 0)} diverged"
    if "error" in news:
        yield f"{folder}: {news['error']}"
        return
    if "updated" not in news:
        yield f"{folder}: no news{f' ({counted})' if counted else ': nothing was begun here'}"
        return
    yield (
        f"{folder}: {news['state']}, process {news['pid']} on {news['host']}, "
        f"last news {describe_seconds(news['age'])} ago"
    )
    more = f", up to {news['maybe']} more" if news["maybe"] else ""
    yield f"{news['done']} of {news['total']} trials done{more}{f' ({counted})' if counted else ''}"
    least, most = news["seconds_left"]
    if news["state"] == "running" and least is not None:
        few, many = describe_seconds(least), describe_seconds(most)
        yield f"about {few} left" + (f", at most {many}" if many != few else "")
    for kind, seconds in news["seconds_per_trial"].items():
        yield f"{kind}: {seconds:.3g} s a trial"
    if news["state"] == "running":
        for group in news["running"]:
            where = f", {group['where']}" if group["where"] else ""
            yield f"running: {group['what']}{where}, for {describe_seconds(max(time.time() - group['since'], 0.0))}"
    if news["state"] in ("preparing", "running") and news.get("said"):
        yield f"last message: {news['said']}"
    for what, why in news["failed"].items():
        yield f"failed: {what}: {why}"
    yield from filter(None, [news["counts"], *news["ended"]])
