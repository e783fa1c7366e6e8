"""What a runtime is given when a bundle is opened: the manifest's facts, the user's wishes, a place for a cache."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import vlmedge
from vlmedge.bundle import MANIFEST, open_bundle
from vlmedge.errors import UsageError
from vlmedge.exporters.choice import Choice, choose
from vlmedge.exporters.gguf.exporter import GgufExporter
from vlmedge.loading import describe, open_model
from vlmedge.manifest import component_entries, memory_entry
from vlmedge.pipeline import _folder_name
from vlmedge.quant_profiles import load_profile
from vlmedge.registry import Registry
from vlmedge.runtimes import Opening, Runtime
from vlmedge.runtimes.cache import cache_folder


class Refusing:
    """A runtime of GGUF bundles that notes what it is given, and has nothing to answer with."""

    def __init__(self) -> None:
        self.openings: list[Opening] = []
        self.runtime = Runtime("noting", "gguf", lambda: None, self.open, lambda: {"cpu": "", "cuda": ""})

    def open(self, opening: Opening) -> Any:
        self.openings.append(opening)
        raise UsageError("noted")


@pytest.fixture
def noting(monkeypatch) -> Refusing:
    """The runtime, registered as "noting"."""
    found, module = Refusing(), ModuleType("noting")
    module.__dict__["RUNTIME"] = found.runtime
    monkeypatch.setitem(sys.modules, "noting", module)
    monkeypatch.setattr("vlmedge.loading.RUNTIMES", Registry("runtime", {"noting": "noting:RUNTIME"}))
    return found


def rewrite(folder: Path, change) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    (folder / MANIFEST).write_text(json.dumps(data))


def test_a_runtime_gets_what_the_manifest_says(noting, bundle_copy):
    def onnx_like(data: dict[str, Any]) -> None:
        data["flavour"], data["profile"]["kv_cache"] = "portable", "int8"

    rewrite(bundle_copy, onnx_like)
    with pytest.raises(UsageError, match="noted"):
        vlmedge.load(bundle_copy, "noting", 3, provider="cuda", context=800)
    (opening,) = noting.openings
    assert (opening.kv_cache, opening.flavour, opening.provider, opening.threads) == ("int8", "portable", "cuda", 3)
    assert (opening.folder, opening.spec.decoder.context) == (bundle_copy, 800)


def test_a_bundle_of_before_there_were_flavours_opens(bundle_copy):
    rewrite(bundle_copy, lambda data: data.pop("flavour"))
    assert open_bundle(bundle_copy).manifest.flavour == ""


def test_only_lean_memory_has_a_cache(noting, bundle, monkeypatch, tmp_path):
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for memory in ("fast", "lean"):
        with pytest.raises(UsageError, match="noted"):
            vlmedge.load(bundle, "noting", memory=memory)
    with pytest.raises(UsageError, match="noted"):
        open_model(open_bundle(bundle), "noting", memory="lean")
    assert [opening.cache for opening in noting.openings] == [None, tmp_path / "vlmedge", None]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("system", "variable", "rest"),
    [
        ("Linux", "XDG_CACHE_HOME", ".cache"),
        ("Darwin", "", "Library/Caches"),
        ("Windows", "LOCALAPPDATA", "AppData/Local"),
    ],
)
def test_where_caches_lie(monkeypatch, tmp_path, system, variable, rest):
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, "relative/to/nothing")
    assert cache_folder() == tmp_path / rest / "vlmedge"
    if variable:
        monkeypatch.setenv(variable, str(tmp_path / "mine"))
        assert cache_folder() == tmp_path / "mine/vlmedge"


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr(Path, "home", homeless)
    assert cache_folder() is None


class TwoWays(GgufExporter):
    """GGUF with a second flavour, which it cannot write."""

    flavours = ("plain", "fancy")


def test_flavours_are_chosen_by_name(monkeypatch, golden):
    module = ModuleType("two_ways")
    module.__dict__["EXPORTER"] = TwoWays()
    monkeypatch.setitem(sys.modules, "two_ways", module)
    monkeypatch.setattr("vlmedge.exporters.choice.EXPORTERS", Registry("format", {"gguf": "two_ways:EXPORTER"}))
    assert [choose("gguf", flavour=f).flavour for f in (None, "plain", "fancy")] == ["plain", "plain", "fancy"]
    with pytest.raises(UsageError, match="gguf has no flavour 'fanci'; did you mean 'fancy'"):
        choose("gguf", flavour="fanci")
    names = [_folder_name(describe(golden), choose("gguf", "q8", f)) for f in ("plain", "fancy")]
    assert names == ["tiny-mha-q8.gguf", "tiny-mha-q8-fancy.gguf"]


def test_an_order_is_written_for_what_the_format_keeps(golden):
    spec = describe(golden).spec
    for wanted, kept in (("f32", "f32"), ("f16", "f16"), ("int8", "f16")):
        choice = choose("gguf", "q4")
        order = Choice(choice.exporter, replace(choice.profile, kv_cache=wanted), "").order(spec, 5_000_000)
        assert (order.kv_cache, order.max_part, order.prefill) == (kept, 5_000_000, {})
    turbo = Choice(choice.exporter, load_profile("turbo"), "").order(spec)
    assert len(turbo.prefill) == 6 * spec.decoder.layers


@pytest.mark.parametrize(("kv_cache", "size"), [("f32", 4), ("f16", 2), ("int8", 1)])
def test_memory_of_the_kv_cache(golden, kv_cache, size):
    spec = describe(golden).spec
    entries = component_entries(spec, choose("gguf").exporter.encodings(choose("gguf").order(spec)))
    d, memory = spec.decoder, memory_entry(spec.decoder, entries, kv_cache)
    assert memory.kv_per_position == 2 * d.layers * d.kv_heads * d.head_dim * size
    assert memory.kv_context == memory.kv_per_position * d.context
