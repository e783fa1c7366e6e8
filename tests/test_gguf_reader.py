"""GGUF exports read back: values within their grain's step, the facts of the spec, and nothing that is not there."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers

import vlmedge
from vlmedge.bundle import open_bundle
from vlmedge.checkpoint import open_folder
from vlmedge.errors import BundleError
from vlmedge.exporters import EXPORTERS, ExportJob, Readback
from vlmedge.exporters.choice import choose
from vlmedge.exporters.gguf import quantizer, reader
from vlmedge.exporters.gguf.dequantizer import GRAINS, decode
from vlmedge.exporters.gguf.facts import VOCABULARY, _layers, read_facts, read_metadata, tokenizer_facts
from vlmedge.exporters.gguf.ggml import TYPES
from vlmedge.exporters.gguf.layout import HEADS, LOCAL, MMPROJ, TEXT
from vlmedge.families import family_of
from vlmedge.parity.selftest_file import read_vectors
from vlmedge.quant_profiles import profiles_for
from vlmedge.runtimes.ggml_file import GgufFile
from vlmedge.session import F32
from vlmedge.spec import ModelSpec

TINY = Path(__file__).parent / "data" / "moondream2" / "tiny-mha"
CHECKPOINT = open_folder(TINY)
FAMILY = family_of(CHECKPOINT)
SPEC: ModelSpec = FAMILY.spec(CHECKPOINT)
SOURCE = FAMILY.weights(SPEC).bind(CHECKPOINT.tensors)
TOKENIZER: bytes = FAMILY.tokenizer(CHECKPOINT)
GGUF = EXPORTERS["gguf"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The golden checkpoint in a profile, exported once."""
    folder, done = tmp_path_factory.mktemp("reader"), dict[str, Path]()

    def export(profile: str) -> Path:
        if profile not in done:
            out = folder / f"{profile}.gguf"
            done[profile] = vlmedge.export(TINY, "gguf", profile, out, verify=False, threads=1).path
        return done[profile]

    return export


@pytest.fixture
def copy(exported: Callable[[str], Path], tmp_path: Path) -> Path:
    """An f32 export to be damaged."""
    return Path(shutil.copytree(exported("f32"), tmp_path / "copy"))


def largest(values: F32) -> F32:
    """The largest magnitude of each row."""
    return np.asarray(np.abs(values).max(axis=1, keepdims=True), np.float32)


def worst(found: Readback, name: str) -> float:
    """The largest error of one tensor, in units of the step that its grain allows."""
    want, grain = SOURCE[name].read(), found.grains[name]
    want = want.reshape(SOURCE[name].rows, -1)
    got = found.tensors[name].read().reshape(want.shape)
    # Integers: half a step of a range -max..max, a whole one at the end of a lopsided range, and its rounded scale.
    step = {32: 2.0**-24, 16: 2.0**-11}.get(grain.bits, 1.02 * 2.0 ** (1 - grain.bits))
    scale = largest(want)
    if grain.pieces > 1:  # the joined projector: errors of the fold and of the local half
        half = want.shape[1] // 2
        scale = largest(want[:, :half] + want[:, half:]) + largest(want)
    return float((np.abs(got - want) / np.maximum(scale * step, 1e-12)).max())


@pytest.mark.parametrize("profile", profiles_for("gguf"))
def test_an_export_reads_back_as_its_source(exported: Callable[[str], Path], profile: str):
    found = GGUF.read(SPEC, exported(profile))
    assert {name: tensor.shape for name, tensor in found.tensors.items()} == SPEC.tensors()
    assert found.grains.keys() == found.tensors.keys()
    assert {name for name, grain in found.grains.items() if grain.pieces > 1} == {reader.JOINED}
    assert {name: worst(found, name) for name in SOURCE if worst(found, name) > 1} == {}
    if profile == "f32":
        assert all(np.array_equal(found.tensors[n].read(), SOURCE[n].read()) for n in SOURCE if n != reader.JOINED)
    expected = GGUF.encodings(choose("gguf", profile).order(SPEC))
    assert all(found.grains[n].bits == GRAINS[expected[n].type].bits for n in SOURCE)
    facts = dict(found.facts)
    assert facts[VOCABULARY] == tokenizer_facts(SPEC, TOKENIZER)[VOCABULARY]
    expected_words = GGUF.tokenizer_facts(SPEC, TOKENIZER)
    assert {path: facts.pop(path) for path in expected_words} == expected_words
    for path, value in facts.items():
        part, _, field = path.partition(".")
        assert np.array_equal(rounded(value), rounded(getattr(getattr(SPEC, part), field))), path
    assert len(facts) == 23


def rounded(value: Any) -> Any:
    """Floats as files of float32 have them."""
    return np.float32(value) if isinstance(value, float | tuple) else value


def test_rows_are_read_by_themselves(exported: Callable[[str], Path]):
    found = GGUF.read(SPEC, exported("q4"))
    for name in ("decoder.layers.0.mlp.up.weight", "vision.layers.1.mlp.up.weight", reader.JOINED, "decoder.norm.bias"):
        tensor = found.tensors[name]
        rows = [tensor.read_rows(i, i + 1) for i in range(tensor.rows)]
        whole = tensor.read()
        assert np.array_equal(np.concatenate(rows).reshape(tensor.shape), whole)
        assert type(whole) is np.ndarray
        assert whole.flags.writeable


def test_decoding_agrees_with_the_other_implementation():
    """gguf.quants is ggml's dequantizer in numpy, written by others."""
    rows = np.random.default_rng(5).standard_normal((8, 512), np.float32)
    assert GRAINS.keys() == TYPES.keys()
    for kind in TYPES.values():
        stored = quantizer.encode(rows, kind)
        want = gguf.quants.dequantize(stored.reshape(8, -1), gguf.GGMLQuantizationType(kind.number))
        np.testing.assert_allclose(decode(stored, kind, 512), want.reshape(8, 512), rtol=1e-6, atol=1e-7)


def test_parts_are_read_and_a_missing_one_is_named(exported: Callable[[str], Path], tmp_path: Path):
    order = replace(choose("gguf", "f32").order(SPEC), max_part=300_000)
    GGUF.write(ExportJob(order, SOURCE, TOKENIZER, "tiny", tmp_path, threads=1))
    paths = sorted(tmp_path.glob("text-*.gguf"))
    assert len(paths) > 2
    found, whole = GGUF.read(SPEC, tmp_path), GGUF.read(SPEC, exported("f32"))
    assert found.facts == whole.facts
    for name, tensor in whole.tensors.items():
        assert np.array_equal(found.tensors[name].read(), tensor.read())
    for path in (paths[1], paths[-1]):
        path.rename(tmp_path / "away")
        with pytest.raises(BundleError, match=r"lacks a part of text\.gguf"):
            GGUF.read(SPEC, tmp_path)
        (tmp_path / "away").rename(path)
    last = next(path for path in paths if "blk.2.attn_q.bias" in GgufFile(path).tensors)
    assert "blk.0.attn_q.bias" not in GgufFile(last).tensors
    patch(last, b"blk.2.attn_q.bias", b"blk.0.attn_q.bias")
    with pytest.raises(BundleError, match=rf"{last.name} has the tensor blk\.0\.attn_q\.bias twice"):
        GGUF.read(SPEC, tmp_path)


def patch(path: Path, old: bytes, new: bytes) -> None:
    """Change the one place where the bytes `old` stand."""
    data = path.read_bytes()
    assert data.count(old) == 1
    assert len(old) == len(new)
    path.write_bytes(data.replace(old, new))


@pytest.mark.parametrize(
    ("file", "old", "new", "text"),
    [
        (TEXT, b"blk.1.attn_q.bias", b"blk.9.attn_q.bias", "blk.9.attn_q.bias which this model does not have there"),
        (TEXT, b"output_norm.weight", b"decoder.norm.weigh", "decoder.norm.weigh which this model"),
        (TEXT, b"blk.1.attn_q.bias", b"blk.0.attn_q.bias", "no tensor for decoder.layers.1.attn.q.bias"),
        (HEADS, LOCAL.encode(), LOCAL.encode()[:-1] + b"x", "projector.local.weighx which"),
        (MMPROJ, b"v.patch_embd.bias", b"v.patch\xffembd.bias", "is damaged"),
    ],
)
def test_a_damaged_name_is_refused(copy: Path, file: str, old: bytes, new: bytes, text: str):
    patch(copy / file, old, new)
    with pytest.raises(BundleError, match=f"{re.escape(str(copy / file))}.*{text}"):
        GGUF.read(SPEC, copy)


def test_a_missing_tensor_is_named(copy: Path):
    deeper = replace(SPEC, decoder=replace(SPEC.decoder, layers=SPEC.decoder.layers + 1))
    with pytest.raises(BundleError, match=r"text.gguf has no tensor for decoder.layers.3.norm1.weight"):
        GGUF.read(deeper, copy)


def test_a_wrong_shape_is_refused(exported: Callable[[str], Path]):
    wider = replace(SPEC, decoder=replace(SPEC.decoder, mlp_width=SPEC.decoder.mlp_width + 32))
    with pytest.raises(
        BundleError, match=r"blk.0.ffn_up.weight is \[.*\], not \[.*\] as decoder.layers.0.mlp.up.weight"
    ):
        GGUF.read(wider, exported("q8"))
    wider = replace(SPEC, vision=replace(SPEC.vision, mlp_width=SPEC.vision.mlp_width + 32))
    with pytest.raises(BundleError, match=r"v.blk.0.ffn_up.weight is \[96, 48\], not \[112, 48\]"):
        GGUF.read(wider, exported("q8"))


@pytest.mark.parametrize("file", [TEXT, MMPROJ, HEADS])
def test_a_file_that_is_cut_or_missing_is_refused(copy: Path, file: str):
    data = (copy / file).read_bytes()
    for size, text in ((len(data) - 64, "truncated"), (200, "damaged"), (0, "empty")):
        (copy / file).write_bytes(data[:size])
        with pytest.raises(BundleError, match=text):
            GGUF.read(SPEC, copy)
    (copy / file).unlink()
    with pytest.raises(BundleError, match=f"{file} is missing"):
        GGUF.read(SPEC, copy)


@pytest.mark.parametrize("part", ["up.weight", "up.bias", "down.weight"])
def test_padding_that_is_not_zero_is_refused(exported: Callable[[str], Path], tmp_path: Path, part: str):
    folder = Path(shutil.copytree(exported("q8"), tmp_path / "copy"))
    stored = GgufFile(folder / MMPROJ)[f"v.blk.1.ffn_{part}"]
    end = stored.offset + stored.bytes
    data = bytearray((folder / MMPROJ).read_bytes())
    data[end - 3 : end] = b"\x3f\x3f\x3f"
    (folder / MMPROJ).write_bytes(data)
    tensor = GGUF.read(SPEC, folder).tensors[f"vision.layers.1.mlp.{part}"]
    tensor.read_rows(0, tensor.rows - 1)  # padding elsewhere is sound
    with pytest.raises(BundleError, match=r"is not zero beyond .*, its padding"):
        tensor.read()


def test_padding_of_a_type_without_a_zero_is_taken(tmp_path: Path):
    """IQ4_NL's steps are ..., -10, 1, 13, ...: zeros among other values come back as a small number."""
    order = choose("gguf", "q8").order(SPEC)
    plan = {n: replace(s, native={"gguf": "IQ4_NL"}) if ".mlp." in n else s for n, s in order.plan.items()}
    GGUF.write(ExportJob(replace(order, plan=plan), SOURCE, TOKENIZER, "tiny", tmp_path, threads=1))
    name = "vision.layers.0.mlp.down.weight"
    found = GGUF.read(SPEC, tmp_path)
    assert found.grains[name] == GRAINS["IQ4_NL"]
    assert worst(found, name) < 1


def test_facts_are_what_the_files_say(copy: Path):
    patch(copy / MMPROJ, b"clip.use_gelu", b"clip.use_silu")
    patch(copy / MMPROJ, b"clip.vision.feature_layer", b"clip.vision.feature_lay3r")
    patch(copy / MMPROJ, b"clip.vision.image_std", b"clip.vision.image_st0")
    patch(copy / TEXT, b"phi2.rope.dimension_count", b"phi2.rope.dimension_c0unt")
    facts = GGUF.read(SPEC, copy).facts
    assert facts["vision.activation"] == "silu"
    assert facts["vision.layers"] == SPEC.vision.layers - 1  # what mtmd does without the key
    assert facts["image.std"] is None
    assert facts["decoder.rope_dims"] is None
    patch(copy / TEXT, b"\x04\0\0\0\0\0\0\0phi2", b"\x04\0\0\0\0\0\0\0phi3")
    with pytest.raises(BundleError, match="of the architecture phi3; vlmedge writes phi2"):
        GGUF.read(SPEC, copy)


@pytest.mark.parametrize("value", [5, -1.5, True, "text", [1.5], ["text"], [True], None], ids=str)
def test_values_of_other_types_are_facts_that_differ(value: Any):
    keys = {"clip.vision.block_count": 4, "clip.vision.feature_layer": [2]}
    assert _layers(keys) == 2
    assert _layers(keys | {"clip.vision.feature_layer": []}) == 3
    assert _layers(keys | {"clip.vision.feature_layer": value}) is None
    if value != 5:
        assert _layers(keys | {"clip.vision.block_count": value}) is None


@pytest.mark.parametrize("architecture", [["phi2"], 5, "a\nb", "x" * 10_000], ids=["list", "number", "lines", "long"])
def test_metadata_of_other_types_is_read_or_refused(tmp_path: Path, architecture: Any):
    """Files of their own, with just a header."""
    paths = [tmp_path / "text.gguf", tmp_path / "mmproj.gguf"]
    write_header(paths[0], {"general.architecture": architecture})
    words = {"block_count": "four", "feature_layer": 2, "image_size": [5], "image_mean": 0.5, "image_std": ["a"]}
    write_header(paths[1], {f"clip.vision.{key}": value for key, value in words.items()})
    with pytest.raises(BundleError, match="is of the architecture ") as caught:
        read_facts(*map(GgufFile, paths))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    words = {"phi2.block_count": "three", "phi2.attention.head_count": [4], "tokenizer.ggml.tokens": 7}
    write_header(paths[0], {"general.architecture": "phi2", **words})
    facts = read_facts(*map(GgufFile, paths))
    assert (facts["vision.layers"], facts["decoder.layers"], facts["decoder.heads"]) == (None, "three", [4])
    assert (facts["image.mean"], facts["image.std"]) == (0.5, ("a",))


def write_header(path: Path, values: dict[str, Any]) -> None:
    """A GGUF file without tensors."""
    writer = gguf.GGUFWriter(None, "phi2")
    for key, value in values.items():
        kind = gguf.GGUFValueType.get_type(value)
        writer.kv_data[0][key] = gguf.gguf_writer.GGUFValue(value=value, type=kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    "pictures", [[(0, 14)], [(400_000, 400_000)], [(-1, 5)], [], [(10**400, 1)], "swapped"], ids=str
)
def test_vectors_of_pictures_of_other_sizes_are_refused(copy: Path, pictures: Any):
    path = copy / "selftest.json"
    data = json.loads(path.read_text())
    assert len(read_vectors(open_bundle(copy)).pictures) == 2
    if pictures == "swapped":
        data["pictures"].reverse()
    else:
        data["pictures"] = [data["pictures"][0] | {"height": h, "width": w} for h, w in pictures]
    path.write_text(json.dumps(data))
    manifest = json.loads((copy / "vlmedge.json").read_text())
    next(entry for entry in manifest["files"] if entry["role"] == "selftest")["bytes"] = path.stat().st_size
    (copy / "vlmedge.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"selftest\.json has pictures of ") as caught:
        read_vectors(open_bundle(copy))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_another_vocabulary_has_another_digest(exported: Callable[[str], Path]):
    stated, vocab = GGUF.read(SPEC, exported("f32")).facts[VOCABULARY], SPEC.decoder.vocab
    data = json.loads(TOKENIZER)
    data["model"]["merges"] = data["model"]["merges"][:-1]
    smaller = replace(SPEC, decoder=replace(SPEC.decoder, vocab=vocab - 1))
    assert tokenizer_facts(SPEC, json.dumps(data).encode())[VOCABULARY] != stated
    assert tokenizer_facts(smaller, TOKENIZER)[VOCABULARY] != stated
    keys = read_metadata(GgufFile(exported("f32") / TEXT))
    assert keys["tokenizer.ggml.tokens"][:400] == spellings(400)


def spellings(count: int) -> list[str | None]:
    """Tokens by id as the tokenizers library knows them."""
    tokenizer = tokenizers.Tokenizer.from_str(TOKENIZER.decode())
    return [tokenizer.id_to_token(i) for i in range(count)]
