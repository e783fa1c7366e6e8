"""The small JSON files by which transformers.js, and what follows its conventions, finds its way in an ONNX bundle.

Names and meanings are those of transformers.js 4.3.1 (`src/configs.js`, `src/models/session.js`,
`src/models/modeling_utils.js`). The class is `llava` for every model of tower, projector and decoder: it feeds
`embed_tokens` and `decoder_model_merged` as they are; what it does with pictures does not fit ours (docs/web.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vlmedge.spec import Activation, DecoderSpec, Ids, ImageSpec, ModelSpec, PromptSpec, VisionSpec

_ACTIVATIONS: Mapping[Activation, str] = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
}
# PIL.Image.Resampling. Browsers ignore it: transformers.js resizes there with a canvas.
_RESAMPLE = {"lanczos": 1, "bicubic": 3}


def configs(spec: ModelSpec, tokenizer: bytes, data_files: Mapping[str, int]) -> dict[str, str]:
    """Return file name -> text of `config.json`, `generation_config.json` and the two other `*_config.json`.

    `tokenizer`: the bundle's tokenizer.json. `data_files`: graph (`embed_tokens`) -> how many files of external data
    it has; transformers.js fetches `<graph>.onnx_data`, `<graph>.onnx_data_1` and so on.
    """
    tokens = _special_tokens(tokenizer)
    files = {
        "config.json": _config(spec, data_files),
        "generation_config.json": _generation(spec.prompt),
        "preprocessor_config.json": _preprocessor(spec.image),
        "tokenizer_config.json": _tokenizer(spec, tokens),
    }
    return {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()}


def _config(spec: ModelSpec, data_files: Mapping[str, int]) -> dict[str, Any]:
    counts = {graph: count for graph, count in sorted(data_files.items()) if count}
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "is_encoder_decoder": False,
        "max_position_embeddings": spec.decoder.context,
        "vocab_size": spec.decoder.vocab,
        "bos_token_id": _bos(spec.prompt),
        "eos_token_id": list(spec.prompt.stop),
        "image_seq_length": spec.image_tokens,
        "text_config": _text(spec.decoder),
        "vision_config": _vision(spec.vision),
        # "fp32" means a file name without a suffix, whatever the weights are; a browser's default would be q8.
        "transformers.js_config": {"dtype": "fp32", "use_external_data_format": counts},
    }


def _text(decoder: DecoderSpec) -> dict[str, Any]:
    """The decoder; transformers.js reads heads, layers, width and head size, and only by a model_type it knows."""
    phi = decoder.parallel_residual and decoder.norm == "layer"
    return {
        "model_type": "phi" if phi else "llama",
        "hidden_size": decoder.width,
        "intermediate_size": decoder.mlp_width,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "head_dim": decoder.head_dim,
        "vocab_size": decoder.vocab,
        "max_position_embeddings": decoder.context,
        "hidden_act": _ACTIVATIONS[decoder.activation],
        ("layer_norm_eps" if decoder.norm == "layer" else "rms_norm_eps"): decoder.norm_eps,
        "rope_theta": decoder.rope_theta,
        "partial_rotary_factor": decoder.rope_dims / decoder.head_dim,
        "tie_word_embeddings": decoder.tied_head,
    }


def _vision(vision: VisionSpec) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": vision.width,
        "intermediate_size": vision.mlp_width,
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.heads,
        "num_channels": vision.channels,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_act": _ACTIVATIONS[vision.activation],
        "layer_norm_eps": vision.norm_eps,
    }


def _generation(prompt: PromptSpec) -> dict[str, Any]:
    """Greedy. `suppress_tokens` bans from the first token on, the model's own rule from the second on."""
    return {
        "bos_token_id": _bos(prompt),
        "eos_token_id": list(prompt.stop),
        "pad_token_id": prompt.stop[0],
        "max_new_tokens": prompt.max_tokens,
        "do_sample": False,
        "suppress_tokens": list(prompt.banned) or None,
    }


def _preprocessor(image: ImageSpec) -> dict[str, Any]:
    """One crop of a picture; the local crops and how they are stitched are told by the bundle's manifest."""
    return {
        "image_processor_type": "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": image.size, "width": image.size},
        "resample": _RESAMPLE[image.resample],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }


def _tokenizer(spec: ModelSpec, tokens: Mapping[int, str]) -> dict[str, Any]:
    bos, eos = _bos(spec.prompt), spec.prompt.stop[0]
    named = {"bos_token": tokens.get(-1 if bos is None else bos), "eos_token": tokens.get(eos)}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": spec.decoder.context,
        "clean_up_tokenization_spaces": False,
        **{name: text for name, text in named.items() if text is not None},
    }


def _bos(prompt: PromptSpec) -> int | None:
    """What every template begins with, where it is one token; else None."""
    starts = {parts[0].ids[:1] if parts and isinstance(parts[0], Ids) else () for parts in prompt.templates.values()}
    first = starts.pop() if len(starts) == 1 else ()
    return first[0] if first else None


def _special_tokens(tokenizer: bytes) -> dict[int, str]:
    added = json.loads(tokenizer).get("added_tokens") or []
    return {token["id"]: token["content"] for token in added}
