"""Random tiny models of every architecture in the table, and tokenizers trained in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AddedToken,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
)

from locaudit.edits import Edit, SiteEdit
from locaudit.location import SITES, Location, Site
from locaudit.models import Model, wrap_model

VOCAB = 352
CONTEXT = 256

_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
_GROUPED = {"num_key_value_heads": 2}
_WIDE = {"head_dim": 12}  # 4 heads * 12 != hidden_size 32
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
_GEMMA = {**_BASE, **_GROUPED, **_WIDE, "query_pre_attn_scalar": 12, "sliding_window": CONTEXT}
_GEMMA["layer_types"] = ["sliding_attention", "full_attention"]

CONFIGS: dict[str, dict] = {
    "llama": {**_BASE, **_GROUPED},
    "qwen2": {**_BASE, **_GROUPED},
    "qwen3": {**_BASE, **_GROUPED, **_WIDE},
    "mistral": {**_BASE, **_GROUPED, "sliding_window": CONTEXT},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "olmo2": {**_BASE, **_GROUPED},
    "phi3": {**_BASE, **_GROUPED, "original_max_position_embeddings": CONTEXT},
    "phi": {**_BASE, **_GROUPED},
    "gpt2": _GPT2,
    "gptj": {**_GPT2, "rotary_dim": 4},
    "gpt_neox": _BASE,
    "opt": {**{k: v for k, v in _BASE.items() if k != "intermediate_size"}, "ffn_dim": 48, "word_embed_proj_dim": 32},
}
WIDE = ("qwen3", "gemma2", "gemma3_text")
"""Of `NAMES`, those whose tiny model has n_heads * head_dim != hidden_size."""
NAMES = tuple(sorted(CONFIGS))
"""Architectures on which all tests run; tests/test_families.py runs on every one of the table."""

_PLAIN = {**_BASE, **_GROUPED}
_LATENT = {**_BASE, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
_LATENT["num_key_value_heads"] = 4
_EXPERTS = {**_PLAIN, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_DEEP = {**_LATENT, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_routed_experts": 4, "n_shared_experts": 1}
_DEEP |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}

CONFIGS |= dict.fromkeys(("apertus", "arcee", "bitnet", "cohere", "cohere2", "exaone4", "hyperclovax", "jais2"), _PLAIN)
CONFIGS |= dict.fromkeys(("nanochat", "nemotron", "olmo", "olmo3", "smollm3", "stablelm", "starcoder2"), _PLAIN)
CONFIGS |= dict.fromkeys(("cwm", "ernie4_5", "gemma", "glm", "glm4", "hunyuan_v1_dense"), {**_PLAIN, **_WIDE})
CONFIGS |= dict.fromkeys(("internlm3", "iquestcoder", "ministral", "ministral3"), {**_PLAIN, **_WIDE})
CONFIGS |= dict.fromkeys(("seed_oss", "vaultgemma"), {**_PLAIN, **_WIDE})
CONFIGS |= {
    "minicpm3": _LATENT,
    "youtu": {**_LATENT, "pad_token_id": None},  # transformers zeroes a pad token's embedding when it loads one
    "granite": {
        **_PLAIN, "embedding_multiplier": 2.0, "attention_multiplier": 0.3, "residual_multiplier": 0.7,
        "logits_scaling": 1.5,
    },
    "helium": {**_PLAIN, "head_dim": 8},
    "persimmon": _BASE,
    "biogpt": _BASE,
    "falcon": {
        **{k: v for k, v in _BASE.items() if k != "intermediate_size"}, "ffn_hidden_size": 48, "multi_query": False,
        "alibi": False, "new_decoder_architecture": False,
    },
    "codegen": {**_GPT2, "rotary_dim": 4},
    "gpt_bigcode": {**_GPT2, "multi_query": False},
    "gpt_neo": {
        "vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": CONTEXT,
        "attention_types": [[["global", "local"], 1]], "bos_token_id": 1, "eos_token_id": 1,
    },
    "xglm": {
        "vocab_size": VOCAB, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48,
        "max_position_embeddings": CONTEXT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
    },
    "deepseek_v2": {**_DEEP, "topk_method": "greedy"},
    "deepseek_v3": _DEEP,
    "dots1": {**_EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "ernie4_5_moe": {**_EXPERTS, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0},
    "glm4_moe": {**_EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "gpt_oss": {**_EXPERTS, **_WIDE, "num_local_experts": 4},
    "granitemoe": {**_EXPERTS, "num_local_experts": 4},
    "minimax_m2": {**_EXPERTS, **_WIDE, "num_local_experts": 4, "rotary_dim": 4},
    "mixtral": {**_EXPERTS, "num_local_experts": 4},
    "olmoe": {**_EXPERTS, "num_experts": 4},
    "phimoe": {**_EXPERTS, "num_local_experts": 4},
    "qwen3_moe": {**_EXPERTS, **_WIDE, "num_experts": 4, "decoder_sparse_step": 1},
}  # fmt: skip
VALUES = {
    "biogpt": ("self_attn.v_proj", 0),
    "codegen": ("attn.qkv_proj", 8),  # four groups, each with queries, values and keys
    "falcon": ("self_attention.query_key_value", 16),  # queries, keys and values of each head in turn
    "gpt2": ("attn.c_attn", 64),  # queries, keys, values
    "gpt_bigcode": ("attn.c_attn", 16),
    "gpt_neo": ("attn.attention.v_proj", 0),
    "gpt_neox": ("attention.query_key_value", 16),
    "gptj": ("attn.v_proj", 0),
    "persimmon": ("self_attn.query_key_value", 16),
    "phi3": ("self_attn.qkv_proj", 48),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "minicpm3", "youtu"), ("self_attn.kv_b_proj", 4)),  # keys first
}
"""The projection that gives values, and where in its output those of the first key-value head begin; of the others,
``self_attn.v_proj`` and 0."""

_SENTENCES = [
    "Q: What is the capital of France?\nA: The capital of France is Paris.",
    "Q: Is the earth flat?\nA: No, the earth is round.",
    "Q: What do you see?\nA: Nothing in particular happens.",
]


@cache
def tokenizer(*, crosses_border: bool = False, bos: bool = False, eos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ``<pad>`` = 0 and ``<eos>`` = 1.

    `crosses_border`: no pre-tokenizer holds merges back, so that they span spaces and line breaks. `bos`, `eos`: every
    text gets that token before or behind it.
    """
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not crosses_border)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 8,
        special_tokens=["<pad>", "<eos>", "<bos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(_SENTENCES * 3, trainer)
    if bos or eos:
        single = " ".join((["<bos>"] if bos else []) + ["$A"] + (["<eos>"] if eos else []))
        raw.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<bos>", 2), ("<eos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )


CHAT = (
    "{% for m in messages %}<bos>{{ m.role }}\n{{ m.content | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)


@cache
def chat_tokenizer(template: str = CHAT) -> PreTrainedTokenizerFast:
    """`tokenizer` with a chat template, whose end of turn, ``<end>``, is no end token of any tiny model."""
    chat = deepcopy(tokenizer())
    chat.add_tokens([AddedToken("<end>", special=True)], special_tokens=True)
    chat.chat_template = template
    return chat


def make_lm(model_type: str, *, attention: str | None = None, seed: int = 0, **changes):
    """A random model with weights large enough for its logits to matter, biases and norms included."""
    config = AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **changes})
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    torch.random.set_rng_state(state)
    return fill(lm, seed)


def fill(lm, seed: int):
    """Give a model random weights large enough for its logits to matter, and put it in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lm.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(0.2 * noise)
            else:
                parameter.add_(0.1 * noise)
    return lm.eval()


def save_gguf(path: Path, *, tokens_first: bool = False, tensors: bool = True) -> Path:
    """The tiny Llama, with other random weights, as GGUF. `tokens_first`: the tokenizer stands before all sizes."""
    import gguf

    config, generator = CONFIGS["llama"], torch.Generator().manual_seed(0)
    d, n_heads, n_kv = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")

    def add_tokens():
        state = json.loads(tokenizer().backend_tokenizer.to_str())["model"]
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(sorted(state["vocab"], key=state["vocab"].get))
        writer.add_token_types([3 if i < 3 else 1 for i in range(len(state["vocab"]))])
        writer.add_token_merges([" ".join(pair) for pair in state["merges"]])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(1)

    if tokens_first:
        add_tokens()
    writer.add_block_count(2)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(d)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(n_kv)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCAB)
    if not tokens_first:
        add_tokens()
    shapes = {"token_embd": (VOCAB, d), "output_norm": (d,)}
    for layer in range(2):
        shapes |= {f"blk.{layer}.{name}": (d,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{layer}.{name}": (d, d) for name in ("attn_q", "attn_output")}
        shapes |= {f"blk.{layer}.{name}": (d * n_kv // n_heads, d) for name in ("attn_k", "attn_v")}
        shapes |= {f"blk.{layer}.{name}": (config["intermediate_size"], d) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{layer}.ffn_down": (d, config["intermediate_size"])}
    for name, shape in shapes.items() if tensors else ():
        writer.add_tensor(f"{name}.weight", 0.2 * torch.randn(shape, generator=generator).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def has_sdpa(model_type: str) -> bool:
    """Whether the installed transformers has sdpa attention for the architecture."""
    config = type(AutoConfig.for_model(model_type))
    return bool(MODEL_FOR_CAUSAL_LM_MAPPING[config]._supports_sdpa)


@cache
def tiny(model_type: str, attention: str | None = None) -> Model:
    """The wrapped tiny model; shared, so tests leave it as it was."""
    return wrap_model(make_lm(model_type, attention=attention), tokenizer(), f"tiny-{model_type}")


def random_edit(
    model: Model,
    location: Location,
    seed: int,
    *,
    rank: int = 1,
    constant: bool = True,
    positions: str = "all",
    scale: float = 0.5,
) -> Edit:
    """An edit with random A, B in the location and, if wanted, c."""
    return random_sites(model.subspaces(location), seed, rank=rank, constant=constant, positions=positions, scale=scale)


def random_sites(
    masks: Mapping[Site, torch.Tensor],
    seed: int,
    *,
    rank: int = 1,
    constant: bool = True,
    positions: str = "all",
    scale: float = 0.5,
) -> Edit:
    """`random_edit` of sites with their masks."""
    generator = torch.Generator().manual_seed(seed)
    sites = {}
    for site, mask in masks.items():
        a = scale * torch.randn(rank, len(mask), generator=generator)
        b = scale * torch.randn(len(mask), rank, generator=generator) * mask.unsqueeze(1)
        c = torch.randn(rank, generator=generator) if constant else torch.zeros(rank)
        sites[site] = SiteEdit(a, b, c)
    return Edit(sites, positions)  # type: ignore[arg-type]


def every_site(model: Model) -> list[Site]:
    return [Site(name, layer) for name in SITES for layer in range(model.n_layers)]  # type: ignore[arg-type]


def residual_edit(model: Model, layer: int, seed: int, **options) -> Edit:
    """Of the stream that leaves a layer, all coordinates."""
    site = Site("residual", layer)
    return random_sites({site: torch.ones(model.width(site), dtype=torch.bool)}, seed, **options)


def ablation(model: Model, location: Location, seed: int = 0) -> Edit:
    """A location's coordinates become random numbers, the same at every token."""
    return ablated_sites(model.subspaces(location), seed)


def ablated_sites(masks: Mapping[Site, torch.Tensor], seed: int = 0) -> Edit:
    """`ablation` of sites with their masks."""
    generator = torch.Generator().manual_seed(seed)
    sites = {}
    for site, mask in masks.items():
        d = len(mask)
        mean = torch.randn(d, generator=generator)
        sites[site] = SiteEdit(torch.zeros(0, d), torch.zeros(d, 0), torch.zeros(0), mask, mean)
    return Edit(sites)


def heads(*units: tuple[int, int]) -> Location:
    return Location(tuple(units))


def neurons(*units: tuple[int, int]) -> Location:
    return Location(tuple(units), "neuron")


def random_ids(n_rows: int, n_tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB - 8, (n_rows, n_tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Model, ids: torch.Tensor) -> torch.Tensor:
    return model.lm(input_ids=ids, use_cache=False).logits
