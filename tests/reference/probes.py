"""Slow twins of `locaudit.measure.activations` and `locaudit.methods.probes`: one text, one probe at a time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import torch
from scipy.optimize import minimize

from locaudit.location import Site
from locaudit.models import Model
from locaudit.registry import KINDS


@torch.no_grad()
def site_vectors(model: Model, ids: torch.Tensor, sites: Sequence[Site]) -> dict[Site, torch.Tensor]:
    """What each site holds in a plain forward of one row, (tokens, d) each."""
    seen = {}

    def keep(site):
        def hook(_module, args, *output):
            x = output[0] if output else args
            x = x[0] if isinstance(x, tuple) else x
            seen[site] = x.reshape(-1, x.shape[-1]).float()

        return hook

    with ExitStack() as stack:
        for site in sites:
            if site.name == "residual":
                handle = model.layer(site.layer).register_forward_hook(keep(site))
            else:
                handle = model.projection(site).register_forward_pre_hook(keep(site))
            stack.callback(handle.remove)
        model.lm(input_ids=ids, use_cache=False)
    return seen


def last_activations(model: Model, text: str, kind: str = "head") -> torch.Tensor:
    """Inputs of every layer's projection at the text's last token, (layers, units, width); a plain forward."""
    sites = [Site(KINDS[kind].site, layer) for layer in range(model.n_layers)]
    seen = site_vectors(model, torch.tensor([model.tokenizer(text)["input_ids"]]), sites)
    return torch.stack([seen[site][-1].view(KINDS[kind].blocks(model.shape)) for site in sites])


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
