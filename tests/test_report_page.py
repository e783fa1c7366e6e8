"""The reports of a verification: a page that stands alone and reads well on a phone, and Markdown."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.browser import chromium
from vlmedge.parity import markdown, page
from vlmedge.parity.report import SCHEMA, Report, StageResult, TokenResult
from vlmedge.webpage import plot
from vlmedge.webpage.curves import Curve, curves
from vlmedge.webpage.markup import Html, element
from vlmedge.webpage.numbers import number, share, size
from vlmedge.webpage.page import document, section
from vlmedge.webpage.scale import linear_axis, log_axis
from vlmedge.webpage.scatter import Point, scatter
from vlmedge.webpage.strips import Strip, strips

HOSTILE = "</title></style><script>alert(1)</script><img src=x onerror=alert(1)>'\"&\x00\ud800|`*[a](b)"
LONG = "moondream2-2025-06-21-" + "w8a8-kv8-with-a-name-that-never-ends-" * 4 + ".onnx"
VOID = {"meta"}


def judged(stage, against, rms, limit, most, outcome="passed", **more):
    return StageResult(stage, against, outcome, rms, most, limit, **more)


def tokens(reading, count, differ=(), ties=()):
    for i in range(count):
        kl = 2e-6 * 9 ** (i % 5) if i not in differ else 0.4
        other = i in differ or i in ties
        yield TokenResult(
            reading, i, 500 + i, 9000 + i if other else 500 + i, kl, 0.03 if i in ties else 2.5, i in ties
        )


CHECKS = (
    StageResult("files", None, "passed", numbers={"files": 3}),
    StageResult("facts", None, "passed", numbers={"facts": 24}),
    StageResult("prompt", None, "passed", numbers={"texts": 120}),
    StageResult("preprocess", None, "passed", 0.0, 0.0, 0.0, {"pictures": 4}),
    StageResult(
        "weights", None, "passed", 0.061, 0.21, None,
        {"vision": 0.0031, "decoder": 0.081, "steps_rms": 0.31, "steps_most": 0.52, "tensors": 381},
    ),
)  # fmt: skip
KL = {"positions": 62.0, "kl_mean": 0.0041, "kl_p99": 0.11, "top1": 60 / 62, "first_divergence": 17.0}
BOXES = {"bins": 24.0, "equal": 22.0, "iou": 0.971, "iou_least": 0.94}
PASSED = Report(
    SCHEMA, "moon-q4.gguf", "moondream2", "gguf", "", "q4", 1_093_000_000, 4.61, "llamacpp",
    "vikhyatk/moondream2@2025-06-21", 4,
    (
        *CHECKS,
        judged("features", "stored", 0.00091, 0.004, 0.031),
        judged("features", "original", 0.0089, None, 0.31, "measured"),
        judged("projected", "stored", 0.0012, 0.005, 0.042),
        judged("projected", "original", 0.013, None, 0.4, "measured"),
        judged("logits", "stored", 0.0034, 0.012, 0.14),
        judged("logits", "original", 0.084, 0.25, 2.1),
        judged("tokens", "stored", 0.0041, 0.012, 0.2, numbers={"positions": 62.0, "top1": 1.0, "kl_mean": 3e-6}),
        judged("tokens", "original", 0.09, 0.25, 2.3, numbers=KL, ambiguous=2),
        judged("boxes", "original", 0.05, 0.25, 1.2, numbers=BOXES),
    ),
    (*tokens("shapes.png: What is this?", 31, ties=(17,)), *tokens("wide.png: What is this?", 31, ties=(22,))),
    {
        "stored": "llama.cpp multiplies quantized rows by 8-bit activations: measured 0.9e-3 to 3.4e-3 on ten seeds.",
        "original": "Four bits cost about 8 % of the logits' norm on the demo models; three times that is allowed.",
    },
    None, "", ("Points were not compared: the demo pictures have none.",), 21.37, 1893.2,
    {"python": "3.11.9", "llama-cpp-python": "0.3.36", "torch": "2.13.0", "cpu": "AMD EPYC 7R13, 2 cores"},
)  # fmt: skip
FAILED = replace(
    PASSED,
    stages=(
        *PASSED.stages[:9],
        judged("logits", "stored", 0.31, 0.012, 9.4, "failed", why="relative RMS 3.1e-01, at most 1.2e-02 is allowed"),
        judged("logits", "original", 0.34, 0.25, 9.6, "failed"),
        judged("tokens", "stored", math.nan, 0.012, math.inf, "failed", why="numbers are not finite"),
        judged("tokens", "original", 0.5, 0.25, 8.0, "failed", numbers=KL | {"top1": 0.42}, ambiguous=1),
        StageResult("boxes", "original", "skipped", why="no boxes without tokens"),
    ),
    tokens=tuple(t for i in range(9) for t in tokens(f"picture {i}: What is this?", 31, (5, 6, 20)[: i % 4], (9,))),
    failing=9,
    cause="the decoder: a wrong mask in the picture's prefix, rotary positions, a norm's epsilon, or a missing bias.",
)
MINIMAL = Report(
    SCHEMA, "x", "moondream2", "onnx", "", "f32", 0, 32.0, "onnxruntime", "demo:moondream2", 0,
    (), (), {}, None, "", (), 0.0, None, {},
)  # fmt: skip
NAMED = replace(
    FAILED,
    **dict.fromkeys(("bundle", "family", "format", "flavour", "profile", "runtime", "source", "cause"), HOSTILE),
    stages=(StageResult(HOSTILE, "stored", "failed", 0.5, 1.0, 0.1, {HOSTILE: 1.0}, 1, HOSTILE),),
    tokens=tuple(tokens(HOSTILE, 3, (1,))),
    limits={"stored": HOSTILE, HOSTILE: HOSTILE},
    failing=0,
    notes=(HOSTILE,),
    environment={HOSTILE: HOSTILE},
)
ENDLESS = replace(
    FAILED,
    bundle=LONG,
    source=f"/data/{LONG}",
    stages=(
        *(s for s in FAILED.stages if s.against != "original"),
        judged("regions", "stored", math.inf, 0.1, math.nan, "failed", why=LONG),
    ),
    tokens=(*(replace(t, kl=math.nan) for t in tokens(LONG, 1, (0,))), *tokens("picture 1", 400, range(0, 400, 9))),
    peak_rss_mb=math.nan,
    bits_per_weight=math.inf,
    failing=7,
    notes=(LONG, "a note"),
    environment={"cpu": LONG},
)
REPORTS = {"passed": PASSED, "failed": FAILED, "minimal": MINIMAL, "named": NAMED, "endless": ENDLESS}


class Reader(HTMLParser):
    """Raises where tags do not nest; remembers tags, attributes and text."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(text):
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


@pytest.mark.parametrize("name", REPORTS)
def test_the_page_stands_alone(name):
    text = page.render(REPORTS[name])
    text.encode("utf-8")
    found = read(text)
    assert not {"script", "img", "link", "iframe", "object", "form", "base"} & set(found.tags)
    assert not [a for a, _ in found.attributes if a.startswith("on") or a in ("src", "href", "style", "xlink:href")]
    assert not re.search(r"https?://|url\(|@import", text)
    assert "default-src 'none'" in dict(found.attributes)["content"] or "default-src 'none'" in text
    assert not re.search("[\x00-\x08\ud800-\udfff]", text)


@pytest.mark.parametrize("name", ["</p>", HOSTILE])
def test_names_stay_names(name):
    wanted = name.replace("\x00", "\ufffd").replace("\ud800", "\ufffd")
    assert "".join(read(element("p", name, title=name)).text) == wanted
    assert dict(read(element("p", name, title=name)).attributes)["title"] == wanted
    assert wanted in read(page.render(replace(PASSED, bundle=name))).text


def test_the_verdict_comes_first():
    text = "".join(read(page.render(FAILED)).text)
    at = [
        text.index(words)
        for words in ("Failed at prefill logits", "Why: relative RMS 3.1e-01", "Usual cause: the decoder")
    ]
    assert at == sorted(at)
    assert at[-1] < text.index("top-1 agreement") < text.index("Stage by stage")
    assert "All 12 checks passed, 2 measured." in "".join(read(page.render(PASSED)).text)
    assert "Nothing was judged" in "".join(read(page.render(MINIMAL)).text)


@pytest.mark.parametrize("name", REPORTS)
def test_markdown_has_the_same_facts(name):
    report = REPORTS[name]
    text = markdown.render(report)
    text.encode("utf-8")
    assert not re.search(r"(?<!\\)[<>`]", text)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    for result in report.stages:
        assert result.outcome in text
        assert number(result.relative_rms) in text
    assert "##" in text


def test_numbers():
    assert [number(v) for v in (None, 0.0, -0.0, 12, 12345.6, 0.00123456, 1.2e-6, 1e-30, 2.5e9, -0.5)] == [
        "\u2013", "0", "0", "12", "12,300", "0.00123", "1.2e-6", "1e-30", "2.5e9", "-0.5",
    ]  # fmt: skip
    assert [number(v) for v in (math.nan, math.inf, -math.inf)] == ["not a number", "infinite", "minus infinite"]
    assert [share(v) for v in (1.0, 0.9999, 0.5, math.nan)] == ["100 %", "99.9 %", "50 %", "not a number"]
    assert [size(v) for v in (0, 999, 4096, 999_999, 1_093_000_000)] == [
        "0 bytes",
        "999 bytes",
        "4.1 kB",
        "1 MB",
        "1.09 GB",
    ]


@pytest.mark.parametrize(
    "values", [(), (0.0, math.nan, math.inf), (1e-5, 0.3), (5e-324, 1.7e308), (1.0,), (1e-3, 1e-3)]
)
def test_an_axis_holds_its_values(values):
    axis = log_axis(values)
    assert axis.low < axis.high
    assert all(0 <= axis.place(v) <= 1 for v in (*values, -1.0, -math.inf))
    assert 2 <= len(axis.ticks()) <= 6
    assert axis.place(math.nan) == axis.place(math.inf) == 1
    if values == (1e-5, 0.3):
        assert (axis.low, axis.high, axis.place(1e-3)) == (-5, 0, pytest.approx(0.4))


@pytest.mark.parametrize(
    ("values", "zero", "names"),
    [
        ((), True, ["0", "0.5", "1"]),
        ((7.0,), True, ["0", "2", "4", "6", "8"]),
        ((0.0,), True, ["0", "0.5", "1"]),
        ((97.2, 100.0), False, ["97", "98", "99", "100"]),
        ((5.0, 5.0), False, ["0", "5", "10"]),
        ((-3e-7, 4e-7, math.nan), True, ["-4e-7", "-2e-7", "0", "2e-7", "4e-7"]),
        ((15_500.0, math.inf), True, ["0", "5,000", "10,000", "15,000", "20,000"]),
    ],
)
def test_a_linear_axis_ends_at_round_numbers(values, zero, names):
    axis = linear_axis(values, zero=zero)
    assert [name for name, _ in axis.marks()] == names
    assert [place for _, place in axis.marks()] == pytest.approx([i / (len(names) - 1) for i in range(len(names))])
    assert all(0 <= axis.place(v) <= 1 for v in (*values, -1e9, 1e9))
    assert len(axis.marks()) <= 6


def fields():
    """Points that crowd, a curve of one point, dots beyond the scale, and names that never end."""
    crowd = [Point(str(i + 1), 1.0 + i % 3 / 1e3, 2.0, i / 20, "bad" if i % 5 else "plain", LONG) for i in range(20)]
    crowd += [Point("21", 12_345.0, 98_765.0, 1.0, "plain", HOSTILE)]
    x, y = linear_axis(p.x for p in crowd), linear_axis(p.y for p in crowd)
    lines = [Curve(LONG, ((0.0, 1.0), (30.0, 0.2))), Curve("one", ((3.0, 0.5),)), Curve("none", ())]
    times, rates = linear_axis([0.0, 30.0]), linear_axis([1.0], unit=" %")
    rows = [Strip(LONG, ((-90.0, 0.0, 1.0), (), (2.0,)), "4 samples"), Strip("empty", (), "none")]
    yield plot.figure("Points", LONG, scatter(crowd, x, y, (LONG, HOSTILE), "points", "a crowd"))
    yield plot.figure("Curves", "by time", curves(lines, times, rates, ("minute", "rate"), "curves", "two lines"))
    yield plot.figure("Strips", "dots", strips(rows, linear_axis([-5.0, 5.0], unit=" %"), "strips", "dots", 0.0))
    yield plot.figure("Nothing", "at all", scatter([], x, y, ("x", "y"), "nothing", ""))


def test_a_crowd_keeps_the_keys_that_have_room():
    first, second, third, _ = map(read, map(str, fields()))
    assert 5 < sum(text.isdigit() for text in first.text) < 21 + 12
    assert "rotate" not in "".join(str(v) for _, v in first.attributes)
    assert next(v for k, v in second.attributes if k == "points").count(",") == 2
    dots = [v for k, v in third.attributes if k == "d"]
    assert sorted(d.count("M") for d in dots) == [1, 1, 2]  # one is far out, and has the colour of a warning


def stacked():
    names = ("load", "vision", "project", "prefill", "decode", "rest", "more")
    rows = [plot.Stack("original", tuple((n, 1.0 + i) for i, n in enumerate(names)), "28 s")]
    rows += [plot.Stack(f"{LONG}{i}", tuple((n, 0.5) for n in names[:i]), f"{i / 2} s") for i in range(4)]
    keys = [(sign, name) for name, sign in plot.colours(rows).items()]
    return plot.legend(keys), plot.figure("Where the time goes", "seconds", plot.stacks(rows, "time", "by stage"))


def test_stacks_add_up():
    reader = read(stacked()[1])
    widths = [float(v) for k, v in reader.attributes if k == "width"]
    assert sum(widths[1:8]) == pytest.approx(320, abs=0.1)  # the longest fills the plot; the first is its track
    assert plot.stacks([], "nothing", "at all").startswith("<svg")


# In the browser.
SCHEMES = [(360, False), (360, True), (1200, False), (1200, True)]
# The three texts of least contrast with their ground: https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio
CONTRAST = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => .2126 * linear(r / 255) + .7152 * linear(g / 255) + .0722 * linear(b / 255);
  const ground = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = rgba(getComputedStyle(e).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    throw Error('no ground');
  };
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement, style = getComputedStyle(e);
    if (!walker.currentNode.data.trim() || ['title', 'desc'].includes(e.tagName)) continue;
    const ink = rgba(e instanceof SVGElement ? style.fill : style.color);
    const [less, more] = [light(ink), light(ground(e))].sort((x, y) => x - y);
    found.push([(more + .05) / (less + .05), walker.currentNode.data]);
  }
  return found.sort((x, y) => x[0] - y[0]).slice(0, 3);
})()"""
# The smallest letters in a plot, in pixels.
LETTERS = """Math.min(...[...document.querySelectorAll('svg.plot text')].map(e =>
  parseFloat(getComputedStyle(e).fontSize) * e.ownerSVGElement.getBoundingClientRect().width / 320))"""
# Texts of a plot that lie on each other, or outside of it.
CROSSING = """[...document.querySelectorAll('svg.plot')].flatMap(svg => {
  const all = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll('text')].map(e => [e.getBoundingClientRect(), e.lastChild.textContent]);
  const meet = (a, b) =>
    a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 4 && b.top < a.bottom - 4;
  return texts.flatMap(([a, x], i) => [
    ...texts.slice(i + 1).filter(([b]) => meet(a, b)).map(([_, y]) => `${x} on ${y}`),
    ...(a.left < all.left - 4 || a.right > all.right + 4 ? [`${x} outside`] : []),
  ]);
})"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reports")
    for name, report in REPORTS.items():
        (folder / f"{name}.html").write_text(page.render(report), encoding="utf-8")
    blocks = document("Blocks", Html("<h1>Blocks</h1>"), section("Stacks", *stacked()), section("More", *fields()))
    (folder / "blocks.html").write_text(blocks, encoding="utf-8")
    return folder


@pytest.mark.parametrize(("width", "dark"), SCHEMES)
@pytest.mark.parametrize("name", [*REPORTS, "blocks"])
def test_the_page_reads_well(browser, written, name, width, dark):
    address = (written / f"{name}.html").as_uri()
    opened = browser.open(address, width=width, height=740, dark=dark)
    opened.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true })")
    assert opened.errors == []
    assert opened.requests == [address]
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.evaluate("document.body.scrollWidth") <= width
    assert opened.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(19, 23, 22)" if dark else "rgb(244, 245, 242)"
    )
    least = opened.evaluate(CONTRAST)
    assert least[0][0] >= 4.5, least
    assert name == "minimal" or opened.evaluate(LETTERS) >= 11
    assert opened.evaluate(CROSSING) == []
    opened.call("Page.close")


@pytest.mark.parametrize("name", ["passed", "failed"])
def test_a_phone_shows_the_verdict_without_scrolling(browser, written, name):
    opened = browser.open((written / f"{name}.html").as_uri(), width=360, height=640)
    assert opened.evaluate("document.querySelector('.verdict').getBoundingClientRect().bottom") < 640
    assert opened.evaluate("parseFloat(getComputedStyle(document.querySelector('.word')).fontSize)") >= 22
    opened.call("Page.close")
