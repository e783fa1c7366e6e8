"""A JSON schema from frozen dataclasses, the same rules that `records.decode` enforces."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

_PLAIN = {int: "integer", float: "number", str: "string", bool: "boolean"}


def json_schema(cls: type, title: str) -> dict[str, Any]:
    """Return the draft 2020-12 schema of a dataclass; nested ones are under `$defs`."""
    definitions: dict[str, Any] = {}
    reference = _schema(cls, definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:{title.replace('/', ':')}",
        "title": title,
        **reference,
        "$defs": dict(sorted(definitions.items())),
    }


def _schema(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if hint in _PLAIN:
        return {"type": _PLAIN[hint]}
    if hint is type(None):
        return {"type": "null"}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(a, definitions) for a in args]}
    if origin is Literal:
        return {"enum": list(args)}
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        return {"type": "array", "items": _schema(args[0], definitions)}
    if origin is tuple:
        items = [_schema(a, definitions) for a in args]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if origin in (dict, Mapping):
        return {"type": "object", "additionalProperties": _schema(args[1], definitions)}
    if dataclasses.is_dataclass(hint):
        return _record(typing.cast(type, hint), definitions)
    raise TypeError(f"no JSON schema for {hint}")


def _record(cls: type, definitions: dict[str, Any]) -> dict[str, Any]:
    name = cls.__name__
    if name not in definitions:
        definitions[name] = {}  # holds the place: a type may contain itself
        hints = typing.get_type_hints(cls)
        fields = {f.name: _schema(hints[f.name], definitions) for f in dataclasses.fields(cls)}
        definitions[name] = {
            "description": " ".join((cls.__doc__ or "").split()),
            "type": "object",
            "properties": {"kind": {"const": name}, **fields},
            "required": list(dict.fromkeys(("kind", *fields))),
            "additionalProperties": False,
        }
    return {"$ref": f"#/$defs/{name}"}
