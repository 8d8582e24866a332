r"""The judge of kind ``likelihood``: whether an answer is fluent English, as an unedited language model reads it.

    P(fluent) = 1 / (1 + exp(-(b + sum_j w_j x_j)))

The features x are `FEATURES`: how improbable the answer's tokens are after the prompt, and how much the answer repeats
itself. The weights are in ``likelihood.json``. They come from a logistic regression on texts labelled by readers
(tools/judge/fluency.py). An answer without words, or of three or more that only repeats words of the prompt in their
order, has P = 0. English only.
"""

from __future__ import annotations

import json
import re
from collections import Counter
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
from locaudit.judges.reference.judge import LANGUAGE_MODEL, installed_language_model
from locaudit.judges.settings import LikelihoodSettings
from locaudit.measure.forward import forest_batches, token_log_probs
from locaudit.measure.tree import Forest, Tree
from locaudit.models import Model, load_model
from locaudit.records import content_hash

VERSION = 1
"""Raise it when a change of the code changes judgements; it is part of the judge's fingerprint."""
FEATURES = ("odd", "stretch", "thrice", "variety", "pieces")
"""What is read of an answer, of its first `MAX_ANSWER` tokens and words:

odd: number of tokens with a log-probability under `ODD`.
stretch: lowest mean log-probability (nats) of four tokens in a row, or of all of a shorter answer.
thrice: share of the pairs of neighbouring words that occur three times or more.
variety: share of the words that are different from all before them.
pieces: mean number of tokens a word, of all tokens and words that are read.
"""
ODD = -7.0
MAX_PROMPT, MAX_ANSWER = 128, 64
"""Tokens that are read: the last ones of the prompt, the first ones of the answer."""
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")


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
        said = [not _is_empty(case) for case in cases]
        return [Judgement(float(p) if s else 0.0) for p, s in zip((1 + np.tanh(logits / 2)) / 2, said, strict=True)]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _is_empty(case: Case) -> bool:
    """Whether an answer has no words, or three or more that only repeat the prompt."""
    words = _words(case.answer)
    return not words or (len(words) >= 3 and f" {' '.join(words)} " in f" {' '.join(_words(case.question))} ")


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
    said = {i: case for i, case in enumerate(cases) if _words(case.answer)}
    logs = token_logs(model, [(case.question, case.answer) for case in said.values()])
    out = np.zeros((len(cases), len(FEATURES)))
    for (i, case), log in zip(said.items(), logs, strict=True):
        words = _words(case.answer)[:MAX_ANSWER]
        pairs = Counter(zip(words, words[1:], strict=False))
        out[i] = [
            (log < ODD).sum().item(),
            log.unfold(0, min(4, len(log)), 1).mean(1).min().item(),
            sum(n for n in pairs.values() if n >= 3) / max(1, pairs.total()),
            len(set(words)) / len(words),
            len(log) / len(words),
        ]
    return out


def load(wanted: Mapping[str, LikelihoodSettings], device: str) -> dict[str, LikelihoodJudge]:
    """The judge of ``fluency``. Raises `ConfigError` for another aspect, `ModelError` without the language model."""
    check_aspects("likelihood", wanted, "fluency")
    find_checkpoint(LANGUAGE_MODEL)
    return {aspect: load_likelihood_judge(device) for aspect in wanted}


def load_likelihood_judge(device: str = "auto", model: Model | None = None) -> LikelihoodJudge:
    """The bundled judge. `model` replaces its language model, for which it was fitted."""
    text = resources.files("locaudit.judges").joinpath("likelihood.json").read_text(encoding="utf-8")
    return LikelihoodJudge(json.loads(text), device, model)
