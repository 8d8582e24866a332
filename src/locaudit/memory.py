"""How much fits: free memory, and how many edits run at once."""

from __future__ import annotations

import gc
import math
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from locaudit.edits import EditBank
from locaudit.edits.hooks import SiteTensors
from locaudit.lean import Again, lean
from locaudit.location import Kind
from locaudit.measure.forward import collate_bank, run_trees
from locaudit.measure.tree import Tree
from locaudit.models import Model, Site

FULL_TOKENS = {"cpu": 64, "cuda": 16384}
"""Tokens of one training step from which on more of them hardly make it faster a token (docs/performance.md)."""
AGAIN_TOKENS = {"cpu": 160}
"""Tokens of one step up to which running attention again costs less time than more steps of fewer tokens."""
MAX_BANK = 64
"""Most edits in one bank."""
LEAN = 0.17
"""What training aims to keep for a backward pass, in units of the weights' bytes; a long question may keep more."""
_TRIED = 80
"""Tokens of the forward that says what a token keeps, less those of one of a fifth."""
SHARE = 0.5
"""Share of the free memory that a bank may be expected to take."""


@dataclass(frozen=True)
class Kept:
    """Bytes that training keeps for the backward pass, for each token and decoder layer."""

    plain: float
    attention: float
    """If the layer's attention runs again in the backward pass."""
    lean: float
    """If its MLP does too."""


_KEPT: WeakKeyDictionary[Model, dict[tuple[Kind, str | None], Kept]] = WeakKeyDictionary()


def kept_bytes(model: Model, kind: Kind = "heads") -> Kept:
    """What a training step keeps under an edit of all units of that kind, seen on a few tokens (tried once)."""
    found = _KEPT.setdefault(model, {})
    key = (kind, getattr(model.config, "_attn_implementation", None))
    if key not in found:
        many = min(_TRIED, getattr(model.config, "max_position_embeddings", None) or _TRIED)
        few = many // 5
        layers = range(model.n_layers)
        attention = layers if kind == "heads" and model.attention(0) is not None else range(0)
        plain, attending, least = (
            (_held_bytes(model, many, kind, again) - _held_bytes(model, few, kind, again))
            / ((many - few) * model.n_layers)
            for again in (Again(), Again(attention), Again(attention, layers))
        )
        attending = min(attending, plain)
        found[key] = Kept(plain, attending, min(least, attending))
    return found[key]


class _Made(TorchDispatchMode):
    """Notes the storages that operations make."""

    supports_higher_order_operators = True

    def __init__(self):
        super().__init__()
        self._storages: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._storages.append((StorageWeakRef(storage), storage.nbytes()))
        return made

    def alive(self) -> dict[int, int]:
        """Bytes of each storage that something still holds."""
        return {ref.cdata: size for ref, size in self._storages if not ref.expired()}


_NOTHING = Again()


@torch.enable_grad()
def _held_bytes(model: Model, n_tokens: int, kind: Kind = "heads", again: Again = _NOTHING) -> int:
    """Bytes that stay after a training forward, besides the weights."""
    sites: dict[Site, SiteTensors] = {}
    for layer in range(model.n_layers):
        site: Site = (kind, layer)
        a, b = (torch.zeros(1, model.width(site), device=model.site_device(site), requires_grad=True) for _ in range(2))
        sites[site] = SiteTensors(a, b, torch.zeros(1, device=a.device))
    tree = Tree((model.pad_id,) * (n_tokens - 1), ((model.pad_id, model.pad_id),))  # the last token does not run
    batch = collate_bank([[tree]], 1, 0, model)
    with lean(model, again) if kind == "heads" else nullcontext(), _Made() as made:
        out = run_trees(model, batch, EditBank(sites, (False,)), torch.zeros(1, dtype=torch.long))
    held = made.alive()
    del out  # the graph hangs on it
    own = {tensor.untyped_storage()._cdata for tensor in (*model.lm.parameters(), *model.lm.buffers())}
    return sum(size for storage, size in held.items() if storage not in own)


def part_tokens(model: Model, lowest: int = 0, kind: Kind = "heads") -> int:
    """Tokens that training runs at once, of edits whose lowest layer is `lowest`; the rest of a step follows.

    As many as keep `LEAN` of the weights' bytes for the backward pass, or as fill the device.
    """
    weights = sum(parameter.nbytes for parameter in model.lm.parameters())
    kept = kept_bytes(model, kind).plain * (model.n_layers - lowest)
    return max(FULL_TOKENS.get(model.device.type, FULL_TOKENS["cuda"]), int(LEAN * weights / kept))


def room(model: Model, limit: int, *, cached: bool = False) -> int:
    """Tokens of a part that may keep what `limit` tokens do: some more, where running attention again pays."""
    kept = kept_bytes(model)
    stretched = limit if cached else int(limit * kept.plain / kept.attention)
    return max(limit, min(stretched, AGAIN_TOKENS.get(model.device.type, 0)))


def run_again(model: Model, n_tokens: int, limit: int, lowest: int = 0, *, cached: bool = False) -> Again:
    """What runs again so that `n_tokens` keep no more than `limit` tokens do: attention first, which costs least.

    Not attention where there is a cache of keys and values (`cached`). The first edited layers' parts: those are run
    again last, when the backward pass has let go of the others. All of them may not be enough.
    """
    kept, n_edited = kept_bytes(model), model.n_layers - lowest
    surplus = (n_tokens - limit) * n_edited * kept.plain
    layers = []
    for saved in (0.0 if cached else kept.plain - kept.attention, kept.attention - kept.lean):
        n = min(math.ceil(surplus / (n_tokens * saved)), n_edited) if surplus > 0 and saved > 0 else 0
        layers.append(range(lowest, lowest + n) if n else range(0))
        surplus -= n * n_tokens * saved
    return Again(*layers)


def training_bank(model: Model, step_tokens: float) -> int:
    """Edits to train at once when a step of one runs `step_tokens`: enough to fill the device, if memory allows."""
    devices = {parameter.device for parameter in model.lm.parameters()}
    kind = model.device.type
    wanted = math.ceil(FULL_TOKENS.get(kind, FULL_TOKENS["cuda"]) / max(step_tokens, 1))
    fitting = int(
        SHARE * min(map(free_bytes, devices)) / (max(step_tokens, 1) * kept_bytes(model).plain * model.n_layers)
    )
    return max(1, min(wanted, fitting, MAX_BANK))


def scoring_bank(model: Model) -> int:
    """Edits to score at once: decoding a few rows costs as much as decoding one."""
    return 4 if model.device.type == "cpu" else 32


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
