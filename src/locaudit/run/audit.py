"""Run an audit into a folder, or go on with one that was interrupted."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

from locaudit.behaviours import Behaviour, Split, load_behaviour
from locaudit.config import AuditConfig, Registration
from locaudit.errors import RunFolderError
from locaudit.judges import Judge
from locaudit.measure.activations import collect_activations
from locaudit.methods.probes import Probes, fit_probes
from locaudit.models import Model
from locaudit.records import TrialSpec
from locaudit.run.banks import describe, run_within_memory, with_banks
from locaudit.run.facts import note_facts
from locaudit.run.inputs import check_subject, load_subject, read_inputs, split_behaviour
from locaudit.run.judging import describe_judges, estimate_cost, judge_answers
from locaudit.run.plan import build_plan, context_hash, cost, draw_controls
from locaudit.run.prepare import borrow_cache, prepare_probes, prepare_shared
from locaudit.run.status import Meter, show_progress
from locaudit.run.worker import Shared, scored_splits
from locaudit.stats import ended_early
from locaudit.store import HeldOutQuestion, Store, open_run, registration_hash, write_atomically
from locaudit.store.cache import open_cache


def run_audit(
    config: AuditConfig,
    out: str | Path,
    *,
    model: Model | None = None,
    behaviour: Behaviour | None = None,
    judges: Mapping[str, Judge] | None = None,
    progress: bool = True,
    prepared: Path | None = None,
) -> None:
    """Run every trial of the plan that has no record yet. `model` and `behaviour` take the place of loading by name.

    `judges` (``truth``, ``info``) takes the place of the judges in the settings. Answers are judged as their trials
    end; those that have no judgement from an earlier attempt are judged first.

    Killed at any moment and started again, it ends with the same records: each group of trials is one transaction, a
    trial depends only on its identity and on what all share, and what all share is written once.
    """
    inputs = read_inputs(config, behaviour, judges, model)  # a refused command leaves a finished run as it is
    config, split, primer, judges = inputs.config, inputs.split, inputs.primer, inputs.judges
    given, generates = inputs.claim, config.evaluation.max_new_tokens > 0
    opened = open_run(out, config, inputs.registration)
    with opened as store, show_progress(progress) as meter, closing(open_cache()) as cache:
        registration = registration_hash(store, inputs.registration)
        if model is None:
            meter.say(f"loading {config.model}")
            model = load_subject(config)
        check_subject(config, given, model)
        context = context_hash(config, model, split, primer, inputs.drift_text)
        _check_same_inputs(store, context)
        if prepared is not None:
            borrow_cache(store, prepared)
        found = prepare_probes(store, model, split.train, given, context, meter.say)
        claim = given or found.probes.top(config.probe.top_k)
        controls, population = draw_controls(config, model, claim, found)
        if len(controls) < config.controls:
            meter.say(f"{len(controls)} controls instead of {config.controls}: all that there are")
        banks = dict(store.fact("banks") or {})  # as before where a run goes on, so that it ends with the same bytes
        config = with_banks(config, model, split, primer, banks.get(model.device.type))
        store.set_fact("banks", banks | {model.device.type: [config.optimal.bank_size, config.evaluation.bank_size]})
        groups = build_plan(config, model, claim, context, controls, registration)
        note_facts(store, model, inputs, claim, found.probes, groups, population)
        _note_judges(store, judges, split)
        if inputs.registration is not None:
            _register(store, inputs.registration)
            meter.say(f"registered before the run: {registration}, {inputs.registration.file}")
        shared = replace(
            prepare_shared(store, model, split, primer, found.theta, cache, context, meter.say), config=config
        )
        n_answers = sum(len(store.questions(name)) for g in groups for s in g for name in scored_splits(config, s))
        for line in estimate_cost(judges, store.questions("test"), n_answers if generates else 0):
            meter.say(line)
        judge_answers(judges, store, store.records(), cache, meter.say)
        n_left_out = _run_groups(store, shared, groups, judges, meter)
        if n_left_out:  # controls ended early
            run = store.fact("run")
            store.set_fact("run", run | {"planned": run["planned"] - n_left_out})


def run_probes(config: AuditConfig) -> Probes:
    """Probes of every head, fitted on the training questions; writes nothing."""
    split = split_behaviour(config, load_behaviour(config.behaviour))
    with show_progress() as meter:
        meter.say(f"loading {config.model}")
        model = load_subject(config)
        meter.say("reading activations of the training questions")
        activations = collect_activations(model, split.train, context=config.probe.context, seed=config.seed)
    return fit_probes(
        activations, inverse_l2=config.probe.inverse_l2, val_fraction=config.probe.val_fraction, seed=config.seed
    )


def _register(store: Store, registration: Registration) -> None:
    """Keep the claim file, once: `open_run` refuses another one after the first trial."""
    found = store.fact("registration")
    if found is None or found["sha256"] != registration.sha256:
        store.set_fact("registration", asdict(registration))


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
) -> int:
    """Run what has no record yet; returns the number of trials that an early end made needless."""
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
    ended: dict[str, bool] = {}
    n_left_out = 0
    for group in todo:
        method = group[0].method
        if store.config.stopping != "fixed" and group[0].arm == "control":
            if not ended.get(method) and ended_early(store, method):
                ended[method] = True
                meter.say(f"{method}: controls ended early, the answer is clear")
            if ended.get(method):
                n_left_out += len(group)
                meter.skip(method, cost(shared, group), len(group))
                continue
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
        meter.end(method, cost(shared, group), len(group))
    return n_left_out


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
