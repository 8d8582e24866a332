"""The fitted parts of a reference judge, read from ``weights.safetensors`` and ``judge.json`` in a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from locaudit.errors import DataError
from locaudit.judges.reference.features import Moments, Read
from locaudit.judges.reference.network import Comparer
from locaudit.judges.reference.trees import Trees

BUNDLED = Path(__file__).parent
"""Folder of the bundled weights."""
ASPECT_NAMES = ("truth", "info")
"""Aspects, in the order of the networks' outputs."""
CODE_VERSION = 1
"""Raise it when a change in the code changes the scores of the same weights."""
TENSORS, META = "weights.safetensors", "judge.json"
_DENSE_CLAMP = 5.0
"""Largest magnitude of a standardised feature, in standard deviations."""


@dataclass(frozen=True)
class Weights:
    """Everything that is fitted, and the record of the fit."""

    moments: Moments
    mean: Float[Tensor, " features"]
    deviation: Float[Tensor, " features"]
    networks: tuple[Comparer, ...]
    trees: Mapping[str, Trees]
    stack: Float[np.ndarray, "aspects 3"]
    """Weights s of the blend: log-odds of an aspect = s_0 * networks + s_1 * trees + s_2."""
    meta: Mapping[str, Any]

    def dense(self, read: Read) -> Float[Tensor, "answers features"]:
        """The standardised features that the networks read."""
        return ((torch.from_numpy(read.raw).float() - self.mean) / self.deviation).clamp(-_DENSE_CLAMP, _DENSE_CLAMP)

    @torch.no_grad()
    def log_odds(self, read: Read) -> Float[np.ndarray, "2 answers 2"]:
        """Log-odds of both aspects: [0] mean of the networks, [1] the trees."""
        dense = self.dense(read)
        by_networks = torch.stack([network(read, dense) for network in self.networks]).mean(0).double().numpy()
        return np.stack([by_networks, np.stack([self.trees[name](read.raw) for name in ASPECT_NAMES], axis=1)])

    def probabilities(self, read: Read) -> Float[np.ndarray, "answers 2"]:
        """P(yes) for truth and info: sigmoid of the blended log-odds."""
        by_networks, by_trees = self.log_odds(read)  # (answers, aspects) each
        log_odds = by_networks * self.stack[:, 0] + by_trees * self.stack[:, 1] + self.stack[:, 2]
        return 1 / (1 + np.exp(-np.clip(log_odds, -30, 30)))


def load_weights(folder: Path) -> Weights:
    """Read the weights in a folder; `DataError` if they are damaged or in another format."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        content = (folder / TENSORS).read_bytes()
        if meta["format"] != CODE_VERSION or hashlib.sha256(content).hexdigest() != meta["weights_sha256"]:
            raise ValueError(f"{META} has another format, or {TENSORS} does not match it")
        tensors = load(content)
        parts = (_under(tensors, f"network.{number}.") for number in range(meta["n_networks"]))
        return Weights(
            Moments(tensors["moments.center"], tensors["moments.scale"]),
            tensors["dense.mean"],
            tensors["dense.deviation"],
            tuple(_network(part) for part in parts),
            {
                name: Trees(**{key: tensor.numpy() for key, tensor in _under(tensors, f"trees.{name}.").items()})
                for name in ASPECT_NAMES
            },
            tensors["stack"].numpy(),
            meta,
        )
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise DataError(
            got=f"{folder} without a usable judge ({' '.join(str(error).split())[:200]})",
            expected=f"{TENSORS} and {META} of one fit",
            remedy="name a folder made by tools/judge/fit.py, or leave out the model to use the bundled judge",
        ) from None


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _network(state: Mapping[str, Tensor]) -> Comparer:
    out = Comparer(state["project.weight"].shape[1], state["dense.weight"].shape[1])
    out.load_state_dict(dict(state))
    return out.eval().requires_grad_(False)
