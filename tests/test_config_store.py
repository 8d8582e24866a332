from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from locaudit.config import (
    AuditConfig,
    EvaluationConfig,
    ITIConfig,
    JudgeConfig,
    JudgesConfig,
    LoadingConfig,
    OptimalConfig,
    ProbeConfig,
    PromptConfig,
    SplitConfig,
    load_config,
    parse_config,
    to_dict,
    to_yaml,
)
from locaudit.errors import ConfigError, RunFolderError
from locaudit.records import TrialRecord, TrialSpec, content_hash
from locaudit.store import open_run, read_run, write_atomically

DEFAULT = AuditConfig()
OTHER_JUDGE = JudgeConfig(
    kind="openai",
    model="a-model",
    prompt="rubric.txt",
    style="completion",
    base_url="http://localhost:1/v1",
    api_key_env="A_KEY",
    concurrency=2,
    timeout=1.5,
    max_retries=0,
    price_in=0.5,
    price_out=1e-3,
)
CHANGED = AuditConfig(
    model="a/model",
    behaviour="behaviour: 'ü\n#.jsonl",
    claim="14.3,15.7",
    registered="claim.yaml",
    controls=3,
    match="layer",
    disjoint=True,
    stopping="curtailed",
    rest=False,
    margin=0.1,
    whole_model=False,
    methods=("optimal",),
    score="mc1",
    level=0.1,
    seed=2**62,
    training_seed=3,
    loading=LoadingConfig(
        dtype="bfloat16",
        device="cuda:1",
        device_map="auto",
        revision="main",
        trust_remote_code=True,
        allow_pickle=True,
    ),
    split=SplitConfig(fractions=(0.5, 0.25, 0.25), seed=7, max_train=10, max_val=11, max_test=12),
    prompt=PromptConfig(style="chat", primer="none", primer_in_training=True),
    probe=ProbeConfig(context="answer", inverse_l2=1e-5, val_fraction=0.5, top_k=3),
    iti=ITIConfig(direction="probe", alphas=(0.1, 1e22), positions="all"),
    optimal=OptimalConfig(
        objective="dpo",
        reduction="mean",
        strengths=(1 / 3,),
        reader="none",
        batching="pair",
        batch_size=4,
        epochs=1,
        learning_rate=1e-4,
        max_questions=9,
        max_grad_norm=0.5,
        optimizer="auto",
        bank_size=7,
    ),
    evaluation=EvaluationConfig(
        drift_text="text.txt", drift_documents=2, drift_tokens=3, max_new_tokens=7, bank_size=2
    ),
    judges=JudgesConfig(target=OTHER_JUDGE, retention=OTHER_JUDGE),
)


def leaves(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# Configuration


def test_every_setting_differs_in_the_changed_configuration():
    default, changed = dict(leaves(to_dict(DEFAULT))), dict(leaves(to_dict(CHANGED)))
    assert [key for key in default if default[key] == changed[key]] == []


@pytest.mark.parametrize("config", [DEFAULT, CHANGED])
def test_yaml_round_trip(config, tmp_path):
    assert parse_config(to_yaml(config)) == config
    (tmp_path / "c.yaml").write_text(to_yaml(config), encoding="utf-8")
    again = load_config(tmp_path / "c.yaml", CHANGED)
    assert again == config
    assert again.hash == config.hash
    assert hash(again) == hash(config)


@given(
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(1e-300, 1e300),
    st.integers(0, 2**63 - 1),
    st.text(st.characters(exclude_categories=["Cs"])),
)
def test_yaml_keeps_every_digit_and_letter(alpha, rate, seed, text):
    config = AuditConfig(
        iti=ITIConfig(alphas=(alpha,)), optimal=OptimalConfig(learning_rate=rate), seed=seed, model=text, claim=text
    )
    again = parse_config(to_yaml(config))
    assert again == config
    assert again.hash == config.hash


def test_settings_not_named_keep_the_base():
    assert parse_config("") == parse_config("{}") == DEFAULT
    assert parse_config("controls: 5\niti: {alphas: [1, 2.5]}", CHANGED) == replace(
        CHANGED, controls=5, iti=replace(CHANGED.iti, alphas=(1.0, 2.5))
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("control: 5", "unknown setting control in here;.*controls"),
        ("iti: {alpha: [1]}", "unknown setting iti.alpha in here"),
        ("1: 2", "unknown setting 1"),
        ("iti: 5", "iti. = 5"),
        ("iti:", "iti. = None"),
        ("- a", "a document"),
        ("text", "a document"),
        ("a: [", "not YAML"),
        ("\t", "not YAML|a document"),
        ("controls: 5.0", "controls = 5.0.*expected int"),
        ("controls: true", "controls = True.*expected int"),
        ("controls: '5'", "controls = '5'.*expected int"),
        ("controls:", "controls = None.*expected int"),
        ("level: true", "level = True.*expected float"),
        ("level: high", "level = 'high'.*expected float"),
        ("whole_model: 1", "whole_model = 1.*expected bool"),
        ("model: 5", "model = 5.*expected str"),
        ("claim: 14.3", r"claim = 14.3.*expected str \| None"),
        ("claim: [14.3]", "claim = "),
        ("match: layers", "match = 'layers'.*'layer'"),
        ("methods: iti", "methods = 'iti'"),
        ("methods: [iti, best]", "methods = 'best'"),
        ("iti: {alphas: 5}", "iti.alphas = 5"),
        ("iti: {alphas: [a]}", "iti.alphas = 'a'"),
        ("iti: {alphas: [.nan]}", "iti.alphas = nan"),
        ("iti: {alphas: [.inf]}", "iti.alphas = inf"),
        ("optimal: {learning_rate: .inf}", "optimal.learning_rate = inf"),
        ("probe: {inverse_l2: .inf}", "probe.inverse_l2 = inf"),
        ("split: {fractions: [0.5, 0.5]}", "split.fractions"),
        ("loading: {dtype: int8}", "loading.dtype = 'int8'"),
    ],
)
def test_wrong_yaml_names_the_setting(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(text, source="here")


@pytest.mark.parametrize(
    "change",
    [
        {"controls": 0},
        {"level": 0.0},
        {"level": 1.0},
        {"level": math.nan},
        {"methods": ()},
        {"methods": ("iti", "iti")},
        {"split": SplitConfig(fractions=(0.5, 0.5, 0.5))},
        {"split": SplitConfig(fractions=(1.0, 0.5, -0.5))},
        {"split": SplitConfig(max_test=1)},
        {"probe": ProbeConfig(top_k=0)},
        {"probe": ProbeConfig(inverse_l2=0.0)},
        {"probe": ProbeConfig(val_fraction=1.0)},
        {"iti": ITIConfig(alphas=())},
        {"iti": ITIConfig(alphas=(1.0, 1.0))},
        {"iti": ITIConfig(alphas=(math.nan,))},
        {"optimal": OptimalConfig(strengths=(0.0,))},
        {"optimal": OptimalConfig(strengths=(math.inf,))},
        {"optimal": OptimalConfig(epochs=0)},
        {"optimal": OptimalConfig(learning_rate=-1.0)},
        {"evaluation": EvaluationConfig(drift_tokens=1)},
        {"loading": "cpu"},
        {"controls": 2.5},
    ],
    ids=str,
)
def test_out_of_range_raises(change):
    with pytest.raises(ConfigError):
        AuditConfig(**change)


def test_equal_settings_hash_alike_however_they_were_written():
    """A run begun from Python with whole numbers or lists resumes from its own YAML."""
    config = AuditConfig(iti=ITIConfig(alphas=[5, 10]), methods=["iti"], split=SplitConfig(max_test=5))  # type: ignore[arg-type]
    assert config == AuditConfig(iti=ITIConfig(alphas=(5.0, 10.0)), methods=("iti",), split=SplitConfig(max_test=5))
    assert parse_config(to_yaml(config)).hash == config.hash
    assert type(config.iti.alphas[0]) is float


def test_hash_ignores_the_device_and_what_only_reads_the_trials():
    changed = to_dict(CHANGED)
    for name, value in leaves(changed):
        values = to_dict(DEFAULT)
        *path, key = name.split(".")
        target = values
        for part in path:
            target = target[part]
        target[key] = value
        if name.endswith(".kind"):
            target["model"] = "a-model"
        same = parse_config(yaml.safe_dump(values)).hash == DEFAULT.hash
        reads_only = name in ("score", "level", "margin", "stopping", "registered") or name.startswith("judges.")
        assert same == (reads_only or name in ("loading.device", "loading.device_map")), name


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(ConfigError, match="not a file"):
        load_config(tmp_path)
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError):
        load_config(tmp_path / "c.yaml")


# Records


def make_record(number=0, **changes):
    spec = TrialSpec("control", "optimal", "14.3,15.7", 0.1 + 0.2, number, "context", number)
    values = {
        "spec": spec,
        "status": "ok",
        "metrics": {"test": {"mc1": 1 / 3, "mc2": 5e-324}},
        "drift": {"kl": 1e-17},
        "questions": {"val": {"mc1": (0.1,)}, "test": {"mc1": (1 / 3, 1e308), "mc2": (0.0, -0.0)}},
        "training": {"loss": (0.7, 0.1 + 0.7)},
        "edit": "a.safetensors",
    }
    return TrialRecord(**{**values, **changes})


IDS = {"val": ["q0"], "test": ["q1", "q2"]}
finite = st.floats(allow_nan=False, allow_infinity=False)
scores = st.dictionaries(st.sampled_from(["val", "test"]), st.dictionaries(st.text(max_size=5), finite, max_size=3))
lists = st.lists(finite, max_size=4).map(tuple)


@given(
    scores,
    st.dictionaries(st.sampled_from(["val", "test"]), st.dictionaries(st.text(max_size=5), lists, max_size=3)),
    st.one_of(st.none(), finite),
    st.text(),
    lists,
)
def test_record_round_trip_keeps_every_bit(metrics, questions, hyperparameter, message, loss):
    spec = TrialSpec("claim", "iti", "1.2", hyperparameter, 3, "c")
    answers = {"test": (message, "", "Q: \u2028")}
    record = TrialRecord(spec, "ok", message, metrics, {"kl": 0.1}, questions, answers, {"loss": loss}, "e")
    text = record.to_json()
    again = TrialRecord.from_json(text)
    assert again == record
    assert again.to_json() == text  # also tells -0.0 from 0.0
    assert again.spec.trial_id == spec.trial_id


def test_diverged_records_round_trip_too():
    record = make_record(status="diverged", message="loss is nan", training={"loss": (0.7, math.nan, math.inf)})
    assert TrialRecord.from_json(record.to_json()).to_json() == record.to_json()


def test_trial_identity():
    spec = make_record().spec
    assert spec.trial_id == replace(spec).trial_id
    changes = {"arm": "claim", "method": "iti", "location": "1.1", "hyperparameter": 0.4}
    changes |= {"seed": 9, "context": "x", "control": 8, "registration": "0123456789abcdef"}
    ids = {replace(spec, **{key: value}).trial_id for key, value in changes.items()}
    assert len(ids | {spec.trial_id}) == len(dataclasses.fields(spec)) + 1
    # The claim and its controls share their random numbers; methods, hyperparameters and seeds do not.
    shared = {key for key, value in changes.items() if replace(spec, **{key: value}).rng_seed == spec.rng_seed}
    assert shared == {"arm", "location", "control", "context", "registration"}
    assert 0 <= spec.rng_seed < 2**63


def test_content_hash_ignores_key_order_and_refuses_nan():
    assert content_hash({"a": 1, "b": [2.5]}) == content_hash({"b": [2.5], "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": 2})
    with pytest.raises(ValueError):
        content_hash(math.nan)


# The run folder


def test_records_come_back_exactly(tmp_path):
    records = [make_record(k) for k in range(3)]
    with open_run(tmp_path / "run", DEFAULT) as store:
        assert store.records() == [] and store.done() == set()
        store.add(records[:2], IDS, seconds=3.0)
        store.add(records[2:], IDS, seconds=1.0)
    with read_run(tmp_path / "run") as store:
        assert store.config == DEFAULT
        assert {r.spec.trial_id: r.to_json() for r in store.records()} == {
            r.spec.trial_id: r.to_json() for r in records
        }
        assert store.done() == {r.spec.trial_id for r in records}
        assert [store.seconds()[r.spec.trial_id] for r in records] == [1.5, 1.5, 1.0]
        rows = store._connection.execute("SELECT question, value FROM scores WHERE metric = 'mc1' AND split = 'test'")
        assert sorted(rows) == sorted([("q1", 1 / 3), ("q2", 1e308)] * 3)


def test_facts_and_resuming(tmp_path):
    moved = replace(DEFAULT, loading=LoadingConfig(device="cpu"))
    with open_run(tmp_path, DEFAULT) as store:
        assert store.fact("a") is None
        store.set_fact("a", {"x": [1, 0.1]})
        store.add([make_record()], IDS, 1.0)
        assert store.edits.is_dir() and store.cache.is_dir()
    with open_run(tmp_path, moved) as store:  # another device is the same run
        store.set_fact("b", None)
        assert store.fact("a") == {"x": [1, 0.1]}
        assert len(store.records()) == 1
    with read_run(tmp_path) as store:
        assert store.config == moved


def test_a_run_from_python_resumes(tmp_path):
    for _ in range(2):
        with open_run(tmp_path, AuditConfig(iti=ITIConfig(alphas=(5, 10)))):
            pass


def test_adding_is_all_or_none(tmp_path):
    good = [make_record(k) for k in range(3)]
    short = make_record(9, questions={"test": {"mc1": (0.5,)}})
    nan = make_record(9, questions={"test": {"mc1": (0.5, math.nan)}})
    unknown = make_record(9, questions={"train": {"mc1": (0.5, 0.5)}})
    with open_run(tmp_path, DEFAULT) as store:
        store.add(good[:1], IDS, 1.0)
        for last, error in (
            (good[0], sqlite3.IntegrityError),  # already there
            (short, ValueError),
            (nan, sqlite3.IntegrityError),
            (unknown, KeyError),
        ):
            with pytest.raises(error):
                store.add([*good[1:], last], IDS, 1.0)
            assert store.done() == {good[0].spec.trial_id}
            for table in ("scores", "timings"):
                ids = {row[0] for row in store._connection.execute(f"SELECT trial_id FROM {table}")}
                assert ids == {good[0].spec.trial_id}
        store.add(good[1:], IDS, 1.0)
        assert len(store.done()) == 3


def test_another_configuration_is_refused_and_the_difference_named(tmp_path):
    with open_run(tmp_path, DEFAULT) as store:
        store.add([make_record()], IDS, 1.0)
    with (
        pytest.raises(RunFolderError, match=r"controls: 19 there, 5 here; optimal.epochs: 2 there, 3 here\)"),
        open_run(tmp_path, replace(DEFAULT, controls=5, optimal=OptimalConfig(epochs=3))),
    ):
        pass
    with pytest.raises(RunFolderError, match=r"\.\.\.\)"), open_run(tmp_path, CHANGED):
        pass
    assert load_config(tmp_path / "config.yaml") == DEFAULT


def test_a_folder_without_records_takes_a_new_configuration(tmp_path):
    other = replace(DEFAULT, controls=5)
    for config in (DEFAULT, other):
        with open_run(tmp_path, config) as store:
            assert store.config == config
    assert load_config(tmp_path / "config.yaml") == other


def test_a_damaged_configuration_is_refused(tmp_path):
    with open_run(tmp_path, DEFAULT) as store:
        store.add([make_record()], IDS, 1.0)
    for content in (b"no_such: 1", b"a: [", b"\xff\xfe\x00"):
        (tmp_path / "config.yaml").write_bytes(content)
        with pytest.raises(RunFolderError, match="does not load"), open_run(tmp_path, DEFAULT):
            pass
        with pytest.raises((RunFolderError, ConfigError)), read_run(tmp_path):
            pass
        assert (tmp_path / "config.yaml").read_bytes() == content


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match=r"other files in it \(thesis.tex\)"), open_run(tmp_path, DEFAULT):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(RunFolderError, match="not a run folder"), read_run(tmp_path):
        pass
    with pytest.raises(RunFolderError, match="cannot be made"), open_run(tmp_path / "thesis.tex", DEFAULT):
        pass
    with pytest.raises(RunFolderError, match="not a run folder"), read_run(tmp_path / "nowhere"):
        pass


@pytest.mark.skipif(
    os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(RunFolderError, match="write permission"), open_run(tmp_path, DEFAULT):
            pass
        with pytest.raises(RunFolderError, match="cannot be made"), open_run(tmp_path / "run", DEFAULT):
            pass
    finally:
        tmp_path.chmod(0o700)


def test_a_start_that_was_killed_can_be_repeated(tmp_path, monkeypatch):
    """Wherever the first start stops, the second one goes through."""
    for step in ("mkdir", "connect"):
        folder = tmp_path / step
        with monkeypatch.context() as patch:
            if step == "mkdir":
                folder.mkdir()
                patch.setattr(Path, "mkdir", _killed_after_first(Path.mkdir))
            else:
                patch.setattr(sqlite3, "connect", _killed)
            with pytest.raises(KeyboardInterrupt), open_run(folder, DEFAULT):
                pass
        with open_run(folder, DEFAULT) as store:
            store.add([make_record()], IDS, 1.0)


def _killed(*_args, **_kwargs):
    raise KeyboardInterrupt


def _killed_after_first(original):
    """Like `original` for the run folder and its first subfolder."""
    calls = []

    def call(*args, **kwargs):
        calls.append(args)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    return call


_WRITER = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("open", flush=True)
    sys.stdin.read()
"""


def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path):
    with open_run(tmp_path, DEFAULT) as store:
        with pytest.raises(RunFolderError, match="another process"), open_run(tmp_path, DEFAULT):
            pass
        store.set_fact("still", "writing")
        with read_run(tmp_path) as reader:  # reading is allowed meanwhile
            assert reader.fact("still") == "writing"
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(tmp_path / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == "open\n"
        with pytest.raises(RunFolderError, match="another process"), open_run(tmp_path, DEFAULT):
            pass
        process.kill()
    with open_run(tmp_path, DEFAULT):  # a killed writer holds nothing
        pass


@pytest.mark.parametrize("damage", ["garbage", "header", "cut", "hole"])
def test_a_damaged_database_is_refused(tmp_path, damage):
    with open_run(tmp_path, DEFAULT) as store:
        store.add([make_record(k) for k in range(100)], IDS, 1.0)
    path = tmp_path / "trials.sqlite"
    content = bytearray(path.read_bytes())
    assert len(content) > 5 * 4096
    if damage == "garbage":
        content = bytearray(b"garbage" * 1000)
    elif damage == "header":
        content[:16] = bytes(16)
    elif damage == "cut":
        content = content[: len(content) // 2]
    else:
        for at in range(4096, len(content), 4096):  # every page but the schema's
            content[at : at + 200] = b"\xff" * 200
    path.write_bytes(content)
    with pytest.raises(RunFolderError, match="trials.sqlite"), open_run(tmp_path, DEFAULT):
        pass
    with pytest.raises(RunFolderError, match="trials.sqlite"), read_run(tmp_path) as store:
        store.records()
    assert path.read_bytes() == bytes(content)


def test_reading_a_run_that_never_began_its_table(tmp_path):
    with open_run(tmp_path, DEFAULT):
        pass
    (tmp_path / "trials.sqlite").write_bytes(b"")
    with pytest.raises(RunFolderError), read_run(tmp_path) as store:
        store.records()


def test_no_room_stops_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    with open_run(tmp_path / "run", DEFAULT) as store:
        store.add([make_record()], IDS, 1.0)
        monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=2**20))
        with pytest.raises(RunFolderError, match=r"1 MiB free.*at least 64 MiB.*finished trials are kept"):
            store.add([make_record(1)], IDS, 1.0)
        assert len(store.done()) == 1
    with pytest.raises(RunFolderError, match="1 MiB free"), open_run(tmp_path / "other", DEFAULT):
        pass
    with read_run(tmp_path / "run") as store:  # reading needs no room
        assert len(store.records()) == 1


def test_a_disk_that_fills_while_writing_keeps_what_was_there(tmp_path):
    with open_run(tmp_path, DEFAULT) as store:
        store.add([make_record()], IDS, 1.0)
        (pages,) = store._connection.execute("PRAGMA page_count").fetchone()
        store._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(RunFolderError, match="MiB free"):
            store.add([make_record(k) for k in range(1, 200)], IDS, 1.0)
        assert len(store.done()) == 1
        store._connection.execute("PRAGMA max_page_count = 100000")
        store.add([make_record(k) for k in range(1, 200)], IDS, 1.0)
        assert len(store.done()) == 200


def test_atomic_writing_leaves_the_old_or_the_new(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    write_atomically(path, b"older")
    assert path.read_bytes() == b"older"

    def fails(code):
        def fsync(_descriptor):
            raise OSError(code, os.strerror(code))

        return fsync

    monkeypatch.setattr(os, "fsync", fails(errno.ENOSPC))
    with pytest.raises(RunFolderError, match="MiB free"):
        write_atomically(path, b"new")
    monkeypatch.setattr(os, "fsync", fails(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write_atomically(path, b"new")
    monkeypatch.setattr(os, "fsync", _killed)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"older"
    monkeypatch.undo()
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_saved_yaml_is_the_whole_configuration(tmp_path):
    with open_run(tmp_path, CHANGED):
        pass
    assert yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8")) == json.loads(
        json.dumps(to_dict(CHANGED))
    )
