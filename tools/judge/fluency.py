"""Fit the judge of kind ``likelihood`` on labelled texts, by logistic regression (L2, C = 1, standardised features).

    python tools/judge/fluency.py tools/judge/labels/dev.tsv --out src/locaudit/judges/likelihood.json

The file has the format of tools/judge/readers.py. Texts on which both readers agree are used. Prints the accuracy in
ten-fold cross-validation by prompt, and the weights.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from readers import agreed, cases, read_rows
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from locaudit.judges.likelihood import FEATURES, read_features
from locaudit.judges.reference.judge import LANGUAGE_MODEL
from locaudit.models import Model, load_model
from locaudit.store.files import write_atomically


def fit_fluency(rows: list[dict[str, str]], model: Model, n_folds: int = 10) -> tuple[dict[str, float], float]:
    """The weights of `FEATURES` and the bias, and the share of texts that cross-validation gets right."""
    known = agreed(rows, "fluency")
    x = read_features(model, cases([row for row, _ in known]))
    y = np.array([truth for _, truth in known])
    pipeline = make_pipeline(StandardScaler(), LogisticRegression())
    groups = [row["prompt"] for row, _ in known]
    guessed = cross_val_predict(pipeline, x, y, groups=groups, cv=GroupKFold(n_folds))
    scaler, regression = (step for _, step in pipeline.fit(x, y).steps)
    weights = regression.coef_[0] / scaler.scale_
    bias = float(regression.intercept_[0] - weights @ scaler.mean_)
    fitted = {name: round(float(w), 4) for name, w in zip(FEATURES, weights, strict=True)}
    return {**fitted, "bias": round(bias, 4)}, float((guessed == y).mean())


def main() -> None:
    """Fit the judge from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    weights, accuracy = fit_fluency(read_rows(given.file), load_model(LANGUAGE_MODEL, device="cpu"))
    write_atomically(given.out, (json.dumps(weights, indent=2) + "\n").encode())
    print(f"right in cross-validation: {accuracy:.1%}", *(f"{k} {v}" for k, v in weights.items()), sep="\n")


if __name__ == "__main__":
    main()
