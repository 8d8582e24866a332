"""Frozen states of a language model that reads an answer behind its question and references.

    Question: {question}
    Correct answers:
    - {true reference}
    ...
    Incorrect answers:
    - {false reference}
    ...
    Question: {question}
    Answer: {answer}

The prompt of a question runs once; its answers follow as branches that see the prompt and themselves, so an answer's
states do not depend on the others. Only the first layers of the model run.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from locaudit.judges.base import Case
from locaudit.models import Model

MAX_REFERENCE_TOKENS = 48
"""Tokens of a reference that are read."""
MAX_REFERENCES = 24
"""References of one side that are read."""
MAX_ANSWER_TOKENS = 64
"""Tokens of an answer that are read."""
MAX_QUESTION_TOKENS = 128
"""Tokens of a question that are read."""
_FALSE_HEADING = "\nIncorrect answers:"
PASS_TOKENS = 640
"""Answer tokens of one forward; bounds the memory."""
N_REMEMBERED = 192
"""Questions whose prompt states are kept: about 4 MB each."""


@dataclass(frozen=True)
class Prompt:
    """What the model keeps of a question and its references."""

    cache: tuple[tuple[Tensor, Tensor], ...]
    """Keys and values of each layer."""
    states: Float[Tensor, "layers tokens d"]
    segment: Int[Tensor, " tokens"]
    """Number of the reference that a token belongs to, true ones first; -1 for the rest."""
    n_true: int
    n_false: int

    @property
    def n_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.segment)


class Reader:
    """States of answers after some `layers` (counted from 1) of a causal LM."""

    def __init__(self, model: Model, layers: Sequence[int]):
        self.model, self.layers = model, tuple(layers)
        self._trunk = _first_layers(model.lm.model, max(layers))  # type: ignore[arg-type]
        self._prompts: OrderedDict[tuple[str, tuple[str, ...], tuple[str, ...]], Prompt] = OrderedDict()

    def prompt(self, case: Case) -> Prompt:
        """The prompt of the case's question and references; the last ones used are remembered."""
        key = (case.question, case.true, case.false)
        if key not in self._prompts:
            self._prompts[key] = self._run_prompt(case)
            while len(self._prompts) > N_REMEMBERED:
                self._prompts.popitem(last=False)
        self._prompts.move_to_end(key)
        return self._prompts[key]

    def read(
        self, case: Case, answers: Sequence[str], hidden: Sequence[frozenset[int]]
    ) -> Iterator[Float[Tensor, "layers tokens d"]]:
        """States of each answer's tokens, then of the line break behind it; the case gives question and references.

        Answer i does not see the references in ``hidden[i]``.
        """
        prompt = self.prompt(case)
        branches = [self._encode(f" {answer}", MAX_ANSWER_TOKENS) if answer else [] for answer in answers]
        branches = [branch + self._encode("\n") for branch in branches]
        start = 0
        for end in _cuts([len(branch) for branch in branches], PASS_TOKENS):
            yield from self._run_branches(prompt, branches[start:end], hidden[start:end])
            start = end

    def _run_prompt(self, case: Case) -> Prompt:
        question = self.model.tokenizer.decode(self._encode(case.question, MAX_QUESTION_TOKENS))
        sides = (case.true[:MAX_REFERENCES], case.false[:MAX_REFERENCES])
        pieces = [(f"Question: {question}\nCorrect answers:", -1)]
        for number, reference in enumerate(sides[0] + sides[1]):
            if number == len(sides[0]):
                pieces.append((_FALSE_HEADING, -1))
            pieces += [("\n-", -1), (f" {reference}", number)]
        if not sides[1]:
            pieces.append((_FALSE_HEADING, -1))
        pieces.append((f"\nQuestion: {question}\nAnswer:", -1))
        ids, segment = [], []
        for text, owner in pieces:
            tokens = self._encode(text, MAX_REFERENCE_TOKENS if owner >= 0 else None)
            ids += tokens
            segment += [owner] * len(tokens)
        cache = DynamicCache()
        states = self._forward([ids], [list(range(len(ids)))], None, cache)
        keep = tuple((layer.keys, layer.values) for layer in cache.layers)  # type: ignore[misc]
        return Prompt(keep, states, torch.tensor(segment), len(sides[0]), len(sides[1]))  # type: ignore[arg-type]

    def _run_branches(
        self, prompt: Prompt, branches: Sequence[Sequence[int]], hidden: Sequence[frozenset[int]]
    ) -> Iterator[Float[Tensor, "layers tokens d"]]:
        lengths = torch.tensor([len(branch) for branch in branches])
        owner = torch.repeat_interleave(torch.arange(len(branches)), lengths)
        own = (owner[:, None] == owner[None]).tril()
        sees = torch.stack([_unless(prompt.segment, numbers) for numbers in hidden])[owner]
        visible = torch.cat([sees, own], dim=1)
        mask = torch.zeros(visible.shape).masked_fill_(~visible, torch.finfo(torch.float32).min)
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(prompt.cache):
            cache.update(keys, values, layer)
        positions = [prompt.n_tokens + i for branch in branches for i in range(len(branch))]
        ids = [token for branch in branches for token in branch]
        states = self._forward([ids], [positions], mask[None, None], cache)
        yield from states.split(lengths.tolist(), dim=1)

    @torch.no_grad()
    def _forward(self, ids, positions, mask: Tensor | None, cache: DynamicCache) -> Float[Tensor, "layers tokens d"]:
        device, dtype = self.model.device, self.model.lm.dtype
        seen: dict[int, Tensor] = {}

        def keep(layer: int):
            def hook(module, inputs, output):
                seen[layer] = output[0] if isinstance(output, tuple) else output

            return hook

        # Hooks of our own: those of transformers stay in the shared layers and would record twice for two readers.
        handles = []
        try:
            for layer in self.layers:
                handles.append(self._trunk.layers[layer - 1].register_forward_hook(keep(layer)))  # type: ignore[index]
            self._trunk(
                input_ids=torch.tensor(ids, device=device),
                position_ids=torch.tensor(positions, device=device),
                attention_mask=None if mask is None else mask.to(device, dtype),
                past_key_values=cache,
                use_cache=True,
            )
        finally:
            for handle in handles:
                handle.remove()
        # Rounded as they are kept, so that states from memory and from disk are the same.
        return torch.stack([seen[layer][0] for layer in self.layers]).half().float().cpu()

    def _encode(self, text: str, limit: int | None = None) -> list[int]:
        return list(self.model.tokenizer(text, add_special_tokens=False)["input_ids"])[:limit] if text else []


def _first_layers(trunk: nn.Module, n: int) -> nn.Module:
    """The trunk with its first n layers and without its last norm; it shares the weights, the trunk stays as it is."""
    out = copy.copy(trunk)
    out._modules = dict(trunk._modules)
    out.layers = nn.ModuleList(list(trunk.layers)[:n])  # type: ignore[arg-type]
    out.norm = nn.Identity()
    out.config = copy.deepcopy(trunk.config)  # type: ignore[arg-type]
    out.config.num_hidden_layers = n  # type: ignore[union-attr]
    return out


def _unless(segment: Int[Tensor, " tokens"], numbers: frozenset[int]) -> Tensor:
    return ~torch.isin(segment, torch.tensor(sorted(numbers), dtype=segment.dtype))


def _cuts(lengths: Sequence[int], limit: int) -> Iterator[int]:
    """Ends of runs of at most `limit` tokens (or of a single branch)."""
    total = 0
    for i, length in enumerate(lengths):
        if total and total + length > limit:
            yield i
            total = 0
        total += length
    if lengths:
        yield len(lengths)
