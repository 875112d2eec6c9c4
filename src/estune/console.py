"""What estune tells its user on stdout and stderr, without ever ending a run.

A stream can be missing (``>&-``, ``sys.stdout = None``), its reader can leave (``| head``), its terminal can close
(SIGHUP), its disk can fill up, and its encoding can lack a character. In each case the text is lost, or written with
escapes, and the run continues. Only `print_result` and `print_json`, which print what a command was asked for, raise.

Notes and warnings are records of the logger ``estune``, which a Python program can silence or redirect. From Python
the streams are the user's, and `say`, `note` and `warn` catch what they raise. The command line owns its process:
`take_over_process` replaces the streams by such that never raise, whoever writes to them.
"""

from __future__ import annotations

import io
import json
import logging
import os
import select
import sys
from contextlib import suppress
from typing import Any

from estune.errors import UserError


class _Handler(logging.Handler):
    """Writes records to stderr as it is when they come, and never raises."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "warning: " if record.levelno >= logging.WARNING else ""
        _write(_stream("stderr"), f"estune: {level}{record.getMessage()}\n")


LOGGER = logging.getLogger("estune")
LOGGER.setLevel(logging.INFO)
LOGGER.propagate = False  # as the libraries of this field do, else a root handler would print everything twice
if not LOGGER.handlers:
    LOGGER.addHandler(_Handler())

_json_descriptor: int | None = None  # where `print_json` writes; None: to sys.stdout
_reader_left = False  # of descriptor 1, which leads to the null device since


def say(text: str) -> None:
    """Print a line on stdout."""
    _write(_stream("stdout"), text + "\n")


def note(text: str) -> None:
    """Log ``text`` at level INFO: ``estune: <text>`` on stderr."""
    LOGGER.info("%s", text)


def warn(text: str) -> None:
    """Log ``text`` at level WARNING: ``estune: warning: <text>`` on stderr."""
    LOGGER.warning("%s", text)


def show_progress(text: str) -> None:
    """Replace the last line on stderr by ``text``; does nothing where stderr is no terminal."""
    if is_terminal(_stream("stderr")):
        _write(_stream("stderr"), f"\r{text}")


def is_terminal(stream: Any) -> bool:
    """Return whether a stream is there and is a terminal."""
    try:
        return bool(stream is not None and stream.isatty())
    except Exception:  # the stream may be any object of the user's
        return False


def print_result(text: str) -> None:
    """Print lines that a command was asked for on stdout.

    Raises:
        BrokenPipeError: the reader has left.
        UserError: stdout cannot be written for another reason.
    """
    if _reader_left:
        raise BrokenPipeError
    try:
        print(text, flush=True)
        error = getattr(getattr(sys.stdout, "buffer", None), "error", None)  # of `_Descriptor`, which never raises
    except OSError as raised:
        _silence(sys.stdout)
        error = raised
    _raise(error)


def print_json(value: Any) -> None:
    """Print one JSON object on stdout; NaN and infinite numbers become null.

    Raises:
        BrokenPipeError: the reader has left.
        UserError: stdout cannot be written for another reason.
    """
    text = json.dumps(finite_or_none(value), allow_nan=False)
    if _json_descriptor is None:
        print_result(text)
    else:
        _raise(_write_all(_json_descriptor, f"{text}\n".encode("ascii")))


def finite_or_none(value: Any) -> Any:
    """Return a value with every float that JSON lacks (NaN, infinite) replaced by None, also in lists and dicts."""
    if isinstance(value, dict):
        return {name: finite_or_none(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_none(item) for item in value]
    is_float = isinstance(value, float)
    return None if is_float and (value != value or value in (float("inf"), float("-inf"))) else value


class Unfailing:
    """A text stream around another one, or around None: what cannot be written is lost, and nothing is raised."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or lose the text."""
        _write(self._stream, text)
        return len(text)

    def flush(self) -> None:
        """Do nothing: every write is flushed."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def release_abandoned_descriptors() -> None:
    """Let descriptors 1 and 2 lead to the null device where their readers have left.

    For code that writes to them directly, and the programs that it starts: an error or SIGPIPE would end them.
    """
    global _reader_left
    for descriptor in (1, 2):
        ready = select.poll()
        ready.register(descriptor, 0)  # errors are reported without being asked for
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in ready.poll(0)):
            _lead_nowhere(descriptor)
            _reader_left = _reader_left or descriptor == 1


def pass_on(data: bytes) -> None:
    """Write bytes to descriptor 2, or lose them."""
    _write_all(2, data)


def open_missing_descriptors() -> None:
    """Let every closed descriptor among 0, 1 and 2 lead to the null device.

    Otherwise the next file that is opened, such as the journal, would get its number, and whatever a library prints
    would be written into that file.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            os.set_inheritable(descriptor, True)


def take_over_process() -> None:
    """Give this process standard streams that never raise; for processes of the command line's own."""
    open_missing_descriptors()
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  (for the process's life)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        before = getattr(sys, name)
        with suppress(OSError, ValueError, AttributeError):
            before.flush()
        stream = io.TextIOWrapper(
            _Descriptor(descriptor, "w", closefd=False),
            encoding=getattr(before, "encoding", None) or "utf-8",
            errors="backslashreplace",
            line_buffering=True,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def keep_stdout_for_json() -> None:
    """Keep stdout for `print_json` from here on: what else is written to descriptor 1, by whomever, goes to stderr.

    The descriptor never leads back: C libraries write their buffers out as the process ends.
    """
    global _json_descriptor
    sys.stdout.flush()
    _json_descriptor = os.dup(1)
    os.dup2(2, 1)


class _Descriptor(io.FileIO):
    """A descriptor, open for writing: what cannot be written is lost, and ``error`` says why the last write was."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of ``data``, or lose what is left of it."""
        self.error = _write_all(self.fileno(), data)
        return memoryview(data).nbytes


def _write_all(descriptor: int, data: Any) -> OSError | None:
    """Write bytes to a descriptor; return what kept some of them from being written."""
    view = memoryview(data).cast("B")
    try:
        while view:
            try:
                view = view[os.write(descriptor, view) :]
            except BlockingIOError:  # another program made the terminal or pipe non-blocking
                select.select([], [descriptor], [])
    except (OSError, ValueError) as error:  # ValueError: `select` knows no descriptors above 1023
        return error if isinstance(error, OSError) else OSError(str(error))
    return None


def _stream(name: str) -> Any:
    return getattr(sys, name, None)


def _write(stream: Any, text: str) -> None:
    """Write to a text stream, whatever object that is, or lose the text."""
    if stream is None:
        return
    try:
        try:
            stream.write(text)
        except UnicodeEncodeError:
            encoding = getattr(stream, "encoding", None) or "ascii"
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        if hasattr(stream, "flush"):
            stream.flush()
    except OSError as error:
        if not isinstance(error, BlockingIOError):
            _silence(stream)
    except Exception:  # the stream may be any object of the user's
        pass


def _silence(stream: Any) -> None:
    """Let a standard stream that cannot be written lead nowhere: Python fails where it cannot flush one at its end."""
    with suppress(Exception):  # as above
        if stream.fileno() in (1, 2):
            _lead_nowhere(stream.fileno())


def _lead_nowhere(descriptor: int) -> None:
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), descriptor)


def _raise(error: OSError | None) -> None:
    if isinstance(error, BrokenPipeError):
        raise error
    if error is not None:
        raise UserError(f"the result cannot be written to stdout ({error.strerror or error})") from error
