"""A small page on this machine that asks a model about pictures: loopback only, one question at a time."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from PIL import Image as Pillow
from PIL import UnidentifiedImageError

from vlmedge.answer import Answer
from vlmedge.demo import demo_answers, demo_picture
from vlmedge.errors import ImageError, UsageError, VlmedgeError
from vlmedge.picture import load_picture
from vlmedge.session import U8
from vlmedge.skills import Model

HOST = "127.0.0.1"
MAX_BODY = 32 << 20  # bytes of a picture's file
SKILLS = ("query", "caption", "detect", "point")
# What browsers show too. Others stay out: Pillow gives some of them to other programs (EPS to Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_PAGE = Path(__file__).parent / "page"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True, slots=True)
class Subject:
    """What the page says of the model: what was opened, and what it is ("onnx w8a8, 3.9 MB")."""

    source: str
    what: str


@contextmanager
def serving(model: Model, subject: Subject, port: int = 0) -> Iterator[str]:
    """Serve the page for the length of the block; gives its address.

    `port` 0 takes a free one; raises UsageError for one that is taken. At the end an answer in the making stops at
    its next token and is waited for, so that the model can be closed.
    """
    try:
        server = _Server(model, subject, port)
    except OSError as error:
        raise UsageError(f"port {port} cannot be used: {error.strerror}; give another --port, or none") from None
    thread = threading.Thread(target=server.serve_forever, name="vlmedge page", daemon=True)
    thread.start()
    try:
        yield server.address
    finally:
        server.stopping.set()
        server.shutdown()
        server.server_close()
        thread.join()
        with server.lock:
            pass


def read_picture(data: bytes) -> U8:
    """A picture's file, as RGB uint8 [h, w, 3]; raises ImageError for what is none of `FORMATS` or damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as load_picture does: of large pictures that are still taken
            image = Pillow.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ImageError(f"this is no picture of the kinds {', '.join(FORMATS)}") from None
    except (Pillow.DecompressionBombError, OSError, ValueError, OverflowError) as error:
        raise ImageError(f"the picture cannot be read: {error}") from None
    with image:
        return load_picture(image)


@dataclass(frozen=True, slots=True)
class _Question:
    """What is asked: `picture` names a shipped one, "" means that the body is the picture."""

    skill: str = ""
    text: str = ""
    picture: str = ""

    def answered(self, model: Model, picture: U8, on_token: Callable[[str], None]) -> Answer:
        if self.skill == "query":
            return model.query(picture, self.text, on_token=on_token)
        if self.skill == "caption":
            return model.caption(picture, self.text, on_token=on_token)
        return (model.detect if self.skill == "detect" else model.point)(picture, self.text)


class _RefusedError(Exception):
    """A request that gets no answer: its status, and one line for the page."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


class _StoppedError(Exception):
    """The server ends while an answer is in the making."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = os.name == "posix"  # on Windows it would let two servers have one port

    def __init__(self, model: Model, subject: Subject, port: int) -> None:
        self.model, self.lock, self.stopping = model, threading.Lock(), threading.Event()
        super().__init__((HOST, port), _Handler)
        port = self.server_address[1]
        self.address = f"http://{HOST}:{port}/"
        self.hosts = {f"{name}:{port}" for name in (HOST, "localhost", "[::1]")}
        if port == 80:  # browsers leave it out
            self.hosts |= {HOST, "localhost", "[::1]"}
        self.about = _about(model, subject)
        self.files = {"/" if path.name == "index.html" else f"/{path.name}": path for path in _PAGE.iterdir()}
        self.files |= {f"/picture/{entry['picture']}": demo_picture(entry["picture"]) for entry in demo_answers()}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A page that was closed, or asked to stop, is no error."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError, _StoppedError)):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "vlmedge", ""
    timeout = 60  # seconds that a read or write may wait; computing does neither

    def do_GET(self) -> None:
        """One of the page's files, a shipped picture, or what the page should know."""
        path = self.path.partition("?")[0]
        try:
            self._check_host()
            if path == "/about":
                self._send(HTTPStatus.OK, "application/json", json.dumps(self.server.about).encode())
            elif path in self.server.files:  # a table: nothing that a request says becomes a path
                file = self.server.files[path]
                self._send(HTTPStatus.OK, _TYPES[file.suffix], file.read_bytes())
            else:
                raise _RefusedError(HTTPStatus.NOT_FOUND, "there is nothing at this address")
        except _RefusedError as refused:
            self._refuse(refused.status, str(refused))

    def do_POST(self) -> None:
        """A question: its words in the query string, the picture's file as the body; the answer in lines of JSON."""
        lines = _Lines(self)
        try:
            self._check_host()
            self._check_origin()
            question, data = self._question(), self._body()
            with self.server.lock:
                answer = self._answer(question, data, lines)
        except _RefusedError as refused:
            self._refuse(refused.status, str(refused))
        except (VlmedgeError, MemoryError) as error:
            lines.fail(str(error) or "out of memory")
        else:
            lines.write({"answer": answer.as_dict()})
            lines.end()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is for the address."""

    # ---- inside -----------------------------------------------------------------------------------------------

    def _answer(self, question: _Question, data: bytes, lines: _Lines) -> Answer:
        def show(piece: str) -> None:
            if self.server.stopping.is_set():
                raise _StoppedError
            lines.write({"text": piece})

        picture = load_picture(self.server.files[f"/picture/{question.picture}"]) if question.picture else None
        return question.answered(self.server.model, read_picture(data) if picture is None else picture, show)

    def _check_host(self) -> None:
        """A name that points here is not enough (DNS rebinding): the browser must mean this machine."""
        if self.headers.get_all("Host", []) not in [[host] for host in self.server.hosts]:
            raise _RefusedError(HTTPStatus.FORBIDDEN, f"this page is at {self.server.address} only")

    def _check_origin(self) -> None:
        """Browsers say which page asks; only our own may."""
        if self.headers.get_all("Origin", []) != [f"http://{self.headers['Host']}"]:
            raise _RefusedError(HTTPStatus.FORBIDDEN, "only the page itself may ask")

    def _question(self) -> _Question:
        path, _, query = self.path.partition("?")  # urlsplit raises for some
        words = dict(parse_qsl(query, keep_blank_values=True))
        if path != "/ask" or not words.keys() <= {"skill", "text", "picture"}:
            raise _RefusedError(HTTPStatus.NOT_FOUND, "there is nothing at this address")
        question = _Question(**words)
        if question.skill not in self.server.about["skills"]:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, f"this model has no skill '{question.skill[:20]}'")
        if not question.text.strip():
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "there is no question")
        if question.picture and f"/picture/{question.picture}" not in self.server.files:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "there is no such picture")
        return question

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdigit()):
            raise _RefusedError(HTTPStatus.LENGTH_REQUIRED, "a request must say how long it is")
        if len(length) > 12 or int(length) > MAX_BODY:
            text = f"the picture's file is too large; {MAX_BODY >> 20} MiB is the limit"
            raise _RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text)
        return self.rfile.read(int(length))

    def _refuse(self, status: HTTPStatus, text: str) -> None:
        """One line of JSON; the connection ends, because the body may not have been read."""
        self.close_connection = True
        self._send(status, "application/json", json.dumps({"error": text}).encode())

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.start(status, kind, {"Content-Length": str(len(body))})
        self.wfile.write(body)

    def start(self, status: HTTPStatus, kind: str, more: dict[str, str]) -> None:
        """Send the status and every header."""
        self.send_response(status)
        connection = {"Connection": "close"} if self.close_connection else {}
        for name, value in ({"Content-Type": kind} | more | _HEADERS | connection).items():
            self.send_header(name, value)
        self.end_headers()


class _Lines:
    """Lines of JSON that go out as they come; the status waits for the first, so that a failure can have its own."""

    def __init__(self, handler: _Handler) -> None:
        self._handler, self._begun = handler, False

    def write(self, record: dict[str, Any]) -> None:
        self._begin(HTTPStatus.OK)
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        self._handler.wfile.write(b"%x\r\n%b\r\n" % (len(line), line))  # one chunk, RFC 9112 section 7.1

    def end(self) -> None:
        self._handler.wfile.write(b"0\r\n\r\n")

    def fail(self, text: str) -> None:
        self._begin(HTTPStatus.BAD_REQUEST)
        self.write({"error": " ".join(text.split())})
        self.end()

    def _begin(self, status: HTTPStatus) -> None:
        if not self._begun:
            self._handler.start(status, "application/x-ndjson", {"Transfer-Encoding": "chunked"})
            self._begun = True


def _about(model: Model, subject: Subject) -> dict[str, Any]:
    """What the page should know before the first question."""
    lengths = [name.partition("/")[2] for name in model.spec.prompt.templates if name.startswith("caption/")]
    return {
        "source": subject.source,
        "what": subject.what,
        "runtime": model.session.runtime,
        "threads": model.session.info().get("threads"),
        "skills": [skill for skill in SKILLS if skill in model.skills],
        "lengths": lengths,
        "limit": MAX_BODY,
        "pictures": demo_answers(),
    }
