"""Memory collapsed into huge pages holds what it held; only what a block filled is touched."""

import mmap
from pathlib import Path

import numpy as np

from vlmedge.runtimes import huge_pages
from vlmedge.runtimes.huge_pages import Weights

MB = 1 << 20
SMAPS = Path("/proc/self/smaps")


def anonymous(size):
    return np.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)


def test_values_stay_and_untouched_memory_is_not_taken(monkeypatch):
    asked = []
    weights = Weights()
    old = anonymous(16 * MB)
    old[:] = 1
    with weights.watched():
        filled, sparse = anonymous(32 * MB), anonymous(32 * MB)
        filled[:] = np.arange(filled.size, dtype=np.uint8)
        sparse[:: 8 * MB] = 7
    collapse = huge_pages._collapse
    monkeypatch.setattr(huge_pages, "_collapse", lambda span: (asked.append(span), collapse(span)))
    weights.collapse().join()
    assert sum(end - start for start, end in asked) >= 64 * MB or not SMAPS.exists()
    assert not any(start <= old.ctypes.data < end for start, end in asked)
    assert np.array_equal(filled, np.arange(filled.size, dtype=np.uint8))
    assert resident(sparse) < MB
    weights.collapse().join()
    assert resident(sparse) < MB


def resident(array):
    """Bytes of an array that are in memory, by the lines of its mapping."""
    size = 0
    inside = False
    for line in SMAPS.read_text().splitlines() if SMAPS.exists() else []:
        place, _, rest = line.partition(" ")
        if "-" in place and not place.endswith(":"):
            start, end = (int(part, 16) for part in place.split("-"))
            inside = start <= array.ctypes.data < end
            size = end - start if inside else size
        elif inside and place == "Rss:" and size < 2 * array.nbytes:
            return int(rest.split()[0]) * 1024
    return 0


def test_parts_of_a_joined_mapping():
    assert list(huge_pages._without((0, 100), [])) == [(0, 100)]
    assert list(huge_pages._without((0, 100), [(0, 30), (50, 60)])) == [(30, 50), (60, 100)]
    assert list(huge_pages._without((10, 20), [(0, 100)])) == []
    assert list(huge_pages._without((10, 20), [(0, 10), (20, 30)])) == [(10, 20)]
