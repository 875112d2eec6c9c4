"""Lines for the user are written or lost without an error, for every kind of stream and descriptor."""

import io
import json
import math
import os
import subprocess
import sys

import pytest

from estune import console
from estune.errors import UserError

# Python tells on stderr that a stream which takes nothing could not be flushed as it was dropped.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Bare:
    """A user's stream with a method ``write`` only."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text


class Hostile:
    """A user's stream that raises an unusual exception."""

    def write(self, text):
        raise KeyError(text)

    flush = isatty = fileno = write


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


def detached():
    stream = io.TextIOWrapper(io.BytesIO())
    stream.detach()
    return stream


def without_reader():
    read, write = os.pipe()
    os.close(read)
    return io.TextIOWrapper(io.FileIO(write, "w"), write_through=True)


def full():
    return io.TextIOWrapper(io.FileIO("/dev/full", "w"), write_through=True)


STREAMS = {"none": lambda: None, "closed": closed, "detached": detached, "bare": Bare, "hostile": Hostile,
           "reader gone": without_reader, "full": full}  # fmt: skip


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("function", ["say", "note", "warn", "show_progress"])
def test_no_stream_makes_a_line_raise(monkeypatch, name, function):
    stream = STREAMS[name]()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    for text in ("a line", "ß ± \udc80"):
        getattr(console, function)(text)
    assert not console.is_terminal(stream)
    if name == "bare" and function != "show_progress":
        assert "a line\n" in stream.text


@pytest.mark.parametrize("function", [console.say, console.note])
def test_a_deleted_stream_takes_nothing(monkeypatch, function):
    monkeypatch.delattr(sys, "stdout")
    monkeypatch.delattr(sys, "stderr")
    function("a line")
    monkeypatch.undo()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_characters_that_an_encoding_lacks_are_escaped(monkeypatch, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    console.say("0.5 ± 1 \N{SNOWMAN}")
    wanted = "0.5 ± 1 \N{SNOWMAN}\n".encode(encoding, "backslashreplace")
    assert stream.buffer.getvalue() == wanted


@pytest.mark.parametrize("make", [without_reader, full], ids=["reader gone", "full"])
def test_a_result_that_is_lost_is_an_error(monkeypatch, make):
    monkeypatch.setattr(sys, "stdout", make())
    expected = BrokenPipeError if make is without_reader else UserError
    for write in (lambda: console.print_result("1"), lambda: console.print_json({})):
        with pytest.raises(expected):
            write()


def test_json_has_null_for_what_it_lacks(monkeypatch, capsys):
    console.print_json({"a": math.nan, "b": [1.5, math.inf, {"c": -math.inf}], "d": (True, None, "NaN")})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.5, None, {"c": None}], "d": [True, None, "NaN"]}


@pytest.mark.parametrize("name", STREAMS)
def test_an_unfailing_stream_raises_nothing(name):
    stream = console.Unfailing(STREAMS[name]())
    print("a line", file=stream, flush=True)
    assert stream.write("four") == 4


def test_an_unfailing_stream_has_the_attributes_of_the_stream_it_wraps():
    inner = io.TextIOWrapper(io.BytesIO(), "latin-1")
    stream = console.Unfailing(inner)
    print("ß", file=stream)
    assert stream.buffer.getvalue() == b"\xdf\n"
    assert stream.encoding == "latin-1"
    with pytest.raises(AttributeError):
        _ = console.Unfailing(None).buffer


def python(script, **options):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("numbers", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_closed_descriptors_are_opened_and_the_others_kept(numbers):
    """A file that is opened next gets none of their numbers; a child process gets all three."""
    python(f"""
import os, subprocess, sys
before = [os.fstat(number).st_ino for number in range(3)]
for number in {numbers}:
    os.close(number)
from estune.console import open_missing_descriptors
open_missing_descriptors()
null = os.stat(os.devnull).st_ino
after = [os.fstat(number).st_ino for number in range(3)]
assert after == [null if number in {numbers} else before[number] for number in range(3)]
assert os.open(os.devnull, os.O_RDONLY) > 2
code = "import os; [os.fstat(number) for number in range(3)]"
assert subprocess.run([sys.executable, "-c", code], close_fds=False).returncode == 0
""")


@pytest.mark.parametrize("lost", ["reader gone", "full"])
def test_the_command_lines_own_streams_never_raise(lost):
    """There is no error in print, in a library's direct write, or at the interpreter's end."""
    done = python(f"""
import os, sys
from estune.console import take_over_process
kept = os.dup(2)
if {lost!r} == "full":
    end = os.open("/dev/full", os.O_WRONLY)
else:
    read, end = os.pipe()
    os.close(read)
os.dup2(end, 1)
os.dup2(end, 2)
take_over_process()
for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
    print("a" * 100_000, file=stream, flush=True)
    stream.buffer.write(b"b" * 100_000)
    stream.writelines(["c\\n", "d"])
    assert stream.errors == "backslashreplace" and not stream.isatty()
os.write(kept, b"the end\\n")
""")
    assert done.stderr == "the end\n"


def test_a_full_disk_that_has_room_again_takes_lines_again(tmp_path):
    python(f"""
import os
from estune.console import say, take_over_process
log = os.open({str(tmp_path / "log")!r}, os.O_WRONLY | os.O_CREAT)
full = os.open("/dev/full", os.O_WRONLY)
os.dup2(log, 1)
take_over_process()
for target, text in ((log, "first"), (full, "lost"), (log, "last")):
    os.dup2(target, 1)
    say(text)
""")
    assert (tmp_path / "log").read_text() == "first\nlast\n"


def test_a_stream_that_another_program_made_non_blocking_gets_all():
    script = """
import os, sys
from estune.console import take_over_process
os.set_blocking(1, False)
take_over_process()
for number in range(4000):
    print(number, "x" * 100)
"""
    assert python(script).stdout == "".join(f"{number} {'x' * 100}\n" for number in range(4000))


def test_descriptors_without_a_reader_lead_nowhere_and_others_stay():
    python("""
import os
from estune.console import release_abandoned_descriptors
read, end = os.pipe()
kept, other = os.pipe()
os.dup2(end, 1)
os.dup2(other, 2)
os.close(end)
release_abandoned_descriptors()
os.write(1, b"while the reader is there")
os.close(read)
release_abandoned_descriptors()
os.write(1, b"lost")
os.write(2, b"kept")
assert os.read(kept, 100) == b"kept"
""")


def test_an_import_keeps_the_level_and_the_handlers_that_a_program_has_set() -> None:
    program = (
        "import logging; log = logging.getLogger('estune'); log.setLevel(logging.ERROR); mine = logging.NullHandler()\n"
        "log.addHandler(mine)\nimport estune.console\n"
        "assert log.level == logging.ERROR and log.handlers == [mine] and log.propagate\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
