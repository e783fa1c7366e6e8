"""The command line on ONNX bundles: from the demo checkpoint to an answer, and what users get wrong on the way."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from vlmedge.cli.console import shown
from vlmedge.cli.options import FLAVOURS
from vlmedge.quant_profiles import profile_names

QUESTION = ("demo:shapes", "How many shapes are there?", "--threads", 1)


@pytest.fixture(scope="module")
def onnx_bundle(tmp_path_factory) -> Path:
    """The demo checkpoint at w8a8, not verified; not to be written to."""
    from vlmedge.pipeline import export

    out = tmp_path_factory.mktemp("cli") / "demo.onnx"
    return export("demo:moondream2", "onnx", None, out, verify=False, threads=1).path


@pytest.fixture
def damaged(onnx_bundle, tmp_path) -> Path:
    """A bundle to be damaged."""
    return Path(shutil.copytree(onnx_bundle, tmp_path / "copy.onnx"))


def test_the_default_export(succeed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("export", "demo:moondream2", "--format", "onnx", "--no-verify", "--threads", 1, "--quiet")
    done = succeed(*words, "--json")
    assert done.err == ""
    assert (done.data["bundle"], done.data["flavour"]) == ("moondream2-w8a8.onnx", "ort")
    assert done.data["bytes"] == sum(f.stat().st_size for f in Path(done.data["bundle"]).rglob("*") if f.is_file())
    assert succeed(*words, "--flavour", "portable", "--json").data["bundle"] == "moondream2-w8a8-portable.onnx"
    assert "hashes right" in succeed("inspect", "moondream2-w8a8.onnx", "--check").out


def test_an_output_that_exists(refused, onnx_bundle):
    line = refused("export", "demo:moondream2", "--format", "onnx", "--out", onnx_bundle)
    assert line == f"vlmedge: {onnx_bundle} exists; remove it or choose another --out\n"


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_an_answer(succeed, onnx_bundle, tmp_path, monkeypatch, memory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):  # the second time lean finds its copy
        done = succeed("run", onnx_bundle, *QUESTION, "--memory", memory, "--context", 90)
        assert (done.out, done.err) == ("5\n", "")


def test_a_provider_that_is_not_there(refused, onnx_bundle):
    for name, help_ in (("cudaa", "did you mean 'cuda'?"), ("xyz", "known: ")):
        line = refused("run", onnx_bundle, *QUESTION, "--provider", name, code=2)
        assert f"the runtime 'onnxruntime' has no unit '{name}'; {help_}" in line


@pytest.mark.parametrize("flavour", FLAVOURS["onnx"])
def test_plan_of_every_profile(succeed, flavour):
    listed = {p["name"]: p["formats"] for p in succeed("profiles", "--json").data["profiles"]}
    for name in (name for name in profile_names() if "onnx" in listed[name]):
        data = succeed(
            "plan", "demo:moondream2", "--format", "onnx", "--quant", name, "--flavour", flavour, "--json"
        ).data
        assert (data["profile"], data["flavour"]) == (name, flavour)
        assert data["bytes"] == sum(tensor["bytes"] for tensor in data["tensors"]) > 3_000_000


@pytest.mark.parametrize("file", ["decoder_model_merged.onnx", "vision_encoder.onnx_data"])
def test_files_that_are_not_whole(refused, damaged, file):
    path = damaged / "onnx" / file
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:1000])
    assert f"{file} has 1000 bytes instead of {size}; copy it again" in refused("run", damaged, *QUESTION)
    path.unlink()
    assert f"lacks onnx/{file}; copy the bundle again" in refused("run", damaged, *QUESTION)


def test_files_that_were_changed(refused, damaged):
    path = damaged / "onnx/decoder_model_merged.onnx"
    data = bytearray(path.read_bytes())
    data[5000:5100] = bytes(100)
    path.write_bytes(data)
    assert "decoder_model_merged.onnx is damaged in chunk 0" in refused("inspect", damaged, "--check")
    assert "decoder_model_merged.onnx" in refused("run", damaged, *QUESTION)


@pytest.mark.parametrize("part", ["onnx", "onnx/decoder_model_merged.onnx", "tokenizer.json", "vlmedge.json"])
def test_a_part_of_a_bundle(refused, onnx_bundle, monkeypatch, part):
    """Named from anywhere, it leads to the bundle."""
    for words in (("run", onnx_bundle / part, *QUESTION), ("inspect", onnx_bundle / part)):
        assert refused(*words) == f"vlmedge: {words[1]} is not a bundle but part of one; name {onnx_bundle}\n"
    monkeypatch.chdir(onnx_bundle.parent)
    line = refused("inspect", f"demo.onnx/{part}")
    assert line == f"vlmedge: demo.onnx/{part} is not a bundle but part of one; name demo.onnx\n"
    monkeypatch.chdir(onnx_bundle / "onnx")
    assert refused("run", ".", *QUESTION) == f"vlmedge: . is not a bundle but part of one; name {onnx_bundle}\n"


def test_what_is_in_no_bundle(refused, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "is a file; give the folder" in refused("run", tmp_path / "file", *QUESTION, code=2)
    for name in ("file", "."):
        assert "is not a bundle: it has no vlmedge.json" in refused("inspect", tmp_path / name)
    assert "is not a bundle: there is no such folder" in refused("inspect", tmp_path / "onnx")


def test_the_wrong_runtime(refused, onnx_bundle):
    line = refused("run", onnx_bundle, *QUESTION, "--runtime", "llamacpp", code=2)
    runs = "the runtime 'llamacpp' runs bundles of the format gguf"
    assert line == f"vlmedge: {runs}; {onnx_bundle} has the format onnx\n"


def test_the_licence_is_that_of_the_models_table(succeed, onnx_bundle):
    (licence,) = (m["licence"] for m in succeed("models", "--json").data["models"] if m["name"] == "demo:moondream2")
    assert succeed("inspect", onnx_bundle, "--json").data["licence"] == licence == "Apache-2.0"
    assert f"licence    {licence}\n" in succeed("inspect", onnx_bundle).out


@pytest.mark.parametrize("words", [(), ("--serve", "--no-browser")])
def test_a_demo_that_cannot_be_written(refused, tmp_path, words):
    """A file in the place of the folder: one line, as for `export`."""
    (tmp_path / "file").write_text("x")
    assert f"{tmp_path / 'file'}" in refused("demo", *words, "--threads", 1, "--out", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"


def test_notes_are_not_folded(capfd, monkeypatch):
    """They end in commands, which a line break would spoil."""
    monkeypatch.setenv("COLUMNS", "40")
    note = f"not verified: {'a long reason ' * 10}: pip install 'vlmedge[torch]'"
    with shown(quiet=False) as progress:
        progress.note(note)
    assert capfd.readouterr().err == f"note: {note}\n"
