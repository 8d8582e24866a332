"""``locaudit export``: write an edit of a run for use in other programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from locaudit.cli.commands import read_flags, say


@dataclass(frozen=True)
class _Export:
    run: tyro.conf.Positional[Path]
    """Run folder."""
    out: Path
    """Folder to write to."""
    trial: str = "claim/optimal"
    """The edit, as ARM/METHOD. ARM is claim, whole, rest, control-NULL-N, rest-NULL-N or placebo-N."""
    to: Literal["peft", "merged", "vectors", "gguf"] = "peft"
    """``peft``: a PEFT adapter. ``merged``: a checkpoint with the edit in its weights. ``vectors``: the edit alone.
    ``gguf``: a control vector of llama.cpp."""
    strength: float | None = None
    """Strength of the edit, one of those that were tried (None: the best one on validation questions)."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Load the model in this dtype (None: that of the run). A ``merged`` checkpoint is saved in it."""


def export(arguments: list[str]) -> None:
    """Parse ``locaudit export DIR [flags]`` and write the edit."""
    words = "Write an edit of a run for use in other programs."
    command = read_flags(_Export, "locaudit export", words, arguments)
    from locaudit.run.export import export_edit

    settings = {"strength": command.strength, "dtype": command.dtype}

    def note(text: str) -> None:  # not on stdout, which has the path alone
        say(f"locaudit: {text}", stderr=True)

    print(export_edit(command.run, command.trial, command.to, command.out, **settings, say=note))
