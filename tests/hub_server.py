"""A small hub on localhost: repositories with commits, branches and tags, served as huggingface_hub asks for them.

Small files are served behind a relative redirect and weights behind an absolute one (the hub's cache and its
CDN); ranges and etags work; one file can be cut off in the middle, once or always.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin")


@dataclass
class Repo:
    """Commits hold files; refs are branch and tag names."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    gated: bool = False

    def commit(self, revision: str) -> str | None:
        """The commit that a revision stands for."""
        return self.refs.get(revision, revision if revision in self.commits else None)


@dataclass(frozen=True)
class Request:
    """One request that was answered."""

    method: str
    path: str
    range: str
    status: int


@dataclass
class HubServer:
    """`with HubServer({...}) as hub:` serves until the block ends; `requests` is the log."""

    repos: dict[str, Repo]
    cut: dict[str, int] = field(default_factory=dict)
    cut_always: bool = False
    broken: bool = False
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> HubServer:
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def downloads(self, name: str = "") -> list[Request]:
        """The requests that sent (a part of) a file."""
        return [r for r in self.requests if r.method == "GET" and "/api/models/" not in r.path and name in r.path]

    def take_cut(self, path: str) -> int | None:
        """After how many bytes this answer breaks off; each cut is used once unless `cut_always`."""
        for name, count in self.cut.items():
            if path.endswith(name):
                if not self.cut_always:
                    del self.cut[name]
                return count
        return None


class _Handler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self.server_hub.broken:
            return self._send(path, 503, b"down for maintenance", {})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree|refs)(?:/(.+))?", path):
            return self._api(path, found.group(1), found.group(2), found.group(3))
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(path, found.group(1), found.group(2), found.group(3), True)
        if found := re.fullmatch(r"/(?:cdn|api/resolve-cache)/([^/]+/[^/]+)/([^/]+)/(.+)", path):
            return self._resolve(path, found.group(1), found.group(2), found.group(3), False)
        return self._send(path, 404, b"no such page", {})

    def _api(self, path: str, name: str, kind: str, revision: str | None) -> None:
        repo = self._repo(path, name)
        if repo is None:
            return None
        if kind == "refs":
            refs = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": c} for n, c in repo.refs.items()]
            return self._json(path, {"tags": refs, "branches": [], "converts": []})
        commit = repo.commit(revision or "main")
        if commit is None:
            return self._send(path, 404, b"", {"X-Error-Code": "RevisionNotFound"})
        files = repo.commits[commit]
        if kind == "revision":
            siblings = [
                {"rfilename": n, "size": len(b), "blobId": hashlib.sha1(b).hexdigest()} for n, b in files.items()
            ]
            return self._json(path, {"id": name, "sha": commit, "siblings": siblings})
        return self._json(
            path,
            [{"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()} for n, b in files.items()],
        )

    def _resolve(self, path: str, name: str, revision: str, file: str, redirect: bool) -> None:
        repo = self._repo(path, name)
        if repo is None:
            return None
        commit = repo.commit(revision)
        if commit is None:
            return self._send(path, 404, b"", {"X-Error-Code": "RevisionNotFound"})
        if repo.gated:
            return self._send(path, 403, b"", {"X-Error-Code": "GatedRepo"})
        content = repo.commits[commit].get(file)
        if content is None:
            return self._send(path, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        etag = hashlib.sha256(content).hexdigest()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "X-Linked-ETag": f'"{etag}"'}
        headers["X-Linked-Size"] = str(len(content))
        if redirect and file.endswith(LARGE):
            place = {"Location": f"{self.server_hub.endpoint}/cdn/{name}/{commit}/{file}"}
            return self._send(path, 302, b"moved", headers | place)
        if redirect:
            return self._send(path, 307, b"moved", headers | {"Location": f"/api/resolve-cache/{name}/{commit}/{file}"})
        return self._content(path, content, headers)

    def _content(self, path: str, content: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        headers["Accept-Ranges"] = "bytes"
        if wanted is None:
            return self._send(path, 200, content, headers)
        start = int(wanted.group(1))
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self._send(path, 206, content[start:], headers)

    def _repo(self, path: str, name: str) -> Repo | None:
        repo = self.server_hub.repos.get(name)
        if repo is None:  # the hub's answer to those who are not logged in
            self._send(path, 401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        return repo

    def _json(self, path: str, data: object) -> None:
        self._send(path, 200, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _send(self, path: str, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.server_hub.requests.append(Request(self.command, path, self.headers.get("Range", ""), status))
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.server_hub.take_cut(path) if status in (200, 206) else None
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.close_connection = True
