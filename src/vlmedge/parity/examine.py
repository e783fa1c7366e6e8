"""The gate: everything that can be held against an export, put together into one report."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vlmedge import __version__
from vlmedge.bundle import Bundle
from vlmedge.exporters import EXPORTERS, Readback
from vlmedge.limits import Against
from vlmedge.loading import Described, missing_for, source_label
from vlmedge.measure import peak_rss_mb
from vlmedge.parity.causes import usual_cause
from vlmedge.parity.checks import check_crops, check_facts, check_prompts
from vlmedge.parity.compare import Comparison, compare
from vlmedge.parity.gates import limits_for, own_limits
from vlmedge.parity.judge import judge
from vlmedge.parity.report import SCHEMA, STAGES, Report, StageResult, TokenResult
from vlmedge.parity.trace import Trace
from vlmedge.parity.weights import compare_weights
from vlmedge.progress import Progress
from vlmedge.prompt import Tokenizer

_AGAINST: tuple[Against, ...] = ("stored", "original")
NO_CHECKPOINT = "the checkpoint is not at hand"


@dataclass(frozen=True, slots=True)
class Ran:
    """What the bundle's own runtime made of the test inputs, and what it says of itself."""

    trace: Trace
    runtime: str
    info: Mapping[str, Any]


def examine(
    bundle: Bundle,
    ran: Ran,
    original: Described | None,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Hold an export, whose files' hashes are right, against its checkpoint and the reference.

    Without the checkpoint it is held against the reference on its own weights alone; without PyTorch nothing is
    computed anew, and facts, prompts, crops and weights are compared. The report says what was skipped.
    """
    start, progress = time.perf_counter(), progress or Progress()
    manifest = bundle.manifest
    stored = EXPORTERS[manifest.format].read(manifest.model, bundle.path)
    stages = [StageResult("files", None, "passed", numbers={"files": len(manifest.files)})]
    stages += _checks(bundle, ran, original, stored, threads, progress)
    tokens: tuple[TokenResult, ...] = ()
    notes = [] if own_limits(manifest) else ["judged by the installed profile's limits, which are not the manifest's"]
    notes += [f"not compared with the original: {NO_CHECKPOINT}"] if original is None else []
    missing = missing_for("checkpoint")
    if missing is not None:
        notes.append(f"nothing was computed anew: {missing}")
    else:
        for against in _AGAINST[: 1 + (original is not None)]:
            progress.stage(_WORDS[against])
            found = _compared(bundle, ran, original, stored, against, threads)
            stages, tokens = stages + list(found.stages), found.tokens  # those against the original come last
    order = sorted(stages, key=lambda s: (STAGES.index(s.stage), s.against == "original"))
    failing = next((i for i, s in enumerate(order) if s.outcome == "failed"), None)
    cause = "" if failing is None else usual_cause(order[failing].stage, order[failing].against, tuple(order))
    return Report(
        schema=SCHEMA,
        bundle=bundle.path.name,
        family=manifest.model.family,
        format=manifest.format,
        flavour=manifest.flavour,
        profile=manifest.profile.name,
        bytes=sum(entry.bytes for entry in manifest.files),
        bits_per_weight=manifest.profile.bits_per_weight,
        runtime=ran.runtime,
        source="" if original is None else source_label(original.checkpoint),
        pictures=len(ran.trace.record.sights),
        stages=tuple(order),
        tokens=tokens,
        limits={against: limits_for(manifest, against).reason for against in _AGAINST},
        failing=failing,
        cause=cause,
        notes=tuple(notes),
        seconds=round(time.perf_counter() - start, 2),
        peak_rss_mb=peak_rss_mb(),
        environment=_environment(ran),
    )


_WORDS = {"stored": "comparing with the reference on the stored weights", "original": "comparing with the original"}


def _checks(
    bundle: Bundle, ran: Ran, original: Described | None, stored: Readback, threads: int | None, progress: Progress
) -> Iterator[StageResult]:
    """Those that need no reference."""
    manifest = bundle.manifest
    spec = manifest.model if original is None else original.spec
    yield check_facts(stored.facts, manifest, spec)
    if original is None:
        for stage in ("prompt", "weights"):
            yield StageResult(stage, None, "skipped", why=NO_CHECKPOINT)
    else:
        tokenizer = Tokenizer((bundle.path / manifest.tokenizer.file).read_bytes())
        expected = EXPORTERS[manifest.format].tokenizer_facts(original.spec, original.tokenizer)
        wanted = Tokenizer(original.tokenizer)
        yield check_prompts(manifest, original.spec, tokenizer, wanted, stored.facts, expected)
        yield compare_weights(original.tensors, stored, threads, progress)
    yield check_crops(ran.trace.record.sights, spec.image)


def _compared(
    bundle: Bundle,
    ran: Ran,
    original: Described | None,
    stored: Readback,
    against: Against,
    threads: int | None,
) -> Comparison:
    spec = bundle.manifest.model if original is None else original.spec
    record = ran.trace.record
    if against == "original" and original is not None:
        judged = judge(record, spec, original.tensors, same_inputs=False, threads=threads)
    else:
        judged = judge(record, spec, stored.tensors, same_inputs=True, halves=stored.halves, threads=threads)
    return compare(record, judged, spec, against, limits_for(bundle.manifest, against))


def _environment(ran: Ran) -> dict[str, str]:
    out = {"vlmedge": __version__, "python": platform.python_version(), "machine": platform.machine()}
    try:
        out["torch"] = version("torch")
    except PackageNotFoundError:
        out["torch"] = "not installed"
    return out | {key: str(value) for key, value in ran.info.items()}
