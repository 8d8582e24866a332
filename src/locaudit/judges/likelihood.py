r"""The judge of kind ``likelihood``: whether an answer is fluent English, as an unedited language model reads it.

    P(fluent) = 1 / (1 + exp(-(b + sum_j w_j x_j)))

The features x are listed in `FEATURES`: how probable the answer's tokens are after the prompt, and how much the answer
repeats itself or the prompt. The weights are in ``likelihood.json``. They come from a logistic regression on texts
labelled by readers (tools/judge/fluency.py). An answer without letters has P = 0. English only.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from locaudit.checkpoints import find_checkpoint
from locaudit.judges.base import Case, Judgement, check_aspects
from locaudit.judges.lexicon import find_words
from locaudit.judges.reference.judge import LANGUAGE_MODEL, installed_language_model
from locaudit.judges.settings import LikelihoodSettings
from locaudit.measure.forward import forest_batches, token_log_probs
from locaudit.measure.tree import Forest, Tree
from locaudit.models import Model, load_model
from locaudit.records import content_hash

VERSION = 1
"""Raise it when a change of the code changes judgements; it is part of the judge's fingerprint."""
FEATURES = ("mean", "low", "alone", "sure", "loops", "variety", "echo", "plain", "length")
MAX_PROMPT, MAX_ANSWER = 128, 64
"""Tokens that are read: the last ones of the prompt, the first ones of the answer."""


_PLAIN = frozenset(string.ascii_lowercase + string.digits + " \n.,;:!?'\"()-$%&\u2019\u2013\u2014\u201c\u201d\u2026")
"""Characters of plain English text in lower case, with dashes, quotes and an ellipsis."""


@dataclass(frozen=True, eq=False)
class LikelihoodJudge:
    """A judge of fluency that reads answers with an unedited language model, loaded at the first score."""

    weights: Mapping[str, float]
    """Weight of each feature, and ``bias``."""
    device: str = "auto"
    model: Model | None = None
    """The language model; None for `LANGUAGE_MODEL`."""
    name: str = "likelihood (fluency)"
    uses_references: bool = False

    @property
    def fingerprint(self) -> str:
        """Hash of the weights, the language model and the version of the code."""
        lm = self.model.fingerprint if self.model else installed_language_model()
        return content_hash(["likelihood", VERSION, dict(self.weights), lm])

    @cached_property
    def reader(self) -> Model:
        """The language model; in float32, so that scores do not depend on the machine."""
        return self.model or load_model(LANGUAGE_MODEL, device=self.device)

    def score(self, cases: Sequence[Case]) -> list[Judgement]:
        """P(fluent) of each case; none is ever missing. Batching changes it by rounding only."""
        weights = np.array([self.weights[name] for name in FEATURES])
        logits = read_features(self.reader, cases) @ weights + self.weights["bias"]
        said = [bool(find_words(case.answer)) for case in cases]
        return [Judgement(float(p) if s else 0.0) for p, s in zip((1 + np.tanh(logits / 2)) / 2, said, strict=True)]


@torch.no_grad()
def token_logs(model: Model, texts: Sequence[tuple[str, str]]) -> list[Float[Tensor, " tokens"]]:
    """Log-probability (nats) of each token of each answer, given (prompt, answer); an answer follows after a space."""
    answers: dict[str, dict[str, None]] = {}
    for prompt, answer in texts:
        answers.setdefault(prompt, {})[answer] = None
    tokenizer: Any = model.tokenizer
    start = tuple(id_ for id_ in (tokenizer.bos_token_id, tokenizer.eos_token_id) if id_ is not None)[:1]

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    trees = [
        Tree(start + encode(prompt)[-MAX_PROMPT:], tuple(encode(f" {answer}")[:MAX_ANSWER] for answer in said))
        for prompt, said in answers.items()
    ]
    keys = [[(prompt, answer) for answer in said] for prompt, said in answers.items()]
    found: dict[tuple[str, str], Tensor] = {}
    for rows, batch in forest_batches(model, Forest((), tuple(trees))):
        values = token_log_probs(model, batch, None, batch.input_ids.new_zeros(len(batch.input_ids))).cpu()
        pieces = values[batch.path[1].cpu()].split(batch.lengths.tolist())
        found |= zip([key for row in rows for i in row for key in keys[i]], pieces, strict=True)
    return [found[text] for text in texts]


def read_features(model: Model, cases: Sequence[Case]) -> Float[np.ndarray, "cases features"]:
    """The values of `FEATURES` for each case; zeros for an answer without words."""
    said = {i: case for i, case in enumerate(cases) if find_words(case.answer)}
    after = token_logs(model, [(case.question, case.answer) for case in said.values()])
    alone = token_logs(model, [("", case.answer) for case in said.values()])
    out = np.zeros((len(cases), len(FEATURES)))
    for (i, case), *logs in zip(said.items(), after, alone, strict=True):
        out[i] = _features(case, *logs)
    return out


def _features(case: Case, after: Tensor, alone: Tensor) -> list[float]:
    words, asked = find_words(case.answer), find_words(case.question)
    threes = list(zip(words, words[1:], words[2:], strict=False))
    heard = set(zip(asked, asked[1:], asked[2:], strict=False))
    echoed = [three in heard for three in threes] or [word in asked for word in words]
    n = len(after)
    return [
        after.mean().item(),
        after.sort().values[: -(-n // 4)].mean().item(),
        alone.mean().item(),
        (after > -0.1).float().mean().item(),
        1 - len(set(threes)) / len(threes) if threes else 0.0,
        len(set(words)) / len(words),
        sum(echoed) / len(echoed),
        sum(c in _PLAIN for c in case.answer.lower()) / len(case.answer),
        math.log(n),
    ]


def load(wanted: Mapping[str, LikelihoodSettings], device: str) -> dict[str, LikelihoodJudge]:
    """The judge of ``fluency``. Raises `ConfigError` for another aspect, `ModelError` without the language model."""
    check_aspects("likelihood", wanted, "fluency")
    find_checkpoint(LANGUAGE_MODEL)
    return {aspect: load_likelihood_judge(device) for aspect in wanted}


def load_likelihood_judge(device: str = "auto", model: Model | None = None) -> LikelihoodJudge:
    """The bundled judge. `model` replaces its language model, for which it was fitted."""
    text = resources.files("locaudit.judges").joinpath("likelihood.json").read_text(encoding="utf-8")
    return LikelihoodJudge(json.loads(text), device, model)
