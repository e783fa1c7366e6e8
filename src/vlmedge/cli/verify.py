"""vlmedge verify: a bundle held against its checkpoint, stage by stage."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlmedge.cli.console import (
    json_option,
    one_of,
    print_json,
    print_table,
    quiet_option,
    short_number,
    shown,
    threads_option,
)
from vlmedge.cli.options import pickle_option, provider_option
from vlmedge.errors import OutputError, UsageError

if TYPE_CHECKING:
    from vlmedge.parity.report import Report, StageResult
    from vlmedge.progress import Progress


@click.command("verify")
@click.argument("bundle")
@click.option(
    "--against", metavar="CHECKPOINT", help="The original [default: the one that BUNDLE names, where it can be had]."
)
@click.option("--images", metavar="DIR", help="Pictures of your own, beside those that are made from formulas.")
@click.option("--report", metavar="OUT.html|.md|.json", help="Write the whole report.")
@click.option("--runtime", metavar="NAME", help="[default: the one for the bundle's format]")
@provider_option
@click.option("--ablate", is_flag=True, help="Also quantize one part at a time, and show what each costs and saves.")
@click.option(
    "--data", metavar="demo|FILE.jsonl", help="With --ablate: questions to ask [default: demo's, for a demo]."
)
@click.option(
    "--dtype",
    callback=one_of("f32", "bf16", "f16"),
    metavar="f32|bf16|f16",
    help="Of the original that is asked --data [default: f32].",
)
@click.option("--pictures", type=click.IntRange(1), metavar="N", help="Of --data, the first N [default: 20 of demo].")
@pickle_option
@threads_option
@quiet_option
@json_option
def command(
    bundle: str,
    against: str | None,
    images: str | None,
    report: str | None,
    runtime: str | None,
    provider: str | None,
    ablate: bool,
    data: str | None,
    dtype: str | None,
    pictures: int | None,
    allow_pickle: bool,
    threads: int | None,
    quiet: bool,
    as_json: bool,
) -> int:
    """Compare BUNDLE with the original and name the first stage at which they part. Exit code 1 where one fails."""
    _check_unused(ablate, (data, pictures, dtype), (runtime, provider))
    write = _writer(report)
    from vlmedge.parity.verify import pictures_in, verify

    if images is not None and not os.path.isdir(images):
        raise UsageError(f"--images takes a folder of pictures; {images} is none")
    own = pictures_in(images) if images is not None else {}
    if images is not None and not own:
        raise UsageError(f"{images} holds no pictures")
    given: dict[str, Any] = {"threads": threads, "allow_pickle": allow_pickle}
    with shown(quiet or as_json) as progress:
        if ablate:
            found = _ablated(bundle, against, own, data, pictures, progress, given | {"dtype": dtype or "f32"})
        else:
            found = verify(bundle, against, own, runtime=runtime, provider=provider, progress=progress, **given)
    if as_json:
        print_json(found.as_dict())
    else:
        _print(found)
    write(found)  # last: a full disk shall not cost the result
    return 0 if found.passed else 1


_DEMO_PICTURES = 20


def _check_unused(ablate: bool, asking: Sequence[object], choices: Sequence[object]) -> None:
    if any(given is not None for given in asking) and not ablate:
        raise UsageError("--data, --pictures and --dtype go with --ablate; 'vlmedge eval' asks without it")
    if ablate and any(choices):
        raise UsageError("--runtime and --provider do not go with --ablate, which measures weights")


def _ablated(
    bundle: str,
    against: str | None,
    own: Mapping[str, Path],
    data: str | None,
    pictures: int | None,
    progress: Progress,
    given: dict[str, Any],
) -> Report:
    from vlmedge.ablation import ablate, questions_for

    asked = data or questions_for(Path(bundle), against)
    count = pictures or (_DEMO_PICTURES if asked == "demo" else None)
    return ablate(bundle, against, own, data=asked, pictures=count, progress=progress, **given)


def _writer(path: str | None) -> Callable[[Report], None]:
    """What writes the report, found out before anything runs."""
    if path is None:
        return lambda report: None
    from vlmedge.parity.written import ENDINGS, write_report

    target = Path(path)
    if target.suffix.lower() not in ENDINGS or target.is_dir():
        raise UsageError(f"--report takes a name that ends in {', '.join(ENDINGS)}, not '{target.name}'")
    if not target.absolute().parent.is_dir():
        raise OutputError(f"{target} cannot be written: there is no folder {target.parent}")
    return lambda report: write_report(report, target)


def _print(report: Report) -> None:
    from vlmedge.parity.report import TITLES

    rows = [
        (
            TITLES[s.stage],
            s.against or "",
            s.outcome,
            short_number(s.relative_rms),
            short_number(s.limit),
            short_number(s.max_abs),
            _more(s),
        )
        for s in report.stages
    ]
    columns = ("stage", "against", "outcome", "relative RMS", "limit", "largest", "")
    print_table("", columns, rows, right=("relative RMS", "limit", "largest"))
    if report.parts:
        _print_parts(report)
    for note in report.notes:
        click.echo(f"note: {note}")
    what = f"{report.bundle} ({report.format} {report.profile}, {report.runtime})"
    if report.failing is None:
        against = report.source or "the reference on its own weights"
        if report.close:
            click.echo(f"{what} agrees with {against}, {report.seconds:.1f} s")
        else:
            share = 1 - (report.agreement or 0.0)
            click.echo(f"{what} is {against}, rightly exported, and chooses other words {share:.0%} of the time")
            click.echo("its profile is too coarse for this model: --ablate shows which part pays, more bits help")
        return
    stage = report.stages[report.failing]
    against = f" (against {stage.against})" if stage.against else ""
    click.echo(f"{what} FAILS at {TITLES[stage.stage]}{against}: {stage.why}")
    click.echo(f"usually: {report.cause}")


def _print_parts(report: Report) -> None:
    """What each part costs."""
    from vlmedge.parity import parts

    click.echo(parts.sentence(report))
    titles = parts.columns(report)
    print_table("", ("part", *titles), parts.rows(report), right=titles)


def _more(stage: StageResult) -> str:
    """What a person wants to know beside the numbers: the choices of tokens and boxes."""
    numbers = stage.numbers or {}
    words = []
    if "top1" in numbers:
        words.append(f"top-1 {numbers['top1']:.0%} of {numbers['positions']:.0f}")
        words.append(f"KL {numbers['kl_mean']:.1e} (p99 {numbers['kl_p99']:.1e})")
    if "first_divergence" in numbers:
        words.append(f"first different {numbers['first_divergence']:.0f}")
    if "iou" in numbers:
        words.append(f"IoU {numbers['iou']:.3f}")
    if stage.ambiguous:
        words.append(f"{stage.ambiguous} near ties")
    return ", ".join(words) or (stage.why if stage.outcome in ("skipped", "failed") else "")
