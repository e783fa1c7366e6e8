"""Tables of plug-ins: name -> "module:attribute", imported on first use, with a nearest-name error."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar, cast

from vlmedge.errors import UsageError, nearest

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A read-only mapping whose values are imported when they are first asked for."""

    def __init__(self, noun: str, table: dict[str, str]) -> None:
        self._noun = noun
        self._table = table

    def __getitem__(self, name: str) -> T:
        """Import and return the entry; raises UsageError with the nearest name."""
        if name not in self._table:
            raise UsageError(f"unknown {self._noun} '{name}'{nearest(name, self._table)}")
        module, _, attribute = self._table[name].partition(":")
        return cast(T, getattr(importlib.import_module(module), attribute))

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def __contains__(self, name: object) -> bool:
        return name in self._table
