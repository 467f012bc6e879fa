"""The one exception for what a user can correct: its text is the whole message, shown without a traceback."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator

# as the CPU, CUDA and its libraries, and MPS say it
_OUT_OF_MEMORY = re.compile("allocate memory|out of memory|not enough memory|ALLOC_FAILED")


class UserError(Exception):
    """A mistake of the user's: expected, given, what to type. Exit status 2.

    `wrong` is an argument of the command line and `right` what to type instead: `-m` adds the flag, an empty
    text removes the argument. The command line shows the corrected command where that is accepted.
    """

    def __init__(self, message: str, wrong: str | None = None, right: str | None = None):
        super().__init__(message)
        self.wrong, self.right = wrong, right


def nearest(word: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the name that is closest to `word`, case aside, or None where none is close.

    By the ratio of common letters, else by the same letters in another order, else the only one it begins.
    """
    typed, lowered = word.lower(), {name.lower(): name for name in names}
    matches = difflib.get_close_matches(typed, lowered, n=1, cutoff=cutoff)
    matches = matches or [name for name in lowered if sorted(name) == sorted(typed)]
    if not matches and len(typed) > 2:
        begun = [name for name in lowered if name.startswith(typed)]
        matches = begun if len(begun) == 1 else []
    return lowered[matches[0]] if matches else None


def unknown(kind: str, name: str, available: Iterable[str], line: str | None = None) -> UserError:
    """Build the error for a name that does not exist: the nearest one, all that do, and `line` corrected."""
    names = list(available)
    close = nearest(name, names)
    hint = f"; did you mean {close!r}?" if close else "."
    right = None
    if line and close:  # in the value, or in the key where the value has it not
        key, _, value = line.partition("=")
        respelt, count = re.subn(rf"(?<![\w.-]){re.escape(name)}(?![\w.-])", lambda _: close, value, count=1)
        right = f"{key}={respelt}" if count else line.replace(name, close, 1)
    return UserError(f"unknown {kind} {name!r}{hint} Available: {', '.join(names) or 'none'}.", line, right)


def raise_first(errors: Iterable[UserError | None]) -> None:
    """Raise the first of these that is an error."""
    for error in errors:
        if error is not None:
            raise error


def did_you_mean(close: str | None) -> str:
    """Return the nearest spelling as the end of a message, or nothing."""
    return f" Did you mean {close}?" if close else ""


def at_least(least: float, **arguments: float | None) -> None:
    """Raise a ValueError that begins with the argument's name for the first one below `least`; None passes."""
    for name, value in arguments.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def first_line(message: object) -> str:
    """Return the first line of a message that may have many, or none."""
    return next(iter(str(message or "").strip().splitlines()), "")


def lacks_memory(error: Exception) -> bool:
    """Return whether an error says that there was less memory than was asked for."""
    return isinstance(error, MemoryError) or bool(_OUT_OF_MEMORY.search(str(error)))


@contextlib.contextmanager
def out_of_memory_hint(
    place: str, remedy: str, wrong: str | None = None, right: str | None = None
) -> Iterator[None]:
    """Turn a lack of memory into a UserError that says where it was and what to try."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        raise UserError(f"out of memory {place}; try {remedy}", wrong, right) from None


def memory_for(key: str, size: int) -> contextlib.AbstractContextManager[None]:
    """Turn a lack of memory for `size` samples at once, which `key` sets, into a UserError with half of them."""
    if size == 1:
        return out_of_memory_hint(f"at {key}=1", "a smaller network")
    smaller = f"{key}={size // 2}"
    return out_of_memory_hint(f"at {key}={size}", smaller, f"{key}={size}", smaller)


def within(low: float, high: float, closed: bool = False, **arguments: float) -> None:
    """Raise ValueError for the first argument outside [low, high), or outside [low, high] if `closed`."""
    for name, value in arguments.items():
        if not (low <= value <= high if closed else low <= value < high):
            raise ValueError(f"{name} must lie in [{low}, {high}{']' if closed else ')'}, got {value}")
