"""The content of a bundle's `selftest.json`: what a device must reproduce, and how near it must come."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final, Literal

from vlmedge.answer import Box, Point
from vlmedge.bundle import Bundle
from vlmedge.errors import BundleError
from vlmedge.parity.pictures import sizes
from vlmedge.records import decode

SCHEMA: Final = "vlmedge.selftest/2"
ROLE = "selftest"  # of the file, in the manifest


@dataclass(frozen=True, slots=True)
class Sample:
    """Of an array of `shape`: its RMS, and the elements `at` of it when flattened. Six significant digits."""

    shape: tuple[int, ...]
    rms: float
    at: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PictureVector:
    """A picture made by the formula, its tiling, the SHA-256 of each crop's bytes and of the normalised tensor's."""

    height: int
    width: int
    rgb_sha256: str
    tiling: tuple[int, int]
    crops_sha256: tuple[str, ...]
    tensor_shape: tuple[int, ...]
    tensor_sha256: str


@dataclass(frozen=True, slots=True)
class TextVector:
    """A text and its token ids."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CallVector:
    """One call: its input, in words or numbers, and what came back."""

    input: str | tuple[float, ...]
    output: Sample


@dataclass(frozen=True, slots=True)
class ReadingVector:
    """One prompt and the greedy answer to it.

    `logits`: those of the prompt's last position; the first eight of `at` are the best ids, best first. `tokens`: the
    answer; `values`: the logit of each when it was chosen; `margins`: by how much it beat the second, in units of the
    RMS of its position's logits.
    """

    input: str
    projected: Sample
    logits: Sample
    tokens: tuple[int, ...]
    values: tuple[float, ...]
    margins: tuple[float, ...]
    text: str


@dataclass(frozen=True, slots=True)
class FoundVector:
    """Boxes and points read from picture 0, whether or not the model would have ended the list before.

    `prompt_ids`: by skill, what stands behind the picture. `bins`: the choices of the decoders in order: x, y, width
    and height of each box, then x and y of each point; `values`, `margins`: as those of tokens, of their outputs.
    """

    prompt_ids: dict[str, tuple[int, ...]]
    boxes: tuple[Box, ...]
    points: tuple[Point, ...]
    bins: tuple[int, ...]
    values: tuple[float, ...]
    margins: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ModelVectors:
    """What needs the model. `regions` and `found` are empty where it has no region heads."""

    prompt_ids: tuple[int, ...]
    features: CallVector
    local_features: CallVector
    small: ReadingVector
    stitched: ReadingVector
    regions: dict[str, CallVector]
    found: FoundVector | None


@dataclass(frozen=True, slots=True)
class Vectors:
    """The content of `selftest.json`.

    `pixels`, `tensor`: formulas in words. `limits`: by stage, the largest relative RMS at the samples that another
    machine may show (None: measured, not judged). `noise`: a choice whose margin is at most `noise` times the limit of
    the logits is a near tie, and may fall otherwise. `text`: what texts become; `decoded`: what ids become.
    `recorded_with`: the runtime; None, as `model`, where none was.
    """

    schema: Literal["vlmedge.selftest/2"]
    pixels: str
    tensor: str
    limits: dict[str, float | None]
    noise: float
    pictures: tuple[PictureVector, ...]
    text: tuple[TextVector, ...]
    decoded: tuple[TextVector, ...]
    recorded_with: str | None
    model: ModelVectors | None


def read_vectors(bundle: Bundle) -> Vectors:
    """Those of a bundle; raises BundleError, one line, where it has none or they are of another schema or damaged.

    The pictures must have the sizes that the model's have: they are painted before anything of them is compared.
    """
    name = next((entry.path for entry in bundle.manifest.files if entry.role == ROLE), None)
    if name is None:
        raise BundleError(f"{bundle.path} has no self-test vectors; export it again")
    path = bundle.path / name
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is damaged: {error}") from None
    found = data.get("schema") if isinstance(data, dict) else None
    if found != SCHEMA:
        raise BundleError(f"{path} has the schema {str(found)[:40]!r}, this version reads {SCHEMA!r}; export it again")
    vectors = decode(Vectors, data, name, BundleError)
    listed, wanted = [(v.height, v.width) for v in vectors.pictures], list(sizes(bundle.manifest.model.image))
    if listed != wanted:
        raise BundleError(f"{path} has pictures of {listed!s:.80}, this model's are {wanted}; export it again")
    return vectors
