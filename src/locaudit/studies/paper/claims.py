"""The paper's claims, one by one, beside what was measured: each with the rule that decides.

A claim is decided only where the numbers rule one answer out: ``replicated`` if they exclude its contrary, ``not
replicated`` if they exclude the claim, else ``could not test``. Two edits that do nothing match and prove nothing, so
claims about effective edits want an effect above the margin first; judgements that are missing decide nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import comb
from typing import Any, Literal

Outcome = Literal["replicated", "not replicated", "could not test"]
Numbers = Mapping[str, Any]
LARGEST_FLOOR = 0.1
"""With so few random sets that the smallest possible p is above this, being the best of them says nothing."""
MOST_DIVERGED = 0.1
"""Share of random sets that may diverge before their mean says nothing."""


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper against this study's numbers."""

    name: str
    section: str
    """Heading in the paper."""
    says: str
    """What the paper reports, in our words."""
    rule: str
    """When it counts as replicated here."""
    measured: str
    outcome: Outcome


def judge_claims(numbers: Numbers) -> list[dict[str, Any]]:
    """Every claim of the paper, in its order."""
    parts = (_under_iti, _against_iti, _at_random_sets, _at_single_heads, _about_probes)
    return [asdict(claim) for part in parts for claim in part(numbers)]


def _under_iti(n: Numbers) -> Iterator[Claim]:
    section = "Editing Localized Heads Modifies the Output as Expected"
    iti, margin, mc = n["iti"], n["setup"]["margin"], n["multiple_choice"]["iti"]
    yield Claim(
        "iti_beats_random",
        section,
        "Under ITI the probed heads reach a higher Info*Truth than random sets of heads (p = 1.6e-8, 16 sets).",
        _superiority_rule(margin),
        _against_random(iti, "Info*Truth"),
        _superiority(n, iti, margin),
    )
    gains, sets = iti["truth_gains"], iti["n_random"]
    outcome: Outcome = "could not test"
    if 2 * gains["n_within_margin"] >= sets:
        outcome = "replicated"
    elif 2 * gains["n_noticeable"] > sets:
        outcome = "not replicated"
    yield Claim(
        "random_iti_does_nothing",
        section,
        "ITI at random heads often has no noticeable effect on Truth.",
        f"replicated if for half of the random sets the 95 % interval of Truth gained lies within +-{margin:g}; not "
        "replicated if for more than half it excludes 0",
        f"{gains['n_noticeable']} of {sets} random sets change Truth noticeably, {gains['n_within_margin']} surely do "
        f"not; the median random set gains {_signed(gains['random_median'])}, the probed heads "
        f"{_interval(gains['localized'])}",
        _unless_missing(n, iti, outcome),
    )
    better, worse = mc["n_random_better_in_both"], mc["n_random_worse_in_both"]
    outcome = "could not test"
    enough = iti["p_smallest"] <= LARGEST_FLOOR
    if better is not None and enough and better == 0 and 2 * worse >= sets and _low(mc["over_unedited"]) > 0:
        outcome = "replicated"
    elif better is not None and better >= max(worse, sets / 5):
        outcome = "not replicated"
    yield Claim(
        "iti_mc_kl",
        section,
        "Under ITI the probed heads have the better trade-off of MC and KL than random sets.",
        "replicated if the probed heads' MC2 is above the unedited model's (90 % interval), no random set has as high "
        "an MC2 for as little KL, and the probed heads have as high an MC2 for as little KL as half of the random "
        "sets; not replicated if a fifth of the random sets, and as many as do worse in both, do better in both (each "
        "with the alpha that validation chose by MC2)",
        f"probed heads: MC2 {_plain(mc['localized_score'])} at KL {_plain(mc['localized_kl'])}, over the unedited "
        f"model {_interval(mc['over_unedited'])}; {better} of {sets} random sets do better in both, {worse} "
        "worse in both",
        outcome,
    )
    gain = n["gains"]["localized ITI over whole ITI"]
    yield Claim(
        "iti_everywhere_is_no_better",
        section,
        "ITI at all heads does no better than ITI at the probed heads (cited from the ITI paper).",
        f"replicated if the 90 % interval of probed minus all heads in Info*Truth lies above -{margin:g}; not "
        "replicated if below",
        f"probed minus all heads {_interval(gain)}",
        _unless_missing(n, iti, _not_worse(gain)),
    )


def _against_iti(n: Numbers) -> Iterator[Claim]:
    section = "Finding “Optimal” Interventions"
    gains, margin = n["gains"], n["setup"]["margin"]
    rule = (
        f"replicated if the 90 % interval of the difference in Info*Truth lies above {margin:g} and that of the "
        f"optimal edit over the unedited model above 0; not replicated if the former lies below {margin:g}"
    )
    for name, where, says in (
        (
            "optimal_beats_iti",
            "whole",
            "The optimal edit of the whole model is far better than ITI at the probed heads.",
        ),
        ("localized_beats_iti", "localized", "The optimal edit at the probed heads is far better than ITI there."),
    ):
        gain, effect = gains[f"{where} optimal over localized ITI"], gains[f"{where} optimal over unedited"]
        outcome: Outcome = "could not test"
        if _low(gain) > margin and _low(effect) > 0:
            outcome = "replicated"
        elif _high(gain) < margin:
            outcome = "not replicated"
        yield Claim(
            name,
            section,
            says,
            rule,
            f"optimal minus ITI {_interval(gain)}; optimal minus unedited {_interval(effect)}",
            _unless_missing(n, n["optimal"], _unless_missing(n, n["iti"], outcome)),
        )
    gain, effect = gains["localized optimal over whole optimal"], gains["whole optimal over unedited"]
    yield Claim(
        "localized_is_nearly_optimal",
        section,
        "The optimal edit at the probed heads is nearly as good as that of the whole model.",
        f"replicated if the 90 % interval of probed minus whole lies above -{margin:g}; not replicated if below; "
        f"{_works_rule('of the whole model', margin)}",
        f"probed minus whole {_interval(gain)}; whole minus unedited {_interval(effect)}",
        _unless_missing(n, n["optimal"], _if_works(n, effect, _not_worse(gain))),
    )


def _at_random_sets(n: Numbers) -> Iterator[Claim]:
    section = "Optimal Interventions at Localized Heads are Nearly Optimal, but so are Random Heads"
    optimal, margin, gap = n["optimal"], n["setup"]["margin"], n["optimal"]["gap"]
    localized, whole = n["gains"]["localized optimal over unedited"], n["gains"]["whole optimal over unedited"]
    outcome: Outcome = "could not test"
    if optimal["n_random_diverged"] <= MOST_DIVERGED * optimal["n_random"]:
        outcome = "replicated" if _high(gap) < margin else "not replicated" if _low(gap) > margin else outcome
    yield Claim(
        "random_is_as_good",
        section,
        "Under optimal edits random sets of heads are as good as the probed ones.",
        f"replicated if the 95 % interval of probed minus mean random lies below {margin:g}; not replicated if above; "
        "could not test if more than a tenth of the random sets diverged; "
        f"{_works_rule('at the probed heads', margin)}",
        _against_random(optimal, "Info*Truth"),
        _unless_missing(n, optimal, _if_works(n, localized, outcome)),
    )
    found = optimal["random_matching_whole"]
    yield Claim(
        "random_matches_whole",
        section,
        "Optimal edits at random sets can be as effective as aligning the whole model.",
        "replicated if at least 2 random sets match the whole model after Holm's correction; not replicated if all are "
        f"worse; {_works_rule('of the whole model', margin)}",
        _counts(found, optimal["n_random"], "the whole model"),
        _unless_missing(n, optimal, _if_works(n, whole, _several(found, optimal["n_random"], 2))),
    )


def _at_single_heads(n: Numbers) -> Iterator[Claim]:
    section = "Intervening a Single Head is Just as Effective"
    single, margin = n["single"], n["setup"]["margin"]
    localized, whole = n["gains"]["localized optimal over unedited"], n["gains"]["whole optimal over unedited"]
    heads, rule = single["n_random"], single["rule"]
    yield Claim(
        "single_heads_match",
        section,
        "Several random single heads (5 of 24) are as effective as the 16 probed heads.",
        f"replicated if at least 2 match after Holm's correction; not replicated if all but one are worse; {rule}; "
        f"{_works_rule('at the probed heads', margin)}",
        f"{_counts(single['matching'], heads, 'the probed heads')}; {single['n_at_least_localized']} score at least as "
        "high",
        _unless_missing(n, n["optimal"], _if_works(n, localized, _several(single["matching"], heads, 2))),
    )
    yield Claim(
        "single_head_matches_whole",
        section,
        "A single head can be as effective as finetuning the entire model.",
        "replicated if at least 1 random single head matches the whole model after Holm's correction; not replicated "
        f"if all are worse; {_works_rule('of the whole model', margin)}",
        _counts(single["matching_whole"], heads, "the whole model"),
        _unless_missing(n, n["optimal"], _if_works(n, whole, _several(single["matching_whole"], heads, 1))),
    )
    k, ranks, drawn = n["setup"]["n_localized"], single["matching_probe_rank"], single["n_random_among_probed"]
    outcome: Outcome = "could not test"
    if ranks and drawn:
        outcome = "replicated" if min(ranks) > k else "not replicated"
    chance = comb(heads - drawn, len(ranks)) / comb(heads, len(ranks)) if ranks else math.nan
    yield Claim(
        "matching_heads_are_not_probed",
        section,
        "None of the single heads that match has a high probe accuracy.",
        f"replicated if none of the heads that match after Holm's correction is among the {k} best probed; could not "
        f"test if none matches, or none of the drawn heads is; {_works_rule('at the probed heads', margin)}",
        "no head matches after Holm's correction"
        if not ranks
        else f"ranks by probe accuracy: {', '.join(map(str, ranks))}; {drawn} of the {heads} drawn heads are among the "
        f"{k} best probed, so that by chance alone none would match with probability {chance:.2f}",
        _unless_missing(n, n["optimal"], _if_works(n, localized, outcome)),
    )


def _about_probes(n: Numbers) -> Iterator[Claim]:
    section = "Are the Probing-Localized Heads Anything Special?"
    mc, margin = n["multiple_choice"], n["setup"]["margin_mc"]
    yield Claim(
        "probed_heads_know",
        section,
        "Under optimal edits the probed heads have slightly better MC scores than random ones.",
        _superiority_rule(margin),
        _against_random(mc["optimal"], "MC2"),
        _superiority(n, mc["optimal"], margin),
    )
    lead, both = mc["iti"]["gap"], mc["lead_under_iti_minus_optimal"]
    outcome: Outcome = "could not test"
    if _low(lead) > 0 and _low(both) > 0:
        outcome = "replicated"
    elif _high(both) < 0 or _high(lead) < 0:
        outcome = "not replicated"
    yield Claim(
        "less_than_under_iti",
        section,
        "That advantage in MC is smaller than under ITI.",
        "replicated if the 95 % intervals of probed minus mean random in MC2 under ITI, and of that lead minus the one "
        "under optimal edits, lie above 0; not replicated if one of them lies below",
        f"probed minus mean random in MC2: ITI {_interval(lead)}, optimal {_interval(mc['optimal']['gap'])}; ITI minus "
        f"optimal {_interval(both)}",
        outcome,
    )


def _superiority_rule(margin: float) -> str:
    return (
        "replicated if the Monte-Carlo p against the random sets is at most the level, or the smallest possible, "
        f"1 / (1 + N), where that is at most {LARGEST_FLOOR:g}; not replicated if the 95 % interval of probed minus "
        f"mean random lies below {margin:g}"
    )


def _superiority(n: Numbers, block: Numbers, margin: float) -> Outcome:
    p, floor = block["p_monte_carlo"], block["p_smallest"]
    if block["localized_score"] is None or math.isnan(block["localized_score"]):
        return "could not test"
    outcome: Outcome = "could not test"
    if floor <= LARGEST_FLOOR and p <= max(floor, n["setup"]["level"]) + 1e-12:
        outcome = "replicated"
    elif _high(block["gap"]) < margin:
        outcome = "not replicated"
    return _unless_missing(n, block, outcome)


def _works_rule(where: str, margin: float) -> str:
    return (
        f"could not test unless the edit {where} improves on the unedited model by more than {margin:g} (90 % interval)"
    )


def _if_works(n: Numbers, effect: Numbers, outcome: Outcome) -> Outcome:
    return outcome if _low(effect) > n["setup"]["margin"] else "could not test"


def _unless_missing(n: Numbers, block: Numbers, outcome: Outcome) -> Outcome:
    return "could not test" if block["worst_missing"] > n["setup"]["max_missing"] else outcome


def _not_worse(gain: Numbers) -> Outcome:
    found: dict[str, Outcome] = {"not worse": "replicated", "worse": "not replicated"}
    return found.get(gain["outcome"], "could not test")


def _several(found: Numbers, of: int, enough: int) -> Outcome:
    if found["match_holm"] >= enough:
        return "replicated"
    return "not replicated" if of - found["worse"] < enough else "could not test"


def _counts(found: Numbers, of: int, what: str) -> str:
    return (
        f"{found['match']} of {of} match {what}, {found['match_holm']} of them after Holm's correction; "
        f"{found['worse']} are worse, for {found['undecided']} the questions are too few"
    )


def _against_random(block: Numbers, score: str) -> str:
    scores = [x for x in block["random_scores"] if x is not None and not math.isnan(x)]
    span = f"{min(scores):.3f} to {max(scores):.3f}" if scores else "none scored"
    return (
        f"{score} {_plain(block['localized_score'])} at the probed heads, {span} at random sets, "
        f"{block['n_at_least']} of {len(block['random_scores'])} at least as high (Monte-Carlo p = "
        f"{_plain(block['p_monte_carlo'])}; parametric, by a t-test: p = {_small(block['p_t_test'])}); probed minus "
        f"mean random {_interval(block['gap'])}"
    )


def _interval(found: Numbers) -> str:
    key = "interval_90" if "interval_90" in found else "interval_95"
    low, high = found[key]
    return f"{_signed(found['difference'])} ({key[-2:]} %: {_signed(low)} to {_signed(high)})"


def _low(found: Numbers) -> float:
    """Lower end of the interval; below everything where there is none, or too few questions differ."""
    return _end(found, 0, -math.inf)


def _high(found: Numbers) -> float:
    """Upper end of the interval; above everything where there is none, or too few questions differ."""
    return _end(found, 1, math.inf)


def _end(found: Numbers, side: int, otherwise: float) -> float:
    value = found["interval_90" if "interval_90" in found else "interval_95"][side]
    return otherwise if value is None or math.isnan(value) or found["few"] else value


def _plain(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.3f}"


def _signed(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:+.3f}".replace("-", "−")


def _small(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.2g}"
