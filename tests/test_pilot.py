from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from locaudit import cli
from locaudit.behaviours import load_behaviour, split_questions
from locaudit.behaviours.format import Prompt
from locaudit.config import to_yaml
from locaudit.errors import ConfigError, LocationError, RunFolderError
from locaudit.measure.tree import plant
from locaudit.run.audit import run_audit
from locaudit.run.pilot import Estimate, describe_estimate, run_pilot
from locaudit.store.run import load_run
from locaudit.text import plural
from runs import HashJudge, small_config
from test_runner import dump
from tiny import tokenizer


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("inputs")


def test_the_audit_goes_on_from_a_dry_run(home, tmp_path):
    config = small_config(home, controls=3, claim="0.1,1.2", iti={"alphas": [2.0, 4.0]}, evaluation={"bank_size": 2})
    found = run_pilot(config, tmp_path / "tried", progress=False)
    tried = load_run(tmp_path / "tried")
    arms = {("base", "none")} | {(arm, method) for method in config.methods for arm in ("claim", "whole", "control")}
    assert {(r.spec.arm, r.spec.method) for r in tried.trials} == arms
    assert len(tried.trials) == found.n_done < tried.manifest.planned
    for name in ("tried", "whole"):
        run_audit(config, tmp_path / name, progress=False)
    assert dump(tmp_path / "tried") == dump(tmp_path / "whole")
    whole = load_run(tmp_path / "whole")
    assert found.n_trials == Counter((r.spec.arm, r.spec.method) for r in whole.trials)
    before = dump(tmp_path / "whole")
    again = run_pilot(config, tmp_path / "whole", progress=False)
    assert again.n_done == whole.manifest.planned
    assert not any((again.n_answers, again.n_tokens, again.disk_bytes, again.seconds, again.spent))
    assert dump(tmp_path / "whole") == before


def test_what_is_left_by_hand(home, tmp_path):
    config = small_config(home, controls=3, claim="0.1,1.2", iti={"alphas": [2.0, 4.0]})
    found = run_pilot(config, tmp_path / "run", progress=False)
    n_iti, n_optimal = 5 * 2 - 3, 5 - 3
    split = split_questions(load_behaviour(config.behaviour))
    train, val, test = (
        plant(tokenizer(), Prompt(), [(q.text, q.answers) for q in part])
        for part in (split.train, split.val, split.test)
    )
    # Several strengths are compared on validation questions, one is not.
    assert found.n_answers == n_iti * len(split.val + split.test) + n_optimal * len(split.test)
    scored = n_iti * sum(f.n_tokens + len(f.prefix) for f in (val, test)) + n_optimal * (
        test.n_tokens + len(test.prefix)
    )
    trained = n_optimal * config.methods["optimal"].epochs * train.n_tokens
    assert (
        found.n_tokens == found.n_answers * 6 + (n_iti + n_optimal) * 2 * (1 + 8) + scored + trained
    )  # 1: a document's start token
    run = load_run(tmp_path / "run")
    # Only controls and claims are left; the whole model's edit, which takes longer, is timed apart.
    small = [r.spec for r in run.trials if r.spec.arm in ("claim", "control")]
    pace = {m: [run.seconds[spec.trial_id] for spec in small if spec.method == m] for m in config.methods}
    assert {m: len(found) for m, found in pace.items()} == {"iti": 2, "optimal": 2}
    n_whole = 1  # the second strength of ITI
    whole = next(run.seconds[r.spec.trial_id] for r in run.trials if (r.spec.arm, r.spec.method) == ("whole", "iti"))
    expected = (sum(pace["iti"]) * (n_iti - n_whole) + sum(pace["optimal"]) * n_optimal) / 2 + whole * n_whole
    assert found.seconds == pytest.approx(expected)
    assert found.spent == pytest.approx(sum(run.seconds.values()))
    assert found.disk_bytes > 0 and found.peak_bytes > 0


def test_one_of_a_thing_has_no_plural():
    assert [plural(n, "control") for n in (0, 1, 2, 1200)] == [
        "0 controls",
        "1 control",
        "2 controls",
        "1,200 controls",
    ]
    text = describe_estimate(Estimate({("base", "none"): 1}, 1, 1, 1, 0, 0.0, 0.0, 0))
    assert text.startswith("1 trial: 1 base\n1 of them is done") and "1 answer to generate, 1 token to run" in text


class Paid(HashJudge):
    """A judge that must not be asked."""

    def score(self, cases):
        raise AssertionError

    def estimate(self, cases):
        return f"{len(cases)} requests"


def test_judges_by_api_are_not_asked_and_local_ones_are(home, tmp_path):
    judges = {"truth": HashJudge("truth"), "info": Paid("info")}
    found = run_pilot(small_config(home), tmp_path / "run", judges=judges, progress=False)
    run = load_run(tmp_path / "run")
    assert set(judges["truth"].seen) and not run.said - set(run.judgements["truth"])
    text = describe_estimate(found)
    assert "the time of judging by hash (info) is not included" in text
    # The answers of the trials that were timed are to be judged, too.
    assert f"info, judged by hash (info): at most {found.n_answers + len(run.said)} requests" in text


def test_bad_settings_and_folders_fail_as_in_a_run(home, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    paged = {"optimal": {"optimizer": "paged_adamw_32bit"}}  # on a CPU
    for changes, out, error in (
        ({"claim": "9.9"}, "run", LocationError),
        ({"score": "truth"}, "run", ConfigError),
        (paged, "run", ConfigError),
        ({}, ".", RunFolderError),
        ({}, "thesis.tex", RunFolderError),
        ({}, "thesis.tex/run", RunFolderError),
    ):
        said = set()
        for start in (run_pilot, run_audit):
            with pytest.raises(error) as refused:
                start(small_config(home, **changes), tmp_path / out, progress=False)
            said.add(str(refused.value))
        assert len(said) == 1


def test_the_flag_prints_what_is_left(home, tmp_path, capsys):
    path, out = tmp_path / "small.yaml", tmp_path / "run"
    path.write_text(to_yaml(small_config(home)))
    command = ["audit", str(path), "--dry-run", "--out", str(out)]
    assert cli.main(command) == 0
    printed, noted = capsys.readouterr()
    assert 'too few for the answer "no"' in noted
    for word in ("9 trials", "2 control optimal", "7 of them are done", "answers to generate", "MiB", "peak memory"):
        assert word in printed
    assert cli.main([*command, "--claim", "9.9"]) == 2
    assert cli.main([*command[:-1], str(tmp_path / "two"), "--repeats", "2"]) == 0
    assert "note: this is for one repeat" in capsys.readouterr().out
    assert len(load_run(tmp_path / "two" / "repeat-0").trials) == 7
    assert cli.main([*command[:-1], str(tmp_path / "bad"), "--claim", "9.9"]) == 2
    assert "got head 9.9" in capsys.readouterr().err
