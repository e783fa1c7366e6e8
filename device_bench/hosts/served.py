"""The page's server: hands tasks to whatever browser opened the page, and takes their replies."""

from __future__ import annotations

import json
import mimetypes
import queue
import secrets
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, TypeAlias

from vlmedge.errors import RuntimeFailedError, UsageError

PAGE: Final = Path(__file__).parent.parent / "page"
MAX_REPLY: Final = 64 << 20  # bytes
_WAIT = 10.0  # seconds that a page's question for a task may wait for one
_HEADERS = {
    # These two isolate the page: shared memory, hence threads, and a clock that steps by 5 instead of 100 microseconds.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'self'; script-src 'self' blob: 'wasm-unsafe-eval'; "
    "worker-src 'self' blob:; img-src data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
_TYPES = {".html": "text/html; charset=utf-8", ".mjs": "text/javascript", ".wasm": "application/wasm"}

Content: TypeAlias = "Path | bytes"


@dataclass(frozen=True, slots=True)
class Event:
    """What became of a task: "taken" by a page, "reply" with its JSON, "rubbish", or "gone" with the page."""

    what: str
    reply: Any = None


@dataclass(frozen=True, slots=True)
class Task:
    """What a page is to do: JSON for it, the files that it may fetch, and who is told of its marks."""

    data: dict[str, Any]
    files: Mapping[str, Content] = field(default_factory=dict)
    mark: Callable[[str], None] = lambda name: None
    events: queue.SimpleQueue[Event] = field(default_factory=queue.SimpleQueue)

    def wait(self, seconds: float) -> Event | None:
        """What happens next, None where nothing does in time."""
        try:
            return self.events.get(timeout=max(0.0, seconds))
        except queue.Empty:
            return None


class Served:
    """The page at an address that cannot be guessed, so no other page finds it.

    `modules`: the `dist` folder of onnxruntime-web. `listen`: "ADDRESS" or "ADDRESS:PORT" of this machine. Raises
    UsageError for one that cannot be used.
    """

    def __init__(self, modules: Path, listen: str = "127.0.0.1") -> None:
        self._server = _bound(listen)
        self._server.secret = secrets.token_hex(6)
        self._server.fixed = {"": PAGE / "index.html"} | {p.name: p for p in PAGE.glob("*.mjs")}
        self._server.fixed |= {f"ort/{p.name}": p for p in modules.glob("ort*") if p.suffix in (".mjs", ".wasm")}
        self._thread = threading.Thread(target=self._server.serve_forever, name="vlmedge bench page", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """Where the page is; a server that listens everywhere names this machine."""
        host, port = self._server.server_address[:2]
        name = socket.gethostname() if host in ("0.0.0.0", "") else str(host)
        return f"http://{name}:{port}/{self._server.secret}/"

    def give(self, task: Task) -> None:
        """Let the next page that asks do this task, and hear of no earlier one any more."""
        with self._server.changed:
            self._server.number += 1
            self._server.task, self._server.taken = task, False
            self._server.changed.notify_all()

    def withdraw(self) -> None:
        """Give nothing from now on; replies to what was given are refused."""
        with self._server.changed:
            self._server.task = None

    def close(self) -> None:
        """Stop serving."""
        with self._server.changed:
            self._server.task, self._server.closing = None, True
            self._server.changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _bound(listen: str) -> _Server:
    host, _, port = listen.partition(":")
    if not (port or "0").isascii() or not (port or "0").isdigit() or int(port or 0) > 65535:
        raise UsageError(f"the option listen is {listen!r}; write ADDRESS or ADDRESS:PORT")
    try:
        return _Server((host, int(port or 0)), _Handler)
    except OSError as error:
        raise UsageError(f"the page cannot be served at {listen}: {error.strerror or error}; change listen") from None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a thread may wait for a page that is gone
    secret: str
    fixed: dict[str, Path]

    def __init__(self, address: tuple[str, int], handler: type[_Handler]) -> None:
        self.changed = threading.Condition()
        self.task: Task | None = None
        self.number, self.taken, self.closing = 0, False, False
        super().__init__(address, handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that was ended in the middle of something is no error."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)

    def take(self) -> tuple[int, Task] | None:
        """The task for the page that asks, None where there is none for a while; each is given once."""
        with self.changed:
            self.changed.wait_for(lambda: self.closing or (self.task and not self.taken), _WAIT)
            if self.task is None or self.taken:
                return None
            self.taken = True
            self.task.events.put(Event("taken"))
            return self.number, self.task

    def current(self, number: str) -> Task | None:
        """The task of this number, where it is still the one that is wanted."""
        with self.changed:
            return self.task if number == str(self.number) and self.taken else None


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "vlmedge", ""

    def do_GET(self) -> None:
        """The page, a task, or one of the task's files; "alive" is answered as long as the page lives."""
        path = self._path()
        if path == "job":
            self._job()
        elif path in self.server.fixed:  # tables: nothing that a request says becomes a path
            self._send(self.server.fixed[path])
        else:
            self._of_task(path)

    def do_POST(self) -> None:
        """A task's reply."""
        number, _, what = (self._path() or "").removeprefix("task/").partition("/")
        task, length = self.server.current(number), self.headers.get("Content-Length", "")
        if what != "reply" or task is None or not (length.isascii() and length.isdigit()) or int(length) > MAX_REPLY:
            self.close_connection = True  # the body was not read
            self._empty(HTTPStatus.NOT_FOUND)
            return
        try:
            event = Event("reply", json.loads(self.rfile.read(int(length))))
        except (ValueError, RecursionError):
            event = Event("rubbish")
        task.events.put(event)  # before the page, which has its answer then, goes away
        self._empty(HTTPStatus.OK)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is for the address."""

    # ---- inside -----------------------------------------------------------------------------------------------

    def _path(self) -> str | None:
        """What stands behind the secret; None for those who do not know it."""
        path = self.path.partition("?")[0]
        home = f"/{self.server.secret}/"
        return path.removeprefix(home) if path.startswith(home) else None

    def _of_task(self, path: str | None) -> None:
        number, _, what = (path or "").removeprefix("task/").partition("/")
        task = self.server.current(number)
        if task is None:
            self._empty(HTTPStatus.NOT_FOUND)
        elif what == "alive":
            self._alive(task)
        elif what.startswith("mark/"):
            task.mark(what.removeprefix("mark/"))
            self._empty(HTTPStatus.OK)
        elif what in task.files:
            self._send(task.files[what])
        else:
            self._empty(HTTPStatus.NOT_FOUND)

    def _job(self) -> None:
        found = self.server.take()
        if found is None:
            self._empty(HTTPStatus.NO_CONTENT)
            return
        number, task = found
        self._send(json.dumps({"number": number} | task.data).encode(), "application/json")

    def _alive(self, task: Task) -> None:
        """Answer without an end; the browser closes the connection when the page's process is gone."""
        self.close_connection = True
        self._start(HTTPStatus.OK, {"Content-Type": "text/plain", "Connection": "close"})
        self.connection.settimeout(0.5)
        while not self.server.closing:
            with suppress(TimeoutError):
                if not self._heard():
                    task.events.put(Event("gone"))
                    return

    def _heard(self) -> bytes:
        """What the page sends, nothing where the connection has ended or is cut; TimeoutError while it is silent."""
        try:
            heard: bytes = self.connection.recv(1)
        except ConnectionError:
            return b""
        return heard

    def _send(self, content: Content, kind: str = "") -> None:
        if isinstance(content, bytes):
            headers = {"Content-Type": kind or "application/octet-stream", "Content-Length": str(len(content))}
            self._start(HTTPStatus.OK, headers)
            self.wfile.write(content)
            return
        known = _TYPES.get(content.suffix) or mimetypes.guess_type(content.name)[0]
        with content.open("rb") as file:
            headers = {"Content-Type": known or "application/octet-stream"}
            self._start(HTTPStatus.OK, headers | {"Content-Length": str(content.stat().st_size)})
            shutil.copyfileobj(file, self.wfile, 1 << 20)

    def _empty(self, status: HTTPStatus) -> None:
        self._start(status, {} if status == HTTPStatus.NO_CONTENT else {"Content-Length": "0"})

    def _start(self, status: HTTPStatus, headers: dict[str, str]) -> None:
        self.send_response(status)
        connection = {"Connection": "close"} if self.close_connection else {}
        for name, value in (headers | _HEADERS | connection).items():
            self.send_header(name, value)
        self.end_headers()


def check_modules(folder: Path) -> Path:
    """The `dist` folder of onnxruntime-web; raises RuntimeFailedError for a folder that is none."""
    for name in ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.wasm"):
        if not (folder / name).is_file():
            raise RuntimeFailedError(f"{folder} lacks {name}; onnxruntime_web is the 'dist' folder of the npm package")
    return folder
