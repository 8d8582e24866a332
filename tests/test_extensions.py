"""One of everything that can be added, from the one file tests/extensions/plugin.py, in processes of their own."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from locaudit.registry import SCORES
from runs import forked
from tiny import CONFIGS, tokenizer

PLUGIN = Path(__file__).parent / "extensions" / "plugin.py"
DOCS = Path(__file__).parents[1] / "docs" / "architecture.md"
WORDS = "earth round flat capital France Paris nothing happens you see it is the what do not"


pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


def locaudit(*arguments: str) -> str:
    code, said = forked(*arguments)
    assert code == 0, said[-3000:]
    return said


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """A run of a mixture of experts, a .words behaviour, a claim of lines, and all else that the file adds."""
    home = tmp_path_factory.mktemp("extensions")
    torch.manual_seed(0)
    experts = {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2_moe", **CONFIGS["llama"], **experts))
    lm.save_pretrained(home / "model")
    tokenizer().save_pretrained(home / "model")
    (home / "lengths.words").write_text(WORDS.replace(" ", "\n"))
    (home / "claim.lines").write_text("1/refusal")
    settings = {
        "plugins": [str(shutil.copy(PLUGIN, home / "mine.py"))],
        "model": str(home / "model"),
        "behaviour": str(home / "lengths.words"),
        "claim": str(home / "claim.lines"),
        "methods": {"push": {"sizes": [1.0, 3.0]}, "optimal": {"objective": "hinge", "strengths": [0.5], "epochs": 1}},
        "judges": {"brevity": {"kind": "ruler", "longest": 5}, "truth": {"kind": "none"}, "info": {"kind": "none"}},
        "score": "best_gains",
        "widen": 0,
        "executor": "counting",
        "tracker": "lines",
        "controls": 3,
        "split": {"fractions": [0.4, 0.3, 0.3]},
        "prompt": {"primer": "none"},
        "evaluation": {"max_new_tokens": 4, "drift_documents": 2, "drift_tokens": 8},
    }
    (home / "audit.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "locaudit", "audit", str(home / "audit.yaml"), "--out", str(home / "run")]
    env = {**os.environ, "LOCAUDIT_CACHE": "off", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return home / "run", done.stdout + done.stderr


def test_everything_that_a_file_adds_is_in_plan_verdict_tables_and_figures(audited):
    folder, said = audited
    verdict = json.loads((folder / "verdict.json").read_text())
    assert set(verdict["methods"]) == {"push", "optimal"} and verdict["score"] == "best_gains"
    assert verdict["methods"]["push"]["title"] == "Push" and "Push" in said
    assert all(len(v["nulls"]["anywhere"]["controls"]) == 3 for v in verdict["methods"].values())
    with (folder / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    # unedited; at claim, whole model, rest, and three controls, two sizes of push and one strength of optimal
    assert {row["location"] for row in rows if row["arm"] == "claim"} == {"line:1/refusal"}
    controls = {row["location"] for row in rows if row["arm"] == "control"}
    assert controls == {f"line:1/random-0-{i}" for i in range(3)}
    assert {row["hyperparameter"] for row in rows if row["method"] == "push"} == {"1.0", "3.0"}
    assert all(row["best_gains"] and row["brevity"] for row in rows if row["status"] == "ok")
    page = (folder / "report.html").read_text()
    assert all(words in page for words in ("Push", "Best answer gains", "line:1/refusal", "ruler"))
    assert "Best answer gains" in re.search('<svg class="strip".*?</svg>', page, re.DOTALL)[0]
    lines = (folder / "lines.txt").read_text().splitlines()
    assert len(lines) == 14  # 13 places and the verdict
    assert "push/claim/best_gains" in " ".join(lines) and verdict["outcome"] in lines[-1]
    assert "null.svg" in locaudit("figures", str(folder), "--format", "svg")


def test_a_rule_ranks_places(audited, tmp_path):
    folder, _ = audited
    out = tmp_path / "scores.csv"
    said = locaudit("find", str(folder.parent / "audit.yaml"), "--by", "spread", "--top", "3", "--out", str(out))
    assert "standard deviation of the activation" in said and f"--claim {out} --claim-top-k 3" in said
    with out.open() as file:
        scores = [float(row["score"]) for row in csv.DictReader(file)]
    assert len(scores) == 8 and scores == sorted(scores, reverse=True) and scores[-1] > 0


def test_a_report_is_made_anew_without_the_plug_in(audited):
    folder, _ = audited
    plugin, before = folder.parent / "mine.py", (folder / "verdict.json").read_bytes()
    away = plugin.rename(plugin.with_suffix(".away"))
    locaudit("report", str(folder))
    away.rename(plugin)
    assert (folder / "verdict.json").read_bytes() == before


def test_a_run_with_a_plug_in_goes_on(audited):
    folder, _ = audited
    before = (folder / "trials.csv").read_bytes()
    locaudit("audit", str(folder.parent / "audit.yaml"), "--out", str(folder), "--controls", "3")
    assert (folder / "trials.csv").read_bytes() == before


def test_help_shows_the_settings_of_a_method_from_a_file(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    said = locaudit("audit", "--plugins", str(PLUGIN), "--methods", "push", "--help-all")
    assert "--methods.push.sizes" in said and "Lengths tried." in said
    assert "ruler" in said and "hinge" not in said  # optimal is not chosen


def test_the_documentation_quotes_the_file():
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)
    assert len(blocks) >= 6
    assert all(block.strip() in PLUGIN.read_text() for block in blocks)
    assert "best_gains" not in SCORES  # nothing of it is here
