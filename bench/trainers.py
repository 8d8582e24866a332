"""TRL's DPO trainer (IPO) on a PEFT adapter of rank 1 that is masked to a location, for the benchmarks that use it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import Options
from locaudit.behaviours import Question
from locaudit.location import Location
from locaudit.methods.objectives import default_learning_rate
from locaudit.models import Model, Site, output_weight

TAU = 0.2


def pairs(trained: Sequence[Question]) -> list[dict[str, str]]:
    """Every true-false pair of the questions, as TRL wants them."""
    return [
        {"prompt": f"Q: {q.text}\nA:", "chosen": f" {true}", "rejected": f" {false}"}
        for q in trained
        for true in q.true
        for false in q.false
    ]


def adapted_names(model: Model, where: Location) -> dict[str, tuple[Site, Tensor]]:
    """Name of each edited projection -> its site, and where its writer may act."""
    names = {id(module): name for name, module in model.lm.named_modules()}
    return {names[id(model.projection(site))]: (site, mask) for site, mask in model.masks(where).items()}


def make_trainer(model: Model, where: Location, trained: Sequence[Question], options: Options, folder: str, seed: int):
    """A trainer of one epoch over the pairs, at the paper's learning rate for the location; no reference yet."""
    import peft
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(
        output_dir=folder,
        beta=TAU,
        loss_type=["ipo"],
        per_device_train_batch_size=options.batch_size or 4,
        num_train_epochs=1,
        learning_rate=default_learning_rate("pair", len(where), len(model.whole())),
        weight_decay=0.0,
        lr_scheduler_type="cosine",
        warmup_steps=0,
        max_length=None,
        use_cpu=not options.device.startswith("cuda"),
        bf16=False,  # the model keeps its own dtype, adapters are float32
        gradient_checkpointing=False,
        activation_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=seed,
    )
    targets = list(adapted_names(model, where))
    return DPOTrainer(
        model=model.lm,
        args=args,
        train_dataset=Dataset.from_list(pairs(trained)),
        processing_class=model.tokenizer,
        peft_config=peft.LoraConfig(r=1, lora_alpha=1, target_modules=targets, task_type="CAUSAL_LM"),
    )


def with_reference(trainer: Any) -> Any:
    """The trainer's data without end-of-text tokens, with what ``precompute_ref_log_probs=True`` adds."""
    from datasets import Dataset

    rows = trainer.train_dataset.to_list()
    for row in rows:
        row["chosen_ids"], row["rejected_ids"] = row["chosen_ids"][:-1], row["rejected_ids"][:-1]
    trainer._precompute_model_hash = str(os.getpid())
    return trainer._precompute_ref_logps(Dataset.from_list(rows), "train", 4)


def mask_adapters(
    trainer: Any, model: Model, names: Mapping[str, tuple[Site, Tensor]], weights: Mapping[str, Tensor]
) -> list[tuple[nn.Module, nn.Module]]:
    """Let each adapter's B be W b with b zero outside the location; returns (lora_A, lora_B) of each projection."""
    layers = [trainer.model.get_submodule(f"base_model.model.{name}") for name in names]
    adapters = [(layer.lora_A["default"], layer.lora_B["default"]) for layer in layers]
    for (_, lora_b), (name, (_, mask)) in zip(adapters, names.items(), strict=True):
        written = _Written(weights[name], mask.to(weights[name].device))
        nn.utils.parametrize.register_parametrization(lora_b, "weight", written, unsafe=True)
    return adapters


def output_weights(model: Model, names: Mapping[str, tuple[Site, Tensor]]) -> dict[str, Tensor]:
    """W of each projection as it is now, before an adapter wraps it."""
    return {name: output_weight(model.projection(site)).detach().float().clone() for name, (site, _) in names.items()}


class _Written(nn.Module):
    """lora_B = W b with b zero outside the location."""

    def __init__(self, w: Tensor, mask: Tensor):
        super().__init__()
        self.register_buffer("w", w)
        self.register_buffer("mask", mask)

    def forward(self, b: Tensor) -> Tensor:
        return self.w @ (b * self.mask[:, None])

    def right_inverse(self, _: Tensor) -> Tensor:
        return torch.zeros(len(self.mask), 1, device=self.w.device)
