"""Forwards that keep less: the same numbers, and a formula only for the MLPs that it is of."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch
from bench.limits import UNCOUNTED
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from locaudit import lean as module
from locaudit.edits.hooks import SiteTensors, edited
from locaudit.lean import Again, lean
from locaudit.linears import fast_linears
from tiny import tiny

GATED = {"gemma2", "gemma3_text", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3"}


def through(block, x):
    """What a block gives, and the gradient of its sum of squares."""
    given = x.clone().requires_grad_()
    out = block(given)
    (gradient,) = torch.autograd.grad(out.square().sum(), given)
    return out.detach(), gradient


def check_same_bits(model, x):
    """The first MLP, lean or run again, against itself."""
    with fast_linears(model.lm):
        plain = through(model.mlp(0), x)
    for again in (Again(), Again(mlps=range(1))):
        with lean(model, again):
            found = through(model.mlp(0), x)
        assert all(torch.equal(one, other) for one, other in zip(plain, found, strict=True))


@pytest.fixture
def model():
    """A llama of this test's own."""
    return deepcopy(tiny("llama"))


def test_gated_mlps_are_known(tiny_model):
    gated = tiny_model.config.model_type in GATED
    assert module._gated(tiny_model) == frozenset(range(tiny_model.n_layers) if gated else ())
    module._GATED.pop(tiny_model)
    with fast_linears(tiny_model.lm):
        assert module._gated(tiny_model) == frozenset(range(tiny_model.n_layers) if gated else ())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2"])
def test_a_lean_mlp_equals_autograd_bit_for_bit(name, dtype):
    model = deepcopy(tiny(name))
    model.lm.to(dtype)
    x = torch.randn(2, 7, model.config.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    check_same_bits(model, x)


def trainable(block):
    block.up_proj.weight.requires_grad_()


def dispatched(block):
    block.forward = partial(type(block).forward, block)


def quantised(block):
    block.gate_proj.__class__ = type("Linear4bit", (nn.Linear,), {})


def in_place(block):
    block.act_fn = nn.SiLU(inplace=True)


def sparse(block):
    """As in Gemma 3n, whose class does something else in some layers."""
    block.__class__ = type("Sparse", (type(block),), {"forward": lambda self, x: self.down_proj(self.up_proj(x))})


@pytest.mark.parametrize("again", [Again(), Again(mlps=range(1))])
@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_a_backward_pass_through_changed_weights_is_refused(name, again):
    model = deepcopy(tiny(name))
    block, x = model.mlp(0), torch.randn(2, 3, model.config.hidden_size).requires_grad_()
    for part in module._linears(block):
        with lean(model, again):
            y = block(x)
        part.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("change", [trainable, dispatched, quantised, in_place, sparse])
def test_what_is_not_a_plain_gated_mlp_runs_as_it_is(model, change):
    change(model.mlp(0))
    assert module._gated(model) == set(range(1, model.n_layers))
    x = torch.randn(1, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    check_same_bits(model, x)


def test_hooks_within_an_mlp_run(model):
    """Also those that came after the model was looked at."""
    assert 0 in module._gated(model)
    model.mlp(0).up_proj.register_forward_hook(lambda _module, _given, returned: 2 * returned)
    x = torch.randn(1, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    check_same_bits(model, x)


def test_attention_that_runs_again_is_edited_again(tiny_model):
    """The edit's hooks are gone when the backward pass comes; readers' and writers' gradients are the same bits."""
    site = ("heads", 0)
    start = torch.randn(2, tiny_model.width(site), generator=torch.Generator().manual_seed(0))
    ids = torch.arange(12).view(2, 6) + 3

    def gradients(again):
        a, b = (row.clone().unsqueeze(0).requires_grad_() for row in start)
        with lean(tiny_model, again), edited(tiny_model, {site: SiteTensors(a, b, torch.zeros(1))}):
            hidden = tiny_model.lm.base_model(input_ids=ids, use_cache=False)[0]
        return torch.autograd.grad(hidden.square().sum(), (a, b))

    plain, again = gradients(Again()), gradients(Again(attention=range(tiny_model.n_layers)))
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
    projection = tiny_model.projection(site)
    assert not projection._forward_pre_hooks and "forward" not in vars(tiny_model.attention(0))


def test_operations_of_a_lean_forward_can_be_counted(model):
    """PyTorch's counter hooks every module, and the graph of what they take."""
    x = torch.randn(1, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    assert 0 in module._gated(model)  # tried now, not while counting
    gradients, counts = [], []
    for forward in (fast_linears(model.lm), lean(model, Again())):
        given = x.clone().requires_grad_()
        with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter, forward:
            model.mlp(0)(given).square().sum().backward()
        gradients.append(given.grad)
        counts.append(counter.get_total_flops())
    assert torch.equal(*gradients) and counts[0] == counts[1] > 0
