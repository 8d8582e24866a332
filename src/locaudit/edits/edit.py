"""One edit: what is added at each site, and at which tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from locaudit.errors import DataError
from locaudit.models import Model, Site

Positions = Literal["all", "answer"]


@dataclass(frozen=True, eq=False)
class SiteEdit:
    """At one site: reader `a` and writer `b` (d_in,), constant `c`; o' = o + (c + <a, o>) b."""

    a: Float[Tensor, " d_in"]
    b: Float[Tensor, " d_in"]
    c: float


@dataclass(frozen=True, eq=False)
class Edit:
    """An edit of a model: site -> `SiteEdit`, acting on all tokens or from the last prompt token on (``answer``)."""

    sites: Mapping[Site, SiteEdit]
    positions: Positions = "all"

    def to_bytes(self) -> bytes:
        """The edit as a safetensors file."""
        tensors, constants = {}, {}
        for (kind, layer), site in sorted(self.sites.items()):
            # safetensors refuses tensors that share memory, as one reader of several sites does.
            tensors[f"{kind}.{layer}.a"] = site.a.detach().cpu().contiguous().clone()
            tensors[f"{kind}.{layer}.b"] = site.b.detach().cpu().contiguous().clone()
            constants[f"{kind}.{layer}"] = site.c
        return save(tensors, {"locaudit": json.dumps({"positions": self.positions, "c": constants}, sort_keys=True)})

    @property
    def is_finite(self) -> bool:
        """Whether every number in it is."""
        return all(
            math.isfinite(site.c) and bool(torch.isfinite(site.a).all() and torch.isfinite(site.b).all())
            for site in self.sites.values()
        )


def load_edit(path: str | Path) -> Edit:
    """Read an edit saved in a run folder. Raises `DataError` for anything else."""
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})["locaudit"])
            sites: dict[Site, SiteEdit] = {}
            for key, c in meta["c"].items():
                kind, layer = key.split(".")
                a, b = file.get_tensor(f"{key}.a"), file.get_tensor(f"{key}.b")
                sites[kind, int(layer)] = SiteEdit(a, b, float(c))
            positions = meta["positions"]
            if positions not in get_args(Positions):
                raise ValueError(f"positions {positions!r}")
    except (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            got=f"{path}, which is not a saved edit ({error})",
            expected="a safetensors file from a run folder's edits/",
            remedy="check the path",
        ) from None
    return Edit(sites, positions)


def zero_edit(model: Model, sites: list[Site]) -> Edit:
    """The edit that changes nothing, at the given sites."""
    return Edit({s: SiteEdit(torch.zeros(model.width(s)), torch.zeros(model.width(s)), 0.0) for s in sites})
