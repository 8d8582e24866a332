from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from locaudit.edits import Edit, SiteEdit, folded, load_edit, save_peft_adapter, stack, zero_edit
from locaudit.errors import DataError, LocationError
from locaudit.models import output_weight, wrap_model
from tiny import heads, logits, make_lm, neurons, random_edit, random_ids, tiny, tokenizer


def mixed_edit(model, seed=0, *, constant=True, kinds="both"):
    """Heads and neurons of both layers."""
    sites = {}
    if kinds in ("both", "heads"):
        sites |= random_edit(model, heads((0, 0), (1, 1), (1, 3)), seed, constant=constant, scale=0.3).sites
    if kinds in ("both", "neurons"):
        sites |= random_edit(model, neurons((0, 2), (1, 5), (1, 6)), seed + 1, constant=constant, scale=0.3).sites
    return Edit(sites)


def run(model, edit, ids):
    everywhere = torch.zeros(ids.shape, dtype=torch.bool)
    with stack(model, [edit]).applied(model, torch.zeros(len(ids), dtype=torch.long), everywhere):
        return logits(model, ids)


@pytest.mark.parametrize("kinds", ["heads", "neurons"])
@pytest.mark.parametrize("constant", [True, False])
def test_hook_equals_folded_weights(tiny_model, constant, kinds):
    ids = random_ids(2, 9)
    edit = mixed_edit(tiny_model, constant=constant, kinds=kinds)
    before = logits(tiny_model, ids)
    hooked = run(tiny_model, edit, ids)
    with folded(tiny_model, edit):
        torch.testing.assert_close(logits(tiny_model, ids), hooked, rtol=0, atol=2e-5)
    assert (hooked - before).abs().max() > 0.05


def test_folding_follows_the_equation(tiny_model):
    """W' = W + (W b) a^T and bias' = bias + c W b, in each layer's own layout."""
    edit = mixed_edit(tiny_model)
    old = {site: output_weight(tiny_model.projection(site)).detach().double().clone() for site in edit.sites}
    bias = {site: tiny_model.projection(site).bias for site in edit.sites}
    bias = {site: 0.0 if x is None else x.detach().double().clone() for site, x in bias.items()}
    with folded(tiny_model, edit):
        for site, e in edit.sites.items():
            projection = tiny_model.projection(site)
            written = old[site] @ e.b.double()
            expected = old[site] + written[:, None] * e.a.double()[None, :]
            torch.testing.assert_close(output_weight(projection).double(), expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(projection.bias.double(), bias[site] + e.c * written, rtol=0, atol=1e-5)
            assert not projection.weight.requires_grad and not projection.bias.requires_grad


@pytest.mark.parametrize("constant", [True, False])
def test_folding_restores_the_weights(tiny_model, constant):
    """Bit for bit and as the same parameters, also after an exception inside, and with edits nested."""
    before = {name: (p, p.detach().clone()) for name, p in tiny_model.lm.named_parameters()}
    one, two = (mixed_edit(tiny_model, seed, constant=constant) for seed in (0, 5))
    with pytest.raises(ZeroDivisionError), folded(tiny_model, one), folded(tiny_model, two):
        raise ZeroDivisionError
    after = dict(tiny_model.lm.named_parameters())
    assert after.keys() == before.keys()
    for name, (parameter, value) in before.items():
        assert after[name] is parameter, name
        assert torch.equal(parameter, value), name


def test_folding_half_way_restores_too(llama):
    edit = mixed_edit(llama, kinds="heads")
    broken = Edit({**edit.sites, ("neurons", 1): SiteEdit(torch.zeros(3), torch.zeros(3), 1.0)})
    before = {name: p.detach().clone() for name, p in llama.lm.named_parameters()}
    with pytest.raises(RuntimeError), folded(llama, broken):
        pass
    after = dict(llama.lm.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*the targeted layer of type Linear has no bias")
@pytest.mark.parametrize("constant", [True, False])
def test_hook_equals_peft_adapter(tiny_model, constant, tmp_path):
    peft = pytest.importorskip("peft")
    ids = random_ids(2, 9)
    edit = mixed_edit(tiny_model, constant=constant)
    before, hooked = logits(tiny_model, ids), run(tiny_model, edit, ids)
    folder = save_peft_adapter(tiny_model, edit, tmp_path / "adapter")
    lm = make_lm(tiny_model.lm.config.model_type)  # the same seed: the same weights
    assert torch.equal(lm(input_ids=ids, use_cache=False).logits, before)
    adapted = peft.PeftModel.from_pretrained(lm, folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=ids, use_cache=False).logits, hooked, rtol=0, atol=2e-5)
        assert {name.split(".lora_")[0] for name, _ in adapted.named_parameters() if ".lora_A" in name} == {
            f"base_model.model.{name}"
            for name, module in tiny_model.lm.named_modules()
            if any(module is tiny_model.projection(site) for site in edit.sites)
        }
        has_bias = all(tiny_model.projection(site).bias is not None for site in edit.sites)
        if has_bias or not constant:  # PEFT cannot merge a bias into a layer without one
            merged = adapted.merge_and_unload()
            torch.testing.assert_close(merged(input_ids=ids, use_cache=False).logits, hooked, rtol=0, atol=2e-5)
    assert (hooked - before).abs().max() > 0.05


def test_adapter_holds_the_equation(tiny_model, tmp_path):
    """A = a^T, B = W b, bias = c W b, rank and alpha 1."""
    from safetensors.torch import load_file

    edit = mixed_edit(tiny_model)
    folder = save_peft_adapter(tiny_model, edit, tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (1, 1, 0.0)
    assert config["fan_in_fan_out"] == (tiny_model.config.model_type == "gpt2")
    tensors = load_file(folder / "adapter_model.safetensors")
    names = {id(module): name for name, module in tiny_model.lm.named_modules()}
    for site, e in edit.sites.items():
        key = f"base_model.model.{names[id(tiny_model.projection(site))]}"
        written = output_weight(tiny_model.projection(site)) @ e.b
        assert torch.equal(tensors.pop(f"{key}.lora_A.weight"), e.a[None])
        torch.testing.assert_close(tensors.pop(f"{key}.lora_B.weight"), written[:, None])
        torch.testing.assert_close(tensors.pop(f"{key}.lora_B.bias"), e.c * written)
    assert not tensors


def test_answer_edits_refuse_to_become_weights(llama, tmp_path):
    edit = replace(mixed_edit(llama), positions="answer")
    with pytest.raises(LocationError, match="positions 'answer'"), folded(llama, edit):
        pass
    with pytest.raises(LocationError, match="positions 'answer'"):
        save_peft_adapter(llama, edit, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_banked_equals_separate(tiny_model):
    """K edits of different sites and both position policies in one batch, in any order of rows."""
    ids = random_ids(2, 9)
    answer = torch.zeros(2, 9, dtype=torch.bool)
    answer[:, 5:] = True
    edits = [
        mixed_edit(tiny_model, 0),
        random_edit(tiny_model, heads((1, 2)), 1, positions="answer"),
        random_edit(tiny_model, neurons((0, 7)), 2, constant=False),
        zero_edit(tiny_model, [("heads", 0)]),
    ]
    rows = torch.tensor([3, 1, 1, 0, 2, 0, 3, 2])
    which = torch.tensor([0, 0, 1, 0, 1, 1, 1, 0])
    with stack(tiny_model, edits).applied(tiny_model, rows, answer[which]):
        together = logits(tiny_model, ids[which])
    for r, (k, i) in enumerate(zip(rows.tolist(), which.tolist(), strict=True)):
        with stack(tiny_model, [edits[k]]).applied(tiny_model, torch.tensor([0]), answer[i : i + 1]):
            torch.testing.assert_close(together[r], logits(tiny_model, ids[i : i + 1])[0], rtol=0, atol=1e-5)


def test_zero_edit_changes_no_bit(tiny_model):
    ids = random_ids(2, 9)
    sites = [(kind, layer) for kind in ("heads", "neurons") for layer in range(tiny_model.n_layers)]
    assert torch.equal(run(tiny_model, zero_edit(tiny_model, sites), ids), logits(tiny_model, ids))


def test_an_answer_edit_is_idle_before_the_answer(tiny_model):
    ids = random_ids(2, 9)
    edit = replace(mixed_edit(tiny_model), positions="answer")
    assert torch.equal(run(tiny_model, edit, ids), logits(tiny_model, ids))


@pytest.mark.parametrize("positions", ["all", "answer"])
def test_saving_round_trip_is_exact(llama, tmp_path, positions):
    edit = replace(mixed_edit(llama), positions=positions)
    edit.sites["heads", 0].a[:2] = torch.tensor([1e-42, -0.0])
    path = tmp_path / "edit.safetensors"
    path.write_bytes(edit.to_bytes())
    again = load_edit(path)
    assert again.positions == positions
    assert again.sites.keys() == edit.sites.keys()
    for site, e in edit.sites.items():
        assert torch.equal(again.sites[site].a.view(torch.int32), e.a.view(torch.int32))
        assert torch.equal(again.sites[site].b.view(torch.int32), e.b.view(torch.int32))
        assert again.sites[site].c == e.c
    assert again.to_bytes() == edit.to_bytes()


def test_saving_takes_shared_and_sliced_tensors(tmp_path):
    """As rows of a trained bank are: one tensor as reader of several sites, views into a larger one, with gradients."""
    big = torch.arange(12.0).view(3, 4).requires_grad_()
    edit = Edit({("heads", k): SiteEdit(big[0], big[:, 1].repeat(2)[:4] if k else big[0], 0.5) for k in range(2)})
    path = tmp_path / "edit.safetensors"
    path.write_bytes(edit.to_bytes())
    again = load_edit(path)
    for site, e in edit.sites.items():
        assert torch.equal(again.sites[site].a, e.a)
        assert torch.equal(again.sites[site].b, e.b)


def good_file(path, metadata):
    tensors = {"heads.0.a": torch.zeros(2), "heads.0.b": torch.zeros(2)}
    save_file(tensors, path, None if metadata is None else {"locaudit": metadata})


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        "not json",
        "[]",
        "{}",
        '{"c": {"heads.0": 0.0}}',
        '{"positions": "all"}',
        '{"positions": "all", "c": [1]}',
        '{"positions": "all", "c": {"heads.1": 0.0}}',
        '{"positions": "all", "c": {"heads": 0.0}}',
        '{"positions": "all", "c": {"heads.x": 0.0}}',
        '{"positions": "all", "c": {"heads.0": "much"}}',
        '{"positions": "sometimes", "c": {"heads.0": 0.0}}',
    ],
)
def test_loading_other_safetensors_raises(tmp_path, metadata):
    path = tmp_path / "edit.safetensors"
    good_file(path, metadata)
    with pytest.raises(DataError, match="not a saved edit"):
        load_edit(path)


def test_loading_garbage_raises(llama, tmp_path):
    path = tmp_path / "edit.safetensors"
    with pytest.raises(DataError, match="not a saved edit"):
        load_edit(path)
    with pytest.raises(DataError, match="not a saved edit"):
        load_edit(tmp_path)
    content = mixed_edit(llama).to_bytes()
    for garbage in (b"", b"garbage", b"\xff" * 100, content[:50], content[:-8]):
        path.write_bytes(garbage)
        with pytest.raises(DataError, match="not a saved edit"):
            load_edit(path)


def test_finite_means_every_number(llama):
    edit = mixed_edit(llama)
    assert edit.is_finite
    site, e = next(iter(edit.sites.items()))
    for bad in (math.nan, math.inf, -math.inf):
        for broken in (
            replace(e, a=torch.full_like(e.a, bad)),
            replace(e, b=torch.where(e.b == e.b.max(), bad, e.b)),
            replace(e, c=bad),
        ):
            assert not Edit({**edit.sites, site: broken}).is_finite


def test_bfloat16_models_take_edits():
    """Edits stay float32; what differs is bfloat16's rounding, far below the edit's effect."""
    model = wrap_model(make_lm("llama").bfloat16(), tokenizer())
    edit = mixed_edit(model, kinds="heads")
    ids = random_ids(2, 9)
    before, exact = logits(tiny("llama"), ids), run(tiny("llama"), edit, ids)
    hooked = run(model, edit, ids).float()
    with folded(model, edit):
        assert model.projection(("heads", 0)).weight.dtype == torch.bfloat16
        by_weights = logits(model, ids).float()
    effect = (exact - before).abs().mean()
    assert (hooked - exact).abs().mean() < 0.2 * effect
    assert (by_weights - exact).abs().mean() < 0.2 * effect
