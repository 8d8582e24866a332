"""What each deviation from the paper's training moves: edits of the whole model, never scored on a test question.

    python -m bench.deviations --data TruthfulQA.csv

Every row trains on the same questions, for as many epochs, in bfloat16 if the processor has it. The first is the
default; each following one changes what its name says. The last ones train plain LoRA (PEFT: B A h, where our edit has
W b A h with a trained b), by our objective and then by TRL's trainer as it comes: single pairs, end tokens, and log-
ratios divided by the answer's length. All questions are those that the preset ``decide`` trains or validates on; a
fifth of them is kept for scoring. Log-probabilities give MC2 and reward accuracy; greedy answers are judged by the
bundled judge.
"""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.command import Positive, header, line, run
from bench.trainers import pairs
from bench.training_pilot import judges_of, probabilities
from bench.work import (
    Job,
    Location,
    Model,
    Prompt,
    Question,
    TrainingData,
    default_learning_rate,
    heads,
    load_primer,
    log_probs,
    means,
    plant,
    score_questions,
    train,
)
from locaudit import Edit, load_behaviour
from locaudit.behaviours import Behaviour, split_questions
from locaudit.models import load_model
from locaudit.run.prepare import end_branches
from locaudit.run.subject import split_behaviour
from locaudit.store.cache import Cache
from locaudit.studies.paper.config import load_paper_preset

STEP = 2
"""Questions in a step, as in our training."""


@dataclass(frozen=True)
class Settings:
    """What is trained."""

    data: Path
    """TruthfulQA as a CSV."""
    train: Positive = 64
    epochs: Positive = 2
    tau: float = 0.03
    only: tuple[str, ...] = ()
    """Names of the rows to run (none: all)."""


@dataclass(frozen=True)
class _Trained:
    """What one row trains."""

    model: Model
    data: TrainingData
    asked: Sequence[Question]
    given: Settings

    @property
    def rate(self) -> float:
        """The default learning rate of the whole model, for whole questions."""
        n = len(heads(self.model))
        return default_learning_rate("question", n, n)

    @property
    def ended(self) -> TrainingData:
        """The same data with an end token after each answer."""
        forest = end_branches(self.data.forest, self.model)
        return replace(self.data, forest=forest, reference=tuple(log_probs(self.model, forest)[0]))


def main(given: Settings) -> None:
    """Print the table."""
    config = load_paper_preset("decide").audits()["sets"]
    behaviour = load_behaviour(given.data)
    known = split_behaviour(config, behaviour)
    split = split_questions(Behaviour(behaviour.name, (*known.train, *known.val)), (0.79, 0.01, 0.2))
    model = load_model(config.model, dtype="auto")
    scoring, asked = Prompt("qa", load_primer("truthful", behaviour.primer)), split.train[: given.train]
    forest = plant(model.tokenizer, Prompt("qa"), [(q.text, q.answers) for q in asked])
    data = TrainingData(forest, tuple(len(q.true) for q in asked), tuple(log_probs(model, forest)[0]))
    it, held = _Trained(model, data, asked, given), split.test
    tested = plant(model.tokenizer, scoring, [(q.text, q.answers) for q in held])
    before, judges = log_probs(model, tested)[0], judges_of(("truth", "info"))
    rows: dict[str, Callable[[], Edit | None]] = {
        "unedited": lambda: None,
        "default": lambda: _ours(it, data),
        "end tokens": lambda: _ours(it, it.ended),
        "four pairs in a step, the paper's rate": lambda: _ours(it, data, batching="pair"),
        "log-ratios divided by length": lambda: _ours(it, data, reduction="mean"),
        "plain LoRA, scale 1": lambda: _lora(it),
        "plain LoRA, scale 8": lambda: _lora(it, scale=8.0),
        "plain LoRA, scale 1, dropout .05": lambda: _lora(it, dropout=0.05),
        "plain LoRA by TRL, scale 1": lambda: _trl(it),
    }
    names = ("MC2", "reward accuracy", "reward margin", "truth", "info", "product")
    print(header("whole model", *names))
    for name, fit in rows.items():
        if given.only and name not in given.only:
            continue
        edit = fit()
        sums = log_probs(model, tested, None if edit is None else [edit])[0]
        found = means(score_questions(held, sums, before, str(model.lm.dtype).removeprefix("torch.")))
        judged = probabilities(model, edit, held, scoring, judges, 0, Cache(None))  # a cache knows no LoRA
        numbers = (found["mc2"], found["reward_accuracy"], found["reward_margin"], *judged)
        print(line([name, *(f"{x:.3f}" for x in numbers)]), flush=True)
        _remove_adapters(model)


def _ours(it: _Trained, data: TrainingData, **settings: Any) -> Edit:
    job = Job(Location.whole("head"), it.given.tau, seed=0)
    (fit,) = train(it.model, data, [job], epochs=it.given.epochs, **settings)
    if fit.edit is None:
        raise SystemExit(f"training diverged: {fit.message}")
    return fit.edit


def _lora(it: _Trained, scale: float = 1.0, dropout: float = 0.0) -> None:
    """Train LoRA in the model's layers by our objective and schedule. The adapters stay until they are removed."""
    _add_adapters(it.model, scale, dropout)
    parameters = [x for name, x in it.model.lm.named_parameters() if "lora_" in name]
    optimizer = torch.optim.AdamW(parameters, lr=it.rate, weight_decay=0.0)
    rng, trees, lm = random.Random(0), it.data.forest.trees, it.model.lm
    n_steps, step = it.given.epochs * math.ceil(len(trees) / STEP), 0
    lm.train()
    for _ in range(it.given.epochs):
        order = rng.sample(range(len(trees)), len(trees))
        for start in range(0, len(order), STEP):
            for group in optimizer.param_groups:
                group["lr"] = it.rate * (1 + math.cos(math.pi * step / n_steps)) / 2
            margins = []
            for i in order[start : start + STEP]:
                prompt = (*it.data.forest.prefix, *trees[i].prompt)
                ratio = _sums(lm, prompt, trees[i].branches) - it.data.reference[i].to(lm.device)
                n = it.data.n_true[i]
                margins.append((ratio[:n, None] - ratio[n:]).flatten())
            loss = (torch.cat(margins) - 1 / (2 * it.given.tau)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1
    lm.eval()


def _sums(lm: Any, prompt: Sequence[int], branches: Sequence[Sequence[int]]) -> Tensor:
    """Summed log-probabilities of the answers (nats), one padded row each."""
    longest, n = max(map(len, branches)), len(prompt)
    rows = torch.tensor([[*prompt, *branch, *[0] * (longest - len(branch))] for branch in branches], device=lm.device)
    scores = lm(rows).logits[:, n - 1 : -1].float().log_softmax(-1)
    taken = scores.gather(-1, rows[:, n:, None])[..., 0]
    ends = torch.tensor([len(branch) for branch in branches], device=lm.device)
    return (taken * (torch.arange(longest, device=lm.device) < ends[:, None])).sum(-1)


def _trl(it: _Trained) -> None:
    """Train LoRA by TRL's trainer with its own defaults, but for the loss, the schedule and the paper's rate."""
    from datasets import Dataset

    trl: Any = import_module("trl")

    n = len(heads(it.model))
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(None):
        trainer = trl.DPOTrainer(
            model=it.model.lm,
            args=trl.DPOConfig(
                output_dir=folder,
                beta=it.given.tau,
                loss_type=["ipo"],
                per_device_train_batch_size=4,
                num_train_epochs=it.given.epochs,
                learning_rate=default_learning_rate("pair", n, n),
                lr_scheduler_type="cosine",
                use_cpu=not str(it.model.device).startswith("cuda"),
                bf16=False,
                gradient_checkpointing=False,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(pairs(it.asked)),
            processing_class=it.model.tokenizer,
            peft_config=_config(it.model, 1.0, 0.0),
        )
        trainer.train()
    it.model.lm.eval()


def _config(model: Model, scale: float, dropout: float) -> Any:
    import peft

    names = {id(module): name for name, module in model.lm.named_modules()}
    targets = [names[id(model.projection(site))] for site in model.subspaces(Location.whole("head"))]
    return peft.LoraConfig(r=1, lora_alpha=scale, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")  # type: ignore[arg-type]


def _add_adapters(model: Model, scale: float, dropout: float) -> None:
    import peft

    torch.manual_seed(0)
    peft.get_peft_model(model.lm, _config(model, scale, dropout))


def _remove_adapters(model: Model) -> None:
    """Put the layers back that PEFT has wrapped."""
    for name, module in list(model.lm.named_modules()):
        if hasattr(module, "base_layer"):
            parent, _, last = name.rpartition(".")
            setattr(model.lm.get_submodule(parent), last, module.base_layer)
    for name in ("peft_config", "_hf_peft_config_loaded"):
        model.lm.__dict__.pop(name, None)
    for parameter in model.lm.parameters():
        parameter.requires_grad_(False)


if __name__ == "__main__":
    run(main, Settings, __doc__)
