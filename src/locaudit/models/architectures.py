"""Find the projections at an architecture's paths, and read their widths and weights."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from locaudit.architectures import Architecture, find_architecture, register_architecture
from locaudit.errors import ModelError
from locaudit.registry import ARCHITECTURES

__all__ = ["ARCHITECTURES", "Architecture", "find_architecture", "register_architecture"]


def submodule(module: nn.Module, path: str) -> nn.Module:
    """The submodule ``module.a.b`` for the path ``"a.b"``. Raises `ModelError` if a part of the path does not exist."""
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise ModelError(
            got=f"{type(module).__name__} without {path!r} ({error})",
            expected="a module at each path that its architecture names",
            remedy="correct the path in the setting architecture, or in the plug-in that registers the architecture",
        ) from None


def input_width(projection: nn.Module) -> int:
    """Width of a projection's input, read from the projection: a Linear layer, or GPT-2's transposed Conv1D."""
    if isinstance(projection, nn.Linear):
        return projection.in_features
    weight = getattr(projection, "weight", None)
    if type(projection).__name__ == "Conv1D" and weight is not None:
        return int(weight.shape[0])
    width = getattr(projection, "in_features", None)
    if isinstance(width, int):
        return width
    raise ModelError(
        got=f"a projection of type {type(projection).__name__}",
        expected="a Linear layer or transformers' Conv1D",
        remedy="set architecture to the path of the projection itself, not of a module that contains it",
    )


def output_width(projection: nn.Module) -> int:
    """Width of a projection's output, read from the layer because quantised weights may be packed in another shape."""
    width = getattr(projection, "out_features", None)
    return width if isinstance(width, int) else output_weight(projection).shape[0]


_BITSANDBYTES = ("Linear8bitLt", "Linear4bit")


def is_quantised(projection: nn.Module) -> bool:
    """Whether bitsandbytes has quantised the layer. `output_weight` then returns a copy of its weight in floats."""
    return type(projection).__name__ in _BITSANDBYTES


def output_weight(projection: nn.Module) -> Tensor:
    """The weight W of a projection. Its shape is (d_model, d_in), also for Conv1D, which stores it transposed.

    8-bit and 4-bit weights of bitsandbytes are dequantised. Raises `ModelError` for any other layer whose weight is not
    a plain floating-point tensor of its own, such as layers of GPTQ, AWQ, HQQ, torchao or FP8, or layers with LoRA.
    """
    # Not projection.weight: in a LoRA layer this is the weight of the layer inside it, and in some layers a method.
    weight = projection._parameters.get("weight")
    if weight is not None and is_quantised(projection):
        return _dequantised(projection, weight)
    is_transposed = type(projection).__name__ == "Conv1D"
    if type(weight) is nn.Parameter and weight.dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        widths = (getattr(projection, name, weight.shape[i]) for i, name in enumerate(("out_features", "in_features")))
        if is_transposed or tuple(weight.shape) == tuple(widths):
            return weight.T if is_transposed else weight
    kind = type(projection)
    raise ModelError(
        got=f"a projection of type {kind.__module__}.{kind.__name__}, whose weights are not stored as plain numbers",
        expected="weights in float32, bfloat16 or float16, or in 8 or 4 bits of bitsandbytes",
        remedy="load the model without quantisation, and merge adapters into it (peft: merge_and_unload)",
    )


def _dequantised(projection: Any, weight: Any) -> Tensor:
    if type(projection).__name__ == "Linear8bitLt":  # W = values * scale of the row / 127
        scales = projection.state.SCB if projection.state.SCB is not None else weight.SCB
        return weight.data.float() * scales.unsqueeze(1) / 127
    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        raise ModelError(
            got="4-bit weights that bitsandbytes has packed for this CPU in a forward pass",
            expected="4-bit weights as they were loaded",
            remedy="load the model again, and call wrap_model before its first forward pass",
        )
    functional = importlib.import_module("bitsandbytes.functional")
    return functional.dequantize_4bit(weight.data, weight.quant_state)
