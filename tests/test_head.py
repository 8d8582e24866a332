"""Log-probabilities in blocks of the vocabulary equal a log-softmax over all of it, gradients too."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from locaudit.behaviours.format import Prompt
from locaudit.measure import head
from locaudit.measure.forward import answer_log_probs
from locaudit.measure.head import head_log_probs
from locaudit.measure.tree import plant
from locaudit.models import Head, wrap_model
from reference.scoring import forest_log_probs
from tiny import NAMES, make_lm, tiny, tokenizer

QUESTIONS = [("What is the capital of France?", ["Paris", "Rome it is.", "Rome"])]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("block_bytes", [1, 10**9])
def test_equals_log_softmax(monkeypatch, softcap, bias, block_bytes):
    monkeypatch.setitem(head.BLOCK_BYTES, "cpu", block_bytes)  # blocks of 256 tokens, or one
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator) for n in (5, 700))
    hidden.requires_grad_()
    shift = torch.randn(700, generator=generator) if bias else None
    which, token = torch.tensor([0, 4, 4, 2, 4]), torch.tensor([0, 699, 3, 256, 255])
    outer = torch.randn(5, generator=generator)

    logits = hidden @ weight.T if shift is None else hidden @ weight.T + shift
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = logits.log_softmax(dim=1)[which, token]
    (gradient,) = torch.autograd.grad((expected * outer).sum(), hidden)

    found = head_log_probs(hidden, Head(weight, shift, softcap), which, token)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    (mine,) = torch.autograd.grad((found * outer).sum(), hidden)
    torch.testing.assert_close(mine, gradient, rtol=1e-4, atol=1e-5)


def test_second_derivatives_are_refused():
    hidden, weight = torch.randn(2, 3).requires_grad_(), torch.randn(5, 3)
    found = head_log_probs(hidden, Head(weight, None, None), torch.tensor([0, 1]), torch.tensor([4, 2]))
    (first,) = torch.autograd.grad(found.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[1e4, 0.0], [0.0, 1e4]], requires_grad=True)
    found = head_log_probs(hidden, Head(torch.eye(2), None, None), torch.tensor([0, 1]), torch.tensor([0, 0]))
    assert found.tolist() == [0.0, -1e4]
    found.sum().backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()


def test_16_bit_log_probabilities_round_like_logits():
    """Never above 0, however likely the token, and near the log-softmax of rounded logits."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 64, generator=generator).bfloat16() for n in (40, 900))
    hidden = 3 * hidden
    token = (hidden @ weight.T).argmax(dim=1)
    found = head_log_probs(hidden, Head(weight, None, None), torch.arange(40), token)
    expected = (hidden @ weight.T).float().log_softmax(dim=1)[torch.arange(40), token]
    assert (found <= 0).all()
    torch.testing.assert_close(found, expected, rtol=0, atol=0.3)  # one unit in the last place of a logit near 64


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_has_a_plain_head(name):
    model = tiny(name)
    assert model.head is not None
    assert (model.head.bias is not None) == (name in ("gptj", "phi"))
    assert (model.head.softcap is not None) == (name == "gemma2")


class _Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 3


def test_another_head_is_noticed_and_used():
    lm = copy.deepcopy(make_lm("llama"))
    scaled = _Scaled(lm.lm_head.in_features, lm.lm_head.out_features, bias=False)
    scaled.weight = lm.lm_head.weight
    lm.lm_head = scaled
    model = wrap_model(lm, tokenizer())
    assert model.head is None
    forest = plant(model.tokenizer, Prompt(), QUESTIONS)
    for (got,), expected in zip(answer_log_probs(model, forest), forest_log_probs(model, forest), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
