"""The one exception for what a user can mend: its text is the whole message, shown without a traceback."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator

# as the CPU, CUDA and its libraries, and MPS say it
LACK_OF_MEMORY = re.compile("allocate memory|out of memory|not enough memory|ALLOC_FAILED")
ASKED_FOR = re.compile(r"allocate ([\d.]+) ?(bytes|[KMGT]iB|[KMGT]B)")


class UserError(Exception):
    """A mistake of the user's: what was wrong, where it was written, what is allowed. Exit status 2.

    `wrong` and `right`, where given, are an argument of the command line and what to type instead; the
    door shows the corrected command with them.
    """

    def __init__(self, message: str, wrong: str | None = None, right: str | None = None):
        super().__init__(message)
        self.wrong, self.right = wrong, right


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known spelling that is closest to `word` (case aside), or None where none is close.

    Where no ratio of common letters says so: the same letters in another order, or the only word that it begins.
    """
    typed, names = word.lower(), {name.lower(): name for name in known}
    found = difflib.get_close_matches(typed, names, n=1, cutoff=cutoff)
    found = found or [name for name in names if sorted(name) == sorted(typed)]
    if not found and len(typed) > 2:
        begun = [name for name in names if name.startswith(typed)]
        found = begun if len(begun) == 1 else []
    return names[found[0]] if found else None


def unknown(kind: str, name: str, available: Iterable[str], line: str | None = None) -> UserError:
    """Build the error for a name that does not exist: the nearest one, all that do, and `line` corrected."""
    names = list(available)
    close = nearest(name, names)
    hint = f"; did you mean {close!r}?" if close else "."
    right = respell(line, name, close) if line and close else None
    return UserError(f"unknown {kind} {name!r}{hint} Available: {', '.join(names) or 'none'}.", line, right)


def respell(line: str, wrong: str, right: str) -> str:
    """Return an override with one word of its value replaced, or of its key where the value has it not."""
    key, _, value = line.partition("=")
    word = rf"(?<![\w.-]){re.escape(wrong)}(?![\w.-])"
    if re.search(word, value):
        return f"{key}={re.sub(word, lambda _: right, value, count=1)}"
    return line.replace(wrong, right, 1)


def did_you_mean(close: str | None) -> str:
    """The nearest spelling as the end of a sentence, or nothing."""
    return f" Did you mean {close}?" if close else ""


def lacks_memory(error: Exception) -> bool:
    """Whether an error says that there was less memory than was asked for."""
    return isinstance(error, MemoryError) or bool(LACK_OF_MEMORY.search(str(error)))


@contextlib.contextmanager
def memory_for(name: str, size: int, things: str = "samples") -> Iterator[None]:
    """What asks for more memory than there is becomes the user's to mend.

    Raises:
        UserError: the memory does not hold `size` things at once, of which the argument `name` decides.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        if size == 1:  # nothing smaller can be tried
            raise UserError(f"The memory does not hold this network and {name}=1.") from None
        smaller = f"{name}={size // 2}"
        raise UserError(
            f"The memory does not hold {size:,} {things} at once: try {smaller}.", f"{name}={size}", smaller
        ) from None


@contextlib.contextmanager
def room_for(what: str, smaller: str, size: int | None = None) -> Iterator[None]:
    """As `memory_for`, for what no number of samples decides: `smaller` says what takes less, after a colon.

    Raises:
        UserError: the memory does not hold `what`, of `size` bytes, or of as many as its own message says.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        asked = ASKED_FOR.search(str(error))
        about = f", about {in_words(size)}" if size else ""
        if asked and not size:
            number, unit = asked.groups()
            about = f", {in_words(int(number)) if unit == 'bytes' else f'{number} {unit}'} of it at once"
        raise UserError(f"The memory does not hold {what}{about}: {smaller}.") from None


def in_words(size: float) -> str:
    """Bytes as people say them, in powers of 1000."""
    unit = "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"
