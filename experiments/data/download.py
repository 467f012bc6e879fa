"""Asking servers for files: within seconds where they are silent, with a bar where there is a terminal."""

from __future__ import annotations

import contextlib
import http.client
import io
import socket
import sys
import threading
import urllib.request
from collections.abc import Iterator

from experiments.data.files import Unavailable

PATIENCE = 10  # seconds without an answer after which a server is given up


def probe(url: str) -> str | None:
    """Why `url` cannot be had, or None; within seconds even where name lookup or the connection hangs."""
    problem = [f"has not answered within {PATIENCE} seconds"]

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PATIENCE).close()
            problem.clear()
        except (OSError, http.client.HTTPException, ValueError) as error:
            problem[0] = f"cannot be had: {str(error).strip('<>')}"

    thread = threading.Thread(target=ask, daemon=True)  # a name lookup knows no timeout
    thread.start()
    thread.join(PATIENCE)
    return problem[0] if problem else None


@contextlib.contextmanager
def fetching() -> Iterator[None]:
    """While torchvision downloads: a server's silence has a limit, and what goes wrong is Unavailable."""
    try:
        with time_limit(PATIENCE), bar_on_terminals():
            yield
    except (RuntimeError, OSError, http.client.HTTPException) as error:
        raise Unavailable(" ".join(str(error).split())) from None


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Sockets that stay silent for so long fail; torchvision sets no limit of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def bar_on_terminals() -> contextlib.AbstractContextManager[object]:
    """torchvision's progress bars where there is a terminal, silence where there is none."""
    return contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
