"""Hyperparameters are chosen on validation questions; only the chosen edit's test score counts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from locaudit.records import Arm, Method, TrialRecord

Place = tuple[Arm, int]
"""(arm, control number): what is compared."""


def select(records: Iterable[TrialRecord], score: str) -> Mapping[Method, Mapping[Place, TrialRecord | None]]:
    """For each method and place, the record with the best validation mean of `score`; None if all of them diverged.

    A place with one hyperparameter needs no validation scores. Ties go to the smaller KL drift, then to the smaller
    hyperparameter, so that the choice does not depend on the order of the records.
    """
    groups: dict[Method, dict[Place, list[TrialRecord]]] = {}
    for record in records:
        place = (record.spec.arm, record.spec.control)
        groups.setdefault(record.spec.method, {}).setdefault(place, []).append(record)
    return {method: {place: _best(group, score) for place, group in sorted(places.items())}
            for method, places in groups.items()}  # fmt: skip


def _best(group: list[TrialRecord], score: str) -> TrialRecord | None:
    finite = [record for record in group if record.status == "ok"]
    if len(finite) <= 1:
        return finite[0] if finite else None

    def key(record: TrialRecord) -> tuple[float, float, float]:
        value = record.metrics["val"].get(score, math.nan)  # NaN: no answer of it could be judged
        return (
            math.inf if math.isnan(value) else -value,
            record.drift.get("kl", math.inf),
            -math.inf if record.spec.hyperparameter is None else record.spec.hyperparameter,
        )

    return min(finite, key=key)
