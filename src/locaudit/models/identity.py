"""Check by running a model on a few tokens that it does what every audit assumes.

Answers are scored in trees (`locaudit.measure.tree`). Therefore the model's prediction after a token may depend only on
the tokens of that token's own path, which the attention mask and the position ids define. Two rows of five tokens must
give the same log-probabilities as one row with both as branches of a tree:

    rows    a b c d e        tree        a b c d e f g h      columns 2-4 and 5-7 are two branches behind "a b"
            a b f g h        position    0 1 2 3 4 2 3 4

Models whose positions are distances between columns (ALiBi) and models with recurrent layers give other numbers in a
tree. None of their places can be audited. If only one site has a fault, such as layers whose heads differ in width, the
other sites can still be used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from locaudit.checkpoints import shape_in
from locaudit.errors import LocauditError, ModelError
from locaudit.location import SITES, Site
from locaudit.models.model import CACHE, Model, setting

_ROWS = ((0, 1, 2, 3, 4), (0, 1, 5, 6, 7))
"""For each row, the columns of the tree that have its tokens."""
_POSITIONS = (0, 1, 2, 3, 4, 2, 3, 4)
_N_PREFIX, _N_COLUMNS = 2, 8


def tolerance(model: Model) -> float:
    """Mean difference of log-probabilities (nats) up to which two ways to compute them count as equal.

    - float32: 1e-4. Rounding gives differences of 5e-6.
    - bfloat16 and float16: 32 machine epsilons, which are 0.25 and 0.03. SmolLM2-135M's two implementations of
      attention differ by 0.09 and 0.009.
    - quantised layers: 0.25. Rounding can move an activation to another quantisation step. This gave a difference of
      0.06 in a tiny model.
    """
    lm = model.lm
    quantised = (
        getattr(lm.config, "quantization_config", None) is not None
        or any(not p.is_floating_point() or p.element_size() < 2 for p in lm.parameters())
        or any(type(module).__module__.startswith("torch.ao.") for module in lm.modules())
    )
    return 0.25 if quantised else max(1e-4, 32 * torch.finfo(lm.dtype).eps)


def find_faults(model: Model) -> dict[str, str]:
    """The sites (``heads``, ``neurons``, ``residual``) that cannot be read and edited in this model: site -> reason.

    Sites in `model.lacks` are left out. The model runs five times on a few tokens. Raises `ModelError` if it computes
    other log-probabilities in a tree than in separate rows, or if a registered path leads to no projection.
    """
    if _has(model.config.to_dict(), "alibi"):  # found by name, because 16-bit rounding can hide it on a few tokens
        raise _refused(model, "has ALiBi positions: they are distances between columns")
    # Tokens from all over the vocabulary, because its first tokens are often special tokens that are seldom trained.
    n = model.lm.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
    ids = [i for i in dict.fromkeys((2 * k + 1) * n // 20 for k in range(10)) if i != model.pad_id] * 4
    columns = torch.tensor(ids[:_N_COLUMNS], device=model.device)
    rows = columns[torch.tensor(_ROWS, device=model.device)]  # (2, 5)
    names = [name for name in SITES if name not in model.lacks]
    batch = torch.cat([rows, rows[:1].expand(len(names), -1)])  # two rows, then one for each site
    plain = _run(model, "separate rows", input_ids=batch, use_cache=False)
    if plain.isnan().any():
        raise ModelError(
            got=f"{model.name}, whose log-probabilities are NaN",
            expected="finite numbers from the unedited model",
            remedy="check the weights, or load it in float32 (loading.dtype)",
        )
    _check_tree(model, columns, plain)
    # Widths come first, because this raises an error for a registered path that leads to no projection.
    widths = {name: [model.width(Site(name, i)) for i in range(model.n_layers)] for name in names}  # type: ignore[arg-type]
    seen: dict[Site, list[tuple[int, ...]]] = {Site(name, i): [] for name in names for i in range(model.n_layers)}

    def edit(site: Site, h: Tensor, *, large: bool = True) -> Tensor:
        seen[site].append(tuple(h.shape))
        change = torch.zeros_like(h)  # B = 0
        by_row = change.view(-1, *batch.shape, h.shape[-1])  # also for an h that is flattened or wider
        if large:  # not a constant, because some norms would remove it
            by_row[:, 2 + names.index(site.name)] = (1 + h.abs().max()) * torch.linspace(-1, 1, h.shape[-1]).to(h)
        return h + change

    edited = _run(model, "edited rows", (names, edit), input_ids=batch, use_cache=False)
    found = {name: _misfit(model, name, widths[name], seen, batch.shape) for name in names}
    if not edited[:2].equal(plain[:2]):
        # In a mixture of experts, a row's result can depend on the other rows, so whole batches are compared. And some
        # GPU kernels never give the same bits twice, so this is no fault if the unedited model does not repeat either.
        zero = _run(model, "edited rows", (names, partial(edit, large=False)), input_ids=batch, use_cache=False)
        if not zero.equal(plain) and plain.equal(_run(model, "separate rows", input_ids=batch, use_cache=False)):
            found = dict.fromkeys(names, "an edit with B = 0 changes the logits")
    for k, name in enumerate(names):
        moved = (edited[2 + k] - plain[2 + k]).abs().max()
        if not found[name] and moved <= tolerance(model):
            found[name] = f"a large edit of the {name} of all layers does not change the logits"
    if "heads" in names and not found["heads"] and not _reads_context(model, columns):
        found["heads"] = "what the path of the heads reads at a token does not depend on earlier tokens"
    declared = shape_in(model.config.to_dict(), model.paths)
    if "neurons" in names and not found["neurons"]:
        if model.paths.neurons == model.paths.heads:
            found["neurons"] = "the paths of heads and neurons are the same"
        elif declared is not None and declared.n_neurons != widths["neurons"][0]:
            found["neurons"] = f"the path reads {widths['neurons'][0]} numbers, not {declared.n_neurons} neurons"
    return {name: reason for name, reason in found.items() if reason}


def _reads_context(model: Model, columns: Int[Tensor, " columns"]) -> bool:
    """Whether the heads' vectors in layer 0 depend on earlier tokens. Queries, keys and values there do not."""
    rows = torch.stack([columns[[0, 2]], columns[[1, 2]]])  # the same token after two different ones
    seen: list[Tensor] = []

    def note(site: Site, h: Tensor) -> Tensor:
        if site.layer == 0:
            seen.append(h.reshape(2, 2, -1)[:, -1])
        return h

    _run(model, "separate rows", (["heads"], note), input_ids=rows, use_cache=False)
    return not torch.equal(seen[0][0], seen[0][1])


def _has(values: Mapping[str, Any], key: str) -> bool:
    """Whether a config, or a config inside it, has this key with a true value."""
    return bool(values.get(key)) or any(_has(inner, key) for inner in values.values() if isinstance(inner, Mapping))


def _run(
    model: Model, what: str, visit: tuple[Sequence[str], Callable[[Site, Tensor], Tensor]] | None = None, **inputs: Any
) -> Float[Tensor, "rows tokens vocabulary"]:
    """The model's log-probabilities; ``visit = (site names, change)`` replaces each h by ``change(site, h)``.

    If the model's own code fails, raises `ModelError`, which says what was run.
    """
    names, change = visit or ((), lambda _site, h: h)
    handles = []
    try:
        for site in (Site(name, layer) for name in names for layer in range(model.n_layers)):  # type: ignore[arg-type]
            handles.append(model.hook(site, partial(change, site)))
        with torch.no_grad():
            return model.lm(**inputs).logits.float().log_softmax(dim=-1)
    except LocauditError:
        raise
    except Exception as error:  # whatever a checkpoint's own code raises
        stopped = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise _refused(model, f"cannot run {what} ({stopped})") from error
    finally:
        for handle in handles:
            handle.remove()


def _refused(model: Model, what: str) -> ModelError:
    return ModelError(
        got=f"{model.name} ({model.config.model_type}), which {what}",
        expected="a model that runs answer trees: what it says after a token depends only on the tokens, position ids "
        "and attention mask of that token's path",
        remedy="choose a model with rotary or learned positions and attention in every layer; ALiBi positions (BLOOM, "
        "MPT, some Falcon), recurrent layers (Mamba, Jamba, LFM2, Qwen3-Next, Falcon-H1, Granite-4-H, Nemotron-H) and "
        "attention with its own index (DeepSeek-V3.2) cannot be audited",
    )


def _check_tree(model: Model, columns: Int[Tensor, " columns"], plain: Float[Tensor, "rows 5 vocabulary"]) -> None:
    """Raise `ModelError` unless the tree, with and without a cached prefix, gives the first two rows of `plain`."""
    expected = torch.cat([plain[0], plain[1, _N_PREFIX:]])  # (columns, vocabulary)
    visible = torch.ones(_N_COLUMNS, _N_COLUMNS, dtype=torch.bool, device=columns.device).tril()
    visible[5:, 2:5] = False
    mask = torch.zeros(visible.shape, dtype=model.lm.dtype, device=columns.device)
    mask = mask.masked_fill_(~visible, torch.finfo(mask.dtype).min)[None, None]
    tokens: dict[str, Any] = {
        "input_ids": columns[None],
        "position_ids": torch.tensor([_POSITIONS], device=columns.device),
    }
    tree = _run(model, "an answer tree", **tokens, attention_mask=mask, use_cache=False)
    _compare(model, tree[0], expected, "in an answer tree")
    cache, copied = DynamicCache(), DynamicCache()
    prefix: dict[str, Any] = {name: x[:, :_N_PREFIX] for name, x in tokens.items()}
    prefix |= {"use_cache": True, CACHE: cache}
    _run(model, "a prefix with a cache", **prefix)
    for number, layer in enumerate(cache.layers):  # as `locaudit.measure.forward.cache_of` does
        copied.update(layer.keys, layer.values, number)  # type: ignore[arg-type]
    rest: dict[str, Any] = {name: x[:, _N_PREFIX:] for name, x in tokens.items()}
    rest |= {"attention_mask": mask[:, :, _N_PREFIX:], "use_cache": True, CACHE: copied}
    behind = _run(model, "an answer tree behind a cached prefix", **rest)
    _compare(model, behind[0], expected[_N_PREFIX:], "behind a cached prefix")


def _compare(model: Model, found: Tensor, expected: Tensor, where: str) -> None:
    difference = (found - expected).abs().masked_fill(found == expected, 0.0).mean()  # both may be minus infinity
    if not difference <= tolerance(model):  # written like this, it also refuses NaN
        raise _refused(
            model,
            f"gives different log-probabilities {where} and in separate rows (mean difference {difference:.2g} nats)",
        )


def _misfit(
    model: Model, name: str, widths: Sequence[int], seen: Mapping[Site, list[tuple[int, ...]]], shape: Sequence[int]
) -> str:
    """Why a site's vectors are not what edits expect (a wrong width or number of calls); empty if they are."""
    if len(set(widths)) > 1:
        return f"layers differ in the width of their {name} ({', '.join(map(str, sorted(set(widths))))})"
    (n_rows, n_tokens), width = shape, widths[0]
    if name == "heads":
        if setting(model.config, "num_attention_heads") is None:
            return "the config gives no number of heads that all layers have"
        if width % model.n_heads:
            raise ModelError(
                got=f"an output projection of width {width} in layer 0 with {model.n_heads} heads",
                expected="a width that is a multiple of the number of heads",
                remedy="register the architecture with the path of its attention output projection",
            )
        # Multi-head latent attention gives its heads' outputs a width of their own.
        head_dim = setting(model.config, "v_head_dim") or setting(model.config, "head_dim")
        if head_dim and width != model.n_heads * head_dim:
            return f"the output projection reads {width} numbers, not {model.n_heads} heads of {head_dim}"
    for layer in range(model.n_layers):
        calls = seen[Site(name, layer)]  # type: ignore[index]
        if len(calls) != 1:
            return f"the forward runs the {name}' module of layer {layer} {len(calls)} times, not once"
        if calls[0] not in ((n_rows, n_tokens, width), (n_rows * n_tokens, width)):
            return f"the {name} of layer {layer} have the shape {calls[0]}, not one vector of {width} per token"
    return ""
