"""``locaudit calibrate null | run | planted``: words in and out for error rates and power of the verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from locaudit.cli.commands import dispatch
from locaudit.errors import ConfigError
from locaudit.records import json_text

_PROGRAM = """Is the verdict calibrated?

commands:
  locaudit calibrate null                 simulated audits of claims that are places like any other: how often is one
                                          called specific?
  locaudit calibrate run DIR              the same with the real edits of a run: each of its controls in turn the claim
  locaudit calibrate planted --out DIR    models in which localization is a fact: is it found, and with what power?

Each command has its own --help."""


def calibrate(arguments: list[str]) -> None:
    """Parse ``locaudit calibrate ...`` and run it."""

    def command(name: str, function: Callable[..., None]) -> Callable[[list[str]], None]:
        return lambda rest: tyro.cli(function, prog=f"locaudit calibrate {name}", args=rest)

    functions = {"null": null, "run": run, "planted": planted}
    dispatch("calibrate", _PROGRAM, {name: command(name, f) for name, f in functions.items()}, arguments)


def null(
    audits: int = 10_000,
    controls: int = 19,
    questions: int = 100,
    level: float = 0.05,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Simulate audits of claims that are places like any other.

    Args:
        audits: Simulated audits of each kind; a tenth as many of ``anytime``, with up to 400 controls.
        controls: Controls an audit.
        questions: Test questions.
        level: Significance level.
        seed: Seed of everything random in it.
        out: Write the numbers to this JSON file.

    """
    for name, value, least in (("audits", audits, 1), ("controls", controls, 1), ("questions", questions, 5)):
        if value < least:
            raise ConfigError(got=f"--{name} {value}", expected=f"at least {least}", remedy="raise it")
    from locaudit.studies.calibration.rates import WORLDS, simulate

    shared: dict[str, Any] = {"n_questions": questions, "level": level, "seed": seed}
    found = []
    for world, words in WORLDS.items():
        _say(f"\n{words}", style="bold")
        for rule in ("fixed", "curtailed"):
            found.append(simulate(world, rule=rule, n_audits=audits, n_controls=controls, **shared))
            for name, rate in found[-1].parametric.items() if rule == "fixed" else ():
                _say(f"  {name:>22}  rejects in {rate}")
            _say(found[-1])
    found.append(simulate("spread", rule="anytime", n_audits=max(audits // 10, 1), n_controls=400, **shared))
    _say(f"\n{WORLDS['spread']}, up to 400 controls", style="bold")
    _say(found[-1])
    _write(out, {"null": [asdict(case) for case in found], "settings": shared | {"audits": audits}})


def run(
    folder: tyro.conf.Positional[Path],
    score: str | None = None,
    controls: int = 19,
    level: float = 0.05,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Take each control of a run in turn as the claim.

    Args:
        folder: Run folder with more controls than an audit takes; 40 or more say something.
        score: Score to compare by (None: the run's).
        controls: Controls of each audit, drawn from the run's other controls.
        level: Significance level.
        seed: Seed of the draw of controls.
        out: Write the numbers to this JSON file.

    """
    from locaudit.studies.calibration.rates import pool_run

    model, pools = pool_run(folder, score=score, n_controls=controls, level=level, seed=seed)
    for pool in pools:
        _say(pool)
    _write(out, {"model": model, "pools": [asdict(pool) for pool in pools]})


def planted(
    out: Path,
    controls: int = 19,
    level: float = 0.05,
    family: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 48),
    seed: int = 0,
) -> None:
    """Audit models in which localization is a fact.

    Args:
        out: Folder for the audits, planted.json and the figure. Naming an earlier one goes on where it stopped.
        controls: Controls of the audits whose power is computed (of 47 other heads).
        level: Significance level of the power.
        family: Heads, of 48, that can do it, one model each.
        seed: Seed of the models and the edits.

    """
    from locaudit.report import require_report_extra
    from locaudit.report.style import save
    from locaudit.studies.calibration.cases import N_HEADS, audit_cases, draw_power, power_curve

    require_report_extra()
    if not family or not all(1 <= m <= N_HEADS for m in family):
        raise ConfigError(
            got=f"--family {' '.join(map(str, family))}",
            expected=f"numbers of heads from 1 to {N_HEADS}",
            remedy="leave it out for the usual ones",
        )
    shared: dict[str, Any] = {"n_controls": controls, "level": level}
    cases = audit_cases(out, seed=seed, say=_say)
    for case in cases:
        _say(case)
    curve = power_curve(out, family=family, seed=seed, say=_say, **shared)
    for point in curve:
        _say(f"{point} against {controls} controls")
    figure = draw_power([x.n_able for x in curve], [x.power for x in curve], n_heads=N_HEADS, **shared)
    save(figure, out / "figures", "power")
    numbers = {"cases": [asdict(case) for case in cases], "power": [asdict(x) for x in curve], "settings": shared}
    _write(out / "planted.json", numbers)


def _say(text: object, style: str | None = None) -> None:
    Console(highlight=False, soft_wrap=True).print(str(text), style=style, markup=False)


def _write(path: Path | None, values: dict[str, Any]) -> None:
    if path is not None:
        from locaudit.store.files import write_atomically

        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json_text(values).encode())
        print(f"numbers: {path}")
