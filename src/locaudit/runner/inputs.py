"""What an audit starts from, read and checked before any folder is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from locaudit.config import AuditConfig
from locaudit.data import Behaviour, Split, load_behaviour, split_questions
from locaudit.data.prompts import load_primer
from locaudit.errors import ConfigError
from locaudit.evaluation import read_drift_text
from locaudit.judges import Judge
from locaudit.locations import Location, parse_location
from locaudit.models import Model, load_model
from locaudit.runner.judging import build_judges, check_judges
from locaudit.stats import components, resolve_score
from locaudit.stats.judged import ASPECT_NAMES


@dataclass(frozen=True, eq=False)
class Inputs:
    """Everything that is read from files and settings; the model comes apart, since it takes longest."""

    config: AuditConfig
    """The settings, a claim file replaced by what it says now, so that a folder never mixes two claims."""
    behaviour: Behaviour
    split: Split
    primer: str
    drift_text: bytes
    claim: Location | None
    """None: the top-k probed heads."""
    judges: Mapping[str, Judge]


def read_inputs(
    config: AuditConfig, behaviour: Behaviour | None = None, judges: Mapping[str, Judge] | None = None
) -> Inputs:
    """Read what the settings name. `behaviour` and `judges` take the place of theirs. Raises `LocauditError`."""
    behaviour = behaviour or load_behaviour(config.behaviour)
    split = split_behaviour(config, behaviour)
    primer = load_primer(config.prompt.primer)
    drift_text = read_drift_text(config.evaluation.drift_text)
    claim = parse_location(config.claim) if config.claim is not None else None
    if claim is not None:
        config = replace(config, claim=str(claim))
    if judges is None:
        asks = (behaviour.target, behaviour.retention)
        generates = config.evaluation.max_new_tokens > 0
        judges = build_judges(config.judges, asks, generates=generates, device=config.loading.device)
    check_judges(judges)
    _check_score(config, judges)
    return Inputs(config, behaviour, split, primer, drift_text, claim, judges)


def split_behaviour(config: AuditConfig, behaviour: Behaviour) -> Split:
    """The questions as the settings split them."""
    s = config.split
    return split_questions(
        behaviour, s.fractions, seed=s.seed, max_train=s.max_train, max_val=s.max_val, max_test=s.max_test
    )


def load_subject(config: AuditConfig) -> Model:
    """The model that is audited."""
    return load_model(config.model, **asdict(config.loading))


def _check_score(config: AuditConfig, judges: Mapping[str, Judge]) -> None:
    """A score that needs a judge who is not there raises `ConfigError` before anything runs."""
    score = resolve_score(config.score, tuple(judges))
    needed = [slot for slot in ASPECT_NAMES if any(part.startswith(slot) for part in components(score))]
    if score == "info_truth_both":
        needed = list(ASPECT_NAMES)
    if any(slot not in judges for slot in needed):
        raise ConfigError(
            got=f"score = {score} with judges of {', '.join(judges) or 'nothing'}",
            expected=f"judges of {' and '.join(needed)}",
            remedy="set judges.target and judges.retention, or choose a score such as mc2",
        )
