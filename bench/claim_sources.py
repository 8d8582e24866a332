"""Claims as other people make them, written as files that ``--claim`` reads.

``python -m bench.claim_sources tracing --data counterfact.json --out tracing.csv``
    Causal tracing of facts (Meng et al. 2022): where does restoring a part undo noise on the subject?

``python -m bench.claim_sources difference --data refusal.generate.json --layer 14 --out refusal.npy``
    A direction by difference of means (CAA, Rimsky et al. 2024), from A/B questions.

Only transformers is used, none of the library's measurements.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from locaudit.models import load_model

NOISE, DRAWS = 3.0, 4
"""Noise on the subject, in standard deviations of the embeddings, and draws of it (10 in the paper)."""


@contextmanager
def replaced(module: nn.Module, rows: Any, value: Tensor) -> Iterator[None]:
    """Write `value` at `rows` (batch, tokens) of a module's output (batch, tokens, d)."""

    def hook(_: nn.Module, __: Any, out: Any) -> Any:
        hidden = (out[0] if isinstance(out, tuple) else out).clone()
        hidden[rows] = value
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def run_and_read(lm: Any, ids: Tensor, modules: Sequence[nn.Module]) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the output (tokens, d) of each module."""
    found: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda _, __, out: found.append((out[0] if isinstance(out, tuple) else out)[0]))
        for module in modules  # in the order in which they run
    ]
    logits = lm(ids).logits
    for handle in handles:
        handle.remove()
    return logits, found


@torch.no_grad()
def trace(lm: Any, tokenizer: Any, facts: Sequence[Any]) -> tuple[np.ndarray, int]:
    """Mean indirect effect (layers, 2) of one layer's MLP output and of the residual stream, and the number of facts.

    Noise on the subject's embeddings lowers the probability of the fact's first token. The indirect effect is what
    restoring a part's clean output at the subject's last token brings back. Facts that the model does not
    know (its most likely token is another) are left out.
    """
    layers = lm.model.layers
    spread = NOISE * lm.get_input_embeddings().weight.float().std()
    generator = torch.Generator().manual_seed(0)
    found = []
    for fact in facts:
        rewrite = fact["requested_rewrite"]
        before = rewrite["prompt"].partition("{}")[0]
        text = rewrite["prompt"].replace("{}", rewrite["subject"])
        encoded = tokenizer(text, return_offsets_mapping=True, return_tensors="pt")
        span = len(before), len(before) + len(rewrite["subject"])
        inside = [i for i, (a, b) in enumerate(encoded["offset_mapping"][0].tolist()) if a < span[1] and b > span[0]]
        target = tokenizer(" " + rewrite["target_true"]["str"], add_special_tokens=False)["input_ids"][0]
        ids = encoded["input_ids"]
        parts = [(layer.mlp, layer) for layer in layers]
        logits, outputs = run_and_read(lm, ids, [module for pair in parts for module in pair])
        clean = logits[0, -1].float().softmax(-1)
        if clean.argmax() != target:
            continue
        embedded = lm.get_input_embeddings()(ids).repeat(DRAWS, 1, 1)
        noise = torch.randn(DRAWS, len(inside), embedded.shape[-1], generator=generator) * spread
        embedded[:, inside] += noise.to(embedded.dtype)

        def chance(value: Tensor = embedded, of: int = target) -> float:
            return lm(inputs_embeds=value).logits[:, -1].float().softmax(-1)[:, of].mean().item()

        corrupted = chance()
        effects = np.zeros((len(layers), 2))
        for i, j in np.ndindex(effects.shape):
            value = outputs[2 * i + j][inside[-1]]
            with replaced(parts[i][j], (slice(None), inside[-1]), value):
                effects[i, j] = chance() - corrupted
        found.append(effects)
    return np.mean(found, axis=0), len(found)


@torch.no_grad()
def difference(lm: Any, tokenizer: Any, rows: Sequence[Any], layer: int) -> np.ndarray:
    """Mean residual stream (d) after `layer` at the end of matching answers, minus that of the others."""
    sums = []
    for key in ("answer_matching_behavior", "answer_not_matching_behavior"):
        ends = []
        for row in rows:
            ids = tokenizer(f"Q: {row['question']}\nA: {row[key].strip()}", return_tensors="pt")["input_ids"]
            # The letter, not the bracket after it. hidden_states[0] is the embedding.
            ends.append(lm(ids, output_hidden_states=True).hidden_states[layer + 1][0, -2].float())
        sums.append(torch.stack(ends).mean(0))
    return (sums[0] - sums[1]).numpy()


def main() -> None:
    """Write the file of one kind of claim."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("tracing", "difference"))
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layer", type=int, default=14)
    parser.add_argument("--first", type=int, default=200, help="rows that are read: the others are left for tests")
    options = parser.parse_args()
    with open(options.data, encoding="utf-8") as file:
        rows = json.load(file)[: options.first]
    model = load_model(options.model)
    if options.kind == "difference":
        np.save(options.out, difference(model.lm, model.tokenizer, rows, options.layer))
        return
    effects, n = trace(model.lm, model.tokenizer, rows)
    print(f"{n} of {len(rows)} facts are known; mean indirect effect of MLP and residual stream by layer:")
    with open(options.out, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("layer", "score", "residual"))
        for i, (mlp, residual) in enumerate(effects):
            print(f"{i:2d}  {mlp:.4f}  {residual:.4f}")
            writer.writerow((i, mlp, residual))


if __name__ == "__main__":
    main()
