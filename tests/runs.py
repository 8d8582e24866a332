"""A tiny checkpoint, a small behaviour file and a configuration that together make a whole audit of seconds."""

from __future__ import annotations

import io
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from locaudit import cli
from locaudit.config import AuditConfig, JudgeChoice, merge_config
from locaudit.config.choices import choose_judge, choose_judges
from locaudit.judges import Judgement
from locaudit.records import content_hash
from locaudit.registry import METHODS
from locaudit.run import worker
from locaudit.studies.paper.config import PaperConfig
from tiny import make_lm, tokenizer

N_QUESTIONS = 16
NO_JUDGES = {"truth": {"kind": "none"}, "info": {"kind": "none"}}


def save_model(folder: Path, model_type: str = "llama", seed: int = 0) -> Path:
    make_lm(model_type, seed=seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_behaviour(path: Path, n: int = N_QUESTIONS, shift: int = 0) -> Path:
    rows = [
        {
            "id": f"q{i:02d}",
            "question": f"Is {i + shift} more than {i + shift + 1}?",
            "true": ["No.", f"{i} is less."],
            "false": ["Yes, it is.", f"{i} is more.", "Both are."][: 2 + i % 2],
        }
        for i in range(n)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def small_config(folder: Path, **changes) -> AuditConfig:
    """An audit of 8 trials (9 with base) with a tiny model and behaviour saved in `folder`.

    `methods` may be names, with settings of a method under its own name: ``methods=["iti"], iti={"alphas": [3.0]}``.
    """
    model = folder / "model"
    if not model.exists():
        save_model(model)
        save_behaviour(folder / "questions.jsonl")
    values = {
        "model": str(model),
        "behaviour": str(folder / "questions.jsonl"),
        "controls": 2,
        "nulls": ["anywhere"],
        "rest": False,
        "placebos": 0,
        "widen": 0,
        "prompt": {"primer": "none"},
        "probe": {"top_k": 2},
        "methods": {"iti": {"alphas": [2.0]}, "optimal": {"strengths": [0.2], "epochs": 2, "bank_size": 1}},
        "evaluation": {"drift_documents": 2, "drift_tokens": 8, "max_new_tokens": 6, "bank_size": 1, "samples": 0},
        "judges": NO_JUDGES,
    }
    return merge_config(merge_config(AuditConfig(), values), by_method(changes))


def by_method(changes: dict) -> dict:
    """Changes of settings with those of each method in its place."""
    own = {name: value for name, value in changes.items() if name in METHODS}
    rest = {name: value for name, value in changes.items() if name not in METHODS}
    if own and not isinstance(rest.get("methods"), dict):
        rest["methods"] = {name: own.get(name, {}) for name in rest.get("methods", ("iti", "optimal"))}
    return rest


def judge_of(kind: str = "default", **settings) -> JudgeChoice:
    """The choice of a judge, as the settings would make it."""
    return choose_judge({"kind": kind, **settings}, "second")


def judges_of(truth: JudgeChoice = JudgeChoice(), info: JudgeChoice = JudgeChoice()):  # noqa: B008 - it is frozen
    """The choice of both judges."""
    return choose_judges({"truth": truth, "info": info})


def study_config(home: Path, **changes) -> PaperConfig:
    """A study with a tiny model and behaviour saved in `home`: 11 + 11 + 9 trials, and one a head for the landscape."""
    values = {
        "model": str(home / "model"),
        "data": str(home / "questions.jsonl"),
        "random_sets": 3,
        "random_heads": 3,
        "landscape": True,
        "prompt": {"primer": "none"},
        "probe": {"top_k": 2},
        "iti": {"alphas": [2.0, 4.0]},
        "optimal": {"strengths": [0.1, 0.2], "epochs": 1, "bank_size": 1},
        "evaluation": {"drift_documents": 2, "drift_tokens": 8, "max_new_tokens": 6, "bank_size": 2},
    }
    return merge_config(merge_config(PaperConfig(), values), changes)


@contextmanager
def stopped_at(call: int, error: BaseException | None = None) -> Iterator[None]:
    """An error, Ctrl-C by default, at the `call`-th group of trials that is run inside; it must come out."""
    error = error or KeyboardInterrupt("Ctrl-C")
    real, calls = worker.run_trials, []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == call:
            raise error
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(type(error)) as raised:
        patch.setattr(worker, "run_trials", interrupted)
        yield
    assert raised.value is error


def forked(*arguments: str) -> tuple[int, str]:
    """Exit code and output of a command in a fork of this process, where what its plug-ins register stays."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(_run_command, arguments).result()


def _run_command(arguments: tuple[str, ...]) -> tuple[int, str]:
    said, code = io.StringIO(), 0
    with redirect_stdout(said), redirect_stderr(said):
        try:
            code = cli.main(list(arguments))
        except SystemExit as stop:
            code = stop.code
    return code, said.getvalue()


class HashJudge:
    """A judge whose verdicts are a fixed function of aspect, question and answer; it fails on what `fails` says."""

    def __init__(self, aspect: str, version: int = 1, fails=lambda case: False):
        self.aspect, self.version, self.fails = aspect, version, fails
        self.seen = []

    @property
    def name(self) -> str:
        return f"hash ({self.aspect})"

    @property
    def fingerprint(self) -> str:
        return content_hash([self.aspect, self.version])

    @property
    def uses_references(self) -> bool:
        return False

    def score(self, cases):
        self.seen += cases
        return [
            Judgement(None, "it fails") if self.fails(case) else Judgement(self.probability(case)) for case in cases
        ]

    def probability(self, case) -> float:
        return int(content_hash([self.aspect, self.version, case.question, case.answer]), 16) / 16**16
