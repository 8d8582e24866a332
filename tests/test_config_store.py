from __future__ import annotations

import copy
import dataclasses
import errno
import json
import math
import os
import pickle
import shutil
import sqlite3
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from locaudit.claims import Shape
from locaudit.config import (
    ArchitectureConfig,
    AuditConfig,
    EvaluationConfig,
    JudgeChoice,
    LoadingConfig,
    ProbeConfig,
    PromptConfig,
    RayConfig,
    Registration,
    SplitConfig,
    load_config,
    parse_config,
    parse_over,
    read_registration,
    to_dict,
    to_yaml,
    unknown_names_kept,
)
from locaudit.errors import ConfigError, RunFolderError
from locaudit.location import Location
from locaudit.methods import Method
from locaudit.methods.settings import ITISettings, OptimalSettings
from locaudit.records import TrialRecord, TrialSpec, content_hash, mean_metrics
from locaudit.registry import ASPECTS, METHODS
from locaudit.stats.phrases import MethodFacts
from locaudit.stats.sequential import Null
from locaudit.store.database import SCHEMA, HeldOutQuestion
from locaudit.store.files import write_atomically
from locaudit.store.folder import has_trials, open_run, read_run
from locaudit.store.manifest import JudgeFacts, Manifest, ProbeFacts
from locaudit.studies.paper.config import PaperConfig
from tiny import heads

DEFAULT = AuditConfig()
OTHER_JUDGE = {
    "kind": "openai",
    "model": "a-model",
    "prompt": "rubric.txt",
    "style": "completion",
    "base_url": "http://localhost:1/v1",
    "api_key_env": "A_KEY",
    "concurrency": 2,
    "timeout": 1.5,
    "max_retries": 0,
    "price_in": 0.5,
    "price_out": 1e-3,
}
CHANGED = AuditConfig(
    model="a/model",
    behaviour="behaviour: 'ü\n#.jsonl",
    behaviour_format="ab-text",
    claim="14.3,15.7",
    claim_format="npy",
    claim_top_k=3,
    claim_threshold=0.5,
    registered="claim.yaml",
    controls=3,
    rest_controls=2,
    placebos=4,
    nulls=("norm", "anywhere"),
    disjoint=True,
    stopping="curtailed",
    widen=1,
    rest=False,
    margin=0.1,
    whole_model=False,
    plugins=("json",),
    executor="ray",
    tracker="wandb",
    ray=RayConfig(address="host:1", workers=2, cpus_per_worker=1.5, gpus_per_worker=0.5, weights="send"),
    score="mc1",
    level=0.1,
    seed=2**62,
    training_seed=3,
    architecture=ArchitectureConfig("model.layers", "self_attn.o_proj", "mlp.down_proj"),
    loading=LoadingConfig(
        dtype="bfloat16",
        device="cuda:1",
        device_map="auto",
        revision="main",
        trust_remote_code=True,
        allow_pickle=True,
    ),
    split=SplitConfig(fractions=(0.5, 0.25, 0.25), seed=7, max_train=10, max_val=11, max_test=12, max_answers=2),
    prompt=PromptConfig(
        style="chat",
        primer="none",
        primer_in_training=True,
        eos_in_training=True,
        template={"enable_thinking": False, "date_string": "26 Jul", "effort": 0.5},
        date="2026-01-31",
        primer_order=2,
        wording=1,
    ),
    off_target=("sentiment",),
    vary=("primer", "wording"),
    probe=ProbeConfig(context="answer", inverse_l2=1e-5, val_fraction=0.5, top_k=3),
    methods={
        "iti": ITISettings(direction="probe", alphas=(0.1, 1e22), doses=(0.1,), positions="all"),
        "optimal": OptimalSettings(
            objective="dpo",
            positions="last",
            reduction="mean",
            strengths=(1 / 3,),
            reader="location",
            rank=2,
            batching="pair",
            batch_size=4,
            epochs=1,
            learning_rate=1e-4,
            max_questions=9,
            max_grad_norm=0.5,
            optimizer="auto",
            bank_size=7,
        ),
        "ablate": {},
    },
    evaluation=EvaluationConfig(
        drift_text="text.txt",
        drift_documents=2,
        drift_tokens=3,
        max_new_tokens=7,
        max_prompts=3,
        bank_size=2,
        samples=0,
    ),
    judges=dict.fromkeys(ASPECTS, OTHER_JUDGE),  # type: ignore[arg-type]
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
    assert {"methods.optimal.rank", "judges.truth.kind"} < set(default)


@pytest.mark.parametrize("config", [DEFAULT, CHANGED])
def test_yaml_round_trip(config, tmp_path):
    assert parse_config(to_yaml(config)) == config
    with open_run(tmp_path, config):
        pass
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    assert saved == json.loads(json.dumps(to_dict(config))), "it names every setting"
    again = load_config(tmp_path / "config.yaml", CHANGED)
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
        methods={"iti": ITISettings(alphas=(alpha,)), "optimal": OptimalSettings(learning_rate=rate)},
        seed=seed,
        model=text,
        claim=text,
    )
    again = parse_config(to_yaml(config))
    assert again == config
    assert again.hash == config.hash


def test_a_day_and_the_variables_of_a_template():
    text = "prompt: {date: 2026-01-31, template: {a: true, b: 0.5, c: x}}"  # YAML reads a date
    prompt = parse_config(text, CHANGED).prompt
    assert (prompt.date, prompt.template) == ("2026-01-31", {"a": True, "b": 0.5, "c": "x"})
    assert all(type(prompt.template[name]) is kind for name, kind in {"a": bool, "b": float, "c": str}.items())
    hash(prompt)


def test_settings_not_named_keep_the_base():
    assert parse_config("") == parse_config("{}") == DEFAULT
    text = "controls: 5\nmethods: {iti: {alphas: [1, 2.5]}}\njudges: {info: {timeout: 3}}"
    judge = replace(CHANGED.judges["info"].settings, timeout=3.0)
    assert parse_config(text, CHANGED) == replace(
        CHANGED,
        controls=5,
        methods={"iti": replace(CHANGED.methods["iti"], alphas=(1.0, 2.5))},
        judges={**CHANGED.judges, "info": JudgeChoice("openai", judge)},
    )
    assert parse_config("methods: [optimal]", CHANGED).methods == {"optimal": CHANGED.methods["optimal"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("control: 5", "unknown setting control in here;.*controls"),
        ("methods: {iti: {alpha: [1]}}", "unknown setting methods.iti.alpha in here.*did you mean methods.iti.alphas"),
        ("iti: {alphas: [1]}", "the unknown setting iti in here; expected methods.iti"),
        ("optimal: {epochs: 1}", "the unknown setting optimal in here; expected methods.optimal"),
        ("optimal: {reader: none}", "the unknown setting optimal in here; expected the method constant"),
        ("methods: {optimal: {reader: none}}", "methods.optimal.reader = 'none' in here; expected the method constant"),
        ("judges: {target: {kind: none}}", "the unknown setting judges.target in here; expected judges.truth"),
        ("judges: {retention: {kind: none}}", "expected judges.info"),
        (
            "prompt: {primer: default}",
            r"prompt.primer = 'default' in here; expected auto \(.*\) or truthful \(.*which replace",
        ),
        ("prompt: {date: yesterday}", "prompt.date = 'yesterday' in here; expected auto or a day; write it as 2026-"),
        ("prompt: {date: 2026-01-31 12:00:00}", "prompt.date = '2026-01-31T12:00:00' in here; expected auto or a day"),
        ("prompt: {template: [a]}", r"prompt.template = \['a'\] in here"),
        ("prompt: {template: {a: [1]}}", r"prompt.template = .*\[1\]\} in here"),
        ("judges: {tone: {kind: none}}", "unknown setting judges.tone in here; expected one of truth, info"),
        ("judges: {truth: {kind: opnai}}", "judges.truth.kind = 'opnai' in here.*openai.*did you mean 'openai'"),
        ("judges: {truth: {model: m}}", "judges.truth.model without a kind of judge in here"),
        ("judges: {truth: {kind: none, model: m}}", "unknown setting judges.truth.model"),
        ("judges: {truth: none}", "judges.truth = 'none'"),
        ("judges: openai", "judges = 'openai'"),
        (
            "judges: {truth: {kind: reference}}\nevaluation: {max_new_tokens: 0}",
            "judges.truth.kind = reference and evaluation.max_new_tokens = 0.*answers to judge",
        ),
        (
            "judges: {truth: {kind: openai, model: m, api_key_env: sk-secret}}",
            "got an api_key_env that is not a variable name",
        ),
        ("plugins: [no_such_plugin]", "the plug-in no_such_plugin, which cannot be imported"),
        ("plugins: json", "plugins = 'json'"),
        ("1: 2", "unknown setting 1"),
        ("methods: {iti: 5}", "methods.iti = 5"),
        ("split:", "split = None"),
        ("- a", r"\['a'\] in here; expected keys among"),
        ("text", "'text' in here; expected keys among"),
        ("a: [", "not YAML"),
        ("\t", "not YAML|expected keys among"),
        ("controls: 5.0", "controls = 5.0.*expected a whole number"),
        ("controls: true", "controls = True.*expected a whole number"),
        ("controls: '5'", "controls = '5'.*expected a whole number"),
        ("controls:", "controls = None.*expected a whole number"),
        ("level: true", "level = True.*expected a number"),
        ("level: high", "level = 'high'.*expected a number"),
        ("whole_model: 1", "whole_model = 1.*expected true or false"),
        ("model: 5", "model = 5.*expected text"),
        ("claim: 14.3", r"claim = 14.3.*expected text or nothing"),
        ("claim: [14.3]", "claim = "),
        ("nulls: [layer]", "nulls = 'layer'.*'layers'"),
        (
            "nulls: []",
            r"nulls = \[\] in here; expected at least 1 value .*'layers'.*; write nulls: \[anywhere\]",
        ),
        ("nulls:", r"nulls = None in here; expected a list .*; write nulls: \[anywhere\]"),
        ("nulls: layers", r"nulls = 'layers' in here; expected a list .*; write nulls: \[layers\]"),
        (
            "off_target: sentiment",
            r"off_target = 'sentiment' in here; expected a list \(each value: text\); write off_target: \[sentiment\]",
        ),
        ("off_target: [3]", "off_target = 3 in here; expected text"),
        ("nulls: [layers, layers]", "each value once"),
        ("methods: iti", "methods = 'iti'"),
        ("methods: []", "methods = "),
        ("methods: [iti, best]", "methods = 'best'"),
        ("methods: [iti, optimul]", "methods = 'optimul'.*did you mean 'optimal'"),
        ("methods: {iti: {alphas: 5}}", r"iti.alphas = 5 .*expected a list .*; write alphas: \[5\]"),
        ("methods: {iti: {alphas: [a]}}", "iti.alphas = 'a'"),
        ("methods: {iti: {alphas: ['1']}}", "iti.alphas = '1'"),
        ("methods: {iti: {alphas: [true]}}", "iti.alphas = True"),
        ("methods: {iti: {alphas: [.nan]}}", "iti.alphas = nan"),
        ("methods: {iti: {alphas: [.inf]}}", "iti.alphas = inf"),
        ("evaluation: {max_new_tokens: -1}", "evaluation.max_new_tokens = -1 in here; expected at least 0"),
        ("evaluation: {max_new_tokens: '5'}", "evaluation.max_new_tokens = '5'"),
        ("methods: {optimal: {learning_rate: .inf}}", "optimal.learning_rate = inf"),
        ("probe: {inverse_l2: .inf}", "probe.inverse_l2 = inf"),
        ("split: {fractions: [0.5, 0.5]}", "split.fractions"),
        (
            "split: {fractions: 0.5}",
            r"split.fractions = 0.5 in here; expected a list of 3 values .*; write fractions: \[0.5, ...\]",
        ),
        ("loading: {dtype: int8}", "loading.dtype = 'int8'"),
    ],
)
def test_wrong_yaml_names_the_setting(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(text, source="here")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AuditConfig(controls=0), "controls = 0 in the configuration; expected at least 1"),
        (lambda: AuditConfig(level=0.0), "level = 0.0.*expected greater than 0"),
        (lambda: AuditConfig(level=1.0), "level = 1.0.*expected less than 1"),
        (lambda: AuditConfig(level=math.nan), "level = nan.*a finite number"),
        (lambda: AuditConfig(margin=0.0), "margin = 0.0"),
        (lambda: AuditConfig(margin=0.05), "margin = 0.05 .*expected a share of a gain, 0.1 or more"),
        (lambda: AuditConfig(seed=2**63), "seed = 9223372036854775808"),
        (lambda: AuditConfig(training_seed=-1), "training_seed = -1"),
        (lambda: AuditConfig(methods={}), "methods = "),
        (lambda: AuditConfig(methods=("iti", "iti")), "methods = .*each method once"),  # type: ignore[arg-type]
        (lambda: AuditConfig(no_such=1), "unknown setting no_such"),  # type: ignore[call-arg]
        (lambda: AuditConfig(loading="cpu"), "loading = 'cpu'"),  # type: ignore[arg-type]
        (lambda: AuditConfig(controls=2.5), "controls = 2.5"),  # type: ignore[arg-type]
        (lambda: SplitConfig(fractions=(0.5, 0.5, 0.5)), "fractions = .*three positive shares with sum 1"),
        (lambda: SplitConfig((1.0, 0.5, -0.5)), "fractions = "),
        (lambda: PromptConfig(primer="default"), "primer = 'default' in the configuration; expected auto .* truthful"),
        (lambda: SplitConfig(max_test=1), "max_test = 1.*expected at least 2"),
        (lambda: ProbeConfig(top_k=0), "top_k = 0"),
        (lambda: ProbeConfig(inverse_l2=0.0), "inverse_l2 = 0.0"),
        (lambda: ProbeConfig(val_fraction=1.0), "val_fraction = 1.0"),
        (lambda: ITISettings(alphas=()), "alphas = .*at least 1"),
        (lambda: ITISettings(alphas=(1.0, 1.0)), "alphas = .*each value once"),
        (lambda: ITISettings(alphas=(math.nan,)), "alphas = nan"),
        (lambda: OptimalSettings(strengths=(0.0,)), "strengths = 0.0.*expected greater than 0"),
        (lambda: OptimalSettings(strengths=(math.inf,)), "strengths = inf"),
        (lambda: OptimalSettings(epochs=0), "epochs = 0"),
        (lambda: OptimalSettings(learning_rate=-1.0), "learning_rate = -1.0"),
        (lambda: EvaluationConfig(drift_tokens=1), "drift_tokens = 1"),
    ],
)  # fmt: skip
def test_out_of_range_raises(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_yaml_numbers_as_everyone_writes_them():
    config = parse_config("methods: {optimal: {learning_rate: 1e-3}}\nmodel: '1e-3'")
    assert (config.methods["optimal"].learning_rate, config.model) == (1e-3, "1e-3")
    assert parse_config(to_yaml(config)) == config


def test_settings_do_not_change_and_can_be_sent():
    with pytest.raises(TypeError, match="settings cannot be changed"):
        CHANGED.methods["iti"] = ITISettings()  # type: ignore[index]
    assert pickle.loads(pickle.dumps(CHANGED)) == CHANGED
    assert AuditConfig(methods={"optimal": {}, "iti": {}}) == DEFAULT  # the order does not matter
    assert AuditConfig(methods={"optimal": {}, "iti": {}}).hash == DEFAULT.hash


@dataclasses.dataclass(frozen=True)
class Inner:
    width: int = 3


@dataclasses.dataclass(frozen=True)
class Plain:
    """Settings of a plug-in, which knows nothing of pydantic."""

    name: str
    size: int = 1
    sizes: tuple[float, ...] = (1.0, 2.0)
    inner: Inner = dataclasses.field(default_factory=Inner)


def test_settings_of_a_plug_in_are_checked_alike():
    with METHODS.temporary("mine", Method("Mine", Plain, "nowhere:fit")):
        config = parse_config("methods: {mine: {name: a, size: 2, inner: {width: 4}}}")
        assert config.methods["mine"] == Plain("a", 2, inner=Inner(4))
        assert type(config.methods["mine"]) is Plain
        assert parse_config(to_yaml(config)) == config
        assert pickle.loads(pickle.dumps(config)) == config
        assert parse_config("methods: {mine: {size: 3}}", config).methods["mine"] == Plain("a", 3, inner=Inner(4))
        for text, message in {
            "{size: 2}": "no value for methods.mine.name in here",
            "{name: 5}": "methods.mine.name = 5 in here; expected text",
            "{name: a, size: '2'}": "methods.mine.size = '2' in here; expected a whole number",
            "{name: a, siz: 2}": "unknown setting methods.mine.siz .*did you mean methods.mine.size",
            "{name: a, sizes: [.nan]}": "methods.mine.sizes",
            "{name: a, inner: {width: 1.5}}": "methods.mine.inner.width = 1.5 in here; expected a whole number",
        }.items():
            with pytest.raises(ConfigError, match=message):
                parse_config(f"methods: {{mine: {text}}}", source="here")
        text = to_yaml(config)
    with pytest.raises(ConfigError, match="methods = 'mine'"):
        parse_config(text)
    with unknown_names_kept():  # for a report where the plug-in is not installed
        config = parse_config(f"{text}\nplugins: [no_such_plugin]".replace("plugins: []\n", ""))
    assert config.methods["mine"] == {"name": "a", "size": 2, "sizes": [1.0, 2.0], "inner": {"width": 4}}
    assert config.plugins == ("no_such_plugin",)
    assert "width: 4" in to_yaml(config)


def test_a_plug_in_of_a_file_is_there_before_its_settings_are_read(tmp_path):
    plugin = tmp_path / "plugin_of_a_test.py"
    plugin.write_text(
        "from dataclasses import dataclass\nfrom locaudit.methods import Method\n"
        "from locaudit.registry import METHODS\n"
        "@dataclass(frozen=True)\nclass S:\n    x: int = 0\n"
        "METHODS.register('of-a-file')(Method('Of a file', S, 'a:b'))\n"
    )
    text = f"methods: {{of-a-file: {{x: 2}}}}\nplugins: ['{plugin}']"
    with METHODS.temporary("unused", None):  # what is registered inside is gone after
        assert parse_config(text).methods["of-a-file"].x == 2
        assert AuditConfig(methods={"of-a-file": {}}, plugins=(str(plugin),)).plugins == (str(plugin),)


def test_equal_settings_hash_alike_however_they_were_written():
    """A run begun from Python with whole numbers or lists resumes from its own YAML."""
    config = AuditConfig(methods={"iti": {"alphas": [5, 10]}}, split=SplitConfig(max_test=5))
    assert config == AuditConfig(methods={"iti": ITISettings(alphas=(5.0, 10.0))}, split=SplitConfig(max_test=5))
    assert AuditConfig(methods=["iti"]) == AuditConfig(methods={"iti": {}})  # type: ignore[arg-type]
    assert parse_config(to_yaml(config)).hash == config.hash
    assert type(config.methods["iti"].alphas[0]) is float


def test_hash_ignores_the_device_and_what_only_reads_the_trials():
    changed, base = to_dict(CHANGED), to_dict(DEFAULT)
    base["methods"]["ablate"] = {}
    base["off_target"] = ["sentiment", "misconceptions-balanced"]
    base["rest_controls"], base["placebos"] = 3, 5
    base["architecture"] = {"layers": "h", "heads": "attn.out", "neurons": None}
    base["evaluation"]["max_new_tokens"] = 50  # a run folder holds the number, whoever chose it
    base["judges"] = {aspect: {"kind": "openai", "model": "m"} for aspect in base["judges"]}
    before = parse_config(yaml.safe_dump(base)).hash
    for name, value in leaves(changed):
        values = copy.deepcopy(base)
        *path, key = name.split(".")
        target = values
        for part in path:
            target = target[part]
        target[key] = value
        same = parse_config(yaml.safe_dump(values)).hash == before
        reads_only = name in ("score", "level", "margin", "stopping", "registered") or name.startswith("judges.")
        grows = name in (
            "controls", "rest_controls", "placebos", "nulls", "split.max_val", "split.max_test",
            "evaluation.max_new_tokens", "off_target", "evaluation.samples",
        )  # fmt: skip
        elsewhere = name in (
            "loading.device", "loading.device_map", "plugins", "executor", "tracker", "vary",
            "claim_format", "claim_top_k", "claim_threshold",
        )  # fmt: skip
        elsewhere |= name.startswith("ray.")
        assert same == (reads_only or elsewhere or grows), name
        refused = parse_config(yaml.safe_dump(base)).refuses(parse_config(yaml.safe_dump(values)))
        assert refused == ([] if reads_only or elsewhere else [name]), name  # a smaller number is refused, too
    assert AuditConfig(methods={"optimal": {}}).hash != DEFAULT.hash


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(ConfigError, match="not a file"):
        load_config(tmp_path)
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError):
        load_config(tmp_path / "c.yaml")


# Records


def make_record(number=0, **changes):
    spec = TrialSpec("control", "optimal", heads((14, 3), (15, 7)), 0.1 + 0.2, number, "context", number, null="layers")
    questions = {"val": {"mc1": (0.1,)}, "test": {"mc1": (1 / 3, 1e308), "mc2": (0.0, -0.0)}}
    values = {
        "spec": spec,
        "status": "ok",
        "drift": {"kl": 1e-17},
        "questions": questions,
        "training": {"loss": (0.7, 0.1 + 0.7)},
        "edit": "a.safetensors",
    } | changes
    return TrialRecord(**values, metrics=mean_metrics(values["questions"]))


SPLITS = {
    split: [HeldOutQuestion(name, f"{name}?", ("No.",), ("Yes.", "\u2028"), f"key of {name}") for name in names]
    for split, names in {"val": ["q0"], "test": ["q1", "q2"]}.items()
}


KEYS = {split: [question.key for question in questions] for split, questions in SPLITS.items()}
QUIET = replace(DEFAULT, evaluation=EvaluationConfig(max_new_tokens=0, samples=0))
"""A run whose trials are whole without answers."""


@contextmanager
def open_store(folder, config=QUIET):
    """A run folder open for writing, with questions."""
    with open_run(folder, config) as store:
        store.set_questions(SPLITS)
        yield store


def assert_refused(words, opening):
    """Entering the context raises a `RunFolderError` that matches."""
    with pytest.raises(RunFolderError, match=words), opening:
        pass


@pytest.fixture
def begun(tmp_path):
    """A run folder with one trial."""
    with open_store(tmp_path) as store:
        store.add([make_record()], 1.0)
    return tmp_path


finite = st.floats(-1e307, 1e307)  # the sum of a few must stay finite
scores = st.lists(finite, min_size=3, max_size=3)


@given(
    st.dictionaries(st.text(max_size=5), scores, min_size=1, max_size=3),
    st.one_of(st.none(), finite),
    st.text(),
    st.lists(finite, max_size=4).map(tuple),
)
def test_a_record_keeps_every_bit(metrics, hyperparameter, message, loss):
    location = Location(("a name", (3, 1)), "mine", "rest")
    spec = TrialSpec("rest", "iti", location, hyperparameter, 3, "c", draw=4, registration="0123456789abcdef")
    questions = {
        "val": {name: (values[0],) for name, values in metrics.items()},
        "test": {name: tuple(values[1:]) for name, values in metrics.items()},
    }
    answers = {"test": (message, "Q: \u2028")}
    record = make_record(
        spec=spec, message=message, questions=questions, answers=answers, training={"loss": loss}, edit="e"
    )
    with TemporaryDirectory() as folder:
        with open_store(folder) as store:
            store.add([record], 1.0)
        with read_run(folder) as store:
            (again,) = store.records()
    assert again == record
    assert ordered(again) == ordered(record)  # also tells -0.0 from 0.0


def ordered(record):
    return json.dumps(dataclasses.asdict(record), sort_keys=True, default=dict)


def test_diverged_records_come_back_too(tmp_path):
    losses = (0.7, math.nan, math.inf)
    record = make_record(status="diverged", message="loss is nan", questions={}, drift={}, training={"loss": losses})
    with open_store(tmp_path) as store:
        store.add([record], 1.0)
        assert list(map(ordered, store.records())) == [ordered(record)]
        assert store.done() == {record.spec.trial_id} and not store.kept({"test": ["key of another question"]})


def test_trial_identity():
    """A trial is its fit: what its place stands for has no part in it, so that runs can share an edit."""
    spec = make_record().spec
    assert spec.trial_id == replace(spec).trial_id
    changes = {"arm": "claim", "method": "iti", "location": heads((1, 1)), "hyperparameter": 0.4, "draw": 0}
    changes |= {"seed": 9, "context": "x", "control": 8, "registration": "0123456789abcdef", "null": "norm"}
    changes |= {"measured": make_record()}
    assert changes.keys() == {field.name for field in dataclasses.fields(spec)}
    ids = {key: replace(spec, **{key: value}).trial_id for key, value in changes.items()}
    places = {key for key, found in ids.items() if found == spec.trial_id}
    assert places == {"arm", "control", "registration", "null", "measured"}
    assert len(set(ids.values())) == len(changes) - len(places) + 1
    assert replace(spec, location=spec.location.rest()).trial_id != spec.trial_id
    # The claim and its controls share their random numbers; methods, hyperparameters and seeds do not.
    shared = {key for key, value in changes.items() if replace(spec, **{key: value}).rng_seed == spec.rng_seed}
    assert shared == {*places, "location", "context", "draw"}
    assert 0 <= spec.rng_seed < 2**63


def make_manifest(device="cuda:0") -> Manifest:
    claim = heads((14, 3), (15, 7))
    return Manifest(
        model="a/model",
        fingerprint="f",
        shape=Shape(30, 9, 3, 64, 1536, 576),
        n_units=270,
        kind_plural="heads",
        behaviour="b",
        aspects=("truth",),
        n_questions={"val": 1, "test": 2},
        data={"questions": 3},
        claim=claim,
        claim_source="given",
        methods={"iti": MethodFacts("ITI", training={"rate": 1 / 3})},
        planned=9,
        nulls={"anywhere": Null(2), "layers": Null(1, 7)},
        versions={"torch": "2"},
        device=device,
        dtype="float32",
        threads=1,
        judges={"truth": JudgeFacts("j", "f")},
        probes=ProbeFacts("head", ((0.1 + 0.2, 1.0),), 0.5, 4, 2, "answer", claim.units),
        banks={"cuda": (3, 32)},
        registration=Registration("0" * 64, "claim.yaml", {"claim": "14.3", "level": None}, "claim: '14.3'"),
        plugins=("json",),
    )


def test_content_hash_ignores_key_order_and_refuses_nan():
    assert content_hash({"a": 1, "b": [2.5]}) == content_hash({"b": [2.5], "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": 2})
    with pytest.raises(ValueError):
        content_hash(math.nan)


# The run folder


def test_records_come_back_exactly(tmp_path):
    records = [make_record(k) for k in range(3)]
    with open_store(tmp_path / "run") as store:
        assert store.records() == [] and store.done() == set() and store.is_empty()
        store.add(records[:2], seconds=3.0)
        store.add(records[2:], seconds=1.0)
    with read_run(tmp_path / "run") as store:
        assert store.config == QUIET
        assert not store.is_empty()
        assert {r.spec.trial_id: ordered(r) for r in store.records()} == {r.spec.trial_id: ordered(r) for r in records}
        assert store.done() == {r.spec.trial_id for r in records}
        assert {split: store.questions(split) for split in SPLITS} == SPLITS
        assert [store.seconds()[r.spec.trial_id] for r in records] == [1.5, 1.5, 1.0]
        ask = "SELECT questions, packed FROM scores JOIN lists USING (list) WHERE metric = 'mc1'"
        rows = [
            pair
            for questions, packed in store._connection.execute(ask)
            for pair in zip(json.loads(questions), np.frombuffer(packed, "<f8").tolist(), strict=True)
        ]
        assert sorted(rows) == sorted([("key of q0", 0.1), ("key of q1", 1 / 3), ("key of q2", 1e308)] * 3)


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE scores RENAME COLUMN packed TO value",
        "ALTER TABLE answers DROP COLUMN answer",
        "CREATE TABLE trials (trial_id TEXT PRIMARY KEY, record TEXT)",
    ],
)
def test_a_run_with_other_tables_or_columns_is_refused_and_left_as_it_is(tmp_path, change):
    with open_store(tmp_path / "run") as store:
        store.add([make_record()], 1.0)
    file = tmp_path / "run" / "trials.sqlite"
    with sqlite3.connect(file) as connection:
        connection.execute(change)
    connection.close()
    before = file.read_bytes()
    for opening in (read_run(tmp_path / "run"), open_run(tmp_path / "run", QUIET)):
        assert_refused("made by an earlier development version.*another `out`.*load_edit", opening)
    assert file.read_bytes() == before


def test_a_run_that_lacks_a_table_is_not_read_but_continued(tmp_path):
    with open_store(tmp_path / "run") as store:
        store.add([make_record()], 1.0)
    with sqlite3.connect(tmp_path / "run" / "trials.sqlite") as connection:
        connection.execute("DROP TABLE parts")
    connection.close()
    assert_refused("not all of its tables yet.*run the audit", read_run(tmp_path / "run"))
    with open_run(tmp_path / "run", QUIET) as store:
        assert len(store.records()) == 1 and store.parts() == {}


def test_the_manifest_and_resuming(tmp_path):
    moved = replace(QUIET, loading=LoadingConfig(device="cpu"))
    with open_store(tmp_path) as store:
        assert store.manifest is None
        store.write_manifest(make_manifest())
        store.add([make_record()], 1.0)
        assert store.edits.is_dir() and store.cache.is_dir()
    with open_run(tmp_path, moved) as store:  # another device is the same run
        assert store.manifest == make_manifest()
        store.write_manifest(make_manifest(device="cpu"))
        assert len(store.records()) == 1
    with read_run(tmp_path) as store:
        assert store.config == moved
        assert store.manifest == make_manifest(device="cpu")


def test_a_run_with_a_former_primer_is_read_but_not_resumed(begun):
    text = (begun / "config.yaml").read_text().replace("primer: auto", "primer: default")
    (begun / "config.yaml").write_text(text)
    with read_run(begun) as store:
        assert store.config.prompt.primer == "default" and len(store.records()) == 1
    assert_refused(r"does not load .*'default'.*expected auto .* or truthful", open_run(begun, QUIET))
    assert (begun / "config.yaml").read_text() == text


def test_adding_is_all_or_none(tmp_path):
    good = [make_record(k) for k in range(3)]
    short = make_record(9, questions={"test": {"mc1": (0.5,)}})
    unknown = make_record(9, questions={"train": {"mc1": (0.5, 0.5)}})
    broken = make_record(9, status=None)
    with open_store(tmp_path) as store:
        store.add(good[:1], 1.0)
        for last, error in ((short, ValueError), (unknown, KeyError), (broken, sqlite3.IntegrityError)):
            with pytest.raises(error):
                store.add([*good[1:], last], 1.0)
            assert store.done() == {good[0].spec.trial_id}
            for table in ("fits", "places", "scores"):
                ids = {row[0] for row in store._connection.execute(f"SELECT fit FROM {table}")}
                assert ids == {good[0].spec.trial_id}
        store.add(good[1:], 1.0)
        assert len(store.done()) == 3


def test_what_is_measured_anew_is_added_to_a_fit(tmp_path):
    """A run can grow in questions and places; what is there stays as it is, to the last digit."""
    first, metric = make_record(), {"mc1": (0.25,)}
    with open_store(tmp_path) as store:
        store.add([first], 1.0)
        store.add([replace(first, spec=replace(first.spec, arm="claim", control=-1, null=""))], 0.5)  # the same edit
        assert [r.spec.arm for r in store.records()] == ["claim", "control"]
        assert [r.questions for r in store.records()] == [first.questions] * 2
        assert store.seconds() == {first.spec.trial_id: 1.5}
        more = HeldOutQuestion("q3", "More?", ("No.",), ("Yes.",), "key of q3")
        store.set_questions({**SPLITS, "test": [*SPLITS["test"], more]})
        assert store.records() == [] and store.done() == set()  # not whole
        (kept,) = store.kept({**KEYS, "test": [*KEYS["test"], more.key]}).values()
        assert kept.record.spec.trial_id == first.spec.trial_id and kept.record.edit == first.edit
        assert kept.scores == {
            f"key of q{i}": {name: values[n] for name, values in first.questions[split].items()}
            for i, (split, n) in enumerate([("val", 0), ("test", 0), ("test", 1)])
        }
        assert not store.kept(KEYS)
        store.set_questions({"test": [more]})
        store.add([replace(first, questions={"test": metric})], 1.0)
        assert [r.questions["test"] for r in store.records()] == [metric] * 2
        store.set_questions(SPLITS)
        assert [r.questions for r in store.records()] == [first.questions] * 2


def test_another_configuration_is_refused_and_the_difference_named(begun):
    words = r"controls: 19 there, 5 here; methods.optimal.epochs: auto there, 3 here\)"
    longer = {**QUIET.methods, "optimal": OptimalSettings(epochs=3)}
    assert_refused(words, open_run(begun, replace(QUIET, controls=5, methods=longer)))
    assert_refused(r"\.\.\.\)", open_run(begun, CHANGED))
    assert load_config(begun / "config.yaml") == QUIET


def test_what_a_run_can_grow_in():
    base = AuditConfig(split=SplitConfig(max_val=3), evaluation=EvaluationConfig(max_new_tokens=0))

    def refused(old: AuditConfig, new: dict):
        return old.refuses(parse_config(yaml.safe_dump(new), old))

    assert refused(base, {"nulls": ["anywhere"]}) == ["nulls"]
    nulls = {"nulls": ["layers", "norm", "anywhere"]}
    for more in ({"controls": 59}, nulls, {"split": {"max_val": 4}}, {"split": {"max_val": None}}, {"score": "mc1"}):
        assert refused(base, more) == []
    answering = parse_config("evaluation: {max_new_tokens: 30}", base)
    assert base.refuses(answering) == []
    assert answering.refuses(base) == ["evaluation.max_new_tokens"]
    assert refused(answering, {"evaluation": {"max_new_tokens": 31}}) == ["evaluation.max_new_tokens"]
    assert refused(base, {"controls": 18, "split": {"max_val": 2, "max_test": 4}}) == [
        "controls",
        "split.max_val",
        "split.max_test",  # all there are, so far
    ]
    gone = {name for name, _ in leaves(to_dict(base)) if name.startswith("methods.optimal.")}
    assert set(refused(base, {"seed": 1, "controls": 20, "methods": ["iti"]})) == {"seed", "methods", *gone}


def test_answers_are_part_of_a_trial_where_the_settings_want_them(tmp_path):
    record = make_record()
    with open_store(tmp_path) as store:
        store.add([record], 1.0)
        assert store.records() == [record]
    answers = {"val": ("No.",), "test": ("Yes.", "")}
    spoken, samples = replace(record, answers=answers), {"val": (("Oh.",),), "test": (("Ah.", "No."),)}
    for n, found in enumerate((spoken, replace(spoken, samples=samples))):
        with open_run(tmp_path, replace(QUIET, evaluation=EvaluationConfig(max_new_tokens=5, samples=n))) as store:
            assert store.records() == [] and list(store.kept(KEYS)) == [record.spec.trial_id]
            store.add([found], 1.0)
            assert store.records() == [found] and not store.kept(KEYS)
    with open_run(tmp_path, replace(QUIET, evaluation=EvaluationConfig(max_new_tokens=5, samples=3))) as store:
        assert store.records() == [found], "only the chosen trial gets further samples"
        more = replace(found, samples={**samples, "test": (*samples["test"], ("", "Yes."))})
        store.add([more], 1.0)
        assert store.records() == [more]
    assert load_config(tmp_path / "config.yaml") == QUIET  # it follows with the manifest


def test_an_edit_that_diverges_later_keeps_no_scores(tmp_path):
    record = make_record(answers={"val": ("No.",), "test": ("Yes.", "")})
    gone = make_record(status="diverged", message="not finite", questions={}, drift={}, edit="")
    with open_store(tmp_path) as store:
        store.add([record], 1.0)
        store.add([gone], 1.0)
        assert list(map(ordered, store.records())) == [ordered(gone)]


def test_a_folder_without_records_takes_a_new_configuration(tmp_path):
    other = replace(DEFAULT, controls=5)
    for config in (DEFAULT, other):
        with open_run(tmp_path, config) as store:
            assert store.config == config
    assert load_config(tmp_path / "config.yaml") == other


@pytest.mark.parametrize("content", [b"no_such: 1", b"a: [", b"\xff\xfe\x00"])
def test_a_damaged_configuration_is_refused(begun, content):
    (begun / "config.yaml").write_bytes(content)
    assert_refused("does not load", open_run(begun, DEFAULT))
    with pytest.raises((RunFolderError, ConfigError)), read_run(begun):
        pass
    assert (begun / "config.yaml").read_bytes() == content


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert_refused(r"other files in it \(thesis.tex\)", open_run(tmp_path, DEFAULT))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    assert_refused("not a run folder", read_run(tmp_path))
    assert_refused("cannot be made", open_run(tmp_path / "thesis.tex", DEFAULT))
    assert_refused("not a run folder", read_run(tmp_path / "nowhere"))


@pytest.mark.skipif(
    os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    try:
        assert_refused("write permission", open_run(tmp_path, DEFAULT))
        assert_refused("cannot be made", open_run(tmp_path / "run", DEFAULT))
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
        with open_store(folder) as store:
            store.add([make_record()], 1.0)


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
        assert_refused("another process", open_run(tmp_path, DEFAULT))
        store.write_manifest(make_manifest())
        with read_run(tmp_path) as reader:  # reading is allowed meanwhile
            assert reader.manifest == make_manifest()
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(tmp_path / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == "open\n"
        assert_refused("another process", open_run(tmp_path, DEFAULT))
        process.kill()
    with open_run(tmp_path, DEFAULT):  # a killed writer holds nothing
        pass


@pytest.mark.parametrize("damage", ["garbage", "header", "cut", "hole"])
def test_a_damaged_database_is_refused(tmp_path, damage):
    with open_store(tmp_path) as store:
        store.add([make_record(k) for k in range(100)], 1.0)
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
    assert_refused("trials.sqlite", open_run(tmp_path, DEFAULT))
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
    with open_store(tmp_path / "run") as store:
        store.add([make_record()], 1.0)
        monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=2**20))
        with pytest.raises(RunFolderError, match=r"1 MiB free.*at least 64 MiB.*finished trials are kept"):
            store.add([make_record(1)], 1.0)
        assert len(store.done()) == 1
    assert_refused("1 MiB free", open_run(tmp_path / "other", DEFAULT))
    with read_run(tmp_path / "run") as store:  # reading needs no room
        assert len(store.records()) == 1


def test_a_disk_that_fills_while_writing_keeps_what_was_there(tmp_path):
    with open_store(tmp_path) as store:
        store.add([make_record()], 1.0)
        (pages,) = store._connection.execute("PRAGMA page_count").fetchone()
        store._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(RunFolderError, match="MiB free"):
            store.add([make_record(k) for k in range(1, 200)], 1.0)
        assert len(store.done()) == 1
        store._connection.execute("PRAGMA max_page_count = 100000")
        store.add([make_record(k) for k in range(1, 200)], 1.0)
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


def test_the_schema_is_the_one_in_the_docs():
    page = (Path(__file__).parents[1] / "docs" / "run-folder.md").read_text(encoding="utf-8").split("## Tables of")[1]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    connection = sqlite3.connect(":memory:")
    connection.executescript(SCHEMA)
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    real = [
        (table, column[1], column[5] > 0)
        for table in tables
        for column in connection.execute(f"PRAGMA table_info({table})")
    ]
    connection.close()
    assert [(table, column, key == "yes") for table, column, key, _ in lines[2:]] == real
    assert all(words for *_, words in lines)


OLD_CLAIM = "claim: '0.1,1.2'\niti: {alphas: [2.0]}\noptimal: {reader: none}\njudges: {target: {kind: none}}\n"


def test_settings_of_the_first_version_are_refused_with_their_present_names(tmp_path):
    for text, new in (
        ("iti: {alphas: [2.0]}", "the unknown setting iti in FILE; expected methods.iti"),
        ("optimal: {reader: none}", "the unknown setting optimal in FILE; expected the method constant"),
        ("judges: {target: {kind: none}}", "the unknown setting judges.target in FILE; expected judges.truth"),
    ):
        (tmp_path / "claim.yaml").write_text(f"claim: '0.1,1.2'\n{text}\n")
        with pytest.raises(ConfigError) as raised:
            read_registration(tmp_path / "claim.yaml")
        assert new.replace("FILE", str(tmp_path / "claim.yaml")) in str(raised.value)
    assert parse_over(PaperConfig(), "iti: {alphas: [2.0]}", "a study").iti.alphas == (2.0,), "a study has it still"


def test_a_folder_of_the_first_version_is_refused_and_left_as_it_is(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(OLD_CLAIM)
    with sqlite3.connect(folder / "trials.sqlite") as connection:
        connection.execute("CREATE TABLE trials (trial_id TEXT PRIMARY KEY, record TEXT)")
    connection.close()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for opening in (read_run(folder), open_run(folder, DEFAULT)):
        assert_refused("made by locaudit 0.1.0.*another `out`.*load_edit", opening)
    with pytest.raises(RunFolderError, match="made by locaudit 0.1.0"):
        has_trials(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"} == before
