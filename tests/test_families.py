"""Every family in the table of architectures: one tiny random model each, and all that locaudit relies on.

`check_family` is also what tools/models.py runs to write docs/models.md.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING

from locaudit.behaviours.format import Prompt
from locaudit.checkpoints import read_shape
from locaudit.edits import Edit, save_merged, stack
from locaudit.errors import ModelError
from locaudit.location import Site
from locaudit.measure.forward import answer_log_probs
from locaudit.measure.generation import generate_tokens
from locaudit.measure.tree import plant
from locaudit.models import ARCHITECTURES, load_model
from reference.edits import edited_by_hand
from reference.generation import greedy
from reference.scoring import forest_log_probs
from tiny import CONFIGS, VALUES, heads, logits, make_lm, neurons, random_edit, random_ids, residual_edit, tiny

QUESTIONS = [
    ("What is the capital of France?", ["Paris", "The capital is Rome.", "No"]),
    ("Is the earth flat?", ["No, the earth is round.", "Yes"]),
]
PRIMER = "Q: Is it?\nA: No, it is round."


def check_family(name: str, folder: Path) -> None:
    """Raise an `AssertionError` if an edit or a score in the tiny model of that family is not what it should be."""
    model = tiny(name)
    has_neurons = ARCHITECTURES[name].neurons is not None
    assert set(model.lacks) == (set() if has_neurons else {"neurons"})
    places = dict(random_edit(model, heads((0, 1), (1, 2)), 1, scale=0.3).sites)
    if has_neurons:
        places |= random_edit(model, neurons((0, 3), (1, 7)), 2, scale=0.3).sites
    edits = [
        Edit(places),
        random_edit(model, heads((1, 0)), 3, positions="answer"),
        Edit(residual_edit(model, 0, 4, rank=2, scale=0.1).sites),
    ]
    check_heads(model)
    check_trees(model, edits)
    check_edits(model, edits)
    check_weights(model, edits[0], folder)
    if not has_neurons:
        with pytest.raises(ModelError, match="a kind that this model has: head, kv-group, attention, residual"):
            model.subspaces(neurons((0, 1)))


def check_heads(model) -> None:
    """Without the values of a key-value head, the coordinates of the heads that it feeds vanish, and no others."""
    path, at = VALUES.get(model.config.model_type, ("self_attn.v_proj", 0))
    d, group = model.head_dim, model.n_heads // model.shape.n_kv_heads

    def silence(_module, _args, out):
        out = out.clone()
        out[..., at : at + d] = 0
        return out

    seen = []
    with ExitStack() as undo:
        undo.callback(model.layer(1).get_submodule(path).register_forward_hook(silence).remove)
        hook = model.projection(Site("heads", 1)).register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        undo.callback(hook.remove)
        logits(model, random_ids(1, 5))
    (mask,) = model.subspaces(heads(*((1, h) for h in range(group)))).values()
    o = seen[0].reshape(-1, len(mask))
    assert not o[:, mask].any() and o[:, ~mask].all(), "a head's coordinates are not its own"


def check_trees(model, edits) -> None:
    """One tree per question equals one row per answer, and a batch of answers equals single ones."""
    for primer in ("", PRIMER):
        forest = plant(model.tokenizer, Prompt(primer=primer), QUESTIONS)
        found = answer_log_probs(model, forest, stack(model, edits))
        for k, edit in enumerate(edits):
            for got, expected in zip(found, forest_log_probs(model, forest, edit), strict=True):
                torch.testing.assert_close(got[k], expected, rtol=2.4e-7, atol=1e-5)
    prompts = [tree.prompt for tree in forest.trees]
    batched = generate_tokens(model, forest.prefix, prompts, stack(model, edits), max_new_tokens=5)
    for edit, rows in zip(edits, batched, strict=True):
        assert rows == [greedy(model, forest.prefix + prompt, edit, 5, {1}) for prompt in prompts]


def check_edits(model, edits) -> None:
    """An edited model equals the slow twin; an edit of a head changes that head's coordinates and no others."""
    ids = random_ids(2, 7)
    before = logits(model, ids)
    for edit in edits:
        if edit.positions == "all":
            with edit.on(model):
                together = logits(model, ids)
            assert (together - before).abs().max() > 0.02, "the edit does nothing"
            for row, got in zip(ids, together, strict=True):
                with edited_by_hand(model, edit):
                    torch.testing.assert_close(got, logits(model, row[None])[0], rtol=1e-5, atol=3e-5)
    site, seen = Site("heads", 1), []
    (mask,) = model.subspaces(heads((1, 2))).values()
    projection = model.projection(site)
    for edit in (None, random_edit(model, heads((1, 2)), 5)):
        with ExitStack() as undo:
            if edit is not None:
                undo.enter_context(edit.on(model))
            last = projection.register_forward_pre_hook(lambda _m, args: seen.append(args[0].view(-1, len(mask))))
            undo.callback(last.remove)
            logits(model, ids)
    moved = seen[0] != seen[1]
    assert moved[:, mask].all() and not moved[:, ~mask].any()
    assert torch.equal(logits(model, ids), before), "the edit left something behind"


def check_weights(model, edit, folder: Path) -> None:
    """As a PEFT adapter and as a merged checkpoint, the edit gives the hooked model's logits."""
    from peft import PeftModel

    ids = random_ids(2, 7)
    with edit.on(model):
        hooked = logits(model, ids)
    adapter = edit.to_peft(folder / "adapter", model, base="none")
    adapted = PeftModel.from_pretrained(make_lm(model.config.model_type), adapter).eval()
    with torch.no_grad():
        got = adapted(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(got, hooked, rtol=1e-5, atol=3e-5)
    has_bias = all(model.projection(site).bias is not None for site in edit.sites)
    kept = edit if has_bias else without_constants(edit)
    with kept.on(model):
        hooked = logits(model, ids)
    merged = load_model(save_merged(model, kept, folder / "merged"), device="cpu")
    torch.testing.assert_close(logits(merged, ids), hooked, rtol=1e-5, atol=3e-5)
    assert read_shape(str(folder / "merged")) == merged.shape == model.shape


def without_constants(edit: Edit) -> Edit:
    """The edit with c = 0, for projections without a bias."""
    return Edit({site: replace(e, c=torch.zeros_like(e.c)) for site, e in edit.sites.items()})


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*the targeted layer of type .*Linear has no bias")
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_family(name, tmp_path):
    pytest.importorskip("peft")
    if name not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers has no {name}")
    check_family(name, tmp_path)


def test_the_page_of_models_lists_the_table():
    """Write it again with: python tools/models.py > docs/models.md."""
    page = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    rows = [re.sub(" *[|] *", "|", row).strip("|").split("|") for row in re.findall(r"^\| [a-z].*\|$", page, re.M)[1:]]
    assert [row[0] for row in rows] == sorted(ARCHITECTURES)
    for name, kinds, paths, result in rows:
        entry = ARCHITECTURES[name]
        assert paths.replace("`", "").split(", ") == [x for x in (entry.layers, entry.heads, entry.neurons) if x]
        assert ("neuron" in kinds) == (entry.neurons is not None) and result == "passed"
