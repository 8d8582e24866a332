"""Read behaviours: JSONL, TruthfulQA (CSV or hub repository), contrastive A/B JSON, preference pairs, CounterFact.

Each format has a `Loader`, which turns the text of a file into rows (`locaudit.behaviours.rows`), and rows into
questions. Rows can also come from a Parquet file, a folder of the package datasets, or an object of Python.
"""

from __future__ import annotations

import difflib
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from locaudit.behaviours.balance import OPTIONS, balance
from locaudit.behaviours.behaviour import Behaviour, Question, Style, is_saved, normalise, unique, with_period
from locaudit.behaviours.format import truthful_primer
from locaudit.behaviours.rows import (
    HUB_COLUMNS,
    HUB_ID,
    Row,
    answers_of,
    as_object,
    as_rows,
    at,
    csv_rows,
    json_lines,
    load_table,
    parse_json,
    read_text,
    require,
    string_of,
    text_rows,
    texts_of,
    truthfulqa_rows,
)
from locaudit.errors import DataError
from locaudit.registry import LOADERS

Questions = tuple[list[tuple[str, Question]], list[str]]
"""(a pair (where the question is, the question) for each question; a description of each answer or row dropped)."""

BUNDLED: Mapping[str, Mapping[str, Any]] = {
    "misconceptions": {"primer": truthful_primer()},
    "misconceptions-balanced": {"primer": truthful_primer()},
    "sentiment": {"aspects": ("negative", "fluency"), "style": "completion"},
}
"""Files that ship with the package, each with the fields of `Loader` that differ from those of other JSONL files."""
_HUB_IDS = (HUB_ID, "truthful_qa")
_JSONL_KEYS = ("question", "true", "false")
_JSONL_EXTRAS = ("id", "best", "category", "split", "group", "subject", "paired", "paraphrases", "neighborhood")
_AB_KEYS = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
_LISTS = ("paraphrases", "neighborhood")
_CSV_COLUMNS = ("Question", "Best Answer", "Correct Answers", "Incorrect Answers")
_PAIR_KEYS = ("prompt", "chosen", "rejected")
_PAIR_EXTRAS = tuple(key for key in _JSONL_EXTRAS if key not in ("id", "best"))
_REWRITE_KEYS = ("prompt", "subject", "target_new", "target_true")
_RECORD_KEYS = ("requested_rewrite",)
_RECORD_EXTRAS = ("case_id", "paraphrase_prompts", "neighborhood_prompts")
_RECORD_UNUSED = ("pararel_idx", "attribute_prompts", "generation_prompts")
_SOURCES = f"{', '.join(f'`{name}`' for name in (*BUNDLED, HUB_ID))}, or a JSONL, CSV or JSON file (docs/guide.md)"
_MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](role|content)['"]\s*:""")
"""The beginning of messages that a CSV file has as text."""


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
    needs: tuple[str, ...] = ()
    """Columns that each row has. A table with these columns is read in this format; empty: no table is."""
    optional: tuple[str, ...] = ()
    """Columns that a row can have besides."""
    unused: tuple[str, ...] = ()
    """Columns of the original data that are left out without a warning; others are left out with one."""


def load_behaviour(
    source: str | Path | Iterable[Mapping[str, Any]], *, format: str = "auto", columns: Mapping[str, str] | None = None
) -> Behaviour:
    """Read a behaviour from a file, a folder, the hub or rows. Its name is the file's name without the suffix.

    `source` is one of:

    - ``misconceptions``, ``misconceptions-balanced`` (docs/misconceptions.md) or ``sentiment`` (docs/sentiment.md),
      which ship with the package;
    - a JSONL file: each line has ``question`` and the lists of answers ``true`` and ``false``. Optional keys are
      ``id``, ``best``, ``category``, ``split``, ``group``, ``subject``, ``paired``, ``paraphrases`` and
      ``neighborhood`` (`Question`);
    - a TruthfulQA CSV of any release, the hub id ``truthfulqa/truthful_qa`` (needs the extra ``hub``), or a folder with
      the same files as that repository. The best answer is added to the true ones. An answer that
      is both true and false is dropped from both lists, with a warning;
    - an A/B file: a JSON list of objects with ``question``, ``answer_matching_behavior`` (true) and
      ``answer_not_matching_behavior`` (false). A repeated row is dropped, with a warning.
      If more than two thirds of the right answers are the same letter, options are swapped (`balance`). In the format
      ``ab-text``, the answers are the texts of the options, which are cut from the question;
    - CounterFact (Meng et al. 2022): a JSON list of records with ``requested_rewrite``. The new target is the true
      answer, the target that is a fact the false one. In the format ``counterfact-rewrites``, each fact is in all
      parts of the split: its prompt for training, its paraphrases for validation and test;
    - preference pairs: rows with ``prompt``, ``chosen`` (true) and ``rejected`` (false), each a text or, as TRL calls
      it, conversational: a list with one message. All pairs of a prompt become one question; prompts that differ only
      in case, or in punctuation at their ends, are one. An answer that is chosen
      in one pair and rejected in another is dropped, with a warning, and so is a question that then lacks a true or a
      false answer. Optional keys are those of JSONL but ``id`` and ``best``, the same in all pairs of a prompt;
    - rows of any of these formats in JSONL, JSON, CSV, Parquet, a folder of the package datasets, a list of mappings, a
      data frame or a ``datasets.Dataset``. Then the behaviour's name is ``rows`` unless there is a file;
    - ``behaviour.json`` of a run folder: the behaviour that was given to `audit` as an object. Its columns have been
      read already.

    `columns` names the source's column for each key of the format, such as ``{"prompt": "instruction"}``. Columns that
    no key of the format has are ignored, with a warning.

    A question without an id gets one from its content (`Question.id`), so that the order of rows does not matter.

    The misconceptions and TruthfulQA come with the bundled primer, a text that is put before each scored question.
    Other data have no primer. Answers are stripped and, except in A/B files, get a period if they lack one
    (`with_period`). If `format` is ``auto``, the file's suffix decides the format; if that is unknown, its content
    does. Raises `DataError`, which names the file and the line or row.
    """
    if format != "auto" and format not in LOADERS:
        expected = ", ".join(("auto", *LOADERS))
        raise DataError(got=f"format {format!r}", expected=expected, remedy="choose one of these")
    is_object = not isinstance(source, str | Path)
    name = "rows" if is_object else str(source)
    path = Path(name)
    bundled = name in BUNDLED and format in ("auto", "jsonl") and not is_object
    is_folder, style = os.path.isdir(path), {}
    is_truthfulqa = name in _HUB_IDS or (is_folder and (format == "truthfulqa" or (path / "generation").is_dir()))
    if format in ("auto", "truthfulqa") and is_truthfulqa and not is_object:
        if columns:
            raise DataError(
                got=f"behaviour_columns for {name}",
                expected="none, since the keys of this source are fixed",
                remedy="leave them out",
            )
        kind, rows = "truthfulqa", truthfulqa_rows(name)
    elif is_object or path.suffix.lower() == ".parquet" or (is_folder and format in ("auto", "preferences")):
        values = source if is_object else load_table(path)
        table = [(f"{name}, row {i:04d}", f"{i:04d}", row) for i, row in enumerate(as_rows(values))]
        kind, rows, style = _read_table(table, name, format, columns)
    else:
        file = resources.files("locaudit.behaviours").joinpath(f"{name}.jsonl") if bundled else path
        text = read_text(file, name, _SOURCES)
        if is_saved(text):
            with at(name):
                return Behaviour.from_json(parse_json(text, name))
        is_table = LOADERS[format].rows is text_rows if format != "auto" else not bundled and _is_table(path, text)
        if columns or is_table:
            kind, rows, style = _read_table(list(text_rows(text, name)), name, format, columns)
        else:
            kind = "jsonl" if bundled else _sniff(path, text) if format == "auto" else format
            rows = LOADERS[kind].rows(text, name)
    loader, rows = replace(LOADERS[kind], **(BUNDLED[name] if bundled else style)), list(rows)
    placed, dropped = loader.questions(rows)
    if ignored := _ignored(rows, loader):
        warnings.warn(ignored, UserWarning, stacklevel=2)
    if dropped:
        listed = "; ".join(dropped[:5]) + ("; ..." if len(dropped) > 5 else "")
        warnings.warn(
            f"{name}: dropped {len(dropped)} repeated or contradictory entries: {listed}", UserWarning, stacklevel=2
        )
    questions = tuple(question for _, question in placed)
    with at(_first_repeat(placed) or name):
        found = Behaviour(path.resolve().stem, questions, loader.aspects, loader.primer, loader.style)
    questions, notes = balance(found.questions)
    for note in notes:
        warnings.warn(f"{name}: {note}", UserWarning, stacklevel=2)
    return replace(found, questions=questions, notes=notes)


def _sniff(path: Path, text: str) -> str:
    by_suffix = {loader.suffix: name for name, loader in LOADERS.items() if loader.suffix}
    if path.suffix.lower() == ".jsonl" and re.match(r"\s*\[\s*\{", text):
        got = f"{path}, which holds a JSON list"
        raise DataError(
            got=got, expected="one JSON object a line", remedy="write each item of the list in its own line"
        )
    kind = by_suffix.get(path.suffix.lower()) or ("jsonl" if text.lstrip()[0] == "{" else None)
    if kind is None and all(column in text.split("\n", 1)[0] for column in _CSV_COLUMNS):
        kind = "truthfulqa"
    if kind is None:
        got = f"{path}, which starts with {text.lstrip()[:40]!r}"
        raise DataError(got=got, expected=_SOURCES, remedy="convert it to JSONL with the keys question, true and false")
    return kind


def _ignored(rows: Iterable[Row], loader: Loader) -> str:
    """A warning of columns that are not read; empty if there are none, or if the format names no columns."""
    found: dict[str, str] = {}
    for where, _, row in rows if loader.needs else ():
        for key in row.keys() - {*loader.needs, *loader.optional, *loader.unused}:
            found.setdefault(str(key), where)
    known = ", ".join((*loader.needs, *loader.optional))
    named = ", ".join(sorted(found))
    return f"{next(iter(found.values()))}: ignored {named:.200} (known: {known})" if found else ""


def _first_repeat(placed: Iterable[tuple[str, Question]]) -> str | None:
    """Where the first question is whose text or id occurred before. `Behaviour` will refuse it."""
    seen: set[tuple[str, str]] = set()
    for where, question in placed:
        keys = {("id", question.id), ("text", normalise(question.text))}
        if keys & seen:
            return where
        seen |= keys
    return None


def _best(row: Mapping[str, Any], key: str) -> str | None:
    best = string_of(row, key)
    return with_period(best) if best else None


def _jsonl_rows(text: str, source: str) -> Iterator[Row]:
    for where, number, value in json_lines(text, source):
        with at(where):
            row = as_object(value, _JSONL_KEYS, "a JSONL file of questions")
        yield where, number, row


def _jsonl_questions(rows: Iterable[Row]) -> Questions:
    placed = []
    for where, _, row in rows:
        with at(where):
            name = str(row["id"]) if isinstance(row.get("id"), int) else string_of(row, "id")
            text, category, split, group, subject, paired = (
                string_of(row, key) for key in ("question", "category", "split", "group", "subject", "paired")
            )
            true, false = answers_of(row, "true"), answers_of(row, "false")
            others: dict[str, Any] = {key: texts_of(row, key) for key in _LISTS}
            others |= {"category": category, "split": split or None, "group": group}
            others |= {"subject": subject, "paired": paired}
            question = Question(name, text, true, false, _best(row, "best"), **others)
        placed.append((where, question))
    return placed, []


def _csv_rows(text: str, source: str) -> Iterator[Row]:
    return _csv_as_hub(csv_rows(text, source, _CSV_COLUMNS, "a TruthfulQA CSV"))


def _csv_as_hub(rows: Iterable[Row]) -> Iterator[Row]:
    """Rows of TruthfulQA's CSV with the columns of the hub's repository."""
    for where, number, row in rows:
        with at(where):
            question, best, true, false = (string_of(row, column) for column in _CSV_COLUMNS)
        values = (question, best, true.split(";"), false.split(";"), row.get("Category", ""))
        yield where, number, dict(zip((*HUB_COLUMNS, "category"), values, strict=True))


def _truthfulqa_questions(rows: Iterable[Row]) -> Questions:
    placed, dropped = [], []
    for where, number, row in rows:
        with at(where):
            true, false = answers_of(row, "correct_answers"), answers_of(row, "incorrect_answers")
            best = _best(row, "best_answer")
            if best and best not in true:
                true += (best,)
            both = set(true) & set(false)
            # If this would leave no true or no false answer, nothing is dropped and `Question` refuses the row.
            if both < set(true) and both < set(false):
                dropped += [f"{answer!r}, both true and false, in row {number}" for answer in sorted(both)]
                true, false = (tuple(answer for answer in side if answer not in both) for side in (true, false))
                best = None if best in both else best
            text, category = string_of(row, "question"), string_of(row, "category")
            question = Question("", text, true, false, best, category)
        placed.append((where, question))
    return placed, dropped


def _ab_questions(rows: Iterable[Row]) -> Questions:
    placed = []
    for where, number, row in rows:
        with at(where):
            text, matching, other = (string_of(row, key) for key in _AB_KEYS)
            placed.append((where, number, Question("", text, (matching,), (other,)), (text, matching, other)))
    return _without_repeats(placed)


def _without_repeats(rows: Iterable[tuple[str, str, Question, Sequence[str]]]) -> Questions:
    """The questions (where, number, question, what makes it the same as another) that do not repeat an earlier one."""
    placed, dropped, seen = [], [], {}
    for where, number, question, (text, *rest) in rows:
        first = seen.setdefault((normalise(text), *rest), number)
        if first == number:
            placed.append((where, question))
        else:
            dropped.append(f"row {number}, which repeats row {first}")
    return placed, dropped


def _ab_pairs(rows: Iterable[Row]) -> Iterator[Row]:
    """A/B questions as preference pairs of the texts of their options."""
    for where, number, row in rows:
        with at(where):
            text, *letters = (string_of(row, key) for key in _AB_KEYS)
            found = OPTIONS.fullmatch(text)
            options = {"(A)": found[2], "(B)": found[4]} if found else {}
            if not found or set(letters) != {*options}:
                raise DataError(
                    got=f"the question ...{text[-60:]!r} with the answers {' and '.join(letters)}",
                    expected="the answers (A) and (B), and a line for each of them at the end of the question",
                    remedy="write the rows as preference pairs: prompt, chosen and rejected",
                )
        asked = re.sub(r"\s*(Choices:)?\s*\Z", "", found[1].rpartition("\n")[0])
        yield where, number, dict(zip(_PAIR_KEYS, (asked, *(options[x] for x in letters)), strict=True))


def _counterfact_questions(rows: Iterable[Row]) -> Questions:
    placed = []
    for where, number, row in rows:
        with at(where):
            rewrite = as_object(row["requested_rewrite"], _REWRITE_KEYS, "a requested_rewrite")
            new, fact = (string_of(as_object(rewrite[x], ("str",), x), "str") for x in _REWRITE_KEYS[2:])
            subject = string_of(rewrite, "subject")
            text = string_of(rewrite, "prompt").replace("{}", subject)
            marked: dict[str, Any] = {
                "group": subject,
                "subject": subject,
                "category": string_of(rewrite, "relation_id"),
            }
            marked |= {x: texts_of(row, f"{x.removesuffix('s')}_prompts") for x in _LISTS}
            question = Question(str(row.get("case_id", "")), text, (new,), (fact,), **marked)
            placed.append((where, number, question, (text,)))
    return _without_repeats(placed)


def _rewrite_questions(rows: Iterable[Row]) -> Questions:
    """Each fact in all three parts: its prompt for training, its second paraphrase for validation, its first to test.

    Ids begin with a fact's number, so that parts of equal size have the same facts.
    """
    facts, dropped = _counterfact_questions(rows)
    placed, seen = [], set[str]()
    for number, (where, fact) in enumerate(facts):
        with at(where):
            if len(fact.paraphrases) < 2:
                n = len(fact.paraphrases)
                raise DataError(
                    got=f"{n} paraphrase_prompts", expected="at least 2", remedy="add some, or drop the row"
                )
            texts = {"train": fact.text, "val": fact.paraphrases[1], "test": fact.paraphrases[0]}
            if repeats := seen & {normalise(text) for text in texts.values()}:
                dropped.append(f"{where.rpartition(', ')[2]}, which repeats the prompt {min(repeats)!r:.60}")
                continue
            seen |= {normalise(text) for text in texts.values()}
            for part, text in texts.items():
                of = replace(fact, id=f"{number:06d} {part}", text=text, split=part, group="", paraphrases=())
                placed.append((where, of))
    return placed, dropped


def _is_table(path: Path, text: str) -> bool:
    """Whether columns decide the format of a file: a JSON list, or JSONL or CSV with preference pairs."""
    start = text.lstrip()
    if start[0] == "[":
        return path.suffix.lower() not in [loader.suffix for loader in LOADERS.values() if loader.suffix]
    name = r'"(\w+)"\s*:' if start[0] == "{" else r"(\w+)"
    return {"chosen", "rejected"} <= set(re.findall(name, start.partition("\n")[0]))


def _read_table(
    table: list[tuple[str, str, Any]], source: str, format: str, columns: Mapping[str, str] | None
) -> tuple[str, Sequence[Row], dict[str, Any]]:
    """The format of a table, its rows, and fields of the `Loader` that the rows decide."""
    columns, rows = columns or {}, list[Row]()
    for where, number, value in table:
        with at(where):
            row = dict(as_object(value, tuple(columns.values()), "a row"))
        row = {key: item.tolist() if hasattr(item, "tolist") else item for key, item in row.items()}  # of numpy
        rows.append((where, number, row | {ours: row[theirs] for ours, theirs in columns.items()}))
    if rows and set(_CSV_COLUMNS) <= set(rows[0][2]) and format in ("auto", "truthfulqa"):
        rows = list(_csv_as_hub(rows))
    first = rows[0][2] if rows else {}
    fitting = [name for name, loader in LOADERS.items() if loader.needs and set(loader.needs) <= set(first)]
    kind = format if format != "auto" else next(iter(fitting), "")
    _check_columns(columns, source, [LOADERS[kind]] if kind else LOADERS.values())
    if not kind or not LOADERS[kind].needs:
        known = " or ".join(dict.fromkeys(", ".join(loader.needs) for loader in LOADERS.values() if loader.needs))
        raise DataError(
            got=f"{source} with the columns {', '.join(map(str, first)) or 'of no row'}",
            expected=f"rows with {known}",
            remedy="say which columns they are: --behaviour-columns prompt COLUMN chosen COLUMN rejected COLUMN",
        )
    for where, _, row in rows:
        with at(where):
            require(row, LOADERS[kind].needs, "a row")
    renamed = {*columns.values()} - {*LOADERS[kind].needs, *LOADERS[kind].optional}
    rows = [(where, number, {key: x for key, x in row.items() if key not in renamed}) for where, number, row in rows]
    is_chat = kind == "preferences" and _is_chat(rows, source)
    return kind, rows, {"style": "chat"} if is_chat else {}


def _check_columns(columns: Mapping[str, str], source: str, loaders: Iterable[Loader]) -> None:
    """Raise `DataError` if a column is named for a key that no row of these formats has."""
    known = list(dict.fromkeys(key for loader in loaders if loader.needs for key in (*loader.needs, *loader.optional)))
    for ours in columns:
        if known and ours not in known:
            near = difflib.get_close_matches(ours, known, n=1)
            having = ", ".join(name for name, loader in LOADERS.items() if ours in loader.needs)
            other = f"name the format that has it ({having}) with --behaviour-format" if having else "leave it out"
            raise DataError(
                got=f"behaviour_columns with {ours!r}, for {source}",
                expected=f"one of {', '.join(known)}",
                remedy=f"did you mean {near[0]!r}?" if near else f"correct the name, or {other}",
            )


def _is_chat(rows: Sequence[Row], source: str) -> bool:
    """Whether preference pairs are conversational. Raises `DataError` if only some are."""
    places: dict[bool, str] = {}
    for _, number, row in rows:
        places.setdefault(any(isinstance(row[key], list) for key in _PAIR_KEYS), number)
    if len(places) == 2:
        raise DataError(
            got=f"{source} with texts in row {places[False]} and messages in row {places[True]}",
            expected="pairs of texts or pairs of messages, since a behaviour has one style",
            remedy="write all rows in the same way, or load two files",
        )
    return True in places


def _agreed(rows: Iterable[Row], key: str) -> Any:
    """What the rows have under `key`, in which they must agree. A row can lack it."""
    read, first = texts_of if key in _LISTS else string_of, None
    for where, number, row in rows:
        with at(where):
            value = read(row, key)
            if value and first and value != first[0]:
                raise DataError(
                    got=f"{key} = {value!r:.60}, and {first[0]!r:.60} in row {first[1]}, a pair of the same prompt",
                    expected=f"one {key}, since all pairs of a prompt are one question",
                    remedy="correct one of the rows",
                )
        first = first or ((value, number) if value else None)
    return first[0] if first else () if key in _LISTS else ""


def _said(row: Mapping[str, Any], key: str, role: str) -> str:
    """The text under `key`, or the content of the one message under it, which must be of that role."""
    value = row[key]
    if isinstance(value, str) and not _MESSAGES.match(value):
        return string_of(row, key)
    messages = value if isinstance(value, list) else []
    if len(messages) != 1 or not isinstance(messages[0], Mapping) or messages[0].get("role") != role:
        roles = [message.get("role") if isinstance(message, Mapping) else message for message in messages]
        raise DataError(
            got=f"{key} = {roles if messages else value!r:.60}",
            expected=f"a text, or a list with one message of the role {role}",
            remedy="keep pairs with one question and one answer (an instruction before all of them is a primer); "
            "messages need a format with lists, such as JSONL or Parquet",
        )
    return string_of(messages[0], "content")


def _pair_questions(rows: Iterable[Row]) -> Questions:
    pairs: dict[str, list[Row]] = {}
    said: dict[str, list[tuple[str, str, str]]] = {}
    for where, number, row in rows:
        with at(where):
            prompt, chosen, rejected = (
                _said(row, key, "user" if key == "prompt" else "assistant") for key in _PAIR_KEYS
            )
        key = normalise(prompt)
        pairs.setdefault(key, []).append((where, number, row))
        said.setdefault(key, []).append((prompt, chosen, rejected))
    placed, dropped = [], []
    for key, of_prompt in pairs.items():
        where, number, _ = of_prompt[0]
        (prompt, *_), *answers = zip(*said[key], strict=True)
        true, false = map(unique, answers)
        both = set(true) & set(false)
        if both < set(true) and both < set(false):
            dropped += [f"{answer!r:.60}, both chosen and rejected, for row {number}" for answer in sorted(both)]
            true, false = (tuple(answer for answer in side if answer not in both) for side in (true, false))
        elif both and all(chosen != rejected for _, chosen, rejected in said[key]):
            dropped.append(f"the prompt {prompt!r:.60} of row {number}, whose pairs contradict one another")
            continue
        extras: dict[str, Any] = {key: _agreed(of_prompt, key) for key in _PAIR_EXTRAS}
        extras["split"] = extras["split"] or None
        with at(where):
            placed.append((where, Question("", prompt, true, false, **extras)))
    return placed, dropped


LOADERS.register("jsonl")(Loader(_jsonl_rows, _jsonl_questions, ".jsonl", needs=_JSONL_KEYS, optional=_JSONL_EXTRAS))
LOADERS.register("truthfulqa")(
    Loader(
        _csv_rows,
        _truthfulqa_questions,
        ".csv",
        primer=truthful_primer(),
        needs=HUB_COLUMNS,
        optional=("category",),
        unused=("type", "source"),
    )
)
# An answer is (A) or (B), not free text, so the bundled aspects (truth, informativeness) do not apply to it.
LOADERS.register("ab")(Loader(text_rows, _ab_questions, aspects=(), needs=_AB_KEYS))
LOADERS.register("ab-text")(
    Loader(text_rows, lambda rows: _pair_questions(_ab_pairs(rows)), aspects=(), needs=_AB_KEYS)
)
# Scored by log-probabilities, as in ROME. The judge `exact` of `match` looks for the new target in generated answers.
LOADERS.register("counterfact")(
    Loader(
        text_rows,
        _counterfact_questions,
        aspects=(),
        style="completion",
        needs=_RECORD_KEYS,
        optional=_RECORD_EXTRAS,
        unused=_RECORD_UNUSED,
    )
)
LOADERS.register("counterfact-rewrites")(
    Loader(
        text_rows,
        _rewrite_questions,
        aspects=(),
        style="completion",
        needs=_RECORD_KEYS,
        optional=_RECORD_EXTRAS,
        unused=_RECORD_UNUSED,
    )
)
# What is preferred need not be true: nothing is judged by default. A text goes on from its prompt, as in TRL.
LOADERS.register("preferences")(
    Loader(text_rows, _pair_questions, aspects=(), style="completion", needs=_PAIR_KEYS, optional=_PAIR_EXTRAS)
)
