"""The report of synthetic run folders: what the page says, what it escapes, what it leaves behind."""

import json
import math
import os
import re
import subprocess
import sys
from html import escape, unescape
from html.parser import HTMLParser

import numpy as np
import pytest

from locaudit.config import AuditConfig, load_config
from locaudit.errors import LocauditError, RunFolderError
from locaudit.records import TrialRecord, TrialSpec
from locaudit.report import write_report
from locaudit.report.figures import EffectPoint, draw_controls, draw_effect, draw_probes
from locaudit.report.html import inline_svg, number
from locaudit.report.style import save
from locaudit.report.view import hyperparameter_symbol, short_location, spell_duration
from locaudit.stats import decide
from locaudit.store import open_run

N = {"val": 8, "test": 12}
QUESTIONS = {split: [f"{split}{i}" for i in range(n)] for split, n in N.items()}
CONFIG = AuditConfig(controls=19)  # no judges in the facts: the score is mc2
FIGURES = ("controls", "effect_vs_kl", "probes")
RUN = {
    "model": "tiny", "fingerprint": "0123abcd", "n_layers": 4, "n_heads": 3, "n_units": 12,
    "behaviour": "misconceptions", "n_questions": {"train": 30, "val": 8, "test": 12}, "planned": 85,
    "claim": "1.1,2.0", "claim_source": "given", "versions": {"locaudit": "0.1.0"}, "device": "cpu", "threads": 2,
}  # fmt: skip
PROBES = {
    "val_accuracy": [[0.5, 0.6, 0.55], [0.52, 0.7, 0.5], [0.8, 0.5, 0.45], [0.5, 0.5, 0.5]],
    "majority": 0.52, "n_train": 90, "n_val": 30, "context": "next_question", "units": [[2, 0], [1, 1]],
}  # fmt: skip
GAINS = {"base": 0.0, "claim": 0.2, "control": 0.05, "whole": 0.3}


def trial(arm, method="none", hyperparameter=None, control=-1, *, gain=None, status="ok", kl=None):
    location = {"base": "", "claim": "1.1,2.0", "control": f"0.{control % 3},3.{control % 2}", "whole": "0.0,0.1,0.2"}
    spec = TrialSpec(arm, method, location[arm], hyperparameter, 0, "context", control)
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
        metrics={split: {name: float(np.mean(x)) for name, x in metrics.items()} for split, metrics in scores.items()},
        drift={"kl": gain**2 + (hyperparameter or 0) / 1000 if kl is None else kl, "ce": 2.5},
        questions=scores,
    )


def trials(method, grid=(1.0, 2.0), controls=19):
    places = [("claim", -1), *(("control", i) for i in range(controls)), ("whole", -1)]
    return [trial(arm, method, h, control) for arm, control in places for h in grid]


FULL = [trial("base"), *trials("iti"), *trials("optimal")]


def make_run(folder, records, *, run=RUN, probes=PROBES, config=CONFIG):
    with open_run(folder, config) as store:
        if run is not None:
            store.set_fact("run", run)
        if probes is not None:
            store.set_fact("probes", probes)
        if records:
            store.add(records, QUESTIONS, seconds=1.5 * len(records))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("runs") / "finished", FULL)
    return folder, write_report(folder).read_text()


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
    for name, judged in verdict["methods"].items():
        card = re.search(rf'<article class="card [a-z]+" id="{name}">(.*?)</article>', page, re.DOTALL)
        assert card is not None
        shown = {float(value) for value in re.findall(r'<data value="([^"]+)">', card[1])}
        finite = judged["controls"]
        expected = {judged[key] for key in ("base", "claim", "whole_model", "p_value", "effect", "effect_p", "gap")} | {
            *judged["effect_interval"],
            *judged["gap_interval"],
            judged["chosen"]["claim"],
            min(finite),
            max(finite),
        }
        assert expected <= shown
        (mean,) = shown - expected
        assert mean == pytest.approx(np.mean(finite), abs=1e-12)
        assert judged["sentence"] in unescape(card[1])
        assert f"{judged['n_at_least']} of 19 at or above" in card[1]


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


def test_writing_again_replaces_and_leaves_the_run_as_it_was(tmp_path):
    folder = make_run(tmp_path / "run", FULL[:30])
    first = write_report(folder).read_text()
    before = (folder / "trials.sqlite").read_bytes(), (folder / "config.yaml").read_bytes()
    assert write_report(folder).read_text() == first
    assert ((folder / "trials.sqlite").read_bytes(), (folder / "config.yaml").read_bytes()) == before
    assert load_config(folder / "config.yaml") == CONFIG


def test_all_text_is_escaped(tmp_path):
    evil = '<script>alert("x")</script>'
    run = {**RUN, "behaviour": evil, "model": evil, "claim_source": evil, "device": evil, "versions": {evil: evil}}
    config = AuditConfig(behaviour=evil, model=evil)
    folder = make_run(tmp_path / "run", [*FULL, trial("claim", "iti", 9.0, status="diverged")], run=run, config=config)
    page = write_report(folder).read_text()
    assert "<script" not in page
    assert "<b>of" not in page
    assert escape(evil).replace("&quot;", "&#34;") in page


def test_diverged_trials_are_listed_with_their_messages(tmp_path):
    records = [r for r in FULL if not (r.spec.method == "optimal" and r.spec.control == 7)]
    records += [trial("control", "optimal", h, 7, status="diverged") for h in (1.0, 2.0)]
    folder = make_run(tmp_path / "run", records)
    page = write_report(folder).read_text()
    assert "Optimal edit, control 7, τ = 1.0: the loss became NaN at step 3 &lt;b&gt;of 9&lt;/b&gt;" in page
    assert "2 trials of 85" in page
    assert "diverged; 0.1, 3.1" in page
    judged = json.loads((folder / "verdict.json").read_text())["methods"]["optimal"]
    assert (judged["controls"][7], judged["n_at_least"]) == (None, 1)
    assert "NaN" not in (folder / "verdict.json").read_text()


def test_everything_diverged_still_gives_a_page(tmp_path):
    records = [FULL[0], trial("claim", "iti", 1.0, status="diverged"), trial("whole", "iti", 1.0, status="diverged")]
    records += [trial("control", "iti", 1.0, i, status="diverged") for i in range(19)]
    page = write_report(make_run(tmp_path / "run", records, config=AuditConfig(methods=("iti",)))).read_text()
    assert "nothing was measured" in page
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL).lower().replace("became nan", "")


def test_an_unfinished_run_says_first_what_is_missing(tmp_path):
    page = write_report(make_run(tmp_path / "run", FULL[:12])).read_text()
    assert page.index("Unfinished: 12 of 85 trials.") < page.index("<h1>")
    assert "ITI: 5 of 19 controls scored, whole model not scored yet." in page
    assert "Optimal edit: the claim is not scored yet" in page
    assert 'id="iti"' in page
    assert 'id="optimal"' not in page


def test_only_the_unedited_model_is_enough_for_a_page(tmp_path):
    folder = make_run(tmp_path / "run", FULL[:1])
    page = write_report(folder).read_text()
    assert "Unfinished: 1 of 85 trials." in page
    assert "No edit at the claim is scored" in page
    assert sorted(p.name for p in (folder / "figures").iterdir()) == ["probes.png", "probes.svg"]


@pytest.mark.parametrize("records", [[], trials("iti")])
def test_nothing_scored_is_an_error(tmp_path, records):
    folder = make_run(tmp_path / "run", records)
    with pytest.raises(RunFolderError, match="nothing is scored yet"):
        write_report(folder)
    assert not (folder / "report.html").exists()
    with pytest.raises(RunFolderError, match="not a run folder"):
        write_report(tmp_path / "elsewhere")


@pytest.mark.parametrize("run", [None, {}, {"model": None, "n_questions": None, "versions": None}])
def test_missing_facts_are_left_out(tmp_path, run):
    page = write_report(make_run(tmp_path / "run", FULL, run=run, probes=None)).read_text()
    assert "Unfinished" not in page
    assert "None" not in page
    assert 'id="probes"' not in page


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", FULL[:1])
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(LocauditError, match=r"pip install \"locaudit\[report\]\""):
        write_report(folder)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(LocauditError, match="without matplotlib"):
        draw_probes([[0.5]], None, [])


def test_the_report_never_imports_torch(finished):
    code = (
        "import sys; from locaudit.report import write_report; write_report(sys.argv[1]); print('torch' in sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(finished[0])],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert ran.stdout.strip() == "False"


# --- figures and small parts


@pytest.mark.parametrize("controls", [[], [0.5], [0.5] * 4, [0.1, math.nan, 0.3], [math.nan]])
def test_controls_are_drawn_whatever_their_spread(tmp_path, controls):
    records = [trial("base"), trial("claim", "iti", 1.0)]
    records += [
        trial("control", "iti", 1.0, i, gain=None if math.isnan(x) else x, status="diverged" if math.isnan(x) else "ok")
        for i, x in enumerate(controls)
    ]
    assert save(draw_controls(decide(records, score="mc2").methods, "mc2"), tmp_path, "controls").startswith("<?xml")


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
    points = [EffectPoint("claim", "iti", kl, 0.1, chosen=i == 0) for i, kl in enumerate(drifts)]
    figure = draw_effect(points, "mc2")
    assert figure.axes[0].get_xscale() == scale
    save(figure, tmp_path, "effect_vs_kl")
    low, high = figure.axes[0].get_xlim()
    assert low < min(drifts) <= max(drifts) < high


@pytest.mark.parametrize("shape", [(1, 1), (4, 3), (12, 96), (80, 64)])
def test_heat_maps_of_any_model(tmp_path, shape):
    accuracy = np.linspace(0.4, 0.9, shape[0] * shape[1]).reshape(shape)
    save(draw_probes(accuracy.tolist(), 0.5, [(0, 0)]), tmp_path, "probes")


def test_drawing_leaves_matplotlibs_settings_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw_probes([[0.5, 0.6]], None, [])
    assert dict(matplotlib.rcParams) == before


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        draw_controls({}, "mc2")
    with pytest.raises(ValueError, match="at least one"):
        draw_effect([], "mc2")


def test_neuron_claims_have_no_outline(tmp_path):
    folder = make_run(tmp_path / "run", FULL, run={**RUN, "claim": "neurons:1.100,2.5", "claim_source": None})
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
    assert inline.startswith('<svg viewBox="0 0 1 1" role="img" aria-label="a &quot;b&quot;">')
    assert 'id="x-a"/><use xlink:href="#x-a" clip-path="url(#x-a)"' in inline


def test_small_words():
    assert [spell_duration(x) for x in (3.21, 59.6, 185, 7440)] == ["3.2 s", "1 min 0 s", "3 min 5 s", "2 h 4 min"]
    assert short_location("1.0,2.0") == "1.0,2.0"
    assert short_location(",".join(["1.0"] * 42)).endswith("1.0, and 2 more")
    assert hyperparameter_symbol("optimal", CONFIG) == "τ"
