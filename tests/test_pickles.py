"""Pickled weights: refused with a command that works, read on request, and never run."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from vlmedge.checkpoint import open_folder
from vlmedge.errors import CheckpointError, MissingExtraError
from vlmedge.pickles import select_pickles
from vlmedge.tensors import Tensor


def _folder(path: Path, **files: object) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    for name, value in files.items():
        torch.save(value, path / name)
    return path


def _weights() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    shared = torch.randn(6, 4, generator=random)
    return {
        "a": torch.randn(7, 5, generator=random).bfloat16(),
        "b": torch.randn(3, generator=random).half(),
        "turned": torch.randn(4, 6, generator=random).T,
        "shared": shared,
        "view": shared[2:5],
        "scalar": torch.tensor(1.5),
    }


def _check(tensors: dict[str, Tensor], want: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == want.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor.read(), want[name].float().numpy())


def test_refused_with_a_command_that_converts_them(tmp_path: Path):
    folder = _folder(tmp_path / "with space", **{"pytorch_model.bin": _weights()})
    with pytest.raises(CheckpointError, match="--allow-pickle") as error:
        open_folder(folder)
    text = str(error.value)
    assert "\n" not in text
    command = text[text.index("python -c") : text.index(" ; or read")].replace("python", f"'{sys.executable}'", 1)
    subprocess.run(command, shell=True, check=True)
    _check(open_folder(folder).tensors, _weights())


def test_the_command_for_many_shards_and_odd_names(tmp_path: Path):
    folder = tmp_path / 'odd "$name"'
    shards = {f"pytorch_model-0000{i}-of-00004.bin": {f"w{i}": torch.ones(i)} for i in range(1, 5)}
    _folder(folder, **shards)
    with pytest.raises(CheckpointError) as error:
        open_folder(folder)
    text = str(error.value)
    command = text[text.index("python -c") : text.index(" ; or read")].replace("python", f"'{sys.executable}'", 1)
    subprocess.run(command, shell=True, check=True)
    assert sorted(open_folder(folder).tensors) == ["w1", "w2", "w3", "w4"]


@pytest.mark.parametrize("zipped", [True, False])  # False: the format before torch 1.6
def test_read_on_request(tmp_path: Path, zipped: bool):
    folder = _folder(tmp_path)
    torch.save(_weights(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    checkpoint = open_folder(folder, allow_pickle=True)
    assert checkpoint.tensors["a"].dtype == "bf16"
    assert checkpoint.files == (folder / "pytorch_model.bin",)
    _check(checkpoint.tensors, _weights())
    np.testing.assert_array_equal(checkpoint.tensors["a"].read_rows(2, 4), _weights()["a"][2:4].float().numpy())


def test_shards_by_their_index(tmp_path: Path):
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    folder = _folder(tmp_path, **{names[0]: {"a": torch.ones(2)}, names[1]: {"b": torch.zeros(2)}})
    index = {"weight_map": {"a": names[0], "b": names[1]}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert sorted(open_folder(folder, allow_pickle=True).tensors) == ["a", "b"]
    (folder / names[1]).unlink()
    with pytest.raises(CheckpointError, match=f"the shard {names[1]} is missing"):
        open_folder(folder, allow_pickle=True)


def test_which_files_are_weights():
    assert select_pickles(["pytorch_model.bin", "training_args.bin", "other.bin"]) == ["pytorch_model.bin"]
    assert select_pickles(["optimizer.bin", "x.txt"]) == []
    assert select_pickles(["b.bin", "a.pt"]) == ["a.pt", "b.bin"]


class _Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("raw", [True, False])
def test_a_hostile_pickle_runs_nothing(tmp_path: Path, raw: bool):
    trace = tmp_path / "it_ran"
    folder = _folder(tmp_path / "model")
    if raw:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Hostile(trace)))
    else:
        torch.save({"a": _Hostile(trace)}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="nothing of it was run") as error:
        open_folder(folder, allow_pickle=True)
    assert "\n" not in str(error.value)
    assert not trace.exists()


@pytest.mark.parametrize(
    "damage", [b"", b"\x80", b"\x80\x02.", b"PK\x03\x04", b"\x80\x02}q\x00(X", b"garbage" * 50, b"\x80\x02]q\x00."]
)
def test_damaged_files(tmp_path: Path, damage: bytes):
    folder = _folder(tmp_path)
    (folder / "pytorch_model.bin").write_bytes(damage)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin") as error:
        open_folder(folder, allow_pickle=True)
    assert "\n" not in str(error.value)


def test_every_truncation_is_noticed(tmp_path: Path):
    folder = _folder(tmp_path, **{"pytorch_model.bin": _weights()})
    whole = (folder / "pytorch_model.bin").read_bytes()
    for size in range(0, len(whole), 97):
        (folder / "pytorch_model.bin").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
            open_folder(folder, allow_pickle=True)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([torch.ones(2)], "holds a list, not a table"),
        ({"state_dict": {"a": torch.ones(2)}}, "'state_dict' is a dict; save its weights alone"),
        ({"a": torch.ones(2).to_sparse()}, "is not a dense tensor"),
        ({"step": 3}, "'step' is a int"),
    ],
)
def test_more_than_a_table_of_tensors(tmp_path: Path, value: object, words: str):
    folder = _folder(tmp_path, **{"pytorch_model.bin": value})
    with pytest.raises(CheckpointError, match=words):
        open_folder(folder, allow_pickle=True)


def test_a_dtype_that_holds_no_weights(tmp_path: Path):
    folder = _folder(tmp_path, **{"pytorch_model.bin": {"ids": torch.arange(4)}})
    tensor = open_folder(folder, allow_pickle=True).tensors["ids"]
    with pytest.raises(CheckpointError, match="'ids' has the dtype int64; weights must be F32, F16, BF16"):
        tensor.read()


def test_two_files_with_one_tensor(tmp_path: Path):
    folder = _folder(tmp_path, **{"a.bin": {"w": torch.ones(2)}, "b.bin": {"w": torch.ones(2)}})
    with pytest.raises(CheckpointError, match=r"two files of .* hold 'w', the second is b\.bin"):
        open_folder(folder, allow_pickle=True)


def test_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = _folder(tmp_path, **{"pytorch_model.bin": _weights()})
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        MissingExtraError, match=r"pickled weights needs the extra 'torch': pip install 'vlmedge\[torch\]'"
    ):
        open_folder(folder, allow_pickle=True)


def test_a_torch_whose_loader_is_unsafe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = _folder(tmp_path, **{"pytorch_model.bin": _weights()})
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(CheckpointError, match="CVE-2025-32434"):
        open_folder(folder, allow_pickle=True)


def test_the_zip_of_something_else(tmp_path: Path):
    folder = _folder(tmp_path)
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as out:
        out.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match="nothing of it was run"):
        open_folder(folder, allow_pickle=True)
