"""The database of a study: URL, password, locks."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from runner.config.command import masked
from runner.errors import UserError

if TYPE_CHECKING:
    from optuna.storages import RDBStorage


PACKAGES = {  # what installs the module that a URL's driver is
    "psycopg": "psycopg[binary]",
    "psycopg2": "psycopg2-binary",
    "MySQLdb": "mysqlclient",
    "pymysql": "pymysql",
    "sqlalchemy": "sqlalchemy",
}
PASSWORD = (
    "RUNNER_STORAGE_PASSWORD"  # the environment's variable: the password of a URL that is kept without it
)
HIDDEN = re.compile(r":\*\*\*(?=@)|[?&]\w+=\*\*\*")  # where `masked` has left its stars in a URL
LOCK_SECONDS = 60  # that a process waits for the others to let go of an SQLite file


def open_storage(url: str) -> RDBStorage:
    """The database behind a URL, with its tables; `close_storage` gives its connections back."""
    from optuna.storages import RDBStorage

    return RDBStorage(url, engine_kwargs=connecting(url) | {"pool_pre_ping": True})


def visit_storage(url: str) -> RDBStorage:
    """A worker's way to a database that the parent has opened: no connection outlives its use."""
    from optuna.storages import RDBStorage
    from sqlalchemy.pool import NullPool

    options = connecting(url) | {"poolclass": NullPool}
    return RDBStorage(url, options, skip_compatibility_check=True, skip_table_creation=True)


def connecting(url: str) -> dict[str, Any]:
    """How to connect: the processes of a search write to one SQLite file, one after the other."""
    return {"connect_args": {"timeout": LOCK_SECONDS}} if url.startswith("sqlite") else {}


@contextlib.contextmanager
def reached(url: str, hint: str = "") -> Iterator[None]:
    """Turn what a database can go wrong with into one message, without its password; `hint` ends it."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    where = f"sweep.storage={masked(url)}"
    try:
        yield
    except ImportError as error:
        raise UserError(f"{where}: {driver_missing(error)}") from None
    except ArgumentError as error:
        raise UserError(f"{where} is no database's URL: {first_line(error)}") from None
    except (SQLAlchemyError, StorageInternalError) as error:
        cause = error.__cause__ if isinstance(error, StorageInternalError) else error
        reason = masked(first_line(getattr(cause, "orig", None) or cause))
        raise UserError(f"{where} cannot be used: {reason}{hint}") from None


def can_be_masked(url: str) -> bool:
    """Whether the part of a URL that SQLAlchemy takes for the password is what `masked` hides."""
    return url.startswith("sqlite") or (url.count("@") < 2 and not re.search(r"\s", url))


def password_of(url: str) -> str | None:
    """The password that stands in a URL, be it as a part of the query."""
    found = re.search(r"://[^:/@]*:([^@]*)@|[?&](?:password|passwd|pwd)=([^&]*)", url)
    return unquote(found[1] or found[2] or "") if found else None


def leave_password(url: str) -> None:
    """Put a URL's password where the processes of a launcher find it: what is pickled may lie on a disk."""
    password = password_of(url)
    if password and os.environ.get(PASSWORD) != password:
        os.environ[PASSWORD] = password
        loky = sys.modules.get("joblib.externals.loky")
        if (
            loky is not None
        ):  # the processes that joblib keeps from an earlier sweep have the environment of then
            loky.get_reusable_executor().shutdown()


def with_password(url: str) -> str:
    """A URL that was kept with stars, with the password of the environment.

    Where there is none the driver looks for itself, as PostgreSQL's does in PGPASSWORD and ~/.pgpass.
    """
    password = os.environ.get(PASSWORD)
    if password and HIDDEN.search(url):
        return url.replace("***", quote(password, safe=""))
    return without_password(url)


def without_password(url: str) -> str:
    """A URL that was kept with stars, without them."""
    bare = HIDDEN.sub("", url)
    return bare if "?" in bare else bare.replace("&", "?", 1)


def no_password(url: str) -> str:
    """What to do where a database wants a password and the URL was kept without, as the end of a message."""
    if os.environ.get(PASSWORD) or not HIDDEN.search(url):
        return ""
    return (
        " A sweep's folder keeps no password: give sweep.storage= again with the whole URL, or set "
        f"{PASSWORD}; PostgreSQL also reads PGPASSWORD and ~/.pgpass."
    )


def same_storage(typed: str, kept: str | None, folder: Path) -> str:
    """The URL that is typed to go on with a search: the kept one, with a password.

    Raises:
        UserError: it is another database.
    """
    if kept is None or without_password(masked(typed)) != without_password(masked(kept)):
        there = "study.db in its folder" if kept is None else masked(kept)
        raise UserError(
            f"sweep.storage={masked(typed)}: the search in {folder} lies in {there}; "
            "a resume may add the password alone."
        )
    return typed


def driver_missing(error: ImportError) -> str:
    """What to install for a database."""
    missing = next((e.name for e in (error, error.__cause__) if isinstance(e, ImportError) and e.name), None)
    if missing is None:
        return first_line(error)
    package = PACKAGES.get(missing.split(".")[0], missing)
    return f"the driver {missing} is not installed: pip install '{package}'."


def first_line(error: object) -> str:
    """The first line of an error's text."""
    return next(iter(str(error).strip().splitlines()), "")
