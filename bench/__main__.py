"""Ours against a peer: ``python -m bench TASK [--peer P] [--device cpu|cuda] [--json] [--out FILE]``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench.harness import LEAST_SECONDS, Options, compare
from bench.tasks import TASKS


def main() -> int:
    """Run one comparison and print it; 1 if both sides did not compute the same."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Compare locaudit's speed with a peer's.")
    parser.add_argument("task", choices=[*TASKS, "all"])
    parser.add_argument("--peer", help="default: each peer of the task in turn")
    parser.add_argument("--model", default=Options.model)
    parser.add_argument("--device", default=Options.device)
    parser.add_argument("--dtype", default=Options.dtype)
    parser.add_argument("--data", default=Options.data, help="behaviour by name or file")
    parser.add_argument("--questions", type=int, help="default: what the task says")
    parser.add_argument("--where", choices=("all", "middle"), default="all", help="edited heads")
    parser.add_argument("--peer-batch", type=int, help="batch size of the peer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes and one round: does it run?")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", type=Path, help="write JSON here too")
    args = parser.parse_args()
    names = list(TASKS) if args.task == "all" else [args.task]
    reports: list[dict[str, Any]] = []
    for name in names:
        task = TASKS[name]
        peers = [args.peer] if args.peer else [side for side in task.sides if side != "ours"]
        if unknown := [peer for peer in peers if peer not in task.sides or peer == "ours"]:
            parser.error(f"{name} has no peer {unknown[0]!r}; it has {', '.join(p for p in task.sides if p != 'ours')}")
        n = args.questions or (task.smoke if args.smoke else task.n_questions)
        options = Options(args.model, args.dtype, args.device, args.data, n, args.where, args.peer_batch)
        for peer in peers:
            rounds, least = (1, 0.0) if args.smoke else (args.rounds, LEAST_SECONDS)
            reports.append(compare(task, peer, options, rounds=rounds, least_seconds=least, say=_say))
            if args.out:
                args.out.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(reports, indent=1) if args.json else "\n\n".join(map(text, reports)))
    return int(any(not check["ok"] for report in reports for check in report["same"].values()))


def text(report: dict[str, Any]) -> str:
    """One comparison for people."""
    options, unit = report["options"], next(key for key in report if key not in _FIXED)
    title = f"{report['task']} ({options['where']}), {options['n_questions']} questions, {report[unit]} {unit}, "
    title += f"{options['model']} {options['dtype']} on {report['machine']['device']}"
    rows = [["", "median s", f"{unit}/s", "tokens", "tokens/s", "peak MB"]]
    for name, side in report["sides"].items():
        rate = f"{side[f'{unit}_per_s']:.4g}"
        rows.append(
            [
                name,
                f"{side['median_s']:.3g}",
                rate,
                side["tokens"],
                f"{side['tokens_per_s']:.0f}",
                f"{side['peak_mb']:.0f}",
            ]
        )
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    lines = [title] + ["  ".join(str(cell).rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    low, high = report["ratio_range"]
    bar = f", bar {report['bar']:g}" if report["bar"] else ""
    lines.append(f"ratio {report['ratio']:.1f} (rounds {low:.1f} to {high:.1f}{bar})")
    for key, check in report["same"].items():
        verdict = "same" if check["ok"] else "NOT THE SAME"
        lines.append(f"{verdict}: {key}, {check['n']} values, largest difference {check['max_difference']:.2g}")
    for key, sides in report["reported"].items():
        for name, rounds in sides.items():
            lines.append(f"{key}, {name}: {' '.join(f'{sum(x) / max(len(x), 1):.4f}' for x in rounds)}")
    return "\n".join(lines)


_FIXED = ("task", "peer", "options", "ratio", "ratio_range", "bar", "sides", "same", "reported", "machine")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
