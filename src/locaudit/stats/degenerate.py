"""Degenerate answers, found by rule: those that are empty, a loop, the question again, or not in its language."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from statistics import fmean

from locaudit.records import TrialRecord

MAX_REPEATED = 0.5
"""Largest share of words, or of pairs of neighbouring words, that an answer may repeat."""
MIN_WORDS = 6
"""Shorter answers are not searched for repeats, nor for function words."""
MIN_FUNCTION = 0.1
"""Smallest share of function words among the words in lower case of an English answer."""
_LABELS = re.compile(r"\b(q|a|question|answer)\s*:", re.IGNORECASE)
_FUNCTION = frozenset({
    "a", "all", "an", "and", "are", "as", "at", "be", "because", "been", "but", "by", "can", "did", "do", "does",
    "for", "from", "has", "have", "i", "if", "in", "is", "it", "its", "no", "not", "of", "on", "or", "some", "than",
    "that", "the", "their", "there", "they", "this", "to", "was", "were", "when", "which", "who", "will", "with",
    "would", "you", "your",
})  # fmt: skip


def is_degenerate(question: str, answer: str) -> bool:
    """Whether one of four rules holds. The share of such answers says how often an edit breaks the model's language.

    - *empty*: no letter and no digit besides labels such as ``A:``.
    - *loop*: of `MIN_WORDS` words or more, a share above `MAX_REPEATED` of the words, or of the pairs of neighbouring
      words, occurred before in the answer.
    - *echo*: four words or more that stand in the question one after another and are at least half of it; or the whole
      question, and fewer than three words that it does not have.
    - *language*: most letters are of a script (Latin, Cyrillic, ...) that the question has no letter of. Or the
      question has English function words, and of `MIN_WORDS` or more words in lower case, a share below `MIN_FUNCTION`
      are function words.

    The rules read no references. They miss answers to another question, most unfinished ones and some word salad.
    """
    asked, said = _words(question.casefold()), _words(answer.casefold())
    if not _words(_LABELS.sub(" ", answer)):
        return True
    n, n_pairs = len(said), len(set(pairwise(said)))
    if n >= MIN_WORDS and min(len(set(said)) / n, n_pairs / (n - 1)) < 1 - MAX_REPEATED:
        return True
    spaced, whole = f" {' '.join(said)} ", f" {' '.join(asked)} "
    if spaced in whole and n >= max(4, len(asked) / 2):
        return True
    if asked and whole in spaced and sum(word not in asked for word in said) < 3:
        return True
    letters, known = [_script(c) for c in answer if c.isalpha()], {_script(c) for c in question if c.isalpha()}
    if known and 2 * sum(script not in known for script in letters) > len(letters):
        return True
    lower = [word for word in _words(answer) if word == word.casefold()]
    english = not _FUNCTION.isdisjoint(asked)
    return english and len(lower) >= MIN_WORDS and sum(word in _FUNCTION for word in lower) < MIN_FUNCTION * len(lower)


def share_degenerate(record: TrialRecord, questions: Sequence[str]) -> float | None:
    """Share of a trial's answers to the test questions that are: sampled answers, or greedy ones if none were sampled.

    None without answers.
    """
    said = record.samples.get("test") or record.said("test")[:1]
    found = [is_degenerate(*pair) for answers in said for pair in zip(questions, answers, strict=True)]
    return fmean(found) if found else None


def _words(text: str) -> list[str]:
    """Runs of letters, digits and apostrophes."""
    return re.findall(r"[^\W_]+(?:['\u2019][^\W_]+)*", text)


@lru_cache(maxsize=4096)  # a report asks for each letter of all answers
def _script(letter: str) -> str:
    """The first word of a letter's name in Unicode, such as LATIN."""
    return unicodedata.name(letter, "").partition(" ")[0]
