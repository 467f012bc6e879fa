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

PROGRAMS = ("initdb", "pg_ctl", "postgres")
PASSWORD = "se/cret:7@q"  # of characters that a URL wants quoted


def find_programs() -> Path | None:
    """The folder of the server's programs: that of pg_config, Debian's, or one on the PATH."""
    folders = []
    if shutil.which("pg_config"):
        told = subprocess.run(["pg_config", "--bindir"], capture_output=True, text=True, check=False)
        folders.append(Path(told.stdout.strip()))
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    folders += [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep)]
    return next((f for f in folders if all((f / program).is_file() for program in PROGRAMS)), None)


def other_user() -> str | None:
    """Whom to run the server as where we are root, which PostgreSQL refuses; None: as ourselves."""
    import pwd

    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    user = next((name for name in ("postgres", "nobody") if name in known), None)
    if user is None or not shutil.which("setpriv"):
        pytest.skip("PostgreSQL does not run as root, and there is no other user to run it as")
    return user


@contextlib.contextmanager
def server() -> Iterator[str]:
    """The URL of a running server's database, with the password that it wants; skips where there can be none."""
    pytest.importorskip("psycopg")
    programs = find_programs()
    if programs is None:
        pytest.skip(f"PostgreSQL's server is not installed: {', '.join(PROGRAMS)}")
    user = other_user()
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # a socket's path is 100 characters at most
    if user is not None:
        shutil.chown(folder, user)
    prefix = [] if user is None else ["setpriv", f"--reuid={user}", "--clear-groups", "--"]

    def run(program: str, *arguments: str) -> None:
        command = [*prefix, str(programs / program), "-D", str(folder / "data"), *arguments]
        # not captured by a pipe, which the server would keep open
        with (folder / "output").open("ab") as output:
            done = subprocess.run(command, cwd=folder, stdout=output, stderr=output, check=False, timeout=900)
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
