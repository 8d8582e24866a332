"""Load models, and describe the architectures that can be edited."""

from locaudit.models.architectures import (
    ARCHITECTURES,
    Architecture,
    find_architecture,
    is_quantised,
    output_weight,
    register_architecture,
)
from locaudit.models.load import load_model, wrap_model
from locaudit.models.model import CACHE, Head, Model, as_model

__all__ = [
    "ARCHITECTURES", "CACHE", "Architecture", "Head", "Model", "as_model", "find_architecture", "is_quantised",
    "load_model", "output_weight", "register_architecture", "wrap_model",
]  # fmt: skip
