"""A local server that speaks the Hugging Face hub's API: uploads, and models with branches."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

Fault = Callable[["Hub", Any], bool]


class Hub:
    """A server with `models` (folders by repository and branch) that accepts uploads.

    `requests` are the paths asked for, `ranges` those of requests for a part of a file. `fault`, if
    set, may answer a request itself (by `reply` of the handler) and then returns True.
    """

    def __init__(self, token: str = "hf_right") -> None:
        self.token = token
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.models: dict[str, dict[str, Path]] = {}
        self.fault: Fault | None = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"  # no connection outlives `close`

            def do_GET(self) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                with contextlib.suppress(ConnectionError):
                    if hub.fault is None or not hub.fault(hub, self):
                        hub.download(self)

            do_HEAD = do_GET

            def do_POST(self) -> None:
                hub.requests.append(self.path)
                hub.upload(self)

            def reply(self, code: int, content: object, **headers: object) -> None:
                """Send JSON, or bytes as they are; headers have _ for -."""
                body = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(code)
                given = {"Content-Type": "application/json", "Content-Length": len(body)}
                for name, value in (given | headers).items():
                    self.send_header(name.replace("_", "-"), str(value))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.http.shutdown()
            self.http.server_close()

    def commit(self, repo: str, branch: str) -> str:
        """Return the hash of a branch, which changes with its files."""
        folder = self.models[repo][branch]
        digest = hashlib.sha1(f"{repo} {branch}".encode())
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()

    def downloads(self, name: str) -> int:
        """Return how often a file was fetched."""
        return sum(r.startswith("GET ") and r.endswith(f"/{name}") for r in self.requests)

    def download(self, handler: Any) -> None:
        parts = list(map(unquote, urlsplit(handler.path).path.strip("/").split("/")))
        api = parts[:2] == ["api", "models"]
        repo, rest = "/".join(parts[2:4] if api else parts[:2]), parts[4:] if api else parts[2:]
        branches = self.models.get(repo)
        if branches is None:
            handler.reply(404, {"error": "no"}, X_Error_Code="RepoNotFound")
            return
        if rest == ["refs"]:
            refs = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": self.commit(repo, name)}
                for name in branches
                if not name.startswith("refs/")  # pull requests are listed only when asked for
            ]
            handler.reply(200, {"branches": refs, "tags": [], "converts": []})
            return
        by_commit = {self.commit(repo, name): folder for name, folder in branches.items()}
        revision = rest[1] if len(rest) > 1 else "main"
        folder = by_commit.get(revision) or branches.get(revision)
        if folder is None:
            handler.reply(404, {"error": "no"}, X_Error_Code="RevisionNotFound")
            return
        commit = revision if revision in by_commit else self.commit(repo, revision)
        files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
        if not rest or rest[0] == "revision":
            siblings = [{"rfilename": name} for name in files]
            handler.reply(200, {"id": repo, "sha": commit, "siblings": siblings})
        elif rest[0] == "tree":
            entries = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": _etag(path)}
                for name, path in files.items()
            ]
            handler.reply(200, entries)
        elif rest[0] == "resolve" and "/".join(rest[2:]) in files:
            self._send_file(handler, files["/".join(rest[2:])], commit)
        else:
            handler.reply(404, {"error": "no"}, X_Error_Code="EntryNotFound")

    def _send_file(self, handler: Any, path: Path, commit: str) -> None:
        data, code = path.read_bytes(), 200
        headers = {"X_Repo_Commit": commit, "ETag": f'"{_etag(path)}"', "Accept_Ranges": "bytes"}
        if asked := handler.headers.get("Range"):
            self.ranges.append(f"{path.name} {asked}")
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            data, code = data[start:], 206
        handler.reply(code, data, **headers, Content_Type="application/octet-stream")

    def upload(self, handler: Any) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        path = handler.path
        if handler.headers.get("Authorization") != f"Bearer {self.token}":
            handler.reply(401, {"error": "Invalid credentials"})
        elif path == "/api/repos/create":
            facts = json.loads(body)
            self.created.append(facts)
            name = f"{facts.get('organization') or 'me'}/{facts['name']}"
            kind = "datasets/" if facts.get("type") == "dataset" else ""
            handler.reply(200, {"url": f"{self.url}/{kind}{name}"})
        elif "/preupload/" in path:
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            handler.reply(200, {"files": modes})
        elif "/commit/" in path:
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.files[value["path"]] = base64.b64decode(value["content"])
            url = f"{self.url}/me/x/commit/{'0' * 40}"
            handler.reply(200, {"commitUrl": url, "commitOid": "0" * 40, "success": True})
        else:
            handler.reply(200, {})


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def hub_as_default(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """Yield a hub that the client uses in place of huggingface.co, with a cache of its own."""
    from huggingface_hub import constants

    hub = Hub()
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("selfcorrect.evaluate.measuring.sources.PAUSES", (0.0, 0.0))
    yield hub
    hub.close()
