"""Frozen dataclasses to plain JSON data and back, strictly: unknown, missing and mistyped keys are named.

A union of dataclasses is told apart by the key `kind`, which holds the class name.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from vlmedge.errors import UsageError, VlmedgeError, nearest

T = TypeVar("T")


def encode(value: Any) -> Any:
    """Return `value` (a dataclass, or containers of them) as JSON data; dataclasses carry their `kind`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    return value


def decode(cls: type[T], data: Any, where: str, error: type[VlmedgeError] = UsageError) -> T:
    """Build the dataclass `cls` from JSON or TOML data; `where` names the place in messages.

    Raises `error` for an unknown key (with the nearest known one), a missing key, or a value of the
    wrong type.
    """
    return typing.cast(T, _value(cls, data, where, error))


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The data of a TOML file, for `decode`; `what` it is, in messages. Raises UsageError where it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"the {what} {path} cannot be read: {os.strerror(error.errno or 0)}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"the {what} {path} is not TOML: {error}") from None


def _record(cls: type, data: Any, where: str, error: type[VlmedgeError]) -> Any:
    if not isinstance(data, Mapping):
        raise error(f"{where} must be a table, not {_name(data)}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if data.get("kind", cls.__name__) != cls.__name__ and "kind" not in fields:
        raise error(f"{where} has the kind {_short(data['kind'])}, not '{cls.__name__}'")
    for key in data:
        if key not in fields and key != "kind":
            raise error(f"{where} has the unknown key {_short(key)}{nearest(str(key)[:80], fields)}")
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _value(hints[name], data[name], f"{where}.{name}", error)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise error(f"{where} lacks the key '{name}'")
    return cls(**values)


def _value(hint: Any, data: Any, where: str, error: type[VlmedgeError]) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return data
    if origin in (Union, types.UnionType):
        return _union(args, data, where, error)
    if origin is Literal:
        if data not in args:
            raise error(f"{where} is {_short(data)}{nearest(_short(data), map(str, args))}")
        return data
    if dataclasses.is_dataclass(hint):
        return _record(typing.cast(type, hint), data, where, error)
    if origin is tuple:
        return _tuple(args, data, where, error)
    if origin in (dict, Mapping):
        if not isinstance(data, Mapping):
            raise error(f"{where} must be a table, not {_name(data)}")
        return {str(k): _value(args[1], v, f"{where}.{k}", error) for k, v in data.items()}
    return _plain(hint, data, where, error)


def _plain(hint: Any, data: Any, where: str, error: type[VlmedgeError]) -> Any:
    """Check a number, string or truth value; whole numbers do for float, infinities and NaN never do."""
    if hint is float and type(data) is int and abs(data) < 1 << 1000:
        return float(data)
    if not isinstance(data, hint) or (hint is int and isinstance(data, bool)):
        raise error(f"{where} must be {_wanted(hint)}, not {_name(data)}")
    if isinstance(data, float) and not math.isfinite(data):
        raise error(f"{where} must be a finite number, not {data}")
    return data


def _union(args: tuple[Any, ...], data: Any, where: str, error: type[VlmedgeError]) -> Any:
    if data is None and type(None) in args:
        return None
    options = [a for a in args if a is not type(None)]
    if len(options) == 1:
        return _value(options[0], data, where, error)
    records: dict[str, type] = {a.__name__: a for a in options if isinstance(a, type) and dataclasses.is_dataclass(a)}
    if records and isinstance(data, Mapping):
        kind = data.get("kind")
        if not isinstance(kind, str) or kind not in records:
            raise error(f"{where} has the kind {_short(kind)}{nearest(_short(kind), records)}")
        return _record(records[kind], data, where, error)
    for option in options:
        if not dataclasses.is_dataclass(option) and _fits(option, data):
            return _value(option, data, where, error)
    raise error(f"{where} must be {' or '.join(_wanted(o) for o in options)}, not {_name(data)}")


def _fits(hint: Any, data: Any) -> bool:
    base = typing.get_origin(hint) or hint
    if base is tuple:
        return isinstance(data, (list, tuple))
    return isinstance(data, base) and not (base is int and isinstance(data, bool))


def _tuple(args: tuple[Any, ...], data: Any, where: str, error: type[VlmedgeError]) -> Any:
    if not isinstance(data, (list, tuple)):
        raise error(f"{where} must be a list, not {_name(data)}")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_value(args[0], v, f"{where}[{i}]", error) for i, v in enumerate(data))
    if len(args) != len(data):
        raise error(f"{where} must have {len(args)} items, not {len(data)}")
    return tuple(_value(a, v, f"{where}[{i}]", error) for i, (a, v) in enumerate(zip(args, data, strict=True)))


def _wanted(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _name(data: Any) -> str:
    names = {dict: "a table", list: "a list", str: "the text", bool: "the truth value", float: "the number"}
    kind = "nothing" if data is None else names.get(type(data), type(data).__name__)
    return kind if isinstance(data, dict | list) or data is None else f"{kind} {_short(data)}"


def _short(data: Any) -> str:
    text = repr(data) if not isinstance(data, int) or abs(data) < 1 << 200 else "an enormous number"
    return text if len(text) <= 80 else text[:77] + "..."
