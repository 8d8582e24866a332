"""The arithmetic of the benchmarks; that they run is `make bench-smoke`'s business."""

from __future__ import annotations

import json
import mmap
import sys

import bench.__main__
import bench.learning_rates
import bench.probe_tolerance
import bench.rounding
import bench.scaling
import pytest
from bench import command, harness
from bench.__main__ import TASKS, chosen, text
from bench.harness import Options, Outcome, Prepared, Round, Task, peak_bytes, report, reset_peak, run_round
from bench.scaling import exponent
from bench.sensitive_heads import sensitivities
from bench.work import Subject

from locaudit.behaviours.format import Prompt
from locaudit.errors import ModelError
from locaudit.studies.calibration.planted import plant_model

TASK = Task("work", "pairs", {}, tolerances={"sums": 0.01}, bars={("cpu", "all"): 3})
FACTS = {"ours": {"prepare_s": 1.0}, "peer": {"prepare_s": 2.0}}


def rounds(seconds, values, units=10):
    return [Round(s, 1, 100, 2**20, Outcome(units, values)) for s in seconds]


def compared(ours, peer):
    return report(TASK, "peer", Options(questions=5), {"ours": ours, "peer": peer}, FACTS)


def test_ratio_of_medians_and_range_of_rounds():
    found = compared(
        rounds([1.0, 2.0, 4.0], {"sums": [1.0, 2.0], "loss": [0.5]}),
        rounds([6.0, 8.0, 20.0], {"sums": [1.0, 2.009], "loss": [0.7]}),
    )
    assert found["ratio"] == 4.0 and found["ratio_range"] == [4.0, 6.0] and found["bar"] == 3
    assert found["sides"]["ours"]["units_per_s"] == 5.0 and found["sides"]["peer"]["tokens_per_s"] == 12.5
    assert found["sides"]["peer"]["prepare_s"] == 2.0 and found["sides"]["peer"]["peak_mb"] == 1.0
    assert found["same"]["sums"]["ok"] and found["same"]["sums"]["max_difference"] == pytest.approx(0.009)
    assert found["reported"]["loss"] == {"ours": [[0.5]] * 3, "peer": [[0.7]] * 3}
    lines = text(found)
    assert "ratio 4.0 (rounds 4.0 to 6.0, bar 3)" in lines and "same: sums, 2 values" in lines


def test_what_differs_is_said():
    ours = rounds([1.0], {"sums": [1.0]})
    for value in (1.5, float("nan")):
        found = compared(ours, rounds([1.0], {"sums": [value]}))
        assert not found["same"]["sums"]["ok"] and "NOT THE SAME" in text(found)
    with pytest.raises(RuntimeError, match="not the same work"):
        compared(ours, rounds([1.0], {"sums": [1.0]}, units=9))
    with pytest.raises(RuntimeError, match="ours has 1 values, the peer 2"):
        compared(ours, rounds([1.0], {"sums": [1.0, 2.0]}))
    with pytest.raises(RuntimeError, match="sums: a side did not report it"):
        compared(ours, rounds([1.0], {}))


def test_a_quick_side_runs_until_its_round_is_long_enough(monkeypatch):
    clock, seeds, counted = [0.0], [], [0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])

    def run(number):
        seeds.append(number)
        clock[0] += 1.0 + len(seeds)
        counted[0] += 7
        return Outcome(3, {"sums": [float(len(seeds))]})

    prepared = Prepared(run, None, check=lambda: {"loss": [0.5]})
    found = run_round(prepared, counted, False, 4, 9.0)
    assert (found.seconds, found.runs, found.tokens, seeds) == (3.0, 3, 7, [4, 4, 4]) and found.peak_bytes > 0
    assert found.outcome.values == {"sums": [3.0], "loss": [0.5]}
    found = run_round(prepared, counted, False, 5, 0.0)
    assert (found.seconds, found.runs) == (5.0, 1)


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (bench.__main__, ["training", "--out", "/nowhere/x.json"], "a file in a writable folder"),
        (bench.__main__, ["training", "--out", "."], "expected a file"),
        (bench.__main__, ["training", "--data", "/nowhere.csv"], "/nowhere.csv"),
        (bench.__main__, ["training", "--model", "random-8x7b"], "one of random-9m"),
        (bench.__main__, ["training", "--peer", "lm_eval"], "training with the peer 'lm_eval'; expected one of trl"),
        (bench.__main__, ["all", "--peer", "nobody"], "all with the peer 'nobody'; expected one of trl, lm_eval"),
        (bench.__main__, ["cooking"], "invalid choice 'cooking'"),
        (bench.__main__, ["training", "--rounds", "0"], "a positive whole number"),
        (bench.__main__, ["training", "--dtype", "int7"], "invalid choice 'int7'"),
        (bench.scaling, ["--device", "nonsense"], "device 'nonsense'"),
        (bench.scaling, ["--only", "colours"], "colours"),
        (bench.learning_rates, ["--train", "many"], "a positive whole number"),
        (bench.rounding, ["--questions", "1000"], "expected at most"),
        (bench.probe_tolerance, ["--questions", "0"], "a positive whole number"),
    ],
)
def test_bad_arguments_end_before_any_work(program, arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        command.run(program.main, program.Settings, program.__doc__, arguments)
    assert ended.value.code == 2 and message in " ".join(capsys.readouterr().err.replace("│", "").split())


def test_a_peer_of_some_tasks_runs_in_those(monkeypatch, capsys):
    assert [(task.name, peer) for task, peer in chosen("all", "trl")] == [("training", "trl"), ("auditing", "trl")]
    ran = []

    def compare(task, peer, options, **_):
        ran.append((task.name, peer, options.questions))
        return compared(rounds([1.0], {"sums": [1.0]}), rounds([2.0], {"sums": [1.0]}))

    monkeypatch.setattr(bench.__main__, "compare", compare)
    with pytest.raises(SystemExit) as ended:
        command.run(bench.__main__.main, bench.__main__.Settings, None, ["all", "--peer", "hook", "--smoke"])
    assert ended.value.code == 0
    assert ran == [("generating", "hook", TASKS["generating"].smoke)] and "ratio 2.0" in capsys.readouterr().out


def test_a_side_that_is_refused_says_why(monkeypatch):
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # a side's process prints to stderr
    options = Options(Subject(model="/nowhere"), questions=2)
    with pytest.raises(ModelError, match="got the path /nowhere, which does not exist"):
        harness._prepare(TASKS["multiple_choice"].sides["ours"], options)


def test_reports_hold_no_folder_of_ours(tmp_path):
    options = Options(Subject(data=str(tmp_path / "questions.csv"), model="org/name"))
    found = json.dumps(command.stated(options))
    assert str(tmp_path) not in found and "questions.csv" in found and "org/name" in found


def test_exponents():
    assert exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert exponent([1, 10, 100], [5, 5, 5]) == pytest.approx(0)


def test_peak_memory_sees_what_was_held_and_let_go():
    reset_peak(False)
    before = peak_bytes(False)
    with mmap.mmap(-1, 2**26) as held:  # not from malloc, which may still hold memory of earlier tests
        for page in range(0, 2**26, mmap.PAGESIZE):
            held[page] = 1
    assert peak_bytes(False) - before > 2**25


def test_only_the_planted_head_is_sensitive():
    planted = plant_model("misconception", 1, n_items=40, n_layers=3)
    found = sensitivities(planted.model, planted.behaviour.questions[:8], Prompt(), rank=4, seed=0)
    assert len(found) == planted.n_heads
    assert {unit for unit, norm in found.items() if norm > 0} == set(planted.places.units)
