"""A run's records from its file: strictly read, and the lines that are damaged named by their numbers."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from vlmedge.device_bench.result import SCHEMA, Record, schema
from vlmedge.errors import UsageError
from vlmedge.records import decode

RECORDS: Final = "records.jsonl"


def schema_text() -> str:
    """The text of `bench.schema.json`, the JSON schema of a line of a run's file."""
    return json.dumps(schema(), indent=1) + "\n"


def read_records(path: Path) -> list[Record]:
    """The records of a file of JSON lines, or of the `records.jsonl` in a run's folder, in their order.

    A last line without its line break is one that a kill cut short: it is left out. Raises UsageError for a file that
    is not there or holds no records, and for a line that is no record of this version, by its number.
    """
    file = path / RECORDS if path.is_dir() else path
    records = [_record(line, f"{file} line {i}") for i, line in enumerate(_lines(file), 1) if line.strip()]
    if not records:
        raise UsageError(f"{file} holds no records; has the run begun?")
    return records


def _lines(file: Path) -> list[bytes]:
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"there is no run's file {file}; name a records.jsonl or the folder that holds it") from None
    except OSError as error:
        raise UsageError(f"the run's file {file} cannot be read: {error.strerror}") from None
    return data.split(b"\n")[:-1]


def _record(line: bytes, where: str) -> Record:
    try:
        data: Any = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        raise UsageError(
            f"{where} is damaged: it is not JSON; remove the line and run the same command again"
        ) from None
    found = data.get("schema") if isinstance(data, dict) else None
    if found != SCHEMA:
        text = f"the schema {str(found)[:40]!r}" if found is not None else "no schema"
        raise UsageError(f"{where} has {text}, this version reads {SCHEMA}")
    record = decode(Record, data, f"{where}: the record")
    try:
        moment(record)
    except ValueError:
        raise UsageError(
            f"{where} has started at {record.started[:40]!r}, which is no time as ISO 8601 has it"
        ) from None
    return record


def moment(record: Record) -> datetime:
    """When its process began."""
    found = datetime.fromisoformat(record.started)
    return found if found.tzinfo else found.replace(tzinfo=UTC)
