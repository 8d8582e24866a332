"""Means of trusted labels against ppi-python, the reference code of prediction-powered inference."""

import numpy as np
import pytest

from locaudit.stats.ppi import rectified_mean, rectify

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("contrast", ["mean", "difference"])
@pytest.mark.parametrize("n_labelled", [30, 80])
def test_estimate_and_error_are_those_of_ppi_python(contrast, n_labelled, load):
    ppi_py = load("ppi_py")
    rng, n = np.random.default_rng(n_labelled), 150
    f = rng.uniform(size=(2, n))
    y = (rng.uniform(size=f.shape) < 0.2 + 0.5 * f).astype(float)
    labelled = np.sort(rng.permutation(n)[:n_labelled])
    w = np.zeros((2, n))
    w[:, labelled] = n / n_labelled
    c = np.array([1.0, 0.0 if contrast == "mean" else -1.0])
    psi = rectify(f, y, w, c)
    ours = rectified_mean([psi], w, c)

    rest = np.setdiff1d(np.arange(n), labelled)
    Y, Yhat, unlabelled = c @ y[:, labelled], c @ f[:, labelled], c @ f[:, rest]
    # Among questions without a label, psi = constant + beta f. Theirs has lambda = beta (n - labelled) / n.
    beta = float(np.polyfit(unlabelled, c @ psi[:, rest], 1)[0])
    lam = beta * len(rest) / n
    theirs = ppi_py.ppi_mean_pointestimate(Y, Yhat, unlabelled, lam=lam)
    assert ours.value == pytest.approx(theirs.item(), abs=1e-12)
    low, high = (x.item() for x in ppi_py.ppi_mean_ci(Y, Yhat, unlabelled, alpha=0.05, lam=lam))
    # Ours also counts that the labelled and the other questions differ in their mean judgement by chance.
    se, apart = (high - low) / 2 / 1.959963984540054, Yhat.mean() - unlabelled.mean()
    extra = beta**2 * apart**2 * n_labelled * len(rest) / n**3
    assert ours.se**2 == pytest.approx(se**2 + extra, rel=1e-9)
    assert ours.se == pytest.approx(se, rel=0.02)
    # Power tuning: their lambda, and so their error, is ours up to the divisors of variances.
    low, high = (x.item() for x in ppi_py.ppi_mean_ci(Y, Yhat, unlabelled, alpha=0.05))
    assert ours.se == pytest.approx((high - low) / 2 / 1.959963984540054, rel=0.02)
