"""scikit-learn's LogisticRegression finds our probes."""

from __future__ import annotations

import random

import pytest
import torch

from locaudit.behaviours import load_behaviour
from locaudit.measure.activations import collect_activations
from locaudit.methods.probes import fit_logistic, fit_probes

pytestmark = pytest.mark.parity

N_QUESTIONS = 36
SEED = 3


def sklearn_fit(load, x, y, inverse_l2):
    model = load("sklearn.linear_model").LogisticRegression(C=inverse_l2, tol=1e-10, max_iter=10_000)
    return model.fit(x.double().numpy(), y.numpy())


def relative(ours, theirs):
    return float((ours - torch.as_tensor(theirs)).norm() / torch.as_tensor(theirs).norm())


@pytest.mark.parametrize("inverse_l2", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_coefficients_on_small_data(load, inverse_l2, offset):
    """Classes that overlap, more examples than features; features far from 0 need the free intercept."""
    generator = torch.Generator().manual_seed(0)
    y = torch.rand(60, generator=generator) < 0.4
    x = torch.randn(3, 60, 5, generator=generator) + offset + 0.7 * y[:, None]
    weight, intercept = fit_logistic(x, y, inverse_l2=inverse_l2)
    for i in range(len(x)):
        fit = sklearn_fit(load, x[i], y, inverse_l2)
        assert relative(weight[i], fit.coef_[0]) < 1e-3
        assert float(intercept[i]) == pytest.approx(fit.intercept_[0], rel=1e-3, abs=1e-4)


def test_coefficients_of_separable_classes(load):
    """More features than examples: only the penalty keeps the weights finite."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 12, 30, generator=generator), torch.arange(12) % 2 == 0
    weight, _ = fit_logistic(x, y, inverse_l2=1.0)
    for i in range(len(x)):
        assert relative(weight[i], sklearn_fit(load, x[i], y, 1.0).coef_[0]) < 1e-3


@pytest.fixture(scope="module")
def activations(smollm2):
    return collect_activations(smollm2, load_behaviour("misconceptions").questions[:N_QUESTIONS])


@pytest.mark.real
def test_every_head_of_smollm2(load, activations):
    """Weights, accuracies on the held-out questions and so the ranking of all heads."""
    probes = fit_probes(activations, inverse_l2=1.0, val_fraction=0.25, seed=SEED)
    order = list(range(N_QUESTIONS))
    random.Random(SEED).shuffle(order)  # the documented split: the first quarter of the shuffled questions ranks
    is_val = torch.isin(activations.question, torch.tensor(order[: N_QUESTIONS // 4]))
    assert (probes.n_train, probes.n_val) == (int((~is_val).sum()), int(is_val.sum()))
    y, accuracy, worst = activations.is_true, torch.zeros_like(probes.val_accuracy), 0.0
    for layer in range(accuracy.shape[0]):
        for head in range(accuracy.shape[1]):
            x = activations.values[:, layer, head]
            fit = sklearn_fit(load, x[~is_val], y[~is_val], 1.0)
            worst = max(worst, relative(probes.weight[layer, head], fit.coef_[0]))
            accuracy[layer, head] = fit.score(x[is_val].double().numpy(), y[is_val].numpy())
    assert worst < 1e-3
    torch.testing.assert_close(probes.val_accuracy, accuracy, rtol=0, atol=1e-12)
    assert probes.val_accuracy.max() > probes.majority
