"""Products by oneDNN: the same numbers as PyTorch's own, and only where they fit."""

from __future__ import annotations

import pytest
import torch

from locaudit.models import Head
from locaudit.scoring import products as module
from locaudit.scoring.head import head_log_probs
from locaudit.scoring.products import ROWS, padded, product, transposed

here = pytest.mark.skipif(not module._is_there(), reason="PyTorch's own products are not MKL's here, or oneDNN is not")


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def given(monkeypatch):
    """Shapes of what oneDNN is given."""
    shapes = []
    by_onednn = module._by_onednn

    def noting(x, weight):
        shapes.append((tuple(x.shape), tuple(weight.shape)))
        return by_onednn(x, weight)

    module._is_there()  # tried now
    monkeypatch.setattr(module, "_by_onednn", noting)
    return shapes


@here
@pytest.mark.parametrize("trainable", [False, True])
def test_products_are_pytorchs(given, trainable):
    x, weight = numbers(2 * ROWS, 5), numbers(7, 5, seed=1).requires_grad_(trainable)
    y = product(x, weight)
    torch.testing.assert_close(y, (x @ weight.T).detach())
    torch.testing.assert_close(transposed(y, weight), (y @ weight).detach())
    assert given == [((2 * ROWS, 5), (7, 5)), ((2 * ROWS, 7), (5, 7))]
    assert not y.requires_grad


@here
def test_numbers_that_do_not_lie_in_order(given):
    x, weight = numbers(5, ROWS).T, numbers(7, 5, seed=1)
    torch.testing.assert_close(product(x, weight), x @ weight.T)
    assert len(given) == 1


def test_rows_of_zeros_are_added():
    assert [len(padded(numbers(n, 3))) for n in (0, 1, ROWS, ROWS + 1)] == [0, ROWS, ROWS, 2 * ROWS]
    assert torch.equal(padded(numbers(5, 3))[:5], numbers(5, 3)) and not padded(numbers(5, 3))[5:].any()


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (numbers(ROWS + 1, 5), numbers(7, 5)),
        (numbers(0, 5), numbers(7, 5)),
        (numbers(ROWS, 5).double(), numbers(7, 5).double()),
        (numbers(ROWS, 5).bfloat16(), numbers(7, 5).bfloat16()),
        (numbers(ROWS, 5), numbers(7, 10)[:, ::2]),
    ],
    ids=["any number of rows", "none", "float64", "bfloat16", "not in order"],
)
def test_what_does_not_fit_is_left_to_pytorch(given, x, weight):
    y = product(x, weight)
    assert torch.equal(y, x @ weight.T) and torch.equal(transposed(y, weight), y @ weight) and not given


@pytest.mark.parametrize("how", ["switched off", "autocast", "no operator", "another result"])
def test_it_can_be_missing(given, monkeypatch, how):
    x, weight = numbers(ROWS, 5), numbers(7, 5)

    def missing(*_):
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")

    if how in ("no operator", "another result"):
        monkeypatch.setattr(module, "_by_onednn", missing if how == "no operator" else lambda x, weight: x)
        monkeypatch.setattr(module, "_is_there", module._is_there.__wrapped__)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", how != "switched off")
    with torch.autocast("cpu", enabled=how == "autocast"):
        assert torch.equal(product(x, weight), x @ weight.T)
    assert not given


@here
@pytest.mark.parametrize("n", [1, ROWS, 3 * ROWS + 5])
def test_the_head_takes_few_numbers_of_rows(given, n):
    """Log-probabilities and gradients are those of the whole softmax, for each row, whatever is added to them."""
    head = Head(numbers(700, 6, seed=1), numbers(700, seed=2), None)
    which, token = torch.arange(n), torch.arange(n) * 7 % 700
    found = []
    for function in (head_log_probs, lambda x, head, which, token: _plain(x, head)[which, token]):
        x = numbers(n, 6).requires_grad_()
        out = function(x, head, which, token)
        found.append((out, *torch.autograd.grad(out.square().sum(), x)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)
    assert given and all(shape[0] == -(-n // ROWS) * ROWS for shape, _ in given)


def _plain(x, head):
    return (x @ head.weight.T + head.bias).log_softmax(dim=1)
