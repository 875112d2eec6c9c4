"""Crash-safe files: an append is on disk when it returns, and a replacement is either complete or absent."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from estune.errors import ExternalError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def is_full_disk(error: OSError) -> bool:
    """Return whether a write failed because the disk is full."""
    return error.errno in _NO_SPACE


def full_disk_message(error: OSError, path: Path | str) -> str:
    """Return the error message for a write that found the disk full."""
    return f"no space left to write {path} ({error.strerror}); existing files are intact: free space, then --resume"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the `OSError` of a full disk into an `ExternalError` that says what to do."""
    try:
        yield
    except OSError as error:
        if is_full_disk(error):
            raise ExternalError(full_disk_message(error, path)) from None
        raise


def append_line(path: Path, line: str) -> None:
    """Append one line and fsync. If the disk is full, truncate the file to its former size.

    Raises:
        ExternalError: no space left.
    """
    with writing(path):
        fresh = not path.exists()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            try:
                _write_all(descriptor, line.encode("utf-8") + b"\n")
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
        if fresh:
            sync_directory(path.parent)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file beside ``path``, fsync it and rename it over ``path``: readers see the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with writing(path):
            with partial.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            sync_directory(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as indented JSON."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    replace_file(path, lambda file: file.write(text.encode("utf-8")))


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text; raise ValueError if it is not JSON or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("too deeply nested") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file holds anything else.
    """
    value = parse_json(path.read_bytes())
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def is_count(value: Any) -> bool:
    """Return whether a value read from JSON is an integer >= 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_number(value: Any) -> bool:
    """Return whether a value read from JSON is a number, NaN and infinities included."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def remove_path(path: Path) -> None:
    """Delete a file, a link (not its target), or a directory with its contents; do nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """Return a hash (32 hexadecimal digits) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def sync_directory(path: Path) -> None:
    """Fsync a directory, so that its entries (a rename, a new file) are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Fsync every file below a directory, and the directory."""
    for child in sorted(path.rglob("*")):
        descriptor = os.open(child, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    sync_directory(path)


def try_lock(directory: Path) -> int | None:
    """Lock a directory until the returned descriptor closes or the process dies; None if another process holds it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
