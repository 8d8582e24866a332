"""``locaudit calibrate null | run | planted``: words in and out for error rates and power of the verdict."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import tyro
from rich.console import Console

from locaudit.cli.commands import dispatch
from locaudit.config.settings import MethodName
from locaudit.errors import ConfigError
from locaudit.records import json_text

_PROGRAM = """Is the verdict calibrated?

commands:
  locaudit calibrate null                 simulated audits of claims that are places like any other: how often is one
                                          called specific?
  locaudit calibrate run DIR              the same with the real edits of a run: each of its controls in turn the claim
  locaudit calibrate planted --out DIR    models in which localization is a fact: is it found, and with what power?

Each command has its own --help."""


@dataclass(frozen=True)
class _Null:
    audits: int = 10_000
    """Simulated audits of each kind; a tenth as many of ``anytime``, with up to 400 controls."""
    controls: int = 19
    """Controls an audit."""
    questions: int = 100
    """Test questions."""
    level: float = 0.05
    """Significance level."""
    seed: int = 0
    """Seed of everything random in it."""
    out: Path | None = None
    """Write the numbers to this JSON file."""


@dataclass(frozen=True)
class _RunFolder:
    folder: tyro.conf.Positional[Path]
    """Run folder with more controls than an audit takes; 40 or more say something."""
    score: str | None = None
    """Score to compare by (None: the run's)."""
    controls: int = 19
    """Controls of each audit, drawn from the run's other controls."""
    level: float = 0.05
    """Significance level."""
    seed: int = 0
    """Seed of the draw of controls."""
    out: Path | None = None
    """Write the numbers to this JSON file."""


@dataclass(frozen=True)
class _Planted:
    out: Path
    """Folder for the audits, planted.json and the figure. Naming an earlier one goes on where it stopped."""
    controls: int = 19
    """Controls of the audits whose power is computed (of 47 other heads)."""
    level: float = 0.05
    """Significance level of the power."""
    family: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 48)
    """Heads, of 48, that can do it, one model each."""
    seed: int = 0
    """Seed of the models and the edits."""


def calibrate(arguments: list[str]) -> None:
    """Parse ``locaudit calibrate ...`` and run it."""
    dispatch("calibrate", _PROGRAM, {"null": _null, "run": _run, "planted": _planted}, arguments)


def _null(arguments: list[str]) -> None:
    command = tyro.cli(_Null, prog="locaudit calibrate null", args=arguments)
    for name, least in (("audits", 1), ("controls", 1), ("questions", 5)):
        if getattr(command, name) < least:
            raise ConfigError(got=f"--{name} {getattr(command, name)}", expected=f"at least {least}", remedy="raise it")
    from locaudit.studies.calibration.rates import WORLDS, Rate, simulate

    console = Console(highlight=False, soft_wrap=True)
    shared: dict[str, Any] = {"n_questions": command.questions, "level": command.level, "seed": command.seed}
    found = [
        simulate(world, rule=rule, n_audits=command.audits, n_controls=command.controls, **shared)
        for world in WORLDS
        for rule in ("fixed", "curtailed")
    ]
    found.append(simulate("spread", rule="anytime", n_audits=max(command.audits // 10, 1), n_controls=400, **shared))

    def percent(rate: Rate) -> str:
        return f"{rate.share:.2%} ({rate.interval[0]:.2%} to {rate.interval[1]:.2%})"

    world = None
    for case in found:
        if case.world != world and case.rule != "anytime":
            world = case.world
            console.print(f"\n{WORLDS[world]}", style="bold", markup=False)
            for name, rate in case.parametric.items():
                console.print(f"  {name:>22}  rejects in {percent(rate)}", markup=False)
        if case.rule == "anytime":
            console.print(f"\n{WORLDS[case.world]}, up to {case.n_controls} controls", style="bold", markup=False)
        below = ", ".join(f"{rate.share:.3f} at {t:g}" for t, rate in case.p_below.items())
        console.print(
            f"  {case.rule:>22}  specific in {percent(case.false)} of {case.false.n_trials:,}; p at most t: {below}; "
            f"{case.mean_controls:.1f} controls used",
            markup=False,
        )
    _write(command.out, {"null": [_plain(case) for case in found], "settings": shared | {"audits": command.audits}})


def _run(arguments: list[str]) -> None:
    command = tyro.cli(_RunFolder, prog="locaudit calibrate run", args=arguments)
    from locaudit.stats import judged_records, run_score
    from locaudit.stats.sequential import curtailment
    from locaudit.store import read_run
    from locaudit.studies.calibration.rates import pool_rates

    with read_run(command.folder) as store:
        records, score = judged_records(store), command.score or run_score(store)
        model = (store.fact("run") or {}).get("model")
    numbers = [r.spec.control for r in records if r.spec.arm == "control"]
    n_places = len(set(numbers))
    if not 0 < command.level < 1 or not curtailment(command.controls, command.level):
        raise ConfigError(
            got=f"--controls {command.controls} at --level {command.level:g}",
            expected="enough controls for an audit to say specific: 1 / (1 + controls) at most the level",
            remedy="raise --controls",
        )
    if n_places <= command.controls:
        raise ConfigError(
            got=f"{command.folder} with {n_places} controls and --controls {command.controls}",
            expected="more controls in the run than an audit takes",
            remedy="lower --controls, or audit with more controls (40 or more say something)",
        )
    base = next((r for r in records if r.spec.arm == "base"), None)
    if base is None or score not in base.metrics["test"]:
        raise ConfigError(
            got=f"score {score}, which {command.folder} has not",
            expected=f"one of {', '.join(sorted(base.metrics['test'] if base else ()))}",
            remedy="change --score",
        )
    console = Console(highlight=False, soft_wrap=True)
    found = []
    tried = {r.spec.method for r in records if r.spec.arm == "control"}
    for method in [name for name in get_args(MethodName) if name in tried]:
        rates = pool_rates(records, method, score, n_controls=command.controls, level=command.level, seed=command.seed)
        found.append(rates)
        low, high = rates.drawn.interval
        console.print(
            f"{method}, {score}: each of {rates.n_places} places in turn the claim against {rates.n_controls} of the "
            f"others: specific in {rates.false_rate:.2%} of all draws of controls; in one draw each, "
            f"{rates.drawn.n} of {rates.drawn.n_trials} (95 %: {low:.2%} to {high:.2%}, as if places were "
            f"independent). {rates.n_effective} places have a significant gain, {rates.n_tied} tie with another.",
            markup=False,
        )
    _write(command.out, {"model": model, "pools": [_plain(rates) for rates in found]})


def _planted(arguments: list[str]) -> None:
    command = tyro.cli(_Planted, prog="locaudit calibrate planted", args=arguments)
    from locaudit.report import require_report_extra

    require_report_extra()
    from locaudit.report.style import save
    from locaudit.studies.calibration.cases import N_HEADS, audit_cases, power_curve
    from locaudit.studies.calibration.power import draw_power

    if not command.family or not all(1 <= m <= N_HEADS for m in command.family):
        raise ConfigError(
            got=f"--family {' '.join(map(str, command.family))}",
            expected=f"numbers of heads from 1 to {N_HEADS}",
            remedy="leave it out for the usual ones",
        )
    console = Console(highlight=False, soft_wrap=True)
    cases = audit_cases(command.out, seed=command.seed, say=lambda text: console.print(text, markup=False))
    for case in cases:
        mark = "right" if case.outcome == case.expected else "WRONG"
        console.print(
            f"{mark}: {case.name} ({case.fact}): {case.outcome}, p = {case.p_value:.3f}; {case.base:.3f} unedited, "
            f"{case.claim_score:.3f} at the claim, {min(case.control_scores):.3f} to {max(case.control_scores):.3f} at "
            f"{len(case.control_scores)} others; the only such place: {case.uniqueness}",
            markup=False,
        )
    shared: dict[str, Any] = {"n_controls": command.controls, "level": command.level}
    curve = power_curve(
        command.out, family=command.family, seed=command.seed,
        say=lambda text: console.print(text, markup=False), **shared,
    )  # fmt: skip
    for point in curve:
        console.print(
            f"{point.n_able} of {N_HEADS} heads can do it: claim {point.claim} scores {point.claim_score:.3f}, "
            f"{point.n_at_least} others as much; specific with probability {point.power:.3f} (theory "
            f"{point.theory:.3f}) against {command.controls} controls",
            markup=False,
        )
    figure = draw_power([x.n_able for x in curve], [x.power for x in curve], n_heads=N_HEADS, **shared)
    save(figure, command.out / "figures", "power")
    _write(
        command.out / "planted.json",
        {"cases": [_plain(case) for case in cases], "power": [_plain(x) for x in curve], "settings": shared},
    )


def _plain(value: Any) -> dict[str, Any]:
    """A result as JSON, rates with their shares and intervals."""
    from locaudit.studies.calibration.rates import Rate

    def convert(item: Any) -> Any:
        if isinstance(item, Rate):
            return {**asdict(item), "share": item.share, "interval": list(item.interval)}
        if isinstance(item, dict):
            return {str(key): convert(x) for key, x in item.items()}
        return list(item) if isinstance(item, tuple) else item

    return {name: convert(item) for name, item in vars(value).items()}


def _write(path: Path | None, values: dict[str, Any]) -> None:
    if path is not None:
        from locaudit.store import write_atomically

        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json_text(values).encode())
        print(f"numbers: {path}")
