"""Output on stdout and stderr. A stream that fails never ends a run.

A stream can be missing (``>&-``, ``sys.stdout = None``), its reader can leave (``| head``), its terminal can close
(SIGHUP), its disk can fill up, and its encoding can lack a character. In each case the text is dropped or escaped, and
the run continues. Only `print_result` and `print_json` raise: they print the result that a command was asked for.

Notes and warnings are records of the logger ``estune``, which a Python program can silence or redirect. In a Python
program the streams are the user's; `say`, `note` and `warn` catch every error of theirs. The command line owns its
process: `take_over_process` replaces the streams by ones that never raise, whichever code writes to them.
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
    """Writes records to the current ``sys.stderr``; never raises."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "warning: " if record.levelno >= logging.WARNING else ""
        _write(_stream("stderr"), f"estune: {level}{record.getMessage()}\n")


LOGGER = logging.getLogger("estune")
if LOGGER.level == logging.NOTSET:  # a program may set level and handlers before it imports estune
    LOGGER.setLevel(logging.INFO)
if not LOGGER.handlers:
    LOGGER.addHandler(_Handler())
    LOGGER.propagate = False  # as in transformers: with a root handler every record would be printed twice

_json_descriptor: int | None = None  # descriptor that `print_json` writes to; None: sys.stdout
_owns_process = False  # whether `take_over_process` was called
_reader_left = False  # whether the reader of descriptor 1 has left; the descriptor then leads to the null device


def say(text: str) -> None:
    """Print a line on stdout."""
    _write(_stream("stdout"), text + "\n")


def note(text: str) -> None:
    """Log ``text`` at level INFO: ``estune: <text>`` on stderr."""
    LOGGER.info("%s", text)


def warn(text: str) -> None:
    """Log ``text`` at level WARNING: ``estune: warning: <text>`` on stderr."""
    LOGGER.warning("%s", text)


def counted(number: int, noun: str) -> str:
    """Return ``1 step`` or ``2 steps`` for the noun ``step``."""
    return f"{number} {noun}{'s' * (number != 1)}"


def show_progress(text: str) -> None:
    """Replace the last line on stderr by ``text``; do nothing if stderr is not a terminal."""
    if is_terminal(_stream("stderr")):
        _write(_stream("stderr"), f"\r{text}")


def is_terminal(stream: Any) -> bool:
    """Return whether a stream exists and is a terminal."""
    try:
        return bool(stream is not None and stream.isatty())
    except Exception:  # the user may have installed any object as a stream
        return False


def print_result(text: str) -> None:
    """Print the result of a command on stdout.

    Raises:
        BrokenPipeError: the reader has left.
        UserError: stdout cannot be written for another reason.
    """
    if _reader_left:
        raise BrokenPipeError
    try:
        print(text, flush=True)
        error = getattr(getattr(sys.stdout, "buffer", None), "error", None)  # `_Descriptor` never raises
    except OSError as raised:
        _silence(sys.stdout)
        error = raised
    _raise(error)


def rounded(value: Any, digits: int = 12) -> Any:
    """Return a value with each float rounded to so many significant digits, in nested lists and dicts too."""
    if isinstance(value, dict):
        return {name: rounded(item, digits) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


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
    """Return a value with each NaN or infinite float replaced by None, in nested lists and dicts too."""
    if isinstance(value, dict):
        return {name: finite_or_none(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_none(item) for item in value]
    is_float = isinstance(value, float)
    return None if is_float and (value != value or value in (float("inf"), float("-inf"))) else value


class Unfailing:
    """Wraps a text stream, or None. Text that cannot be written is dropped; no method raises."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text, or drop it."""
        _write(self._stream, text)
        return len(text)

    def flush(self) -> None:
        """Do nothing: each write flushes."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def release_abandoned_descriptors() -> None:
    """Redirect descriptors 1 and 2 to the null device if their readers have left.

    Code that writes to a descriptor directly, and programs that it starts, would otherwise end by an error or SIGPIPE.
    """
    global _reader_left
    for descriptor in (1, 2):
        ready = select.poll()
        ready.register(descriptor, 0)  # poll reports errors in any case
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in ready.poll(0)):
            _lead_nowhere(descriptor)
            _reader_left = _reader_left or descriptor == 1


def pass_on(data: bytes) -> None:
    """Write bytes to descriptor 2, or drop them."""
    _write_all(2, data)


def open_missing_descriptors() -> None:
    """Open the null device on each closed descriptor among 0, 1 and 2.

    Otherwise the next opened file, such as the journal, would get that number, and the output of a library would be
    written into the file.
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


def owns_process() -> bool:
    """Return whether the command line owns this process, and not a Python program that has imported estune."""
    return _owns_process


def take_over_process() -> None:
    """Replace this process's standard streams by ones that never raise; for processes that the command line owns."""
    global _owns_process
    _owns_process = True
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
    """Reserve stdout for `print_json`. All other output on descriptor 1 goes to stderr from now on.

    The redirection is permanent, because C libraries flush their buffers when the process ends.
    """
    global _json_descriptor
    sys.stdout.flush()
    _json_descriptor = os.dup(1)
    os.dup2(2, 1)


class _Descriptor(io.FileIO):
    """A descriptor, open for writing. Data that cannot be written is dropped; ``error`` is the last write's error."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of ``data``, or drop the rest of it."""
        self.error = _write_all(self.fileno(), data)
        return memoryview(data).nbytes


def _write_all(descriptor: int, data: Any) -> OSError | None:
    """Write bytes to a descriptor; return the error that stopped the write, or None."""
    view = memoryview(data).cast("B")
    try:
        while view:
            try:
                view = view[os.write(descriptor, view) :]
            except BlockingIOError:  # another program made the terminal or pipe non-blocking
                select.select([], [descriptor], [])
    except (OSError, ValueError) as error:  # ValueError: `select` takes no descriptor above 1023
        return error if isinstance(error, OSError) else OSError(str(error))
    return None


def _stream(name: str) -> Any:
    return getattr(sys, name, None)


def _write(stream: Any, text: str) -> None:
    """Write to a text stream, which may be any object, or drop the text."""
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
    except Exception:  # the user may have installed any object as a stream
        pass


def _silence(stream: Any) -> None:
    """Redirect a broken standard stream to the null device: Python exits with an error if its last flush fails."""
    with suppress(Exception):  # the user may have installed any object as a stream
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
