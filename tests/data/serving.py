"""A server of files as object stores are: parts of files, ETags, listings, refusals; and a count of what it gave."""

from __future__ import annotations

import hashlib
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Files:
    """What is served. tags: `strong`, `weak` or none. token: what `Authorization` must be. served: bytes given, by name. age: of the dates, in seconds."""

    def __init__(self, folder: Path):
        self.folder, self.url = folder, ""
        self.tags, self.token, self.age = "strong", "", 0.0
        self.served: Counter[str] = Counter()


@contextmanager
def serving(folder: Path) -> Iterator[Files]:
    files = Files(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def _answer(self, body: bool) -> None:
            path = files.folder / self.path.strip("/")
            if files.token and self.headers.get("Authorization") != files.token:
                self._send(403, b"", body)
            elif path.is_dir():
                links = "".join(f'<a href="{p.name}{"/" if p.is_dir() else ""}">x</a>' for p in sorted(path.iterdir()))
                self._send(200, links.encode(), body, {"Content-Type": "text/html"})
            elif not path.is_file():
                self._send(404, b"", body)
            else:
                self._file(path, body)

        def _file(self, path: Path, body: bool) -> None:
            data = path.read_bytes()
            headers = {"Last-Modified": formatdate(path.stat().st_mtime - files.age, usegmt=True), "Accept-Ranges": "bytes"}
            if files.tags:
                headers["ETag"] = ("W/" if files.tags == "weak" else "") + f'"{hashlib.md5(data).hexdigest()}"'
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            status = 200
            if asked:
                start, end = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
                status, headers["Content-Range"], data = 206, f"bytes {start}-{end}/{len(data)}", data[start:end + 1]
                if start > end:
                    self._send(416, b"", body)
                    return
            files.served[path.name] += len(data) if body else 0
            self._send(status, data, body, headers)

        def _send(self, status: int, data: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in ((headers or {}) | {"Content-Length": str(len(data))}).items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *args) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    files.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield files
    finally:
        server.shutdown()
        server.server_close()
