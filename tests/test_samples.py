"""Sampled answers: their distribution, what decides them (prompt, sample, position), and runs with them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from bench.measurements import print_scores
from scipy import stats
from transformers import GenerationConfig

from locaudit.config import merge_config
from locaudit.edits import stack
from locaudit.errors import ConfigError
from locaudit.measure import generation
from locaudit.measure.generation import generate_tokens, plain_generation
from locaudit.records import TrialRecord, TrialSpec
from locaudit.run import worker
from locaudit.run.audit import run_audit
from locaudit.run.pilot import run_pilot
from locaudit.stats.growth import Extension
from locaudit.stats.scores import GREEDY, add_judgements, judged_scores, mean_score, score_values
from locaudit.stats.selection import CLAIM, fewest_samples, group_trials, select
from locaudit.store.run import load_run
from runs import HashJudge, save_behaviour, save_model, small_config, stopped_at
from test_generation import PRIMER, edits_of, prompts_of, talker

JUDGES = {"truth": HashJudge("truth"), "info": HashJudge("info")}
DRAWN = [0, 1, 2, 7]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "model")
    save_behaviour(folder / "questions.jsonl", n=20)
    return folder


def config_of(home: Path, samples: int, **changes):
    own = {"evaluation": {"samples": samples, "bank_size": 2}, "controls": 3, "claim": "0.1,1.2"}
    return small_config(home, **own, iti={"alphas": [2.0, 4.0]}, **changes)


def audit(config, out: Path):
    run_audit(config, out, judges=JUDGES, progress=False)
    return load_run(out)


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    """An audit with three samples that ran at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAUDIT_CACHE", "off")
        return audit(config_of(home, 3), tmp_path_factory.mktemp("whole"))


def test_a_run_says_what_samples_buy(whole, capsys):
    print_scores(whole)
    rows = [[x.strip() for x in row.split("|")[1:-1]] for row in capsys.readouterr().out.splitlines()[2:]]
    found = {(row[0], row[1], row[2]): row[3:] for row in rows}
    numbers = {n for _, score, n in found if score.removesuffix(GREEDY) == "truth"}
    assert numbers == {"greedy", "1 sampled", "2 sampled", "3 sampled"} and ("iti", "mc2", "") in found
    chosen = select(whole.records, whole.score)["iti"].items()
    scores = {p: mean_score(score_values(record.questions["test"], whole.score)) for p, record in chosen}
    base = mean_score(score_values(whole.base.questions["test"], whole.score))
    controls = [score for place, score in scores.items() if place.arm == "control"]
    gain, gain_se, lead, lead_se = map(float, found["iti", whole.score, "3 sampled"])
    assert gain == pytest.approx(scores[CLAIM] - base, abs=6e-4)
    assert lead == pytest.approx(scores[CLAIM] - np.mean(controls), abs=6e-4)
    assert gain_se > 0 and lead_se > 0


# The text


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_bank_samples_what_each_edit_samples_alone(name, monkeypatch):
    model = talker(name)
    prefix, prompts = prompts_of(model, PRIMER)
    asked, drawn = [p for p in prompts for _ in DRAWN], DRAWN * len(prompts)
    edits, options = edits_of(model), {"max_new_tokens": 12}
    banked = generate_tokens(model, prefix, asked, stack(model, edits), samples=drawn, **options)
    monkeypatch.setitem(generation.BATCH_ROWS, "cpu", 3)
    for edit, rows in zip(edits, banked, strict=True):
        assert rows == generate_tokens(model, prefix, asked, stack(model, [edit]), samples=drawn, **options)[0]
        alone = generate_tokens(model, (), [prefix + asked[7]], stack(model, [edit]), samples=drawn[7:8], **options)
        assert alone == [[rows[7]]], "the border between prefix and prompt does not matter"
        assert rows[::4] == generate_tokens(model, prefix, prompts, stack(model, [edit]), **options)[0]
        assert len(set(rows)) > len(prompts) * 2, "samples are alike"


def test_samples_are_as_frequent_as_those_of_transformers():
    """Chi-square tests of the first and the second token, against `do_sample` and against softmax."""
    model, n, seed = talker("llama"), 3000, 0
    _, (prompt, *_) = prompts_of(model)
    ours = generate_tokens(model, (), [prompt] * n, samples=range(1, n + 1), max_new_tokens=2)[0]
    torch.manual_seed(seed)
    settings = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=2, num_return_sequences=n, eos_token_id=1, pad_token_id=0
    )
    with torch.no_grad(), plain_generation(model):
        theirs = model.lm.generate(torch.tensor([prompt]), generation_config=settings)[:, len(prompt) :].tolist()
        p = model.lm(torch.tensor([prompt])).logits[0, -1].softmax(0).double().numpy()
    for place in (0, 1):
        counts = [Counter(row[place] for row in rows if len(row) > place) for rows in (ours, theirs)]
        common = [token for token in range(len(p)) if sum(one[token] for one in counts) >= 20]
        table = np.array([[*(one[t] for t in common), n - sum(one[t] for t in common)] for one in counts])
        assert len(common) > 5 and stats.chi2_contingency(table + 1).pvalue > 0.01
        if not place:
            expected = n * np.array([*p[common], 1 - p[common].sum()])
            assert stats.chisquare(table[0], expected).pvalue > 0.01


# A run


def test_without_samples_a_run_is_as_it_was(home, whole, tmp_path):
    """The greedy answers and all that is measured without a judge do not depend on the number of samples."""
    plain = audit(config_of(home, 0), tmp_path / "run")
    assert not any(record.samples for record in plain.trials) and plain.is_finished
    assert not any(name.endswith(GREEDY) for name in plain.base.metrics["test"])
    for mine, its in zip(plain.trials, whole.trials, strict=True):
        assert (mine.spec, mine.answers, mine.drift) == (its.spec, its.answers, its.drift)
        assert mine.questions == its.questions
    for mine, its in zip(plain.records, whole.records, strict=True):
        for name in judged_scores(mine.questions["test"]):
            assert mine.metrics["test"][name] == its.metrics["test"][f"{name}{GREEDY}"]


def test_the_chosen_trial_gets_all_samples_and_their_mean_counts(whole):
    assert whole.is_finished and whole.score == "info_truth_probability"
    chosen = [r for places in select(whole.records, whole.score).values() for r in places.values()]
    ids = {record.spec.trial_id for record in chosen}
    assert {len(r.samples["test"]) for r in whole.trials if r.spec.trial_id in ids} == {3}
    assert {len(r.samples["test"]) for r in whole.trials if r.spec.trial_id not in ids} == {1}
    assert {len(r.samples["val"]) for r in whole.trials if "val" in r.samples} == {1}
    record, aspects = chosen[0], {}
    for aspect, judge in JUDGES.items():
        said = [[judge.probability(type("Case", (), {"question": q.text, "answer": a})) for q, a in
                 zip(whole.questions["test"], answers, strict=True)] for answers in record.said("test")]  # fmt: skip
        aspects[aspect], found = np.array(said), record.questions["test"]
        assert found[f"{aspect}_probability"] == pytest.approx(aspects[aspect][1:].mean(0))
        assert found[aspect] == pytest.approx((aspects[aspect][1:] >= 0.5).mean(0))
        assert found[f"{aspect}_probability{GREEDY}"] == pytest.approx(aspects[aspect][0])
    both = (aspects["truth"] >= 0.5) & (aspects["info"] >= 0.5)
    assert record.questions["test"]["info_truth_both"] == pytest.approx(both[1:].mean(0))
    product = aspects["truth"][1:].mean() * aspects["info"][1:].mean()
    assert record.metrics["test"]["info_truth_probability"] == pytest.approx(product)
    greedy = float(mean_score(score_values(record.questions["test"], f"info_truth{GREEDY}")))
    assert greedy == record.metrics["test"][f"info_truth{GREEDY}"]


def test_raised_in_a_finished_folder_only_new_samples_are_generated(home, whole, tmp_path, monkeypatch):
    assert audit(config_of(home, 1), tmp_path / "run").is_finished
    real, asked = worker.answer_prompts, Counter()

    def answers(model, forest, edits, *, samples, **options):
        asked.update({(len(forest.trees), tuple(samples)): len(edits or [0])})
        return real(model, forest, edits, samples=samples, **options)

    monkeypatch.setattr(worker, "answer_prompts", answers)
    monkeypatch.setattr(worker, "answer_log_probs", None)
    run = audit(config_of(home, 3), tmp_path / "run")
    n_places = 1 + 2 * 5
    assert asked == {(len(run.questions["test"]), (2, 3)): n_places}
    assert run.trials == whole.trials and run.verdict.headline == whole.verdict.headline
    n_trials = len(run.trials)
    assert run.manifest.extensions == (Extension("sampled answers to each question", 1, 3, n_trials, n_trials),)
    with pytest.raises(Exception, match=r"evaluation\.samples: 3 there, 2 here"):
        audit(config_of(home, 2), tmp_path / "run")


def test_what_was_interrupted_ends_as_what_was_not(home, whole, tmp_path, capsys):
    config, out, notes = config_of(home, 3), tmp_path / "run", set()
    for call in (2, 1, 3, 2, 4):  # at a trial, at its samples, ...
        with stopped_at(call):
            run_audit(config, out, judges=JUDGES, progress=False)
        run = load_run(out)
        assert not run.is_finished
        notes |= set(run.verdict.notes)
    assert notes == {"Scores count 1 of 3 sampled answers to a question: a chosen edit has no more."}
    run_audit(config, out, judges=JUDGES)
    run = load_run(out)
    assert not run.verdict.notes
    assert run.trials == whole.trials and run.records == whole.records and run.is_finished
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"{len(run.trials)} of {len(run.trials)} trials")


def test_a_dry_run_counts_samples_and_is_gone_on_with(home, whole, tmp_path):
    found = run_pilot(config_of(home, 3), tmp_path / "run", judges=JUDGES, progress=False)
    tried = load_run(tmp_path / "run")
    n_test, n_val = len(tried.questions["test"]), len(tried.questions["val"])
    left = [r.spec for r in whole.trials if r.spec.trial_id not in {x.spec.trial_id for x in tried.trials}]
    n_first = sum(2 * (n_test + n_val * (spec.method == "iti")) for spec in left)
    finished = [t for places in group_trials(tried.trials).values() for t in places.values()
                if any(len(r.samples["test"]) == 3 for r in t)]  # fmt: skip
    assert found.n_answers == n_first + 2 * n_test * (11 - len(finished))
    assert audit(config_of(home, 3), tmp_path / "run").trials == whole.trials


def test_controls_that_end_early_have_all_samples(home, tmp_path):
    wider = {"claim": "0.0,1.2", "controls": 12}
    config = merge_config(config_of(home, 3), {"stopping": "curtailed", "level": 0.3, **wider})
    run = audit(config, tmp_path / "run")
    assert run.is_finished and len(run.trials) == run.manifest.planned
    assert any(method.first.ended_early for method in run.verdict.methods.values())
    assert min(len(r.samples["test"]) for r in select(run.records, run.score)["iti"].values()) == 3


# Reading


def test_all_arms_count_as_many_samples_as_the_poorest_chosen_one(whole):
    judged = {
        "truth": {(q.id, a): (p, "") for q in whole.questions["test"] for a, p in ((f"{n}", n / 4) for n in range(4))}
    }
    n, trials = len(whole.questions["test"]), []
    for control, (most, mc1) in enumerate([(3, 0.1), (1, 0.9)]):
        spec = TrialSpec("control", "iti", None, 1.0, 0, "", control)
        samples = {"test": tuple(("1", "2", "3")[i : i + 1] * n for i in range(most))}
        trials.append(TrialRecord(spec, "ok", metrics={"test": {"mc1": mc1}}, questions={"test": {"mc1": (mc1,) * n}},
                                  answers={"test": ("0",) * n}, samples=samples))  # fmt: skip
    assert fewest_samples(trials, "truth_probability", 0.0, {"iti": 1}) == 1
    assert fewest_samples(trials[:1], "truth_probability", 0.0, {"iti": 1}) == 3
    ids = {"test": [q.id for q in whole.questions["test"]]}
    means = [
        add_judgements(trials[0], judged, ids, most).metrics["test"]["truth_probability"] for most in (0, 1, 2, None)
    ]
    assert means == pytest.approx([0, 0.25, 0.375, 0.5])


def test_scores_of_greedy_answers_need_sampled_ones(home):
    assert config_of(home, 1, score="info_truth_greedy").score == "info_truth_greedy"
    for samples, score in ((0, "info_truth_greedy"), (1, "mc1_greedy")):
        with pytest.raises(ConfigError, match=f"score = {score} with evaluation.samples = {samples}"):
            config_of(home, samples, score=score)
