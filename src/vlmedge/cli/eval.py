"""vlmedge eval: how well bundles answer, beside each other and the original."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from vlmedge.cli.console import (
    json_option,
    megabytes,
    one_of,
    print_json,
    print_table,
    quiet_option,
    shown,
    threads_option,
)
from vlmedge.cli.options import pickle_option
from vlmedge.errors import UsageError, VlmedgeError

if TYPE_CHECKING:
    from vlmedge.evaluation.job import Runner
    from vlmedge.evaluation.statistics import Estimate
    from vlmedge.evaluation.summary import Evaluation

# The rows of the table; --json has every metric.
METRICS = {
    "right": "right",
    "exact": "exact text",
    "soft": "VQA soft score",
    "anls": "ANLS",
    "mean_iou": "mean IoU",
    "box_hits": "boxes hit",
    "point_hits": "points hit",
}


class _StoppedError(VlmedgeError):
    """Ctrl-C, which costs nothing."""

    exit_code = 130


def _shard(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[int, int]:
    """(I, N) of I/N."""
    if value is None:
        return 0, 1
    index, _, count = value.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UsageError(f"--shard takes I/N with I from 0 to N - 1, such as 0/4, not '{value}'")
    return int(index), int(count)


@click.command("eval")
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.option(
    "--data", metavar="demo|FILE.jsonl", default="demo", show_default=True, help="The questions (docs/eval.md)."
)
@click.option(
    "--pictures", type=click.IntRange(1), metavar="N", help="The first N only [default: 100 of demo, else all]."
)
@click.option("--original", metavar="CHECKPOINT", help="Ask it too, and compare the others with it.")
@click.option("--shard", callback=_shard, metavar="I/N", help="Every N-th picture from the I-th on (0 to N - 1).")
@click.option("--ray", "address", metavar="ADDRESS", help="Share the work out on a Ray cluster (extra 'ray').")
@click.option("--out", metavar="DIR", help="Keep the answers here, and go on from them [default: eval-...].")
@click.option("--runtime", metavar="NAME", help="Of bundles [default: the one for the format].")
@click.option(
    "--dtype",
    callback=one_of("f32", "bf16", "f16"),
    default="f32",
    show_default=True,
    metavar="f32|bf16|f16",
    help="Of checkpoints.",
)
@click.option("--max-tokens", type=click.IntRange(1), metavar="N", help="Stop a text after N tokens.")
@pickle_option
@threads_option
@quiet_option
@json_option
def command(
    sources: tuple[str, ...],
    data: str,
    pictures: int | None,
    original: str | None,
    shard: tuple[int, int],
    address: str | None,
    out: str | None,
    runtime: str | None,
    dtype: str,
    max_tokens: int | None,
    allow_pickle: bool,
    threads: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Ask each SOURCE (a bundle, or a checkpoint) a set of picture questions and count what is right.

    Answers are kept as they come; the same command goes on where it stopped, and puts shards together.
    """
    from vlmedge.evaluation.evaluate import Settings, evaluate

    settings = Settings(runtime, threads, dtype, max_tokens, allow_pickle)
    try:
        with shown(quiet or as_json) as progress:
            found = evaluate(
                sources,
                data,
                original=original,
                pictures=pictures,
                shard=shard,
                out=out,
                settings=settings,
                runner=_runner(address),
                progress=progress,
            )
    except KeyboardInterrupt:
        raise _StoppedError(
            "interrupted; the answers so far are kept, and the same command goes on from there"
        ) from None
    if as_json:
        print_json(found.as_dict())
    else:
        _print(found)


def _runner(address: str | None) -> Runner:
    """Who answers: this process, or a cluster."""
    from functools import partial

    from vlmedge.evaluation.job import run_here

    if address is None:
        return run_here
    from vlmedge.evaluation import cluster

    return partial(cluster.run, address=address)


def _print(found: Evaluation) -> None:
    _print_scores(found)
    _print_pairs(found)
    click.echo(f"every answer is in {found.folder}; in brackets: 95 % intervals over pictures")
    for score in found.scores:
        if score.unasked:
            click.echo(f"{score.subject.label} has no skill for {score.unasked} of the questions; they are left out")
        if score.failed:
            click.echo(f"{score.subject.label}: {score.failed} questions did not fit its context and count as wrong")
    if not found.complete:
        counts = ", ".join(f"{s.answered} of {found.questions}" for s in found.scores)
        click.echo(
            f"not complete ({counts} answered): without --shard and with --out {found.folder} the same command "
            "puts every shard's answers there together and asks what is missing"
        )


def _print_scores(found: Evaluation) -> None:
    """A column per model: size and time, the metrics, and what is right by kind where there are several kinds."""
    kinds = sorted({kind for score in found.scores for kind in score.kinds})
    rows = [["size", *(megabytes(s.subject.bytes) for s in found.scores)]]
    rows += [["median answer", *(f"{s.ms:,.0f} ms" for s in found.scores)]]
    for name, title in METRICS.items():
        if any(name in s.metrics for s in found.scores):
            rows.append([title, *(_shown(s.metrics.get(name), name != "mean_iou") for s in found.scores)])
    for kind in kinds if len(kinds) > 1 else ():
        rows.append([f"right: {kind}", *(_shown(s.kinds.get(kind)) for s in found.scores)])
    labels = [f"{s.subject.label}{' (original)' * s.original}" for s in found.scores]
    pictures = f"{found.pictures} picture{'s' * (found.pictures > 1)}"
    click.echo(f"{found.data}: {found.questions} questions about {pictures}")  # a table folds its title
    print_table("", ("", *labels), rows, right=labels)


def _print_pairs(found: Evaluation) -> None:
    """A column per model that is compared with the first."""
    if not found.pairs:
        return
    pairs = found.pairs
    rows = [
        ["right", *(_difference(p.differences.get("right"), True) for p in pairs)],
        ["", *(p.verdict for p in pairs)],
        ["mean IoU", *(_difference(p.differences.get("mean_iou"), False) for p in pairs)],
        ["lost", *(str(p.lost) for p in pairs)],
        ["won", *(str(p.won) for p in pairs)],
        ["p of lost and won", *(f"{p.p:.3g}" for p in pairs)],
        ["same answers", *(f"{p.same:.1%}" for p in pairs)],
    ]
    click.echo(f"compared with {pairs[0].base}")
    labels = [p.label for p in pairs]
    print_table("", ("", *labels), rows, right=labels)


def _shown(found: Estimate | None, percent: bool = True) -> str:
    """A mean with its interval, such as 93.1 % (91.0-95.0)."""
    return _with_interval(found, percent, "", " %", "-")


def _difference(found: Estimate | None, percent: bool) -> str:
    """A difference with its interval, in percentage points or as it is."""
    return _with_interval(found, percent, "+", " points", " to ")


def _with_interval(found: Estimate | None, percent: bool, sign: str, unit: str, to: str) -> str:
    if found is None:
        return ""
    factor, form = (100, f"{sign}.1f") if percent else (1, f"{sign}.3f")
    value = f"{found.value * factor:{form}}{unit if percent else ''}"
    if found.low is None or found.high is None:
        return value
    return f"{value} ({found.low * factor:{form}}{to}{found.high * factor:{form}})"
