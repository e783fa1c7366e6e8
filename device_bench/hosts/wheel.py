"""This very vlmedge as a wheel, so that another machine runs the same code: also from a source tree, also changed."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Final

from vlmedge import __version__

NAME: Final = f"vlmedge-{__version__}-py3-none-any.whl"
# In a source tree the last three lie elsewhere (docs/architecture.md); installed, all are in the first.
_PACKAGES = ("vlmedge", "vlmedge.exporters", "vlmedge.quant_profiles", "vlmedge.device_bench")
_INFO = f"vlmedge-{__version__}.dist-info"
_WHEEL = "Wheel-Version: 1.0\nGenerator: vlmedge\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@cache
def build_wheel() -> bytes:
    """The wheel's bytes, the same for the same files. `NAME` is its file name; pip installs it and what it requires.

    Built once in a process: all machines of a run get the same.
    """
    members = dict(_members())
    members[f"{_INFO}/METADATA"] = _metadata().encode()
    members[f"{_INFO}/WHEEL"] = _WHEEL.encode()
    record = [f"{name},sha256={_digest(data)},{len(data)}\n" for name, data in sorted(members.items())]
    members[f"{_INFO}/RECORD"] = "".join([*record, f"{_INFO}/RECORD,,\n"]).encode()
    out = BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in sorted(members.items()):
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED, 1)
    return out.getvalue()


def _members() -> Iterator[tuple[str, bytes]]:
    for package in _PACKAGES:
        spec = find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file() and path.suffix != ".pyc":
                    yield f"{package.replace('.', '/')}/{path.relative_to(folder).as_posix()}", path.read_bytes()


def _metadata() -> str:
    """As it is installed here, or as it was built in a source tree: it names what vlmedge requires."""
    try:
        found = distribution("vlmedge")
        text = found.read_text("METADATA") or found.read_text("PKG-INFO")
    except PackageNotFoundError:
        text = None
    return text or f"Metadata-Version: 2.1\nName: vlmedge\nVersion: {__version__}\n"


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
