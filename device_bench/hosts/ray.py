"""The nodes of a Ray cluster as hosts: a job is a task that has all CPUs of its node, so that nothing shares them."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from vlmedge import __version__
from vlmedge.device_bench.hosts.files import renamed
from vlmedge.device_bench.hosts.host import Host, Output, Units, machine_at
from vlmedge.device_bench.hosts.local import UNITS, UNITS_TIME, WORKER, job_line
from vlmedge.device_bench.hosts.process import run_guarded
from vlmedge.device_bench.job import Job
from vlmedge.device_bench.outcome import read_reply, read_units
from vlmedge.device_bench.result import Reply
from vlmedge.errors import RuntimeFailedError, VlmedgeError
from vlmedge.loading import local_folder
from vlmedge.raycluster import NOBODY, Node, Ray, cancel, check_file, connected, cpus, errand, failed, nodes, one_line
from vlmedge.records import decode

GUIDE: Final = "docs/bench.md"
PATIENCE: Final = 600.0  # seconds beyond a job's own time: other work may have the node's CPUs


@contextmanager
def ray_hosts(address: str, command: Sequence[str] = ()) -> Iterator[list[Host]]:
    """Each living node of the cluster at HOST:PORT, ray://HOST:PORT or "auto" as a host, until the block ends.

    `command`: another worker than vlmedge's. Raises what `raycluster.connected` raises, and RuntimeFailedError where no
    node computes.
    """
    with connected(address, GUIDE) as ray:
        found = nodes(ray)
        if not found:
            raise RuntimeFailedError(NOBODY)
        yield [RayHost(ray, node, *names, command) for node, names in zip(found, _names(found), strict=True)]


class RayHost:
    """One node. Models lie in a folder that all nodes share, or have a name that each can open; pictures go along."""

    def __init__(self, ray: Ray, node: Node, name: str, address: str, command: Sequence[str] = ()) -> None:
        pinned = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        gpus = node["Resources"].get("GPU", 0)
        work = errand("vlmedge.device_bench.hosts.ray:run_there", "bench")
        self._task = ray.remote(num_cpus=cpus(node), num_gpus=gpus, max_retries=0, scheduling_strategy=pinned)(work)
        self._ray = ray
        self._name, self._address = name, address
        self._command = list(command)

    @property
    def name(self) -> str:
        """As it stands in records."""
        return self._name

    @property
    def machine(self) -> str:
        """By its address: several nodes may be one machine's."""
        return machine_at(self._address, f"ray {self._address}")

    def open(self) -> None:
        """The cluster is connected already."""

    def units(self) -> Units:
        """What can compute there. Raises RuntimeFailedError where the worker does not tell, or the node is gone."""
        output = self._send("", UNITS_TIME, {})
        if isinstance(output, Reply):
            raise RuntimeFailedError(output.reason)
        return read_units(output, timeout=UNITS_TIME)

    def run(self, job: Job, timeout: float) -> Reply:
        """Run the job there in a fresh process, under `guard`: it ends with its task."""
        folder = local_folder(job.variant.source) if job.variant else None
        if job.variant and folder is not None:
            job = renamed(job, {job.variant.source: os.path.abspath(folder)})
        try:
            files = {name: Path(name).read_bytes() for name in _carried(job)}
        except OSError as error:
            return Reply("failed", f"{error.filename} cannot be read: {error.strerror}")
        output = self._send(job_line(job), timeout, files)
        return output if isinstance(output, Reply) else read_reply(output, timeout=timeout)

    def close(self) -> None:
        """Nothing was kept."""

    def _send(self, line: str, timeout: float, files: Mapping[str, bytes]) -> Output | Reply:
        """How the process there ended, or why there was none."""
        errors = self._ray.exceptions
        try:
            reference = self._task.remote(__version__, line, timeout, self._command, files)
            answer = json.loads(self._waited(reference, timeout + PATIENCE))
        except errors.GetTimeoutError:
            return Reply("lost", f"{self._name} did not answer; other work has its CPUs, or it is cut off")
        except errors.OutOfMemoryError:
            return Reply("out_of_memory", f"Ray ended the job because {self._name} ran out of memory")
        except errors.RayTaskError as error:
            return Reply("failed", f"{self._name}: {one_line(error)}")
        except errors.RayError as error:
            return Reply("lost", f"{self._name} was lost: {one_line(error)}")
        return Reply("failed", answer["text"]) if "error" in answer else Output(**answer)

    def _waited(self, reference: Any, timeout: float) -> str:
        try:
            answer: str = self._ray.get(reference, timeout=timeout)
        except (self._ray.exceptions.GetTimeoutError, KeyboardInterrupt):
            cancel(self._ray, [reference])
            raise
        return answer


def run_there(line: str, timeout: float, command: list[str], files: Mapping[str, bytes]) -> str:
    """What runs on a node: the worker, for a job or, without one, for its units.

    `files`: pictures and truth, by the names that the job has for them. Returns JSON: `Output`, or `error` and `text`.
    """
    worker = command or [sys.executable, *WORKER]
    # Ray sets it to the task's CPUs, which a machine that runs no Ray does not.
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    try:
        if not line:
            return json.dumps(asdict(run_guarded([*worker, UNITS], "", timeout, env)))
        job = decode(Job, json.loads(line), "the job")
        if job.variant:
            check_file(job.variant.source)
        with TemporaryDirectory(prefix="vlmedge-") as folder:
            line = job_line(renamed(job, _unpacked(files, Path(folder))))
            return json.dumps(asdict(run_guarded(worker, line, timeout, env)))
    except VlmedgeError as error:
        return failed(error)


def _carried(job: Job) -> set[str]:
    return {ask.picture for ask in job.work.asks} | ({job.truth} if job.truth else set())


def _unpacked(files: Mapping[str, bytes], folder: Path) -> dict[str, str]:
    """Write them; their names there."""
    names = {}
    for index, (name, data) in enumerate(files.items()):
        path = folder / str(index) / Path(name).name
        path.parent.mkdir()
        path.write_bytes(data)
        names[name] = str(path)
    return names


def _names(found: Sequence[Node]) -> list[tuple[str, str]]:
    """Of each node its name and its machine's: what `ray start` was given, or its address.

    Nodes of one machine share that, and have their id behind it.
    """
    addresses = [str(node.get("NodeName") or node["NodeManagerAddress"]) for node in found]
    count = Counter(addresses)
    return [
        (f"ray {address}" if count[address] == 1 else f"ray {address} {node['NodeID'][:8]}", address)
        for address, node in zip(addresses, found, strict=True)
    ]
