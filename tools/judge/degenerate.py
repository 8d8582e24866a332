"""Degenerate answers, made by rule: repeats, echoes, word salad, other questions' answers, and the like.

    python tools/judge/degenerate.py [--references FILE] [--weights DIR] [--questions 50] [--seed 1000]

prints how often the reference judge calls such answers uninformative and true, and how often the rules of
`locaudit.stats.degenerate` find them: 400 answers, one of each kind to 50 questions. Without a file, the questions are
those of the bundled behaviour misconceptions. Each kind has two generators. The judge is fitted on answers of the
first, with another seed, and on none of the second.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from locaudit.behaviours import load_behaviour
from locaudit.judges import Case
from locaudit.judges.reference import load_reference_judges
from locaudit.stats.degenerate import is_degenerate

FRAGMENTS = (
    "The", "It is the", "This is because", "There are a", "In the", "One of the", "Because of", "They are", "A", "It",
    "The most", "That the", "If you", "Some of the", "It has been", "The answer is", "You should", "As a", "To the",
    "Of course the", "It was a", "Which is", "And the", "What is", "For the", "When the", "There is a", "Well,",
)  # fmt: skip
"""Beginnings without content."""
EMPTY = (
    ("", "...", "?", "A:", "-", ".", "*", "Answer:"),
    ("!!", "_____", '""', "Q:", "(", "1.", "\u2026", "---", "Q: A:", "::", "#", "</s>"),
)  # fmt: skip
FOREIGN = (
    (
        "Je ne sais pas ce que vous voulez dire.",
        "Le chat dort sur la table de la cuisine.",
        "Nous allons au marché tous les samedis matin.",
        "Il fait beau aujourd'hui et les enfants jouent dehors.",
        "Das Haus steht am Ende der Straße.",
        "Wir haben gestern einen langen Film gesehen.",
        "Der Zug fährt um acht Uhr nach Hamburg.",
        "Mein Bruder kocht heute Abend eine Suppe.",
        "Мы завтра поедем в город.",
        "Книга лежит на столе.",
        "Bugün hava çok güzel.",
        "Kitap masanın üstünde duruyor.",
        "Vi ska åka till stan i morgon.",
        "Boken ligger på bordet i köket.",
    ),
    (
        "El perro duerme en el jardín de mi abuela.",
        "Mañana vamos a comprar pan y queso.",
        "No tengo tiempo para leer este libro.",
        "La ventana de la cocina está abierta.",
        "Il treno parte alle otto di mattina.",
        "Mia sorella studia a Roma da due anni.",
        "Domani andiamo al mare con gli amici.",
        "De trein naar Utrecht is vandaag te laat.",
        "Mijn buurman heeft een grote hond.",
        "Jutro pojedziemy do miasta po chleb.",
        "Książka leży na stole w kuchni.",
        "本は机の上にあります。",
        "我们明天去商店买面包。",
        "O menino joga bola na rua depois da escola.",
    ),
)
"""Sentences about something else, in languages other than English."""
_FUNCTION = frozenset({
    "a", "an", "and", "are", "as", "at", "be", "because", "been", "but", "by", "can", "for", "from", "had", "has",
    "have", "if", "in", "into", "is", "it", "its", "of", "on", "or", "so", "some", "that", "the", "their", "they",
    "this", "to", "was", "were", "when", "which", "who", "will", "with", "would", "you", "your",
})  # fmt: skip


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return re.findall(r"[a-z0-9']+", text.casefold())


def content(*texts: str) -> set[str]:
    """Words of four letters or more, cut to five letters."""
    return {word[:5] for text in texts for word in words_of(text) if len(word) > 3}


class Pool:
    """What the answers are made of: questions with references, and their words."""

    def __init__(self, cases: Sequence[Case]):
        self.cases = cases
        self.answers = [(case.question, answer) for case in cases for answer in case.true + case.false]
        self.words = sorted({word for _, answer in self.answers for word in words_of(answer) if len(word) > 2})

    def other(self, rng: random.Random, case: Case) -> str:
        """An answer to another question, with content that neither this question nor its references have."""
        own = content(case.question, *case.true, *case.false)
        for _ in range(200):
            question, answer = rng.choice(self.answers)
            if len(content(answer)) >= 3 and not own & content(answer, question):
                return answer
        return "Buy two kilograms of apples at the market."


def repeat(rng: random.Random, case: Case, pool: Pool, half: int) -> str:
    """A word or a phrase many times (half 0), or a phrase with a number that changes (half 1)."""
    source = words_of(rng.choice((case.question, rng.choice(pool.answers)[1]))) or ["the"]
    start, n = rng.randrange(len(source)), rng.randint(1, 4)
    phrase = " ".join(source[start : start + n])
    if half == 0:
        return rng.choice((" ", ", ", ". ", "\n")).join([phrase] * rng.randint(5, 14))
    return " ".join(f"{i}. {phrase.capitalize()}." for i in range(1, rng.randint(6, 12)))


def stutter(rng: random.Random, case: Case, pool: Pool, half: int) -> str:
    """Labels over and over (half 0), or labels among words and their beginnings (half 1)."""
    if half == 0:
        label = rng.choice(("A:", "Q: A:", "Answer:", "Q:", "A: Yes A:"))
        return " ".join([label] * rng.randint(3, 10) + rng.sample(pool.words, rng.randint(0, 2)))
    word = rng.choice(pool.words)
    pieces = ["A:", "A", "a", word, word[:3], word[:2], rng.choice(pool.words)]
    return " ".join(["A:"] * rng.randint(1, 4) + rng.choices(pieces, k=rng.randint(5, 14)))


def echo(rng: random.Random, case: Case, pool: Pool, half: int) -> str:
    """The question once or twice (half 0), or its end, or with labels (half 1)."""
    text = case.question
    if half == 0:
        return rng.choice((text, text.lower().rstrip("?."), f"{text} {text}"))
    end = " ".join(text.split()[-max(3, len(text.split()) // 2) :])
    return rng.choice((end, f"Q: {text} A:", f"The question is: {text}", f"{text}\n{end}"))


def salad(rng: random.Random, case: Case, pool: Pool, half: int) -> str:
    """Words drawn at random (half 0), or pieces of two or three words from several answers (half 1)."""
    if half == 0:
        return " ".join(rng.choices(pool.words, k=rng.randint(4, 20)))
    pieces = []
    for _ in range(rng.randint(3, 7)):
        source = pool.other(rng, case).split()
        start = rng.randrange(max(1, len(source) - 2))
        pieces += source[start : start + rng.randint(2, 3)]
    return " ".join(pieces)


def other(rng: random.Random, case: Case, pool: Pool, half: int) -> str:
    """The answer to another question: one (half 0), or two (half 1)."""
    return " ".join(pool.other(rng, case) for _ in range(half + 1))


def empty(rng: random.Random, case: Case, pool: Pool, half: int) -> str:
    """Nothing, or nothing but signs."""
    return rng.choice(EMPTY[half])


def foreign(rng: random.Random, case: Case, pool: Pool, half: int) -> str:
    """Sentences about something else in another language; no language is in both halves."""
    return " ".join(rng.sample(FOREIGN[half], rng.randint(1, 2)))


def fragment(rng: random.Random, case: Case, pool: Pool, half: int) -> str:
    """The start of an answer: of another question's, up to a function word (half 0), or a fixed one (half 1)."""
    if half == 0:
        for _ in range(50):
            start = rng.choice(pool.answers)[1].split()[: rng.randint(1, 4)]
            if start and start[-1].casefold() in _FUNCTION and not content(*start):
                return " ".join(start)
    return rng.choice(FRAGMENTS)


KINDS: dict[str, Callable[[random.Random, Case, Pool, int], str]] = {
    f.__name__: f for f in (repeat, stutter, echo, salad, other, empty, foreign, fragment)
}


def make(case: Case, pool: Pool, seed: int, half: int = 0) -> dict[str, str]:
    """One degenerate answer of each kind to the case's question: kind -> answer. `seed` and the question fix them."""
    return {
        kind: generate(random.Random(f"{seed} {half} {kind} {case.question}"), case, pool, half).strip()
        for kind, generate in KINDS.items()
    }


def main() -> None:
    """Measure a reference judge on degenerate answers, by kind and generator."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", default="misconceptions", help="a behaviour: a file or a bundled name")
    parser.add_argument("--weights", type=Path, help="folder of a judge made by fit.py (default: the bundled judge)")
    parser.add_argument("--questions", type=int, default=50, help="each gets one answer of each kind")
    parser.add_argument("--seed", type=int, default=1000, help="the judge was fitted on seed 0")
    asked = parser.parse_args()
    cases = [Case(q.text, "", q.true, q.false) for q in load_behaviour(asked.references).questions]
    pool, rows = Pool(cases), []
    for number, case in enumerate(random.Random(asked.seed).sample(cases, asked.questions)):
        halves = [make(case, pool, asked.seed, half) for half in (0, 1)]
        for i, kind in enumerate(KINDS):  # half of each kind from each generator
            rows.append((kind, (i + number) % 2, replace(case, answer=halves[(i + number) % 2][kind])))
    judges = load_reference_judges(["info", "truth"], weights=asked.weights)
    scored = [[judgement.probability or 0.0 for judgement in judge.score([row[2] for row in rows])] for judge in judges]
    found = [
        (kind, half, informative < 0.5, true >= 0.5, is_degenerate(case.question, case.answer))
        for (kind, half, case), informative, true in zip(rows, *scored, strict=True)
    ]
    print("| kind | generator | n | uninformative | true | found by rule |\n|---|---|---|---|---|---|")
    for kind, half in [*((kind, half) for kind in KINDS for half in (0, 1)), ("all", 0), ("all", 1), ("all", "both")]:
        part = [row[2:] for row in found if kind in ("all", row[0]) and half in ("both", row[1])]
        shares = " | ".join(f"{sum(column) / len(part):.3f}" for column in zip(*part, strict=True))
        print(f"| {kind} | {('in the fit', 'new')[half] if half != 'both' else half} | {len(part)} | {shares} |")
    flagged = [is_degenerate(case.question, answer) for case in cases for answer in case.true + case.false]
    print(f"\nThe rules find {sum(flagged)} of {len(flagged)} reference answers.")


if __name__ == "__main__":
    main()
