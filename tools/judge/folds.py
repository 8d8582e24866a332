"""Deal questions into folds, so that near-duplicates and rewordings share one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from scipy.sparse.csgraph import connected_components

from locaudit.judges import Case

SAME_QUESTION, SAME_REFERENCES = 0.5, 0.4
"""Cosines above which two questions are linked: of the questions alone, and with their references."""
NEAR_DUPLICATES = (
    f"questions are linked if the cosine of their TF-IDF vectors is above {SAME_QUESTION} (of the pieces of 3 to 5 "
    f"characters of the question) or above {SAME_REFERENCES} (of the words of question and references, without stop "
    "words); linked questions, directly or through others, share a fold"
)


def deal(cases: Sequence[Case], n_folds: int) -> dict[str, int]:
    """Question -> fold. Groups of linked questions (`NEAR_DUPLICATES`), the largest first, go to the smallest fold."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    questions = [case.question for case in cases]
    pieces = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5)).fit_transform(questions)
    texts = [" ".join((case.question, *case.true, *case.false)) for case in cases]
    words = TfidfVectorizer(stop_words="english", sublinear_tf=True).fit_transform(texts)
    linked = (pieces @ pieces.T > SAME_QUESTION) + (words @ words.T > SAME_REFERENCES)  # (questions, questions)
    n, group = connected_components(linked, directed=False)
    members = [[questions[i] for i in np.flatnonzero(group == number)] for number in range(n)]
    # Groups of one size are ordered by hash, so that the order of the file does not matter.
    members.sort(key=lambda names: (-len(names), min(hashlib.sha256(name.encode()).hexdigest() for name in names)))
    folds: dict[str, int] = {}
    sizes = [0] * n_folds
    for names in members:
        smallest = sizes.index(min(sizes))
        sizes[smallest] += len(names)
        folds |= dict.fromkeys(names, smallest)
    return folds
