"""Docstrings are read by tired people: no sentence of their first paragraph has more than 30 words."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[1] / "src" / "locaudit").rglob("*.py"))
MOST_WORDS = 30


def docstrings(tree: ast.AST) -> Iterator[str]:
    """Those of modules, classes and functions, and the texts behind fields."""
    for node in ast.walk(tree):
        for item in getattr(node, "body", []) if isinstance(getattr(node, "body", None), list) else []:
            if (
                isinstance(item, ast.Expr)
                and isinstance(item.value, ast.Constant)
                and isinstance(item.value.value, str)
            ):
                yield item.value.value


@pytest.mark.parametrize("file", FILES, ids=lambda file: "/".join(file.parts[-2:]))
def test_first_paragraphs_have_short_sentences(file):
    for text in docstrings(ast.parse(file.read_text(encoding="utf-8"))):
        paragraph = re.split(r"\n\s*\n", text.strip())[0]
        for sentence in re.split(r"(?<=[.:;?!])\s+", " ".join(paragraph.split())):
            assert len(sentence.split()) <= MOST_WORDS, sentence
