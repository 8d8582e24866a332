"""Products with frozen float32 weights on a CPU, by oneDNN, which PyTorch holds but gives to MKL.

    y = W x,    z = W^T y

Both are one kernel: the second takes the weights as they lie, read the other way. Equal to PyTorch's own products but
for rounding, and faster on processors that MKL was not made for (docs/performance.md). Kernels are made for each number
of rows and stay, some 1 MB each: for the head alone, and for few numbers of rows, that is little memory.
"""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

ROWS = 16
"""Rows come in multiples of this."""


def product(x: Float[Tensor, "n d_in"], weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "n d_out"]:
    """W x for each row; no gradients. PyTorch's own where oneDNN does not fit."""
    return _by_onednn(x, weight) if _fits(x, weight) else x @ weight.T


def transposed(y: Float[Tensor, "n d_out"], weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "n d_in"]:
    """W^T y for each row; no gradients. PyTorch's own where oneDNN does not fit."""
    return _by_onednn(y, weight.T) if _fits(y, weight) else y @ weight


def padded(x: Float[Tensor, "n d"]) -> Float[Tensor, "m d"]:
    """With rows of zeros up to a multiple of `ROWS`."""
    return functional.pad(x, (0, 0, 0, -len(x) % ROWS))


def _fits(x: Tensor, weight: Tensor) -> bool:
    return (
        all(t.device.type == "cpu" and t.dtype == torch.float32 for t in (x, weight))
        and len(x) > 0
        and len(x) % ROWS == 0
        and weight.is_contiguous()
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and _is_there()
    )


def _by_onednn(x: Tensor, weight: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, None, "none", [], "")


@cache
def _is_there() -> bool:
    """Whether PyTorch's own products are MKL's, and oneDNN's operator (private) gives the same on a few numbers."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    x, weight = torch.arange(48.0).view(16, 3).sin(), torch.arange(12.0).view(4, 3).cos()
    try:
        y = _by_onednn(x, weight)
        return torch.allclose(y, x @ weight.T) and torch.allclose(_by_onednn(y, weight.T), y @ weight)
    except (AttributeError, RuntimeError, TypeError):
        return False
