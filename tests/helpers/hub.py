"""A local server with the part of the hub's HTTP API that it takes to download or upload one revision."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """repositories: {"model user/name" or "dataset user/name": folder}. `url`: value for HF_ENDPOINT."""

    def __init__(self, repositories: dict[str, Path]) -> None:
        self.repositories = repositories
        self.requests: list[str] = []
        self.created: dict[str, bool] = {}  # "model user/name" -> private
        self.uploaded: dict[str, bytes] = {}
        self.fail_after: int | None = None  # fail after this many more file downloads
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self, kind: str, name: str) -> dict[str, Path]:
        folder = self.repositories.get(f"{kind} {name}")
        found = sorted(folder.rglob("*")) if folder else []
        return {str(path.relative_to(folder)): path for path in found if path.is_file() and folder}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                path = unquote(urlsplit(self.path).path)
                if found := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)/tree/[^/]+", path):
                    self.tree(*found.groups())
                elif found := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)(/revision/[^/]+)?", path):
                    self.info(*found.groups())
                elif found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                    self.file("dataset" if found[1] else "model", found[2], found[4])
                else:
                    self.answer(404, b"{}")

            do_HEAD = do_GET

            def do_POST(self) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                sent = self.rfile.read(int(self.headers["Content-Length"]))
                if not self.headers.get("Authorization"):
                    self.answer(401, b"{}")
                elif self.path == "/api/repos/create":
                    hub.created["model user/name"] = b"private" in sent  # the name of a field, or a value
                    self.answer(200, json.dumps({"url": f"{hub.url}/user/name"}).encode())
                elif self.path == "/api/validate-yaml":
                    self.answer(200, json.dumps({"errors": [], "warnings": []}).encode())
                elif "/preupload/" in self.path:
                    one_by_one = {"uploadMode": "regular", "shouldIgnore": False}
                    files = [{"path": file["path"], **one_by_one} for file in json.loads(sent)["files"]]
                    self.answer(200, json.dumps({"files": files}).encode())
                elif "/commit/" in self.path:
                    for line in map(json.loads, sent.splitlines()):
                        if line["key"] == "file":
                            hub.uploaded[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    made = {
                        "success": True,
                        "commitOid": COMMIT,
                        "commitUrl": f"{hub.url}/user/name/commit/{COMMIT}",
                    }
                    self.answer(200, json.dumps(made).encode())
                else:
                    self.answer(404, b"{}")

            def info(self, kind: str, name: str, revision: str | None) -> None:
                files = hub.files(kind, name)
                wanted = (revision or "/revision/main").rpartition("/")[2]
                if not files and f"{kind} {name}" not in hub.created:
                    return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
                if wanted not in ("main", COMMIT):
                    return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                siblings = [{"rfilename": file} for file in files]
                content = {
                    "id": name,
                    "sha": COMMIT,
                    "siblings": siblings,
                    "private": hub.created.get(f"{kind} {name}", False),
                }
                self.answer(200, json.dumps(content).encode())

            def tree(self, kind: str, name: str) -> None:
                listed = [
                    {"type": "file", "path": file, "size": path.stat().st_size, "oid": _etag(path)}
                    for file, path in hub.files(kind, name).items()
                ]
                self.answer(200, json.dumps(listed).encode())

            def file(self, kind: str, name: str, file: str) -> None:
                path = hub.files(kind, name).get(file)
                if path is None:
                    return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
                if self.command == "GET" and hub.fail_after is not None:
                    hub.fail_after -= 1
                    if hub.fail_after < 0:
                        return self.answer(500, b"broken")
                more = {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": COMMIT}
                self.answer(200, path.read_bytes(), more)

            def answer(self, code: int, content: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(code)
                for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


def _etag(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
