"""The verdict of a run under each score, from its records: how much the conclusion depends on the metric.

python -m bench.scores runs/demo
"""

from __future__ import annotations

import sys

from bench.arguments import ending
from locaudit.stats import decide, judged_records
from locaudit.store import read_run


def main() -> None:
    """Print one row for each score."""
    with read_run(sys.argv[1]) as store:
        records, level = judged_records(store), store.config.level
    metrics = next(iter(record for record in records if record.spec.arm == "base")).metrics["test"]
    print("| score | method | outcome | p of the effect | p against the controls |\n" + "|---" * 5 + "|")
    for score in metrics:
        for name, v in decide(records, score=score, level=level).methods.items():
            print(f"| {score} | {name} | {v.outcome} | {v.effect_p:.4f} | {v.p_value:.3f} |")


if __name__ == "__main__":
    ending(main)
