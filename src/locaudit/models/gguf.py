"""Read GGUF files. This takes long with transformers, so a file is converted once and kept in the user's cache.

The folder ``models/NAME-HASH`` of the cache (`locaudit.store.cache`) holds an ordinary checkpoint with float32 weights,
4 bytes per parameter. HASH is computed from the file's content and the versions of the packages that read it. A model
that is loaded from this folder equals one that is read from the file, bit for bit.
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
"""Version of the converted format; a part of HASH."""
CONTENTS = "contents.json"
"""File in a converted folder that holds the SHA-256 of all other files. It is written last."""
MOST_BYTES = 2**30
"""GGUF files of more bytes are not converted, because their float32 copy would take too much disk."""


Loaded = tuple[Any, Any, Any]
"""(model, tokenizer, transformers' report, which lists missing weights)."""


def convert_gguf(file: Path) -> Path | Loaded:
    """Convert a GGUF file, unless this was done before, and return the folder with the converted model.

    A file is not converted if ``LOCAUDIT_CACHE`` is ``off``, if it has more than `MOST_BYTES`, if weights are missing,
    or if the folder cannot be written (with a warning). In these cases, the model is read from the file in float32 and
    returned itself. Raises `ValueError` if transformers cannot read the file.
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
            f"{file.name} is not cached, so loading it takes long every time: {folder} cannot be written ({error}). "
            "Set the environment variable LOCAUDIT_CACHE to another folder, or to 'off' to turn the cache off",
            UserWarning,
            stacklevel=3,
        )
    return read or read_gguf(file)


def read_gguf(file: Path) -> Loaded:
    """Read a GGUF file with transformers, the model in float32. Raises `ValueError` if transformers cannot read it."""
    keywords = {"gguf_file": file.name}
    try:
        with redirect_stderr(io.StringIO()):  # the only way to hide a progress bar
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **keywords)
            loaded, report = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
                str(file.parent), dtype=torch.float32, output_loading_info=True, **keywords
            )
    except OSError as error:  # as a ValueError, because the caller handles OSErrors of the cache
        raise ValueError(str(error)) from error
    return _plain(loaded), tokenizer, report


def _plain(loaded: Any) -> Any:
    """The same model, built from its config. The dequantised one cannot be cast, or saved with `save_pretrained`."""
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
    """Write the whole folder or, if that fails, nothing. The caller must hold the folder's lock."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # may be left from a process that was killed
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
    """Whether every file exists and has the content that was written."""
    try:
        contents = json.loads((folder / CONTENTS).read_text(encoding="utf-8"))
        return all(_sha256(folder / name) == digest for name, digest in contents.items())
    except (OSError, ValueError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
