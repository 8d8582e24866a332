r"""Compare the judges of sentiment texts with two readers, who labelled generated texts without seeing scores or edits.

    python tools/judge/readers.py tools/judge/labels/test.tsv [--show]
    python tools/judge/readers.py NEW.tsv --join texts.tsv key.tsv reader_A.tsv reader_B.tsv

The second form first writes NEW.tsv from the files of tools/judge/texts.py and the labels of both readers (columns id,
sentiment, fluent).

Columns of the file: id, arm (the edit), prompt, continuation, and the labels of both readers: sentiment_a, sentiment_b
(negative, positive or neither), fluent_a, fluent_b (yes or no). Line breaks in a text are written ``\n``.

A judge's agreement is measured where both readers agree, because only there is it known what is right: for
``negative`` on the texts that both call negative or both call positive, for ``fluency`` on all texts.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from locaudit.judges import Case
from locaudit.registry import ASPECTS, JUDGES
from locaudit.stats.agreement import compare

LABELS = {"negative": ("sentiment", "negative", "positive"), "fluency": ("fluent", "yes", "no")}
"""For each aspect, its label, and the values that mean yes and no."""
PAIRS = [(sentiment, fluent) for sentiment in ("negative", "positive", "neither") for fluent in ("yes", "no")]
"""What a reader can say of a text: (sentiment, fluent)."""
COLUMNS = ("id", "arm", "prompt", "continuation", "sentiment_a", "sentiment_b", "fluent_a", "fluent_b")


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a file of labelled texts."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [{key: value.replace("\\n", "\n") for key, value in row.items()} for row in rows]


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write rows that `read_rows` reads."""
    lines = ["\t".join(columns), *("\t".join(row).replace("\r", "").replace("\n", "\\n") for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def join(texts: Path, key: Path, *readers: Path) -> list[tuple[str, ...]]:
    """Rows of `COLUMNS`, in the order of the texts. Ends the program unless both readers labelled all texts."""
    rows = read_rows(texts)
    arms = {row["id"]: row["arm"] for row in read_rows(key)}
    a, b = ({row["id"]: (row["sentiment"], row["fluent"]) for row in read_rows(file)} for file in readers)
    for file, labels in zip(readers, (a, b), strict=True):
        bad = [f"{row['id']} {labels.get(row['id'])}" for row in rows if labels.get(row["id"]) not in PAIRS]
        if bad:
            raise SystemExit(f"{file}: got {', '.join(bad)}; expected one of {PAIRS} for each text; correct them")
    out = []
    for row in rows:
        of_a, of_b = a[row["id"]], b[row["id"]]
        out.append((row["id"], arms[row["id"]], row["prompt"], row["continuation"], of_a[0], of_b[0], of_a[1], of_b[1]))
    return out


def agreed(rows: list[dict[str, str]], aspect: str) -> list[tuple[dict[str, str], bool]]:
    """The rows on which both readers say yes or both say no, and what they say."""
    label, *values = LABELS[aspect]
    return [
        (row, row[f"{label}_a"] == values[0])
        for row in rows
        if row[f"{label}_a"] == row[f"{label}_b"] and row[f"{label}_a"] in values
    ]


def cases(rows: list[dict[str, str]]) -> list[Case]:
    """What the judges are given."""
    return [Case(row["prompt"], row["continuation"]) for row in rows]


def main() -> None:
    """Print the agreement of the readers with each other and of the default judges with both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--show", action="store_true", help="print every text on which a judge is wrong")
    parser.add_argument("--join", type=Path, nargs=4, metavar=("TEXTS", "KEY", "READER_A", "READER_B"))
    given = parser.parse_args()
    if given.join:
        write_rows(given.file, COLUMNS, join(*given.join))
    rows = read_rows(given.file)
    for aspect, (label, yes, no) in LABELS.items():
        kind = JUDGES[ASPECTS[aspect].judge]
        judge = kind.loader({aspect: kind.settings()}, "cpu")[aspect]
        pairs = Counter((row[f"{label}_a"], row[f"{label}_b"]) for row in rows)
        same = sum(n for (a, b), n in pairs.items() if a == b)
        print(f"{label}: the readers agree on {same} of {len(rows)} texts ({same / len(rows):.1%})")
        print("  " + ", ".join(f"{a}/{b} {n}" for (a, b), n in sorted(pairs.items())))
        known = agreed(rows, aspect)
        said = [judgement.probability or 0.0 for judgement in judge.score(cases([row for row, _ in known]))]
        found = compare(said, [float(truth) for _, truth in known], [row["prompt"] for row, _ in known])
        (no_no, no_yes), (yes_no, yes_yes) = found.counts
        low, high = found.agreement_interval
        print(f"{judge.name}: right on {no_no + yes_yes} of {found.n} ({found.agreement:.1%}, {low:.1%} to {high:.1%})")
        print(f"  of {yes_yes + no_yes} {yes}: {yes_yes} called so; of {no_no + yes_no} {no}: {no_no} called so")
        rest = [row for row in rows if row[f"{label}_a"] == row[f"{label}_b"] == "neither"]
        if rest:
            called = sum((judgement.probability or 0.0) >= 0.5 for judgement in judge.score(cases(rest)))
            print(f"  of {len(rest)} that both call neither: {called} called {yes}")
        arms: dict[str, list[bool]] = defaultdict(list)
        for p, (row, truth) in zip(said, known, strict=True):
            arms[row["arm"]].append((p >= 0.5) == truth)
            if given.show and not arms[row["arm"]][-1]:
                print(f"  {p:.2f} {row['arm']} {row['prompt'][-60:]!r} {row['continuation']!r}")
        print("  by edit: " + ", ".join(f"{arm} {sum(right)}/{len(right)}" for arm, right in sorted(arms.items())))


if __name__ == "__main__":
    main()
