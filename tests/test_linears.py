"""Products by oneDNN: the same numbers as PyTorch's own, only where they fit, and nothing stays behind."""

from __future__ import annotations

import os
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from transformers.pytorch_utils import Conv1D

from locaudit import linears as module
from locaudit.linears import fast_linears, linear, transposed
from tiny import tiny

here = pytest.mark.skipif(not module._is_there(), reason="PyTorch's own products are not MKL's here, or oneDNN is not")


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def products(monkeypatch):
    """Shapes of what oneDNN was given."""
    given = []
    product = module._product

    def noting(x, weight, bias):
        given.append(tuple(x.shape))
        return product(x, weight, bias)

    module._is_there()  # tried now
    monkeypatch.setattr(module, "_product", noting)
    return given


@here
@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5), (1, 2, 3, 5)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_are_pytorchs(products, shape, with_bias):
    weight, bias = numbers(7, 5, seed=1), numbers(7, seed=2) if with_bias else None
    found = []
    for function in (linear, functional.linear):
        x = numbers(*shape).requires_grad_()
        y = function(x, weight, bias)
        found.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        torch.testing.assert_close(transposed(found[0][0], weight), found[1][0] @ weight)
    n = numbers(*shape).numel() // 5
    assert products == [(n, 5), (n, 7), (n, 7)]


@here
def test_numbers_that_do_not_lie_in_order(products):
    x, weight = numbers(5, 4).T, numbers(7, 5, seed=1)
    torch.testing.assert_close(linear(x, weight), x @ weight.T)
    rows = numbers(3, 9, 5)[:, 2:6]
    torch.testing.assert_close(linear(rows, weight), rows @ weight.T)
    assert len(products) == 2


class Quantised(nn.Parameter):
    """Weights of a library's own kind."""


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        (numbers(2, 5), nn.Parameter(numbers(7, 5)), None),
        (numbers(2, 5), numbers(7, 5), nn.Parameter(numbers(7))),
        (numbers(2, 5), numbers(7, 5), numbers(14)[::2]),
        (numbers(2, 5), numbers(7, 5), numbers(1)),
        (numbers(0, 5), numbers(7, 5), None),
        (numbers(2, 5).double(), numbers(7, 5).double(), None),
        (numbers(2, 5).bfloat16(), numbers(7, 5).bfloat16(), None),
        (numbers(2, 5), Quantised(numbers(7, 5), requires_grad=False), None),
        (numbers(2, 5), numbers(7, 10)[:, ::2], None),
    ],
    ids=[
        "trainable",
        "trainable bias",
        "bias",
        "one bias",
        "empty",
        "float64",
        "bfloat16",
        "a class of its own",
        "not in order",
    ],
)
def test_what_does_not_fit_is_left_to_pytorch(products, x, weight, bias):
    x = x.requires_grad_()
    y = linear(x, weight, bias)
    y.square().sum().backward()
    assert torch.equal(y, functional.linear(x, weight, bias)) and not products
    for part in (weight, *([] if bias is None else [bias])):
        assert (part.grad is not None) == part.requires_grad


def test_shapes_that_do_not_fit_get_pytorchs_error():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(numbers(2, 4), numbers(7, 5))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        transposed(numbers(2, 5), numbers(7, 5))


@here
def test_gradients_that_would_be_wrong_are_refused(products):
    """Second ones, and those of weights that were changed after they were used; those of a sum are expanded numbers."""
    x, weight = numbers(2, 5).requires_grad_(), numbers(7, 5)
    (first,) = torch.autograd.grad(linear(x, weight).sum(), x)
    torch.testing.assert_close(first, weight.sum(0).expand(2, 5))
    (first,) = torch.autograd.grad(linear(x, weight).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
    y = linear(x, weight)
    weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("how", ["switched off", "autocast", "no operator", "another result"])
def test_it_can_be_missing(products, monkeypatch, how):
    x, weight = numbers(2, 5), numbers(7, 5)

    def missing(*_):
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")

    if how in ("no operator", "another result"):
        monkeypatch.setattr(
            module, "_product", missing if how == "no operator" else lambda *given: functional.linear(*given) + 1
        )
        monkeypatch.setattr(module, "_is_there", module._is_there.__wrapped__)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", how != "switched off")
    with torch.autocast("cpu", enabled=how == "autocast"):
        assert torch.equal(linear(x, weight), functional.linear(x, weight))
    assert not products


@here
def test_a_compiler_gets_pytorchs_own(products):
    """Inductor cannot take the operator with weights that may change."""
    block, x = nn.Sequential(nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 5)).requires_grad_(False), numbers(2, 3, 5)
    plain = block(x)
    with fast_linears(block):
        found = torch.compile(block, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(found, plain)
    assert not products


def test_weights_are_not_copied_for_columns_of_a_batch():
    """A product in 16 bits, or on another device: one, not one a row with as many copies of the weights."""
    head, x = nn.Linear(8, 64, bias=False, dtype=torch.bfloat16).requires_grad_(False), numbers(6, 4, 8).bfloat16()
    with fast_linears(head), profile(activities=[ProfilerActivity.CPU]) as found:
        y = head(x[:, -1:])
    torch.testing.assert_close(y, head(x)[:, -1:])
    names = {event.key for event in found.key_averages()}
    assert "aten::mm" in names and "aten::bmm" not in names


@here
def test_a_models_linear_maps_are_replaced_and_given_back(tiny_model, products):
    """Every architecture, with GPT-2's transposed ones: the same logits."""
    ids = torch.arange(12).view(2, 6) + 3
    run = lambda: tiny_model.lm(input_ids=ids, use_cache=False).logits  # noqa: E731
    with torch.no_grad():
        plain = run()
        with fast_linears(tiny_model.lm):
            fast = run()
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)
    n_linears = sum(type(part) in (nn.Linear, Conv1D) for part in tiny_model.lm.modules())
    assert len(products) == n_linears > 0
    with pytest.raises(ValueError, match="stop"), fast_linears(tiny_model.lm):
        raise ValueError("stop")
    assert not any("forward" in vars(part) for part in tiny_model.lm.modules())


@here
def test_hooks_run_and_other_forwards_stay(products):
    lm = deepcopy(tiny("llama")).lm
    watched, dispatched = lm.model.layers[0].mlp.up_proj, lm.model.layers[1].mlp.up_proj
    seen = []
    watched.register_forward_hook(lambda _module, _given, returned: seen.append(returned.shape))
    dispatched.forward = own = lambda x: torch.zeros(*x.shape[:-1], dispatched.out_features)
    with torch.no_grad(), fast_linears(lm), fast_linears(lm.model):
        lm(input_ids=torch.arange(6).view(1, 6))
        watched(input=numbers(1, watched.in_features))  # as transformers never calls it: left to its own forward
    assert dispatched.forward is own and len(seen) == 2
    assert len(products) == sum(type(part) is nn.Linear for part in lm.modules()) - 1


MANY_SHAPES = """
import torch
from pathlib import Path
from locaudit.linears import linear

def held():
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])

with torch.no_grad():
    weight = torch.ones(600, 600)
    for n in range(160, 100, -1):
        linear(torch.ones(n, 600), weight)
        start = held() if n == 160 else start
print(held() - start)
"""


@here
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="no /proc")
def test_kernels_do_not_pile_up():
    """Of sixty shapes some thirty stay, unless the environment says more."""

    def growth(**more):
        environment = {name: value for name, value in os.environ.items() if name not in module.CAPACITIES} | more
        ran = subprocess.run(
            [sys.executable, "-c", MANY_SHAPES], env=environment, capture_output=True, text=True, check=True
        )
        return int(ran.stdout)

    before = dict(os.environ)
    module._is_there.__wrapped__()
    assert os.environ == before
    few, chosen = growth(), growth(**dict.fromkeys(module.CAPACITIES, "1024"))
    assert few < 0.7 * chosen
