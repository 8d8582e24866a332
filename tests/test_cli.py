from __future__ import annotations

import ast
import itertools
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import tyro

from locaudit import cli
from locaudit.behaviours import load_behaviour
from locaudit.cli.flags import SHORT, parse, take_config
from locaudit.config import AuditConfig, leaves, load_config, load_preset, merge_config, to_dict, to_yaml
from locaudit.errors import ConfigError, RunFolderError
from locaudit.judges import Aspect
from locaudit.registry import ARCHITECTURES, ASPECTS, JUDGES, METHODS
from locaudit.run import worker
from locaudit.run.audit import run_audit
from locaudit.run.subject import split_behaviour
from locaudit.store.folder import read_run
from locaudit.studies.paper.config import PaperConfig
from runs import forked, save_behaviour, small_config
from tiny import make_lm, tokenizer


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("inputs")


@pytest.fixture(scope="module")
def small_yaml(home) -> Path:
    path = home / "small.yaml"
    path.write_text(to_yaml(small_config(home)))
    return path


def fails(capsys, *arguments: str) -> str:
    """The one line that a command with bad input prints; its exit code is 2."""
    assert cli.main(list(arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    line = lines[-1]
    assert line.startswith("locaudit: ")
    assert "got " in line and "expected " in line
    assert not any("Traceback" in text for text in lines)
    return line


def test_audit_then_report(small_yaml, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["audit", str(small_yaml), "--controls", "1", "--out", str(out)]) == 0
    printed, noted = capsys.readouterr()
    assert 'too few for the answer "no", which takes 100: use a behaviour with at least 200 questions' in noted
    verdict = json.loads((out / "verdict.json").read_text())
    assert printed.strip().startswith(verdict["subject"]) and f"\n{verdict['headline']}\n" in printed
    assert str(out / "report.html") in printed
    for name in ("config.yaml", "trials.sqlite", "report.html"):
        assert (out / name).stat().st_size > 0
    for form in ("png", "svg"):
        assert cli.main(["figures", str(out), "--format", form, "--width", "double"]) == 0
        assert str(out / "figures" / f"null.{form}") in capsys.readouterr().out
        assert (out / "figures" / f"null.{form}").stat().st_size > 0
    (out / "report.html").unlink()
    assert cli.main(["report", str(out)]) == 0
    assert (out / "report.html").is_file()


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_audit_says_so_and_goes_on(sent, code, small_yaml, tmp_path, capsys, monkeypatch):
    before = signal.signal(sent, signal.default_int_handler)
    try:
        command, out = ["audit", str(small_yaml), "--controls", "1"], tmp_path / "run"
        real, calls = worker.run_trials, []

        def stopped(*args, **options):
            calls.append(args)
            if len(calls) == 3:
                os.kill(os.getpid(), sent)
            return real(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(worker, "run_trials", stopped)
            assert cli.main([*command, "--out", str(out)]) == code
        assert signal.getsignal(sent) is signal.default_int_handler
        assert "locaudit: interrupted; repeat the command to continue" in capsys.readouterr().err
        with read_run(out) as store:
            kept = store.records()
        assert len(kept) == 2 and not (out / "report.html").exists()
        assert cli.main([*command, "--out", str(out)]) == 0
        with read_run(out) as store:
            assert all(record in store.records() for record in kept)
    finally:
        signal.signal(sent, before)


def test_no_other_library_speaks(small_yaml, tmp_path):
    """In a process of its own, where libraries are imported as a user's are: no warning, advice or progress bar."""
    command = [sys.executable, "-m", "locaudit", "audit", str(small_yaml), "--controls", "1", "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not re.search(r"note:|warn|deprecat|it/s|%\|", done.stderr, re.IGNORECASE), done.stderr


def test_flags_go_over_the_file_and_the_file_over_the_defaults(small_yaml, tmp_path):
    out = tmp_path / "run"
    flags = ["--controls", "1", "--methods", "iti", "--claim", "0.1,1.2", "--iti.alphas", "1", "3", "--out", str(out)]
    assert cli.main(["audit", str(small_yaml), *flags]) == 0
    with read_run(out) as store:
        config = store.config
    assert (config.controls, list(config.methods), config.claim) == (1, ["iti"], "0.1,1.2")
    assert config.methods["iti"].alphas == (1.0, 3.0)
    assert config.prompt.primer == "none"
    assert config.level == AuditConfig.level


def test_find_prints_a_claim_that_audit_takes(small_yaml, tmp_path, capsys):
    assert cli.main(["find", str(small_yaml), "--top", "2"]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    claim = last.removeprefix("--claim ").strip('"')
    flags = ["--claim", claim, "--controls", "1", "--methods", "iti", "--out", str(tmp_path / "run")]
    assert cli.main(["audit", str(small_yaml), *flags]) == 0


@pytest.mark.parametrize("command", ["demo", "audit", "find", "heuristics", "report"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"locaudit {command}" in capsys.readouterr().out


SOON = [
    (["--help"], 0),
    (["audit", "--help"], 0),
    (["audit", "--no-such-flag"], 2),
    (["audit", "--controls", "many"], 2),
    (["audit", "--controls", "0"], 2),
    (["audit", "--methods", "best"], 2),
    (["audit", "--claim", "99.0"], 2),
    (["audit", "--claim", "neuron:29.1536"], 2),
    (["audit", "--claim", "attention:30"], 2),
    (["audit", "nothing.yaml"], 2),
    (["audit", "--behaviour", "nothing.csv"], 2),
    (["audit", "--behaviour", __file__], 2),
    (["audit", "--prompt.primer", "nothing.txt"], 2),
    (["audit", "--evaluation.drift-text", "nothing.txt"], 2),
    (["audit", "--score", "truth", "--judges.truth.kind", "none"], 2),
    (["audit", "--model", "smollm-135m"], 2),
    (["audit", "--model", "./nothing"], 2),
    (["audit", "--model", "org/nothing"], 2),
    (["audit", "--out", __file__], 2),
    (["audit", "--out", str(Path(__file__).parent)], 2),
    (["demo", "--claim", "0.9"], 2),
    (["demo", "--positive", "--claim", "0.9"], 2),
    (["find", "--behaviour", "nothing.csv"], 2),
    (["find", "--by", "gradients"], 2),
    (["find", "--kind", "layer"], 2),
    (["heuristics", "--behaviour", "nothing.csv"], 2),
    (["heuristics", "--rules", "probe"], 2),
    (["heuristics", "--kind", "layer"], 2),
    (["paper", "--data", "nothing.csv"], 2),
    (["paper", "--model", "./nothing"], 2),
    (["audit", "--repeats", "1001"], 2),
    (["audit", "--repeats", "-3"], 2),
    (["audit", "--repeats", "3", "--stopping", "curtailed"], 2),
    (["audit", "--repeats", "3", "--out", __file__], 2),
    (["audit", "--device", "cdua"], 2),
    (["audit", "--device", "cuda:x"], 2),
    (["audit", "--device", ""], 2),
    (["audit", "--device-map", "cdua"], 2),
    (["audit", "--executor", "rya"], 2),
    (["audit", "--workers", "0"], 2),
    (["audit", "--workers", "2", "--device-map", "auto"], 2),
    (["audit", "--workers", "2", "--device", "cuda:1"], 2),
    (["audit", "--executor", "ray", "--ray.address", "nowhere"], 2),
    (["status", "nowhere"], 2),
    (["audit", "--methods.optimal.objective", "ipa"], 2),
    (["audit", "--methods", "given"], 2),
    (["audit", "--methods", "given", "--methods.given.file", "nothing.safetensors"], 2),
    (["audit", "--judge", "openai"], 2),
    (["audit", "--judge", "openai", "--judge.model", "m", "--judge.base-url", "localhost:8000"], 2),
    (["audit", "--judge", "openai", "--judge.model", "m", "--judge.prompt", "nothing.txt"], 2),
    (["audit", "--judge", "causal-lm"], 2),
    (["audit", "--judge", "causal-lm", "--judge.model", "./nothing"], 2),
    (["audit", "--judge", "reference", "--judge.model", "./nothing"], 2),
    (["audit", "--top-k", "270"], 2),
    (["audit", "--nulls", "layers", "--claim", "mlp:1", "--disjoint"], 2),
    (["find", "--top", "0"], 2),
    (["report", "nowhere"], 2),
    (["export", "nowhere", "--out", "x"], 2),
    (["judge", "validate", "--truth", "nothing.jsonl"], 2),
    (["judge", "validate", "--truth", __file__], 2),
    (["judge", "validate", "--truth", __file__, "--kind", "openai"], 2),
    (["judge", "compare", "nowhere"], 2),
    (["calibrate", "null", "--level", "5"], 2),
    (["calibrate", "null", "--seed", "-1"], 2),
    (["calibrate", "run", "nowhere"], 2),
    (["calibrate", "planted", "--out", "x", "--family", "99"], 2),
    (["calibrate", "planted", "--out", "x", "--controls", "48"], 2),
    (["calibrate", "planted", "--out", "x", "--level", "1"], 2),
    (["calibrate", "coverage", "--sets", "0"], 2),
    (["paper", "--device", "cdua"], 2),
    (["paper", "--judge", "openai"], 2),
    (["paper", "--out", __file__], 2),
    (["demo", "--repeats", "1001"], 2),
]
"""Command lines and their exit code."""


@pytest.fixture(scope="module")
def soon(tmp_path_factory) -> list[tuple[int, bool, str]]:
    """Exit code, whether torch is there, and stderr, after each of `SOON`, in a process of their own."""
    code = f"""
import contextlib, io, json, sys, locaudit.cli, locaudit.report
found = []
for arguments in {[arguments for arguments, _ in SOON]}:
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
        try:
            status = locaudit.cli.main(arguments)
        except SystemExit as stop:
            status = stop.code
    found.append((status, "torch" in sys.modules, errors.getvalue()))
print(json.dumps(found))
"""
    home = str(tmp_path_factory.mktemp("hub"))
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": home}  # nothing listens there
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=home, check=True)
    assert not done.stderr, "another library has written past sys.stderr"
    return json.loads(done.stdout)


@pytest.mark.parametrize(("number", "status"), [(n, status) for n, (_, status) in enumerate(SOON)], ids=str)
def test_help_and_what_is_refused_never_wait_for_torch(number, status, soon):
    found, has_torch, errors = soon[number]
    assert (found, has_torch) == (status, False), f"{SOON[number][0]}: {errors}"
    if "got " in errors:  # one line, none of another library
        assert errors.startswith("locaudit: got ") and errors.count("\n") == 1


def help_of(capsys, *arguments: str) -> str:
    """All flags of a command."""
    has_settings = arguments[0] in ("demo", "audit", "find", "heuristics", "paper")
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--help-all" if has_settings else "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_lines_of_help_end_where_sentences_do():
    """Help keeps the line breaks of a field's docstring."""
    root = Path(cli.__file__).parents[1]
    files = [
        root / x for x in ("config/settings.py", "methods/settings.py", "judges/settings.py", "studies/paper/config.py")
    ]
    for file in [*files, *(root / "cli").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            for field, text in itertools.pairwise(node.body) if isinstance(node, ast.ClassDef) else ():
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    words = ast.literal_eval(text.value)
                    assert all(line.rstrip().endswith((".", ":", ")")) for line in words.split("\n")), words


def test_help_shows_the_flags_of_what_is_chosen_and_names_the_rest(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    default = help_of(capsys, "audit")
    for name in (*METHODS, *JUDGES):
        assert name in default
    assert "--methods.iti.alphas" in default and "Strengths alpha to try" in default
    assert "--methods.constant.strengths" not in default and "--judges.truth.base-url" not in default
    other = help_of(capsys, "audit", "--methods", "constant", "--judges.truth.kind", "openai")
    assert "--methods.constant.strengths" in other and "--methods.iti.alphas" not in other
    assert "--judges.truth.base-url" in other and "Address of the server" in other
    assert "--judges.info.base-url" not in other
    assert "--second.base-url" in help_of(capsys, "judge", "compare", "--second.kind=openai")


def test_init_writes_settings_that_audit_reads_and_overwrites_nothing(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    assert cli.main(["init", str(file)]) == 0 and "locaudit audit" in capsys.readouterr().out
    config = load_config(file)
    assert (config.claim, config.controls, config.split.max_test) == ("14.3, 15.7", 19, 100)
    assert file.read_text().count("#") >= 20
    assert "which exists" in fails(capsys, "init", str(file))


def test_doctor_names_what_is_here_and_tests_a_model(small_yaml, capsys):
    config = load_config(small_yaml)
    assert cli.main(["doctor", "--model", config.model, "--behaviour", config.behaviour]) == 0
    said = capsys.readouterr().out
    for name in ("versions", "Python", "CPU", "disk", "smollm2-135m", "optimal", "reference", "[ray]"):
        assert name in said
    assert "passed in" in said and "nats a token" in said
    assert cli.main(["doctor", "--model", "nowhere.gguf"]) == 2
    assert "failed: got nowhere.gguf" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["demo", "audit", "paper"])
def test_help_shows_the_common_flags_and_how_to_see_the_others(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    page = capsys.readouterr().out
    assert stop.value.code == 0 and "--help-all" in page and len(page.splitlines()) < 100
    flags = set(FLAG.findall(page))
    of_audit = {"--behaviour", "--claim", "--methods", "--controls", "--workers"}
    own = {"--data", "--random-sets", "--preset"} if command == "paper" else of_audit
    assert own | {"--model", "--score", "--out", "--dry-run", "--dtype", "--device", "--max-test"} <= flags
    assert len(flags) < 30 and "--split.seed" not in page
    assert "--split.seed" in help_of(capsys, command)


def parsed(*arguments: str) -> AuditConfig:
    config, rest = take_config(AuditConfig(), arguments)
    return parse(Holder(config), "locaudit", "", rest).config


@dataclass(frozen=True)
class Holder:
    config: Annotated[AuditConfig, tyro.conf.arg(name="")]


def test_flags_over_a_file(tmp_path):
    path = tmp_path / "audit.yaml"
    path.write_text(
        "methods: {optimal: {epochs: 3, strengths: [0.2]}}\n"
        "judges: {truth: {kind: openai, model: m, concurrency: 2}, info: {kind: none}}\n"
    )
    config = parsed(str(path), "--judges.truth.timeout", "3", "--methods.optimal.epochs", "4")
    assert config == merge_config(
        load_config(path), {"methods": {"optimal": {"epochs": 4}}, "judges": {"truth": {"timeout": 3}}}
    )
    assert parsed(str(path)) == load_config(path)
    config = parsed(str(path), "--methods", "optimal", "iti", "--judges.truth.kind", "reference")
    assert list(config.methods) == ["optimal", "iti"] and config.methods["optimal"].epochs == 3
    assert config.judges["truth"].kind == "reference" and config.judges["info"].kind == "none"
    assert parsed() == AuditConfig()
    assert parsed("--judges.truth.kind", "none", "--judges.truth.kind=default") == AuditConfig()


def test_flags_of_the_first_edition(capsys):
    assert parsed("--iti.alphas", "1", "2", "--optimal.max-questions=9") == AuditConfig(
        methods={"iti": {"alphas": [1, 2]}, "optimal": {"max_questions": 9}}
    )
    assert "--optimal.reader none; expected the method constant" in fails(capsys, "audit", "--optimal.reader", "none")
    assert "the method constant" in fails(capsys, "audit", "--methods.optimal.reader=none")
    line = fails(capsys, "audit", "--judges.target.kind", "none")
    assert "--judges.target.kind none; expected judges.truth.kind" in line


def test_wrong_names_on_the_command_line(capsys):
    assert "the method 'optimul'" in fails(capsys, "audit", "--methods", "optimul")
    assert "did you mean 'openai'" in fails(capsys, "audit", "--judges.truth.kind", "opnai")
    assert "methods.iti.alphas = [1.0, 1.0] in the flags" in fails(capsys, "audit", "--iti.alphas", "1", "1")
    assert "probe.top_k = 0 in the flags" in fails(capsys, "audit", "--probe.top-k", "0")
    assert "nowhere, which cannot be imported" in fails(capsys, "audit", "--plugins", "nowhere")


def test_wrong_flags_are_one_line_with_the_flag_that_was_meant(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    line = fails(capsys, "audit", "--controlls", "4", "--dry-rum")
    assert "--controlls, 4, --dry-rum" in line and "did you mean --controls or --dry-run?" in line
    assert "see locaudit audit --help" in fails(capsys, "audit", "--controls")
    assert "invalid literal for int" in fails(capsys, "audit", "--controls", "many")
    assert "Expected one of ('full', 'decide', 'smoke')" in fails(capsys, "paper", "--preset", "best")
    assert "Missing from locaudit export: --out PATH" in fails(capsys, "export", "runs")
    assert "did you mean --audits?" in fails(capsys, "calibrate", "null", "--audit", "3")
    assert "did you mean --truth?" in fails(capsys, "judge", "validate", "--trut", "x")


def test_an_unknown_setting_is_named_with_the_one_that_was_meant(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("controlls: 3")
    line = fails(capsys, "audit", str(file))
    assert "expected a known one; did you mean controls? For all names, see the command's --help-all" in line
    file.write_text("split: {max_tests: 3}")
    assert "expected one of fractions, seed, max_train" in fails(capsys, "audit", str(file))


def test_a_plug_in_brings_its_flags(tmp_path, capsys, monkeypatch):
    plugin = tmp_path / "brings_flags.py"
    plugin.write_text(
        "from dataclasses import dataclass\nfrom locaudit.methods import Method\n"
        "from locaudit.registry import METHODS\n"
        '@dataclass(frozen=True)\nclass Settings:\n    name: str\n    size: int = 3\n    """How large it is."""\n'
        "if 'sized' not in METHODS:\n    METHODS.register('sized')(Method('Sized', Settings, 'a:b'))\n"
    )
    monkeypatch.setenv("COLUMNS", "200")
    with METHODS.temporary("unused", None):  # what is registered inside is gone after
        flags = ("--plugins", str(plugin), "--methods", "sized")
        config = parsed(*flags, "--methods.sized.size", "5", "--methods.sized.name", "a")
        assert (config.methods["sized"].name, config.methods["sized"].size) == ("a", 5) and config.plugins == (
            str(plugin),
        )
        page = help_of(capsys, "audit", *flags)
        assert "--methods.sized.size" in page and "How large it is." in page
        path = tmp_path / "audit.yaml"
        path.write_text("methods: {sized: {name: b, size: 6}}")  # whose plug-in is named on the command line
        assert parsed(str(path), *flags).methods["sized"].size == 6
    assert "sized" not in METHODS


def test_the_changelog_begins_with_this_version():
    root = Path(__file__).parents[1]
    version = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    headings = re.findall(r"^## (\S+)", (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == version == "0.2.0" and "0.1.0" in headings[1:]


def test_demo_is_the_demo_of_the_docs(capsys):
    config = load_preset("demo")
    assert (config.model, config.behaviour, config.probe.top_k) == ("smollm2-135m", "sentiment", 16)
    assert config.claim is None and config.whole_model and config.widen == 0 and not config.rest
    assert tuple(config.methods) == ("iti", "optimal")
    shown = " ".join(help_of(capsys, "demo").split())
    assert "[--positive]" in shown and "found on training prompts only" in shown


@pytest.mark.parametrize("name, least", [("demo", 100), ("positive", 32)])
def test_demos_have_enough_controls_of_both_nulls_and_test_prompts(name, least):
    config = load_preset(name)
    assert (config.controls, config.nulls, config.score) == (19, ("anywhere", "layers"), "ipo_score")
    split = split_behaviour(config, load_behaviour(config.behaviour))
    assert len(split.test) == config.split.max_test >= least
    assert all(len(question.answers) == 2 for question in split.test)
    assert not {q.group for q in split.test} & {q.group for q in split.train}


@pytest.mark.real
def test_heads_of_the_positive_demo_beat_random_heads_on_held_out_prompts(tmp_path):
    # float32: in bfloat16, every processor trains other edits
    changes = {"controls": 2, "split": {"max_test": 12}, "loading": {"dtype": "float32"}}
    config = merge_config(load_preset("positive"), changes)
    run_audit(config, tmp_path / "run", progress=False)
    with read_run(tmp_path / "run") as store:
        margins = {r.spec.arm: [] for r in store.records()}
        for record in store.records():
            margins[record.spec.arm].append(record.metrics["test"]["reward_margin"])
    assert len(margins["control"]) == 4 and margins["claim"][0] > 1.5 * max(margins["control"]) > 0


def test_bad_commands_and_settings(capsys, tmp_path, small_yaml):
    out = ["--out", str(tmp_path / "run")]
    assert "one of demo, behaviour, init, audit, status, design, paper" in fails(capsys, "edit")
    assert "which is not a file" in fails(capsys, "audit", str(tmp_path / "none.yaml"))
    (tmp_path / "bad.yaml").write_text("controlls: 3")
    assert "controlls" in fails(capsys, "audit", str(tmp_path / "bad.yaml"))
    assert "controls = 0" in fails(capsys, "audit", str(small_yaml), "--controls", "0")
    assert "not a run folder" in fails(capsys, "report", str(tmp_path))
    assert "got head 9.9" in fails(capsys, "audit", str(small_yaml), "--claim", "9.9", *out)
    assert "the unit 'x'" in fails(capsys, "audit", str(small_yaml), "--claim", "x", *out)
    every = ",".join(f"{layer}.{head}" for layer in range(2) for head in range(4))
    assert "leaves no room for a control" in fails(capsys, "audit", str(small_yaml), "--claim", every, *out)


def test_bad_data(capsys, tmp_path, small_yaml):
    out = ["--out", str(tmp_path / "run")]
    bad = tmp_path / "bad.jsonl"
    for text, part in {
        '{"question": "Q?", "true": ["a"]}': "false",
        '{"question": "Q?", "true": ["a"], "false": []}': "without a false answer",
        "not json": "line 1",
        "": "empty",
    }.items():
        bad.write_text(text)
        assert part in fails(capsys, "audit", str(small_yaml), "--behaviour", str(bad), *out)
    rows = save_behaviour(tmp_path / "x.jsonl").read_text().splitlines()
    first = json.loads(rows[0]) | {"id": "again", "split": "test"}
    fixed = [json.loads(row) | {"split": "train"} for row in rows]
    bad.write_text("\n".join(json.dumps(row) for row in [*fixed, first]))
    assert "both in training and in test" in fails(capsys, "audit", str(small_yaml), "--behaviour", str(bad), *out)
    assert not (tmp_path / "run").exists(), "bad data must be refused before anything is written"


def test_bad_models(capsys, tmp_path, small_yaml, monkeypatch):
    out = ["--out", str(tmp_path / "run")]
    assert "does not exist" in fails(capsys, "audit", str(small_yaml), "--model", str(tmp_path / "none"), *out)
    model = tmp_path / "bert"
    lm = make_lm("llama")
    lm.save_pretrained(model)
    tokenizer().save_pretrained(model)
    monkeypatch.delitem(ARCHITECTURES._things, "llama")
    out = ["--out", str(tmp_path / "run2")]
    error = fails(capsys, "audit", str(small_yaml), "--model", str(model), *out)
    assert "has the list model.layers, whose modules have self_attn.q_proj" in error
    assert "--architecture.layers" in error and "architecture: {layers: model.layers," in error
    wrong = ["--architecture.layers", "model.layers"]
    assert "architecture with layers only" in fails(capsys, "audit", str(small_yaml), *wrong, *out)


def test_errors_name_flags_on_the_command_line_and_keywords_in_python(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert "choose another --out" in fails(capsys, "audit", "--out", str(tmp_path))
    with pytest.raises(RunFolderError, match="choose another `out`$"):
        run_audit(AuditConfig(), tmp_path, progress=False)
    error = ConfigError(got="--judge.api-key-env x", expected="e", remedy="run: pip install --no-deps y")
    assert str(error) == "got `judge.api_key_env` x; expected e; run: pip install --no-deps y"
    assert str(pickle.loads(pickle.dumps(error))) == str(error) and error.line.startswith("got --judge.api-key-env")


def test_another_configuration_is_refused_and_nothing_lost(capsys, tmp_path, small_yaml):
    out = ["--out", str(tmp_path / "run")]
    assert cli.main(["audit", str(small_yaml), "--controls", "1", "--methods", "iti", *out]) == 0
    before = (tmp_path / "run" / "trials.sqlite").read_bytes()
    line = fails(capsys, "audit", str(small_yaml), "--controls", "1", "--seed", "2", "--methods", "iti", *out)
    assert "seed: 0 there, 2 here" in line
    assert (tmp_path / "run" / "trials.sqlite").read_bytes() == before


def test_a_full_disk_is_one_line(capsys, tmp_path, small_yaml, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "MiB free" in fails(capsys, "audit", str(small_yaml), "--out", str(tmp_path / "run"))


def test_coverage_of_intervals(capsys, tmp_path):
    assert cli.main(["calibrate", "coverage", "--sets", "1", "--out", str(tmp_path / "coverage.json")]) == 0
    assert "lead over random places, at 9 x 100, 19 x 20, 19 x 100, 19 x 400, 39 x 100" in capsys.readouterr().out
    cells = json.loads((tmp_path / "coverage.json").read_text())["coverage"]
    assert cells[0]["paired_gain_p"] in ("0 of 1", "1 of 1")
    assert {cell["part"] for cell in cells} >= {"difference of products", "other intervals", "mean of one arm"}


def test_calibration_of_the_null_and_of_a_run(capsys, tmp_path, small_yaml):
    numbers = tmp_path / "out" / "null.json"
    settings = ["--audits", "20", "--questions", "10", "--out", str(numbers)]
    assert cli.main(["calibrate", "null", *settings]) == 0
    assert "curtailed" in capsys.readouterr().out
    written = json.loads(numbers.read_text())
    assert len(written["null"]) == 11
    assert written["null"][0]["false"]["n_trials"] == 20
    folder = ["--out", str(tmp_path / "run")]
    assert cli.main(["audit", str(small_yaml), "--controls", "6", "--methods", "optimal", *folder]) == 0
    capsys.readouterr()
    assert cli.main(["calibrate", "run", str(tmp_path / "run"), "--controls", "4", "--level", "0.3"]) == 0
    assert "each of 6 places was the claim in turn, against 4 of the others" in capsys.readouterr().out
    assert "6 controls and --controls 19" in fails(capsys, "calibrate", "run", str(tmp_path / "run"))
    few = ("calibrate", "run", str(tmp_path / "run"), "--controls", "4")
    assert "score truth, which" in fails(capsys, *few, "--level", "0.3", "--score", "truth")
    assert "enough controls for the outcome specific to be possible" in fails(capsys, *few)
    assert "not a run folder" in fails(capsys, "calibrate", "run", str(tmp_path))
    assert "--audits 0" in fails(capsys, "calibrate", "null", "--audits", "0")
    assert "locaudit calibrate nul;" in fails(capsys, "calibrate", "nul")
    assert cli.main(["calibrate"]) == 0


def test_short_flags_are_the_settings_they_stand_for(capsys):
    names, of_paper = (dict(leaves(to_dict(config))) for config in (AuditConfig(), PaperConfig()))
    assert set(SHORT) <= set(names)
    shown, shown_paper = help_of(capsys, "audit"), help_of(capsys, "paper")
    for name in SHORT:
        flag = f"--{name.partition('.')[2].replace('_', '-')}"
        assert f" {flag} " in shown, flag
        assert (f" {flag} " in shown_paper) == (name in of_paper), flag
    short = parsed("--dtype", "bfloat16", "--device", "cpu", "--max-new-tokens=7", "--max-test", "9", "--top-k", "3")
    assert short == merge_config(
        AuditConfig(),
        {
            "loading": {"dtype": "bfloat16", "device": "cpu"},
            "evaluation": {"max_new_tokens": 7},
            "split": {"max_test": 9},
            "probe": {"top_k": 3},
        },
    )
    assert parsed("--max-train", "8", "--split.max-train", "9").split.max_train == 9, "the last one counts"
    assert "evaluation.max_new_tokens = -1" in fails(capsys, "audit", "--max-new-tokens", "-1")


def test_one_flag_sets_every_judge(tmp_path, capsys):
    flags = ["--judge", "openai", "--judge.model=m", "--judge.base_url", "http://a/v1", "--judge.price-in", "1.5"]
    both = {"kind": "openai", "model": "m", "base_url": "http://a/v1", "price_in": 1.5}
    assert parsed(*flags) == merge_config(AuditConfig(), {"judges": {"truth": both, "info": both}})
    mixed = parsed("--judges.info.kind", "none", *flags).judges
    assert (mixed["truth"].settings.model, mixed["info"].kind) == ("m", "none")
    path = tmp_path / "audit.yaml"
    path.write_text("judges: {truth: {kind: causal-lm, model: a}, info: {kind: causal-lm, model: b}}")
    config = parsed(str(path), "--judge.prompt", "Really:")
    assert [(config.judges[x].settings.model, config.judges[x].settings.prompt) for x in ("truth", "info")] == [
        ("a", "Really:"),
        ("b", "Really:"),
    ]
    pair = {"question": "Q?", "answer_matching_behavior": "A", "answer_not_matching_behavior": "B"}
    (tmp_path / "ab.json").write_text(json.dumps([pair]))
    line = fails(capsys, "audit", "--behaviour", str(tmp_path / "ab.json"), "--judge", "openai")
    assert "names nothing to judge" in line and "--judges.ASPECT.kind" in line
    with ASPECTS.temporary("polite", Aspect("polite", "Polite:", "?")):
        assert parsed("--judge", "none").judges["polite"].kind == "default", "the behaviour does not ask it"
    page = help_of(capsys, "paper", "--judge", "openai")
    assert "--judge KIND sets the kind for every aspect" in " ".join(page.split()) and "--judges.info.base-url" in page


COMMAND_LINES = (
    "demo", "init", "doctor", "table", "figures", "behaviour check", "audit", "status", "design", "paper", "find",
    "heuristics", "report", "export", "lm-eval", "judge validate", "judge validate --kind causal-lm",
    "judge validate --kind openai", "judge compare --second.kind causal-lm", "calibrate null", "calibrate run",
    "calibrate planted", "calibrate coverage", "audit --methods ablate constant given",
    "audit --judges.truth.kind causal-lm",
    "audit --judges.truth.kind openai --judges.info.kind openai",
)  # fmt: skip
# of pip, git and ray, and those of no command's own
OF_OTHERS = {
    "--control-vector",  # of llama.cpp
    "--no-deps",
    "--force-reinstall",
    "--help",
    "--help-all",
    "--version",
    "--format",
    "--porcelain",
    "--head",
    "--logdir",
}
CSS = {"--ink", "--paper", "--faint", "--control"}  # colours of the report's charts
FLAG = re.compile(r"(?<!var\()(?<![\w-])--[a-z][\w.-]*\w")


def texts_of(file: Path) -> str:
    """Every text in a Python file, docstrings included."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return "\n".join(x.value for x in ast.walk(tree) if isinstance(x, ast.Constant) and isinstance(x.value, str))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_every_flag_that_is_named_exists(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    root = Path(__file__).parents[1]
    known = set(OF_OTHERS) | CSS
    for line in COMMAND_LINES:
        known |= set(FLAG.findall(help_of(capsys, *line.split())))
    of_plugin = (
        "audit",
        "--plugins",
        str(root / "tests" / "extensions" / "plugin.py"),
        "--methods",
        "push",
        "--help-all",
    )
    known |= set(FLAG.findall(forked(*of_plugin)[1]))  # what it registers would stay here
    own = {file: texts_of(file) for file in (root / "src").rglob("*.py")}
    scripts = [*(root / "bench").rglob("*.py"), *(root / "tools").rglob("*.py")]  # flags are texts in argparse
    pages = {file: file.read_text(encoding="utf-8") for file in (root / "README.md", *(root / "docs").glob("*.md"))}
    of_scripts = {flag for file in scripts for flag in FLAG.findall(texts_of(file))}
    for file in scripts:  # tyro's are arguments of functions and fields of classes
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            name = node.arg if isinstance(node, ast.arg) else getattr(getattr(node, "target", None), "id", "")
            of_scripts |= {f"--{name.replace('_', '-')}", f"--no-{name.replace('_', '-')}"}
    of_scripts.add("--model.driver")  # a field of a field, of bench.workers
    for texts, flags in ((own, known), (pages, known | of_scripts)):
        for file, text in texts.items():
            named = FLAG.findall(text.replace("ASPECT", "truth"))
            assert not set(named) - flags, f"{file}: {sorted(set(named) - flags)}"
