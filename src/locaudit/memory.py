"""How much fits: free memory, and how many edits run at once."""

from __future__ import annotations

import gc
import math
from contextlib import suppress
from pathlib import Path

import torch

from locaudit.models import Model

FULL_TOKENS = {"cpu": 64, "cuda": 16384}
"""Tokens of one training step from which on more of them no longer make it faster a token (docs/performance.md)."""
MAX_BANK = 64
"""Most edits in one bank."""
LEAN = 0.27
"""What training aims to keep for a backward pass, in units of the weights' bytes; a long question may keep more."""
SHARE = 0.5
"""Share of the free memory that a bank may be expected to take."""


def part_tokens(model: Model, lowest: int = 0) -> int:
    """Tokens that training runs at once, of edits whose lowest layer is `lowest`; the rest of a step follows.

    As many as keep `LEAN` of the weights' bytes for the backward pass, or as fill the device.
    """
    weights = sum(parameter.nbytes for parameter in model.lm.parameters())
    kept = training_bytes(model) * (model.n_layers - lowest) / model.n_layers
    return max(FULL_TOKENS.get(model.device.type, FULL_TOKENS["cuda"]), int(LEAN * weights / kept))


def training_bank(model: Model, step_tokens: float) -> int:
    """Edits to train at once when a step of one runs `step_tokens`: enough to fill the device, if memory allows."""
    devices = {parameter.device for parameter in model.lm.parameters()}
    kind = model.device.type
    wanted = math.ceil(FULL_TOKENS.get(kind, FULL_TOKENS["cuda"]) / max(step_tokens, 1))
    fitting = int(SHARE * min(map(free_bytes, devices)) / (max(step_tokens, 1) * training_bytes(model)))
    return max(1, min(wanted, fitting, MAX_BANK))


def scoring_bank(model: Model) -> int:
    """Edits to score at once: decoding a few rows costs as much as decoding one."""
    return 4 if model.device.type == "cpu" else 32


def training_bytes(model: Model) -> int:
    """Bytes that a training step keeps for the backward pass, for each token (an estimate from above)."""
    d_model = int(model.lm.get_input_embeddings().weight.shape[1])  # type: ignore[union-attr]
    d_mlp = model.n_units("neurons")
    # Normalisations run in float32; attention keeps queries, keys, values and its output, the MLP some five vectors.
    return model.n_layers * (4 * 6 * d_model + model.lm.dtype.itemsize * (8 * d_model + 5 * d_mlp))


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device now; on a CPU, what the system and its control group still give."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = [2**33]
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found = [1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])]
    with suppress(OSError, ValueError):  # a container's limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        files = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file"))  # given back on demand
        found.append(limit - used + files)
    return max(min(found), 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("not enough memory", "can't allocate memory", "out of memory", "ALLOC_FAILED")
    )


def release(device: torch.device) -> None:
    """Give back what is held for nothing."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
