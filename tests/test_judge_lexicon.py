"""The judge of sentiment on fixed texts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from locaudit.behaviours import load_behaviour
from locaudit.errors import ConfigError
from locaudit.judges import Case
from locaudit.judges.lexicon import LexiconJudge, load
from locaudit.registry import ASPECTS, JUDGES

sys.path.append(str(Path(__file__).parents[1] / "tools" / "judge"))
from readers import COLUMNS, join, read_rows, write_rows


def negative(text: str) -> float:
    return LexiconJudge().score([Case("We stayed three nights. The staff", text)])[0].probability


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ("were rude.", "were lovely."),
        ("was not good.", "was not bad at all."),
        ("wasn\u2019t good", "wasn\u2019t bad"),
        ("never once smiled.", "never once disappointed us."),
        ("failed to impress.", "never failed to impress."),
        ("could not have been worse.", "could not have been better."),
        ("I have rarely been so bored.", "I have rarely been so happy."),
        ("nothing but trouble.", "nothing but praise."),
        ("were anything but friendly.", "were anything but dull."),
        ("I don't think it is good.", "I don't think it is bad."),
        ("was fun, but the food was terrible.", "was terrible, but the food was excellent."),
        ("although charming, it was filthy.", "although noisy, it was wonderful."),
        ("got worse.", "got better."),
        ("THE WORST EVER!", "THE BEST EVER!"),
        ("bored us", "amused us"),
        ("were unhappiest there", "were happiest there"),
        ("dragged on miserably", "shone beautifully"),
        ("were full of bugs", "were free of bugs"),
        ("is a waste of time.", "is worth every penny."),
        ("is unworthy of it.", "is unspoilt."),
        ("were joyless.", "was painless."),
        ("was too strong for me.", "was strong."),
    ],
)
def test_sentiment_by_hand(bad, good):
    assert negative(bad) > 0.6 and negative(good) < 0.4


@pytest.mark.parametrize(
    "text", ["", "a table and four chairs.", "A number of people came later.", "said hello.", "Ça va? \u4f60\u597d"]
)
def test_a_text_without_a_listed_word_is_undecided_and_not_counted_as_negative(text):
    assert 0.49 < negative(text) < 0.5


def test_a_negation_alone_leans_to_negative():
    assert 0.55 < negative("is not the bread I would make.") < 0.65 and 0.55 < negative("never said a word.") < 0.65


def test_degree_and_repetition():
    assert negative("slightly rude.") < negative("rude.") < negative("very rude.") < negative("utterly horrible.")
    assert negative("rude rude rude rude.") == negative("rude.") < negative("rude and stupid.")
    assert negative("wrong. It was not wrong.") == negative("not wrong. It was wrong.") == negative("wrong.")


def test_the_opposite_of_bad_weighs_less_than_the_opposite_of_good():
    assert 1 - negative("not bad.") < negative("not good.")
    assert negative("helped the wrong people.") > negative("did not help the right people.") > 0.5


def test_the_bundled_continuations_are_judged_as_they_were_written():
    right, decided, n = 0, 0, 0
    for question in load_behaviour("sentiment").questions:
        for answers, sign in ((question.true, 1), (question.false, -1)):
            for answer in answers:
                p, n = negative(answer), n + 1
                if not 0.49 < p < 0.5:
                    decided, right = decided + 1, right + ((p > 0.5) == (sign == 1))
    assert right / decided >= 0.97 and decided / n >= 0.9


def test_a_turned_bad_word_is_no_praise_where_something_else_is_bad():
    assert negative("was a thief, but no murderer.") == negative("was a thief, but") > 0.6
    assert negative("was killed, but was not to be killed.") > 0.6 > 0.4 > negative("was not to be killed.")


def test_only_negative_is_judged_by_word_lists():
    (judge,) = load({"negative": None}, "cpu").values()
    assert judge.name == "lexicon (negative)" and ASPECTS["negative"].judge == "lexicon"
    with pytest.raises(ConfigError, match=r"lexicon judge for truth; .*\(negative\).*judges\.truth"):
        JUDGES["lexicon"].loader({"truth": None}, "cpu")


def test_labels_of_two_readers_join_texts_and_key(tmp_path):
    def write(name, columns, *rows):
        write_rows(tmp_path / name, columns.split(), rows)
        return tmp_path / name

    texts = write("texts.tsv", "id prompt continuation", ("1", "The tea", "was\nbad."), ("2", "He", 'said "no".'))
    key = write("key.tsv", "id arm", ("2", "iti-all-3"), ("1", "unedited"))
    a = write("a.tsv", "id sentiment fluent", ("1", "negative", "yes"), ("2", "neither", "yes"))
    b = write("b.tsv", "id sentiment fluent", ("2", "positive", "no"), ("1", "negative", "no"))
    write_rows(tmp_path / "all.tsv", COLUMNS, join(texts, key, a, b))
    assert [list(row.values()) for row in read_rows(tmp_path / "all.tsv")] == [
        ["1", "unedited", "The tea", "was\nbad.", "negative", "negative", "yes", "no"],
        ["2", "iti-all-3", "He", 'said "no".', "neither", "positive", "yes", "no"],
    ]
    bad = write("bad.tsv", "id sentiment fluent", ("1", "Negative", "yes"))
    with pytest.raises(SystemExit, match=r"bad\.tsv: got 1 \('Negative', 'yes'\), 2 None; expected"):
        join(texts, key, a, bad)
