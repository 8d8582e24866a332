"""How many edits run at once, and what happens when that was too many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from locaudit.behaviours import Split
from locaudit.behaviours.format import Prompt
from locaudit.config import AuditConfig
from locaudit.edits import Edit
from locaudit.errors import ModelError
from locaudit.measure.forward import default_row_tokens
from locaudit.measure.tree import Tree, plant
from locaudit.memory import is_out_of_memory, release, scoring_bank, training_bank
from locaudit.methods.training import step_size
from locaudit.models import Model
from locaudit.records import TrialRecord, TrialSpec
from locaudit.run.worker import Shared, run_trials

LEAST_ROW_TOKENS = 64
"""Below this many tokens at once, a device has no memory to work in."""


def with_banks(
    config: AuditConfig, model: Model, split: Split, primer: str, known: Sequence[int] | None = None
) -> AuditConfig:
    """The settings with the bank sizes that were left open: `known` (training, scoring), or by device and memory."""
    training, scoring = config.optimal.bank_size, config.evaluation.bank_size
    if known is not None:
        training, scoring = training or known[0], scoring or known[1]
    return replace(
        config,
        optimal=replace(config.optimal, bank_size=training or _training_bank(config, model, split, primer)),
        evaluation=replace(config.evaluation, bank_size=scoring or scoring_bank(model)),
    )


def _training_bank(config: AuditConfig, model: Model, split: Split, primer: str) -> int:
    prompt = Prompt(config.prompt.style, primer if config.prompt.primer_in_training else "")
    sample = plant(model.tokenizer, prompt, [(q.text, q.answers) for q in split.train[:32]])
    size = step_size(config.optimal.batching, config.optimal.batch_size)
    per_item = sample.n_tokens / len(sample.trees)
    if config.optimal.batching == "pair":
        per_item = sum(len(Tree(t.prompt, t.branches[:2])) for t in sample.trees) / len(sample.trees)
    return training_bank(model, size * per_item + len(sample.prefix))


def run_within_memory(
    shared: Shared, specs: Sequence[TrialSpec], limits: dict[str, int], say: Callable[[str], None]
) -> Iterator[list[tuple[TrialRecord, Edit | None]]]:
    """`run_trials`, in parts where memory runs out: fewer edits at once, then shorter batches.

    `limits` remembers what fitted: edits of a method, and ``row_tokens``. Raises `ModelError` when the smallest batch
    does not fit; parts that came before are the caller's already.
    """
    method = specs[0].method
    limit = limits.get(method, len(specs))
    if len(specs) > limit:
        for start in range(0, len(specs), limit):
            yield from run_within_memory(shared, specs[start : start + limit], limits, say)
        return
    if (tokens := limits.get("row_tokens")) is not None:
        shared = replace(shared, row_tokens=tokens)
    results = None
    try:
        results = run_trials(shared, specs)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    if results is not None:
        yield results
        return
    # Here, not in the except clause: the error's traceback holds the tensors that did not fit.
    vars(shared).pop("residuals", None)
    release(shared.model.device)
    if len(specs) > 1:
        limits[method] = len(specs) // 2
        say(f"out of memory with {len(specs)} edits at once: going on with {limits[method]}")
    else:
        tokens = shared.row_tokens or default_row_tokens(shared.model)
        limits["row_tokens"] = tokens // 2
        if limits["row_tokens"] < LEAST_ROW_TOKENS:
            raise ModelError(
                got=f"a device without memory for one edit and {tokens} tokens at once ({describe(specs)})",
                expected="memory for the model and a training step",
                remedy="free memory, load in bfloat16 (loading.dtype), lower optimal.batch_size, or take a larger "
                "device; trials that have ended are kept, and the same command goes on from there",
            )
        say(f"out of memory with one edit: going on with {limits['row_tokens']} tokens at once")
    yield from run_within_memory(shared, specs, limits, say)


def describe(group: Sequence[TrialSpec]) -> str:
    """The group in a few words, for people."""
    first = group[0]
    if first.arm == "base":
        return "unedited model"
    names = {
        "claim": "claim",
        "whole": "whole model",
        "rest": "the rest of the model",
        "control": f"control {first.control}",
    }
    strength = "alpha" if first.method == "iti" else "strength"
    more = f" and {len(group) - 1} more" if len(group) > 1 else ""
    return f"{first.method} at {names[first.arm]}, {strength} {first.hyperparameter:g}{more}"
