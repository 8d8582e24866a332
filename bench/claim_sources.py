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
    """Mean indirect effect of each layer's MLP output (layers,), and the number of facts.

    Noise on the subject's embeddings lowers the log-probability of the fact's first token. The indirect effect is what
    restoring one MLP's clean output at the subject's last token brings back, in nats. The paper takes probabilities of
    facts that the model gives first; a small model knows too few, so here those count that it prefers to the new one.
    """
    mlps = [layer.mlp for layer in lm.model.layers]
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
        target, other = (
            tokenizer(" " + rewrite[key]["str"], add_special_tokens=False)["input_ids"][0]
            for key in ("target_true", "target_new")
        )
        ids = encoded["input_ids"]
        logits, outputs = run_and_read(lm, ids, mlps)
        if logits[0, -1, target] <= logits[0, -1, other]:
            continue
        embedded = lm.get_input_embeddings()(ids).repeat(DRAWS, 1, 1)
        noise = torch.randn(DRAWS, len(inside), embedded.shape[-1], generator=generator) * spread
        embedded[:, inside] += noise.to(embedded.dtype)

        def chance(value: Tensor = embedded, of: int = target) -> float:
            return lm(inputs_embeds=value).logits[:, -1].float().log_softmax(-1)[:, of].mean().item()

        corrupted = chance()
        effects = np.zeros(len(mlps))
        for i, output in enumerate(outputs):
            with replaced(mlps[i], (slice(None), inside[-1]), output[inside[-1]]):
                effects[i] = chance() - corrupted
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
    parser.add_argument("--first", type=int, default=200, help="number of rows that are read, from the first on")
    options = parser.parse_args()
    with open(options.data, encoding="utf-8") as file:
        rows = json.load(file)[: options.first]
    model = load_model(options.model)
    if options.kind == "difference":
        np.save(options.out, difference(model.lm, model.tokenizer, rows, options.layer))
        return
    effects, n = trace(model.lm, model.tokenizer, rows)
    print(f"{n} of {len(rows)} facts are preferred; mean indirect effect of the MLP by layer, in nats:")
    with open(options.out, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("layer", "score"))
        for i, effect in enumerate(effects):
            print(f"{i:2d}  {effect:.4f}")
            writer.writerow((i, effect))


if __name__ == "__main__":
    main()
