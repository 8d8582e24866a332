import json
import math
import os
import random
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import combinations
from statistics import fmean
from types import SimpleNamespace

import pandas
import pytest

from locaudit.behaviours import Behaviour, Question, load_behaviour, normalise, split_questions, with_period
from locaudit.behaviours.format import load_primer
from locaudit.errors import ConfigError, DataError
from locaudit.registry import LOADERS

HEADER = "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source"
GOOD = {"question": "Q?", "true": ["T"], "false": ["F"]}
AB = {"question": "Q?\n(A) x\n(B) y", "answer_matching_behavior": "(B)", "answer_not_matching_behavior": "(A)"}


@pytest.fixture
def write(tmp_path):
    def write_(name, content):
        path = tmp_path / name
        if isinstance(content, list):
            content = "\n".join(json.dumps(row) for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_


def behaviour(n, **changes):
    questions = (Question(f"{i:03d}", f"Question number {i}?", ("Yes.",), ("No.",)) for i in range(n))
    return Behaviour("numbers", tuple(replace(question, **changes) for question in questions))


def csv_file(*rows, header=HEADER):
    return "\ufeff" + "\r\n".join((header, *rows)) + "\r\n"


# JSONL


def test_jsonl_reads_every_field_and_ignores_others(write):
    row = {"id": "a", "category": "c", "split": "val", "best": "B", "group": "g", "true": ["T ", "B."], "false": ["F?"]}
    with pytest.warns(
        UserWarning, match=r"small\.jsonl, line 1: ignored source \(known: question, true, false, id, best"
    ):
        behaviour = load_behaviour(write("small.jsonl", [row | {"question": " Q? ", "source": 3, "note": None}]))
    assert behaviour.name == "small"
    assert behaviour.questions == (Question("a", "Q?", ("T.", "B."), ("F?",), "B.", "c", "val", "g"),)


def test_an_id_in_the_file_is_kept(write):
    text = "\n".join(
        ["", json.dumps(GOOD | {"question": "One?"}), "  ", json.dumps(GOOD | {"question": "Two?", "id": 7})]
    )
    first, second = load_behaviour(write("x.jsonl", text)).questions
    assert (first.id, second.id) == (Question("", "One?", ("T.",), ("F.",)).id, "7")


def many_rows(n=40):
    """Questions with several answers each, as rows of each format that may lack ids."""
    rng = random.Random(0)
    rows = [
        (f"Is {i} more than {i + 1}?", [f"No, {i}.", "No.", f"{i} is less."], ["Yes.", f"Yes, {i}."]) for i in range(n)
    ]
    letters = [rng.choice(["(A)", "(B)"]) for _ in rows]
    quoted = [f"A,C,{question},{true[0]},{'; '.join(true)},{'; '.join(false)},s" for question, true, false in rows]
    return {
        "x.jsonl": [json.dumps({"question": q, "true": t, "false": f}) for q, t, f in rows],
        "x.csv": [line.replace("Yes, ", "Yes ").replace("No, ", "No ") for line in quoted],
        "x.json": [
            json.dumps(
                {
                    "question": f"{q}\n (A) Yes\n (B) No",
                    "answer_matching_behavior": letter,
                    "answer_not_matching_behavior": "(B)" if letter == "(A)" else "(A)",
                }
            )
            for (q, _, _), letter in zip(rows, letters, strict=True)
        ],
    }


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.json"])
def test_without_ids_the_order_of_rows_and_answers_does_not_matter(write, name):
    """Ids come from the content: shuffled rows, and shuffled answers, are split as before."""
    rows = many_rows()[name]

    def split_of(rows):
        content = {"x.jsonl": "\n".join(rows), "x.csv": csv_file(*rows), "x.json": f"[{','.join(rows)}]"}[name]
        return split_questions(load_behaviour(write(name, content)))

    def words(split):
        return [
            [(q.id, q.text, set(q.true), set(q.false)) for q in part] for part in (split.train, split.val, split.test)
        ]

    first = split_of(rows)
    shuffled = random.Random(1).sample(rows, len(rows))
    assert split_of(shuffled) == first
    if name == "x.jsonl":
        turned = [
            json.dumps(row | {side: row[side][::-1] for side in ("true", "false")}) for row in map(json.loads, rows)
        ]
        assert turned != rows and words(split_of(turned)) == words(first)
    assert len({q.id for q in first.train + first.val + first.test}) == len(rows)


def test_an_id_from_content_tells_questions_apart():
    """By question, and by which answers are true; not by their order."""
    one = Question("", "Q?", ("T.", "U."), ("F.", "G."))
    assert one.id == Question("", "Q?", ("U.", "T."), ("G.", "F.")).id and len(one.id) == 12
    others = [("R?", one.true, one.false), (one.text, one.false, one.true), (one.text, ("T.",), one.false)]
    assert len({one.id, *(Question("", *other).id for other in others)}) == 4


@pytest.mark.parametrize("separator", ["\u2028", "\x85"])
def test_jsonl_lines_end_at_newlines_only(write, separator):
    text = json.dumps(GOOD | {"question": f"A{separator}B?"}, ensure_ascii=False)
    assert load_behaviour(write("x.jsonl", text + "\r\n")).questions[0].text == f"A{separator}B?"


def test_byte_order_mark_is_no_part_of_the_text(write):
    assert load_behaviour(write("x.jsonl", "\ufeff" + json.dumps(GOOD))).questions[0].text == "Q?"
    header = "Question,Best Answer,Correct Answers,Incorrect Answers"
    assert load_behaviour(write("x.csv", csv_file("Q?,T,T,F", header=header))).questions[0].text == "Q?"


def test_answers_lose_empties_and_repeats(write):
    path = write("x.jsonl", [GOOD | {"true": ["T", "T.", "", "  ", "U!"], "best": None}])
    assert load_behaviour(path).questions[0].true == ("T.", "U!")


def test_bundled_behaviour_loads_and_splits():
    behaviour = load_behaviour("misconceptions")
    assert behaviour.name == "misconceptions"
    assert behaviour == load_behaviour("misconceptions", format="jsonl")
    assert len(split_questions(behaviour).test) >= 2


def words(text):
    return [word.strip(".,!?;:\"'").lower() for word in text.split()]


def guessed(texts, features):
    """Share of texts whose class naive Bayes guesses from `features` of the texts of all other domains.

    `texts` has (domain, class, text) of each.
    """
    counts, own = defaultdict(Counter), defaultdict(Counter)
    for domain, label, text in texts:
        counts[label].update(features(text))
        own[domain, label].update(features(text))
    right = 0.0
    for domain, label, text in texts:
        fit = {
            each: sum(math.log(counts[each][x] - own[domain, each][x] + 1) for x in features(text)) for each in counts
        }
        others = [fit[each] for each in counts if each != label]
        right += 0.5 if fit[label] == max(others) else fit[label] > max(others)
    return right / len(texts)


def test_bundled_sentiment_does_not_give_its_classes_away_by_form():
    questions = load_behaviour("sentiment").questions
    texts = [(q.category, side, answer) for q in questions for side in ("true", "false") for answer in getattr(q, side)]
    assert len(questions) >= 240 and {len(side) for q in questions for side in (q.true, q.false)} <= {3, 4}
    assert len({normalise(text) for _, _, text in texts}) == len(texts), "no continuation twice"
    lengths = {s: [len(words(text)) for _, side, text in texts if side == s] for s in ("true", "false")}
    assert abs(fmean(lengths["true"]) - fmean(lengths["false"])) < 0.25
    assert guessed(texts, lambda text: [len(words(text))]) < 0.55
    assert guessed(texts, lambda text: ["".join(x for x in text if not x.isalnum() and x != " ")]) < 0.55
    # The first word is often the opinion itself ("crisp", "burnt"), so it cannot say nothing.
    assert guessed(texts, lambda text: words(text)[:1]) < 0.65 < guessed(texts, words)


def test_bundled_sentiment_has_no_near_duplicates():
    questions = load_behaviour("sentiment").questions
    assert len({q.id for q in questions}) == len(questions)
    assert min(len(q.text.split()) for q in questions) >= 5 and max(len(q.text.split()) for q in questions) <= 40
    bags = {q.id: set(words(q.text)) for q in questions}
    threes = {q.id: set(zip(*(words(q.text)[i:] for i in range(3)), strict=False)) for q in questions}
    for a, b in combinations(bags, 2):
        assert len(bags[a] & bags[b]) < 0.4 * len(bags[a] | bags[b]), (a, b)
        assert len(threes[a] & threes[b]) < 0.3 * min(len(threes[a]), len(threes[b])), (a, b)
    fours = Counter(
        four for q in questions
        for four in {x for answer in q.answers for x in zip(*(words(answer)[i:] for i in range(4)), strict=False)}
    )  # fmt: skip
    assert max(fours.values()) <= 5, "no phrase recurs under many prompts"


def test_bundled_sentiment_is_split_by_domain():
    behaviour = load_behaviour("sentiment")
    assert (behaviour.aspects, behaviour.primer, behaviour.style) == (("negative", "fluency"), "", "completion")
    assert len({q.category for q in behaviour.questions}) >= 20
    for seed in range(5):
        split = split_questions(behaviour, seed=seed)
        domains = [{q.category for q in part} for part in (split.train, split.val, split.test)]
        assert sum(map(len, domains)) == len(set().union(*domains))
        assert (len(split.train), len(split.val), len(split.test)) == (180, 60, 60)
        assert len({q.category for q in split.test[:20]}) > 3, "a maximum keeps questions of every domain"


def test_who_brings_a_primer(write):
    """The bundled behaviours and TruthfulQA; users' own data do not."""
    bundled = load_primer("truthful")
    assert bundled.startswith("Interpret each question literally") and load_primer("auto") == load_primer("none") == ""
    truthfulqa = write("x.csv", csv_file("A,C,Q?,T,T,F,s"))
    for source in ("misconceptions", "misconceptions-balanced", truthfulqa):
        assert load_behaviour(source).primer == load_primer("auto", load_behaviour(source).primer) == bundled
    for path in (write("misconceptions.jsonl", [GOOD]), write("x.json", json.dumps([AB]))):
        assert load_behaviour(path).primer == ""
        assert load_primer("truthful", load_behaviour(path).primer) == bundled
    with LOADERS.temporary("mine", replace(LOADERS["jsonl"], primer="Be brief.")):
        assert load_behaviour(write("x.jsonl", [GOOD]), format="mine").primer == "Be brief."


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "expected 'auto', 'none', 'truthful' or a text file"), (b" ", "empty primer file"), (b"\xff", "not UTF-8")],
)
def test_a_primer_of_a_file(write, tmp_path, content, message):
    assert load_primer(str(write("good.txt", "Be brief.\n")), "another") == "Be brief."
    with pytest.raises(DataError, match=message):
        load_primer(str(tmp_path / "no.txt" if content is None else write("bad.txt", content)))


# TruthfulQA CSV


def test_csv_of_the_first_releases(write):
    rows = (
        'Adversarial,Law,"Is it, so? ",Best one,Good; Best one;;Good.,Bad; Bad ;Worse.,https://x.org',
        "Adversarial,Law,Is it not?,Missing,Good,Bad,https://x.org",
    )
    assert load_behaviour(write("TruthfulQA.csv", csv_file(*rows))).questions == (
        Question("", "Is it, so?", ("Good.", "Best one."), ("Bad.", "Worse."), "Best one.", "Law"),
        Question("", "Is it not?", ("Good.", "Missing."), ("Bad.",), "Missing.", "Law"),
    )


def test_a_table_of_truthfulqas_csv_is_read_as_the_file(write):
    path = write("x.csv", csv_file("A,C,Q?,T,T; U,F,s", "A,C,Another?,T,T,F,s"))
    assert load_behaviour(pandas.read_csv(path)).questions == load_behaviour(path).questions
    rows = pandas.read_csv(path).to_dict("records")
    with pytest.raises(DataError, match="row 0001: Correct Answers = 3; expected text"):
        load_behaviour([rows[0], rows[1] | {"Correct Answers": 3}])


def test_csv_of_2025_has_one_more_column(write):
    header = HEADER.replace("Best Answer", "Best Answer,Best Incorrect Answer")
    path = write("x.csv", csv_file("A,C,Q?,T,F,T; U,E; F,s", header=header))
    assert load_behaviour(path).questions == (Question("", "Q?", ("T.", "U."), ("E.", "F."), "T.", "C"),)


def test_answer_on_both_sides_is_dropped_from_both_with_one_warning(write):
    path = write("x.csv", csv_file("A,C,Q1?,T,T; Unknown,F; Unknown,s", "A,C,Q2?,Unknown,T,F; Unknown,s"))
    with pytest.warns(UserWarning) as caught:
        questions = load_behaviour(path).questions
    assert [(q.true, q.false, q.best) for q in questions] == [(("T.",), ("F.",), "T."), (("T.",), ("F.",), None)]
    assert len(caught) == 1 and caught[0].filename == __file__
    message = str(caught[0].message)
    assert "x.csv: dropped 2 repeated or contradictory entries" in message and message.count("'Unknown.'") == 2
    assert "in row 0000" in message and "in row 0001" in message


def test_answer_on_both_sides_raises_where_nothing_would_remain(write):
    with pytest.raises(DataError, match=r"x\.csv, line 2: .*'Unknown\.' both true and false"):
        load_behaviour(write("x.csv", csv_file("A,C,Q1?,T,T; Unknown,Unknown,s")))


# The hub's repository


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def make(rows, readme=True):
        folder = tmp_path / "truthful_qa"
        configs = {"generation": rows, "multiple_choice": [{"question": "Another configuration?"}]}
        for name, content in configs.items():
            (folder / name).mkdir(parents=True)
            table = pyarrow.Table.from_pylist(content)
            parquet.write_table(table, folder / name / "validation-00000-of-00001.parquet")
        if readme:
            files = "- config_name: {0}\n  data_files:\n  - split: validation\n    path: {0}/validation-*\n"
            text = "".join(files.format(name) for name in configs)
            (folder / "README.md").write_text(f"---\nconfigs:\n{text}---\n")
        return folder

    return make


HUB_ROW = {
    "type": "Adversarial",
    "category": "Law",
    "question": "Is it?",
    "best_answer": "Best",
    "correct_answers": ["Good", "Unknown", ""],
    "incorrect_answers": ["Bad", "Unknown."],
    "source": "s",
}


@pytest.mark.parametrize("readme", [True, False])
def test_folder_like_the_hub_repository(hub_folder, readme):
    folder = hub_folder([HUB_ROW, HUB_ROW | {"question": "Another?", "correct_answers": ["Best"]}], readme)
    with pytest.warns(
        UserWarning,
        match=r"dropped 1 repeated or contradictory entries: 'Unknown\.', both true and false, in row 0000",
    ):
        behaviour = load_behaviour(folder)
    assert behaviour.name == "truthful_qa" and behaviour.primer == load_primer("truthful")
    assert behaviour.questions == (
        Question("", "Is it?", ("Good.", "Best."), ("Bad.",), "Best.", "Law"),
        Question("", "Another?", ("Best.",), ("Bad.", "Unknown."), "Best.", "Law"),
    )


def test_folder_of_other_columns(hub_folder):
    with pytest.raises(DataError, match=r"row 0000: no question, best_answer, .* \(found: text\)"):
        load_behaviour(hub_folder([{"text": "Is it?"}]))


def test_folder_with_columns_of_its_own_takes_no_others(hub_folder):
    with pytest.raises(DataError, match=r"behaviour_columns for .*; expected none, since the keys .* are fixed"):
        load_behaviour(hub_folder([HUB_ROW]), columns={"question": "category"})


@pytest.mark.parametrize("source", ["truthfulqa/truthful_qa", "truthful_qa"])
def test_hub_id_asks_for_the_generation_configuration(monkeypatch, tmp_path, source):
    calls = []

    class Datasets:
        config = SimpleNamespace(HF_HUB_OFFLINE=False)

        @staticmethod
        def load_dataset(*args, **kwargs):
            assert not Datasets.config.HF_HUB_OFFLINE
            calls.append((args, kwargs))
            return [HUB_ROW | {"correct_answers": ["Best"]}]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    monkeypatch.setattr("locaudit.hub.ask", lambda *args, **kwargs: None)
    assert load_behaviour(source).questions[0].text == "Is it?"
    assert calls == [(("truthfulqa/truthful_qa", "generation"), {"data_dir": None, "split": "validation"})]


def test_hub_failure_asks_for_the_csv(monkeypatch, tmp_path):
    class Datasets:
        config = SimpleNamespace(HF_HUB_OFFLINE=False)

        @staticmethod
        def load_dataset(*args, **kwargs):
            raise ConnectionError("no route\nto host")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    monkeypatch.setattr("locaudit.hub.ask", lambda *args, **kwargs: None)
    with pytest.raises(DataError, match=r"ConnectionError: no route to host.*path of the TruthfulQA CSV"):
        load_behaviour("truthfulqa/truthful_qa")


def test_without_the_hub_nothing_is_retried(tmp_path):
    pytest.importorskip("datasets")
    code = """
import datasets
from locaudit import load_behaviour
from locaudit.errors import DataError
try:
    load_behaviour("truthfulqa/truthful_qa")
except DataError as error:
    print(error)
assert not datasets.config.HF_HUB_OFFLINE
"""
    # nothing listens there
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert (found.returncode, found.stderr) == (0, "")
    assert "could not be loaded ([Errno" in found.stdout and found.stdout.count("\n") == 1


def test_missing_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r'pip install "locaudit\[hub\]"'):
        load_behaviour("truthfulqa/truthful_qa")


# A/B


def test_ab_answers_keep_their_form(write):
    path = write("refusal.test_ab.json", json.dumps([AB, AB | {"question": "Other?"}]))
    questions = load_behaviour(path).questions
    assert questions[0] == Question("", AB["question"], ("(B)",), ("(A)",))


def test_ab_repeated_row_is_dropped_with_a_warning(write):
    path = write("x.json", json.dumps([AB, AB, AB | {"question": "Other?"}]))
    with pytest.warns(
        UserWarning, match=r"x\.json: dropped 1 repeated or contradictory entries: row 0001, which repeats row 0000"
    ):
        questions = load_behaviour(path).questions
    assert [question.text for question in questions] == [AB["question"], "Other?"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.csv", "prompt,chosen,rejected,chosen\nP,a,b,z", "twice the column chosen"),
        ("x.jsonl", '{"question": "Q", "true": ["a"], "false": ["b"], "true": ["c"]}', "twice the key true"),
        ("x.json", json.dumps([AB])[:-2] + ', "question": "Q"}]', "twice the key question"),
    ],
)
def test_a_column_or_key_has_one_value(write, name, content, words):
    with pytest.raises(DataError, match=words):
        load_behaviour(write(name, content))


def test_spellings_of_one_text_in_unicode_are_one(write):
    rows = [{"question": text, "true": ["a"], "false": ["b"]} for text in ("Caf\u00e9?", "Cafe\u0301?")]
    with pytest.raises(DataError, match="the question .* twice"):
        load_behaviour(rows)
    assert with_period("\u65e5\u672c\u3002") == "\u65e5\u672c\u3002" and with_period("b") == "b."


def test_ab_columns_that_are_not_read_are_named(write):
    with pytest.warns(UserWarning, match=r"x\.json, row 0000: ignored statement \(known: question, answer_matching"):
        load_behaviour(write("x.json", json.dumps([AB | {"statement": "s"}])))


def test_ab_repeat_with_other_answers_raises(write):
    swapped = AB | {"answer_matching_behavior": "(A)", "answer_not_matching_behavior": "(B)"}
    with pytest.raises(DataError, match=r"x\.json, row 0001: the question .* twice \(ids '\w{12}' and '\w{12}'\)"):
        load_behaviour(write("x.json", json.dumps([AB, swapped])))


def lettered(n, letters, text="Is {0} more?\n\nChoices:\n (A) yes, {0}\n (B) no, {0}"):
    other = {"(A)": "(B)", "(B)": "(A)"}
    return [
        {"question": text.format(i), "answer_matching_behavior": x, "answer_not_matching_behavior": other[x]}
        for i, x in zip(range(n), letters, strict=True)
    ]


def test_an_ab_file_that_always_wants_one_letter_is_balanced(write):
    """Half of the questions get their options swapped, the same ones whatever the order of the file."""
    rows = lettered(21, ["(A)"] * 21)

    def load(rows):
        with pytest.warns(UserWarning, match=r"x\.json: \(A\) is the right answer to 21 of 21 questions\. Options were "
                          r"swapped in 10 of them, after which it is right in 11\."):  # fmt: skip
            return load_behaviour(write("x.json", json.dumps(rows)))

    behaviour = load(rows)
    assert len(behaviour.notes) == 1 and "swapped in 10" in behaviour.notes[0]
    assert sorted(behaviour.questions, key=lambda q: q.id) == sorted(load(rows[::-1]).questions, key=lambda q: q.id)
    for row, question in zip(rows, behaviour.questions, strict=True):
        assert question.id == Question("", row["question"], ("(A)",), ("(B)",)).id, "splits do not move"
        assert f"{question.true[0]} yes, " in question.text, "the right option is still the right one"
        if question.true == ("(B)",):
            assert question.text == row["question"].replace("yes", "X").replace("no", "yes").replace("X", "no")
    assert [q.true for q in behaviour.questions].count(("(B)",)) == 10


@pytest.mark.parametrize(
    "text", ["Is {} more? (A) yes (B) no. Say why.", "(A) or (B), {}?\n(A) yes\n(B) no", "{}?\n(A) yes\n(B) no\nSay:"]
)
def test_options_that_cannot_be_swapped_are_warned_about(write, text):
    with pytest.warns(UserWarning, match=r"\(B\) is the right answer to 9 of 12 questions\. A model that always"):
        behaviour = load_behaviour(write("x.json", json.dumps(lettered(12, ["(A)"] * 3 + ["(B)"] * 9, text))))
    assert [q.true for q in behaviour.questions] == [("(A)",)] * 3 + [("(B)",)] * 9


def test_balanced_and_other_questions_stay_as_they_are(write):
    rows = lettered(12, ["(A)"] * 8 + ["(B)"] * 4)
    behaviour = load_behaviour(write("x.json", json.dumps(rows)))
    assert behaviour.notes == () and [q.text for q in behaviour.questions] == [row["question"] for row in rows]
    yes = [{"question": f"Is it {i}?", "true": ["Yes"], "false": ["No"]} for i in range(9)]
    with pytest.warns(UserWarning, match=r"Yes\. is the right answer to 9 of 9 questions"):
        load_behaviour(write("x.jsonl", yes))


# Formats


@pytest.mark.parametrize(
    ("content", "kind"),
    [(json.dumps(GOOD), "jsonl"), (csv_file("A,C,Q?,T,T,F,s"), "truthfulqa"), (json.dumps([AB]), "ab")],
)
def test_content_decides_where_the_suffix_does_not(write, content, kind):
    path = write("data.txt", content)
    assert load_behaviour(path).questions == load_behaviour(str(path), format=kind).questions


BAD = {
    "empty": ("x.jsonl", b" \n", r"x\.jsonl, which is empty"),
    "not UTF-8": ("x.csv", HEADER.encode("utf-16"), r"x\.csv, which is not UTF-8 text \(byte 0\)"),
    "binary": ("x.jsonl", b"\0\1\2", r"x\.jsonl, a binary file"),
    "unclear": ("x.txt", "Hello", r"x\.txt, which starts with 'Hello'; expected .*; convert it to JSONL"),
    "broken line": (
        "x.jsonl",
        json.dumps(GOOD) + '\n{"question": ',
        r"x\.jsonl, line 2: broken JSON \(Expecting value",
    ),
    "deep": (
        "x.jsonl",
        "[" * 200_000,
        r"x\.jsonl, line 1: broken JSON \(a number is too long, or it is nested too deeply",
    ),
    "long number": ("x.jsonl", "1" * 5000, r"x\.jsonl, line 1: broken JSON \(a number is too long"),
    "not an object": ("x.jsonl", "[1]", r"x\.jsonl, line 1: \[1\]; expected an object with question, true, false"),
    "missing keys": (
        "x.jsonl",
        [{"question": "Q?", "wrong": []}],
        r"line 1: no true, false \(found: question, wrong\)",
    ),
    "null": ("x.jsonl", [GOOD | {"true": None}], r"line 1: no true \(found: question, false\)"),
    "true is text": ("x.jsonl", [GOOD | {"true": "T"}], r"line 1: true = 'T'; expected a list of texts"),
    "true holds a number": ("x.jsonl", [GOOD | {"true": [1]}], r"line 1: true = \[1\]; expected a list of texts"),
    "question is a number": ("x.jsonl", [GOOD | {"question": 1}], r"line 1: question = 1; expected text"),
    "id is a list": ("x.jsonl", [GOOD | {"id": []}], r"line 1: id = \[\]; expected text"),
    "half a surrogate": ("x.jsonl", [GOOD | {"question": "\ud800"}], r"line 1: '\\ud800'; expected Unicode text"),
    "half a surrogate in an answer": ("x.jsonl", [GOOD | {"true": ["\ud800"]}], r"expected Unicode text"),
    "empty question": ("x.jsonl", [GOOD | {"question": " "}], r"line 1: question '\w{12}' with empty text"),
    "no false": ("x.jsonl", [GOOD | {"false": ["", " "]}], r"line 1: question '\w{12}' .* without a false answer"),
    "both sides": ("x.jsonl", [GOOD | {"false": ["T."]}], r"line 1: .* both true and false"),
    "best elsewhere": ("x.jsonl", [GOOD | {"best": "B"}], r"line 1: .* with the best answer 'B\.'"),
    "unknown split": ("x.jsonl", [GOOD | {"split": "dev"}], r"line 1: .* with split 'dev'"),
    "repeated question": ("x.jsonl", [GOOD, GOOD | {"question": "q"}], r"x\.jsonl, line 2: the question 'q' twice"),
    "repeated id": ("x.jsonl", [GOOD | {"id": "2"}, GOOD | {"question": "R?", "id": 2}], r"x\.jsonl, line 2: .* twice"),
    "other CSV": ("x.csv", "a,b\n1,2\n", r"x\.csv: no Question, .* \(found: a, b\); expected a TruthfulQA CSV .*JSONL"),
    "no rows": ("x.csv", csv_file(), r"x\.csv: x without questions"),
    "short row": ("x.csv", csv_file("A,C,Q?,T"), r"x\.csv, line 2: 4 cells; expected 7, as in the header"),
    "long row": ("x.csv", csv_file("A,C,Q?,T,T,F,s,more"), r"x\.csv, line 2: 8 cells; expected 7"),
    "open quote": ("x.csv", csv_file('A,C,"Q?,T,T,F,s'), r"x\.csv, line 2: broken CSV"),
    "CSV, no false": ("x.csv", csv_file("A,C,Q?,T,T,;,s"), r"x\.csv, line 2: question '\w{12}' .* without a false"),
    "CSV, empty question": ("x.csv", csv_file("A,C,,T,T,F,s"), r"x\.csv, line 2: question '\w{12}' with empty text"),
    "CSV, repeated": ("x.csv", csv_file(*["A,C,Q?,T,T,F,s"] * 2), r"x\.csv, line 3: the question 'Q\?' twice"),
    "list of lines": ("x.jsonl", "[{}]", r"x\.jsonl, which holds a JSON list; expected one JSON object a line"),
    "broken list": ("x.json", "[\n{},\n{]", r"x\.json, line 3: broken JSON"),
    "A/B, not objects": ("x.json", "[1]", r"x\.json, row 0000: 1; expected an object"),
    "A/B, other keys": (
        "x.json",
        '[{"question": "Q?"}]',
        r"x\.json with the columns question; .* or question, answer_matching_behavior, answer_not_matching_behavior or",
    ),
    "A/B, one without a key": (
        "x.json",
        json.dumps([AB, {"question": "Q?"}]),
        r"row 0001: no answer_matching_behavior, .* \(found: question\)",
    ),
    "empty list": ("x.json", "[]", r"x\.json with the columns of no row; expected rows with question, true, false or"),
    "A/B, equal": ("x.json", json.dumps([AB | {"answer_matching_behavior": "(A)"}]), r"row 0000: .*'\(A\)' both"),
    "A/B, number": ("x.json", json.dumps([AB | {"answer_matching_behavior": 1}]), r"row 0000: .* = 1; expected text"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD.values(), ids=BAD)
def test_bad_file_is_named_with_its_line(write, name, content, message):
    with pytest.raises(DataError, match=message) as caught:
        load_behaviour(write(name, content))
    assert caught.value.got and caught.value.expected and caught.value.remedy
    assert str(write(name, content)) in str(caught.value)


def test_explicit_ab_format_wants_its_keys(write):
    expected = (
        r"x\.json, line 1: no question, answer_matching_behavior, .* \(found: nothing\); expected a row with question"
    )
    with pytest.raises(DataError, match=expected):
        load_behaviour(write("x.json", "{}"), format="ab")


def test_unknown_name_suggests_the_bundled_one():
    with pytest.raises(DataError, match=r"misconception, which is not a file; .* try `misconceptions`"):
        load_behaviour("misconception")


def test_folder_is_no_file_of_a_named_format(tmp_path):
    with pytest.raises(DataError, match="which is not a file|cannot be read"):
        load_behaviour(tmp_path, format="jsonl")


def test_name_too_long_for_a_file():
    with pytest.raises(DataError, match="cannot be read|which is not a file"):
        load_behaviour("a" * 5000)


def test_unknown_format():
    with pytest.raises(DataError, match=r"format 'xml'; expected auto, jsonl, truthfulqa, ab"):
        load_behaviour("misconceptions", format="xml")  # pyright: ignore[reportArgumentType]


# Splits


@pytest.mark.parametrize("n", [10, 11, 23, 817])
@pytest.mark.parametrize("seed", [0, 1])
def test_parts_are_disjoint_and_exhaustive(n, seed):
    split = split_questions(behaviour(n), seed=seed)
    ids = [question.id for question in split.train + split.val + split.test]
    assert sorted(ids) == [question.id for question in behaviour(n).questions]
    for part, share in zip((split.train, split.val, split.test), (0.6, 0.2, 0.2), strict=True):
        assert abs(len(part) - share * n) <= 1


def test_truthfulqa_sizes_are_those_of_the_paper():
    split = split_questions(behaviour(817))
    assert (len(split.train), len(split.val), len(split.test)) == (490, 164, 163)


@pytest.mark.parametrize("fixed", [False, True])
def test_order_of_rows_does_not_matter(fixed):
    questions = list(behaviour(30).questions)
    if fixed:
        questions = [replace(q, split=("train", "val", "test")[int(q.id) % 3]) for q in questions]
    expected = split_questions(Behaviour("x", tuple(questions)), max_train=4)
    random.Random(1).shuffle(questions)
    assert split_questions(Behaviour("y", tuple(questions)), max_train=4) == expected


def test_seed_decides():
    splits = {split_questions(behaviour(30), seed=seed).fingerprint for seed in range(5)}
    assert len(splits) == 5
    assert split_questions(behaviour(30), seed=3) == split_questions(behaviour(30), seed=3)


def test_fingerprint_sees_parts_order_and_words():
    split = split_questions(behaviour(30))
    assert split.fingerprint == split_questions(behaviour(30)).fingerprint
    reworded = replace(split.test[0], true=("Indeed.",))
    others = [
        replace(split, train=split.val, val=split.train),
        replace(split, train=split.train[::-1]),
        replace(split, test=(reworded, *split.test[1:])),
    ]
    assert len({split.fingerprint, *(other.fingerprint for other in others)}) == 4


@pytest.mark.parametrize("seed", range(4))
def test_a_group_is_kept_together(seed):
    """Groups of several sizes beside questions without one, and ids that look like groups."""
    names = [*["a"] * 7, *["b"] * 5, *["c"] * 4, *["d"] * 3, *["003"] * 3, *[""] * 18]
    grouped = tuple(replace(q, group=name) for q, name in zip(behaviour(40).questions, names, strict=True))
    split = split_questions(Behaviour("x", grouped), seed=seed)
    parts = [split.train, split.val, split.test]
    assert sorted(q.id for part in parts for q in part) == [q.id for q in grouped]
    for name in set(names) - {""}:
        assert sum(any(q.group == name for q in part) for part in parts) == 1
    assert all(abs(len(part) - share * 40) <= 7 for part, share in zip(parts, (0.6, 0.2, 0.2), strict=True))
    assert split == split_questions(Behaviour("x", grouped[::-1]), seed=seed)
    capped = split_questions(Behaviour("x", grouped), seed=seed, max_train=5)
    assert capped == replace(split, train=split.train[:5])


def test_too_few_groups_raise():
    questions = tuple(replace(q, group="ab"[int(q.id) % 2]) for q in behaviour(20).questions)
    with pytest.raises(DataError, match=r"0 \w+ question\(s\) among the 20 of x; .*; add groups or change"):
        split_questions(Behaviour("x", questions))


@pytest.mark.parametrize("fixed", [False, True])
def test_caps_are_nested_and_touch_one_part_only(fixed):
    questions = behaviour(60).questions
    if fixed:
        questions = tuple(replace(q, split=("train", "val", "test")[int(q.id) % 3]) for q in questions)
    full = split_questions(Behaviour("x", questions), seed=2)
    for part in ("train", "val", "test"):
        for cap in (2, 5, 1000):
            capped = split_questions(Behaviour("x", questions), seed=2, **{f"max_{part}": cap})
            assert capped == replace(full, **{part: getattr(full, part)[:cap]})


def test_answers_can_be_capped_but_the_best_one_stays():
    best, plain = Question("a", "a?", ("b", "c", "d"), ("x", "y"), best="d"), Question("b", "e?", ("f",), ("g", "h"))
    others = zip(behaviour(4).questions, ("val", "val", "test", "test"), strict=True)
    rest = tuple(replace(question, split=part) for question, part in others)
    train = (replace(best, split="train"), replace(plain, split="train"))
    whole = Behaviour("x", (*train, *rest))
    assert set(split_questions(whole).train) == set(train)
    one = {q.id: q for q in split_questions(whole, max_answers=1).train}
    assert (one["a"].true, one["a"].false, one["a"].best) == (("d",), ("x",), "d")
    assert (one["b"].true, one["b"].false) == (("f",), ("g",))
    two = {q.id: q for q in split_questions(whole, max_answers=2).train}
    assert (two["a"].true, two["a"].false) == (("d", "b"), ("x", "y"))
    with pytest.raises(ConfigError, match="max_answers = 0; expected at least 1"):
        split_questions(whole, max_answers=0)


def test_splits_in_the_file_are_kept_whatever_the_fractions():
    parts = ("test", "val", "train", "test")
    questions = tuple(replace(q, split=parts[int(q.id) % 4]) for q in behaviour(20).questions)
    split = split_questions(Behaviour("x", questions), (0.2, 0.2, 0.6))
    for part in ("train", "val", "test"):
        assert {q.id for q in getattr(split, part)} == {q.id for q in questions if q.split == part}


def test_test_part_of_the_file_does_not_depend_on_its_train_rows():
    questions = tuple(replace(q, split=("train", "val", "test")[int(q.id) % 3]) for q in behaviour(60).questions)
    fewer = tuple(q for q in questions if q.split != "train" or int(q.id) > 20)
    first, second = (split_questions(Behaviour("x", some), max_test=5).test for some in (questions, fewer))
    assert first == second


def test_some_rows_without_a_split_raise():
    first, *rest = behaviour(10, split="train").questions
    questions = (replace(first, split=None), *rest)
    with pytest.raises(DataError, match=r"1 of x's 10 questions without a split \(first: id '000'\)"):
        split_questions(Behaviour("x", questions))


@pytest.mark.parametrize(
    ("some", "message"),
    [
        (behaviour(4), r"1 val question\(s\) among the 4 of numbers; .*; add questions or change split\.fractions"),
        (
            behaviour(9, split="train"),
            r"0 val question\(s\) among the 9 of numbers; .*; assign more rows to that split",
        ),
    ],
)
def test_parts_too_small_raise(some, message):
    with pytest.raises(DataError, match=message):
        split_questions(some)


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (1.0, 0.0, 0.0), (0.5, 0.4, 0.2), (float("nan"), 0.5, 0.5)])
def test_bad_fractions_raise(fractions):
    with pytest.raises(ConfigError, match="three positive shares with sum 1"):
        split_questions(behaviour(20), fractions)


@pytest.mark.parametrize("cap", [1, 0, -3])
def test_caps_below_two_raise(cap):
    with pytest.raises(ConfigError, match=f"max_val = {cap}; expected at least 2"):
        split_questions(behaviour(20), max_val=cap)
