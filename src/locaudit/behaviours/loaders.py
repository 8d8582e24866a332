"""Behaviours from JSONL, TruthfulQA (CSV or hub repository) and contrastive A/B JSON: text to rows to questions."""

from __future__ import annotations

import csv
import io
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from locaudit import hub
from locaudit.behaviours.behaviour import Behaviour, Question, normalise, unique, with_period
from locaudit.behaviours.format import truthful_primer
from locaudit.errors import DataError
from locaudit.registry import LOADERS

Row = tuple[str, str, Mapping[str, Any]]
"""Where it stands (``x.csv, line 7``), the id it has unless it names one, its values."""
Questions = tuple[list[tuple[str, Question]], list[str]]
"""Questions with where they stand; then what was dropped on the way, in words."""

_BUNDLED = ("misconceptions", "misconceptions-balanced")
_HUB_ID = "truthfulqa/truthful_qa"
_HUB_IDS = (_HUB_ID, "truthful_qa")
_JSONL_KEYS = ("question", "true", "false")
_AB_KEYS = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
_HUB_COLUMNS = ("question", "best_answer", "correct_answers", "incorrect_answers")
_CSV_COLUMNS = ("Question", "Best Answer", "Correct Answers", "Incorrect Answers")
_SOURCES = f"`{_BUNDLED[0]}`, `{_BUNDLED[1]}`, `{_HUB_ID}`, or a JSONL, TruthfulQA CSV or A/B JSON file"
_CSV_REMEDY = "give the path of the TruthfulQA CSV (github.com/sylinrl/TruthfulQA) instead"


@dataclass(frozen=True)
class Loader:
    """A format of behaviours, registered in `locaudit.registry.LOADERS`."""

    rows: Callable[[str, str], Iterable[Row]]
    """Text and the name of its source to rows."""
    questions: Callable[[Iterable[Row]], Questions]
    """Rows to questions."""
    suffix: str = ""
    """Of its files, for example ``.jsonl``."""
    aspects: tuple[str, ...] = Behaviour.aspects
    """What judges ask of answers to such questions."""
    primer: str = ""
    """What stands before such questions when they are scored (`Behaviour.primer`)."""


def load_behaviour(source: str | Path, *, format: str = "auto") -> Behaviour:
    """Read a behaviour; its name is the file's stem.

    `source` is one of:

    - ``misconceptions`` or ``misconceptions-balanced``, which ship with the package (docs/misconceptions.md);
    - a JSONL file with ``question``, ``true`` and ``false`` (lists of answers), and if wanted ``id`` (default: the
      line number), ``best``, ``category`` and ``split``; other keys are ignored;
    - a TruthfulQA CSV of any release, the hub id ``truthfulqa/truthful_qa`` (needs the extra ``hub``), or a folder laid
      out like the hub's repository; ids are row numbers from ``0000``. The best answer joins the true ones. An answer
      on both sides is dropped from both, with a warning;
    - a JSON list of ``question``, ``answer_matching_behavior`` (true) and ``answer_not_matching_behavior`` (false);
      ids as above. A repeated row is dropped, with a warning.

    The first and the third bring the bundled primer, which stands before each scored question; the others bring none.
    Answers are stripped, and those of all but the A/B format get a period (`with_period`). `format` ``auto`` goes by
    the name's suffix, then by the content. Raises `DataError` that names the file and the line or row.
    """
    if format != "auto" and format not in LOADERS:
        expected = ", ".join(("auto", *LOADERS))
        raise DataError(got=f"format {format!r}", expected=expected, remedy="check the spelling")
    name, path = str(source), Path(source)
    bundled = name in _BUNDLED and format in ("auto", "jsonl")
    if format in ("auto", "truthfulqa") and (os.path.isdir(path) or name in _HUB_IDS):
        kind, (placed, dropped) = "truthfulqa", _truthfulqa_questions(_hub_rows(name))
    else:
        text = _read(resources.files("locaudit.behaviours").joinpath(f"{name}.jsonl") if bundled else path, name)
        kind = "jsonl" if bundled else _sniff(path, text) if format == "auto" else format
        placed, dropped = LOADERS[kind].questions(LOADERS[kind].rows(text, name))
    if dropped:
        listed = "; ".join(dropped[:5]) + ("; ..." if len(dropped) > 5 else "")
        warnings.warn(f"{name}: dropped {len(dropped)}: {listed}", UserWarning, stacklevel=2)
    primer = truthful_primer() if bundled else LOADERS[kind].primer
    with _at(_first_repeat(placed) or name):
        return Behaviour(path.resolve().stem, tuple(question for _, question in placed), LOADERS[kind].aspects, primer)


def _read(file: Path | Traversable, name: str) -> str:
    text, problem, remedy = "", "", "give another file"
    try:
        text = file.read_bytes().decode("utf-8-sig")
        problem = "a binary file" if "\0" in text else "" if text.strip() else "which is empty"
    except (FileNotFoundError, IsADirectoryError):
        problem, remedy = "which is not a file", f"check the path, or try `{_BUNDLED[0]}`"
    except OSError as error:
        problem, remedy = f"which cannot be read ({error.strerror})", "check the path and its permissions"
    except UnicodeDecodeError as error:
        problem, remedy = f"which is not UTF-8 text (byte {error.start})", "save it as UTF-8, or give another file"
    if problem:
        raise DataError(got=f"{name}, {problem}", expected=_SOURCES, remedy=remedy)
    return text


def _sniff(path: Path, text: str) -> str:
    by_suffix = {loader.suffix: name for name, loader in LOADERS.items() if loader.suffix}
    by_start = {"[": "ab", "{": "jsonl"}
    kind = by_suffix.get(path.suffix.lower()) or by_start.get(text.lstrip()[0])
    if kind is None and all(column in text.split("\n", 1)[0] for column in _CSV_COLUMNS):
        kind = "truthfulqa"
    if kind is None:
        got = f"{path}, which starts with {text.lstrip()[:40]!r}"
        raise DataError(got=got, expected=_SOURCES, remedy="write it as JSONL with question, true and false")
    return kind


@contextmanager
def _at(place: str) -> Iterator[None]:
    """Put the place before the text of any `DataError` raised inside."""
    try:
        yield
    except DataError as error:
        raise DataError(got=f"{place}: {error.got}", expected=error.expected, remedy=error.remedy) from None


def _first_repeat(placed: Iterable[tuple[str, Question]]) -> str | None:
    """The place of the first question that `Behaviour` refuses as a repeat of an earlier one."""
    seen: set[tuple[str, str]] = set()
    for where, question in placed:
        keys = {("id", question.id), ("text", normalise(question.text))}
        if keys & seen:
            return where
        seen |= keys
    return None


def _json(text: str, source: str, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f"{source}, line {line + getattr(error, 'lineno', 1) - 1}"
        reason = getattr(error, "msg", None) or "numbers too long or nested too deep"
        raise DataError(got=f"{where}: broken JSON ({reason})", expected="JSON", remedy="mend the line") from None


def _require(found: Iterable[str], needed: Sequence[str], what: str) -> None:
    found = [str(name) for name in found]
    missing = [name for name in needed if name not in found]
    if missing:
        raise DataError(
            got=f"no {', '.join(missing)} among {', '.join(found)[:200] or 'nothing'}",
            expected=f"{what} with {', '.join(needed)}",
            remedy="for TruthfulQA give its TruthfulQA.csv (not mc_task.json or a finetune file); else name the "
            "columns so, or write JSONL with question, true and false",
        )


def _object(value: Any, needed: Sequence[str], what: str) -> Mapping[str, Any]:
    """`value` without its nulls, if it is a JSON object that has all of `needed`."""
    if not isinstance(value, dict):
        raise DataError(got=f"{value!r:.60}", expected=f"an object with {', '.join(needed)}", remedy="mend the row")
    row = {key: item for key, item in value.items() if item is not None}
    _require(row, needed, what)
    return row


def _string(row: Mapping[str, Any], key: str) -> str:
    """The stripped text under `key`; ``""`` where it is absent."""
    value = row.get(key, "")
    if not isinstance(value, str):
        raise DataError(got=f"{key} = {value!r:.60}", expected="text", remedy=f"put {key} in quotes")
    return _encodable(value).strip()


def _sentences(row: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """The answers under `key`: stripped, with a period, without empties or repeats."""
    value = row[key]
    if not isinstance(value, list) or not all(isinstance(answer, str) for answer in value):
        remedy = f'write "{key}": ["first answer", "second answer"]'
        raise DataError(got=f"{key} = {value!r:.60}", expected="a list of texts", remedy=remedy)
    return unique([with_period(_encodable(answer)) for answer in value if answer.strip()])


def _best(row: Mapping[str, Any], key: str) -> str | None:
    best = _string(row, key)
    return with_period(best) if best else None


def _encodable(text: str) -> str:
    # JSON can spell half of a surrogate pair; tokenizers refuse it, much later.
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(got=f"{text!r:.60}", expected="Unicode text", remedy="mend the \\u escape") from None
    return text


def _jsonl_rows(text: str, source: str) -> Iterator[Row]:
    # Not splitlines(): U+2028 and its like may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{source}, line {number}"
            value = _json(line, source, number)
            with _at(where):
                row = _object(value, _JSONL_KEYS, "a JSONL file of questions")
            yield where, str(number), row


def _jsonl_questions(rows: Iterable[Row]) -> Questions:
    placed = []
    for where, number, row in rows:
        with _at(where):
            name = str(row["id"]) if isinstance(row.get("id"), int) else _string(row, "id") or number
            text, category, split = (_string(row, key) for key in ("question", "category", "split"))
            true, false = _sentences(row, "true"), _sentences(row, "false")
            question = Question(name, text, true, false, _best(row, "best"), category, split or None)
        placed.append((where, question))
    return placed, []


def _csv_rows(text: str, source: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        lines = [(f"{source}, line {reader.line_num}", cells) for cells in reader if cells]
    except csv.Error as error:
        got = f"{source}, line {reader.line_num}: broken CSV ({error})"
        raise DataError(got=got, expected="CSV", remedy="mend the quotes") from None
    (_, header), *records = lines
    with _at(source):
        _require(header, _CSV_COLUMNS, "a TruthfulQA CSV")
    for number, (where, cells) in enumerate(records):
        if len(cells) != len(header):
            got = f"{where}: {len(cells)} cells"
            raise DataError(got=got, expected=f"{len(header)}, as in the header", remedy="mend the commas or quotes")
        row = dict(zip(header, cells, strict=True))
        question, best, true, false = (row[column] for column in _CSV_COLUMNS)
        values = (question, best, true.split(";"), false.split(";"), row.get("Category", ""))
        yield where, f"{number:04d}", dict(zip((*_HUB_COLUMNS, "category"), values, strict=True))


def _hub_rows(source: str) -> Iterator[Row]:
    try:
        from datasets import config as datasets_config
        from datasets import load_dataset
    except ImportError as error:
        got, remedy = f"{source} but no package datasets ({error})", f'pip install "locaudit[hub]", or {_CSV_REMEDY}'
        raise DataError(got=got, expected="datasets installed", remedy=remedy) from None
    # A folder's configurations are named in its README.md, which a partial copy lacks.
    folder = os.path.isdir(source)
    path, config, data_dir = (source, None, "generation") if folder else (_HUB_ID, "generation", None)
    problem = None if folder else hub.ask(_HUB_ID, "README.md", kind="dataset")
    was_offline = datasets_config.HF_HUB_OFFLINE
    try:
        # Without the hub, what was downloaded before or an error at once, not half a minute of retries.
        datasets_config.HF_HUB_OFFLINE = was_offline or problem is not None
        table = load_dataset(path, config, data_dir=data_dir, split="validation")
    except Exception as error:  # datasets, huggingface_hub, httpx and pyarrow share no base class.
        reason = problem or " ".join(f"{type(error).__name__}: {error}".split())[:200]
        got = f"{source}, which could not be loaded ({reason})"
        expected = "the TruthfulQA repository with generation/validation-00000-of-00001.parquet"
        raise DataError(got=got, expected=expected, remedy=_CSV_REMEDY) from error
    finally:
        datasets_config.HF_HUB_OFFLINE = was_offline
    for number, values in enumerate(table):
        where = f"{source}, row {number:04d}"
        with _at(where):
            row = _object(values, _HUB_COLUMNS, "the TruthfulQA repository")
        yield where, f"{number:04d}", row


def _truthfulqa_questions(rows: Iterable[Row]) -> Questions:
    placed, dropped = [], []
    for where, number, row in rows:
        with _at(where):
            true, false = _sentences(row, "correct_answers"), _sentences(row, "incorrect_answers")
            best = _best(row, "best_answer")
            if best and best not in true:
                true += (best,)
            both = set(true) & set(false)
            # Where a side would be left empty, `Question` refuses the row instead.
            if both < set(true) and both < set(false):
                dropped += [f"{answer!r}, both true and false, of question {number}" for answer in sorted(both)]
                true, false = (tuple(answer for answer in side if answer not in both) for side in (true, false))
                best = None if best in both else best
            text, category = _string(row, "question"), _string(row, "category")
            question = Question(number, text, true, false, best, category)
        placed.append((where, question))
    return placed, dropped


def _ab_rows(text: str, source: str) -> Iterator[Row]:
    values = _json(text, source)
    if not isinstance(values, list):
        got = f"{source} with a JSON {type(values).__name__}"
        raise DataError(got=got, expected="a list of A/B questions", remedy="put the questions in [ ]")
    for number, value in enumerate(values):
        where = f"{source}, row {number:04d}"
        with _at(where):
            row = _object(value, _AB_KEYS, "an A/B file")
        yield where, f"{number:04d}", row


def _ab_questions(rows: Iterable[Row]) -> Questions:
    placed, dropped = [], []
    seen: dict[tuple[str, str, str], str] = {}
    for where, number, row in rows:
        with _at(where):
            text, matching, other = (_string(row, key) for key in _AB_KEYS)
            question = Question(id=number, text=text, true=(matching,), false=(other,))
        first = seen.setdefault((normalise(text), matching, other), number)
        if first == number:
            placed.append((where, question))
        else:
            dropped.append(f"question {number}, which repeats {first}")
    return placed, dropped


LOADERS.register("jsonl")(Loader(_jsonl_rows, _jsonl_questions, ".jsonl"))
LOADERS.register("truthfulqa")(Loader(_csv_rows, _truthfulqa_questions, ".csv", primer=truthful_primer()))
# The choice between (A) and (B) is no free answer: no bundled aspect asks anything sensible of it.
LOADERS.register("ab")(Loader(_ab_rows, _ab_questions, aspects=()))
