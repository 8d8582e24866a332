"""A trial depends on what all trials share and on its own identity only."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from functools import cache

import pytest
import torch

from locaudit.behaviours.format import Prompt
from locaudit.config import AuditConfig, EvaluationConfig, merge_config
from locaudit.errors import ConfigError
from locaudit.location import Location
from locaudit.measure.activations import collect_activations
from locaudit.measure.drift import DriftText
from locaudit.measure.multiple_choice import METRICS, question_scores
from locaudit.methods.iti import iti_theta
from locaudit.methods.settings import AblateSettings, ITISettings, OptimalSettings
from locaudit.models import wrap_model
from locaudit.records import TrialRecord, TrialSpec
from locaudit.registry import EXECUTORS
from locaudit.run.audit import open_worker, run_audit
from locaudit.run.executors import Local
from locaudit.run.worker import HeldOut, Shared, run_trials, scored_splits
from locaudit.stats.sequential import LEAST
from locaudit.store.cache import Cache
from locaudit.store.folder import read_run
from locaudit.store.run import load_run
from reference.drift import drift
from reference.scoring import forest_log_probs
from reference.training import fit_edit
from runs import small_config
from tiny import heads, make_lm, random_ids, tiny, tokenizer
from toy import PRIMER, QUESTIONS, Job, train, training_data

TRAIN, VAL, TEST = QUESTIONS[:6], QUESTIONS[6:9], QUESTIONS[9:]
CONFIG = AuditConfig(
    methods={"iti": ITISettings(alphas=(2.0, 5.0)), "optimal": OptimalSettings(strengths=(0.2, 0.5), epochs=1)},
    evaluation=EvaluationConfig(drift_documents=3, drift_tokens=12),
)
CLAIM, CONTROL = heads((0, 1), (1, 2)), heads((0, 0), (1, 3))
BASE = TrialSpec("base", "none", None, None, 0, "c")
ITI = [
    TrialSpec("claim", "iti", CLAIM, 2.0, 0, "c"),
    TrialSpec("claim", "iti", CLAIM, 5.0, 0, "c"),
    TrialSpec("control", "iti", CONTROL, 5.0, 0, "c", 0),
]
OPTIMAL = [
    TrialSpec("claim", "optimal", CLAIM, 0.2, 0, "c"),
    TrialSpec("control", "optimal", CONTROL, 0.5, 0, "c", 0),
    TrialSpec("whole", "optimal", Location.whole(), 0.2, 0, "c"),
]


def held_out(model, questions):
    data = training_data(model, questions, PRIMER)
    return HeldOut(tuple(questions), data.forest, data.reference)


def shared_of(config=CONFIG, test=TEST, model=None):
    model = model or tiny("llama")
    return Shared(
        model,
        config,
        training_data(model, TRAIN),
        {"val": held_out(model, VAL), "test": held_out(model, test)},
        DriftText(random_ids(3, 12)),
        Cache(),
        Prompt(),
        {"iti": {"theta": iti_theta(collect_activations(model, TRAIN))}},
    )


@pytest.fixture(scope="module")
def shared():
    return shared_of()


@cache
def records(method: str) -> tuple[TrialRecord, ...]:
    specs = {"iti": ITI, "optimal": OPTIMAL, "none": [BASE]}[method]
    return tuple(record for record, _ in run_trials(shared_of(), specs))


def assert_close(one: TrialRecord, two: TrialRecord, tolerance=1e-4):
    """Equal but for rounding."""
    assert (one.spec, one.status, one.message, one.edit) == (two.spec, two.status, two.message, two.edit)
    for get in (lambda r: r.metrics, lambda r: r.questions, lambda r: {"drift": r.drift}):
        x, y = get(one), get(two)
        assert x.keys() == y.keys()
        for key in x:
            assert x[key].keys() == y[key].keys()
            for name in x[key]:
                assert x[key][name] == pytest.approx(y[key][name], rel=tolerance, abs=tolerance), (key, name)
    assert one.training.keys() == two.training.keys()
    for key in one.training:
        assert one.training[key] == pytest.approx(two.training[key], rel=tolerance)


def texts(results) -> list[str]:
    """The records as JSON, every digit of them; a number that is not finite raises."""
    plain = [asdict(record) | {"seconds": {}} for record, _ in results]  # times differ
    return [json.dumps(record, sort_keys=True, allow_nan=False, default=dict) for record in plain]


# Pure


@pytest.mark.parametrize("specs", [[BASE], ITI, OPTIMAL], ids=["base", "iti", "optimal"])
def test_the_same_trial_gives_the_same_record(specs):
    """To the last digit: with the same shared values, with new ones, and whatever the global random state."""
    shared = shared_of()
    first = texts(run_trials(shared, specs))
    torch_state, python_state = torch.random.get_rng_state(), random.getstate()
    again = texts(run_trials(shared, specs))
    assert torch.equal(torch.random.get_rng_state(), torch_state) and random.getstate() == python_state
    torch.rand(3), random.random()
    anew = texts(run_trials(shared_of(), specs))
    assert first == again == anew


def test_what_ran_before_does_not_matter():
    """Other trials, banks of other sizes and the base before it leave no trace in a record."""
    shared = shared_of()
    for specs in ([BASE], ITI[:1], OPTIMAL, ITI):
        run_trials(shared, specs)
    for specs in (ITI, OPTIMAL, [BASE], ITI[:1]):
        fresh = texts(run_trials(shared_of(), specs))
        assert texts(run_trials(shared, specs)) == fresh


def test_the_number_of_threads_moves_scores_by_less_than_1e_4_nats():
    """In float32, with what trials share computed anew."""
    lm = make_lm("llama", hidden_size=128, intermediate_size=512, vocab_size=1024)
    before, found = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(run_trials(shared_of(model=wrap_model(lm, tokenizer())), [BASE, ITI[0], OPTIMAL[0]]))
    finally:
        torch.set_num_threads(before)
    for (one, _), (two, _) in zip(*found, strict=True):
        for split, scores in one.questions.items():
            for name, values in scores.items():
                assert two.questions[split][name] == pytest.approx(values, rel=0, abs=1e-4), (one.spec, split, name)


@pytest.mark.parametrize("specs", [ITI, OPTIMAL], ids=["iti", "optimal"])
def test_order_and_company_do_not_matter(shared, specs):
    together = records(specs[0].method)
    for got, expected in zip(run_trials(shared, specs[::-1])[::-1], together, strict=True):
        assert_close(got[0], expected)
    for spec, expected in zip(specs, together, strict=True):
        ((alone, _),) = run_trials(shared, [spec])
        assert_close(alone, expected)


@pytest.mark.parametrize("specs", [ITI, OPTIMAL], ids=["iti", "optimal"])
def test_test_questions_do_not_shape_the_edit(shared, specs):
    other = shared_of(test=VAL)
    for (one, edit), (two, same) in zip(run_trials(shared, specs), run_trials(other, specs), strict=True):
        for site, e in edit.sites.items():
            assert torch.equal(e.a, same.sites[site].a) and torch.equal(e.b, same.sites[site].b)
        assert one.metrics["val"] == two.metrics["val"] != one.metrics["test"]
        assert two.metrics["test"] == pytest.approx(two.metrics["val"], abs=1e-4)


def test_claim_and_control_start_alike(shared):
    """The location does not enter the seed: they differ in the location alone."""
    claim, control = OPTIMAL[0], replace(OPTIMAL[1], hyperparameter=0.2)
    assert claim.rng_seed == control.rng_seed
    assert claim.trial_id != control.trial_id
    slow = replace(CONFIG.methods["optimal"], learning_rate=1e-30)
    frozen = replace(shared, config=replace(CONFIG, methods={"optimal": slow}))
    (one, _), (two, _) = run_trials(frozen, [claim, control])
    assert one.training["loss"] == pytest.approx(two.training["loss"], rel=1e-5)


class Elsewhere(Local):
    """Runs trials by a worker made from the run folder alone."""

    def map(self, worker, folder, groups):
        return super().map(open_worker(folder), folder, groups)


def test_a_worker_made_from_the_run_folder_gives_the_same_trials(tmp_path):
    """Numbers and edits to the last bit."""
    config, found = small_config(tmp_path, evaluation={"bank_size": 3}), []
    with EXECUTORS.temporary("elsewhere", Elsewhere):
        for executor in ("local", "elsewhere"):
            run_audit(replace(config, executor=executor), tmp_path / executor, progress=False)
            with read_run(tmp_path / executor) as store:
                edits = {path.name: path.read_bytes() for path in store.edits.iterdir()}
                found.append((texts((record, None) for record in store.records()), edits))
    assert found[0] == found[1]
    assert len(found[0][0]) == 9 and len(found[0][1]) == 8


class Together(Local):
    """Takes three groups before it runs them, the last one first."""

    def map(self, worker, folder, groups):
        taken, groups = [], iter(groups)
        while True:
            while len(taken) < 3 and (group := next(groups, "over")) not in (None, "over"):
                taken.append(group)
            if not taken:
                return
            yield from super().map(worker, folder, [taken.pop()])


def test_groups_that_run_at_once_give_the_same_trials(tmp_path):
    """Whatever the order of their results; a place of two nulls is run once, and every bank is the same."""
    changes = {
        "nulls": ["anywhere", "layers"],
        "controls": 12,
        "widen": 2,
        "evaluation": {"samples": 3, "bank_size": 4},
    }
    changes["methods"] = {"iti": {"alphas": [1.0, 3.0]}, "optimal": {"strengths": [0.2, 0.5], "epochs": 1}}
    config, found = merge_config(small_config(tmp_path, claim="0.1,1.2"), changes), []
    with EXECUTORS.temporary("together", Together):
        for executor in ("local", "together"):
            run_audit(replace(config, executor=executor), tmp_path / executor, progress=False)
            with read_run(tmp_path / executor) as store:
                edits = {path.name: path.read_bytes() for path in store.edits.iterdir()}
                found.append((texts((record, None) for record in store.records()), edits))
    assert found[0] == found[1]
    assert len(found[0][1]) < len(found[0][0])  # shared places have one edit
    assert load_run(tmp_path / "together").is_finished


class Greedy(Local):
    """Takes every group that it can have before it runs one."""

    def map(self, worker, folder, groups):
        taken, groups = [], iter(groups)
        while True:
            while (group := next(groups, "over")) not in (None, "over"):
                taken.append(group)
            if not taken:
                return
            yield from super().map(worker, folder, [taken.pop(0)])


def test_controls_that_may_end_early_wait_for_results(tmp_path):
    """However many groups could run at once: never more controls ahead than were counted, or `LEAST`."""
    config = small_config(tmp_path, controls=39, level=0.3, methods=["iti"], stopping="curtailed")
    with EXECUTORS.temporary("greedy", Greedy):
        run_audit(replace(config, executor="greedy"), tmp_path / "run", progress=False)
    run = load_run(tmp_path / "run")
    (null,) = run.verdict.methods["iti"].nulls.values()
    assert null.ended_early and LEAST <= null.n_used < len(null.controls) < 2 * null.n_used and run.is_finished


# What is in a record


def test_the_base_record_has_no_reward(shared):
    ((record, edit),) = run_trials(shared, [BASE])
    assert edit is None and record.edit == "" and record.status == "ok" and not record.training
    assert record.metrics.keys() == {"val", "test"}
    for metrics in record.metrics.values():
        assert (metrics["reward_accuracy"], metrics["reward_margin"]) == (0.5, 0.0)
    assert record.drift["kl"] == 0.0
    assert record.drift["ce"] == pytest.approx(drift(shared.model, shared.drift.documents, None)["ce"], rel=1e-5)


@pytest.mark.parametrize("specs", [ITI, OPTIMAL], ids=["iti", "optimal"])
def test_a_record_holds_the_scores_of_its_edit(shared, specs):
    """Every number, from the edit that came with it, by the slow twins."""
    for record, edit in run_trials(shared, specs):
        assert record.status == "ok" and record.message == ""
        assert record.edit == record.spec.edit_file
        for name, held in shared.splits.items():
            sums = forest_log_probs(shared.model, held.forest, edit)
            rows, aim = zip(held.questions, sums, held.reference, strict=True), shared.config.ipo_aim
            expected = [question_scores(*row, aim=aim) for row in rows]
            own = METRICS if aim is None else (*METRICS, "ipo_score")
            assert record.questions[name].keys() == record.metrics[name].keys() == set(own)
            for metric in own:
                values = [row[metric] for row in expected]
                assert record.questions[name][metric] == pytest.approx(values, abs=1e-4)
                assert record.metrics[name][metric] == pytest.approx(sum(values) / len(values), abs=1e-4)
            assert record.metrics[name]["reward_margin"] != 0
        assert record.drift == pytest.approx(drift(shared.model, shared.drift.documents, edit), rel=1e-4, abs=1e-6)
        assert record.drift["kl"] > 0


def test_the_ipo_score_is_the_share_of_the_loss_at_the_one_tau():
    """Measured for every edit of a run with one tau; 0 without an edit."""
    config = replace(CONFIG, methods={"iti": ITISettings(), "optimal": OptimalSettings(strengths=(0.1,), epochs=1)})
    shared = shared_of(config)
    for record, edit in run_trials(shared, [BASE, ITI[0], replace(OPTIMAL[0], hyperparameter=0.1)]):
        for name in record.questions:  # with one strength, only the test questions
            held = shared.splits[name]
            sums = forest_log_probs(shared.model, held.forest, edit)
            rows = zip(held.questions, sums, held.reference, strict=True)
            expected = [question_scores(*row, aim=5.0)["ipo_score"] for row in rows]
            assert record.questions[name]["ipo_score"] == pytest.approx(expected, abs=1e-4)
            assert (record.metrics[name]["ipo_score"] == 0) == (record.spec.arm == "base")


def test_where_the_ipo_score_has_no_meaning_it_is_refused():
    one, tenth = OptimalSettings(strengths=(0.1,)), {"optimal": OptimalSettings(strengths=(0.05,))}
    assert replace(CONFIG, methods={"optimal": one}, score="ipo_score").ipo_aim == 5
    assert replace(CONFIG, methods=tenth).ipo_aim == 10
    for methods in (
        {"optimal": OptimalSettings(strengths=(0.05, 0.1))},
        {"optimal": OptimalSettings(strengths=(0.2,))},
        {"optimal": OptimalSettings(strengths=(0.1,), reduction="mean")},
        {"optimal": OptimalSettings(strengths=(0.1,), objective="dpo")},
        {"optimal": one, "ablate": AblateSettings()},
        {"iti": ITISettings()},
    ):
        assert replace(CONFIG, methods=methods).ipo_aim is None
        with pytest.raises(ConfigError, match=r"ipo_score with the methods .*one tau of at most 0.1.*no ablation"):
            replace(CONFIG, methods=methods, score="ipo_score")


def test_an_iti_trial_is_its_edit(shared):
    theta = shared.prepared["iti"]["theta"]
    for record, edit in run_trials(shared, ITI):
        masks = shared.model.subspaces(record.spec.location)
        assert edit.positions == "answer" and edit.sites.keys() == masks.keys()
        for site, mask in masks.items():
            assert edit.sites[site].c == record.spec.hyperparameter
            assert torch.equal(edit.sites[site].b[:, 0], torch.where(mask, theta[site.layer].flatten(), 0.0))
        assert record.training == {}


def test_an_optimal_trial_is_its_training(shared):
    """The record's losses are those of `train`, and of the slow twin, at the trial's own seed."""
    settings = replace(
        CONFIG.methods["optimal"], reader="location", batching="pair", batch_size=5, learning_rate=4e-3, bank_size=2
    )
    shared = replace(shared, config=replace(CONFIG, methods={"optimal": settings}))
    told = []
    results = run_trials(shared, OPTIMAL[:2], on_step=lambda *x: told.append(x))
    jobs = [Job(s.location, s.hyperparameter, s.rng_seed, 4e-3) for s in OPTIMAL[:2]]
    options = {"reader": "location", "batching": "pair", "batch_size": 5, "epochs": 1}
    for (record, edit), job, fit in zip(
        results, jobs, train(shared.model, shared.training, jobs, **options), strict=True
    ):
        # one epoch, so that its mean loss is the objective
        assert record.training.keys() == {"loss", "objective"} and record.training["loss"] == fit.losses
        assert record.training["objective"] == (pytest.approx(sum(fit.losses) / len(fit.losses)),)
        for site, e in edit.sites.items():
            assert torch.equal(e.b, fit.edit.sites[site].b)
        _, losses = fit_edit(shared.model, shared.training, job, **options)
        assert fit.losses == pytest.approx(losses, rel=1e-4)
    assert told == [(i + 1, len(losses)) for i in range(len(losses))]


def test_validation_is_scored_where_there_is_a_choice(shared):
    single = replace(CONFIG, methods={**CONFIG.methods, "iti": replace(CONFIG.methods["iti"], alphas=(5.0,))})
    for spec in (BASE, ITI[1], OPTIMAL[0]):
        assert scored_splits(CONFIG, spec) == ("val", "test")
    assert scored_splits(single, ITI[1]) == ("test",)
    assert scored_splits(single, OPTIMAL[0]) == scored_splits(single, BASE) == ("val", "test")
    ((record, _),) = run_trials(replace(shared, config=single), ITI[1:2])
    assert record.metrics.keys() == record.questions.keys() == {"test"}
    both = records("iti")[1]
    assert record.metrics["test"] == pytest.approx(both.metrics["test"], rel=1e-4, abs=1e-4)


# Divergence


def assert_diverged(record, edit, message):
    assert edit is None
    assert record.status == "diverged" and message in record.message
    assert not record.metrics and not record.drift and not record.questions and record.edit == ""


def test_a_diverged_training_becomes_a_record(shared):
    """Alone, and next to one that goes on."""
    wild = replace(OPTIMAL[0], hyperparameter=1e-30)
    ((record, edit),) = run_trials(shared, [wild])
    assert_diverged(record, edit, "loss inf")
    for specs in ([wild, OPTIMAL[1]], [OPTIMAL[1], wild]):
        found = {record.spec: (record, edit) for record, edit in run_trials(shared, specs)}
        assert [record.spec for record, _ in run_trials(shared, specs)] == specs
        assert_diverged(*found[wild], "loss inf")
        assert_close(found[OPTIMAL[1]][0], records("optimal")[1])


def test_scores_that_are_not_finite_become_a_record(shared):
    """A finite edit under which the model overflows."""
    wild = replace(ITI[0], hyperparameter=1e38)
    huge = replace(shared, prepared={"iti": {"theta": 100 * shared.prepared["iti"]["theta"]}})
    ((record, edit),) = run_trials(huge, [wild])
    assert_diverged(record, edit, "scores under the edit are not finite")
    (broken, none), (fine, kept) = run_trials(huge, [wild, ITI[1]])
    assert_diverged(broken, none, "not finite")
    ((alone, _),) = run_trials(huge, [ITI[1]])
    assert kept is not None
    assert_close(fine, alone)
