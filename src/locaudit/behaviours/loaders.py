"""Read behaviours from JSONL, TruthfulQA (CSV or hub repository) and contrastive A/B JSON.

Each format has a `Loader`, which turns the text of a file into rows, and rows into questions.
"""

from __future__ import annotations

import csv
import io
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from locaudit import hub
from locaudit.behaviours.balance import balance
from locaudit.behaviours.behaviour import Behaviour, Question, Style, normalise, unique, with_period
from locaudit.behaviours.format import truthful_primer
from locaudit.errors import DataError
from locaudit.registry import LOADERS

Row = tuple[str, str, Mapping[str, Any]]
"""(where the row is, such as ``x.csv, line 7``; its number in messages; its values)."""
Questions = tuple[list[tuple[str, Question]], list[str]]
"""(a pair (where the question is, the question) for each question; a description of each answer or row dropped)."""

BUNDLED: Mapping[str, Mapping[str, Any]] = {
    "misconceptions": {"primer": truthful_primer()},
    "misconceptions-balanced": {"primer": truthful_primer()},
    "sentiment": {"aspects": ("negative", "fluency"), "style": "completion"},
}
"""Files that ship with the package, each with the fields of `Loader` that differ from those of other JSONL files."""
_HUB_ID = "truthfulqa/truthful_qa"
_HUB_IDS = (_HUB_ID, "truthful_qa")
_JSONL_KEYS = ("question", "true", "false")
_AB_KEYS = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
_HUB_COLUMNS = ("question", "best_answer", "correct_answers", "incorrect_answers")
_CSV_COLUMNS = ("Question", "Best Answer", "Correct Answers", "Incorrect Answers")
_SOURCES = f"{', '.join(f'`{name}`' for name in (*BUNDLED, _HUB_ID))}, or a JSONL, TruthfulQA CSV or A/B JSON file"
_CSV_REMEDY = "give the path of the TruthfulQA CSV (github.com/sylinrl/TruthfulQA) instead"


@dataclass(frozen=True)
class Loader:
    """A file format of behaviours. Loaders are registered in `locaudit.registry.LOADERS`."""

    rows: Callable[[str, str], Iterable[Row]]
    """Turns (text, name of its source) into rows."""
    questions: Callable[[Iterable[Row]], Questions]
    """Turns rows into questions."""
    suffix: str = ""
    """Suffix of files in this format, for example ``.jsonl``. Empty: none."""
    aspects: tuple[str, ...] = Behaviour.aspects
    """What judges assess in answers to these questions (`Behaviour.aspects`)."""
    primer: str = ""
    """Text put before these questions when they are scored (`Behaviour.primer`)."""
    style: Style = "qa"
    """Format of these questions (`Behaviour.style`)."""


def load_behaviour(source: str | Path, *, format: str = "auto") -> Behaviour:
    """Read a behaviour from a file, a folder or the hub. Its name is the file's name without the suffix.

    `source` is one of:

    - ``misconceptions``, ``misconceptions-balanced`` (docs/misconceptions.md) or ``sentiment`` (docs/sentiment.md),
      which ship with the package;
    - a JSONL file: each line has ``question`` and the lists of answers ``true`` and ``false``. Optional keys are
      ``id``, ``best``, ``category``, ``split`` and ``group`` (`Question`). Other keys are ignored;
    - a TruthfulQA CSV of any release, the hub id ``truthfulqa/truthful_qa`` (needs the extra ``hub``), or a folder with
      the same files as that repository. The best answer is added to the true ones. An answer that
      is both true and false is dropped from both lists, with a warning;
    - an A/B file: a JSON list of objects with ``question``, ``answer_matching_behavior`` (true) and
      ``answer_not_matching_behavior`` (false). A repeated row is dropped, with a warning.
      If more than two thirds of the right answers are the same letter, options are swapped (`balance`).

    A question without an id gets one from its content (`Question.id`), so that the order of rows does not matter.

    The misconceptions and TruthfulQA come with the bundled primer, a text that is put before each scored question.
    Other data have no primer. Answers are stripped and, except in A/B files, get a period if they lack one
    (`with_period`). If `format` is ``auto``, the file's suffix decides the format; if that is unknown, its content
    does. Raises `DataError`, which names the file and the line or row.
    """
    if format != "auto" and format not in LOADERS:
        expected = ", ".join(("auto", *LOADERS))
        raise DataError(got=f"format {format!r}", expected=expected, remedy="choose one of these")
    name, path = str(source), Path(source)
    bundled = name in BUNDLED and format in ("auto", "jsonl")
    if format in ("auto", "truthfulqa") and (os.path.isdir(path) or name in _HUB_IDS):
        kind, (placed, dropped) = "truthfulqa", _truthfulqa_questions(_hub_rows(name))
    else:
        text = _read(resources.files("locaudit.behaviours").joinpath(f"{name}.jsonl") if bundled else path, name)
        kind = "jsonl" if bundled else _sniff(path, text) if format == "auto" else format
        placed, dropped = LOADERS[kind].questions(LOADERS[kind].rows(text, name))
    loader = replace(LOADERS[kind], **(BUNDLED[name] if bundled else {}))
    if dropped:
        listed = "; ".join(dropped[:5]) + ("; ..." if len(dropped) > 5 else "")
        warnings.warn(
            f"{name}: dropped {len(dropped)} repeated or contradictory entries: {listed}", UserWarning, stacklevel=2
        )
    questions = tuple(question for _, question in placed)
    with _at(_first_repeat(placed) or name):
        found = Behaviour(path.resolve().stem, questions, loader.aspects, loader.primer, loader.style)
    questions, notes = balance(found.questions)
    for note in notes:
        warnings.warn(f"{name}: {note}", UserWarning, stacklevel=2)
    return replace(found, questions=questions, notes=notes)


def _read(file: Path | Traversable, name: str) -> str:
    text, problem, remedy = "", "", "choose another file"
    try:
        text = file.read_bytes().decode("utf-8-sig")
        problem = "a binary file" if "\0" in text else "" if text.strip() else "which is empty"
    except (FileNotFoundError, IsADirectoryError):
        problem, remedy = "which is not a file", f"correct the path, or try `{next(iter(BUNDLED))}`"
    except OSError as error:
        problem, remedy = f"which cannot be read ({error.strerror})", "check the path and its permissions"
    except UnicodeDecodeError as error:
        problem, remedy = f"which is not UTF-8 text (byte {error.start})", "save it as UTF-8, or choose another file"
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
        raise DataError(got=got, expected=_SOURCES, remedy="convert it to JSONL with the keys question, true and false")
    return kind


@contextmanager
def _at(place: str) -> Iterator[None]:
    """If a `DataError` is raised inside, put `place` at the beginning of its message."""
    try:
        yield
    except DataError as error:
        raise DataError(got=f"{place}: {error.got}", expected=error.expected, remedy=error.remedy) from None


def _first_repeat(placed: Iterable[tuple[str, Question]]) -> str | None:
    """Where the first question is whose text or id occurred before. `Behaviour` will refuse it."""
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
        reason = getattr(error, "msg", None) or "a number is too long, or it is nested too deeply"
        raise DataError(got=f"{where}: broken JSON ({reason})", expected="JSON", remedy="correct that line") from None


def _require(found: Iterable[str], needed: Sequence[str], what: str) -> None:
    found = [str(name) for name in found]
    missing = [name for name in needed if name not in found]
    if missing:
        raise DataError(
            got=f"no {', '.join(missing)} (found: {', '.join(found)[:200] or 'nothing'})",
            expected=f"{what} with {', '.join(needed)}",
            remedy="rename the columns or keys, or write JSONL with question, true and false; for TruthfulQA use its "
            "TruthfulQA.csv (not mc_task.json or a finetune file)",
        )


def _object(value: Any, needed: Sequence[str], what: str) -> Mapping[str, Any]:
    """`value`, a JSON object, without its null entries. Raises `DataError` unless it has every key of `needed`."""
    if not isinstance(value, dict):
        raise DataError(got=f"{value!r:.60}", expected=f"an object with {', '.join(needed)}", remedy="correct that row")
    row = {key: item for key, item in value.items() if item is not None}
    _require(row, needed, what)
    return row


def _string(row: Mapping[str, Any], key: str) -> str:
    """The stripped text under `key`; empty if the row has no such key."""
    value = row.get(key, "")
    if not isinstance(value, str):
        raise DataError(got=f"{key} = {value!r:.60}", expected="text", remedy=f"put {key} in quotes")
    return _encodable(value).strip()


def _sentences(row: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """The answers under `key`: stripped, with a period where one is missing, without empty or repeated answers."""
    value = row[key]
    if not isinstance(value, list) or not all(isinstance(answer, str) for answer in value):
        remedy = f'write "{key}": ["first answer", "second answer"]'
        raise DataError(got=f"{key} = {value!r:.60}", expected="a list of texts", remedy=remedy)
    return unique([with_period(_encodable(answer)) for answer in value if answer.strip()])


def _best(row: Mapping[str, Any], key: str) -> str | None:
    best = _string(row, key)
    return with_period(best) if best else None


def _encodable(text: str) -> str:
    # A JSON escape can be half of a surrogate pair. Tokenizers would refuse it too, but only much later.
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(got=f"{text!r:.60}", expected="Unicode text", remedy="correct its \\u escape") from None
    return text


def _jsonl_rows(text: str, source: str) -> Iterator[Row]:
    # Not splitlines(): a JSON string may contain U+2028 and other characters that splitlines() takes for line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{source}, line {number}"
            value = _json(line, source, number)
            with _at(where):
                row = _object(value, _JSONL_KEYS, "a JSONL file of questions")
            yield where, str(number), row


def _jsonl_questions(rows: Iterable[Row]) -> Questions:
    placed = []
    for where, _, row in rows:
        with _at(where):
            name = str(row["id"]) if isinstance(row.get("id"), int) else _string(row, "id")
            text, category, split, group = (_string(row, key) for key in ("question", "category", "split", "group"))
            true, false = _sentences(row, "true"), _sentences(row, "false")
            question = Question(name, text, true, false, _best(row, "best"), category, split or None, group)
        placed.append((where, question))
    return placed, []


def _csv_rows(text: str, source: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        lines = [(f"{source}, line {reader.line_num}", cells) for cells in reader if cells]
    except csv.Error as error:
        got = f"{source}, line {reader.line_num}: broken CSV ({error})"
        raise DataError(got=got, expected="CSV", remedy="correct the quotes in that line") from None
    (_, header), *records = lines
    with _at(source):
        _require(header, _CSV_COLUMNS, "a TruthfulQA CSV")
    for number, (where, cells) in enumerate(records):
        if len(cells) != len(header):
            got = f"{where}: {len(cells)} cells"
            raise DataError(
                got=got, expected=f"{len(header)}, as in the header", remedy="correct the commas or quotes in that line"
            )
        row = dict(zip(header, cells, strict=True))
        question, best, true, false = (row[column] for column in _CSV_COLUMNS)
        values = (question, best, true.split(";"), false.split(";"), row.get("Category", ""))
        yield where, f"{number:04d}", dict(zip((*_HUB_COLUMNS, "category"), values, strict=True))


def _hub_rows(source: str) -> Iterator[Row]:
    try:
        from datasets import config as datasets_config
        from datasets import load_dataset
    except ImportError as error:
        got, remedy = (
            f"{source}, but the package datasets cannot be imported ({error})",
            f'run: pip install "locaudit[hub]", or {_CSV_REMEDY}',
        )
        raise DataError(got=got, expected="the package datasets", remedy=remedy) from None
    # README.md names the configurations of a folder, but an incomplete copy may lack it.
    folder = os.path.isdir(source)
    path, config, data_dir = (source, None, "generation") if folder else (_HUB_ID, "generation", None)
    problem = None if folder else hub.ask(_HUB_ID, "README.md", kind="dataset")
    was_offline = datasets_config.HF_HUB_OFFLINE
    try:
        # If the hub does not answer, use earlier downloads or fail at once, instead of retrying for half a minute.
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
            # If this would leave no true or no false answer, nothing is dropped and `Question` refuses the row.
            if both < set(true) and both < set(false):
                dropped += [f"{answer!r}, both true and false, in row {number}" for answer in sorted(both)]
                true, false = (tuple(answer for answer in side if answer not in both) for side in (true, false))
                best = None if best in both else best
            text, category = _string(row, "question"), _string(row, "category")
            question = Question("", text, true, false, best, category)
        placed.append((where, question))
    return placed, dropped


def _ab_rows(text: str, source: str) -> Iterator[Row]:
    values = _json(text, source)
    if not isinstance(values, list):
        got = f"{source}, which holds a JSON {type(values).__name__}"
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
            question = Question("", text, (matching,), (other,))
        first = seen.setdefault((normalise(text), matching, other), number)
        if first == number:
            placed.append((where, question))
        else:
            dropped.append(f"row {number}, which repeats row {first}")
    return placed, dropped


LOADERS.register("jsonl")(Loader(_jsonl_rows, _jsonl_questions, ".jsonl"))
LOADERS.register("truthfulqa")(Loader(_csv_rows, _truthfulqa_questions, ".csv", primer=truthful_primer()))
# An answer is (A) or (B), not free text, so the bundled aspects (truth, informativeness) do not apply to it.
LOADERS.register("ab")(Loader(_ab_rows, _ab_questions, aspects=()))
