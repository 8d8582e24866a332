"""The tasks of ``python -m bench``."""

from __future__ import annotations

from bench import auditing, generating, multiple_choice, probing, training
from bench.harness import Task

TASKS = {
    task.name: task
    for task in (
        Task(
            "training",
            "pairs",
            {"ours": training.ours, "trl": training.trl},
            tolerances={"reference_log_probs": 2e-3},
            bars={("cpu", "all"): 15, ("cpu", "middle"): 25, ("cuda", "all"): 20, ("cuda", "middle"): 40},
        ),
        Task(
            "multiple_choice",
            "answers",
            {"ours": multiple_choice.ours, "lm_eval": multiple_choice.lm_eval},
            tolerances={"log_probs": 2e-3, "mc2": 1e-4},
            bars={("cpu", "all"): 10, ("cuda", "all"): 20},
        ),
        Task(
            "probing",
            "answers",
            {"ours": probing.ours, "sklearn": probing.sklearn, "transformer_lens": probing.transformer_lens},
            tolerances={"activations": 1e-3, "probe_logits": 0.1},
            bars={("cpu", "all"): 6, ("cuda", "all"): 30},
            n_questions=32,
            smoke=4,
        ),
        Task(
            "generating",
            "questions",
            {
                "ours": generating.ours,
                "hook": generating.hook,
                "hook_batched": generating.hook_batched,
                "pyvene": generating.pyvene,
            },
            tolerances={"length": 0.0, "letters": 0.0},
            bars={("cpu", "all"): 4, ("cpu", "middle"): 4, ("cuda", "all"): 30, ("cuda", "middle"): 30},
            n_questions=64,
        ),
        Task(
            "auditing",
            "trials",
            {"ours": auditing.ours, "trl": auditing.trl},
            tolerances={"base_log_probs": 2e-3, "length": 0.0, "letters": 0.0},
        ),
    )
}
