"""Damaged checkpoints and bundles through the command line: one line each, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from vlmedge.bundle import MANIFEST, SCHEMA

NORM = "model.vision.post_ln.bias"
MATRIX = "model.region.coord_decoder.fc1.weight"


@pytest.fixture
def export_refused(refused, tmp_path):
    """Export a folder that must be refused; nothing may be left in the output's place."""

    def run(folder: Path, *more: str, code: int = 1) -> Any:
        place = tmp_path / "place"
        line = refused(
            "export", folder, "--format", "gguf", "--f32", "--no-verify", "--out", place / "x", *more, code=code
        )
        assert not place.exists() or list(place.iterdir()) == []
        return line

    return run


def shards(forgery, first: str = "a.safetensors") -> Any:
    """The forgery's weights under the name of a shard, with an index."""
    folder = forgery.write()
    (folder / "model.safetensors").rename(folder / first)
    names = {name: first for name in forgery.header if name != "__metadata__"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def test_truncated_weights(forgery, export_refused):
    forgery.data = forgery.data[:-1000]
    assert "model.safetensors is truncated" in export_refused(forgery.write())


@pytest.mark.parametrize("size", [0, 4, 100])
def test_weights_cut_in_the_header(forgery, export_refused, size):
    path = forgery.write() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert "model.safetensors is " in export_refused(forgery.folder)


def test_a_header_that_lies_about_offsets(forgery, export_refused):
    begin, end = forgery.header[MATRIX]["data_offsets"]
    forgery.header[MATRIX]["data_offsets"] = [begin + 64, end + 64]
    assert "belong to nothing" in export_refused(forgery.write())


def test_a_header_that_lies_about_sizes(forgery, export_refused):
    forgery.header[MATRIX]["shape"][0] *= 1 << 40
    assert f"'{MATRIX}' of shape" in export_refused(forgery.write())


def test_a_header_that_is_no_table(forgery, export_refused):
    forgery.header = ["x"]
    assert "damaged header" in export_refused(forgery.write())


def test_a_header_of_enormous_names(forgery, export_refused):
    entry = forgery.header.pop(NORM)
    forgery.header["n" * 200_000] = entry
    assert len(export_refused(forgery.write())) < 1100


def test_wrong_shape(forgery, export_refused):
    forgery.header[MATRIX]["shape"].reverse()
    assert f"'{MATRIX}' has the shape [128, 48], the config asks for [48, 128]" in export_refused(forgery.write())


def test_wrong_dtype(forgery, export_refused):
    forgery.header[MATRIX]["dtype"] = "I16"
    assert f"'{MATRIX}' is stored as i16; weights must be f32, f16 or bf16" in export_refused(forgery.write())


def test_unknown_dtype(forgery, export_refused):
    forgery.header[MATRIX]["dtype"] = "F17"
    assert "unknown dtype 'F17'" in export_refused(forgery.write())


def test_unknown_tensor(forgery, export_refused):
    forgery.header["model.vision.extra"] = forgery.header.pop(NORM)
    assert "'model.vision.extra', which this model does not have" in export_refused(forgery.write())


def test_weights_that_are_not_numbers(forgery, export_refused):
    begin, end = forgery.header[NORM]["data_offsets"]
    forgery.data = forgery.data[:begin] + b"\xff\xff" * ((end - begin) // 2) + forgery.data[end:]
    assert "vision.post_norm.bias has NaN" in export_refused(forgery.write())


def test_missing_shard(forgery, export_refused):
    folder = shards(forgery)
    (folder / "a.safetensors").unlink()
    assert "the shard a.safetensors is missing" in export_refused(folder)


def test_an_index_that_leads_out_of_the_folder(forgery, export_refused):
    folder = shards(forgery)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../../etc/passwd"}}')
    assert "not a plain file name" in export_refused(folder)


def test_missing_tensor_names_the_shard_trouble(forgery, export_refused):
    folder = shards(forgery)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["ghost"] = "a.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "'ghost' in a.safetensors, which does not hold it" in export_refused(folder)


@pytest.mark.parametrize(
    ("table", "key", "value", "says"),
    [
        ("text", "n_layerz", 3, "config.text has the unknown key 'n_layerz'; did you mean 'n_layers'?"),
        ("text", "n_layers", "three", "config.text.n_layers must be a whole number, not the text 'three'"),
        ("text", "n_layers", 10**9, "config.text.n_layers is 1000000000, outside 1..1024"),
        ("text", "dim", 10**300, "config.text.dim is"),
        ("text", "n_layers", 0, "config.text.n_layers is 0, outside 1..1024"),
        ("text", "vocab_size", -5, "config.text.vocab_size is -5"),
        ("text", "n_heads", 3, "config.text: 3 heads of 64 do not make dim 128"),
        ("text", "group_size", 128, "int4 release"),
        ("vision", "crop_size", 100, "config.vision: crop_size"),
        ("vision", "enc_n_layers", 30, "lacks"),
        ("vision", "enc_n_layers", 20, "has no place for the tensor"),
    ],
)
def test_configs_that_cannot_be_meant(forgery, export_refused, table, key, value, says):
    forgery.config["config"][table][key] = value
    assert says in export_refused(forgery.write())


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "[" * 100_000, "{} x", "\xff"])
def test_a_config_that_is_no_table(forgery, export_refused, text):
    (forgery.write() / "config.json").write_text(text, encoding="latin-1")
    assert "config.json" in export_refused(forgery.folder)


def test_a_config_of_another_model(forgery, export_refused):
    forgery.config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    assert "llama" in export_refused(forgery.write()).lower()


def test_a_damaged_tokenizer(forgery, export_refused):
    (forgery.write() / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in export_refused(forgery.folder)


def test_no_tokenizer(forgery, export_refused, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (forgery.write() / "tokenizer.json").unlink()
    assert "tokenizer.json" in export_refused(forgery.folder)


def test_pickled_weights(forgery, export_refused):
    folder = forgery.write()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "--allow-pickle" in export_refused(folder)
    assert "nothing of it was run" in export_refused(folder, "--allow-pickle")


def test_no_weights(forgery, export_refused):
    (forgery.write() / "model.safetensors").unlink()
    assert "has no weights" in export_refused(forgery.folder)


# ---- bundles ----------------------------------------------------------------------------------------------------


def edited(folder: Path, **changes: object) -> Path:
    data = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(data | changes))
    return folder


@pytest.fixture
def bundle_refused(refused, photo):
    """Both verbs that open bundles must refuse one, in the same words."""

    def run(folder: Path) -> Any:
        line = refused("run", folder, photo, "What?")
        assert refused("inspect", folder) == line
        return line

    return run


def test_a_missing_file(bundle_copy, bundle_refused):
    (bundle_copy / "heads.gguf").unlink()
    assert "lacks heads.gguf; copy the bundle again" in bundle_refused(bundle_copy)


def test_a_truncated_file(bundle_copy, bundle_refused):
    os.truncate(bundle_copy / "text.gguf", 100_000)
    assert "text.gguf has 100000 bytes instead of" in bundle_refused(bundle_copy)


def test_a_flipped_byte(bundle_copy, refused):
    with (bundle_copy / "text.gguf").open("r+b") as file:
        file.seek(50_000)
        byte = file.read(1)[0]
        file.seek(50_000)
        file.write(bytes([byte ^ 1]))
    assert "text.gguf is damaged in chunk 0 of 8 MiB" in refused("inspect", bundle_copy, "--check")


@pytest.mark.parametrize("file", ["text.gguf", "mmproj.gguf", "heads.gguf"])
def test_a_file_that_is_no_gguf(bundle_copy, refused, photo, file):
    size = (bundle_copy / file).stat().st_size
    (bundle_copy / file).write_bytes(b"no gguf!" + bytes(size - 8))
    refused("run", bundle_copy, photo, "What?", "--threads", "1")


def test_schemas_of_other_versions(bundle_copy, bundle_refused):
    line = bundle_refused(edited(bundle_copy, schema="vlmedge.bundle/3"))
    assert f"this version reads '{SCHEMA}'; pip install --upgrade vlmedge" in line
    assert "export it again" in bundle_refused(edited(bundle_copy, schema="something"))
    assert "export it again" in bundle_refused(edited(bundle_copy, schema=None))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "C:\\x", "..\\x", ""])
def test_names_that_lead_out_of_the_bundle(bundle_copy, bundle_refused, name):
    files = json.loads((bundle_copy / MANIFEST).read_text())["files"]
    files[0]["path"] = name
    assert "outside the bundle" in bundle_refused(edited(bundle_copy, files=files))


def test_a_tokenizer_outside_of_the_bundle(bundle_copy, bundle_refused):
    tokenizer = json.loads((bundle_copy / MANIFEST).read_text())["tokenizer"] | {"file": "../x"}
    assert "must list '../x' exactly once" in bundle_refused(edited(bundle_copy, tokenizer=tokenizer))


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", "[" * 100_000])
def test_a_damaged_manifest(bundle_copy, bundle_refused, text):
    (bundle_copy / MANIFEST).write_text(text, encoding="latin-1")
    assert MANIFEST in bundle_refused(bundle_copy) or "schema" in bundle_refused(bundle_copy)


def test_an_unreadable_verification(bundle_copy, refused):
    edited(bundle_copy, verification={"verified": True, "stages": 5})
    assert "verification is not readable" in refused("inspect", bundle_copy)


def test_what_is_no_bundle(tmp_path, refused, photo, golden):
    assert "there is no such folder" in refused("inspect", tmp_path / "nothing")
    assert f"has no {MANIFEST}" in refused("inspect", tmp_path)
    assert f"has no {MANIFEST}" in refused("inspect", photo)
    assert f"has no {MANIFEST}" in refused("run", tmp_path, photo, "What?")
    assert "it is a checkpoint; export it first" in refused("inspect", golden)
    assert "it is a checkpoint; export it first" in refused("verify", "demo:moondream2")
    assert "the bundle's name is empty" in refused("inspect", "", code=2)


@pytest.mark.parametrize(
    ("part", "change", "text"),
    [
        ("decoder", {"layers": 10**12}, "model.decoder.layers = 1000000000000, which no model has"),
        ("vision", {"patch_size": 0}, "model.vision.patch_size = 0, which no model has"),
        ("decoder", {"heads": -1}, "model.decoder.heads = -1, which no model has"),
        ("image", {"std": [0.5, 0, 0.5]}, "model.image.std = (0.5, 0.0, 0.5): pixels are divided by it"),
    ],
)
def test_a_manifest_of_a_model_that_cannot_be(bundle_copy, refused, part, change, text):
    manifest = json.loads((bundle_copy / MANIFEST).read_text())
    manifest["model"][part] |= change
    (bundle_copy / MANIFEST).write_text(json.dumps(manifest))
    assert text in refused("verify", bundle_copy)


def test_a_manifest_that_is_a_folder(tmp_path, refused):
    (tmp_path / MANIFEST).mkdir()
    assert "cannot be read: Is a directory" in refused("inspect", tmp_path)


def test_exporting_a_bundle(bundle, export_refused):
    assert "is an exported bundle" in export_refused(bundle, code=2)


def test_the_copy_itself_is_right(bundle_copy, succeed):
    succeed("inspect", bundle_copy, "--check")
    shutil.rmtree(bundle_copy)
