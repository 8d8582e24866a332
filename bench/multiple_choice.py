"""Speed of answer log-probabilities: locaudit, against lm-evaluation-harness's ``truthfulqa_mc2`` on the same model.

Both sides score every answer of every question under the unedited model after the harness's own primer. Tokenising is
timed. The harness runs without its cache and its bootstrap, and keeps its samples, from which log-probabilities are
read. It gets these advantages: the model and the list of its tasks are loaded before the clock starts, and after the
warm-up its data set is in the cache of `datasets`.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import logging
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path

import jinja2
import yaml

from bench.harness import Options, Outcome, Prepared, Task
from bench.work import Prompt, Question, grow, log_probs, score_questions

THEIR_TASK = "truthfulqa_mc2"


def ours(options: Options) -> Prepared:
    """`answer_log_probs`: one answer tree per question, after a primer that runs once."""
    model, asked = options.load()
    prompt = Prompt(primer=_primer())

    def run(_: int) -> Outcome:
        sums = log_probs(model, grow(model, asked, prompt))[0]
        return _outcome([x.tolist() for x in sums], score_questions(asked, sums, sums)["mc2"])

    return Prepared(run, model.lm)


def lm_eval(options: Options) -> Prepared:
    """`lm_eval.simple_evaluate` on local data: one row (primer, question, answer) per answer."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model, asked = options.load()
    folder = tempfile.TemporaryDirectory()
    task = _write_task(Path(folder.name), asked)
    manager = TaskManager(include_path=str(_task_folder()), include_defaults=False)
    lm = HFLM(pretrained=model.lm, tokenizer=model.tokenizer, batch_size=options.peer_batch or 8)

    def run(_: int, folder=folder) -> Outcome:  # the folder lives as long as the function
        with redirect_stderr(io.StringIO()):  # progress bars
            result = lm_eval.simple_evaluate(
                lm, tasks=[str(task)], task_manager=manager, bootstrap_iters=0, use_cache=None, cache_requests=False
            )
        samples = sorted(result["samples"]["mc2"], key=lambda sample: sample["doc_id"])
        rows = [[float(response[0]) for response in sample["filtered_resps"]] for sample in samples]
        return _outcome(rows, [float(sample["acc"]) for sample in samples])

    return Prepared(run, model.lm)


def _outcome(rows: Sequence[Sequence[float]], mc2: Sequence[float]) -> Outcome:
    flat = [value for row in rows for value in row]
    return Outcome(len(flat), {"log_probs": flat, "mc2": list(mc2)})


def _task_folder() -> Path:
    """The folder of the harness's TruthfulQA tasks, found without importing it."""
    return Path(str(importlib.metadata.distribution("lm_eval").locate_file("lm_eval/tasks/truthfulqa")))


def _primer() -> str:
    """The primer, extracted from the Jinja template of the harness's MC1 task, which the MC2 task includes."""
    task = yaml.safe_load((_task_folder() / "truthfulqa_mc1.yaml").read_text(encoding="utf-8"))
    text = jinja2.Template(task["doc_to_text"], keep_trailing_newline=True).render(question="?")
    ending = "\n\nQ: ?\nA:"
    if not text.endswith(ending):
        raise RuntimeError(f"got the prompt {text!r} from lm_eval, expected one that ends with {ending!r}")
    return text.removesuffix(ending)


def _write_task(folder: Path, asked: tuple[Question, ...]) -> Path:
    """Write a copy of the harness's task that uses our questions, true answers first. Returns its path."""
    rows = []
    for q in asked:
        targets = {"choices": list(q.answers), "labels": [1] * len(q.true) + [0] * len(q.false)}
        rows.append({"question": q.text, "mc1_targets": targets, "mc2_targets": targets})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = {
        "include": str(_task_folder() / f"{THEIR_TASK}.yaml"),
        "task": "mc2",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {"validation": str(folder / "rows.jsonl")},
            "cache_dir": str(folder / "datasets"),
        },
    }
    path = folder / "mc2.yaml"
    path.write_text(yaml.safe_dump(task), encoding="utf-8")
    return path


TASK = Task(
    "multiple_choice",
    "answers",
    {"ours": ours, "lm_eval": lm_eval},
    tolerances={"log_probs": 2e-3, "mc2": 1e-4},
    bars={("cpu", "all"): 10, ("cuda", "all"): 20},
)
