"""vlmedge run: one question to a bundle, or to the original."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlmedge.cli.console import json_option, print_json, quiet_option, shown, threads_option
from vlmedge.errors import UsageError

if TYPE_CHECKING:
    from vlmedge.answer import Answer
    from vlmedge.skills import Model

SKILLS = ("query", "caption", "detect", "point", "gaze")


@click.command("run")
@click.argument("source")
@click.argument("image")
@click.argument("question", required=False)
@click.option("--image", "more", multiple=True, metavar="FILE", help="One more picture; may be repeated.")
@click.option("--skill", type=click.Choice(SKILLS), help="[default: query with a question, else caption]")
@click.option("--object", "thing", metavar="NAME", help="What to detect or point at.")
@click.option("--length", default="normal", show_default=True, metavar="short|normal|long", help="Of a caption.")
@click.option("--reasoning", is_flag=True, help="Think before answering, where the release can.")
@click.option(
    "--ref", "refs", multiple=True, metavar="X,Y[,X2,Y2]", help="A point or box (0..1) the question is about."
)
@click.option("--eye", metavar="X,Y", help="The eye (0..1) whose gaze is asked for.")
@click.option("--runtime", metavar="NAME", help="[default: the one for the bundle's format; torch for a checkpoint]")
@click.option("--memory", type=click.Choice(("fast", "lean")), default="fast", show_default=True)
@click.option(
    "--dtype", type=click.Choice(("f32", "bf16", "f16")), default="f32", show_default=True, help="Of the original."
)
@click.option("--max-tokens", type=click.IntRange(1), metavar="N")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, metavar="T")
@click.option("--seed", type=int, metavar="S")
@click.option("--stream", is_flag=True, help="Print the answer as it comes.")
@click.option("--draw", metavar="OUT.png", help="Draw boxes and points on the picture.")
@click.option("--allow-pickle", is_flag=True, help="Read pickled weights, with torch's restricted loader.")
@threads_option
@quiet_option
@json_option
def command(
    source: str,
    image: str,
    question: str | None,
    runtime: str | None,
    memory: Any,
    dtype: str,
    threads: int | None,
    draw: str | None,
    allow_pickle: bool,
    quiet: bool,
    as_json: bool,
    **request: Any,
) -> None:
    """Ask SOURCE (a bundle, or a checkpoint: then the original answers) about IMAGE.

    IMAGE is a file, demo:NAME for a shipped picture, or - for none.
    """
    from vlmedge.loading import load

    if request["stream"] and as_json:
        raise UsageError("--stream and --json exclude each other")
    pictures = [picture_path(name) for name in (image, *request["more"]) if name != "-"]
    skill = request["skill"] or ("query" if question else "caption")
    with shown(quiet or as_json) as progress:
        progress.stage(f"opening {source}")
        model = load(source, runtime, threads, memory=memory, dtype=dtype, allow_pickle=allow_pickle, progress=progress)
    with model:
        answer = _ask(model, skill, pictures, question, request)
    if draw is not None:
        _draw(answer, pictures, request["thing"] or skill, draw)
    if as_json:
        print_json(answer.as_dict())
    elif request["stream"] and answer.text:
        click.echo()
    else:
        click.echo(shown_answer(answer))


def picture_path(name: str) -> str:
    """A file name as it is; `demo:NAME` becomes the shipped picture's path."""
    if not name.startswith("demo:"):
        return name
    from vlmedge.demo import demo_picture

    return str(demo_picture(name.removeprefix("demo:")))


def shown_answer(answer: Answer) -> str:
    """The answer as lines for a person."""
    lines = [answer.text] if answer.text or answer.skill in ("query", "caption") else []
    if answer.reasoning is not None:
        lines.insert(0, f"({answer.reasoning.text})")
    lines += [f"box {b.x_min:.3f} {b.y_min:.3f} {b.x_max:.3f} {b.y_max:.3f}" for b in answer.boxes]
    lines += [f"point {p.x:.3f} {p.y:.3f}" for p in answer.points]
    return "\n".join(lines) if lines else "nothing found"


def _ask(model: Model, skill: str, pictures: list[str], question: str | None, request: dict[str, Any]) -> Answer:
    options = {key: request[key] for key in ("max_tokens", "temperature", "seed")}
    if request["stream"]:
        options["on_token"] = lambda text: click.echo(text, nl=False)
    if skill == "query":
        return _query(model, pictures, question, request, options)
    if len(pictures) != 1:
        raise UsageError(f"{skill} takes exactly one picture, not {len(pictures)}")
    if skill == "caption":
        return model.caption(pictures[0], request["length"], **options)
    if skill == "gaze":
        if request["eye"] is None:
            raise UsageError("gaze needs --eye X,Y")
        x, y = _numbers(request["eye"], (2,), "--eye")
        return model.gaze(pictures[0], (x, y), **options)
    thing = request["thing"] or question
    if not thing:
        raise UsageError(f"{skill} needs --object NAME")
    return (model.detect if skill == "detect" else model.point)(pictures[0], thing, **options)


def _query(
    model: Model, pictures: list[str], question: str | None, request: dict[str, Any], options: dict[str, Any]
) -> Answer:
    if not question:
        raise UsageError("query needs a QUESTION")
    refs: list[Any] = [_numbers(text, (2, 4), "--ref") for text in request["refs"]]
    if len(pictures) > 1:
        if refs or request["reasoning"]:
            raise UsageError("--ref and --reasoning go with one picture")
        return model.chat([{"role": "user", "content": [*pictures, question]}], **options)
    picture = pictures[0] if pictures else None
    return model.query(picture, question, reasoning=request["reasoning"], spatial_refs=refs, **options)


def _numbers(text: str, counts: tuple[int, ...], option: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in counts:
        raise UsageError(f"{option} takes {' or '.join(map(str, counts))} numbers with commas between, not '{text}'")
    return values


def _draw(answer: Answer, pictures: list[str], label: str, out: str) -> None:
    from vlmedge.drawing import draw, save
    from vlmedge.picture import load_picture

    if not pictures:
        raise UsageError("--draw needs a picture")
    save(draw(load_picture(pictures[0]), answer.boxes, answer.points, label), Path(out))
