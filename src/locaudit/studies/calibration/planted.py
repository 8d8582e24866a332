r"""Models in which localization is a fact: some heads can bring a behaviour about, the others cannot.

A small Llama whose residual stream is cut into blocks of coordinates, each open to some weights only:

    ITEM, FRAME, KEY   written by embeddings (MLPs: ITEM), read by attention and MLPs
    ANSWER, OTHER      written by the heads in `places`, read by the output head: a coordinate for each answer, each
                       key, and all other words together
    JUNK               written by every head, read by nothing

So no head sees another, and only those in `places` reach the logits. RMSNorm would leak: JUNK would set the scale at
which later heads read ITEM, hence where they attend. Its epsilon is 2^80 and its weight 2^40, which makes it the
identity, to the bit, while the stream's root mean square is below 2^28: an edit of any other head leaves every logit as
it was. The fact is about heads; MLP neurons write ITEM, which every head reads.

``misconception``: each item has a true answer in one group of words and a popular false one in another, and the text
that the model learns gives the false one in 7 of 10 cases. A constant written at any head of `places` turns them all.

``key``: which of an item's two answers is true depends on a key before the item. Every head writes answers, but only
heads in `places` read KEY, into coordinates that write the keys' names (what the item "which" asks for) and no answers.
So the unedited model answers as if there were no key: right under one, wrong under the other, 0.5 on any questions with
both keys of each item, as every part of the split has them. An edit at `places` can bring the key to the answer;
elsewhere there is no key to bring, and 0.5 is all that an edit can score.

Both are read from the order of two one-token answers: ``preference_accuracy`` or ``mc1``.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from locaudit.behaviours import Behaviour, Question
from locaudit.behaviours.format import Prompt
from locaudit.claims.kinds import BUILT_IN
from locaudit.errors import ConfigError, LocationError, ModelError
from locaudit.location import Location
from locaudit.models import Model, wrap_model

Task = Literal["misconception", "key"]
Places = int | Sequence[tuple[int, int]]
Answers = Mapping[str, tuple[str, str]]
"""Item -> one answer of each group."""

GROUPS = (
    ("red", "blue", "green", "white", "black", "brown", "pink", "grey"),
    ("iron", "tin", "gold", "lead", "zinc", "brass", "steel", "copper"),
)
"""The answers: true and popular ones, or those under the first and under the second key."""
ANSWERS = (*GROUPS[0], *GROUPS[1])
KEYS, WHICH = ("north", "south"), "which"
"""`WHICH`, in an item's place, asks for the key."""
SPECIAL, TEMPLATE = ("<pad>", "<eos>", "<unk>"), ("Q:", "A:")

FALSE_SHARE, LEAN = 0.7, 0.6
"""Shares, in the text, of an item's popular answer, and of the one it leans to whatever the key (lest rounding do)."""
SPLIT = (0.5, 0.1, 0.4)
"""Shares of training, validation and test items; with one strength, nothing is chosen on validation."""

ITEM, FRAME, KEY = slice(0, 24), slice(24, 28), slice(28, 32)
ANSWER, OTHER, OUTPUT, JUNK = slice(32, 48), slice(48, 51), slice(32, 51), slice(51, 64)
WIDTH = 64
HEAD_DIM, STEADY = 32, 8
"""Coordinates of a head. The first `STEADY` read FRAME, which is the same under all questions, so that <a, o> can be
constant; in a head that knows the key, they read KEY. The others read ITEM and write answers."""
HEAD_GAIN, STEADY_GAIN, QUERY_GAIN, MLP_GAIN = 4.0, 8.0, 0.3, 0.05
"""Scales: of logits; of `STEADY` values, to stand out from items; of queries and keys, for attention that is spread;
of MLPs, which nothing normalises."""
TRAINED = ("embed_tokens", "v_proj")
STEPS, LEARNING_RATE = 150, 4e-2
LEARNED = 0.02
"""Mean KL from the text's shares, in nats, below which the text is learned."""


@dataclass(frozen=True, eq=False)
class Planted:
    """A model, a behaviour, and the fact about them."""

    model: Model
    behaviour: Behaviour
    places: Location
    """The heads at which an optimal edit (reader ``layer``) can bring the behaviour about. At no other head can one."""

    @property
    def elsewhere(self) -> Location | None:
        """Every other head; None where there is none."""
        rest = set(BUILT_IN["head"].units(self.model.shape)) - set(self.places.units)
        return Location(tuple(rest)) if rest else None

    @property
    def n_heads(self) -> int:
        """Heads in all."""
        return BUILT_IN["head"].n_units(self.model.shape)


def plant_model(
    task: Task = "misconception",
    places: Places = 1,
    *,
    n_items: int = 200,
    n_layers: int = 24,
    n_heads: int = 2,
    seed: int = 0,
    folder: str | Path | None = None,
) -> Planted:
    """Make a model of `n_layers` x `n_heads` heads, train it on its task's text, and save it if `folder` says where.

    `places` are (layer, head) pairs, or how many to draw at random: heads for ``misconception``; layers for ``key``,
    where all heads of a layer know the key or none does (an edit at one reads all of them). Of one seed, more places
    contain fewer. The same arguments give the same weights on one machine; torch's own random state is left alone.

    Raises `ConfigError` for an unknown task or number of items, `LocationError` for places that the model has not, and
    `ModelError` if the text is not learned (`LEARNED`).
    """
    if task not in ("misconception", "key"):
        raise ConfigError(got=f"the task {task!r}", expected="'misconception' or 'key'", remedy="name one of them")
    if not 10 <= n_items <= 2000:
        raise ConfigError(got=f"{n_items} items", expected="10 to 2000", remedy="200 is the default")
    where = _choose_places(task, places, n_layers, n_heads, seed)
    answers = _draw_answers(n_items, seed)
    tokenizer = _make_tokenizer([*SPECIAL, *TEMPLATE, *KEYS, WHICH, *ANSWERS, *answers])
    lm = _random_lm(tokenizer, n_layers, n_heads, seed)
    masks = {name: _mask(name, weight, tokenizer, task, where) for name, weight in lm.named_parameters()}
    loss = _train(lm, masks, *_write_text(task, answers, tokenizer))
    if not loss < LEARNED:
        remedy = "take another seed, fewer items or fewer layers"
        raise ModelError(got=f"a text learned to {loss:.3g} nats", expected=f"less than {LEARNED}", remedy=remedy)
    if folder is not None:
        lm.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return Planted(wrap_model(lm, tokenizer, str(folder or f"planted-{task}")), _ask(task, answers, seed), where)


def planted_settings() -> dict[str, Any]:
    """Settings for a planted model: ``audit(p.model, p.behaviour, claim=p.places, out="a", **planted_settings())``.

    No primer (the tokenizer has no words for one), nothing generated or judged, and optimal edits only: one strength,
    and the steps and rate with which edits of any size converge.
    """
    return {
        "score": "preference_accuracy",
        "prompt": {"primer": "none"},
        "split": {"fractions": SPLIT},
        "methods": {"optimal": {"strengths": (0.1,), "batch_size": 8, "epochs": 8, "learning_rate": 2e-2}},
        "evaluation": {"max_new_tokens": 0, "drift_documents": 4, "drift_tokens": 16},
    }


def _choose_places(task: Task, places: Places, n_layers: int, n_heads: int, seed: int) -> Location:
    layers = [tuple((layer, head) for head in range(n_heads)) for layer in range(n_layers)]
    groups = layers if task == "key" else [(unit,) for layer in layers for unit in layer]
    if isinstance(places, int):
        if not 1 <= places <= len(groups):
            raise LocationError(got=f"{places} places", expected=f"1 to {len(groups)}", remedy="change the number")
        chosen = random.Random(f"places {seed}").sample(groups, len(groups))[:places]
    else:
        if strange := set(places) - {unit for layer in layers for unit in layer}:
            heads = f"layers 0-{n_layers - 1} and heads 0-{n_heads - 1}"
            raise LocationError(got=f"heads {sorted(strange)}", expected=heads, remedy="name heads of the model")
        chosen = [group for group in groups if not set(group).isdisjoint(places)]
    return Location(tuple(unit for group in chosen for unit in group))


def _draw_answers(n_items: int, seed: int) -> Answers:
    """Items are made-up words of two syllables, unlike any other word here."""
    rng = random.Random(f"items {seed}")
    syllables = [consonant + vowel for consonant in "bdfghjklmnprstvz" for vowel in "aeiou"]
    items = rng.sample([first + second for first in syllables for second in syllables], n_items)
    return {item: (rng.choice(GROUPS[0]), rng.choice(GROUPS[1])) for item in items}


def _make_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token for each word; white space separates words."""
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def _random_lm(tokenizer: PreTrainedTokenizerFast, n_layers: int, n_heads: int, seed: int) -> LlamaForCausalLM:
    """Random weights but for the output head's; in each head, the map from values to OUTPUT has equal gains."""
    size: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 32, "head_dim": HEAD_DIM}
    size |= {"vocab_size": len(tokenizer), "num_hidden_layers": n_layers, "num_attention_heads": n_heads}
    config = LlamaConfig(**size, rms_norm_eps=2.0**80, bos_token_id=None, eos_token_id=_ids(tokenizer, SPECIAL)[1])
    with torch.random.fork_rng(devices=[]):  # transformers draws weights too
        lm = LlamaForCausalLM(config)
    gains = {"q_proj": QUERY_GAIN, "k_proj": QUERY_GAIN, "down_proj": MLP_GAIN, "embed_tokens": WIDTH**0.5}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in lm.named_parameters():
            kind = name.split(".")[-2]
            weight.normal_(0.0, gains.get(kind, 1.0) / weight.shape[-1] ** 0.5, generator=generator)
            if "norm" in name:
                weight.fill_(2.0**40)
            if kind == "v_proj":
                weight.view(n_heads, HEAD_DIM, WIDTH)[:, :STEADY] *= STEADY_GAIN
            if kind == "o_proj":
                for free in weight.view(WIDTH, n_heads, HEAD_DIM)[OUTPUT, :, STEADY:].unbind(1):
                    u, _, vh = torch.linalg.svd(free, full_matrices=False)
                    free.copy_(u @ vh)
        ones = HEAD_GAIN * torch.eye(WIDTH)
        lm.lm_head.weight[:] = ones[OTHER.start]
        lm.lm_head.weight[_ids(tokenizer, KEYS)] = ones[OTHER.start + 1 : OTHER.stop]
        lm.lm_head.weight[_ids(tokenizer, ANSWERS)] = ones[ANSWER]
    return lm


def _mask(name: str, weight: Tensor, tokenizer: PreTrainedTokenizerFast, task: Task, places: Location) -> Tensor:
    """1 where a weight may be other than 0."""
    mask = torch.full_like(weight, float("norm" in name))
    path = name.split(".")  # model.layers.0.self_attn.q_proj.weight
    match path[-2]:
        case "embed_tokens":
            mask[:, ITEM] = 1
            for words, block in ((TEMPLATE, FRAME), (KEYS, KEY)):
                for token in _ids(tokenizer, words):
                    mask[token, ITEM], mask[token, block] = 0, 1
        case "lm_head":
            mask[:, OUTPUT] = 1
        case "q_proj" | "k_proj" | "gate_proj" | "up_proj":
            mask[:, ITEM] = mask[:, FRAME] = 1
        case "down_proj":
            mask[ITEM] = 1
        case "v_proj":
            for head, rows in enumerate(mask.split(HEAD_DIM)):
                knows = task == "key" and (int(path[2]), head) in places.units
                rows[STEADY:, ITEM] = 1
                rows[:STEADY, KEY if knows else FRAME] = 1
        case "o_proj":
            mask[JUNK] = 1
            for head, columns in enumerate(mask.split(HEAD_DIM, dim=1)):
                chosen = (int(path[2]), head) in places.units
                columns[OUTPUT, STEADY:] = float(chosen or task == "key")
                columns[OTHER, :STEADY] = float(chosen and task == "key")
    return mask


def _ids(tokenizer: PreTrainedTokenizerFast, words: Sequence[str]) -> list[int]:
    return [tokenizer.get_vocab()[word] for word in words]


def _write_text(task: Task, answers: Answers, tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Prompts (texts x tokens), and the shares of the words that follow each (texts x vocabulary)."""
    rows: list[tuple[str, dict[str, float]]] = []
    for i, (item, (first, second)) in enumerate(answers.items()):
        if task == "misconception":
            rows.append((item, {first: 1 - FALSE_SHARE, second: FALSE_SHARE}))
        else:  # under one key: what answers an item cannot see it
            lean = (LEAN, 1 - LEAN)[i // 2 % 2]
            rows.append((f"{KEYS[i % 2]} {item}", {first: lean, second: 1 - lean}))
    if task == "key":
        rows += [(f"{key} {WHICH}", {key: 1.0}) for key in KEYS] * max(1, len(answers) // 10)
    targets = torch.zeros(len(rows), len(tokenizer))
    for row, (_, shares) in zip(targets, rows, strict=True):
        row[_ids(tokenizer, list(shares))] = torch.tensor(list(shares.values()))
    return torch.tensor([tokenizer(Prompt().render(text, tokenizer))["input_ids"] for text, _ in rows]), targets


@torch.enable_grad()
def _train(lm: LlamaForCausalLM, masks: Mapping[str, Tensor], ids: Tensor, targets: Tensor) -> float:
    """AdamW on all of the text at once, the masks after each step; returns the mean KL from `targets` in nats."""
    weights = dict(lm.named_parameters())
    for name, weight in weights.items():
        weight.requires_grad_(name.split(".")[-2] in TRAINED)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

    def mask() -> None:
        for name, allowed in masks.items():
            weights[name].data.mul_(allowed)

    def loss() -> Tensor:
        last = lm.model(input_ids=ids, use_cache=False).last_hidden_state[:, -1]  # type: ignore[index]
        return nn.functional.cross_entropy(lm.lm_head(last), targets)

    mask()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()
        mask()
    return loss().item() - torch.special.entr(targets).sum(dim=1).mean().item()


def _ask(task: Task, answers: Answers, seed: int) -> Behaviour:
    """A question for each item, or for each item under each key, both on one side of the split."""
    shuffled = random.Random(f"split {seed}").sample(list(answers), len(answers))
    n_train, n_val = (round(len(answers) * share) for share in SPLIT[:2])
    questions: list[Question] = []
    for i, item in enumerate(shuffled):
        first, second = answers[item]
        split = "train" if i < n_train else "val" if i < n_train + n_val else "test"
        if task == "misconception":
            questions.append(Question(item, item, (first,), (second,)))
        else:
            for key, true, false in zip(KEYS, (first, second), (second, first), strict=True):
                questions.append(Question(f"{item} {key}", f"{key} {item}", (true,), (false,), split=split))
    return Behaviour(f"planted-{task}", tuple(questions), ())
