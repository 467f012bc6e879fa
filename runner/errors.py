"""The one exception for what a user can mend: its text is the whole message, shown without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the user's: what was wrong, where it was written, what is allowed. Exit status 2.

    `wrong` and `right`, where given, are an argument of the command line and what to type instead; the
    door shows the corrected command with them.
    """

    def __init__(self, message: str, wrong: str | None = None, right: str | None = None):
        super().__init__(message)
        self.wrong, self.right = wrong, right


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known spelling that is closest to `word` (case aside), else the only one that it begins, else None."""
    names = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), names, n=1, cutoff=cutoff)
    longer = [name for name in names if len(word) > 2 and name.startswith(word.lower())]
    close = found or (longer if len(longer) == 1 else [])
    return names[close[0]] if close else None
