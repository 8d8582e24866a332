"""Two judges on the answers of one run."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Literal

from locaudit.config import JudgeConfig, JudgesConfig, check_judge
from locaudit.errors import ConfigError, RunFolderError
from locaudit.judges.agreement import Agreement, compare
from locaudit.run.judging import build_judges, estimate_cost, judge_answers
from locaudit.run.status import show_progress
from locaudit.stats import Verdict, decide_run, judged_records
from locaudit.store import Store, open_run, read_run
from locaudit.store.cache import open_cache

Slot = Literal["truth", "info"]


def compare_judges(
    folder: str | Path, first: JudgeConfig, second: JudgeConfig, slot: Slot = "truth", *, progress: bool = True
) -> tuple[tuple[str, str], Agreement, tuple[Verdict, Verdict]]:
    """Judge every distinct answer of a run by two judges; returns their names, agreement and the verdict by each.

    A `first` of kind ``default`` is the run's own judge of the slot (``truth`` or ``info``), whose judgements are read
    and not made again. Judgements are kept in the run. Raises `RunFolderError` for a run without answers.
    """
    for name, settings in (("first", first), ("second", second)):
        check_judge(settings, name, max_new_tokens=1)
    with read_run(folder) as store:
        config, run = store.config, store.fact("run") or {}
        own = (store.fact("judges") or {}).get(slot)
        records = store.records()
    if not any(record.answers for record in records):
        raise RunFolderError(
            got=f"{folder}, a run without answers",
            expected="a run that generated answers (evaluation.max_new_tokens above 0)",
            remedy="run the audit first, or again with answers into another --out",
        )
    with open_run(folder, config) as store, show_progress(progress) as meter, closing(open_cache()) as cache:
        keys = sorted(
            {
                (question.id, answer)
                for record in records
                for split, answers in record.answers.items()
                for question, answer in zip(store.questions(split), answers, strict=True)
            }
        )
        sides: list[tuple[str, str]] = []
        for number, settings in enumerate((first, second)):
            if number == 0 and settings.kind == "default" and own is not None:
                sides.append((own["name"], own["fingerprint"]))
                continue
            none = JudgeConfig("none")
            chosen = JudgesConfig(settings, none) if slot == "truth" else JudgesConfig(none, settings)
            asks = run.get("asks") or [None, None]
            judges = build_judges(chosen, asks, generates=True, device=config.loading.device)
            if slot not in judges:
                raise RunFolderError(
                    got=f"a judge of kind {settings.kind} for {slot} of {run.get('behaviour', 'this run')}",
                    expected="a judge",
                    remedy="name its kind: reference, causal-lm or openai",
                )
            for line in estimate_cost(judges, store.questions("test"), len(keys)):
                meter.say(line)
            judge_answers(judges, store, records, cache, meter.say)
            sides.append((judges[slot].name, judges[slot].fingerprint))
        tables = [store.judgements(fingerprint) for _, fingerprint in sides]
        verdicts = [_verdict_by(store, slot, *side) for side in sides]
    if sides[0][1] == sides[1][1]:
        raise ConfigError(
            got=f"{sides[0][0]} twice", expected="two judges", remedy="name another one as --second.kind and its model"
        )
    values = [[table.get(key, (None, ""))[0] for key in keys] for table in tables]
    agreement = compare(values[0], values[1], [question for question, _ in keys])
    if not agreement.n:
        raise RunFolderError(
            got=f"no answer that both judged ({' and '.join(map(str, agreement.missing))} of {len(keys)} missing)",
            expected="answers judged by both",
            remedy="see to the judge that fails, then run the same command again",
        )
    return (sides[0][0], sides[1][0]), agreement, (verdicts[0], verdicts[1])


def _verdict_by(store: Store, slot: Slot, name: str, fingerprint: str) -> Verdict:
    """The run's verdict with that judge in the slot; by the slot's own score if the other slot has no judge."""
    judges = (store.fact("judges") or {}) | {slot: {"name": name, "fingerprint": fingerprint}}
    score = "info_truth" if {"truth", "info"} <= set(judges) else slot
    return decide_run(store, judged_records(store, judges), score)
