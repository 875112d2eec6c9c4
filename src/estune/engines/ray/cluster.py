"""Connect to a Ray cluster, or start one on this machine that ends with this process, also if it is killed.

Ray leaves helper processes and a session directory behind when the process that started it is killed. A cluster that
estune starts lives in a directory of its own. A small process (`watch`, this file as a script) kills the processes of
the cluster that are left, and deletes the directory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OBJECT_STORE_BYTES = 80 << 20  # bytes; messages are small, and weights never travel
LONGEST_PLACE = 24  # characters; Ray's sockets lie 80 characters deeper, and their paths are limited to 107
REACH_S = 5.0  # seconds to wait for a connection to a cluster's address
END_S = 10.0  # seconds in which the processes of a cluster must have ended
TRACKER = b"resource_tracker"  # in the command of the process that multiprocessing starts to clean up
MARK = "ESTUNE_RAY_DIRECTORY"  # variable that all processes of a cluster of ours have
CURRENT = Path("/tmp/ray/ray_current_cluster")  # where `ray start` writes the address of this machine's cluster
# Variables while a cluster starts; values that the user has set stay.
VARIABLES = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_AUTH_MODE": "disabled"}


@dataclass(frozen=True, slots=True)
class Limits:
    """The number of workers of a run, and what each may use."""

    workers: int
    resources: Mapping[str, float]  # of each worker, by Ray's names: CPU, GPU, ...
    silence_s: float  # seconds without progress after which a worker is replaced


@dataclass
class Cluster:
    """A connection to a cluster; `close` ends it, and the cluster if this process started it."""

    is_connected_here: bool  # whether this connection is ours, and not the program's
    watcher: subprocess.Popen[bytes] | None = None  # of a cluster that this process started
    users: int = 1  # callers of `connect` that have not closed it

    def close(self) -> None:
        """End the connection when its last user has closed it; then wait until nothing is left of our own cluster."""
        import ray

        global _current
        self.users -= 1
        if self.users > 0:
            return
        _current = None
        if self.is_connected_here:
            ray.shutdown()
        if self.watcher is not None:
            assert self.watcher.stdin is not None
            self.watcher.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.watcher.wait(2 * END_S)


_current: Cluster | None = None  # the connection of this process


def connect(limits: Limits) -> Cluster:
    """Use the program's connection, else the cluster of RAY_ADDRESS or of this machine, else start a cluster.

    Every caller must close the result.

    Raises:
        UserError: the cluster cannot be reached, or it lacks resources.
    """
    import ray

    from estune.errors import UserError

    global _current
    if ray.is_initialized() and _current is not None:
        cluster = _current
        cluster.users += 1
    elif ray.is_initialized():
        cluster = Cluster(is_connected_here=False)
    elif address := _address():
        with _variables({"RAY_USAGE_STATS_ENABLED": "0"}), _unchanged_process():
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            except Exception as error:  # ConnectionError, RuntimeError, ValueError: by version and transport
                raise UserError(f"Ray's cluster at {address} cannot be used: {str(error).splitlines()[0]}") from error
        cluster = Cluster(is_connected_here=True)
    else:
        cluster = _start()
    _current = cluster
    try:
        refuse_missing(limits)
    except UserError:
        cluster.close()
        raise
    return cluster


def refuse_missing(limits: Limits) -> None:
    """Raise UserError if the cluster's nodes do not have the resources of all workers; name what is missing."""
    import ray

    from estune.errors import UserError

    wanted = dict(limits.resources)
    every: Any = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = [node["Resources"] for node in every if node["Alive"]]
    fits = sum(min((int(node.get(n, 0) / v + 1e-9) for n, v in wanted.items() if v), default=1) for node in nodes)
    if fits >= limits.workers:
        return
    have = {name: sum(node.get(name, 0) for node in nodes) for name in wanted}
    missing = [f"{v * limits.workers:g} {n} for {have[n]:g}" for n, v in wanted.items() if v * limits.workers > have[n]]
    each = ", ".join(f"{value:g} {name}" for name, value in wanted.items())
    raise UserError(
        f"{limits.workers} workers need {each} each, and the cluster ({len(nodes)} nodes) has room for {fits}"
        + (f": it would need {', '.join(missing)}" if missing else ", because no node has them together")
        + '; lower num_workers, or worker_resources such as {"CPU": 0.5}'
    )


def _start() -> Cluster:
    """Start a cluster on this machine."""
    import ray

    from estune import environment
    from estune.errors import UserError

    place = tempfile.gettempdir()
    directory = tempfile.mkdtemp(prefix="estune-ray-", dir=place if len(place) <= LONGEST_PLACE else "/tmp")
    watcher = subprocess.Popen(
        [sys.executable, "-I", __file__, directory],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    cluster = Cluster(is_connected_here=True, watcher=watcher)
    options: dict[str, Any] = dict(
        num_cpus=environment.cores(),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=OBJECT_STORE_BYTES,
        _temp_dir=directory,
    )
    with _variables({**VARIABLES, MARK: directory}), _unchanged_process():
        try:
            ray.init(**options)
        except Exception as error:
            cluster.close()
            raise UserError(f"Ray cannot start on this machine: {str(error).splitlines()[0]}") from error
    return cluster


def _address() -> str | None:
    """Return the address in RAY_ADDRESS, or that of the cluster that `ray start` has started on this machine; or None.

    Raises:
        UserError: nothing listens at the address in RAY_ADDRESS.
    """
    from estune.console import note
    from estune.errors import UserError

    given = os.environ.get("RAY_ADDRESS")
    if given:
        if problem := _unreachable(given):
            raise UserError(
                f"Ray's cluster at {given} cannot be reached ({problem}): start it with `ray start --head`, or unset "
                "RAY_ADDRESS to run on this machine"
            )
        return given
    found = CURRENT.read_text().strip() if CURRENT.exists() else ""
    if found and (problem := _unreachable(found)):
        note(f"{CURRENT} names a cluster at {found} that cannot be reached ({problem}); a cluster of this run starts")
        return None
    return found or None


def _unreachable(address: str) -> str | None:
    """Return why nothing can be reached at ``host:port``, or None; Ray itself judges addresses of other forms."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return None
    try:
        socket.create_connection((host, int(port)), REACH_S).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


@contextlib.contextmanager
def _unchanged_process() -> Iterator[None]:
    """Keep what Ray would replace in this process: `print`, and the handler of SIGTERM.

    ``ray.init`` replaces the handler in the main thread. `print` is replaced with the first output of a worker, unless
    the object that shows such output exists before and was told not to.
    """
    from ray.experimental import tqdm_ray

    with _variables({"RAY_TQDM_PATCH_PRINT": "0"}):
        tqdm_ray.instance()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError, TypeError):
            signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _variables(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables that are not set, within a block."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def watch(directory: str) -> None:
    """Wait until the process that started this one has ended or closed its pipe; then end the cluster's processes.

    The directory is deleted when no process of the cluster is left.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdin.buffer.read()
    until = time.monotonic() + END_S
    while (left := _processes_of(directory)) and time.monotonic() < until:
        has_time = time.monotonic() < until - END_S / 2
        for process, command in left.items():
            if has_time and TRACKER in command:
                continue  # it removes the shared memory of the processes that it watches, then ends
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.1)
    shutil.rmtree(directory, ignore_errors=True)


def _processes_of(directory: str) -> dict[int, bytes]:
    """Return the commands of processes with the cluster's directory in environment or command, and of their children.

    The result has the process's number as key.
    """
    parents: dict[int, int] = {}
    commands: dict[int, bytes] = {}
    found: set[int] = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            command = (entry / "cmdline").read_bytes()
            texts = (entry / "environ").read_bytes() + command
            stat = (entry / "stat").read_text().rpartition(")")[2].split()
            if stat[0] == "Z":
                continue
            parents[int(entry.name)], commands[int(entry.name)] = int(stat[1]), command
            if directory.encode() in texts:
                found.add(int(entry.name))
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return {process: commands[process] for process in found}


if __name__ == "__main__":
    watch(sys.argv[1])
