"""Compare the speed of locaudit with another library on the same work.

python -m bench TASK [--peer P] [--device cpu|cuda] [--json] [--out FILE]
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from bench import auditing, generating, multiple_choice, probing, training
from bench.command import Positive, check_out, header, line, run, write_json
from bench.harness import LEAST_SECONDS, Options, compare
from locaudit.errors import ConfigError

TASKS = {module.TASK.name: module.TASK for module in (training, multiple_choice, probing, generating, auditing)}


@dataclass(frozen=True)
class Settings:
    """What to compare."""

    task: tyro.conf.Positional[Literal["training", "multiple_choice", "probing", "generating", "auditing", "all"]]
    options: tyro.conf.OmitArgPrefixes[Options] = field(default_factory=Options)
    peer: str | None = None
    """The library to compare with (default: each peer of the task in turn). With ``all``: tasks that have this peer."""
    rounds: Positive = 3
    smoke: bool = False
    """Smallest sizes and one round, to check that everything runs."""
    json: bool = False
    """Print JSON."""
    out: Path | None = None
    """Also write JSON to this file."""


def main(given: Settings) -> int:
    """Run the comparisons and print them. Exit code 1 if two sides did not compute the same values."""
    check_out(given.out)
    given.options.subject.check()
    reports: list[dict[str, Any]] = []
    for task, peer in chosen(given.task, given.peer):
        n = given.options.questions or (task.smoke if given.smoke else task.questions)
        rounds, least = (1, 0.0) if given.smoke else (given.rounds, LEAST_SECONDS)
        reports.append(compare(task, peer, replace(given.options, questions=n), rounds=rounds, least_seconds=least))
        if given.out:
            write_json(given.out, reports)
        if not given.json:
            print(text(reports[-1]) + "\n", flush=True)
    if given.json:
        print(json.dumps(reports, indent=1))
    return int(any(not check["ok"] for report in reports for check in report["same"].values()))


def chosen(task: str, peer: str | None) -> list[tuple[Any, str]]:
    """The (task, peer) pairs that `task` and `peer` select."""
    tasks = TASKS.values() if task == "all" else [TASKS[task]]
    pairs = [(one, name) for one in tasks for name in one.sides if name != "ours"]
    found = [(one, name) for one, name in pairs if peer in (None, name)]
    if not found:
        peers = ", ".join(dict.fromkeys(name for _, name in pairs))
        raise ConfigError(
            got=f"{task} with the peer {peer!r}", expected=f"one of {peers}", remedy="choose another --peer"
        )
    return found


def text(report: dict[str, Any]) -> str:
    """One comparison as text for the terminal."""
    options, subject, unit = report["options"], report["options"]["subject"], report["unit"]
    title = f"{report['task']} ({options['where']}), {options['questions']} questions, {report['units']} {unit}, "
    title += f"{subject['model']} {subject['dtype']} on {report['machine']['device']}"
    lines = [title, "", header("", "median s", f"{unit}/s", "tokens", "tokens/s", "peak MB")]
    for name, side in report["sides"].items():
        rates = f"{side['median_s']:.3g}", f"{side['units_per_s']:.4g}"
        lines.append(line([name, *rates, side["tokens"], f"{side['tokens_per_s']:.0f}", f"{side['peak_mb']:.0f}"]))
    low, high = report["ratio_range"]
    bar = f", bar {report['bar']:g}" if report["bar"] else ""
    lines += ["", f"ratio {report['ratio']:.1f} (rounds {low:.1f} to {high:.1f}{bar})"]
    for key, check in report["same"].items():
        verdict = "same" if check["ok"] else "NOT THE SAME"
        lines.append(f"{verdict}: {key}, {check['n']} values, largest difference {check['max_difference']:.2g}")
    for key, sides in report["reported"].items():
        for name, rounds in sides.items():
            lines.append(f"{key}, {name}: {' '.join(f'{sum(x) / max(len(x), 1):.4f}' for x in rounds)}")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main, Settings, __doc__)
