"""Activations, probes and the ITI edits made of them."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import locaudit
from locaudit.behaviours import Question, load_behaviour, split_questions
from locaudit.behaviours.format import Prompt
from locaudit.edits import stack
from locaudit.errors import DataError, LocationError, ModelError
from locaudit.location import Site
from locaudit.measure.activations import Activations, collect_activations
from locaudit.measure.drift import DriftText, measure_drift
from locaudit.measure.forward import answer_log_probs
from locaudit.measure.multiple_choice import question_scores
from locaudit.measure.tree import plant
from locaudit.methods import probes as probes_module
from locaudit.methods.iti import iti_edit, iti_theta
from locaudit.methods.probes import Probes, fit_logistic, fit_probes
from locaudit.models import wrap_model
from locaudit.registry import KINDS
from reference.probes import last_activations, logistic
from reference.scoring import forest_log_probs
from tiny import chat_tokenizer, heads, make_lm, neurons, random_ids, tokenizer
from toy import PRIMER, QUESTIONS

FEW = QUESTIONS[:4]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


# Activations


@pytest.mark.parametrize("kind", ["head", "neuron"])
def test_activations_equal_one_text_at_a_time(tiny_model, kind):
    """Context ``answer``: the last token of "Q: question A: answer" in a row of its own."""
    got = collect_activations(tiny_model, FEW, context="answer", kind=kind)
    texts = [f"Q: {q.text} A: {answer}" for q in FEW for answer in q.answers]
    expected = torch.stack([last_activations(tiny_model, text, kind) for text in texts])
    assert got.values.shape == (len(texts), 2, *KINDS[kind].blocks(tiny_model.shape))
    torch.testing.assert_close(got.values, expected, **CLOSE)
    assert got.values.dtype == torch.float32
    assert got.is_true.tolist() == [answer in q.true for q in FEW for answer in q.answers]
    assert got.question.tolist() == [i for i, q in enumerate(FEW) for _ in q.answers]


def test_a_random_other_question_follows_the_answer(tiny_model):
    """Context ``next_question``: each example is the text with one of the other questions, never with its own."""
    got = collect_activations(tiny_model, FEW, seed=2)  # one of the seeds that draw each question once
    examples = [(i, q, answer) for i, q in enumerate(FEW) for answer in q.answers]
    followed_by = []
    for values, (i, q, answer) in zip(got.values, examples, strict=True):
        near = [
            j
            for j, other in enumerate(FEW)
            if torch.allclose(values, last_activations(tiny_model, f"Q: {q.text} A: {answer} Q: {other.text}"), **CLOSE)
        ]
        assert len(near) == 1
        assert near[0] != i
        followed_by += near
    assert set(followed_by) == {0, 1, 2, 3}
    of_one = [{j for j, e in zip(followed_by, examples, strict=True) if e[0] == i} for i in range(len(FEW))]
    assert all(len(others) == 1 for others in of_one), "ITI's code draws it for each question, not for each answer"


def test_order_of_rows_and_answers_does_not_matter(llama, tmp_path):
    """A file without ids: shuffled rows, and reversed answers, give the same probes and the same ITI edit."""

    def fitted(rows):
        path = tmp_path / "x.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        behaviour = load_behaviour(path)
        split = split_questions(behaviour)
        probes = locaudit.fit_probes(llama, behaviour, val_fraction=0.5)
        for source in (str(path), path, json.loads(json.dumps(rows))):
            assert torch.equal(locaudit.fit_probes(llama, source, val_fraction=0.5).weight, probes.weight)
        trees = {
            (q.text, frozenset(q.answers), tree.prompt, frozenset(tree.branches))
            for q in split.train
            for tree in plant(llama.tokenizer, Prompt(), [(q.text, q.answers)]).trees
        }
        return trees, split, probes, locaudit.fit_iti(llama, behaviour, "0.1,1.2", alpha=5)

    rows = [{"question": q.text, "true": q.true, "false": q.false} for q in QUESTIONS]
    mixed = [row | {side: row[side][::-1] for side in ("true", "false")} for row in rows]
    random.Random(3).shuffle(mixed)
    one, two = fitted(rows), fitted(mixed)
    assert one[0] == two[0]
    for part in ("train", "val", "test"):
        assert [q.id for q in getattr(one[1], part)] == [q.id for q in getattr(two[1], part)]
    assert torch.equal(one[2].val_accuracy, two[2].val_accuracy)
    torch.testing.assert_close(one[2].weight, two[2].weight, rtol=1e-4, atol=1e-6)
    for site, edit in one[3].sites.items():
        torch.testing.assert_close(edit.b, two[3].sites[site].b, rtol=1e-5, atol=1e-6)


def test_in_a_chat_questions_and_answers_are_turns(llama):
    """Both contexts against the template's text, a row of its own each; special tokens come from the template."""
    model, prompt = replace(llama, tokenizer=chat_tokenizer()), Prompt("chat", PRIMER)
    turn = "<bos>user\n{}<end>\n<bos>assistant\n{}"
    examples = [(q, answer) for q in FEW for answer in q.answers]
    got = collect_activations(model, FEW, context="answer", prompt=prompt).values
    expected = [last_activations(model, turn.format(q.text, answer)) for q, answer in examples]
    torch.testing.assert_close(got, torch.stack(expected), **CLOSE)
    for values, (q, answer) in zip(collect_activations(model, FEW, prompt=prompt).values, examples, strict=True):
        texts = [turn.format(q.text, answer) + f"<end>\n<bos>user\n{o.text}" for o in FEW if o is not q]
        assert sum(torch.allclose(values, last_activations(model, text), **CLOSE) for text in texts) == 1


def test_the_other_question_depends_on_the_seed_alone(llama):
    python_state, torch_state = random.getstate(), torch.random.get_rng_state()
    one, two, other = (collect_activations(llama, QUESTIONS, seed=seed).values for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.allclose(one, other)
    assert random.getstate() == python_state and torch.equal(torch.random.get_rng_state(), torch_state)


@pytest.mark.parametrize("context", ["answer", "next_question"])
def test_batch_size_does_not_matter(llama, context):
    one, two, three = (
        collect_activations(llama, QUESTIONS, context=context, row_tokens=n).values for n in (1, 200, 10**6)
    )
    torch.testing.assert_close(one, two, **CLOSE)
    torch.testing.assert_close(one, three, **CLOSE)


def test_examples_come_in_the_order_of_the_questions(llama):
    """Questions of very different lengths, so that batches are not in their order."""
    forwards = collect_activations(llama, QUESTIONS, context="answer")
    backwards = collect_activations(llama, QUESTIONS[::-1], context="answer")
    for i in range(len(QUESTIONS)):
        one, two = forwards.question == i, backwards.question == len(QUESTIONS) - 1 - i
        torch.testing.assert_close(forwards.values[one], backwards.values[two], **CLOSE)
        assert torch.equal(forwards.is_true[one], backwards.is_true[two])


def test_a_single_question_has_no_other(llama):
    one = collect_activations(llama, FEW[:1])
    assert torch.equal(one.values, collect_activations(llama, FEW[:1], context="answer").values)


def test_a_tokenizer_with_special_tokens(llama):
    """BOS stands in front of each text, once; EOS behind it is not read."""
    model = replace(llama, tokenizer=tokenizer(bos=True, eos=True))
    bare = replace(llama, tokenizer=tokenizer(bos=True))
    got = collect_activations(model, FEW, context="answer").values
    expected = [last_activations(bare, f"Q: {q.text} A: {answer}") for q in FEW for answer in q.answers]
    torch.testing.assert_close(got, torch.stack(expected), **CLOSE)


def test_too_long_a_text_raises(llama):
    with pytest.raises(ModelError, match="context of 256"):
        collect_activations(llama, [Question("long", "Q " * 200, ("No.",), ("Yes.",))])


# One logistic regression


def problems(m=5, n=60, d=7, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(m, n, d, generator=g)
    y = noise[0] @ torch.randn(d, generator=g) + torch.randn(n, generator=g) > 0
    return scale * noise + torch.randn(m, 1, d, generator=g), y


def assert_close(found, expected, rtol=1e-6, atol=1e-7):
    """Weights and intercepts."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


def gradient(x, y, weight, intercept, c):
    """Of the objective at (w, v), by autograd."""
    w, v = weight.clone().requires_grad_(), intercept.clone().requires_grad_()
    z = torch.einsum("mnd,md->mn", x.double(), w) + v.unsqueeze(1)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(z, y.double().expand_as(z), reduction="sum")
    return torch.autograd.grad(c * loss + (w**2).sum() / 2, (w, v))


def assert_optimal(x, y, c, tolerance):
    """The gradient at the solution, which is returned, is zero."""
    solution = fit_logistic(x, y, inverse_l2=c)
    for part in gradient(x, y, *solution, c):
        assert part.abs().max().item() < tolerance
    return solution


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
def test_the_gradient_at_the_solution_is_zero(c, scale):
    x, y = problems(scale=scale)
    assert_optimal(x, y, c, 1e-6 * max(c * scale * len(y), 1))


def test_heavy_tails_need_the_line_search():
    """Full Newton steps overshoot on some of these."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 60, 7, generator=g) / torch.randn(200, 60, 1, generator=g)
    y = x[:, :, 0].mean(dim=0) + torch.randn(60, generator=g) > 0
    assert_optimal(x, y, 10.0, 1e-4)


@given(st.integers(0, 10**6), st.sampled_from([0.1, 1.0, 10.0]))
def test_probes_equal_the_twin(seed, c):
    x, y = problems(m=2, n=40, d=4, seed=seed)
    if y.all() or not y.any():
        return
    weight, intercept = fit_logistic(x, y, inverse_l2=c)
    assert weight.dtype == intercept.dtype == torch.float64
    for i in range(len(x)):
        expected = logistic(x[i].double().numpy(), y.double().numpy(), c)
        got = torch.cat([weight[i], intercept[i : i + 1]]).numpy()
        assert got == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_order_and_chunks_do_not_matter(monkeypatch):
    """Beyond the tolerance: a chunk ends when its hardest problem has converged."""
    x, y = problems(m=9)
    weight, intercept = fit_logistic(x, y)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    for units in ([8, 0, 3, 1, 2, 7, 6, 5, 4], list(range(9))):
        assert_close(fit_logistic(x[units][:, order], y[order]), (weight[units], intercept[units]))
    for chunk in (1, 2 * 8 * 60 * 8):  # one problem at a time, then two
        monkeypatch.setattr(probes_module, "CHUNK_BYTES", chunk)
        assert_close(fit_logistic(x, y), (weight, intercept))


@pytest.mark.parametrize("gap", [1e-3, 1.0, 1e4])
def test_separable_classes_stay_finite(gap):
    """The penalty bounds the weights, the classes' own sizes the intercept."""
    y = torch.arange(20) % 2 == 0
    x = (gap * (2.0 * y - 1)).view(1, 20, 1)
    weight, intercept = assert_optimal(x, y, 10.0, 1e-6 * max(200 * gap, 1))
    assert weight.isfinite().all() and 0 < weight.item() < 50
    assert ((x[0, :, 0] * weight[0, 0] + intercept[0] > 0) == y).all()


def test_a_constant_feature_leaves_the_rest_alone():
    """It has weight where the intercept, which is free, cannot do the same: none."""
    x, y = problems(m=2)
    padded = torch.cat([x, torch.zeros(2, 60, 1), torch.full((2, 60, 1), 5.0)], dim=2)
    weight, intercept = fit_logistic(x, y)
    w, v = fit_logistic(padded, y)
    torch.testing.assert_close(w[:, :7], weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(w[:, 7:], torch.zeros(2, 2, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(v, intercept, rtol=1e-5, atol=1e-5)


def test_features_without_information_predict_the_share():
    y = torch.tensor([True] * 30 + [False] * 10)
    weight, intercept = fit_logistic(torch.zeros(3, 40, 2), y)
    assert not weight.any()
    assert intercept.tolist() == pytest.approx([torch.logit(torch.tensor(0.75)).item()] * 3, abs=1e-6)


def test_one_hard_problem_does_not_spoil_the_others():
    """Sizes from 1e-4 to 1e4 in one batch."""
    x, y = problems(m=3)
    mixed = x * torch.tensor([1e-4, 1.0, 1e4]).view(3, 1, 1)
    together = fit_logistic(mixed, y)
    for i in range(3):
        alone = fit_logistic(mixed[i : i + 1], y)
        torch.testing.assert_close(together[0][i], alone[0][0], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(together[1][i], alone[1][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [True, False])
def test_one_class_raises(value):
    with pytest.raises(DataError, match="both classes"):
        fit_logistic(torch.zeros(1, 4, 2), torch.full((4,), value))


# Probes of all units


def activations_of(n_questions=20, layers=2, units=3, width=4, seed=0):
    """Two true and one false answer for each question; unit (1, 2) knows which, (0, 1) only about the question."""
    g = torch.Generator().manual_seed(seed)
    question = torch.arange(n_questions).repeat_interleave(3)
    is_true = torch.arange(3 * n_questions) % 3 < 2
    values = torch.randn(3 * n_questions, layers, units, width, generator=g)
    values[:, 1, 2, 0] += 4 * is_true
    values[:, 0, 1] = torch.randn(n_questions, width, generator=g)[question]
    return Activations(values, is_true, question)


def test_questions_are_on_one_side_of_the_probes_split(monkeypatch):
    """Features that hold the question's number show which examples were fitted on."""
    activations = activations_of()
    marked = replace(activations, values=activations.question.float().view(-1, 1, 1, 1).expand(-1, 2, 3, 4))
    seen, original = {}, probes_module.fit_logistic

    def spy(x, y, **options):
        seen["x"], seen["y"] = x[0, :, 0].long().tolist(), y.tolist()
        return original(x, y, **options)

    monkeypatch.setattr(probes_module, "fit_logistic", spy)
    splits = []
    for seed in (0, 0, 1):
        probes = fit_probes(marked, seed=seed)
        fitted = seen["x"]
        assert len(set(fitted)) == 15 and all(fitted.count(q) == 3 for q in set(fitted))
        assert seen["y"] == [True, True, False] * 15
        assert (probes.n_train, probes.n_val) == (45, 15)
        splits.append(set(fitted))
    assert splits[0] == splits[1] != splits[2]


def test_probes_find_the_unit_that_knows():
    activations = activations_of(n_questions=60)
    probes = fit_probes(activations)
    assert probes.ranking()[0] == (1, 2)
    assert probes.val_accuracy[1, 2] > 0.9
    assert probes.val_accuracy[0, 1] <= probes.majority + 1e-9
    assert probes.majority == pytest.approx(2 / 3)
    assert probes.weight.shape == (2, 3, 4) and probes.intercept.shape == probes.val_accuracy.shape == (2, 3)


def test_each_unit_has_the_probe_of_its_own_activations():
    """Weights and held-out accuracy of every unit, one at a time."""
    activations = activations_of(n_questions=24)
    probes = fit_probes(activations, inverse_l2=0.5, val_fraction=0.5, seed=3)
    for layer in range(2):
        for unit in range(3):
            alone = replace(activations, values=activations.values[:, layer : layer + 1, unit : unit + 1])
            one = fit_probes(alone, inverse_l2=0.5, val_fraction=0.5, seed=3)
            torch.testing.assert_close(one.weight[0, 0], probes.weight[layer, unit])
            assert one.val_accuracy[0, 0] == probes.val_accuracy[layer, unit]
    order = list(range(24))
    random.Random(3).shuffle(order)
    held_out = torch.isin(activations.question, torch.tensor(order[:12]))
    x, y = activations.values[:, 1, 2].double(), activations.is_true
    theta = torch.tensor(logistic(x[~held_out].numpy(), y[~held_out].double().numpy(), 0.5))
    torch.testing.assert_close(probes.weight[1, 2], theta[:-1], rtol=1e-6, atol=1e-6)
    guess = x[held_out] @ theta[:-1] + theta[-1] > 0
    assert probes.val_accuracy[1, 2].item() == (guess == y[held_out]).double().mean().item()


def ranked(accuracy, kind="head"):
    accuracy = torch.tensor(accuracy, dtype=torch.float64)
    return Probes(torch.zeros(*accuracy.shape, 1), torch.zeros(accuracy.shape), accuracy, 0.5, 1, 1, kind)


def test_ties_go_to_the_lower_layer_then_unit():
    probes = ranked([[0.5, 0.75, 0.5], [0.75, 0.5, 1.0]])
    assert probes.ranking() == [(1, 2), (0, 1), (1, 0), (0, 0), (0, 2), (1, 1)]
    assert probes.top(3) == heads((0, 1), (1, 0), (1, 2))
    assert ranked([[0.1, 0.2]], "neuron").top(1) == neurons((0, 1))


@pytest.mark.parametrize("k", [0, -1, 7])
def test_top_k_is_bounded_by_the_model(k):
    probes = ranked([[0.5] * 3] * 2)
    assert len(probes.top(6)) == 6
    with pytest.raises(LocationError, match="1 to 6"):
        probes.top(k)


@pytest.mark.parametrize(("n", "fraction"), [(1, 0.25), (2, 0.1), (2, 0.9), (20, 0.01)])
def test_too_few_questions_to_split_raise(n, fraction):
    with pytest.raises(DataError, match="at least one question to fit on and one held out"):
        fit_probes(activations_of(n_questions=n), val_fraction=fraction)


def test_majority_is_that_of_the_held_out_examples():
    activations = activations_of()
    for is_true in (activations.is_true, ~activations.is_true):
        assert fit_probes(replace(activations, is_true=is_true)).majority == pytest.approx(2 / 3)


def test_probes_of_a_model(llama):
    """Heads and neurons of the tiny model, end to end."""
    for kind in ("head", "neuron"):
        activations = collect_activations(llama, QUESTIONS, kind=kind)
        probes = fit_probes(activations, kind=kind)
        assert probes.weight.shape == (2, *KINDS[kind].blocks(llama.shape))
        place = probes.top(5)
        assert place.kind == kind and len(place) == 5
        KINDS[kind].check(place, llama.shape)
        theta = iti_theta(activations)
        edit = iti_edit(llama, place, theta, alpha=3.0)
        assert edit.sites.keys() == llama.subspaces(place).keys()


# ITI


def test_mass_mean_by_hand():
    """theta = sigma u with u the unit vector from the false to the true mean, sigma the spread along it."""
    activations = activations_of()
    theta = iti_theta(activations)
    x, y = activations.values.double(), activations.is_true
    for layer in range(2):
        for unit in range(3):
            if (layer, unit) == (0, 1):
                continue  # true and false answers have the same mean there: no direction
            o = x[:, layer, unit]
            u = o[y].mean(0) - o[~y].mean(0)
            u = u / u.norm()
            along = o @ u
            sigma = ((along - along.mean()) ** 2).mean().sqrt()
            torch.testing.assert_close(theta[layer, unit].double(), sigma * u, rtol=1e-5, atol=1e-5)
            assert theta[layer, unit].norm().item() == pytest.approx(sigma.item(), rel=1e-5)
    assert (x[:, 1, 2][y] @ theta[1, 2].double()).mean() > (x[:, 1, 2][~y] @ theta[1, 2].double()).mean()


def test_sigma_comes_from_the_spread_set():
    activations = activations_of()
    spread = activations_of(n_questions=7, seed=1)
    theta, own = iti_theta(activations, spread), iti_theta(activations)
    u = own / own.norm(dim=-1, keepdim=True)
    sigma = torch.einsum("nluw,luw->nlu", spread.values, u).std(dim=0, correction=0)
    torch.testing.assert_close(theta, sigma.unsqueeze(-1) * u)
    scaled = iti_theta(activations, replace(spread, values=3 * spread.values + 100))
    torch.testing.assert_close(scaled, 3 * theta, rtol=1e-3, atol=1e-3)


def test_probe_direction():
    activations = activations_of()
    probes = fit_probes(activations)
    theta = iti_theta(activations, direction="probe", probes=probes)
    w = probes.weight / probes.weight.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(theta / theta.norm(dim=-1, keepdim=True), w.float())
    cosine = torch.cosine_similarity(theta[1, 2], iti_theta(activations)[1, 2], dim=0)
    assert cosine > 0.8, "the probe and the mean difference point the same way where the unit knows"
    with pytest.raises(TypeError, match="probes"):
        iti_theta(activations, direction="probe")


def test_random_directions_come_from_the_seed():
    activations = activations_of()
    torch_state = torch.random.get_rng_state()
    one, two, other = (iti_theta(activations, direction="random", seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert torch.equal(one, two) and not torch.allclose(one, other)
    u = one / one.norm(dim=-1, keepdim=True)
    along = torch.einsum("nluw,luw->nlu", activations.values, u)
    torch.testing.assert_close(one.norm(dim=-1), along.std(dim=0, correction=0))
    flat = u.flatten(0, 1)
    assert (flat @ flat.T - torch.eye(6)).abs().max() < 0.999, "units share a direction"


@pytest.mark.parametrize("direction", ["mass_mean", "random"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_a_unit_that_does_not_vary_gets_no_edit(direction, value):
    activations = activations_of()
    values = activations.values.clone()
    values[:, 0, 0] = value
    theta = iti_theta(replace(activations, values=values), direction=direction)
    assert theta.isfinite().all()
    assert theta[0, 0].abs().max() <= 1e-6 * value
    assert (theta.norm(dim=-1)[1] > 0.1).all()


@pytest.fixture(scope="module")
def theta(llama):
    return iti_theta(collect_activations(llama, QUESTIONS))


PLACE = heads((0, 1), (1, 0), (1, 3))


@pytest.mark.parametrize("positions", ["all", "answer"])
def test_the_edit_is_alpha_theta_inside_the_location(llama, theta, positions):
    edit = iti_edit(llama, PLACE, theta, alpha=7.5, positions=positions)
    assert edit.positions == positions
    for (kind, layer), e in edit.sites.items():
        assert kind == "heads" and e.c == 7.5 and not e.a.any()
        rows = e.b.view(llama.n_heads, -1)
        assert e.b.shape == (llama.width(Site(kind, layer)), 1)
        for head in range(llama.n_heads):
            inside = (layer, head) in PLACE.units
            assert torch.equal(rows[head], theta[layer, head] if inside else torch.zeros(llama.head_dim))


@pytest.mark.parametrize("positions", ["all", "answer"])
def test_alpha_moves_multiple_choice_kl_and_ce(tiny_model, positions):
    theta = iti_theta(collect_activations(tiny_model, FEW))
    forest = plant(tiny_model.tokenizer, Prompt(), [(q.text, q.answers) for q in FEW])
    text = DriftText(random_ids(3, 20))
    (base,) = measure_drift(tiny_model, text, None)
    reference = [x[0] for x in answer_log_probs(tiny_model, forest)]
    last = 0.0
    for alpha in (1.0, 5.0):
        bank = stack(tiny_model, [iti_edit(tiny_model, PLACE, theta, alpha=alpha, positions=positions)])
        sums = [x[0] for x in answer_log_probs(tiny_model, forest, bank)]
        scores = [question_scores(q, s, r) for q, s, r in zip(FEW, sums, reference, strict=True)]
        plain = [question_scores(q, r, r) for q, r in zip(FEW, reference, strict=True)]
        assert any(abs(x["mc2"] - y["mc2"]) > 1e-6 for x, y in zip(scores, plain, strict=True))
        assert all(abs(x["reward_margin"]) > 1e-4 for x in scores)
        (drift,) = measure_drift(tiny_model, text, bank)
        assert drift["kl"] > last + 1e-4
        assert abs(drift["ce"] - base["ce"]) > 1e-4
        last = drift["kl"]


def test_answer_positions_begin_at_the_last_prompt_token(tiny_model):
    """Against the shift added by hand, in rows of their own; behind a primer too."""
    theta = iti_theta(collect_activations(tiny_model, FEW))
    edits = [iti_edit(tiny_model, PLACE, theta, alpha=5.0, positions=positions) for positions in ("answer", "all")]
    for primer in ("", PRIMER):
        forest = plant(tiny_model.tokenizer, Prompt(primer=primer), [(q.text, q.answers) for q in FEW])
        got = answer_log_probs(tiny_model, forest, stack(tiny_model, edits))
        for k, edit in enumerate(edits):
            for x, expected in zip(got, forest_log_probs(tiny_model, forest, edit), strict=True):
                torch.testing.assert_close(x[k], expected, rtol=1e-5, atol=2e-5)
        assert all((x[0] - x[1]).abs().max() > 1e-3 for x in got), "both policies act alike"


def test_a_dead_head_gets_no_edit():
    """A head whose values are zero is silent; ITI leaves it alone."""
    lm = make_lm("llama", num_key_value_heads=4)
    with torch.no_grad():
        lm.model.layers[1].self_attn.v_proj.weight[:8] = 0
    model = wrap_model(lm, tokenizer())
    activations = collect_activations(model, FEW)
    assert not activations.values[:, 1, 0].any()
    for direction in ("mass_mean", "random"):
        theta = iti_theta(activations, direction=direction)
        assert not theta[1, 0].any() and theta[1, 1].any()
    probes = fit_probes(activations)
    assert not probes.weight[1, 0].any()
    theta = iti_theta(activations, direction="probe", probes=probes)
    assert not theta[1, 0].any()
