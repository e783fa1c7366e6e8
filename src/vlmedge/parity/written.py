"""A report as a file: a page, Markdown or JSON, by the name's ending."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from vlmedge.parity import markdown, page
from vlmedge.parity.report import Report
from vlmedge.staging import write_text

_WRITERS: dict[str, Callable[[Report], str]] = {
    ".html": page.render,
    ".md": markdown.render,
    ".json": lambda report: json.dumps(report.as_dict(), ensure_ascii=False, allow_nan=False, indent=1) + "\n",
}
ENDINGS = tuple(_WRITERS)


def write_report(report: Report, path: Path) -> None:
    """Write it whole or not at all. Raises OutputError where it cannot be written; `path` ends in one of `ENDINGS`."""
    write_text(path, _WRITERS[path.suffix.lower()](report))
