r"""Planted models: small trained Llamas in which, by construction, an edit can succeed at some heads only.

The residual stream is cut into blocks of coordinates. Masks on the weights decide which parts of the model write each
block and which parts read it:

    ITEM, FRAME        written by embeddings (ITEM also by MLPs), read by attention and MLPs
    KEY                written by embeddings, read by the values of the heads in `places` (task ``key``)
    ANSWER, OTHER      written by the heads in `places`, read by the output head: one coordinate per answer, one per
                       key, and one shared by all other words
    JUNK               written by every head, read by nothing

So no head reads what another head writes, and only the heads in `places` change the logits. RMSNorm would break this:
JUNK would change the scale at which later heads read ITEM, and thereby their attention. Therefore the norm has epsilon
2^80 and weight 2^40. This makes it exactly the identity, bit for bit, as long as the stream's root mean square is below
2^28. So an edit of any other head leaves every logit unchanged. This holds only for heads: MLP neurons write ITEM,
which every head reads.

There are two tasks:

``misconception``: each item has a true answer from one group of words and a popular false answer from another. The
training text gives the false answer in 7 of 10 cases. A constant written at any head in `places` flips all answers.

``key``: a key word before the item decides which of the item's two answers is true. Every head writes answers, but only
heads in `places` read KEY. What they
write is the key's name, which is the right answer to one item only (the word "which"). They write nothing about the
answers to other items. So the unedited model ignores the key: it is right under one key and wrong under the other.
Every part of the split has each item under both keys, so that the unedited model scores 0.5. An edit at `places` can
make the answer depend on the key. Elsewhere the key cannot be read, and no edit can score more than 0.5.

The score, ``preference_accuracy`` or ``mc1``, says which of two one-token answers has the higher probability.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
Answers = Mapping[str, tuple[str, str]]
"""Item -> (answer from the first group, answer from the second group)."""

GROUPS = (
    ("red", "blue", "green", "white", "black", "brown", "pink", "grey"),
    ("iron", "tin", "gold", "lead", "zinc", "brass", "steel", "copper"),
)
"""Answer words. ``misconception``: true and popular answers; ``key``: answers under the first and the second key."""
ANSWERS = (*GROUPS[0], *GROUPS[1])
KEYS, WHICH = ("north", "south"), "which"
"""`WHICH` in place of an item asks for the key itself."""
SPECIAL, TEMPLATE = ("<pad>", "<eos>", "<unk>"), ("Q:", "A:")

FALSE_SHARE, LEAN = 0.7, 0.6
"""Share of the popular answer in the training text (``misconception``), and of an item's preferred answer (``key``).

In ``key``, each item prefers one answer under both keys. Otherwise the two would tie, and rounding errors would
decide."""
SPLIT = (0.5, 0.1, 0.4)
"""Shares of training, validation and test items. Few are for validation, since there is only one strength to choose."""

ITEM, FRAME, KEY = slice(0, 24), slice(24, 28), slice(28, 32)
ANSWER, OTHER, OUTPUT, JUNK = slice(32, 48), slice(48, 51), slice(32, 51), slice(51, 64)
WIDTH = 64
LAYER_HEADS = 2
"""Number of heads of a layer."""
HEAD_DIM, STEADY = 32, 8
"""Number of coordinates of a head, and how many of them are steady.

The first `STEADY` coordinates read FRAME, which is the same in all questions. So an edit's <a, o>, where o is the
head's output, can be constant. In a head that knows the key, these coordinates read KEY instead. The other coordinates
read ITEM and write answers."""
HEAD_GAIN, STEADY_GAIN, QUERY_GAIN, MLP_GAIN = 4.0, 8.0, 0.3, 0.05
"""Scales of the output head, of the steady values, of queries and keys, and of MLPs. Steady values are large compared
with those of items. Queries and keys are small, so that attention is spread. MLPs are small, because nothing is
normalised."""
TRAINED = ("embed_tokens", "v_proj")
"""The weights that are trained. All others keep their initial values."""
STEPS, LEARNING_RATE = 150, 4e-2
LEARNED = 0.02
"""The training text counts as learned if the mean KL divergence from its answer shares is below this (in nats)."""


@dataclass(frozen=True, eq=False)
class Planted:
    """A planted model, its behaviour, and the heads at which an edit can succeed."""

    model: Model
    behaviour: Behaviour
    places: Location
    """The heads at which an optimal edit (reader ``layer``) can succeed. At all other heads, no edit can."""

    @property
    def elsewhere(self) -> Location | None:
        """All heads outside `places`; None if there are none."""
        rest = set(BUILT_IN["head"].units(self.model.shape)) - set(self.places.units)
        return Location(tuple(rest)) if rest else None

    @property
    def n_heads(self) -> int:
        """Number of heads in the model."""
        return BUILT_IN["head"].n_units(self.model.shape)


def plant_model(
    task: Task = "misconception", n_places: int = 1, *, n_items: int = 200, n_layers: int = 24, seed: int = 0
) -> Planted:
    """Make a model with `n_layers` layers of `LAYER_HEADS` heads and train it on its task's text.

    `n_places` is the number of random places where an edit can succeed. For ``misconception``, a place is one head. For
    ``key``, it is all heads of a layer, because an edit at one head reads all heads of its layer. With the same seed, a
    larger number of places includes the places of a smaller number.

    The same arguments give the same weights on one machine. torch's global random state is not changed.

    Raises `ConfigError` for an unknown task or a wrong number of items, `LocationError` for more places than there are,
    and `ModelError` if the text is not learned (see `LEARNED`).
    """
    if task not in ("misconception", "key"):
        raise ConfigError(got=f"the task {task!r}", expected="'misconception' or 'key'", remedy="name one of them")
    if not 10 <= n_items <= 2000:
        raise ConfigError(got=f"{n_items} items", expected="10 to 2000", remedy="change n_items; the default is 200")
    places = _choose_places(task, n_places, n_layers, seed)
    answers = _draw_answers(n_items, seed)
    tokenizer = _make_tokenizer([*SPECIAL, *TEMPLATE, *KEYS, WHICH, *ANSWERS, *answers])
    lm = _random_lm(tokenizer, n_layers, seed)
    masks = {name: _mask(name, weight, tokenizer, task, places) for name, weight in lm.named_parameters()}
    loss = _train(lm, masks, *_write_text(task, answers, tokenizer))
    if not loss < LEARNED:
        remedy = "use another seed, fewer items or fewer layers"
        raise ModelError(got=f"a text learned to {loss:.3g} nats", expected=f"below {LEARNED}", remedy=remedy)
    return Planted(wrap_model(lm, tokenizer, f"planted-{task}"), _ask(task, answers, seed), places)


def planted_settings() -> dict[str, Any]:
    """Audit settings: ``audit(p.model, p.behaviour, claim=p.places, out="a", **planted_settings())``.

    There is no primer, because the tokenizer lacks the words for it. Nothing is generated or judged. Only optimal edits
    are trained, with one strength, and with a training length and a learning rate at which edits of any size converge.
    """
    return {
        "score": "preference_accuracy",
        "prompt": {"primer": "none"},
        "split": {"fractions": SPLIT},
        "methods": {"optimal": {"strengths": (0.1,), "batch_size": 8, "epochs": 8, "learning_rate": 2e-2}},
        "evaluation": {"max_new_tokens": 0, "drift_documents": 4, "drift_tokens": 16},
    }


def _choose_places(task: Task, n_places: int, n_layers: int, seed: int) -> Location:
    """The heads of `n_places` random places."""
    layers = [[(layer, head) for head in range(LAYER_HEADS)] for layer in range(n_layers)]
    groups = layers if task == "key" else [[unit] for layer in layers for unit in layer]
    if not 1 <= n_places <= len(groups):
        raise LocationError(got=f"{n_places} places", expected=f"1 to {len(groups)}", remedy="change n_places")
    chosen = random.Random(f"places {seed}").sample(groups, len(groups))[:n_places]
    return Location(tuple(unit for group in chosen for unit in group))


def _draw_answers(n_items: int, seed: int) -> Answers:
    """Draw items (made-up words of two syllables) and two answers for each."""
    rng = random.Random(f"items {seed}")
    syllables = [consonant + vowel for consonant in "bdfghjklmnprstvz" for vowel in "aeiou"]
    items = rng.sample([first + second for first in syllables for second in syllables], n_items)
    return {item: (rng.choice(GROUPS[0]), rng.choice(GROUPS[1])) for item in items}


def _make_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word, split at white space."""
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def _random_lm(tokenizer: PreTrainedTokenizerFast, n_layers: int, seed: int) -> LlamaForCausalLM:
    """A Llama with seeded random weights, not masked yet. Some weights are set or adjusted below."""
    size: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 32, "head_dim": HEAD_DIM}
    size |= {"vocab_size": len(tokenizer), "num_hidden_layers": n_layers, "num_attention_heads": LAYER_HEADS}
    config = LlamaConfig(**size, rms_norm_eps=2.0**80, bos_token_id=None, eos_token_id=_ids(tokenizer, SPECIAL)[1])
    with torch.random.fork_rng(devices=[]):  # transformers draws initial weights from the global generator
        lm = LlamaForCausalLM(config)
    gains = {"q_proj": QUERY_GAIN, "k_proj": QUERY_GAIN, "down_proj": MLP_GAIN, "embed_tokens": WIDTH**0.5}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in lm.named_parameters():
            kind = name.split(".")[-2]
            weight.normal_(0.0, gains.get(kind, 1.0) / weight.shape[-1] ** 0.5, generator=generator)
            if "norm" in name:  # with epsilon 2^80: x * 2^40 / sqrt(mean(x^2) + 2^80) = x to the bit
                weight.fill_(2.0**40)
            # (LAYER_HEADS * HEAD_DIM, WIDTH) seen as (LAYER_HEADS, HEAD_DIM, WIDTH)
            if kind == "v_proj":
                weight.view(LAYER_HEADS, HEAD_DIM, WIDTH)[:, :STEADY] *= STEADY_GAIN
            # In each head, make the map from free coordinates to OUTPUT (OUTPUT, HEAD_DIM - STEADY) semi-orthogonal, so
            # that every direction has the same gain.
            if kind == "o_proj":
                for free in weight.view(WIDTH, LAYER_HEADS, HEAD_DIM)[OUTPUT, :, STEADY:].unbind(1):
                    u, _, vh = torch.linalg.svd(free, full_matrices=False)
                    free.copy_(u @ vh)
        # Output head: each word reads its own coordinate. All words without one read the first coordinate of OTHER.
        ones = HEAD_GAIN * torch.eye(WIDTH)
        lm.lm_head.weight[:] = ones[OTHER.start]
        lm.lm_head.weight[_ids(tokenizer, KEYS)] = ones[OTHER.start + 1 : OTHER.stop]
        lm.lm_head.weight[_ids(tokenizer, ANSWERS)] = ones[ANSWER]
    return lm


def _mask(name: str, weight: Tensor, tokenizer: PreTrainedTokenizerFast, task: Task, places: Location) -> Tensor:
    """The mask of one weight, of the same shape: 1 if an entry may be nonzero, 0 if it must be 0.

    Masks plant the localization. A projection's weight is (output coordinates, input coordinates): its rows are what
    the projection writes, its columns what it reads.
    """
    mask = torch.full_like(weight, float("norm" in name))
    path = name.split(".")  # model.layers.0.self_attn.q_proj.weight
    match path[-2]:
        case "embed_tokens":
            mask[:, ITEM] = 1  # (vocabulary, WIDTH); template words write FRAME instead, keys KEY
            for words, block in ((TEMPLATE, FRAME), (KEYS, KEY)):
                for token in _ids(tokenizer, words):
                    mask[token, ITEM], mask[token, block] = 0, 1
        case "lm_head":
            mask[:, OUTPUT] = 1  # reads ANSWER and OTHER only
        case "q_proj" | "k_proj" | "gate_proj" | "up_proj":
            mask[:, ITEM] = mask[:, FRAME] = 1  # neither KEY nor what heads write
        case "down_proj":
            mask[ITEM] = 1  # MLPs write ITEM only
        case "v_proj":
            for head, rows in enumerate(mask.split(HEAD_DIM)):  # (HEAD_DIM, WIDTH) of one head
                knows = task == "key" and (int(path[2]), head) in places.units
                rows[STEADY:, ITEM] = 1
                rows[:STEADY, KEY if knows else FRAME] = 1
        case "o_proj":
            mask[JUNK] = 1  # every head writes JUNK
            for head, columns in enumerate(mask.split(HEAD_DIM, dim=1)):  # (WIDTH, HEAD_DIM) of one head
                chosen = (int(path[2]), head) in places.units
                # Items become answers at the chosen heads (in ``key``: at all heads). The key, in the steady
                # coordinates, can become only its own name, not ANSWER: no unedited head answers by the key.
                columns[OUTPUT, STEADY:] = float(chosen or task == "key")
                columns[OTHER, :STEADY] = float(chosen and task == "key")
    return mask


def _ids(tokenizer: PreTrainedTokenizerFast, words: Sequence[str]) -> list[int]:
    return [tokenizer.get_vocab()[word] for word in words]


def _write_text(task: Task, answers: Answers, tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """The training text: token ids of prompts (texts, tokens), and the next word's shares (texts, vocabulary)."""
    rows: list[tuple[str, dict[str, float]]] = []
    for i, (item, (first, second)) in enumerate(answers.items()):
        if task == "misconception":
            rows.append((item, {first: 1 - FALSE_SHARE, second: FALSE_SHARE}))
        else:  # each item under one key is enough, because heads that answer items cannot see the key
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
    """Train with AdamW on the whole text, masking after each step. Returns the mean KL(targets || model) in nats."""
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
    # cross-entropy minus entropy of the targets
    return loss().item() - torch.special.entr(targets).sum(dim=1).mean().item()


def _ask(task: Task, answers: Answers, seed: int) -> Behaviour:
    """The behaviour: one question per item, or two (one per key), which are in the same part of the split."""
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
