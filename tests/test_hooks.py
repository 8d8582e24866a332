from __future__ import annotations

from contextlib import ExitStack, contextmanager

import pytest
import torch

from locaudit.edits import stack
from locaudit.edits.hooks import SiteTensors, apply_edit, edited, record
from locaudit.errors import ModelError
from locaudit.models import ARCHITECTURES, Architecture, Model, register_architecture, wrap_model
from tiny import heads, logits, make_lm, neurons, random_edit, random_ids, tokenizer


@contextmanager
def spy(model, sites):
    """Projection inputs as the projection itself gets them: its forward is wrapped, which runs after all pre-hooks."""
    seen: dict = {}
    with ExitStack() as undo:
        for site in sites:
            projection = model.projection(site)

            def forward(o, *, original=projection.forward, site=site):
                seen[site] = o.detach().clone()
                return original(o)

            projection.forward = forward
            undo.callback(projection.__dict__.pop, "forward")
        yield seen


def all_sites(model):
    return [(kind, layer) for kind in ("heads", "neurons") for layer in range(model.n_layers)]


def n_hooks(model: Model) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.lm.modules())


def some_edit(model, **options):
    """In the last layer, heads and neurons."""
    last = model.n_layers - 1
    one = random_edit(model, heads((last, 1), (last, 2)), 1, **options)
    two = random_edit(model, neurons((last, 0), (last, 5)), 2, **options)
    return stack(model, [type(one)({**one.sites, **two.sites})]).sites


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
    with pytest.raises(KeyboardInterrupt), edited(llama, some_edit(llama)), record(llama, all_sites(llama), at):
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
    sites = all_sites(tiny_model)
    with spy(tiny_model, sites) as before:
        logits(tiny_model, ids)
    location = heads((1, 1), (1, 2))
    (mask,) = tiny_model.masks(location).values()
    with (
        spy(tiny_model, sites) as after,
        edited(tiny_model, stack(tiny_model, [random_edit(tiny_model, location, 3)]).sites),
    ):
        logits(tiny_model, ids)
    moved = before["heads", 1] != after["heads", 1]
    assert moved[..., mask].all()
    assert not moved[..., ~mask].any()
    for kind in ("heads", "neurons"):
        assert torch.equal(before[kind, 0], after[kind, 0])


def test_unedited_positions_keep_their_bits(tiny_model):
    """At each site, tokens that are off keep their input; by causality so do all logits before the first edit."""
    ids = random_ids(2, 9)
    last = tiny_model.n_layers - 1
    positions = torch.zeros(2, 9, dtype=torch.bool)
    positions[0, 4:] = positions[1, 7] = True
    for location in (heads((last, 0)), neurons((last, 2), (last, 3))):
        bank = stack(tiny_model, [random_edit(tiny_model, location, 4)])
        (site,) = bank.sites
        before = logits(tiny_model, ids)
        with spy(tiny_model, [site]) as plain:
            logits(tiny_model, ids)
        with spy(tiny_model, [site]) as seen, edited(tiny_model, bank.sites, positions=positions):
            after = logits(tiny_model, ids)
        moved = (plain[site] != seen[site]).view(2, 9, -1).any(-1)
        assert torch.equal(moved, positions)
        # Last layer: later tokens read earlier ones through no further attention.
        assert torch.equal(after[~positions], before[~positions])
        assert (after[positions] != before[positions]).any(-1).all()


def test_each_row_gets_its_own_edit(tiny_model):
    ids = random_ids(1, 9).expand(3, -1)
    edits = [random_edit(tiny_model, heads((0, k), (1, k)), k) for k in range(3)]
    bank = stack(tiny_model, edits)
    rows = torch.tensor([2, 0, 1])
    with edited(tiny_model, bank.sites, rows=rows):
        together = logits(tiny_model, ids)
    for r, k in enumerate(rows.tolist()):
        with edited(tiny_model, stack(tiny_model, [edits[k]]).sites):
            torch.testing.assert_close(together[r], logits(tiny_model, ids[:1])[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apply_edit_is_the_formula(dtype):
    g = torch.Generator().manual_seed(0)
    o = torch.randn(2, 3, 5, generator=g).to(dtype)
    a, b, c = torch.randn(4, 5, generator=g), torch.randn(4, 5, generator=g), torch.randn(4, generator=g)
    rows = torch.tensor([3, 1])
    got = apply_edit(o, SiteTensors(a, b, c), rows, None)
    assert got.dtype == dtype
    for r, k in enumerate(rows.tolist()):
        for t in range(3):
            x = o[r, t].double()
            expected = x + (c[k].double() + a[k].double() @ x) * b[k].double()
            torch.testing.assert_close(
                got[r, t].double(),
                expected,
                rtol=1e-5 if dtype == torch.float32 else 0.02,
                atol=1e-5 if dtype == torch.float32 else 0.03,
            )


@pytest.fixture
def misregistered(monkeypatch):
    """A llama whose table entry names an attention module that its forward never calls."""
    lm = make_lm("llama")
    for layer in lm.model.layers:
        layer.self_attn.unused = torch.nn.Linear(32, 32)
    monkeypatch.setitem(ARCHITECTURES, "llama", Architecture("model.layers", "self_attn.unused", "mlp.down_proj"))
    return wrap_model(lm, tokenizer())


def test_a_site_that_no_forward_reaches_raises(misregistered):
    edit = stack(misregistered, [random_edit(misregistered, heads((1, 0)), 0)]).sites
    ids = random_ids(1, 4)
    with (
        pytest.raises(ModelError, match="never called the projection of heads in layer 1"),
        edited(misregistered, edit),
    ):
        logits(misregistered, ids)
    at = torch.tensor([0]), torch.tensor([0])
    with pytest.raises(ModelError, match="never called"), record(misregistered, [("heads", 0)], at):
        logits(misregistered, ids)
    with pytest.raises(ZeroDivisionError), edited(misregistered, edit):  # the first error is the one to see
        logits(misregistered, ids)
        raise ZeroDivisionError
    with edited(misregistered, edit):
        pass  # no forward, no complaint
    assert n_hooks(misregistered) == 0


def test_a_path_that_is_not_there_raises(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "llama", ARCHITECTURES["llama"])
    register_architecture("llama", Architecture("model.layers", "self_attn.no_such", "mlp.down_proj"))
    with pytest.raises(ModelError, match="no_such.*register the architecture"):
        wrap_model(make_lm("llama"), tokenizer())


@pytest.mark.parametrize(
    "at", [([0, 0, 1, 2], [0, 8, 3, 5]), ([2], [1]), ([0], [7]), ([1, 0], [4, 4]), ([], [])], ids=str
)
def test_record_equals_hand_sliced_inputs(tiny_model, at):
    """Also where the rows asked for stop short of the batch's last: OPT flattens rows and tokens before its MLP."""
    row, token = (torch.tensor(x, dtype=torch.long) for x in at)
    ids = random_ids(3, 9)
    sites = all_sites(tiny_model)
    with spy(tiny_model, sites) as seen, record(tiny_model, sites, (row, token)) as got:
        logits(tiny_model, ids)
    for site in sites:
        assert torch.equal(got[site], seen[site].view(3, 9, -1)[row, token])
        assert got[site].dtype == torch.float32
        assert not got[site].requires_grad


def test_record_sees_what_an_edit_outside_it_did(llama):
    ids = random_ids(2, 9)
    location = heads((1, 3))
    ((site, mask),) = llama.masks(location).items()
    bank = stack(llama, [random_edit(llama, location, 5)])
    at = torch.arange(2), torch.full((2,), 8)
    with record(llama, [site], at) as plain:
        logits(llama, ids)
    with edited(llama, bank.sites), record(llama, [site], at) as changed:
        logits(llama, ids)
    expected = apply_edit(plain[site].unsqueeze(1), bank.sites[site], None, None).squeeze(1)
    torch.testing.assert_close(changed[site], expected)
    assert (changed[site] != plain[site]).any(0).equal(mask)


def test_gradients_reach_the_edit_and_nothing_else(tiny_model):
    """And agree with central differences along a random direction of each of a, b and c."""
    ids = random_ids(2, 6)
    bank = stack(tiny_model, [random_edit(tiny_model, heads((0, 1)), 6), random_edit(tiny_model, heads((0, 2)), 7)])
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
        step = 2e-3
        with torch.no_grad():
            up, down = (
                loss(*(x + sign * step * direction if j == i else x for j, x in enumerate(leaves))) for sign in (1, -1)
            )
        slope = (up - down).item() / (2 * step)
        assert slope == pytest.approx((leaf.grad * direction).sum().item(), rel=0.03, abs=5e-5)
