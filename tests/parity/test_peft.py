"""On the real model an edit is the same as folded weights and as PEFT's adapter; test_edits.py has the tiny ones."""

from __future__ import annotations

import pytest
import torch

from locaudit.behaviours import load_behaviour
from locaudit.behaviours.format import Prompt
from locaudit.edits import Edit, SiteEdit, folded, stack
from locaudit.location import Site
from locaudit.measure.activations import collect_activations
from locaudit.measure.generation import generate_tokens
from locaudit.measure.tree import plant
from locaudit.methods.iti import iti_edit, iti_theta
from tiny import ablation, heads, logits, neurons, random_edit

pytestmark = [
    pytest.mark.parity,
    pytest.mark.real,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*the targeted layer of type Linear has no bias"),
]


BASE = "smollm2-135m"  # named, so that the model's half gigabyte is not saved beside each adapter


def optimal(model, rank=1):
    options = {"rank": rank, "constant": False, "scale": 0.2 / rank**0.5}
    location = random_edit(model, heads((3, 1), (14, 3), (29, 8)), 0, **options)
    other = random_edit(model, neurons((14, 7), (20, 1000)), 1, **options)
    return Edit({**location.sites, **other.sites})


def optimal_of_rank_3(model):
    return optimal(model, rank=3)


def steering(model):
    """A constant in the stream that leaves layer 10, and the ablation of two heads."""
    width = model.width(Site("residual", 10))
    v = torch.randn(width, generator=torch.Generator().manual_seed(0))
    constant = SiteEdit.rank_one(torch.zeros(width), v, 2.0)
    return Edit({Site("residual", 10): constant, **ablation(model, heads((14, 3), (20, 1))).sites})


def iti(model):
    theta = iti_theta(collect_activations(model, load_behaviour("misconceptions").questions[:6]))
    return iti_edit(model, heads((10, 0), (14, 3), (14, 4), (20, 8)), theta, alpha=15, positions="all")


@pytest.mark.parametrize("make", [optimal, optimal_of_rank_3, iti, steering])
def test_hook_equals_folded_weights_and_adapter(load, smollm2, make, tmp_path):
    peft = load("peft")
    edit = make(smollm2)
    ids = smollm2.tokenizer("Q: What happens if you eat watermelon seeds?\nA: They pass", return_tensors="pt")[
        "input_ids"
    ]
    before = logits(smollm2, ids)
    with stack(smollm2, [edit]).applied(smollm2, torch.tensor([0]), torch.ones_like(ids, dtype=torch.bool)):
        hooked = logits(smollm2, ids)
    with folded(smollm2, edit):
        in_weights = logits(smollm2, ids)
    adapted = peft.PeftModel.from_pretrained(smollm2.lm, edit.to_peft(tmp_path, smollm2, base=BASE)).eval()
    try:
        with torch.no_grad():
            adapter = adapted(input_ids=ids, use_cache=False).logits
    finally:
        adapted.unload()
    assert (hooked - before).abs().max() > 0.3
    torch.testing.assert_close(in_weights, hooked, rtol=0, atol=2e-4)
    torch.testing.assert_close(adapter, hooked, rtol=0, atol=2e-4)
    assert torch.equal(logits(smollm2, ids), before)


def test_an_adapter_with_plain_generate_says_the_same(load, smollm2, tmp_path):
    """One prompt at a time, no padding, no shared prefix, no hooks of ours: transformers' and PEFT's own way."""
    peft = load("peft")
    edit = optimal(smollm2)
    questions = [(q.text, ["x"]) for q in load_behaviour("misconceptions").questions[:6]]
    forest = plant(smollm2.tokenizer, Prompt(primer="Q: What is 1 + 1?\nA: 2."), questions)
    prompts = [tree.prompt for tree in forest.trees]
    ours = generate_tokens(smollm2, forest.prefix, prompts, stack(smollm2, [edit]), max_new_tokens=16)[0]
    adapted = peft.PeftModel.from_pretrained(smollm2.lm, edit.to_peft(tmp_path, smollm2, base=BASE)).eval()
    try:
        for prompt, said in zip(prompts, ours, strict=True):
            ids = torch.tensor([forest.prefix + prompt])
            out = adapted.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16,
                pad_token_id=smollm2.pad_id,
            )  # fmt: skip
            assert tuple(out[0, ids.shape[1] :].tolist())[: len(said)] == said
    finally:
        adapted.unload()
    assert ours != generate_tokens(smollm2, forest.prefix, prompts, max_new_tokens=16)[0]
