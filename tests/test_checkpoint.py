"""Opening checkpoint folders: one file, shards, loose files, and one clear line for what is wrong with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmedge import checkpoint as module
from vlmedge.checkpoint import Checkpoint, Source, open_folder
from vlmedge.errors import CheckpointError, HubError

GOLDEN = Path(__file__).parent / "data" / "moondream2" / "tiny-mha"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def _sharded(folder: Path, weight_map: dict[str, object] | None = None) -> Path:
    (folder / "config.json").write_text("{}")
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, folder / FIRST)
    save_file({"c": torch.ones(4)}, folder / SECOND)
    names = {"a": FIRST, "b": FIRST, "c": SECOND} if weight_map is None else weight_map
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def _refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        open_folder(folder)
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 700
    return text


def test_the_golden_checkpoint():
    checkpoint = open_folder(GOLDEN)
    stored = load_file(GOLDEN / "model.safetensors")
    assert checkpoint.tensors.keys() == stored.keys()
    assert checkpoint.files == (GOLDEN / "model.safetensors",)
    assert checkpoint.source == Source(label=str(GOLDEN))
    for name, tensor in checkpoint.tensors.items():
        assert tensor.dtype == "bf16"
        np.testing.assert_array_equal(tensor.read(), stored[name].float().numpy())


def test_shards_in_order(tmp_path: Path):
    checkpoint = open_folder(_sharded(tmp_path))
    assert list(checkpoint.tensors) == ["a", "b", "c"]
    assert checkpoint.files == (tmp_path / FIRST, tmp_path / SECOND)


def test_the_index_decides_between_two_of_one_name(tmp_path: Path):
    folder = _sharded(tmp_path)
    save_file({"c": torch.ones(4), "a": torch.full((2,), 9.0)}, folder / SECOND)
    np.testing.assert_array_equal(open_folder(folder).tensors["a"].read(), [1, 1])
    save_file({"c": torch.ones(4), "x": torch.ones(1)}, folder / SECOND)
    assert "x" in open_folder(folder).tensors  # what the index forgot is still there to be accounted for


def test_one_file_comes_before_an_index(tmp_path: Path):
    folder = _sharded(tmp_path)
    save_file({"only": torch.ones(1)}, folder / "model.safetensors")
    assert list(open_folder(folder).tensors) == ["only"]


def test_loose_files(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "y.safetensors")
    assert sorted(open_folder(tmp_path).tensors) == ["a", "b"]
    save_file({"a": torch.ones(2)}, tmp_path / "y.safetensors")
    assert "'a' stands in y.safetensors and in another file" in _refused(tmp_path)


def test_a_missing_shard(tmp_path: Path):
    folder = _sharded(tmp_path)
    (folder / SECOND).unlink()
    assert f"the shard {SECOND} is missing from {folder}; download it again" in _refused(folder)
    (folder / SECOND).mkdir()
    assert "is missing from" in _refused(folder)


def test_an_index_that_promises_too_much(tmp_path: Path):
    names: dict[str, object] = {"a": FIRST, "c": SECOND, "absent": SECOND}
    assert f"names 'absent' in {SECOND}, which does not hold it" in _refused(_sharded(tmp_path, names))


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", "a\\b", "C:x", "a\nb", "x" * 300, "a\0b"],
)
def test_an_index_that_leads_outside(tmp_path: Path, shard: str):
    (tmp_path.parent / "x.safetensors").write_bytes(b"")
    assert "which is not a plain file name" in _refused(_sharded(tmp_path, {"a": shard}))


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}'])
def test_an_index_that_is_none(tmp_path: Path, index: str):
    folder = _sharded(tmp_path)
    (folder / "model.safetensors.index.json").write_text(index)
    assert "has no table 'weight_map'" in _refused(folder)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"[1]", "is not a table"),
        (b"[" * 200_000, "is not JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "is not JSON"),
    ],
)
def test_a_config_that_is_none(tmp_path: Path, config: bytes, words: str):
    (tmp_path / "config.json").write_bytes(config)
    assert words in _refused(tmp_path)


def test_what_is_missing(tmp_path: Path):
    assert "there is no folder" in _refused(tmp_path / "absent")
    assert "has no config.json; is it a checkpoint folder?" in _refused(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "has no weights" in _refused(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    assert "cannot be read: Is a directory" in _refused(tmp_path)


def test_an_enormous_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "TEXT_LIMIT", 1 << 20)
    with (tmp_path / "config.json").open("wb") as out:
        out.truncate(2 << 20)
    assert "more than 1 MiB and cannot be meant" in _refused(tmp_path)


def test_a_truncated_golden(tmp_path: Path):
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1000])
    assert "model.safetensors is truncated" in _refused(tmp_path)


def test_texts(tmp_path: Path):
    checkpoint = open_folder(_sharded(tmp_path))
    assert checkpoint.text("config.py") is None
    (tmp_path / "config.py").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"config\.py is not UTF-8 text"):
        checkpoint.text("config.py")


def test_files_of_another_repository(tmp_path: Path):
    lone = open_folder(_sharded(tmp_path))
    with pytest.raises(
        CheckpointError, match=r"the file is stale, and t\.json of o/n is needed instead; put that file"
    ):
        lone.fetch("o/n", "rev", "t.json", why="the file is stale")

    def unreachable(repo: str, revision: str, name: str) -> Path:
        raise HubError(f"no network for {repo}")

    linked = open_folder(tmp_path, fetcher=unreachable)
    with pytest.raises(CheckpointError, match=r"could not be had \(no network for o/n\); put that file") as error:
        linked.fetch("o/n", "rev", "t.json", why="the file is stale")
    assert "\n" not in str(error.value)
    ready = Checkpoint(Source("x"), tmp_path, {}, {}, fetcher=lambda repo, revision, name: tmp_path / name)
    assert ready.fetch("o/n", "rev", "t.json", why="") == tmp_path / "t.json"
