"""The fitted parts of a judge, in a folder: ``weights.safetensors`` and ``judge.json``."""

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
from safetensors.torch import load, save
from torch import Tensor

from locaudit.errors import DataError
from locaudit.judges.reference.features import Moments, Read
from locaudit.judges.reference.network import Comparer
from locaudit.judges.reference.trees import Trees
from locaudit.store import write_atomically

BUNDLED = Path(__file__).parent
"""The folder of the weights that come with the library."""
ASPECT_NAMES = ("truth", "info")
"""Order of the networks' outputs."""
CODE_VERSION = 1
"""Raised when the same weights come to other scores."""
_TENSORS, _META = "weights.safetensors", "judge.json"


@dataclass(frozen=True)
class Weights:
    """All that is fitted, and what is recorded about the fit."""

    moments: Moments
    mean: Float[Tensor, " features"]
    deviation: Float[Tensor, " features"]
    networks: tuple[Comparer, ...]
    trees: Mapping[str, Trees]
    stack: Float[np.ndarray, "aspects 3"]
    """Log-odds of an aspect = network * s_0 + trees * s_1 + s_2."""
    meta: Mapping[str, Any]

    def network_log_odds(self, read: Read) -> Float[np.ndarray, "answers 2"]:
        """Mean log-odds of the networks."""
        group = read.group(self.mean, self.deviation)
        with torch.no_grad():
            return torch.stack([network(group) for network in self.networks]).mean(0).double().numpy()

    def probabilities(self, read: Read) -> Float[np.ndarray, "answers 2"]:
        """P(yes) for truth and info."""
        by_networks = self.network_log_odds(read)
        by_trees = np.stack([self.trees[aspect](read.raw) for aspect in ASPECT_NAMES], axis=1)
        log_odds = by_networks * self.stack[:, 0] + by_trees * self.stack[:, 1] + self.stack[:, 2]
        return 1 / (1 + np.exp(-np.clip(log_odds, -30, 30)))


def save_weights(folder: Path, weights: Weights) -> None:
    """Write both files; each is whole or not there."""
    tensors: dict[str, Tensor] = {
        "moments.center": weights.moments.center,
        "moments.scale": weights.moments.scale,
        "dense.mean": weights.mean,
        "dense.deviation": weights.deviation,
        "stack": torch.from_numpy(weights.stack),
    }
    for number, network in enumerate(weights.networks):
        tensors |= {f"network.{number}.{name}": tensor for name, tensor in network.state_dict().items()}
    for aspect, trees in weights.trees.items():
        tensors |= {f"trees.{aspect}.{name}": torch.from_numpy(array) for name, array in trees.arrays().items()}
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    meta = {**weights.meta, "weights_sha256": hashlib.sha256(content).hexdigest()}
    write_atomically(folder / _TENSORS, content)
    write_atomically(folder / _META, (json.dumps(meta, indent=2, sort_keys=True) + "\n").encode())


def prepare_folder(folder: Path) -> None:
    """Make the folder; raises `DataError` where it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / ".probe", b"")
        (folder / ".probe").unlink()
    except OSError as error:
        raise DataError(
            got=f"{folder}, which cannot be written to ({error.strerror})",
            expected="a folder for the weights",
            remedy="name another one",
        ) from None


def load_meta(folder: Path) -> dict[str, Any]:
    """What is recorded about a fit; raises `DataError` for a folder that is no judge."""
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _no_judge(folder, f"{_META}: {error}") from None
    if not isinstance(meta, dict) or meta.get("format") != CODE_VERSION:
        raise _no_judge(folder, f"{_META} of another format")
    return meta


def load_weights(folder: Path) -> Weights:
    """Read a folder written by `save_weights`; raises `DataError` when it is damaged."""
    meta = load_meta(folder)
    try:
        content = (folder / _TENSORS).read_bytes()
        if hashlib.sha256(content).hexdigest() != meta["weights_sha256"]:
            raise _no_judge(folder, f"{_TENSORS} that does not match {_META}")
        tensors = load(content)
        n_networks = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("network."))
        networks = tuple(_network(_under(tensors, f"network.{i}.")) for i in range(n_networks))
        trees = {
            aspect: Trees.from_arrays({k: v.numpy() for k, v in _under(tensors, f"trees.{aspect}.").items()})
            for aspect in ASPECT_NAMES
        }
        moments = Moments(tensors["moments.center"], tensors["moments.scale"])
        dense = tensors["dense.mean"], tensors["dense.deviation"]
        return Weights(moments, *dense, networks, trees, tensors["stack"].numpy(), meta)
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, DataError):
            raise
        raise _no_judge(folder, f"{_TENSORS}: {error}") from None


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _network(state: Mapping[str, Tensor]) -> Comparer:
    out = Comparer(state["project.weight"].shape[1], state["dense.weight"].shape[1])
    out.load_state_dict(dict(state))
    return out.eval().requires_grad_(False)


def _no_judge(folder: Path, why: str) -> DataError:
    return DataError(
        got=f"{folder} without a usable judge ({' '.join(why.split())[:200]})",
        expected=f"{_TENSORS} and {_META} of one fit",
        remedy="name a folder made by `locaudit judge fit`, or leave the weights out to use the bundled ones",
    )
