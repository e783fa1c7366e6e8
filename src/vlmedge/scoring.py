"""Scores of one answer: exact match, the VQA soft score, ANLS, overlap of boxes, hits of points."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Protocol

PEOPLE = 10  # who answered each question of VQA v2, TextVQA and VizWiz
BOX_HIT = 0.5  # the least IoU that counts as found, as in PASCAL VOC (Everingham et al. 2010)
ANLS_LEAST = 0.5  # a normalised distance of at least this scores 0 (Biten et al. 2019)
# How near a point must be, as a share of the picture's longer side, where no box says how large the thing is:
# PCK with alpha 0.05 (Yang and Ramanan 2013), the picture in place of the person's box.
POINT_REACH = 0.05

_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = frozenset(("a", "an", "the"))
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll let's ma'am mightn't mightn't've "
    "might've mustn't must've needn't o'clock oughtn't shan't she'd've she's should've shouldn't shouldn't've "
    "somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're "
    "there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's "
    "what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't "
    "would've wouldn't wouldn't've y'all you'd you'd've you'll you're you've"
)
_APOSTROPHES = {word.replace("'", ""): word for word in _CONTRACTIONS.split()}
_PERIOD = re.compile(r"\.(?!\d)")  # not that of a decimal
_COMMA = re.compile(r"(?<=\d),(?=\d)")  # 100,978
_MARKS = re.compile(r"[;/\[\]\"()=+\\_\-><@`,?!*#%&{}|~^$]")  # everything but the apostrophe and the colon


class Edges(Protocol):
    """A box; every edge in 0..1."""

    @property
    def x_min(self) -> float:
        """Left."""
        ...

    @property
    def y_min(self) -> float:
        """Top."""
        ...

    @property
    def x_max(self) -> float:
        """Right."""
        ...

    @property
    def y_max(self) -> float:
        """Bottom."""
        ...


Holds = Callable[[float, float], bool]


def exact(text: str, answers: Sequence[str]) -> bool:
    """Tell whether a text is an accepted answer, but for the case of letters and blanks at the ends."""
    return text.strip().casefold() in {answer.strip().casefold() for answer in answers}


def normalised(text: str) -> str:
    """A text as VQA compares it.

    The rules of https://visualqa.org/evaluation.html: lower case, no full stop outside decimals, number words up to
    ten as digits, no articles, the apostrophe of a contraction put back, other marks but apostrophe and colon
    replaced by a blank (a comma between digits by nothing). The published script (GT-Vision-Lab/VQA, vqaEval.py)
    departs from its page: it removes apostrophes and colons too. The page is followed.
    """
    text = _COMMA.sub("", text.lower().replace("\u2019", "'"))
    words = _MARKS.sub(" ", _PERIOD.sub("", text)).split()
    words = [_DIGITS.get(word, word) for word in words]
    return " ".join(_APOSTROPHES.get(w.replace("'", ""), w) for w in words if w not in _ARTICLES)


def vqa(text: str, answers: Sequence[str]) -> float:
    """The soft score of VQA, 0..1 (Antol et al. 2015): min(matches / 3, 1), after `normalised`.

    With ten answers, each a person's, it is the mean over the ten sets of nine, as the evaluation does it. With fewer
    every answer is accepted: 1 for any match.
    """
    said = normalised(text)
    matches = [normalised(answer) == said for answer in answers]
    if len(answers) != PEOPLE:
        return float(any(matches))
    return sum(min((sum(matches) - own) / 3, 1.0) for own in matches) / PEOPLE


def anls(text: str, answers: Sequence[str]) -> float:
    """The similarity of a read text, 0..1 (Biten et al. 2019, "Scene Text Visual Question Answering").

    1 - NL of the nearest answer, where NL is the Levenshtein distance over the longer length; 0 from NL 0.5 on.
    Case and the number of blanks do not count, as in the evaluation of the challenge (ICDAR 2019 ST-VQA).
    """
    said = " ".join(text.lower().split())
    return max((_likeness(said, " ".join(answer.lower().split())) for answer in answers), default=0.0)


def _likeness(one: str, two: str) -> float:
    longer = max(len(one), len(two))
    away = levenshtein(one, two) / longer if longer else 0.0
    return 1 - away if away < ANLS_LEAST else 0.0


def levenshtein(one: str, two: str) -> int:
    """The fewest insertions, deletions and replacements of characters that make one text of the other."""
    row = list(range(len(two) + 1))
    for i, a in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(two, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def iou(one: Edges, two: Edges) -> float:
    """Intersection over union; 0 for boxes that do not meet."""
    width = min(one.x_max, two.x_max) - max(one.x_min, two.x_min)
    height = min(one.y_max, two.y_max) - max(one.y_min, two.y_min)
    common = max(0.0, width) * max(0.0, height)
    areas = sum((b.x_max - b.x_min) * (b.y_max - b.y_min) for b in (one, two))
    return common / (areas - common) if common else 0.0


def match_boxes(wanted: Sequence[Edges], found: Sequence[Edges]) -> tuple[int, float]:
    """Hits, and the sum of overlaps (IoU) over the wanted boxes, 0 for one that was not found.

    Every wanted box gets one found box at most and the reverse: so that there are as many hits (at least 0.5) as can
    be, and among those ways so that the sum is the largest. The order of the boxes does not matter.
    """
    shares = [[iou(target, box) for box in found] for target in wanted]
    hit = min(len(wanted), len(found)) + 1.0  # more than all overlaps together
    pairs = assign([[share + hit * (share >= BOX_HIT) for share in row] for row in shares])
    taken = [shares[i][j] for i, j in pairs]
    return sum(share >= BOX_HIT for share in taken), math.fsum(taken)


def match_points(wanted: Sequence[Holds], found: Sequence[tuple[float, float]]) -> int:
    """How many of the wanted things hold a found point, in whatever unit the things take.

    A point counts for one thing at most, so that the number is the largest. The order does not matter.
    """
    held = [[float(holds(*at)) for at in found] for holds in wanted]
    return round(sum(held[i][j] for i, j in assign(held)))


def assign(worth: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """The pairs (row, column) of the largest total worth, each row and column used at most once.

    `worth`: finite numbers of 0 or more, [rows, columns]. There are as many pairs as the shorter side is long. This is
    the Hungarian method (Kuhn 1955), row by row along shortest augmenting paths (Jonker and Volgenant 1987): O(n^3).
    """
    rows, columns = len(worth), len(worth[0]) if worth else 0
    if rows > columns:
        return [(i, j) for j, i in assign(list(zip(*worth, strict=True)))]
    owner: dict[int, int] = {}
    prices = [0.0] * rows, [0.0] * columns
    for row in range(rows):
        _give(row, worth, owner, *prices)
    return [(i, j) for j, i in owner.items()]


def _give(
    row: int, worth: Sequence[Sequence[float]], owner: dict[int, int], rows: list[float], columns: list[float]
) -> None:
    """Give `row` a column, for which other rows may move on to their next best.

    `rows` and `columns` are prices: a pair's sum is at least its worth, and just that for the pairs of `owner`.
    """
    gaps, before = dict.fromkeys(range(len(columns)), math.inf), dict[int, int | None]()
    path: list[int] = []
    asking, here = row, None
    while True:
        for j in gaps:
            gap = rows[asking] + columns[j] - worth[asking][j]
            if gap < gaps[j]:
                gaps[j], before[j] = gap, here
        here = min(gaps, key=gaps.__getitem__)
        step = gaps.pop(here)
        rows[row] -= step
        for j in path:
            rows[owner[j]] -= step
            columns[j] += step
        gaps = {j: gap - step for j, gap in gaps.items()}
        if here not in owner:
            break
        path.append(here)
        asking = owner[here]
    while here is not None:
        back = before[here]
        owner[here] = row if back is None else owner[back]
        here = back


def near(x: float, y: float, width: float, height: float) -> Holds:
    """Tell whether a point is near (x, y), all in 0..1: within `POINT_REACH` of the longer side of the picture."""
    reach = POINT_REACH * max(width, height)
    return lambda a, b: math.hypot((a - x) * width, (b - y) * height) <= reach
