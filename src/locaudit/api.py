"""The library's surface: five lines for the whole job.

model = load_model("smollm2-135m")
behaviour = load_behaviour("misconceptions")
probes = fit_probes(model, behaviour)
result = audit(model, behaviour, claim=probes.top(8), controls=19, out="runs/mine")
print(result.verdict)
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from locaudit.behaviours import Behaviour, Question, split_questions
from locaudit.behaviours.format import Prompt
from locaudit.claims import parse_location
from locaudit.config import AuditConfig, ProbeConfig, SplitConfig, merge_config
from locaudit.edits import Edit, Positions
from locaudit.errors import ModelError
from locaudit.judges import Judge
from locaudit.location import Location
from locaudit.measure.activations import Context, collect_activations
from locaudit.measure.forward import answer_log_probs
from locaudit.measure.residual import Residuals
from locaudit.measure.tree import plant
from locaudit.methods import Job, optimal
from locaudit.methods import probes as _probes
from locaudit.methods.iti import Direction, iti_edit, iti_theta
from locaudit.methods.probes import Probes
from locaudit.methods.settings import ITISettings, OptimalSettings
from locaudit.methods.training import TrainingData
from locaudit.models import Model
from locaudit.models.quiet import quiet_libraries
from locaudit.report import require_report_extra
from locaudit.report.repeats import write_repeats
from locaudit.report.result import AuditResult, read_result
from locaudit.run.audit import run_audit
from locaudit.run.repeats import run_repeats
from locaudit.stats import RepeatsVerdict
from locaudit.studies.paper import write_paper
from locaudit.studies.paper.config import PaperConfig, Preset, load_paper_preset
from locaudit.studies.paper.run import run_paper


def training_questions(behaviour: Behaviour, *, max_train: int | None = SplitConfig.max_train) -> tuple[Question, ...]:
    """Training questions of the default split, the same as `audit`'s, so that its test questions stay unseen."""
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
    """Probe every head (or neuron); of a `Behaviour`, only its training questions are read.

    ``prompt=Prompt("chat")`` reads activations in the model's chat format.
    """
    activations = collect_activations(model, _training(questions), context=context, kind=kind, prompt=prompt, seed=seed)
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
    """The ITI edit o + alpha sigma u at a location, from training questions. See `locaudit.methods.iti`."""
    place, train_on = parse_location(location), _training(questions)
    read = partial(collect_activations, model, train_on, kind=place.kind, prompt=prompt, seed=seed)
    activations = read(context=context)
    spread = read(context="next_question") if context == "answer" else None
    probes = _probes.fit_probes(activations, seed=seed, kind=place.kind) if direction == "probe" else None
    theta = iti_theta(activations, spread, direction=direction, probes=probes, seed=seed)
    return iti_edit(model, place, theta, alpha=alpha, positions=positions)


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
    """The best edit of a location, trained on training questions. See `locaudit.methods.optimal`.

    `strength` is tau of IPO or beta of DPO; `settings` are fields of `locaudit.methods.settings.OptimalSettings`:
    ``rank=2``, ``objective="dpo"``, ``epochs=1``. Raises `ModelError` if training diverges.
    """
    train_on = _training(questions)
    forest = plant(model.tokenizer, prompt or Prompt(), [(question.text, question.answers) for question in train_on])
    reference = tuple(sums[0] for sums in answer_log_probs(model, forest))
    data = TrainingData(forest, tuple(len(question.true) for question in train_on), reference)
    shared = SimpleNamespace(model=model, training=data, residuals={"train": Residuals(model, forest)}, row_tokens=None)
    (found,) = optimal.fit(shared, [Job(parse_location(location), strength, seed)], OptimalSettings(**settings))
    if found.edit is None:
        raise ModelError(
            got=f"a training that diverged ({found.message})",
            expected="finite losses",
            remedy="lower the learning rate",
        )
    return found.edit


@quiet_libraries()
def audit(
    model: Model | str | Path = AuditConfig.model,
    behaviour: Behaviour | str | Path = AuditConfig.behaviour,
    *,
    out: str | Path,
    config: AuditConfig | None = None,
    claim: Location | str | Sequence | None = None,
    judges: Mapping[str, Judge] | None = None,
    progress: bool = True,
    **settings: Any,
) -> AuditResult:
    """Run (or resume) an audit and write its report.

    `settings` are fields of `AuditConfig` over `config`; the nested groups take a mapping, as in the YAML file:
    ``audit(model, behaviour, out="runs/a", controls=39, methods={"optimal": {"strengths": [0.2]}})``. `judges` are
    judges of your own (`locaudit.judges.Judge`), ``truth`` and ``info``, in place of those in the settings.
    """
    run_audit(
        _resolve(model, behaviour, config, claim, settings),
        out,
        model=model if isinstance(model, Model) else None,
        behaviour=behaviour if isinstance(behaviour, Behaviour) else None,
        judges=judges,
        progress=progress,
    )
    result = read_result(out)
    result.write_report()
    return result


@dataclass(frozen=True)
class RepeatsResult:
    """What the repeats of an audit leave: one verdict over all, the folder and the page."""

    verdict: RepeatsVerdict
    folder: Path
    page: Path

    def __repr__(self) -> str:
        return f"RepeatsResult({str(self.folder)!r})\n{self.verdict!r}"


@quiet_libraries()
def audit_repeats(
    model: Model | str | Path = AuditConfig.model,
    behaviour: Behaviour | str | Path = AuditConfig.behaviour,
    *,
    out: str | Path,
    repeats: int,
    config: AuditConfig | None = None,
    claim: Location | str | Sequence | None = None,
    judges: Mapping[str, Judge] | None = None,
    progress: bool = True,
    **settings: Any,
) -> RepeatsResult:
    """Run (or resume) an audit with `repeats` training seeds and question splits, and write their report.

    The rest as in `audit`; each repeat is a run folder in `out`, for `read_result`.
    """
    require_report_extra()
    run_repeats(
        _resolve(model, behaviour, config, claim, settings),
        out,
        repeats,
        model=model if isinstance(model, Model) else None,
        behaviour=behaviour if isinstance(behaviour, Behaviour) else None,
        judges=judges,
        progress=progress,
    )
    page, found = write_repeats(out)
    return RepeatsResult(found.verdict, Path(out), page)


@dataclass(frozen=True)
class PaperResult:
    """What the paper's study leaves: every number (as in numbers.json), the folder and the page."""

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
    """Run (or resume) the paper's whole study and write its figures, numbers, tables and page.

    `settings` are fields of `PaperConfig` over the preset, as in `audit`: ``paper(model, "TruthfulQA.csv", out="p",
    preset="small", random_heads=12)``.
    """
    values: dict[str, Any] = {key: _plain(value) for key, value in settings.items()}
    values["model"] = model.name if isinstance(model, Model) else str(model)
    values["data"] = data.name if isinstance(data, Behaviour) else str(data)
    run_paper(
        merge_config(load_paper_preset(preset), values),
        out,
        model=model if isinstance(model, Model) else None,
        behaviour=data if isinstance(data, Behaviour) else None,
        judges=judges,
        progress=progress,
    )
    page = write_paper(out)
    return PaperResult(json.loads((Path(out) / "numbers.json").read_text(encoding="utf-8")), Path(out), page)


def _resolve(
    model: Model | str | Path,
    behaviour: Behaviour | str | Path,
    config: AuditConfig | None,
    claim: Location | str | Sequence | None,
    settings: Mapping[str, Any],
) -> AuditConfig:
    values: dict[str, Any] = {key: _plain(value) for key, value in settings.items()}
    if claim is not None:
        values["claim"] = str(claim if isinstance(claim, str) else parse_location(claim))
    values["model"] = model.name if isinstance(model, Model) else str(model)
    values["behaviour"] = behaviour.name if isinstance(behaviour, Behaviour) else str(behaviour)
    return merge_config(config or AuditConfig(), values)


def _training(questions: Behaviour | Sequence[Question]) -> Sequence[Question]:
    return training_questions(questions) if isinstance(questions, Behaviour) else questions


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value
