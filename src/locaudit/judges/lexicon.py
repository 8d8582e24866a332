r"""The judges of kind ``lexicon``: exact, from word lists and counts, without a model. English only.

``negative`` sums the weights w of the listed words and phrases in an answer and gives

    P(negative) = 1 / (1 + exp(0.02 + sum of w)),      w > 0 for positive words, w < 0 for negative ones

so a weight is a log-odds. A text without any listed word gets 0.495: undecided, and not counted as negative; with a
negation but no listed word ("not the bread I would make"), it gets 0.59. Words act on each other within a sentence:

    negation      a negator turns the next words, up to a comma or five words on: w becomes -0.7 w. A second one turns
                  them back ("never failed to impress"). Some strengthen a comparative ("never better")
    degree        "very" multiplies the next word's weight by 1.4, "slightly" by 0.6
    contrast      "but" multiplies what comes before it in the sentence by 0.5 and what comes after it by 1.5;
                  what follows "although" counts half up to the next comma
    repetition    the same word with the same sign counts once, however often it is repeated

``fluency`` multiplies the results of the checks in `_fluency`, each of which is 1 for ordinary text.
"""

from __future__ import annotations

import math
import re
import string
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from locaudit.behaviours.loaders import BUNDLED, load_behaviour
from locaudit.errors import ConfigError
from locaudit.judges.base import Case, Judgement
from locaudit.records import content_hash

VERSION = 1
"""Raise it when a change of the code changes judgements; it is part of a judge's fingerprint, as the word lists are."""

_PRIOR = 0.02
_DENIAL = -0.4
_NEGATED, _STRONGER, _WEAKER, _BEFORE_BUT, _AFTER_BUT, _CONCEDED = -0.7, 1.4, 0.6, 0.5, 1.5, 0.5
_REACH = 5
"""Number of words that a negator reaches."""
_LONGEST = 5
"""Number of words in the longest phrase of the lists."""
_TOKEN = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*|[.!?;:,()\n]")
_PLAIN = frozenset(string.ascii_lowercase + string.digits + " \n.,;:!?'\"()-$%&\u2013\u2014\u201c\u201d\u2026")
"""Characters of plain English text in lower case, with dashes, quotes and an ellipsis."""
_SAID_AS_SPELT = "aiobcdfgjkpqtvwz"
"""First letters that tell whether a word takes "a" or "an"; the others are said in more than one way."""
_SENTENCE = 8
"""From this number of words on, an answer must contain function words."""
_SUFFIXES = (
    ("'s", ""), ("s", ""), ("es", ""), ("ies", "y"), ("ed", ""), ("ed", "e"), ("ied", "y"), ("ing", ""), ("ing", "e"),
    ("ly", ""), ("ly", "le"), ("ily", "y"), ("ly", "l"), ("ness", ""), ("iness", "y"),
    ("er", ""), ("er", "e"), ("ier", "y"), ("est", ""), ("est", "e"), ("iest", "y"),
)  # fmt: skip
"""(ending, its replacement): the ways in which a word can be an inflected form of a listed one."""


@dataclass(frozen=True)
class LexiconJudge:
    """A judge of one aspect, ``negative`` or ``fluency``. It needs no model, and its judgements never change."""

    aspect: str

    @property
    def name(self) -> str:
        """Name in tables and messages."""
        return f"lexicon ({self.aspect})"

    @property
    def fingerprint(self) -> str:
        """Hash of the aspect, the word lists and the version of the code."""
        known = sorted(_known_words()) if self.aspect == "fluency" else []
        return content_hash(["lexicon", self.aspect, VERSION, _read_lists(), known])

    @property
    def uses_references(self) -> bool:
        """False: it reads the answer and, for fluency, the prompt."""
        return False

    def score(self, cases: Sequence[Case]) -> list[Judgement]:
        """P(yes) of each case; none is ever missing."""
        return [Judgement(_ASPECTS[self.aspect](case)) for case in cases]


def load(wanted: Mapping[str, Any], device: str) -> dict[str, LexiconJudge]:
    """The judges of all aspects that use this kind. Raises `ConfigError` for an aspect that has no word lists."""
    for aspect in wanted:
        if aspect not in _ASPECTS:
            raise ConfigError(
                got=f"the lexicon judge for {aspect}",
                expected=f"an aspect that has rules ({', '.join(_ASPECTS)})",
                remedy=f"choose another kind of judge for judges.{aspect}",
            )
    return {aspect: LexiconJudge(aspect) for aspect in wanted}


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


def _find(tokens: Sequence[str]) -> tuple[int, str, str]:
    """The longest listed phrase or word that `tokens` begin with: (number of tokens, its entry, its role or ``""``).

    The entry is empty if there is none.
    """
    weights, roles = _lexicon()
    for n in range(min(_LONGEST, len(tokens)), 0, -1):
        phrase = " ".join(tokens[:n])
        for role, words in roles.items():
            if phrase in words and role != "unsurpassed":
                return n, phrase, role
        if phrase in weights:
            return n, phrase, ""
    return 1, next((form for form in _base_forms(tokens[0]) if form in weights), ""), ""


def _base_forms(word: str) -> Iterator[str]:
    for ending, replacement in _SUFFIXES:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            stem = word.removesuffix(ending)
            yield stem + replacement
            if not replacement and stem[-1] == stem[-2]:  # sadder, dragged
                yield stem[:-1]


def _sentiment(text: str) -> float:
    """The sum of the weights of the listed words in a text; positive for a positive text."""
    weights, roles = _lexicon()
    found: dict[tuple[str, bool], float] = {}
    for sentence in re.split(r"[.!?;\n]+", text):
        for entry, weight in _weigh(sentence, weights, roles):
            key = (entry, weight > 0)
            found[key] = max(found.get(key, 0.0), weight, key=abs)
    if not found and not roles["negators"].isdisjoint(_words(text)):
        return _DENIAL
    return sum(found.values())


def _weigh(sentence: str, weights: Mapping[str, float], roles: Mapping[str, frozenset[str]]) -> list[tuple[str, float]]:
    """(entry, weight in its context) of each listed word in one sentence."""
    tokens, out = _TOKEN.findall(sentence), []
    place, start, negator, reach, sign, degree, turned, conceded = 0, 0, "", 0, 1.0, 1.0, 1.0, 1.0
    while place < len(tokens):
        n, entry, role = _find(tokens[place : place + _LONGEST])
        word = tokens[place]
        place += n
        if role == "turns":
            out = [(one, weight * _BEFORE_BUT) for one, weight in out]
            turned = _AFTER_BUT
        if role in ("turns", "concedes") or word in ",():":
            reach, conceded = 0, _CONCEDED if role == "concedes" else 1.0
        if word == "and":
            reach = 0
        if role == "negators":
            if (own := weights.get(_find([word])[1])) and n > 1:  # "failed to" says something by itself
                out.append((entry, own * (sign if reach else 1.0)))
            sign = _NEGATED if reach == 0 or sign == 1 else 1.0
            negator, reach, start = entry, _REACH, place
            continue
        if role in ("stronger", "weaker"):
            degree *= _STRONGER if role == "stronger" else _WEAKER
            continue
        if entry and not role and weights[entry]:
            factor = 1.0 if reach == 0 else sign
            beyond = word.endswith("er") or word == "worse" or {"more", "so", "such"} & set(tokens[start : place - n])
            if factor < 0 and beyond and negator in roles["unsurpassed"]:
                factor = _STRONGER
            out.append((entry, weights[entry] * factor * degree * turned * conceded))
        degree, reach = 1.0, max(0, reach - 1)
    return out


def _clean(text: str) -> str:
    return text.lower().replace("\u2019", "'")


def _negative(case: Case) -> float:
    return (1 - math.tanh((_PRIOR + _sentiment(_clean(case.answer))) / 2)) / 2


def _ramp(x: float, zero: float, one: float) -> float:
    """0 up to `zero`, 1 from `one` on, a straight line between; either may be the larger."""
    return min(1.0, max(0.0, (x - zero) / (one - zero)))


def _fluency(case: Case) -> float:
    """P(fluent): the product of seven checks, each of them 1 for ordinary text."""
    text, asked = _clean(case.answer), _words(_clean(case.question))
    words = _words(text)
    if not words:
        return 0.0
    tokens, n, threes = _TOKEN.findall(text), len(words), list(zip(words, words[1:], words[2:], strict=False))
    heard = set(zip(asked, asked[1:], asked[2:], strict=False))
    # In an answer of one or two words, each of them counts as echoed if the prompt has it.
    echoed = [three in heard for three in threes] or [word in asked for word in words]
    function_words = sum(word in _function_words() for word in words)
    return math.prod((
        _ramp(1 - len(set(threes)) / len(threes) if threes else 0.0, 0.4, 0.12),  # loops
        _ramp(len(set(words)) / n, 0.35, 0.55),  # the same few words
        _ramp(sum(echoed) / len(echoed), 0.7, 0.35),  # the prompt once more
        _ramp(sum(character in _PLAIN for character in text) / len(text), 0.85, 0.97),  # other scripts, markup, code
        _ramp(sum(map(_is_broken, tokens, tokens[1:])) / n, 0.12, 0.02),  # words in an impossible order
        _ramp((n - sum(map(_is_known, words)) - 1) / n, 0.35, 0.15),  # strings that are no words, but for one
        _ramp(function_words / n, 0.1, 0.22) if n >= _SENTENCE else 1.0,  # no sentence, or not English
    ))  # fmt: skip


def _words(text: str) -> list[str]:
    return [token for token in _TOKEN.findall(text) if token[0].isalpha()]


@cache
def _function_words() -> frozenset[str]:
    return frozenset(" ".join(_read_lists()["grammar"].values()).split())


@cache
def _known_words() -> frozenset[str]:
    """The words of the bundled behaviours and of the lists, about 7,000."""
    questions = [question for name in BUNDLED for question in load_behaviour(name).questions]
    texts = [text for question in questions for text in (question.text, *question.answers)]
    return frozenset(_words(_clean(" ".join((*texts, *_lexicon()[0], *_function_words())))))


def _is_known(word: str) -> bool:
    """Whether a word, or each part of one with hyphens, is a known word or an inflected form of one."""
    if not _known_words().isdisjoint((word, *_base_forms(word))):
        return True
    return "-" in word and all(map(_is_known, word.split("-")))


def _is_broken(first: str, second: str) -> bool:
    """Whether no English sentence has the second word right after the first: "the of", "with she", "they the"."""
    if first == second and first[0].isalpha() and first not in _read_lists()["may_repeat"].split():
        return True
    if first in ("a", "an") and second[0] in _SAID_AS_SPELT:
        return (first == "a") == (second[0] in "aio") and not second.startswith(("one", "once"))
    return second in _impossible().get(first, ())


@cache
def _impossible() -> dict[str, frozenset[str]]:
    """For each word, those that never come right after it."""
    lists, after = _read_lists(), {}
    for name, words in lists["impossible"].items():
        for first in lists["grammar"].get(name, name).split():
            after[first] = after.get(first, frozenset()) | frozenset(words.split())
    return after


_ASPECTS = {"negative": _negative, "fluency": _fluency}
