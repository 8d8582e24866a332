"""Run tasks of lm-evaluation-harness on the audited model under one of a run's edits (the extra ``lm-eval``)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locaudit.errors import import_extra
from locaudit.run.export import find_trial, load_audited
from locaudit.store.run import load_run

if TYPE_CHECKING:
    from locaudit.edits import Edit
    from locaudit.models import Model

UNEDITED = "unedited"
"""The trial that stands for the model without an edit."""


def edited_lm(model: Model, edit: Edit | None, **options: Any) -> Any:
    """A model of lm-evaluation-harness: its `HFLM`, with `options`, around a model under an edit (None: unedited).

    An edit of ``answer``, ``prompt`` or ``last`` acts on what the task gives as continuation and context. Running text
    is a continuation of one token, so that an edit of ``answer`` acts on all of it.
    """
    hflm = import_extra("lm_eval.models.huggingface", "lm-eval").HFLM
    options = {"pretrained": model.lm, "tokenizer": model.tokenizer} | options
    if edit is None:
        return hflm(**options)

    class EditedLM(hflm):
        def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **given: Any) -> list[Any]:
            # One forward has one column where its contexts end, so contexts of one length run together.
            alike: dict[int, list[int]] = defaultdict(list)
            for i, (_, context, continuation) in enumerate(requests):
                cut = max(0, len(context) + len(continuation) - self.max_length - 1)  # the harness cuts from the left
                alike[0 if edit.positions == "all" else len(context) - cut - 1].append(i)
            found: dict[int, Any] = {}
            for last, places in alike.items():
                with edit.on(model, answer_from=last):
                    scored = super()._loglikelihood_tokens([requests[i] for i in places], *args, **given)
                found |= zip(places, scored, strict=True)
            return [found[i] for i in range(len(requests))]

        def generate_until(self, *args: Any, **given: Any) -> list[str]:
            with edit.on(model):
                return super().generate_until(*args, **given)

    return EditedLM(**options)


def run_tasks(
    run_folder: str | Path,
    trial: str,
    tasks: Sequence[str],
    *,
    strength: float | None = None,
    include: Path | None = None,
    batch_size: int = 8,
    **options: Any,
) -> dict[str, Any]:
    """What lm-evaluation-harness's `simple_evaluate` returns for the run's model under one of its edits.

    `trial` and `strength` name the edit as in `locaudit.run.export.export_edit`; the trial `UNEDITED` has none.
    `tasks` are names or files, and `include` is a folder with tasks of your own. Other options go to
    `simple_evaluate`. Raises `ConfigError` without the extra, and the errors of `export_edit`.
    """
    lm_eval = import_extra("lm_eval", "lm-eval")
    manager = import_extra("lm_eval.tasks", "lm-eval").TaskManager(
        include_path=None if include is None else str(include)
    )
    run = load_run(run_folder)
    record = None if trial == UNEDITED else find_trial(run, trial, strength)
    from locaudit.edits import load_edit

    edit = None if record is None else load_edit(run.folder / "edits" / record.edit)
    lm = edited_lm(load_audited(run), edit, batch_size=batch_size)
    return lm_eval.simple_evaluate(lm, tasks=[*tasks], task_manager=manager, **options)
