"""Preference pairs from every source, and rows from Python."""

from __future__ import annotations

import json

import pandas
import pytest

from locaudit.behaviours import Question, load_behaviour
from locaudit.cli.audit import _Run
from locaudit.cli.flags import parse
from locaudit.config import AuditConfig, parse_config
from locaudit.errors import DataError
from locaudit.run.subject import read_settings

PAIRS = [
    {"prompt": "The sky is", "chosen": " blue", "rejected": " green"},
    {"prompt": "The sky is ", "chosen": "blue.", "rejected": "red"},
    {"prompt": "Grass is", "chosen": "green", "rejected": "blue"},
]
QUESTIONS = (
    Question("", "The sky is", ("blue", "blue."), ("green", "red")),
    Question("", "Grass is", ("green",), ("blue",)),
)
CHAT = [
    {
        "prompt": [{"role": "user", "content": pair["prompt"]}],
        "chosen": [{"role": "assistant", "content": pair["chosen"]}],
        "rejected": [{"role": "assistant", "content": pair["rejected"]}],
    }
    for pair in PAIRS
]


def save(folder, name, rows):
    """Write rows in the format of the name; a folder is written by `datasets`."""
    path = folder / name
    datasets = pytest.importorskip("datasets")
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        pandas.DataFrame(rows).to_csv(path, index=False)
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif name == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    else:
        path.mkdir()
        datasets.Dataset.from_list(rows).to_parquet(path / "train.parquet")
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "saved", "files"])
@pytest.mark.parametrize(("rows", "style"), [(PAIRS, "completion"), (CHAT, "chat")], ids=["standard", "chat"])
def test_pairs_of_a_prompt_are_one_question(tmp_path, name, rows, style):
    if name == "a.csv" and style == "chat":
        pytest.skip("CSV holds text")
    behaviour = load_behaviour(save(tmp_path, name, rows))
    assert behaviour.questions == QUESTIONS
    assert (behaviour.style, behaviour.aspects, behaviour.primer) == (style, (), "")
    assert behaviour.name == name.partition(".")[0]


def test_rows_from_python():
    datasets = pytest.importorskip("datasets")
    for rows, style in ((PAIRS, "completion"), (CHAT, "chat")):
        for source in (rows, iter(rows), pandas.DataFrame(rows), datasets.Dataset.from_list(rows)):
            behaviour = load_behaviour(source)
            assert (behaviour.questions, behaviour.style, behaviour.name) == (QUESTIONS, style, "rows")
    rows = [{"question": "Q?", "true": ["T"], "false": ["F"]}, {"question": "R?", "true": ["T"], "false": ["F"]}]
    rows[0]["category"] = "first"  # a data frame has NaN in the other row
    for source in (rows, pandas.DataFrame(rows), datasets.Dataset.from_list(rows)):
        assert [(q.text, q.true, q.category) for q in load_behaviour(source).questions] == [
            ("Q?", ("T.",), "first"),
            ("R?", ("T.",), ""),
        ]


def test_columns_with_other_names(tmp_path):
    names = {"prompt": "instruction", "chosen": "good", "rejected": "bad"}
    other = [{names[key]: value for key, value in pair.items()} for pair in PAIRS]
    flags = ["--behaviour-columns", *(word for pair in names.items() for word in pair)]
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet", "saved"):
        path = save(tmp_path, name, other)
        assert load_behaviour(path, columns=names).questions == QUESTIONS
        message = "with the columns instruction, good, bad; .*|no question|a TruthfulQA CSV|an A/B file"
        with pytest.raises(DataError, match=message):
            load_behaviour(path)
    with pytest.raises(DataError, match=r"a\.csv.*: no worse \(found: instruction, good, bad\)"):
        load_behaviour(tmp_path / "a.csv", columns=names | {"rejected": "worse"})
        with pytest.raises(DataError, match="behaviour_columns with 'prmpt', .*did you mean 'prompt'"):
            load_behaviour(path, columns={"prmpt": "instruction"})
    with pytest.raises(DataError, match="with 'foo', .*; expected one of prompt, chosen, rejected, category"):
        load_behaviour(PAIRS, columns={"foo": "chosen"})
    config = parse(_Run(), "locaudit", "", flags).config
    assert config.behaviour_columns == names
    assert config == parse_config(f"behaviour_columns: {json.dumps(names)}")
    assert config.hash != AuditConfig().hash == parse_config("behaviour_columns: {}").hash


def test_an_answer_both_chosen_and_rejected(tmp_path):
    ranked = [
        {"prompt": "P", "chosen": "best", "rejected": "middle"},
        {"prompt": "P", "chosen": "middle", "rejected": "worst"},
    ]
    with pytest.warns(UserWarning, match="'middle', both chosen and rejected, for row 0000"):
        (question,) = load_behaviour(ranked).questions
    assert (question.true, question.false) == (("best",), ("worst",))
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: .* both true and false"):
        load_behaviour(save(tmp_path, "a.jsonl", [{"prompt": "P", "chosen": "same", "rejected": "same"}]))


def test_pairs_that_contradict_one_another():
    rows = [
        {"prompt": "P", "chosen": "x", "rejected": "y"},
        {"prompt": "P", "chosen": "y", "rejected": "x"},
        *PAIRS,
    ]
    with pytest.warns(UserWarning, match="dropped 1 .*: the prompt 'P' of row 0000, whose pairs contradict"):
        assert load_behaviour(rows).questions == QUESTIONS


def test_pairs_keep_what_questions_have():
    extras = {"category": "c", "group": "g", "subject": "sky", "paired": "The sea is", "neighborhood": ["Grass is"]}
    rows = [{**PAIRS[0], **extras, "paraphrases": ["Skies are"]}, {**PAIRS[1], **extras, "id": 7, "source": "s"}]
    rows = [row | {"prompt": "The sky is"} for row in rows]
    with pytest.warns(UserWarning, match=r"rows, row 0001: ignored id, source \(known: prompt, .*, neighborhood\)"):
        (question,) = load_behaviour(rows).questions
    assert {key: getattr(question, key) for key in extras} == extras | {"neighborhood": ("Grass is",)}
    assert question.paraphrases == ("Skies are",)
    with pytest.raises(DataError, match="row 0001: paired = 'The sea is', and 'A lake is' in row 0000"):
        load_behaviour([rows[0] | {"paired": "A lake is"}, rows[1]])


TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "P"}]
BAD = {
    "no rows": ([], "rows with the columns of no row"),
    "other columns": ([{"a": 1}], r"rows with the columns a; .*or prompt, chosen, rejected; say which columns"),
    "numbers": ([1], r"rows, row 0000: 1; expected an object"),
    "an object": (5, "a int; expected a list of mappings"),
    "a dataset of splits": ({"train": PAIRS}, r"of the splits train; .*take one split"),
    "a number": ([PAIRS[0] | {"chosen": 5}], "row 0000: chosen = 5; expected a text, or a list with one message"),
    "several turns": (
        [CHAT[0] | {"prompt": TURNS}],
        r"prompt = \['user', 'assistant', 'user'\]; expected a text, or a list with one message of the role user",
    ),
    "messages as text": ([{key: str(value) for key, value in CHAT[0].items()}], r"messages need a format with lists"),
    "wrong role": ([CHAT[0] | {"chosen": TURNS[:1]}], r"chosen = \['user'\]; .* role assistant"),
    "empty prompt": ([PAIRS[0] | {"prompt": " "}], "row 0000: question .* with empty text"),
    "empty answer": ([PAIRS[0] | {"chosen": " "}], "row 0000: question .* without a true answer"),
    "both styles": ([*PAIRS[:2], CHAT[2]], "rows with texts in row 0000 and messages in row 0002"),
    "missing cell": ([PAIRS[0], PAIRS[2] | {"chosen": None}], "row 0001: no chosen"),
}


@pytest.mark.parametrize(("rows", "message"), BAD.values(), ids=BAD)
def test_rows_that_are_no_pairs(rows, message):
    with pytest.raises(DataError, match=message):
        load_behaviour(rows)


def test_a_folder_of_two_splits_and_a_damaged_file(tmp_path):
    datasets = pytest.importorskip("datasets")
    part = datasets.Dataset.from_list(PAIRS)
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match="with the splits train, test; expected one split; .*FOLDER/train"):
        load_behaviour(tmp_path / "both")
    assert load_behaviour(tmp_path / "both" / "train").questions == QUESTIONS
    (tmp_path / "a.parquet").write_bytes(b"PAR1 is not enough")
    with pytest.raises(DataError, match=r"a\.parquet, which cannot be read .*; expected Parquet"):
        load_behaviour(tmp_path / "a.parquet")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="none, which cannot be read"):
        load_behaviour(tmp_path / "none")


def test_settings_name_the_columns(tmp_path):
    rows = [{"q": f"Question {i} is", "chosen": "yes", "rejected": "no"} for i in range(20)]
    config = AuditConfig(
        behaviour=str(save(tmp_path, "a.parquet", rows)), behaviour_columns={"prompt": "q"}, claim="1.2"
    )
    with pytest.warns(UserWarning, match="yes is the right answer to 20 of 20 questions"):
        inputs = read_settings(config)
    assert len(inputs.behaviour) == 20 and inputs.config.prompt.style == "completion"


@pytest.mark.parity
def test_trl_reads_the_same_pairs():
    trl = pytest.importorskip("trl")
    assert trl.data_utils.is_conversational(CHAT[0]) and not trl.data_utils.is_conversational(PAIRS[0])
