"""Faults in what a bundle says and in its tokenizer: prompts, pictures, merges."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from vlmedge.bundle import Bundle, Manifest
from vlmedge.parity.faults.fault import Fault, Target, Written, everywhere
from vlmedge.spec import Ids, ImageSpec, Part, PromptSpec, Template, Text

_BLANK = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
_OTHER: dict[str, Literal["lanczos", "bicubic"]] = {"lanczos": "bicubic", "bicubic": "lanczos"}


def stale(tokenizer: bytes) -> bytes:
    """A tokenizer.json of BPE as an older release has it: without the last tenth of its merges."""
    data = json.loads(tokenizer)
    merges = data["model"]["merges"]
    data["model"]["merges"] = merges[: len(merges) - max(1, len(merges) // 10)]
    return json.dumps(data, ensure_ascii=False).encode()


def _fault(
    name: str,
    what: str,
    change: Callable[[Manifest], Manifest],
    stages: tuple[str, ...],
    applies: Callable[[Target], bool] = everywhere,
) -> Fault:
    return Fault(name, what, Written(lambda b: replace(b, manifest=change(b.manifest))), stages, applies)


def _prompt(change: Callable[[PromptSpec], PromptSpec]) -> Callable[[Manifest], Manifest]:
    return lambda m: replace(m, model=replace(m.model, prompt=change(m.model.prompt)))


def _image(change: Callable[[ImageSpec], ImageSpec]) -> Callable[[Manifest], Manifest]:
    return lambda m: replace(m, model=replace(m.model, image=change(m.model.image)))


def _templates(change: Callable[[Template], Template]) -> Callable[[Manifest], Manifest]:
    return _prompt(lambda p: replace(p, templates={name: change(parts) for name, parts in p.templates.items()}))


def _another_token(template: Template) -> Template:
    """The last literal id is that of its neighbour."""
    at = max(i for i, part in enumerate(template) if isinstance(part, Ids)) if _has_ids(template) else -1
    return tuple(_next(part) if i == at else part for i, part in enumerate(template))


def _has_ids(template: Template) -> bool:
    return any(isinstance(part, Ids) for part in template)


def _next(part: Part) -> Part:
    return Ids((*part.ids[:-1], part.ids[-1] + 1)) if isinstance(part, Ids) else part


def _without_bos(template: Template) -> Template:
    return template[1:] if template and isinstance(template[0], Ids) else template


def _without_blank(template: Template) -> Template:
    return tuple(Text(part.text.lstrip(" ")) if isinstance(part, Text) else part for part in template)


def _tokenizer(change: Callable[[bytes], bytes]) -> Written:
    def changed(bundle: Bundle) -> Bundle:
        file = bundle.path / bundle.manifest.tokenizer.file
        file.write_bytes(change(file.read_bytes()))
        return bundle

    return Written(changed)


def edited(key: str, value: Any) -> Callable[[bytes], bytes]:
    """A tokenizer.json with another value under one key."""
    return lambda content: json.dumps({**json.loads(content), key: value}, ensure_ascii=False).encode()


def _size_scale(manifest: Manifest) -> Manifest:
    region = manifest.model.region
    assert region is not None
    other: Literal["log2", "linear"] = "linear" if region.size_scale == "log2" else "log2"
    return replace(manifest, model=replace(manifest.model, region=replace(region, size_scale=other)))


def _told(part: Literal["image", "prompt"], *path: str, value: Callable[[Any], Any]) -> Callable[[Manifest], Manifest]:
    """What the manifest tells apps in other languages, changed at one place."""

    def change(manifest: Manifest) -> Manifest:
        words: dict[str, Any] = json.loads(json.dumps(getattr(manifest, part)))
        place = words
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value(place[path[-1]])
        changes: dict[str, Any] = {part: words}
        return replace(manifest, **changes)

    return change


def _flip(bundle: Bundle) -> Bundle:
    """One bit in the middle of the largest file."""
    entry = max(bundle.manifest.files, key=lambda e: e.bytes)
    with (bundle.path / entry.path).open("r+b") as file:
        file.seek(entry.bytes // 2)
        byte = file.read(1)[0]
        file.seek(entry.bytes // 2)
        file.write(bytes([byte ^ 1]))
    return bundle


MANIFEST = (
    Fault("bit-flipped", "a bit of a weight file flipped in a copy", Written(_flip, rehash=False), ("files",)),
    _fault("template-token", "the templates' last literal token is its neighbour", _templates(_another_token),
           ("prompt",), lambda target: any(map(_has_ids, target.spec.prompt.templates.values()))),
    _fault("template-bos", "templates without their first token", _templates(_without_bos), ("prompt",)),
    _fault("template-blank", "templates without the blank before the text", _templates(_without_blank), ("prompt",),
           lambda target: any(_without_blank(t) != t for t in target.spec.prompt.templates.values())),
    _fault("stop-token", "another stop token", _prompt(lambda p: replace(p, stop=tuple(i + 1 for i in p.stop))),
           ("prompt",)),
    _fault("bans-forgotten", "no banned tokens", _prompt(lambda p: replace(p, banned=())), ("prompt",),
           lambda target: bool(target.spec.prompt.banned)),
    Fault("merges-stale", "a tokenizer without the last tenth of its merges", _tokenizer(stale), ("prompt",)),
    Fault("tokens-not-added", "a tokenizer without its added tokens", _tokenizer(edited("added_tokens", [])),
          ("prompt",)),
    Fault("blank-before", "a tokenizer that puts a blank before every text",
          _tokenizer(edited("pre_tokenizer", _BLANK)), ("prompt",)),
    _fault("size-scale", "sizes on the other scale, by the manifest", _size_scale, ("facts",),
           lambda target: target.spec.region is not None),
    _fault("margin-fact", "crops overlap by one patch less, by the manifest",
           _image(lambda i: replace(i, tiling=replace(i.tiling, margin=i.tiling.margin - 1))), ("facts",)),
    _fault("crops-fact", "one crop fewer, by the manifest",
           _image(lambda i: replace(i, tiling=replace(i.tiling, max_crops=i.tiling.max_crops - 1))), ("facts",)),
    _fault("resample-fact", "another filter, by the manifest",
           _image(lambda i: replace(i, resample=_OTHER[i.resample])), ("facts",)),
    _fault("std-fact", "another deviation of pixels, by the manifest",
           _image(lambda i: replace(i, std=(0.3, 0.3, 0.3))), ("facts",)),
    _fault("told-filter", "apps are told another filter", _told("image", "resize", "filter", value=_OTHER.get),
           ("facts",)),
    _fault("told-mean", "apps are told another mean",
           _told("image", "normalise", "mean", value=lambda mean: [m + 0.01 for m in mean]), ("facts",)),
    _fault("told-stop", "apps are told another stop token",
           _told("prompt", "stop", value=lambda ids: [i + 1 for i in ids]), ("prompt",)),
)  # fmt: skip
