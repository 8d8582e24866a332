"""Which judges an audit has, and what they say of the answers of its trials."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from locaudit.config import JudgeConfig, JudgesConfig
from locaudit.errors import ConfigError
from locaudit.judges import Aspect, Billed, Case, Judge, Judgement, find_aspect
from locaudit.records import TrialRecord, content_hash
from locaudit.stats.judged import ASPECT_NAMES
from locaudit.store import HeldOutQuestion, Store
from locaudit.store.cache import Cache

CHUNK = 256
"""Answers judged between two writes: what a kill can lose."""


def build_judges(
    settings: JudgesConfig, asks: Sequence[str | None], *, generates: bool, device: str
) -> dict[str, Judge]:
    """The judges that the settings name: ``truth`` (target) and ``info`` (retention), as far as there are any.

    `asks` are the behaviour's two aspects. ``default`` is the bundled reference judge where the behaviour names an
    aspect and answers are generated. Raises `ConfigError` for a kind that does not fit the behaviour, and what the
    judge's own loader raises.
    """
    slots = dict(zip(ASPECT_NAMES, (settings.target, settings.retention), strict=True))
    aspects = dict(zip(ASPECT_NAMES, asks, strict=True))
    kinds = {slot: _kind(slots[slot], aspects[slot], generates) for slot in ASPECT_NAMES}
    judges = _reference_judges(
        {slot: (slots[slot].model, aspects[slot]) for slot in ASPECT_NAMES if kinds[slot] == "reference"}, device
    )
    for slot in ASPECT_NAMES:
        if kinds[slot] in ("causal-lm", "openai"):
            judges[slot] = _language_model_judge(kinds[slot], slots[slot], aspects[slot], slot, device)
    return {slot: judges[slot] for slot in ASPECT_NAMES if slot in judges}


def _kind(settings: JudgeConfig, aspect: str | None, generates: bool) -> str:
    if settings.kind == "default":
        return "reference" if aspect is not None and generates else "none"
    return settings.kind


def _reference_judges(wanted: Mapping[str, tuple[str | None, str | None]], device: str) -> dict[str, Judge]:
    """Judges with the same weights are loaded together: they share one language model."""
    for slot, (_, aspect) in wanted.items():
        if aspect is None:
            raise ConfigError(
                got=f"a reference judge of {slot} for a behaviour that names nothing to judge, such as an A/B set",
                expected="a behaviour of questions with free answers",
                remedy="use the kind openai or causal-lm with a prompt of your own, or none",
            )
    out: dict[str, Judge] = {}
    if not wanted:
        return out
    from locaudit.judges.reference import load_reference_judges

    for weights in dict.fromkeys(model for model, _ in wanted.values()):
        slots = [slot for slot, (model, _) in wanted.items() if model == weights]
        loaded = load_reference_judges([wanted[slot][1] or "" for slot in slots], weights=weights, device=device)
        out.update(zip(slots, loaded, strict=True))
    return out


def _language_model_judge(kind: str, settings: JudgeConfig, aspect: str | None, slot: str, device: str) -> Judge:
    assert settings.model is not None  # the configuration has checked it
    prompt, is_chat = settings.prompt, kind == "openai" and settings.style == "chat"
    if is_chat and prompt is not None:
        prompt = _read_rubric(prompt)
    if aspect is not None:
        asked = find_aspect(aspect)
    elif prompt is not None:
        asked = Aspect(slot, prompt, prompt)
    else:
        raise ConfigError(
            got=f"a judge of {slot} for a behaviour that names nothing to judge, such as an A/B set, and no prompt",
            expected="what the judge is to be asked",
            remedy=f"set judges.{'target' if slot == 'truth' else 'retention'}.prompt",
        )
    if kind == "causal-lm":
        from locaudit.judges.causal_lm import load_causal_lm_judge

        return load_causal_lm_judge(asked, settings.model, prompt=prompt, device=device)
    from locaudit.judges.openai import load_openai_judge

    return load_openai_judge(
        asked,
        settings.model,
        prompt=prompt,
        style=settings.style,
        base_url=settings.base_url,
        api_key_env=settings.api_key_env,
        concurrency=settings.concurrency,
        timeout=settings.timeout,
        max_retries=settings.max_retries,
        price_in=settings.price_in,
        price_out=settings.price_out,
    )


def _read_rubric(name: str) -> str:
    path = Path(name)
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            got=f"the rubric {name}, which cannot be read ({error})",
            expected="a text file",
            remedy="check judges.*.prompt",
        ) from None
    if not text:
        raise ConfigError(got=f"the empty rubric {name}", expected="text", remedy="write it")
    return text


def check_judges(judges: Mapping[str, Judge]) -> None:
    """Raise `ConfigError` unless judges are called ``truth`` and ``info`` and differ."""
    unknown = [slot for slot in judges if slot not in ASPECT_NAMES]
    if unknown:
        raise ConfigError(
            got=f"a judge called {unknown[0]!r}", expected="truth (the target) and info (retention)", remedy="rename it"
        )
    if len({judge.fingerprint for judge in judges.values()}) < len(judges):
        raise ConfigError(
            got="two judges with one fingerprint",
            expected="fingerprints that tell judges of truth and of info apart",
            remedy="let the fingerprint hash what is asked, too",
        )


def describe_judges(judges: Mapping[str, Judge]) -> dict[str, dict[str, str]]:
    """The run's fact ``judges``: slot -> name and fingerprint."""
    return {slot: {"name": judge.name, "fingerprint": judge.fingerprint} for slot, judge in judges.items()}


def estimate_cost(judges: Mapping[str, Judge], questions: Sequence[HeldOutQuestion], n_answers: int) -> Iterator[str]:
    """A line for each judge that costs something: what `n_answers` answers like the references would take at most."""
    for slot, judge in judges.items():
        if isinstance(judge, Billed) and questions and n_answers:
            cases = [_case(question, question.true[0]) for question in questions]
            repeats = -(-n_answers // len(cases))
            yield f"{slot}, judged by {judge.name}: at most {judge.estimate((cases * repeats)[:n_answers])}"


def judge_answers(
    judges: Mapping[str, Judge],
    store: Store,
    records: Sequence[TrialRecord],
    cache: Cache,
    say: Callable[[str], None],
) -> None:
    """Judge every answer of the records that has no judgement yet; missing ones are tried again.

    Equal answers to a question are judged once, in any run of this user (`locaudit.store.cache`). Writes to the run
    after each `CHUNK`; failures are counted aloud.
    """
    questions = {split: store.questions(split) for split in ("val", "test")}
    words = {question.id: question for part in questions.values() for question in part}
    said = dict.fromkeys(
        (question.id, answer)
        for record in records
        for split, answers in record.answers.items()
        for question, answer in zip(questions[split], answers, strict=True)
    )
    todo = {slot: _unjudged(judge, store, said) for slot, judge in judges.items()}
    keys = list(dict.fromkeys(key for needed in todo.values() for key in needed))
    failed: dict[str, list[str]] = {}
    for start in range(0, len(keys), CHUNK):
        for slot, judge in judges.items():  # one chunk for all judges: some share the work on a case
            chunk = [key for key in keys[start : start + CHUNK] if key in todo[slot]]
            found = _judge_chunk(judge, [_case(words[question], answer) for question, answer in chunk], cache)
            store.add_judgements(
                judge.fingerprint, {key: (j.probability, j.reason) for key, j in zip(chunk, found, strict=True)}
            )
            failed.setdefault(slot, []).extend(j.reason for j in found if j.probability is None)
    for slot, reasons in failed.items():
        if reasons:
            say(f"{slot}: {len(reasons)} of {len(todo[slot])} judgements are missing (first: {reasons[0]})")


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
    """What the judge says, checked: a probability that is none is missing."""
    found = judge.score(cases)
    if len(found) != len(cases):
        raise ConfigError(
            got=f"{len(found)} judgements of {len(cases)} answers from {judge.name}",
            expected="one for each answer, in order",
            remedy="mend its score(): a judgement that fails is Judgement(None, reason)",
        )
    return [_checked(judgement) for judgement in found]


def _checked(judgement: Judgement) -> Judgement:
    if judgement.probability is None:
        return Judgement(None, judgement.reason or "no reason given")
    p = float(judgement.probability)
    return Judgement(p) if 0 <= p <= 1 else Judgement(None, f"{p} is no probability")


def _address(judge: Judge, case: Case) -> str:
    references = [case.true, case.false] if judge.uses_references else None
    return content_hash(["judgement", judge.fingerprint, case.question, case.answer, references], 32)


def _case(question: HeldOutQuestion, answer: str) -> Case:
    return Case(question.text, answer, question.true, question.false)
