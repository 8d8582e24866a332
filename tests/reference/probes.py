"""Slow twins of `locaudit.measure.activations` and `locaudit.methods.probes`: one text, one probe at a time."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import torch
from scipy.optimize import minimize

from locaudit.location import Kind
from locaudit.models import Model


@torch.no_grad()
def last_activations(model: Model, text: str, kind: Kind = "heads") -> torch.Tensor:
    """Inputs of every layer's projection at the text's last token, (layers, units, width); a plain forward."""
    seen = {}

    def keep(layer):
        def hook(_module, args):
            seen[layer] = args[0].reshape(-1, args[0].shape[-1])[-1].float()

        return hook

    with ExitStack() as stack:
        for layer in range(model.n_layers):
            handle = model.projection((kind, layer)).register_forward_pre_hook(keep(layer))
            stack.callback(handle.remove)
        model.lm(input_ids=torch.tensor([model.tokenizer(text)["input_ids"]]), use_cache=False)
    return torch.stack([seen[layer].view(model.n_units(kind), -1) for layer in range(model.n_layers)])


def logistic(x: np.ndarray, y: np.ndarray, c: float) -> np.ndarray:
    """(w, v) that minimise C sum_i [log(1 + exp(z_i)) - y_i z_i] + |w|^2 / 2 with z_i = <w, x_i> + v."""

    def objective(theta):
        w, v = theta[:-1], theta[-1]
        z = x @ w + v
        value = c * np.sum(np.logaddexp(0, z) - y * z) + w @ w / 2
        residual = 1 / (1 + np.exp(-z)) - y
        return value, np.append(c * x.T @ residual + w, c * residual.sum())

    start = np.zeros(x.shape[1] + 1)
    return minimize(objective, start, jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 10_000}).x
