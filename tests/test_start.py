"""Starting again with a C library that leaves fewer holes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from bench import harness

from locaudit import start

NOTHING = ("GLIBC_TUNABLES", "LD_PRELOAD", "LOCAUDIT_STARTED", "MALLOC_")
glibc = pytest.mark.skipif(not start._has_glibc(), reason="not a glibc")


def plain(**more: str) -> dict[str, str]:
    """The environment without a word about memory."""
    return {name: value for name, value in os.environ.items() if not name.startswith(NOTHING)} | more


@pytest.fixture
def started(monkeypatch):
    """What execve was called with, in a process in which nothing speaks against it."""
    calls = []
    for name in set(os.environ) - set(plain()) | {start.VARIABLE, start._STARTED}:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setattr(start, "_has_glibc", lambda: True)
    monkeypatch.setattr(start, "_can_start_again", lambda: True)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-W", "ignore", "locaudit", "demo"])
    monkeypatch.setattr(os, "execve", lambda *given: calls.append(given))
    return calls


def test_the_same_command_starts_again(started):
    start.tune_allocator()
    ((path, argv, environment),) = started
    assert path == sys.executable and argv == [sys.executable, "-W", "ignore", "locaudit", "demo"]
    assert environment == {**os.environ, **start.settings(), "LOCAUDIT_STARTED": str(os.getpid())}


@pytest.mark.parametrize("name", ["GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "LD_PRELOAD", "LOCAUDIT_STARTED"])
def test_what_the_user_has_set_stands_and_nothing_starts_twice(name, started, monkeypatch):
    monkeypatch.setenv(name, "")
    start.tune_allocator()
    assert not started


def test_a_system_that_cannot_start_it_again_goes_on_as_before(started, monkeypatch):
    def refused(*_):
        raise OSError("no")

    monkeypatch.setattr(os, "execve", refused)
    start.tune_allocator()
    assert start.VARIABLE not in os.environ and start._STARTED not in os.environ


@pytest.mark.parametrize("answer", [None, "", ValueError, AttributeError])
def test_nothing_is_set_for_another_c_library(answer, monkeypatch):
    def confstr(name):
        if isinstance(answer, type):
            raise answer(name)
        return answer

    monkeypatch.setattr(os, "confstr", confstr, raising=False)
    assert not start._has_glibc() and not start.settings()


def test_only_a_command_alone_in_its_interpreter_starts_again(monkeypatch, tmp_path):
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    monkeypatch.setattr(sys, "argv", ["locaudit", "demo"])
    program = sys.modules["__main__"]
    monkeypatch.setattr(program, "__file__", __file__, raising=False)
    expected = os.path.exists("/proc/self/exe")
    assert start._can_start_again() == expected
    changes = [(program, "__file__", None), (program, "__file__", os.devnull), (program, "__file__", str(tmp_path))]
    changes += [(sys, "ps1", ">"), (sys, "executable", ""), (sys, "executable", str(tmp_path))]
    changes += [(threading, "active_count", lambda: 2), (sys, "gettrace", lambda: print)]
    for where, name, value in changes:
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value, raising=False)
            assert not start._can_start_again(), name


@glibc
@pytest.mark.parametrize("name", ["-", "/dev/stdin", None])
def test_a_program_from_a_pipe_runs_once_and_to_its_end(name):
    """It cannot be read again, even if it says that it is a command."""
    code = "import sys; sys.argv = ['locaudit', 'bogus']; from locaudit.start import main; sys.exit(main())"
    command = [sys.executable, *([] if name is None else [name])]
    done = subprocess.run(command, input=code, env=plain(), capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "bogus" in done.stderr


@glibc
def test_the_process_is_the_same_and_its_arguments_too():
    code = "import os, sys; from locaudit.start import tune_allocator; print(os.getpid(), flush=True)"
    code += "; tune_allocator(); print(os.environ['GLIBC_TUNABLES'], *sys.argv[1:], sep='|')"
    command = [sys.executable, "-W", "error", "-c", code, "a b", "--p", "naïve", ""]
    done = subprocess.run(command, env=plain(), capture_output=True, text=True, check=True)
    before, after, rest = done.stdout.split("\n", 2)
    assert before == after and rest.strip().split("|")[1:] == ["a b", "--p", "naïve", ""]
    assert rest.count("glibc.malloc.") == len(start.TUNABLES)


@glibc
def test_glibc_knows_the_settings():
    """Their names: it says nothing about those that it does not know."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").split()
    loader = next((path for path in maps if "/ld-linux" in path or "/ld-2" in path), None)
    if loader is None:
        pytest.skip("no loader found")
    value = ":".join(f"glibc.malloc.{name}={value}" for name, value in start.TUNABLES.items())
    environment = plain(GLIBC_TUNABLES=value)
    listed = subprocess.run([loader, "--list-tunables"], env=environment, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this glibc does not list them")
    found = {line.split(":")[0]: int(line.split()[1], 0) for line in listed.stdout.splitlines() if "malloc" in line}
    assert {name: found[f"glibc.malloc.{name}"] for name in start.TUNABLES} == start.TUNABLES


def test_a_benchmark_gives_the_settings_to_our_side_alone(started):
    def seen():
        code = "import os; print(os.environ.get('GLIBC_TUNABLES', '-'))"
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()

    expected = start.settings()[start.VARIABLE]
    with harness._started_as_ours():
        assert seen() == expected
    assert seen() == "-"


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "locaudit", "--version"]
    done = subprocess.run(command, env=plain(), capture_output=True, text=True, check=True)
    assert done.stdout.startswith("locaudit ")
