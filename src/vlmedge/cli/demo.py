"""vlmedge demo: the whole way on the shipped checkpoint, in one command; --serve shows it as a page."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vlmedge.cli.console import megabytes, shown, threads_option
from vlmedge.errors import UsageError

if TYPE_CHECKING:
    from vlmedge.demo.serve import Subject
    from vlmedge.skills import Model


@click.command("demo")
@click.option("--out", metavar="DIR", help="Keep the bundles and the drawing here [default: a temporary folder].")
@click.option("--serve", is_flag=True, help="Open a local page instead: pictures of your own, boxes, timings.")
@click.option("--port", type=click.IntRange(1, 65535), metavar="N", help="Of the page [default: a free one].")
@click.option(
    "--source", "--bundle", "source", metavar="SOURCE", help="What the page asks: a bundle, or as in 'vlmedge run'."
)
@click.option("--no-browser", is_flag=True, help="Only print the page's address.")
@threads_option
def command(
    out: str | None, serve: bool, port: int | None, source: str | None, no_browser: bool, threads: int | None
) -> None:
    """Export demo:moondream2 to every format and ask the bundles, and the original, about the shipped pictures.

    Only what can run here answers. Exit code 1 where an export answers clearly worse than the original.
    """
    if serve:
        if out is not None and source is not None:
            raise UsageError("--out is for a bundle that is made; --source names one that exists")
        _serve(source, out, port, not no_browser and sys.stdout.isatty(), threads)
        return
    for option, given in (("--port", port), ("--source", source), ("--no-browser", no_browser)):
        if given:
            raise UsageError(f"{option} goes with --serve")
    from vlmedge.cli.demo_report import report

    report(Path(out) if out else None, threads)


def _serve(source: str | None, out: str | None, port: int | None, browser: bool, threads: int | None) -> None:
    from vlmedge.demo.serve import serving

    with ExitStack() as stack:
        model, subject = _opened(stack, source, out, threads)
        address = stack.enter_context(serving(model, subject, port or 0))
        click.echo(f"{subject.source} ({subject.what}) answers at {address} - Ctrl-C ends it")
        if browser:
            import webbrowser

            webbrowser.open(address)
        try:
            while True:
                time.sleep(3600)  # an Event's wait would not hear Ctrl-C on Windows
        except KeyboardInterrupt:
            click.echo("\nended")


def _opened(stack: ExitStack, source: str | None, out: str | None, threads: int | None) -> tuple[Model, Subject]:
    """The named model, or the demo checkpoint in the first format that runs here, and what the page says of it."""
    from vlmedge.bundle import is_bundle, open_bundle
    from vlmedge.cli.demo_report import SOURCE, export_one, runnable
    from vlmedge.demo.serve import Subject
    from vlmedge.loading import load

    with shown(False) as progress:
        name = source or SOURCE
        path = Path(source) if source else export_one(*runnable(), _folder(stack, out), threads, progress).bundle.path
        progress.stage(f"opening {name}")
        model = stack.enter_context(load(source or path, threads=threads, progress=progress))
    if not is_bundle(path):
        return model, Subject(name, "the original")
    bundle = open_bundle(path)
    what = f"{bundle.manifest.format} {bundle.manifest.profile.name}, {megabytes(bundle.bytes)}"
    return model, Subject(path.name if source else name, what)


def _folder(stack: ExitStack, out: str | None) -> Path:
    """Where bundles go."""
    import tempfile

    return Path(out or stack.enter_context(tempfile.TemporaryDirectory()))
