"""The report of repeats: one verdict over several run folders, their spread, and a page that leads to each."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from locaudit.errors import RunFolderError
from locaudit.records import json_text
from locaudit.report import view, write_report
from locaudit.report.figures import new_figure
from locaudit.report.html import inline_svg, render
from locaudit.report.style import ARM_COLOURS, ARM_NAMES, METHOD_TITLES, house_style, require, save, score_title
from locaudit.stats import Repeat, RepeatsVerdict, combine_repeats, read_repeat
from locaudit.store import read_run, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FILE = "repeats.json"
_MARKERS = {"control": "o", "base": "|", "whole": "s", "claim": "D"}


@dataclass(frozen=True)
class Repeats:
    """What the repeats of an audit say."""

    verdict: RepeatsVerdict
    repeats: Mapping[int, Repeat]
    """Those that have scores, by number."""
    unfinished: tuple[str, ...]
    """What is missing, a sentence each."""
    subject: str
    """Model and behaviour."""
    raised: tuple[int, ...]
    """Numbers of repeats planned, in the order they were asked for."""
    registered: view.Registered | None
    """The claim file, and what was changed after, in any of them."""


def repeat_folder(folder: str | Path, number: int) -> Path:
    """Run folder of a repeat."""
    return Path(folder) / f"repeat-{number}"


def is_repeats(folder: str | Path) -> bool:
    """Whether `locaudit audit --repeats` wrote the folder."""
    return (Path(folder) / _FILE).is_file()


def read_plan(folder: str | Path) -> list[int]:
    """Numbers of repeats planned, in the order they were asked for; none in a new folder."""
    return json.loads((Path(folder) / _FILE).read_text(encoding="utf-8"))["planned"] if is_repeats(folder) else []


def write_plan(folder: str | Path, repeats: int) -> None:
    """Note how many repeats are planned before the first is run, so that a later increase shows."""
    planned = read_plan(folder)
    if repeats not in planned:
        Path(folder).mkdir(parents=True, exist_ok=True)
        _write(Path(folder), {"planned": [*planned, repeats]})


def read_repeats(folder: str | Path) -> Repeats:
    """The verdict over the repeats that there are. Raises `RunFolderError` for fewer than two."""
    raised = read_plan(folder)
    found: dict[int, Repeat] = {}
    missing: list[str] = []
    subject = ""
    registered: list[view.Registered] = []
    for number in range(max(raised, default=0)):
        part = repeat_folder(folder, number)
        try:
            with read_run(part) as store:
                n, run = len(store.records()), store.fact("run") or {}
                planned, config = run.get("planned", 0), store.config
                subject = f"{run.get('model', config.model)} on {run.get('behaviour', config.behaviour)}"
                found[number] = read_repeat(store)
                registered += [x] if (x := view.registered(store.fact("registration"), config)) else []
            if n < planned:
                missing.append(f"{part.name}: {n} of {planned} trials.")
        except RunFolderError as error:
            missing.append(f"{part.name}: {error.got}.")
    changed = tuple(dict.fromkeys(change for x in registered for change in x.changed))
    claim_file = replace(registered[0], changed=changed) if registered else None
    return Repeats(combine_repeats(list(found.values())), found, tuple(missing), subject, tuple(raised), claim_file)


def write_repeats(folder: str | Path) -> tuple[Path, Repeats]:
    """Write repeats.json, repeats.html, its figure and each repeat's own report; returns the page and what it says."""
    folder = Path(folder)
    found = read_repeats(folder)
    for number in found.repeats:
        write_report(repeat_folder(folder, number))
    _write(folder, {"planned": found.raised, "unfinished": found.unfinished, **asdict(found.verdict)})
    svg = save(draw_repeats(found), folder / "figures", "repeats")
    score = score_title(found.verdict.score)
    caption = (
        f"{score} on the test questions of each repeat and, on top, the mean over them. Dots: the edit at each random "
        "control location. The other marks: the same edit at the claim and of the whole model, and the unedited model."
    )
    text = render(
        "repeats.html",
        found=found,
        verdict=found.verdict,
        n_planned=max(found.raised),
        svg=inline_svg(svg, "repeats", f"{score} of claim and controls in each repeat."),
        caption=caption,
        titles=METHOD_TITLES,
        score=score,
        short_location=view.short_location,
    )
    write_atomically(folder / "repeats.html", text.encode())
    return folder / "repeats.html", found


def draw_repeats(found: Repeats) -> Figure:
    """Controls, claim, whole model and unedited model, a row a repeat and their mean on top; a panel a method."""
    combined, verdicts = found.verdict, [repeat.verdict for repeat in found.repeats.values()]
    with house_style():
        figure = new_figure(1.6 + 0.32 * (len(verdicts) + 1))
        panels = figure.subplots(1, len(combined.methods), sharex=True, sharey=True, squeeze=False)[0]
        for axis, (name, method) in zip(panels, combined.methods.items(), strict=True):
            parts = [v.methods[name] for v in verdicts]
            n = min(len(v.controls) for v in parts)
            several = [v.controls[:n] for v in parts] if method.same_places else [()]
            marks = {
                "control": [*(v.controls for v in parts), np.mean(several, axis=0)],
                "base": _with_mean([v.base for v in parts]),
                "whole": _with_mean([math.nan if v.whole_model is None else v.whole_model for v in parts]),
                "claim": _with_mean([v.claim for v in parts]),
            }
            for arm, rows in marks.items():
                points = [(x, y) for y, row in enumerate(rows) for x in np.atleast_1d(row) if math.isfinite(x)]
                dot = {"s": 16, "alpha": 0.5, "linewidth": 0} if arm == "control" else {"s": 44, "zorder": 3}
                axis.scatter(*np.reshape(points, (-1, 2)).T, color=ARM_COLOURS[arm], marker=_MARKERS[arm], **dot)
            axis.axhline(len(parts) - 0.5, color="#8c8c8c", linewidth=0.6)
            axis.set_title(f"{METHOD_TITLES[name]}: {method.outcome}, p = {method.p_value:.3f}", loc="left")
            axis.set(xlabel=f"{score_title(combined.score)} on test", ylim=(-0.6, len(parts) + 0.6))
            axis.grid(axis="x", color="#8c8c8c", alpha=0.25, linewidth=0.6)
        labels = [*(f"repeat {number}" for number in found.repeats), "mean"]
        panels[0].set_yticks(range(len(labels)), labels)
        lines = require("matplotlib.lines")
        handles = [
            lines.Line2D([], [], color=ARM_COLOURS[arm], marker=marker, linestyle="", label=ARM_NAMES[arm])
            for arm, marker in _MARKERS.items()
            if arm != "whole" or any(v.whole_model is not None for x in verdicts for v in x.methods.values())
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def _with_mean(values: Sequence[float]) -> list[float]:
    return [*values, float(np.mean(values))]


def _write(folder: Path, values: dict) -> None:
    write_atomically(folder / _FILE, json_text(values).encode())
