from __future__ import annotations

import json
import math
import shutil
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from locaudit.edits import Edit, SiteEdit, export, folded, load_edit, save_merged, stack, zero_edit
from locaudit.edits.hooks import replaced_forwards, tensors_of
from locaudit.errors import DataError, LocationError, ModelError
from locaudit.location import ROLES, Site
from locaudit.models import CACHE, load_model, output_weight, wrap_model
from reference.generation import greedy
from tiny import (
    ablated_sites,
    ablation,
    every_site,
    heads,
    logits,
    make_lm,
    neurons,
    random_edit,
    random_ids,
    residual_edit,
    tiny,
    tokenizer,
)

POST_NORM = ("gemma2", "gemma3_text", "olmo2")
"""Architectures whose blocks normalise what their MLP returns."""


def mixed_edit(model, seed=0, *, constant=True, kinds="both", rank=1):
    """Heads and neurons of both layers."""
    options = {"constant": constant, "rank": rank, "scale": 0.3 / rank**0.5}
    sites = {}
    if kinds in ("both", "heads"):
        sites |= random_edit(model, heads((0, 0), (1, 1), (1, 3)), seed, **options).sites
    if kinds in ("both", "neurons"):
        sites |= random_edit(model, neurons((0, 2), (1, 5), (1, 6)), seed + 1, **options).sites
    return Edit(sites)


def steering(model, layer=0, seed=0):
    """A constant added to the stream that leaves a layer."""
    width = model.width(Site("residual", layer))
    v = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return Edit({Site("residual", layer): SiteEdit.rank_one(torch.zeros(width), v, 0.5)})


def joined(*edits):
    return Edit({site: e for edit in edits for site, e in edit.sites.items()})


def exportable(model, *, rank=1, constant=True):
    """All that weights can hold: heads and neurons, an ablation, and a constant in the stream where that goes."""
    edit = mixed_edit(model, constant=constant, rank=rank)
    if constant:
        edit = joined(edit, ablation(model, heads((0, 1), (0, 2))))
        if model.config.model_type not in POST_NORM:
            edit = joined(edit, steering(model))
    return edit


def run(model, edit, ids):
    everywhere = torch.zeros(ids.shape, dtype=torch.bool)
    with stack(model, [edit]).applied(model, torch.zeros(len(ids), dtype=torch.long), everywhere):
        return logits(model, ids)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("constant", [True, False])
def test_hook_equals_folded_weights(tiny_model, constant, rank):
    ids = random_ids(2, 9)
    before = logits(tiny_model, ids)
    for edit in (mixed_edit(tiny_model, constant=constant, kinds="heads", rank=rank),
                 mixed_edit(tiny_model, constant=constant, kinds="neurons", rank=rank),
                 exportable(tiny_model, constant=constant, rank=rank)):  # fmt: skip
        hooked = run(tiny_model, edit, ids)
        with folded(tiny_model, edit):
            torch.testing.assert_close(logits(tiny_model, ids), hooked, rtol=1e-5, atol=3e-5)
        assert (hooked - before).abs().max() > 0.05


def test_folding_follows_the_equation(tiny_model):
    """W' = W + (W B) A and bias' = bias + W B c, in each layer's own layout."""
    edit = mixed_edit(tiny_model, rank=2)
    old = {site: output_weight(tiny_model.projection(site)).detach().double().clone() for site in edit.sites}
    bias = {site: tiny_model.projection(site).bias for site in edit.sites}
    bias = {site: 0.0 if x is None else x.detach().double().clone() for site, x in bias.items()}
    with folded(tiny_model, edit):
        for site, e in edit.sites.items():
            projection = tiny_model.projection(site)
            written = old[site] @ e.b.double()
            expected = old[site] + written @ e.a.double()
            torch.testing.assert_close(output_weight(projection).double(), expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(projection.bias.double(), bias[site] + written @ e.c.double(), rtol=0, atol=1e-5)
            assert not projection.weight.requires_grad and not projection.bias.requires_grad


@pytest.mark.parametrize("constant", [True, False])
def test_folding_restores_the_weights(tiny_model, constant):
    """Bit for bit and as the same parameters, after an exception inside nested edits."""
    before = {name: (p, p.detach().clone()) for name, p in tiny_model.lm.named_parameters()}
    one, two = (mixed_edit(tiny_model, seed, constant=constant) for seed in (0, 5))
    with pytest.raises(ZeroDivisionError), folded(tiny_model, one), folded(tiny_model, two):
        raise ZeroDivisionError
    after = dict(tiny_model.lm.named_parameters())
    assert after.keys() == before.keys()
    for name, (parameter, value) in before.items():
        assert after[name] is parameter, name
        assert torch.equal(parameter, value), name


def test_folding_half_way_restores_too(llama, monkeypatch):
    edit = mixed_edit(llama)
    before = {name: p.detach().clone() for name, p in llama.lm.named_parameters()}
    made = []

    def parameter(*args, **options):
        if len(made) == 3:
            raise RuntimeError
        made.append(torch.nn.Parameter(*args, **options))
        return made[-1]

    monkeypatch.setattr(export, "nn", SimpleNamespace(Parameter=parameter))
    with pytest.raises(RuntimeError), folded(llama, edit):
        pass
    after = dict(llama.lm.named_parameters())
    assert len(made) == 3 and after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("site", [("neurons", 1), ("heads", 2), ("residual", 0)])
def test_an_edit_of_another_model_is_refused(llama, tmp_path, site):
    broken = Edit({**mixed_edit(llama).sites, site: SiteEdit.rank_one(torch.zeros(3), torch.zeros(3), 1.0)})
    uses = [
        lambda: stack(llama, [broken]),
        lambda: broken.cannot_become("vectors", llama),
        lambda: save_merged(llama, broken, tmp_path),
        lambda: broken.to_peft(tmp_path, llama),
    ]
    for use in uses:
        with pytest.raises(LocationError, match="an edit of 3 .*this model's shape"):
            use()
    with pytest.raises(LocationError, match="this model's shape"), broken.on(llama):
        pass


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:the base model has no folder")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*the targeted layer of type Linear has no bias")
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("constant", [True, False])
def test_hook_equals_peft_adapter(tiny_model, constant, rank, tmp_path):
    peft = pytest.importorskip("peft")
    ids = random_ids(2, 9)
    edit = exportable(tiny_model, constant=constant, rank=rank)
    before, hooked = logits(tiny_model, ids), run(tiny_model, edit, ids)
    folder = edit.to_peft(tmp_path / "adapter", tiny_model)
    lm = make_lm(tiny_model.lm.config.model_type)  # the same seed: the same weights
    assert torch.equal(lm(input_ids=ids, use_cache=False).logits, before)
    adapted = peft.PeftModel.from_pretrained(lm, folder).eval()
    by_name = peft.AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        for model in (adapted, by_name):
            torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, hooked, rtol=1e-5, atol=3e-5)
        assert {name.split(".lora_")[0] for name, _ in adapted.named_parameters() if ".lora_A" in name} == {
            f"base_model.model.{name}"
            for name, module in tiny_model.lm.named_modules()
            if any(module is tiny_model.projection(site) for site in edit.sites if site.name != "residual")
        }
        has_bias = all(tiny_model.projection(site).bias is not None for site in edit.sites if site.name != "residual")
        if has_bias or not constant:  # PEFT cannot merge a bias into a layer without one
            merged = adapted.merge_and_unload()
            torch.testing.assert_close(merged(input_ids=ids, use_cache=False).logits, hooked, rtol=1e-5, atol=3e-5)
    assert (hooked - before).abs().max() > 0.05


def test_adapter_holds_the_equation(tiny_model, tmp_path):
    """A as it is, B = W B, bias = W B c, lower ranks padded, alpha the rank."""
    edit = joined(mixed_edit(tiny_model, kinds="heads", rank=2), mixed_edit(tiny_model, kinds="neurons"))
    folder = edit.to_peft(tmp_path, tiny_model, base="org/base")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 2, 0.0)
    assert config["fan_in_fan_out"] == (tiny_model.config.model_type == "gpt2")
    assert config["base_model_name_or_path"] == "org/base" and not (tmp_path / "base").exists()
    tensors = load_file(folder / "adapter_model.safetensors")
    names = {id(module): name for name, module in tiny_model.lm.named_modules()}
    for site, e in edit.sites.items():
        key = f"base_model.model.{names[id(tiny_model.projection(site))]}"
        written = output_weight(tiny_model.projection(site)) @ e.b
        found = tensors.pop(f"{key}.lora_A.weight"), tensors.pop(f"{key}.lora_B.weight")
        rank = len(e.c)
        assert torch.equal(found[0][:rank], e.a) and not found[0][rank:].any() and not found[1][:, rank:].any()
        torch.testing.assert_close(found[1][:, :rank], written)
        torch.testing.assert_close(tensors.pop(f"{key}.lora_B.bias"), written @ e.c)
    assert not tensors


def test_the_adapter_names_a_base_that_loads(llama, tmp_path):
    """A folder by its whole path, a hub id as it is; what came from neither is saved beside the adapter."""

    def named(model):
        folder = mixed_edit(model, constant=False).to_peft(tmp_path / "adapter", model)
        return json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]

    with pytest.warns(UserWarning, match="a copy of it, 0 MB, is written to .*adapter/base"):
        saved = named(llama)
    assert saved == str(tmp_path / "adapter" / "base")
    again = load_model(saved, device="cpu")
    assert torch.equal(logits(again, random_ids(1, 5)), logits(llama, random_ids(1, 5)))
    shutil.copytree(saved, tmp_path / "model")
    assert named(load_model(tmp_path / "model", device="cpu")) == str(tmp_path / "model")
    from_hub = wrap_model(make_lm("llama"), tokenizer())
    from_hub.lm.name_or_path = "org/some-model"
    assert named(from_hub) == "org/some-model"


@pytest.mark.parametrize("rank", [1, 3])
def test_merged_weights_load_as_an_edited_model(tiny_model, tmp_path, rank):
    """With the constants where all projections have a bias, which is then one that the config keeps."""
    ids = random_ids(2, 9)
    keeps = all(tiny_model.projection(site).bias is not None for site in mixed_edit(tiny_model).sites)
    edit = exportable(tiny_model, constant=keeps, rank=rank)
    before, hooked = logits(tiny_model, ids), run(tiny_model, edit, ids)
    assert not edit.cannot_become("merged", tiny_model)
    again = load_model(save_merged(tiny_model, edit, tmp_path / "merged"), device="cpu")
    torch.testing.assert_close(logits(again, ids), hooked, rtol=1e-5, atol=3e-5)
    assert torch.equal(logits(tiny_model, ids), before)
    if not keeps:
        constant = mixed_edit(tiny_model)
        assert "has no bias by this model's config" in constant.cannot_become("merged", tiny_model)
        assert not constant.cannot_become("peft", tiny_model)
        with pytest.raises(LocationError, match="has no bias by this model's config"):
            save_merged(tiny_model, constant, tmp_path / "other")
        assert not (tmp_path / "other").exists()


def test_streams_become_weights_where_a_bias_reaches_them(tiny_model, tmp_path):
    """A constant does unless the block normalises what its MLP returns; what reads the stream never does."""
    edit, ids = steering(tiny_model, 1), random_ids(2, 9)
    why = edit.cannot_become("peft", tiny_model)
    if tiny_model.config.model_type in POST_NORM:
        assert "normalises its MLP's output" in why
    else:
        assert not why
        hooked = run(tiny_model, edit, ids)
        with folded(tiny_model, edit):
            torch.testing.assert_close(logits(tiny_model, ids), hooked, rtol=1e-5, atol=3e-5)
    stream = Site("residual", 0)
    mean = ablated_sites({stream: torch.ones(tiny_model.width(stream)).bool()})
    for reads in (residual_edit(tiny_model, 0, 1), mean):
        for form in ("peft", "merged"):
            assert "it reads the residual stream of layer 0" in reads.cannot_become(form, tiny_model)
        with pytest.raises(LocationError, match="the skip connection"):
            reads.to_peft(tmp_path / "adapter", tiny_model)
        assert not reads.cannot_become("vectors", tiny_model)
    assert not (tmp_path / "adapter").exists()


def test_an_ablation_becomes_weights_that_ignore_the_place(tiny_model):
    """W' has columns of zero there, exactly, and bias' = bias + W mean."""
    edit = ablation(tiny_model, heads((1, 0), (1, 3)))
    ((site, e),) = edit.sites.items()
    weight = output_weight(tiny_model.projection(site)).detach().clone()
    bias = tiny_model.projection(site).bias
    bias = torch.zeros(len(weight)) if bias is None else bias.detach().clone()
    with folded(tiny_model, edit):
        after = output_weight(tiny_model.projection(site))
        assert not after[:, e.mask].any() and torch.equal(after[:, ~e.mask], weight[:, ~e.mask])
        shift = tiny_model.projection(site).bias - bias
        torch.testing.assert_close(shift, weight[:, e.mask] @ e.mean[e.mask], rtol=1e-4, atol=1e-5)


def test_answer_edits_refuse_to_become_weights(llama, tmp_path):
    edit = replace(mixed_edit(llama), positions="answer")
    for use in (
        lambda: folded(llama, edit).__enter__(),
        lambda: edit.to_peft(tmp_path / "adapter", llama),
        lambda: save_merged(llama, edit, tmp_path / "adapter"),
    ):
        with pytest.raises(LocationError, match="positions 'answer'"):
            use()
    assert not (tmp_path / "adapter").exists()
    assert "positions 'answer'" in edit.cannot_become("merged", llama) and not edit.cannot_become("vectors", llama)
    with pytest.raises(LocationError, match="one of peft, merged, vectors, gguf"):
        edit.cannot_become("onnx", llama)  # pyright: ignore[reportArgumentType]


def test_banked_equals_separate(tiny_model):
    """K edits of different sites and both position policies in one batch, in any order of rows."""
    ids = random_ids(2, 9)
    answer = torch.full((2, 9), ROLES["prompt"])
    answer[:, 5:] = ROLES["answer"]
    edits = [
        mixed_edit(tiny_model, 0),
        random_edit(tiny_model, heads((1, 2)), 1, positions="answer"),
        random_edit(tiny_model, neurons((0, 7)), 2, constant=False, rank=3),
        zero_edit(tiny_model, [("heads", 0)]),
        ablation(tiny_model, heads((0, 1), (1, 2))),
        residual_edit(tiny_model, 0, 3, rank=2, positions="answer", scale=0.1),
    ]
    rows = torch.tensor([3, 1, 1, 0, 2, 0, 3, 2, 5, 4, 4, 5])
    which = torch.tensor([0, 0, 1, 0, 1, 1, 1, 0, 0, 1, 0, 1])
    with stack(tiny_model, edits).applied(tiny_model, rows, answer[which]):
        together = logits(tiny_model, ids[which])
    for r, (k, i) in enumerate(zip(rows.tolist(), which.tolist(), strict=True)):
        with stack(tiny_model, [edits[k]]).applied(tiny_model, torch.tensor([0]), answer[i : i + 1]):
            torch.testing.assert_close(together[r], logits(tiny_model, ids[i : i + 1])[0], rtol=0, atol=1e-5)


def test_a_zero_edit_and_an_answer_edit_before_the_answer_change_no_bit(tiny_model):
    ids = random_ids(2, 9)
    for edit in (zero_edit(tiny_model, every_site(tiny_model)), replace(mixed_edit(tiny_model), positions="answer")):
        assert torch.equal(run(tiny_model, edit, ids), logits(tiny_model, ids))


@pytest.mark.parametrize("positions", ["all", "answer"])
def test_saving_round_trip_is_exact(llama, tmp_path, positions):
    edit = joined(
        mixed_edit(llama, kinds="heads", rank=3), ablation(llama, neurons((0, 1))), residual_edit(llama, 1, 5)
    )
    edit = replace(edit, positions=positions)
    edit.sites["heads", 0].a[:2, :2] = torch.tensor([1e-42, -0.0])
    path = tmp_path / "edit.safetensors"
    edit.save(path)
    again = load_edit(path)
    assert again.positions == positions
    assert again.sites.keys() == edit.sites.keys() and all(isinstance(site, Site) for site in again.sites)
    for site, e in edit.sites.items():
        assert tensors_of(again.sites[site]).keys() == tensors_of(e).keys()
        for name, x in tensors_of(e).items():
            found = tensors_of(again.sites[site])[name]
            assert torch.equal(found.view(torch.uint8), x.view(torch.uint8)) and found.shape == x.shape
    assert again.to_bytes() == edit.to_bytes()


def test_files_of_the_first_edition_load(llama, tmp_path):
    """One reader and writer a site, and the constant in the metadata."""
    edit = mixed_edit(llama)
    tensors, constants = {}, {}
    for (name, layer), e in edit.sites.items():
        tensors[f"{name}.{layer}.a"], tensors[f"{name}.{layer}.b"] = e.a[0].clone(), e.b[:, 0].clone()
        constants[f"{name}.{layer}"] = e.c.item()
    path = tmp_path / "edit.safetensors"
    save_file(tensors, path, {"locaudit": json.dumps({"positions": "answer", "c": constants})})
    again = load_edit(path)
    assert again.positions == "answer" and again.sites.keys() == edit.sites.keys()
    assert replace(again, positions="all").to_bytes() == edit.to_bytes()


def test_saving_takes_shared_and_sliced_tensors(tmp_path):
    """As rows of a trained bank are: one tensor as reader of several sites, views into a larger one, with gradients."""
    big = torch.arange(12.0).view(3, 4).requires_grad_()
    writers = big[0], big[:, 1].repeat(2)[:4]
    edit = Edit({Site("heads", k): SiteEdit.rank_one(big[0], writers[k], 0.5) for k in range(2)})
    path = tmp_path / "edit.safetensors"
    path.write_bytes(edit.to_bytes())
    again = load_edit(path)
    for site, e in edit.sites.items():
        assert torch.equal(again.sites[site].a, e.a)
        assert torch.equal(again.sites[site].b, e.b)


def assert_no_edit(path):
    with pytest.raises(DataError, match="not a saved edit"):
        load_edit(path)


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
        '{"positions": "all", "file": "probes"}',
        '{"positions": "all", "file": "edit"}',
    ],
)
def test_loading_other_safetensors_raises(tmp_path, metadata):
    """Tensors of the first edition, with metadata that is no edit's."""
    path = tmp_path / "edit.safetensors"
    tensors = {"heads.0.a": torch.zeros(2), "heads.0.b": torch.zeros(2)}
    save_file(tensors, path, None if metadata is None else {"locaudit": metadata})
    assert_no_edit(path)


GOOD = {"heads.0.a": torch.zeros(1, 2), "heads.0.b": torch.zeros(2, 1), "heads.0.c": torch.zeros(1)}


@pytest.mark.parametrize(
    "changes",
    [
        {"heads.0.a": torch.zeros(2)},
        {"heads.0.b": torch.zeros(1, 2)},
        {"heads.0.c": torch.zeros(2)},
        {"heads.0.c": None},
        {"heads.0.mean": torch.zeros(2)},
        {"heads.0.mean": torch.zeros(2), "heads.0.mask": torch.zeros(3, dtype=torch.bool)},
        {"tails.0.a": torch.zeros(1, 2), "tails.0.b": torch.zeros(2, 1), "tails.0.c": torch.zeros(1)},
        {"other": torch.zeros(1)},
    ],
    ids=str,
)
def test_tensors_that_do_not_belong_together_raise(tmp_path, changes):
    path, meta = tmp_path / "edit.safetensors", {"locaudit": json.dumps({"positions": "all", "file": "edit"})}
    save_file(GOOD, path, meta)
    assert load_edit(path).sites.keys() == {("heads", 0)}
    save_file({key: x for key, x in {**GOOD, **changes}.items() if x is not None}, path, meta)
    assert_no_edit(path)


def test_loading_garbage_raises(llama, tmp_path):
    path = tmp_path / "edit.safetensors"
    assert_no_edit(path)
    assert_no_edit(tmp_path)
    content = mixed_edit(llama).to_bytes()
    for garbage in (b"", b"garbage", b"\xff" * 100, content[:50], content[:-8]):
        path.write_bytes(garbage)
        assert_no_edit(path)


def test_finite_means_every_number(llama):
    edit = mixed_edit(llama)
    assert edit.is_finite
    site, e = next(iter(edit.sites.items()))
    for bad in (math.nan, math.inf, -math.inf):
        for broken in (
            replace(e, a=torch.full_like(e.a, bad)),
            replace(e, b=torch.where(e.b == e.b.max(), bad, e.b)),
            replace(e, c=torch.full_like(e.c, bad)),
            replace(e, mask=torch.ones(len(e.b)).bool(), mean=torch.full((len(e.b),), bad)),
        ):
            assert not Edit({**edit.sites, site: broken}).is_finite


def test_bfloat16_models_take_edits():
    """Edits stay float32; what differs is bfloat16's rounding of activations, far below the edit's effect."""
    model = wrap_model(make_lm("llama").bfloat16(), tokenizer())
    edit = mixed_edit(model, kinds="heads")
    ids = random_ids(2, 9)
    before, exact = logits(tiny("llama"), ids), run(tiny("llama"), edit, ids)
    hooked = run(model, edit, ids).float()
    projection = model.projection(Site("heads", 0))
    with folded(model, edit):
        assert projection.weight.dtype == torch.float32
        assert projection(torch.zeros(1, 1, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
        by_weights = logits(model, ids).float()
    assert projection.weight.dtype == torch.bfloat16 and not projection._forward_hooks
    effect = (exact - before).abs().mean()
    assert (hooked - exact).abs().mean() < 0.2 * effect
    assert (by_weights - exact).abs().mean() < 0.2 * effect


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_folding_in_16_bits_loses_nothing_of_a_small_update(model_type):
    """Rounded to bfloat16, an update of 1 % of the weights would lose a good part, as `save_merged` says."""
    model = wrap_model(make_lm(model_type).bfloat16(), tokenizer())
    edit = random_edit(model, heads((0, 0), (1, 1), (1, 3)), 0, scale=0.03, constant=False)
    lost = update = 0.0
    with folded(model, edit):
        new = {site: output_weight(model.projection(site)).double() for site in edit.sites}
    for site, e in edit.sites.items():
        weight = output_weight(model.projection(site)).double()
        delta = weight @ e.b.double() @ e.a.double()
        assert ((new[site] - weight) - delta).norm() < 1e-4 * delta.norm()
        update += delta.square().sum()
        lost += ((weight + delta).bfloat16().double() - (weight + delta)).square().sum()
    share = (lost / update).sqrt()
    assert share > 0.1
    assert f"rounding to the model's bfloat16 would lose {share:.0%}" in edit.cannot_become("merged", model)
    assert not edit.cannot_become("peft", model)


def test_a_merged_checkpoint_says_how_much_rounding_lost(tmp_path):
    """In bfloat16 a small update is refused and a large one saved with the number; float32 loses nothing."""
    lm = make_lm("llama", tie_word_embeddings=False)
    whole, half = wrap_model(lm, tokenizer()), wrap_model(make_lm("llama").bfloat16(), tokenizer())
    small = random_edit(whole, heads((0, 0)), 0, scale=0.03, constant=False)
    large = random_edit(whole, heads((0, 0)), 0, scale=2.0, constant=False)
    with pytest.raises(LocationError, match=r"rounding to the model's bfloat16 would lose \d+%.*`to` peft.*float32"):
        save_merged(half, small, tmp_path / "small")
    assert not (tmp_path / "small").exists()
    with pytest.warns(UserWarning, match=r"rounding to bfloat16 loses 0\.\d% of the change of weights"):
        save_merged(half, large, tmp_path / "large")
    assert load_file(tmp_path / "large" / "model.safetensors")["model.embed_tokens.weight"].dtype == torch.bfloat16
    save_merged(whole, small, tmp_path / "small")  # a warning would be an error


def quantised_by_torch():
    """The tiny Llama with 8-bit weights in `torch.ao` layers, whose weight is a method that unpacks it."""
    with warnings.catch_warnings(action="ignore"):
        lm = torch.ao.quantization.quantize_dynamic(make_lm("llama"), {torch.nn.Linear}, dtype=torch.qint8)
        return wrap_model(lm, tokenizer())


def test_edits_of_quantised_layers_run_but_are_no_weights(tmp_path):
    model, ids = quantised_by_torch(), random_ids(2, 9)
    assert model.shape == tiny("llama").shape and len(model.fingerprint) == 16
    edit = mixed_edit(model)
    before, hooked = logits(model, ids), run(model, edit, ids)
    effect = run(tiny("llama"), edit, ids) - logits(tiny("llama"), ids)
    assert (hooked - before - effect).abs().mean() < 0.3 * effect.abs().mean()
    for use in (
        lambda: edit.to_peft(tmp_path / "out", model),
        lambda: save_merged(model, edit, tmp_path / "out"),
        lambda: folded(model, edit).__enter__(),
    ):
        with pytest.raises(LocationError, match=r"torch\.ao\.nn\.quantized.*without quantisation.*vectors"):
            use()
    assert not (tmp_path / "out").exists() and torch.equal(logits(model, ids), before)


class TernaryLinear(torch.nn.Linear):
    """Its weight is plain, but its forward rounds it to three values, as in BitNet."""

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.sign() * self.weight.abs().mean(), self.bias)


def test_a_layer_that_does_not_compute_its_product_is_refused(tmp_path):
    model = wrap_model(make_lm("llama"), tokenizer())
    edit = mixed_edit(model)
    model.projection(Site("neurons", 1)).__class__ = TernaryLinear
    for form in ("peft", "merged"):
        reason = edit.cannot_become(form, model)
        assert reason.startswith("the projection at neurons of layer 1 computes something else")
    with pytest.raises(LocationError, match="computes something else"), folded(model, edit):
        pass


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [8, 4])
def test_an_adapter_of_a_quantised_model_acts_as_the_hook(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain, ids = make_lm("llama", hidden_size=128, intermediate_size=256), random_ids(2, 9)
    plain.save_pretrained(tmp_path / "base")

    def quantised():
        config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, device_map="cpu")

    model = wrap_model(quantised(), tokenizer())
    assert model.shape == wrap_model(plain, tokenizer()).shape
    edit, before, fingerprint = mixed_edit(model), logits(model, ids), model.fingerprint
    for site in edit.sites:
        weight = plain.get_submodule(f"model.layers.{site.layer}.{SITE_PATHS[site.name]}").weight
        assert (output_weight(model.projection(site)) - weight).norm() < 0.2 * weight.norm()
    hooked = run(model, edit, ids)
    adapted = peft.PeftModel.from_pretrained(quantised(), edit.to_peft(tmp_path / "adapter", model, base="org/base"))
    found = adapted.eval()(input_ids=ids, use_cache=False).logits
    assert (found - hooked).abs().mean() < 0.1 * (hooked - before).abs().mean()
    with pytest.raises(LocationError, match="have quantised weights, which cannot hold it"), folded(model, edit):
        pass
    assert "quantised weights" in edit.cannot_become("merged", model)
    model.forget_fingerprint()
    assert torch.equal(logits(model, ids), before) and model.fingerprint == fingerprint


SITE_PATHS = {"heads": "self_attn.o_proj", "neurons": "mlp.down_proj"}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("target", ["down_proj", "q_proj"])
def test_a_model_with_adapter_layers_is_not_exported(target, tmp_path):
    """Its weights would be saved without the adapter, or under names that do not load."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=[target], r=2, init_lora_weights=False)
    model = wrap_model(peft.get_peft_model(make_lm("llama"), config).get_base_model(), tokenizer())
    edit, ids, before = mixed_edit(model), random_ids(2, 9), logits(model, random_ids(2, 9))
    state = {name: x.clone() for name, x in model.lm.state_dict().items()}
    hooked = run(model, edit, ids)
    for use in (lambda: edit.to_peft(tmp_path / "out", model), lambda: save_merged(model, edit, tmp_path / "out")):
        with pytest.raises(LocationError, match="adapter layers .*merge_and_unload"):
            use()
    assert not (tmp_path / "out").exists()
    if target == "q_proj":  # outside the edit
        with folded(model, edit):
            torch.testing.assert_close(logits(model, ids), hooked, rtol=1e-5, atol=3e-5)
    else:
        with pytest.raises(LocationError, match=r"peft\.tuners.*merge_and_unload"), folded(model, edit):
            pass
    assert torch.equal(logits(model, ids), before)
    assert all(torch.equal(x, state[name]) for name, x in model.lm.state_dict().items())


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_hooks_and_forwards_that_fail_half_way_are_removed(llama, kind, monkeypatch):
    """The second of several hooks or replaced forwards raises; none is left."""
    edit, ids, before = mixed_edit(llama), random_ids(2, 9), logits(llama, random_ids(2, 9))
    calls = []

    def fails(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise kind
        return register(*args, **options)

    register = torch.nn.Module.register_forward_pre_hook
    with monkeypatch.context() as patch, pytest.raises(kind):
        patch.setattr(torch.nn.Module, "register_forward_pre_hook", fails)
        with edit.on(llama):
            pass
    with pytest.raises(kind), replaced_forwards([llama.layer(0), llama.layer(1)], fails_second(kind)):
        pass
    with pytest.raises(kind), folded(llama, edit):
        raise kind
    assert torch.equal(logits(llama, ids), before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in llama.lm.modules())
    assert not any("forward" in vars(module) for module in llama.lm.modules())


def fails_second(kind):
    calls = []

    def replaced(forward):
        calls.append(forward)
        if len(calls) == 2:
            raise kind
        return lambda *args, **options: None

    return replaced


# Use


def prompts_of(tokenizer, *texts):
    return [tuple(tokenizer(text)["input_ids"]) for text in texts]


@pytest.mark.filterwarnings("ignore:.*`do_sample` is set to `False`:UserWarning")
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("positions", ["all", "answer"])
def test_generate_under_an_edit_says_what_the_twin_says(tiny_model, positions, use_cache):
    """Left-padded prompts of different lengths, transformers' own generate, with a cache and without."""
    lm, ends = tiny_model.lm, {1}
    sites = {
        **random_edit(tiny_model, heads((0, 1), (1, 0)), 1, rank=2).sites,
        **residual_edit(tiny_model, 0, 2, scale=0.3, constant=False).sites,
    }
    edit = Edit(sites, positions)
    prompts = prompts_of(tiny_model.tokenizer, "Q: Is the earth flat?", "Q: What is it that you see here?", "A")
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
    seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": use_cache, "pad_token_id": 0}
    plain = lm.generate(ids, attention_mask=seen, **options)[:, width:]
    for model in (tiny_model, lm):
        with edit.on(model) as under:
            assert under is lm
            got = lm.generate(ids, attention_mask=seen, **options)
            assert torch.equal(lm.generate(input_ids=ids, attention_mask=seen, **options), got)
        for row, prompt in zip(got[:, width:].tolist(), prompts, strict=True):
            said = greedy(tiny_model, prompt, edit, 6, ends, marker="no such text")
            assert tuple(row[: len(said)]) == said
    assert not torch.equal(got[:, width:], plain[:, : got.shape[1] - width]), "the edit says nothing new"
    assert "generate" not in vars(lm) and torch.equal(
        lm.generate(ids, attention_mask=seen, **options)[:, width:], plain
    )


def test_a_cache_is_seen_under_its_older_name_too(monkeypatch):
    """A checkpoint's own code may say `past_key_values` where transformers itself now says `cache`."""
    model, ids = tiny("llama"), random_ids(2, 9)
    forward = model.trunk.forward

    def forward_of_old_code(*args, past_key_values=None, **kwargs):
        return forward(*args, **kwargs, **{CACHE: past_key_values})

    edit = replace(mixed_edit(model, rank=2), positions="answer")
    with edit.on(model, answer_from=[4, 7]), torch.no_grad():
        caches = [model.lm(input_ids=ids[:, :6], use_cache=True)[CACHE] for _ in range(2)]
        expected = model.trunk(ids[:, 6:], use_cache=True, **{CACHE: caches[0]})[0]
        monkeypatch.setattr(model.trunk, "forward", forward_of_old_code)
        assert torch.equal(model.trunk(ids[:, 6:], use_cache=True, past_key_values=caches[1])[0], expected)


def test_plain_forwards_under_an_answer_edit_say_where_answers_begin(tiny_model):
    """One column for all rows or one a row, with a cache too; without it they raise, and nothing stays changed."""
    ids, lm = random_ids(2, 9), tiny_model.lm
    edit = replace(mixed_edit(tiny_model, rank=2), positions="answer")
    before = logits(tiny_model, ids)
    answers = ROLES["answer"] * (torch.arange(9) >= torch.tensor([[4], [7]]))
    with stack(tiny_model, [edit]).applied(tiny_model, torch.zeros(2, dtype=torch.long), answers):
        expected = logits(tiny_model, ids)
    with edit.on(lm, answer_from=[4, 7]):
        assert torch.equal(logits(tiny_model, ids), expected)
    with edit.on(tiny_model, answer_from=[4, 7]), torch.no_grad():
        first = lm(input_ids=ids[:, :6], use_cache=True)
        rest = lm(input_ids=ids[:, 6:], use_cache=True, **{CACHE: first[CACHE]})
        cached = torch.cat([first.logits, rest.logits], dim=1)
        torch.testing.assert_close(cached, expected, rtol=1e-5, atol=3e-5)
    with edit.on(tiny_model, answer_from=4):
        together = logits(tiny_model, ids)
    with edit.on(tiny_model, answer_from=[4, 4]):
        assert torch.equal(logits(tiny_model, ids), together) and torch.equal(together[0], expected[0])
    for wrong in (None, -1, [1, 2, 3], [4, -1]):
        with pytest.raises(LocationError, match="column of the last prompt token"), edit.on(lm, answer_from=wrong):
            logits(tiny_model, ids)
    assert torch.equal(logits(tiny_model, ids), before)


def test_an_exception_under_an_edit_restores_the_model(llama):
    edit, ids = replace(mixed_edit(llama), positions="answer"), random_ids(2, 9)
    before = logits(llama, ids)
    with pytest.raises(ZeroDivisionError), edit.on(llama):
        raise ZeroDivisionError
    assert torch.equal(logits(llama, ids), before) and "generate" not in vars(llama.lm)
    with pytest.raises(ModelError, match="a Model or a transformers model"), edit.on("smollm2-135m"):
        pass


def test_an_edit_of_shapes_that_do_not_fit_is_refused():
    with pytest.raises(
        LocationError, match=r"got an edit with A \(8, 2\), B \(8, 2\) and c \(2,\); expected A \(r, d\)"
    ):
        SiteEdit(torch.zeros(8, 2), torch.zeros(8, 2), torch.zeros(2))
