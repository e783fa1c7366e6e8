"""A run on disk: every record is a line of `records.jsonl` at once, and a killed run goes on from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from vlmedge.device_bench.job import Job
from vlmedge.device_bench.report.load import RECORDS, read_records
from vlmedge.device_bench.result import Record
from vlmedge.errors import OutputError
from vlmedge.jsonlines import JsonLines, appending
from vlmedge.records import encode

_KEPT = "records"  # in messages: what the lines are


class Journal:
    """The records of one run, open for more; several threads may add."""

    def __init__(self, run: str, lines: JsonLines, records: list[Record]) -> None:
        self.run = run
        self._lines = lines
        self._records = records
        self._lock = Lock()
        self._open = True

    @property
    def records(self) -> tuple[Record, ...]:
        """All of them, in their order."""
        return tuple(self._records)

    def of(self, job: Job) -> list[Record]:
        """The records of a job, the first try first."""
        wanted = job.id
        return [record for record in self.records if record.job == wanted]

    def add(self, record: Record) -> None:
        """Write a record; it is on the disk when this returns. Raises OutputError where it cannot be written.

        After `close` nothing is written: a thread may end its job after the run was stopped.
        """
        with self._lock:
            if not self._open:
                return
            self._lines.append(encode(record))
            self._lines.flush()
            self._records.append(record)

    def close(self) -> None:
        """Take no more."""
        with self._lock:
            self._open = False


@contextmanager
def opened(folder: Path, run: str) -> Iterator[Journal]:
    """Open the records of a run to go on with it, or begin it. A last line that a kill cut short is removed.

    Raises OutputError where another process has it open (not noticed on Windows), where the folder holds another run
    or it cannot be written, UsageError where a line is damaged.
    """
    path = folder / RECORDS
    with appending(path, "benchmark", _KEPT) as lines:
        records = read_records(path) if lines.found else []
        if any(record.run != run for record in records):
            raise OutputError(
                f"{path} holds another run (other models, devices, questions or settings); choose another --out"
            )
        journal = Journal(run, lines, records)
        try:
            yield journal
        finally:
            journal.close()
