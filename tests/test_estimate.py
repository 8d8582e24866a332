from __future__ import annotations

import math
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pytest

from locaudit import cli
from locaudit.behaviours import load_behaviour, split_questions
from locaudit.config import merge_config, to_yaml
from locaudit.errors import ConfigError, LocationError, RunFolderError
from locaudit.judges import Judgement
from locaudit.location import parse_location
from locaudit.models import load_model
from locaudit.run import banks, estimate, inputs
from locaudit.run import sampling as calibrating
from locaudit.run.audit import run_audit
from locaudit.run.estimate import describe_estimate, estimate_audit
from locaudit.run.paces import Decoding, Paces
from locaudit.run.plan import build_plan, draw_controls
from runs import HashJudge, small_config

PACES = Paces(
    probe_example=0.01,
    probe_fit=0.5,
    read=0.001,
    prefix=0.02,
    score=0.002,
    train={False: 0.003, True: 0.004},
    decoding={"iti": Decoding(0.0, 0.1), "optimal": Decoding(0.0, 0.2)},
    decoded_rows=64,
    drift_sampling=1.0,
    drift=0.05,
    drift_base=0.03,
    drift_kept=True,
    judge_loading=2.0,
    judge=0.01,
    judge_question=0.1,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("inputs")


@pytest.fixture
def fast(monkeypatch):
    """Time each sample once."""
    monkeypatch.setattr(calibrating, "LEAST_SECONDS", 0.0)


@pytest.fixture
def known(monkeypatch):
    """Paces that are given instead of measured."""
    monkeypatch.setattr(estimate, "measure_paces", lambda *_args: PACES)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_trials_are_those_of_the_plan(home, known):
    config = small_config(home, controls=3, claim="0.1,1.2", iti={"alphas": [2.0, 4.0]})
    found = estimate_audit(config, progress=False)
    model = load_model(config.model)
    config = banks.with_banks(config, model, split_questions(load_behaviour(config.behaviour)), "")
    claim = parse_location("0.1,1.2")
    groups = build_plan(config, model, claim, "any", draw_controls(config, model, claim)[0])
    assert found.n_trials == Counter((spec.arm, spec.method) for group in groups for spec in group)
    assert found.n_done == 0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"claim": "neurons:0.3,1.7", "evaluation": {"max_new_tokens": 0}},
        {"optimal": {"batching": "pair", "bank_size": 2}, "evaluation": {"bank_size": 4}, "methods": ["optimal"]},
        {"probe": {"context": "answer"}, "methods": ["iti"], "prompt": {"primer_in_training": True}},
    ],
)
def test_seconds_of_measured_samples_are_finite(home, fast, tmp_path, changes):
    primer = tmp_path / "primer.txt"
    primer.write_text("Q: Is it?\nA: No.")
    config = merge_config(merge_config(small_config(home), {"prompt": {"primer": str(primer)}}), changes)
    found = estimate_audit(config, progress=False)
    assert all(math.isfinite(seconds) and seconds >= 0 for seconds in found.seconds.values())
    for part in ("loading", "preparing", "scoring", "drift"):
        assert found.seconds[part] > 0
    assert bool(found.seconds["training"]) == ("optimal" in config.methods)
    assert bool(found.seconds["generating"]) == bool(found.n_answers) == bool(config.evaluation.max_new_tokens)
    assert found.total_seconds == sum(found.seconds.values())
    assert found.peak_bytes > 0


def test_twice_the_controls_take_twice_their_seconds(home, known):
    def seconds(controls: int) -> dict[str, float]:
        config = small_config(home, controls=controls, whole_model=False, claim="0.1,0.2", match="layer")
        return dict(estimate_audit(config, progress=False).seconds)

    # All in the lowest layer: nothing is read from the unedited model, so that controls are all that differs.
    one, two, three = seconds(1), seconds(2), seconds(3)
    for part in ("training", "scoring", "generating", "drift"):
        assert two[part] > one[part] > 0
        assert three[part] - two[part] == pytest.approx(two[part] - one[part])


def test_a_part_grows_with_its_own_pace_alone(home, known, monkeypatch):
    config = small_config(home, controls=2, claim="0.1,1.2")
    before = dict(estimate_audit(config, progress=False).seconds)
    monkeypatch.setattr(estimate, "measure_paces", lambda *_args: replace(PACES, train={False: 0.006, True: 0.008}))
    after = dict(estimate_audit(config, progress=False).seconds)
    assert after["training"] > 1.8 * before["training"]
    for part in ("scoring", "generating", "drift"):
        assert after[part] == before[part]


def test_generation_by_hand(home, known):
    config = small_config(home, controls=2, claim="0.1,1.2")
    split = split_questions(load_behaviour(config.behaviour))
    n_test, n_val = len(split.test), len(split.val)
    found = estimate_audit(config, progress=False)
    # Claim, whole model and two controls of each method on test, and the unedited model on validation too.
    assert found.n_answers == 8 * n_test + n_test + n_val
    assert found.seconds["generating"] == pytest.approx(4 * n_test * (0.1 + 0.2) + 0.1 * (n_test + n_val))


def test_batches_of_decoding():
    pace = Decoding(batch=10.0, row=1.0)
    assert pace.seconds(n_prompts=8, n_edits=2, n_rows=16) == 10 + 16
    assert pace.seconds(n_prompts=9, n_edits=2, n_rows=16) == 20 + 18
    assert pace.seconds(n_prompts=3, n_edits=9, n_rows=4) == 30 + 27


def test_nothing_is_written_and_the_cache_not_opened(home, fast, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAUDIT_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "run"
    estimate_audit(small_config(home), out=out, progress=False)
    assert not list(tmp_path.iterdir())


def test_what_is_done_is_not_counted(home, fast, tmp_path):
    config, out = small_config(home, controls=1), tmp_path / "run"
    run_audit(config, out, progress=False)
    before = contents(out)
    whole = estimate_audit(config, out=out, progress=False)
    assert whole.n_done == sum(whole.n_trials.values()) == 7
    assert not any(whole.seconds[part] for part in ("training", "scoring", "generating", "drift", "judging"))
    other = estimate_audit(small_config(home, controls=2), out=out, progress=False)
    assert other.n_done == 0 and other.seconds["training"] > 0
    assert any("refuse it" in note for note in other.notes)
    assert contents(out) == before


def test_the_stand_in_for_an_unknown_claim_is_named(home, known):
    assert any("random heads" in note for note in estimate_audit(small_config(home), progress=False).notes)
    given = estimate_audit(small_config(home, claim="0.1"), progress=False)
    assert not any("random heads" in note for note in given.notes)


class Slow(HashJudge):
    """A judge that others are paid for; it must not be asked."""

    def score(self, cases):
        raise AssertionError

    def estimate(self, cases):
        return f"{len(cases)} requests"


def test_judges_by_api_are_not_asked_and_local_ones_timed(home, fast, monkeypatch):
    local = HashJudge("truth")
    monkeypatch.setattr(inputs, "build_judges", lambda *_args, **_keywords: {"truth": local, "info": Slow("info")})
    found = estimate_audit(small_config(home), progress=False)
    assert local.seen and isinstance(local.score(local.seen[:1])[0], Judgement)
    assert found.seconds["judging"] > 0
    text = describe_estimate(found)
    assert "hash (info) (info) is not included" in text
    assert f"{found.n_answers} requests" in text


def test_bad_settings_fail_as_in_a_run(home, tmp_path):
    paged = {"optimal": {"optimizer": "paged_adamw_32bit"}}  # on a CPU
    for changes, error in ({"claim": "9.9"}, LocationError), ({"score": "truth"}, ConfigError), (paged, ConfigError):
        config = small_config(home, **changes)
        with pytest.raises(error) as dry:
            estimate_audit(config, progress=False)
        with pytest.raises(error) as real:
            run_audit(config, tmp_path / "run", progress=False)
        assert str(dry.value) == str(real.value)


def test_bad_folders_fail_as_in_a_run(home, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for out in (tmp_path, tmp_path / "thesis.tex", tmp_path / "thesis.tex" / "run"):
        with pytest.raises(RunFolderError) as dry:
            estimate_audit(small_config(home), out=out, progress=False)
        with pytest.raises(RunFolderError) as real:
            run_audit(small_config(home), out, progress=False)
        assert str(dry.value) == str(real.value)


def test_the_flag_prints_a_table(home, fast, tmp_path, capsys):
    path, out = tmp_path / "small.yaml", tmp_path / "run"
    path.write_text(to_yaml(small_config(home)))
    assert cli.main(["audit", str(path), "--dry-run", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for word in ("9 trials", "2 control optimal", "training", "total", "peak memory", "note: "):
        assert word in printed
    assert not out.exists()
    assert cli.main(["audit", str(path), "--dry-run", "--claim", "9.9", "--out", str(out)]) == 2
    assert "heads 9.9" in capsys.readouterr().err


def test_every_part_is_described(home, known):
    found = estimate_audit(small_config(home), progress=False)
    assert set(found.seconds) == set(estimate.PARTS)
    lines = describe_estimate(found).splitlines()
    assert [part for part in estimate.PARTS if any(part in line for line in lines)] == list(estimate.PARTS)
    assert {field.name for field in fields(found)} >= {"n_trials", "seconds", "peak_bytes", "notes"}
