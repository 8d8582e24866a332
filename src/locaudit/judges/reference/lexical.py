"""What the words of an answer share with its question and its references: overlap, negation, yes and no, numbers."""

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
_SUMMARY = (0, 3, 11, 12, 13, 14)
_SIDE = 2 * _PAIR + len(_SUMMARY) + 1
_OWN = 19
N_LEXICAL = 3 * _SIDE + _OWN
"""Width of `lexical_features`."""


@dataclass(frozen=True)
class _Text:
    """A text as sets of stems and of four-letter pieces."""

    words: tuple[str, ...]
    stems: frozenset[str]
    content: frozenset[str]
    pieces: frozenset[str]
    numbers: frozenset[str]
    n_negations: int
    polarity: int
    """1 when it starts with yes, -1 with no, 0 otherwise."""
    normal: str


def lexical_features(
    question: str, answer: str, true: Sequence[str], false: Sequence[str]
) -> Float[np.ndarray, " {N_LEXICAL}"]:
    """The answer against the true references, the false ones, their difference, and on its own."""
    q, a = _read(question), _read(answer)
    sides = [[_read(reference) for reference in references] for references in (true, false)]
    new = a.content - q.stems
    by_side = [_against(a, new, q, references) for references in sides]
    vocabularies = [frozenset().union(*(reference.stems for reference in references)) for references in sides]
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
    """Best, mean and best-matching reference of one side, in numbers."""
    pairs = np.array([_pair(a, new, q, reference) for reference in references] or [[0.0] * _PAIR])
    seen = frozenset().union(*(reference.stems for reference in references))
    closest = pairs[pairs[:, 3].argmax()]
    novelty = _share(len(new & seen), len(new)) if new else -0.1
    return np.concatenate([pairs.max(0), pairs.mean(0)[list(_SUMMARY)], closest, [novelty]])


def _pair(a: _Text, new: frozenset[str], q: _Text, r: _Text) -> list[float]:
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
    """Share of a in b, of b in a, and their harmonic mean."""
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
