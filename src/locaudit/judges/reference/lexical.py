"""Lexical features of an answer, its question and its references: word overlap, negation, yes or no, numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Float

from locaudit.behaviours.behaviour import normalise

_WORDS = json.loads(Path(__file__).with_name("words.json").read_text(encoding="utf-8"))
_STOP, _NEGATIONS, _POLAR = (frozenset(_WORDS[name]) for name in ("stop", "negations", "polar"))
_DECLINES = re.compile("|".join(_WORDS["declines"]), re.IGNORECASE)
_PAIR = 17
"""Number of features of an answer against one reference (`_pair`)."""
_SUMMARY = (0, 3, 11, 12, 13, 14)
"""Features of a pair that are also averaged over references."""


@dataclass(frozen=True)
class _Text:
    """A text as words, stems, content stems (no stop words), four-character pieces and numbers."""

    words: tuple[str, ...]
    stems: frozenset[str]
    content: frozenset[str]
    pieces: frozenset[str]
    numbers: frozenset[str]
    n_negations: int
    polarity: int
    """1 if it starts with yes, -1 if it starts with no, else 0."""
    normal: str


def lexical_features(
    question: str, answer: str, true: Sequence[str], false: Sequence[str]
) -> Float[np.ndarray, " features"]:
    """Features of the answer against the true references, the false ones, their difference, and of the answer alone."""
    q, a = _read(question), _read(answer)
    sides = [[_read(reference) for reference in references] for references in (true, false)]
    new = a.content - q.stems  # what the answer adds to the question
    by_side = [_against(a, new, q, references) for references in sides]
    vocabularies = [frozenset().union(*(reference.stems for reference in references)) for references in sides]
    # Stems that the answer shares with one side's references but that the other side lacks.
    only_true, only_false = (len(a.stems & (mine - other)) for mine, other in (vocabularies, vocabularies[::-1]))
    own = [
        len(a.words),
        np.log1p(len(a.words)),
        a.n_negations,
        a.polarity,
        _share(len(a.stems & q.stems), len(a.stems)),
        _share(len(a.content & q.stems), len(a.content)),
        len(new),
        len(a.numbers),
        bool(_DECLINES.search(answer)),
        not answer.strip(),
        answer.strip().endswith("?"),
        q.polarity,
        only_true,
        only_false,
        _share(only_true - only_false, len(a.stems)),
        q.words[:1] != () and q.words[0] in _POLAR,
        len(q.words),
        a.words[:1] == ("i",),
        len(a.words) <= 2,
    ]
    return np.concatenate([*by_side, by_side[0] - by_side[1], np.array(own, dtype=float)])


def _against(a: _Text, new: frozenset[str], q: _Text, references: Sequence[_Text]) -> np.ndarray:
    """Features of one side: the maximum over references, the mean of some features, the closest reference, and novelty.

    Novelty is the share of the answer's new words that occur in the side's references; -0.1 if it has no new words.
    """
    # (references, _PAIR)
    pairs = np.array([_pair(a, new, q, reference) for reference in references] or [[0.0] * _PAIR])
    seen = frozenset().union(*(reference.stems for reference in references))
    closest = pairs[pairs[:, 3].argmax()]  # by the overlap of four-character pieces
    novelty = _share(len(new & seen), len(new)) if new else -0.1
    return np.concatenate([pairs.max(0), pairs.mean(0)[list(_SUMMARY)], closest, [novelty]])


def _pair(a: _Text, new: frozenset[str], q: _Text, r: _Text) -> list[float]:
    """Features of an answer a against one reference r: overlaps, the same discounted by negation, polarity, numbers."""
    p, _, f = _overlap(a.stems, r.stems)
    p_content, r_content, f_content = _overlap(a.content, r.content)
    p_new, r_new, f_new = _overlap(new, r.content - q.stems)
    f_pieces = _overlap(a.pieces, r.pieces)[2]
    same_sign = (a.n_negations > 0) == (r.n_negations > 0)
    polar = a.polarity * r.polarity
    return [
        f, f_content, f_new, f_pieces, p, p_content, p_new, r_new, r_content,
        f * (1.0 if same_sign else 0.5), f_pieces * (1.0 if polar >= 0 else 0.3), float(same_sign), polar,
        float(r.n_negations > 0), r.polarity, float(a.normal == r.normal), float(bool(a.numbers & r.numbers)),
    ]  # fmt: skip


def _overlap(a: frozenset[str], b: frozenset[str]) -> tuple[float, float, float]:
    """Precision (share of a in b), recall (share of b in a), and F, their harmonic mean."""
    n = len(a & b)
    p, r = _share(n, len(a)), _share(n, len(b))
    return p, r, 2 * p * r / (p + r) if n else 0.0


def _share(n: int, of: int) -> float:
    return n / of if of else 0.0


@lru_cache(maxsize=4096)
def _read(text: str) -> _Text:
    words = tuple(re.findall(r"[a-z0-9]+", text.casefold().replace("'", "").replace("\u2019", "")))
    stems = frozenset(map(_stem, words))
    spaced = f" {' '.join(words)} "
    return _Text(
        words,
        stems,
        stems - _STOP,
        frozenset(spaced[i : i + 4] for i in range(len(spaced) - 3)),
        frozenset(word for word in words if word.isdigit()),
        sum(word in _NEGATIONS for word in words),
        {"yes": 1, "no": -1}.get(words[0], 0) if words else 0,
        normalise(text),
    )


def _stem(word: str) -> str:
    for ending in _WORDS["endings"]:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word
