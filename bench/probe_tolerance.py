"""Compare rankings of heads by our probes and by scikit-learn's, whose solver stops before the optimum by default.

    python -m bench.probe_tolerance --questions 36

Both sides fit the same activations with the same split. At its default tolerance scikit-learn stops early, as in ITI's
code; at a small one it finds our probes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import tyro

from bench.command import Positive, header, line, run
from bench.probing import _held_out
from bench.work import Subject, collect_activations, fit_probes, load, questions


@dataclass(frozen=True)
class Settings:
    """What to fit probes on."""

    subject: tyro.conf.OmitArgPrefixes[Subject] = field(default_factory=Subject)
    questions: Positive = 36
    tolerances: tuple[float, ...] = (1e-4, 1e-6, 1e-10)
    """Values of ``tol``; scikit-learn's default is 1e-4."""


def main(given: Settings) -> None:
    """Print one row per context and tolerance."""
    from sklearn.linear_model import LogisticRegression

    model, asked = load(given.subject), questions(given.subject, given.questions)
    print(header("context", "tol", "heads with another accuracy", "heads in another place of the ranking"))
    for context in ("next_question", "answer"):
        activations = collect_activations(model, asked, context=context)
        ours = fit_probes(activations)
        x, y = activations.values.flatten(1, 2).double().numpy(), activations.is_true.numpy()
        is_val, n_heads = _held_out(asked), x.shape[1]
        for tol in given.tolerances:
            accuracy = []
            for head in range(n_heads):
                fit = LogisticRegression(tol=tol, max_iter=10_000).fit(x[~is_val, head], y[~is_val])
                accuracy.append(fit.score(x[is_val, head], y[is_val]))
            found = torch.tensor(accuracy, dtype=torch.float64).view_as(ours.val_accuracy)
            n_other = int(((found - ours.val_accuracy).abs() > 1e-9).sum())
            ranked = type(ours)(ours.weight, ours.intercept, found, ours.majority, ours.n_train, ours.n_val).ranking()
            n_moved = sum(a != b for a, b in zip(ranked, ours.ranking(), strict=True))
            print(line([context, f"{tol:g}", f"{n_other} of {n_heads}", f"{n_moved} of {n_heads}"]), flush=True)


if __name__ == "__main__":
    run(main, Settings, __doc__)
