"""Trainable edits: per site A (r, d) and B (d, r), B's columns in the location's subspace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from locaudit.edits import Edit, EditBank, SiteEdit, stack_sites
from locaudit.edits.hooks import each
from locaudit.location import Location, Site
from locaudit.models import Model

Reader = Literal["layer", "location"]
Subspace = Bool[Tensor, " d"] | Float[Tensor, "d k"]
"""Of a location at a site: its coordinates as a mask, or an orthonormal basis Q where it is none of coordinates."""


def onto(subspace: Subspace, columns: Float[Tensor, "d r"]) -> Float[Tensor, "d r"]:
    """Orthogonal projection of columns onto a subspace: masked, or Q Q^T columns."""
    if subspace.dtype == torch.bool:
        return columns * subspace.unsqueeze(-1)
    return subspace @ (subspace.T @ columns)


class TrainableEdit(nn.Module):
    """The paper's reparameterised LoRA at one location: h' = h + B A h, B's columns in the location's subspace.

    The paper's rank is 1. `reader` says what A may read: ``layer`` all of h (the paper), ``location`` the location's
    subspace only. A `constant` edit reads nothing: h' = h + b, b trained (the paper's footnote). B starts at 0, so
    training starts at the unedited model; A starts uniform in +-1/sqrt(d), as LoRA's A does in PEFT, drawn per layer
    from `seed` so that locations sharing a layer share its reader's start.
    """

    def __init__(
        self,
        model: Model,
        location: Location,
        *,
        rank: int = 1,
        reader: Reader = "layer",
        constant: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        self.reader, self.constant = reader, constant
        self.subspaces: dict[Site, Subspace] = {}
        self.a = nn.ParameterList()
        self.b = nn.ParameterList()
        for site, subspace in model.subspaces(location).items():
            device, width = model.site_device(site), model.width(site)
            generator = torch.Generator().manual_seed((seed + site.layer) % 2**63)
            a = (2 * torch.rand(rank, width, generator=generator) - 1) / width**0.5
            if constant:
                a = a.new_zeros(1, width)
            elif reader == "location":
                a = onto(subspace, a.T).T
            self.subspaces[site] = subspace.to(device)
            self.a.append(nn.Parameter(a.contiguous().to(device), requires_grad=not constant))
            self.b.append(nn.Parameter(torch.zeros(width, len(a), device=device)))

    @property
    def sites(self) -> Mapping[Site, SiteEdit]:
        """The edit of each site as it is now, differentiable in the parameters."""
        out = {}
        for (site, subspace), a, b in zip(self.subspaces.items(), self.a, self.b, strict=True):
            reads = onto(subspace, a.T).T if self.reader == "location" and not self.constant else a
            out[site] = SiteEdit(reads, onto(subspace, b), b.new_full(b.shape[1:], float(self.constant)))
        return out

    def to_edit(self) -> Edit:
        """The edit as it is now, without gradients, on the CPU."""
        return Edit({site: each(e, lambda x: x.detach().cpu().clone()) for site, e in self.sites.items()})


def stack_trainable(edits: Sequence[TrainableEdit]) -> EditBank:
    """The bank of trainable edits as they are now, differentiable in their parameters."""
    return stack_sites([edit.sites for edit in edits], (False,) * len(edits))
