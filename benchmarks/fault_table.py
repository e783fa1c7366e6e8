"""Every fault of `vlmedge.parity.faults` planted into every export: which stage of the gate catches it?

    python benchmarks/fault_table.py [--faults NAME ...] [--formats gguf onnx] [--profiles f32 ...] [--json] [--docs]

The table is that of docs/faults.md, which --docs writes. A fault's effect is the relative RMS difference of what the
faulty export gives from what the right one of the same format gives, at f32: of the logits of two prompts, of the first
answered token's logits, of the region heads. A profile's own loss is the same difference of the right export at that
profile. Every profile's right exports are verified too, in all flavours; none may fail.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from vlmedge import pipeline
from vlmedge.bundle import Bundle
from vlmedge.exporters import EXPORTERS
from vlmedge.loading import Described, describe
from vlmedge.parity.examine import Ran
from vlmedge.parity.faults import FAULTS, Finding, Setting, attempt, examined, settled
from vlmedge.parity.metrics import pooled
from vlmedge.quant_profiles import profiles_for
from vlmedge.session import F32

ROOT = Path(__file__).parent.parent
# A tiny checkpoint of each family.
MODELS = {"moondream2": ROOT / "tests/data/moondream2/tiny-mha"}
PROFILES = {"gguf": ("f32", "f16", "q8", "q4"), "onnx": ("f32", "f16", "q8", "q4", "w8a8", "q4-fast", "turbo")}
DOCS = ROOT / "docs/faults.md"
BEGIN, END = "<!-- fault_table.py: begin -->", "<!-- fault_table.py: end -->"
LOSSLESS = ("f32", "f16")
RIGHT = ""  # the name of no fault
_CHUNK = 12
_THREADS = 1


@dataclass(frozen=True, slots=True)
class Task:
    """Some faults in one export of one model."""

    model: str
    format: str
    flavour: str
    profile: str
    faults: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Cell:
    """One fault in one export: the first stage that failed ("" where none did), all, and why.

    `planted`: False where this export cannot have the fault. `effect`: what was changed, by kind of numbers, beside
    the right export of the same profile; of the right export itself its loss, beside f32. Empty: nothing ran.
    """

    model: str
    format: str
    flavour: str
    profile: str
    fault: str
    planted: bool
    stage: str
    failing: tuple[str, ...]
    why: str
    effect: dict[str, float]


def main() -> None:
    """Run everything that was asked for; exit status 1 where the gate was wrong."""
    options = _options()
    cells = sorted(_measured(options), key=lambda c: (c.model, *_order(c)))
    text = "\n".join(_document(cells))
    print(json.dumps([asdict(c) for c in cells], indent=1) if options.json else text)
    if options.docs:
        before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
        DOCS.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    wrong = [c for c in cells if c.planted and (_alarm(c) or _hole(c, cells))]
    for c in wrong:
        what = f"{c.fault}: not caught, {_told(_effect(cells, c))}" if c.fault else f"right: {c.stage}: {c.why}"
        print(f"WRONG: {c.model} {c.format} {c.flavour} {c.profile} {what}", file=sys.stderr)
    sys.exit(bool(wrong))


def _measured(options: argparse.Namespace) -> list[Cell]:
    """The cells of runs before this one, and those that were missing."""
    cells = list(_kept(options.keep))
    tasks = list(_tasks(options, {(*_export_of(c), c.fault) for c in cells}))
    start = time.perf_counter()
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(run, task): task for task in tasks}
        for done, future in enumerate(as_completed(running), 1):
            found, task = future.result(), running[future]
            cells += found
            _keep(options.keep, found)
            missed = [c.fault or "right" for c in found if c.planted and bool(c.stage) != bool(c.fault)]
            where = f"{task.model} {task.format} {task.flavour} {task.profile}".replace("  ", " ")
            look = f"; look at {', '.join(missed)}" if missed else ""
            print(f"{done}/{len(tasks)} {time.perf_counter() - start:.0f} s: {where}{look}", file=sys.stderr)
    return cells


def _kept(file: Path | None) -> Iterator[Cell]:
    """Cells of a run before this one."""
    if file is not None and file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            data = json.loads(line)
            if data["fault"] == RIGHT or data["fault"] in FAULTS:
                yield Cell(**data | {"failing": tuple(data["failing"])})


def _keep(file: Path | None, cells: Iterable[Cell]) -> None:
    if file is not None:
        with file.open("a", encoding="utf-8") as out:
            out.writelines(json.dumps(asdict(cell)) + "\n" for cell in cells)


def run(task: Task) -> list[Cell]:
    """Plant a task's faults, one after the other."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        work = Path(folder)
        setting = settle(task, work / "right")
        right = examined(setting.bundle, setting.original, _THREADS)
        assert right.ran is not None, right.why
        cells = []
        for name in task.faults:
            if name == RIGHT:
                cells.append(_cell(task, name, right, _outputs(_f32(task.model, task.format))))
            else:
                found = attempt(FAULTS[name], setting, work / "faulty", _THREADS)
                cells.append(_cell(task, name, found, _outputs(right.ran)))
        return cells


def settle(task: Task, folder: Path) -> Setting:
    """Export without faults."""
    source, flavour = MODELS[task.model], task.flavour or None

    def export() -> Bundle:
        named: dict[str, Any] = {"flavour": flavour, "verify": False, "threads": _THREADS}
        return pipeline.export(source, task.format, task.profile, folder, **named)

    return settled(task.format, _found(task.model), export)


@lru_cache
def _found(model: str) -> Described:
    return describe(MODELS[model])


@lru_cache
def _f32(model: str, format: str) -> Ran:
    """The right export at f32."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        setting = settle(Task(model, format, "", "f32", ()), Path(folder) / "right")
        right = examined(setting.bundle, setting.original, _THREADS)
    assert right.ran is not None, right.why
    return right.ran


def _outputs(ran: Ran) -> dict[str, list[F32]]:
    """What is compared of two exports, by kind."""
    trace = ran.trace
    out = {"logits": [trace.small.logits, trace.stitched.logits]}
    steps = [f for f in trace.record.forwards if f.decodes and f.chooses]
    out |= {f"token {int(f.ids[0])}": [f.logits] for f in steps[:1] if f.ids is not None}
    return out | ({"regions": list(trace.regions.values())} if trace.regions else {})


def _cell(task: Task, fault: str, finding: Finding | None, right: dict[str, list[F32]]) -> Cell:
    effect: dict[str, float] = {}
    if finding is not None and finding.ran is not None:
        own = _outputs(finding.ran)
        for kind in own.keys() & right.keys():  # the first answered token, where it is the same one
            error = pooled(list(zip(own[kind], right[kind], strict=True)))[0]
            effect["token" if kind.startswith("token") else kind] = error if np.isfinite(error) else 9.99
    stage, failing, why = (finding.stage, finding.failing, finding.why) if finding else ("", (), "")
    there = finding is not None
    return Cell(task.model, task.format, task.flavour, task.profile, fault, there, stage, failing, why, effect)


def _tasks(options: argparse.Namespace, done: Collection[tuple[str, ...]]) -> Iterator[Task]:
    """What is not done yet; the right exports, of all profiles and flavours, first."""
    for model, format in itertools.product(MODELS, options.formats):
        for flavour, profile in itertools.product(EXPORTERS[format].flavours, profiles_for(format)):
            if (model, format, flavour, profile, RIGHT) not in done:
                yield Task(model, format, flavour, profile, (RIGHT,))
    for model, format in itertools.product(MODELS, options.formats):
        flavour = EXPORTERS[format].flavours[0]
        for profile in options.profiles or PROFILES[format]:
            left = [name for name in options.faults if (model, format, flavour, profile, name) not in done]
            if profile in profiles_for(format):
                chunks = [tuple(left[at : at + _CHUNK]) for at in range(0, len(left), _CHUNK)]
                yield from (Task(model, format, flavour, profile, chunk) for chunk in chunks)


def _order(cell: Cell) -> tuple[int, str, int, str]:
    names = list(FAULTS)
    profiles = PROFILES[cell.format]
    at = profiles.index(cell.profile) if cell.profile in profiles else len(profiles)
    return names.index(cell.fault) if cell.fault else -1, cell.format, at, cell.flavour


def _alarm(cell: Cell) -> bool:
    """A right export that failed."""
    return cell.fault == RIGHT and bool(cell.stage)


def _hole(cell: Cell, cells: Iterable[Cell]) -> bool:
    """A fault that was not caught although it changes more than the profile does; at f32 and f16, any."""
    if cell.fault == RIGHT or not cell.planted or cell.stage:
        return False
    if cell.profile in LOSSLESS:
        return True
    loss = _loss(cells, cell)
    return not loss or any(_effect(cells, cell).get(kind, 0.0) > loss[kind] for kind in loss)


def _loss(cells: Iterable[Cell], cell: Cell) -> dict[str, float]:
    """What the profile of a cell costs by itself."""
    same = [c for c in cells if c.fault == RIGHT and _export_of(c) == _export_of(cell)]
    return same[0].effect if same else {}


def _effect(cells: Iterable[Cell], cell: Cell) -> dict[str, float]:
    """What the fault of a cell does at f32, or where it cannot be planted there, in that very export."""
    same = [c for c in cells if (c.model, c.format, c.fault, c.profile) == (cell.model, cell.format, cell.fault, "f32")]
    return same[0].effect if same and same[0].planted else cell.effect


def _export_of(cell: Cell) -> tuple[str, str, str, str]:
    return cell.model, cell.format, cell.flavour, cell.profile


def _document(cells: Sequence[Cell]) -> Iterator[str]:
    """The tables of docs/faults.md."""
    for model in dict.fromkeys(c.model for c in cells):
        own = [c for c in cells if c.model == model]
        yield from ("", f"## {model}", "")
        yield from _summary(own)
        yield from _faults(own)
        yield from _losses(own)


def _summary(cells: Sequence[Cell]) -> Iterator[str]:
    planted = [c for c in cells if c.fault and c.planted]
    right = [c for c in cells if not c.fault]
    missed = [c for c in planted if not c.stage]
    caught, alarms = len(planted) - len(missed), sum(bool(c.stage) for c in right)
    yield f"{len({c.fault for c in planted})} faults, {len(planted)} faulty exports, {caught} caught."
    yield f"{len(right)} right exports, {alarms} failed."
    yield ""
    if missed:
        yield "Not caught, with what the fault changes and what the profile does by itself:"
        yield ""
        for c in missed:
            note = " (**a hole**)" if _hole(c, cells) else ""
            yield f"* `{c.fault}` in {c.format} {c.profile}: {_told(_effect(cells, c))}; {_told(_loss(cells, c))}{note}"
        yield ""


def _faults(cells: Sequence[Cell]) -> Iterator[str]:
    columns = list(dict.fromkeys((c.format, c.profile) for c in sorted(cells, key=_order_of_columns) if c.fault))
    yield "| fault | what | effect | " + " | ".join(f"{format} {profile}" for format, profile in columns) + " |"
    yield "|---" * (3 + len(columns)) + "|"
    for name in dict.fromkeys(c.fault for c in cells if c.fault):
        own = {(c.format, c.profile): c for c in cells if c.fault == name}
        there = [c for c in own.values() if c.planted]
        effects = [_effect(cells, c) for c in there]
        most = (
            {kind: max(e.get(kind, 0.0) for e in effects) for kind in ("logits", "token", "regions")} if there else {}
        )
        row = [_word(own[column]) if column in own else "" for column in columns]
        yield f"| `{name}` | {FAULTS[name].what} | {_told({k: v for k, v in most.items() if v})} | {' | '.join(row)} |"
    yield ""


def _losses(cells: Sequence[Cell]) -> Iterator[str]:
    """The right exports."""
    yield "| right export | outcome | loss |"
    yield "|---|---|---|"
    for c in cells:
        if not c.fault:
            outcome = f"failed at {c.stage}: {c.why}" if c.stage else "passed"
            yield f"| {c.format} {c.flavour} {c.profile}".replace("  ", " ") + f" | {outcome} | {_told(c.effect)} |"


def _order_of_columns(cell: Cell) -> tuple[str, int]:
    return cell.format, _order(cell)[2]


def _word(cell: Cell) -> str:
    if not cell.planted:
        return "·"
    return cell.stage or "**not caught**"


def _told(effect: dict[str, float]) -> str:
    """The largest first."""
    return (
        ", ".join(f"{kind} {value:.1e}" for kind, value in sorted(effect.items(), key=lambda e: -e[1]) if value) or "-"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", nargs="+", default=list(FAULTS), choices=list(FAULTS), metavar="NAME")
    parser.add_argument("--formats", nargs="+", default=list(PROFILES), choices=list(PROFILES))
    parser.add_argument("--profiles", nargs="+", help="by default those of the docs")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--keep", type=Path, metavar="FILE", help="JSON lines: add cells to it, repeat none of it")
    parser.add_argument("--json", action="store_true", help="print every cell as JSON")
    parser.add_argument("--docs", action="store_true", help=f"write the table into {DOCS.name}")
    return parser.parse_args()


if __name__ == "__main__":
    main()
