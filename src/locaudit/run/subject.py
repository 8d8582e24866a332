"""Read and check the inputs of an audit before anything is written, and load the model (the subject).

Torch is imported only when something is loaded, so that bad settings and files are refused at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

from locaudit.behaviours.behaviour import Behaviour, Question, Style, normalise
from locaudit.behaviours.format import Prompt, load_primer, reorder_primer
from locaudit.behaviours.loaders import load_behaviour
from locaudit.behaviours.neighbours import find_subjects
from locaudit.behaviours.splits import Split, split_questions
from locaudit.checkpoints import read_shape
from locaudit.claims import Claim, Controls, draw_nulls, find_kind, parse_location, read_claim
from locaudit.claims.directions import Directions
from locaudit.claims.kinds import BY_VALUE, Shape
from locaudit.config import AuditConfig, Registration, SplitConfig, hold, read_registration
from locaudit.config.files import read_bytes
from locaudit.config.settings import ANSWER_TOKENS
from locaudit.errors import ConfigError, DataError, LocationError
from locaudit.judges.base import Judge
from locaudit.location import IN_TEXT, ROLES, Location, Positions
from locaudit.records import DIRECTION_NULLS, OFF, NullId
from locaudit.registry import METHODS, load_plugins
from locaudit.run.executors import check_executor
from locaudit.run.judging import build_judges, check_judges, choose_judges
from locaudit.run.trackers import check_tracker
from locaudit.stats.questions import LEAST_FOR_NO
from locaudit.stats.scores import find_score, resolve_score
from locaudit.stats.words import too_few
from locaudit.store.directions import load_directions
from locaudit.store.folder import saved_config
from locaudit.text import plural

if TYPE_CHECKING:
    from locaudit.models.model import Model

_HALF_FOR_TEST = (0.4, 0.1, 0.5)
"""Fractions that leave half of the questions for the test, where the default leaves too few."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """Everything that is read from settings and files, except the model, which takes longest to load."""

    config: AuditConfig
    """The complete settings, including those of the claim file.

    The claim is written as units, not as a file name, so that a later change of its file cannot mix two claims in one
    run folder. ``evaluation.max_new_tokens`` is a number here, not None. ``prompt.style`` is never ``auto``. In style
    ``chat``, ``prompt.date`` is a day.
    """
    behaviour: Behaviour
    split: Split
    scoring: Prompt
    """Format of the questions that are scored and answered."""
    training: Prompt
    """Format of the questions that edits are trained on."""
    drift_text: bytes
    claim: Location | None
    """The claim; None stands for the k heads with the most accurate probes."""
    judges: Mapping[str, Judge]
    registration: Registration | None
    """The claim file, whose settings are part of `config`; None without one."""
    off_target: Mapping[str, tuple[Prompt, tuple[Question, ...]]] = field(default_factory=dict)
    """Split, such as ``off:sentiment`` -> format and test questions of another behaviour that edits are scored on."""

    def held_out(self, split: str) -> tuple[Question, ...]:
        """The questions of ``val``, ``test`` or an off-target behaviour's split.

        Of ``paraphrases:val`` and the like (`RELATED`), each question after each of these prompts, or nothing if some
        question of the behaviour has none. With edits of ``subject``, neighborhood prompts whose subject is not known
        (`neighbours`) are not asked.
        """
        if split in self.off_target:
            return self.off_target[split][1]
        kind, _, part = split.rpartition(":")
        if not kind:
            return getattr(self.split, part)
        marks, limit = "subject" in prompt_positions(self.config), self.config.evaluation.max_prompts

        def others(q: Question) -> list[tuple[str, str]]:
            """The question's other prompts, each with its subject if it is needed."""
            texts = [text for text in getattr(q, kind) if text != q.text]
            if not marks or kind == "paraphrases":
                return [(text, q.subject if marks else "") for text in texts][:limit]
            return [(text, x) for text in texts if (x := self.neighbours.get((q.category, text)))][:limit]

        if not all(map(others, self.behaviour.questions)):
            return ()
        return tuple(replace(q, text=text, subject=x) for q in getattr(self.split, part) for text, x in others(q))

    @cached_property
    def neighbours(self) -> Mapping[tuple[str, str], str]:
        """(category, neighborhood prompt) -> its subject, as far as that is known (`find_subjects`)."""
        return find_subjects(self.behaviour.questions)

    notes: tuple[str, ...] = ()
    """What is known about nulls with few places before the model is loaded, one sentence each."""
    given: Claim | None = None
    """The claim as its source gives it, unless a claim file (``registered``) names it."""


def read_inputs(
    config: AuditConfig,
    behaviour: Behaviour | None = None,
    judges: Mapping[str, Judge] | None = None,
    model: Model | None = None,
    out: str | Path | None = None,
    *,
    audits: bool = True,
) -> Inputs:
    """Read and check everything that the settings name, and load the judges.

    Arguments are those of `read_settings`. Raises `LocauditError` for anything that cannot be used.
    """
    inputs = read_settings(config, behaviour, judges, model, out, audits=audits)
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
    out: str | Path | None = None,
    *,
    audits: bool = True,
) -> Inputs:
    """Do what `read_inputs` does, but load no judge and no model. The judges' settings are only checked.

    `behaviour`, `judges` and `model` override the settings. If there is a claim file (``registered``), they must match
    what it names. A claim outside the model is refused here if the model's files give its shape, and otherwise when the
    model is loaded (`check_subject`). `out` is the run folder; if a run was started there before, its ``prompt.date``
    is used, and its vectors if the claim is directions. Without a claim, the best probed heads are one, which must fit
    the model; not so if `audits` is False, for what audits no claim. Raises `LocauditError`.
    """
    load_plugins(config.plugins)
    if out is not None:
        load_directions(out)
    config, given = settle_claim(config)
    registration = None
    if config.registered is not None:
        registration = _read_claim_file(config.registered)
        _check_objects(registration, behaviour, judges, model)
        config = hold(registration, config)
    if behaviour is None:
        behaviour = load_behaviour(config.behaviour, format=config.behaviour_format, columns=config.behaviour_columns)
    behaviour = behaviour.worded(config.prompt.wording)
    _check_positions(config, behaviour)
    config = settle_style(config, behaviour)
    if config.prompt.style == "chat" and config.prompt.date == "auto":
        config = replace(config, prompt=replace(config.prompt, date=_first_day(out)))
    primer = reorder_primer(load_primer(config.prompt.primer, behaviour.primer), config.prompt.primer_order)
    claim = None if config.claim is None else parse_location(config.claim)
    if model is not None and (claim is not None or audits):
        model.check_kind("head" if claim is None else claim.kind)
    shape = (
        read_shape(config.model, config.loading.revision, config.architecture.given) if model is None else model.shape
    )
    if shape is not None and given is not None:
        given.check(shape)
    notes = _check_claim(config, claim, shape) if shape is not None and (claim is not None or audits) else ()
    _check_rests(config)
    check_executor(config, model is not None)
    check_tracker(config)
    for name, settings in config.methods.items():
        METHODS[name].check(settings)
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
        make_prompt(config, primer),
        make_prompt(config, primer if config.prompt.primer_in_training else ""),
        b""
        if config.evaluation.drift_text is None
        else read_bytes(config.evaluation.drift_text, "a text file", DataError),
        claim,
        judges or {},
        registration,
        {f"{OFF}{name}": _read_off_target(config, behaviour, name) for name in config.off_target},
        notes,
        given,
    )


def _read_off_target(config: AuditConfig, behaviour: Behaviour, name: str) -> tuple[Prompt, tuple[Question, ...]]:
    """Format and test questions of an off-target behaviour, without questions of the behaviour itself.

    The format is the behaviour's own, or the chat format in style ``chat``. Raises `DataError` for fewer than 2
    questions.
    """
    other = load_behaviour(name)
    style = "chat" if config.prompt.style == "chat" else other.style
    own = {normalise(question.text) for question in behaviour.questions}
    kept = tuple(q for q in split_behaviour(config, other).test if normalise(q.text) not in own)
    if len(kept) < 2:
        raise DataError(
            got=f"off_target {name}, with {plural(len(kept), 'test question')} that {behaviour.name} does not have",
            expected="another behaviour, with at least 2",
            remedy="leave it out",
        )
    settings = replace(config, prompt=replace(config.prompt, style=style))
    return make_prompt(settings, load_primer(config.prompt.primer, other.primer)), kept


def prompt_positions(config: AuditConfig) -> list[Positions]:
    """The positions that methods edit and running text does not have; drift is then measured on held-out prompts."""
    edited = {getattr(settings, "positions", "all") for settings in config.methods.values()}
    return [name for name in ROLES if name in edited and name not in IN_TEXT]


def _check_positions(config: AuditConfig, behaviour: Behaviour) -> None:
    """Raise an error for edits of subjects that are not marked, or a text for drift that has no such tokens."""
    positions = prompt_positions(config)
    if positions and config.evaluation.drift_text is not None:
        raise ConfigError(
            got=f"evaluation.drift_text = {config.evaluation.drift_text} with positions {' and '.join(positions)}",
            expected="no drift text: running text has no such tokens, and held-out prompts are used instead",
            remedy="leave evaluation.drift_text out",
        )
    if "subject" in positions:
        check_subjects(behaviour)


def check_subjects(behaviour: Behaviour) -> None:
    """Raise `DataError` if a question of the behaviour has no marked subject."""
    unmarked = next((question for question in behaviour.questions if not question.subject), None)
    if unmarked is not None:
        raise DataError(
            got=f"positions subject, and the question {unmarked.text[:60]!r} of {behaviour.name} without a subject",
            expected="the subject of every question",
            remedy='write it into each row, such as "subject": "the Eiffel Tower", as it stands in the question',
        )


def settle_style(config: AuditConfig, behaviour: Behaviour) -> AuditConfig:
    """The settings with the behaviour's own ``prompt.style`` in place of ``auto``."""
    style = behaviour.style if config.prompt.style == "auto" else config.prompt.style
    return replace(config, prompt=replace(config.prompt, style=style))


def make_prompt(config: AuditConfig, primer: str = "") -> Prompt:
    """The format of questions that the settings choose, with the text of a primer. The style must not be ``auto``."""
    day = "" if config.prompt.date == "auto" else config.prompt.date
    return Prompt(cast(Style, config.prompt.style), primer, config.prompt.template, day)


def _first_day(out: str | Path | None) -> str:
    """The ``prompt.date`` of the run in a folder, or today if there is none."""
    before = None if out is None else saved_config(out)
    found = "auto" if before is None else before.prompt.date
    return date.today().isoformat() if found == "auto" else found


def split_behaviour(config: AuditConfig, behaviour: Behaviour) -> Split:
    """Split the behaviour's questions as the settings say."""
    return split_questions(behaviour, **asdict(config.split))


def few_for_no(behaviour: Behaviour, split: SplitConfig) -> str:
    """That there are too few test questions for any ``no``, and what to change; empty if there are enough."""
    n_test, uncapped = (
        len(split_questions(behaviour, **asdict(x)).test) for x in (split, replace(split, max_test=None))
    )
    if n_test >= LEAST_FOR_NO:
        return ""
    cap = "" if split.max_test is None or split.max_test >= LEAST_FOR_NO else f" --split.max-test {LEAST_FOR_NO}"
    if uncapped >= LEAST_FOR_NO:
        remedy = f"set{cap}"
    elif any(question.split for question in behaviour.questions):
        remedy = "give more rows of the file the split test"
    elif len(behaviour) >= 2 * LEAST_FOR_NO:
        remedy = f"set --split.fractions {' '.join(map(str, _HALF_FOR_TEST))}{cap}"
    else:
        remedy = f"use a behaviour with at least {2 * LEAST_FOR_NO} questions ({behaviour.name} has {len(behaviour)})"
    return f'{n_test} test questions are too few for the answer "no", which takes {LEAST_FOR_NO}: {remedy}'


def load_subject(config: AuditConfig) -> Model:
    """Load the model that is audited."""
    from locaudit.models.load import load_model

    return load_model(config.model, **asdict(config.loading), architecture=config.architecture.given)


def settle_claim(config: AuditConfig) -> tuple[AuditConfig, Claim | None]:
    """The settings with the claimed location itself in place of its file, and the claim; None if none is given."""
    rule = {name: getattr(config, name) for name in ("claim_top_k", "claim_threshold")}
    if config.claim is None:
        given = [f"{name} = {value}" for name, value in rule.items() if value is not None]
        if given:
            raise ConfigError(
                got=f"{' and '.join(given)} without a claim",
                expected="a claim with scores, from which to choose",
                remedy="give its file as --claim; the number of best probed heads is --probe.top-k",
            )
        return config, None
    claim = read_claim(
        config.claim, format=config.claim_format, top_k=config.claim_top_k, threshold=config.claim_threshold
    )
    changed = {name: getattr(AuditConfig, name) for name in ("claim_format", *rule)}
    if config.nulls == AuditConfig.nulls and isinstance(find_kind(claim.location), Directions):
        changed["nulls"] = DIRECTION_NULLS[:1]
    return replace(config, claim=str(claim.location), **changed), claim


def check_subject(config: AuditConfig, inputs: Inputs, model: Model) -> None:
    """Raise an error if the model lacks what is claimed, or if an optimizer cannot run on its device."""
    from locaudit.methods.optimizers import resolve_optimizer

    claim = inputs.claim
    if inputs.given is not None:
        inputs.given.check(model.shape)
    model.check_kind("head" if claim is None else claim.kind)
    if claim is not None:
        find_kind(claim).check(claim, model.shape)
    for name, settings in config.methods.items():
        if METHODS[name].trained and hasattr(settings, "optimizer"):
            resolve_optimizer(settings.optimizer, model.device)


def _check_rests(config: AuditConfig) -> None:
    """Raise `ConfigError` for rests of controls without the rest of the claim, or of more controls than there are."""
    if config.rest_controls and not (config.rest and config.whole_model):
        raise ConfigError(
            got=f"rest_controls = {config.rest_controls} with rest = {config.rest}, whole_model = {config.whole_model}",
            expected="the edit of all but the claim, with which they are compared",
            remedy="set rest and whole_model to true, or rest_controls to 0",
        )
    if config.rest_controls > config.controls:
        raise ConfigError(
            got=f"rest_controls = {config.rest_controls} with controls = {config.controls}",
            expected="at most as many as there are controls",
            remedy="raise controls or lower rest_controls",
        )


def _check_claim(config: AuditConfig, claim: Location | None, shape: Shape) -> tuple[str, ...]:
    """Raise an error if the claim does not fit the model, or is so large that there are no controls for it.

    Returns a sentence about each null that has no place or too few to test.
    """
    n_heads = shape.n_layers * shape.n_heads
    if claim is not None:
        find_kind(claim).check(claim, shape)
        known: list[NullId] = [null for null in config.nulls if null not in BY_VALUE]  # known without the model
        try:
            found, notes = draw_nulls(claim, shape, known, 1, disjoint=config.disjoint)
        except LocationError:
            if len(known) == len(config.nulls):
                raise
            return ()
        return (*notes, *note_few(found, config.level))
    elif config.probe.top_k >= n_heads:
        raise LocationError(
            got=f"probe.top_k = {config.probe.top_k} for {config.model}, which has {n_heads} heads",
            expected=f"1 to {n_heads - 1}, which leaves heads for controls",
            remedy="lower probe.top_k",
        )
    return ()


def note_few(controls: Mapping[str, Controls], level: float) -> list[str]:
    """A sentence about each null with too few places for p to reach the level."""
    few = {name: too_few(name, found.population, level) for name, found in controls.items()}
    return [f"The null {name}: {text}." for name, text in few.items() if text]


def _read_claim_file(path: str) -> Registration:
    """Read a claim file, and write its claim in the form that records have."""
    registration = read_registration(path)
    claim = registration.values["claim"]
    if claim is None:
        return registration
    values = dict(registration.values)
    how = {name: values.pop(f"claim_{name}") for name in ("format", "top_k", "threshold") if f"claim_{name}" in values}
    found = read_claim(claim, **how)
    if found.format:
        raise ConfigError(
            got=f"the claim {claim} in {path}, a file that can change after it was registered",
            expected="the location itself",
            remedy=f'write claim: "{found.location}"',
        )
    return replace(registration, values={**values, "claim": str(found.location)})


def _check_objects(
    registration: Registration,
    behaviour: Behaviour | None,
    judges: Mapping[str, Judge] | None,
    model: Model | None,
) -> None:
    """Raise `ConfigError` if objects passed from Python differ from what the claim file names."""
    values = registration.values
    for name, thing in (("model", model), ("behaviour", behaviour)):
        if thing is not None and values.get(name, thing.name) != thing.name:
            raise ConfigError(
                got=f"the {name} {thing.name!r} from Python, and {values[name]!r} in {registration.file}",
                expected="what the claim file fixed before the run",
                remedy=f"pass {values[name]!r} as {name}, so that it is loaded by that name",
            )
    if judges is not None and "judges" in values:
        raise ConfigError(
            got=f"judges from Python, and others in {registration.file}",
            expected="what the claim file fixed before the run",
            remedy="leave judges out of the call, so that those of the claim file are loaded",
        )


def _check_score(config: AuditConfig, judges: Mapping[str, object]) -> None:
    """Raise `ConfigError` if the score needs a judge and there is none."""
    score = resolve_score(config.score, tuple(judges))
    needed = [aspect for aspect in find_score(score).needs if aspect != "*"]
    if any(aspect not in judges for aspect in needed):
        raise ConfigError(
            got=f"score = {score} without a judge of {' and '.join(a for a in needed if a not in judges)}",
            expected=f"a judge of {' and '.join(needed)}",
            remedy=f"set {' and '.join(f'judges.{a}.kind' for a in needed)}, or choose a score such as mc2",
        )
