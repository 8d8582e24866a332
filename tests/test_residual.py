"""Forwards that begin at the lowest edited layer equal whole ones."""

from __future__ import annotations

import pytest
import torch

from locaudit.behaviours.format import Prompt
from locaudit.edits import stack
from locaudit.edits.hooks import entering, resumed
from locaudit.measure import residual
from locaudit.measure.forward import answer_log_probs
from locaudit.measure.residual import Residuals
from locaudit.measure.tree import plant
from reference.scoring import forest_log_probs
from reference.training import fit_edit
from tiny import heads, logits, neurons, random_edit, random_ids, tiny
from toy import PRIMER, QUESTIONS, Job, train, training_data

ROWS = [(q.text, q.answers) for q in QUESTIONS[:5]]


def upper_edits(model):
    """In the last layer only."""
    last = model.n_layers - 1
    return [
        random_edit(model, heads((last, 1), (last, 2)), 1),
        random_edit(model, neurons((last, 0), (last, 5)), 2, positions="answer"),
    ]


def n_forwards(model, layer, run):
    """How often the parts of a layer ran."""
    counted = []
    handle = model.projection(("heads", layer)).register_forward_hook(lambda *_: counted.append(1))
    try:
        run()
    finally:
        handle.remove()
    return len(counted)


@pytest.mark.parametrize("primer", ["", PRIMER])
def test_scores_equal_those_of_whole_forwards(tiny_model, primer):
    forest = plant(tiny_model.tokenizer, Prompt(primer=primer), ROWS)
    edits = upper_edits(tiny_model)
    bank = stack(tiny_model, edits)
    assert bank.lowest_layer == tiny_model.n_layers - 1
    residuals = Residuals(tiny_model, forest)
    found = answer_log_probs(tiny_model, forest, bank, residuals=residuals)
    for k, edit in enumerate(edits):
        for got, expected in zip(found, forest_log_probs(tiny_model, forest, edit), strict=True):
            torch.testing.assert_close(got[k], expected, rtol=2.4e-7, atol=1e-5)
    again = n_forwards(tiny_model, 0, lambda: answer_log_probs(tiny_model, forest, bank, residuals=residuals))
    assert again == 0
    # With positions in the first layer, everything runs.
    low = stack(tiny_model, [random_edit(tiny_model, heads((0, 0)), 1)])
    assert n_forwards(tiny_model, 0, lambda: answer_log_probs(tiny_model, forest, low, residuals=residuals)) > 0


@pytest.mark.parametrize("primer", ["", PRIMER])
@pytest.mark.parametrize("batching", ["question", "pair"])
def test_training_equals_the_slow_twin(tiny_model, primer, batching):
    data = training_data(tiny_model, QUESTIONS[:4], primer)
    location, job = heads((1, 0), (1, 3)), {"strength": 0.3, "seed": 4, "learning_rate": 0.05}
    settings = {"objective": "ipo", "reduction": "sum", "reader": "layer", "batching": batching}
    settings |= {"batch_size": 2, "epochs": 1, "max_grad_norm": 1.0}
    whole = n_forwards(tiny_model, 0, lambda: train(tiny_model, data, [Job(heads((0, 0)), **job)], **settings))
    fits = []
    upper = n_forwards(tiny_model, 0, lambda: fits.extend(train(tiny_model, data, [Job(location, **job)], **settings)))
    assert upper < whole
    edit, losses = fit_edit(tiny_model, data, Job(location, **job), **settings)
    assert fits[0].losses == pytest.approx(losses, rel=1e-4)
    for site, expected in edit.sites.items():
        torch.testing.assert_close(fits[0].edit.sites[site].b, expected.b, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(fits[0].edit.sites[site].a, expected.a, rtol=1e-3, atol=1e-4)


def test_kept_streams_serve_later_calls(llama):
    data = training_data(llama, QUESTIONS[:4])
    residuals = Residuals(llama, data.forest)
    jobs = [Job(heads((1, 0)), 0.3, 1)]
    (first,) = train(llama, data, jobs, residuals=residuals)
    fits = []
    assert n_forwards(llama, 0, lambda: fits.extend(train(llama, data, jobs, residuals=residuals))) == 0
    assert fits[0].losses == first.losses


def test_a_stream_does_not_depend_on_what_was_read_before(llama):
    model = tiny("llama")
    forest = plant(model.tokenizer, Prompt(primer=PRIMER), ROWS)
    kept = Residuals(model, forest)
    fresh = kept.start(1, [[0, 3]], 99)
    kept._at.cache_clear()
    kept.start(1, [[2]], 99)
    later = kept.start(1, [[0, 3]], 99)
    assert torch.equal(fresh.hidden, later.hidden) and torch.equal(fresh.prefix, later.prefix)


def test_the_budget_is_kept(llama):
    forest = plant(llama.tokenizer, Prompt(), ROWS)
    layer_bytes = forest.n_tokens * 32 * 4
    assert Residuals(llama, forest, budget_bytes=layer_bytes - 1).start(1, [[0]], 99) is None
    one = Residuals(llama, forest, budget_bytes=layer_bytes)
    assert one.start(1, [[0]], 99) is not None and one.start(0, [[0]], 99) is None
    assert one._at.cache_info().currsize == 1


def test_an_architecture_that_cannot_resume_runs_whole(llama, monkeypatch):
    forest = plant(llama.tokenizer, Prompt(), ROWS)
    monkeypatch.setitem(residual._RESUMABLE, llama, False)
    bank = stack(llama, upper_edits(llama))
    residuals = Residuals(llama, forest)
    assert residuals.start(1, [[0]], 99) is None
    expected = answer_log_probs(llama, forest, bank)
    for got, want in zip(answer_log_probs(llama, forest, bank, residuals=residuals), expected, strict=True):
        assert torch.equal(got, want)


def test_leaving_restores_the_layers(tiny_model):
    ids = random_ids(2, 9)
    before = logits(tiny_model, ids)
    hidden = entering(tiny_model, 1, lambda: logits(tiny_model, ids))
    with resumed(tiny_model, 1, hidden):
        assert torch.equal(logits(tiny_model, torch.zeros_like(ids)), before)
    assert torch.equal(logits(tiny_model, ids), before)
    with pytest.raises(ZeroDivisionError), resumed(tiny_model, 1, hidden):
        raise ZeroDivisionError
    assert torch.equal(logits(tiny_model, ids), before)
    assert "forward" not in vars(tiny_model.layer(0))


def test_a_forward_that_a_layer_has_of_its_own_comes_back(llama):
    """Accelerate keeps its own there."""
    ids = random_ids(2, 9)
    layer, calls = llama.layer(0), []
    plain = layer.forward

    def own(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs)

    hidden = entering(llama, 1, lambda: logits(llama, ids))
    layer.forward = own
    try:
        with resumed(llama, 1, hidden):
            logits(llama, ids)
        assert not calls and layer.forward is own
    finally:
        del layer.forward
