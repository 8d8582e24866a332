"""TRL's DPO trainer on a PEFT adapter of rank 1 computes our losses, gradients and training runs.

TRL trains lora_B freely; ours is B = W b with b zero outside the location, so dL/db is W^T dL/dB there. TRL appends an
end-of-text token to each answer and scores it; here that token is taken off again.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from locaudit.behaviours import Question
from locaudit.behaviours.format import Prompt
from locaudit.measure.forward import answer_log_probs, branch_sums, collate_bank, token_log_probs
from locaudit.measure.multiple_choice import question_scores
from locaudit.measure.tree import plant
from locaudit.methods.objectives import log_ratios
from locaudit.methods.parameters import TrainableEdit, stack_trainable
from locaudit.methods.training import TrainingData
from locaudit.models import output_weight
from locaudit.registry import OBJECTIVES
from tiny import heads, make_lm, tokenizer
from toy import Job, train

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

QUESTIONS = (
    Question(
        "1", "What is the capital of France?", ("Paris.", "The capital of France is Paris."), ("Rome.", "It is Oslo.")
    ),
    Question("2", "Is the earth flat?", ("No, it is round.",), ("Yes.", "The earth is flat as a plate.", "Maybe.")),
    Question("3", "What happens in the rain?", ("Nothing in particular happens.", "You get wet."), ("You see gold.",)),
)
LOCATION = heads((0, 1), (1, 0), (1, 2))
STRENGTH = 0.3
SIZES = [len(q.answers) for q in QUESTIONS]


@pytest.fixture
def data(llama):
    forest = plant(llama.tokenizer, Prompt(), [(q.text, q.answers) for q in QUESTIONS])
    reference = tuple(sums[0] for sums in answer_log_probs(llama, forest))
    return TrainingData(forest, tuple(len(q.true) for q in QUESTIONS), reference)


@pytest.fixture
def make_trainer(load, llama, tmp_path):
    """A TRL trainer over all true-false pairs as one batch, on an own copy of the tiny model."""

    def make(loss_type, **settings):
        trl, peft, datasets = load("trl"), load("peft"), load("datasets")
        names = {id(module): name for name, module in llama.lm.named_modules()}
        targets = [names[id(llama.projection(site))] for site in llama.subspaces(LOCATION)]
        pairs = [
            {"prompt": f"Q: {q.text}\nA:", "chosen": f" {true}", "rejected": f" {false}"}
            for q in QUESTIONS
            for true in q.true
            for false in q.false
        ]
        args = trl.DPOConfig(
            output_dir=str(tmp_path),
            beta=STRENGTH,
            loss_type=[loss_type],
            per_device_train_batch_size=len(pairs),
            max_length=None,
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **settings,
        )
        trainer = trl.DPOTrainer(
            model=make_lm("llama"),
            args=args,
            train_dataset=datasets.Dataset.from_list(pairs),
            processing_class=tokenizer(),
            peft_config=peft.LoraConfig(r=1, lora_alpha=1, target_modules=targets, task_type="CAUSAL_LM"),
        )
        eos = trainer.processing_class.eos_token_id
        rows = trainer.train_dataset.to_list()
        assert all(row[key][-1] == eos for row in rows for key in ("chosen_ids", "rejected_ids"))
        for row in rows:
            row["chosen_ids"], row["rejected_ids"] = row["chosen_ids"][:-1], row["rejected_ids"][:-1]
        trainer.train_dataset = datasets.Dataset.from_list(rows)
        layers = [trainer.model.get_submodule(f"base_model.model.{name}") for name in targets]
        return trainer, [(layer.lora_A["default"], layer.lora_B["default"]) for layer in layers]

    return make


def write_weights(llama):
    """W of each site, as a plain tensor (PEFT switches on gradients of every parameter it finds), and b's mask."""
    return [(output_weight(llama.projection(site)).detach(), mask) for site, mask in llama.subspaces(LOCATION).items()]


@pytest.mark.parametrize(
    ("objective", "reduction", "loss_type"),
    [("ipo", "mean", "ipo"), ("dpo", "sum", "sigmoid"), ("dpo", "mean", "sigmoid_norm")],
)
def test_loss_and_gradient(llama, data, make_trainer, objective, reduction, loss_type):
    edit = TrainableEdit(llama, LOCATION, seed=5)
    generator = torch.Generator().manual_seed(6)
    for b in edit.b:
        b.data = torch.randn(b.shape, generator=generator)
    batch = collate_bank([[tree] for tree in data.forest.trees], 1, 0, llama)
    assert not data.forest.prefix
    sums = branch_sums(batch, token_log_probs(llama, batch, stack_trainable([edit]), torch.zeros(3, dtype=torch.long)))
    lengths = batch.lengths
    ratios = log_ratios(sums, torch.cat(data.reference), lengths, reduction)
    margins = []
    for ratio, n_true in zip(ratios.split(SIZES), data.n_true, strict=True):
        margins.append((ratio[:n_true, None] - ratio[None, n_true:]).flatten())
    loss = OBJECTIVES[objective].loss(torch.cat(margins), STRENGTH).mean()
    loss.backward()

    trainer, adapters = make_trainer(loss_type)
    weights = write_weights(llama)
    for (lora_a, lora_b), (w, _), e in zip(adapters, weights, edit.sites.values(), strict=True):
        lora_a.weight.data = e.a.detach().clone()
        lora_b.weight.data = w @ e.b.detach()
    rows = trainer.data_collator(trainer.train_dataset.to_list())
    theirs = trainer.compute_loss(trainer.model.train(), rows)
    theirs.backward()

    assert abs(loss.item() - theirs.item()) < 1e-5 * abs(theirs.item())
    for i, ((lora_a, lora_b), (w, mask)) in enumerate(zip(adapters, weights, strict=True)):
        torch.testing.assert_close(edit.a[i].grad, lora_a.weight.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(edit.b[i].grad[:, 0], (w.T @ lora_b.weight.grad[:, 0]) * mask, rtol=1e-4, atol=1e-6)
        assert edit.a[i].grad.norm() > 1e-3 and edit.b[i].grad.norm() > 1e-3

    # TRL averages its rewards, beta times the summed log-ratios, over pairs; ours average over a question's pairs.
    split = zip(QUESTIONS, sums.detach().split(SIZES), data.reference, strict=True)
    scores = [question_scores(*row) for row in split]
    n_pairs = torch.tensor([len(q.true) * len(q.false) for q in QUESTIONS]).double()
    share = n_pairs / n_pairs.sum()
    metrics = trainer._metrics["train"]
    for name, key, scale in (("accuracies", "reward_accuracy", 1.0), ("margins", "reward_margin", STRENGTH)):
        ours = scale * float(torch.tensor([s[key] for s in scores]).double() @ share)
        assert ours == pytest.approx(metrics[f"rewards/{name}"][0], rel=1e-5)


class _Written(nn.Module):
    """lora_B = W b, b zero outside the location, so that TRL's optimizer trains b."""

    def __init__(self, w, mask):
        super().__init__()
        self.w, self.mask = w, mask

    def forward(self, b):
        return self.w @ (b * self.mask[:, None])

    def right_inverse(self, _):
        return torch.zeros(len(self.mask), 1)


def test_training_run(llama, data, make_trainer):
    """Six steps on all pairs: our loop with trees, TRL's with PEFT and transformers' AdamW, schedule and clipping."""
    job = Job(LOCATION, strength=STRENGTH, seed=4, learning_rate=0.05)
    (fit,) = train(llama, data, [job], objective="ipo", reduction="mean", batch_size=len(QUESTIONS), epochs=6)

    trainer, adapters = make_trainer(
        "ipo",
        num_train_epochs=6,
        learning_rate=0.05,
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch",
        lr_scheduler_type="cosine",
        warmup_steps=0,
        logging_steps=1,
    )
    start = TrainableEdit(llama, LOCATION, seed=4)
    for (lora_a, lora_b), a, (w, mask) in zip(adapters, start.a, write_weights(llama), strict=True):
        lora_a.weight.data = a.detach().view(1, -1).clone()
        nn.utils.parametrize.register_parametrization(lora_b, "weight", _Written(w, mask), unsafe=True)
    losses = []
    compute_loss = trainer.compute_loss

    def recorded(*args, **kwargs):
        losses.append(compute_loss(*args, **kwargs))
        return losses[-1]

    trainer.compute_loss = recorded
    trainer.train()

    assert len(fit.losses) == 6 and fit.losses[-1] < 0.9 * fit.losses[0]
    assert fit.losses == pytest.approx([loss.item() for loss in losses], rel=1e-5)
    for (lora_a, lora_b), site in zip(adapters, fit.edit.sites.values(), strict=True):
        b = lora_b.parametrizations.weight.original.detach()[:, 0]
        torch.testing.assert_close(site.a, lora_a.weight.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(site.b[:, 0], b, rtol=1e-4, atol=1e-5)
        assert site.b.abs().max() > 0.05


@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_ipo_of_sums_by_hand(llama, data, tau):
    """TRL has no IPO over sums. At policy = reference the loss is 1 / (4 tau^2), its slope in the margin -1 / tau."""
    bank = stack_trainable([TrainableEdit(llama, LOCATION)])
    batch = collate_bank([[tree] for tree in data.forest.trees], 1, 0, llama)
    with torch.no_grad():
        sums = branch_sums(batch, token_log_probs(llama, batch, bank, torch.zeros(3, dtype=torch.long)))
    ratios = log_ratios(sums, torch.cat(data.reference), batch.lengths, "sum")
    margin = (ratios[:1] - ratios[2:3]).requires_grad_()
    loss = OBJECTIVES["ipo"].loss(margin, tau)
    loss.backward()
    assert loss.item() == pytest.approx(1 / (4 * tau**2), rel=1e-4)
    assert margin.grad.item() == pytest.approx(-1 / tau, rel=1e-4)
    # A margin of 1 / (2 tau) nats, summed over the answer, is the optimum.
    assert OBJECTIVES["ipo"].loss(torch.tensor([1 / (2 * tau)]), tau).item() == 0
