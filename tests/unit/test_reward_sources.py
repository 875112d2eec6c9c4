"""A reward's source is all of the user's code that it is made of, and nothing else."""

import functools
import linecache
import math
import subprocess
import sys
import textwrap

import pytest

from estune.rewards import sources
from estune.rewards.loading import load_reward
from estune.rewards.sources import source_parts, without_comments
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
    return source_parts(load_reward("score.py:f"))


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
    before = source_parts(load_reward("score:f"))
    (project / "kit" / "inner.py").write_text("VALUE = 3\n")
    assert source_parts(load_reward("score:f")) != before


def script(text):
    """Return the names of a script, as if it ran as the main program."""
    names = {"__name__": "__main__"}
    exec(compile(textwrap.dedent(text), "<script>", "exec"), names)
    return names


def in_a_script(tmp_path, text, name="f"):
    """Return the function of a script whose text is on disk, where inspect finds it."""
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(text))
    linecache.checkcache(str(path))
    names = {"__name__": "__main__"}
    exec(compile(path.read_text(), str(path), "exec"), names)
    return source_parts(names[name])


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

    assert source_parts(functools.partial(plain, k=2)) != source_parts(functools.partial(plain, k=3))
    assert source_parts(functools.partial(plain, k=2)) == source_parts(functools.partial(plain, k=2))
    assert source_parts(len) != source_parts(math.sqrt)
    assert source_parts("abc".startswith)


def test_functions_that_use_each_other_end():
    names = script("""
    def f(completions): return g(completions)
    def g(completions): return f(completions)
    """)
    assert source_parts(names["f"]) == source_parts(names["f"])


def test_an_object_that_is_no_plain_value_counts_by_its_type():
    names = script("""
    import threading
    LOCK = threading.Lock()
    def f(completions): return [LOCK for _ in completions]
    """)
    assert source_parts(names["f"]) == source_parts(names["f"])


def test_estunes_own_rewards_are_known_by_the_version_alone():
    for task in (*TASKS.values(), get_task("countdown=1,chain:4=2")):
        parts = source_parts(task.reward)
        assert not [name for name in parts if name.startswith("file ")], task.name
        assert len(set(source_parts(task.reward).values())) <= 8, task.name


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


# --- what a function carries with it, wherever it is written ---------------------------------------------------------


def of_script(tmp_path, text, name="reward", files=()):
    """Return the parts of a function of a script that runs in a process of its own, beside some files."""
    for file, content in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(textwrap.dedent(content))
    (tmp_path / "script.py").write_text(
        textwrap.dedent(text) + f"\nimport json\nfrom estune.rewards.sources import source_parts\n"
        f"print(json.dumps(source_parts({name})))\n"
    )
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


FACTORY = (
    "made.py",
    "def make(scale, k=1):\n    def reward(completions, **_):\n        return [scale * k]\n    return reward\n",
)
CHANGED = {
    "a factory of a module": ("from made import make\nreward = make({0})", [FACTORY]),
    "defaults of a factory": ("from made import make\nreward = make(1, k={0})", [FACTORY]),
    "a decorator's own text": ("""
        import functools
        def twice(f):
            @functools.wraps(f)
            def inner(*a, **k): return [{0} * x for x in f(*a, **k)]
            return inner
        @twice
        def reward(completions, **_): return [1.0]
        """, []),
    "what a decorator wraps": ("""
        import functools
        def same(f):
            @functools.wraps(f)
            def inner(*a, **k): return f(*a, **k)
            return inner
        @same
        def reward(completions, **_): return [{0}]
        """, []),
    "a cached helper": ("""
        import functools
        @functools.lru_cache
        def helper(x): return {0}
        def reward(completions, **_): return [helper(x) for x in completions]
        """, []),
    "a base class": ("""
        class Base:
            def __call__(self, completions, **_): return [{0}]
        class Derived(Base): pass
        reward = Derived()
        """, []),
    "an object that the reward uses": ("""
        class Scorer:
            def __init__(self, k): self.k = k
            def score(self, text): return self.k
        scorer = Scorer({0})
        def reward(completions, **_): return [scorer.score(x) for x in completions]
        """, []),
    "a method of that object": ("""
        class Scorer:
            def score(self, text): return {0}
        scorer = Scorer()
        def reward(completions, **_): return [scorer.score(x) for x in completions]
        """, []),
    "slots": ("""
        class Scorer:
            __slots__ = ("k",)
            def __init__(self, k): self.k = k
            def __call__(self, completions, **_): return [self.k]
        reward = Scorer({0})
        """, []),
    "a dataclass": ("""
        import dataclasses
        @dataclasses.dataclass
        class Options: k: int = 0
        options = Options({0})
        def reward(completions, **_): return [options.k]
        """, []),
    "a namespace of argparse": ("""
        import argparse
        args = argparse.Namespace(k={0})
        def reward(completions, **_): return [args.k]
        """, []),
    "a NumPy array": ("""
        import numpy as np
        table = np.array([1, {0}])
        def reward(completions, **_): return [table[1]]
        """, []),
    "a dict of the script": ("TABLE = dict(a=[1, {0}])\ndef reward(completions, **_): return [TABLE['a'][1]]", []),
    "a partial of a partial": ("""
        import functools
        def plain(completions, a=0, b=0, **_): return [a + b]
        reward = functools.partial(functools.partial(plain, a={0}), b=1)
        """, []),
    "an import inside the function": (
        "def reward(completions, **_):\n    import helper\n    return [helper.K]", [("helper.py", "K = {0}\n")]),
    "a submodule that is used": (
        "import kit.sub\ndef reward(completions, **_): return [kit.sub.K]",
        [("kit/__init__.py", ""), ("kit/sub.py", "K = {0}\n")]),
    "a module by its name": (
        "import importlib\nh = importlib.import_module('helper')\ndef reward(completions, **_): return [h.K]",
        [("helper.py", "K = {0}\n")]),
    "a module from a path that is gone": (
        "import sys\nsys.path.insert(0, 'lib')\nimport far\nsys.path.pop(0)\n"
        "def reward(completions, **_): return [far.K]", [("lib/far.py", "K = {0}\n")]),
    "a nested function": ("def reward(completions, **_):\n    def inner(x): return {0}\n    return [inner(1)]", []),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED)
def test_a_number_that_changes_shows(tmp_path, name):
    text, files = CHANGED[name]

    def of(number):
        return of_script(tmp_path, text.replace("{0}", number), files=[(f, t.replace("{0}", number)) for f, t in files])

    before = of("2")
    assert of("2") == before
    assert of("-2") != before


UNCHANGED = {
    "super() in a callable": """
        class Base:
            def __init__(self): self.k = 1
        class Derived(Base):
            def __init__(self): super().__init__()
            def __call__(self, completions, **_): return [self.k]
        reward = Derived()
        """,
    "a recursive closure": """
        def make():
            def depth(x): return 0 if not x else 1 + depth(x[1:])
            def reward(completions, **_): return [depth(x) for x in completions]
            return reward
        reward = make()
        """,
    "a dict that holds itself": """
        TABLE = {}
        TABLE["me"] = TABLE
        def reward(completions, **_): return [len(TABLE)]
        """,
    "where the script lies": """
        from pathlib import Path
        HERE = Path(__file__).resolve().parent
        LOG = str(HERE / "script.py")
        def reward(completions, **_): return [len(LOG) * 0 + len(str(HERE)) * 0]
        """,
    "a global of an attribute's name": """
        import sys
        count = len(sys.argv[0]) + id(object()) % 7
        def reward(completions, **_): return [text.count("a") for text in completions]
        """,
    "a counter": """
        import os
        calls = os.getpid()
        def reward(completions, **_):
            global calls
            calls += 1
            return [1.0]
        """,
    "an object that counts": """
        import os
        class Judge:
            def __init__(self): self.calls = os.getpid()
            def __call__(self, completions, **_):
                self.calls += 1
                return [1.0]
        reward = Judge()
        """,
    "a lock and a client": """
        import threading
        lock = threading.Lock()
        def reward(completions, **_):
            with lock: return [1.0]
        """,
}


@pytest.mark.parametrize("name", UNCHANGED)
def test_what_says_nothing_of_the_reward_does_not_show(tmp_path, name):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert of_script(tmp_path / "a", UNCHANGED[name]) == of_script(tmp_path / "b", UNCHANGED[name])


def test_a_list_that_a_reward_appends_to_keeps_its_hash():
    names = script("""
    seen, limits = [], [1, 2]
    def reward(completions, **_):
        seen.append(len(completions))
        return [limits[0] for _ in completions]
    """)
    before = source_parts(names["reward"])
    names["reward"](["a"])
    assert source_parts(names["reward"]) == before
    names["limits"] = [1, 3]  # another list
    assert source_parts(names["reward"]) != before


@pytest.mark.parametrize(("old", "new"), [("str.lower", "str.upper"), ("1 + inner(x)", "2 + inner(x)"), ("'a'", "'b'")])
def test_code_without_a_text_counts_by_its_bytecode(old, new):
    """The text of a program that Python reads from its standard input is not to be had."""
    text = """
def reward(completions, **_):
    def inner(x): return list(map(str.lower, x)).count('a')
    return [1 + inner(x) for x in completions]
from estune.rewards.sources import source_parts
print(source_parts(reward))
"""

    def of(text):
        done = subprocess.run([sys.executable, "-"], input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert of(text) == of(text) != of(text.replace(old, new))


def test_a_file_and_a_module_of_one_name_have_the_same_parts(project):
    assert source_parts(load_reward("score.py:f")) == source_parts(load_reward("score:f"))


def test_an_installed_package_counts_by_its_version_and_the_file_of_the_reward(tmp_path, monkeypatch):
    site = tmp_path / "site-packages"
    (site / "judges").mkdir(parents=True)
    (site / "judges" / "__init__.py").write_text("from judges.deep import K\ndef f(completions, **_): return [K]\n")
    (site / "judges" / "deep.py").write_text("K = 1\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(site)])
    for name in ("judges", "judges.deep"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    function = load_reward("judges:f")
    before = source_parts(function)
    (site / "judges" / "__init__.py").write_text("from judges.deep import K\ndef f(completions, **_): return [-K]\n")
    assert source_parts(function) != before
    monkeypatch.setattr(sources, "version_of", lambda name: "2.0")
    (site / "judges" / "__init__.py").write_text("from judges.deep import K\ndef f(completions, **_): return [K]\n")
    assert source_parts(function) != before
