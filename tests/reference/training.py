"""Slow twin of `locaudit.methods`: one edit, one row for each member of each pair, AdamW written out.

No tree, no bank, no padding, no cached prefix; the reference model's log-probability is computed each time.
"""

from __future__ import annotations

import math
import random
from contextlib import ExitStack

import torch
from torch import Tensor

from locaudit.edits import Edit, SiteEdit
from locaudit.methods.training import TrainingData
from locaudit.models import Model
from reference.edits import acts
from reference.scoring import subject_of
from toy import Job, untrained

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8


def fit_edit(
    model: Model,
    data: TrainingData,
    job: Job,
    *,
    objective: str = "ipo",
    reduction: str = "sum",
    reader: str = "layer",
    batching: str = "question",
    batch_size: int,
    epochs: int = 2,
    max_grad_norm: float = 1.0,
    max_steps: int | None = None,
    positions: str = "all",
) -> tuple[Edit, list[float]]:
    """The trained edit and the loss of every step, from the library's own initial reader."""
    mask = {site: m.float() for site, m in model.subspaces(job.location).items()}
    start = untrained(model, job, reader).to_edit()
    theta = {("b", site): torch.zeros(model.width(site), 1) for site in mask}
    if reader != "none":
        theta |= {("a", site): start.sites[site].a.clone() for site in mask}
    m1 = {key: torch.zeros_like(p) for key, p in theta.items()}
    m2 = {key: torch.zeros_like(p) for key, p in theta.items()}

    constant = torch.tensor([float(reader == "none")])

    def edit_from(parameters: dict) -> Edit:
        sites = {}
        for site in mask:
            a = parameters.get(("a", site), torch.zeros(1, model.width(site)))
            a = a * mask[site] if reader == "location" else a
            sites[site] = SiteEdit(a, parameters["b", site] * mask[site].unsqueeze(1), constant)
        return Edit(sites, positions)  # type: ignore[arg-type]

    def log_ratio(prompt: tuple, answer: tuple, edit: Edit, subject: int | None) -> Tensor:
        with torch.no_grad():
            reference = log_prob(model, prompt, answer, None)
        ratio = log_prob(model, prompt, answer, edit, subject) - reference
        return ratio / len(answer) if reduction == "mean" else ratio

    steps = _steps(data, batching, batch_size, epochs, job.seed)
    losses = []
    for t, pairs in enumerate(steps[:max_steps]):
        leaves = {key: p.clone().requires_grad_() for key, p in theta.items()}
        edit = edit_from(leaves)
        total = torch.zeros(())
        for prompt, subject, true, false in pairs:
            h = log_ratio(prompt, true, edit, subject) - log_ratio(prompt, false, edit, subject)
            if objective == "ipo":
                total = total + (h - 1 / (2 * job.strength)) ** 2
            else:
                total = total - torch.log(torch.sigmoid(job.strength * h))
        loss = total / len(pairs)
        losses.append(loss.item())
        grad = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        norm = math.sqrt(sum(float((g**2).sum()) for g in grad.values()))
        rate = job.learning_rate * (1 + math.cos(math.pi * t / len(steps))) / 2
        for key, g in grad.items():
            g = g * min(1.0, max_grad_norm / (norm + 1e-6))
            m1[key] = BETA_1 * m1[key] + (1 - BETA_1) * g
            m2[key] = BETA_2 * m2[key] + (1 - BETA_2) * g**2
            first, second = m1[key] / (1 - BETA_1 ** (t + 1)), m2[key] / (1 - BETA_2 ** (t + 1))
            theta[key] = theta[key] - rate * first / (second.sqrt() + EPSILON)
    return edit_from(theta), losses


def _steps(data: TrainingData, batching: str, batch_size: int, epochs: int, seed: int) -> list[list[tuple]]:
    """(prompt, place of its subject, true answer, false answer) of each step."""
    questions = []
    for tree, n_true in zip(data.forest.trees, data.n_true, strict=True):
        prompt = data.forest.prefix + tree.prompt
        subject = subject_of(data.forest, tree)
        questions.append([(prompt, subject, t, f) for t in tree.branches[:n_true] for f in tree.branches[n_true:]])
    drawn = questions if batching == "question" else [[pair] for pairs in questions for pair in pairs]
    rng = random.Random(seed)
    steps = []
    for _ in range(epochs):
        order = list(range(len(drawn)))
        rng.shuffle(order)
        while order:
            steps.append([pair for i in order[:batch_size] for pair in drawn[i]])
            order = order[batch_size:]
    return steps


def log_prob(model: Model, prompt: tuple, answer: tuple, edit: Edit | None, subject: int | None = None) -> Tensor:
    """log p(answer | prompt), differentiable in the edit's tensors."""
    ids, positions = torch.tensor([prompt + answer]), edit.positions if edit else "all"
    on = torch.tensor([acts(positions, t, len(prompt), subject) for t in range(ids.shape[1])]).float().view(1, -1, 1)

    def hook(e: SiteEdit):
        def change(_module, args):
            o = args[0]
            return (o + on * ((e.c + o @ e.a.T) @ e.b.T), *args[1:])

        return change

    with ExitStack() as stack:
        for site, e in (edit.sites if edit else {}).items():
            stack.callback(model.projection(site).register_forward_pre_hook(hook(e)).remove)
        log_probs = model.lm(input_ids=ids, use_cache=False).logits[0].log_softmax(dim=-1)
    return torch.stack([log_probs[len(prompt) + t - 1, token] for t, token in enumerate(answer)]).sum()
