"""Held-out loss of optimal edits at several learning rates, by size of the location.

    python -m bench.learning_rates --out docs/learning-rates.json

"rises" counts seeds whose training loss rose at the end, as the verdict's flag `unsettled` does.

For each kind of place, size (1 unit, 16 units, the whole model), rate and seed, one IPO edit is trained at random
units on `--train` questions. Its IPO loss and reward accuracy are then measured on held-out questions. All come from
the training part of the split; test questions are not used. Prints a Markdown table with means over seeds and writes
every number as JSON.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from bench.command import Positive, check_out, header, line, run, stated, write_json
from bench.work import (
    MOST_RISE,
    TAU,
    Job,
    Location,
    Subject,
    held_out_loss,
    load,
    log_probs,
    means,
    probed,
    questions,
    random_directions,
    random_units,
    score_questions,
    train,
    training_data,
)

PROBED = "probed head"


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    subject: tyro.conf.OmitArgPrefixes[Subject] = field(default_factory=lambda: Subject(dtype="auto", device="auto"))
    train: Positive = 60
    """Number of training questions."""
    held_out: Positive = 40
    """Number of held-out questions."""
    epochs: Positive = 2
    batch_size: Positive | None = None
    """Questions in a step (None: the default of the library)."""
    max_answers: Positive | None = None
    """Answers of each class that a question keeps (None: all); 1 gives one pair a question."""
    tau: float = TAU
    kinds: tuple[Literal["head", "kv-group", "attention", "neuron", "mlp", "residual", "direction"], ...] = ("head",)
    sizes: tuple[int, ...] = (1, 16, 0)
    """Numbers of units; 0 for the whole model."""
    probed: Positive | None = None
    """Train at this many heads with the most accurate probes, too, as in a claim (None: do not)."""
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    seeds: tuple[int, ...] = (0, 1)
    out: Path | None = None
    """Write JSON to this file."""


def main(given: Settings) -> None:
    """Train and measure all combinations."""
    check_out(given.out)
    model, asked = load(given.subject), questions(given.subject, given.train + given.held_out)
    asked = [replace(q, true=q.true[: given.max_answers], false=q.false[: given.max_answers]) for q in asked]
    held = asked[given.train :]
    data, held_data = training_data(model, asked[: given.train]), training_data(model, held)
    best = probed(model, asked, given.probed)[0] if given.probed else None

    def scores(sums: list[torch.Tensor]) -> dict[str, float]:
        loss = held_out_loss(held_data, sums, tau=given.tau)
        return {"loss": loss, **means(score_questions(held, sums, list(held_data.reference)))}

    def place(kind: str, size: int, seed: int) -> Location:
        if best and kind == PROBED:
            return best
        if not size:
            return Location.whole(kind)
        if kind == "direction":
            return random_directions(model, asked[: given.train], size, seed)
        return random_units(model, kind, size, seed)

    def trial(kind: str, size: int, rate: float, seed: int) -> dict[str, Any]:
        where = place(kind, size, seed)
        started = time.monotonic()
        settings = {"epochs": given.epochs, "batch_size": given.batch_size, "learning_rate": rate}
        (fit,) = train(model, data, [Job(where, given.tau, seed)], **settings)
        row: dict[str, Any] = {"kind": kind, "size": size, "rate": rate, "seed": seed}
        row["seconds"] = round(time.monotonic() - started, 1)
        row["train_loss"] = statistics.fmean(fit.losses[-max(1, len(fit.losses) // 4) :])
        row["rises"] = fit.facts.get("change", 0.0) > MOST_RISE
        if fit.edit is None:
            return row | {"diverged": fit.message}
        return row | scores(log_probs(model, held_data.forest, [fit.edit])[0])

    columns = ("kind", "units", "learning rate", "last train loss", "rises")
    print(header(*columns, "held-out loss", "reward accuracy", "MC2"))
    rows = []
    for kind, size in [*([(PROBED, given.probed)] if best else []), *product(given.kinds, given.sizes)]:
        for rate in given.rates:
            group = [trial(kind, size, rate, seed) for seed in given.seeds]
            rows += group
            good = [row for row in group if "loss" in row]
            cells = [kind, size or "all", f"{rate:.3g}", f"{statistics.fmean(row['train_loss'] for row in group):.2f}"]
            cells.append(f"{sum(row['rises'] for row in group)} of {len(group)}")
            for key in ("loss", "reward_accuracy", "mc2"):
                cells.append(f"{statistics.fmean(row[key] for row in good):.3f}" if good else "diverged")
            print(line(cells), flush=True)
    base = scores(list(held_data.reference))
    print(line(["none", "", "", "", "", f"{base['loss']:.3f}", "", f"{base['mc2']:.3f}"]))
    if given.out:
        facts = {"fingerprint": model.fingerprint, "dtype": str(model.lm.dtype), "torch": torch.__version__}
        write_json(given.out, {"facts": stated(given) | facts | {"base": base}, "rows": rows})


if __name__ == "__main__":
    run(main, Settings, __doc__)
