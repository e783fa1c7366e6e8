"""Which graphs an export has, and in which data file, at which offset, each stored array lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vlmedge.exporters.base import Order
from vlmedge.exporters.onnx.decoder import decoder_model, embed_tokens
from vlmedge.exporters.onnx.flavour import flavour_of, kv_type
from vlmedge.exporters.onnx.graph import Graph
from vlmedge.exporters.onnx.kinds import F32, Kind, wanted
from vlmedge.exporters.onnx.projector import vision_projection
from vlmedge.exporters.onnx.region import HEADS, region_head
from vlmedge.exporters.onnx.store import Section, Store
from vlmedge.exporters.onnx.vision import vision_encoder
from vlmedge.quant_profiles import Scheme

FOLDER = "onnx"
DECODER, PREFILL = "decoder_model_merged", "decoder_prefill"
PAGED_FROM, PAGE, LINE = 1 << 20, 1 << 16, 64  # large arrays begin on pages, so that they can be mapped


@dataclass(frozen=True, slots=True)
class Built:
    """Every graph of an export, and what they store together."""

    graphs: tuple[Graph, ...]
    store: Store
    sizes: Mapping[str, int]


def build(order: Order) -> Built:
    """Build every graph and place every stored array; no weight is read.

    Raises UnsupportedError for a scheme that ONNX has no kind for.
    """
    spec = order.spec
    store = Store(spec.tensors())
    kinds = _kinds(store, order.plan)
    flavour = flavour_of(order.flavour)
    kv = kv_type(order.kv_cache, flavour)
    prefix = spec.image_tokens + 1

    def graph(name: str, kinds: Mapping[str, Kind] = kinds, prefill: frozenset[str] = frozenset()) -> Graph:
        graphs.append(Graph(name, flavour, store, kinds, prefill))
        return graphs[-1]

    graphs: list[Graph] = []
    decoder_model(graph(DECODER), spec.decoder, kv, prefix)
    if order.prefill:
        other = kinds | _kinds(store, order.prefill)
        decoder_model(graph(PREFILL, other, frozenset(order.prefill)), spec.decoder, kv, prefix)
    embed_tokens(graph("embed_tokens"), spec.decoder)
    vision_encoder(graph("vision_encoder"), spec.vision)
    vision_projection(graph("vision_projection"), spec)
    for head in HEADS if spec.region else ():
        region_head(graph(f"region_{head}"), spec, head)
    return Built(tuple(graphs), store, _placed(store, order.max_part))


def _kinds(store: Store, plan: Mapping[str, Scheme]) -> dict[str, Kind]:
    """Each tensor's kind; vectors are f32."""
    out = {name: wanted(scheme) for name, scheme in plan.items()}
    return out | {name: F32 for name, shape in store.shapes.items() if len(shape) < 2 and name in out}


def _placed(store: Store, max_part: int) -> dict[str, int]:
    """Give every section its file and offset; return the bytes of each data file."""
    sizes: dict[str, int] = {}
    parts: dict[str, int] = {}
    for graph, section in store.sections():
        part = parts.setdefault(graph, 0)
        start = _start(section, sizes.get(data_file(graph, part), 0))
        if start and start + section.bytes > max_part:
            part = parts[graph] = part + 1
            start = 0
        section.file, section.offset = data_file(graph, part), start
        sizes[section.file] = start + section.bytes
    return sizes


def data_file(graph: str, part: int) -> str:
    """`GRAPH.onnx_data`, then `GRAPH.onnx_data_1` and so on, as transformers.js counts them."""
    return f"{graph}.onnx_data" + (f"_{part}" if part else "")


def _start(section: Section, end: int) -> int:
    step = PAGE if section.bytes >= PAGED_FROM else LINE
    return -(-end // step) * step
