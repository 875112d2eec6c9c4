"""Reward functions in real processes: killed for real, with real (short) time limits."""

import asyncio
import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
from concurrent.futures import wait
from pathlib import Path

import numpy as np
import pytest
from command_line import PATIENCE_S

from estune.errors import UserError
from estune.rewards.contract import read_reply, required_keywords
from estune.rewards.loading import EXTRA_OF
from estune.rewards.pool import RewardBatch, RewardPool, load_reward
from estune.rewards.sources import source_parts
from estune.rewards.wrappers import hackable, judged, noisy, wrap

pytestmark = pytest.mark.xdist_group("processes")

ROOT = Path(__file__).parents[2]
GENEROUS_S = PATIENCE_S  # for calls that answer
KILLED_AFTER_S = 3.0  # where a call hangs: the calls beside it have as long, on a busy machine too


def batch(completions=("a", "bb", "ccc"), **columns):
    n = len(completions)
    prompts = [f"p{row}" for row in range(n)]
    return RewardBatch(prompts, list(completions), [[1, 2]] * n, columns, {"global_step": 4, "max_steps": 9})


def score(*functions, given=None, timeout_s=GENEROUS_S, isolation="process"):
    names = [f"f{index}" for index in range(len(functions))]
    with RewardPool(functions, names, timeout_s=timeout_s, workers=1, isolation=isolation) as pool:
        return pool.submit(given or batch()).result()


def ours():
    """Processes that reward pools of this process have: pid -> command line, workers and what they started included."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue
            if f"REWARD_TEST={os.getpid()}".encode() in environment and state != "Z":
                found[int(entry.name)] = b" ".join(words).decode()
    return found


@pytest.fixture(autouse=True)
def nothing_is_left_behind(monkeypatch):
    monkeypatch.setenv("REWARD_TEST", str(os.getpid()))
    yield
    assert gone(ours())


def gone(pids):
    """Return whether all of these processes end within `PATIENCE_S`."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if not any(_running(pid) for pid in pids):
            return True
        time.sleep(0.02)
    return False


def _running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def length(completions, **kwargs):
    return [float(len(text)) for text in completions]


BOTH = pytest.mark.parametrize("isolation", ["process", "inline"])


# --- wrappers that make a reward unreliable


def wrapped_score(*wrappers, rows=2000, reward=length, isolation="inline", completions=None, **state):
    """Return the rewards (rows,) of completions "a" within wrappers."""
    given = batch(completions or ["a"] * rows)
    given.trainer_state |= state
    return score(wrap(reward, wrappers, 7), given=given, isolation=isolation)


def test_noise_has_its_rates_and_is_a_function_of_what_is_scored():
    flipped = wrapped_score("noisy(flip=0.2, high=3)").rewards[:, 0]
    assert set(flipped) == {1.0, 2.0} and np.mean(flipped == 2.0) == pytest.approx(0.2, abs=0.03)
    normal = wrapped_score("noisy(std=0.5)").rewards[:, 0]
    assert normal.mean() == pytest.approx(1, abs=0.04) and normal.std() == pytest.approx(0.5, abs=0.03)
    lost = wrapped_score("drop(share=0.3)")
    assert np.isnan(lost.rewards).mean() == pytest.approx(0.3, abs=0.04) and not lost.failed.any()
    for state in ({"global_step": 5}, {"member": 3}):  # step and member draw anew, unless a row has one draw
        assert (wrapped_score("noisy(std=0.5)", **state).rewards[:, 0] != normal).all()
        by_row = "noisy(std=0.5, per=row)"
        assert (wrapped_score(by_row, **state).rewards == wrapped_score(by_row).rewards).all()
    assert (wrapped_score("noisy(std=0.5)").rewards[:, 0] == normal).all()
    assert (wrapped_score("noisy(std=0.5, seed=1)").rewards[:, 0] != normal).all()
    assert (wrapped_score("noisy(std=0.5)", is_evaluation=True).rewards == 1.0).all()


@BOTH
def test_wrappers_of_all_kinds_of_functions(isolation):
    async def slow(completions, width, log_metric, **kwargs):
        log_metric("seen", len(completions))
        return [None if text == "bb" else float(len(text)) for text in completions]

    def taken(completions, width):
        return [0.5 * (text == wide) for text, wide in zip(completions, width, strict=True)]

    given = batch(width=["a", "x", "ccc"])
    for exploit, bonuses in (("^[ac]+$", (2.0, 2.0)), (taken, (1.0, 1.0))):
        function = noisy(hackable(slow, exploit=exploit, bonus=2.0), std=1e-6)
        found = score(function, given=given, isolation=isolation)
        assert found.rewards[[0, 2], 0] == pytest.approx([1 + bonuses[0], 3 + bonuses[1]], abs=1e-4)
        assert np.isnan(found.rewards[1, 0]) and not found.failed.any() and not found.errors
        assert found.metrics == {"seen": 3.0, "exploited": pytest.approx(2 / 3)}
    assert function.__name__ == "slow" and required_keywords(function) == ["completions", "width", "log_metric"]
    logged = score(wrap(length, ["hackable(exploit=b, bonus=5)"]), isolation=isolation)
    assert logged.rewards[:, 0].tolist() == [1.0, 7.0, 3.0] and logged.metrics["true_reward/length"] == 2.0


OPPOSED = [["bbbb", "b"], [], ["x"]]  # opponents of "a", "bb" and "ccc"


@BOTH
def test_a_preference_is_the_share_of_beaten_opponents(isolation):
    given = batch(opponents=OPPOSED, width=[1, 2, 3])
    found = score(wrap(length, ["preference()"]), given=given, isolation=isolation)
    assert found.rewards[:, 0].tolist()[::2] == [0.25, 1.0] and np.isnan(found.rewards[1, 0]) and not found.failed.any()
    assert found.metrics == {"true_reward/length": 2.0}  # of the completions, without the opponents

    def judge(prompts, first, second, width):
        assert prompts == ["p0", "p0", "p2"] and width == [1, 1, 3]
        return [None if b == "b" else float(len(a) > len(b)) for a, b in zip(first, second, strict=True)]

    class Judge:
        def judge(self, prompts, completions, shuffle_order=True):
            return [-1 if b == "b" else int(len(a) < len(b)) for a, b in completions]

    for kind in (judge, Judge()):
        found = score(judged(kind), given=given, isolation=isolation)
        assert found.rewards[:, 0].tolist()[::2] == [0.0, 1.0] and np.isnan(found.rewards[1, 0]), found.errors
        assert np.isnan(score(judged(kind), isolation=isolation).rewards).all()  # nobody to compare with
    with pytest.raises(UserError, match="a judge is a function, or an object with a method judge, not int"):
        judged(3)


def test_a_preference_is_wrong_at_its_rate():
    given = batch(["aa"] * 2000, opponents=[["b"]] * 2000)
    found = score(wrap(length, ["preference(agree=0.7)"]), given=given, isolation="inline").rewards
    assert set(found[:, 0]) == {0.0, 1.0} and found.mean() == pytest.approx(0.7, abs=0.03)
    given.trainer_state["is_evaluation"] = True
    assert (score(wrap(length, ["preference(agree=0.7)"]), given=given, isolation="inline").rewards == 2.0).all()


def test_a_wrapped_reward_is_identified_by_its_source_and_settings():
    def parts(wrapper, reward=length):
        return source_parts(wrap(reward, [wrapper]))

    assert parts("noisy(flip=0.1)") == parts("noisy(flip=0.1)") != parts("noisy(flip=0.2)")
    assert parts("noisy(flip=0.1)") != parts("noisy(flip=0.1)", functools.partial(length, scale=2.0))


@pytest.mark.parametrize(
    ("wrapper", "words"),
    [
        ("noisy", "no call such as noisy"), ("noisy(0.2)", "with named arguments"), ("noisy(flip=", "no call"),
        ("loud(flip=1)", "no wrapper 'loud'; there are noisy, drop, hackable, preference"),
        ("noisy(share=1)", "noisy has no argument 'share'; it has flip, std, per, low, high, seed"),
        ("noisy(flip=1+x)", "flip of noisy must be a number or text"), ("drop()", "drop needs share"),
        ("noisy(flip=2)", "flip must be between 0 and 1, not 2"), ("noisy(flip=a)", "between 0 and 1, not 'a'"),
        ("noisy(std=-1)", "std must not be negative"), ("noisy(per=all)", "it can be call, row"),
        ("hackable(exploit='(')", "no regular expression"), ("hackable(exploit=3)", "expression or a function"),
        ("hackable(exploit='gone.py:f')", "there is no file gone.py"), ("noisy(low=[1])", "must be a finite number"),
    ],
)  # fmt: skip
def test_a_wrong_wrapper_is_one_sentence(wrapper, words):
    with pytest.raises(UserError, match=re.escape(words)):
        wrap(length, [wrapper])


# --- TRL's contract


@BOTH
def test_trl_keywords_several_functions_and_logs(isolation):
    def everything(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, target, **kwargs):
        assert trainer_state.global_step == 4 and completion_ids == [[1, 2]] * 3 and kwargs == {"other": "xyz"}
        log_metric("mean_target", 1)
        log_metric("mean_target", 2)
        log_extra("seen", [text.upper() for text in completions])
        return [t + len(p) for p, t in zip(prompts, target, strict=True)]

    given = batch(target=[1, 2, 3], other=["x", "y", "z"])

    def wrapped(other, **kwargs):  # other is a list of one string per row
        return everything(other="".join(other), **kwargs)

    result = score(wrapped, length, lambda completions: np.array([True, False, True]), given=given, isolation=isolation)
    assert result.errors == []
    assert result.rewards.tolist() == [[3, 1, 1], [4, 2, 0], [5, 3, 1]]
    assert result.rewards.dtype == np.float64 and not result.failed.any()
    assert result.metrics == {"mean_target": 1.5}
    assert result.extra == {"seen": ["A", "BB", "CCC"]}


@BOTH
def test_async_functions_share_one_event_loop(isolation):
    loops = []

    async def slow(completions, **kwargs):
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0.01)
        return [float(loops[0] is loops[-1])] * len(completions)

    with RewardPool([slow], ["slow"], timeout_s=GENEROUS_S, workers=1, isolation=isolation) as pool:
        for _ in range(2):
            assert pool.submit(batch()).result().rewards[:, 0].tolist() == [1, 1, 1]


def test_inline_async_works_inside_a_running_loop():
    async def reward(completions):
        return [1.0] * len(completions)

    async def cell():
        return score(reward, isolation="inline")

    assert asyncio.run(cell()).rewards[:, 0].tolist() == [1, 1, 1]


@BOTH
def test_none_is_not_applicable_and_nan_or_inf_fail_alone(isolation):
    calls = []

    def reward(completions):
        calls.append(len(completions))
        assert calls == [4], "a good answer with a NaN in it is not repeated"
        return [None, math.nan, -math.inf, 1]

    result = score(reward, given=batch("abcd"), isolation=isolation)
    assert result.failed[:, 0].tolist() == [False, True, True, False]
    np.testing.assert_array_equal(result.rewards[:, 0], [math.nan, math.nan, math.nan, 1])
    assert result.errors == ["f0: returned nan"]


@BOTH
def test_only_the_guilty_row_fails(isolation):
    def reward(completions, log_extra, log_metric):
        log_metric("calls", 1)
        log_extra("n", [len(text) for text in completions])
        if "bb" in completions:
            raise KeyError("bb is bad")
        return [1.0] * len(completions)

    result = score(reward, length, isolation=isolation)
    assert result.failed.tolist() == [[False, False], [True, False], [False, False]]
    assert result.rewards[[0, 2], 0].tolist() == [1, 1]
    assert len(result.errors) == 1 and result.errors[0].startswith("f0: KeyError: 'bb is bad' (test_rewards.py:")
    assert result.metrics == {"calls": 1.0}
    assert result.extra == {"n": [1, None, 3]}


@BOTH
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ([1.0] * 3, "returned 3 rewards for 2 completions"),
        (None, "returned NoneType"),
        ("12", "returned str"),
        (["1", 2], "'1' .str., which is not a number"),
        ([[1], 2], "not a number"),
        ([10**400, 2], "not a number"),
        (3.0, "returned float"),
    ],
)
def test_answers_that_are_not_one_number_each_fail(isolation, answer, words):
    result = score(lambda completions: answer, given=batch("ab"), isolation=isolation)
    assert result.failed.any()
    assert re.search(words, result.errors[0])


@BOTH
def test_metrics_that_have_no_mean_are_dropped(isolation):
    def reward(completions, log_metric):
        for name, value in [("big", 1e308), ("inf", math.inf), ("inf", -math.inf), ("good", 1), ("good", math.nan)]:
            log_metric(name, value)
        log_metric("big", 1e308)
        log_metric("x" * 201, 1)
        log_metric(5, 1)
        log_metric("\ud800", 2)
        return [1.0] * len(completions)

    result = score(reward, isolation=isolation)
    assert result.metrics == {"good": 1, "?": 2} and result.errors == []


@BOTH
def test_extra_columns_have_one_writable_value_per_row(isolation):
    def reward(completions, log_extra):
        deep = []
        for _ in range(900):
            deep = [deep]
        log_extra("note", ["one"])
        log_extra("long", list("abcd"))
        log_extra("halves", ["a"])
        log_extra("halves", ["b", "c"])
        log_extra("odd", ["\ud800", deep, {"\ud800": [math.nan, 1 << 70]}])
        return [1.0] * len(completions)

    result = score(reward, lambda completions, log_extra: log_extra("note", []) or [1] * 3, isolation=isolation)
    assert not result.failed.any() and set(result.extra) == {"halves", "odd"}
    assert result.extra["halves"] == ["a", "b", "c"]
    assert result.extra["odd"][::2] == ["?", {"?": [None, str(1 << 70)]}]
    assert json.dumps(result.extra, ensure_ascii=False, allow_nan=False).encode().count(b"[") < 30
    assert result.errors[0] == "f0: log_extra of 'note' dropped: 1 values for 3 completions"


@BOTH
def test_endless_nesting_and_unwritable_messages_are_failures(isolation):
    def deep(completions, log_extra):
        value = []
        for _ in range(5000):
            value = [value]
        log_extra("deep", [value] * len(completions))
        return [1.0] * len(completions)

    def exits(completions):
        sys.exit("\ud800")

    result = score(deep, exits, isolation=isolation)
    assert result.failed.all()
    assert "RecursionError" in result.errors[0] and result.errors[1].startswith("f1: SystemExit: ?")


def test_torch_and_numpy_numbers():
    torch = pytest.importorskip("torch")
    result = score(
        lambda completions: torch.tensor([1.5, 2.5, 3.5]),
        lambda completions, log_extra: (log_extra("x", list(np.arange(3))), [np.float32(0.5), np.int64(2), True])[1],
    )
    assert result.rewards.tolist() == [[1.5, 0.5], [2.5, 2], [3.5, 1]]
    assert result.extra == {"x": [0, 1, 2]}


def test_no_rows():
    assert score(length, given=batch(())).rewards.shape == (0, 1)


# --- time limits and deaths


def spin(completions, **kwargs):
    if "bb" in completions:
        while True:
            pass
    return [1.0] * len(completions)


def hang_in_c(completions, **kwargs):
    import ctypes

    if "bb" in completions:
        ctypes.PyDLL(None).sleep(6000)  # holds the GIL
    return [1.0] * len(completions)


@pytest.mark.parametrize("function", [spin, hang_in_c])
def test_a_call_over_its_time_is_killed(function):
    result = score(function, length, timeout_s=KILLED_AFTER_S)
    assert result.failed[:, 0].tolist() == [False, True, False]
    assert result.rewards[:, 1].tolist() == [1, 2, 3]
    assert result.errors == ["f0: took longer than 3 s and was killed"]


def test_a_batch_of_one_row_is_not_repeated(tmp_path):
    def reward(completions):
        with open(tmp_path / "calls", "a") as file:
            file.write("x")
        return spin(completions)

    assert score(reward, given=batch(["bb"]), timeout_s=KILLED_AFTER_S).failed.all()
    assert (tmp_path / "calls").read_text() == "x"


@pytest.mark.parametrize(
    ("death", "cause"),
    [
        (lambda: os._exit(3), "exit status 3"),
        (lambda: os.kill(os.getpid(), 11), "SIGSEGV"),
        (lambda: os.kill(os.getpid(), 9), "SIGKILL"),
    ],
)
def test_a_dead_worker_is_a_failure(death, cause):
    def reward(completions):
        if "bb" in completions:
            death()
        return [1.0] * len(completions)

    result = score(reward)
    assert result.failed[:, 0].tolist() == [False, True, False]
    assert result.errors == [f"f0: worker process died ({cause})"]


def test_sys_exit_and_signals_do_not_end_a_worker():
    def reward(completions):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        if "bb" in completions:
            sys.exit(1)
        return [float(os.getpid())] * len(completions)

    result = score(reward)
    assert result.failed[:, 0].tolist() == [False, True, False]
    assert result.rewards[0, 0] == result.rewards[2, 0]
    assert result.errors[0].startswith("f0: SystemExit: 1")


def test_what_a_reward_forks_can_be_terminated():
    def reward(completions):
        import multiprocessing

        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(6000,))
        child.start()
        child.terminate()
        child.join()
        return [float(child.exitcode)] * len(completions)

    assert score(reward).rewards[:, 0].tolist() == [-15] * 3


def test_subprocesses_and_threads_go_with_their_worker():
    def reward(completions):
        threading.Thread(target=time.sleep, args=(6000,), daemon=False).start()
        subprocess.Popen(["sleep", "6001"])
        subprocess.Popen(["sleep", "6002"], start_new_session=True)
        subprocess.Popen("(sleep 6003 &)", shell=True, start_new_session=True).wait()
        return [1.0] * len(completions)

    with RewardPool([reward], ["r"], timeout_s=GENEROUS_S, workers=2) as pool:
        assert not pool.submit(batch()).result().failed.any()
        while not {"sleep 6001", "sleep 6002", "sleep 6003"} <= {words.strip() for words in ours().values()}:
            time.sleep(0.02)
    assert gone(ours())


@pytest.mark.parametrize("hangs", [True, False])
def test_what_left_a_killed_or_dead_worker_is_killed_with_it(hangs):
    def reward(completions):
        if completions == ["go on"]:
            return [1.0]
        subprocess.Popen(["sleep", "6031"], start_new_session=True)
        subprocess.Popen("(sleep 6032 &)", shell=True, start_new_session=True).wait()
        return time.sleep(6000) if hangs else os._exit(1)

    with RewardPool([reward], ["r"], timeout_s=KILLED_AFTER_S, workers=2) as pool:
        wait(pool.loaded)
        before = set(ours())
        assert pool.submit(batch(["bb"])).result().failed.all()
        assert gone([pid for pid, words in ours().items() if "sleep" in words])
        assert len(before & set(ours())) == 2  # the server, and the other worker
        assert pool.submit(batch(["go on"])).result().rewards[0, 0] == 1


GOOD = {"rewards": [1.0, None], "metrics": {"m": [1.0]}, "extra": {"e": [1]}, "call": 7}


@pytest.mark.parametrize(
    "reply",
    [
        "[1, 2, 3]",
        "no json",
        b"\xff\xfe\xff",
        "[" * 100_000,
        "1" * 5000,
        *(
            json.dumps(GOOD | change)
            for change in [
                {"call": 6}, {"call": None}, {"error": 5, "call": 7}, {"error": ["x"]},
                {"rewards": ["x", None]}, {"rewards": [True, None]}, {"rewards": [1.0]}, {"rewards": 1.0},
                {"rewards": [10**400, None]}, {"rewards": None},
                {"metrics": []}, {"metrics": {"m": 1.0}}, {"metrics": {"m": ["x"]}}, {"metrics": {"m": [True]}},
                {"extra": None}, {"extra": {"e": "text"}}, {"extra": ["e"]},
            ]
        ),
    ],
)  # fmt: skip
def test_what_is_no_reply_is_refused(reply):
    assert read_reply(json.dumps(GOOD), 7, 2) == {name: GOOD[name] for name in ("rewards", "metrics", "extra")}
    with pytest.raises(ValueError, match=r"not |instead of|Expecting value|can't decode|too deeply|4300 digits"):
        read_reply(reply, 7, 2)


@pytest.mark.parametrize(
    "reply", [b"[1, 2, 3]", b'{"rewards": ["x"]}', b"\xff", b"{}", b'{"rewards": [9.0], "call": 0}']
)
def test_answers_that_a_reward_forges_fail(reply):
    def reward(completions):
        if "bb" in completions:
            frame = sys._getframe()
            while "channel" not in frame.f_locals:
                frame = frame.f_back
            frame.f_locals["channel"].sendall(len(reply).to_bytes(8, "little") + reply)
        return [1.0] * len(completions)

    result = score(reward, length)
    assert result.failed[:, 0].tolist() == [False, True, False]
    assert result.rewards[:, 1].tolist() == [1, 2, 3]
    assert "sent an invalid reply" in result.errors[0]


def test_an_answer_too_large_for_the_trainer_fails():
    result = score(lambda completions, log_extra: log_extra("x", ["y" * (1 << 26)]) or [1.0], given=batch(["a"]))
    assert result.failed.all() and "over the limit" in result.errors[0]


def test_printing_breaks_nothing(capfd):
    def reward(completions):
        print("x" * 10_000_000)
        os.write(1, b"raw")
        print("unfinished line", end="")
        return [1.0] * len(completions)

    assert score(reward).rewards[:, 0].tolist() == [1, 1, 1]
    captured = capfd.readouterr()
    assert captured.out == "" and len(captured.err) > 10_000_000


def test_printing_inline_leaves_stdout_alone(capsys):
    async def reward(completions):
        print("printed")
        return [1.0] * len(completions)

    assert score(reward, isolation="inline").rewards[:, 0].tolist() == [1, 1, 1]
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "printed\n"


def test_big_payloads():
    def reward(completions, blob):
        return [len(c) + len(b) for c, b in zip(completions, blob, strict=True)]

    result = score(reward, given=batch(["x" * 3_000_000] * 8, blob=[b"y" * 1_000_000] * 8))
    assert result.rewards[:, 0].tolist() == [4_000_000] * 8


def test_the_fork_server_can_die_too():
    with RewardPool([length], ["length"], timeout_s=GENEROUS_S, workers=2) as pool:
        wait(pool.loaded)
        before = ours()
        server = pool._server._process.pid
        os.kill(server, signal.SIGKILL)
        assert gone(before)  # its workers went with it
        results = [pool.submit(batch()) for _ in range(4)]
        for future in results:
            future.result()
        assert pool.submit(batch()).result().rewards[:, 0].tolist() == [1, 2, 3]


# --- the pool


def test_scoring_runs_beside_the_caller_and_in_parallel(tmp_path):
    """Each call waits for the other, and both wait until the caller has submitted them."""

    def reward(completions):
        (tmp_path / f"call-{completions[0]}").touch()
        while len(list(tmp_path.iterdir())) < 3:
            time.sleep(0.01)
        return [1.0] * len(completions)

    with RewardPool([reward], ["r"], timeout_s=GENEROUS_S, workers=2) as pool:
        futures = [pool.submit(batch([name])) for name in ("a", "b")]
        assert not any(future.done() for future in futures)
        (tmp_path / "caller").touch()
        assert [future.result().rewards[0, 0] for future in futures] == [1, 1]


def test_close_waits_for_no_call_is_idempotent_and_cancels(tmp_path):
    """The running call would take an hour."""

    def reward(completions):
        (tmp_path / "called").touch()
        return spin(completions)

    pool = RewardPool([reward], ["spin"], timeout_s=3600, workers=1)
    running, waiting = pool.submit(batch()), pool.submit(batch())
    while not (tmp_path / "called").exists():
        time.sleep(0.01)
    pool.close()
    pool.close()
    assert waiting.cancelled()
    with pytest.raises(BaseException, match="closed"):
        running.result()
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(batch())


def test_our_own_mistakes_propagate():
    with pytest.raises(ValueError, match="column 'target' has 1 values for 3"):
        score(length, given=batch(target=[1]), isolation="inline")
    with pytest.raises(UserError, match="reward_isolation is"):
        RewardPool([length], ["length"], timeout_s=1, workers=1, isolation="none")


# --- how functions travel


def test_what_cannot_travel_names_the_way_out():
    lock = threading.Lock()

    def reward(completions):
        with lock:
            return [1.0] * len(completions)

    with pytest.raises(UserError, match=r"'locked' cannot be sent.*--reward_isolation inline"):
        RewardPool([reward], ["locked"], timeout_s=1, workers=1)
    assert score(reward, isolation="inline").rewards[0, 0] == 1


class Unloadable:
    def __call__(self, completions):
        return [1.0] * len(completions)

    def __reduce__(self):
        return int, ("not a number",)


def test_a_reward_that_does_not_load_in_a_worker_is_reported():
    with RewardPool([Unloadable()], ["u"], timeout_s=GENEROUS_S, workers=1) as pool:
        with pytest.raises(UserError, match=r"do not load.*ValueError.*--reward_isolation inline"):
            pool.loaded[0].result()
        with pytest.raises(UserError, match="do not load"):
            pool.submit(batch()).result()


def test_files_and_their_neighbours(tmp_path, monkeypatch):
    (tmp_path / "neighbour_of_reward.py").write_text("import threading\nLOCK = threading.Lock()\nVALUE = 2.0\n")
    file = tmp_path / "my reward.py"
    source = "import neighbour_of_reward as n\nLOCK = n.LOCK\ndef r(completions, **kwargs):\n"
    source += "    with LOCK: return [n.VALUE] * len(completions)\n"
    file.write_text(source)
    function = load_reward(f"{file}:r")
    assert load_reward(f"{file}:r") is function
    with RewardPool([function], ["r"], timeout_s=GENEROUS_S, workers=1) as pool:
        file.write_text("an edit while the run goes on")
        assert pool.submit(batch()).result().rewards[:, 0].tolist() == [2, 2, 2]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "module_in_cwd.py").write_text("class A:\n  @staticmethod\n  def r(completions): return [3] * 3\n")
    assert score(load_reward("module_in_cwd:A.r")).rewards[:, 0].tolist() == [3, 3, 3]


def test_an_edited_file_is_loaded_again(tmp_path):
    file = tmp_path / "edited.py"
    file.write_text("def r(completions): return [1] * len(completions)\n")
    old = load_reward(f"{file}:r")
    file.write_text("def r(completions): return [2] * len(completions)\n")
    new = load_reward(f"{file}:r")
    assert score(old, new).rewards[0].tolist() == [1, 2]


def test_a_module_that_only_this_process_knows_travels_by_value():
    import types

    module = types.ModuleType("made_up_module")
    exec("W = 5.0\ndef r(completions): return [W] * len(completions)", module.__dict__)
    sys.modules["made_up_module"] = module
    try:
        assert score(module.r).rewards[:, 0].tolist() == [5, 5, 5]
    finally:
        del sys.modules["made_up_module"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nocolon", "neither package.module:function nor"),
        ("no_such_package.module:f", "there is no module 'no_such_package'"),
        ("json.nothing:f", "there is no module 'json.nothing'"),
        ("json:dumpz", "json has no 'dumpz'; it has 'dump'"),
        ("json:__doc__", "is a str, not a function"),
        ("json:JSONDecoder", "is a class"),
        ("gone/file.py:f", "there is no file gone/file.py"),
        ("syntax.py:f", r"does not import: .*\(syntax.py:2\)"),
        ("raises.py:f", r"does not import: ZeroDivisionError: division by zero \(raises.py:2\)"),
        (
            "no_such_package.module:f",
            "'no_such_package': start estune in the directory that holds no_such_package, or install",
        ),
        ("json.nothing:f", "there is no module 'json.nothing'$"),
        ("imports.py:f", r"No module named 'no_such_thing' \(imports.py:1\): start estune in the directory that"),
        ("part.py:f", r"No module named 'json.nothing' \(part.py:1\)$"),
        ("opens.py:f", "does not import: FileNotFoundError"),
        ("exits.py:f", "does not import: SystemExit"),
    ],
)
def test_load_reward_tells_what_is_wrong(tmp_path, monkeypatch, spec, words):
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "syntax": "\ndef f(:\n", "raises": "\n1 / 0\n", "imports": "import no_such_thing",
        "part": "import json.nothing", "opens": "open('gone')", "exits": "raise SystemExit(3)",
    }.items():  # fmt: skip
        (tmp_path / f"{name}.py").write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        load_reward(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("trl", "[baselines]"), ("trl.rewards", "[baselines]"), ("math_verify", "[tasks]"),
        ("latex2sympy2_extended", "[tasks]"), ("reasoning_gym.factory", "[tasks]"),
        ("wandb", "[trackers]"), ("sklearn.metrics", "scikit-learn"),
    ],
)  # fmt: skip
def test_a_missing_package_is_reported_with_the_command_that_installs_it(tmp_path, monkeypatch, module, package):
    """Whether it is the reward's own, or one that the reward's file imports."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"wants_{module.replace('.', '_')}.py").write_text(f"import {module}\n")
    top = module.partition(".")[0]
    for name in [name for name in sys.modules if name.partition(".")[0] == top]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Without(finder, top) for finder in sys.meta_path])
    for spec in (f"{module}:f", f"wants_{module.replace('.', '_')}.py:f"):
        with pytest.raises(UserError, match=rf": python -m pip install .*{re.escape(package)}'?$") as caught:
            load_reward(spec)
        assert "start estune in the directory" not in str(caught.value)


class Without:
    """A finder of modules that does not find one package."""

    def __init__(self, finder, package):
        self.finder, self.package = finder, package

    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] == self.package else self.finder.find_spec(name, *rest)

    def __getattr__(self, name):
        return getattr(self.finder, name)


def test_extras_install_the_packages_that_errors_name():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    brings = {
        re.match(r"[\w-]+", package)[0].replace("-", "_"): extra
        for extra in ("baselines", "bench", "compare", "gpu", "ray", "trackers", "tasks")
        for package in extras[extra]
    }
    assert brings | {"latex2sympy2_extended": "tasks"} == EXTRA_OF  # that one comes with math-verify


# --- whole programs

SCRIPT = """
import os, sys, time
{torch}
from estune.rewards.pool import RewardBatch, RewardPool
print("started", flush=True)
weight = 2.0
class Scale:
    def __call__(self, x): return weight * x
scale = Scale()
def reward(completions, **kwargs):
    return [scale(len(text)) for text in completions]
pool = RewardPool([reward, lambda completions: [1] * len(completions)], ["a", "b"], timeout_s=300, workers=2)
print(pool.submit(RewardBatch(["p"] * 2, ["x", "yy"], [[1]] * 2)).result().rewards.tolist())
"""


@pytest.mark.parametrize("how", ["script", "-c", "stdin", "torch"])
def test_scripts_without_a_main_guard(tmp_path, how):
    text = SCRIPT.format(torch="import torch; torch.ones(600, 600) @ torch.ones(600, 600)" if how == "torch" else "")
    (tmp_path / "script.py").write_text(text)
    words = {"-c": ["-c", text], "stdin": ["-"]}.get(how, [str(tmp_path / "script.py")])
    done = subprocess.run(
        [sys.executable, *words], input=text if how == "stdin" else None, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["started", "[[2.0, 1.0], [4.0, 1.0]]"], done.stderr
    assert done.stderr == "" and done.returncode == 0


def test_workers_import_nothing_heavy():
    code = "import sys\nfrom estune.rewards.pool import *\n"
    code += "heavy = {'torch', 'numpy', 'numba', 'estune.errors', 'estune.rewards.pool'}\n"
    code += "f = lambda completions: [len(heavy & set(sys.modules))]\n"
    code += "with RewardPool([f], 'f', timeout_s=300, workers=1) as p: "
    code += "print(p.submit(RewardBatch(['p'], ['c'], [[1]])).result().rewards[0, 0])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "0.0"


HANGING = """
import ctypes, os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
from estune.rewards.pool import RewardBatch, RewardPool
def hang(completions, folder):
    child = subprocess.Popen(["sleep", "6000"])
    open(f"{folder[0]}/{os.getpid()}-{child.pid}", "w").close()
    ctypes.PyDLL(None).sleep(6000)
pool = RewardPool([hang], ["hang"], timeout_s=6000, workers=2)
for _ in range(2):
    pool.submit(RewardBatch(["p"], ["c"], [[1]], {"folder": [sys.argv[1]]}))
if os.fork() == 0:  # a process that holds every line to the fork server open, as a data loader would
    os.setsid()
    os.closerange(0, 3)
    while not os.path.exists(sys.argv[2]):
        time.sleep(0.05)
    os._exit(0)
try:
    print("waiting", flush=True)
    time.sleep(6000)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_die_with_the_trainer_even_while_they_hang(tmp_path, number):
    (tmp_path / "pids").mkdir()
    parent = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", HANGING, str(tmp_path / "pids"), str(tmp_path / "stop")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        while len(list((tmp_path / "pids").iterdir())) < 2 and parent.poll() is None:
            time.sleep(0.02)
        assert parent.stdout.readline() == "waiting\n"
        pids = [int(pid) for file in (tmp_path / "pids").iterdir() for pid in file.name.split("-")]
        assert len(pids) == 4 and all(_running(pid) for pid in pids)
        os.killpg(parent.pid, number)
        out, err = parent.communicate()
        assert gone(pids)
        (tmp_path / "stop").touch()
        assert gone(ours())
        assert err == "" and (number != signal.SIGINT or out == "interrupted\n")
    finally:
        (tmp_path / "stop").touch()
        parent.kill()
