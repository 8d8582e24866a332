"""Examples in the documentation are read and run as they stand there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from locaudit import cli
from locaudit.behaviours import load_behaviour
from locaudit.claims import read_claim

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(
        rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


EXAMPLES = [*blocks("guide.md", "csv"), *blocks("guide.md", "json")]


@pytest.mark.parametrize("text", EXAMPLES, ids=lambda text: text[:12])
def test_examples_of_behaviours_are_read(text, tmp_path):
    suffix = ".csv" if text.startswith("Type,") else ".json" if text.startswith("[") else ".jsonl"
    file = tmp_path / f"mine{suffix}"
    file.write_text(text, encoding="utf-8")
    (question,) = load_behaviour(str(file)).questions
    assert question.true and question.false


def test_every_format_has_an_example():
    assert len(EXAMPLES) == 6  # TruthfulQA, JSONL, A/B, preferences as texts and as messages, CounterFact


def run_scores(model, folder, monkeypatch):
    """Run the example for transformer-lens with `model`; returns the claim that its file gives."""
    monkeypatch.chdir(folder)
    (code,) = [text for text in blocks("claims.md", "python") if "run_with_cache" in text]
    exec(code, {"model": model})
    return read_claim("scores.npy", top_k=2).location


def test_scores_of_transformer_lens_are_a_claim(tmp_path, monkeypatch):
    z = torch.zeros(3, 1, 5, 4, 8)  # layers x (batch, tokens, heads, d_head)
    z[1, :, -1, 2], z[2, :, -1, 0] = 1.0, 2.0
    cache = {f"blocks.{i}.attn.hook_z": z[i] for i in range(3)}
    model = SimpleNamespace(cfg=SimpleNamespace(n_layers=3), run_with_cache=lambda text: (None, cache))
    assert run_scores(model, tmp_path, monkeypatch).units == ((1, 2), (2, 0))


def test_a_table_of_scores_is_a_claim(tmp_path):
    (text,) = blocks("claims.md", "csv")
    (tmp_path / "scores.csv").write_text(text)
    assert read_claim(tmp_path / "scores.csv", top_k=2).location.units == ((14, 3), (15, 7))


def test_completion_in_bash():
    script = next(text for text in blocks("guide.md", "bash") if "complete -" in text)
    asked = [("locaudit", "ex"), ("locaudit", "judge", "sa"), ("locaudit", "export", "--tr")]
    calls = "\n".join(
        f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _locaudit; echo ${{COMPREPLY[*]}}"
        for words in asked
    )
    program = f'locaudit() {{ {sys.executable} -m locaudit "$@"; }}\n{script}\n{calls}'
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["export", "sample", "--trial"]


def test_examples_are_checked_from_the_command_line(tmp_path, capsys):
    file = tmp_path / "mine.jsonl"
    row = next(text for text in EXAMPLES if text.startswith('{"question"'))
    file.write_text("".join(row.replace("the moon", f"moon {i}") for i in range(10)))
    assert cli.main(["behaviour", "check", str(file)]) == 0
    assert "10 in 10 groups" in capsys.readouterr().out
