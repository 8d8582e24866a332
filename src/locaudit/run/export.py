"""A run's edit, chosen as its verdict chose it, in a form that other programs read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from locaudit.edits import Edit, Form, load_edit, save_merged
from locaudit.errors import RunFolderError
from locaudit.models import Model
from locaudit.records import TrialRecord
from locaudit.run.subject import load_subject
from locaudit.stats import select
from locaudit.store.run import load_run


def export_edit(
    run_folder: str | Path,
    trial: str,
    to: Form,
    out: str | Path,
    *,
    strength: float | None = None,
    model: Model | None = None,
) -> Path:
    """Write the edit of a trial of a run, ``ARM/METHOD`` or ``control-N/METHOD``, and return what was written.

    The folder `out` gets a LoRA adapter (``peft``), a whole checkpoint (``merged``), or ``edit.safetensors`` with each
    site's A, B, c, mask and mean (``vectors``). `strength` picks one of the grid (None: the one that validation chose).
    `model` takes the place of the run's own, which is loaded where weights are asked for.

    Raises `RunFolderError` for a trial that the run does not have, `LocationError` for an edit that cannot become that.
    """
    run = load_run(run_folder)
    record = _find(run.records, trial, strength, run.score)
    edit, config = load_edit(run.folder / "edits" / record.edit), run.config
    out = Path(out)
    if to == "vectors":
        out.mkdir(parents=True, exist_ok=True)
        edit.save(out / "edit.safetensors")
        return out / "edit.safetensors"
    return _WEIGHTS[to](model or load_subject(config), edit, out)


def _peft(model: Model, edit: Edit, out: Path) -> Path:
    return edit.to_peft(out, model)


_WEIGHTS = {"peft": _peft, "merged": save_merged}


def _find(records: Sequence[TrialRecord], trial: str, strength: float | None, score: str) -> TrialRecord:
    there = [record for record in records if record.edit]
    wanted = [record for record in there if _name(record) == trial]
    if not wanted:
        names = sorted({_name(record) for record in there})
        raise RunFolderError(
            got=f"the trial {trial!r}",
            expected=f"one with an edit: {', '.join(names[:8]) or 'none yet'}{' ...' if names[8:] else ''}",
            remedy="name it ARM/METHOD, for example claim/optimal or control-3/optimal",
        )
    if strength is None:
        chosen = select(wanted, score)[wanted[0].spec.method][wanted[0].spec.arm, wanted[0].spec.control]
        assert chosen is not None, "a trial with an edit did not diverge"
        return chosen
    by_strength = {record.spec.hyperparameter: record for record in wanted}
    if strength not in by_strength:
        raise RunFolderError(
            got=f"strength {strength:g} of {trial}",
            expected=f"one of {', '.join(f'{value:g}' for value in sorted(filter(None, by_strength)))}",
            remedy="change --strength, or leave it out for the one that validation chose",
        )
    return by_strength[strength]


def _name(record: TrialRecord) -> str:
    spec = record.spec
    return f"{spec.arm}-{spec.control}/{spec.method}" if spec.arm == "control" else f"{spec.arm}/{spec.method}"
