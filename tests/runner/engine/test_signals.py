"""Child processes survive Ctrl-C and SIGTERM before they can save, and then receive them."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from runner.engine import signals
from tests.conftest import LIMIT

WORKER = """
import sys
from runner.engine import signals

received = set()
with signals.delivered_to(lambda number, frame: received.add(number)):
    print("first job", *sorted(received), flush=True)
sys.stdin.readline()  # between two jobs
received.clear()
with signals.delivered_to(lambda number, frame: received.add(number)):
    print("second job", *sorted(received), flush=True)
"""


def test_a_worker_receives_what_came_while_it_started_and_ignores_what_comes_between_two_jobs(environment):
    command, pipe = [sys.executable, "-c", WORKER], subprocess.PIPE
    with signals.deferred():
        worker = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # before it has imported anything
        worker.send_signal(number)
    assert worker.stdout.readline() == f"first job {signal.SIGINT:d} {signal.SIGTERM:d}\n"
    for number in (signal.SIGINT, signal.SIGTERM):
        worker.send_signal(number)
    assert worker.communicate("go on\n", timeout=LIMIT)[0] == "second job\n"
    assert worker.returncode == 0


def test_the_process_that_defers_receives_them_afterwards_or_where_they_are_delivered():
    received = []
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), signals.handled_by(lambda number, frame: received.append(number)):
        with signals.deferred():
            signal.raise_signal(signal.SIGINT)
            assert received == []
            with signals.delivered():
                assert received == [signal.SIGINT]
            signal.raise_signal(signal.SIGTERM)
            assert received == [signal.SIGINT]
        assert received == [signal.SIGINT, signal.SIGTERM]
        raise KeyError
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
