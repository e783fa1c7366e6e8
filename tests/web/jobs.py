"""What the web tests share: npm packages, a loopback server, jobs for the page and native runs."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from vlmedge import imaging
from vlmedge.device_bench.hosts.served import PAGE
from vlmedge.loading import load
from vlmedge.picture import load_picture
from vlmedge.prompt import TokenRun, render
from vlmedge.skills import Model

WEB = Path(__file__).parent
DRIVER = "driver.mjs"  # the page's of the benchmark
MODULES = WEB / "node_modules"
MAX_TOKENS = 40
LENGTHS = ("short", "normal", "long")


def install() -> None:
    """Install the pinned npm packages once; raises AssertionError without npm."""
    if (MODULES / ".package-lock.json").is_file():
        return
    npm = shutil.which("npm")
    assert npm is not None, "these tests need Node.js 20 with npm: apt-get install -y nodejs npm"
    flags = ["--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund"]
    subprocess.run([npm, "ci", *flags], cwd=WEB, check=True)


class _Handler(SimpleHTTPRequestHandler):
    """Files of tests/web, the driver, and of the folders under `mounts`; no log."""

    mounts: dict[str, Path]
    isolated: bool
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {".mjs": "text/javascript", ".wasm": "application/wasm"}

    def translate_path(self, path: str) -> str:
        first, _, rest = path.partition("?")[0].lstrip("/").partition("/")
        if first == DRIVER:
            return str(PAGE / DRIVER)
        if first in self.mounts:
            return str(self.mounts[first] / rest)
        return super().translate_path(path)

    def end_headers(self) -> None:
        if self.isolated:  # without these two a page has no shared memory, hence no threads
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-store")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serve(mounts: dict[str, Path], *, isolated: bool) -> Iterator[str]:
    """Serve tests/web on loopback, with each folder of `mounts` under its name; gives the address."""
    handler = type("Handler", (_Handler,), {"mounts": mounts, "isolated": isolated})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(WEB))) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@dataclass(frozen=True)
class Asked:
    """The page's job (questions about a picture and one without), and what the native runtime answers."""

    job: dict[str, Any]
    picture: list[list[int]]
    text: list[int]
    words: str


def ask(bundle: Path, picture: Path, question: str, folder: Path, *, threads: int = 1) -> Asked:
    """Run natively what the page will run; write the picture's crops to `folder`/pixels."""
    with load(bundle, threads=threads) as model:
        crops = imaging.crop(load_picture(picture), model.spec.image)
        (folder / "pixels").write_bytes(crops.pixels.tobytes())
        first = model.query(picture, question, max_tokens=MAX_TOKENS)
        captions = [model.caption(picture, length, max_tokens=MAX_TOKENS) for length in LENGTHS]
        alone = model.query(None, question, max_tokens=MAX_TOKENS)
        names = ["query", *(f"caption/{length}" for length in LENGTHS)]
        runs = [_runs(model, name, question, pictures=1) for name in names]
        (text,) = _runs(model, "query", question, pictures=0)
    job = {
        "bundle": "/bundle",
        "pixels": "/job/pixels",
        "crops": crops.count,
        "tiling": list(crops.tiling),
        "bos": runs[0][0][0],
        "prompts": [prompt for _, prompt in runs],
        "text": text,
        "question": question,
        "maxTokens": MAX_TOKENS,
        "threads": threads,
    }
    return Asked(job, [list(a.tokens) for a in (first, *captions)], list(alone.tokens), first.text)


def _runs(model: Model, name: str, question: str, *, pictures: int) -> list[list[int]]:
    """The runs of token ids before and behind the picture."""
    segments = render(model.spec.prompt, name, model.tokenizer, pictures=pictures, question=question)
    return [list(s.ids) for s in segments if isinstance(s, TokenRun)]
