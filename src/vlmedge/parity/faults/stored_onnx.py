"""Where ONNX graphs keep the scales, zero points and codes of a matrix: in arrays of their own, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlmedge.parity.faults.places import FLOATS, Array, Part, Place, mapped

if TYPE_CHECKING:
    from vlmedge.exporters.onnx.opened import StoredArray

_TYPES = {"FLOAT": "<f4", "FLOAT16": "<f2", "INT8": "i1", "UINT8": "u1"}


def has(kind: str, part: Part) -> bool:
    """Does a matrix of this kind have such a part?"""
    if part == "bytes":
        return True
    starts = {"scales": ("int", "uint", "w8a8"), "zeros": ("uint4",), "codes": ("int4", "uint4")}
    return kind.upper() not in FLOATS and kind.startswith(starts[part])


def edit(place: Place, change: Callable[[Array], Array]) -> None:
    """Change a part of a matrix where it lies."""
    main = _find(place.folder, f"{place.name}.codes", place.name)
    if place.part in ("bytes", "codes"):
        raw = mapped(main.file, main.offset, main.bytes)
        raw[:] = change(np.array(raw))
        return
    array, (rows, columns) = _find(place.folder, f"{place.name}.{place.part}"), place.shape
    by_rows = main.shape[0] == rows and (len(main.shape) == 3 or rows != columns)
    if place.part == "zeros":
        _edit_nibbles(array, rows, _groups(place), by_rows, change)
        return
    values = _mapped(array)
    oriented = values if by_rows else np.atleast_2d(values).T
    oriented[:] = change(np.array(oriented))


def edit_array(folder: Path, name: str, change: Callable[[Array], Array]) -> None:
    """Change a whole array by its own name."""
    values = _mapped(_find(folder, name))
    values[:] = change(np.array(values))


def _groups(place: Place) -> int:
    """Scales of a row."""
    scales, rows = _find(place.folder, f"{place.name}.scales"), place.shape[0]
    return int(np.prod(scales.shape)) // rows


def _edit_nibbles(array: StoredArray, rows: int, groups: int, by_rows: bool, change: Callable[[Array], Array]) -> None:
    """4-bit numbers, two to a byte: row by row in whole bytes, or one after the other [groups, rows]."""
    raw = mapped(array.file, array.offset, array.bytes)
    flat = np.stack([raw & 15, raw >> 4], axis=-1).reshape(-1)
    if by_rows:
        used = flat.reshape(rows, -1)[:, :groups]
        used[:] = change(used.astype(np.int16))
    else:
        used = flat[: groups * rows].reshape(groups, rows)
        used[:] = change(used.T.astype(np.int16)).T
    raw[:] = flat[0::2] | (flat[1::2] << 4)


def _find(folder: Path, *names: str) -> StoredArray:
    from vlmedge.exporters.onnx.opened import GraphFile

    for path in sorted((folder / "onnx").glob("*.onnx")):
        arrays = GraphFile(path).arrays
        for name in names:
            if name in arrays:
                return arrays[name]
    raise LookupError(f"no graph in {folder} holds {names[0]}")


def _mapped(array: StoredArray) -> Array:
    return mapped(array.file, array.offset, array.bytes).view(_TYPES[array.type]).reshape(array.shape)
