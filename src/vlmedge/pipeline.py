"""export(): checkpoint in, verified bundle out. plan(): what export would write, without reading weights."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlmedge.bundle import Bundle, Manifest, file_entry, open_bundle, write_manifest
from vlmedge.errors import CheckpointError, VerificationError
from vlmedge.exporters import Encoding, ExportJob, Order, Written
from vlmedge.exporters.choice import Choice, choose
from vlmedge.loading import Described, SourceLike, describe, missing_for, source_label
from vlmedge.manifest import describe_bundle
from vlmedge.parity.examine import examine
from vlmedge.parity.report import Report
from vlmedge.parity.run import run_tests
from vlmedge.parity.vectors import record
from vlmedge.progress import Progress
from vlmedge.prompt import Tokenizer
from vlmedge.quant_profiles import QuantProfile, hints
from vlmedge.sources import DEMO, DEMO_LICENCE
from vlmedge.spec import Shape
from vlmedge.staging import staged

SELFTEST = "selftest.json"
TOKENIZER = "tokenizer.json"
_OVERHEAD = 1.02  # headers, tokenizer and self-test beside the weights


@dataclass(frozen=True, slots=True)
class Plan:
    """What an export would write: every canonical tensor with its shape and encoding."""

    source: str
    format: str
    flavour: str
    profile: str
    shapes: Mapping[str, Shape]
    encodings: Mapping[str, Encoding]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(e.bytes for e in self.encodings.values())


def plan(
    source: SourceLike,
    format: str,
    profile: str | None = None,
    *,
    flavour: str | None = None,
    max_part: int | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Compute what `export` would write, for the same arguments. Reads configs and headers, no weights."""
    choice = choose(format, profile, flavour)
    found = describe(source, allow_pickle=allow_pickle, progress=progress)
    encodings = choice.exporter.encodings(choice.order(found.spec, max_part))
    _tell_hints(choice.profile, found, progress or Progress())
    return Plan(os.fspath(source), format, choice.flavour, choice.profile.name, found.spec.tensors(), encodings)


def export(
    source: SourceLike,
    format: str,
    profile: str | None = None,
    out: SourceLike | None = None,
    *,
    flavour: str | None = None,
    verify: bool = True,
    threads: int | None = None,
    max_part: int | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Convert a checkpoint into a bundle and return it.

    `source`: a known model, a hub id with optional @revision, a folder, or `demo:NAME`. `profile`: a shipped
    name or the path of a .toml, by default the format's. `flavour`: where the format can write its files in several
    ways, one of them. `out`: the bundle's folder, by default `NAME-PROFILE.FORMAT` here (another flavour than the
    first is named too); it must not exist, and appears only when everything, verification included, is done.
    `max_part`: bytes that a file stays under where the format can cut it, by default 1.4 GB.
    Raises a `VlmedgeError`; VerificationError names the first stage that does not agree with the original.
    """
    progress = progress or Progress()
    choice = choose(format, profile, flavour)
    progress.stage("reading the checkpoint's headers")
    found = describe(source, allow_pickle=allow_pickle, progress=progress)
    order = choice.order(found.spec, max_part)
    encodings = choice.exporter.encodings(order)
    _tell_hints(choice.profile, found, progress)
    target = Path(out) if out is not None else Path(_folder_name(found, choice))
    with staged(target, int(sum(e.bytes for e in encodings.values()) * _OVERHEAD)) as folder:
        job = ExportJob(
            order=order,
            tensors=found.tensors,
            tokenizer=found.tokenizer,
            name=short_name(found),
            out=folder,
            threads=threads or os.cpu_count() or 1,
            progress=lambda _, count: progress.advance(count),
            about=_about(found),
        )
        with _hashing(found.checkpoint.files) as hashes:  # beside the work: hashing waits for the disk
            progress.stage("writing weights", sum(t.size for t in found.tensors.values()))
            written = choice.exporter.write(job)
            (folder / TOKENIZER).write_bytes(found.tokenizer)
            manifest = _manifest(found, choice, order, encodings, written, folder, hashes)
        manifest = _verified(Bundle(folder, manifest), found, verify, threads, progress)
        write_manifest(folder, manifest)
    return open_bundle(target)


def short_name(found: Described) -> str:
    """What the model is called in file names: the known name, the repository's or folder's last part."""
    label = source_label(found.checkpoint)
    if found.checkpoint.source.repo:
        label = label.partition("@")[0].rpartition("/")[2]
    return label.removeprefix(DEMO) or found.family.name


def _folder_name(found: Described, choice: Choice) -> str:
    flavour = "" if choice.flavour == choice.exporter.flavours[0] else f"-{choice.flavour}"
    return f"{short_name(found)}-{choice.profile.name}{flavour}.{choice.exporter.format}"


def _tell_hints(rules: QuantProfile, found: Described, progress: Progress) -> None:
    for hint in hints(rules, found.spec):
        progress.note(hint)


def _about(found: Described) -> dict[str, str]:
    source = found.checkpoint.source
    own = DEMO_LICENCE if source.label.startswith(DEMO) else ""
    licence = next((m.licence for m in found.family.models if m.repo == source.repo), own)
    facts = {"repo": source.repo, "revision": source.revision, "commit": source.commit, "licence": licence}
    return {key: value for key, value in facts.items() if value}


def _manifest(
    found: Described,
    choice: Choice,
    order: Order,
    encodings: Mapping[str, Encoding],
    written: tuple[Written, ...],
    folder: Path,
    hashes: Future[dict[str, str]],
) -> Manifest:
    roles = {entry.path: entry.role for entry in written} | {TOKENIZER: "tokenizer"}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        files = tuple(pool.map(lambda path: file_entry(folder, path, roles[path]), sorted(roles)))
    notes, licence = choice.exporter.notes(order, found.tokenizer), _about(found).get("licence", "")
    profile, format = choice.profile, choice.exporter.format
    return describe_bundle(found, profile, format, order, encodings, files, licence, notes, hashes.result(), TOKENIZER)


def _verified(bundle: Bundle, found: Described, verify: bool, threads: int | None, progress: Progress) -> Manifest:
    """Open what was written, record its self-test vectors, compare it with the original.

    The manifest is written by the caller, last of all: a folder that has one is whole.
    """
    manifest, folder, tokenizer = bundle.manifest, bundle.path, Tokenizer(found.tokenizer)
    missing, ran = missing_for(manifest.format), None
    if missing is None:
        progress.stage("recording self-test vectors")
        ran = run_tests(bundle, threads=threads)
        broken = ran.trace.broken()
        if broken is not None:
            raise VerificationError(
                f"the export gives numbers that are not finite at the stage '{broken}'; nothing was written; "
                "its profile is too coarse for this model, or the checkpoint is damaged"
            )
    vectors = record(manifest, tokenizer, ran)
    text = json.dumps(vectors, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"
    (folder / SELFTEST).write_text(text, encoding="utf-8")
    files = (*manifest.files, file_entry(folder, SELFTEST, "selftest"))
    if not verify:
        outcome = _unverified("verification was turned off (--no-verify)")
    elif ran is None:
        outcome = _unverified(f"the bundle cannot be run here: {missing}")
    else:
        outcome = _passed(examine(bundle, ran, found, threads=threads, progress=progress))
    if verify and not outcome["verified"]:
        progress.note(f"not verified: {outcome['reason']}")
    return replace(manifest, files=files, verification=outcome)


def _unverified(reason: str) -> dict[str, Any]:
    return {"verified": False, "reason": reason}


def _passed(report: Report) -> dict[str, Any]:
    """What the manifest says of the comparison. Raises VerificationError that names the first stage that failed."""
    if report.failing is not None:
        stage = report.stages[report.failing]
        raise VerificationError(
            f"the export does not agree with the original at the stage '{stage.stage}': {stage.why}; "
            f"usually: {report.cause}; nothing was written (--no-verify skips the comparison)"
        )
    outcome = report.summary()
    return outcome if outcome["verified"] else outcome | {"reason": "; ".join(report.notes)}


@contextmanager
def _hashing(paths: tuple[Path, ...]) -> Iterator[Future[dict[str, str]]]:
    """Hash files in a thread for the length of the block; a block that fails (Ctrl-C) does not wait for it."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(_hash_all, paths, stop)
        except BaseException:
            stop.set()
            raise


def _hash_all(paths: tuple[Path, ...], stop: threading.Event) -> dict[str, str]:
    out = {}
    for path in paths:
        digest = hashlib.sha256()
        try:
            with path.open("rb") as file:
                while not stop.is_set() and (block := file.read(8 << 20)):
                    digest.update(block)
        except OSError as error:  # of the source; the output's are told as such
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
        out[path.name] = digest.hexdigest()
    return out
