from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch

from locaudit.edits import Edit, SiteEdit, stack, stack_sites
from locaudit.edits.hooks import SiteTensors, apply_edit, edited, entering, record, resumed
from locaudit.errors import ModelError
from locaudit.location import Site
from locaudit.measure.residual import is_resumable
from locaudit.models import ARCHITECTURES, Architecture, Model, wrap_model
from reference.edits import edited_by_hand, edited_vector
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
    random_sites,
    residual_edit,
    tokenizer,
)


@contextmanager
def spy(model, sites):
    """What each site holds after all hooks: what its projection's forward gets, or what the next layer does."""
    seen: dict = {}
    with ExitStack() as undo:
        for site in sites:
            name, layer = site
            if name == "residual":
                last = model.layer(layer).register_forward_hook(
                    lambda _m, _a, out, site=site: seen.update(
                        {site: (out[0] if isinstance(out, tuple) else out).clone()}
                    )
                )
                undo.callback(last.remove)
                continue
            projection = model.projection(site)

            def forward(o, *, original=projection.forward, site=site):
                seen[site] = o.detach().clone()
                return original(o)

            projection.forward = forward
            undo.callback(projection.__dict__.pop, "forward")
        yield seen


def n_hooks(model: Model) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.lm.modules())


def some_edit(model, **options):
    """In the last layer, at all three sites; of rank 2 but for the heads."""
    last = model.n_layers - 1
    one = random_edit(model, heads((last, 1), (last, 2)), 1, **options)
    two = random_edit(model, neurons((last, 0), (last, 5)), 2, rank=2, **options)
    three = residual_edit(model, last, 3, rank=2, scale=0.1, **options)
    return stack(model, [type(one)({**one.sites, **two.sites, **three.sites})]).sites


def test_leaving_restores_the_model(tiny_model):
    ids = random_ids(2, 9)
    before = logits(tiny_model, ids)
    with edited(tiny_model, some_edit(tiny_model)):
        inside = logits(tiny_model, ids)
    assert (inside - before).abs().max() > 0.05
    assert n_hooks(tiny_model) == 0
    assert torch.equal(logits(tiny_model, ids), before)


def test_an_exception_inside_restores_the_model(llama):
    ids = random_ids(2, 9)
    before = logits(llama, ids)
    at = torch.tensor([0]), torch.tensor([0])
    with pytest.raises(KeyboardInterrupt), edited(llama, some_edit(llama)), record(llama, every_site(llama), at):
        logits(llama, ids)
        raise KeyboardInterrupt
    assert n_hooks(llama) == 0
    assert torch.equal(logits(llama, ids), before)


def test_an_exception_while_entering_restores_the_model(llama):
    sites = {**some_edit(llama), ("heads", 99): next(iter(some_edit(llama).values()))}
    with pytest.raises(IndexError), edited(llama, sites):
        pass
    assert n_hooks(llama) == 0


def test_zero_edits_change_no_bit(tiny_model):
    """b = 0 with any reader and constant; a = 0 and c = 0 with any writer."""
    ids = random_ids(2, 9)
    before = logits(tiny_model, ids)
    some = some_edit(tiny_model)
    silent = {k: SiteTensors(s.a, torch.zeros_like(s.b), s.c) for k, s in some.items()}
    idle = {k: SiteTensors(torch.zeros_like(s.a), s.b, torch.zeros_like(s.c)) for k, s in some.items()}
    for sites in (silent, idle):
        with edited(tiny_model, sites):
            assert torch.equal(logits(tiny_model, ids), before)
        with edited(tiny_model, sites, rows=torch.zeros(2, dtype=torch.long)):
            assert torch.equal(logits(tiny_model, ids), before)


def test_outside_the_location_nothing_moves(tiny_model):
    """In the lowest edited layer, coordinates outside the mask keep their bits; inside they move."""
    ids = random_ids(2, 9)
    sites = every_site(tiny_model)
    with spy(tiny_model, sites) as before:
        logits(tiny_model, ids)
    half = torch.arange(tiny_model.width(Site("residual", 1))) % 2 == 0
    (mask,) = tiny_model.subspaces(heads((1, 1), (1, 2))).values()
    for site, inside in ((Site("heads", 1), mask), (Site("residual", 1), half)):
        masks = {site: inside}
        for edit in (random_sites(masks, 3), random_sites(masks, 3, rank=3), ablated_sites(masks)):
            bank = stack(tiny_model, [edit])
            with edited(tiny_model, bank.sites), spy(tiny_model, sites) as after:
                logits(tiny_model, ids)
            moved = before[site] != after[site]
            assert moved[..., inside].all()
            assert not moved[..., ~inside].any()
            assert all(torch.equal(before[name, 0], after[name, 0]) for name in ("heads", "neurons", "residual"))


def test_unedited_positions_keep_their_bits(tiny_model):
    """At each site, tokens that are off keep their input; by causality so do all logits before the first edit."""
    ids = random_ids(2, 9)
    last = tiny_model.n_layers - 1
    positions = torch.zeros(2, 9, dtype=torch.bool)
    positions[0, 4:] = positions[1, 7] = True
    for edit in (
        random_edit(tiny_model, heads((last, 0)), 4),
        random_edit(tiny_model, neurons((last, 2), (last, 3)), 4, rank=3),
        residual_edit(tiny_model, last, 4),
        ablation(tiny_model, heads((last, 0))),
    ):
        bank = stack(tiny_model, [edit])
        (site,) = bank.sites
        before = logits(tiny_model, ids)
        with spy(tiny_model, [site]) as plain:
            logits(tiny_model, ids)
        with edited(tiny_model, bank.sites, positions=positions), spy(tiny_model, [site]) as seen:
            after = logits(tiny_model, ids)
        moved = (plain[site] != seen[site]).view(2, 9, -1).any(-1)
        assert torch.equal(moved, positions)
        # Last layer: later tokens read earlier ones through no further attention.
        assert torch.equal(after[~positions], before[~positions])
        assert (after[positions] != before[positions]).any(-1).all()


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apply_edit_is_the_formula(dtype, masked, rank):
    g = torch.Generator().manual_seed(0)
    h = torch.randn(2, 3, 5, generator=g).to(dtype)
    a, b, c = (torch.randn(4, *shape, generator=g) for shape in ((rank, 5), (5, rank), (rank,)))
    mask, mean = (torch.rand(4, 5, generator=g) < 0.5, torch.randn(4, 5, generator=g)) if masked else (None, None)
    rows = torch.tensor([3, 1])
    bank = SiteTensors(a, b, c, mask, mean)
    got = apply_edit(h, bank, rows, None)
    on = torch.tensor([[True, False, True], [False, True, True]])
    some = apply_edit(h, bank, rows, on)
    assert got.dtype == dtype
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.03}
    for r, k in enumerate(rows.tolist()):
        e = SiteEdit(a[k], b[k], c[k], mask[k] if masked else None, mean[k] if masked else None)
        alone = apply_edit(h[r : r + 1], stack_sites([{Site("heads", 0): e}], ("all",)).sites["heads", 0], None, None)
        torch.testing.assert_close(alone[0], got[r], **close)
        for t in range(3):
            torch.testing.assert_close(got[r, t].double(), edited_vector(h[r, t].double(), e), **close)
            torch.testing.assert_close(got[r, t].double(), edited_vector(h[r, t].double(), e.as_matrices), **close)
            assert torch.equal(some[r, t], got[r, t] if on[r, t] else h[r, t])
        if masked and not rank:
            assert torch.equal(got[r][:, mask[k]], mean[k][mask[k]].to(dtype).expand(3, -1)), "exact in every dtype"
            assert torch.equal(got[r][:, ~mask[k]], h[r][:, ~mask[k]])


def test_edited_models_equal_the_twin(tiny_model):
    """A row at a time, token by token: heads, neurons, streams and ablations, together and in one bank."""
    ids = random_ids(2, 7)
    everything = {
        **random_edit(tiny_model, heads((0, 1), (1, 0)), 1, rank=3, scale=0.3).sites,
        **random_edit(tiny_model, neurons((0, 3), (1, 4)), 2, scale=0.3).sites,
        **residual_edit(tiny_model, 0, 3, rank=2, scale=0.05).sites,
    }
    edits = [Edit(everything), residual_edit(tiny_model, 1, 4, scale=0.1), ablation(tiny_model, heads((0, 0), (1, 2)))]
    bank = stack(tiny_model, edits)
    with edited(tiny_model, bank.sites, rows=torch.arange(3).repeat_interleave(2)):
        together = logits(tiny_model, ids.repeat(3, 1)).view(3, 2, 7, -1)
    before = logits(tiny_model, ids)
    for edit, rows in zip(edits, together, strict=True):
        assert (rows - before).abs().max() > 0.05
        for row, got in zip(ids, rows, strict=True):
            with edited_by_hand(tiny_model, edit), torch.no_grad():
                expected = tiny_model.lm(input_ids=row[None], use_cache=False).logits[0]
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=3e-5)


def test_a_residual_edit_moves_what_leaves_its_layer(tiny_model):
    """What enters layer l is as it was, so that forwards may begin there."""
    ids, site = random_ids(2, 9), Site("residual", 1)
    edit = stack(tiny_model, [residual_edit(tiny_model, 1, 0, scale=0.2)])
    assert edit.lowest_layer == 1 and tiny_model.width(site) == 32
    entered = entering(tiny_model, 1, lambda: logits(tiny_model, ids))
    with edited(tiny_model, edit.sites):
        assert torch.equal(entering(tiny_model, 1, lambda: logits(tiny_model, ids)), entered)
        whole = logits(tiny_model, ids)
        assert is_resumable(tiny_model)
        with resumed(tiny_model, 1, entered):
            torch.testing.assert_close(logits(tiny_model, ids), whole, rtol=0, atol=1e-5)


@pytest.fixture
def misregistered():
    """A llama whose table entry names an attention module that its forward never calls."""
    lm = make_lm("llama")
    for layer in lm.model.layers:
        layer.self_attn.unused = torch.nn.Linear(32, 32)
    with ARCHITECTURES.temporary("llama", Architecture("model.layers", "self_attn.unused", "mlp.down_proj")):
        model = wrap_model(lm, tokenizer())
        assert "runs the heads' module of layer 0 0 times" in model.lacks["heads"]
        yield replace(model, lacks={})  # as a model that stopped calling it later


def test_a_site_that_no_forward_reaches_raises(misregistered):
    edit = stack(misregistered, [random_edit(misregistered, heads((1, 0)), 0)]).sites
    ids = random_ids(1, 4)
    with (
        pytest.raises(ModelError, match="never reached heads in layer 1"),
        edited(misregistered, edit),
    ):
        logits(misregistered, ids)
    at = torch.tensor([0]), torch.tensor([0])
    with pytest.raises(ModelError, match="never reached"), record(misregistered, [("heads", 0)], at):
        logits(misregistered, ids)
    with pytest.raises(ZeroDivisionError), edited(misregistered, edit):  # the first error is the one to see
        logits(misregistered, ids)
        raise ZeroDivisionError
    with edited(misregistered, edit):
        pass  # no forward, no complaint
    assert n_hooks(misregistered) == 0


def test_a_path_that_is_not_there_raises():
    wrong = Architecture("model.layers", "self_attn.no_such", "mlp.down_proj")
    with (
        ARCHITECTURES.temporary("llama", wrong),
        pytest.raises(ModelError, match="no_such.*setting architecture"),
    ):
        wrap_model(make_lm("llama"), tokenizer())


@pytest.mark.parametrize(
    "at", [([0, 0, 1, 2], [0, 8, 3, 5]), ([2], [1]), ([0], [7]), ([1, 0], [4, 4]), ([], [])], ids=str
)
def test_record_equals_hand_sliced_inputs(tiny_model, at):
    """Also where the rows asked for stop short of the batch's last: OPT flattens rows and tokens before its MLP."""
    row, token = (torch.tensor(x, dtype=torch.long) for x in at)
    ids = random_ids(3, 9)
    sites = every_site(tiny_model)
    with spy(tiny_model, sites) as seen, record(tiny_model, sites, (row, token)) as got:
        logits(tiny_model, ids)
    for site in sites:
        assert torch.equal(got[site], seen[site].view(3, 9, -1)[row, token])
        assert got[site].dtype == torch.float32
        assert not got[site].requires_grad


def test_record_sees_what_an_edit_outside_it_did(llama):
    ids = random_ids(2, 9)
    location = heads((1, 3))
    ((site, mask),) = llama.subspaces(location).items()
    bank = stack(llama, [random_edit(llama, location, 5)])
    at = torch.arange(2), torch.full((2,), 8)
    with record(llama, [site], at) as plain:
        logits(llama, ids)
    with edited(llama, bank.sites), record(llama, [site], at) as changed:
        logits(llama, ids)
    expected = apply_edit(plain[site].unsqueeze(1), bank.sites[site], None, None).squeeze(1)
    torch.testing.assert_close(changed[site], expected)
    assert (changed[site] != plain[site]).any(0).equal(mask)


@pytest.mark.parametrize("name", ["heads", "residual"])
def test_gradients_reach_the_edit_and_nothing_else(tiny_model, name):
    """And agree with central differences along a random direction of each of A, B and c, of ranks 1 and 2 in a bank."""
    ids = random_ids(2, 6)
    edits = [random_edit(tiny_model, heads((0, 1)), 6), random_edit(tiny_model, heads((0, 2)), 7, rank=2)]
    if name == "residual":
        edits = [residual_edit(tiny_model, 0, 6, scale=0.2), residual_edit(tiny_model, 0, 7, rank=2, scale=0.2)]
    bank = stack(tiny_model, edits)
    (site,) = bank.sites
    values = bank.sites[site]
    leaves = [x.clone().requires_grad_() for x in (values.a, values.b, values.c)]
    weights = torch.randn(2, 6, tiny_model.config.vocab_size, generator=torch.Generator().manual_seed(1))

    def loss(a, b, c):
        with edited(tiny_model, {site: SiteTensors(a, b, c)}, rows=torch.tensor([0, 1])):
            return (tiny_model.lm(input_ids=ids, use_cache=False).logits.double() * weights).mean()

    loss(*leaves).backward()
    assert all(p.grad is None for p in tiny_model.lm.parameters())
    generator = torch.Generator().manual_seed(2)
    for i, leaf in enumerate(leaves):
        assert leaf.grad is not None and leaf.grad.abs().sum() > 0
        direction = torch.randn(leaf.shape, generator=generator)
        step = 3e-4
        with torch.no_grad():
            up, down = (
                loss(*(x + sign * step * direction if j == i else x for j, x in enumerate(leaves))) for sign in (1, -1)
            )
        slope = (up - down).item() / (2 * step)
        assert slope == pytest.approx((leaf.grad * direction).sum().item(), rel=0.03, abs=5e-5)
