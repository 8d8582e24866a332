"""``locaudit paper``: run the whole study of the paper."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from locaudit.cli.audit import refuse_early
from locaudit.cli.commands import say
from locaudit.cli.flags import parse, take_config, values_of
from locaudit.studies.paper.config import PRESETS, PaperConfig, Preset, load_paper_preset


@dataclass(frozen=True)
class _Paper:
    config: Annotated[PaperConfig, tyro.conf.arg(name="")] = field(default_factory=PaperConfig)
    preset: Preset = "full"
    """Size of the study; all other settings override it. ``full``: the paper's grids and training (needs a GPU).
    ``decide``: sized to decide the claims within 15 hours of trials on CPU cores, added up over workers.
    ``smoke``: every part, in minutes."""
    out: Path = Path("runs/paper")
    """Folder of the study. An earlier study with the same settings in this folder is resumed."""
    dry_run: bool = False
    """Run one trial of each kind and print how many trials and tokens, and how much time and disk, the study needs.
    These trials are kept, so the study does not repeat them."""


def paper(arguments: list[str]) -> int:
    """Parse ``locaudit paper [CONFIG.yaml] [--preset P] [flags]`` and run it; returns the exit code."""
    # It decides the defaults of all other settings. tyro refuses an unknown one and lists the choices.
    named: list[Preset] = [preset for preset in PRESETS if preset in values_of(arguments, "preset")]
    preset = named[0] if named else "full"
    config, rest = take_config(load_paper_preset(preset), arguments)
    command = parse(
        _Paper(config, preset),
        "locaudit paper [CONFIG.yaml]",
        "Run the whole study of the paper, and write its figures and claims. Settings in CONFIG.yaml, if you give one, "
        "override the preset, and flags override both.",
        rest,
    )
    return _run(command)


def _run(command: _Paper) -> int:
    refuse_early(command.config.audits()["sets"])
    from locaudit.cli.shown import count_unjudged
    from locaudit.report import require_report_extra
    from locaudit.store.folder import check_folder
    from locaudit.studies.paper.study import SETTINGS

    check_folder(command.out, SETTINGS)
    from locaudit.studies.paper.run import describe_plan, estimate_paper, run_paper

    require_report_extra()
    if command.dry_run:
        say(describe_plan(estimate_paper(command.config, out=command.out), command.config.budget_hours))
        return 0
    lacking = run_paper(command.config, command.out)
    from locaudit.store.run import load_run
    from locaudit.studies.paper import write_paper

    print_study(write_paper(command.out))
    return count_unjudged(load_run(command.out / part) for part in command.config.audits() if part not in lacking)


def print_study(page: Path) -> None:
    """Print the claims and outcomes of a finished study."""
    numbers = json.loads((page.parent / "numbers.json").read_text(encoding="utf-8"))
    for claim in numbers["claims"]:
        say(f"\n{claim['outcome']}: {claim['says']}", style="bold")
        say(f"  {claim['measured']}; p = {claim['p_holm']:.2g} (Holm)")
        why = claim["open"] if claim["open"] != claim["measured"] else ""
        for words in filter(None, (why, claim["size"])):
            say(f"  {words}")
    say(f"\n{numbers['run']['registration']['sentence']}")
    for part, needed in numbers["run"]["not_run"].items():
        say(f"not run: {part} ({needed})")
    say(f"\nfigures and numbers: {page}")
