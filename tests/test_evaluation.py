"""Multiple choice by hand, and drift against one position at a time."""

from __future__ import annotations

import math
import random
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from locaudit.behaviours import Question
from locaudit.behaviours.format import Prompt
from locaudit.edits import Edit, SiteEdit, stack, zero_edit
from locaudit.errors import DataError
from locaudit.measure import drift as drift_module
from locaudit.measure.drift import DriftText, cut_documents, measure_drift, sample_documents
from locaudit.measure.forward import answer_log_probs
from locaudit.measure.multiple_choice import METRICS, question_scores, score_questions
from locaudit.measure.tree import plant
from locaudit.models import wrap_model
from locaudit.records import mean_metrics
from locaudit.registry import OBJECTIVES
from locaudit.stats.scores import tolerance
from reference.drift import drift
from tiny import CONTEXT, every_site, heads, logits, make_lm, neurons, random_edit, random_ids, tiny, tokenizer
from toy import PRIMER, QUESTIONS

TWO_TWO = Question("1", "Q?", ("t0", "t1"), ("f0", "f1"))


def scores(sums, reference=None, question=TWO_TWO):
    sums = torch.tensor(sums)
    reference = torch.zeros_like(sums) if reference is None else torch.tensor(reference)
    return question_scores(question, sums, reference)


# Multiple choice


def test_scores_by_hand():
    got = scores([-1.0, -3.0, -2.0, -4.0], [-2.0, -2.0, -2.0, -2.0])
    e = [math.exp(x) for x in (-1, -3, -2, -4)]
    assert got["mc1"] == 1.0  # -1 > -2
    assert got["mc2"] == pytest.approx((e[0] + e[1]) / sum(e))
    assert got["mc3"] == 0.5  # t0 beats f0, t1 does not
    assert got["preference_accuracy"] == 0.75  # t1 loses to f0 only
    # r = 1, -1, 0, -2: pairs 1 > 0, 1 > -2, -1 < 0, -1 > -2
    assert got["reward_accuracy"] == 0.75
    assert got["reward_margin"] == pytest.approx((1 + 3 - 1 + 1) / 4)
    assert tuple(got) == METRICS
    assert all(isinstance(value, float) for value in got.values())


def test_ties_count_against_the_true_answer_and_half_in_rewards():
    got = scores([-2.0, -2.0, -2.0, -2.0], [-5.0, -5.0, -5.0, -5.0])
    assert got == {
        "mc1": 0.0,
        "mc2": pytest.approx(0.5),
        "mc3": 0.0,
        "preference_accuracy": 0.0,
        "reward_accuracy": 0.5,
        "reward_margin": 0.0,
    }


@given(st.lists(st.floats(-20, 0), min_size=4, max_size=4), st.sampled_from([0.05, 0.1, 0.5]))
def test_the_ipo_score_is_the_share_of_the_loss_removed(sums, tau):
    """1 - loss / loss without an edit, with the loss of training."""
    after, before = torch.tensor(sums), torch.tensor([-1.0, -2.0, -3.0, -4.0])
    loss = OBJECTIVES["ipo"].loss
    pairs = [(i, j) for i in (0, 1) for j in (2, 3)]
    margins = torch.stack([(after - before)[i] - (after - before)[j] for i, j in pairs])
    expected = 1 - loss(margins, tau).mean() / loss(torch.zeros(1), tau).mean()
    got = question_scores(TWO_TWO, after, before, aim=1 / (2 * tau))
    assert got["ipo_score"] == pytest.approx(float(expected), rel=1e-4, abs=1e-4)
    assert {name: x for name, x in got.items() if name != "ipo_score"} == question_scores(TWO_TWO, after, before)


@pytest.mark.parametrize(("best", "mc1"), [(None, 0.0), ("t0", 0.0), ("t1", 1.0)])
def test_mc1_takes_the_best_answer(best, mc1):
    """Without one, the first; not the most probable true answer."""
    assert scores([-3.0, -1.0, -2.0, -2.5], question=replace(TWO_TWO, best=best))["mc1"] == mc1


def test_one_answer_each():
    question = Question("1", "Q?", ("t",), ("f",))
    assert scores([-1.0, -2.0], question=question)["mc3"] == 1.0
    got = scores([-2.0, -1.0], question=question)
    assert (got["mc1"], got["mc3"], got["preference_accuracy"], got["reward_margin"]) == (0.0, 0.0, 0.0, -1.0)


def test_the_unedited_model_has_no_reward():
    sums = [-11.3, -7.1, -19.9, -7.2]
    got = scores(sums, sums)
    assert got["reward_accuracy"] == 0.5 and got["reward_margin"] == 0.0
    assert got["mc1"] == 0.0 and got["preference_accuracy"] == 0.75


@given(st.lists(st.floats(-30, 0, width=32), min_size=4, max_size=4), st.floats(-5000, 0))
def test_very_small_probabilities_stay_stable(sums, shift):
    """MC2 does not change when all answers become e^shift times as probable."""
    near, far = scores(sums), question_scores(TWO_TWO, torch.tensor(sums).double() + shift, torch.zeros(4))
    assert 0 <= far["mc2"] <= 1
    assert far["mc2"] == pytest.approx(near["mc2"], abs=1e-9)


@given(st.permutations([0, 1]), st.permutations([2, 3]), st.lists(st.floats(-9, 0), min_size=4, max_size=4))
def test_order_within_true_and_false_does_not_matter(true, false, sums):
    """Except for MC1, which has a best answer; that follows."""
    order = [*true, *false]
    moved = replace(TWO_TWO, true=tuple(TWO_TWO.answers[i] for i in true), best="t0")
    one = scores(sums, [-1.0, -2.0, -3.0, -4.0], replace(TWO_TWO, best="t0"))
    two = scores([sums[i] for i in order], [[-1.0, -2.0, -3.0, -4.0][i] for i in order], moved)
    assert one == pytest.approx(two, abs=1e-12)


def test_means_are_over_questions():
    rows = [torch.tensor(x) for x in ([-1.0, -3.0, -2.0, -4.0], [-5.0, -5.0, -1.0, -1.0], [-1.0, -1.0, -5.0, -5.0])]
    reference = [torch.zeros(4)] * 3
    table = score_questions((TWO_TWO,) * 3, rows, reference)
    assert table["mc1"] == (1.0, 0.0, 1.0) and table["mc3"] == (0.5, 0.0, 1.0)
    means = mean_metrics({"test": table})["test"]
    assert means["mc1"] == pytest.approx(2 / 3) and means["mc3"] == pytest.approx(0.5)
    assert table.keys() == means.keys() == set(METRICS)
    with pytest.raises(ValueError, match="shorter"):
        score_questions((TWO_TWO,) * 3, rows[:2], reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_edit_that_does_nothing_ties(dtype):
    """In another batch its log-probabilities differ from the unedited model's by rounding, within the tolerances."""
    model, name = wrap_model(make_lm("llama").to(dtype), tokenizer(), "tiny"), str(dtype).removeprefix("torch.")
    forest = plant(model.tokenizer, Prompt(primer=PRIMER), [(q.text, q.answers) for q in QUESTIONS])
    base = [x[0] for x in answer_log_probs(model, forest)]
    bank = stack(model, [zero_edit(model, every_site(model))] * 4)
    same, moved = score_questions(QUESTIONS, base, base, name), False
    for sums in (
        [x[0] for x in answer_log_probs(model, forest, row_tokens=1)],
        [x[3] for x in answer_log_probs(model, forest, bank)],
    ):
        moved |= any(not torch.equal(one, two) for one, two in zip(sums, base, strict=True))
        found = score_questions(QUESTIONS, sums, base, name)
        assert found["reward_accuracy"] == (0.5,) * len(QUESTIONS)
        for score in METRICS:
            assert abs(np.mean(found[score]) - np.mean(same[score])) <= tolerance(score, name)
    assert moved, "nothing was rounded in another way"


# Drift


def some_edits(model):
    return [
        random_edit(model, heads((0, 1), (1, 2)), 1),
        random_edit(model, heads((1, 0)), 2, positions="answer"),
        random_edit(model, neurons((0, 3), (1, 7)), 3, constant=False),
    ]


def test_drift_equals_the_float64_twin(tiny_model):
    """Running text has no prompt, so an ``answer`` edit acts on all of it too."""
    documents = random_ids(2, 7)
    text = DriftText(documents)
    (base,) = measure_drift(tiny_model, text, None)
    expected = drift(tiny_model, documents, None)
    assert base["kl"] == 0.0
    assert base["ce"] == pytest.approx(expected["ce"], abs=1e-5)
    edit = some_edits(tiny_model)[1]
    (got,) = measure_drift(tiny_model, text, stack(tiny_model, [edit]))
    expected = drift(tiny_model, documents, edit)
    assert expected["kl"] > 1e-3
    assert got["kl"] == pytest.approx(expected["kl"], rel=1e-5, abs=1e-5)
    assert got["ce"] == pytest.approx(expected["ce"], rel=1e-6, abs=1e-5)


def test_a_bank_equals_separate_edits(llama):
    documents, edits = random_ids(9, 60), some_edits(llama)
    banked = measure_drift(llama, DriftText(documents), stack(llama, edits))
    assert len({round(x["kl"], 6) for x in banked}) == 3
    for got, edit in zip(banked, edits, strict=True):
        (alone,) = measure_drift(llama, DriftText(documents), stack(llama, [edit]))
        assert got == pytest.approx(alone, rel=1e-5)


def test_banks_of_any_size_share_the_documents(llama):
    """The unedited model's kept values serve every bank, and do not depend on which came first."""
    documents, edits = random_ids(9, 60), some_edits(llama)
    text = DriftText(documents)
    first = [measure_drift(llama, text, stack(llama, edits[:n])) for n in (1, 2, 3)]
    again = DriftText(documents)
    second = [measure_drift(llama, again, stack(llama, edits[:n])) for n in (3, 2, 1)][::-1]
    assert first == second
    assert measure_drift(llama, text, None) == measure_drift(llama, DriftText(documents), None)
    assert first[0][0] == pytest.approx(first[2][0], rel=1e-5)


def test_kept_values_and_batches_do_not_matter(llama, monkeypatch):
    documents, bank = random_ids(5, 16), stack(llama, some_edits(llama)[:2])
    kept = measure_drift(llama, DriftText(documents), bank)
    for name, value in (("KEEP_BYTES", 0), ("BATCH_TOKENS", 1), ("BATCH_TOKENS", 10**6)):
        with monkeypatch.context() as patch:
            patch.setattr(drift_module, name, value)
            text = DriftText(documents)
            measure_drift(llama, text, None)
            assert bool(text._base) == (name != "KEEP_BYTES")
            for got, expected in zip(measure_drift(llama, text, bank), kept, strict=True):
                assert got == pytest.approx(expected, rel=1e-5)


def test_drift_is_a_mean_over_documents(llama):
    bank, documents = stack(llama, some_edits(llama)[:1]), random_ids(4, 12)
    whole = measure_drift(llama, DriftText(documents), bank)[0]
    each = [measure_drift(llama, DriftText(row.unsqueeze(0)), bank)[0] for row in documents]
    for key in ("kl", "ce"):
        assert whole[key] == pytest.approx(sum(x[key] for x in each) / 4, rel=1e-5)


def test_a_zero_edit_does_not_drift(tiny_model):
    text = DriftText(random_ids(3, 10))
    sites = [("heads", 0), ("neurons", 1)]
    (base,) = measure_drift(tiny_model, text, None)
    zero = zero_edit(tiny_model, sites)
    writes_only = Edit({s: SiteEdit(e.a, torch.ones_like(e.b), e.c) for s, e in zero.sites.items()})
    for edit in (zero, writes_only):
        assert measure_drift(tiny_model, text, stack(tiny_model, [edit])) == [base]
    for got in measure_drift(tiny_model, text, stack(tiny_model, [zero, some_edits(tiny_model)[0]]))[:1]:
        assert got["kl"] == pytest.approx(0, abs=1e-6) and got["ce"] == pytest.approx(base["ce"], abs=1e-5)


@given(st.integers(0, 1000), st.sampled_from([0.01, 0.3, 3.0]))
def test_kl_is_not_negative(seed, scale):
    model = tiny("llama")
    bank = stack(model, [random_edit(model, heads((0, 1)), seed, scale=scale)])
    assert measure_drift(model, DriftText(random_ids(1, 8, seed)), bank)[0]["kl"] > -1e-7


def test_an_overflowing_edit_is_told(llama):
    """Not hidden: whoever scores sees that the numbers are not finite."""
    broken = Edit({("heads", 0): SiteEdit.rank_one(torch.zeros(32), torch.full((32,), float("inf")), 1.0)})
    got = measure_drift(llama, DriftText(random_ids(2, 6)), stack(llama, [broken, some_edits(llama)[0]]))
    assert not math.isfinite(got[0]["kl"]) and not math.isfinite(got[0]["ce"])
    assert all(math.isfinite(x) for x in got[1].values())


# Documents


@pytest.fixture
def prose(tmp_path):
    path = tmp_path / "prose.txt"
    vocabulary = ["the", "earth", "is", "round", "and", "what", "do", "you", "see", "é", "😀", "nothing"]
    words = random.Random(0).choices(vocabulary, k=2000)
    path.write_text(" ".join(words), encoding="utf-8")
    return path


def test_documents_are_cut_evenly_and_repeatably(llama, prose):
    documents = cut_documents(llama, prose, 7, 20)
    assert documents.shape == (7, 20) and documents.dtype == torch.long
    assert torch.equal(documents, cut_documents(llama, str(prose), 7, 20))
    text = prose.read_text(encoding="utf-8")
    starts = [text.index(llama.tokenizer.decode(row)[:30]) for row in documents]
    assert all(low <= start <= low + 1 for low, start in zip(range(0, 10**9, len(text) // 7), starts, strict=False))
    assert not set(documents.unique().tolist()) & {0, 1, 2}, "special tokens in the text"


def test_each_document_of_a_file_begins_as_the_tokenizer_begins_a_text(llama, prose):
    special = replace(llama, tokenizer=tokenizer(bos=True, eos=True))
    documents = cut_documents(special, prose, 3, 20)
    assert documents[:, 0].tolist() == [2, 2, 2]
    assert torch.equal(documents[:, 1:], cut_documents(llama, prose, 3, 20))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 characters"),
        (b"The earth.", "10 characters.*enough text for 5 documents of 20 tokens"),
        (b"\xff\xfe\x00\x80" * 500, "not UTF-8"),
        (struct.pack("<100d", *range(100)), "not UTF-8|characters"),
    ],
)
def test_unusable_files_raise(llama, tmp_path, content, message):
    path = tmp_path / "x.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        cut_documents(llama, path, 5, 20)


def test_missing_files_raise(llama, tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(DataError, match="not a file"):
            cut_documents(llama, path, 2, 10)


def test_sampled_documents_come_from_the_seed(llama):
    before, python = torch.random.get_rng_state(), random.getstate()
    one, two, other = (sample_documents(llama, 3, 12, seed) for seed in (5, 5, 6))
    assert one.shape == (3, 13) and one.dtype == torch.long
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert len({tuple(row) for row in one.tolist()}) == 3
    assert torch.equal(torch.random.get_rng_state(), before) and random.getstate() == python


@pytest.mark.parametrize("bos", [False, True])
def test_sampled_documents_have_one_start_and_no_end(bos):
    """They have full length: no end of text inside, whatever the model would like."""
    model = wrap_model(make_lm("llama"), tokenizer(bos=bos))
    documents = sample_documents(model, 4, 40, seed=0)
    assert documents.shape == (4, 41)
    assert set(documents[:, 0].tolist()) == {2 if bos else 1}
    assert not (documents[:, 1:] == 1).any()
    assert measure_drift(model, DriftText(documents), None)[0]["ce"] > 0
    assert documents.shape[1] < CONTEXT


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.1, "top_p": 0.5, "do_sample": True},
        {"top_k": 2},
        {"min_p": 0.9},
        {"num_beams": 2},
        {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(3, 300))},
        {"bad_words_ids": [[token] for token in range(3, 300)]},
        {"sequence_bias": [[[5], 50.0]]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_the_model_alone_decides_what_is_sampled(llama, settings):
    """Not the settings for generation that come with a checkpoint; they stay as they were."""
    model = wrap_model(make_lm("llama"), tokenizer())
    for name, value in settings.items():
        setattr(model.lm.generation_config, name, value)
    assert torch.equal(sample_documents(model, 4, 40, seed=0), sample_documents(llama, 4, 40, seed=0))
    assert all(getattr(model.lm.generation_config, name) == value for name, value in settings.items())


@pytest.mark.parametrize("bos", [False, True])
def test_the_cross_entropy_of_a_models_own_samples_is_its_entropy(bos):
    """With logits as sharp as a real model's and a start token that changes them. End tokens are never sampled."""
    lm = make_lm("llama")
    with torch.no_grad():
        lm.lm_head.weight.mul_(4)
    model = wrap_model(lm, tokenizer(bos=bos))
    documents = sample_documents(model, 40, 24, seed=0)
    rows = torch.cat([torch.full((40, 1), 2 if bos else 1), documents[:, -24:]], dim=1)
    log_p = logits(model, rows)[:, :-1].log_softmax(dim=-1)
    q = log_p.exp()
    q[..., 1] = 0
    q = q / q.sum(dim=-1, keepdim=True)
    expected = -(q * log_p).sum(dim=-1)  # of -log p(token) for a token drawn from q: (documents, tokens)
    spread = ((q * log_p.square()).sum(dim=-1) - expected.square()).mean() / expected.numel()
    (own,) = measure_drift(model, DriftText(documents), None)
    assert abs(own["ce"] - float(expected.mean())) < 3 * float(spread) ** 0.5
    (unstarted,) = measure_drift(model, DriftText(documents[:, -24:]), None)
    assert unstarted["ce"] - float(expected.mean()) > 10 * float(spread) ** 0.5


def test_sampled_text_follows_the_model(llama):
    """The model finds its own samples more probable than random tokens."""
    own = measure_drift(llama, DriftText(sample_documents(llama, 8, 30, 0)), None)[0]["ce"]
    other = measure_drift(llama, DriftText(random_ids(8, 30)), None)[0]["ce"]
    assert own < other - 0.5
