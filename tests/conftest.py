"""Fixtures that start the real command line; see `helpers/command_line.py`.

Nothing reaches the network, those tests apart that fetch a model and say so: the hub is offline, and every cache lies
in a directory that ends with the session.
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
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: workers share the cores
_CACHE = tempfile.mkdtemp(prefix="estune-tests-")
os.environ.update(HF_HOME=_CACHE, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLCONFIGDIR=_CACHE)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell's background job has it, and all that it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
HELPERS = Path(__file__).parent / "helpers"

from command_line import Done, Zygote, write_rewards  # noqa: E402
from shells import Shell  # noqa: E402
from tiers import group_of  # noqa: E402

if importlib.util.find_spec("hypothesis"):  # GPU machines run tests without it
    from hypothesis import HealthCheck, settings

    settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any machine")


# What a file names that holds tests of a tier.
NAMES = {"e2e": re.compile(r"mark\.e2e\b|\bfew\(|\bfull\("), "real": re.compile(r"mark\.real\b")}


def pytest_ignore_collect(collection_path, config):
    """Where one tier is selected, leave out files without a test of it: their imports take most of a minute."""
    names = NAMES.get(config.option.markexpr)
    if names is None or not collection_path.is_file():
        return None
    return True if not names.search(collection_path.read_text(encoding="utf-8")) else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keep the tests of a file that names an `xdist_group` in one worker: pytest-xdist 3.8 cannot under pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class Grouped(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return group_of(config.rootpath / nodeid.partition("::")[0]) or nodeid

    return Grouped(config, log)


def pytest_unconfigure():
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def zygote():
    """A process that has estune imported and forks a fresh command line for every request."""
    with Zygote() as process:
        yield process


@pytest.fixture(scope="session")
def torch_zygote():
    """The same, with torch and transformers imported (and none of their threads started)."""
    with Zygote(torch=True) as process:
        yield process


@pytest.fixture(scope="session")
def shell():
    """Runs blocks of documentation and programs word for word; see `shells.py`."""
    with Shell() as process:
        yield process


@pytest.fixture
def place(tmp_path):
    """A directory of the test's own, in memory where there is such a file system: fsync costs nothing there."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="estune-test-", dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.fixture
def run(zygote, place):
    """``run(*words)``: an `estune` command in ``place``, in a process of its own."""
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
    """``call(*words)``: an `estune` command in this process, for what ends before anything is computed."""
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
