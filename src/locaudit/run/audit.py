"""Run an audit into a run folder, or continue one that was interrupted or is to grow.

The steps, in order; `begin` does the first three:

1. `read_inputs` reads and checks settings, claim, data and judges, before the run folder is touched.
2. `open_run` locks the folder, and refuses one made with settings that these cannot continue.
3. `prepare_audit` loads the model, draws controls, plans trials and computes what all trials share. Then the held-out
   questions and the manifest are written.
4. `judge_answers` judges answers that an earlier attempt left unjudged.
5. `run_groups` runs the missing trials group by group, and what follows from them (`locaudit.run.rounds`). After each
   part it stores, judges and decides about stopping.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from numpy.typing import NDArray

from locaudit.behaviours.behaviour import Behaviour
from locaudit.claims import Controls, draw_nulls
from locaudit.claims.directions import vectors_of
from locaudit.claims.kinds import Shape
from locaudit.config import AuditConfig, RayConfig, Registration
from locaudit.errors import RunFolderError
from locaudit.judges.base import Judge
from locaudit.location import Location
from locaudit.models.model import Model
from locaudit.records import NO_METHOD, NullId, Place, TrialRecord, TrialSpec, content_hash
from locaudit.registry import METHODS
from locaudit.run.banks import bank_sizes, with_banks
from locaudit.run.describe import make_manifest
from locaudit.run.executors import Outcome, choose_executor
from locaudit.run.horizons import find_lengths, known_lengths, with_epochs
from locaudit.run.judging import estimate_cost, judge_answers
from locaudit.run.placebos import draw_placebos
from locaudit.run.plan import Groups, build_plan, fit_context, training_seed
from locaudit.run.prepare import (
    Forests,
    Preparing,
    Probed,
    borrow_cache,
    check_identity,
    drift_source,
    note_rounding,
    plant_questions,
    prepare_probes,
    prepare_shared,
    prepare_values,
    probing_settings,
)
from locaudit.run.rounds import Rounds
from locaudit.run.status import SAMPLES, Meter, show_progress
from locaudit.run.stopping import Stopping
from locaudit.run.subject import (
    Inputs,
    check_subject,
    load_subject,
    note_few,
    read_inputs,
)
from locaudit.run.trackers import tracking
from locaudit.run.turns import Turns
from locaudit.run.worker import Shared, Worker, find_lack
from locaudit.stats.phrases import where
from locaudit.stats.selection import choose
from locaudit.store.cache import Cache, open_cache
from locaudit.store.database import HeldOutQuestion, Store
from locaudit.store.directions import save_directions
from locaudit.store.files import write_atomically
from locaudit.store.folder import SAVED_BEHAVIOUR, open_run, read_run
from locaudit.store.manifest import Manifest, extended
from locaudit.text import plural


@dataclass(frozen=True, eq=False)
class Job:
    """An audit that is ready to run: what `prepare_audit` returns."""

    inputs: Inputs
    shared: Shared
    groups: Groups
    manifest: Manifest
    forests: Forests


def run_audit(
    config: AuditConfig,
    out: str | Path,
    *,
    model: Model | None = None,
    behaviour: Behaviour | None = None,
    judges: Mapping[str, Judge] | None = None,
    progress: bool = True,
    prepared: Path | None = None,
    borrowed: Sequence[Path] = (),
) -> None:
    """Run every planned trial that has no record yet, and judge its answers.

    `model`, `behaviour` and `judges` (aspect -> judge) are used instead of those that `config` names. `prepared` is
    another run folder whose cached tensors are copied; they are used only if they belong to the same inputs. `borrowed`
    are run folders of audits that score the same questions; trials that they share with this one are copied.

    A run can be killed at any moment. Started again, it ends with the same records: each part of a group is stored in
    one transaction, and a trial depends only on its identity and on what all trials share.

    Raises `LocauditError` for inputs, a model or a run folder that cannot be used.
    """
    with begin(config, out, model, behaviour, judges, progress, prepared) as (store, job, meter):
        for folder in borrowed:
            borrow_trials(store, job, folder, meter)
        judge_answers(job.inputs.judges, store, store.records(), job.shared.cache, meter.say)
        with tracking(job.inputs.config, store.folder, meter.say) as track:
            run_groups(store, job, job.groups, meter, track)


def borrow_trials(store: Store, job: Job, folder: Path, meter: Meter) -> None:
    """Copy the trials of another run that this run plans, too, with their edits and their answers.

    A trial is shared if its edit is the same (`TrialSpec.trial_id`), whatever its place is used for in either run.
    Further strengths that followed at the place are copied with it.
    """
    places: dict[tuple, dict[Place, TrialSpec]] = defaultdict(dict)
    for spec in (spec for group in job.groups for spec in group):
        places[spec.context, spec.method, spec.location, spec.draw][spec.place] = spec
    done, found = _done(store.records()), []
    with read_run(folder) as other:
        for record in other.records():
            about = record.spec
            for at in places[about.context, about.method, about.location, about.draw].values():
                spec = replace(at, hyperparameter=about.hyperparameter)
                if (spec.trial_id, spec.place) in done:
                    continue
                done.add((spec.trial_id, spec.place))
                edit = record.edit and spec.edit_file
                if edit:
                    write_atomically(store.edits / edit, (other.edits / record.edit).read_bytes())
                found.append(replace(record, spec=spec, edit=edit, seconds={}))
    if found:
        store.add(found, 0.0)
        meter.say(f"{plural(len(found), 'trial')} taken from {folder}")


@contextmanager
def begin(
    config: AuditConfig,
    out: str | Path,
    model: Model | None,
    behaviour: Behaviour | None,
    judges: Mapping[str, Judge] | None,
    progress: bool,
    prepared: Path | None,
) -> Iterator[tuple[Store, Job, Meter]]:
    """Open the run folder, plan and prepare the audit, and write its held-out questions and manifest."""
    # First, so that a refused command changes no run folder.
    inputs = read_inputs(config, behaviour, judges, model, out)
    opened, threads = open_run(out, inputs.config, inputs.registration), _threads_of_workers(inputs.config)
    showing, caching = show_progress(progress), closing(open_cache())
    with opened as store, showing as meter, meter.writing(store.folder), threads as changed, caching as cache:
        for note in (*inputs.notes, *changed):
            meter.say(f"note: {note}")
        if prepared is not None:
            borrow_cache(store, prepared)
        job, before, n_trials = prepare_audit(store, inputs, model, cache, meter), store.manifest, len(store.seconds())
        if before is not None:
            job = replace(job, manifest=extended(job.manifest, before, n_trials))
        store.set_questions(_held_out(inputs, job.forests))
        saved = Path(inputs.config.behaviour)
        if behaviour is not None and saved.name == SAVED_BEHAVIOUR and saved.parent.is_dir():  # else it was moved
            write_atomically(saved, behaviour.to_text().encode())
        save_directions(store.folder, job.manifest.claim, job.shared.vectors)
        store.write_manifest(job.manifest)
        for note in (job.manifest.moved, *job.manifest.notes):
            if note and note not in inputs.notes:
                meter.say(f"note: {note}")
        if inputs.registration is not None:
            meter.say(f"registered before the run: {inputs.registration.hash}, {inputs.registration.file}")
        yield store, job, meter


@contextmanager
def _threads_of_workers(config: AuditConfig) -> Iterator[tuple[str, ...]]:
    """Compute with as many threads as each worker does: the sums that they share then have the same last digits.

    Yields what there is to say about it.
    """
    threads, before = getattr(choose_executor(config), "threads", None), torch.get_num_threads()
    n = before if threads is None else threads(config)
    torch.set_num_threads(n)
    if threads is None and config.ray != RayConfig():
        yield ("The settings under ray have no effect without executor ray or ray.workers.",)
        return
    said = f"{plural(n, 'thread')} instead of {before}, as in each worker. The last digits of sums depend on it"
    if config.claim is None:
        said += ", and in bfloat16 perhaps which heads a new run finds by probes"
    try:
        yield () if n == before else (f"{said}.",)
    finally:
        torch.set_num_threads(before)


def prepare_audit(store: Store, inputs: Inputs, model: Model | None, cache: Cache, meter: Meter) -> Job:
    """Load the model, plan the trials and compute what they share. Writes only the run folder's cache."""
    config = inputs.config
    if model is None:
        meter.say(f"loading {config.model}")
        model = load_subject(config)
    check_subject(config, inputs, model)
    before = store.manifest
    forests = plant_questions(inputs, model)
    check_identity(store, model, forests, meter.say)
    probing = probing_settings(config)

    drift = content_hash([model.fingerprint, drift_source(inputs, model)])

    placebos = draw_placebos(config.placebos, inputs.split.train, forests.train, training_seed(config))

    def contexts_of(config: AuditConfig) -> list[dict[str, str]]:
        """Method -> context, of the edits themselves and then of each placebo."""
        return [
            {NO_METHOD: drift}
            | {
                name: fit_context(model.fingerprint, forest, n_true, probing, name, settings, drift)
                for name, settings in config.methods.items()
            }
            for forest, n_true in ((forests.train, forests.n_true["train"]), *((x.forest, x.n_true) for x in placebos))
        ]

    # As given, with ``epochs: auto``; a run that is continued keeps the training length that it found.
    (given, *others), lengths = contexts_of(config), known_lengths(before)
    contexts = contexts_of(with_epochs(config, lengths))
    # The settings are the same (`open_run` checked them), but the files that they name may have changed.
    if not store.contexts() <= {context for found in contexts for context in found.values()}:
        raise RunFolderError(
            got=f"{store.folder}, made by an earlier version, or with other model weights, questions, prompts or drift "
            "text under the same names",
            expected="the same inputs as before",
            remedy="restore the earlier files and run the same command again, or choose another --out",
        )
    kind = "head" if inputs.claim is None else inputs.claim.kind
    preparing = Preparing(model, config, kind, inputs.split.train, forests.train, inputs.training, meter.say)
    probed = prepare_probes(store, preparing, content_hash([model.fingerprint, probing, given]))
    claim = inputs.claim or _probed_claim(probed, config)
    values = prepare_values(store, preparing, claim, probed, content_hash([model.fingerprint, probing, given]))
    controls, notes = draw_controls(config, model.shape, claim, values)
    if before is not None:
        _check_rests(before, controls)
    for name, found in controls.items():
        if len(found.locations) < config.controls:
            n_found = len(found.locations)
            meter.say(f"{plural(n_found, 'control')}{where(name)} instead of {config.controls}: there are no more")
    for note in note_few(controls, config.level):
        if note not in inputs.notes:
            meter.say(f"note: {note}")
    # A run that is continued keeps its bank sizes: other ones would round differently in the last digits.
    banks = dict(before.banks) if before is not None else {}
    if model.device.type not in banks:
        banks[model.device.type] = bank_sizes(config, model, forests.train)
    config = with_banks(config, banks[model.device.type])
    inputs = replace(inputs, config=config)
    pairs = list(zip(placebos, others, strict=True))
    shared = prepare_shared(store, inputs, preparing, forests, given, cache, pairs)
    if before is None:
        lengths = find_lengths(store, shared, claim, given, meter.say)
        contexts = contexts_of(with_epochs(config, lengths))
    config = with_epochs(config, lengths)
    vectors = vectors_of([claim, *(place for found in controls.values() for place in found.locations)])
    inputs, shared = replace(inputs, config=config), replace(shared, config=config, vectors=vectors)
    registration = _registered(inputs, before.registration if before else None)
    carried = "" if registration is None else registration.hash
    places = {name: found.locations for name, found in controls.items()}
    sizes, (own, *exchanged) = banks[model.device.type], contexts
    groups = build_plan(config, model.shape, claim, places, own, sizes, carried, exchanged)
    probes = None if probed is None else probed.probes
    manifest = make_manifest(inputs, model, claim, probes, groups, controls, banks, registration, lengths)
    rounding = note_rounding(store, inputs, model, forests, meter.say)
    manifest = replace(manifest, notes=(*manifest.notes, *notes, *rounding))
    return Job(inputs, shared, groups, manifest, forests)


def _check_rests(before: Manifest, controls: Mapping[str, Controls]) -> None:
    """Raise `RunFolderError` if a run has rests of controls of one null, and another null is the first one now."""
    (old, new) = (next(iter(nulls), "") for nulls in (before.nulls, controls))
    if before.rest_controls and old != new:
        raise RunFolderError(
            got=f"nulls that begin with {new}, and the rests of controls of the null {old}",
            expected="the same first null as before, of whose controls the rests are",
            remedy=f"name {old} first in nulls",
        )


def open_worker(folder: Path, say=lambda _: None) -> Worker:
    """Build a worker from a run folder alone. Model and data are loaded by the names in its settings."""
    with read_run(folder) as store, show_progress(False) as meter:
        inputs = read_inputs(store.config, out=folder)
        job = prepare_audit(store, inputs, None, Cache(), meter)
    return Worker(job.shared, say)


def draw_controls(
    config: AuditConfig, shape: Shape, claim: Location, values: Mapping[NullId, NDArray] | None = None
) -> tuple[dict[str, Controls], tuple[str, ...]]:
    """Draw the claim's controls of each null in the settings, and say which nulls have none (`draw_nulls`)."""
    rules = {"seed": config.seed, "disjoint": config.disjoint}
    return draw_nulls(claim, shape, config.nulls, config.controls, values=values, **rules)


def run_groups(
    store: Store,
    job: Job,
    groups: Groups,
    meter: Meter,
    track: Callable[[TrialRecord | None], None] = lambda _: None,
) -> list[TrialSpec]:
    """Run the trials of `groups` that have no record yet. Storing, judging and early stopping all happen here.

    `track` is called with the chosen trial of each place that is final; None if all diverged.
    Returns the trials of the whole plan that still have to run, and those that may get more samples
    (`TrialSpec.measured`). Controls that early stopping made unnecessary are not among them.
    """
    inputs, shared = job.inputs, job.shared
    rounds = Rounds(store, inputs, job.manifest, job.groups)
    stopping = Stopping(inputs.config, job.manifest, rounds.reading.score)

    def note(records: Sequence[TrialRecord]) -> None:
        for trials in rounds.add(records):
            stopping.add(trials)
            track(choose(trials, rounds.reading.score, rounds.reading.tie))

    def count(specs: Sequence[TrialSpec]) -> Counter[str]:
        return Counter(pace_of(shared, spec) for spec in specs)

    note(store.records())  # a resumed run starts with what it knew
    numbers = [job.groups.index(group) for group in groups]
    todo = [spec for group in groups for spec in group if (spec.trial_id, spec.place) not in rounds.done]
    more = [spec for number in numbers for spec in rounds.expected(number)]
    n_planned = len([spec for group in job.groups for spec in group if (spec.trial_id, spec.place) in rounds.done])
    _say_resumed(job, n_planned, bool(todo or more), meter)
    _say_cost(store, job, todo + more, meter)
    meter.start(count(todo), sum(map(len, groups)) - len(todo), stopping.describe(), count(more))

    def lacking(group: Sequence[TrialSpec]) -> Sequence[TrialSpec]:
        """The trials to run. If another null drew the location, too, its trial is stored for this place, not run."""
        again = [replace(r, spec=s, seconds={}) for s in group if s.measured is None and (r := rounds.find(s.trial_id))]
        if again:
            meter.share(count([record.spec for record in again]))
            store.add(again, 0.0)
            note(again)
        return [s for s in group if s.measured is not None or rounds.find(s.trial_id) is None]

    turns, expected = Turns(dict(zip(numbers, groups, strict=True))), {}

    # The executor takes the next group only when it is ready for it, so each group is checked against all results
    # stored until then.
    def needed() -> Iterator[Sequence[TrialSpec] | None]:
        while turns.open or turns.waiting:
            if (number := turns.to_follow()) is not None:
                if not (group := rounds.follow(number)):
                    turns.open.remove(number)
                    meter.rule_out(expected.pop(number))
                    continue
                expected[number] -= count(group)
                meter.add(count(group))
            elif (number := turns.to_begin()) is not None and not (
                turns.running and stopping.must_wait(turns.waiting[number][0])
            ):
                expected[number] = count(rounds.expected(number))
                group = [spec for spec in turns.begin(number) if (spec.trial_id, spec.place) not in rounds.done]
                if group and stopping.has_ended(group[0]):
                    if stopping.is_news(group[0]):
                        meter.stop(f"controls{where(group[0].null)} ended early, the answer is clear")
                    meter.skip(count(group))
                    continue
                stopping.begin(group)
            else:
                yield None
                continue
            if group := lacking(group):
                turns.running[number] = group
                meter.begin(describe(group))
                yield group

    # Each part of a group is stored and judged; what follows from it, and the stopping rule, need the judgements.
    executor, worker = choose_executor(inputs.config)(), Worker(shared, meter.say)
    with closing(executor.map(worker, store.folder, needed())) as outcomes:  # also after an error: workers end
        for outcome in outcomes:
            what, records = describe(outcome.group), [record for record, _ in outcome.results]
            if outcome.is_last:
                turns.end(outcome.group)
            if outcome.failed:
                meter.fail(what, count(outcome.group), outcome.failed)
            elif not records:
                meter.begin(what, outcome.where)
            else:
                seconds = outcome.seconds + _keep(store, job, outcome, meter)
                note(records)
                ids = {record.spec.trial_id for record in records}
                ended = count([spec for spec in outcome.group if spec.trial_id in ids])
                meter.end(ended, stopping.describe(), what if outcome.is_last else "", seconds)
                _say_diverged(records, meter)
    done = _done(store.records())
    unrun = [spec for group in job.groups for spec in group if (spec.trial_id, spec.place) not in done]
    left, more = ([spec for spec in specs if not stopping.has_ended(spec)] for specs in (unrun, rounds.expected()))
    failed = [f"{what} failed ({why}); the same command tries again." for what, why in meter.failed.items()]
    if len(left) < len(unrun) or failed:  # stopped early: what will not run is no longer planned
        planned = job.manifest.planned - len(unrun) + len(left)
        store.write_manifest(replace(job.manifest, planned=planned, notes=(*job.manifest.notes, *failed)))
    fitted = {trial for trial, _ in done}
    trials = {spec.trial_id: spec for spec in left if spec.trial_id not in fitted}  # a place of two nulls counts once
    return [*trials.values(), *more]


def _keep(store: Store, job: Job, outcome: Outcome, meter: Meter) -> float:
    """Save edits, then store records (a record never refers to a missing file), then judge. Returns judges' seconds."""
    records = [record for record, _ in outcome.results]
    for record, edit in outcome.results:
        if edit is not None:
            write_atomically(store.edits / record.edit, edit.to_bytes())
    store.add(records, outcome.seconds)
    started = time.monotonic()
    judge_answers(job.inputs.judges, store, records, job.shared.cache, meter.say)
    seconds = time.monotonic() - started
    if job.inputs.judges:
        store.add_judging(records, seconds)
    return seconds


def _done(records: Sequence[TrialRecord]) -> set[tuple[str, Place]]:
    """The trials that are whole, each with what it is used for."""
    return {(record.spec.trial_id, record.spec.place) for record in records}


def describe(group: Sequence[TrialSpec]) -> str:
    """A group in a few words, for progress lines: ``ITI at control 3, strength 15 and 2 more``."""
    first = group[0]
    names = {"base": "unedited model", "claim": "claim", "whole": "whole model", "placebo": f"placebo {first.control}"}
    control = f"control {first.control}{where(first.null)}"
    rest = "the rest of the model" if first.control < 0 else f"all but {control}"
    place = {**names, "control": control, "rest": rest}[first.arm]
    if first.method == NO_METHOD:
        return place
    strength = "" if first.hyperparameter is None else f", strength {first.hyperparameter:g}"
    more = f" and {len(group) - 1} more" if len(group) > 1 else ""
    what = "" if first.measured is None else ", more samples"
    return f"{METHODS[first.method].title} at {place}{strength}{more}{what}"


def _probed_claim(probed: Probed | None, config: AuditConfig) -> Location:
    assert probed is not None  # without a claim the kind is head, and heads always have probes
    return probed.probes.top(config.probe.top_k)


def _registered(inputs: Inputs, before: Registration | None) -> Registration | None:
    """The run's claim file, also if it is not given again. `open_run` has refused a different one."""
    given = inputs.registration
    return before if given is None else given


def _held_out(inputs: Inputs, forests: Forests) -> dict[str, list[HeldOutQuestion]]:
    return {
        name: [
            HeldOutQuestion(q.id, q.text, q.true, q.false, key)
            for q, key in zip(inputs.held_out(name), keys, strict=True)
        ]
        for name, keys in forests.keys.items()
        if name not in forests.owners
    }


def pace_of(shared: Shared, spec: TrialSpec) -> str:
    """The kind of trial, for estimating time: its method, or ``METHOD, whole`` for an edit of (nearly) the whole model.

    ``METHOD, kept`` if its edit need not be fitted again, and ``METHOD, samples`` if it only gets more samples.
    """
    if spec.measured is not None:
        return f"{spec.method}{SAMPLES}"
    if spec.trial_id in shared.kept and spec.method != NO_METHOD:
        return f"{spec.method}, kept"
    return f"{spec.method}, whole" if spec.arm in ("whole", "rest") else spec.method


def _say_resumed(job: Job, n_done: int, goes_on: bool, meter: Meter) -> None:
    n_trials, n_kept = sum(map(len, job.groups)), len(job.shared.kept)
    if n_kept:
        meter.say(f"{n_done} of {n_trials} trials done and {n_kept} partly done (only what was added runs), going on")
    elif n_done:
        meter.say(f"{n_done} of {n_trials} trials done, {'going on' if goes_on else 'none left to run'}")


def _say_cost(store: Store, job: Job, todo: Sequence[TrialSpec], meter: Meter) -> None:
    n_answers = sum(len(find_lack(job.shared, spec)[1]) for spec in todo)
    for line in estimate_cost(job.inputs.judges, store.questions("test"), n_answers):
        meter.say(line)


def _say_diverged(records: Sequence[TrialRecord], meter: Meter) -> None:
    for record in records:
        if record.status == "diverged":
            meter.say(f"{describe([record.spec])}: diverged ({record.message}); the audit goes on")
