"""Fetching from a hub on localhost through the real huggingface_hub, and what each failure says."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from tests.hub_server import HubServer, Repo
from vlmedge.errors import CheckpointError, HubError
from vlmedge.hub import fetch_file, fetch_folder
from vlmedge.sources import open_source

OLD, NEW, PINNED = "a" * 40, "b" * 40, "c" * 40
NAME = "owner/tiny"


def _weights(seed: int, count: int = 40_000) -> bytes:
    return save({"model.w": np.random.default_rng(seed).standard_normal(count).astype(np.float32)})


def _repo() -> Repo:
    text = {"config.json": b"{}", "tokenizer.json": b'{"t": 1}', "config.py": b"answer_id = 3"}
    unwanted = {
        "README.md": b"# hi",
        "onnx/model.safetensors": _weights(7),
        "pytorch_model.bin": b"never",
        "big.py": b"#" * (1 << 20) + b"!",
        "other.safetensors": b"never either",
    }
    old = {**text, **unwanted, "model.safetensors": _weights(0)}
    new = {**old, "config.json": b'{"new": true}'}
    index = {
        "weight_map": {"model.w": "model-00001-of-00002.safetensors", "model.v": "model-00002-of-00002.safetensors"}
    }
    sharded = {
        **text,
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-00001-of-00002.safetensors": _weights(1),
        "model-00002-of-00002.safetensors": save({"model.v": np.ones(3, np.float32)}),
        "model-00003-of-00009.safetensors": b"left over from another split",
    }
    return Repo({OLD: old, NEW: new, PINNED: sharded}, {"main": NEW, "2025-06-21": OLD, "sharded": PINNED})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports each retry
    with HubServer({NAME: _repo()}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


def _down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Point the endpoint at a port where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")


def _one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


def test_only_what_a_checkpoint_needs_is_fetched(hub: HubServer, tmp_path: Path):
    folder, commit = fetch_folder(NAME, "2025-06-21", quiet=True, cache=tmp_path)
    assert commit == OLD
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "config.py",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (folder / "model.safetensors").read_bytes() == _weights(0)
    assert any(r.path.startswith("/cdn/") for r in hub.downloads("model.safetensors"))  # the redirect was followed


def test_a_branch_and_a_commit(hub: HubServer, tmp_path: Path):
    folder, commit = fetch_folder(NAME, "main", quiet=True, cache=tmp_path)
    assert commit == NEW
    assert (folder / "config.json").read_bytes() == b'{"new": true}'
    assert fetch_folder(NAME, OLD, quiet=True, cache=tmp_path)[1] == OLD


def test_the_shards_that_the_index_names(hub: HubServer, tmp_path: Path):
    checkpoint = open_source(f"{NAME}@sharded", {}, quiet=True, cache=tmp_path)
    assert sorted(checkpoint.tensors) == ["model.v", "model.w"]
    assert checkpoint.source.commit == PINNED
    assert not hub.downloads("00003-of-00009")


def test_a_second_fetch_downloads_nothing(hub: HubServer, tmp_path: Path):
    first = fetch_folder(NAME, "2025-06-21", quiet=True, cache=tmp_path)
    count = len(hub.downloads())
    assert fetch_folder(NAME, "2025-06-21", quiet=True, cache=tmp_path) == first
    assert len(hub.downloads()) == count


def test_another_commit_downloads_only_what_has_another_etag(hub: HubServer, tmp_path: Path):
    fetch_folder(NAME, "2025-06-21", quiet=True, cache=tmp_path)
    hub.requests.clear()
    fetch_folder(NAME, "main", quiet=True, cache=tmp_path)
    assert [r.path.rpartition("/")[2] for r in hub.downloads() if r.status == 200] == ["config.json"]


def test_a_cut_connection_is_resumed(hub: HubServer, tmp_path: Path):
    content = _weights(5, 3_000_000)  # more than one of the hub's chunks of 10 MiB, or there is nothing to resume
    hub.repos[NAME].commits[OLD]["model.safetensors"] = content
    hub.cut["model.safetensors"] = 11_000_000
    folder, _ = fetch_folder(NAME, "2025-06-21", quiet=True, cache=tmp_path)
    assert (folder / "model.safetensors").read_bytes() == content
    resumed = [int(r.range.removeprefix("bytes=").rstrip("-")) for r in hub.downloads("/cdn/") if r.status == 206]
    assert len(resumed) == 1
    assert 10_000_000 < resumed[0] <= 11_000_000


def test_a_download_that_never_ends_well(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    hub.cut["model.safetensors"], hub.cut_always = 0, True
    with pytest.raises(HubError, match="could not be downloaded") as error:
        fetch_folder(NAME, "2025-06-21", quiet=True, cache=tmp_path)
    assert "run it again" in _one_line(error)
    hub.cut.clear()
    folder, _ = fetch_folder(NAME, "2025-06-21", quiet=True, cache=tmp_path)
    assert (folder / "model.safetensors").read_bytes() == _weights(0)


def test_offline_from_the_cache(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = fetch_folder(NAME, "2025-06-21", quiet=True, cache=tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.requests.clear()
    assert fetch_folder(NAME, "2025-06-21", quiet=True, cache=tmp_path) == first
    assert fetch_file(NAME, "2025-06-21", "tokenizer.json", cache=tmp_path).read_bytes() == b'{"t": 1}'
    assert hub.requests == []
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set; unset it, or give a folder") as error:
        fetch_folder(NAME, "sharded", quiet=True, cache=tmp_path)
    _one_line(error)
    with pytest.raises(HubError, match=r"absent\.json of owner/tiny@main is not in the cache"):
        fetch_file(NAME, "main", "absent.json", cache=tmp_path)


def test_offline_after_an_interrupted_download(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    hub.cut["tokenizer.json"], hub.cut_always = 0, True
    with pytest.raises(HubError, match="could not be downloaded"):
        fetch_folder(NAME, "2025-06-21", quiet=True, cache=tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match="is not in the cache"):
        fetch_folder(NAME, "2025-06-21", quiet=True, cache=tmp_path)


def test_no_network_falls_back_to_the_cache_and_says_so(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    first = fetch_folder(NAME, "2025-06-21", quiet=True, cache=tmp_path)
    _down(monkeypatch)
    told: list[str] = []
    assert fetch_folder(NAME, "2025-06-21", quiet=True, cache=tmp_path, notice=told.append) == first
    assert len(told) == 1
    assert "cannot be reached" in told[0]
    assert "using what the cache has of owner/tiny@2025-06-21" in told[0]
    fetch_folder(NAME, "2025-06-21", quiet=True, cache=tmp_path)
    assert "using what the cache has" in caplog.text


def test_a_broken_hub_falls_back_too(hub: HubServer, tmp_path: Path):
    first = fetch_folder(NAME, "2025-06-21", quiet=True, cache=tmp_path)
    hub.broken = True
    told: list[str] = []
    assert fetch_folder(NAME, "2025-06-21", quiet=True, cache=tmp_path, notice=told.append) == first
    assert len(told) == 1
    with pytest.raises(HubError, match="503"):
        fetch_folder(NAME, "main", quiet=True, cache=tmp_path)


def test_no_network_and_no_cache(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _down(monkeypatch)
    for revision in ("main", OLD):
        with pytest.raises(HubError, match="connect to the network, or give a folder") as error:
            fetch_folder(NAME, revision, quiet=True, cache=tmp_path)
        _one_line(error)
        with pytest.raises(HubError, match="connect to the network"):
            fetch_file(NAME, revision, "tokenizer.json", cache=tmp_path)


def test_one_file(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = fetch_file(NAME, PINNED, "tokenizer.json", cache=tmp_path)
    assert path.read_bytes() == b'{"t": 1}'
    _down(monkeypatch)  # a pinned file that is cached asks nobody
    assert fetch_file(NAME, PINNED, "tokenizer.json", cache=tmp_path) == path


def test_what_is_not_there(hub: HubServer, tmp_path: Path):
    with pytest.raises(HubError, match=r"owner/tinny does not exist at http.*or you may not read it") as error:
        fetch_folder("owner/tinny", "main", quiet=True, cache=tmp_path)
    _one_line(error)
    with pytest.raises(HubError, match="no revision '2025-06-22'; did you mean '2025-06-21'") as error:
        fetch_folder(NAME, "2025-06-22", quiet=True, cache=tmp_path)
    _one_line(error)
    with pytest.raises(HubError, match=r"has no file merges\.txt") as error:
        fetch_file(NAME, "main", "merges.txt", cache=tmp_path)
    _one_line(error)


def test_gated(hub: HubServer, tmp_path: Path):
    hub.repos[NAME].gated = True
    with pytest.raises(HubError, match=r"is gated: accept its terms at http.*/owner/tiny, then log in") as error:
        fetch_folder(NAME, "main", quiet=True, cache=tmp_path)
    _one_line(error)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"README.md": b""}, "has no config.json"),
        ({"config.json": b"{}", "model.gguf": b""}, "no safetensors and no PyTorch weights"),
        ({"config.json": b"{}", "pytorch_model.bin": b"x", "training_args.bin": b"y"}, "only pickled weights"),
        ({"config.json": b"{}", "model.safetensors.index.json": b"[]"}, "has no table 'weight_map'"),
    ],
)
def test_a_repository_that_is_no_checkpoint(hub: HubServer, tmp_path: Path, files: dict[str, bytes], words: str):
    hub.repos[NAME] = Repo({OLD: files}, {"main": OLD})
    with pytest.raises(HubError, match=words) as error:
        fetch_folder(NAME, "main", quiet=True, cache=tmp_path)
    _one_line(error)
    assert not hub.downloads("pytorch_model")


def test_pickles_are_fetched_when_asked_for(hub: HubServer, tmp_path: Path):
    files = {"config.json": b"{}", "pytorch_model.bin": b"x", "training_args.bin": b"y"}
    hub.repos[NAME] = Repo({OLD: files}, {"main": OLD})
    folder, _ = fetch_folder(NAME, "main", quiet=True, allow_pickle=True, cache=tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "pytorch_model.bin"]


def test_an_answer_that_is_not_the_hubs(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_ENDPOINT", "hub.example")
    with pytest.raises(HubError, match=r"HF_ENDPOINT is 'hub\.example'"):
        fetch_folder(NAME, "main", quiet=True, cache=tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint + "/elsewhere")
    with pytest.raises(HubError, match="could not be downloaded"):
        fetch_folder(NAME, "main", quiet=True, cache=tmp_path)


def test_a_cache_that_cannot_be_written(hub: HubServer, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(HubError, match=r"cannot be written.*HF_HOME") as error:
        fetch_folder(NAME, "main", quiet=True, cache=tmp_path / "file")
    _one_line(error)


_CHILD = """
import resource, sys
from pathlib import Path
from vlmedge.errors import HubError
from vlmedge.hub import fetch_folder
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    fetch_folder("owner/tiny", "2025-06-21", quiet=True, cache=Path(sys.argv[1]))
except HubError as error:
    sys.exit(str(error))
"""


def test_a_full_disk(hub: HubServer, tmp_path: Path):
    done = subprocess.run([sys.executable, "-c", _CHILD, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stderr.strip().splitlines()[-1].startswith("no room for owner/tiny@2025-06-21 in")
    assert done.stderr.strip().count("\n") == 0


def test_the_environments_own_cache(hub: HubServer, tmp_path: Path):
    code = "from vlmedge.hub import fetch_folder; print(fetch_folder('owner/tiny', 'main', quiet=True)[0])"
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    env.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "home")
    assert done.stderr == ""  # quiet is quiet


KNOWN = {"tiny": (NAME, "2025-06-21"), "moondream2": ("vikhyatk/moondream2", "x")}


def test_a_known_name(hub: HubServer, tmp_path: Path):
    checkpoint = open_source("tiny", KNOWN, quiet=True, cache=tmp_path)
    source = checkpoint.source
    assert (source.label, source.repo, source.revision, source.commit) == ("tiny", NAME, "2025-06-21", OLD)
    assert open_source("tiny@main", KNOWN, quiet=True, cache=tmp_path).config == {"new": True}
    assert checkpoint.text("config.py") == "answer_id = 3"
    assert checkpoint.fetch(NAME, PINNED, "tokenizer.json", why="test").is_file()


def test_a_hub_id_without_a_revision_is_main(hub: HubServer, tmp_path: Path):
    source = open_source(NAME, KNOWN, quiet=True, cache=tmp_path).source
    assert (source.revision, source.commit) == ("main", NEW)


@pytest.mark.parametrize("revision", ["", "../x", "a\nb", "r" * 300])
def test_revisions_that_cannot_be(tmp_path: Path, revision: str):
    with pytest.raises(HubError, match=r"is no revision of owner/tiny"):
        fetch_folder(NAME, revision, cache=tmp_path)
    with pytest.raises(CheckpointError, match="is no hub id"):
        fetch_folder("../../etc", "main", cache=tmp_path)
