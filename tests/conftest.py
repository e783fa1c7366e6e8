"""What tests share: the golden checkpoint, one bundle of it, the command line in this process, and small forgeries."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from vlmedge.cli import main

GOLDEN = Path(__file__).parent / "data/moondream2/tiny-mha"
IMAGES = Path(__file__).parent / "data/moondream2/images"


def pytest_report_header() -> str:
    found = []
    for package in ("torch", "llama-cpp-python", "pillow", "tokenizers"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


@dataclass(frozen=True)
class Done:
    """What a command line left behind."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """The one JSON object on stdout."""
        assert self.out.count("\n") == 1
        return json.loads(self.out)


@pytest.fixture
def cli(capfd) -> Callable[..., Done]:
    """Run a command line in this process: `cli("run", bundle, picture)`. Native libraries' output is caught too."""

    def run(*arguments: object) -> Done:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return Done(int(stop.value.code or 0), out, err)

    return run


@pytest.fixture
def succeed(cli) -> Callable[..., Done]:
    """Run a command line that must succeed."""

    def run(*arguments: object) -> Any:
        done = cli(*arguments)
        assert done.code == 0, done.err
        return done

    return run


@pytest.fixture
def refused(cli) -> Callable[..., str]:
    """Run a command line that must fail with one line on stderr; return that line."""

    def run(*arguments: object, code: int = 1) -> str:
        done = cli(*arguments)
        assert done.code == code, done
        assert done.out == ""
        return one_line(done.err)

    return run


def one_line(err: str) -> str:
    """Check that stderr is one line of ours, and return it."""
    assert err.startswith("vlmedge: "), err
    assert err.endswith("\n"), err
    assert err.count("\n") == 1, err
    return err


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def photo() -> Path:
    """A picture that is one crop."""
    return IMAGES / "small.png"


@pytest.fixture(scope="session")
def bundle(tmp_path_factory) -> Path:
    """The golden checkpoint as GGUF f32, not verified; not to be written to."""
    from vlmedge.pipeline import export

    out = tmp_path_factory.mktemp("bundle") / "golden.gguf"
    return export(GOLDEN, "gguf", "f32", out, verify=False, threads=1).path


@pytest.fixture
def bundle_copy(bundle, tmp_path) -> Path:
    """A bundle to be damaged."""
    return Path(shutil.copytree(bundle, tmp_path / "copy.gguf"))


class Forgery:
    """A checkpoint folder to be changed: `config` (a dict), `header` and `data` of model.safetensors; then `write`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(GOLDEN, folder, ignore=shutil.ignore_patterns("fp32", "*.npz", "results*"))
        self.config = json.loads((folder / "config.json").read_text())
        raw = (folder / "model.safetensors").read_bytes()
        size = int.from_bytes(raw[:8], "little")
        self.header: dict[str, Any] = json.loads(raw[8 : 8 + size])
        self.data = raw[8 + size :]

    def write(self) -> Path:
        (self.folder / "config.json").write_text(json.dumps(self.config))
        header = json.dumps(self.header).encode()
        (self.folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + self.data)
        return self.folder


@pytest.fixture
def forgery(tmp_path) -> Forgery:
    return Forgery(tmp_path / "checkpoint")


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the disk take so many writes, and be full then."""
    left, pwrite = [0], os.pwrite

    def write(fd: int, data: bytes, offset: int) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", write)
    return lambda n: left.__setitem__(0, n)
