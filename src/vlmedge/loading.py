"""Opening what a user names: a checkpoint described in the vocabulary, or a model ready to answer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from vlmedge.bundle import Bundle, bundle_around, is_bundle, open_bundle
from vlmedge.checkpoint import Checkpoint
from vlmedge.errors import UnavailableError, UsageError
from vlmedge.families import Family, family_of, known_models
from vlmedge.progress import Progress
from vlmedge.prompt import Tokenizer
from vlmedge.registry import Registry
from vlmedge.runtimes import RUNTIMES, Memory, Opening
from vlmedge.runtimes.cache import cache_folder
from vlmedge.runtimes.units import CPU, check_unit
from vlmedge.skills import Model
from vlmedge.sources import DEMO, open_source
from vlmedge.spec import ModelSpec
from vlmedge.tensors import Tensor

SourceLike: TypeAlias = "str | os.PathLike[str]"

# Where sources of other kinds than folders and hub ids lie.
FOLDERS: Registry[Callable[[str], Path]] = Registry("source", {"demo": "vlmedge.demo:demo_folder"})


@dataclass(frozen=True, slots=True)
class Described:
    """A checkpoint, its family, its spec, its tensors by canonical name, and its tokenizer.json."""

    checkpoint: Checkpoint
    family: Family
    spec: ModelSpec
    tensors: Mapping[str, Tensor]
    tokenizer: bytes


def describe(source: SourceLike, *, allow_pickle: bool = False, progress: Progress | None = None) -> Described:
    """Open a checkpoint and account for every tensor; no weights are read.

    Raises UsageError for a name that is none, CheckpointError, HubError or UnsupportedError for what it names.
    """
    progress = progress or Progress()
    known = {name: (model.repo, model.revision) for name, model in known_models().items()}
    checkpoint = open_source(
        os.fspath(source),
        known,
        allow_pickle=allow_pickle,
        quiet=progress.quiet,
        demo=lambda name: FOLDERS["demo"](name),
        notice=progress.note,
    )
    family = family_of(checkpoint)
    spec = family.spec(checkpoint)
    tensors = family.weights(spec).bind(checkpoint.tensors)
    return Described(checkpoint, family, spec, tensors, family.tokenizer(checkpoint))


def load(
    source: SourceLike,
    runtime: str | None = None,
    threads: int | None = None,
    *,
    memory: Memory = "fast",
    context: int | None = None,
    dtype: str = "f32",
    provider: str | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Model:
    """Open a bundle (or a checkpoint: then the original in PyTorch answers) and return a model with its skills.

    `runtime`: a name of `RUNTIMES`, by default the one for the bundle's format. `threads`: by default the
    physical cores. `memory`: see `runtimes.Opening`. `context`: positions to keep memory for, by default all that
    the model has. `dtype`: the original's, "f32", "bf16" or "f16". `provider`: the unit that computes, one of
    `Runtime.units` ("cpu", "cuda", "metal", ...), by default the CPU; one that cannot be used here is refused.
    With `memory="lean"` a runtime may keep prepared files in `runtimes.cache.cache_folder()`.
    """
    if names_bundle(source):
        cache = cache_folder() if memory == "lean" else None
        bundle = open_bundle(Path(source))
        return open_model(bundle, runtime, threads, memory=memory, context=context, cache=cache, provider=provider)
    chosen = runtime or _runtime_for("checkpoint")
    if RUNTIMES[chosen].loads != "checkpoint":
        raise UsageError(
            f"the runtime '{chosen}' runs {RUNTIMES[chosen].loads} bundles; {source} is a checkpoint: export it first"
        )
    if provider is not None and provider.lower() != CPU:
        check_unit(chosen, provider, RUNTIMES[chosen].units())  # before a checkpoint is fetched for nothing
    found = describe(source, allow_pickle=allow_pickle, progress=progress)
    return open_original(found, threads, dtype=dtype, context=context, runtime=chosen, provider=provider)


def source_label(checkpoint: Checkpoint) -> str:
    """What the user named, or a folder's bare name: a bundle says nothing of where folders lie."""
    source = checkpoint.source
    if source.repo or source.label.startswith(DEMO):
        return source.label
    return Path(os.path.abspath(checkpoint.folder)).name


def names_bundle(source: SourceLike) -> bool:
    """Tell whether `load` takes it for a bundle.

    A folder that is neither is taken for a damaged one, a file inside a bundle for a wrong name of it.
    """
    path = Path(source)
    if os.path.isfile(path):
        return bundle_around(path) is not None
    return is_bundle(path) or (os.path.isdir(path) and not os.path.isfile(path / "config.json"))


def local_folder(source: str) -> Path | None:
    """The folder of a model that lies here, or is meant to; None for a name that any machine can open.

    Such names are demo sources, releases that a family knows, and hub ids.
    """
    path = Path(os.path.expanduser(source))
    named = source.startswith(DEMO) or source.partition("@")[0] in known_models()
    return path if names_bundle(source) or (path.exists() and not named) else None


def open_original(
    found: Described,
    threads: int | None = None,
    *,
    dtype: str = "f32",
    context: int | None = None,
    runtime: str = "torch",
    provider: str | None = None,
) -> Model:
    """Open a described checkpoint itself; raises MissingExtraError where PyTorch is not installed."""
    spec = with_context(found.spec, context)
    opening = Opening(spec, tensors=found.tensors, threads=threads, dtype=dtype, provider=provider)
    return Model(found.spec, RUNTIMES[runtime].open(opening), Tokenizer(found.tokenizer))


def with_context(spec: ModelSpec, context: int | None) -> ModelSpec:
    """The model with a shorter context, whose KV cache takes less memory; raises UsageError for one that cannot be."""
    if context is None:
        return spec
    least, most = spec.image_tokens + 2, spec.decoder.context
    if not least <= context <= most:
        raise UsageError(f"the context can be {least} (a picture and a word) to {most} positions, not {context}")
    return replace(spec, decoder=replace(spec.decoder, context=context))


def missing_for(loads: str) -> str | None:
    """Why a format's bundles cannot be run here (one line, with the remedy), or None."""
    return RUNTIMES[_runtime_for(loads)].missing()


def open_model(
    bundle: Bundle,
    runtime: str | None = None,
    threads: int | None = None,
    *,
    memory: Memory = "fast",
    context: int | None = None,
    cache: Path | None = None,
    provider: str | None = None,
) -> Model:
    """Open a bundle's model with a runtime that runs its format; `cache` and `provider` as in `runtimes.Opening`."""
    manifest = bundle.manifest
    chosen = runtime or _runtime_for(manifest.format)
    entry = RUNTIMES[chosen]
    if entry.loads != manifest.format:
        runs = "checkpoints" if entry.loads == "checkpoint" else f"bundles of the format {entry.loads}"
        raise UsageError(f"the runtime '{chosen}' runs {runs}; {bundle.path} has the format {manifest.format}")
    missing = entry.missing()
    if missing is not None:
        raise UnavailableError(f"{bundle.path} cannot be run here: {missing}")
    tokenizer = Tokenizer((bundle.path / manifest.tokenizer.file).read_bytes())
    opening = Opening(
        with_context(manifest.model, context),
        folder=bundle.path,
        threads=threads,
        memory=memory,
        kv_cache=manifest.profile.kv_cache,
        flavour=manifest.flavour,
        cache=cache,
        provider=provider,
    )
    return Model(manifest.model, entry.open(opening), tokenizer)


def _runtime_for(loads: str) -> str:
    for name in RUNTIMES:
        if RUNTIMES[name].loads == loads:
            return name
    raise UsageError(f"no runtime of this version runs {loads}")
