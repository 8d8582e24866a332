"""The projections that an architecture's paths lead to: finding them, their widths and their weights."""

from __future__ import annotations

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
        remedy="give architecture the path of the projection itself, not of a module that contains it",
    )


def output_weight(projection: nn.Module) -> Tensor:
    """The weight W of a projection, of shape (d_model, d_in) also for Conv1D, which stores it transposed."""
    weight: Tensor = projection.weight  # type: ignore[assignment]
    return weight.T if type(projection).__name__ == "Conv1D" else weight
