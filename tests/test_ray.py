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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml

if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is not installed: pip install 'locaudit[ray]'", allow_module_level=True)

from locaudit import audit, cli
from locaudit.config import AuditConfig, merge_config, to_yaml
from locaudit.errors import ConfigError
from locaudit.models import load_model
from locaudit.registry import load_plugins
from locaudit.run.audit import run_audit
from locaudit.run.executors import ray as executor
from locaudit.store.folder import read_run
from locaudit.store.news import read_news
from locaudit.store.run import load_run
from locaudit.studies.paper.run import run_paper
from runs import HashJudge, small_config, stopped_at, study_config
from test_runner import dump

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]  # Ray leaves files and processes to the system

# Ray takes 127.0.0.1 for the address of another interface, unless it is told that there is no cluster of machines.
# A node that does not answer for about 10 s is lost. Results go to the store of the node, where they are lost with it.
ENV = {
    "RAY_max_direct_call_object_size": "1000",
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
SMALL, NO_MEMORY = {"SMALL": "1"}, "can't allocate memory"
"""Environment of the node whose memory runs out, and what torch says then."""
METHODS = {"iti": {"alphas": [2.0]}, "optimal": {"strengths": [0.2], "epochs": 2, "bank_size": 1}, "fragile": {}}
PLUGIN = '''
"""ITI that waits while the file `closed` is there (but not in the process that `open` names), fails at the whole model
while `broken` is there, and, while `full` is there, runs out of memory on the small node, which has to try it first.
On the small node, `fates` says what happens to each process that loads a model."""
import functools
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from locaudit.methods import Method
from locaudit.registry import METHODS

HERE, IS_SMALL = Path(__file__).parent, "SMALL" in os.environ

@dataclass(frozen=True)
class Settings:
    """None."""

def run_out():
    torch.empty(2**62, dtype=torch.uint8, device="cpu")

def is_closed():
    try:
        return str(os.getpid()) not in (HERE / "closed").read_text().split()
    except FileNotFoundError:
        return False

def fit(shared, jobs, settings, on_step=None):
    while is_closed():
        time.sleep(0.1)
    if jobs[0].location.scope == "whole" and (HERE / "broken").exists():
        raise RuntimeError("this node is broken")
    while (HERE / "full").exists():
        if IS_SMALL:
            (HERE / "full").write_text("it ran out")
            run_out()
        if (HERE / "full").read_text():
            break
        time.sleep(0.1)
    return METHODS["iti"].fitter(shared, jobs, shared.config.methods["iti"], on_step)

@functools.cache
def meet_fate():
    fate, *rest = (HERE / "fates").read_text().split() or [""]
    (HERE / "fates").write_text(" ".join(rest))
    if fate == "full":
        run_out()
    while fate == "stuck":
        time.sleep(0.1)

if IS_SMALL and (HERE / "fates").exists():
    register_module_parameter_registration_hook(lambda *_: meet_fate())
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
        found = Cluster(initialize_head=True, head_node_args=NODE | {"env_vars": SMALL})
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


def wait_for(condition: Callable[[], Any], seconds: float = 600.0) -> Any:
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until
        time.sleep(0.2)
    return found


def pid_of(group: dict[str, Any]) -> int:
    return int(group["where"].split()[1])


def said(folder: Path, words: str) -> str:
    """The last message of the run, if it has the words."""
    found = read_news(folder)["said"]
    return found if words in found else ""


def is_on(node, pid: int) -> bool:
    return psutil.Process(pid).ppid() == node.all_processes["raylet"][0].process.pid


@contextmanager
def suspended(node) -> Iterator[None]:
    """A node that does not answer, with all its processes."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    processes = [raylet, *raylet.children(recursive=True)]
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.resume()


def assert_no_actor(cluster) -> None:
    import ray

    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        wait_for(lambda: ray.available_resources().get("CPU", 0) == ray.cluster_resources()["CPU"])
    finally:
        ray.shutdown()


def test_a_cluster_gives_the_bytes_of_one_process(home, cluster, config, tmp_path, capsys):
    """Also with more strengths, more samples and shared places, and if memory runs out on one node.

    What fails everywhere is recorded with its reason.
    """
    changes = {"nulls": ["anywhere", "layers"], "widen": 1, "evaluation": {"samples": 2}, "controls": 3}
    config = merge_config(config, {**changes, "methods": {**METHODS, "iti": {"alphas": [1.0, 2.0]}}})
    for name in ("broken", "full"):
        (home / name).touch()
    run_audit(remote(config, cluster, weights="send"), tmp_path / "ray")
    (home / "full").unlink()
    err = " ".join(capsys.readouterr().err.split())
    assert re.search(r"worker \d+ on \S+ failed \(got a device without memory for one edit", err)
    assert "Fragile at whole model failed: tried 4 times" in err
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


def test_a_cluster_gives_the_bytes_of_one_process_to_each_part_of_a_study(home, cluster, tmp_path):
    config = study_config(home, random_sets=2, random_heads=2, landscape=False)
    judges = {"truth": HashJudge("truth"), "info": HashJudge("info")}
    run_paper(remote(config, cluster, workers=1), tmp_path / "ray", judges=judges, progress=False)
    run_paper(config, tmp_path / "local", judges=judges, progress=False)
    for part in config.audits():
        assert dump(tmp_path / "ray" / part) == dump(tmp_path / "local" / part)
    with pytest.raises(ConfigError, match="a model given as an object, and workers"):
        run_paper(remote(config, cluster), tmp_path / "other", model=load_model(config.model), judges=judges)


def test_the_vectors_of_a_claim_reach_the_workers(home, cluster, tmp_path):
    """A worker knows no vectors of its own, and has to draw none."""
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).standard_normal((5, 32)))
    methods = {"optimal": {"strengths": [0.2], "epochs": 1, "bank_size": 1}, "ablate": {}}
    changes = {"nulls": ["covariance", "uniform", "dictionary"], "methods": methods, "controls": 2}
    config = small_config(home, claim=f"{tmp_path / 'rows.npy'}[3]@1", **changes)
    run_audit(remote(config, cluster, workers=1), tmp_path / "ray", progress=False)
    run_audit(config, tmp_path / "local", progress=False)
    assert dump(tmp_path / "ray") == dump(tmp_path / "local") and load_run(tmp_path / "ray").is_finished
    found, expected = ((tmp_path / x / "directions.safetensors").read_bytes() for x in ("ray", "local"))
    assert found == expected


def test_no_trial_is_lost_with_workers_nodes_and_results(home, cluster, config, tmp_path, monkeypatch, capsys):
    """On one node, the model does not load: memory runs out, it hangs, what all trials share is lost, and so on.

    Then a worker is killed, a node stops for 2 s, another one goes while its results wait for the driver, and one does
    not answer and comes back.
    """
    import ray

    out, closed, fates, hold = tmp_path / "ray", home / "closed", home / "fates", home / "hold"
    nodes, put, wait, owners = [*cluster.worker_nodes], ray.put, ray.wait, []

    class Owner:
        def __init__(self, plugins):
            load_plugins(plugins)

        def put(self, value):
            return [ray.put(value)]

    def put_elsewhere(value):  # the first time; it is lost with its owner
        if owners:
            return put(value)
        owners.append(ray.remote(num_cpus=0)(Owner).remote(config.plugins))
        return ray.get(owners[0].put.remote(value))[0]

    def delayed(*args, **options):  # the driver is busy
        while hold.exists():
            hold.write_text("busy")
            time.sleep(0.1)
        return wait(*args, **options)

    for place, name, value in ((executor, "LOADING", 3.0), (ray, "put", put_elsewhere), (ray, "wait", delayed)):
        monkeypatch.setattr(place, name, value)

    def two_waiting() -> list[int]:
        return wait_for(lambda: pids if len(pids := [pid_of(group) for group in waiting(out)]) == 2 else None)

    def break_things() -> None:
        def hangs() -> int:
            text = said(out, "is still loading the model; if it hangs, end it")
            pid = int(text.split()[1]) if text else 0
            return pid if pid and is_on(cluster.head_node, pid) else 0

        wait_for(lambda: fates.read_text() == "full")  # the second worker there hangs
        hanging = wait_for(hangs)
        ray.kill(owners[0])
        os.kill(hanging, signal.SIGKILL)
        wait_for(lambda: said(out, "no other one starts"))

        lost, cut = nodes if is_on(nodes[0], two_waiting()[0]) else nodes[::-1]
        keeps, killed = two_waiting()
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: killed not in two_waiting())  # its place is taken, here or on the small node
        with suspended(lost):
            time.sleep(2)

        hold.touch()
        wait_for(hold.read_text)
        closed.write_text(str(keeps))
        wait_for(lambda: "run" not in psutil.Process(keeps).cmdline()[0])  # it has ended its group
        cluster.remove_node(lost, allow_graceful=False)
        closed.write_text("")
        hold.unlink()
        wait_for(lambda: keeps not in two_waiting())
        with suspended(cut):
            wait_for(lambda: len(waiting(out)) == 1)  # it is noticed

    closed.touch()
    fates.write_text("full stuck full")
    try:
        with ThreadPoolExecutor(1) as pool:
            broken = pool.submit(break_things)
            broken.add_done_callback(lambda _: closed.unlink())
            run_audit(remote(config, cluster), out)
            broken.result()
    finally:
        for path in (fates, hold):
            path.unlink(missing_ok=True)
        for node in nodes:
            if node in cluster.worker_nodes:
                cluster.remove_node(node, allow_graceful=False)
            cluster.add_node(**NODE)
    err = " ".join(capsys.readouterr().err.split())
    found = re.findall(r"worker \d+ on \S+ did not load the model \((.*?)\): (another|no other) one starts", err)
    for (why, _), words in zip(found, (NO_MEMORY, "ActorDiedError", "OwnerDiedError", NO_MEMORY), strict=True):
        assert words in why
    assert [then for _, then in found] == ["another"] * 3 + ["no other"]
    assert re.findall(r"worker \d+ on \S+ failed \((Actor|Object)\w+", err) == ["Actor", "Object", "Actor"]
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


def test_a_continued_run_keeps_the_threads_that_it_began_with(home, config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    with stopped_at(2):
        run_audit(config, tmp_path / "run", progress=False)
    before = torch.get_num_threads()
    run_audit(merge_config(config, {"ray": {"workers": 1, "cpus_per_worker": 3.0}}), tmp_path / "run")
    err = " ".join(capsys.readouterr().err.split())
    assert f"3 threads instead of {before}, as in each worker." in err and "finds by probes" in err
    note = load_run(tmp_path / "run").manifest.moved
    assert re.search(rf"ran alike: trials 1 to \d+ on .* with {before} thread.*, later ones on .* with 3 threads", note)
    assert note in err


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


def test_what_was_changed_to_start_ray_is_restored_if_it_does_not_start(home, tmp_path, monkeypatch):
    from ray._private import ray_constants

    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("long" * 30)))  # too long for a socket
    with pytest.raises(ConfigError, match="Ray, which did not start"):
        run_audit(merge_config(small_config(home), {"ray": {"workers": 1}}), tmp_path / "run", progress=False)
    assert ray_constants.ENABLE_RAY_CLUSTER


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


def test_a_worker_cannot_have_more_cores_than_this_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(2)))
    with pytest.raises(ConfigError, match=r"ray.cpus_per_worker = 100 on this machine, which has 2 cores"):
        executor.Ray.check(merge_config(AuditConfig(), {"ray": {"workers": 1, "cpus_per_worker": 100.0}}))


def test_ray_accepts_the_cluster_file():
    from ray.autoscaler._private.util import prepare_config, validate_config

    text = (Path(__file__).parents[1] / "deploy" / "ray-cluster.yaml").read_text(encoding="utf-8")
    config = prepare_config(yaml.safe_load(text))
    validate_config(config)
    assert config["docker"]["image"] == "locaudit" and config["provider"]["head_ip"]
