"""vlmedge demo: the whole way on the shipped checkpoint, in one command."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vlmedge.cli.console import megabytes, print_table, shown, threads_option
from vlmedge.errors import VerificationError

if TYPE_CHECKING:
    from vlmedge.skills import Model


WORSE = 2  # right answers that quantization may cost on the shipped pictures


@click.command("demo")
@click.option("--out", metavar="DIR", help="Keep the bundle here [default: a temporary folder].")
@threads_option
def command(out: str | None, threads: int | None) -> None:
    """Export demo:moondream2 to GGUF q4 and ask it, and the original where it can run, about the shipped pictures.

    Exit code 1 where the export answers clearly worse than the original.
    """
    import tempfile

    from vlmedge.loading import load, missing_for
    from vlmedge.pipeline import export

    with ExitStack() as stack:
        temporary = stack.enter_context(tempfile.TemporaryDirectory())
        folder = Path(out) if out else Path(temporary) / "moondream2-q4.gguf"
        progress = stack.enter_context(shown(False))
        bundle = export("demo:moondream2", "gguf", "q4", folder, threads=threads, progress=progress)
        models = {"exported": stack.enter_context(load(bundle.path, threads=threads))}
        if missing_for("checkpoint") is None:
            models["original"] = stack.enter_context(load("demo:moondream2", threads=threads))
        progress.stage("asking")
        rows, right = _ask(models)
        title = f"demo:moondream2 as GGUF q4, {megabytes(bundle.bytes)}"
    print_table(title, ("picture", "question", "right answer", *models), rows)
    click.echo("right: " + ", ".join(f"{name} {count} of {len(rows)}" for name, count in right.items()))
    check_answers(right, len(rows))


def check_answers(right: dict[str, int], questions: int) -> None:
    """Raise VerificationError where the export answers clearly worse than the original, if that was asked."""
    exported, original = right["exported"], right.get("original", 0)
    if exported < original - WORSE:
        raise VerificationError(
            f"the export answers {exported} of {questions} right and the original {original}: something installed "
            "computes wrongly; 'vlmedge doctor' shows what there is"
        )


def _ask(models: dict[str, Model]) -> tuple[list[tuple[str, ...]], dict[str, int]]:
    """One row per question, and how many each model answers right."""
    from vlmedge.demo import demo_answers, demo_picture

    rows, right = [], dict.fromkeys(models, 0)
    for entry in demo_answers():
        for task in (task for task in entry["tasks"] if task["skill"] == "query"):
            picture = demo_picture(entry["picture"])
            answers = {name: model.query(picture, task["text"]).text.strip() for name, model in models.items()}
            rows.append((entry["picture"], task["text"], task["answers"][0], *answers.values()))
            for name, answer in answers.items():
                right[name] += answer in task["answers"]
    return rows, right
