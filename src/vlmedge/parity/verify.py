"""verify(): a bundle held against its checkpoint and the reference, stage by stage."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from vlmedge.bundle import Bundle, Manifest, open_bundle
from vlmedge.errors import CheckpointError, HubError, MissingExtraError, UsageError
from vlmedge.loading import Described, SourceLike, describe, missing_for
from vlmedge.parity.examine import examine
from vlmedge.parity.report import Report
from vlmedge.parity.run import run_tests
from vlmedge.picture import PictureLike, check_picture
from vlmedge.progress import Progress
from vlmedge.sources import DEMO


def verify(
    bundle: str | os.PathLike[str],
    against: SourceLike | None = None,
    images: Mapping[str, PictureLike] | None = None,
    *,
    runtime: str | None = None,
    provider: str | None = None,
    threads: int | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Compare a bundle with its checkpoint, and its runtime with the reference, and say where they part.

    `against`: the checkpoint, as `load` takes it; by default the one that the manifest names, where that can be had,
    else the bundle is compared with the reference on its own weights only. `images`: pictures beside those made from
    formulas, by name. Raises BundleError for a file whose hash is wrong, before anything runs, CheckpointError for
    another model's checkpoint, MissingExtraError without PyTorch, RuntimeFailedError without the bundle's runtime.
    A stage that fails is no exception: see `Report.passed`.
    """
    progress = progress or Progress()
    found, original = opened(bundle, against, images or {}, allow_pickle=allow_pickle, progress=progress)
    progress.stage("running the bundle")
    ran = run_tests(found, images, runtime=runtime, provider=provider, threads=threads)
    return examine(found, ran, original, threads=threads, progress=progress)


def opened(
    bundle: str | os.PathLike[str],
    against: SourceLike | None,
    images: Mapping[str, PictureLike],
    *,
    allow_pickle: bool,
    progress: Progress,
) -> tuple[Bundle, Described | None]:
    """A bundle whose hashes are right, and its checkpoint, or None; the arguments and errors are those of `verify`."""
    if missing_for("checkpoint") is not None:
        raise MissingExtraError("verifying", "torch")
    if len(images) > MOST_IMAGES:
        raise UsageError(
            f"verifying takes {MOST_IMAGES} pictures of your own at most, not {len(images)}: every number that is made "
            "of them is compared; 'vlmedge eval' asks about any number"
        )
    for source in images.values():
        if isinstance(source, (str, os.PathLike)):
            check_picture(source)
    found = open_bundle(bundle)
    progress.stage("comparing hashes")
    found.check()
    return found, _original(found.manifest, against, allow_pickle, progress)


MOST_IMAGES = 8  # all that is made of one of 12 crops takes some 200 MB at moondream2's size


def pictures_in(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Every file of a folder that is a picture by its name's ending, in alphabetical order."""
    from PIL import Image

    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in endings and path.is_file())
    return {path.name: path for path in found}


def _original(
    manifest: Manifest, against: SourceLike | None, allow_pickle: bool, progress: Progress
) -> Described | None:
    """The named checkpoint, or the manifest's; None where the manifest's is a folder somewhere or cannot be had."""
    if against is not None:
        return _same(describe(against, allow_pickle=allow_pickle, progress=progress), manifest, os.fspath(against))
    source = manifest.source
    if not source.repo and not source.label.startswith(DEMO):
        return None
    name = f"{source.repo}@{source.commit or source.revision}" if source.repo else source.label
    try:
        return _same(describe(name, allow_pickle=allow_pickle, progress=progress), manifest, name)
    except HubError as error:
        progress.note(f"{name} cannot be had, the bundle is compared with its own weights only: {error}")
        return None


def _same(found: Described, manifest: Manifest, name: str) -> Described:
    """The checkpoint, where it is of the bundle's shape."""
    if found.spec.tensors() != manifest.model.tensors():
        raise CheckpointError(
            f"{name} is another model than the bundle's: a {found.spec.family} with other tensors; "
            f"the bundle was made from {manifest.source.label}"
        )
    return found
