"""Models, questions and locations that the benchmarks run on; the same for both sides.

This is the only file here that imports from deep inside locaudit. The other benchmarks import those names from it.
"""

# ruff: noqa: F401

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerBase

from locaudit.behaviours import Question, load_behaviour, split_questions
from locaudit.behaviours.format import Prompt, load_primer
from locaudit.behaviours.splits import shuffled
from locaudit.claims import find_kind
from locaudit.claims.directions import name_vector
from locaudit.claims.kinds import BUILT_IN
from locaudit.edits import Edit, SiteEdit, stack, zero_edit
from locaudit.errors import DataError, ModelError
from locaudit.judges import Case
from locaudit.judges.labelled import is_held_out
from locaudit.judges.openai import load_openai_judge
from locaudit.judges.reference import load_reference_judges
from locaudit.judges.settings import OpenAISettings, Style
from locaudit.location import Location, Site
from locaudit.measure.activations import collect_activations
from locaudit.measure.answers import answer_prompts
from locaudit.measure.drift import DriftText, cut_documents, measure_drift, sample_documents
from locaudit.measure.forward import answer_log_probs
from locaudit.measure.generation import answer_text, generate_answers
from locaudit.measure.multiple_choice import METRICS, score_questions
from locaudit.measure.residual import Residuals
from locaudit.measure.tree import Forest, plant
from locaudit.methods import Fit, Job, optimal
from locaudit.methods.horizon import mean_loss
from locaudit.methods.iti import iti_edit, iti_theta
from locaudit.methods.objectives import default_learning_rate
from locaudit.methods.parameters import TrainableEdit
from locaudit.methods.probes import fit_probes
from locaudit.methods.settings import OptimalSettings
from locaudit.methods.training import TrainingData
from locaudit.models import Model, load_model, output_weight, wrap_model
from locaudit.models.load import DTYPES, resolve_device
from locaudit.records import mean_metrics
from locaudit.registry import ASPECTS
from locaudit.stats import JUDGED, judged_metrics, mean_score, score_values
from locaudit.stats.optimisation import MOST_RISE
from locaudit.store.cache import cache_folder, open_cache
from locaudit.store.run import load_run

TAU = 0.2
"""IPO's tau in all training, unless a flag sets another one."""

SHAPES = {
    # hidden, MLP, layers, heads, key-value heads
    "random-9m": (192, 512, 10, 3, 1),
    "random-30m": (384, 1024, 14, 6, 2),
    "random-135m": (576, 1536, 30, 9, 3),
    "random-1b": (2048, 5632, 22, 32, 4),
    "random-7b": (4096, 11008, 32, 32, 32),
}
"""Llamas with random weights, named by rough size without embeddings; vocabulary and tokenizer are SmolLM2's."""

TRAINING, PRIMED = Prompt(), Prompt(primer=load_primer("truthful"))


@dataclass(frozen=True)
class Subject:
    """A model and its questions."""

    model: str = "smollm2-135m"
    """Name, folder or hub id; or random-9m, -30m, -135m, -1b, -7b: a Llama of about that size with random weights."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    device: str = "cpu"
    data: str = "misconceptions"
    """Name or file of a behaviour."""

    def check(self) -> None:
        """Raise `LocauditError` for unusable data, device or random model size, without loading a model."""
        resolve_device(self.device)
        load_behaviour(self.data)
        if self.model.startswith("random-") and self.model not in SHAPES:
            raise ModelError(
                got=f"the model {self.model!r}", expected=f"one of {', '.join(SHAPES)}", remedy="choose another --model"
            )


def load(subject: Subject) -> Model:
    """Load the model on its device."""
    if subject.model not in SHAPES:
        return load_model(subject.model, dtype=subject.dtype, device=subject.device)
    hidden, mlp, layers, heads, kv = SHAPES[subject.model]
    tokenizer: Any = _tokenizer()
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        max_position_embeddings=4096,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    with resolve_device(subject.device):
        lm = AutoModelForCausalLM.from_config(config, dtype=DTYPES.get(subject.dtype, torch.float32))
    return wrap_model(lm, tokenizer, subject.model)


def _tokenizer() -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer, saved in the user's cache because reading it from GGUF is slower than a small benchmark."""
    base = cache_folder() or Path(tempfile.gettempdir())
    kept = base / "bench-tokenizer"
    if not kept.exists():
        base.mkdir(parents=True, exist_ok=True)
        fresh = tempfile.mkdtemp(dir=base)
        load_model("smollm2-135m").tokenizer.save_pretrained(fresh)
        with suppress(OSError):  # another process has saved it in the meantime
            os.rename(fresh, kept)
    return AutoTokenizer.from_pretrained(kept)


def questions(subject: Subject, n: int) -> tuple[Question, ...]:
    """The first `n` training questions of the default split; validation and test questions are never used."""
    found = split_questions(load_behaviour(subject.data)).train
    if len(found) < n:
        raise DataError(
            got=f"{n} questions to measure on",
            expected=f"at most {len(found)}, the training questions of {subject.data}",
            remedy="ask for fewer questions",
        )
    return found[:n]


def heads(model: Model) -> list[tuple[int, int]]:
    """(layer, head) of every head."""
    return [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]


def location(model: Model, where: str) -> Location:
    """All heads, or (``middle``) the first head of the middle layer."""
    return Location.whole() if where == "all" else Location(((model.n_layers // 2, 0),))


def random_units(model: Model, kind: str, size: int, seed: int) -> Location:
    """`size` random units of a kind."""
    every = BUILT_IN[kind].units(model.shape)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:size].tolist()
    return Location(tuple(every[i] for i in order), kind)


def random_directions(model: Model, asked: Sequence[Question], size: int, seed: int) -> Location:
    """`size` random directions in a random layer's residual stream, with the covariance of its activations."""
    rng = np.random.default_rng(seed)
    layer = int(rng.integers(model.n_layers))
    read = collect_activations(model, asked, kind="residual").values[:, layer, 0].numpy()
    drawn = rng.standard_normal((size, len(read))) @ (read - read.mean(axis=0))
    return Location(tuple(name_vector(layer, f"random-{i}", row) for i, row in enumerate(drawn)), "direction")


def grow(model: Model, asked: Sequence[Question], prompt: Prompt = TRAINING, *, answers: bool = True) -> Forest:
    """One answer tree per question, with its answers or with the prompt only."""
    return plant(model.tokenizer, prompt, [(q.text, q.answers if answers else ()) for q in asked])


def log_probs(
    model: Model, forest: Forest, edits: Sequence[Edit] | None = None, residuals: Residuals | None = None
) -> list[list[Tensor]]:
    """Summed log-probabilities (nats) of each question's answers, [edit][question] -> (answers,).

    All edits run in one bank. If `edits` is None, the only entry is that of the unedited model.
    """
    bank = None if edits is None else stack(model, edits)
    sums = answer_log_probs(model, forest, bank, residuals=residuals)  # per question: (edits, answers)
    return [[of_question[k] for of_question in sums] for k in range(len(edits or [None]))]


def training_data(model: Model, asked: Sequence[Question]) -> TrainingData:
    """Answer trees of the questions, and the unedited model's log-probabilities."""
    forest = grow(model, asked)
    return TrainingData(forest, tuple(len(q.true) for q in asked), tuple(log_probs(model, forest)[0]))


def train(
    model: Model, data: TrainingData, jobs: Sequence[Job], residuals: Residuals | None = None, **settings: Any
) -> list[Fit]:
    """Train one edit per job, all in one bank; `settings` are fields of `OptimalSettings`."""
    shared = SimpleNamespace(model=model, training=data, residuals={"train": residuals}, row_tokens=None)
    return optimal.fit(shared, jobs, OptimalSettings(**{"epochs": 2, **settings}))


def means(scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Metric -> mean over questions."""
    return mean_metrics({"": scores})[""]


def read_ahead(model: Model, data: TrainingData, where: Location) -> Residuals:
    """The data's residual streams at the lowest edited layer, cached as training and scoring do."""
    residuals = Residuals(model, data.forest)
    residuals.start(min(layer for _, layer in model.subspaces(where)), [[0]], max(map(len, data.forest.trees)))
    return residuals


def held_out_loss(data: TrainingData, sums: Sequence[Tensor], *, per_token: bool = False, tau: float = TAU) -> float:
    """IPO loss, averaged over a question's pairs and then over questions.

    `per_token` divides each answer's log-ratio by its number of tokens (reduction ``mean``).
    """
    return mean_loss(data, sums, "ipo", tau, "mean" if per_token else "sum")


def generate(model: Model, forest: Forest, edits: Sequence[Edit] | None, max_new_tokens: int) -> list[list[str]]:
    """Greedy answers, [edit][question], all edits in one bank; those of the unedited model if `edits` is None."""
    prompts = [tree.prompt for tree in forest.trees]
    bank = None if edits is None else stack(model, edits)
    return generate_answers(model, forest.prefix, prompts, bank, max_new_tokens=max_new_tokens)


def rank_one(sites: Mapping[Site, tuple[Tensor, Tensor]]) -> Edit:
    """The edit h' = h + <a, h> b, from (a, b) of each site."""
    return Edit({site: SiteEdit.rank_one(a, b) for site, (a, b) in sites.items()})


def probed(model: Model, asked: Sequence[Question], top_k: int) -> tuple[Location, Tensor]:
    """The `top_k` heads by probe accuracy, and ITI's sigma u of every head, (layers, heads, width)."""
    activations = collect_activations(model, asked)
    return fit_probes(activations).top(top_k), iti_theta(activations)
