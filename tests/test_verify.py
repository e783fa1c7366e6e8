"""vlmedge verify: what it prints and writes, what it needs, what it says where a bundle is wrong or a checkpoint is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import vlmedge
from vlmedge.bundle import MANIFEST, open_bundle
from vlmedge.exporters import EXPORTERS
from vlmedge.parity.attribution import PARTS, part_of
from vlmedge.parity.report import STAGES
from vlmedge.parity.verify import verify

SIDES = [(stage, side) for stage in STAGES[5:] for side in ("stored", "original")]
QUIET = ("--threads", 1, "--quiet")


@pytest.fixture(scope="module", params=["onnx", "gguf"])
def exported(request, golden, tmp_path_factory):
    """A quantized bundle of the golden checkpoint; not to be written to."""
    out = tmp_path_factory.mktemp("verify") / f"golden.{request.param}"
    return vlmedge.export(golden, request.param, "q8", out, verify=False, threads=1).path


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("verify") / "demo.onnx"
    return vlmedge.export("demo:moondream2", "onnx", "q4", out, verify=False, threads=1).path


@pytest.fixture
def other(forgery) -> Path:
    """A checkpoint of the golden one's shape, with other weights in one tensor."""
    name = "model.text.blocks.1.mlp.fc1.weight"
    start, stop = forgery.header[name]["data_offsets"]
    values = np.frombuffer(forgery.data[start:stop], np.uint8)
    data = bytearray(forgery.data)
    data[start:stop] = np.roll(values, 4 * 64).tobytes()
    forgery.data = bytes(data)
    return forgery.write()


def test_the_table_and_the_json(exported, golden, succeed):
    done = succeed("verify", exported, "--against", golden, *QUIET)
    assert done.err == ""
    assert f"{exported.name} ({exported.suffix[1:]} q8, " in done.out
    assert "agrees with tiny-mha" in done.out
    data = succeed("verify", exported, "--against", golden, "--json", *QUIET).data
    assert data["failing"] is None
    assert [(s["stage"], s["against"]) for s in data["stages"]] == [(s, None) for s in STAGES[:5]] + SIDES
    assert all(s["outcome"] == "passed" for s in data["stages"])
    tokens = [s["numbers"] for s in data["stages"] if s["stage"] == "tokens"]
    assert all({"positions", "kl_mean", "kl_p99", "top1"} <= set(numbers) for numbers in tokens)
    assert all(n["kl_mean"] <= n["kl_p99"] for n in tokens)
    assert len(data["tokens"]) == tokens[0]["positions"] > 16


def test_the_demo_names_its_own_checkpoint(demo, succeed):
    done = succeed("verify", demo, *QUIET)
    assert "agrees with demo:moondream2" in done.out


def test_reports(exported, golden, tmp_path, succeed):
    for ending in ("html", "md", "json"):
        target = tmp_path / f"report.{ending}"
        succeed("verify", exported, "--against", golden, "--report", target, *QUIET)
        text = target.read_text(encoding="utf-8")
        assert exported.name in text
        assert "relative" in text.lower()
    assert json.loads(text)["schema"] == "vlmedge.verification/1"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]


def test_pictures_of_ones_own(exported, golden, tmp_path, succeed, refused):
    shutil.copytree(golden.parent / "images", tmp_path / "mine")
    (tmp_path / "mine/notes.txt").write_text("no picture")
    data = succeed("verify", exported, "--against", golden, "--images", tmp_path / "mine", "--json", *QUIET).data
    assert data["pictures"] == 2 + 2
    assert {t["reading"] for t in data["tokens"]} == {"small picture", "large picture", "big.png", "small.png"}
    assert "takes a folder of pictures" in refused("verify", exported, "--images", tmp_path / "none", code=2)
    (tmp_path / "empty").mkdir()
    assert "holds no pictures" in refused("verify", exported, "--images", tmp_path / "empty", code=2)
    (tmp_path / "mine/broken.png").write_bytes(b"no png")
    assert "broken.png is no picture" in refused(
        "verify", exported, "--against", golden, "--images", tmp_path / "mine", *QUIET
    )


@pytest.mark.parametrize(
    ("options", "text", "code"),
    [
        (("--report", "x.pdf"), "--report takes a name that ends in .html, .md, .json, not 'x.pdf'", 2),
        (("--report", "nowhere/x.md"), "there is no folder nowhere", 1),
        (("--pictures", 3), "--data, --pictures and --dtype go with --ablate", 2),
        (("--ablate", "--runtime", "onnxruntime"), "do not go with --ablate", 2),
        (("--against", "moondram2"), "did you mean 'moondream2'", 2),
    ],
)
def test_refused_before_anything_runs(demo, refused, monkeypatch, options, text, code):
    monkeypatch.setattr("vlmedge.parity.verify.run_tests", None)
    assert text in refused("verify", demo, *options, *QUIET, code=code)


def test_without_the_checkpoint_it_is_held_against_its_own_weights(exported, succeed):
    """The manifest knows a folder by its bare name only."""
    done = succeed("verify", exported, *QUIET)
    assert "agrees with the reference on its own weights" in done.out
    assert "note: not compared with the original: the checkpoint is not at hand" in done.out
    report = verify(exported, threads=1)
    outcomes = {(s.stage, s.against): s.outcome for s in report.stages}
    assert {key for key, outcome in outcomes.items() if outcome == "skipped"} == {("prompt", None), ("weights", None)}
    assert {side for _, side in outcomes} == {None, "stored"}


def test_a_hub_that_cannot_be_reached(exported, tmp_path, monkeypatch, cli):
    copy = shutil.copytree(exported, tmp_path / "copy")
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["source"] |= {"repo": "someone/model", "revision": "main", "commit": "0" * 40}
    (copy / MANIFEST).write_text(json.dumps(manifest))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = cli("verify", copy, "--threads", 1)
    assert done.code == 0, done
    assert "cannot be had" in done.err
    assert "the bundle is compared with its own weights only" in done.err.replace("\n", " ")


def test_another_models_checkpoint(demo, golden, refused):
    assert "is another model than the bundle's" in refused("verify", demo, "--against", golden, *QUIET)


def test_another_checkpoint_of_the_same_shape(exported, other, cli):
    done = cli("verify", exported, "--against", other, *QUIET)
    assert done.code == 1
    assert done.err == ""
    assert "FAILS at stored weights: decoder.layers.1.mlp.up.weight is not the checkpoint's" in done.out
    assert "usually: a tensor under another's name" in done.out
    assert "or this is not the checkpoint that the bundle was made from" in done.out.replace("\n", " ")


def test_without_pytorch(exported, refused, monkeypatch):
    monkeypatch.setattr("vlmedge.parity.verify.missing_for", lambda _: "PyTorch is not installed")
    assert "pip install 'vlmedge[torch]'" in refused("verify", exported, *QUIET)


def test_without_pytorch_an_export_is_still_held_against_its_checkpoint(golden, tmp_path, monkeypatch):
    """Facts, prompts, crops and weights need none; the manifest says that nothing was computed anew."""
    monkeypatch.setattr("vlmedge.parity.examine.missing_for", lambda _: "PyTorch is not installed: pip install it")
    manifest = vlmedge.export(golden, "onnx", "q4", tmp_path / "x", threads=1).manifest
    assert manifest.verification["verified"] is False
    assert manifest.verification["reason"] == "nothing was computed anew: PyTorch is not installed: pip install it"
    assert {s["stage"]: s["outcome"] for s in manifest.verification["stages"]} == dict.fromkeys(STAGES[:5], "passed")


def test_the_cause_is_quantization_where_the_exporter_is_right(golden, tmp_path):
    """A user's profile whose limit is too tight for what it does."""
    profile = tmp_path / "tight.toml"
    text = (
        'summary = "for a test"\n[[limits]]\nagainst = "original"\nlogits = 1e-3\nreason = "too tight"\n'
        '[[limits]]\nagainst = "stored"\nlogits = 0.5\nreason = "wide"\n'
        '[[rules]]\nmatch = "decoder.*"\nscheme = { kind = "int", bits = 4, group_size = 32 }\n'
        '[[rules]]\nmatch = "*"\nscheme = { kind = "float", bits = 16 }\n'
    )
    profile.write_text(text)
    with pytest.raises(vlmedge.VlmedgeError, match=r"at the stage 'logits': relative RMS .*quantization: the exporter"):
        vlmedge.export(golden, "onnx", str(profile), tmp_path / "x", threads=1)
    bundle = vlmedge.export(golden, "onnx", str(profile), tmp_path / "x", threads=1, verify=False)
    report = verify(bundle.path, golden, threads=1)
    assert report.stages[report.failing].against == "original"
    assert report.limits == {"original": "too tight", "stored": "wide"}


def test_ablation(demo, succeed, tmp_path):
    target = tmp_path / "report.json"
    done = succeed("verify", demo, "--ablate", "--pictures", 2, "--report", target, *QUIET)
    parts = {p["part"]: p for p in json.loads(target.read_text())["parts"]}
    assert list(parts) == [*PARTS, "all", "runtime"]
    assert all(name in done.out for name in parts)
    manifest = open_bundle(demo).manifest
    assert sum(parts[p]["bytes"] for p in PARTS) == parts["all"]["bytes"] == sum(c.bytes for c in manifest.components)
    assert sum(parts[p]["saved"] for p in PARTS) == parts["all"]["saved"] > 0
    assert parts["region"]["kl_mean"] == 0 < parts["vision"]["kl_mean"] < parts["decoder"]["kl_mean"]
    assert parts["region"]["iou"] < 1, "boxes are where the region heads' bits show"
    assert parts["all"]["kl_mean"] == pytest.approx(parts["runtime"]["kl_mean"], rel=0.5)
    assert all(0.5 < p["right"] <= 1 and p["lost"] >= 0 for p in parts.values())


def test_an_ablation_in_reports(demo, tmp_path, succeed):
    for ending in ("html", "md"):
        target = tmp_path / f"report.{ending}"
        succeed("verify", demo, "--ablate", "--pictures", 1, "--report", target, *QUIET)
        text = target.read_text(encoding="utf-8")
        assert "What each part costs" in text
        assert all(part in text for part in (*PARTS, "runtime", "saves MB", "won"))


def test_ablation_needs_the_checkpoint(exported, refused):
    assert "its checkpoint is needed; name it with --against" in refused("verify", exported, "--ablate", *QUIET, code=2)


def test_every_tensor_has_a_part(demo):
    manifest = open_bundle(demo).manifest
    assert {part_of(name) for name in manifest.model.tensors()} == set(PARTS)
    stored = EXPORTERS["onnx"].read(manifest.model, demo)
    assert set(stored.tensors) == set(stored.grains) == set(stored.bytes) == set(manifest.model.tensors())
