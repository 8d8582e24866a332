"""Training forwards that keep less for the backward pass, with the same gradients.

Attention and MLPs can run again in the backward pass, so that nothing is kept of them but what enters. And a gated MLP
is y = D h, h = act(g) * u, g = G x, u = U x. Its weights are frozen, so that the backward pass needs only g and u, and
those follow from x; autograd also keeps act(g).

    dh = D^T dy,    dg = act'(g) * u * dh,    du = act(g) * dh,    dx = U^T du + G^T dg

Equal bit for bit to autograd's, of the same products (`locaudit.linears`): x is given twice, so that autograd adds up
what flows to it, in its own order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from locaudit.edits.hooks import replaced_forwards
from locaudit.linears import Fast, fast_linears, linear, transposed
from locaudit.models import Model


@dataclass(frozen=True)
class Again:
    """Layers of which parts run again in the backward pass."""

    attention: range = range(0)
    """Not with a cache of keys and values, to which running again would add."""
    mlps: range = range(0)
    """Of a gated MLP two of three products, as its output is not needed."""


@contextmanager
def lean(model: Model, again: Again) -> Iterator[None]:
    """Run forwards that keep less for the backward pass, where what is missing is computed again.

    Of gated MLPs only what their products gave is kept, in any layer. Not for edits of neurons: an MLP that runs here
    has no hooks.
    """
    blocks = {layer: block for layer in range(model.n_layers) if (block := model.mlp(layer)) is not None}
    gated = _gated(model)

    def replaced(block: nn.Module, layer: int) -> Callable[[Callable], Callable]:
        def contexts():
            return nullcontext(), fast_linears(block)

        if layer in gated and _is_bare(block):
            return lambda _: lambda x: _GatedMLP.apply(x, x, block, layer in again.mlps)
        if layer in again.mlps:
            same = {"use_reentrant": False, "preserve_rng_state": False}
            return lambda forward: partial(checkpoint, forward, context_fn=contexts, **same)
        return lambda forward: forward

    with ExitStack() as stack:
        for layer, block in blocks.items():
            stack.enter_context(replaced_forwards([block], replaced(block, layer)))
        for layer in again.attention:
            if (attention := model.attention(layer)) is not None:
                projection = model.projection(("heads", layer))
                stack.enter_context(replaced_forwards([attention], partial(_attending_again, attention, projection)))
        stack.enter_context(fast_linears(model.lm))  # what runs again must be the same product
        yield


def _attending_again(attention: nn.Module, projection: nn.Module, forward: Callable) -> Callable:
    def run(*args, **kwargs):
        hooks = projection._forward_pre_hooks.copy()  # an edit's, gone when the backward pass comes

        def contexts():
            return nullcontext(), _as_before(attention, projection, hooks)

        same = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": contexts}
        return checkpoint(forward, *args, **same, **kwargs)

    return run


@contextmanager
def _as_before(attention: nn.Module, projection: nn.Module, hooks: dict[int, Callable]) -> Iterator[None]:
    own = projection._forward_pre_hooks
    projection._forward_pre_hooks = hooks
    try:
        with fast_linears(attention):
            yield
    finally:
        projection._forward_pre_hooks = own


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Float[Tensor, "*n d"], _, block: nn.Module, again: bool) -> Float[Tensor, "*n d"]:  # type: ignore[override]
        g, u = _products(block, x)
        ctx.block, ctx.again = block, again
        # The weights too: a backward pass after a change of theirs is refused.
        ctx.save_for_backward(*(part.weight for part in _linears(block)), *((x,) if again else (g, u)))
        return _through(block.down_proj, _activation(block)(g) * u)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):  # type: ignore[override]
        block, n_kept = ctx.block, 1 if ctx.again else 2
        (*into, down), kept = ctx.saved_tensors[:-n_kept], ctx.saved_tensors[-n_kept:]
        g, u = _products(block, *kept) if ctx.again else kept
        dh = transposed(dy, down)
        with torch.enable_grad():
            given = g.detach().requires_grad_()
            act = _activation(block).forward(given)  # past hooks on all modules, which may want a graph of their own
        du = act.detach() * dh
        (dg,) = torch.autograd.grad(act, given, dh.mul_(u))
        if len(into) == 1:
            return transposed(torch.cat([dg, du], dim=-1), *into), None, None, None
        gate, up = into
        return transposed(du, up), transposed(dg, gate), None, None


def _products(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """G x and U x."""
    joint = getattr(block, "gate_up_proj", None)
    if joint is not None:
        return _through(joint, x).chunk(2, dim=-1)  # type: ignore[return-value]
    return _through(block.gate_proj, x), _through(block.up_proj, x)


def _through(part: nn.Linear | Any, x: Tensor) -> Tensor:
    return linear(x, part.weight, part.bias)


def _activation(block: nn.Module) -> nn.Module:
    return block.act_fn if hasattr(block, "act_fn") else block.activation_fn  # type: ignore[return-value]


_LINEARS = (("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj"))
"""What transformers calls the projections of a gated MLP."""


def _linears(block: nn.Module) -> list[Any]:
    """The projections of a gated MLP, D last; none if it is not one."""
    names = next((names for names in _LINEARS if all(hasattr(block, name) for name in names)), ())
    return [getattr(block, name) for name in names]


_GATED: WeakKeyDictionary[Model, frozenset[int]] = WeakKeyDictionary()


def _gated(model: Model) -> frozenset[int]:
    """Layers whose MLP is that of the formula: by its parts' names, and seen to give the same on a few numbers."""
    if model not in _GATED:
        blocks = {layer: block for layer in range(model.n_layers) if (block := model.mlp(layer)) is not None}
        _GATED[model] = frozenset(n for n, block in blocks.items() if _is_bare(block) and _is_gated(block))
    return _GATED[model]


def _is_bare(block: nn.Module) -> bool:
    """Whether a block has the parts of a gated MLP, of plain linear maps that nothing watches or changes."""
    linears = _linears(block)
    if not linears or not isinstance(getattr(block, "act_fn", getattr(block, "activation_fn", None)), nn.Module):
        return False
    return all(type(part) is nn.Linear and not part.weight.requires_grad for part in linears) and not (
        "forward" in vars(block)
        or any(
            not isinstance(vars(part).get("forward"), Fast | None)
            or part._forward_hooks
            or part._forward_pre_hooks
            or part._backward_hooks
            for part in (*linears, _activation(block))
        )
    )


def _is_gated(block: nn.Module) -> bool:
    weight: Tensor = block.down_proj.weight  # type: ignore[assignment]
    x = torch.arange(2 * weight.shape[0], device=weight.device).view(1, 2, -1).sin().to(weight.dtype)
    found = []
    try:
        with torch.enable_grad(), fast_linears(block):
            for forward in (block.forward, lambda x: _GatedMLP.apply(x, x, block, False)):
                given = x.clone().requires_grad_()
                y = forward(given)
                found.append((y.detach(), *torch.autograd.grad(y, given, x)))
    except (AttributeError, RuntimeError, TypeError):  # other arguments or results, or an activation in place
        return False
    return all(torch.equal(one, other) for one, other in zip(*found, strict=True))
