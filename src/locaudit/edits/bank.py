"""K edits as rows of one batch, so that one frozen model runs under all of them at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from locaudit.edits.hooks import Positions, SiteEdit, SiteTensors, each, edited, tensors_of
from locaudit.errors import LocationError
from locaudit.location import Site
from locaudit.models import Model


class AnyEdit(Protocol):
    """What a bank and an export need of an edit; `locaudit.edits.Edit` is one."""

    @property
    def sites(self) -> Mapping[Site, SiteEdit]:
        """What it does at each site."""
        ...

    @property
    def positions(self) -> Literal["all", "answer"]:
        """The tokens that it acts on."""
        ...


@dataclass(frozen=True, eq=False)
class EditBank:
    """K edits, stacked. A site that an edit leaves alone has zeros there."""

    sites: Mapping[Site, SiteTensors]
    answer_only: tuple[bool, ...]
    """For each edit, whether it acts from the last prompt token on only."""

    def __repr__(self) -> str:
        return f"EditBank({self.n_edits} edits at {len(self.sites)} sites)"

    @property
    def n_edits(self) -> int:
        """K."""
        return len(self.answer_only)

    @property
    def lowest_layer(self) -> int:
        """The lowest layer that an edit acts in: what enters it is the unedited model's. 0 for edits without sites."""
        return min((layer for _, layer in self.sites), default=0)

    def part(self, start: int, end: int) -> EditBank:
        """The bank of the edits ``start:end`` alone."""
        sites = {key: each(site, lambda x: x[start:end]) for key, site in self.sites.items()}
        return EditBank(sites, self.answer_only[start:end])

    @contextmanager
    def applied(self, model: Model, rows: Int[Tensor, " rows"], answer_positions: Positions) -> Iterator[None]:
        """Run `model` with row r under edit ``rows[r]``; `answer_positions` are those an ``answer`` edit acts on."""
        everywhere = ~torch.tensor(self.answer_only, device=rows.device)[rows].unsqueeze(-1)  # (rows, 1)

        def positions(n_rows: int, n_tokens: int, n_past: int) -> Bool[Tensor, "rows tokens"]:
            given = answer_positions
            return everywhere | (given(n_rows, n_tokens, n_past) if callable(given) else given)

        of_row = None if self.n_edits == 1 else rows
        with edited(model, self.sites, rows=of_row, positions=positions if any(self.answer_only) else None):
            yield

    def decoding(self, model: Model, rows: Int[Tensor, " rows"]) -> AbstractContextManager[None]:
        """Generate with row r, left-padded, under edit ``rows[r]``.

        The last column of every forward is the last prompt token or an answer's newest token: an ``answer`` edit acts
        there and nowhere else.
        """
        return self.applied(model, rows, lambda _rows, n, _past: torch.arange(n, device=rows.device) == n - 1)


def stack(model: Model, edits: Sequence[AnyEdit]) -> EditBank:
    """The bank of the given edits, on the devices of their sites. Raises `LocationError` if one does not fit."""
    for edit in edits:
        check_fits(model, edit)
    placed = [{site: each(e, lambda x, s=site: x.to(model.site_device(s))) for site, e in edit.sites.items()}
              for edit in edits]  # fmt: skip
    return stack_sites(placed, tuple(edit.positions == "answer" for edit in edits))


def stack_sites(edits: Sequence[Mapping[Site, SiteEdit]], answer_only: tuple[bool, ...]) -> EditBank:
    """The bank of edits whose tensors lie where they are used; differentiable in them."""
    keys = sorted({site for edit in edits for site in edit})
    return EditBank({site: _stack_site([edit.get(site) for edit in edits]) for site in keys}, answer_only)


def _stack_site(edits: Sequence[SiteEdit | None]) -> SiteTensors:
    like = next(e for e in edits if e is not None)
    width, rank = len(like.b), max(len(e.c) for e in edits if e is not None)
    nothing = SiteEdit(like.a.new_zeros(0, width), like.a.new_zeros(width, 0), like.a.new_zeros(0))
    filled = [nothing if e is None else e for e in edits]
    if any(e.mask is not None for e in filled):
        no_mask = like.a.new_zeros(width)
        filled = [e if e.mask is not None else replace(e, mask=no_mask.bool(), mean=no_mask) for e in filled]
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
    """Raise `LocationError` for an edit of sites that this model does not have."""
    for (name, layer), e in edit.sites.items():
        if layer >= model.n_layers or len(e.b) != model.width(Site(name, layer)):
            raise LocationError(
                got=f"an edit of {len(e.b)} {name} coordinates in layer {layer}",
                expected=f"layers 0-{model.n_layers - 1} and {model.width(Site(name, 0))} coordinates "
                "(this model's shape)",
                remedy="use the edit with the model that it was made for",
            )
