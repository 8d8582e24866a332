"""From a question's answers to what the fitted parts read: dense features and standardised states."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from locaudit.judges.base import Case
from locaudit.judges.reference.alignment import alignment_features
from locaudit.judges.reference.lexical import lexical_features
from locaudit.judges.reference.reader import MAX_REFERENCES, Reader

NETWORK_LAYERS = 2
"""The network reads the last so many of the layers."""
SKIPPED = 4
"""First tokens of a prompt, whose states are outliers; they are left out."""
_CLAMP = 8.0


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of the states of prompts, by layer and coordinate."""

    center: Float[Tensor, "layers 1 d"]
    scale: Float[Tensor, "layers 1 d"]

    def standardised(self, states: Float[Tensor, "layers tokens d"]) -> Float[Tensor, "layers tokens d"]:
        """States with mean 0 and deviation 1."""
        return (states - self.center) / self.scale


@dataclass(frozen=True)
class Read:
    """A question's answers after the language model."""

    raw: Float[np.ndarray, "answers features"]
    """Lexical features, then alignment features."""
    prompt: Float[Tensor, "prompt_tokens d"]
    """Standardised states."""
    answers: tuple[Float[Tensor, "tokens d"], ...]
    """Standardised states of each answer, the line break behind it last."""
    sees: Bool[Tensor, "answers 2 prompt_tokens"]
    """Tokens of true and of false references that an answer is compared with."""


def read_question(
    reader: Reader, moments: Moments, case: Case, answers: Sequence[str], hidden: Set[int] = frozenset()
) -> Read:
    """Features of the answers to the case's question; the references whose numbers are `hidden` do not count."""
    prompt = reader.prompt(case)
    unit = normalize(moments.standardised(prompt.states), dim=2)
    true, false = case.true[:MAX_REFERENCES], case.false[:MAX_REFERENCES]
    kept = (
        tuple(reference for i, reference in enumerate(true) if i not in hidden),
        tuple(reference for i, reference in enumerate(false, len(true)) if i not in hidden),
    )
    raw, states = [], []
    for answer, found in zip(answers, reader.read(case, answers, hidden), strict=True):
        body = normalize(moments.standardised(found[:, : max(found.shape[1] - 1, 1)]), dim=2)
        aligned = alignment_features(body, prompt, unit, hidden)
        raw.append(np.concatenate([lexical_features(case.question, answer, *kept), aligned.numpy()]))
        states.append(_flat(found, moments))
    segment = prompt.segment[SKIPPED:]
    visible = ~torch.isin(segment, torch.tensor(sorted(hidden), dtype=segment.dtype)) & (segment >= 0)
    sides = torch.stack([visible & (segment < prompt.n_true), visible & (segment >= prompt.n_true)])
    sees = sides.expand(len(answers), -1, -1)
    return Read(np.stack(raw), _flat(prompt.states[:, SKIPPED:], moments), tuple(states), sees)


def _flat(states: Float[Tensor, "layers tokens d"], moments: Moments) -> Float[Tensor, "tokens d2"]:
    scaled = moments.standardised(states)[-NETWORK_LAYERS:].clamp(-_CLAMP, _CLAMP)
    # Half precision halves the memory of a fit; the judge rounds alike.
    return scaled.transpose(0, 1).flatten(1).half()
