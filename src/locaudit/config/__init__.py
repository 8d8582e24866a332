"""Settings: dataclasses with every default, their checks, YAML files and presets."""

from locaudit.config.checks import check_judge
from locaudit.config.files import load_config, load_preset, merge_config, parse_config, to_yaml
from locaudit.config.settings import (
    AuditConfig,
    EvaluationConfig,
    ITIConfig,
    JudgeConfig,
    JudgesConfig,
    LoadingConfig,
    OptimalConfig,
    ProbeConfig,
    PromptConfig,
    Score,
    SplitConfig,
    to_dict,
)

__all__ = [
    "AuditConfig",
    "EvaluationConfig",
    "ITIConfig",
    "JudgeConfig",
    "JudgesConfig",
    "LoadingConfig",
    "OptimalConfig",
    "ProbeConfig",
    "PromptConfig",
    "Score",
    "SplitConfig",
    "check_judge",
    "load_config",
    "load_preset",
    "merge_config",
    "parse_config",
    "to_dict",
    "to_yaml",
]
