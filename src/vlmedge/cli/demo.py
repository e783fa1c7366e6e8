"""vlmedge demo: the whole way on the shipped checkpoint, in one command."""

from __future__ import annotations

from pathlib import Path

import click

from vlmedge.cli.console import megabytes, shown


@click.command("demo")
@click.option("--out", metavar="DIR", help="Keep the bundle here [default: a temporary folder].")
def command(out: str | None) -> None:
    """Export demo:moondream2 to GGUF q4 and ask it, and the original, about the shipped pictures."""
    import tempfile

    from vlmedge.demo import demo_questions
    from vlmedge.loading import load
    from vlmedge.pipeline import export

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(out) if out else Path(temporary) / "moondream2-q4.gguf"
        with shown(False) as progress:
            bundle = export("demo:moondream2", "gguf", "q4", folder, progress=progress)
        click.echo(f"exported demo:moondream2 to GGUF q4: {megabytes(bundle.bytes)}")
        with load(bundle.path) as model:
            for picture, question, expected in demo_questions():
                answer = model.query(picture, question)
                click.echo(f"{picture.name}: {question} -> {answer.text} (right: {expected}; {model.session.runtime})")
