"""Reading and changing the inputs of projections, inside context managers only.

The one formula of the library, o' = o + (c + <a, o>) b, is applied here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from locaudit.errors import ModelError
from locaudit.models import Model, Site


@dataclass(frozen=True)
class SiteTensors:
    """K edits of one site: readers `a`, writers `b` (both K x d_in, float32) and constants `c` (K,)."""

    a: Float[Tensor, "k d_in"]
    b: Float[Tensor, "k d_in"]
    c: Float[Tensor, " k"]


def apply_edit(
    o: Float[Tensor, "rows tokens d_in"],
    site: SiteTensors,
    rows: Int[Tensor, " rows"] | None,
    positions: Bool[Tensor, "rows tokens"] | None,
) -> Float[Tensor, "rows tokens d_in"]:
    """O' = o + (c + <a, o>) b, for each row with the edit that `rows` names (None: the only one).

    The strength and the product with b are float32; the result has o's dtype. Positions that are False stay as they
    are, bit for bit. With b = 0, or a = 0 and c = 0, o' equals o exactly.
    """
    wide = o.float()
    if rows is None:
        strength = wide @ site.a[0] + site.c[0]
        delta = strength.unsqueeze(-1) * site.b[0]
    else:
        rows = rows.to(o.device)
        # Not site.a[rows], whose gradient is not repeatable to the bit on a CPU with several threads.
        a, b, c = (x.index_select(0, rows) for x in (site.a, site.b, site.c))
        strength = torch.einsum("rtd,rd->rt", wide, a) + c.unsqueeze(-1)
        delta = strength.unsqueeze(-1) * b.unsqueeze(1)
    if positions is not None:
        delta = delta.masked_fill(~positions.to(o.device).unsqueeze(-1), 0.0)
    return o + delta.to(o.dtype)


@contextmanager
def edited(
    model: Model,
    sites: Mapping[Site, SiteTensors],
    *,
    rows: Int[Tensor, " rows"] | None = None,
    positions: Bool[Tensor, "rows tokens"] | Callable[[int], Bool[Tensor, "rows tokens"]] | None = None,
) -> Iterator[None]:
    """Run forwards of `model.lm` with edited projection inputs; leaving restores the model, whatever happens.

    `rows` names the edit of each batch row, `positions` the tokens it acts on (None: all), or a function that gives
    them for a forward of so many tokens, for forwards of several lengths as in decoding. Raises `ModelError` on
    leaving if a forward ran but never reached one of the sites: an edit that does nothing must not pass unnoticed.
    """

    def edit(site: SiteTensors) -> Callable[[Tensor], Tensor]:
        return lambda o: apply_edit(o, site, rows, positions(o.shape[1]) if callable(positions) else positions)

    with _input_hooks(model, {key: edit(site) for key, site in sites.items()}):
        yield


@contextmanager
def record(
    model: Model, sites: list[Site], at: tuple[Int[Tensor, " n"], Int[Tensor, " n"]]
) -> Iterator[dict[Site, Float[Tensor, "n d_in"]]]:
    """Collect the inputs of projections at the (row, token) index pairs `at` of the next forward; no gradients."""
    out: dict[Site, Tensor] = {}
    row, token = at

    def reader(site: Site) -> Callable[[Tensor], None]:
        def read(o: Tensor) -> None:
            out[site] = o.detach()[row.to(o.device), token.to(o.device)].float()

        return read

    with _input_hooks(model, {site: reader(site) for site in sites}):
        yield out


class _Enough(Exception):
    """What was wanted of a forward is known."""


def entering(model: Model, layer: int, forward: Callable[[], object]) -> Float[Tensor, "rows tokens d"]:
    """The residual stream that enters decoder layer `layer` when `forward` runs; the rest of it is not run."""
    found: list[Tensor] = []

    def stop(_module, args, kwargs):
        found.append((args[0] if args else kwargs["hidden_states"]).detach())
        raise _Enough

    handle = model.layer(layer).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        forward()
    except _Enough:
        pass
    finally:
        handle.remove()
    return found[0]


@contextmanager
def resumed(model: Model, layer: int, hidden: Float[Tensor, "rows tokens d"]) -> Iterator[None]:
    """Run forwards from decoder layer `layer` on, with `hidden` as what enters it; the layers below do nothing."""

    def idle(*args, **kwargs):
        passed = args[0] if args else kwargs["hidden_states"]
        return (passed, *[None] * (model.n_layer_outputs - 1)) if model.n_layer_outputs else passed

    def enter(_module, args, kwargs):
        if args:
            return (hidden.to(args[0].device), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden.to(kwargs["hidden_states"].device)}

    handle = model.layer(layer).register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
    try:
        with replaced_forwards([model.layer(number) for number in range(layer)], lambda _: idle):
            yield
    finally:
        handle.remove()


@contextmanager
def replaced_forwards(modules: Sequence[nn.Module], replaced: Callable[[Callable], Callable]) -> Iterator[None]:
    """Give modules another `forward`, made of their own; leaving gives it back."""
    own = [module.__dict__.get("forward") for module in modules]  # accelerate keeps one there
    try:
        for module in modules:
            module.forward = replaced(module.forward)
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward


@contextmanager
def _input_hooks(model: Model, functions: Mapping[Site, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    handles = []
    reached: set[Site] = set()
    n_rows: dict[int, int] = {}
    n_forwards = 0

    def hook(site: Site, function: Callable[[Tensor], Tensor | None]):
        def pre(_module, args):
            reached.add(site)
            shape = args[0].shape
            # OPT flattens (rows, tokens) before its MLP projection.
            o = args[0] if len(shape) == 3 else args[0].view(n_rows[site[1]], -1, shape[-1])
            changed = function(o)
            return None if changed is None else (changed.view(shape), *args[1:])

        return pre

    def count_rows(layer: int):
        def pre(_module, args, kwargs):
            hidden = args[0] if args else kwargs.get("hidden_states")
            if hidden is not None:
                n_rows[layer] = hidden.shape[0]

        return pre

    def count(_module, _args, _output):
        nonlocal n_forwards
        n_forwards += 1

    try:
        for layer in {layer for _, layer in functions}:
            handles.append(model.layer(layer).register_forward_pre_hook(count_rows(layer), with_kwargs=True))
        for site, function in functions.items():
            handles.append(model.projection(site).register_forward_pre_hook(hook(site, function)))
        handles.append(model.lm.base_model.register_forward_hook(count))
        yield
    finally:
        for handle in handles:
            handle.remove()
    missed = sorted(set(functions) - reached)
    if n_forwards and missed:
        raise ModelError(
            got=f"a forward pass that never called the projection of {missed[0][0]} in layer {missed[0][1]}",
            expected="every edited or recorded projection to be called",
            remedy="register the architecture with the paths of the projections its forward really calls",
        )
