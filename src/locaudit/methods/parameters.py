"""Trainable edits: at each site, a low-rank update B A whose output is in the location's subspace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from locaudit.edits import Edit, EditBank, SiteEdit, stack_sites
from locaudit.edits.hooks import each
from locaudit.location import Location, Positions, Site
from locaudit.models import Model

Reader = Literal["layer", "location"]
Subspace = Bool[Tensor, " d"] | Float[Tensor, "d k"]
"""The subspace of a site's vectors that belongs to a location: a mask of coordinates, or an orthonormal basis Q."""


def onto(subspace: Subspace, columns: Float[Tensor, "d r"]) -> Float[Tensor, "d r"]:
    """Project columns orthogonally onto a subspace: set rows outside a mask to 0, or apply Q Q^T for a basis Q."""
    if subspace.dtype == torch.bool:
        return columns * subspace.unsqueeze(-1)
    return subspace @ (subspace.T @ columns)


class TrainableEdit(nn.Module):
    """An edit h' = h + B A h with trainable A (r, d) and B (d, r) at each site of one location.

    It acts on the tokens of its `positions`, as in training, so in `to_edit`.
    The columns of B are projected onto the location's subspace, so that the edit writes only there. `reader` says what
    the edit reads: A may read all of h (``layer``, as in the paper) or only the location's subspace (``location``). The
    paper uses rank 1. Where the subspace is the span of directions with the orthonormal basis Q (d, k), B is
    sqrt(d / k) Q W with trainable W (k, r). With this factor, a step of W moves B as far as a step of d coordinates
    does, whatever the directions. A `constant` edit reads nothing: h' = h + b with trainable b (the paper's footnote).

    B starts at 0, so that training starts at the unedited model. The entries of A are drawn uniformly from +-1/sqrt(d),
    like LoRA's A in PEFT. The draw depends only on `seed` and the layer: in a layer that two locations share, their
    edits start with the same A.
    """

    def __init__(
        self,
        model: Model,
        location: Location,
        *,
        rank: int = 1,
        reader: Reader = "layer",
        constant: bool = False,
        positions: Positions = "all",
        seed: int = 0,
    ):
        super().__init__()
        self.reader, self.constant = reader, constant
        self.positions: Positions = positions
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
            written = width if subspace.dtype == torch.bool else subspace.shape[1]
            self.b.append(nn.Parameter(torch.zeros(written, len(a), device=device)))

    @property
    def sites(self) -> Mapping[Site, SiteEdit]:
        """The current edit of each site; gradients flow back to the parameters."""
        out = {}
        for (site, subspace), a, b in zip(self.subspaces.items(), self.a, self.b, strict=True):
            reads = onto(subspace, a.T).T if self.reader == "location" and not self.constant else a
            if subspace.dtype == torch.bool:
                written = onto(subspace, b)
            else:
                written = (len(subspace) / len(b)) ** 0.5 * (subspace @ b)
            out[site] = SiteEdit(reads, written, b.new_full(b.shape[1:], float(self.constant)))
        return out

    def to_edit(self) -> Edit:
        """A copy of the current edit on the CPU, without gradients."""
        copies = {site: each(e, lambda x: x.detach().cpu().clone()) for site, e in self.sites.items()}
        return Edit(copies, self.positions)


def stack_trainable(edits: Sequence[TrainableEdit]) -> EditBank:
    """Stack the current edits into a bank; gradients flow back to their parameters."""
    return stack_sites([edit.sites for edit in edits], tuple(edit.positions for edit in edits))
