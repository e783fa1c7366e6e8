"""An output is whole or absent: full disks, read-only places, Ctrl-C and kill -9 in the middle of an export."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vlmedge.bundle import open_bundle
from vlmedge.checkpoint import Checkpoint, Source
from vlmedge.errors import OutputError
from vlmedge.families import FAMILIES
from vlmedge.staging import staged

WIDE = {"dim": 1024, "n_heads": 16, "n_kv_heads": 16, "ff_dim": 4096, "n_layers": 24}


@pytest.fixture(params=["gguf", "onnx"])
def output(request, golden, tmp_path):
    """The words of an export of the golden checkpoint to a place, in one format and the other."""

    def words(out: Path, profile: str = "--f32") -> list[object]:
        return ["export", golden, "--format", request.param, profile, "--no-verify", "--threads", 1, "--out", out]

    return words


def test_an_output_that_exists(refused, output, tmp_path):
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("kept", "link", "."):
        assert f"{tmp_path / name} exists; remove it or choose another --out" in refused(*output(tmp_path / name))
    assert sorted(os.listdir(tmp_path)) == ["kept", "link"]
    assert (tmp_path / "kept").read_text() == "kept"


@pytest.mark.parametrize("place", ["/proc/x/y", "/dev/null/x", "/sys/x", "/dev/full/a/b"])
def test_an_output_where_nothing_can_be_written(refused, output, place):
    line = refused(*output(Path(place)))
    assert "cannot be written" in line


def test_an_output_with_a_name_too_long(refused, output, tmp_path):
    assert "cannot be written" in refused(*output(tmp_path / ("x" * 250)))
    assert "cannot be written" in refused(*output(tmp_path / ("x" * 300)))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """A folder on a disk of 1 MB; where mounting is not permitted, a folder whose writes fail after 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    mounted = (
        mount
        and not subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
        ).returncode
    )
    if not mounted:
        left = [1 << 20]
        write = os.pwrite

        def pwrite(file: int, data: bytes, offset: int) -> int:
            left[0] -= len(data)
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(file, data, offset)

        monkeypatch.setattr(os, "pwrite", pwrite)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    yield folder
    if mounted:
        subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_too_small_is_refused_at_once(refused, output, small_disk):
    line = refused(*output(small_disk / "x"))
    assert "1.0 MB free, the export needs 5." in line
    assert line.endswith(" MB; free some space or choose another --out\n")
    assert list(small_disk.iterdir()) == []


def test_what_is_refused_leaves_no_parents(refused, output, small_disk):
    (small_disk / "kept").mkdir()
    for out in (small_disk / "new/deep/x", small_disk / "kept/new/x"):
        assert "MB free" in refused(*output(out))
    assert [str(p.relative_to(small_disk)) for p in small_disk.rglob("*")] == ["kept"]


@pytest.mark.parametrize("name", ["photo.jpg/x", "photo.jpg/a/b"])
def test_an_output_inside_a_file(refused, output, tmp_path, name):
    (tmp_path / "photo.jpg").write_text("kept")
    reason = f"{tmp_path / 'photo.jpg'} is not a folder; choose another --out"
    assert refused(*output(tmp_path / name)) == f"vlmedge: {tmp_path / name} cannot be written: {reason}\n"
    assert (tmp_path / "photo.jpg").read_text() == "kept"


def test_a_disk_that_fills_up_in_the_middle(refused, output, small_disk, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 40))
    assert "is full" in refused(*output(small_disk / "x"))
    assert list(small_disk.iterdir()) == []


def test_an_error_in_the_middle_leaves_nothing(tmp_path):
    def half() -> None:
        with staged(tmp_path / "x", 0) as folder:
            (folder / "sub").mkdir()
            (folder / "sub/file").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half()
    assert list(tmp_path.iterdir()) == []


def test_what_appears_is_whole(tmp_path):
    with staged(tmp_path / "deep/x", 0) as folder:
        (folder / "file").write_text("whole")
        assert not (tmp_path / "deep/x").exists()
    assert (tmp_path / "deep/x/file").read_text() == "whole"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x"]


def test_files_are_open_for_writing_when_they_are_flushed(tmp_path, monkeypatch):
    """Windows refuses any other."""
    flushed = []

    def windows(handle: int) -> None:
        if stat.S_ISREG(os.fstat(handle).st_mode):
            flushed.append(handle)
            if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(os, "fsync", windows)
    with staged(tmp_path / "x", 0) as folder:
        (folder / "sub").mkdir()
        (folder / "sub/file").write_text("whole")
    assert len(flushed) == 1
    assert (tmp_path / "x/sub/file").read_text() == "whole"


def test_two_exports_to_one_place(tmp_path):
    with staged(tmp_path / "x", 0) as folder:
        (folder / "file").write_text("first")
        with pytest.raises(OutputError, match="another export is writing"), staged(tmp_path / "x", 0):
            raise AssertionError("the second must not begin")
        assert (folder / "file").read_text() == "first"
    assert (tmp_path / "x/file").read_text() == "first"


# ---- a process of its own, hit in the middle ----------------------------------------------------------------------


def begun(file: Path) -> bool:
    """Are there weights in the file? It has its full size from the start; blocks come with what is written."""
    return file.exists() and file.stat().st_blocks * 512 > 2_000_000


@pytest.fixture
def hollow(golden, tmp_path) -> Any:
    """A checkpoint of 330 million weights that are a hole in a file: zeros that take no space."""
    folder = tmp_path / "big"
    folder.mkdir()
    shutil.copy(golden / "tokenizer.json", folder)
    config = json.loads((golden / "config.json").read_text())
    config["config"]["text"] |= WIDE
    config["config"]["vision"]["proj_out_dim"] = config["config"]["region"]["dim"] = WIDE["dim"]
    (folder / "config.json").write_text(json.dumps(config))
    family = FAMILIES["moondream2"]
    table = family.weights(family.spec(Checkpoint(Source("big"), folder, config, {})))
    shapes: dict[str, list[int]] = {}
    for name, shape in table.expected.items():
        source = table.source_of(name)
        shapes[source] = [shape[0] + shapes.get(source, [0])[0], *shape[1:]]
    header, end = {}, 0
    for source, whole in shapes.items():
        begin, end = end, end + 2 * math.prod(whole)
        header[source] = {"dtype": "BF16", "shape": whole, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


@pytest.fixture
def long_export(hollow, tmp_path):
    """A process that has begun to write the bundle `tmp_path/place/x` and needs seconds more."""
    out = tmp_path / "place/x"
    words = ["export", hollow, "--format", "gguf", "--q4", "--no-verify", "--threads", "1", "--out", out]
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "vlmedge", *words],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A shell that starts this test in the background has SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not begun(out.parent / ".x.partial/text.gguf"):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield process, out
    process.kill()
    process.communicate()


def test_ctrl_c_in_the_middle(long_export):
    process, out = long_export
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    assert stderr == "vlmedge: interrupted; nothing was left behind\n"
    assert not out.parent.exists()  # it was made for this
    assert time.monotonic() - started < 20


def test_kill_in_the_middle(long_export, succeed, output):
    process, out = long_export
    process.kill()
    process.communicate(timeout=60)
    assert [p.name for p in out.parent.iterdir()] == [".x.partial"]
    left = {p.name for p in (out.parent / ".x.partial").iterdir()}
    assert {"text.gguf", "mmproj.gguf", "heads.gguf"} == left
    succeed(*output(out))
    assert [p.name for p in out.parent.iterdir()] == ["x"]
    open_bundle(out).check()
