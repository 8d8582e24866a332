"""What the page of a run holds besides its text, as one JSON value: tables, charts and answers, within a limit of size.

Tables and charts name trials by their row in the table ``trials``. Rows, lines and answers are taken in the order of
their importance until the page is full; a reader is told how many are left out, and where all of them are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, chain, islice, product
from statistics import fmean
from typing import Any

from locaudit.location import short_location
from locaudit.records import Place
from locaudit.report.answers import Speech, speech
from locaudit.report.charts import Chart, Line, draw_strip, heat_chart, line_chart, scatter_chart
from locaudit.report.drawings import UNJUDGED, null_panels, trial_series
from locaudit.report.figures import HeatMap
from locaudit.report.style import ARM_COLOURS, ARM_NAMES, MIDDLE, aspect_words, score_title
from locaudit.report.tables import Mean, Row, Tables, place_name
from locaudit.stats.changes import find_changes
from locaudit.stats.phrases import where
from locaudit.stats.scores import has_score, score_values
from locaudit.stats.verdict import Verdict
from locaudit.store.manifest import Manifest
from locaudit.text import LONGEST, readable

SMALL, LARGE, MANY = 5_000_000, 8_000_000, 200
"""Largest page in bytes, up to so many trials and for any run, and that number of trials."""
SHARE = 0.35
"""Share of the room in a page that the table of trials may take."""
N_LINES, N_STEPS, N_WINDOWS = 20, 100, 8
"""Controls whose training is drawn in a run of more than `MANY` trials; most points of a line, and points an epoch."""
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
TITLES: Mapping[str, str] = {
    "method": "method", "edit": "edit", "hyperparameter": "strength", "location": "location", "null": "null",
    "status": "status", "chosen": "chosen", "worse": "worse", "better": "better", "n_missing": "judgements missing",
    "seconds": "seconds",
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


def make_table(
    title: str,
    rows: Sequence[Mapping[str, Any]],
    titles: Mapping[str, str] = TITLES,
    *,
    filters: Sequence[str] = (),
    hidden: Sequence[str] = (),
    only: tuple[str, Any] | None = None,
    n: int | None = None,
    first: Sequence[str] = (),
) -> dict[str, Any]:
    """A table that a reader sorts, searches, filters and downloads; `rows` have equal keys.

    The interval of a column ``x`` is in the columns ``x_low`` and ``x_high``. `hidden` columns are only downloaded.
    `only` is a column and its value to which the table is filtered at first, and `n` the number of all rows. The
    `first` columns are shown before the others.
    """
    keys = list(rows[0]) if rows else []
    ends = {f"{key}{end}" for key in keys for end in ("_low", "_high")}
    columns = [
        {"key": key, "title": titles.get(key) or score_title(key),
         **({"interval": [keys.index(f"{key}_low"), keys.index(f"{key}_high")]} if f"{key}_low" in keys else {}),
         **({"hidden": True} if key in hidden or key in ends else {}), **({"filter": True} if key in filters else {})}
        for key in keys
    ]  # fmt: skip
    return {
        "title": title,
        "columns": columns,
        "rows": [list(row.values()) for row in rows],
        "only": only,
        "n": len(rows) if n is None else n,
        "first": [key for key in first if key in keys],
    }


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
            **dict(_tables(t)),
        },
        "charts": dict(_charts(t, rows)),
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


# --- tables


def _tables(t: Tables) -> Iterator[tuple[str, dict[str, Any]]]:
    v = t.verdict
    yield "arms", make_table("Claim, whole model and mean control", list(_arms(t)), filters=("method",))
    if v.methods:
        yield "effects", make_table("Gain at the claim", [_effect(t, name) for name in v.methods], _EFFECTS)
        yield "nulls", make_table("Claim against controls", list(_nulls(t)), _NULLS)
    if v.off_target:
        rows = [
            {"behaviour": o.behaviour, "n": o.n, "method": t.methods[o.method].title, "score": score_title(o.score),
             "base": o.base, "claim": o.claim, **_interval("gain", o.gain, o.gain_interval), "whole": o.whole_model,
             **_interval("controls", fmean(o.controls) if o.controls else None,
                         (min(o.controls), max(o.controls)) if o.controls else None),
             "n_at_least": f"{o.n_at_least} of {len(o.controls)}{' ' + o.among if o.among else ''}"}
            for o in v.off_target
        ]  # fmt: skip
        yield "off_target", make_table("Other behaviours under the same edits", rows, _OFF)
    if t.corrected:
        rows = [
            {"score": score_title(line.score),
             "edit": f"{t.methods[line.method].title}: {line.what}" if line.method in t.methods else line.what,
             **_interval("judged", line.judged, line.judged_interval),
             **_interval("corrected", line.corrected.value, line.corrected.interval), "n": line.corrected.n}
            for line in t.corrected.lines
        ]  # fmt: skip
        yield "labels", make_table("Corrected by trusted labels", rows, _LABELS)
    if t.specification.rows:
        rows = [
            {"method": t.methods[row.method].title, "score": score_title(row.score), "judgement": row.judgement,
             "answers": row.answers, "samples": row.samples, "strength": row.strength, "null": row.null,
             "seed": row.seed, "base": row.base, "claim": row.claim, "effect": row.effect, "lead": row.lead,
             "n_at_least": row.n_at_least, "n_controls": row.n_controls, "p_value": row.p_value, "better": row.better}
            for row in t.specification.rows
        ]  # fmt: skip
        yield (
            "specification",
            make_table("Other choices", rows, _SPECIFICATION, filters=("method", "score", "null", "better")),
        )
    if t.designs:
        rows = [
            {"questions": d.size.questions, "samples": d.size.samples, "controls": d.size.controls,
             "seeds": d.size.seeds, "minutes": d.seconds / 60, "lead": d.lead}
            for d in t.designs.rows
        ]  # fmt: skip
        yield (
            "designs",
            make_table("Larger audits", rows, {**_DESIGNS, "lead": f"power for a lead of {t.designs.lead}"}),
        )
    if t.probes is not None and sum(map(len, t.probes.val_accuracy)) <= N_UNITS:
        rows = [
            {"layer": layer, "unit": unit, "val_accuracy": accuracy}
            for layer, row in enumerate(t.probes.val_accuracy)
            for unit, accuracy in enumerate(row)
        ]
        yield (
            "probes",
            make_table(
                "Probes", rows, {"layer": "layer", "unit": t.probes.kind, "val_accuracy": "validation accuracy"}
            ),
        )


_EFFECTS = {"method": "method", "strength": "strength", "base": "unedited", "claim": "claim", "whole": "whole model",
            "effect": "gain", "effect_p": "p"}  # fmt: skip
_NULLS = {
    "method": "method", "null": "null", "controls": "mean control (range)", "n_at_least": "as good", "n_used": "of",
    "p_value": "p", "p_adjusted": "p adjusted for methods", "p_new_place": "p of the t-test", "lead": "lead",
    "true_share": "truly as good", "population": "places", "ended_early": "ended early", "can_test": "can test",
}  # fmt: skip
_OFF = {
    "behaviour": "behaviour", "n": "questions", "method": "method", "score": "score", "base": "unedited",
    "claim": "claim", "gain": "gain", "whole": "whole model", "controls": "mean control (range)",
    "n_at_least": "controls at or above the claim",
}  # fmt: skip
_LABELS = {
    "score": "score",
    "edit": "edit",
    "judged": "by the judge",
    "corrected": "corrected",
    "n": "labelled questions",
}
_SPECIFICATION = {
    "method": "method", "score": "score", "judgement": "judgement", "answers": "answers", "samples": "samples",
    "strength": "strength", "null": "null", "seed": "seed", "base": "unedited", "claim": "claim", "effect": "gain",
    "lead": "lead", "n_at_least": "as good", "n_controls": "of", "p_value": "p", "better": "better",
}  # fmt: skip
_DESIGNS = {
    "questions": "test questions",
    "samples": "samples",
    "controls": "controls",
    "seeds": "seeds",
    "minutes": "minutes",
}


def _interval(name: str, value: float | None, ends: Sequence[float] | None) -> dict[str, float | None]:
    low, high = ends or (None, None)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def _effect(t: Tables, name: str) -> dict[str, Any]:
    v = t.verdict.methods[name]
    return {
        "method": t.methods[name].title, "strength": v.chosen.get("claim"), "base": v.base, "claim": v.claim,
        "whole": v.whole_model, **_interval("effect", v.effect, v.effect_interval), "effect_p": v.effect_p,
    }  # fmt: skip


def _nulls(t: Tables) -> Iterator[dict[str, Any]]:
    for name, null in ((name, null) for name, v in t.verdict.methods.items() for null in v.nulls.values()):
        scored = [x for x in null.controls if math.isfinite(x)]
        yield {
            "method": t.methods[name].title, "null": null.name,
            **_interval("controls", fmean(scored) if scored else None, (min(scored), max(scored)) if scored else None),
            "n_at_least": null.n_at_least, "n_used": null.n_used, "p_value": null.p_value,
            "p_adjusted": null.p_adjusted, "p_new_place": null.p_new_place,
            **_interval("lead", null.lead, null.lead_interval),
            **_interval("true_share", null.true_share, null.true_share_interval), "population": null.population,
            "ended_early": null.ended_early, "can_test": null.can_test,
        }  # fmt: skip


def _arms(t: Tables) -> Iterator[dict[str, Any]]:
    """The unedited model, and for each method the places other than controls, and the mean of each null's controls."""
    with_ends = {*t.judged, "worse", "better", t.verdict.score}

    def line(method: str, edit: str, row: Row | Mean | None, n: int) -> dict[str, Any]:
        strength = row.record.spec.hyperparameter if isinstance(row, Row) else None
        found: dict[str, Any] = {"method": method, "edit": edit, "n": n, "hyperparameter": strength}
        changes = row.changes if isinstance(row, Row) else None
        for name in t.columns:
            value = row.values.get(name) if row else None
            ends = row.bounds.get(name) if row else None
            ends = getattr(changes, f"{name}_interval", ends)
            found |= _interval(name, value, ends) if name in with_ends else {name: value}
        return found | {"n_missing": row.n_missing if row and t.any_missing else None}

    yield line("", place_name(t.base.place), t.base, 1)
    for method in t.verdict.methods:
        title = t.methods[method].title
        for place, row in t.arms(method).items():
            yield line(title, place_name(place), row, 1)
        for null in t.controls(method):
            mean = t.mean_control(method, null, t.columns)
            yield line(title, f"Mean of {mean.n} controls{where(null)}", mean, mean.n)


# --- charts


def _charts(t: Tables, rows: Sequence[Row]) -> Iterator[tuple[str, Chart]]:
    base, score = t.base.values, t.verdict.score
    drift = f"KL from the unedited model{t.manifest.drift_on and ' ' + t.manifest.drift_on} (nats per token)"
    for name in [score, UNJUDGED] if score in t.judged else [score]:
        if series := trial_series(t, "kl", name, rows=rows, minus=base.get(name, math.nan)):
            title = f"{score_title(name)}, minus unedited"
            yield f"drift_{name}", scatter_chart(series, xlabel=drift, ylabel=title, base=(None, 0.0), is_drift=True)
    if len(t.aspects) > 1:
        y, x = (f"{aspect}_probability" for aspect in t.aspects[:2])
        ours = base.get(x, math.nan), base.get(y, math.nan)
        if (series := trial_series(t, x, y, rows=rows)) and all(map(math.isfinite, ours)):
            curve = f"unedited {score_title(t.judged[0])}"
            yield (
                "truth_info",
                scatter_chart(series, xlabel=score_title(x), ylabel=score_title(y), base=ours, product=curve),
            )
    if t.probes is not None and sum(map(len, t.probes.val_accuracy)) <= N_UNITS:
        heat = HeatMap(t.probes.val_accuracy, "probe accuracy")
        yield "probes", heat_chart(heat, t.claimed_heads, floor=t.probes.majority)
    for method in t.verdict.methods:
        if effects := single_effects(t, method):
            yield f"effects_{method}", heat_chart(effects, t.claimed_heads)
    yield from _curves(t)


def single_effects(t: Tables, method: str) -> HeatMap | None:
    """What the edit of each single head gains over the unedited model, NaN where none was run; None if none was."""
    shape = t.manifest.shape
    values = [[math.nan] * shape.n_heads for _ in range(shape.n_layers)]
    gains = []
    for row in t.places(method).values():
        where = row.record.spec.location if row else None
        if row is None or where is None or (where.kind, where.scope, len(where.units)) != ("head", "listed", 1):
            continue
        (unit,) = where.units
        gain = row.values.get(t.verdict.score, math.nan) - t.base.values.get(t.verdict.score, math.nan)
        if not isinstance(unit, str) and math.isfinite(gain):
            values[unit[0]][unit[1]] = gain
            gains.append(abs(gain))
    reach = max([*gains, 1e-6])
    title = f"gain in {score_title(t.verdict.score)}"
    return HeatMap(values, title, {"vmin": -reach, "vmax": reach}) if gains else None


def nearest(t: Tables, method: str) -> list[tuple[Place, Row]]:
    """The scored controls of a method, by how near their score is to the claim's."""
    claim = t.verdict.methods[method].claim
    found = [(place, row) for rows in t.controls(method).values() for place, row in rows.items() if row is not None]
    return sorted(found, key=lambda pair: _far(pair[1].values.get(t.verdict.score, math.nan) - claim))


def _far(x: float | None) -> float:
    return abs(x) if x is not None and math.isfinite(x) else math.inf


def _curves(t: Tables) -> Iterator[tuple[str, Chart]]:
    """Validation score by strength, and training loss by step: controls thin, claim and whole model above them."""
    for method, facts in t.methods.items():
        if method not in t.verdict.methods:
            continue
        shown = [place for place, _ in nearest(t, method)]
        shown = [*(shown if len(t.rows) <= MANY else shown[:N_LINES])[::-1], Place("whole"), Place("claim")]
        if lines := _as_lines({place: _tuning(t, method, place) for place in shown}):
            log = min(x for one in lines for x in one.x) > 0
            title = f"{score_title(t.verdict.score)} on validation"
            yield f"tuning_{method}", line_chart(lines, xlabel=facts.symbol, ylabel=title, log=log)
        places, epochs = t.places(method), (facts.training or {}).get("epochs")
        most = min(N_STEPS, N_WINDOWS * (epochs if isinstance(epochs, int) else 1))
        losses = {place: row.record.training.get("loss", ()) for place in shown if (row := places.get(place))}
        # the loss of the first step is that of the unedited model
        shares = {place: [x / loss[0] for x in loss] for place, loss in losses.items() if len(loss) > 1 and loss[0]}
        if lines := _as_lines({place: in_windows(share, most) for place, share in shares.items()}):
            ends = [1.0, float(max(map(len, losses.values())))]
            lines.insert(0, Line("no edit", MIDDLE, ends, [1.0, 1.0], dash="dot", wide=False))
            yield f"loss_{method}", line_chart(lines, xlabel="step", ylabel="training loss / that of no edit")


def _tuning(t: Tables, method: str, place: Place) -> tuple[list[float], list[float]]:
    """The strengths tried at a place that have a score on validation questions, and these scores."""
    found = [
        (strength, score)
        for row in t.rows
        if (row.record.spec.method, row.place) == (method, place)
        and (strength := row.record.spec.hyperparameter) is not None
        and math.isfinite(score := row.record.metrics.get("val", {}).get(t.verdict.score, math.nan))
    ]
    return [x for x, _ in sorted(found)], [y for _, y in sorted(found)]


def _as_lines(found: Mapping[Place, tuple[Sequence[float], Sequence[float]]]) -> list[Line]:
    """A line for each place with two points or more. Each arm is named once."""
    lines: dict[Place, Line] = {}
    for place, (x, y) in found.items():
        if len(x) > 1:
            label = "" if place.arm in {one.arm for one in lines} else ARM_NAMES[place.arm]
            lines[place] = Line(label, ARM_COLOURS[place.arm], x, y, wide=place.arm != "control")
    return list(lines.values())


def in_windows(values: Sequence[float], most: int) -> tuple[list[float], list[float]]:
    """The middles of at most `most` equally long windows of the values, counted from 1, and the mean in each window."""
    width = -(-len(values) // most)
    parts = [values[i : i + width] for i in range(0, len(values), width)]
    return [i * width + (len(part) + 1) / 2 for i, part in enumerate(parts)], [fmean(part) for part in parts]


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


def null_figure(verdict: Verdict, manifest: Manifest) -> str:
    """SVG of the main method's null distributions, with claim, whole model and unedited model; empty without any."""
    v = verdict.methods.get(verdict.main)
    panels = [] if v is None else null_panels(v, manifest.methods[v.method], manifest.kind_plural)
    if not panels:
        return ""
    alt = f"{score_title(verdict.score)}: " + "; ".join(panel.title for panel in panels)
    alt += "".join(f"; {mark.label} {mark.value:.3g}" for mark in panels[0].marks if _far(mark.value) < math.inf)
    return draw_strip(panels, xlabel=f"{score_title(verdict.score)} on test questions", alt=alt)


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
