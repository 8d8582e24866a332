"""``locaudit lm-eval``: tasks of lm-evaluation-harness on the audited model under an edit of a run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from locaudit.cli.commands import read_flags, say
from locaudit.errors import import_extra


@dataclass(frozen=True)
class _Tasks:
    run: tyro.conf.Positional[Path]
    """Run folder."""
    tasks: tuple[str, ...]
    """Tasks of lm-evaluation-harness, by name or as YAML files."""
    trial: str = "claim/optimal"
    """The edit, as ARM/METHOD. ARM is claim, whole, rest, control-NULL-N, rest-NULL-N or placebo-N.
    ``unedited``: no edit."""
    strength: float | None = None
    """Strength of the edit, one of those that were tried (None: the best one on validation questions)."""
    include: Path | None = None
    """Folder with tasks of your own."""
    num_fewshot: int | None = None
    """Number of examples in each prompt (None: that of the task)."""
    limit: int | None = None
    """Run only this many documents of each task."""
    batch_size: int = 8
    """Requests that run at once."""
    out: Path | None = None
    """JSON file to write all results to."""


def lm_eval(arguments: list[str]) -> None:
    """Parse ``locaudit lm-eval RUN --tasks TASK...``, run the tasks and print their scores."""
    words = "Run tasks of lm-evaluation-harness on a run's model under one of its edits."
    command = read_flags(_Tasks, "locaudit lm-eval", words, arguments)
    make_table = import_extra("lm_eval.utils", "lm-eval").make_table
    from locaudit.run.harness import run_tasks

    found = run_tasks(
        command.run,
        command.trial,
        command.tasks,
        strength=command.strength,
        include=command.include,
        batch_size=command.batch_size,
        num_fewshot=command.num_fewshot,
        limit=command.limit,
    )
    say(f"{command.trial} of {command.run}")
    say(make_table(found))
    if command.out is not None:
        text = json.dumps({key: found[key] for key in ("results", "n-shot", "n-samples")}, indent=1)
        command.out.write_text(text + "\n", encoding="utf-8")
