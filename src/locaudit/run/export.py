"""Export an edit of a run as a PEFT adapter, a merged checkpoint, a control vector or a file of vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from locaudit.errors import RunFolderError
from locaudit.records import TrialRecord
from locaudit.run.subject import load_subject
from locaudit.stats.scores import tolerance
from locaudit.stats.selection import choose
from locaudit.store.run import Run, load_run

if TYPE_CHECKING:  # so that a folder that is not a run is refused without torch
    from locaudit.edits import Form
    from locaudit.models import Model


def export_edit(
    run_folder: str | Path,
    trial: str,
    to: Form,
    out: str | Path,
    *,
    strength: float | None = None,
    dtype: str | None = None,
    model: Model | None = None,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Export one edit of a run into the folder `out`; returns the path that was written.

    `say` is called with a line about what is written: before a whole model is, and at the end.

    `trial` names the edit as ``ARM/METHOD``, for example ``claim/optimal``, ``control-layers-3/iti``,
    ``rest-anywhere-3/optimal`` (all but control 3) or ``placebo-0/optimal``. `strength` is a strength of the method's
    grid; None takes the one that validation questions chose. `to` is one of:

    - ``peft``: a LoRA adapter
    - ``merged``: a whole checkpoint
    - ``gguf``: ``control-vector.gguf``, which llama.cpp and repeng read, for constants in the residual stream
    - ``vectors``: ``edit.safetensors`` with each site's A, B, c, mask and mean

    All but the last form need the model. If `model` is not given, the model is loaded by its name in the run's
    settings, in `dtype` or (if None) in the settings' dtype.

    Raises `RunFolderError` for a trial or strength that the run does not have, and for a model other than the audited
    one (`check_audited`). Raises `LocationError` for an edit that
    cannot have this form.
    """
    run = load_run(run_folder)
    record = find_trial(run, trial, strength)
    from locaudit.edits import load_edit, save_merged
    from locaudit.edits.export import cannot_become

    edit = load_edit(run.folder / "edits" / record.edit)
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunFolderError(
            got=f"{out} as the folder of an export, which is not empty",
            expected="a new or empty folder, since an export would replace files",
            remedy="choose another --out",
        )
    say, path = say or (lambda _: None), out
    if to == "vectors":
        out.mkdir(parents=True, exist_ok=True)
        path = out / "edit.safetensors"
        edit.save(path)
    else:
        model = load_audited(run, dtype) if model is None else check_audited(run, model)
        if to == "peft":
            edit.to_peft(out, model)
        elif to == "gguf":
            path = edit.to_gguf(out / "control-vector.gguf", model)
        else:
            if not cannot_become(model, edit, "merged"):  # or it is refused below
                size = sum(x.nbytes for x in model.lm.parameters())
                say(f"writes the whole model with the edit in its weights, {size / 1e6:,.0f} MB, to {out}")
            save_merged(model, edit, out)
    files = {file.name: file.stat().st_size for file in out.iterdir() if file.is_file()}
    sizes = ", ".join(
        f"{name} ({size / 1e6:,.2f} MB)" for name, size in files.items() if name.endswith((".safetensors", ".gguf"))
    )
    chosen = record.spec.hyperparameter
    at = "" if chosen is None else f", strength {chosen:g}"
    say(f"wrote the edit {_name(record)}{at}, of {run_folder} as {to}: {sizes}")
    return path


def load_audited(run: Run, dtype: str | None = None) -> Model:
    """The run's model, checked (`check_audited`); then, if `dtype` is another one, loaded again in it."""
    loading = run.config.loading
    model = check_audited(run, load_subject(run.config))
    if dtype in (None, loading.dtype):
        return model
    return load_subject(replace(run.config, loading=replace(loading, dtype=dtype)))


def check_audited(run: Run, model: Model) -> Model:
    """The model, if it is the audited one: of the same shape and, in the audit's dtype, with the same fingerprint.

    An edit at the same place of other weights is another edit. Raises `RunFolderError`.
    """
    then, now = run.manifest, str(model.lm.dtype).removeprefix("torch.")
    if model.shape != then.shape or (now == then.dtype and then.fingerprint not in ("", model.fingerprint)):
        raise RunFolderError(
            got=f"a model with the fingerprint {model.fingerprint}, other weights than those that were audited",
            expected=f"the model {then.model} with the fingerprint {then.fingerprint}",
            remedy="restore the weights, or run the audit again with these",
        )
    return model


def find_trial(run: Run, trial: str, strength: float | None) -> TrialRecord:
    """The trial with an edit that `trial` and `strength` name (`export_edit`)."""
    there = [record for record in run.records if record.edit]
    wanted = [record for record in there if _name(record) == trial]
    if not wanted:
        names = sorted({_name(record) for record in there})
        raise RunFolderError(
            got=f"the trial {trial!r}",
            expected=f"one with an edit: {', '.join(names[:8]) or 'none yet'}{' ...' if names[8:] else ''}",
            remedy="name it ARM/METHOD, for example claim/optimal or control-anywhere-3/optimal",
        )
    if strength is None:
        chosen = choose(wanted, run.score, tolerance(run.score, run.manifest.dtype))
        assert chosen is not None, "a trial with an edit did not diverge"
        return chosen
    by_strength = {record.spec.hyperparameter: record for record in wanted}
    if strength not in by_strength:
        raise RunFolderError(
            got=f"strength {strength:g} of {trial}",
            expected=f"one of {', '.join(f'{value:g}' for value in sorted(filter(None, by_strength)))}",
            remedy="change --strength, or leave it out for the one that was chosen on validation questions",
        )
    return by_strength[strength]


def _name(record: TrialRecord) -> str:
    spec = record.spec
    return f"{spec.place.named('-')}/{spec.method}"
