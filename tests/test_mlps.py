"""MLPs that keep less: the same numbers, and only where the MLP is the one that the formula is of."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn

from locaudit import mlps
from locaudit.mlps import lean_mlps
from tiny import tiny

GATED = {"gemma2", "gemma3_text", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3"}


def through(block, x):
    """What a block gives, and the gradient of its sum of squares."""
    given = x.clone().requires_grad_()
    out = block(given)
    (gradient,) = torch.autograd.grad(out.square().sum(), given)
    return out.detach(), gradient


@pytest.fixture
def model():
    """A llama of this test's own."""
    return deepcopy(tiny("llama"))


def test_gated_mlps_are_known(tiny_model):
    gated = tiny_model.config.model_type in GATED
    assert mlps._gated(tiny_model) == frozenset(range(tiny_model.n_layers) if gated else ())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2"])
def test_a_lean_mlp_equals_autograd_bit_for_bit(name, dtype):
    model = deepcopy(tiny(name))
    model.lm.to(dtype)
    x = torch.randn(2, 7, model.config.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    plain = through(model.mlp(0), x)
    for again in (range(0), range(1)):
        with lean_mlps(model, again):
            lean = through(model.mlp(0), x)
        assert all(torch.equal(one, other) for one, other in zip(plain, lean, strict=True))


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


@pytest.mark.parametrize("change", [trainable, dispatched, quantised, in_place, sparse])
def test_what_is_not_a_plain_gated_mlp_runs_as_it_is(model, change):
    change(model.mlp(0))
    assert mlps._gated(model) == set(range(1, model.n_layers))
    x = torch.randn(1, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    plain = through(model.mlp(0), x)
    for again in (range(0), range(1)):
        with lean_mlps(model, again):
            lean = through(model.mlp(0), x)
        assert all(torch.equal(one, other) for one, other in zip(plain, lean, strict=True))


def test_hooks_within_an_mlp_run(model):
    """Also those that came after the model was looked at."""
    assert 0 in mlps._gated(model)
    model.mlp(0).up_proj.register_forward_hook(lambda _module, _given, returned: 2 * returned)
    x = torch.randn(1, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    plain = through(model.mlp(0), x)
    with lean_mlps(model, range(0)):
        lean = through(model.mlp(0), x)
    assert all(torch.equal(one, other) for one, other in zip(plain, lean, strict=True))
