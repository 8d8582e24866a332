"""The arithmetic of an estimate: seconds of a whole plan from the pace of each kind of work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from locaudit.behaviours import Split
from locaudit.config import AuditConfig
from locaudit.location import parse_location
from locaudit.measure.tree import Forest, Tree
from locaudit.models import Model
from locaudit.records import TrialSpec
from locaudit.run.worker import scored_splits


@dataclass(frozen=True)
class Decoding:
    """Seconds of generating answers: one part a batch, one a row."""

    batch: float
    row: float

    def seconds(self, n_prompts: int, n_edits: int, n_rows: int) -> float:
        """Of `n_prompts` answers under each of `n_edits` edits, in batches of at most `n_rows`."""
        per_batch = max(n_rows // n_edits, 1)
        return -(-n_prompts // per_batch) * self.batch + n_prompts * n_edits * self.row


@dataclass(frozen=True)
class Paces:
    """Seconds of one unit of each kind of work. A part that the audit lacks is 0 or empty."""

    probe_example: float
    """Activations of one question with one answer."""
    probe_fit: float
    """All probes, fitted on all training examples."""
    read: float
    """A tree token, unedited."""
    prefix: float
    """The primer, under one edit."""
    score: float
    """A tree token under one edit."""
    train: Mapping[bool, float]
    """A training token forward and backward for one edit, without and with the whole model in its bank."""
    decoding: Mapping[str, Decoding]
    """By method."""
    decoded_rows: int
    """Most rows of one batch."""
    drift_sampling: float
    """All documents, drawn from the unedited model."""
    drift: float
    """A document under one edit."""
    drift_base: float
    """A document, unedited."""
    drift_kept: bool
    """Whether the unedited model's log-probabilities are kept for the next bank."""
    judge_loading: float
    """What a local judge loads when it is first asked."""
    judge: float
    """An answer, by all local judges."""
    judge_question: float
    """What a local judge runs once for a question."""


def lowest_layer(spec: TrialSpec) -> int:
    """The lowest layer that a trial edits."""
    return 0 if spec.arm in ("whole", "rest") else parse_location(spec.location).layers[0]


def training_banks(config: AuditConfig, group: Sequence[TrialSpec]) -> list[Sequence[TrialSpec]]:
    """The trials of a group that are trained together; none for a method without training."""
    if group[0].method != "optimal":
        return []
    size = config.optimal.bank_size or 1
    return [group[i : i + size] for i in range(0, len(group), size)]


def training_tokens(config: AuditConfig, forest: Forest, n_true: Sequence[int]) -> int:
    """Tokens that one epoch runs forward."""
    if config.optimal.batching == "question":
        return forest.n_tokens
    return sum(
        len(Tree(tree.prompt, (tree.branches[t], tree.branches[f])))
        for tree, n in zip(forest.trees, n_true, strict=True)
        for t in range(n)
        for f in range(n, len(tree.branches))
    )


def prepare_seconds(config: AuditConfig, paces: Paces, split: Split, forests: Mapping[str, Forest]) -> float:
    """Seconds of probes, drift text and the unedited model's scores."""
    n_examples = sum(len(question.answers) for question in split.train)
    n_readings = 2 if config.probe.context == "answer" else 1
    tokens = sum(forest.n_tokens for forest in forests.values())
    seconds = n_examples * n_readings * paces.probe_example + paces.probe_fit + tokens * paces.read
    return seconds + paces.drift_sampling


def group_seconds(
    config: AuditConfig,
    paces: Paces,
    groups: Sequence[Sequence[TrialSpec]],
    forests: Mapping[str, Forest],
    n_true: Sequence[int],
    n_layers: int,
) -> dict[str, float]:
    """Seconds of the groups' training, scoring, generating and drift, in proportion to what each part runs."""
    out: dict[str, float] = {"training": 0.0, "scoring": 0.0, "generating": 0.0, "drift": 0.0}
    n_documents = config.evaluation.drift_documents
    epoch = training_tokens(config, forests["train"], n_true)
    resumed: set[tuple[str, int]] = set()
    for group in groups:
        names, k = scored_splits(config, group[0]), len(group)
        if config.evaluation.max_new_tokens and paces.decoding:
            pace = paces.decoding.get(group[0].method) or min(paces.decoding.values(), key=lambda d: d.seconds(8, 1, 8))
            out["generating"] += sum(pace.seconds(len(forests[n].trees), k, paces.decoded_rows) for n in names)
        if group[0].method == "none":
            out["drift"] += n_documents * paces.drift_base
            continue
        lowest = [lowest_layer(spec) for spec in group]
        resumed |= {(name, min(lowest)) for name in names}
        for bank in training_banks(config, group):
            whole = any(spec.arm in ("whole", "rest") for spec in bank)
            out["training"] += config.optimal.epochs * epoch * len(bank) * paces.train[whole]
            resumed |= {("train", min(map(lowest_layer, bank)))}
        primers = len({forests[name].prefix for name in names})
        tokens = sum(forests[name].n_tokens for name in names)
        out["scoring"] += k * (primers * paces.prefix + tokens * paces.score)
        out["drift"] += n_documents * (k * paces.drift + (0.0 if paces.drift_kept else paces.drift_base))
    # Forwards begin at the lowest edited layer, from what the unedited model is run for once.
    for name, layer in resumed:
        part = "training" if name == "train" else "scoring"
        out[part] += forests[name].n_tokens * paces.read * layer / n_layers
    return out


def count_answers(config: AuditConfig, groups: Sequence[Sequence[TrialSpec]], forests: Mapping[str, Forest]) -> int:
    """Answers that the groups' trials generate."""
    if not config.evaluation.max_new_tokens:
        return 0
    return sum(len(forests[name].trees) for group in groups for spec in group for name in scored_splits(config, spec))


def count_tokens(
    config: AuditConfig, groups: Sequence[Sequence[TrialSpec]], forests: Mapping[str, Forest], n_true: Sequence[int]
) -> int:
    """Tokens that the groups' trials run forward, were every layer run and every answer as long as it may be."""
    epoch = training_tokens(config, forests["train"], n_true)
    drift = config.evaluation.drift_documents * config.evaluation.drift_tokens
    total = count_answers(config, groups, forests) * config.evaluation.max_new_tokens
    for group in groups:
        for spec in group:
            total += drift
            if spec.method != "none":
                total += sum(forests[n].n_tokens + len(forests[n].prefix) for n in scored_splits(config, spec))
            if spec.method == "optimal":
                total += config.optimal.epochs * epoch
    return total


ROW_BYTES = 850
"""Of a run's database, for each trial and held-out question: 0.73 MB for the demo's 43 trials of 20 questions."""


def count_bytes(
    config: AuditConfig, groups: Sequence[Sequence[TrialSpec]], forests: Mapping[str, Forest], model: Model
) -> int:
    """Disk that the groups' trials take: an edit file each, and their rows in the database."""
    total = 0
    for group in groups:
        for spec in group:
            total += ROW_BYTES * sum(len(forests[name].trees) for name in scored_splits(config, spec))
            if spec.method != "none":
                total += 8 * sum(model.width(site) for site in model.masks(parse_location(spec.location)))
    return total
