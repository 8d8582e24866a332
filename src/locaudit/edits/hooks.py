"""Reading and changing vectors at sites, inside context managers only.

The one formula of the library, h' = where(mask, mean, h) + B (c + A h), is applied here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from locaudit.errors import LocationError, ModelError
from locaudit.location import Site
from locaudit.models import Model


@dataclass(frozen=True, eq=False)
class SiteEdit:
    """One edit of one site: h' = where(mask, mean, h) + B (c + A h), all float32.

    Mask and mean are there for ablations only, whose rank may be 0. Raises `LocationError` for shapes that do not fit.
    """

    a: Float[Tensor, "r d"]
    b: Float[Tensor, "d r"]
    c: Float[Tensor, " r"]
    mask: Bool[Tensor, " d"] | None = None
    mean: Float[Tensor, " d"] | None = None

    def __post_init__(self):
        if self.a.dim() != 2 or self.b.shape != self.a.T.shape or self.c.shape != self.a.shape[:1]:
            raise LocationError(
                got=f"an edit with A {tuple(self.a.shape)}, B {tuple(self.b.shape)} and c {tuple(self.c.shape)}",
                expected="A (r, d), B (d, r) and c (r,), of d coordinates and any rank r",
                remedy="transpose, or take SiteEdit.rank_one for vectors",
            )

    @staticmethod
    def rank_one(a: Float[Tensor, " d"], b: Float[Tensor, " d"], c: float = 0.0) -> SiteEdit:
        """H' = h + (c + <a, h>) b; with a = 0 and c = 1, b is a steering vector."""
        return SiteEdit(a.unsqueeze(0), b.unsqueeze(1), torch.tensor([float(c)], device=b.device))

    @property
    def as_matrices(self) -> SiteEdit:
        """The same edit without a mask: with P the masked coordinates, A = [A; -P^T], B = [B, P], c = [c; P^T mean]."""
        if self.mask is None or self.mean is None:
            return self
        p = torch.eye(len(self.mask))[:, self.mask]  # (d, masked)
        return SiteEdit(
            torch.cat([self.a, -p.T]), torch.cat([self.b, p], dim=1), torch.cat([self.c, self.mean[self.mask]])
        )


@dataclass(frozen=True, eq=False)
class SiteTensors:
    """K edits of one site, edits of lower rank padded with zeros; mask and mean if one of them has these."""

    a: Float[Tensor, "k r d"]
    b: Float[Tensor, "k d r"]
    c: Float[Tensor, "k r"]
    mask: Bool[Tensor, "k d"] | None = None
    mean: Float[Tensor, "k d"] | None = None


_S = TypeVar("_S", SiteEdit, SiteTensors)


def tensors_of(site: SiteEdit | SiteTensors) -> dict[str, Tensor]:
    """Its tensors by name, those that are there."""
    found = {field.name: getattr(site, field.name) for field in fields(site)}
    return {name: x for name, x in found.items() if x is not None}


def each(site: _S, change: Callable[[Tensor], Tensor]) -> _S:
    """The same with every tensor changed."""
    return replace(site, **{name: change(x) for name, x in tensors_of(site).items()})


def apply_edit(
    h: Float[Tensor, "rows tokens d"],
    site: SiteTensors,
    rows: Int[Tensor, " rows"] | None,
    positions: Bool[Tensor, "rows tokens"] | None,
) -> Float[Tensor, "rows tokens d"]:
    """H' = where(mask, mean, h) + B (c + A h), for each row with the edit that `rows` names (None: the only one).

    The strength c + A h and the product with B are float32; the result has h's dtype. Positions that are False stay as
    they are, bit for bit. With B = 0, or A = 0 and c = 0, and no mask, h' equals h exactly.
    """
    if rows is None:
        one = each(site, lambda x: x[0])
    else:
        # Not x[rows], whose gradient is not repeatable to the bit on a CPU with several threads.
        of_row = rows.to(h.device)
        one = each(site, lambda x: x.index_select(0, of_row))
    strength = h.float() @ one.a.mT + one.c.unsqueeze(-2)  # (rows, tokens, r)
    delta = strength @ one.b.mT  # (rows, tokens, d)
    acts = None if positions is None else positions.to(h.device).unsqueeze(-1)  # (rows, tokens, 1)
    if acts is not None:
        delta = delta.masked_fill(~acts, 0.0)
    if one.mask is not None and one.mean is not None:
        mask = one.mask.unsqueeze(-2)  # (rows or nothing, 1, d)
        h = torch.where(mask if acts is None else mask & acts, one.mean.to(h.dtype).unsqueeze(-2), h)
    return h + delta.to(h.dtype)


Positions = Bool[Tensor, "rows tokens"] | Callable[[int, int, int], Bool[Tensor, "rows tokens"]]
"""Tokens that an edit acts on, or a function that gives them for a forward of so many rows and tokens, behind so many
tokens in the cache."""


@contextmanager
def edited(
    model: Model,
    sites: Mapping[Site, SiteTensors],
    *,
    rows: Int[Tensor, " rows"] | None = None,
    positions: Positions | None = None,
) -> Iterator[None]:
    """Run forwards of `model.lm` with edited sites; leaving restores the model, whatever happens.

    `rows` names the edit of each batch row, `positions` the tokens it acts on (None: all). Raises `ModelError` on
    leaving if a forward ran but never reached one of the sites: an edit that does nothing must not pass unnoticed.
    """

    def edit(site: SiteTensors) -> _Change:
        def change(h: Tensor, n_past: int) -> Tensor:
            on = positions(h.shape[0], h.shape[1], n_past) if callable(positions) else positions
            return apply_edit(h, site, rows, on)

        return change

    with _site_hooks(model, {key: edit(site) for key, site in sites.items()}):
        yield


@contextmanager
def record(
    model: Model, sites: Sequence[Site], at: tuple[Int[Tensor, " n"], Int[Tensor, " n"]]
) -> Iterator[dict[Site, Float[Tensor, "n d"]]]:
    """Collect the sites' vectors at the (row, token) index pairs `at` of the next forward, float32; no gradients."""
    out: dict[Site, Tensor] = {}
    row, token = at

    def reader(site: Site) -> _Change:
        def read(h: Tensor, _n_past: int) -> Tensor:
            out[site] = h.detach()[row.to(h.device), token.to(h.device)].float()
            return h

        return read

    with _site_hooks(model, {site: reader(site) for site in sites}):
        yield out


class _Enough(Exception):
    """What was wanted of a forward is known."""


def entering(model: Model, layer: int, forward: Callable[[], object]) -> Float[Tensor, "rows tokens d"]:
    """The residual stream that enters decoder layer `layer` (from 1) when `forward` runs; the rest of it is not run."""
    found: list[Tensor] = []

    def stop(h: Tensor, _n_past: int) -> Tensor:
        found.append(h.detach())
        raise _Enough

    with suppress(_Enough), _site_hooks(model, {Site("residual", layer - 1): stop}):
        forward()
    return found[0]


@contextmanager
def resumed(model: Model, layer: int, hidden: Float[Tensor, "rows tokens d"]) -> Iterator[None]:
    """Run forwards from decoder layer `layer` (from 1) on, with `hidden` as what enters it; no layer below it runs."""

    def idle(*args, **kwargs):
        stream = hidden.to((args[0] if args else kwargs["hidden_states"]).device)
        return (stream, *[None] * (model.n_layer_outputs - 1)) if model.n_layer_outputs else stream

    with replaced_forwards([model.layer(number) for number in range(layer)], lambda _: idle):
        yield


@contextmanager
def replaced_forwards(
    modules: Sequence[nn.Module], replaced: Callable[[Callable], Callable], method: str = "forward"
) -> Iterator[None]:
    """Give modules another `forward` (or other method), made of their own; leaving gives it back."""
    own = [module.__dict__.get(method) for module in modules]  # accelerate keeps one there
    try:
        for module in modules:
            setattr(module, method, replaced(getattr(module, method)))
        yield
    finally:
        for module, before in zip(modules, own, strict=True):
            if before is None:
                module.__dict__.pop(method, None)
            else:
                setattr(module, method, before)


_Change = Callable[[Float[Tensor, "rows tokens d"], int], Float[Tensor, "rows tokens d"]]
"""From a site's vectors, and the number of tokens in the cache before them, to what takes their place."""


@contextmanager
def _site_hooks(model: Model, changes: Mapping[Site, _Change]) -> Iterator[None]:
    handles = []
    reached: set[Site] = set()
    forwards: list[tuple[int, int]] = []  # rows, and tokens in the cache, of each

    def note(_module, args, kwargs) -> None:
        given = [x for x in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None]
        # Named "cache" since transformers 5.24; a checkpoint's own code may still use the old name.
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        forwards.append((given[0].shape[0], 0 if cache is None else int(cache.get_seq_length())))

    def changed(site: Site, h: Tensor) -> Tensor:
        reached.add(site)
        n_rows, n_past = forwards[-1]
        # OPT flattens (rows, tokens) before its MLP projection.
        wide = h if h.dim() == 3 else h.view(n_rows, -1, h.shape[-1])
        return changes[site](wide, n_past).view(h.shape)

    def at_input(site: Site):
        return lambda _module, args: (changed(site, args[0]), *args[1:])

    def at_output(site: Site):
        def post(_module, _args, output):
            if isinstance(output, tuple):  # some architectures' layers return more than the stream
                return changed(site, output[0]), *output[1:]
            return changed(site, output)

        return post

    try:
        handles.append(model.trunk.register_forward_pre_hook(note, with_kwargs=True))
        for site in changes:
            name, layer = site
            if name == "residual":
                handles.append(model.layer(layer).register_forward_hook(at_output(site)))
            else:
                handles.append(model.projection(site).register_forward_pre_hook(at_input(site)))
        yield
    finally:
        for handle in handles:
            handle.remove()
    missed = sorted(set(changes) - reached)
    if forwards and missed:
        raise ModelError(
            got=f"a forward pass that never reached {missed[0][0]} in layer {missed[0][1]}",
            expected="every edited or recorded site to be reached",
            remedy="register the architecture with the paths of the layers and projections its forward really calls",
        )
