"""Models inside other models: the text model of a multimodal one, and the base model under a PEFT adapter."""

from __future__ import annotations

import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from locaudit.errors import ModelError, import_extra


def text_model(lm: PreTrainedModel, name: str) -> PreTrainedModel:
    """The text model inside a multimodal model, as a causal language model with the same weights; else `lm` itself.

    Its module paths are those of the text model's own class, so that edits are exported for that class. Raises
    `ModelError` if transformers has no such class, or if the logits on four tokens differ from the multimodal model's.
    """
    config = lm.config.get_text_config()
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), ())  # its class, or no class at all
    if config is lm.config or isinstance(lm, found):
        return lm
    outer, head = type(lm).__name__, lm.get_output_embeddings()
    config, embeddings = deepcopy(config), lm.get_input_embeddings()
    config.tie_word_embeddings = head is not None and head.weight is embeddings.weight  # type: ignore[union-attr]
    config.name_or_path, config.dtype = "", lm.dtype
    problem = f"transformers has no causal language model for its {config.model_type}"
    try:
        with torch.device("meta"):
            text = found(config)
        trunk = next(module for module in lm.modules() if type(module) is type(text.base_model))
        setattr(text, text.base_model_prefix, trunk)
        text.set_output_embeddings(head)
        text.generation_config = deepcopy(lm.generation_config)
        ids = torch.arange(4, device=embeddings.weight.device).unsqueeze(0)  # type: ignore[arg-type]
        with torch.no_grad():
            one, other = (x.eval()(input_ids=ids, use_cache=False).logits.float() for x in (lm, text))
        if torch.allclose(one, other, rtol=1e-5, atol=1e-5 * float(one.abs().max())):
            return text
        problem = "it gives other logits on text without an image"
    except Exception as error:  # the code of any model runs here
        problem = problem if found == () else " ".join(str(error).split())[:200] or type(error).__name__
    raise ModelError(
        got=f"{name}, a {outer} whose text model cannot be taken out ({problem})",
        expected="a language model, or a multimodal one around a language model of transformers",
        remedy="use a checkpoint of the text model alone",
    )


def put_adapter(lm: PreTrainedModel, folder: Path, base: str) -> Any:
    """Put the PEFT adapter in `folder` on its base model, called `base`, and freeze both. Returns a `PeftModel`.

    Raises `ModelError` if the adapter does not fit, and `ConfigError` without the package peft.
    """
    try:
        if not (folder / "adapter_model.safetensors").is_file():  # peft would ask the hub for it
            raise FileNotFoundError("no file adapter_model.safetensors")
        with quiet_peft():
            warnings.simplefilter("ignore", UserWarning)
            # If weights of a layer are missing, peft would only warn and leave the layer as it is.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = import_extra("peft", "judge").PeftModel.from_pretrained(lm, str(folder), use_safetensors=True)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, TypeError, UserWarning) as error:
        raise ModelError(
            got=f"the adapter {folder}, which does not fit {base} ({' '.join(str(error).split())[:300]})",
            expected="an adapter in safetensors, trained on that model",
            remedy="check the folder, and base_model_name_or_path in its adapter_config.json",
        ) from error
    return adapted.eval().requires_grad_(False)


def merge_adapter(lm: PreTrainedModel, folder: Path, base: str) -> PreTrainedModel:
    """The base model with the adapter in `folder` merged into its weights.

    Weights W become W + B A, rounded to their dtype. Raises `ModelError` if the adapter is not such a change of
    weights.
    """
    adapted = put_adapter(lm, folder, base)
    try:
        with quiet_peft():
            merged = adapted.merge_and_unload()
    except (AttributeError, ValueError, RuntimeError) as error:
        raise ModelError(
            got=f"the adapter {folder}, which cannot be merged ({' '.join(str(error).split())[:300]})",
            expected="an adapter that changes weights, such as LoRA",
            remedy="audit the base model, or an adapter of another type",
        ) from error
    merged.name_or_path = merged.config.name_or_path = ""  # no folder holds these weights
    return merged


def quiet_peft() -> warnings.catch_warnings:
    """A context that hides PEFT's warnings about its own use of transformers, which users can do nothing about."""
    return warnings.catch_warnings(action="ignore", category=FutureWarning)
