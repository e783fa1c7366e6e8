"""What `vlmedge demo` does and prints: export, ask, judge, draw."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import click

from vlmedge.bundle import Bundle
from vlmedge.cli.console import megabytes, print_table, shown
from vlmedge.errors import RuntimeFailedError, VerificationError
from vlmedge.progress import Progress

if TYPE_CHECKING:
    from vlmedge.skills import Model

SOURCE = "demo:moondream2"
EXPORTS = (("onnx", "w8a8"), ("gguf", "q4"))  # format, profile; the first that runs here is also what --serve shows
ORIGINAL = "original"
ORIGINAL_RIGHT = 45  # of the shipped questions: known, so that an export can be judged where PyTorch is missing
WORSE = 2  # right answers that quantization may cost on the shipped pictures
DRAWN, THING = "landscape.png", "green shape"
_LARGER = 4  # the shipped pictures are small, and lines and labels are not


@dataclass(frozen=True, slots=True)
class Exported:
    """A bundle that was written: its name in the tables, its size, and why it cannot be run here, if so."""

    name: str
    bundle: Bundle
    bytes: int
    seconds: float
    missing: str | None


@dataclass(slots=True)
class Tally:
    """What came of asking one model: its answers in order, how many are right, and milliseconds per answer."""

    answers: list[str] = field(default_factory=list)
    right: int = 0
    first_ms: list[float] = field(default_factory=list)  # the first question about a picture, which is encoded for it
    next_ms: list[float] = field(default_factory=list)


def report(out: Path | None, threads: int | None) -> None:
    """Export, ask, print, draw; `out` keeps the bundles and the drawing.

    Raises VerificationError where an export answers clearly worse than the original, RuntimeFailedError where none of
    the bundles can be run here.
    """
    start = time.perf_counter()
    with ExitStack() as stack:
        folder = out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        progress = stack.enter_context(shown(False))
        exports = [export_one(*entry, folder, threads, progress) for entry in EXPORTS]
        models = _models(stack, exports, threads)
        progress.stage("asking")
        tallies = {name: _asked(model) for name, model in models.items()}
        drawing = (out / "demo-detection.png") if out else Path("vlmedge-demo.png")
        found = _draw(next(iter(models.values())), drawing)
    right = {name: tally.right for name, tally in tallies.items()}
    _print_answers(tallies)
    _print_costs(exports, tallies)
    for line in _remarks(exports):
        click.echo(line)
    click.echo(f"detection: {found} of '{THING}' in {DRAWN}, drawn in {drawing}")
    click.echo(f"right: {', '.join(f'{n} {c} of {_count(tallies)}' for n, c in right.items())}")
    check_answers(right, _count(tallies))
    click.echo(f"done in {time.perf_counter() - start:.0f} s; next:")
    click.echo("  vlmedge demo --serve                                ask about pictures of your own, in a browser")
    click.echo("  vlmedge export moondream2 --format onnx --w8a8      the real model, downloaded once")


def runnable() -> tuple[str, str]:
    """The first format that can be run here, with its profile; raises RuntimeFailedError where there is none."""
    from vlmedge.loading import missing_for

    reasons = {format_: missing_for(format_) for format_, _ in EXPORTS}
    for format_, profile in EXPORTS:
        if reasons[format_] is None:
            return format_, profile
    raise RuntimeFailedError(f"nothing here runs a bundle: {'; '.join(filter(None, reasons.values()))}")


def export_one(format_: str, profile: str, folder: Path, threads: int | None, progress: Progress) -> Exported:
    """Write the demo checkpoint as a bundle in `folder`, compared with the original where PyTorch is installed."""
    from vlmedge.loading import missing_for
    from vlmedge.pipeline import export

    start = time.perf_counter()
    target = folder / f"moondream2-{profile}.{format_}"
    bundle = export(SOURCE, format_, profile, target, threads=threads, progress=_Stages(progress))
    seconds = time.perf_counter() - start
    return Exported(f"{format_} {profile}", bundle, bundle.bytes, seconds, missing_for(format_))


def check_answers(right: Mapping[str, int], questions: int) -> None:
    """Raise VerificationError where an export answers clearly worse than the original did, or is known to."""
    original = right.get(ORIGINAL, ORIGINAL_RIGHT)
    for name, count in right.items():
        if count < original - WORSE:
            raise VerificationError(
                f"{name} answers {count} of {questions} right and the original {original}: something installed "
                "computes wrongly; 'vlmedge doctor' shows what there is"
            )


def _models(stack: ExitStack, exports: list[Exported], threads: int | None) -> dict[str, Model]:
    """What can answer here, the original last."""
    from vlmedge.loading import load, missing_for

    models = {
        exported.name: stack.enter_context(load(exported.bundle.path, threads=threads))
        for exported in exports
        if exported.missing is None
    }
    if not models:
        raise RuntimeFailedError(f"none of the bundles can be run here: {exports[0].missing}")
    if missing_for("checkpoint") is None:
        models[ORIGINAL] = stack.enter_context(load(SOURCE, threads=threads))
    return models


def _asked(model: Model) -> Tally:
    from vlmedge.demo import demo_answers, demo_picture

    tally = Tally()
    for entry in demo_answers():
        for task in (task for task in entry["tasks"] if task["skill"] == "query"):
            answer = model.query(demo_picture(entry["picture"]), task["text"])
            tally.answers.append(answer.text.strip())
            tally.right += answer.text.strip() in task["answers"]
            times = tally.first_ms if "vision" in answer.timings_ms else tally.next_ms
            times.append(answer.timings_ms["total"])
    return tally


def _draw(model: Model, out: Path) -> int:
    """Detect, draw on an enlarged copy, and return how many were found."""
    from vlmedge.demo import demo_picture
    from vlmedge.drawing import draw, save
    from vlmedge.picture import load_picture

    picture = load_picture(demo_picture(DRAWN))
    boxes = model.detect(picture, THING).boxes
    save(draw(picture.repeat(_LARGER, 0).repeat(_LARGER, 1), boxes, (), THING), out)
    return len(boxes)


def _print_answers(tallies: Mapping[str, Tally]) -> None:
    from vlmedge.demo import demo_questions

    rows = [
        (picture.name, question, wanted, *(tally.answers[number] for tally in tallies.values()))
        for number, (picture, question, wanted) in enumerate(demo_questions())
    ]
    print_table(f"{SOURCE}, asked about the shipped pictures", ("picture", "question", "right answer", *tallies), rows)


def _print_costs(exports: list[Exported], tallies: Mapping[str, Tally]) -> None:
    """Sizes and times; what was not measured stays empty."""
    sizes = {e.name: (megabytes(e.bytes), f"{e.seconds:.1f} s") for e in exports}
    rows = []
    for name in dict.fromkeys((*sizes, *tallies)):
        tally = tallies.get(name)
        times = (f"{median(tally.first_ms):.0f} ms", f"{median(tally.next_ms):.0f} ms") if tally else ("", "")
        rows.append((name, *sizes.get(name, ("", "")), *times))
    columns = ("size", "export", "first answer", "next answer")
    print_table("", ("", *columns), rows, right=columns)


def _remarks(exports: list[Exported]) -> list[str]:
    """One line for each reason why something was not run or not compared."""
    lines = [f"{e.name} was written but not asked: {e.missing}" for e in exports if e.missing is not None]
    unverified: dict[str, list[str]] = {}
    for exported in exports:
        verification = exported.bundle.manifest.verification
        if exported.missing is None and not verification["verified"]:
            unverified.setdefault(verification["reason"], []).append(exported.name)
    return lines + [f"not verified ({', '.join(names)}): {reason}" for reason, names in unverified.items()]


def _count(tallies: Mapping[str, Tally]) -> int:
    """Questions."""
    return len(next(iter(tallies.values())).answers)


class _Stages(Progress):
    """Passes stages on and keeps notes back: what they say stands below the tables, once."""

    def __init__(self, shown_on: Progress) -> None:
        self._shown_on = shown_on

    def stage(self, text: str, total: int | None = None) -> None:
        """Pass it on."""
        self._shown_on.stage(text, total)

    def advance(self, steps: int) -> None:
        """Pass it on."""
        self._shown_on.advance(steps)
