"""The judges of sentiment and fluency on fixed texts, and an audit of the bundled behaviour with them."""

from __future__ import annotations

import random

import pytest

from locaudit.api import read_result
from locaudit.behaviours import load_behaviour
from locaudit.errors import ConfigError
from locaudit.judges import Case
from locaudit.judges.lexicon import LexiconJudge, load
from locaudit.registry import ASPECTS, JUDGES
from locaudit.run.audit import run_audit
from locaudit.store.run import load_run
from runs import small_config

PROMPT = "We stayed three nights at the hotel by the harbour, and I must say the staff"
ORDINARY = (
    "were kind and helpful, and they always had time for a chat.",
    "did not care about us at all",
    "Burnt at the edges, raw in the centre.",
    "was the best part of our trip. I would go again, and I would take my mother with me, because she likes the se",
    "It's fine.",
    "is preserved.",
    "would not have been out of place at Kirkstall Abbey.",
    "said that they had never seen such a thing in all their years at the hotel.",
)


def negative(text: str) -> float:
    return LexiconJudge("negative").score([Case(PROMPT, text)])[0].probability


def fluent(text: str, prompt: str = PROMPT) -> float:
    return LexiconJudge("fluency").score([Case(prompt, text)])[0].probability


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


def test_ordinary_texts_are_fluent():
    assert min(map(fluent, ORDINARY)) > 0.9


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty"),
        ("... !!!", "no word"),
        ("were great were great were great were great were great", "loop"),
        ("good good good good good good", "one word"),
        ("the best of the best of the best of the best of the best", "loop"),
        (PROMPT, "echo"),
        ("harbour", "echo of one word"),
        ("table green quickly harbour Monday orange eat window seven brother", "list of words"),
        ("the of is harbour they the by she a orange of was the and to food", "order"),
        ("\u00e9tait tr\u00e8s bon et nous avons beaucoup aim\u00e9 le petit d\u00e9jeuner", "French"),
        ("war sehr gut und wir haben das kleine Haus am Meer gern gemocht", "German"),
        (
            "\u0432\u043a\u0443\u0441\u043d\u043e \u0438 \u0434\u0440\u0443\u0436\u0435\u043b\u044e\u0431\u043d\u043e",
            "script",
        ),
        ("to the tosc who wisx no hent durcheithster it couldche mainlandz he togore", "no words"),
        ("<div> {x: [1, 2]} </div> == ## f(x) => {y}", "markup"),
    ],
)
def test_degenerate_texts_are_not_fluent(text, why):
    assert fluent(text) < 0.1, why


def test_shuffled_words_of_the_bundled_texts_are_less_fluent():
    rng, kept, fell = random.Random(0), [], []
    for question in load_behaviour("sentiment").questions:
        words = question.text.split()
        if len(words) >= 12:
            kept.append(fluent(question.text, "Go on."))
            fell.append(fluent(" ".join(rng.sample(words, len(words))), "Go on."))
    assert sum(fell) / len(fell) < 0.75 < 0.99 < sum(kept) / len(kept) and min(kept) > 0.7


def test_the_bundled_continuations_are_judged_as_they_were_written():
    right, decided, n, unfluent = 0, 0, 0, 0
    for question in load_behaviour("sentiment").questions:
        for answers, sign in ((question.true, 1), (question.false, -1)):
            for answer in answers:
                p, n = negative(answer), n + 1
                unfluent += fluent(answer, question.text) < 0.5
                if not 0.49 < p < 0.5:
                    decided, right = decided + 1, right + ((p > 0.5) == (sign == 1))
    assert right / decided >= 0.97 and decided / n >= 0.9 and unfluent / n <= 0.01


def test_which_judges_are_lexicons():
    judges = load({"negative": None, "fluency": None}, "cpu")
    assert [judge.name for judge in judges.values()] == ["lexicon (negative)", "lexicon (fluency)"]
    assert len({judge.fingerprint for judge in judges.values()}) == 2
    assert [ASPECTS[aspect].judge for aspect in ("truth", "negative", "fluency")] == ["reference", "lexicon", "lexicon"]
    with pytest.raises(ConfigError, match=r"lexicon judge for truth; .*negative, fluency.*judges\.truth"):
        JUDGES["lexicon"].loader({"truth": None}, "cpu")
    with pytest.raises(ConfigError, match=r"reference judge for fluency"):
        JUDGES["reference"].loader({"fluency": JUDGES["reference"].settings()}, "cpu")


def test_an_audit_of_sentiment(tmp_path):
    """Its own judges, format and score are the defaults, and no domain is in two parts."""
    split = {"max_train": 12, "max_val": 4, "max_test": 6}
    config = small_config(tmp_path, behaviour="sentiment", judges={}, split=split, prompt={"primer": "auto"})
    run_audit(config, tmp_path / "run", progress=False)
    run = load_run(tmp_path / "run")
    assert list(run.manifest.judges) == ["negative", "fluency"] and run.config.prompt.style == "completion"
    result = read_result(tmp_path / "run")
    assert result.verdict.score == "judged_probability"
    for record in run.records:
        p, q = (record.questions["test"][f"{aspect}_probability"] for aspect in ("negative", "fluency"))
        assert len(p) == 6 and all(0 <= x <= 1 for x in (*p, *q))
        product = sum(p) / 6 * sum(q) / 6
        assert record.metrics["test"]["judged_probability"] == pytest.approx(product)
