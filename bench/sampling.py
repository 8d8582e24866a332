"""Standard errors of gain and lead by score and number of sampled answers, and the time of a trial by part.

python -m bench.sampling runs/sampling

It audits a real model in the folder given, then reads the run with fewer samples: the first table of
`bench.measurements`, which can read any other run.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

import tyro

from bench.command import Positive, header, line, run, say
from bench.measurements import print_scores
from bench.work import load_run
from locaudit.config import AuditConfig, merge_config
from locaudit.run import audit, worker


@dataclass(frozen=True)
class Settings:
    """The audit."""

    folder: tyro.conf.Positional[Path]
    """Run folder. A finished one is only read, so that no times are printed."""
    model: str = AuditConfig.model
    behaviour: str = AuditConfig.behaviour
    method: Literal["iti", "optimal"] = "iti"
    """With one strength: alpha 15 or tau 0.1."""
    train: Positive = 60
    """Training questions."""
    questions: Positive = 60
    """Test questions."""
    controls: Positive = 4
    samples: Positive = 4
    tokens: Positive = 50
    """Maximum length of an answer."""


def main(given: Settings) -> None:
    """Run the audit, and print both tables."""
    os.environ["LOCAUDIT_CACHE"] = "off"
    values = {
        "model": given.model,
        "behaviour": given.behaviour,
        "controls": given.controls,
        "nulls": ["anywhere"],
        "whole_model": False,
        "placebos": 0,
        "methods": {given.method: {"iti": {"alphas": [15.0]}, "optimal": {"strengths": [0.1]}}[given.method]},
        "split": {"fractions": [0.5, 0.02, 0.48], "max_train": given.train, "max_test": given.questions},
        "evaluation": {
            "samples": given.samples,
            "max_new_tokens": given.tokens,
            "drift_documents": 10,
            "drift_tokens": 64,
        },  # fmt: skip
    }
    with timed() as seconds:
        audit.run_audit(merge_config(AuditConfig(), values), given.folder)
    done = load_run(given.folder)
    print_scores(done)
    if seconds:
        print("\n" + header("part of a trial", "seconds"))
        for name, total in seconds.items():
            print(line([name, f"{total / len(done.trials):.2f}"]))


@contextmanager
def timed() -> Iterator[Mapping[str, float]]:
    """Seconds that the parts of all trials take inside, by name."""
    seconds: defaultdict[str, float] = defaultdict(float)
    parts = {
        (worker, "_fit"): "fit",
        (worker, "answer_log_probs"): "score",
        (worker, "measure_drift"): "drift",
        (worker, "answer_prompts"): "generate",
        (audit, "judge_answers"): "judge",
    }
    with ExitStack() as stack:
        for (module, name), part in parts.items():
            real = getattr(module, name)

            def timing(*args, real=real, part=part, **options):
                started = time.monotonic()
                try:
                    return real(*args, **options)
                finally:
                    took = time.monotonic() - started
                    numbers = [*options["samples"]] if "samples" in options else []
                    words = f" samples {', '.join(map(str, numbers))}" if numbers else ""
                    seconds[part + words] += took
                    say(f"{part}{words}: {took:.1f} s")

            stack.enter_context(mock.patch.object(module, name, timing))
        yield seconds


if __name__ == "__main__":
    run(main, Settings, __doc__)
