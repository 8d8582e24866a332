"""trials.csv: one line a trial, for readers who would rather do their own statistics."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence

from locaudit.records import TrialRecord
from locaudit.report.judged import Intervals, count_judgements
from locaudit.report.view import METRICS, chosen_ids
from locaudit.stats import JUDGED

_METHODS = ("none", "iti", "optimal")
_ARMS = ("base", "claim", "whole", "rest", "control")


def trials_csv(records: Sequence[TrialRecord], score: str, seconds: Mapping[str, float], intervals: Intervals) -> str:
    """CSV text: a trial's identity, whether it was chosen on validation questions, its test scores, drift and time.

    Judged scores have a 95 % bootstrap interval beside them, and `n_missing` counts the missing judgements of the
    trial's test answers. Floats keep every digit; what was not measured is empty. Lines go by method, arm, control and
    hyperparameter.
    """
    found = {metric for record in records for metric in record.metrics.get("test", {})}
    known = [name for name in (*JUDGED, *METRICS) if name in found]
    metrics = [*known, *sorted(found - set(known))]
    bounds = {name: (f"{name}_low", f"{name}_high") for name in metrics if name in JUDGED}
    chosen = chosen_ids(records, score)
    header = ["trial_id", "arm", "control", "method", "hyperparameter", "location", "status", "chosen"]
    for name in metrics:
        header += [name, *bounds.get(name, ())]
    header += [*(["n_missing"] if bounds else []), "kl", "ce", "seconds"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for record in sorted(records, key=_order):
        spec, measured = record.spec, record.metrics.get("test", {})
        line: list[object] = [
            spec.trial_id, spec.arm, spec.control, spec.method, _number(spec.hyperparameter), spec.location,
            record.status, "true" if spec.trial_id in chosen else "false",
        ]  # fmt: skip
        for name in metrics:
            line.append(_number(measured.get(name)))
            if name in bounds:
                low, high = intervals.get(spec.trial_id, {}).get(name, (None, None))
                line += [_number(low), _number(high)]
        if bounds:
            counts = count_judgements(record)
            line.append(sum(missing for missing, _ in counts.values()) if counts else "")
        line += [_number(record.drift.get(name)) for name in ("kl", "ce")]
        writer.writerow([*line, _number(seconds.get(spec.trial_id))])
    return text.getvalue()


def _order(record: TrialRecord) -> tuple:
    spec = record.spec
    strength = -math.inf if spec.hyperparameter is None else spec.hyperparameter
    return (
        _METHODS.index(spec.method), _ARMS.index(spec.arm), spec.control, strength, spec.seed, spec.trial_id,
    )  # fmt: skip


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else repr(float(value))
