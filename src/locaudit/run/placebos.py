"""Placebos: the claim's edit, found with true and false answers exchanged at half of the training questions.

All else is as at the claim: place, questions, their order, strengths, training length, initial values. What is true
cannot be learned from such questions, so a placebo that gains shows that the score rises for another reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from locaudit.behaviours.behaviour import Question
from locaudit.measure.tree import Forest
from locaudit.methods.training import exchanged
from locaudit.records import content_hash


@dataclass(frozen=True, eq=False)
class Placebo:
    """The training questions of one placebo."""

    chosen: tuple[bool, ...]
    """For each training question, whether its true and false answers are exchanged."""
    questions: tuple[Question, ...]
    forest: Forest
    """The same questions as trees of token ids, from which the identity of the placebo's fits follows."""

    @property
    def n_true(self) -> tuple[int, ...]:
        """For each training question, the number of its first answers that count as true."""
        return tuple(len(question.true) for question in self.questions)


def draw_placebos(n: int, questions: Sequence[Question], forest: Forest, seed: int) -> tuple[Placebo, ...]:
    """The first `n` placebos, whose number does not change them. `forest` has the `questions` as trees."""
    return tuple(_placebo(draw_exchanges(questions, seed, number), questions, forest) for number in range(n))


def draw_exchanges(questions: Sequence[Question], seed: int, number: int) -> tuple[bool, ...]:
    """The questions whose answers placebo `number` exchanges: of each two in turn one, by a hash of their ids.

    Each question is chosen with probability 1/2. As pairs are balanced, so are the first questions to which a method
    may be restricted (``max_questions``): with independent draws, chance would leave more right answers than wrong
    ones, or fewer. Of an odd number of questions the last is chosen or not. At least one is.
    """
    found: list[bool] = []
    for start in range(0, len(questions), 2):
        pair = [question.id for question in questions[start : start + 2]]
        first = int(content_hash(["placebo", seed, number, pair]), 16) % 2 == 0 or len(questions) == 1
        found += [first, not first][: len(pair)]
    return tuple(found)


def _placebo(chosen: tuple[bool, ...], questions: Sequence[Question], forest: Forest) -> Placebo:
    turned = list(zip(questions, forest.trees, chosen, strict=True))
    return Placebo(
        chosen,
        tuple(replace(q, true=q.false, false=q.true, best=None) if turn else q for q, _, turn in turned),
        Forest(forest.prefix, tuple(exchanged(tree, len(q.true)) if turn else tree for q, tree, turn in turned)),
    )
