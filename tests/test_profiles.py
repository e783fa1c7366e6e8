"""Quantization profiles: every TOML parses, rules win in order, and a mistake is named with the nearest right word."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vlmedge.checkpoint import open_folder
from vlmedge.errors import UsageError
from vlmedge.families import family_of
from vlmedge.quant_profiles import (
    LayerSelector,
    Scheme,
    hints,
    load_profile,
    plan,
    prefill_plan,
    profile_names,
    profiles_for,
)
from vlmedge.quant_profiles.plan import vocabulary
from vlmedge.spec import ModelSpec

TINY = Path(__file__).parent / "data" / "moondream2" / "tiny-mha"
LAST = '\n[[rules]]\nmatch = "*"\nscheme = { kind = "float", bits = 16 }\n'


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    checkpoint = open_folder(TINY)
    return family_of(checkpoint).spec(checkpoint)


def write(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


def refused(folder: Path, text: str, spec: ModelSpec | None = None) -> str:
    path = write(folder, text)
    with pytest.raises(UsageError) as error:
        load_profile(path) if spec is None else plan(load_profile(path), spec)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_promised_profiles_ship():
    assert {"f32", "f16", "q8", "q6", "q5", "q4", "q4_0", "q3"} == set(profiles_for("gguf"))
    assert {"f32", "f16", "w8a8", "w8a8-kv8", "q8", "q4", "q4_0", "q4-fast", "turbo"} == set(profiles_for("onnx"))
    assert set(profiles_for("gguf")) | set(profiles_for("onnx")) == set(profile_names())


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_parses_and_covers_every_tensor(name: str, spec: ModelSpec):
    profile = load_profile(name)
    assert profile.summary
    kept = {"f32": "f32", "w8a8": "f32", "w8a8-kv8": "int8", "q4-fast": "int8", "turbo": "int8"}
    assert profile.kv_cache == kept.get(name, "f16")
    schemes = plan(profile, spec)
    assert list(schemes) == list(spec.tensors())
    for tensor, shape in spec.tensors().items():
        if len(shape) == 1 or tensor in ("vision.position", "region.coord_features", "region.size_features"):
            assert schemes[tensor] == Scheme("float", 32)


@pytest.mark.parametrize("layers", [1, 3, 8, 24, 27, 32, 80])
def test_the_layer_selector_of_q4_is_llama_cpps(layers: int):
    def use_more_bits(i: int, n: int) -> bool:  # src/llama-quant.cpp
        return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2

    rule = next(r for r in load_profile("q4").rules if r.match.endswith("attn.v.weight"))
    assert rule.layers is not None
    assert [rule.layers.picks(i, layers) for i in range(layers)] == [use_more_bits(i, layers) for i in range(layers)]


def test_q4_is_the_q4_k_m_mix(spec: ModelSpec):
    big = replace(spec, decoder=replace(spec.decoder, layers=24))
    types = {name: scheme.native.get("gguf") for name, scheme in plan(load_profile("q4"), big).items()}
    more = [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23]
    for part in ("attn.v", "mlp.down"):
        got = [types[f"decoder.layers.{i}.{part}.weight"] for i in range(24)]
        assert got == ["Q6_K" if i in more else "Q4_K" for i in range(24)]
    assert types["decoder.layers.0.attn.q.weight"] == "Q4_K"
    assert (types["decoder.head.weight"], types["decoder.embed.weight"]) == ("Q6_K", "Q4_K")
    assert types["vision.layers.3.attn.q.weight"] == types["projector.up.weight"] == "Q8_0"
    assert types["region.size_decoder.up.weight"] == "Q8_0"


def test_q3_is_the_q3_k_m_mix(spec: ModelSpec):
    big = replace(spec, decoder=replace(spec.decoder, layers=24))
    types = {name: scheme.native.get("gguf") for name, scheme in plan(load_profile("q3"), big).items()}
    assert [types[f"decoder.layers.{i}.attn.v.weight"] for i in range(4)] == ["Q5_K", "Q5_K", "Q4_K", "Q4_K"]
    assert [types[f"decoder.layers.{i}.mlp.down.weight"] for i in range(3)] == ["Q5_K", "Q4_K", "Q4_K"]
    assert types["decoder.layers.9.attn.out.weight"] == "Q4_K"
    assert types["decoder.layers.9.mlp.up.weight"] == types["decoder.embed.weight"] == "Q3_K"


def test_bounds_count_layers_or_are_fractions():
    assert [LayerSelector(below=2, above=5).picks(i, 6) for i in range(6)] == [True, True, False, False, False, True]
    assert [LayerSelector(above="1/2").picks(i, 5) for i in range(5)] == [False, False, True, True, True]
    with pytest.raises(UsageError, match="a layer bound is 'half'"):
        LayerSelector(below="half")


def test_the_first_rule_wins(tmp_path: Path, spec: ModelSpec):
    text = """
summary = "two rules for one tensor"
[[rules]]
match = "decoder.layers.1.mlp.up.weight"
scheme = { kind = "int", bits = 4, group_size = 32 }
[[rules]]
match = "decoder.layers.*.mlp.up.weight"
scheme = { kind = "int", bits = 8 }
"""
    schemes = plan(load_profile(write(tmp_path, text + LAST)), spec)
    bits = [schemes[f"decoder.layers.{i}.mlp.up.weight"].bits for i in range(3)]
    assert bits == [8, 4, 8]
    assert schemes["decoder.layers.0.mlp.down.weight"].bits == 16


def test_unknown_names_and_keys_give_the_nearest(tmp_path: Path):
    with pytest.raises(UsageError, match=r"unknown profile 'q4_1'; did you mean 'q4_0'\? \(or give a \.toml file's"):
        load_profile("q4_1")
    with pytest.raises(UsageError, match="cannot be read"):
        load_profile(str(tmp_path / "none.toml"))
    assert "not TOML" in refused(tmp_path, "summary = ")
    rule = 'summary = ""\n[[rules]]\nmatch = "*"\nscheme = { kind = "int", bits = 4, groupsize = 32 }\n'
    assert "unknown key 'groupsize'; did you mean 'group_size'?" in refused(tmp_path, rule)
    assert "did you mean 'kv_cache'" in refused(tmp_path, 'summary = ""\nkvcache = "f16"\nrules = []')
    assert "lacks the key 'summary'" in refused(tmp_path, "rules = []")
    assert "drop the key" in refused(tmp_path, 'name = "x"\nsummary = ""\nrules = []')
    assert "mine.toml: a scheme of kind int has 9 bits" in refused(tmp_path, rule.replace("4, groupsize = 32", "9"))
    assert "did you mean 'int'" in refused(
        tmp_path, rule.replace('"int", bits = 4, groupsize = 32', '"integ", bits = 4')
    )


def test_a_misspelt_rule_is_an_error_with_the_nearest_name(tmp_path: Path, spec: ModelSpec):
    text = (
        'summary = ""\n[[rules]]\nmatch = "decoder.layers.*.attn.values.weight"\nscheme = { kind = "int", bits = 8 }\n'
    )
    message = refused(tmp_path, text + LAST, spec)
    assert "rule 1 matches no tensor of any model: 'decoder.layers.*.attn.values.weight'" in message
    assert "did you mean 'decoder.layers.*.attn." in message


def test_a_rule_for_what_this_model_lacks_is_a_hint(tmp_path: Path, spec: ModelSpec):
    text = """
summary = "rules that decide nothing here"
[[rules]]
match = "decoder.layers.*.mlp.gate.weight"
scheme = { kind = "int", bits = 8 }
[[rules]]
match = "decoder.layers.*.mlp.up.weight"
layers = { below = "1/16" }
scheme = { kind = "int", bits = 8 }
[[rules]]
match = "decoder.layers.40.*"
scheme = { kind = "int", bits = 8 }
"""
    profile = load_profile(write(tmp_path, text + LAST + LAST))
    plan(profile, spec)
    reasons = [hint.rpartition(": ")[2] for hint in hints(profile, spec)]
    absent = "this model has no such tensor"
    assert reasons == [absent, "its layers select none of this model's", absent, "earlier rules take what it matches"]


def test_a_tensor_without_a_rule_is_an_error(tmp_path: Path, spec: ModelSpec):
    text = 'summary = ""\n[[rules]]\nmatch = "decoder.*"\nscheme = { kind = "int", bits = 8 }\n'
    assert "has no rule for vision.patch.weight; end it with a rule" in refused(tmp_path, text, spec)


def test_w8a8_has_activations_wherever_something_is_multiplied(spec: ModelSpec):
    schemes = plan(load_profile("w8a8"), spec)
    assert schemes["decoder.embed.weight"] == Scheme("int", 8, group_size=32)
    integers = {name: scheme for name, scheme in schemes.items() if scheme.kind == "int"}
    assert len(integers) > 50
    del integers["decoder.embed.weight"]
    assert set(integers.values()) == {Scheme("int", 8, group_size=0, symmetric=True, activations=8)}


def test_the_types_of_onnx(spec: ModelSpec):
    big = replace(spec, decoder=replace(spec.decoder, layers=24))

    def types(profile: str) -> list[str | None]:
        schemes = plan(load_profile(profile), big)
        names = ("decoder.head", "decoder.layers.0.attn.v", "decoder.layers.9.mlp.up", "projector.up", "vision.patch")
        return [schemes[f"{name}.weight"].native.get("onnx") for name in names]

    assert types("q4") == ["int8_32", "uint4_32", "uint4_32", "w8a8", "w8a8"]
    assert types("q4_0") == ["int8_32", "int4_32", "int4_32", "w8a8", "w8a8"]
    assert types("q8") == ["int8_32", "int8_32", "int8_32", "w8a8", "w8a8"]
    fast = plan(load_profile("q4-fast"), big)
    assert {
        s for name, s in fast.items() if name.startswith(("decoder.layers.", "decoder.head.")) and s.kind == "int"
    } == {Scheme("int", 4, 128, symmetric=False)}
    assert fast["decoder.embed.weight"] == Scheme("int", 8, 32)


def test_w8a8_kv8_differs_in_its_cache_alone(spec: ModelSpec):
    assert plan(load_profile("w8a8-kv8"), spec) == plan(load_profile("w8a8"), spec)


def test_turbo_is_q4_fast_and_a_w8a8_copy_of_the_layers(spec: ModelSpec):
    turbo, fast, wide = (load_profile(name) for name in ("turbo", "q4-fast", "w8a8"))
    assert plan(turbo, spec) == plan(fast, spec)
    assert turbo.kv_cache == fast.kv_cache
    assert prefill_plan(fast, spec) == {}
    copy, single = prefill_plan(turbo, spec), plan(wide, spec)
    assert copy == {n: s for n, s in single.items() if n.startswith("decoder.layers.") and s.kind == "int"}
    assert list(copy) == [name for name in spec.tensors() if name in copy]
    assert len(copy) == 6 * spec.decoder.layers


COPY = '\n[[prefill]]\nmatch = "{}"\nscheme = {{ kind = "int", bits = 8, activations = 8 }}\n'


def test_a_prefill_rule_is_checked_as_the_others_are(tmp_path: Path, spec: ModelSpec):
    def loaded(*patterns: str):
        return load_profile(write(tmp_path, 'summary = ""\n' + LAST + "".join(map(COPY.format, patterns))))

    words = "prefill rule 1 matches no tensor of any model's decoder layers"
    for pattern in ("vision.*", "decoder.head.weight", "decoder.layers.*.attn.queue.weight"):
        with pytest.raises(UsageError, match=words) as error:
            prefill_plan(loaded(pattern), spec)
        assert "\n" not in str(error.value)
    assert "did you mean 'decoder.layers.*.attn.q" in str(error.value)
    idle = loaded("decoder.layers.*.mlp.gate.weight", "decoder.*", "*")
    reasons = [hint.partition(": ")[2] for hint in hints(idle, spec)]
    assert reasons == [
        "prefill rule 1 ('decoder.layers.*.mlp.gate.weight') decides nothing: this model has no such tensor",
        "prefill rule 3 ('*') decides nothing: earlier rules take what it matches",
    ]
    copy = prefill_plan(idle, spec)
    assert copy
    assert all(name.startswith("decoder.layers.") and len(spec.tensors()[name]) == 2 for name in copy)


def test_activations_are_8_bits_or_floats(tmp_path: Path):
    rule = 'summary = ""\n[[rules]]\nmatch = "*"\nscheme = { kind = "int", bits = 8, activations = 4 }\n'
    assert "a scheme of kind int has 4-bit activations; possible: 0 (floats), 8" in refused(tmp_path, rule)
    floats = rule.replace('"int", bits = 8, activations = 4', '"float", bits = 16, activations = 8')
    assert "a scheme of kind float has 8-bit activations; possible: 0 (floats)" in refused(tmp_path, floats)


def test_the_vocabulary_holds_every_name_of_a_model(spec: ModelSpec):
    assert set(spec.tensors()) <= set(vocabulary(32))
