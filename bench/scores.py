"""The verdict of a run under each score, from its records, to see how much it depends on the metric.

python -m bench.scores runs/demo
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from bench.command import header, line, run
from bench.work import load_run


@dataclass(frozen=True)
class Settings:
    """Which run to read."""

    folder: tyro.conf.Positional[Path]
    """Run folder."""


def main(given: Settings) -> None:
    """Print one row per score and method."""
    done = load_run(given.folder)
    print(header("score", "method", "outcome", "p of the effect", "p against the controls"))
    for score in done.base.metrics["test"]:
        for name, v in done.decide(score=score).methods.items():
            print(line([score, name, v.outcome, f"{v.effect_p:.4f}", f"{v.first.p_value:.3f}"]))


if __name__ == "__main__":
    run(main, Settings, __doc__)
