"""``locaudit export``: a run's edit for other programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True)
class _Export:
    run: tyro.conf.Positional[Path]
    """Run folder."""
    out: Path
    """Folder to write to."""
    trial: str = "claim/optimal"
    """ARM/METHOD: claim, whole, rest or control-N, and the name of a method."""
    to: Literal["peft", "merged", "vectors"] = "peft"
    """A PEFT adapter, a checkpoint with the edit in its weights, or the edit's own vectors."""
    strength: float | None = None
    """Strength of the edit, one of the grid (None: the one that validation chose)."""


def export(arguments: list[str]) -> None:
    """Write the edit of a trial."""
    command = tyro.cli(
        _Export, prog="locaudit export", description="Write an edit of a run for other programs.", args=arguments
    )
    from locaudit.run.export import export_edit

    print(export_edit(command.run, command.trial, command.to, command.out, strength=command.strength))
