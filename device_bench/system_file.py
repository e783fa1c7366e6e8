"""A small file of the system, such as those of /proc and /sys: its text, or nothing where it cannot be read."""

from __future__ import annotations

from pathlib import Path


def text(path: Path) -> str:
    """What it says, without blanks at the ends; "" where it is not there or may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def number(path: Path) -> int | None:
    """The whole number that it says; None where it says none."""
    found = text(path)
    return int(found) if found.lstrip("-").isdigit() else None
