"""Coverage of the intervals that trusted labels correct, and of the judge's own, in simulated audits.

    python -m bench.labels

The judge's P(yes) follows the truth with noise, is too high everywhere, and more so the better the edit. Each audit has
one claim, the unedited model and 19 controls. Of each labelled question, the answers of the claim, of the unedited
model and of one random control are labelled, as `locaudit judge sample` draws them.
"""

from __future__ import annotations

import numpy as np

from locaudit.stats.ppi import rectified_mean, rectify

CONTROLS, AUDITS = 19, 4000
SIZES = ((100, 20), (100, 30), (100, 50), (100, 100), (400, 50))
ASPECTS = ((1.0, 0.0), (-0.6, 1.0))
"""(slope, offset) of the latent quality in question and edit: truth, and information, which falls where truth rises."""


def draw(rng, shift, n):
    """Judgements and labels of each aspect, (aspects, arms, questions) each."""
    question, f, y = rng.normal(size=n), [], []
    for slope, offset in ASPECTS:
        latent = slope * (question + shift[:, None]) + 0.7 * rng.normal(size=(len(shift), n)) + offset
        noise = rng.normal(size=latent.shape)
        f.append(1 / (1 + np.exp(-(latent + 0.8 * shift[:, None] + noise + 0.8))))
        y.append(latent > 0)
    return np.array(f), np.array(y, dtype=float)


def main():
    shift = np.concatenate([[0.5, 0.0], np.random.default_rng(1).normal(0, 0.2, CONTROLS)])
    many = np.random.default_rng(2)
    true = np.mean([draw(many, shift, 20_000)[1].mean(axis=2) for _ in range(100)], axis=0)  # (aspects, arms)
    contrasts = {"claim": np.eye(len(shift))[0], "gain": np.eye(len(shift))[0] - np.eye(len(shift))[1]}
    contrasts["lead"] = np.eye(len(shift))[0] - np.r_[0, 0, np.ones(CONTROLS)] / CONTROLS
    print("questions labelled quantity    product  covered  judge's  mean-error  SE-true  SE-mean  SE-labels-alone")
    for n, m in SIZES:
        rows = {(name, k): [] for name in contrasts for k in (1, 2)}
        for seed in range(AUDITS):
            rng = np.random.default_rng(seed)
            f, y = draw(rng, shift, n)
            w, drawn = np.zeros((len(shift), n)), rng.permutation(n)[:m]
            w[:2, drawn] = n / m
            w[2 + rng.integers(0, CONTROLS, m), drawn] = CONTROLS * n / m
            for (name, k), found in rows.items():
                c = contrasts[name]
                e = rectified_mean([rectify(f[j], y[j], w, c) for j in range(k)], w, c)
                alone = rectified_mean([rectify(np.zeros_like(w), y[j], w, c) for j in range(k)], w, c)
                value, by_judge = c @ true[:k].prod(axis=0), c @ f[0]
                is_in = e.interval[0] <= value <= e.interval[1]
                judged = abs(by_judge.mean() - c @ true[0]) <= 1.96 * by_judge.std() / np.sqrt(n) if k == 1 else np.nan
                found.append((is_in, judged, e.value - value, e.se, alone.se))
        for (name, k), found in rows.items():
            x = np.array(found, dtype=float)
            print(
                f"{n:9} {m:8} {name:11} {'yes' if k == 2 else 'no':7} {x[:, 0].mean():8.3f} {x[:, 1].mean():8.3f} "
                f"{x[:, 2].mean():+11.4f} {x[:, 2].std():8.4f} {x[:, 3].mean():8.4f} {x[:, 4].mean():8.4f}"
            )


if __name__ == "__main__":
    main()
