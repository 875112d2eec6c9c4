"""A reward's source is all of the user's code that it is made of, and nothing else."""

import functools
import math
import sys
import textwrap

import pytest

from estune.reward_loading import load_reward
from estune.reward_sources import sources_digest, without_comments
from estune.tasks import TASKS, get_task


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A directory with a reward that imports a neighbour, which imports a package inside a function."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "score.py").write_text(
        "import math\nimport helper\ndef f(completions, **_):\n    return [helper.one()]\n"
    )
    (tmp_path / "helper.py").write_text("def one():\n    from kit import inner\n    return inner.VALUE\n")
    (tmp_path / "unused.py").write_text("VALUE = 1\n")
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit" / "__init__.py").write_text("")
    (tmp_path / "kit" / "inner.py").write_text("from . import deep\nVALUE = 1\n")
    (tmp_path / "kit" / "deep.py").write_text("DEEP = 1\n")
    for name in ("helper", "kit", "kit.inner", "kit.deep", "score"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def of_file():
    return sources_digest(load_reward("score.py:f"))


@pytest.mark.parametrize("file", ["score.py", "helper.py", "kit/__init__.py", "kit/inner.py", "kit/deep.py"])
def test_a_change_in_any_file_that_it_is_made_of_shows(project, file):
    before = of_file()
    text = (project / file).read_text()
    (project / file).write_text(f"# only said otherwise\n\n{text}   # and here\n")
    assert of_file() == before
    (project / file).write_text(f"{text}NEW = 2\n")
    assert of_file() != before
    (project / file).write_text(text)
    assert of_file() == before


def test_a_change_elsewhere_does_not(project):
    before = of_file()
    (project / "unused.py").write_text("VALUE = 2\n")
    assert of_file() == before


def test_where_the_files_lie_does_not_count(project, tmp_path_factory, monkeypatch):
    before = of_file()
    other = tmp_path_factory.mktemp("other") / "place"
    project.rename(other)
    monkeypatch.chdir(other)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(project)])
    for name in ("helper", "kit", "kit.inner", "kit.deep"):
        sys.modules.pop(name, None)
    assert of_file() == before


def test_a_module_is_its_file(project):
    before = sources_digest(load_reward("score:f"))
    (project / "kit" / "inner.py").write_text("VALUE = 3\n")
    assert sources_digest(load_reward("score:f")) != before


def script(text):
    """Return the names of a script, as if it ran as the main program."""
    names = {"__name__": "__main__"}
    exec(compile(textwrap.dedent(text), "<script>", "exec"), names)
    return names


def in_a_script(tmp_path, text, name="f"):
    """Return the function of a script whose text is on disk, where inspect finds it."""
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(text))
    import linecache

    linecache.checkcache(str(path))
    names = {"__name__": "__main__"}
    exec(compile(path.read_text(), str(path), "exec"), names)
    return sources_digest(names[name])


BASE = """
LIMIT = 3
def helper(text): return len(text)
class Judge:
    def score(self, text): return helper(text)
def make(target):
    def inner(completions, **_): return [target - LIMIT for _ in completions]
    return inner
def f(completions, scale=1, **_): return [min(LIMIT, helper(text)) * scale for text in completions]
g = make(1)
class Callable:
    def __init__(self, k): self.k = k
    def __call__(self, completions, **_): return [self.k for _ in completions]
h = Callable(1)
two = lambda completions, **_: [2 for _ in completions]
"""


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("LIMIT = 3", "LIMIT = 4", "fg"),
        ("return len(text)", "return 2 * len(text)", "f"),
        ("scale=1", "scale=2", "f"),
        ("make(1)", "make(2)", "g"),
        ("target - LIMIT", "target + LIMIT", "g"),
        ("Callable(1)", "Callable(2)", "h"),
        ("[self.k for", "[-self.k for", "h"),
        ("[2 for", "[3 for", "two"),
        ("return helper(text)", "return 0", ""),  # a class that none of them uses
        ("LIMIT = 3", "LIMIT = 3\nOTHER = 4", ""),
        ("def f(", "\n\n# a comment\ndef f(", ""),
    ],
)
def test_a_script_counts_by_what_a_function_uses(tmp_path, old, new, changed):
    for name in ("f", "g", "h", "two"):
        before = in_a_script(tmp_path, BASE, name)
        assert in_a_script(tmp_path, BASE, name) == before
        assert (in_a_script(tmp_path, BASE.replace(old, new), name) != before) == (name in (changed, *changed)), name


def test_partials_methods_and_builtins():
    def plain(completions, k=1):
        return [k for _ in completions]

    assert sources_digest(functools.partial(plain, k=2)) != sources_digest(functools.partial(plain, k=3))
    assert sources_digest(functools.partial(plain, k=2)) == sources_digest(functools.partial(plain, k=2))
    assert sources_digest(len) != sources_digest(math.sqrt)
    assert sources_digest("abc".startswith)


def test_functions_that_use_each_other_end():
    names = script("""
    def f(completions): return g(completions)
    def g(completions): return f(completions)
    """)
    assert sources_digest(names["f"]) == sources_digest(names["f"])


def test_an_object_that_is_no_plain_value_counts_by_its_type():
    names = script("""
    import threading
    LOCK = threading.Lock()
    def f(completions): return [LOCK for _ in completions]
    """)
    assert sources_digest(names["f"]) == sources_digest(names["f"])


def test_estunes_own_rewards_are_known_by_the_version_alone():
    own = {sources_digest(task.reward) for task in TASKS.values()}
    own |= {sources_digest(get_task("countdown=1,chain:4=2").reward)}
    assert len(own) == 1


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a = 1  # one\n\n\nb = '#no'\n", "a = 1\nb = '#no'"),
        ("x = '''\n# in a string\n'''\n", "x = '''\n# in a string\n'''"),
        ("def broken(:  # one\n", "def broken(:"),
    ],
)
def test_comments(text, wanted):
    assert without_comments(text) == wanted
