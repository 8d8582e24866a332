"""``locaudit calibrate null | run | planted | coverage``: error rates and power of the verdict."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import tyro

from locaudit.cli.commands import dispatch, read_flags, say
from locaudit.errors import ConfigError
from locaudit.records import json_text
from locaudit.text import plural

_PROGRAM = """Is the verdict calibrated?

commands:
  locaudit calibrate null                 how often is a random claim called specific? Simulated audits
  locaudit calibrate run DIR              the same with the real edits of a run: each control in turn is the claim
  locaudit calibrate planted --out DIR    is a true claim found, and with what power? Audits of models in which a
                                          behaviour is localized by construction
  locaudit calibrate coverage             does a 95 % interval hold the truth in 95 % of cases, and does a test at 5 %
                                          reject in 5 %? Simulated scores whose truth is known

locaudit calibrate COMMAND --help lists the flags of a command."""


def calibrate(arguments: list[str]) -> None:
    """Parse ``locaudit calibrate ...`` and run it."""

    def command(name: str, function: Callable[..., None]) -> Callable[[list[str]], None]:
        @functools.wraps(function)
        def later(**values: Any) -> Callable[[], None]:
            return functools.partial(function, **values)

        return lambda rest: read_flags(later, f"locaudit calibrate {name}", None, rest)()

    functions = {"null": null, "run": run, "planted": planted, "coverage": coverage}
    dispatch("calibrate", _PROGRAM, {name: command(name, f) for name, f in functions.items()}, arguments)


def null(
    audits: int = 10_000,
    controls: int = 19,
    questions: int = 100,
    level: float = 0.05,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Simulate audits whose claim is a random location, and count how often it is called specific.

    Args:
        audits: Number of simulated audits in each case (for stopping ``anytime``, a tenth, with up to 400 controls).
        controls: Number of controls per audit.
        questions: Number of test questions.
        level: Significance level.
        seed: Seed of the simulation.
        out: Write the numbers to this JSON file.

    """
    _check(audits=audits, controls=controls, questions=questions, level=level, seed=seed)
    from locaudit.studies.calibration.rates import WORLDS, simulate

    shared: dict[str, Any] = {"n_questions": questions, "level": level, "seed": seed}
    found = []
    for world, words in WORLDS.items():
        say(f"\n{words}", style="bold")
        for rule in ("fixed", "curtailed"):
            found.append(simulate(world, rule=rule, n_audits=audits, n_controls=controls, **shared))
            for name, rate in found[-1].parametric.items() if rule == "fixed" else ():
                say(f"  {name:>22}  rejects in {rate}")
            say(found[-1])
    found.append(simulate("spread", rule="anytime", n_audits=max(audits // 10, 1), n_controls=400, **shared))
    say(f"\n{WORLDS['spread']}, up to 400 controls", style="bold")
    say(found[-1])
    _write(out, {"null": [asdict(case) for case in found], "settings": shared | {"audits": audits}})


def run(
    folder: tyro.conf.Positional[Path],
    score: str | None = None,
    controls: int = 19,
    level: float = 0.05,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Take each control of a run in turn as the claim, and count how often it is called specific.

    Args:
        folder: Run folder. It needs more controls than `controls`; about 40 or more are useful.
        score: Score to compare (None: the score of the run).
        controls: Number of controls per audit, drawn from the other controls of the run.
        level: Significance level.
        seed: Seed of that draw.
        out: Write the numbers to this JSON file.

    """
    _check(controls=controls, level=level, seed=seed)
    from locaudit.studies.calibration.rates import pool_run

    model, pools = pool_run(folder, score=score, n_controls=controls, level=level, seed=seed)
    for pool in pools:
        say(pool)
    _write(out, {"model": model, "pools": [asdict(pool) for pool in pools]})


def planted(
    out: Path,
    controls: int = 19,
    level: float = 0.05,
    family: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 48),
    seed: int = 0,
) -> None:
    """Audit small models in which a behaviour is localized by construction, and compute the power to find it.

    Args:
        out: Folder for the audits, planted.json and the figure. Unfinished work in it is continued.
        controls: Number of controls, out of the 47 other heads, in the audits whose power is computed.
        level: Significance level of these audits.
        family: Numbers of heads, out of 48, in which an edit works. Each number gives one model.
        seed: Seed of the models and the edits.

    """
    from locaudit.report import require_report_extra
    from locaudit.report.figures import save
    from locaudit.studies.calibration.rates import N_HEADS

    require_report_extra()
    _check(controls=controls, level=level, seed=seed)
    if controls >= N_HEADS:
        raise ConfigError(got=f"--controls {controls}", expected=f"1 to {N_HEADS - 1}", remedy="lower it")
    if not family or not all(1 <= m <= N_HEADS for m in family):
        raise ConfigError(
            got=f"--family {' '.join(map(str, family))}",
            expected=f"numbers of heads from 1 to {N_HEADS}",
            remedy="leave it out for the default",
        )
    from locaudit.studies.calibration.cases import audit_cases, draw_power, power_curve

    shared: dict[str, Any] = {"n_controls": controls, "level": level}
    cases = audit_cases(out, seed=seed, say=say)
    for case in cases:
        say(case)
    curve = power_curve(out, family=family, seed=seed, say=say, **shared)
    for point in curve:
        say(f"{point} against {plural(controls, 'control')}")
    figure = draw_power([x.n_able for x in curve], [x.power for x in curve], n_heads=N_HEADS, **shared)
    for form in ("png", "svg"):
        save(figure, out / "figures", "power", form)
    numbers = {"cases": [asdict(case) for case in cases], "power": [asdict(x) for x in curve], "settings": shared}
    _write(out / "planted.json", numbers)


def coverage(sets: int = 500, seed: int = 0, out: Path | None = None) -> None:
    """Measure the coverage of the confidence intervals and the sizes of the tests, by simulation.

    Args:
        sets: Number of simulated data sets per truth and size (fewer for the slowest parts).
        seed: Seed of the simulation.
        out: Write the numbers to this JSON file.

    """
    _check(sets=sets, seed=seed)
    from locaudit.studies.calibration.coverage import measure_coverage

    found, last = [], None
    for (part, truth), group in groupby(measure_coverage(sets, seed=seed), key=lambda cell: (cell.part, cell.truth)):
        cells = list(group)
        found += cells
        if part != last:
            say(f"\n{part}, at " + ", ".join(cell.size for cell in cells), style="bold")
            last = part
        for i, name in enumerate(cells[0].rates):
            say(f"  {'' if i else truth:<64} {name:<24}" + "".join(f"{x.rates[name].share:>8.1%}" for x in cells))
    counts = [
        {"part": x.part, "truth": x.truth, "size": x.size}
        | {name: f"{rate.n} of {rate.n_trials}" for name, rate in x.rates.items()}
        for x in found
    ]
    _write(out, {"coverage": counts, "settings": {"sets": sets, "seed": seed}})


def _check(**values: float) -> None:
    """Refuse a flag that is out of range."""
    least = {"audits": 1, "sets": 1, "controls": 1, "questions": 5, "seed": 0}
    for name, value in values.items():
        if name == "level" and not 0 < value < 1:
            raise ConfigError(got=f"--level {value:g}", expected="a number between 0 and 1", remedy="change it")
        if name != "level" and value < least[name]:
            raise ConfigError(got=f"--{name} {value}", expected=f"at least {least[name]}", remedy="raise it")


def _write(path: Path | None, values: dict[str, Any]) -> None:
    if path is not None:
        from locaudit.store.files import write_atomically

        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json_text(values).encode())
        say(f"numbers: {path}")
