"""``locaudit judge fit | validate | compare``: words in and out for `locaudit.judges`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from locaudit.cli.commands import dispatch
from locaudit.config import JudgeConfig
from locaudit.errors import ConfigError
from locaudit.records import json_text

_PROGRAM = """Judges of generated answers: is it true (truth), is it informative (info)?

commands:
  locaudit judge fit --truth FILE --info FILE --out DIR
        fit the reference judge on labelled answers, or with --kind causal-lm --base MODEL a language model
  locaudit judge validate --truth FILE --info FILE [--json]
        how the bundled judge does on questions that it was not fitted on
  locaudit judge compare RUN --second.kind KIND ...
        agreement and kappa of two judges on a run's answers

Each command has its own --help."""


@dataclass(frozen=True)
class _Fit:
    out: Path
    """Folder for the fitted judge; name it as judges.target.model and judges.retention.model."""
    truth: Path | None = None
    """Labelled answers, lines like {"prompt": "Q: ..\\nA: ..\\nTrue:", "completion": " yes"}."""
    info: Path | None = None
    """The same with prompts that end in ``Helpful:``."""
    references: Path | None = None
    """reference: the TruthfulQA CSV with the questions' reference answers (None: the one beside --truth)."""
    kind: Literal["reference", "causal-lm"] = "reference"
    """What to fit."""
    base: str | None = None
    """causal-lm: the language model to fine-tune (extra `judge`)."""
    epochs: int = 1
    """causal-lm: passes over the rows."""
    learning_rate: float = 5e-4
    """causal-lm: peak of the schedule."""
    rank: int = 8
    """causal-lm: rank of the LoRA adapter."""
    max_rows: int | None = None
    """causal-lm: draw this many rows (None: all)."""
    seed: int = 0
    """Seed of everything random in it."""


@dataclass(frozen=True)
class _Validate:
    truth: Path
    """Labelled answers, as for `fit`; those to questions that the judge was fitted on are left out."""
    info: Path
    """The same for ``Helpful:``."""
    references: Path | None = None
    """The TruthfulQA CSV with the reference answers (None: the one beside --truth that the judge was fitted with)."""
    weights: Path | None = None
    """A folder of `fit` (None: the bundled weights)."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class _Compare:
    run: tyro.conf.Positional[Path]
    """Run folder with answers."""
    first: JudgeConfig = field(default_factory=JudgeConfig)
    """One judge; ``default``: the run's own."""
    second: JudgeConfig = field(default_factory=JudgeConfig)
    """The other judge; ``default``: the bundled reference judge."""
    aspect: Literal["truth", "info"] = "truth"
    """What is judged."""
    json: bool = False
    """Print JSON."""


def judge(arguments: list[str]) -> None:
    """Run one of the judge commands."""
    dispatch("judge", _PROGRAM, {"fit": _fit, "validate": _validate, "compare": _compare}, arguments)


def _fit(arguments: list[str]) -> None:
    command = tyro.cli(_Fit, prog="locaudit judge fit", description="Fit a judge on labelled answers.", args=arguments)
    console = Console(stderr=True, highlight=False, markup=False)
    if command.kind == "reference":
        if command.truth is None or command.info is None:
            raise ConfigError(
                got="judge fit without " + ("--truth" if command.truth is None else "--info"),
                expected="labelled answers for both aspects",
                remedy="name both files",
            )
        from locaudit.judges.reference import fit_reference_judge

        fit_reference_judge(
            command.truth, command.info, command.references, command.out, seed=command.seed, progress=console.print
        )
        console.print(f"written to {command.out}; its figures: {command.out / 'MODEL_CARD.md'}")
        return
    _fit_causal_lm(command, console)


def _fit_causal_lm(command: _Fit, console: Console) -> None:
    if command.base is None or (command.truth is None) == (command.info is None):
        raise ConfigError(
            got="judge fit --kind causal-lm" + ("" if command.base else " without --base"),
            expected="--base MODEL and one of --truth FILE and --info FILE: a judge has one aspect",
            remedy="fit the two judges one after the other, into two folders",
        )
    from locaudit.judges import find_aspect
    from locaudit.judges.finetune import fit_causal_lm_judge

    aspect, rows = ("truth", command.truth) if command.truth is not None else ("info", command.info)
    assert rows is not None
    report = fit_causal_lm_judge(
        find_aspect(aspect),
        rows,
        command.base,
        command.out,
        epochs=command.epochs,
        learning_rate=command.learning_rate,
        rank=command.rank,
        max_rows=command.max_rows,
        seed=command.seed,
        on_step=lambda done, total: console.print(f"step {done} of {total}") if done % 20 == 0 else None,
    )
    print(json_text(report), end="")


def _validate(arguments: list[str]) -> None:
    command = tyro.cli(
        _Validate,
        prog="locaudit judge validate",
        description="Measure the reference judge on the questions it was not fitted on.",
        args=arguments,
    )
    from locaudit.judges.reference import validate_reference_judge

    console = Console(stderr=True, highlight=False, markup=False)
    report = validate_reference_judge(
        command.truth, command.info, command.references, weights=command.weights, progress=console.print
    )
    if command.json:
        print(json_text(report), end="")
        return
    from locaudit.judges.reference.card import held_out_table

    print(held_out_table(report))


def _compare(arguments: list[str]) -> None:
    command = tyro.cli(
        _Compare,
        prog="locaudit judge compare",
        description="Agreement of two judges on the answers of a run; what they say is kept in the run.",
        args=arguments,
    )
    from locaudit.run.comparing import compare_judges

    names, agreement, verdicts = compare_judges(command.run, command.first, command.second, command.aspect)
    values: dict[str, Any] = {"aspect": command.aspect, "first": names[0], "second": names[1], **asdict(agreement)}
    values["outcomes"] = [{method: v.outcome for method, v in verdict.methods.items()} for verdict in verdicts]
    if command.json:
        print(json_text(values), end="")
        return
    a = agreement
    print(f"{command.aspect}: {names[0]} and {names[1]} on {a.n} answers to {a.n_groups} questions")
    print(f"  missing      {a.missing[0]} and {a.missing[1]}")
    print(f"  yes          {a.yes[0]:.3f} and {a.yes[1]:.3f}")
    for name, value, interval in (
        ("agreement", a.agreement, a.agreement_interval),
        ("kappa", a.kappa, a.kappa_interval),
    ):
        print(f"  {name:11}  {value:.3f}  (95 % interval {interval[0]:.3f} to {interval[1]:.3f})")
    print(f"  correlation  {a.pearson:.3f} of probabilities, {a.spearman:.3f} of ranks")
    (n00, n01), (n10, n11) = a.counts
    print(f"  no/no {n00}, no/yes {n01}, yes/no {n10}, yes/yes {n11}")
    for method in verdicts[0].methods:
        one, other = (
            f"{v.methods[method].outcome} (claim {v.methods[method].claim:.3f}, p = {v.methods[method].p_value:.3f})"
            for v in verdicts
        )
        print(f"  verdict on {method}, {verdicts[0].score}: {one} by the first; {other} by the second")
