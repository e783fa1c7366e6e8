"""The GGUF runtime on the golden checkpoint at profile f32: every stage, tokens, boxes and points are upstream's."""

from __future__ import annotations

import contextlib
import gc
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from PIL import Image

from vlmedge import imaging
from vlmedge.checkpoint import open_folder
from vlmedge.errors import BundleError, ContextError, MissingExtraError, RuntimeFailedError, UnsupportedError
from vlmedge.exporters import EXPORTERS, ExportJob
from vlmedge.exporters.choice import choose
from vlmedge.families import family_of
from vlmedge.generate import Conversation, Embedded, Prefix, Sampler, generate
from vlmedge.regions import RegionDecoder
from vlmedge.runtimes import Opening, llamacpp, llamacpp_probe
from vlmedge.runtimes.cores import physical_cores
from vlmedge.runtimes.ggml_file import GgufFile
from vlmedge.runtimes.ggml_matmul import GgmlMatmuls
from vlmedge.runtimes.llamacpp_heads import gelu_tanh
from vlmedge.runtimes.llamacpp_native import load_native
from vlmedge.runtimes.llamacpp_session import LlamaCppSession
from vlmedge.spec import ModelSpec

DATA = Path(__file__).parent / "data/moondream2"
TINY = DATA / "tiny-mha"
RESULTS = json.loads((TINY / "results_fp32.json").read_text())
TOLERANCE = 5e-3  # ggml's GELU reads a table of half-precision values: 0.3e-3 in the features, 1e-3 in the logits
PICTURES = ("small", "big")
FILES = ("text.gguf", "mmproj.gguf", "heads.gguf")


@dataclass
class Bundle:
    spec: ModelSpec
    folder: Path
    stages: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    checkpoint = open_folder(TINY)
    family = family_of(checkpoint)
    spec = family.spec(checkpoint)
    tensors = family.weights(spec).bind(checkpoint.tensors)
    folder = tmp_path_factory.mktemp("golden")
    EXPORTERS["gguf"].write(
        ExportJob(choose("gguf", "f32").order(spec), tensors, family.tokenizer(checkpoint), "tiny", folder, threads=2)
    )
    return Bundle(spec, folder, dict(np.load(TINY / "stages.npz")))


@pytest.fixture(scope="module")
def session(bundle):
    # One thread: with two, each of a thousand small steps waits for both, which takes minutes on a busy machine.
    opened = LlamaCppSession(bundle.spec, bundle.folder, kv_type="f32", threads=1)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def seen(bundle, session):
    """Picture name -> (features, projected, prefix of BOS and picture)."""
    out = {}
    for name in PICTURES:
        crops = imaging.crop(np.asarray(Image.open(DATA / f"images/{name}.png").convert("RGB")), bundle.spec.image)
        features = session.vision(crops.pixels)
        projected = session.project(features, crops.tiling)
        assert crops.tiling == tuple(bundle.stages[f"{name}.tiling"])
        out[name] = features, projected, Prefix(((0,), Embedded(name, projected)))
    return out


@pytest.fixture
def conversation(session):
    session.rewind(0)
    return Conversation(session, bidirectional_prefix=True)


def distance(ours, theirs) -> float:
    """Relative RMS difference."""
    return float(np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2)))


@pytest.mark.parametrize("name", PICTURES)
def test_features_and_projection(bundle, seen, name):
    features, projected, _ = seen[name]
    step = 8 if name == "small" else 16
    assert distance(features[:, ::step], bundle.stages[f"{name}.features"]) < TOLERANCE
    assert distance(projected[::step], bundle.stages[f"{name}.projected"]) < TOLERANCE


@pytest.mark.parametrize("name", PICTURES)
def test_prefill(bundle, seen, conversation, name):
    conversation.begin(seen[name][2])
    ids = tuple(RESULTS[name]["caption_short"]["prompt_ids"])
    step = conversation.ask([ids], hidden=True)
    assert distance(step.logits, bundle.stages[f"{name}.caption_logits"]) < TOLERANCE
    assert distance(step.hidden, bundle.stages[f"{name}.caption_hidden"]) < TOLERANCE


@pytest.mark.parametrize("name", PICTURES)
def test_hidden_of_a_bidirectional_prefix(bundle, seen, session, name):
    session.rewind(0)
    rows = np.concatenate([session.embed(np.zeros(1, np.int32)), seen[name][1]])
    step = session.forward(rows, bidirectional=True, hidden=True)
    assert session.position == bundle.spec.image_tokens + 1
    assert distance(step.hidden, bundle.stages[f"{name}.prefix_hidden"]) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "skill"),
    [
        ("small", "caption_short"),
        ("small", "caption_normal"),
        ("small", "caption_long"),
        ("small", "query"),
        ("small", "query2"),
        ("big", "caption_short"),
    ],
)
def test_tokens(seen, conversation, name, skill):
    known = RESULTS[name][skill]
    conversation.begin(seen[name][2])
    first = conversation.ask([tuple(known["prompt_ids"])])
    done = generate(conversation, first, stop=[0], banned=[3], max_tokens=64, sampler=Sampler())
    assert list(done.ids) == known["tokens"]


def test_tokens_without_a_picture(bundle, conversation):
    known = RESULTS["query_text_only"]
    first = conversation.ask([tuple(known["prompt_ids"])])
    assert distance(first.logits, bundle.stages["text.logits"]) < TOLERANCE
    done = generate(conversation, first, stop=[0], banned=[3], max_tokens=64, sampler=Sampler())
    assert list(done.ids) == known["tokens"]


def test_boxes(bundle, seen, conversation):
    known = RESULTS["small"]["detect"]
    conversation.begin(seen["small"][2])
    first = conversation.ask([tuple(known["prompt_ids"])], hidden=True)
    found = list(RegionDecoder(bundle.spec.region, conversation).objects(first, stop=[0], sizes=True, most=150))
    assert [token for token, _ in found] == known["boundary_tokens"]
    for (_, box), expected in zip(found[:-1], known["objects"], strict=True):
        for side, value in expected.items():
            assert getattr(box, side) == pytest.approx(value, abs=1e-6)


def test_points_of_a_picture_of_several_crops(bundle, seen, conversation):
    known = RESULTS["big"]["point"]
    conversation.begin(seen["big"][2])
    first = conversation.ask([tuple(known["prompt_ids"])], hidden=True)
    points = RegionDecoder(bundle.spec.region, conversation).objects(first, stop=[0], sizes=False, most=8)
    found = [(token, point.x, point.y) for token, point in points]
    assert found == [
        (token, point["x"], point["y"]) for token, point in zip(known["boundary_tokens"], known["points"], strict=False)
    ]


def test_region_heads(bundle, session):
    """The heads alone, on upstream's hidden states: exact bins, and no half-precision table in the way."""
    hidden, coordinates = bundle.stages["small.region_hidden"], bundle.stages["small.region_coords"]
    sizes = bundle.stages["small.region_sizes"]
    rows = [(0, 1), (3, 4)]  # a box is x, y, size
    for box, (x, y) in enumerate(rows):
        for coordinate, row in enumerate((x, y)):
            ours = session.head("coord_decoder", hidden[row])
            assert distance(ours, coordinates[2 * box + coordinate]) < 1e-4
        assert distance(session.head("size_decoder", hidden[y + 1]).reshape(2, -1), sizes[box]) < 1e-4
    with pytest.raises(ValueError, match="no region head"):
        session.head("coord_lookup", hidden[0])


def test_several_questions_on_one_picture(seen, conversation, session):
    conversation.begin(seen["small"][2])
    length = session.position
    ids = [np.array(RESULTS["small"][skill]["prompt_ids"], np.int32) for skill in ("query", "query2")]
    first = session.forward(ids[0]).logits
    session.rewind(length)
    second = session.forward(ids[1]).logits
    session.rewind(length)
    assert session.position == length
    assert np.array_equal(session.forward(ids[0]).logits, first)
    assert not np.array_equal(first, second)


def test_the_cache_survives_the_first_hidden_state(bundle, seen):
    """Asking for a hidden state makes llama.cpp's context anew, with the picture still in the cache."""
    ids = np.array(RESULTS["small"]["detect"]["prompt_ids"], np.int32)
    with_picture = np.concatenate([np.zeros((1, bundle.spec.decoder.width), np.float32), seen["small"][1]])
    fresh = LlamaCppSession(bundle.spec, bundle.folder, threads=1)
    fresh.forward(with_picture, bidirectional=True)
    before = fresh.forward(ids)
    fresh.rewind(len(with_picture))
    after = fresh.forward(ids, hidden=True)
    assert before.hidden is None
    assert after.hidden is not None
    assert distance(after.logits, before.logits) < 1e-6
    assert fresh.position == len(with_picture) + len(ids)
    fresh.close()


def test_logits_of_every_position_and_prompts_of_several_pieces(session, bundle):
    ids = np.random.default_rng(0).integers(16, 400, 1000).astype(np.int32)
    session.rewind(0)
    every = session.forward(ids, every=True).logits
    assert every.shape == (1000, bundle.spec.decoder.vocab)
    session.rewind(0)
    session.forward(ids[:500])
    assert distance(session.forward(ids[500:501]).logits, every[500]) < 1e-4
    assert distance(session.forward(ids[501:]).logits, every[-1]) < 1e-4


def test_embeddings_are_the_checkpoints(session):
    table = open_folder(TINY).tensors["model.text.wte"].read()
    assert np.array_equal(session.embed(np.array([0, 511, 7], np.int32)), table[[0, 511, 7]])
    assert session.embed(np.zeros(0, np.int32)).shape == (0, 128)
    with pytest.raises(ValueError, match="512"):
        session.embed(np.array([512], np.int32))


@pytest.mark.parametrize("kv_type", ["f16", "f32"])
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_memory_modes(bundle, seen, conversation, memory, kv_type):
    ids = np.array(RESULTS["small"]["query"]["prompt_ids"], np.int32)
    conversation.begin(seen["small"][2])
    expected = conversation.session.forward(ids).logits
    opened = llamacpp.open_session(Opening(bundle.spec, bundle.folder, threads=1, memory=memory, kv_cache=kv_type))
    Conversation(opened, bidirectional_prefix=True).begin(seen["small"][2])
    assert distance(opened.forward(ids).logits, expected) < TOLERANCE
    info = opened.info()
    assert (info["threads"], info["memory"], info["kv_cache"]) == (1, memory, kv_type)
    opened.close()


def test_a_context_that_is_full(session, bundle):
    session.rewind(0)
    session.forward(np.full(2000, 20, np.int32))
    with pytest.raises(ContextError, match=r"2049 .* 2048.*2000 are taken, 49"):
        session.forward(np.full(49, 20, np.int32))
    assert session.position == 2000
    session.forward(np.full(48, 20, np.int32))
    assert session.position == session.context == 2048


def test_inputs_that_native_code_would_not_survive(session, bundle):
    session.rewind(0)
    width = bundle.spec.decoder.width
    with pytest.raises(ValueError, match="n > 0"):
        session.forward(np.zeros(0, np.int32))
    with pytest.raises(ValueError, match="embeddings"):
        session.forward(np.zeros((3, width - 1), np.float32))
    with pytest.raises(UnsupportedError, match="768"):
        session.forward(np.zeros((800, width), np.float32), bidirectional=True)
    with pytest.raises(ValueError, match="378x378"):
        session.vision(np.zeros((1, 377, 378, 3), np.uint8))
    with pytest.raises(ValueError, match="48"):
        session.project(np.zeros((1, 729, 47), np.float32), (1, 1))
    with pytest.raises(RuntimeFailedError, match="invalid token"):
        session.forward(np.array([20, 512], np.int32))
    assert session.position == 0


def test_two_sessions_at_once(bundle, seen):
    first, second = (LlamaCppSession(bundle.spec, bundle.folder, threads=1) for _ in range(2))
    ids = np.array(RESULTS["small"]["query"]["prompt_ids"], np.int32)
    Conversation(first, True).begin(seen["small"][2])
    Conversation(second, True).begin(seen["big"][2])
    logits = [s.forward(ids, hidden=True).logits for s in (first, second, first, second)]
    first.rewind(730)
    assert np.array_equal(first.forward(ids).logits, logits[0])
    assert not np.array_equal(logits[0], logits[1])
    first.close()
    second.rewind(730)
    assert np.array_equal(second.forward(ids).logits, logits[1])
    second.close()


def test_closing(bundle):
    opened = LlamaCppSession(bundle.spec, bundle.folder, threads=1)
    opened.close()
    opened.close()
    with pytest.raises(ValueError, match="closed"):
        opened.forward(np.array([1], np.int32))
    with pytest.raises(ValueError, match="closed"):
        _ = opened.position
    forgotten = LlamaCppSession(bundle.spec, bundle.folder, threads=1)
    finalizer = forgotten._close
    del forgotten
    gc.collect()
    assert not finalizer.alive


def test_nothing_is_printed(bundle, seen, capfd):
    opened = LlamaCppSession(bundle.spec, bundle.folder, threads=1)
    opened.vision(np.zeros((1, 378, 378, 3), np.uint8))
    opened.forward(np.array([5], np.int32), hidden=True)
    opened.close()
    assert capfd.readouterr() == ("", "")


def copied(bundle, folder):
    for name in FILES:
        (folder / name).write_bytes((bundle.folder / name).read_bytes())
    return folder


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("keep", "said"), [(None, "missing"), (0, "empty"), (3, "damaged"), (5000, "damaged|truncated"), (-1, "truncated")]
)
def test_damaged_files(bundle, tmp_path, name, keep, said):
    path = copied(bundle, tmp_path) / name
    if keep is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BundleError, match=said) as caught:
        LlamaCppSession(bundle.spec, tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_something_else(bundle, tmp_path, name):
    (copied(bundle, tmp_path) / name).write_bytes(b"PK\x03\x04" + bytes(5000))
    with pytest.raises(BundleError, match="not a GGUF file"):
        LlamaCppSession(bundle.spec, tmp_path)


def test_files_of_another_model(bundle, tmp_path, capfd):
    other = replace(bundle.spec, decoder=replace(bundle.spec.decoder, layers=4))
    with pytest.raises(BundleError, match=r"\(3, 128, 512\), not of \(4, 128, 512\)"):
        LlamaCppSession(other, bundle.folder)
    folder = copied(bundle, tmp_path)
    (folder / "text.gguf").write_bytes((folder / "mmproj.gguf").read_bytes())
    with pytest.raises(BundleError, match=r"text\.gguf does not load: .*CLIP"):
        LlamaCppSession(bundle.spec, folder)
    assert capfd.readouterr() == ("", "")


def test_a_header_that_lies(bundle, tmp_path):
    """Every early byte flipped: a clear error or a header that reads, never a crash or a long loop."""
    whole = (bundle.folder / "heads.gguf").read_bytes()
    path = tmp_path / "heads.gguf"
    for at in range(0, 900, 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        with contextlib.suppress(BundleError):
            GgufFile(path)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_0"])
def test_products_with_stored_weights(tmp_path, name):
    kind = gguf.GGMLQuantizationType[name]
    rng = np.random.default_rng(0)
    packed = gguf.quants.quantize(rng.standard_normal((96, 256), dtype=np.float32), kind)
    weight = gguf.quants.dequantize(packed, kind).reshape(96, 256)
    writer = gguf.GGUFWriter(tmp_path / "w.gguf", "test")
    writer.add_tensor("w.weight", packed, raw_dtype=kind)
    writer.add_tensor("w.bias", np.arange(96, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file, matmuls = GgufFile(tmp_path / "w.gguf"), GgmlMatmuls(load_native().ggml, 2)
    x = rng.standard_normal((33, 256), dtype=np.float32)
    # ggml rounds the other factor too: to half precision, bfloat16 or 8 bits.
    assert distance(matmuls.linear(file, "w", x), x @ weight.T + np.arange(96)) < 8e-3
    assert np.array_equal(matmuls.rows(file, "w.weight", np.array([95, 0], np.int32)), weight[[95, 0]])
    with pytest.raises(BundleError, match="no tensor v"):
        matmuls.rows(file, "v", np.array([0], np.int32))
    matmuls.close()
    matmuls.close()


def test_gelu_is_the_tanh_form():
    x = np.linspace(-12, 12, 4001, dtype=np.float32).reshape(-1, 1)
    exact = x.astype(np.float64)
    exact = 0.5 * exact * (1 + np.tanh(np.sqrt(2 / np.pi) * (exact + 0.044715 * exact**3)))
    assert np.abs(gelu_tanh(x.copy()) - exact).max() < 2e-6


DIES = (sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")


def test_a_library_that_crashes_is_reported_and_remembered(tmp_path):
    with pytest.raises(
        RuntimeFailedError, match=r"crashes with SIGSEGV .*CXXFLAGS=\"-fno-tree-dse -fno-dse\" pip install"
    ):
        llamacpp_probe.check(DIES, tmp_path / "cache")
    assert "SIGSEGV" in (llamacpp_probe.known_failure(tmp_path / "cache") or "")
    with pytest.raises(RuntimeFailedError, match="SIGSEGV"):  # remembered: this command would pass
        llamacpp_probe.check((sys.executable, "-c", ""), tmp_path / "cache")


def test_a_probe_that_fails_or_hangs():
    assert llamacpp_probe.run((sys.executable, "-c", "raise SystemExit('Q4_0 products are wrong')")) == (
        "fails (Q4_0 products are wrong)"
    )
    assert "hangs" in llamacpp_probe.run((sys.executable, "-c", "import time; time.sleep(60)"), timeout=0.5)


def test_the_installed_library_passes_once(tmp_path):
    llamacpp_probe.check(cache=tmp_path)
    assert llamacpp_probe.known_failure(tmp_path) is None
    llamacpp_probe.check(DIES, tmp_path)  # not run again
    llamacpp_probe.check((sys.executable, "-c", ""), tmp_path / "file.txt" / "below")  # no cache, no harm


def test_what_is_missing(monkeypatch, bundle):
    assert llamacpp.missing() is None
    assert llamacpp.RUNTIME.loads == "gguf"
    monkeypatch.setattr(llamacpp.importlib.metadata, "version", lambda name: "0.2.90")
    assert "0.2.90 is too old" in (llamacpp.missing() or "")
    monkeypatch.setattr(llamacpp.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'vlmedge[llamacpp]'" in (llamacpp.missing() or "")
    with pytest.raises(MissingExtraError):
        llamacpp.open_session(Opening(bundle.spec, bundle.folder))


def test_threads_are_cores():
    assert 1 <= physical_cores() <= 4096
