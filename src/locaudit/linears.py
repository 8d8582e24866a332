"""Products with frozen float32 weights on a CPU, by oneDNN, which PyTorch holds but gives to MKL.

    y = W x + b,    dx = W^T dy

Both are one kernel: the second takes the weights as they lie, read the other way. Equal to PyTorch's own products but
for rounding, and faster on processors that MKL was not made for (docs/performance.md).

oneDNN makes a kernel for each shape and keeps it. Training has a shape for every number of tokens: `MAX_KERNELS` says
how many are kept, unless the environment does or oneDNN has run before; other threads than the first keep more.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from locaudit.edits.hooks import replaced_forwards


def linear(
    x: Float[Tensor, "*n d_in"], weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, " d_out"] | None = None
) -> Float[Tensor, "*n d_out"]:
    """W x + b, differentiable in x alone where weights are frozen; PyTorch's own where oneDNN does not fit."""
    return _linear(x, weight, bias) if _fits(x, weight, bias) else functional.linear(x, weight, bias)


def transposed(y: Float[Tensor, "*n d_out"], weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "*n d_in"]:
    """W^T y, as `linear` computes it in its backward pass; no gradients."""
    if not _fits(y, weight.T, None):
        return y @ weight
    return _product(y.reshape(-1, y.shape[-1]), weight.T, None).view(*y.shape[:-1], weight.shape[1])


@contextmanager
def fast_linears(module: nn.Module) -> Iterator[None]:
    """Run the plain linear maps (GPT-2's too) within a module by `linear`; their hooks run as ever."""
    linears = [p for p in module.modules() if type(p) in (nn.Linear, Conv1D) and "forward" not in vars(p)]
    with replaced_forwards(linears, Fast):
        yield


class Fast:
    """The forward of a linear map within `fast_linears`."""

    def __init__(self, forward: Callable[..., Tensor]):
        self.forward = forward
        """Its own, bound."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """W x + b."""
        part: Any = self.forward.__self__  # type: ignore[attr-defined]
        weight = part.weight.T if type(part) is Conv1D else part.weight
        if len(args) != 1 or kwargs:
            return self.forward(*args, **kwargs)
        if not _fits(args[0], weight, part.bias):
            # Of rows that do not lie in order (the last column of a prompt) PyTorch makes a batch of products, each
            # with a copy of the weights.
            return self.forward(args[0].contiguous())
        return _linear(args[0], weight, part.bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # Views are made here: what an autograd function gives could not be changed in place if it were one.
    rows = x.reshape(-1, x.shape[-1])
    y = _Linear.apply(rows, weight, bias) if torch.is_grad_enabled() else _product(rows, weight, bias)
    return y.view(*x.shape[:-1], len(weight))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return transposed(dy, weight), None, None


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return (
        not torch.compiler.is_compiling()  # Inductor takes the operator with weights of its own packing only
        and all(t.is_cpu and t.dtype == torch.float32 and type(t) in (Tensor, nn.Parameter) for t in tensors)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors[1:]))
        and x.numel() > 0
        and weight.dim() == 2
        and x.shape[-1] == weight.shape[1]  # else PyTorch's own error
        and (weight.is_contiguous() or weight.T.is_contiguous())
        and (bias is None or (bias.is_contiguous() and len(bias) == len(weight)))
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and _is_there()
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One product of rows (n, d); `weight` may be a transposed view."""
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Where oneDNN, and the layer between it and PyTorch, look for how many kernels to keep, once, when they first run."""
MAX_KERNELS = 32
"""Some 0.5 MB each; a forward and its backward pass need a dozen. The default, 1024, would take about as much as
SmolLM2's weights."""


@cache
def _is_there() -> bool:
    """Whether PyTorch's own products are MKL's, and oneDNN's operator (private) gives the same on a few numbers."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    numbers = torch.arange(12, dtype=torch.float32, device="cpu")
    x, weight, bias = numbers[:6].view(2, 3).sin(), numbers.view(4, 3).cos(), numbers[:4]
    chosen = {name: str(MAX_KERNELS) for name in CAPACITIES if name not in os.environ}
    os.environ.update(chosen)
    try:
        y = _product(x, weight, bias)
        return torch.allclose(y, functional.linear(x, weight, bias)) and torch.allclose(
            _product(y, weight.T, None), y @ weight
        )
    except (AttributeError, RuntimeError, TypeError):
        return False
    finally:
        for name in chosen:
            os.environ.pop(name, None)
