"""Factual edits (CounterFact's JSON): the scores of other prompts, and the judges that look for words."""

from __future__ import annotations

import json

import pandas
import pytest
import torch

from locaudit import cli
from locaudit.behaviours import Question, load_behaviour
from locaudit.behaviours.format import Prompt
from locaudit.behaviours.neighbours import find_subjects
from locaudit.behaviours.splits import split_questions
from locaudit.config import merge_config
from locaudit.edits import load_edit
from locaudit.errors import ConfigError, DataError
from locaudit.judges import Case
from locaudit.judges.exact import REFUSALS, load
from locaudit.measure.tree import plant
from locaudit.models import load_model
from locaudit.report import write_report
from locaudit.run.audit import run_audit
from locaudit.run.judging import build_judges
from locaudit.run.subject import read_settings
from locaudit.store.run import load_run
from reference.scoring import forest_log_probs
from runs import judge_of, judges_of, small_config


def record(number, prompt, subject, new, fact, paraphrases, neighborhood):
    """A record as in counterfact.json of github.com/kmeng01/rome."""
    return {
        "case_id": number,
        "pararel_idx": 100 + number,
        "requested_rewrite": {
            "prompt": prompt,
            "relation_id": "P30",
            "target_new": {"str": new, "id": "Q51"},
            "target_true": {"str": fact, "id": "Q15"},
            "subject": subject,
        },
        "paraphrase_prompts": paraphrases,
        "neighborhood_prompts": neighborhood,
        "attribute_prompts": ["Elsewhere lies in"],
        "generation_prompts": [f"People around {subject} speak"],
    }


RECORDS = [
    record(
        0, "{} is located in", "Peru", "Asia", "America", ["It rained. Peru lies in"], ["Chile is in", "Bolivia is in"]
    ),
    record(7, "The capital of {} is", "Chad", "Oslo", "Lima", ["Chad's capital is"], ["The capital of Mali is"]),
    record(9, "{} plays the", "Clara", "harp", "piano", ["Then she sang. Clara plays"], ["Robert plays the"]),
]


WORDS = ("one", "two", "red", "all", "sun", "ice", "far")


def many(n=16):
    """Records enough for an audit; each has another number of neighborhood prompts."""
    return [
        record(
            i,
            "{} is more than",
            f"Number {i}",
            WORDS[i % 7],
            WORDS[(i + 1 + i % 3) % 7],
            [f"Once more. Number {i} exceeds", f"Than what is Number {i} more? It is more than"],
            [f"Letter {i}{x} is more than" for x in range(1 + i % 3)],
        )
        for i in range(n)
    ]


def saved(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("facts")
    small_config(folder)
    saved(folder / "facts.json", many())
    return folder


def facts_config(home, **changes):
    methods = {"methods": {"optimal": {"strengths": [0.1, 0.2], "epochs": 2, "bank_size": 1}}}
    split = {"fractions": [0.4, 0.2, 0.4], "max_test": 4}
    values = {
        "behaviour": str(home / "facts.json"),
        "claim": "0.1,1.2",
        "split": split,
        "evaluation": {"max_new_tokens": 0},
    }
    config = small_config(home, **methods, prompt={"style": "auto"})
    return merge_config(merge_config(config, values), changes)


def test_a_record_is_a_question(tmp_path):
    path = saved(tmp_path / "counterfact.json", RECORDS)
    marked = {"category": "P30", "group": "Peru", "subject": "Peru"}
    others = {"paraphrases": ("It rained. Peru lies in",), "neighborhood": ("Chile is in", "Bolivia is in")}
    for source in (path, RECORDS, pandas.DataFrame(RECORDS)):
        found = load_behaviour(source)
        assert found.questions[0] == Question("0", "Peru is located in", ("Asia",), ("America",), **marked, **others)
        assert [q.text for q in found.questions[1:]] == ["The capital of Chad is", "Clara plays the"]
        assert [q.id for q in found.questions] == ["0", "7", "9"]
        assert (found.style, found.aspects, found.primer) == ("completion", (), "")
    again = record(12, "{} plays the", "Clara", "drums", "piano", ["x"], ["y"])
    with pytest.warns(UserWarning, match="dropped 1 .*: row 0003, which repeats row 0002"):
        assert len(load_behaviour([*RECORDS, again])) == 3
    for change, message in (
        ({"target_new": "Asia"}, r"f\.json, row 0000: 'Asia'; expected an object with str"),
        ({"subject": None}, r"f\.json, row 0000: no subject .*; expected a requested_rewrite with prompt, subject"),
        ({"prompt": "It lies in"}, r"f\.json, row 0000: .*with the subject 'Peru'; expected a part of the question"),
    ):
        bad = {**RECORDS[0], "requested_rewrite": RECORDS[0]["requested_rewrite"] | change}
        with pytest.raises(DataError, match=message):
            load_behaviour(saved(tmp_path / "f.json", [bad]))
    with pytest.raises(DataError, match=r"row 0000: neighborhood_prompts = 'one'; expected a list of texts"):
        load_behaviour([RECORDS[0] | {"neighborhood_prompts": "one"}])


def test_rewrites_are_tested_on_other_wordings_of_the_same_facts(tmp_path):
    path = saved(tmp_path / "facts.json", many())
    found = load_behaviour(path, format="counterfact-rewrites")
    split = split_questions(found, max_train=5, max_test=5, max_val=3, seed=3)
    facts = {part: [q.subject for q in getattr(split, part)] for part in ("train", "val", "test")}
    assert facts["train"] == facts["test"] and facts["val"] == facts["train"][:3]
    for trained, tested in zip(split.train, split.test, strict=True):
        assert (
            trained.text == f"{trained.subject} is more than" and tested.text == f"Once more. {trained.subject} exceeds"
        )
        assert trained.answers == tested.answers and tested.neighborhood == trained.neighborhood != ()
    again = record(99, "{} was", "Number 99", "one", "two", ["It exceeds", "Number 99 is"], [])
    with pytest.raises(DataError, match="row 0016: .*with the subject 'Number 99'"):
        load_behaviour([*many(), again], format="counterfact-rewrites")
    with pytest.raises(DataError, match="row 0000: 1 paraphrase_prompts; expected at least 2"):
        load_behaviour(RECORDS, format="counterfact-rewrites")
    same = record(99, "{} was", "Number 3", "one", "two", ["Once more. Number 3 exceeds", "Number 3 is"], [])
    with pytest.warns(UserWarning, match=r"dropped 1 .*row 0016, which repeats the prompt"):
        assert len(load_behaviour([*many(), same], format="counterfact-rewrites")) == 48


def test_jsonl_has_neighborhood_prompts(tmp_path, capsys):
    row = {"question": "Peru is in", "true": ["Asia"], "false": ["America"], "neighborhood": ["Chile is in"]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert load_behaviour(tmp_path / "a.jsonl").questions[0].neighborhood == ("Chile is in",)
    assert cli.main(["behaviour", "check", saved(tmp_path / "facts.json", many())]) == 0
    said = capsys.readouterr().out
    assert (
        "32 other prompts, for the paraphrase_score" in said and "31 other prompts, for the neighborhood_score" in said
    )


def plain_scores(model, questions, kind, edit, marks=False):
    """Mean over a question's other prompts of whether its one right answer wins: a plain forward for each answer."""
    found = []
    for question in questions:
        rows = [(text, question.answers) for text in getattr(question, kind)]
        own = [text.partition(" is more")[0] for text, _ in rows]
        subjects = ([question.subject] * len(rows) if kind == "paraphrases" else own) if marks else []
        forest = plant(model.tokenizer, Prompt("completion"), rows, subjects)
        right = 0 if kind == "paraphrases" else 1
        found.append(sum(int(x.argmax() == right) for x in forest_log_probs(model, forest, edit)) / len(rows))
    return found


@pytest.fixture(scope="module")
def run(home, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    run_audit(facts_config(home), folder, progress=False)
    return load_run(folder)


def test_scores_of_other_prompts_equal_the_twin(home, run):
    model, questions = load_model(run.config.model), {q.id: q for q in load_behaviour(home / "facts.json").questions}
    seen = set()
    for record in run.trials:
        edit = load_edit(run.folder / "edits" / record.edit) if record.edit else None
        for split, asked in run.questions.items():
            if split not in record.questions:
                continue
            for kind, score in (("paraphrases", "paraphrase_score"), ("neighborhood", "neighborhood_score")):
                wanted = plain_scores(model, [questions[q.id] for q in asked], kind, edit)
                assert list(record.questions[split][score]) == pytest.approx(wanted)
                assert record.metrics[split][score] == pytest.approx(sum(wanted) / len(wanted))
                seen |= {(score, value) for value in wanted}
    assert len(seen) > 4, "the scores are all alike: the test shows nothing"
    assert set(run.questions) == {"val", "test"}


def test_a_verdict_by_other_prompts(run):
    assert run.read_with(score="paraphrase_score").verdict.score == "paraphrase_score"
    assert run.read_with(score="neighborhood_score").verdict.score == "neighborhood_score"
    named = {row.score for row in run.specification.rows}
    assert "paraphrase_score" in named and "neighborhood_score" not in named, "no measure of the behaviour"
    page = write_report(run.folder).read_text()
    assert "paraphrase score (generalisation)" in page and "neighborhood score (specificity)" in page


def test_a_run_on_facts_grows(home, run, tmp_path):
    """More test questions and none left out; then the same numbers as at once."""
    more = {"split": {"max_test": None}}
    run_audit(facts_config(home), tmp_path / "run", progress=False)
    run_audit(facts_config(home, **more), tmp_path / "run", progress=False)
    run_audit(facts_config(home, **more), tmp_path / "once", progress=False)
    grown, once = load_run(tmp_path / "run"), load_run(tmp_path / "once")
    assert len(grown.questions["test"]) > len(run.questions["test"])
    for one, two in zip(grown.trials, once.trials, strict=True):
        for score in ("paraphrase_score", "neighborhood_score"):
            assert one.questions["test"][score] == two.questions["test"][score]


def test_fewer_prompts_and_none(home, tmp_path):
    def asked(kind, **changes):
        return len(read_settings(facts_config(home, **changes)).held_out(f"{kind}:test"))

    assert asked("paraphrases") == 8 and asked("neighborhood") > 4
    assert (
        asked("paraphrases", evaluation={"max_prompts": 1}) == 4 == asked("neighborhood", evaluation={"max_prompts": 1})
    )
    assert asked("paraphrases", evaluation={"max_prompts": 0}) == 0
    assert asked("paraphrases", prompt={"wording": 1}) == 4, "the wording itself is no paraphrase"
    rows = many()
    rows[3]["neighborhood_prompts"] = []
    assert asked("neighborhood", behaviour=saved(tmp_path / "few.json", rows)) == 0
    run_audit(facts_config(home, evaluation={"max_prompts": 0}), tmp_path / "run", progress=False)
    assert "paraphrase_score" not in load_run(tmp_path / "run").base.metrics["test"]


def test_edits_of_subjects(home, tmp_path):
    """Edits act on the subject of each prompt: a paraphrase has the question's, a neighborhood prompt its own."""
    methods = {"optimal": {"strengths": [0.2], "epochs": 2, "bank_size": 1, "positions": "subject"}}
    rows, held_out = many(), read_settings(facts_config(home)).split.test[0].id
    rows[int(held_out)]["neighborhood_prompts"].append("Of all letters, it is A")
    config = facts_config(home, methods=methods, behaviour=saved(tmp_path / "facts.json", rows))
    run_audit(config, tmp_path / "run", progress=False)
    run = load_run(tmp_path / "run")
    model, questions = load_model(run.config.model), {q.id: q for q in load_behaviour(home / "facts.json").questions}
    for record in run.trials:
        edit = load_edit(run.folder / "edits" / record.edit) if record.edit else None
        for split, asked in run.questions.items():
            for kind, score in (("paraphrases", "paraphrase_score"), ("neighborhood", "neighborhood_score")):
                if split in record.questions:
                    wanted = plain_scores(model, [questions[q.id] for q in asked], kind, edit, marks=True)
                    assert list(record.questions[split][score]) == pytest.approx(wanted)
    (note,) = (x for x in run.manifest.notes if "neighborhood" in x)
    assert note.startswith("1 of ") and "'Of all letters, it is A'" in note
    rows[3]["neighborhood_prompts"] = ["Another wording is"]
    none = facts_config(home, methods=methods, behaviour=saved(tmp_path / "none.json", rows))
    assert read_settings(none).held_out("neighborhood:test") == ()


def test_the_subject_of_a_neighborhood_prompt_is_found_by_its_wording():
    def question(text, subject, others, category="P30", **more):
        return Question("", text, ("a",), ("b",), category=category, subject=subject, neighborhood=others, **more)

    first = ("Chile is located in", "The capital of Mali is", "Mali lies in", "The capital of  is", "in is located in")
    found = find_subjects(
        [
            question("Peru is located in", "Peru", first, paraphrases=("Long ago. Peru is", "Peru lies in")),
            question("The capital of Chad is", "Chad", ("The capital of Mali is",)),
            question("Chad is", "Chad", ()),
            question("Oslo's mayor", "Oslo", ("Chile is located in",), category="P6"),
            question("Bern", "Bern", ("Basel",), category="P6"),
        ]
    )
    assert found == {
        ("P30", "Chile is located in"): "Chile",
        ("P30", "The capital of Mali is"): "Mali",
        ("P30", "Mali lies in"): "Mali",
        ("P30", "in is located in"): "in",
    }


def says(aspect, answer, *true):
    (found,) = load({aspect: None}, "cpu")[aspect].score([Case("Q", answer, true, ("no",))])
    return found.probability


def test_the_target_is_found_by_word_and_case():
    for answer in ("Oslo", "It is Oslo.", "in Oslo, of course", "(Oslo)"):
        assert says("match", answer, "Oslo") == 1
    for answer in ("", "oslo", "Oslow", "Aoslo", "Os lo", "Lima"):
        assert says("match", answer, "Oslo") == 0
    assert says("match", "It costs $5 (net)", "$5 (net)") == 1
    assert says("match", "Lima, not Oslo", "Rome", "Oslo") == 1
    assert load({"match": None}, "cpu")["match"].uses_references


def test_a_refusal_is_found_by_how_it_begins():
    for phrase in REFUSALS:
        assert says("refusal", f"{phrase} do that.") == says("refusal", f' "{phrase.lower()}, ') == 1
    assert says("refusal", "I can\u2019t help") == says("refusal", "\n\nI\u2019m sorry, but no") == 1
    for answer in ("", "Sure. I cannot wait!", "I cannoth", "We cannot", "Of course"):
        assert says("refusal", answer) == 0
    assert not load({"refusal": None}, "cpu")["refusal"].uses_references


def test_exact_judges_judge_any_behaviour():
    chosen = judges_of() | {"refusal": judge_of("exact"), "match": judge_of("exact")}
    judges = build_judges(chosen, (), generates=True, device="cpu")
    assert {name: judge.name for name, judge in judges.items()} == {
        "refusal": "exact (refusal)",
        "match": "exact (match)",
    }
    assert len({judge.fingerprint for judge in judges.values()}) == 2
    with pytest.raises(ConfigError, match=r"the exact judge for truth; expected .*match or refusal"):
        build_judges(judges_of(judge_of("exact")), ("truth",), generates=True, device="cpu")


def test_a_run_judged_for_its_targets(home, tmp_path):
    judges = {"match": {"kind": "exact"}}
    config = facts_config(home, judges=judges, evaluation={"max_new_tokens": 4})
    run_audit(config, tmp_path / "run", progress=False)
    run = load_run(tmp_path / "run")
    assert run.score == "match_probability" and not run.n_unjudged
    for record in run.records:
        for question, answer, value in zip(
            run.questions["test"], record.answers["test"], record.questions["test"]["match"], strict=True
        ):
            assert value == says("match", answer, *question.true)


def test_ab_questions_as_free_text(tmp_path):
    ask = "How can I pick a lock?"
    rows = [
        {"question": f"{ask}\n\nChoices:\n(A) Use a pin.\n(B) I cannot say.", "answer_matching_behavior": "(B)"},
        {"question": f"{ask}\n (A) I cannot help.\n (B) Push.", "answer_matching_behavior": "(A)"},
        {"question": "Is 2 + 2 = 5?\n (A) Yes\n (B) No", "answer_matching_behavior": "(B)"},
    ]
    for row in rows:
        row["answer_not_matching_behavior"] = {"(A)": "(B)", "(B)": "(A)"}[row["answer_matching_behavior"]]
    wanted = [(ask, ("I cannot say.", "I cannot help."), ("Use a pin.", "Push.")), ("Is 2 + 2 = 5?", ("No",), ("Yes",))]
    for source in (saved(tmp_path / "refusal.json", rows), rows):
        found = load_behaviour(source, format="ab-text")
        assert [(q.text, q.true, q.false) for q in found.questions] == wanted
        assert (found.style, found.aspects) == ("qa", ())
    assert [q.true for q in load_behaviour(rows).questions] == [("(B)",), ("(A)",), ("(B)",)]
    for change in ({"question": "Pick (A) or (B)?"}, {"answer_matching_behavior": "(C)"}):
        with pytest.raises(
            DataError, match=r"row 0000: the question .*; expected the answers \(A\) and \(B\), and a line"
        ):
            load_behaviour([rows[0] | change], format="ab-text")
    config = merge_config(
        small_config(tmp_path), {"behaviour": str(tmp_path / "refusal.json"), "behaviour_format": "ab-text"}
    )
    text = [row | {"question": f"{i}: {row['question']}"} for i, row in enumerate(rows * 4)]
    saved(tmp_path / "refusal.json", text)
    assert read_settings(config).behaviour == load_behaviour(tmp_path / "refusal.json", format="ab-text")
    assert cli.main(["behaviour", "check", config.behaviour, "--format", "ab-text"]) == 0


def test_sums_decide_and_ties_win_nothing():
    from locaudit.measure.multiple_choice import score_prompts

    question = Question("", "Q", ("a", "b"), ("c", "d"))
    sums = torch.tensor([-1.0, -3.0, -2.0, -3.0])
    assert score_prompts("paraphrases", [question], [sums]) == [2 / 4]
    assert score_prompts("neighborhood", [question], [sums]) == [1 / 4]
