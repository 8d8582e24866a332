"""Rows of questions from any source, and the values in a row. `locaudit.behaviours.loaders` makes questions of them.

A source is text (JSONL, a JSON list, CSV), a table (Parquet, a folder of the package datasets, an object of Python), or
the repository of TruthfulQA. Errors name the row.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from locaudit import hub
from locaudit.behaviours.behaviour import unique, with_period
from locaudit.errors import DataError, import_extra

Row = tuple[str, str, Mapping[str, Any]]
"""(where the row is, such as ``x.csv, line 7``; its number in messages; its values)."""

HUB_ID = "truthfulqa/truthful_qa"
HUB_COLUMNS = ("question", "best_answer", "correct_answers", "incorrect_answers")
_ONE = "give the file or the folder of one split, such as FOLDER/train"
_CSV_REMEDY = "give the path of the TruthfulQA CSV (github.com/sylinrl/TruthfulQA) instead"


@contextmanager
def at(place: str) -> Iterator[None]:
    """If a `DataError` is raised inside, put `place` at the beginning of its message."""
    try:
        yield
    except DataError as error:
        raise DataError(got=f"{place}: {error.got}", expected=error.expected, remedy=error.remedy) from None


def read_text(file: Path | Traversable, name: str, expected: str) -> str:
    """The text of a file. Raises `DataError` with what was `expected` if it is missing, empty or no text."""
    text, problem, remedy = "", "", "choose another file"
    try:
        text = file.read_bytes().decode("utf-8-sig")
        problem = "a binary file" if "\0" in text else "" if text.strip() else "which is empty"
    except (FileNotFoundError, IsADirectoryError):
        problem, remedy = "which is not a file", "correct the path, or try `misconceptions`"
    except OSError as error:
        problem, remedy = f"which cannot be read ({error.strerror})", "check the path and its permissions"
    except UnicodeDecodeError as error:
        problem, remedy = f"which is not UTF-8 text (byte {error.start})", "save it as UTF-8, or choose another file"
    if problem:
        raise DataError(got=f"{name}, {problem}", expected=expected, remedy=remedy)
    return text


def text_rows(text: str, source: str) -> Iterator[tuple[str, str, Any]]:
    """(where, number, value) of each row of JSONL, a JSON list, or CSV."""
    start = text.lstrip()[0]
    return (
        json_lines(text, source)
        if start == "{"
        else json_items(text, source) if start == "[" else csv_rows(text, source, (), "a CSV file")
    )  # fmt: skip


def json_lines(text: str, source: str) -> Iterator[tuple[str, str, Any]]:
    """(where, number, value) of each line of JSONL."""
    # Not splitlines(): a JSON string may contain U+2028 and other characters that splitlines() takes for line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{source}, line {number}", str(number), parse_json(line, source, number)


def json_items(text: str, source: str) -> Iterator[tuple[str, str, Any]]:
    """(where, number, value) of each item of a JSON list."""
    for number, value in enumerate(parse_json(text, source)):
        yield f"{source}, row {number:04d}", f"{number:04d}", value


class _KeyTwiceError(ValueError):
    """A key that occurs twice in an object, of which JSON would use the last value."""


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _KeyTwiceError(f"twice the key {next(key for key in keys if keys.count(key) > 1)}")
    return found


def parse_json(text: str, source: str, line: int = 1) -> Any:
    """The value of JSON that begins in this line of the source. Raises `DataError`."""
    try:
        return json.loads(text, object_pairs_hook=_object_of)
    except (ValueError, RecursionError) as error:
        where = f"{source}, line {line + getattr(error, 'lineno', 1) - 1}"
        told = str(error) if type(error) is _KeyTwiceError else "a number is too long, or it is nested too deeply"
        reason = getattr(error, "msg", None) or told
        raise DataError(got=f"{where}: broken JSON ({reason})", expected="JSON", remedy="correct that line") from None


def csv_rows(text: str, source: str, needed: Sequence[str], what: str) -> Iterator[Row]:
    """Rows of CSV text, whose header must have the `needed` columns; `what` names such a file in errors."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        lines = [(f"{source}, line {reader.line_num}", cells) for cells in reader if cells]
    except csv.Error as error:
        got = f"{source}, line {reader.line_num}: broken CSV ({error})"
        raise DataError(got=got, expected="CSV", remedy="correct the quotes in that line") from None
    (_, header), *records = lines
    with at(source):
        require(header, needed, what)
        if twice := next((name for name in header if header.count(name) > 1), None):
            raise DataError(got=f"twice the column {twice}", expected="each name once", remedy="rename one of them")
    for number, (where, cells) in enumerate(records):
        if len(cells) != len(header):
            got = f"{where}: {len(cells)} cells"
            raise DataError(
                got=got, expected=f"{len(header)}, as in the header", remedy="correct the commas or quotes in that line"
            )
        yield where, f"{number:04d}", dict(zip(header, cells, strict=True))


def as_rows(values: Any) -> Iterable[Any]:
    """Rows of a list of mappings, a ``datasets.Dataset`` or a data frame, whose missing cells become None."""
    if hasattr(values, "to_dict") and hasattr(values, "columns"):
        return values.astype(object).where(values.notna(), None).to_dict("records")
    if isinstance(values, Mapping) or not isinstance(values, Iterable):
        splits = f", of the splits {', '.join(map(str, values))}" if isinstance(values, Mapping) else ""
        raise DataError(
            got=f"a {type(values).__name__}{splits}",
            expected="a list of mappings, a data frame or a datasets.Dataset",
            remedy="take one split, such as dataset['train']" if splits else "convert it to a list of dict",
        )
    return values


def load_table(path: Path) -> Any:
    """Rows of a Parquet file, or of the one split in a folder that ``save_to_disk`` wrote or that has data files."""
    parquet, datasets = (import_extra(name, "hub") for name in ("pyarrow.parquet", "datasets"))
    saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        if not path.is_dir():
            return parquet.read_table(path).to_pylist()
        found = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path))
    except Exception as error:  # datasets and pyarrow share no base class
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DataError(
            got=f"{path}, which cannot be read ({reason})", expected="Parquet, or a folder of datasets", remedy=_ONE
        ) from error
    if isinstance(found, Mapping) and len(found) != 1:
        raise DataError(got=f"{path} with the splits {', '.join(found)}", expected="one split", remedy=_ONE)
    return next(iter(found.values())) if isinstance(found, Mapping) else found


def truthfulqa_rows(source: str) -> Iterator[Row]:
    """Rows of TruthfulQA from the hub, or from a folder with a copy of its repository."""
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
    path, config, data_dir = (source, None, "generation") if folder else (HUB_ID, "generation", None)
    problem = None if folder else hub.ask(HUB_ID, "README.md", kind="dataset")
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
        with at(where):
            row = as_object(values, HUB_COLUMNS, "the TruthfulQA repository")
        yield where, f"{number:04d}", row


def as_object(value: Any, needed: Sequence[str], what: str) -> Mapping[str, Any]:
    """`value`, a JSON object, without its null entries. Raises `DataError` unless it has every key of `needed`."""
    if not isinstance(value, dict):
        raise DataError(
            got=f"{value!r:.60}",
            expected=f"an object with {', '.join(needed)}".removesuffix(" with "),
            remedy="correct that row",
        )
    row = {key: item for key, item in value.items() if item is not None}
    require(row, needed, what)
    return row


def require(found: Iterable[str], needed: Sequence[str], what: str) -> None:
    """Raise `DataError` unless all `needed` names are among those found; `what` says in what, for the message."""
    found = [str(name) for name in found]
    missing = [name for name in needed if name not in found]
    if missing:
        raise DataError(
            got=f"no {', '.join(missing)} (found: {', '.join(found)[:200] or 'nothing'})",
            expected=f"{what} with {', '.join(needed)}",
            remedy="rename the columns or keys (for preference pairs: prompt, chosen and rejected; or name yours with "
            "--behaviour-columns), or write JSONL with question, true and false; for TruthfulQA use its TruthfulQA.csv "
            "(not mc_task.json or a finetune file)",
        )


def string_of(row: Mapping[str, Any], key: str) -> str:
    """The stripped text under `key`; empty if the row has no such key."""
    value = row.get(key, "")
    if not isinstance(value, str):
        raise DataError(got=f"{key} = {value!r:.60}", expected="text", remedy=f"put {key} in quotes")
    return _encodable(value).strip()


def answers_of(row: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """The answers under `key`: stripped, with a period where one is missing, without empty or repeated answers."""
    value = row[key]
    if not isinstance(value, list) or not all(isinstance(answer, str) for answer in value):
        remedy = f'write "{key}": ["first answer", "second answer"]'
        raise DataError(got=f"{key} = {value!r:.60}", expected="a list of texts", remedy=remedy)
    return unique([with_period(_encodable(answer)) for answer in value if answer.strip()])


def texts_of(row: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """The texts under `key`, without repeated ones; none if the row has no such key."""
    value = row.get(key, [])
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        remedy = f'write "{key}": ["one text", "another"]'
        raise DataError(got=f"{key} = {value!r:.60}", expected="a list of texts", remedy=remedy)
    return unique([_encodable(text) for text in value])


def _encodable(text: str) -> str:
    # A JSON escape can be half of a surrogate pair. Tokenizers would refuse it too, but only much later.
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(got=f"{text!r:.60}", expected="Unicode text", remedy="correct its \\u escape") from None
    return text
