"""The child process of `estune.sandbox.host`: it restricts itself, then runs a function that a model wrote.

A fresh interpreter with only the standard library runs this file as a script:
``python -s -S -P child.py STATUS RESULT DIRECTORY``, with the request (JSON) on standard input. STATUS and RESULT are
descriptors of pipes. STATUS gets the list of missing restrictions and is closed before the model's code runs. RESULT
gets the function's results. DIRECTORY is empty.

There are two processes: a guard that only waits, and its child, which runs the function. The child is restricted by, in
order: namespaces if the kernel allows them (a network without interfaces, its own pids, a small file system in memory
over DIRECTORY), limits, Landlock (files), seccomp (everything else). The guarantees rest on the last two: a system call
that is not listed below fails, which includes all calls for processes, threads, sockets and signals.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import resource
import signal
import struct
import sys
import time
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)

# Name: (x86_64, aarch64); None if the architecture has no such call. Landlock decides which files can be read or
# written. Absent on purpose: clone, fork, execve, socket, kill, ptrace, prctl, mount, memfd_create, nanosleep, etc.
SYSTEM_CALLS: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "open": (2, None), "close": (3, 57), "stat": (4, None), "fstat": (5, 80),
    "lstat": (6, None), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215),
    "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66), "access": (21, None),
    "sched_yield": (24, 124), "mremap": (25, 216), "madvise": (28, 233), "dup": (32, 23), "dup2": (33, None),
    "getpid": (39, 172), "exit": (60, 93), "uname": (63, 160), "fcntl": (72, 25), "ftruncate": (77, 46),
    "getdents": (78, None), "getcwd": (79, 17), "rename": (82, None), "mkdir": (83, None), "rmdir": (84, None),
    "unlink": (87, None), "readlink": (89, None), "gettimeofday": (96, 169), "getrusage": (98, 165),
    "sysinfo": (99, 179), "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175),
    "getegid": (108, 177), "getppid": (110, 173), "sigaltstack": (131, 132), "gettid": (186, 178),
    "time": (201, None), "futex": (202, 98), "sched_getaffinity": (204, 123), "getdents64": (217, 61),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "exit_group": (231, 94), "openat": (257, 56),
    "mkdirat": (258, 34), "newfstatat": (262, 79), "unlinkat": (263, 35), "renameat": (264, 38),
    "readlinkat": (267, 78), "faccessat": (269, 48), "dup3": (292, 24), "getrandom": (318, 278),
    "renameat2": (316, 276), "statx": (332, 291), "faccessat2": (439, 439),
}  # fmt: skip
FCNTL = (0, 1, 2, 3, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC
AUDIT_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 22, 36, 38
SECCOMP_MODE_FILTER, SECCOMP_KILL, SECCOMP_ERRNO, SECCOMP_ALLOW = 2, 0x80000000, 0x00050000, 0x7FFF0000
EPERM = 1

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 2, 4, 8, 1 << 14, 1 << 18
SCRATCH = b"size=8m,nr_inodes=256"  # mount options of the file system over DIRECTORY

# Landlock's rights by the ABI version that added them (moving between directories, truncating, devices).
LEAST_ABI = 3  # older versions do not control truncation: a readable file could be emptied
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # system calls, the same everywhere
READ_FILE, READ_DIR = 1 << 2, 1 << 3
RIGHTS = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
SCRATCH_RIGHTS = (1 << 1) | READ_FILE | READ_DIR | (1 << 4) | (1 << 5) | (1 << 7) | (1 << 8) | (1 << 14)

AWAITED = [signal.SIGCHLD, signal.SIGTERM]  # signals that the guard waits for

PACKAGES = ("site-packages", "dist-packages")  # not readable: an installed package may hold the answers


def libc_call(name: str, *values: Any) -> int:
    """Call a function of the C library with integers as C longs; raise OSError if it returns -1."""
    result = int(getattr(LIBC, name)(*(ctypes.c_long(value) if isinstance(value, int) else value for value in values)))
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


# --- restrictions ----------------------------------------------------------------------------------------------------


def enter_namespaces(directory: str) -> bool:
    """Enter new namespaces, and mount a file system in memory on a directory; return whether the kernel allows it.

    The namespaces are a second barrier beside Landlock and seccomp; many containers refuse them. The caller's next
    child has pid 1 in them: when it ends, all processes in the namespace end.
    """
    user, group = os.getuid(), os.getgid()
    try:
        spaces = CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS
        libc_call("unshare", spaces)
        for file, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{file}", "w") as handle:
                handle.write(text)
        libc_call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
        libc_call("mount", b"tmpfs", os.fsencode(directory), b"tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, SCRATCH)
        os.chdir(directory)
    except (OSError, AttributeError):
        return False
    return True


def set_limits(limits: dict[str, int]) -> None:
    """Set hard limits of CPU, memory, processes, file size and descriptors, which the function cannot raise."""
    for kind, value in (
        (resource.RLIMIT_CPU, limits["cpu_s"]),
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):  # the limit there is already lower
            _, hard = resource.getrlimit(kind)
            resource.setrlimit(kind, (hard, hard))


def restrict_files(directory: str, writable: bool) -> None:
    """Let this process open only the standard library and its directory; raise OSError if that is impossible."""
    version = libc_call("syscall", LANDLOCK_CREATE, None, 0, 1)
    if version < LEAST_ABI:
        raise OSError(f"its ABI is {version}")
    handled = sum(rights for since, rights in RIGHTS.items() if since <= version)
    attributes = struct.pack("=Q", handled)
    ruleset = libc_call("syscall", LANDLOCK_CREATE, attributes, len(attributes), 0)

    def allow(path: str, rights: int) -> None:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.path.isdir(path):
            rights &= READ_FILE
        libc_call("syscall", LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", rights, handle), 0)
        os.close(handle)

    for root in sys.path:
        if not os.path.isdir(root):
            if os.path.exists(root):  # the standard library as a zip file
                allow(root, READ_FILE)
            continue
        allow(root, READ_DIR)  # names only: importing lists the directory
        for name in os.listdir(root):
            if name not in PACKAGES:
                allow(os.path.join(root, name), READ_FILE | READ_DIR)
    allow(directory, SCRATCH_RIGHTS & handled if writable else READ_FILE | READ_DIR)
    libc_call("syscall", LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


def seccomp_program(architecture: str) -> bytes:
    """Return the filter: listed calls pass, other calls fail with EPERM, another architecture's calls kill.

    `fcntl` passes only with the commands in FCNTL; other commands can send a signal to another process.
    """
    column = list(AUDIT_ARCHITECTURES).index(architecture)
    numbers = sorted(
        number for name, pair in SYSTEM_CALLS.items() if (number := pair[column]) is not None and name != "fcntl"
    )

    def instruction(code: int, yes: int, no: int, value: int) -> bytes:
        return struct.pack("=HBBI", code, yes, no, value)

    load, equal, answer = 0x20, 0x15, 0x06
    fcntl = SYSTEM_CALLS["fcntl"][column]
    assert fcntl is not None
    program = [
        instruction(load, 0, 0, 4),
        instruction(equal, 1, 0, AUDIT_ARCHITECTURES[architecture]),
        instruction(answer, 0, 0, SECCOMP_KILL),
        instruction(load, 0, 0, 0),
        instruction(equal, 0, len(FCNTL) + 2, fcntl),
        instruction(load, 0, 0, 24),  # the low word of the second argument: fcntl's command
        *(instruction(equal, len(FCNTL) - i + len(numbers) + 1, 0, command) for i, command in enumerate(FCNTL)),
        instruction(answer, 0, 0, SECCOMP_ERRNO | EPERM),
        *(instruction(equal, len(numbers) - i, 0, number) for i, number in enumerate(numbers)),
        instruction(answer, 0, 0, SECCOMP_ERRNO | EPERM),
        instruction(answer, 0, 0, SECCOMP_ALLOW),
    ]
    return b"".join(program)


def restrict_calls() -> None:
    """Let this process make only the listed system calls; raise OSError if that is impossible."""
    architecture = os.uname().machine
    if architecture not in AUDIT_ARCHITECTURES or sys.maxsize < 1 << 32:
        raise OSError(f"no filter for {architecture}")
    program = seccomp_program(architecture)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    libc_call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0)


def lock_in(request: dict[str, Any], directory: str, writable: bool) -> list[str]:
    """Apply all restrictions; return those that this system lacks, as text."""
    set_limits(request["limits"])
    missing = []
    if sys.platform != "linux":
        return ["Linux, whose Landlock and seccomp restrict the code"]
    libc_call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    try:
        restrict_files(directory, writable)
    except OSError as error:
        missing.append(f"Landlock, which protects files (Linux 6.2 or later; {error.strerror or error})")
    try:
        restrict_calls()
    except OSError as error:
        missing.append(f"seccomp, which blocks network and processes ({error.strerror or error})")
    return missing


# --- running the function --------------------------------------------------------------------------------------------


def call_all(source: str, name: str, arguments: list[str]) -> str:
    """Run a source and call its function on each argument (JSON); return a JSON list, with null for a failed call."""
    random.seed(0)
    space: dict[str, Any] = {"__name__": "answer", "__builtins__": __builtins__}
    exec(compile(source, "<answer>", "exec", dont_inherit=True), space)
    function = space[name]
    results = []
    for argument in arguments:
        try:
            results.append(json.dumps(function(json.loads(argument))))
        except Exception:
            results.append("null")
    return f"[{','.join(results)}]"


def run_inner(request: dict[str, Any], status: int, result: int, directory: str, writable: bool) -> None:
    """Apply the restrictions, write the missing ones to STATUS, run the function, write its results to RESULT."""
    os.environ.clear()
    os.environ.update(HOME=directory, TMPDIR=directory)
    missing = lock_in(request, directory, writable)
    os.write(status, json.dumps(missing).encode())
    os.close(status)
    if missing and not request["allow_unsandboxed"]:
        return
    text = call_all(request["source"], request["name"], request["arguments"]).encode()
    while text:
        text = text[os.write(result, text) :]


def guard(child: int, wall_s: float) -> None:
    """Wait for the child, at most ``wall_s`` seconds or until SIGTERM; then kill it and its processes."""
    deadline = time.monotonic() + wall_s
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        left = deadline - time.monotonic()
        if left <= 0:
            os.kill(child, signal.SIGKILL)
        if was_told_to_stop(0.05 if left <= 0 else left):
            deadline = 0.0
    while orphans := children():  # there are some only if seccomp is missing
        for pid in orphans:
            os.kill(pid, signal.SIGKILL)
        for pid in orphans:
            os.waitpid(pid, 0)


def was_told_to_stop(seconds: float) -> bool:
    """Wait for a child's end or SIGTERM, at most ``seconds``; return whether SIGTERM came."""
    if hasattr(signal, "sigtimedwait"):
        received = signal.sigtimedwait(AWAITED, seconds)
        return received is not None and received.si_signo == signal.SIGTERM
    time.sleep(min(seconds, 0.01))
    return signal.SIGTERM in signal.sigpending()


def children() -> list[int]:
    """Return the pids of this process's children, adopted ones included; empty without a Linux /proc."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:
        return []


def main() -> None:
    """Fork the child that runs the function, and guard it."""
    status, result, directory = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    request = json.loads(sys.stdin.buffer.read())
    os.dup2(1, 0)  # /dev/null: the function must not read the request
    if sys.platform == "linux":
        libc_call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        libc_call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, AWAITED)
    writable = sys.platform == "linux" and enter_namespaces(directory)
    parent = os.getpid()
    child = os.fork()
    if child:
        os.close(status)  # RESULT stays open until the guard ends
        guard(child, request["limits"]["wall_s"])
        os._exit(0)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, AWAITED)
        if sys.platform == "linux":
            libc_call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() in (0, parent):
            run_inner(request, status, result, directory, writable)
    finally:
        os._exit(0)


if __name__ == "__main__":
    main()
