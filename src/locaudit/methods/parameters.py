"""Trainable edits: per site a reader a and a writer b, masked to the location."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from locaudit.edits import Edit, EditBank, SiteEdit
from locaudit.edits.hooks import SiteTensors
from locaudit.location import Location
from locaudit.models import Model, Site

Reader = Literal["layer", "location", "none"]


class TrainableEdit(nn.Module):
    """The paper's reparameterised rank-1 LoRA at one location: o' = o + <a, o> b, with b = 0 outside the location.

    `reader` says what a may read: ``layer`` all of o (the paper), ``location`` the location's coordinates only,
    ``none`` nothing: then c = 1 and b is a trained constant (the paper's footnote). b starts at 0, so training starts
    at the unedited model; a starts uniform in +-1/sqrt(d_in), as LoRA's A does in PEFT, drawn per layer from `seed` so
    that locations sharing a layer share its reader's start.
    """

    def __init__(self, model: Model, location: Location, *, reader: Reader = "layer", seed: int = 0):
        super().__init__()
        self.reader = reader
        self.sites: list[Site] = []
        self.a = nn.ParameterList()
        self.b = nn.ParameterList()
        self.masks: list[Tensor] = []
        for site, mask in model.masks(location).items():
            device = model.site_device(site)
            generator = torch.Generator().manual_seed((seed + site[1]) % 2**63)
            a = (2 * torch.rand(len(mask), generator=generator) - 1) / len(mask) ** 0.5
            if reader == "none":
                a.zero_()
            elif reader == "location":
                a[~mask] = 0
            self.sites.append(site)
            self.masks.append(mask.to(device))
            self.a.append(nn.Parameter(a.to(device), requires_grad=reader != "none"))
            self.b.append(nn.Parameter(torch.zeros(len(mask), device=device)))

    def masked(self, i: int) -> tuple[Tensor, Tensor, float]:
        """(a, b, c) of the i-th site, zero where they must be."""
        a = self.a[i] * self.masks[i] if self.reader == "location" else self.a[i]
        return a, self.b[i] * self.masks[i], 1.0 if self.reader == "none" else 0.0

    def to_edit(self) -> Edit:
        """The edit as it is now, without gradients."""
        values = [self.masked(i) for i in range(len(self.sites))]
        return Edit(
            {
                site: SiteEdit(a.detach().cpu().clone(), b.detach().cpu().clone(), c)
                for site, (a, b, c) in zip(self.sites, values, strict=True)
            }
        )


def stack_trainable(edits: Sequence[TrainableEdit]) -> EditBank:
    """The bank of trainable edits as they are now, differentiable in their parameters."""
    found: dict[Site, dict[int, tuple[Tensor, Tensor, float]]] = {}
    for k, edit in enumerate(edits):
        for i, site in enumerate(edit.sites):
            found.setdefault(site, {})[k] = edit.masked(i)
    sites = {}
    for site, values in sorted(found.items()):
        blank = torch.zeros_like(next(iter(values.values()))[1])
        rows = [values.get(k, (blank, blank, 0.0)) for k in range(len(edits))]
        sites[site] = SiteTensors(
            torch.stack([a for a, _, _ in rows]),
            torch.stack([b for _, b, _ in rows]),
            torch.tensor([c for _, _, c in rows], device=blank.device),
        )
    return EditBank(sites, (False,) * len(edits))
