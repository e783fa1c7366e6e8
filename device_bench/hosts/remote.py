"""What `ssh` runs on the far machine, as the text of `python3 -I -c`: the standard library alone, files in one folder.

    probe FOLDER                 make the folder; print {"version": [3, 11, 2], "folder": its full path, "venv": bool}
    missing FOLDER               read [[name, bytes], ...] from stdin; print the names that are not there in that size
    put FOLDER NAME BYTES HASH   read a file from stdin; keep it when size and SHA-256 are right
    unpack FOLDER NAME PLACE     unpack a wheel that was put there
    lacks MODULE ...             print those that cannot be imported

Each prints one line of JSON. An error is one line on stderr, and the exit code 1.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Callable
from typing import Any


def probe(folder: str) -> dict[str, Any]:
    """Make the folder, for its owner alone."""
    path = os.path.abspath(os.path.expanduser(folder))
    os.makedirs(path, mode=0o700, exist_ok=True)
    return {
        "version": list(sys.version_info[:3]),
        "folder": path,
        "venv": os.path.exists(os.path.join(path, "venv", "bin", "python")),
    }


def missing(folder: str) -> list[str]:
    """Files appear whole under their names (`put`), so the size tells enough."""
    return [name for name, size in json.load(sys.stdin) if _size(os.path.join(folder, name)) != size]


def put(folder: str, name: str, size: str, digest: str) -> bool:
    """Read exactly so many bytes into a neighbour of the file, and rename it."""
    path = os.path.join(folder, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part = f"{path}.{os.getpid()}.part"
    try:
        with open(part, "wb") as file:
            found = _receive(file, int(size))
            file.flush()
            os.fsync(file.fileno())
        if found != digest:
            raise OSError(f"{name} arrived changed or cut off")
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)
    return True


def unpack(folder: str, name: str, place: str) -> bool:
    """Unpack beside the place, and rename; who comes second finds it there."""
    path = os.path.join(folder, place)
    part = f"{path}.{os.getpid()}.part"
    if not os.path.isdir(path):
        with zipfile.ZipFile(os.path.join(folder, name)) as archive:
            archive.extractall(part)
        try:
            os.rename(part, path)
        except OSError:
            shutil.rmtree(part)
            if not os.path.isdir(path):
                raise
    return True


def lacks(*modules: str) -> list[str]:
    """Those that are not installed for this Python."""
    return [name for name in modules if importlib.util.find_spec(name) is None]


def _receive(file: Any, left: int) -> str:
    digest = hashlib.sha256()
    while left:
        block = sys.stdin.buffer.read(min(left, 1 << 20))
        if not block:
            break
        digest.update(block)
        file.write(block)
        left -= len(block)
    return digest.hexdigest()


def _size(path: str) -> int:
    return os.path.getsize(path) if os.path.isfile(path) else -1


def main(verb: str, arguments: list[str]) -> int:
    """Do one of the five."""
    verbs: dict[str, Callable[..., Any]] = {
        "probe": probe,
        "missing": missing,
        "put": put,
        "unpack": unpack,
        "lacks": lacks,
    }
    try:
        done = verbs[verb](*arguments)
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        print(f"{error.strerror or error}{place}", file=sys.stderr)  # noqa: T201
        return 1
    print(json.dumps(done))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
