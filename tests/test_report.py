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
from dataclasses import replace
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
from locaudit.report.drawings import draw_controls
from locaudit.report.figures import HeatMap, Series, draw_drift, draw_heads, draw_shares, draw_spreads
from locaudit.report.html import inline_svg, number, spell_duration
from locaudit.report.style import save, score_phrase
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

N = {"val": 8, "test": 12}
IDS = {split: [f"{split}{i}" for i in range(n)] for split, n in N.items()}
QUESTIONS = {
    split: tuple(HeldOutQuestion(q, f"Is <{q}> so?", ("No.",), ("Yes.",), f"key {q}") for q in ids)
    for split, ids in IDS.items()
}
SILENT = EvaluationConfig(max_new_tokens=0)
CONFIG = AuditConfig(controls=19, evaluation=SILENT)  # no judges in the manifest: the score is mc2
FIGURES = ("controls", "effect_vs_kl", "probes")
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


@pytest.fixture
def unsaved(monkeypatch):
    """Figures are drawn but not saved, for tests of the page's words: saving takes most of a report's time."""
    svg = '<svg width="1pt" viewBox="0 0 1 1"></svg>'
    monkeypatch.setattr("locaudit.report.drawings.save", lambda figure, folder, name: svg)


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


def test_the_page_shows_what_stood_before_the_questions(tmp_path, unsaved):
    pages = {}
    config = replace(CONFIG, prompt=PromptConfig("qa"))
    for name, primer in {"none": "", "own": "Be <b>brief</b>.", "unknown": None}.items():
        folder = make_run(tmp_path / name, FULL[:1], manifest=replace(MANIFEST, primer=primer), config=config)
        pages[name] = write_report(folder).read_text()
    assert "no primer; style qa" in pages["none"]
    assert "a primer of 2 words" in pages["own"] and "Be &lt;b&gt;brief&lt;/b&gt;." in pages["own"]
    assert "Before each scored question" not in pages["unknown"]


def test_a_finished_run_leaves_a_page_a_verdict_and_figures(finished):
    folder, page = finished
    assert "Unfinished" not in page
    assert json.loads((folder / "verdict.json").read_text())["score"] == "mc2"
    for name in FIGURES:
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / "figures" / f"{name}.svg").stat().st_size > 2_000
        assert f'<figure id="{name}">' in page
    assert not [p for p in folder.rglob("*.tmp")]


def test_the_page_is_well_formed_and_loads_nothing(finished):
    outline = _Outline()
    outline.feed(finished[1])
    assert outline.open == []
    assert all(link.startswith(("#", "data:")) for link in outline.loads)
    assert len(set(outline.ids)) == len(outline.ids)
    assert "<script" not in finished[1]


def test_numbers_in_the_page_are_those_of_the_verdict(finished):
    folder, page = finished
    verdict = json.loads((folder / "verdict.json").read_text())
    assert f"<h1>{escape(verdict['headline'])}</h1>" in page
    assert verdict["headline"].startswith(f"{verdict['outcome']}: ")
    for name, judged in verdict["methods"].items():
        card = re.search(rf'<article class="card [a-z]+" id="{name}">(.*?)</article>', page, re.DOTALL)
        assert card is not None
        shown = {float(value) for value in re.findall(r'<data value="([^"]+)">', card[1])}
        null = judged["nulls"]["anywhere"]
        finite = null["controls"]
        means = judged["base"], judged["claim"], judged["whole_model"]
        p_values = [judged["effect_p"], *(null[key] for key in ("p_value", "p_adjusted", "p_new_place"))]
        intervals = *judged["effect_interval"], *null["lead_interval"], null["true_share"], *null["true_share_interval"]
        expected = {*means, *p_values, judged["effect"], null["lead"], *intervals}
        expected |= {judged["chosen"]["claim"], min(finite), max(finite)}
        assert expected <= shown
        (mean,) = shown - expected
        assert mean == pytest.approx(np.mean(finite), abs=1e-12)
        assert judged["reason"][1:] in unescape(card[1])
        assert f"{null['n_at_least']} of 19 at or above" in card[1]


def test_the_table_has_every_arm_and_control(finished):
    page = finished[1]
    assert page.count('<th scope="row">Control ') == 2 * 19
    assert page.count('<th scope="row">Claim</th>') == page.count('<th scope="row">Whole model</th>') == 2
    assert page.count('<th scope="row">Mean of 19 controls</th>') == 2
    base = FULL[0]
    assert all(number(value, ".3f") in page for value in base.metrics["test"].values())


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
    for name in FIGURES:
        for ending in ("svg", "png"):
            file = f"figures/{name}.{ending}"
            assert (folder / file).read_bytes() == (finished[0] / file).read_bytes()


def test_writing_again_replaces_and_leaves_the_run_as_it_was(tmp_path, unsaved):
    folder = make_run(tmp_path / "run", FULL[:30])
    first = write_report(folder).read_text()
    before = (folder / "trials.sqlite").read_bytes(), (folder / "config.yaml").read_bytes()
    assert write_report(folder).read_text() == first
    assert ((folder / "trials.sqlite").read_bytes(), (folder / "config.yaml").read_bytes()) == before
    assert load_config(folder / "config.yaml") == CONFIG


def test_all_text_is_escaped(tmp_path, unsaved):
    evil = '<script>alert("x")</script>'
    words = dict.fromkeys(("behaviour", "model", "claim_source", "device", "fingerprint"), evil)
    manifest = replace(MANIFEST, versions={evil: evil}, **words)
    records, config = (
        [*FULL, trial("claim", "iti", 9.0, status="diverged")],
        AuditConfig(behaviour=evil, model=evil, evaluation=SILENT),
    )
    folder = make_run(tmp_path / "run", records, manifest=manifest, config=config)
    page = write_report(folder).read_text()
    assert "<script" not in page
    assert "<b>of" not in page
    assert escape(evil).replace("&quot;", "&#34;") in page


def test_diverged_trials_are_listed_with_their_messages(tmp_path, unsaved):
    records = [r for r in FULL if not (r.spec.method == "optimal" and r.spec.control == 7)]
    records += [trial("control", "optimal", h, 7, status="diverged") for h in (1.0, 2.0)]
    folder = make_run(tmp_path / "run", records)
    page = write_report(folder).read_text()
    assert "Optimal edit, control 7, τ = 1.0: the loss became NaN at step 3 &lt;b&gt;of 9&lt;/b&gt;" in page
    assert "2 trials of 85" in page
    assert f"diverged; {CONTROLS[7]}".replace(",", ", ") in page
    judged = json.loads((folder / "verdict.json").read_text())["methods"]["optimal"]["nulls"]["anywhere"]
    assert (judged["controls"][7], judged["n_at_least"]) == (None, 1)
    assert "NaN" not in (folder / "verdict.json").read_text()


def test_everything_diverged_still_gives_a_page(tmp_path, unsaved):
    records = [FULL[0], trial("claim", "iti", 1.0, status="diverged"), trial("whole", "iti", 1.0, status="diverged")]
    records += [trial("control", "iti", 1.0, i, status="diverged") for i in range(19)]
    page = write_report(make_run(tmp_path / "run", records, manifest=replace(MANIFEST, methods=ITI))).read_text()
    assert "Every edit tried at the claim diverged" in page
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL).lower().replace("became nan", "")


def test_an_unfinished_run_says_first_what_is_missing(tmp_path, unsaved):
    page = write_report(make_run(tmp_path / "run", FULL[:12])).read_text()
    assert page.index("Unfinished: 12 of 85 trials.") < page.index("<h1>")
    assert "ITI: 5 of 19 controls scored, whole model not scored yet." in page
    assert "Optimal edit: the claim is not scored yet" in page
    assert 'id="iti"' in page
    assert 'id="optimal"' not in page


def test_notes_on_the_inputs_stand_in_page_and_terminal(tmp_path, capsys, unsaved):
    folder = make_run(tmp_path / "run", FULL, manifest=replace(MANIFEST, notes=("<i>not measured</i>",)))
    cli.main(["report", str(folder)])
    assert "Note: <i>not measured</i>" in capsys.readouterr().out
    assert "<p>&lt;i&gt;not measured&lt;/i&gt;</p>" in (folder / "report.html").read_text()


def test_a_gain_at_one_label_only_is_told_by_label(tmp_path, capsys, unsaved):
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
    for name in ("mc2 where (A)", "mc2 balanced", "prefers (A)"):
        assert ">{}<".format(name.replace(" ", "\n")) in (folder / "report.html").read_text()


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
    assert sorted(p.name for p in (folder / "figures").iterdir()) == ["probes.png", "probes.svg"]


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


def test_what_a_run_does_not_have_is_left_out(tmp_path, unsaved):
    page = write_report(make_run(tmp_path / "run", FULL, manifest=replace(MANIFEST, probes=None, n_units=None)))
    text = page.read_text()
    assert "Unfinished" not in text and "None" not in text
    assert 'id="probes"' not in text and "<dt>Whole model</dt><dd>" not in text


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", FULL[:1])
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(LocauditError, match=r"jinja2.*pip install 'locaudit\[report\]'"):
        write_report(folder)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(LocauditError, match="without the package matplotlib"):
        draw_heads([HeatMap([[0.5]], "accuracy")], [])


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


def section(page, title):
    return page.split(f">{title}</h2>")[1].split("<h2")[0]


def chosen_of(records, score="info_truth_probability"):
    verdict = decide(records, score=score)
    strengths = {"claim": Place("claim"), "whole": Place("whole")}
    strengths |= {f"control anywhere {i}": Place("control", i, "anywhere") for i in range(3)}
    places = {place: verdict.methods["iti"].chosen[name] for name, place in strengths.items()}
    return {r.spec.place: r for r in records if r.spec.arm == "base" or r.spec.hyperparameter == places[r.spec.place]}


def test_a_judged_run_shows_each_score_with_its_interval(judged):
    _, page, records = judged
    part = section(page, "Truth and information")
    shown = [float(value) for value in re.findall(r'<data value="([^"]+)">', part)]
    chosen = chosen_of(records)
    for record in chosen.values():
        for score in JUDGED:
            low, high = estimate(score_values(record.questions["test"], score)).interval()
            for value in (record.metrics["test"][score], low, high):
                assert any(value == pytest.approx(x, abs=1e-12) for x in shown)
    controls = [chosen[Place("control", i, "anywhere")].metrics["test"]["truth"] for i in range(3)]
    mean = re.search(r"Mean of 3 controls<small>range</small></th>\n(.*)", part)
    assert mean is not None
    assert number(math.fsum(controls) / 3, ".3f") in mean[1]
    assert f"{number(min(controls), '.3f')} to {number(max(controls), '.3f')}" in mean[1]
    assert page.count('<th scope="row">Claim</th>') == page.count('<th scope="row">Whole model</th>') == 2
    assert part.count('<th scope="row">Control ') == 3


def test_missing_judgements_are_counted_and_never_zero(judged):
    _, page, records = judged
    part = unescape(section(page, "Truth and information"))
    missing = sum(math.isnan(x) for r in records for x in r.questions["test"]["info"])
    assert missing > 0
    n = len(records) * 12
    assert f"0 of {n} judgements of Truth and {missing} of {n} judgements of Info are missing" in part
    assert "Truth is judged by judge <A>. Info is judged by judge B." in part
    some = next(r for r in chosen_of(records).values() if any(map(math.isnan, r.questions["test"]["info"])))
    lost = sum(map(math.isnan, some.questions["test"]["info"]))
    assert f"<td>{lost} of 24</td>" in part
    judged_yes = [x for x in some.questions["test"]["info"] if not math.isnan(x)]
    assert some.metrics["test"]["info"] == pytest.approx(sum(judged_yes) / (12 - lost))


def test_a_product_of_means_is_not_called_a_mean(judged):
    folder, page, _ = judged
    words = re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)
    assert json.loads((folder / "verdict.json").read_text())["score"] == "info_truth_probability"
    assert "Info*Truth (probabilities) over 12 test questions, of the models’ own answers as judged" in words
    assert "a product of two means" in words
    assert not re.search(r"mean (test )?(info_truth|Info\*Truth)", words)
    assert score_phrase("mc2") == "mean MC2"
    assert score_phrase("not_known") == "mean not_known"


def test_the_table_of_all_arms_has_the_verdicts_score_first_and_no_other_judged_one(judged, finished):
    head = section(judged[1], "All arms on the test questions").split("</thead>")[0]
    columns = re.findall(r'<th scope="col"[^>]*>([^<]*)</th>', head)
    assert [" ".join(column.split()) for column in columns[2:4]] == ["Info*Truth (probabilities)", "MC1"]
    assert "both" not in head
    assert "Info" not in section(finished[1], "All arms on the test questions")
    assert "Truth and information" not in finished[1]


def test_judged_runs_have_two_more_figures(judged, finished):
    names = re.findall(r'<figure id="(\w+)">', judged[1])
    assert names == ["controls", "effect_vs_kl", "truth_info", "kl_mc"]
    for name in names:
        assert (judged[0] / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "chosen by Info*Truth (probabilities) on validation questions" in judged[1]
    assert re.findall(r'<figure id="(\w+)">', finished[1]) == list(FIGURES)


def test_what_the_models_say_is_shown_in_order_and_escaped(judged):
    _, page, records = judged
    part = section(page, "What the edited models say")
    assert re.findall(r"Is &lt;(\w+)&gt; so\?", part) == IDS["test"]
    before, _, after = part.partition("<details>")
    assert (before.count("<article"), after.count("<article")) == (5, 7)
    assert "first 12 test questions of 12, in order, not selected" in before
    assert "<b>more" not in page
    chosen = chosen_of(records)
    base = chosen[Place("base")]
    speakers = [base, chosen[Place("claim")], chosen[Place("whole")], chosen[Place("control", 0, "anywhere")]]
    rows = re.findall(r'<td class="answer">(.*?)</td>', part, re.DOTALL)
    expected = [(r.answers["test"][i], r) for i in range(12) for r in speakers]
    same = [r is not base and r.answers["test"][i] == base.answers["test"][i]
            for i in range(12) for r in speakers]  # fmt: skip
    assert len(rows) == len(expected)
    for row, (answer, _), repeats in zip(rows, expected, same, strict=True):
        assert row.startswith(f"<bdi>{escape(answer)}</bdi>" if answer else "<em>(nothing)</em>")
        assert row.endswith('<span class="mark">same</span>') == repeats
    assert 0 < sum(same) < 36


def test_judgements_of_answers_are_told_in_words(judged):
    part = section(judged[1], "What the edited models say")
    assert "informative: not judged (HTTP 500 &lt;try again&gt;)" in part
    said = re.findall(
        r'<span class="(yes|no)">. (true|informative) <data value="([^"]+)">[^<]*</data>: (yes|no)<', part
    )
    assert len(said) > 60
    assert all(mark == word == ("yes" if float(p) >= 0.5 else "no") for mark, _, p, word in said)
    assert {float(p) for _, word, p, _ in said if word == "true"} <= {
        opinion("A", q, answer)[0] for q in IDS["test"] for answer in ANSWERS
    }


def test_answers_without_judges_are_shown_alone(tmp_path, unsaved):
    folder = make_judged_run(tmp_path / "run", SAID, judges={})
    page = write_report(folder).read_text()
    assert 'id="answers"' in page
    assert '<td class="answer">' in page
    assert 'class="opinions"' not in page
    assert "Truth and information" not in page


def test_figures_of_judges_since_removed_do_not_stay(tmp_path, unsaved):
    folder = make_judged_run(tmp_path / "run", SAID, judges={})
    stale = folder / "figures" / "truth_info.png"
    stale.write_bytes(b"")
    write_report(folder)
    assert not stale.exists()


def converse(records, judgements=None):
    seconds = {record.spec.trial_id: 1.5 for record in records}
    return tabulate(Run(Path(), CONFIG, MANIFEST, (*records,), QUESTIONS, judgements or {}, seconds)).conversations


def test_no_answers_no_section(finished):
    assert 'id="answers"' not in finished[1]
    assert converse(FULL) == []


def test_a_diverged_place_has_a_row_and_an_unscored_one_has_none():
    records = [r for r in SAID if r.spec.arm == "base" or (r.spec.arm == "control" and r.spec.control == 1)]
    records.append(trial("claim", "iti", 1.0, status="diverged"))
    first, second, *_ = converse(records, {"truth": {("test0", SAID[0].answers["test"][0]): (0.5, "")}})
    assert [said.who for said in first.answers] == ["Unedited model", "ITI: claim"]
    assert first.answers[1].answer is None
    assert first.answers[0].opinions[0].is_yes
    assert (second.answers[0].opinions[0].probability, second.answers[0].opinions[0].reason) == (None, "not yet")


def test_what_html_cannot_hold_is_replaced():
    shown = converse([replace(SAID[0], answers={"test": ("a\x00b\n\x1b[31mc", " \n", *["x"] * 10)})])
    assert [c.answers[0].answer for c in shown[:3]] == ["a\ufffdb\n\ufffd[31mc", "", "x"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("score", [[], ["--score", "mc1"]])
def test_a_run_that_is_read_only_is_reported_elsewhere(tmp_path, unsaved, capsys, score):
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


def test_a_report_under_a_file_is_refused(tmp_path, unsaved):
    folder = make_run(tmp_path / "run", FULL)
    with pytest.raises(RunFolderError, match="cannot be written to.*choose another `out`"):
        write_report(folder, out=folder / "trials.sqlite" / "out")


HOSTILE = "\u061c\u2028\U000e0041a\x00b\x1b[31mc\x7f\x85\x9b2J\u202ed\u2066e\r\nf :smile: [bold]"
SHOWN = "\ufffd\ufffd\ufffda\ufffdb\ufffd[31mc\ufffd\ufffd\ufffd2J\ufffdd\ufffde\nf :smile: [bold]"


def test_no_text_reaches_page_or_terminal_raw(tmp_path, unsaved, capsys):
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
    for text in (page, shown):
        assert not set(text) & set(HOSTILE) - set(SHOWN) and SHOWN in text.replace("<br>", "")
    assert f"Note: {SHOWN}" in shown and f"Q: {SHOWN}" in shown
    assert set(result.answers()["answer"]) == set(result.answers()["text"]) == {HOSTILE}


def test_a_long_text_is_cut_and_says_so(tmp_path, unsaved):
    """A megabyte per answer made a page of a hundred; the frame, which users save as CSV, has all of it."""
    long = "x" * 10**6
    records = [replace(SAID[0], answers={"test": (long,) * N["test"]}), *SAID[1:]]
    folder = make_run(tmp_path / "run", records, manifest=replace(MANIFEST, methods=ITI, probes=None))
    result = read_result(folder)
    page = result.write_report().read_text()
    assert len(page) < 10**6 and f"{'x' * LONGEST}… (998,000 more characters)" in page
    assert result.answers().query("arm == 'base' and split == 'test'")["answer"].tolist() == [long] * N["test"]


def test_any_aspects_make_a_product_of_means(tmp_path, unsaved):
    judges = {"brevity": JUDGES["truth"], "tone": JUDGES["info"]}
    page = write_report(make_judged_run(tmp_path / "run", SAID, judges=judges)).read_text()
    assert "all judged aspects (probabilities) over 12 test questions, of the models’ own answers as judged" in page
    assert "a product of two means" in page
    assert "is the product of the mean probabilities" in page and "“Both”" not in page
    assert "brevity and tone are the shares of answers judged brevity and tone" in page


def test_one_judge_alone_gives_its_own_score(tmp_path, unsaved):
    folder = make_judged_run(tmp_path / "run", SAID, judges={"truth": JUDGES["truth"]})
    page = write_report(folder).read_text()
    assert json.loads((folder / "verdict.json").read_text())["score"] == "truth_probability"
    assert "Truth (probability) over 12 test questions" in page
    assert "Truth is the share of answers judged true: probability at least 0.5." in page
    assert "Info" not in re.sub(r"<pre>.*?</pre>", "", page, flags=re.DOTALL)
    assert re.findall(r'<figure id="(\w+)">', page) == ["controls", "effect_vs_kl", "kl_mc"]


def test_a_judge_that_fails_on_everything_still_gives_a_page(tmp_path, unsaved):
    folder = make_judged_run(tmp_path / "run", SAID, opinion=lambda *_: (None, "no server"))
    page = write_report(folder).read_text()
    assert f"{12 * len(SAID)} of {12 * len(SAID)} judgements of Info are missing" in page
    assert "not judged (no server)" in page
    assert "nan" not in page.lower()
    assert re.findall(r'<figure id="(\w+)">', page) == ["kl_mc"]


def test_another_score_leaves_the_judged_ones_in_their_own_table(tmp_path, unsaved):
    folder = make_judged_run(tmp_path / "run", SAID, config=replace(JUDGED_CONFIG, score="mc2"))
    page = write_report(folder).read_text()
    assert "mean MC2 over 12 test questions" in page
    assert "Info*Truth" not in section(page, "All arms on the test questions")
    assert re.findall(r'<figure id="(\w+)">', page) == ["controls", "effect_vs_kl", "truth_info"]


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


def test_a_control_that_diverged_is_no_part_of_the_controls_mean(tmp_path, unsaved):
    records = [r for r in SAID if r.spec.control != 1] + [trial("control", "iti", 1.0, 1, status="diverged")]
    folder = make_judged_run(tmp_path / "run", records)
    tables = read_tables(folder)
    mean = tables.mean_control("iti", "anywhere", tables.judged)
    scores = [row.values["info_truth"] for row in tables.controls("iti")["anywhere"].values() if row is not None]
    assert mean.n == len(scores) == 2
    assert mean.values["info_truth"] == pytest.approx(sum(scores) / 2)
    part = section(write_report(folder, tables).read_text(), "Truth and information")
    assert "Mean of 2 controls" in part
    lost = part.split('<th scope="row">Control 1</th>')[1].split("</tr>")[0]
    assert re.findall("<td>(.*?)</td>", lost) == ["–"] * len(tables.judged_columns) + [""]


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
    table = section(page, "Truth and information")
    assert ">Degenerate</th>" in table and f'value="{shares["claim"]!r}"' in table


def test_trials_that_diverged_have_empty_scores(tmp_path, unsaved):
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
    axis = draw_shares(
        [one_series([(0.0, 1.0, True), (0.4, 0.4, True)])], titles=("Info", "Truth"), base=base, product="x"
    ).axes[0]
    for (low, high), values in ((axis.get_xlim(), (0.0, 0.4, base[0])), (axis.get_ylim(), (1.0, 0.4, base[1]))):
        assert low < min(values) <= max(values) < high


@pytest.mark.parametrize("controls", [[], [0.5], [0.5] * 4, [0.1, math.nan, 0.3], [math.nan]])
def test_controls_are_drawn_whatever_their_spread(tmp_path, controls):
    records = [trial("base"), trial("claim", "iti", 1.0)]
    records += [
        trial("control", "iti", 1.0, i, gain=None if math.isnan(x) else x, status="diverged" if math.isnan(x) else "ok")
        for i, x in enumerate(controls)
    ]
    figure = draw_controls(decide(records, score="mc2"), METHODS)
    assert save(figure, tmp_path, "controls").startswith("<?xml")


@pytest.mark.parametrize(
    ("drifts", "scale"),
    [
        ([0.0, 0.0], "linear"),
        ([0.1, 0.2], "linear"),
        ([1e-3, 0.2], "log"),
        ([0.0, 0.2], "symlog"),
        ([-1e-9, 1.0], "symlog"),
    ],
)
def test_the_drift_axis_fits_the_drifts(tmp_path, drifts, scale):
    figure = draw_drift([one_series([(kl, 0.1, i == 0) for i, kl in enumerate(drifts)])], ylabel="MC2", base=0.0)
    assert figure.axes[0].get_xscale() == scale
    save(figure, tmp_path, "effect_vs_kl")
    low, high = figure.axes[0].get_xlim()
    assert low < min(drifts) <= max(drifts) < high


@pytest.mark.parametrize("shape", [(1, 1), (4, 3), (12, 96), (80, 64)])
def test_heat_maps_of_any_model(tmp_path, shape):
    accuracy = np.linspace(0.4, 0.9, shape[0] * shape[1]).reshape(shape)
    save(draw_heads([HeatMap(accuracy.tolist(), "accuracy")], [(0, 0)], floor=0.5), tmp_path, "probes")


def test_drawing_leaves_matplotlibs_settings_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw_heads([HeatMap([[0.5, 0.6]], "accuracy")], [])
    assert dict(matplotlib.rcParams) == before


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        draw_spreads([], xlabel="MC2", what="controls", colour="blue")
    with pytest.raises(ValueError, match="at least one"):
        draw_drift([], ylabel="MC2", base=0.0)
    with pytest.raises(ValueError, match="at least one"):
        draw_shares([one_series([])], titles=("Info", "Truth"), base=(0.5, 0.5), product="Info*Truth")


def test_neuron_claims_have_no_outline(tmp_path, unsaved):
    manifest = replace(MANIFEST, claim=parse_location("neuron:1.100,2.5"), kind_plural="neurons")
    folder = make_run(tmp_path / "run", FULL, manifest=manifest)
    page = write_report(folder).read_text()
    assert "2 neurons" in page
    assert "Outlined" not in page


def test_numbers_carry_their_exact_value():
    assert number(-0.12345, "+.3f") == '<data value="-0.12345">−0.123</data>'
    assert number(None, ".3f") == number(math.nan, ".3f") == "–"


def test_inline_svgs_have_ids_of_their_own():
    body = '<path id="a"/><use xlink:href="#a" clip-path="url(#a)"/></svg>'
    svg = f'<?xml version="1.0"?>\n<svg width="1pt" viewBox="0 0 1 1">{body}'
    inline = inline_svg(svg, "x", 'a "b"')
    assert inline.startswith('<svg viewBox="0 0 1 1" role="img" aria-label="a &#34;b&#34;">')
    assert 'id="x-a"/><use xlink:href="#x-a" clip-path="url(#x-a)"' in inline


def test_small_words():
    assert [spell_duration(x) for x in (3.21, 59.6, 185, 7440)] == ["3.2 s", "1 min 0 s", "3 min 5 s", "2 h 4 min"]
    assert short_location("1.0,2.0") == "1.0,2.0"
    assert short_location(",".join(["1.0"] * 42)).endswith("1.0, and 2 more")
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


def test_a_reading_has_a_report_of_its_own(reread, unsaved):
    before = content_of(reread)
    page = read_result(reread, level=0.3).write_report()
    assert page == reread / "reports" / "info_truth_probability-level-0.3" / "report.html"
    text = page.read_text()
    assert text.index("Read with other settings than the run’s:") < text.index("<h1>")
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
