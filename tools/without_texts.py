"""Copy a run, or a folder of runs such as a study, without the texts of questions and answers.

    python tools/without_texts.py runs/decide published/decide

For data whose licence does not allow it to be passed on: the copy has every number, can be read (``locaudit report``)
and continued with the same data. Answers are replaced by the first 16 hex digits of their SHA-256, so that each keeps
its judgement. Edits are left out. Degenerate answers cannot be seen in the copy.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

LEFT_OUT = shutil.ignore_patterns("edits", "reports", "figures", "report.html", "behaviour.json", ".lock")


def hashed(text: str) -> str:
    """The text's hash; an empty text stays empty."""
    return hashlib.sha256(text.encode()).hexdigest()[:16] if text else ""


def strip(file: Path) -> None:
    """Replace the texts in a run's database, and give back the space."""
    with closing(sqlite3.connect(file)) as run:
        run.create_function("hashed", 1, hashed, deterministic=True)
        with run:
            run.execute("UPDATE questions SET text = hashed(text), true_answers = '[]', false_answers = '[]'")
            run.execute("UPDATE answers SET answer = hashed(answer)")
            run.execute("UPDATE judgements SET answer = hashed(answer)")
            for (text,) in run.execute("SELECT value FROM manifest").fetchall():  # it shows the first test prompt
                run.execute("UPDATE manifest SET value = ?", [json.dumps(json.loads(text) | {"prompt": None})])
        run.execute("VACUUM")


def main(source: Path, out: Path) -> None:
    """Copy the folder, then take the texts out of every run in it."""
    shutil.copytree(source, out, ignore=LEFT_OUT)
    for file in out.rglob("trials.sqlite"):
        strip(file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of a run, or of several")
    parser.add_argument("out", type=Path, help="new folder for the copy")
    given = parser.parse_args()
    if not any(given.source.rglob("trials.sqlite")) or given.out.exists():
        parser.error(f"expected a folder with runs and a new one; got {given.source} and {given.out}")
    main(given.source, given.out)
