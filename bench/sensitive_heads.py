"""Find the heads on which the training objective depends most: the claim of ``locaudit demo --positive``.

    python -m bench.sensitive_heads

It reads training prompts only. An edit h' = h + B A h begins at B = 0. There, the gradient of the mean margin m between
negative and positive continuations with respect to B is

    dm/dB = mean over prompts of sum over tokens of (dm/dh) (A h)^T

The norm of a head's rows of it says how fast an edit at this head begins to move the behaviour. A is random, of a rank
that is large enough for the order of the heads to depend little on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.command import Positive, header, line, run
from bench.work import Location, Model, Question, TrainableEdit, plant
from locaudit.behaviours import load_behaviour
from locaudit.behaviours.format import Prompt
from locaudit.config import load_preset, merge_config
from locaudit.location import spell_unit
from locaudit.measure.forward import branch_sums, collate_bank, token_log_probs
from locaudit.methods.parameters import stack_trainable
from locaudit.run.subject import load_subject, split_behaviour


@dataclass(frozen=True)
class Settings:
    """What to search. The rest is as in the preset ``positive``."""

    split_seed: int = load_preset("positive").split.seed
    train: Positive = 60
    """Number of training prompts, read with all their continuations."""
    rank: Positive = 16
    """Rank of A."""
    top: Positive = 8
    """Number of heads to print."""


def main(given: Settings) -> None:
    """Print the most sensitive heads and, last, the claim."""
    split = {"seed": given.split_seed, "max_train": given.train, "max_answers": None}
    config = merge_config(load_preset("positive"), {"split": split})
    behaviour = load_behaviour(config.behaviour)
    questions = split_behaviour(config, behaviour).train
    found = sensitivities(load_subject(config), questions, Prompt(behaviour.style), rank=given.rank, seed=config.seed)
    best = sorted(found, key=found.__getitem__, reverse=True)[: given.top]
    print(header("head", "gradient norm"))
    for unit in best:
        print(line([spell_unit(unit), f"{found[unit]:.3f}"]))
    print(f'\n--claim "{Location(tuple(best))}"')


def sensitivities(
    model: Model, questions: Sequence[Question], prompt: Prompt, *, rank: int, seed: int
) -> dict[tuple[int, int], float]:
    """For each head, the norm of the gradient of the mean margin (nats) with respect to its rows of B, at B = 0."""
    forest = plant(model.tokenizer, prompt, [(q.text, q.answers) for q in questions])
    edit = TrainableEdit(model, Location.whole("head"), rank=rank, seed=seed)
    for question, tree in zip(questions, forest.trees, strict=True):
        batch, n_true = collate_bank([[tree]], 1, 0, model), len(question.true)
        logs = token_log_probs(model, batch, stack_trainable([edit]), batch.input_ids.new_zeros(1))
        sums = branch_sums(batch, logs)  # (answers,), true ones first
        ((sums[:n_true].mean() - sums[n_true:].mean()) / len(questions)).backward()
    found: dict[tuple[int, int], float] = {}
    for site, b in zip(edit.subspaces, edit.b, strict=True):
        assert b.grad is not None
        by_head = b.grad.unflatten(0, (model.n_heads, -1))  # (heads, width, rank)
        found |= {(site.layer, head): rows.norm().item() for head, rows in enumerate(by_head)}
    return found


if __name__ == "__main__":
    run(main, Settings, __doc__)
