"""What fits into the page of a run besides its text: tables, charts and answers as one JSON value, of limited size.

`page_tables` and `run_charts` say what there is. Tables and charts name trials by their row in the table ``trials``.
Rows, lines and answers are taken in the order of their importance until the page is full; a reader is told how many are
left out, and where all of them are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, chain, islice, product
from typing import Any

from locaudit.location import short_location
from locaudit.records import Place
from locaudit.report.answers import Speech, speech
from locaudit.report.page_tables import make_table, page_tables
from locaudit.report.run_charts import nearest, run_charts
from locaudit.report.style import aspect_words, score_title
from locaudit.report.tables import Row, Tables, place_name
from locaudit.stats.changes import find_changes
from locaudit.stats.scores import has_score, score_values
from locaudit.text import LONGEST, readable

SMALL, LARGE, MANY = 5_000_000, 8_000_000, 200
"""Largest page in bytes, up to so many trials and for any run, and that number of trials."""
SHARE = 0.35
"""Share of the room in a page that the table of trials may take."""
N_LINES = 20
"""Controls whose training is drawn in a run of more than `MANY` trials."""
N_UNITS = 10_000
"""Most units of a model for which probes are drawn and listed."""
LONG_FILE, LONG_LOCATION = 1_000_000, 500
"""A longer verdict.json is not in the page; a longer location is shortened."""
HARDLY = 0.05
"""An edit whose training loss fell by less than this share hardly moved."""
SECTIONS = {
    "verdict": "Verdict", "edits": "Edits", "places": "Places", "training": "Training", "answers": "Answers",
    "power": "Power", "how": "Method",
}  # fmt: skip


def size_of(value: Any) -> int:
    """Bytes of a value as JSON."""
    return len(json.dumps(value, ensure_ascii=False).encode(errors="replace"))


def that_fit(values: Iterable[Any], room: float) -> list[Any]:
    """The first values whose JSON fits into `room` bytes together."""
    found = []
    for value in values:
        room -= size_of(value) + 1
        if room < 0:
            break
        found.append(value)
    return found


def page_data(t: Tables, room: float | None = None) -> dict[str, Any]:
    """Tables, charts and answers of a run. `room` is the number of bytes for them (None: by the number of trials)."""
    room = room or (SMALL if len(t.rows) <= MANY else LARGE) - 1_400_000  # Plotly, style sheet and text
    lines = [{"edit": place_name(row.place), **line} for row, line in zip(t.rows, t.lines, strict=True)]
    for line in lines:
        if len(line["location"]) > LONG_LOCATION:
            line["location"] = short_location(line["location"])
    verdict = t.verdict_json()
    order = sorted(range(len(lines)), key=lambda i: (not t.rows[i].chosen, i))
    kept = {i for i, _ in that_fit(((i, list(lines[i].values())) for i in order), SHARE * room)}
    rows = [row for i, row in enumerate(t.rows) if i in kept]
    found: dict[str, Any] = {
        "files": {"verdict.json": verdict} if len(verdict) < LONG_FILE else {},
        "tables": {
            "trials": make_table(
                "Trials", [line for i, line in enumerate(lines) if i in kept], n=len(lines), only=("chosen", True),
                filters=("method", "arm", "null", "status", "chosen"),
                hidden=("trial_id", "arm", "control"), first=("edit", "method", "hyperparameter", t.verdict.score),
            ),
            **dict(page_tables(t, N_UNITS)),
        },
        "charts": dict(run_charts(t, rows, n_lines=None if len(t.rows) <= MANY else N_LINES, n_units=N_UNITS)),
    }  # fmt: skip
    found["answers"] = answers(t, rows, room - size_of(found))
    return found


def sections(data: Mapping[str, Any]) -> dict[str, str]:
    """Id -> title of each section that a page has."""
    charts = data["charts"]
    there = {
        "verdict": True,
        "edits": True,
        "places": any(name.startswith(("probes", "effects_")) for name in charts),
        "training": any(name.startswith(("tuning_", "loss_")) for name in charts),
        "answers": data["answers"] is not None,
        "power": True,
        "how": True,
    }
    return {name: SECTIONS[name] for name, is_there in there.items() if is_there}


def hardly_moved(t: Tables) -> list[str]:
    """A warning for each trained edit of claim and whole model whose training loss hardly fell, with loss and KL."""
    found = []
    for method, place in product(t.verdict.methods, (Place("claim"), Place("whole"))):
        row = t.places(method).get(place)
        if row is None or not t.methods[method].trained or "objective" not in row.record.training:
            continue
        start, end = row.record.training["loss"][0], row.record.training["objective"][0]  # the first step is unedited
        kl = row.record.drift.get("kl", math.nan)
        if start - end < HARDLY * abs(start):
            found.append(
                f"{t.methods[method].title}, {place_name(place).lower()}: the edit hardly moved. Its training loss "
                f"went from {start:.3g} to {end:.3g}, its KL is {kl:.2g} nats per token."
            )
    return found


# --- answers


def answers(t: Tables, rows: Sequence[Row], room: float) -> dict[str, Any] | None:
    """The answers of the unedited model, of claims, whole models and nearest controls, then of all others that fit.

    Each speaker has ``text`` (number of each answer in ``texts``), ``judged`` (aspect -> P or None) and ``change``, the
    difference of the verdict's score at each question from the unedited model: 0 if it is within rounding. If the first
    speakers do not fit, the last questions are left out. None if nothing was generated.
    """
    if not t.base.record.said("test"):
        return None
    speakers, n_speakers = _speakers(t, rows), sum(len(row.record.said("test")) for row in t.rows)
    first = list(islice(speakers, 1 + 3 * len(t.verdict.methods)))
    asked = [readable(q.text, LONGEST) for q in t.questions]
    sizes = [size_of([asked[i], *(one.part(i) for one in first)]) for i in range(len(asked))]
    n = max(1, sum(total <= room for total in accumulate(sizes)))
    texts: dict[str, int] = {}
    found = []
    for one in that_fit((one.to_dict(n) for one in chain(first, speakers)), room - size_of(asked[:n])):
        said = one.pop("answers")
        found.append({**one, "text": [texts.setdefault(x, len(texts)) for x in said]})
    return {
        "score": score_title(t.verdict.score),
        "aspects": {aspect: aspect_words(aspect)[1] for aspect in t.judgements},
        "questions": asked[:n],
        "n_questions": len(t.questions),
        "texts": list(texts),
        "speakers": found,
        "left_out": n_speakers - len(found),
    }


def _speakers(t: Tables, rows: Sequence[Row]) -> Iterator[Speech]:
    """Who is shown, the most important first."""
    order: dict[int, str] = {}
    by_record = {id(row.record): i for i, row in enumerate(rows)}

    def add(row: Row | None, name: str) -> None:
        if row is not None and id(row.record) in by_record:
            order.setdefault(by_record[id(row.record)], name)

    add(t.base, "Unedited model")
    queues = []
    for method in t.verdict.methods:
        places, title = t.places(method), t.methods[method].title
        for place in (Place("claim"), Place("whole")):
            add(places.get(place), f"{title}: {place_name(place).lower()}")
        queues.append([(row, f"{title}: {place_name(place).lower()}") for place, row in nearest(t, method)])
    for queue in queues:
        for pair in queue[:1]:
            add(*pair)
    for queue in queues:
        for pair in queue[1:]:
            add(*pair)
    for row in rows:
        spec = row.record.spec
        title = t.methods[spec.method].title if spec.method in t.methods else ""
        strength = "" if spec.hyperparameter is None else f", {t.methods[spec.method].symbol} = {spec.hyperparameter:g}"
        add(row, f"{title}: {place_name(row.place).lower()}{'' if row.chosen else strength}")
    before = t.base.record.questions["test"]
    for i, name in order.items():
        record = rows[i].record
        changes = [0.0] * len(t.questions)
        own = record.questions.get("test", {})
        if record is not t.base.record and has_score(own, t.verdict.score):
            after, unedited = (score_values(x, t.verdict.score) for x in (own, before))
            changes = find_changes(after, unedited, t.verdict.tolerance).tolist()
        for sample, said in enumerate(record.said("test")):
            meta = {"name": name, "trial": i, "method": record.spec.method, "arm": record.spec.arm, "sample": sample}
            yield speech(meta, t.questions, said, t.judgements, changes)
