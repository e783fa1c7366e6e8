"""Drives headless Chromium by the DevTools protocol: pages, their console, their requests, their pictures.

    with chromium() as browser:
        page = browser.open("http://127.0.0.1:8000/", width=390, dark=True)
        page.set_file("input[type=file]", Path("cat.png"))
        page.click("#ask")
        page.wait("document.body.dataset.state === 'done'")
        assert page.evaluate("fetch('/x').then(r => r.text())") == "hello"
        page.screenshot(Path("page.png"))
        assert page.errors == []
        assert page.requests == ["http://127.0.0.1:8000/", ...]

Names are not resolved and no proxy is used, so a page reaches this machine only. The protocol:
https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # CI runs as root
    "--disable-gpu",
    "--disable-dev-shm-usage",  # containers have 64 MB there
    "--disable-quic",
    "--no-first-run",
    "--no-proxy-server",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--remote-debugging-port=0",
)
_START_S = 60.0


class BrowserError(AssertionError):
    """The browser is missing, did not start, did not answer in time, or a script in the page threw."""


@dataclass
class Page:
    """One tab. `console` and `requests` grow while the page is spoken to.

    `console`: lines "level: text" of the console, the browser's log (refused by CSP, 404, ...) and uncaught errors.
    `requests`: the address of every request, in order; data: and blob: addresses are left out.
    """

    wire: _Wire
    session: str
    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    loaded: int = 0

    def evaluate(self, script: str, *, await_promise: bool = True, timeout: float = 60) -> Any:
        """The JSON value of an expression, a promise's when it is one; raises BrowserError with what it threw.

        Statements go into a function: `(() => { ...; return 1 })()`, or `async () =>` where they await.
        """
        reply = self.call(
            "Runtime.evaluate",
            timeout=timeout,
            expression=script,
            awaitPromise=await_promise,
            returnByValue=True,
            userGesture=True,
        )
        if "exceptionDetails" in reply:
            raise BrowserError(f"the page threw: {_thrown(reply['exceptionDetails'])}")
        return reply["result"].get("value")

    def wait(self, condition: str, timeout: float = 60) -> None:
        """Wait until an expression is true; raises BrowserError with the console's lines where it never is."""
        end = time.monotonic() + timeout
        while not self.evaluate(f"Boolean({condition})"):
            if time.monotonic() > end:
                raise BrowserError(f"not true after {timeout:.0f} s: {condition}; console: {self.console}")
            time.sleep(0.05)

    def goto(self, url: str, timeout: float = 60) -> None:
        """Open an address and wait for the page's load event."""
        before = self.loaded
        reply = self.call("Page.navigate", url=url)
        if reply.get("errorText"):
            raise BrowserError(f"{url} did not open: {reply['errorText']}")
        end = time.monotonic() + timeout
        while self.loaded == before:
            self.wire.read(end - time.monotonic())

    def click(self, selector: str) -> None:
        """Click the middle of an element with the mouse, scrolled into view first."""
        where = f"document.querySelector({json.dumps(selector)})"
        x, y = self.evaluate(
            f"(() => {{ const e = {where}; if (!e) throw Error('there is no ' + {json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            "return [b.x + b.width / 2, b.y + b.height / 2] })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Type text into the element that has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """Press a key by its DOM name: "Tab", "Enter", " " or a letter."""
        text = {"Enter": "\r", "Tab": ""}.get(key, key if len(key) == 1 else "")
        code = {"Enter": 13, "Tab": 9, " ": 32}.get(key, ord(key.upper()) if len(key) == 1 else 0)
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=text, windowsVirtualKeyCode=code)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def set_file(self, selector: str, *paths: Path) -> None:
        """Choose files in an <input type=file>, which tells the page as a user's choice would."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        if not node:
            raise BrowserError(f"there is no {selector}")
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path.resolve()) for path in paths])

    def screenshot(self, path: Path) -> None:
        """Write a PNG of the whole page."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        reply = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(reply["data"]))

    @property
    def errors(self) -> list[str]:
        """The console's errors so far."""
        self.evaluate("0")  # lets in what has arrived meanwhile
        return [line for line in self.console if line.startswith("error: ")]

    def call(self, method: str, *, timeout: float = 60, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol to this tab; the reply's result."""
        return self.wire.call(method, parameters, self.session, timeout)

    def heard(self, method: str, event: dict[str, Any]) -> None:
        """One event of this tab."""
        if method == "Page.loadEventFired":
            self.loaded += 1
        elif method == "Runtime.consoleAPICalled":
            texts = (str(a.get("value", a.get("description", a["type"]))) for a in event["args"])
            self.console.append(f"{event['type']}: {' '.join(texts)}")
        elif method == "Runtime.exceptionThrown":
            self.console.append(f"error: {_thrown(event['exceptionDetails'])}")
        elif method == "Log.entryAdded":
            entry = event["entry"]
            self.console.append(f"{entry['level']}: {entry['text']} {entry.get('url', '')}".rstrip())
        elif method == "Network.requestWillBeSent" and not event["request"]["url"].startswith(("data:", "blob:")):
            self.requests.append(event["request"]["url"])


@dataclass
class Browser:
    """A running Chromium."""

    wire: _Wire

    def open(self, url: str, *, width: int = 1280, height: int = 900, scale: float = 1, dark: bool = False) -> Page:
        """A new tab with the page at `url`, loaded, in a window of so many CSS pixels."""
        target = self.wire.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.wire.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        page = self.wire.pages[session] = Page(self.wire, session)
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            page.call(f"{domain}.enable")
        page.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )
        page.call("Emulation.setScrollbarsHidden", hidden=True)  # as on a phone; 15 pixels of width else
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        page.goto(url)
        return page


@contextmanager
def chromium(*flags: str) -> Iterator[Browser]:
    """Start headless Chromium with an empty profile, and end it; raises BrowserError where none is installed."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        raise BrowserError("these tests need Chromium: apt-get update && apt-get install -y chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        log = Path(profile) / "stderr"
        with log.open("wb") as stderr:
            words = [program, *FLAGS, *flags, f"--user-data-dir={profile}", "about:blank"]
            process = subprocess.Popen(words, stdout=stderr, stderr=stderr, start_new_session=True)
        try:
            address = _address(Path(profile), process, log)
            with connect(address, max_size=None, compression=None, proxy=None, open_timeout=_START_S) as socket:
                wire = _Wire(socket)
                yield Browser(wire)
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # asked to close, it takes seconds; its profile is thrown away
            process.wait()


@dataclass
class _Wire:
    """One socket for all tabs: commands are answered in order of their numbers, events come in between."""

    socket: ClientConnection
    pages: dict[str, Page] = field(default_factory=dict)
    replies: dict[int, dict[str, Any]] = field(default_factory=dict)
    count: int = 0

    def call(
        self, method: str, parameters: dict[str, Any], session: str | None = None, timeout: float = 60
    ) -> dict[str, Any]:
        """Send a command and wait for its result; raises BrowserError for a refusal and after `timeout` seconds."""
        self.count += 1
        number = self.count
        message = {"id": number, "method": method, "params": parameters}
        self.socket.send(json.dumps(message | ({"sessionId": session} if session else {})))
        end = time.monotonic() + timeout
        while number not in self.replies:
            self.read(end - time.monotonic(), method)
        reply = self.replies.pop(number)
        if "error" in reply:
            raise BrowserError(f"{method}: {reply['error']['message']}")
        result: dict[str, Any] = reply["result"]
        return result

    def read(self, timeout: float, what: str = "the page") -> None:
        """Take in one message, a reply or an event."""
        try:
            message = json.loads(self.socket.recv(timeout=max(timeout, 0)))
        except TimeoutError:
            raise BrowserError(f"{what} was not done in time") from None
        if "id" in message:
            self.replies[message["id"]] = message
        elif message.get("sessionId") in self.pages:
            self.pages[message["sessionId"]].heard(message["method"], message["params"])


def _address(profile: Path, process: subprocess.Popen[bytes], log: Path) -> str:
    """Where the browser listens: it writes its port and path into its profile."""
    end = time.monotonic() + _START_S
    while time.monotonic() < end and process.poll() is None:
        words: Sequence[str] = ()
        if (profile / "DevToolsActivePort").is_file():
            words = (profile / "DevToolsActivePort").read_text().split()
        if len(words) == 2:
            return f"ws://127.0.0.1:{words[0]}{words[1]}"
        time.sleep(0.05)
    raise BrowserError(f"Chromium did not start: {log.read_text(errors='replace')[-500:]}")


def _thrown(details: dict[str, Any]) -> str:
    return str(details.get("exception", {}).get("description") or details["text"])
