"""Run an audit into a folder, or go on with one that was interrupted."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path

import torch

from locaudit.activations import collect_activations
from locaudit.cache import open_cache
from locaudit.config import AuditConfig
from locaudit.data import Behaviour, Split, load_behaviour, split_questions
from locaudit.data.prompts import load_primer
from locaudit.errors import ConfigError, RunFolderError
from locaudit.evaluation import read_drift_text
from locaudit.judges import Judge
from locaudit.locations import Location, parse_location
from locaudit.models import Model, load_model
from locaudit.probes import Probes, fit_probes
from locaudit.records import TrialSpec
from locaudit.runner.banks import describe, run_within_memory, with_banks
from locaudit.runner.judging import build_judges, check_judges, describe_judges, estimate_cost, judge_answers
from locaudit.runner.plan import build_plan, context_hash, cost
from locaudit.runner.prepare import prepare_probes, prepare_shared
from locaudit.runner.progress import Meter, show_progress
from locaudit.stats import components, resolve_score
from locaudit.stats.judged import ASPECT_NAMES
from locaudit.store import HeldOutQuestion, Store, open_run, write_atomically
from locaudit.trial import Shared, scored_splits


def run_audit(
    config: AuditConfig,
    out: str | Path,
    *,
    model: Model | None = None,
    behaviour: Behaviour | None = None,
    judges: Mapping[str, Judge] | None = None,
    progress: bool = True,
) -> None:
    """Run every trial of the plan that has no record yet. `model` and `behaviour` take the place of loading by name.

    `judges` (``truth``, ``info``) takes the place of the judges in the settings. Answers are judged as their trials
    end; those that have no judgement from an earlier attempt are judged first.

    Killed at any moment and started again, it ends with the same records: each group of trials is one transaction, a
    trial depends only on its identity and on what all share, and what all share is written once.
    """
    behaviour = behaviour or load_behaviour(config.behaviour)
    split = _split(config, behaviour)
    primer = load_primer(config.prompt.primer)
    drift_text = read_drift_text(config.evaluation.drift_text)
    given = parse_location(config.claim) if config.claim is not None else None
    if given is not None:  # what a claim file says now, so that changing it later cannot mix two claims in one folder
        config = replace(config, claim=str(given))
    generates = config.evaluation.max_new_tokens > 0
    if judges is None:  # before the folder is touched: a refused command leaves a finished run as it is
        asks = (behaviour.target, behaviour.retention)
        judges = build_judges(config.judges, asks, generates=generates, device=config.loading.device)
    check_judges(judges)
    _check_score(config, judges)
    with open_run(out, config) as store, show_progress(progress) as meter, closing(open_cache()) as cache:
        if model is None:
            meter.say(f"loading {config.model}")
            model = _load(config)
        if given is not None:
            given.check(model.n_layers, model.n_units(given.kind))
        context = context_hash(config, model, split, primer, drift_text)
        _check_same_inputs(store, context)
        probes, theta = prepare_probes(store, model, split.train, given, context, meter.say)
        claim = given or probes.top(config.probe.top_k)
        banks = dict(store.fact("banks") or {})  # as before where a run goes on, so that it ends with the same bytes
        config = with_banks(config, model, split, primer, banks.get(model.device.type))
        store.set_fact("banks", banks | {model.device.type: [config.optimal.bank_size, config.evaluation.bank_size]})
        groups = build_plan(config, model, claim, context)
        _note_facts(store, model, behaviour, split, claim, given is not None, probes, groups)
        _note_judges(store, judges, split)
        shared = replace(prepare_shared(store, model, split, primer, theta, cache, context, meter.say), config=config)
        n_answers = sum(len(store.questions(name)) for g in groups for s in g for name in scored_splits(config, s))
        for line in estimate_cost(judges, store.questions("test"), n_answers if generates else 0):
            meter.say(line)
        judge_answers(judges, store, store.records(), cache, meter.say)
        _run_groups(store, shared, groups, judges, meter)


def run_probes(config: AuditConfig) -> Probes:
    """Probes of every head, fitted on the training questions; writes nothing."""
    split = _split(config, load_behaviour(config.behaviour))
    with show_progress() as meter:
        meter.say(f"loading {config.model}")
        model = _load(config)
        meter.say("reading activations of the training questions")
        activations = collect_activations(model, split.train, context=config.probe.context, seed=config.seed)
    return fit_probes(
        activations, inverse_l2=config.probe.inverse_l2, val_fraction=config.probe.val_fraction, seed=config.seed
    )


def _split(config: AuditConfig, behaviour: Behaviour) -> Split:
    s = config.split
    return split_questions(
        behaviour, s.fractions, seed=s.seed, max_train=s.max_train, max_val=s.max_val, max_test=s.max_test
    )


def _load(config: AuditConfig) -> Model:
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


def _note_judges(store: Store, judges: Mapping[str, Judge], split: Split) -> None:
    store.set_fact("judges", describe_judges(judges))
    store.set_questions(
        {
            name: [HeldOutQuestion(q.id, q.text, q.true, q.false) for q in getattr(split, name)]
            for name in ("val", "test")
        }
    )


def _run_groups(
    store: Store,
    shared: Shared,
    groups: Sequence[Sequence[TrialSpec]],
    judges: Mapping[str, Judge],
    meter: Meter,
) -> None:
    done = store.done()
    todo = [[spec for spec in group if spec.trial_id not in done] for group in groups]
    todo = [group for group in todo if group]
    left: dict[str, float] = {}
    for group in todo:
        left[group[0].method] = left.get(group[0].method, 0.0) + cost(shared, group)
    n_trials = sum(map(len, groups))
    meter.start(left, n_trials - sum(map(len, todo)), n_trials)
    ids = {name: [question.id for question in held.questions] for name, held in shared.splits.items()}
    limits: dict[str, int] = {}
    for group in todo:
        meter.begin(describe(group))
        started = time.monotonic()
        for results in run_within_memory(shared, group, limits, meter.say):
            for record, edit in results:
                if edit is not None:
                    write_atomically(store.edits / record.edit, edit.to_bytes())
            store.add([record for record, _ in results], ids, time.monotonic() - started)
            started = time.monotonic()
            judge_answers(judges, store, [record for record, _ in results], shared.cache, meter.say)
            for record, _ in results:
                if record.status == "diverged":
                    meter.say(f"{describe([record.spec])}: diverged ({record.message}); the audit goes on")
        meter.end(group[0].method, cost(shared, group), len(group))


def _check_same_inputs(store: Store, context: str) -> None:
    """A folder holds trials of one model and one set of questions, whatever their names say."""
    found = store.fact("context")
    if found is None or not store.done():
        store.set_fact("context", context)
    elif found != context:
        raise RunFolderError(
            got=f"{store.folder}, made with other model weights, questions or primer text under the same names",
            expected="the same inputs as before",
            remedy="restore the files it was made with to resume, or choose another --out",
        )


def _note_facts(
    store: Store,
    model: Model,
    behaviour: Behaviour,
    split: Split,
    claim: Location,
    is_given: bool,
    probes: Probes,
    groups: Sequence[Sequence[TrialSpec]],
) -> None:
    store.set_fact(
        "probes",
        {
            "kind": probes.kind,
            "val_accuracy": probes.val_accuracy.tolist(),
            "majority": probes.majority,
            "n_train": probes.n_train,
            "n_val": probes.n_val,
            "context": store.config.probe.context,
            "units": [list(unit) for unit in probes.ranking()[: max(len(claim), store.config.probe.top_k)]],
        },
    )
    store.set_fact(
        "run",
        {
            "model": model.name,
            "fingerprint": model.fingerprint,
            "n_layers": model.n_layers,
            "n_heads": model.n_heads,
            "n_units": model.n_layers * model.n_units(claim.kind),
            "behaviour": behaviour.name,
            "asks": [behaviour.target, behaviour.retention],
            "n_questions": {name: len(getattr(split, name)) for name in ("train", "val", "test")},
            "planned": sum(map(len, groups)),
            "claim": str(claim),
            "claim_source": "given" if is_given else "top-k probed heads",
            "versions": {
                "locaudit": metadata.version("locaudit"),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": metadata.version("transformers"),
            },
            "device": str(model.device),
            "threads": torch.get_num_threads(),
        },
    )
