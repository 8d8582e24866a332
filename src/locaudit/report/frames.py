"""A run as tidy pandas frames. Only this file needs pandas (extra ``report``). It is imported when a frame is made."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from locaudit.report.style import require
from locaudit.report.tables import Tables, identify
from locaudit.stats.scores import judged_metrics
from locaudit.store.run import Run

if TYPE_CHECKING:
    from pandas import DataFrame


def trials_frame(tables: Tables) -> DataFrame:
    """One row per trial, with the columns of trials.csv. Values that were not measured are NaN."""
    return require("pandas").DataFrame(tables.lines)


def specification_frame(tables: Tables) -> DataFrame:
    """One row per combination of choices that the trials allow, with the columns of specification.csv."""
    return require("pandas").DataFrame([asdict(row) for row in tables.specification.rows])


def scores_frame(run: Run) -> DataFrame:
    """One row per trial, split, question and metric. ``value`` is NaN if a judgement is missing."""
    rows = [
        {**identify(record), "split": split, "question": question.id, "metric": metric, "value": value}
        for record in run.records
        for split, metrics in record.questions.items()
        for metric, values in metrics.items()
        for question, value in zip(run.questions[split], values, strict=True)
    ]
    return require("pandas").DataFrame(rows)


def answers_frame(run: Run) -> DataFrame:
    """One row per generated answer, with the rating of each judge.

    ``sample`` is 0 for the greedy answer, then the number of the sample. Each aspect has three columns. For the aspect
    ``truth``, ``truth`` is 1 for a yes and 0 for a no, ``truth_probability`` is P(yes), and ``truth_reason`` says why
    these two are missing (NaN). The frame is empty if nothing was generated.
    """
    rows = []
    for record in run.trials:
        for split in record.answers:
            for sample, answers in enumerate(record.said(split)):
                for question, answer in zip(run.questions[split], answers, strict=True):
                    row = {**identify(record), "split": split, "question": question.id, "text": question.text}
                    row |= {"sample": sample, "answer": answer}
                    for aspect, table in run.judgements.items():
                        p, reason = table.get((question.id, answer), (None, "not yet"))
                        found = judged_metrics({aspect: [p]})
                        row |= {name: value for name, (value,) in found.items()} | {f"{aspect}_reason": reason}
                    rows.append(row)
    return require("pandas").DataFrame(rows)
