"""``locaudit design``: how large an audit must be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from locaudit.cli.commands import read_flags, say
from locaudit.errors import ConfigError


@dataclass(frozen=True)
class _Design:
    source: tyro.conf.Positional[Path]
    """A run folder, finished or not, or the settings (YAML) of an audit, for which a pilot is run."""
    lead: float | None = None
    """True lead of the claim over random places that should be seen, in the score's units.
    None: the run's share of the claim's gain (`margin`), or 0.05 without such a gain."""
    gain: float | None = None
    """True gain over the unedited model that should be seen, too."""
    power: float = 0.8
    """Probability with which it should be seen."""
    margin: float | None = None
    """Lead in the score's units within which a claim is shown to be like random places.
    None: as the lead."""
    method: str | None = None
    """Method to design for (None: the first trained one)."""
    null: str | None = None
    """Null to design for (None: all that can test)."""
    out: Path = Path("runs/audit")
    """Run folder of the pilot. The audit that continues in it repeats nothing."""


def design(arguments: Sequence[str]) -> None:
    """Parse ``locaudit design RUN|CONFIG.yaml [flags]`` and print designs."""
    words = "How large must an audit be? Read a run, or run a pilot, and print designs with their time and power."
    command = read_flags(_Design, "locaudit design", words, arguments)
    for name in ("lead", "gain", "power", "margin"):
        value, most = getattr(command, name), 1 if name == "power" else float("inf")
        if value is not None and not 0 < value < most:
            expected = "a number between 0 and 1" if name == "power" else "a positive number"
            raise ConfigError(got=f"--{name} {value:g}", expected=expected, remedy="change it")
    folder = command.source
    if folder.is_file():
        folder = _pilot(command)
    from locaudit.report.design import DESIGN, Target, describe_design
    from locaudit.report.sizing import read_sizing

    run, sizing = read_sizing(folder, command.method, command.null)
    share = run.config.margin * sizing.claim_gain if sizing.claim_gain > 0 else Target.margin
    lead, margin = (share if given is None else given for given in (command.lead, command.margin))
    target = Target(lead, command.gain, command.power, margin)
    say(describe_design(run, sizing, target, folder / DESIGN))


def _pilot(command: _Design) -> Path:
    from locaudit.cli.audit import refuse_early
    from locaudit.config import load_config

    config = load_config(command.source)
    refuse_early(config, command.out)
    from locaudit.run.pilot import run_design_pilot

    run_design_pilot(config, command.out, command.method)
    return command.out
