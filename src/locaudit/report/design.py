"""How large should an audit be? Designs with their time and power, and the cheapest one for a target."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from locaudit.behaviours.loaders import load_behaviour
from locaudit.behaviours.splits import split_questions
from locaudit.config import AuditConfig, leaves, merge_config, to_yaml, unknown_names_kept
from locaudit.errors import LocauditError
from locaudit.report.sizing import Sizing, find_sizing
from locaudit.stats.design import (
    Size,
    gain_power,
    lead_power,
    questions_for,
    sameness_power,
    smallest_gain,
    smallest_lead,
    smallest_margin,
)
from locaudit.stats.phrases import where
from locaudit.stats.questions import LEAST_FOR_NO
from locaudit.stats.scores import find_score
from locaudit.stats.verdict import Verdict
from locaudit.store.files import write_atomically
from locaudit.store.run import Run

DESIGN = "design.yaml"
"""File in a run folder with the settings of the design that was chosen."""
_FACTORS = (1, 1.5, 2, 3, 4, 6, 8)
"""Numbers of test questions in the table, by that of the run."""
_MOST_ROWS = 10


@dataclass(frozen=True)
class Target:
    """What an audit should see."""

    lead: float = 0.05
    """A true lead of the claim over random places."""
    gain: float | None = None
    """A true gain over the unedited model; None if it does not matter."""
    power: float = 0.8
    """Probability with which it should see them."""
    margin: float = 0.05
    """Margin within which a claim may be shown to be like random places."""

    @property
    def words(self) -> str:
        """The target, to follow a verb."""
        gain = "" if self.gain is None else f" and a gain of {rounded(self.gain, 3)}"
        return f"a lead of {rounded(self.lead, 3)}{gain} with {percent(self.power)} power"


@dataclass(frozen=True)
class Row:
    """A design, its time and its power."""

    size: Size
    seconds: float
    """Of the whole audit, without loading the model and preparing."""
    gain: float
    lead: float
    same: float
    """NaN with fewer than `LEAST_FOR_NO` questions, because no verdict says "no" then."""


def count_questions(config: AuditConfig) -> int | None:
    """How many test questions the behaviour has with this split; None if it cannot be read any more."""
    s = config.split
    try:
        return len(
            split_questions(
                load_behaviour(config.behaviour, columns=config.behaviour_columns), s.fractions, seed=s.seed
            ).test
        )
    except LocauditError:
        return None


def make_row(sizing: Sizing, size: Size, target: Target) -> Row:
    """The time of a design, and its power for the target. Without a target gain, that of the lead is taken."""
    gain = target.lead if target.gain is None else target.gain
    return Row(
        size,
        sizing.seconds(size),
        gain_power(sizing.parts[0], size, gain, sizing.level),
        lead_power(sizing.parts, size, target.lead, sizing.level),
        sameness_power(sizing.parts, size, target.margin, sizing.level / 2)
        if size.questions >= LEAST_FOR_NO
        else math.nan,
    )


def alternatives(run: Run, sizing: Sizing) -> Iterator[Size]:
    """Numbers of samples, controls and seeds that the run could grow to, the largest last. A claim file's stay."""
    now, held = sizing.size, {}
    if run.manifest.registration is not None:
        held = dict(leaves(run.manifest.registration.values))
    least = math.ceil(1 / sizing.level - 1e-9) - 1  # 19 at level .05: the smallest number with p <= level
    controls = {now.controls} | {n for n in (least, 2 * least + 1) if n > now.controls and "controls" not in held}
    grows = sizing.knows_samples and "evaluation.samples" not in held
    samples = {now.samples * factor for factor in ((1, 2, 4) if grows else (1,))}
    seeds = {now.seeds * factor for factor in ((1, 2) if now.seeds > 1 else (1,))}
    for k, n, s in product(sorted(samples), sorted(controls), sorted(seeds)):
        yield replace(now, samples=k, controls=n, seeds=s)


def _power_of(sizing: Sizing, target: Target) -> Callable[[Size], float]:
    """The power for the target by size: the smaller one of lead and gain, if both are wanted."""

    def power(size: Size) -> float:
        lead = lead_power(sizing.parts, size, target.lead, sizing.level)
        if target.gain is None:
            return lead
        return min(lead, gain_power(sizing.parts[0], size, target.gain, sizing.level))

    return power


def find_cheapest(run: Run, sizing: Sizing, target: Target, most: int) -> Row | None:
    """The design with the target's power that takes least time, with at most `most` test questions; None if none has.

    Nothing is smaller than in the run, so that the run can grow to the design.
    """
    found = []
    for size in alternatives(run, sizing):
        needed = questions_for(_power_of(sizing, target), size, target.power)
        n = None if needed is None else max(needed, sizing.size.questions)
        if n is not None and n <= most:
            found.append(make_row(sizing, replace(size, questions=n), target))
    return min(found, key=lambda row: row.seconds, default=None)


def choose_rows(run: Run, sizing: Sizing, target: Target, most: int) -> list[Row]:
    """The planned design, then those that no other beats both in time and in power for the lead."""
    now = sizing.size
    numbers = sorted({min(most, round(now.questions * factor)) for factor in _FACTORS} | {most})
    sizes = [replace(size, questions=n) for size in alternatives(run, sizing) for n in numbers]
    rows = sorted((make_row(sizing, size, target) for size in sizes), key=lambda row: (row.seconds, -row.lead))
    kept: list[Row] = []
    for row in rows:
        if row.size != now and row.lead > max((x.lead for x in kept), default=0.0) + 0.005:
            kept.append(row)
    step = max(1, math.ceil(len(kept) / _MOST_ROWS))
    return [make_row(sizing, now, target), *kept[::-1][::step][::-1]]


def changes(run: Run, size: Size) -> dict[str, Any]:
    """The settings by which a design differs from the run."""
    found: dict[str, Any] = {}
    if size.controls != run.config.controls:
        found["controls"] = size.controls
    if size.questions != len(run.questions["test"]):
        found["split"] = {"max_test": size.questions}
    if size.samples > max(run.manifest.samples, 1):
        found["evaluation"] = {"samples": size.samples}
    return found


def write_design(run: Run, size: Size, path: Path) -> None:
    """Write all settings of the design as YAML, for ``locaudit audit PATH``."""
    with unknown_names_kept():
        write_atomically(path, to_yaml(merge_config(run.config, changes(run, size))).encode())


def read_verdict(run: Run) -> Verdict:
    """The verdict of a run, with its last line: what the audit could have seen, and the way to more."""
    verdict = run.verdict
    return replace(verdict, power=power_sentence(run, verdict.main)) if verdict.main else verdict


def power_sentence(run: Run, method: str | None = None, power: float = 0.8, folder: str = "RUN") -> str:
    """The last line of a verdict: the lead that the audit as planned sees, and the way to half of it.

    Against all nulls that can test at once, noise of questions included. Empty if the run cannot say.
    """
    sizing = find_sizing(run, method)
    if sizing is None:
        return ""
    lead = smallest_lead(sizing.parts, sizing.size, power, sizing.level)
    if math.isinf(lead):
        return ""
    half = float(f"{lead / 2:.1g}")
    said = f"{percent(power)} of such audits would find a true lead of {rounded(lead)} or more."
    most = count_questions(run.config) or sizing.size.questions
    row = find_cheapest(run, sizing, Target(half, power=power), most)
    if row is None:
        controls = max(size.controls for size in alternatives(run, sizing))
        way = f"A lead of {rounded(half)} takes more than the behaviour's {most} test questions and {controls} controls"
    else:
        more = duration(sizing.more(row.size))
        way = f"To find a lead of {rounded(half)}, use {_words(row.size, sizing)}, about {more} more"
    return f"{said} {way} (`locaudit design {folder} --lead {rounded(half)}`)."


@dataclass(frozen=True)
class Designs:
    """Larger audits that a run could grow to, with their time and their power for half the lead that it sees."""

    rows: tuple[Row, ...]
    lead: str
    """The lead whose power is given, in words."""


def read_designs(run: Run, method: str | None = None, power: float = 0.8) -> Designs | None:
    """The planned design and larger ones (`choose_rows`); None if the run cannot say."""
    sizing = find_sizing(run, method)
    lead = math.inf if sizing is None else smallest_lead(sizing.parts, sizing.size, power, sizing.level)
    if sizing is None or math.isinf(lead):
        return None
    half = float(f"{lead / 2:.1g}")
    most = count_questions(run.config) or sizing.size.questions
    return Designs(tuple(choose_rows(run, sizing, Target(half, power=power), most)), rounded(half))


def describe_design(run: Run, sizing: Sizing, target: Target, path: Path | None = None) -> str:
    """The table of designs, and the cheapest one for the target as YAML, which is also written to `path`."""
    available, now, level = count_questions(run.config), sizing.size, sizing.level
    most = max(available or 0, now.questions)
    nulls = " and ".join(f"random places{where(name)}" for name in sizing.nulls)
    gain = smallest_gain(sizing.parts[0], now, target.power, level)
    lead = smallest_lead(sizing.parts, now, target.power, level)
    same = f"A no takes at least {LEAST_FOR_NO} test questions."
    if now.questions >= LEAST_FOR_NO:
        margin = rounded(smallest_margin(sizing.parts, now, target.power, level / 2))
        same = f"If the claim is like random places, {percent(target.power)} show that its lead is below {margin}."
    lines = [
        f"{sizing.title}, {find_score(sizing.score).title}, against {nulls}. "
        f"{now.questions} test questions of {'the ' if available else 'at least '}{most} that the behaviour has.",
        *(_spread(sizing, name) for name in sizing.nulls),
        f"As planned, {percent(target.power)} of such audits find a true gain of {rounded(gain)} or more, and "
        f"{percent(target.power)} a true lead of {rounded(lead)} or more. {same}",
        "",
    ]
    rows, best = choose_rows(run, sizing, target, most), find_cheapest(run, sizing, target, most)
    if best is not None and best.size not in [row.size for row in rows]:
        rows[1:] = sorted([*rows[1:], best], key=lambda row: row.seconds)
    wanted = target.lead if target.gain is None else target.gain
    named = (rounded(x, 3) for x in (wanted, target.lead, target.margin))
    heads = ["questions", "samples", "controls", "seeds", "minutes"]
    heads += [f"{what} {x}" for what, x in zip(("gain", "lead", "same within"), named, strict=True)]
    lines.append("  ".join(heads))
    for row in rows:
        size = row.size
        samples = size.samples if sizing.is_sampled else "-"
        powers = ("-" if math.isnan(x) else f"{x:.2f}" for x in (row.gain, row.lead, row.same))
        cells = [size.questions, samples, size.controls, size.seeds, f"{row.seconds / 60:.1f}", *powers]
        mark = "  <- cheapest" if best is not None and size == best.size else "  <- planned" if size == now else ""
        lines.append("  ".join(f"{x:>{len(head)}}" for x, head in zip(cells, heads, strict=True)) + mark)
    return "\n".join([*lines, "", *_advice(run, sizing, target, most, best, path)])


def _spread(sizing: Sizing, null: str) -> str:
    parts = sizing.nulls[null]
    low, high = (math.sqrt(x.places) for x in parts.plausible())
    noise = math.sqrt(parts.control.variance(sizing.size))
    return (
        f"Random places{where(null)} truly differ by a standard deviation of {rounded(math.sqrt(parts.places))} "
        f"({rounded(low)} to {rounded(high)} with 80 % confidence: {parts.n_places} controls). "
        f"Noise of their scores from the questions: {rounded(noise)}."
    )


def _advice(run: Run, sizing: Sizing, target: Target, most: int, best: Row | None, path: Path | None) -> Iterator[str]:
    if best is None:
        largest = replace(list(alternatives(run, sizing))[-1], questions=most)
        seen = smallest_lead(sizing.parts, largest, target.power, sizing.level)
        needed = questions_for(_power_of(sizing, target), largest, target.power)
        yield (
            f"No design within these limits sees {target.words}. With all {most} test questions and {largest.controls} "
            f"controls, the smallest lead seen is {rounded(seen)}. "
            + (f"It takes {needed} questions." if needed else "No number of questions is enough, since places differ.")
        )
        return
    if run.is_finished and best.size == sizing.size:
        yield f"The run is large enough for {target.words}."
        return
    yield (f"Cheapest for {target.words}: {_words(best.size, sizing)}; about {duration(sizing.more(best.size))} more.")
    if found := changes(run, best.size):
        yield yaml.safe_dump(found, sort_keys=False).rstrip()
    if path is not None:
        write_design(run, best.size, path)
        several = best.size.seeds > 1
        folder = f"{run.folder.parent} --repeats {best.size.seeds}" if several else run.folder
        yield f"All settings are in {path}. Run: locaudit audit {path} --out {folder}"


def _words(size: Size, sizing: Sizing) -> str:
    """The number of questions of a design, and the other numbers in which it differs from the run."""
    now, parts = sizing.size, [f"{size.questions} test questions"]
    parts += [f"{size.samples} samples"] if size.samples != now.samples else []
    parts += [f"{size.controls} controls"] if size.controls != now.controls else []
    parts += [f"{size.seeds} seeds"] if size.seeds != now.seeds else []
    return ", ".join(parts)


def rounded(x: float, digits: int = 2) -> str:
    """A number with so many significant digits, without a leading zero: ``.058``, ``1.2``."""
    return f"{x:.{digits}g}".removeprefix("0") or "0" if math.isfinite(x) else "-"


def percent(x: float) -> str:
    """A share as ``80 %``."""
    return f"{100 * x:g} %"


def duration(seconds: float) -> str:
    """Seconds as ``40 s``, ``35 min`` or ``2.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
