"""The fitted parts of a reference judge, read from ``weights.safetensors`` and ``judge.json`` in a folder."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
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

BUNDLED = Path(__file__).parent
"""Folder of the bundled weights."""
ASPECT_NAMES = ("truth", "info")
"""Aspects, in the order of the networks' outputs."""
CODE_VERSION = 2
"""Raise it when a change in the code changes the scores of the same weights."""
TENSORS, META = "weights.safetensors", "judge.json"
_DENSE_CLAMP = 5.0
"""Largest magnitude of a standardised feature, in standard deviations."""


@dataclass(frozen=True)
class Weights:
    """Everything that is fitted, and the record of the fit.

    The questions of the fit are dealt into folds. The networks of fold k were fitted on the other folds.
    """

    moments: Moments
    mean: Float[Tensor, " features"]
    deviation: Float[Tensor, " features"]
    networks: Sequence[Sequence[Comparer]]
    """Per fold: networks with different seeds, whose log-odds are averaged."""
    scale: Float[np.ndarray, "folds aspects 2"]
    """Per fold, fitted on the other folds: a and b of the calibrated log-odds a z + b."""
    folds: Mapping[int, int]
    """`question_key` -> fold, for the questions of the fit."""
    meta: Mapping[str, Any]

    def dense(self, read: Read) -> Float[Tensor, "answers features"]:
        """The standardised features that the networks read."""
        return ((torch.from_numpy(read.raw).float() - self.mean) / self.deviation).clamp(-_DENSE_CLAMP, _DENSE_CLAMP)

    @torch.no_grad()
    def log_odds(self, read: Read, fold: int) -> Float[np.ndarray, "answers 2"]:
        """Log-odds of both aspects: the mean of the fold's networks, before `scale`."""
        dense = self.dense(read)
        return torch.stack([network(read, dense) for network in self.networks[fold]]).mean(0).double().numpy()

    def probabilities(self, read: Read, question: str) -> Float[np.ndarray, "answers 2"]:
        """P(yes) for truth and info: sigmoid of the calibrated log-odds.

        A question of the fit is judged by the networks of its fold, which never saw it. Any other question gets the
        mean of the log-odds of all folds.
        """
        known = self.folds.get(question_key(question))
        used = range(len(self.networks)) if known is None else [known]
        z = np.mean([self.log_odds(read, k) * self.scale[k, :, 0] + self.scale[k, :, 1] for k in used], axis=0)
        return sigmoid(z)


def sigmoid(z: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-z)), with z clipped to [-30, 30]."""
    return 1 / (1 + np.exp(-np.clip(z, -30, 30)))


def question_key(question: str) -> int:
    """The first 8 bytes, as a signed integer, of the SHA-256 of the question's letters and digits in lower case."""
    words = " ".join(re.findall(r"[^\W_]+", question.casefold()))
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big", signed=True)


def load_weights(folder: Path) -> Weights:
    """Read the weights in a folder; `DataError` if they are damaged or in another format."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        content = (folder / TENSORS).read_bytes()
        if meta["format"] != CODE_VERSION or hashlib.sha256(content).hexdigest() != meta["weights_sha256"]:
            raise ValueError(f"{META} has another format, or {TENSORS} does not match it")
        tensors = load(content)
        return Weights(
            Moments(tensors["moments.center"], tensors["moments.scale"]),
            tensors["dense.mean"],
            tensors["dense.deviation"],
            [
                [_network(tensors, f"network.{fold}.{number}.") for number in range(meta["n_networks"])]
                for fold in range(meta["n_folds"])
            ],
            tensors["scale"].numpy(),
            dict(zip(tensors["folds.key"].tolist(), tensors["folds.fold"].tolist(), strict=True)),
            meta,
        )
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise DataError(
            got=f"{folder} without a usable judge ({' '.join(str(error).split())[:200]})",
            expected=f"{TENSORS} and {META} of one fit",
            remedy="name a folder made by tools/judge/fit.py, or leave out the model to use the bundled judge",
        ) from None


def _network(tensors: Mapping[str, Tensor], prefix: str) -> Comparer:
    """The network whose weights have this prefix; they are stored in half precision and run in single."""
    state = {name.removeprefix(prefix): x.float() for name, x in tensors.items() if name.startswith(prefix)}
    out = Comparer(state["project.weight"].shape[1], state["dense.weight"].shape[1])
    out.load_state_dict(state)
    return out.eval().requires_grad_(False)
