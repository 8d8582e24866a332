"""One sampled answer, without and with an edit of a run: an illustration that no score reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from locaudit.config import RayConfig
from locaudit.edits import load_edit
from locaudit.edits.bank import stack
from locaudit.measure.generation import generate_answers
from locaudit.models import Model
from locaudit.models.quiet import quiet_libraries
from locaudit.run.export import find_trial
from locaudit.run.prepare import plant_questions
from locaudit.run.subject import load_subject, read_settings
from locaudit.store.run import load_run

UNEDITED = "unedited"


def sample_answers(
    run_folder: str | Path, trial: str, *, model: Model | None = None, max_new_tokens: int = 20
) -> tuple[str, Mapping[str, str]]:
    """Sample one answer to the first test question from the model alone and from the model under an edit.

    `trial` names the edit as in `export_edit`. Both draw from the model's full distribution (temperature 1) with the
    same random numbers. Returns the question, and ``unedited`` and the trial's name -> answer. Raises `RunFolderError`
    if the run has no such edit.
    """
    run = load_run(run_folder)
    edit = load_edit(run.folder / "edits" / find_trial(run, trial, None).edit)
    with quiet_libraries():
        model = model or load_subject(run.config)
        config = replace(run.config, executor="local", ray=RayConfig())  # one process is enough
        inputs = read_settings(config, model=model, out=run.folder)
        forest = plant_questions(inputs, model).held_out["test"]
        tree, said = forest.trees[0], {}
        for name, bank in ((UNEDITED, None), (trial, stack(model, [edit]))):
            ((said[name],),) = generate_answers(
                model,
                forest.prefix,
                [tree.prompt],
                bank,
                samples=[1],
                subjects=[tree.subject],
                max_new_tokens=max_new_tokens,
                answer_format=inputs.scoring,
            )
    return inputs.split.test[0].text, said
