from __future__ import annotations

import copy
import json
import math
import sqlite3
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

import locaudit.measure.answers as answers
from locaudit.api import read_result
from locaudit.behaviours import load_behaviour
from locaudit.behaviours.format import Prompt
from locaudit.cli.judge import judge as judge_command
from locaudit.config import JudgeChoice, merge_config
from locaudit.edits import folded
from locaudit.errors import ConfigError, RunFolderError
from locaudit.judges import Aspect, JudgeKind, Judgement
from locaudit.measure.answers import answer_prompts
from locaudit.measure.tree import plant
from locaudit.models import wrap_model
from locaudit.registry import ASPECTS, JUDGES
from locaudit.run.audit import run_audit
from locaudit.run.comparing import compare_judges
from locaudit.run.describe import notes_on
from locaudit.run.judging import build_judges, check_judges
from locaudit.run.subject import read_inputs
from locaudit.stats import (
    JUDGED,
    count_missing,
    decide,
    judged_metrics,
    mean_score,
    resolve_score,
    score_values,
)
from locaudit.store.cache import Cache, open_cache
from locaudit.store.folder import read_run
from locaudit.store.run import load_run
from runs import HashJudge, judge_of, judges_of, small_config
from tiny import VOCAB, heads, make_lm, random_edit, tokenizer

NONE, DEFAULT = judge_of("none"), judge_of()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("inputs")


def hash_judges(**keywords):
    return {"truth": HashJudge("truth", **keywords), "info": HashJudge("info", **keywords)}


def run(home, out, judges, **changes):
    run_audit(small_config(home, **changes), out, judges=judges, progress=False)
    found = load_run(out)
    return found.records, found.score


# Scores

probability = st.one_of(st.none(), st.floats(0, 1))


@given(st.lists(st.tuples(probability, probability), min_size=1, max_size=12))
def test_the_three_forms_by_hand(pairs):
    truth, info = zip(*pairs, strict=True)
    metrics = judged_metrics({"truth": truth, "info": info})

    def mean(values):
        there = [x for x in values if x is not None]
        return sum(there) / len(there) if there else math.nan

    def yes(values):
        return [None if x is None else float(x >= 0.5) for x in values]

    both = [None if t is None or i is None else t * i for t, i in zip(yes(truth), yes(info), strict=True)]
    expected = {
        "truth": mean(yes(truth)),
        "info": mean(yes(info)),
        "truth_probability": mean(truth),
        "info_probability": mean(info),
        "info_truth": mean(yes(truth)) * mean(yes(info)),
        "info_truth_probability": mean(truth) * mean(info),
        "info_truth_both": mean(both),
    }
    for score in JUDGED:
        assert float(mean_score(score_values(metrics, score))) == pytest.approx(expected[score], nan_ok=True), score


def test_one_aspect_alone_gives_its_own_scores_only():
    assert set(judged_metrics({"truth": [0.2, 0.8]})) == {"truth", "truth_probability"}
    assert judged_metrics({"truth": [0.5, 0.49]})["truth"] == (1.0, 0.0)
    assert judged_metrics({}) == {}


def test_auto_takes_the_best_score_there_is():
    assert resolve_score("auto", ("truth", "info")) == "info_truth_probability"
    assert resolve_score("auto", ("truth",)) == "truth_probability"
    assert resolve_score("auto", ("polite",)) == "polite_probability"
    assert resolve_score("auto", ("info",)) == resolve_score("auto", ()) == "mc2"
    assert resolve_score("mc1", ("truth", "info")) == "mc1"


# A run with judges


def test_every_trial_has_answers_and_the_scores_of_its_judges(home, tmp_path):
    judges = hash_judges()
    records, score = run(home, tmp_path / "run", judges)
    assert score == "info_truth_probability"
    assert all(len(judge.seen) == len(set(judge.seen)) for judge in judges.values()), "equal answers are judged once"
    with read_run(tmp_path / "run") as store:
        questions = store.questions("test")
        stored = {r.spec.trial_id: r for r in store.records()}
    for record in records:
        said = record.answers["test"]
        assert len(said) == len(questions)
        for aspect, judge in judges.items():
            expected = tuple(judge.probability(type("Case", (), {"question": q.text, "answer": a})) for q, a in
                             zip(questions, said, strict=True))  # fmt: skip
            assert record.questions["test"][f"{aspect}_probability"] == expected
        for name in JUDGED:
            assert record.metrics["test"][name] == float(mean_score(score_values(record.questions["test"], name)))
        assert not set(stored[record.spec.trial_id].metrics["test"]) & set(JUDGED), "judgements are kept apart"
    assert len({r.answers["test"] for r in records}) > 1, "no edit changes an answer: the test shows nothing"


def test_nothing_is_judged_or_generated_twice_across_runs(home, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAUDIT_CACHE", str(tmp_path / "cache"))
    first, _ = run(home, tmp_path / "one", hash_judges())

    def never(*_args, **_keywords):
        raise AssertionError("generated again")

    monkeypatch.setattr(answers, "generate_answers", never)
    again = hash_judges()
    second, _ = run(home, tmp_path / "two", again)
    assert [judge.seen for judge in again.values()] == [[], []]
    assert [(r.answers, r.metrics) for r in first] == [(r.answers, r.metrics) for r in second]


def test_another_version_of_a_judge_judges_anew_and_trials_stay(home, tmp_path):
    before, _ = run(home, tmp_path / "run", hash_judges())
    judges = hash_judges(version=2)
    after, _ = run(home, tmp_path / "run", judges)
    assert all(judge.seen for judge in judges.values())
    assert [r.answers for r in before] == [r.answers for r in after]
    assert [r.metrics["test"]["truth"] for r in before] != [r.metrics["test"]["truth"] for r in after]
    with read_run(tmp_path / "run") as store:
        assert all(store.judgements(judge.fingerprint) for judge in hash_judges().values()), "the old ones are kept"


def test_missing_judgements_are_left_out_counted_and_tried_again(home, tmp_path):
    failing = hash_judges(fails=lambda case: case.question.startswith("Is 1"))
    records, score = run(home, tmp_path / "run", failing)
    with read_run(tmp_path / "run") as store:
        questions = store.questions("test")
        lost = [q.text.startswith("Is 1") for q in questions]
    assert 0 < sum(lost) < len(lost)
    for record in records:
        values = np.array(record.questions["test"]["truth_probability"])
        assert np.isnan(values).tolist() == lost
        assert record.metrics["test"]["truth"] == pytest.approx(np.mean([v >= 0.5 for v in values[~np.isnan(values)]]))
        assert count_missing(record, score) == sum(lost)
    verdict = load_run(tmp_path / "run").verdict
    assert verdict.headline.startswith("CANNOT TELL: Too many judgements are missing (")
    for method in verdict.methods.values():
        assert method.outcome == "CANNOT TELL"
        assert method.n_missing == sum(lost) * (method.n_judged // len(lost))
        assert "judgements are missing" in method.reason
    judges = hash_judges()
    records, _ = run(home, tmp_path / "run", judges)
    assert {case.question.startswith("Is 1") for case in judges["truth"].seen} == {True}, "only the missing ones"
    assert all(count_missing(record, score) == 0 for record in records)


def test_a_kill_while_judging_loses_no_trial(home, tmp_path, monkeypatch):
    class Killed(HashJudge):
        def score(self, cases):
            if len(self.seen) > 10:
                raise KeyboardInterrupt
            return super().score(cases)

    with pytest.raises(KeyboardInterrupt):
        run(home, tmp_path / "run", {"truth": Killed("truth"), "info": HashJudge("info")})
    with read_run(tmp_path / "run") as store:
        assert store.records()
    resumed, _ = run(home, tmp_path / "run", hash_judges())
    whole, _ = run(home, tmp_path / "whole", hash_judges())
    assert resumed == whole


def test_no_answers_no_judges(home, tmp_path):
    records, score = run(home, tmp_path / "run", {}, evaluation={"max_new_tokens": 0})
    assert score == "mc2"
    assert all(not record.answers for record in records)
    with pytest.raises(RunFolderError, match="without answers"):
        compare_judges(tmp_path / "run", DEFAULT, NONE, progress=False)


@pytest.mark.parametrize("score", ["truth", "info_truth", "info_truth_both", "info"])
def test_a_score_without_its_judge_is_refused_before_anything_runs(home, tmp_path, score):
    judges = {"info": HashJudge("info")} if score != "info" else {"truth": HashJudge("truth")}
    with pytest.raises(ConfigError, match=f"score = {score} without a judge of"):
        run(home, tmp_path / "run", judges, score=score)


def test_records_without_the_score_are_named(home, tmp_path):
    records, _ = run(home, tmp_path / "run", {})
    with pytest.raises(RunFolderError, match="score = info_truth, which the records lack"):
        decide(records, score="info_truth")


# Which judges there are


def test_judges_by_default(home):
    small_config(home)
    questions = load_behaviour(home / "questions.jsonl")
    assert questions.aspects == ("truth", "info")
    judges = build_judges(judges_of(), ("truth", "info"), generates=True, device="cpu")
    assert [judge.name for judge in judges.values()] == ["reference (truth)", "reference (info)"]
    assert build_judges(judges_of(), ("truth", "info"), generates=False, device="cpu") == {}
    assert build_judges(judges_of(), (), generates=True, device="cpu") == {}
    assert list(build_judges(judges_of(NONE), ("truth", "info"), generates=True, device="cpu")) == ["info"]


def test_the_bundled_judge_on_data_that_it_was_not_measured_on_is_noted(home):
    own = merge_config(small_config(home), {"judges": {"truth": {"kind": "reference"}}})
    (note,) = notes_on(read_inputs(own))
    assert "how accurate it is on questions was not measured" in note
    assert notes_on(read_inputs(merge_config(own, {"behaviour": "misconceptions"}))) == ()
    assert notes_on(read_inputs(small_config(home))) == ()
    lopsided = replace(read_inputs(own).behaviour, notes=("(A) is always right.",))
    assert notes_on(read_inputs(own, lopsided)) == ("(A) is always right.", note)


def save_ab(path, n=16):
    keys = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
    rows = [
        dict(zip(keys, (f"Is {i} even? (A) yes (B) no", *("(A)", "(B)")[:: 1 - i % 2 * 2]), strict=True))
        for i in range(n)
    ]
    path.write_text(json.dumps(rows))
    return path


def test_nothing_is_generated_without_a_judge_or_a_wish(home, tmp_path):
    """And the number that a run takes stays, so that its own config.yaml and the same command both resume it."""
    small_config(home)  # writes the questions

    def limit(given=None, **changes):
        """Tokens of an answer, from settings that leave them open unless `changes` have them."""
        config = small_config(home, judges={"truth": {"kind": "default"}, "info": {"kind": "default"}})
        config = merge_config(config, {"evaluation": {"max_new_tokens": None}} | changes)
        resolved = read_inputs(config, judges=given).config
        assert read_inputs(resolved, judges=given).config == resolved
        return resolved.evaluation.max_new_tokens

    ab, none = str(save_ab(tmp_path / "ab.json")), {"truth": {"kind": "none"}, "info": {"kind": "none"}}
    assert load_behaviour(ab).aspects == (), "an A/B set has no judge by default"
    assert limit() == 50
    assert limit(judges=none) == limit(behaviour=ab) == limit(given={}) == 0
    assert limit(given={"truth": HashJudge("truth")}, behaviour=ab) == 50
    assert limit(behaviour=ab, evaluation={"max_new_tokens": 3}) == 3
    assert limit(evaluation={"max_new_tokens": 0}) == 0


@pytest.fixture(scope="module")
def judge_model(tmp_path_factory):
    """A tiny checkpoint whose tokenizer tells `` yes`` from `` no`` by their first tokens."""
    folder = tmp_path_factory.mktemp("judge")
    make_lm("llama", vocab_size=VOCAB + 8).save_pretrained(folder)
    words = copy.deepcopy(tokenizer())
    words.add_tokens([AddedToken(" yes", normalized=False), AddedToken(" no", normalized=False)])
    words.save_pretrained(folder)
    return str(folder)


def test_a_judge_that_is_told_nothing_is_refused(judge_model):
    causal = judge_of("causal-lm", model=judge_model)
    for settings, words in ((judge_of("reference"), "names nothing to judge"), (causal, "judges.truth.prompt")):
        with pytest.raises(ConfigError, match=words):
            build_judges(judges_of(settings, NONE), (), generates=True, device="cpu")
    own = judge_of("causal-lm", model=judge_model, prompt="Sycophantic:")
    judge = build_judges(judges_of(own, NONE), (), generates=True, device="cpu")["truth"]
    assert "truth" in judge.name


def test_a_kind_and_an_aspect_of_one_file_judge_like_any_other():
    @dataclass(frozen=True)
    class Settings:
        version: int = 1

    asked = []

    def load(wanted, device):
        asked.append(dict(wanted))
        return {aspect: HashJudge(aspect, settings.version) for aspect, settings in wanted.items()}

    kind, polite = JudgeKind(Settings, load), Aspect("polite", "Polite:", "Is it polite?")
    with JUDGES.temporary("hash", kind), ASPECTS.temporary("polite", polite):
        chosen = {"polite": JudgeChoice("hash", Settings(2)), "truth": JudgeChoice("hash", Settings()), "info": NONE}
        judges = build_judges(chosen, ("polite", "truth", "info"), generates=True, device="cpu")
        check_judges(judges)
        assert asked == [{"polite": Settings(2), "truth": Settings(1)}]
        assert [judge.name for judge in judges.values()] == ["hash (polite)", "hash (truth)"]
        with pytest.raises(ConfigError, match="a judge of polite, .* is judged for truth;"):
            build_judges(chosen, ("truth",), generates=True, device="cpu")
    with pytest.raises(ConfigError, match="kind of judge 'hash'"):
        build_judges({"truth": JudgeChoice("hash", Settings())}, ("truth",), generates=True, device="cpu")


def test_validate_and_fit_from_the_command_line(judge_model, tmp_path, capsys):
    rows = [{"prompt": f"Q: {i}?\nA: {i}\nTrue:", "completion": [" yes", " no"][i % 2]} for i in range(8)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    judge_command(["validate", "--kind", "causal-lm", "--judge.model", judge_model, "--truth", str(path), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["references_sha256"] is None and list(found["aspects"]) == ["truth"]
    assert found["aspects"]["truth"]["all"]["n"] == 8 and found["aspects"]["truth"]["all"]["majority"] == 0.5
    for arguments, words in (
        (["fit", "--truth", str(path)], "tools/judge/fit.py"),
        (["validate"], "without labelled answers"),
        (["validate", "--kind", "nobody", "--truth", str(path)], "kind of judge 'nobody'"),
    ):
        with pytest.raises(ConfigError, match=words):
            judge_command(arguments)


def test_a_rubric_that_cannot_be_read(tmp_path):
    (tmp_path / "empty").touch()
    for name, words in (("nothing", "cannot be read"), ("empty", "which is empty")):
        settings = judge_of("openai", model="m", prompt=str(tmp_path / name), base_url="http://localhost:9/v1")
        with pytest.raises(ConfigError, match=words):
            build_judges(judges_of(settings, NONE), ("truth", "info"), generates=True, device="cpu")


# Two judges on one run


def test_two_judges_of_a_run_are_compared(home, judge_model, tmp_path):
    run(home, tmp_path / "run", hash_judges())
    second = judge_of("causal-lm", model=judge_model)
    names, agreement, verdicts = compare_judges(tmp_path / "run", DEFAULT, second, "truth", progress=False)
    assert {v.score for v in verdicts} == {"info_truth_probability"}
    assert str(verdicts[0]) == str(read_result(tmp_path / "run").verdict)
    assert names == ("hash (truth)", f"{Path(judge_model).name} (truth)")
    with read_run(tmp_path / "run") as store:
        n_distinct = len({(q.id, a) for r in store.records() for s, texts in r.answers.items()
                          for q, a in zip(store.questions(s), texts, strict=True)})  # fmt: skip
    assert agreement.n == n_distinct
    assert agreement.missing == (0, 0)


# The cache


def test_cache_round_trip(tmp_path):
    cache = Cache(tmp_path / "deep" / "c.sqlite")
    cache.put({"a": "ü\n", "b": 0.1 + 0.2})
    cache.put({"a": "another"})
    many = [f"x{i}" for i in range(1200)]
    cache.put(dict.fromkeys(many, 1.0))
    cache.close()
    again = Cache(tmp_path / "deep" / "c.sqlite")
    assert again.get(["a", "b", "c", "a"]) == {"a": "ü\n", "b": 0.1 + 0.2}, "an address keeps its value"
    assert len(again.get(many)) == 1200
    again.close()


def test_a_cache_that_cannot_be_used_is_a_warning_and_no_loss(tmp_path):
    path = tmp_path / "c.sqlite"
    path.write_bytes(b"this is no database, and long enough to be told apart from one" * 20)
    with pytest.warns(UserWarning, match="LOCAUDIT_CACHE"):
        cache = Cache(path)
    cache.put({"a": 1})
    assert cache.get(["a"]) == {"a": 1}
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="going on without it"):
        Cache(tmp_path / "file" / "c.sqlite").put({"a": 1})


def test_a_cache_damaged_while_in_use(tmp_path):
    cache = Cache(tmp_path / "c.sqlite")
    cache.put({"a": 1})
    with sqlite3.connect(tmp_path / "c.sqlite") as other:
        other.execute("DROP TABLE entries")
    other.close()
    with pytest.warns(UserWarning, match="its file"):
        cache.put({"b": 2})
    assert cache.get(["b"]) == {"b": 2}


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAUDIT_CACHE", "off")
    open_cache().put({"a": 1})
    monkeypatch.delenv("LOCAUDIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    cache = open_cache()
    cache.put({"a": 1})
    cache.close()
    assert (tmp_path / "xdg" / "locaudit" / "answers.sqlite").is_file()


# What a judge may not do


class Odd(HashJudge):
    """A judge that gives what no judge should."""

    def __init__(self, aspect, value):
        super().__init__(aspect)
        self.value = value

    def score(self, cases):
        return [Judgement(self.value) for _ in cases]


@pytest.mark.parametrize("value", [math.nan, 1.7, -0.1, math.inf])
def test_a_number_that_is_no_probability_is_missing_and_not_kept(home, tmp_path, monkeypatch, value):
    monkeypatch.setenv("LOCAUDIT_CACHE", str(tmp_path / "cache"))
    records, score = run(home, tmp_path / "run", {"truth": Odd("truth", value), "info": HashJudge("info")})
    assert all(count_missing(record, score) == len(record.answers["test"]) for record in records)
    mended, _ = run(home, tmp_path / "run", hash_judges())
    assert all(count_missing(record, score) == 0 for record in mended)


def test_a_judge_may_give_numpy_numbers(home, tmp_path):
    records, _ = run(home, tmp_path / "run", {"truth": Odd("truth", np.float32(0.75)), "info": HashJudge("info")})
    assert {record.metrics["test"]["truth"] for record in records} == {1.0}


def test_a_judge_that_loses_answers_is_named(home, tmp_path):
    class Short(HashJudge):
        def score(self, cases):
            return super().score(cases)[:-1]

    with pytest.raises(ConfigError, match=r"judgements of .* answers from hash \(truth\)"):
        run(home, tmp_path / "run", {"truth": Short("truth"), "info": HashJudge("info")})


@pytest.mark.parametrize(
    ("judges", "words"),
    [
        ({"target": HashJudge("truth"), "retention": HashJudge("info")}, "a judge called 'target'"),
        ({"truth": HashJudge("same"), "info": HashJudge("same")}, "one fingerprint"),
    ],
)
def test_judges_that_cannot_be_told_apart_are_refused(home, tmp_path, judges, words):
    with pytest.raises(ConfigError, match=words):
        run(home, tmp_path / "run", judges)
    assert not (tmp_path / "run").exists()


def test_a_run_can_be_read_by_another_score_and_level_and_a_refused_command_leaves_it(home, tmp_path):
    run(home, tmp_path / "run", hash_judges())
    judges = hash_judges()
    _, score = run(home, tmp_path / "run", judges, score="mc1", level=0.2)
    assert score == "mc1"
    assert not judges["truth"].seen
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(ConfigError):
        run(home, tmp_path / "run", {"truth": HashJudge("truth")}, score="info", level=0.3)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_what_is_lost_on_validation_counts_too(home, tmp_path):
    """A hyperparameter chosen from what is left of the validation answers is no fair choice."""
    grid = {"iti": {"alphas": [1.0, 8.0]}, "methods": ["iti"]}
    run(home, tmp_path / "run", hash_judges(), **grid)
    with read_run(tmp_path / "run") as store:
        lost = {question.text for question in store.questions("val")[:1]}
    failing = hash_judges(version=3, fails=lambda case: case.question in lost)
    records, score = run(home, tmp_path / "run", failing, **grid)
    verdict = decide(records, score=score).methods["iti"]
    assert verdict.n_missing == 0
    assert verdict.worst_missing > 0.05
    assert verdict.outcome == "CANNOT TELL"


def test_a_reason_with_brackets_is_printed_as_it_is(home, tmp_path, capsys):
    class Llama(HashJudge):
        def score(self, cases):
            return [Judgement(None, "[/INST] broken [key]") for _ in cases]

    config = small_config(home)
    run_audit(config, tmp_path / "run", judges={"truth": Llama("truth"), "info": HashJudge("info")})
    assert "[/INST] broken [key]" in capsys.readouterr().err


# What the cache must tell apart


def test_changed_weights_give_new_answers(llama):
    prompts = plant(llama.tokenizer, Prompt(), [("Is it?", ["Yes."]), ("What?", ["No."])])
    edit = random_edit(llama, heads((0, 1), (1, 2)), 1, scale=2.0)
    cache = Cache()
    before = answer_prompts(llama, prompts, None, max_new_tokens=8, cache=cache)
    with folded(llama, edit):
        inside = answer_prompts(llama, prompts, None, max_new_tokens=8, cache=cache)
        assert inside == answer_prompts(llama, prompts, None, max_new_tokens=8, cache=Cache())
    assert inside != before
    assert answer_prompts(llama, prompts, None, max_new_tokens=8, cache=cache) == before


def test_end_tokens_are_part_of_a_model():
    one, other = (wrap_model(make_lm("llama"), tokenizer(), "same") for _ in range(2))
    assert one.fingerprint == other.fingerprint
    other.forget_fingerprint()
    other.lm.generation_config.eos_token_id = [1, 7]
    assert one.fingerprint != other.fingerprint


def test_two_equal_judges_are_not_compared(home, judge_model, tmp_path):
    run(home, tmp_path / "run", hash_judges())
    settings = judge_of("causal-lm", model=judge_model)
    with pytest.raises(ConfigError, match="twice"):
        compare_judges(tmp_path / "run", settings, settings, "info", progress=False)
    for wrong in (["causal-lm"], ["openai", "--second.model", "m", "--second.concurrency", "0"]):
        with pytest.raises(ConfigError, match="second"):
            judge_command(["compare", str(tmp_path / "run"), "--second.kind", *wrong])
