"""The paper's claims, one by one, beside what was measured: each with the rule that decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Outcome = Literal["replicated", "not replicated", "could not test"]
Numbers = Mapping[str, Any]


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
    return [asdict(claim) for claim in _claims(numbers)]


def _claims(n: Numbers) -> Iterator[Claim]:
    iti, optimal, single, mc, margin = n["iti"], n["optimal"], n["single"], n["multiple_choice"], n["setup"]["margin"]
    localized = "Editing Localized Heads Modifies the Output as Expected"
    yield Claim(
        "iti_beats_random",
        localized,
        "Under ITI the probed heads reach a higher Info*Truth than random sets of heads (p = 1.6e-8, 16 sets).",
        "replicated if the Monte-Carlo p against the random sets is the smallest possible, 1 / (1 + N), or at most the "
        "level; not replicated if it is above 0.2",
        _against_random(iti),
        _rank(iti, n),
    )
    gains = iti["random_gaining_truth"]
    yield Claim(
        "random_iti_does_nothing",
        localized,
        "ITI at random heads often has no noticeable effect on Truth.",
        f"replicated if the median random set gains at most {margin:g} in Truth; not replicated if it gains more",
        f"the median random set gains {_signed(gains['median'])} in Truth, the probed heads "
        f"{_signed(gains['localized'])}",
        _decide(gains["median"], lambda x: x <= margin, lambda x: x > margin),
    )
    yield Claim(
        "iti_mc_kl",
        localized,
        "Under ITI the probed heads have the better trade-off of MC and KL.",
        "replicated if no random set reaches the probed heads' MC2 for as little KL; not replicated if a fifth do",
        f"{mc['iti']['n_random_with_as_much_for_less_kl']} of {iti['n_random']} random sets reach as high an MC2 for "
        f"as little KL (probed heads: MC2 {_plain(mc['iti']['localized_score'])}, KL "
        f"{_plain(mc['iti']['localized_kl'])})",
        _share(mc["iti"]["n_random_with_as_much_for_less_kl"], iti["n_random"]),
    )
    whole = "Finding “Optimal” Interventions"
    yield Claim(
        "optimal_beats_iti",
        whole,
        "The optimal edit of the whole model is far better than ITI at the probed heads.",
        "replicated if the 90 % interval of the difference in Info*Truth lies above 0; not replicated if it lies below "
        f"{margin:g}",
        _difference(n["gains"]["whole optimal over localized ITI"]),
        _above(n["gains"]["whole optimal over localized ITI"], margin),
    )
    yield Claim(
        "localized_beats_iti",
        whole,
        "The optimal edit at the probed heads is far better than ITI there.",
        "as before",
        _difference(n["gains"]["localized optimal over localized ITI"]),
        _above(n["gains"]["localized optimal over localized ITI"], margin),
    )
    yield Claim(
        "localized_is_nearly_optimal",
        whole,
        "The optimal edit at the probed heads is nearly as good as that of the whole model.",
        f"replicated if the 90 % interval of probed minus whole lies above -{margin:g}; not replicated if below; could "
        "not test unless the edit of the whole model improves on the unedited one (that interval above 0)",
        f"{_difference(n['gains']['localized optimal over whole optimal'])}; whole minus unedited "
        f"{_difference(n['gains']['whole optimal over unedited'])}",
        _if_works(
            n["gains"]["whole optimal over unedited"], _match(n["gains"]["localized optimal over whole optimal"])
        ),
    )
    random = "Optimal Interventions at Localized Heads are Nearly Optimal, but so are Random Heads"
    gap = optimal["gap"]
    works = "could not test unless the edit at the probed heads improves on the unedited model (90 % interval above 0)"
    yield Claim(
        "random_is_as_good",
        random,
        "Under optimal edits random sets of heads are as good as the probed ones.",
        f"replicated if the 95 % interval of probed minus mean random lies below {margin:g}; not replicated if above; "
        f"{works}",
        f"{_against_random(optimal)}; probed minus mean random {_interval(gap['difference'], gap['interval_95'])}",
        _if_works(
            n["gains"]["localized optimal over unedited"],
            _decide_interval(gap["interval_95"], lambda low, high: high < margin, lambda low, high: low > margin),
        ),
    )
    one = "Intervening a Single Head is Just as Effective"
    yield Claim(
        "single_heads_match",
        one,
        "Several random single heads (5 of 24) are as effective as the 16 probed heads.",
        f"replicated if at least 2 match after Holm's correction ({single['rule']}); not replicated if all but one "
        f"fall short; {works}",
        f"{single['n_match']} of {single['n_random']} match, {single['n_match_holm']} of them after Holm's correction; "
        f"{single['n_fall_short']} fall short, for {single['n_undecided']} the questions are too few; "
        f"{single['n_at_least_localized']} score at least as high",
        _if_works(n["gains"]["localized optimal over unedited"], _singles(single)),
    )
    yield Claim(
        "matching_heads_are_not_probed",
        one,
        "None of the single heads that match has a high probe accuracy.",
        f"replicated if none of them is among the {n['setup']['n_localized']} best probed; could not test without any",
        "no head matches after Holm's correction"
        if not single["matching_heads"]
        else "ranks by probe accuracy: " + ", ".join(map(str, single["matching_probe_rank"])),
        "could not test"
        if not single["matching_heads"]
        else "replicated"
        if min(single["matching_probe_rank"]) > n["setup"]["n_localized"]
        else "not replicated",
    )
    special = "Are the Probing-Localized Heads Anything Special?"
    yield Claim(
        "probed_heads_know",
        special,
        "Under optimal edits the probed heads have slightly better MC scores than random ones.",
        "replicated if the Monte-Carlo p of MC2 is the smallest possible or at most the level; not replicated if it is "
        "above 0.2",
        _against_random(mc["optimal"], "MC2"),
        _rank(mc["optimal"], n),
    )
    first, second = mc["iti"]["gap"]["difference"], mc["optimal"]["gap"]["difference"]
    yield Claim(
        "less_than_under_iti",
        special,
        "That advantage in MC is smaller than under ITI.",
        "replicated if probed minus mean random in MC2 is above 0 under ITI and smaller under optimal edits (no test: "
        "a comparison of two differences)",
        f"probed minus mean random in MC2: ITI {_signed(first)}, optimal {_signed(second)}",
        "could not test"
        if first is None or second is None or math.isnan(first + second)
        else "replicated"
        if first > 0 and second < first
        else "not replicated",
    )


def _against_random(block: Numbers, score: str = "Info*Truth") -> str:
    scores = [x for x in block["random_scores"] if x is not None and not math.isnan(x)]
    span = f"{min(scores):.3f} to {max(scores):.3f}" if scores else "none scored"
    return (
        f"{score} {_plain(block['localized_score'])} at the probed heads, {span} at random sets, "
        f"{block['n_at_least']} of {len(block['random_scores'])} at least as high (Monte-Carlo p = "
        f"{_plain(block['p_monte_carlo'])}; parametric, by a t-test: p = {_small(block['p_t_test'])})"
    )


def _difference(gain: Numbers) -> str:
    return _interval(gain["difference"], gain["interval_90"])


def _interval(difference: float | None, interval: tuple[float | None, float | None]) -> str:
    return f"{_signed(difference)} ({_signed(interval[0])} to {_signed(interval[1])})"


def _rank(block: Numbers, n: Numbers) -> Outcome:
    p, floor = block["p_monte_carlo"], max(block["p_smallest"], n["setup"]["level"])
    return _decide(p, lambda x: x <= floor + 1e-12, lambda x: x > 0.2)


def _share(count: int, of: int) -> Outcome:
    return "replicated" if count == 0 else "not replicated" if count >= 0.2 * of else "could not test"


def _above(gain: Numbers, margin: float) -> Outcome:
    return _decide_interval(gain["interval_90"], lambda low, high: low > 0, lambda low, high: high < margin)


def _match(gain: Numbers) -> Outcome:
    outcomes: dict[str, Outcome] = {"matches": "replicated", "falls short": "not replicated"}
    return outcomes.get(gain["outcome"], "could not test")


def _if_works(gain: Numbers, outcome: Outcome) -> Outcome:
    """Two edits that both do nothing match, and that says nothing."""
    return outcome if _above(gain, 0.0) == "replicated" else "could not test"


def _singles(single: Numbers) -> Outcome:
    if single["n_match_holm"] >= 2:
        return "replicated"
    return "not replicated" if single["n_match"] + single["n_undecided"] <= 1 else "could not test"


def _decide(value: float | None, yes: Callable[[float], bool], no: Callable[[float], bool]) -> Outcome:
    if value is None or math.isnan(value):
        return "could not test"
    return "replicated" if yes(value) else "not replicated" if no(value) else "could not test"


def _decide_interval(
    interval: tuple[float, float], yes: Callable[[float, float], bool], no: Callable[[float, float], bool]
) -> Outcome:
    low, high = interval
    if low is None or high is None or math.isnan(low + high):
        return "could not test"
    return "replicated" if yes(low, high) else "not replicated" if no(low, high) else "could not test"


def _plain(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.3f}"


def _signed(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:+.3f}".replace("-", "−")


def _small(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.2g}"
