"""One table: where each architecture keeps its attention output and MLP down projections.

The names are transformers' ``config.model_type``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from locaudit.errors import ConfigError, ModelError
from locaudit.registry import ARCHITECTURES


@dataclass(frozen=True)
class Architecture:
    """Dotted paths from the language model to its layers, and from a layer to its two projections."""

    layers: str
    """The list of decoder layers."""
    attention: str
    """Attention output projection; its input is the concatenated head outputs o (n_heads * head_dim)."""
    mlp: str
    """MLP down projection; its input is the hidden neurons."""


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
    """Make a further ``model_type`` known. Paths are checked when a model of that type is loaded."""
    ARCHITECTURES.register(model_type)(architecture)


def find_architecture(model_type: str) -> Architecture:
    """The table's entry; an unknown type raises `ModelError` and is never guessed."""
    try:
        return ARCHITECTURES[model_type]
    except ConfigError:
        raise ModelError(
            got=f"the architecture {model_type!r}",
            expected=f"one of {', '.join(sorted(ARCHITECTURES))}",
            remedy=(
                "register it: locaudit.register_architecture("
                f"{model_type!r}, Architecture(layers='model.layers', attention='self_attn.o_proj', "
                "mlp='mlp.down_proj')) with the paths that print(model) shows"
            ),
        ) from None


def submodule(module: nn.Module, path: str) -> nn.Module:
    """``module.a.b`` for ``"a.b"``; a missing part raises `ModelError` naming it."""
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise ModelError(
            got=f"{type(module).__name__} without {path!r} ({error})",
            expected="a projection at the path of the architecture table",
            remedy="register the architecture with the paths that print(model) shows",
        ) from None


def input_width(projection: nn.Module) -> int:
    """Width of a projection's input, from the projection itself (Linear, or GPT-2's transposed Conv1D)."""
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
        remedy="register the path of the projection itself, not of the block around it",
    )


def output_weight(projection: nn.Module) -> Tensor:
    """Weight W as (d_model, d_in), whatever the layer's own layout."""
    weight: Tensor = projection.weight  # type: ignore[assignment]
    return weight.T if type(projection).__name__ == "Conv1D" else weight
