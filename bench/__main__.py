"""Ours against a peer: ``python -m bench TASK [--peer P] [--device cpu|cuda] [--json] [--out FILE]``."""

from __future__ import annotations

import json
import sys
from typing import Any

from bench.arguments import ending, parse, parser, positive
from bench.harness import LEAST_SECONDS, Options, compare
from bench.tasks import TASKS


def main() -> int:
    """Run one comparison and print it; 1 if both sides did not compute the same."""
    given = parser("Compare locaudit's speed with a peer's.", "python -m bench")
    given.add_argument("task", choices=[*TASKS, "all"])
    given.add_argument("--peer", help="default: each peer of the task in turn; with all: the tasks that have it")
    given.add_argument("--questions", type=positive, help="default: what the task says")
    given.add_argument("--where", choices=("all", "middle"), default="all", help="edited heads")
    given.add_argument("--peer-batch", type=positive, help="batch size of the peer")
    given.add_argument("--rounds", type=positive, default=3)
    given.add_argument("--smoke", action="store_true", help="the smallest sizes and one round: does it run?")
    given.add_argument("--json", action="store_true", help="print JSON")
    args = parse(given)
    tasks = TASKS if args.task == "all" else {args.task: TASKS[args.task]}
    pairs = [(task, peer) for task in tasks.values() for peer in task.sides if peer != "ours"]
    chosen = [(task, peer) for task, peer in pairs if args.peer in (None, peer)]
    if not chosen:
        peers = ", ".join(dict.fromkeys(peer for _, peer in pairs))
        given.error(f"{args.task} has no peer {args.peer!r}; it has {peers}")
    reports: list[dict[str, Any]] = []
    for task, peer in chosen:
        n = args.questions or (task.smoke if args.smoke else task.n_questions)
        options = Options(args.model, args.dtype, args.device, args.data, n, args.where, args.peer_batch)
        rounds, least = (1, 0.0) if args.smoke else (args.rounds, LEAST_SECONDS)
        reports.append(compare(task, peer, options, rounds=rounds, least_seconds=least, say=_say))
        if args.out:
            args.out.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
        if not args.json:
            print("\n" * (len(reports) > 1) + text(reports[-1]), flush=True)
    if args.json:
        print(json.dumps(reports, indent=1))
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
    sys.exit(ending(main))
