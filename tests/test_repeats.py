"""One verdict over audits that differ in training seed and split."""

import json

import numpy as np
import pytest

from locaudit import cli
from locaudit.config import AuditConfig
from locaudit.errors import ConfigError, RunFolderError
from locaudit.runner.repeats import repeat_config, run_repeats
from locaudit.stats import decide
from locaudit.stats.repeats import combine_repeats
from locaudit.store import read_run
from runs import small_config
from test_stats import BASE_TRIAL, LOW, SCORE, audit

PLACES = [[f"1.{i}" for i in range(19)]]


def verdicts(*claims, controls=LOW):
    return [decide([BASE_TRIAL, *audit("optimal", gain, controls)], score=SCORE) for gain in claims]


def test_a_claim_that_leads_on_average_is_specific_and_its_spread_is_told():
    found = combine_repeats(verdicts(0.25, 0.5, 0.375), ["0.0"] * 3, PLACES * 3)
    method = found.methods["optimal"]
    assert method.outcome == "specific"
    assert method.outcomes == ("specific",) * 3
    assert method.p_value == 1 / 20
    assert method.gains == pytest.approx((0.25, 0.5, 0.375), abs=0.05)
    assert method.gain_sd == pytest.approx(0.125)
    assert found.overlap == 1
    assert "picked anew" not in str(found)


def test_a_claim_that_leads_in_some_repeats_only_is_not_specific():
    strong = [0.3, *LOW[1:]]
    found = combine_repeats(
        [*verdicts(0.25), *verdicts(0.25, 0.25, controls=strong)], ["0.0,0.1", "0.0,1.1", "0.0,0.1"], PLACES * 3
    )
    method = found.methods["optimal"]
    assert method.outcomes[0] == "specific"
    assert method.outcomes[1] == "effective, not specific"
    assert not method.same_places  # the claim moves: twice the median of 1/20, 2/20, 2/20
    assert (method.outcome, method.p_value) == ("underpowered", 4 / 20)
    assert found.overlap == pytest.approx((1 / 3 + 1 + 1 / 3) / 3)
    assert "picked anew" in str(found)
    worse = combine_repeats(verdicts(0.25, 0.25, controls=strong), ["0.0"] * 2, PLACES * 2).methods["optimal"]
    assert (worse.outcome, worse.n_at_least, worse.p_value) == ("effective, not specific", 1, 2 / 20)


def test_no_gain_in_half_of_the_repeats_is_no_effect():
    found = combine_repeats(verdicts(0.0, 0.0, 0.25), ["0.0"] * 3, PLACES * 3).methods["optimal"]
    assert found.outcome == "no effect"
    assert found.effect_p == min(1.0, 2 * sorted(v.methods["optimal"].effect_p for v in verdicts(0.0, 0.0, 0.25))[1])


def test_repeats_must_be_alike():
    with pytest.raises(RunFolderError, match="1 repeats"):
        combine_repeats(verdicts(0.1), ["0.0"], PLACES)
    with pytest.raises(ConfigError, match="at least 2"):
        run_repeats(AuditConfig(), "unused", 1)


def test_repeats_of_a_real_run_share_controls_and_differ_in_seed_and_split(tmp_path, capsys):
    config = small_config(tmp_path, claim=None, methods=["optimal"])
    found = run_repeats(config, tmp_path / "runs", 2, progress=False)
    specs, questions = [], []
    for number in range(2):
        with read_run(tmp_path / "runs" / f"repeat-{number}") as store:
            specs.append([record.spec for record in store.records()])
            questions.append({q.id for q in store.questions("test")})
            assert store.config == repeat_config(config, number)
    controls = [{s.control: s.location for s in part if s.arm == "control"} for part in specs]
    same = controls[0] == controls[1] and found.claims[0] == found.claims[1]
    assert found.methods["optimal"].same_places == same
    assert {s.seed for s in specs[0]} == {0}
    assert {s.seed for s in specs[1]} == {1}
    assert questions[0] != questions[1]
    written = json.loads((tmp_path / "runs" / "repeats.json").read_text())
    assert written["methods"]["optimal"]["gain"] == found.methods["optimal"].gain
    assert np.isfinite(found.methods["optimal"].gain_sd)
    # Once more from the command line: nothing runs again, and the verdict over all is printed.
    (tmp_path / "c.yaml").write_text((tmp_path / "runs" / "repeat-0" / "config.yaml").read_text())
    assert cli.main(["audit", str(tmp_path / "c.yaml"), "--repeats", "2", "--out", str(tmp_path / "runs")]) == 0
    assert "optimal over 2 repeats" in capsys.readouterr().out


def test_averaging_over_controls_that_move_is_not_done():
    """Controls that change from repeat to repeat average out, a claim that stays does not: p would be too small."""
    moving = [[f"{r}.{i}" for i in range(19)] for r in range(3)]
    found = combine_repeats(verdicts(0.25, 0.25, 0.25), ["0.0"] * 3, moving).methods["optimal"]
    assert not found.same_places
    assert found.p_value == 2 * 1 / 20
    enough = [i / 4096 for i in range(39)]
    found = combine_repeats(verdicts(0.25, 0.25, controls=enough), ["0.0", "0.1"], PLACES * 2).methods["optimal"]
    assert (found.p_value, found.outcome) == (2 / 40, "specific")
