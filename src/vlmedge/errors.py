"""Every error that vlmedge raises on purpose.

VlmedgeError                exit code 1, one line: what was asked, what is true, what to do
├── UsageError              exit code 2: a name, option or value that does not exist
├── UnsupportedError        a known thing that this version does not do
├── CheckpointError         a checkpoint that cannot be read as it stands
│   └── HubError            ... because it could not be fetched
├── ImageError              a picture that cannot be decoded
├── BundleError             a bundle that is not one, or is damaged
├── OutputError             an output that cannot be written
├── ContextError            a prompt that does not fit the model's context
├── MissingExtraError       an optional package that is not installed
├── RuntimeFailedError      a native library that failed
│   └── UnavailableError    what is to compute is not there
└── VerificationError       an export that does not agree with the original
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VlmedgeError(Exception):
    """The root of the tree; its text is one line meant for the user."""

    exit_code = 1


class UsageError(VlmedgeError):
    """The request names something that does not exist or cannot be meant."""

    exit_code = 2


class UnsupportedError(VlmedgeError):
    """The request is understood, and this version cannot do it."""


class CheckpointError(VlmedgeError):
    """The checkpoint is damaged, incomplete or not of the declared shape."""


class HubError(CheckpointError):
    """The checkpoint could not be fetched from the hub."""


class ImageError(VlmedgeError):
    """The picture cannot be decoded or is not safe to decode."""


class BundleError(VlmedgeError):
    """The folder is not a bundle of a known schema, or its files do not match its manifest."""


class OutputError(VlmedgeError):
    """The output cannot be written: it exists, is read-only, or the disk is full."""


class ContextError(VlmedgeError):
    """Picture and prompt need more positions than the model has."""


class MissingExtraError(VlmedgeError):
    """An optional dependency is not installed; the text gives the command that installs it."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs the extra '{extra}': pip install 'vlmedge[{extra}]'")


class RuntimeFailedError(VlmedgeError):
    """A native library failed or is known to crash on this machine."""


class UnavailableError(RuntimeFailedError):
    """The runtime, or the unit that is to compute, cannot be used on this machine; the text says what to do."""


class VerificationError(VlmedgeError):
    """The export does not agree with the original; the text names the first stage that fails."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for a close match of `name` in `known`, else the known names."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(options)}" if options else ""
