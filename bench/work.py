"""What is worked on: models, questions, locations; the same for both sides."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerBase

from bench.harness import Options
from locaudit.behaviours import Question, load_behaviour, split_questions
from locaudit.errors import ModelError
from locaudit.location import Location
from locaudit.models import Model, load_model, wrap_model
from locaudit.models.load import DTYPES, resolve_device
from locaudit.store.cache import cache_folder

SHAPES = {
    # hidden, MLP, layers, heads, key-value heads
    "9m": (192, 512, 10, 3, 1),
    "30m": (384, 1024, 14, 6, 2),
    "135m": (576, 1536, 30, 9, 3),
    "1b": (2048, 5632, 22, 32, 4),
    "7b": (4096, 11008, 32, 32, 32),
}
"""Llamas with random weights, by rough size without embeddings; vocabulary and tokenizer are SmolLM2's."""


def check(options: Options) -> None:
    """Raise `LocauditError` where the data, the device or the random model's size is not there; loads no model."""
    resolve_device(options.device)
    load_behaviour(options.data)
    _shape(options.model)


def _shape(model: str) -> tuple[int, int, int, int, int] | None:
    """Of a model with random weights; None for others."""
    if not model.startswith("random-"):
        return None
    if model.removeprefix("random-") not in SHAPES:
        raise ModelError(
            got=f"the model {model!r}", expected=f"random- and one of {', '.join(SHAPES)}", remedy="check --model"
        )
    return SHAPES[model.removeprefix("random-")]


def load(options: Options) -> Model:
    """The model, on its device."""
    shape = _shape(options.model)
    if shape is None:
        return load_model(options.model, dtype=options.dtype, device=options.device)
    hidden, mlp, layers, heads, kv = shape
    tokenizer = _tokenizer()
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
        dtype=DTYPES[options.dtype],
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        lm = AutoModelForCausalLM.from_config(config, dtype=DTYPES[options.dtype])
    return wrap_model(lm.to(options.device), tokenizer, options.model)


def _tokenizer() -> PreTrainedTokenizerBase:
    """SmolLM2's, kept in the user's cache: reading it from the GGUF takes longer than a small benchmark."""
    base = cache_folder()
    if base is None:
        return load_model("smollm2-135m").tokenizer
    kept = base / "bench-tokenizer"
    if not kept.exists():
        base.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=base) as folder:
            load_model("smollm2-135m").tokenizer.save_pretrained(folder)
            with suppress(OSError):  # another process was faster
                Path(folder).replace(kept)
                Path(folder).mkdir()
    return AutoTokenizer.from_pretrained(kept)


def questions(options: Options, n: int | None = None) -> tuple[Question, ...]:
    """The first training questions of the default split."""
    n = options.n_questions if n is None else n
    found = split_questions(load_behaviour(options.data)).train
    if len(found) < n:
        raise SystemExit(
            f"got {n} questions to measure on, {options.data} has {len(found)} for training; ask for fewer"
        )
    return found[:n]


def location(options: Options, model: Model) -> Location:
    """All heads, or the first head of the middle layer."""
    return model.whole() if options.where == "all" else Location(((model.n_layers // 2, 0),))
