"""Bank sizes from memory, and an audit on a device that runs out of it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from locaudit.behaviours.format import Prompt
from locaudit.errors import ModelError
from locaudit.location import Location
from locaudit.measure.residual import Residuals
from locaudit.measure.tree import plant
from locaudit.models import memory
from locaudit.models.memory import copies_that_fit, is_out_of_memory
from locaudit.registry import METHODS
from locaudit.run import audit, banks, worker
from locaudit.run.audit import run_audit
from locaudit.store.folder import read_run
from runs import small_config
from toy import QUESTIONS


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("inputs")


def test_as_many_edits_fit_as_half_of_the_free_memory_holds(llama, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda _: 6500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 1100)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    ran = []
    assert copies_that_fit(llama, lambda: ran.append(1)) == 3 and ran == [1]

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    assert copies_that_fit(llama, full) == 0
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        copies_that_fit(llama, lambda: torch.zeros(2) @ torch.zeros(3))


def test_open_bank_sizes_follow_the_device(llama, home, monkeypatch):
    """One edit on a CPU; on a GPU one of the whole model is tried, on the longest questions."""
    config = small_config(home, optimal={"bank_size": None, "batch_size": 2}, evaluation={"bank_size": None})
    train = plant(llama.tokenizer, Prompt(), [(q.text, q.answers) for q in QUESTIONS])
    assert banks.bank_sizes(config, llama, train) == (1, 4)
    tried, optimal = [], METHODS["optimal"]

    def noted(shared, jobs, settings):
        shared.model = llama
        (found,) = optimal.fitter(shared, jobs, settings)
        tried.append((jobs[0].location, [len(tree) for tree in shared.training.forest.trees], len(found.losses)))

    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(banks, "Residuals", lambda _, forest: Residuals(llama, forest))
    with METHODS.temporary("optimal", replace(optimal, fit=noted)):
        for fitting, filling, expected in ((3, 10**6, 3), (0, 10**6, 1), (10**6, 1, 1), (10**6, 10**6, banks.MAX_BANK)):
            monkeypatch.setattr(banks, "copies_that_fit", lambda _, work, n=fitting: (work(), n)[1])
            monkeypatch.setitem(banks.PART_TOKENS, "cuda", filling)
            assert banks.bank_sizes(config, on_gpu, train) == (expected, 32)
    ((place, lengths, n_steps), *_) = tried
    assert place == Location.whole() and n_steps == 1
    assert lengths == sorted(map(len, train.trees))[-2:]


def test_what_a_failed_allocation_looks_like():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("size mismatch")) and not is_out_of_memory(ValueError("out of memory"))


def rows(folder):
    with read_run(folder) as store:
        return {(r.spec.arm, r.spec.control, r.spec.method, r.spec.hyperparameter): r.metrics for r in store.records()}


def test_fewer_edits_at_once_where_memory_runs_out(home, tmp_path, monkeypatch, capsys):
    """No trial is lost, and the scores are those of an audit with room."""
    changes = {"controls": 4, "optimal": {"strengths": [0.2], "bank_size": 4}, "evaluation": {"bank_size": 4}}
    config = small_config(home, **changes)
    run_audit(config, tmp_path / "room", progress=False)
    real, sizes = worker.run_trials, []

    def cramped(shared, specs, on_step=None):
        sizes.append(len(specs))
        if len(specs) > 1 and specs[0].method == "optimal":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(shared, specs, on_step)

    monkeypatch.setattr(worker, "run_trials", cramped)
    run_audit(config, tmp_path / "cramped", progress=True)
    assert "out of memory with 2 edits at once: going on with 1" in capsys.readouterr().err
    assert sizes.count(4) == 1 and sizes.count(1) == 7  # ITI's controls fit; what did not is tried once
    assert rows(tmp_path / "room").keys() == rows(tmp_path / "cramped").keys()
    for key, metrics in rows(tmp_path / "room").items():
        for name, values in metrics.items():
            assert rows(tmp_path / "cramped")[key][name] == pytest.approx(values, abs=1e-4), (key, name)


def test_edits_are_not_trained_again_when_scoring_runs_out(home, tmp_path, monkeypatch):
    score, optimal, trained = worker._score, METHODS["optimal"], []

    def cramped(shared, specs, edits):
        if len(specs) > 1 and specs[0].method == "optimal":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return score(shared, specs, edits)

    def counted(shared, jobs, *settings):
        trained.extend(jobs)
        return optimal.fitter(shared, jobs, *settings)

    monkeypatch.setattr(worker, "_score", cramped)
    changes = {"controls": 4, "optimal": {"strengths": [0.2], "bank_size": 4}, "evaluation": {"bank_size": 4}}
    with METHODS.temporary("optimal", replace(optimal, fit=counted)):
        run_audit(small_config(home, **changes), tmp_path / "run", progress=False)
    assert len(trained) == 6 == sum(method == "optimal" for _, _, method, _ in rows(tmp_path / "run"))


def test_shorter_batches_when_one_edit_is_too_much(home, tmp_path, monkeypatch):
    real, seen = worker.run_trials, []

    def cramped(shared, specs, on_step=None):
        seen.append(shared.row_tokens)
        if shared.row_tokens is None or shared.row_tokens > 100:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return real(shared, specs, on_step)

    monkeypatch.setattr(worker, "run_trials", cramped)
    run_audit(small_config(home), tmp_path / "a", progress=False)
    assert seen[:4] == [None, 320, 160, 80] and set(seen[4:]) == {80}  # tried once
    with read_run(tmp_path / "a") as store:
        assert len(store.records()) == store.manifest.planned


def test_no_memory_at_all_is_an_error_that_says_so(home, tmp_path, monkeypatch):
    def full(*_args, **_keywords):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(worker, "run_trials", full)
    with pytest.raises(ModelError, match="without memory for one edit"):
        run_audit(small_config(home), tmp_path / "a", progress=False)


def test_other_errors_are_not_taken_for_it(home, tmp_path, monkeypatch):
    def broken(*_args, **_keywords):
        raise RuntimeError("size mismatch")

    monkeypatch.setattr(worker, "run_trials", broken)
    with pytest.raises(RuntimeError, match="size mismatch"):
        run_audit(small_config(home), tmp_path / "a", progress=False)


def test_open_bank_sizes_are_filled_in_and_not_part_of_a_trial(home, tmp_path, monkeypatch):
    """Trials have the same ids whatever the machine's memory; a run that goes on keeps its banks."""
    config = small_config(home)
    open_config = replace(
        config,
        methods={**config.methods, "optimal": replace(config.methods["optimal"], bank_size=None)},
        evaluation=replace(config.evaluation, bank_size=None),
    )
    run_audit(open_config, tmp_path / "a", progress=False)
    with read_run(tmp_path / "a") as store:
        assert store.config.methods["optimal"].bank_size is None
        assert store.manifest.banks == {"cpu": (1, 4)}
        assert len(store.records()) == store.manifest.planned
        before = store.done()
    monkeypatch.setattr(audit, "bank_sizes", lambda *_: pytest.fail("tried again"))
    run_audit(open_config, tmp_path / "a", progress=False)
    monkeypatch.setattr(audit, "bank_sizes", lambda *_: (7, 9))
    run_audit(open_config, tmp_path / "b", progress=False)
    with read_run(tmp_path / "b") as store:
        assert store.manifest.banks == {"cpu": (7, 9)} and store.done() == before
