"""export() and plan(): the same bytes twice, nothing read for a plan, and what the JSON of both holds."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vlmedge
from vlmedge import pipeline, tensorfile
from vlmedge.bundle import MANIFEST, open_bundle
from vlmedge.errors import CheckpointError, UnsupportedError, UsageError, VerificationError
from vlmedge.exporters.gguf import quantizer
from vlmedge.loading import describe, missing_for
from vlmedge.parity.report import STAGES

EXPORT_KEYS = {
    "bundle", "format", "flavour", "profile", "bytes", "bits_per_weight", "seconds", "peak_rss_mb", "verification",
}  # fmt: skip


@pytest.mark.parametrize("profile", ["f32", "q4"])
def test_the_same_bytes_twice(golden, tmp_path, profile):
    """Manifest, self-test and verification included; neither the place nor the number of threads shows."""
    first = pipeline.export(golden, "gguf", profile, tmp_path / "a", threads=1)
    second = pipeline.export(golden, "gguf", profile, tmp_path / "sub/b", threads=1)
    names = sorted(p.name for p in first.path.iterdir())
    assert names == sorted(p.name for p in second.path.iterdir())
    for name in names:
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes(), name
    verification = first.manifest.verification
    assert verification["verified"] is True
    assert {s["stage"] for s in verification["stages"]} == set(STAGES)
    assert all(s["outcome"] == "passed" for s in verification["stages"])
    judged = {(s["stage"], s["against"]) for s in verification["stages"] if s.get("against") and "limit" in s}
    assert judged == {(stage, side) for stage in STAGES[5:] for side in ("stored", "original")}


def test_where_the_checkpoint_lies_does_not_show(golden, tmp_path):
    """Two copies in other places, the second named by a relative path with a detour."""
    places = [tmp_path / "one/tiny", tmp_path / "an@other/place/tiny"]
    for place in places:
        shutil.copytree(golden, place, ignore=shutil.ignore_patterns("*.npz", "results*"))
    detour = Path(os.path.relpath(places[1])) / ".." / "tiny"
    found = [
        pipeline.export(source, "gguf", "f16", tmp_path / name, verify=False, threads=1)
        for source, name in ((places[0], "a"), (detour, "b"))
    ]
    for path in found[0].path.iterdir():
        assert path.read_bytes() == (found[1].path / path.name).read_bytes(), path.name
    assert found[0].manifest.source.label == "tiny"


def test_the_manifest_is_written_last(golden, tmp_path, monkeypatch):
    """While the bundle is verified, and after a kill in that time, its folder is none that `run` opens."""
    seen = []
    compared = pipeline.examine

    def look(*arguments, **options):
        seen.extend(p.name for p in (tmp_path / ".x.partial").iterdir())
        return compared(*arguments, **options)

    monkeypatch.setattr(pipeline, "examine", look)
    pipeline.export(golden, "gguf", "f32", tmp_path / "x", threads=1)
    assert "text.gguf" in seen
    assert MANIFEST not in seen
    assert (tmp_path / "x" / MANIFEST).is_file()


def test_a_source_that_cannot_be_read_is_no_output_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone\.safetensors cannot be read: No such file"):
        pipeline._hash_all((tmp_path / "gone.safetensors",), threading.Event())


def test_numbers_that_are_not_finite_are_never_written(golden, tmp_path, monkeypatch):
    """Not even with --no-verify: no app could do anything with such a bundle, and JSON has no word for it."""
    right = pipeline.run_tests

    def spoiled(*arguments, **options):
        found = right(*arguments, **options)
        found.trace.record.forwards[1].logits[3] = np.inf
        return found

    monkeypatch.setattr(pipeline, "run_tests", spoiled)
    with pytest.raises(VerificationError, match="not finite at the stage 'logits'"):
        pipeline.export(golden, "gguf", "f32", tmp_path / "x", verify=False, threads=1)
    assert list(tmp_path.iterdir()) == []


def test_threads_do_not_show(golden, bundle, tmp_path):
    other = pipeline.export(golden, "gguf", "f32", tmp_path / "x", verify=False, threads=4).path
    for name in ("text.gguf", "mmproj.gguf", "heads.gguf"):
        assert (other / name).read_bytes() == (bundle / name).read_bytes(), name


def test_an_export_that_is_wrong_is_not_written(golden, tmp_path, monkeypatch):
    """A quantizer that spoils one kind of tensor: verification names the stage, and no bundle appears."""
    right = quantizer.encode
    monkeypatch.setattr(quantizer, "encode", lambda rows, kind: right(rows * np.float32(1.5), kind))
    with pytest.raises(
        VerificationError,
        match=r"at the stage 'weights'.* steps of its grid .*nothing was written",
    ):
        pipeline.export(golden, "gguf", "f32", tmp_path / "x", threads=1)
    assert list(tmp_path.iterdir()) == []


def test_without_a_runtime_the_manifest_says_why(golden, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "missing_for", lambda _: "llama-cpp-python is not installed: pip install it")
    notes: list[str] = []
    progress = vlmedge.progress.Progress()
    monkeypatch.setattr(type(progress), "note", lambda self, text: notes.append(text))
    found = pipeline.export(golden, "gguf", "f32", tmp_path / "x", progress=progress)
    reason = "the bundle cannot be run here: llama-cpp-python is not installed: pip install it"
    assert found.manifest.verification == {"verified": False, "reason": reason}
    assert notes == [f"not verified: {reason}"]
    vectors = json.loads((found.path / "selftest.json").read_text())
    assert vectors["recorded_with"] is None
    assert len(vectors["text"]) > 200
    found.check()


def test_this_machine_can_verify():
    assert missing_for("gguf") is None
    assert missing_for("checkpoint") is None


def test_the_name_of_an_output(golden, tmp_path, monkeypatch, succeed):
    monkeypatch.chdir(tmp_path)
    found = pipeline.export(golden, "gguf", "f16", verify=False, threads=1)
    assert found.path == Path("tiny-mha-f16.gguf")
    assert (tmp_path / found.path / MANIFEST).is_file()
    assert pipeline.short_name(describe(f"{golden}/")) == "tiny-mha"
    monkeypatch.chdir(golden)
    assert pipeline.short_name(describe(".")) == "tiny-mha"


def test_export_json(golden, tmp_path, succeed):
    out = tmp_path / "x"
    done = succeed("export", golden, "--format", "gguf", "--q8", "--no-verify", "--threads", 1, "--out", out, "--json")
    assert done.err == ""
    assert set(done.data) == EXPORT_KEYS
    manifest = open_bundle(out).manifest
    assert done.data["bundle"] == str(out)
    assert (done.data["format"], done.data["profile"]) == ("gguf", "q8")
    assert done.data["bytes"] == sum(p.stat().st_size for p in out.iterdir())
    assert done.data["bits_per_weight"] == manifest.profile.bits_per_weight
    assert done.data["verification"] == {"verified": False, "reason": "verification was turned off (--no-verify)"}


def test_export_in_words(golden, tmp_path, succeed):
    words = ("export", golden, "--format", "gguf", "--f32", "--no-verify", "--threads", 1, "--out", tmp_path / "x")
    done = succeed(*words)
    assert done.err == ""
    assert done.out.startswith(f"{tmp_path / 'x'}: 5.")
    assert "32.00 bits per weight, not verified" in done.out


# ---- plan ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hollow(golden, tmp_path) -> Any:
    """The golden checkpoint with its header alone: the weights are a hole."""
    folder = tmp_path / "tiny-mha"
    shutil.copytree(golden, folder, ignore=shutil.ignore_patterns("fp32", "*.npz", "results*"))
    path = folder / "model.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(8 + int.from_bytes(file.read(8), "little"))
        file.truncate(size)
    return folder


def test_a_plan_needs_no_weights(golden, hollow):
    full, empty = (pipeline.plan(folder, "gguf", "q4") for folder in (golden, hollow))
    assert full.encodings == empty.encodings
    assert full.shapes == empty.shapes


def test_a_plan_reads_no_weights(golden, monkeypatch):
    read, read_bytes = tensorfile.OpenFile.read, []

    def spy(self, offset, count):
        read_bytes.append((offset, count))
        return read(self, offset, count)

    monkeypatch.setattr(tensorfile.OpenFile, "read", spy)
    pipeline.plan(golden, "gguf", "q4")
    size = int.from_bytes((golden / "model.safetensors").read_bytes()[:8], "little")
    assert sorted(set(read_bytes)) == [(0, 8), (8, size)]


def test_a_plan_is_what_export_writes(golden, bundle):
    planned = pipeline.plan(golden, "gguf", "f32")
    assert planned.bytes == sum(c.bytes for c in open_bundle(bundle).manifest.components)


def test_plan_and_dry_run_say_the_same(hollow, tmp_path, succeed):
    out = tmp_path / "out"
    words = (hollow, "--format", "gguf", "--q4")
    plan = succeed("plan", *words, "--json")
    dry = succeed("export", *words, "--dry-run", "--out", out, "--json")
    assert plan.data == dry.data
    assert plan.err == dry.err == ""
    assert not out.exists()
    assert set(plan.data) == {"source", "format", "flavour", "profile", "bytes", "tensors"}
    assert plan.data["bytes"] == sum(t["bytes"] for t in plan.data["tensors"])
    keys = {"name", "shape", "file", "tensor", "stored_shape", "type", "bytes", "note"}
    assert all(set(t) == keys for t in plan.data["tensors"])


def test_plan_as_a_table(golden, succeed):
    done = succeed("plan", golden, "--format", "gguf", "--f32")
    planned = pipeline.plan(golden, "gguf", "f32")
    assert done.err == ""
    assert all(name in done.out for name in planned.encodings)
    assert done.out.endswith(f"{len(planned.encodings)} tensors, {planned.bytes:,} bytes\n")


def test_without_a_profile_it_is_the_formats_own(golden):
    assert pipeline.plan(golden, "gguf") == pipeline.plan(golden, "gguf", "q4")


def test_a_copy_for_prefill_has_entries_of_its_own(golden):
    turbo, fast = (pipeline.plan(golden, "onnx", profile) for profile in ("turbo", "q4-fast"))
    more = set(turbo.encodings) - set(fast.encodings)
    matrices = {name for name, shape in turbo.shapes.items() if name.startswith("decoder.layers.") and len(shape) == 2}
    assert more == {f"{name}#prefill" for name in matrices}
    assert turbo.bytes > fast.bytes


def test_a_profile_of_another_format_is_refused(golden, tmp_path):
    words = "profile q4-fast is for onnx, not gguf; for gguf there are: f16, f32, q3, q4, q4_0, q5, q6, q8$"
    for verb in (pipeline.plan, pipeline.export):
        with pytest.raises(UsageError, match=words):
            verb(golden, "gguf", "q4-fast")
    path = tmp_path / "mine.toml"
    rule = '[[rules]]\nmatch = "*"\nscheme = { kind = "float", bits = 16 }\n'
    path.write_text(f'summary = ""\nformats = ["gguf", "gguff"]\n{rule}')
    with pytest.raises(UsageError, match="profile mine names the unknown format 'gguff'; did you mean 'gguf'"):
        pipeline.plan(golden, "gguf", str(path))
    path.write_text(f'summary = ""\n{rule}{rule.replace("rules", "prefill")}')
    with pytest.raises(UnsupportedError, match="one copy of the decoder"):
        pipeline.plan(golden, "gguf", str(path))


def test_a_flavour_of_another_format_is_refused(golden):
    with pytest.raises(UsageError, match="gguf has no flavours; leave 'portable' out"):
        pipeline.plan(golden, "gguf", flavour="portable")


def test_a_plan_of_what_is_not_there():
    with pytest.raises(UsageError, match="did you mean 'moondream2'"):
        pipeline.plan("moondream3", "gguf")
