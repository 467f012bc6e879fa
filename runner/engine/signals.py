"""Ctrl-C and SIGTERM: who hears them, and processes in which they wait until somebody does."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def taken(handler: Callable[[int, Any], None], *numbers: signal.Signals) -> Iterator[None]:
    """Call `handler` for these signals (SIGINT and SIGTERM by default), in the main thread; no other may."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers or ENDING}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait in every process that this thread starts, until it enters `heard`.

    A process that still imports modules would die of them. This process hears them in its other threads.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    start_trackers()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_trackers() -> None:
    """Start the processes that clean up after others now: in some versions their start unblocks the signals."""
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()
    with contextlib.suppress(ImportError):
        from joblib.externals.loky.backend import resource_tracker as lokys

        lokys.ensure_running()


@contextlib.contextmanager
def heard(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """In a process that was started while signals wait: hear them now, and none of them afterwards.

    Between two jobs a worker has nothing to save, and some launchers end all processes when one dies.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    for number in ENDING:
        signal.signal(number, handler)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    try:
        yield
    finally:
        for number in ENDING:
            signal.signal(number, signal.SIG_IGN)
