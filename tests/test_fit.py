"""vlmedge fit: predictions beside measured peaks, the arithmetic, and what the command says."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vlmedge.bundle import ComponentEntry, FileEntry, open_bundle
from vlmedge.device_bench.device import Device
from vlmedge.device_bench.fit import MARGIN, Budget, device_budget, fit, largest, ram_bytes
from vlmedge.device_bench.footprint import KV, PARTS, PREFILL, WEIGHTS, Footprint, Use, footprint
from vlmedge.device_bench.footprint_llamacpp import has_amx
from vlmedge.device_bench.footprint_onnxruntime import packed
from vlmedge.errors import UnsupportedError, UsageError

PEAKS = Path(__file__).parent.parent / "benchmarks/fit_peaks.py"


@pytest.fixture
def manifest(bundle):
    return open_bundle(bundle).manifest


def test_predictions_are_near_measured_peaks(tmp_path):
    """Fresh processes that open a bundle and answer about a picture, both formats, both memory modes."""
    words = ["--bundles", "gguf:q4", "onnx:w8a8", "--crops", "5", "--threads", "1", "--work", str(tmp_path)]
    done = subprocess.run([sys.executable, str(PEAKS), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout.splitlines()[-1])["peaks"]
    kinds = [(peak["case"]["bundle"], peak["case"]["memory"], peak["case"]["prepared"]) for peak in peaks]
    assert kinds == [
        ("gguf:q4", "fast", False),
        ("gguf:q4", "lean", False),
        ("onnx:w8a8", "fast", False),
        ("onnx:w8a8", "lean", False),
        ("onnx:w8a8", "lean", True),
    ]
    for peak in peaks:
        assert abs(peak["ratio"] - 1) <= MARGIN, peak


def test_the_kv_cache_is_what_the_manifest_says(manifest):
    """llama.cpp has the whole context's from the start, in steps of 256 positions."""
    long, short = (footprint(manifest, Use(context, 2)) for context in (512, 256))
    for stage in range(len(long.stages)):
        assert _kv(long, stage) == 512 * manifest.memory.kv_per_position
        assert _kv(short, stage) == 256 * manifest.memory.kv_per_position


def test_onnx_takes_the_positions_in_use(manifest):
    onnx = _onnx(manifest)
    grown = [footprint(onnx, Use(512, 2, positions=n)) for n in (100, 300, None)]
    assert [_kv(found, -1) for found in grown] == [n * manifest.memory.kv_per_position for n in (100, 300, 512)]


def test_the_portable_flavour_has_the_past_beside_the_present(manifest):
    """In memory that the prefill left, and beyond it where that is not enough."""
    onnx = _onnx(manifest)
    long = replace(onnx, memory=replace(onnx.memory, kv_per_position=10**6))
    for kind, positions in ((onnx, 100), (long, 512)):
        usual, portable = (
            footprint(replace(kind, flavour=flavour), Use(512, 2, positions=positions)).stages[-1]
            for flavour in ("ort", "portable")
        )
        more = max(0.0, usual.of(KV) - usual.of(PREFILL))
        assert portable.of(KV) - usual.of(KV) == pytest.approx(more)
    assert more > 0


def test_lean_maps_what_fast_holds(manifest):
    fast, lean = (footprint(manifest, Use(256, 2, memory=memory)) for memory in ("fast", "lean"))
    text = next(entry.bytes for entry in manifest.files if entry.path == "text.gguf")
    assert [p.bytes for p in lean.stages[0].parts if p.name == WEIGHTS and p.mapped] == [text]
    assert not [p for p in fast.stages[0].parts if p.name == WEIGHTS and p.mapped]
    assert lean.stages[-1].bytes < fast.stages[-1].bytes  # the tower is held only while it encodes


def test_prepacked_bytes_of_a_real_decoder(manifest):
    """Anonymous memory of ONNX Runtime 1.32 after opening a 1.3 billion decoder, in MB: q4 1228, w8a8 1322."""
    q4 = {"uint4_32": 758972416, "int8_32": 111411200, "f32": 2383872}
    w8a8 = {"w8a8": 1314791424, "int8_32": 111411200, "f32": 2383872}
    for types, table, measured in ((q4, 60620800, 1228e6), (w8a8, 111411200, 1322e6)):
        found = packed(_onnx(manifest, types, table), "decoder")
        assert abs(found / measured - 1) < 0.02, (types, found)


def test_a_first_opening_takes_a_second_copy(manifest):
    """And what ONNX Runtime converts: half precision weights, and scales of blocks (105 * 32 weights, 105 scales)."""
    for types, converted in (({"w8a8": 10**5}, 0), ({"f16": 10**5}, 2 * 10**5), ({"int8_32": 34 * 105}, 4 * 105)):
        onnx = _onnx(manifest, types, table=0)
        first, later = (footprint(onnx, Use(256, 2, memory="lean", prepared=done)) for done in (False, True))
        second = packed(onnx, "decoder") + converted
        assert first.stages[0].bytes - later.stages[0].bytes == pytest.approx(second)


def test_amx_adds_the_sums_of_blocks(manifest, tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("flags : avx512f amx_int8\n")
    assert has_amx(tmp_path)
    assert not has_amx(tmp_path / "none")


def test_every_part_is_named(manifest):
    for found in (footprint(manifest, Use(256, 2)), footprint(_onnx(manifest), Use(256, 2, memory="lean"))):
        assert {part.name for stage in found.stages for part in stage.parts} <= set(PARTS)
        assert all(part.bytes >= 0 for stage in found.stages for part in stage.parts)
        assert found.peak.bytes == max(sum(part.bytes for part in stage.parts) for stage in found.stages)


def test_an_unknown_format_is_refused(manifest):
    with pytest.raises(UnsupportedError, match="footprint of coreml bundles"):
        footprint(replace(manifest, format="coreml"), Use(256, 2))


def test_what_would_fit(bundle):
    """The largest context and crops are exactly those whose peak is within the budget."""
    opened = open_bundle(bundle)
    whole = opened.manifest.model.decoder.context
    enough = fit(opened, Budget(4e9, "")).footprint.peak.bytes
    assert fit(opened, Budget(enough, "")).fits
    tight = fit(opened, Budget(enough - 1, ""))
    assert (tight.fits, tight.is_close, tight.fits_by_dropping) == (False, True, True)
    found = fit(opened, Budget(enough, ""), megapixels=0.1, crops=3)
    assert found.largest_context == whole
    assert found.largest_crops is not None
    for crops, fits in ((found.largest_crops, True), (found.largest_crops + 1, False)):
        again = fit(opened, Budget(enough, ""), megapixels=0.1, crops=crops)
        assert again.fits is fits
    none = fit(opened, Budget(1e6, ""))
    assert (none.largest_context, none.largest_crops, none.fits_by_dropping) == (None, None, False)


@pytest.mark.parametrize("most", [1, 7, 100])
def test_largest(most):
    for limit in range(most + 2):
        wanted = min(limit, most) if limit else None
        assert largest(lambda n, limit=limit: n <= limit, 1, most) == wanted


@pytest.mark.parametrize(
    ("word", "size"), [("4GB", 4 * 10**9), ("4GiB", 4 << 30), ("512MB", 512 * 10**6), ("1.5 gb", 1_500_000_000)]
)
def test_sizes(word, size):
    assert ram_bytes(word) == size


@pytest.mark.parametrize("word", ["", "4", "4G", "GB", "-4GB", "0MB", "4TB", "1e3GB", "nan"])
def test_bad_sizes(word):
    with pytest.raises(UsageError, match="such as 4GB, 4GiB or 512MB"):
        ram_bytes(word)


def test_devices_keep_a_reserve():
    phone = device_budget(Device("phone", "A phone", "adb", memory_gb=8))
    assert (phone.bytes, phone.local) == (4.4e9, False)
    assert "55%" in phone.reason
    board = device_budget(Device("board", "A board", "ssh", memory_gb=4))
    assert (board.bytes, board.local) == (3e9, False)
    assert "4 GB less 1 GB" in board.reason
    assert device_budget(Device("small", "A small one", "local", memory_gb=1)).bytes == 0.5e9
    with pytest.raises(UsageError, match="does not say its memory_gb"):
        device_budget(Device("new", "A new one", "ssh"))
    with pytest.raises(UsageError, match="is a browser"):
        device_budget(Device("tab", "A tab", "browser", memory_gb=8))


def test_the_command_says_yes(succeed, bundle):
    out = succeed("fit", bundle, "--ram", "4GB").out
    for text in ("yes, it fits", "KV cache", "tokenizer and vocabulary", "together", "of it pages of files"):
        assert text in out
    assert "the model's whole context fits" in out
    assert "memory lean takes" in out


def test_the_command_says_no(cli, bundle):
    done = cli("fit", bundle, "--ram", "60MB", "--memory", "lean", "--context", "800")
    assert (done.code, done.err) == (1, "")
    assert "no, it does not fit" in done.out
    assert "no context fits" in done.out


def test_json(cli, bundle):
    done = cli("fit", bundle, "--ram", "4GiB", "--context", "1024", "--crops", "2", "--megapixels", "1", "--json")
    data = done.data
    assert done.code == 0
    assert data["budget"] == {"bytes": 4 << 30, "reason": "--ram"}
    assert (data["context"], data["crops"], data["fits"], data["memory"]) == (1024, 2, True, "fast")
    for stage in data["stages"]:
        assert stage["bytes"] == pytest.approx(sum(part["bytes"] for part in stage["parts"]), abs=9)
    assert data["peak"]["bytes"] == max(stage["bytes"] for stage in data["stages"])
    assert cli("fit", bundle, "--ram", "1MB", "--json").code == 1


def test_a_named_device(succeed, bundle):
    data = succeed("fit", bundle, "--device", "pixel-8", "--json").data
    assert data["budget"]["bytes"] == 4.4e9


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ((), 2, "say either --ram"),
        (("--ram", "4GB", "--device", "pixel-8"), 2, "say either --ram"),
        (("--ram", "lots"), 2, "--ram takes a size such as 4GB"),
        (("--device", "toaster"), 2, "unknown device 'toaster'"),
        (("--ram", "4GB", "--context", "3"), 2, "the context can be"),
        (("--ram", "4GB", "--crops", "0"), 2, "--crops"),
        (("--ram", "4GB", "--memory", "leen"), 2, "did you mean 'lean'"),
    ],
)
def test_bad_words(refused, bundle, words, code, text):
    assert text in refused("fit", bundle, *words, code=code)


def test_no_bundle(refused, tmp_path):
    assert "is not a bundle" in refused("fit", tmp_path, "--ram", "4GB")


def _kv(found: Footprint, stage: int) -> float:
    return found.stages[stage].of(KV)


def _onnx(manifest, types=None, table=4096):
    """The manifest as if its decoder were an ONNX one of these types, with an embedding table of so many bytes."""
    types = types or {"w8a8": 100_000, "int8_32": 5000}
    decoder = ComponentEntry("decoder", (), 1, sum(types.values()), 8.0, types)
    others = [c for c in manifest.components if c.name != "decoder"]
    embed = FileEntry("onnx/embed_tokens.onnx_data", "text", table, "", ())
    spec = manifest.model
    if table > 10**6:
        spec = replace(spec, decoder=replace(spec.decoder, vocab=51200, width=2048))
    return replace(manifest, model=spec, format="onnx", components=(decoder, *others), files=(embed,), flavour="ort")
