"""The judge of fluency: what it reads, its fit, and an audit of the behaviour `sentiment` with it."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch

from locaudit.api import read_result
from locaudit.behaviours import load_behaviour
from locaudit.errors import ConfigError
from locaudit.judges import Case, likelihood
from locaudit.judges.likelihood import FEATURES, LikelihoodJudge, load_likelihood_judge, token_logs
from locaudit.registry import ASPECTS, JUDGES
from locaudit.run.audit import run_audit
from locaudit.store.run import load_run
from runs import small_config

sys.path.append(str(Path(__file__).parents[1] / "tools" / "judge"))
from fluency import fit_fluency  # noqa: E402

PROMPT = "We stayed three nights at the hotel by the harbour, and I must say the staff"
ORDINARY = (
    "were kind and helpful, and they always had time for a chat.",
    "did not care about us at all",
    "was the best part of our trip. I would go again, and I would take my mother with me, because she likes the se",
    "It's fine.",
    "is preserved.",
    "would not have been out of place at Kirkstall Abbey.",
    "said that they had never seen such a thing in all their years at the hotel.",
)


@pytest.fixture(scope="module")
def fluent(smollm2):
    judge = load_likelihood_judge(model=smollm2)
    return lambda texts, prompt=PROMPT: [j.probability for j in judge.score([Case(prompt, text) for text in texts])]


def test_log_probabilities_are_those_of_single_texts(llama):
    texts = [
        ("What do you", "see?"),
        ("", "No."),
        ("What do you", "say, then?"),
        ("Is", "it?"),
        ("What do you", "see?"),
    ]
    for (prompt, answer), found in zip(texts, token_logs(llama, texts), strict=True):
        head = [1, *llama.tokenizer(prompt)["input_ids"]]
        ids = llama.tokenizer(f" {answer}")["input_ids"]
        logits = llama.lm(input_ids=torch.tensor([head + ids])).logits[0, len(head) - 1 : -1]
        torch.testing.assert_close(found, logits.log_softmax(1)[range(len(ids)), ids], atol=1e-5, rtol=0)


def test_texts_of_any_length_are_judged_and_those_without_words_or_of_the_prompt_are_not_fluent(llama):
    judge = load_likelihood_judge(model=llama)
    texts = ("", "... !!!", "It is, it", "so it is " * 400, "it is")
    found = [j.probability for j in judge.score([Case("Is it? " * 400, text) for text in texts])]
    assert found[:3] == [0, 0, 0] and all(0 < p < 1 for p in found[3:]) and judge.score([]) == []


def test_the_fingerprint_tells_weights_and_models_apart(llama):
    judge = load_likelihood_judge(model=llama)
    other = LikelihoodJudge({**judge.weights, "bias": 9.0}, model=llama)
    assert len({judge.fingerprint, other.fingerprint, load_likelihood_judge("cpu").fingerprint}) == 3
    assert load_likelihood_judge(model=llama).fingerprint == judge.fingerprint


def test_only_fluency_is_judged_by_likelihood():
    assert ASPECTS["fluency"].judge == "likelihood"
    with pytest.raises(ConfigError, match=r"likelihood judge for info; .*\(fluency\).*judges\.info"):
        JUDGES["likelihood"].loader({"info": None}, "cpu")


def test_a_fit_tells_loops_from_texts(llama):
    """Where readers agree: of each pair, the second text repeats itself; rows on which they differ are left out."""
    rows = []
    for i in range(12):
        for text, label in ((f"was number {i} of them all", "yes"), (f"was {i} of was {i} of was {i} of", "no")):
            rows.append({"prompt": f"House {i}", "continuation": text, "fluent_a": label, "fluent_b": label})
    rows.append({**rows[0], "fluent_a": "no"})
    weights, accuracy = fit_fluency(rows, llama)
    assert list(weights) == [*FEATURES, "bias"] and accuracy == 1 and weights["variety"] > 0
    judge = LikelihoodJudge(weights, model=llama)
    cases = [Case(row["prompt"], row["continuation"]) for row in rows[:-1]]
    assert [j.probability > 0.5 for j in judge.score(cases)] == [True, False] * 12


@pytest.mark.real
def test_ordinary_texts_are_fluent(fluent):
    assert min(fluent(ORDINARY)) > 0.7
    assert fluent(["100%"], "One week with the new phone. Battery:")[0] > 0.5


@pytest.mark.real
def test_degenerate_texts_are_not_fluent(fluent):
    texts = [
        "",
        "... !!!",
        "were great were great were great were great were great",
        "good good good good good good",
        "the best of the best of the best of the best of the best",
        PROMPT,
        "table green quickly harbour Monday orange eat window seven brother",
        "the of is harbour they the by she a orange of was the and to food",
        "war sehr gut und wir haben das kleine Haus am Meer gern gemocht",
        "to the tosc who wisx no hent durcheithster it couldche mainlandz he togore",
        "<div> {x: [1, 2]} </div> == ## f(x) => {y}",
    ]
    assert max(fluent(texts)) < 0.1


@pytest.mark.real
def test_bundled_continuations_are_fluent_and_their_shuffled_words_are_not(smollm2):
    rng = random.Random(0)
    chosen = [(q.text, rng.choice(q.true + q.false)) for q in rng.sample(load_behaviour("sentiment").questions, 24)]
    long = [(prompt, text.split()) for prompt, text in chosen if len(text.split()) >= 6]
    shuffled = [Case(prompt, " ".join(rng.sample(words, len(words)))) for prompt, words in long]
    judge = load_likelihood_judge(model=smollm2)
    kept, fell = (
        [j.probability > 0.5 for j in judge.score(cases)] for cases in ([Case(*pair) for pair in chosen], shuffled)
    )
    assert sum(kept) / len(kept) > 0.9 and sum(fell) / len(fell) < 0.25


def test_an_audit_of_sentiment(tmp_path, monkeypatch, llama):
    """Its own judges, format and score are the defaults, and no domain is in two parts."""
    monkeypatch.setattr(likelihood, "load_model", lambda *_, **__: llama)
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
