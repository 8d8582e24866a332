"""Measure or compare judges of generated answers.

commands:
  locaudit judge validate --truth FILE --info FILE [--json]
        measure a judge (default: the bundled one) on labelled answers to questions that it was not fitted on
  locaudit judge compare RUN --second.kind KIND ...
        measure the agreement of two judges on the answers of a run
  locaudit judge sample RUN --out FILE
        draw answers of a run to be labelled by people, for locaudit report RUN --labels FILE

To fit a judge of your own, use the scripts tools/judge/fit.py and tools/judge/finetune.py in the repository.
locaudit judge COMMAND --help lists the flags of a command.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from locaudit.cli.commands import dispatch, read_flags, say
from locaudit.cli.flags import parse
from locaudit.config import JudgeChoice
from locaudit.errors import ConfigError
from locaudit.records import json_text
from locaudit.registry import ASPECTS, JUDGES
from locaudit.text import plural


@dataclass(frozen=True)
class _Validate:
    kind: str = "reference"
    """Kind of judge: reference, causal-lm, openai, or one that a plug-in adds."""
    references: Path | None = None
    """Behaviour file with the reference answers of the questions.
    None: the only TruthfulQA*.csv in the folder of the labelled answers."""
    json: bool = False
    """Print the result as JSON."""


@dataclass(frozen=True)
class _Compare:
    run: tyro.conf.Positional[Path] = tyro.MISSING
    """Run folder with answers."""
    first: JudgeChoice = JudgeChoice()
    """The first judge. ``default``: the judge of the run."""
    second: JudgeChoice = JudgeChoice()
    """The second judge. ``default``: the bundled judge."""
    aspect: str = "truth"
    """Aspect of the answers to compare the judges on: truth, info, or one that a plug-in adds."""
    json: bool = False
    """Print the result as JSON."""


@dataclass(frozen=True)
class _Sample:
    run: tyro.conf.Positional[Path]
    """Run folder with answers."""
    out: Path
    """CSV file to write. Fill its columns, one per aspect, with 1 (yes) or 0 (no)."""
    n: int = 100
    """Number of answers, about."""
    score: str | None = None
    """The score that the report will be read with; it decides which strengths are chosen (None: the run's)."""
    seed: int = 0
    """Seed of the draw."""


def judge(arguments: list[str]) -> None:
    """Parse ``locaudit judge COMMAND [flags]`` and run it."""
    commands = {"fit": _fit, "validate": _validate, "compare": _compare, "sample": _sample}
    dispatch("judge", (__doc__ or "").strip(), commands, arguments)


def _fit(arguments: list[str]) -> None:
    raise ConfigError(
        got="locaudit judge fit, which is now a script",
        expected="a checkout of locaudit's repository, which has scripts that fit judges",
        remedy="run there: python tools/judge/fit.py --help (for a language model: python tools/judge/finetune.py)",
    )


def _validate(arguments: list[str]) -> None:
    # Parsed twice: first the kind of judge, then the settings of that kind.
    program, first = "locaudit judge validate", {"return_unknown_args": True, "add_help": False}
    kind = read_flags(_Validate, program, "", arguments, **first)[0].kind  # type: ignore[index]
    helps = {
        name: f"JSONL file of labelled answers; each prompt ends in ``{aspect.suffix}``."
        for name, aspect in ASPECTS.items()
    }
    files: list[Any] = [(name, Annotated[Path | None, tyro.conf.arg(help=helps[name])], None) for name in ASPECTS]
    settings: Any = ("judge", JUDGES[kind].settings, field(default_factory=JUDGES[kind].settings))
    form: Any = make_dataclass("Validate", [*files, settings], bases=(_Validate,), frozen=True)
    words = (
        "Measure a judge on labelled answers to questions that it was not fitted on. A line of FILE is "
        '{"prompt": "Q: ..\\nA: ..\\nTrue:", "completion": " yes"}.'
    )
    command = read_flags(form, program, words, arguments)
    given = {aspect: getattr(command, aspect) for aspect in ASPECTS if getattr(command, aspect) is not None}
    if not given:
        raise ConfigError(
            got="judge validate without labelled answers",
            expected=" or ".join(f"--{aspect} FILE" for aspect in ASPECTS),
            remedy="give a file of labelled answers for at least one aspect",
        )
    from locaudit.judges.labelled import read_labelled

    for aspect, file in given.items():  # refused before torch is imported
        JUDGES[kind].refuse(ASPECTS[aspect], command.judge)
        read_labelled(file, ASPECTS[aspect])
    from locaudit.judges.validate import as_table, validate

    judges = JUDGES[kind].loader(dict.fromkeys(given, command.judge), "auto")
    note = Console(stderr=True, highlight=False, markup=False).print
    report = validate(judges, given, command.references, say=note)
    print(json_text(report) if command.json else as_table(report), end="" if command.json else "\n")


def _sample(arguments: list[str]) -> None:
    words = "Draw answers of a run to be labelled by people. Rows do not show which edit an answer comes from."
    command = read_flags(_Sample, "locaudit judge sample", words, arguments)
    if command.n < 1 or command.out.exists():
        raise ConfigError(
            got=f"--n {command.n}" if command.n < 1 else f"--out {command.out}, which exists",
            expected="at least 1 answer, and a new file, so that no labels are lost",
            remedy="raise --n" if command.n < 1 else "choose another --out, or move the file away",
        )
    from locaudit.report.tables import csv_text
    from locaudit.store.files import write_atomically
    from locaudit.store.run import load_run
    from locaudit.store.trusted import draw

    rows, about = draw(load_run(command.run).read_with(command.score), command.n, command.seed)
    write_atomically(command.out, csv_text(rows).encode())
    say(f"{command.out}: {about}")


def _compare(arguments: list[str]) -> None:
    command = parse(
        _Compare(),
        "locaudit judge compare",
        "Measure the agreement of two judges on the answers of a run. Their judgements are stored in the run folder.",
        arguments,
    )
    from locaudit.store.run import load_run

    load_run(command.run)  # a folder that is not a run is refused before torch is imported
    from locaudit.run.comparing import compare_judges

    names, agreement, verdicts = compare_judges(command.run, command.first, command.second, command.aspect)
    values: dict[str, Any] = {"aspect": command.aspect, "first": names[0], "second": names[1], **asdict(agreement)}
    values["outcomes"] = [{method: v.outcome for method, v in verdict.methods.items()} for verdict in verdicts]
    if command.json:
        print(json_text(values), end="")
        return
    a = agreement
    say(f"{command.aspect}: {names[0]} and {names[1]} on {plural(a.n, 'answer')} to {plural(a.n_groups, 'question')}")
    say(f"  missing      {a.missing[0]} and {a.missing[1]}")
    say(f"  yes          {a.yes[0]:.3f} and {a.yes[1]:.3f}")
    for name, value, interval in (
        ("agreement", a.agreement, a.agreement_interval),
        ("kappa", a.kappa, a.kappa_interval),
    ):
        say(f"  {name:11}  {value:.3f}  (95 % interval {interval[0]:.3f} to {interval[1]:.3f})")
    say(f"  correlation  {a.pearson:.3f} of probabilities, {a.spearman:.3f} of ranks")
    (n00, n01), (n10, n11) = a.counts
    say(f"  no/no {n00}, no/yes {n01}, yes/no {n10}, yes/yes {n11}")
    for method in verdicts[0].methods:
        one, other = (
            f"{v.methods[method].outcome} (claim {v.methods[method].claim:.3f}, "
            + ", ".join(f"p{null.where} = {null.p_value:.3f}" for null in v.methods[method].nulls.values())
            + ")"
            for v in verdicts
        )
        say(f"  verdict on {method}, {verdicts[0].score}: {one} by the first; {other} by the second")
