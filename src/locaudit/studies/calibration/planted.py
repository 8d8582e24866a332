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

Heads in `partial` write only the coordinates of some true answers. They have an effect of known, middling size.

There are three tasks:

``misconception``: each item has a true answer from one group of words and a popular false answer from another. The
training text gives the false answer in 7 of 10 cases. About a quarter of the items is known: there, it is the true
answer. A constant written at any head in `places` makes all answers true; at a head in `partial`, those that it can
write.

``fact``: true answers come from both groups, and about three quarters of the items are known. Mean ablation of the
heads in `places` leaves the same answers to all questions, which are right half the time; that of other heads changes
nothing.

``key``: a key word before the item decides which of the item's two answers is true. Every head writes answers, but only
heads in `places` read KEY. What they
write is the key's name, which is the right answer to one item only (the word "which"). They write nothing about the
answers to other items. So the unedited model ignores the key: it is right under one key and wrong under the other.
Every part of the split has each item under both keys, so that the unedited model scores 0.5. An edit at `places` can
make the answer depend on the key. Elsewhere the key cannot be read, and no edit can score more than 0.5.

The score, ``preference_accuracy`` or ``mc1``, says which of two one-token answers has the higher probability.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
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

Task = Literal["misconception", "fact", "key"]
Answers = Mapping[str, tuple[str, str]]
"""Item -> two answers from different groups: the true one first, or in ``key`` that under the first key."""
Writes = dict[Any, slice]
"""(layer, head) -> the coordinates of OUTPUT that the head writes."""

GROUPS = (
    ("red", "blue", "green", "white", "black", "brown", "pink", "grey"),
    ("iron", "tin", "gold", "lead", "zinc", "brass", "steel", "copper"),
)
"""Answer words. ``misconception``: true and popular answers; ``fact``: true answers alternate between the groups;
``key``: answers under the first and the second key."""
ANSWERS = (*GROUPS[0], *GROUPS[1])
KEYS, WHICH = ("north", "south"), "which"
"""`WHICH` in place of an item asks for the key itself."""
SPECIAL, TEMPLATE = ("<pad>", "<eos>", "<unk>"), ("Q:", "A:")

MAIN_SHARE, LEAN = 0.7, 0.6
"""Share of the answer that is learned (``misconception``, ``fact``), and of an item's preferred answer (``key``).

In ``key``, each item prefers one answer under both keys. Otherwise the two would tie, and rounding errors would
decide."""
KNOWN = GROUPS[0][6:]
"""Words of the first group whose items are known (``misconception``), or unknown (``fact``). So unedited scores are at
no bound. It depends on the word, not on the item: what is learned for each item apart drowns an edit's constant."""
SPLIT = (0.5, 0.1, 0.4)
"""Shares of training, validation and test items. Few are for validation, since there is only one strength to choose."""

ITEM, FRAME, KEY = slice(0, 24), slice(24, 28), slice(28, 32)
ANSWER, OTHER, OUTPUT, JUNK = slice(32, 48), slice(48, 51), slice(32, 51), slice(51, 64)
WIDTH = 64
LAYER_HEADS = 2
"""Number of heads of a layer, unless `plant_model` is told another."""
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
STEPS, LEARNING_RATE, MOST_ROUNDS = 150, 4e-2, 4
"""Training goes on in rounds of `STEPS` until the text is learned, at most `MOST_ROUNDS` of them."""
LEARNED = 0.02
"""The training text counts as learned if the mean KL divergence from its answer shares is below this (in nats)."""


@dataclass(frozen=True, eq=False)
class Planted:
    """A planted model, its behaviour, and the heads at which an edit can succeed."""

    model: Model
    behaviour: Behaviour
    places: Location
    """The heads at which an optimal edit (reader ``layer``) can succeed fully."""
    partial: Location | None = None
    """The heads at which it can succeed for some questions only (`reachable`). At all other heads, no edit can."""
    reach: int = 0
    """Number of true answers that heads in `partial` write: the first words of their group."""
    known: frozenset[str] = frozenset()
    """Items to which the unedited model gives the true answer (not for ``key``)."""

    @property
    def elsewhere(self) -> Location | None:
        """All heads outside `places` and `partial`; None if there are none."""
        able = {*self.places.units, *(self.partial.units if self.partial else ())}
        rest = set(BUILT_IN["head"].units(self.model.shape)) - able
        return Location(tuple(rest)) if rest else None

    def reachable(self, question: Question) -> bool:
        """Whether an edit at a head in `partial` can turn the answer to this question."""
        return question.true[0] in GROUPS[0][: self.reach]

    @property
    def n_items(self) -> int:
        """Number of items that questions are about."""
        return len({question.text.split()[-1] for question in self.behaviour.questions})

    @property
    def n_heads(self) -> int:
        """Number of heads in the model."""
        return BUILT_IN["head"].n_units(self.model.shape)


def plant_model(
    task: Task = "misconception",
    n_places: int = 1,
    *,
    n_partial: int = 0,
    reach: int = 4,
    n_items: int = 200,
    n_layers: int = 24,
    layer_heads: int = LAYER_HEADS,
    by_layer: bool = False,
    seed: int = 0,
) -> Planted:
    """Make a model with `n_layers` layers of `layer_heads` heads and train it on its task's text.

    `n_places` is the number of random places where an edit can succeed. A place is one head, or for ``key`` all heads
    of a layer, because an edit at one head reads all heads of its layer. The `n_partial` next heads write only the
    first `reach` true answers (``misconception``). With `by_layer`, heads are taken layer after layer. With the same
    seed, a larger number of places includes the places of a smaller number.

    The same arguments give the same weights on one machine. torch's global random state is not changed.

    Raises `ConfigError` for an unknown task or a wrong number of items, `LocationError` for more places than there are,
    and `ModelError` if the text is not learned (see `LEARNED`).
    """
    if task not in ("misconception", "fact", "key"):
        expected = "'misconception', 'fact' or 'key'"
        raise ConfigError(got=f"the task {task!r}", expected=expected, remedy="name one of them")
    if not 10 <= n_items <= 2000:
        raise ConfigError(got=f"{n_items} items", expected="10 to 2000", remedy="change n_items; the default is 200")
    groups = _order_places(task == "key", by_layer, n_layers, layer_heads, seed)
    if n_places < 1 or n_partial < 0 or n_places + n_partial > len(groups):
        got = f"{n_places} places and {n_partial} partial ones"
        raise LocationError(got=got, expected=f"1 to {len(groups)} in all", remedy="change n_places")
    places, partial = (
        Location(tuple(unit for group in part for unit in group)) if part else None
        for part in (groups[:n_places], groups[n_places : n_places + n_partial])
    )
    assert places is not None
    answers = _draw_answers(task, n_items, seed)
    tokenizer = _make_tokenizer([*SPECIAL, *TEMPLATE, *KEYS, WHICH, *ANSWERS, *answers])
    lm = _random_lm(tokenizer, n_layers, layer_heads, seed)
    writes: Writes = dict.fromkeys(places.units, OUTPUT)
    writes |= dict.fromkeys(partial.units if partial else (), slice(ANSWER.start, ANSWER.start + reach))
    masks = {name: _mask(name, weight, tokenizer, task, writes) for name, weight in lm.named_parameters()}
    with_known = {item for item, pair in answers.items() if set(pair) & set(KNOWN)}
    known = {"misconception": with_known, "fact": answers.keys() - with_known, "key": set()}[task]
    loss = _train(lm, masks, *_write_text(task, answers, known, tokenizer))
    if not loss < LEARNED:
        remedy = "use another seed, fewer items or fewer layers"
        raise ModelError(got=f"a text learned to {loss:.3g} nats", expected=f"below {LEARNED}", remedy=remedy)
    model = wrap_model(lm, tokenizer, f"planted-{task}")
    return Planted(model, _ask(task, answers, seed), places, partial, reach, frozenset(known))


def planted_settings(n_items: int = 200) -> dict[str, Any]:
    """Audit settings: ``audit(p.model, p.behaviour, claim=p.places, out="a", **planted_settings())``.

    There is no primer, because the tokenizer lacks the words for it. Nothing is generated or judged. Only optimal edits
    are trained, with one strength, and with a training length and a learning rate at which edits of any size converge:
    as many steps for any number of items. Eight edits train at once: a step of so small a model is mostly overhead.
    """
    epochs = 8 * 200 // n_items
    optimal = {"strengths": (0.1,), "batch_size": 8, "epochs": epochs, "learning_rate": 2e-2, "bank_size": 8}
    return {
        "score": "preference_accuracy",
        "prompt": {"primer": "none"},
        "split": {"fractions": SPLIT},
        "methods": {"optimal": optimal},
        "evaluation": {"max_new_tokens": 0, "drift_documents": 4, "drift_tokens": 16},
    }


def _order_places(
    are_layers: bool, by_layer: bool, n_layers: int, layer_heads: int, seed: int
) -> list[list[tuple[int, int]]]:
    """All places in random order, each as a list of heads: layers, or single heads; heads layer after layer if so."""
    rng = random.Random(f"places {seed}")
    layers = [[(layer, head) for head in range(layer_heads)] for layer in range(n_layers)]
    if are_layers:
        return rng.sample(layers, n_layers)
    if by_layer:
        return [[unit] for layer in rng.sample(layers, n_layers) for unit in rng.sample(layer, layer_heads)]
    heads = [[unit] for layer in layers for unit in layer]
    return rng.sample(heads, len(heads))


def _draw_answers(task: Task, n_items: int, seed: int) -> Answers:
    """Draw items (made-up words of two syllables) and two answers for each; in ``fact``, the groups take turns."""
    rng = random.Random(f"items {seed}")
    syllables = [consonant + vowel for consonant in "bdfghjklmnprstvz" for vowel in "aeiou"]
    items = rng.sample([first + second for first in syllables for second in syllables], n_items)
    drawn = {item: (rng.choice(GROUPS[0]), rng.choice(GROUPS[1])) for item in items}
    turned = items[1::2] if task == "fact" else []
    return drawn | {item: (drawn[item][1], drawn[item][0]) for item in turned}


def _make_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word, split at white space."""
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def _random_lm(tokenizer: PreTrainedTokenizerFast, n_layers: int, layer_heads: int, seed: int) -> LlamaForCausalLM:
    """A Llama with seeded random weights, not masked yet. Some weights are set or adjusted below."""
    size: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 32, "head_dim": HEAD_DIM}
    size |= {"vocab_size": len(tokenizer), "num_hidden_layers": n_layers, "num_attention_heads": layer_heads}
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
            # (heads * HEAD_DIM, WIDTH) seen as (heads, HEAD_DIM, WIDTH)
            if kind == "v_proj":
                weight.view(layer_heads, HEAD_DIM, WIDTH)[:, :STEADY] *= STEADY_GAIN
            # In each head, make the map from free coordinates to OUTPUT (OUTPUT, HEAD_DIM - STEADY) semi-orthogonal, so
            # that every direction has the same gain.
            if kind == "o_proj":
                for free in weight.view(WIDTH, layer_heads, HEAD_DIM)[OUTPUT, :, STEADY:].unbind(1):
                    u, _, vh = torch.linalg.svd(free, full_matrices=False)
                    free.copy_(u @ vh)
        # Output head: each word reads its own coordinate. All words without one read the first coordinate of OTHER.
        ones = HEAD_GAIN * torch.eye(WIDTH)
        lm.lm_head.weight[:] = ones[OTHER.start]
        lm.lm_head.weight[_ids(tokenizer, KEYS)] = ones[OTHER.start + 1 : OTHER.stop]
        lm.lm_head.weight[_ids(tokenizer, ANSWERS)] = ones[ANSWER]
    return lm


def _mask(name: str, weight: Tensor, tokenizer: PreTrainedTokenizerFast, task: Task, writes: Writes) -> Tensor:
    """The mask of one weight, of the same shape: 1 if an entry may be nonzero, 0 if it must be 0.

    `writes` says which coordinates a head writes, for those that write any besides JUNK; in ``key``, which know KEY.

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
                knows = task == "key" and (int(path[2]), head) in writes
                rows[STEADY:, ITEM] = 1
                rows[:STEADY, KEY if knows else FRAME] = 1
        case "o_proj":
            mask[JUNK] = 1  # every head writes JUNK
            for head, columns in enumerate(mask.split(HEAD_DIM, dim=1)):  # (WIDTH, HEAD_DIM) of one head
                written = writes.get((int(path[2]), head))
                # Items become answers at the chosen heads (in ``key``: at all heads). The key, in the steady
                # coordinates, can become only its own name, not ANSWER: no unedited head answers by the key.
                if task == "key" or written:
                    columns[OUTPUT if task == "key" else written, STEADY:] = 1
                columns[OTHER, :STEADY] = float(task == "key" and written is not None)
    return mask


def _ids(tokenizer: PreTrainedTokenizerFast, words: Sequence[str]) -> list[int]:
    return [tokenizer.get_vocab()[word] for word in words]


def _write_text(
    task: Task, answers: Answers, known: Collection[str], tokenizer: PreTrainedTokenizerFast
) -> tuple[Tensor, Tensor]:
    """The training text: token ids of prompts (texts, tokens), and the next word's shares (texts, vocabulary)."""
    rows: list[tuple[str, dict[str, float]]] = []
    for i, (item, (first, second)) in enumerate(answers.items()):
        if task != "key":
            said, other = (first, second) if item in known else (second, first)
            rows.append((item, {said: MAIN_SHARE, other: 1 - MAIN_SHARE}))
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
    """Train with AdamW on the whole text, masking after each step, until it is learned (`LEARNED`).

    Returns the mean KL(targets || model) in nats.
    """
    weights = dict(lm.named_parameters())
    for name, weight in weights.items():
        weight.requires_grad_(name.split(".")[-2] in TRAINED)
    # cross-entropy minus the entropy of the targets is KL
    entropy = torch.special.entr(targets).sum(dim=1).mean().item()

    def mask() -> None:
        for name, allowed in masks.items():
            weights[name].data.mul_(allowed)

    def loss() -> Tensor:
        last = lm.model(input_ids=ids, use_cache=False).last_hidden_state[:, -1]  # type: ignore[index]
        return nn.functional.cross_entropy(lm.lm_head(last), targets)

    mask()
    kl = math.inf
    for _ in range(MOST_ROUNDS):
        optimizer = torch.optim.AdamW(lm.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
            schedule.step()
            mask()
        kl = loss().item() - entropy
        if kl < LEARNED:
            break
    return kl


def _ask(task: Task, answers: Answers, seed: int) -> Behaviour:
    """The behaviour: one question per item, or two (one per key), which are in the same part of the split."""
    shuffled = random.Random(f"split {seed}").sample(list(answers), len(answers))
    n_train, n_val = (round(len(answers) * share) for share in SPLIT[:2])
    questions: list[Question] = []
    for i, item in enumerate(shuffled):
        first, second = answers[item]
        split = "train" if i < n_train else "val" if i < n_train + n_val else "test"
        if task != "key":
            questions.append(Question(item, item, (first,), (second,)))
        else:
            for key, true, false in zip(KEYS, (first, second), (second, first), strict=True):
                questions.append(Question(f"{item} {key}", f"{key} {item}", (true,), (false,), split=split))
    return Behaviour(f"planted-{task}", tuple(questions), ())
