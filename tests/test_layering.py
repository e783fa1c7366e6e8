"""Imports go down, never up or sideways: the table of DESIGN section 1, held against the code."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "vlmedge": ROOT / "src/vlmedge",
    "vlmedge.exporters": ROOT / "exporters",
    "vlmedge.quant_profiles": ROOT / "quant_profiles",
    "vlmedge.device_bench": ROOT / "device_bench",
}

# From the roof to the floor. A room may import rooms of lower rows only.
ROWS = (
    ("__main__",),
    ("cli",),
    ("ablation",),
    ("pipeline", "evaluation"),
    ("parity", "device_bench", "demo", "manifest"),
    ("subject",),
    ("loading",),
    ("exporters", "reference", "contract"),
    ("runtimes",),
    ("families", "bundle", "quant_profiles", "skills", "drawing", "sources"),
    ("regions",),
    ("prompt", "generate", "imaging", "picture", "hub"),
    ("selection", "checkpoint", "jsonlines"),
    (
        "pickles",
        "tensorfile",
        "weights",
        "registry",
        "schema",
        "answer",
        "measure",
        "progress",
        "staging",
        "raycluster",
        "limits",
        "scoring",
    ),
    ("tensors", "records", "relay"),
    ("session",),
    ("spec", "errors", "webpage", "mlprogram"),
)
ROW_OF = {room: number for number, row in enumerate(ROWS) for room in row}


def modules():
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join([package, *(p for p in parts if p != "__init__")]), path


def room(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from vlmedge import imaging` imports a room; `from vlmedge import __version__` does not.
            yield from (f"{node.module}.{a.name}" if node.module == "vlmedge" else node.module for a in node.names)


def test_every_room_has_a_row():
    assert {room(m) for m, _ in modules()} - {None} == set(ROW_OF) - {"mlprogram"}


def test_the_documented_rows_are_these():
    block = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").split("```")[1]
    rows = [line.split() for line in block.strip().splitlines()]
    documented = {room for row in ROWS for room in row} - {"mlprogram"}
    assert [tuple(w for w in row if w in documented) for row in rows] == [
        tuple(room for room in row if room in documented) for row in ROWS
    ]


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=lambda v: v if isinstance(v, str) else "")
def test_imports_go_down(module, path):
    here = room(module)
    if here is None:
        return  # the package's own __init__: it re-exports lazily and imports only errors at run time
    for name in imports(path):
        target = room(name) if name.split(".")[0] == "vlmedge" else None
        if target is None or target == here or target.startswith("__version"):
            continue
        assert ROW_OF[here] < ROW_OF[target], f"{module} imports {name}"


HEAVY = {
    "gguf": {"exporters.gguf", "runtimes"},
    "torch": {"reference", "demo", "pickles"},
    "llama_cpp": {"runtimes", "exporters.gguf"},
}


@pytest.mark.parametrize("package", HEAVY)
def test_a_formats_writer_stays_in_its_room(package):
    for module, path in modules():
        if any(name.split(".")[0] == package for name in imports(path)):
            assert any(module.startswith(f"vlmedge.{allowed}") for allowed in HEAVY[package]), module
