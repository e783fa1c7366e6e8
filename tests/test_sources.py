"""What may be named as a checkpoint, and what names that mean nothing say; see test_hub.py for hub ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from vlmedge.errors import UsageError
from vlmedge.sources import open_source

KNOWN = {"tiny": ("owner/tiny", "2025-06-21"), "moondream2": ("vikhyatk/moondream2", "x")}


def test_a_folder_and_a_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "owner" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    save_file({"w": np.ones(3, np.float32)}, folder / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    for text in (str(folder), "./owner/mine", "owner/mine", "owner/mine/"):
        assert open_source(text, KNOWN).source.repo == ""
    asked: list[str] = []

    def demo(name: str) -> Path:
        asked.append(name)
        return folder

    assert open_source("demo:tiny", KNOWN, demo=demo).source.label == "demo:tiny"
    assert asked == ["tiny"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("moondrem2", "unknown model 'moondrem2'; did you mean 'moondream2'"),
        ("zzz", "unknown model 'zzz'; known: moondream2, tiny"),
        ("tiny@", "has nothing after the @"),
        ("./absent", "there is no folder ./absent"),
        ("/no/such", "there is no folder /no/such"),
        ("https://huggingface.co/a/b", "give the hub id alone"),
        ("", "unknown model ''"),
        ("a/b/c", "unknown model 'a/b/c'"),
        ("owner/na me", "unknown model"),
        ("x" * 5000, "unknown model"),
        ("demo:tiny", "cannot be opened here"),
    ],
)
def test_names_that_mean_nothing(source: str, words: str):
    with pytest.raises(UsageError, match=words) as error:
        open_source(source, KNOWN)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_a_file_and_a_bundle(tmp_path: Path):
    (tmp_path / "vlmedge.json").write_text("{}")
    with pytest.raises(UsageError, match="is an exported bundle"):
        open_source(str(tmp_path), KNOWN)
    with pytest.raises(UsageError, match="is a file; give the folder"):
        open_source(str(tmp_path / "vlmedge.json"), KNOWN)
