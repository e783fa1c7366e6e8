"""The demo's page in a real browser, and what its server refuses."""

from __future__ import annotations

import http.client
import io
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import urlencode, urlsplit

import pytest
from PIL import Image

from tests.browser import Browser, Page, chromium
from vlmedge.answer import Answer
from vlmedge.cli.demo_report import export_one, runnable
from vlmedge.demo import demo_answers, demo_picture
from vlmedge.demo.serve import FORMATS, MAX_BODY, Subject, read_picture, serving
from vlmedge.errors import ImageError, RuntimeFailedError
from vlmedge.loading import load
from vlmedge.progress import Progress
from vlmedge.skills import Model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Iterator[Model]:
    """The demo checkpoint in the format that `vlmedge demo --serve` shows."""
    exported = export_one(*runnable(), tmp_path_factory.mktemp("demo"), 1, Progress())
    with load(exported.bundle.path, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def address(model) -> Iterator[str]:
    with serving(model, Subject("demo:moondream2", "a test")) as served:
        yield served


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def page(browser, address) -> Iterator[Page]:
    """The page, ready; in the end it must have said no error and asked nobody but its server."""
    opened = browser.open(address)
    opened.wait("document.body.dataset.state === 'ready'")
    yield opened
    assert opened.errors == []
    assert opened.requests
    assert all(request.startswith(address) for request in opened.requests)


def tasks(picture: str, skill: str) -> list[dict[str, Any]]:
    entry = next(entry for entry in demo_answers() if entry["picture"] == picture)
    return [task for task in entry["tasks"] if task["skill"] == skill]


def choose(page: Page, picture: str, skill: str) -> None:
    page.click(f"#shipped button[value='{picture}']")
    page.wait(f"document.body.dataset.picture === '{picture}'")
    page.click(f"#skills input[value={skill}]")


def ask(page: Page, text: str) -> str:
    """Type and press Enter; the answer's text."""
    page.evaluate("document.querySelector('#text').value = ''; document.querySelector('#text').focus()")
    page.type(text)
    page.press("Enter")
    page.wait("document.body.dataset.state === 'done'")
    return str(page.evaluate("document.querySelector('#answer').textContent"))


def painted(page: Page) -> int:
    """Pixels of the canvas that are not clear."""
    script = """(() => {
        const c = document.querySelector('#marks');
        const data = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
        return data.filter((value, index) => index % 4 === 3 && value > 0).length })()"""
    return int(page.evaluate(script))


# ---- in the browser -------------------------------------------------------------------------------------------------


def test_a_question_about_a_shipped_picture(page, model):
    """Every question of one picture; the server says who answers; times are shown."""
    facts = page.evaluate("[...document.querySelectorAll('#facts li')].map(item => item.textContent)")
    assert facts == ["demo:moondream2", "a test", model.session.runtime, "1 thread"]
    choose(page, "landscape.png", "query")
    for task in tasks("landscape.png", "query"):
        assert ask(page, task["text"]) in task["answers"], task
    assert page.evaluate("document.querySelector('#known').dataset.right") == "true"
    stages = page.evaluate("[...document.querySelectorAll('#stages li')].map(s => [s.dataset.stage, +s.dataset.ms])")
    assert {"prompt", "decode", "total"} <= dict(stages).keys()
    assert dict(stages)["decode"] > 0
    assert page.evaluate("document.querySelector('#bar').children.length") == len(stages) - 1
    assert "picture kept" in page.evaluate("document.querySelector('#counts').textContent")


def test_boxes_are_drawn(page):
    choose(page, "landscape.png", "detect")
    assert painted(page) == 0
    task = tasks("landscape.png", "detect")[1]
    assert ask(page, task["text"]) == "3 found"
    boxes = json.loads(page.evaluate("document.querySelector('#marks').dataset.boxes"))
    assert len(boxes) == len(task["boxes"])
    for box, wanted in zip(boxes, task["boxes"], strict=True):
        assert [box[edge] for edge in ("x_min", "y_min", "x_max", "y_max")] == pytest.approx(wanted, abs=0.05)
    assert painted(page) > 500
    choose(page, "small.png", "detect")
    assert painted(page) == 0


def test_points_are_drawn(page):
    choose(page, "small.png", "point")
    task = tasks("small.png", "point")[0]
    assert ask(page, task["text"]) == "5 found"
    points = json.loads(page.evaluate("document.querySelector('#marks').dataset.points"))
    assert len(points) == len(task["points"])
    assert painted(page) > 500


def test_a_caption(page):
    choose(page, "shapes.png", "caption")
    page.evaluate("document.querySelector('#length').value = 'short'")
    page.click("#go")
    page.wait("document.body.dataset.state === 'done'")
    wanted = tasks("shapes.png", "caption")[0]["answers"]
    assert page.evaluate("document.querySelector('#answer').textContent") in wanted


def test_a_suggestion(page):
    choose(page, "wide.png", "detect")
    page.click("#suggestions button:last-child")
    page.wait("document.body.dataset.state === 'done'")
    assert page.evaluate("document.querySelector('#answer').textContent") == "none found"


def test_a_picture_of_the_users(page, tmp_path):
    """A file; then one that the browser cannot show, which the page says in one line."""
    page.set_file("#file", demo_picture("square"))
    page.wait("document.body.dataset.picture === 'own'")
    task = tasks("square.png", "query")[0]
    assert ask(page, task["text"]) in task["answers"]
    (tmp_path / "text.png").write_text("no picture")
    page.set_file("#file", tmp_path / "text.png")
    page.wait("document.body.dataset.state === 'error'")
    assert (
        page.evaluate("document.querySelector('#error').textContent") == "this is no picture that the browser can show"
    )
    assert page.evaluate("document.querySelector('#go').disabled")


def test_a_turned_photo_is_shown_as_the_model_sees_it(page, tmp_path):
    """EXIF says "turn it"; the model does not, so boxes would lie elsewhere if the browser did."""
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(demo_picture("wide")) as picture:
        picture.convert("RGB").save(tmp_path / "turned.jpg", quality=98, exif=exif)
        width, height = picture.size
    page.set_file("#file", tmp_path / "turned.jpg")
    page.wait("document.body.dataset.picture === 'own'")
    ratio = page.evaluate("(() => { const i = document.querySelector('#picture'); return i.width / i.height })()")
    assert ratio == pytest.approx(width / height, rel=0.02)
    page.click("#skills input[value=detect]")
    assert ask(page, "shape") == "5 found"


def test_without_a_mouse(page):
    """Tab to the first picture, take it, Tab to the question, ask."""
    page.press("Tab")
    page.press("Enter")
    page.wait("document.body.dataset.picture === 'shapes.png'")
    focused = "document.activeElement.id"
    for _ in range(12):
        if page.evaluate(focused) == "text":
            break
        page.press("Tab")
    assert page.evaluate(focused) == "text"
    page.type("What shape is purple?")
    page.press("Enter")
    page.wait("document.body.dataset.state === 'done'")
    assert page.evaluate("document.querySelector('#answer').textContent") == "triangle"


def test_an_empty_question(page):
    choose(page, "small.png", "query")
    page.click("#go")
    assert page.evaluate("document.querySelector('#error').textContent") == "say question first"


def test_phone_and_dark(browser, address, tmp_path):
    """Nothing is wider than a phone, and the ground is dark where the system is."""
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = browser.open(address, width=390), browser.open(address, width=390, dark=True)
    for opened in (light, dark):
        opened.wait("document.body.dataset.state === 'ready'")
        choose(opened, "wide.png", "query")
        ask(opened, "How many shapes do you see?")
        assert opened.evaluate("document.documentElement.scrollWidth") == 390
        opened.screenshot(tmp_path / "page.png")
        with Image.open(tmp_path / "page.png") as shot:
            assert shot.width == 390
    assert light.evaluate(ground) != dark.evaluate(ground)


def test_a_lost_server(browser, model):
    with serving(model, Subject("demo:moondream2", "a test")) as address:
        page = browser.open(address.replace("127.0.0.1", "localhost"))
        page.wait("document.body.dataset.state === 'ready'")
        choose(page, "small.png", "query")
    page.evaluate("document.querySelector('#text').value = 'What?'")
    page.click("#go")
    page.wait("document.body.dataset.state === 'error'")
    line = page.evaluate("document.querySelector('#error').textContent")
    assert line == "vlmedge does not answer; is it still running?"


# ---- over HTTP ------------------------------------------------------------------------------------------------------


@contextmanager
def request(address: str, method: str, path: str, body: bytes = b"", **headers: str | None) -> Iterator[Any]:
    """One request with the headers that the page would send; None leaves one out."""
    place = urlsplit(address)
    assert place.hostname is not None
    sent = {"Host": place.netloc, "Origin": f"http://{place.netloc}", "Content-Length": str(len(body))}
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=60)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in (sent | {name.replace("_", "-"): value for name, value in headers.items()}).items():
        if value is not None:
            connection.putheader(name, value)
    try:
        connection.endheaders(body)
        yield connection.getresponse()
    finally:
        connection.close()


def asking(skill: str = "query", text: str = "How many shapes do you see?", picture: str = "shapes.png") -> str:
    return f"/ask?{urlencode({'skill': skill, 'text': text, 'picture': picture})}"


def refusal(address: str, status: int, method: str, path: str, body: bytes = b"", **headers: str | None) -> str:
    with request(address, method, path, body, **headers) as reply:
        assert reply.status == status, reply.read()
        (line,) = reply.read().splitlines()
        return str(json.loads(line)["error"])


def test_an_answer_comes_in_pieces(address):
    with request(address, "POST", asking("caption", "long")) as reply:
        assert reply.status == 200
        lines = [json.loads(line) for line in reply.read().splitlines()]
    *pieces, last = lines
    assert len(pieces) > 10
    assert "".join(piece["text"] for piece in pieces).strip() == last["answer"]["text"].strip()
    assert last["answer"]["skill"] == "caption"


def test_every_reply_keeps_others_out(address):
    for method, path in (("GET", "/"), ("GET", "/page.js"), ("GET", "/nothing"), ("POST", asking())):
        with request(address, method, path) as reply:
            reply.read()
            assert reply.headers["Content-Security-Policy"].startswith("default-src 'self'; ")
            assert reply.headers["X-Content-Type-Options"] == "nosniff"
            assert reply.headers["Cross-Origin-Resource-Policy"] == "same-origin"
            assert "Access-Control-Allow-Origin" not in reply.headers


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", None])
def test_another_host(address, host):
    host = host and host.format(port=urlsplit(address).port)
    for method, path in (("GET", "/"), ("GET", "/about"), ("POST", asking())):
        assert "this page is at http://127.0.0.1:" in refusal(address, 403, method, path, Host=host)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://{netloc}", None])
def test_another_origin(address, origin):
    origin = origin and origin.format(netloc=urlsplit(address).netloc)
    assert refusal(address, 403, "POST", asking(), Origin=origin) == "only the page itself may ask"


def test_too_large(address):
    """The length that is claimed suffices; nothing is read."""
    words = ("POST", asking(picture=""))
    text = "the picture's file is too large; 32 MiB is the limit"
    for length in (MAX_BODY + 1, 10**30):
        assert refusal(address, 413, *words, Content_Length=str(length)) == text


@pytest.mark.parametrize(
    "headers", [{"Content_Length": None}, {"Content_Length": "-1"}, {"Transfer_Encoding": "chunked"}]
)
def test_no_length(address, headers):
    assert "must say how long it is" in refusal(address, 411, "POST", asking(picture=""), **headers)


@pytest.mark.parametrize("data", [b"", b"text", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_no_picture(address, data):
    assert "this is no picture of the kinds PNG" in refusal(address, 400, "POST", asking(picture=""), data)


@pytest.mark.parametrize(
    ("query", "status", "text"),
    [
        ({"skill": "gaze"}, 400, "this model has no skill 'gaze'"),
        ({"skill": ""}, 400, "this model has no skill ''"),
        ({"text": " "}, 400, "there is no question"),
        ({"picture": "../answers.json"}, 400, "there is no such picture"),
        ({"skill": "caption", "text": "endless"}, 400, "this model has no 'caption/endless'; did you mean"),
        ({"text": "why? " * 2000}, 400, "leaves none for an answer: the model's context is"),
    ],
)
def test_what_cannot_be_asked(address, query, status, text):
    assert text in refusal(address, status, "POST", asking(**query))


@pytest.mark.parametrize("path", ["/nothing", "/picture/", "/../serve.py", "/%2e%2e/serve.py", "/picture/answers.json"])
def test_nothing_there(address, path):
    assert refusal(address, 404, "GET", path) == "there is nothing at this address"
    assert refusal(address, 404, "POST", path) == "there is nothing at this address"
    assert refusal(address, 404, "POST", asking() + "&path=/etc/passwd") == "there is nothing at this address"


@pytest.mark.parametrize("kind", FORMATS)
def test_kinds_of_pictures(kind):
    data = io.BytesIO()
    with Image.open(demo_picture("small")) as picture:
        picture.convert("RGB").save(data, kind)
        assert read_picture(data.getvalue()).shape == (*picture.size[::-1], 3)


def test_a_damaged_picture():
    data = demo_picture("small").read_bytes()
    with pytest.raises(ImageError, match="the picture cannot be decoded"):
        read_picture(data[: len(data) // 2])


def test_a_bomb(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match=r"the picture cannot be read: .*decompression bomb"):
        read_picture(demo_picture("small").read_bytes())


class SlowModel:
    """Says "a" until it is told to fail, or until whoever listens gives up."""

    skills = ("query",)
    spec = SimpleNamespace(prompt=SimpleNamespace(templates={"query": ()}))
    session = SimpleNamespace(runtime="slow", info=dict)

    def __init__(self) -> None:
        self.fail, self.given_up = threading.Event(), threading.Event()

    def query(self, picture: object, question: str, on_token: Any) -> Answer:
        while not self.fail.wait(0.01):
            try:
                on_token("a")
            except Exception:
                self.given_up.set()
                raise
        raise RuntimeFailedError("it\nbroke")


@pytest.fixture
def slow() -> SlowModel:
    return SlowModel()


def test_a_failure_amid_an_answer(slow):
    with serving(cast(Model, slow), Subject("slow", "fake")) as address, request(address, "POST", asking()) as reply:
        assert json.loads(reply.readline()) == {"text": "a"}
        slow.fail.set()
        assert json.loads(reply.read().splitlines()[-1]) == {"error": "it broke"}


def test_stop_in_the_page(slow, browser):
    """The button ends the answer on both sides, and the next question is answered."""
    with serving(cast(Model, slow), Subject("slow", "fake")) as address:
        page = browser.open(address)
        page.wait("document.body.dataset.state === 'ready'")
        choose(page, "small.png", "query")
        page.evaluate("document.querySelector('#text').value = 'What?'")
        page.click("#go")
        page.wait("document.querySelector('#answer').textContent.startsWith('aaa')")
        page.click("#stop")
        page.wait("document.body.dataset.state === 'ready'")
        assert slow.given_up.wait(20)
        assert page.evaluate("document.querySelector('#error').hidden")


def test_the_end_stops_an_answer(slow):
    with serving(cast(Model, slow), Subject("slow", "fake")) as address:
        place = urlsplit(address)
        client = socket.create_connection((place.hostname, place.port), timeout=20)
        head = f"POST {asking()} HTTP/1.1\r\nHost: {place.netloc}\r\nOrigin: http://{place.netloc}\r\n"
        client.sendall(f"{head}Content-Length: 0\r\n\r\n".encode())
        assert client.recv(100).startswith(b"HTTP/1.1 200")
    assert slow.given_up.is_set()
    client.close()


def test_the_page_names_no_other_place():
    """No address of another machine in what is shipped."""
    folder = Path(demo_picture("small")).parent.parent / "page"
    assert {path.name for path in folder.iterdir()} == {"icon.svg", "index.html", "page.css", "page.js"}
    for path in folder.iterdir():
        text = path.read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert "://" not in text
