"""What an audit starts from, read and checked before any folder is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from locaudit.behaviours import Behaviour, Split, load_behaviour, split_questions
from locaudit.behaviours.format import load_primer
from locaudit.config import AuditConfig, Registration, hold, read_registration
from locaudit.errors import ConfigError
from locaudit.judges import Judge
from locaudit.location import Location, parse_location
from locaudit.measure.drift import read_drift_text
from locaudit.methods.optimizers import resolve_optimizer
from locaudit.models import Model, load_model
from locaudit.run.judging import build_judges, check_judges
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
    registration: Registration | None
    """The claim file, whose settings are among `config`'s; None without one."""


def read_inputs(
    config: AuditConfig,
    behaviour: Behaviour | None = None,
    judges: Mapping[str, Judge] | None = None,
    model: Model | None = None,
) -> Inputs:
    """Read what the settings name. `behaviour`, `judges` and `model` take the place of theirs. Raises `LocauditError`.

    What a claim file names (``registered``) nothing takes the place of.
    """
    registration = None
    if config.registered is not None:
        registration = _read_claim_file(config.registered)
        _check_objects(registration, behaviour, judges, model)
        if config.claim is not None:  # however it is written, the same location is no contradiction
            config = replace(config, claim=str(parse_location(config.claim)))
        config = hold(registration, config)
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
    return Inputs(config, behaviour, split, primer, drift_text, claim, judges, registration)


def split_behaviour(config: AuditConfig, behaviour: Behaviour) -> Split:
    """The questions as the settings split them."""
    s = config.split
    return split_questions(
        behaviour, s.fractions, seed=s.seed, max_train=s.max_train, max_val=s.max_val, max_test=s.max_test
    )


def load_subject(config: AuditConfig) -> Model:
    """The model that is audited."""
    return load_model(config.model, **asdict(config.loading))


def check_subject(config: AuditConfig, claim: Location | None, model: Model) -> None:
    """Refuse what this model does not have, or cannot be trained with on its device, before any work."""
    if claim is not None:
        claim.check(model.n_layers, model.n_units(claim.kind))
    resolve_optimizer(config.optimal.optimizer, model.device)


def _read_claim_file(path: str) -> Registration:
    """The claim file, with the claim spelled as records spell it."""
    registration = read_registration(path)
    claim = registration.values["claim"]
    if claim is None:
        return registration
    location = str(parse_location(claim))
    if claim.strip().endswith((".json", ".csv")):
        raise ConfigError(
            got=f"the claim {claim} in {path}, a file that can change after it was registered",
            expected="the location itself",
            remedy=f'write claim: "{location}"',
        )
    return replace(registration, values={**registration.values, "claim": location})


def _check_objects(
    registration: Registration,
    behaviour: Behaviour | None,
    judges: Mapping[str, Judge] | None,
    model: Model | None,
) -> None:
    """What comes from Python is what the claim file names, as far as it names it."""
    values = registration.values
    for name, thing in (("model", model), ("behaviour", behaviour)):
        if thing is not None and values.get(name, thing.name) != thing.name:
            raise ConfigError(
                got=f"the {name} {thing.name!r} from Python, and {values[name]!r} in {registration.file}",
                expected="what the claim file fixed before the run",
                remedy=f"leave the {name} out, so that it is loaded by that name",
            )
    if judges is not None and "judges" in values:
        raise ConfigError(
            got=f"judges from Python, and others in {registration.file}",
            expected="what the claim file fixed before the run",
            remedy="leave one of the two out",
        )


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
