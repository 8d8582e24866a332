"""What `locaudit behaviour check` says, against SciPy and scikit-learn."""

from __future__ import annotations

import re

import numpy as np
import pytest
from scipy import stats
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.naive_bayes import MultinomialNB

from locaudit import cli, load_behaviour
from locaudit.behaviours import Behaviour, Question
from locaudit.behaviours.check import FOLDS, check_behaviour
from locaudit.config import SplitConfig
from locaudit.run.subject import few_for_no


@pytest.fixture(scope="module")
def behaviour():
    return load_behaviour("misconceptions")


def test_length_is_the_mann_whitney_statistic(behaviour):
    def area(q):
        true, false = ([len(a.split()) for a in side] for side in (q.true, q.false))
        return stats.mannwhitneyu(true, false).statistic / (len(true) * len(false))

    plain = [q for q in behaviour.questions if all(a.replace(" ", "").isalpha() for a in q.answers)]
    plain = plain or [Question(str(i), f"q {i}", ("a b c", "a"), ("a b", "b c d e")) for i in range(3)]
    found = check_behaviour(Behaviour("plain", tuple(plain)))
    assert found.by_length == pytest.approx(np.mean([area(q) for q in plain]))


def test_words_are_judged_by_naive_bayes_of_other_questions(behaviour):
    questions = behaviour.questions[:60]
    ids = sorted(q.id for q in questions)
    areas = {}
    for fold in range(FOLDS):
        inside = [q for q in questions if ids.index(q.id) % FOLDS == fold]
        rest = [(a, a in q.true) for q in questions if q not in inside for a in q.answers]
        words = CountVectorizer(token_pattern=r"\w+(?:['\u2019]\w+)*", binary=True)
        nb = MultinomialNB(alpha=1, fit_prior=False).fit(
            words.fit_transform([a for a, _ in rest]), [y for _, y in rest]
        )
        for q in inside:
            odds = np.diff(nb.predict_joint_log_proba(words.transform(q.answers)), axis=1)[:, 0].round(9)
            n = len(q.true)
            areas[q.id] = stats.mannwhitneyu(odds[:n], odds[n:]).statistic / (n * len(q.false))
    found = check_behaviour(Behaviour("first", questions))
    assert found.by_words == pytest.approx(np.mean(list(areas.values())), abs=2e-3)
    assert 0.6 < found.by_words < 1


def test_command(capsys, tmp_path):
    assert cli.main(["behaviour", "check", "misconceptions"]) == 0
    said = capsys.readouterr().out
    assert "275 in 275 groups" in said and "Length or words tell many answers apart" in said
    assert cli.main(["behaviour", "check", "misconceptions-balanced"]) == 0
    assert "Length or words" not in capsys.readouterr().out
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("q,good,bad\n" + "".join(f"Q{i}?,Yes {i}.,No {i}.\n" for i in range(12)))
    for flag in ("--columns", "--behaviour-columns"):
        assert (
            cli.main(["behaviour", "check", str(pairs), flag, "prompt", "q", "chosen", "good", "rejected", "bad"]) == 0
        )
    assert cli.main(["behaviour", "check", str(tmp_path / "none.jsonl")]) == 2
    assert cli.main(["behaviour"]) == 0 and "behaviour check FILE" in capsys.readouterr().out


@pytest.mark.real
def test_with_a_model_it_prints_the_prompt_and_base_scores(capsys):
    assert cli.main(["behaviour", "check", "sentiment", "--model", "smollm2-135m", "--max-test", "4"]) == 0
    said = capsys.readouterr().out
    assert "prompt " in said and "mc2 0." in said and "4 test questions" in said


@pytest.mark.parametrize(
    "n, split, remedy",
    [
        (600, {}, ""),
        (275, {"fractions": (0.4, 0.1, 0.5)}, ""),
        (275, {}, "55 test questions .* takes 100: set --split.fractions 0.4 0.1 0.5$"),
        (275, {"max_test": 20}, "set --split.fractions 0.4 0.1 0.5 --split.max-test 100$"),
        (600, {"max_test": 99}, "99 test questions .* set --split.max-test 100$"),
        (30, {}, r"use a behaviour with at least 200 questions \(made has 30\)$"),
        (0, {}, "give more rows of the file the split test$"),
    ],
)
def test_too_few_test_questions_for_a_no(n, split, remedy):
    questions = [Question(str(i), f"q {i}", ("a",), ("b",)) for i in range(n)]
    parts = ("train", "val", "test")
    questions = questions or [Question(str(i), f"q {i}", ("a",), ("b",), split=parts[i % 3]) for i in range(9)]
    said = few_for_no(Behaviour("made", tuple(questions)), SplitConfig(**split))
    assert re.search(remedy, said) if remedy else not said
