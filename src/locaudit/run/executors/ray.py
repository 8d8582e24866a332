"""Runs trials in worker processes, on this machine or on a cluster, by Ray (the extra ``ray``).

Each worker is a Ray actor that holds the model and what all trials share, and runs one group at a time. The driver
sends what is shared once for each node, and edits that were saved before with the group that needs them, so that no
worker reads or writes the run folder.

Actors are never restarted by Ray, and their calls never repeated. When a node goes and no core is free, Ray would leave
such calls pending for ever, and a lost group would look like a slow one. Without restarts, the call of a lost actor
fails; its group goes to another worker, and a new actor waits for room.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import signal
import socket
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locaudit.config import AuditConfig
from locaudit.errors import ConfigError, LocauditError, import_extra
from locaudit.records import TrialSpec
from locaudit.registry import EXECUTORS, load_plugins
from locaudit.run.executors import Outcome
from locaudit.text import plural

if TYPE_CHECKING:  # so that settings are refused without torch
    from locaudit.models.model import Model
    from locaudit.run.worker import Result, Shared, Worker

RETRIES = 3
"""How many times a group that failed is tried again, elsewhere if possible. Also how many times a worker that could not
load the model is replaced."""
PATIENCE = 300.0
"""Seconds to wait for room for at least one worker."""
LOADING = 300.0
"""Seconds between messages that name a worker which is still loading the model."""
CONNECT = 5.0
"""Seconds to wait for a cluster to answer."""
PACKAGES = ("locaudit", "torch", "transformers")
"""Packages of which every node must have the driver's version."""


@dataclass(eq=False)
class _Task:
    """A group of trials, with the nodes on which it failed."""

    group: Sequence[TrialSpec]
    nodes: list[str] = field(default_factory=list)


@dataclass(eq=False)
class _Hand:
    """A worker as the driver sees it."""

    actor: Any
    call: Any
    """The call whose result is awaited; None if the worker is free."""
    node: str = ""
    """The id of its node; empty while there is no room for it."""
    where: str = "a worker"
    task: _Task | None = None
    is_ready: bool = False
    n_lost: int = 0
    """Workers lost in a row, whose place it takes, before they had loaded the model."""
    since: float = field(default_factory=time.monotonic)
    """When it was started; then, when it began to load the model, or was last said to load."""


@EXECUTORS.register("ray")
class Ray:
    """Runs several groups at once, each in a worker process of its own."""

    @staticmethod
    def threads(config: AuditConfig) -> int:
        """Threads of each worker, at least 1."""
        return max(int(_cores(config)), 1)

    @staticmethod
    def check(config: AuditConfig) -> None:
        """Raise `ConfigError` for settings that cannot be used, and if Ray is not installed."""
        if importlib.util.find_spec("ray") is None:
            import_extra("ray", "ray")
        address = config.ray.address
        if address not in (None, "auto") and not re.fullmatch(r"[\w.-]+:\d+", address):
            raise ConfigError(got=f"ray.address = {address}", expected="auto or HOST:PORT", remedy="correct it")
        if address is not None:
            _reach(address)
        if address is None and (n := config.ray.cpus_per_worker or 0) > (cores := _n_cores()):
            raise ConfigError(
                got=f"ray.cpus_per_worker = {n:g} on this machine, which has {plural(cores, 'core')}",
                expected="at most as many cores as there are",
                remedy="lower it, or leave it out: the workers then share the cores",
            )
        if config.loading.device_map is not None and (config.ray.workers or 1) > 1:
            raise ConfigError(
                got=f"ray.workers = {config.ray.workers} with loading.device_map = {config.loading.device_map}",
                expected="one worker for a model that is spread over devices",
                remedy="leave out one of them",
            )
        if ":" in config.loading.device:
            raise ConfigError(
                got=f"loading.device = {config.loading.device} with workers",
                expected="a device without number, because Ray gives each worker its own",
                remedy=f"write loading.device {config.loading.device.partition(':')[0]}",
            )

    def map(self, worker: Worker, folder: Path, groups: Iterable[Sequence[TrialSpec] | None]) -> Iterator[Outcome]:
        """Yield the outcomes of groups as they end, in any order."""
        ray, config = import_extra("ray", "ray"), worker.shared.config
        with _connected(ray, config):
            if config.ray.address is not None:
                _check_nodes(ray)
            pool = _Pool(ray, worker)
            try:
                yield from pool.run(iter(groups))
            finally:
                pool.end()


class _Pool:
    """The workers of a run and the groups that they run."""

    def __init__(self, ray: Any, worker: Worker):
        shared, self._ray, self._say = worker.shared, ray, worker.say
        self._settings, self._shared = shared.config.ray, shared
        n_gpus = self._settings.gpus_per_worker
        if n_gpus is None:
            n_gpus = float(shared.model.device.type == "cuda")
        room = {"CPU": _cores(shared.config), "GPU": n_gpus}
        options = {"num_cpus": room["CPU"], "num_gpus": n_gpus, "max_restarts": 0, "max_task_retries": 0}
        # Of this process, so that nodes need not be started with it.
        env = {name: os.environ[name] for name in ("LOCAUDIT_CACHE",) if name in os.environ}
        self._actors = ray.remote(_Actor).options(
            **options, scheduling_strategy="SPREAD", runtime_env={"env_vars": env} if env else None
        )
        self._given = self._give()
        n_workers = self._settings.workers
        if n_workers is None and shared.config.loading.device_map is not None:
            n_workers = 1
        if n_workers is None:
            total = ray.cluster_resources()
            n_workers = max(min(int(total.get(name, 0) // n) for name, n in room.items() if n), 1)
        self._hands = [self._hire() for _ in range(n_workers)]
        self._again: deque[_Task] = deque()

    def _give(self) -> tuple[Any, ...]:
        """Put what all trials share into Ray's store. Returns the arguments of `_Actor.begin`."""
        shared, put = self._shared, self._ray.put
        sent = replace(shared, model=None, cache=None, parts={}, fitted={}, clock=Counter(), edits=Path())  # type: ignore
        parts = [put(sent), put(shared.model) if self._settings.weights == "send" else None]
        model, threads = shared.model, Ray.threads(shared.config)
        return shared.config.plugins, parts, threads, model.fingerprint, model.device.type, _versions()

    def run(self, groups: Iterator[Sequence[TrialSpec] | None]) -> Iterator[Outcome]:
        """Give groups to free workers until there are no more."""
        has_told = False
        while True:
            has_more = True
            for hand in [hand for hand in self._hands if hand.call is None]:
                task = self._take_again(hand)
                if task is None and has_more:
                    try:
                        group = next(groups)
                    except StopIteration:  # nothing runs any more, because the driver waits for what runs
                        return
                    has_more = group is not None
                    task = _Task(group) if group else None
                if task is None:
                    continue
                hand.task, hand.call = task, hand.actor.run.remote(task.group, self._saved(task.group))
                yield Outcome(task.group, (), False, where=hand.where)
            waited = time.monotonic() - max(hand.since for hand in self._hands)
            if any(hand.node for hand in self._hands):
                has_told = False
            elif waited > PATIENCE:
                raise _no_room(f"no room for a worker in {PATIENCE:.0f} s")
            elif not has_told and waited > PATIENCE / 10:
                has_told = True
                self._say("no node has room for a worker: waiting for one")
            for hand in self._hands:
                if hand.node and not hand.is_ready and time.monotonic() - hand.since > LOADING:
                    hand.since = time.monotonic()
                    self._say(f"{hand.where} is still loading the model; if it hangs, end it, and another one starts")
            calls = {hand.call: hand for hand in self._hands if hand.call is not None}
            done, _ = self._ray.wait([*calls], timeout=1.0)
            for call in done:
                yield from self._read(calls[call])

    def _read(self, hand: _Hand) -> Iterator[Outcome]:
        """Read what a worker's call returned: where it is, that it is ready, or the results of its group."""
        errors, task, call = self._ray.exceptions, hand.task, hand.call
        hand.task = hand.call = None
        try:
            found = self._ray.get(call)
        except errors.RayError as error:
            cause = error.cause if isinstance(error, errors.RayTaskError) else error  # what the worker raised
            if task is None and isinstance(cause, ConfigError):  # results would differ, or it is so on every node
                raise cause from None
            if task is None or cause is error:  # no model there, or the actor, its node or the result is lost
                self._replace(hand, cause)
            if task is not None:
                yield from self._failed(task, hand, _reason(cause))
        else:
            if task is not None:
                parts, said = found
                for text in said:
                    self._say(f"{hand.where}: {text}")
                for number, (results, seconds) in enumerate(parts):
                    yield Outcome(task.group, results, number == len(parts) - 1, seconds, hand.where)
            elif not hand.node:
                hand.node, hand.where = found
                hand.since = time.monotonic()
                hand.call = hand.actor.begin.remote(*self._given)
            else:
                hand.is_ready = True

    def _replace(self, hand: _Hand, cause: Exception) -> None:
        """End a worker that was lost or did not load the model. Another one starts, unless too many did not load it."""
        self._ray.kill(hand.actor)
        self._hands.remove(hand)
        n_lost = 0 if hand.is_ready else hand.n_lost + 1
        if not hand.is_ready and isinstance(cause, self._ray.exceptions.ObjectLostError):
            self._given = self._give()
        if n_lost <= RETRIES:
            self._hands.append(self._hire(n_lost))
        elif not self._hands:
            raise cause if isinstance(cause, LocauditError) else _no_room(f"{hand.where} ({_reason(cause)})") from None
        if not hand.is_ready:
            then = "another" if n_lost <= RETRIES else "no other"
            self._say(f"{hand.where} did not load the model ({_reason(cause)}): {then} one starts")

    def _failed(self, task: _Task, hand: _Hand, why: str) -> Iterator[Outcome]:
        task.nodes.append(hand.node)
        if len(task.nodes) > RETRIES:
            yield Outcome(task.group, (), True, failed=f"tried {len(task.nodes)} times, at last {hand.where}: {why}")
        else:
            self._again.append(task)
            self._say(f"{hand.where} failed ({why}): its trials run elsewhere")
            yield Outcome(task.group, (), False, where="lost, waits for a worker")

    def _take_again(self, hand: _Hand) -> _Task | None:
        """A group that failed elsewhere, or here if it failed on all nodes that have a worker."""
        nodes = {other.node for other in self._hands if other.is_ready}
        for task in self._again:
            if hand.node not in task.nodes or nodes <= set(task.nodes):
                self._again.remove(task)
                return task
        return None

    def _saved(self, group: Sequence[TrialSpec]) -> dict[str, bytes]:
        """File name -> content, of the group's edits that were saved before."""
        kept = [self._shared.kept[spec.trial_id].record for spec in group if spec.trial_id in self._shared.kept]
        names = {record.edit for record in (*kept, *(spec.measured for spec in group if spec.measured))} - {""}
        return {name: (self._shared.edits / name).read_bytes() for name in names}

    def _hire(self, n_lost: int = 0) -> _Hand:
        actor = self._actors.remote()
        return _Hand(actor, actor.place.remote(), n_lost=n_lost)

    def end(self) -> None:
        """End all workers, also those that still wait for room."""
        for hand in self._hands:
            with suppress(Exception):  # the cluster may be gone
                self._ray.kill(hand.actor)


class _Actor:
    """A worker's process."""

    def place(self) -> tuple[str, str]:
        """The id of the node, and where the worker is in words."""
        ray = import_extra("ray", "ray")
        return ray.get_runtime_context().get_node_id(), f"worker {os.getpid()} on {socket.gethostname()}"

    def begin(
        self,
        plugins: Sequence[str],
        parts: list[Any],
        threads: int,
        fingerprint: str,
        device: str,
        versions: Mapping[str, str],
    ) -> None:
        """Load the model, and what all trials share (`parts`: references to objects that plug-ins may define)."""
        where = socket.gethostname()
        _refuse_versions([(where, _versions())], versions)
        import torch

        from locaudit.models.quiet import quiet_libraries
        from locaudit.run.subject import load_subject
        from locaudit.run.worker import Worker
        from locaudit.store.cache import open_cache

        torch.set_num_threads(threads)
        load_plugins(plugins)
        ray = import_extra("ray", "ray")
        shared: Shared = ray.get(parts[0])
        with quiet_libraries():
            model: Model = load_subject(shared.config) if parts[1] is None else ray.get(parts[1])
        if model.fingerprint != fingerprint:
            raise ConfigError(
                got=f"{shared.config.model} with other weights on {where} than where the run was started",
                expected="the same model on every node",
                remedy="copy it to the node, or set ray.weights to send",
            )
        if model.device.type != device:
            raise ConfigError(
                got=f"the model on {model.device.type} on {where}, and on {device} where the run was started",
                expected="the same type of device, because sums differ",
                remedy="set loading.device, or start the run on a node with that device",
            )
        self._folder, self._said = tempfile.TemporaryDirectory(prefix="locaudit-"), []
        edits = Path(self._folder.name)
        self._worker = Worker(replace(shared, model=model, cache=open_cache(), edits=edits), self._said.append)

    def run(
        self, group: Sequence[TrialSpec], saved: dict[str, bytes]
    ) -> tuple[list[tuple[list[Result], float]], list[str]]:
        """The results of each part of the group with their seconds, and what the worker had to say."""
        from locaudit.models.quiet import quiet_libraries

        self._said.clear()
        for name, content in saved.items():
            (self._worker.shared.edits / name).write_bytes(content)
        parts, started, shared = [], time.monotonic(), self._worker.shared
        try:
            with quiet_libraries():
                for results in self._worker.run(group):
                    found = [(record, None if edit is None else edit.copied()) for record, edit in results]
                    parts.append((found, time.monotonic() - started))
                    started = time.monotonic()
        except Exception:
            self._worker.shared = shared  # small batches have not helped this group, and the next may not need them
            raise
        for name in saved:
            (self._worker.shared.edits / name).unlink()
        return parts, list(self._said)


def _cores(config: AuditConfig) -> float:
    """CPU cores of each worker."""
    settings = config.ray
    if settings.cpus_per_worker is not None:
        return settings.cpus_per_worker
    if settings.address is not None or settings.workers is None:
        return 1.0
    return float(max(_n_cores() // settings.workers, 1))


def _n_cores() -> int:
    """Cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _connected(ray: Any, config: AuditConfig) -> Iterator[None]:
    """Connect to the cluster, or start Ray here. A Ray to which the process is connected already is used as it is.

    Raises `ConfigError` if that fails.
    """
    ray_constants = import_extra("ray._private.ray_constants", "ray")
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    before, is_clustered = signal.getsignal(signal.SIGTERM), ray_constants.ENABLE_RAY_CLUSTER
    try:
        if config.ray.address is not None:
            _reach(config.ray.address)
            ray.init(config.ray.address, **options)
        else:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            os.environ.setdefault("RAY_worker_niceness", "0")  # else trials wait for whatever else runs here
            ray_constants.ENABLE_RAY_CLUSTER = False  # only so do its servers bind to 127.0.0.1 on Linux
            n_cpus = None if config.ray.workers is None else math.ceil(config.ray.workers * _cores(config))
            ray.init("local", num_cpus=n_cpus, include_dashboard=False, **options)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray's own would end the program without a word
    except Exception as error:  # Ray raises any kind
        ray.shutdown()
        if isinstance(error, LocauditError):
            raise
        raise ConfigError(
            got=f"Ray, which did not start or connect ({_reason(error)})",
            expected="a working Ray",
            remedy="see its log in /tmp/ray/session_latest/logs; without workers, the audit needs none",
        ) from error
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = is_clustered
    try:
        yield
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raise `ConfigError` if no cluster answers at the address; Ray itself would try for up to a minute."""
    ray, services = import_extra("ray", "ray"), import_extra("ray._private.services", "ray")
    wants_token = filter(None, [getattr(ray.exceptions, "AuthenticationError", None)])  # newer releases have it
    try:
        found = services.canonicalize_bootstrap_address(address) or "no address"
        host, _, port = found.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=CONNECT) as server:
            if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
                server.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))
                if server.recv(1) != b"\0":  # gRPC, which Ray speaks, answers with a frame
                    raise OSError("another kind of server")
        with suppress(*wants_token):  # it is Ray, which says later what it wants
            ray._raylet.GcsClient(address=found)
    except (OSError, ValueError, ray.exceptions.RpcError) as error:
        why = f"no answer within {CONNECT:g} s" if isinstance(error, TimeoutError) else error
        raise ConfigError(
            got=f"ray.address = {address}, where no cluster answers ({why})",
            expected="the address of a running Ray cluster",
            remedy="start one with ray start --head, correct the address, or leave it out for this machine alone",
        ) from None


def _check_nodes(ray: Any) -> None:
    """Raise `ConfigError` that names each node whose packages have other versions than here.

    A node that does not answer in time, or joins later, is checked when a worker starts there.
    """
    on = import_extra("ray.util.scheduling_strategies", "ray").NodeAffinitySchedulingStrategy

    def versions(packages: Sequence[str]) -> dict[str, str]:  # pickled with its code: a node may lack locaudit
        from importlib import metadata, util

        return {name: metadata.version(name) if util.find_spec(name) else "none" for name in packages}

    ask, until, found = ray.remote(num_cpus=0)(versions), time.monotonic() + PATIENCE / 5, {}
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    while (unasked := nodes.keys() - found.keys()) and time.monotonic() < until:
        calls = {id_: ask.options(scheduling_strategy=on(id_, soft=False)).remote(PACKAGES) for id_ in unasked}
        for id_, call in calls.items():
            with suppress(ray.exceptions.RayError):  # it is gone, or a new node of which not all know yet
                found[id_] = ray.get(call, timeout=max(until - time.monotonic(), 0.0))
        time.sleep(0.1)
    names = {id_: f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})" for id_, node in nodes.items()}
    _refuse_versions([(names[id_], theirs) for id_, theirs in found.items()], _versions())


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in PACKAGES}


def _refuse_versions(found: Sequence[tuple[str, Mapping[str, str]]], ours: Mapping[str, str]) -> None:
    """Raise `ConfigError` if a node (name, versions) has others than ours. Several may have the same name."""
    wrong = [
        f"{name} {theirs[name]} on {node}, {version} here"
        for node, theirs in found
        for name, version in ours.items()
        if theirs[name] != version
    ]
    if wrong:
        raise ConfigError(
            got="; ".join(wrong),
            expected="the same versions on every node, because results depend on them",
            remedy="install the same versions on these nodes, and start Ray there again",
        )


def _no_room(got: str) -> ConfigError:
    return ConfigError(
        got=got,
        expected="a node with the cores, memory and GPUs of one worker",
        remedy="lower ray.cpus_per_worker or ray.gpus_per_worker, or add a node, and run the same command again: "
        "finished trials are kept",
    )


def _reason(error: Exception) -> str:
    """The error in a line: its own, or its type and its first line that says something."""
    if isinstance(error, LocauditError):
        return error.line
    lines = [line.strip() for line in str(error).splitlines()]
    said = next((line for line in lines if line and not line.startswith("class_name")), "no reason given")
    return f"{type(error).__name__}: {said[:200]}"
