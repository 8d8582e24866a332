"""The report of repeats: one verdict over several runs, how much they differ, and a page with links to each run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from locaudit.config import to_dict
from locaudit.config.settings import VARIED, leaves
from locaudit.errors import RunFolderError
from locaudit.records import json_text
from locaudit.report import report_folder, write_report
from locaudit.report.charts import Chart, Series, scatter_chart
from locaudit.report.compare import TITLES, differing, run_row
from locaudit.report.html import render
from locaudit.report.page_tables import make_table
from locaudit.report.style import ARM_COLOURS, ARM_NAMES, score_title
from locaudit.report.tables import Registered, csv_text, read_registered, tabulate
from locaudit.stats.phrases import MethodFacts
from locaudit.stats.repeats import MethodRepeats, Repeat, RepeatsVerdict, combine_repeats
from locaudit.stats.specification import Specification
from locaudit.stats.verdict import MethodVerdict
from locaudit.store.files import write_atomically
from locaudit.store.folder import has_trials
from locaudit.store.repeats import PAGE, PLAN, read_plan, repeat_folder
from locaudit.store.run import Run, load_run
from locaudit.text import plural

_MARKERS = {"control": "o", "base": "^", "whole": "s", "claim": "D"}


@dataclass(frozen=True)
class Repeats:
    """The repeats of an audit and the verdict over them."""

    verdict: RepeatsVerdict
    repeats: Mapping[int, Repeat]
    """The finished repeats, by number."""
    unfinished: tuple[str, ...]
    """What is missing, as one phrase per unfinished repeat."""
    planned: tuple[int, ...]
    """Each number of repeats that was asked for, in order. There are several if the number was raised."""
    subject: str
    """Model and behaviour."""
    registered: Registered | None
    """The claim file, and the settings that were changed after registration; None without a claim file."""
    methods: Mapping[str, MethodFacts]
    reading: Mapping[str, tuple[Any, Any]]
    """As `locaudit.store.run.Run.reading`."""
    runs: Mapping[int, Run]
    """The finished runs, by number."""

    @property
    def varied(self) -> str:
        """What differs between the repeats, in words."""
        split = "" if self.verdict.same_questions else " and question splits"
        words = {"seed": f"training seeds{split}", "primer": "orders of the primer", "wording": "wordings"}
        return ", ".join(words[what] for what in next(iter(self.runs.values())).config.vary)

    @property
    def ordered(self) -> Mapping[str, MethodRepeats]:
        """The methods, beginning with the main one."""
        main = next(iter(self.repeats.values())).verdict.main
        return dict(sorted(self.verdict.methods.items(), key=lambda item: item[0] != main))

    @property
    def asked(self) -> Mapping[str, Mapping[str, str]]:
        """Method -> name of a question -> the question in words, as each repeat asks it."""
        first = next(iter(self.repeats.values())).verdict
        return {name: {q.name: q.asked for q in v.questions} for name, v in first.methods.items()}

    def __repr__(self) -> str:
        return f"Repeats({self.subject})\n{self.verdict!r}"

    @cached_property
    def specification(self) -> Specification:
        """The claim's result under every combination of choices, over all runs."""
        return sum((run.specification for run in self.runs.values()), Specification(()))

    @property
    def extended(self) -> tuple[str, ...]:
        """How repeats were extended after they had results, and what this means for p. Equal texts are given once."""
        return tuple(dict.fromkeys(r.verdict.extended for r in self.repeats.values() if r.verdict.extended))

    @property
    def raised(self) -> str:
        """A phrase about repeats that were added; empty if none were."""
        return f"{', then '.join(map(str, self.planned))} repeats were planned" if len(self.planned) > 1 else ""


def read_repeats(folder: str | Path, **settings: Any) -> Repeats:
    """Combine the finished repeats in a folder into one verdict. `settings` are those of `Run.read_with`.

    Raises `RunFolderError` if fewer than two repeats are finished, or if they are not repeats of one audit.
    """
    planned = read_plan(folder)
    runs: dict[int, Run] = {}
    facts: dict[int, dict[str, Any]] = {}
    missing: list[str] = []
    shared: dict[str, Any] = {}
    for number in range(max(planned, default=0)):
        part = repeat_folder(folder, number)
        if not (part / "trials.sqlite").is_file():
            missing.append(f"{part.name}: not begun")
            continue
        run = load_run(part) if has_trials(part) else None
        if run is None or not run.is_finished:
            n, of, n_unjudged = (len(run.trials), run.manifest.planned, run.n_unjudged) if run else (0, "?", 0)
            more = f" and {plural(n_unjudged, 'answer')} not judged" if n_unjudged else ""
            missing.append(f"{part.name}: {n} of {of} trials{more}")
            continue
        run = runs[number] = run.read_with(**settings)
        facts[number] = _identity(run)
        subject = f"{run.manifest.model} on {run.manifest.behaviour}"
        shared = {"subject": subject, "registered": read_registered(run), "methods": run.manifest.methods}
    if len(runs) < 2:
        raise RunFolderError(
            got=f"{folder} with {plural(len(runs), 'finished repeat')} ({'; '.join(missing) or 'none planned'})",
            expected="at least two",
            remedy="run the audit with --repeats and the same --out; a run that stopped continues",
        )
    _check_alike(facts)
    found = {number: run.as_repeat() for number, run in runs.items()}
    verdict = combine_repeats(list(found.values()), max(planned))
    reading = next(iter(runs.values())).reading
    return Repeats(verdict, found, tuple(missing), tuple(planned), **shared, reading=reading, runs=runs)


def _identity(run: Run) -> dict[str, Any]:
    """Settings and facts that must be the same in all repeats, and ``varied``, which must differ."""
    values = dict(leaves(to_dict(run.config)))
    varied = [(name, values.pop(name)) for what in run.config.vary for name in VARIED[what]]
    for name in ("registered", "loading.device", "loading.device_map"):
        del values[name]
    judges = {aspect: judge.fingerprint for aspect, judge in run.manifest.judges.items()}
    registration = run.manifest.registration
    claim_file = "none" if registration is None else registration.sha256
    return {
        **values,
        "varied": varied,
        "model weights": run.manifest.fingerprint,
        "judges": judges,
        "claim file": claim_file,
    }


def _check_alike(facts: Mapping[int, dict[str, Any]]) -> None:
    differences = [
        f"{name}: {', '.join(f'{x} in repeat-{number}' for number, x in zip(facts, row, strict=True))}"
        for name, row in differing(list(facts.values())).items()
        if name != "varied"
    ]
    varied = [values["varied"] for values in facts.values()]
    if len(set(map(str, varied))) < len(facts):
        differences.append(f"two with the same {' and '.join(name.replace('_', ' ') for name, _ in varied[0])}")
    if differences:
        raise RunFolderError(
            got=f"repeats that are not of one audit ({'; '.join(differences[:5])})",
            expected="audits that differ only in what they vary (`vary`)",
            remedy="run the audit with --repeats again with one set of settings, in another --out",
        )


def write_repeats(folder: str | Path, out: str | Path | None = None, **settings: Any) -> tuple[Path, Repeats]:
    """Write repeats.json, specification.csv, repeats.html and each repeat's own report.

    Returns the page and its content.

    `out` is as in `write_report`, and `settings` as in `Run.read_with`. If `out` is not the repeats' own folder,
    repeats.json is called verdict.json there. Raises the errors of `read_repeats`. Without the extra `report`, raises
    `LocauditError` after writing repeats.json.
    """
    found = read_repeats(folder, **settings)
    target = report_folder(Path(folder), out, found.verdict.score, found.reading)
    values: dict[str, Any] = {"planned": found.planned, "unfinished": found.unfinished, "extended": found.extended}
    values |= asdict(found.verdict)
    if found.registered is not None:
        values["registration"] = found.registered.to_dict()
    if found.reading:
        values["reading"] = found.reading
    values["specification"] = {"summary": found.specification.sentence, "rows": "specification.csv"}
    if found.specification.rows:
        lines = [
            {"repeat": number, **asdict(row)} for number, run in found.runs.items() for row in run.specification.rows
        ]
        write_atomically(target / "specification.csv", csv_text(lines).encode())
    is_own = target.resolve() == Path(folder).resolve()
    write_atomically(target / (PLAN if is_own else "verdict.json"), json_text(values).encode())
    for number, run in found.runs.items():
        own = repeat_folder(folder, number)
        write_report(own, tabulate(run), out=own if is_own else target / own.name)
    alone = [(number, run, v) for number, run in found.runs.items() for v in run.verdict.methods.values()]
    nulls = dict.fromkeys(null for _, _, v in alone for null in v.nulls)
    alike = ("model", "behaviour", "score")
    rows = [{"repeat": number, **run_row(run, v, nulls)} for number, run, v in alone]
    data = {"charts": {f"repeats_{name}": repeats_chart(found, name) for name in found.verdict.methods},
            "tables": {"repeats": make_table("Each repeat alone", rows, TITLES, hidden=alike)},
            "files": {"repeats.json": json_text(values)}}  # fmt: skip
    sections = {"verdict": "Verdict", "repeats": "Repeats"}
    text = render("report/repeats.html", data, found=found, verdict=found.verdict, sections=sections)
    write_atomically(target / PAGE, text.encode())
    return target / PAGE, found


def repeats_chart(found: Repeats, method: str) -> Chart:
    """Scores of controls, claim, whole model and unedited model: a row per repeat, and their means at the top."""
    verdicts = [repeat.verdict.methods[method] for repeat in found.repeats.values()]
    chart = scatter_chart(
        _repeat_series(verdicts, found.verdict.methods[method]),
        xlabel=f"{score_title(found.verdict.score)} on test", ylabel="",
    )  # fmt: skip
    labels = [*(f"repeat {number}" for number in found.repeats), "mean"]
    chart["layout"]["yaxis"] |= {"tickvals": list(range(len(labels))), "ticktext": labels}
    return chart


def repeats_figures(found: Repeats) -> dict[str, list[Chart]]:
    """The chart of each method as one figure (`locaudit.report.figures.write_figures`)."""
    charts = []
    for name, method in found.verdict.methods.items():
        chart, p = repeats_chart(found, name), [f"p{x.where} = {x.p_value:.3f}" for x in method.nulls.values()]
        chart["layout"]["title"] = {"text": f"{found.methods[name].title}: {', '.join(p)}"}
        charts.append(chart)
    return {"repeats": charts}


def _repeat_series(parts: Sequence[MethodVerdict], method: MethodRepeats) -> list[Series]:
    """Scores of each arm by repeat, and their means. Controls have a mean only if all repeats have the same ones."""
    whole = [math.nan if v.whole_model is None else v.whole_model for v in parts]
    by_arm = {"whole": whole, "claim": [v.claim for v in parts], "base": [v.base for v in parts]}
    scores: dict[str, list[Any]] = {"control": [[x for null in v.nulls.values() for x in null.controls] for v in parts]}
    scores |= {arm: [*row, np.mean(row)] for arm, row in by_arm.items()}
    means: list[float] = []
    for name, null in method.nulls.items():
        if null.same_places:
            means += np.mean([v.nulls[name].controls[: null.n_controls] for v in parts], axis=0).tolist()
    scores["control"].append(means)
    series = []
    for arm, rows in scores.items():
        points = [(x, y, True) for y, row in enumerate(rows) for x in np.atleast_1d(row).tolist() if math.isfinite(x)]
        if points:
            look = ARM_NAMES[arm], ARM_COLOURS[arm], _MARKERS[arm], points
            series.append(Series(*look, large=arm not in ("control", "base")))
    return series
