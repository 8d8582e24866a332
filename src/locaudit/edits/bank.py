"""K edits as rows of one batch, so that one frozen model runs under all of them at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from locaudit.edits.edit import Edit
from locaudit.edits.hooks import SiteTensors, edited
from locaudit.models import Model, Site


@dataclass(frozen=True, eq=False)
class EditBank:
    """K edits, stacked. A site that an edit leaves alone has zeros there."""

    sites: Mapping[Site, SiteTensors]
    answer_only: tuple[bool, ...]
    """For each edit, whether it acts from the last prompt token on only."""

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
        sites = {key: SiteTensors(s.a[start:end], s.b[start:end], s.c[start:end]) for key, s in self.sites.items()}
        return EditBank(sites, self.answer_only[start:end])

    @contextmanager
    def applied(
        self,
        model: Model,
        rows: Int[Tensor, " rows"],
        answer_positions: Bool[Tensor, "rows tokens"],
    ) -> Iterator[None]:
        """Run `model` with row r under edit ``rows[r]``; `answer_positions` are those an ``answer`` edit acts on."""
        positions = answer_positions | self._everywhere(rows) if any(self.answer_only) else None
        with edited(model, self.sites, rows=None if self.n_edits == 1 else rows, positions=positions):
            yield

    @contextmanager
    def decoding(self, model: Model, rows: Int[Tensor, " rows"]) -> Iterator[None]:
        """Generate with row r, left-padded, under edit ``rows[r]``.

        The last column of every forward is the last prompt token or an answer's newest token: an ``answer`` edit acts
        there and nowhere else.
        """

        def last_column(n_tokens: int) -> Bool[Tensor, "rows tokens"]:
            return (torch.arange(n_tokens, device=rows.device) == n_tokens - 1) | self._everywhere(rows)

        positions = last_column if any(self.answer_only) else None
        with edited(model, self.sites, rows=None if self.n_edits == 1 else rows, positions=positions):
            yield

    def _everywhere(self, rows: Int[Tensor, " rows"]) -> Bool[Tensor, "rows 1"]:
        return ~torch.tensor(self.answer_only, device=rows.device)[rows].unsqueeze(-1)


def stack(model: Model, edits: Sequence[Edit]) -> EditBank:
    """The bank of the given edits, on the devices of the projections."""
    keys = sorted({site for edit in edits for site in edit.sites})
    sites = {}
    for site in keys:
        device = model.site_device(site)
        zeros = torch.zeros(model.width(site), device=device)
        chosen = [edit.sites.get(site) for edit in edits]
        sites[site] = SiteTensors(
            torch.stack([zeros if e is None else e.a.to(device) for e in chosen]),
            torch.stack([zeros if e is None else e.b.to(device) for e in chosen]),
            torch.tensor([0.0 if e is None else e.c for e in chosen], device=device),
        )
    return EditBank(sites, tuple(edit.positions == "answer" for edit in edits))
