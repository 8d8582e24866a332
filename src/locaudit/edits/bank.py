"""Banks: K edits in one batch, so that a single forward runs the model under all of them.

A bank stacks the tensors of K edits site by site: A (K, r, d), B (K, d, r), c (K, r). Each row of a batch names the
edit it runs under. Example: K = 2 edits of rank 1 on a batch with 4 rows of T tokens, ``rows = [0, 0, 1, 1]``:

    h         (4, T, d)    vectors at the site
    A[rows]   (4, 1, d)    rows 0 and 1 get edit 0's A, rows 2 and 3 edit 1's
    h A^T + c (4, T, 1)    strength of the edit at each token
    delta     (4, T, d)    strength times B[rows] (4, d, 1), added to h

Edits may have different sites and ranks. What an edit lacks is filled with zeros, which change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from locaudit.edits.hooks import SiteEdit, SiteTensors, each, edited, tensors_of
from locaudit.errors import LocationError
from locaudit.location import ROLES, Positions, Site
from locaudit.models import Model
from locaudit.text import plural


class AnyEdit(Protocol):
    """What banks and exports need to know of an edit; `locaudit.edits.Edit` provides it."""

    @property
    def sites(self) -> Mapping[Site, SiteEdit]:
        """The edit's tensors at each site."""
        ...

    @property
    def positions(self) -> Positions:
        """The tokens it acts on."""
        ...


Roles = Int[Tensor, "rows tokens"] | Callable[[int, int, int], Int[Tensor, "rows tokens"]]
"""The role of each token of a forward (`locaudit.location.ROLES`), or a function ``(n_rows, n_tokens, n_past)`` that
returns them for one forward with n_past tokens in the KV cache."""


def roles_at(
    columns: Int[Tensor, " tokens"], last: Int[Tensor, "rows 1"], subject: Int[Tensor, "rows 1"]
) -> Int[Tensor, "rows tokens"]:
    """The roles of columns, from the column of each row's last prompt token and of its subject's (-1: none)."""
    is_prompt, is_answer = columns <= last, columns >= last
    bits = ROLES["prompt"] * is_prompt + ROLES["answer"] * is_answer + ROLES["last"] * (is_prompt & is_answer)
    return bits + ROLES["subject"] * (columns == subject)


@dataclass(frozen=True, eq=False)
class EditBank:
    """K edits, stacked site by site; at a site that an edit does not have, its tensors are zero."""

    sites: Mapping[Site, SiteTensors]
    positions: tuple[Positions, ...]
    """The tokens that each edit acts on."""

    def __repr__(self) -> str:
        return f"EditBank({plural(self.n_edits, 'edit')} at {plural(len(self.sites), 'site')})"

    @property
    def n_edits(self) -> int:
        """The number of edits, K."""
        return len(self.positions)

    @property
    def lowest_layer(self) -> int:
        """The lowest layer that any of the edits changes; 0 for edits without sites.

        The residual stream that enters this layer is the same as in the unedited model.
        """
        return min((layer for _, layer in self.sites), default=0)

    def part(self, start: int, end: int) -> EditBank:
        """A bank of the edits ``start:end`` only."""
        sites = {key: each(site, lambda x: x[start:end]) for key, site in self.sites.items()}
        return EditBank(sites, self.positions[start:end])

    @contextmanager
    def applied(self, model: Model, rows: Int[Tensor, " rows"], roles: Roles) -> Iterator[None]:
        """Run forwards of `model` with row r under edit ``rows[r]``, at the tokens whose `roles` have its positions."""
        wanted = torch.tensor([ROLES[name] for name in self.positions], device=rows.device)[rows].unsqueeze(-1)

        def acts(n_rows: int, n_tokens: int, n_past: int) -> Bool[Tensor, "rows tokens"]:
            given = roles(n_rows, n_tokens, n_past) if callable(roles) else roles
            return (given.to(rows.device) & wanted) != 0

        of_row = None if self.n_edits == 1 else rows
        with edited(model, self.sites, rows=of_row, positions=None if set(self.positions) == {"all"} else acts):
            yield


def stack(model: Model, edits: Sequence[AnyEdit]) -> EditBank:
    """Stack edits into a bank, each site on the device of its layer.

    Raises `LocationError` for an edit made for a model of another shape.
    """
    for edit in edits:
        check_fits(model, edit)
    placed = [{site: each(e, lambda x, s=site: x.to(model.site_device(s))) for site, e in edit.sites.items()}
              for edit in edits]  # fmt: skip
    return stack_sites(placed, tuple(edit.positions for edit in edits))


def stack_sites(edits: Sequence[Mapping[Site, SiteEdit]], positions: tuple[Positions, ...]) -> EditBank:
    """Stack edits given as site -> tensors. The tensors must be on the right devices; gradients flow back to them."""
    keys = sorted({site for edit in edits for site in edit})
    return EditBank({site: _stack_site([edit.get(site) for edit in edits]) for site in keys}, positions)


def _stack_site(edits: Sequence[SiteEdit | None]) -> SiteTensors:
    """Stack K edits of one site; None, for an edit without this site, becomes an edit of rank 0."""
    like = next(e for e in edits if e is not None)
    width, rank = len(like.b), max(len(e.c) for e in edits if e is not None)
    nothing = SiteEdit(like.a.new_zeros(0, width), like.a.new_zeros(width, 0), like.a.new_zeros(0))
    filled = [nothing if e is None else e for e in edits]
    if any(e.mask is not None for e in filled):
        no_mask = like.a.new_zeros(width)
        filled = [e if e.mask is not None else replace(e, mask=no_mask.bool(), mean=no_mask) for e in filled]
    # Lower ranks are filled up to the highest rank r, with zeros: rows of A (r, d), columns of B (d, r), entries of c
    # (r,).
    padded = [
        replace(
            e,
            a=pad(e.a, (0, 0, 0, rank - len(e.c))),
            b=pad(e.b, (0, rank - len(e.c))),
            c=pad(e.c, (0, rank - len(e.c))),
        )
        for e in filled
    ]
    return SiteTensors(**{name: torch.stack([tensors_of(e)[name] for e in padded]) for name in tensors_of(padded[0])})


def check_fits(model: Model, edit: AnyEdit) -> None:
    """Raise `LocationError` if this model lacks a site of the edit, or if the site has another width there."""
    for (name, layer), e in edit.sites.items():
        if layer >= model.n_layers or len(e.b) != model.width(Site(name, layer)):
            raise LocationError(
                got=f"an edit of {len(e.b)} coordinates at {name} in layer {layer}",
                expected=f"layers 0-{model.n_layers - 1} and {model.width(Site(name, 0))} coordinates "
                "(this model's shape)",
                remedy="use the edit with the model it was made for",
            )
