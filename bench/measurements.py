"""Numbers behind the verdict of a run, from its folder alone.

    python -m bench.measurements runs/demo

The first table has each score's gain of the claim over the unedited model, and its lead over the mean control of each
null, with standard errors: standard deviations over bootstrap resamples of the questions, with the edits as they are.
With the nulls ``anywhere`` and ``layers``, it says which share of the lead over places anywhere the layers explain:
1 - lead over places in the claim's layers / lead over places anywhere.

The second table has each edit tried: alpha of an ITI edit with a KL budget, objective of a trained edit, KL on the
drift text (nats per token), and the run's score. Controls are means. Flags are those of `locaudit.stats.optimisation`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import tyro

from bench.command import header, line, run
from bench.work import load_run, mean_score, score_values
from locaudit.records import Place, TrialRecord
from locaudit.stats.measured import Measured, measure
from locaudit.stats.scores import GREEDY
from locaudit.stats.selection import BASE, CLAIM, group_trials
from locaudit.store.run import Run, judged

COUNTS = (1, 2, 4, 8, 16)
"""Numbers of sampled answers to read, besides all that the run has."""
LAYERS = ("anywhere", "layers")
NUMBERS = ("alpha", "objective")
"""Facts about fits that are shown."""


@dataclass(frozen=True)
class Settings:
    """Which run to read."""

    folder: tyro.conf.Positional[Path]
    """Run folder."""


def main(given: Settings) -> None:
    """Print both tables."""
    done = load_run(given.folder)
    print_scores(done)
    print()
    print_edits(done)


def print_scores(done: Run) -> None:
    """Print gain and leads by method, score and number of sampled answers."""
    nulls, metrics = list(done.manifest.nulls), done.base.metrics["test"]
    parted = set(LAYERS) <= set(nulls)
    leads = [name for null in nulls for name in (f"lead, {null}", "SE")]
    print(header("method", "score", "answers", "gain", "SE", *leads, *["explained by layers"] * parted))
    for method in done.manifest.methods:
        for score in metrics:
            if score.endswith(GREEDY):
                continue
            ways = [(score, "", done.manifest.samples)]
            if score + GREEDY in metrics:
                most = done.manifest.samples
                ways = [(score, f"{n} sampled", n) for n in (*(n for n in COUNTS if n < most), most)]
                ways.insert(0, (score + GREEDY, "greedy", 1))
            for name, answers, n in ways:
                found = read(done, method, name, n)
                compared = {null: found.nulls[null].lead if null in found.nulls else None for null in nulls}
                cells = [method, score, answers]
                gain = found.gain(CLAIM)
                told = [(gain.value, gain.se), *((x.lead, x.se) if x else None for x in compared.values())]
                for pair in told:
                    cells += [f"{pair[0]:+.3f}", f"{pair[1]:.3f}"] if pair else ["-", "-"]
                if parted:
                    anywhere, layers = (compared[null] for null in LAYERS)
                    if anywhere is not None and layers is not None and anywhere.lead > 0:
                        cells.append(f"{1 - layers.lead / anywhere.lead:.2f}")
                    else:
                        cells.append("-")
                print(line(cells))


def read(done: Run, method: str, score: str, most: int) -> Measured:
    """The values of a score, of at most this many sampled answers."""
    records = judged(done.trials, done.judgements, done.questions, most)
    places, facts = {BASE: [], **group_trials(records)[method]}, done.manifest.methods[method]
    places[BASE] = [record for record in records if record.spec.arm == "base"]
    return measure(method, facts, places, score, done.config.level, done.design)


def print_edits(done: Run) -> None:
    """Print objective, alpha, KL and score of each edit tried, and the flags of the chosen ones."""
    print(header("method", "strength", "place", *NUMBERS, "KL", done.score, "chosen", "flags"))
    for method, places in group_trials(done.records).items():
        if method not in done.manifest.methods:
            continue
        verdict = done.verdict.methods[method]
        flagged: defaultdict[str, list[str]] = defaultdict(list)
        for flag in verdict.flags:
            for label in flag.places:
                flagged[label].append(flag.name)
        groups: defaultdict[tuple[float | None, str], list[TrialRecord]] = defaultdict(list)
        for place, trials in places.items():
            for record in trials:
                groups[record.spec.hyperparameter, title(place)].append(record)
        for (strength, name), records in groups.items():
            chosen = [r.spec.place.label for r in records if verdict.chosen[r.spec.place.label] == strength]
            flags = Counter(flag for label in chosen for flag in flagged[label])
            cells = ["-" if strength is None else f"{strength:g}", name]
            cells += [number([x for r in records for x in r.training.get(key, ())]) for key in NUMBERS]
            cells.append(number([r.drift["kl"] for r in records if "kl" in r.drift]))
            scores = [float(mean_score(score_values(r.questions["test"], done.score))) for r in records if r.questions]
            cells += [number(scores), f"{len(chosen)} of {len(records)}"]
            print(line([method, *cells, ", ".join(f"{flag} {n}" for flag, n in flags.items())]))


def title(place: Place) -> str:
    """The arm, and the null of a control."""
    return f"control {place.null}" if place.arm == "control" else place.arm


def number(values: Sequence[float]) -> str:
    """The mean of the values that are known, or a dash."""
    known = [x for x in values if not math.isnan(x)]
    return f"{fmean(known):.3f}" if known else "-"


if __name__ == "__main__":
    run(main, Settings, __doc__)
