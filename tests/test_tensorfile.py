"""The safetensors reader: right values, lazily, and one clear line for every way in which a file can lie."""

from __future__ import annotations

import _thread
import collections
import contextlib
import gc
import json
import operator
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from vlmedge import tensorfile
from vlmedge.errors import CheckpointError
from vlmedge.tensorfile import open_safetensors


def _write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def _entry(
    dtype: object = "F32", shape: object = (2, 3), offsets: object = (0, 24), **more: object
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def _refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        open_safetensors(path)
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    assert path.name in text
    return text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("positional", [True, False])  # False is how it reads on Windows
def test_values_equal_torchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, positional: bool):
    monkeypatch.setattr(tensorfile, "_POSITIONAL", positional)
    monkeypatch.setattr(tensorfile, "_READ", 1000)  # many short reads
    random = torch.Generator().manual_seed(0)
    stored = {
        "matrix": torch.randn(37, 53, generator=random).to(dtype),
        "vector": torch.randn(11, generator=random).to(dtype),
        "patch": torch.randn(4, 3, 2, 2, generator=random).to(dtype),
        "scalar": torch.tensor(2.5).to(dtype),
        "edges": torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-7, 3e4]).to(dtype),
        "empty": torch.empty(0, 4).to(dtype),
    }
    save_file(stored, tmp_path / "model.safetensors")
    found = open_safetensors(tmp_path / "model.safetensors")
    assert found.keys() == stored.keys()
    for name, tensor in found.items():
        want = stored[name].float().numpy()
        assert tensor.shape == want.shape
        np.testing.assert_array_equal(tensor.read(), want)
    np.testing.assert_array_equal(found["matrix"].read_rows(5, 9), stored["matrix"].float().numpy()[5:9])
    blocks = list(found["matrix"].blocks(elements=120))
    assert [b.shape for b in blocks] == [(2, 53)] * 18 + [(1, 53)]
    np.testing.assert_array_equal(np.concatenate(blocks), stored["matrix"].float().numpy())


def test_the_order_is_that_of_the_data(tmp_path: Path):
    header = {"late": _entry(offsets=(24, 48)), "early": _entry(offsets=(0, 24)), "__metadata__": {"format": "pt"}}
    assert list(open_safetensors(_write(tmp_path / "m.safetensors", header, bytes(48)))) == ["early", "late"]


def test_other_dtypes_may_stand_beside_the_weights_but_not_be_weights(tmp_path: Path):
    header = {
        "ids": _entry("I64", (1, 3)),
        "mask": _entry("BOOL", (6,), (24, 30)),
        "w": _entry("F8_E4M3", (2,), (30, 32)),
    }
    found = open_safetensors(_write(tmp_path / "m.safetensors", header, bytes(32)))
    assert [t.dtype for t in found.values()] == ["i64", "bool", "f8_e4m3"]
    with pytest.raises(
        CheckpointError, match=r"m\.safetensors: 'w' has the dtype F8_E4M3; weights must be F32, F16, BF16"
    ):
        found["w"].read()


HUGE = 10**30
LIES: dict[str, tuple[Any, str]] = {
    "not a table": ([1, 2], "not a table"),
    "a number": (5, "not a table"),
    "no dtype": ({"w": {"shape": [2, 3], "data_offsets": [0, 24]}}, "not a dtype"),
    "entry is a list": ({"w": [1]}, "not a dtype"),
    "entry is null": ({"w": None}, "not a dtype"),
    "dtype is a number": ({"w": _entry(dtype=3)}, "not a dtype"),
    "unknown dtype": ({"w": _entry(dtype="F7")}, "unknown dtype 'F7'; weights must be F32, F16, BF16"),
    "shape is text": ({"w": _entry(shape="23")}, "not a dtype"),
    "shape of floats": ({"w": _entry(shape=[2.0, 3.0])}, "not a dtype"),
    "shape of truths": ({"w": _entry(shape=[True, 6])}, "not a dtype"),
    "negative shape": ({"w": _entry(shape=[-2, -3])}, "not a dtype"),
    "shape overflow": ({"w": _entry(shape=[1 << 40, 1 << 40])}, "is damaged: 'w' of shape"),
    "shape beyond 64 bits": ({"w": _entry(shape=[HUGE, 0], offsets=[0, 0])}, "not a dtype"),
    "too many axes": ({"w": _entry(shape=[1] * 1000 + [6])}, "not a dtype"),
    "one offset": ({"w": _entry(offsets=[0])}, "two offsets"),
    "three offsets": ({"w": _entry(offsets=[0, 24, 24])}, "two offsets"),
    "negative offset": ({"w": _entry(offsets=[-24, 0])}, "two offsets"),
    "offsets swapped": ({"w": _entry(offsets=[24, 0])}, "its offsets hold -24"),
    "size mismatch": ({"w": _entry(shape=[2, 4])}, "needs 32 bytes, its offsets hold 24"),
    "beyond the file": ({"w": _entry(shape=[1000], offsets=[0, 4000])}, "truncated: 'w' ends at byte"),
    "far beyond the file": ({"w": _entry(shape=[1 << 60], offsets=[0, 1 << 62])}, "truncated: 'w' ends at byte"),
    "overlap": ({"a": _entry(), "b": _entry("F16", (2,), (20, 24))}, "the data of 'a' and 'b' overlap"),
    "the same place": ({"a": _entry(), "b": _entry()}, "overlap"),
    "hole": (
        {"a": _entry("F16", (2,), (0, 4)), "b": _entry("F16", (2,), (20, 24))},
        "16 bytes before 'b' belong to nothing",
    ),
    "hole in front": ({"a": _entry("F16", (2,), (20, 24))}, "20 bytes before 'a'"),
    "rest": ({"a": _entry("F16", (2,), (0, 4))}, "24 bytes of data, the header describes 4"),
    "a very long name": ({"n" * 100_000: 1}, "not a dtype"),
    "a name of two lines": ({"a\nb": 1}, "'a\\\\nb'"),
    "twice": (b'{"w": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}, "w": 1}', "the key 'w' stands twice"),
    "twice inside": (b'{"w": {"dtype": "F32", "dtype": "F16", "shape": [6], "data_offsets": [0, 24]}}', "stands twice"),
    "no JSON": (b"{'w'}", "damaged header"),
    "not UTF-8": (b'{"\xff": 1}', "damaged header"),
    "UTF-16": ("{}".encode("utf-16"), "damaged header"),
    "deep": (b"[" * 200_000, "damaged header"),
    "empty header": (b"", "damaged header"),
    "an endless number": (b'{"w": ' + b"9" * 100_000 + b"}", r"(damaged header|not a dtype)"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies(tmp_path: Path, lie: str):
    header, words = LIES[lie]
    text = _refused(_write(tmp_path / "m.safetensors", header, bytes(24)))
    with pytest.raises(CheckpointError, match=words):
        open_safetensors(tmp_path / "m.safetensors")
    assert len(text) < 500


@pytest.mark.parametrize("length", [(1 << 64) - 1, 1 << 40, 200_000_000, 1000])
def test_a_header_length_that_lies(tmp_path: Path, length: int):
    assert f"its header claims {length}" in _refused(_write(tmp_path / "m.safetensors", {}, length=length))


def test_every_truncation_is_noticed(tmp_path: Path):
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(5, 3), "b": torch.ones(4)}, path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        _refused(path)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_flipped_bytes_never_escape(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    path = tmp_path_factory.mktemp("flip") / "m.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4)}, path)
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    found = {}
    with contextlib.suppress(CheckpointError):
        found = open_safetensors(path)
    for tensor in found.values():
        if tensor.dtype in ("f32", "f16", "bf16"):
            assert tensor.read().shape == tensor.shape


def test_what_is_no_file(tmp_path: Path):
    (tmp_path / "empty.safetensors").touch()
    assert "only 0 bytes" in _refused(tmp_path / "empty.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    assert "is not a file" in _refused(tmp_path / "folder.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert "is not a file" in _refused(tmp_path / "pipe.safetensors")
    assert "cannot be opened: No such file" in _refused(tmp_path / "absent.safetensors")
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    assert "cannot be opened" in _refused(tmp_path / "loop.safetensors")


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path):
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(500, 30)}, path)
    tensor = open_safetensors(path)["a"]
    os.truncate(path, 1000)
    with pytest.raises(CheckpointError, match=r"m\.safetensors ends in the middle of its data; download it again"):
        tensor.read()


def test_files_are_closed_with_their_last_tensor(tmp_path: Path):
    save_file({"a": torch.ones(3)}, tmp_path / "m.safetensors")
    before = len(os.listdir("/proc/self/fd"))
    tensors = open_safetensors(tmp_path / "m.safetensors")
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del tensors
    assert len(os.listdir("/proc/self/fd")) == before


def test_files_in_a_cycle_are_closed(tmp_path: Path):
    save_file({"a": torch.ones(3)}, tmp_path / "m.safetensors")
    gc.collect()  # of other tests
    before = len(os.listdir("/proc/self/fd"))
    cycle: dict[str, object] = {"tensors": open_safetensors(tmp_path / "m.safetensors")}
    cycle["cycle"] = cycle
    del cycle
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_ctrl_c_while_a_file_is_closed_is_not_lost(tmp_path: Path):
    """It arrives in the middle of a call that frees tensors: no line of Python runs between the two."""
    save_file({"a": torch.ones(3)}, tmp_path / "m.safetensors")
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    calls = [_thread.interrupt_main, open_safetensors(tmp_path / "m.safetensors").clear]
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            collections.deque(map(operator.methodcaller("__call__"), calls), maxlen=0)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert len(os.listdir("/proc/self/fd")) == before


_KEPT = """
import sys
from pathlib import Path
from vlmedge import tensorfile
sys.modules["os"].kept = tensorfile.open_safetensors(Path(sys.argv[1]))
"""


def test_a_file_that_is_open_at_exit(tmp_path: Path):
    """Modules are gone by then."""
    save_file({"a": torch.ones(3)}, tmp_path / "m.safetensors")
    command = [sys.executable, "-X", "dev", "-c", _KEPT, str(tmp_path / "m.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


_STREAM = """
import json, resource, struct, sys
from pathlib import Path
from vlmedge.tensorfile import open_safetensors

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

rows, columns = 25_000, 4096  # 205 MB of bf16, a hole in the file system
entry = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [0, rows * columns * 2]}
header = json.dumps({"w": entry}).encode()
with open(sys.argv[1], "wb") as out:
    out.write(struct.pack("<Q", len(header)) + header)
    out.truncate(8 + len(header) + rows * columns * 2)
start = peak()
tensor = open_safetensors(Path(sys.argv[1]))["w"]
opened = peak()
seen = sum(block.shape[0] for block in tensor.blocks())
assert seen == rows
print(opened - start, peak() - start)
"""


def test_streaming_a_large_file_stays_small(tmp_path: Path):
    command = [sys.executable, "-c", _STREAM, str(tmp_path / "m.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    opened, streamed = map(int, done.stdout.split())
    assert opened < 5  # MiB
    assert streamed < 100
