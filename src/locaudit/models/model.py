"""A loaded language model whose attention heads, neurons and residual stream can be read and edited."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPast

from locaudit.claims import Shape, find_kind
from locaudit.errors import ModelError
from locaudit.location import Location, Site
from locaudit.models.architectures import find_architecture, input_width, output_width, submodule

_NOT_THE_FUNCTION = (
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache",
)  # fmt: skip
"""Entries of a transformers config that do not change what the model computes."""
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
"""Argument that takes earlier tokens' keys and values: transformers renamed it in 5.24."""


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

    def __repr__(self) -> str:
        kind, dtype = self.config.model_type, str(self.lm.dtype).removeprefix("torch.")
        n_layers, n_heads = self.config.num_hidden_layers, self.n_heads
        return f"Model({self.name!r}: {kind}, {n_layers} layers x {n_heads} heads, {dtype} on {self.device})"

    @property
    def config(self):
        """The transformers config of the text model."""
        return self.lm.config.get_text_config()

    @cached_property
    def _layers(self) -> nn.Module:
        return submodule(self.lm, find_architecture(self.config.model_type).layers)

    @property
    def trunk(self) -> nn.Module:
        """The module whose forward pass calls the layers one after another."""
        return submodule(self.lm, find_architecture(self.config.model_type).layers.rpartition(".")[0])

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self._layers)  # type: ignore[arg-type]

    @property
    def n_heads(self) -> int:
        """Number of attention (query) heads per layer."""
        return self.config.num_attention_heads

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
            n_kv_heads=getattr(self.config, "num_key_value_heads", None) or self.n_heads,
            head_dim=self.head_dim,
            n_neurons=self.width(Site("neurons", 0)),
            width=self.width(Site("residual", 0)),
        )

    def layer(self, number: int) -> nn.Module:
        """Decoder layer `number`, counted from 0."""
        return self._layers[number]  # type: ignore[index]

    def projection(self, site: Site) -> nn.Module:
        """The linear layer that reads the site's vector.

        For heads this is the attention output projection, for neurons the MLP down projection. The residual stream has
        none; asking for it raises `KeyError`.
        """
        name, layer = site
        table = find_architecture(self.config.model_type)
        return submodule(self.layer(layer), {"heads": table.attention, "neurons": table.mlp}[name])

    def width(self, site: Site) -> int:
        """Width d of the site's vector."""
        name, layer = site
        if name == "residual":
            return output_width(self.projection(Site("heads", layer)))
        return input_width(self.projection(site))

    def site_device(self, site: Site) -> torch.device:
        """Device of the site's projection or layer. Layers can be on different devices."""
        name, layer = site
        module = self.layer(layer) if name == "residual" else self.projection(site)
        # Some quantised layers have only buffers, and some not even those.
        return next((x.device for x in (*module.parameters(), *module.buffers())), self.device)

    @property
    def head(self) -> Head | None:
        """The output head; None if the logits are computed in another way than `Head` describes."""
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
        `LocationError` if the location is outside this model.
        """
        found = find_kind(location).subspaces(location, self.shape)
        return {
            site: torch.from_numpy(x) if x.dtype == bool else torch.from_numpy(x).float() for site, x in found.items()
        }

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


def wrap_model(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "custom") -> Model:
    """Use a model that is already in memory. It is frozen and put in eval mode.

    Raises `ModelError` if the architecture is unknown, a projection is missing or has an unexpected width, weights are
    offloaded, or the tokenizer has neither a pad nor an EOS token.
    """
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
            # bitsandbytes would pack 4-bit weights for this CPU in the first forward, and state_dict(), which the
            # fingerprint and save_pretrained call, would unpack them wrongly (0.50).
            vars(module)["support_avx512bf16_for_cpu"] = False
    model = Model(lm, tokenizer, name)
    for layer in range(model.n_layers):
        width = model.width(Site("heads", layer))
        if width % model.n_heads:
            raise ModelError(
                got=f"an output projection of width {width} in layer {layer} with {model.n_heads} heads",
                expected="a width that is a multiple of the number of heads",
                remedy="register the architecture with the path of its attention output projection",
            )
        model.width(Site("neurons", layer))
    _ = model.head  # computed now, while no edit is applied
    return model


def as_model(model: Model | PreTrainedModel) -> Model:
    """Wrap a transformers model without a tokenizer, enough to apply edits to it. A `Model` is returned unchanged."""
    if isinstance(model, Model):
        return model
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            got=f"a {type(model).__name__}", expected="a Model or a transformers model", remedy="pass one of the two"
        )
    return Model(model, None, model.name_or_path)  # type: ignore[arg-type]
