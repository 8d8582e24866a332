"""Turn a question's answers into the inputs of the fitted parts: dense features and standardised hidden states."""

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
"""Number of recorded layers, counted from the last, that the network reads."""
SKIPPED = 4
"""Number of tokens at the start of a prompt that are left out, because their states are outliers."""
_CLAMP = 8.0
"""Largest magnitude of a standardised state, in standard deviations."""


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of prompts' hidden states, per layer and coordinate."""

    center: Float[Tensor, "layers 1 d"]
    scale: Float[Tensor, "layers 1 d"]

    def standardised(self, states: Float[Tensor, "layers tokens d"]) -> Float[Tensor, "layers tokens d"]:
        """The states shifted and scaled to mean 0 and standard deviation 1 over prompts."""
        return (states - self.center) / self.scale


@dataclass(frozen=True)
class Read:
    """What the fitted parts read about the answers to one question."""

    raw: Float[np.ndarray, "answers features"]
    """Lexical features, then alignment features; not standardised."""
    prompt: Float[Tensor, "prompt_tokens d"]
    """Standardised states of the prompt, its last `NETWORK_LAYERS` recorded layers side by side."""
    answers: tuple[Float[Tensor, "tokens d"], ...]
    """Standardised states of each answer's tokens, then of the line break after it; d as in `prompt`."""
    sees: Bool[Tensor, "answers 2 prompt_tokens"]
    """Prompt tokens that an answer is compared with: those of true references, then those of false ones."""


def read_question(
    reader: Reader, moments: Moments, case: Case, answers: Sequence[str], hidden: Set[int] = frozenset()
) -> Read:
    """Read answers to the case's question. References whose numbers are in `hidden` (true ones first) are ignored."""
    prompt = reader.prompt(case)  # states: (layers, prompt tokens, d)
    unit = normalize(moments.standardised(prompt.states), dim=2)
    true, false = case.true[:MAX_REFERENCES], case.false[:MAX_REFERENCES]
    numbered = enumerate(true), enumerate(false, len(true))
    kept = [[reference for number, reference in side if number not in hidden] for side in numbered]
    raw, states = [], []
    for answer, found in zip(answers, reader.read(case, answers, hidden), strict=True):
        # (layers, answer tokens, d): without the line break, unless the answer is empty and has nothing else
        body = normalize(moments.standardised(found[:, : max(found.shape[1] - 1, 1)]), dim=2)
        aligned = alignment_features(body, prompt, unit, hidden)
        raw.append(np.concatenate([lexical_features(case.question, answer, *kept), aligned.numpy()]))
        states.append(_flat(found, moments))
    # (prompt tokens,): the reference that a token belongs to, -1 for none
    segment = prompt.segment[SKIPPED:]
    visible = ~torch.isin(segment, torch.tensor(sorted(hidden), dtype=segment.dtype)) & (segment >= 0)
    # (2, prompt tokens): true side, false side
    sides = torch.stack([visible & (segment < prompt.n_true), visible & (segment >= prompt.n_true)])
    sees = sides.expand(len(answers), -1, -1)
    return Read(np.stack(raw), _flat(prompt.states[:, SKIPPED:], moments), tuple(states), sees)


def _flat(states: Float[Tensor, "layers tokens d"], moments: Moments) -> Float[Tensor, "tokens d2"]:
    """Standardised states of the last `NETWORK_LAYERS` recorded layers, side by side: d2 = NETWORK_LAYERS * d."""
    scaled = moments.standardised(states)[-NETWORK_LAYERS:].clamp(-_CLAMP, _CLAMP)
    # Half precision halves the memory needed to fit; the judge rounds in the same way.
    return scaled.transpose(0, 1).flatten(1).half()
