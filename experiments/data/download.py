"""Downloads: a silent server is given up within seconds; a progress bar where there is a terminal."""

from __future__ import annotations

import contextlib
import http.client
import io
import socket
import sys
import threading
import urllib.request
from collections.abc import Iterator, Sequence

from experiments.data.files import SourceError

TIMEOUT = 10  # seconds without an answer after which a server is given up


def answering(urls: Sequence[str]) -> list[str]:
    """Return those of the addresses that answer; raise SourceError with each one's problem where none does."""
    problems = {url: _probe(url) for url in urls}
    alive = [url for url, problem in problems.items() if problem is None]
    if not alive:
        raise SourceError("; ".join(f"{url} {problem}" for url, problem in problems.items()))
    return alive


def _probe(url: str) -> str | None:
    """Return why `url` cannot be reached, or None; within seconds even where the name lookup hangs."""
    problem = [f"no answer within {TIMEOUT} seconds"]

    def request() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT).close()
            problem.clear()
        except (OSError, http.client.HTTPException, ValueError) as error:
            problem[0] = f"cannot be reached: {str(error).strip('<>')}"

    # in a thread, since a name lookup has no time limit
    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    return problem[0] if problem else None


@contextlib.contextmanager
def downloading() -> Iterator[None]:
    """Give torchvision's download a time limit, and turn what goes wrong into SourceError."""
    bar = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # of every socket: torchvision sets none
    try:
        with bar:
            yield
    except (RuntimeError, OSError, http.client.HTTPException) as error:
        raise SourceError(" ".join(str(error).split())) from None
    finally:
        socket.setdefaulttimeout(before)
