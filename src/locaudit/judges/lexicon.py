r"""The judge of kind ``lexicon``: whether an answer is negative, by word lists and rules. English only.

It sums the weights w of the listed words and phrases in an answer and gives

    P(negative) = 1 / (1 + exp(0.02 + sum of w)),      w > 0 for positive words, w < 0 for negative ones

so a weight is a log-odds. A text without any listed word gets 0.495: undecided, and not counted as negative; with a
negation but no listed word ("not the bread I would make"), it gets 0.59. Words act on each other within a sentence:

    negation      a negator turns the next words, up to a comma or five words on. w becomes -0.7 w if w > 0, else
                  -0.5 w: "not good" is bad, but "not bad" is hardly good. A second negator turns them back ("never
                  failed to impress"). Some strengthen a comparative ("never better")
    spared        a bad word that is turned counts only if nothing else in the text is bad: "no killer" is no praise
                  in "a drunk, but no killer"
    degree        "very" multiplies the next word's weight by 1.4, "slightly" by 0.6
    contrast      "but" multiplies what comes before it in the sentence by 0.5 and what comes after it by 1.5;
                  what follows "although" counts half up to the next comma
    repetition    a word counts once, however often it is repeated: as where it weighs most
    opposites     "un-" and "-less" turn a listed word as a negator does ("unworthy", "painless")
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from locaudit.judges.base import Case, Judgement, check_aspects
from locaudit.records import content_hash

VERSION = 4
"""Raise it when a change of the code changes judgements; it is part of a judge's fingerprint, as the word lists are."""

_PRIOR = 0.02
_DENIAL = -0.4
_NOT_GOOD, _NOT_BAD = -0.7, -0.5
_STRONGER, _WEAKER, _BEFORE_BUT, _AFTER_BUT, _CONCEDED = 1.4, 0.6, 0.5, 1.5, 0.5
_REACH = 5
"""Number of words that a negator reaches."""
_LONGEST = 5
"""Number of words in the longest phrase of the lists."""
_TOKEN = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*|[.!?;:,()\n]")
_SUFFIXES = (
    ("'s", ""), ("s", ""), ("es", ""), ("ies", "y"), ("ed", ""), ("ed", "e"), ("ied", "y"), ("ing", ""), ("ing", "e"),
    ("ly", ""), ("ly", "le"), ("ily", "y"), ("ly", "l"), ("ness", ""), ("iness", "y"),
    ("er", ""), ("er", "e"), ("ier", "y"), ("est", ""), ("est", "e"), ("iest", "y"),
)  # fmt: skip
"""(ending, its replacement): the ways in which a word can be an inflected form of a listed one."""


@dataclass(frozen=True)
class LexiconJudge:
    """A judge of ``negative``. It needs no model, and its judgements never change."""

    name: str = "lexicon (negative)"
    uses_references: bool = False

    @property
    def fingerprint(self) -> str:
        """Hash of the word lists and the version of the code."""
        return content_hash(["lexicon", VERSION, _read_lists()])

    def score(self, cases: Sequence[Case]) -> list[Judgement]:
        """P(negative) of each case; none is ever missing."""
        return [Judgement((1 - math.tanh((_PRIOR + _sentiment(_clean(case.answer))) / 2)) / 2) for case in cases]


def load(wanted: Mapping[str, Any], device: str) -> dict[str, LexiconJudge]:
    """The judge of ``negative``. Raises `ConfigError` for another aspect."""
    check_aspects("lexicon", wanted, "negative")
    return {aspect: LexiconJudge() for aspect in wanted}


@cache
def _read_lists() -> dict[str, Any]:
    return tomllib.loads(resources.files("locaudit.judges").joinpath("lexicon.toml").read_text(encoding="utf-8"))


@cache
def _lexicon() -> tuple[dict[str, float], dict[str, frozenset[str]]]:
    """(weight of each word or phrase, words of each role). A phrase is its words, joined by spaces."""
    lists, weights = _read_lists(), {}
    for name, sign in (("positive", 1), ("negative", -1), ("neutral", 0)):
        for size, words in lists[name].items():
            weights |= {word.replace("_", " "): sign * float(size) for word in words.split()}
    roles = {role: frozenset(x.replace("_", " ") for x in words.split()) for role, words in lists["words"].items()}
    return weights, roles


def _find(tokens: Sequence[str]) -> tuple[int, str, float, str]:
    """The longest listed phrase or word that `tokens` begin with: (number of tokens, its entry, its weight, its role).

    The weight is 0 for a word with a role, and the role is ``""`` for others. The entry is empty if none is listed.
    """
    weights, roles = _lexicon()
    for n in range(min(_LONGEST, len(tokens)), 0, -1):
        phrase = " ".join(tokens[:n])
        for role, words in roles.items():
            if phrase in words and role != "unsurpassed":
                return n, phrase, 0.0, role
        if phrase in weights:
            return n, phrase, weights[phrase], ""
    word = tokens[0]
    for stem in (word, word.removeprefix("un"), word.removesuffix("less")):
        for form in (stem, *_base_forms(stem)):
            if form in weights:
                return 1, form, weights[form] if stem == word else _negate(weights[form]), ""
    return 1, "", 0.0, ""


def _negate(weight: float) -> float:
    return weight * (_NOT_GOOD if weight > 0 else _NOT_BAD)


def _base_forms(word: str) -> Iterator[str]:
    for ending, replacement in _SUFFIXES:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            stem = word.removesuffix(ending)
            yield stem + replacement
            if not replacement and stem[-1] == stem[-2]:  # sadder, dragged
                yield stem[:-1]


def _sentiment(text: str) -> float:
    """The sum of the weights of the listed words in a text; positive for a positive text."""
    _, roles = _lexicon()
    found: dict[str, float] = {}
    spared: dict[str, float] = {}
    for sentence in re.split(r"[.!?;\n]+", text):
        for entry, weight, is_bad in _weigh(sentence, roles):
            group = spared if is_bad and weight > 0 else found
            group[entry] = max(group.get(entry, 0.0), weight, key=abs)
    if min(found.values(), default=0.0) >= 0:
        found |= spared
    if not found and not roles["negators"].isdisjoint(_find_words(text)):
        return _DENIAL
    return sum(found.values())


def _weigh(sentence: str, roles: Mapping[str, frozenset[str]]) -> list[tuple[str, float, bool]]:
    """(entry, weight in its context, whether it is bad by itself) of each listed word in one sentence."""
    tokens, out = _TOKEN.findall(sentence), []
    place, start, negator, reach, negated, degree, turned, conceded = 0, 0, "", 0, False, 1.0, 1.0, 1.0
    while place < len(tokens):
        n, entry, weight, role = _find(tokens[place : place + _LONGEST])
        word = tokens[place]
        place += n
        if role == "turns":
            out = [(one, given * _BEFORE_BUT, is_bad) for one, given, is_bad in out]
            turned = _AFTER_BUT
        if role in ("turns", "concedes") or word in ",():":
            reach, conceded = 0, _CONCEDED if role == "concedes" else 1.0
        if word == "and":
            reach = 0
        if role == "negators":
            if (own := _find([word])[2]) and n > 1:  # "failed to" says something by itself
                out.append((entry, _negate(own) if reach and negated else own, own < 0))
            negated = not (reach and negated)
            negator, reach, start = entry, _REACH, place
            continue
        if role in ("stronger", "weaker"):
            degree *= _STRONGER if role == "stronger" else _WEAKER
            continue
        if weight:
            is_bad = weight < 0
            beyond = word.endswith("er") or word == "worse" or {"more", "so", "such"} & set(tokens[start : place - n])
            if reach and negated:
                weight = _STRONGER * weight if beyond and negator in roles["unsurpassed"] else _negate(weight)
            out.append((entry, weight * degree * turned * conceded, is_bad))
        degree, reach = 1.0, max(0, reach - 1)
    return out


def _clean(text: str) -> str:
    return text.lower().replace("\u2019", "'")


def _find_words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return [token for token in _TOKEN.findall(_clean(text)) if token[0].isalpha()]
