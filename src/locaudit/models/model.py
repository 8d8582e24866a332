"""A loaded language model whose attention heads, neurons and residual stream can be read and edited."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPast

from locaudit.architectures import UNSUITABLE, Architecture, find_architecture
from locaudit.checkpoints import kv_heads
from locaudit.claims import Shape, find_kind
from locaudit.errors import LocationError, ModelError
from locaudit.location import Location, Site
from locaudit.models.architectures import input_width, output_width, submodule
from locaudit.registry import ARCHITECTURES, KINDS

_NOT_THE_FUNCTION = (
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache",
)  # fmt: skip
"""Entries of a transformers config that do not change what the model computes."""
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
"""Name of the argument for earlier tokens' keys and values. transformers renamed it in 5.24."""

NO_NEURONS = "the architecture gives no path of neurons, as for a mixture of experts with several MLPs in a layer"
"""Reason given if a model's neurons cannot be used because its architecture has no path to them."""


def setting(config: Any, name: str) -> Any:
    """A value of a transformers config; None if it has no such value, or different ones for different layers."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # configs with other values in other layers, such as Gemma 4's, refuse the question
        return None


@dataclass(frozen=True, eq=False)
class Head:
    """The output head, which turns the last hidden state h into logits.

    z = W h + bias. With a softcap, the logits are softcap * tanh(z / softcap), otherwise z.
    """

    weight: torch.Tensor
    """W, of shape (vocabulary, d_model)."""
    bias: torch.Tensor | None
    softcap: float | None


@dataclass(frozen=True, eq=False)
class Model:
    """A frozen causal language model with its tokenizer, made by `load_model` or `wrap_model`."""

    lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    lacks: Mapping[str, str] = field(default_factory=dict)
    """Sites (``heads``, ``neurons``, ``residual``) that cannot be used in this model, and why."""
    architecture: Architecture | None = None
    """Paths to the projections, if they were given with the model; None: the table's paths."""
    note: str = ""
    """What was done to the model's weights, for reports: for example, that an adapter was merged into them."""

    def __repr__(self) -> str:
        kind, dtype = self.config.model_type, str(self.lm.dtype).removeprefix("torch.")
        n_layers, n_heads = self.config.num_hidden_layers, self.n_heads
        return f"Model({self.name!r}: {kind}, {n_layers} layers x {n_heads} heads, {dtype} on {self.device})"

    @property
    def config(self):
        """The transformers config of the text model."""
        return self.lm.config.get_text_config()

    @cached_property
    def paths(self) -> Architecture:
        """The paths to the projections: given ones, or else the table's. Raises `ModelError` if there are neither."""
        model_type = self.config.model_type
        seen = "" if model_type in ARCHITECTURES else _seen_paths(self.lm)
        if self.architecture is not None and model_type not in UNSUITABLE:
            return self.architecture
        return find_architecture(model_type, seen)

    @cached_property
    def _layers(self) -> nn.Module:
        found = submodule(self.lm, self.paths.layers)
        if not isinstance(found, nn.ModuleList | nn.Sequential):
            raise ModelError(
                got=f"{self.paths.layers!r} as the path of the layers, which is a {type(found).__name__}",
                expected="the list of decoder layers, such as model.layers",
                remedy="correct architecture.layers",
            )
        return found

    @property
    def trunk(self) -> nn.Module:
        """The module whose forward pass calls the layers one after another."""
        return submodule(self.lm, self.paths.layers.rpartition(".")[0])

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self._layers)  # type: ignore[arg-type]

    @property
    def n_heads(self) -> int:
        """Number of attention (query) heads per layer. If layers differ, it is 1 and `lacks` has ``heads``."""
        return setting(self.config, "num_attention_heads") or 1

    @property
    def head_dim(self) -> int:
        """Width of a head's output: input width of the output projection / n_heads.

        It can differ from hidden_size / n_heads.
        """
        return input_width(self.projection(Site("heads", 0))) // self.n_heads

    @cached_property
    def shape(self) -> Shape:
        """The sizes that decide which heads, neurons and other units the model has."""
        return Shape(
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            n_kv_heads=kv_heads(self.config.to_dict(), self.n_heads),
            head_dim=self.head_dim,
            n_neurons=0 if self.paths.neurons is None else self.width(Site("neurons", 0)),
            width=self.width(Site("residual", 0)),
        )

    def layer(self, number: int) -> nn.Module:
        """Decoder layer `number`, counted from 0."""
        return self._layers[number]  # type: ignore[index]

    def projection(self, site: Site) -> nn.Module:
        """The linear layer that reads the site's vector.

        For heads, this is the attention output projection; for neurons, the MLP down projection. The residual stream
        has no such layer: it raises `KeyError`. Raises `LocationError` for neurons if the model's paths name no MLP.
        """
        name, layer = site
        path = {"heads": self.paths.heads, "neurons": self.paths.neurons}[name]
        if path is None:
            raise LocationError(
                got=f"{name} of {self.name} ({self.config.model_type}), where {NO_NEURONS}",
                expected="a site that it has: heads or residual",
                remedy="use another place, or an edit that was made for this model",
            )
        return submodule(self.layer(layer), path)

    def width(self, site: Site) -> int:
        """Width d of the site's vector."""
        name, layer = site
        if name == "residual":
            return output_width(self.projection(Site("heads", layer)))
        return input_width(self.projection(site))

    def hook(self, site: Site, change: Callable[[torch.Tensor], torch.Tensor]) -> RemovableHandle:
        """Replace the site's vectors h by ``change(h)`` in every forward, until the handle is removed."""

        def at_input(_module, args):
            return change(args[0]), *args[1:]

        def at_output(_module, _args, output):
            if isinstance(output, tuple):  # in some architectures, layers return more than the residual stream
                return change(output[0]), *output[1:]
            return change(output)

        name, layer = site
        if name == "residual":
            return self.layer(layer).register_forward_hook(at_output)
        return self.projection(site).register_forward_pre_hook(at_input)

    def check_kind(self, kind: str) -> None:
        """Raise `ModelError` if places of this kind cannot be edited in the model (`lacks`)."""
        if reason := self.lacks.get(KINDS[kind].site):
            usable = [name for name in KINDS if KINDS[name].site not in self.lacks]
            raise ModelError(
                got=f"places of the kind {kind} in {self.name} ({self.config.model_type}), where {reason}",
                expected=f"a kind that this model has: {', '.join(usable) or 'none'}",
                remedy="claim a place of another kind, or audit another model",
            )

    def site_device(self, site: Site) -> torch.device:
        """Device of the site's projection or layer. Layers can be on different devices."""
        name, layer = site
        module = self.layer(layer) if name == "residual" else self.projection(site)
        # Some quantised layers have only buffers, and some have no buffers either.
        return next((x.device for x in (*module.parameters(), *module.buffers())), self.device)

    @property
    def head(self) -> Head | None:
        """The output head; None if the logits are not computed as `Head` describes."""
        return self._glance[0]

    @property
    def n_layer_outputs(self) -> int:
        """Length of the tuple that a decoder layer returns; 0 if it returns the residual stream as a bare tensor."""
        return self._glance[1]

    @cached_property
    def _glance(self) -> tuple[Head | None, int]:
        """`head` and `n_layer_outputs`, found by running the model on four tokens."""
        output = self.lm.get_output_embeddings()
        weight = getattr(output, "_parameters", {}).get("weight")  # some quantised layers have none
        lengths: list[int] = []
        handle = self.layer(0).register_forward_hook(
            lambda _module, _args, out: lengths.append(len(out) if isinstance(out, tuple) else 0)
        )
        try:
            ids = torch.arange(4, device=self.device).unsqueeze(0)
            with torch.no_grad():
                logits = self.lm(input_ids=ids, use_cache=False).logits[0].float()
        finally:
            handle.remove()
        if weight is None or weight.is_meta or not weight.is_floating_point() or self.lm.base_model is self.lm:
            return None, lengths[0]
        head = Head(weight, getattr(output, "bias", None), getattr(self.config, "final_logit_softcapping", None))
        with torch.no_grad():
            out = self.lm.base_model(input_ids=ids, use_cache=False)
            if getattr(out, "last_hidden_state", None) is None:
                return None, lengths[0]
            z = (out.last_hidden_state[0].to(weight.device) @ weight.T).float()
            z = z if head.bias is None else z + head.bias.float()
            z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
        close = 1e-4 if weight.dtype == torch.float32 else 0.05
        logits = logits.to(z.device)
        same = z.shape == logits.shape and bool((z - logits).abs().max() <= close * max(1.0, float(z.abs().max())))
        return head if same else None, lengths[0]

    @property
    def pad_id(self) -> int:
        """Id of the padding token, which is always masked."""
        return int(self.tokenizer.pad_token_id)  # type: ignore[arg-type]

    def subspaces(self, location: Location) -> dict[Site, torch.Tensor]:
        """The subspace of each site's vector (d,) that belongs to the location. Other sites are left out.

        A subspace is a boolean mask (d,) of coordinates, or an orthonormal basis (d, k) in float32. Raises
        `LocationError` if the location is outside this model, `ModelError` if this kind's site is in `lacks`.
        """
        self.check_kind(location.kind)
        found = find_kind(location).subspaces(location, self.shape)
        return {
            site: torch.from_numpy(x) if x.dtype == bool else torch.from_numpy(x).float() for site, x in found.items()
        }

    def spans(self, location: Location) -> list[Site]:
        """The sites at which the location is the span of a basis, not a set of coordinates."""
        return [site for site, subspace in self.subspaces(location).items() if subspace.dtype != torch.bool]

    @property
    def device(self) -> torch.device:
        """Device of the embeddings, to which token ids must be moved."""
        return self.lm.get_input_embeddings().weight.device  # type: ignore[return-value]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that affects outputs: configuration, dtype, weights, tokenizer and end tokens.

        It is computed once. Code that changes weights in place must call `forget_fingerprint`.
        """
        digest = hashlib.sha256(f"{self.config.model_type} {self.lm.dtype}".encode())
        # Some quantised layers keep a tuple of tensors and numbers under one name.
        state = ((name, x) for name, entry in sorted(self.lm.state_dict().items()) for x in tree_leaves(entry))
        for name, x in state:
            if not torch.is_tensor(x):
                digest.update(f"{name} {x!r}".encode())
                continue
            flat = (x.dequantize() if x.is_quantized else x).detach().reshape(-1)
            digest.update(f"{name} {tuple(x.shape)}".encode())
            if flat.numel() and not flat.is_meta:
                digest.update(flat.to("cpu").contiguous().view(torch.uint8).numpy().tobytes())
        config = {k: v for k, v in self.lm.config.to_dict().items() if k not in _NOT_THE_FUNCTION}
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        digest.update(repr(sorted(self.tokenizer.get_vocab().items())).encode())
        backend = getattr(self.tokenizer, "backend_tokenizer", None)  # slow tokenizers have no backend
        digest.update((backend.to_str() if backend is not None else "").encode())
        template = getattr(self.tokenizer, "chat_template", None)
        digest.update(repr((self.tokenizer.special_tokens_map, template)).encode())
        digest.update(repr(sorted(self.end_tokens)).encode())
        if self.architecture is not None:
            digest.update(repr(self.architecture).encode())
        return digest.hexdigest()[:16]

    def forget_fingerprint(self) -> None:
        """Discard the fingerprint after a change of weights, so that it is computed again when needed."""
        vars(self).pop("fingerprint", None)

    @property
    def end_tokens(self) -> frozenset[int]:
        """Ids of the tokens that end an answer: those of the generation config and the tokenizer's EOS."""
        own = self.lm.generation_config
        ends = None if own is None else own.eos_token_id  # type: ignore[union-attr]
        listed = [*ends] if isinstance(ends, list | tuple) else [] if ends is None else [ends]
        if self.tokenizer.eos_token_id is not None:
            listed.append(self.tokenizer.eos_token_id)
        return frozenset(int(token) for token in listed)


def _seen_paths(lm: nn.Module) -> str:
    """The model's first list of layers and the linear projections in one of them, for the error about its paths."""
    for path, module in lm.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            inner = [
                n for n, x in module[0].named_modules() if isinstance(x, nn.Linear) or type(x).__name__ == "Conv1D"
            ]
            return f" (it has the list {path}, whose modules have {', '.join(inner) or 'no Linear layer'})"
    return ""


def as_model(model: Model | PreTrainedModel) -> Model:
    """Wrap a transformers model without a tokenizer; this is enough to apply edits. A `Model` is returned as it is."""
    if isinstance(model, Model):
        return model
    check_lm(model)
    return Model(model, None, model.name_or_path)  # type: ignore[arg-type]


def check_lm(lm: PreTrainedModel) -> PreTrainedModel:
    """The model itself. Raises `ModelError` if it is not a transformers model, for example a `PeftModel`."""
    if not isinstance(lm, PreTrainedModel):
        raise ModelError(
            got=f"a {type(lm).__name__}",
            expected="a Model or a transformers model",
            remedy="pass one of the two; for a PEFT model, pass copy.deepcopy(model).merge_and_unload(), or save its "
            "adapter and give that folder to load_model",
        )
    return lm
