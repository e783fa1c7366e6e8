"""Key-value metadata of text.gguf and mmproj.gguf, and which of a model's facts stock llama.cpp can express."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmedge.errors import UnsupportedError
from vlmedge.exporters.gguf.container import Value, Value16, ValueI32
from vlmedge.exporters.gguf.layout import mlp_width
from vlmedge.exporters.gguf.template import chat_template
from vlmedge.exporters.gguf.vocabulary import Vocabulary
from vlmedge.quant_profiles import Scheme
from vlmedge.spec import DecoderSpec, Ids, ModelSpec, PromptSpec

# Facts that a decoder must have to be run as one of llama.cpp's architectures (src/models/NAME.cpp).
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "phi2": {
        "norm": "layer",
        "activation": "gelu_tanh",
        "gated": False,
        "parallel_residual": True,
        "bias": True,
        "head_bias": True,
        "tied_head": False,
    },
}


def architecture(decoder: DecoderSpec) -> str:
    """llama.cpp's name for a decoder; raises UnsupportedError that names the first fact that no architecture has."""
    wrong: dict[str, list[str]] = {}
    for name, facts in ARCHITECTURES.items():
        wrong[name] = [
            f"{fact} = {getattr(decoder, fact)}" for fact, value in facts.items() if getattr(decoder, fact) != value
        ]
        if decoder.heads * decoder.head_dim != decoder.width:
            wrong[name].append(f"{decoder.heads} heads of {decoder.head_dim} for a width of {decoder.width}")
        if not wrong[name]:
            return name
    nearest = min(wrong, key=lambda name: len(wrong[name]))
    raise UnsupportedError(f"gguf: no architecture for a decoder with {wrong[nearest][0]} (the nearest is {nearest})")


def check_vision(spec: ModelSpec) -> None:
    """Raise UnsupportedError for a tower or projector that mtmd's projector type `mlp` does not compute."""
    vision, projector = spec.vision, spec.projector
    for where, activation in (("vision", vision.activation), ("projector", projector.activation)):
        if activation != "gelu_tanh":
            raise UnsupportedError(f"gguf: mtmd's projector 'mlp' computes gelu_tanh, the {where} has {activation}")
    if vision.channels != 3:
        raise UnsupportedError(f"gguf: mtmd reads pictures of 3 channels, the vision tower has {vision.channels}")


def parts_metadata(whole: Mapping[str, Value], tensors: Sequence[int]) -> list[dict[str, Value]]:
    """The key-values of each part of a model that has so many tensors in each: the first carries everything.

    Types as llama.cpp's loader reads them (`LLM_KV_SPLIT_*`, src/llama-model-loader.cpp).
    """
    if len(tensors) == 1:
        return [dict(whole)]
    count = {"split.count": Value16(len(tensors)), "split.tensors.count": ValueI32(sum(tensors))}
    first = {**whole, "split.no": Value16(0), **count}
    architecture_only = {"general.architecture": whole["general.architecture"]}
    return [first, *({**architecture_only, "split.no": Value16(i), **count} for i in range(1, len(tensors)))]


def text_metadata(spec: ModelSpec, vocabulary: Vocabulary) -> dict[str, Value]:
    """Keys of text.gguf but for `general.*`."""
    decoder, prompt = spec.decoder, spec.prompt
    arch, bos = architecture(decoder), first_token(prompt)
    return {
        f"{arch}.context_length": decoder.context,
        f"{arch}.embedding_length": decoder.width,
        f"{arch}.feed_forward_length": decoder.mlp_width,
        f"{arch}.block_count": decoder.layers,
        f"{arch}.attention.head_count": decoder.heads,
        f"{arch}.attention.head_count_kv": decoder.kv_heads,
        f"{arch}.attention.layer_norm_epsilon": float(decoder.norm_eps),
        f"{arch}.rope.dimension_count": decoder.rope_dims,
        f"{arch}.rope.freq_base": float(decoder.rope_theta),
        f"{arch}.vocab_size": decoder.vocab,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": vocabulary.pre,
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.token_type": vocabulary.types,
        "tokenizer.ggml.merges": vocabulary.merges,
        "tokenizer.ggml.bos_token_id": bos,
        "tokenizer.ggml.eos_token_id": prompt.stop[0],
        "tokenizer.ggml.unknown_token_id": bos,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": chat_template(prompt, vocabulary, bos),
    }


def mmproj_metadata(spec: ModelSpec, plan: Mapping[str, Scheme]) -> dict[str, Value]:
    """Keys of mmproj.gguf but for `general.*`."""
    vision = spec.vision
    return {
        "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": True,
        "clip.vision.image_size": vision.image_size,
        "clip.vision.patch_size": vision.patch_size,
        "clip.vision.embedding_length": vision.width,
        "clip.vision.feed_forward_length": mlp_width(spec, plan),
        "clip.vision.block_count": vision.layers,
        # Without this key the graph stops one block short (tools/mtmd/models/llava.cpp).
        "clip.vision.feature_layer": [vision.layers],
        "clip.vision.projection_dim": spec.decoder.width,
        "clip.vision.attention.head_count": vision.heads,
        "clip.vision.attention.layer_norm_epsilon": float(vision.norm_eps),
        "clip.vision.image_mean": [float(x) for x in spec.image.mean],
        "clip.vision.image_std": [float(x) for x in spec.image.std],
    }


def first_token(prompt: PromptSpec) -> int:
    """The token that every prompt begins with (BOS); the first stop token where templates begin with none."""
    for template in prompt.templates.values():
        if template and isinstance(template[0], Ids):
            return template[0].ids[0]
    return prompt.stop[0]
