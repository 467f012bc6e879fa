"""Child processes survive Ctrl-C and SIGTERM before they can save, and then receive them."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from runner.engine import signals

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


def test_a_worker_receives_what_came_while_it_started_and_ignores_what_comes_between_two_jobs(
    environment: dict[str, str],
) -> None:
    with signals.deferred():
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    assert worker.stdin is not None and worker.stdout is not None
    for number in (signal.SIGINT, signal.SIGTERM):  # before it has imported anything
        worker.send_signal(number)
    assert worker.stdout.readline() == f"first job {signal.SIGINT:d} {signal.SIGTERM:d}\n"
    for number in (signal.SIGINT, signal.SIGTERM):
        worker.send_signal(number)
    assert worker.communicate("go on\n", timeout=900)[0] == "second job\n"
    assert worker.returncode == 0


def test_the_process_that_defers_receives_them_afterwards_or_where_they_are_delivered() -> None:
    received: list[int] = []
    with signals.handled_by(lambda number, frame: received.append(number)):
        with signals.deferred():
            signal.raise_signal(signal.SIGINT)
            assert received == []
            with signals.delivered():
                assert received == [signal.SIGINT]
            signal.raise_signal(signal.SIGTERM)
            assert received == [signal.SIGINT]
        assert received == [signal.SIGINT, signal.SIGTERM]


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), signals.handled_by(lambda number, frame: None):
        assert signal.getsignal(signal.SIGINT) not in before
        assert signal.getsignal(signal.SIGTERM) not in before
        raise KeyError
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
