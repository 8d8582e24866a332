"""Count lines of code by folder, without blank lines, comments, docstrings and imports.

    python tools/count.py [FOLDER ...]        (default: src/locaudit bench tests)

A line counts if any other token is on it, so a statement that spans three lines counts as three.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

_NO_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
    tokenize.ENCODING,
}  # fmt: skip


def count_code(text: str) -> int:
    """Number of code lines in the text of a Python file."""
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and type(node.value.value) is str
        if is_text or isinstance(node, ast.Import | ast.ImportFrom):
            left_out |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - left_out)


def count_folder(folder: Path) -> Counter[str]:
    """Number of code lines for each folder or file directly in `folder`."""
    found: Counter[str] = Counter()
    for file in sorted(folder.rglob("*.py")):
        found[file.relative_to(folder).parts[0]] += count_code(file.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    for name in sys.argv[1:] or ["src/locaudit", "bench", "tests"]:
        by_part = count_folder(Path(name))
        print(f"{name:24} {sum(by_part.values()):6,}")
        for part, n in sorted(by_part.items()):
            print(f"  {part:22} {n:6,}")
