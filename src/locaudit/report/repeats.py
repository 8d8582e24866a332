"""The report of repeats: one verdict over several run folders, their spread, and a page that leads to each."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from locaudit.config import to_dict
from locaudit.config.settings import leaves
from locaudit.errors import RunFolderError
from locaudit.records import json_text
from locaudit.report import view, write_report
from locaudit.report.figures import new_figure
from locaudit.report.html import inline_svg, render
from locaudit.report.style import ARM_COLOURS, ARM_NAMES, METHOD_TITLES, house_style, require, save, score_title
from locaudit.stats import Repeat, RepeatsVerdict, combine_repeats, count_unjudged, read_repeat, run_score
from locaudit.store import Store, read_run, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FILE = "repeats.json"
_PAGE = "repeats.html"
MOST = 1000
"""Repeats of an audit."""
_MARKERS = {"control": "o", "base": "|", "whole": "s", "claim": "D"}


@dataclass(frozen=True)
class Repeats:
    """What the repeats of an audit say."""

    verdict: RepeatsVerdict
    repeats: Mapping[int, Repeat]
    """The finished ones, by number."""
    unfinished: tuple[str, ...]
    """What is missing, a phrase each."""
    planned: tuple[int, ...]
    """Numbers of repeats, in the order they were asked for: more than one if they were raised."""
    subject: str
    """Model and behaviour."""
    registered: view.Registered | None
    """The claim file, and what was changed after."""

    @property
    def raised(self) -> str:
        """What to say of repeats that were added; empty for none."""
        return f"{', then '.join(map(str, self.planned))} repeats were planned" if len(self.planned) > 1 else ""


def repeat_folder(folder: str | Path, number: int) -> Path:
    """Run folder of a repeat."""
    return Path(folder) / f"repeat-{number}"


def is_repeats(folder: str | Path) -> bool:
    """Whether `locaudit audit --repeats` wrote the folder."""
    return (Path(folder) / _FILE).is_file()


def read_plan(folder: str | Path) -> list[int]:
    """Numbers of repeats planned, in the order they were asked for; none in a new folder."""
    if not is_repeats(folder):
        return []
    planned = None
    with suppress(ValueError, AttributeError):
        found = json.loads((Path(folder) / _FILE).read_text(encoding="utf-8"))
        planned = found.get("planned", [found.get("n_repeats")])
    if not isinstance(planned, list) or not planned or not all(type(n) is int and 2 <= n <= MOST for n in planned):
        raise RunFolderError(
            got=f"{Path(folder) / _FILE}, which does not say how many repeats were planned",
            expected=f"the file as it was written, with numbers from 2 to {MOST}",
            remedy="restore it, or delete it and run the same command again",
        )
    return planned


def write_plan(folder: str | Path, repeats: int) -> None:
    """Note how many repeats are planned before they are run, so that a later increase shows.

    A verdict over fewer is taken away.
    """
    planned, folder = read_plan(folder), Path(folder)
    if repeats not in planned:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _PAGE).unlink(missing_ok=True)
        write_atomically(folder / _FILE, json_text({"planned": [*planned, repeats]}).encode())


def read_repeats(folder: str | Path) -> Repeats:
    """The verdict over the finished repeats. Raises `RunFolderError` for fewer than two, or for ones of two audits."""
    planned = read_plan(folder)
    found: dict[int, Repeat] = {}
    facts: dict[int, dict[str, Any]] = {}
    missing: list[str] = []
    subject, registered = "", None
    for number in range(max(planned, default=0)):
        part = repeat_folder(folder, number)
        if not (part / "trials.sqlite").is_file():
            missing.append(f"{part.name}: not begun")
            continue
        with read_run(part) as store:
            run, n, config = store.fact("run") or {}, len(store.done()), store.config
            n_unjudged = count_unjudged(store, store.records())
            if not n or n < run.get("planned", 0) or n_unjudged:
                more = f" and {n_unjudged} answers that were not judged" if n_unjudged else ""
                missing.append(f"{part.name}: {n} of {run.get('planned', '?')} trials{more}")
                continue
            found[number], facts[number] = read_repeat(store), _identity(store)
            subject = f"{run.get('model', config.model)} on {run.get('behaviour', config.behaviour)}"
            registered = view.registered(store.fact("registration"), config, run_score(store))
    if len(found) < 2:
        raise RunFolderError(
            got=f"{folder} with {len(found)} finished repeats ({'; '.join(missing) or 'none planned'})",
            expected="at least two",
            remedy="run the same command again to go on",
        )
    _check_alike(facts)
    verdict = combine_repeats(list(found.values()), max(planned))
    return Repeats(verdict, found, tuple(missing), tuple(planned), subject, registered)


def _identity(store: Store) -> dict[str, Any]:
    """What is the same in all repeats, but for ``training_seed``."""
    values = dict(leaves(to_dict(store.config)))
    for name in ("split.seed", "registered", "loading.device", "loading.device_map"):
        del values[name]
    judges = {slot: judge["fingerprint"] for slot, judge in (store.fact("judges") or {}).items()}
    claim_file = (store.fact("registration") or {}).get("sha256", "none")
    weights = (store.fact("run") or {}).get("fingerprint")
    return {**values, "model weights": weights, "judges": judges, "claim file": claim_file}


def _check_alike(facts: Mapping[int, dict[str, Any]]) -> None:
    first, *others = facts.items()
    differences = [
        f"{name}: {first[1][name]} in repeat-{first[0]}, {value} in repeat-{number}"
        for number, values in others
        for name, value in values.items()
        if name != "training_seed" and value != first[1][name]
    ]
    if len({values["training_seed"] for values in facts.values()}) < len(facts):
        differences.append("two with the same training seed")
    if differences:
        raise RunFolderError(
            got=f"repeats that are not of one audit ({'; '.join(differences[:5])})",
            expected="audits that differ in training seed and split seed alone",
            remedy="run the command that made them again, with the same settings",
        )


def write_repeats(folder: str | Path) -> tuple[Path, Repeats]:
    """Write repeats.json, repeats.html, its figure and each repeat's own report; returns the page and what it says.

    Raises as `read_repeats` does, and `LocauditError` without the extra `report` (repeats.json is there even then).
    """
    folder = Path(folder)
    found = read_repeats(folder)
    values: dict[str, Any] = {"planned": found.planned, "unfinished": found.unfinished, **asdict(found.verdict)}
    if found.registered is not None:
        values["registration"] = {key: value for key, value in asdict(found.registered).items() if key != "text"}
    write_atomically(folder / _FILE, json_text(values).encode())
    for number in found.repeats:
        write_report(repeat_folder(folder, number))
    svg = save(draw_repeats(found), folder / "figures", "repeats")
    score = score_title(found.verdict.score)
    means = all(method.same_places for method in found.verdict.methods.values())
    caption = (
        f"{score} on the test questions of each repeat and, on top, the mean over them"
        + ("" if means else " (of controls only where they are the same places in every repeat)")
        + ". Dots: the edit at each random control location. The other marks: the same edit at the claim and of the "
        "whole model, and the unedited model."
    )
    text = render(
        "report/repeats.html",
        found=found,
        verdict=found.verdict,
        svg=inline_svg(svg, "repeats", f"{score} of claim and controls in each repeat."),
        caption=caption,
        titles=METHOD_TITLES,
        score=score,
        short_location=view.short_location,
    )
    write_atomically(folder / _PAGE, text.encode())
    return folder / _PAGE, found


def draw_repeats(found: Repeats) -> Figure:
    """Controls, claim, whole model and unedited model, a row a repeat and their mean on top; a panel a method."""
    combined, verdicts = found.verdict, [repeat.verdict for repeat in found.repeats.values()]
    with house_style():
        figure = new_figure(1.8 + 0.32 * (len(verdicts) + 1))
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
            axis.set_title(
                f"{METHOD_TITLES[name]}: p = {method.p_value:.3f}\n{method.outcome}", loc="left", linespacing=1.4
            )
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
