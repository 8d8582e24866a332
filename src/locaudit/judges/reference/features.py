"""From a question's answers to what the fitted parts read: dense features and standardised states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from locaudit.behaviours.behaviour import normalise
from locaudit.judges.base import Case
from locaudit.judges.reference.alignment import alignment_features, unit_states
from locaudit.judges.reference.lexical import lexical_features
from locaudit.judges.reference.network import Group
from locaudit.judges.reference.reader import MAX_REFERENCES, Prompt

LAYERS = (8, 12, 16)
"""Layers whose states are aligned, counted from 1."""
NETWORK_LAYERS = 2
"""The network reads the last so many of them."""
SKIPPED = 4
"""First tokens of a prompt, whose states are outliers; they are left out."""
_CLAMP = 8.0
_DENSE_CLAMP = 5.0


class Reading(Protocol):
    """What a `Reader` does."""

    def prompt(self, case: Case) -> Prompt:
        """States of the case's question and references."""
        ...

    def read(
        self, case: Case, answers: Sequence[str], hidden: Sequence[frozenset[int]]
    ) -> Iterator[Float[Tensor, "layers tokens d"]]:
        """States of each answer."""
        ...


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of the states of prompts, by layer and coordinate."""

    center: Float[Tensor, "layers 1 d"]
    scale: Float[Tensor, "layers 1 d"]


@dataclass(frozen=True)
class Read:
    """A question's answers after the language model."""

    raw: Float[np.ndarray, "answers features"]
    """Lexical features, then alignment features."""
    prompt: Float[Tensor, "prompt_tokens d"]
    answers: tuple[Float[Tensor, "tokens d"], ...]
    sees: Tensor

    def group(self, mean: Float[Tensor, " features"], deviation: Float[Tensor, " features"]) -> Group:
        """What the network reads."""
        dense = ((torch.from_numpy(self.raw).float() - mean) / deviation).clamp(-_DENSE_CLAMP, _DENSE_CLAMP)
        return Group(self.prompt, self.answers, self.sees, dense)


def find_moments(reader: Reading, cases: Sequence[Case]) -> Moments:
    """Moments over the prompts of the cases."""
    states = torch.cat([reader.prompt(case).states[:, SKIPPED:] for case in cases], dim=1)
    return Moments(states.mean(1, keepdim=True), states.std(1, keepdim=True) + 1e-3)


def read_question(
    reader: Reading, moments: Moments, case: Case, answers: Sequence[str], hidden: Sequence[bool] | None = None
) -> Read:
    """Features of the answers to the case's question.

    Where ``hidden[i]``, the references that answer i equals are hidden from it, so that it reads like an answer that
    is no reference.
    """
    prompt = reader.prompt(case)
    unit = unit_states(prompt.states, moments.center, moments.scale)
    sides = (case.true[:MAX_REFERENCES], case.false[:MAX_REFERENCES])
    names = [normalise(reference) for side in sides for reference in side]
    lost = [
        frozenset(i for i, name in enumerate(names) if hide and name == normalise(answer))
        for answer, hide in zip(answers, hidden or [False] * len(answers), strict=True)
    ]
    raw, states, sees = [], [], []
    segment = prompt.segment[SKIPPED:]
    for answer, numbers, found in zip(answers, lost, reader.read(case, answers, lost), strict=True):
        body = found[:, : max(found.shape[1] - 1, 1)]
        kept = [tuple(r for i, r in enumerate(side, start) if i not in numbers) for side, start in _starts(sides)]
        aligned = alignment_features(body, prompt, unit, moments.center, moments.scale, numbers)
        raw.append(np.concatenate([lexical_features(case.question, answer, *kept), aligned.numpy()]))
        states.append(_flat(found, moments))
        visible = ~torch.isin(segment, torch.tensor(sorted(numbers), dtype=segment.dtype)) & (segment >= 0)
        sees.append(torch.stack([visible & (segment < prompt.n_true), visible & (segment >= prompt.n_true)]))
    return Read(np.stack(raw), _flat(prompt.states[:, SKIPPED:], moments), tuple(states), torch.stack(sees))


def _starts(sides: tuple[tuple[str, ...], tuple[str, ...]]):
    return zip(sides, (0, len(sides[0])), strict=True)


def _flat(states: Float[Tensor, "layers tokens d"], moments: Moments) -> Float[Tensor, "tokens d2"]:
    last = slice(-NETWORK_LAYERS, None)
    scaled = ((states[last] - moments.center[last]) / moments.scale[last]).clamp(-_CLAMP, _CLAMP)
    # Half precision halves the memory of a fit; the judge rounds alike.
    return scaled.transpose(0, 1).flatten(1).half()
