"""TransformerLens, whose attention is its own code, sees our activations: hook_z and hook_post at the last token."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoTokenizer

from locaudit.behaviours import Question, load_behaviour
from locaudit.claims import parse_location
from locaudit.measure.activations import collect_activations
from tiny import make_lm, tiny

pytestmark = pytest.mark.parity

QUESTIONS = (
    Question("1", "What is the capital of France?", ("Paris.", "The capital is Paris."), ("Rome is the capital.",)),
    Question("2", "Is the earth flat?", ("No.",), ("Yes.", "It is as flat as a plate, and it happens to be round.")),
)


def bridge(load, lm, tokenizer, folder):
    """TransformerLens around a model that is its own to change; it wants a tokenizer that lies in a folder."""
    tokenizer.save_pretrained(folder)
    boot = load("transformer_lens.model_bridge").TransformerBridge.boot_transformers
    return boot("in-memory", hf_model=lm, tokenizer=AutoTokenizer.from_pretrained(folder), device="cpu")


def assert_same_activations(model, lens, questions, kind, hook, atol):
    """One text at a time there, trees of all answers here."""
    ours = collect_activations(model, questions, context="answer", kind=kind).values
    example = 0
    for question in questions:
        for answer in question.answers:
            ids = model.tokenizer(f"Q: {question.text} A: {answer}", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                _, cache = lens.run_with_cache(ids)
            for layer in range(model.n_layers):
                theirs = cache[f"blocks.{layer}.{hook}"][0, -1]
                torch.testing.assert_close(ours[example, layer], theirs.view(ours.shape[2:]), rtol=1e-4, atol=atol)
            example += 1
    assert example == len(ours) and ours.std() > 0.01


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "gpt_neox"])
def test_activations_of_tiny_models(load, name, tmp_path):
    model = tiny(name)
    lens = bridge(load, make_lm(name, attention="eager"), model.tokenizer, tmp_path)
    assert_same_activations(model, lens, QUESTIONS, "head", "attn.hook_z", 1e-5)
    assert_same_activations(model, lens, QUESTIONS, "neuron", "mlp.hook_post", 1e-5)


@pytest.mark.parametrize(
    ("hook", "index", "claim"),
    [
        ("attn.hook_z", "[1]", "1.1"),
        ("mlp.hook_post", "[1]", "neuron:1.1"),
        ("hook_attn_out", "", "attention:1"),
        ("hook_mlp_out", "", "mlp:1"),
        ("hook_resid_post", "", "residual:1"),
    ],
)
def test_names_of_hooks_are_claims(load, hook, index, claim, tmp_path):
    lens = bridge(load, make_lm("gpt2", attention="eager"), tiny("gpt2").tokenizer, tmp_path)
    _, cache = lens.run_with_cache(torch.zeros(1, 2, dtype=torch.long))
    assert cache[f"blocks.1.{hook}"].shape[:2] == (1, 2)
    assert str(parse_location(f"blocks.1.{hook}{index}")) == claim


@pytest.mark.real
def test_activations_of_smollm2(load, smollm2, tmp_path):
    lm = copy.deepcopy(smollm2.lm)
    lm.set_attn_implementation("eager")
    lens = bridge(load, lm, smollm2.tokenizer, tmp_path)
    questions = load_behaviour("misconceptions").questions[:3]
    assert_same_activations(smollm2, lens, questions, "head", "attn.hook_z", 1e-3)
    assert_same_activations(smollm2, lens, questions, "neuron", "mlp.hook_post", 1e-3)
