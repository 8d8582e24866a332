"""Register the built-in methods of finding edits, training objectives and rules that rank places.

Their code is imported at first use.
"""

from __future__ import annotations

from locaudit.methods.base import Fit, Job, Method, Objective, Rule
from locaudit.methods.settings import AblateSettings, ConstantSettings, GivenSettings, ITISettings, OptimalSettings
from locaudit.registry import METHODS, OBJECTIVES, RULES

__all__ = ["Fit", "Job", "Method", "Objective", "Rule"]


def _strength_symbol(settings: OptimalSettings | ConstantSettings) -> str:
    return OBJECTIVES[settings.objective].symbol


def _ipo(margin, strength: float):
    return (margin - 1 / (2 * strength)) ** 2


def _dpo(margin, strength: float):
    from torch.nn.functional import logsigmoid

    return -logsigmoid(strength * margin)


OBJECTIVES.register("ipo")(Objective(_ipo, "τ"))
OBJECTIVES.register("dpo")(Objective(_dpo, "β"))

METHODS.register("iti")(
    Method(
        "ITI",
        ITISettings,
        "locaudit.methods.iti:fit",
        prepare="locaudit.methods.iti:prepare",
        grid=("doses", "alphas"),
        symbol=lambda settings: "α" if settings.doses is None else "KL",
        placebo=lambda settings: settings.direction != "random",
    )  # fmt: skip
)
METHODS.register("optimal")(
    Method(
        "Optimal edit",
        OptimalSettings,
        "locaudit.methods.optimal:fit",
        grid="strengths",
        symbol=_strength_symbol,
        rest=True,
        placebo=True,
        trained=True,
    )  # fmt: skip
)
METHODS.register("constant")(
    Method(
        "Constant edit",
        ConstantSettings,
        "locaudit.methods.optimal:fit_constant",
        grid="strengths",
        symbol=_strength_symbol,
        placebo=True,
        trained=True,
    )  # fmt: skip
)
METHODS.register("ablate")(
    Method(
        "Mean ablation",
        AblateSettings,
        "locaudit.methods.ablate:fit",
        prepare="locaudit.methods.ablate:prepare",
        supports="lower",
        whole=False,
    )  # fmt: skip
)
METHODS.register("given")(
    Method(
        "Given edit",
        GivenSettings,
        "locaudit.methods.given:fit",
        null="directions",
        whole=False,
        check=GivenSettings.check,
    )  # fmt: skip
)

RULES.register("probe")(Rule("validation accuracy of a linear probe", "locaudit.methods.rules:probe"))
RULES.register("mean-difference")(
    Rule("distance of the class means in pooled standard deviations", "locaudit.methods.rules:mean_difference")
)
_CHANGE = "size of the margin's change, in nats, if the output is replaced"
RULES.register("gradient")(
    Rule(f"first-order {_CHANGE}", "locaudit.methods.rules:gradient", is_change=True, replaces=True)
)
RULES.register("patching")(Rule(_CHANGE, "locaudit.methods.rules:patching", is_change=True, replaces=True))
