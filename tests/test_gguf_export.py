"""The GGUF exporter: stored numbers are the source's within their type's error, files are the same every time."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from PIL import Image

from vlmedge.checkpoint import open_folder
from vlmedge.errors import CheckpointError, RuntimeFailedError, UnsupportedError
from vlmedge.exporters import EXPORTERS, ExportJob, Written, passing
from vlmedge.exporters.choice import choose
from vlmedge.exporters.gguf import layout, quantizer
from vlmedge.exporters.gguf.ggml import TYPES, fitting, wanted
from vlmedge.exporters.gguf.layout import HEADS, LOCAL, MMPROJ, TEXT
from vlmedge.exporters.gguf.vocabulary import CONTROL, NORMAL, UNUSED, read_vocabulary
from vlmedge.families import family_of
from vlmedge.quant_profiles import Scheme, load_profile, plan, profiles_for
from vlmedge.runtimes.llamacpp_session import LlamaCppSession
from vlmedge.session import F32
from vlmedge.spec import ModelSpec
from vlmedge.tensors import ArrayTensor, Tensor

TINY = Path(__file__).parent / "data" / "moondream2" / "tiny-mha"
# Largest error of a value, in units of its row's largest: half a step (a whole one where the range is
# -8..7), and the rounding of an f16 scale.
ERROR = {"F32": 0, "F16": 5e-4, "Q8_0": 0.0046, "Q6_K": 0.032, "Q5_K": 0.04, "Q5_1": 0.033, "Q5_0": 0.064}
ERROR |= {"Q4_K": 0.08, "Q4_0": 0.127, "Q3_K": 0.26}


class Model:
    """The tiny checkpoint, and exports of it by profile, each made once."""

    def __init__(self, folder: Path) -> None:
        checkpoint = open_folder(TINY)
        family = family_of(checkpoint)
        self.spec: ModelSpec = family.spec(checkpoint)
        self.tensors = family.weights(self.spec).bind(checkpoint.tensors)
        self.tokenizer = family.tokenizer(checkpoint)
        self._folder, self._done = folder, dict[str, tuple[Path, tuple[Written, ...]]]()

    def job(self, profile: str, out: Path, threads: int = 2) -> ExportJob:
        about = {"licence": "Apache-2.0", "repo": "someone/tiny", "revision": "main"}
        order = choose("gguf", profile).order(self.spec)
        return ExportJob(order, self.tensors, self.tokenizer, "tiny", out, threads=threads, about=about)

    def export(self, profile: str) -> Path:
        return self._run(profile)[0]

    def written(self, profile: str) -> tuple[Written, ...]:
        return self._run(profile)[1]

    def _run(self, profile: str) -> tuple[Path, tuple[Written, ...]]:
        if profile not in self._done:
            out = self._folder / profile
            out.mkdir()
            self._done[profile] = out, EXPORTERS["gguf"].write(self.job(profile, out))
        return self._done[profile]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("gguf"))


def read(path: Path) -> dict[str, tuple[str, F32]]:
    """Tensor name -> type name, values [rows, columns] (vectors [1, n])."""
    out = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        shape = [int(n) for n in reversed(tensor.shape)]
        rows = shape[0] if len(shape) > 1 else 1
        out[tensor.name] = tensor.tensor_type.name, values.astype(np.float32).reshape(rows, -1)
    return out


def keys(path: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def with_order(job: ExportJob, **changes: Any) -> ExportJob:
    return replace(job, order=replace(job.order, **changes))


def close(kind: str, got: F32, want: F32) -> None:
    scale = np.abs(want).max(axis=1, keepdims=True)
    worst = float((np.abs(got - want) / np.maximum(scale, 1e-12)).max())
    assert worst <= ERROR[kind], (kind, worst)


@pytest.mark.parametrize("profile", profiles_for("gguf"))
def test_stored_values_are_the_sources(model: Model, profile: str):
    out = model.export(profile)
    stored = {file: read(out / file) for file in (TEXT, MMPROJ, HEADS)}
    encodings = EXPORTERS["gguf"].encodings(choose("gguf", profile).order(model.spec))
    assert sum(map(len, stored.values())) == len(encodings)
    for name, encoding in encodings.items():
        kind, got = stored[encoding.file][encoding.tensor]
        assert kind == encoding.type
        source = model.tensors[name.partition("#")[0]]
        want = source.read().reshape(source.rows, -1)
        if name.partition("#")[0] == "projector.up.weight":
            half = want.shape[1] // 2
            want = want[:, half:] if name.endswith("#local") else want[:, :half] + want[:, half:]
        rows, columns = want.shape
        close(kind, got[:rows, :columns], want)
        assert not got[rows:].any()
        assert not got[:, columns:].any()


def test_files_hold_what_encodings_promise(model: Model):
    out = model.export("q4")
    encodings = EXPORTERS["gguf"].encodings(choose("gguf", "q4").order(model.spec))
    for file in (TEXT, MMPROJ, HEADS):
        reader = {t.name: t for t in gguf.GGUFReader(out / file).tensors}
        for encoding in encodings.values():
            if encoding.file == file:
                assert encoding.bytes == reader[encoding.tensor].n_bytes
                assert encoding.shape == tuple(reversed([int(n) for n in reader[encoding.tensor].shape]))


def test_the_mlp_is_padded_and_the_fold_is_exact(model: Model):
    quantized, plain = read(model.export("q8") / MMPROJ), read(model.export("f32") / MMPROJ)
    assert quantized["v.blk.0.ffn_up.weight"][1].shape == (96, 48)
    assert quantized["v.blk.0.ffn_up.bias"][1].shape == (1, 96)
    assert quantized["v.blk.0.ffn_down.weight"][0] == "Q8_0"
    assert quantized["v.blk.0.ffn_down.weight"][1].shape == (48, 96)
    assert not quantized["v.blk.0.ffn_up.bias"][1][:, 80:].any()
    assert plain["v.blk.0.ffn_up.weight"][1].shape == (80, 48)
    up = model.tensors["projector.up.weight"].read()
    np.testing.assert_array_equal(plain["mm.0.weight"][1], up[:, :48] + up[:, 48:])
    np.testing.assert_array_equal(read(model.export("f32") / HEADS)[LOCAL][1], up[:, 48:])


def test_a_padded_width_is_never_the_towers(model: Model):
    vision = replace(model.spec.vision, width=96, mlp_width=80)
    schemes = plan(load_profile("q8"), model.spec)
    assert layout.mlp_width(replace(model.spec, vision=vision), schemes) == 128


def test_a_real_tower_is_padded_to_whole_blocks(model: Model):
    spec = replace(model.spec, vision=replace(model.spec.vision, width=1152, mlp_width=4304))
    schemes = plan(load_profile("q8"), spec)
    assert layout.mlp_width(spec, schemes) == 4320
    k_quants = {name: Scheme("int", 4, native={"gguf": "Q4_K"}) for name in schemes}
    assert layout.mlp_width(spec, k_quants) == 4352


@pytest.mark.parametrize("profile", ["f16", "q4"])
def test_the_same_input_gives_the_same_bytes(model: Model, tmp_path: Path, profile: str):
    EXPORTERS["gguf"].write(model.job(profile, tmp_path, threads=5))
    for file in (TEXT, MMPROJ, HEADS):
        assert (tmp_path / file).read_bytes() == (model.export(profile) / file).read_bytes()


def test_a_system_without_pwrite_gives_the_same_bytes(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vlmedge.exporters.gguf.container._POSITIONAL", False)  # as on Windows
    EXPORTERS["gguf"].write(model.job("q4", tmp_path))
    for path in sorted(tmp_path.iterdir()):
        assert path.read_bytes() == (model.export("q4") / path.name).read_bytes()


def test_blocks_of_rows_give_the_bytes_of_whole_tensors(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(passing, "UNIT", 1000)
    EXPORTERS["gguf"].write(model.job("q4", tmp_path))
    for file in (TEXT, MMPROJ, HEADS):
        assert (tmp_path / file).read_bytes() == (model.export("q4") / file).read_bytes()


HASH = """
import ctypes, hashlib, sys
from pathlib import Path
import numpy as np
from vlmedge.exporters.gguf import quantizer
from vlmedge.exporters.gguf.ggml import TYPES
quantizer.library_path = lambda: Path(sys.argv[1])
rows = np.random.default_rng(7).standard_normal((64, 512), np.float32)
print({k.name: hashlib.sha256(quantizer.encode(rows, k).tobytes()).hexdigest() for k in TYPES.values()})
"""


def test_both_libraries_write_the_same_bytes():
    """In processes of their own: two libraries of one soname must not meet."""
    paths = [path for path in map(quantizer.library_path, ((p,) for p in quantizer.PACKAGES)) if path]
    runs = [subprocess.run([sys.executable, "-c", HASH, path], capture_output=True, text=True) for path in paths]
    assert [run.returncode for run in runs] == [0] * len(paths)
    assert len({run.stdout for run in runs}) == 1


def test_a_tensor_in_one_call_equals_row_by_row():
    rows = np.random.default_rng(3).standard_normal((12, 256), np.float32)
    for kind in TYPES.values():
        whole = quantizer.encode(rows, kind).tobytes()
        assert whole == b"".join(quantizer.encode(rows[i : i + 1], kind).tobytes() for i in range(12)), kind.name


def test_bf16_rounds_to_nearest_even():
    bits = np.array([0x3F800000, 0x3F808000, 0x3F818000, 0x3F80C000, 0xBF80FFFF], np.uint32)
    got = quantizer.encode(bits.view(np.float32).reshape(1, -1), TYPES["BF16"]).view(np.uint16)
    assert [hex(x) for x in got] == ["0x3f80", "0x3f80", "0x3f82", "0x3f81", "0xbf81"]


@pytest.mark.parametrize(
    ("kind", "columns", "chosen"),
    [
        ("Q4_K", 256, "Q4_K"), ("Q4_K", 96, "Q5_0"), ("Q5_K", 96, "Q5_1"), ("Q6_K", 96, "Q8_0"), ("Q3_K", 96, "Q4_0"),
        ("IQ4_XS", 96, "IQ4_NL"), ("Q4_K", 48, "F16"), ("Q8_0", 48, "F16"), ("F32", 7, "F32"),
    ],
)  # fmt: skip
def test_types_fall_back_as_in_llama_cpp(kind: str, columns: int, chosen: str):
    got, note = fitting(TYPES[kind], columns)
    assert got.name == chosen
    assert note == (
        "" if chosen == kind else f"{kind} needs rows of a multiple of {TYPES[kind].block}, these have {columns}"
    )


def test_fallbacks_are_noted(model: Model):
    encodings = EXPORTERS["gguf"].encodings(choose("gguf", "q4").order(model.spec))
    assert encodings["decoder.embed.weight"].type == "Q5_0"
    assert encodings["decoder.embed.weight"].note == "Q4_K needs rows of a multiple of 256, these have 128"
    assert encodings["vision.patch.weight"].note == "a convolution's kernel has no Q8_0 form"
    assert encodings["vision.layers.0.mlp.down.weight"].note == "zero-padded from 80 to 96"
    assert encodings["decoder.norm.weight"].note == ""


def test_schemes_without_native_names_have_types():
    assert wanted(Scheme("int", 4, 32)).name == "Q4_0"
    assert wanted(Scheme("int", 4, 32, symmetric=False)).name == "Q4_K"
    assert wanted(Scheme("float", 16)).name == "F16"
    with pytest.raises(UnsupportedError, match="gguf has no type 'Q4K'; did you mean 'Q4_K'"):
        wanted(Scheme("int", 4, native={"gguf": "Q4K"}))
    with pytest.raises(UnsupportedError, match="no type for 7-bit integers"):
        wanted(Scheme("int", 7))


def test_text_metadata(model: Model):
    found = keys(model.export("q4") / TEXT)
    decoder = model.spec.decoder
    assert found["general.architecture"] == "phi2"
    assert (found["general.name"], found["general.license"]) == ("tiny", "Apache-2.0")
    assert found["general.source.huggingface.repository"] == "someone/tiny"
    assert found["general.source.revision"] == "main"
    assert found["general.quantization_version"] == 2
    assert found["phi2.block_count"] == decoder.layers
    assert found["phi2.rope.dimension_count"] == 32
    assert found["phi2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (0, 0)
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list)
    assert isinstance(types, list)
    assert len(tokens) == len(types) == decoder.vocab
    assert (tokens[511], types[511], types[0], types[200]) == ("[PAD511]", UNUSED, CONTROL, NORMAL)


def test_mmproj_metadata(model: Model):
    found = keys(model.export("q4") / MMPROJ)
    assert (found["general.architecture"], found["clip.projector_type"]) == ("clip", "mlp")
    assert found["clip.use_gelu"] is True
    assert (found["clip.vision.block_count"], found["clip.vision.feature_layer"]) == (27, [27])
    assert found["clip.vision.feed_forward_length"] == 96
    assert found["clip.vision.image_mean"] == [0.5, 0.5, 0.5]
    assert found["clip.vision.attention.layer_norm_epsilon"] == pytest.approx(1e-5)


def test_what_was_written_is_reported(model: Model):
    assert {w.path: w.role for w in model.written("q4")} == {TEXT: "text", MMPROJ: "mmproj", HEADS: "heads"}


def test_progress_names_every_tensor_once(model: Model, tmp_path: Path):
    seen: list[tuple[str, int]] = []
    EXPORTERS["gguf"].write(replace(model.job("f16", tmp_path), progress=lambda name, n: seen.append((name, n))))
    assert seen == [(name, tensor.size) for name, tensor in model.tensors.items()]


def test_notes_say_what_a_stock_app_gets(model: Model):
    notes = EXPORTERS["gguf"].notes(choose("gguf").order(model.spec), model.tokenizer)
    assert "llama-cpp-python" in notes["requires"]
    assert any("one crop" in sentence for sentence in notes["stock"])
    assert any("cannot detect or point" in sentence for sentence in notes["stock"])
    assert notes["notes"] == ()


def tokenizer(model: Model, key: str, value: object) -> bytes:
    return json.dumps({**json.loads(model.tokenizer), key: value}).encode()


def test_an_unknown_pre_tokenizer_is_noted(model: Model):
    superword = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False, "trim_offsets": True}
    found = read_vocabulary(tokenizer(model, "pre_tokenizer", superword), 512)
    assert found.pre == "superbpe"
    assert "superword BPE" in found.notes[0]
    qwen = {
        "type": "Split",
        "pattern": {"Regex": r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"},
    }
    steps = {"type": "Sequence", "pretokenizers": [qwen, superword]}
    assert read_vocabulary(tokenizer(model, "pre_tokenizer", steps), 512).pre == "qwen2"


def test_tokens_beyond_the_embedding_are_left_out_and_noted(model: Model):
    found = read_vocabulary(model.tokenizer, 300)
    assert len(found.tokens) == len(found.types) == 300
    assert found.notes == ("113 tokens have ids beyond the embedding's 300 rows and are left out",)
    assert all(m.replace(" ", "") in found.tokens for m in found.merges)


def test_what_is_no_tokenizer_is_refused(model: Model):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged"):
        read_vocabulary(b"[]", 512)
    with pytest.raises(UnsupportedError, match="of type Unigram"):
        read_vocabulary(tokenizer(model, "model", {"type": "Unigram", "vocab": []}), 512)


def test_a_decoder_that_llama_cpp_lacks_is_named(model: Model):
    gated = replace(model.spec, decoder=replace(model.spec.decoder, parallel_residual=False))
    with pytest.raises(UnsupportedError, match=r"parallel_residual = False \(the nearest is phi2\)"):
        EXPORTERS["gguf"].encodings(choose("gguf", "f16").order(gated))
    exact = replace(model.spec, vision=replace(model.spec.vision, activation="gelu"))
    with pytest.raises(UnsupportedError, match="the vision has gelu"):
        EXPORTERS["gguf"].encodings(choose("gguf", "f16").order(exact))


@pytest.mark.parametrize(("value", "text"), [(np.nan, "NaN or infinite"), (1e5, "beyond f16's 65504")])
def test_weights_that_cannot_be_stored_are_named(model: Model, tmp_path: Path, value: float, text: str):
    bad = np.zeros((128, 128), np.float32)
    bad[3, 4] = value
    name = "decoder.layers.1.attn.q.weight"
    tensors: dict[str, Tensor] = {**model.tensors, name: ArrayTensor(bad)}
    job = replace(model.job("f16", tmp_path), tensors=tensors)
    with pytest.raises(CheckpointError, match=f"{name} has .*{text}"):
        EXPORTERS["gguf"].write(job)


@pytest.mark.parametrize("writes", [0, 100])
def test_a_full_disk_stops_it(model: Model, tmp_path: Path, full_disk: Callable[[int], None], writes: int):
    full_disk(writes)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):  # staging makes a line of it
        EXPORTERS["gguf"].write(model.job("q4", tmp_path))


def test_without_a_quantizer_the_remedy_is_named(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quantizer, "PACKAGES", ("a_package_that_nobody_has",))
    with pytest.raises(RuntimeFailedError, match="pip install libggml-python"):
        EXPORTERS["gguf"].write(model.job("q4", tmp_path))
    EXPORTERS["gguf"].write(model.job("f16", tmp_path))
    broken = tmp_path / "libggml-base.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(RuntimeFailedError, match="cannot be used"):
        quantizer.load(broken)


def test_memory_is_bounded_by_blocks_of_rows(model: Model, tmp_path: Path):
    """No read is larger than a block, whatever the tensor."""
    largest = [0]

    class Watched(ArrayTensor):
        def read_rows(self, start: int, stop: int) -> F32:
            largest[0] = max(largest[0], (stop - start) * self.columns)
            return super().read_rows(start, stop)

    decoder = replace(model.spec.decoder, vocab=40_000)
    spec = replace(model.spec, decoder=decoder)
    big = {"decoder.embed.weight": (40_000, 128), "decoder.head.weight": (40_000, 128), "decoder.head.bias": (40_000,)}
    tensors = {**model.tensors, **{name: Watched(np.zeros(shape, np.float32)) for name, shape in big.items()}}
    job = replace(with_order(model.job("q8", tmp_path), spec=spec), tensors=tensors)
    EXPORTERS["gguf"].write(job)
    assert 0 < largest[0] <= passing.UNIT


STOCK = """
import base64, json, sys, warnings
import numpy as np
from llama_cpp import Llama, mtmd_cpp
from llama_cpp.llama_chat_format import MTMDChatHandler, MoondreamChatHandler
warnings.simplefilter("ignore")
folder, picture, chat = sys.argv[1:]
Handler = {"own": MTMDChatHandler, "moondream": MoondreamChatHandler}[chat]
handler = Handler(clip_model_path=folder + "/mmproj.gguf", verbose=False)
llama = Llama(folder + "/text.gguf", chat_handler=handler, n_ctx=1024, n_batch=1024, n_ubatch=1024, verbose=False)
url = "data:image/png;base64," + base64.b64encode(open(picture, "rb").read()).decode()
content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
answer = llama.create_chat_completion([{"role": "user", "content": content}], temperature=0, max_tokens=4)
rows = np.ctypeslib.as_array(mtmd_cpp.mtmd_get_output_embd(handler.mtmd_ctx), (729 * 128,))
np.save(folder + "/rows.npy", rows)
print(json.dumps(answer["usage"]))
llama.close()
"""
# Relative RMS of the image's embeddings: fp16 tables in ggml's GELU, then the weights' own error.
STOCK_ERROR = {"f32": 5e-3, "f16": 1e-2, "q8": 2e-2, "q4": 2e-2, "q4_0": 2e-2, "q3": 2e-2}


@pytest.mark.slow
@pytest.mark.parametrize(("profile", "chat"), [*((name, "own") for name in STOCK_ERROR), ("q8", "moondream")])
def test_stock_llama_cpp_answers(model: Model, tmp_path: Path, profile: str, chat: str):
    """Its own chat handlers load text.gguf and mmproj.gguf; a picture of one crop is embedded as by the original."""
    pixels = np.random.default_rng(5).integers(0, 256, (378, 378, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    arguments = map(str, (model.export(profile), tmp_path / "picture.png", chat))
    run = subprocess.run([sys.executable, "-c", STOCK, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(run.stdout.splitlines()[-1])["prompt_tokens"] > 730  # BOS, the picture, the question
    got = np.load(model.export(profile) / "rows.npy").reshape(729, 128)
    from vlmedge.reference.session import TorchSession

    original = TorchSession(model.spec, model.tensors)
    want = original.project(original.vision(np.stack([pixels, pixels])), (1, 1))
    assert np.linalg.norm(got - want) <= STOCK_ERROR[profile] * np.linalg.norm(want)


def test_a_large_decoder_is_cut_into_parts_that_llama_cpp_opens(model: Model, tmp_path: Path):
    """Names and split keys as llama.cpp's own; every tensor once; the same values; the first part opens all."""
    job = with_order(model.job("q8", tmp_path), max_part=200_000)
    files = [written.path for written in EXPORTERS["gguf"].write(job)]
    parts = [name for name in files if name.startswith("text-")]
    assert parts == [layout.part_name(i + 1, len(parts)) for i in range(len(parts))]
    assert len(parts) > 2
    assert {written.role for written in EXPORTERS["gguf"].write(job)} == {"text", "mmproj", "heads"}
    tensors = {name: value for part in parts for name, value in read(tmp_path / part).items()}
    whole = read(model.export("q8") / TEXT)
    assert tensors.keys() == whole.keys()
    assert all(np.array_equal(tensors[name][1], whole[name][1]) for name in whole)
    assert all((tmp_path / part).stat().st_size < 250_000 for part in parts[1:])
    ids, logits = np.array([0, 1, 300, 2], np.int32), []
    for folder in (tmp_path, model.export("q8")):
        session = LlamaCppSession(model.spec, folder, threads=1)
        logits.append(session.forward(ids).logits)
        session.close()
    assert np.array_equal(*logits)
