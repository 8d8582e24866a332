"""How much each score of a run tells: gains and the claim's lead, each with its standard error over questions.

    python -m bench.pilot_scores runs/pilot

The smaller the standard error of the lead as a share of the whole model's gain, the fewer questions a verdict needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev

import tyro

from bench.command import header, line, run
from bench.work import load_run
from locaudit.records import NO_METHOD
from locaudit.stats import estimate, find_score, score_values, select
from locaudit.stats.selection import BASE, CLAIM, WHOLE


@dataclass(frozen=True)
class Settings:
    """Which run to read. It needs the whole model and at least two controls of each null."""

    folder: tyro.conf.Positional[Path]
    """Run folder."""


def main(given: Settings) -> None:
    """Print one row per score, method and null."""
    done = load_run(given.folder)
    columns = ("score", "method", "null", "unedited", "claim", "whole model", "SE of its gain", "mean control")
    print(header(*columns, "SD of controls", "as good", "lead", "SE", "SE / whole gain"))
    for score in done.base.metrics["test"]:
        bounds = find_score(score).bounds
        for method, places in select(done.records, score).items():
            if method == NO_METHOD:
                continue
            values = {
                place: score_values(record.questions["test"], score)
                for place, record in {**places, BASE: done.base}.items()
                if record is not None
            }
            means = {place: estimate(x, bounds=bounds).value for place, x in values.items()}
            gain = estimate(values[WHOLE], values[BASE], bounds=bounds)
            for null in sorted({place.null for place in values if place.arm == "control"}):
                others = [place for place in values if place.null == null]
                lead = estimate(values[CLAIM], [values[place] for place in others], bounds=bounds)
                scores = [means[place] for place in others]
                numbers = [means[BASE], means[CLAIM], means[WHOLE], gain.se, sum(scores) / len(scores), stdev(scores)]
                as_good = f"{sum(x >= means[CLAIM] for x in scores)} of {len(scores)}"
                share = lead.se / gain.value if gain.value > 0 else math.nan
                cells = [score, method, null, *(f"{x:.3f}" for x in numbers), as_good, f"{lead.value:+.3f}"]
                print(line([*cells, f"{lead.se:.3f}", f"{share:.3f}"]))


if __name__ == "__main__":
    run(main, Settings, __doc__)
