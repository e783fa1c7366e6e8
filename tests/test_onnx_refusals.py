"""What the ONNX exporter refuses: one line that names the culprit, and nothing left behind."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import vlmedge
from tests.conftest import Forgery
from tests.onnx_tools import (
    FLAVOURS,
    GOLDEN,
    TINY,
    job_of,
    made_up,
    order_of,
    random_tensors,
)
from vlmedge.errors import CheckpointError, OutputError, UnsupportedError
from vlmedge.exporters import EXPORTERS
from vlmedge.quant_profiles import Scheme
from vlmedge.tensors import ArrayTensor


def write_with(
    tmp_path: Path, changes: Mapping[str, tuple[int, float]], schemes: Mapping[str, Scheme], **facts: Any
) -> None:
    """Export TINY with rows of some tensors set to a value."""
    tensors = random_tensors(TINY)
    for name, (row, value) in changes.items():
        array = tensors[name].read().copy()
        array[row, ...] = value
        tensors[name] = ArrayTensor(array)
    EXPORTERS["onnx"].write(job_of(order_of(TINY, schemes, **facts), tensors, tmp_path))


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(
    ("name", "value", "scheme", "text"),
    [
        ("decoder.layers.1.attn.k.weight", np.nan, Scheme("float", 32), "NaN or infinite"),
        ("decoder.layers.0.mlp.up.weight", np.inf, Scheme("int", 4, 32), "NaN or infinite"),
        ("vision.layers.1.mlp.down.weight", -np.inf, Scheme("int", 8, activations=8), "NaN or infinite"),
        ("decoder.layers.1.norm1.bias", np.nan, Scheme("float", 32), "NaN or infinite"),
        ("decoder.embed.weight", 1e5, Scheme("float", 16), "beyond f16's 65504; choose f32"),
        ("vision.patch.weight", 1e5, Scheme("int", 8, 32), "beyond f16's 65504"),
        ("decoder.layers.0.attn.q.weight", 1e8, Scheme("int", 4, 32), "scales beyond float16's 65504"),
    ],
)
def test_weights_that_cannot_be_stored_are_named(tmp_path, flavour, name, value, scheme, text):
    with pytest.raises(CheckpointError) as error:
        write_with(tmp_path, {name: (3, value)}, {name: scheme}, flavour=flavour, kv_cache="int8")
    assert str(error.value).startswith(name)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("writes", [0, 40])
def test_a_full_disk_stops_it(tmp_path, full_disk, writes):
    full_disk(writes)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):  # staging makes a line of it
        write_with(tmp_path, {}, {})
    assert before == (len(os.listdir("/proc/self/fd")) if before else 0)


def test_a_disk_that_gives_no_room_for_a_file_stops_it(tmp_path, monkeypatch):
    """The files get their length before a weight is read; those that are open by then are closed."""
    done = []

    def ftruncate(fd: int, size: int) -> None:
        done.append(fd)
        if len(done) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "ftruncate", ftruncate)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        write_with(tmp_path, {}, {})
    for fd in done:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_a_weight_that_cannot_be_read_is_named(tmp_path):
    class Broken(ArrayTensor):
        def read_rows(self, start: int, stop: int) -> npt.NDArray[np.float32]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    name = "decoder.layers.0.mlp.up.weight"
    tensors = random_tensors(TINY)
    tensors[name] = Broken(tensors[name].read())
    with pytest.raises(CheckpointError, match=f"cannot read {name}: Input/output error"):
        EXPORTERS["onnx"].write(job_of(order_of(TINY), tensors, tmp_path))


def test_what_onnx_runtimes_attention_cannot_rotate_is_refused():
    odd = order_of(made_up({"rope_dims": 24}))
    with pytest.raises(UnsupportedError, match=r"multiples of 16 dimensions, this decoder 24; choose .* portable"):
        EXPORTERS["onnx"].encodings(odd)
    assert EXPORTERS["onnx"].encodings(replace(odd, flavour="portable"))


PROFILE = """
summary = "for a test"
[[rules]]
match = "*"
scheme = {}
"""


@pytest.mark.parametrize(
    ("scheme", "text"),
    [
        ('{ kind = "int", bits = 4, native = { onnx = "int4_31" } }', "no kind 'int4_31'; did you mean 'int4_32'?"),
        ('{ kind = "int", bits = 3, group_size = 32 }', "no 3-bit integers; use 4 bits or more"),
    ],
)
def test_schemes_without_a_kind_are_refused_before_anything_is_written(tmp_path, scheme, text):
    profile = tmp_path / "own.toml"
    profile.write_text(PROFILE.format(scheme))
    for call in (vlmedge.plan, vlmedge.export):
        extra = {"out": tmp_path / "out"} if call is vlmedge.export else {}
        with pytest.raises(UnsupportedError) as error:
            call(GOLDEN, "onnx", str(profile), **extra)
        assert text in str(error.value)
        assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["own.toml"]


def put(forgery: Forgery, name: str, value: int) -> Path:
    """Write a checkpoint in which one bf16 number is `value`, as bits."""
    start, _ = forgery.header[name]["data_offsets"]
    assert forgery.header[name]["dtype"] == "BF16"
    forgery.data = forgery.data[:start] + value.to_bytes(2, "little") + forgery.data[start + 2 :]
    return forgery.write()


@pytest.mark.parametrize(
    ("profile", "bits", "text"),
    [("w8a8", 0x7FC0, "NaN or infinite"), ("turbo", 0x7F80, "NaN or infinite"), ("f16", 0x4800, "beyond f16's 65504")],
)
def test_nothing_is_left_behind(forgery, tmp_path, profile, bits, text):
    name = next(n for n in forgery.header if n.endswith("text.blocks.1.mlp.fc1.weight"))
    source = put(forgery, name, bits)
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=text):
        vlmedge.export(source, "onnx", profile, tmp_path / "out", threads=1)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_nothing_is_left_behind_by_a_full_disk(tmp_path, full_disk):
    full_disk(30)
    with pytest.raises(OutputError, match=r"the disk of .* is full; free some space"):
        vlmedge.export(GOLDEN, "onnx", "w8a8", tmp_path / "out", threads=1)
    assert not list(tmp_path.iterdir())
