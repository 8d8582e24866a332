"""The peer in training benchmarks: TRL's DPO trainer (IPO) on a rank-1 PEFT adapter masked to a location."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import Options
from bench.work import TAU, Location, Model, Question, Site, default_learning_rate, heads, output_weight


@dataclass(frozen=True)
class Adapter:
    """The trained weights at one site: `a` is lora_A, which reads; `b` is lora_B, which writes."""

    site: Site
    mask: Tensor
    """1 at the coordinates that b may write, else 0."""
    a: nn.Linear
    b: Any
    """An `nn.Linear` whose weight is parametrised by `_Written`."""


def pairs(trained: Sequence[Question]) -> list[dict[str, str]]:
    """All pairs of a true and a false answer to a question, in TRL's format."""
    return [
        {"prompt": f"Q: {q.text}\nA:", "chosen": f" {true}", "rejected": f" {false}"}
        for q in trained
        for true in q.true
        for false in q.false
    ]


def make_trainer(
    model: Model,
    where: Location,
    trained: Sequence[Question],
    options: Options,
    folder: str,
    seed: int = 0,
    reference: Any = None,
) -> tuple[Any, list[Adapter]]:
    """Make a trainer for one epoch over the pairs, at the paper's learning rate for this size, and its adapters.

    `reference` is the data set of an earlier trainer over the same pairs; it has the reference log-probabilities.
    """
    import peft
    from datasets import Dataset

    trl: Any = import_module("trl")

    masks = model.subspaces(where)
    names = {id(module): name for name, module in model.lm.named_modules()}
    targets = [names[id(model.projection(site))] for site in masks]
    n_units = sum(int(mask.sum()) for mask in masks.values()) // model.head_dim
    args = trl.DPOConfig(
        output_dir=folder,
        beta=TAU,
        loss_type=["ipo"],
        per_device_train_batch_size=options.peer_batch or 4,
        num_train_epochs=1,
        learning_rate=default_learning_rate("pair", n_units, len(heads(model))),
        lr_scheduler_type="cosine",  # without warm-up and weight decay, the defaults
        max_length=None,
        use_cpu=not options.subject.device.startswith("cuda"),
        bf16=False,  # the model keeps its own dtype; adapters are float32
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=seed,
    )
    trainer = trl.DPOTrainer(
        model=model.lm,
        args=args,
        train_dataset=Dataset.from_list(pairs(trained)),
        processing_class=model.tokenizer,
        peft_config=peft.LoraConfig(r=1, lora_alpha=1, target_modules=targets, task_type="CAUSAL_LM"),
    )
    trainer.train_dataset = _with_reference(trainer) if reference is None else reference
    trainer.precompute_ref_logps = True
    adapters = []
    for name, (site, mask) in zip(targets, masks.items(), strict=True):
        layer = trainer.model.get_submodule(f"base_model.model.{name}")
        adapters.append(Adapter(site, mask, layer.lora_A["default"], layer.lora_B["default"]))
        w = output_weight(layer.base_layer).detach().float()
        written = _Written(w, mask.to(w.device))
        nn.utils.parametrize.register_parametrization(adapters[-1].b, "weight", written, unsafe=True)
    return trainer, adapters


def _with_reference(trainer: Any) -> Any:
    """The trainer's data without end-of-text tokens, with the columns that ``precompute_ref_log_probs=True`` adds."""
    from datasets import Dataset

    rows = trainer.train_dataset.to_list()
    for row in rows:
        row["chosen_ids"], row["rejected_ids"] = row["chosen_ids"][:-1], row["rejected_ids"][:-1]
    trainer._precompute_model_hash = str(os.getpid())
    return trainer._precompute_ref_logps(Dataset.from_list(rows), "train", 4)


class _Written(nn.Module):
    """Parametrises lora_B as W (mask * b), so that training b equals training our edit's b."""

    w: Tensor
    mask: Tensor

    def __init__(self, w: Tensor, mask: Tensor):
        super().__init__()
        self.register_buffer("w", w)
        self.register_buffer("mask", mask)

    def forward(self, b: Tensor) -> Tensor:
        return self.w @ (b * self.mask[:, None])

    def right_inverse(self, _: Tensor) -> Tensor:
        return torch.zeros(len(self.mask), 1, device=self.w.device)
