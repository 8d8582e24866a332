"""Test whether editing gives evidence for localization in language models.

    from locaudit import audit, fit_probes, load_behaviour, load_model

    model, behaviour = load_model("smollm2-135m"), load_behaviour("misconceptions")
    claim = fit_probes(model, behaviour).top(8)
    result = audit(model, behaviour, claim=claim, controls=19, out="runs/mine")
    print(result.verdict)

Each name is imported when it is first used, so that ``locaudit --help`` and reports need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from locaudit.api import (
        PaperResult,
        RepeatsResult,
        audit,
        audit_repeats,
        find,
        fit_iti,
        fit_optimal,
        fit_probes,
        paper,
        training_questions,
    )
    from locaudit.behaviours import Behaviour, Question, load_behaviour, split_questions
    from locaudit.claims import Claim, Ranking, parse_location, read_claim, read_directions
    from locaudit.config import AuditConfig, load_config
    from locaudit.edits import Edit, EditBank, SiteEdit, folded, load_edit, save_merged, stack
    from locaudit.errors import LocauditError
    from locaudit.location import Location
    from locaudit.models import Architecture, Model, load_model, register_architecture, wrap_model
    from locaudit.report.result import AuditResult, read_result
    from locaudit.studies.paper.config import PaperConfig

_HOMES = {
    "api": (
        "PaperResult",
        "RepeatsResult",
        "audit",
        "audit_repeats",
        "find",
        "fit_iti",
        "fit_optimal",
        "fit_probes",
        "paper",
        "training_questions",
    ),
    "config": ("AuditConfig", "load_config"),
    "behaviours": ("Behaviour", "Question", "load_behaviour", "split_questions"),
    "edits": ("Edit", "EditBank", "SiteEdit", "folded", "load_edit", "save_merged", "stack"),
    "errors": ("LocauditError",),
    "claims": ("Claim", "Ranking", "parse_location", "read_claim", "read_directions"),
    "location": ("Location",),
    "report.result": ("AuditResult", "read_result"),
    "studies.paper.config": ("PaperConfig",),
    "models": ("Architecture", "Model", "load_model", "register_architecture", "wrap_model"),
}

__all__ = [
    "Architecture", "AuditConfig", "AuditResult", "Behaviour", "Claim", "Edit", "EditBank", "LocauditError", "Location",
    "Model", "PaperConfig", "PaperResult", "Question", "Ranking", "RepeatsResult", "SiteEdit", "audit", "audit_repeats",
    "find", "fit_iti", "fit_optimal", "fit_probes", "folded", "load_behaviour", "load_config", "load_edit",
    "load_model", "paper", "parse_location", "read_claim", "read_directions", "read_result", "register_architecture",
    "save_merged", "split_questions", "stack", "training_questions", "wrap_model",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"locaudit.{home}"), name)
    raise AttributeError(f"module 'locaudit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
