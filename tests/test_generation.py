from __future__ import annotations

from functools import cache

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import GenerationConfig

from locaudit.behaviours.format import Prompt
from locaudit.edits import folded, stack, zero_edit
from locaudit.errors import ModelError
from locaudit.measure import generation
from locaudit.measure.generation import answer_text, contiguous_head, generate_answers, generate_tokens
from locaudit.measure.tree import plant
from locaudit.models import wrap_model
from reference.generation import greedy
from tiny import NAMES, chat_tokenizer, heads, make_lm, neurons, random_edit, tokenizer

QUESTIONS = ["Is the earth flat?", "What is the capital of France, and of the earth?", "Is it?", "What do you see?"]
PRIMER = "Say what is.\n\nQ: Is it round?\nA: No, it is the capital of France."
EOS = 1


@cache
def talker(name):
    """A tiny model whose next token is not the last one again, as tied embeddings would make it."""
    return wrap_model(make_lm(name, tie_word_embeddings=False, seed=3), tokenizer(), f"talker-{name}")


def prompts_of(model, primer=""):
    forest = plant(model.tokenizer, Prompt(primer=primer), [(question, ["Yes."]) for question in QUESTIONS])
    return forest.prefix, [tree.prompt for tree in forest.trees]


def edits_of(model):
    return [
        random_edit(model, heads((0, 1), (1, 2)), 1, scale=1.0),
        random_edit(model, heads((1, 0), (0, 3)), 2, scale=1.0, positions="answer"),
        random_edit(model, neurons((0, 3), (0, 4), (1, 7)), 3, scale=1.0, constant=False, positions="answer"),
        random_edit(model, neurons((0, 5), (1, 1)), 4, scale=1.0, constant=False),
    ]


@pytest.mark.parametrize("primer", ["", PRIMER], ids=["bare", "primer"])
@pytest.mark.parametrize("name", NAMES)
def test_batched_under_many_edits_equals_one_by_one_without_cache(name, primer):
    model = talker(name)
    prefix, prompts = prompts_of(model, primer)
    assert bool(prefix) == bool(primer)
    edits = edits_of(model)
    batched = generate_tokens(model, prefix, prompts, stack(model, edits), max_new_tokens=20)
    for edit, rows in zip(edits, batched, strict=True):
        assert rows == [greedy(model, prefix + prompt, edit, 20, {EOS}) for prompt in prompts]
    assert len({tuple(rows) for rows in batched}) > 1, "the edits say the same: the test shows nothing"


@pytest.mark.parametrize("name", NAMES)
def test_the_untouched_model_and_edits_that_do_nothing(name):
    model = talker(name)
    prefix, prompts = prompts_of(model, PRIMER)
    untouched = generate_tokens(model, prefix, prompts, max_new_tokens=20)[0]
    assert untouched == [greedy(model, prefix + prompt, None, 20, {EOS}) for prompt in prompts]
    sites = [("heads", 0), ("neurons", 1)]
    one, other = zero_edit(model, sites), random_edit(model, heads((0, 1)), 1)
    banked = generate_tokens(model, prefix, prompts, stack(model, [one, other, one]), max_new_tokens=20)
    assert banked[0] == banked[2] == untouched
    assert generate_tokens(model, prefix, prompts, stack(model, [one]), max_new_tokens=20)[0] == untouched
    assert generate_tokens(model, prefix, prompts, max_new_tokens=20)[0] == untouched, "an edit stayed behind"


@pytest.mark.parametrize("batch_rows", [1, 2, 3, 64])
def test_batch_size_and_order_do_not_matter(llama, batch_rows, monkeypatch):
    prefix, prompts = prompts_of(llama, PRIMER)
    bank = stack(llama, edits_of(llama))
    whole = generate_tokens(llama, prefix, prompts, bank, max_new_tokens=20)
    monkeypatch.setitem(generation.BATCH_ROWS, "cpu", batch_rows)
    assert generate_tokens(llama, prefix, prompts, bank, max_new_tokens=20) == whole
    backwards = generate_tokens(llama, prefix, prompts[::-1], bank, max_new_tokens=20)
    assert [rows[::-1] for rows in backwards] == whole


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_folded_into_the_weights_says_the_same(name):
    tiny_model = talker(name)
    prefix, prompts = prompts_of(tiny_model, PRIMER)
    edit = random_edit(tiny_model, heads((0, 1), (1, 2)), 1)
    hooked = generate_tokens(tiny_model, prefix, prompts, stack(tiny_model, [edit]), max_new_tokens=20)
    with folded(tiny_model, edit):
        assert generate_tokens(tiny_model, prefix, prompts, max_new_tokens=20) == hooked


def steered(model, token, step_bias=50.0):
    """A model whose output prefers `token` above all others."""
    head = torch.nn.Linear(model.lm.lm_head.in_features, model.lm.lm_head.out_features, bias=True)
    head.weight.data.copy_(model.lm.lm_head.weight.data)
    head.bias.data.zero_()
    head.bias.data[token] = step_bias
    model.lm.lm_head = head
    return model


def test_eos_ends_an_answer_at_once():
    model = steered(wrap_model(make_lm("llama"), tokenizer(), "ends"), EOS)
    prefix, prompts = prompts_of(model)
    assert generate_tokens(model, prefix, prompts)[0] == [(EOS,)] * len(prompts)
    assert generate_answers(model, prefix, prompts)[0] == [""] * len(prompts)


def test_every_end_token_of_the_checkpoint_counts():
    token = 7
    model = steered(wrap_model(make_lm("llama"), tokenizer(), "ends"), token)
    model.lm.generation_config.eos_token_id = [EOS, token]
    prefix, prompts = prompts_of(model)
    assert generate_tokens(model, prefix, prompts)[0] == [(token,)] * len(prompts)


class Scripted(torch.nn.Module):
    """An output layer that says a fixed text, whatever the state, one token a call."""

    def __init__(self, tokens, vocabulary):
        super().__init__()
        self.tokens, self.vocabulary, self.calls = tokens, vocabulary, 0

    def forward(self, hidden):
        logits = torch.zeros(*hidden.shape[:2], self.vocabulary)
        logits[:, :, self.tokens[min(self.calls, len(self.tokens) - 1)]] = 1.0
        self.calls += 1
        return logits


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (" No, it is.\n\nQ: Is the earth", "No, it is."),
        (" The FAQ: of it\nQ: x", "The FAQ: of it"),
        (" BBQ: a way of cooking slowly over a small fire", "BBQ: a way of cooking slowly over a small fire"),
        (" No, it is.\n\nQ", "No, it is."),
        (" It is Q", "It is Q"),
        ("Q: What?", ""),
        (" round", "round"),
    ],
)
def test_an_answer_stops_at_the_next_question(said, kept):
    model = wrap_model(make_lm("llama"), tokenizer(), "scripted")
    tokens = model.tokenizer(said, add_special_tokens=False)["input_ids"]
    model.lm.lm_head = Scripted([*tokens, EOS], len(model.tokenizer))
    _, prompts = prompts_of(model)
    rows = generate_tokens(model, (), prompts[:2], max_new_tokens=60)[0]
    text = model.tokenizer.decode(rows[0], skip_special_tokens=True)
    assert rows[0] == rows[1]
    assert text.count("Q:") <= 1 + said.startswith(" The FAQ")
    assert answer_text(model, rows[0]) == kept
    if "\nQ:" in said:
        assert text.endswith("Q:"), "decoded on after the marker"


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (" No. Q: why not?\n\nThe end of it", "No. Q: why not?"),
        (" round\nand flat\n\n\nThe end", "round\nand flat"),
        ("\n\nThe end of it", ""),
        (" round\n", "round"),
        (" It is.\nQ", "It is.\nQ"),
    ],
)
def test_a_completion_stops_at_a_paragraph_break(said, kept):
    model = wrap_model(make_lm("llama"), tokenizer(), "scripted")
    tokens = model.tokenizer(said, add_special_tokens=False)["input_ids"]
    model.lm.lm_head = Scripted([*tokens, EOS], len(model.tokenizer))
    _, prompts = prompts_of(model)
    style = Prompt("completion")
    (rows,) = generate_tokens(model, (), prompts[:2], max_new_tokens=60, answer_format=style)
    assert answer_text(model, rows[0], style) == answer_text(model, rows[1], style) == kept
    assert len(rows[0]) == len(tokens) + 1 if "\n\n" not in said else len(rows[0]) < len(tokens), "decoded on"


def test_a_chat_answer_goes_on_past_a_question_to_the_end_of_its_turn():
    said = "No. Q: why not?\n\nQ: Is it round?\nA: Yes.\nQ"
    model = wrap_model(make_lm("llama"), chat_tokenizer(), "scripted")
    tokens, after = (model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (said, "<end> more"))
    model.lm.lm_head = Scripted([*tokens, *after, EOS], len(model.tokenizer))
    forest = plant(model.tokenizer, Prompt("chat", PRIMER), [(question, ["Yes."]) for question in QUESTIONS[:2]])
    prompts = [tree.prompt for tree in forest.trees]
    for answer_format, kept in ((Prompt("chat", PRIMER), said), (Prompt(), "No.")):
        model.lm.lm_head.calls = 0
        (rows,) = generate_tokens(model, forest.prefix, prompts, max_new_tokens=60, answer_format=answer_format)
        assert answer_text(model, rows[0], answer_format) == answer_text(model, rows[1], answer_format) == kept
        if kept == said:
            assert rows[0] == (*tokens, after[0]), "decoded on after the end of the turn"


def test_the_checkpoints_own_generation_settings_rest_meanwhile(llama):
    prefix, prompts = prompts_of(llama, PRIMER)
    expected = generate_tokens(llama, prefix, prompts, max_new_tokens=20)
    own = llama.lm.generation_config
    penalised = GenerationConfig(
        repetition_penalty=5.0, no_repeat_ngram_size=1, do_sample=True, temperature=3.0, eos_token_id=EOS, max_length=3
    )
    llama.lm.generation_config = penalised
    try:
        assert generate_tokens(llama, prefix, prompts, max_new_tokens=20) == expected
        assert llama.lm.generation_config is penalised
    finally:
        llama.lm.generation_config = own


def test_no_answer_is_longer_than_allowed(llama):
    prefix, prompts = prompts_of(llama)
    assert all(len(row) <= 5 for row in generate_tokens(llama, prefix, prompts, max_new_tokens=5)[0])
    with pytest.raises(ModelError, match="context of 256"):
        generate_tokens(llama, prefix, prompts, max_new_tokens=250)


def test_an_answer_edit_leaves_the_prompt_alone_and_all_does_not(llama):
    """The two policies differ in what they do to the prompt, and only there."""
    prefix, prompts = prompts_of(llama, PRIMER)
    everywhere = random_edit(llama, heads((0, 1), (0, 2)), 5, scale=2.0)
    answer = random_edit(llama, heads((0, 1), (0, 2)), 5, scale=2.0, positions="answer")
    said = generate_tokens(llama, prefix, prompts, stack(llama, [everywhere, answer]), max_new_tokens=20)
    assert said[0] != said[1]


def test_the_heads_weights_are_not_copied_for_columns_of_a_batch():
    """A product in 16 bits: one, not one a row with as many copies of the weights."""
    lm = make_lm("llama").bfloat16()
    model = wrap_model(lm, tokenizer(), "16 bits")
    x = torch.randn(6, 4, lm.config.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad(), contiguous_head(model), profile(activities=[ProfilerActivity.CPU]) as found:
        y = lm.lm_head(x[:, -1:])
    torch.testing.assert_close(y, lm.lm_head(x)[:, -1:])
    names = {event.key for event in found.key_averages()}
    assert "aten::mm" in names and "aten::bmm" not in names
    assert not lm.lm_head._forward_pre_hooks


@pytest.mark.real
def test_the_real_model_answers_in_a_batch_as_alone(smollm2):
    forest = plant(smollm2.tokenizer, Prompt(primer="Q: What is 1 + 1?\nA: 2."), [(q, ["Yes."]) for q in QUESTIONS[:3]])
    prompts = [tree.prompt for tree in forest.trees]
    edit = random_edit(smollm2, heads((10, 1), (20, 2)), 1, scale=0.02, positions="answer")
    bank = stack(smollm2, [edit, zero_edit(smollm2, list(edit.sites))])
    rows = generate_tokens(smollm2, forest.prefix, prompts, bank, max_new_tokens=16)
    ends = {smollm2.tokenizer.eos_token_id}
    assert rows[0] == [greedy(smollm2, forest.prefix + prompt, edit, 16, ends) for prompt in prompts]
    assert rows[1] == generate_tokens(smollm2, forest.prefix, prompts, max_new_tokens=16)[0]
