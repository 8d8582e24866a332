"""Settings: dataclasses with every default, their checks, YAML files and presets."""

from locaudit.config.checks import check_judge
from locaudit.config.files import load_config, load_preset, merge_config, parse_config, parse_over, read_over, to_yaml
from locaudit.config.registration import Registration, changed_settings, hold, open_settings, read_registration
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
    leaves,
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
    "Registration",
    "Score",
    "SplitConfig",
    "changed_settings",
    "check_judge",
    "hold",
    "leaves",
    "load_config",
    "load_preset",
    "merge_config",
    "open_settings",
    "parse_config",
    "parse_over",
    "read_over",
    "read_registration",
    "to_dict",
    "to_yaml",
]
