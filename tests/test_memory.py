"""Bank sizes from memory, and an audit on a device that runs out of it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import astuple, replace

import pytest
import torch

import locaudit.run.banks as banks
from locaudit import memory
from locaudit.errors import ModelError
from locaudit.lean import Again
from locaudit.memory import (
    free_bytes,
    is_out_of_memory,
    kept_bytes,
    part_tokens,
    room,
    run_again,
    scoring_bank,
    training_bank,
)
from locaudit.run import worker as trial
from locaudit.run.audit import run_audit
from locaudit.store import read_run
from runs import small_config


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("inputs")


def test_a_part_keeps_a_share_of_the_weights(llama):
    model = llama
    tokens = [part_tokens(model, lowest) for lowest in range(model.n_layers)]
    assert tokens == sorted(tokens)
    weights = sum(p.nbytes for p in model.lm.parameters())
    assert tokens[0] == max(64, int(memory.LEAN * weights / (kept_bytes(model).plain * model.n_layers)))


def test_what_a_token_keeps_is_what_stays_in_memory(tiny_model, monkeypatch):
    """Estimated from above for fewer tokens: masks, and weights where attention holds them, grow with their square."""
    kept, n = kept_bytes(tiny_model), 40
    assert 0 < kept.lean <= kept.attention < kept.plain
    layers = range(tiny_model.n_layers)
    wanted = ((Again(), kept.plain), (Again(layers), kept.attention), (Again(layers, layers), kept.lean))
    for again, expected in wanted:
        few, many = (memory._held_bytes(tiny_model, size, again=again) for size in (n // 2, n))
        a_token = (many - few) / (n // 2 * tiny_model.n_layers)
        assert 0.4 * expected < a_token <= 1.01 * expected
    if tiny_model.config.model_type == "llama":
        held = memory._held_bytes(tiny_model, n)
        monkeypatch.setattr(memory, "lean", lambda *_: nullcontext())
        whole = memory._held_bytes(tiny_model, n)
        assert whole - held == 4 * n * tiny_model.n_layers * tiny_model.n_units("neurons")  # act(g)


@pytest.mark.parametrize("cached", [False, True])
def test_of_a_longer_question_as_little_runs_again_as_must(llama, cached):
    kept, n_layers, limit = kept_bytes(llama), llama.n_layers, 100
    saved = (0 if cached else kept.plain - kept.attention, kept.attention - kept.lean)
    for lowest in range(n_layers):
        assert run_again(llama, limit, limit, lowest, cached=cached) == Again()
        held = limit * (n_layers - lowest) * kept.plain
        for n_tokens in (101, 120, 150, 10_000):
            again = run_again(llama, n_tokens, limit, lowest, cached=cached)
            assert all(not part or (part.start, part.stop <= n_layers) == (lowest, True) for part in astuple(again))

            def keeps(n_attention, n_mlps, n_tokens=n_tokens, lowest=lowest):
                return n_tokens * ((n_layers - lowest) * kept.plain - n_attention * saved[0] - n_mlps * saved[1])

            n_attention, n_mlps = map(len, astuple(again))
            assert keeps(n_attention, n_mlps) <= held or n_mlps == n_layers - lowest
            if n_mlps:
                assert keeps(n_attention, n_mlps - 1) > held and n_attention == (0 if cached else n_layers - lowest)
            else:
                assert keeps(n_attention - 1, 0) > held


def test_a_part_has_room_for_what_runs_again(llama, monkeypatch):
    kept = kept_bytes(llama)
    assert room(llama, 100) == min(int(100 * kept.plain / kept.attention), 160)
    assert room(llama, 100, cached=True) == 100 and room(llama, 500) == 500
    monkeypatch.setattr(memory, "AGAIN_TOKENS", {})
    assert room(llama, 100) == 100


def test_a_bank_fills_the_device(llama, monkeypatch):
    assert free_bytes(llama.device) > 0
    assert training_bank(llama, 100) == 1  # a CPU is full with one edit's questions
    monkeypatch.setitem(memory.FULL_TOKENS, "cpu", 512)
    assert training_bank(llama, 512) == 1 and training_bank(llama, 100) == 6
    assert training_bank(llama, 1) == memory.MAX_BANK
    need = max(kept_bytes(llama, kind).plain for kind in ("heads", "neurons")) * llama.n_layers * 100
    monkeypatch.setattr(memory, "free_bytes", lambda _: 6.5 * need)
    assert training_bank(llama, 100) == 3  # half of the free memory
    monkeypatch.setattr(memory, "free_bytes", lambda _: 0)
    assert training_bank(llama, 100) == 1
    assert scoring_bank(llama) == 4


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
    real, sizes = banks.run_trials, []

    def cramped(shared, specs, on_step=None):
        sizes.append(len(specs))
        if len(specs) > 1 and specs[0].method == "optimal":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(shared, specs, on_step)

    monkeypatch.setattr(banks, "run_trials", cramped)
    run_audit(config, tmp_path / "cramped", progress=True)
    assert "out of memory with 2 edits at once: going on with 1" in capsys.readouterr().err
    assert sizes.count(4) == 1 and sizes.count(1) == 7  # ITI's controls fit; what did not is tried once
    assert rows(tmp_path / "room").keys() == rows(tmp_path / "cramped").keys()
    for key, metrics in rows(tmp_path / "room").items():
        for name, values in metrics.items():
            assert rows(tmp_path / "cramped")[key][name] == pytest.approx(values, abs=1e-4), (key, name)


def test_edits_are_not_trained_again_when_scoring_runs_out(home, tmp_path, monkeypatch):
    score, fit, trained = trial._score, trial.train, []

    def cramped(shared, specs, edits):
        if len(specs) > 1 and specs[0].method == "optimal":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return score(shared, specs, edits)

    def counted(model, data, jobs, **settings):
        trained.extend(jobs)
        return fit(model, data, jobs, **settings)

    monkeypatch.setattr(trial, "_score", cramped)
    monkeypatch.setattr(trial, "train", counted)
    changes = {"controls": 4, "optimal": {"strengths": [0.2], "bank_size": 4}, "evaluation": {"bank_size": 4}}
    run_audit(small_config(home, **changes), tmp_path / "run", progress=False)
    assert len(trained) == 6 == sum(method == "optimal" for _, _, method, _ in rows(tmp_path / "run"))


def test_shorter_batches_when_one_edit_is_too_much(home, tmp_path, monkeypatch):
    real, seen = banks.run_trials, []

    def cramped(shared, specs, on_step=None):
        seen.append(shared.row_tokens)
        if shared.row_tokens is None or shared.row_tokens > 100:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return real(shared, specs, on_step)

    monkeypatch.setattr(banks, "run_trials", cramped)
    run_audit(small_config(home), tmp_path / "a", progress=False)
    assert seen[:4] == [None, 320, 160, 80] and set(seen[4:]) == {80}  # tried once
    with read_run(tmp_path / "a") as store:
        assert len(store.records()) == store.fact("run")["planned"]


def test_no_memory_at_all_is_an_error_that_says_so(home, tmp_path, monkeypatch):
    def full(*_args, **_keywords):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(banks, "run_trials", full)
    with pytest.raises(ModelError, match="without memory for one edit"):
        run_audit(small_config(home), tmp_path / "a", progress=False)


def test_other_errors_are_not_taken_for_it(home, tmp_path, monkeypatch):
    def broken(*_args, **_keywords):
        raise RuntimeError("size mismatch")

    monkeypatch.setattr(banks, "run_trials", broken)
    with pytest.raises(RuntimeError, match="size mismatch"):
        run_audit(small_config(home), tmp_path / "a", progress=False)


def test_open_bank_sizes_are_filled_in_and_not_part_of_a_trial(home, tmp_path):
    """Trials have the same ids whatever the machine's memory."""
    config = small_config(home)
    open_config = replace(
        config,
        optimal=replace(config.optimal, bank_size=None),
        evaluation=replace(config.evaluation, bank_size=None),
    )
    run_audit(open_config, tmp_path / "a", progress=False)
    with read_run(tmp_path / "a") as store:
        assert store.config.optimal.bank_size is None
        assert len(store.records()) == store.fact("run")["planned"]
