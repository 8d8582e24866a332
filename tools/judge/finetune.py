r"""Fine-tune a causal-LM judge with LoRA on labelled answers, such as TruthfulQA's ``finetune_truth.jsonl``.

    loss = -log softmax(logits of the next token)[first token of " yes" or " no"]

The loss is on that token alone, not on the prompt. Sources: Lin et al. 2022, appendix B.1 (they fine-tuned GPT-3);
LoRA: Hu et al. 2021.

    python tools/judge/finetune.py truth finetune_truth.jsonl --base MODEL --out judges/truth

A judge has one aspect, so run it once per aspect, with different folders. Needs peft (the extra ``judge``).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from locaudit.checkpoints import ADAPTER_FILE, PACKAGED
from locaudit.errors import ConfigError, DataError, LocauditError, ModelError, import_extra
from locaudit.judges.base import Aspect
from locaudit.judges.causal_lm import JUDGE_FILE, first_tokens, next_logits, wrap_judge
from locaudit.judges.labelled import SPLIT_RULE, LabelledAnswer, is_held_out, read_labelled
from locaudit.judges.validate import judged, measure
from locaudit.judges.wire import completion_prompt
from locaudit.measure.forward import batches
from locaudit.measure.tree import encode_tree
from locaudit.models import Model, load_model
from locaudit.models.inside import quiet_peft
from locaudit.records import content_hash
from locaudit.registry import ASPECTS


def fit_causal_lm_judge(
    aspect: Aspect,
    rows: str | Path,
    base: str,
    out: str | Path,
    *,
    epochs: int = 1,
    learning_rate: float = 5e-4,
    rank: int = 8,
    batch_tokens: int = 1024,
    max_rows: int | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Fine-tune `base` on labelled answers, validate it on held-out questions, and write a PEFT adapter to `out`.

    LoRA with `rank` (alpha = 2 rank, no dropout) on every linear layer except the output layer. AdamW without weight
    decay; linear warm-up over 5 % of the steps, then cosine decay to 0; gradients clipped to norm 1. A batch has
    answers of similar length, at most `batch_tokens` tokens with padding.

    `max_rows` draws that many rows at random, held-out ones included. `seed` sets this draw, the order and the initial
    adapter; the same seed gives the same judge on the same machine. `on_step` is called with (steps done, all steps).

    `out` can be loaded with `load_causal_lm_judge`. Its ``judge.json`` has the values that are returned: settings,
    counts and, for held-out answers, those of `locaudit.judges.validate.measure`. Raises `ConfigError`, `DataError` or
    `ModelError`.
    """
    out = Path(out)
    _check_arguments(out, epochs=epochs, rank=rank, batch_tokens=batch_tokens, learning_rate=learning_rate)
    peft = import_extra("peft", "judge")
    data = read_labelled(rows, aspect)
    if max_rows is not None and max_rows < len(data):
        data = [data[i] for i in sorted(random.Random(seed).sample(range(len(data)), max_rows))]
    train = [row for row in data if not is_held_out(row.case.question)]
    held_out = [row for row in data if is_held_out(row.case.question)]
    for part, what in ((train, "training"), (held_out, "held-out")):
        if len({row.yes for row in part}) < 2:
            raise DataError(
                got=f"{len(part)} {what} rows in {Path(rows).name}, without both labels",
                expected="yes and no, both on training questions and on held-out questions (one in five)",
                remedy="give more rows, or raise max_rows",
            )
    model = load_model(base, device=device, dtype=dtype, audited=False)
    base_fingerprint = model.fingerprint
    yes, no = first_tokens(model.tokenizer, aspect.suffix)
    model = _add_adapter(peft, model, _found_again(base), rank, seed)
    rng = random.Random(seed)
    steps = _train(model, aspect, train, (no, yes), epochs, learning_rate, batch_tokens, rng, on_step)
    probabilities = judged(wrap_judge(aspect, model, aspect.suffix), held_out, lambda text: None)
    questions = np.array([row.case.question for row in held_out])
    measures = measure(probabilities, np.array([row.yes for row in held_out]), questions)
    if measures.get("balanced_accuracy") is None:
        raise ModelError(
            got="a fine-tuned judge that cannot judge the held-out answers",
            expected="finite probabilities for answers of both labels",
            remedy="lower learning_rate, or use another base model",
        )
    facts: dict[str, Any] = {
        "aspect": aspect.name,
        "base": base,
        "base_fingerprint": base_fingerprint,
        "rows": content_hash([[r.case.question, r.case.answer, r.yes] for r in data]),
        "epochs": epochs,
        "learning_rate": learning_rate,
        "rank": rank,
        "batch_tokens": batch_tokens,
        "max_rows": max_rows,
        "seed": seed,
        "dtype": str(model.lm.dtype).removeprefix("torch."),
        "steps": steps,
        "n_train": len(train),
        "split": SPLIT_RULE,
    } | measures
    model.lm.save_pretrained(out, save_embedding_layers=False)  # otherwise PEFT looks up the base on the hub
    (out / JUDGE_FILE).write_text(json.dumps(facts, indent=2), encoding="utf-8")
    return facts


def _check_arguments(out: Path, **values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ConfigError(got=f"{name} = {value}", expected="a positive number", remedy=f"raise {name}")
    if (out / ADAPTER_FILE).exists():
        raise ConfigError(
            got=f"the folder {out}, which has an adapter already",
            expected="a new folder",
            remedy="name another folder, or delete this one",
        )
    out.mkdir(parents=True, exist_ok=True)


def _found_again(base: str) -> str:
    """The base's name for the adapter's settings; a folder's absolute path, to be found from any working directory."""
    return str(Path(base).resolve()) if base not in PACKAGED and Path(base).exists() else base


def _add_adapter(peft: Any, model: Model, base: str, rank: int, seed: int) -> Model:
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.lm.modules()),
    )
    with quiet_peft(), torch.random.fork_rng():  # PEFT draws the initial weights from the global generator
        torch.manual_seed(seed)
        lm = peft.get_peft_model(model.lm, settings)
    lm.peft_config["default"].base_model_name_or_path = base
    return Model(lm.eval(), model.tokenizer, model.name)  # eval: turns off the base's own dropout as well


@torch.enable_grad()
def _train(
    model: Model,
    aspect: Aspect,
    data: Sequence[LabelledAnswer],
    labels: tuple[int, int],
    epochs: int,
    learning_rate: float,
    batch_tokens: int,
    rng: random.Random,
    on_step: Callable[[int, int], None] | None,
) -> int:
    """Train the adapter in place. Returns the number of steps. `labels` are the token ids of (no, yes)."""
    prompts = [completion_prompt(row.case.question, row.case.answer, aspect.suffix) for row in data]
    tokens = [encode_tree(model.tokenizer, prompt, []).prompt for prompt in prompts]
    limit = getattr(model.config, "max_position_embeddings", None) or math.inf
    fitting = [i for i, row in enumerate(tokens) if len(row) <= limit]
    plan: list[list[int]] = []  # rows of each step; `batches` groups similar lengths, whose order is then shuffled
    for _ in range(epochs):
        order = rng.sample(fitting, len(fitting))
        epoch = [[order[k] for k in batch] for batch in batches([len(tokens[i]) for i in order], batch_tokens)]
        plan += rng.sample(epoch, len(epoch))
    parameters = [p for p in model.lm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, len(plan)))
    for step, batch in enumerate(plan, 1):
        target = torch.tensor([labels[data[i].yes] for i in batch])
        logits = next_logits(model, [tokens[i] for i in batch])
        loss = cross_entropy(logits, target.to(logits.device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if not (loss.isfinite() and norm.isfinite()):
            raise ModelError(
                got=f"loss {loss.item():g} and gradient norm {norm.item():g} at step {step} of {len(plan)}",
                expected="finite numbers",
                remedy="lower learning_rate, or use another dtype",
            )
        optimizer.step()
        schedule.step()
        if on_step:
            on_step(step, len(plan))
    return len(plan)


def _rate(step: int, n_steps: int) -> float:
    warm_up = max(1, n_steps // 20)
    return (step + 1) / warm_up if step < warm_up else 0.5 * (1 + math.cos(math.pi * step / n_steps))


def main() -> None:
    """Fine-tune from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("aspect", choices=list(ASPECTS), help="aspect that the labels are about")
    parser.add_argument("rows", type=Path, help="file of labelled answers")
    parser.add_argument("--base", required=True, help="the language model to fine-tune")
    parser.add_argument("--out", type=Path, required=True, help="folder for the judge")
    for name, default in (("epochs", 1), ("rank", 8), ("seed", 0), ("max-rows", None)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    values = vars(parser.parse_args())

    def say(step: int, n: int) -> None:
        print(f"step {step} of {n}", file=sys.stderr, flush=True)

    try:
        facts = fit_causal_lm_judge(ASPECTS[values.pop("aspect")], on_step=say, **values)
    except LocauditError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
