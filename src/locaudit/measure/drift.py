"""Drift: how far an edit changes the model's predictions on ordinary text.

    KL = mean over positions of sum_v p_0(v) log(p_0(v) / p_edit(v)),  full vocabulary, float32, nats per token
    CE = mean over next tokens of -log p_edit(token), nats per token

p_0 is the unedited model. The documents are the same for every edit. Source: Li et al. 2023 (ITI), section 4 and its
code. One thing is different here: start tokens come before each document, so that its first token is predicted, too.

Start tokens are the tokens that the tokenizer puts before every text, usually BOS. Some tokenizers put none there
(GPT-2, Qwen). Then a document that the model wrote starts with BOS (EOS if there is no BOS), because it was sampled
after that token. A document cut from a file then has no start token.

Running text has no prompt. If edits act on prompts only, the documents are held-out prompts with their first answers,
and the means are over their tokens (`prompt_documents`).
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
from locaudit.edits import EditBank, roles_at
from locaudit.errors import DataError
from locaudit.location import ROLES
from locaudit.measure.generation import plain_generation
from locaudit.measure.tree import Forest, added_tokens
from locaudit.models import Model

BATCH_TOKENS = 512
"""About how many tokens of documents are in one forward."""
KEEP_BYTES = 2**30
"""The unedited model's log-probabilities are kept in memory for the next edit if they need at most this many bytes."""


class DriftText:
    """Fixed documents, and a cache of the unedited model's log-probabilities on them.

    `roles` has the role of each token (`locaudit.location.ROLES`), with 0 at padding. None: running text, on all of
    which edits with positions ``all`` or ``answer`` act.
    """

    def __init__(
        self, documents: Int[Tensor, "documents tokens"], roles: Int[Tensor, "documents tokens"] | None = None
    ):
        self.documents = documents
        self.roles = torch.full_like(documents, ROLES["answer"]) if roles is None else roles
        self._base: dict[int, Tensor] = {}

    def base_log_probs(self, model: Model, start: int, end: int) -> Float[Tensor, "rows tokens vocabulary"]:
        """Log-probabilities log p_0 of the unedited model on documents ``start:end``."""
        if start in self._base:
            return self._base[start]
        base = self.log_probs(model, start, end)
        vocabulary = base.shape[-1]
        if 4 * self.documents.numel() * vocabulary <= KEEP_BYTES:
            self._base[start] = base
        return base

    def log_probs(
        self, model: Model, start: int, end: int, edit: EditBank | None = None
    ) -> Float[Tensor, "rows tokens vocabulary"]:
        """Log-probabilities of every next token of documents ``start:end``, under one edit or none."""
        ids, roles = (x[start:end].to(model.device) for x in (self.documents, self.roles))
        with edit.applied(model, ids.new_zeros(len(ids)), roles) if edit else nullcontext():
            return model.lm(input_ids=ids, use_cache=False).logits.float().log_softmax(dim=-1)


def prompt_documents(forest: Forest, pad_id: int) -> dict[str, Int[Tensor, "documents tokens"]]:
    """Each prompt with its first answer as a document, padded at its end, and the tokens' roles: a `DriftText`."""
    texts = [tree.prompt + tree.branches[0] for tree in forest.trees]
    longest = max(map(len, texts))
    documents = torch.tensor([[*text, *[pad_id] * (longest - len(text))] for text in texts])
    last, subject = (
        torch.tensor(x).view(-1, 1)
        for x in (
            [len(tree.prompt) - 1 for tree in forest.trees],
            [-1 if tree.subject is None else tree.subject for tree in forest.trees],
        )
    )
    columns, lengths = torch.arange(longest), torch.tensor([len(text) for text in texts]).view(-1, 1)
    return {"documents": documents, "roles": roles_at(columns, last, subject) * (columns < lengths)}


def measure_drift(model: Model, text: DriftText, bank: EditBank | None, share: float = 1.0) -> list[dict[str, float]]:
    """Measure ``kl`` and ``ce``, in nats per token, for each edit of the bank.

    Without a bank, there is one result, for the unedited model. Its ``kl`` is 0. With a `share` below 1, only about
    that share of the documents is read.
    """
    n_documents, n_tokens = text.documents.shape
    edits = [bank.part(k, k + 1) for k in range(bank.n_edits)] if bank else [None]
    kl = torch.zeros(len(edits), dtype=torch.float64)
    ce = torch.zeros(len(edits), dtype=torch.float64)
    n_read = n_predicted = 0
    block = max(1, round(BATCH_TOKENS / n_tokens))
    n_documents = min(n_documents, block * math.ceil(share * n_documents / block))  # whole batches, as they are cached
    with torch.no_grad():
        for start in range(0, n_documents, block):
            end = min(start + block, n_documents)
            following = text.documents[start:end, 1:].unsqueeze(-1)  # (rows, tokens - 1, 1): the next tokens
            real = text.roles[start:end] != 0  # (rows, tokens): no padding
            n_read, n_predicted = n_read + int(real.sum()), n_predicted + int(real[:, 1:].sum())
            base = text.base_log_probs(model, start, end)  # (rows, tokens, vocabulary)
            real = real.to(base.device)
            for k, edit in enumerate(edits):
                after = base if edit is None else text.log_probs(model, start, end, edit)
                if edit is not None:
                    kl[k] += (base.exp() * (base - after)).sum(dim=-1)[real].double().sum().item()
                ce[k] -= after[:, :-1].gather(-1, following.to(after.device))[real[:, 1:]].double().sum().item()
    return [{"kl": float(kl[k] / n_read), "ce": float(ce[k] / n_predicted)} for k in range(len(edits))]


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
