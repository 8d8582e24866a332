"""Checks on a GPU, or at smoke size on a CPU: equal numbers by every way to compute them, memory, and a large trial.

    python -m bench.card equality --device cuda       # dtypes and implementations of attention
    python -m bench.card memory --device cuda         # banks, and what happens when memory runs out
    python -m bench.card trial --model random-7b --dtype bfloat16 --device cuda

`bench/gpu.sh` runs all of them, with the comparisons of `python -m bench`.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor

from bench.command import Positive, header, line, run
from bench.harness import peak_bytes, reset_peak
from bench.work import (
    PRIMED,
    TAU,
    Edit,
    Forest,
    Job,
    Location,
    Model,
    SiteEdit,
    Subject,
    generate,
    grow,
    heads,
    load,
    log_probs,
    questions,
    random_units,
    read_ahead,
    train,
    training_data,
    zero_edit,
)
from locaudit.config import AuditConfig, merge_config
from locaudit.errors import ModelError
from locaudit.models.identity import find_faults, tolerance
from locaudit.run.audit import run_audit
from locaudit.store.run import load_run

ATTENTION = ("sdpa", "eager", "flash_attention_2")
"""Implementations of attention in transformers. The mask of an answer tree is not one that flash attention can use."""
PAPER = {"sets": 18 * 5, "single": 25 * 5, "iti": 18 * 7}
"""Trials of the paper's study (preset full) besides the unedited model: places times strengths."""
N_TRAIN, N_HELD_OUT = 490, 327
"""Questions of TruthfulQA (817) by the default split: 60 % for training; 40 % for validation and test."""


@dataclass(frozen=True)
class Settings:
    """What to check."""

    task: tyro.conf.Positional[Literal["equality", "memory", "trial"]]
    subject: tyro.conf.OmitArgPrefixes[Subject] = field(default_factory=Subject)
    questions: Positive = 4


def main(given: Settings) -> int:
    """Run a check; the exit code is 1 if numbers that must be equal are not."""
    given.subject.check()
    return {"equality": equality, "memory": memory, "trial": trial}[given.task](given.subject, given.questions)


def equality(subject: Subject, n: int) -> int:
    """Log-probabilities by trees, by plain rows of transformers, under a zero edit and in banks."""
    print(header("dtype", "attention", "tree against rows (nats, mean and max)", "zero edit", "bank of 4 against one"))
    is_wrong, asked = False, questions(subject, n)
    for dtype in ("float32", "bfloat16"):
        model = load(replace(subject, dtype=dtype))
        for attention in ATTENTION:
            try:
                model.lm.set_attn_implementation(attention)
                if faults := find_faults(model):
                    raise ModelError(got=str(faults), expected="no faults", remedy="")
            except ModelError as error:
                print(line([dtype, attention, "refused", str(error).partition("\n")[0][:160], ""]), flush=True)
                is_wrong |= attention != "flash_attention_2"
                continue
            except (ImportError, ValueError) as error:
                print(line([dtype, attention, "not available", str(error).partition("\n")[0][:80], ""]), flush=True)
                continue
            forest = grow(model, asked)
            tree, rows = torch.cat(log_probs(model, forest)[0]), torch.cat([*by_rows(model, forest)])
            apart = (tree.cpu() - rows.cpu()).abs()
            zero = torch.cat(log_probs(model, forest, [zero_edit(model, [*model.subspaces(Location.whole())])])[0])
            edits = [random_edit(model, seed) for seed in range(4)]
            banked = [torch.cat(sums) for sums in log_probs(model, forest, edits)]
            alone = [torch.cat(log_probs(model, forest, [edit])[0]) for edit in edits]
            bank = max(float((a - b).abs().max()) for a, b in zip(banked, alone, strict=True))
            same = "same bits" if zero.equal(tree) else f"{float((zero - tree).abs().max()):.1e}"
            print(line([dtype, attention, f"{apart.mean():.1e}, {apart.max():.1e}", same, f"{bank:.1e}"]), flush=True)
            n_tokens = sum(len(branch) for one in forest.trees for branch in one.branches) / len(tree)
            is_wrong |= float(apart.mean()) > tolerance(model) * n_tokens or bank > 20 * tolerance(model) * n_tokens
    return int(is_wrong)


def by_rows(model: Model, forest: Forest) -> Iterator[Tensor]:
    """The log-probabilities of each question's answers from one plain forward pass per answer, (answers,)."""
    for tree in forest.trees:
        prompt, sums = [*forest.prefix, *tree.prompt], []
        for branch in tree.branches:
            ids = torch.tensor([[*prompt, *branch]], device=model.device)
            with torch.no_grad():
                logits = model.lm(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
            chosen = ids[0, len(prompt) :, None]
            sums.append(logits.log_softmax(-1).gather(1, chosen).sum())
        yield torch.stack(sums)


def random_edit(model: Model, seed: int) -> Edit:
    """A rank-1 edit of 16 random heads."""
    rng, sites = torch.Generator().manual_seed(seed), {}
    where = random_units(model, "head", min(16, len(heads(model))), seed)
    for site, subspace in model.subspaces(where).items():
        a = torch.randn(subspace.shape[0], generator=rng) / subspace.shape[0]
        sites[site] = SiteEdit.rank_one(a, torch.randn(subspace.shape[0], generator=rng) * subspace.cpu())
    return Edit(sites)


def memory(subject: Subject, n: int) -> int:
    """An audit with large banks, and again with half of the memory that it took above the model and its data."""
    values = {
        "model": subject.model, "behaviour": subject.data, "controls": 14, "nulls": ["anywhere"], "rest": False,
        "placebos": 0, "widen": 0, "score": "reward_margin",
        "split": {"max_train": max(n, 8), "max_val": 2, "max_test": n}, "prompt": {"primer": "truthful"},
        "methods": {"optimal": {"strengths": [TAU], "epochs": 1, "bank_size": 16}},
        "evaluation": {"max_new_tokens": 0, "bank_size": 16, "drift_documents": 2, "drift_tokens": 32},
        "loading": {"device": subject.device, "dtype": subject.dtype},
    }  # fmt: skip
    cuda, trials, said, most = subject.device.startswith("cuda"), [], "", 0
    model = load(subject)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("free", "tight") if cuda else ("free",):
            reset_peak(cuda)
            before, out, started = peak_bytes(cuda), io.StringIO(), time.monotonic()
            with redirect_stderr(out), at_most(most) if most else nullcontext():
                run_audit(merge_config(AuditConfig(), values), Path(folder) / name, model=model)
            taken, said = peak_bytes(cuda) - before, out.getvalue()
            trials.append(load_run(Path(folder) / name).trials)
            found = [text for text in said.splitlines() if text.startswith("out of memory")]
            print(
                f"{name}: {time.monotonic() - started:.0f} s, {taken / 2**20:.0f} MB above the model", *found, sep="\n"
            )
            most = taken // 2
    if not cuda:
        print("running out of memory: only on a GPU")
        return 0
    margins = zip(*([trial.metrics["test"]["reward_margin"] for trial in part] for part in trials), strict=True)
    print(f"largest difference of the reward margin: {max(abs(a - b) for a, b in margins):.1e} nats")
    return int("out of memory" not in said)


@contextmanager
def at_most(n_bytes: int) -> Iterator[None]:
    """Inside, only so many bytes more of the GPU can be taken than are in use."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + n_bytes) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def trial(subject: Subject, n: int) -> int:
    """Seconds for each question of what a trial does, and the hours of the paper's study that follow."""
    model, asked = load(subject), questions(subject, n)
    data, where = training_data(model, asked), Location.whole()
    residuals = read_ahead(model, data, where)
    (fit,) = train(model, data, [Job(where, TAU, 0)], epochs=1, residuals=residuals)
    assert fit.edit is not None, fit.message
    edit, prompts = fit.edit, grow(model, asked, PRIMED, answers=False)
    parts = {
        "training, one epoch": lambda: train(model, data, [Job(where, TAU, 0)], epochs=1, residuals=residuals),
        "scoring": lambda: log_probs(model, grow(model, asked, PRIMED), [edit]),
        "answering": lambda: generate(model, prompts, [edit], 50),
    }
    seconds = {}
    for name, work in parts.items():
        work()
        synchronize(model)
        started = time.monotonic()
        work()
        synchronize(model)
        seconds[name] = (time.monotonic() - started) / n
        print(f"{name}: {seconds[name]:.3f} s a question", flush=True)
    train_, score, answer = seconds.values()
    optimal = 2 * N_TRAIN * train_ + N_HELD_OUT * (score + answer)
    total = (PAPER["sets"] + PAPER["single"]) * optimal + PAPER["iti"] * N_HELD_OUT * (score + answer)
    n_trials = sum(PAPER.values())
    print(
        f"paper's study, {n_trials} trials of {N_TRAIN} training questions, 2 epochs, and {N_HELD_OUT} held-out ones:"
    )
    print(f"{optimal:.0f} s for an optimal trial, {total / 3600:.1f} hours in all, one edit at a time")
    return 0


def synchronize(model: Model) -> None:
    """Wait until the device has done its work."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    run(main, Settings, __doc__)
