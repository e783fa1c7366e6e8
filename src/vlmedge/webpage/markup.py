"""HTML and SVG elements: what is not markup already is escaped, so a hostile name stays a name."""

from __future__ import annotations

import html
import re

# What HTML forbids or a UTF-8 file cannot hold: controls, lone surrogates (names that are no UTF-8), noncharacters.
# https://infra.spec.whatwg.org/#noncharacter
_UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


class Html(str):
    """Text that is markup: `element` takes it as it is and escapes every other str."""

    __slots__ = ()


def element(name: str, *content: str, **attributes: str | float | None) -> Html:
    """An element with its content, `<name attribute="...">content</name>`.

    Attribute names: `text_anchor` is text-anchor, `class_` is class; numbers get two decimals, None leaves one out.
    """
    words = (f' {key.rstrip("_").replace("_", "-")}="{_value(v)}"' for key, v in attributes.items() if v is not None)
    return Html(f"<{name}{''.join(words)}>{join(*content)}</{name}>")


def join(*content: str) -> Html:
    """Pieces of markup and text, one after the other."""
    return Html("".join(piece if isinstance(piece, Html) else escape(piece) for piece in content))


def escape(text: str) -> Html:
    """Text as markup, for content and for attributes; characters that no page may hold become U+FFFD."""
    return Html(html.escape(printable(text)))


def printable(text: str) -> str:
    """Text in which characters that a page or a UTF-8 file cannot hold are U+FFFD."""
    return _UNFIT.sub("\ufffd", text)


def _value(value: str | float) -> str:
    return escape(value) if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
