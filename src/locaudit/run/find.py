"""Rank the places of a model by a rule (`locaudit.methods.rules`), on training questions only."""

from __future__ import annotations

from locaudit.behaviours import Behaviour
from locaudit.claims import Ranking
from locaudit.claims.spelling import ALIASES
from locaudit.config import AuditConfig
from locaudit.errors import ConfigError, ModelError
from locaudit.measure.identity import check_trees, hardest_trees
from locaudit.methods import Rule
from locaudit.models.model import Model
from locaudit.registry import KINDS, RULES
from locaudit.run.prepare import Preparing, Say, plant_training
from locaudit.run.status import show_progress
from locaudit.run.subject import load_subject, read_settings


def find_places(
    config: AuditConfig,
    by: str,
    kind: str = "head",
    *,
    model: Model | None = None,
    behaviour: Behaviour | None = None,
    progress: bool = True,
) -> Ranking:
    """Rank all units of a kind by the rule `by`. Writes nothing.

    The training questions are those of an audit with the same settings. `model` and `behaviour` override the settings.
    Raises `ConfigError` for an unknown rule or kind, or one whose units are not blocks of coordinates, `ModelError` for
    scores that are not finite, and the errors of `read_settings`.
    """
    _ = RULES[by]  # refused before anything is loaded
    with show_progress(progress) as meter:
        return rank(prepare_training(config, kind, model, behaviour, meter.say), by)


def prepare_training(
    config: AuditConfig, kind: str, model: Model | None, behaviour: Behaviour | None, say: Say
) -> Preparing:
    """What rules get: the model, and the training questions as an audit with these settings reads them."""
    kind = ALIASES.get(kind, kind)
    _ = KINDS[kind]
    inputs = read_settings(config, behaviour, {}, model)
    if model is None:
        say(f"loading {config.model}")
        model = load_subject(config)
    model.check_kind(kind)
    forest = plant_training(inputs, model)
    check_trees(model, hardest_trees([forest]))
    preparing = Preparing(model, inputs.config, kind, inputs.split.train, forest, inputs.training, say)
    if preparing.blocks is None or 0 in preparing.blocks:
        raise ConfigError(
            got=f"places of the kind {kind} in {model.name}",
            expected="a kind whose units are blocks of coordinates that the model has",
            remedy="rank heads, or another kind",
        )
    return preparing


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
    return Ranking.of(preparing.kind, by, rule.means, table.tolist(), is_change=rule.is_change)
