"""Time and memory to read a large run: synthetic trials, written through the real store and read by the real commands.

    python -m bench.store                       # 10,000 trials of 800 test questions, scored by log-probability

The trials are those of a plan of ITI and optimal edits: claim, whole model, rest, controls of two nulls, five strengths
each. Scores are random. Each reading runs in a process of its own, whose peak memory is that of the whole process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.command import Positive, header, line, run, say
from bench.work import METRICS, Location
from locaudit.claims.kinds import Shape
from locaudit.config import AuditConfig, merge_config
from locaudit.records import NO_METHOD, TrialRecord, TrialSpec, mean_metrics
from locaudit.registry import METHODS
from locaudit.run.audit import draw_controls
from locaudit.run.plan import build_plan
from locaudit.stats.phrases import MethodFacts
from locaudit.stats.sequential import Null
from locaudit.store.database import HeldOutQuestion
from locaudit.store.folder import open_run
from locaudit.store.manifest import Manifest

N_PLACES = 3 + 2
"""Places without a number: claim, whole model and rest; and how many nulls there are."""
READ = """
import sys, time
{}
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(time.process_time(), int(peak.split()[1]) / 1024)
"""
READINGS = {
    "verdict": "from locaudit.store.run import load_run\nload_run(sys.argv[1]).verdict",
    "report": "from locaudit.report import write_report\nwrite_report(sys.argv[1])",
}
"""Name -> what is timed: the CPU seconds of the whole process, which is what it takes on an idle core."""


@dataclass(frozen=True)
class Settings:
    """How large the run is."""

    trials: Positive = 10_000
    questions: Positive = 800
    """Test questions; there are a quarter as many validation questions."""
    out: Path | None = None
    """Folder of the run; it is kept. None: a temporary one."""


def main(given: Settings) -> None:
    """Write the run, read it, and print seconds and memory."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.out or Path(temporary) / "run"
        started = time.process_time()
        n = write(folder, given.trials, given.questions)
        size = (folder / "trials.sqlite").stat().st_size / 2**20
        say(f"{n} trials written in {time.process_time() - started:.0f} CPU seconds, {size:.0f} MB")
        print(header("what", "CPU seconds", "peak MB", "page MB"))
        for name, code in READINGS.items():
            command = [sys.executable, "-c", READ.format(code), str(folder)]
            found = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
            seconds, peak = map(float, found.stdout.split())
            page = folder / "report.html"
            shown = f"{page.stat().st_size / 2**20:.1f}" if page.exists() else ""
            print(line([name, f"{seconds:.1f}", f"{peak:.0f}", shown]), flush=True)


def write(folder: Path, n_trials: int, n_questions: int) -> int:
    """Write a finished run of about so many trials; returns how many it has."""
    strengths, methods = 5, ("iti", "optimal")
    n_controls = max(n_trials // (strengths * len(methods)) - N_PLACES, 2) // 2
    config = merge_config(
        AuditConfig(),
        {
            "model": "synthetic", "behaviour": "synthetic", "controls": n_controls, "nulls": ["anywhere", "layers"],
            "placebos": 0, "rest_controls": 0, "widen": 0, "score": "mc2",
            "evaluation": {"max_new_tokens": 0, "samples": 0},
            "methods": {
                "iti": {"alphas": [1.0, 2.0, 4.0, 8.0, 16.0]}, "optimal": {"strengths": [0.1, 0.2, 0.3, 0.4, 0.5]},
            },
        },
    )  # fmt: skip
    shape, claim = Shape(30, 9, 3, 64, 1536, 576), Location(tuple((layer, layer % 9) for layer in range(8, 24)))
    controls, _ = draw_controls(config, shape, claim)
    places = {name: found.locations for name, found in controls.items()}
    plan = build_plan(config, shape, claim, places, dict.fromkeys((NO_METHOD, *methods), "synthetic"), (5, 5))
    facts = {
        name: MethodFacts(METHODS[name].title, "higher", METHODS[name].trained, symbol="s", n_strengths=strengths)
        for name in methods
    }
    questions = {
        split: [HeldOutQuestion(f"{split}{i}", f"Question {i}?", ("Yes.",), ("No.",), f"{split} {i}") for i in range(n)]
        for split, n in (("val", max(n_questions // 4, 1)), ("test", n_questions))
    }
    n = sum(map(len, plan))
    with open_run(folder, config) as store:
        store.set_questions(questions)
        store.write_manifest(
            Manifest(
                model="synthetic", fingerprint="", shape=shape, n_units=270, kind_plural="heads", behaviour="synthetic",
                aspects=(), n_questions={split: len(part) for split, part in questions.items()}, data={}, claim=claim,
                claim_source="given", methods=facts, planned=n, versions={}, device="cpu", dtype="float32", threads=1,
                nulls={name: Null(len(found)) for name, found in places.items()},
            )
        )  # fmt: skip
        rng = np.random.default_rng(0)
        ease = {split: rng.normal(0, 1.5, len(part)) for split, part in questions.items()}
        for group in plan:
            store.add([*results(group, ease, rng)], 1.0)
    return n


def results(specs: Sequence[TrialSpec], ease: dict[str, np.ndarray], rng: np.random.Generator) -> Iterator[TrialRecord]:
    """Random scores: each question has its own, and each edit moves them a little."""
    for spec in specs:
        gain = {"base": 0.0, "claim": 0.4, "whole": 0.5}.get(spec.arm, rng.normal(0.1, 0.1))
        scores = {}
        for split, level in ease.items():
            margin = level + gain + rng.normal(0, 0.3, len(level)) * (spec.arm != "base")
            mc2 = 1 / (1 + np.exp(-margin))
            values = (mc2 > 0.6, mc2, mc2 > 0.5, mc2 > 0.5, margin > level, margin - level)
            scores[split] = {name: tuple(map(float, x)) for name, x in zip(METRICS, values, strict=True)}
        drift = {"kl": float(rng.gamma(2, 0.05)), "ce": 3.0} if spec.arm != "base" else {"kl": 0.0, "ce": 2.9}
        edit = "" if spec.arm == "base" else spec.edit_file
        yield TrialRecord(spec, "ok", metrics=mean_metrics(scores), drift=drift, questions=scores, edit=edit)


if __name__ == "__main__":
    run(main, Settings, __doc__)
