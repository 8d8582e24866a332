"""Rank the places of a model by a rule (`locaudit.methods.rules`), on training questions only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from locaudit.behaviours import Behaviour, Question
from locaudit.claims import Ranking
from locaudit.claims.spelling import ALIASES
from locaudit.config import AuditConfig
from locaudit.errors import ConfigError, DataError, ModelError
from locaudit.location import Positions
from locaudit.measure.identity import check_trees, hardest_trees
from locaudit.measure.tree import Forest, Tree
from locaudit.methods import Rule
from locaudit.methods.base import PatchWith
from locaudit.models.model import Model
from locaudit.registry import KINDS, RULES
from locaudit.run.prepare import Preparing, Say, plant_training
from locaudit.run.status import show_progress
from locaudit.run.subject import check_subjects, load_subject, read_settings


def find_places(
    config: AuditConfig,
    by: str,
    kind: str = "head",
    *,
    patch_with: PatchWith = "mean",
    positions: Positions = "all",
    model: Model | None = None,
    behaviour: Behaviour | None = None,
    progress: bool = True,
) -> Ranking:
    """Rank all units of a kind by the rule `by`. Writes nothing.

    The training questions are those of an audit with the same settings. Rules that replace a unit's output do so at the
    tokens of `positions`, by its mean or by its value after the question's paired prompt. `model` and `behaviour`
    override the settings. Raises `ConfigError` for an unknown rule or kind, a kind whose units are not blocks of
    coordinates, or a rule that replaces nothing with settings of what it replaces; `DataError` for questions without
    the paired prompt or subject that is needed; `ModelError` for scores that are not finite; and the errors of
    `read_settings`.
    """
    check_patching((by,), patch_with, positions)  # refused before anything is loaded
    with show_progress(progress) as meter:
        return rank(prepare_training(config, kind, model, behaviour, meter.say, patch_with, positions), by)


def check_patching(rules: Sequence[str], patch_with: PatchWith, positions: Positions) -> None:
    """Raise `ConfigError` for an unknown rule, or rules that replace nothing where it is said what they replace."""
    if patch_with not in get_args(PatchWith) or positions not in get_args(Positions):
        raise ConfigError(
            got=f"patch_with = {patch_with!r} and positions = {positions!r}",
            expected=f"{' or '.join(get_args(PatchWith))}, and one of {', '.join(get_args(Positions))}",
            remedy="correct it",
        )
    if not any([RULES[by].replaces for by in rules]) and (patch_with, positions) != ("mean", "all"):
        raise ConfigError(
            got=f"the rule {' and '.join(rules)} with patch_with = {patch_with} and positions = {positions}",
            expected=f"a rule that replaces outputs: {', '.join(name for name in RULES if RULES[name].replaces)}",
            remedy="choose one of them, or leave --patch-with and --positions out",
        )


def prepare_training(
    config: AuditConfig,
    kind: str,
    model: Model | None,
    behaviour: Behaviour | None,
    say: Say,
    patch_with: PatchWith = "mean",
    positions: Positions = "all",
) -> Preparing:
    """What rules get: the model, and the training questions as an audit with these settings reads them."""
    kind = ALIASES.get(kind, kind)
    _ = KINDS[kind]
    inputs = read_settings(config, behaviour, {}, model, audits=False)
    if positions == "subject":
        check_subjects(inputs.behaviour)
    asked = inputs.split.train
    others = _paired(asked) if patch_with == "pair" else ()
    if model is None:
        say(f"loading {config.model}")
        model = load_subject(config)
    model.check_kind(kind)
    both = plant_training(replace(inputs, split=replace(inputs.split, train=(*asked, *others))), model, positions)
    check_trees(model, hardest_trees([both]))
    trees = both.trees[: len(asked)]
    pairs = tuple(
        replace(tree, prompt=pair.prompt) for tree, pair in zip(trees, both.trees[len(asked) :], strict=False)
    )
    for question, tree, pair in zip(asked, trees, pairs, strict=False):  # none, or as many as questions
        _check_pair(question, tree, pair, positions)
    preparing = Preparing(
        model,
        inputs.config,
        kind,
        asked,
        Forest(both.prefix, trees),
        inputs.training,
        say,
        positions=positions,
        pairs=pairs,
    )
    if preparing.blocks is None or 0 in preparing.blocks:
        raise ConfigError(
            got=f"places of the kind {kind} in {model.name}",
            expected="a kind whose units are blocks of coordinates that the model has",
            remedy="rank heads, or another kind",
        )
    return preparing


def _paired(questions: Sequence[Question]) -> tuple[Question, ...]:
    """The questions with their paired prompts in place of their texts. Raises `DataError` if one has none."""
    lone = next((question for question in questions if not question.paired), None)
    if lone is not None:
        raise DataError(
            got=f"patch_with = pair, and the question {lone.text[:60]!r} without a paired prompt",
            expected="a paired prompt for every training question",
            remedy='write it into each JSONL row, such as "paired": "The Colosseum is in", or use --patch-with mean',
        )
    return tuple(replace(question, text=question.paired, subject="", paired="") for question in questions)


def _check_pair(question: Question, tree: Tree, pair: Tree, positions: Positions) -> None:
    """Raise `DataError` if a patched token of a prompt has no counterpart in the paired prompt."""
    n, m, at = len(tree.prompt), len(pair.prompt), tree.subject
    behind = () if at is None else tree.prompt[at + 1 :]
    fits, expected = {
        "all": (n == m, "prompts of equally many tokens"),
        "subject": (
            m > len(behind) and pair.prompt[m - len(behind) :] == behind,
            "the same tokens after both subjects",
        ),
    }.get("all" if positions == "prompt" else positions, (True, ""))
    if not fits:
        raise DataError(
            got=f"the prompt {question.text[:60]!r} ({n} tokens) and its paired prompt {question.paired[:60]!r} ({m})",
            expected=f"{expected}, so that each patched token (positions {positions}) has its counterpart",
            remedy="reword one of them, or use --positions last or answer",
        )


def rank(preparing: Preparing, by: str) -> Ranking:
    """Rank the units of a kind by one rule."""
    rule: Rule = RULES[by]
    table = rule.ranker(preparing)
    if not table.isfinite().all():
        raise ModelError(
            got=f"scores by {by} that are not finite",
            expected="finite numbers",
            remedy="load the model in float32 (loading.dtype)",
        )
    how = " by that after the paired prompt" if preparing.pairs else " by its mean"
    at = "" if preparing.positions == "all" else f" (tokens: {preparing.positions})"
    means = rule.means + (how + at if rule.replaces else "")
    return Ranking.of(preparing.kind, by, means, table.tolist(), is_change=rule.is_change)
