"""`estune watch`: serves the live page of a running run to browsers on this machine."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from estune.console import say
from estune.errors import UserError
from estune.monitor.report.data import read_runs
from estune.monitor.report.page import page


class Handler(BaseHTTPRequestHandler):
    """Answers ``/`` with the page and ``/data.json`` with its data, which are read from disk at every request."""

    directories: Sequence[Path] = ()
    hosts: Collection[str] = ()  # accepted Host headers; any other name may come from a DNS rebinding attack

    def do_GET(self) -> None:
        """Answer a request."""
        if urlsplit(f"//{self.headers.get('Host', '')}").hostname not in self.hosts:
            self.send_error(403)
            return
        name = self.path.partition("?")[0]
        if name not in ("/", "/data.json"):
            self.send_error(404)
            return
        try:
            data = read_runs(self.directories)
        except (UserError, OSError, ValueError):  # the run's files are being replaced
            self.send_error(503)
            return
        if name == "/":
            self._answer("text/html", page(data, live=True))
        else:
            self._answer("application/json", json.dumps(data, ensure_ascii=False, allow_nan=False))

    def _answer(self, kind: str, text: str) -> None:
        body = text.encode("utf-8", errors="replace")
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


def serve(directories: Sequence[Path], host: str, port: int) -> ThreadingHTTPServer:
    """Return a bound server, which ``serve_forever`` runs; port 0 selects any free port.

    Raises:
        UserError: a directory holds no run, or the port is taken.
    """
    read_runs(directories)
    if not 0 <= port < 1 << 16:
        raise UserError(f"port must be between 0 and 65535, not {port}")
    hosts = {"localhost", "127.0.0.1", host.lower()}
    handler = type("RunHandler", (Handler,), {"directories": tuple(directories), "hosts": hosts})
    try:
        return ThreadingHTTPServer((host, port), handler)
    except OSError as error:
        raise UserError(f"cannot serve on {host}:{port}: {error.strerror}; choose another --port") from None


def watch_command(directories: Sequence[Path], host: str, port: int) -> int:
    """Serve until interrupted."""
    with serve(directories, host, port) as server:
        say(f"estune: http://{host}:{server.server_port}/ (press Ctrl-C to stop)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("")
    return 0
