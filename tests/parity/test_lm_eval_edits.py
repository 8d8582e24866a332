"""lm-evaluation-harness on the model under an edit: what it computes equals our slow twins."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from locaudit import cli
from locaudit.edits import Edit, load_edit
from locaudit.errors import LocationError
from locaudit.models import load_model, wrap_model
from locaudit.run.audit import run_audit
from locaudit.run.harness import edited_lm
from reference.generation import greedy
from reference.scoring import answer_log_prob
from runs import small_config
from tiny import heads, make_lm, neurons, random_edit, tokenizer

pytestmark = pytest.mark.parity

CONTEXTS = ("Is 3 more than 4? A:", "Is it?", "Well, is 11 more than 12 or not? Say it now. A:")
CHOICES = (" No.", " Yes, it is.", " 3")


@pytest.fixture(scope="module")
def model():
    return wrap_model(make_lm("llama", tie_word_embeddings=False, seed=3), tokenizer(), "talker")


def edit_of(model, positions):
    parts = (random_edit(model, heads((0, 1), (1, 2)), 0, scale=2.0), random_edit(model, neurons((0, 3)), 0, scale=2.0))
    return Edit({site: e for part in parts for site, e in part.sites.items()}, positions)


@pytest.mark.parametrize("positions", ["all", "answer", "prompt", "last"])
def test_requests_equal_the_twins(load, model, positions):
    load("lm_eval.models.huggingface")
    edit, tok = edit_of(model, positions), model.tokenizer
    lm = edited_lm(model, edit, batch_size=4)
    encoded = [(tok(c)["input_ids"], tok(a, add_special_tokens=False)["input_ids"]) for c in CONTEXTS for a in CHOICES]
    found = lm._loglikelihood_tokens([(("", ""), *pair) for pair in encoded], disable_tqdm=True)
    wanted = [answer_log_prob(model, *map(tuple, pair), edit) for pair in encoded]
    assert [score for score, _ in found] == pytest.approx(wanted, abs=1e-4)
    base = edited_lm(model, None)._loglikelihood_tokens([(("", ""), *pair) for pair in encoded], disable_tqdm=True)
    assert max(abs(x - y) for (x, _), y in zip(base, wanted, strict=True)) > 0.05, "the edit does nothing"
    instance = load("lm_eval.api.instance").Instance
    options = {"until": ["@@"], "max_gen_toks": 6, "do_sample": False}
    asked = [instance("generate_until", {}, (text, options), i) for i, text in enumerate(CONTEXTS)]
    for text, said in zip(CONTEXTS, lm.generate_until(asked, disable_tqdm=True), strict=True):
        twin = greedy(model, tuple(tok(text)["input_ids"]), edit, 6, {tok.eos_token_id})
        assert said == tok.decode([x for x in twin if x != tok.eos_token_id])
    assert torch.equal(model.lm(torch.tensor([[3, 4]])).logits, model.lm(torch.tensor([[3, 4]])).logits)


def test_long_requests_are_cut_where_the_harness_cuts_them(load, model):
    load("lm_eval.models.huggingface")
    edit, ids = edit_of(model, "answer"), torch.arange(40) % 50 + 2
    lm = edited_lm(model, edit, max_length=24)
    pair = ids[:30].tolist(), ids[30:].tolist()
    ((found, _),) = lm._loglikelihood_tokens([(("", ""), *pair)], disable_tqdm=True)
    assert found == pytest.approx(answer_log_prob(model, tuple(pair[0][15:]), tuple(pair[1]), edit), abs=1e-4)
    with pytest.raises(LocationError, match="subject"):
        edited_lm(model, edit_of(model, "subject"))._loglikelihood_tokens([(("", ""), *pair)], disable_tqdm=True)


def test_a_task_on_an_edit_of_a_run(load, tmp_path, capsys):
    """The command's accuracies are those of the twins, with an edit and without one."""
    load("lm_eval.utils")
    run_audit(small_config(tmp_path, methods=["optimal"], claim="0.1,1.2"), tmp_path / "run", progress=False)
    rows = [{"question": text, "choices": list(CHOICES), "label": i % 3} for i, text in enumerate(CONTEXTS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "datasets")}
    task = {
        "task": "ours", "dataset_path": "json", "dataset_kwargs": data, "test_split": "test", "target_delimiter": "",
        "output_type": "multiple_choice", "doc_to_text": "question", "doc_to_choice": "choices",
        "doc_to_target": "label", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "ours.yaml").write_text(yaml.safe_dump(task))
    model = load_model(str(tmp_path / "model"))
    tok, (file,) = model.tokenizer, [x for x in (tmp_path / "run" / "edits").iterdir() if x.name.startswith("claim")]
    for trial, edit in (("claim/optimal", load_edit(file)), ("unedited", None)):
        flags = [str(tmp_path / "run"), "--trial", trial, "--tasks", "ours", "--include", str(tmp_path / "tasks")]
        assert cli.main(["lm-eval", *flags, "--out", str(tmp_path / "out.json")]) == 0
        assert "|ours " in capsys.readouterr().out
        right = []
        for row in rows:
            context = tuple(tok(row["question"])["input_ids"])
            sums = [
                answer_log_prob(model, context, tuple(tok(x, add_special_tokens=False)["input_ids"]), edit)
                for x in CHOICES
            ]
            right.append(max(range(3), key=sums.__getitem__) == row["label"])
        acc = json.loads((tmp_path / "out.json").read_text())["results"]["ours"]["acc,none"]
        assert acc == pytest.approx(sum(right) / len(right))
