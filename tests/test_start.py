"""Starting again with a C library that leaves fewer holes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from locaudit import start


@pytest.fixture
def started(monkeypatch):
    """What execv was called with."""
    calls = []
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(os, "execv", lambda *given: calls.append(given))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-W", "ignore", "locaudit", "demo"])
    return calls


def test_the_same_command_starts_again_once(started, monkeypatch):
    monkeypatch.setattr(start, "_has_glibc", lambda: True)
    start.tune_allocator()
    start.tune_allocator()
    assert started == [(sys.executable, [sys.executable, "-W", "ignore", "locaudit", "demo"])]
    assert "glibc.malloc.tcache_count=0:" in os.environ["GLIBC_TUNABLES"]


def test_what_the_user_has_set_stands(started, monkeypatch):
    monkeypatch.setattr(start, "_has_glibc", lambda: True)
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    start.tune_allocator()
    assert not started and not os.environ["GLIBC_TUNABLES"]


@pytest.mark.parametrize("answer", [None, "", ValueError, AttributeError])
def test_nothing_happens_with_another_c_library(answer, started, monkeypatch):
    def confstr(name):
        if isinstance(answer, type):
            raise answer(name)
        return answer

    monkeypatch.setattr(os, "confstr", confstr, raising=False)
    start.tune_allocator()
    assert not started and "GLIBC_TUNABLES" not in os.environ


def test_a_system_that_cannot_start_it_again_goes_on(started, monkeypatch):
    def refused(*_):
        raise OSError("no")

    monkeypatch.setattr(start, "_has_glibc", lambda: True)
    monkeypatch.setattr(os, "execv", refused)
    start.tune_allocator()


@pytest.mark.skipif(not start._has_glibc(), reason="not a glibc")
def test_the_process_is_the_same_and_knows_its_settings():
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    code = "import os; from locaudit.start import tune_allocator; print(os.getpid(), flush=True); tune_allocator()"
    code += "; print(os.environ['GLIBC_TUNABLES'])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    before, after, tunables = done.stdout.split()
    assert before == after and tunables.count("glibc.malloc.") == len(start.TUNABLES)


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "locaudit", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("locaudit ")
