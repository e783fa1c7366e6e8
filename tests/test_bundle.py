"""What a bundle says about itself is true: hashes, schema, self-test vectors, and `inspect`, which prints it."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from vlmedge.bundle import CHUNK, MANIFEST, Manifest, file_entry, open_bundle, schema_text
from vlmedge.errors import BundleError
from vlmedge.parity.pictures import FEATURES, features
from vlmedge.prompt import Tokenizer
from vlmedge.records import decode, encode

SCHEMA_FILE = Path(__file__).parent.parent / "src/vlmedge/bundle.schema.json"
CODE = "from vlmedge.bundle import schema_text; print(schema_text(), end='')"
REGENERATE = f'python -c "{CODE}" > src/vlmedge/bundle.schema.json'


@pytest.fixture
def manifest(bundle) -> Any:
    return json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))


def test_the_shipped_schema_is_fresh():
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text(), f"stale; run: {REGENERATE}"


def test_a_manifest_fits_the_schema(manifest):
    schema = json.loads(SCHEMA_FILE.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(manifest, schema, jsonschema.Draft202012Validator)


def damages(manifest: dict[str, Any]):
    """Manifests with one fault each."""
    for path in ((), ("model",), ("model", "decoder"), ("files", 0), ("profile",)):
        wrong = copy.deepcopy(manifest)
        table: Any = wrong
        for key in path:
            table = table[key]
        name = sorted(table)[-1]
        table[f"{name}x"] = table.pop(name)
        yield f"{'.'.join(map(str, path))}.{name}x", wrong
    for key, value in (("schema", "vlmedge.bundle/3"), ("skills", "query"), ("source", None), ("licence", 5)):
        yield key, {**manifest, key: value}


def test_faults_do_not_fit_the_schema(manifest):
    schema = json.loads(SCHEMA_FILE.read_text())
    for what, wrong in damages(manifest):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema, jsonschema.Draft202012Validator)
        with pytest.raises(BundleError):
            decode(Manifest, wrong, what, BundleError)


def test_round_trip(bundle, manifest):
    opened = open_bundle(bundle).manifest
    assert encode(opened) == manifest
    assert decode(Manifest, encode(opened), "again") == opened


def test_every_file_is_listed_and_nothing_else_is_there(bundle, manifest):
    assert sorted(p.name for p in bundle.iterdir()) == sorted([*(f["path"] for f in manifest["files"]), MANIFEST])
    roles = {f["role"]: f["path"] for f in manifest["files"]}
    assert roles == {
        "heads": "heads.gguf",
        "mmproj": "mmproj.gguf",
        "text": "text.gguf",
        "tokenizer": "tokenizer.json",
        "selftest": "selftest.json",
    }


def test_hashes(bundle, manifest):
    for entry in manifest["files"]:
        data = (bundle / entry["path"]).read_bytes()
        assert entry["bytes"] == len(data)
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
    open_bundle(bundle).check()


def test_chunk_hashes(tmp_path):
    data = np.random.default_rng(0).bytes(2 * CHUNK + 5)
    (tmp_path / "x").write_bytes(data)
    entry = file_entry(tmp_path, "x", "text")
    assert CHUNK == 8 * 1024 * 1024
    assert entry.chunks == tuple(hashlib.sha256(data[i : i + CHUNK]).hexdigest() for i in range(0, len(data), CHUNK))
    assert entry.sha256 == hashlib.sha256(data).hexdigest()
    assert file_entry(tmp_path, "x", "text") == entry


def test_a_file_without_content(tmp_path):
    (tmp_path / "x").touch()
    entry = file_entry(tmp_path, "x", "text")
    assert (entry.bytes, entry.chunks, entry.sha256) == (0, (), hashlib.sha256().hexdigest())


def test_size_is_that_of_the_folder(bundle):
    assert open_bundle(bundle).bytes == sum(p.stat().st_size for p in bundle.iterdir())


def test_the_sources_hashes(bundle, manifest, golden):
    digest = hashlib.sha256((golden / "model.safetensors").read_bytes()).hexdigest()
    assert manifest["source"]["files"] == {"model.safetensors": digest}
    assert (bundle / "tokenizer.json").read_bytes() == (golden / "tokenizer.json").read_bytes()


def test_numbers_of_the_components(manifest):
    for component in manifest["components"]:
        assert component["bytes"] == sum(component["types"].values())
        assert component["bytes"] == 4 * component["parameters"]  # f32
        assert manifest["memory"]["weights"][component["name"]] == component["bytes"]
    decoder = manifest["model"]["decoder"]
    position = 2 * decoder["layers"] * decoder["kv_heads"] * decoder["head_dim"] * 4
    assert manifest["memory"]["kv_per_position"] == position
    assert manifest["memory"]["kv_context"] == position * decoder["context"]


# ---- self-test vectors --------------------------------------------------------------------------------------------


@pytest.fixture
def vectors(bundle) -> Any:
    return json.loads((bundle / "selftest.json").read_text(encoding="utf-8"))


def from_formula(words: str, height: int, width: int) -> Any:
    """The picture that the sentence describes: its right-hand side is an expression in x, y and c."""
    expression, _, rest = words.partition(" = ")[2].partition(", ")
    assert rest == "as unsigned integers, modulo 256"
    y, x, c = np.mgrid[0:height, 0:width, 0:3]
    return (eval(expression, {"x": x, "y": y, "c": c}) % 256).astype(np.uint8)


def test_pictures_of_the_self_test(vectors):
    assert len(vectors["pictures"]) == 2
    for vector in vectors["pictures"]:
        picture = from_formula(vectors["pixels"], vector["height"], vector["width"])
        assert hashlib.sha256(picture.tobytes()).hexdigest() == vector["rgb_sha256"]
        rows, columns = vector["tiling"]
        assert len(vector["crops_sha256"]) == 1 + rows * columns
    assert {tuple(v["tiling"]) == (1, 1) for v in vectors["pictures"]} == {True, False}


def test_features_of_the_self_test(vectors):
    assert FEATURES in json.dumps(vectors)
    expression, _, rest = FEATURES.partition(" = ")[2].partition(" for the ")
    assert rest == "i-th element in row-major order, float32"
    code = expression.replace("mod", "%").replace("^", "**")
    got = np.array([eval(code, {"i": i}) for i in range(3 * 7 * 5)], np.float32)
    assert np.array_equal(got.reshape(3, 7, 5), features(3, 7, 5))


def test_texts_of_the_self_test(vectors, bundle):
    texts = {v["text"] for v in vectors["text"]}
    assert len(texts) > 200
    tokenizer = Tokenizer((bundle / "tokenizer.json").read_bytes())
    assert all(tokenizer.encode(v["text"]) == v["ids"] for v in vectors["text"])


def test_the_model_is_in_the_self_test(vectors, manifest):
    assert vectors["recorded_with"] == "llamacpp"
    width = manifest["model"]["vision"]["width"]
    assert vectors["model"]["features"]["output"]["shape"][-2:] == [729, width]


# ---- inspect ------------------------------------------------------------------------------------------------------


def test_inspect_prints_everything(succeed, bundle, manifest):
    done = succeed("inspect", bundle, "--check")
    assert done.err == ""
    assert "hashes right" in done.out
    for entry in manifest["files"]:
        assert entry["path"] in done.out
        assert f"{entry['bytes']:,}" in done.out
        assert entry["sha256"] in done.out
    for component in manifest["components"]:
        assert f"{component['parameters']:,}" in done.out
    for sentence in (*manifest["stock"], *manifest["notes"]):
        assert sentence in done.out
    assert "verified   no: verification was turned off (--no-verify)" in done.out


def test_inspect_as_json_is_the_manifest(succeed, bundle, manifest):
    done = succeed("inspect", bundle, "--json")
    assert done.data == manifest
    assert done.err == ""
