"""The report as one self-contained HTML page, written to a file, or served live by `estune watch`.

The page embeds its data and needs neither a network nor a library.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from estune.console import say
from estune.errors import UserError
from estune.files import replace_file
from estune.monitor.report.answers import PAGE_BYTES
from estune.monitor.report.data import read_answers, read_runs

TEMPLATE = Path(__file__).with_name("page.html")
PLACE = "/*DATA*/"  # replaced by the data in the template
MOST_DIGITS = 10  # of a number in a query


def page(data: dict[str, Any], *, live: bool = False) -> str:
    """Return the page for the result of `read_runs`.

    With ``live`` the page keeps polling ``data.json``, and asks for the members' answers in the step that is shown.
    """
    text = json.dumps({**data, "live": live}, ensure_ascii=False, allow_nan=False)
    # Only these characters could end the script element or its string; JSON decodes the escapes.
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return TEMPLATE.read_text(encoding="utf-8").replace(PLACE, text)


def write_page(directories: Sequence[Path], path: Path) -> None:
    """Write the page of some runs, and replace an old page atomically.

    Raises:
        UserError: a directory holds no run.
    """
    html = page(read_runs(directories, PAGE_BYTES)).encode("utf-8", errors="replace")
    replace_file(path, lambda file: file.write(html))


class Handler(BaseHTTPRequestHandler):
    """Answers ``/`` with the page, ``/data.json`` with its data, and ``/answers.json`` with the answers in one step.

    All are read from disk at every request. ``answers.json?run=0&step=1`` names a run by its place in ``directories``.
    """

    directories: Sequence[Path] = ()
    hosts: Collection[str] = ()  # accepted Host headers; any other name may come from a DNS rebinding attack

    def do_GET(self) -> None:
        """Answer a request."""
        if urlsplit(f"//{self.headers.get('Host', '')}").hostname not in self.hosts:
            self.send_error(403)
            return
        name, _, query = self.path.partition("?")
        try:
            text = self._text(name, parse_qs(query))
        except (UserError, OSError, ValueError):  # the run's files are being replaced
            self.send_error(503)
            return
        if text is None:
            self.send_error(404)
        else:
            self._answer("text/html" if name == "/" else "application/json", text)

    def _text(self, name: str, query: dict[str, list[str]]) -> str | None:
        """Return what a path and its query name; None if they name nothing."""
        if name == "/":
            return page(read_runs(self.directories), live=True)
        if name == "/data.json":
            return _json(read_runs(self.directories))
        run, step = (query.get(key, [""])[0] for key in ("run", "step"))
        if name != "/answers.json" or not (_is_number(run) and _is_number(step) and int(run) < len(self.directories)):
            return None
        answers = read_answers(self.directories[int(run)], int(step))
        return None if answers is None else _json(answers)

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


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < MOST_DIGITS


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
    """Serve the page to browsers on this machine until interrupted."""
    with serve(directories, host, port) as server:
        say(f"estune: http://{host}:{server.server_port}/ (press Ctrl-C to stop)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("")
    return 0
