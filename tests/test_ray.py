"""Trials on a Ray cluster of three nodes with one CPU each, all on this machine; the extra `ray` is needed."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is not installed: pip install 'locaudit[ray]'", allow_module_level=True)

from locaudit import audit, cli
from locaudit.config import AuditConfig, merge_config, to_yaml
from locaudit.errors import ConfigError
from locaudit.models import load_model
from locaudit.run.audit import run_audit
from locaudit.run.executors import ray as executor
from locaudit.store.folder import read_run
from locaudit.store.news import read_news
from locaudit.store.run import load_run
from runs import small_config
from test_runner import dump

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]  # Ray leaves files and processes to the system

# Ray takes 127.0.0.1 for the address of another interface, unless it is told that there is no cluster of machines.
# A node that does not answer for about 10 s is lost.
ENV = {
    "RAY_worker_niceness": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_worker_prestart": "0",  # a worker has an environment of its own, so that these would serve nothing
    "RAY_prestart_worker_first_driver": "0",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_period_ms": "500",
    "OMP_NUM_THREADS": "1",
    "LOCAUDIT_CACHE": "off",
}
NODE = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "include_dashboard": False, "object_store_memory": 80 * 2**20}
METHODS = {"iti": {"alphas": [2.0]}, "optimal": {"strengths": [0.2], "epochs": 2, "bank_size": 1}, "fragile": {}}
PLUGIN = '''
"""ITI that waits while the file `closed` is there, and fails at the whole model while `broken` is."""
import time
from dataclasses import dataclass
from pathlib import Path

from locaudit.methods import Method
from locaudit.registry import METHODS

HERE = Path(__file__).parent

@dataclass(frozen=True)
class Settings:
    """None."""

def fit(shared, jobs, settings, on_step=None):
    while (HERE / "closed").exists():
        time.sleep(0.1)
    if jobs[0].location.scope == "whole" and (HERE / "broken").exists():
        raise RuntimeError("this node is broken")
    return METHODS["iti"].fitter(shared, jobs, shared.config.methods["iti"], on_step)

METHODS.register("fragile")(Method("Fragile", Settings, fit))
'''


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENV.items():
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
    """A folder with a tiny model, a small behaviour, and the plug-in `fragile`."""
    folder = tmp_path_factory.mktemp("inputs")
    small_config(folder)
    (folder / "fragile.py").write_text(PLUGIN)
    return folder


@pytest.fixture
def config(home):
    """Settings of an audit in this process."""
    return merge_config(small_config(home), {"plugins": [str(home / "fragile.py")], "methods": METHODS})


def remote(config, cluster, **more):
    return merge_config(config, {"executor": "ray", "ray": {"address": cluster.address, **more}})


def waiting(folder: Path) -> list[dict[str, Any]]:
    """The groups of the plug-in that workers have, by the news of the run."""
    found = read_news(folder).get("running", []) if (folder / "status.json").is_file() else []
    return [group for group in found if "Fragile" in group["what"] and group["where"].startswith("worker")]


def wait_for(condition: Callable[[], Any], seconds: float = 240.0) -> Any:
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until
        time.sleep(0.2)
    return found


def pid_of(group: dict[str, Any]) -> int:
    return int(group["where"].split()[1])


def assert_no_actor(cluster) -> None:
    import ray

    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        wait_for(lambda: ray.available_resources().get("CPU", 0) == ray.cluster_resources()["CPU"])
    finally:
        ray.shutdown()


def test_a_cluster_gives_the_bytes_of_one_process(home, cluster, config, tmp_path, capsys):
    """Also with more strengths, more samples and shared places. What fails everywhere is recorded with its reason."""
    changes = {"nulls": ["anywhere", "layers"], "widen": 1, "evaluation": {"samples": 2}, "controls": 3}
    config = merge_config(config, {**changes, "methods": {**METHODS, "iti": {"alphas": [1.0, 2.0]}}})
    (home / "broken").touch()
    run_audit(remote(config, cluster, weights="send", workers=2), tmp_path / "ray")
    assert "Fragile at whole model failed: tried 4 times" in " ".join(capsys.readouterr().err.split())
    news, run = read_news(tmp_path / "ray"), load_run(tmp_path / "ray")
    assert list(news["failed"]) == ["Fragile at whole model"] and news["state"] == "finished"
    (note,) = (note for note in run.manifest.notes if "Fragile" in note)
    assert f"tried {executor.RETRIES + 1} times" in note and "RuntimeError: this node is broken" in note
    assert not run.is_finished and run.manifest.threads == 1
    assert cli.main(["status", str(tmp_path / "ray")]) == 0
    assert "this node is broken" in capsys.readouterr().out

    (home / "broken").unlink()
    run_audit(config, tmp_path / "local", progress=False)
    expected, found = dump(tmp_path / "local"), dump(tmp_path / "ray")
    lacking = [row for row in expected["fits"] if row not in found["fits"]]
    assert len(expected["fits"]) > 20 and [(row[1], "whole" in row[2]) for row in lacking] == [("fragile", True)]
    run_audit(config, tmp_path / "ray", progress=False)  # the same command tries it again
    assert dump(tmp_path / "ray") == expected and load_run(tmp_path / "ray").is_finished


def test_trials_of_a_lost_worker_and_of_lost_nodes_run_elsewhere(home, cluster, config, tmp_path):
    """A node is removed and no core is free, a worker is killed, a node does not answer and comes back."""
    removed, cut = sorted(cluster.worker_nodes, key=lambda node: node.unique_id)
    out, closed = tmp_path / "ray", home / "closed"

    def break_things() -> None:
        groups = wait_for(lambda: found if len(found := waiting(out)) == 3 else None)
        workers = [psutil.Process(pid_of(group)) for group in groups]
        raylet = psutil.Process(cut.all_processes["raylet"][0].process.pid)
        (killed,) = (worker for worker in workers if worker.ppid() == raylet.pid)
        cluster.remove_node(removed, allow_graceful=False)
        killed.kill()
        before = set(map(pid_of, groups))
        wait_for(lambda: set(map(pid_of, waiting(out))) - before)  # its place is taken
        stopped = [raylet, *raylet.children(recursive=True)]
        for process in stopped:
            process.suspend()
        wait_for(lambda: len(waiting(out)) == 1)  # it is noticed
        for process in stopped:
            with suppress(psutil.NoSuchProcess):
                process.resume()

    closed.touch()
    try:
        with ThreadPoolExecutor(1) as pool:
            broken = pool.submit(break_things)
            broken.add_done_callback(lambda _: closed.unlink())
            run_audit(remote(config, cluster), out, progress=False)
            broken.result()
    finally:
        for node in (removed, cut):
            if node in cluster.worker_nodes:
                cluster.remove_node(node, allow_graceful=False)
            cluster.add_node(**NODE)
    run_audit(config, tmp_path / "local", progress=False)
    assert dump(out) == dump(tmp_path / "local")
    assert_no_actor(cluster)


def test_a_stopped_driver_leaves_no_worker_and_goes_on(home, cluster, config, tmp_path):
    """The folder is begun here, continued by Ray, whose driver is killed and then interrupted, and ended here."""
    out, settings = tmp_path / "ray", tmp_path / "audit.yaml"
    config = merge_config(config, {"controls": 3})
    run_audit(merge_config(config, {"controls": 1}), out, progress=False)
    with read_run(out) as store:
        n_begun = len(store.records())
    settings.write_text(to_yaml(remote(config, cluster, workers=2)))
    command = [sys.executable, "-c",
               "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
               "from locaudit.cli import main; sys.exit(main(sys.argv[1:]))",
               "audit", str(settings), "--out", str(out)]  # fmt: skip
    (home / "closed").touch()
    for sent, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        driver = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        wait_for(lambda: read_news(out)["pid"] == driver.pid and len(waiting(out)) == 2)  # noqa: B023
        driver.send_signal(sent)
        _, said = driver.communicate(timeout=120)
        assert driver.returncode == code, said
        assert_no_actor(cluster)
        assert read_news(out)["state"] == "stopped"
    (home / "closed").unlink()
    with read_run(out) as store:
        n_kept = len(store.records())
    run_audit(config, out, progress=False)
    run_audit(config, tmp_path / "local", progress=False)
    mixed, expected = dump(out), dump(tmp_path / "local")
    for name in ("fits", "places", "scores", "answers", "edits"):
        assert mixed[name] == expected[name]
    assert n_begun < n_kept < len(load_run(out).trials)


def test_a_node_with_other_versions_is_refused_by_name(cluster, config, tmp_path, monkeypatch):
    """Before any trial. Here, the cluster is that of this machine (``auto``)."""
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    (tmp_path / "transformers-9.9.dist-info").mkdir()
    meta = "Metadata-Version: 2.1\nName: transformers\nVersion: 9.9\n"
    (tmp_path / "transformers-9.9.dist-info" / "METADATA").write_text(meta)
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    node = cluster.add_node(**NODE, env_vars={"PYTHONPATH": path})
    try:
        with pytest.raises(ConfigError, match=r"transformers 9\.9 on .*127\.0\.0\.1"):
            run_audit(
                merge_config(remote(config, cluster), {"ray": {"address": "auto"}}), tmp_path / "ray", progress=False
            )
    finally:
        cluster.remove_node(node)
    with read_run(tmp_path / "ray") as store:
        assert store.is_empty()


def test_no_room_for_a_worker_is_an_error(cluster, config, tmp_path, monkeypatch):
    monkeypatch.setattr(executor, "PATIENCE", 3.0)
    with pytest.raises(ConfigError, match="no room for a worker in 3 s"):
        run_audit(remote(config, cluster, workers=1, gpus_per_worker=1.0), tmp_path / "ray", progress=False)


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
    command += ["--ray.cpus-per-worker", "1", "--out", str(tmp_path / "run")]
    seen: set[str] = set()
    # not below tmp_path, because names of sockets are short
    with (tmp_path / "said").open("w") as said, tempfile.TemporaryDirectory() as folder:
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
            "RAY_TMPDIR": folder
        }
        driver = subprocess.Popen(command, stdout=said, stderr=said, env=env)
        while driver.poll() is None:
            seen |= addresses_of_ray(driver.pid)
            time.sleep(2)  # looking takes as long as a small trial
    assert driver.returncode == 0, (tmp_path / "said").read_text()
    assert seen and seen <= {"127.0.0.1", "::1"}
    run_audit(small_config(home), tmp_path / "local", progress=False)
    assert dump(tmp_path / "run") == dump(tmp_path / "local")


def test_what_cannot_be_used_is_refused_before_a_model_is_loaded(home, tmp_path, monkeypatch, request):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")  # that of ``auto``
    config = merge_config(small_config(home), {"executor": "ray"})
    with pytest.raises(ConfigError, match="a model given as an object.*save_pretrained"):
        audit(load_model(home / "model"), config.behaviour, config=config, out=tmp_path / "run")
    silent = socket.create_server(("", 0))  # accepts connections and says nothing
    request.addfinalizer(silent.close)
    for ray, loading, got in (
        ({"workers": 2}, {"device_map": "auto"}, "device_map = auto"),
        ({}, {"device": "cuda:1"}, "cuda:1"),
        ({"address": "ray://host:1"}, {}, "ray://"),
        ({"address": "127.0.0.1:9"}, {}, "no cluster answers"),
        ({"address": "auto"}, {}, "no cluster answers"),
        ({"address": f"127.0.0.1:{silent.getsockname()[1]}"}, {}, "no answer within 5 s"),
        ({"address": "203.0.113.1:6379"}, {}, "no cluster answers"),  # nobody has this address; a proxy may answer
    ):
        started = time.monotonic()
        with pytest.raises(ConfigError, match=re.escape(got)):
            run_audit(merge_config(config, {"ray": ray, "loading": loading}), tmp_path / "run", progress=False)
        assert time.monotonic() - started < 10
    assert not (tmp_path / "run").exists()


def test_workers_share_the_cores_of_this_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    for ray, threads in (
        ({"workers": 1}, 16),
        ({"workers": 5}, 3),
        ({"workers": 40}, 1),
        ({"workers": 2, "cpus_per_worker": 4.0}, 4),
        ({}, 1),  # as many workers as cores
        ({"workers": 2, "address": "auto"}, 1),
    ):
        assert executor.Ray.threads(merge_config(AuditConfig(), {"ray": ray})) == threads


def test_ray_accepts_the_cluster_file():
    from ray.autoscaler._private.util import prepare_config, validate_config

    text = (Path(__file__).parents[1] / "deploy" / "ray-cluster.yaml").read_text(encoding="utf-8")
    config = prepare_config(yaml.safe_load(text))
    validate_config(config)
    assert config["docker"]["image"] == "locaudit" and config["provider"]["head_ip"]
