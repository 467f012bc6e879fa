"""Database URLs, read as SQLAlchemy reads them: no password is shown or kept."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from runner.config.command import masked
from runner.errors import UserError
from runner.sweep.search.storage import (
    PASSWORD_VARIABLE,
    hide_password,
    require_same_storage,
    restore_password,
)
from runner.sweep.search.study import TrialReporter

sqlalchemy = pytest.importorskip("sqlalchemy")


@pytest.mark.parametrize(
    ("url", "hidden"),
    [
        ("postgresql://me:pass@host/name", "postgresql://me:***@host/name"),
        ("postgresql://host/name?user=me&password=pass", "postgresql://:***@host/name?user=me"),
        ("sqlite:////tmp/a@b/study.db", "sqlite:////tmp/a@b/study.db"),
        ("postgresql://me@host/name", "postgresql://me@host/name"),
    ],
)
def test_hide_password(url: str, hidden: str) -> None:
    assert sqlalchemy.make_url(hide_password(url)) == sqlalchemy.make_url(hidden)
    reporter = TrialReporter(url, "toy", 0)
    assert "pass" not in hide_password(url).replace("password", "") + repr(reporter)
    assert b":pass" not in pickle.dumps(reporter) and b"=pass" not in pickle.dumps(reporter)


def test_passwords_in_messages_are_masked() -> None:
    assert masked("postgresql://me:p@ss@host/name") == "postgresql://me:***@host/name"
    assert masked("x://host/name?user=me&password=pass") == "x://host/name?user=me&password=***"
    assert masked("sqlite:////tmp/a@b/study.db") == "sqlite:////tmp/a@b/study.db"
    assert masked("'a://me:p w' and b://me:x@host, c@d") == "'a://me:p w' and b://me:***@host, c@d"


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://me:se%2Fc%40ret@host:5432/name?connect_timeout=3",
        "postgresql://me:se%2Fc%40ret@/name?host=/tmp/x",
        "postgresql://host/name?user=me&password=se%2Fc%40ret&connect_timeout=3",
        "postgresql://host/name?password=se%2Fc%40ret",
        "mysql+pymysql://host/name?password=se%2Fc%40ret&charset=utf8",
    ],
)
def test_saved_url_gets_its_password_from_the_environment(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)
    whole, saved = sqlalchemy.make_url(url), hide_password(url)
    connection = whole.get_dialect()().create_connect_args(whole)
    assert "ret" not in saved
    bare = sqlalchemy.make_url(restore_password(saved))
    assert bare._replace(username=None) == whole.difference_update_query(["password"])._replace(
        username=None, password=None
    )
    monkeypatch.setenv(PASSWORD_VARIABLE, "se/c@ret")
    restored = sqlalchemy.make_url(restore_password(saved))
    assert restored.get_dialect()().create_connect_args(restored) == connection
    assert restore_password(url) == url
    older = "postgresql://host/name?user=me&password=***"  # as version 0.1 saved them
    assert sqlalchemy.make_url(restore_password(older)).password == "se/c@ret"


def test_resume_may_add_the_password_alone(tmp_path: Path) -> None:
    typed = "postgresql://me:secret@host/name"
    for saved in (hide_password(typed), "postgresql://me@host/name", typed):
        require_same_storage(typed, saved, tmp_path)
    for other in ("postgresql://me@elsewhere/name", "postgresql://you:***@host/name", None):
        with pytest.raises(UserError, match="lies in") as caught:
            require_same_storage(typed, other, tmp_path)
        assert "secret" not in str(caught.value)
