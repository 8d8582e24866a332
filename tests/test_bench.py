"""The arithmetic of the benchmarks; that they run is `make bench-smoke`'s business."""

from __future__ import annotations

import multiprocessing
import os
import sys
from dataclasses import replace

import bench.__main__
import bench.grid
import bench.limits
import bench.means
import bench.scaling
import pytest
import torch
from bench import harness
from bench.__main__ import text
from bench.harness import Options, Outcome, Prepared, Task, _Record, peak_bytes, report, reset_peak
from bench.limits import Work, measure
from bench.scaling import exponent

TASK = Task("work", "pairs", {}, tolerances={"sums": 0.01}, bars={("cpu", "all"): 3})


def record(seconds, values, units=10, **more):
    return _Record(seconds=seconds, units=units, values=[values] * len(seconds), tokens=100, **more)


def test_ratio_of_medians_and_range_of_rounds():
    records = {
        "ours": record([1.0, 2.0, 4.0], {"sums": [1.0, 2.0], "loss": [0.5]}),
        "peer": record([6.0, 8.0, 20.0], {"sums": [1.0, 2.009], "loss": [0.7]}),
    }
    found = report(TASK, "peer", Options(), records)
    assert found["ratio"] == 4.0 and found["ratio_range"] == [4.0, 6.0] and found["bar"] == 3
    assert found["sides"]["ours"]["pairs_per_s"] == 5.0 and found["sides"]["peer"]["tokens_per_s"] == 12.5
    assert found["same"]["sums"]["ok"] and found["same"]["sums"]["max_difference"] == pytest.approx(0.009)
    assert found["reported"]["loss"] == {"ours": [[0.5]] * 3, "peer": [[0.7]] * 3}
    lines = text(found)
    assert "ratio 4.0 (rounds 4.0 to 6.0, bar 3)" in lines and "same: sums, 2 values" in lines


def test_what_differs_is_said():
    records = {"ours": record([1.0], {"sums": [1.0]}), "peer": record([1.0], {"sums": [1.5]})}
    found = report(TASK, "peer", Options(), records)
    assert not found["same"]["sums"]["ok"] and "NOT THE SAME" in text(found)
    with pytest.raises(RuntimeError, match="not the same work"):
        report(TASK, "peer", Options(), {**records, "peer": record([1.0], {"sums": [1.0]}, units=9)})
    with pytest.raises(RuntimeError, match="ours has 1 values, the peer 2"):
        report(TASK, "peer", Options(), {**records, "peer": record([1.0], {"sums": [1.0, 2.0]})})


def test_a_quick_side_runs_until_its_round_is_long_enough(monkeypatch):
    clock, seeds, counted = [0.0], [], [0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])

    def run(number):
        seeds.append(number)
        clock[0] += 1.0 + len(seeds)
        counted[0] += 7
        return Outcome(3, {"sums": [float(len(seeds))]})

    prepared = Prepared(run, None, check=lambda: {"loss": [0.5]})
    seconds, runs, tokens, peak, outcome = harness._round(prepared, 4, 9.0, counted, False)
    assert (seconds, runs, tokens, seeds) == (3.0, 3, 7, [4, 4, 4]) and peak > 0
    assert outcome.values == {"sums": [3.0], "loss": [0.5]}
    assert harness._round(prepared, 5, 0.0, counted, False)[:2] == (5.0, 1)


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (bench.__main__, ["training", "--out", "/nowhere/x.json"], "a folder that can be written to"),
        (bench.__main__, ["training", "--out", "."], "expected a file"),
        (bench.__main__, ["training", "--data", "/nowhere.csv"], "/nowhere.csv"),
        (bench.__main__, ["training", "--model", "random-8x7b"], "random- and one of 9m"),
        (bench.__main__, ["training", "--peer", "lm_eval"], "training has no peer 'lm_eval'; it has trl"),
        (bench.__main__, ["all", "--peer", "nobody"], "all has no peer 'nobody'; it has trl, lm_eval"),
        (bench.__main__, ["training", "--rounds", "0"], "a whole number from 1 on"),
        (bench.means, ["--questions", "-1"], "a whole number from 1 on"),
        (bench.scaling, ["--device", "nonsense"], "device 'nonsense'"),
        (bench.limits, ["--dtype", "int7"], "invalid choice: 'int7'"),
        (bench.grid, ["--preset", "bogus"], "invalid choice: 'bogus'"),
    ],
)
def test_bad_arguments_end_before_any_work(program, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_peer_of_some_tasks_runs_in_those(monkeypatch, capsys):
    ran = []

    def compare(task, peer, options, **_):
        ran.append((task.name, peer))
        records = {"ours": record([1.0], {}), "peer": record([2.0], {})}
        return report(replace(task, tolerances={}, unit="pairs"), "peer", options, records)

    monkeypatch.setattr(bench.__main__, "compare", compare)
    monkeypatch.setattr("sys.argv", ["bench", "all", "--peer", "hook", "--smoke"])
    assert bench.__main__.main() == 0
    assert ran == [("generating", "hook")] and "ratio 2.0" in capsys.readouterr().out


def test_a_side_that_is_refused_says_why(monkeypatch):
    here, there = multiprocessing.Pipe()
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # a worker sets its own
    harness._serve(there, "multiple_choice", "ours", Options(model="/nowhere"))
    with pytest.raises(SystemExit, match="error: got the path /nowhere, which does not exist"):
        harness._receive(here, "ours")


def test_exponents():
    assert exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert exponent([1, 10, 100], [5, 5, 5]) == pytest.approx(0)


def test_peak_memory_sees_what_was_held_and_let_go():
    reset_peak(False)
    before = peak_bytes(False)
    torch.ones(2**24)
    assert peak_bytes(False) - before > 2**25


def test_share_of_the_matrix_rate(llama):
    """Operations of a known product, against a machine of a known rate."""
    a, b = torch.ones(300, 200), torch.ones(200, 100)
    found = measure(llama, Work("product", "products", 1, lambda: a @ b), rate=1e9, band=1e9, rounds=3)
    assert found["gflop"] == pytest.approx(2 * 300 * 200 * 100 / 1e9)
    assert found["forwards"] == found["share_of_bandwidth"] == 0 and found["bound_by"] == "matrix rate"
    assert found["share"] == found["share_of_matrix_rate"] > 0
