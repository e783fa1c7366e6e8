"""The demo's model: a moondream2 config of 4 million parameters and its byte-level BPE tokenizer."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from vlmedge.checkpoint import Checkpoint, Source
from vlmedge.demo.questions import NUMBERS, questions
from vlmedge.demo.scene import scene

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer

VOCAB = 512
SPECIAL = ("<|endoftext|>", *(f"<|md_reserved_{i}|>" for i in range(15)))
_WORDS = ("describe", "query", "detect", "point", "short", "normal", "long")


def tokenizer() -> Tokenizer:
    """Train the tokenizer on the demo's own language; ids 0..15 are special as in moondream/starmie-v1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        min_frequency=2,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(_corpus(), trainer)
    return made


def config(words: Tokenizer) -> dict[str, Any]:
    """The config.json, in the layout of the hub's 2025-06-21 release, with every default that differs."""
    said = {word: words.encode(word, add_special_tokens=False).ids for word in _WORDS}
    captions = {length: [1, *said["describe"], 2, *said[length], 3] for length in ("short", "normal", "long")}
    framed = {name: {"prefix": [1, *said[name], 2], "suffix": [3]} for name in ("query", "detect", "point")}
    return {
        "architectures": ["HfMoondream"],
        "auto_map": {"AutoConfig": "hf_moondream.HfConfig", "AutoModelForCausalLM": "hf_moondream.HfMoondream"},
        "model_type": "moondream1",
        "torch_dtype": "bfloat16",
        "config": {
            "text": {
                "dim": 256, "ff_dim": 512, "n_layers": 3, "vocab_size": VOCAB, "max_context": 512,
                "n_heads": 4, "n_kv_heads": 4, "prefix_attn": 65,
            },
            "vision": {
                "enc_dim": 128, "enc_patch_size": 14, "enc_n_layers": 4, "enc_ff_dim": 344, "enc_n_heads": 4,
                "proj_out_dim": 256, "crop_size": 112, "in_channels": 3, "max_crops": 6, "overlap_margin": 1,
                "proj_inner_dim": 512,
            },
            "region": {
                "dim": 256, "coord_feat_dim": 64, "coord_out_dim": 1024, "size_feat_dim": 128,
                "size_out_dim": 2048, "inner_dim": 256,
            },
            "tokenizer": {
                "bos_id": 0, "eos_id": 0, "answer_id": 3, "thinking_id": 4, "coord_id": 5, "size_id": 6,
                "start_ground_points_id": 7, "end_ground_id": 9,
                "templates": {"caption": captions, **framed},
            },
        },
    }  # fmt: skip


def write_recipe(folder: Path) -> Checkpoint:
    """Write config.json and tokenizer.json into `folder`; return it as a checkpoint without tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    words = tokenizer()
    table = config(words)
    words.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return open_recipe(folder)


def open_recipe(folder: Path) -> Checkpoint:
    """What `write_recipe` wrote: a training goes on with the tokenizer that it began with."""
    table = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return Checkpoint(Source("demo:moondream2"), folder, table, {})


def _corpus() -> list[str]:
    """Every word that the demo asks or says, as often as any other: how pictures are made up changes no id."""
    lines = [*_WORDS, *NUMBERS]
    for index in range(1000):
        for question in questions(scene(0, index)):
            lines += [question.text, f" {question.text}", *question.answers]
    return sorted({word for line in lines for word in re.findall(r" ?\w+|[^\w\s]", line)}) * 2
