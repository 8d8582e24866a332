"""The optimiser that trains edits: AdamW, or its paged form from bitsandbytes."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, Literal

import torch

from locaudit.errors import ConfigError
from locaudit.methods.settings import OptimizerName


def resolve_optimizer(name: OptimizerName, device: torch.device) -> Literal["adamw", "paged_adamw_32bit"]:
    """Resolve ``auto``: the paper's ``paged_adamw_32bit`` if CUDA and bitsandbytes are available, else ``adamw``.

    Both make the same update in float32. The paged form keeps its state in memory that can move from the GPU to the
    host. Raises `ConfigError` if the paged form is set but cannot run.
    """
    has_paged = device.type == "cuda" and importlib.util.find_spec("bitsandbytes") is not None
    if name == "auto":
        return "paged_adamw_32bit" if has_paged else "adamw"
    if name == "paged_adamw_32bit" and not has_paged:
        raise ConfigError(
            got=f"optimizer paged_adamw_32bit on {device.type}, or without bitsandbytes",
            expected="a CUDA device and the package bitsandbytes",
            remedy="use the optimizer auto or adamw, or pip install bitsandbytes",
        )
    return name


def make_optimizer(
    name: OptimizerName, groups: Sequence[dict[str, Any]], device: torch.device
) -> torch.optim.Optimizer:
    """AdamW without weight decay; every parameter group has its own ``lr``."""
    if resolve_optimizer(name, device) == "adamw":
        return torch.optim.AdamW(list(groups), weight_decay=0.0)
    from bitsandbytes.optim import PagedAdamW32bit  # pyright: ignore[reportMissingImports]

    return PagedAdamW32bit(list(groups), weight_decay=0.0)
