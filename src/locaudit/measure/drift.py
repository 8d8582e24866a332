"""Drift: how far an edit changes the model's predictions on ordinary text.

    KL = mean over positions of sum_v p_0(v) log(p_0(v) / p_edit(v)),  full vocabulary, float32, nats per token
    CE = mean over next tokens of -log p_edit(token), nats per token

p_0 is the unedited model. The documents are the same for every edit. Source: Li et al. 2023 (ITI), section 4 and its
code. One thing is different here: start tokens come before each document, so that its first token is predicted, too.

Start tokens are the tokens that the tokenizer puts before every text, usually BOS. Some tokenizers put none there
(GPT-2, Qwen). Then a document that the model wrote starts with BOS (EOS if there is no BOS), because it was sampled
after that token. A document cut from a file then has no start token.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig

from locaudit.config.files import read_bytes
from locaudit.edits import EditBank
from locaudit.errors import DataError
from locaudit.measure.generation import plain_generation
from locaudit.measure.tree import added_tokens
from locaudit.models import Model

BATCH_TOKENS = 512
"""About how many tokens of documents are in one forward."""
KEEP_BYTES = 2**30
"""The unedited model's log-probabilities are kept in memory for the next edit if they need at most this many bytes."""


class DriftText:
    """Fixed documents, and a cache of the unedited model's log-probabilities on them."""

    def __init__(self, documents: Int[Tensor, "documents tokens"]):
        self.documents = documents
        self._base: dict[int, Tensor] = {}

    def base_log_probs(self, model: Model, start: int, end: int) -> Float[Tensor, "rows tokens vocabulary"]:
        """Log-probabilities log p_0 of the unedited model on documents ``start:end``."""
        if start in self._base:
            return self._base[start]
        base = _log_probs(model, self.documents[start:end], None)
        vocabulary = base.shape[-1]
        if 4 * self.documents.numel() * vocabulary <= KEEP_BYTES:
            self._base[start] = base
        return base


def measure_drift(model: Model, text: DriftText, bank: EditBank | None, share: float = 1.0) -> list[dict[str, float]]:
    """Measure ``kl`` and ``ce``, in nats per token, for each edit of the bank.

    Without a bank, there is one result, for the unedited model. Its ``kl`` is 0. With a `share` below 1, only about
    that share of the documents is read.
    """
    n_documents, n_tokens = text.documents.shape
    edits = [bank.part(k, k + 1) for k in range(bank.n_edits)] if bank else [None]
    kl = torch.zeros(len(edits), dtype=torch.float64)
    ce = torch.zeros(len(edits), dtype=torch.float64)
    block = max(1, round(BATCH_TOKENS / n_tokens))
    n_documents = min(n_documents, block * math.ceil(share * n_documents / block))  # whole batches, as they are cached
    with torch.no_grad():
        for start in range(0, n_documents, block):
            end = min(start + block, n_documents)
            following = text.documents[start:end, 1:].unsqueeze(-1)  # (rows, tokens - 1, 1): the next tokens
            base = text.base_log_probs(model, start, end)  # (rows, tokens, vocabulary)
            for k, edit in enumerate(edits):
                after = base if edit is None else _log_probs(model, text.documents[start:end], edit)
                if edit is not None:
                    kl[k] += (base.exp() * (base - after)).sum(dim=-1).double().sum().item()
                ce[k] -= after[:, :-1].gather(-1, following.to(after.device)).double().sum().item()
    n_read, n_predicted = n_documents * n_tokens, n_documents * (n_tokens - 1)
    return [{"kl": float(kl[k] / n_read), "ce": float(ce[k] / n_predicted)} for k in range(len(edits))]


def _log_probs(model: Model, ids: Tensor, edit: EditBank | None) -> Float[Tensor, "rows tokens vocabulary"]:
    """Log-probabilities of every next token of documents, under one edit or none."""
    ids = ids.to(model.device)
    # Running text has no prompt, so an edit with positions "answer" acts on all of it.
    everywhere, rows = torch.ones_like(ids, dtype=torch.bool), ids.new_zeros(len(ids))
    with edit.applied(model, rows, everywhere) if edit else nullcontext():
        return model.lm(input_ids=ids, use_cache=False).logits.float().log_softmax(dim=-1)


def cut_documents(model: Model, path: str | Path, n_documents: int, n_tokens: int) -> Int[Tensor, "documents tokens"]:
    """Cut documents of `n_tokens` tokens from a text file, at even distances.

    Each document comes after the tokens, if any, that the tokenizer puts before every text. Raises `DataError` if the
    file is too short.
    """
    before, _ = added_tokens(model.tokenizer)
    text = read_bytes(path, "a text file", DataError).decode()
    # Tokenise only a piece of each chunk, not the whole file; 8 characters per token are plenty.
    chunk = max(len(text) // n_documents, 1)
    rows = []
    for i in range(n_documents):
        piece = text[i * chunk : i * chunk + min(chunk, 8 * n_tokens)]
        ids = model.tokenizer(piece, add_special_tokens=False)["input_ids"][:n_tokens]
        if len(ids) < n_tokens:
            raise DataError(
                got=f"{path}, which has {len(text)} characters",
                expected=f"enough text for {n_documents} documents of {n_tokens} tokens",
                remedy="use a longer text, or lower evaluation.drift_documents or evaluation.drift_tokens",
            )
        rows.append([*before, *ids])
    return torch.tensor(rows)


def sample_documents(model: Model, n_documents: int, n_tokens: int, seed: int) -> Int[Tensor, "documents tokens"]:
    """Sample documents of `n_tokens` tokens from the unedited model at temperature 1, each after `start_tokens`.

    End tokens are not sampled. Otherwise the model's distribution is used unchanged; the checkpoint's generation
    settings are ignored. `seed` fixes the sample. torch's global random state is not changed.
    """
    start = torch.tensor([start_tokens(model)], device=model.device).expand(n_documents, -1)  # (documents, start)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), plain_generation(model):
        torch.manual_seed(seed)
        return model.lm.generate(  # type: ignore[operator]
            start,
            attention_mask=torch.ones_like(start),
            generation_config=GenerationConfig(
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=n_tokens,
                max_new_tokens=n_tokens,
                pad_token_id=model.pad_id,
                eos_token_id=sorted(model.end_tokens) or None,
            ),
        ).cpu()


def start_tokens(model: Model) -> tuple[int, ...]:
    """The tokens that the tokenizer puts before every text; if there are none, its BOS or EOS token."""
    known = (model.tokenizer.bos_token_id, model.tokenizer.eos_token_id, model.pad_id)
    return added_tokens(model.tokenizer)[0] or (next(int(token) for token in known if token is not None),)  # type: ignore[arg-type]
