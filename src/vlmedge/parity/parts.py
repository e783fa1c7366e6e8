"""The parts of an ablation as rows of text, the same in a terminal, on a page and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from vlmedge.parity.report import PartResult, Report

_ALWAYS = ("MB", "saves MB", "KL", "KL p99", "top-1")
_ASKED = ("right", "lost", "won")


def sentence(report: Report) -> str:
    """What the table shows; empty where nothing was ablated."""
    if not report.parts:
        return ""
    return (
        f"One part quantized at a time, all others the original's, beside the original on {report.parts[0].positions} "
        "tokens. all: every part's weights; runtime: the bundle itself, which rounds activations and the KV cache too."
    )


def columns(report: Report) -> tuple[str, ...]:
    """Titles of the numbers behind a part's name."""
    boxes = ("IoU",) if any(part.iou is not None for part in report.parts) else ()
    return _ALWAYS + boxes + (_ASKED if any(part.right is not None for part in report.parts) else ())


def rows(report: Report) -> list[tuple[str, ...]]:
    """A row per part: its name and a cell for each of `columns`."""
    return [(part.part, *(_cell(part, title) for title in columns(report))) for part in report.parts]


def _cell(part: PartResult, title: str) -> str:
    cells: dict[str, tuple[float | None, str]] = {
        "MB": (part.bytes / 1e6, ",.2f"),
        "saves MB": (part.saved / 1e6, ",.2f"),
        "KL": (part.kl_mean, ".1e"),
        "KL p99": (part.kl_p99, ".1e"),
        "top-1": (part.top1, ".1%"),
        "IoU": (part.iou, ".3f"),
        "right": (part.right, ".1%"),
        "lost": (part.lost, "d"),
        "won": (part.won, "d"),
    }
    value, form = cells[title]
    return "" if value is None else f"{value:{form}}"


def costs(report: Report) -> Sequence[tuple[str, float]]:
    """Part -> mean KL, for a plot."""
    return [(part.part, part.kl_mean) for part in report.parts]
