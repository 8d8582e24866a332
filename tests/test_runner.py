from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from contextlib import nullcontext
from datetime import date, datetime
from itertools import combinations
from pathlib import Path

import pandas
import pytest
import torch
from tqdm.std import tqdm
from transformers.utils import logging

from locaudit import AuditConfig, PaperConfig, audit, cli, fit_iti, fit_probes, read_result, stack
from locaudit.api import _called
from locaudit.behaviours import format as prompts
from locaudit.behaviours import load_behaviour
from locaudit.claims import parse_location
from locaudit.cli import status as status_command
from locaudit.config import load_config, merge_config, to_yaml
from locaudit.edits import load_edit
from locaudit.errors import ConfigError, DataError, LocationError, ModelError, RunFolderError
from locaudit.models import load_model, wrap_model
from locaudit.models.quiet import quiet_libraries
from locaudit.records import TrialSpec
from locaudit.report import write_report
from locaudit.run import subject
from locaudit.run.audit import draw_controls, run_audit
from locaudit.run.pilot import run_pilot
from locaudit.run.plan import build_plan
from locaudit.run.prepare import end_branches, plant_questions, probing_settings
from locaudit.run.status import Meter, Pace, describe_seconds, show_progress
from locaudit.run.stopping import Stopping
from locaudit.run.subject import read_inputs
from locaudit.stats.selection import group_trials
from locaudit.stats.sequential import LEAST
from locaudit.store.folder import read_run
from locaudit.store.news import read_news
from locaudit.store.run import load_run
from runs import HashJudge, save_behaviour, save_model, small_config, stopped_at
from tiny import CHAT, chat_tokenizer, heads


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("inputs")


@pytest.fixture(scope="module")
def finished(home) -> Path:
    """A finished audit with two values in each grid."""
    out = home / "finished"
    config = small_config(home, iti={"alphas": [1.0, 4.0]}, optimal={"strengths": [0.1, 0.4]})
    run_audit(config, out, progress=False)
    return out


@pytest.fixture(scope="module")
def plain(home) -> Path:
    """A finished audit as `small_config` has it."""
    run_audit(small_config(home), home / "plain", progress=False)
    return home / "plain"


def dump(folder: Path) -> dict[str, list]:
    """Everything a run recorded, clocks and machine facts aside."""
    with sqlite3.connect(folder / "trials.sqlite") as connection:
        out = {
            name: sorted(connection.execute(f"SELECT * FROM {name}"), key=repr)
            for name in ("fits", "places", "scores", "answers", "judgements", "questions")
        }
    connection.close()
    out["fits"] = [fit[:-1] for fit in out["fits"]]  # the last column is its seconds
    for name in ("edits", "cache"):  # a kill may leave a part of a temporary file, which has a name of its own
        files = sorted(path for path in (folder / name).iterdir() if not path.name.endswith(".tmp"))
        out[name] = [(path.name, path.read_bytes()) for path in files]
    return out


def test_plan_has_every_trial_once(finished):
    run = load_run(finished)
    records, planned = run.trials, run.manifest.planned
    places = {(r.spec.method, r.spec.arm, r.spec.control, r.spec.hyperparameter) for r in records}
    arms = [("claim", -1), ("whole", -1), ("control", 0), ("control", 1)]
    expected = {("iti", *arm, alpha) for arm in arms for alpha in (1.0, 4.0)}
    expected |= {("optimal", *arm, tau) for arm in arms for tau in (0.1, 0.4)}
    expected |= {("none", "base", -1, None)}
    assert places == expected
    assert len(records) == planned == len(expected)


def test_a_run_folder_holds_what_it_promises(finished):
    with read_run(finished) as store:
        records, config = store.records(), store.config
        assert load_config(finished / "config.yaml") == config
        assert set(store.seconds()) == {r.spec.trial_id for r in records}
        for record in records:
            assert record.status == "ok"
            assert set(record.metrics) == {"val", "test"}
            if record.edit:
                assert load_edit(store.edits / record.edit).is_finite
    with sqlite3.connect(finished / "trials.sqlite") as connection:
        n_scores = connection.execute("SELECT sum(length(packed)) / 8 FROM scores").fetchone()[0]
    connection.close()
    assert n_scores == sum(len(v) for r in records for m in r.questions.values() for v in m.values())


def test_resuming_a_finished_run_changes_nothing(finished, home):
    before = dump(finished)
    run_audit(load_config(finished / "config.yaml"), finished, progress=False)
    assert dump(finished) == before


def test_running_twice_gives_the_same_bytes(home, plain, tmp_path):
    run_audit(small_config(home), tmp_path / "again", progress=False)
    assert dump(tmp_path / "again") == dump(plain)


def test_an_error_in_the_middle_keeps_finished_trials(home, plain, tmp_path):
    config = small_config(home)
    with stopped_at(5, OSError(28, "No space left on device")):
        run_audit(config, tmp_path / "a", progress=False)
    with read_run(tmp_path / "a") as store:
        assert len(store.records()) == 4
    run_audit(config, tmp_path / "a", progress=False)
    assert dump(tmp_path / "a") == dump(plain)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_kill_at_ten_moments_then_resume(home, tmp_path):
    config, rng = small_config(home, controls=4), random.Random(0)
    started = time.monotonic()
    run_audit(config, tmp_path / "whole", progress=False)
    length = time.monotonic() - started
    kills = 0
    for _ in range(10):
        child = os.fork()
        if child == 0:
            run_audit(config, tmp_path / "killed", progress=False)
            os._exit(0)
        # A tenth of the run on average, so that the kills fall on preparation and on all kinds of trials.
        time.sleep(rng.uniform(0.02, 0.25) * length)
        os.kill(child, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    run_audit(config, tmp_path / "killed", progress=False)
    assert kills >= 8
    assert dump(tmp_path / "killed") == dump(tmp_path / "whole")


def test_banked_trials_agree_with_single_ones(home, tmp_path):
    for size in (1, 3):
        run_audit(
            small_config(home, optimal={"bank_size": size, "strengths": [0.1, 0.4]}),
            tmp_path / str(size),
            progress=False,
        )
    one, three = (by_place(tmp_path / str(size)) for size in (1, 3))
    assert one.keys() == three.keys()
    for place in one:
        for metric in ("mc2", "reward_margin"):  # the others jump where two answers are nearly tied
            value = one[place].metrics["test"][metric]
            assert three[place].metrics["test"][metric] == pytest.approx(value, abs=0.02), (place, metric)


def by_place(folder: Path):
    with read_run(folder) as store:
        return {(r.spec.method, r.spec.arm, r.spec.control, r.spec.hyperparameter): r for r in store.records()}


def test_more_controls_keep_the_ids_of_the_first(home, llama):
    config = small_config(home)
    claim, contexts = parse_location("0.1,1.2"), {"none": "n", "iti": "i", "optimal": "o"}

    def plan(config):
        drawn = draw_controls(config, llama.shape, claim)[0]
        places = {null: controls.locations for null, controls in drawn.items()}
        return build_plan(config, llama.shape, claim, places, contexts, (1, 1))

    few, many = map(plan, (config, dataclasses.replace(config, controls=5)))
    ids = [{spec.trial_id for group in plan for spec in group} for plan in (few, many)]
    assert ids[0] < ids[1]
    # Controls that may end early end for all methods at once, so that methods take turns.
    turns = plan(dataclasses.replace(config, controls=5, stopping="curtailed"))
    assert {spec for group in turns for spec in group} == {spec for group in many for spec in group}
    controls = [(group[0].control, group[0].method) for group in turns if group[0].arm == "control"]
    assert controls == [(number, method) for number in range(5) for method in config.methods]


def test_rng_seed_ignores_the_location():
    a = TrialSpec("claim", "optimal", heads((0, 1)), 0.2, 0, "c")
    b = dataclasses.replace(a, arm="control", location=heads((1, 1)), control=3)
    assert a.rng_seed == b.rng_seed
    assert a.trial_id != b.trial_id
    assert a.rng_seed != dataclasses.replace(a, seed=1).rng_seed


def test_other_weights_under_the_same_name_are_refused(home, tmp_path):
    config = small_config(tmp_path)
    run_audit(config, tmp_path / "run", progress=False)
    save_model(tmp_path / "model", seed=5)
    with pytest.raises(RunFolderError, match="other model weights, questions"):
        run_audit(config, tmp_path / "run", progress=False)


def test_other_questions_under_the_same_name_are_refused(tmp_path):
    config = small_config(tmp_path)
    run_audit(config, tmp_path / "run", progress=False)
    save_behaviour(tmp_path / "questions.jsonl", shift=1)
    with pytest.raises(RunFolderError, match="other model weights, questions"):
        run_audit(config, tmp_path / "run", progress=False)


def test_a_claim_outside_the_model_names_its_shape(home, tmp_path):
    with pytest.raises(LocationError, match=r"9\.0.*layers 0-1 and heads 0-3"):
        run_audit(small_config(home, claim="9.0"), tmp_path / "run", progress=False)


def test_a_claim_file_that_changed_is_another_claim(home, tmp_path):
    claim = tmp_path / "claim.csv"
    claim.write_text("layer,head\n0,1\n")
    config = small_config(home, claim=str(claim), methods=["iti"])
    run_audit(config, tmp_path / "run", progress=False)
    run_audit(config, tmp_path / "run", progress=False)
    claim.write_text("layer,head\n1,1\n")
    with pytest.raises(RunFolderError, match=r"claim: 0\.1 there, 1\.1 here"):
        run_audit(config, tmp_path / "run", progress=False)


def test_neuron_claims_run(home, tmp_path):
    run_audit(small_config(home, claim="neurons:0.3,1.17", whole_model=False), tmp_path / "run", progress=False)
    trials = load_run(tmp_path / "run").trials
    assert all(r.status == "ok" for r in trials)
    assert {r.spec.location.kind for r in trials if r.edit} == {"neuron"}


def test_pairs_primer_in_training_and_other_readers_run(home, tmp_path):
    primer = tmp_path / "primer.txt"
    primer.write_text("Q: Is 1 more than 2?\nA: No.")
    config = small_config(
        home,
        prompt={"primer": str(primer), "primer_in_training": True, "eos_in_training": True},
        optimal={"batching": "pair", "reader": "location", "objective": "dpo", "reduction": "mean"},
        probe={"context": "answer"},
        iti={"direction": "probe", "positions": "all"},
        nulls=["layers"],
    )
    run_audit(config, tmp_path / "run", progress=False)
    with read_run(tmp_path / "run") as store:
        assert len(store.records()) == 9


def test_training_answers_end_with_eos_if_asked(home, tmp_path):
    """Only the answers that edits are trained on, as in TRL's trainers; the scored ones stay as they are."""
    model, plain = load_model(home / "model"), small_config(home)
    forests = [
        plant_questions(read_inputs(merge_config(plain, {"prompt": {"eos_in_training": eos}})), model)
        for eos in (False, True)
    ]
    eos = model.tokenizer.eos_token_id
    assert forests[0].held_out == forests[1].held_out
    for before, after in zip(forests[0].train.trees, forests[1].train.trees, strict=True):
        assert after.prompt == before.prompt
        assert after.branches == tuple((*branch, eos) for branch in before.branches)
    model.tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="has no end-of-sequence token"):
        end_branches(forests[0].train, model)


def test_a_run_probes_and_trains_in_its_style(tmp_path):
    """Style is part of every fit's identity, and ITI's directions come from other texts."""
    config = small_config(tmp_path, claim="0.1,1.2", whole_model=False)
    chat_tokenizer().save_pretrained(config.model)
    for style in ("qa", "completion"):
        settings = probing_settings(merge_config(config, {"prompt": {"style": style}}))
        assert settings == ["next_question", 0, style, "by question"]
    chat = {"style": "chat", "template": {"a": 1}, "date": "2026-01-31"}
    assert probing_settings(merge_config(config, {"prompt": chat})) == [
        "next_question", 0, "turns", {"a": 1}, "2026-01-31", "by question",
    ]  # fmt: skip
    edits, contexts = {}, {}
    for style in ("qa", "chat", "completion"):
        run_audit(merge_config(config, {"prompt": {"style": style}}), tmp_path / style, progress=False)
        with read_run(tmp_path / style) as store:
            contexts[style] = store.contexts()
            (record,) = (r for r in store.records() if (r.spec.arm, r.spec.method) == ("claim", "iti"))
            edits[style] = load_edit(store.edits / record.edit)
        assert f"no primer; style {style}" in write_report(tmp_path / style).read_text()
    for a, b in combinations(edits, 2):
        assert len(contexts[a] & contexts[b]) == 1, "the unedited model's alone"
        assert all(not torch.allclose(site.b, edits[b].sites[name].b) for name, site in edits[a].sites.items())


def set_clock(patch, day: str) -> None:
    """The clocks of locaudit and of transformers' chat templates."""

    class Clock(datetime):
        @classmethod
        def today(cls):
            return cls.fromisoformat(day)

        @classmethod
        def now(cls, tz=None):
            return cls.fromisoformat(day)

    patch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
    for module in (subject, prompts):
        patch.setattr(module, "date", type("Day", (date,), {"today": classmethod(lambda _: date.fromisoformat(day))}))


DATED = {
    "a default": "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '1 Jan' %}{% endif %}{% endif %}"
    "<bos>system\nToday is {{ date_string }}<end>\n",
    "a clock": "<bos>system\nIt is {{ strftime_now('%A, %B %-d, %Y') }}<end>\n",
}


@pytest.mark.parametrize("before", DATED.values(), ids=DATED)
def test_a_prompt_keeps_its_date_when_a_run_is_resumed_later(tmp_path, monkeypatch, before):
    config = small_config(tmp_path, claim="0.1,1.2", prompt={"style": "chat"}, whole_model=False)
    chat_tokenizer(before + CHAT).save_pretrained(config.model)
    for name, days in {"first": ["2026-01-31"], "both": ["2026-01-31", "2026-02-01"], "second": ["2026-02-01"]}.items():
        for number, day in enumerate(days, start=1):
            set_clock(monkeypatch, day)
            with stopped_at(3) if number < len(days) else nullcontext():
                run_audit(config, tmp_path / name, progress=False)
    assert dump(tmp_path / "both") == dump(tmp_path / "first")
    first, both, second = (load_run(tmp_path / name) for name in ("first", "both", "second"))
    assert both.config == first.config and both.config.prompt.date == "2026-01-31"
    assert both.manifest.prompt_date == "2026-01-31" and both.manifest.prompt_end == first.manifest.prompt_end
    assert [r.metrics for r in first.trials] != [r.metrics for r in second.trials], "the date matters"
    page = write_report(tmp_path / "both").read_text()
    assert "<bos>assistant\\n</code>".replace("<", "&lt;", 1).replace("bos>", "bos&gt;") in page
    assert "it was given 2026-01-31" in page
    monkeypatch.undo()
    later = merge_config(config, {"prompt": {"date": "2026-02-01"}})
    with pytest.raises(RunFolderError, match="prompt.date: 2026-01-31 there, 2026-02-01 here"):
        run_audit(later, tmp_path / "both", progress=False)


def test_the_date_is_settled_where_it_may_matter(home, tmp_path, monkeypatch):
    """In style ``qa`` no date is printed: runs of two days have equal bytes. Repeats and studies have one date."""
    set_clock(monkeypatch, "2026-01-31")
    config = small_config(home)
    chat = merge_config(config, {"prompt": {"style": "chat"}})
    assert read_inputs(config, out=tmp_path).config.prompt.date == "auto"
    inputs = read_inputs(chat, out=tmp_path)
    assert inputs.config.prompt.date == inputs.scoring.date == inputs.training.date == "2026-01-31"
    named = merge_config(chat, {"prompt": {"date": "2025-12-24"}})
    assert read_inputs(named, out=tmp_path).scoring.date == "2025-12-24"
    (tmp_path / "config.yaml").write_text(to_yaml(named))
    assert read_inputs(chat, out=tmp_path).scoring.date == "2025-12-24"
    (tmp_path / "config.yaml").write_text("damaged: [")
    assert read_inputs(chat, out=tmp_path).scoring.date == "2026-01-31"


def test_what_users_hold_prints_in_a_few_lines(home):
    config = small_config(home)
    model, behaviour = load_model(config.model, device="cpu"), load_behaviour(config.behaviour)
    probes = fit_probes(model, behaviour)
    iti = fit_iti(model, behaviour, "0.1,1.2")
    bank = stack(model, [iti, iti])
    site = next(iter(iti.sites))
    assert repr(model) == f"Model('{config.model}': llama, 2 layers x 4 heads, float32 on cpu)"
    assert repr(behaviour) == "Behaviour('questions': 16 questions, judged for truth, info)"
    assert repr(iti) == "Edit(rank 1 at heads of layer 0, heads of layer 1; answer tokens)"
    assert repr(bank) == "EditBank(2 edits at 2 sites)"
    assert repr(iti.sites[site]) == f"SiteEdit(rank 1, {model.width(site)} coordinates)"
    assert (
        repr(merge_config(AuditConfig(), {"controls": 3, "split": {"seed": 1}}))
        == "AuditConfig(controls=3, split.seed=1)"
    )
    for thing in (probes, bank.sites[site], behaviour.questions[0], config, PaperConfig(), probes.top(2)):
        assert len(repr(thing)) < 700 and "tensor(" not in repr(thing), type(thing)


CALLS = """
import sys
from tqdm import tqdm
from locaudit import audit, fit_iti, fit_optimal, fit_probes, load_behaviour, load_model
folder, out = sys.argv[1], sys.argv[2]
for progress in (False, True):
    model, behaviour = load_model(folder + "/model", device="cpu"), load_behaviour(folder + "/questions.jsonl")
    claim = fit_probes(model, behaviour).top(2)
    fit_iti(model, behaviour, claim), fit_optimal(model, behaviour, claim, epochs=1)
    audit(model, behaviour, claim=claim, controls=1, out=f"{out}-{progress}", progress=progress, rest=False, placebos=0,
          judges={}, nulls=["anywhere"], prompt={"primer": "none"}, methods={"iti": {"alphas": [2.0]}},
          evaluation={"drift_documents": 2, "drift_tokens": 8, "max_new_tokens": 6})
    print([*tqdm([1], desc="mine")])
"""


def test_python_calls_print_our_lines_only(home, tmp_path):
    small_config(home)
    hidden = ("TQDM_DISABLE", "TRANSFORMERS_VERBOSITY")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    command = [sys.executable, "-c", CALLS, str(home), str(tmp_path / "run")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert ran.stdout == "[1]\n" * 2
    silent, ours, _ = re.split(r"(?:mine:.*\n)+", ran.stderr)  # where the user's own bars are shown
    assert not silent.strip() and any("4 trials" in line for line in ours.splitlines())
    assert not re.search(r"it/s|%\||[Ww]arning|Loading weights", ours), ours


def test_other_libraries_are_quiet_inside_and_as_before_after(capsys):
    before = (logging.get_verbosity(), vars(tqdm)["__init__"], warnings.filters[:])
    warn = "import warnings\nwarnings.warn('from a library', FutureWarning, stacklevel=1)"
    with warnings.catch_warnings():
        warnings.resetwarnings()
        with quiet_libraries():
            assert [*tqdm([1, 2])] == [1, 2] and logging.get_verbosity() == logging.ERROR
            exec(compile(warn, "x.py", "exec"), {"__name__": "torch.nn"})
            with pytest.warns(FutureWarning):
                exec(compile(warn, "x.py", "exec"), {"__name__": "mine"})
        with pytest.raises(FutureWarning), quiet_libraries():  # who asks for errors gets them
            warnings.simplefilter("error")
            exec(compile(warn, "x.py", "exec"), {"__name__": "torch.nn"})
    assert capsys.readouterr() == ("", "")
    assert (logging.get_verbosity(), vars(tqdm)["__init__"], warnings.filters) == before


def test_audit_from_python(home, tmp_path):
    model = load_model(small_config(home).model, device="cpu")
    behaviour = load_behaviour(small_config(home).behaviour)
    result = audit(
        model,
        behaviour,
        claim=[(0, 1), (1, 2)],
        controls=2,
        out=tmp_path / "run",
        progress=False,
        prompt={"primer": "none"},
        methods={"iti": {"alphas": (2.0,)}, "optimal": {"strengths": [0.2], "epochs": 2}},
        evaluation={"drift_documents": 2, "drift_tokens": 8, "max_new_tokens": 6},
        judges={"truth": HashJudge("truth"), "info": HashJudge("info")},
    )
    assert result.report.is_file()
    assert result.verdict.claim == "0.1,1.2"
    assert result.verdict.score == "info_truth_probability"
    assert {v.outcome for v in result.verdict.methods.values()} <= {"NO GAIN SHOWN", "CANNOT TELL"}
    assert json.loads((tmp_path / "run" / "verdict.json").read_text())["headline"] == result.verdict.headline


def test_a_run_of_rows_from_python_runs_again_from_its_settings(home, tmp_path):
    """Also with a style, columns of other names and no judges, which come from the rows' format."""
    given = small_config(home)
    rows = [{"q": f"Say {i}:", "chosen": f"one {i}", "rejected": f"{i} two"} for i in range(16)]
    settings = {
        **{name: getattr(given, name) for name in ("nulls", "rest", "placebos", "widen", "evaluation")},
        "controls": 2,
        "behaviour_columns": {"prompt": "q"},
        "methods": {"optimal": {"strengths": [0.2], "epochs": 2, "bank_size": 1}},
        "progress": False,
    }
    datasets = pytest.importorskip("datasets")
    sources, results = [rows, pandas.DataFrame(rows), datasets.Dataset.from_list(rows)], []
    configs = set()
    for number, source in enumerate(sources):
        folder = tmp_path / f"run-{number}"
        made = audit(given.model, source, claim={0: [1], 1: [2]}, out=folder, **settings)
        config = load_config(folder / "config.yaml")
        assert config.behaviour == str(folder / "behaviour.json") and config.claim == "0.1,1.2"
        behaviour = load_behaviour(config.behaviour)
        assert behaviour == load_behaviour(source, columns={"prompt": "q"}) and behaviour.style == "completion"
        results.append(read_result(folder))
        assert results[-1].verdict == made.verdict
        configs.add(to_yaml(dataclasses.replace(config, behaviour="")))
    assert len(configs) == 1
    run_audit(config, tmp_path / "again", progress=False)
    for result in results:
        pandas.testing.assert_frame_equal(result.scores(), read_result(tmp_path / "again").scores())
    audit(given.model, rows, claim="0.1,1.2", out=tmp_path / "run-0", **settings | {"controls": 3})  # it can grow
    for content, message in (
        ('{\n "locaudit": "behaviour",\n "name": "x"}', "a saved behaviour that was changed .*questions"),
        ('{\n "locaudit": "behaviour", "name"', "broken JSON"),
    ):
        (folder / "behaviour.json").write_text(content)
        with pytest.raises(DataError, match=rf"behaviour\.json.*{message}"):
            load_behaviour(folder / "behaviour.json")
    assert _called(load_behaviour("misconceptions"), tmp_path / "none") == "misconceptions"


def test_a_model_that_explodes_under_some_edits_is_recorded(home, tmp_path):
    config = small_config(home, optimal={"strengths": [1e-30]})
    run_audit(config, tmp_path / "run", progress=False)
    with read_run(tmp_path / "run") as store:
        records = [r for r in store.records() if r.spec.method == "optimal"]
    assert {r.status for r in records} == {"diverged"}
    assert all(r.message and not r.edit and not r.metrics for r in records)


def test_pace_gives_the_time_of_what_is_left():
    pace = Pace()
    assert pace.remaining({"iti": 5}) is None
    pace.add("iti", 10, 20)
    assert pace.remaining({"iti": 5}) == pytest.approx(10)
    assert pace.remaining({"optimal": 5}) == pytest.approx(10)
    pace.add("optimal", 10, 60)
    assert pace.remaining({"iti": 5, "optimal": 5}) == pytest.approx(40)
    assert [describe_seconds(s) for s in (40, 420, 12000)] == ["40 s", "7 min", "3 h 20 min"]


def test_a_line_comes_at_least_so_often_off_a_terminal(capsys):
    """Also while one group runs; with trials, time and counts of this run; and the thread ends."""
    with show_progress(True, every=0.01) as meter:
        meter.say("loading a model")
        wait_for(capsys, "still at work (loading a model)")
        meter.start({"iti": 3, "none": 1}, 8)
        meter.begin("ITI at claim")
        wait_for(capsys, "8 of 12 trials, measuring the pace")
        meter.end(Counter({"iti": 1}), "controls at least as good as the claim: iti 2 of 3")
        wait_for(capsys, "9 of 12 trials, about 0 s left, controls at least as good as the claim: iti 2 of 3")
        assert any(thread.name == "locaudit-progress" for thread in threading.enumerate())
    with show_progress(True, every=0.01) as meter:
        meter.start({"iti": 2}, 0, maybe={"iti": 3, "iti, samples": 1})
        wait_for(capsys, "0 of 2 trials, up to 3 more, measuring the pace")
        meter.end(Counter({"iti": 2}))
        wait_for(capsys, "2 of 2 trials, up to 3 more, about 0 s left")
        meter.add(Counter({"iti": 1}))
        wait_for(capsys, "2 of 3 trials, up to 2 more, about 0 s left")
        meter.share(Counter({"iti": 1}))
        meter.rule_out(Counter({"iti": 2, "iti, samples": 1}))
        wait_for(capsys, "3 of 3 trials, about 0 s left")
    with pytest.raises(KeyboardInterrupt), show_progress(True, every=0.01):
        raise KeyboardInterrupt
    assert not any(thread.name == "locaudit-progress" for thread in threading.enumerate())


def wait_for(capsys, text):
    """Wait until the words have been printed, whatever the width of the console."""
    said, until = "", time.monotonic() + 20
    while text not in " ".join(said.split()):
        assert time.monotonic() < until, said
        said += capsys.readouterr().err
        time.sleep(0.005)


def test_a_resumed_run_says_what_is_done_and_how_controls_compare(home, tmp_path, capsys):
    config = small_config(home, score="reward_margin")
    with stopped_at(6):
        run_audit(config, tmp_path / "run", progress=False)
    run_audit(config, tmp_path / "run")
    said = " ".join(capsys.readouterr().err.split())
    found = load_run(tmp_path / "run").verdict.methods
    assert said.count("5 of 9 trials done, going on") == 1
    counts = "; ".join(f"{name} {v.first.n_at_least} of 2" for name, v in found.items())
    assert said.endswith(f"9 of 9 trials, about 0 s left, controls at least as good as the claim: {counts}")
    run_audit(config, tmp_path / "run")
    assert "going on" not in capsys.readouterr().err


def test_the_number_of_trials_grows_only_by_what_was_announced(home, tmp_path, capsys, monkeypatch):
    """Whatever follows from results was ``up to N more`` before, and places of two nulls count as done."""
    lines = []

    def note(meter):
        lines.append((meter._done, meter._total, sum(meter._maybe.values())))

    monkeypatch.setattr(Meter, "_show", note)
    config = small_config(home, controls=6, claim="0.1,1.2", methods=["iti"], iti={"alphas": [2.0, 4.0]})
    run_audit(merge_config(config, {"nulls": ["anywhere", "layers"], "widen": 2}), tmp_path / "run")
    totals = [total for _, total, _ in lines]
    assert totals == sorted(totals) and lines[-1][0] == lines[-1][1] == len(load_run(tmp_path / "run").trials)
    bounds = [total + maybe for _, total, maybe in lines]
    assert bounds == sorted(bounds, reverse=True) and lines[-1][2] == 0


def test_status_says_what_a_run_is_doing(home, tmp_path, capsys, monkeypatch):
    """Of one that runs, one that was stopped and one that ended, and neither waits for the other."""
    seen, ended = [], threading.Event()

    def read():
        while not ended.is_set():
            if (tmp_path / "run" / "trials.sqlite").is_file():
                seen.append(read_news(tmp_path / "run"))

    reader = threading.Thread(target=read)
    reader.start()
    config = small_config(home, controls=4)
    with stopped_at(6):
        run_audit(config, tmp_path / "run", progress=False)
    ended.set()
    reader.join()
    running = [news for news in seen if news["state"] == "running" and news["running"]]
    assert {news["running"][0]["what"] for news in running} >= {"unedited model", "ITI at claim, strength 2"}
    assert all(0 <= news["done"] <= news["total"] == 13 for news in running)
    stopped = read_news(tmp_path / "run")
    assert (stopped["state"], stopped["done"], stopped["stored"]) == ("stopped", 5, {"ok": 5})
    assert "from the unedited model" in stopped["said"]
    status = tmp_path / "run" / "status.json"
    status.write_text(json.dumps(json.loads(status.read_text()) | {"state": "running"}))
    assert cli.main(["status", str(tmp_path / "run")]) == 0
    assert f"last message: {stopped['said']}" in capsys.readouterr().out
    with sqlite3.connect(tmp_path / "run" / "trials.sqlite") as connection:
        connection.execute("BEGIN EXCLUSIVE")
        started = time.monotonic()
        assert read_news(tmp_path / "run")["stored"] is None and time.monotonic() - started < 2
        connection.rollback()
    connection.close()
    run_audit(config, tmp_path / "run", progress=False)
    run_audit(config, tmp_path / "quiet", progress=False)
    assert dump(tmp_path / "run") == dump(tmp_path / "quiet")
    assert cli.main(["status", str(tmp_path / "run"), "--watch"]) == 0
    said = capsys.readouterr().out
    assert "finished" in said and "13 of 13 trials done (13 trials stored, 0 diverged)" in said
    assert "controls at least as good as the claim: " in said and "s a trial" in said
    assert cli.main(["status", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"] == 13
    assert cli.main(["status", str(tmp_path)]) == 0  # of both
    first, other = capsys.readouterr().out.split("\n\n")
    assert "quiet: finished" in first and "run: finished" in other
    monkeypatch.setattr(status_command, "BETWEEN", 0.0)
    assert cli.main(["status", str(tmp_path), "--watch"]) == 0 and "trials stored" in capsys.readouterr().out
    assert cli.main(["status", str(tmp_path), "--json"]) == 0
    assert [news["total"] for news in json.loads(capsys.readouterr().out).values()] == [13, 13]
    (tmp_path / "part" / "inner").mkdir(parents=True)
    (tmp_path / "part" / "inner" / "trials.sqlite").write_text("garbage")
    assert cli.main(["status", str(tmp_path)]) == 0
    broken, *others = capsys.readouterr().out.split("\n\n")
    assert "inner: got" in broken and "cannot be read" in broken and len(others) == 2
    status.write_text("[")
    assert cli.main(["status", str(tmp_path / "run")]) == 0
    assert "no news (13 trials stored" in capsys.readouterr().out
    (tmp_path / "run" / "status.json").unlink()
    assert cli.main(["status", str(tmp_path / "run")]) == 0
    assert "no news (13 trials stored, 0 diverged)" in capsys.readouterr().out
    (tmp_path / "run" / "trials.sqlite").write_text("garbage")
    assert cli.main(["status", str(tmp_path / "run")]) == 2
    assert "cannot be read (file is not a database)" in capsys.readouterr().err


def test_settings_of_ray_that_have_no_effect_are_said(home, tmp_path, capsys):
    run_audit(small_config(home, controls=1, ray={"address": "10.0.0.1:6379"}), tmp_path / "run")
    assert "settings under ray have no effect without executor ray" in " ".join(capsys.readouterr().err.split())


def test_workers_without_ray_are_refused_with_the_extra_that_has_it(home, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'locaudit\[ray\]'"):
        run_audit(small_config(home, ray={"workers": 2}), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_wrapping_leaves_no_gradients(llama):
    model = wrap_model(llama.lm, llama.tokenizer)
    assert not any(p.requires_grad for p in model.lm.parameters())
    assert torch.is_grad_enabled()


def test_nothing_stale_is_reused_after_a_refused_start(home, tmp_path):
    """What is cached before any trial ran belongs to its own settings: seed and drift text included."""
    text = tmp_path / "text.txt"
    changes = {"claim": "0.1,1.2", "iti": {"direction": "random", "alphas": [2.0]}, "methods": ["iti"]}
    changes["evaluation"] = {"drift_text": str(text), "drift_documents": 2, "drift_tokens": 8}
    text.write_text("one two three four five six seven eight nine ten. " * 8)
    with pytest.raises(LocationError):
        everything = "0.0,0.1,0.2,0.3,1.0,1.1,1.2,1.3"  # leaves no room for controls, which is noticed after probing
        run_audit(small_config(home, **changes | {"claim": everything}), tmp_path / "run", progress=False)
    text.write_text("Entirely different words stand in this second text, are they not? " * 8)
    for name in ("run", "clean"):
        run_audit(small_config(home, seed=7, **changes), tmp_path / name, progress=False)
    assert dump(tmp_path / "run") == dump(tmp_path / "clean")
    text.write_text("A third text, once there are trials. " * 8)
    with pytest.raises(RunFolderError, match="drift text under the same names"):
        run_audit(small_config(home, seed=7, **changes), tmp_path / "clean", progress=False)


def test_an_unfinished_run_says_so_in_the_terminal(home, tmp_path, capsys):
    with stopped_at(4):
        run_audit(small_config(home), tmp_path / "run", progress=False)
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.startswith("UNFINISHED: 3 of 9 trials")


def test_a_model_that_is_not_finite_is_refused(tmp_path, llama):
    config = small_config(tmp_path, claim="0.1", methods=["optimal"])
    model = load_model(config.model, device="cpu")
    model.lm.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        run_audit(config, tmp_path / "run", model=model, progress=False)


def test_controls_end_early_once_the_verdict_is_certain(home, tmp_path):
    """Curtailed: the verdict of all controls, from 9 or more, the same for all methods; `fixed` runs the rest."""
    settings = {"controls": 19, "claim": "0.0,1.2", "iti": {"alphas": [0.5, 1.0]}, "level": 0.3}
    config = small_config(home, **settings, stopping="curtailed")
    run_audit(config, tmp_path / "run", progress=False)
    run = load_run(tmp_path / "run")
    early = run.verdict
    assert len(run.trials) == run.manifest.planned
    (n_tried,) = {len(v.first.controls) for v in early.methods.values()}  # the same for both methods
    assert n_tried == max(v.first.n_used for v in early.methods.values()) < 19
    assert all(v.first.ended_early and v.first.n_used >= LEAST for v in early.methods.values())
    # What the rule said on the way: the controls end once both tests have stopped.
    stopping = Stopping(config, run.manifest, run.score)
    last = max((record.spec for record in run.trials), key=lambda spec: spec.control)
    following = dataclasses.replace(last, control=n_tried)
    groups = group_trials(run.records)
    assert sorted(groups) == ["iti", "none", "optimal"]
    for method in ("none", "iti", "optimal"):  # the records are in no order
        assert not stopping.has_ended(following)
        for trials in groups[method].values():
            stopping.add(trials)
    assert stopping.has_ended(following) and not stopping.has_ended(last)
    stopping.begin([dataclasses.replace(following, method="optimal")])
    assert not stopping.has_ended(dataclasses.replace(following, method="iti")), "it runs for the other method"
    report = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "(ended early; " in report and " of all 19 planned)" in report
    assert "Unfinished" not in report
    assert not run_pilot(config, tmp_path / "run", progress=False).seconds and load_run(tmp_path / "run").is_finished
    first = {record.spec.trial_id for record in run.trials}
    run_audit(dataclasses.replace(config, stopping="fixed"), tmp_path / "run", progress=False)
    whole = load_run(tmp_path / "run")
    late = whole.verdict
    assert first < {record.spec.trial_id for record in whole.trials}
    for name, method in late.methods.items():
        was = early.methods[name]
        assert method.outcome == was.outcome and len(method.first.controls) == 19
        assert method.first.controls[:n_tried] == was.first.controls


def test_the_rest_of_the_model_is_edited_where_it_is_asked_for(home, tmp_path):
    config = small_config(home, rest=True, claim="0.0,1.2", split={"fractions": [0.4, 0.2, 0.4]})
    run_audit(config, tmp_path / "run", progress=False)
    run = load_run(tmp_path / "run")
    verdict = run.verdict
    (rest,) = [record for record in run.trials if record.spec.arm == "rest"]
    assert rest.spec.method == "optimal"
    assert rest.spec.location == heads((0, 0), (1, 2)).rest()
    assert verdict.methods["optimal"].question("needed").answer in ("yes", "no", "open")
    assert "needed" not in [question.name for question in verdict.methods["iti"].questions]
    edit = load_edit(tmp_path / "run" / "edits" / rest.edit)
    assert not edit.sites["heads", 0].b[:8].any()  # the claim's head takes no part
    assert edit.sites["heads", 0].b[8:].any()


@pytest.mark.parametrize("null", ["kv-groups", "probe-accuracy", "norm"])
def test_matched_controls_of_a_run(home, tmp_path, null):
    run_audit(small_config(home, nulls=[null], methods=["iti"], claim="0.0,1.3"), tmp_path / "run", progress=False)
    run = load_run(tmp_path / "run")
    places = {r.spec.location for r in run.trials if r.spec.arm == "control"}
    assert 1 <= len(places) == run.manifest.nulls[null].n_planned <= run.manifest.nulls[null].population


@pytest.mark.parametrize(
    ("method", "settings", "claim"),
    [
        ("constant", {"strengths": [0.2], "epochs": 2}, "0.1,1.2"),
        ("constant", {"strengths": [0.2], "epochs": 2}, "attention:1"),
        ("optimal", {"strengths": [0.2]}, "mlp:1"),
        ("iti", {"alphas": [2.0]}, "residual:1"),
        ("ablate", {}, "0.1,1.2"),
        ("ablate", {}, "kv-group:0.0"),
    ],
)
def test_other_methods_and_other_kinds_of_claims_end_in_a_verdict(home, tmp_path, method, settings, claim):
    run_audit(small_config(home, methods={method: settings}, claim=claim), tmp_path / "run", progress=False)
    run = load_run(tmp_path / "run")
    assert run.is_finished and {r.status for r in run.trials} == {"ok"}
    assert {str(r.spec.location) for r in run.trials if r.spec.arm == "claim"} == {claim}
    assert run.verdict.methods[method].outcome in ("NO GAIN SHOWN", "CANNOT TELL")
    assert run.verdict.headline in write_report(tmp_path / "run").read_text(encoding="utf-8")
