"""Settings: dataclasses with all defaults, YAML files, presets, and claim files fixed before a run."""

from locaudit.config.choices import JudgeChoice, unknown_names_kept
from locaudit.config.files import load_config, load_preset, merge_config, parse_config, parse_over, read_over, to_yaml
from locaudit.config.registration import Registration, changed_settings, hold, open_settings, read_registration
from locaudit.config.settings import (
    GROWS,
    ArchitectureConfig,
    AuditConfig,
    EvaluationConfig,
    LoadingConfig,
    ProbeConfig,
    PromptConfig,
    RayConfig,
    SplitConfig,
    leaves,
)
from locaudit.config.validation import to_dict

__all__ = [
    "ArchitectureConfig", "GROWS", "AuditConfig", "EvaluationConfig", "JudgeChoice", "LoadingConfig", "ProbeConfig",
    "PromptConfig", "RayConfig", "Registration", "SplitConfig", "changed_settings", "hold", "leaves", "load_config",
    "load_preset", "merge_config", "open_settings", "parse_config", "parse_over", "read_over", "read_registration",
    "to_dict", "to_yaml", "unknown_names_kept",
]  # fmt: skip
