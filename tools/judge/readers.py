"""Compare the lexicon judges with two people, or two other readers, who labelled generated texts without seeing scores.

    python tools/judge/readers.py texts.jsonl reader1.jsonl reader2.jsonl [--show]

Lines of the texts: ``{"id": .., "prompt": .., "continuation": ..}``. Lines of a reader:
``{"id": .., "sentiment": "negative" | "positive" | "neutral", "fluent": true | false}``.

A judge's agreement is measured where both readers agree, because only there is it known what is right: for
``negative`` on the texts that both call negative or both call positive, for ``fluency`` on all texts.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from locaudit.judges import Case
from locaudit.judges.lexicon import LexiconJudge
from locaudit.stats.agreement import compare

SENTIMENTS = ("negative", "positive", "neutral")


def read(path: str) -> dict[str, dict]:
    """The rows of a JSONL file by their id."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return {row["id"]: row for row in (json.loads(line) for line in lines if line.strip())}


def main() -> None:
    """Print the agreement of the readers with each other and of the judges with both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("texts", "reader1", "reader2"):
        parser.add_argument(name)
    parser.add_argument("--show", action="store_true", help="print every text on which a judge is wrong")
    given = parser.parse_args()
    texts, *readers = (read(path) for path in (given.texts, given.reader1, given.reader2))
    ids = [name for name in texts if all(name in reader for reader in readers)]
    print(f"{len(ids)} of {len(texts)} texts labelled by both readers")
    cases = [Case(texts[name]["prompt"], texts[name]["continuation"]) for name in ids]
    said = {aspect: [j.probability for j in LexiconJudge(aspect).score(cases)] for aspect in ("negative", "fluency")}

    def labels(key: str) -> list[tuple]:
        return [tuple(reader[name][key] for reader in readers) for name in ids]

    for key in ("sentiment", "fluent"):
        pairs = labels(key)
        same = sum(first == second for first, second in pairs)
        print(f"\n{key}: the readers agree on {same} of {len(pairs)} texts ({same / len(pairs):.1%})")
        print("  " + ", ".join(f"{a}/{b} {n}" for (a, b), n in sorted(Counter(pairs).items(), key=str)))
    for aspect, key, yes, no in (("negative", "sentiment", "negative", "positive"), ("fluency", "fluent", True, False)):
        both = [i for i, pair in enumerate(labels(key)) if pair in ((yes, yes), (no, no))]
        truth = [float(labels(key)[i][0] == yes) for i in both]
        found = compare([said[aspect][i] for i in both], truth, [ids[i] for i in both])
        (no_no, no_yes), (yes_no, yes_yes) = found.counts
        low, high = found.agreement_interval
        share = f"{found.agreement:.1%}, {low:.1%} to {high:.1%}"
        print(f"\n{aspect}: right on {no_no + yes_yes} of {found.n} texts ({share})")
        print(f"  of {yes_yes + no_yes} {yes}: {yes_yes} called so; of {no_no + yes_no} {no}: {no_no} called so")
        for i, label in zip(both, truth, strict=True):
            if given.show and (said[aspect][i] >= 0.5) != label:
                print(f"  {said[aspect][i]:.2f} {cases[i].question[-60:]!r} {cases[i].answer!r}")
    neutral = [p for p, pair in zip(said["negative"], labels("sentiment"), strict=True) if pair == ("neutral",) * 2]
    if neutral:
        undecided = sum(0.3 < p < 0.7 for p in neutral)
        print(f"\nneutral to both: {len(neutral)}, mean P(negative) {sum(neutral) / len(neutral):.2f}, "
              f"{undecided} between .3 and .7")  # fmt: skip


if __name__ == "__main__":
    main()
