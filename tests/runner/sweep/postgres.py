"""A PostgreSQL server of the tests' own: in a new folder, on a socket there, stopped at the end."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.conftest import LIMIT

PROGRAMS = ("initdb", "pg_ctl", "postgres")
PASSWORD = "se/cret:7@q"  # of characters that a URL wants quoted


def find_programs() -> Path | None:
    """The folder of the server's programs: Debian's, or one on the PATH."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    folders += [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep)]
    return next((f for f in folders if all((f / program).is_file() for program in PROGRAMS)), None)


@contextlib.contextmanager
def server() -> Iterator[str]:
    """The URL of a running server's database, with the password that it wants; skips where there can be none."""
    pytest.importorskip("psycopg")
    programs = find_programs()
    if programs is None:
        pytest.skip(f"PostgreSQL's server is not installed: {', '.join(PROGRAMS)}")
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # a socket's path is 100 characters at most
    prefix = []
    if os.geteuid() == 0:  # which PostgreSQL refuses to run as
        if not shutil.which("setpriv"):
            pytest.skip("PostgreSQL does not run as root, and setpriv is not installed")
        shutil.chown(folder, "nobody")
        prefix = ["setpriv", "--reuid=nobody", "--clear-groups", "--"]

    def run(program: str, *arguments: str) -> None:
        command = [*prefix, str(programs / program), "-D", str(folder / "data"), *arguments]
        # not captured by a pipe, which the server would keep open
        with (folder / "output").open("ab") as output:
            done = subprocess.run(
                command, cwd=folder, stdout=output, stderr=output, check=False, timeout=LIMIT
            )
        if done.returncode != 0:
            pytest.skip(f"PostgreSQL does not start here: {(folder / 'output').read_text()[-300:]}")

    options = f"-k {folder} -c listen_addresses='' -c fsync=off -c shared_buffers=16MB"
    try:
        (folder / "password").write_text(PASSWORD)
        (folder / "password").chmod(0o644)
        asked = ["-A", "scram-sha-256", "--pwfile", str(folder / "password")]
        run("initdb", "-U", "tester", *asked, "--no-sync", "-E", "UTF8", "--locale=C")
        run("pg_ctl", "-w", "-t", "600", "-l", str(folder / "log"), "-o", options, "start")
        try:
            yield f"postgresql+psycopg://tester:{quote(PASSWORD, safe='')}@/postgres?host={folder}"
        finally:
            run("pg_ctl", "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
