"""Signals that stop a run, signals that end it at once, and the handlers that the user's process gets back."""

import io
import os
import signal
import subprocess
import sys
import threading

import pytest

from estune.train.signals import SIGNALS, StopRequest

ALL = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def _handlers():
    """Give every test the handlers of a new interpreter, and restore pytest's afterwards."""
    before = {number: signal.getsignal(number) for number in ALL}
    for number in ALL:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_all_three_are_watched():
    assert set(SIGNALS) == set(ALL)


@pytest.mark.parametrize("number", ALL)
def test_the_first_signal_asks_to_stop(number, capsys):
    with StopRequest() as stop:
        assert not stop.requested()
        os.kill(os.getpid(), number)
        assert stop.requested()
    assert "send the signal again to quit without saving" in capsys.readouterr().err


@pytest.mark.parametrize("first", ALL)
def test_a_closed_terminal_sends_more_than_one_hangup(first, capsys):
    with StopRequest() as stop:
        for number in (first, signal.SIGHUP, signal.SIGHUP):
            os.kill(os.getpid(), number)
        assert stop.requested()
    assert capsys.readouterr().err.count("send the signal again") == 1


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("first", ALL)
def test_a_second_interrupt_or_termination_ends_the_process(first, second):
    script = f"""
import os, signal
from estune.train.signals import StopRequest
signal.signal(signal.SIGINT, signal.default_int_handler)
with StopRequest():
    os.kill(os.getpid(), {int(first)})
    os.kill(os.getpid(), {int(second)})
    os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -second and "Traceback" not in done.stderr


@pytest.mark.parametrize("stopped", [False, True])
def test_the_users_handlers_come_back(stopped):
    caught = []
    handlers = [lambda number, frame: caught.append(number), signal.SIG_DFL, signal.default_int_handler]
    for number, handler in zip(ALL, handlers, strict=True):
        signal.signal(number, handler)
    with StopRequest():
        if stopped:
            os.kill(os.getpid(), signal.SIGHUP)
    assert [signal.getsignal(number) for number in ALL] == handlers
    os.kill(os.getpid(), signal.SIGINT)
    assert caught == [signal.SIGINT]


@pytest.mark.parametrize("ignored", ALL)
def test_an_ignored_signal_stays_ignored(ignored):
    signal.signal(ignored, signal.SIG_IGN)
    other = next(number for number in ALL if number != ignored)
    with StopRequest() as stop:
        os.kill(os.getpid(), ignored)
        assert not stop.requested()
        os.kill(os.getpid(), other)
        assert stop.requested()
        os.kill(os.getpid(), ignored)  # also behind the first of the others
        assert signal.getsignal(ignored) == signal.SIG_IGN
    assert signal.getsignal(ignored) == signal.SIG_IGN


def test_a_handler_that_python_did_not_install_is_left_alone(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: None if number == signal.SIGTERM else signal.SIG_DFL)
    installed = []
    plain = signal.signal
    monkeypatch.setattr(signal, "signal", lambda number, handler: installed.append(number) or plain(number, handler))
    with StopRequest():
        pass
    assert signal.SIGTERM not in installed and signal.SIGHUP in installed


def test_another_thread_changes_no_handler():
    found = []

    def enter():
        with StopRequest() as stop:
            found.extend([signal.getsignal(number) for number in ALL] + [stop.requested()])

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL] * 3 + [False]


@pytest.mark.parametrize("closed", [False, True])
def test_a_signal_needs_no_stderr(monkeypatch, closed):
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr(sys, "stderr", stream if closed else None)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested()
