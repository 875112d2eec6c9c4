"""A local stand-in for the model hub's API: its client can create repositories, upload and download.

It answers the requests that the client sends. Files up to `LFS_BYTES` are part of the commit; larger files use the
large file protocol, as on the hub. ``HF_ENDPOINT`` with ``HF_HUB_DISABLE_XET=1`` points the client to it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LFS_BYTES = 4096


class Hub(ThreadingHTTPServer):
    """The repositories (name -> path -> contents), and every request received."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.branches: dict[
            tuple[str, str], dict[str, bytes]
        ] = {}  # (name, revision) -> files of a branch that is not main
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}  # sha256 -> contents
        self.requests: list[str] = []
        self.refused: set[str] = set()  # requests answered with 403: "create", "commit"
        self.wrong_digests: dict[str, str] = {}  # path -> sha256 reported instead of the right one

    def at(self, name: str, revision: str) -> tuple[dict[str, bytes], str]:
        """Return a repository's files at a branch or commit, and its commit."""
        for (repository, branch), files in self.branches.items():
            commit = hashlib.sha1(branch.encode()).hexdigest()
            if repository == name and revision in (branch, commit):
                return files, commit
        return self.repositories.get(name, {}), "0" * 40

    @property
    def url(self) -> str:
        """The address at which it listens."""
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """Answers one request; ``server`` is the `Hub`."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, body: bytes = b"", kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode())

    def _path(self) -> str:
        path = self.path.partition("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        return path

    def do_POST(self) -> None:
        """Create a repository, prepare an upload, or commit."""
        path, body, hub = self._path(), self._body(), self.server
        if path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request.get('organization') or 'me'}/{request['name']}"
            if "create" in hub.refused:
                self._json({"error": "You may not create this"}, 403)
                return
            status = 409 if name in hub.repositories else 200
            hub.repositories.setdefault(name, {})
            hub.private.setdefault(name, bool(request.get("private")) or request.get("visibility") == "private")
            self._json({"url": f"{hub.url}/{name}", "id": name}, status)
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            self._json({"files": [
                {"path": file["path"], "uploadMode": "lfs" if file["size"] > LFS_BYTES else "regular",
                 "shouldIgnore": False} for file in files
            ]})  # fmt: skip
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            self._json({"transfer": "basic", "objects": [
                {"oid": one["oid"], "size": one["size"], "actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}}
                for one in objects
            ]})  # fmt: skip
        elif "/commit/" in path:
            if "commit" in hub.refused:
                self._json({"error": "You may not commit"}, 403)
                return
            name = path.removeprefix("/api/models/").partition("/commit/")[0]
            files = hub.repositories[name]
            for line in body.splitlines():
                part = json.loads(line)
                value = part["value"]
                if part["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif part["key"] == "lfsFile":
                    files[value["path"]] = hub.objects[value["oid"]]
            oid = "1" * 40
            self._json(
                {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{name}/commit/{oid}", "hookOutput": ""}
            )
        else:
            self._json({"error": "no such thing"}, 404)

    def do_PUT(self) -> None:
        """Receive a large file."""
        digest, body = self._path().removeprefix("/lfs/"), self._body()
        if hashlib.sha256(body).hexdigest() != digest:
            self._json({"error": "not these bytes"}, 400)
            return
        self.server.objects[digest] = body
        self._send(200)

    def do_HEAD(self) -> None:
        """Describe a file."""
        self.do_GET()

    def do_GET(self) -> None:
        """Describe a user or a repository, or send a file."""
        path, hub = self._path(), self.server
        if path == "/api/whoami-v2":
            self._json({"name": "me", "type": "user", "auth": {}})
            return
        if path.startswith("/api/models/"):
            place, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            name, _, listing = place.partition("/tree/")
            if name not in hub.repositories:
                self._send(404, b'{"error": "Repository not found"}', X_Error_Code="RepoNotFound")
                return
            files, commit = hub.at(name, revision or listing.partition("/")[0])
            if listing:
                self._json([_entry(path, data) for path, data in files.items()])
                return
            self._json({"id": name, "sha": commit, "private": hub.private.get(name, False), "siblings": [
                _sibling(path, data, hub.wrong_digests) for path, data in files.items()
            ]})  # fmt: skip
            return
        name, _, rest = path.lstrip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        files, commit = hub.at(name, revision)
        data = files.get(file)
        if data is None:
            self._send(404, b"{}", X_Error_Code="EntryNotFound")
            return
        etag = hashlib.sha256(data).hexdigest()
        self._send(200, data, "application/octet-stream", ETag=f'"{etag}"', X_Repo_Commit=commit)


def _sibling(path: str, data: bytes, wrong_digests: dict[str, str]) -> dict[str, Any]:
    entry: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
    if len(data) > LFS_BYTES:
        digest = wrong_digests.get(path) or hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 130}
    return entry


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest(),
    }  # fmt: skip
    if len(data) > LFS_BYTES:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


@contextmanager
def running() -> Iterator[Hub]:
    """Run a hub during a test."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
