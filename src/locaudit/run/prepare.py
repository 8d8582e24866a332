"""Compute what all trials of an audit share, once, and keep it in the run folder's cache."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from locaudit.behaviours.behaviour import Question
from locaudit.behaviours.format import Prompt
from locaudit.claims.kinds import blocks_for
from locaudit.config import AuditConfig
from locaudit.errors import ConfigError, ModelError
from locaudit.location import Location, Positions
from locaudit.measure.activations import Activations, Context, collect_activations
from locaudit.measure.drift import DriftText, cut_documents, prompt_documents, sample_documents, start_tokens
from locaudit.measure.forward import answer_log_probs, check_depth, check_length
from locaudit.measure.generation import differing_answers
from locaudit.measure.identity import check_trees, hardest_trees
from locaudit.measure.tree import Forest, Tree, plant
from locaudit.methods import Method
from locaudit.methods.probes import Probes, fit_probes
from locaudit.methods.training import TrainingData
from locaudit.models.model import Model
from locaudit.records import NullId, content_hash
from locaudit.registry import KINDS, METHODS
from locaudit.run.placebos import Placebo
from locaudit.run.subject import Inputs, prompt_positions
from locaudit.run.worker import Exchanged, HeldOut, Shared
from locaudit.stats.scores import RELATED
from locaudit.store.cache import Cache
from locaudit.store.database import Store
from locaudit.store.files import write_atomically
from locaudit.text import plural

Say = Callable[[str], None]
Tensors = tuple[dict[str, Tensor], dict[str, Any]]
N_COMPARED = 8
"""Test questions that a 16-bit model answers both in one batch and one by one (`note_rounding`)."""


@dataclass(frozen=True, eq=False)
class Forests:
    """The questions of each split as trees of token ids. Fits and measurements are identified by these ids."""

    train: Forest
    """All training questions; a trained method may use only the first ones (``max_questions``)."""
    held_out: Mapping[str, Forest]
    """``val``, ``test``, ``off:NAME``, and ``paraphrases:val`` and the like."""
    n_true: Mapping[str, tuple[int, ...]]
    """Split, ``train`` included -> for each question, the number of its first answers that are true."""
    owners: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """``paraphrases:val`` and the like -> for each prompt, the place of its question in ``val``."""

    @cached_property
    def keys(self) -> dict[str, list[str]]:
        """Split -> for each held-out question, the key under which its measurements are stored.

        Other prompts of a question are part of its key, which is theirs, too.
        """
        found = {name: question_keys(forest, self.n_true[name]) for name, forest in self.held_out.items()}
        for name, owners in self.owners.items():
            others, part = defaultdict(list), name.rpartition(":")[2]
            for key, owner in zip(found[name], owners, strict=True):
                others[owner].append(key)
            found[part] = [content_hash([key, others[i]]) for i, key in enumerate(found[part])]
        for name, owners in self.owners.items():
            found[name] = [found[name.rpartition(":")[2]][i] for i in owners]
        return found


def question_keys(forest: Forest, n_true: Sequence[int]) -> list[str]:
    """For each question, the hash of its prompt, its true and false answers as token ids, and its subject if marked."""
    trees = zip(forest.trees, n_true, strict=True)
    return [content_hash([forest.prefix + tree.prompt, tree.branches, n, *tree.mark]) for tree, n in trees]


@dataclass(frozen=True, eq=False)
class Preparing:
    """What `Method.prepare` may use: the model and training questions only. Activations are read when first needed."""

    model: Model
    config: AuditConfig
    kind: str
    """Kind of the claim's units, such as ``head``."""
    questions: tuple[Question, ...]
    forest: Forest
    """The training questions as trees of token ids."""
    prompt: Prompt
    say: Say
    original: Preparing | None = None
    """For a placebo, the same with all answers in their place: activations are read from it."""
    exchanged: tuple[bool, ...] = ()
    """For a placebo, whether the answers of each question are exchanged."""
    positions: Positions = "all"
    """Tokens at which rules that replace a unit's output do so."""
    pairs: tuple[Tree, ...] = ()
    """What they replace it by: for each question, the tree of its paired prompt, with the question's answers, whose
    outputs are taken at the same tokens, counted from the end of the prompt. Empty: the mean."""

    def for_placebo(self, placebo: Placebo) -> Preparing:
        """The same with a placebo's questions."""
        new = {"questions": placebo.questions, "forest": placebo.forest, "exchanged": placebo.chosen}
        return replace(self, **new, original=self)

    @property
    def blocks(self) -> tuple[int, int] | None:
        """(units per layer, coordinates per unit) of the kind; None for kinds whose units are not equal blocks."""
        return KINDS[self.kind].blocks(self.model.shape)

    @cached_property
    def activations(self) -> Activations:
        """Activations of every unit (of whole layers, if units are no blocks) at the last token of each answer."""
        if self.original is not None:
            return self.original.activations.exchange(self.exchanged)
        self.say("reading activations of the training questions")
        return self._read(self.config.probe.context)

    @cached_property
    def spread(self) -> Activations:
        """Activations for ITI's sigma, read where another question follows the answer."""
        if self.config.probe.context == "next_question":
            return self.activations
        if self.original is not None:
            return self.original.spread.exchange(self.exchanged)
        return self._read("next_question")

    @cached_property
    def probes(self) -> Probes:
        """A probe for every unit."""
        probe, n_units = self.config.probe, self.activations.values.shape[2]
        self.say(f"fitting {self.model.n_layers * n_units} probes")
        return fit_probes(
            self.activations,
            inverse_l2=probe.inverse_l2,
            val_fraction=probe.val_fraction,
            seed=self.config.seed,
            kind=blocks_for(self.kind, self.model.shape),
        )

    def _read(self, context: Context) -> Activations:
        kind = blocks_for(self.kind, self.model.shape)
        return collect_activations(
            self.model, self.questions, context=context, kind=kind, prompt=self.prompt, seed=self.config.seed
        )


@dataclass(frozen=True, eq=False)
class Probed:
    """Probes of every unit of one kind, and the mean Euclidean norm of its activation (layers, units)."""

    probes: Probes
    norm: Tensor


def plant_questions(inputs: Inputs, model: Model) -> Forests:
    """The trees of all splits. Raises an error if a question with its answer does not fit the model's context."""
    limit = inputs.config.evaluation.max_new_tokens

    grow = partial(_grow, inputs, model)
    held_out = {name: grow(getattr(inputs.split, name), inputs.scoring) for name in ("val", "test")}
    for name, forest in held_out.items():
        if limit:
            longest = len(forest.prefix) + max(len(tree.prompt) for tree in forest.trees)
            check_length(model, longest + limit, f"a {name} question with its answer", len(forest.prefix))
    held_out |= {name: grow(questions, prompt) for name, (prompt, questions) in inputs.off_target.items()}
    owners = {}
    for name in (f"{kind}:{part}" for kind, part in product(RELATED, ("val", "test"))):
        if prompts := inputs.held_out(name):
            held_out[name] = grow(prompts, inputs.scoring)
            places = {q.id: i for i, q in enumerate(inputs.held_out(name.rpartition(":")[2]))}
            owners[name] = tuple(places[q.id] for q in prompts)
    questions = {"train": inputs.split.train, **{name: inputs.held_out(name) for name in held_out}}
    n_true = {name: tuple(len(question.true) for question in asked) for name, asked in questions.items()}
    for forest in held_out.values():
        check_depth(model, forest)
    return Forests(plant_training(inputs, model), held_out, n_true, owners)


def plant_training(inputs: Inputs, model: Model, positions: Positions = "all") -> Forest:
    """The trees of the training questions. Raises an error if one does not fit the model's context.

    Their subjects are found if `positions`, or edits of the settings, are ``subject``.
    """
    train = _grow(inputs, model, inputs.split.train, inputs.training, positions)
    if inputs.config.prompt.eos_in_training:
        train = end_branches(train, model)
    check_depth(model, train)
    return train


def _grow(
    inputs: Inputs, model: Model, questions: Sequence[Question], prompt: Prompt, positions: Positions = "all"
) -> Forest:
    """Plant questions, with their subjects if edits or `positions` need them."""
    marks = "subject" in (positions, *prompt_positions(inputs.config))
    subjects = [q.subject for q in questions] if marks else []
    return plant(model.tokenizer, prompt, [(q.text, q.answers) for q in questions], subjects)


def end_branches(forest: Forest, model: Model) -> Forest:
    """The forest with the tokenizer's EOS token after each branch. Raises `ConfigError` if the tokenizer has none."""
    eos: Any = model.tokenizer.eos_token_id  # pyright: ignore[reportAttributeAccessIssue]
    if eos is None:
        raise ConfigError(
            got=f"prompt.eos_in_training with {model.name}, whose tokenizer has no end-of-sequence token",
            expected="a tokenizer with eos_token",
            remedy="leave prompt.eos_in_training out, or set eos_token in the tokenizer's files",
        )
    return Forest(forest.prefix, tuple(replace(x, branches=tuple((*y, eos) for y in x.branches)) for x in forest.trees))


def check_identity(store: Store, model: Model, forests: Forests, say: Say) -> None:
    """Check once per run folder and model that answer trees give what separate rows give (`check_trees`)."""
    forest = hardest_trees([forests.train, *forests.held_out.values()])

    def compute() -> Tensors:
        say("comparing the longest answer tree with separate rows")
        return {"difference": torch.tensor(check_trees(model, forest))}, {}

    key = content_hash([model.fingerprint, forest.prefix, [(tree.prompt, tree.branches) for tree in forest.trees]])
    _cached(store, "identity", key, compute)


def note_rounding(store: Store, inputs: Inputs, model: Model, forests: Forests, say: Say) -> tuple[str, ...]:
    """How many answers of the unedited model depend on the batch, as a note for the report; nothing if none do."""
    limit, forest = inputs.config.evaluation.max_new_tokens, forests.held_out["test"]
    if not limit or model.lm.dtype == torch.float32:
        return ()
    prompts = [tree.prompt for tree in forest.trees[:N_COMPARED]]

    def compute() -> Tensors:
        say(f"answering {plural(len(prompts), 'question')} in one batch and one by one")
        differ = differing_answers(model, forest.prefix, prompts, max_new_tokens=limit, answer_format=inputs.scoring)
        return {"differ": torch.tensor(differ)}, {}

    key = content_hash([model.fingerprint, forest.prefix, prompts, limit, inputs.scoring.style])
    differ = int(_cached(store, "rounding", key, compute)[0]["differ"])
    if not differ:
        return ()
    return (
        f"In {str(model.lm.dtype).removeprefix('torch.')}, rounding depends on the batch: {differ} of {len(prompts)} "
        "answers of the unedited model differ between one batch and one question at a time. In float32 (--dtype "
        "float32) they are equal.",
    )


def probing_settings(config: AuditConfig) -> list[Any]:
    """The settings that activations are read with; part of each fit's identity."""
    # "turns" and not "chat": version 0.1.0 read activations in the style qa under the name "chat", and an edit of
    # that version must not get the same identity.
    prompt = config.prompt
    texts = ["turns", prompt.template, prompt.date] if prompt.style == "chat" else [prompt.style]
    # "by question": earlier versions drew the question that follows for each answer, by the order of answers.
    return [config.probe.context, config.seed, *texts, "by question"]


def prepare_probes(store: Store, preparing: Preparing, key: str) -> Probed | None:
    """Probes and activation norms of every unit, from training questions only; None for kinds without blocks."""
    if preparing.blocks is None:
        return None

    def compute() -> Tensors:
        probes = preparing.probes
        norm = preparing.activations.values.norm(dim=-1).mean(dim=0)
        tensors = {name: getattr(probes, name) for name in ("weight", "intercept", "val_accuracy")}
        meta = {name: getattr(probes, name) for name in ("majority", "n_train", "n_val")}
        return {**tensors, "norm": norm}, meta

    probe = preparing.config.probe
    key = content_hash([key, preparing.kind, probe.inverse_l2, probe.val_fraction])
    tensors, meta = _cached(store, "probes", key, compute)
    norm = tensors.pop("norm")
    return Probed(Probes(**tensors, **meta, kind=preparing.kind), norm)


def prepare_values(
    store: Store, preparing: Preparing, claim: Location, probed: Probed | None, key: str
) -> dict[NullId, NDArray]:
    """The values that nulls are matched by (`locaudit.claims.kinds.BY_VALUE`), as far as the claim has them."""
    if probed is not None:
        return {"probe-accuracy": probed.probes.val_accuracy.numpy(), "norm": probed.norm.numpy()}
    sites = preparing.model.spans(claim)
    if "covariance" not in preparing.config.nulls or not sites:
        return {}
    (site,) = sites  # X (n, d), minus its mean

    def compute() -> Tensors:
        x = preparing.activations.values[:, site.layer].flatten(1)
        return {"centred": x - x.mean(dim=0)}, {}

    return {"covariance": _cached(store, "covariance", content_hash([key, site]), compute)[0]["centred"].numpy()}


def prepare_shared(
    store: Store,
    inputs: Inputs,
    preparing: Preparing,
    forests: Forests,
    contexts: Mapping[str, str],
    cache: Cache,
    placebos: Sequence[tuple[Placebo, Mapping[str, str]]] = (),
) -> Shared:
    """Compute or read the unedited model's log-probabilities, the drift documents and each method's tensors.

    `contexts` maps each method to its `locaudit.run.plan.fit_context`, under which its tensors are cached. `placebos`
    has each placebo with its own contexts. Raises `ModelError` if the unedited model's log-probabilities are not
    finite.
    """
    config, split, model, say = inputs.config, inputs.split, preparing.model, preparing.say

    def reference(name: str, forest: Forest) -> tuple[Tensor, ...]:
        if not forest.trees:  # nothing is trained
            return ()
        # Cached question by question, so that only added questions are scored when a run grows.
        keys = question_keys(forest, forests.n_true[name][: len(forest.trees)])
        file = re.sub(r"\W+", "-", f"reference-{name}")
        key = content_hash([model.fingerprint, "sums by question"])
        before = read_cached(store, file, key)
        found: dict[str, Tensor] = {}
        if before is not None:
            found = dict(zip(before[1]["keys"], before[0]["sums"].split(before[1]["lengths"]), strict=True))
        new = {k: tree for k, tree in zip(keys, forest.trees, strict=True) if k not in found}
        if new:
            say(f"scoring the unedited model on {len(new)} {name} questions")
            sums = answer_log_probs(model, Forest(forest.prefix, tuple(new.values())))
            found |= {k: x[0] for k, x in zip(new, sums, strict=True)}
        reference = tuple(found[k] for k in keys)
        if not all(x.isfinite().all() for x in reference):
            raise ModelError(
                got=f"{model.name}, whose log-probabilities on {name} questions are not finite",
                expected="finite numbers from the unedited model",
                remedy="check the weights, or load it in float32 (loading.dtype)",
            )
        if before is None or before[1]["keys"] != keys:
            meta = {"keys": keys, "lengths": [*map(len, reference)]}
            write_cached(store, file, key, ({"sums": torch.cat(reference)}, meta))
        return reference

    trained_on = [settings.max_questions for name, settings in config.methods.items() if METHODS[name].trained]
    n_train = max((len(split.train) if n is None else n for n in trained_on), default=0)
    train = Forest(forests.train.prefix, forests.train.trees[:n_train])
    n_true = forests.n_true["train"][:n_train]
    held_out = {
        name: HeldOut(inputs.held_out(name), forest, reference(name, forest), tuple(forests.keys[name]))
        for name, forest in forests.held_out.items()
    }

    def prepared(preparing: Preparing, contexts: Mapping[str, str], ending: str = "") -> dict[str, dict[str, Tensor]]:
        found = {}
        where = preparing.kind if preparing.blocks is not None else config.claim
        for name, settings in config.methods.items():
            method: Method = METHODS[name]
            if (prepare := method.preparer) is not None and (not ending or method.has_placebo(settings)):
                key = content_hash([contexts[name], where])
                compute = partial(prepare, preparing, settings)
                found[name], _ = _cached(store, f"{name}{ending}", key, lambda c=compute: (c(), {}))
        return found

    training = TrainingData(train, n_true, reference("train", train))
    return Shared(
        model,
        config,
        training,
        held_out,
        DriftText(**_documents(store, inputs, model, say)),
        cache,
        inputs.scoring,
        prepared(preparing, contexts),
        placebos=tuple(
            Exchanged(
                training.exchange(placebo.chosen[:n_train]),
                prepared(preparing.for_placebo(placebo), own, f"-placebo-{number}"),
            )
            for number, (placebo, own) in enumerate(placebos)
        ),
        kept=store.kept(forests.keys),
        edits=store.edits,
    )


def borrow_cache(store: Store, folder: Path) -> None:
    """Copy cached tensors that this run lacks from another run. They are used only if their key is the same."""
    for file in (folder / "cache").glob("*.safetensors"):
        if not (store.cache / file.name).exists():
            write_atomically(store.cache / file.name, file.read_bytes())


def drift_source(inputs: Inputs, model: Model) -> list[Any]:
    """What decides the documents that drift is measured on, besides the model: part of the base trial's identity."""
    settings = inputs.config.evaluation
    text = content_hash(inputs.drift_text.decode(errors="replace"))
    source = [(settings.drift_documents, settings.drift_tokens), text, inputs.config.seed, start_tokens(model)]
    return [*source, "prompts"] if prompt_positions(inputs.config) else source


def _documents(store: Store, inputs: Inputs, model: Model, say: Say) -> dict[str, Tensor]:
    """The fields of `DriftText`. Held-out prompts stay those of the first call, also if the run gets more questions."""
    settings, on_prompts = inputs.config.evaluation, prompt_positions(inputs.config)
    size = settings.drift_documents, settings.drift_tokens
    if not on_prompts:
        check_length(model, len(start_tokens(model)) + settings.drift_tokens, "a drift document")

    def compute() -> Tensors:
        if on_prompts:
            forest = _grow(
                inputs, model, inputs.split.test[: settings.drift_documents], replace(inputs.scoring, primer="")
            )
            return prompt_documents(forest, model.pad_id), {}
        if settings.drift_text is not None:
            return {"documents": cut_documents(model, settings.drift_text, *size)}, {}
        say(f"sampling {size[0]} x {size[1]} tokens of text from the unedited model")
        return {"documents": sample_documents(model, *size, seed=inputs.config.seed)}, {}

    key = content_hash([model.fingerprint, *drift_source(inputs, model)])
    return _cached(store, "drift", key, compute)[0]


def _cached(store: Store, name: str, key: str, compute: Callable[[], Tensors]) -> Tensors:
    """Read tensors and JSON values from ``cache/{name}.safetensors`` if its key is the same, else compute them."""
    return read_cached(store, name, key) or write_cached(store, name, key, compute())


def read_cached(store: Store, name: str, key: str) -> Tensors | None:
    """Tensors and JSON values in ``cache/{name}.safetensors`` if its key is the same."""
    path = store.cache / f"{name}.safetensors"
    if path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("locaudit", "{}"))
                if header.get("key") == key:
                    return {k: file.get_tensor(k) for k in file.keys()}, header["meta"]  # noqa: SIM118
        except (SafetensorError, ValueError):
            pass  # damaged: computed again
    return None


def write_cached(store: Store, name: str, key: str, values: Tensors) -> Tensors:
    """Write ``cache/{name}.safetensors``; returns what `read_cached` will."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in values[0].items()}
    header = json.dumps({"key": key, "meta": values[1]}, sort_keys=True)
    write_atomically(store.cache / f"{name}.safetensors", save(tensors, {"locaudit": header}))
    return tensors, values[1]
