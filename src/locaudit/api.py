"""The functions of the Python interface. All of them can be imported from `locaudit`.

    model = load_model("smollm2-135m")
    behaviour = load_behaviour("misconceptions")
    probes = fit_probes(model, behaviour)
    result = audit(model, behaviour, claim=probes.top(8), controls=19, out="runs/mine")
    print(result.verdict)

Bad input raises a `LocauditError` that says what was got, what was expected and what to do.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from locaudit.behaviours import BUNDLED, Behaviour, Question, load_behaviour, split_questions
from locaudit.behaviours.format import Prompt
from locaudit.checkpoints import read_shape
from locaudit.claims import Claim, Ranking, parse_location, read_claim
from locaudit.claims.kinds import blocks_for
from locaudit.config import AuditConfig, ProbeConfig, SplitConfig, merge_config
from locaudit.edits import Edit
from locaudit.errors import ModelError
from locaudit.judges import Judge
from locaudit.location import Location, Positions
from locaudit.measure.activations import Context, collect_activations
from locaudit.measure.forward import answer_log_probs
from locaudit.measure.residual import Residuals
from locaudit.measure.tree import plant
from locaudit.methods import Job, optimal
from locaudit.methods import probes as _probes
from locaudit.methods.base import PatchWith
from locaudit.methods.horizon import horizon, measure_objective
from locaudit.methods.iti import Direction, iti_edit, iti_theta
from locaudit.methods.probes import Probes
from locaudit.methods.settings import HORIZONS, ITISettings, OptimalSettings
from locaudit.methods.training import TrainingData
from locaudit.models import Model
from locaudit.models.quiet import quiet_libraries
from locaudit.report import require_report_extra
from locaudit.report.repeats import write_repeats
from locaudit.report.result import AuditResult, read_result
from locaudit.run.audit import run_audit
from locaudit.run.find import find_places
from locaudit.run.repeats import run_repeats
from locaudit.stats import RepeatsVerdict
from locaudit.store.folder import SAVED_BEHAVIOUR, saved_config
from locaudit.studies.paper import write_paper
from locaudit.studies.paper.config import PaperConfig, Preset, load_paper_preset
from locaudit.studies.paper.run import run_paper

Rows = Iterable[Mapping[str, Any]]
"""Rows of a behaviour: a list of mappings, a ``datasets.Dataset`` or a data frame."""


def training_questions(behaviour: Behaviour, *, max_train: int | None = SplitConfig.max_train) -> tuple[Question, ...]:
    """The training questions of a behaviour in the default split of `audit`.

    Anything that is fitted on them has not seen the test questions of an audit with the default split.

    Args:
        behaviour: Questions with true and false answers, from `load_behaviour`.
        max_train: Largest number of training questions; None for all.

    Returns:
        The training questions, in the order of the split.

    Raises:
        DataError: The behaviour has too few questions to be split.

    Example:
        >>> questions = training_questions(load_behaviour("misconceptions"))

    """
    return split_questions(behaviour, max_train=max_train).train


@quiet_libraries()
def fit_probes(
    model: Model,
    questions: Behaviour | Sequence[Question],
    *,
    context: Context = ProbeConfig.context,
    kind: str = "head",
    inverse_l2: float = ProbeConfig.inverse_l2,
    val_fraction: float = ProbeConfig.val_fraction,
    prompt: Prompt | None = None,
    seed: int = AuditConfig.seed,
) -> Probes:
    """Fit a linear probe of true against false answers for every head, or every unit of another kind.

    Args:
        model: A model from `load_model` or `wrap_model`.
        questions: A behaviour, of which only the training questions are used, or a sequence of questions.
        context: Text whose last token is read: ``answer`` (question and answer) or ``next_question`` (followed by
            another question, as in the paper).
        kind: Kind of the units: ``head``, ``neuron``, or another whose units are blocks of coordinates.
        inverse_l2: Inverse strength C of the probes' L2 penalty.
        val_fraction: Share of the questions that is held out to measure accuracy.
        prompt: Format of the questions; ``Prompt("chat")`` is the model's chat format. None: the behaviour's
            own, ``Q: ... A: ...`` for most.
        seed: Seed for choosing which questions are held out and, if another question is appended to each answer,
            which one.

    Returns:
        The probes. ``probes.val_accuracy`` is a tensor (layers, units), and ``probes.top(8)`` is the location of the
        8 units with the highest held-out accuracy.

    Raises:
        ConfigError: An unknown context, a kind without blocks, or no questions.
        DataError: Too few questions.
        ModelError: A question does not fit into the model's context.

    Example:
        >>> probes = fit_probes(load_model("smollm2-135m"), load_behaviour("misconceptions"))
        >>> claim = probes.top(8)

    """
    questions = _of_questions(questions)
    prompt, train_on = prompt or _prompt(questions), _training(questions)
    activations = collect_activations(model, train_on, context=context, kind=kind, prompt=prompt, seed=seed)
    return _probes.fit_probes(activations, inverse_l2=inverse_l2, val_fraction=val_fraction, seed=seed, kind=kind)


@quiet_libraries()
def fit_iti(
    model: Model,
    questions: Behaviour | Sequence[Question],
    location: Location | str | Sequence,
    *,
    alpha: float = 15.0,
    direction: Direction = ITISettings.direction,
    positions: Positions = ITISettings.positions,
    context: Context = ProbeConfig.context,
    prompt: Prompt | None = None,
    seed: int = AuditConfig.seed,
) -> Edit:
    """Fit an inference-time intervention (ITI): h' = h + alpha sigma u at each unit of a location.

    u is the unit's direction, with norm 1, and sigma is the standard deviation of its activations along u. Both are
    computed from training questions (`locaudit.methods.iti`).

    Args:
        model: A model from `load_model` or `wrap_model`.
        questions: A behaviour, of which only the training questions are used, or a sequence of questions.
        location: Where to edit: a `Location` such as ``probes.top(8)``, or a text such as ``"14.3,15.7"``.
        alpha: Strength of the edit, in standard deviations.
        direction: u is the difference of the class means (``mass_mean``), the probe's weights (``probe``), or
            ``random``.
        positions: Tokens that are edited, such as ``all`` or ``answer`` (`locaudit.location.Positions`).
        context: Text whose last token is read, as in `fit_probes`.
        prompt: Format of the questions, as in `fit_probes`.
        seed: Seed of probes, of random directions and of the questions that follow answers.

    Returns:
        The edit. ``with edit.on(model) as lm`` runs the model under it.

    Raises:
        LocationError: The location cannot be read or does not fit the model.
        ConfigError: An unknown direction, context or positions, or an alpha that is not finite.
        ModelError: A question does not fit into the model's context.

    Example:
        >>> edit = fit_iti(model, behaviour, "14.3,15.7", alpha=10)
        >>> with edit.on(model) as lm:
        ...     lm.generate(**inputs)

    """
    questions = _of_questions(questions)
    place, train_on = parse_location(location), _training(questions)
    prompt = prompt or _prompt(questions)
    kind = blocks_for(place.kind, model.shape)
    read = partial(collect_activations, model, train_on, kind=kind, prompt=prompt, seed=seed)
    activations = read(context=context)
    spread = read(context="next_question") if context == "answer" else None
    probes = _probes.fit_probes(activations, seed=seed, kind=kind) if direction == "probe" else None
    theta = iti_theta(activations, spread, direction=direction, probes=probes, seed=seed)
    along = {site.layer: (spread or activations).values[:, site.layer].flatten(1) for site in model.spans(place)}
    return iti_edit(model, place, theta, alpha=alpha, positions=positions, spread=along)


@quiet_libraries()
def fit_optimal(
    model: Model,
    questions: Behaviour | Sequence[Question],
    location: Location | str | Sequence,
    *,
    strength: float = 0.2,
    prompt: Prompt | None = None,
    seed: int = AuditConfig.seed,
    **settings: Any,
) -> Edit:
    """Train the optimal edit of a location: a low-rank update h' = h + B A h that writes only there.

    It is trained by preference optimization to raise the log-probabilities of true answers over those of false ones
    (`locaudit.methods.optimal`).

    Args:
        model: A model from `load_model` or `wrap_model`. Its weights are not changed.
        questions: A behaviour, of which only the training questions are used, or a sequence of questions.
        location: Where to edit: a `Location` such as ``probes.top(8)``, or a text such as ``"14.3,15.7"``.
        strength: tau of IPO or beta of DPO. Smaller values allow larger changes.
        prompt: Format of the questions, as in `fit_probes`.
        seed: Seed of the order of training and of the initial A.
        **settings: Fields of `locaudit.methods.settings.OptimalSettings`, for example ``rank=2``,
            ``objective="dpo"`` or ``epochs=1``. The default is to train for 2, 4, 8, ... epochs, until twice as
            many gain little.

    Returns:
        The edit. ``with edit.on(model) as lm`` runs the model under it, and ``edit.save(path)`` saves it.

    Raises:
        LocationError: The location cannot be read or does not fit the model.
        ConfigError: A setting is out of range.
        ModelError: Training diverged, or a question does not fit into the model's context.

    Example:
        >>> edit = fit_optimal(model, behaviour, "14.3,15.7", rank=2)
        >>> edit.save("edit.safetensors")

    """
    questions = _of_questions(questions)
    train_on = _training(questions)
    prompt = prompt or _prompt(questions)
    subjects = [q.subject for q in train_on] if settings.get("positions") == "subject" else []
    forest = plant(model.tokenizer, prompt, [(q.text, q.answers) for q in train_on], subjects)
    reference = tuple(sums[0] for sums in answer_log_probs(model, forest))
    data = TrainingData(forest, tuple(len(question.true) for question in train_on), reference)
    shared = SimpleNamespace(model=model, training=data, residuals={"train": Residuals(model, forest)}, row_tokens=None)
    job, chosen = Job(parse_location(location), strength, seed), OptimalSettings(**settings)
    if chosen.epochs == "auto":
        fits, objectives = {}, []
        while (epochs := horizon(objectives)) is None:
            given = replace(chosen, epochs=HORIZONS[len(objectives)])
            (fits[given.epochs],) = optimal.fit(shared, [job], given)
            objectives.append(measure_objective(model, data, fits[given.epochs], strength, given))
        found = fits[epochs]
    else:
        (found,) = optimal.fit(shared, [job], chosen)
    if found.edit is None:
        raise ModelError(
            got=f"training that diverged ({found.message})",
            expected="finite losses",
            remedy="lower learning_rate",
        )
    return found.edit


@quiet_libraries()
def audit(
    model: Model | str | Path = AuditConfig.model,
    behaviour: Behaviour | str | Path | Rows = AuditConfig.behaviour,
    *,
    out: str | Path,
    config: AuditConfig | None = None,
    claim: Claim | Location | str | Path | Sequence | Mapping | None = None,
    judges: Mapping[str, Judge] | None = None,
    progress: bool = True,
    **settings: Any,
) -> AuditResult:
    """Run an audit, or resume or extend one, and write its report.

    The audit edits the claimed location, random locations of the same size (controls) and the whole model, and
    compares their scores on held-out questions. If it is interrupted, the same call continues where it stopped.

    Args:
        model: A model from `load_model` or `wrap_model`, or its name: a bundled name, a folder or a hub id.
        behaviour: Questions with true and false answers from `load_behaviour`, or what it reads: the name or path of
            such data, or rows (a list of mappings, a data frame, a ``datasets.Dataset``). An object is saved as
            ``behaviour.json`` in the run folder, so that ``locaudit audit RUN/config.yaml`` runs the same audit again.
        out: The run folder: a new one, or that of the same audit.
        config: Settings to start from, from `load_config`; None for the defaults. `model` and `behaviour` are always
            those of this call.
        claim: The claimed location: a `Location`, a text such as ``"14.3,15.7"``, a file, or anything else that
            `read_claim` reads. None takes the claim of `config` or, without one, the heads with the most accurate
            probes.
        judges: Judges of your own (`locaudit.judges.Judge`), by aspect, in place of those in the settings.
        progress: Whether to show progress on standard error.
        **settings: Fields of `AuditConfig` that replace those of `config`, such as ``controls=39``. Groups of settings
            take a mapping, as in the YAML file.

    Returns:
        The result: ``result.verdict``, tables such as ``result.trials()``, and ``result.report``, the path of the
        HTML page.

    Raises:
        ConfigError: A setting is unknown or out of range.
        DataError: The behaviour's file has another format or too few questions.
        LocationError: The claim cannot be read or does not fit the model.
        ModelError: The model cannot be audited, or the device has too little memory.
        RunFolderError: `out` belongs to another audit or is in use, or the disk is full.
        LocauditError: The extra ``report`` is not installed. The trials are kept.

    Example:
        >>> result = audit(model, behaviour, claim="14.3,15.7", controls=39, out="runs/mine",
        ...                methods={"optimal": {"strengths": [0.2]}})
        >>> print(result.verdict)

    """
    behaviour = _of_rows(behaviour, settings)
    settled = _resolve(model, behaviour, config, claim, settings, out)
    run_audit(settled, out, **_objects(model, behaviour), judges=judges, progress=progress)
    result = read_result(out)
    result.write_report()
    return result


@quiet_libraries()
def find(
    model: Model | str | Path = AuditConfig.model,
    behaviour: Behaviour | str | Path | Rows = AuditConfig.behaviour,
    *,
    by: str = "probe",
    kind: str = "head",
    patch_with: PatchWith = "mean",
    positions: Positions = "all",
    config: AuditConfig | None = None,
    progress: bool = True,
    **settings: Any,
) -> Ranking:
    """Rank all places of a kind by a rule, on the training questions of an audit with the same settings.

    Args:
        model: As in `audit`.
        behaviour: As in `audit`.
        by: The rule (`locaudit.methods.rules`): ``probe``, ``mean-difference``, ``gradient``, ``patching``, or one that
            a plug-in adds.
        kind: Kind of place: ``head``, ``kv-group``, ``attention``, ``neuron``, ``mlp`` or ``residual``.
        patch_with: What ``gradient`` and ``patching`` replace a unit's output by: its ``mean`` over the training texts,
            or its value after the question's paired prompt (``pair``, see `Question.paired`).
        positions: Tokens at which they replace it, as `Edit.positions`.
        config: As in `audit`.
        progress: As in `audit`.
        **settings: As in `audit`, such as ``split={"max_train": 60}``.

    Returns:
        The ranking: ``scores`` by unit, best first; ``top(8)`` is a claim, ``rows`` a table, and ``save`` writes it.

    Raises:
        ConfigError: Unknown rule, kind or setting, or `patch_with` or `positions` for a rule that replaces nothing.
        DataError: Too few questions, or one without the subject or paired prompt that is needed.
        ModelError: The model has no places of this kind, or its scores are not finite.

    Example:
        >>> found = find(model, behaviour, by="gradient")
        >>> audit(model, behaviour, claim=found.top(8), out="runs/mine")

    """
    behaviour = _of_rows(behaviour, settings)
    values: dict[str, Any] = {key: _plain(value) for key, value in settings.items()}
    given = _objects(model, behaviour)
    values |= {name: str(x) for name, x in (("model", model), ("behaviour", behaviour)) if given[name] is None}
    how: dict[str, Any] = {"patch_with": patch_with, "positions": positions, "progress": progress}
    return find_places(merge_config(config or AuditConfig(), values), by, kind, **given, **how)


@dataclass(frozen=True)
class RepeatsResult:
    """The result of `audit_repeats`: the verdict over all repeats, their folder, and the path of the HTML page."""

    verdict: RepeatsVerdict
    folder: Path
    page: Path

    def __repr__(self) -> str:
        return f"RepeatsResult({str(self.folder)!r})\n{self.verdict!r}"


@quiet_libraries()
def audit_repeats(
    model: Model | str | Path = AuditConfig.model,
    behaviour: Behaviour | str | Path | Rows = AuditConfig.behaviour,
    *,
    out: str | Path,
    repeats: int,
    config: AuditConfig | None = None,
    claim: Claim | Location | str | Path | Sequence | Mapping | None = None,
    judges: Mapping[str, Judge] | None = None,
    progress: bool = True,
    **settings: Any,
) -> RepeatsResult:
    """Run an audit several times, with different training seeds and question splits, and write one report.

    If it is interrupted, the same call continues where it stopped.

    Args:
        model: As in `audit`.
        behaviour: As in `audit`. One with a fixed split keeps it, so that only training seeds differ.
        out: The folder of the repeats. Each repeat is a run folder in it, ``repeat-0`` and so on, for `read_result`.
        repeats: Number of repeats, at least 2. It can be raised later; the report then says so.
        config: As in `audit`. Controls cannot stop early: ``stopping`` must be ``fixed``.
        claim: As in `audit`. Without any, each repeat takes the heads that its own probes rank best.
        judges: As in `audit`.
        progress: As in `audit`.
        **settings: As in `audit`.

    Returns:
        The verdict over all repeats, the folder, and the path of the HTML page.

    Raises:
        ConfigError: The number of repeats or a setting is out of range, or the number is lower than before.
        RunFolderError: `out` holds a single audit, a study, or repeats of another audit.
        LocauditError: Other errors of `audit`. The extra ``report`` is checked before the first trial.

    Example:
        >>> result = audit_repeats(model, behaviour, claim="14.3,15.7", repeats=5, out="runs/repeats")
        >>> result.verdict

    """
    require_report_extra()
    behaviour = _of_rows(behaviour, settings)
    settled = _resolve(model, behaviour, config, claim, settings, out)
    run_repeats(settled, out, repeats, **_objects(model, behaviour), judges=judges, progress=progress)
    page, found = write_repeats(out)
    return RepeatsResult(found.verdict, Path(out), page)


@dataclass(frozen=True)
class PaperResult:
    """The result of `paper`: all numbers (as in numbers.json), the folder, and the path of the HTML page."""

    numbers: Mapping[str, Any]
    folder: Path
    page: Path

    def __repr__(self) -> str:
        outcomes = Counter(claim["outcome"] for claim in self.numbers["claims"])
        said = ", ".join(f"{n} {outcome}" for outcome, n in outcomes.items())
        return f"PaperResult({str(self.folder)!r}: {said})"


@quiet_libraries()
def paper(
    model: Model | str | Path = PaperConfig.model,
    data: Behaviour | str | Path = PaperConfig.data,
    *,
    out: str | Path,
    preset: Preset = "full",
    judges: Mapping[str, Judge] | None = None,
    progress: bool = True,
    **settings: Any,
) -> PaperResult:
    """Run the whole study of the paper on a model and data of your choice, and write figures, numbers and a page.

    If it is interrupted, the same call continues where it stopped.

    Args:
        model: A model from `load_model` or `wrap_model`, or its name: a bundled name, a folder or a hub id.
        data: TruthfulQA as in the paper (a CSV or the hub id), or any behaviour whose answers have judges.
        out: The folder of the study.
        preset: ``full`` (the paper's grids and training), ``decide`` (about 15 hours on two cores) or ``smoke`` (a few
            minutes).
        judges: Judges of your own (`locaudit.judges.Judge`), by aspect, in place of those in the settings.
        progress: Whether to show progress on standard error.
        **settings: Fields of `PaperConfig` that replace those of the preset. Groups of settings take a mapping.

    Returns:
        All numbers of the study, the folder, and the path of the HTML page.

    Raises:
        LocauditError: As in `audit`.

    Example:
        >>> result = paper("smollm2-135m", "TruthfulQA.csv", out="runs/paper", preset="decide", random_heads=12)
        >>> result.page

    """
    values: dict[str, Any] = {key: _plain(value) for key, value in settings.items()}
    values["model"] = model.name if isinstance(model, Model) else str(model)
    values["data"] = data.name if isinstance(data, Behaviour) else str(data)
    chosen = merge_config(load_paper_preset(preset), values)
    run_paper(chosen, out, **_objects(model, data), judges=judges, progress=progress)
    page = write_paper(out)
    return PaperResult(json.loads((Path(out) / "numbers.json").read_text(encoding="utf-8")), Path(out), page)


def _objects(model: Any, behaviour: Any) -> dict[str, Any]:
    """Model and behaviour if they were given as objects; None for one that was given by its name."""
    return {
        "model": model if isinstance(model, Model) else None,
        "behaviour": behaviour if isinstance(behaviour, Behaviour) else None,
    }


def _resolve(
    model: Model | str | Path,
    behaviour: Behaviour | str | Path,
    config: AuditConfig | None,
    claim: Claim | Location | str | Path | Sequence | Mapping | None,
    settings: Mapping[str, Any],
    out: str | Path,
) -> AuditConfig:
    values: dict[str, Any] = {key: _plain(value) for key, value in settings.items()}
    if isinstance(claim, str | Path):
        values["claim"] = str(claim)
    elif claim is not None:
        rule = {name: values.pop(f"claim_{name}", None) for name in ("top_k", "threshold")}
        found = read_claim(claim, **rule)
        if found.sizes or found.scored:  # only the location itself gets into the settings
            shape = model.shape if isinstance(model, Model) else read_shape(str(model))
            if shape is not None:
                found.check(shape)
        values["claim"] = str(found.location)
    values["model"] = model.name if isinstance(model, Model) else str(model)
    values["behaviour"] = _called(behaviour, out) if isinstance(behaviour, Behaviour) else str(behaviour)
    return merge_config(config or AuditConfig(), values)


def _called(behaviour: Behaviour, out: str | Path) -> str:
    """What the settings call a behaviour given as an object: a name that loads it, or the file that will hold it.

    A run that is continued keeps what it called it.
    """
    before = saved_config(out)
    if before is not None and (before.behaviour == behaviour.name or Path(before.behaviour).name == SAVED_BEHAVIOUR):
        return before.behaviour
    is_bundled = behaviour.name in BUNDLED and load_behaviour(behaviour.name) == behaviour
    return behaviour.name if is_bundled else str(Path(out) / SAVED_BEHAVIOUR)


def _of_rows(behaviour: Behaviour | str | Path | Rows, settings: Mapping[str, Any]) -> Behaviour | str | Path:
    if isinstance(behaviour, Behaviour | str | Path):
        return behaviour
    format, columns = settings.get("behaviour_format", "auto"), settings.get("behaviour_columns")
    return load_behaviour(behaviour, format=format, columns=columns)


def _of_questions(given: Any) -> Behaviour | Sequence[Question]:
    """Questions as they are; a behaviour given by its name, path or rows is loaded."""
    if isinstance(given, Behaviour):
        return given
    if isinstance(given, Sequence) and all(isinstance(question, Question) for question in given):
        return given
    return load_behaviour(given)


def _training(questions: Behaviour | Sequence[Question]) -> Sequence[Question]:
    return training_questions(questions) if isinstance(questions, Behaviour) else questions


def _prompt(questions: Behaviour | Sequence[Question]) -> Prompt:
    return Prompt(questions.style) if isinstance(questions, Behaviour) else Prompt()


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value
