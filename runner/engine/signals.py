"""Ctrl-C and SIGTERM: which handler receives them, and child processes that keep them until they can save."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from typing import Any

Handler = Callable[[int, Any], None]  # of a signal's number and the frame that it interrupts

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def handled_by(handler: Handler) -> Iterator[None]:
    """Call `handler` for SIGINT and SIGTERM, in the main thread; no other thread may set handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Keep SIGINT and SIGTERM pending in every process that this thread starts, until its first `delivered_to`.

    A process that still imports modules would die of them. This process receives them in its other threads.
    """
    # Python's and joblib's resource trackers: some versions unblock the signals when they start one
    resource_tracker.ensure_running()
    with contextlib.suppress(ImportError):
        from joblib.externals.loky.backend import resource_tracker as loky_tracker

        loky_tracker.ensure_running()

    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def delivered() -> Iterator[None]:
    """Deliver signals within `deferred`, in the process that deferred them."""
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def delivered_to(handler: Handler) -> Iterator[None]:
    """Deliver signals to `handler` in a process that was started within `deferred`; ignore them afterwards.

    Between two jobs a worker has nothing to save, and some launchers kill all workers when one dies.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    for number in _SIGNALS:
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    try:
        yield
    finally:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
