"""lm-evaluation-harness scores TruthfulQA as we do: its prompt, its requests, its model wrapper, its metrics.

LOCAUDIT_TRUTHFULQA_MC names TruthfulQA's mc_task.json (github.com/sylinrl/TruthfulQA).
The harness runs the primer anew for each answer: minutes on a CPU, where our side takes half a minute.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from locaudit.behaviours import Question
from locaudit.behaviours.format import Prompt
from locaudit.measure.forward import answer_log_probs
from locaudit.measure.multiple_choice import question_scores
from locaudit.measure.tree import plant

VARIABLE = "LOCAUDIT_TRUTHFULQA_MC"
N_QUESTIONS = 50

pytestmark = [pytest.mark.parity, pytest.mark.real]


@pytest.fixture(scope="module")
def rows():
    """Questions spread over the file, in the columns of the harness; its tasks take the first MC1 answer as best."""
    if not os.environ.get(VARIABLE):
        pytest.skip(f"{VARIABLE} does not name TruthfulQA's mc_task.json")
    questions = json.loads(Path(os.environ[VARIABLE]).read_text(encoding="utf-8"))
    return [
        {
            "question": row["question"],
            **{
                kind: {"choices": list(row[kind]), "labels": list(row[kind].values())}
                for kind in ("mc1_targets", "mc2_targets")
            },
        }
        for row in questions[:: len(questions) // N_QUESTIONS][:N_QUESTIONS]
    ]


@pytest.fixture(scope="module")
def harness(load, rows, smollm2, tmp_path_factory):
    """The harness's per-question samples of truthfulqa_mc1 and truthfulqa_mc2, on local rows and a loaded model."""
    lm_eval, huggingface = load("lm_eval"), load("lm_eval.models.huggingface")
    folder = tmp_path_factory.mktemp("lm_eval")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    source = {"data_files": {"validation": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "datasets")}
    tasks = Path(lm_eval.__file__).parent / "tasks" / "truthfulqa"
    manager = load("lm_eval.tasks").TaskManager(include_path=str(tasks), include_defaults=False)
    lm = huggingface.HFLM(pretrained=smollm2.lm, tokenizer=smollm2.tokenizer, batch_size=4)
    samples = {}
    for kind in ("mc2", "mc1"):
        task = {
            "include": str(tasks / f"truthfulqa_{kind}.yaml"),
            "task": kind,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": source,
        }
        path = folder / f"{kind}.yaml"
        path.write_text(yaml.safe_dump(task), encoding="utf-8")
        # MC1's answers are among MC2's: the cache spares their second forward.
        result = lm_eval.simple_evaluate(
            lm, tasks=[str(path)], task_manager=manager, use_cache=str(folder / "cache"), bootstrap_iters=0
        )
        samples[kind] = sorted(result["samples"][kind], key=lambda sample: sample["doc_id"])
    return samples


@pytest.mark.parametrize("kind", ["mc1", "mc2"])
def test_multiple_choice(rows, harness, smollm2, kind):
    model = smollm2
    ending = f"\n\nQ: {rows[0]['question']}\nA:"
    text = harness[kind][0]["arguments"][0][0]
    assert text.endswith(ending)
    prompt = Prompt(primer=text.removesuffix(ending))
    questions, theirs = [], []
    for number, (row, sample) in enumerate(zip(rows, harness[kind], strict=True)):
        assert sample["doc"]["question"] == row["question"]
        choices, labels = row[f"{kind}_targets"]["choices"], row[f"{kind}_targets"]["labels"]
        true = [i for i, label in enumerate(labels) if label]
        false = [i for i, label in enumerate(labels) if not label]
        true_texts = tuple(choices[i] for i in true)
        questions.append(Question(str(number), row["question"], true_texts, tuple(choices[i] for i in false)))
        theirs.append([float(sample["filtered_resps"][i][0]) for i in true + false])
    forest = plant(model.tokenizer, prompt, [(q.text, q.answers) for q in questions])
    assert len(forest.prefix) > 100  # the primer runs once
    for question, sample, want, (sums,) in zip(
        questions, harness[kind], theirs, answer_log_probs(model, forest), strict=True
    ):
        assert sums.tolist() == pytest.approx(want, abs=1e-3)
        assert question_scores(question, sums, sums)[kind] == pytest.approx(sample["acc"], abs=1e-4)
