"""A local HTTP server with scripted replies, and downloads from it."""

import contextlib
import hashlib
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from selfcorrect.evaluate.data.fetch import fetch_file

TEXT = b"".join(b"%06d a line of the file\n" % n for n in range(20_000))
SHA256 = hashlib.sha256(TEXT).hexdigest()


class Server:
    """A server whose replies `answer` writes; `ranges` are the Range headers of the requests."""

    def __init__(self, answer: Callable[["Server", Any], None]) -> None:
        self.ranges: list[str | None] = []
        self.sent: list[int] = []
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"

            def do_GET(self) -> None:
                with server.lock:
                    server.ranges.append(self.headers.get("Range"))
                    server.headers.append(dict(self.headers))
                    server.sent.append(0)
                    self.request_number = len(server.ranges) - 1
                with contextlib.suppress(ConnectionError):  # the client may hang up
                    answer(server, self)

            def send(self, body: bytes) -> None:
                # Counted before it is written: the client may have all of it before write returns.
                server.sent[self.request_number] += len(body)
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/file.txt"

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


def start_of(handler: Any) -> int:
    """Return the first byte that a request asks for."""
    range_ = handler.headers.get("Range")
    return int(range_.removeprefix("bytes=").removesuffix("-")) if range_ else 0


def head(handler: Any, status: int, **headers: object) -> None:
    """Send status and headers."""
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()


def send_rest(handler: Any, body: bytes, stop: int | None = None) -> None:
    """Reply as a proper server, from the requested byte on; break off at byte `stop`."""
    start = start_of(handler)
    length = len(body) - start
    if start:
        where = f"bytes {start}-{len(body) - 1}/{len(body)}"
        head(handler, 206, Content_Length=length, Content_Range=where)
    else:
        head(handler, 200, Content_Length=length)
    handler.send(body[start:stop])


def get(url: str, path: Path, **settings: Any) -> None:
    """Download TEXT from `url`, with three attempts and no pause unless `settings` differ."""
    fetch_file(
        url,
        path,
        **{"num_bytes": len(TEXT), "sha256": SHA256, "timeout_seconds": 5.0}
        | {"attempts": 3, "pause_seconds": 0.0}
        | settings,
    )
