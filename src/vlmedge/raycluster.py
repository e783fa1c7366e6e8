"""A Ray cluster: connecting to it, the work that it is sent, and its errors in one line."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from typing import Any, Final, TypeAlias

from vlmedge.errors import MissingExtraError, RuntimeFailedError, UsageError

NOBODY: Final = "no node of the Ray cluster offers a CPU; add one (ray start --address ...)"
ANSWERS: Final = 10.0  # seconds that an address has to accept a connection

# Ray reports usage and copies a `uv run` project to the workers unless told; and it asks a port that is no Ray's
# 20 times for 40 s each.
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_NUM_REDIS_GET_RETRIES": "1",
}
_ADDRESS = re.compile(r"(ray://)?(\[[0-9a-fA-F:]+\]|[^\s:/\[\]]+):([0-9]{1,5})")

Ray: TypeAlias = Any  # the module: it is optional, and without types
Node: TypeAlias = "dict[str, Any]"  # as Ray describes it
# (this vlmedge's version, what the target takes) -> what the target returns, JSON.
Errand: TypeAlias = Callable[..., str]


@contextmanager
def connected(address: str, guide: str) -> Iterator[Ray]:
    """The module `ray`, connected to the cluster at HOST:PORT, ray://HOST:PORT or "auto" until the block ends.

    Where this process is connected already, that cluster is used and stays connected. Standard output is silent
    meanwhile: Ray would print the logs of a lost machine there. `guide`: the document that says what the cluster needs.

    Raises MissingExtraError without Ray, UsageError for an address that is none, RuntimeFailedError for a cluster that
    cannot be reached.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ModuleNotFoundError:
        raise MissingExtraError("--ray", "ray") from None
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        if ray.is_initialized():
            yield ray
            return
        _check_address(address)
        try:
            ray.init(address=address, logging_level=logging.CRITICAL, log_to_driver=False)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise RuntimeFailedError(
                f"the Ray cluster at {address} cannot be used: {one_line(error)}; {guide} says what it needs"
            ) from None
        try:
            yield ray
        finally:
            ray.shutdown()


def nodes(ray: Ray) -> list[Node]:
    """Those that live and compute."""
    return [node for node in ray.nodes() if node["Alive"] and cpus(node)]


def cpus(node: Node) -> int:
    """How many it offers."""
    return int(node["Resources"].get("CPU", 0))


def cancel(ray: Ray, tasks: Sequence[Any]) -> None:
    """End the tasks (references) that still run.

    Those that have replied are let be: Ray 2.60 ends this whole process over one that is cancelled just then.
    """
    if tasks:
        _, running = ray.wait(list(tasks), num_returns=len(tasks), timeout=0)
        for task in running:
            ray.cancel(task, force=True)


def errand(target: str, name: str) -> Errand:
    """What Ray runs on a node: the function `target` ("module:function") of the vlmedge there.

    It takes the version of the vlmedge here and then the function's arguments. `name`: as Ray shows it. A node where
    vlmedge is missing or another answers with JSON, `error` (a class of vlmedge.errors) and `text`: Ray sends a nested
    function by value, so it arrives there too.
    """

    def work(version: str, *arguments: Any) -> str:
        import importlib
        import json
        import socket

        node = socket.gethostname()
        try:
            from vlmedge import __version__ as found
        except ModuleNotFoundError:
            found = "none"
        if found != version:
            text = f"the node {node} has vlmedge {found}, this machine {version}: pip install vlmedge=={version} there"
            return json.dumps({"error": "RuntimeFailedError", "text": text})
        module, _, function = target.partition(":")
        answer: str = getattr(importlib.import_module(module), function)(*arguments)
        return answer

    work.__name__ = work.__qualname__ = name
    return work


def failed(error: Exception) -> str:
    """An errand's answer that says what failed, as data: Ray would wrap errors in its own, and cannot pickle all."""
    return json.dumps({"error": type(error).__name__, "text": f"on the node {socket.gethostname()}: {error}"})


def check_file(path: str) -> None:
    """Raises UsageError where an absolute path names nothing on this node."""
    if os.path.isabs(path) and not os.path.exists(path):
        raise UsageError(
            f"there is no {path}; put it in a folder that all nodes share under the same path, "
            "or name a hub or demo source"
        )


def one_line(error: Exception) -> str:
    """The first sentence of what Ray says, which may be a page; of a traceback its end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = lines[-1] if "Traceback" in str(error) else " ".join(lines)
    return re.split(r"(?<=[.!]) |; ", text)[0].rstrip(".")[:300]


def _check_address(address: str) -> None:
    """Refuse at once what Ray would ask for minutes."""
    if address == "auto":
        return
    match = _ADDRESS.fullmatch(address)
    if match is None or int(match[3]) > 65535:
        raise UsageError(f"--ray takes HOST:PORT, ray://HOST:PORT or auto, not '{address}'")
    if match[1] and find_spec("grpc") is None:
        raise UsageError(f"{address} needs Ray's client: pip install 'ray[client]', or give HOST:PORT on a node")
    try:
        socket.create_connection((match[2].strip("[]"), int(match[3])), ANSWERS).close()
    except OSError as error:
        raise RuntimeFailedError(
            f"no Ray cluster answers at {address}: {error.strerror or error}; "
            "start one (ray start --head) or leave out --ray"
        ) from None
