from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import tyro

from locaudit import cli
from locaudit.cli.flags import parse, take_config
from locaudit.config import AuditConfig, load_config, load_preset, merge_config, to_yaml
from locaudit.registry import JUDGES, METHODS
from locaudit.store.folder import read_run
from runs import save_behaviour, small_config
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
    printed = capsys.readouterr().out
    verdict = json.loads((out / "verdict.json").read_text())
    assert printed.startswith(verdict["headline"])
    assert str(out / "report.html") in printed
    for name in ("config.yaml", "trials.sqlite", "report.html", "figures/controls.png", "figures/controls.svg"):
        assert (out / name).stat().st_size > 0
    (out / "report.html").unlink()
    assert cli.main(["report", str(out)]) == 0
    assert (out / "report.html").is_file()


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


def test_probe_prints_a_claim_that_audit_takes(small_yaml, tmp_path, capsys):
    assert cli.main(["probe", str(small_yaml), "--top", "2"]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    claim = last.removeprefix("--claim ").strip('"')
    flags = ["--claim", claim, "--controls", "1", "--methods", "iti", "--out", str(tmp_path / "run")]
    assert cli.main(["audit", str(small_yaml), *flags]) == 0


@pytest.mark.parametrize("command", ["demo", "audit", "probe", "report"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"locaudit {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["audit", "--help"], 0),
        (["audit", "--no-such-flag"], 2),
        (["audit", "--controls", "many"], 2),
        (["audit", "--controls", "0"], 2),
        (["audit", "--methods", "best"], 2),
    ],
)
def test_help_and_what_is_refused_never_wait_for_torch(arguments, status):
    code = f"""
import sys, locaudit.cli, locaudit.report
try:
    status = locaudit.cli.main({arguments})
except SystemExit as stop:
    status = stop.code
sys.exit(100 if "torch" in sys.modules else status)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert found.returncode == status, found.stderr.decode()


def help_of(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_shows_the_flags_of_what_is_chosen_and_names_the_rest(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    default = help_of(capsys, "audit")
    for name in (*METHODS, *JUDGES):
        assert name in default
    assert "--methods.iti.alphas" in default and "Strengths tried" in default
    assert "--methods.constant.strengths" not in default and "--judges.truth.base-url" not in default
    other = help_of(capsys, "audit", "--methods", "constant", "--judges.truth.kind", "openai")
    assert "--methods.constant.strengths" in other and "--methods.iti.alphas" not in other
    assert "--judges.truth.base-url" in other and "Address of the server" in other
    assert "--judges.info.base-url" not in other
    assert "--second.base-url" in help_of(capsys, "judge", "compare", "--second.kind=openai")


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
    assert "methods.iti.alphas = [1.0, 1.0] in the command line" in fails(capsys, "audit", "--iti.alphas", "1", "1")
    assert "probe.top_k = 0 in the command line" in fails(capsys, "audit", "--probe.top-k", "0")
    assert "nowhere, which cannot be imported" in fails(capsys, "audit", "--plugins", "nowhere")


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


def test_demo_is_the_demo_of_the_readme():
    config = load_preset("demo")
    assert (config.model, config.behaviour, config.probe.top_k, config.controls) == (
        "smollm2-135m",
        "misconceptions",
        8,
        19,
    )
    assert tuple(config.methods) == ("iti", "optimal") and config.whole_model


def test_bad_commands_and_settings(capsys, tmp_path, small_yaml):
    out = ["--out", str(tmp_path / "run")]
    assert "one of demo, audit, paper, probe, report" in fails(capsys, "edit")
    assert "which is not a file" in fails(capsys, "audit", str(tmp_path / "none.yaml"))
    (tmp_path / "bad.yaml").write_text("controlls: 3")
    assert "controlls" in fails(capsys, "audit", str(tmp_path / "bad.yaml"))
    assert "controls = 0" in fails(capsys, "audit", str(small_yaml), "--controls", "0")
    assert "not a run folder" in fails(capsys, "report", str(tmp_path))
    assert "heads 9.9" in fails(capsys, "audit", str(small_yaml), "--claim", "9.9", *out)
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
    assert "both sides of a split" in fails(capsys, "audit", str(small_yaml), "--behaviour", str(bad), *out)
    assert not (tmp_path / "run").exists(), "bad data must be refused before anything is written"


def test_bad_models(capsys, tmp_path, small_yaml):
    out = ["--out", str(tmp_path / "run")]
    assert "does not exist" in fails(capsys, "audit", str(small_yaml), "--model", str(tmp_path / "none"), *out)
    model = tmp_path / "bert"
    lm = make_lm("llama")
    lm.save_pretrained(model)
    tokenizer().save_pretrained(model)
    text = (model / "config.json").read_text().replace('"llama"', '"granite"').replace("LlamaFor", "GraniteFor")
    (model / "config.json").write_text(text)
    out = ["--out", str(tmp_path / "run2")]
    assert "register_architecture" in fails(capsys, "audit", str(small_yaml), "--model", str(model), *out)


def test_another_configuration_is_refused_and_nothing_lost(capsys, tmp_path, small_yaml):
    out = ["--out", str(tmp_path / "run")]
    assert cli.main(["audit", str(small_yaml), "--controls", "1", "--methods", "iti", *out]) == 0
    before = (tmp_path / "run" / "trials.sqlite").read_bytes()
    line = fails(capsys, "audit", str(small_yaml), "--controls", "2", "--methods", "iti", *out)
    assert "controls: 1 there, 2 here" in line
    assert (tmp_path / "run" / "trials.sqlite").read_bytes() == before


def test_a_full_disk_is_one_line(capsys, tmp_path, small_yaml, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "MiB free" in fails(capsys, "audit", str(small_yaml), "--out", str(tmp_path / "run"))


def test_calibration_of_the_null_and_of_a_run(capsys, tmp_path, small_yaml):
    numbers = tmp_path / "out" / "null.json"
    settings = ["--audits", "20", "--questions", "10", "--out", str(numbers)]
    assert cli.main(["calibrate", "null", *settings]) == 0
    assert "curtailed" in capsys.readouterr().out
    written = json.loads(numbers.read_text())
    assert len(written["null"]) == 9
    assert written["null"][0]["false"]["n_trials"] == 20
    folder = ["--out", str(tmp_path / "run")]
    assert cli.main(["audit", str(small_yaml), "--controls", "6", "--methods", "optimal", *folder]) == 0
    capsys.readouterr()
    assert cli.main(["calibrate", "run", str(tmp_path / "run"), "--controls", "4", "--level", "0.3"]) == 0
    assert "each of 6 places in turn the claim against 4 of the others" in capsys.readouterr().out
    assert "6 controls and --controls 19" in fails(capsys, "calibrate", "run", str(tmp_path / "run"))
    few = ("calibrate", "run", str(tmp_path / "run"), "--controls", "4")
    assert "score truth, which" in fails(capsys, *few, "--level", "0.3", "--score", "truth")
    assert "enough controls for an audit to say specific" in fails(capsys, *few)
    assert "not a run folder" in fails(capsys, "calibrate", "run", str(tmp_path))
    assert "--audits 0" in fails(capsys, "calibrate", "null", "--audits", "0")
    assert "locaudit calibrate nul;" in fails(capsys, "calibrate", "nul")
    assert cli.main(["calibrate"]) == 0
