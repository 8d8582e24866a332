"""An edit as weights: folded into the projections, or as a PEFT LoRA adapter of rank 1.

o' = o + (c + <a, o>) b at the input of W gives  W' = W + (W b) a^T  and  bias' = bias + c W b.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from locaudit.edits.edit import Edit
from locaudit.errors import LocationError
from locaudit.models import Model, output_weight


def _needs_all_positions(edit: Edit) -> None:
    if edit.positions != "all":
        raise LocationError(
            got="an edit with positions 'answer'",
            expected="positions 'all': weights act on every token",
            remedy="refit it with positions='all'",
        )


@contextmanager
def folded(model: Model, edit: Edit) -> Iterator[None]:
    """Run `model` with the edit folded into its weights; the original weights come back on leaving."""
    _needs_all_positions(edit)
    before: list[tuple[nn.Module, Tensor, nn.Parameter | None]] = []
    model.forget_fingerprint()
    try:
        for site, e in edit.sites.items():
            projection = model.projection(site)
            weight = output_weight(projection)
            bias: nn.Parameter | None = projection.bias  # type: ignore[assignment]
            before.append((projection, projection.weight.data, bias))  # type: ignore[arg-type]
            written = weight.float() @ e.b.to(weight.device)
            new = (weight.float() + torch.outer(written, e.a.to(weight.device))).to(weight.dtype)
            projection.weight.data = new if output_weight(projection) is projection.weight else new.T.contiguous()  # type: ignore[union-attr]
            if e.c:
                shift = (e.c * written).to(weight.dtype)
                projection.bias = nn.Parameter(shift if bias is None else bias.data + shift, requires_grad=False)  # type: ignore[operator]
        yield
    finally:
        for projection, weight, bias in before:
            projection.weight.data = weight  # type: ignore[union-attr]
            projection.bias = bias  # type: ignore[assignment]
        model.forget_fingerprint()


def save_peft_adapter(model: Model, edit: Edit, folder: str | Path) -> Path:
    """Write the edit as a PEFT LoRA adapter folder (r = 1, A = a^T, B = W b, alpha = r; c as the bias of B).

    Load it with ``peft.PeftModel.from_pretrained(lm, folder)``.
    """
    _needs_all_positions(edit)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = {id(module): name for name, module in model.lm.named_modules()}
    with_bias = any(e.c for e in edit.sites.values())
    tensors, targets, transposed = {}, [], False
    for site, e in sorted(edit.sites.items()):
        projection = model.projection(site)
        weight = output_weight(projection)
        transposed = weight is not projection.weight
        written = (weight.float() @ e.b.to(weight.device)).cpu()
        name = names[id(projection)]
        targets.append(name)
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_A.weight"] = e.a.detach().cpu().reshape(1, -1).contiguous()
        tensors[f"{key}.lora_B.weight"] = written.reshape(-1, 1).contiguous()
        if with_bias:
            tensors[f"{key}.lora_B.bias"] = (e.c * written).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name,
        "r": 1,
        "lora_alpha": 1,
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": with_bias,
        "fan_in_fan_out": transposed,
        "target_modules": targets,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder
