"""``locaudit behaviour check``: what was read from a file of questions, and what to know before an audit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from locaudit.cli.commands import dispatch, read_flags, say
from locaudit.config import AuditConfig, SplitConfig
from locaudit.text import plural

_PROGRAM = """commands:
  locaudit behaviour check FILE [flags]   what was read, how prompts look, and what gives the answers away

locaudit behaviour check --help lists the flags."""


@dataclass(frozen=True)
class _Check:
    behaviour: tyro.conf.Positional[str]
    """Name of a bundled behaviour, or a file or folder of questions (docs/guide.md)."""
    columns: Annotated[dict[str, str], tyro.conf.arg(aliases=["--behaviour-columns"])] = field(default_factory=dict)
    """Names of the behaviour's columns, such as ``prompt instruction chosen good rejected bad``."""
    format: Annotated[str, tyro.conf.arg(aliases=["--behaviour-format"])] = "auto"
    """Format of the file, such as ``ab-text``. ``auto``: its suffix or columns decide."""
    model: str = "none"
    """Also score this unedited model on the test questions (``none``: no model is loaded)."""
    max_test: int = 100
    """Most test questions that the model is scored on."""


def behaviour(arguments: Sequence[str]) -> None:
    """Parse ``locaudit behaviour check FILE`` and print what was read."""
    dispatch("behaviour", _PROGRAM, {"check": _check}, list(arguments))


def _check(arguments: list[str]) -> None:
    words = "Read a behaviour and print its size, its prompts, and how far length or single words tell answers apart."
    command = read_flags(_Check, "locaudit behaviour check", words, arguments)
    from locaudit.behaviours import load_behaviour, split_questions
    from locaudit.behaviours.check import check_behaviour
    from locaudit.run.subject import few_for_no
    from locaudit.stats.scores import RELATED

    found = load_behaviour(command.behaviour, format=command.format, columns=command.columns or None)
    facts, split = check_behaviour(found), split_questions(found, SplitConfig().fractions, seed=SplitConfig().seed)
    first = found.questions[0]
    sizes = ", ".join(f"{len(getattr(split, name))} {name}" for name in ("train", "val", "test"))
    rows = [
        ("behaviour", f"{found.name}, judged for {', '.join(found.aspects) or 'nothing'}; style {found.style}"),
        ("questions", f"{facts.n_questions} in {plural(facts.n_groups, 'group')}; by default {sizes}"),
        ("answers", f"{facts.n_true} true, {facts.n_false} false"),
        *((kind, f"{n} other prompts, for the {score}") for kind, score in RELATED.items()
          if (n := sum(len(getattr(question, kind)) for question in found.questions))),
        ("words", f"median {facts.question_words:g} in a question, {facts.true_words:g} in a true answer, "
                  f"{facts.false_words:g} in a false one"),
        ("length", f"a true answer is longer than a false one in {facts.by_length:.0%} of pairs"),
        ("words alone", f"a classifier of single words prefers the true answer in {facts.by_words:.0%} of pairs"),
        ("first", f"{first.text!r} -> true {first.true[0]!r}, false {first.false[0]!r}"),
    ]  # fmt: skip
    for name, said in rows:
        say(f"{name:<12} {said}")
    for note in filter(None, (few_for_no(found, SplitConfig()), *found.notes)):
        say(f"Note: {note}")
    if max(abs(facts.by_length - 0.5), abs(facts.by_words - 0.5)) > 0.2:
        say(
            "Length or words tell many answers apart. If they are not what the behaviour is about, an edit can gain by "
            "them alone."
        )
    if command.model != "none":
        _score(command)


def _score(command: _Check) -> None:
    """Print a rendered prompt and the unedited model's scores."""
    from locaudit.measure.forward import answer_log_probs
    from locaudit.measure.multiple_choice import score_questions
    from locaudit.measure.tree import plant
    from locaudit.models import load_model
    from locaudit.run.subject import read_settings

    config = AuditConfig(
        model=command.model,
        behaviour=command.behaviour,
        behaviour_format=command.format,
        behaviour_columns=command.columns,  # type: ignore[arg-type]
        split=SplitConfig(max_test=command.max_test),
    )
    inputs, model = read_settings(config, audits=False), load_model(command.model)
    asked = inputs.split.test
    forest = plant(model.tokenizer, inputs.scoring, [(q.text, q.answers) for q in asked])
    sums = [x[0] for x in answer_log_probs(model, forest)]
    scores = score_questions(asked, sums, sums, str(model.lm.dtype).removeprefix("torch."))
    means = ", ".join(f"{name} {sum(scores[name]) / len(asked):.3f}" for name in ("mc1", "mc2", "preference_accuracy"))
    say(f"{'prompt':<12} ...{inputs.scoring.render(asked[0].text, model.tokenizer)[-200:]!r}")
    say(f"{'unedited':<12} {means} on {plural(len(asked), 'test question')}")
