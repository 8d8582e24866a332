"""What an audit would do, how long it would take and how much memory, from small samples of its work; a dry run."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from locaudit.behaviours import Behaviour, Split
from locaudit.behaviours.format import Prompt
from locaudit.config import AuditConfig, Registration
from locaudit.errors import LocationError, LocauditError
from locaudit.judges import Billed, Judge
from locaudit.location import Location, all_units, parse_location, sample_controls, unit_strata
from locaudit.measure.forward import check_depth, check_length
from locaudit.measure.tree import Forest, plant
from locaudit.models import Model
from locaudit.records import TrialSpec
from locaudit.run.banks import with_banks
from locaudit.run.inputs import check_subject, load_subject, read_inputs
from locaudit.run.judging import estimate_cost
from locaudit.run.paces import Paces, count_answers, count_bytes, count_tokens, group_seconds, prepare_seconds
from locaudit.run.plan import build_plan, context_hash, draw_controls
from locaudit.run.sampling import measure_paces
from locaudit.run.status import describe_seconds, show_progress
from locaudit.store import HeldOutQuestion, check_folder, read_run, registration_hash

PARTS = ("loading", "preparing", "training", "scoring", "generating", "drift", "judging")
"""What an audit's time goes to, in order."""


@dataclass(frozen=True)
class Estimate:
    """What an audit would take on this machine. Made by `estimate_audit`."""

    n_trials: Mapping[tuple[str, str], int]
    """(arm, method) -> trials of the whole plan."""
    n_done: int
    """Trials that the run folder has already; no part below counts them."""
    n_answers: int
    """Answers that would be generated, at most."""
    n_tokens: int
    """Tokens that the trials run forward, at most (`locaudit.run.paces.count_tokens`)."""
    disk_bytes: int
    """Disk that the trials take, roughly."""
    seconds: Mapping[str, float]
    """Wall-clock seconds of each of `PARTS`."""
    peak_bytes: int
    """Most memory that this process, or its GPU, has held so far, the calibration included; 0 where unknown."""
    notes: tuple[str, ...] = ()
    """What the numbers leave out or suppose."""
    paces: Paces | None = None
    """What was timed; None if nothing is left to do."""

    @property
    def total_seconds(self) -> float:
        """Seconds of all parts."""
        return sum(self.seconds.values())


def estimate_audit(
    config: AuditConfig,
    *,
    model: Model | None = None,
    behaviour: Behaviour | None = None,
    judges: Mapping[str, Judge] | None = None,
    out: str | Path | None = None,
    paces: Paces | None = None,
    progress: bool = True,
) -> Estimate:
    """Time small samples of the audit's work on its model and data, and extrapolate to its whole plan.

    Nothing is written, no judge by API is asked and the user's cache of answers is not opened. `model`, `behaviour` and
    `judges` take the place of loading by name. `out` is a run folder: if it holds trials of the same settings, only
    what is left is counted. `paces` are those of an earlier estimate on the same model and data, whose preparation this
    audit takes over: nothing is timed then. Starting Python and writing the report, a few seconds, are not. Raises what
    `run_audit` would.
    """
    if out is not None:
        check_folder(out)
    started = time.perf_counter()
    inputs = read_inputs(config, behaviour, judges, model)
    config, split, given, judges = inputs.config, inputs.split, inputs.claim, inputs.judges
    with show_progress(progress) as meter:
        if model is None:
            meter.say(f"loading {config.model}")
            model = load_subject(config)
        loading = time.perf_counter() - started
        check_subject(config, given, model)
        started = time.perf_counter()
        context = context_hash(config, model, split, inputs.primer, inputs.drift_text)
        hashing = time.perf_counter() - started
        done, probed, banks, registration, notes = _read_folder(out, config, inputs.registration)
        claim = given or probed
        if claim is None:
            claim = _stand_in(config, model)
            notes.append(f"the claim is not known before heads are probed: timed with {len(claim)} random heads")
        config = with_banks(config, model, split, inputs.primer, banks.get(model.device.type))
        groups = build_plan(config, model, claim, context, draw_controls(config, model, claim)[0], registration)
        forests = _plant(config, model, split, inputs.primer)
        specs = [spec for group in groups for spec in group]
        n_done = sum(spec.trial_id in done for spec in specs)
        todo = [left for group in groups if (left := [spec for spec in group if spec.trial_id not in done])]
        if n_done:
            notes.append(f"{n_done} of {len(specs)} trials are done in {out}: only the others are counted")
        n_answers = count_answers(config, todo, forests)
        n_true = [len(question.true) for question in split.train[: config.optimal.max_questions]]
        n_tokens, disk = count_tokens(config, todo, forests, n_true), count_bytes(config, todo, forests, model)
        notes += _judging_notes(judges, split, n_answers)
        seconds = dict.fromkeys(PARTS, 0.0) | {"loading": loading, "preparing": hashing}
        if todo:
            is_prepared = bool(n_done) or paces is not None
            paces = paces or measure_paces(config, model, split, forests, todo, judges, claim.kind, meter.say)
            found = extrapolate(config, paces, todo, split, forests, model.n_layers, is_prepared=is_prepared)
            seconds = {part: seconds[part] + found[part] for part in PARTS}
    n_trials = Counter((str(spec.arm), str(spec.method)) for spec in specs)
    return Estimate(dict(n_trials), n_done, n_answers, n_tokens, disk, seconds, _peak_bytes(model), tuple(notes), paces)


def extrapolate(
    config: AuditConfig,
    paces: Paces,
    groups: Sequence[Sequence[TrialSpec]],
    split: Split,
    forests: Mapping[str, Forest],
    n_layers: int,
    *,
    is_prepared: bool = False,
) -> dict[str, float]:
    """Seconds of each of `PARTS` for `groups`, from the paces; loading is the judges' alone.

    `is_prepared`: probes, drift text and the unedited model's scores are there from an earlier attempt.
    """
    n_true = [len(question.true) for question in split.train[: config.optimal.max_questions]]
    n_judged = len({q.id for name in ("val", "test") for q in getattr(split, name)}) if paces.judge else 0
    n_answers = count_answers(config, groups, forests)
    return {
        "loading": paces.judge_loading,
        "preparing": 0.0 if is_prepared else prepare_seconds(config, paces, split, forests),
        **group_seconds(config, paces, groups, forests, n_true, n_layers),
        "judging": n_answers * paces.judge + n_judged * paces.judge_question,
    }


def describe_estimate(estimate: Estimate) -> str:
    """The estimate as lines for the terminal."""
    total = sum(estimate.n_trials.values())
    trials = ", ".join(
        f"{n} {arm}" if method == "none" else f"{n} {arm} {method}" for (arm, method), n in estimate.n_trials.items()
    )
    rows = [(part, describe_seconds(seconds)) for part, seconds in estimate.seconds.items() if seconds]
    rows.append(("total", describe_seconds(estimate.total_seconds)))
    width = max(len(time) for _, time in rows)
    lines = [f"{total} trials: {trials}", f"{estimate.n_answers} answers to generate"]
    lines += [f"{estimate.n_tokens:,} tokens to run, {estimate.disk_bytes / 2**20:.1f} MiB on disk", ""]
    lines += [f"  {part:12}{time:>{width}}" for part, time in rows]
    if estimate.peak_bytes:
        lines += ["", f"peak memory of these samples: {estimate.peak_bytes / 2**30:.1f} GiB"]
    lines += [f"note: {note}" for note in estimate.notes]
    return "\n".join([*lines, "A dry run: nothing was written."])


def _read_folder(
    out: str | Path | None, config: AuditConfig, registration: Registration | None
) -> tuple[set[str], Location | None, dict[str, list[int]], str, list[str]]:
    """Trials with a record, the claim probed and the bank sizes chosen, what trials carry of a claim file, notes."""
    carried = "" if registration is None else registration.hash
    if out is None or not (Path(out) / "trials.sqlite").is_file():
        return set(), None, {}, carried, []
    with suppress(LocauditError), read_run(out) as store:
        if store.config.hash == config.hash:
            carried = registration_hash(store, registration)
            claim = (store.fact("run") or {}).get("claim")
            banks = store.fact("banks") or {}
            return store.done(), None if claim is None else parse_location(claim), banks, carried, []
        if not store.done():
            return set(), None, {}, carried, []
    return set(), None, {}, carried, [f"{out} is not a run of these settings: the audit would refuse it"]


def _stand_in(config: AuditConfig, model: Model) -> Location:
    """Random heads, as many as will be probed."""
    n_heads = model.n_layers * model.n_heads
    if config.probe.top_k > n_heads:
        raise LocationError(
            got=f"top {config.probe.top_k} of {n_heads} heads",
            expected=f"1 to {n_heads}",
            remedy="change probe.top_k",
        )
    if config.probe.top_k == n_heads:
        return all_units(model.n_layers, model.n_heads)
    first = Location(all_units(model.n_layers, model.n_heads).units[: config.probe.top_k])
    strata = unit_strata("none", model.n_layers, model.n_heads)
    return sample_controls(first, strata, 1, seed=config.seed)[0]


def _plant(config: AuditConfig, model: Model, split: Split, primer: str) -> dict[str, Forest]:
    """The trees of each split, checked as those of a run are."""
    style, settings = config.prompt.style, config.evaluation
    parts = {"train": split.train[: config.optimal.max_questions], "val": split.val, "test": split.test}
    out: dict[str, Forest] = {}
    for name, questions in parts.items():
        shown = primer if name != "train" or config.prompt.primer_in_training else ""
        forest = plant(model.tokenizer, Prompt(style, shown), [(q.text, q.answers) for q in questions])
        check_depth(model, forest)
        if name != "train" and settings.max_new_tokens:
            longest = len(forest.prefix) + max(len(tree.prompt) for tree in forest.trees)
            check_length(model, longest + settings.max_new_tokens, f"a {name} question with its answer")
        out[name] = forest
    check_length(model, settings.drift_tokens + 1, "a drift document")
    return out


def _judging_notes(judges: Mapping[str, Judge], split: Split, n_answers: int) -> Iterator[str]:
    if not n_answers:
        return
    yield "answers and judgements kept from other runs are not made again; they are counted here"
    billed = {slot: judge for slot, judge in judges.items() if isinstance(judge, Billed)}
    if billed:
        names = " and ".join(f"{judge.name} ({slot})" for slot, judge in billed.items())
        yield f"the time of judging by {names} is not included"
    questions = [HeldOutQuestion(q.id, q.text, q.true, q.false) for q in split.test]
    yield from estimate_cost(billed, questions, n_answers)


def _peak_bytes(model: Model) -> int:
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated(model.device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
