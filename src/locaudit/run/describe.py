"""Make a run's manifest: the facts about model, data, claim, methods and judges that a report needs."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import torch

from locaudit.claims import Controls, find_kind
from locaudit.config import Registration
from locaudit.judges.base import Judge
from locaudit.judges.reference import ReferenceJudge
from locaudit.location import Location, Positions
from locaudit.measure.activations import Context
from locaudit.methods import Method
from locaudit.methods.horizon import is_plateau
from locaudit.methods.optimal import learning_rate
from locaudit.methods.optimizers import resolve_optimizer
from locaudit.methods.probes import Probes
from locaudit.methods.training import step_size
from locaudit.models.model import Model
from locaudit.records import DIRECTIONS
from locaudit.registry import METHODS
from locaudit.run.plan import Groups, null_of
from locaudit.run.subject import Inputs, prompt_positions
from locaudit.stats.phrases import MethodFacts
from locaudit.stats.sequential import MOST_CONTROLS, Null
from locaudit.store.manifest import JudgeFacts, Manifest, ProbeFacts

DRIFT_ON_PROMPTS = "on held-out prompts and their answers"


def make_manifest(
    inputs: Inputs,
    model: Model,
    claim: Location,
    probes: Probes | None,
    groups: Groups,
    controls: Mapping[str, Controls],
    banks: Mapping[str, tuple[int, int]],
    registration: Registration | None,
    lengths: Mapping[str, Any],
) -> Manifest:
    """The manifest of a run that is about to start or continue."""
    config, behaviour = inputs.config, inputs.behaviour
    kind, questions = find_kind(claim), behaviour.questions
    tried, nulls = {null_of(config, name) for name in config.methods}, {}
    if "places" in tried:
        nulls = {name: Null(len(found.locations), _countable(found.population)) for name, found in controls.items()}
    if DIRECTIONS in tried:
        nulls[DIRECTIONS] = Null(config.controls)
    return Manifest(
        model=f"{model.name} ({model.note})" if model.note else model.name,
        fingerprint=model.fingerprint,
        shape=model.shape,
        n_units=kind.n_units(model.shape),
        kind_plural=kind.plural,
        behaviour=behaviour.name,
        aspects=behaviour.aspects,
        n_questions={name: len(getattr(inputs.split, name)) for name in ("train", "val", "test")}
        | {name: len(questions) for name, (_, questions) in inputs.off_target.items()},
        data={
            "questions": len(questions),
            "true": sum(len(question.true) for question in questions),
            "false": sum(len(question.false) for question in questions),
        },
        claim=claim,
        claim_source="top-k probed heads" if inputs.claim is None else "given",
        methods={name: _method_facts(inputs, model, claim, name, lengths.get(name)) for name in config.methods},
        planned=sum(map(len, groups)),
        nulls=nulls,
        rest_controls=len({spec.control for group in groups for spec in group if spec.arm == "rest"} - {-1}),
        placebos=len({spec.control for group in groups for spec in group if spec.arm == "placebo"}),
        widen=config.widen,
        stopping=config.stopping,
        samples=config.evaluation.samples if config.evaluation.max_new_tokens else 0,
        versions={
            "locaudit": metadata.version("locaudit"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": metadata.version("transformers"),
        },
        device=describe_device(model.device),
        dtype=str(model.lm.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        judges=describe_judges(inputs.judges),
        probes=None
        if probes is None
        else _probe_facts(probes, max(len(claim), config.probe.top_k), config.probe.context),
        banks=banks,
        registration=registration,
        plugins=config.plugins,
        primer=inputs.scoring.primer,
        prompt=inputs.scoring.render(inputs.split.test[0].text, model.tokenizer),
        prompt_end=_prompt_end(inputs, model),
        drift_on=DRIFT_ON_PROMPTS if prompt_positions(config) else "",
        prompt_date=config.prompt.date if inputs.scoring.uses_clock(model.tokenizer) else None,
        notes=notes_on(inputs),
    )


def _countable(population: int | None) -> int | None:
    """The number of places; None if it is too large to matter."""
    return population if population is None or population <= MOST_CONTROLS else None


def notes_on(inputs: Inputs) -> tuple[str, ...]:
    """Warnings about the inputs that a reader should know before believing the scores."""
    notes = inputs.behaviour.notes
    if positions := prompt_positions(inputs.config):
        lacks = f"edits with positions {' and '.join(positions)} do not act on running text"
        notes += (f"Drift (KL and CE) is measured {DRIFT_ON_PROMPTS}: {lacks}.", *_note_neighbours(inputs, positions))
    is_like_truthfulqa = bool(inputs.behaviour.primer)  # only the bundled misconceptions and TruthfulQA have one
    if is_like_truthfulqa or not any(isinstance(judge, ReferenceJudge) for judge in inputs.judges.values()):
        return notes
    return (
        *notes,
        f"The bundled judge was fitted on answers to TruthfulQA; how accurate it is on {inputs.behaviour.name} was not "
        "measured. Choose another judge (--judge), or a score that needs none (--score reward_margin).",
    )


def _note_neighbours(inputs: Inputs, positions: Sequence[Positions]) -> tuple[str, ...]:
    """How many neighborhood prompts are not scored, because an edit of the subject needs theirs."""
    if "subject" not in positions or inputs.config.evaluation.max_prompts == 0:
        return ()
    asked = [(q, text) for q in (*inputs.split.val, *inputs.split.test) for text in q.neighborhood]
    lost = [text for q, text in asked if (q.category, text) not in inputs.neighbours]
    if not lost:
        return ()
    has_score = bool(inputs.held_out("neighborhood:test"))
    scored = "" if has_score else " There is no neighborhood score, because some question has none left."
    return (
        f"{len(lost)} of {len(asked)} neighborhood prompts are left out, such as {lost[0][:60]!r}: their subject is "
        f"not known, because no question of the same category has this wording.{scored}",
    )


def _prompt_end(inputs: Inputs, model: Model) -> str | None:
    """The last 40 characters before an answer in style ``chat``; None in other styles."""
    if inputs.scoring.style != "chat":
        return None
    return inputs.scoring.render(inputs.split.test[0].text, model.tokenizer)[-40:]


def describe_judges(judges: Mapping[str, Judge]) -> dict[str, JudgeFacts]:
    """Aspect -> name and fingerprint of its judge."""
    return {aspect: JudgeFacts(judge.name, judge.fingerprint) for aspect, judge in judges.items()}


def describe_device(device: torch.device) -> str:
    """The device as torch names it; a GPU with its model name: ``cuda:0 (NVIDIA A100)``."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _probe_facts(probes: Probes, n_best: int, context: Context) -> ProbeFacts:
    accuracy = tuple(map(tuple, probes.val_accuracy.tolist()))
    best = tuple(probes.ranking()[:n_best])
    return ProbeFacts(probes.kind, accuracy, probes.majority, probes.n_train, probes.n_val, context, best)


def _method_facts(inputs: Inputs, model: Model, claim: Location, name: str, lengths: Any) -> MethodFacts:
    method: Method = METHODS[name]
    settings = inputs.config.methods[name]
    training = _describe_training(inputs, model, claim, settings) if method.trained else {}
    if training and lengths:  # the training length was found
        training |= {"objectives": lengths, "plateau": all(is_plateau(x) for x in lengths.values())}
    n_strengths, null = len(method.strengths(settings)), null_of(inputs.config, name)
    symbol = method.symbol_of(settings)
    return MethodFacts(method.title, method.supports, method.trained, null, symbol, n_strengths, training)


def _describe_training(inputs: Inputs, model: Model, claim: Location, settings: Any) -> dict[str, Any]:
    """Facts about training, for a method whose settings are `locaudit.methods.settings.TrainingSettings`."""
    questions = inputs.split.train[: settings.max_questions]
    n_pairs = sum(len(question.true) * len(question.false) for question in questions)
    size = step_size(settings.batching, settings.batch_size)
    n_items = n_pairs if settings.batching == "pair" else len(questions)

    return {
        "n_questions": len(questions),
        "n_pairs": n_pairs,
        "epochs": settings.epochs,
        "n_steps": settings.epochs * -(-n_items // size),  # steps per epoch, rounded up
        "batching": settings.batching,
        "batch_size": size,
        "optimizer": resolve_optimizer(settings.optimizer, model.device),
        "learning_rate": {
            name: learning_rate(model.shape, place, settings, n_pairs / len(questions))
            for name, place in (("claim", claim), ("whole", Location.whole(claim.kind)))
        },
    }
