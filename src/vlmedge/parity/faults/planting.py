"""Planting one fault into one export, and what the gate says of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from vlmedge.bundle import Bundle, Manifest, file_entry, open_bundle, write_manifest
from vlmedge.errors import BundleError, UnsupportedError, VlmedgeError
from vlmedge.exporters import EXPORTERS, ExportJob
from vlmedge.exporters import Written as WrittenFile
from vlmedge.loading import Described, open_model
from vlmedge.parity import run
from vlmedge.parity.examine import Ran, examine
from vlmedge.parity.faults.fault import Fault, Given, Running, Shared, Target, Written
from vlmedge.parity.report import Report
from vlmedge.session import Session
from vlmedge.skills import Model
from vlmedge.spec import ModelSpec

REFUSED = "refused"  # the reader or the runtime raises an error, so that there is nothing to compare


@dataclass(frozen=True, slots=True)
class Setting:
    """A right export, the job that its exporter was given, and the checkpoint that it was made of."""

    bundle: Bundle
    job: ExportJob
    original: Described

    @property
    def target(self) -> Target:
        """The facts that decide which faults it can have."""
        manifest, order = self.bundle.manifest, self.job.order
        encodings = EXPORTERS[manifest.format].encodings(order)
        types = {name: encoding.type for name, encoding in encodings.items()}
        return Target(order.spec, manifest.format, order.flavour, manifest.profile.name, order.kv_cache, types)


@dataclass(frozen=True, slots=True)
class Finding:
    """What the gate says: the first stage that fails ("" where none does), all that do, and why in one line.

    `report` and `ran` are None as far as an error came before them.
    """

    stage: str
    failing: tuple[str, ...]
    why: str
    report: Report | None = None
    ran: Ran | None = None


def settled(format: str, original: Described, export: Callable[[], Bundle]) -> Setting:
    """Call `export`, which exports `original` to a format, and keep what its exporter was given."""
    kind, jobs = type(EXPORTERS[format]), list[ExportJob]()
    write = kind.write

    def watched(self: Any, job: ExportJob) -> tuple[WrittenFile, ...]:
        jobs.append(job)
        return write(self, job)

    with patch.object(kind, "write", watched):
        bundle = export()
    return Setting(bundle, jobs[-1], original)


def attempt(fault: Fault, setting: Setting, folder: Path, threads: int | None = None) -> Finding | None:
    """What the gate says of a fault in this export; None where it cannot have it.

    That is so where declared facts say it, where the exporter refuses to write it, and where no byte of the files
    comes of it. `folder`: for the faulty bundle, emptied first.
    """
    if not fault.applies(setting.target):
        return None
    shutil.rmtree(folder, ignore_errors=True)
    match fault.plant:
        case Given(change):
            return _given(change(setting.job), setting, folder, threads)
        case Written():
            shutil.copytree(setting.bundle.path, folder)
            return examined(_tampered(fault.plant, Bundle(folder, setting.bundle.manifest)), setting.original, threads)
        case Running() | Shared():
            with _planted(fault.plant, setting.job.order.spec):
                return examined(setting.bundle, setting.original, threads)


def examined(bundle: Bundle, original: Described, threads: int | None = None) -> Finding:
    """What `verify` would say of a bundle, errors included."""
    try:
        bundle.check()
    except BundleError as error:
        return Finding("files", ("files",), str(error))
    ran = None
    try:
        ran = run.run_tests(bundle, threads=threads)
        report = examine(bundle, ran, original, threads=threads)
    except (VlmedgeError, LookupError, ValueError) as error:  # shapes that do not fit
        return Finding(REFUSED, (REFUSED,), str(error), None, ran)
    failed = [s for s in report.stages if s.outcome == "failed"]
    names = tuple(dict.fromkeys(s.stage for s in failed))
    return Finding(names[0] if names else "", names, failed[0].why if failed else "", report, ran)


def _given(job: ExportJob, setting: Setting, folder: Path, threads: int | None) -> Finding | None:
    """Write the job's files over a copy of the right ones; the manifest is the right one but for its hashes."""
    shutil.copytree(setting.bundle.path, folder)
    manifest = setting.bundle.manifest
    out = folder / "written"
    out.mkdir()
    try:
        written = EXPORTERS[manifest.format].write(replace(job, out=out))
    except UnsupportedError:
        return None
    for file in written:
        (out / file.path).replace(folder / file.path)
    shutil.rmtree(out)
    bundle = _rehashed(folder, manifest)
    if bundle.manifest.files == manifest.files:
        return None
    return examined(bundle, setting.original, threads)


def _tampered(plant: Written, bundle: Bundle) -> Bundle:
    changed = plant.change(bundle)
    if plant.rehash:
        return _rehashed(changed.path, changed.manifest)
    write_manifest(changed.path, changed.manifest)
    return open_bundle(changed.path)


def _rehashed(folder: Path, manifest: Manifest) -> Bundle:
    entries = tuple(file_entry(folder, entry.path, entry.role) for entry in manifest.files)
    write_manifest(folder, replace(manifest, files=entries))
    return open_bundle(folder)


@contextmanager
def _wrapped(wrap: Callable[[Session, Bundle], Session]) -> Iterator[None]:
    """Every session that verification opens is a wrapped one."""

    def open_faulty(bundle: Bundle, *given: Any, **named: Any) -> Model:
        model = open_model(bundle, *given, **named)
        return Model(model.spec, wrap(model.session, bundle), model.tokenizer)

    with patch.object(run, "open_model", open_faulty):
        yield


def _planted(plant: Running | Shared, spec: ModelSpec) -> AbstractContextManager[object]:
    return _wrapped(plant.wrap) if isinstance(plant, Running) else plant.patch(spec)
