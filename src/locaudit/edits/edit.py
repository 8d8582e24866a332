"""One edit: what it changes at each site and at which tokens. Run a model under it, save it and load it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from locaudit.claims.importers import read_control_vector
from locaudit.edits.bank import roles_at, stack
from locaudit.edits.export import Form, cannot_become, save_adapter, save_control_vector
from locaudit.edits.hooks import SiteEdit, each, replaced_forwards, tensors_of
from locaudit.errors import DataError, LocationError
from locaudit.location import SITES, Positions, Site
from locaudit.models import Model, as_model


@dataclass(frozen=True, eq=False)
class Edit:
    """An edit of a model: h' = where(mask, mean, h) + B (c + A h) at each of its sites (`SiteEdit`).

    `positions` are the tokens that it acts on: ``all``, ``prompt`` (those before the answer), ``answer`` (the last
    prompt token and all after it), ``last`` (the last prompt token) or ``subject`` (the subject's last token).
    """

    sites: Mapping[Site, SiteEdit]
    positions: Positions = "all"

    def __repr__(self) -> str:
        where = ", ".join(f"{name} of layer {layer}" for name, layer in sorted(self.sites)[:4])
        more = f", and {len(self.sites) - 4} more" if len(self.sites) > 4 else ""
        rank = max((len(site.c) for site in self.sites.values()), default=0)
        return f"Edit(rank {rank} at {where or 'no site'}{more}; {self.positions} tokens)"

    @contextmanager
    def on(
        self,
        model: Model | PreTrainedModel,
        *,
        answer_from: int | Sequence[int] | None = None,
        subject_at: int | Sequence[int] | None = None,
    ) -> Iterator[PreTrainedModel]:
        """Run a model under this edit: a `Model` or a plain transformers model. Yields the transformers model.

            with edit.on(model) as lm:
                lm.generate(**inputs)

        Leaving the ``with`` block restores the model, also after an exception.

        An edit with other positions than ``all`` needs to know where the prompt ends. In ``lm.generate``, prompts must
        be left-padded, so that they end at the last column. For a plain forward, pass the column of the last prompt
        token as `answer_from`: one number for all rows, or one per row. An edit of the ``subject`` needs the column of
        the subject's last token instead, also in ``lm.generate``: `subject_at`. Without them, a forward raises
        `LocationError`. With a KV cache, columns count from the first cached token.
        """
        whole = as_model(model)
        bank, rows = stack(whole, [self]), torch.zeros(1, dtype=torch.long)
        with _roles(whole, self.positions, answer_from, subject_at) as roles, bank.applied(whole, rows, roles):
            yield whole.lm

    def cannot_become(self, form: Form, model: Model | PreTrainedModel) -> str:
        """Why the edit cannot be exported in a form (`locaudit.edits.export.cannot_become`); empty if it can."""
        return cannot_become(as_model(model), self, form)

    def to_peft(self, path: str | Path, model: Model | PreTrainedModel, *, base: str | None = None) -> Path:
        """Save the edit as a PEFT LoRA adapter; see `locaudit.edits.export.save_adapter`."""
        return save_adapter(as_model(model), self, path, base=base)

    def to_gguf(self, file: str | Path, model: Model | PreTrainedModel) -> Path:
        """Save the edit as a control vector; see `locaudit.edits.export.save_control_vector`."""
        return save_control_vector(as_model(model), self, file)

    def copied(self) -> Edit:
        """The same edit in tensors of its own on the CPU, which share no memory with a bank."""
        sites = {key: each(site, lambda x: x.detach().cpu().clone()) for key, site in self.sites.items()}
        return Edit(sites, self.positions)

    def to_bytes(self) -> bytes:
        """The edit in the safetensors format.

        The tensors of a site are ``SITE.LAYER.a`` (r, d), ``.b`` (d, r), ``.c`` (r,) and, for an ablation, ``.mask``
        and ``.mean`` (d,). The metadata mark the file as an edit and hold its `positions`.
        """
        tensors = {}
        for (name, layer), site in sorted(self.sites.items()):
            # Cloned because safetensors refuses tensors that share memory; several sites may have the same A.
            for part, x in tensors_of(each(site, lambda x: x.detach().cpu().contiguous().clone())).items():
                tensors[f"{name}.{layer}.{part}"] = x
        return save(tensors, {"locaudit": json.dumps({"file": "edit", "positions": self.positions}, sort_keys=True)})

    def save(self, path: str | Path) -> None:
        """Save the edit to a file, to be read with `load_edit`."""
        Path(path).write_bytes(self.to_bytes())

    @property
    def is_finite(self) -> bool:
        """Whether the edit has no NaN and no infinite number."""
        return all(bool(x.isfinite().all()) for site in self.sites.values() for x in tensors_of(site).values())


def load_edit(path: str | Path) -> Edit:
    """Load an edit from a file of `Edit.save`, also in the older format with vectors a and b, or a control vector.

    The control vectors v of a GGUF file of repeng or llama.cpp give h' = h + v in the residual stream after each of
    their layers, at all tokens. Raises `DataError`, or `LocationError` for a GGUF file that is no control vector.
    """
    if Path(path).suffix == ".gguf":
        vectors = {layer: torch.tensor(v).float() for layer, v in read_control_vector(Path(path)).items()}
        pushes = {Site("residual", i): SiteEdit.rank_one(torch.zeros_like(v), v, 1.0) for i, v in vectors.items()}
        return Edit(pushes)
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})["locaudit"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if meta["positions"] not in get_args(Positions):
            raise ValueError(f"positions {meta['positions']!r}")
        if "c" in meta:
            sites = {
                key: SiteEdit.rank_one(tensors[f"{key}.a"], tensors[f"{key}.b"], c) for key, c in meta["c"].items()
            }
        elif meta["file"] == "edit":
            names = sorted({key.rpartition(".")[0] for key in tensors})
            parts = [field.name for field in fields(SiteEdit)]
            sites = {
                key: SiteEdit(**{p: tensors[f"{key}.{p}"] for p in parts if f"{key}.{p}" in tensors}) for key in names
            }
        else:
            raise ValueError(f"a file of kind {meta['file']!r}")
        return Edit({_site(key): _checked(key, site) for key, site in sites.items()}, meta["positions"])
    except (
        OSError,
        SafetensorError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        RuntimeError,
    ) as error:
        raise DataError(
            got=f"{path}, which is not a saved edit ({error})",
            expected="a safetensors file written by Edit.save, such as those in a run folder's edits/",
            remedy="check the path",
        ) from None


def zero_edit(model: Model, sites: Sequence[Site]) -> Edit:
    """An edit at the given sites that changes nothing."""
    return Edit({s: SiteEdit.rank_one(torch.zeros(model.width(s)), torch.zeros(model.width(s))) for s in sites})


def _site(key: str) -> Site:
    name, layer = key.split(".")
    if name not in SITES:
        raise ValueError(f"a site called {name!r}")
    return Site(name, int(layer))  # type: ignore[arg-type]


def _checked(key: str, site: SiteEdit) -> SiteEdit:
    """The site's edit in float32; raises `ValueError` if the shapes of its tensors do not match."""
    rank, width = site.a.shape
    expected = {"a": (rank, width), "b": (width, rank), "c": (rank,), "mask": (width,), "mean": (width,)}
    for name, x in tensors_of(site).items():
        if tuple(x.shape) != expected[name]:
            raise ValueError(f"{key}.{name} has shape {tuple(x.shape)}, not {expected[name]}")
    if (site.mask is None) != (site.mean is None):
        raise ValueError(f"{key} has only one of mask and mean")
    return each(site, lambda x: x if x.dtype == torch.bool else x.float())


@contextmanager
def _roles(
    model: Model,
    positions: Positions,
    answer_from: int | Sequence[int] | None,
    subject_at: int | Sequence[int] | None,
) -> Iterator[Callable[[int, int, int], Int[Tensor, "rows tokens"]]]:
    """Yield a function that gives the roles of each forward's columns: (rows, tokens).

    Columns count from the first token in the KV cache. Inside `generate`, which is wrapped here, the last prompt token
    is in the last column of the prompts. In any other forward, `answer_from` gives its column.
    """
    first, subject = (None if x is None else torch.as_tensor(x).reshape(-1, 1) for x in (answer_from, subject_at))

    def roles(n_rows: int, n_tokens: int, n_past: int) -> Int[Tensor, "rows tokens"]:
        found, name, given, what, or_else = (
            (subject, "subject_at", subject_at, "subject's last token", "")
            if positions == "subject"
            else (first, "answer_from", answer_from, "last prompt token", ", or call generate")
        )
        if found is None or len(found) not in (1, n_rows) or bool((found < 0).any()):
            raise LocationError(
                got=f"a plain forward of {n_rows} rows under an edit with positions {positions!r}, and {name}={given}",
                expected=f"the column of the {what}, from 0: one number for all rows or one per row",
                remedy=f"pass it as edit.on(model, {name}=...){or_else}",
            )
        none = torch.full((1, 1), -1)
        last, at = (none if x is None else x for x in (first, subject))
        return roles_at(torch.arange(n_past, n_past + n_tokens), last, at)

    def wrap_generate(generate: Callable) -> Callable:
        def generates(inputs=None, *args, **kwargs):
            nonlocal first
            given = [x for x in (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), inputs) if x is not None]
            before, first = first, torch.tensor([[given[0].shape[1] - 1 if given else 0]])
            try:
                return generate(inputs, *args, **kwargs)
            finally:
                first = before

        return generates

    with replaced_forwards([model.lm], wrap_generate, "generate"):
        yield roles
