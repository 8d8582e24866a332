"""Truth, Info, MC and drift as functions of the ITI strength alpha, at the probed heads and at random heads.

    python -m bench.iti_sweep --data TruthfulQA.csv --drift-text wikitext.txt --out docs/iti-sweep

Test questions are held out from the bundled judge's training data. Probes and directions use only questions that the
judge was fitted on. Writes OUT.json (every number) and OUT.png, and prints a Markdown table. Intervals are bootstrap
intervals over test questions.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from bench.command import Positive, check_out, header, line, machine, run, stated, write_json
from bench.work import (
    JUDGED,
    PRIMED,
    Case,
    DriftText,
    Edit,
    Subject,
    answer_prompts,
    cut_documents,
    find_kind,
    grow,
    is_held_out,
    iti_edit,
    judged_metrics,
    load,
    load_behaviour,
    load_reference_judges,
    log_probs,
    mean_score,
    means,
    measure_drift,
    open_cache,
    probed,
    sample_documents,
    score_questions,
    score_values,
    shuffled,
    stack,
)
from locaudit.stats import estimate

PANELS = {
    "truth": "Truth",
    "info": "Info",
    "info_truth": "Info*Truth",
    "mc2": "MC2",
    "mc1": "MC1",
    "kl": "KL (nats per token)",
}
ASPECTS = ("truth", "info")


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    out: Path
    """Output path without suffix."""
    subject: tyro.conf.OmitArgPrefixes[Subject] = field(default_factory=lambda: Subject(dtype="auto", device="auto"))
    drift_text: str | None = None
    """Text file to measure KL on (default: text sampled from the model)."""
    train: Positive = 200
    """Number of questions for probes and directions."""
    test: Positive = 100
    """Number of test questions."""
    top_k: Positive = 16
    alphas: tuple[float, ...] = (5, 10, 15, 20, 30, 40)
    random: Positive = 1
    """Number of random sets of `top_k` heads."""
    seed: int = 0


def main(given: Settings) -> None:
    """Run the sweep."""
    check_out(given.out)
    started = time.monotonic()
    asked = shuffled(sorted(load_behaviour(given.subject.data).questions, key=lambda q: q.id), given.seed)
    test = tuple([q for q in asked if is_held_out(q.text)][: given.test])
    train = [q for q in asked if not is_held_out(q.text)][: given.train]
    model = load(given.subject)
    claim, theta = probed(model, train, given.top_k)
    chosen = {"seed": given.seed, "null": "anywhere", "disjoint": True, "values": None}
    controls = find_kind(claim).draw(claim, model.shape, given.random, **chosen).locations
    places = {"probed heads": claim, **{f"random heads {n}": place for n, place in enumerate(controls, start=1)}}
    forest = grow(model, test, PRIMED)
    (base,) = log_probs(model, forest)
    text = given.drift_text
    drift = DriftText(cut_documents(model, text, 20, 128) if text else sample_documents(model, 20, 128, 0))
    judges = dict(zip(ASPECTS, load_reference_judges(ASPECTS), strict=True))
    rows = []
    print(header("heads", "alpha", *PANELS.values()))
    with closing(open_cache()) as cache:

        def measure(name: str, alpha: float, edits: list[Edit] | None) -> None:
            (sums,) = log_probs(model, forest, edits)
            ((answers,),) = answer_prompts(model, forest, edits, max_new_tokens=50, cache=cache)
            cases = [Case(q.text, a, q.true, q.false) for q, a in zip(test, answers, strict=True)]
            said = {aspect: [x.probability for x in judge.score(cases)] for aspect, judge in judges.items()}
            judged = judged_metrics(said)
            row = {"place": name, "alpha": alpha, **means(score_questions(test, sums, base))}
            for score in JUDGED:
                values = score_values(judged, score)
                row |= {score: float(mean_score(values)), f"{score}_interval": estimate(values).interval()}
            rows.append(row | measure_drift(model, drift, stack(model, edits) if edits else None)[0])
            print(line([name, f"{alpha:g}", *(f"{rows[-1][key]:.3f}" for key in PANELS)]), flush=True)

        measure("unedited", 0.0, None)
        for alpha in given.alphas:
            for name, place in places.items():
                measure(name, alpha, [iti_edit(model, place, theta, alpha=alpha)])
    facts = {
        "settings": stated(given),
        "locations": {name: str(place) for name, place in places.items()},
        "judges": {aspect: judge.fingerprint for aspect, judge in judges.items()},
        "dtype": str(model.lm.dtype),
        "seconds": round(time.monotonic() - started),
        "machine": machine(given.subject.device),
    }
    write_json(given.out.with_suffix(".json"), {**facts, "rows": rows})
    title = f"ITI at {len(claim)} heads, {len(test)} test questions (bands: 95 % over questions)"
    draw(rows, list(places), title, given.out.with_suffix(".png"))


def draw(rows: list[dict[str, Any]], places: list[str], title: str, path: Path) -> None:
    """Draw one panel per score with one line per place; every line starts at the unedited model, alpha = 0."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(10, 5.6), layout="constrained", sharex=True)
    for axis, (key, name_of_score) in zip(axes.flat, PANELS.items(), strict=True):
        for place, colour in zip(places, ("#D55E00", "#0072B2", "#56B4E9", "#009E73"), strict=False):
            points = [rows[0], *(row for row in rows if row["place"] == place)]
            x = [row["alpha"] for row in points]
            axis.plot(x, [row[key] for row in points], marker="o", markersize=4, color=colour, label=place)
            if f"{key}_interval" in rows[0]:
                low, high = zip(*(row[f"{key}_interval"] for row in points), strict=True)
                axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set_title(name_of_score, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[-1].set_yscale("symlog", linthresh=0.01)  # KL
    for axis in axes[1]:
        axis.set_xlabel("alpha")
    axes[0, 0].legend(frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    run(main, Settings, __doc__)
