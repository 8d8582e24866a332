"""The table of architectures: the paths of the attention output projection and the MLP down projection in each.

An architecture's name is its ``config.model_type`` in transformers.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from locaudit.errors import ConfigError, ModelError
from locaudit.registry import ARCHITECTURES


@dataclass(frozen=True)
class Architecture:
    """Dotted paths from the language model to its list of layers, and from a layer to its two projections."""

    layers: str
    """The list of decoder layers."""
    attention: str
    """The attention output projection. Its input (n_heads * head_dim) is the concatenation of the heads' outputs."""
    mlp: str
    """The MLP down projection. Its input holds the activations of the neurons."""


_LLAMA = Architecture("model.layers", "self_attn.o_proj", "mlp.down_proj")

_BUILT_IN = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "mistral": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "olmo2": _LLAMA,
    "phi3": _LLAMA,
    "phi": Architecture("model.layers", "self_attn.dense", "mlp.fc2"),
    "gpt2": Architecture("transformer.h", "attn.c_proj", "mlp.c_proj"),
    "gptj": Architecture("transformer.h", "attn.out_proj", "mlp.fc_out"),
    "gpt_neox": Architecture("gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h"),
    "opt": Architecture("model.decoder.layers", "self_attn.out_proj", "fc2"),
}
for _name, _architecture in _BUILT_IN.items():
    ARCHITECTURES.register(_name)(_architecture)


def register_architecture(model_type: str, architecture: Architecture) -> None:
    """Add an architecture to the table. Its paths are checked when a model of that type is loaded."""
    ARCHITECTURES.register(model_type)(architecture)


def find_architecture(model_type: str) -> Architecture:
    """The entry of `model_type` in the table. Raises `ModelError` if there is none: paths are never guessed."""
    try:
        return ARCHITECTURES[model_type]
    except ConfigError:
        raise ModelError(
            got=f"the architecture {model_type!r}",
            expected=f"one of {', '.join(sorted(ARCHITECTURES))}",
            remedy=(
                "register it in a Python file, named with --plugins on the command line, that calls "
                f"locaudit.register_architecture({model_type!r}, locaudit.Architecture(layers='model.layers', "
                "attention='self_attn.o_proj', mlp='mlp.down_proj')) with the paths that print(model) shows"
            ),
        ) from None


def submodule(module: nn.Module, path: str) -> nn.Module:
    """The submodule ``module.a.b`` for the path ``"a.b"``. Raises `ModelError` if a part of the path does not exist."""
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise ModelError(
            got=f"{type(module).__name__} without {path!r} ({error})",
            expected="a module at the path that its architecture is registered with",
            remedy="register the architecture with the paths that print(model) shows",
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
        remedy="register the path of the projection itself, not of a module that contains it",
    )


def output_width(projection: nn.Module) -> int:
    """Width of a projection's output, read from the layer: quantised weights may be packed into another shape."""
    width = getattr(projection, "out_features", None)
    return width if isinstance(width, int) else output_weight(projection).shape[0]


_BITSANDBYTES = ("Linear8bitLt", "Linear4bit")


def is_quantised(projection: nn.Module) -> bool:
    """Whether the layer is a quantised one of bitsandbytes, of which `output_weight` returns a copy in floats."""
    return type(projection).__name__ in _BITSANDBYTES


def output_weight(projection: nn.Module) -> Tensor:
    """The weight W of a projection, of shape (d_model, d_in) also for Conv1D, which stores it transposed.

    8-bit and 4-bit weights of bitsandbytes are dequantised. Raises `ModelError` for any other layer whose weight is not
    a plain floating-point tensor of its own, for example one of GPTQ, AWQ, HQQ, torchao or FP8, or one with LoRA.
    """
    # Not projection.weight: a LoRA layer returns that of the layer inside it, and elsewhere it is a method.
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
        got=f"a projection of type {kind.__module__}.{kind.__name__}, whose weights are not plain numbers of its own",
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
