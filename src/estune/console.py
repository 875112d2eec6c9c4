"""What estune tells its user on stdout and stderr, without ever ending a run.

A stream can be missing (``>&-``, ``sys.stdout = None``), its reader can leave (``| head``), its terminal can close
(SIGHUP), its disk can fill up, and its encoding can lack a character. In each case the line is lost, or written with
escapes, and the run continues. `take_over_process` and `json_only` change the process itself, so only the command line
calls them.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

_json_descriptor: int | None = None  # where `print_json` writes while `json_only` is active; None: sys.stdout


def say(text: str) -> None:
    """Print a line on stdout."""
    _write("stdout", text + "\n")


def note(text: str) -> None:
    """Print ``estune: <text>`` on stderr."""
    _write("stderr", f"estune: {text}\n")


def warn(text: str) -> None:
    """Print ``estune: warning: <text>`` on stderr."""
    _write("stderr", f"estune: warning: {text}\n")


def show_progress(text: str) -> None:
    """Replace the last line on stderr by ``text``; does nothing where stderr is no terminal."""
    if is_terminal(sys.stderr):
        _write("stderr", f"\r{text}")


def is_terminal(stream: Any) -> bool:
    """Return whether a stream is there and is a terminal."""
    try:
        return bool(stream is not None and stream.isatty())
    except (OSError, ValueError, AttributeError):
        return False


def _write(name: str, text: str) -> None:
    stream = getattr(sys, name)
    if stream is None:
        return
    try:
        try:
            stream.write(text)
        except UnicodeEncodeError:
            encoding = getattr(stream, "encoding", None) or "ascii"
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except (OSError, ValueError, RuntimeError):  # RuntimeError: a signal handler writes while the stream is in use
        _silence(stream)


def _silence(stream: Any) -> None:
    """Let a standard stream that cannot be written lead nowhere, so that its buffer does no harm later."""
    with suppress(OSError, ValueError, AttributeError):
        if stream.fileno() in (1, 2):
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())


class _Survivor(io.TextIOWrapper):
    """A text stream whose writes never raise `OSError`: libraries write warnings and progress bars to stderr, too."""

    def write(self, text: str) -> int:
        """Write, or lose the text."""
        try:
            return super().write(text)
        except OSError:
            _silence(self)
            return len(text)

    def flush(self) -> None:
        """Flush, or lose what was buffered."""
        try:
            super().flush()
        except OSError:
            _silence(self)


def take_over_process() -> None:
    """Make the standard streams of this process safe to use; for the command line's own process.

    Closed descriptors 0, 1 and 2 lead to the null device: otherwise the next file that is opened, such as the journal,
    would get their number, and whatever a library prints would be written into it.
    """
    open_missing_descriptors()
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  (for the process's life)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if isinstance(sys.stderr, io.TextIOWrapper):
        encoding = sys.stderr.encoding
        sys.stderr = _Survivor(sys.stderr.detach(), encoding, errors="backslashreplace", line_buffering=True)


def open_missing_descriptors() -> None:
    """Let every closed descriptor among 0, 1 and 2 lead to the null device."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            os.set_inheritable(descriptor, True)


@contextmanager
def json_only() -> Iterator[None]:
    """Keep stdout for `print_json`: what else is written to descriptor 1, at whatever level, goes to stderr."""
    global _json_descriptor
    sys.stdout.flush()
    _json_descriptor = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        with suppress(OSError):
            sys.stdout.flush()
        os.dup2(_json_descriptor, 1)
        os.close(_json_descriptor)
        _json_descriptor = None


def print_json(value: Any) -> None:
    """Print one JSON object on stdout.

    Raises:
        BrokenPipeError: the reader has left.
    """
    text = json.dumps(value, allow_nan=False) + "\n"
    if _json_descriptor is None:
        print(text, end="", flush=True)
        return
    data = memoryview(text.encode("ascii"))
    while data:
        data = data[os.write(_json_descriptor, data) :]


def finite_or_none(value: Any) -> Any:
    """Return None for a float that JSON lacks (NaN, infinite), and any other value as it is."""
    is_float = isinstance(value, float)
    return None if is_float and (value != value or value in (float("inf"), float("-inf"))) else value
