"""Hooks that read or change the vectors at a model's sites, always inside a context manager.

A site is the input of an attention output projection (``heads``), the input of an MLP down projection (``neurons``) or
the output of a decoder layer (``residual``). `apply_edit` is the only place that applies the formula of an edit,
h' = where(mask, mean, h) + B (c + A h).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from locaudit.errors import LocationError, ModelError
from locaudit.location import Site
from locaudit.models import Model
from locaudit.text import plural


@dataclass(frozen=True, eq=False)
class SiteEdit:
    """An edit at one site: h' = where(mask, mean, h) + B (c + A h), in float32, where h has d coordinates.

    `mask` and `mean` are for ablations only: masked coordinates become their mean. An ablation may have rank r = 0.
    Raises `LocationError` if the shapes of A, B and c do not match.
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
                expected="A (r, d), B (d, r) and c (r,), with d coordinates and any rank r",
                remedy="transpose A or B, or use SiteEdit.rank_one for vectors",
            )

    def __repr__(self) -> str:
        return f"SiteEdit(rank {len(self.c)}, {len(self.b)} coordinates{'' if self.mask is None else ', ablated'})"

    @staticmethod
    def rank_one(a: Float[Tensor, " d"], b: Float[Tensor, " d"], c: float = 0.0) -> SiteEdit:
        """The edit h' = h + (c + <a, h>) b of two vectors; with a = 0 and c = 1, b is a steering vector."""
        return SiteEdit(a.unsqueeze(0), b.unsqueeze(1), torch.tensor([float(c)], device=b.device))

    @property
    def as_matrices(self) -> SiteEdit:
        """The same edit without a mask, as matrices: A' = [A; -P^T], B' = [B, P], c' = [c; P^T mean].

        P (d, masked) has one column per masked coordinate, the unit vector of that coordinate. It adds the term
        P (P^T mean - P^T h), which replaces the masked coordinates of h by their means.
        """
        if self.mask is None or self.mean is None:
            return self
        p = torch.eye(len(self.mask))[:, self.mask]  # (d, masked)
        return SiteEdit(
            torch.cat([self.a, -p.T]), torch.cat([self.b, p], dim=1), torch.cat([self.c, self.mean[self.mask]])
        )


@dataclass(frozen=True, eq=False)
class SiteTensors:
    """K edits of one site (a vector of one layer), stacked; edits of a lower rank are padded with zeros.

    `mask` and `mean` are None unless one of the edits is an ablation; the masks of the other edits are then all False.
    """

    a: Float[Tensor, "k r d"]
    b: Float[Tensor, "k d r"]
    c: Float[Tensor, "k r"]
    mask: Bool[Tensor, "k d"] | None = None
    mean: Float[Tensor, "k d"] | None = None

    def __repr__(self) -> str:
        return f"SiteTensors({plural(len(self.c), 'edit')} of rank {self.a.shape[1]}, {self.a.shape[2]} coordinates)"


_S = TypeVar("_S", SiteEdit, SiteTensors)


def tensors_of(site: SiteEdit | SiteTensors) -> dict[str, Tensor]:
    """The tensors by field name, without those that are None."""
    found = {field.name: getattr(site, field.name) for field in fields(site)}
    return {name: x for name, x in found.items() if x is not None}


def each(site: _S, change: Callable[[Tensor], Tensor]) -> _S:
    """Apply `change` to every tensor of a site's edit and return the result."""
    return replace(site, **{name: change(x) for name, x in tensors_of(site).items()})


def apply_edit(
    h: Float[Tensor, "rows tokens d"],
    site: SiteTensors,
    rows: Int[Tensor, " rows"] | None,
    positions: Bool[Tensor, "rows tokens"] | None,
) -> Float[Tensor, "rows tokens d"]:
    """Compute h' = where(mask, mean, h) + B (c + A h). Row r of the batch gets edit ``rows[r]`` (None: all get edit 0).

    c + A h and its product with B are computed in float32; the result has h's dtype. Tokens whose `positions` entry is
    False stay the same bit for bit. All of h stays the same if there is no mask and B = 0, or A = 0 and c = 0.
    """
    # `one` has the edit of each row: A (rows, r, d), B (rows, d, r), c (rows, r); without `rows`, no first dimension.
    if rows is None:
        one = each(site, lambda x: x[0])
    else:
        # Not x[rows]: on a CPU with several threads, its gradient is not the same bit for bit in every run.
        of_row = rows.to(h.device)
        one = each(site, lambda x: x.index_select(0, of_row))
    strength = h.float() @ one.a.mT + one.c.unsqueeze(-2)  # (rows, tokens, r)
    delta = strength @ one.b.mT  # (rows, tokens, d)
    acts = None if positions is None else positions.to(h.device).unsqueeze(-1)  # (rows, tokens, 1)
    if acts is not None:
        delta = delta.masked_fill(~acts, 0.0)
    if one.mask is not None and one.mean is not None:
        mask = one.mask.unsqueeze(-2)  # (rows, 1, d), or (1, d) without `rows`
        h = torch.where(mask if acts is None else mask & acts, one.mean.to(h.dtype).unsqueeze(-2), h)
    return h + delta.to(h.dtype)


Positions = Bool[Tensor, "rows tokens"] | Callable[[int, int, int], Bool[Tensor, "rows tokens"]]
"""The tokens that an edit acts on: a mask, or a function ``(n_rows, n_tokens, n_past)`` that returns the mask for one
forward. The forward has n_rows rows and n_tokens new tokens; n_past tokens are in the KV cache."""


@contextmanager
def edited(
    model: Model,
    sites: Mapping[Site, SiteTensors],
    *,
    rows: Int[Tensor, " rows"] | None = None,
    positions: Positions | None = None,
) -> Iterator[None]:
    """Run forwards of `model.lm` with edited sites; leaving restores the model, also after an exception.

    `rows` gives the edit of each batch row (None: edit 0), and `positions` the tokens that edits act on (None: all). On
    leaving, raises `ModelError` if a forward ran without calling one of the sites, since the edit had no effect there.
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
    """Record the vectors at some sites in the next forward, in float32 and without gradients.

    `at` is a pair of index tensors (row, token), with the n positions to record. Yields a dictionary, which the forward
    fills with site -> vectors (n, d).
    """
    out: dict[Site, Tensor] = {}
    row, token = at

    def reader(site: Site) -> _Change:
        def read(h: Tensor, _n_past: int) -> Tensor:
            out[site] = h.detach()[row.to(h.device), token.to(h.device)].float()
            return h

        return read

    with _site_hooks(model, {site: reader(site) for site in sites}):
        yield out


@contextmanager
def blended(model: Model, sites: Mapping[Site, tuple[Float[Tensor, "*#h"], Float[Tensor, "*#h"]]]) -> Iterator[None]:
    """Run forwards with h' = h + g (new - h) at each site, computed in float32; `sites` has (g, new) of each.

    Gates and new vectors are (d,), or of more dimensions that broadcast to those of h, (rows, tokens, d). Where g = 0
    nothing changes, and the gradient by g says how the result begins to change as h goes to `new`. g = 1 replaces h.
    """

    def blend(g: Tensor, new: Tensor) -> _Change:
        def change(h: Tensor, _n_past: int) -> Tensor:
            return (h.float() + g.to(h.device) * (new.to(h.device) - h.float())).to(h.dtype)

        return change

    with _site_hooks(model, {site: blend(*pair) for site, pair in sites.items()}):
        yield


class _Enough(Exception):
    """Raised by a hook to stop a forward as soon as its result is known."""


def entering(model: Model, layer: int, forward: Callable[[], object]) -> Float[Tensor, "rows tokens d"]:
    """The residual stream that enters decoder layer `layer` (at least 1) when `forward` is called.

    The forward is stopped there: higher layers do not run.
    """
    found: list[Tensor] = []

    def stop(h: Tensor, _n_past: int) -> Tensor:
        found.append(h.detach())
        raise _Enough

    with suppress(_Enough), _site_hooks(model, {Site("residual", layer - 1): stop}):
        forward()
    return found[0]


@contextmanager
def resumed(model: Model, layer: int, hidden: Float[Tensor, "rows tokens d"]) -> Iterator[None]:
    """Start forwards at decoder layer `layer` (at least 1), with `hidden` as the residual stream that enters it.

    The layers below do not run: each is replaced by a function that returns `hidden`.
    """

    def idle(*args, **kwargs):
        stream = hidden.to((args[0] if args else kwargs["hidden_states"]).device)
        return (stream, *[None] * (model.n_layer_outputs - 1)) if model.n_layer_outputs else stream

    with replaced_forwards([model.layer(number) for number in range(layer)], lambda _: idle):
        yield


@contextmanager
def replaced_forwards(
    modules: Sequence[nn.Module], replaced: Callable[[Callable], Callable], method: str = "forward"
) -> Iterator[None]:
    """Replace the `forward` (or another method) of modules by ``replaced(original)``; leaving restores it."""
    # Methods of the instance itself. Usually None, because the method belongs to the class; accelerate may set one.
    own = [module.__dict__.get(method) for module in modules]
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
"""``change(h, n_past)`` returns what replaces a site's vectors h; n_past is the number of tokens in the KV cache."""


@contextmanager
def _site_hooks(model: Model, changes: Mapping[Site, _Change]) -> Iterator[None]:
    """Hook every site so that its vectors become ``change(h, n_past)``; remove the hooks on leaving."""
    handles = []
    reached: set[Site] = set()
    forwards: list[tuple[int, int]] = []  # for each forward: number of rows, number of tokens already in the KV cache

    def note(_module, args, kwargs) -> None:
        given = [x for x in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None]
        # Named "cache" since transformers 5.24; a checkpoint's own code may still use the old name.
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        forwards.append((given[0].shape[0], 0 if cache is None else int(cache.get_seq_length())))

    def changed(site: Site, h: Tensor) -> Tensor:
        reached.add(site)
        n_rows, n_past = forwards[-1]
        # OPT flattens h to (rows x tokens, d) before its MLP projection.
        wide = h if h.dim() == 3 else h.view(n_rows, -1, h.shape[-1])
        return changes[site](wide, n_past).view(h.shape)

    try:
        handles.append(model.trunk.register_forward_pre_hook(note, with_kwargs=True))
        for site in changes:
            handles.append(model.hook(site, partial(changed, site)))
        yield
    finally:
        for handle in handles:
            handle.remove()
    missed = sorted(set(changes) - reached)
    if forwards and missed:
        raise ModelError(
            got=f"a forward pass that never reached {missed[0][0]} in layer {missed[0][1]}",
            expected="a forward that calls every edited or recorded site",
            remedy="set architecture to the paths of the modules that the model's forward really calls",
        )
