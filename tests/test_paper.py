from __future__ import annotations

import csv
import itertools
import json
import math
import shutil
import sqlite3
from dataclasses import replace

import numpy as np
import pytest
from filelock import FileLock
from scipy import stats

from locaudit import load_behaviour, load_model, paper
from locaudit.cli import main
from locaudit.config import parse_over, to_dict, to_yaml
from locaudit.errors import ConfigError, LocationError, ModelError, RunFolderError
from locaudit.report.charts import frontier
from locaudit.run.audit import run_audit
from locaudit.stats import decide, holm, new_place_p, rank_correlation, t_test_p
from locaudit.store.database import Store
from locaudit.store.run import load_run
from locaudit.studies.paper import is_study, numbers_text, write_paper
from locaudit.studies.paper.config import PRESETS, PaperConfig, load_paper_preset
from locaudit.studies.paper.run import describe_plan, estimate_paper, run_paper
from locaudit.studies.paper.specification import specify
from locaudit.studies.paper.study import read_study
from runs import HashJudge, save_behaviour, save_model, study_config

JUDGES = {"truth": HashJudge("truth"), "info": HashJudge("info")}
PAPER_FIGURES = (
    "hist_iti", "iti_truth_info", "iti_kl_mc", "stronger_evidence_for_loc", "hist_ipo", "random_vs_top", "hist_ipo_1",
    "single_vs_top", "random_vs_top_MC_KL",
)  # fmt: skip
"""Files of the paper's figures."""
PAPER_NUMBERS = {
    "32 layers": "setup.n_layers",
    "32 heads": "setup.n_heads",
    "head dimension 128": "setup.head_dim",
    "1024 heads in all": "setup.n_heads_in_all",
    "817 questions": "setup.data.questions",
    "3.2 truthful answers": "setup.data.true_a_question",
    "4.1 false answers": "setup.data.false_a_question",
    "60% for training": "setup.n_questions.train",
    "6560 training pairs": "training.n_pairs",
    "16 localized heads": "setup.n_localized",
    "16 random sets": "iti.n_random",
    "p = 1.6e-8": "iti.p_t_test",
    "the alpha sweep": "iti.grid",
    "tau = 0.1 .. 0.5": "training.taus",
    "two epochs": "training.epochs",
    "cosine": "training.schedule",
    "batch size of 4": "training.batch_size",
    "paged_adamw_32bit": "training.optimizer",
    "1e-4 for all heads": "training.learning_rate.whole model",
    "5e-4 for 16 heads": "training.learning_rate.localized heads",
    "2e-3 for one head": "training.learning_rate.single head",
    "24 single heads": "single.n_random",
    "5 single heads as effective": "claims.single_heads_match.matching",
    "none with high probing accuracy": "claims.matching_heads_are_not_probed.matching",
    "best Truth*Info of each random set": "optimal.random_scores",
    "MC against KL": "multiple_choice.optimal.localized_kl",
}
"""What the paper reports -> where numbers.json has its counterpart."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    save_model(folder / "model")
    save_behaviour(folder / "questions.jsonl", n=20)
    return folder


def run(config, folder):
    run_paper(config, folder, judges=JUDGES, progress=False)


def report(folder):
    """Write the report; returns its numbers."""
    write_paper(folder)
    return json.loads((folder / "numbers.json").read_text())


def numbers_of(folder):
    """The numbers of the report, which is not written: its figures take longer than the study."""
    study = read_study(folder)
    return json.loads(numbers_text(study, specify(study)))


@pytest.fixture(scope="module")
def finished(home, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "study"
    run(study_config(home), folder)
    return folder


@pytest.fixture(scope="module")
def numbers(finished):
    return report(finished)


def at(numbers, path):
    for key in path.split("."):
        numbers = next(x for x in numbers if x["name"] == key) if isinstance(numbers, list) else numbers[key]
    return numbers


def test_every_figure_and_number_of_the_paper_has_its_counterpart(finished, numbers):
    for name in (*PAPER_FIGURES, "probes", "probe_effect", "landscape", "specification"):
        for ending in ("png", "svg", "pdf"):
            assert (finished / "figures" / f"{name}.{ending}").stat().st_size > 1000, name
    page = (finished / "paper.html").read_text()
    assert all(f'<figure id="{name}">' in page for name in PAPER_FIGURES)
    for what, path in PAPER_NUMBERS.items():
        assert at(numbers, path) is not None, what
    assert len(numbers["claims"]) == 15
    assert {claim["outcome"] for claim in numbers["claims"]} <= {"replicated", "not replicated", "open"}
    assert all(f'id="claim-{claim["name"]}"' in page for claim in numbers["claims"])
    assert "Of the paper’s 14 claims" in page and sum(claim["ours"] for claim in numbers["claims"]) == 1


def test_numbers_are_those_of_the_audits(finished, numbers):
    study = read_study(finished)
    assert {part: len(audit.rows) for part, audit in study.audits.items()} == {
        "sets": 1 + 5 * 2, "iti": 1 + 5 * 2, "single": 1 + 4 * 2, "landscape": 1 + numbers["setup"]["n_heads_in_all"]
    }  # fmt: skip
    for method, part in (("iti", "iti"), ("optimal", "sets")):
        records = [row.record for row in study.audits[part].rows]
        verdict = decide(records, score="info_truth").methods[method]
        block = numbers[method]
        assert block["localized_score"] == verdict.claim == block["localized"]["chosen"]["info_truth"]
        assert block["random_scores"] == list(verdict.first.controls)
        facts = study.audits[part].manifest.methods
        flags = decide(records, score="info_truth", methods=facts).methods[method].flags
        assert flags and numbers["flags"][part] == {flag.name: flag.text for flag in flags}
        assert [place["chosen"]["info_truth"] for place in block["random"]] == list(verdict.first.controls)
        assert block["p_monte_carlo"] == verdict.first.p_value
        assert block["whole"]["chosen"]["info_truth"] == verdict.whole_model
        best = block["localized"]["best_on_test"]
        assert best == max(t["info_truth"] for t in block["localized"]["trials"]) >= block["localized_score"]
        mc2 = decide(records, score="mc2").methods[method]
        assert numbers["multiple_choice"][method]["localized_score"] == mc2.claim
    single, accuracy = numbers["single"], np.asarray(numbers["setup"]["probes"]["val_accuracy"])
    assert single["localized_score"] == numbers["optimal"]["localized_score"]
    assert single["whole_score"] == numbers["optimal"]["whole"]["chosen"]["info_truth"]
    assert single["best_probed"]["probe_rank"] == 1
    assert single["best_probed"]["val_accuracy"] == accuracy.max()
    heads = [row["head"] for row in single["random"]]
    assert len({*heads, single["best_probed"]["head"]}) == 4
    assert single["n_random"] == 3
    scores = [row["score"] for row in single["random"]]
    assert single["n_at_least_localized"] == sum(x >= single["localized_score"] - 1e-9 for x in scores)
    hashes = numbers["run"]["records"]
    assert {part: len(found) for part, found in hashes.items()} == numbers["run"]["n_trials"]


def test_sets_share_their_random_locations_between_methods(numbers):
    places = [[place["location"] for place in numbers[method]["random"]] for method in ("iti", "optimal")]
    assert places[0] == places[1]
    assert numbers["iti"]["localized"]["location"] == numbers["optimal"]["localized"]["location"]


def test_the_landscape_has_every_head_once(numbers):
    land, setup = numbers["landscape"], numbers["setup"]
    effects = np.asarray(land["mc2"]["effects"], dtype=float)
    assert effects.shape == (setup["n_layers"], setup["n_heads"])
    assert land["n"] == np.isfinite(effects).sum() == setup["n_heads_in_all"]
    found = rank_correlation(np.ravel(setup["probes"]["val_accuracy"]).tolist(), effects.ravel().tolist())
    assert land["mc2"]["spearman"] == (None if math.isnan(found[0]) else found[0])


def test_tables_hold_what_the_numbers_do(finished, numbers):
    def rows(name):
        return list(csv.DictReader((finished / "tables" / name).read_text().splitlines()))

    assert {row["claim"] for row in rows("specification.csv")} == {claim["name"] for claim in numbers["claims"]}
    with (finished / "single" / "trials.csv").open() as file:
        trials = list(csv.DictReader(file))
    assert len(trials) == 1 + 4 * 2 and sum(row["chosen"] == "true" for row in trials) == 1 + 4
    assert [row["outcome"] for row in rows("claims.csv")] == [claim["outcome"] for claim in numbers["claims"]]
    assert float(rows("single_heads.csv")[0]["score"]) == numbers["single"]["best_probed"]["score"]
    assert len(rows("single_heads.csv")) == 4


def test_a_study_that_was_killed_ends_with_the_same_numbers(home, finished, numbers, tmp_path, monkeypatch):
    calls, add = itertools.count(1), Store.add

    def dying(self, *arguments):
        if next(calls) == 4:  # in the first part, without which there is nothing to report
            raise KeyboardInterrupt
        return add(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "add", dying)
        with pytest.raises(KeyboardInterrupt):
            run(study_config(home), tmp_path / "a")
    with pytest.raises(RunFolderError, match=r"\d of \d+ trials; expected a finished study|with no trials"):
        write_paper(tmp_path / "a")
    run(study_config(home), tmp_path / "a")
    assert {**numbers_of(tmp_path / "a"), "run": 0} == {**numbers, "run": 0}


def test_a_landscape_may_be_added_later(home, tmp_path):
    plain = study_config(home, landscape=False, random_heads=2)
    run(plain, tmp_path / "a")
    assert report(tmp_path / "a")["landscape"] is None
    assert not (tmp_path / "a" / "figures" / "landscape.png").exists()
    run(replace(plain, landscape=True), tmp_path / "a")
    assert numbers_of(tmp_path / "a")["landscape"]["n"] > 2


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"probe": {"top_k": 500}}, LocationError, "probe.top_k = 500 for .* which has .* heads"),
        ({"random_heads": 500}, LocationError, "random_heads = 500"),
        ({"probe": {"top_k": 1}, "random_sets": 500}, LocationError, "random_sets = 500 of 1 heads"),
        ({"data": "nowhere.csv"}, Exception, "nowhere.csv"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_written(home, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        run(study_config(home, **changes), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_study_needs_both_judges(home, tmp_path):
    with pytest.raises(ConfigError, match=r"judges.truth.kind = none.*a judge, because the study compares Info"):
        study_config(home, judges={"truth": {"kind": "none"}})
    with pytest.raises(ConfigError, match="generated answers, which are judged"):
        study_config(home, evaluation={"max_new_tokens": 0})
    with pytest.raises(ConfigError, match="score = info_truth without a judge of info"):
        run_paper(study_config(home), tmp_path / "a", judges={"truth": HashJudge("truth")}, progress=False)


def test_a_folder_of_something_else_is_refused(home, finished, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="with other files in it"):
        run(study_config(home), tmp_path / "a")
    with pytest.raises(RunFolderError, match=r"without paper.yaml"):
        write_paper(tmp_path / "a")
    with pytest.raises(RunFolderError, match=r"\(methods.optimal.epochs: 1 there, 2 here\)"):
        run(study_config(home, optimal={"epochs": 2}), finished)
    assert is_study(finished) and not is_study(finished / "sets")


def test_a_study_is_read_whole_or_not_at_all(home, finished, tmp_path):
    """Parts under different judges, answers that were not judged, and a landscape that was not asked for."""
    shutil.copytree(finished, tmp_path / "a")
    other = {"truth": HashJudge("truth", version=2), "info": HashJudge("info")}
    run_audit(study_config(home).audits(2)["sets"], tmp_path / "a" / "sets", judges=other, progress=False)
    with pytest.raises(RunFolderError, match="judged by different judges"):
        write_paper(tmp_path / "a")
    run(study_config(home), tmp_path / "a")
    with sqlite3.connect(tmp_path / "a" / "single" / "trials.sqlite") as database:
        database.execute("DELETE FROM judgements")
    database.close()
    with pytest.raises(RunFolderError, match="[0-9]+ answers not judged"):
        write_paper(tmp_path / "a")
    run(study_config(home, landscape=False), tmp_path / "a")
    assert numbers_of(tmp_path / "a")["landscape"] is None


@pytest.mark.parametrize(("name", "value"), [("score", "info_truth_both"), ("seed", 3)])
def test_a_part_with_other_settings_than_the_study_is_refused(home, finished, tmp_path, name, value):
    shutil.copytree(finished, tmp_path / "a")
    (tmp_path / "a" / "paper.yaml").write_text(to_yaml(study_config(home, **{name: value})))
    with pytest.raises(RunFolderError, match=f"sets, whose setting {name} differs from paper.yaml"):
        write_paper(tmp_path / "a")


def test_a_part_in_the_place_of_another_is_refused(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "iti")
    shutil.copytree(finished / "single", tmp_path / "a" / "iti")
    with pytest.raises(RunFolderError, match="iti, whose setting methods differs"):
        write_paper(tmp_path / "a")


def test_one_process_at_a_time_and_a_refused_study_leaves_its_folder_free(home, tmp_path):
    config = study_config(home, landscape=False)
    with pytest.raises(RunFolderError, match="/proc/x, which cannot be made"):
        run(config, "/proc/x")
    (tmp_path / "a").mkdir()
    with FileLock(tmp_path / "a" / ".lock"), pytest.raises(RunFolderError, match="another process is writing to"):
        run(config, tmp_path / "a")
    assert not (tmp_path / "a" / "paper.yaml").exists()
    long = study_config(home, landscape=False, evaluation={"max_new_tokens": 10_000})
    with pytest.raises(ModelError):
        run(long, tmp_path / "a")
    run(config, tmp_path / "a")  # not "made by another configuration"


def test_presets_are_studies_and_full_is_the_papers():
    for name in PRESETS:
        config = load_paper_preset(name)
        assert parse_over(PaperConfig(), to_yaml(config), "here") == config
    full = load_paper_preset("full")
    assert (full.random_sets, full.random_heads, full.probe.top_k) == (16, 24, 16)
    assert full.optimal.strengths == (0.1, 0.2, 0.3, 0.4, 0.5)
    assert (full.optimal.batching, full.optimal.batch_size, full.optimal.epochs) == ("pair", 4, 2)
    assert full.optimal.objective == "ipo" and full.optimal.optimizer == "auto" and full.optimal.learning_rate is None
    assert full.probe.context == "next_question" and full.iti.direction == "mass_mean"
    assert full.split.max_train is full.split.max_test is full.optimal.max_questions is None
    smoke = load_paper_preset("smoke")
    assert len(smoke.iti.doses or ()) > 1 and len(smoke.optimal.strengths) > 1
    decide = load_paper_preset("decide")
    assert (decide.random_sets, decide.layer_sets, decide.random_heads, decide.probe.top_k) == (39, True, 24, 16)
    assert decide.training_seeds == 3 and decide.budget_hours == 15 and decide.optimal.strengths == (0.03,)
    assert decide.score == "info_truth_probability" and not decide.evaluation.samples and decide.iti.doses
    assert decide.split.max_test == 200 and decide.loading.dtype == "bfloat16"
    with pytest.raises(ConfigError, match="the preset 'huge'"):
        load_paper_preset("huge")  # type: ignore[arg-type]


def test_audits_of_a_study_are_made_alike():
    audits = replace(load_paper_preset("decide"), landscape=True).audits(270)
    assert list(audits) == ["sets", "sets-1", "sets-2", "iti", "single", "landscape"]  # the main claim first
    assert [audit.controls for audit in audits.values()] == [39, 39, 39, 19, 24, 269]
    assert [audit.probe.top_k for audit in audits.values()] == [16] * 4 + [1, 1]
    assert [audit.training_seed for audit in audits.values()] == [None, 1, 2, None, None, None]
    assert [audit.disjoint for audit in audits.values()] == [False] * 6
    assert audits["landscape"].methods["optimal"].strengths == (0.1,)
    shared = [to_dict(audit)["evaluation"] for audit in audits.values()]
    assert shared[0] == shared[1] == shared[2]


def test_dry_run_prints_the_plan_and_keeps_its_trials(home, tmp_path):
    found = estimate_paper(study_config(home), out=tmp_path / "a", judges=JUDGES, progress=False)
    assert {part: sum(e.n_trials.values()) for part, e in found.items()} == {
        "sets": 11, "iti": 11, "single": 9, "landscape": found["landscape"].n_trials["control", "optimal"] + 2
    }  # fmt: skip
    text = describe_plan(found)
    assert "the whole study" in text and "tokens run" in text and "MiB on disk" in text
    for part, estimate in found.items():  # what was timed is kept
        assert len(load_run(tmp_path / "a" / part).trials) == estimate.n_done > 2


def test_command_line(home, finished, tmp_path, capsys):
    path = tmp_path / "p.yaml"
    path.write_text(to_yaml(study_config(home, landscape=False)))
    assert main(["paper", str(path), "--preset", "smoke", "--random-heads", "500", "--out", str(tmp_path / "a")]) == 2
    assert "random_heads = 500" in capsys.readouterr().err
    assert main(["report", str(finished)]) == 0
    out = capsys.readouterr().out
    assert "open: " in out or "replicated: " in out
    assert "paper.html" in out
    assert main(["paper", "--preset", "huge"]) == 2
    assert "invalid choice 'huge' for argument '--preset'" in capsys.readouterr().err


def test_what_the_budget_does_not_reach_is_named_with_its_size(home, tmp_path):
    sizes = {"training_seeds": 2, "layer_sets": True, "iti_sets": 2}
    config = study_config(home, landscape=False, budget_hours=1e-6, **sizes)
    lacking = run_paper(config, tmp_path / "a", judges=JUDGES, progress=False)
    assert list(lacking) == ["sets-1", "iti", "single"]  # the first part runs in any case
    assert all(text.startswith(f"{n} trials, about") for text, n in zip(lacking.values(), (17, 9, 9), strict=True))
    n = report(tmp_path / "a")
    assert n["iti"] is None and n["single"] is None and set(n["run"]["not_run"]) == set(lacking)
    assert {claim["outcome"] for claim in n["claims"]} == {"open"}
    assert all(claim["open"].startswith("not run: ") for claim in n["claims"])
    run_paper(replace(config, budget_hours=None), tmp_path / "a", judges=JUDGES, progress=False)
    assert not run_paper(config, tmp_path / "a", judges=JUDGES, progress=False)  # spent, but nothing is left to run
    n = numbers_of(tmp_path / "a")
    assert not n["run"]["not_run"] and n["run"]["n_trials"] == {"sets": 17, "sets-1": 17, "iti": 9, "single": 9}
    iti, optimal = ([place["location"] for place in n[name]["random"]] for name in ("iti", "optimal"))
    assert iti == optimal[:2] and len(optimal) == 3  # the first ones of the same sets


def test_parametric_p_values_are_scipys():
    rng = np.random.default_rng(0)
    controls = rng.normal(size=16)
    test = stats.ttest_1samp(controls, 1.5, alternative="less")
    assert t_test_p(1.5, [*controls, math.nan]) == pytest.approx(test.pvalue)
    # a new place is a second sample, of one: the two-sample t-test with equal variances
    assert new_place_p(1.5, [*controls, math.nan]) == pytest.approx(
        stats.ttest_ind([1.5], controls, alternative="greater").pvalue
    )
    for p in (t_test_p, new_place_p):
        assert math.isnan(p(1.0, [0.5])) and math.isnan(p(1.0, [0.5, 0.5])) and math.isnan(p(1.0, [0.3, 0.1 + 0.2]))


def test_holm_is_the_published_procedure():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # Holm 1979, by hand
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_rank_correlation_is_scipys():
    rng = np.random.default_rng(2)
    x = rng.integers(0, 6, 7).astype(float)  # ties; few enough for every permutation
    y = x + rng.normal(size=7)
    rho, p = rank_correlation([*x, math.nan], [*y, 1.0])
    expected = stats.spearmanr(x, y)
    assert rho == pytest.approx(expected.statistic)
    exact = stats.permutation_test(
        (x,), lambda a: stats.spearmanr(a, y).statistic, permutation_type="pairings", n_resamples=np.inf
    )
    assert p == pytest.approx(exact.pvalue, abs=0.02)
    assert all(map(math.isnan, rank_correlation([1, 1, 1], [1, 2, 3])))


def test_frontier_keeps_what_nothing_beats():
    points = [(0.1, 0.9), (0.5, 0.5), (0.4, 0.4), (0.5, 0.2), (0.9, 0.1), (0.9, 0.1)]
    assert frontier(points) == [(0.1, 0.9), (0.5, 0.5), (0.9, 0.1)]
    assert frontier([]) == []


@pytest.mark.parametrize("method", ["iti", "optimal"])
def test_missing_scores_are_null_and_figures_are_still_drawn(finished, tmp_path, monkeypatch, method):
    """An edit that diverged everywhere has no scores."""
    shutil.copytree(finished, tmp_path / "a")

    def broken(folder):
        run = load_run(folder)
        trials = [
            replace(trial, status="diverged", metrics={}, questions={}, drift={}, answers={})
            if trial.spec.arm == "claim" and folder.name in ("sets", "iti") and trial.spec.method == method
            else trial
            for trial in run.trials
        ]
        return replace(run, trials=tuple(trials))

    monkeypatch.setattr("locaudit.studies.paper.study.load_run", broken)
    n = report(tmp_path / "a")
    assert n[method]["localized"]["chosen"] is None and n[method]["localized_score"] is None
    claims = {claim["name"]: claim for claim in n["claims"]}
    if method == "optimal":
        undecided = ("random_is_as_good", "single_heads_match", "localized_beats_iti", "probed_heads_know")
    else:
        undecided = ("iti_beats_random", "iti_mc_kl", "optimal_beats_iti", "less_than_under_iti")
    assert {claims[name]["outcome"] for name in undecided} == {"open"}
    assert {claims[name]["p_holm"] for name in undecided} == {1.0}


def test_from_python(home, tmp_path):
    """Five lines: model and data as objects, settings over a preset."""
    config = study_config(home, landscape=False, random_sets=2, random_heads=2)
    model, behaviour = load_model(home / "model", device="cpu"), load_behaviour(home / "questions.jsonl")
    settings = {key: value for key, value in to_dict(config).items() if key not in ("model", "data", "judges")}
    result = paper(model, behaviour, out=tmp_path / "a", preset="smoke", judges=JUDGES, progress=False, **settings)
    assert result.page.is_file() and result.folder == tmp_path / "a"
    assert result.numbers["single"]["n_random"] == 2 and len(result.numbers["claims"]) == 15
