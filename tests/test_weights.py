"""The table of tensor names on the golden checkpoint: everything accounted for, and what is said where it is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vlmedge.checkpoint import open_folder
from vlmedge.errors import CheckpointError
from vlmedge.families import FAMILIES
from vlmedge.spec import ModelSpec, component
from vlmedge.tensors import ArrayTensor, Tensor
from vlmedge.weights import Rule, WeightMap

GOLDEN = Path(__file__).parent / "data" / "moondream2" / "tiny-mha"
FAMILY = FAMILIES["moondream2"]
CONFIG: dict[str, Any] = json.loads((GOLDEN / "config.json").read_text())
BLOCK = "model.text.blocks.0"


@pytest.fixture(scope="module")
def model() -> ModelSpec:
    return FAMILY.spec(open_folder(GOLDEN))


@pytest.fixture(scope="module")
def stored() -> dict[str, torch.Tensor]:
    return dict(load_file(GOLDEN / "model.safetensors"))


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return open_folder(GOLDEN).tensors


def _refused(table: WeightMap, tensors: dict[str, Tensor]) -> str:
    with pytest.raises(CheckpointError) as error:
        table.bind(tensors)
    assert "\n" not in str(error.value)
    return str(error.value)


def _zeros(*shape: int) -> Tensor:
    return ArrayTensor(np.zeros(shape, np.float32))


def test_every_tensor_is_accounted_for(model: ModelSpec, tensors: dict[str, Tensor]):
    bound = FAMILY.weights(model).bind(tensors)
    assert bound.keys() == model.tensors().keys()
    assert {name: tensor.shape for name, tensor in bound.items()} == model.tensors()
    assert sum(t.size for t in bound.values()) == sum(t.size for t in tensors.values())
    assert {component(name) for name in bound} == {"vision", "projector", "decoder", "region"}


def test_inverse_gives_back_what_was_stored(
    model: ModelSpec, tensors: dict[str, Tensor], stored: dict[str, torch.Tensor]
):
    table = FAMILY.weights(model)
    back = table.inverse({name: tensor.read() for name, tensor in table.bind(tensors).items()})
    assert back.keys() == stored.keys()
    for name, array in back.items():
        want = stored[name].float().numpy()
        np.testing.assert_array_equal(array.reshape(want.shape), want, err_msg=name)


def test_joined_projections_are_split_in_order(
    model: ModelSpec, tensors: dict[str, Tensor], stored: dict[str, torch.Tensor]
):
    bound = FAMILY.weights(model).bind(tensors)
    q, k, v = np.split(stored[f"{BLOCK}.attn.qkv.weight"].float().numpy(), 3)
    for part, want in (("q", q), ("k", k), ("v", v)):
        np.testing.assert_array_equal(bound[f"decoder.layers.0.attn.{part}.weight"].read(), want)
        np.testing.assert_array_equal(bound[f"decoder.layers.0.attn.{part}.weight"].read_rows(3, 9), want[3:9])
    biases = np.split(stored[f"{BLOCK}.attn.qkv.bias"].float().numpy(), 3)
    np.testing.assert_array_equal(bound["decoder.layers.0.attn.v.bias"].read(), biases[2])


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("model."),
        lambda name: name.replace("model.", "model._orig_mod.", 1),
        lambda name: name.replace(".blocks.", "._orig_mod.blocks.", 1),
        lambda name: "_orig_mod." + name.removeprefix("model."),
    ],
    ids=["no prefix", "compiled", "compiled blocks", "compiled without prefix"],
)
def test_names_of_fine_tunes(model: ModelSpec, tensors: dict[str, Tensor], rename: Callable[[str], str]):
    table = FAMILY.weights(model)
    bound = table.bind({rename(name): tensor for name, tensor in tensors.items()})
    assert bound.keys() == model.tensors().keys()


def test_caches_are_dropped(model: ModelSpec, tensors: dict[str, Tensor]):
    for part in ("k_cache", "v_cache"):
        tensors[f"{BLOCK}.kv_cache.{part}"] = _zeros(1, 2, 2048, 64)
    assert FAMILY.weights(model).bind(tensors).keys() == model.tensors().keys()


def test_a_tensor_that_no_rule_names(model: ModelSpec, tensors: dict[str, Tensor]):
    tensors["model.text.extra.weight"] = _zeros(2)
    assert "'model.text.extra.weight', which this model does not have" in _refused(FAMILY.weights(model), tensors)


def test_a_layer_too_many(model: ModelSpec, tensors: dict[str, Tensor]):
    tensors["model.text.blocks.3.ln.weight"] = _zeros(128)
    text = _refused(FAMILY.weights(model), tensors)
    assert "the checkpoint's config has no place for the tensor 'model.text.blocks.3.ln.weight'" in text


def test_a_missing_tensor(model: ModelSpec, tensors: dict[str, Tensor]):
    del tensors[f"{BLOCK}.mlp.fc1.weight"]
    text = _refused(FAMILY.weights(model), tensors)
    assert f"lacks 1 tensor(s), first '{BLOCK}.mlp.fc1.weight'" in text
    del tensors[f"{BLOCK}.attn.qkv.bias"]
    text = _refused(FAMILY.weights(model), tensors)
    assert "lacks 4 tensor(s)" in text
    assert "is a shard missing, or is this another model?" in text


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        (f"{BLOCK}.mlp.fc1.weight", (128, 320), [320, 128]),
        (f"{BLOCK}.mlp.fc1.bias", (319,), [320]),
        (f"{BLOCK}.attn.qkv.weight", (256, 128), [384, 128]),
        ("model.text.wte", (511, 128), [512, 128]),
        ("model.vision.pos_emb", (1, 728, 48), [729, 48]),
    ],
)
def test_a_wrong_shape(
    model: ModelSpec, tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], wanted: list[int]
):
    assert name in tensors
    tensors[name] = _zeros(*shape)
    text = _refused(FAMILY.weights(model), tensors)
    assert f"'{name}' has the shape {list(shape)}, the config asks for {wanted}" in text


def test_two_tensors_for_one_place(model: ModelSpec, tensors: dict[str, Tensor]):
    tensors["text.wte"] = tensors["model.text.wte"]
    assert "two tensors of the checkpoint fill decoder.embed.weight" in _refused(FAMILY.weights(model), tensors)


def test_a_dropped_tensor_has_a_reason():
    with pytest.raises(ValueError, match="without saying why"):
        Rule("x")


def test_reshaped():
    table = WeightMap((Rule("t.{i}", ("a.{i}",)), Rule("p", ("b",))), {"a.0": (3, 2), "b": (4, 6)})
    source = np.arange(6, dtype=np.float32).reshape(3, 2)
    patch = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    bound = table.bind({"t.0": ArrayTensor(source), "p": ArrayTensor(patch)})
    np.testing.assert_array_equal(bound["a.0"].read(), source)
    np.testing.assert_array_equal(bound["b"].read(), patch.reshape(4, 6))
    back = table.inverse({name: tensor.read() for name, tensor in bound.items()})
    np.testing.assert_array_equal(back["t.0"], source)
