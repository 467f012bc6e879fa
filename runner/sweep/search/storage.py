"""The database of a study: its URL, password and connections."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.config.command import masked
from runner.errors import UserError, first_line
from runner.sweep.space import import_optuna

if TYPE_CHECKING:
    from optuna.storages import RDBStorage
    from sqlalchemy import URL

PASSWORD_VARIABLE = "RUNNER_STORAGE_PASSWORD"  # of the environment, for URLs that were saved without theirs
_LOCK_SECONDS = 60  # that a process waits for the others to let go of an SQLite file
_QUERY_PASSWORDS = ("password", "passwd", "pwd")  # keys of a URL's query
_HIDDEN = "***"
_NO_PASSWORD = (
    " A sweep's folder keeps no password: give sweep.storage= again with the whole URL, or set "
    f"{PASSWORD_VARIABLE}; PostgreSQL also reads PGPASSWORD and ~/.pgpass."
)
# packages that install a driver's module
_PACKAGES = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}


def open_storage(url: str, in_worker: bool = False) -> RDBStorage:
    """Open the database behind a URL; a worker's has its tables, and no connection of a worker outlives its use."""
    from optuna.storages import RDBStorage
    from sqlalchemy.pool import NullPool

    options: dict[str, Any] = {"poolclass": NullPool} if in_worker else {"pool_pre_ping": True}
    if url.startswith("sqlite"):  # the processes of a search wait for each other
        options["connect_args"] = {"timeout": _LOCK_SECONDS}
    return RDBStorage(url, options, skip_compatibility_check=in_worker, skip_table_creation=in_worker)


@contextlib.contextmanager
def database_errors(url: str) -> Iterator[None]:
    """Turn whatever a database raises into one message without its password."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    try:
        yield
    except (ImportError, ArgumentError, SQLAlchemyError, StorageInternalError) as error:
        if isinstance(error, ImportError):
            problem = _missing_driver(error)
        elif isinstance(error, ArgumentError):
            problem = f"is not a database URL: {first_line(error)}"
        else:
            cause = error.__cause__ if isinstance(error, StorageInternalError) else error
            hidden = _parse(url).password == _HIDDEN and PASSWORD_VARIABLE not in os.environ
            hint = _NO_PASSWORD if hidden else ""
            problem = f"cannot be used: {masked(first_line(getattr(cause, 'orig', None) or cause))}{hint}"
        raise UserError(f"sweep.storage={hide_password(url)} {problem}") from None


def _missing_driver(error: ImportError) -> str:
    names = [e.name for e in (error, error.__cause__) if isinstance(e, ImportError) and e.name]
    if not names:
        return first_line(error)
    package = _PACKAGES.get(names[0].split(".")[0], names[0])
    return f"needs the driver {names[0]}: pip install '{package}'."


def check_storage(url: str) -> None:
    """Raise a ValueError for what is no database's URL, or one that would show a part of its password."""
    import_optuna()
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = _parse(url)
    except (ArgumentError, ValueError):  # a port that is no number
        raise ValueError(
            "storage must be a database URL, such as sqlite:////tmp/study.db or "
            f"postgresql+psycopg://USER@HOST/NAME, got {masked(url)}"
        ) from None
    if "@" in (parsed.host or "") or (parsed.password is not None and " " in url):
        raise ValueError("storage: within a user name or a password, write @ as %40, a space as %20")


def _parse(url: str) -> URL:
    """Parse a URL; a password in its query is moved to its usual place."""
    from sqlalchemy import make_url

    parsed = make_url(url)
    moved = {key: parsed.query[key] for key in _QUERY_PASSWORDS if key in parsed.query}
    for password in moved.values():
        parsed = parsed.set(username=parsed.username or "", password=str(password))
    return parsed.difference_update_query(moved)


def hide_password(url: str) -> str:
    """Return a URL for the screen or a file: with *** for its password."""
    parsed = _parse(url)
    return url if parsed.password is None else parsed.render_as_string()


def restore_password(url: str) -> str:
    """Return a URL that was saved without its password, with that of the environment.

    Where there is none the driver looks for itself, as PostgreSQL's does in PGPASSWORD and ~/.pgpass.
    """
    parsed = _parse(url)
    if parsed.password != _HIDDEN:
        return url
    return parsed._replace(password=os.environ.get(PASSWORD_VARIABLE)).render_as_string(hide_password=False)


def export_password(url: str) -> None:
    """Put a URL's password where the processes of a launcher find it: what is pickled may lie on a disk."""
    password = _parse(url).password
    if password and os.environ.get(PASSWORD_VARIABLE) != password:
        os.environ[PASSWORD_VARIABLE] = password
        # the processes that joblib keeps from an earlier sweep have the environment of then
        loky = sys.modules.get("joblib.externals.loky")
        if loky is not None:
            loky.get_reusable_executor().shutdown()


def require_same_storage(url: str, saved: str | None, folder: Path) -> None:
    """Raise a UserError for a database that is not the one of the search, whatever its password."""
    if saved is None or _parse(url)._replace(password=None) != _parse(saved)._replace(password=None):
        where = "study.db in its folder" if saved is None else hide_password(saved)
        raise UserError(
            f"sweep.storage={hide_password(url)}: the search in {folder} lies in {where}; "
            "a resume may add the password alone."
        )
