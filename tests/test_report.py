"""The report of synthetic run folders: what the page says, what it escapes, what it leaves behind."""

import csv
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from base64 import b64encode
from dataclasses import replace
from hashlib import sha256
from html import escape, unescape
from html.parser import HTMLParser
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest

from locaudit import cli, read_result, registry
from locaudit.claims import Shape, parse_location
from locaudit.cli.shown import print_verdict
from locaudit.config import AuditConfig, EvaluationConfig, PromptConfig, load_config, read_registration
from locaudit.errors import ConfigError, LocauditError, RunFolderError
from locaudit.location import Location, short_location
from locaudit.records import Place, TrialRecord, TrialSpec, content_hash, mean_metrics
from locaudit.report import write_report
from locaudit.report.charts import HeatMap, Line, Series, heat_chart, line_chart, scatter_chart
from locaudit.report.figures import WIDTHS, draw, run_figures, save, write_figures
from locaudit.report.html import decimals, embed, number, spell_duration
from locaudit.report.page import LARGE, SMALL, hardly_moved, page_data, size_of
from locaudit.report.strip import Mark, Spread, draw_strip, nice_ticks, stack_dots, strip_chart
from locaudit.report.style import score_phrase
from locaudit.report.tables import read_tables, tabulate
from locaudit.stats import (
    JUDGED,
    MethodFacts,
    decide,
    estimate,
    judged_metrics,
    score_intervals,
    score_values,
)
from locaudit.stats.sequential import Null
from locaudit.store.database import HeldOutQuestion
from locaudit.store.folder import open_run
from locaudit.store.manifest import JudgeFacts, Manifest, ProbeFacts
from locaudit.store.run import Run, load_run
from locaudit.text import LONGEST
from pages import charts_of, data_of, rows_of, words

N = {"val": 8, "test": 12}
IDS = {split: [f"{split}{i}" for i in range(n)] for split, n in N.items()}
QUESTIONS = {
    split: tuple(HeldOutQuestion(q, f"Is <{q}> so?", ("No.",), ("Yes.",), f"key {q}") for q in ids)
    for split, ids in IDS.items()
}
SILENT = EvaluationConfig(max_new_tokens=0)
CONFIG = AuditConfig(controls=19, evaluation=SILENT)  # no judges in the manifest: the score is mc2
FIGURES = ["null", "effect_kl", "heads", "tuning"]
METHODS = {
    "iti": MethodFacts("ITI", symbol="α", n_strengths=2),
    "optimal": MethodFacts("Optimal edit", trained=True, symbol="τ", n_strengths=2),
}
ITI = {"iti": METHODS["iti"]}
PROBES = ProbeFacts(
    kind="head",
    val_accuracy=((0.5, 0.6, 0.55), (0.52, 0.7, 0.5), (0.8, 0.5, 0.45), (0.5, 0.5, 0.5)),
    majority=0.52, n_train=90, n_val=30, context="next_question", units=((2, 0), (1, 1)),
)  # fmt: skip
CLAIM = Location(((1, 1), (2, 0)))
CONTROLS = [Location(pair) for pair in combinations(product(range(4), range(3)), 2) if pair != CLAIM.units]
MANIFEST = Manifest(
    model="tiny", fingerprint="0123abcd", shape=Shape(4, 3, 3, 2, 8, 6), n_units=12, kind_plural="heads",
    behaviour="misconceptions", aspects=("truth", "info"), n_questions={"train": 30, **N},
    data={"questions": 50, "true": 100, "false": 100}, claim=CLAIM, claim_source="given", methods=METHODS,
    planned=85, nulls={"anywhere": Null(19, 65)}, versions={"locaudit": "0.1.0"}, device="cpu", dtype="float32",
    threads=2, probes=PROBES,
)  # fmt: skip
GAINS = {"base": 0.0, "claim": 0.2, "control": 0.05, "whole": 0.3}


def trial(arm, method="none", hyperparameter=None, control=-1, *, gain=None, status="ok", kl=None):
    place = {"base": None, "claim": CLAIM, "control": CONTROLS[control], "whole": Location.whole()}[arm]
    null = "anywhere" if arm == "control" else ""
    spec = TrialSpec(arm, method, place, hyperparameter, 0, "context", control, null=null)
    if status == "diverged":
        return TrialRecord(spec, "diverged", message="the loss became NaN at step 3 <b>of 9</b>")
    rng = np.random.default_rng(spec.rng_seed % 2**32 + control + 1)
    gain = GAINS[arm] if gain is None else gain
    scores = {
        split: {
            name: tuple(map(float, 0.4 + gain + np.linspace(-0.1, 0.1, n) + rng.normal(0, 0.02, n)))
            for name in ("mc1", "mc2", "mc3", "preference_accuracy", "reward_accuracy", "reward_margin")
        }
        for split, n in N.items()
    }
    return TrialRecord(
        spec,
        "ok",
        metrics=mean_metrics(scores),
        drift={"kl": gain**2 + (hyperparameter or 0) / 1000 if kl is None else kl, "ce": 2.5},
        questions=scores,
    )


def trials(method, grid=(1.0, 2.0), controls=19):
    places = [("claim", -1), *(("control", i) for i in range(controls)), ("whole", -1)]
    return [trial(arm, method, h, control) for arm, control in places for h in grid]


FULL = [trial("base"), *trials("iti"), *trials("optimal")]


def make_run(folder, records, *, manifest=MANIFEST, config=CONFIG):
    with open_run(folder, config) as store:
        store.write_manifest(manifest)
        store.set_questions(QUESTIONS)
        if records:
            store.add(records, seconds=1.5 * len(records))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("runs") / "finished", FULL)
    return folder, write_report(folder).read_text()


def figures_of(folder, form="png"):
    """The names of the files that the figures of a run are written to."""
    files = write_figures(run_figures(read_tables(folder)), folder / "figures", form)
    return [path.stem for path in files]


class _Outline(HTMLParser):
    """Tags that are opened and closed, and every attribute that could load something."""

    VOID = frozenset({"meta", "br", "img", "link", "hr"})

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.ids = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self._collect(attrs)

    def handle_startendtag(self, tag, attrs):
        self._collect(attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def _collect(self, attrs):
        self.loads += [v for k, v in attrs if k in ("src", "href", "xlink:href", "data")]
        self.ids += [v for k, v in attrs if k == "id"]


def test_the_page_shows_what_stood_before_the_questions(tmp_path):
    pages = {}
    config = replace(CONFIG, prompt=PromptConfig("qa"))
    for name, primer in {"none": "", "own": "Be <b>brief</b>.", "unknown": None}.items():
        folder = make_run(tmp_path / name, FULL[:1], manifest=replace(MANIFEST, primer=primer), config=config)
        pages[name] = write_report(folder).read_text()
    assert "no primer; style qa" in pages["none"]
    assert "a primer of 2 words" in pages["own"] and "Be &lt;b&gt;brief&lt;/b&gt;." in pages["own"]
    assert "Before each scored question" not in words(pages["unknown"])


def test_the_page_shows_a_prompt_as_it_was_rendered(tmp_path):
    manifest = replace(MANIFEST, prompt="Be brief.\n\nQ: <b>Is it?</b>\nA:")
    page = write_report(make_run(tmp_path / "run", FULL[:1], manifest=manifest)).read_text()
    assert "<pre>Be brief.\n\nQ: &lt;b&gt;Is it?&lt;/b&gt;\nA:</pre>" in page
    assert "Prompt as rendered" not in words(write_report(make_run(tmp_path / "old", FULL[:1])).read_text())


def test_a_finished_run_leaves_a_page_a_verdict_and_figures(finished):
    folder, page = finished
    assert "Unfinished" not in words(page)
    assert json.loads((folder / "verdict.json").read_text())["score"] == "mc2"
    assert charts_of(page) == ["drift_mc2", "probes", "tuning_iti", "tuning_optimal"]
    assert '<figure class="null" id="null">' in page
    assert figures_of(folder) == figures_of(folder, "svg") == FIGURES
    for name in FIGURES:
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / "figures" / f"{name}.svg").stat().st_size > 2_000
    assert not [p for p in folder.rglob("*.tmp")]


def test_the_page_is_well_formed_and_loads_nothing(finished):
    outline = _Outline()
    outline.feed(finished[1])
    assert outline.open == []
    assert all(link.startswith(("#", "data:")) for link in outline.loads)
    assert len(set(outline.ids)) == len(outline.ids)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', finished[1])[1]
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", finished[1], re.DOTALL)
    run = [text for look, text in scripts if not look]
    assert [look for look, _ in scripts if look] == [' type="application/json" id="data"'] and len(run) == 2
    hashes = [f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'" for text in run]
    assert policy.startswith(f"default-src 'none'; script-src {' '.join(hashes)}; style-src 'unsafe-inline'; img-src")
    assert len(finished[1].encode()) < SMALL


def test_numbers_in_the_page_are_those_of_the_verdict(finished):
    folder, page = finished
    verdict = json.loads((folder / "verdict.json").read_text())
    headline = re.search(r"<h1[^>]*>(.*?)</h1>", page)[1]
    assert re.sub("<.*?>", "", headline) == escape(verdict["headline"])
    effects, nulls = (rows_of(data_of(page), name) for name in ("effects", "nulls"))
    assert len(effects) == len(nulls) == 2
    assert verdict["headline"].startswith(f"{verdict['outcome']}: ")
    for (name, judged), effect, row in zip(verdict["methods"].items(), effects, nulls, strict=True):
        null = judged["nulls"]["anywhere"]
        low, high = judged["effect_interval"]
        assert effect == {
            "method": METHODS[name].title, "strength": judged["chosen"]["claim"], "base": judged["base"],
            "claim": judged["claim"], "whole": judged["whole_model"], "effect": judged["effect"], "effect_low": low,
            "effect_high": high, "effect_p": judged["effect_p"],
        }  # fmt: skip
        finite = null["controls"]
        same = "p_value", "p_adjusted", "p_new_place", "lead", "true_share", "n_at_least", "n_used", "population"
        assert {key: row[key] for key in same} == {key: null[key] for key in same}
        for key in ("lead", "true_share"):
            assert [row[f"{key}_low"], row[f"{key}_high"]] == null[f"{key}_interval"]
        assert (row["controls_low"], row["controls_high"]) == (min(finite), max(finite))
        assert row["controls"] == pytest.approx(np.mean(finite), abs=1e-12)
        cell = re.search(rf'<td id="{name}">(.*?)</td>', page)[1]
        assert judged["reason"] in unescape(cell) and judged["outcome"] in cell
        for question in judged["questions"]:
            answer = {"-": "unasked"}.get(question["answer"], question["answer"])
            badge = f'<b class="badge {answer}">{question["answer"]}</b> {escape(question["seen"])}'
            assert badge in page


def test_the_first_screen_has_a_badge_and_a_number_for_each_deciding_question(finished):
    verdict = json.loads((finished[0] / "verdict.json").read_text())
    first = finished[1].split("<h2")[0]
    asked = [q for q in verdict["methods"][verdict["main"]]["questions"] if q["name"] != "moves"]
    badges = re.findall(r'<li><b class="badge \w+">(.*?)</b> (.*?)</li>', first)
    assert badges == [(q["answer"], q["asked"]) for q in asked]
    shown = [float(value) for value in re.findall(r'<data value="([^"]+)">', first.split("<dl")[1])]
    assert shown == [x for q in asked for x in (q["estimate"], *q["interval"], q["p"])]
    (svg,) = re.findall(r'<svg class="strip".*?</svg>(?=\n<figcaption)', first, re.DOTALL)
    assert svg.count('<circle class="dot"') == 19 and svg.count('<g class="mark">') == 3


def test_the_table_has_every_arm_and_control(finished):
    data = data_of(finished[1])
    arms, rows = rows_of(data, "arms"), rows_of(data, "trials")
    assert sum(row["edit"].startswith("Control ") and row["chosen"] for row in rows) == 2 * 19
    assert [row["edit"] for row in arms] == ["Unedited", *["Claim", "Whole model", "Mean of 19 controls"] * 2]
    assert all(arms[0][name] == value for name, value in FULL[0].metrics["test"].items())
    own = list(csv.DictReader((finished[0] / "trials.csv").read_text().splitlines()))
    texts = {None: "", True: "true", False: "false"}
    for row, line in zip(rows, own, strict=True):
        found = {key: texts[x] if x is None or isinstance(x, bool) else str(x) for key, x in row.items()}
        assert found.pop("edit") and found == line


def test_how_it_was_made_is_said(finished):
    page = finished[1]
    assert "85 of 85, 2 min 8 s in all, on cpu with 2 threads" in page
    assert "30 train, 8 val, 12 test" in page
    assert "locaudit 0.1.0" in page
    assert "learning_rate: null" in page
    assert "does and does not say" in page


def test_reports_are_reproducible(tmp_path, finished):
    folder = make_run(tmp_path / "again", FULL)
    assert write_report(folder).read_text() == finished[1]
    for ending in ("svg", "png", "pdf"):
        assert figures_of(folder, ending) == figures_of(finished[0], ending) == FIGURES
        for name in FIGURES:
            file = f"figures/{name}.{ending}"
            assert (folder / file).read_bytes() == (finished[0] / file).read_bytes()


def test_writing_again_replaces_and_leaves_the_run_as_it_was(tmp_path):
    folder = make_run(tmp_path / "run", FULL[:30])
    first = write_report(folder).read_text()
    before = (folder / "trials.sqlite").read_bytes(), (folder / "config.yaml").read_bytes()
    assert write_report(folder).read_text() == first
    assert ((folder / "trials.sqlite").read_bytes(), (folder / "config.yaml").read_bytes()) == before
    assert load_config(folder / "config.yaml") == CONFIG


def test_all_text_is_escaped(tmp_path):
    evil = '<script>alert("x")</script>'
    words = dict.fromkeys(("behaviour", "model", "claim_source", "device", "fingerprint"), evil)
    manifest = replace(MANIFEST, versions={evil: evil}, **words)
    records, config = (
        [*FULL, trial("claim", "iti", 9.0, status="diverged")],
        AuditConfig(behaviour=evil, model=evil, evaluation=SILENT),
    )
    folder = make_run(tmp_path / "run", records, manifest=manifest, config=config)
    page = write_report(folder).read_text()
    assert page.count("<script") == 3 and "<script>alert" not in page
    assert "<b>of" not in page
    assert escape(evil).replace("&quot;", "&#34;") in page


def test_diverged_trials_are_listed_with_their_messages(tmp_path):
    records = [r for r in FULL if not (r.spec.method == "optimal" and r.spec.control == 7)]
    records += [trial("control", "optimal", h, 7, status="diverged") for h in (1.0, 2.0)]
    folder = make_run(tmp_path / "run", records)
    page = write_report(folder).read_text()
    assert "Optimal edit, control 7, τ = 1.0: the loss became NaN at step 3 &lt;b&gt;of 9&lt;/b&gt;" in page
    assert "2 trials of 85 diverged" in page
    lost = [row["location"] for row in rows_of(data_of(page), "trials") if row["status"] == "diverged"]
    assert lost == [str(CONTROLS[7])] * 2
    judged = json.loads((folder / "verdict.json").read_text())["methods"]["optimal"]["nulls"]["anywhere"]
    assert (judged["controls"][7], judged["n_at_least"]) == (None, 1)
    assert "NaN" not in (folder / "verdict.json").read_text()


def test_everything_diverged_still_gives_a_page(tmp_path):
    records = [FULL[0], trial("claim", "iti", 1.0, status="diverged"), trial("whole", "iti", 1.0, status="diverged")]
    records += [trial("control", "iti", 1.0, i, status="diverged") for i in range(19)]
    page = write_report(make_run(tmp_path / "run", records, manifest=replace(MANIFEST, methods=ITI))).read_text()
    assert "Every edit tried at the claim diverged" in page
    assert "nan" not in words(page).lower().replace("became nan", "")
    assert "nan" not in "".join(re.findall("<svg.*?</svg>", page, re.DOTALL)).lower()
    assert rows_of(data_of(page), "effects")[0]["claim"] is None


def test_an_unfinished_run_says_first_what_is_missing(tmp_path):
    page = write_report(make_run(tmp_path / "run", FULL[:12])).read_text()
    assert page.index("Unfinished: 12 of 85 trials.") < page.index("<h1")
    assert "ITI: 5 of 19 controls scored, whole model not scored yet." in page
    assert "Optimal edit: the claim is not scored yet" in page
    assert 'id="iti"' in page
    assert 'id="optimal"' not in page


def test_notes_on_the_inputs_stand_in_page_and_terminal(tmp_path, capsys):
    folder = make_run(tmp_path / "run", FULL, manifest=replace(MANIFEST, notes=("<i>not measured</i>",)))
    cli.main(["report", str(folder)])
    assert "Note: <i>not measured</i>" in capsys.readouterr().out
    assert '<p class="warning" role="note">&lt;i&gt;not measured&lt;/i&gt;</p>' in (folder / "report.html").read_text()


def test_a_gain_at_one_label_only_is_told_by_label(tmp_path, capsys):
    """The model says (A) to everything: with five of six right answers (A), the mean rises and nothing was learnt."""
    labels = ["(A)", "(A)", "(A)", "(A)", "(A)", "(B)"] * 2
    asked = [
        replace(q, true=(x,), false=("(B)" if x == "(A)" else "(A)",))
        for q, x in zip(QUESTIONS["test"], labels, strict=True)
    ]

    def answering(record, share):
        mc2 = tuple(share if x == "(A)" else 1 - share for x in labels)
        test = {name: tuple(float(x > 0.5) for x in mc2) if name == "mc1" else mc2 for name in record.questions["test"]}
        questions = {**record.questions, "test": test}
        return replace(record, questions=questions, metrics=mean_metrics(questions))

    shares = {"base": 0.45, "claim": 0.97, "whole": 0.98, "control": 0.46}
    records = [answering(record, shares[record.spec.arm]) for record in [trial("base"), *trials("iti")]]
    folder, manifest = tmp_path / "run", replace(MANIFEST, methods=ITI, planned=43)
    with open_run(folder, CONFIG) as store:
        store.write_manifest(manifest)
        store.set_questions({**QUESTIONS, "test": tuple(asked)})
        store.add(records, seconds=1.0)
    cli.main(["report", str(folder)])
    note = (
        "ITI: the gain of the edit at the claim comes from some right answers only, as that of a model which prefers "
        "one answer whatever is asked (MC2 where (A) 0.450 to 0.970, MC2 where (B) 0.550 to 0.030, MC2 balanced "
        "0.500 to 0.500, prefers (A) 0.000 to 1.000)."
    )
    assert note in capsys.readouterr().out and note in (folder / "report.html").read_text()
    verdict = json.loads((folder / "verdict.json").read_text())
    assert verdict["methods"]["iti"]["outcome"] == "SPECIFIC" and verdict["notes"][0] == note
    assert "of the whole model" in verdict["notes"][1]
    line = next(
        row for row in csv.DictReader(io.StringIO((folder / "trials.csv").read_text())) if row["arm"] == "claim"
    )
    assert float(line["mc2 where (A)"]) == pytest.approx(0.97) and float(line["mc2 where (B)"]) == pytest.approx(0.03)
    assert float(line["mc2 balanced"]) == pytest.approx(0.5) and float(line["prefers (A)"]) == 1.0
    data = data_of((folder / "report.html").read_text())
    for name in ("mc2 where (A)", "mc2 balanced", "prefers (A)"):
        for table in ("arms", "trials"):
            assert {"key": name, "title": name} in data["tables"][table]["columns"]


def test_a_gain_at_every_label_needs_no_note(tmp_path):
    labels = ["(A)", "(B)"] * 6
    asked = [
        replace(q, true=(x,), false=("(B)" if x == "(A)" else "(A)",))
        for q, x in zip(QUESTIONS["test"], labels, strict=True)
    ]
    with open_run(tmp_path / "run", CONFIG) as store:
        store.write_manifest(MANIFEST)
        store.set_questions({**QUESTIONS, "test": tuple(asked)})
        store.add(FULL, seconds=1.0)
    tables = read_tables(tmp_path / "run")
    assert tables.verdict.notes == () and "mc2 balanced" in tables.columns
    assert load_run(make_run(tmp_path / "plain", FULL)).labels == ("No.",) * N["test"]
    assert "mc2 balanced" not in read_tables(tmp_path / "plain").columns, "there is only one label"


def test_only_the_unedited_model_is_enough_for_a_page(tmp_path):
    folder = make_run(tmp_path / "run", FULL[:1])
    page = write_report(folder).read_text()
    assert "Unfinished: 1 of 85 trials." in page
    assert "no edit at the claim is scored" in page
    assert figures_of(folder) == ["heads"]


@pytest.mark.parametrize("records", [[], trials("iti")])
def test_nothing_scored_is_an_error(tmp_path, records):
    folder = make_run(tmp_path / "run", records)
    with pytest.raises(
        RunFolderError, match="the unedited model has no scores yet|which has no scores of the unedited model"
    ):
        write_report(folder)
    assert not (folder / "report.html").exists()
    with pytest.raises(RunFolderError, match="not a run folder"):
        write_report(tmp_path / "elsewhere")


def test_what_a_run_does_not_have_is_left_out(tmp_path):
    page = write_report(make_run(tmp_path / "run", FULL, manifest=replace(MANIFEST, probes=None, n_units=None)))
    text = words(page.read_text())
    assert "Unfinished" not in text and "None" not in text
    assert 'id="probes"' not in text and "<dt>Whole model</dt><dd>" not in text
    assert 'href="#places"' not in text and 'href="#answers"' not in text


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", FULL[:1])
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(LocauditError, match=r"jinja2.*pip install 'locaudit\[report\]'"):
        write_report(folder)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(LocauditError, match="without the package matplotlib"):
        draw([heat_chart(HeatMap([[0.5]], "accuracy"), [])])


def test_reading_never_imports_torch_or_pandas(judged, tmp_path):
    code = (
        "import sys; from locaudit import cli, read_result; from locaudit.report import write_report; "
        "write_report(sys.argv[1]); read_result(sys.argv[1], level=0.2); "
        "assert cli.main(['report', sys.argv[1], '--score', 'mc1', '--out', sys.argv[2]]) == 0; "
        "print({'torch', 'transformers', 'pandas'} & {*sys.modules} or 'none')"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(judged[0]), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert ran.stdout.splitlines()[-1] == "none"


# --- answers and what judges say of them


JUDGES = {"truth": JudgeFacts("judge <A>", "A"), "info": JudgeFacts("judge B", "B")}
ANSWERS = ("I have no comment.", "Yes, & <b>more</b>.", "", "It " + "goes on and " * 30 + "on.")
JUDGED_CONFIG = AuditConfig(controls=3)
UNJUDGED = (("test0", ANSWERS[0]), ("test1", ANSWERS[2]))  # by the judge of Info


def say(record):
    def pick(question):
        who = (record.spec.arm, record.spec.control, record.spec.hyperparameter, question)
        return ANSWERS[int(content_hash(who), 16) % len(ANSWERS)]

    if record.status != "ok":
        return record
    return replace(record, answers={split: tuple(map(pick, ids)) for split, ids in IDS.items()})


def opinion(fingerprint, question, answer):
    if fingerprint == "B" and (question, answer) in UNJUDGED:
        return None, "HTTP 500 <try again>"
    return int(content_hash([fingerprint, question, answer]), 16) / 16**16, ""


def make_judged_run(folder, records, judges=JUDGES, config=JUDGED_CONFIG, opinion=opinion):
    manifest = replace(
        MANIFEST, planned=len(records), nulls={"anywhere": Null(3, 65)}, methods=ITI, probes=None, judges=judges
    )
    make_run(folder, records, manifest=manifest, config=config)
    with open_run(folder, config) as store:
        for judge in judges.values():
            mark = judge.fingerprint
            keys = [(q, answer) for ids in IDS.values() for q in ids for answer in ANSWERS]
            store.add_judgements(mark, {key: opinion(mark, *key) for key in keys})
    return folder


SAID = [say(record) for record in [trial("base"), *trials("iti", controls=3)]]


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    folder = make_judged_run(tmp_path_factory.mktemp("runs") / "judged", SAID)
    page = write_report(folder).read_text()
    return folder, page, load_run(folder).records


def chosen_of(records, score="info_truth_probability"):
    verdict = decide(records, score=score)
    strengths = {"claim": Place("claim"), "whole": Place("whole")}
    strengths |= {f"control anywhere {i}": Place("control", i, "anywhere") for i in range(3)}
    places = {place: verdict.methods["iti"].chosen[name] for name, place in strengths.items()}
    return {r.spec.place: r for r in records if r.spec.arm == "base" or r.spec.hyperparameter == places[r.spec.place]}


def test_a_judged_run_shows_each_score_with_its_interval(judged):
    _, page, records = judged
    arms, rows = (rows_of(data_of(page), name) for name in ("arms", "trials"))
    shown, chosen = {row["trial_id"]: row for row in rows}, chosen_of(records)
    for record in chosen.values():
        for score in JUDGED:
            low, high = estimate(score_values(record.questions["test"], score)).interval()
            row = shown[record.spec.trial_id]
            found = row[score], row[f"{score}_low"], row[f"{score}_high"]
            assert found == pytest.approx((record.metrics["test"][score], low, high), abs=1e-12)
    controls = [chosen[Place("control", i, "anywhere")].metrics["test"]["truth"] for i in range(3)]
    assert [row["edit"] for row in arms] == ["Unedited", "Claim", "Whole model", "Mean of 3 controls"]
    mean = arms[-1]
    assert mean["truth"] == pytest.approx(math.fsum(controls) / 3, abs=1e-12)
    assert (mean["truth_low"], mean["truth_high"]) == (min(controls), max(controls))
    assert sum(row["edit"].startswith("Control ") and row["chosen"] for row in rows) == 3


def test_missing_judgements_are_counted_and_never_zero(judged):
    _, page, records = judged
    part = unescape(words(page))
    missing = sum(math.isnan(x) for r in records for x in r.questions["test"]["info"])
    assert missing > 0
    n = len(records) * 12
    assert f"0 of {n} judgements of Truth and {missing} of {n} judgements of Info are missing" in part
    assert "Truth is judged by judge <A>. Info is judged by judge B." in part
    some = next(r for r in chosen_of(records).values() if any(map(math.isnan, r.questions["test"]["info"])))
    lost = sum(map(math.isnan, some.questions["test"]["info"]))
    row = next(row for row in rows_of(data_of(page), "trials") if row["trial_id"] == some.spec.trial_id)
    assert row["n_missing"] == lost and row["info"] == some.metrics["test"]["info"]
    judged_yes = [x for x in some.questions["test"]["info"] if not math.isnan(x)]
    assert some.metrics["test"]["info"] == pytest.approx(sum(judged_yes) / (12 - lost))


def test_a_product_of_means_is_not_called_a_mean(judged):
    folder, page, _ = judged
    text = words(page)
    assert json.loads((folder / "verdict.json").read_text())["score"] == "info_truth_probability"
    assert "Info*Truth (probabilities) over 12 test questions, of the models’ own answers as judged" in text
    assert "a product of two means" in text
    assert not re.search(r"mean (test )?(info_truth|Info\*Truth)", text)
    assert score_phrase("mc2") == "mean MC2"
    assert score_phrase("not_known") == "mean not_known"


def test_the_table_of_all_arms_has_the_verdicts_score_first_and_judged_ones_where_judged(judged, finished):
    columns = [x["title"] for x in data_of(judged[1])["tables"]["arms"]["columns"] if "hidden" not in x]
    assert columns[:5] == ["method", "edit", "n", "strength", "Info*Truth (probabilities)"]
    assert {"Truth", "Info", "MC1", "Degenerate"} < set(columns)
    columns = [x["title"] for x in data_of(finished[1])["tables"]["arms"]["columns"] if "hidden" not in x]
    assert columns[4] == "MC2" and not any("Info" in title or "Truth" in title for title in columns)
    assert "Truth and information" not in finished[1]


def test_judged_runs_have_two_more_figures(judged, finished):
    assert charts_of(judged[1]) == ["drift_info_truth_probability", "truth_info", "drift_mc2", "tuning_iti"]
    assert figures_of(judged[0]) == ["null", "effect_kl", "truth_info", "tuning"]
    assert len(run_figures(read_tables(judged[0]))["effect_kl"]) == 2
    assert "chosen on validation questions by Info*Truth (probabilities)" in judged[1]
    assert charts_of(finished[1]) == ["drift_mc2", "probes", "tuning_iti", "tuning_optimal"]


def test_what_the_models_say_is_shown_in_order_and_escaped(judged):
    _, page, records = judged
    said = data_of(page)["answers"]
    assert re.findall(r"Is <(\w+)> so\?", "".join(said["questions"])) == IDS["test"]
    assert "Answers to 12 test questions of 12, in order, not selected" in page
    assert "<b>more" not in page
    chosen = chosen_of(records)
    base, claim = chosen[Place("base")], chosen[Place("claim")]
    distance = {
        place: abs(r.metrics["test"]["info_truth_probability"] - claim.metrics["test"]["info_truth_probability"])
        for place, r in chosen.items() if place.arm == "control"
    }  # fmt: skip
    controls = sorted(distance, key=distance.get)
    names = [one["name"] for one in said["speakers"]]
    assert names[:3] == ["Unedited model", "ITI: claim", "ITI: whole model"]
    assert names[3:6] == [f"ITI: control {place.control}" for place in controls], "the nearest first"
    assert len(names) == len(records) == len(set(names)) and said["left_out"] == 0
    ids = [row["trial_id"] for row in rows_of(data_of(page), "trials")]
    by_id = {record.spec.trial_id: record for record in records}
    for one in said["speakers"]:
        record = by_id[ids[one["trial"]]]
        assert [said["texts"][i] for i in one["text"]] == [answer.strip() for answer in record.answers["test"]]
        for i, change in enumerate(one["change"]):
            values = (
                np.prod(score_values(r.questions["test"], "info_truth_probability")[:, i]) for r in (record, base)
            )
            after, before = values
            if record is base or math.isnan(after - before):
                assert change == (0.0 if record is base else None)
            else:
                assert change == pytest.approx(after - before, abs=1e-3)
    trial_of = {place: ids[said["speakers"][i]["trial"]] for i, place in enumerate([Place("base"), Place("claim")])}
    assert all(chosen[place].spec.trial_id == trial for place, trial in trial_of.items())


def test_judgements_of_answers_are_told_in_words(judged):
    said = data_of(judged[1])["answers"]
    assert said["aspects"] == {"truth": "true", "info": "informative"}
    n_missing = 0
    for one in said["speakers"]:
        for i, question in enumerate(IDS["test"]):
            answer = said["texts"][one["text"][i]]
            full = next(x for x in ANSWERS if x.strip() == answer)
            assert one["judged"]["truth"][i] == pytest.approx(opinion("A", question, full)[0], abs=1e-4)
            if one["judged"]["info"][i] is None:
                n_missing += 1
                assert one["why"]["info"][str(i)] == "HTTP 500 <try again>"
            else:
                assert one["judged"]["info"][i] == pytest.approx(opinion("B", question, full)[0], abs=1e-4)
    assert n_missing > 0


def test_answers_without_judges_are_shown_alone(tmp_path):
    folder = make_judged_run(tmp_path / "run", SAID, judges={})
    page = write_report(folder).read_text()
    assert 'id="answers"' in page
    said = data_of(page)["answers"]
    assert said["aspects"] == {} and all(one["judged"] == {} for one in said["speakers"])
    assert "Truth and information" not in page


def test_figures_of_judges_since_removed_do_not_stay(tmp_path):
    folder = make_judged_run(tmp_path / "run", SAID, judges={})
    stale = folder / "figures" / "truth_info.png"
    stale.parent.mkdir()
    stale.write_bytes(b"")
    figures_of(folder)
    assert not stale.exists()


def converse(records, judgements=None):
    seconds = {record.spec.trial_id: 1.5 for record in records}
    return tabulate(Run(Path(), CONFIG, MANIFEST, (*records,), QUESTIONS, judgements or {}, seconds)).said


def test_no_answers_no_section(finished):
    assert 'id="answers"' not in finished[1] and data_of(finished[1])["answers"] is None
    assert converse(FULL) == {}


def test_a_diverged_place_has_a_row_and_an_unscored_one_has_none():
    records = [r for r in SAID if r.spec.arm == "base" or (r.spec.arm == "control" and r.spec.control == 1)]
    records.append(trial("claim", "iti", 1.0, status="diverged"))
    said = converse(records, {"truth": {("test0", SAID[0].answers["test"][0]): (0.5, "")}})
    assert list(said) == ["Unedited model", "ITI: claim"]
    assert said["ITI: claim"] is None
    unedited = said["Unedited model"]
    assert unedited.judged["truth"][:2] == [0.5, None] and unedited.why["truth"][1] == "not yet"


def test_what_html_cannot_hold_is_replaced():
    shown = converse([replace(SAID[0], answers={"test": ("a\x00b\n\x1b[31mc", " \n", *["x"] * 10)})])
    assert shown["Unedited model"].answers[:3] == ["a\ufffdb\n\ufffd[31mc", "", "x"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("score", [[], ["--score", "mc1"]])
def test_a_run_that_is_read_only_is_reported_elsewhere(tmp_path, capsys, score):
    folder, out = make_run(tmp_path / "run", FULL), tmp_path / "out"
    paths = [folder, *folder.rglob("*")]
    before = {path: path.stat().st_mtime_ns for path in paths}
    for path in paths:
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        assert len(read_result(folder).trials()) == len(FULL)
        assert cli.main(["report", str(folder), *score]) == 2
        assert "cannot be written to" in (said := capsys.readouterr().err) and "--out DIR" in said
        assert cli.main(["report", str(folder), *score, "--out", str(out)]) == 0
        assert (out / "report.html").is_file()
        assert {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]} == before
    finally:
        for path in paths:
            path.chmod(path.stat().st_mode | 0o200)


def test_a_report_under_a_file_is_refused(tmp_path):
    folder = make_run(tmp_path / "run", FULL)
    with pytest.raises(RunFolderError, match="cannot be written to.*choose another `out`"):
        write_report(folder, out=folder / "trials.sqlite" / "out")


HOSTILE = "\u061c\u2028\U000e0041a\x00b\x1b[31mc\x7f\x85\x9b2J\u202ed\u2066e\r\nf :smile: [bold]"
SHOWN = "\ufffd\ufffd\ufffda\ufffdb\ufffd[31mc\ufffd\ufffd\ufffd2J\ufffdd\ufffde\nf :smile: [bold]"


def test_no_text_reaches_page_or_terminal_raw(tmp_path, capsys):
    """Questions, answers, names and the claim's source; what is stored keeps every character."""
    said = {split: (HOSTILE,) * n for split, n in N.items()}
    records = [replace(record, answers=said) for record in SAID]
    questions = {
        split: tuple(replace(question, text=HOSTILE) for question in part) for split, part in QUESTIONS.items()
    }
    manifest = replace(
        MANIFEST, model=HOSTILE, behaviour=HOSTILE, claim_source=HOSTILE, notes=(HOSTILE,), methods=ITI, probes=None
    )
    folder = make_run(tmp_path / "run", records, manifest=manifest)
    with open_run(folder, CONFIG) as store:
        store.set_questions(questions)
    result = read_result(folder)
    page = result.write_report().read_text()
    print_verdict(result)
    shown = capsys.readouterr().out
    for text in (words(page), shown):
        assert not set(text) & set(HOSTILE) - set(SHOWN) and SHOWN in text.replace("<br>", "")
    data = data_of(page)
    text = "".join([*data["answers"]["questions"], *data["answers"]["texts"], *data["files"].values()])
    assert not set(text) & set(HOSTILE) - set(SHOWN)
    assert data["answers"]["questions"] == [SHOWN] * N["test"] and data["answers"]["texts"] == [SHOWN]
    assert f"Note: {SHOWN}" in shown and f"Q: {SHOWN}" in shown
    assert set(result.answers()["answer"]) == set(result.answers()["text"]) == {HOSTILE}


def test_a_long_text_is_cut_and_says_so(tmp_path):
    """A megabyte per answer made a page of a hundred; the frame, which users save as CSV, has all of it."""
    long = "x" * 10**6
    records = [replace(SAID[0], answers={"test": (long,) * N["test"]}), *SAID[1:]]
    folder = make_run(tmp_path / "run", records, manifest=replace(MANIFEST, methods=ITI, probes=None))
    result = read_result(folder)
    page = result.write_report().read_text()
    assert len(page) < SMALL and f"{'x' * LONGEST}… (998,000 more characters)" in data_of(page)["answers"]["texts"]
    assert result.answers().query("arm == 'base' and split == 'test'")["answer"].tolist() == [long] * N["test"]


def test_any_aspects_make_a_product_of_means(tmp_path):
    judges = {"brevity": JUDGES["truth"], "tone": JUDGES["info"]}
    page = write_report(make_judged_run(tmp_path / "run", SAID, judges=judges)).read_text()
    assert "all judged aspects (probabilities) over 12 test questions, of the models’ own answers as judged" in page
    assert "a product of two means" in page
    assert "is the product of the mean probabilities" in page and "“Both”" not in page
    assert "brevity and tone are the shares of answers judged brevity and tone" in page


def test_one_judge_alone_gives_its_own_score(tmp_path):
    folder = make_judged_run(tmp_path / "run", SAID, judges={"truth": JUDGES["truth"]})
    page = write_report(folder).read_text()
    assert json.loads((folder / "verdict.json").read_text())["score"] == "truth_probability"
    assert "Truth (probability) over 12 test questions" in page
    assert "Truth is the share of answers judged true: probability at least 0.5." in page
    assert "Info" not in re.sub(r"<pre>.*?</pre>", "", words(page), flags=re.DOTALL)
    assert charts_of(page) == ["drift_truth_probability", "drift_mc2", "tuning_iti"]


def test_a_judge_that_fails_on_everything_still_gives_a_page(tmp_path):
    folder = make_judged_run(tmp_path / "run", SAID, opinion=lambda *_: (None, "no server"))
    page = write_report(folder).read_text()
    assert f"{12 * len(SAID)} of {12 * len(SAID)} judgements of Info are missing" in page
    why = [one["why"]["info"] for one in data_of(page)["answers"]["speakers"]]
    assert why == [{str(i): "no server" for i in range(12)}] * len(SAID)
    assert "nan" not in words(page).lower()
    assert charts_of(page) == ["drift_mc2"]


def test_another_score_leaves_the_judged_ones_in_their_own_table(tmp_path):
    folder = make_judged_run(tmp_path / "run", SAID, config=replace(JUDGED_CONFIG, score="mc2"))
    page = write_report(folder).read_text()
    assert "mean MC2 over 12 test questions" in page
    titles = [x["title"] for x in data_of(page)["tables"]["arms"]["columns"]]
    assert titles.index("MC2") < titles.index("Info*Truth (probabilities)")
    assert charts_of(page) == ["drift_mc2", "truth_info", "tuning_iti"]


def test_what_was_not_judged_is_not_called_diverged(tmp_path):
    """The figure of the controls said so of every control without a score."""
    said = [
        replace(r, answers={split: ("quiet",) * len(x) for split, x in r.answers.items()})
        if (r.spec.arm, r.spec.control) == ("control", 1) else r
        for r in SAID
    ]  # fmt: skip
    folder = make_judged_run(tmp_path / "run", said)
    keys = {(q, "quiet"): (None, "timed out") for ids in IDS.values() for q in ids}
    with open_run(folder, JUDGED_CONFIG) as store:
        for judge in JUDGES.values():
            store.add_judgements(judge.fingerprint, keys)
    page = write_report(folder).read_text()
    assert "(1 without a score)" in page and "1 diverged" not in page
    assert "Too many judgements are missing" in page


def test_a_control_that_diverged_is_no_part_of_the_controls_mean(tmp_path):
    records = [r for r in SAID if r.spec.control != 1] + [trial("control", "iti", 1.0, 1, status="diverged")]
    folder = make_judged_run(tmp_path / "run", records)
    tables = read_tables(folder)
    mean = tables.mean_control("iti", "anywhere", tables.judged)
    scores = [row.values["info_truth"] for row in tables.controls("iti")["anywhere"].values() if row is not None]
    assert mean.n == len(scores) == 2
    assert mean.values["info_truth"] == pytest.approx(sum(scores) / 2)
    data = data_of(write_report(folder, tables).read_text())
    assert rows_of(data, "arms")[-1]["edit"] == "Mean of 2 controls"
    (lost,) = [row for row in rows_of(data, "trials") if row["edit"] == "Control 1"]
    assert all(lost[name] is None for name in (*tables.judged, "degenerate", "n_missing"))


@pytest.mark.parametrize("lost", [0.0, 0.3, 1.0])
def test_intervals_of_many_trials_are_those_of_each(lost):
    rng = np.random.default_rng(0)

    def judged_trial(i):
        said = {aspect: [None if rng.random() < lost else rng.random() for _ in range(15)] for aspect in JUDGES}
        spec = TrialSpec("control", "iti", CONTROLS[i], 1.0, 0, "context", i)
        return TrialRecord(spec, "ok", questions={"test": judged_metrics(said)})

    records = [judged_trial(i) for i in range(3)]
    found = score_intervals([*records, trial("claim", "iti", 1.0)], JUDGED)
    assert set(found) == {record.spec.trial_id for record in records}
    for record in records:
        for score in JUDGED:
            slow = estimate(score_values(record.questions["test"], score)).interval()
            assert found[record.spec.trial_id][score] == pytest.approx(slow, abs=1e-12, nan_ok=True)


def test_trials_are_a_table_for_other_programs(judged):
    folder, _, records = judged
    with (folder / "trials.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["arm"] for row in rows] == ["base", "claim", "claim", "whole", "whole"] + ["control"] * 6
    by_id = {record.spec.trial_id: record for record in records}
    chosen = {record.spec.trial_id for record in chosen_of(records).values()}
    assert {row["trial_id"] for row in rows if row["chosen"] == "true"} == chosen
    for row in rows:
        record = by_id[row["trial_id"]]
        for metric, value in record.metrics["test"].items():
            assert float(row[metric]) == value
        low, high = estimate(score_values(record.questions["test"], "info_truth_probability")).interval()
        bounds = float(row["info_truth_probability_low"]), float(row["info_truth_probability_high"])
        assert bounds == pytest.approx((low, high), abs=1e-12)
        assert int(row["n_missing"]) == sum(map(math.isnan, record.questions["test"]["info"]))
        said = record.answers["test"]
        assert float(row["degenerate"]) == sum(answer in ANSWERS[2:] for answer in said) / len(said)
        assert (float(row["kl"]), float(row["ce"]), float(row["seconds"])) == (record.drift["kl"], 2.5, 1.5)
    assert list(rows[0])[9:12] == [f"info_truth_probability{end}" for end in ("", "_low", "_high")]


def test_the_share_of_degenerate_answers_stands_beside_info(judged):
    folder, page, records = judged
    shares = json.loads((folder / "verdict.json").read_text())["degenerate"]["iti"]
    assert list(shares) == ["base", "claim", "whole", *(f"control anywhere {i}" for i in range(3))]
    for (arm, i, *_), record in chosen_of(records).items():
        own = shares[f"control anywhere {i}" if arm == "control" else arm]
        assert own == sum(answer in ANSWERS[2:] for answer in record.answers["test"]) / N["test"]
    (claim,) = [row for row in rows_of(data_of(page), "arms") if row["edit"] == "Claim"]
    assert claim["degenerate"] == shares["claim"]
    assert {"key": "degenerate", "title": "Degenerate"} in data_of(page)["tables"]["arms"]["columns"]


def test_trials_that_diverged_have_empty_scores(tmp_path):
    records = [*FULL[:3], trial("claim", "iti", 9.0, status="diverged")]
    folder = make_run(tmp_path / "run", records)
    write_report(folder)
    *_, last = csv.DictReader((folder / "trials.csv").read_text().splitlines())
    assert (last["status"], last["chosen"], last["mc2"], last["kl"], last["hyperparameter"]) == (
        "diverged", "false", "", "", "9.0",
    )  # fmt: skip
    assert "n_missing" not in last


# --- figures and small parts


def one_series(points):
    return Series("claim", "red", "o", points)


@pytest.mark.parametrize("base", [(0.5, 0.5), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)])
def test_truth_against_info_shows_every_point(base):
    series = [one_series([(0.0, 1.0, True), (0.4, 0.4, True)])]
    axis = draw([scatter_chart(series, xlabel="Info", ylabel="Truth", base=base, product="x")]).axes[0]
    for (low, high), values in ((axis.get_xlim(), (0.0, 0.4, base[0])), (axis.get_ylim(), (1.0, 0.4, base[1]))):
        assert low < min(values) <= max(values) < high
    assert axis.get_ylim()[1] < 1.5, "the curve stays among the points"


@pytest.mark.parametrize("controls", [[], [0.5], [0.5] * 4, [0.1, math.nan, 0.3], [math.nan]])
def test_controls_are_drawn_whatever_their_spread(tmp_path, controls):
    records = [trial("base"), trial("claim", "iti", 1.0)]
    records += [
        trial("control", "iti", 1.0, i, gain=None if math.isnan(x) else x, status="diverged" if math.isnan(x) else "ok")
        for i, x in enumerate(controls)
    ]
    folder = make_run(tmp_path / "run", records)
    assert figures_of(folder, "svg")[0] == "null"
    (chart,) = run_figures(read_tables(folder))["null"]
    dots = [x for trace in chart["data"] if "customdata" in trace for x in trace["x"]]
    assert len(dots) == sum(not math.isnan(x) for x in controls)
    files = (folder / "figures").glob("*.svg")
    assert all(file.read_text().startswith("<?xml") for file in files)


@pytest.mark.parametrize(
    ("drifts", "scale"),
    [
        ([0.0, 0.0], "linear"),
        ([0.1, 0.2], "linear"),
        ([1e-3, 0.2], "log"),
        ([0.0, 2e-3, 0.2], "log"),
        ([-1e-9, 1.0, 1e-2], "log"),
    ],
)
def test_the_drift_axis_fits_the_drifts(tmp_path, drifts, scale):
    points = [(kl, 0.1, i == 0) for i, kl in enumerate(drifts)]
    figure = draw([scatter_chart([one_series(points)], xlabel="KL", ylabel="MC2", base=(None, 0.0), is_drift=True)])
    axis = figure.axes[0]
    assert axis.get_xscale() == scale
    save(figure, tmp_path, "effect_kl", "svg")
    low, high = axis.get_xlim()
    shown = [x for line in axis.lines if line.get_marker() == "o" for x in line.get_xdata()]
    assert len(shown) == len(drifts) and low < min(shown) <= max(shown) < high
    assert sorted(shown)[1:] == sorted(drifts)[1:], "only those too small for the axis are moved, to its left end"


@pytest.mark.parametrize("shape", [(1, 1), (4, 3), (12, 96), (80, 64)])
def test_heat_maps_of_any_model(tmp_path, shape):
    accuracy = np.linspace(0.4, 0.9, shape[0] * shape[1]).reshape(shape)
    figure = draw([heat_chart(HeatMap(accuracy.tolist(), "accuracy"), [(0, 0)], floor=0.5)])
    cells = [x for x in figure.axes[0].collections if hasattr(x, "get_paths")]
    assert sum(len(one.get_paths()) for one in cells) == accuracy.size
    assert save(figure, tmp_path, "heads", "pdf").read_bytes().startswith(b"%PDF")


def test_drawing_leaves_matplotlibs_settings_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw([heat_chart(HeatMap([[0.5, 0.6]], "accuracy"), [])])
    assert dict(matplotlib.rcParams) == before


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        draw([])
    for series in ([], [one_series([])]):
        with pytest.raises(ValueError, match="at least one"):
            scatter_chart(series, xlabel="KL", ylabel="MC2", base=(None, 0.0))
    with pytest.raises(RunFolderError, match="without anything to draw"):
        write_figures({}, tmp_path)


def test_figures_are_as_wide_as_a_column_with_fonts_that_journals_take(finished, tmp_path):
    charts = run_figures(read_tables(finished[0]))
    for width in WIDTHS.values():
        for path in write_figures(charts, tmp_path, "pdf", width):
            data = path.read_bytes()
            box = re.search(rb"/MediaBox \[ 0 0 ([\d.]+) ", data)
            assert float(box[1]) == pytest.approx(72 * width, abs=1)
            assert b"/Type3" not in data and b"/FontFile2" in data


def test_figures_say_their_n_and_bound_what_decides(finished):
    tables = read_tables(finished[0])
    charts, v = run_figures(tables), tables.verdict.methods["optimal"]
    title = charts["effect_kl"][0]["layout"]["yaxis"]["title"]["text"]
    assert "12 questions" in title and "95\u00a0% intervals" in title
    assert all("12 test questions" in chart["layout"]["xaxis"]["title"]["text"] for chart in charts["null"])
    bars = [trace["error_x"] for trace in charts["null"][1]["data"] if "error_x" in trace]
    low, high = v.effect_interval
    assert [bars[0]["arrayminus"][0], bars[0]["array"][0]] == pytest.approx([v.effect - low, high - v.effect])
    assert bars[2]["array"][0] == 0.0, "the unedited model has no gain"
    assert all("8 validation questions" in chart["layout"]["yaxis"]["title"]["text"] for chart in charts["tuning"])
    assert all(any("error_y" in trace for trace in chart["data"]) for chart in charts["tuning"])


def test_neuron_claims_have_no_outline(tmp_path):
    manifest = replace(MANIFEST, claim=parse_location("neuron:1.100,2.5"), kind_plural="neurons")
    folder = make_run(tmp_path / "run", FULL, manifest=manifest)
    page = write_report(folder).read_text()
    assert "2 neurons" in page
    assert "Outlined" not in words(page)


def test_numbers_carry_their_exact_value():
    assert number(-0.12345, "+.3f") == '<data value="-0.12345">−0.123</data>'
    assert number(None, ".3f") == number(math.nan, ".3f") == "–"


@pytest.mark.parametrize("at", [[], [5.0], [1.0] * 7, [0.0, 1.0, 1.5, 3.0, 3.0, 9.0]])
def test_dots_never_cover_each_other(at):
    levels = stack_dots(at, 2.0)
    placed = list(zip(at, levels, strict=True))
    assert all(abs(x - y) >= 2 or i != k for (x, i), (y, k) in combinations(placed, 2))
    crowd = max((sum(x <= y < x + 2 for y in at) for x in at), default=0)
    assert max(levels, default=-1) + 1 == crowd, "no more levels than the largest crowd needs"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 0.1), (1e-4, 3e-4), (12.4, 12.9), (-500, 900)])
def test_ticks_are_round_and_inside(low, high):
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 6 and low - 1e-9 <= min(ticks) <= max(ticks) <= high + 1e-9
    assert np.diff(ticks) == pytest.approx(ticks[1] - ticks[0], rel=1e-6)


@pytest.mark.parametrize("scores", [[], [0.5], [0.5] * 4, [0.1, math.nan, 0.3], [math.nan], [None]])
def test_a_strip_shows_every_score_and_equal_marks_apart(scores):
    marks = [
        Mark("claim <b>", 0.5, "red", "-"),
        Mark("unedited", 0.5, "#1d1e22", ":"),
        Mark("whole", None, "blue", "-"),
    ]
    svg = draw_strip([Spread("<i>controls", scores, marks)], xlabel="MC2", alt='say "this"')
    outline = _Outline()
    outline.feed(svg)
    assert outline.open == [] and "<b>" not in svg and "<i>" not in svg and 'aria-label="say &quot;this&quot;"' in svg
    assert svg.count("<circle") == sum(x is not None and not math.isnan(x) for x in scores)
    heights = re.findall(r'<svg x="([^"]+)" y="([^"]+)"><path', svg)
    assert len(heights) == 2 and len({y for _, y in heights}) == 2 and len({x for x, _ in heights}) == 1
    chart = strip_chart([Spread("<i>controls", scores, marks)], xlabel="MC2")
    assert sum(len(trace["x"]) for trace in chart["data"] if "customdata" in trace) == svg.count("<circle")
    named = [note for note in chart["layout"]["annotations"] if "xshift" in note]
    assert len({note["y"] for note in named}) == len(named) == 2 and "&lt;b&gt;" in named[0]["text"]


def test_charts_hold_every_point():
    points = [(0.0, 0.2, True), (1e-3, 0.1, False), (0.5, -0.1, True)]
    chart = scatter_chart(
        [Series("<claim>", "#D55E00", "D", points, ids=(4, 5, 6))], xlabel="KL", ylabel="y", is_drift=True
    )
    assert chart["layout"]["xaxis"]["type"] == "log"
    found = {
        (x, y, i)
        for trace in chart["data"]
        for x, y, i in zip(trace["x"], trace["y"], trace["customdata"], strict=True)
    }
    assert found == {(1e-3, 0.2, 4), (1e-3, 0.1, 5), (0.5, -0.1, 6)}, "a drift of 0 stands at the left end"
    assert {trace["name"] for trace in chart["data"]} == {"&lt;claim&gt;"}, "Plotly reads tags in names"
    values = [[0.5, math.nan], [0.7, 0.6]]
    heat = heat_chart(HeatMap(values, "accuracy"), [(1, 0)], floor=0.4)["data"]
    cells = {
        (x, head): text for trace in heat[1:] for x, (head, text) in zip(trace["x"], trace["customdata"], strict=True)
    }
    assert cells == {(0, 0): "0.500", (1, 0): "0.700", (1, 1): "0.600"}
    assert heat[0]["marker"]["cmin"] == 0.4 and heat[2]["x"] == [1], "the outlined head is drawn last"
    lines = line_chart([Line("", "blue", [1, 2], [0.0, 90.0], wide=False), Line("claim", "red", [1, 2], [1.0, 0.5])],
                       xlabel="step", ylabel="loss")  # fmt: skip
    assert lines["layout"]["yaxis"]["range"][1] == 3.0, "an outlier does not flatten the claim"


def test_data_cannot_end_their_script():
    evil = {"</script><script>alert(1)</script>": ["<!--<script>", math.nan, math.inf, np.float64(0.5), "\u202ex\x00"]}
    text = embed(evil)
    assert "<" not in text and "&" not in text
    assert json.loads(text) == {
        "</script><script>alert(1)</script>": ["<!--<script>", None, None, 0.5, "\ufffdx\ufffd"]
    }


def test_an_edit_that_hardly_moved_is_named_with_loss_and_kl(tmp_path):
    def trained(record, last):
        if record.spec.method != "optimal":
            return record
        return replace(record, training={"loss": (6.25, last), "objective": (last,)})

    for last, found in ((6.2, 2), (3.0, 0)):
        folder = make_run(tmp_path / f"{last}", [trained(record, last) for record in FULL])
        warnings = hardly_moved(read_tables(folder))
        assert len(warnings) == found
        page = words(write_report(folder).read_text())
        assert all(warning in page for warning in warnings)
    assert not warnings and '<figure id="loss_optimal">' in page


def test_a_page_keeps_its_size_however_much_was_said(tmp_path):
    """Long answers of 200 trials and of more; what is left out is counted."""
    rng = np.random.default_rng(0)
    said = [{split: tuple("".join(map(chr, rng.integers(97, 122, 1900))) for _ in range(n)) for split, n in N.items()}
            for _ in range(201)]  # fmt: skip
    for n, most in ((200, SMALL), (340, LARGE)):
        spec = [replace(trial("control", "iti", 1.0, i % 65).spec, control=i, seed=i) for i in range(n - 3)]
        records = [replace(trial("base"), answers=said[0])]
        records += [replace(trial(arm, "iti", 1.0), answers=x) for arm, x in (("claim", said[1]), ("whole", said[2]))]
        records += [
            replace(
                trial("control", "iti", 1.0, i % 65), spec=x, answers=said[i % 201], training={"loss": (1.0,) * 500}
            )
            for i, x in enumerate(spec)
        ]
        manifest = replace(MANIFEST, methods=ITI, nulls={"anywhere": Null(n - 3)}, planned=n, probes=None)
        folder = make_run(tmp_path / f"{n}", records, manifest=manifest)
        page = write_report(folder).read_text()
        assert len(page.encode()) < most
        answers = data_of(page)["answers"]
        assert len(answers["questions"]) == N["test"]
        assert len(answers["speakers"]) + answers["left_out"] == n and answers["left_out"] > 0
        assert [one["arm"] for one in answers["speakers"][:4]] == ["base", "claim", "whole", "control"]
        assert f"answers of {answers['left_out']:,} further edits" in page.replace(
            f"{answers['left_out']} ", f"{answers['left_out']:,} "
        )


def test_questions_are_left_out_where_even_the_first_answers_do_not_fit(judged):
    tables = read_tables(judged[0])
    data = page_data(tables)
    whole = data.pop("answers")
    few = page_data(tables, room=size_of(data) + 4_000)["answers"]
    assert 1 <= len(few["questions"]) < len(whole["questions"]) == few["n_questions"]
    assert few["questions"] == whole["questions"][: len(few["questions"])]


def test_small_words():
    assert [spell_duration(x) for x in (3.21, 59.6, 185, 7440)] == ["3.2 s", "1 min 0 s", "3 min 5 s", "2 h 4 min"]
    assert short_location("1.0,2.0") == "1.0,2.0"
    assert short_location(",".join(["1.0"] * 42)).endswith("1.0, and 2 more")
    assert [decimals(x) for x in ((1.74, 2.2), (-0.05, 0.05), (0.1, 0.1), (-300.0, 500.0))] == [2, 3, 2, 0]
    assert [MethodFacts("x", supports).reaches[-5:] for supports in ("higher", "lower")] == ["above", "below"]
    assert registry.METHODS["optimal"].symbol_of(CONFIG.methods["optimal"]) == "τ"


# --- reading a run again: nothing is written unless asked for, and nothing is loaded


def content_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def reread(judged, tmp_path):
    return Path(shutil.copytree(judged[0], tmp_path / "run"))


def test_reading_writes_nothing(reread):
    before = content_of(reread)
    result = read_result(reread)
    assert (result.verdict.score, result.verdict.level, result.run.reading) == ("info_truth_probability", 0.05, {})
    other = read_result(reread, score="mc2", level=0.3, margin=0.2)
    assert (other.verdict.score, other.verdict.level, other.run.design.margin) == ("mc2", 0.3, 0.2)
    again = decide(result.records, score="mc2", level=0.3, design=other.run.design, methods=ITI)
    assert (other.verdict.headline, other.verdict.table()) == (again.headline, again.table())
    assert content_of(reread) == before


def test_a_reading_has_a_report_of_its_own(reread):
    before = content_of(reread)
    page = read_result(reread, level=0.3).write_report()
    assert page == reread / "reports" / "info_truth_probability-level-0.3" / "report.html"
    text = page.read_text()
    assert text.index("Read with other settings than the run’s:") < text.index("<h1")
    assert "level 0.3 (the run&#39;s: 0.05)" in text and "at level 0.3;" in text
    written = json.loads((page.parent / "verdict.json").read_text())
    assert (written["level"], written["reading"]) == (0.3, {"level": {"run": 0.05, "here": 0.3}})
    assert {path: data for path, data in content_of(reread).items() if path.parts[0] != "reports"} == before
    own = read_result(reread).write_report()
    assert own == reread / "report.html" and "Read with" not in own.read_text()
    elsewhere = read_result(reread, score="mc1").write_report(reread.parent / "there")
    assert elsewhere == reread.parent / "there" / "report.html"


def test_a_report_never_takes_the_place_of_a_runs(reread, tmp_path):
    other = make_run(tmp_path / "other", FULL[:1])
    for result, out in ((read_result(reread, level=0.3), reread), (read_result(reread), other)):
        before = content_of(out)
        with pytest.raises(RunFolderError, match="so that their own report is not overwritten"):
            result.write_report(out)
        assert content_of(out) == before


def test_what_a_reading_cannot_have(reread, finished):
    with pytest.raises(ConfigError, match=r"score brevity, which .*; expected one of info, .*mc2"):
        read_result(reread, score="brevity")
    with pytest.raises(ConfigError, match="score truth, which .* does not have; expected one of mc1"):
        read_result(finished[0], score="truth")
    for settings in ({"level": 1.5}, {"margin": 0}):
        with pytest.raises(ConfigError, match="in this reading"):
            read_result(reread, **settings)


def test_a_reading_of_a_registered_run_is_a_change(tmp_path):
    (tmp_path / "claim.yaml").write_text('claim: "1.1,2.0"\nlevel: 0.05\n')
    registration = read_registration(tmp_path / "claim.yaml")
    manifest, config = replace(MANIFEST, registration=registration), replace(CONFIG, claim="1.1,2.0")
    folder = make_run(tmp_path / "run", FULL, manifest=manifest, config=config)
    assert read_result(folder).tables.registered.changed == ()
    assert read_result(folder, level=0.2).tables.registered.changed == ("level: 0.05 registered, 0.2 now",)


def test_a_run_is_read_again_from_the_command_line(reread, capsys):
    before = content_of(reread)
    assert cli.main(["report", str(reread), "--score", "mc1", "--level", "0.1"]) == 0
    said = capsys.readouterr().out
    assert (
        "READ WITH OTHER SETTINGS: score mc1 (the run's: info_truth_probability); level 0.1 (the run's: 0.05)" in said
    )
    there = reread / "reports" / "mc1-level-0.1"
    assert f"report: {there / 'report.html'}" in said
    assert json.loads((there / "verdict.json").read_text())["score"] == "mc1"
    assert {path: data for path, data in content_of(reread).items() if path.parts[0] != "reports"} == before
    assert cli.main(["report", str(reread), "--score", "mc9"]) == 2
    assert "does not have; expected one of" in capsys.readouterr().err


# --- what users see of objects, and tables of a run


def test_frames_are_tidy(reread):
    result = read_result(reread)
    trials, scores, answers = result.trials(), result.scores(), result.answers()
    assert len(trials) == len(SAID) and trials["chosen"].dtype == bool
    assert next(csv.reader(io.StringIO(result.tables.trials_csv()))) == list(trials.columns)
    keys = ["trial_id", "split", "question"]
    assert not scores.duplicated([*keys, "metric"]).any() and not answers.duplicated(keys).any()
    assert set(scores.columns) == {
        *keys,
        "arm",
        "null",
        "control",
        "method",
        "hyperparameter",
        "location",
        "metric",
        "value",
    }
    assert len(answers) == sum(len(said) for record in SAID for said in record.answers.values())
    by_trial = scores[(scores.split == "test") & (scores.metric == "mc2")].groupby("trial_id").value.mean()
    assert by_trial.to_dict() == pytest.approx(dict(zip(trials.trial_id, trials.mc2, strict=True)))
    lost = answers[answers["info"].isna()]
    assert set(zip(lost["question"], lost["answer"], strict=True)) <= set(UNJUDGED)
    assert set(lost["info_reason"]) == {"HTTP 500 <try again>"} and lost["info_probability"].isna().all()
    assert ((answers["truth"] == 1) == (answers["truth_probability"] >= 0.5)).all()
    assert set(trials.location[trials.arm == "whole"]) == {"*"}


def test_frames_name_the_extra_that_they_need(reread, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(LocauditError, match=r"pandas.*pip install 'locaudit\[report\]'"):
        read_result(reread).trials()


def test_results_print_in_a_few_lines(reread, finished):
    result = read_result(reread, level=0.3)
    run = result.run
    assert repr(result).startswith(f"AuditResult('{reread}')\n  read with level 0.3 (the run's: 0.05)\nVerdict(")
    assert "iti: " in repr(result) and f"claim {result.verdict.methods['iti'].claim:.3f}" in repr(result)
    assert repr(run) == f"Run('{reread}': tiny on misconceptions, 11 of 11 trials)"
    things = (result, result.tables, run, result.verdict, result.verdict.methods["iti"], run.records[0], run.manifest,
              run.config, load_run(finished[0]).verdict, CLAIM)  # fmt: skip
    for thing in things:
        assert len(repr(thing).splitlines()) <= 6 and len(repr(thing)) < 700, type(thing)
    many = Location(tuple((0, i) for i in range(5000)), "neuron")
    assert repr(many) == "Location('neuron:0.0,0.1,0.2,0.3,0.4,0.5,0.6,0.7, and 4992 more')"


def test_html_of_a_result_is_a_table_and_escaped(reread):
    result = read_result(reread)
    page = result._repr_html_()
    assert page == result.verdict._repr_html_() == result.run._repr_html_()
    assert page.count("<tr>") == 2 and f"<td>{result.verdict.methods['iti'].claim:.3f}</td>" in page
    evil = replace(result.verdict, headline="<script>", claim="<b>", methods={"<i>": result.verdict.methods["iti"]})
    assert not re.search("<script>|<b>|<i>", evil._repr_html_())


def test_symbols_stand_for_the_whole_model_and_the_rest():
    """Nothing names 10,000 neurons: a control spells out its own units alone."""
    claim = Location(((0, 3), (1, 2)), "neuron")
    places = {"claim": claim, "whole": Location.whole("neuron"), "control": Location(((0, 1), (1, 9)), "neuron")}
    records = [r if r.spec.location is None else replace(r, spec=replace(r.spec, location=places[r.spec.arm]))
               for r in [trial("base"), *trials("iti", (1.0,), controls=1)]]  # fmt: skip
    records.append(replace(records[1], spec=replace(records[1].spec, arm="rest", location=claim.rest())))
    manifest = replace(MANIFEST, claim=claim, methods=ITI, nulls={"anywhere": Null(1)}, planned=5, probes=None)
    seconds = {record.spec.trial_id: 1.0 for record in records}
    tables = tabulate(Run(Path(), CONFIG, manifest, tuple(records), QUESTIONS, {}, seconds))
    found = {line["arm"]: line["location"] for line in csv.DictReader(io.StringIO(tables.trials_csv()))}
    assert found == {"base": "", "claim": "neuron:0.3,1.2", "whole": "neuron:*", "rest": "neuron:*-0.3,1.2",
                     "control": "neuron:0.1,1.9"}  # fmt: skip
