"""Fixtures that start the real command line; see `helpers/command_line.py`.

No test uses the network, except the marked tests that download a model. The hub is offline, and all caches lie in a
directory that is deleted after the session.
"""

import importlib.util
import os
import re
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # set before torch is imported, because workers share the cores
_CACHE = tempfile.mkdtemp(prefix="estune-tests-")
os.environ.update(HF_HOME=_CACHE, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLCONFIGDIR=_CACHE)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # inherited from a background job of a shell
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # inherited from nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
HELPERS = Path(__file__).parent / "helpers"

from command_line import Done, Zygote, write_rewards  # noqa: E402
from shells import Shell  # noqa: E402
from tiers import group_of  # noqa: E402

if importlib.util.find_spec("hypothesis"):  # GPU machines run tests without it
    from hypothesis import HealthCheck, settings

    settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any machine")


# tier -> pattern in the files that hold its tests
PATTERNS = {"e2e": re.compile(r"mark\.e2e\b|\bfew\(|\bfull\("), "real": re.compile(r"mark\.real\b")}
# Long tests that belong to no group; they begin after the groups, so that no worker waits for one of them at the end.
LONG = (
    "test_every_block_of_the_readme", "test_lm_eval_runs", "test_a_few_cases", "test_triton.py::test_bits",
    "test_a_killed_run_ends_in_the_same_bits", "test_the_notebook_runs",
)  # fmt: skip


def pytest_ignore_collect(collection_path, config):
    """If one tier is selected, leave out the files without its tests, whose imports take most of a minute."""
    pattern = PATTERNS.get(config.option.markexpr)
    if pattern is None or not collection_path.is_file():
        return None
    return True if not pattern.search(collection_path.read_text(encoding="utf-8")) else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Run all tests of a file with an `xdist_group` in one worker; pytest-xdist 3.8 does not do so under pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class Grouped(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return group_of(config.rootpath / nodeid.partition("::")[0]) or nodeid

    return Grouped(config, log)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONG))


def pytest_unconfigure():
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def zygote():
    """A fork server that has imported estune; it forks a command for every request."""
    with Zygote() as process:
        yield process


@pytest.fixture(scope="session")
def torch_zygote():
    """A fork server that has also imported torch and transformers, without starting their threads."""
    with Zygote(torch=True) as process:
        yield process


@pytest.fixture(scope="session")
def shell():
    """Runs blocks of documentation and programs unchanged; see `shells.py`."""
    with Shell() as process:
        yield process


@pytest.fixture
def place(tmp_path):
    """A directory for one test, in memory if possible, where fsync costs nothing."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="estune-test-", dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.fixture
def run(zygote, place):
    """``run(*words)``: run an `estune` command in ``place``, in a child process."""
    write_rewards(place)

    def start(*words, cwd=place, **options):
        return zygote.run(words, cwd, **options)

    return start


@pytest.fixture
def run_model(torch_zygote, place):
    """``run`` for commands that load a language model."""
    write_rewards(place)

    def start(*words, cwd=place, **options):
        return torch_zygote.run(words, cwd, **options)

    return start


@pytest.fixture
def call(place, monkeypatch, capsys):
    """``call(*words)``: run an `estune` command in this process, for commands that end before they compute anything."""
    from estune.cli import main

    def start(*words, cwd=place):
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.chdir(cwd)
            try:
                code = main([str(word) for word in words])
            except SystemExit as error:
                code = error.code
        return Done(code, *capsys.readouterr())

    return start


@pytest.fixture(scope="session")
def tiny_llama(torch_zygote, tmp_path_factory):
    """A directory with a random Llama of two layers and a byte-level tokenizer."""
    place = tmp_path_factory.mktemp("models")
    script = place / "save.py"
    script.write_text(
        f"import sys, pathlib\nsys.path.append({str(HELPERS)!r})\nfrom tiny_models import save_tiny\n"
        "save_tiny('llama', pathlib.Path('llama'))\n"
    )
    done = torch_zygote.run([], place, script=script)
    assert done.code == 0, done
    return place / "llama"
