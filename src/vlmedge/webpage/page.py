"""A whole HTML document in one text: its own style, no script, nothing to fetch; and what stands on it."""

from __future__ import annotations

from collections.abc import Iterable

from vlmedge.webpage.markup import Html, element, escape, join
from vlmedge.webpage.style import STYLE

# Only the style inside the page may act: no script, picture, font, frame, form or request, whatever a name smuggles in.
# https://www.w3.org/TR/CSP3/
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>{style}</style>
</head>
"""
_SIGNS = {
    "good": '<circle cx="20" cy="20" r="17"/><path d="M12 21l6 6 11-13"/>',
    "bad": '<circle cx="20" cy="20" r="17"/><path d="M14 14l12 12M26 14L14 26"/>',
    "warn": '<circle cx="20" cy="20" r="17"/><path d="M20 11v11M20 28v.1"/>',
}


def document(title: str, *body: Html, wide: bool = False) -> str:
    """The text of an HTML file with this title and body; it opens from a disk, a mail or a web server alike.

    `wide`: for tables of many columns, on screens that have room for them.
    """
    head = _HEAD.format(policy=_POLICY, title=escape(title), style=STYLE)
    return f"{head}{element('body', *_lines(body), class_='wide' if wide else None)}\n</html>\n"


def section(title: str, *content: str) -> Html:
    """A part of the page under a heading; nothing at all where there is no content."""
    content = tuple(filter(None, content))
    return element("section", element("h2", title), *_lines(content)) if content else Html()


def card(*content: str) -> Html:
    """A framed box."""
    return element("div", *content, class_="card")


def verdict(state: str, word: str, lines: Iterable[str]) -> Html:
    """The one thing to read: a sign and a word in the colour of `state` ("good", "bad", "warn"), then why."""
    sign = element("svg", Html(_SIGNS[state]), class_="sign", viewBox="0 0 40 40", aria_hidden="true")
    text = (element("p", line) for line in lines)
    return element(
        "div", sign, element("div", element("p", word, class_="word"), *text), class_=f"card verdict {state}"
    )


def pill(state: str, text: str) -> Html:
    """A short word with its own ground: "good", "bad", "warn" or "plain"."""
    return element("span", text, class_=f"pill {state}")


def tiles(items: Iterable[tuple[str, str]]) -> Html:
    """A few key numbers in boxes: (name, value)."""
    return _pairs(items, "tiles")


def facts(items: Iterable[tuple[str, str]]) -> Html:
    """A list of (name, value), one below the other, in a framed box; values are text or markup."""
    return element("div", _pairs(items, "facts"), class_="card small")


def points(items: Iterable[str]) -> Html:
    """A list with bullets in a framed box; nothing where there are none."""
    found = [element("li", item) for item in items]
    return card(element("ul", *found, class_="list")) if found else Html()


def folded(summary: str, content: str) -> Html:
    """Content that opens on a click; nothing where there is none."""
    return element("details", element("summary", summary), content) if content else Html()


def _pairs(items: Iterable[tuple[str, str]], kind: str) -> Html:
    rows = (element("div", element("dt", name), element("dd", value)) for name, value in items)
    return element("dl", *rows, class_=kind)


def _lines(content: Iterable[str]) -> list[Html]:
    """Each piece on a line of its own, so that the file can be read and compared."""
    return [join(Html("\n"), piece) for piece in content]
