"""Truth and information of the edited models' answers, as plain values: a table of judged scores. No HTML here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from locaudit.records import TrialRecord
from locaudit.report.style import METHOD_TITLES
from locaudit.report.view import base_record, place_name
from locaudit.stats import JUDGED, Verdict, select
from locaudit.stats.judged import ASPECT_NAMES

Intervals = Mapping[str, Mapping[str, tuple[float, float]]]
"""Trial id -> score -> interval."""


@dataclass(frozen=True)
class JudgedCell:
    """A judged score and how sure it is."""

    value: float | None
    low: float | None
    """Lower end of the bootstrap interval; for a mean of controls, the lowest of them."""
    high: float | None


@dataclass(frozen=True)
class JudgedRow:
    """One line of the table."""

    name: str
    cells: tuple[JudgedCell, ...]
    """One a score."""
    n_missing: int
    """Judgements of its test answers that are missing."""
    n_asked: int
    """Judgements asked for."""
    is_mean: bool = False
    """A mean of controls, so that its cells have a range instead of an interval."""


@dataclass(frozen=True)
class JudgedMethod:
    """The table's lines of one method: claim, whole model and mean control, then each control."""

    title: str
    main: tuple[JudgedRow, ...]
    controls: tuple[JudgedRow, ...]


@dataclass(frozen=True)
class JudgedTable:
    """Judged scores of a run on its test questions."""

    scores: tuple[str, ...]
    judges: Mapping[str, str]
    """Aspect -> name of its judge."""
    base: JudgedRow
    methods: tuple[JudgedMethod, ...]
    missing: Mapping[str, int]
    """Aspect -> judgements that are missing, over the test answers of all trials."""
    n_answers: int
    """Test answers of all trials, each of which every aspect's judge is asked about."""

    @property
    def any_missing(self) -> bool:
        """Whether a line of the table lacks judgements."""
        lines = [self.base, *(row for method in self.methods for row in (*method.main, *method.controls))]
        return any(line.n_missing for line in lines)


def judged_scores(records: Sequence[TrialRecord]) -> tuple[str, ...]:
    """Scores from judges that the unedited model has, the primary one first; none if its answers were not judged."""
    there = base_record(records).metrics["test"]
    return tuple(score for score in JUDGED if score in there)


def count_judgements(record: TrialRecord) -> Mapping[str, tuple[int, int]]:
    """Aspect -> how many judgements of the trial's test answers are missing, and how many there should be."""
    questions = record.questions.get("test", {})
    there = [aspect for aspect in ASPECT_NAMES if aspect in questions]
    return {aspect: (sum(map(math.isnan, questions[aspect])), len(questions[aspect])) for aspect in there}


def judged_table(
    records: Sequence[TrialRecord], verdict: Verdict, judges: Mapping[str, str], intervals: Intervals
) -> JudgedTable | None:
    """The table of a run, or None if nothing was judged."""
    scores = judged_scores(records)
    if not scores:
        return None
    counts = [count_judgements(record) for record in records]
    aspects = [aspect for aspect in ASPECT_NAMES if any(aspect in count for count in counts)]
    chosen = select(records, verdict.score)
    return JudgedTable(
        scores=scores,
        judges=judges,
        base=_row("Unedited model", base_record(records), scores, intervals),
        methods=tuple(_method(method, chosen[method], scores, intervals) for method in verdict.methods),  # type: ignore[index]
        missing={aspect: sum(count[aspect][0] for count in counts if aspect in count) for aspect in aspects},
        n_answers=max(sum(count[aspect][1] for count in counts if aspect in count) for aspect in aspects),
    )


def _method(method: str, places: Mapping, scores: Sequence[str], intervals: Intervals) -> JudgedMethod:
    rows = {place: _row(place_name(place), record, scores, intervals) for place, record in sorted(places.items())}
    controls = tuple(row for place, row in rows.items() if place[0] == "control")
    main = [rows[place] for place in (("claim", -1), ("whole", -1), ("rest", -1)) if place in rows]
    if controls:
        main.append(_mean_row(controls))
    return JudgedMethod(METHOD_TITLES[method], tuple(main), controls)


def _row(name: str, record: TrialRecord | None, scores: Sequence[str], intervals: Intervals) -> JudgedRow:
    if record is None:
        return JudgedRow(name, (JudgedCell(None, None, None),) * len(scores), 0, 0)
    nothing = (None, None)
    found = intervals.get(record.spec.trial_id, {})
    cells = tuple(JudgedCell(record.metrics["test"].get(score), *found.get(score, nothing)) for score in scores)
    counts = count_judgements(record).values()
    return JudgedRow(name, cells, sum(missing for missing, _ in counts), sum(asked for _, asked in counts))


def _mean_row(rows: Sequence[JudgedRow]) -> JudgedRow:
    scored = [row for row in rows if any(_is_number(cell.value) for cell in row.cells)]
    cells = []
    for column in zip(*(row.cells for row in rows), strict=True):
        values = [cell.value for cell in column if _is_number(cell.value)]
        mean = math.fsum(values) / len(values) if values else None
        cells.append(JudgedCell(mean, min(values, default=None), max(values, default=None)))
    n_missing, n_asked = sum(row.n_missing for row in rows), sum(row.n_asked for row in rows)
    return JudgedRow(f"Mean of {len(scored)} controls", tuple(cells), n_missing, n_asked, is_mean=True)


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
