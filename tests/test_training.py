from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from locaudit import fit_optimal, methods
from locaudit.claims import parse_location
from locaudit.claims.kinds import BUILT_IN, Shape
from locaudit.errors import ConfigError, DataError, LocationError, ModelError
from locaudit.location import Location
from locaudit.measure.forward import answer_log_probs, collate_bank, token_log_probs
from locaudit.measure.residual import Residuals
from locaudit.measure.tree import Forest, Tree
from locaudit.methods import optimal
from locaudit.methods import training as loop
from locaudit.methods.objectives import default_learning_rate, log_ratios
from locaudit.methods.optimizers import resolve_optimizer
from locaudit.methods.parameters import TrainableEdit, stack_trainable
from locaudit.methods.settings import ConstantSettings, OptimalSettings
from locaudit.methods.training import BATCH_SIZES, TrainingData
from locaudit.models import wrap_model
from locaudit.registry import METHODS, OBJECTIVES
from reference.training import fit_edit, log_prob
from tiny import NAMES, heads, logits, make_lm, neurons, random_ids, tiny, tokenizer
from toy import PRIMER, QUESTIONS, Job, train, training_data

FEW = QUESTIONS[:4]
"""2 x 2 + 1 x 2 + 2 x 1 + 1 x 1 = 9 pairs."""
PLACE = heads((0, 1), (1, 2))
JOB = Job(PLACE, 0.2, 3, 5e-3)


@pytest.fixture(scope="module")
def few(llama):
    return training_data(llama, FEW)


def tensors(edit):
    return {(site, name): getattr(e, name) for site, e in edit.sites.items() for name in "ab"}


def distance(one, two):
    """Largest difference of any coordinate of a or b."""
    one, two = tensors(one), tensors(two)
    assert one.keys() == two.keys()
    return max((one[key] - two[key]).abs().max().item() for key in one)


def same_bits(one, two):
    one, two = tensors(one), tensors(two)
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def assert_same_fit(fit, losses, edit, *, rel=1e-4, far=2e-4):
    """The same losses, and edits no coordinate of which is `far` apart."""
    assert fit.losses == pytest.approx(losses, rel=rel)
    assert distance(fit.edit, edit) < far


def assert_same_fits(fits, others, **tolerances):
    for fit, other in zip(fits, others, strict=True):
        assert_same_fit(fit, other.losses, other.edit, **tolerances)


def run(model, data, *jobs, **options):
    fits = train(model, data, jobs or [JOB], **options)
    return fits if len(jobs) > 1 else fits[0]


# The losses


def test_losses_by_hand():
    margin = torch.tensor([0.0, 1.0, -2.0])
    torch.testing.assert_close(OBJECTIVES["ipo"].loss(margin, 0.25), torch.tensor([4.0, 1.0, 16.0]))
    by_hand = [math.log(1 + math.exp(-0.5 * h)) for h in margin.tolist()]
    torch.testing.assert_close(OBJECTIVES["dpo"].loss(margin, 0.5), torch.tensor(by_hand))


def test_log_ratios_by_hand():
    edited, reference, lengths = torch.tensor([-2.0, -9.0]), torch.tensor([-4.0, -3.0]), torch.tensor([4, 3])
    assert log_ratios(edited, reference, lengths, "sum").tolist() == [2.0, -6.0]
    assert log_ratios(edited, reference, lengths, "mean").tolist() == [0.5, -2.0]


@given(st.floats(-50, 50), st.floats(0.05, 5))
def test_ipo_is_least_at_its_target_and_dpo_falls(h, strength):
    x = torch.tensor([h, 1 / (2 * strength)], dtype=torch.float64, requires_grad=True)
    loss = OBJECTIVES["ipo"].loss(x, strength)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert loss[1].item() == pytest.approx(0, abs=1e-18) and loss[0] >= loss[1]
    torch.testing.assert_close(gradient, 2 * (x.detach() - 1 / (2 * strength)))
    (gradient,) = torch.autograd.grad(OBJECTIVES["dpo"].loss(x, strength).sum(), x)
    assert (gradient <= 0).all()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("batching", ["question", "pair"])
def test_the_first_loss_is_that_of_the_unedited_model(llama, few, batching, reduction):
    """IPO starts at 1 / (4 tau^2) and DPO at log 2, whatever the location, reader and data."""
    for tau in (0.1, 0.5):
        fit = run(llama, few, replace(JOB, strength=tau), batching=batching, reduction=reduction, epochs=1)
        assert fit.losses[0] == pytest.approx(1 / (4 * tau**2), rel=1e-4)
    fit = run(llama, few, objective="dpo", batching=batching, reduction=reduction, reader="none", epochs=1)
    assert fit.losses[0] == pytest.approx(math.log(2), rel=1e-5)


# The slow twin


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batching": "pair", "batch_size": 4},
        {"objective": "dpo"},
        {"reduction": "mean"},
        {"reader": "location"},
        {"reader": "none"},
        {"max_grad_norm": 1e9},
    ],
    ids=str,
)
def test_training_equals_the_twin(llama, few, options):
    """After one step and after a whole short run."""
    options = {"batch_size": 2, "epochs": 2, **options}
    edit, losses = fit_edit(llama, few, JOB, **options)
    fit = run(llama, few, **options)
    n_items = 4 if options.get("batching", "question") == "question" else 9
    assert len(fit.losses) == len(losses) == 2 * math.ceil(n_items / options["batch_size"])
    assert_same_fit(fit, losses, edit)
    assert abs(losses[-1] - losses[0]) > 1e-3, "the loss did not move"

    one_batch = {**options, "epochs": 1, "batch_size": n_items}
    edit, losses = fit_edit(llama, few, JOB, **one_batch)
    assert len(losses) == 1
    assert_same_fit(run(llama, few, **one_batch), losses, edit, rel=1e-5, far=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_one_step_equals_the_twin_on_every_architecture(name):
    """Heads and neurons, behind a primer: gradients flow through the cached prefix as through plain tokens."""
    model = tiny(name)
    data = training_data(model, FEW[:2], PRIMER)
    assert data.forest.prefix
    for location in (PLACE, neurons((0, 3), (0, 40), (1, 7))):
        job = replace(JOB, location=location)
        edit, losses = fit_edit(model, data, job, batch_size=1, epochs=1)
        assert_same_fit(run(model, data, job, batch_size=1, epochs=1), losses, edit, far=1e-4)


@pytest.mark.parametrize("batching", ["question", "pair"])
def test_gradients_flow_through_the_cached_primer(llama, batching):
    data = training_data(llama, FEW, PRIMER)
    options = {"batching": batching, "batch_size": 2 if batching == "question" else 3}
    edit, losses = fit_edit(llama, data, JOB, **options)
    fit, parts = run(llama, data, **options), run(llama, data, step_tokens=1, **options)
    # The same data with the primer in every row instead of cached.
    rows = tuple(Tree(data.forest.prefix + tree.prompt, tree.branches) for tree in data.forest.trees)
    plain = run(llama, replace(data, forest=Forest((), rows)), **options)
    for expected in ((losses, edit), (parts.losses, parts.edit), (plain.losses, plain.edit)):
        assert_same_fit(fit, *expected)
    bare = run(llama, training_data(llama, FEW), **options)
    assert max(abs(x - y) for x, y in zip(fit.losses, bare.losses, strict=True)) > 1e-2, "the primer did not matter"


# Where the edit is


@pytest.mark.parametrize("reader", ["layer", "location", "none"])
@pytest.mark.parametrize("place", [PLACE, neurons((0, 3), (1, 7), (1, 8))], ids=str)
def test_nothing_leaves_the_location(llama, few, place, reader):
    fit = run(llama, few, replace(JOB, location=place), reader=reader)
    masks = llama.subspaces(place)
    assert fit.edit.sites.keys() == masks.keys()
    assert fit.edit.positions == "all"
    for site, mask in masks.items():
        e = fit.edit.sites[site]
        assert not e.b[~mask].any() and e.b[mask].all() and e.b.shape == (len(mask), 1)
        assert e.c == (1.0 if reader == "none" else 0.0)
        if reader == "none":
            assert not e.a.any()
        else:
            assert e.a[:, mask].all() and bool(e.a[:, ~mask].all()) == (reader == "layer")
            assert bool(e.a[:, ~mask].any()) == (reader == "layer")


def test_an_edit_starts_at_the_unedited_model(llama):
    """b = 0 and a uniform in +-1/sqrt(d_in), the same in a layer whatever the location."""
    one = TrainableEdit(llama, PLACE, seed=5).to_edit()
    other = TrainableEdit(llama, heads((1, 0), (1, 3)), seed=5).to_edit()
    for site, e in one.sites.items():
        bound = llama.width(site) ** -0.5
        assert not e.b.any() and e.a.unique().numel() == llama.width(site)
        assert e.a.abs().max() <= bound and e.a.min() < -bound / 2 and e.a.max() > bound / 2
    assert torch.equal(one.sites["heads", 1].a, other.sites["heads", 1].a)
    assert not torch.equal(one.sites["heads", 0].a, one.sites["heads", 1].a)
    assert not torch.equal(one.sites["heads", 1].a, TrainableEdit(llama, PLACE, seed=6).to_edit().sites["heads", 1].a)
    TrainableEdit(llama, PLACE, seed=2**63 - 1)  # the largest seed a trial can have
    with pytest.raises(LocationError, match="layers 0-1"):
        TrainableEdit(llama, heads((2, 0)))


# Many edits at once

BANK = [
    JOB,
    Job(heads((1, 0)), 0.5, 11, 2e-2),
    Job(heads((0, 0), (0, 3), (1, 1)), 0.1, 3, 1e-3),
    Job(Location.whole(), 0.3, 2**62, None),
]


@pytest.mark.parametrize(
    ("jobs", "primer", "options"),
    [
        (BANK, "", {"reader": "layer"}),
        (BANK, "", {"reader": "location", "batching": "pair"}),
        (BANK, "", {"reader": "none", "objective": "dpo"}),
        (BANK, PRIMER, {}),
        ([JOB, replace(JOB, location=neurons((0, 5), (1, 6)))], "", {}),
    ],
    ids=str,
)
def test_a_bank_equals_separate_runs(llama, jobs, primer, options):
    """Jobs that differ in place, strength, seed and rate do not influence each other."""
    data = training_data(llama, FEW, primer)
    assert_same_fits(run(llama, data, *jobs, **options), [run(llama, data, job, **options) for job in jobs])


# Repeatable


@pytest.mark.parametrize("batching", ["question", "pair"])
def test_the_same_job_gives_the_same_bits(llama, few, batching):
    for jobs in ([JOB], BANK):
        one, two = (train(llama, few, jobs, batching=batching, epochs=1) for _ in range(2))
        for x, y in zip(one, two, strict=True):
            assert x.losses == y.losses
            assert same_bits(x.edit, y.edit)


def test_several_threads_give_the_same_gradients():
    """Many branches from one column, and a vocabulary large enough for PyTorch to share sums out among threads."""
    model = wrap_model(make_lm("llama", vocab_size=4096), tokenizer())
    trees = [Tree((20, 21, 22), tuple((i,) for i in range(30, 94)))]
    edit = TrainableEdit(model, PLACE)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        batch = collate_bank([trees], 1, 0, model)
        tokens = token_log_probs(model, batch, stack_trainable([edit]), torch.zeros(1, dtype=torch.long))
        loss = (tokens * torch.linspace(0.1, 1, len(tokens))).sum()
        one, *others = (torch.autograd.grad(loss, list(edit.b), retain_graph=True) for _ in range(20))
    finally:
        torch.set_num_threads(n_threads)
    assert all(torch.equal(x, y) for other in others for x, y in zip(one, other, strict=True))


def test_the_seed_matters(llama, few):
    one, two = run(llama, few), run(llama, few, replace(JOB, seed=4))
    assert one.losses != two.losses
    assert distance(one.edit, two.edit) > 1e-2


def test_model_and_global_random_state_stay_as_they_were(llama, few):
    ids = random_ids(2, 9)
    before = logits(llama, ids)
    weights = {name: p.clone() for name, p in llama.lm.named_parameters()}
    torch_state, python_state = torch.random.get_rng_state(), random.getstate()
    run(llama, few)
    assert torch.equal(torch.random.get_rng_state(), torch_state) and random.getstate() == python_state
    assert torch.equal(logits(llama, ids), before)
    for name, p in llama.lm.named_parameters():
        assert torch.equal(p, weights[name]) and p.grad is None and not p.requires_grad
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in llama.lm.modules())


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_training_works_where_gradients_are_off(llama, few, off):
    with off():
        fit = run(llama, few)
        assert not torch.is_grad_enabled()
    assert same_bits(fit.edit, run(llama, few).edit)
    assert not any(x.requires_grad for x in tensors(fit.edit).values())


def test_reference_and_weights_of_inference_mode(few):
    with torch.inference_mode():
        inner = wrap_model(make_lm("llama"), tokenizer())
        assert fit_optimal(tiny("llama"), QUESTIONS, "0.1", epochs=1).sites
    with pytest.raises(ModelError, match=r"inference_mode.*load the model outside"):
        run(inner, few)


# Batches


@given(st.integers(1, 30), st.integers(1, 8), st.integers(1, 4), st.integers(0, 2**63 - 1))
def test_every_item_is_seen_epochs_times(n, size, epochs, seed):
    steps = loop._order(n, size, epochs, seed)
    per_epoch = math.ceil(n / size)
    assert len(steps) == epochs * per_epoch
    for epoch in range(epochs):
        seen = [i for step in steps[epoch * per_epoch : (epoch + 1) * per_epoch] for i in step]
        assert sorted(seen) == list(range(n))
    assert all(1 <= len(step) <= size for step in steps)


@pytest.mark.parametrize("batching", ["question", "pair"])
def test_every_pair_is_trained_on_epochs_times(llama, few, batching, monkeypatch):
    """Counted at the model: the branches of each forward."""
    seen, original = Counter(), loop.collate_bank

    def spy(rows, *args):
        seen.update((tree.prompt, branch) for row in rows for tree in row for branch in tree.branches)
        return original(rows, *args)

    monkeypatch.setattr(loop, "collate_bank", spy)
    fits = run(llama, few, *BANK[:2], batching=batching, epochs=3)
    size = BATCH_SIZES[batching]
    expected = Counter()
    for tree, n_true in zip(few.forest.trees, few.n_true, strict=True):
        n_false = len(tree.branches) - n_true
        for i, branch in enumerate(tree.branches):
            partners = n_false if i < n_true else n_true
            expected[tree.prompt, branch] = 2 * 3 * (1 if batching == "question" else partners)
    assert seen == expected
    assert len(fits[0].losses) == 3 * math.ceil((4 if batching == "question" else 9) / size)


def test_pairs_and_questions_agree_when_one_step_takes_all(llama, few):
    """The mean over 9 pairs is the same whether they come as 4 trees or as 9."""
    question = run(llama, few, batch_size=4, epochs=3)
    assert_same_fits([question], [run(llama, few, batching="pair", batch_size=9, epochs=3)])


def test_order_and_padding_do_not_matter_within_a_step(llama, few):
    one = run(llama, few, batch_size=4)
    back = TrainingData(Forest((), few.forest.trees[::-1]), few.n_true[::-1], few.reference[::-1])
    assert_same_fits([one], [run(llama, back, batch_size=4)], far=1e-4)
    # A tree alone in its row, or padded next to a longer one.
    padded = run(llama, few, batch_size=4, epochs=1).losses[0]
    alone = run(llama, few, replace(JOB, learning_rate=1e-30), batch_size=1, epochs=1).losses
    assert padded == pytest.approx(sum(alone) / 4, rel=1e-5)


def test_mean_and_sum_aim_at_different_edits(llama, few):
    """``mean`` asks for the margin per token: on answers of one token both are the same."""
    assert distance(run(llama, few).edit, run(llama, few, reduction="mean").edit) > 1e-3
    trees = tuple(Tree(tree.prompt, tuple(x[:1] for x in tree.branches)) for tree in few.forest.trees)
    forest = Forest((), trees)
    short = TrainingData(forest, few.n_true, tuple(x[0] for x in answer_log_probs(llama, forest)))
    assert same_bits(run(llama, short).edit, run(llama, short, reduction="mean").edit)


def test_training_on_nothing_raises(llama):
    with pytest.raises((DataError, ValueError), match="question|empty"):
        train(llama, TrainingData(Forest((), ()), (), ()), [JOB])


def test_too_long_a_question_raises(llama):
    forest = Forest((), (Tree((5,) * 255, ((6,), (7, 8))),))
    with pytest.raises(ModelError, match="257 tokens"):
        train(llama, TrainingData(forest, (1,), (torch.zeros(2),)), [JOB])


# Steps


@pytest.mark.parametrize("objective", ["ipo", "dpo"])
@pytest.mark.parametrize("reader", ["layer", "none"])
def test_training_lowers_the_loss(llama, few, objective, reader):
    job = Job(Location.whole(), 0.2, 0, 2e-2)
    fit = run(llama, few, job, objective=objective, reader=reader, epochs=12)
    assert sum(fit.losses[-2:]) < 0.7 * sum(fit.losses[:2])
    # The edit that comes back is the one that was trained: its margins, taken one row at a time, are the low ones.
    margins = []
    for tree, n_true in zip(few.forest.trees, few.n_true, strict=True):
        with torch.no_grad():
            r = [
                log_prob(llama, tree.prompt, x, fit.edit) - log_prob(llama, tree.prompt, x, None) for x in tree.branches
            ]
        margins += [t - f for t in r[:n_true] for f in r[n_true:]]
    final = OBJECTIVES[objective].loss(torch.stack(margins), 0.2).mean().item()
    assert final < 0.7 * fit.losses[0]


def rates_of_one_run(model, data, job, monkeypatch, **options):
    seen, original = [], torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        seen.append([group["lr"] for group in self.param_groups])
        assert all(group["weight_decay"] == 0 for group in self.param_groups)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    train(model, data, job, **options)
    return torch.tensor(seen)


def test_the_rate_follows_a_cosine_to_zero(llama, few, monkeypatch):
    rates = rates_of_one_run(llama, few, [JOB, replace(JOB, learning_rate=1e-3)], monkeypatch, epochs=20)
    n = len(rates)
    assert n == 40
    assert rates[0].tolist() == pytest.approx([5e-3, 1e-3])
    assert rates[n // 2].tolist() == pytest.approx([2.5e-3, 0.5e-3])
    assert (rates[-1] < 2e-3 * rates[0]).all()
    assert (rates[1:] < rates[:-1]).all()


def test_the_rate_defaults_to_the_location_size(llama, few, monkeypatch):
    jobs = [Job(location, 0.2, 0) for location in (heads((0, 0)), PLACE, Location.whole())]
    (rates,) = rates_of_one_run(llama, few, jobs, monkeypatch, epochs=1, batch_size=4)
    expected = [default_learning_rate("question", n, 8) for n in (1, 2, 8)]
    assert rates.tolist() == pytest.approx(expected)
    assert len(set(expected)) == 3


@pytest.mark.parametrize(("batching", "anchors"), [("pair", (2e-3, 5e-4, 1e-4)), ("question", (2e-2, 1e-2, 1.5e-3))])
def test_default_learning_rate_meets_its_anchors(batching, anchors):
    """``pair``: the paper's rates for 1, 16 and all 1024 heads."""
    rates = [default_learning_rate(batching, n, 1024) for n in range(1, 1025)]
    assert (rates[0], rates[15], rates[1023]) == pytest.approx(anchors)
    assert all(a >= b for a, b in zip(rates, rates[1:], strict=False))
    assert rates[3] == pytest.approx((rates[0] * rates[15]) ** 0.5)  # 4 is halfway from 1 to 16 in logarithms
    assert default_learning_rate(batching, 270, 270) == pytest.approx(anchors[2])
    assert default_learning_rate(batching, 10**5, 10**5) == pytest.approx(anchors[2])


def test_default_learning_rates_fall_with_few_pairs_in_a_step():
    """As the square root, below 4; the paper's rates of ``pair`` batching are not changed."""
    full = default_learning_rate("question", 16, 1024)
    rates = [default_learning_rate("question", 16, 1024, pairs) for pairs in (1, 2, 4, 12)]
    assert rates == pytest.approx([full / 2, full / 2**0.5, full, full])
    assert default_learning_rate("question", 1, 1, 1) == default_learning_rate("question", 1, 1) / 2
    assert default_learning_rate("pair", 16, 1024, 1) == default_learning_rate("pair", 16, 1024)
    shape = Shape(n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, n_neurons=64, width=64)
    rates = [optimal.learning_rate(shape, PLACE, OptimalSettings(batch_size=n), pairs=1) for n in (1, None, 4)]
    assert rates[0] < rates[1] < rates[2]


@pytest.mark.parametrize("batching", ["pair", "question"])
@pytest.mark.parametrize("n_heads", [2, 8, 16, 17, 255, 256, 270, 1024, 46080])
def test_default_learning_rates_are_continuous_in_size(batching, n_heads):
    """A subset never has a rate far above that of a superset that is hardly larger."""
    sizes = [x for x in (1, 2, 15, 16, 17, n_heads / 2, 0.9 * n_heads, 0.99 * n_heads) if x <= n_heads]
    whole = default_learning_rate(batching, n_heads, n_heads)
    rates = [default_learning_rate(batching, n, n_heads) for n in sizes]
    steps = [default_learning_rate(batching, 1.001 * n, n_heads) / rate for n, rate in zip(sizes, rates, strict=True)]
    assert all(rate >= whole * (1 - 1e-9) for rate in rates)
    assert all(0.995 < step <= 1 + 1e-9 for step in steps)
    if n_heads >= 8:
        assert rates[-1] < 1.02 * whole and rates[-2] < 1.2 * whole


def test_default_learning_rates_of_other_kinds():
    """In SmolLM2-135M's shape: one place under two names has one rate, and a single layer the rate measured for it."""
    shape = Shape(n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64, n_neurons=1536, width=576)

    def rate(text):
        return optimal.learning_rate(shape, parse_location(text), OptimalSettings(), 2)

    assert rate("mlp:4") == rate(f"neuron:{','.join(f'4.{i}' for i in range(1536))}")
    assert rate("attention:4") == rate(",".join(f"4.{i}" for i in range(9)))
    assert rate("kv-group:4.0") == rate("4.0,4.1,4.2")
    assert 2.8e-3 < rate("mlp:4") < rate("residual:4") < 5.8e-3  # docs/learning-rates.md
    for kind in BUILT_IN:
        whole = optimal.learning_rate(shape, Location.whole(kind), OptimalSettings(), 2)
        assert whole == pytest.approx(5e-4 if kind == "residual" else 1.5e-3)
    assert optimal.learning_rate(shape, Location.whole("residual"), OptimalSettings(learning_rate=0.1), 1) == 0.1


def test_gradients_are_clipped_for_each_edit_alone(llama, few):
    """A neighbour with an enormous gradient does not shrink anyone's step."""
    wild = replace(JOB, strength=1e-6)
    tame = run(llama, few, JOB, wild, epochs=4)[0]
    alone = run(llama, few, epochs=4)
    assert_same_fits([tame], [alone])
    # Clipping matters at all: Adam undoes a constant factor, but not one that changes between steps.
    assert distance(alone.edit, run(llama, few, epochs=4, max_grad_norm=1e9).edit) > 1e-4


def test_progress_is_told(llama, few):
    told = []
    run(llama, few, on_step=lambda done, total: told.append((done, total)))
    assert told == [(i, 4) for i in range(1, 5)]


# Divergence


def assert_only_the_first_ended(fits, calm, message):
    """`calm` is the same bank with a harmless first job: what the second does must not depend on the first."""
    assert fits[0].edit is None
    assert message in fits[0].message
    assert all(map(math.isfinite, fits[0].losses))
    assert fits[1].message == "" and fits[1].edit.is_finite
    assert fits[1].losses == calm[1].losses
    assert same_bits(fits[1].edit, calm[1].edit)


@pytest.mark.parametrize("reader", ["layer", "location", "none"])
@pytest.mark.parametrize(
    ("wild", "message"),
    [
        (replace(JOB, strength=1e-30), "loss inf"),
        (replace(JOB, learning_rate=float("inf")), "gradient norm nan"),
    ],
    ids=["loss", "rate"],
)
def test_a_job_that_diverges_ends_alone(llama, few, wild, message, reader):
    other = replace(BANK[1], seed=JOB.seed)
    fits = run(llama, few, wild, other, reader=reader, epochs=3)
    assert_only_the_first_ended(fits, run(llama, few, JOB, other, reader=reader, epochs=3), message)
    assert_same_fits(fits[1:], [run(llama, few, other, reader=reader, epochs=3)])
    assert " of 6" in fits[0].message


def poisoned_model(weight):
    """Head (1, 3) is silent (its values are 0), and its columns of the output projection are `weight`."""
    lm = make_lm("llama", num_key_value_heads=4)
    width = 8
    with torch.no_grad():
        lm.model.layers[1].self_attn.v_proj.weight[3 * width :] = 0
        lm.model.layers[1].self_attn.o_proj.weight[:, 3 * width :] = weight
    return wrap_model(lm, tokenizer())


def test_an_infinite_gradient_norm_ends_its_job_alone():
    """The loss is finite at b = 0, the norm of its gradient is not."""
    model = poisoned_model(1e25)
    data = training_data(model, FEW)
    jobs = [replace(JOB, location=heads((1, 3))), JOB]
    fits = run(model, data, *jobs)
    assert_only_the_first_ended(fits, run(model, data, replace(JOB, location=heads((1, 1))), JOB), "at step 1 of 4")
    assert fits[0].losses == pytest.approx([6.25], rel=1e-3)


def test_an_edit_whose_last_step_overflows_is_not_returned(llama, few):
    """One step only: the loss and gradient were finite, the edit is not."""
    fits = run(llama, few, replace(JOB, learning_rate=float("inf")), BANK[1], epochs=1, batch_size=4)
    assert fits[0].edit is None and fits[0].message == "the trained edit is not finite"
    assert fits[1].edit.is_finite


def test_training_ends_when_every_job_has_diverged(llama, few):
    told = []
    fits = run(
        llama, few, replace(JOB, strength=1e-30), replace(JOB, strength=1e-25), on_step=lambda *x: told.append(x)
    )
    assert [fit.edit for fit in fits] == [None, None]
    assert [fit.losses for fit in fits] == [(), ()]
    assert told == [(1, 4)]


def test_the_optimizer_is_the_papers_where_it_can_run(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert resolve_optimizer("auto", cpu) == resolve_optimizer("adamw", cuda) == "adamw"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "bitsandbytes" else None)
    assert resolve_optimizer("auto", cuda) == resolve_optimizer("paged_adamw_32bit", cuda) == "paged_adamw_32bit"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert resolve_optimizer("auto", cuda) == "adamw"
    for device in (cpu, cuda):
        with pytest.raises(ConfigError, match=r"got optimizer paged_adamw_32bit .*expected a CUDA device and"):
            resolve_optimizer("paged_adamw_32bit", device)


@pytest.mark.parametrize("batching", ["question", "pair"])
def test_a_step_in_parts_is_the_same_step(llama, few, batching):
    """Gradients of the parts add up to the step's, for each edit of a bank, in any cut."""
    jobs = [JOB, replace(JOB, location=heads((1, 0)), seed=5)]
    whole, parts, single = (
        train(llama, few, jobs, batching=batching, batch_size=3, step_tokens=tokens) for tokens in (10**9, 30, 1)
    )
    assert_same_fits(whole, parts, far=1e-5)
    assert_same_fits(whole, single, far=1e-5)


def test_parts_hold_every_item_once(llama, few):
    items = loop._items(few, "question")
    drawn = [items[:3], items[1:4]]
    sizes = [len(item.tree) for item in items]
    for limit in (1, max(sizes) + 1, sum(sizes)):
        parts = loop._parts(drawn, limit)
        assert [[item for part in parts for item in part[k]] for k in range(2)] == drawn
        assert all(len(items) == 1 or sum(len(i.tree) for i in items) <= limit for part in parts for items in part)
    assert len(loop._parts(drawn, 1)) == 3 and len(loop._parts(drawn, sum(sizes))) == 1


@pytest.mark.parametrize(
    ("name", "settings", "reader"),
    [
        ("optimal", OptimalSettings(epochs=1, bank_size=2), "layer"),
        ("optimal", OptimalSettings(epochs=1, bank_size=2, reader="location", learning_rate=1e-3), "location"),
        ("constant", ConstantSettings(epochs=1, bank_size=2), "none"),
    ],
)
def test_the_registered_methods_train_in_banks(llama, few, name, settings, reader, monkeypatch):
    """Rates come from the settings or the location's size; memory that was short makes parts smaller, never larger."""
    residuals, sizes, limits = {"train": Residuals(llama, few.forest)}, [], []

    def noted(model, data, trainees, *others, step_tokens, **more):
        sizes.append(len(trainees))
        limits.append(step_tokens)
        return loop.train(model, data, trainees, *others, step_tokens=step_tokens, **more)

    monkeypatch.setattr(optimal, "train", noted)
    jobs = [methods.Job(place, 0.3, 4) for place in (PLACE, heads((1, 0)), Location.whole())]
    for row_tokens in (None, 320, 80):
        shared = SimpleNamespace(model=llama, training=few, residuals=residuals, row_tokens=row_tokens)
        fits = METHODS[name].fitter(shared, jobs, settings)
    assert sizes == [2, 1] * 3 and limits == [160] * 4 + [80] * 2
    for job, fit in zip(jobs, fits, strict=True):
        ours = Job(job.location, 0.3, 4, settings.learning_rate)
        assert_same_fits([fit], [run(llama, few, ours, reader=reader, epochs=1)])


def test_order_in_the_bank_does_not_matter(llama, few):
    forwards, backwards = run(llama, few, *BANK), run(llama, few, *BANK[::-1])
    for one, two in zip(forwards, backwards[::-1], strict=True):
        assert one.losses == pytest.approx(two.losses, rel=1e-5)
        assert distance(one.edit, two.edit) < 1e-4
