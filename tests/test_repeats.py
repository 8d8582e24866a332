"""One verdict over audits that differ in training seed and split."""

import dataclasses
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from locaudit import audit_repeats, cli
from locaudit.config import AuditConfig, merge_config
from locaudit.errors import ConfigError, DataError, RunFolderError
from locaudit.report.repeats import read_repeats, write_repeats
from locaudit.run.audit import run_audit
from locaudit.run.repeats import repeat_config, run_repeats
from locaudit.stats import Repeat, combine_repeats, decide
from locaudit.stats.scores import find_score
from locaudit.store.folder import read_run
from locaudit.store.repeats import read_plan, write_plan
from runs import small_config
from test_stats import BASE_TRIAL, LOW, SCORE, audit
from tiny import heads

HEAD, PLACES = heads((0, 0)), {"anywhere": tuple(heads((1, i)) for i in range(19))}


def repeats(*gains, controls=LOW, claims=None, places=None):
    return combine_repeats(
        [
            Repeat(verdict, claims[i] if claims else HEAD, places[i] if places else PLACES)
            for i, verdict in enumerate(verdicts(*gains, controls=controls))
        ]
    )


def verdicts(*gains, controls=LOW):
    several = controls if isinstance(controls[0], list) else [controls] * len(gains)
    return [
        decide([BASE_TRIAL, *audit("optimal", gain, each)], score=SCORE)
        for gain, each in zip(gains, several, strict=True)
    ]


def test_a_claim_that_leads_on_average_is_specific_and_its_spread_is_told():
    found = repeats(0.25, 0.5, 0.375)
    method = found.methods["optimal"]
    assert method.outcome == "SPECIFIC"
    assert method.outcomes == ("SPECIFIC",) * 3
    assert method.nulls["anywhere"].p_value == 1 / 20
    assert method.gains == pytest.approx((0.25, 0.5, 0.375), abs=0.05)
    assert method.gain_sd == pytest.approx(0.125)
    assert found.overlap == 1
    assert "moves between" not in str(found)


def test_a_claim_that_leads_in_some_repeats_only_is_not_specific():
    strong = [*[0.3] * 5, *LOW[5:]]
    one, other = heads((0, 0), (0, 1)), heads((0, 0), (1, 1))
    found = repeats(0.25, 0.25, 0.25, controls=[LOW, strong, strong], claims=[one, other, one])
    method = found.methods["optimal"]
    assert method.outcomes[0] == "SPECIFIC"
    assert method.outcomes[1] == "NOT SPECIFIC"
    assert not method.nulls["anywhere"].same_places  # the claim moves: twice the median of 1/20, 6/20, 6/20
    assert (method.outcome, method.nulls["anywhere"].p_value) == ("NOT SPECIFIC", 12 / 20)
    assert found.overlap == pytest.approx((1 / 3 + 1 + 1 / 3) / 3)
    assert "moves between" in str(found)
    assert "twice the median" in str(found)
    worse = repeats(0.25, 0.25, controls=strong).methods["optimal"]
    against = worse.nulls["anywhere"]
    assert (worse.outcome, against.n_at_least, against.p_value) == ("NOT SPECIFIC", 5, 6 / 20)
    one_of_19 = repeats(0.25, 0.25, controls=[0.3, *LOW[1:]]).methods["optimal"]
    assert (one_of_19.outcome, one_of_19.nulls["anywhere"].p_value) == ("CANNOT TELL", 2 / 20)


def test_tied_repeats_are_not_specific_by_rounding():
    """Means of the same scores in another order differ in the last bits."""
    rng = np.random.default_rng(0)
    for n in (3, 8, 12):
        scores = rng.integers(1, 20, n) / 20 * rng.integers(1, 20, n) / 20
        part = verdicts(0.25)[0].methods["optimal"]
        parts = [
            replace(part, claim=x, nulls={"anywhere": replace(part.first, controls=(y,) * 19)})
            for x, y in zip(scores.tolist(), scores[::-1].tolist(), strict=True)
        ]
        several = [Repeat(replace(verdicts(0.25)[0], methods={"optimal": part}), HEAD, PLACES) for part in parts]
        assert combine_repeats(several).methods["optimal"].nulls["anywhere"].p_value == 1.0


def test_no_gain_in_half_of_the_repeats_is_no_gain_over_all():
    found = repeats(0.0, 0.0, 0.25).methods["optimal"]
    assert found.outcome == "CANNOT TELL"
    assert found.effect_p == min(1.0, 2 * sorted(v.methods["optimal"].effect_p for v in verdicts(0.0, 0.0, 0.25))[1])


def test_repeats_must_be_alike():
    with pytest.raises(RunFolderError, match="1 repeats"):
        repeats(0.1)
    with pytest.raises(ConfigError, match="2 to 1000"):
        run_repeats(AuditConfig(), "unused", 1)
    with pytest.raises(ConfigError, match="2 to 1000"):
        run_repeats(AuditConfig(), "unused", 1001)


def test_a_behaviour_with_its_own_split_keeps_it(tmp_path):
    config = small_config(tmp_path, methods=["iti"])
    path = tmp_path / "questions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    splits = ["train"] * 10 + ["val"] * 2 + ["test"] * 4
    path.write_text("\n".join(json.dumps(row | {"split": split}) for row, split in zip(rows, splits, strict=True)))
    found = audit_repeats(
        config.model, config.behaviour, out=tmp_path / "trained", repeats=2, config=config, methods=["optimal"],
        progress=False,
    )  # fmt: skip
    assert found.verdict.same_questions
    assert "on the behaviour’s own split" in found.page.read_text(encoding="utf-8")


def test_a_claim_that_diverges_in_a_repeat_has_no_mean():
    found = repeats(0.25, None).methods["optimal"]
    assert (found.outcome, found.nulls["anywhere"].p_value) == ("CANNOT TELL", 1.0)
    assert "nan" not in found.sentence("x")


def test_while_repeats_are_missing_there_is_no_outcome():
    several = [Repeat(verdict, HEAD, PLACES) for verdict in verdicts(0.25, 0.25)]
    assert combine_repeats(several, 2).methods["optimal"].outcome == "SPECIFIC"
    assert combine_repeats(several, 3).methods["optimal"].outcome == "CANNOT TELL"


def test_folders_that_are_no_repeats_are_told_apart(tmp_path):
    config = small_config(tmp_path, claim="0.1,1.2", iti={"alphas": [3.0]}, methods=["iti"])
    run_audit(config, tmp_path / "one", progress=False)
    with pytest.raises(RunFolderError, match="a single audit"):
        run_repeats(config, tmp_path / "one", 2, progress=False)
    run_repeats(config, tmp_path / "two", 2, progress=False)
    shutil.copytree(tmp_path / "two", tmp_path / "copied")
    shutil.rmtree(tmp_path / "copied" / "repeat-1")
    with pytest.raises(RunFolderError, match="repeat-1: not begun"):
        read_repeats(tmp_path / "copied")
    shutil.copytree(tmp_path / "copied" / "repeat-0", tmp_path / "copied" / "repeat-1")
    with pytest.raises(RunFolderError, match="same training seed"):
        read_repeats(tmp_path / "copied")
    other = dataclasses.replace(config, seed=3)
    with pytest.raises(RunFolderError, match="another configuration"):
        run_repeats(other, tmp_path / "two", 3, progress=False)
    assert read_plan(tmp_path / "two") == [2]  # a refused command leaves the plan
    for text in ("{", "[]", '{"planned": 3}', '{"planned": [1]}', '{"planned": [10000000]}'):
        (tmp_path / "two" / "repeats.json").write_text(text)
        with pytest.raises(RunFolderError, match="does not say how many"):
            read_repeats(tmp_path / "two")
    (tmp_path / "two" / "repeats.json").write_text('{"n_repeats": 2}')  # as it was written before
    assert read_repeats(tmp_path / "two").verdict.n_repeats == 2


def test_repeats_of_a_real_run_share_controls_and_differ_in_seed_and_split(tmp_path, capsys):
    config = merge_config(small_config(tmp_path, claim=None, methods=["optimal"]), {"prompt": {"style": "qa"}})
    found = audit_repeats(config.model, config.behaviour, out=tmp_path / "runs", repeats=2, config=config).verdict
    specs, questions = [], []
    for number in range(2):
        with read_run(tmp_path / "runs" / f"repeat-{number}") as store:
            specs.append([record.spec for record in store.records()])
            questions.append({q.id for q in store.questions("test")})
            assert store.config == repeat_config(config, number)
    controls = [{s.control: s.location for s in part if s.arm == "control"} for part in specs]
    same = controls[0] == controls[1] and found.claims[0] == found.claims[1]
    assert found.methods["optimal"].nulls["anywhere"].same_places == same
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


def test_the_page_leads_to_each_repeat_and_says_what_is_missing_or_was_changed(tmp_path, capsys):
    (tmp_path / "claim.yaml").write_text('claim: "0.1,1.2"\nlevel: 0.05\n')
    config = small_config(tmp_path, registered=str(tmp_path / "claim.yaml"), iti={"alphas": [3.0]}, methods=["iti"])
    out = tmp_path / "runs"
    run_repeats(config, out, 2, progress=False)
    assert cli.main(["report", str(out)]) == 0
    said = capsys.readouterr().out
    assert "nothing was changed after" in said
    assert "UNFINISHED" not in said
    page = (out / "repeats.html").read_text(encoding="utf-8")
    assert 'href="repeat-1/report.html"' in page
    assert (out / "repeat-1" / "report.html").is_file()
    assert "the same in every repeat" in page
    # The name in the settings stands once beside the score's title.
    score = json.loads((out / "repeats.json").read_text())["score"]
    assert page.count(f"{find_score(score).title} (score: {score})") == page.count(f"(score: {score})") == 1
    # Another level for this reading alone, in a folder of its own.
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert cli.main(["report", str(out), "--level", "0.3"]) == 0
    assert "READ WITH OTHER SETTINGS: level 0.3 (the run's: 0.05)" in capsys.readouterr().out
    there = out / "reports" / "mc2-level-0.3"
    assert json.loads((there / "verdict.json").read_text())["level"] == 0.3
    assert (there / "repeat-1" / "report.html").is_file() and "Read with other" in (there / "repeats.html").read_text()
    assert {path: path.read_bytes() for path in before} == before
    # Another level in one of the two, and a third repeat that has not begun.
    changed = dataclasses.replace(config, registered=None, claim="0.1,1.2")
    run_audit(dataclasses.replace(repeat_config(changed, 1), level=0.2), out / "repeat-1")
    with pytest.raises(RunFolderError, match="level: 0.05 in repeat-0, 0.2 in repeat-1"):
        read_repeats(out)
    run_audit(dataclasses.replace(repeat_config(changed, 0), level=0.2), out / "repeat-0")
    write_plan(out, 3)
    assert cli.main(["report", str(out)]) == 0
    said = capsys.readouterr().out
    assert "UNFINISHED: repeat-2" in said
    assert "CHANGED AFTER REGISTRATION" in said
    page = (out / "repeats.html").read_text(encoding="utf-8")
    assert "2 of 3 repeats" in page
    assert "level: 0.05 registered, 0.2 now" in page
    assert "added:</strong> 2, then 3 repeats were planned" in page
    assert "REPEATS WERE ADDED" in said
    assert json.loads((out / "repeats.json").read_text())["methods"]["iti"]["outcome"] == "CANNOT TELL"
    settings = (out / "repeat-0" / "config.yaml").read_bytes()
    with pytest.raises(RunFolderError, match="without a claim file"):
        run_repeats(dataclasses.replace(changed, level=0.3), out, 3, progress=False)
    assert (out / "repeat-0" / "config.yaml").read_bytes() == settings  # a refused command changes nothing
    with pytest.raises(ConfigError, match="but 3 were planned"):
        run_repeats(config, out, 2, progress=False)


def test_averaging_over_controls_that_move_is_not_done():
    """Controls that change from repeat to repeat average out, a claim that stays does not: p would be too small."""
    moving = [{"anywhere": tuple(heads((r, i)) for i in range(19))} for r in range(3)]
    found = repeats(0.25, 0.25, 0.25, places=moving).methods["optimal"].nulls["anywhere"]
    assert not found.same_places
    assert found.p_value == 2 * 1 / 20
    enough = [i / 4096 for i in range(39)]
    found = repeats(0.25, 0.25, controls=enough, claims=[HEAD, heads((0, 1))]).methods["optimal"]
    against = found.nulls["anywhere"]
    assert (against.p_value, found.outcome, against.n_at_least) == (2 / 40, "SPECIFIC", None)


def test_repeats_may_vary_the_primer_and_the_wording_alone(tmp_path):
    config = small_config(tmp_path, methods=["iti"], claim="0.1,1.2")
    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    several = tmp_path / "worded.jsonl"
    worded = [row | {"paraphrases": [row["question"].replace("Is", "Would you say that"), "x"]} for row in rows]
    worded[0]["paraphrases"].pop()
    several.write_text("\n".join(map(json.dumps, worded)))
    primer = tmp_path / "primer.txt"
    primer.write_text("Be brief.\n\n" + "\n\n".join(f"Q: {x}?\nA: {x}." for x in "abcdef"))
    settings = {"behaviour": str(several), "vary": ["primer", "wording"], "prompt": {"primer": str(primer)}}
    config = merge_config(config, settings)
    run_repeats(config, tmp_path / "out", 2, progress=False)
    runs = read_repeats(tmp_path / "out").runs
    assert [run.config.training_seed for run in runs.values()] == [0, 0]
    first, second = (run.questions["test"] for run in runs.values())
    assert [q.id for q in first] == [q.id for q in second]  # the same questions, in other words
    assert [q.text.replace("Is", "Would you say that") for q in first] == [q.text for q in second]
    primers = [run.manifest.primer for run in runs.values()]
    assert primers[0] == primer.read_text() != primers[1]
    assert sorted(primers[0].split("\n\n")) == sorted(primers[1].split("\n\n")) and primers[1].startswith("Be brief.")
    assert "different orders of the primer, wordings" in write_repeats(tmp_path / "out")[0].read_text()
    with pytest.raises(DataError, match="has 1 paraphrases"):  # one question has only one
        run_repeats(config, tmp_path / "three", 3, progress=False)
    with pytest.raises(DataError, match="with 0 example questions"):
        run_repeats(merge_config(config, {"prompt": {"primer": "none"}}), tmp_path / "none", 2, progress=False)
    with pytest.raises(ConfigError, match="vary nothing"):
        run_repeats(merge_config(config, {"vary": []}), tmp_path / "nothing", 2, progress=False)
