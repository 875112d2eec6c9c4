"""Odd standard streams and signals end no run and change nothing that it writes.

Fresh interpreters, because it is the interpreter that finds its descriptors closed. Every run is compared with one
whose streams are ordinary, byte by byte.
"""

import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from tiers import few, full

pytestmark = [
    pytest.mark.miniature,
    pytest.mark.xdist_group("processes"),
    pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full, and reads of a closed pty that fail"),
]

REWARDS = '''
"""Rewards that write wherever a reward can."""

import atexit
import ctypes
import os
import subprocess
import sys
import time

if "AT_IMPORT" in os.environ:
    print("print at import")
    os.write(1, b"descriptor at import\\n")
    subprocess.run(["echo", "program at import"])
    ctypes.CDLL(None).puts(b"C at import")
    sys.__stdout__.write("sys.__stdout__ at import\\n")
    atexit.register(os.write, 1, b"descriptor at exit\\n")
    atexit.register(print, "print at exit")


def _distance(completions, wanted):
    return [-((float(text) - value) ** 2) for text, value in zip(completions, wanted)]


def printing(completions, wanted, **_):
    print("p" * 200, "\\u2603")
    return _distance(completions, wanted)


def erring(completions, wanted, **_):
    sys.stderr.write("e" * 200 + "\\n")
    return _distance(completions, wanted)


def writing(completions, wanted, **_):
    os.write(1, b"w" * 200 + b"\\n")
    os.write(2, b"w" * 200 + b"\\n")
    return _distance(completions, wanted)


def program(completions, wanted, **_):
    subprocess.run(["echo", "program"], check=True)
    return _distance(completions, wanted)


def library(completions, wanted, **_):
    ctypes.CDLL(None).puts(b"C")
    return _distance(completions, wanted)


def slow(completions, wanted, **_):
    with open("calls", "a+") as file:
        file.write("called\\n")
        file.seek(0)
        n_calls = len(file.readlines())
    while n_calls == int(os.environ.get("STOP_AT", "0")):  # until somebody kills this process
        time.sleep(0.1)
    time.sleep(0.01)
    return _distance(completions, wanted)
'''
STEPS = 2
TRAIN = ("train", "--engine", "toy", "--task", "quadratic", "--report_to", "none", "--population_size", "4",
         "--max_steps", STEPS, "--output_dir", "run")  # fmt: skip
LOUD = ("printing", "erring", "writing", "program")
# What a shell does with the streams of the command "$@".
SHELL = {
    "closed stdin": '"$@" <&-',
    "closed stdout": '"$@" >&-',
    "closed stderr": '"$@" 2>&-',
    "closed stdin and stdout": '"$@" <&- >&-',
    "closed stdin and stderr": '"$@" <&- 2>&-',
    "closed stdout and stderr": '"$@" >&- 2>&-',
    "all closed": '"$@" <&- >&- 2>&-',
    "full stdout": '"$@" >/dev/full',
    "full stderr": '"$@" 2>/dev/full',
    "both full": '"$@" >/dev/full 2>&1',
    "read-only stdout": '"$@" 1</dev/null',
    "one line of stdout": '{ "$@"; echo $? >code; } | head -1 >first',
    "one byte of stdout": '{ "$@"; echo $? >code; } | head -c 1 >first',
    "one line of stderr": '{ { "$@"; echo $? >code; } 2>&1 >&3 | head -1 >first; } 3>&1',
    "one line of both": '{ "$@"; echo $? >code; } 2>&1 | head -1 >first',
    "no stdout reader": 'exec 5> >(true); wait $!; "$@" >&5 5>&-',
    "no stderr reader": 'exec 5> >(true); wait $!; "$@" 2>&5 5>&-',
    "no reader": 'exec 5> >(true); wait $!; "$@" >&5 2>&1 5>&-',
    "ascii": 'PYTHONIOENCODING=ascii "$@"',
    "latin-1": 'PYTHONIOENCODING=latin-1 "$@"',
    "ignoring SIGHUP": 'nohup "$@" <&-',
}


@pytest.fixture
def at(tmp_path):
    """A directory with rewards; what commands run in."""
    (tmp_path / "rewards.py").write_text(REWARDS, encoding="utf-8")
    return tmp_path


def estune(at, streams, *words, **env):
    """Run `estune` behind a shell; return its exit status, stdout and stderr."""
    (at / "code").unlink(missing_ok=True)
    done = subprocess.run(
        ["bash", "-c", streams, "bash", sys.executable, "-m", "estune", *map(str, words)],
        cwd=at, env={**os.environ, **env}, capture_output=True, encoding="utf-8", errors="replace",
    )  # fmt: skip
    code = int((at / "code").read_text()) if (at / "code").exists() else done.returncode
    return code, done.stdout, done.stderr


def assert_quiet(err):
    assert "Traceback" not in err and "Exception ignored" not in err and "Error" not in err, err


@pytest.fixture(scope="session")
def journals(tmp_path_factory):
    """``journals(rewards, isolation, steps)``: the journal of the run with ordinary streams."""
    made = {}

    def journal(rewards, isolation="process", steps=STEPS):
        key = rewards, isolation, steps
        if key not in made:
            at = tmp_path_factory.mktemp("ordinary")
            (at / "rewards.py").write_text(REWARDS, encoding="utf-8")
            code, out, err = estune(at, '"$@"', *train(rewards, isolation, steps))
            assert code == 0 and "done; the model is in run" in out, err
            calls = 4 * steps + 1  # theta is scored beside the members of the first step
            assert err.count("p" * 200 + " \N{SNOWMAN}\n") == (calls if "printing" in rewards else 0)
            shown = err if isolation == "process" else out + err
            assert shown.count("program\n") == (calls if "program" in rewards else 0)
            made[key] = (at / "run" / "journal.jsonl").read_bytes()
            assert [failures for _, failures, _ in results(made[key])] == [0] * steps
        return made[key]

    return journal


def train(rewards, isolation="process", steps=STEPS):
    workers = ("--reward_workers", 1) if isolation == "process" else ()
    functions = [f"rewards.py:{name}" for name in rewards]
    return (*TRAIN, "--reward_funcs", *functions, "--reward_isolation", isolation, *workers, "--max_steps", steps)


def results(journal):
    """Return fitness, failures and theta's checksum of every step."""
    lines = [json.loads(line) for line in journal.splitlines()]
    return [(line["fitness"], line["failures"], line["checksum"]) for line in lines if line["kind"] == "step"]


OFTEN = ("closed stdin", "all closed", "full stdout", "one line of both", "no reader", "ascii", "ignoring SIGHUP")


@pytest.mark.parametrize("streams", few(SHELL, OFTEN))
def test_no_stream_ends_a_run_or_changes_it(at, journals, streams):
    code, _, err = estune(at, SHELL[streams], *train(LOUD))
    assert code == 0, err
    assert_quiet(err)
    assert (at / "run" / "journal.jsonl").read_bytes() == journals(LOUD)


@pytest.mark.parametrize("streams", few(["no reader", "all closed", "one line of both"], ("all closed",)))
def test_no_inline_reward_fails_where_its_output_is_lost(at, journals, streams):
    code, _, err = estune(at, SHELL[streams], *train(LOUD, "inline"))
    assert code == 0, err
    assert (at / "run" / "journal.jsonl").read_bytes() == journals(LOUD, "inline")


# --- from Python ------------------------------------------------------------------------------------------------------

SETTINGS = {
    "no stdout": "sys.stdout = None",
    "no stderr": "sys.stderr = None",
    "neither": "sys.stdout = sys.stderr = None",
    "StringIO": "sys.stdout = sys.stderr = io.StringIO()",
    "closed files": "sys.stdout = open(os.devnull, 'w'); sys.stdout.close(); sys.stderr = sys.stdout",
    "detached": "sys.stdout = io.TextIOWrapper(io.BytesIO()); sys.stdout.detach(); sys.stderr = sys.stdout",
    "bare objects": "sys.stdout = sys.stderr = types.SimpleNamespace(write=lambda text: None)",
    "raising objects": "sys.stdout = sys.stderr = types.SimpleNamespace(write=lambda text: {}[text])",
    "ascii": "sys.stdout = sys.stderr = io.TextIOWrapper(io.BytesIO(), 'ascii')",
    "closed descriptors": "sys.stdin = sys.stdout = sys.stderr = None; [os.close(number) for number in range(3)]",
    "pipes without readers": "r, w = os.pipe(); os.dup2(w, 1); os.dup2(w, 2); os.close(r); os.close(w)",
    "full disk": "f = os.open('/dev/full', os.O_WRONLY); os.dup2(f, 1); os.dup2(f, 2)",
}


@pytest.mark.parametrize(
    "name", few(SETTINGS, ("neither", "closed files", "raising objects", "closed descriptors", "full disk"))
)
def test_no_stream_of_a_users_process_ends_a_run(at, journals, name):
    """Neither with workers and lines, nor inline with the panel, in the main thread or in another one."""
    script = f"""
import io, os, sys, threading, traceback, types
import estune
{SETTINGS[name]}
report = open("report", "w")
def train(isolation, console):
    try:
        args = estune.ESConfig(engine="toy", task="quadratic", report_to=["none"], population_size=4,
            max_steps={STEPS}, output_dir=isolation, reward_funcs=["rewards.py:printing", "rewards.py:erring"],
            reward_isolation=isolation, console=console)
        estune.ESTrainer(args=args).train()
    except BaseException:
        traceback.print_exc(file=report)
train("process", "auto")
thread = threading.Thread(target=train, args=("inline", {"lines" if "raising" in name else "panel"!r}))
thread.start()
thread.join()
print("ended", file=report, flush=True)
os._exit(0)  # what Python finds of these streams at its own end is the user's
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=at, capture_output=True, text=True)
    assert (at / "report").read_text() == "ended\n"
    assert_quiet(done.stderr)
    for isolation in ("process", "inline"):
        assert results((at / isolation / "journal.jsonl").read_bytes()) == results(journals(("printing", "erring")))


def test_the_journal_is_no_standard_stream(at):
    """A program with closed descriptors opens files; printed text must not be written to them."""
    script = """
import os, subprocess
for number in range(3):
    os.close(number)
import sys
sys.path.insert(0, ".")
from estune import ESConfig, ESTrainer
def reward(completions, **_):
    os.write(1, b"1" * 10_000)
    os.write(2, b"2" * 10_000)
    subprocess.run(["echo", "program"], check=True)
    return [float(text) for text in completions]
args = ESConfig(engine="toy", task="quadratic", report_to=["none"], max_steps=2, output_dir="run",
                reward_isolation="inline", population_size=4)
ESTrainer(args=args, reward_funcs=reward).train()
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=at).returncode == 0
    for name in ("journal.jsonl", "metrics.jsonl"):
        lines = [json.loads(line) for line in (at / "run" / name).read_text().splitlines()]
        assert lines and not any(line.get("failures") for line in lines)


# --- what a command was asked for -------------------------------------------------------------------------------------

JSON = {
    "score": ("score", "--completions", "c.jsonl"),
    "evaluate": ("evaluate", "--engine", "toy", "--task", "quadratic", "--limit", "3"),
    "probe": ("probe", "--engine", "toy", "--task", "quadratic", "--sigmas", "0.1", "--batch_size", "2"),
}


@pytest.fixture
def scored(at):
    """``at`` with completions to score."""
    rows = [{"completion": "0.5", "wanted": 0.5}, {"completion": "1", "wanted": 0.25}]
    (at / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return at


@pytest.mark.parametrize("isolation", ["process", "inline"])
@pytest.mark.parametrize("command", ["score", "evaluate"])
def test_json_is_alone_on_stdout(scored, command, isolation):
    functions = [f"rewards.py:{name}" for name in (*LOUD, "library")]
    words = (*JSON[command], "--json", "--reward_funcs", *functions, "--reward_isolation", isolation)
    code, out, err = estune(scored, '"$@"', *words, AT_IMPORT="1")
    assert code == 0, err
    assert out.count("\n") == 1 and json.loads(out)["reward"] is not None
    for text in ("print at import", "descriptor at import", "program at import", "C at import", "at exit"):
        assert text in err, text


@pytest.mark.parametrize("command", ["score", "probe"])
def test_json_needs_no_stderr(scored, command):
    words = (*JSON[command], "--json", "--reward_funcs", "rewards.py:printing", "--reward_isolation", "inline")
    outputs = {estune(scored, f'"$@" {streams}', *words)[:2] for streams in ("2>/dev/full", "<&- 2>&-")}
    assert len(outputs) == 1
    code, out = outputs.pop()
    assert code == 0 and json.loads(out)


RESULTS = {
    "env": ("env",),
    "env --json": ("env", "--json"),
    "score --json": JSON["score"] + ("--json", "--reward_funcs", "rewards.py:printing", "--reward_isolation", "inline"),
    "evaluate": JSON["evaluate"],
    "train --dry_run": (*TRAIN, "--dry_run"),
}


@pytest.mark.parametrize("command", RESULTS)
def test_a_result_whose_reader_has_left_is_no_traceback(scored, command):
    code, _, err = estune(scored, SHELL["no stdout reader"], *RESULTS[command])
    assert code == 1
    assert_quiet(err)


@pytest.mark.parametrize("command", ["env", "env --json"])
def test_a_result_for_a_full_disk_is_one_sentence(scored, command):
    code, _, err = estune(scored, '"$@" >/dev/full', *RESULTS[command])
    assert code == 2 and err == "estune: error: the result cannot be written to stdout (No space left on device)\n"


@pytest.mark.parametrize("streams", ["closed stdout", "no stdout reader"])
def test_help_needs_no_stdout(at, streams):
    code, _, err = estune(at, SHELL[streams], "--help")
    assert code == 0 and err == ""
    assert estune(at, '"$@"', "env", "--json", "--help")[1].startswith("usage: estune env")


@pytest.mark.parametrize("streams", ["closed stderr", "no stderr reader"])
def test_an_error_without_stderr_is_still_an_error(at, streams):
    code, out, err = estune(at, SHELL[streams], "evaluate", "--engine", "toy", "--task", "nonsense")
    assert (code, out, err) == (2, "", "")


# --- terminals and signals --------------------------------------------------------------------------------------------


def wait_for_calls(at, n_calls, process):
    """Wait until the reward `slow` was called so often."""
    while n_calls and (not (at / "calls").exists() or (at / "calls").read_text().count("called") < n_calls):
        assert process.poll() is None
        time.sleep(0.005)


def start(at, *words, streams=subprocess.DEVNULL, **options):
    command = [sys.executable, "-m", "estune", *map(str, words)]
    ends = {"stdin": streams, "stdout": streams, "stderr": streams, **options}
    return subprocess.Popen(command, cwd=at, **ends)


@pytest.mark.parametrize("console", ["panel", full("lines")])
def test_a_terminal_that_is_gone_ends_no_run(at, journals, console):
    """Its master closes in the middle: from then on every write fails with EIO."""
    master, end = pty.openpty()
    process = start(at, *train(["slow"], steps=4), "--console", console, streams=end)
    os.close(end)
    wait_for_calls(at, 6, process)
    assert b"estune" in os.read(master, 1 << 16)
    os.close(master)
    assert process.wait() == 0
    assert (at / "run" / "journal.jsonl").read_bytes() == journals(("slow",), steps=4)


def test_stderr_is_not_drawn_into_the_panel_where_it_is_a_file(at):
    master, end = pty.openpty()
    words = (*train(["printing"], "inline"), "--console", "panel")
    with (at / "err").open("w") as err:
        process = start(at, *words, streams=end, stderr=err)
        os.close(end)
        shown = b""
        while True:
            try:
                shown += os.read(master, 1 << 16)
            except OSError:  # the process has ended
                break
    os.close(master)
    assert process.wait() == 0
    assert b"p" * 40 not in shown and (at / "err").read_text().count("p" * 200) == 4 * STEPS + 1


def test_a_shell_whose_terminal_closes_lets_a_run_save(at):
    """The run gets SIGHUP from the shell, and once more from the system as the shell ends."""
    master, end = pty.openpty()
    shell = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"], cwd=at, stdin=end, stdout=end, stderr=end, start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        env={**os.environ, "STOP_AT": "6"},
    )  # fmt: skip
    os.close(end)
    words = (*train(["slow"], steps=50), "--save_steps", 0)
    os.write(
        master, (shlex.join([sys.executable, "-m", "estune", *map(str, words)]) + " & echo $! >pid; fg\n").encode()
    )
    wait_for_calls(at, 6, shell)
    pid = int((at / "pid").read_text())
    os.close(master)
    shell.wait()
    while os.path.exists(f"/proc/{pid}/exe"):  # which a zombie has not
        time.sleep(0.01)
    assert list((at / "run").glob("checkpoint-*/model.safetensors"))


@pytest.mark.parametrize(("number", "phase"), [
    (signal.SIGHUP, "loading"), (signal.SIGHUP, "first step"), (signal.SIGHUP, "later"), (signal.SIGTERM, "first step"),
    (signal.SIGINT, "later"),
])  # fmt: skip
def test_a_signal_to_the_whole_group_saves(at, journals, number, phase):
    """The reward workers get the signal, too. SIGHUP is sent twice, as a terminal that closes sends it."""
    words = (*train(["slow"], steps=4), "--save_steps", 0)
    n_calls = 6 if phase == "later" else 1
    process = start(
        at, *words, start_new_session=True, env={**os.environ, "STOP_AT": str(n_calls)}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert b"loading" in process.stdout.readline()
    wait_for_calls(at, 0 if phase == "loading" else n_calls, process)
    os.killpg(process.pid, number)
    if number == signal.SIGHUP:
        os.killpg(process.pid, number)
    out, err = (text.decode() for text in process.communicate())
    assert process.returncode == 0, err
    assert_quiet(err)
    assert err.count("send the signal again to quit without saving") == 1
    assert f"estune: stopped after {'1 step' if phase == 'later' else '0 steps'}" in out
    if phase == "later":
        assert estune(at, '"$@"', *words, "--resume")[0] == 0
        assert (at / "run" / "journal.jsonl").read_bytes() == journals(("slow",), steps=4)


def test_signals_that_were_ignored_from_the_start_stay_ignored(at, journals):
    numbers = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
    process = start(at, *train(["slow"], steps=4),
                    preexec_fn=lambda: [signal.signal(number, signal.SIG_IGN) for number in numbers])  # fmt: skip
    for n_calls in (1, 5, 9):
        wait_for_calls(at, n_calls, process)
        for number in numbers:
            process.send_signal(number)
    assert process.wait() == 0
    assert (at / "run" / "journal.jsonl").read_bytes() == journals(("slow",), steps=4)


def test_programs_that_a_reward_starts_get_the_users_signals():
    """Signals ignored at the start stay ignored in it; all others have their default action."""
    script = textwrap.dedent("""
        import signal, subprocess, sys
        from estune.rewards.pool import RewardBatch, RewardPool
        def mask(completions, **_):
            shown = subprocess.run(["grep", "SigIgn", "/proc/self/status"], capture_output=True, text=True).stdout
            return [float(int(shown.split()[1], 16) >> signal.SIGHUP - 1 & 1) for _ in completions]
        with RewardPool([mask], ["mask"], timeout_s=60, workers=1) as pool:
            result = pool.submit(RewardBatch(["?"], ["!"], [[0]])).result()
            assert not result.errors, result.errors
            print(result.rewards[0, 0])
    """)
    for ignored, wanted in ((signal.SIG_IGN, "1.0\n"), (signal.SIG_DFL, "0.0\n")):
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True,
            preexec_fn=lambda handler=ignored: signal.signal(signal.SIGHUP, handler),
        )  # fmt: skip
        assert done.stdout == wanted, done.stderr
