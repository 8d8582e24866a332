"""GGUF files: transformers takes long to read one, so it is converted once and kept in the user's cache.

The folder ``models/NAME-HASH`` of the cache (`locaudit.store.cache`) is a checkpoint like any other, with float32
weights, 4 bytes per parameter. HASH is of the file's content and of the versions of the packages that read it. What is
loaded from there equals what is read from the file, to the bit.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import warnings
from contextlib import redirect_stderr
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from locaudit.records import content_hash
from locaudit.store.cache import cache_folder

VERSION = 1
"""Of what is written here; a part of HASH."""
CONTENTS = "contents.json"
"""File of a converted folder with the SHA-256 of all others; written last."""
MOST_BYTES = 2**30
"""Larger GGUF files are not converted: in float32 they would fill the disk."""


Loaded = tuple[Any, Any, Any]
"""A model, its tokenizer, and what transformers reports about missing weights."""


def convert_gguf(file: Path) -> Path | Loaded:
    """The folder with the converted model, made where it is missing or damaged.

    Where no folder can be had, the model (float32) as read from the file: with ``LOCAUDIT_CACHE=off``, above
    `MOST_BYTES`, without room on the disk (which is a warning), or if weights are missing. Raises `ValueError` for a
    file that transformers refuses.
    """
    cache = cache_folder()
    if cache is None or file.stat().st_size > MOST_BYTES:
        return read_gguf(file)
    versions = [metadata.version(package) for package in ("transformers", "gguf")]
    folder = cache / "models" / f"{file.stem}-{content_hash([VERSION, _sha256(file), versions])}"
    if _is_whole(folder):
        return folder
    read = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if _is_whole(folder):  # another process was faster
                return folder
            read = read_gguf(file)
            if read[2]["missing_keys"]:
                return read
            _write(folder, *read[:2])
            return folder
    except (OSError, SafetensorError) as error:
        warnings.warn(
            f"{file.name} will be read again each time, which takes long: {folder} cannot be written ({error}). "
            "LOCAUDIT_CACHE names another folder, or is 'off'",
            UserWarning,
            stacklevel=3,
        )
    return read or read_gguf(file)


def read_gguf(file: Path) -> Loaded:
    """The file as transformers reads it, the model in float32; `ValueError` where it cannot."""
    keywords = {"gguf_file": file.name}
    try:
        with redirect_stderr(io.StringIO()):  # a progress bar that nothing else turns off
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **keywords)
            loaded, report = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
                str(file.parent), dtype=torch.float32, output_loading_info=True, **keywords
            )
    except OSError as error:  # told apart from those of the cache
        raise ValueError(str(error)) from error
    return _plain(loaded), tokenizer, report


def _plain(loaded: Any) -> Any:
    """The weights in a model made from the config: the dequantised one refuses casts and `save_pretrained`."""
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    lm.load_state_dict(loaded.state_dict(), assign=True)
    lm.tie_weights()
    for name, buffer in loaded.named_buffers():
        owner, _, leaf = name.rpartition(".")
        lm.get_submodule(owner)._buffers[leaf] = buffer
    return lm


def _write(folder: Path, lm: Any, tokenizer: Any) -> None:
    """Write the folder whole or not at all; the caller holds its lock."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    try:
        part.mkdir()
        lm.save_pretrained(part)
        tokenizer.save_pretrained(part)
        contents = {path.name: _sha256(path) for path in sorted(part.iterdir())}
        (part / CONTENTS).write_text(json.dumps(contents, indent=2), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _is_whole(folder: Path) -> bool:
    """Whether every file is there, with the content that was written."""
    try:
        contents = json.loads((folder / CONTENTS).read_text(encoding="utf-8"))
        return all(_sha256(folder / name) == digest for name, digest in contents.items())
    except (OSError, ValueError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
