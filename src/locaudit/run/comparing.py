"""Compare two judges on the answers of one run."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

from locaudit.config import JudgeChoice
from locaudit.errors import ConfigError, RunFolderError
from locaudit.run.describe import describe_judges
from locaudit.run.judging import build_judges, estimate_cost, judge_answers
from locaudit.run.status import show_progress
from locaudit.stats.agreement import Agreement, compare
from locaudit.stats.scores import resolve_score
from locaudit.stats.verdict import Verdict
from locaudit.store.cache import open_cache
from locaudit.store.database import Store
from locaudit.store.folder import open_run
from locaudit.store.manifest import JudgeFacts
from locaudit.store.run import Run, load_run


def compare_judges(
    folder: str | Path, first: JudgeChoice, second: JudgeChoice, aspect: str = "truth", *, progress: bool = True
) -> tuple[tuple[str, str], Agreement, tuple[Verdict, Verdict]]:
    """Let two judges judge every distinct answer of a run, and compare them.

    Returns the judges' names, their agreement, and the run's verdict with each. If `first` has the kind ``default``, it
    is the run's own judge of the aspect, and its stored judgements are used. New judgements are stored in the run.

    Raises `RunFolderError` for a run without answers or if no answer was judged by both, `ConfigError` if the two
    judges are the same or a judge's settings do not fit.
    """
    run = load_run(folder)
    keys = sorted(run.said)
    if not keys:
        raise RunFolderError(
            got=f"{folder}, a run without answers",
            expected="a run that generated answers (evaluation.max_new_tokens above 0)",
            remedy="run the audit into the same folder again with evaluation.max_new_tokens = 50, which adds answers",
        )
    own = run.manifest.judges.get(aspect)
    sides: list[JudgeFacts] = []
    with open_run(folder, run.config) as store:
        for side, choice in (("first", first), ("second", second)):
            is_own = side == "first" and choice.kind == "default"
            try:
                sides.append(own if is_own and own else _judge(store, run, choice, aspect, len(keys), progress))
            except ConfigError as error:  # its text names settings of a run: judges.truth becomes first or second
                words = (x.replace(f"judges.{aspect}", side) for x in (error.got, error.expected, error.remedy))
                raise ConfigError(**dict(zip(("got", "expected", "remedy"), words, strict=True))) from None
        tables = [store.judgements(side.fingerprint) for side in sides]
    if sides[0].fingerprint == sides[1].fingerprint:
        raise ConfigError(
            got=f"{sides[0].name} twice",
            expected="two judges",
            remedy="choose another kind (--second.kind) or another model for the second judge",
        )
    values = [[table.get(key, (None, ""))[0] for key in keys] for table in tables]
    agreement = compare(values[0], values[1], [question for question, _ in keys])
    if not agreement.n:
        raise RunFolderError(
            got=f"no answer that both judged ({' and '.join(map(str, agreement.missing))} of {len(keys)} missing)",
            expected="answers judged by both",
            remedy="fix the judge that fails, then run the same command again",
        )
    one, other = (_verdict_by(run, aspect, side, table) for side, table in zip(sides, tables, strict=True))
    return (sides[0].name, sides[1].name), agreement, (one, other)


def _judge(store: Store, run: Run, choice: JudgeChoice, aspect: str, n_answers: int, progress: bool) -> JudgeFacts:
    """Let one judge judge every answer of the run, and return its name and fingerprint."""
    asked = {aspect: choice} | {other: JudgeChoice("none") for other in run.manifest.aspects if other != aspect}
    judges = build_judges(asked, run.manifest.aspects, generates=True, device=run.config.loading.device)
    if aspect not in judges:
        raise RunFolderError(
            got=f"a judge of kind {choice.kind} for {aspect} of {run.manifest.behaviour}",
            expected="a judge",
            remedy="choose a kind that judges: reference, causal-lm or openai",
        )
    with show_progress(progress) as meter, closing(open_cache()) as cache:
        for line in estimate_cost(judges, store.questions("test"), n_answers):
            meter.say(line)
        judge_answers(judges, store, run.trials, cache, meter.say)
    return describe_judges(judges)[aspect]


def _verdict_by(run: Run, aspect: str, judge: JudgeFacts, table) -> Verdict:
    """The run's verdict with this judge. If no other aspect has a judge, the aspect itself is the score."""
    said, judges = {**run.judgements, aspect: table}, {**run.manifest.judges, aspect: judge}
    score = resolve_score("auto", tuple(said)) if len(said) > 1 else f"{aspect}_probability"
    return replace(run, judgements=said, manifest=replace(run.manifest, judges=judges)).decide(score=score)
