"""Checks of arguments: each message begins with the argument's name, says the rule, and then what was given."""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["at_least", "one_of", "within"]


def at_least(least: int, **numbers: int) -> None:
    """Raise ValueError where a number is below `least`."""
    for name, number in numbers.items():
        if number < least:
            raise ValueError(f"{name} must be at least {least}, not {number}")


def within(low: float, high: float, closed: bool = False, **numbers: float) -> None:
    """Raise ValueError where a number lies outside [low, high), or [low, high] if `closed`."""
    for name, number in numbers.items():
        if not (low <= number <= high if closed else low <= number < high):
            raise ValueError(f"{name} must lie in [{low}, {high}{']' if closed else ')'}, not {number}")


def one_of(choices: Collection[str], **words: str) -> None:
    """Raise ValueError where a word is none of the choices."""
    for name, word in words.items():
        if word not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, not {word}")
