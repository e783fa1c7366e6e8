"""What a bundle takes of a process's memory, stage by stage and part by part, computed from its manifest.

The terms are physical: bytes of weights in the layout in which a runtime holds them, the KV cache, the rows and scores
that are alive at once, and what interpreter and libraries take before any model (`BASELINES`). None is fitted to a
model's size. `benchmarks/fit_peaks.py` holds the sums against measured peaks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vlmedge.bundle import Manifest
from vlmedge.errors import UnsupportedError
from vlmedge.registry import Registry
from vlmedge.runtimes import RUNTIMES, Memory

# The names of parts, in the order of the table.
PYTHON = "Python and its packages"
LIBRARY = "the runtime's library"
VOCABULARY = "tokenizer and vocabulary"
WEIGHTS = "weights"
COPIES = "second copies of weights"
KV = "KV cache"
PICTURE = "picture, crops, features"
VISION = "activations, vision"
PREFILL = "activations, prefill"
PARTS: Final = (PYTHON, LIBRARY, VOCABULARY, WEIGHTS, COPIES, KV, PICTURE, VISION, PREFILL)

_PIXEL_DECODING = 13  # bytes: Pillow's picture and its RGB copy (4 each), their bytes and the array (3 each), less one
_PIXEL_HELD = 4.2  # the array (3), and what the allocator keeps of the rest
_WORDS = 32  # positions of a template and a short question


@dataclass(frozen=True, slots=True)
class Part:
    """So many bytes for one thing. `mapped`: pages of files, which the system can drop and read again."""

    name: str
    bytes: float
    mapped: bool = False


@dataclass(frozen=True, slots=True)
class Stage:
    """What is alive at once: "open", "picture", "vision", "project", "prefill" or "words"."""

    name: str
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> float:
        """All parts together: the resident set."""
        return sum(part.bytes for part in self.parts)

    @property
    def held(self) -> float:
        """Bytes that the system cannot drop: without pages of files."""
        return sum(part.bytes for part in self.parts if not part.mapped)

    def of(self, name: str) -> float:
        """Bytes of the parts of one name."""
        return sum(part.bytes for part in self.parts if part.name == name)


@dataclass(frozen=True, slots=True)
class Footprint:
    """The stages of opening a bundle and answering a question about a picture, in order."""

    runtime: str
    stages: tuple[Stage, ...]

    @property
    def peak(self) -> Stage:
        """The stage that takes most."""
        return max(self.stages, key=lambda stage: stage.bytes)


@dataclass(frozen=True, slots=True)
class Use:
    """How a bundle is used.

    `context`: positions that memory is reserved for; `positions`: those that are in use at the end, None for all.
    `crops`: that the tower encodes. `megapixels`: of the picture, 10^6. `prepared`: files that a runtime prepares for
    this machine when it opens a bundle for the first time (ONNX Runtime with memory "lean") are there already.
    `local`: on this machine's processor, whose abilities decide how weights are laid out; else a processor with none.
    """

    context: int
    crops: int
    positions: int | None = None
    megapixels: float = 12.0
    memory: Memory = "fast"
    prepared: bool = False
    local: bool = True

    @property
    def used(self) -> int:
        """Positions in use at the end."""
        return self.context if self.positions is None else min(self.positions, self.context)


@dataclass(frozen=True, slots=True)
class Baseline:
    """What a process takes beside any model, in bytes.

    `python`: the interpreter with the packages of `vlmedge.load` and a picture (numpy, Pillow, tokenizers, vlmedge).
    `library`: the runtime's, with the code and tables that one answer touches. `*_mapped`: of that, pages of program
    files. `source`: where it was measured.
    """

    python: float
    python_mapped: float
    library: float
    library_mapped: float
    source: str

    def parts(self) -> tuple[Part, ...]:
        """As parts."""
        return (
            Part(PYTHON, self.python),
            Part(PYTHON, self.python_mapped, mapped=True),
            Part(LIBRARY, self.library),
            Part(LIBRARY, self.library_mapped, mapped=True),
        )


_MEASURED = "Linux 6.18, x86-64, CPython 3.11, numpy 2.4, Pillow 13.0, tokenizers 0.23"
BASELINES: Final[dict[str, Baseline]] = {
    "llamacpp": Baseline(26e6, 24e6, 16e6, 11e6, f"{_MEASURED}, llama-cpp-python 0.3.36"),
    "onnxruntime": Baseline(26e6, 24e6, 13e6, 24e6, f"{_MEASURED}, onnxruntime 1.32.0"),
}
MODELS: Registry[Callable[[Manifest, Use], tuple[Stage, ...]]] = Registry(
    "runtime with a known footprint",
    {
        "llamacpp": "vlmedge.device_bench.footprint_llamacpp:stages",
        "onnxruntime": "vlmedge.device_bench.footprint_onnxruntime:stages",
    },
)


def runtime_of(manifest: Manifest) -> str:
    """The runtime whose footprint is computed for a bundle; raises UnsupportedError where there is none."""
    for name in MODELS:
        if RUNTIMES[name].loads == manifest.format:
            return name
    raise UnsupportedError(f"the footprint of {manifest.format} bundles is not known; measure it: vlmedge bench")


def footprint(manifest: Manifest, use: Use) -> Footprint:
    """Compute what a fresh process takes that opens the bundle and answers about one picture."""
    name = runtime_of(manifest)
    return Footprint(name, MODELS[name](manifest, use))


def role_bytes(manifest: Manifest, *starts: str) -> int:
    """Bytes of the files whose path begins with one of `starts`."""
    return sum(entry.bytes for entry in manifest.files if entry.path.startswith(starts))


def vocabulary_parts(manifest: Manifest, copies: int) -> Part:
    """Hash tables of a vocabulary: the tokenizer's, and the runtime's own where it has one.

    430 bytes per token: 22 MB for the 51,000 of moondream2's tokenizer (a token's text twice, an entry in each of
    three tables, its merge).
    """
    return Part(VOCABULARY, 430.0 * manifest.tokenizer.ids * copies)


def picture_parts(manifest: Manifest, use: Use, stage: str) -> Part:
    """A picture while it is decoded, and what is kept of it until its embeddings are there.

    Pixels uint8 [h, w, 3]; crops uint8 [n, size, size, 3], and one of them as float32 twice (normalising); features
    float32 [n, tokens, width], for all crops at once, though a CPU encodes one after the other.
    """
    model, pixels = manifest.model, use.megapixels * 1e6
    one = 3 * model.image.size**2
    features = max(use.crops, 2) * model.vision.tokens * model.vision.width * 4
    sizes = {
        "picture": _PIXEL_DECODING * pixels,
        "vision": _PIXEL_HELD * pixels + use.crops * one + 8 * one + features,
        "project": _PIXEL_HELD * pixels + use.crops * one + 2 * features,  # stitched to one grid beside
    }
    return Part(PICTURE, sizes[stage])


def prefill_positions(manifest: Manifest) -> int:
    """Positions of a beginning, a picture and a short question."""
    return 1 + manifest.model.image_tokens + _WORDS


def largest_matrix(manifest: Manifest) -> int:
    """Weights of the decoder's head, mostly the largest matrix by far."""
    decoder = manifest.model.decoder
    return decoder.width * max(decoder.vocab, decoder.mlp_width)
