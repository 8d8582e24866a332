"""What an audit starts from: inputs read and checked before any folder is touched, and the subject, loaded.

Torch is imported only where something is loaded: what settings and files alone refuse is refused at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from locaudit.behaviours.behaviour import Behaviour
from locaudit.behaviours.format import Prompt, load_primer
from locaudit.behaviours.loaders import load_behaviour
from locaudit.behaviours.splits import Split, split_questions
from locaudit.checkpoints import read_shape
from locaudit.claims import find_kind, parse_location
from locaudit.config import AuditConfig, Registration, hold, read_registration
from locaudit.config.settings import ANSWER_TOKENS
from locaudit.errors import ConfigError
from locaudit.judges.base import Judge
from locaudit.location import Location
from locaudit.registry import METHODS, load_plugins
from locaudit.run.judging import build_judges, check_judges, choose_judges
from locaudit.stats.scores import find_score, resolve_score
from locaudit.store.files import read_text

if TYPE_CHECKING:
    from locaudit.models.model import Model


@dataclass(frozen=True, eq=False)
class Inputs:
    """Everything that is read from files and settings; the model comes apart, since it takes longest."""

    config: AuditConfig
    """The settings, a claim file replaced by what it says now, so that a folder never mixes two claims.

    ``evaluation.max_new_tokens`` is a number.
    """
    behaviour: Behaviour
    split: Split
    scoring: Prompt
    """Format of the questions that are scored and answered."""
    training: Prompt
    """Format of those that edits are trained on."""
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
    """Read what the settings name, and load the judges. Raises `LocauditError`; arguments as in `read_settings`."""
    inputs = read_settings(config, behaviour, judges, model)
    config, behaviour = inputs.config, inputs.behaviour
    if judges is None:
        generates = bool(config.evaluation.max_new_tokens)
        judges = build_judges(config.judges, behaviour.aspects, generates=generates, device=config.loading.device)
    check_judges(judges)
    _check_score(config, judges)
    return replace(inputs, judges=judges)


def read_settings(
    config: AuditConfig,
    behaviour: Behaviour | None = None,
    judges: Mapping[str, Judge] | None = None,
    model: Model | None = None,
) -> Inputs:
    """Everything of `read_inputs` but the judges, which are only checked; nothing is loaded.

    `behaviour`, `judges` and `model` take the place of what the settings name, but not of what a claim file names
    (``registered``). A claim outside the model is refused as far as the model's files say its shape.
    """
    load_plugins(config.plugins)
    registration = None
    if config.registered is not None:
        registration = _read_claim_file(config.registered)
        _check_objects(registration, behaviour, judges, model)
        if config.claim is not None:  # however it is written, the same location is no contradiction
            config = replace(config, claim=str(parse_location(config.claim)))
        config = hold(registration, config)
    behaviour = behaviour or load_behaviour(config.behaviour)
    prompt, primer = config.prompt, load_primer(config.prompt.primer, behaviour.primer)
    claim = None if config.claim is None else parse_location(config.claim)
    if claim is not None:
        config = replace(config, claim=str(claim))
    shape = read_shape(config.model, config.loading.revision) if model is None else model.shape
    if claim is not None and shape is not None:
        find_kind(claim).check(claim, shape)
    limit, asked = config.evaluation.max_new_tokens, judges
    if asked is None:
        asked = choose_judges(config.judges, behaviour.aspects, generates=limit != 0)
        _check_score(config, asked)
    if limit is None:
        evaluation = replace(config.evaluation, max_new_tokens=ANSWER_TOKENS if asked else 0)
        config = replace(config, evaluation=evaluation)
    return Inputs(
        config,
        behaviour,
        split_behaviour(config, behaviour),
        Prompt(prompt.style, primer),
        Prompt(prompt.style, primer if prompt.primer_in_training else ""),
        b"" if config.evaluation.drift_text is None else read_text(config.evaluation.drift_text),
        claim,
        judges or {},
        registration,
    )


def split_behaviour(config: AuditConfig, behaviour: Behaviour) -> Split:
    """The questions as the settings split them."""
    s = config.split
    return split_questions(
        behaviour, s.fractions, seed=s.seed, max_train=s.max_train, max_val=s.max_val, max_test=s.max_test
    )


def load_subject(config: AuditConfig) -> Model:
    """The model that is audited."""
    from locaudit.models.load import load_model

    return load_model(config.model, **asdict(config.loading))


def check_subject(config: AuditConfig, claim: Location | None, model: Model) -> None:
    """Refuse what this model does not have, or cannot be trained with on its device, before any work."""
    from locaudit.methods.optimizers import resolve_optimizer

    if claim is not None:
        find_kind(claim).check(claim, model.shape)
    for name, settings in config.methods.items():
        if METHODS[name].trained and hasattr(settings, "optimizer"):
            resolve_optimizer(settings.optimizer, model.device)


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


def _check_score(config: AuditConfig, judges: Mapping[str, object]) -> None:
    """A score that needs a judge who is not there raises `ConfigError` before anything runs."""
    score = resolve_score(config.score, tuple(judges))
    needed = [aspect for aspect in find_score(score).needs if aspect != "*"]
    if any(aspect not in judges for aspect in needed):
        raise ConfigError(
            got=f"score = {score} with judges of {', '.join(judges) or 'nothing'}",
            expected=f"judges of {' and '.join(needed)}",
            remedy="name judges for them (judges.ASPECT.kind), or choose a score such as mc2",
        )
