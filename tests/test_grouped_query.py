"""Grouped-query attention (fewer key and value heads) and f32 shards, from checkpoint to GGUF tokens."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import vlmedge
from vlmedge.checkpoint import open_folder
from vlmedge.parity.metrics import difference

TINY = Path(__file__).parent / "data/moondream2/tiny-mha"
PICTURES = Path(__file__).parent / "data/moondream2/images"
HEAD = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny checkpoint with its second key and value head cut off, as two f32 shards."""
    out = tmp_path_factory.mktemp("gqa")
    config = json.loads((TINY / "config.json").read_text())
    config["config"]["text"]["n_kv_heads"] = 1
    (out / "config.json").write_text(json.dumps(config))
    (out / "tokenizer.json").write_bytes((TINY / "tokenizer.json").read_bytes())
    arrays = {name: tensor.read() for name, tensor in open_folder(TINY).tensors.items()}
    for name, array in arrays.items():
        if ".attn.qkv." in name and ".text." in name:
            q, k, v = np.split(array, 3)
            arrays[name] = np.concatenate([q, k[:HEAD], v[:HEAD]])
    names = sorted(arrays)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: arrays[name] for name in members}, out / file)
    index = {name: file for file, members in shards.items() for name in members}
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return out


def test_export_agrees_with_the_original(folder, tmp_path):
    """Verification would raise; boxes and tokens are compared on a picture of several crops too."""
    bundle = vlmedge.export(folder, "gguf", "f32", tmp_path / "out", threads=1)
    assert bundle.manifest.verification["verified"]
    tokens = next(s for s in bundle.manifest.verification["stages"] if s["stage"] == "tokens")
    assert tokens["numbers"]["top1"] == 1
    assert bundle.manifest.model.decoder.kv_heads == 1
    picture = PICTURES / "big.png"
    with vlmedge.load(bundle.path, threads=1) as ours, vlmedge.load(folder, threads=1) as original:
        got, wanted = (m.caption(picture, "short", max_tokens=32).tokens for m in (ours, original))
        assert got == wanted
        found, boxes = (m.detect(picture, "cat", max_objects=3).boxes for m in (ours, original))
        for got, wanted in zip(found, boxes, strict=True):
            sides = [(box.x_min, box.y_min, box.x_max, box.y_max) for box in (got, wanted)]
            assert sides[0] == pytest.approx(sides[1], abs=2e-3)


def test_one_shared_head_is_as_good_as_two_equal_ones(folder, tmp_path):
    """What grouped queries mean, in the words of plain attention: no other model is needed to know it."""
    config = json.loads((folder / "config.json").read_text())
    config["config"]["text"]["n_kv_heads"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_bytes((TINY / "tokenizer.json").read_bytes())
    arrays = {name: tensor.read() for name, tensor in open_folder(folder).tensors.items()}
    for name, array in arrays.items():
        if ".attn.qkv." in name and ".text." in name:
            q, k, v = np.split(array, [2 * HEAD, 3 * HEAD])
            arrays[name] = np.concatenate([q, k, k, v, v])
    save_file(arrays, tmp_path / "model.safetensors")
    with vlmedge.load(folder, threads=1) as grouped, vlmedge.load(tmp_path, threads=1) as plain:
        assert (grouped.spec.decoder.kv_heads, plain.spec.decoder.kv_heads) == (1, 2)
        got, wanted = (m.stages([PICTURES / "big.png"], [1, 304, 2, 303, 3])["logits"] for m in (grouped, plain))
    assert difference(got, wanted)[0] < 1e-5
