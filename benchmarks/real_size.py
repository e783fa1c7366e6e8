"""Models of moondream2's shape with random weights, at its real size or smaller: on disk, or made as they are read."""

from __future__ import annotations

import json
import platform
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from vlmedge.checkpoint import Checkpoint, Source, open_folder
from vlmedge.exporters import EXPORTERS, ExportJob
from vlmedge.exporters.choice import choose
from vlmedge.families import FAMILIES
from vlmedge.session import F32
from vlmedge.spec import DecoderSpec, ModelSpec, Shape
from vlmedge.tensors import Tensor

BLOCK = 4 << 20  # values made at a time
FAMILY = FAMILIES["moondream2"]
PACKAGES = ("onnxruntime", "onnx", "onnx-ir", "llama-cpp-python", "torch", "numpy")


@dataclass(frozen=True, slots=True)
class Size:
    """Layers and widths of decoder and tower; the defaults are moondream2's own."""

    layers: int = 24
    width: int = 2048
    vision_layers: int = 27
    vision_width: int = 1152

    def config(self) -> dict[str, Any]:
        """A config.json as upstream writes it."""
        width, tower = self.width, self.vision_width
        heads = {"n_heads": width // 64, "n_kv_heads": width // 64}
        text = {"n_layers": self.layers, "dim": width, "ff_dim": 4 * width} | heads
        vision = {"enc_n_layers": self.vision_layers, "enc_dim": tower, "proj_inner_dim": 4 * width}
        vision |= {"enc_ff_dim": 4304 if tower == 1152 else 4 * tower, "proj_out_dim": width}
        vision |= {"enc_n_heads": tower // (64 if tower % 72 else 72)}
        config = {"text": text, "vision": vision, "region": {"dim": width}}
        return {"model_type": "moondream1", "architectures": ["HfMoondream"], "config": config}

    def spec(self) -> ModelSpec:
        """The size as a ModelSpec."""
        return FAMILY.spec(Checkpoint(Source("random"), Path(), self.config(), {}))


class RandomTensor(Tensor):
    """Rows of small random numbers, made when they are read; the same for the same shape. Norms' weights are not 1."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.dtype = shape, "f32"

    def read_rows(self, start: int, stop: int) -> F32:
        """Rows start..stop as float32."""
        rng = np.random.default_rng(start)
        return rng.standard_normal((stop - start, self.columns), dtype=np.float32) * np.float32(0.02)


@dataclass(frozen=True, slots=True)
class Random:
    """A model: its spec, its tensors by canonical name (perhaps more than the spec needs) and its tokenizer.json."""

    spec: ModelSpec
    tensors: Mapping[str, Tensor]
    tokenizer: bytes = field(repr=False)

    def export(self, format: str, profile: str, folder: Path, threads: int) -> None:
        """Write an exporter's files into a new folder; no manifest, no self-test. `profile` may be PROFILE:FLAVOUR."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        profile, _, flavour = profile.partition(":")
        order = choose(format, profile, flavour or None).order(self.spec)
        EXPORTERS[format].write(ExportJob(order, self.tensors, self.tokenizer, "random", folder, threads))

    def exported(self, format: str, profile: str, folder: Path, threads: int) -> Path:
        """The folder `folder`, written where it is not there yet."""
        if not folder.is_dir():
            part = folder.with_name(f"{folder.name}.part")
            self.export(format, profile, part, threads)
            part.rename(folder)
        return folder

    def shallow(self) -> Random:
        """The same model with one of its decoder's layers."""
        return replace(self, spec=replace(self.spec, decoder=replace(self.spec.decoder, layers=1)))


def random_tensors(spec: ModelSpec) -> Random:
    """A model whose tensors are made as they are read."""
    tensors = {name: RandomTensor(shape) for name, shape in spec.tensors().items()}
    return Random(spec, tensors, json.dumps(_tokenizer()).encode())


def open_random(folder: Path) -> Random:
    """A checkpoint that `write_moondream` wrote."""
    checkpoint = open_folder(folder)
    spec = FAMILY.spec(checkpoint)
    return Random(spec, FAMILY.weights(spec).bind(checkpoint.tensors), FAMILY.tokenizer(checkpoint))


def write_moondream(folder: Path, size: Size, seed: int = 0) -> int:
    """Write a checkpoint of moondream2's shape under upstream's names, in bf16; return its number of weights."""
    table = FAMILY.weights(size.spec())
    shapes: dict[str, Shape] = {}
    for name, shape in table.expected.items():
        source = table.source_of(name)
        rows = shapes[source][0] if source in shapes else 0
        shapes[source] = (rows + shape[0], *shape[1:])
    return write_checkpoint(folder, size.config(), shapes, seed)


def write_checkpoint(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, Shape], seed: int) -> int:
    """Write config.json, tokenizer.json and model.safetensors (bf16); return the number of weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer()))
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(seed)
    say(f"writing {folder} ({offset / 1e9:.2f} GB)")
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            for block in _values(rng, name, int(np.prod(shape)), len(shape)):
                file.write((block.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    return offset // 2


def _values(rng: np.random.Generator, name: str, count: int, axes: int) -> Iterator[F32]:
    """Matrices are normal; norms are ones; biases are small."""
    for start in range(0, count, BLOCK):
        n = min(BLOCK, count - start)
        if axes == 1 and name.endswith("weight"):
            yield np.ones(n, np.float32)
        else:
            yield rng.standard_normal(n, np.float32) * np.float32(0.02)


def _tokenizer() -> dict[str, Any]:
    """A byte-level BPE of about 51000 tokens: every pair of bytes until it is full."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    specials = ["<|endoftext|>", *(f"<|md_reserved_{i}|>" for i in range(15))]
    vocab = {token: i for i, token in enumerate([*specials, *letters])}
    merges = []
    for a in letters:
        for b in letters:
            if len(vocab) < 51000:
                vocab[a + b] = len(vocab)
                merges.append(f"{a} {b}")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": token, "special": True, **flags} for i, token in enumerate(specials)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    return {"version": "1.0", "added_tokens": added, "pre_tokenizer": level, "decoder": level, "model": model}


def kv_bytes(decoder: DecoderSpec, kind: str, positions: float) -> float:
    """Bytes of keys and values that a token at `positions` reads."""
    item = {"f32": 4, "f16": 2, "int8": 1}[kind]
    return 2.0 * decoder.layers * decoder.kv_heads * decoder.head_dim * item * positions


def machine() -> dict[str, Any]:
    """What a record must say about where it was measured: processor, versions, commit."""
    facts: dict[str, Any] = {"cpu": platform.processor() or platform.machine(), "python": platform.python_version()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = dict(map(str.strip, line.split(":", 1)) for line in cpuinfo.read_text().split("\n\n")[0].splitlines())
        facts |= {"cpu": lines.get("model name", facts["cpu"]), "flags": lines.get("flags", lines.get("Features", ""))}
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    run = subprocess.run(git, capture_output=True, text=True, check=False)
    return facts | {"commit": run.stdout.strip(), "versions": {name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def memory_mb() -> dict[str, float]:
    """This process's memory in MB (10^6 bytes), from Linux: anonymous, of files, and the peak of both."""
    names = {"RssAnon": "anonymous", "RssFile": "file", "VmHWM": "peak"}
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {names[w[0][:-1]]: int(w[1]) * 1024 / 1e6 for w in lines if w and w[0][:-1] in names}


def say(text: str) -> None:
    """A line for the one who waits."""
    print(text, file=sys.stderr, flush=True)
