"""Steadier gaze: many eyes drawn from a face box, on the picture and its mirror image, outliers left out.

The procedure of vikhyat/moondream `moondream.py::detect_gaze` with `prioritize_accuracy`; ours takes a seed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vlmedge.answer import Answer, Point
from vlmedge.session import U8

DRAWS = 10
_NEAREST = 2  # each point's own zero distance is one of them, as upstream counts
_FAR = 2.0  # times the median


def steady_gaze(
    ask: Callable[[U8, tuple[float, float]], Answer],
    picture: U8,
    face: tuple[float, float, float, float],
    seed: int | None,
) -> tuple[Answer, tuple[Point, ...]]:
    """Ask for `DRAWS` eyes in the face box (x_min, y_min, x_max, y_max) on either side; average what agrees.

    Returns the last answer and one point, or none where fewer than `DRAWS` of the questions found a target.
    """
    random = np.random.default_rng(seed)
    eyes = random.uniform(face[:2], face[2:], (2, DRAWS, 2))
    mirror = np.ascontiguousarray(picture[:, ::-1])
    found: list[tuple[float, float]] = []
    for mirrored, drawn in enumerate(eyes):
        for x, y in drawn:
            answer = ask(mirror if mirrored else picture, (1 - x if mirrored else x, y))
            found += [(1 - p.x if mirrored else p.x, p.y) for p in answer.points]
    if len(found) < DRAWS:
        return answer, ()
    x, y = np.mean(without_outliers(found), axis=0)
    return answer, (Point(float(x), float(y)),)


def without_outliers(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Drop points whose mean distance to their nearest is more than twice the median of it."""
    places = np.array(points)
    distances = np.linalg.norm(places[:, None] - places[None], axis=-1)
    nearest = min(_NEAREST, len(points) - 1)
    spread = np.sort(distances, axis=1)[:, :nearest].mean(axis=1)
    return [point for point, far in zip(points, spread, strict=True) if far <= _FAR * np.median(spread)]
