"""The table of architectures: where each has its layers, its attention output projection and its MLP down projection.

An architecture's name is its ``config.model_type`` in transformers. The table is plain data, so that a model's files
can be checked against it without torch. Every entry is tested on a tiny random model; `docs/models.md` lists the
results.
"""

from __future__ import annotations

from dataclasses import dataclass

from locaudit.errors import ConfigError, ModelError
from locaudit.registry import ARCHITECTURES


@dataclass(frozen=True)
class Architecture:
    """Dotted paths from the language model to its list of layers, and from a layer to the projection of each site."""

    layers: str
    """The list of decoder layers."""
    heads: str
    """The attention output projection. Its input (n_heads * head_dim) is the concatenation of the heads' outputs."""
    neurons: str | None = None
    """The MLP down projection, whose input holds the activations of the neurons. None if a layer has more than one, as
    in a mixture of experts: such a model can be edited at its heads and residual stream."""


_TABLE = {
    ("model.layers", "self_attn.o_proj", "mlp.down_proj"): """
        apertus arcee bitnet cohere cohere2 cwm ernie4_5 exaone4 gemma gemma2 gemma3_text glm glm4 granite helium
        hunyuan_v1_dense hyperclovax internlm3 iquestcoder jais2 llama minicpm3 ministral ministral3 mistral nemotron
        olmo olmo2 olmo3 phi3 qwen2 qwen3 seed_oss smollm3 stablelm vaultgemma youtu""",
    ("model.layers", "self_attn.o_proj", None): """
        deepseek_v2 deepseek_v3 dots1 ernie4_5_moe glm4_moe gpt_oss granitemoe minimax_m2 mixtral olmoe phimoe
        qwen3_moe""",
    ("model.layers", "self_attn.o_proj", "mlp.c_proj"): "starcoder2",
    ("model.layers", "self_attn.o_proj", "mlp.fc2"): "nanochat",
    ("model.layers", "self_attn.dense", "mlp.fc2"): "phi",
    ("model.layers", "self_attn.dense", "mlp.dense_4h_to_h"): "persimmon",
    ("model.layers", "self_attn.out_proj", "fc2"): "xglm",
    ("model.decoder.layers", "self_attn.out_proj", "fc2"): "opt",
    ("biogpt.layers", "self_attn.out_proj", "fc2"): "biogpt",
    ("transformer.h", "attn.c_proj", "mlp.c_proj"): "gpt2 gpt_bigcode",
    ("transformer.h", "attn.out_proj", "mlp.fc_out"): "codegen gptj",
    ("transformer.h", "attn.attention.out_proj", "mlp.c_proj"): "gpt_neo",
    ("transformer.h", "self_attention.dense", "mlp.dense_4h_to_h"): "falcon",
    ("gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h"): "gpt_neox",
}
"""(layers, heads, neurons) -> the architectures that have these paths.

Three architectures are left out on purpose; see `UNSUITABLE`.
"""
for _paths, _names in _TABLE.items():
    for _name in _names.split():
        ARCHITECTURES.register(_name)(Architecture(*_paths))


def register_architecture(model_type: str, architecture: Architecture) -> None:
    """Add an architecture to the table. Its paths are checked when a model of that type is loaded."""
    ARCHITECTURES.register(model_type)(architecture)


UNSUITABLE = {
    "diffllama": "two heads share their coordinates",
    "doge": "a token sees the best keys of its whole row, also those of other answers",
    "mimo_v2_flash": "layers differ in their number of key-value heads",
}
"""Model types that an audit cannot handle, with the reason. The checks at loading would not notice these reasons."""


def find_architecture(model_type: str, seen: str = "") -> Architecture:
    """The entry of `model_type` in the table. Raises `ModelError` if there is none: paths are never guessed.

    `seen` is a text for the error that names the paths that the model has.
    """
    if model_type in UNSUITABLE:
        raise ModelError(
            got=f"a model of the type {model_type}, where {UNSUITABLE[model_type]}",
            expected="a model in which heads have their own coordinates and answers in one row do not see each other",
            remedy="choose another model; docs/models.md lists them",
        )
    try:
        return ARCHITECTURES[model_type]
    except ConfigError:
        raise ModelError(
            got=f"the architecture {model_type!r}{seen}",
            expected=f"one of {', '.join(sorted(ARCHITECTURES))}",
            remedy="write its paths into the YAML file, architecture: {layers: model.layers, heads: self_attn.o_proj, "
            "neurons: mlp.down_proj} (without neurons if a layer has several MLPs), or give --architecture.layers, "
            "--architecture.heads and --architecture.neurons; in Python, "
            "architecture=locaudit.Architecture(layers, heads, neurons) of load_model and wrap_model",
        ) from None
