"""Trials on a Ray cluster of three nodes with one CPU each, all on this machine; the extra `ray` is needed."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is not installed: pip install 'locaudit[ray]'", allow_module_level=True)

from locaudit import audit, cli
from locaudit.config import merge_config, to_yaml
from locaudit.errors import ConfigError
from locaudit.models import load_model
from locaudit.run.audit import run_audit
from locaudit.run.executors.ray import RETRIES
from locaudit.store.folder import read_run
from locaudit.store.news import read_news
from locaudit.store.run import load_run
from runs import small_config
from test_runner import dump

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]  # Ray leaves files and processes to the system

# Ray takes 127.0.0.1 for the address of another interface, unless it is told that there is no cluster of machines.
ENV = {
    "RAY_worker_niceness": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
}
NODE = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "include_dashboard": False, "object_store_memory": 80 * 2**20}
RAISING = '''
from dataclasses import dataclass
from locaudit.methods import Method
from locaudit.registry import METHODS

@dataclass(frozen=True)
class Settings:
    """None."""

def fit(shared, jobs, settings, on_step=None):
    if jobs[0].location.scope == "whole":
        raise RuntimeError("this node is broken")
    return METHODS["iti"].fitter(shared, jobs, shared.config.methods["iti"], on_step)

METHODS.register("fragile")(Method("Fragile", Settings, fit))
'''


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENV, "LOCAUDIT_CACHE": "off"}.items():
            patch.setenv(name, value)
        from ray._private import ray_constants
        from ray.cluster_utils import Cluster

        patch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
        found = Cluster(initialize_head=True, head_node_args=NODE)
        for _ in range(2):
            found.add_node(**NODE)
        yield found
        found.shutdown()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("inputs")


@pytest.fixture
def config(home, cluster):
    return remote(small_config(home), cluster)


def remote(config, cluster):
    return merge_config(config, {"executor": "ray", "ray": {"address": cluster.address}})


def local(config):
    return merge_config(config, {"executor": "local", "ray": {"address": None}})


def longer(home, cluster):
    """An audit of a minute or so, most of it in training."""
    return remote(small_config(home, controls=5, methods=["optimal"], optimal={"epochs": 60}), cluster)


@contextmanager
def when_running(folder: Path, act):
    """Call `act` once with the news of the run, when two groups run elsewhere and a trial is stored."""

    def watch():
        while not ended.wait(0.2):
            if (folder / "status.json").is_file():
                news = read_news(folder)
                if news["done"] and len([group for group in news["running"] if group["where"]]) > 1:
                    act(news)
                    return

    ended = threading.Event()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield
    ended.set()
    thread.join()


def free_cores(cluster) -> float:
    """Cores that no actor holds."""
    import ray

    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        until = time.monotonic() + 120
        while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"] and time.monotonic() < until:
            time.sleep(0.5)
        return ray.available_resources().get("CPU", 0) - ray.cluster_resources()["CPU"]
    finally:
        ray.shutdown()


def test_a_cluster_gives_the_bytes_of_one_process(home, cluster, config, tmp_path):
    """Also with further strengths, more samples and shared places, and if it goes on from one to the other and back."""
    changes = {"nulls": ["anywhere", "layers"], "widen": 1, "evaluation": {"samples": 2}, "controls": 3}
    changes["methods"] = {"iti": {"alphas": [1.0, 2.0]}, "optimal": {"strengths": [0.2], "epochs": 2, "bank_size": 1}}
    config = merge_config(config, changes)
    run_audit(local(config), tmp_path / "local", progress=False)
    run_audit(merge_config(config, {"ray": {"weights": "send"}}), tmp_path / "ray", progress=False)
    expected = dump(tmp_path / "local")
    assert dump(tmp_path / "ray") == expected and len(expected["fits"]) > 14
    assert load_run(tmp_path / "ray").manifest.threads == 1
    for step, given in enumerate((local(config), config, local(config))):  # each adds a control
        run_audit(merge_config(given, {"controls": step + 1}), tmp_path / "mixed", progress=False)
    mixed = dump(tmp_path / "mixed")
    assert {name: mixed[name] for name in ("fits", "places", "scores", "answers", "edits")} == {
        name: expected[name] for name in ("fits", "places", "scores", "answers", "edits")
    }


def test_trials_of_a_killed_worker_run_elsewhere(home, cluster, tmp_path):
    config, killed = longer(home, cluster), []

    def kill(news):
        where = next(group["where"] for group in news["running"] if group["where"])
        killed.append(int(where.split()[1]))
        os.kill(killed[0], signal.SIGKILL)

    with when_running(tmp_path / "ray", kill):
        run_audit(config, tmp_path / "ray", progress=False)
    assert killed
    run_audit(local(config), tmp_path / "local", progress=False)
    assert dump(tmp_path / "ray") == dump(tmp_path / "local")
    assert free_cores(cluster) == 0


def test_trials_of_a_lost_node_run_elsewhere(home, cluster, tmp_path):
    """Though no core is free for a new worker."""
    config, node = longer(home, cluster), sorted(cluster.worker_nodes, key=lambda node: node.unique_id)[0]
    lost = []

    def remove(news):
        lost.append(news)
        cluster.remove_node(node, allow_graceful=False)

    try:
        with when_running(tmp_path / "ray", remove):
            run_audit(config, tmp_path / "ray", progress=False)
    finally:
        cluster.add_node(**NODE)
    assert lost
    run_audit(local(config), tmp_path / "local", progress=False)
    assert dump(tmp_path / "ray") == dump(tmp_path / "local")


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_stopped_driver_leaves_no_worker_and_goes_on(sent, code, home, cluster, tmp_path):
    config, out = longer(home, cluster), tmp_path / "ray"
    (tmp_path / "audit.yaml").write_text(to_yaml(config))
    command = [sys.executable, "-c",
               "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
               "from locaudit.cli import main; sys.exit(main(sys.argv[1:]))",
               "audit", str(tmp_path / "audit.yaml"), "--out", str(out)]  # fmt: skip
    driver = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **ENV})
    with when_running(out, lambda news: driver.send_signal(sent)):
        _, said = driver.communicate(timeout=600)
    assert driver.returncode == code, said
    assert free_cores(cluster) == 0
    assert read_news(out)["state"] == "stopped"
    with read_run(out) as store:
        n_kept = len(store.records())
    run_audit(local(config), out, progress=False)
    run_audit(local(config), tmp_path / "local", progress=False)
    assert dump(out) == dump(tmp_path / "local") and 0 < n_kept < len(load_run(out).trials)


def test_a_group_that_fails_everywhere_is_recorded_with_its_reason(home, config, tmp_path, capsys):
    (tmp_path / "fragile.py").write_text(RAISING)
    plugins = merge_config(config, {"plugins": [str(tmp_path / "fragile.py")]})
    config = merge_config(plugins, {"methods": {"iti": {"alphas": [2.0]}, "fragile": {}}})
    run_audit(config, tmp_path / "ray")
    assert "Fragile at whole model failed: tried 4 times" in " ".join(capsys.readouterr().err.split())
    news, run = read_news(tmp_path / "ray"), load_run(tmp_path / "ray")
    assert list(news["failed"]) == ["Fragile at whole model"] and news["state"] == "finished"
    (note,) = (note for note in run.manifest.notes if "Fragile" in note)
    assert f"tried {RETRIES + 1} times" in note and "RuntimeError: this node is broken" in note
    assert len(run.trials) == run.manifest.planned - 1 and not run.is_finished
    assert cli.main(["status", str(tmp_path / "ray")]) == 0
    assert "this node is broken" in capsys.readouterr().out


def test_a_node_with_other_versions_is_refused_by_name(home, cluster, config, tmp_path):
    (tmp_path / "transformers-9.9.dist-info").mkdir()
    meta = "Metadata-Version: 2.1\nName: transformers\nVersion: 9.9\n"
    (tmp_path / "transformers-9.9.dist-info" / "METADATA").write_text(meta)
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    node = cluster.add_node(**NODE, env_vars={"PYTHONPATH": path})
    try:
        with pytest.raises(ConfigError, match=r"transformers 9\.9 on .*127\.0\.0\.1"):
            run_audit(config, tmp_path / "ray", progress=False)
    finally:
        cluster.remove_node(node)
    with read_run(tmp_path / "ray") as store:
        assert store.is_empty()


def addresses_of_ray(driver: int) -> set[str]:
    """Addresses at which the processes that the driver started listen."""
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        processes = psutil.Process(driver).children(recursive=True)
        found = [one for process in processes for one in process.net_connections("tcp")]
        return {one.laddr.ip.removeprefix("::ffff:") for one in found if one.status == psutil.CONN_LISTEN}
    return set()


def test_workers_alone_start_a_ray_that_only_this_machine_sees(home, tmp_path):
    """As a user starts it, with `--workers`; it ends with the audit."""
    (tmp_path / "audit.yaml").write_text(to_yaml(small_config(home)))
    command = [sys.executable, "-m", "locaudit", "audit", str(tmp_path / "audit.yaml"), "--workers", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "LOCAUDIT_CACHE": "off", "RAY_TMPDIR": str(tmp_path)}
    command += ["--ray.cpus-per-worker", "1", "--out", str(tmp_path / "run")]
    seen: set[str] = set()
    with (tmp_path / "said").open("w") as said:
        driver = subprocess.Popen(command, stdout=said, stderr=said, env=env)
        while driver.poll() is None:
            seen |= addresses_of_ray(driver.pid)
            time.sleep(0.3)
    assert driver.returncode == 0, (tmp_path / "said").read_text()
    assert seen and seen <= {"127.0.0.1", "::1"}
    run_audit(small_config(home), tmp_path / "local", progress=False)
    assert dump(tmp_path / "run") == dump(tmp_path / "local")


def test_what_cannot_be_used_is_refused_before_a_model_is_loaded(home, tmp_path):
    config = merge_config(small_config(home), {"executor": "ray"})
    with pytest.raises(ConfigError, match="a model given as an object.*save_pretrained"):
        audit(load_model(home / "model"), config.behaviour, config=config, out=tmp_path / "run")
    for ray, loading, got in (
        ({"workers": 2}, {"device_map": "auto"}, "device_map = auto"),
        ({}, {"device": "cuda:1"}, "cuda:1"),
        ({"address": "ray://host:1"}, {}, "ray://"),
        ({"address": "127.0.0.1:9"}, {}, "no cluster answers"),
        ({"address": "auto"}, {}, "no cluster answers"),
        ({"address": "203.0.113.1:6379"}, {}, ""),  # nobody has this address: no answer, or that of a proxy
    ):
        started = time.monotonic()
        with pytest.raises(ConfigError, match=re.escape(got)):
            run_audit(merge_config(config, {"ray": ray, "loading": loading}), tmp_path / "run", progress=False)
        assert time.monotonic() - started < 10
    assert not (tmp_path / "run").exists()
