"""Edits in other forms: folded into weights, a merged checkpoint, a PEFT LoRA adapter, or a control vector.

An edit h' = h + B (c + A h) of the input h of a projection W is a change of its weights:

    W h' + bias = (W + W B A) h + (bias + W B c)

So W' = W + (W B) A, a LoRA update of rank r, and bias' = bias + W B c. Adding a constant v to the residual stream after
a layer is the same as adding it to the bias of the MLP's down projection: bias' = bias + v. It is also what a control
vector of llama.cpp does.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import pad

from locaudit.edits.bank import AnyEdit, check_fits
from locaudit.edits.hooks import record
from locaudit.errors import LocationError, ModelError
from locaudit.location import Site
from locaudit.models import Model, is_quantised, output_weight

Form = Literal["peft", "merged", "vectors", "gguf"]


MOST_LOST = 0.05
"""A merged checkpoint is refused if rounding its weights loses more than this share of the edit's update."""


def cannot_become(model: Model, edit: AnyEdit, form: Form) -> str:
    """Why an edit cannot become a PEFT adapter (``peft``), merged weights (``merged``) or a control vector (``gguf``).

    An empty string if it can. Every edit can be saved as ``vectors``, its own file format. Raises `LocationError` for
    an unknown form or an edit made for another model.
    """
    if form not in get_args(Form):
        raise LocationError(
            got=f"the form {form!r}", expected=f"one of {', '.join(get_args(Form))}", remedy="choose one of them"
        )
    check_fits(model, edit)
    if form == "vectors":
        return ""
    if form == "gguf":
        return _no_control_vector(edit)
    if any(name.endswith(".base_layer") for name, _ in model.lm.named_modules()):
        return "the model has adapter layers (LoRA); merge them into its weights first (peft: merge_and_unload)"
    if reason := _no_update(model, edit, folds=form == "merged"):
        return reason
    if form == "merged":
        for (name, layer), new in _updates(model, edit).items():
            if new.shift.any() and model.projection(Site(name, layer)).bias is None:
                return (
                    f"it adds a constant, but the projection of {name} in layer {layer} has no bias by this model's "
                    "config (a PEFT adapter can have one)"
                )
        if (lost := _lost(model, edit)) > MOST_LOST:
            return (
                f"rounding to the model's {_dtype(model)} would lose {lost:.0%} of the change of weights; a PEFT "
                "adapter (--to peft) loses nothing, and neither does a model loaded in float32 (--dtype float32)"
            )
    return ""


def _no_control_vector(edit: AnyEdit) -> str:
    """Why an edit is no constant in the residual stream, to which llama.cpp adds a vector after layers 1, 2, ..."""
    if edit.positions != "all":
        return f"it has positions {edit.positions!r}, and a control vector acts on every token"
    for (name, layer), e in sorted(edit.sites.items()):
        if name != "residual":
            return f"it acts at {name} of layer {layer}, and a control vector on the residual stream"
        if e.a.any() or e.mask is not None:
            return f"it reads the residual stream of layer {layer}, and a control vector is the same for every token"
        if layer == 0:
            return "it acts after layer 0, where llama.cpp adds no control vector"
    return ""


def _no_update(model: Model, edit: AnyEdit, *, folds: bool) -> str:
    """Why an edit is no update of weights or, if `folds`, why the weights cannot hold the update; empty if they can."""
    if edit.positions != "all":
        return f"it has positions {edit.positions!r}, and weights act on every token"
    for (name, layer), e in edit.sites.items():
        if name == "residual" and (e.a.any() or e.mask is not None):
            return f"it reads the residual stream of layer {layer}, which the skip connection carries past all weights"
        if name == "residual" and "neurons" in model.lacks:
            return f"a constant in the stream would be a bias of the MLP, but {model.lacks['neurons']}"
        projection = model.projection(_written(Site(name, layer)))
        try:
            weight = output_weight(projection)
        except ModelError as error:
            return f"at {name} of layer {layer}, the model has {error.got}; {error.remedy}"
        if folds and is_quantised(projection):
            return f"{name} of layer {layer} have quantised weights, which cannot hold it; an adapter can (--to peft)"
        if not _is_product(projection, weight):
            return f"the projection at {name} of layer {layer} computes something else than the product with its weight"
        if name == "residual" and not _adds_plainly(model, layer):
            return f"layer {layer} normalises its MLP's output, so a bias there does not add a constant to the stream"
    return ""


@contextmanager
def folded(model: Model, edit: AnyEdit) -> Iterator[None]:
    """Run `model` with the edit folded into its weights. Leaving restores the original weights, also after an error.

    While folded, the changed projections of a 16-bit model hold W' = W + (W B) A in float32 and compute in float32.
    The update is small compared with W, so that rounding W' to 16 bits would lose a part of it. Inputs and outputs of
    these projections keep the model's dtype. Raises `LocationError` for an edit that cannot become weights of this
    model.
    """
    check_fits(model, edit)
    _refuse(_no_update(model, edit, folds=True))  # a projection without a bias gets one, as in an adapter
    with _replaced(model, {site: _changed(model, site, new) for site, new in _updates(model, edit).items()}):
        yield


def save_merged(model: Model, edit: AnyEdit, folder: str | Path) -> Path:
    """Save the edited model as a transformers checkpoint: its weights with the edit folded in, and its tokenizer.

    The weights are rounded to the model's dtype, which loses a part of the update. The lost share is the norm of the
    rounding error divided by the norm of the update, both over all changed weights. If it is above `MOST_LOST`, nothing
    is saved; if it is above 0.1 %, a warning gives the number. In float32, hardly anything is lost. A 16-bit model is
    not saved in float32 unless it was loaded so, because its checkpoint would then be twice as large.

    Raises `LocationError` for an edit that cannot become such weights.
    """
    _refuse(cannot_become(model, edit, "merged"))
    if (lost := _lost(model, edit)) > 0.001:
        warnings.warn(
            f"rounding to {_dtype(model)} loses {lost:.1%} of the change of weights (norm of the lost part)",
            stacklevel=2,
        )
    folder = Path(folder)
    rounded = {}
    for site, new in _updates(model, edit).items():
        dtype = output_weight(model.projection(site)).dtype
        rounded[site] = {name: x.to(dtype) for name, x in _changed(model, site, new).items()}
    with _replaced(model, rounded):
        _save_model(model, folder)
    return folder


@contextmanager
def _replaced(model: Model, weights: Mapping[Site, Mapping[str, Tensor]]) -> Iterator[None]:
    """Replace weights of projections, also with float32 weights in a 16-bit model. Leaving restores the old weights."""
    before: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter | None]] = []
    handles = []
    model.forget_fingerprint()
    try:
        for site, tensors in weights.items():
            projection = model.projection(site)
            slots, dtype = projection._parameters, output_weight(projection).dtype
            if tensors["weight"].dtype != dtype:
                handles.append(projection.register_forward_pre_hook(lambda _module, args: (args[0].float(), *args[1:])))
                handles.append(projection.register_forward_hook(_cast_to(dtype)))
            for name, tensor in tensors.items():
                before.append((slots, name, slots[name]))
                slots[name] = nn.Parameter(tensor, requires_grad=False)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for slots, name, own in reversed(before):
            slots[name] = own
        model.forget_fingerprint()


def _cast_to(dtype: torch.dtype) -> Callable[..., Tensor]:
    return lambda _module, _args, output: output.to(dtype)


def _changed(model: Model, site: Site, new: _Update) -> dict[str, Tensor]:
    """The updated weight and bias of one projection, in float32 and in the projection's own memory layout."""
    projection = model.projection(site)
    weight, bias = output_weight(projection), projection._parameters["bias"]
    changed = weight.float() + new.written @ new.a
    tensors = {"weight": changed if weight is projection.weight else changed.T.contiguous()}
    if bias is not None or new.shift.any():
        tensors["bias"] = new.shift if bias is None else new.shift + bias.data.float()
    return tensors


def _lost(model: Model, edit: AnyEdit) -> float:
    """Share of the update that rounding to the model's dtype loses: ||rounded W' - W'|| / ||W' - W||, with biases."""
    lost = update = 0.0
    for site, new in _updates(model, edit).items():
        projection = model.projection(site)
        for name, x in _changed(model, site, new).items():
            old = projection._parameters[name]
            lost += float((x.to(output_weight(projection).dtype).float() - x).square().sum())
            update += float((x if old is None else x - old.data.float()).square().sum())
    return math.sqrt(lost / update) if update else 0.0


def save_adapter(model: Model, edit: AnyEdit, folder: str | Path, *, base: str | None = None) -> Path:
    """Save the edit as a PEFT LoRA adapter with lora_A = A, lora_B = W B, alpha = r and the bias W B c (``lora_bias``).

    Load it with ``peft.PeftModel.from_pretrained(lm, folder)``. The adapter also names its base model, so that
    ``AutoPeftModelForCausalLM`` can load both. The name is `base` or, if None, the folder or hub id from which the
    model was loaded. A model that was loaded from a GGUF file (such as the bundled one) or built in memory has neither.
    In this case, a copy of it is saved in the subfolder ``base``. Raises `LocationError` for an edit that cannot become
    weights.
    """
    _refuse(cannot_become(model, edit, "peft"))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    updates = _updates(model, edit)
    names = {id(module): name for name, module in model.lm.named_modules()}
    rank = max(1, *(len(new.a) for new in updates.values()), 1)
    with_bias = any(bool(new.shift.any()) for new in updates.values())
    tensors, targets, transposed = {}, [], False
    for site, new in updates.items():
        projection = model.projection(site)
        transposed = not is_quantised(projection) and output_weight(projection) is not projection.weight
        targets.append(names[id(projection)])
        key = f"base_model.model.{targets[-1]}"
        tensors[f"{key}.lora_A.weight"] = pad(new.a, (0, 0, 0, rank - len(new.a))).cpu().contiguous()
        tensors[f"{key}.lora_B.weight"] = pad(new.written, (0, rank - len(new.a))).cpu().contiguous()
        if with_bias:
            tensors[f"{key}.lora_B.bias"] = new.shift.cpu().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or _name_base(model, folder),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": with_bias,
        "fan_in_fan_out": transposed,
        "target_modules": targets,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


def save_control_vector(model: Model, edit: AnyEdit, file: str | Path) -> Path:
    """Save the edit as a control vector in GGUF, as repeng and ``llama-cli --control-vector`` read it.

    The float32 tensor ``direction.N`` is B c, which is added to the residual stream after layer N. Raises
    `LocationError` for an edit that is more than such constants.
    """
    _refuse(cannot_become(model, edit, "gguf"), "a control vector", "constants in the residual stream, at every token")
    from gguf import GGUFWriter

    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(file, "controlvector")
    writer.add_string("controlvector.model_hint", model.config.model_type)
    writer.add_uint32("controlvector.layer_count", len(edit.sites))
    for site, e in sorted(edit.sites.items()):
        writer.add_tensor(f"direction.{site.layer}", (e.b @ e.c).detach().float().cpu().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@dataclass(frozen=True, eq=False)
class _Update:
    """How the weights of one projection change: W' = W + written a, bias' = bias + shift, with written = W B."""

    a: Float[Tensor, "r d_in"]
    written: Float[Tensor, "d_model r"]
    shift: Float[Tensor, " d_model"]


def _updates(model: Model, edit: AnyEdit) -> dict[Site, _Update]:
    """The weight update of every projection that the edit changes, on that projection's device."""
    out: dict[Site, _Update] = {}
    for (name, layer), e in sorted(edit.sites.items()):
        site = _written(Site(name, layer))
        weight = output_weight(model.projection(site)).float()
        a, b, c = (x.detach().to(weight.device) for x in (e.as_matrices.a, e.as_matrices.b, e.as_matrices.c))
        if name == "residual":
            new = _Update(weight.new_zeros(0, weight.shape[1]), weight.new_zeros(weight.shape[0], 0), b @ c)
        else:
            written = weight @ b
            new = _Update(a, written, written @ c)
        if site in out:  # the edit acts on both neurons and residual in this layer; both change this projection
            old = out[site]
            new = _Update(torch.cat([old.a, new.a]), torch.cat([old.written, new.written], 1), old.shift + new.shift)
        out[site] = new
    return out


def _written(site: Site) -> Site:
    """The site whose projection holds the update. For the residual stream, this is the MLP's down projection."""
    return Site("neurons", site.layer) if site.name == "residual" else site


def _dtype(model: Model) -> str:
    return str(model.lm.dtype).removeprefix("torch.")


def _refuse(reason: str, what: str = "weights", expected: str = "a change of the layers' plain weights") -> None:
    if reason:
        raise LocationError(
            got=f"an edit that cannot become {what}: {reason}",
            expected=f"an edit that equals {expected}",
            remedy="export it as vectors (--to vectors), or run the model under it in Python: edit.on(model)",
        )


@torch.no_grad()
def _is_product(projection: nn.Module, weight: Tensor) -> bool:
    """Whether a projection computes W x + bias, within 5 %. This is tested on a random x, without hooks.

    The answer is no for a layer whose forward does not use its `weight` as it is, for example one that quantises it.
    """
    x = torch.randn(1, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    y, bias = projection.forward(torch.cat([x, torch.zeros_like(x)])).float()
    expected = weight.float() @ x[0].float()
    return bool((y - bias - expected).norm() <= 0.05 * expected.norm())


@torch.no_grad()
def _adds_plainly(model: Model, layer: int) -> bool:
    """Whether the layer adds its MLP's output to the residual stream unchanged; tested by a forward of four tokens."""
    site, ids = Site("residual", layer), torch.arange(4, device=model.device).unsqueeze(0)
    shift = torch.linspace(-1, 1, model.width(site), device=model.site_device(site))
    streams = []
    for change in (torch.zeros_like(shift), shift):
        handle = model.projection(Site("neurons", layer)).register_forward_hook(
            lambda _module, _args, output, change=change: output + change.to(output.dtype)  # type: ignore[attr-defined]
        )
        try:
            with record(model, [site], (torch.zeros(4, dtype=torch.long), torch.arange(4))) as seen:
                model.lm(input_ids=ids, use_cache=False)
        finally:
            handle.remove()
        streams.append(seen[site])
    plain, moved = streams
    close = 1e-4 if model.lm.dtype == torch.float32 else 0.05
    # Compared entry by entry, because some entries of a residual stream are thousands of times larger than others.
    return bool(((moved - plain - shift).abs() <= close * (1 + plain.abs())).all())


def _name_base(model: Model, folder: Path) -> str:
    """The folder or hub id from which the model can be loaded again; if there is none, a copy is saved now."""
    name = model.lm.name_or_path  # empty for a model built in memory, the file's folder for one from a GGUF file
    if name and (Path(name) / "config.json").is_file():
        return str(Path(name).resolve())
    if name and not Path(name).is_absolute() and not Path(name).exists():
        return name
    size = sum(x.nbytes for x in model.lm.parameters())
    warnings.warn(
        f"the base model has no folder or hub id that an adapter could name; a copy of it, {size / 1e6:,.0f} MB, is "
        f"written to {folder / 'base'}",
        stacklevel=3,
    )
    _save_model(model, folder / "base")
    return str((folder / "base").resolve())


def _save_model(model: Model, folder: Path) -> None:
    model.lm.save_pretrained(folder)
    if model.tokenizer is not None:  # a plain transformers model has none
        model.tokenizer.save_pretrained(folder)
