"""Starts `estune` commands for tests: in new interpreters, or as forks of a process that has imported estune.

A forked command runs `estune.cli.main` in a child process with its own directory, environment and output. It saves the
time of the imports. A test can let it kill itself (SIGKILL) at its k-th write to the file system.
"""

import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

TOY = ("train", "--engine", "toy", "--task", "quadratic", "--report_to", "none", "--output_dir", "run")
INLINE = "estune: reward functions run inside the trainer"  # the warning of --reward_isolation inline
MARK = "ESTUNE_TEST_RUN"  # in the environment of every process that a run starts
PATIENCE_S = 300.0  # seconds to wait for something that should happen at once, on a busy machine too
TIMES = ("step_time", "train_time_s", "es/perturb_s", "es/generate_s", "es/score_s", "es/update_s", "es/tokens_per_s")

REWARDS = '''
"""Rewards of the toy task: some log their calls, others fail."""

import os
import sys
import threading
import time


def _log(*words):
    """Append a line to the file named by CALLS; return the line's number, from 1, or 0 if CALLS is not set."""
    if "CALLS" not in os.environ:
        return 0
    with open(os.environ["CALLS"], "ab", buffering=0) as file:  # one write a line: lines of workers do not mix
        file.write(" ".join(map(str, words)).encode() + b"\\n")
        end = file.tell()
    with open(os.environ["CALLS"], "rb") as file:
        return file.read(end).count(b"\\n")


def _distance(completions, wanted):
    return [-((float(text) - value) ** 2) for text, value in zip(completions, wanted)]


def logged(completions, wanted, trainer_state, **_):
    in_trainer = "estune.train.trainer" in sys.modules
    _log(trainer_state.global_step, len(completions), os.getpid(), threading.active_count(), in_trainer)
    return _distance(completions, wanted)


def slow(completions, wanted, trainer_state, **_):
    """Return rewards; after HOLD_AFTER calls, every further call waits until the file `gate` exists."""
    call = _log(trainer_state.global_step, len(completions), os.getpid())
    time.sleep(float(os.environ.get("REWARD_S", "0.02")))
    while call > int(os.environ.get("HOLD_AFTER", sys.maxsize)) and not os.path.exists("gate"):
        time.sleep(0.005)
    return _distance(completions, wanted)


def meeting(completions, wanted, trainer_state, **_):
    """Wait until a second worker process has been called."""
    _log(trainer_state.global_step, len(completions), os.getpid())
    while len({line.split()[2] for line in open(os.environ["CALLS"])}) < 2:
        time.sleep(0.005)
    return _distance(completions, wanted)


def extra(completions, wanted, log_extra, log_metric, **_):
    log_extra("twice", [2 * value for value in wanted])
    log_metric("mine", 0.25)
    return _distance(completions, wanted)


def cubed(completions, **_):
    return [float(text) ** 11 for text in completions]  # OverflowError beyond 1e28


def second(completions, **_):
    return [float(text) for text in completions]


def _bad(wanted):
    return [value == -0.5 for value in wanted]  # a few rows of every step


def raising(completions, wanted, **_):
    if any(_bad(wanted)):
        raise ValueError("this row is too much for me")
    return _distance(completions, wanted)


def hanging(completions, wanted, **_):
    if any(_bad(wanted)):
        time.sleep(1000)
    return _distance(completions, wanted)


def dying(completions, wanted, **_):
    if any(_bad(wanted)):
        os.kill(os.getpid(), 9)
    return _distance(completions, wanted)


def nan(completions, wanted, **_):
    return [float("nan") if bad else r for bad, r in zip(_bad(wanted), _distance(completions, wanted))]


def infinite(completions, wanted, **_):
    return [float("inf") if bad else r for bad, r in zip(_bad(wanted), _distance(completions, wanted))]


def inapplicable(completions, wanted, **_):
    return [None if bad else r for bad, r in zip(_bad(wanted), _distance(completions, wanted))]


def always_raising(completions, **_):
    raise RuntimeError("never")


def vowels(completions, **_):
    return [sum(letter in "aeiou" for letter in text) + len(text) / 100 for text in completions]


def needs_target(completions, target, **_):
    return [0.0] * len(completions)
'''


@dataclass(frozen=True)
class Done:
    """The result of a command: exit status (negative: the signal that ended it), stdout, stderr."""

    code: int
    out: str
    err: str


def write_rewards(directory):
    (directory / "rewards.py").write_text(REWARDS, encoding="utf-8")


def estune(*words, cwd, env=None):
    """Run `estune` in a new interpreter, without a time limit except pytest's."""
    words = [sys.executable, "-m", "estune", *map(str, words)]
    done = subprocess.run(words, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True)
    return Done(done.returncode, done.stdout, done.stderr)


def assert_refused(done, *parts):
    """Check for exit status 2, one sentence on stderr and no traceback; return the sentence."""
    assert done.code == 2, done
    assert done.out.count("\n") <= 1, done.out  # at most the line that names the preset
    lines = [line for line in done.err.splitlines() if not line.startswith(INLINE)]
    assert len(lines) == 1 and lines[0].startswith("estune: error: "), done.err
    for part in parts:
        assert str(part).lower() in lines[0].lower(), (part, lines[0])
    return lines[0]


# --- rewards for ESTrainer: a worker imports their module, and this one loads fast ------------------------------------


def vowels(completions, bonus, **_):
    return [sum(letter in "aeiou" for letter in text) + value for text, value in zip(completions, bonus, strict=True)]


async def length(completions, **_):
    return [-len(text) / 10 for text in completions]


# --- files and processes of a run -------------------------------------------------------------------------------------


def stamps(directory):
    """Return every path below a directory, and itself, with its time of change and content."""
    paths = [directory, *sorted(directory.rglob("*"))]
    return [(str(p), p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None) for p in paths]


def tree(directory, without=()):
    """Return every file below a directory as relative path -> bytes; metrics without their times.

    `origin.json` is left out, because it holds the run's location. ``without``: prefixes of further names to leave out.
    """
    files = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_file() and path.name != "origin.json" and not any(name.startswith(prefix) for prefix in without):
            files[name] = metrics(directory) if name == "metrics.jsonl" else path.read_bytes()
    return files


def assert_same_tree(actual, expected):
    assert sorted(actual) == sorted(expected)
    for name, data in expected.items():
        assert actual[name] == data, name


def metrics(run_dir, times=False):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=not_json) for line in lines]
    return records if times else [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def not_json(constant):
    raise ValueError(f"{constant} is not JSON")


def journal(run_dir):
    return [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]


def steps(run_dir, without=("hash",)):
    """Return the journal's step lines without their hashes, which depend on the header's configuration."""
    kept = [line for line in journal(run_dir) if line["kind"] == "step"]
    return [{k: v for k, v in line.items() if k not in without} for line in kept]


def weights(run_dir):
    return (run_dir / "model.safetensors").read_bytes()


def processes(mark):
    """Return the pids of live processes that a run with this mark started."""
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            if f"{MARK}={mark}".encode() in environment and state != "Z":
                pids.append(int(entry.name))
    return pids


def assert_no_process(mark):
    """Check that every process of a run with this mark ends within `PATIENCE_S`."""
    deadline = time.monotonic() + PATIENCE_S
    while processes(mark) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not processes(mark)


# --- the fork server --------------------------------------------------------------------------------------------------


class Zygote:
    """The client of a fork server: sends one request as a line of JSON, receives the pid and then the exit status.

    ``torch`` and ``rivals``: whether the server also imports torch and transformers, and the baselines.
    """

    def __init__(self, *, torch=False, baselines=False):
        self._arguments = ["torch"] * (torch or baselines) + ["baselines"] * baselines

    def __enter__(self):
        self._process = subprocess.Popen(
            [sys.executable, __file__, *self._arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait(timeout=PATIENCE_S)
        self._process.stdout.close()

    def start(self, words, cwd, *, env=None, kill_at=0, file_limit=None, script=None, cores=None):
        """Start a command and return its pid.

        Args:
            words: of the command line, without ``estune``.
            cwd: its directory.
            env: variables added to its environment.
            kill_at: see `count_writes`.
            file_limit: most bytes of a file.
            script: a Python file to run instead of `estune`.
            cores: the CPUs that it may use.
        """
        self._cwd = Path(cwd)
        request = dict(
            words=[str(word) for word in words],
            cwd=str(cwd),
            env=env or {},
            kill_at=kill_at,
            file_limit=file_limit,
            script=script and str(script),
            cores=cores,
        )
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def wait(self):
        """Wait for the started command; return its result."""
        code = int(self._process.stdout.readline())
        out, err = self._cwd / ".out", self._cwd / ".err"
        return Done(code, out.read_text(), err.read_text())

    def run(self, words, cwd, **options):
        self.start(words, cwd, **options)
        return self.wait()


def count_writes(kill_at, number=signal.SIGKILL):
    """Count the calls that change the file system; send this process a signal just before the ``kill_at``-th.

    A write counts twice; at the second count half of its bytes are written. fsync is not counted, because other
    processes see the same file before and after it, nor is the removal of a missing file.

    Args:
        kill_at: the count at which the signal is sent.
        number: the signal.

    Returns:
        A function that returns the count so far.
    """
    calls = 0

    def tick():
        nonlocal calls
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), number)

    def counted(function):
        def call(path, *args, **kwargs):
            if kwargs.get("dir_fd") is not None or isinstance(path, int) or os.path.lexists(path) or function is mkdir:
                tick()
            return function(path, *args, **kwargs)

        return call

    def write(descriptor, data, plain=os.write):
        tick()
        if calls + 1 == kill_at:
            plain(descriptor, data[: len(data) // 2])
        tick()
        return plain(descriptor, data)

    mkdir = os.mkdir
    for name in ("rename", "replace", "unlink", "remove", "rmdir", "mkdir", "truncate", "ftruncate"):
        setattr(os, name, counted(getattr(os, name)))
    os.write = write
    return lambda: calls


def load_kernels():
    """Load the compiled kernels, so that forked processes have them."""
    from estune.engines.toy import ToyEngine
    from estune.es.types import Member, Noise, Perturbation
    from estune.es.update import make_update

    toy, pair = ToyEngine(), (Member(1, 1), Member(2, 1))
    for distribution in ("normal", "rademacher"):
        toy.vector(Perturbation(pair[0], Noise(0.1, distribution)))
        toy.theta.apply(make_update(pair, [1.0, -1.0], 0.1, weight_decay=0.1, distribution=distribution))


def _main():
    """The server: import and warm up once, then fork a command for every request."""
    os.environ["OMP_NUM_THREADS"] = "1"  # a forked process cannot use threads that its parent started
    import estune.commands.evaluate
    import estune.commands.replay
    import estune.commands.score
    import estune.train.trainer
    from estune.cli import main

    load_kernels()
    assert not {"torch", "transformers"} & set(sys.modules)
    if "torch" in sys.argv:
        import transformers

        import estune.engines.hf.engine

        for name in ("LlamaForCausalLM", "PreTrainedTokenizerFast"):
            getattr(transformers, name)
    if "baselines" in sys.argv:
        import estune.baselines.policy_gradient
        import estune.baselines.rejection  # noqa: F401
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os._exit(_child(main, request))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _child(main, request):
    os.setpgid(0, 0)
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    for descriptor, name in ((0, os.devnull), (1, ".out"), (2, ".err")):
        flags = os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(name, flags, 0o600), descriptor)
    sys.stdin = None
    if request["cores"]:
        os.sched_setaffinity(0, request["cores"])
    if request["file_limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"],) * 2)
    calls = count_writes(request["kill_at"]) if request["kill_at"] else None
    code = 99
    try:
        if request["script"]:
            sys.argv = [request["script"], *request["words"]]
            runpy.run_path(request["script"], run_name="__main__")
            code = 0
        else:
            code = main(request["words"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        if calls:
            print(f"writes {calls()}")
        sys.stdout.flush()
        sys.stderr.flush()
    return code


if __name__ == "__main__":
    _main()
