"""A job as a page takes it, crops and token ids made here, and a page's reply as the benchmark's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from vlmedge import imaging
from vlmedge.bundle import MANIFEST, Bundle, open_bundle
from vlmedge.device_bench import agreement
from vlmedge.device_bench.agreement import Followed, Truth
from vlmedge.device_bench.costs import costs
from vlmedge.device_bench.hosts.served import Content
from vlmedge.device_bench.job import Ask, Job, Variant
from vlmedge.device_bench.result import Agreement, Counts, Load, Reply, Sample, Status
from vlmedge.errors import RuntimeFailedError, UnsupportedError
from vlmedge.picture import load_picture
from vlmedge.prompt import PictureSpan, Slot, Tokenizer, render
from vlmedge.records import decode

# What the page's `first_token` and `end_to_end` leave out: no cropping and no tokenizer in JavaScript yet.
FIRST_TOKEN: Final = "crops in hand to first token"
_NEEDED = ("config.json", *(f"onnx/{n}.onnx" for n in ("vision_encoder", "vision_projection", "embed_tokens")))
_LIBRARY_MEMORY = 4 << 30  # WebAssembly with 32-bit addresses


@dataclass(frozen=True, slots=True)
class WebTask:
    """One job made ready: `data` is the page's, `files` what it fetches, the rest is needed to read its reply."""

    variant: Variant
    bundle: Bundle
    tokenizer: Tokenizer
    data: dict[str, Any]
    files: Mapping[str, Content]
    counts: tuple[Counts, ...]
    truth: Truth | None


@dataclass(frozen=True, slots=True)
class PageLoad:
    """Milliseconds of importing onnxruntime-web, and of fetching and opening the bundle."""

    ms: float
    import_ms: float


@dataclass(frozen=True, slots=True)
class Weighed:
    """Bytes of the page before and after opening, by its own measure; None where the server looks instead."""

    empty: float | None = None
    loaded: float | None = None


@dataclass(frozen=True, slots=True)
class PageReply:
    """What a page sends; `along` by ask, log-probabilities that are no numbers are null."""

    status: Status
    reason: str = ""
    load: PageLoad | None = None
    samples: tuple[Sample, ...] = ()
    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)
    along: dict[str, Followed] = field(default_factory=dict)
    threads: int | None = None
    weighed: Weighed | None = None
    units: dict[str, str] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)


def prepare(job: Job, variant: Variant, threads: int | None) -> WebTask:
    """Make a measure or sustain job ready for a page; `threads` None: as many as the page's machine has processors.

    Raises UnsupportedError for what a page cannot run, BundleError, ImageError, RuntimeFailedError.
    """
    bundle = _bundle(variant)
    tokenizer = Tokenizer((bundle.path / bundle.manifest.tokenizer.file).read_bytes())
    truth = agreement.read_truth(job.truth) if job.truth else None
    listed = [MANIFEST, *(entry.path for entry in bundle.manifest.files)]
    files: dict[str, Content] = {f"bundle/{name}": bundle.path / name for name in listed}
    asks, counts = [], []
    for number, ask in enumerate(job.work.asks):
        crops, data, count = _ask(ask, bundle, tokenizer, job.work.tokens, variant.context)
        files[f"pixels/{number}"] = crops.pixels.tobytes()
        told = truth.of(ask.name) if truth else None
        data["truth"] = {"tokens": told.tokens, "ids": told.ids} if told else None
        asks.append({"pixels": f"pixels/{number}"} | data)
        counts.append(count)
    page = {
        "does": "measure",
        "title": f"{variant.label}, {job.work.scenario}",
        "unit": variant.unit,
        "threads": threads,
        "asks": asks,
        "tokens": job.work.tokens,
        "warmup": job.work.warmup,
        "repeat": job.work.repeat,
        "seconds": max(job.work.min_seconds, job.work.minutes * 60),
        "sustained": bool(job.work.minutes),
    }
    return WebTask(variant, bundle, tokenizer, page, files, tuple(counts), truth)


def read_page(data: Any) -> PageReply:
    """A page's JSON; raises RuntimeFailedError for what is none of ours."""
    return decode(PageReply, data, "the page's reply", RuntimeFailedError)


def reply(task: WebTask, page: PageReply, files: Any) -> Reply:
    """The benchmark's reply from a page that did its task; what is seen from outside is added by the host."""
    assert page.load is not None, "a page that is done has opened its model"
    counts = task.counts
    positions = sum(c.image_tokens + c.prompt_tokens + c.generated / 2 for c in counts) / max(1, len(counts))
    return Reply(
        "ok",
        page.reason,
        load=Load(round(page.load.ms, 2), round(page.load.import_ms, 2), files),
        samples=tuple(_rounded(sample) for sample in page.samples),
        counts=counts,
        agreement=_agreement(task, page),
        costs=costs(task.variant, task.bundle.manifest.model, round(positions)),
        threads=page.threads,
        environment=page.environment | {"first_token": FIRST_TOKEN},
    )


def _bundle(variant: Variant) -> Bundle:
    bundle = open_bundle(variant.source)
    names = {entry.path for entry in bundle.manifest.files}
    if bundle.manifest.format != "onnx" or not names.issuperset(_NEEDED):
        what = f"{bundle.manifest.format} {bundle.manifest.flavour}".strip()
        raise UnsupportedError(
            f"a browser runs ONNX bundles of the flavour 'ort', {bundle.path.name} is {what}; export it"
        )
    if variant.unit == "wasm" and bundle.bytes > _LIBRARY_MEMORY:
        raise UnsupportedError(
            f"{bundle.path.name} has {bundle.bytes / 1e9:.1f} GB, WebAssembly has 4.3 GB for everything; "
            "choose a smaller profile"
        )
    return bundle


def _ask(
    ask: Ask, bundle: Bundle, tokenizer: Tokenizer, tokens: int, context: int | None
) -> tuple[imaging.Crops, dict[str, Any], Counts]:
    """Crops, the page's words for one ask, and its counts."""
    spec = bundle.manifest.model
    crops = imaging.crop(load_picture(ask.picture), spec.image)
    before, prompt = _ids(ask, bundle, tokenizer)
    positions = spec.image_tokens + len(before) + len(prompt)
    longest = min(spec.decoder.context, context or spec.decoder.context)
    if positions + tokens - 1 > longest:
        raise UnsupportedError(
            f"{tokens} tokens do not fit behind {positions} positions in a context of {longest}; use a scenario with "
            "fewer tokens, or a larger --context"
        )
    encoded = 1 if crops.tiling == (1, 1) else crops.count
    counts = Counts(ask.name, crops.count, encoded, spec.image_tokens, len(before) + len(prompt), tokens)
    words = {"name": ask.name, "crops": crops.count, "tiling": crops.tiling, "before": before, "prompt": prompt}
    return crops, words, counts


def _ids(ask: Ask, bundle: Bundle, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Token ids before and behind the picture."""
    spec = bundle.manifest.model
    name = "query" if ask.question else "caption/normal"
    parts = render(spec.prompt, name, tokenizer, question=ask.question)
    cut = next(i for i, part in enumerate(parts) if isinstance(part, PictureSpan))
    runs = [
        [i for p in some if not isinstance(p, Slot | PictureSpan) for i in p.ids] for some in (parts[:cut], parts[cut:])
    ]
    return runs[0], runs[1]


def _agreement(task: WebTask, page: PageReply) -> Agreement | None:
    if task.truth is None:
        return None
    stop = task.bundle.manifest.model.prompt.stop
    return agreement.agreement(task.truth, dict(page.tokens), page.along, task.tokenizer, stop)


def _rounded(sample: Sample) -> Sample:
    ms = {name: round(value, 4) for name, value in sample.ms.items()}
    return Sample(sample.ask, round(sample.at, 4), ms, tuple(round(value, 4) for value in sample.token_ms))
