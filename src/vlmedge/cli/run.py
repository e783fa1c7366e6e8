"""vlmedge run: one question to a bundle, or to the original."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlmedge.cli.console import json_option, one_of, print_json, quiet_option, shown, threads_option
from vlmedge.cli.options import pickle_option, provider_option
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
@click.option("--skill", callback=one_of(*SKILLS), metavar="|".join(SKILLS), help="[default: query, or caption]")
@click.option("--object", "thing", metavar="NAME", help="What to detect or point at.")
@click.option("--length", metavar="short|normal|long", help="Of a caption [default: normal].")
@click.option("--reasoning", is_flag=True, help="Think before answering, where the release can.")
@click.option(
    "--ref", "refs", multiple=True, metavar="X,Y[,X2,Y2]", help="A point or box (0..1) the question is about."
)
@click.option("--eye", metavar="X,Y", help="The eye (0..1) whose gaze is asked for.")
@click.option("--face", metavar="X,Y,X2,Y2", help="Instead: a face box, from which eyes are drawn and averaged.")
@click.option("--runtime", metavar="NAME", help="[default: the one for the bundle's format; torch for a checkpoint]")
@provider_option
@click.option(
    "--memory",
    callback=one_of("fast", "lean"),
    default="fast",
    show_default=True,
    metavar="fast|lean",
    help="lean maps a bundle's weights, so that the system can drop them.",
)
@click.option("--context", type=click.IntRange(1), metavar="N", help="Positions to keep memory for [default: all].")
@click.option(
    "--dtype",
    callback=one_of("f32", "bf16", "f16"),
    metavar="f32|bf16|f16",
    help="Of the original [default: f32].",
)
@click.option("--max-tokens", type=click.IntRange(1), metavar="N", help="Stop after N tokens.")
@click.option(
    "--temperature",
    type=click.FloatRange(0, 1e6),
    default=0.0,
    show_default=True,
    metavar="T",
    help="0 always takes the likeliest token.",
)
@click.option("--seed", type=click.IntRange(0), metavar="S", help="Of what a temperature above 0 draws.")
@click.option("--stream", is_flag=True, help="Print the answer as it comes.")
@click.option("--draw", metavar="OUT.png", help="Draw boxes and points on the picture.")
@pickle_option
@threads_option
@quiet_option
@json_option
def command(
    source: str,
    image: str,
    question: str | None,
    runtime: str | None,
    provider: str | None,
    memory: Any,
    context: int | None,
    dtype: str | None,
    threads: int | None,
    draw: str | None,
    allow_pickle: bool,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Ask SOURCE (a bundle, or a checkpoint: then the original answers) about IMAGE.

    IMAGE is a file, demo:NAME for a shipped picture, or - for none.
    """
    if options["stream"] and as_json:
        raise UsageError("--stream and --json exclude each other")
    request = _request(image, question, options)
    from vlmedge.drawing import check_output
    from vlmedge.loading import load, names_bundle

    if dtype is not None and names_bundle(source):
        raise UsageError(f"--dtype is for the original; {source} is a bundle, whose types were chosen when exporting")
    if memory == "lean" and not names_bundle(source):
        raise UsageError(f"--memory lean is for bundles; {source} is a checkpoint (--dtype bf16 halves its memory)")
    if draw is not None and not request.pictures:
        raise UsageError("--draw needs a picture")
    if draw is not None:
        check_output(Path(draw))
    with shown(quiet or as_json) as progress:
        progress.stage(f"opening {source}")
        model = load(
            source,
            runtime,
            threads,
            memory=memory,
            context=context,
            dtype=dtype or "f32",
            provider=provider,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    with model:
        answer, facts = request.ask(model), model.session.info()
    if draw is not None:
        _draw(answer, request, Path(draw))
    if as_json:
        print_json(answer.as_dict() | {"session": facts})
    elif options["stream"] and answer.text:
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


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked, checked as far as it can be before a model is opened (which may take a minute)."""

    skill: str
    pictures: tuple[str, ...]
    text: str
    length: str
    reasoning: bool
    refs: tuple[Any, ...]
    eye: tuple[float, float] | None
    face: tuple[float, float, float, float] | None
    sampling: dict[str, Any]

    def ask(self, model: Model) -> Answer:
        """Ask the model."""
        if len(self.pictures) > 1:
            return model.chat([{"role": "user", "content": [*self.pictures, self.text]}], **self.sampling)
        picture = self.pictures[0] if self.pictures else None
        if self.skill == "query":
            refs, reasoning = self.refs, self.reasoning
            return model.query(picture, self.text, reasoning=reasoning, spatial_refs=refs, **self.sampling)
        assert picture is not None
        if self.skill == "caption":
            return model.caption(picture, self.length, **self.sampling)
        if self.skill == "gaze":
            return model.gaze(picture, self.eye, face=self.face, **self.sampling)
        return (model.detect if self.skill == "detect" else model.point)(picture, self.text, **self.sampling)


def _request(image: str, question: str | None, options: dict[str, Any]) -> Request:
    from vlmedge.generate import Sampler
    from vlmedge.picture import check_picture

    pictures = tuple(picture_path(name) for name in (image, *options["more"]) if name != "-")
    looks = options["eye"] is not None or options["face"] is not None
    skill = options["skill"] or ("gaze" if looks else "query" if question else "caption")
    _check_unused(skill, question, options)
    refs = tuple(_numbers(text, (2, 4), "--ref") for text in options["refs"])
    eye: Any = None if options["eye"] is None else _numbers(options["eye"], (2,), "--eye")
    face: Any = None if options["face"] is None else _numbers(options["face"], (4,), "--face")
    Sampler(options["temperature"], seed=options["seed"])  # refuses nan and the like before a model is opened
    text = (question if skill == "query" else options["thing"] or question) or ""
    if skill != "query" and len(pictures) != 1:
        raise UsageError(f"{skill} takes exactly one picture, not {len(pictures)}")
    if len(pictures) > 1 and (refs or options["reasoning"]):
        raise UsageError("--ref and --reasoning go with one picture")
    if skill in ("query", "detect", "point") and not text:
        raise UsageError(f"{skill} needs {'a QUESTION' if skill == 'query' else '--object NAME'}")
    if skill == "gaze" and (eye is None) == (face is None):
        raise UsageError("gaze needs --eye X,Y or --face X,Y,X2,Y2")
    for picture in pictures:
        check_picture(picture)
    sampling: dict[str, Any] = {key: options[key] for key in ("max_tokens", "temperature", "seed")}
    if options["stream"]:
        sampling["on_token"] = lambda piece: click.echo(piece, nl=False)
    length, reasoning = options["length"] or "normal", options["reasoning"]
    return Request(skill, pictures, text, length, reasoning, refs, eye, face, sampling)


def _check_unused(skill: str, question: str | None, options: dict[str, Any]) -> None:
    """Raise UsageError for what the skill would ignore."""
    users = {
        "refs": ("--ref", ("query",)),
        "reasoning": ("--reasoning", ("query",)),
        "thing": ("--object", ("detect", "point")),
        "length": ("--length", ("caption",)),
        "eye": ("--eye", ("gaze",)),
        "face": ("--face", ("gaze",)),
    }
    for key, (option, skills) in users.items():
        if options[key] and skill not in skills:
            raise UsageError(f"{option} goes with --skill {' or '.join(skills)}, this is {skill}")
    if question and skill in ("caption", "gaze"):
        raise UsageError(f"{skill} takes no QUESTION; leave it out, or use --skill query")
    if question and options["thing"]:
        raise UsageError(f"{skill} takes one name: --object, or the QUESTION in its place")


def _numbers(text: str, counts: tuple[int, ...], option: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in counts or not all(0 <= value <= 1 for value in values):
        wanted = " or ".join(map(str, counts))
        raise UsageError(f"{option} takes {wanted} numbers of 0..1 with commas between, not '{text}'")
    if len(values) == 4 and not (values[0] < values[2] and values[1] < values[3]):
        raise UsageError(f"{option} takes a box with X < X2 and Y < Y2, not '{text}'")
    return values


def _draw(answer: Answer, request: Request, out: Path) -> None:
    from vlmedge.drawing import draw, save
    from vlmedge.picture import load_picture

    label = request.text if request.skill in ("detect", "point") else request.skill
    save(draw(load_picture(request.pictures[0]), answer.boxes, answer.points, label), out)
