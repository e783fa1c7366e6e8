"""Opening a bundle with its own runtime and running the test inputs over it."""

from __future__ import annotations

from collections.abc import Mapping

from vlmedge.bundle import Bundle
from vlmedge.loading import open_model
from vlmedge.parity.examine import Ran
from vlmedge.parity.trace import needed_context, trace
from vlmedge.picture import PictureLike


def run_tests(
    bundle: Bundle,
    own: Mapping[str, PictureLike] | None = None,
    *,
    runtime: str | None = None,
    provider: str | None = None,
    threads: int | None = None,
) -> Ran:
    """Run a bundle over the test inputs and over pictures of the user's own, and close it.

    Raises RuntimeFailedError where its runtime is not installed, ImageError for a picture that cannot be read.
    """
    context = needed_context(bundle.manifest.model)
    # Lean: verifying must not need more memory than running does.
    with open_model(bundle, runtime, threads, memory="lean", context=context, provider=provider) as model:
        return Ran(trace(model, own), model.session.runtime, model.session.info())
