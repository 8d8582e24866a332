"""``locaudit doctor``: what is installed and found here, and a short test with a real model."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from locaudit.checkpoints import PACKAGED, find_checkpoint
from locaudit.cli.commands import read_flags, say
from locaudit.errors import LocauditError

_EXTRAS = {
    "report": ("matplotlib", "jinja2", "pandas"),
    "notebook": ("plotly",),
    "hub": ("datasets",),
    "judge": ("openai", "peft", "sklearn"),
    "ray": ("ray",),
    "trackers": ("tensorboard", "mlflow", "wandb"),
    "lm-eval": ("lm_eval",),
}
"""Extra -> the modules that it brings."""


@dataclass(frozen=True)
class _Doctor:
    model: str = "smollm2-135m"
    """Model of the test: a name, folder, ``.gguf`` file or hub id. ``none``: no test."""
    behaviour: str = "misconceptions"
    """Behaviour whose first questions the test scores."""


def doctor(arguments: Sequence[str]) -> int:
    """Parse ``locaudit doctor [--model MODEL]`` and print what is here. The exit code is 2 if the test fails."""
    words = "Print which versions, device, memory, models, judges and extras are here, and test a model."
    command = read_flags(_Doctor, "locaudit doctor", words, arguments)
    for name, found in _facts():
        say(f"{name:<12}{found}")
    if command.model == "none":
        return 0
    say(f"testing {command.model}, which takes about 20 s")
    started = time.monotonic()
    try:
        difference, answer = _test(command.model, command.behaviour)
    except LocauditError as error:
        say(f"{'test':<12}failed: {error.line}")
        return 2
    say(
        f"{'test':<12}passed in {time.monotonic() - started:.0f} s: answer trees and separate rows differ by "
        f"{difference:.1g} nats a token; the unedited model says {answer!r}"
    )
    return 0


def _facts() -> Iterator[tuple[str, str]]:
    """(name, what was found)."""
    import torch

    from locaudit.models.load import fastest_dtype
    from locaudit.registry import JUDGES, METHODS

    packages = ("locaudit", "torch", "transformers", "numpy", "scipy")
    yield "versions", ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    yield "Python", f"{platform.python_version()} on {platform.platform()}"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        yield "device", f"{torch.cuda.get_device_name(device)}, {_gib(free)} of {_gib(total)} free"
    yield "CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads; --dtype auto is {fastest_dtype(device)}"
    if "SC_AVPHYS_PAGES" in os.sysconf_names:  # not on macOS
        page = os.sysconf("SC_PAGE_SIZE")
        free, total = (page * os.sysconf(name) for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"))
        yield "memory", f"{_gib(free)} of {_gib(total)} unused"
    yield "disk", f"{_gib(shutil.disk_usage(Path.cwd()).free)} free in {Path.cwd()}"
    yield "models", ", ".join(f"{name} ({_found(name)})" for name in PACKAGED)
    yield "methods", ", ".join(METHODS)
    yield "judges", ", ".join(JUDGES)
    for extra, modules in _EXTRAS.items():
        missing = [name for name in modules if util.find_spec(name) is None]
        lack = f"not installed ({', '.join(missing)}): pip install 'locaudit[{extra}]'"
        yield f"[{extra}]", lack if missing else "installed"


def _found(name: str) -> str:
    try:
        return "installed" if find_checkpoint(name) else "on the hub"
    except LocauditError as error:
        return error.remedy


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"


def _test(model_name: str, behaviour_name: str) -> tuple[float, str]:
    """(largest difference between trees and rows in nats per token, the beginning of an answer)."""
    from locaudit.behaviours import load_behaviour
    from locaudit.behaviours.format import Prompt
    from locaudit.measure.answers import answer_prompts
    from locaudit.measure.identity import check_trees
    from locaudit.measure.tree import plant
    from locaudit.models import load_model
    from locaudit.store.cache import Cache

    model, questions = load_model(model_name), load_behaviour(behaviour_name).questions[:4]
    forest = plant(model.tokenizer, Prompt("qa"), [(question.text, question.answers) for question in questions])
    return check_trees(model, forest), answer_prompts(model, forest, None, max_new_tokens=8, cache=Cache(None))[0][0][0]
