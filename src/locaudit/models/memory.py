"""Device memory: how much is free, how much a computation needs, and which errors mean that it ran out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping

import torch

from locaudit.models.model import Model

SHARE = 0.5
"""Share of the free memory that a bank of edits may use by estimate."""


def of_device(table: Mapping[str, int], device: torch.device) -> int:
    """The entry of a device in a table of sizes ``{"cpu": .., "cuda": ..}``. Other types of device count as CUDA."""
    return table.get(device.type, table["cuda"])


def free_bytes(device: torch.device) -> int:
    """Free memory of a CUDA device in bytes, including memory that PyTorch has reserved but does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def copies_that_fit(model: Model, work: Callable[[], object]) -> int:
    """How many times `work` could run at once in `SHARE` of the free memory of the model's CUDA devices.

    Runs `work` once and measures its peak memory. Returns 0 if this runs out of memory.
    """
    devices = {parameter.device for parameter in model.lm.parameters()}
    before = {device: torch.cuda.memory_allocated(device) for device in devices}
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return 0
    peaks = {device: torch.cuda.max_memory_allocated(device) - before[device] for device in devices}
    release(model.device)
    return min(int(SHARE * free_bytes(device) / max(peak, 1)) for device, peak in peaks.items())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("not enough memory", "can't allocate memory", "out of memory", "ALLOC_FAILED")
    )


def release(device: torch.device) -> None:
    """Return unused memory of Python and of PyTorch's cache on a GPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
