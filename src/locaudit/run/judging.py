"""Choose and load the judges of an audit, and let them judge the generated answers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from locaudit.config import JudgeChoice
from locaudit.errors import ConfigError
from locaudit.judges import Billed, Case, Judge, Judgement
from locaudit.records import TrialRecord, content_hash
from locaudit.registry import ASPECTS, JUDGES
from locaudit.store.cache import Cache
from locaudit.store.database import HeldOutQuestion, Store, said_in

CHUNK = 256
"""Answers judged between two writes to disk. At most this many judgements are lost when a run is killed."""


def choose_judges(
    chosen: Mapping[str, JudgeChoice], aspects: Collection[str], *, generates: bool
) -> dict[str, tuple[str, Any]]:
    """Decide which judge rates each aspect: aspect -> (kind, settings). Loads nothing.

    `chosen` has the choices of the settings, `aspects` the aspects that the behaviour names, and `generates` says
    whether the run generates answers (or may do so). The kind ``default`` stands for the aspect's own (`Aspect.judge`)
    if the behaviour names the aspect and answers are generated, else for no judge. Aspects without a judge are left
    out.

    Raises `ConfigError` for a judge without a prompt of its own on an aspect that the behaviour does not name, unless
    the kind judges any behaviour, and the errors of the kinds' `check`.
    """
    found: dict[str, tuple[str, Any]] = {}
    for aspect in dict.fromkeys([*aspects, *chosen]):
        choice = chosen.get(aspect, JudgeChoice())
        name, settings = choice.kind, choice.settings
        if name == "default":
            name = ASPECTS[aspect].judge if aspect in aspects and generates else "none"
            settings = JUDGES[name].settings()
        asked = aspect in aspects or JUDGES[name].any_behaviour or JUDGES[name].own_prompt(settings) is not None
        if name != "none" and not asked:
            named = f"is judged for {', '.join(aspects)}" if aspects else "names nothing to judge (an A/B set)"
            raise ConfigError(
                got=f"a judge of {aspect}, without a prompt, for a behaviour that {named}",
                expected="a behaviour of questions with free answers, or a prompt for the judge",
                remedy=f"set judges.{aspect}.prompt (kinds causal-lm and openai), or judges.{aspect}.kind to none",
            )
        if name != "none":
            JUDGES[name].refuse(ASPECTS[aspect], settings)
            found[aspect] = name, settings
    return found


def build_judges(
    chosen: Mapping[str, JudgeChoice], aspects: Collection[str], *, generates: bool, device: str
) -> dict[str, Judge]:
    """Load the judges that `choose_judges` decides on: aspect -> judge.

    Judges of one kind are loaded together, so that they can share a model. Raises the errors of `choose_judges` and of
    the kinds' loaders.
    """
    kinds = choose_judges(chosen, aspects, generates=generates)
    found: dict[str, Judge] = {}
    for kind in dict.fromkeys(kind for kind, _ in kinds.values()):
        found |= JUDGES[kind].loader({aspect: s for aspect, (name, s) in kinds.items() if name == kind}, device)
    return {aspect: found[aspect] for aspect in kinds if aspect in found}


def check_judges(judges: Mapping[str, Judge]) -> None:
    """Raise `ConfigError` for a judge of an unknown aspect, or for two judges with the same fingerprint."""
    unknown = [aspect for aspect in judges if aspect not in ASPECTS]
    if unknown:
        raise ConfigError(
            got=f"a judge called {unknown[0]!r}", expected=f"one of {', '.join(ASPECTS)}", remedy="use one of these"
        )
    if len({judge.fingerprint for judge in judges.values()}) < len(judges):
        raise ConfigError(
            got="two judges with one fingerprint",
            expected="fingerprints that tell judges of different aspects apart",
            remedy="make the fingerprint depend on the aspect or the prompt, too",
        )


def estimate_cost(judges: Mapping[str, Judge], questions: Sequence[HeldOutQuestion], n_answers: int) -> Iterator[str]:
    """For each judge that costs money: a line with the most that judging `n_answers` answers will cost.

    Answers are assumed to be as long as the reference answers.
    """
    for aspect, judge in judges.items():
        if isinstance(judge, Billed) and questions and n_answers:
            cases = [_case(question, question.true[0]) for question in questions]
            repeats = -(-n_answers // len(cases))
            yield f"{aspect}, judged by {judge.name}: at most {judge.estimate((cases * repeats)[:n_answers])}"


def judge_answers(
    judges: Mapping[str, Judge],
    store: Store,
    records: Sequence[TrialRecord],
    cache: Cache,
    say: Callable[[str], None],
) -> None:
    """Judge every answer of the records that has no judgement yet, including those whose judgement failed before.

    Equal answers to a question are judged once, across all runs of this user (`locaudit.store.cache`). Judgements are
    written to the run after each `CHUNK`. The number of failures is reported through `say`.
    """
    questions = {split: store.questions(split) for split in ("val", "test")}
    words = {question.id: question for part in questions.values() for question in part}
    said = dict.fromkeys(said_in(records, questions))
    todo = {aspect: _unjudged(judge, store, said) for aspect, judge in judges.items()}
    keys = list(dict.fromkeys(key for needed in todo.values() for key in needed))
    failed: dict[str, list[str]] = {}
    for start in range(0, len(keys), CHUNK):
        for aspect, judge in judges.items():  # all judges on one chunk, since some share work on a case
            chunk = [key for key in keys[start : start + CHUNK] if key in todo[aspect]]
            found = _judge_chunk(judge, [_case(words[question], answer) for question, answer in chunk], cache)
            store.add_judgements(
                judge.fingerprint, {key: (j.probability, j.reason) for key, j in zip(chunk, found, strict=True)}
            )
            failed.setdefault(aspect, []).extend(j.reason for j in found if j.probability is None)
    for aspect, reasons in failed.items():
        if reasons:
            say(f"{aspect}: {len(reasons)} of {len(todo[aspect])} judgements are missing (first: {reasons[0]})")


def _unjudged(judge: Judge, store: Store, said: Mapping[tuple[str, str], None]) -> dict[tuple[str, str], None]:
    known = store.judgements(judge.fingerprint)
    return {key: None for key in said if known.get(key, (None, ""))[0] is None}


def _judge_chunk(judge: Judge, cases: Sequence[Case], cache: Cache) -> list[Judgement]:
    addresses = [_address(judge, case) for case in cases]
    found = cache.get(addresses)
    lacking = [i for i, address in enumerate(addresses) if address not in found]
    fresh = dict(zip(lacking, _asked(judge, [cases[i] for i in lacking]) if lacking else [], strict=True))
    cache.put({addresses[i]: j.probability for i, j in fresh.items() if j.probability is not None})
    return [fresh[i] if i in fresh else Judgement(found[address]) for i, address in enumerate(addresses)]


def _asked(judge: Judge, cases: Sequence[Case]) -> list[Judgement]:
    """Ask the judge, and check its reply. A value that is not a probability becomes a missing judgement."""
    found = judge.score(cases)
    if len(found) != len(cases):
        raise ConfigError(
            got=f"{len(found)} judgements of {len(cases)} answers from {judge.name}",
            expected="one for each answer, in order",
            remedy="fix its score(): it must return Judgement(None, reason) for an answer that it cannot judge",
        )
    return [_checked(judgement) for judgement in found]


def _checked(judgement: Judgement) -> Judgement:
    if judgement.probability is None:
        return Judgement(None, judgement.reason or "no reason given")
    p = float(judgement.probability)
    return Judgement(p) if 0 <= p <= 1 else Judgement(None, f"{p} is not a probability")


def _address(judge: Judge, case: Case) -> str:
    references = [case.true, case.false] if judge.uses_references else None
    return content_hash(["judgement", judge.fingerprint, case.question, case.answer, references], 32)


def _case(question: HeldOutQuestion, answer: str) -> Case:
    return Case(question.text, answer, question.true, question.false)
