"""Decide for each of the paper's claims whether it replicates. The rules are here, their wording is in claims.yaml.

A claim is ``replicated`` if the numbers exclude its opposite, ``not replicated`` if they exclude the claim, and ``could
not test`` otherwise. Two edits without any effect match each other, but prove nothing. Therefore claims about effective
edits also require an effect above the margin. If too many judgements are missing, nothing is decided.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from math import comb
from pathlib import Path
from typing import Any, Literal

import yaml

from locaudit.report.html import environment

Outcome = Literal["replicated", "not replicated", "could not test"]
Numbers = Mapping[str, Any]
LARGEST_FLOOR = 0.1
"""If the smallest possible p, 1 / (1 + N), is above this, beating all N random sets is no evidence."""
MOST_DIVERGED = 0.1
"""The mean over random sets is used only if at most this share of them diverged."""
_WORKS = {"whole": "of the whole model", "localized": "at the probed heads"}


def judge_claims(numbers: Numbers) -> list[dict[str, Any]]:
    """The paper's claims in order, each with its text, the rule, what was measured, and the outcome.

    `numbers` is the content of numbers.json.
    """
    words = yaml.safe_load(Path(__file__).with_name("claims.yaml").read_text(encoding="utf-8"))
    jinja, outcomes, setup = environment(autoescape=False), decide_claims(numbers), numbers["setup"]
    single = numbers["single"]
    ranks, heads, drawn = single["matching_probe_rank"], single["n_random"], single["n_random_among_probed"]
    values = {
        "n": numbers,
        "margin": f"{setup['margin']:g}",
        "largest_floor": f"{LARGEST_FLOOR:g}",
        # hypergeometric: chance that no matching head is a probed head, if matching heads were drawn at random
        "chance": comb(heads - drawn, len(ranks)) / comb(heads, len(ranks)),
    }
    claims = []
    for claim in words["claims"]:
        rule, measured = (
            jinja.from_string(words["macros"] + claim[key]).render(values) for key in ("rule", "measured")
        )
        outcome = outcomes[claim["name"]]
        if any(numbers[method]["worst_missing"] > setup["max_missing"] for method in claim.get("judged", ())):
            outcome = "could not test"
        if where := claim.get("works"):
            rule += (
                f"; could not test unless the edit {_WORKS[where]} improves on the unedited model by more than "
                f"{setup['margin']:g} (90 % interval)"
            )
            if not _low(numbers["gains"][f"{where} optimal over unedited"]) > setup["margin"]:
                outcome = "could not test"
        told = {key: claim[key] for key in ("name", "section", "says")}
        claims.append({**told, "rule": rule, "measured": measured, "outcome": outcome})
    return claims


def decide_claims(n: Numbers) -> dict[str, Outcome]:
    """The outcome of each claim by its own condition. `judge_claims` then checks missing judgements and effects."""
    iti, optimal, single, mc, gains = n["iti"], n["optimal"], n["single"], n["multiple_choice"], n["gains"]
    margin, truth, gap = n["setup"]["margin"], iti["truth_gains"], optimal["gap"]
    better, worse = mc["iti"]["n_random_better_in_both"], mc["iti"]["n_random_worse_in_both"]
    few_diverged = optimal["n_random_diverged"] <= MOST_DIVERGED * optimal["n_random"]
    ranks = single["matching_probe_rank"]
    lead, lead_over_optimal = mc["iti"]["gap"], mc["lead_under_iti_minus_optimal"]
    return {
        "iti_beats_random": _superior(n, iti, margin),
        "random_iti_does_nothing": _outcome(
            yes=2 * truth["n_within_margin"] >= iti["n_random"], no=2 * truth["n_noticeable"] > iti["n_random"]
        ),
        "iti_mc_kl": _outcome(
            yes=better == 0
            and 2 * worse >= iti["n_random"]
            and iti["p_smallest"] <= LARGEST_FLOOR
            and _low(mc["iti"]["over_unedited"]) > 0,
            no=better is not None and better >= max(worse, iti["n_random"] / 5),
        ),
        "iti_everywhere_is_no_better": _not_worse(gains["localized ITI over whole ITI"]),
        "optimal_beats_iti": _far_better(n, "whole"),
        "localized_beats_iti": _far_better(n, "localized"),
        "localized_is_nearly_optimal": _not_worse(gains["localized optimal over whole optimal"]),
        "random_is_as_good": _outcome(yes=few_diverged and _high(gap) < margin, no=few_diverged and _low(gap) > margin),
        "random_matches_whole": _several_match(optimal["random_matching_whole"], optimal["n_random"], 2),
        "single_heads_match": _several_match(single["matching"], single["n_random"], 2),
        "single_head_matches_whole": _several_match(single["matching_whole"], single["n_random"], 1),
        "matching_heads_are_not_probed": "could not test"
        if not ranks or not single["n_random_among_probed"]
        else _outcome(yes=min(ranks) > n["setup"]["n_localized"], no=True),
        "probed_heads_know": _superior(n, mc["optimal"], n["setup"]["margin_mc"]),
        "less_than_under_iti": _outcome(
            yes=_low(lead) > 0 and _low(lead_over_optimal) > 0, no=_high(lead_over_optimal) < 0 or _high(lead) < 0
        ),
    }


def _outcome(*, yes: bool, no: bool) -> Outcome:
    return "replicated" if yes else "not replicated" if no else "could not test"


def _superior(n: Numbers, block: Numbers, margin: float) -> Outcome:
    """Whether the probed heads beat the random sets: the Monte-Carlo p is significant or the smallest possible."""
    p, floor, missing = block["p_monte_carlo"], block["p_smallest"], block["worst_missing"] > n["setup"]["max_missing"]
    if missing or block["localized_score"] is None or math.isnan(block["localized_score"]):
        return "could not test"
    best = floor <= LARGEST_FLOOR and p <= max(floor, n["setup"]["level"]) + 1e-12
    return _outcome(yes=best, no=_high(block["gap"]) < margin)


def _far_better(n: Numbers, where: str) -> Outcome:
    """Whether the optimal edit at `where` beats ITI at the probed heads by more than the margin."""
    gain, effect = (n["gains"][f"{where} optimal over {other}"] for other in ("localized ITI", "unedited"))
    margin = n["setup"]["margin"]
    return _outcome(yes=_low(gain) > margin and _low(effect) > 0, no=_high(gain) < margin)


def _not_worse(gain: Numbers) -> Outcome:
    return _outcome(yes=gain["outcome"] == "not worse", no=gain["outcome"] == "worse")


def _several_match(found: Numbers, of: int, enough: int) -> Outcome:
    """Whether at least `enough` of `of` places match (after Holm's correction)."""
    return _outcome(yes=found["match_holm"] >= enough, no=of - found["worse"] < enough)


def _low(found: Numbers) -> float:
    """Lower end of the interval; -inf if there is no interval."""
    return _end(found, 0, -math.inf)


def _high(found: Numbers) -> float:
    """Upper end of the interval; +inf if there is no interval."""
    return _end(found, 1, math.inf)


def _end(found: Numbers, side: int, otherwise: float) -> float:
    value = found["interval_90" if "interval_90" in found else "interval_95"][side]
    return otherwise if value is None or math.isnan(value) else value
